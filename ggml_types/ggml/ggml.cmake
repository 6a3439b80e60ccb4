# ggml-base: the codec and the glue.

# The target ggml-base does not exist yet; this function runs at the end of ggml's CMakeLists.txt.
function(turboquant_attach)
    target_sources(ggml-base PRIVATE
        "${TURBOQUANT_GLUE_DIR}/ggml/turbo-types.cpp"
        "${TURBOQUANT_GLUE_DIR}/ggml/turbo-traits.cpp"
        "${TURBOQUANT_GLUE_DIR}/ggml/turbo-ops.cpp"
        "${TURBOQUANT_GLUE_DIR}/ggml/turbo-options.cpp"
        "${TURBOQUANT_GLUE_DIR}/ggml/turbo-count.cpp"
        $<TARGET_OBJECTS:turboquant_objects>)
    # PUBLIC, because the backends, libllama, common and the tests include the glue's headers. The headers are not
    # installed, because no installed header of llama.cpp includes them.
    target_include_directories(ggml-base PUBLIC
        $<BUILD_INTERFACE:${TURBOQUANT_GLUE_DIR}>
        $<BUILD_INTERFACE:${TURBOQUANT_CORE_DIR}/include>)
    if (WIN32 AND BUILD_SHARED_LIBS)
        target_compile_definitions(turboquant_objects PRIVATE TURBOQUANT_SHARED TURBOQUANT_BUILD)
        target_compile_definitions(ggml-base PRIVATE TURBOQUANT_BUILD PUBLIC TURBOQUANT_SHARED)
    endif()
endfunction()
cmake_language(DEFER CALL turboquant_attach)
