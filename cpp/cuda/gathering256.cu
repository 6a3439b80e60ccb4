// The instances of the attention kernel that gather rows, for heads of 256 values.
#include "attention.cuh"

namespace turboquant {
namespace cuda {

AttentionKernel gathering_kernel_256(const KernelChoice & choice) { return kernel_for<256, true>(choice); }

} // namespace cuda
} // namespace turboquant
