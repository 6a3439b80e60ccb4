// The instances of the kernel for a few tokens on Hopper GPUs, for heads of 128 values. This file is compiled for
// sm_90a, too.
#include "hopper_direct.cuh"

namespace turboquant {
namespace cuda {

WideKernel hopper_direct_kernel_128(KV type_k, KV type_v, int eights) {
    return hopper_direct_kernel_for<128>(type_k, type_v, eights);
}

} // namespace cuda
} // namespace turboquant
