// What precedes the kernels of wide.cuh and hopper.cuh: the queries and the rows of an exact window as their operands, and
// which tiles of KV rows a mask shows to a query.
#include "exact.cuh"
#include "hopper.cuh"
#include "wide.h"
#include "wide.cuh"

#include <algorithm>
#include <cmath>
#include <map>
#include <utility>

namespace turboquant {
namespace cuda {
namespace {

constexpr int prepare_warps = 8; // of a thread block

// A warp rotates a query as K is, and rounds it to int8. With an exact window, or if K is not rotated, it stores the query
// as binary16, in the same unit.
template <KV TK, int D>
__device__ __forceinline__ void prepare_column(const WideCall & wide, uint32_t number, uint8_t * bytes, int lane) {
    using L = Layout<TK, D>;
    const AttentionCall & call = wide.call;
    const Attention & a = call.a;
    const AttentionPlan & p = call.plan;
    const int64_t item = number;
    const uint32_t padded = p.column_tile * p.column_tiles, head_number = number / padded;
    const int column = int(number - head_number * padded);
    const int stream = int(head_number / uint32_t(a.kv_heads)), kv_head = int(head_number) - stream * a.kv_heads;
    const bool exists = column < p.columns;
    const int token = column / p.group, head = kv_head * p.group + column - token * p.group;
    const float * row = reinterpret_cast<const float *>(reinterpret_cast<const char *>(a.q) + token * a.q_token +
                                                        head * a.q_head + stream * a.q_stream);
    float y[D / 32], plain[D / 32];
#pragma unroll
    for (int j = 0; j < D / 32; ++j) y[j] = plain[j] = exists ? row[lane + 32 * j] : 0.0f;
    if constexpr (L::turbo) {
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
    }
    uint32_t largest = 0;
#pragma unroll
    for (int j = 0; j < D / 32; ++j) largest = max(largest, __float_as_uint(y[j]) & 0x7fffffff);
    const float top = __uint_as_float(warp_max(largest)); // if it is NaN, the scores are NaN
    const bool zero = top < 1e-30f;
    const float inverse = zero ? 0.0f : 127.0f / top;
    if (lane == 0) wide.arrays.factors[item] = zero ? 1.0f : top * (a.scale * log2e / 127.0f);
    if (a.windowed || !L::turbo) {
        half * to = reinterpret_cast<half *>(wide.arrays.exact_queries) + item * D;
#pragma unroll
        for (int j = 0; j < D / 32; ++j) to[lane + 32 * j] = __float2half_rn(plain[j] * inverse);
    }
    if constexpr (L::turbo) {
#pragma unroll
        for (int j = 0; j < D / 32; ++j)
            bytes[operand_position<TK, D>(lane + 32 * j)] = uint8_t(__float2int_rn(y[j] * inverse));
        __syncwarp();
        uint32_t * to = reinterpret_cast<uint32_t *>(wide.arrays.queries + item * D);
#pragma unroll
        for (int i = lane; i < D / 4; i += 32) to[i] = reinterpret_cast<const uint32_t *>(bytes)[i];
    }
}

// A warp computes word number `item` of `all`, in the order [stream of the mask][head of the mask][token][words].
__device__ __forceinline__ void prepare_word(const MaskRows & of, SeenTiles * all, int words, int tokens, uint32_t item,
                                             int lane) {
    constexpr int parts = 4; // a lane reads eight values of each, a quarter of a tile
    constexpr uint32_t hidden = 0xfc00, both = hidden | hidden << 16;
    const uint32_t row = item / uint32_t(words), before = row / uint32_t(tokens), stream = before / uint32_t(of.heads);
    const int64_t first = int64_t(item - row * words) * seen_rows + 8 * lane;
    const uint8_t * mask = of.row(int(row - before * tokens), int(before - stream * of.heads), int(stream));
    uint32_t x[parts][4];
    if ((reinterpret_cast<uintptr_t>(mask) & 15) == 0 && first - 8 * lane + seen_rows <= of.rows) {
#pragma unroll
        for (int part = 0; part < parts; ++part) {
            const uint4 four = *reinterpret_cast<const uint4 *>(mask + 2 * (first + 256 * part));
            x[part][0] = four.x;
            x[part][1] = four.y;
            x[part][2] = four.z;
            x[part][3] = four.w;
        }
    } else {
#pragma unroll
        for (int part = 0; part < parts; ++part)
#pragma unroll
            for (int i = 0; i < 4; ++i) {
                const int64_t r = first + 256 * part + 2 * i;
                const uint32_t low = r < of.rows ? *reinterpret_cast<const uint16_t *>(mask + 2 * r) : hidden,
                               high = r + 1 < of.rows ? *reinterpret_cast<const uint16_t *>(mask + 2 * r + 2) : hidden;
                x[part][i] = low | high << 16;
            }
    }
    uint32_t bits = 0; // of each part whether a value is not hidden, then of each part whether a value is not zero
#pragma unroll
    for (int part = 0; part < parts; ++part) {
        const uint32_t(&v)[4] = x[part];
        bits |= uint32_t(((v[0] ^ both) | (v[1] ^ both) | (v[2] ^ both) | (v[3] ^ both)) != 0) << part;
        bits |= uint32_t((v[0] | v[1] | v[2] | v[3]) != 0) << (parts + part);
    }
    bits |= __shfl_xor_sync(all_lanes, bits, 1);
    bits |= __shfl_xor_sync(all_lanes, bits, 2);
    bits = __shfl_sync(all_lanes, bits, lane % 8 * 4) >> lane / 8; // each lane takes the tile with its number
    const SeenTiles seen = {__ballot_sync(all_lanes, bits & 1), __ballot_sync(all_lanes, bits >> parts & 1)};
    if (lane == 0) all[item] = seen;
}

// Lets the rows of a tile of an exact window be fetched to the L2 cache before the previous kernel has ended: it may write
// the batch's rows, but not the slots.
template <int D> __device__ __forceinline__ void prefetch_exact_tile(const WideCall & wide, int64_t item) {
    const Attention & a = wide.call.a;
    const ExactRows & x = a.exact;
    const int64_t kv = item / wide.arrays.exact_tiles;
    const ExactHead rows(a, int(kv / a.kv_heads), int(kv % a.kv_heads));
    const int lane = threadIdx.x % 32, unit = lane % 4 * 128; // bytes of a row
    const int row = int(item - kv * wide.arrays.exact_tiles) * tile_rows + threadIdx.x / 32 + lane / 8 * prepare_warps;
    if (row < rows.slots && unit < (x.type == KV::f16 ? 2 * D : D / 32 * 34))
        prefetch((lane & 4 ? rows.v + row * x.v_row : rows.k + row * x.k_row) + unit);
}

// A thread block prepares a tile of the rows of an exact window. `values` is scratch memory for the tile of V.
template <int D> __device__ __forceinline__ void prepare_exact(const WideCall & wide, int64_t item, half * values) {
    constexpr int P = D / 32, N = rotated_block<D>;
    const Attention & a = wide.call.a;
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    const int64_t kv = item / wide.arrays.exact_tiles;
    const int tile = int(item - kv * wide.arrays.exact_tiles);
    const bool hopper = wide.call.plan.hopper;
    const ExactHead rows(a, int(kv / a.kv_heads), int(kv % a.kv_heads));
    half * keys = reinterpret_cast<half *>(wide.arrays.exact_k) + item * tile_rows * D;
#pragma unroll 1
    for (int row = warp; row < tile_rows; row += prepare_warps) {
        const bool exists = tile * tile_rows + row < rows.rows;
        ExactRow<P> bytes;
        if (exists) bytes = ExactRow<P>(a.exact, rows, tile * tile_rows + row, lane);
        bool finite = true;
#pragma unroll
        for (int b = 0; b < D / N; ++b) {
            float v[N / 32];
#pragma unroll
            for (int j = 0; j < N / 32; ++j) {
                const int e = b * N / 32 + j;
                v[j] = exists ? bytes.value(bytes.v[e], bytes.scale_v[e]) : 0.0f;
            }
            if (wide.rotated_values) transform_warp<N, false>(v);
#pragma unroll
            for (int j = 0; j < N / 32; ++j) {
                const float x = v[j] * (1 / wide.value_unit);
                const bool fits = fabsf(x) < 65504.0f;
                finite = finite && fits;
                const int element = b * N + lane + 32 * j;
                values[hopper ? ExactPlace::value(row, element) : element * tile_rows + value_position(row)] =
                    __float2half_rn(fits ? x : 0.0f);
            }
        }
        // A hidden weight is zero, but its product with a value that is not finite would be NaN. As in WideRows::expand,
        // such a row has a score that is NaN instead.
        finite = __all_sync(all_lanes, finite);
#pragma unroll
        for (int j = 0; j < P; ++j) {
            const float k = exists ? bytes.value(bytes.k[j], bytes.scale_k[j]) : 0.0f;
            keys[hopper ? ExactPlace::key(row, lane + 32 * j) : row * D + lane + 32 * j] =
                __float2half_rn(finite ? k : __uint_as_float(0x7fc00000));
        }
    }
    __syncthreads();
    uint4 * to = reinterpret_cast<uint4 *>(wide.arrays.exact_v) + item * (D * tile_rows / 8);
    for (int i = threadIdx.x; i < D * tile_rows / 8; i += 32 * prepare_warps)
        to[i] = reinterpret_cast<const uint4 *>(values)[i];
}

// What prepare_kernel does: a warp has a column or a word, or a thread block has a tile of exact rows.
struct Items {
    int64_t columns, words, exact_words, exact_tiles;
    int64_t blocks_of_warps() const { return (columns + words + exact_words + prepare_warps - 1) / prepare_warps; }
};

template <KV TK, int D>
__global__ void __launch_bounds__(32 * prepare_warps, D > 128 ? 3 : 4)
    prepare_kernel(const __grid_constant__ WideCall wide, const Items items, int64_t exact_at) {
    __shared__ __align__(16) uint8_t bytes[D * tile_rows * sizeof(half)];
    const Attention & a = wide.call.a;
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    let_next_start();
    if (blockIdx.x >= exact_at) prefetch_exact_tile<D>(wide, blockIdx.x - exact_at);
    wait_for_previous();
    if (blockIdx.x >= exact_at) {
        prepare_exact<D>(wide, blockIdx.x - exact_at, reinterpret_cast<half *>(bytes));
        return;
    }
    int64_t item = int64_t(blockIdx.x) * prepare_warps + warp;
    if (item < items.columns) {
        prepare_column<TK, D>(wide, uint32_t(item), bytes + warp * D, lane);
        return;
    }
    item -= items.columns;
    if (item < items.words)
        prepare_word(MaskRows(a), wide.arrays.seen, wide.arrays.words, a.tokens, uint32_t(item), lane);
    else if (item - items.words < items.exact_words)
        prepare_word(MaskRows(a.exact, a.tokens), wide.arrays.exact_seen, wide.arrays.exact_words, a.tokens,
                     uint32_t(item - items.words), lane);
}

template <int D> cudaError_t launch_prepare(const WideCall & wide, cudaStream_t stream) {
    const Attention & a = wide.call.a;
    const AttentionPlan & p = wide.call.plan;
    Items items = {};
    items.columns = int64_t(a.streams) * a.kv_heads * p.column_tile * p.column_tiles;
    if (a.mask) items.words = int64_t(a.mask_streams) * a.mask_heads * a.tokens * wide.arrays.words;
    if (a.windowed) {
        items.exact_words = int64_t(a.exact.mask_streams) * a.exact.mask_heads * a.tokens * wide.arrays.exact_words;
        items.exact_tiles = int64_t(a.kv_streams) * a.kv_heads * wide.arrays.exact_tiles;
    }
    const int64_t exact_at = items.blocks_of_warps();
    const dim3 blocks(unsigned(exact_at + items.exact_tiles));
    switch (a.type_k) {
#define TURBOQUANT_CASE(name)                                                                                             \
    case KV::name:                                                                                                        \
        if constexpr (Kind<KV::name>::covered)                                                   \
            return launch(prepare_kernel<KV::name, D>, blocks, dim3(32 * prepare_warps), 0, stream, wide, items, exact_at); \
        break;
        TURBOQUANT_KV(TURBOQUANT_CASE)
#undef TURBOQUANT_CASE
    }
    return cudaErrorNotSupported;
}

// The kernel for Hopper GPUs, or nullptr if the current device has no code for it. The kernel is empty in code for other
// GPUs, which shows in its shared memory.
WideKernel hopper_kernel_of(int device, KV type_k, KV type_v, int columns) {
    const WideKernel kernel = hopper_kernel_128(type_k, type_v, groups_for(columns));
    if (!kernel) return nullptr;
    static thread_local std::map<std::pair<WideKernel, int>, bool> known; // the GPUs of a machine may differ
    const auto found = known.find({kernel, device});
    if (found != known.end()) return found->second ? kernel : nullptr;
    cudaFuncAttributes attributes;
    const cudaError_t error = cudaFuncGetAttributes(&attributes, reinterpret_cast<const void *>(kernel));
    if (error != cudaSuccess) cudaGetLastError(); // so that the caller does not find this error
    const bool exists = error == cudaSuccess && attributes.sharedSizeBytes > 0;
    known.emplace(std::make_pair(kernel, device), exists);
    return exists ? kernel : nullptr;
}

constexpr int least_hopper_columns = 17; // with fewer columns, the kernel of wide.cuh has more thread blocks

int words_of(int64_t rows) { return int((rows + seen_rows - 1) / seen_rows); }
int64_t exact_rows(const Attention & a) { return a.exact.slots + a.tokens; }
int exact_tiles_of(const Attention & a) { return int((exact_rows(a) + tile_rows - 1) / tile_rows); }

// Bytes of the exact rows of K or of V, and of all arrays of an exact window but the queries.
size_t exact_side_bytes(const Attention & a) {
    return size_t(a.kv_streams) * size_t(a.kv_heads) * size_t(exact_tiles_of(a)) * tile_rows * size_t(a.head) * sizeof(half);
}
size_t exact_bytes(const Attention & a) {
    const size_t mask_rows = size_t(a.exact.mask_streams) * size_t(a.exact.mask_heads) * size_t(a.tokens);
    return 2 * exact_side_bytes(a) + mask_rows * size_t(words_of(exact_rows(a))) * sizeof(SeenTiles);
}

// What plans and launches need of types that are known only at run time.
struct WideTypes {
    bool turbo_k, turbo_v;
    float value_unit;
};
WideTypes types_of(KV type_k, KV type_v) {
    WideTypes types = {};
#define TURBOQUANT_CASE(name)                                    \
    if (type_k == KV::name) types.turbo_k = Kind<KV::name>::turbo; \
    if (type_v == KV::name) {                                    \
        types.turbo_v = Kind<KV::name>::turbo;                   \
        types.value_unit = value_unit<KV::name>;                 \
    }
    TURBOQUANT_KV(TURBOQUANT_CASE)
#undef TURBOQUANT_CASE
    return types;
}

// The functions that are compiled for a head size.
struct WideHead {
    int size;
    WideKernel (*kernel)(KV type_k, KV type_v, int operands);
    cudaError_t (*prepare)(const WideCall & wide, cudaStream_t stream);
};
const WideHead heads[] = {
#define TURBOQUANT_HEAD(D) {D, wide_kernel_##D, launch_prepare<D>},
    TURBOQUANT_KV_HEADS(TURBOQUANT_HEAD)
#undef TURBOQUANT_HEAD
};
const WideHead * head_of(int size) {
    for (const WideHead & head : heads)
        if (head.size == size) return &head;
    return nullptr;
}

} // namespace

bool plan_wide(const Attention & a, const WideDevice & device, int pitch_k, int pitch_v, AttentionPlan & p) {
    const WideHead * head = head_of(a.head);
    const WideTypes types = types_of(a.type_k, a.type_v);
    if (!head || !head->kernel(a.type_k, a.type_v, 1)) return false;
    p.wide = true;
    p.pitch_k = pitch_k;
    p.pitch_v = pitch_v;
    p.block_heads = 1;
    p.head_groups = a.kv_heads;
    p.stages = 2;
    p.hopper = a.head == 128 && p.columns >= least_hopper_columns &&
               hopper_kernel_of(p.device, a.type_k, a.type_v, p.columns);
    const int most = most_operands(types.turbo_k, types.turbo_v, a.head);
    p.operands = p.columns <= 4 * wide_columns ? 1 : most; // two use the rows better, one has more blocks at a time
    int resident = wide_resident_blocks(p.operands, most);
    const int warp_columns = p.operands * wide_columns;
    int column_warps = 1;
    while (column_warps < wide_warps && column_warps * warp_columns < p.columns) column_warps *= 2;
    if (p.hopper) { // tiles have the same number of warpgroups, so their thread blocks take the same time
        const int groups = (p.columns + group_columns - 1) / group_columns, most = groups_for(p.columns),
                  tiles = (groups + most - 1) / most;
        p.column_tile = (groups + tiles - 1) / tiles * group_columns;
    } else {
        p.column_tile = column_warps * warp_columns;
    }
    p.column_tiles = (p.columns + p.column_tile - 1) / p.column_tile;
    const int64_t beside = int64_t(a.kv_heads) * p.column_tiles;
    if (beside > 65535) return false;

    constexpr int most_words = 128; // of SeenTiles, in shared memory
    const auto bytes = [&](int rows) {
        if (p.hopper)
            return (groups_for(p.columns) == DivisionOfFew::groups ? HopperMemory<128, DivisionOfFew>::bytes
                                                                   : HopperMemory<128, DivisionOfMany>::bytes)(
                rows * (pitch_k + pitch_v), most_words);
        const int key_blocks = types.turbo_k ? std::max(a.head / 128, 1) : 1;
        const int expanded = rows * (wide_key_bytes(types.turbo_k, a.head) + 2 * a.head + key_blocks * int(sizeof(float2)));
        const int encoded = rows * (pitch_k + pitch_v);
        const int seen = (most_words + 1) * int(sizeof(uint32_t)) + most_words * column_warps * int(sizeof(SeenTiles));
        return wide_alignment + 2 * (expanded + encoded) + seen;
    };
    constexpr int reserved = 1024; // bytes that CUDA takes for each thread block
    if (p.hopper) resident = 1;
    p.step_rows = p.hopper ? hopper_rows : 4 * tile_rows / resident;
    while (!p.hopper && p.step_rows > tile_rows && bytes(p.step_rows) > device.shared_per_block) p.step_rows /= 2;
    if (resident * (bytes(p.step_rows) + reserved) > device.shared_per_multiprocessor) resident = 1;
    if (p.hopper) p.row_tiles = p.columns <= group_columns ? groups_for(p.columns) : 1;
    else p.row_tiles = std::min(wide_warps / column_warps, p.step_rows / tile_rows);
    // At the end the memory of the rows takes what half of the row groups have, WideColumns::Exchange.
    const int exchange = p.operands * 32 * (a.head / 8 * int(sizeof(float4)) + 2 * int(sizeof(float2)));
    p.shared_bytes = std::max(bytes(p.step_rows), wide_alignment + p.row_tiles / 2 * column_warps * exchange);
    if (p.shared_bytes > device.shared_per_block) return false;

    // The number of chunks for which the busiest multiprocessor has the least to do. A chunk costs as much as some rows.
    const int64_t steps = (a.n_kv + p.step_rows - 1) / p.step_rows, blocks = beside * a.streams;
    const int64_t all_steps = steps + (a.windowed ? exact_tiles_of(a) * tile_rows / p.step_rows : 0);
    const int64_t least = (steps * p.step_rows + (most_words - 1) * seen_rows - 1) / ((most_words - 1) * seen_rows);
    const int64_t at_once = int64_t(device.multiprocessors) * resident, most_chunks = std::max(least, std::min(steps, 2 * at_once));
    const int64_t overhead = 16 * tile_rows / p.step_rows; // of a thread block, in steps
    int64_t chosen = least, cost = INT64_MAX, waves = (least * blocks + at_once - 1) / at_once;
    for (int more = 0; more < 8 && chosen < most_chunks; ++more, ++waves) {
        const int64_t chunks = std::min(std::max(at_once * waves / blocks, least), most_chunks);
        const int64_t here = waves * ((all_steps + chunks - 1) / chunks + overhead);
        if (here < cost) {
            cost = here;
            chosen = chunks;
        }
    }
    p.chunk_rows = (steps + chosen - 1) / chosen * p.step_rows;
    p.chunks = int((a.n_kv + p.chunk_rows - 1) / p.chunk_rows);
    p.parts = p.chunks;
    p.merged = true;

    const auto after = [](size_t end) { return (end + 15) / 16 * 16; };
    const size_t columns = size_t(a.streams) * size_t(beside) * size_t(p.column_tile);
    const size_t parts = size_t(a.streams) * size_t(a.tokens) * size_t(a.heads) * size_t(p.parts);
    p.states_at = parts * size_t(a.head) * sizeof(float);
    p.queries_at = after(p.states_at + parts * sizeof(SoftmaxState));
    p.factors_at = p.queries_at + columns * size_t(a.head);
    p.seen_at = after(p.factors_at + columns * sizeof(float));
    const size_t mask_rows = a.mask ? size_t(a.mask_streams) * size_t(a.mask_heads) * size_t(a.tokens) : 0;
    p.exact_at = after(p.seen_at + mask_rows * size_t(words_of(a.n_kv)) * sizeof(SeenTiles));
    p.exact_rows_at = p.exact_at + (a.windowed || !types.turbo_k ? columns * size_t(a.head) * sizeof(half) : 0);
    p.workspace_bytes = p.exact_rows_at + (a.windowed ? exact_bytes(a) : 0);
    return p.workspace_bytes >> 34 == 0; // prepare_kernel numbers words of eight bytes in 32 bits
}

cudaError_t launch_wide(const AttentionCall & call, void * workspace, cudaStream_t stream) {
    const Attention & a = call.a;
    const AttentionPlan & p = call.plan;
    char * bytes = static_cast<char *>(workspace);
    WideCall wide = {};
    wide.call = call;
    const WideTypes types = types_of(a.type_k, a.type_v);
    wide.value_unit = types.value_unit;
    wide.rotated_values = types.turbo_v;
    wide.least_weight = lowered_by + std::log2(a.sparse_v);
    wide.arrays.queries = reinterpret_cast<int8_t *>(bytes + p.queries_at);
    wide.arrays.factors = reinterpret_cast<float *>(bytes + p.factors_at);
    wide.arrays.seen = reinterpret_cast<SeenTiles *>(bytes + p.seen_at);
    wide.arrays.words = words_of(a.n_kv);
    wide.arrays.exact_queries = reinterpret_cast<uint16_t *>(bytes + p.exact_at);
    if (a.windowed) {
        const size_t side = exact_side_bytes(a);
        wide.arrays.exact_k = reinterpret_cast<uint16_t *>(bytes + p.exact_rows_at);
        wide.arrays.exact_v = reinterpret_cast<uint16_t *>(bytes + p.exact_rows_at + side);
        wide.arrays.exact_seen = reinterpret_cast<SeenTiles *>(bytes + p.exact_rows_at + 2 * side);
        wide.arrays.exact_words = words_of(exact_rows(a));
        wide.arrays.exact_tiles = exact_tiles_of(a);
    }
    const WideHead & head = *head_of(a.head);
    const WideKernel kernel = p.hopper ? hopper_kernel_of(p.device, a.type_k, a.type_v, p.columns)
                                       : head.kernel(a.type_k, a.type_v, p.operands);
    cudaError_t error = allow_shared(reinterpret_cast<const void *>(kernel), p.device, p.shared_bytes);
    if (error == cudaSuccess) error = head.prepare(wide, stream);
    if (error != cudaSuccess) return error;
    const dim3 grid(unsigned(p.chunks), unsigned(a.kv_heads * p.column_tiles), unsigned(a.streams));
    return launch(kernel, grid, dim3(p.hopper ? hopper_threads : 32 * wide_warps), size_t(p.shared_bytes), stream, wide);
}

} // namespace cuda
} // namespace turboquant
