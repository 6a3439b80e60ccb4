// Launches that may overlap the end of the preceding kernel (programmatic dependent launch, on Hopper and newer). A
// kernel that is launched in this way must call wait_for_previous before it reads or writes memory that earlier kernels
// use.
#ifndef TURBOQUANT_CUDA_LAUNCH_H
#define TURBOQUANT_CUDA_LAUNCH_H

#include "turboquant_cuda.h"

#include <cuda_runtime.h>

#include <map>
#include <utility>

namespace turboquant {
namespace cuda {

namespace {

// Waits until the preceding kernels in the stream have ended and their writes are visible: the last one has waited for
// those before it. Older GPUs start the kernel only then.
__device__ __forceinline__ void wait_for_previous() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

// Allows the next kernel in the stream to start as soon as all thread blocks have called this function or ended, if its
// launch permits the overlap. Kernels with such launches, ours and ggml's, wait for the end of the preceding kernels.
__device__ __forceinline__ void let_next_start() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.launch_dependents;");
#endif
}

// Prefetches the memory at p into the L2 cache, which includes the translation of the address. An earlier kernel may
// still write to this memory, because no value is read here.
__device__ __forceinline__ void prefetch(const void * p) { asm volatile("prefetch.global.L2 [%0];" ::"l"(p)); }

// Whether the kernel's code for the current device contains the instructions above. It does not if it was compiled for
// an older architecture.
inline bool can_overlap(const void * kernel) {
    int device = 0, major = 0;
    if (cudaGetDevice(&device) != cudaSuccess ||
        cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device) != cudaSuccess || major < 9)
        return false;
    static thread_local std::map<std::pair<const void *, int>, bool> known; // the GPUs of a machine may differ
    const auto found = known.find({kernel, device});
    if (found != known.end()) return found->second;
    cudaFuncAttributes attributes;
    const bool can = cudaFuncGetAttributes(&attributes, kernel) == cudaSuccess && attributes.ptxVersion >= 90;
    known.emplace(std::make_pair(kernel, device), can);
    return can;
}

// Launches a kernel that calls wait_for_previous, and returns the error of the launch. `cluster` thread blocks that
// follow each other in y are a cluster, if it is more than 1.
template <typename... Parameters, typename... Arguments>
cudaError_t launch_clusters(int cluster, void (*kernel)(Parameters...), dim3 grid, dim3 block, size_t shared,
                            cudaStream_t stream, Arguments... arguments) {
    cudaLaunchAttribute attributes[2];
    cudaLaunchConfig_t config = {};
    config.gridDim = grid;
    config.blockDim = block;
    config.dynamicSmemBytes = shared;
    config.stream = stream;
    config.attrs = attributes;
    if (can_overlap(reinterpret_cast<const void *>(kernel))) {
        cudaLaunchAttribute & overlap = attributes[config.numAttrs++];
        overlap.id = cudaLaunchAttributeProgrammaticStreamSerialization;
        overlap.val.programmaticStreamSerializationAllowed = 1;
    }
    if (cluster > 1) {
        cudaLaunchAttribute & size = attributes[config.numAttrs++];
        size.id = cudaLaunchAttributeClusterDimension;
        size.val.clusterDim.x = size.val.clusterDim.z = 1;
        size.val.clusterDim.y = unsigned(cluster);
    }
    return cudaLaunchKernelEx(&config, kernel, Parameters(arguments)...);
}
template <typename... Parameters, typename... Arguments>
cudaError_t launch(void (*kernel)(Parameters...), dim3 grid, dim3 block, size_t shared, cudaStream_t stream,
                   Arguments... arguments) {
    return launch_clusters(1, kernel, grid, block, shared, stream, arguments...);
}

} // namespace
} // namespace cuda
} // namespace turboquant

#endif
