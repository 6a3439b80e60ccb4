// The instances of the kernel for a few tokens, for heads of 128 values.
#include "direct.cuh"

namespace turboquant {
namespace cuda {

WideKernel direct_kernel_128(KV type_k, KV type_v) { return direct_kernel_for<128>(type_k, type_v); }

} // namespace cuda
} // namespace turboquant
