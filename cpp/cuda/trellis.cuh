// The encoder of the trellis-coded types (FORMAT.md, "Encoder of the trellis-coded types"). A warp encodes a block.
//
// The Viterbi search keeps the costs of the 64 states in place: a lane has two. A branch leads from the states j and
// j + 32 to the states 2 j and 2 j + 1, so the two new costs can replace the two old ones if the numbers of the states
// rotate: location l has state rotate(l, t) before step t, and the step exchanges costs between the locations that
// differ in bit 5 - t mod 6, which becomes the new path bit. A cost has the sum of metrics in its upper half. In its
// lower half is the path that leads there: bit i is the oldest bit of the predecessor in step i of a group of steps,
// which is the path bit of six steps before. So the smaller of two numbers has the smaller sum, and of equal sums the
// one from state j; and the numbers need only be stored at the end of a group.
#ifndef TURBOQUANT_CUDA_TRELLIS_H
#define TURBOQUANT_CUDA_TRELLIS_H

#include "device.cuh"

#include "../src/generic/trellis.h"

namespace turboquant {
namespace cuda {
namespace {

// ---- tables

// For a value on the grid: the metrics of the four subsets, a byte each, and the numbers of their nearest levels, four
// bits each.
template <int Bits> struct GridTable {
    static constexpr int limit = Grid<Bits>::limit;
    struct {
        uint32_t metrics, rests;
    } entry[2 * limit + 1];
    int8_t level[Trellis<Bits>::levels];
    constexpr GridTable() : entry(), level() {
        for (int g = -limit; g <= limit; ++g) {
            int16_t metric[4] = {};
            subset_metrics<Bits>(g, metric);
            for (int c = 0; c < 4; ++c) {
                uint32_t rest = 0;
                for (int r = 0; r + 1 < Grid<Bits>::in_subset; ++r) rest += g > Grid<Bits>::midpoint(c, r);
                entry[g + limit].metrics |= uint32_t(metric[c]) << (8 * c);
                entry[g + limit].rests |= rest << (4 * c);
            }
        }
        for (int i = 0; i < Trellis<Bits>::levels; ++i) level[i] = Trellis<Bits>::centroids[i];
    }
};
template <int Bits> __device__ GridTable<Bits> grid_table = GridTable<Bits>();
template <int Bits, int N> __constant__ ScaleTable<Bits, N> scale_table = ScaleTable<Bits, N>();

constexpr int rotate_state(int state, int steps) {
    for (int i = 0; i < steps % path_memory; ++i) state = (state << 1 | state >> (path_memory - 1)) & (path_states - 1);
    return state;
}

// For each step modulo 6 and each location, the selector of the branch from the location itself, whose oldest path bit
// is the new one. It gives the metric of the branch's subset, shifted by 16, plus the second operand of prmt, a bit of
// the lower half, if the oldest bit is set. The other branch has the opposite subset and the opposite oldest bit, so
// its selector differs in `other_branch`.
struct BranchTable {
    uint16_t own[path_memory][path_states];
    constexpr BranchTable() : own() {
        for (int p = 0; p < path_memory; ++p)
            for (int location = 0; location < path_states; ++location) {
                const int state = rotate_state(location, p), oldest = state >> (path_memory - 1);
                const int subset = subset_of(unsigned(state << 1 | oldest));
                own[p][location] = uint16_t(0x6000 | subset << 8 | (oldest ? 0x54 : 0x76));
            }
    }
};
constexpr int other_branch = 0x0222;
static_assert((path_taps0 & 0101) == 0 && (path_taps1 & 0101) == 0101, "the newest and the oldest bit change c1 alone");
__device__ BranchTable branch_table = BranchTable();

// Those of a lane's locations.
struct Branches {
    uint32_t own[path_memory][2];
    __device__ __forceinline__ explicit Branches(int lane) {
#pragma unroll
        for (int p = 0; p < path_memory; ++p)
#pragma unroll
            for (int h = 0; h < 2; ++h) own[p][h] = branch_table.own[p][lane + 32 * h];
    }
};

// ---- the search

constexpr int group_steps = 2 * path_memory; // locations have their own states between groups
template <int N> struct TrellisScratch {     // of a warp
    static constexpr int groups = (N + group_steps - 1) / group_steps;
    uint4 metrics[N / 4];                   // four steps each
    uint16_t paths[groups][path_states];    // the lower halves of the costs after a group, by location
    uint32_t words[N / 32 + 1];             // the first bytes of the block
};

// Computes step I of a group. cost[h] is that of location lane + 32 h.
template <int I>
__device__ __forceinline__ void search_step(uint32_t metrics, const Branches & branches, uint32_t (&cost)[2]) {
    constexpr int phase = I % path_memory, exchanged = path_memory - 1 - phase;
    const uint32_t other[2] = {exchanged == 5 ? cost[1] : __shfl_xor_sync(all_lanes, cost[0], 1 << exchanged),
                               exchanged == 5 ? cost[0] : __shfl_xor_sync(all_lanes, cost[1], 1 << exchanged)};
#pragma unroll
    for (int h = 0; h < 2; ++h)
        cost[h] = min(other[h] + prmt(metrics, 1 << I, branches.own[phase][h] ^ other_branch),
                      cost[h] + prmt(metrics, 1 << I, branches.own[phase][h]));
}

template <int I>
__device__ __forceinline__ void four_steps(const uint4 metrics, const Branches & branches, uint32_t (&cost)[2]) {
    search_step<I>(metrics.x, branches, cost);
    search_step<I + 1>(metrics.y, branches, cost);
    search_step<I + 2>(metrics.z, branches, cost);
    search_step<I + 3>(metrics.w, branches, cost);
}

// Computes the first Steps steps of a group, and stores the paths.
template <int Steps, int N>
__device__ __forceinline__ void search_group(int group, TrellisScratch<N> & scratch, const Branches & branches,
                                             uint32_t (&cost)[2], int lane) {
    static_assert(Steps % 4 == 0 && Steps <= group_steps, "four steps at a time");
    const uint4 * four = scratch.metrics + group * (group_steps / 4);
    if constexpr (Steps > 0) four_steps<0>(four[0], branches, cost);
    if constexpr (Steps > 4) four_steps<4>(four[1], branches, cost);
    if constexpr (Steps > 8) four_steps<8>(four[2], branches, cost);
#pragma unroll
    for (int h = 0; h < 2; ++h) {
        scratch.paths[group][lane + 32 * h] = uint16_t(cost[h]);
        cost[h] &= 0xffff0000;
    }
}

__device__ __forceinline__ uint32_t reversed_path_bits(uint32_t bits) { return __brev(bits) >> (32 - path_memory); }

// Puts bits at a position of a row of words; the bits above `count` are zero.
template <int Words>
__device__ __forceinline__ void put_bits(uint32_t (&words)[Words], int at, int count, uint32_t bits) {
    words[at / 32] |= bits << (at % 32);
    if (at % 32 + count > 32) words[at / 32 + 1] |= bits >> (32 - at % 32);
}

// Finds the best path for scratch.metrics, and writes the first bytes of the block, without the scale, to
// scratch.words.
template <int N>
__device__ __forceinline__ void find_path(TrellisScratch<N> & scratch, const Branches & branches, int lane) {
    constexpr int whole = N / group_steps, left = N % group_steps;
    static_assert(left > 0, "the last group is shorter");
    uint32_t cost[2] = {0, 0};
#pragma unroll 1
    for (int group = 0; group < whole; ++group) search_group<group_steps, N>(group, scratch, branches, cost, lane);
    search_group<left, N>(whole, scratch, branches, cost, lane);

    // The best state at the end, the smallest of equal ones.
    constexpr int turn = N % path_memory;
    const auto rotate = [](int location) {
        return ((location << turn) | (location >> (path_memory - turn))) & (path_states - 1);
    };
    const uint32_t best = warp_min(min(cost[0] | rotate(lane), cost[1] | rotate(lane + 32))) % path_states;
    uint32_t location = (best >> turn | best << (path_memory - turn)) % path_states;
    uint32_t words[N / 32 + 1] = {};
    put_bits(words, scale_bits + N, path_memory, reversed_path_bits(best));
    __syncwarp();
#pragma unroll
    for (int group = whole; group >= 0; --group) {
        const uint32_t bits = scratch.paths[group][location];
        const int steps = group == whole ? left : group_steps;
        put_bits(words, scale_bits + group * group_steps, steps, bits);
        location = reversed_path_bits(bits) | (steps < path_memory ? location % (1u << (path_memory - steps)) : 0);
    }
    if (lane == 0) {
#pragma unroll
        for (int w = 0; w < N / 32 + 1; ++w) scratch.words[w] = words[w];
    }
    __syncwarp();
}

// ---- the block

// The scale of the levels for the search, as its factor from z to the grid.
template <int Bits, int N> __device__ __forceinline__ int choose_ratio(const int (&z)[N / 32]) {
    const ScaleTable<Bits, N> & table = scale_table<Bits, N>;
    int least = INT32_MAX, ratio = 0;
#pragma unroll
    for (int s = 0; s < trellis_scales; ++s) {
        int sum = 0;
#pragma unroll
        for (int j = 0; j < N / 32; ++j) {
            const int over = max(abs(z[j]) - table.outermost[s], 0);
            sum += over * over;
        }
        const int error = table.granular[s] + warp_sum(sum);
        ratio = error < least ? table.ratio[s] : ratio;
        least = min(error, least);
    }
    return ratio;
}

// Stores fields of Width bits: element i is field i / bytes of byte i % bytes. value[j] belongs to element lane + 32 j.
template <int Width, int N>
__device__ __forceinline__ void store_fields(const uint32_t (&value)[N / 32], uint8_t * to, int lane) {
    constexpr int bytes = N * Width / 8;
    static_assert(bytes <= 32, "the elements of a lane are in one byte");
    uint32_t byte = 0;
#pragma unroll
    for (int j = 0; j < N / 32; ++j) byte |= value[j] << (32 * j / bytes * Width);
    byte <<= lane / bytes * Width;
#pragma unroll
    for (int h = bytes; h < 32; h *= 2) byte |= __shfl_xor_sync(all_lanes, byte, h);
    if (lane < bytes) to[lane] = uint8_t(byte);
}

} // namespace
} // namespace cuda
} // namespace turboquant

#endif
