// The kernel template for attention of many query tokens on Hopper GPUs. It does what wide.cuh does, with the products
// of warpgroups (wgmma.cuh). wide.cu prepares the queries and launches calls.
//
// Two warpgroups of a thread block copy encoded rows to shared memory and expand them, in steps that they take in turn.
// The two others, each with 64 query columns, use the expanded rows of a step for scores and for output. Barriers in
// shared memory say which buffers of expanded rows are full and which are empty.
#ifndef TURBOQUANT_CUDA_HOPPER_H
#define TURBOQUANT_CUDA_HOPPER_H

#include "wgmma.cuh"
#include "wide.cuh"

namespace turboquant {
namespace cuda {

constexpr int warpgroup = 128;      // threads
constexpr int expanding_groups = 2; // warpgroups that expand rows: the first ones
constexpr int column_groups = 2;    // warpgroups with columns
constexpr int group_columns = 64;   // of a warpgroup
constexpr int hopper_threads = (expanding_groups + column_groups) * warpgroup;
constexpr int hopper_rows = 64;   // of a step
constexpr int hopper_buffers = 6; // of expanded rows
constexpr int own_buffers = 2;    // of encoded rows, of each warpgroup that expands rows
constexpr int encoded_buffers = expanding_groups * own_buffers;

// The registers of a thread: 128 on average.
constexpr int expanding_registers = 80, column_registers = 176;
static_assert((expanding_groups * expanding_registers + column_groups * column_registers) * warpgroup <= 65536,
              "a multiprocessor has so many registers");

// Thread blocks of a cluster have different columns of a KV head. Each expands some of the steps, and copies these rows
// to the others. So all take the steps that a column of the cluster sees, in the same buffers, and a buffer is empty if
// it is in all of them. Measured on an H200 in a model (512 tokens, 32 query heads, 8 KV heads of 128, turbo4): the
// kernel takes 601 us at 32768 rows without clusters and 580 with two thread blocks, 1677 and 1624 at 98304. With four
// it is slower; each of these receives three times as many bytes as it expands.
constexpr int most_cluster = 2;

// The division of a thread block's shared memory.
template <int D> struct HopperMemory {
    static constexpr int key_bytes = hopper_rows * D, half_bytes = hopper_rows * 128, value_bytes = D / 64 * half_bytes;
    static constexpr int expanded = key_bytes + value_bytes, factors = hopper_rows * int(sizeof(float2));
    static constexpr int constants = hopper_rows * 128, barriers = 2 * hopper_buffers * 8;
    static_assert(key_bytes % matrix_alignment == 0 && half_bytes % matrix_alignment == 0, "buffers are aligned");

    // Bytes for chunks with so many words of SeenTiles.
    static constexpr int bytes(int encoded, int words) {
        return matrix_alignment + hopper_buffers * (expanded + factors) + constants + encoded_buffers * encoded +
               barriers + words * int(2 * sizeof(uint32_t) + column_groups * sizeof(SeenTiles));
    }

    uint8_t * base;
    uint32_t address; // of base
    int * infos;      // of the steps that follow those in the buffers, and of the first step
    int encoded_k, encoded;

    __device__ __forceinline__ HopperMemory(const AttentionPlan & p, uint8_t * shared, int * infos)
        : infos(infos), encoded_k(hopper_rows * p.pitch_k), encoded(hopper_rows * (p.pitch_k + p.pitch_v)) {
        base = shared + (-int(__cvta_generic_to_shared(shared)) & (matrix_alignment - 1));
        address = uint32_t(__cvta_generic_to_shared(base));
    }
    static __device__ __forceinline__ int keys_at(int buffer) { return buffer * expanded; }
    static __device__ __forceinline__ int values_at(int buffer) { return buffer * expanded + key_bytes; }
    static __device__ __forceinline__ int constants_at() { return hopper_buffers * expanded; }
    static __device__ __forceinline__ int factors_at(int buffer) {
        return constants_at() + constants + buffer * factors;
    }
    __device__ __forceinline__ int encoded_at(int buffer) const {
        return factors_at(hopper_buffers) + buffer * encoded;
    }
    __device__ __forceinline__ int barriers_at() const { return encoded_at(encoded_buffers); }
    __device__ __forceinline__ uint32_t full(int buffer) const { return address + barriers_at() + 8 * buffer; }
    __device__ __forceinline__ uint32_t empty(int buffer) const { return full(hopper_buffers + buffer); }
    // Tiles that the columns of each warpgroup see, those that any column of the thread block sees, and those that one
    // of the cluster sees.
    __device__ __forceinline__ SeenTiles * group_seen() const {
        return reinterpret_cast<SeenTiles *>(base + barriers_at() + barriers);
    }
    __device__ __forceinline__ uint32_t * seen(int words) const {
        return reinterpret_cast<uint32_t *>(group_seen() + column_groups * words);
    }
    __device__ __forceinline__ uint32_t * cluster_seen(int words) const { return seen(words) + words; }
};

namespace {

// threadIdx.x, which is read again each time, so that what is computed from it takes no register in between.
__device__ __forceinline__ int read_thread() {
    int thread;
    asm volatile("mov.u32 %0, %%tid.x;" : "=r"(thread));
    return thread;
}

// The share of a thread.
struct HopperPlace {
    int lane, quad, in_quad, warp; // of its warpgroup
    int group;                     // the number of the warpgroup among those with columns; negative: it expands rows
    int groups;                    // how many have columns; the others do nothing
    int first_column;              // of the warpgroup
    int kv_head, stream, kv_stream;
    int rank;      // in the cluster
    int64_t begin; // the first KV row of the thread block, a multiple of the rows of a step
    int length;    // the number of its KV rows

    __device__ __forceinline__ explicit HopperPlace(const AttentionCall & call) {
        const Attention & a = call.a;
        const AttentionPlan & p = call.plan;
        const int thread = read_thread();
        lane = thread % 32;
        quad = lane / 4;
        in_quad = lane % 4;
        warp = thread / 32 % 4;
        group = __shfl_sync(all_lanes, thread / warpgroup - expanding_groups, 0);
        groups = p.column_tile / group_columns * p.row_tiles;
        kv_head = blockIdx.y / p.column_tiles;
        const int column_tile = blockIdx.y - kv_head * p.column_tiles;
        rank = p.cluster > 1 ? rank_in_cluster() : 0;
        first_column = column_tile * p.column_tile + (p.row_tiles > 1 ? 0 : group * group_columns);
        stream = blockIdx.z;
        kv_stream = a.streams == a.kv_streams ? stream : stream / (a.streams / a.kv_streams);
        begin = int64_t(blockIdx.x) * p.chunk_rows;
        length = int(begin + p.chunk_rows < a.n_kv ? p.chunk_rows : a.n_kv - begin);
    }
    // A lane has rows `quad` and quad + 8 of the 16 columns of its warp, in the operands and in the results.
    __device__ __forceinline__ int column(int c) const { return first_column + 16 * warp + 8 * c + quad; }
};

// Buffers are used in turn.
struct Turn {
    int buffer = 0;
    int parity = 0; // of the phase in which the buffer becomes full. The phase before the first one has parity 1
    __device__ __forceinline__ void go_on() {
        if (++buffer == hopper_buffers) {
            buffer = 0;
            parity ^= 1;
        }
    }
};

// ---- steps

// What a warpgroup with columns must know about a step: its first row, counted from the thread block's, a multiple of
// hopper_rows; a bit for each of the warpgroups that add rows of the step; and a bit for each of those for which rows
// are hidden or have a bias.
static_assert(2 * column_groups <= 6 && hopper_rows % 64 == 0, "the bits are below the number of a row");
constexpr int no_step = INT32_MIN; // behind the last one
__device__ __forceinline__ bool sees(int info, int group) { return info >> group & 1; }
__device__ __forceinline__ bool mixed(int info, int group) { return info >> (column_groups + group) & 1; }
__device__ __forceinline__ int first_row(int info) { return info & -hopper_rows; }

// Which rows the columns of a thread block see.
struct Steps {
    const uint32_t * seen;        // by any column of the cluster
    const SeenTiles * group_seen; // by the columns of each warpgroup
    int words, first_tile, length;
    bool in_turn; // All warpgroups have the same columns, and they add the steps in turn
    static constexpr uint32_t tiles = (1u << (hopper_rows / tile_rows)) - 1; // of a step

    // The step after `at` that a column sees.
    __device__ __forceinline__ int next(int at) const {
        do at += hopper_rows;
        while (at < length && !(seen[tile(at) / 32] >> tile(at) % 32 & tiles));
        return at;
    }
    __device__ __forceinline__ int info(int at) const {
        if (at >= length) return no_step;
        int info = at;
#pragma unroll
        for (int g = 0; g < column_groups; ++g) {
            if (in_turn && uint32_t(at) / hopper_rows % column_groups != g) continue;
            const SeenTiles word = group_seen[g * words + tile(at) / 32];
            const uint32_t some = word.some >> tile(at) % 32 & tiles;
            info |= int(some != 0) << g;
            info |= int(some != tiles || (word.mixed >> tile(at) % 32 & tiles)) << (column_groups + g);
        }
        return info;
    }

private:
    __device__ __forceinline__ uint32_t tile(int at) const { return uint32_t(first_tile) + uint32_t(at) / tile_rows; }
};

// All threads collect what the columns see. If the thread block has a cluster, this is its first synchronization.
template <typename Memory>
__device__ __forceinline__ void collect_steps(const WideCall & wide, const HopperPlace & place, const Memory & memory,
                                              int words) {
    const AttentionCall & call = wide.call;
    const Attention & a = call.a;
    const int64_t first_word = place.begin / seen_rows;
    if (place.group >= 0) {
        const int first = place.group >= place.groups ? a.tokens : place.first_column / call.plan.group,
                  end = min((place.first_column + group_columns - 1) / call.plan.group + 1, a.tokens);
        // Rows of the mask that precede those of the stream.
        const int64_t rows = int64_t(place.stream % a.mask_streams) * a.mask_heads * a.tokens;
        const SeenTiles * from = wide.arrays.seen + rows * wide.arrays.words + first_word;
        for (int w = threadIdx.x % warpgroup; w < words; w += warpgroup) {
            SeenTiles seen = {0, 0};
            if (!a.mask) {
                const int64_t left = a.n_kv - (first_word + w) * seen_rows; // rows from the word's on
                const int tiles = int(min(left / tile_rows, int64_t(32)));
                seen.mixed = left < seen_rows && left % tile_rows ? 1u << tiles : 0;
                seen.some = first >= end ? 0 : (tiles < 32 ? (1u << tiles) - 1 : ~0u) | seen.mixed;
            } else {
#pragma unroll 1
                for (int head = 0; head < a.mask_heads; ++head)
#pragma unroll 4
                    for (int token = first; token < end; ++token) {
                        const SeenTiles one = from[(int64_t(head) * a.tokens + token) * wide.arrays.words + w];
                        seen.some |= one.some;
                        seen.mixed |= one.mixed;
                    }
            }
            memory.group_seen()[place.group * words + w] = seen;
        }
    }
    __syncthreads();
    for (int w = threadIdx.x; w < words; w += hopper_threads) {
        uint32_t some = 0;
        for (int g = 0; g < column_groups; ++g) some |= memory.group_seen()[g * words + w].some;
        memory.seen(words)[w] = some;
    }
    const int cluster = call.plan.cluster;
    if (cluster == 1) {
        __syncthreads();
        return;
    }
    sync_cluster();
    for (int w = threadIdx.x; w < words; w += hopper_threads) {
        const uint32_t own = uint32_t(__cvta_generic_to_shared(memory.seen(words) + w));
        uint32_t some = 0;
        for (int rank = 0; rank < cluster; ++rank) some |= load_mapped(map_to(own, rank));
        memory.cluster_seen(words)[w] = some;
    }
    __syncthreads();
}

// ---- rows
//
// The lanes of a row read neighbouring words of its indices, so that no two lanes of a warp read from the same bank.
// This changes the order of the values in expanded rows: of the eight values of a unit of V, four are the elements from
// value_element on, and four are those 16 elements further on. The queries are in the same order as the levels of K.

// The first element of a unit of eight values of V.
__device__ __forceinline__ constexpr int value_element(int unit) {
    return unit / 8 * 64 + unit / 4 % 2 * 32 + unit % 4 * 4;
}
// The word of a prepared query whose elements are those of word `word` of a row of K.
__device__ __forceinline__ constexpr int query_word(int word) {
    return 2 * (word / 4 % 4 + word / 16 * 8 + word % 4 / 2 * 4) + word % 2;
}

// The place of an element of an exact row in memory. As in the matrices of wgmma.cuh, a row of a tile of exact K, and
// one of exact V, consists of halves of 128 bytes, and the second halves follow the first halves of all rows.
struct ExactPlace {
    static __device__ __forceinline__ int at(int row, int position) { // the position in the order of an operand
        const int unit = position % 64 / 8;
        return position / 64 * (tile_rows * 64) + row * 64 + ((unit ^ row % 8) << 3) + position % 8;
    }
    // The order of K is that in which a lane's four registers of a column's products are adjacent elements of a query.
    static __device__ __forceinline__ int key(int row, int element) {
        const int word = element / 2 % 16;
        return at(row, element / 32 * 32 + 2 * (word / 2 % 2 * 8 + word % 2 * 4 + word / 4) + element % 2);
    }
    // The order of V is that of value_element.
    static __device__ __forceinline__ int value(int row, int element) {
        const int unit = element / 64 * 8 + element / 32 % 2 * 4 + element / 4 % 4;
        return at(row, 8 * unit + element / 16 % 2 * 4 + element % 4);
    }
};

// ---- scores
//
// Products start as a constant, so that they are not negative and less than 2^23. The bits of such an integer are those
// of a float too, which is the integer times 2^-149, and one multiplication gives the score. An operand of bytes that
// are all the same gives the constant, so it takes no instructions for each product.
constexpr uint32_t constant_byte = 254;
constexpr int product_start = constant_byte * constant_byte * 32; // the largest magnitude of 128 products of two levels
static_assert(product_start == 127 * 127 * 128 && 2 * product_start < 1 << 23, "products are the bits of floats");
constexpr float to_factor = 1.2676506002282294e30f, score_unit = 1.7763568394002505e-15f; // 2^100 and 2^-49, of 2^149

// a * b + c, where a may be a float below the normal ones.
__device__ __forceinline__ float fma_denormal(float a, float b, float c) {
#ifdef __CUDA_ARCH__
    float out;
    asm("fma.rn.f32 %0, %1, %2, %3;" : "=f"(out) : "f"(a), "f"(b), "f"(c));
    return out;
#else
    return std::fma(a, b, c);
#endif
}

// Copies rows of a KV head to shared memory, and expands them. A warp copies the rows that it expands, so it waits for
// no other warp. Addresses of a thread are computed once, but for the buffers: in all steps, a row has the same offset.
template <KV TK, KV TV, int D> struct HopperRows {
    using LK = Layout<TK, D>;
    using LV = Layout<TV, D>;
    using Memory = HopperMemory<D>;
    using Place = HopperPlace;
    static constexpr int lanes = D / 32; // that expand a row
    static constexpr int copies = 2, copied_at_once = 16 * lanes; // of a row, by as many lanes
    static constexpr int warp_rows = 32 / lanes, turns = hopper_rows * lanes / warpgroup; // of warp_rows rows
    static constexpr int apart = hopper_rows / turns; // rows between those of a thread
    static_assert(apart % 8 == 0, "all rows of a thread have the same address modulo 16, and the same swizzle");
    static_assert(D == 128, "a row has four lanes, and a row of K has 128 bytes");
    static_assert(LK::bytes + 15 <= copies * copied_at_once && LV::bytes + 15 <= copies * copied_at_once,
                  "all bytes of a row are copied");
    const WideCall & wide;
    const AttentionCall & call;
    const Place & place;
    const Memory & memory;
    const int number; // of the warpgroup among those that expand rows
    const uint8_t *k, *v; // row 0
    const uint8_t *copy_k, *copy_v; // the first 16 bytes that the thread copies of a row
    int copy_to_k, copy_to_v;       // and their offsets in a buffer
    int copied_k, copied_v;         // bytes of the row from there on
    int encoded_k, encoded_v;       // the offsets of the first row of which the thread expands a part
    int part, row;                  // a quarter of this row
    int unit0, unit1;               // offsets of the units that it writes
    const typename LK::LookUpLevels look_up_k;
    const typename LV::LookUpLevels look_up_v;
    const uint32_t even, odd;       // even_bytes and odd_bytes, in registers

    // `zero` is 0, but the compiler does not know.
    __device__ __forceinline__ HopperRows(const WideCall & wide, const Place & place, const Memory & memory,
                                          uint32_t zero)
        : wide(wide), call(wide.call), place(place), memory(memory), number(place.group + expanding_groups),
          look_up_k(zero), look_up_v(zero), even(even_bytes ^ zero), odd(odd_bytes ^ zero) {
        const Attention & a = call.a;
        const AttentionPlan & p = call.plan;
        k = static_cast<const uint8_t *>(a.k) + place.kv_stream * a.k_stream + place.kv_head * a.k_head;
        v = static_cast<const uint8_t *>(a.v) + place.kv_stream * a.v_stream + place.kv_head * a.v_head;
        const int copied = place.warp * warp_rows + place.lane / lanes, unit = place.lane % lanes * 16;
        copy_k = k + (place.begin + copied) * a.k_row;
        copy_v = v + (place.begin + copied) * a.v_row;
        const int before_k = int(reinterpret_cast<uintptr_t>(copy_k) & 15),
                  before_v = int(reinterpret_cast<uintptr_t>(copy_v) & 15);
        copied_k = before_k + LK::bytes - unit;
        copied_v = before_v + LV::bytes - unit;
        copy_k += unit - before_k;
        copy_v += unit - before_v;
        copy_to_k = copied * p.pitch_k + unit;
        copy_to_v = memory.encoded_k + copied * p.pitch_v + unit;

        // The rows of neighbouring lanes differ by four, so that eight lanes write to different banks.
        const int in_warp = place.lane / lanes;
        part = place.lane % lanes;
        row = place.warp * warp_rows + (in_warp & 1) * 4 + in_warp / 2;
        const auto offset = [&](const uint8_t * base, int64_t stride) {
            return int((reinterpret_cast<uintptr_t>(base) + (place.begin + row) * stride) & 15);
        };
        encoded_k = row * p.pitch_k + offset(k, a.k_row);
        encoded_v = memory.encoded_k + row * p.pitch_v + offset(v, a.v_row);
        unit0 = row * 128 + ((part ^ row % 8) << 4);
        unit1 = unit0 ^ 64;
    }

    // Starts to copy the rows from `at` on, unless they are behind the last one of the thread block.
    __device__ __forceinline__ void load(int at, int buffer) const {
        const Attention & a = call.a;
        const AttentionPlan & p = call.plan;
        const uint32_t to = memory.address + memory.encoded_at(buffer);
        if (at >= place.length) {
        } else if (place.begin + at + hopper_rows < a.n_kv) { // the bytes behind these rows may be read
#pragma unroll
            for (int t = 0; t < turns; ++t) {
                const int r = t * apart;
                const uint8_t *from_k = copy_k + (at + r) * a.k_row, *from_v = copy_v + (at + r) * a.v_row;
                const uint32_t to_k = to + copy_to_k + r * p.pitch_k, to_v = to + copy_to_v + r * p.pitch_v;
#pragma unroll
                for (int i = 0; i < copies * copied_at_once; i += copied_at_once) {
                    if (i < copied_k) copy_async(to_k + i, from_k + i, 16);
                    if (i < copied_v) copy_async(to_v + i, from_v + i, 16);
                }
            }
        } else {
#pragma unroll 1
            for (int i = 0; i < 2 * turns; ++i) {
                const int side = i % 2, first = read_thread() % warpgroup / 32 * warp_rows + i / 2 * apart;
                load_rows(to + (side ? memory.encoded_k : 0) + first * (side ? p.pitch_v : p.pitch_k),
                          side ? Side{v, a.v_row, LV::bytes, p.pitch_v} : Side{k, a.k_row, LK::bytes, p.pitch_k},
                          warp_rows, place.begin + at + first, a.n_kv, {unsigned(read_thread() % 32), 32});
            }
        }
        copy_commit();
    }

    // Expands the thread's quarters of rows. The reads of all of them precede the writes, so no read waits for another.
    __device__ __forceinline__ void expand(int from, int to) const {
        const AttentionPlan & p = call.plan;
        const uint8_t *row_k = memory.base + memory.encoded_at(from) + encoded_k,
                      *row_v = memory.base + memory.encoded_at(from) + encoded_v;
        uint32_t x[turns][8], y[turns][8];
        float scale_k[turns], scale_v[turns];
#pragma unroll
        for (int t = 0; t < turns; ++t) {
            read_levels<TK, D, false>(row_k + t * apart * p.pitch_k, part, lanes, look_up_k, x[t]);
            read_levels<TV, D, true>(row_v + t * apart * p.pitch_v, part, lanes, look_up_v, y[t]);
            scale_k[t] = LK::load_block_scale(row_k + t * apart * p.pitch_k);
            scale_v[t] = LV::load_block_scale(row_v + t * apart * p.pitch_v);
        }
#pragma unroll
        for (int t = 0; t < turns; ++t) {
            // A product of a hidden weight, which is zero, and a value that is not finite would be NaN. So such a value
            // makes the score NaN instead, which the mask replaces.
            const bool finite = fabsf(scale_v[t]) <= 65504.0f;
            if (part == 0) {
                const float factor = finite ? scale_k[t] * LK::step : __uint_as_float(0x7fc00000);
                float2 * factors = reinterpret_cast<float2 *>(memory.base + Memory::factors_at(to)) + t * apart;
                factors[row] = make_float2(factor * to_factor, factor * (-product_start * score_unit));
            }
            const half2 scale = __floats2half2_rn(finite ? scale_v[t] : 0.0f, finite ? scale_v[t] : 0.0f);
            uint8_t * buffer = memory.base + to * Memory::expanded + t * apart * 128;
            uint8_t *at0 = buffer + unit0, *at1 = buffer + unit1;
            *reinterpret_cast<uint4 *>(at0) = make_uint4(x[t][0], x[t][1], x[t][2], x[t][3]);
            *reinterpret_cast<uint4 *>(at1) = make_uint4(x[t][4], x[t][5], x[t][6], x[t][7]);
#pragma unroll
            for (int j = 0; j < 2; ++j)
#pragma unroll
                for (int h = 0; h < 2; ++h) {
                    const uint32_t bytes = h ? odd : even;
                    const uint32_t * levels = y[t] + 4 * j;
                    *reinterpret_cast<uint4 *>((j ? at1 : at0) + Memory::key_bytes + h * Memory::half_bytes) =
                        make_uint4(scaled_halves(levels[0], bytes, scale), scaled_halves(levels[1], bytes, scale),
                                   scaled_halves(levels[2], bytes, scale), scaled_halves(levels[3], bytes, scale));
                }
        }
    }

    // Copies the thread block's tiles of the rows of an exact window, which precede the steps.
    __device__ __forceinline__ void copy_exact(Turn & turn) const {
        const WideArrays & x = wide.arrays;
        const int64_t tiles = (int64_t(place.kv_stream) * call.a.kv_heads + place.kv_head) * x.exact_tiles;
        constexpr int size = tile_rows * D;
#pragma unroll 1
        for (int tile = blockIdx.x, taker = 0; tile < x.exact_tiles; tile += call.plan.chunks) {
            if (taker == number) {
                wait_for_phase(memory.empty(turn.buffer), turn.parity ^ 1);
                if (read_thread() % warpgroup == 0) {
                    const uint32_t to = memory.address, full = memory.full(turn.buffer);
                    copy_bulk(to + Memory::keys_at(turn.buffer), x.exact_k + (tiles + tile) * size, 2 * size, full);
                    copy_bulk(to + Memory::values_at(turn.buffer), x.exact_v + (tiles + tile) * size, 2 * size, full);
                }
                __syncwarp();
                if (place.lane == 0) arrive(memory.full(turn.buffer));
            }
            taker = taker + 1 == expanding_groups ? 0 : taker + 1;
            turn.go_on();
        }
    }

    // The bytes of a step that another thread block copies, a quarter for each warp that announces them. They may be
    // there before that.
    static constexpr int shared_bytes = (Memory::expanded + Memory::factors) / (warpgroup / 32);

    // Copies the rows that the warpgroup has expanded to the other thread blocks of the cluster.
    __device__ __forceinline__ void share(int buffer) const {
        sync_groups(1 + number, 1); // all rows are there
        const int thread = read_thread() % warpgroup, other = thread / 2;
        if (other >= call.plan.cluster - 1) return;
        const uint32_t from =
            memory.address + (thread % 2 ? Memory::factors_at(buffer) : Memory::keys_at(buffer));
        const int rank = other + (other >= place.rank);
        copy_mapped(map_to(from, rank), from, thread % 2 ? Memory::factors : Memory::expanded,
                    map_to(memory.full(buffer), rank));
    }

    // Expands the warpgroup's steps of those that a column sees.
    __device__ __forceinline__ void expand_all(const Steps & steps) const {
        const int cluster = call.plan.cluster;
        const auto next = [&](int step, int n) {
#pragma unroll 1
            for (int i = 0; i < n; ++i) step = steps.next(step);
            return step;
        };
        // The warpgroups of all thread blocks with the same number have as many steps, then the other warpgroups have.
        // Of those each thread block expands one. load_next is the last one that is being loaded.
        int at = next(-hopper_rows, 1 + number * cluster), load_next = next(at, place.rank);
#pragma unroll
        for (int i = 0; i < own_buffers; ++i) {
            if (i > 0) load_next = next(load_next, expanding_groups * cluster);
            load(load_next, number * own_buffers + i);
        }
        Turn turn;
        if (call.a.windowed) copy_exact(turn);
        for (int i = 0; i < number * cluster; ++i) turn.go_on();
        int buffer = number * own_buffers;
#pragma unroll 1
        while (at < place.length) {
#pragma unroll 1
            for (int owner = 0; owner < cluster && at < place.length; ++owner) {
                const int after = steps.next(at);
                if (owner == place.rank) {
                    copy_wait<own_buffers - 1>();
                    __syncwarp(); // the rows are there
                }
                wait_for_phase(memory.empty(turn.buffer), turn.parity ^ 1);
                if (read_thread() % warpgroup == 0) memory.infos[turn.buffer] = steps.info(after);
                if (owner == place.rank) {
                    expand(buffer, turn.buffer);
                    publish_writes();
                    __syncwarp(); // the rows have been read
                    if (read_thread() % 32 == 0) arrive(memory.full(turn.buffer));
                    if (cluster > 1) share(turn.buffer);
                    load_next = next(load_next, expanding_groups * cluster);
                    load(load_next, buffer); // publish_writes waits for copies that have been started before
                    buffer = buffer + 1 == number * own_buffers + own_buffers ? number * own_buffers : buffer + 1;
                } else if (read_thread() % 32 == 0) {
                    arrive_for_bytes(memory.full(turn.buffer), shared_bytes);
                }
                turn.go_on();
                at = after;
            }
            at = next(at, (expanding_groups - 1) * cluster);
            for (int i = 0; i < (expanding_groups - 1) * cluster; ++i) turn.go_on();
        }
        copy_wait<0>();
    }
};

// ---- the columns of a warpgroup

// Arrays with two elements have one for each of the lane's columns.
template <KV TK, KV TV, int D> struct HopperColumns {
    using LK = Layout<TK, D>;
    using Memory = HopperMemory<D>;
    using Place = HopperPlace;
    static constexpr int eights = hopper_rows / 8; // of rows of a step
    static constexpr float most_weight = 32768;    // weights are binary16
    const WideCall & wide;
    const Place & place;
    const Memory & memory;
    float to_log2[2], reference[2], sum[2]; // to_log2: of scores in score_unit; sum: over the lane's rows
    float output[D / 2] = {};
    union {
        int products[4 * eights];
        float score[4 * eights];
    };
    uint32_t weight[hopper_rows / 16][4];
    uint32_t query[D / 32][4]; // operands of the scores

    __device__ __forceinline__ HopperColumns(const WideCall & wide, const Place & place, const Memory & memory)
        : wide(wide), place(place), memory(memory) {
#pragma unroll
        for (int c = 0; c < 2; ++c) {
            to_log2[c] = wide.arrays.factors[prepared_column() + 8 * c] * (1 / score_unit);
            reference[c] = nothing_seen;
            sum[c] = 0;
        }
    }

    // The number of the lane's first column among those of all streams and KV heads.
    __device__ __forceinline__ int64_t prepared_column() const {
        const AttentionPlan & p = wide.call.plan;
        return (int64_t(place.stream) * wide.call.a.kv_heads + place.kv_head) * p.column_tile * p.column_tiles +
               place.column(0);
    }

    // Loads the queries as operands of the scores.
    __device__ __forceinline__ void load_queries() {
        const uint32_t * words =
            reinterpret_cast<const uint32_t *>(wide.arrays.queries) + prepared_column() * (D / 4);
#pragma unroll
        for (int i = 0; i < D / 32; ++i)
#pragma unroll
            for (int j = 0; j < 4; ++j)
                query[i][j] = words[j % 2 * (2 * D) + query_word(8 * i + j / 2 * 4 + place.in_quad)];
    }

    // Starts the products of the queries and the rows of a buffer.
    __device__ __forceinline__ void start_products(int buffer) {
        const uint32_t keys = key_matrix(memory.address + Memory::keys_at(0)) + buffer * (Memory::expanded / 16),
                       constants = key_matrix(memory.address + Memory::constants_at());
        constexpr uint32_t four = constant_byte * 0x01010101;
        const uint32_t bytes[4] = {four, four, four, four};
        start_keys(products, bytes, matrix_descriptor(constants));
#pragma unroll
        for (int i = 0; i < D / 32; ++i) multiply_keys(products, query[i], matrix_descriptor(keys + 2 * i));
    }
    // Starts to add the weights times V.
    __device__ __forceinline__ void start_output(int buffer) {
        const uint32_t values = value_matrix(memory.address + Memory::values_at(0), Memory::half_bytes) +
                                buffer * (Memory::expanded / 16);
#pragma unroll
        for (int i = 0; i < hopper_rows / 16; ++i) // 16 rows of 128 bytes
            multiply_values(output, weight[i], matrix_descriptor(values + 128 * i));
    }

    // Turns products into scores, without the factors of the queries.
    __device__ __forceinline__ void scale_products(int buffer) {
        const float2 * factors =
            reinterpret_cast<const float2 *>(memory.base + Memory::factors_at(buffer)) + 2 * place.in_quad;
#pragma unroll
        for (int n = 0; n < eights; ++n) {
            const float4 two = *reinterpret_cast<const float4 *>(factors + 8 * n);
#pragma unroll
            for (int i = 0; i < 4; ++i)
                score[4 * n + i] = fma_denormal(__int_as_float(products[4 * n + i]), i % 2 ? two.z : two.x,
                                                i % 2 ? two.w : two.y);
        }
    }

    template <int Eights> __device__ __forceinline__ void cap() {
        const float limit = wide.call.a.soft_cap * log2e;
#pragma unroll
        for (int i = 0; i < 4 * Eights; ++i) {
            const float factor = to_log2[i / 2 % 2];
            score[i] = limit * tanhf(score[i] * factor / limit) / factor;
        }
    }

    // Adds the mask of tile `tile` to the scores from number First on. `seen` has the words of the mask. In batches of
    // several requests most columns see no row of the tile or all of them, and need no value of the mask.
    template <int First>
    __device__ __forceinline__ void apply_mask(const MaskRows & mask, const SeenTiles * seen, int words, int tile) {
        const Place place(wide.call);
        const AttentionPlan & p = wide.call.plan;
#pragma unroll
        for (int c = 0; c < 2; ++c) {
            if (place.column(c) >= p.columns) continue;
            const int column = place.column(c), token = column / p.group;
            const int head = place.kv_head * p.group + column - token * p.group;
            SeenTiles one = {~0u, ~0u};
            if (mask.base) one = seen[mask.number(token, head, place.stream, wide.call.a.tokens) * words + tile / 32];
            if (!(one.some >> tile % 32 & 1)) {
#pragma unroll
                for (int n = 0; n < tile_rows / 8; ++n)
                    score[First + 4 * n + 2 * c] = score[First + 4 * n + 2 * c + 1] = -INFINITY;
                continue;
            }
            if (!(one.mixed >> tile % 32 & 1)) continue;
            const int64_t first = int64_t(tile) * tile_rows + 2 * place.in_quad;
            const uint8_t * values = mask.row(token, head, place.stream) + 2 * first;
            const float slope = log2e * alibi_slope(wide.call, head) / to_log2[c];
#pragma unroll
            for (int n = 0; n < tile_rows / 8; ++n)
#pragma unroll
                for (int i = 0; i < 2; ++i) {
                    const bool exists = first + 8 * n + i < mask.rows;
                    const float bias = !exists ? -INFINITY : mask.base ? load_half(values + 16 * n + 2 * i) : 0.0f;
                    float & s = score[First + 4 * n + 2 * c + i];
                    s = bias == -INFINITY ? -INFINITY : s + bias * slope;
                }
        }
    }

    // Turns scores of Eights times eight rows into weights, and returns the sums of the weights.
    template <int Eights> __device__ __forceinline__ void weigh(float (&added)[2]) {
#pragma unroll
        for (int c = 0; c < 2; ++c) {
            added[c] = 0;
            const float offset = -reference[c];
#pragma unroll
            for (int n = 0; n < Eights; ++n) {
                float &a = score[4 * n + 2 * c], &b = score[4 * n + 2 * c + 1];
                a = exp2f(__fmaf_rn(a, to_log2[c], offset));
                b = exp2f(__fmaf_rn(b, to_log2[c], offset));
                added[c] += a + b;
            }
        }
    }

    // Chooses a higher reference for columns with scores that exceed theirs by far. `correction` is the factor of the
    // earlier sums.
    template <int Eights> __device__ __forceinline__ void raise_references(float (&correction)[2]) {
#pragma unroll
        for (int c = 0; c < 2; ++c) {
            float largest = -INFINITY;
#pragma unroll
            for (int i = 0; i < 4 * Eights; ++i)
                if (i / 2 % 2 == c) largest = fmaxf(largest, score[i]);
            largest *= to_log2[c];
            largest = fmaxf(largest, __shfl_xor_sync(all_lanes, largest, 1));
            largest = fmaxf(largest, __shfl_xor_sync(all_lanes, largest, 2));
            const float before = reference[c];
            if (largest > before + lowered_by) reference[c] = largest - lowered_by;
            correction[c] = exp2f(before - reference[c]);
        }
    }
    __device__ __forceinline__ void correct_output(const float (&correction)[2]) {
#pragma unroll
        for (int c = 0; c < 2; ++c) {
#pragma unroll
            for (int n = 0; n < D / 8; ++n) {
                output[4 * n + 2 * c] *= correction[c];
                output[4 * n + 2 * c + 1] *= correction[c];
            }
        }
    }

    // Rounds weights to the operand A of the output.
    template <int Eights> __device__ __forceinline__ void round_weights() {
#pragma unroll
        for (int i = 0; i < 2 * Eights; ++i) {
            const half2 pair = __floats2half2_rn(score[2 * i], score[2 * i + 1]);
            weight[i / 4][i % 4] = *reinterpret_cast<const uint32_t *>(&pair);
        }
    }

    // Computes the products of the warp's columns and the rows of a buffer once more. Those of warpgroups are not
    // possible, because the other warps do not take part.
    __device__ __forceinline__ void repeat_products(int buffer) {
        const Place place(wide.call);
        const uint8_t * keys = memory.base + Memory::keys_at(buffer) + place.quad * D;
        const auto word = [&](int row, int unit) { // of row `quad` of the eight rows from `row` on
            return *reinterpret_cast<const uint32_t *>(keys + row * D + ((unit ^ place.quad) << 4) + 4 * place.in_quad);
        };
#pragma unroll
        for (int n = 0; n < eights; ++n) {
            int c[4] = {};
#pragma unroll
            for (int i = 0; i < D / 32; ++i) {
                const uint32_t b[2] = {word(8 * n, 2 * i), word(8 * n, 2 * i + 1)};
                mma_int8(c, query[i], b);
            }
#pragma unroll
            for (int i = 0; i < 4; ++i) products[4 * n + i] = c[i] + product_start;
        }
    }

    // Turns the products of a step into weights, which are not rounded yet. `at` is the step's first row, counted from
    // the thread block's. Rare cases have code of their own: a mask, a soft cap, or a sum which shows that a weight may
    // be too large for binary16. Then the result is true, and the caller corrects the output: here the tensor cores may
    // still add to it, and only all warps of a warpgroup may wait for them.
    __device__ __forceinline__ bool weigh_step(int buffer, int at, bool mixed, float (&correction)[2]) {
        float added[2];
        const bool plain = !mixed && wide.call.a.soft_cap == 0;
        bool done = false;
        if (plain) {
            scale_products(buffer);
            weigh<eights>(added);
            done = !__any_sync(all_lanes, !(added[0] <= most_weight && added[1] <= most_weight));
        }
        if (!done) {
            if (plain) repeat_products(buffer);
            scale_products(buffer);
            if (wide.call.a.soft_cap != 0) cap<eights>();
            if (mixed) {
                const int tile = int((int64_t(blockIdx.x) * wide.call.plan.chunk_rows + at) / tile_rows);
                apply_mask<0>(MaskRows(wide.call.a), wide.arrays.seen, wide.arrays.words, tile);
                apply_mask<2 * eights>(MaskRows(wide.call.a), wide.arrays.seen, wide.arrays.words, tile + 1);
            }
            raise_references<eights>(correction);
            sum[0] *= correction[0];
            sum[1] *= correction[1];
            weigh<eights>(added);
        }
        sum[0] += added[0];
        sum[1] += added[1];
        return !done;
    }

    // Adds the thread block's tiles of the rows of an exact window, but those that no column of the warpgroup sees.
    __device__ __forceinline__ void add_exact_rows(Turn & turn) {
        const WideArrays & x = wide.arrays;
        const Attention & a = wide.call.a;
        const AttentionPlan & p = wide.call.plan;
        const int first = place.first_column / p.group,
                  last = min((place.first_column + group_columns - 1) / p.group, a.tokens - 1);
        const SeenTiles * from = x.exact_seen + int64_t(place.stream % a.exact.mask_streams) * a.exact.mask_heads *
                                                    a.tokens * x.exact_words;
        int word = -1, taken = 0; // by this warpgroup, if the warpgroups take tiles in turn
        SeenTiles seen = {0, 0};
#pragma unroll 1
        for (int tile = blockIdx.x; tile < x.exact_tiles; tile += p.chunks) {
            if (tile / 32 != word) {
                word = tile / 32;
                seen = {0, 0};
                for (int head = 0; head < a.exact.mask_heads; ++head)
                    for (int token = first + place.lane; token <= last; token += 32) {
                        const SeenTiles one = from[(int64_t(head) * a.tokens + token) * x.exact_words + word];
                        seen.some |= one.some;
                        seen.mixed |= one.mixed;
                    }
            }
            const bool some = __any_sync(all_lanes, seen.some >> tile % 32 & 1),
                       mixed = __any_sync(all_lanes, seen.mixed >> tile % 32 & 1);
            if (some && (p.row_tiles == 1 || taken == place.group)) add_exact_tile(turn, tile, mixed);
            else wait_for_phase(memory.full(turn.buffer), turn.parity);
            taken = taken + 1 == column_groups ? 0 : taken + 1;
            release(turn.buffer);
            turn.go_on();
        }
    }

    __device__ __forceinline__ void add_exact_tile(const Turn & turn, int tile, bool mixed) {
        const WideArrays & x = wide.arrays;
        uint32_t query[D / 16][4];
        const uint4 * queries =
            reinterpret_cast<const uint4 *>(x.exact_queries) + prepared_column() * (D / 8) + place.in_quad;
#pragma unroll
        for (int i = 0; i < D / 32; ++i) { // ExactPlace says which elements these are
            const uint4 q0 = queries[4 * i], q1 = queries[D + 4 * i];
            const uint32_t both[8] = {q0.x, q1.x, q0.y, q1.y, q0.z, q1.z, q0.w, q1.w};
#pragma unroll
            for (int j = 0; j < 8; ++j) query[2 * i + j / 4][j % 4] = both[j];
        }
        constexpr int eights = tile_rows / 8, half_tile = tile_rows * 128; // half_tile: bytes of 64 values of each row
        const uint32_t keys = key_matrix(memory.address + Memory::keys_at(0)) + turn.buffer * (Memory::expanded / 16),
                       values = value_matrix(memory.address + Memory::values_at(0), half_tile) +
                                turn.buffer * (Memory::expanded / 16);
        wait_for_phase(memory.full(turn.buffer), turn.parity);
        products_fence();
        multiply_exact<true>(score, query[0], matrix_descriptor(keys));
#pragma unroll
        for (int i = 1; i < D / 16; ++i)
            multiply_exact<false>(score, query[i], matrix_descriptor(keys + i / 4 * (half_tile / 16) + i % 4 * 2));
        products_commit();
        products_wait<0>();
        keep_registers(score);
#pragma unroll
        for (int i = 0; i < 4 * eights; ++i) score[i] *= score_unit;
        if (wide.call.a.soft_cap != 0) cap<eights>();
        if (mixed) apply_mask<0>(MaskRows(wide.call.a.exact, wide.call.a.tokens), x.exact_seen, x.exact_words, tile);
        float added[2], correction[2];
        raise_references<eights>(correction);
        if (__any_sync(all_lanes, correction[0] != 1.0f || correction[1] != 1.0f)) correct_output(correction);
        weigh<eights>(added);
        sum[0] = sum[0] * correction[0] + added[0];
        sum[1] = sum[1] * correction[1] + added[1];
        round_weights<eights>();
        keep_registers(output);
        keep_registers(weight[0]);
        keep_registers(weight[1]);
        products_fence();
#pragma unroll
        for (int i = 0; i < tile_rows / 16; ++i)
            multiply_values(output, weight[i], matrix_descriptor(values + 128 * i));
        products_commit();
        products_wait<0>();
        keep_registers(output);
    }

    __device__ __forceinline__ void release(int buffer) const {
        const int cluster = wide.call.plan.cluster;
        __syncwarp();
        if (cluster == 1 && place.lane == 0) arrive(memory.empty(buffer));
        if (cluster > 1 && place.lane < cluster) arrive_mapped(map_to(memory.empty(buffer), place.lane));
    }

    // Adds all steps that a column of the thread block sees. `info` is that of the first one.
    __device__ __forceinline__ void add_all(int info, Turn & turn) {
#pragma unroll 1
        while (info != no_step) {
            if (!sees(info, place.group)) {
                wait_for_phase(memory.full(turn.buffer), turn.parity);
                info = memory.infos[turn.buffer];
                release(turn.buffer);
                turn.go_on();
                continue;
            }
#pragma unroll
            for (int i = 0; i < hopper_rows / 4; ++i) weight[i / 4][i % 4] = 0;
            int buffer = turn.buffer; // whose output is added next; at first zeros
            // The tensor cores compute the products of a step, and add the step before it to the output while the warps
            // compute weights from the products. The other warpgroup's products overlap these.
#pragma unroll 1
            do {
                wait_for_phase(memory.full(turn.buffer), turn.parity);
                keep_registers(output);
                products_fence();
                start_products(turn.buffer);
                products_commit();
                start_output(buffer);
                products_commit();
                const int next = memory.infos[turn.buffer];
                products_wait<1>();
                keep_registers(products);
                float correction[2]; // of the output, if references were raised
                const bool raised = weigh_step(turn.buffer, first_row(info), mixed(info, place.group), correction);
                products_wait<0>();
                keep_registers(output);
                if (raised) correct_output(correction);
                if (buffer != turn.buffer) release(buffer);
                round_weights<eights>();
#pragma unroll
                for (int i = 0; i < hopper_rows / 16; ++i) keep_registers(weight[i]);
                buffer = turn.buffer;
                turn.go_on();
                info = next;
            } while (sees(info, place.group));
            keep_registers(output);
            products_fence();
            start_output(buffer);
            products_commit();
            products_wait<0>();
            keep_registers(output);
            release(buffer);
        }
    }

    // What the second warpgroup gives to the first one if both have the same columns.
    struct Results {
        float4 output[D / 8][warpgroup];
        float4 states[warpgroup]; // of both columns: reference and sum
    };
    static_assert(column_groups == 2 && sizeof(Results) <= hopper_buffers * Memory::expanded, "they replace the rows");

    // Adds the results of the second warpgroup to those of the first one.
    __device__ __forceinline__ void merge_groups() {
        constexpr int barrier = 1;
        const int thread = 32 * place.warp + place.lane;
        Results & results = *reinterpret_cast<Results *>(memory.base);
        sync_groups(barrier, column_groups); // both have used the rows
        if (place.group == 1) {
#pragma unroll
            for (int n = 0; n < D / 8; ++n)
                results.output[n][thread] =
                    make_float4(output[4 * n], output[4 * n + 1], output[4 * n + 2], output[4 * n + 3]);
            results.states[thread] = make_float4(reference[0], sum[0], reference[1], sum[1]);
        }
        sync_groups(barrier, column_groups);
        if (place.group == 1) return;
        const float4 states = results.states[thread];
        float own[2], other[2]; // factors
#pragma unroll
        for (int c = 0; c < 2; ++c) {
            const float before = reference[c], others = c ? states.z : states.x;
            reference[c] = fmaxf(before, others);
            own[c] = exp2f(before - reference[c]);
            other[c] = exp2f(others - reference[c]);
            sum[c] = sum[c] * own[c] + (c ? states.w : states.y) * other[c];
        }
#pragma unroll
        for (int n = 0; n < D / 8; ++n) {
            const float4 four = results.output[n][thread];
            output[4 * n] = output[4 * n] * own[0] + four.x * other[0];
            output[4 * n + 1] = output[4 * n + 1] * own[0] + four.y * other[0];
            output[4 * n + 2] = output[4 * n + 2] * own[1] + four.z * other[1];
            output[4 * n + 3] = output[4 * n + 3] * own[1] + four.w * other[1];
        }
    }

    __device__ __forceinline__ void add_sums() {
#pragma unroll
        for (int c = 0; c < 2; ++c) {
            sum[c] += __shfl_xor_sync(all_lanes, sum[c], 1);
            sum[c] += __shfl_xor_sync(all_lanes, sum[c], 2);
        }
    }

    // The lane's first element in unit 0; it has the next one, too, and both at the same places of the other units.
    static __device__ __forceinline__ int first_element(const Place & place) {
        return place.in_quad / 2 * 16 + place.in_quad % 2 * 2;
    }

    // Finishes the query rows, if the thread block has all their rows of K and V: adds the sinks, divides by the sums,
    // rotates the values back, and stores them.
    __device__ __forceinline__ void finish() {
        const AttentionCall & call = wide.call;
        const Place place(call);
        add_sums();
        int64_t row[2];
#pragma unroll
        for (int c = 0; c < 2; ++c) {
            const bool exists = place.column(c) < call.plan.columns;
            row[c] = exists ? query_row(call, place.stream, place.kv_head, place.column(c)) : -1;
            const SoftmaxState own = {reference[c], sum[c]},
                               sink = sink_state(exists ? call.a.sinks : nullptr, int(row[c] % call.a.heads));
            MergedSum all(fmaxf(own.largest, sink.largest));
            float factor = all.add(own);
            all.add(sink);
            factor *= all.sum == 0 ? 0.0f : value_unit<TV> / all.sum; // zeros if no row was seen; a NaN stays NaN
#pragma unroll
            for (int n = 0; n < D / 8; ++n)
#pragma unroll
                for (int i = 0; i < 2; ++i) {
                    float & x = output[4 * n + 2 * c + i];
                    x = flip_sign((saw_rows(own) ? x : 0.0f) * factor, s2_word(n / 4) >> first_element(place),
                                  n % 4 * 4 + i);
                }
        }
        // The bits of an index of `output` are those of the element, except for the columns', and those of the lane.
#pragma unroll
        for (int h = 1; h < D / 2; h *= 2) {
            if (h == 2) continue;
#pragma unroll
            for (int i = 0; i < D / 2; ++i)
                if (!(i & h)) {
                    const float a = output[i], b = output[i + h];
                    output[i] = a + b;
                    output[i + h] = a - b;
                }
        }
        const bool upper = place.in_quad & 1;
        const float sign1 = upper ? -1.0f : 1.0f, sign2 = place.in_quad & 2 ? -1.0f : 1.0f;
#pragma unroll
        for (int i = 0; i < D / 2; ++i)
            output[i] = sign2 * output[i] + __shfl_xor_sync(all_lanes, output[i], 2);
        // Two lanes have two elements each of all fours. Each takes every other four, so that they store whole sectors.
        const int first = place.in_quad / 2 * 16 + place.in_quad % 2 * 4;
#pragma unroll
        for (int c = 0; c < 2; ++c)
#pragma unroll
            for (int n = 0; n < D / 8; n += 2) {
                float four[4];
#pragma unroll
                for (int i = 0; i < 2; ++i) {
                    const float low = output[4 * n + 2 * c + i], high = output[4 * n + 4 + 2 * c + i];
                    const float own = upper ? high : low,
                                other = __shfl_xor_sync(all_lanes, upper ? low : high, 1);
                    four[i] = own + other;
                    four[2 + i] = sign1 * (own - other);
                }
#pragma unroll
                for (int i = 0; i < 4; ++i)
                    four[i] = flip_sign(four[i] * Block<D>::one_over_sqrt_n, s1_word(n / 4) >> first, n % 4 * 4 + i);
                if (row[c] >= 0)
                    *reinterpret_cast<float4 *>(call.a.dst + row[c] * D + value_element(n) + first) =
                        make_float4(four[0], four[1], four[2], four[3]);
            }
    }

    // Stores the results for merge_kernel, which reads no values of columns that have seen no row.
    __device__ __forceinline__ void store() {
        const AttentionCall & call = wide.call;
        const Place place(call);
        constexpr float to_value = value_unit<TV>;
        add_sums();
#pragma unroll
        for (int c = 0; c < 2; ++c) {
            if (place.column(c) >= call.plan.columns) continue;
            const int64_t row = query_row(call, place.stream, place.kv_head, place.column(c));
            const int64_t at = row * call.plan.parts + blockIdx.x;
            if (place.in_quad == 0) call.states[at] = {reference[c], sum[c]};
            if (reference[c] == nothing_seen) continue;
            float * to = call.partial + at * D + first_element(place);
#pragma unroll
            for (int n = 0; n < D / 8; ++n)
                *reinterpret_cast<float2 *>(to + value_element(n)) =
                    make_float2(output[4 * n + 2 * c] * to_value, output[4 * n + 2 * c + 1] * to_value);
        }
    }
};

// ---- the kernel

// Merged: whether another kernel merges the results. A choice at run time makes the loop over the rows 1% slower.
template <KV TK, KV TV, int D, bool Merged>
__global__ void __launch_bounds__(hopper_threads, 1) hopper_kernel(const __grid_constant__ WideCall wide) {
#if TURBOQUANT_WGMMA
    extern __shared__ __align__(16) uint8_t shared[];
    __shared__ int infos[hopper_buffers + 1]; // see hopper_kernel_of
    const AttentionCall & call = wide.call;
    using Memory = HopperMemory<D>;
    const HopperPlace place(call);
    const Memory memory(call.plan, shared, infos);
    if (threadIdx.x == 0) {
#pragma unroll
        for (int i = 0; i < hopper_buffers; ++i) { // lanes 0 arrive
            start_barrier(memory.full(i), warpgroup / 32);
            start_barrier(memory.empty(i), call.plan.cluster * place.groups * warpgroup / 32);
        }
    }
    uint32_t * constants = reinterpret_cast<uint32_t *>(memory.base + Memory::constants_at());
    for (int i = threadIdx.x; i < Memory::constants / 4; i += hopper_threads) constants[i] = constant_byte * 0x01010101;
    publish_writes();
    wait_for_previous();
    let_next_start(); // now what the next kernel stores is complete, and the slots of a window have been read
    const int first_tile = int(place.begin / tile_rows % 32);
    const int words = (first_tile + (place.length + tile_rows - 1) / tile_rows + 31) / 32;
    collect_steps(wide, place, memory, words);
    const Steps steps = {call.plan.cluster > 1 ? memory.cluster_seen(words) : memory.seen(words),
                         memory.group_seen(),
                         words,
                         first_tile,
                         place.length,
                         call.plan.row_tiles > 1};
    if (threadIdx.x == 0) infos[hopper_buffers] = steps.info(steps.next(-hopper_rows));
    __syncthreads();
    if (place.group < 0) {
        leave_registers<expanding_registers>();
        HopperRows<TK, TV, D>(wide, place, memory, keep(place.lane) ^ place.lane).expand_all(steps);
    } else if (place.group < place.groups) {
        take_registers<column_registers>();
        HopperColumns<TK, TV, D> columns(wide, place, memory);
        Turn turn;
        if (call.a.windowed) columns.add_exact_rows(turn);
        columns.load_queries();
        columns.add_all(infos[hopper_buffers], turn);
        if (call.plan.row_tiles > 1) columns.merge_groups();
        if (call.plan.row_tiles == 1 || place.group == 0) {
            if constexpr (Merged) columns.store();
            else columns.finish();
        }
    }
    if (call.plan.cluster > 1) sync_cluster();
#endif
}

} // namespace

// The kernel for a pair of types, or nullptr if there is none. merged: whether its results are merged, as in the plan.
WideKernel hopper_kernel_128(KV type_k, KV type_v, bool merged);

namespace {

template <int D> WideKernel hopper_kernel_for(KV type_k, KV type_v, bool merged) {
    return kernel_for_pair<D>(type_k, type_v, [merged](auto k, auto v) -> WideKernel {
        if constexpr (Kind<k()>::turbo && Kind<v()>::turbo)
            return merged ? hopper_kernel<k(), v(), D, true> : hopper_kernel<k(), v(), D, false>;
        else return nullptr;
    });
}

} // namespace

} // namespace cuda
} // namespace turboquant

#endif
