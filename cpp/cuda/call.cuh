// The parameters of the attention kernel, and the share of each thread in a call.
#ifndef TURBOQUANT_CUDA_CALL_H
#define TURBOQUANT_CUDA_CALL_H

#include "softmax.cuh"
#include "turboquant_cuda.h"

namespace turboquant {
namespace cuda {

constexpr int tile_rows = 32;   // KV rows that a warp computes at a time
constexpr int lane_rows = 4;    // of these, the number whose scores a lane has: rows quad + 8 j
constexpr int most_columns = 8; // maximum query columns of a thread block
constexpr int most_warps = 8;   // of a thread block
// Thread blocks of a multiprocessor at a time, in the launch bounds of the kernel for C columns of a lane.
constexpr int resident_blocks(int head, int C) { return head > 128 ? 1 : 2; }
// Bytes of shared memory for the queries of a KV head: 16 bits for each element of the columns, and their factors.
__host__ __device__ constexpr int query_scratch(int head) {
    return most_columns * (2 * head + int(sizeof(float)));
}
constexpr int barrier_bytes = 32; // of the barriers of the stages of the pipeline, in shared memory

struct AttentionCall {
    Attention a;
    AttentionPlan plan;
    float * partial;       // [query row][part][head]
    SoftmaxState * states; // [query row][part]
    float slope0, slope1;  // ALiBi: the bases of the slopes of heads before slope_heads, and of the other heads
    int slope_heads;       // the greatest power of two up to `heads`
    int64_t stored_rows;   // of heads, which the merge stores in the slots of an exact window
    int all_parts;         // of a query row
    int first_part;        // of the kernel
    int stage_rows, stage_bytes; // of the pipeline that copies rows to shared memory
    bool one_mask_row; // whether the columns of a thread block have the same row of the mask
    // Whether the next kernel may start only when this one has waited for what precedes it, because the next one reads
    // that without waiting for it.
    bool triggers_late;
    // Whether the kernel waits for the preceding one, which triggers late, only before it ends. It does not read the
    // results of that kernel, but those who wait for this one do.
    bool waits_last;
    bool rotates_part; // whether a kernel of slots rotates its partial results, as those of the cache are
    const int * lists; // [token][n_kv] rows that a token sees, if they are gathered
    const int * list_lengths; // [token], or all_rows_biased
};

// What hides a row in a mask: minus infinity in binary16, and two such values.
constexpr uint32_t minus_infinity = 0xfc00, two_infinities = minus_infinity | minus_infinity << 16;

// The length of a list if the mask has biases: the list has all rows in order, and the mask is read.
constexpr int all_rows_biased = -1;

namespace {

// a / b and a % b for small a. A division takes long, and nearly all calls need none.
__device__ __forceinline__ int quotient(int a, int b) { return a < b ? 0 : b == 1 ? a : a / b; }
__device__ __forceinline__ int remainder_of(int a, int b) { return b == 1 ? 0 : a % b; }

// The share of a thread in a call. The tensor cores distribute operands over quads, which are groups of four lanes. A
// lane has the scores and the output of one query column, in_quad, if there are four, and of columns 2 * in_quad and
// 2 * in_quad + 1 if there are eight. Its scores are those of rows quad, quad + 8, quad + 16 and quad + 24 of a tile.
struct Place {
    int lane, quad, in_quad, warp; // in_quad: the number of the lane in its quad
    int row_tiles, block_heads; // of the plan
    int row_tile;          // the warp's tile among those of its KV head in a stage
    int first_head;        // the first KV head of the thread block
    int head_in_block;     // the warp's KV head, counted from first_head
    int stream, kv_stream; // of the queries; of K and V
    int first_column;      // of the thread block
    int end_column;        // the last one + 1, if all exist
    bool four;             // whether there are four columns and not eight
    int64_t begin;         // the first KV row of the thread block
    int length;            // the number of its KV rows

    // gathered, runs: those of the plan, as constants.
    __device__ __forceinline__ Place(const AttentionCall & call, bool gathered, bool runs) {
        const Attention & a = call.a;
        const AttentionPlan & p = call.plan;
        lane = keep(threadIdx.x % 32) & 31; // compilers combine stores if they know the range
        quad = lane >> 2;
        in_quad = lane & 3;
        warp = threadIdx.x / 32;
        row_tiles = runs ? 1 : p.row_tiles;
        block_heads = runs ? most_warps : p.block_heads;
        row_tile = runs ? 0 : keep(row_tiles == 1 ? 0 : quotient(warp, block_heads));
        head_in_block = warp - row_tile * block_heads;
        const int column_tile = p.column_tiles == 1 ? 0 : blockIdx.y / p.head_groups;
        first_column = column_tile * p.column_tile;
        end_column = min(first_column + p.column_tile, p.columns);
        first_head = (blockIdx.y - column_tile * p.head_groups) * block_heads;
        stream = blockIdx.z;
        kv_stream = a.streams == a.kv_streams ? stream : stream / (a.streams / a.kv_streams);
        four = p.column_tile == 4;
        // Half of the streams begin with their short runs: a multiprocessor often has thread blocks with the same number
        // of two streams.
        const int chunk = blockIdx.x, step = row_tiles * tile_rows;
        const bool short_first = gridDim.z > 1 && 2 * blockIdx.z >= gridDim.z;
        const int short_before = short_first ? min(chunk, p.short_chunks) : max(0, chunk - p.long_chunks);
        const bool is_short = short_first ? chunk < p.short_chunks : chunk >= p.long_chunks;
        begin = chunk * p.chunk_rows - short_before * step;
        length = int(min(p.chunk_rows - (is_short ? step : 0), a.n_kv - begin));
        if (gathered) { // a thread block has columns of one token; take_list sets its rows
            const int tiles = p.column_tiles / a.tokens, token = column_tile / tiles;
            first_column = token * p.group + (column_tile - token * tiles) * p.column_tile;
            end_column = min(first_column + p.column_tile, (token + 1) * p.group);
            begin = length = 0;
        }
    }
    // If rows are gathered: the token of the thread block's columns.
    __device__ __forceinline__ int token(const AttentionCall & call) const {
        return quotient(first_column, call.plan.group);
    }
    // Takes the share of the thread block in the rows of its token. Returns whether the mask must be read.
    __device__ __forceinline__ bool take_list(const AttentionCall & call) {
        const int listed = call.list_lengths[token(call)];
        const bool biased = listed == all_rows_biased;
        const int all = biased ? int(call.a.n_kv) : listed, step = row_tiles * tile_rows;
        const int share = (all + gridDim.x * step - 1) / (gridDim.x * step) * step;
        begin = int64_t(blockIdx.x) * share;
        length = max(0, min(share, all - int(begin)));
        return biased;
    }
    __device__ __forceinline__ int kv_head() const { return first_head + head_in_block; }
};

// The query columns of a lane.
template <int C> struct LaneColumns {
    int number[C]; // among those of the KV head
    bool valid[C]; // whether the column exists
    int token[C], head[C];

    __device__ __forceinline__ LaneColumns(const AttentionCall & call, const Place & place) {
        const AttentionPlan & p = call.plan;
#pragma unroll
        for (int h = 0; h < C; ++h) {
            number[h] = place.first_column + C * place.in_quad + h;
            valid[h] = number[h] < place.end_column;
            token[h] = valid[h] ? quotient(number[h], p.group) : 0;
            head[h] = place.kv_head() * p.group + (valid[h] ? number[h] - token[h] * p.group : 0);
        }
    }
};

// The factor of the mask of a query head: its ALiBi slope, or 1 without ALiBi.
__device__ __forceinline__ float alibi_slope(const AttentionCall & call, int head) {
    if (call.a.max_bias <= 0) return 1.0f;
    return head < call.slope_heads ? powf(call.slope0, float(head + 1))
                                   : powf(call.slope1, float(2 * (head - call.slope_heads) + 1));
}

// The number of the query row, in [stream][token][head], of a column of a KV head.
__device__ __forceinline__ int64_t query_row(const AttentionCall & call, int stream, int kv_head, int column) {
    const int group = call.plan.group, token = quotient(column, group);
    return (int64_t(stream) * call.a.tokens + token) * call.a.heads + kv_head * group + column - token * group;
}

} // namespace
} // namespace cuda
} // namespace turboquant

#endif
