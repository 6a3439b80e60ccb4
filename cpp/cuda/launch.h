// Launches that may overlap the end of the kernel before them (programmatic dependent launch, Hopper and newer).
// Kernels launched so call wait_for_previous first.
#ifndef TURBOQUANT_CUDA_LAUNCH_H
#define TURBOQUANT_CUDA_LAUNCH_H

#include <cuda_runtime.h>

#include <map>
#include <utility>

namespace turboquant {
namespace cuda {
namespace {

__device__ __forceinline__ void wait_for_previous() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

// The next kernel in the stream may be launched as soon as all thread blocks have called this, if it was launched for
// that; such kernels, ours and ggml's, wait for the end of those before them.
__device__ __forceinline__ void let_next_start() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.launch_dependents;");
#endif
}

// Starts the address translation of p and its way to the L2 cache. What is there may still change: nothing is read.
__device__ __forceinline__ void prefetch(const void * p) { asm volatile("prefetch.global.L2 [%0];" ::"l"(p)); }

// Whether the kernel's code for the current device has the instruction: not if it was compiled for an older one.
inline bool can_overlap(const void * kernel) {
    int device = 0, major = 0;
    if (cudaGetDevice(&device) != cudaSuccess ||
        cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device) != cudaSuccess || major < 9)
        return false;
    static thread_local std::map<std::pair<const void *, int>, bool> known; // GPUs of one machine may differ
    const auto found = known.find({kernel, device});
    if (found != known.end()) return found->second;
    cudaFuncAttributes attributes;
    const bool can = cudaFuncGetAttributes(&attributes, kernel) == cudaSuccess && attributes.ptxVersion >= 90;
    known.emplace(std::make_pair(kernel, device), can);
    return can;
}

template <typename... Parameters, typename... Arguments>
cudaError_t launch(void (*kernel)(Parameters...), dim3 grid, dim3 block, size_t shared, cudaStream_t stream,
                   Arguments... arguments) {
    cudaLaunchAttribute overlap;
    overlap.id = cudaLaunchAttributeProgrammaticStreamSerialization;
    overlap.val.programmaticStreamSerializationAllowed = 1;
    cudaLaunchConfig_t config = {};
    config.gridDim = grid;
    config.blockDim = block;
    config.dynamicSmemBytes = shared;
    config.stream = stream;
    config.attrs = &overlap;
    config.numAttrs = can_overlap(reinterpret_cast<const void *>(kernel)) ? 1 : 0;
    return cudaLaunchKernelEx(&config, kernel, Parameters(arguments)...);
}

} // namespace
} // namespace cuda
} // namespace turboquant

#endif
