// The instances of the attention kernel for heads of 128 values.
#include "attention.cuh"

namespace turboquant {
namespace cuda {

AttentionKernel attention_kernel_128(const KernelChoice & choice) { return kernel_for<128, false>(choice); }

} // namespace cuda
} // namespace turboquant
