// The encoder of the trellis-coded types (FORMAT.md, "Encoder of the trellis-coded types"). A SIMD group encodes a
// block.
//
// Lane i has the costs of the states i and i + 32, from which branches lead to the states 2 i and 2 i + 1: the lane
// computes these, and keeps a bit for each that tells whether the branch from i + 32 has won. Two shuffles then bring
// the new costs to the lanes of their states.
#ifndef TURBOQUANT_METAL_TRELLIS_H
#define TURBOQUANT_METAL_TRELLIS_H

#include "levels.h"

namespace turboquant {

constant int path_states = 1 << path_memory;

// The grid on which values are compared with levels: bits - 1 fractional bits of a level.
template <int F> inline int grid_level(int number) { return int(codebooks[F][number]) << (Family<F>::bits - 1); }

// The metrics of the four subsets for a value on the grid, a byte each, and the numbers of their nearest levels, four
// bits each.
struct GridEntry {
    uint metrics, rests;
};

template <int F> inline GridEntry grid_entry(int g) {
    enum { in_subset = Family<F>::levels / 4 };
    GridEntry out = {0, 0};
    FOR_UNROLLED (int c = 0; c < 4; ++c) {
        int rest = 0;
        for (int r = 0; r + 1 < in_subset; ++r)
            rest += g > (grid_level<F>(4 * r + c) + grid_level<F>(4 * r + 4 + c)) / 2 ? 1 : 0;
        const int distance = min(abs(g - grid_level<F>(4 * rest + c)), int(most_distance));
        out.metrics |= uint(distance * distance >> metric_shift) << (8 * c);
        out.rests |= uint(rest) << (4 * c);
    }
    return out;
}

// The factor from z to the grid, times 2^15, under the scale that is expected to leave the least error.
template <int F, int N> inline int choose_ratio(thread const int * z) {
    int least = 0x7fffffff, ratio = 0;
    for (int s = 0; s < trellis_scales; ++s) {
        int sum = 0;
        FOR_UNROLLED (int j = 0; j < N / 32; ++j) {
            const int over = max(abs(z[j]) - scale_outermost[F][Block<N>::index][s], 0);
            sum += over * over;
        }
        const int error = scale_granular[F][Block<N>::index][s] + simd_sum(sum);
        ratio = error < least ? scale_ratios[F][Block<N>::index][s] : ratio;
        least = min(error, least);
    }
    return ratio;
}

// Finds the path with the least sum of metrics; metrics[j] are those of element lane + 32 j. Writes the first 2 + N / 8
// bytes of the block, without the scale, as words. All lanes get all words.
template <int N> inline void find_path(thread const uint * metrics, thread uint * words, ushort lane) {
    uint shift[4]; // of the metrics: of the branches from i to 2 i and 2 i + 1, then of those from i + 32
    FOR_UNROLLED (uint b = 0; b < 4; ++b) {
        const uint state = lane + 32 * (b >> 1); // its bit 0 is the newest
        uint path = 0;
        for (int k = 0; k < path_memory; ++k) path |= (state >> k & 1) << (path_memory - 1 - k);
        shift[b] = 8 * subset_at(path | (b & 1) << path_memory);
    }
    uint cost[2] = {0, 0}, upper[2][N / 32];
    FOR_UNROLLED (int w = 0; w < N / 32; ++w) {
        upper[0][w] = upper[1][w] = 0;
        for (int x = 4 * w; x < 4 * w + 4; ++x) // the byte of the path
            FOR_UNROLLED (int c = 0; c < 8; ++c) {
                const int element = c * (N / 8) + x;
                const uint m = simd_shuffle(metrics[c * (N / 8) / 32], ushort(element % 32));
                uint next[2];
                FOR_UNROLLED (uint u = 0; u < 2; ++u) {
                    const uint from_lower = cost[0] + (m >> shift[u] & 255u);
                    const uint from_upper = cost[1] + (m >> shift[2 + u] & 255u);
                    upper[u][w] |= (from_upper < from_lower ? 1u : 0u) << (8 * (x - 4 * w) + c);
                    next[u] = min(from_lower, from_upper);
                }
                const uint both = next[0] | next[1] << 16; // the sum of 128 metrics fits 15 bits
                const uint a = simd_shuffle(both, ushort(lane >> 1)), b = simd_shuffle(both, ushort(16 + (lane >> 1)));
                cost[0] = lane & 1 ? a >> 16 : a & 0xffffu;
                cost[1] = lane & 1 ? b >> 16 : b & 0xffffu;
            }
    }

    // The best state at the end, the smallest of equal ones; then its path backwards.
    uint state = simd_min(min(cost[0] << 6 | uint(lane), cost[1] << 6 | (uint(lane) + 32u))) & 63u;
    uint path[N / 32];
    FOR_UNROLLED (int w = N / 32 - 1; w >= 0; --w) {
        path[w] = 0;
        for (int t = 31; t >= 0; --t) {
            path[w] |= (state & 1u) << t;
            const uint won = simd_shuffle(state & 1u ? upper[1][w] : upper[0][w], ushort(state >> 1)) >> t & 1u;
            state = state >> 1 | won << (path_memory - 1);
        }
    }
    uint start = 0; // bit 15 of the block is the last one before the first step
    for (int k = 0; k < path_memory; ++k) start |= (state >> k & 1u) << (15 - k);
    words[0] = start | path[0] << 16;
    FOR_UNROLLED (int w = 1; w < N / 32; ++w) words[w] = path[w - 1] >> 16 | path[w] << 16;
    words[N / 32] = path[N / 32 - 1] >> 16;
}

} // namespace turboquant

#endif
