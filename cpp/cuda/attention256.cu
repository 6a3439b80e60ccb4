// Heads of 256.
#include "attention.cuh"

namespace turboquant {
namespace cuda {

TURBOQUANT_ATTENTION_KERNELS(256)

} // namespace cuda
} // namespace turboquant
