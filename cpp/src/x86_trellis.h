// Functions for AVX2 and AVX-512: the levels of the trellis-coded types in registers of 32 bytes.
//
// A plane has one bit of each element: bit b of byte l belongs to element b * N/8 + l. So a register of levels consists
// of lanes of N/8 bytes, and the elements of a lane have the same b. Each plane is copied to all lanes, and shifted in
// each so that its bits are where the lane's elements need them: in nibbles, the lower with the elements of one
// register and the upper with those of another. The two lower bits of a nibble are the subset, the two upper ones the
// rest without its third bit.
//
// The subset's bits come from the path, an integer of N bits, shifted up by the steps of its taps. The bits before the
// path, which shift in, are the upper ones of the block's first two bytes.
#ifndef TURBOQUANT_X86_TRELLIS_H
#define TURBOQUANT_X86_TRELLIS_H

#include "x86.h"

namespace turboquant {
namespace {

static_assert(path_taps0 == (1 << 2 | 1 << 5) && path_taps1 == (1 << 0 | 1 << 1 | 1 << 6), "the shifts below");

// The bytes of a plane in every lane.
template <int N> TURBOQUANT_INLINE __m256i every_lane(const void * p) {
    return N == 128  ? _mm256_broadcastsi128_si256(load16_bytes(p))
           : N == 64 ? _mm256_broadcastq_epi64(_mm_loadl_epi64(static_cast<const __m128i *>(p)))
                     : _mm256_set1_epi32(four_bytes(p));
}

// Lane h is shifted by first + h * change bits.
template <int N, int First, int Change> TURBOQUANT_INLINE __m256i lane_counts() {
    constexpr int f = First, c = Change;
    return N == 128  ? _mm256_setr_epi64x(f, f, f + c, f + c)
           : N == 64 ? _mm256_setr_epi64x(f, f + c, f + 2 * c, f + 3 * c)
                     : _mm256_setr_epi32(f, f + c, f + 2 * c, f + 3 * c, f + 4 * c, f + 5 * c, f + 6 * c, f + 7 * c);
}
template <int N, int First, int Change> TURBOQUANT_INLINE __m256i lanes_up(__m256i x) {
    const __m256i counts = lane_counts<N, First, Change>();
    return N == 32 ? _mm256_sllv_epi32(x, counts) : _mm256_sllv_epi64(x, counts);
}
template <int N, int First, int Change> TURBOQUANT_INLINE __m256i lanes_down(__m256i x) {
    const __m256i counts = lane_counts<N, First, Change>();
    return N == 32 ? _mm256_srlv_epi32(x, counts) : _mm256_srlv_epi64(x, counts);
}

#ifdef __GFNI__
// A bit of a byte that gf2p8affineqb computes is the parity of the source byte masked by a byte of the matrix, whose
// highest byte belongs to bit 0.
constexpr uint64_t matrix_row(int bit, unsigned mask) { return uint64_t(mask) << (8 * (7 - bit)); }

// Copies `count` bits.
constexpr uint64_t copy_bits(int count, int from, int to) {
    uint64_t matrix = 0;
    for (int k = 0; k < count; ++k) matrix |= matrix_row(to + k, 1u << (from + k));
    return matrix;
}

// The subset at bit b of a path byte to the bits `to` and to + 1: the part from that byte, and from the byte before.
constexpr uint64_t subset_matrix(int b, int to, bool before) {
    uint64_t matrix = 0;
    for (int c = 0; c < 2; ++c) {
        unsigned mask = 0;
        for (int k = 0; k <= path_memory; ++k)
            if ((c ? path_taps1 : path_taps0) >> k & 1 && (k > b) == before) mask |= 1u << ((b - k) & 7);
        matrix |= matrix_row(to + c, mask);
    }
    return matrix;
}

// The matrices for the nibbles of the elements of bits b, lower, and c, upper.
struct NibbleMatrices {
    uint64_t own, before, rest;
};
template <int Bits, int N> constexpr NibbleMatrices nibble_matrices(int b, int c) {
    // a crumb has the bits 2 j and 2 j + 1 of two neighbouring b
    const auto rest = [](int bit, int to) { return Bits == 2 ? copy_bits(1, bit, to) : copy_bits(2, bit / 2 * 2, to); };
    return {subset_matrix(b, 0, false) | subset_matrix(c, 4, false),
            subset_matrix(b, 0, true) | subset_matrix(c, 4, true), rest(b, 2) | rest(c, 6)};
}

// `Second` selects the nibbles of the second and the fourth register instead of the first and the third. Blocks of 32,
// which have one register, use the lower nibbles alone.
template <int Bits, int N, int Second> TURBOQUANT_INLINE __m256i nibbles(const uint8_t * q) {
    static_assert(Second == 0 || N == 128, "registers of a block");
    constexpr int s = 2 * Second;
    constexpr NibbleMatrices m[4] = { // of each qword
        N == 128  ? nibble_matrices<Bits, N>(s, 4 + s)
        : N == 64 ? nibble_matrices<Bits, N>(0, 4)
                  : nibble_matrices<Bits, N>(0, 1),
        N == 128  ? nibble_matrices<Bits, N>(s, 4 + s)
        : N == 64 ? nibble_matrices<Bits, N>(1, 5)
                  : nibble_matrices<Bits, N>(2, 3),
        N == 128  ? nibble_matrices<Bits, N>(1 + s, 5 + s)
        : N == 64 ? nibble_matrices<Bits, N>(2, 6)
                  : nibble_matrices<Bits, N>(4, 5),
        N == 128  ? nibble_matrices<Bits, N>(1 + s, 5 + s)
        : N == 64 ? nibble_matrices<Bits, N>(3, 7)
                  : nibble_matrices<Bits, N>(6, 7)};
    const auto matrices = [](uint64_t a, uint64_t b, uint64_t c, uint64_t d) {
        return _mm256_setr_epi64x(int64_t(a), int64_t(b), int64_t(c), int64_t(d));
    };
    const __m256i own = matrices(m[0].own, m[1].own, m[2].own, m[3].own);
    const __m256i before = matrices(m[0].before, m[1].before, m[2].before, m[3].before);
    const __m256i rest = matrices(m[0].rest, m[1].rest, m[2].rest, m[3].rest);
    const uint8_t * r = q + N / 8;
    const __m256i rests = Bits == 2 ? every_lane<N>(r) : N == 128 ? load32_bytes(r) : every_lane<2 * N>(r);
    const __m256i x = _mm256_xor_si256(_mm256_gf2p8affine_epi64_epi8(every_lane<N>(q), own, 0),
                                       _mm256_gf2p8affine_epi64_epi8(every_lane<N>(q - 1), before, 0));
    const __m256i index = _mm256_xor_si256(x, _mm256_gf2p8affine_epi64_epi8(rests, rest, 0));
    // a qword has two lanes of four bytes, and the upper nibbles are those of the second
    return N == 32 ? _mm256_srlv_epi32(index, _mm256_set1_epi64x(int64_t(4) << 32)) : index;
}
#else
TURBOQUANT_INLINE __m256i xor3(__m256i a, __m256i b, __m256i c) {
#ifdef __AVX512VL__
    return _mm256_ternarylogic_epi32(a, b, c, 0x96);
#else
    return _mm256_xor_si256(_mm256_xor_si256(a, b), c);
#endif
}

// The bits of a where `mask` is set, and those of b elsewhere.
TURBOQUANT_INLINE __m256i select_bits(__m256i mask, __m256i a, __m256i b) {
#ifdef __AVX512VL__
    return _mm256_ternarylogic_epi32(mask, a, b, 0xCA);
#else
    return _mm256_or_si256(_mm256_and_si256(mask, a), _mm256_andnot_si256(mask, b));
#endif
}

// The path by K steps before consists of two parts: from the bytes from the block's first on, and from those of the
// path's upper half, or of the upper part of a lane.
template <int N, int K> TURBOQUANT_INLINE __m256i lower_before(__m256i x) { return lanes_down<N, 16 - K, 1>(x); }
template <int N, int K> TURBOQUANT_INLINE __m256i upper_before(__m256i y) {
    return lanes_up<N, (N == 32 ? 16 : 48) + K, -1>(y);
}

template <int Bits, int N, int Second> TURBOQUANT_INLINE __m256i nibbles(const uint8_t * q) {
    const __m256i x = every_lane<N>(q - 2), y = every_lane<N>(q + (N == 32 ? 2 : 6));
    // the second bit of a subset is beside the first, so the path is shifted by one more
    const __m256i both = _mm256_xor_si256(lower_before<N, 2>(x), upper_before<N, 2>(y));
    const __m256i c0 = xor3(both, lower_before<N, 5>(x), upper_before<N, 5>(y));
    const __m256i c1 = xor3(xor3(both, lower_before<N, 1>(x), upper_before<N, 1>(y)), lower_before<N, 7>(x),
                            upper_before<N, 7>(y));
    const __m256i even = _mm256_set1_epi8(0x55), low = _mm256_set1_epi8(0x33);
    const __m256i subsets = select_bits(even, c0, c1); // crumbs
    const uint8_t * r = q + N / 8;
    constexpr int crumb_lanes = N == 32 ? 64 : 128; // lanes of N/4 bytes
    const __m256i rests = Bits == 2  ? _mm256_and_si256(lanes_down<N, 0, 1>(every_lane<N>(r)), even)
                          : N == 128 ? load32_bytes(r)
                                     : lanes_down<crumb_lanes, 0, 2>(every_lane<crumb_lanes>(r));
    return Second ? select_bits(low, _mm256_srli_epi16(subsets, 2), rests)
                  : select_bits(low, subsets, _mm256_slli_epi16(rests, 2));
}
#endif

// The levels of the elements of a register, whose nibbles are the lower ones in `index`. signs: with four bits, the
// plane with the third bits of the rests, which are the signs of the levels.
template <int Bits, int N, int Register> TURBOQUANT_INLINE __m256i look_up_levels(__m256i index, __m256i signs) {
    const int8_t * table = repeated_levels<Bits>.level;
    const __m256i nibble = _mm256_and_si256(index, _mm256_set1_epi8(15));
    const __m256i level = _mm256_shuffle_epi8(_mm256_broadcastsi128_si256(load16_bytes(table)), nibble);
    if constexpr (Bits < 4) return level;
    const __m256i positive = _mm256_shuffle_epi8(_mm256_broadcastsi128_si256(load16_bytes(table + 16)), nibble);
    constexpr int first = Register * (256 / N); // bit of the plane
    return _mm256_blendv_epi8(level, positive, lanes_up<N, 7 - first, -1>(signs)); // by the highest bits
}

template <int Bits, int N> TURBOQUANT_INLINE void expand_trellis(const uint8_t * q, __m256i * level) {
    __m256i signs = _mm256_setzero_si256();
    if constexpr (Bits == 4) signs = every_lane<N>(q + N / 8 + N / 4);
    const __m256i first = nibbles<Bits, N, 0>(q);
    level[0] = look_up_levels<Bits, N, 0>(first, signs);
    if constexpr (N == 64) level[1] = look_up_levels<Bits, N, 1>(_mm256_srli_epi16(first, 4), signs);
    if constexpr (N == 128) {
        const __m256i second = nibbles<Bits, N, 1>(q);
        level[1] = look_up_levels<Bits, N, 1>(second, signs);
        level[2] = look_up_levels<Bits, N, 2>(_mm256_srli_epi16(first, 4), signs);
        level[3] = look_up_levels<Bits, N, 3>(_mm256_srli_epi16(second, 4), signs);
    }
}

} // namespace
} // namespace turboquant

#endif
