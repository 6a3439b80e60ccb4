// The instances of the attention kernel that gather rows, for heads of 128 values.
#include "attention.cuh"

namespace turboquant {
namespace cuda {

AttentionKernel gathering_kernel_128(const KernelChoice & choice) { return kernel_for<128, true>(choice); }

} // namespace cuda
} // namespace turboquant
