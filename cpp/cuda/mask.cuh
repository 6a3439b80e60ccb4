// Masks, ALiBi and the soft cap, which are applied to the scores of a tile before the softmax.
#ifndef TURBOQUANT_CUDA_MASK_H
#define TURBOQUANT_CUDA_MASK_H

#include "call.cuh"

#include <cuda_fp16.h>

namespace turboquant {
namespace cuda {
namespace {

// The masks of a lane's C columns.
template <int C> struct Mask {
    const char * row[C]; // the mask row of the query, or nullptr without a mask
    int64_t n_kv;
    int quad;
    float slope[C]; // of ALiBi, or 1; times log2e, because weights are computed as powers of two
    uint32_t values[lane_rows][C] = {}; // of the loaded tile: binary16

    __device__ __forceinline__ Mask(const AttentionCall & call, const Place & place, const LaneColumns<C> & columns)
        : n_kv(call.a.n_kv), quad(place.quad) {
        const Attention & a = call.a;
#pragma unroll
        for (int h = 0; h < C; ++h) {
            const int head = columns.head[h];
            slope[h] = log2e * alibi_slope(call, head);
            row[h] = a.mask ? static_cast<const char *>(a.mask) + columns.token[h] * a.mask_token +
                                  head % a.mask_heads * a.mask_head + place.stream % a.mask_streams * a.mask_stream
                            : nullptr;
        }
    }

    // Loads the mask of the tile from row `first` on. Rows from n_kv on are hidden.
    __device__ __forceinline__ void load(int64_t first) {
        if (first + tile_rows <= n_kv) {
            if (!row[0]) return;
#pragma unroll
            for (int h = 0; h < C; ++h) {
                const uint16_t * from = reinterpret_cast<const uint16_t *>(row[h]) + first + quad;
#pragma unroll
                for (int j = 0; j < lane_rows; ++j) values[j][h] = from[8 * j];
            }
            return;
        }
#pragma unroll 1
        for (int64_t r = first + quad; r < first + tile_rows; r += 8)
#pragma unroll
            for (int h = 0; h < C; ++h) {
#pragma unroll
                for (int j = 1; j < lane_rows; ++j) values[j - 1][h] = values[j][h];
                constexpr uint32_t minus_infinity = 0xfc00;
                values[lane_rows - 1][h] = r >= n_kv ? minus_infinity
                                           : row[h]  ? reinterpret_cast<const uint16_t *>(row[h])[r]
                                                     : 0;
            }
    }

    // Whether every column of the warp sees all rows of the loaded tile, without biases.
    __device__ __forceinline__ bool is_zero() const {
        uint32_t all = 0;
#pragma unroll
        for (int j = 0; j < lane_rows; ++j)
#pragma unroll
            for (int h = 0; h < C; ++h) all |= values[j][h];
        return !__any_sync(all_lanes, all != 0);
    }

    // Whether no column of the warp sees any row of the loaded tile.
    __device__ __forceinline__ bool hides_all() const {
        bool sees = false;
#pragma unroll
        for (int j = 0; j < lane_rows; ++j)
#pragma unroll
            for (int h = 0; h < C; ++h) sees = sees || values[j][h] != 0xfc00;
        return !__any_sync(all_lanes, sees);
    }

    // Adds the biases to the scores. The score of a hidden row is minus infinity, even if the bytes of the row give a NaN.
    __device__ __forceinline__ void apply(float (&s)[lane_rows][C]) const {
#pragma unroll
        for (int j = 0; j < lane_rows; ++j)
#pragma unroll
            for (int h = 0; h < C; ++h) {
                const float bias = __half2float(__ushort_as_half(uint16_t(values[j][h])));
                s[j][h] = bias == -INFINITY ? -INFINITY : s[j][h] + slope[h] * bias;
            }
    }
};

// Makes scores of the products of queries and K. Scores are multiplied by log2e. `factor` is that of the products.
template <int C>
__device__ __forceinline__ void scale_scores(float soft_cap, const float (&factor)[C], float (&s)[lane_rows][C]) {
#pragma unroll
    for (int j = 0; j < lane_rows; ++j)
#pragma unroll
        for (int h = 0; h < C; ++h) s[j][h] *= factor[h];
    if (soft_cap == 0) return;
    const float cap = soft_cap * log2e;
#pragma unroll
    for (int j = 0; j < lane_rows; ++j)
#pragma unroll
        for (int h = 0; h < C; ++h) s[j][h] = cap * tanhf(s[j][h] / cap);
}

} // namespace
} // namespace cuda
} // namespace turboquant

#endif
