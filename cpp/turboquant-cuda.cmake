# The CUDA kernels' sources and flags, in one place. CUDA must be enabled where the target is.
set(TURBOQUANT_CUDA_FOLDER ${CMAKE_CURRENT_LIST_DIR}/cuda)

# Adds the kernels to `target`.
function(turboquant_add_cuda target)
    target_sources(${target} PRIVATE
        ${TURBOQUANT_CUDA_FOLDER}/turboquant_cuda.h
        ${TURBOQUANT_CUDA_FOLDER}/codec.cu
        ${TURBOQUANT_CUDA_FOLDER}/window.cu
        ${TURBOQUANT_CUDA_FOLDER}/attention.cu
        ${TURBOQUANT_CUDA_FOLDER}/attention64.cu
        ${TURBOQUANT_CUDA_FOLDER}/attention96.cu
        ${TURBOQUANT_CUDA_FOLDER}/attention128.cu
        ${TURBOQUANT_CUDA_FOLDER}/attention256.cu
        ${TURBOQUANT_CUDA_FOLDER}/gather.cu
        ${TURBOQUANT_CUDA_FOLDER}/gathering64.cu
        ${TURBOQUANT_CUDA_FOLDER}/gathering96.cu
        ${TURBOQUANT_CUDA_FOLDER}/gathering128.cu
        ${TURBOQUANT_CUDA_FOLDER}/gathering256.cu
        ${TURBOQUANT_CUDA_FOLDER}/rope.cu
        ${TURBOQUANT_CUDA_FOLDER}/direct128.cu
        ${TURBOQUANT_CUDA_FOLDER}/wide.cu
        ${TURBOQUANT_CUDA_FOLDER}/wide64.cu
        ${TURBOQUANT_CUDA_FOLDER}/wide128.cu
        ${TURBOQUANT_CUDA_FOLDER}/wide256.cu
        ${TURBOQUANT_CUDA_FOLDER}/hopper128.cu
        ${TURBOQUANT_CUDA_FOLDER}/hopper_direct128.cu)
    target_include_directories(${target} PRIVATE ${TURBOQUANT_CUDA_FOLDER} ${TURBOQUANT_CUDA_FOLDER}/../include)
    # The bytes and floats must be the CPU's: no contraction and no fast math, whatever the target asks for.
    set_source_files_properties(
        ${TURBOQUANT_CUDA_FOLDER}/codec.cu ${TURBOQUANT_CUDA_FOLDER}/window.cu ${TURBOQUANT_CUDA_FOLDER}/attention.cu
        TARGET_DIRECTORY ${target} PROPERTIES
        COMPILE_OPTIONS "--ftz=false;--prec-div=true;--prec-sqrt=true;--fmad=false")
    # Code for sm_90 lacks instructions that code for sm_90a has. GPUs that can run both take the latter.
    get_target_property(architectures ${target} CUDA_ARCHITECTURES)
    if(architectures MATCHES "(^|;)(90|native|all)")
        set(nvcc12 "$<AND:$<CUDA_COMPILER_ID:NVIDIA>,$<VERSION_GREATER_EQUAL:$<CUDA_COMPILER_VERSION>,12.0>>")
        set_source_files_properties(
            ${TURBOQUANT_CUDA_FOLDER}/hopper128.cu ${TURBOQUANT_CUDA_FOLDER}/hopper_direct128.cu
            TARGET_DIRECTORY ${target} PROPERTIES
            COMPILE_OPTIONS "$<${nvcc12}:-gencode=arch=compute_90a,code=sm_90a>")
    endif()
endfunction()
