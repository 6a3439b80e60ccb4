// The block formats and the arithmetic that every kernel must share to the last bit. FORMAT.md explains both.
//
// Everything here has internal linkage: an inline function with external linkage that is compiled once for AVX-512 and
// once for the baseline could be merged by the linker into the AVX-512 copy, and crash on older CPUs.
#ifndef TURBOQUANT_FORMAT_H
#define TURBOQUANT_FORMAT_H

#include "codebooks.h"
#include "turboquant.h"

#include <cmath>
#include <cstdint>
#include <cstring>
#ifdef __F16C__
#include <immintrin.h>
#endif

// For the steps of a kernel that must stay in registers; GCC calls them otherwise once they are used twice.
#ifdef __GNUC__
#define TURBOQUANT_INLINE inline __attribute__((always_inline))
#else
#define TURBOQUANT_INLINE inline
#endif

namespace turboquant {
namespace {

// One row per index width; Format adds the block length.
template <int Bits> struct Codebook;
template <> struct Codebook<4> {
    static constexpr const int8_t * centroids = centroids4;   // ascending, padded to 16 with zeros
    static constexpr const int8_t * magnitudes = magnitudes4; // the positive half, padded likewise
    static constexpr float step = step4;
    static constexpr const float * step_over_sqrt = step4_over_sqrt;
    static constexpr const float * midpoints = midpoints4;    // of neighbouring magnitudes
    static constexpr const int8_t (*coarse_thresholds)[7] = coarse_thresholds4;
};
template <> struct Codebook<3> {
    static constexpr const int8_t * centroids = centroids3;   // ascending, padded to 16 with zeros
    static constexpr const int8_t * magnitudes = magnitudes3; // the positive half, padded likewise
    static constexpr float step = step3;
    static constexpr const float * step_over_sqrt = step3_over_sqrt;
    static constexpr const float * midpoints = midpoints3;    // of neighbouring magnitudes
    static constexpr const int8_t (*coarse_thresholds)[3] = coarse_thresholds3;
};
template <> struct Codebook<2> {
    static constexpr const int8_t * centroids = centroids2;   // ascending, padded to 16 with zeros
    static constexpr const int8_t * magnitudes = magnitudes2; // the positive half, padded likewise
    static constexpr float step = step2;
    static constexpr const float * step_over_sqrt = step2_over_sqrt;
    static constexpr const float * midpoints = midpoints2;    // of neighbouring magnitudes
    static constexpr const int8_t (*coarse_thresholds)[1] = coarse_thresholds2;
};

template <int N> struct Block {
    static_assert(N == 128 || N == 64 || N == 32, "block lengths of the formats");
    static constexpr int index = N == 128 ? 0 : N == 64 ? 1 : 2; // into the per-block tables of codebooks.h
    static constexpr float one_over_sqrt_n = one_over_sqrt[index];
    static constexpr float query_scale = one_over_sqrt[index] / 127.0f;
};

template <int Bits, int N> struct Format : Codebook<Bits>, Block<N> {
    static constexpr int half_levels = 1 << (Bits - 1);           // magnitudes
    static constexpr int index_bytes = N * Bits / 8;
    static constexpr int bytes = 2 + index_bytes;                 // fp16 d, then the indices
    static constexpr int high_offset = N / 4;                     // turbo3: hi[] follows lo[n/4]
    static constexpr float step_n = Codebook<Bits>::step_over_sqrt[Block<N>::index];
    // d = energy / a * rms * 2^k * this, of block_scale's arguments; see FORMAT.md, "Encoder"
    static constexpr double scale_unit = 1.0 / (double(rms_unit) * double(step_n) * N);
};
static_assert(Format<4, 128>::bytes == 66 && Format<4, 64>::bytes == 34 && Format<4, 32>::bytes == 18, "turbo4");
static_assert(Format<3, 128>::bytes == 50 && Format<3, 64>::bytes == 26 && Format<3, 32>::bytes == 14, "turbo3");
static_assert(Format<2, 128>::bytes == 34 && Format<2, 64>::bytes == 18 && Format<2, 32>::bytes == 10, "turbo2");

template <int N> struct QueryBlock;
template <> struct QueryBlock<128> { using type = tq_query128; };
template <> struct QueryBlock<64>  { using type = tq_query64; };
template <> struct QueryBlock<32>  { using type = tq_query32; };
static_assert(sizeof(tq_query128) == 136 && sizeof(tq_query64) == 72 && sizeof(tq_query32) == 40, "prepared queries");

constexpr bool sign_bit(const uint8_t * signs, int i) { return (signs[i / 8] >> (i % 8)) & 1; }

inline uint32_t float_bits(float x) { uint32_t b; std::memcpy(&b, &x, 4); return b; }
inline float bits_float(uint32_t b) { float x; std::memcpy(&x, &b, 4); return x; }

// IEEE binary16, round to nearest even. Once per block, so plain code serves every ISA.
inline uint16_t float_to_half(float x) {
    const uint32_t b = float_bits(x), sign = (b >> 16) & 0x8000, a = b & 0x7fffffff;
    if (a >= 0x7f800000) return uint16_t(sign | 0x7c00 | (a > 0x7f800000 ? 0x200 | ((a >> 13) & 0x3ff) : 0));
    if (a >= 0x477ff000) return uint16_t(sign | 0x7c00);               // rounds to 65536 or more
    if (a < 0x38800000) {                                              // subnormal: add so that the ulp is 2^-24
        const float r = bits_float(a) + 0.5f;
        return uint16_t(sign | (float_bits(r) - float_bits(0.5f)));
    }
    return uint16_t(sign | ((a - 0x38000000 + 0xfff + ((a >> 13) & 1)) >> 13));
}

inline float half_to_float(uint16_t h) {
#ifdef __F16C__
    return _cvtsh_ss(h);
#else
    const uint32_t sign = uint32_t(h & 0x8000) << 16, e = (h >> 10) & 31, m = h & 0x3ff;
    if (e == 31) return bits_float(sign | 0x7f800000 | (m ? 0x400000 | (m << 13) : 0)); // NaNs come out quiet
    if (e == 0) return bits_float(sign | float_bits(float(m) * 0x1p-24f));
    return bits_float(sign | ((e + 112) << 23) | (m << 13));
#endif
}

inline uint16_t load16(const uint8_t * p) { return uint16_t(p[0] | (p[1] << 8)); }
inline void store16(uint8_t * p, uint16_t v) { p[0] = uint8_t(v); p[1] = uint8_t(v >> 8); }
inline float load_scale(const uint8_t * block) { return half_to_float(load16(block)); }

// Before the rotation a block is scaled by 2^-k so that its largest magnitude lies in [1, 4) (subnormal blocks: below):
// neither the transform nor the sum of squares can overflow or lose anything.
inline int scale_exponent(uint32_t largest_bits) {
    const int k = int(largest_bits >> 23) - 127;
    return k < -126 ? -126 : k > 126 ? 126 : k;
}
inline float power_of_two(int k) { return bits_float(uint32_t(127 + k) << 23); } // -126 <= k <= 127

// The search's steps differ in A = sum r c and B = sum c^2 (integers: exact in any order). Scaling c by A/B leaves the
// squared error |r|^2 - A^2/B, so the best step has the greatest A^2/B.
inline double explained(int32_t a, int32_t b) { return double(a) * double(a) / double(b); }

// The scale A/B of the search's best step, in the encoder's units; the magnitudes in A are coarse. It places the
// thresholds of the assignment; the scale to store is block_scale's.
inline float least_squares_scale(int32_t a, int32_t b) { return float(double(coarse_unit) * double(a) / double(b)); }

// The scale of the search's best step: the first of those whose sums explain most.
inline float best_scale(const int32_t * a, const int32_t * b) {
    int best = 0;
    double best_explained = -1.0;
    for (int s = 0; s < search_steps; ++s) {
        const double e = explained(a[s], b[s]);
        best = e > best_explained ? s : best;
        best_explained = e > best_explained ? e : best_explained;
    }
    return least_squares_scale(a[best], b[best]);
}

// The midpoints of neighbouring centroids under a scale.
template <int Bits> inline void thresholds_under(float scale, int16_t * thresholds) {
    for (int t = 0; t < (1 << (Bits - 1)) - 1; ++t)
        thresholds[t] = int16_t(std::nearbyint(Codebook<Bits>::midpoints[t] * scale));
}

// What the encoder keeps of a block between its steps, besides each ISA file's vectors.
struct EncodingBase {
    uint32_t largest; // bits of max |x|: 0 = a zero block, 0x7f800000 and above = not finite
    int k;            // x was scaled by 2^-k
    float rms;        // of the unnormalised transform
    int32_t energy;   // sum z^2
    float scale;      // of the centroids: the search's
    bool codable() const { return largest != 0 && largest < 0x7f800000; }
};
constexpr int encode_group = 4; // blocks that go through the steps together

// The stored scale of a block. a = sum |z| c of the final assignment. energy / a preserves inner products:
// <x, decoded x> = <x, x>.
template <int Bits, int N> inline uint16_t block_scale(const EncodingBase & work, int32_t a, int64_t * saturated) {
    const double d = double(work.energy) / double(a) * double(work.rms) * Format<Bits, N>::scale_unit *
                     double(power_of_two(work.k));
    if (d >= 65520.0) { // rounds above fp16's largest finite value
        ++*saturated;
        return 0x7bff;
    }
    return float_to_half(float(d));
}

} // namespace
} // namespace turboquant

#endif
