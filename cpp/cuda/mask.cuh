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
    const char * row;    // the mask row of the first column's query, or nullptr without a mask
    int64_t to_next = 0; // bytes from there to that of the second column
    int64_t n_kv;
    int quad;
    uint32_t values[lane_rows] = {}; // of the loaded tile: binary16 of the columns, the first one in the low half

    __device__ __forceinline__ Mask(const AttentionCall & call, const Place & place, const LaneColumns<C> & columns)
        : row(row_of(call, place, columns, 0)), n_kv(call.a.n_kv), quad(place.quad) {
        if constexpr (C == 2) to_next = row_of(call, place, columns, 1) - row;
    }

    // Only the rows of a list are read, up to number `end`, and all of them are seen.
    __device__ __forceinline__ void show_list(int64_t end) {
        row = nullptr;
        n_kv = end;
    }

    // Loads the mask of the tile from row `first` on. Rows from n_kv on are hidden.
    __device__ __forceinline__ void load(int64_t first) {
        if (first + tile_rows <= n_kv) {
            if (!row) return;
            const char * from = row + 2 * (first + quad);
#pragma unroll
            for (int j = 0; j < lane_rows; ++j) values[j] = load_values(from + 16 * j);
            return;
        }
#pragma unroll 1
        for (int64_t r = first + quad; r < first + tile_rows; r += 8) {
#pragma unroll
            for (int j = 1; j < lane_rows; ++j) values[j - 1] = values[j];
            values[lane_rows - 1] = r >= n_kv ? hidden : row ? load_values(row + 2 * r) : 0;
        }
    }

    // Whether every column of the warp sees all rows of the loaded tile, without biases.
    __device__ __forceinline__ bool is_zero() const {
        uint32_t all = 0;
#pragma unroll
        for (int j = 0; j < lane_rows; ++j) all |= values[j];
        return !__any_sync(all_lanes, all != 0);
    }

    // Whether no column of the warp sees any row of the loaded tile.
    __device__ __forceinline__ bool hides_all() const {
        bool sees = false;
#pragma unroll
        for (int j = 0; j < lane_rows; ++j) sees = sees || values[j] != hidden;
        return !__any_sync(all_lanes, sees);
    }

    // Adds the biases to the scores. The score of a hidden row is minus infinity, even if the bytes of the row give a
    // NaN.
    __device__ __forceinline__ void apply(const AttentionCall & call, const LaneColumns<C> & columns,
                                          float (&s)[lane_rows][C]) const {
#pragma unroll
        for (int h = 0; h < C; ++h) {
            const float slope = log2e * alibi_slope(call, columns.head[h]); // weights are powers of two
#pragma unroll
            for (int j = 0; j < lane_rows; ++j) {
                const float bias = __half2float(__ushort_as_half(uint16_t(values[j] >> (16 * h))));
                s[j][h] = bias == -INFINITY ? -INFINITY : s[j][h] + slope * bias;
            }
        }
    }

private:
    static constexpr uint32_t hidden = C == 1 ? minus_infinity : two_infinities;

    static __device__ __forceinline__ const char * row_of(const AttentionCall & call, const Place & place,
                                                          const LaneColumns<C> & columns, int h) {
        const Attention & a = call.a;
        return a.mask ? static_cast<const char *>(a.mask) + columns.token[h] * a.mask_token +
                            remainder_of(columns.head[h], a.mask_heads) * a.mask_head +
                            remainder_of(place.stream, a.mask_streams) * a.mask_stream
                      : nullptr;
    }
    __device__ __forceinline__ uint32_t load_values(const char * from) const {
        const uint32_t first = *reinterpret_cast<const uint16_t *>(from);
        if constexpr (C == 1) return first;
        else return first | uint32_t(*reinterpret_cast<const uint16_t *>(from + to_next)) << 16;
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
