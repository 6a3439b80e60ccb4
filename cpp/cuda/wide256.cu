// The instances of the kernel for many columns, for heads of 256 values.
#include "wide.cuh"

namespace turboquant {
namespace cuda {

WideKernel wide_kernel_256(KV type_k, KV type_v, int operands) {
    return wide_kernel_for<256>(type_k, type_v, operands);
}

} // namespace cuda
} // namespace turboquant
