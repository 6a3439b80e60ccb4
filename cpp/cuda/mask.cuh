// Masks, ALiBi and the soft cap, which are applied to the scores of a tile before the softmax.
#ifndef TURBOQUANT_CUDA_MASK_H
#define TURBOQUANT_CUDA_MASK_H

#include "call.cuh"

#include <cuda_fp16.h>

namespace turboquant {
namespace cuda {
namespace {

// The mask of a lane's column. The lane has rows 2 * in_quad and 2 * in_quad + 1 of a tile, and those 8, 16 and 24 rows
// further on.
struct Mask {
    const char * row; // the mask row of the query, or nullptr without a mask
    int64_t n_kv;
    bool pairs; // whether the row is aligned to words of two values
    int in_quad;
    float slope; // of ALiBi, or 1; times log2e, because weights are computed as powers of two
    uint32_t words[4] = {0, 0, 0, 0}; // of the loaded tile: two binary16 values each

    // token and head are those of the lane's column.
    __device__ __forceinline__ Mask(const AttentionCall & call, const Place & place, int token, int head)
        : n_kv(call.a.n_kv), in_quad(place.in_quad), slope(log2e * alibi_slope(call, head)) {
        const Attention & a = call.a;
        row = a.mask ? static_cast<const char *>(a.mask) + token * a.mask_token + head % a.mask_heads * a.mask_head +
                           place.stream % a.mask_streams * a.mask_stream
                     : nullptr;
        pairs = (reinterpret_cast<uintptr_t>(row) & 3) == 0;
    }

    // Loads the mask of the tile from row `first` on. Rows from n_kv on are hidden.
    __device__ __forceinline__ void load(int64_t first) {
        if (first + tile_rows <= n_kv && pairs) {
            if (row) {
                const uint32_t * from = reinterpret_cast<const uint32_t *>(row + 2 * (first + 2 * in_quad));
#pragma unroll
                for (int i = 0; i < 4; ++i) words[i] = from[4 * i];
            }
            return;
        }
#pragma unroll 1
        for (int64_t r = first + 2 * in_quad; r < first + tile_rows; r += 8) {
            uint32_t word = 0;
#pragma unroll 1
            for (int i = 1; i >= 0; --i) {
                const uint16_t minus_infinity = 0xfc00;
                word = word << 16 | (r + i >= n_kv ? minus_infinity
                                     : row         ? *reinterpret_cast<const uint16_t *>(row + 2 * (r + i))
                                                   : 0);
            }
            words[0] = words[1];
            words[1] = words[2];
            words[2] = words[3];
            words[3] = word;
        }
    }

    // Whether no column of the warp sees any row of the loaded tile.
    __device__ __forceinline__ bool hides_all() const {
        constexpr uint32_t hidden = 0xfc00fc00; // two minus infinities
        const bool sees = words[0] != hidden || words[1] != hidden || words[2] != hidden || words[3] != hidden;
        return !__any_sync(all_lanes, sees);
    }

    // Multiplies the scores by `factor` and adds the biases. The score of a hidden row is minus infinity, even if the
    // bytes of the row give a NaN.
    __device__ __forceinline__ void apply(float factor, float (&s)[8]) const {
#pragma unroll
        for (int i = 0; i < 8; ++i) {
            const float bias = __half2float(__ushort_as_half(uint16_t(words[i / 2] >> (16 * (i % 2)))));
            s[i] = s[i] * factor + slope * bias;
            if (bias == -INFINITY) s[i] = -INFINITY;
        }
    }
};

// Applies the soft cap to the scores, which are s * factor.
__device__ __forceinline__ void cap_scores(float cap, float factor, float (&s)[8]) {
#pragma unroll
    for (int i = 0; i < 8; ++i) s[i] = cap * tanhf(s[i] * factor / cap);
}

} // namespace
} // namespace cuda
} // namespace turboquant

#endif
