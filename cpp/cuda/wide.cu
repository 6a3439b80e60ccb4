// What precedes the kernel of wide.cuh: the queries as its operands, and which tiles of KV rows a mask shows to a query.
#include "hopper.cuh"
#include "wide.h"
#include "wide.cuh"

#include <algorithm>
#include <map>
#include <utility>

namespace turboquant {
namespace cuda {
namespace {

constexpr int prepare_warps = 4; // of a thread block

// A warp rotates a query as K is, and rounds it to int8.
template <KV TK, int D>
__device__ __forceinline__ void prepare_column(const WideCall & wide, int64_t item, uint8_t * bytes, int lane) {
    using L = Layout<TK, D>;
    const AttentionCall & call = wide.call;
    const Attention & a = call.a;
    const AttentionPlan & p = call.plan;
    const int padded = p.column_tile * p.column_tiles, column = int(item % padded);
    const int kv_head = int(item / padded % a.kv_heads), stream = int(item / padded / a.kv_heads);
    const bool exists = column < p.columns;
    const int token = column / p.group, head = kv_head * p.group + column - token * p.group;
    const float * row = reinterpret_cast<const float *>(reinterpret_cast<const char *>(a.q) + token * a.q_token +
                                                        head * a.q_head + stream * a.q_stream);
    float y[D / 32];
#pragma unroll
    for (int j = 0; j < D / 32; ++j) y[j] = exists ? row[lane + 32 * j] : 0.0f;
    constexpr int B = L::block / 32;
#pragma unroll
    for (int b = 0; b < D / L::block; ++b) {
        float part[B];
#pragma unroll
        for (int j = 0; j < B; ++j) part[j] = y[b * B + j];
        transform_warp<L::block, false>(part);
#pragma unroll
        for (int j = 0; j < B; ++j) y[b * B + j] = part[j];
    }
    uint32_t largest = 0;
#pragma unroll
    for (int j = 0; j < D / 32; ++j) largest = max(largest, __float_as_uint(y[j]) & 0x7fffffff);
    const float top = __uint_as_float(warp_max(largest)); // if it is NaN, the scores are NaN
    const bool zero = top < 1e-30f;
    const float inverse = zero ? 0.0f : 127.0f / top;
    int sum = 0;
#pragma unroll
    for (int j = 0; j < D / 32; ++j) {
        const int x = __float2int_rn(y[j] * inverse);
        sum += x;
        bytes[operand_position<TK, D>(lane + 32 * j)] = uint8_t(x);
    }
    sum = warp_sum(sum);
    if (lane == 0)
        wide.arrays.factors[item] = {zero ? 1.0f : top * (a.scale * log2e / 127.0f), magic_bits - (L::biased ? 128 * sum : 0)};
    __syncwarp();
    uint32_t * to = reinterpret_cast<uint32_t *>(wide.arrays.queries + item * D);
#pragma unroll
    for (int i = lane; i < D / 4; i += 32) to[i] = reinterpret_cast<const uint32_t *>(bytes)[i];
}

// A warp computes a word of SeenTiles.
__device__ __forceinline__ void prepare_word(const WideCall & wide, int64_t item, int lane) {
    const Attention & a = wide.call.a;
    const int64_t row = item / wide.arrays.words, first = (item - row * wide.arrays.words) * seen_rows;
    const int token = int(row % a.tokens), head = int(row / a.tokens % a.mask_heads),
              stream = int(row / a.tokens / a.mask_heads);
    const char * mask = static_cast<const char *>(a.mask) + token * a.mask_token + head * a.mask_head + stream * a.mask_stream;
    constexpr uint32_t hidden = 0xfc00;
    SeenTiles seen = {0, 0};
    const bool aligned = (reinterpret_cast<uintptr_t>(mask) & 15) == 0;
#pragma unroll 1
    for (int part = 0; part < 4; ++part) { // a lane reads eight values, a quarter of a tile
        const int64_t at = first + 256 * part + 8 * lane;
        uint32_t x[4];
        if (aligned && at + 8 <= a.n_kv) {
            const uint4 four = *reinterpret_cast<const uint4 *>(mask + 2 * at);
            x[0] = four.x;
            x[1] = four.y;
            x[2] = four.z;
            x[3] = four.w;
        } else {
#pragma unroll
            for (int i = 0; i < 4; ++i) {
                x[i] = 0;
#pragma unroll
                for (int h = 1; h >= 0; --h) {
                    const int64_t r = at + 2 * i + h;
                    x[i] = x[i] << 16 | (r < a.n_kv ? *reinterpret_cast<const uint16_t *>(mask + 2 * r) : hidden);
                }
            }
        }
        constexpr uint32_t both = hidden | hidden << 16;
        const bool some = x[0] != both || x[1] != both || x[2] != both || x[3] != both;
        const bool mixed = (x[0] | x[1] | x[2] | x[3]) != 0;
        const uint32_t some_lanes = __ballot_sync(all_lanes, some), mixed_lanes = __ballot_sync(all_lanes, mixed);
#pragma unroll
        for (int i = 0; i < 8; ++i) { // four lanes have a tile
            seen.some |= uint32_t((some_lanes >> 4 * i & 15) != 0) << (8 * part + i);
            seen.mixed |= uint32_t((mixed_lanes >> 4 * i & 15) != 0) << (8 * part + i);
        }
    }
    if (lane == 0) wide.arrays.seen[item] = seen;
}

template <KV TK, int D>
__global__ void __launch_bounds__(32 * prepare_warps)
    prepare_kernel(const __grid_constant__ WideCall wide, int64_t columns, int64_t words) {
    __shared__ __align__(16) uint8_t bytes[prepare_warps][D];
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    let_next_start();
    wait_for_previous();
    const int64_t item = int64_t(blockIdx.x) * prepare_warps + warp;
    if (item < columns) prepare_column<TK, D>(wide, item, bytes[warp], lane);
    else if (item < columns + words) prepare_word(wide, item - columns, lane);
}

template <int D> cudaError_t launch_prepare(const WideCall & wide, cudaStream_t stream) {
    const Attention & a = wide.call.a;
    const AttentionPlan & p = wide.call.plan;
    const int64_t columns = int64_t(a.streams) * a.kv_heads * p.column_tile * p.column_tiles;
    const int64_t words = a.mask ? int64_t(a.mask_streams) * a.mask_heads * a.tokens * wide.arrays.words : 0;
    const dim3 blocks(unsigned((columns + words + prepare_warps - 1) / prepare_warps));
    switch (a.type_k) {
#define TURBOQUANT_CASE(name)                                                                                             \
    case KV::name:                                                                                                        \
        if constexpr (Kind<KV::name>::turbo && Kind<KV::name>::covered)                                                   \
            return launch(prepare_kernel<KV::name, D>, blocks, dim3(32 * prepare_warps), 0, stream, wide, columns, words); \
        break;
        TURBOQUANT_KV(TURBOQUANT_CASE)
#undef TURBOQUANT_CASE
    }
    return cudaErrorNotSupported;
}

// The kernel for Hopper GPUs, or nullptr if the current device has no code for it.
WideKernel hopper_kernel_of(int device, KV type_k, KV type_v) {
#ifdef TURBOQUANT_HOPPER
    const WideKernel kernel = hopper_kernel_128(type_k, type_v);
    if (!kernel) return nullptr;
    static thread_local std::map<std::pair<WideKernel, int>, bool> known; // the GPUs of a machine may differ
    const auto found = known.find({kernel, device});
    if (found != known.end()) return found->second ? kernel : nullptr;
    cudaFuncAttributes attributes;
    const bool exists = cudaFuncGetAttributes(&attributes, reinterpret_cast<const void *>(kernel)) == cudaSuccess;
    if (!exists) cudaGetLastError(); // so that the caller does not find this error
    known.emplace(std::make_pair(kernel, device), exists);
    return exists ? kernel : nullptr;
#else
    return nullptr;
#endif
}

constexpr int least_hopper_columns = 128; // with fewer columns, the kernel of wide.cuh has more thread blocks

} // namespace

bool plan_wide(const Attention & a, const WideDevice & device, int pitch_k, int pitch_v, AttentionPlan & p) {
    if (a.head != 128 || a.windowed || !wide_kernel_128(a.type_k, a.type_v, 1)) return false;
    p.wide = true;
    p.pitch_k = pitch_k;
    p.pitch_v = pitch_v;
    p.block_heads = 1;
    p.head_groups = a.kv_heads;
    p.stages = 2;
    p.hopper = p.columns >= least_hopper_columns && hopper_kernel_of(p.device, a.type_k, a.type_v);
    p.operands = p.columns <= 2 * wide_columns ? 1 : 2;
    const int warp_columns = p.operands * wide_columns;
    int column_warps = 1;
    while (column_warps < wide_warps && column_warps * warp_columns < p.columns) column_warps *= 2;
    p.column_tile = p.hopper ? hopper_columns : column_warps * warp_columns;
    p.column_tiles = (p.columns + p.column_tile - 1) / p.column_tile;
    const int64_t beside = int64_t(a.kv_heads) * p.column_tiles;
    if (beside > 65535) return false;

    constexpr int most_words = 128; // of SeenTiles, in shared memory
    const auto bytes = [&](int rows) {
        if (p.hopper) return HopperMemory<128>::bytes(rows * (pitch_k + pitch_v), most_words);
        const int expanded = rows * (3 * a.head + int(sizeof(float2))), encoded = rows * (pitch_k + pitch_v);
        const int seen = (most_words + 1) * int(sizeof(uint32_t)) + most_words * column_warps * int(sizeof(SeenTiles));
        return wide_alignment + 2 * (expanded + encoded) + seen;
    };
    p.step_rows = p.hopper ? hopper_rows : 4 * tile_rows;
    if (!p.hopper && bytes(p.step_rows) > device.shared_per_block) p.step_rows /= 2;
    p.shared_bytes = bytes(p.step_rows);
    if (p.shared_bytes > device.shared_per_block) return false;
    p.row_tiles = p.hopper ? 1 : std::min(wide_warps / column_warps, p.step_rows / tile_rows);

    // The number of chunks for which the busiest multiprocessor has the least to do. A chunk costs as much as some rows.
    const int64_t steps = (a.n_kv + p.step_rows - 1) / p.step_rows, blocks = beside * a.streams;
    const int64_t least = (steps * p.step_rows + (most_words - 1) * seen_rows - 1) / ((most_words - 1) * seen_rows);
    int64_t chosen = least, cost = INT64_MAX;
    for (int64_t chunks = least; chunks <= std::max(least, std::min<int64_t>(steps, 2 * device.multiprocessors)); ++chunks) {
        const int64_t overhead = 4 * 4 * tile_rows / p.step_rows; // of a thread block, in steps
        const int64_t waves = (blocks * chunks + device.multiprocessors - 1) / device.multiprocessors;
        const int64_t here = waves * ((steps + chunks - 1) / chunks + overhead);
        if (here < cost) {
            cost = here;
            chosen = chunks;
        }
    }
    p.chunk_rows = (steps + chosen - 1) / chosen * p.step_rows;
    p.chunks = int((a.n_kv + p.chunk_rows - 1) / p.chunk_rows);
    p.parts = p.chunks * p.row_tiles;
    p.merged = true;

    const auto after = [](size_t end) { return (end + 15) / 16 * 16; };
    const size_t columns = size_t(a.streams) * size_t(beside) * size_t(p.column_tile);
    const size_t parts = size_t(a.streams) * size_t(a.tokens) * size_t(a.heads) * size_t(p.parts);
    p.states_at = parts * size_t(a.head) * sizeof(float);
    p.queries_at = after(p.states_at + parts * sizeof(SoftmaxState));
    p.factors_at = p.queries_at + columns * size_t(a.head);
    p.seen_at = after(p.factors_at + columns * sizeof(QueryFactor));
    const size_t mask_rows = a.mask ? size_t(a.mask_streams) * size_t(a.mask_heads) * size_t(a.tokens) : 0;
    p.workspace_bytes = p.seen_at + mask_rows * size_t((a.n_kv + seen_rows - 1) / seen_rows) * sizeof(SeenTiles);
    return true;
}

cudaError_t launch_wide(const AttentionCall & call, void * workspace, cudaStream_t stream) {
    const Attention & a = call.a;
    const AttentionPlan & p = call.plan;
    char * bytes = static_cast<char *>(workspace);
    WideCall wide;
    wide.call = call;
    wide.arrays.queries = reinterpret_cast<int8_t *>(bytes + p.queries_at);
    wide.arrays.factors = reinterpret_cast<QueryFactor *>(bytes + p.factors_at);
    wide.arrays.seen = reinterpret_cast<SeenTiles *>(bytes + p.seen_at);
    wide.arrays.words = int((a.n_kv + seen_rows - 1) / seen_rows);
    const WideKernel kernel = p.hopper ? hopper_kernel_of(p.device, a.type_k, a.type_v)
                                       : wide_kernel_128(a.type_k, a.type_v, p.operands);
    cudaError_t error = allow_shared(reinterpret_cast<const void *>(kernel), p.device, p.shared_bytes);
    if (error == cudaSuccess) error = launch_prepare<128>(wide, stream);
    if (error != cudaSuccess) return error;
    const dim3 grid(unsigned(p.chunks), unsigned(a.kv_heads * p.column_tiles), unsigned(a.streams));
    return launch(kernel, grid, dim3(p.hopper ? hopper_threads : 32 * wide_warps), size_t(p.shared_bytes), stream, wide);
}

} // namespace cuda
} // namespace turboquant
