// The attention of many query columns (wide.cuh, hopper.cuh) and of a few tokens (direct.cuh), as attention.cu plans
// and launches it.
#ifndef TURBOQUANT_CUDA_WIDE_PLAN_H
#define TURBOQUANT_CUDA_WIDE_PLAN_H

#include "call.cuh"

namespace turboquant {
namespace cuda {

struct WideDevice {
    int multiprocessors, shared_per_block;
};

// Plans a call, of which the plan already has the device, the group and the columns. False if the kernel does not cover
// it. The pitches are those of a row of one head.
bool plan_wide(const Attention & a, const WideDevice & device, int pitch_k, int pitch_v, AttentionPlan & plan);

// The same for the kernels for a few tokens. The bytes are those of a row of one head in the cache.
bool plan_direct(const Attention & a, const WideDevice & device, int bytes_k, int bytes_v, AttentionPlan & plan);

// Launches all kernels but the one that merges the parts. `notes` has memory.
cudaError_t launch_wide(const AttentionCall & call, void * workspace, MaskNotes notes, cudaStream_t stream);

// Permits the kernel to use so much shared memory. CUDA requires this once per kernel and device for more than 48 KB.
cudaError_t allow_shared(const void * kernel, int device, int bytes);

} // namespace cuda
} // namespace turboquant

#endif
