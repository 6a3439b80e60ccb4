// A call of the attention kernel, and who does what in it.
#ifndef TURBOQUANT_CUDA_CALL_H
#define TURBOQUANT_CUDA_CALL_H

#include "softmax.cuh"
#include "turboquant_cuda.h"

namespace turboquant {
namespace cuda {

constexpr int tile_rows = 32;   // KV rows of a warp at a time
constexpr int most_columns = 8; // query columns of a thread block
constexpr int most_warps = 8;

struct AttentionCall {
    Attention a;
    AttentionPlan plan;
    float * partial;       // [query row][part][head]
    SoftmaxState * states; // [query row][part]
    float slope0, slope1;  // ALiBi
    int slope_heads;
    int64_t stored_groups; // of 32 values, which the merge stores in the slots of an exact window
};

namespace {

// x in a register, where the compiler would rather compute it again in every step: a shuffle is not repeated.
__device__ __forceinline__ int keep(int x) { return __shfl_sync(all_lanes, x, threadIdx.x % 32); }

// What a thread works on. The lanes of a warp are quads of four, as the tensor cores deal operands out: of a tile's
// scores a lane has the column `quad`, of the output the columns 2 * in_quad and 2 * in_quad + 1.
struct Place {
    int lane, quad, in_quad, warp;
    int row_tile;      // of the rows beside each other, the warp's
    int first_head;    // KV heads: of the thread block,
    int head_in_block; // and the warp's
    int stream, kv_stream;
    int first_column;
    bool paired;   // four columns: those from 4 on repeat them, and take the low bytes of the weights
    int64_t begin; // KV rows of the thread block
    int length;

    __device__ __forceinline__ explicit Place(const AttentionCall & call) {
        const Attention & a = call.a;
        const AttentionPlan & p = call.plan;
        lane = threadIdx.x % 32;
        quad = lane / 4;
        in_quad = lane % 4;
        warp = threadIdx.x / 32;
        row_tile = keep(warp / p.block_heads);
        head_in_block = warp - row_tile * p.block_heads;
        const int column_tile = p.column_tiles == 1 ? 0 : blockIdx.y / p.head_groups;
        first_column = column_tile * p.column_tile;
        first_head = (blockIdx.y - column_tile * p.head_groups) * p.block_heads;
        stream = blockIdx.z;
        kv_stream = a.streams == a.kv_streams ? stream : stream / (a.streams / a.kv_streams);
        paired = p.column_tile == 4;
        begin = int64_t(blockIdx.x) * p.chunk_rows;
        length = int(begin + p.chunk_rows < a.n_kv ? p.chunk_rows : a.n_kv - begin);
    }
    __device__ __forceinline__ int kv_head() const { return first_head + head_in_block; }
};

// What a head multiplies the mask by.
__device__ __forceinline__ float alibi_slope(const AttentionCall & call, int head) {
    if (call.a.max_bias <= 0) return 1.0f;
    return head < call.slope_heads ? powf(call.slope0, float(head + 1))
                                   : powf(call.slope1, float(2 * (head - call.slope_heads) + 1));
}

// A query row of a KV head's columns.
__device__ __forceinline__ int64_t query_row(const AttentionCall & call, int stream, int kv_head, int column) {
    const int group = call.plan.group;
    return (int64_t(stream) * call.a.tokens + column / group) * call.a.heads + kv_head * group + column % group;
}

} // namespace
} // namespace cuda
} // namespace turboquant

#endif
