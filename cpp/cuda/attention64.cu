// Heads of 64.
#include "attention.cuh"

namespace turboquant {
namespace cuda {

TURBOQUANT_ATTENTION_KERNELS(64)

} // namespace cuda
} // namespace turboquant
