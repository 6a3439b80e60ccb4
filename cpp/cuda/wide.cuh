// The kernel template for attention of many query tokens (prefill, batches of several requests). wide.cu prepares the
// queries and launches calls; the instances of the template are compiled in files of their own.
//
// A thread block takes a tile of the query columns of a KV head (query heads times tokens) and a run of KV rows. It
// copies encoded rows to shared memory with cp.async (load.cuh) and expands each row once: K to int8 levels, V to
// binary16 values. All columns of the block use the expanded rows as operands of the tensor cores. Scores are products
// of int8 matrices, output is the product of binary16 weights and V. K in q8_0 or binary16, whose own error is small,
// is expanded to binary16 instead, and so are its queries.
//
// The warps that have the same rows, and different columns, are a row group. A warp with one operand of columns needs
// few registers, so that a thread block has 16 warps, and row groups are separate: each copies and expands rows of its
// own, and waits for no other. Otherwise eight warps share two buffers of expanded rows; half of them expand rows
// while the others multiply.
//
// The rows of an exact window are prepared as binary16 values. The warps read them from global memory, in the order of
// the operands, and add them to their columns after the rows of the cache.
//
// Operand A has the columns, 16 in a tile, of which a warp has one or two. Operand B has the rows. A lane has rows
// 2 * in_quad and 2 * in_quad + 1 of eight for the columns `quad` and quad + 8 of a tile, and values 2 * in_quad and
// 2 * in_quad + 1 of eight of their output.
#ifndef TURBOQUANT_CUDA_WIDE_H
#define TURBOQUANT_CUDA_WIDE_H

#include "mma.cuh"

#include <type_traits>

namespace turboquant {
namespace cuda {

constexpr int wide_columns = 16;         // of an operand
constexpr int wide_alignment = 512;      // of the expanded rows, so that bits of an address are the unit
constexpr int seen_rows = 32 * tile_rows; // rows of a word of SeenTiles

// What a row of a mask says about 32 tiles of tile_rows rows: a bit for each tile.
struct __align__(8) SeenTiles {
    uint32_t some;  // the query sees a row of the tile
    uint32_t mixed; // the mask is not zero everywhere in the tile
};

// The arrays that prepare_kernel fills.
struct WideArrays {
    int8_t * queries;      // [stream][KV head][column of all column tiles][head], in the order of operand_position
    float * factors;       // [stream][KV head][column of all column tiles]: from products to scores, times log2e
    SeenTiles * seen;      // [stream of the mask][head of the mask][token][words], or nullptr without a mask
    int words;             // of a row of the mask
    // With an exact window, or if K is expanded to binary16: [stream][KV head][column of all column tiles][head], in
    // binary16 and not rotated.
    uint16_t * exact_queries;
    // With an exact window. Its rows fill whole tiles; those behind the last one are zero. In a tile, the kernel for
    // Hopper GPUs has the order of ExactPlace instead.
    uint16_t * exact_k;       // binary16 [KV stream][KV head][row][head], not rotated
    uint16_t * exact_v;       // binary16 [KV stream][KV head][tile][head][row in the order of value_position]
    SeenTiles * exact_seen;   // as `seen`, of the window's mask
    int exact_words, exact_tiles;
};

struct WideCall {
    AttentionCall call;
    WideArrays arrays;
    float value_unit;   // that of the sums of the output
    bool rotated_values; // whether V has a type whose values are rotated
    float least_weight; // of a tile whose V counts, as a score relative to the reference of WideColumns
};

namespace {

// ---- operands

// The place of element e of a query among the bytes of its column: that of the elements in expanded rows of K. In the
// levels of a unit, elements of the first and of the second half of a block alternate.
template <KV TK, int D> __device__ __forceinline__ int operand_position(int e) {
    using L = Layout<TK, D>;
    constexpr int N = L::block;
    if constexpr (!L::turbo) return e;
    const int in_block = e % N;
    return e - in_block + 2 * (in_block % (N / 2)) + in_block / (N / 2);
}

// Four 8 x 8 matrices of 16-bit words (or rows of 16 bytes) from shared memory. Lane i has the address of row i % 8 of
// matrix i / 8.
__device__ __forceinline__ void load_matrices(uint32_t (&x)[4], uint32_t address) {
#if __CUDA_ARCH__ >= 800
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(x[0]), "=r"(x[1]), "=r"(x[2]), "=r"(x[3])
                 : "r"(address)
                 : "memory");
#endif
}
__device__ __forceinline__ void load_transposed(uint32_t (&x)[4], uint32_t address) {
#if __CUDA_ARCH__ >= 800
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(x[0]), "=r"(x[1]), "=r"(x[2]), "=r"(x[3])
                 : "r"(address)
                 : "memory");
#endif
}

// Expanded rows are units of 16 bytes. The unit with number u of row r is in place u ^ unit_swizzle(r), so that the
// same unit of eight rows, and four units of two rows, lie in different banks. Rows of 64 bytes have four units.
template <int Bytes> __device__ __forceinline__ int unit_swizzle(int row) {
    return (Bytes >= 128 ? (row & 1) << 2 : 0) | (row >> 1 & 3);
}

// An int32 that starts as these bits, and to which an integer is added, is the float magic + this integer.
constexpr int magic_bits = 0x4b400000;

// The levels of the four indices in the low 16 bits of `nibbles`, as int8 or, if Biased, plus 128 as unsigned bytes.
template <typename LookUp, bool Biased>
__device__ __forceinline__ uint32_t whole_levels(const LookUp & look_up, uint32_t nibbles, uint32_t signs,
                                                 int sign_bit) {
    uint32_t part[LookUp::parts];
    look_up(nibbles, signs, sign_bit, part);
    if constexpr (LookUp::parts == 1 && !Biased) return part[0];
    const uint32_t biased = biased_levels(part);
    return Biased ? biased : biased ^ four_biases;
}

// The levels of four units of a block. Words 2 i and 2 i + 1 have nibbles 0-3 and 4-7 of unit i. Units 0 and 1 have the
// four elements from 4 * first and from 4 * (first + apart) on, and those half a block further on; units 2 and 3 those
// a quarter of a block further on.
template <KV T, int D, bool Biased, typename LookUp>
__device__ __forceinline__ void read_levels(const uint8_t * block, int first, int apart, const LookUp & look_up,
                                            uint32_t (&x)[8]) {
    using L = Layout<T, D>;
    constexpr int N = L::block;
    const auto levels = [&](uint32_t nibbles, uint32_t signs, int sign_bit) {
        return whole_levels<LookUp, Biased>(look_up, nibbles, signs, sign_bit);
    };
    if constexpr (L::nibbles) {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            const uint8_t * unit = block + 2 + 4 * (first + i % 2 * apart + N / 16 * (i / 2));
            x[2 * i] = levels(load_u16(unit), 0, 0);
            x[2 * i + 1] = levels(load_u16(unit + 2), 0, 0);
        }
    } else {
#pragma unroll
        for (int i = 0; i < 2; ++i) {
            const Crumbs<typename L::BlockFormat> crumbs(block + 2, first + i * apart);
#pragma unroll
            for (int field = 0; field < 2; ++field) {
                const Unit unit = crumbs.unit(field);
                x[2 * (i + 2 * field)] = levels(unit.nibbles, unit.signs, unit.sign_bit);
                x[2 * (i + 2 * field) + 1] =
                    levels(shift_right(unit.nibbles, 16), shift_right(unit.signs, 16), unit.sign_bit);
            }
        }
    }
}

// Two bytes of a word of levels + 128, as binary16 level / 128 * scale. Byte 0x48 above such a byte gives 8 + byte /
// 128.
__device__ __forceinline__ uint32_t scaled_halves(uint32_t levels, uint32_t selector, half2 scale) {
    const uint32_t bits = prmt(levels, four_biases - 0x38383838u, selector); // 0x48484848
    const half2 nine = __floats2half2_rn(9.0f, 9.0f);
    const half2 product = __hmul2(__hsub2(*reinterpret_cast<const half2 *>(&bits), nine), scale);
    return *reinterpret_cast<const uint32_t *>(&product);
}
// Byte 4 of the operands of scaled_halves is 0x48.
constexpr uint32_t even_bytes = 0x4240, odd_bytes = 0x4341, low_bytes = 0x4140, high_bytes = 0x4342;

// Expands 32 values of q8_0 or of binary16 to four units of binary16. Returns whether all are finite; those of a block
// of q8_0 are zero otherwise.
template <KV T> __device__ __forceinline__ bool expand_values(const uint8_t * block, uint4 (&x)[4]) {
    uint32_t words[16];
    bool finite = true;
    if constexpr (T == KV::f16) {
#pragma unroll
        for (int i = 0; i < 16; ++i) {
            words[i] = reinterpret_cast<const uint32_t *>(block)[i];
            finite = finite && (words[i] & 0x7c00) != 0x7c00 && (words[i] & 0x7c000000) != 0x7c000000;
        }
    } else {
        const float unit = 128 * load_half(block); // of level / 128
        finite = fabsf(unit) <= 65504.0f;
        const half2 scale = __floats2half2_rn(finite ? unit : 0.0f, finite ? unit : 0.0f);
#pragma unroll
        for (int i = 0; i < 8; ++i) {
            const uint32_t levels = load_u32(block + 2 + 4 * i) ^ four_biases;
            words[2 * i] = scaled_halves(levels, low_bytes, scale);
            words[2 * i + 1] = scaled_halves(levels, high_bytes, scale);
        }
    }
#pragma unroll
    for (int i = 0; i < 4; ++i) x[i] = make_uint4(words[4 * i], words[4 * i + 1], words[4 * i + 2], words[4 * i + 3]);
    return finite;
}

// The sums of the output are in this unit, because expanded rows have level / 128 instead of level * step.
template <KV T> constexpr float value_unit = Kind<T>::turbo ? 128 * Kind<T>::step : 1;

// The place of row r of a tile among the 32 values of an element of exact V: eight values are those of a lane of a
// quad.
__device__ __forceinline__ int value_position(int r) { return r % 8 / 2 * 8 + r / 8 * 2 + r % 2; }

// A mask: that of the rows of the cache, or that of the rows of an exact window.
struct MaskRows {
    const char * base; // nullptr: all rows are seen
    int64_t token, head, stream; // strides
    int heads, streams;
    int64_t rows; // rows from here on are hidden

    __device__ __forceinline__ explicit MaskRows(const Attention & a)
        : base(static_cast<const char *>(a.mask)), token(a.mask_token), head(a.mask_head), stream(a.mask_stream),
          heads(a.mask_heads), streams(a.mask_streams), rows(a.n_kv) {}
    __device__ __forceinline__ MaskRows(const ExactRows & x, int tokens)
        : base(static_cast<const char *>(x.mask)), token(x.mask_token), head(x.mask_head), stream(x.mask_stream),
          heads(x.mask_heads), streams(x.mask_streams), rows(x.slots + tokens) {}
    __device__ __forceinline__ const uint8_t * row(int of_token, int of_head, int of_stream) const {
        return reinterpret_cast<const uint8_t *>(base) + of_token * token + of_head % heads * head +
               of_stream % streams * stream;
    }
    // The number of the row in [stream][head][token].
    __device__ __forceinline__ int64_t number(int of_token, int of_head, int of_stream, int tokens) const {
        return (int64_t(of_stream % streams) * heads + of_head % heads) * tokens + of_token;
    }
};

// Operands that a warp has at most: the registers do not suffice for two with queries in binary16 or in heads of 256.
constexpr int most_operands(bool turbo_k, bool turbo_v, int head) { return turbo_k && turbo_v && head <= 128 ? 2 : 1; }

// Whether row groups are separate: whether 128 registers suffice for a warp, as many as a warp of 16 has.
constexpr bool separate_groups(bool turbo_k, int head, int operands) { return turbo_k && head <= 128 && operands == 1; }
__host__ __device__ constexpr int wide_warps(bool separate) { return separate ? 16 : 8; } // of a thread block, at most

// Bytes of an expanded row of K.
__host__ __device__ constexpr int wide_key_bytes(bool turbo, int head) { return turbo ? head : 2 * head; }

// ---- the share of a warp

// x, as a value that is known only here. What depends on it is not computed before a loop, where it would occupy
// registers.
__device__ __forceinline__ int here(int x) {
#ifdef __CUDA_ARCH__
    asm volatile("mov.b32 %0, %0;" : "+r"(x));
#endif
    return x;
}

// Waits for `threads` threads at a barrier from 1 to 15.
__device__ __forceinline__ void sync_named(int barrier, int threads) {
    asm volatile("bar.sync %0, %1;" ::"r"(barrier), "r"(threads) : "memory");
}

// What the loop over the rows needs seldom is computed when it is needed, because a warp has few registers left.
struct WidePlace {
    const AttentionCall & call;
    int lane, quad, in_quad, warp;
    int first_column; // of the warp
    int row_group;    // the warps of a row group have the same rows and different columns
    int group_warps;  // of a row group
    int length;       // the number of the thread block's KV rows

    __device__ __forceinline__ WidePlace(const AttentionCall & call, int warp_columns) : call(call) {
        const AttentionPlan & p = call.plan;
        lane = threadIdx.x % 32;
        quad = lane / 4;
        in_quad = lane % 4;
        warp = threadIdx.x / 32;
        group_warps = p.column_tile / warp_columns;
        row_group = keep(warp / group_warps);
        first_column = column_tile() * p.column_tile + in_group() * warp_columns;
        length = int(begin() + p.chunk_rows < call.a.n_kv ? p.chunk_rows : call.a.n_kv - begin());
    }
    __device__ __forceinline__ int in_group() const { return warp - row_group * group_warps; }
    // Waits for the warps of the row group.
    __device__ __forceinline__ void sync_group() const {
        if (group_warps == 1) __syncwarp();
        else sync_named(row_group + 1, 32 * group_warps);
    }
    __device__ __forceinline__ int column_tile() const { return blockIdx.y / call.a.kv_heads; }
    __device__ __forceinline__ int kv_head() const { return here(blockIdx.y) % call.a.kv_heads; }
    __device__ __forceinline__ int stream() const { return here(blockIdx.z); }
    __device__ __forceinline__ int kv_stream() const {
        const Attention & a = call.a;
        return a.streams == a.kv_streams ? stream() : stream() / (a.streams / a.kv_streams);
    }
    // The first KV row of the thread block, a multiple of the rows of a buffer.
    __device__ __forceinline__ int64_t begin() const { return int64_t(blockIdx.x) * call.plan.chunk_rows; }
};

// ---- shared memory

// Bytes of a buffer of expanded rows.
__host__ __device__ constexpr int expanded_bytes(int rows, bool turbo_k, int head, int key_blocks) {
    const int bytes = rows * (wide_key_bytes(turbo_k, head) + 2 * head + key_blocks * int(sizeof(float2)));
    return (bytes + wide_alignment - 1) / wide_alignment * wide_alignment;
}
// Bytes of a buffer of encoded rows.
__host__ __device__ constexpr int encoded_bytes(int rows, int pitch_k, int pitch_v) {
    return (rows * (pitch_k + pitch_v) + wide_alignment - 1) / wide_alignment * wide_alignment;
}

// The division of a thread block's shared memory. There are two buffers of encoded rows. Of expanded rows there is one
// if row groups are separate, because then some groups expand rows while others compute; otherwise there are two.
template <KV TK, KV TV, int D, int M> struct WideMemory {
    static constexpr bool separate = separate_groups(Kind<TK>::turbo, D, M);
    static constexpr int key_bytes = wide_key_bytes(Kind<TK>::turbo, D), value_bytes = 2 * D;
    static constexpr int key_blocks = Layout<TK, D>::turbo ? D / Layout<TK, D>::block : 1; // that have factors
    static constexpr int buffers = separate ? 1 : 2; // of expanded rows
    int rows; // of a buffer
    int expanded, encoded_k, encoded; // bytes of a buffer of expanded rows, of encoded rows of K, of encoded rows
    uint8_t *start, *behind;          // of the memory of all rows; start is aligned to a row of V
    uint8_t * base;                   // of the memory of the row group, or of all

    __device__ __forceinline__ WideMemory(const AttentionPlan & p, uint8_t * shared, int row_group)
        : rows(p.buffer_rows), expanded(expanded_bytes(p.buffer_rows, Kind<TK>::turbo, D, key_blocks)),
          encoded_k(p.buffer_rows * p.pitch_k), encoded(encoded_bytes(p.buffer_rows, p.pitch_k, p.pitch_v)) {
        const int bytes = buffers * expanded + 2 * encoded;
        start = shared + (-int(__cvta_generic_to_shared(shared)) & (wide_alignment - 1));
        behind = start + (separate ? p.row_tiles * bytes : bytes);
        base = start + (separate ? row_group * bytes : 0);
    }
    __device__ __forceinline__ uint8_t * keys(int buffer) const { return base + buffer * expanded; }
    __device__ __forceinline__ uint8_t * values(int buffer) const { return keys(buffer) + rows * key_bytes; }
    // The factors from products to scores without the factor of the query, and -magic times these: [block][row].
    __device__ __forceinline__ float2 * key_factors(int buffer) const {
        return reinterpret_cast<float2 *>(values(buffer) + rows * value_bytes);
    }
    __device__ __forceinline__ uint8_t * encoded_rows(int buffer) const {
        return base + buffers * expanded + buffer * encoded;
    }
    // Tiles that a column of the block sees, then those of the columns of each warp.
    __device__ __forceinline__ uint32_t * seen() const { return reinterpret_cast<uint32_t *>(behind); }
    __device__ __forceinline__ SeenTiles * warp_seen(int words) const {
        return reinterpret_cast<SeenTiles *>(seen() + (words + 1) / 2 * 2);
    }
};

// ---- rows

// Copies rows of a KV head to shared memory, and expands them.
template <KV TK, KV TV, int D, int M> struct WideRows {
    using LK = Layout<TK, D>;
    using LV = Layout<TV, D>;
    using Memory = WideMemory<TK, TV, D, M>;
    static constexpr int lanes = D / 32, rows_at_once = 32 / lanes; // lanes of a row
    const AttentionCall & call;
    const WidePlace & place;
    const Memory & memory;
    // Lanes that copy a row of K or of V, 16 bytes each.
    static constexpr int copied = LK::bytes > LV::bytes ? LK::bytes : LV::bytes;
    static constexpr int copy_lanes = copied + 30 <= 128 ? 8 : copied + 30 <= 256 ? 16 : 32;
    const uint8_t *k, *v; // row 0
    // Half of the warps copy K, the others V. If the addresses of the rows are equal modulo 16, a lane copies the same
    // part of each of its rows, as long as there are rows behind, whose bytes may be read.
    const uint8_t * first; // the part of the lane's first row
    int first_at;          // its place in a buffer, or -1 if the lane has no part
    int regular;           // rows that are copied so, if addresses are equal modulo 16

    __device__ __forceinline__ WideRows(const AttentionCall & call, const WidePlace & place, const Memory & memory)
        : call(call), place(place), memory(memory) {
        const Attention & a = call.a;
        k = static_cast<const uint8_t *>(a.k) + place.kv_stream() * a.k_stream + place.kv_head() * a.k_head;
        v = static_cast<const uint8_t *>(a.v) + place.kv_stream() * a.v_stream + place.kv_head() * a.v_head;
        const Side of = side(warp() & 1);
        const int row = copier() / copy_lanes, unit = copier() % copy_lanes * 16;
        const int offset = int(reinterpret_cast<uintptr_t>(of.base) & 15);
        first = of.base - offset + (place.begin() + row) * of.stride + unit;
        regular = place.length - (place.begin() + place.length == a.n_kv);
        if (copied + 15 > 16 * copy_lanes || warps() == 1 || of.stride % 16 != 0 || of.stride >= 1 << 24) regular = 0;
        first_at = unit < offset + of.chunk ? (warp() & 1 ? memory.encoded_k : 0) + row * of.pitch + unit : -1;
    }

    // The warps that copy and expand rows together, and the number of the lane's warp among them.
    __device__ __forceinline__ int warps() const { return Memory::separate ? place.group_warps : wide_warps(false); }
    __device__ __forceinline__ int warp() const { return Memory::separate ? place.in_group() : place.warp; }
    // The number of the thread among those that copy K, or among those that copy V.
    __device__ __forceinline__ int copier() const { return 32 * (warp() >> 1) + place.lane; }
    __device__ __forceinline__ Side side(bool of_v) const {
        const Attention & a = call.a;
        const AttentionPlan & p = call.plan;
        return of_v ? Side{v, a.v_row, LV::bytes, p.pitch_v} : Side{k, a.k_row, LK::bytes, p.pitch_k};
    }

    // Starts to copy the rows from `at` on, unless they are behind the last one of the thread block.
    __device__ __forceinline__ void load(int at, int buffer) const {
        const Attention & a = call.a;
        if (at < place.length) {
            const uint32_t to = uint32_t(__cvta_generic_to_shared(memory.encoded_rows(buffer)));
            const int both = warps() == 1; // a single warp copies K and V
            const unsigned thread = both ? place.lane : copier(), threads = both ? 32 : 16 * warps();
            if (at + memory.rows <= regular) copy_own(to, at);
            else
#pragma unroll 1
                for (int of_v = both ? 0 : warp() & 1; of_v < 2; of_v += 2 - both)
                    load_rows(to + (of_v ? memory.encoded_k : 0), side(of_v), memory.rows, place.begin() + at, a.n_kv,
                              {thread, threads});
        }
        copy_commit();
    }
    __device__ __forceinline__ void copy_own(uint32_t to, int at) const {
        if (first_at < 0) return;
        const bool of_v = warp() & 1;
        const uint32_t stride = uint32_t(of_v ? call.a.v_row : call.a.k_row);
        const int pitch = of_v ? call.plan.pitch_v : call.plan.pitch_k, apart = 16 * warps() / copy_lanes;
        const uint8_t * from = first + uint64_t(uint32_t(at)) * stride;
        to += first_at;
#pragma unroll 4
        for (int r = 0; r < memory.rows; r += apart, from += apart * stride, to += apart * pitch)
            copy_async(to, from, 16);
    }

    // Expands the rows from `at` on.
    __device__ __forceinline__ void expand(int at, int from, int to) const {
        const int part = place.lane % lanes; // of a row: 32 values
        const uint32_t first = uint32_t(place.begin() + at);
        const uint32_t k_low = uint32_t(reinterpret_cast<uintptr_t>(k)) + first * uint32_t(call.a.k_row),
                       v_low = uint32_t(reinterpret_cast<uintptr_t>(v)) + first * uint32_t(call.a.v_row);
        const uint8_t *encoded_k = memory.encoded_rows(from), *encoded_v = encoded_k + memory.encoded_k;
        uint8_t *keys = memory.keys(to), *values = memory.values(to);
        float2 * factors = memory.key_factors(to);
        const uint32_t zero = unknown_zero(); // so that constants stay in registers, but only here
        const typename LK::LookUpLevels look_up_k(zero);
        const typename LV::LookUpLevels look_up_v(zero);
        const uint32_t even = even_bytes ^ zero, odd = odd_bytes ^ zero;
#pragma unroll 1
        for (int r = warp() * rows_at_once + place.lane / lanes; r < memory.rows; r += warps() * rows_at_once) {
            const uint8_t * row_k = encoded_k + r * call.plan.pitch_k + row_offset(k_low, uint32_t(call.a.k_row), r);
            const uint8_t * row_v = encoded_v + r * call.plan.pitch_v + row_offset(v_low, uint32_t(call.a.v_row), r);
            uint4 *to_k = reinterpret_cast<uint4 *>(keys + r * Memory::key_bytes),
                  *to_v = reinterpret_cast<uint4 *>(values + r * Memory::value_bytes);
            const int swizzle_k = unit_swizzle<Memory::key_bytes>(r), swizzle_v = unit_swizzle<Memory::value_bytes>(r);
            float scale_k = 1;
            bool finite_k = true; // of a turbo type, scale_k says so
            if constexpr (LK::turbo) {
                constexpr int parts = LK::block / 32;
                const uint8_t * block = row_k + part / parts * LK::block_bytes;
                uint32_t x[8];
                read_levels<TK, D, false>(block, 2 * (part % parts), 1, look_up_k, x);
                scale_k = LK::load_block_scale(block) * LK::step;
                const int unit = part / parts * (LK::block / 16) + part % parts;
                to_k[unit ^ swizzle_k] = make_uint4(x[0], x[1], x[2], x[3]);
                to_k[(unit + parts) ^ swizzle_k] = make_uint4(x[4], x[5], x[6], x[7]);
            } else {
                uint4 x[4];
                finite_k = expand_values<TK>(row_k + part * LK::block_bytes, x);
#pragma unroll
                for (int i = 0; i < 4; ++i) to_k[(4 * part + i) ^ swizzle_k] = x[i];
            }
            bool finite;
            if constexpr (LV::turbo) {
                constexpr int parts = LV::block / 32;
                const uint8_t * block = row_v + part / parts * LV::block_bytes;
                uint32_t y[8];
                read_levels<TV, D, true>(block, 2 * (part % parts), 1, look_up_v, y);
                const float scale_v = LV::load_block_scale(block);
                finite = fabsf(scale_v) <= 65504.0f;
                const half2 scale = __floats2half2_rn(finite ? scale_v : 0.0f, finite ? scale_v : 0.0f);
#pragma unroll
                for (int i = 0; i < 2; ++i)
#pragma unroll
                    for (int h = 0; h < 2; ++h) {
                        const uint32_t bytes = h ? odd : even;
                        const int unit = part / parts * (LV::block / 8) + part % parts + parts * (i + 2 * h);
                        to_v[unit ^ swizzle_v] = make_uint4(
                            scaled_halves(y[4 * i], bytes, scale), scaled_halves(y[4 * i + 1], bytes, scale),
                            scaled_halves(y[4 * i + 2], bytes, scale), scaled_halves(y[4 * i + 3], bytes, scale));
                    }
            } else {
                uint4 x[4];
                finite = expand_values<TV>(row_v + part * LV::block_bytes, x);
                const uint4 zero = make_uint4(0, 0, 0, 0);
#pragma unroll
                for (int i = 0; i < 4; ++i) to_v[(4 * part + i) ^ swizzle_v] = finite ? x[i] : zero;
            }
            // A product of a hidden weight, which is zero, and a value that is not finite would be NaN. So such a value
            // makes the score NaN instead, which the mask replaces.
            finite = finite && finite_k;
            if constexpr (!LK::turbo || !LV::turbo || LV::block < D) {
                const uint32_t of_row = ((1u << lanes) - 1) << (place.lane - part);
                finite = (__ballot_sync(all_lanes, finite) & of_row) == of_row;
            }
            constexpr int apart = lanes / Memory::key_blocks; // lanes that have a block of K
            if (part % apart == 0) {
                const float factor = finite ? scale_k : __uint_as_float(0x7fc00000);
                factors[part / apart * memory.rows + r] = make_float2(factor, LK::turbo ? -magic * factor : 0.0f);
            }
        }
    }
};

// ---- the columns of a warp

// Weights are relative to a reference, which is lowered_by below the largest score of the column when it was chosen. It
// stays until a score exceeds it by more than `headroom`. So weights fit into binary16, and small ones are not lost.
constexpr float lowered_by = 8, headroom = 15;

// The columns of a warp: M operands of 16. Arrays with 2 M elements have an element for each of the lane's columns.
template <KV TK, KV TV, int D, int M> struct WideColumns {
    using LK = Layout<TK, D>;
    using Memory = WideMemory<TK, TV, D, M>;
    static constexpr int products = Memory::key_bytes / 32; // that give a score: each takes 32 bytes of a row of K
    const WideCall & wide;
    const WidePlace & place;
    uint32_t query[M][products][4];
    float to_log2[2 * M];               // the factors of the queries
    float reference[2 * M], sum[2 * M]; // sum: over the lane's rows
    float output[M][D / 8][4] = {};

    __device__ __forceinline__ WideColumns(const WideCall & wide, const WidePlace & place) : wide(wide), place(place) {
#pragma unroll
        for (int c = 0; c < 2 * M; ++c) {
            to_log2[c] = wide.arrays.factors[prepared_column() + 8 * c];
            reference[c] = nothing_seen;
            sum[c] = 0;
        }
    }

    // The number of the lane's first column among those of all streams and KV heads.
    __device__ __forceinline__ int64_t prepared_column() const {
        const AttentionPlan & p = wide.call.plan;
        return (int64_t(place.stream()) * wide.call.a.kv_heads + place.kv_head()) * p.column_tile * p.column_tiles +
               place.first_column + place.quad;
    }

    __device__ __forceinline__ void load_queries() {
        constexpr int row = Memory::key_bytes / 4; // words
        const void * queries = LK::turbo ? static_cast<const void *>(wide.arrays.queries) : wide.arrays.exact_queries;
        const uint32_t * words = static_cast<const uint32_t *>(queries) + prepared_column() * row + place.in_quad;
#pragma unroll
        for (int c = 0; c < 2 * M; ++c) {
#pragma unroll
            for (int i = 0; i < products; ++i) {
                query[c / 2][i][c % 2] = words[8 * c * row + 8 * i];
                query[c / 2][i][c % 2 + 2] = words[8 * c * row + 8 * i + 4];
            }
        }
    }

    __device__ __forceinline__ int column(int c) const { return place.first_column + 8 * c + place.quad; }

    // Computes the scores of the tile, without the factors of the queries.
    __device__ __forceinline__ void compute_scores(uint32_t keys, const float2 * key_factors, int step_rows,
                                                   float (&s)[M][tile_rows / 8][4]) const {
        constexpr int of_block = products / Memory::key_blocks;
        const int in_eight = place.lane % 8;
        const uint32_t at = keys + in_eight * Memory::key_bytes +
                            ((place.lane / 8 ^ unit_swizzle<Memory::key_bytes>(in_eight)) << 4);
#pragma unroll
        for (int n = 0; n < tile_rows / 8; ++n) {
            uint32_t k[products / 2][4];
#pragma unroll
            for (int i = 0; i < products / 2; ++i) load_matrices(k[i], (at ^ 64 * i) + 8 * n * Memory::key_bytes);
#pragma unroll
            for (int block = 0; block < Memory::key_blocks; ++block) {
                const float4 two =
                    *reinterpret_cast<const float4 *>(key_factors + block * step_rows + 8 * n + 2 * place.in_quad);
#pragma unroll
                for (int m = 0; m < M; ++m) {
                    float x[4] = {};
                    if constexpr (LK::turbo) {
                        int c[4] = {magic_bits, magic_bits, magic_bits, magic_bits};
#pragma unroll
                        for (int i = block * of_block; i < (block + 1) * of_block; ++i) {
                            const uint32_t b[2] = {k[i / 2][i % 2 * 2], k[i / 2][i % 2 * 2 + 1]};
                            mma_int8(c, query[m][i], b);
                        }
#pragma unroll
                        for (int i = 0; i < 4; ++i) x[i] = __int_as_float(c[i]);
                    } else {
#pragma unroll
                        for (int i = 0; i < products; ++i)
                            mma_f16(x, query[m][i][0], query[m][i][1], query[m][i][2], query[m][i][3],
                                    k[i / 2][i % 2 * 2], k[i / 2][i % 2 * 2 + 1]);
                    }
#pragma unroll
                    for (int i = 0; i < 4; ++i) {
                        const float score = __fmaf_rn(x[i], i % 2 ? two.z : two.x, i % 2 ? two.w : two.y);
                        s[m][n][i] = block ? s[m][n][i] + score : score;
                    }
                }
            }
        }
    }

    __device__ __forceinline__ void cap(float (&s)[M][tile_rows / 8][4]) const {
        const float limit = wide.call.a.soft_cap * log2e;
#pragma unroll
        for (int m = 0; m < M; ++m)
#pragma unroll
            for (int i = 0; i < 4; ++i) {
                const float factor = to_log2[2 * m + i / 2];
#pragma unroll
                for (int n = 0; n < tile_rows / 8; ++n)
                    s[m][n][i] = limit * tanhf(s[m][n][i] * factor / limit) / factor;
            }
    }

    // Adds the mask of tile `tile`. `seen` has the words of the mask. In batches of several requests most columns that
    // take part see no row of the tile or all of them, and need no value of the mask.
    __device__ __forceinline__ void apply_mask(const MaskRows & mask, const SeenTiles * seen, int words, int tile,
                                               float (&s)[M][tile_rows / 8][4]) const {
        const AttentionPlan & p = wide.call.plan;
        const int first_column = here(place.first_column + place.quad);
        const int kv_head = place.kv_head(), stream = place.stream();
        uint32_t some = 0, mixed = 0; // a bit for each of the lane's columns
#pragma unroll
        for (int c = 0; c < 2 * M; ++c) {
            const int column = first_column + 8 * c;
            if (column >= p.columns) continue;
            const int token = column / p.group, head = kv_head * p.group + column - token * p.group;
            SeenTiles one = {~0u, ~0u};
            if (mask.base) one = seen[mask.number(token, head, stream, wide.call.a.tokens) * words + tile / 32];
            some |= (one.some >> tile % 32 & 1) << c;
            mixed |= (one.mixed >> tile % 32 & 1) << c;
        }
#pragma unroll
        for (int c = 0; c < 2 * M; ++c) {
            if (!(some >> c & 1)) {
#pragma unroll
                for (int n = 0; n < tile_rows / 8; ++n)
                    s[c / 2][n][c % 2 * 2] = s[c / 2][n][c % 2 * 2 + 1] = -INFINITY;
                continue;
            }
            if (!(mixed >> c & 1)) continue;
            const int column = first_column + 8 * c;
            const int token = column / p.group, head = kv_head * p.group + column - token * p.group;
            const int64_t first = int64_t(tile) * tile_rows + 2 * place.in_quad;
            const uint8_t * values = mask.row(token, head, stream) + 2 * first;
            uint32_t pairs[tile_rows / 8];
            const bool aligned = (reinterpret_cast<uintptr_t>(values) & 3) == 0;
            if (mask.base && aligned && int64_t(tile + 1) * tile_rows <= mask.rows) {
#pragma unroll
                for (int n = 0; n < tile_rows / 8; ++n) pairs[n] = reinterpret_cast<const uint32_t *>(values)[4 * n];
            } else {
#pragma unroll
                for (int n = 0; n < tile_rows / 8; ++n) {
                    const auto at = [&](int i) {
                        if (first + 8 * n + i >= mask.rows) return minus_infinity;
                        return mask.base ? load_u16(values + 16 * n + 2 * i) : 0u;
                    };
                    pairs[n] = at(0) | at(1) << 16;
                }
            }
            const float slope = log2e * alibi_slope(wide.call, head) / to_log2[c];
#pragma unroll
            for (int n = 0; n < tile_rows / 8; ++n)
#pragma unroll
                for (int i = 0; i < 2; ++i) {
                    const float bias = __half2float(__ushort_as_half(uint16_t(pairs[n] >> 16 * i)));
                    float & score = s[c / 2][n][c % 2 * 2 + i];
                    score = bias == -INFINITY ? -INFINITY : score + bias * slope;
                }
        }
    }

    // Chooses a higher reference for columns with scores that exceed theirs by more than `headroom`. Returns whether V
    // of the tile counts: sparse V leaves it out if all weights are at most the threshold, relative to the score by
    // which the reference was chosen, which is at most the largest so far.
    __device__ __forceinline__ bool raise_references(const float (&s)[M][tile_rows / 8][4]) {
        float top[2 * M];
        bool exceeds = false;
#pragma unroll
        for (int c = 0; c < 2 * M; ++c) {
            top[c] = -INFINITY;
#pragma unroll
            for (int n = 0; n < tile_rows / 8; ++n)
                top[c] = fmaxf(top[c], fmaxf(s[c / 2][n][c % 2 * 2], s[c / 2][n][c % 2 * 2 + 1]));
            top[c] *= to_log2[c];
            exceeds = exceeds || top[c] > reference[c] + headroom;
        }
        const auto counts = [&] {
            bool some = false;
#pragma unroll
            for (int c = 0; c < 2 * M; ++c)
                some = some || (column(c) < wide.call.plan.columns && top[c] > reference[c] + wide.least_weight);
            return __any_sync(all_lanes, some);
        };
        if (!__any_sync(all_lanes, exceeds)) return counts();
#pragma unroll
        for (int c = 0; c < 2 * M; ++c) {
            float largest = fmaxf(top[c], __shfl_xor_sync(all_lanes, top[c], 1));
            largest = fmaxf(largest, __shfl_xor_sync(all_lanes, largest, 2));
            const float before = reference[c];
            if (largest > before + headroom) reference[c] = largest - lowered_by;
            const float correction = exp2f(before - reference[c]);
            sum[c] *= correction;
#pragma unroll
            for (int n = 0; n < D / 8; ++n) {
                output[c / 2][n][c % 2 * 2] *= correction;
                output[c / 2][n][c % 2 * 2 + 1] *= correction;
            }
        }
        return counts();
    }

    // Turns scores into weights, as the operand A of the output.
    __device__ __forceinline__ void weigh(const float (&s)[M][tile_rows / 8][4], uint32_t (&w)[M][tile_rows / 16][4]) {
#pragma unroll
        for (int c = 0; c < 2 * M; ++c) {
            const float offset = -reference[c];
#pragma unroll
            for (int n = 0; n < tile_rows / 8; ++n) {
                const float a = exp2f(__fmaf_rn(s[c / 2][n][c % 2 * 2], to_log2[c], offset)),
                            b = exp2f(__fmaf_rn(s[c / 2][n][c % 2 * 2 + 1], to_log2[c], offset));
                sum[c] += a + b;
                const half2 pair = __floats2half2_rn(a, b);
                w[c / 2][n / 2][n % 2 * 2 + c % 2] = *reinterpret_cast<const uint32_t *>(&pair);
            }
        }
    }

    // Adds weights times V to the output.
    __device__ __forceinline__ void add_values(uint32_t values, const uint32_t (&w)[M][tile_rows / 16][4]) {
        const uint32_t at = (values + place.lane * 2 * D) | unit_swizzle<2 * D>(place.lane % 8) << 4;
#pragma unroll
        for (int n = 0; n < D / 8; ++n) {
            uint32_t v[4];
            load_transposed(v, at ^ n << 4);
#pragma unroll
            for (int h = 0; h < tile_rows / 16; ++h)
#pragma unroll
                for (int m = 0; m < M; ++m)
                    mma_f16(output[m][n], w[m][h][0], w[m][h][1], w[m][h][2], w[m][h][3], v[2 * h], v[2 * h + 1]);
        }
    }

    // Computes tile `tile` of the cache. `in_step` is its first row in the buffer.
    __device__ __forceinline__ void add_tile(const Memory & memory, int buffer, int in_step, int tile, bool mixed) {
        const auto shared = [](const uint8_t * x) { return uint32_t(__cvta_generic_to_shared(x)); };
        const uint32_t keys = shared(memory.keys(buffer) + in_step * Memory::key_bytes),
                       values = shared(memory.values(buffer) + in_step * Memory::value_bytes);
        float s[M][tile_rows / 8][4];
        compute_scores(keys, memory.key_factors(buffer) + in_step, memory.rows, s);
        if (wide.call.a.soft_cap != 0) cap(s);
        if (mixed) apply_mask(MaskRows(wide.call.a), wide.arrays.seen, wide.arrays.words, tile, s);
        const bool counts = raise_references(s);
        uint32_t w[M][tile_rows / 16][4];
        weigh(s, w);
        if (counts) add_values(values, w);
    }

    // Adds the row group's tiles of the rows of an exact window, but those that no column sees.
    __device__ __forceinline__ void add_exact_rows() {
        const WideArrays & x = wide.arrays;
        const Attention & a = wide.call.a;
        const int first = place.first_column / wide.call.plan.group,
                  last = (place.first_column + wide_columns * M - 1) / wide.call.plan.group;
        const SeenTiles * from = x.exact_seen + int64_t(place.stream() % a.exact.mask_streams) * a.exact.mask_heads *
                                                    a.tokens * x.exact_words;
        const AttentionPlan & p = wide.call.plan;
#pragma unroll 1
        for (int tile = blockIdx.x * p.row_tiles + place.row_group; tile < x.exact_tiles;
             tile += p.chunks * p.row_tiles) {
            SeenTiles seen = {0, 0};
            for (int head = 0; head < a.exact.mask_heads; ++head)
                for (int token = first + place.lane; token <= min(last, a.tokens - 1); token += 32) {
                    const SeenTiles one = from[(int64_t(head) * a.tokens + token) * x.exact_words + tile / 32];
                    seen.some |= one.some;
                    seen.mixed |= one.mixed;
                }
            const bool some = __any_sync(all_lanes, seen.some >> tile % 32 & 1);
            if (some) add_exact_tile(tile, __any_sync(all_lanes, seen.mixed >> tile % 32 & 1));
        }
    }

    // The inner index of the products has an order in which a lane's four registers of a row are adjacent elements.
    __device__ __forceinline__ void add_exact_tile(int tile, bool mixed) {
        const WideArrays & x = wide.arrays;
        const int64_t at = (int64_t(place.kv_stream()) * wide.call.a.kv_heads + place.kv_head()) * x.exact_tiles + tile;
        const auto from = [&](const uint16_t * rows, int64_t row, int units) {
            return reinterpret_cast<const uint4 *>(rows) + row * units + place.in_quad;
        };
        const uint4 *queries = from(x.exact_queries, prepared_column(), D / 8),
                    *keys = from(x.exact_k, at * tile_rows + place.quad, D / 8),
                    *values = from(x.exact_v, at * D + place.quad, tile_rows / 8);
        float s[M][tile_rows / 8][4] = {};
#pragma unroll
        for (int i = 0; i < D / 32; ++i) {
            uint4 q[2 * M], k[tile_rows / 8];
#pragma unroll
            for (int c = 0; c < 2 * M; ++c) q[c] = queries[c * D + 4 * i];
#pragma unroll
            for (int n = 0; n < tile_rows / 8; ++n) k[n] = keys[n * D + 4 * i];
#pragma unroll
            for (int n = 0; n < tile_rows / 8; ++n)
#pragma unroll
                for (int m = 0; m < M; ++m) {
                    mma_f16(s[m][n], q[2 * m].x, q[2 * m + 1].x, q[2 * m].y, q[2 * m + 1].y, k[n].x, k[n].y);
                    mma_f16(s[m][n], q[2 * m].z, q[2 * m + 1].z, q[2 * m].w, q[2 * m + 1].w, k[n].z, k[n].w);
                }
        }
        if (wide.call.a.soft_cap != 0) cap(s);
        if (mixed) apply_mask(MaskRows(wide.call.a.exact, wide.call.a.tokens), x.exact_seen, x.exact_words, tile, s);
        const bool counts = raise_references(s);
        uint32_t w[M][tile_rows / 16][4];
        weigh(s, w);
        if (!counts) return;
#pragma unroll
        for (int n = 0; n < D / 8; ++n) {
            const uint4 v = values[n * tile_rows];
#pragma unroll
            for (int m = 0; m < M; ++m) {
                mma_f16(output[m][n], w[m][0][0], w[m][0][1], w[m][0][2], w[m][0][3], v.x, v.y);
                mma_f16(output[m][n], w[m][1][0], w[m][1][1], w[m][1][2], w[m][1][3], v.z, v.w);
            }
        }
    }

    // What a warp has, in shared memory.
    struct Exchange {
        float4 output[M][D / 8][32];
        float2 states[2 * M][32];
    };

    // Merges the results of the row groups in the warps of the first one. All warps of the thread block take part.
    __device__ __forceinline__ void merge_groups(uint8_t * memory) {
        const int column_warps = wide.call.plan.column_tile / (wide_columns * M);
        Exchange * exchanges = reinterpret_cast<Exchange *>(memory) + place.warp % column_warps;
#pragma unroll 1
        for (int half = wide.call.plan.row_tiles / 2; half > 0; half /= 2) {
            Exchange & exchange = exchanges[place.row_group % half * column_warps];
            __syncthreads();
            if (place.row_group >= half && place.row_group < 2 * half) {
#pragma unroll
                for (int m = 0; m < M; ++m)
#pragma unroll
                    for (int n = 0; n < D / 8; ++n) {
                        const float(&o)[4] = output[m][n];
                        exchange.output[m][n][place.lane] = make_float4(o[0], o[1], o[2], o[3]);
                    }
#pragma unroll
                for (int c = 0; c < 2 * M; ++c) exchange.states[c][place.lane] = make_float2(reference[c], sum[c]);
            }
            __syncthreads();
            if (place.row_group >= half) continue;
            float own[2 * M], other[2 * M]; // factors
#pragma unroll
            for (int c = 0; c < 2 * M; ++c) {
                const float2 state = exchange.states[c][place.lane];
                const float before = reference[c];
                reference[c] = fmaxf(before, state.x);
                own[c] = exp2f(before - reference[c]);
                other[c] = exp2f(state.x - reference[c]);
                sum[c] = sum[c] * own[c] + state.y * other[c];
            }
#pragma unroll
            for (int m = 0; m < M; ++m)
#pragma unroll
                for (int n = 0; n < D / 8; ++n) {
                    const float4 four = exchange.output[m][n][place.lane];
                    float(&o)[4] = output[m][n];
                    o[0] = o[0] * own[2 * m] + four.x * other[2 * m];
                    o[1] = o[1] * own[2 * m] + four.y * other[2 * m];
                    o[2] = o[2] * own[2 * m + 1] + four.z * other[2 * m + 1];
                    o[3] = o[3] * own[2 * m + 1] + four.w * other[2 * m + 1];
                }
        }
    }

    // Stores the results of the thread block's rows for merge_kernel, which reads no values of columns that have seen
    // no row.
    __device__ __forceinline__ void store() {
        const AttentionCall & call = wide.call;
        constexpr float to_value = value_unit<TV>;
#pragma unroll
        for (int c = 0; c < 2 * M; ++c) {
            sum[c] += __shfl_xor_sync(all_lanes, sum[c], 1);
            sum[c] += __shfl_xor_sync(all_lanes, sum[c], 2);
            if (column(c) >= call.plan.columns) continue;
            const int64_t row = query_row(call, place.stream(), place.kv_head(), column(c));
            const int64_t at = row * call.plan.parts + blockIdx.x;
            if (place.in_quad == 0) call.states[at] = {reference[c], sum[c]};
            if (reference[c] == nothing_seen) continue;
            float * to = call.partial + at * D + 2 * place.in_quad;
#pragma unroll
            for (int n = 0; n < D / 8; ++n)
                *reinterpret_cast<float2 *>(to + 8 * n) = make_float2(output[c / 2][n][c % 2 * 2] * to_value,
                                                                      output[c / 2][n][c % 2 * 2 + 1] * to_value);
        }
    }
};

// ---- the kernel

// Collects which tiles the thread block's columns see.
template <typename Memory>
__device__ __forceinline__ void collect_seen(const WideCall & wide, const WidePlace & place, const Memory & memory,
                                             int warp_columns, int words) {
    const AttentionCall & call = wide.call;
    const Attention & a = call.a;
    const int64_t first_word = place.begin() / seen_rows;
    const int column_warps = call.plan.column_tile / warp_columns;
    SeenTiles * warp_seen = memory.warp_seen(words);
    if (place.row_group == 0) {
        const int first = place.first_column / call.plan.group,
                  end = min((place.first_column + warp_columns - 1) / call.plan.group + 1, a.tokens);
        const int64_t row = int64_t(place.stream() % a.mask_streams) * a.mask_heads * a.tokens;
        const SeenTiles * from = wide.arrays.seen + row * wide.arrays.words + first_word;
        for (int w = place.lane; w < words; w += 32) {
            SeenTiles seen = {0, 0};
            if (!a.mask) {
                const int64_t left = a.n_kv - (first_word + w) * seen_rows; // rows from the word's on
                const int tiles = int(min(left / tile_rows, int64_t(32)));
                seen.mixed = left < seen_rows && left % tile_rows ? 1u << tiles : 0;
                seen.some = (tiles < 32 ? (1u << tiles) - 1 : ~0u) | seen.mixed;
                if (first >= end) seen.some = 0;
            } else {
#pragma unroll 1
                for (int head = 0; head < a.mask_heads; ++head)
#pragma unroll 8
                    for (int token = first; token < end; ++token) {
                        const SeenTiles one = from[(int64_t(head) * a.tokens + token) * wide.arrays.words + w];
                        seen.some |= one.some;
                        seen.mixed |= one.mixed;
                    }
            }
            warp_seen[place.warp * words + w] = seen;
        }
    }
    __syncthreads();
    for (int w = threadIdx.x; w < words; w += blockDim.x) {
        uint32_t some = 0;
        for (int i = 0; i < column_warps; ++i) some |= warp_seen[i * words + w].some;
        memory.seen()[w] = some;
    }
    __syncthreads();
}

template <KV TK, KV TV, int D, int M>
__global__ void __launch_bounds__(32 * wide_warps(separate_groups(Kind<TK>::turbo, D, M)), 1)
    wide_kernel(const __grid_constant__ WideCall wide) {
    using Memory = WideMemory<TK, TV, D, M>;
    extern __shared__ __align__(16) uint8_t shared[];
    const AttentionCall & call = wide.call;
    const AttentionPlan & plan = call.plan;
    constexpr int warp_columns = wide_columns * M;
    const WidePlace place(call, warp_columns);
    const Memory memory(plan, shared, place.row_group);
    const WideRows<TK, TV, D, M> rows(call, place, memory);
    wait_for_previous();
    let_next_start(); // now what the merge stores is complete
    const int first_tile = int(place.begin() / tile_rows % 32);
    const int words = (first_tile + (place.length + tile_rows - 1) / tile_rows + 31) / 32;
    collect_seen(wide, place, memory, warp_columns, words);
    const uint32_t * seen = memory.seen();
    const SeenTiles * warp_seen = memory.warp_seen(words) + place.in_group() * words;

    // A step has the rows of a buffer. Step by step, a row group has rows of its own if row groups are separate.
    const int apart = Memory::separate ? plan.row_tiles * memory.rows : memory.rows;
    const uint32_t all_tiles = (1u << (memory.rows / tile_rows)) - 1;
    const auto next = [&](int at) { // the rows after `at` that a column sees
        for (at += apart; at < place.length; at += apart) {
            const int tile = first_tile + at / tile_rows;
            if (seen[tile / 32] >> tile % 32 & all_tiles) break;
        }
        return at;
    };
    WideColumns<TK, TV, D, M> columns(wide, place);
    const int first_of_step = Memory::separate ? 0 : place.row_group;
    const int tiles_apart = Memory::separate ? 1 : plan.row_tiles;
    const auto add_tiles = [&](int at, int buffer) {
#pragma unroll 1
        for (int t = first_of_step; t < memory.rows / tile_rows; t += tiles_apart) {
            const int in_words = first_tile + at / tile_rows + t;
            const SeenTiles one = warp_seen[in_words / 32];
            if (!(one.some >> in_words % 32 & 1)) continue;
            columns.add_tile(memory, buffer, t * tile_rows, int(place.begin() / tile_rows) + at / tile_rows + t,
                             one.mixed >> in_words % 32 & 1);
        }
    };
    int at = next(Memory::separate ? place.row_group * memory.rows - apart : -apart), after = next(at);
    rows.load(at, 0);
    rows.load(after, 1);
    columns.load_queries();
    if constexpr (Memory::separate) {
        for (int buffer = 0; at < place.length; buffer ^= 1) {
            copy_wait<1>();
            place.sync_group(); // the rows have been copied, and all warps have used those that were expanded before
            rows.expand(at, buffer, 0);
            place.sync_group();
            const int later = next(after);
            rows.load(later, buffer);
            add_tiles(at, 0);
            at = after;
            after = later;
        }
    } else {
        copy_wait<1>();
        __syncthreads();
        if (at < place.length) rows.expand(at, 0, 0);
        const bool early = place.warp < wide_warps(false) / 2; // half of the warps expand while the others multiply
        for (int buffer = 0; at < place.length; buffer ^= 1) {
            copy_wait<0>();
            __syncthreads();
            const int later = next(after);
            rows.load(later, buffer);
            if (early && after < place.length) rows.expand(after, buffer ^ 1, buffer ^ 1);
            add_tiles(at, buffer);
            if (!early && after < place.length) rows.expand(after, buffer ^ 1, buffer ^ 1);
            at = after;
            after = later;
        }
    }
    // Before the loop, these rows would cost the loop registers.
    if (call.a.windowed && place.row_group < plan.row_tiles) columns.add_exact_rows();
    columns.merge_groups(memory.start);
    if (place.row_group == 0) columns.store();
}

} // namespace

using WideKernel = void (*)(WideCall);

// The kernel for a pair of types and a number of operands of a warp, or nullptr if there is none. The function of each
// head size is in a file of its own, so the instances can be compiled in parallel.
#define TURBOQUANT_DECLARE(D) WideKernel wide_kernel_##D(KV type_k, KV type_v, int operands);
TURBOQUANT_WIDE_HEADS(TURBOQUANT_DECLARE)
#undef TURBOQUANT_DECLARE

namespace {

template <KV T> using TypeConstant = std::integral_constant<KV, T>;

// What `get` returns for the constants of a pair of types that kernels cover, else nullptr.
template <int D, KV TK, typename Get> WideKernel kernel_for_key(KV type_v, const Get & get) {
    switch (type_v) {
#define TURBOQUANT_CASE(name)                                                                                \
    case KV::name:                                                                                           \
        if constexpr (covers_pair<TK, KV::name, D>) return get(TypeConstant<TK>(), TypeConstant<KV::name>()); \
        break;
        TURBOQUANT_KV(TURBOQUANT_CASE)
#undef TURBOQUANT_CASE
    }
    return nullptr;
}
template <int D, typename Get> WideKernel kernel_for_pair(KV type_k, KV type_v, const Get & get) {
    switch (type_k) {
#define TURBOQUANT_CASE(name) \
    case KV::name: return kernel_for_key<D, KV::name>(type_v, get);
        TURBOQUANT_KV(TURBOQUANT_CASE)
#undef TURBOQUANT_CASE
    }
    return nullptr;
}

template <int D> WideKernel wide_kernel_for(KV type_k, KV type_v, int operands) {
    return kernel_for_pair<D>(type_k, type_v, [&](auto k, auto v) -> WideKernel {
        constexpr int most = most_operands(Kind<k()>::turbo, Kind<v()>::turbo, D);
        return operands < most ? wide_kernel<k(), v(), D, 1> : wide_kernel<k(), v(), D, most>;
    });
}

} // namespace

} // namespace cuda
} // namespace turboquant

#endif
