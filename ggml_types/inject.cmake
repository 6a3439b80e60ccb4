# Adds the TurboQuant codec and the glue to ggml-base. llama.cpp's build files are not edited: configure a patched tree
# with -DCMAKE_PROJECT_ggml_INCLUDE=<this file> and CMake runs this inside project(ggml).

if (CMAKE_VERSION VERSION_LESS 3.19)
    message(FATAL_ERROR "TurboQuant needs CMake 3.19 or newer, this is ${CMAKE_VERSION}: pip install cmake")
endif()

get_filename_component(TURBOQUANT_GLUE_DIR "${CMAKE_CURRENT_LIST_DIR}"    ABSOLUTE)
get_filename_component(TURBOQUANT_CORE_DIR "${CMAKE_CURRENT_LIST_DIR}/../cpp" ABSOLUTE)

file(STRINGS "${PROJECT_SOURCE_DIR}/include/ggml.h" TURBOQUANT_PATCHED REGEX "GGML_TYPE_TURBO4")
if (NOT TURBOQUANT_PATCHED)
    message(FATAL_ERROR "${PROJECT_SOURCE_DIR} is not patched: run `turboquant patch` on this llama.cpp tree first")
endif()

include("${TURBOQUANT_CORE_DIR}/turboquant.cmake")
include("${TURBOQUANT_CORE_DIR}/turboquant-cuda.cmake")

# ggml-base does not exist yet; this runs at the end of ggml's CMakeLists.txt.
function(turboquant_attach)
    target_sources(ggml-base PRIVATE
        "${TURBOQUANT_GLUE_DIR}/turbo-ggml.h"
        "${TURBOQUANT_GLUE_DIR}/turbo-ggml.cpp"
        $<TARGET_OBJECTS:turboquant_objects>)
    # PUBLIC: the backends, libllama, common and the tests include the glue's headers. They need no install, as no
    # installed header of llama.cpp includes them.
    target_include_directories(ggml-base PUBLIC
        $<BUILD_INTERFACE:${TURBOQUANT_GLUE_DIR}>
        $<BUILD_INTERFACE:${TURBOQUANT_CORE_DIR}/include>)
    if (TARGET ggml-cuda)
        turboquant_add_cuda(ggml-cuda)
        target_sources(ggml-cuda PRIVATE "${TURBOQUANT_GLUE_DIR}/turbo-cuda.h" "${TURBOQUANT_GLUE_DIR}/turbo-cuda.cu")
        target_include_directories(ggml-cuda PRIVATE "${PROJECT_SOURCE_DIR}/src/ggml-cuda")
    endif()
    if (WIN32 AND BUILD_SHARED_LIBS)
        target_compile_definitions(turboquant_objects PRIVATE TURBOQUANT_SHARED TURBOQUANT_BUILD)
        target_compile_definitions(ggml-base PRIVATE TURBOQUANT_BUILD PUBLIC TURBOQUANT_SHARED)
    endif()
endfunction()

# Every variant of the CPU backend starts from this list.
list(APPEND GGML_CPU_SOURCES "${TURBOQUANT_GLUE_DIR}/turbo-cpu.cpp")

cmake_language(DEFER CALL turboquant_attach)

# What libllama gets, and programs of our own over it. Its target exists at the end of the topmost CMakeLists.txt.
function(turboquant_attach_llama folder vendor)
    if (TARGET llama AND NOT TARGET turboquant-capture)
        set(sources "${folder}/turbo-llama.cpp" "${folder}/turbo-guard.cpp" "${folder}/turbo-plan.cpp"
            "${folder}/turbo-window.cpp")
        target_sources(llama PRIVATE ${sources})
        set_source_files_properties(${sources} TARGET_DIRECTORY llama PROPERTIES
            INCLUDE_DIRECTORIES "${vendor}" SKIP_UNITY_BUILD_INCLUSION ON)
        foreach (program turboquant-capture turboquant-measure)
            add_executable(${program} "${folder}/${program}.cpp")
            target_compile_features(${program} PRIVATE cxx_std_17)
            target_link_libraries(${program} PRIVATE llama)
        endforeach()
    endif()
endfunction()

# EVAL: the arguments are needed as they are now.
cmake_language(EVAL CODE "cmake_language(DEFER DIRECTORY [[${CMAKE_SOURCE_DIR}]]
    CALL turboquant_attach_llama [[${TURBOQUANT_GLUE_DIR}]] [[${PROJECT_SOURCE_DIR}/../vendor]])")
