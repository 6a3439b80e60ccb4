// Functions for AVX2 and AVX-512: steps of a block that are narrower than a register.
#ifndef TURBOQUANT_X86_H
#define TURBOQUANT_X86_H

#include "format.h"

#include <immintrin.h>

namespace turboquant {
namespace {

TURBOQUANT_INLINE __m128i load16_bytes(const void * p) { return _mm_loadu_si128(static_cast<const __m128i *>(p)); }
TURBOQUANT_INLINE __m256i load32_bytes(const void * p) { return _mm256_loadu_si256(static_cast<const __m256i *>(p)); }

// The four bytes at p.
TURBOQUANT_INLINE int32_t four_bytes(const void * p) {
    int32_t four;
    std::memcpy(&four, p, 4);
    return four;
}

// The eight bytes at p.
TURBOQUANT_INLINE int64_t eight_bytes(const void * p) {
    int64_t eight;
    std::memcpy(&eight, p, 8);
    return eight;
}

// The least of 16 words that are not negative.
TURBOQUANT_INLINE int least_word(__m256i x) {
    const __m128i least = _mm_min_epi16(_mm256_castsi256_si128(x), _mm256_extracti128_si256(x, 1));
    return _mm_extract_epi16(_mm_minpos_epu16(least), 0);
}

// Adds the upper half to the lower half until one lane is left.
TURBOQUANT_INLINE float reduce_add8(__m256 x) {
    const __m128 l4 = _mm_add_ps(_mm256_castps256_ps128(x), _mm256_extractf128_ps(x, 1));
    const __m128 l2 = _mm_add_ps(l4, _mm_movehl_ps(l4, l4));
    return _mm_cvtss_f32(_mm_add_ss(l2, _mm_movehdup_ps(l2)));
}

// Bit 2 of each of 32 bytes.
TURBOQUANT_INLINE uint32_t third_bits(__m256i index) {
    return uint32_t(_mm256_movemask_epi8(_mm256_slli_epi16(index, 5))); // bit 2 to bit 7
}

template <int Bits, int N>
TURBOQUANT_INLINE void pack(Format<LloydMax<Bits>, N>, const uint8_t * index, uint8_t * q) {
    if constexpr (Bits == 4) {
        constexpr int half = N / 2;
        for (int j = 0; j < half; j += 16) {
            const __m128i low = load16_bytes(index + j), high = load16_bytes(index + half + j);
            _mm_storeu_si128(reinterpret_cast<__m128i *>(q + j), _mm_or_si128(low, _mm_slli_epi16(high, 4)));
        }
    } else {
        constexpr int quarter = N / 4;
        for (int j = 0; j < quarter; j += 8) {
            uint64_t part[4];
            for (int p = 0; p < 4; ++p) {
                std::memcpy(&part[p], index + p * quarter + j, 8);
                part[p] &= 0x0303030303030303;
            }
            const uint64_t low = part[0] | part[1] << 2 | part[2] << 4 | part[3] << 6;
            std::memcpy(q + j, &low, 8);
        }
        if constexpr (Bits == 3)
            for (int i = 0; i < N; i += 32) {
                const uint32_t high = third_bits(load32_bytes(index + i));
                std::memcpy(q + high_offset<N> + i / 8, &high, 4);
            }
    }
}

// Interleaves 32 channels of four rows, so that each dword has one channel. Dwords are permuted before the bytes are
// interleaved, because unpack instructions work inside lanes of 128 bits.
TURBOQUANT_INLINE void interleave32(const int8_t * level, int64_t stride, int8_t * tile) {
    const __m256i order = _mm256_setr_epi32(0, 2, 4, 6, 1, 3, 5, 7);
    __m256i row[4];
    for (int i = 0; i < 4; ++i) row[i] = _mm256_permutevar8x32_epi32(load32_bytes(level + i * stride), order);
    const __m256i low01 = _mm256_unpacklo_epi8(row[0], row[1]), high01 = _mm256_unpackhi_epi8(row[0], row[1]);
    const __m256i low23 = _mm256_unpacklo_epi8(row[2], row[3]), high23 = _mm256_unpackhi_epi8(row[2], row[3]);
    __m256i * out = reinterpret_cast<__m256i *>(tile);
    _mm256_storeu_si256(out, _mm256_unpacklo_epi16(low01, low23));
    _mm256_storeu_si256(out + 1, _mm256_unpackhi_epi16(low01, low23));
    _mm256_storeu_si256(out + 2, _mm256_unpacklo_epi16(high01, high23));
    _mm256_storeu_si256(out + 3, _mm256_unpackhi_epi16(high01, high23));
}

} // namespace
} // namespace turboquant

#endif
