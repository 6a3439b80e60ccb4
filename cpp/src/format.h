// The block formats and the arithmetic that every kernel must share to the last bit. FORMAT.md explains both.
//
// Everything here has internal linkage. If an inline function with external linkage is compiled for AVX-512 and for the
// baseline, the linker may keep the AVX-512 copy for both, which crashes on older CPUs.
#ifndef TURBOQUANT_FORMAT_H
#define TURBOQUANT_FORMAT_H

#include "families/lloyd_max.h"
#include "families/trellis.h"
#include "turboquant.h"

#include <cmath>
#include <cstdint>
#include <cstring>
#ifdef __F16C__
#include <immintrin.h>
#endif

// For functions whose operands must stay in registers; GCC does not inline them otherwise if they are called twice.
#ifdef __GNUC__
#define TURBOQUANT_INLINE inline __attribute__((always_inline))
#else
#define TURBOQUANT_INLINE inline
#endif

namespace turboquant {
namespace {

// The index of a block length in TURBOQUANT_BLOCKS and in every table over block lengths; -1 if there is no such block.
constexpr int block_index(int block) {
    int index = 0;
#define TURBOQUANT_BLOCK_INDEX(N) \
    if (block == N) return index; \
    ++index;
    TURBOQUANT_BLOCKS(TURBOQUANT_BLOCK_INDEX)
#undef TURBOQUANT_BLOCK_INDEX
    return -1;
}
static_assert(block_index(128) == 0 && block_index(64) == 1 && block_index(32) == 2, "the order in codebooks.h");

template <int N> struct Block {
    static constexpr int index = block_index(N);
    static_assert(index >= 0, "block lengths of the formats");
    static constexpr float one_over_sqrt_n = one_over_sqrt[index];
    static constexpr float query_scale = one_over_sqrt[index] / 127.0f;
};

// A format: a family, which has the width of an index, and a block length. Kernels are templates over it. Where they
// differ by family, they are overloaded for an empty object of this type.
template <typename Family, int N> struct Format : Family, Block<N> {
    using family = Family;
    static constexpr int block = N;
    static constexpr int index_bytes = N * Family::bits / 8;
    static constexpr int bytes = 2 + index_bytes;                 // fp16 d, then the indices
    static constexpr float step_n = Family::step_over_sqrt[Block<N>::index];
    // in block_scale: d = energy / a * rms * 2^k * scale_unit; see FORMAT.md, "Encoder"
    static constexpr double scale_unit = 1.0 / (double(rms_unit) * double(step_n) * N);

    // q: the bytes after the scale
    static void expand(const uint8_t * q, int8_t * level) { Family::template expand<N>(q, level); }
    static float load_scale(const uint8_t * block);
};

template <tq_type> struct FormatRow;
#define TURBOQUANT_FORMAT_ROW(ID, name, FIRST, family, bits, block, size, id)         \
    template <> struct FormatRow<TQ_##ID> { using type = Format<family<bits>, block>; }; \
    static_assert(FormatRow<TQ_##ID>::type::bytes == size, "bytes of the row " #name);
TURBOQUANT_TYPES(TURBOQUANT_FORMAT_ROW)
#undef TURBOQUANT_FORMAT_ROW
template <tq_type Type> using FormatOf = typename FormatRow<Type>::type;

template <int N> struct QueryBlock;
#define TURBOQUANT_QUERY_BLOCK(N)                              \
    template <> struct QueryBlock<N> { using type = tq_query##N; }; \
    static_assert(sizeof(tq_query##N) == N + 8, "prepared queries");
TURBOQUANT_BLOCKS(TURBOQUANT_QUERY_BLOCK)
#undef TURBOQUANT_QUERY_BLOCK

constexpr bool sign_bit(const uint8_t * signs, int i) { return (signs[i / 8] >> (i % 8)) & 1; }

inline uint32_t float_bits(float x) { uint32_t b; std::memcpy(&b, &x, 4); return b; }
inline float bits_float(uint32_t b) { float x; std::memcpy(&x, &b, 4); return x; }

// IEEE binary16, round to nearest even. It runs once per block, so all ISAs use plain code.
inline uint16_t float_to_half(float x) {
    const uint32_t b = float_bits(x), sign = (b >> 16) & 0x8000, a = b & 0x7fffffff;
    if (a >= 0x7f800000) return uint16_t(sign | 0x7c00 | (a > 0x7f800000 ? 0x200 | ((a >> 13) & 0x3ff) : 0));
    if (a >= 0x477ff000) return uint16_t(sign | 0x7c00);               // rounds to 65536 or more
    if (a < 0x38800000) {                                              // subnormal: in the sum one ulp is 2^-24
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

constexpr uint64_t each_byte = 0x0101010101010101;

inline uint16_t load16(const uint8_t * p) { return uint16_t(p[0] | (p[1] << 8)); }
inline void store16(uint8_t * p, uint16_t v) { p[0] = uint8_t(v); p[1] = uint8_t(v >> 8); }
inline float load_scale(const uint8_t * block) { return half_to_float(load16(block)); }

template <typename Family, int N> inline float Format<Family, N>::load_scale(const uint8_t * block) {
    return half_to_float(Family::scale_half(load16(block)));
}

// Before the rotation a block is scaled by 2^-k, so that its largest magnitude is in [1, 4), or less if it is
// subnormal. The transform and the sum of squares then cannot overflow or underflow.
inline int scale_exponent(uint32_t largest_bits) {
    const int k = int(largest_bits >> 23) - 127;
    return k < -126 ? -126 : k > 126 ? 126 : k;
}
inline float power_of_two(int k) { return bits_float(uint32_t(127 + k) << 23); } // -126 <= k <= 127

// A step of the search has the sums a = sum r c and b = sum c^2 over coarse magnitudes r and centroids c, which are
// integers and so exact in any order. Scaled by a/b, the centroids have the squared error |r|^2 - a^2/b, so the best
// step has the greatest a^2/b.
inline double explained(int32_t a, int32_t b) { return double(a) * double(a) / double(b); }

// The scale a/b of a step of the search, converted from coarse units to the encoder's units. It determines the
// thresholds of the assignment; block_scale computes the scale that is stored.
inline float least_squares_scale(int32_t a, int32_t b) { return float(double(coarse_unit) * double(a) / double(b)); }

// The scale of the best step of the search, the first with the greatest a^2/b.
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
template <typename Family> inline void thresholds_under(float scale, int16_t * thresholds) {
    for (int t = 0; t < Family::half_levels - 1; ++t)
        thresholds[t] = int16_t(std::nearbyint(Family::midpoints[t] * scale));
}

// The values of a block that the encoder keeps between its steps, besides the vectors of each ISA file.
struct EncodingBase {
    uint32_t largest; // bits of max |x|: 0 = a zero block, 0x7f800000 and above = not finite
    int k;            // x was scaled by 2^-k
    float rms;        // of the unnormalised transform
    int32_t energy;   // sum z^2
    float scale;      // of the centroids, found by the search
    bool codable() const { return largest != 0 && largest < 0x7f800000; }
};
constexpr int encode_group = 4; // blocks that are encoded together

// The stored scale of a block. a = sum |z| c of the final assignment. energy / a preserves inner products:
// <x, decoded x> = <x, x>.
template <typename F> inline uint16_t block_scale(const EncodingBase & work, int32_t a, int64_t * saturated) {
    const float d = float(double(work.energy) / double(a) * double(work.rms) * F::scale_unit *
                          double(power_of_two(work.k)));
    if (d >= 65520.0f) { // rounds above fp16's largest finite value
        ++*saturated;
        return 0x7bff;
    }
    return float_to_half(d);
}

} // namespace
} // namespace turboquant

#endif
