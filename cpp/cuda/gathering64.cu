// The instances of the attention kernel that gather rows, for heads of 64 values.
#include "attention.cuh"

namespace turboquant {
namespace cuda {

AttentionKernel gathering_kernel_64(const KernelChoice & choice) { return kernel_for<64, true>(choice); }

} // namespace cuda
} // namespace turboquant
