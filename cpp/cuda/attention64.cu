// The instances of the attention kernel for heads of 64 values.
#include "attention.cuh"

namespace turboquant {
namespace cuda {

AttentionKernel attention_kernel_64(const KernelChoice & choice) { return kernel_for<64, false>(choice); }

} // namespace cuda
} // namespace turboquant
