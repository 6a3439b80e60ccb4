# The CUDA kernels' sources and flags, in one place. CUDA must be enabled where the target is.
set(TURBOQUANT_CUDA_FOLDER ${CMAKE_CURRENT_LIST_DIR}/cuda)

# Whether the kernels for Hopper GPUs are built: CMAKE_CUDA_ARCHITECTURES includes these GPUs, and nvcc knows sm_90a.
function(turboquant_builds_hopper result)
    set(architectures "${CMAKE_CUDA_ARCHITECTURES}")
    if(architectures STREQUAL "native" AND CMAKE_CUDA_ARCHITECTURES_NATIVE)
        set(architectures "${CMAKE_CUDA_ARCHITECTURES_NATIVE}")
    endif()
    if(architectures MATCHES "(^|;)(90|native|all)" AND CMAKE_CUDA_COMPILER_ID STREQUAL "NVIDIA" AND
            NOT CMAKE_CUDA_COMPILER_VERSION VERSION_LESS 12.0)
        set(${result} ON PARENT_SCOPE)
    else()
        set(${result} OFF PARENT_SCOPE)
    endif()
endfunction()

# Adds the kernels to `target`.
function(turboquant_add_cuda target)
    target_sources(${target} PRIVATE
        ${TURBOQUANT_CUDA_FOLDER}/turboquant_cuda.h
        ${TURBOQUANT_CUDA_FOLDER}/codec.cu
        ${TURBOQUANT_CUDA_FOLDER}/window.cu
        ${TURBOQUANT_CUDA_FOLDER}/attention.cu
        ${TURBOQUANT_CUDA_FOLDER}/attention64.cu
        ${TURBOQUANT_CUDA_FOLDER}/attention128.cu
        ${TURBOQUANT_CUDA_FOLDER}/attention256.cu
        ${TURBOQUANT_CUDA_FOLDER}/wide.cu
        ${TURBOQUANT_CUDA_FOLDER}/wide64.cu
        ${TURBOQUANT_CUDA_FOLDER}/wide128.cu
        ${TURBOQUANT_CUDA_FOLDER}/wide256.cu)
    target_include_directories(${target} PRIVATE ${TURBOQUANT_CUDA_FOLDER} ${TURBOQUANT_CUDA_FOLDER}/../include)
    # The bytes and floats must be the CPU's: no contraction and no fast math, whatever the target asks for.
    set_source_files_properties(
        ${TURBOQUANT_CUDA_FOLDER}/codec.cu ${TURBOQUANT_CUDA_FOLDER}/window.cu TARGET_DIRECTORY ${target} PROPERTIES
        COMPILE_OPTIONS "--ftz=false;--prec-div=true;--prec-sqrt=true;--fmad=false")
    # Code for sm_90 lacks instructions that sm_90a has. So this source has a target of its own, with one architecture.
    turboquant_builds_hopper(hopper)
    if(hopper)
        set(objects ${target}_turboquant_hopper)
        add_library(${objects} OBJECT ${TURBOQUANT_CUDA_FOLDER}/hopper128.cu)
        set_target_properties(${objects} PROPERTIES
            CUDA_ARCHITECTURES OFF POSITION_INDEPENDENT_CODE ON CUDA_STANDARD 17 CUDA_STANDARD_REQUIRED ON)
        target_compile_options(${objects} PRIVATE "-gencode=arch=compute_90a,code=sm_90a" -use_fast_math)
        target_include_directories(${objects} PRIVATE
            ${TURBOQUANT_CUDA_FOLDER} ${TURBOQUANT_CUDA_FOLDER}/../include)
        target_sources(${target} PRIVATE $<TARGET_OBJECTS:${objects}>)
        set_property(SOURCE ${TURBOQUANT_CUDA_FOLDER}/wide.cu TARGET_DIRECTORY ${target}
            APPEND PROPERTY COMPILE_DEFINITIONS TURBOQUANT_HOPPER)
    endif()
endfunction()
