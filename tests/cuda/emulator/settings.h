// What the environment says about the emulated GPU.
#ifndef TURBOQUANT_CUDA_EMULATOR_SETTINGS_H
#define TURBOQUANT_CUDA_EMULATOR_SETTINGS_H

#include <cstdint>

namespace emulator {

struct Settings {
    int multiprocessors; // TURBOQUANT_EMULATED_MULTIPROCESSORS: 132, as an H200 has
    int shared_kibibytes; // TURBOQUANT_EMULATED_SHARED: of a multiprocessor, 228, as an H200 has, or less
    int host_threads;    // TURBOQUANT_EMULATOR_THREADS: as many as the host has
    uint64_t seed;       // TURBOQUANT_EMULATOR_SEED: of the orders in which thread blocks and warps run
};
const Settings & settings();

} // namespace emulator

#endif
