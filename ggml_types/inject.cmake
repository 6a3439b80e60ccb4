# Adds the TurboQuant types to ggml, libllama and the programs without changes in llama.cpp's build files: when a patched
# tree is configured with -DCMAKE_PROJECT_ggml_INCLUDE=<this file>, CMake runs this file inside project(ggml).

if (CMAKE_VERSION VERSION_LESS 3.19)
    message(FATAL_ERROR "TurboQuant needs CMake 3.19 or newer, this is ${CMAKE_VERSION}: pip install cmake")
endif()

get_filename_component(TURBOQUANT_GLUE_DIR "${CMAKE_CURRENT_LIST_DIR}"    ABSOLUTE)
get_filename_component(TURBOQUANT_CORE_DIR "${CMAKE_CURRENT_LIST_DIR}/../cpp" ABSOLUTE)

include("${TURBOQUANT_GLUE_DIR}/check.cmake")
include("${TURBOQUANT_CORE_DIR}/turboquant.cmake")

# The folders' files use TURBOQUANT_GLUE_DIR, TURBOQUANT_CORE_DIR and PROJECT_SOURCE_DIR, which is llama.cpp's folder ggml.
foreach (folder ggml cpu cuda metal programs llama)
    include("${TURBOQUANT_GLUE_DIR}/${folder}/${folder}.cmake")
endforeach()
