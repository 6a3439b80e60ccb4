// The operands of the tensor cores: levels of K and V, made from rows in shared memory, and the weights of the softmax.
//
// The inner index of a matrix product may have any order that is the same in both operands. So the operands keep the
// order in which values are packed: the eight indices of a unit become eight nibbles, and these are the selectors of
// the byte permutes that look up levels.
//
//   scores: A = queries (rows 0-7 high bytes, rows 8-15 low bytes); B = K; inner index = elements
//     A unit of a KV row is the operand of a lane: nibbles 0-3 give its first register, nibbles 4-7 its second.
//
//   output: A = V transposed; B = weights times V's scales; inner index = KV rows
//     The nibbles of a unit in four KV rows a, b, c, d are transposed first, so that each half word of a register
//     selects one element of the four rows. a0 is nibble 0 of row a; bytes are in brackets, lowest first:
//
//       n[0] = [a0a1][a2a3][a4a5][a6a7]           even nibbles of a and b: [a0b0][a2b2][a4b4][a6b6]
//       n[1] = [b0b1][b2b3][b4b5][b6b7]           odd ones:                [a1b1][a3b3][a5b5][a7b7]
//       interleave_low of (even a b, even c d)  = [a0b0][c0d0] [a2b2][c2d2]    selectors of elements 0 and 2
//       interleave_high                         = [a4b4][c4d4] [a6b6][c6d6]    of 4 and 6; then the odd ones likewise
#ifndef TURBOQUANT_CUDA_OPERANDS_H
#define TURBOQUANT_CUDA_OPERANDS_H

#include "load.cuh"

namespace turboquant {
namespace cuda {
namespace {

// The levels of an operand in R registers: int8, or uint8 with 128 added if Layout::biased.
template <int R> struct Levels {
    uint32_t x[R];
};

// ---- K

// The levels of a lane's eight elements, of the 32 elements of a block that product `step` takes.
template <KV TK, int D>
__device__ __forceinline__ Levels<2> key_levels(const uint8_t * block, int step, int in_quad) {
    using L = Layout<TK, D>;
    Levels<2> k;
    if constexpr (L::turbo) {
        const LookUp<typename L::Family> look_up;
        if constexpr (L::nibbles) { // half of a unit is what one load reads
            const uint8_t * unit = block + 2 + 4 * (in_quad + 4 * step);
            k.x[0] = look_up(load_u16(unit), 0, 0);
            k.x[1] = look_up(load_u16(unit + 2), 0, 0);
        } else {
            const int field = step & 1;
            const Unit unit = Crumbs<typename L::BlockFormat>(block + 2, in_quad + 4 * (step >> 1)).unit(field);
#pragma unroll
            for (int i = 0; i < 2; ++i) k.x[i] = look_up(unit.nibbles >> (16 * i), unit.signs >> (16 * i), field);
        }
    } else { // one product takes a block of 32
        k.x[0] = load_u32(block + 2 + 4 * in_quad);
        k.x[1] = load_u32(block + 18 + 4 * in_quad);
    }
    return k;
}

// ---- V

// A lane computes whole units of a block of V: eight elements of a turbo type, or four of q8_0. A product takes two
// elements of a unit.
template <KV TV, int D> struct ValueUnits {
    using L = Layout<TV, D>;
    static constexpr int count = L::turbo ? L::block / 64 : 1; // units of a lane in a block
    static constexpr int products = L::turbo ? 4 : 2;          // of a unit

    // The number of a lane's unit j in the block.
    static __device__ __forceinline__ int unit(int quad, int j) {
        return L::nibbles || count == 1 ? quad + 8 * j : count * quad + j;
    }
};

// Transposes the nibbles of a unit in four rows to selectors of single elements, as shown above. For i = 0, 1, 2, 3 the
// low half of out[i] is the selector of nibble 0, 4, 1, 5; the high half is that of nibble 2, 6, 3, 7.
__device__ __forceinline__ void transpose_nibbles(const uint32_t (&n)[4], uint32_t (&out)[4]) {
    constexpr uint32_t low_nibbles = 0x0f0f0f0f;
    const uint32_t even01 = select(low_nibbles, n[0], n[1] << 4), odd01 = select(low_nibbles, n[0] >> 4, n[1]);
    const uint32_t even23 = select(low_nibbles, n[2], n[3] << 4), odd23 = select(low_nibbles, n[2] >> 4, n[3]);
    out[0] = prmt(even01, even23, interleave_low);
    out[1] = prmt(even01, even23, interleave_high);
    out[2] = prmt(odd01, odd23, interleave_low);
    out[3] = prmt(odd01, odd23, interleave_high);
}

// The lane's units of a block of V in its eight rows; row[i] + offset is the block.
template <KV TV, int D> struct ValueBlock {
    using L = Layout<TV, D>;
    using Units = ValueUnits<TV, D>;
    uint32_t first[Units::count][4], second[Units::count][4]; // of row[0-3] and row[4-7]: selectors, or for q8_0 levels
    uint32_t first_signs[4], second_signs[4];                 // selectors, if L::signs

    __device__ __forceinline__ ValueBlock(const uint8_t * const (&row)[8], int offset, int quad) {
        const uint8_t *const low[4] = {row[0], row[1], row[2], row[3]}, *const high[4] = {row[4], row[5], row[6], row[7]};
        read(low, offset + 2, quad, first, first_signs);
        read(high, offset + 2, quad, second, second_signs);
    }

    // The operand A of product m of unit j. Registers 0 and 2 have one element of the unit, registers 1 and 3 another.
    template <typename LookUp> __device__ __forceinline__ Levels<4> levels(const LookUp & look_up, int j, int m) const {
        Levels<4> v;
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            if constexpr (L::turbo) { // nibbles 2m and 2m + 1
                const int at = m / 2 + 2 * (i % 2), shift = 16 * (m % 2);
                const uint32_t selector = (i < 2 ? first : second)[j][at] >> shift;
                const uint32_t signs = L::signs ? (i < 2 ? first_signs : second_signs)[at] >> shift : 0;
                v.x[i] = look_up(selector, signs, Units::count == 2 ? j : 0);
            } else { // elements 2m and 2m + 1
                v.x[i] = (i < 2 ? first : second)[j][2 * m + i % 2];
            }
        }
        return v;
    }

private:
    static __device__ __forceinline__ void read(const uint8_t * const (&row)[4], int offset, int quad,
                                                uint32_t (&out)[Units::count][4], uint32_t (&signs)[4]) {
        if constexpr (!L::turbo) {
#pragma unroll
            for (int i = 0; i < 4; ++i) out[0][i] = load_u32(row[i] + offset + 4 * Units::unit(quad, 0));
            transpose_bytes(out[0]);
        } else {
            uint32_t x[Units::count][4], s[4];
#pragma unroll
            for (int i = 0; i < 4; ++i) {
                if constexpr (Units::count == 2 && !L::nibbles) {
                    const Crumbs<typename L::BlockFormat> crumbs(row[i] + offset, quad);
                    x[0][i] = crumbs.unit(0).nibbles;
                    x[1][i] = crumbs.unit(1).nibbles;
                    s[i] = crumbs.unit(1).signs; // of both
                } else {
#pragma unroll
                    for (int j = 0; j < Units::count; ++j) {
                        const Unit unit = load_unit<typename L::BlockFormat>(row[i] + offset, Units::unit(quad, j));
                        x[j][i] = unit.nibbles;
                        s[i] = unit.signs;
                    }
                }
            }
#pragma unroll
            for (int j = 0; j < Units::count; ++j) transpose_nibbles(x[j], out[j]);
            if constexpr (L::signs) transpose_nibbles(s, signs);
        }
    }
};

// The lane's elements of column 2 * in_quad + j in `o`, which has them in the order of the products: calls
// run(at, x...) for two or four of them that are adjacent in a row, from element `at` on.
template <KV TV, int D, typename Sums, typename Run>
__device__ __forceinline__ void for_output(Sums & o, int j, int quad, const Run & run) {
    using L = Layout<TV, D>;
    if constexpr (L::floats) {
#pragma unroll
        for (int m = 0; m < D / 16; ++m) run(2 * (quad + 8 * m), o[m][j], o[m][2 + j]);
    } else if constexpr (L::turbo) {
        using Units = ValueUnits<TV, D>;
#pragma unroll
        for (int m = 0; m < D / 16; m += 4) {
            const int b = m / (4 * Units::count), unit = Units::unit(quad, m / 4 % Units::count);
#pragma unroll
            for (int h = 0; h < 2; ++h) // nibbles 2i + h of the unit
                run(b * L::block + unit_element<typename L::BlockFormat>(unit, h), o[m][2 * h + j], o[m + 1][2 * h + j],
                    o[m + 2][2 * h + j], o[m + 3][2 * h + j]);
        }
    } else {
#pragma unroll
        for (int m = 0; m < D / 16; m += 2)
            run(16 * m + 4 * quad, o[m][j], o[m][2 + j], o[m + 1][j], o[m + 1][2 + j]);
    }
}

__device__ __forceinline__ void store_run(float * out, float a, float b) {
    *reinterpret_cast<float2 *>(out) = make_float2(a, b);
}
__device__ __forceinline__ void store_run(float * out, float a, float b, float c, float d) {
    *reinterpret_cast<float4 *>(out) = make_float4(a, b, c, d);
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

// Stores the lane's elements of column 2 * in_quad + j to out[D].
template <KV TV, int D>
__device__ __forceinline__ void store_output(float * out, const float (&o)[D / 16][4], int j, int quad) {
    for_output<TV, D>(o, j, quad, [&](int at, auto &... x) { store_run(out + at, x...); });
}

// Adds w times a row of V, in the domain of its type, to the sums of column 2 * in_quad + j.
template <KV TV, int D>
__device__ __forceinline__ void add_output(float (&o)[D / 16][4], const float * v, float w, int j, int quad) {
    for_output<TV, D>(o, j, quad, [&](int at, auto &... x) { add_run(v + at, w, x...); });
}

// ---- weights

// The sum of `magic` and a float of magnitude below 2^22 has the nearest integer in its low bits, in two's complement.
// Likewise, an int32 that starts as magic_bits, and to which integers are added, has the bits of the float magic + sum.
constexpr float magic = 12582912.0f; // 1.5 * 2^23
constexpr int magic_bits = 0x4b400000;

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

// Weights times V's scales, which may be negative, as 16-bit integers with a common scale: the operands have their high
// and low bytes. If there are four columns, columns 4-7 take the low bytes and `low` is not used. If a scale of V is
// NaN, the common scale is NaN.
struct Weights {
    uint32_t high[2], low[2];
    float scale; // of the lane's column
};

template <bool Paired> __device__ __forceinline__ Weights quantize_weights(const float (&w)[8], int quad) {
    float top = fabsf(w[0]);
#pragma unroll
    for (int i = 1; i < 8; ++i) top = greater_magnitude(top, w[i]);
    top = greater_magnitude(top, __shfl_xor_sync(all_lanes, top, 1));
    top = greater_magnitude(top, __shfl_xor_sync(all_lanes, top, 2));
    Weights out;
    const float inverse = top > 1e-30f ? __fdividef(32512.0f, top) : 0.0f; // 127 * 256
    out.scale = top * (1.0f / 32512.0f);
    const bool low = Paired && quad >= 4;
    if (!low) out.scale *= 256.0f;
    const uint32_t round = low ? 0 : 128, select = low ? lowest_bytes : second_bytes;
    uint32_t x[8];
#pragma unroll
    for (int i = 0; i < 8; ++i) x[i] = __float_as_uint(w[i] * inverse + magic);
#pragma unroll
    for (int h = 0; h < 2; ++h) {
        out.high[h] = prmt(prmt(x[4 * h] + round, x[4 * h + 1] + round, select),
                           prmt(x[4 * h + 2] + round, x[4 * h + 3] + round, select), low_halves);
        out.low[h] = prmt(prmt(x[4 * h], x[4 * h + 1], lowest_bytes),
                          prmt(x[4 * h + 2], x[4 * h + 3], lowest_bytes), low_halves);
    }
    return out;
}

} // namespace
} // namespace cuda
} // namespace turboquant

#endif
