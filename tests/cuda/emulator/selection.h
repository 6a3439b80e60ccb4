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
        // the bases of the list
        {KV::turbo4, KV::turbo4, 128},
        {KV::turbo3, KV::turbo3, 128},
        {KV::q8_0, KV::turbo3, 128},
        {KV::turbo4_tcq, KV::turbo3_tcq, 128},
        // its mixed pairs
        {KV::turbo4, KV::turbo3, 128},
        {KV::turbo4_tcq, KV::turbo2_tcq, 128},
        {KV::turbo3_tcq, KV::turbo4_tcq, 64},
        // what else the kernels distinguish
        {KV::turbo2, KV::turbo2, 128},
        {KV::f16, KV::turbo4, 128},
        {KV::turbo4, KV::f16, 128},
        {KV::turbo4, KV::q8_0, 128},
        {KV::turbo4, KV::turbo4, 64},
        {KV::turbo3, KV::f16, 64},
        {KV::turbo4, KV::turbo4, 256},
        {KV::q8_0, KV::turbo4, 256},
        {KV::turbo4, KV::turbo4, 96},
        {KV::turbo3, KV::turbo2, 96},
        {KV::q8_0, KV::turbo4, 96},
        {KV::turbo2, KV::f16, 96},
        {KV::turbo4_tcq, KV::turbo4_tcq, 96},
    };
    for (const Row & row : rows)
        if (row.k == k && row.v == v && row.head == head) return true;
    return false;
}

} // namespace cuda
} // namespace turboquant

#define TURBOQUANT_COMPILES(type_k, type_v, head) ::turboquant::cuda::selected(type_k, type_v, head)

#endif
