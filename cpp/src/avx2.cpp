// AVX2, FMA and F16C: the primitives of generic/, and algorithms that differ for AVX2. avxvnni.cpp compiles this file
// again with AVX-VNNI and GFNI.
#include "attention_tile.h"
#include "format.h"
#include "generic/signs.h"
#include "kernels.h"
#include "x86.h"
#include "x86_trellis.h"

#include <immintrin.h>

namespace turboquant {
namespace {

constexpr int lanes = 8;
using floats = __m256;
using ints = __m256i;
using words = __m256i;
using bytes = __m256i;
using Steps = __m256i;

TURBOQUANT_INLINE floats load(const float * p) { return _mm256_loadu_ps(p); }
TURBOQUANT_INLINE bytes load_bytes(const void * p) { return load32_bytes(p); }
TURBOQUANT_INLINE void store(float * p, floats x) { _mm256_storeu_ps(p, x); }
TURBOQUANT_INLINE void store_bytes(void * p, bytes x) { _mm256_storeu_si256(static_cast<__m256i *>(p), x); }
TURBOQUANT_INLINE floats all(float x) { return _mm256_set1_ps(x); }
TURBOQUANT_INLINE words all_words(int x) { return _mm256_set1_epi16(int16_t(x)); }
TURBOQUANT_INLINE ints zero_ints() { return _mm256_setzero_si256(); }

TURBOQUANT_INLINE floats add(floats a, floats b) { return _mm256_add_ps(a, b); }
TURBOQUANT_INLINE floats sub(floats a, floats b) { return _mm256_sub_ps(a, b); }
TURBOQUANT_INLINE floats mul(floats a, floats b) { return _mm256_mul_ps(a, b); }
TURBOQUANT_INLINE floats fma(floats a, floats b, floats c) { return _mm256_fmadd_ps(a, b, c); }
TURBOQUANT_INLINE words add(words a, words b) { return _mm256_add_epi16(a, b); }
TURBOQUANT_INLINE words sub(words a, words b) { return _mm256_sub_epi16(a, b); }
TURBOQUANT_INLINE words abs_words(words x) { return _mm256_abs_epi16(x); }
TURBOQUANT_INLINE words xor_words(words a, words b) { return _mm256_xor_si256(a, b); }
TURBOQUANT_INLINE words select_negative(words z, words flags) {
    return _mm256_and_si256(_mm256_srai_epi16(z, 15), flags);
}
TURBOQUANT_INLINE words add_greater(words m, words x, words threshold) {
    return _mm256_sub_epi16(m, _mm256_cmpgt_epi16(x, threshold));
}

TURBOQUANT_INLINE floats flip_signs(floats x, const uint32_t * bits) {
    return _mm256_xor_ps(x, _mm256_load_ps(reinterpret_cast<const float *>(bits)));
}

// One stage inside a register. s has each lane's partner, and `lane` is -1 in lanes that take the difference. The
// product is exact, so the sum rounds as in scalar.cpp.
TURBOQUANT_INLINE floats butterfly(floats x, floats s, floats lane) { return _mm256_fmadd_ps(x, lane, s); }

template <int R> TURBOQUANT_INLINE void butterflies(floats * y) {
    const floats lane1 = _mm256_setr_ps(1, -1, 1, -1, 1, -1, 1, -1);
    const floats lane2 = _mm256_setr_ps(1, 1, -1, -1, 1, 1, -1, -1);
    const floats lane4 = _mm256_setr_ps(1, 1, 1, 1, -1, -1, -1, -1);
    for (int r = 0; r < R; ++r) {
        y[r] = butterfly(y[r], _mm256_permute_ps(y[r], 0xB1), lane1);
        y[r] = butterfly(y[r], _mm256_permute_ps(y[r], 0x4E), lane2);
        y[r] = butterfly(y[r], _mm256_permute2f128_ps(y[r], y[r], 1), lane4);
    }
}

TURBOQUANT_INLINE words butterfly(words x, words s, words sign) {
    return _mm256_add_epi16(s, _mm256_sign_epi16(x, sign));
}

template <int R> TURBOQUANT_INLINE void butterflies(words * w) {
    const words sign1 = _mm256_set1_epi32(int(0xFFFF0001));
    const words sign2 = _mm256_set1_epi64x(int64_t(0xFFFFFFFF00010001));
    const words sign4 = _mm256_setr_epi32(0x00010001, 0x00010001, -1, -1, 0x00010001, 0x00010001, -1, -1);
    const words sign8 = _mm256_setr_epi32(0x00010001, 0x00010001, 0x00010001, 0x00010001, -1, -1, -1, -1);
    const bytes swap16 = _mm256_setr_epi8(2, 3, 0, 1, 6, 7, 4, 5, 10, 11, 8, 9, 14, 15, 12, 13,
                                          2, 3, 0, 1, 6, 7, 4, 5, 10, 11, 8, 9, 14, 15, 12, 13);
    for (int r = 0; r < R; ++r) {
        w[r] = butterfly(w[r], _mm256_permute4x64_epi64(w[r], 0x4E), sign8);
        w[r] = butterfly(w[r], _mm256_shuffle_epi32(w[r], 0x4E), sign4);
        w[r] = butterfly(w[r], _mm256_shuffle_epi32(w[r], 0xB1), sign2);
        w[r] = butterfly(w[r], _mm256_shuffle_epi8(w[r], swap16), sign1);
    }
}

TURBOQUANT_INLINE int32_t reduce_add(ints x) {
    __m128i s = _mm_add_epi32(_mm256_castsi256_si128(x), _mm256_extracti128_si256(x, 1));
    s = _mm_add_epi32(s, _mm_shuffle_epi32(s, 0x4E));
    return _mm_cvtsi128_si32(_mm_add_epi32(s, _mm_shuffle_epi32(s, 0xB1)));
}

TURBOQUANT_INLINE float reduce_add(floats x) { return reduce_add8(x); }

TURBOQUANT_INLINE ints max_magnitude(ints m, floats x) {
    return _mm256_max_epu32(m, _mm256_and_si256(_mm256_castps_si256(x), _mm256_set1_epi32(0x7fffffff)));
}

TURBOQUANT_INLINE uint32_t largest_lane(ints x) {
    __m128i m = _mm_max_epu32(_mm256_castsi256_si128(x), _mm256_extracti128_si256(x, 1));
    m = _mm_max_epu32(m, _mm_shuffle_epi32(m, 0x4E));
    return uint32_t(_mm_cvtsi128_si32(_mm_max_epu32(m, _mm_shuffle_epi32(m, 0xB1))));
}

// ---- the codec

constexpr int byte_registers = 4;

TURBOQUANT_INLINE ints store_rounded(const floats * y, floats factor, int8_t * q, ints sum) {
    ints x[4];
    for (int r = 0; r < 4; ++r) x[r] = _mm256_cvtps_epi32(_mm256_mul_ps(y[r], factor));
    const words w = _mm256_packs_epi16(_mm256_packs_epi32(x[0], x[1]), _mm256_packs_epi32(x[2], x[3]));
    store_bytes(q, _mm256_permutevar8x32_epi32(w, _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7)));
    return _mm256_add_epi32(sum, _mm256_add_epi32(_mm256_add_epi32(x[0], x[1]), _mm256_add_epi32(x[2], x[3])));
}

TURBOQUANT_INLINE words round_words(floats a, floats b, floats unit) {
    const ints low = _mm256_cvtps_epi32(_mm256_mul_ps(a, unit)), high = _mm256_cvtps_epi32(_mm256_mul_ps(b, unit));
    return _mm256_permute4x64_epi64(_mm256_packs_epi32(low, high), 0xD8);
}

TURBOQUANT_INLINE ints multiply_add_words(ints sum, words a, words b) {
    return _mm256_add_epi32(sum, _mm256_madd_epi16(a, b));
}

TURBOQUANT_INLINE ints multiply_add_bytes(ints sum, bytes a, bytes b) { // sums of pairs fit int16
    return _mm256_add_epi32(sum, _mm256_madd_epi16(_mm256_maddubs_epi16(a, b), _mm256_set1_epi16(1)));
}

constexpr int word_registers = 2;

TURBOQUANT_INLINE void store_coarse(const words * magnitude, int8_t * coarse) {
    static_assert(coarse_unit == 1 << 6, "the shift below");
    words rounded[2];
    for (int r = 0; r < 2; ++r)
        rounded[r] = _mm256_srli_epi16(_mm256_add_epi16(magnitude[r], _mm256_set1_epi16(coarse_unit / 2)), 6);
    store_bytes(coarse, _mm256_packs_epi16(rounded[0], rounded[1]));
}

TURBOQUANT_INLINE bytes load_coarse(const int8_t * coarse) { return load_bytes(coarse); }

TURBOQUANT_INLINE void store_low_bytes(const words * m, uint8_t * out) {
    store_bytes(out, _mm256_permute4x64_epi64(_mm256_packus_epi16(m[0], m[1]), 0xD8));
}

template <typename Family> TURBOQUANT_INLINE bytes magnitude_table() {
    return _mm256_broadcastsi128_si256(load16_bytes(Family::magnitudes));
}

template <typename Family> TURBOQUANT_INLINE bytes centroids_under(int s, bytes coarse) {
    bytes m = _mm256_setzero_si256();
    for (int t = 0; t < Family::half_levels - 1; ++t)
        m = _mm256_sub_epi8(m, _mm256_cmpgt_epi8(coarse, _mm256_set1_epi8(Family::coarse_thresholds[s][t])));
    return _mm256_shuffle_epi8(magnitude_table<Family>(), m);
}

// The sums of eight registers, one in each lane of the result.
TURBOQUANT_INLINE ints reduce_add8(const ints * v) {
    const ints low = _mm256_hadd_epi32(_mm256_hadd_epi32(v[0], v[1]), _mm256_hadd_epi32(v[2], v[3]));
    const ints high = _mm256_hadd_epi32(_mm256_hadd_epi32(v[4], v[5]), _mm256_hadd_epi32(v[6], v[7]));
    return _mm256_add_epi32(_mm256_permute2x128_si256(low, high, 0x20), _mm256_permute2x128_si256(low, high, 0x31));
}

template <int Together> TURBOQUANT_INLINE void reduce_steps(const ints * v, Steps * out) {
    static_assert(search_steps == 8 && Together == 1, "one lane for each step");
    out[0] = reduce_add8(v);
}

TURBOQUANT_INLINE void choose(EncodingBase & work, Steps a, Steps b) {
    alignas(32) int32_t a8[8], b8[8];
    store_bytes(a8, a);
    store_bytes(b8, b);
    work.scale = best_scale(a8, b8);
}

template <typename Family> TURBOQUANT_INLINE words look_up(words count) { // an index byte with bit 7 set gives zero
    return _mm256_shuffle_epi8(magnitude_table<Family>(), _mm256_or_si256(count, _mm256_set1_epi16(int16_t(0x8000))));
}

// int8 levels, 32 to a register.
template <int N> struct Levels {
    static constexpr int registers = N / 32;
    bytes v[registers];
};

// Expands 32 bits to bytes: byte i is 4 if bit i is set, else 0.
__m256i spread_third_bits(const uint8_t * high) {
    const __m256i source = _mm256_setr_epi8(0, 0, 0, 0, 0, 0, 0, 0, 1, 1, 1, 1, 1, 1, 1, 1,
                                            2, 2, 2, 2, 2, 2, 2, 2, 3, 3, 3, 3, 3, 3, 3, 3);
    const __m256i bit = _mm256_set1_epi64x(int64_t(0x8040201008040201));
    const __m256i bytes = _mm256_and_si256(_mm256_shuffle_epi8(_mm256_set1_epi32(four_bytes(high)), source), bit);
    return _mm256_and_si256(_mm256_cmpeq_epi8(bytes, bit), _mm256_set1_epi8(4));
}

template <int Bits, int N> TURBOQUANT_INLINE Levels<N> expand(Format<LloydMax<Bits>, N>, const uint8_t * q) {
    constexpr int registers = Levels<N>::registers;
    const __m256i table = _mm256_broadcastsi128_si256(load16_bytes(LloydMax<Bits>::centroids));
    __m256i index[registers];
    if constexpr (Bits == 4) {
        const __m256i mask = _mm256_set1_epi8(15);
        if constexpr (N == 32) {
            const __m256i bytes = _mm256_broadcastsi128_si256(load16_bytes(q));
            index[0] = _mm256_and_si256(_mm256_srlv_epi64(bytes, _mm256_setr_epi64x(0, 0, 4, 4)), mask);
        } else {
            for (int r = 0; r < registers / 2; ++r) {
                const __m256i bytes = load32_bytes(q + 32 * r);
                index[r] = _mm256_and_si256(bytes, mask);
                index[r + registers / 2] = _mm256_and_si256(_mm256_srli_epi16(bytes, 4), mask);
            }
        }
    } else {
        const __m256i mask = _mm256_set1_epi8(3);
        if constexpr (N == 128) {
            const __m256i bytes = load32_bytes(q);
            index[0] = _mm256_and_si256(bytes, mask);
            index[1] = _mm256_and_si256(_mm256_srli_epi16(bytes, 2), mask);
            index[2] = _mm256_and_si256(_mm256_srli_epi16(bytes, 4), mask);
            index[3] = _mm256_and_si256(_mm256_srli_epi16(bytes, 6), mask);
        } else if constexpr (N == 64) {
            const __m256i bytes = _mm256_broadcastsi128_si256(load16_bytes(q));
            index[0] = _mm256_and_si256(_mm256_srlv_epi64(bytes, _mm256_setr_epi64x(0, 0, 2, 2)), mask);
            index[1] = _mm256_and_si256(_mm256_srlv_epi64(bytes, _mm256_setr_epi64x(4, 4, 6, 6)), mask);
        } else {
            const __m256i bytes = _mm256_broadcastq_epi64(_mm_loadl_epi64(reinterpret_cast<const __m128i *>(q)));
            index[0] = _mm256_and_si256(_mm256_srlv_epi64(bytes, _mm256_setr_epi64x(0, 2, 4, 6)), mask);
        }
        if constexpr (Bits == 3)
            for (int r = 0; r < registers; ++r)
                index[r] = _mm256_or_si256(index[r], spread_third_bits(q + high_offset<N> + 4 * r));
    }
    Levels<N> out;
    for (int r = 0; r < registers; ++r) out.v[r] = _mm256_shuffle_epi8(table, index[r]);
    return out;
}

template <int Bits, int N> TURBOQUANT_INLINE Levels<N> expand(Format<Trellis<Bits>, N>, const uint8_t * q) {
    Levels<N> out;
    expand_trellis<Bits, N>(q, out.v);
    return out;
}

template <int N> TURBOQUANT_INLINE void store_levels(int8_t * dst, const Levels<N> & level) {
    for (int r = 0; r < Levels<N>::registers; ++r) store_bytes(dst + 32 * r, level.v[r]);
}

template <int N> TURBOQUANT_INLINE void store_scaled(float * dst, const Levels<N> & level, floats scale) {
    for (int r = 0; r < Levels<N>::registers; ++r) {
        const __m128i half[2] = {_mm256_castsi256_si128(level.v[r]), _mm256_extracti128_si256(level.v[r], 1)};
        for (int h = 0; h < 2; ++h) {
            const floats low = _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(half[h]));
            const floats high = _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_srli_si128(half[h], 8)));
            store(dst + 32 * r + 16 * h, mul(scale, low));
            store(dst + 32 * r + 16 * h + 8, mul(scale, high));
        }
    }
}

template <int N> TURBOQUANT_INLINE void hadamard(words * w);

template <int N> TURBOQUANT_INLINE void transform_levels(const Levels<N> & level, words * w) {
    for (int r = 0; r < Levels<N>::registers; ++r) {
        const bytes v = _mm256_sign_epi8(level.v[r], load_bytes(sign_tables.levels2 + 32 * r));
        w[2 * r] = _mm256_cvtepi8_epi16(_mm256_castsi256_si128(v));
        w[2 * r + 1] = _mm256_cvtepi8_epi16(_mm256_extracti128_si256(v, 1));
    }
    hadamard<N>(w);
}

template <int Half> TURBOQUANT_INLINE floats floats_of(words w) {
    return _mm256_cvtepi32_ps(_mm256_cvtepi16_epi32(_mm256_extracti128_si256(w, Half)));
}

template <int N> TURBOQUANT_INLINE bytes load_query(const int8_t * q) { return load_bytes(q); }

#ifdef TURBOQUANT_VNNI
TURBOQUANT_INLINE ints multiply_add_weights(ints sum, bytes a, bytes b) { // a unsigned, b signed
#ifdef __AVXVNNI__
    return _mm256_dpbusd_avx_epi32(sum, a, b);
#else
    return _mm256_dpbusd_epi32(sum, a, b);
#endif
}

constexpr int level_offset = 128; // the instruction multiplies unsigned by signed
TURBOQUANT_INLINE bytes offset_levels(bytes level) { return _mm256_xor_si256(level, _mm256_set1_epi8(-128)); }
TURBOQUANT_INLINE ints multiply_add_levels(ints sum, bytes level, bytes q) {
    return multiply_add_weights(sum, level, q);
}
#else
constexpr int level_offset = 0;
TURBOQUANT_INLINE bytes offset_levels(bytes level) { return level; }

// maddubs multiplies unsigned by signed, so the sign of the level is moved to the query. Neither is ever -128, so the
// sum of a pair is at most 2 * 127 * 127 and fits int16.
TURBOQUANT_INLINE ints multiply_add_levels(ints sum, bytes level, bytes q) {
    const words pairs = _mm256_maddubs_epi16(_mm256_abs_epi8(level), _mm256_sign_epi8(q, level));
    return _mm256_add_epi32(sum, _mm256_madd_epi16(pairs, _mm256_set1_epi16(1)));
}
#endif

// ---- the encoder of the trellis-coded types

TURBOQUANT_INLINE words min_words(words a, words b) { return _mm256_min_epi16(a, b); }
TURBOQUANT_INLINE words max_words(words a, words b) { return _mm256_max_epi16(a, b); }
TURBOQUANT_INLINE words excess(words x, words t) { return _mm256_subs_epu16(x, t); }
TURBOQUANT_INLINE words multiply_rounded(words a, words b) { return _mm256_mulhrs_epi16(a, b); }
template <int S> TURBOQUANT_INLINE words square_shifted(words x) {
    return _mm256_srli_epi16(_mm256_mullo_epi16(x, x), S);
}
TURBOQUANT_INLINE words load_words(const int8_t * p) { return _mm256_cvtepi8_epi16(load16_bytes(p)); }

// In this order no words cross lanes of 128 bits.
constexpr int fours_offset(int i) { return i / 16 * 64 + i % 8 / 2 * 16 + i % 16 / 8 * 8 + i % 2 * 4; }
TURBOQUANT_INLINE void store_fours(const words * m, int16_t * out) {
    const words low01 = _mm256_unpacklo_epi16(m[0], m[1]), high01 = _mm256_unpackhi_epi16(m[0], m[1]);
    const words low23 = _mm256_unpacklo_epi16(m[2], m[3]), high23 = _mm256_unpackhi_epi16(m[2], m[3]);
    store_bytes(out, _mm256_unpacklo_epi32(low01, low23));
    store_bytes(out + 16, _mm256_unpackhi_epi32(low01, low23));
    store_bytes(out + 32, _mm256_unpacklo_epi32(high01, high23));
    store_bytes(out + 48, _mm256_unpackhi_epi32(high01, high23));
}
TURBOQUANT_INLINE words load_four(const int16_t * p) { return _mm256_set1_epi64x(eight_bytes(p)); }
TURBOQUANT_INLINE bytes word_index(words number) { // of its two bytes
    return _mm256_add_epi16(_mm256_mullo_epi16(number, _mm256_set1_epi16(0x0202)), _mm256_set1_epi16(0x0100));
}
TURBOQUANT_INLINE words look_up_word(words four, bytes index) { return _mm256_shuffle_epi8(four, index); }

// Of two registers the first has the states 0-7 and 16-23, the second 8-15 and 24-31: packing compared words, which
// works in lanes of 128 bits, then gives the order of the states.
using flags = __m256i;
constexpr int state_at(int position) { return position % 16 / 8 * 16 + position / 16 * 8 + position % 8; }
TURBOQUANT_INLINE flags greater(words a, words b) { return _mm256_cmpgt_epi16(a, b); }
TURBOQUANT_INLINE void store_flags(const flags * first, const flags * last, uint64_t * out) {
    const int bits[2] = {_mm256_movemask_epi8(_mm256_packs_epi16(first[0], first[1])),
                         _mm256_movemask_epi8(_mm256_packs_epi16(last[0], last[1]))};
    std::memcpy(out, bits, sizeof(bits));
}
TURBOQUANT_INLINE void interleave_states(const words * even, const words * odd, words * cost) {
    words low[2], high[2];
    for (int r = 0; r < 2; ++r) {
        low[r] = _mm256_unpacklo_epi16(even[r], odd[r]);
        high[r] = _mm256_unpackhi_epi16(even[r], odd[r]);
    }
    cost[0] = _mm256_permute2x128_si256(low[0], low[1], 0x20);
    cost[1] = _mm256_permute2x128_si256(high[0], high[1], 0x20);
    cost[2] = _mm256_permute2x128_si256(low[0], low[1], 0x31);
    cost[3] = _mm256_permute2x128_si256(high[0], high[1], 0x31);
}
TURBOQUANT_INLINE int least_lane(words x) { return least_word(x); }

// ---- attention

TURBOQUANT_INLINE floats load_half(const uint8_t * p) { return _mm256_cvtph_ps(load16_bytes(p)); }

constexpr int accumulated_rows = 6;
template <int Rows> constexpr int accumulated_registers = Rows == 1 ? 4 : 2;

#ifdef TURBOQUANT_VNNI
constexpr int scored_registers = 2;
TURBOQUANT_INLINE ints all_ints(int32_t x) { return _mm256_set1_epi32(x); }
TURBOQUANT_INLINE floats to_floats(ints x) { return _mm256_cvtepi32_ps(x); }
TURBOQUANT_INLINE bytes all_four(const void * p) { return _mm256_set1_epi32(four_bytes(p)); }
TURBOQUANT_INLINE bytes load_tile(const int8_t * p) { return _mm256_load_si256(reinterpret_cast<const __m256i *>(p)); }

TURBOQUANT_INLINE void transpose(const int8_t * src, int64_t stride, int8_t * dst) {
    __m256i row[4];
    for (int j = 0; j < 4; ++j)
        row[j] = _mm256_loadu2_m128i(reinterpret_cast<const __m128i *>(src + (j + 4) * stride),
                                     reinterpret_cast<const __m128i *>(src + j * stride));
    const __m256i low01 = _mm256_unpacklo_epi32(row[0], row[1]), high01 = _mm256_unpackhi_epi32(row[0], row[1]);
    const __m256i low23 = _mm256_unpacklo_epi32(row[2], row[3]), high23 = _mm256_unpackhi_epi32(row[2], row[3]);
    const __m256i column[4] = {_mm256_unpacklo_epi64(low01, low23), _mm256_unpackhi_epi64(low01, low23),
                               _mm256_unpacklo_epi64(high01, high23), _mm256_unpackhi_epi64(high01, high23)};
    for (int i = 0; i < 4; ++i)
        _mm256_store_si256(reinterpret_cast<__m256i *>(dst + i * 4 * tile_rows), offset_levels(column[i]));
}

template <int Rows> constexpr int leveled_registers = Rows == 1 ? 4 : 2;
TURBOQUANT_INLINE ints max_bits(ints m, floats x) { return _mm256_max_epu32(m, _mm256_castps_si256(x)); }
TURBOQUANT_INLINE floats max(floats a, floats b) { return _mm256_max_ps(a, b); }
TURBOQUANT_INLINE float reduce_max(floats x) {
    __m128 m = _mm_max_ps(_mm256_castps256_ps128(x), _mm256_extractf128_ps(x, 1));
    m = _mm_max_ps(m, _mm_movehl_ps(m, m));
    return _mm_cvtss_f32(_mm_max_ss(m, _mm_movehdup_ps(m)));
}
TURBOQUANT_INLINE ints to_ints(floats x) { return _mm256_cvtps_epi32(x); }
TURBOQUANT_INLINE ints shift_byte(ints x) { return _mm256_slli_epi32(x, 8); }
TURBOQUANT_INLINE floats first(floats x, int n) {
    const ints there = _mm256_cmpgt_epi32(_mm256_set1_epi32(n), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
    return _mm256_and_ps(x, _mm256_castsi256_ps(there));
}

TURBOQUANT_INLINE void split_bytes(const ints * x, uint8_t * high, uint8_t * low) {
    const __m256i byte = _mm256_set1_epi16(255), order = _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7);
    const __m256i a = _mm256_packus_epi32(x[0], x[1]), b = _mm256_packus_epi32(x[2], x[3]);
    const __m256i upper = _mm256_packus_epi16(_mm256_srli_epi16(a, 8), _mm256_srli_epi16(b, 8));
    const __m256i lower = _mm256_packus_epi16(_mm256_and_si256(a, byte), _mm256_and_si256(b, byte));
    store_bytes(high, _mm256_permutevar8x32_epi32(upper, order));
    store_bytes(low, _mm256_permutevar8x32_epi32(lower, order));
}

TURBOQUANT_INLINE void interleave(const int8_t * level, int64_t stride, int8_t * tile) {
    interleave32(level, stride, tile);
}
#endif

} // namespace
} // namespace turboquant

#include "generic/codec.h"
#include "generic/trellis_vector.h"
#include "generic/attention.h"
#ifdef TURBOQUANT_VNNI
#include "generic/scores.h"
#include "generic/values.h"
#endif

namespace turboquant {
namespace {

constexpr decltype(Kernels::softmax) softmax = softmax_tile;

#ifdef TURBOQUANT_VNNI
constexpr decltype(Kernels::lowest) lowest = nullptr;
#else
// Without a dot product of four bytes it is faster to keep the levels in the order of the cache: they need no
// transposition, and the sums of eight KV rows are added across lanes together. The sign of the query is moved to the
// level, because the magnitude of the query then serves all rows. This takes 10 to 20% less time than moving the sign
// of the level, but -128 has no negative: see `lowest`.
constexpr decltype(Kernels::keys) keys = nullptr;

template <int N>
void scores(const int8_t * level, const float * scale, int64_t blocks, const void * query, int rows, float * s) {
    auto * q = static_cast<const typename QueryBlock<N>::type *>(query);
    for (int r0 = 0; r0 < tile_rows; r0 += 8)
        for (int m = 0; m < rows; ++m) {
            __m256 total = _mm256_setzero_ps();
            for (int64_t b = 0; b < blocks; ++b) {
                const typename QueryBlock<N>::type & block = q[m * blocks + b];
                __m256i values[Levels<N>::registers], magnitudes[Levels<N>::registers], sums[8];
                for (int r = 0; r < Levels<N>::registers; ++r) {
                    values[r] = load32_bytes(block.q + 32 * r);
                    magnitudes[r] = _mm256_abs_epi8(values[r]);
                }
                for (int i = 0; i < 8; ++i) {
                    const int8_t * k = level + ((r0 + i) * blocks + b) * N;
                    sums[i] = _mm256_setzero_si256();
                    for (int r = 0; r < Levels<N>::registers; ++r) {
                        const __m256i v = load32_bytes(k + 32 * r);
                        const __m256i pairs = _mm256_maddubs_epi16(magnitudes[r], _mm256_sign_epi8(v, values[r]));
                        sums[i] = _mm256_add_epi32(sums[i], _mm256_madd_epi16(pairs, _mm256_set1_epi16(1)));
                    }
                }
                const __m256 scales = _mm256_mul_ps(_mm256_loadu_ps(scale + b * tile_rows + r0),
                                                    _mm256_set1_ps(block.scale));
                total = _mm256_fmadd_ps(_mm256_cvtepi32_ps(reduce_add8(sums)), scales, total);
            }
            _mm256_storeu_ps(s + m * tile_rows + r0, total);
        }
}

constexpr decltype(Kernels::values) values = nullptr;
constexpr decltype(Kernels::accumulate_levels) accumulate_levels = nullptr;

bool lowest(const int8_t * level, int64_t n) {
    bytes least = _mm256_setzero_si256();
    for (int64_t i = 0; i < n; i += 32) least = _mm256_min_epi8(least, load_bytes(level + i));
    return _mm256_movemask_epi8(_mm256_cmpeq_epi8(least, _mm256_set1_epi8(-128))) != 0;
}
#endif

} // namespace

#ifdef TURBOQUANT_VNNI
const Kernels kernels_avxvnni = TURBOQUANT_KERNELS_TABLE("avxvnni");
#else
const Kernels kernels_avx2 = TURBOQUANT_KERNELS_TABLE("avx2");
#endif

} // namespace turboquant
