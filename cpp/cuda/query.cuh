// Queries: they are loaded, rotated as K is, rounded, and arranged as the operand B of the scores.
#ifndef TURBOQUANT_CUDA_QUERY_H
#define TURBOQUANT_CUDA_QUERY_H

#include "load.cuh"

#include <type_traits>

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

// Loads four columns of the thread block from number c0 on, zeros for columns that do not exist. A lane gets the D / 32
// elements of each that lane_element names.
template <int D>
__device__ __forceinline__ void load_columns(const AttentionCall & call, const Place & place, int c0,
                                             float (&y)[4][D / 32]) {
    constexpr int P = D / 32;
    const bool aligned = queries_are_aligned(call.a);
    // Lane i computes the address of column c0 + i.
    const uint64_t own = reinterpret_cast<uintptr_t>(query_of(call, place, c0 + place.lane % 4));
#pragma unroll
    for (int i = 0; i < 4; ++i) {
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

// Whether the place of an element is the sum of those of its bits.
template <KV TK, int D> constexpr bool places_add_up() {
    for (int e = 0; e < D; ++e)
        if (operand_place<TK, D>(e) != operand_place<TK, D>(e & -e) + operand_place<TK, D>(e & (e - 1))) return false;
    return true;
}

// c += a product of matrices in tf32, which ignores the low 13 bits of the operands. All elements of rows 0 to 7 of A
// are a0 or a1, those of the other rows are a0 and a1 or, if Negative, their negatives.
template <bool Negative>
__device__ __forceinline__ void mma_signs(float (&c)[4], uint32_t a0, uint32_t a1, uint32_t b0, uint32_t b1) {
    constexpr uint32_t sign = Negative ? 0x80000000 : 0;
#if __CUDA_ARCH__ >= 800
    asm("mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a0), "r"(a0 ^ sign), "r"(a1), "r"(a1 ^ sign), "r"(b0), "r"(b1));
#endif
}

// Four columns that a warp rotates on the tensor cores.
//
// The Hadamard transform is a transform in each bit of the number of an element, in any order. That of the highest bit
// of a block is made when the operands are made: columns 0 to 3 of the operand have the sums of both halves of a block,
// columns 4 to 7 the differences. Products of tf32 make those of the four low bits, with operands in two parts, which
// lose nothing that 16 bits would keep. Additions make those of the bits between.
template <KV TK, int D> class RotatedColumns {
    using L = Layout<TK, D>;
    static constexpr int N = L::block, W = N / 32, blocks = D / N;
    static_assert(places_add_up<TK, D>(), "write() adds places");
    const Place & place;
    float x[blocks][2][W][4]; // [half][16 elements][four of them, from 4 * in_quad on] of column quad % 4

public:
    __device__ __forceinline__ explicit RotatedColumns(const Place & place) : place(place) {}

    // Loads columns of the thread block from number c0 on; zeros for columns that do not exist.
    __device__ __forceinline__ void load(const AttentionCall & call, int c0) {
        const bool aligned = queries_are_aligned(call.a);
        const float * row = query_of(call, place, c0 + place.quad % 4);
#pragma unroll
        for (int b = 0; b < blocks; ++b)
#pragma unroll
            for (int half = 0; half < 2; ++half)
#pragma unroll
                for (int w = 0; w < W; ++w) {
#pragma unroll
                    for (int f = 0; f < 4; ++f) x[b][half][w][f] = 0;
                    if (row)
                        load_four(row + b * N + half * N / 2 + 16 * w + 4 * place.in_quad, aligned, x[b][half][w]);
                }
    }

    // Writes the columns as integers of 16 bits to `bytes`, the scratch memory of the KV head, and their factors.
    __device__ __forceinline__ void write(const Attention & a, int c0, uint8_t * bytes) {
        const int quad = place.quad, in_quad = place.in_quad;
        const auto odd = [](int x) { return uint32_t(__popc(uint32_t(x)) & 1) << 31; };
        const uint32_t one = 0x3f800000, a0 = one | odd(quad & in_quad), a1 = one | odd(quad & (in_quad + 4));
        const uint32_t difference = uint32_t(quad / 4) << 31;
        const int lane_bits = (quad & 3) << 2 | quad >> 2, upper = in_quad >> 1; // of the number of a result
        float y[blocks][W][4];
        uint32_t largest[2] = {0, 0};
#pragma unroll
        for (int b = 0; b < blocks; ++b) {
            float c[W][4] = {};
#pragma unroll
            for (int w = 0; w < W; ++w) {
                uint32_t high[4], low[4];
#pragma unroll
                for (int f = 0; f < 4; ++f) {
                    const auto signed_value = [&](int half) {
                        const int e = half * N / 2 + 16 * w;
                        const uint32_t signs = s1_word(e / 32) >> (4 * in_quad);
                        return __float_as_uint(flip_sign(x[b][half][w][f], signs, e % 32 + f));
                    };
                    const float sum = __uint_as_float(signed_value(0)) + __uint_as_float(signed_value(1) ^ difference);
                    high[f] = __float_as_uint(sum) & 0xffffe000;
                    low[f] = __float_as_uint(sum - __uint_as_float(high[f]));
                }
                mma_signs<false>(c[w], a0, a1, high[0], high[1]);
                mma_signs<true>(c[w], a0, a1, high[2], high[3]);
                mma_signs<false>(c[w], a0, a1, low[0], low[1]);
                mma_signs<true>(c[w], a0, a1, low[2], low[3]);
            }
#pragma unroll
            for (int h = 1; h < W; h *= 2)
#pragma unroll
                for (int w = 0; w < W; ++w)
                    if (!(w & h))
#pragma unroll
                        for (int i = 0; i < 4; ++i) {
                            const float p = c[w][i], q = c[w + h][i];
                            c[w][i] = p + q;
                            c[w + h][i] = p - q;
                        }
#pragma unroll
            for (int w = 0; w < W; ++w) {
                const uint32_t signs = (upper ? s2_word((N / 2 + 16 * w) / 32) >> N / 2 % 32 : s2_word(16 * w / 32)) >>
                                       lane_bits;
#pragma unroll
                for (int i = 0; i < 4; ++i) {
                    y[b][w][i] = flip_sign(c[w][i], signs, 16 * w % 32 + i / 2 * 2);
                    largest[i % 2] = max(largest[i % 2], __float_as_uint(c[w][i]) & 0x7fffffff);
                }
            }
        }
        float * factors = reinterpret_cast<float *>(bytes + 16 * D);
#pragma unroll
        for (int i = 0; i < 2; ++i) {
            const int column = c0 + 2 * (in_quad & 1) + i;
#pragma unroll
            for (int h = 2; h < 32; h *= 2) largest[i] = max(largest[i], __shfl_xor_sync(all_lanes, largest[i], h));
            const float top = __uint_as_float(largest[i]);         // if it is NaN, the scores are NaN
            const float inverse = top > 0 ? 32512.0f / top : 0.0f; // 127 * 256
            if (quad == 0 && upper == 0)
                factors[column] = top * (Block<N>::one_over_sqrt_n * a.scale * L::step / 32512.0f);
            uint8_t * to = bytes + column * 2 * D + operand_place<TK, D>(lane_bits + upper * N / 2);
#pragma unroll
            for (int b = 0; b < blocks; ++b)
#pragma unroll
                for (int w = 0; w < W; ++w)
#pragma unroll
                    for (int h = 0; h < 2; ++h) {
                        constexpr int low_bytes = 4;
                        const int value = __float2int_rn(y[b][w][2 * h + i] * inverse);
                        const int at = operand_place<TK, D>(b * N + 16 * w + 2 * h);
                        to[at] = uint8_t((value + 128) >> 8);
                        to[at + low_bytes] = uint8_t(value);
                    }
        }
    }
};

// Columns of K that is not rotated.
template <KV TK, int D> class PlainColumns {
    using L = Layout<TK, D>;
    static constexpr int P = D / 32;
    const Place & place;
    float y[4][P];

public:
    __device__ __forceinline__ explicit PlainColumns(const Place & place) : place(place) {}

    __device__ __forceinline__ void load(const AttentionCall & call, int c0) { load_columns<D>(call, place, c0, y); }

    // Writes the columns as integers of 16 bits, or in binary16 if K is f16.
    __device__ __forceinline__ void write(const Attention & a, int c0, uint8_t * bytes) {
        float * factors = reinterpret_cast<float *>(bytes + 16 * D);
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            const int c = c0 + i;
            if constexpr (L::floats) {
                half * halves = reinterpret_cast<half *>(bytes);
#pragma unroll
                for (int j = 0; j < P; ++j) {
                    const float x = y[i][j] * a.scale;
                    const half rounded = __float2half_rn(x);
                    const int at = lane_element<D>(place.lane, j);
                    halves[(place.four ? 2 * c : c) * D + at] = rounded;
                    if (place.four) halves[(2 * c + 1) * D + at] = __float2half_rn(x - __half2float(rounded));
                }
            } else {
                uint32_t largest = 0;
#pragma unroll
                for (int j = 0; j < P; ++j) largest = max(largest, __float_as_uint(y[i][j]) & 0x7fffffff);
                const float top = __uint_as_float(warp_max(largest));  // if it is NaN, the scores are NaN
                const float inverse = top > 0 ? 32512.0f / top : 0.0f; // 127 * 256
                if (place.lane == 0) factors[c] = top * (a.scale * L::step / 32512.0f);
#pragma unroll
                for (int j = 0; j < P; ++j) {
                    const int x = __float2int_rn(y[i][j] * inverse);
                    uint8_t * to = bytes + c * 2 * D + operand_place<TK, D>(lane_element<D>(place.lane, j));
                    to[0] = uint8_t((x + 128) >> 8);
                    to[4] = uint8_t(x);
                }
            }
        }
    }
};

template <KV TK, int D>
using Columns = typename std::conditional<Layout<TK, D>::turbo, RotatedColumns<TK, D>, PlainColumns<TK, D>>::type;

// Writes the columns of a KV head to its scratch memory, as K is: rotated, as integers or in binary16. The warps of the
// head share the work. `own` has loaded four columns from 4 * row_tile on.
template <KV TK, int D, int C>
__device__ __forceinline__ void write_columns(const AttentionCall & call, const Place & place, uint8_t * bytes,
                                              Columns<TK, D> & own) {
    if (place.row_tile < C) own.write(call.a, 4 * place.row_tile, bytes);
    if constexpr (C == 2)
        if (call.plan.row_tiles == 1) {
            own.load(call, 4);
            own.write(call.a, 4, bytes);
        }
}

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
