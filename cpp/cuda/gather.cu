#include "gather.h"
#include "launch.h"

namespace turboquant {
namespace cuda {
namespace {

constexpr int list_warps = 32;
constexpr int unit = 8;         // rows whose mask a lane reads at a time
constexpr int at_once = 8;      // units that a lane reads before it looks at them
constexpr int most_units = 16;  // of a lane
constexpr int rows_at_once = 32 * unit;

// A bit for each row of a unit that is seen. `biased` is set if such a row has a bias.
__device__ __forceinline__ uint32_t seen_rows_of(const uint4 & mask, bool & biased) {
    const uint32_t words[4] = {mask.x, mask.y, mask.z, mask.w};
    constexpr uint32_t hidden = two_infinities;
    if (words[0] == hidden && words[1] == hidden && words[2] == hidden && words[3] == hidden) return 0;
    uint32_t seen = 0;
#pragma unroll
    for (int i = 0; i < unit; ++i) {
        const uint32_t value = words[i / 2] >> (i % 2 * 16) & 0xffff;
        seen |= uint32_t(value != minus_infinity) << i;
        biased = biased || (value != minus_infinity && value != 0);
    }
    return seen;
}

// The sum of x over the lanes up to this one.
__device__ __forceinline__ int sum_up_to(int x, int lane) {
#pragma unroll
    for (int h = 1; h < 32; h *= 2) {
        const int other = __shfl_up_sync(all_lanes, x, h);
        x += lane >= h ? other : 0;
    }
    return x;
}

// Writes the rows of a unit from `first` on that are seen, to `list`. Mostly a warp sees all rows of its units.
__device__ __forceinline__ void list_unit(int * list, int first, uint32_t seen, int lane) {
    if (__all_sync(all_lanes, seen == 0xff)) {
        first -= lane * unit;
#pragma unroll
        for (int i = lane; i < rows_at_once; i += 32) list[i] = first + i;
        return;
    }
    list += sum_up_to(__popc(seen), lane) - __popc(seen);
    for (; seen; seen &= seen - 1) *list++ = first + __ffs(int(seen)) - 1;
}

// A thread block lists the rows that a token sees, in ascending order. Each warp has a run of rows.
__global__ void __launch_bounds__(32 * list_warps)
    list_kernel(const __grid_constant__ AttentionCall call, int * lists, int * lengths) {
    static_assert(list_warps == 32, "a warp adds what the warps have");
    __shared__ int of_warps[list_warps];
    let_next_start();
    wait_for_previous();
    const Attention & a = call.a;
    const int token = blockIdx.x, rows = int(a.n_kv), lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    const uint8_t * mask = static_cast<const uint8_t *>(a.mask) + token * a.mask_token;
    int * list = lists + token * a.n_kv;
    // Of so many rows at a time, each warp has a run.
    constexpr int step = list_warps * rows_at_once;
    const int run = min((rows + step - 1) / step, most_units) * rows_at_once;
    bool biased = false;
    int length = 0;
    for (int start = 0; start < rows; start += list_warps * run) {
        const int begin = start + warp * run, end = min(begin + run, rows);
        uint32_t seen[most_units / 4] = {}; // four units in each
        int count = 0;
#pragma unroll
        for (int i = 0; i < most_units; i += at_once) {
            uint4 values[at_once];
#pragma unroll
            for (int j = 0; j < at_once; ++j) {
                const int first = begin + (i + j) * rows_at_once + lane * unit;
                values[j] = first < end ? *reinterpret_cast<const uint4 *>(mask + 2 * int64_t(first))
                                        : make_uint4(two_infinities, two_infinities, two_infinities, two_infinities);
            }
#pragma unroll
            for (int j = 0; j < at_once; ++j) {
                const uint32_t rows_seen = seen_rows_of(values[j], biased);
                seen[(i + j) / 4] |= rows_seen << (8 * (j % 4));
                count += __popc(rows_seen);
            }
        }
        count = int(__reduce_add_sync(all_lanes, unsigned(count)));
        if (lane == 0) of_warps[warp] = count;
        __syncthreads();
        const int up_to = sum_up_to(of_warps[lane], lane);
        __syncthreads(); // of_warps may be written again
        int * at = list + length + __shfl_sync(all_lanes, up_to, warp) - count;
        length += __shfl_sync(all_lanes, up_to, 31);
#pragma unroll
        for (int i = 0; i < most_units; ++i) {
            if (!count) break;
            const uint32_t rows_seen = seen[i / 4] >> (8 * (i % 4)) & 0xff;
            if (!__any_sync(all_lanes, rows_seen)) continue;
            list_unit(at, begin + i * rows_at_once + lane * unit, rows_seen, lane);
            at += __reduce_add_sync(all_lanes, unsigned(__popc(rows_seen)));
        }
    }
    if (__syncthreads_or(biased)) { // all rows, so that their places are those of the mask
        for (int i = threadIdx.x; i < rows; i += blockDim.x) list[i] = i;
        length = all_rows_biased;
    }
    if (threadIdx.x == 0) lengths[token] = length;
}

} // namespace

bool can_list(const Attention & a) {
    return a.mask && a.streams == 1 && a.mask_heads == 1 && a.n_kv % unit == 0 &&
           (!a.windowed || a.exact.mask_heads == 1) &&
           ((reinterpret_cast<uintptr_t>(a.mask) | uint64_t(a.mask_token)) & 15) == 0;
}

size_t list_bytes(const Attention & a) { return size_t(a.tokens) * size_t(a.n_kv + 1) * sizeof(int); }

cudaError_t launch_lists(const AttentionCall & call, int * lists, int * lengths, cudaStream_t stream) {
    return launch(list_kernel, dim3(unsigned(call.a.tokens)), dim3(32 * list_warps), 0, stream, call, lists, lengths);
}

} // namespace cuda
} // namespace turboquant
