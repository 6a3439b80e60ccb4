// The two matrix products of attention on the tensor cores: K times queries, and V transposed times weights.
#ifndef TURBOQUANT_CUDA_MMA_H
#define TURBOQUANT_CUDA_MMA_H

#include "operands.cuh"
#include "query.cuh"

#include <cuda_fp16.h>

namespace turboquant {
namespace cuda {
namespace {

// c += a product of int8 matrices.
__device__ __forceinline__ void mma_int8(int (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
#if __CUDA_ARCH__ >= 800
    asm("mma.sync.aligned.m16n8k32.row.col.s32.s8.s8.s32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
        : "+r"(c[0]), "+r"(c[1]), "+r"(c[2]), "+r"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
#endif
}
// The same, with unsigned bytes in a.
__device__ __forceinline__ void mma_unsigned(int (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
#if __CUDA_ARCH__ >= 800
    asm("mma.sync.aligned.m16n8k32.row.col.s32.u8.s8.s32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
        : "+r"(c[0]), "+r"(c[1]), "+r"(c[2]), "+r"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
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

// The product of row quad + 8 * half of A with the 16-bit column h of a lane, of the products with its bytes: those of
// high and low bytes are two columns of a product if there are four query columns, else two products.
__device__ __forceinline__ int join_bytes(const int (&c)[1][4], int half, int) {
    return c[0][2 * half] * 256 + c[0][2 * half + 1];
}
__device__ __forceinline__ int join_bytes(const int (&c)[2][4], int half, int h) {
    return c[0][2 * half + h] * 256 + c[1][2 * half + h];
}

// ---- scores

// Computes the products of the lane's columns with its rows of a tile, quad + 8 j, which become scores if they are
// multiplied by the factors of the queries. `row` is row `quad`.
template <KV TK, int D, int C>
__device__ __forceinline__ void scores(const Query<TK, D, C> & query,
                                       const typename Layout<TK, D>::LookUpLevels & look_up, const uint8_t * row,
                                       int pitch, int in_quad, float (&s)[lane_rows][C]) {
    using L = Layout<TK, D>;
#pragma unroll
    for (int t = 0; t < 2; ++t) {
        const uint8_t *const row0 = row + 16 * t * pitch, *const row1 = row0 + 8 * pitch;
        if constexpr (L::floats) {
            float c[4] = {};
            const uint32_t *words0 = reinterpret_cast<const uint32_t *>(row0),
                           *words1 = reinterpret_cast<const uint32_t *>(row1);
#pragma unroll
            for (int i = 0; i < query.steps; ++i)
                mma_f16(c, words0[8 * i + in_quad], words1[8 * i + in_quad], words0[8 * i + 4 + in_quad],
                        words1[8 * i + 4 + in_quad], query.x[i][0][0], query.x[i][0][1]);
#pragma unroll
            for (int half = 0; half < 2; ++half)
#pragma unroll
                for (int h = 0; h < C; ++h)
                    s[2 * t + half][h] = C == 1 ? c[2 * half] + c[2 * half + 1] : c[2 * half + h];
        } else {
            constexpr int steps = L::block / 32;
#pragma unroll
            for (int b = 0; b < D / L::block; ++b) {
                const uint8_t *const block0 = row0 + b * L::block_bytes, *const block1 = row1 + b * L::block_bytes;
                int c[L::parts][C][4] = {};
#pragma unroll
                for (int i = 0; i < steps; ++i) {
                    const auto k0 = key_levels<TK, D>(look_up, block0, i, in_quad),
                               k1 = key_levels<TK, D>(look_up, block1, i, in_quad);
#pragma unroll
                    for (int p = 0; p < L::parts; ++p) {
                        const uint32_t k[4] = {k0.x[p][0], k1.x[p][0], k0.x[p][1], k1.x[p][1]};
#pragma unroll
                        for (int h = 0; h < C; ++h) mma_int8(c[p][h], k, query.x[b * steps + i][h]);
                    }
                }
                if constexpr (L::parts == 2)
#pragma unroll
                    for (int h = 0; h < C; ++h)
#pragma unroll
                        for (int i = 0; i < 4; ++i) c[0][h][i] -= c[1][h][i];
#pragma unroll
                for (int half = 0; half < 2; ++half) {
                    const float scale = L::load_block_scale(half ? block1 : block0);
#pragma unroll
                    for (int h = 0; h < C; ++h) {
                        const float product = float(join_bytes(c[0], half, h)) * scale;
                        s[2 * t + half][h] = b == 0 ? product : s[2 * t + half][h] + product;
                    }
                }
            }
        }
    }
}

// ---- output

// Multiplies the sums of the output by the corrections of their columns.
template <int D, int C>
__device__ __forceinline__ void correct_output(Sums<D, C> & sums, const float (&correction)[C]) {
    bool some = false;
#pragma unroll
    for (int h = 0; h < C; ++h) some = some || correction[h] != 1.0f;
    if (!__any_sync(all_lanes, some)) return;
#pragma unroll
    for (int m = 0; m < D / 16; ++m)
#pragma unroll
        for (int half = 0; half < 2; ++half)
#pragma unroll
            for (int h = 0; h < C; ++h) sums[m][half][h] *= correction[h];
}

// The eight rows of a tile whose values a lane computes. The order is that of weight_operands: a register of a lane has
// two rows of 2 * in_quad + 8 j, then two of 2 * in_quad + 1 + 8 j.
__device__ __forceinline__ void rows_of_lane(const uint8_t * row0, const uint8_t * row1, int pitch,
                                             const uint8_t * (&row)[8]) {
#pragma unroll
    for (int i = 0; i < 8; ++i) row[i] = (i & 2 ? row1 : row0) + (i / 4 * 2 + i % 2) * 8 * pitch;
}

// o += V times weights of the 32 rows of a tile. p has the weights of the lane's rows, quad + 8 j, some of which may be
// hidden unless `visible`. scale_row is row `quad`; row0 and row1 are rows 2 * in_quad and 2 * in_quad + 1, whose
// values and those of the rows 8, 16 and 24 further on the lane computes. store_output maps the elements of o to those
// of the row.
template <KV TV, int D, int C>
__device__ __forceinline__ void output(Sums<D, C> & o, const typename Layout<TV, D>::LookUpLevels & look_up,
                                       const float (&p)[lane_rows][C], bool visible, const uint8_t * scale_row,
                                       const uint8_t * row0, const uint8_t * row1, int pitch, int quad) {
    using L = Layout<TV, D>;
    const uint8_t * row[8];
    rows_of_lane(row0, row1, pitch, row);
    if constexpr (L::floats) {
        uint32_t b[4];
#pragma unroll
        for (int j = 0; j < lane_rows; ++j) {
            const half high = __float2half_rn(p[j][0]);
            const half other = __float2half_rn(C == 1 ? p[j][0] - __half2float(high) : p[j][C - 1]);
            b[j] = transpose_matrix(uint32_t(__half_as_ushort(high)) | uint32_t(__half_as_ushort(other)) << 16);
        }
#pragma unroll
        for (int m = 0; m < D / 16; ++m) {
            float c[4] = {};
#pragma unroll
            for (int t = 0; t < 2; ++t) {
                uint32_t x[4];
#pragma unroll
                for (int i = 0; i < 4; ++i) x[i] = reinterpret_cast<const uint32_t *>(row[4 * t + i])[quad + 8 * m];
                mma_f16(c, prmt(x[0], x[2], low_halves), prmt(x[0], x[2], high_halves), prmt(x[1], x[3], low_halves),
                        prmt(x[1], x[3], high_halves), b[2 * t], b[2 * t + 1]);
            }
#pragma unroll
            for (int half = 0; half < 2; ++half)
#pragma unroll
                for (int h = 0; h < C; ++h) o[m][half][h] += C == 1 ? c[2 * half] + c[2 * half + 1] : c[2 * half + h];
        }
    } else {
        using Units = ValueUnits<TV, D>;
        constexpr int blocks = D / L::block;
#pragma unroll
        for (int b0 = 0; b0 < blocks; b0 += Units::blocks) {
            uint32_t operand[Units::blocks][L::parts][C][2]; // the second part of a level is subtracted
            float unit[Units::blocks][C];
#pragma unroll
            for (int i = 0; i < Units::blocks; ++i) {
                if (b0 + i == blocks) continue;
                float w[lane_rows][C];
#pragma unroll
                for (int j = 0; j < lane_rows; ++j) {
                    const float scale = L::load_block_scale(scale_row + 8 * j * pitch + (b0 + i) * L::block_bytes);
#pragma unroll
                    for (int h = 0; h < C; ++h) w[j][h] = p[j][h] * scale;
                }
                if (!visible) { // whatever scales hidden rows have
#pragma unroll
                    for (int j = 0; j < lane_rows; ++j)
#pragma unroll
                        for (int h = 0; h < C; ++h) w[j][h] = p[j][h] > 0 ? w[j][h] : 0.0f;
                }
                float factor[C];
#pragma unroll
                for (int h = 0; h < C; ++h) {
                    float top = 0;
#pragma unroll
                    for (int j = 0; j < lane_rows; ++j) top = greater_magnitude(top, w[j][h]);
                    top = over_quads(top, greater_magnitude);
                    factor[h] = integers_of(top);
                    unit[i][h] = top * (L::step / largest_integer);
                }
                weight_operands(w, factor, operand[i]);
            }
            const ValueBlock<TV, D> values(row, b0 * L::block_bytes, quad, b0 + 1 < blocks ? L::block_bytes : 0);
#pragma unroll
            for (int j = 0; j < Units::count; ++j)
#pragma unroll
                for (int m = 0; m < Units::blocks * Units::products; ++m) {
                    const int i = m / Units::products, b = b0 + i;
                    if (b == blocks) continue;
                    const auto v = values.levels(look_up, j, m);
                    int c[C][4] = {};
#pragma unroll
                    for (int part = 0; part < L::parts; ++part)
#pragma unroll
                        for (int h = 0; h < C; ++h) mma_int8(c[h], v.x[part], operand[i][part][h]);
#pragma unroll
                    for (int half = 0; half < 2; ++half)
#pragma unroll
                        for (int h = 0; h < C; ++h)
                            o[(b * Units::count + j) * Units::products + m % Units::products][half][h] +=
                                float(join_bytes(c, half, h)) * unit[i][h];
                }
        }
    }
}

// The softmax of a warp's columns over tiles, and the products of V and its weights. Weights are relative to a reference
// score, and the integers that they become to a unit, and both stay until a later weight is too large for them. So the
// products are sums of integers over many tiles, and most tiles need no values of other lanes. The integers of a tile are
// small if its weights are. Their error is at most a half, which is headroom / (2 * largest_integer) of the greatest
// weight times V's scale in the tile that chose the unit.
template <KV TV, int D> struct KeptProducts {
    using L = Layout<TV, D>;
    static constexpr float headroom = 8;      // by which a weight times V's scale may exceed those that chose the unit
    static constexpr float largest_sum = 1e6; // of a lane's weights in a tile

    int c[D / 16][1][4] = {};  // in the order of Sums; for high and low bytes of weights
    float limit = -1;          // of weights times V's scales; -1: the next tile chooses the unit
    float factor[1], unit = 0; // from these to integers, and from integer products to the output

    // Adds the integer sums to the output.
    __device__ __forceinline__ void flush(Sums<D, 1> & o) {
#pragma unroll
        for (int m = 0; m < D / 16; ++m)
#pragma unroll
            for (int half = 0; half < 2; ++half) {
                int(&sums)[4] = c[m][0];
                o[m][half][0] += (float(sums[2 * half]) * 256.0f + float(sums[2 * half + 1])) * unit;
                sums[2 * half] = sums[2 * half + 1] = 0;
            }
    }

    // Lets the next tile choose the unit. Else the integers of all later tiles could be small beside one great weight.
    __device__ __forceinline__ void choose_again() { limit = -1; }

    // Replaces the scores of a tile by weights, and adds these to the state. All products of earlier tiles must have
    // been added, and those of this tile must be the next ones. False if V of the tile may be left out.
    __device__ __forceinline__ bool weigh(Sums<D, 1> & o, SoftmaxState (&state)[1], float (&s)[lane_rows][1],
                                          float sparse_v) {
        float weight[lane_rows], sum;
        const auto exponentials = [&] {
#pragma unroll
            for (int j = 0; j < lane_rows; ++j) {
                weight[j] = exp2f(s[j][0] - state[0].largest);
                sum = j == 0 ? weight[0] : sum + weight[j];
            }
        };
        exponentials();
        if (__any_sync(all_lanes, !(sum <= largest_sum))) {
            flush(o);
            float largest[1], correction[1];
            largest_scores(s, largest);
            raise_largest(state, largest, correction);
            correct_output<D, 1>(o, correction);
            exponentials();
            choose_again();
        }
        state[0].sum += sum;
#pragma unroll
        for (int j = 0; j < lane_rows; ++j) s[j][0] = weight[j];
        // A lane's weights are not greater than their sum. A NaN keeps the tile.
        return __any_sync(all_lanes, !(sum <= sparse_v));
    }

    // Adds the products of V and the weights of a tile, some of whose rows may be hidden unless `visible`. The rows are
    // those of output().
    __device__ __forceinline__ void add(Sums<D, 1> & o, const float (&weight)[lane_rows][1], bool visible,
                                        const typename L::LookUpLevels & look_up, const uint8_t * scale_row,
                                        const uint8_t * row0, const uint8_t * row1, int pitch, int quad) {
        float w[lane_rows][1], top;
#pragma unroll
        for (int j = 0; j < lane_rows; ++j) w[j][0] = weight[j][0] * L::load_block_scale(scale_row + 8 * j * pitch);
        if (!visible) { // whatever scales hidden rows have
#pragma unroll
            for (int j = 0; j < lane_rows; ++j) w[j][0] = weight[j][0] == 0 ? 0.0f : w[j][0];
        }
#pragma unroll
        for (int j = 0; j < lane_rows; ++j) top = j == 0 ? fabsf(w[0][0]) : greater_magnitude(top, w[j][0]);
        if (__any_sync(all_lanes, !(top <= limit))) {
            flush(o);
            limit = headroom * over_quads(top, greater_magnitude);
            factor[0] = integers_of(limit);
            unit = limit * (L::step / largest_integer);
        }
        uint32_t operand[L::parts][1][2]; // the second part of a level is subtracted
        weight_operands(w, factor, operand);
        const uint8_t * row[8];
        rows_of_lane(row0, row1, pitch, row);
        using Units = ValueUnits<TV, D>;
        const ValueBlock<TV, D> values(row, 0, quad);
#pragma unroll
        for (int j = 0; j < Units::count; ++j)
#pragma unroll
            for (int m = 0; m < Units::products; ++m) {
                const auto v = values.levels(look_up, j, m);
#pragma unroll
                for (int part = 0; part < L::parts; ++part)
                    mma_int8(c[j * Units::products + m][0], v.x[part], operand[part][0]);
            }
    }
};

} // namespace
} // namespace cuda
} // namespace turboquant

#endif
