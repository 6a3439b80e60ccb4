// The operands of the tensor cores: levels of K and V, made from rows in shared memory, and the weights of the softmax.
//
// The inner index of a matrix product may have any order that is the same in both operands. So the operands keep the
// order in which values are packed: the eight indices of a unit become eight nibbles, and these are the selectors of
// the byte permutes that look up levels.
//
//   scores: A = K; B = queries (Query); inner index = elements
//     A unit of a KV row gives two registers of a lane: nibbles 0-3 give the first, nibbles 4-7 the second.
//
//   output: A = V transposed; B = weights times V's scales (Weights); inner index = KV rows
//     The nibbles of a unit in four KV rows a, b, c, d are transposed first, so that each half word of a register
//     selects one element of the four rows. a0 is nibble 0 of row a; bytes are in brackets, lowest first:
//
//       n[0] = [a0a1][a2a3][a4a5][a6a7]           even nibbles of a and b: [a0b0][a2b2][a4b4][a6b6]
//       n[1] = [b0b1][b2b3][b4b5][b6b7]           odd ones:                [a1b1][a3b3][a5b5][a7b7]
//       interleave_low of (even a b, even c d)  = [a0b0][c0d0] [a2b2][c2d2]    selectors of elements 0 and 2
//       interleave_high                         = [a4b4][c4d4] [a6b6][c6d6]    of 4 and 6; then the odd ones likewise
//
// The tensor cores give a lane the products of rows quad and quad + 8 of A with columns 2 * in_quad and 2 * in_quad + 1
// of B, in this order.
#ifndef TURBOQUANT_CUDA_OPERANDS_H
#define TURBOQUANT_CUDA_OPERANDS_H

#include "load.cuh"

namespace turboquant {
namespace cuda {
namespace {

// An operand in R registers, as int8: the difference of P parts.
template <int P, int R> struct Levels {
    uint32_t x[P][R];
};

// ---- K

// The lane's unit for product `step` of a block of crumbs. Two products share the lane's word of crumbs, and blocks of
// 128 values have two pairs of products, which share words of the path. Blocks of 32 values have one product.
template <KV TK, int D> __device__ __forceinline__ Unit key_unit(const uint8_t * indices, int in_quad, int step) {
    using F = typename Layout<TK, D>::BlockFormat;
    if constexpr (F::block == 128) return Crumbs<F>(indices, in_quad, step >> 1).unit(step & 1);
    else if constexpr (F::block == 64) return Crumbs<F>(indices, in_quad).unit(step);
    else return load_unit<F>(indices, in_quad);
}

// The levels of a lane's eight elements, of the 32 elements of a block that product `step` takes.
template <KV TK, int D, typename LookUp>
__device__ __forceinline__ auto key_levels(const LookUp & look_up, const uint8_t * block, int step, int in_quad) {
    using L = Layout<TK, D>;
    Levels<L::parts, 2> k;
    if constexpr (L::turbo) {
        uint32_t nibbles[2], signs = 0;
        int sign_bit = 0;
        if constexpr (L::nibbles) { // half of a unit is what one load reads
            const uint8_t * unit = block + 2 + 4 * (in_quad + 4 * step);
            nibbles[0] = load_u16(unit);
            nibbles[1] = load_u16(unit + 2);
        } else {
            const Unit unit = key_unit<TK, D>(block + 2, in_quad, step);
            nibbles[0] = unit.nibbles;
            nibbles[1] = shift_right(unit.nibbles, 16);
            signs = unit.signs;
            sign_bit = unit.sign_bit;
        }
#pragma unroll
        for (int i = 0; i < 2; ++i) {
            uint32_t part[L::parts];
            look_up(nibbles[i], shift_right(signs, 16 * i), sign_bit, part);
#pragma unroll
            for (int p = 0; p < L::parts; ++p) k.x[p][i] = part[p];
        }
    } else { // one product takes a block of 32
        k.x[0][0] = load_u32(block + 2 + 4 * in_quad);
        k.x[0][1] = load_u32(block + 18 + 4 * in_quad);
    }
    return k;
}

// ---- V

// A lane computes whole units of a block of V: eight elements of a turbo type, or four of q8_0. A product takes two
// elements of a unit. Blocks of 32 values of a turbo type have four units, so lanes compute halves of them: a half of a
// block and that of the next block are computed like a unit.
template <KV TV, int D> struct ValueUnits {
    using L = Layout<TV, D>;
    static constexpr bool halves = L::turbo && L::block == 32;
    static constexpr int blocks = halves ? 2 : 1;                         // that are computed together
    static constexpr int count = L::turbo && !halves ? L::block / 64 : 1; // units of a lane in a block
    static constexpr int products = L::turbo && !halves ? 4 : 2;          // of a unit, or of half a unit

    // The number of a lane's unit j in the block.
    static __device__ __forceinline__ int unit(int quad, int j) {
        return L::nibbles || count == 1 ? quad + 8 * j : count * quad + j;
    }
};

// Transposes the nibbles of a unit in four rows to selectors of single elements, as shown above. For i = 0, 1, 2, 3 the
// low half of out[i] is the selector of nibble 0, 4, 1, 5; the high half is that of nibble 2, 6, 3, 7.
__device__ __forceinline__ void transpose_nibbles(const uint32_t (&n)[4], uint32_t (&out)[4]) {
    constexpr uint32_t low_nibbles = 0x0f0f0f0f;
    const auto even = [](uint32_t a, uint32_t b) { return select(low_nibbles, a, shift_left(b, 4)); };
    const auto odd = [](uint32_t a, uint32_t b) { return select(low_nibbles, shift_right(a, 4), b); };
    const uint32_t even01 = even(n[0], n[1]), odd01 = odd(n[0], n[1]);
    const uint32_t even23 = even(n[2], n[3]), odd23 = odd(n[2], n[3]);
    out[0] = prmt(even01, even23, interleave_low);
    out[1] = prmt(even01, even23, interleave_high);
    out[2] = prmt(odd01, odd23, interleave_low);
    out[3] = prmt(odd01, odd23, interleave_high);
}

// The lane's units of a block of V in its eight rows; row[i] + offset is the block, and the next one that is computed
// with it, if there is one, is `next` bytes further on.
template <KV TV, int D> struct ValueBlock {
    using L = Layout<TV, D>;
    using Units = ValueUnits<TV, D>;
    uint32_t first[Units::count][4], second[Units::count][4]; // of row[0-3] and row[4-7]: selectors, or for q8_0 levels
    uint32_t signs[4]; // selectors, if L::signs: bits 0 and 2 for row[0-3], bits 1 and 3 for row[4-7]

    __device__ __forceinline__ ValueBlock(const uint8_t * const (&row)[8], int offset, int quad, int next = 0) {
        const uint8_t * const low[4] = {row[0], row[1], row[2], row[3]};
        const uint8_t * const high[4] = {row[4], row[5], row[6], row[7]};
        uint32_t first_signs[4], second_signs[4];
        read(low, offset + 2, quad, next, first, first_signs);
        read(high, offset + 2, quad, next, second, second_signs);
        if constexpr (L::signs) {
#pragma unroll
            for (int i = 0; i < 4; ++i)
                first_signs[i] = select(even_bits, first_signs[i], shift_left(second_signs[i], 1));
            transpose_nibbles(first_signs, signs);
        }
    }

    // The operand A of product m of unit j. Registers 0 and 2 have one element of the unit, registers 1 and 3 another.
    template <typename LookUp> __device__ __forceinline__ auto levels(const LookUp & look_up, int j, int m) const {
        Levels<L::parts, 4> v;
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            if constexpr (L::turbo) { // nibbles 2m and 2m + 1
                const int at = m / 2 + 2 * (i % 2), shift = 16 * (m % 2);
                const uint32_t selector = shift_right((i < 2 ? first : second)[j][at], shift);
                const int sign_bit = (Units::count == 2 ? 2 * j : 0) + i / 2;
                uint32_t part[L::parts];
                look_up(selector, L::signs ? shift_right(signs[at], shift) : 0, sign_bit, part);
#pragma unroll
                for (int p = 0; p < L::parts; ++p) v.x[p][i] = part[p];
            } else { // elements 2m and 2m + 1
                v.x[0][i] = (i < 2 ? first : second)[j][2 * m + i % 2];
            }
        }
        return v;
    }

private:
    // `signs` has those of field f in bits 2 f of the nibbles.
    static __device__ __forceinline__ void read(const uint8_t * const (&row)[4], int offset, int quad, int next,
                                                uint32_t (&out)[Units::count][4], uint32_t (&signs)[4]) {
        if constexpr (!L::turbo) {
#pragma unroll
            for (int i = 0; i < 4; ++i) out[0][i] = load_u32(row[i] + offset + 4 * Units::unit(quad, 0));
            transpose_bytes(out[0]);
        } else {
            uint32_t x[Units::count][4];
#pragma unroll
            for (int i = 0; i < 4; ++i) {
                if constexpr (Units::halves) {
                    using F = typename L::BlockFormat;
                    const Unit a = load_unit<F>(row[i] + offset, quad % 4),
                               b = load_unit<F>(row[i] + offset + next, quad % 4);
                    const uint32_t half = quad < 4 ? low_halves : high_halves;
                    x[0][i] = prmt(a.nibbles, b.nibbles, half);
                    signs[i] = prmt(a.signs, b.signs, half);
                } else if constexpr (Units::count == 2 && !L::nibbles) {
                    const Crumbs<typename L::BlockFormat> crumbs(row[i] + offset, quad);
                    x[0][i] = crumbs.unit(0).nibbles;
                    x[1][i] = crumbs.unit(1).nibbles;
                    signs[i] = crumbs.unit(1).signs; // of both
                } else {
#pragma unroll
                    for (int j = 0; j < Units::count; ++j) {
                        const Unit unit = load_unit<typename L::BlockFormat>(row[i] + offset, Units::unit(quad, j));
                        x[j][i] = unit.nibbles;
                        signs[i] = unit.signs;
                    }
                }
            }
#pragma unroll
            for (int j = 0; j < Units::count; ++j) transpose_nibbles(x[j], out[j]);
        }
    }
};

// A lane's sums over V times weights, in the order of the products: of rows quad and quad + 8 of each, and C columns.
template <int D, int C> using Sums = float[D / 16][2][C];

// The elements of the lane's column h in `o`: calls run(at, x...) for two or four of them that are adjacent in a row,
// from element `at` on.
template <KV TV, int D, typename Sums, typename Run>
__device__ __forceinline__ void for_output(Sums & o, int h, int quad, const Run & run) {
    using L = Layout<TV, D>;
    if constexpr (L::floats) {
#pragma unroll
        for (int m = 0; m < D / 16; ++m) run(2 * (quad + 8 * m), o[m][0][h], o[m][1][h]);
    } else if constexpr (ValueUnits<TV, D>::halves) {
#pragma unroll
        for (int b = 0; b < D / 32; ++b)
#pragma unroll
            for (int i = 0; i < 2; ++i) // nibbles i and i + 2 of half a unit
                run(b * 32 + unit_element<typename L::BlockFormat>(quad % 4, quad / 4 * 4 + i), o[2 * b][i][h],
                    o[2 * b + 1][i][h]);
    } else if constexpr (L::turbo) {
        using Units = ValueUnits<TV, D>;
#pragma unroll
        for (int m = 0; m < D / 16; m += 4) {
            const int b = m / (4 * Units::count), unit = Units::unit(quad, m / 4 % Units::count);
#pragma unroll
            for (int i = 0; i < 2; ++i) // nibbles i, i + 2, i + 4 and i + 6 of the unit
                run(b * L::block + unit_element<typename L::BlockFormat>(unit, i), o[m][i][h], o[m + 1][i][h],
                    o[m + 2][i][h], o[m + 3][i][h]);
        }
    } else {
#pragma unroll
        for (int m = 0; m < D / 16; m += 2)
            run(16 * m + 4 * quad, o[m][0][h], o[m][1][h], o[m + 1][0][h], o[m + 1][1][h]);
    }
}

__device__ __forceinline__ void store_run(float * out, float a, float b) {
    *reinterpret_cast<float2 *>(out) = make_float2(a, b);
}
__device__ __forceinline__ void store_run(float * out, float a, float b, float c, float d) {
    *reinterpret_cast<float4 *>(out) = make_float4(a, b, c, d);
}
__device__ __forceinline__ void store_run_global(float * out, float a, float b) {
    asm volatile("st.global.v2.b32 [%0], {%1,%2};" ::"l"(out), "r"(__float_as_uint(a)), "r"(__float_as_uint(b)) : "memory");
}
__device__ __forceinline__ void store_run_global(float * out, float a, float b, float c, float d) {
    asm volatile("st.global.v4.b32 [%0], {%1,%2,%3,%4};" ::"l"(out), "r"(__float_as_uint(a)), "r"(__float_as_uint(b)),
                 "r"(__float_as_uint(c)), "r"(__float_as_uint(d)) : "memory");
}
__device__ __forceinline__ void add_run(const float * v, float w, float & a, float & b) {
    const float2 two = *reinterpret_cast<const float2 *>(v);
    a += w * two.x;
    b += w * two.y;
}
__device__ __forceinline__ void add_run(const float * v, float w, float & a, float & b, float & c, float & d) {
    const float4 four = *reinterpret_cast<const float4 *>(v);
    a += w * four.x;
    b += w * four.y;
    c += w * four.z;
    d += w * four.w;
}

// Stores the elements of the lane's column h to out[D].
template <KV TV, int D, int C>
__device__ __forceinline__ void store_output(float * out, const Sums<D, C> & o, int h, int quad) {
    for_output<TV, D>(o, h, quad, [&](int at, auto &... x) { store_run(out + at, x...); });
}
// The same, to global memory, in as few stores. Compilers may divide those of store_run, and four stores that each write
// a quarter of all sectors take long.
template <KV TV, int D, int C>
__device__ __forceinline__ void store_output_global(float * out, const Sums<D, C> & o, int h, int quad) {
    for_output<TV, D>(o, h, quad, [&](int at, auto &... x) { store_run_global(out + at, x...); });
}

// Adds w times a row of V, in the domain of its type, to the sums of the lane's column h.
template <KV TV, int D, int C>
__device__ __forceinline__ void add_output(Sums<D, C> & o, const float * v, float w, int h, int quad) {
    for_output<TV, D>(o, h, quad, [&](int at, auto &... x) { add_run(v + at, w, x...); });
}

// ---- weights

// The sum of `magic` and a float of magnitude below 2^22 has the nearest integer in its low bits, in two's complement.
constexpr float magic = 12582912.0f; // 1.5 * 2^23

// The greater of a and |b|, or NaN if one of the two is NaN; a is not negative. fmaxf would ignore NaNs, but attention
// does not run on the older devices that use it.
__device__ __forceinline__ float greater_magnitude(float a, float b) {
#if __CUDA_ARCH__ >= 800
    float out;
    asm("max.ftz.NaN.f32 %0, %1, %2;" : "=f"(out) : "f"(a), "f"(fabsf(b)));
    return out;
#else
    return fmaxf(a, fabsf(b));
#endif
}

// The operand B of the output from what lanes have of the rows of their scores. x[r] has the 16-bit values of column
// 2 * in_quad, in its low half, and of column 2 * in_quad + 1. Each has two int8 rows of a tile, or one in binary16.
__device__ __forceinline__ void to_operand(const uint32_t (&x)[2], uint32_t (&b)[2]) {
#pragma unroll
    for (int r = 0; r < 2; ++r) b[r] = transpose_matrix(x[r]);
}

// Weights times V's scales, which may be negative, become 16-bit integers with a common scale.
constexpr float largest_integer = 32512.0f; // 127 * 256
// The factor that makes the largest integer of `magnitude`, which is that of the scale. 0 for a NaN.
__device__ __forceinline__ float integers_of(float magnitude) {
    return magnitude > 1e-30f ? __fdividef(largest_integer, magnitude) : 0.0f;
}

// The operands for the integers, which are numbers times `factor`. If there are four columns, two columns of the
// operand have the high and the low bytes of one; else high and low bytes are two operands.
template <int C>
__device__ __forceinline__ void weight_operands(const float (&w)[lane_rows][C], const float (&factor)[C],
                                                uint32_t (&b)[C][2]) {
    // The integer plus 128, so that its second byte is the rounded high byte.
    const auto rounded = [&](int j, int h) { return __float_as_uint(w[j][h] * factor[h] + (magic + 128)); };
    uint32_t x[C][2];
#pragma unroll
    for (int r = 0; r < 2; ++r) {
        uint32_t bytes[C]; // of two rows, high ones first; the low ones are 128 too large
#pragma unroll
        for (int h = 0; h < C; ++h) bytes[h] = prmt(rounded(2 * r, h), rounded(2 * r + 1, h), high_and_low_bytes);
        if constexpr (C == 1) {
            x[0][r] = bytes[0] ^ 0x80800000;
        } else {
            x[0][r] = prmt(bytes[0], bytes[1], low_halves);
            x[1][r] = prmt(bytes[0], bytes[1], high_halves) ^ 0x80808080;
        }
    }
#pragma unroll
    for (int i = 0; i < C; ++i) to_operand(x[i], b[i]);
}

// The operands for levels of so many parts, of which the second one is subtracted.
template <int Parts, int C>
__device__ __forceinline__ void weight_operands(const float (&w)[lane_rows][C], const float (&factor)[C],
                                                uint32_t (&b)[Parts][C][2]) {
    weight_operands(w, factor, b[0]);
    if constexpr (Parts == 2) {
        float negative[C];
#pragma unroll
        for (int h = 0; h < C; ++h) negative[h] = -factor[h];
        weight_operands(w, negative, b[1]);
    }
}

} // namespace
} // namespace cuda
} // namespace turboquant

#endif
