// The instances of the attention kernel for heads of 96 values.
#include "attention.cuh"

namespace turboquant {
namespace cuda {

AttentionKernel attention_kernel_96(const KernelChoice & choice) { return kernel_for<96, false>(choice); }

} // namespace cuda
} // namespace turboquant
