// Masks, ALiBi and the soft cap, which are applied to the scores of a tile before the softmax.
#ifndef TURBOQUANT_CUDA_MASK_H
#define TURBOQUANT_CUDA_MASK_H

#include "call.cuh"

#include <cuda_fp16.h>

namespace turboquant {
namespace cuda {
namespace {

// The masks of a lane's C columns, for the tiles of its warp.
template <int C> struct Mask {
    const char * row;    // the mask row of the first column's query, or nullptr without a mask
    int64_t to_next = 0; // bytes from there to that of the second column
    int64_t n_kv;
    int quad;
    // Of the tiles that are examined, four bits of each: whether every column sees all of eight rows without biases,
    // and whether no column sees any of them. Neither may be known.
    uint32_t shown = 0, hidden = 0;
    uint32_t next = 0xf; // the bits of the next tile, or 0 if it is not examined
    uint4 loaded = {};   // of the tiles that are examined next

    __device__ __forceinline__ Mask(const AttentionCall & call, const Place & place, const LaneColumns<C> & columns)
        : row(row_of(call, place, columns, 0)), n_kv(call.a.n_kv), quad(place.quad) {
        if constexpr (C == 2) to_next = row_of(call, place, columns, 1) - row;
    }

    // Only the rows of a list are read, up to number `end`, and all of them are seen.
    __device__ __forceinline__ void show_list(int64_t end) {
        row = nullptr;
        n_kv = end;
    }

    // Loads the masks of the warp's next eight tiles, a quarter of a tile with each lane: from row `first` on, `apart`
    // rows apart, of which `left` are left to the thread block. Rows from n_kv on are hidden.
    __device__ __forceinline__ void load(const AttentionCall & call, const Place & place, int64_t first, int apart,
                                         int left) {
        const int tile = place.lane / 4;
        const int64_t at = first + tile * apart + 8 * (place.lane % 4);
        const bool whole = tile * apart < left && at + 8 <= n_kv;
        loaded = whole ? uint4{0, 0, 0, 0} : uint4{~0u, 0, 0, 0};
        if (!row) return;
        const char * base = static_cast<const char *>(call.a.mask);
        const auto load_row = [&](int column, uint4 & x) { // of all lanes' masks of a column
            const int64_t own = row - base + (C == 2 && column % 2 ? to_next : 0);
            const char * from = base + __shfl_sync(all_lanes, static_cast<long long>(own), column / C) + 2 * at;
            if (!whole) return;
            if (reinterpret_cast<uintptr_t>(from) & 15) x = {~0u, 0, 0, 0}; // is read in each tile instead
            else x = *reinterpret_cast<const uint4 *>(from);
        };
        if (call.one_mask_row) {
            load_row(0, loaded);
            return;
        }
        uint32_t any = 0, all = ~0u;
#pragma unroll 1
        for (int column = 0; column < 4 * C; ++column) {
            uint4 x = {~0u, 0, 0, 0};
            load_row(column, x);
            any |= any_of(x);
            all &= all_of(x);
        }
        loaded = {any, all, any, all};
    }
    // Examines the tiles whose masks have been loaded.
    __device__ __forceinline__ void examine() {
        const uint32_t any = any_of(loaded);
        shown = __ballot_sync(all_lanes, any == 0);
        hidden = __ballot_sync(all_lanes, any == two_infinities && all_of(loaded) == two_infinities);
        next = 0xf;
    }

    // Whether every column of the warp sees all rows of the next tile, without biases.
    __device__ __forceinline__ bool shows_next() const { return (shown & next) == next; }
    // Whether no column of the warp sees any row of the next tile.
    __device__ __forceinline__ bool hides_next() const { return (hidden & next) == next; }
    __device__ __forceinline__ void advance() { next <<= 4; }
    __device__ __forceinline__ bool examined() const { return next != 0; }

    // Adds the biases of the tile from row `first` on to its scores. The score of a hidden row is minus infinity, even
    // if the bytes of the row give a NaN.
    __device__ __forceinline__ void apply(const AttentionCall & call, const LaneColumns<C> & columns, int64_t first,
                                          float (&s)[lane_rows][C]) const {
        uint32_t values[lane_rows];
#pragma unroll
        for (int j = 0; j < lane_rows; ++j) {
            const int64_t r = first + quad + 8 * j;
            values[j] = r >= n_kv ? two_infinities : row ? load_values(row + 2 * r) : 0;
        }
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
    static __device__ __forceinline__ uint32_t any_of(const uint4 & x) { return x.x | x.y | x.z | x.w; }
    static __device__ __forceinline__ uint32_t all_of(const uint4 & x) { return x.x & x.y & x.z & x.w; }
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
