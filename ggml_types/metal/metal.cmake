# ggml-metal: the kernels and the glue, in a build with this backend.
include("${TURBOQUANT_CORE_DIR}/turboquant-metal.cmake")

# The target ggml-metal does not exist yet; this function runs at the end of ggml's CMakeLists.txt.
function(turboquant_attach_metal)
    if (TARGET ggml-metal)
        turboquant_add_metal(ggml-metal)
        target_sources(ggml-metal PRIVATE "${TURBOQUANT_GLUE_DIR}/metal/turbo-metal.cpp")
        target_include_directories(ggml-metal PRIVATE "${PROJECT_SOURCE_DIR}/src/ggml-metal")
    endif()
endfunction()
cmake_language(DEFER CALL turboquant_attach_metal)
