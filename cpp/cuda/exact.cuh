// The exact window: attention over rows that are stored with high precision. Its results are parts of query rows, as those
// of the cache's rows are, so that one merge adds all of them. What a batch leaves in the slots is stored by that merge's
// kernel, after every read of them.
#ifndef TURBOQUANT_CUDA_EXACT_H
#define TURBOQUANT_CUDA_EXACT_H

#include "call.cuh"
#include "launch.h"

namespace turboquant {
namespace cuda {
namespace {

constexpr int exact_columns = 4; // query columns of a thread block
constexpr int exact_warps = 4;
constexpr int exact_quads = 8; // of a warp; a quad of lanes computes the scores of one row

enum class Exact { f16, q8_0, f32 }; // types of rows

// Values e to e + N - 1 of a row; e is a multiple of N, which divides 32.
template <Exact T, int N> __device__ __forceinline__ void load_exact(const char * row, int e, float (&y)[N]) {
    if constexpr (T == Exact::f32) {
#pragma unroll
        for (int i = 0; i < N; ++i) y[i] = reinterpret_cast<const float *>(row)[e + i];
    } else if constexpr (T == Exact::f16) {
#pragma unroll
        for (int i = 0; i < N; i += 2) {
            const float2 two = __half22float2(reinterpret_cast<const half2 *>(row)[(e + i) / 2]);
            y[i] = two.x;
            y[i + 1] = two.y;
        }
    } else {
        const uint8_t * block = reinterpret_cast<const uint8_t *>(row) + e / 32 * 34;
        const float scale = load_half(block);
#pragma unroll
        for (int i = 0; i < N; i += 2) {
            const uint32_t two = load_u16(block + 2 + e % 32 + i);
            y[i] = scale * float(int8_t(two & 0xff));
            y[i + 1] = scale * float(int8_t(two >> 8));
        }
    }
}

// Rows of a KV head: the slots of a stream, or the rows of the batch.
struct ExactSide {
    const char *k, *v;
    int64_t k_row, v_row;
    int rows, column; // the first one's in the mask
};

template <int D> struct ExactShared {
    static constexpr int share = D / 4;               // values of a row that a lane of a quad multiplies
    static constexpr int pitch = share * exact_columns + 4; // the shares start in different banks
    __align__(16) float queries[4 * pitch];           // [share][value][column]
    float scores[exact_columns][32];
    __align__(16) float sums[exact_warps][exact_columns][D];
};

// A thread block computes exact_columns query columns of a KV head over 32 rows, from `first` on: one part of these query
// rows.
template <Exact T, int D>
__device__ __forceinline__ void exact_part(const AttentionCall & call, const ExactSide & side, int first, int kv_head,
                                           int first_column, int stream, bool rotated, ExactShared<D> & shared) {
    using Shared = ExactShared<D>;
    constexpr int P = D / 32, C = exact_columns, share = Shared::share, V = values_at_once<D>;
    constexpr int N = share < 32 ? share : 32;
    const Attention & a = call.a;
    const ExactRows & x = a.exact;
    const AttentionPlan & p = call.plan;
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, quad = lane / 4, in_quad = lane % 4;

    // Scores: the lane's share of a row, then, of the quad's columns, the lane's.
    const int row = first + warp * exact_quads + quad, column = first_column + in_quad;
    const int token = column / p.group, head = kv_head * p.group + column % p.group;
    float bias = -INFINITY;
    if (column < p.columns && row < side.rows)
        bias = __half2float(reinterpret_cast<const half *>(
            static_cast<const char *>(x.mask) + token * x.mask_token + head % x.mask_heads * x.mask_head +
            stream % x.mask_streams * x.mask_stream)[side.column + row]);
    const int readable = min(row, side.rows - 1);
    float k[share];
#pragma unroll
    for (int i = 0; i < share; i += N) {
        float some[N];
        load_exact<T, N>(side.k + readable * side.k_row, in_quad * share + i, some);
#pragma unroll
        for (int n = 0; n < N; ++n) k[i + n] = some[n];
    }
    const uint32_t seen = __ballot_sync(all_lanes, bias != -INFINITY);
    float dots[C] = {};
#pragma unroll
    for (int i = 0; i < share; ++i) {
        const float4 q = *reinterpret_cast<const float4 *>(shared.queries + in_quad * Shared::pitch + i * C);
        dots[0] += q.x * k[i];
        dots[1] += q.y * k[i];
        dots[2] += q.z * k[i];
        dots[3] += q.w * k[i];
    }
    float own = 0;
#pragma unroll
    for (int c = 0; c < C; ++c) {
        dots[c] += __shfl_xor_sync(all_lanes, dots[c], 1);
        dots[c] += __shfl_xor_sync(all_lanes, dots[c], 2);
        own = in_quad == c ? dots[c] : own;
    }
    float score = own * a.scale;
    if (a.soft_cap != 0) score = a.soft_cap * tanhf(score / a.soft_cap);
    score = (score + alibi_slope(call, head) * bias) * log2e;
    shared.scores[in_quad][warp * exact_quads + quad] = bias == -INFINITY ? -INFINITY : score; // whatever the row's bytes

    // The values of a warp's rows are on their way meanwhile: a lane has those from V * lane + 32 * j on.
    constexpr int at_once = D <= 128 ? exact_quads : exact_quads / 2;
    float v[at_once][P];
    const auto load_values = [&](int from) {
#pragma unroll
        for (int i = 0; i < at_once; ++i) {
            const char * at = side.v + min(first + warp * exact_quads + from + i, side.rows - 1) * side.v_row;
#pragma unroll
            for (int j = 0; j < P; j += V) {
                float some[V];
                load_exact<T, V>(at, V * lane + 32 * j, some);
#pragma unroll
                for (int n = 0; n < V; ++n) v[i][j + n] = some[n];
            }
        }
    };
    load_values(0);
    __syncthreads();

    // Weights: every warp has those of all rows, a row per lane.
    SoftmaxState state[C];
    float weights[C];
#pragma unroll
    for (int c = 0; c < C; ++c) {
        const float s = shared.scores[c][lane];
        float top = fmaxf(s, nothing_seen);
#pragma unroll
        for (int h = 16; h > 0; h /= 2) top = fmaxf(top, __shfl_xor_sync(all_lanes, top, h));
        weights[c] = s == -INFINITY ? 0.0f : exp2f(s - top);
        float sum = weights[c];
#pragma unroll
        for (int h = 16; h > 0; h /= 2) sum += __shfl_xor_sync(all_lanes, sum, h);
        state[c] = {top, sum};
    }

    float y[C][P] = {};
#pragma unroll
    for (int from = 0; from < exact_quads; from += at_once) {
        if (from > 0) load_values(from);
#pragma unroll
        for (int i = 0; i < at_once; ++i) {
#pragma unroll
            for (int c = 0; c < C; ++c) {
                const float weight = __shfl_sync(all_lanes, weights[c], warp * exact_quads + from + i);
                if (!(seen >> (4 * (from + i) + c) & 1)) continue; // whatever values the row has
#pragma unroll
                for (int j = 0; j < P; ++j) y[c][j] += weight * v[i][j];
            }
        }
    }
#pragma unroll
    for (int c = 0; c < C; ++c)
#pragma unroll
        for (int j = 0; j < P; ++j) shared.sums[warp][c][32 * (j / V * V) + V * lane + j % V] = y[c][j];
    __syncthreads();

    // Column c is finished by warp c, in the domain in which the cache has V.
    if (first_column + warp >= p.columns) return;
    const int64_t part =
        query_row(call, stream, kv_head, first_column + warp) * p.parts + p.parts - p.exact_parts + blockIdx.x;
    SoftmaxState total = state[0];
#pragma unroll
    for (int c = 1; c < C; ++c) total = warp == c ? state[c] : total;
    if (lane == 0) call.states[part] = total;
    constexpr int B = rotated_block<D>;
#pragma unroll
    for (int b = 0; b < D / B; ++b) {
        float block[B / 32];
#pragma unroll
        for (int j = 0; j < B / 32; ++j) {
            block[j] = 0;
#pragma unroll
            for (int w = 0; w < exact_warps; ++w) block[j] += shared.sums[w][warp][b * B + lane + 32 * j];
        }
        if (rotated) transform_warp<B, false>(block);
#pragma unroll
        for (int j = 0; j < B / 32; ++j) call.partial[part * D + b * B + lane + 32 * j] = block[j];
    }
}

inline int exact_slot_parts(const ExactRows & x) { return int((x.slots + 31) / 32); }
// Parts of a query row: the slots', then the batch's.
inline int exact_parts(const Attention & a) { return a.windowed ? exact_slot_parts(a.exact) + (a.tokens + 31) / 32 : 0; }

template <int D>
__global__ void __launch_bounds__(32 * exact_warps)
    exact_kernel(const __grid_constant__ AttentionCall call, int slot_parts, bool rotated) {
    __shared__ ExactShared<D> shared;
    const Attention & a = call.a;
    const ExactRows & x = a.exact;
    const AttentionPlan & p = call.plan;
    const int column_tile = blockIdx.y / a.kv_heads, kv_head = blockIdx.y - column_tile * a.kv_heads;
    const int first_column = column_tile * exact_columns;
    const int stream = blockIdx.z, kv_stream = stream / (a.streams / a.kv_streams);
    const auto at = [&](const void * base, int64_t head_bytes, int64_t stream_bytes) {
        return static_cast<const char *>(base) + kv_stream * stream_bytes + kv_head * head_bytes;
    };
    const int part = blockIdx.x;
    const ExactSide slots = {at(x.k, x.k_head, x.k_stream), at(x.v, x.v_head, x.v_stream), x.k_row, x.v_row,
                             int(x.slots), 0};
    if (part < slot_parts) { // a quad of lanes for each row, of f16 at most: past the end of a row is another one
        const int row = min(part * 32 + int(threadIdx.x) / 4, slots.rows - 1), in_row = threadIdx.x % 4 * (D / 2);
        prefetch(slots.k + row * slots.k_row + in_row);
        prefetch(slots.v + row * slots.v_row + in_row);
    }
    wait_for_previous();
    let_next_start();
    for (int i = threadIdx.x; i < exact_columns * D; i += blockDim.x) {
        const int e = i % D, c = i / D, column = first_column + c;
        float value = 0;
        if (column < p.columns) {
            const char * token = reinterpret_cast<const char *>(a.q) + column / p.group * a.q_token;
            value = reinterpret_cast<const float *>(token + (kv_head * p.group + column % p.group) * a.q_head +
                                                    stream * a.q_stream)[e];
        }
        constexpr int share = ExactShared<D>::share;
        shared.queries[e / share * ExactShared<D>::pitch + e % share * exact_columns + c] = value;
    }
    __syncthreads();
    if (part >= slot_parts) {
        const ExactSide batch = {at(x.batch_k, x.batch_k_head, x.batch_k_stream),
                                 at(x.batch_v, x.batch_v_head, x.batch_v_stream), x.batch_k_row, x.batch_v_row,
                                 a.tokens, int(x.slots)};
        exact_part<Exact::f32, D>(call, batch, (part - slot_parts) * 32, kv_head, first_column, stream, rotated, shared);
        return;
    }
    if (x.type == KV::f16)
        exact_part<Exact::f16, D>(call, slots, part * 32, kv_head, first_column, stream, rotated, shared);
    else
        exact_part<Exact::q8_0, D>(call, slots, part * 32, kv_head, first_column, stream, rotated, shared);
}
static_assert(exact_columns == exact_warps, "a warp finishes a column");
static_assert(exact_quads * exact_warps == 32, "a lane has the weight of a row");

// The rows' alignment is that of what is read from them at once.
inline bool covers_exact(const Attention & a) {
    const ExactRows & x = a.exact;
    const auto bits = [](const void * base, int64_t row, int64_t head, int64_t stream) {
        return reinterpret_cast<uintptr_t>(base) | uint64_t(row | head | stream);
    };
    const uint64_t slots = bits(x.k, x.k_row, x.k_head, x.k_stream) | bits(x.v, x.v_row, x.v_head, x.v_stream) |
                           bits(x.store_k, 0, 0, 0) | bits(x.store_v, 0, 0, 0);
    const uint64_t batch = bits(x.batch_k, x.batch_k_row, x.batch_k_head, x.batch_k_stream) |
                           bits(x.batch_v, x.batch_v_row, x.batch_v_head, x.batch_v_stream);
    return (x.type == KV::q8_0 || x.type == KV::f16) && x.slots >= 0 && x.slots <= 1 << 20 && a.tokens <= 1 << 20 &&
           (slots & (x.type == KV::f16 ? 3 : 1)) == 0 && (batch & 3) == 0;
}

// ---- stores

// Groups of 32 values of the call's own rows of K and V, which a warp stores at a time.
inline int64_t stored_groups(const Attention & a) {
    return a.windowed && a.exact.store_rows ? int64_t(2) * a.kv_streams * a.tokens * a.kv_heads * (a.head / 32) : 0;
}

// Stores one of them in its slot, as float32 is rounded to q8_0 or f16.
__device__ __forceinline__ void store_exact(const Attention & a, int64_t group, int lane) {
    const ExactRows & x = a.exact;
    const int per_head = a.head / 32, j = int(group % per_head);
    group /= per_head;
    const int kv_head = int(group % a.kv_heads);
    group /= a.kv_heads;
    const int64_t row = group / 2; // of all streams
    const bool keys = group % 2 == 0;
    const int stream = int(row / a.tokens), token = int(row % a.tokens);
    const char * from = keys ? reinterpret_cast<const char *>(x.batch_k) + stream * x.batch_k_stream +
                                   token * x.batch_k_row + kv_head * x.batch_k_head
                             : reinterpret_cast<const char *>(x.batch_v) + stream * x.batch_v_stream +
                                   token * x.batch_v_row + kv_head * x.batch_v_head;
    const float value = reinterpret_cast<const float *>(from)[32 * j + lane];
    char * to = static_cast<char *>(keys ? x.store_k : x.store_v) + x.store_rows[row] * (keys ? x.k_row : x.v_row) +
                kv_head * (keys ? x.k_head : x.v_head);
    if (x.type == KV::f16) {
        reinterpret_cast<half *>(to)[32 * j + lane] = __float2half(value);
        return;
    }
    uint8_t * block = reinterpret_cast<uint8_t *>(to) + 34 * j;
    const float scale = __fdiv_rn(__uint_as_float(warp_max(__float_as_uint(fabsf(value)))), 127.0f);
    const float inverse = scale != 0 ? __fdiv_rn(1.0f, scale) : 0.0f;
    if (lane == 0) *reinterpret_cast<uint16_t *>(block) = __half_as_ushort(__float2half(scale));
    block[2 + lane] = uint8_t(int8_t(roundf(value * inverse)));
}

} // namespace
} // namespace cuda
} // namespace turboquant

#endif
