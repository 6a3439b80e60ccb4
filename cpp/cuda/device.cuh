// Functions that the kernels share: warp primitives, byte permutes, loads, and the transform of a block by a warp.
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
template <int Bits> constexpr bool has_kernels<Trellis<Bits>> = true;

__device__ __forceinline__ uint32_t warp_max(uint32_t x) {
#if __CUDA_ARCH__ >= 800
    return __reduce_max_sync(all_lanes, x);
#else
    for (int h = 16; h > 0; h /= 2) x = max(x, __shfl_xor_sync(all_lanes, x, h));
    return x;
#endif
}

__device__ __forceinline__ uint32_t warp_min(uint32_t x) {
#if __CUDA_ARCH__ >= 800
    return __reduce_min_sync(all_lanes, x);
#else
    for (int h = 16; h > 0; h /= 2) x = min(x, __shfl_xor_sync(all_lanes, x, h));
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

// Returns x, and keeps it in a register. Without the shuffle, which compilers do not repeat, the compiler would compute
// x again in every step.
__device__ __forceinline__ int keep(int x) { return __shfl_sync(all_lanes, x, threadIdx.x % 32); }

// A zero that the compiler does not know.
__device__ __forceinline__ uint32_t unknown_zero() { return keep(threadIdx.x % 32) ^ threadIdx.x % 32; }
// A constant that the compiler does not know. If registers are scarce, a multiplication computes it again.
__device__ __forceinline__ uint32_t opaque(uint32_t constant, uint32_t zero) {
    uint32_t r;
    asm("mad.lo.u32 %0, %1, %1, %2;" : "=r"(r) : "r"(zero), "r"(constant));
    return r;
}

// The sign bits of 32 elements.
constexpr uint32_t sign_word(const uint8_t * signs, int word) {
    return uint32_t(signs[4 * word]) | uint32_t(signs[4 * word + 1]) << 8 | uint32_t(signs[4 * word + 2]) << 16 |
           uint32_t(signs[4 * word + 3]) << 24;
}

struct Signs {
    static constexpr uint32_t s10 = sign_word(signs1, 0), s11 = sign_word(signs1, 1), s12 = sign_word(signs1, 2),
                              s13 = sign_word(signs1, 3), s20 = sign_word(signs2, 0), s21 = sign_word(signs2, 1),
                              s22 = sign_word(signs2, 2), s23 = sign_word(signs2, 3);
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

// The bits of a where the mask is set, else those of b, in one instruction. Compilers move masks over shifts and need
// more.
__device__ __forceinline__ uint32_t select(uint32_t mask, uint32_t a, uint32_t b) {
    uint32_t r;
    asm("lop3.b32 %0, %1, %2, %3, 0xca;" : "=r"(r) : "r"(mask), "r"(a), "r"(b));
    return r;
}

// Shifts by a constant from 0 to 16, as products: the unit that shifts also permutes and combines bits, and is the
// busiest of attention. Compilers cannot distribute these shifts over other operations, which would make more of them.
__device__ __forceinline__ uint32_t shift_right(uint32_t x, int n) {
#ifdef __CUDA_ARCH__
    if (n == 0) return x;
    uint32_t r;
    if (n == 16) asm("dp2a.lo.u32.u32 %0, %1, 0x0100, 0;" : "=r"(r) : "r"(x)); // the sum of 0 and 1 times the halves
    else asm("mul.hi.u32 %0, %1, %2;" : "=r"(r) : "r"(x), "r"(1u << (32 - n)));
    return r;
#else
    return x >> n;
#endif
}
__device__ __forceinline__ uint32_t shift_left(uint32_t x, int n) {
#ifdef __CUDA_ARCH__
    if (n == 0) return x;
    uint32_t r;
    asm("mul.lo.u32 %0, %1, %2;" : "=r"(r) : "r"(x), "r"(1u << n));
    return r;
#else
    return x << n;
#endif
}

// Transposes an 8 x 8 matrix of 16-bit elements. Lane 4 r + i has elements 2 i and 2 i + 1 of row r.
__device__ __forceinline__ uint32_t transpose_matrix(uint32_t x) {
    uint32_t r = 0;
#if __CUDA_ARCH__ >= 750
    asm("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;" : "=r"(r) : "r"(x));
#endif
    return r;
}

constexpr uint32_t interleave_low = 0x5140,  // a0 b0 a1 b1
    interleave_high = 0x7362,                // a2 b2 a3 b3
    low_halves = 0x5410,                     // a0 a1 b0 b1
    high_halves = 0x7632,                    // a2 a3 b2 b3
    high_and_low_bytes = 0x4051;             // a1 b1 a0 b0

// Transposes four words of four bytes: word i becomes byte i of each word.
__device__ __forceinline__ void transpose_bytes(uint32_t (&w)[4]) {
    const uint32_t a = prmt(w[0], w[1], interleave_low), b = prmt(w[2], w[3], interleave_low);
    const uint32_t c = prmt(w[0], w[1], interleave_high), d = prmt(w[2], w[3], interleave_high);
    w[0] = prmt(a, b, low_halves);
    w[1] = prmt(a, b, high_halves);
    w[2] = prmt(c, d, low_halves);
    w[3] = prmt(c, d, high_halves);
}

__device__ __forceinline__ uint32_t load_u8(const uint8_t * p) { return *p; }
// Blocks begin at even addresses.
__device__ __forceinline__ uint32_t load_u16(const uint8_t * p) { return *reinterpret_cast<const uint16_t *>(p); }
__device__ __forceinline__ uint32_t load_u32(const uint8_t * p) {
#ifdef __CUDA_ARCH__ // a multiplication; compilers take a permute instead, and attention has too many of these
    uint32_t x;
    asm("mad.lo.u32 %0, %1, 65536, %2;" : "=r"(x) : "r"(load_u16(p + 2)), "r"(load_u16(p)));
    return x;
#else
    return load_u16(p) + (load_u16(p + 2) << 16);
#endif
}
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

// As store_exact_values for a row of 32 P values, P adjacent ones of each lane, with less work.
template <int P>
__device__ __forceinline__ void store_exact_row(bool half_row, char * row, const float (&x)[P], int lane) {
    static_assert(P % 2 == 0 && 32 % P == 0, "lanes store pairs, and whole lanes have a block");
    if (half_row) {
#pragma unroll
        for (int j = 0; j < P; ++j) reinterpret_cast<half *>(row)[P * lane + j] = __float2half(x[j]);
        return;
    }
    constexpr int lanes = 32 / P; // of a block
    uint32_t largest = 0;
#pragma unroll
    for (int j = 0; j < P; ++j) largest = max(largest, __float_as_uint(fabsf(x[j])));
#pragma unroll
    for (int h = 1; h < lanes; h *= 2) largest = max(largest, __shfl_xor_sync(all_lanes, largest, h));
    const float scale = __fdiv_rn(__uint_as_float(largest), 127.0f);
    const float inverse = scale != 0 ? __fdiv_rn(1.0f, scale) : 0.0f;
    uint16_t * block = reinterpret_cast<uint16_t *>(row) + 17 * (lane / lanes);
    if (lane % lanes == 0) block[0] = __half_as_ushort(__float2half(scale));
#pragma unroll
    for (int j = 0; j < P; j += 2) {
        const uint32_t low = uint8_t(int8_t(roundf(x[j] * inverse))),
                       high = uint8_t(int8_t(roundf(x[j + 1] * inverse)));
        block[1 + (lane % lanes * P + j) / 2] = uint16_t(low | high << 8);
    }
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

// As transform_warp without the inverse, but for the order of the sums, for lanes with P adjacent elements each: lane l
// has those from P * l on.
template <int N, int P> __device__ __forceinline__ void transform_adjacent(float (&y)[P]) {
    const int lane = threadIdx.x % 32, first = P * lane % N;
    const uint32_t signs1_of_lane = s1_word(first / 32) >> first % 32;
    const uint32_t signs2_of_lane = s2_word(first / 32) >> first % 32;
#pragma unroll
    for (int j = 0; j < P; ++j) y[j] = flip_sign(y[j], signs1_of_lane, j);
#pragma unroll
    for (int h = 1; h < P; h *= 2)
#pragma unroll
        for (int j = 0; j < P; ++j)
            if (!(j & h)) {
                const float a = y[j], b = y[j + h];
                y[j] = a + b;
                y[j + h] = a - b;
            }
#pragma unroll
    for (int h = 1; h < N / P; h *= 2) {
        const float sign = lane & h ? -1.0f : 1.0f;
#pragma unroll
        for (int j = 0; j < P; ++j) y[j] = sign * y[j] + __shfl_xor_sync(all_lanes, y[j], h);
    }
#pragma unroll
    for (int j = 0; j < P; ++j) y[j] = flip_sign(y[j], signs2_of_lane, j) * Block<N>::one_over_sqrt_n;
}

// ---- rows of heads

// The block length of turbo types in heads of so many values: the longest that divides them.
__host__ __device__ constexpr int block_of_head(int head) { return head % 128 == 0 ? 128 : head % 64 == 0 ? 64 : 32; }
template <int D> constexpr int rotated_block = block_of_head(D);

// Rotates the blocks of a row of D values, of which lane l holds elements l, l + 32, ...
template <int D> __device__ __forceinline__ void transform_blocks(float (&y)[D / 32]) {
    constexpr int N = rotated_block<D>, B = N / 32;
#pragma unroll
    for (int b = 0; b < D / N; ++b) {
        float part[B];
#pragma unroll
        for (int j = 0; j < B; ++j) part[j] = y[b * B + j];
        transform_warp<N, false>(part);
#pragma unroll
        for (int j = 0; j < B; ++j) y[b * B + j] = part[j];
    }
}

// Lanes share a row of D values. Value j of a lane is element lane_element<D>(lane, j): if a lane has 1, 2, 4 or 8
// values, they are adjacent and lie in one group of 32.
template <int D> constexpr bool has_runs = (D / 32 & (D / 32 - 1)) == 0;
template <int D> __device__ __forceinline__ int lane_element(int lane, int j) {
    return has_runs<D> ? D / 32 * lane + j : lane + 32 * j;
}

// Rotates the blocks of such a row.
template <int D> __device__ __forceinline__ void transform_row(float (&y)[D / 32]) {
    if constexpr (has_runs<D>) transform_adjacent<rotated_block<D>>(y);
    else transform_blocks<D>(y);
}

} // namespace
} // namespace cuda
} // namespace turboquant

#endif
