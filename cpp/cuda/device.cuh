// Functions that the kernels share: warp primitives, the codebooks as tables for byte permutes, and the transform of a
// block by a warp.
#ifndef TURBOQUANT_CUDA_DEVICE_H
#define TURBOQUANT_CUDA_DEVICE_H

#include "../src/format.h"
#include "turboquant_cuda.h"

#include <cuda_fp16.h>

namespace turboquant {
namespace cuda {
namespace {

constexpr unsigned all_lanes = 0xffffffff;

// Whether there are CUDA kernels for a family.
template <typename Family> constexpr bool has_kernels = false;
template <int Bits> constexpr bool has_kernels<LloydMax<Bits>> = true;

__device__ __forceinline__ uint32_t warp_max(uint32_t x) {
#if __CUDA_ARCH__ >= 800
    return __reduce_max_sync(all_lanes, x);
#else
    for (int h = 16; h > 0; h /= 2) x = max(x, __shfl_xor_sync(all_lanes, x, h));
    return x;
#endif
}

__device__ __forceinline__ int warp_sum(int x) {
#if __CUDA_ARCH__ >= 800
    return __reduce_add_sync(all_lanes, x);
#else
    for (int h = 16; h > 0; h /= 2) x += __shfl_xor_sync(all_lanes, x, h);
    return x;
#endif
}

// Four centroids in a word, the lowest index in the lowest byte.
constexpr uint32_t pack4(const int8_t * c) {
    return uint32_t(uint8_t(c[0])) | uint32_t(uint8_t(c[1])) << 8 | uint32_t(uint8_t(c[2])) << 16 |
           uint32_t(uint8_t(c[3])) << 24;
}

// The sign bits of 32 elements.
constexpr uint32_t sign_word(const uint8_t * signs, int word) {
    return uint32_t(signs[4 * word]) | uint32_t(signs[4 * word + 1]) << 8 | uint32_t(signs[4 * word + 2]) << 16 |
           uint32_t(signs[4 * word + 3]) << 24;
}

// The magnitudes of four negative centroids in a word.
constexpr uint32_t pack4_magnitudes(const int8_t * c) {
    return uint32_t(-c[0]) | uint32_t(-c[1]) << 8 | uint32_t(-c[2]) << 16 | uint32_t(-c[3]) << 24;
}

// A codebook as words of four centroids.
template <int Bits> struct Table {
    static constexpr uint32_t c0 = pack4(Codebook<Bits>::centroids), c1 = pack4(Codebook<Bits>::centroids + 4),
                              c2 = pack4(Codebook<Bits>::centroids + 8), c3 = pack4(Codebook<Bits>::centroids + 12);
};

struct Signs {
    static constexpr uint32_t s10 = sign_word(signs1, 0), s11 = sign_word(signs1, 1), s12 = sign_word(signs1, 2),
                              s13 = sign_word(signs1, 3), s20 = sign_word(signs2, 0), s21 = sign_word(signs2, 1),
                              s22 = sign_word(signs2, 2), s23 = sign_word(signs2, 3);
};
struct Magnitudes4 { // of the negative half of the 4-bit codebook
    static constexpr uint32_t low0 = pack4_magnitudes(centroids4), low1 = pack4_magnitudes(centroids4 + 4);
};

__device__ __forceinline__ uint32_t s1_word(int word) {
    return word < 2 ? (word == 0 ? Signs::s10 : Signs::s11) : (word == 2 ? Signs::s12 : Signs::s13);
}
__device__ __forceinline__ uint32_t s2_word(int word) {
    return word < 2 ? (word == 0 ? Signs::s20 : Signs::s21) : (word == 2 ? Signs::s22 : Signs::s23);
}

__device__ __forceinline__ float flip_sign(float x, uint32_t word, int bit) {
    return __uint_as_float(__float_as_uint(x) ^ ((word >> bit) << 31));
}

// A byte permute: nibble i of `sel` (i = 0 ... 3) determines byte i of the result. The lower three bits of the nibble
// select one of the bytes a0 a1 a2 a3 b0 b1 b2 b3, where a0 is the lowest byte of a. If the fourth bit is set, the
// result is the sign bit of the selected byte, repeated eight times.
__device__ __forceinline__ uint32_t prmt(uint32_t a, uint32_t b, uint32_t sel) {
    uint32_t r;
    asm("prmt.b32 %0, %1, %2, %3;" : "=r"(r) : "r"(a), "r"(b), "r"(sel));
    return r;
}

constexpr uint32_t interleave_low = 0x5140,  // a0 b0 a1 b1
    interleave_high = 0x7362,                // a2 b2 a3 b3
    low_halves = 0x5410,                     // a0 a1 b0 b1
    high_halves = 0x7632,                    // a2 a3 b2 b3
    lowest_bytes = 0x0040,                   // a0 b0 in the low half
    second_bytes = 0x0051;                   // a1 b1 in the low half

// Transposes four words of four bytes: word i becomes byte i of each word.
__device__ __forceinline__ void transpose_bytes(uint32_t (&w)[4]) {
    const uint32_t a = prmt(w[0], w[1], interleave_low), b = prmt(w[2], w[3], interleave_low);
    const uint32_t c = prmt(w[0], w[1], interleave_high), d = prmt(w[2], w[3], interleave_high);
    w[0] = prmt(a, b, low_halves);
    w[1] = prmt(a, b, high_halves);
    w[2] = prmt(c, d, low_halves);
    w[3] = prmt(c, d, high_halves);
}

// Looks up the int8 levels of eight indices, each in a nibble: lo gets those of nibbles 0-3, hi those of nibbles 4-7.
// Indices of 3 and 2 bits have zeros in the upper bits of their nibbles.
template <int Bits> __device__ __forceinline__ void lookup(uint32_t nibbles, uint32_t & lo, uint32_t & hi) {
    using T = Table<Bits>;
    if constexpr (Bits == 4) {
        const uint32_t low = nibbles & 0x77777777, select = ((nibbles >> 1) & 0x44444444) | 0x32103210;
        lo = prmt(prmt(T::c0, T::c1, low), prmt(T::c2, T::c3, low), select);
        hi = prmt(prmt(T::c0, T::c1, low >> 16), prmt(T::c2, T::c3, low >> 16), select >> 16);
    } else {
        lo = prmt(T::c0, T::c1, nibbles);
        hi = prmt(T::c0, T::c1, nibbles >> 16);
    }
}

// Looks up the levels of four 4-bit indices in the low 16 bits, as positive - negative, with fewer permutes than
// lookup. For each index one of the two bytes is the magnitude. The other is zero, because the upper bit of its
// selector makes prmt repeat the sign of a positive byte.
__device__ __forceinline__ void lookup_split(uint32_t nibbles, uint32_t & positive, uint32_t & negative) {
    constexpr uint32_t low0 = Magnitudes4::low0, low1 = Magnitudes4::low1;
    negative = prmt(low0, low1, nibbles);
    positive = prmt(Table<4>::c2, Table<4>::c3, nibbles ^ 0x8888);
}

// Blocks begin at even addresses.
__device__ __forceinline__ uint32_t load_u16(const uint8_t * p) { return *reinterpret_cast<const uint16_t *>(p); }
__device__ __forceinline__ uint32_t load_u32(const uint8_t * p) { return load_u16(p) + (load_u16(p + 2) << 16); }
__device__ __forceinline__ float load_half(const uint8_t * p) {
    return __half2float(__ushort_as_half(uint16_t(load_u16(p))));
}

__device__ __forceinline__ char * row_at(const Rows & rows, int64_t i1, int64_t i2, int64_t i3) {
    return static_cast<char *>(rows.data) + i1 * rows.nb[0] + i2 * rows.nb[1] + i3 * rows.nb[2];
}

// A warp stores group number `group` of 32 values of a row, one value of each lane, as binary16 or as a block of q8_0.
__device__ __forceinline__ void store_exact_values(bool half_row, char * row, int group, float value, int lane) {
    if (half_row) {
        reinterpret_cast<half *>(row)[32 * group + lane] = __float2half(value);
        return;
    }
    uint8_t * block = reinterpret_cast<uint8_t *>(row) + 34 * group;
    const float scale = __fdiv_rn(__uint_as_float(warp_max(__float_as_uint(fabsf(value)))), 127.0f);
    const float inverse = scale != 0 ? __fdiv_rn(1.0f, scale) : 0.0f;
    if (lane == 0) *reinterpret_cast<uint16_t *>(block) = __half_as_ushort(__float2half(scale));
    block[2 + lane] = uint8_t(int8_t(roundf(value * inverse)));
}

// A unit is eight values of a block that are decoded together; a block of N values has N / 8 units. unit_nibbles
// returns the indices of a unit as nibbles. unit_element returns the element that a nibble belongs to: nibbles 2m and
// 2m + 1 are N / 2 elements apart.
template <int Bits, int N> __device__ __forceinline__ uint32_t unit_nibbles(const uint8_t * indices, int unit) {
    if constexpr (Bits == 4) {
        return load_u32(indices + 4 * unit);
    } else {
        const int word = unit >> 1, field = unit & 1;
        uint32_t n = (load_u32(indices + 4 * word) >> (2 * field)) & 0x33333333;
        if constexpr (Bits == 3) {
            const uint8_t * high = indices + N / 4 + (word >> 1) + field * (N / 32);
            const int shift = 4 * (word & 1);
            // Each product moves four bits to the third bit of every other nibble.
            n |= (((high[0] >> shift) & 15) * 0x00810204u) & 0x04040404;
            n |= (((high[N / 16] >> shift) & 15) * 0x08102040u) & 0x40404040;
        }
        return n;
    }
}
template <int Bits, int N> __device__ __forceinline__ int unit_element(int unit, int nibble) {
    const int byte = nibble >> 1, half = nibble & 1;
    if constexpr (Bits == 4) return 4 * unit + byte + N / 2 * half;
    return 4 * (unit >> 1) + byte + N / 4 * ((unit & 1) + 2 * half);
}

// Applies H_N, unnormalised, to a block: lane l holds elements l, l + 32, ... The order of the stages is part of the
// specification.
template <int N> __device__ __forceinline__ void hadamard_warp(float (&y)[N / 32]) {
    const int lane = threadIdx.x % 32;
#pragma unroll
    for (int h = 1; h < 32; h *= 2) {
        const float sign = lane & h ? -1.0f : 1.0f; // the product is exact, so the FMA rounds as a sum does
#pragma unroll
        for (int j = 0; j < N / 32; ++j) y[j] = __fmaf_rn(sign, y[j], __shfl_xor_sync(all_lanes, y[j], h));
    }
#pragma unroll
    for (int h = 1; h < N / 32; h *= 2)
#pragma unroll
        for (int j = 0; j < N / 32; ++j)
            if (!(j & h)) {
                const float a = y[j], b = y[j + h];
                y[j] = __fadd_rn(a, b);
                y[j + h] = __fsub_rn(a, b);
            }
}

// Rotates a block as the specification says, or applies the inverse. Lane l holds elements l, l + 32, ...
template <int N, bool Inverse> __device__ __forceinline__ void transform_warp(float (&y)[N / 32]) {
    const int lane = threadIdx.x % 32;
#pragma unroll
    for (int j = 0; j < N / 32; ++j) y[j] = flip_sign(y[j], Inverse ? s2_word(j) : s1_word(j), lane);
    hadamard_warp<N>(y);
    constexpr float norm = Block<N>::one_over_sqrt_n;
#pragma unroll
    for (int j = 0; j < N / 32; ++j)
        y[j] = Inverse ? flip_sign(__fmul_rn(y[j], norm), s1_word(j), lane)
                       : __fmul_rn(flip_sign(y[j], s2_word(j), lane), norm);
}

} // namespace
} // namespace cuda
} // namespace turboquant

#endif
