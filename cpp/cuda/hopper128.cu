// The instances of the kernel for Hopper GPUs, for heads of 128 values. This file is compiled for sm_90a, too.
#include "hopper.cuh"

namespace turboquant {
namespace cuda {

WideKernel hopper_kernel_128(KV type_k, KV type_v, bool merged) {
    return hopper_kernel_for<128>(type_k, type_v, merged);
}

} // namespace cuda
} // namespace turboquant
