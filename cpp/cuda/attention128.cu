// Heads of 128.
#include "attention.cuh"

namespace turboquant {
namespace cuda {

TURBOQUANT_ATTENTION_KERNELS(128)

} // namespace cuda
} // namespace turboquant
