// Queries: they are loaded, rotated as K is, rounded, and arranged as the operand B of the scores.
#ifndef TURBOQUANT_CUDA_QUERY_H
#define TURBOQUANT_CUDA_QUERY_H

#include "load.cuh"

namespace turboquant {
namespace cuda {
namespace {

// The position of the high byte of element e among the bytes of its column, which are arranged so that the four
// registers of a lane in a product are adjacent: [product][in_quad][half of the inner index][high bytes, low bytes][4].
template <KV TK, int D> __host__ __device__ constexpr int operand_place(int e) {
    using L = Layout<TK, D>;
    int product = 0, in_quad = 0, nibble = 0; // nibble: the number of the element among the eight of a unit
    if constexpr (L::turbo) {
        constexpr int N = L::block, steps = N / 32;
        const int in_block = e % N, half = in_block / (N / 2);
        int step = 0;
        if constexpr (L::nibbles) { // the inverse of unit_element
            const int unit = in_block % (N / 2) / 4;
            step = unit / 4;
            in_quad = unit % 4;
        } else {
            const int word = in_block % (N / 4) / 4, field = in_block / (N / 4) % 2;
            step = N == 32 ? 0 : word / 4 * 2 + field;
            in_quad = N == 32 ? 2 * word + field : word % 4;
        }
        product = e / N * steps + step;
        nibble = 2 * (e % 4) + half;
    } else {
        product = e / 32;
        in_quad = e % 16 / 4;
        nibble = e % 32 / 16 * 4 + e % 4;
    }
    return ((product * 4 + in_quad) * 4 + nibble / 4 * 2) * 4 + nibble % 4;
}

// The row of q of column number c of the thread block, for the warp's KV head, or nullptr if the column does not exist.
__device__ __forceinline__ const float * query_of(const AttentionCall & call, const Place & place, int c) {
    const Attention & a = call.a;
    const int column = place.first_column + c;
    if (column >= place.end_column) return nullptr;
    const int group = call.plan.group, token = quotient(column, group);
    return reinterpret_cast<const float *>(reinterpret_cast<const char *>(a.q) + token * a.q_token +
                                           (place.kv_head() * group + column - token * group) * a.q_head +
                                           place.stream * a.q_stream);
}

// Loads four adjacent values, in one load if `aligned`.
__device__ __forceinline__ void load_four(const float * from, bool aligned, float * x) {
    if (aligned) {
        const float4 four = *reinterpret_cast<const float4 *>(from);
        x[0] = four.x;
        x[1] = four.y;
        x[2] = four.z;
        x[3] = four.w;
    } else {
#pragma unroll
        for (int i = 0; i < 4; ++i) x[i] = from[i];
    }
}
__device__ __forceinline__ bool queries_are_aligned(const Attention & a) {
    return ((reinterpret_cast<uintptr_t>(a.q) | uint64_t(a.q_token | a.q_head | a.q_stream)) & 15) == 0;
}

constexpr int columns_at_once = 2; // that a warp turns into operands

// Loads columns of the thread block from number c0 on, zeros for columns that do not exist. A lane gets the D / 32
// elements of each that lane_element names.
template <int D, int Count>
__device__ __forceinline__ void load_columns(const AttentionCall & call, const Place & place, int c0,
                                             float (&y)[Count][D / 32]) {
    constexpr int P = D / 32;
    const bool aligned = queries_are_aligned(call.a);
    // Lane i computes the address of column c0 + i.
    const uint64_t own = reinterpret_cast<uintptr_t>(query_of(call, place, c0 + place.lane % Count));
#pragma unroll
    for (int i = 0; i < Count; ++i) {
        const float * row = reinterpret_cast<const float *>(uintptr_t(__shfl_sync(all_lanes, own, i)));
#pragma unroll
        for (int j = 0; j < P; ++j) y[i][j] = 0;
        if (!row) continue;
        if constexpr (!has_runs<D>) {
#pragma unroll
            for (int j = 0; j < P; ++j) y[i][j] = row[lane_element<D>(place.lane, j)];
            continue;
        }
        row += P * place.lane;
        if constexpr (P == 2) {
            y[i][0] = row[0];
            y[i][1] = row[1];
        } else {
#pragma unroll
            for (int j = 0; j < P; j += 4) load_four(row + j, aligned, y[i] + j);
        }
    }
}

// Columns of the thread block that a warp turns into operands, `columns_at_once` at a time.
template <KV TK, int D> class Columns {
    using L = Layout<TK, D>;
    static constexpr int P = D / 32;
    float own[columns_at_once][P], next[columns_at_once][P];

    // Writes columns from number c0 on to `bytes`, the scratch memory of the KV head: as K is, so rotated if K is, and
    // as integers of 16 bits with a factor, or in binary16 if K is f16.
    __device__ __forceinline__ void write(const Attention & a, const Place & place, int c0, uint8_t * bytes) {
        float * factors = reinterpret_cast<float *>(bytes + 16 * D);
        if constexpr (L::turbo)
#pragma unroll
            for (int i = 0; i < columns_at_once; ++i) transform_row<D>(own[i]);
#pragma unroll
        for (int i = 0; i < columns_at_once; ++i) {
            const int c = c0 + i;
            if constexpr (L::floats) {
                half * halves = reinterpret_cast<half *>(bytes);
#pragma unroll
                for (int j = 0; j < P; ++j) {
                    const float x = own[i][j] * a.scale;
                    const half rounded = __float2half_rn(x);
                    const int at = lane_element<D>(place.lane, j);
                    halves[(place.four ? 2 * c : c) * D + at] = rounded;
                    if (place.four) halves[(2 * c + 1) * D + at] = __float2half_rn(x - __half2float(rounded));
                }
            } else {
                uint32_t largest = 0;
#pragma unroll
                for (int j = 0; j < P; ++j) largest = max(largest, __float_as_uint(own[i][j]) & 0x7fffffff);
                const float top = __uint_as_float(warp_max(largest));  // if it is NaN, the scores are NaN
                const float inverse = top > 0 ? 32512.0f / top : 0.0f; // 127 * 256
                if (place.lane == 0) factors[c] = top * (a.scale * L::step / 32512.0f);
#pragma unroll
                for (int j = 0; j < P; ++j) {
                    constexpr int low_byte = 4;
                    const int x = __float2int_rn(own[i][j] * inverse);
                    uint8_t * to = bytes + c * 2 * D + operand_place<TK, D>(lane_element<D>(place.lane, j));
                    to[0] = uint8_t((x + 128) >> 8);
                    to[low_byte] = uint8_t(x);
                }
            }
        }
    }

    // The warps of a KV head take columns in turn.
    static __device__ __forceinline__ int first(const Place & place, int turn) {
        return columns_at_once * (place.row_tile + turn * place.row_tiles);
    }

public:
    // Takes the first columns of the warp from all four of the thread block.
    __device__ __forceinline__ void take(const Place & place, const float (&q)[4][P]) {
#pragma unroll
        for (int i = 0; i < columns_at_once; ++i)
#pragma unroll
            for (int j = 0; j < P; ++j) {
                own[i][j] = place.row_tile == 0 ? q[i][j] : q[columns_at_once + i][j];
                next[i][j] = q[columns_at_once + i][j];
            }
    }
    // Loads the first columns of the warp, so that this overlaps with other work.
    __device__ __forceinline__ void load(const AttentionCall & call, const Place & place) {
        load_columns<D>(call, place, first(place, 0), own);
        load_columns<D>(call, place, first(place, 1), next);
    }

    // Writes the warp's share of all columns of the thread block to the scratch memory of its KV head.
    template <int Count>
    __device__ __forceinline__ void write_all(const AttentionCall & call, const Place & place, uint8_t * bytes) {
#pragma unroll 1
        for (int turn = 0; first(place, turn) < Count; ++turn) {
            write(call.a, place, first(place, turn), bytes);
#pragma unroll
            for (int i = 0; i < columns_at_once; ++i)
#pragma unroll
                for (int j = 0; j < P; ++j) own[i][j] = next[i][j];
            if constexpr (Count > 2 * columns_at_once) load_columns<D>(call, place, first(place, turn + 2), next);
        }
    }
};

// The queries of a lane's C columns, as operand B of the scores: rows are elements. If there are four columns, two
// columns of the operand have the high and the low bytes of one, or what binary16 leaves of it. Else the high and the
// low bytes are two operands, and binary16 is only rounded.
template <KV TK, int D, int C> struct Query {
    using L = Layout<TK, D>;
    static constexpr int steps = L::floats ? D / 16 : D / 32, parts = L::floats ? 1 : C;
    uint32_t x[steps][parts][2];
    float factor[C]; // by which products become scores, times log2e

    Query() = default;
    __device__ __forceinline__ Query(const Place & place, const uint8_t * bytes) {
        if constexpr (L::floats) {
            const uint32_t * words = reinterpret_cast<const uint32_t *>(bytes) + place.quad * D / 2;
#pragma unroll
            for (int s = 0; s < steps; ++s)
#pragma unroll
                for (int i = 0; i < 2; ++i) x[s][0][i] = words[8 * s + 4 * i + place.in_quad];
        } else {
            const int quad = place.quad;
            const uint8_t * column = bytes + (C == 1 ? quad / 2 * 2 * D + quad % 2 * 4 : quad * 2 * D);
#pragma unroll
            for (int s = 0; s < steps; ++s)
#pragma unroll
                for (int p = 0; p < parts; ++p)
#pragma unroll
                    for (int i = 0; i < 2; ++i)
                        x[s][p][i] =
                            *reinterpret_cast<const uint32_t *>(column + (s * 4 + place.in_quad) * 16 + 8 * i + 4 * p);
        }
        const float * factors = reinterpret_cast<const float *>(bytes + 16 * D);
#pragma unroll
        for (int h = 0; h < C; ++h) factor[h] = log2e * (L::floats ? 1.0f : factors[C * place.in_quad + h]);
    }
};

} // namespace
} // namespace cuda
} // namespace turboquant

#endif
