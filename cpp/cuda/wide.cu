// What precedes the kernels of wide.cuh, hopper.cuh and direct.cuh: the queries and the rows of an exact window as
// their operands, and which tiles of KV rows a mask shows to a query.
#include "direct.cuh"
#include "exact.cuh"
#include "hopper.cuh"
#include "hopper_direct.cuh"
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

// A warp rotates a query as K is, and rounds it to int8. With an exact window, or if K is not rotated, it stores the
// query as binary16, in the same unit.
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
    if constexpr (L::turbo) transform_blocks<D>(y);
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
    constexpr uint32_t hidden = minus_infinity, both = two_infinities;
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

// A thread block prepares some of the rows of a tile of an exact window, one with each warp, so that no row waits for
// another one. They are those whose values are adjacent in the order of value_position.
constexpr int exact_units = tile_rows / prepare_warps; // of a tile
__device__ __forceinline__ int row_of_unit(int unit, int i) { return i / 2 * 8 + unit * 2 + i % 2; }

// The values of such rows in shared memory, [element][row]. Those that a warp writes at a time are in eight banks.
template <int D> struct PreparedUnit {
    half values[D * prepare_warps];
    static __device__ __forceinline__ int at(int element) {
        constexpr int P = D / 32; // elements of a lane
        return (element ^ (element / 8 & (P - 1))) * prepare_warps;
    }
};

// The previous kernel may write the batch's rows, but no slots, so these are prepared before it has ended.
template <int D>
__device__ __forceinline__ void prepare_exact(const WideCall & wide, int64_t item, PreparedUnit<D> & prepared) {
    constexpr int P = D / 32;
    static_assert(has_runs<D>, "a lane has adjacent elements");
    const Attention & a = wide.call.a;
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    const int64_t number = item / exact_units, kv = number / wide.arrays.exact_tiles; // number: of the tile
    const int unit = int(item - number * exact_units), tile = int(number - kv * wide.arrays.exact_tiles);
    const bool hopper = wide.call.plan.hopper; // of heads of 128
    const ExactHead rows(a, int(kv / a.kv_heads), int(kv % a.kv_heads));
    const bool early = tile * tile_rows + row_of_unit(unit, prepare_warps - 1) < rows.slots;
    if (!early) wait_for_previous();
    const int in_tile = row_of_unit(unit, warp), row = tile * tile_rows + in_tile;
    float k[P] = {}, v[P] = {};
    if (row < rows.rows) { // few of the tile with the batch exist
        const ExactRow<D> bytes(a.exact, rows, row, lane);
        bytes.values(bytes.k, bytes.scale_k, k);
        bytes.values(bytes.v, bytes.scale_v, v);
        if (wide.rotated_values) transform_adjacent<rotated_block<D>>(v);
    }
    bool finite = true;
#pragma unroll
    for (int j = 0; j < P; ++j) {
        v[j] *= 1 / wide.value_unit;
        const bool fits = fabsf(v[j]) < 65504.0f;
        finite = finite && fits;
        if (!fits) v[j] = 0;
    }
    // A hidden weight is zero, but its product with a value that is not finite would be NaN. As in WideRows::expand,
    // such a row has a score that is NaN instead.
    finite = __all_sync(all_lanes, finite);
    const float nan = __uint_as_float(0x7fc00000);
    if (early) wait_for_previous(); // it may still use the memory of the arrays
    half *keys = reinterpret_cast<half *>(wide.arrays.exact_k) + number * (D * tile_rows),
         *values = reinterpret_cast<half *>(wide.arrays.exact_v) + number * (D * tile_rows);
#pragma unroll
    for (int j = 0; j < P; j += 2) { // pairs are adjacent in ExactPlace
        const int element = P * lane + j;
        *reinterpret_cast<half2 *>(keys + (hopper ? ExactPlace::key(in_tile, element) : in_tile * D + element)) =
            __floats2half2_rn(finite ? k[j] : nan, finite ? k[j + 1] : nan);
        const half2 pair = __floats2half2_rn(v[j], v[j + 1]);
        if (hopper) {
            *reinterpret_cast<half2 *>(values + ExactPlace::value(in_tile, element)) = pair;
        } else {
            prepared.values[prepared.at(element) + warp] = pair.x;
            prepared.values[prepared.at(element + 1) + warp] = pair.y;
        }
    }
    if (hopper) return;
    __syncthreads();
    for (int e = threadIdx.x; e < D; e += 32 * prepare_warps)
        reinterpret_cast<uint4 *>(values)[e * exact_units + unit] =
            *reinterpret_cast<const uint4 *>(prepared.values + prepared.at(e));
}

// What prepare_kernel does: a warp has a column or a word, or a thread block has a unit of exact rows.
struct Items {
    int64_t columns, words, exact_words, exact_units;
    int64_t blocks_of_warps() const { return (columns + words + exact_words + prepare_warps - 1) / prepare_warps; }
};

template <KV TK, int D>
__global__ void __launch_bounds__(32 * prepare_warps, D > 128 ? 3 : 4)
    prepare_kernel(const __grid_constant__ WideCall wide, const Items items, int64_t exact_at) {
    __shared__ __align__(16) uint8_t bytes[sizeof(PreparedUnit<D>)];
    static_assert(sizeof(PreparedUnit<D>) >= prepare_warps * D, "a warp has a column in this memory");
    const Attention & a = wide.call.a;
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    let_next_start();
    if (blockIdx.x >= exact_at) {
        prepare_exact<D>(wide, blockIdx.x - exact_at, *reinterpret_cast<PreparedUnit<D> *>(bytes));
        return;
    }
    wait_for_previous();
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

int words_of(int64_t rows) { return int((rows + seen_rows - 1) / seen_rows); }
int64_t exact_rows(const Attention & a) { return a.exact.slots + a.tokens; }

// Words of all rows of the masks, of the cache and of an exact window.
int64_t all_words(const Attention & a) {
    return a.mask ? int64_t(a.mask_streams) * a.mask_heads * a.tokens * words_of(a.n_kv) : 0;
}
int64_t all_exact_words(const Attention & a) {
    return a.windowed ? int64_t(a.exact.mask_streams) * a.exact.mask_heads * a.tokens * words_of(exact_rows(a)) : 0;
}

// notes_written: whether there are words already.
template <int D> cudaError_t launch_prepare(const WideCall & wide, bool notes_written, cudaStream_t stream) {
    const Attention & a = wide.call.a;
    const AttentionPlan & p = wide.call.plan;
    Items items = {};
    items.columns = int64_t(a.streams) * a.kv_heads * p.column_tile * p.column_tiles;
    if (!notes_written) {
        items.words = all_words(a);
        items.exact_words = all_exact_words(a);
    }
    if (a.windowed) items.exact_units = int64_t(a.kv_streams) * a.kv_heads * wide.arrays.exact_tiles * exact_units;
    const int64_t exact_at = items.blocks_of_warps();
    const dim3 blocks(unsigned(exact_at + items.exact_units)), threads(32 * prepare_warps);
    switch (a.type_k) {
#define TURBOQUANT_CASE(name)                                                                                    \
    case KV::name:                                                                                               \
        if constexpr (Kind<KV::name>::covered)                                                                   \
            return launch(prepare_kernel<KV::name, D>, blocks, threads, 0, stream, wide, items, exact_at);       \
        break;
        TURBOQUANT_KV(TURBOQUANT_CASE)
#undef TURBOQUANT_CASE
    }
    return cudaErrorNotSupported;
}

// A kernel for Hopper GPUs, or nullptr if the device has no code for it. Such a kernel is empty in code for other GPUs,
// which shows in its shared memory.
WideKernel code_for(int device, WideKernel kernel) {
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

// Columns from which on the kernel for Hopper GPUs is faster than that of wide.cuh. Measured on an H200 (32 query
// heads, 8 KV heads of 128, turbo4, 32768 rows, microseconds of a layer, with this kernel / with that of wide.cuh): 8
// tokens, which are 32 columns, take 47/61, 16 tokens 52/79, 64 tokens 96/154. Calls of fewer than 17 columns have not
// been compared.
constexpr int least_hopper_columns = 17;

int exact_tiles_of(const Attention & a) { return int((exact_rows(a) + tile_rows - 1) / tile_rows); }

// Bytes of the exact rows of K or of V.
size_t exact_side_bytes(const Attention & a) {
    return size_t(a.kv_streams) * size_t(a.kv_heads) * size_t(exact_tiles_of(a)) * tile_rows * size_t(a.head) *
           sizeof(half);
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
    cudaError_t (*prepare)(const WideCall & wide, bool notes_written, cudaStream_t stream);
};
const WideHead heads[] = {
#define TURBOQUANT_HEAD(D) {D, wide_kernel_##D, launch_prepare<D>},
    TURBOQUANT_WIDE_HEADS(TURBOQUANT_HEAD)
#undef TURBOQUANT_HEAD
};
const WideHead * head_of(int size) {
    for (const WideHead & head : heads)
        if (head.size == size) return &head;
    return nullptr;
}

// Adds the arrays of the prepared queries to the workspace. The plan has its columns and its parts. False if the arrays
// are too large.
bool plan_arrays(const Attention & a, AttentionPlan & p) {
    const WideTypes types = types_of(a.type_k, a.type_v);
    const auto after = [](size_t end) { return (end + 15) / 16 * 16; };
    const size_t columns = size_t(a.streams) * size_t(a.kv_heads) * size_t(p.column_tiles) * size_t(p.column_tile);
    const size_t parts = p.merged ? size_t(a.streams) * size_t(a.tokens) * size_t(a.heads) * size_t(p.parts) : 0;
    p.states_at = parts * size_t(a.head) * sizeof(float);
    p.queries_at = after(p.states_at + parts * sizeof(SoftmaxState));
    p.factors_at = p.queries_at + columns * size_t(a.head);
    p.exact_at = after(p.factors_at + columns * sizeof(float));
    p.exact_rows_at = p.exact_at + (a.windowed || !types.turbo_k ? columns * size_t(a.head) * sizeof(half) : 0);
    p.notes_bytes = size_t(all_words(a) + all_exact_words(a)) * sizeof(SeenTiles);
    p.workspace_bytes = p.exact_rows_at + (a.windowed ? 2 * exact_side_bytes(a) : 0) + p.notes_bytes;
    return p.workspace_bytes >> 34 == 0; // prepare_kernel numbers words of eight bytes in 32 bits
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
               code_for(p.device, hopper_kernel_128(a.type_k, a.type_v, true));
    p.operands = p.columns <= 4 * wide_columns ? 1 : most_operands(types.turbo_k, types.turbo_v, a.head);
    p.separate = !p.hopper && separate_groups(types.turbo_k, a.head, p.operands);
    const int warp_columns = p.operands * wide_columns, warps = wide_warps(p.separate);
    const auto divided = [](int64_t n, int64_t by) { return (n + by - 1) / by; };
    int column_warps = 1;
    while (column_warps < warps && column_warps * warp_columns < p.columns) column_warps *= 2;
    p.column_tile = column_warps * warp_columns;
    if (p.hopper) { // tiles have the same number of warpgroups, so their thread blocks take the same time
        const int64_t groups = divided(p.columns, group_columns);
        p.column_tile = int(divided(groups, divided(groups, column_groups))) * group_columns;
    }
    p.column_tiles = (p.columns + p.column_tile - 1) / p.column_tile;
    const int64_t beside = int64_t(a.kv_heads) * p.column_tiles;
    if (beside > 65535) return false;

    constexpr int most_words = 128; // of SeenTiles, in shared memory
    const int key_blocks = types.turbo_k ? std::max(a.head / 128, 1) : 1;
    const auto set_rows = [&](int buffer_rows, int row_tiles) { // returns whether the memory suffices
        p.buffer_rows = buffer_rows;
        p.row_tiles = row_tiles;
        const int expanded = expanded_bytes(buffer_rows, types.turbo_k, a.head, key_blocks);
        const int encoded = encoded_bytes(buffer_rows, pitch_k, pitch_v);
        const int rows = p.separate ? row_tiles * (expanded + 2 * encoded) : 2 * (expanded + encoded);
        const int seen = (most_words + 1) * int(sizeof(uint32_t)) + most_words * column_warps * int(sizeof(SeenTiles));
        // At the end the memory of the rows takes what half of the row tiles have, WideColumns::Exchange.
        const int exchange = p.operands * 32 * (a.head / 8 * int(sizeof(float4)) + 2 * int(sizeof(float2)));
        p.shared_bytes = wide_alignment + std::max(rows + seen, row_tiles / 2 * column_warps * exchange);
        return p.shared_bytes <= device.shared_per_block;
    };
    const auto choose_rows = [&] {
        if (p.hopper) {
            p.buffer_rows = hopper_rows;
            p.row_tiles = p.columns <= group_columns ? column_groups : 1;
            p.shared_bytes = HopperMemory<128>::bytes(hopper_rows * (pitch_k + pitch_v), most_words);
            const bool shares = p.row_tiles == 1 && p.column_tiles % most_cluster == 0;
            p.cluster = shares && most_cluster <= device.multiprocessors ? most_cluster : 1;
            return p.shared_bytes <= device.shared_per_block;
        }
        for (int row_tiles = std::min(warps / column_warps, 8); row_tiles > 0; row_tiles /= 2)
            for (int rows = 4 * tile_rows; rows >= tile_rows; rows /= 2)
                if (set_rows(rows, p.separate ? row_tiles : std::min(row_tiles, rows / tile_rows))) return true;
        return false;
    };
    if (!choose_rows()) return false;

    // The number of chunks for which the busiest multiprocessor has the least to do. A chunk costs as much as some
    // rows.
    const int step = p.separate ? p.row_tiles * p.buffer_rows : p.buffer_rows; // rows that are expanded at a time
    const int unit = std::max(p.buffer_rows, std::min(step, 4 * tile_rows));   // of chunk_rows
    const int64_t units = divided(a.n_kv, unit), blocks = beside * a.streams;
    const int64_t exact = a.windowed ? exact_tiles_of(a) * tile_rows : 0;
    const int64_t least = divided(units * unit, (most_words - 1) * seen_rows);
    const int64_t at_once = device.multiprocessors, most_chunks = std::max(least, std::min(units, 2 * at_once));
    const int64_t overhead = 16 * tile_rows / step; // of a thread block, in steps
    int64_t chosen = least, cost = INT64_MAX, waves = divided(least * blocks, at_once);
    for (int more = 0; more < 8 && chosen < most_chunks; ++more, ++waves) {
        const int64_t chunks = std::min(std::max(at_once * waves / blocks, least), most_chunks);
        const int64_t here = waves * (divided(divided(units, chunks) * unit + exact / chunks, step) + overhead);
        if (here < cost) {
            cost = here;
            chosen = chunks;
        }
    }
    p.chunk_rows = divided(units, chosen) * unit;
    p.chunks = int(divided(a.n_kv, p.chunk_rows));
    p.parts = p.chunks;
    p.merged = !p.hopper || p.chunks > 1 || (reinterpret_cast<uintptr_t>(a.dst) & 15);
    return plan_arrays(a, p);
}

// The columns of a thread block of hopper_direct.cuh, divided by eight, if it is faster than direct.cuh, else 0.
// Measured as in attention.cu, with a window, with hopper_direct.cuh / with direct.cuh:
//
//   rows         256      2304     8192     16384    32768    65536    131072
//   16 columns  14/16    15/17    18/19    23/24    33/35    51/50     86/80
//   32          19/17    22/17    24/24    30/32    41/48    62/77    102/135
static int faster_eights(const Attention & a, int columns) {
    if (columns <= 16) return a.n_kv <= 49152 ? 2 : 0;
    return columns <= 32 && a.n_kv > 8192 ? 4 : 0;
}

bool plan_direct(const Attention & a, const WideDevice & device, int bytes_k, int bytes_v, AttentionPlan & p) {
    if (a.head != 128 || !direct_kernel_128(a.type_k, a.type_v)) return false;
    p.eights = faster_eights(a, p.columns);
    if (p.eights > 0 && !code_for(p.device, hopper_direct_kernel_128(a.type_k, a.type_v, p.eights))) p.eights = 0;
    const int step = p.eights > 0 ? group_rows : tile_rows; // rows that are computed at a time
    p.wide = p.direct = true;
    p.hopper = false;
    p.pitch_k = direct_pitch(bytes_k); // as in DirectRows
    p.pitch_v = direct_pitch(bytes_v);
    p.block_heads = 1;
    p.head_groups = a.kv_heads;
    p.row_tiles = p.eights > 0 ? groups_of(p.eights) : direct_warps;
    p.stages = p.eights > 0 ? group_stages : direct_stages;
    p.column_tile = p.eights > 0 ? 8 * p.eights : direct_columns;
    p.column_tiles = (p.columns + p.column_tile - 1) / p.column_tile;
    const int64_t beside = int64_t(a.kv_heads) * p.column_tiles, steps = (a.n_kv + step - 1) / step;
    const int64_t chunks = device.multiprocessors / (beside * a.streams); // a thread block fills a multiprocessor
    if (chunks == 0) return false;
    p.chunk_rows = (steps + chunks - 1) / chunks * step;
    p.chunks = int((a.n_kv + p.chunk_rows - 1) / p.chunk_rows);
    p.parts = p.chunks;
    p.merged = true;
    const int words = words_of(p.chunk_rows) + 1 + (a.windowed ? words_of(exact_rows(a)) : 0);
    const int row = p.pitch_k + p.pitch_v;
    if (p.eights == 0)
        p.shared_bytes = int(sizeof(DirectMemory<128>)) + direct_row_bytes<128>(p) + words * int(sizeof(SeenTiles));
    else if (words <= GroupMemory<128, 2>::most_words)
        p.shared_bytes = p.eights == 2 ? GroupMemory<128, 2>::bytes(row) : GroupMemory<128, 4>::bytes(row);
    else return false;
    return p.shared_bytes <= device.shared_per_block && plan_arrays(a, p);
}

cudaError_t launch_wide(const AttentionCall & call, void * workspace, MaskNotes notes, cudaStream_t stream) {
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
    wide.arrays.seen = static_cast<SeenTiles *>(notes.memory);
    wide.arrays.words = words_of(a.n_kv);
    wide.arrays.exact_queries = reinterpret_cast<uint16_t *>(bytes + p.exact_at);
    if (a.windowed) {
        const size_t side = exact_side_bytes(a);
        wide.arrays.exact_k = reinterpret_cast<uint16_t *>(bytes + p.exact_rows_at);
        wide.arrays.exact_v = reinterpret_cast<uint16_t *>(bytes + p.exact_rows_at + side);
        wide.arrays.exact_seen = wide.arrays.seen + all_words(a);
        wide.arrays.exact_words = words_of(exact_rows(a));
        wide.arrays.exact_tiles = exact_tiles_of(a);
    }
    const WideHead & head = *head_of(a.head);
    const WideKernel kernel = p.eights > 0 ? hopper_direct_kernel_128(a.type_k, a.type_v, p.eights)
                              : p.direct   ? direct_kernel_128(a.type_k, a.type_v)
                              : p.hopper   ? code_for(p.device, hopper_kernel_128(a.type_k, a.type_v, p.merged))
                                         : head.kernel(a.type_k, a.type_v, p.operands);
    cudaError_t error = allow_shared(reinterpret_cast<const void *>(kernel), p.device, p.shared_bytes);
    if (error == cudaSuccess) error = head.prepare(wide, notes.written, stream);
    if (error != cudaSuccess) return error;
    const dim3 grid(unsigned(p.chunks), unsigned(a.kv_heads * p.column_tiles), unsigned(a.streams));
    if (p.direct)
        return launch(kernel, grid, dim3(p.eights > 0 ? 128 * groups_of(p.eights) : 32 * direct_warps),
                      size_t(p.shared_bytes), stream, wide);
    const int column_warps = p.column_tile / (p.operands * wide_columns);
    const int warps = p.separate ? p.row_tiles * column_warps : wide_warps(false);
    return launch_clusters(p.hopper ? p.cluster : 1, kernel, grid, dim3(p.hopper ? hopper_threads : 32 * warps),
                           size_t(p.shared_bytes), stream, wide);
}

} // namespace cuda
} // namespace turboquant
