// Attention of a few query tokens over a long cache (flash decoding): the kernel template. attention.cu plans and
// launches; the instances are compiled in files of their own.
//
// A thread block takes a run of KV rows for several KV heads, whose rows lie side by side, and for up to eight query
// columns (query heads of the KV head, times tokens). Raw rows arrive in shared memory by cp.async. Each warp takes one
// KV head and tiles of 32 rows. Scores and output are products of int8 matrices on the tensor cores: K's and V's levels
// come from byte permutes straight into the operands' registers; as an inner index may be summed in any order, the
// operands keep the order in which values lie packed.
//   scores:  A = queries (rows 0-7: high bytes of 16-bit integers, rows 8-15: low bytes), B = K
//   output:  A = V transposed, B = softmax weights times V's scales, as 15-bit integers of a common scale per tile
// Queries are rotated once, the output is un-rotated once (attention.cu). The partial results of the runs are merged
// there.
#ifndef TURBOQUANT_CUDA_ATTENTION_H
#define TURBOQUANT_CUDA_ATTENTION_H

#include "device.cuh"
#include "launch.h"
#include "turboquant_cuda.h"

namespace turboquant {
namespace cuda {

constexpr int tile = 32;        // KV rows of a warp at a time
constexpr int most_columns = 8; // query columns of a thread block
constexpr int most_warps = 8;

// How a call is cut into thread blocks.
struct AttentionPlan {
    int group;       // query heads of a KV head
    int columns;     // group * tokens
    int column_tile; // 4 or 8: columns of a thread block
    int column_tiles;
    int block_heads;      // KV heads of a thread block
    int head_groups;      // thread blocks beside each other
    int row_tiles;        // warps beside each other on the rows of a head
    int stages;           // of the pipeline
    int pitch_k, pitch_v; // bytes of a row in shared memory
    int chunks;           // runs of KV rows
    int64_t chunk_rows;   // a multiple of row_tiles * tile
    int parts;            // partial results of a query row: chunks * row_tiles
    int shared_bytes;
};

struct AttentionCall {
    Attention a;
    AttentionPlan p;
    float * partial;      // [query row][part][head]
    float2 * meta;        // [query row][part]: largest score (log2), sum of weights
    float slope0, slope1; // ALiBi
    int slope_heads;
};

namespace {

template <KV T> struct Kind;
template <> struct Kind<KV::turbo4> {
    static constexpr int bits = 4;
};
template <> struct Kind<KV::turbo3> {
    static constexpr int bits = 3;
};
template <> struct Kind<KV::turbo2> {
    static constexpr int bits = 2;
};
template <> struct Kind<KV::q8_0> {
    static constexpr int bits = 8;
};
template <> struct Kind<KV::f16> {
    static constexpr int bits = 16;
};

// A row of one head as the kernels see it: blocks of `block` values that share a scale.
template <KV T, int D> struct Layout {
    static constexpr int bits = Kind<T>::bits;
    static constexpr bool turbo = bits <= 4;
    static constexpr int block = turbo ? (D < 128 ? D : 128) : bits == 8 ? 32 : D;
    static constexpr int block_bytes = bits == 16 ? 2 * block : 2 + block * bits / 8;
    static constexpr int bytes = D / block * block_bytes;
};
// What a level of a block counts is the block's stored scale times this.
template <KV T> struct Step {
    static constexpr float value = 1.0f;
};
template <> struct Step<KV::turbo4> {
    static constexpr float value = Codebook<4>::step;
};
template <> struct Step<KV::turbo3> {
    static constexpr float value = Codebook<3>::step;
};
template <> struct Step<KV::turbo2> {
    static constexpr float value = Codebook<2>::step;
};

__device__ __forceinline__ void mma_s8(int (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1,
                                       const int (&c)[4]) {
#if __CUDA_ARCH__ >= 800
    asm("mma.sync.aligned.m16n8k32.row.col.s32.s8.s8.s32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%10,%11,%12,%13};"
        : "=r"(d[0]), "=r"(d[1]), "=r"(d[2]), "=r"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1), "r"(c[0]), "r"(c[1]), "r"(c[2]), "r"(c[3]));
#endif
}
__device__ __forceinline__ void mma_f16(float (&c)[4], uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3, uint32_t b0,
                                        uint32_t b1) {
#if __CUDA_ARCH__ >= 800
    asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
#endif
}

// 16 bytes from global to shared memory, of which those from `valid` on become zeros.
__device__ __forceinline__ void copy_async(uint32_t shared, const void * global, int valid) {
#if __CUDA_ARCH__ >= 800
    asm volatile("cp.async.cg.shared.global.L2::128B [%0], [%1], 16, %2;" ::"r"(shared), "l"(global), "r"(valid)
                 : "memory");
#endif
}
__device__ __forceinline__ void copy_commit() {
#if __CUDA_ARCH__ >= 800
    asm volatile("cp.async.commit_group;" ::: "memory");
#endif
}
template <int N> __device__ __forceinline__ void copy_wait() {
#if __CUDA_ARCH__ >= 800
    asm volatile("cp.async.wait_group %0;" ::"n"(N) : "memory");
#endif
}

// As copy_async where only `valid` bytes, an even number, may be read; if none, `any` is a readable address.
__device__ __forceinline__ void copy_end(uint32_t shared, const uint8_t * global, const uint8_t * any, int valid) {
    if (valid >= 16 || valid <= 0) {
        copy_async(shared, valid > 0 ? global : any, valid > 0 ? 16 : 0);
        return;
    }
    uint16_t x[8]; // all on their way before the first is stored
#pragma unroll
    for (int i = 0; i < 8; ++i) x[i] = 2 * i < valid ? uint16_t(load_u16(global + 2 * i)) : uint16_t(0);
#pragma unroll
    for (int i = 0; i < 8; ++i) asm volatile("st.shared.u16 [%0], %1;" ::"r"(shared + 2 * i), "h"(x[i]) : "memory");
}

// The rows of the block's heads in K or V.
struct Side {
    const uint8_t * base;
    int64_t stride;
    int chunk, pitch; // bytes of a row, there and in shared memory
};

// Rows first .. first + rows to shared memory; rows from n_kv on become zeros. A row keeps its address modulo 16, which
// row_offset gives back.
__device__ __forceinline__ void load_rows(uint32_t shared, const Side & side, int rows, int64_t first, int64_t n_kv) {
    const uint8_t * any = side.base - (reinterpret_cast<uintptr_t>(side.base) & 15);
    if (side.stride == side.pitch && side.chunk == side.pitch) { // rows that follow each other: one run
        const uint8_t * from = side.base + first * side.stride + threadIdx.x * 16;
        const int step = blockDim.x * 16, all = rows * side.pitch;
        if (first + rows <= n_kv) {
#pragma unroll 4
            for (int at = threadIdx.x * 16; at < all; at += step, from += step) copy_async(shared + at, from, 16);
        } else {
            const int end = int(n_kv - first) * side.pitch;
#pragma unroll 1
            for (int at = threadIdx.x * 16; at < all; at += step, from += step)
                copy_end(shared + at, from, any, end - at);
        }
        return;
    }
    const int log_lanes = side.pitch <= 128 ? 3 : side.pitch <= 256 ? 4 : 5, lanes = 1 << log_lanes; // of a row
    const int apart = blockDim.x >> log_lanes, unit = (threadIdx.x & (lanes - 1)) * 16;
    int r = threadIdx.x >> log_lanes;
    const uint8_t * from = side.base + (first + r) * side.stride + unit;
    shared += r * side.pitch + unit;
    const int64_t from_step = apart * side.stride;
    const int to_step = apart * side.pitch;
    const int left = int(n_kv - 1 - first); // rows before the cache's last one: what follows these may be read
    const int simple = min(left, rows);
    if (side.pitch <= 512) {
#pragma unroll 4
        for (; r < simple; r += apart, from += from_step, shared += to_step) {
            const int offset = int(reinterpret_cast<uintptr_t>(from) & 15);
            if (unit < offset + side.chunk) copy_async(shared, from - offset, 16);
        }
    } else {
#pragma unroll 1
        for (; r < simple; r += apart, from += from_step, shared += to_step) {
            const int offset = int(reinterpret_cast<uintptr_t>(from) & 15), bytes = offset + side.chunk - unit;
            const uint8_t * unit_from = from - offset;
#pragma unroll 4
            for (int at = 0; at < bytes; at += 512, unit_from += 512) copy_async(shared + at, unit_from, 16);
        }
    }
#pragma unroll 1
    for (; r < rows; r += apart, from += from_step, shared += to_step) {
        const int offset = int(reinterpret_cast<uintptr_t>(from) & 15), bytes = offset + side.chunk - unit;
#pragma unroll 1
        for (int at = 0; at < bytes; at += lanes * 16)
            copy_end(shared + at, from - offset + at, any, r == left ? bytes - at : 0);
    }
}

// The address of row r of a tile modulo 16. With an even stride it depends on r mod 8 only.
__device__ __forceinline__ int row_offset(uint32_t low, uint32_t stride, int r) {
    return int((low + uint32_t(r) * stride) & 15);
}

// ---- the query as operand A

// Where element e of a query lies among the bytes of its column, so that a lane's four registers of a product follow
// each other: [product][lane % 4][half of the inner index: high bytes, low bytes][4]. The place of the high byte.
template <KV TK, int D> __device__ __forceinline__ int operand_place(int e) {
    using L = Layout<TK, D>;
    int product, t, nibble; // nibble: of the unit's eight elements
    if constexpr (L::turbo) {
        constexpr int N = L::block, steps = N / 32;
        const int in_block = e % N, half = in_block / (N / 2);
        int step;
        if constexpr (L::bits == 4) { // the inverse of unit_element
            const int unit = in_block % (N / 2) / 4;
            step = unit / 4;
            t = unit % 4;
        } else {
            const int pair = in_block % (N / 4) / 4;
            step = pair / 4 * 2 + in_block / (N / 4) % 2;
            t = pair % 4;
        }
        product = e / N * steps + step;
        nibble = 2 * (e % 4) + half;
    } else {
        product = e / 32;
        t = e % 16 / 4;
        nibble = e % 32 / 16 * 4 + e % 4;
    }
    return ((product * 4 + t) * 4 + nibble / 4 * 2) * 4 + nibble % 4;
}

// Columns c0, c0 + row_tiles, ... of a KV head: a lane has elements lane, lane + 32, ...
template <int D>
__device__ __forceinline__ void load_queries(const AttentionCall & call, int stream, int kv_head, int first_column,
                                             int c0, float (&y)[4][D / 32]) {
    const Attention & a = call.a;
    const int lane = threadIdx.x % 32, apart = call.p.row_tiles;
    // lane i finds out where column i is
    const int own = first_column + c0 + lane % 4 * apart, token = own / call.p.group;
    const uint64_t own_row = reinterpret_cast<uintptr_t>(a.q) + token * a.q_token +
                             (kv_head * call.p.group + own - token * call.p.group) * a.q_head + stream * a.q_stream;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
        const int c = c0 + i * apart;
        const float * row = reinterpret_cast<const float *>(uintptr_t(__shfl_sync(all_lanes, own_row, i)));
        const bool some = c < call.p.column_tile && first_column + c < call.p.columns;
#pragma unroll
        for (int j = 0; j < D / 32; ++j) y[i][j] = some ? row[lane + 32 * j] : 0.0f;
    }
}

template <int D> constexpr int query_scratch = 16 * D + most_columns * int(sizeof(float)); // bytes

// The columns of a KV head as operands: of int8 matrices, if K is integer; else of binary16 ones. The warps of the head
// share the work; y has what load_queries loaded for c0 = row_tile. `bytes` is the head's scratch memory. Returns the
// factor that turns integers into scores (of column lane / 4).
template <KV TK, int D>
__device__ __forceinline__ float prepare_queries(const AttentionCall & call, int stream, int kv_head, int first_column,
                                                 int row_tile, uint8_t * bytes, float (&y)[4][D / 32],
                                                 uint32_t (&operand)[D / 32][4]) {
    using L = Layout<TK, D>;
    constexpr int P = D / 32;
    const Attention & a = call.a;
    const int lane = threadIdx.x % 32, g = lane / 4, t = lane % 4, apart = call.p.row_tiles;
    float * factors = reinterpret_cast<float *>(bytes + 16 * D);
#pragma unroll 1
    for (int c0 = row_tile; c0 < call.p.column_tile; c0 += 4 * apart) {
        if (c0 != row_tile) load_queries<D>(call, stream, kv_head, first_column, c0, y);
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            const int c = c0 + i * apart;
            if (c >= call.p.column_tile) break;
            if constexpr (L::turbo) {
                constexpr int B = L::block / 32;
#pragma unroll
                for (int b = 0; b < P / B; ++b) {
                    float part[B];
#pragma unroll
                    for (int j = 0; j < B; ++j) part[j] = y[i][b * B + j];
                    rotate_warp<L::block>(part);
#pragma unroll
                    for (int j = 0; j < B; ++j) y[i][b * B + j] = part[j];
                }
            }
            if constexpr (L::bits == 16) {
#pragma unroll
                for (int j = 0; j < P; ++j)
                    reinterpret_cast<half *>(bytes)[c * D + lane + 32 * j] = __float2half_rn(y[i][j] * a.scale);
            } else {
                uint32_t largest = 0;
#pragma unroll
                for (int j = 0; j < P; ++j) largest = max(largest, __float_as_uint(y[i][j]) & 0x7fffffff);
                const float top = __uint_as_float(warp_max(largest));  // NaN stays: the scores are NaN
                const float inverse = top > 0 ? 32512.0f / top : 0.0f; // 127 * 256
                if (lane == 0) factors[c] = top * (a.scale * Step<TK>::value / 32512.0f);
#pragma unroll
                for (int j = 0; j < P; ++j) {
                    const int x = __float2int_rn(y[i][j] * inverse);
                    uint8_t * to = bytes + c * 2 * D + operand_place<TK, D>(lane + 32 * j);
                    to[0] = uint8_t((x + 128) >> 8);
                    to[4] = uint8_t(x);
                }
            }
        }
    }
    __syncthreads();
    const int c = call.p.column_tile == 4 ? g % 4 : g; // with four columns, rows 4-7 repeat rows 0-3
    if constexpr (L::bits == 16) {
        const uint32_t * words = reinterpret_cast<const uint32_t *>(bytes) + c * D / 2;
#pragma unroll
        for (int s = 0; s < D / 16; ++s) { // two of each operand's registers
            operand[s / 2][s % 2 * 2] = words[8 * s + t];
            operand[s / 2][s % 2 * 2 + 1] = words[8 * s + 4 + t];
        }
        return 0;
    } else {
#pragma unroll
        for (int s = 0; s < D / 32; ++s) { // registers 0, 2: high bytes, 1, 3: low bytes; 0, 1: the first half
            const uint4 four = *reinterpret_cast<const uint4 *>(bytes + c * 2 * D + (s * 4 + t) * 16);
            operand[s][0] = four.x;
            operand[s][1] = four.y;
            operand[s][2] = four.z;
            operand[s][3] = four.w;
        }
        return factors[c];
    }
}

// ---- scores

// Scores of rows 2t and 2t + 1 of a group of eight KV rows for column g, without the query's factor. `row` is row g of
// the eight, `row0` and `row1` rows 2t and 2t + 1.
template <KV TK, int D>
__device__ __forceinline__ void scores(const uint32_t (&q)[D / 32][4], const uint8_t * row, const uint8_t * row0,
                                       const uint8_t * row1, int t, float (&s)[2]) {
    using L = Layout<TK, D>;
    if constexpr (L::bits == 16) {
        float c[4] = {};
        const uint32_t * words = reinterpret_cast<const uint32_t *>(row);
#pragma unroll
        for (int i = 0; i < D / 16; ++i)
            mma_f16(c, q[i / 2][i % 2 * 2], 0, q[i / 2][i % 2 * 2 + 1], 0, words[8 * i + t], words[8 * i + 4 + t]);
        s[0] = c[0];
        s[1] = c[1];
    } else {
        s[0] = s[1] = 0;
        constexpr int steps = L::block / 32;
#pragma unroll
        for (int b = 0; b < D / L::block; ++b) {
            const uint8_t * block = row + b * L::block_bytes;
            int c[4] = {}, negative[4] = {};
#pragma unroll
            for (int i = 0; i < steps; ++i) {
                const uint32_t (&x)[4] = q[b * steps + i];
                if constexpr (L::bits == 4) {
                    const uint32_t n = unit_nibbles<4, L::block>(block + 2, t + 4 * i);
                    uint32_t p0, p1, n0, n1;
                    lookup_split(n, p0, n0);
                    lookup_split(n >> 16, p1, n1);
                    mma_s8(c, x, p0, p1, c);
                    mma_s8(negative, x, n0, n1, negative);
                } else {
                    uint32_t lo, hi;
                    if constexpr (L::turbo) {
                        lookup<L::bits>(unit_nibbles<L::bits, L::block>(block + 2, 2 * (t + 4 * (i >> 1)) + (i & 1)),
                                        lo, hi);
                    } else {
                        lo = load_u32(block + 2 + 4 * t);
                        hi = load_u32(block + 18 + 4 * t);
                    }
                    mma_s8(c, x, lo, hi, c);
                }
            }
            s[0] += float((c[0] - negative[0]) * 256 + (c[2] - negative[2])) * load_half(row0 + b * L::block_bytes);
            s[1] += float((c[1] - negative[1]) * 256 + (c[3] - negative[3])) * load_half(row1 + b * L::block_bytes);
        }
    }
}

// ---- output

// Weights times V's scales as integers of at most 15 bits of a common scale: operands of their high and low bytes. With
// four columns, columns 4-7 take the low bytes and `low` is not used.
struct Weights {
    uint32_t high[2], low[2];
    float scale; // of the lane's column
};

template <bool Paired> __device__ __forceinline__ Weights quantize_weights(const float (&w)[8], int g) {
    float top = w[0];
#pragma unroll
    for (int i = 1; i < 8; ++i) top = fmaxf(top, w[i]);
    top = fmaxf(top, __shfl_xor_sync(all_lanes, top, 1));
    top = fmaxf(top, __shfl_xor_sync(all_lanes, top, 2));
    Weights out;
    const float inverse = top > 1e-30f ? __fdividef(32512.0f, top) : 0.0f;
    out.scale = top * (1.0f / 32512.0f);
    const bool low = Paired && g >= 4;
    if (!low) out.scale *= 256.0f;
    const uint32_t round = low ? 0 : 128, select = low ? 0x0040 : 0x0051;
    uint32_t x[8];
#pragma unroll
    for (int i = 0; i < 8; ++i) x[i] = __float_as_uint(w[i] * inverse + 12582912.0f); // an integer in the low bits
#pragma unroll
    for (int h = 0; h < 2; ++h) {
        out.high[h] = prmt(prmt(x[4 * h] + round, x[4 * h + 1] + round, select),
                           prmt(x[4 * h + 2] + round, x[4 * h + 3] + round, select), 0x5410);
        out.low[h] = prmt(prmt(x[4 * h], x[4 * h + 1], 0x0040), prmt(x[4 * h + 2], x[4 * h + 3], 0x0040), 0x5410);
    }
    return out;
}

// Indices of one unit in four rows, a nibble each, to selectors by element: the low (high) half of out[i] has nibble 2i
// (2i + 1 of the same parity: 0 2, 4 6, 1 3, 5 7) of the four rows.
__device__ __forceinline__ void transpose_nibbles(const uint32_t (&n)[4], uint32_t (&out)[4]) {
    const uint32_t even01 = (n[0] & 0x0f0f0f0f) | ((n[1] << 4) & 0xf0f0f0f0),
                   odd01 = ((n[0] >> 4) & 0x0f0f0f0f) | (n[1] & 0xf0f0f0f0);
    const uint32_t even23 = (n[2] & 0x0f0f0f0f) | ((n[3] << 4) & 0xf0f0f0f0),
                   odd23 = ((n[2] >> 4) & 0x0f0f0f0f) | (n[3] & 0xf0f0f0f0);
    out[0] = prmt(even01, even23, 0x5140);
    out[1] = prmt(even01, even23, 0x7362);
    out[2] = prmt(odd01, odd23, 0x5140);
    out[3] = prmt(odd01, odd23, 0x7362);
}

struct OutputScale {
    float s0, s1, low0, low1; // of columns 2t and 2t + 1; of their low bytes, if these come separately
};

// An int32 accumulator that starts as the bits of 1.5 * 2^23 is, read as a float, that number plus its sum.
constexpr int magic_bits = 0x4b400000;
constexpr float magic = 12582912.0f;

// o += one 16 x 8 product of V's levels and the weights. Split: the levels are positive - negative.
template <bool Split, bool Paired>
__device__ __forceinline__ void accumulate(float (&o)[4], const uint32_t (&positive)[4], const uint32_t (&negative)[4],
                                           const Weights & w, const OutputScale & s) {
    const int start[4] = {magic_bits, magic_bits, magic_bits, magic_bits};
    int c[4], d[4];
    mma_s8(c, positive, w.high[0], w.high[1], start);
    if (Split) mma_s8(d, negative, w.high[0], w.high[1], start);
#pragma unroll
    for (int i = 0; i < 4; ++i)
        o[i] += (__int_as_float(c[i]) - (Split ? __int_as_float(d[i]) : magic)) * (i & 1 ? s.s1 : s.s0);
    if constexpr (!Paired) {
        mma_s8(c, positive, w.low[0], w.low[1], start);
        if (Split) mma_s8(d, negative, w.low[0], w.low[1], start);
#pragma unroll
        for (int i = 0; i < 4; ++i)
            o[i] += (__int_as_float(c[i]) - (Split ? __int_as_float(d[i]) : magic)) * (i & 1 ? s.low1 : s.low0);
    }
}

// o += V of a tile's 32 rows times the weights p of the lane's eight rows: 2t (row0), 2t + 1 (row1), then 8, 16 and 24
// on. o[i]: of the D / 16 products, elements output_element<..>(i, g, 0) and (i, g, 1) of columns 2t and 2t + 1.
template <KV TV, int D, bool Paired>
__device__ __forceinline__ void output(float (&o)[D / 16][4], const float (&p)[8], const uint8_t * row0,
                                       const uint8_t * row1, int pitch, int lane) {
    using L = Layout<TV, D>;
    const int g = lane / 4, t = lane % 4;
    const uint8_t * row[8];
#pragma unroll
    for (int i = 0; i < 8; ++i) row[i] = (i & 1 ? row1 : row0) + i / 2 * 8 * pitch;
    if constexpr (L::bits == 16) {
        uint32_t b[4];
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            const half2 pair = Paired && g >= 4 ? __floats2half2_rn(0, 0) : __floats2half2_rn(p[2 * i], p[2 * i + 1]);
            b[i] = *reinterpret_cast<const uint32_t *>(&pair);
        }
#pragma unroll
        for (int m = 0; m < D / 16; ++m) {
            uint32_t x[8];
#pragma unroll
            for (int i = 0; i < 8; ++i) x[i] = reinterpret_cast<const uint32_t *>(row[i])[g + 8 * m];
            mma_f16(o[m], prmt(x[0], x[1], 0x5410), prmt(x[0], x[1], 0x7632), prmt(x[2], x[3], 0x5410),
                    prmt(x[2], x[3], 0x7632), b[0], b[1]);
            mma_f16(o[m], prmt(x[4], x[5], 0x5410), prmt(x[4], x[5], 0x7632), prmt(x[6], x[7], 0x5410),
                    prmt(x[6], x[7], 0x7632), b[2], b[3]);
        }
    } else {
#pragma unroll
        for (int b = 0; b < D / L::block; ++b) {
            float w[8];
#pragma unroll
            for (int i = 0; i < 8; ++i) {
                const float scale = load_half(row[i] + b * L::block_bytes);
                w[i] = p[i] > 0 ? p[i] * scale : 0.0f;
            }
            Weights weights = quantize_weights<Paired>(w, g);
            weights.scale *= Step<TV>::value;
            OutputScale s;
            s.s0 = __shfl_sync(all_lanes, weights.scale, 8 * t);
            s.s1 = __shfl_sync(all_lanes, weights.scale, 8 * t + 4);
            s.low0 = s.s0 * (1.0f / 256);
            s.low1 = s.s1 * (1.0f / 256);
            if constexpr (L::turbo) {
                constexpr int units = L::block / 64; // of a lane
#pragma unroll
                for (int j = 0; j < units; ++j) {
                    const int unit = L::bits == 4 ? g + 8 * j : units == 2 ? 2 * g + j : g;
                    uint32_t n[4], first[4], second[4];
#pragma unroll
                    for (int i = 0; i < 4; ++i)
                        n[i] = unit_nibbles<L::bits, L::block>(row[i] + b * L::block_bytes + 2, unit);
                    transpose_nibbles(n, first);
#pragma unroll
                    for (int i = 0; i < 4; ++i)
                        n[i] = unit_nibbles<L::bits, L::block>(row[4 + i] + b * L::block_bytes + 2, unit);
                    transpose_nibbles(n, second);
#pragma unroll
                    for (int m = 0; m < 4; ++m) { // nibbles 2m and 2m + 1
                        const int shift = 16 * (m % 2);
                        uint32_t x[4], negative[4] = {};
#pragma unroll
                        for (int i = 0; i < 4; ++i) {
                            const uint32_t selector = (i < 2 ? first : second)[m / 2 + 2 * (i % 2)] >> shift;
                            if constexpr (L::bits == 4) lookup_split(selector, x[i], negative[i]);
                            else x[i] = prmt(Table<L::bits>::c0, Table<L::bits>::c1, selector);
                        }
                        accumulate<L::bits == 4, Paired>(o[(b * units + j) * 4 + m], x, negative, weights, s);
                    }
                }
            } else {
                uint32_t x[2][4];
#pragma unroll
                for (int h = 0; h < 2; ++h) {
                    uint32_t r[4];
#pragma unroll
                    for (int i = 0; i < 4; ++i) r[i] = load_u32(row[4 * h + i] + b * L::block_bytes + 2 + 4 * g);
                    const uint32_t u = prmt(r[0], r[1], 0x5140), v = prmt(r[2], r[3], 0x5140);
                    const uint32_t y = prmt(r[0], r[1], 0x7362), z = prmt(r[2], r[3], 0x7362);
                    x[h][0] = prmt(u, v, 0x5410);
                    x[h][1] = prmt(u, v, 0x7632);
                    x[h][2] = prmt(y, z, 0x5410);
                    x[h][3] = prmt(y, z, 0x7632);
                }
#pragma unroll
                for (int m = 0; m < 2; ++m) {
                    const uint32_t a[4] = {x[0][2 * m], x[0][2 * m + 1], x[1][2 * m], x[1][2 * m + 1]};
                    accumulate<false, Paired>(o[b * 2 + m], a, a, weights, s);
                }
            }
        }
    }
}

// The lane's elements of column 2t + j to out[D].
template <KV TV, int D>
__device__ __forceinline__ void store_output(float * out, const float (&o)[D / 16][4], int j, int g) {
    using L = Layout<TV, D>;
    if constexpr (L::bits == 16) {
#pragma unroll
        for (int m = 0; m < D / 16; ++m)
            *reinterpret_cast<float2 *>(out + 2 * (g + 8 * m)) = make_float2(o[m][j], o[m][2 + j]);
    } else if constexpr (L::turbo) {
        constexpr int units = L::block / 64;
#pragma unroll
        for (int m = 0; m < D / 16; m += 4) {
            const int b = m / (4 * units), u = m / 4 % units;
            const int unit = L::bits == 4 ? g + 8 * u : units == 2 ? 2 * g + u : g;
#pragma unroll
            for (int h = 0; h < 2; ++h) // nibbles 2i + h of the unit
                *reinterpret_cast<float4 *>(out + b * L::block + unit_element<L::bits, L::block>(unit, h)) =
                    make_float4(o[m][2 * h + j], o[m + 1][2 * h + j], o[m + 2][2 * h + j], o[m + 3][2 * h + j]);
        }
    } else {
#pragma unroll
        for (int m = 0; m < D / 16; m += 2)
            *reinterpret_cast<float4 *>(out + 16 * m + 4 * g) =
                make_float4(o[m][j], o[m][2 + j], o[m + 1][j], o[m + 1][2 + j]);
    }
}

// ---- the kernel

// x in a register, where the compiler would rather compute it again in every step: a shuffle is not repeated.
__device__ __forceinline__ int keep(int x) { return __shfl_sync(all_lanes, x, threadIdx.x % 32); }

template <KV TK, KV TV, int D>
__global__ void __launch_bounds__(32 * most_warps, D <= 128 ? 2 : 1)
    attention_kernel(const __grid_constant__ AttentionCall call) {
    using LK = Layout<TK, D>;
    using LV = Layout<TV, D>;
    extern __shared__ __align__(16) uint8_t shared[];
    let_next_start();
    const Attention & a = call.a;
    const AttentionPlan & p = call.p;
    const int lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
    const int warp = threadIdx.x / 32, row_tile = keep(warp / p.block_heads);
    const int head_in_block = warp - row_tile * p.block_heads;
    const int column_tile = p.column_tiles == 1 ? 0 : blockIdx.y / p.head_groups;
    const int first_head = (blockIdx.y - column_tile * p.head_groups) * p.block_heads;
    const int kv_head = first_head + head_in_block, stream = blockIdx.z;
    const int kv_stream = a.streams == a.kv_streams ? stream : stream / (a.streams / a.kv_streams);
    const bool paired = p.column_tile == 4;

    const uint8_t * k = static_cast<const uint8_t *>(a.k) + kv_stream * a.k_stream + first_head * a.k_head;
    const uint8_t * v = static_cast<const uint8_t *>(a.v) + kv_stream * a.v_stream + first_head * a.v_head;
    const int rows = p.row_tiles * tile;
    const int stage_bytes = rows * (p.pitch_k + p.pitch_v);
    const uint32_t shared_address = uint32_t(__cvta_generic_to_shared(shared));
    const int64_t begin = int64_t(blockIdx.x) * p.chunk_rows;
    const int length = int(begin + p.chunk_rows < a.n_kv ? p.chunk_rows : a.n_kv - begin);

    auto load = [&](int at, int stage) { // the rows from begin + at on, to the memory of that stage
        if (at < length) {
#pragma unroll 1
            for (int side = 0; side < 2; ++side)
                load_rows(shared_address + stage * stage_bytes + (side ? rows * p.pitch_k : 0),
                          side ? Side{v, a.v_row, p.block_heads * LV::bytes, p.pitch_v}
                               : Side{k, a.k_row, p.block_heads * LK::bytes, p.pitch_k},
                          rows, begin + at, a.n_kv);
        }
        copy_commit();
    };

    constexpr float log2e = 1.44269504f;
    const int column = column_tile * p.column_tile + (paired ? g % 4 : g);
    const bool valid = column < p.columns;
    const int token = valid ? column / p.group : 0, head = kv_head * p.group + (valid ? column % p.group : 0);
    const char * mask = a.mask ? static_cast<const char *>(a.mask) + token * a.mask_token +
                                     head % a.mask_heads * a.mask_head + stream % a.mask_streams * a.mask_stream
                               : nullptr;
    const bool mask_pairs = (reinterpret_cast<uintptr_t>(mask) & 3) == 0;
    // The mask of the lane's rows in the tile at `first`: two binary16 values a word.
    uint32_t masked[4] = {0, 0, 0, 0};
    auto load_mask = [&](int64_t first) {
        if (first + tile <= a.n_kv && mask_pairs) {
            if (mask) {
                const uint32_t * at = reinterpret_cast<const uint32_t *>(mask + 2 * (first + 2 * t));
#pragma unroll
                for (int i = 0; i < 4; ++i) masked[i] = at[4 * i];
            }
            return;
        }
#pragma unroll 1
        for (int64_t r = first + 2 * t; r < first + tile; r += 8) {
            uint32_t word = 0;
#pragma unroll 1
            for (int i = 1; i >= 0; --i) {
                const uint16_t minus_infinity = 0xfc00;
                word = word << 16 | (r + i >= a.n_kv ? minus_infinity
                                     : mask          ? *reinterpret_cast<const uint16_t *>(mask + 2 * (r + i))
                                                     : 0);
            }
            masked[0] = masked[1];
            masked[1] = masked[2];
            masked[2] = masked[3];
            masked[3] = word;
        }
    };
    float slope = log2e;
    if (a.max_bias > 0)
        slope *= head < call.slope_heads ? powf(call.slope0, float(head + 1))
                                         : powf(call.slope1, float(2 * (head - call.slope_heads) + 1));
    // Where the lane's rows lie in a stage. A step advances by a multiple of 32 rows: the same modulo 16.
    const uint32_t row = uint32_t(begin + row_tile * tile), k_stride = uint32_t(a.k_row), v_stride = uint32_t(a.v_row);
    const uint32_t k_low = uint32_t(reinterpret_cast<uintptr_t>(k)) + row * k_stride,
                   v_low = uint32_t(reinterpret_cast<uintptr_t>(v)) + row * v_stride;
    const int k_at = row_tile * tile * p.pitch_k + head_in_block * LK::bytes;
    const int v_at = rows * p.pitch_k + row_tile * tile * p.pitch_v + head_in_block * LV::bytes;
    const int k_operand = keep(k_at + g * p.pitch_k + row_offset(k_low, k_stride, g));
    const int k_scale0 = keep(k_at + 2 * t * p.pitch_k + row_offset(k_low, k_stride, 2 * t));
    const int k_scale1 = keep(k_at + (2 * t + 1) * p.pitch_k + row_offset(k_low, k_stride, 2 * t + 1));
    const int v_row0 = keep(v_at + 2 * t * p.pitch_v + row_offset(v_low, v_stride, 2 * t));
    const int v_row1 = keep(v_at + (2 * t + 1) * p.pitch_v + row_offset(v_low, v_stride, 2 * t + 1));

    if (int(threadIdx.x) < min(rows, length)) {
        prefetch(k + (begin + threadIdx.x) * a.k_row);
        prefetch(v + (begin + threadIdx.x) * a.v_row);
    }
    if (threadIdx.x == 0) prefetch(a.q);
    if (mask && threadIdx.x == 0) prefetch(mask);
    wait_for_previous();
    float queries[4][D / 32];
    load_queries<D>(call, stream, kv_head, column_tile * p.column_tile, row_tile, queries);
#pragma unroll 1
    for (int stage = 0; stage < p.stages - 1; ++stage) load(stage * rows, stage);
    load_mask(begin + row_tile * tile);

    // the last stage is not in use yet
    uint32_t q[D / 32][4];
    const float factor =
        prepare_queries<TK, D>(call, stream, kv_head, column_tile * p.column_tile, row_tile,
                               shared + (p.stages - 1) * stage_bytes + head_in_block * query_scratch<D>, queries, q);
    const float to_score = LK::bits == 16 ? 1.0f : factor;            // of the products, to natural units
    const float to_log2 = a.soft_cap != 0 ? log2e : to_score * log2e; // of what the soft cap leaves, to powers of two

    float largest = -1e30f, sum = 0; // of column g, over the lane's rows
    float o[D / 16][4];
#pragma unroll
    for (int i = 0; i < D / 16; ++i)
#pragma unroll
        for (int j = 0; j < 4; ++j) o[i][j] = 0;

    const int ahead = (p.stages - 1) * rows;
    for (int at = 0, now = 0; at < length; at += rows, now = now + 1 == p.stages ? 0 : now + 1) {
        if (p.stages == 3) copy_wait<1>();
        else copy_wait<0>();
        __syncthreads();
        load(at + ahead, now ? now - 1 : p.stages - 1);
        const int own = at + row_tile * tile; // the warp's rows
        if (own >= length) continue;

        constexpr uint32_t hidden = 0xfc00fc00; // two minus infinities
        const bool sees = masked[0] != hidden || masked[1] != hidden || masked[2] != hidden || masked[3] != hidden;
        if (!__any_sync(all_lanes, sees)) { // no column sees any of the rows
            if (own + rows < length) load_mask(begin + own + rows);
            continue;
        }
        const uint8_t * stage = shared + now * stage_bytes;
        float s[8];
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            float pair[2];
            const uint8_t * group = stage + 8 * i * p.pitch_k;
            scores<TK, D>(q, group + k_operand, group + k_scale0, group + k_scale1, t, pair);
            s[2 * i] = pair[0];
            s[2 * i + 1] = pair[1];
        }
        if (a.soft_cap != 0) {
#pragma unroll
            for (int i = 0; i < 8; ++i) s[i] = a.soft_cap * tanhf(s[i] * to_score / a.soft_cap);
        }
        float top = -INFINITY;
#pragma unroll
        for (int i = 0; i < 8; ++i) {
            const float bias = __half2float(__ushort_as_half(uint16_t(masked[i / 2] >> (16 * (i % 2)))));
            s[i] = s[i] * to_log2 + slope * bias;
            if (bias == -INFINITY) s[i] = -INFINITY; // whatever bytes the row has
            top = fmaxf(top, s[i]);
        }
        if (own + rows < length) load_mask(begin + own + rows); // of the next step
        top = fmaxf(top, __shfl_xor_sync(all_lanes, top, 1));
        top = fmaxf(top, __shfl_xor_sync(all_lanes, top, 2));
        const float before = largest;
        largest = fmaxf(largest, top);
        const float correction = exp2f(before - largest);
        sum *= correction;
#pragma unroll
        for (int i = 0; i < 8; ++i) {
            s[i] = exp2f(s[i] - largest);
            sum += s[i];
        }
        if (__any_sync(all_lanes, correction != 1.0f)) {
            const float c0 = __shfl_sync(all_lanes, correction, 8 * t),
                        c1 = __shfl_sync(all_lanes, correction, 8 * t + 4);
#pragma unroll
            for (int i = 0; i < D / 16; ++i)
#pragma unroll
                for (int j = 0; j < 4; ++j) o[i][j] *= j & 1 ? c1 : c0;
        }
        // sparse V: a tile of weights that are all small, or zero
        if (!__any_sync(all_lanes, valid && !(exp2f(top - largest) <= a.sparse_v))) continue;
        if (paired) output<TV, D, true>(o, s, stage + v_row0, stage + v_row1, p.pitch_v, lane);
        else output<TV, D, false>(o, s, stage + v_row0, stage + v_row1, p.pitch_v, lane);
    }

    sum += __shfl_xor_sync(all_lanes, sum, 1);
    sum += __shfl_xor_sync(all_lanes, sum, 2);
    if (paired) {
#pragma unroll
        for (int i = 0; i < D / 16; ++i)
#pragma unroll
            for (int j = 0; j < 4; ++j) o[i][j] += __shfl_xor_sync(all_lanes, o[i][j], 2); // the low bytes' columns
    }
    const bool some = __any_sync(all_lanes, !(largest <= -1e30f)); // the warp's rows are not all hidden
    const bool has_meta = t == 0 && (!paired || g < 4), has_output = !paired || t < 2;
    const auto query_row = [&](int c) {
        return (int64_t(stream) * a.tokens + c / p.group) * a.heads + c % p.group; // of the first KV head
    };

    if (gridDim.x > 1) { // merge_kernel goes on
        const int part = blockIdx.x * p.row_tiles + row_tile;
        if (valid && has_meta)
            call.meta[(query_row(column) + kv_head * p.group) * p.parts + part] = make_float2(largest, sum);
        if (!has_output) return;
#pragma unroll
        for (int j = 0; j < 2; ++j) {
            const int c = column_tile * p.column_tile + 2 * t + j;
            if (c >= p.columns) continue;
            store_output<TV, D>(call.partial + ((query_row(c) + kv_head * p.group) * p.parts + part) * D, o, j, g);
        }
        return;
    }

    // The warps' results meet in shared memory: [warp][column][D], then [warp][column] of largest score and sum.
    __syncthreads();
    const int warps = blockDim.x / 32;
    float * results = reinterpret_cast<float *>(shared);
    float2 * metas = reinterpret_cast<float2 *>(results + warps * p.column_tile * D);
    if (has_meta) metas[warp * p.column_tile + g] = make_float2(largest, sum);
    if (has_output && some) { // what is not stored has no weight
#pragma unroll
        for (int j = 0; j < 2; ++j)
            store_output<TV, D>(results + (warp * p.column_tile + 2 * t + j) * D, o, j, g);
    }
    __syncthreads();
    for (int task = warp; task < p.block_heads * p.column_tile; task += warps) {
        const int h = task / p.column_tile, c = task % p.column_tile, at = column_tile * p.column_tile + c;
        if (at >= p.columns) continue;
        const int query_head = (first_head + h) * p.group + at % p.group;
        const float sink = a.sinks ? a.sinks[query_head] * log2e : -INFINITY;
        // lane r weighs row tile r
        const int from = h * p.column_tile + c, apart = p.block_heads * p.column_tile;
        const float2 own = lane < p.row_tiles ? metas[from + lane * apart] : make_float2(-INFINITY, 0);
        float top = fmaxf(fmaxf(sink, -1e30f), own.x);
#pragma unroll
        for (int i = 1; i < most_warps; i *= 2) top = fmaxf(top, __shfl_xor_sync(all_lanes, top, i));
        top = __shfl_sync(all_lanes, top, 0);
        const float weight = own.x <= -1e30f ? 0.0f : exp2f(own.x - top);
        float total = weight * own.y, y[D / 32];
#pragma unroll
        for (int i = 1; i < most_warps; i *= 2) total += __shfl_xor_sync(all_lanes, total, i);
        total = __shfl_sync(all_lanes, total, 0) + exp2f(sink - top);
#pragma unroll
        for (int j = 0; j < D / 32; ++j) y[j] = 0;
#pragma unroll
        for (int r = 0; r < most_warps; ++r) {
            const float w = __shfl_sync(all_lanes, weight, r);
#pragma unroll
            for (int j = 0; j < D / 32; ++j)
                y[j] += w != 0 ? w * results[(from + r * apart) * D + lane + 32 * j] : 0.0f;
        }
        const float inverse = total == 0 ? 0.0f : 1.0f / total; // a NaN is not hidden
#pragma unroll
        for (int j = 0; j < D / 32; ++j) y[j] *= inverse;
        if constexpr (LV::turbo) {
            constexpr int B = LV::block / 32;
#pragma unroll
            for (int b = 0; b < D / LV::block; ++b) {
                float part[B];
#pragma unroll
                for (int j = 0; j < B; ++j) part[j] = y[b * B + j];
                unrotate_warp<LV::block>(part);
#pragma unroll
                for (int j = 0; j < B; ++j) y[b * B + j] = part[j];
            }
        }
        float * out = a.dst + (query_row(at) + (first_head + h) * p.group) * D;
#pragma unroll
        for (int j = 0; j < D / 32; ++j) out[lane + 32 * j] = y[j];
    }
}

} // namespace

using AttentionKernel = void (*)(AttentionCall);

// The kernel for the types, or nullptr; one function per head size, each in a file of its own.
AttentionKernel attention_kernel_64(KV type_k, KV type_v);
AttentionKernel attention_kernel_128(KV type_k, KV type_v);
AttentionKernel attention_kernel_256(KV type_k, KV type_v);

#define TURBOQUANT_ATTENTION_KERNELS(D)                                                      \
    namespace {                                                                              \
    template <KV TK> AttentionKernel kernel_for(KV type_v) {                                 \
        switch (type_v) {                                                                    \
            case KV::turbo4: return attention_kernel<TK, KV::turbo4, D>;                     \
            case KV::turbo3: return attention_kernel<TK, KV::turbo3, D>;                     \
            case KV::turbo2: return attention_kernel<TK, KV::turbo2, D>;                     \
            case KV::q8_0:                                                                   \
                if constexpr (Kind<TK>::bits <= 4) return attention_kernel<TK, KV::q8_0, D>; \
                break;                                                                       \
            case KV::f16:                                                                    \
                if constexpr (Kind<TK>::bits <= 4) return attention_kernel<TK, KV::f16, D>;  \
                break;                                                                       \
        }                                                                                    \
        return nullptr;                                                                      \
    }                                                                                        \
    }                                                                                        \
    AttentionKernel attention_kernel_##D(KV type_k, KV type_v) {                             \
        switch (type_k) {                                                                    \
            case KV::turbo4: return kernel_for<KV::turbo4>(type_v);                          \
            case KV::turbo3: return kernel_for<KV::turbo3>(type_v);                          \
            case KV::turbo2: return kernel_for<KV::turbo2>(type_v);                          \
            case KV::q8_0: return kernel_for<KV::q8_0>(type_v);                              \
            case KV::f16: return kernel_for<KV::f16>(type_v);                                \
        }                                                                                    \
        return nullptr;                                                                      \
    }

} // namespace cuda
} // namespace turboquant

#endif
