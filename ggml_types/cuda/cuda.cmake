# ggml-cuda, in a build that has it: the kernels and their glue.
include("${TURBOQUANT_CORE_DIR}/turboquant-cuda.cmake")

# ggml-cuda does not exist yet; this runs at the end of ggml's CMakeLists.txt.
function(turboquant_attach_cuda)
    if (TARGET ggml-cuda)
        turboquant_add_cuda(ggml-cuda)
        target_sources(ggml-cuda PRIVATE "${TURBOQUANT_GLUE_DIR}/cuda/turbo-cuda.cu")
        target_include_directories(ggml-cuda PRIVATE "${PROJECT_SOURCE_DIR}/src/ggml-cuda")
    endif()
endfunction()
cmake_language(DEFER CALL turboquant_attach_cuda)
