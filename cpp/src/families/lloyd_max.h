// The family turbo4, turbo3, turbo2: each rotated value is stored as the index of its nearest Lloyd-Max centroid. This
// file has the codebooks and the layout of the indices (FORMAT.md, "Layout") in plain code. The encoder's search and
// assignment are in scalar.cpp and generic/codec.h. format.h includes this file.
#ifndef TURBOQUANT_FAMILIES_LLOYD_MAX_H
#define TURBOQUANT_FAMILIES_LLOYD_MAX_H

#include "../codebooks.h"

#include <cstdint>
#include <cstring>

namespace turboquant {
namespace {

// The constants of each index width, from codebooks.h:
//   centroids          ascending, padded to 16 with zeros
//   magnitudes         the positive half, padded likewise
//   midpoints          of neighbouring magnitudes
template <int Bits> struct Codebook;
#define TURBOQUANT_CODEBOOK(Bits)                                                                           \
    template <> struct Codebook<Bits> {                                                                     \
        static constexpr const int8_t * centroids = centroids##Bits;                                        \
        static constexpr const int8_t * magnitudes = magnitudes##Bits;                                      \
        static constexpr float step = step##Bits;                                                           \
        static constexpr const float * step_over_sqrt = step##Bits##_over_sqrt;                             \
        static constexpr const float * midpoints = midpoints##Bits;                                         \
        static constexpr const int8_t (*coarse_thresholds)[(1 << (Bits - 1)) - 1] = coarse_thresholds##Bits; \
    };
TURBOQUANT_CODEBOOK(4)
TURBOQUANT_CODEBOOK(3)
TURBOQUANT_CODEBOOK(2)
#undef TURBOQUANT_CODEBOOK

// In a block of 3-bit indices hi[n/8] follows lo[n/4].
template <int N> constexpr int high_offset = N / 4;

template <int Bits> struct LloydMax : Codebook<Bits> {
    static constexpr int bits = Bits;
    static constexpr int half_levels = 1 << (Bits - 1); // magnitudes
    static constexpr int levels = 2 * half_levels;

    // Writes the indices of n elements to the bytes after the scale.
    template <int N> static void pack(const uint8_t * index, uint8_t * q) {
        std::memset(q, 0, N * Bits / 8);
        for (int i = 0; i < N; ++i) {
            if (Bits == 4) {
                q[i % (N / 2)] |= uint8_t(index[i] << (i / (N / 2) * 4));
            } else {
                q[i % (N / 4)] |= uint8_t((index[i] & 3) << (i / (N / 4) * 2));
                if (Bits == 3) q[high_offset<N> + i / 8] |= uint8_t((index[i] >> 2) << (i % 8));
            }
        }
    }

    // The scale of a block as binary16, from its first two bytes.
    static constexpr uint16_t scale_half(uint16_t word) { return word; }

    // The int8 levels of a block.
    template <int N> static void expand(const uint8_t * q, int8_t * level) {
        for (int i = 0; i < N; ++i) level[i] = Codebook<Bits>::centroids[index_at<N>(q, i)];
    }

    // The index of element i.
    template <int N> static int index_at(const uint8_t * q, int i) {
        if (Bits == 4) return (q[i % (N / 2)] >> (i / (N / 2) * 4)) & 15;
        const int low = (q[i % (N / 4)] >> (i / (N / 4) * 2)) & 3;
        return Bits == 2 ? low : low | ((q[high_offset<N> + i / 8] >> (i % 8)) & 1) << 2;
    }
};

} // namespace
} // namespace turboquant

#endif
