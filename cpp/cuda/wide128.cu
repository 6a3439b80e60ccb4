// The instances of the kernel for many columns, for heads of 128 values.
#include "wide.cuh"

namespace turboquant {
namespace cuda {

WideKernel wide_kernel_128(KV type_k, KV type_v, int operands) {
    return wide_kernel_for<128>(type_k, type_v, operands);
}

} // namespace cuda
} // namespace turboquant
