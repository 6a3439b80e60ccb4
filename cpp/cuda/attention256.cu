// The instances of the attention kernel for heads of 256 values.
#include "attention.cuh"

namespace turboquant {
namespace cuda {

AttentionKernel attention_kernel_256(const KernelChoice & choice) { return kernel_for<256, false>(choice); }

} // namespace cuda
} // namespace turboquant
