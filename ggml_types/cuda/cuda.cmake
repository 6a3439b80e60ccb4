# ggml-cuda: the kernels and the glue, in a build with this backend.
include("${TURBOQUANT_CORE_DIR}/turboquant-cuda.cmake")

# The target ggml-cuda does not exist yet; this function runs at the end of ggml's CMakeLists.txt.
function(turboquant_attach_cuda)
    if (TARGET ggml-cuda)
        turboquant_add_cuda(ggml-cuda)
        target_sources(ggml-cuda PRIVATE "${TURBOQUANT_GLUE_DIR}/cuda/turbo-cuda.cu")
        target_include_directories(ggml-cuda PRIVATE "${PROJECT_SOURCE_DIR}/src/ggml-cuda")
    endif()
endfunction()
cmake_language(DEFER CALL turboquant_attach_cuda)
