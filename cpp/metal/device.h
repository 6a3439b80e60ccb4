// Functions that the kernels share: loads, binary16, the transform of a block by a SIMD group, and the operations on
// doubles that the encoder needs.
#ifndef TURBOQUANT_METAL_DEVICE_H
#define TURBOQUANT_METAL_DEVICE_H

#include "arguments.h"
#include "constants.h"

namespace turboquant {

template <int N> struct Block;
template <> struct Block<128> { enum { index = 0 }; };
template <> struct Block<64> { enum { index = 1 }; };
template <> struct Block<32> { enum { index = 2 }; };

template <int F, int N> struct Format {
    enum { bytes = 2 + N * Family<F>::bits / 8 };
};

// ---- loads: blocks begin at even addresses

inline uint load_u16(device const uchar * p) { return *reinterpret_cast<device const ushort *>(p); }
inline uint load_u32(device const uchar * p) { return load_u16(p) | load_u16(p + 2) << 16; }

// ---- binary16, in integers: a GPU may treat subnormal numbers as zeros

inline float float_of_half(uint h) {
    const uint sign = (h & 0x8000u) << 16, e = h >> 10 & 31u, m = h & 0x3ffu;
    if (e == 31) return as_type<float>(sign | 0x7f800000u | (m ? 0x400000u | m << 13 : 0u));
    if (e == 0) return as_type<float>(sign | as_type<uint>(float(m) * 5.9604644775390625e-8f)); // 2^-24
    return as_type<float>(sign | (e + 112) << 23 | m << 13);
}

// Rounds to nearest even.
inline uint half_of_float(float x) {
    const uint b = as_type<uint>(x), sign = b >> 16 & 0x8000u, a = b & 0x7fffffffu;
    if (a >= 0x7f800000u) return sign | 0x7c00u | (a > 0x7f800000u ? 0x200u | (a >> 13 & 0x3ffu) : 0u);
    if (a >= 0x477ff000u) return sign | 0x7c00u; // rounds to 65536 or more
    if (a < 0x38800000u) return sign | (as_type<uint>(as_type<float>(a) + 0.5f) - 0x3f000000u); // an ulp is 2^-24
    return sign | (a - 0x38000000u + 0xfffu + (a >> 13 & 1u)) >> 13;
}

inline bool is_nan(float x) { return (as_type<uint>(x) & 0x7fffffffu) > 0x7f800000u; }

// The scale of a block: binary16, or the ten bits of it that a trellis-coded block has.
template <int F> inline float load_scale(device const uchar * block) {
    const uint word = load_u16(block);
    return float_of_half(Family<F>::trellis ? (word & ((1u << scale_bits) - 1)) << (15 - scale_bits) : word);
}

// ---- doubles, as their bits. All are positive and normal; results are rounded to nearest even.

constant ulong double_one = 0x0010000000000000ul; // bit 52

inline ulong double_fraction(ulong x) { return (x & (double_one - 1)) | double_one; }

// The double with exponent e (biased) and the fraction q, which has 53 bits, or is 2^53.
inline ulong double_of(int e, ulong q) { return (ulong(uint(e)) << 52) + (q - double_one); }

inline ulong double_of_uint(ulong x) { // 1 <= x < 2^53
    const uint high = uint(x >> 32);
    const int top = high ? 63 - int(clz(high)) : 31 - int(clz(uint(x)));
    return double_of(1023 + top, x << (52 - top));
}

inline ulong double_of_float(float x) {
    const ulong b = as_type<uint>(x);
    return ((b >> 23) + 896ul) << 52 | (b & 0x7ffffful) << 29;
}

inline ulong double_multiply(ulong x, ulong y) {
    const ulong a = double_fraction(x), b = double_fraction(y), low = 0xfffffffful;
    const ulong p00 = (a & low) * (b & low), p01 = (a & low) * (b >> 32), p10 = (a >> 32) * (b & low);
    const ulong middle = (p00 >> 32) + (p01 & low) + (p10 & low);
    const ulong lower = (p00 & low) | middle << 32;
    const ulong upper = (a >> 32) * (b >> 32) + (p01 >> 32) + (p10 >> 32) + (middle >> 32);
    const int more = upper >> 41 & 1ul ? 1 : 0, shift = 52 + more; // the product has 105 or 106 bits
    const ulong rest = lower & ((1ul << shift) - 1), tie = 1ul << (shift - 1);
    ulong q = upper << (64 - shift) | lower >> shift;
    if (rest > tie || (rest == tie && (q & 1ul))) ++q;
    return double_of(int(x >> 52) + int(y >> 52) - 1023 + more, q);
}

inline ulong double_divide(ulong x, ulong y) {
    ulong rest = double_fraction(x), q = 0;
    const ulong b = double_fraction(y);
    int e = int(x >> 52) - int(y >> 52) + 1023;
    if (rest < b) {
        rest <<= 1;
        --e;
    }
    for (int i = 0; i < 53; ++i) {
        q <<= 1;
        if (rest >= b) {
            rest -= b;
            q |= 1ul;
        }
        rest <<= 1;
    }
    if (rest > b || (rest == b && (q & 1ul))) ++q;
    return double_of(e, q);
}

// The product with 2^k.
inline ulong scale_by(ulong x, int k) { return x + (ulong(long(k)) << 52); }

// 0 for numbers below float's normal ones, and the greatest float for those that exceed it.
inline float float_of_double(ulong x) {
    const int e = int(x >> 52) - 1023;
    if (e < -126) return 0.0f;
    if (e > 126) return as_type<float>(0x7f7fffffu);
    const ulong rest = x & 0x1ffffffful;
    uint bits = (uint(e + 127) << 23) + uint((x & (double_one - 1)) >> 29);
    if (rest > 0x10000000ul || (rest == 0x10000000ul && (bits & 1u))) ++bits;
    return as_type<float>(bits);
}

// ---- the transform

inline float flip_sign(float x, uint word, uint bit) { return as_type<float>(as_type<uint>(x) ^ (word >> bit) << 31); }

// Applies H_N, unnormalised, to a block: lane l holds elements l, l + 32, ... The order of the stages is part of the
// specification.
template <int N> inline void hadamard(thread float * y, ushort lane) {
    for (ushort h = 1; h < 32; h *= 2)
        FOR_UNROLLED (int j = 0; j < N / 32; ++j) {
            const float other = simd_shuffle_xor(y[j], h);
            y[j] = lane & h ? other - y[j] : y[j] + other;
        }
    for (int h = 1; h < N / 32; h *= 2)
        FOR_UNROLLED (int j = 0; j < N / 32; ++j)
            if (!(j & h)) {
                const float a = y[j], b = y[j + h];
                y[j] = a + b;
                y[j + h] = a - b;
            }
}

// Rotates a block as the specification says, or applies the inverse. Lane l holds elements l, l + 32, ...
template <int N> inline void transform(thread float * y, bool inverse, ushort lane) {
    FOR_UNROLLED (int j = 0; j < N / 32; ++j) y[j] = flip_sign(y[j], inverse ? signs2[j] : signs1[j], lane);
    hadamard<N>(y, lane);
    const float norm = one_over_sqrt[Block<N>::index];
    FOR_UNROLLED (int j = 0; j < N / 32; ++j)
        y[j] = inverse ? flip_sign(y[j] * norm, signs1[j], lane) : flip_sign(y[j], signs2[j], lane) * norm;
}

} // namespace turboquant

#endif
