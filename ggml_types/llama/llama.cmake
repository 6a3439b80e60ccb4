# libllama: the glue, and this project's programs that use libllama.

# The target llama exists at the end of the top-level CMakeLists.txt.
function(turboquant_attach_llama folder vendor)
    if (TARGET llama AND NOT TARGET turboquant-capture)
        set(sources)
        foreach (name boundary devices guard layers llama model noise plan window)
            list(APPEND sources "${folder}/llama/turbo-${name}.cpp")
        endforeach()
        target_sources(llama PRIVATE ${sources})
        set_source_files_properties(${sources} TARGET_DIRECTORY llama PROPERTIES
            INCLUDE_DIRECTORIES "${vendor}" SKIP_UNITY_BUILD_INCLUSION ON)
        turboquant_add_programs("${folder}/programs")
    endif()
endfunction()

# EVAL expands the arguments now, not when the call runs.
cmake_language(EVAL CODE "cmake_language(DEFER DIRECTORY [[${CMAKE_SOURCE_DIR}]]
    CALL turboquant_attach_llama [[${TURBOQUANT_GLUE_DIR}]] [[${PROJECT_SOURCE_DIR}/../vendor]])")
