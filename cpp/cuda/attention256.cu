// The instances of the attention kernel for heads of 256 values.
#include "attention.cuh"

namespace turboquant {
namespace cuda {

AttentionKernel attention_kernel_256(KV type_k, KV type_v, bool windowed) {
    return kernel_for<256>(type_k, type_v, windowed);
}

} // namespace cuda
} // namespace turboquant
