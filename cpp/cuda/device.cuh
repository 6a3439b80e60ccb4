// What the kernels share: warp primitives, the codebooks as byte-permute tables, the transform across a warp.
#ifndef TURBOQUANT_CUDA_DEVICE_H
#define TURBOQUANT_CUDA_DEVICE_H

#include "../src/format.h"

#include <cuda_fp16.h>

namespace turboquant {
namespace cuda {
namespace {

constexpr unsigned all_lanes = 0xffffffff;

// Whether there are kernels for a family.
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

// Four centroids as a register, lowest index first.
constexpr uint32_t pack4(const int8_t * c) {
    return uint32_t(uint8_t(c[0])) | uint32_t(uint8_t(c[1])) << 8 | uint32_t(uint8_t(c[2])) << 16 |
           uint32_t(uint8_t(c[3])) << 24;
}

// 32 sign bits of a vector of signs.
constexpr uint32_t sign_word(const uint8_t * signs, int word) {
    return uint32_t(signs[4 * word]) | uint32_t(signs[4 * word + 1]) << 8 | uint32_t(signs[4 * word + 2]) << 16 |
           uint32_t(signs[4 * word + 3]) << 24;
}

constexpr uint32_t pack4_magnitudes(const int8_t * c) {
    return uint32_t(-c[0]) | uint32_t(-c[1]) << 8 | uint32_t(-c[2]) << 16 | uint32_t(-c[3]) << 24;
}

template <int Bits> struct Table {
    static constexpr uint32_t c0 = pack4(Codebook<Bits>::centroids), c1 = pack4(Codebook<Bits>::centroids + 4),
                              c2 = pack4(Codebook<Bits>::centroids + 8), c3 = pack4(Codebook<Bits>::centroids + 12);
};

struct Signs {
    static constexpr uint32_t s10 = sign_word(signs1, 0), s11 = sign_word(signs1, 1), s12 = sign_word(signs1, 2),
                              s13 = sign_word(signs1, 3), s20 = sign_word(signs2, 0), s21 = sign_word(signs2, 1),
                              s22 = sign_word(signs2, 2), s23 = sign_word(signs2, 3);
};
struct Magnitudes4 { // of the lower half of the centroids
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

// A byte permute: each of the four nibbles in the low 16 bits of `sel` picks a byte of the result, lowest first. Three
// bits choose among a's bytes, a0 a1 a2 a3 from the lowest, and b's; the fourth bit repeats the byte's sign instead.
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

// Four words to the four words of their first, second, ... bytes.
__device__ __forceinline__ void transpose_bytes(uint32_t (&w)[4]) {
    const uint32_t a = prmt(w[0], w[1], interleave_low), b = prmt(w[2], w[3], interleave_low);
    const uint32_t c = prmt(w[0], w[1], interleave_high), d = prmt(w[2], w[3], interleave_high);
    w[0] = prmt(a, b, low_halves);
    w[1] = prmt(a, b, high_halves);
    w[2] = prmt(c, d, low_halves);
    w[3] = prmt(c, d, high_halves);
}

// Eight indices, a nibble each, to eight int8 levels: nibbles 0-3 in lo, 4-7 in hi. The nibbles of turbo3 and turbo2
// have clear upper bits.
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

// Four 4-bit indices, in the low 16 bits, to int8 levels = positive - negative: of the two, one byte is a magnitude and
// the other zero, because a selector's upper bit makes prmt repeat the sign of a positive byte.
__device__ __forceinline__ void lookup_split(uint32_t nibbles, uint32_t & positive, uint32_t & negative) {
    constexpr uint32_t low0 = Magnitudes4::low0, low1 = Magnitudes4::low1;
    negative = prmt(low0, low1, nibbles);
    positive = prmt(Table<4>::c2, Table<4>::c3, nibbles ^ 0x8888);
}

// A block's bytes start at an even address.
__device__ __forceinline__ uint32_t load_u16(const uint8_t * p) { return *reinterpret_cast<const uint16_t *>(p); }
__device__ __forceinline__ uint32_t load_u32(const uint8_t * p) { return load_u16(p) + (load_u16(p + 2) << 16); }
__device__ __forceinline__ float load_half(const uint8_t * p) {
    return __half2float(__ushort_as_half(uint16_t(load_u16(p))));
}

// A unit is eight values of a block that are decoded together; a block of N has N / 8 of them. unit_nibbles gives their
// indices as nibbles, unit_element which element nibble i is: its pairs (2m, 2m + 1) are N / 2 elements apart.
template <int Bits, int N> __device__ __forceinline__ uint32_t unit_nibbles(const uint8_t * indices, int unit) {
    if constexpr (Bits == 4) {
        return load_u32(indices + 4 * unit);
    } else {
        const int word = unit >> 1, field = unit & 1;
        uint32_t n = (load_u32(indices + 4 * word) >> (2 * field)) & 0x33333333;
        if constexpr (Bits == 3) {
            const uint8_t * high = indices + N / 4 + (word >> 1) + field * (N / 32);
            const int shift = 4 * (word & 1);
            // four bits to the third bit of every other nibble
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

// H_N of a warp's N values: lane l holds elements l, l + 32, ... The stages are in the order that the specification
// demands.
template <int N> __device__ __forceinline__ void hadamard_warp(float (&y)[N / 32]) {
    const int lane = threadIdx.x % 32;
#pragma unroll
    for (int h = 1; h < 32; h *= 2) {
        const float sign = lane & h ? -1.0f : 1.0f; // the product is exact: one rounding, as of a sum
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

// The transform of a warp's block, or its inverse; the signs' order is that of the specification.
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
