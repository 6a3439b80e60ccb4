// CUDA's C++ for kernels that were translated by translate.py: keywords, vector types, launches and intrinsics.
#ifndef TURBOQUANT_CUDA_EMULATOR_RUNTIME_H
#define TURBOQUANT_CUDA_EMULATOR_RUNTIME_H

#include "../intrinsics.h"
#include "cuda_runtime_api.h"

#include <functional>
#include <tuple>

// translate.py replaces __global__, __launch_bounds__, __shared__, asm and <<<>>>.
#define __host__
#define __device__
#define __constant__
#define __grid_constant__
#define __forceinline__ inline __attribute__((always_inline))
#define __align__(bytes) __attribute__((aligned(bytes)))

struct dim3 {
    unsigned x, y, z;
    constexpr dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};

// ---- launches

enum cudaLaunchAttributeID {
    cudaLaunchAttributeProgrammaticStreamSerialization,
    cudaLaunchAttributeClusterDimension,
};
struct cudaLaunchAttribute {
    cudaLaunchAttributeID id;
    struct {
        int programmaticStreamSerializationAllowed;
        dim3 clusterDim;
    } val;
};
struct cudaLaunchConfig_t {
    dim3 gridDim, blockDim;
    size_t dynamicSmemBytes;
    cudaStream_t stream;
    cudaLaunchAttribute * attrs;
    unsigned numAttrs;
};

namespace emulator {

// Runs a kernel, unless the launch is not valid. The error is also that of cudaGetLastError.
cudaError_t launch(const void * kernel, dim3 grid, dim3 block, dim3 cluster, size_t dynamic_bytes,
                   std::function<void()> run_thread);

template <typename... Parameters>
cudaError_t launch(void (*kernel)(Parameters...), dim3 grid, dim3 block, dim3 cluster, size_t dynamic_bytes,
                   const std::tuple<Parameters...> & arguments) {
    return launch(reinterpret_cast<const void *>(kernel), grid, block, cluster, dynamic_bytes,
                  [&] { std::apply(kernel, arguments); });
}

// `kernel<<<grid, block, bytes, stream>>>(arguments)` becomes `kernel ->* Configuration(grid, ...)(arguments)`, which
// the compiler groups as the former.
template <typename... Arguments> struct Launch {
    dim3 grid, block;
    size_t dynamic_bytes;
    std::tuple<Arguments...> arguments;
};
struct Configuration {
    dim3 grid, block;
    size_t dynamic_bytes;
    Configuration(dim3 grid, dim3 block, size_t dynamic_bytes = 0, cudaStream_t = nullptr)
        : grid(grid), block(block), dynamic_bytes(dynamic_bytes) {}
    template <typename... Arguments> Launch<Arguments...> operator()(Arguments... arguments) const {
        return {grid, block, dynamic_bytes, {arguments...}};
    }
};
template <typename... Parameters, typename... Arguments>
void operator->*(void (*kernel)(Parameters...), const Launch<Arguments...> & l) {
    launch(kernel, l.grid, l.block, dim3(), l.dynamic_bytes, std::tuple<Parameters...>(l.arguments));
}

// Static shared memory of a kernel, which has at most one such variable. It precedes the dynamic one.
bool register_static_shared(const void * kernel, size_t bytes);
template <typename T, auto kernel> struct StaticShared {
    static const bool registered;
    static T & get() {
        (void) &registered;
        return *reinterpret_cast<T *>(current->block->shared);
    }
};
template <typename T, auto kernel>
const bool StaticShared<T, kernel>::registered =
    register_static_shared(reinterpret_cast<const void *>(kernel), sizeof(T));

inline uint8_t * dynamic_shared() {
    const Block & block = *current->block;
    return block.shared + (block.static_bytes + 15) / 16 * 16;
}

// The beginning of a kernel. most: the threads of its launch bounds. flush: whether floats below the normal ones are
// zeros, as nvcc's fast math has them.
void enter_kernel(const char * name, int most, bool flush);

} // namespace emulator

template <typename... Parameters, typename... Arguments>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t * config, void (*kernel)(Parameters...),
                               Arguments... arguments) {
    dim3 cluster;
    for (unsigned i = 0; i < config->numAttrs; ++i)
        if (config->attrs[i].id == cudaLaunchAttributeClusterDimension) cluster = config->attrs[i].val.clusterDim;
    return emulator::launch(kernel, config->gridDim, config->blockDim, cluster, config->dynamicSmemBytes,
                            std::tuple<Parameters...>(arguments...));
}

#endif
