// The kernels that merge the partial results of query rows, and store beside this what a call stores.
#ifndef TURBOQUANT_CUDA_MERGE_H
#define TURBOQUANT_CUDA_MERGE_H

#include "encode.cuh"
#include "exact.cuh"
#include "launch.h"
#include "load.cuh"

#include <algorithm>

namespace turboquant {
namespace cuda {
namespace {

inline int64_t query_rows(const Attention & a) { return int64_t(a.streams) * a.tokens * a.heads; }

// What the kernel that merges parts stores in blocks, in its first thread blocks: beside the preceding kernel, if that
// reads none of these rows. It lets the merge start only when it has waited for what it reads, so the rows are
// complete.
struct StoredBeside {
    Stores stores;
    int groups; // thread blocks
};

template <int N, typename Shared>
__device__ __forceinline__ void encode_beside(const StoredBeside & s, Shared & shared) {
    if (threadIdx.x < 32 * encode_warps) encode_group<N>(s.stores, blockIdx.x, false, shared);
}

// Adds parts first, first + apart, ... of a query row, of which AtOnce are loaded at the same time. `partial` and
// `states` are those of its first part. A lane has P values, V adjacent ones at a time, and 32 V values on the next
// ones; its first value in a part is number `value`.
template <int D, int P, int V, int AtOnce>
__device__ __forceinline__ void add_parts(const float * partial, const SoftmaxState * states, int parts, int first,
                                          int apart, int value, Merged<P> & own) {
#pragma unroll 1
    for (; first < parts; first += AtOnce * apart) {
        SoftmaxState part[AtOnce];
        float x[AtOnce][P];
#pragma unroll
        for (int b = 0; b < AtOnce; ++b) {
            const int i = first + b * apart;
            part[b] = {nothing_seen, 0};
            if (i >= parts) continue;
            part[b] = states[i];
            const float * from = partial + int64_t(i) * D + value;
#pragma unroll
            for (int j = 0; j < P; j += V) {
                if constexpr (V == 4) {
                    const float4 four = *reinterpret_cast<const float4 *>(from + 32 * j);
                    x[b][j] = four.x;
                    x[b][j + 1] = four.y;
                    x[b][j + 2] = four.z;
                    x[b][j + 3] = four.w;
                } else if constexpr (V == 2) {
                    const float2 two = *reinterpret_cast<const float2 *>(from + 32 * j);
                    x[b][j] = two.x;
                    x[b][j + 1] = two.y;
                } else {
                    x[b][j] = from[32 * j];
                }
            }
        }
        float largest = own.largest;
#pragma unroll
        for (int b = 0; b < AtOnce; ++b) largest = fmaxf(largest, part[b].largest);
        own.change_largest(largest);
#pragma unroll
        for (int b = 0; b < AtOnce; ++b) own.add(part[b], x[b]);
    }
}

__device__ __forceinline__ SoftmaxState sink_of_row(const AttentionCall & call, int row) {
    return sink_state(call.a.sinks, call.a.sinks ? row % call.a.heads : 0);
}

// Finishes the block that begins with value number `at` of the output.
template <int N>
__device__ __forceinline__ void finish_at(const Attention & a, float (&y)[N / 32], float sum, bool rotated, int64_t at,
                                          int lane) {
    finish<N>(y, sum, rotated, a.dst + at, lane, a.quantized ? a.quantized + at / 32 : nullptr);
}

constexpr int most_merge_warps = 32;
constexpr int parts_at_once = 4; // that a warp loads at the same time

template <int D> union MergeShared {
    struct {
        float sums[most_merge_warps * D];
        SoftmaxState states[most_merge_warps];
    } merge;
    EncodeShared<rotated_block<D>> encode;
};

// Merges the parts of a query row and its sink, with one thread block for each of the first `query_rows`. Warp w adds
// parts w, w + warps, ..., and the first warps add what the warps have. The other thread blocks store the rows of a
// window's batch in its slots, which no kernel reads any more.
//
// The launch bounds require only one thread block per multiprocessor. With the registers that two would leave, the
// compiler loads the parts one after the other.
template <int D>
__global__ void __launch_bounds__(32 * most_merge_warps, 1)
    merge_kernel(const __grid_constant__ AttentionCall call, const __grid_constant__ StoredBeside stores,
                 int query_rows, bool rotated) {
    constexpr int P = D / 32, V = values_at_once<D>;
    __shared__ MergeShared<D> shared;
    float * sums = shared.merge.sums;
    SoftmaxState * states = shared.merge.states;
    const int row = int(blockIdx.x) - stores.groups;
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, warps = blockDim.x / 32;

    let_next_start();
    if (row < 0) {
        encode_beside<rotated_block<D>>(stores, shared.encode);
        return;
    }
    if (row >= query_rows) {
        const uint32_t stored = uint32_t(row - query_rows) * warps + warp;
        wait_for_previous();
        if (stored < call.stored_rows) store_exact<D>(call.a, stored, lane);
        return;
    }
    const int parts = call.all_parts;
    const float * partial = call.partial + int64_t(row) * parts * D;
    const SoftmaxState * part_states = call.states + int64_t(row) * parts;
    if (lane == 0 && warp < parts) { // for the translations of the addresses
        prefetch(partial + int64_t(warp) * D);
        prefetch(part_states + warp);
    }
    wait_for_previous();
    Merged<P> own(nothing_seen);
    add_parts<D, P, V, parts_at_once>(partial, part_states, parts, warp, warps, V * lane, own);
#pragma unroll
    for (int j = 0; j < P; ++j) sums[warp * D + 32 * (j / V * V) + V * lane + j % V] = own.y[j];
    if (lane == 0) states[warp] = {own.largest, own.sum};
    __syncthreads();
    constexpr int N = rotated_block<D>;
    if (warp >= D / N) return;
    const SoftmaxState sink = sink_of_row(call, row);
    MergedSum all(largest_of(sink, states, 1, warps, lane)); // lane i adds what warp i has
    const float weight = lane < warps ? all.add(states[lane]) : 0.0f;
    float sum = all.sum, y[N / 32] = {};
#pragma unroll
    for (int h = 16; h > 0; h /= 2) sum += __shfl_xor_sync(all_lanes, sum, h);
    MergedSum of_sink(all.largest);
    of_sink.add(sink);
    sum += of_sink.sum;
#pragma unroll 8
    for (int i = 0; i < warps; ++i) {
        const float weight_of_warp = __shfl_sync(all_lanes, weight, i);
#pragma unroll
        for (int j = 0; j < N / 32; ++j) y[j] += weight_of_warp * sums[i * D + warp * N + lane + 32 * j];
    }
    finish_at<N>(call.a, y, sum, rotated, int64_t(row) * D + warp * N, lane);
}

// As merge_kernel for few parts, with a warp for each query row, which loads all its parts at the same time.
constexpr int few_parts_warps = 4; // of a thread block
template <int D>
__global__ void __launch_bounds__(32 * few_parts_warps)
    merge_few_kernel(const __grid_constant__ AttentionCall call, const __grid_constant__ StoredBeside stores,
                     int query_rows, bool rotated) {
    __shared__ EncodeShared<rotated_block<D>> shared;
    constexpr int P = D / 32, N = rotated_block<D>, B = N / 32;
    const int lane = threadIdx.x % 32;
    const int row = (int(blockIdx.x) - stores.groups) * few_parts_warps + int(threadIdx.x) / 32;
    let_next_start();
    if (row < 0) {
        encode_beside<rotated_block<D>>(stores, shared);
        return;
    }
    wait_for_previous();
    if (row >= query_rows) {
        const uint32_t stored = row - query_rows;
        if (stored < call.stored_rows) store_exact<D>(call.a, stored, lane);
        return;
    }
    const int64_t first = int64_t(row) * call.all_parts;
    const SoftmaxState sink = sink_of_row(call, row);
    Merged<P> own(nothing_seen);
    add_parts<D, P, 1, parts_at_once>(call.partial + first * D, call.states + first, call.all_parts, 0, 1, lane, own);
    own.change_largest(fmaxf(own.largest, sink.largest));
    own.MergedSum::add(sink);
#pragma unroll
    for (int b = 0; b < D / N; ++b) {
        float y[B];
#pragma unroll
        for (int j = 0; j < B; ++j) y[j] = own.y[b * B + j];
        finish_at<N>(call.a, y, own.sum, rotated, int64_t(row) * D + b * N, lane);
    }
}

// As merge_kernel for few query rows with many parts. A multiprocessor reads 64 bytes of the L2 cache in a cycle, so
// D / 32 thread blocks share a row: number y has the values from 32 y on, and all parts. Those of a rotated block are a
// cluster, and exchange the values that are rotated back.
constexpr int column_warps = 12;
constexpr int column_parts = 6;  // that a lane loads at the same time
constexpr int many_parts = 32;  // one thread block reads as many in 260 cycles in heads of 128

template <int N> union ColumnsShared {
    struct {
        float sums[column_warps][32];
        SoftmaxState states[column_warps];
        float blocks[N / 32][32]; // the values of the thread blocks of the cluster
        uint64_t arrived;         // the barrier for the values of the others
    } merge;
    float4 alignment; // of `sums`
    EncodeShared<N> encode;
};

template <int D>
__global__ void __launch_bounds__(32 * column_warps)
    merge_columns_kernel(const __grid_constant__ AttentionCall call, const __grid_constant__ StoredBeside stores,
                         int query_rows, bool rotated) {
    constexpr int N = rotated_block<D>, cluster = N / 32, V = 4, lanes = 32 / V; // lanes of a part
    __shared__ ColumnsShared<N> shared;
    auto & memory = shared.merge;
    const int row = int(blockIdx.x) - stores.groups;
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;

    let_next_start();
    if (row < 0) {
        encode_beside<rotated_block<D>>(stores, shared.encode);
        return;
    }
    if (row >= query_rows) {
        const uint32_t stored = (uint32_t(row - query_rows) * (D / 32) + blockIdx.y) * column_warps + warp;
        wait_for_previous();
        if (stored < call.stored_rows) store_exact<D>(call.a, stored, lane);
        return;
    }
    const int rank = int(blockIdx.y) % cluster;
    const uint32_t arrived = uint32_t(__cvta_generic_to_shared(&memory.arrived));
    const bool exchange = rotated && cluster > 1;
    if (exchange) {
        if (threadIdx.x == 0) start_barrier(arrived, 1);
        sync_cluster();
        if (threadIdx.x == 0) arrive_for_bytes(arrived, (cluster - 1) * 32 * int(sizeof(float)));
    }
    const float * partial = call.partial + int64_t(row) * call.all_parts * D;
    const SoftmaxState * states = call.states + int64_t(row) * call.all_parts;
    const int first = warp * V + lane / lanes;
    if (lane % lanes == 0 && first < call.all_parts) { // for the translations of the addresses
        prefetch(partial + int64_t(first) * D);
        prefetch(states + first);
    }
    wait_for_previous();
    Merged<V> own(nothing_seen);
    add_parts<D, V, V, column_parts>(partial, states, call.all_parts, first, V * column_warps,
                                     32 * int(blockIdx.y) + V * (lane % lanes), own);
    float largest = own.largest;
#pragma unroll
    for (int h = lanes; h < 32; h *= 2) largest = fmaxf(largest, __shfl_xor_sync(all_lanes, largest, h));
    own.change_largest(largest);
#pragma unroll
    for (int h = lanes; h < 32; h *= 2) {
        own.sum += __shfl_xor_sync(all_lanes, own.sum, h);
#pragma unroll
        for (int j = 0; j < V; ++j) own.y[j] += __shfl_xor_sync(all_lanes, own.y[j], h);
    }
    if (lane < lanes)
        reinterpret_cast<float4 *>(memory.sums[warp])[lane] =
            make_float4(own.y[0], own.y[1], own.y[2], own.y[3]);
    if (lane == 0) memory.states[warp] = {own.largest, own.sum};
    __syncthreads();
    if (warp > 0) return;

    const SoftmaxState sink = sink_of_row(call, row);
    MergedSum all(largest_of(sink, memory.states, 1, column_warps, lane)); // lane i adds what warp i has
    const float weight = lane < column_warps ? all.add(memory.states[lane]) : 0.0f;
    float sum = all.sum, y = 0;
#pragma unroll
    for (int h = 16; h > 0; h /= 2) sum += __shfl_xor_sync(all_lanes, sum, h);
    MergedSum of_sink(all.largest);
    of_sink.add(sink);
    sum += of_sink.sum;
#pragma unroll
    for (int i = 0; i < column_warps; ++i) y += __shfl_sync(all_lanes, weight, i) * memory.sums[i][lane];
    y = sum == 0 ? 0.0f : y / sum; // zeros if no row was seen; a NaN stays NaN
    if (rotated) {
        float of_lane[1] = {flip_sign(y, s2_word(rank), lane)};
        hadamard_warp<32>(of_lane);
        y = of_lane[0];
        if (exchange) {
            const uint32_t place = uint32_t(__cvta_generic_to_shared(&memory.blocks[rank][lane]));
#pragma unroll
            for (int i = 1; i < cluster; ++i)
                store_mapped(map_to(place, rank ^ i), __float_as_uint(y), map_to(arrived, rank ^ i));
            wait_for_phase(arrived, 0);
            memory.blocks[rank][lane] = y;
            y = 0;
#pragma unroll
            for (int i = 0; i < cluster; ++i) {
                const float x = memory.blocks[i][lane];
                y += __popc(unsigned(i & rank)) & 1 ? -x : x;
            }
        }
        y = flip_sign(y * Block<N>::one_over_sqrt_n, s1_word(rank), lane);
    }
    const int64_t at = int64_t(row) * D + 32 * blockIdx.y;
    call.a.dst[at + lane] = y;
    const float rounded[1] = {y};
    if (call.a.quantized) store_quantized(call.a.quantized + at / 32, rounded, lane);
}

// Stores what merge_kernel stores, beside a kernel for Hopper GPUs that finishes its query rows itself, on
// multiprocessors that this leaves idle. What is stored is complete, and the slots have been read, when this kernel
// starts. It must not end before the other one, for which the next kernel would not wait.
template <int D, typename Shared>
__global__ void __launch_bounds__(32 * encode_warps, std::is_same<Shared, ScalarShared>::value ? 10 : 1)
    store_kernel(const __grid_constant__ AttentionCall call, const __grid_constant__ StoredBeside stores) {
    __shared__ Shared shared;
    let_next_start();
    const int group = int(blockIdx.x) - stores.groups;
    if (group < 0) {
        encode_beside<rotated_block<D>>(stores, shared);
    } else {
        const uint32_t stored = uint32_t(group) * encode_warps + threadIdx.x / 32;
        if (stored < call.stored_rows) store_exact<D>(call.a, stored, threadIdx.x % 32);
    }
    if (blockIdx.x == gridDim.x - 1) wait_for_previous();
}

template <int D>
cudaError_t launch_store(const AttentionCall & call, const StoredBeside & stores, cudaStream_t stream) {
    const int64_t blocks = stores.groups + (call.stored_rows + encode_warps - 1) / encode_warps;
    if (blocks == 0) return cudaSuccess;
    const auto kernel = stores.groups && has_trellis(stores.stores) ? store_kernel<D, EncodeShared<rotated_block<D>>>
                                                                    : store_kernel<D, ScalarShared>;
    return launch(kernel, dim3(unsigned(blocks)), dim3(32 * encode_warps), 0, stream, call, stores);
}

template <int D>
cudaError_t launch_merge(const AttentionCall & call, const StoredBeside & stores, bool rotated, int multiprocessors,
                         cudaStream_t stream) {
    const int64_t rows = query_rows(call.a);
    if (call.all_parts > many_parts && rows * (D / 32) <= 2 * multiprocessors &&
        can_overlap(reinterpret_cast<const void *>(merge_columns_kernel<D>))) {
        const int64_t stored = (call.stored_rows + D / 32 * column_warps - 1) / (D / 32 * column_warps);
        return launch_clusters(rotated_block<D> / 32, merge_columns_kernel<D>,
                               dim3(unsigned(stores.groups + rows + stored), D / 32), dim3(32 * column_warps), 0,
                               stream, call, stores, int(rows), rotated);
    }
    const bool few = call.all_parts <= parts_at_once;
    int warps = few ? few_parts_warps : std::max(D / 32, encode_warps);
    while (parts_at_once * warps < call.all_parts && warps < most_merge_warps) warps *= 2;
    const int64_t blocks = few ? (rows + call.stored_rows + warps - 1) / warps
                                : rows + (call.stored_rows + warps - 1) / warps;
    return launch(few ? merge_few_kernel<D> : merge_kernel<D>, dim3(unsigned(stores.groups + blocks)),
                  dim3(unsigned(32 * warps)), 0, stream, call, stores, int(rows), rotated);
}

} // namespace
} // namespace cuda
} // namespace turboquant

#endif
