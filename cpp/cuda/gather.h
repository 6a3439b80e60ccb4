// Lists of the rows of a cache that each token of a batch sees. If several requests share a cache, each token sees few
// of its rows, and attention.cuh reads only these.
#ifndef TURBOQUANT_CUDA_GATHER_H
#define TURBOQUANT_CUDA_GATHER_H

#include "call.cuh"

namespace turboquant {
namespace cuda {

// Whether the mask is one that launch_lists reads: it has a row for each token, aligned to 16 bytes, and its columns
// are a multiple of eight. The mask of an exact window has a row for each token, too.
bool can_list(const Attention & a);

// Bytes of the lists and, behind them, of their lengths.
size_t list_bytes(const Attention & a);

// Writes the lists of call.lists and their lengths.
cudaError_t launch_lists(const AttentionCall & call, int * lists, int * lengths, cudaStream_t stream);

} // namespace cuda
} // namespace turboquant

#endif
