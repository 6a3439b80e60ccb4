// Queries: they are loaded, rotated as K is, rounded, and arranged as the operand A of the scores.
#ifndef TURBOQUANT_CUDA_QUERY_H
#define TURBOQUANT_CUDA_QUERY_H

#include "load.cuh"

namespace turboquant {
namespace cuda {
namespace {

// The position of the high byte of element e among the bytes of its column, which are arranged so that the four
// registers of a lane in a product are adjacent: [product][in_quad][half of the inner index][high bytes, low bytes][4].
template <KV TK, int D> __device__ __forceinline__ int operand_place(int e) {
    using L = Layout<TK, D>;
    int product, in_quad, nibble; // nibble: the number of the element among the eight of a unit
    if constexpr (L::turbo) {
        constexpr int N = L::block, steps = N / 32;
        const int in_block = e % N, half = in_block / (N / 2);
        int step;
        if constexpr (L::nibbles) { // the inverse of unit_element
            const int unit = in_block % (N / 2) / 4;
            step = unit / 4;
            in_quad = unit % 4;
        } else {
            const int pair = in_block % (N / 4) / 4;
            step = pair / 4 * 2 + in_block / (N / 4) % 2;
            in_quad = pair % 4;
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

// Loads columns c0, c0 + apart, c0 + 2 * apart, ... of the warp's KV head, zeros for columns that do not exist. A lane
// gets elements lane, lane + 32, ...
template <int D, int C>
__device__ __forceinline__ void load_queries(const AttentionCall & call, const Place & place, int c0, int apart,
                                             float (&y)[C][D / 32]) {
    const Attention & a = call.a;
    const int lane = place.lane, group = call.plan.group;
    // Lane i computes the address of column c0 + i * apart.
    const int own = place.first_column + c0 + lane % C * apart, token = own / group;
    const uint64_t own_row = reinterpret_cast<uintptr_t>(a.q) + token * a.q_token +
                             (place.kv_head() * group + own - token * group) * a.q_head + place.stream * a.q_stream;
#pragma unroll
    for (int i = 0; i < C; ++i) {
        const int c = c0 + i * apart;
        const float * row = reinterpret_cast<const float *>(uintptr_t(__shfl_sync(all_lanes, own_row, i)));
        const bool some = c < call.plan.column_tile && place.first_column + c < call.plan.columns;
#pragma unroll
        for (int j = 0; j < D / 32; ++j) y[i][j] = some ? row[lane + 32 * j] : 0.0f;
    }
}

// The bytes of scratch memory of a KV head: 16 bits for each element of the columns, and a factor for each column.
template <int D> constexpr int query_scratch = 16 * D + most_columns * int(sizeof(float));

// Rotates the columns of a KV head as K is rotated, and writes them to `bytes`, the head's scratch memory: as integers of
// 16 bits, or in binary16 if K is f16. The warps of the head share the work. y has the columns that load_queries loads for
// c0 = row_tile.
template <KV TK, int D>
__device__ __forceinline__ void prepare_queries(const AttentionCall & call, const Place & place, uint8_t * bytes,
                                                float (&y)[4][D / 32]) {
    using L = Layout<TK, D>;
    constexpr int P = D / 32;
    const Attention & a = call.a;
    const int lane = place.lane, apart = call.plan.row_tiles;
    float * factors = reinterpret_cast<float *>(bytes + 16 * D);
#pragma unroll 1
    for (int c0 = place.row_tile; c0 < call.plan.column_tile; c0 += 4 * apart) {
        if (c0 != place.row_tile) load_queries<D>(call, place, c0, apart, y);
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            const int c = c0 + i * apart;
            if (c >= call.plan.column_tile) break;
            if constexpr (L::turbo) {
                constexpr int B = L::block / 32;
#pragma unroll
                for (int b = 0; b < P / B; ++b) {
                    float part[B];
#pragma unroll
                    for (int j = 0; j < B; ++j) part[j] = y[i][b * B + j];
                    transform_warp<L::block, false>(part);
#pragma unroll
                    for (int j = 0; j < B; ++j) y[i][b * B + j] = part[j];
                }
            }
            if constexpr (L::floats) {
                half * halves = reinterpret_cast<half *>(bytes);
#pragma unroll
                for (int j = 0; j < P; ++j) {
                    const int e = lane + 32 * j;
                    const float x = y[i][j] * a.scale;
                    const half rounded = __float2half_rn(x);
                    halves[(place.four ? 2 * c : c) * D + e] = rounded;
                    if (place.four) halves[(2 * c + 1) * D + e] = __float2half_rn(x - __half2float(rounded));
                }
            } else {
                uint32_t largest = 0;
#pragma unroll
                for (int j = 0; j < P; ++j) largest = max(largest, __float_as_uint(y[i][j]) & 0x7fffffff);
                const float top = __uint_as_float(warp_max(largest));  // if it is NaN, the scores are NaN
                const float inverse = top > 0 ? 32512.0f / top : 0.0f; // 127 * 256
                if (lane == 0) factors[c] = top * (a.scale * L::step / 32512.0f);
#pragma unroll
                for (int j = 0; j < P; ++j) {
                    const int x = __float2int_rn(y[i][j] * inverse);
                    uint8_t * to = bytes + c * 2 * D + operand_place<TK, D>(lane + 32 * j);
                    to[0] = uint8_t((x + 128) >> 8);
                    to[4] = uint8_t(x);
                }
            }
        }
    }
    __syncthreads();
}

// The queries of a lane's C columns, as operand B of the scores: rows are elements. If there are four columns, two columns
// of the operand have the high and the low bytes of one, or what binary16 leaves of it. Else the high and the low bytes
// are two operands, and binary16 is only rounded.
template <KV TK, int D, int C> struct Query {
    using L = Layout<TK, D>;
    static constexpr int steps = L::floats ? D / 16 : D / 32, parts = L::floats ? 1 : C;
    uint32_t x[steps][parts][2];
    float factor[C]; // by which products become scores, times log2e

    __device__ __forceinline__ Query(const Place & place, const uint8_t * bytes) {
        if constexpr (L::floats) {
            const uint32_t * words = reinterpret_cast<const uint32_t *>(bytes) + place.quad * D / 2;
#pragma unroll
            for (int s = 0; s < steps; ++s)
#pragma unroll
                for (int i = 0; i < 2; ++i) x[s][0][i] = words[8 * s + 4 * i + place.in_quad];
        } else {
            const uint8_t * column = bytes + (C == 1 ? place.quad / 2 * 2 * D + place.quad % 2 * 4 : place.quad * 2 * D);
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
