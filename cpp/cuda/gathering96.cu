// The instances of the attention kernel that gather rows, for heads of 96 values.
#include "attention.cuh"

namespace turboquant {
namespace cuda {

AttentionKernel gathering_kernel_96(const KernelChoice & choice) { return kernel_for<96, true>(choice); }

} // namespace cuda
} // namespace turboquant
