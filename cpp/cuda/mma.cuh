// The two matrix products of attention on the tensor cores: queries times K, and weights times V.
#ifndef TURBOQUANT_CUDA_MMA_H
#define TURBOQUANT_CUDA_MMA_H

#include "operands.cuh"

#include <cuda_fp16.h>

namespace turboquant {
namespace cuda {
namespace {

// d = c + a product of int8 matrices. UnsignedA and UnsignedB: whether the bytes of a and of b are unsigned.
template <bool UnsignedA, bool UnsignedB>
__device__ __forceinline__ void mma_int8(int (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2],
                                         const int (&c)[4]) {
#if __CUDA_ARCH__ >= 800
#define TURBOQUANT_MMA(A, B)                                                                                      \
    asm("mma.sync.aligned.m16n8k32.row.col.s32." A "." B ".s32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, "           \
        "{%10,%11,%12,%13};"                                                                                      \
        : "=r"(d[0]), "=r"(d[1]), "=r"(d[2]), "=r"(d[3])                                                          \
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]), "r"(c[0]), "r"(c[1]), "r"(c[2]),      \
          "r"(c[3]))
    if constexpr (UnsignedA) TURBOQUANT_MMA("u8", "s8");
    else if constexpr (UnsignedB) TURBOQUANT_MMA("s8", "u8");
    else TURBOQUANT_MMA("s8", "s8");
#undef TURBOQUANT_MMA
#endif
}
__device__ __forceinline__ void mma_f16(float (&c)[4], uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3, uint32_t b0,
                                        uint32_t b1) {
#if __CUDA_ARCH__ >= 800
    asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
#endif
}

// ---- scores

// What the bias of the levels adds to the products of the lane's column with the blocks of K, negated.
template <KV TK, int D> struct KeyBias {
    using L = Layout<TK, D>;
    int start[D / L::block] = {};

    __device__ __forceinline__ explicit KeyBias(const uint32_t (&q)[D / 32][4]) {
        if constexpr (L::biased) {
            constexpr int steps = L::block / 32;
            const uint32_t negative[2] = {four_biases, four_biases}; // as signed bytes
#pragma unroll
            for (int b = 0; b < D / L::block; ++b) {
                int c[4] = {};
#pragma unroll
                for (int i = 0; i < steps; ++i) mma_int8<false, false>(c, q[b * steps + i], negative, c);
                start[b] = c[0] * 256 + c[2];
            }
        }
    }
};

// Computes the scores of column `quad` and rows 2 * in_quad and 2 * in_quad + 1 of eight KV rows, without the factor of
// the query. `row` is row `quad` of the eight; row0 and row1 are the two rows.
template <KV TK, int D>
__device__ __forceinline__ void score_pair(const uint32_t (&q)[D / 32][4], const KeyBias<TK, D> & bias,
                                           const uint8_t * row, const uint8_t * row0, const uint8_t * row1, int in_quad,
                                           float & s0, float & s1) {
    using L = Layout<TK, D>;
    if constexpr (L::floats) {
        float c[4] = {};
        const uint32_t * words = reinterpret_cast<const uint32_t *>(row);
#pragma unroll
        for (int i = 0; i < D / 16; ++i)
            mma_f16(c, q[i / 2][i % 2 * 2], 0, q[i / 2][i % 2 * 2 + 1], 0, words[8 * i + in_quad],
                    words[8 * i + 4 + in_quad]);
        s0 = c[0];
        s1 = c[1];
    } else {
        s0 = s1 = 0;
        constexpr int steps = L::block / 32;
#pragma unroll
        for (int b = 0; b < D / L::block; ++b) {
            const int offset = b * L::block_bytes;
            int c[4] = {0, 0, bias.start[b], bias.start[b]};
#pragma unroll
            for (int i = 0; i < steps; ++i)
                mma_int8<false, L::biased>(c, q[b * steps + i], key_levels<TK, D>(row + offset, i, in_quad).x, c);
            s0 += float(c[0] * 256 + c[2]) * L::load_block_scale(row0 + offset);
            s1 += float(c[1] * 256 + c[3]) * L::load_block_scale(row1 + offset);
        }
    }
}

// Computes the lane's scores of a tile: those of rows 2 * in_quad and 2 * in_quad + 1, and those 8, 16 and 24 rows
// further on.
template <KV TK, int D, typename Stages>
__device__ __forceinline__ void scores(const uint32_t (&q)[D / 32][4], const KeyBias<TK, D> & bias,
                                       const uint8_t * memory, const Stages & stages, int pitch, int in_quad,
                                       float (&s)[8]) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
        const uint8_t * group = memory + 8 * i * pitch;
        float pair[2];
        score_pair<TK, D>(q, bias, group + stages.k_operand, group + stages.k_scale0, group + stages.k_scale1, in_quad,
                          pair[0], pair[1]);
        s[2 * i] = pair[0];
        s[2 * i + 1] = pair[1];
    }
}

// ---- output

// Multiplies the sums of the output by the corrections of their columns. A lane has the sums of columns 2 * in_quad and
// 2 * in_quad + 1, but the correction of column `quad`.
template <int D>
__device__ __forceinline__ void correct_output(float (&sums)[D / 16][4], float correction, int in_quad) {
    if (!__any_sync(all_lanes, correction != 1.0f)) return;
    const float c0 = __shfl_sync(all_lanes, correction, 8 * in_quad),
                c1 = __shfl_sync(all_lanes, correction, 8 * in_quad + 4);
#pragma unroll
    for (int i = 0; i < D / 16; ++i)
#pragma unroll
        for (int j = 0; j < 4; ++j) sums[i][j] *= j & 1 ? c1 : c0;
}

struct OutputScale {
    float s0, s1, low0, low1; // of columns 2 * in_quad and 2 * in_quad + 1; of their low bytes, unless paired
};

// The first values of the sums over V's levels times weights: magic_bits, so the sums can be read as floats, less what
// the bias of the levels adds.
struct SumStart {
    int high[2], low[2]; // of columns 2 * in_quad and 2 * in_quad + 1; of their low bytes, unless paired
};

template <bool Biased, bool Paired> __device__ __forceinline__ SumStart start_sums(const Weights & w) {
    const int start[4] = {magic_bits, magic_bits, magic_bits, magic_bits};
    if constexpr (!Biased) return {{magic_bits, magic_bits}, {magic_bits, magic_bits}};
    const uint32_t negative[4] = {four_biases, four_biases, four_biases, four_biases}; // as signed bytes
    int high[4], low[4] = {};
    mma_int8<false, false>(high, negative, w.high, start);
    if constexpr (!Paired) mma_int8<false, false>(low, negative, w.low, start);
    return {{high[0], high[1]}, {low[0], low[1]}};
}

// o += a 16 x 8 product of V's levels and the weights.
template <bool Biased, bool Paired>
__device__ __forceinline__ void accumulate(float (&o)[4], const Levels<4> & v, const Weights & w, const SumStart & start,
                                           const OutputScale & s) {
    int c[4] = {start.high[0], start.high[1], start.high[0], start.high[1]};
    mma_int8<Biased, false>(c, v.x, w.high, c);
#pragma unroll
    for (int i = 0; i < 4; ++i) o[i] += (__int_as_float(c[i]) - magic) * (i & 1 ? s.s1 : s.s0);
    if constexpr (!Paired) {
        int d[4] = {start.low[0], start.low[1], start.low[0], start.low[1]};
        mma_int8<Biased, false>(d, v.x, w.low, d);
#pragma unroll
        for (int i = 0; i < 4; ++i) o[i] += (__int_as_float(d[i]) - magic) * (i & 1 ? s.low1 : s.low0);
    }
}

// o += V times weights of the 32 rows of a tile. p has the weights of the lane's rows: row0, row1, and those 8, 16 and
// 24 rows further on. o[i] is one of the D / 16 products; store_output maps their elements to those of the row.
template <KV TV, int D, bool Paired>
__device__ __forceinline__ void output(float (&o)[D / 16][4], const float (&p)[8], const uint8_t * row0,
                                       const uint8_t * row1, int pitch, int quad, int in_quad) {
    using L = Layout<TV, D>;
    const uint8_t * row[8];
#pragma unroll
    for (int i = 0; i < 8; ++i) row[i] = (i & 1 ? row1 : row0) + i / 2 * 8 * pitch;
    if constexpr (L::floats) {
        uint32_t b[4];
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            const half2 pair =
                Paired && quad >= 4 ? __floats2half2_rn(0, 0) : __floats2half2_rn(p[2 * i], p[2 * i + 1]);
            b[i] = *reinterpret_cast<const uint32_t *>(&pair);
        }
#pragma unroll
        for (int m = 0; m < D / 16; ++m) {
            uint32_t x[8];
#pragma unroll
            for (int i = 0; i < 8; ++i) x[i] = reinterpret_cast<const uint32_t *>(row[i])[quad + 8 * m];
            mma_f16(o[m], prmt(x[0], x[1], low_halves), prmt(x[0], x[1], high_halves), prmt(x[2], x[3], low_halves),
                    prmt(x[2], x[3], high_halves), b[0], b[1]);
            mma_f16(o[m], prmt(x[4], x[5], low_halves), prmt(x[4], x[5], high_halves), prmt(x[6], x[7], low_halves),
                    prmt(x[6], x[7], high_halves), b[2], b[3]);
        }
    } else {
        using Units = ValueUnits<TV, D>;
        typename L::LookUpLevels look_up;
        if constexpr (L::biased) look_up.keep_in_registers();
#pragma unroll
        for (int b = 0; b < D / L::block; ++b) {
            const int offset = b * L::block_bytes;
            float w[8];
#pragma unroll
            for (int i = 0; i < 8; ++i) {
                const float scale = L::load_block_scale(row[i] + offset);
                w[i] = p[i] > 0 ? p[i] * scale : 0.0f;
            }
            Weights weights = quantize_weights<Paired>(w, quad);
            weights.scale *= L::step;
            OutputScale s;
            s.s0 = __shfl_sync(all_lanes, weights.scale, 8 * in_quad);
            s.s1 = __shfl_sync(all_lanes, weights.scale, 8 * in_quad + 4);
            s.low0 = s.s0 * (1.0f / 256);
            s.low1 = s.s1 * (1.0f / 256);
            const SumStart start = start_sums<L::biased, Paired>(weights);
            const ValueBlock<TV, D> values(row, offset, quad);
#pragma unroll
            for (int j = 0; j < Units::count; ++j)
#pragma unroll
                for (int m = 0; m < Units::products; ++m)
                    accumulate<L::biased, Paired>(o[(b * Units::count + j) * Units::products + m],
                                                  values.levels(look_up, j, m), weights, start, s);
        }
    }
}

} // namespace
} // namespace cuda
} // namespace turboquant

#endif
