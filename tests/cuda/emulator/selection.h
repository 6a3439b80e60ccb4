// The pairs of types whose kernels are compiled for the emulator: those of most cases of the conformance list, and one
// of each kind. All of them would take the compiler half an hour.
#ifndef TURBOQUANT_CUDA_EMULATOR_SELECTION_H
#define TURBOQUANT_CUDA_EMULATOR_SELECTION_H

#include "turboquant_cuda.h"

namespace turboquant {
namespace cuda {

constexpr bool selected(KV k, KV v, int head) {
    struct Row {
        KV k, v;
        int head;
    };
    constexpr Row rows[] = {
        {KV::turbo4, KV::turbo4, 128},
    };
    for (const Row & row : rows)
        if (row.k == k && row.v == v && row.head == head) return true;
    return false;
}

} // namespace cuda
} // namespace turboquant

#define TURBOQUANT_COMPILES(type_k, type_v, head) ::turboquant::cuda::selected(type_k, type_v, head)

#endif
