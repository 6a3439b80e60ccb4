// AVX-512 (F, BW, DQ, VL): the primitives of generic/, and algorithms that differ for AVX-512. avx512vnni.cpp and
// avx512vbmi.cpp compile this file again with more instructions.
#include "attention_tile.h"
#include "format.h"
#include "generic/signs.h"
#include "kernels.h"
#include "x86.h"
#include "x86_trellis.h"

#include <immintrin.h>

namespace turboquant {
namespace {

constexpr int lanes = 16;
using floats = __m512;
using ints = __m512i;
using words = __m512i;
using bytes = __m512i;
using Steps = __m256i;

TURBOQUANT_INLINE floats load(const float * p) { return _mm512_loadu_ps(p); }
TURBOQUANT_INLINE bytes load_bytes(const void * p) { return _mm512_loadu_si512(p); }
TURBOQUANT_INLINE void store(float * p, floats x) { _mm512_storeu_ps(p, x); }
TURBOQUANT_INLINE floats all(float x) { return _mm512_set1_ps(x); }
TURBOQUANT_INLINE words all_words(int x) { return _mm512_set1_epi16(int16_t(x)); }
TURBOQUANT_INLINE ints zero_ints() { return _mm512_setzero_si512(); }

TURBOQUANT_INLINE floats add(floats a, floats b) { return _mm512_add_ps(a, b); }
TURBOQUANT_INLINE floats sub(floats a, floats b) { return _mm512_sub_ps(a, b); }
TURBOQUANT_INLINE floats mul(floats a, floats b) { return _mm512_mul_ps(a, b); }
TURBOQUANT_INLINE floats fma(floats a, floats b, floats c) { return _mm512_fmadd_ps(a, b, c); }
TURBOQUANT_INLINE words add(words a, words b) { return _mm512_add_epi16(a, b); }
TURBOQUANT_INLINE words sub(words a, words b) { return _mm512_sub_epi16(a, b); }
TURBOQUANT_INLINE words abs_words(words x) { return _mm512_abs_epi16(x); }
TURBOQUANT_INLINE words xor_words(words a, words b) { return _mm512_xor_si512(a, b); }
TURBOQUANT_INLINE words select_negative(words z, words flags) {
    return _mm512_and_si512(_mm512_srai_epi16(z, 15), flags);
}
TURBOQUANT_INLINE words add_greater(words m, words x, words threshold) {
    return _mm512_mask_add_epi16(m, _mm512_cmpgt_epi16_mask(x, threshold), m, _mm512_set1_epi16(1));
}

TURBOQUANT_INLINE floats flip_signs(floats x, const uint32_t * bits) { return _mm512_xor_ps(x, _mm512_load_ps(bits)); }

// +1, or -1 in lanes whose number has bit h set, which take the difference.
template <int H> TURBOQUANT_INLINE floats difference_lanes() {
    return _mm512_mask_mov_ps(_mm512_set1_ps(1.0f), H == 1 ? 0xAAAA : H == 2 ? 0xCCCC : H == 4 ? 0xF0F0 : 0xFF00,
                              _mm512_set1_ps(-1.0f));
}

// One stage inside a register. s has each lane's partner. The product is exact, so the sum rounds as in scalar.cpp.
template <int H> TURBOQUANT_INLINE floats butterfly(floats x, floats s) {
    return _mm512_fmadd_ps(x, difference_lanes<H>(), s);
}

template <int R> TURBOQUANT_INLINE void butterflies(floats * y) {
    for (int r = 0; r < R; ++r) y[r] = butterfly<1>(y[r], _mm512_permute_ps(y[r], 0xB1));
    for (int r = 0; r < R; ++r) y[r] = butterfly<2>(y[r], _mm512_permute_ps(y[r], 0x4E));
    for (int r = 0; r < R; ++r) y[r] = butterfly<4>(y[r], _mm512_shuffle_f32x4(y[r], y[r], 0xB1));
    for (int r = 0; r < R; ++r) y[r] = butterfly<8>(y[r], _mm512_shuffle_f32x4(y[r], y[r], 0x4E));
}

TURBOQUANT_INLINE words butterfly(words x, words s, __mmask32 upper) {
    return _mm512_mask_sub_epi16(_mm512_add_epi16(x, s), upper, s, x);
}

template <int R> TURBOQUANT_INLINE void butterflies(words * w) {
    for (int r = 0; r < R; ++r) {
        w[r] = butterfly(w[r], _mm512_shuffle_i64x2(w[r], w[r], 0x4E), 0xFFFF0000);
        w[r] = butterfly(w[r], _mm512_shuffle_i64x2(w[r], w[r], 0xB1), 0xFF00FF00);
        w[r] = butterfly(w[r], _mm512_shuffle_epi32(w[r], _MM_PERM_ENUM(0x4E)), 0xF0F0F0F0);
        w[r] = butterfly(w[r], _mm512_shuffle_epi32(w[r], _MM_PERM_ENUM(0xB1)), 0xCCCCCCCC);
        w[r] = butterfly(w[r], _mm512_rol_epi32(w[r], 16), 0xAAAAAAAA);
    }
}

TURBOQUANT_INLINE int32_t reduce_add(ints x) { return _mm512_reduce_add_epi32(x); }
TURBOQUANT_INLINE float reduce_add(floats x) {
    return reduce_add8(_mm256_add_ps(_mm512_castps512_ps256(x), _mm512_extractf32x8_ps(x, 1)));
}
TURBOQUANT_INLINE ints max_magnitude(ints m, floats x) {
    return _mm512_max_epu32(m, _mm512_and_si512(_mm512_castps_si512(x), _mm512_set1_epi32(0x7fffffff)));
}
TURBOQUANT_INLINE uint32_t largest_lane(ints x) { return _mm512_reduce_max_epu32(x); }

// ---- the codec

constexpr int byte_registers = 1;

TURBOQUANT_INLINE ints store_rounded(const floats * y, floats factor, int8_t * q, ints sum) {
    const ints x = _mm512_cvtps_epi32(_mm512_mul_ps(y[0], factor));
    _mm_storeu_si128(reinterpret_cast<__m128i *>(q), _mm512_cvtepi32_epi8(x));
    return _mm512_add_epi32(sum, x);
}

TURBOQUANT_INLINE words round_words(floats a, floats b, floats unit) {
    const __m256i low = _mm512_cvtepi32_epi16(_mm512_cvtps_epi32(_mm512_mul_ps(a, unit)));
    const __m256i high = _mm512_cvtepi32_epi16(_mm512_cvtps_epi32(_mm512_mul_ps(b, unit)));
    return _mm512_inserti64x4(_mm512_castsi256_si512(low), high, 1);
}

TURBOQUANT_INLINE ints multiply_add_words(ints sum, words a, words b) {
#ifdef TURBOQUANT_VNNI
    return _mm512_dpwssd_epi32(sum, a, b);
#else
    return _mm512_add_epi32(sum, _mm512_madd_epi16(a, b));
#endif
}

TURBOQUANT_INLINE ints multiply_add_bytes(ints sum, bytes a, bytes b) {
#ifdef TURBOQUANT_VNNI
    return _mm512_dpbusd_epi32(sum, a, b);
#else // sums of pairs fit int16
    return _mm512_add_epi32(sum, _mm512_madd_epi16(_mm512_maddubs_epi16(a, b), _mm512_set1_epi16(1)));
#endif
}

constexpr int word_registers = 1;

TURBOQUANT_INLINE void store_coarse(const words * magnitude, int8_t * coarse) {
    static_assert(coarse_unit == 1 << 6, "the shift below");
    const words rounded = _mm512_srli_epi16(_mm512_add_epi16(magnitude[0], _mm512_set1_epi16(coarse_unit / 2)), 6);
    _mm256_storeu_si256(reinterpret_cast<__m256i *>(coarse), _mm512_cvtsepi16_epi8(rounded)); // saturates at 127
}

TURBOQUANT_INLINE bytes load_coarse(const int8_t * coarse) { // two parts, for store forwarding
    return _mm512_inserti64x4(_mm512_castsi256_si512(load32_bytes(coarse)), load32_bytes(coarse + 32), 1);
}

TURBOQUANT_INLINE void store_low_bytes(const words * m, uint8_t * out) {
    _mm256_storeu_si256(reinterpret_cast<__m256i *>(out), _mm512_cvtepi16_epi8(m[0]));
}

#ifdef TURBOQUANT_VBMI
// A table of the centroids of all coarse magnitudes for each step of the search.
template <typename Family> struct CoarseTable {
    struct Rows {
        alignas(64) int8_t row[search_steps][128];
        constexpr Rows() : row() {
            for (int s = 0; s < search_steps; ++s)
                for (int r = 0, t = 0; r < 128; ++r) {
                    while (t < Family::half_levels - 1 && r > Family::coarse_thresholds[s][t]) ++t;
                    row[s][r] = Family::magnitudes[t];
                }
        }
    };
    static constexpr Rows rows{};
};
#endif

// The centroids of 64 coarse magnitudes in step s of the search.
template <typename Family> TURBOQUANT_INLINE bytes centroids_under(int s, bytes coarse) {
#ifdef TURBOQUANT_VBMI
    const int8_t * table = CoarseTable<Family>::rows.row[s];
    return _mm512_permutex2var_epi8(_mm512_load_si512(table), coarse, _mm512_load_si512(table + 64));
#else
    __m512i c = _mm512_set1_epi8(Family::magnitudes[0]);
    for (int t = 0; t < Family::half_levels - 1; ++t) // thresholds ascend, so the last exceeded one decides
        c = _mm512_mask_mov_epi8(c, _mm512_cmpgt_epi8_mask(coarse, _mm512_set1_epi8(Family::coarse_thresholds[s][t])),
                                 _mm512_set1_epi8(Family::magnitudes[t + 1]));
    return c;
#endif
}

// For each 128-bit lane, the four sums of that lane of v[0 ... 3].
TURBOQUANT_INLINE ints reduce_add4(const __m512i * v) {
    const __m512i low = _mm512_add_epi32(_mm512_unpacklo_epi32(v[0], v[1]), _mm512_unpackhi_epi32(v[0], v[1]));
    const __m512i high = _mm512_add_epi32(_mm512_unpacklo_epi32(v[2], v[3]), _mm512_unpackhi_epi32(v[2], v[3]));
    return _mm512_add_epi32(_mm512_unpacklo_epi64(low, high), _mm512_unpackhi_epi64(low, high));
}

// The sums of the lower halves of eight registers, then those of the upper halves.
TURBOQUANT_INLINE ints reduce_add_halves(const __m512i * v) {
    const __m512i low = reduce_add4(v), high = reduce_add4(v + 4);
    const __m512i sum = _mm512_add_epi32(_mm512_shuffle_i32x4(low, high, 0x88), _mm512_shuffle_i32x4(low, high, 0xDD));
    return _mm512_shuffle_i32x4(sum, sum, 0xD8);
}

template <int Together> TURBOQUANT_INLINE void reduce_steps(const ints * v, Steps * out) {
    static_assert(search_steps == 8, "one lane for each step");
    const ints sum = reduce_add_halves(v);
    const __m256i low = _mm512_castsi512_si256(sum), high = _mm512_extracti64x4_epi64(sum, 1);
    out[0] = Together == 2 ? low : _mm256_add_epi32(low, high);
    if constexpr (Together == 2) out[1] = high;
}

// Keeps the scale of the best step. a and b have the sums, one lane for each step.
TURBOQUANT_INLINE void choose(EncodingBase & work, Steps a, Steps b) {
    const __m512d wide = _mm512_cvtepi32_pd(a);
    const __m512d e = _mm512_div_pd(_mm512_mul_pd(wide, wide), _mm512_cvtepi32_pd(b));
    const int best = __builtin_ctz(_mm512_cmpeq_pd_mask(e, _mm512_set1_pd(_mm512_reduce_max_pd(e))));
    alignas(32) int32_t a8[8], b8[8];
    _mm256_store_si256(reinterpret_cast<__m256i *>(a8), a);
    _mm256_store_si256(reinterpret_cast<__m256i *>(b8), b);
    work.scale = least_squares_scale(a8[best], b8[best]);
}

template <typename Family> TURBOQUANT_INLINE words look_up(words count) { // in the low byte of each word
    const __m128i table = load16_bytes(Family::magnitudes);
    return _mm512_maskz_shuffle_epi8(0x5555555555555555, _mm512_broadcast_i32x4(table), count);
}

// int8 levels, 64 to a register; a block of 32 fills the lower half and leaves the upper half undefined.
template <int N> struct Levels {
    static constexpr int registers = N == 128 ? 2 : 1;
    bytes v[registers];
};

// The index bytes are copied to every part of the register that uses them, and shifted by a different amount in each.
template <int Bits, int N> TURBOQUANT_INLINE Levels<N> expand(Format<LloydMax<Bits>, N>, const uint8_t * q) {
    const __m512i table = _mm512_broadcast_i32x4(load16_bytes(LloydMax<Bits>::centroids));
    Levels<N> out;
    __m512i index[Levels<N>::registers];
    if constexpr (Bits == 4) {
        const __m512i mask = _mm512_set1_epi8(15);
        if constexpr (N == 128) {
            const __m512i bytes = _mm512_loadu_si512(q);
            index[0] = _mm512_and_si512(bytes, mask);
            index[1] = _mm512_and_si512(_mm512_srli_epi16(bytes, 4), mask);
        } else if constexpr (N == 64) {
            const __m512i bytes = _mm512_broadcast_i64x4(load32_bytes(q));
            const __m512i shift = _mm512_inserti64x4(_mm512_setzero_si512(), _mm256_set1_epi16(4), 1);
            index[0] = _mm512_and_si512(_mm512_srlv_epi16(bytes, shift), mask);
        } else {
            const __m512i bytes = _mm512_broadcast_i32x4(load16_bytes(q));
            const __m512i shift = _mm512_set_epi64(0, 0, 0, 0, 0x0004000400040004, 0x0004000400040004, 0, 0);
            index[0] = _mm512_and_si512(_mm512_srlv_epi16(bytes, shift), mask);
        }
    } else {
        const __m512i mask = _mm512_set1_epi8(3);
        if constexpr (N == 128) {
            const __m512i bytes = _mm512_broadcast_i64x4(load32_bytes(q));
            const __m512i shift = _mm512_inserti64x4(_mm512_setzero_si512(), _mm256_set1_epi16(2), 1);
            index[0] = _mm512_and_si512(_mm512_srlv_epi16(bytes, shift), mask);
            index[1] = _mm512_and_si512(_mm512_srlv_epi16(_mm512_srli_epi16(bytes, 4), shift), mask);
        } else if constexpr (N == 64) {
            const __m512i bytes = _mm512_broadcast_i32x4(load16_bytes(q));
            const __m512i shift = _mm512_set_epi64(0x0006000600060006, 0x0006000600060006, 0x0004000400040004,
                                                   0x0004000400040004, 0x0002000200020002, 0x0002000200020002, 0, 0);
            index[0] = _mm512_and_si512(_mm512_srlv_epi16(bytes, shift), mask);
        } else {
            const __m512i bytes = _mm512_broadcastq_epi64(_mm_loadl_epi64(reinterpret_cast<const __m128i *>(q)));
            const __m512i shift =
                _mm512_set_epi64(0, 0, 0, 0, 0x0006000600060006, 0x0004000400040004, 0x0002000200020002, 0);
            index[0] = _mm512_and_si512(_mm512_srlv_epi16(bytes, shift), mask);
        }
        if constexpr (Bits == 3)
            for (int r = 0; r < Levels<N>::registers; ++r) {
                uint64_t high = 0; // the bytes with the third bits are a lane mask
                std::memcpy(&high, q + high_offset<N> + 8 * r, N == 32 ? 4 : 8);
                index[r] = _mm512_mask_add_epi8(index[r], high, index[r], _mm512_set1_epi8(4));
            }
    }
    for (int r = 0; r < Levels<N>::registers; ++r) out.v[r] = _mm512_shuffle_epi8(table, index[r]);
    return out;
}

// The trellis-coded types as in x86_trellis.h: a register has 4 lanes of 16 bytes or 8 lanes of 8 bytes, and the upper
// nibbles are those of the second register. Blocks of 32 use registers of 32 bytes.
template <int N> TURBOQUANT_INLINE __m512i every_lane512(const void * p) {
    return N == 256   ? _mm512_broadcast_i64x4(load32_bytes(p))
           : N == 128 ? _mm512_broadcast_i32x4(load16_bytes(p))
                      : _mm512_set1_epi64(eight_bytes(p));
}

// f(h) in each lane h.
template <int N, typename F> TURBOQUANT_INLINE __m512i for_lanes(F f) {
    constexpr int per = N / 64; // qwords of a lane
    constexpr int64_t q[8] = {f(0), f(1 / per), f(2 / per), f(3 / per), f(4 / per), f(5 / per), f(6 / per), f(7 / per)};
    return _mm512_setr_epi64(q[0], q[1], q[2], q[3], q[4], q[5], q[6], q[7]);
}

#ifdef __GFNI__
TURBOQUANT_INLINE __m512i xor3(__m512i a, __m512i b, __m512i c) { return _mm512_ternarylogic_epi32(a, b, c, 0x96); }

template <int Bits, int N> TURBOQUANT_INLINE __m512i nibbles512(const uint8_t * q) {
    constexpr int upper = N == 128 ? 4 : 0; // blocks of 64 have no second register
    const __m512i own = for_lanes<N>([](int h) { return int64_t(nibble_matrices<Bits, N>(h, h + upper).own); });
    const __m512i before = for_lanes<N>([](int h) { return int64_t(nibble_matrices<Bits, N>(h, h + upper).before); });
    const __m512i rest = for_lanes<N>([](int h) { return int64_t(nibble_matrices<Bits, N>(h, h + upper).rest); });
    const __m512i rests = Bits == 2 ? every_lane512<N>(q + N / 8) : every_lane512<2 * N>(q + N / 8);
    return xor3(_mm512_gf2p8affine_epi64_epi8(every_lane512<N>(q), own, 0),
                _mm512_gf2p8affine_epi64_epi8(every_lane512<N>(q - 1), before, 0),
                _mm512_gf2p8affine_epi64_epi8(rests, rest, 0));
}
#else
// Halves are as fast as whole registers, whose shifts and logic run on fewer ports.
template <int Bits, int N> TURBOQUANT_INLINE __m512i nibbles512(const uint8_t * q) {
    const __m256i low = nibbles<Bits, N, 0>(q);
    __m256i high;
    if constexpr (N == 128)
        high = nibbles<Bits, N, 1>(q);
    else
        high = _mm256_srli_epi16(low, 4);
    return _mm512_inserti64x4(_mm512_castsi256_si512(low), high, 1);
}
#endif

// The levels of the elements of register R, whose nibbles are the lower ones in `index`.
template <int Bits, int N, int R> TURBOQUANT_INLINE __m512i look_up_levels512(__m512i index, const uint8_t * signs) {
    const int8_t * table = repeated_levels<Bits>.level;
#ifdef TURBOQUANT_VBMI
    const __m512i all_levels = _mm512_load_si512(table); // six bits of an index count
    if constexpr (Bits == 4) {
        const __m512i counts = for_lanes<N>([](int h) { return (h + 4 * R - 4) & 63; });
        const __m512i bit4 = _mm512_rorv_epi64(every_lane512<N>(signs), counts);
        index = _mm512_ternarylogic_epi32(_mm512_set1_epi8(15), index, bit4, 0xCA);
    }
    return _mm512_permutexvar_epi8(index, all_levels);
#else
    const __m512i nibble = _mm512_and_si512(index, _mm512_set1_epi8(15));
    const __m512i level = _mm512_shuffle_epi8(_mm512_broadcast_i32x4(load16_bytes(table)), nibble);
    if constexpr (Bits < 4) return level;
    const __m512i bit = for_lanes<N>([](int h) { return int64_t(each_byte << (h + 4 * R)); });
    return _mm512_mask_shuffle_epi8(level, _mm512_test_epi8_mask(every_lane512<N>(signs), bit),
                                    _mm512_broadcast_i32x4(load16_bytes(table + 16)), nibble);
#endif
}

template <int Bits, int N> TURBOQUANT_INLINE Levels<N> expand(Format<Trellis<Bits>, N>, const uint8_t * q) {
    Levels<N> out;
    if constexpr (N == 32) {
        __m256i level[1];
        expand_trellis<Bits, N>(q, level);
        out.v[0] = _mm512_castsi256_si512(level[0]);
    } else {
        const uint8_t * signs = q + N / 8 + N / 4; // only with four bits
        const __m512i index = nibbles512<Bits, N>(q);
        out.v[0] = look_up_levels512<Bits, N, 0>(index, signs);
        if constexpr (N == 128) out.v[1] = look_up_levels512<Bits, N, 1>(_mm512_srli_epi16(index, 4), signs);
    }
    return out;
}

template <int N> TURBOQUANT_INLINE void store_levels(int8_t * dst, const Levels<N> & level) {
    if constexpr (N == 32)
        _mm256_storeu_si256(reinterpret_cast<__m256i *>(dst), _mm512_castsi512_si256(level.v[0]));
    else
        for (int r = 0; r < Levels<N>::registers; ++r) _mm512_storeu_si512(dst + 64 * r, level.v[r]);
}

template <int N> TURBOQUANT_INLINE void store_scaled(float * dst, const Levels<N> & level, floats scale) {
    alignas(64) int8_t bytes_of[64 * Levels<N>::registers];
    for (int r = 0; r < Levels<N>::registers; ++r) _mm512_store_si512(bytes_of + 64 * r, level.v[r]);
    for (int i = 0; i < N; i += lanes)
        store(dst + i, mul(scale, _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(load16_bytes(bytes_of + i)))));
}

constexpr uint64_t sign_mask64(const uint8_t * signs, int r) {
    uint64_t m = 0;
    for (int i = 0; i < 8; ++i) m |= uint64_t(signs[8 * r + i]) << (8 * i);
    return m;
}

template <int N> TURBOQUANT_INLINE void hadamard(words * w);

template <int N> TURBOQUANT_INLINE void transform_levels(const Levels<N> & level, words * w) {
    for (int r = 0; r < Levels<N>::registers; ++r) {
        const bytes v = _mm512_mask_sub_epi8(level.v[r], sign_mask64(signs2, r), _mm512_setzero_si512(), level.v[r]);
        w[2 * r] = _mm512_cvtepi8_epi16(_mm512_castsi512_si256(v));
        if constexpr (N > 32) w[2 * r + 1] = _mm512_cvtepi8_epi16(_mm512_extracti64x4_epi64(v, 1));
    }
    hadamard<N>(w);
}

template <int Half> TURBOQUANT_INLINE floats floats_of(words w) {
    return _mm512_cvtepi32_ps(_mm512_cvtepi16_epi32(_mm512_extracti64x4_epi64(w, Half)));
}

template <int N> TURBOQUANT_INLINE bytes load_query(const int8_t * q) {
    return N == 32 ? _mm512_maskz_loadu_epi8(0xFFFFFFFF, q) : load_bytes(q);
}

#ifdef TURBOQUANT_VNNI
constexpr int level_offset = 128; // the instruction multiplies unsigned by signed
TURBOQUANT_INLINE bytes offset_levels(bytes level) { return _mm512_xor_si512(level, _mm512_set1_epi8(-128)); }
TURBOQUANT_INLINE ints multiply_add_levels(ints sum, bytes level, bytes q) {
    return _mm512_dpbusd_epi32(sum, level, q);
}
#else
constexpr int level_offset = 0;
TURBOQUANT_INLINE bytes offset_levels(bytes level) { return level; }

// maddubs multiplies unsigned by signed, so the sign of the level is moved to the query. The query is never -128, so
// the sum of a pair is at most 2 * 128 * 127 and fits int16.
TURBOQUANT_INLINE ints multiply_add_levels(ints sum, bytes level, bytes q) {
    const bytes moved = _mm512_mask_sub_epi8(q, _mm512_movepi8_mask(level), _mm512_setzero_si512(), q);
    const words pairs = _mm512_maddubs_epi16(_mm512_abs_epi8(level), moved);
    return _mm512_add_epi32(sum, _mm512_madd_epi16(pairs, _mm512_set1_epi16(1)));
}
#endif

// ---- the encoder of the trellis-coded types

TURBOQUANT_INLINE words min_words(words a, words b) { return _mm512_min_epi16(a, b); }
TURBOQUANT_INLINE words max_words(words a, words b) { return _mm512_max_epi16(a, b); }
TURBOQUANT_INLINE words excess(words x, words t) { return _mm512_subs_epu16(x, t); }
TURBOQUANT_INLINE words multiply_rounded(words a, words b) { return _mm512_mulhrs_epi16(a, b); }
template <int S> TURBOQUANT_INLINE words square_shifted(words x) {
    return _mm512_srli_epi16(_mm512_mullo_epi16(x, x), S);
}
TURBOQUANT_INLINE words load_words(const int8_t * p) { return _mm512_cvtepi8_epi16(load32_bytes(p)); }

// In this order no words cross lanes of 128 bits.
constexpr int fours_offset(int i) { return i / 32 * 128 + i % 8 / 2 * 32 + i % 32 / 8 * 8 + i % 2 * 4; }
TURBOQUANT_INLINE void store_fours(const words * m, int16_t * out) {
    const words low01 = _mm512_unpacklo_epi16(m[0], m[1]), high01 = _mm512_unpackhi_epi16(m[0], m[1]);
    const words low23 = _mm512_unpacklo_epi16(m[2], m[3]), high23 = _mm512_unpackhi_epi16(m[2], m[3]);
    _mm512_store_si512(out, _mm512_unpacklo_epi32(low01, low23));
    _mm512_store_si512(out + 32, _mm512_unpackhi_epi32(low01, low23));
    _mm512_store_si512(out + 64, _mm512_unpacklo_epi32(high01, high23));
    _mm512_store_si512(out + 96, _mm512_unpackhi_epi32(high01, high23));
}
TURBOQUANT_INLINE words load_four(const int16_t * p) { return _mm512_set1_epi64(eight_bytes(p)); }
TURBOQUANT_INLINE bytes word_index(words number) { // of its two bytes
    return _mm512_add_epi16(_mm512_mullo_epi16(number, _mm512_set1_epi16(0x0202)), _mm512_set1_epi16(0x0100));
}
TURBOQUANT_INLINE words look_up_word(words four, bytes index) { return _mm512_shuffle_epi8(four, index); }

using flags = __mmask32;
constexpr int state_at(int position) { return position; }
TURBOQUANT_INLINE flags greater(words a, words b) { return _mm512_cmpgt_epi16_mask(a, b); }
TURBOQUANT_INLINE void store_flags(const flags * first, const flags * last, uint64_t * out) {
    const uint32_t bits[2] = {first[0], last[0]};
    std::memcpy(out, bits, sizeof(bits));
}
TURBOQUANT_INLINE void interleave_states(const words * even, const words * odd, words * cost) {
    const words low = _mm512_unpacklo_epi16(even[0], odd[0]), high = _mm512_unpackhi_epi16(even[0], odd[0]);
    cost[0] = _mm512_permutex2var_epi64(low, _mm512_setr_epi64(0, 1, 8, 9, 2, 3, 10, 11), high);
    cost[1] = _mm512_permutex2var_epi64(low, _mm512_setr_epi64(4, 5, 12, 13, 6, 7, 14, 15), high);
}
TURBOQUANT_INLINE int least_lane(words x) {
    return least_word(_mm256_min_epi16(_mm512_castsi512_si256(x), _mm512_extracti64x4_epi64(x, 1)));
}

// ---- attention

TURBOQUANT_INLINE floats load_half(const uint8_t * p) { return _mm512_cvtph_ps(load32_bytes(p)); }

constexpr int accumulated_rows = 6;
template <int Rows> constexpr int accumulated_registers = 4;

constexpr int scored_registers = 4;
TURBOQUANT_INLINE ints all_ints(int32_t x) { return _mm512_set1_epi32(x); }
TURBOQUANT_INLINE floats to_floats(ints x) { return _mm512_cvtepi32_ps(x); }
TURBOQUANT_INLINE bytes all_four(const void * p) { return _mm512_set1_epi32(four_bytes(p)); }
TURBOQUANT_INLINE bytes load_tile(const int8_t * p) { return _mm512_load_si512(p); }

// Each register first loads 16 bytes of every fourth row; two rounds of unpacking arrange them.
TURBOQUANT_INLINE void transpose(const int8_t * src, int64_t stride, int8_t * dst) {
    __m512i row[4];
    for (int j = 0; j < 4; ++j) {
        row[j] = _mm512_castsi128_si512(load16_bytes(src + j * stride));
        row[j] = _mm512_mask_broadcast_i32x4(row[j], 0x00F0, load16_bytes(src + (j + 4) * stride));
        row[j] = _mm512_mask_broadcast_i32x4(row[j], 0x0F00, load16_bytes(src + (j + 8) * stride));
        row[j] = _mm512_mask_broadcast_i32x4(row[j], 0xF000, load16_bytes(src + (j + 12) * stride));
    }
    const __m512i low01 = _mm512_unpacklo_epi32(row[0], row[1]), high01 = _mm512_unpackhi_epi32(row[0], row[1]);
    const __m512i low23 = _mm512_unpacklo_epi32(row[2], row[3]), high23 = _mm512_unpackhi_epi32(row[2], row[3]);
    const __m512i column[4] = {_mm512_unpacklo_epi64(low01, low23), _mm512_unpackhi_epi64(low01, low23),
                               _mm512_unpacklo_epi64(high01, high23), _mm512_unpackhi_epi64(high01, high23)};
    for (int i = 0; i < 4; ++i) _mm512_store_si512(dst + i * 4 * tile_rows, offset_levels(column[i]));
}

#ifdef TURBOQUANT_VNNI
template <int Rows> constexpr int leveled_registers = 4;
TURBOQUANT_INLINE ints max_bits(ints m, floats x) { return _mm512_max_epu32(m, _mm512_castps_si512(x)); }
TURBOQUANT_INLINE floats max(floats a, floats b) { return _mm512_max_ps(a, b); }
TURBOQUANT_INLINE float reduce_max(floats x) { return _mm512_reduce_max_ps(x); }
TURBOQUANT_INLINE ints to_ints(floats x) { return _mm512_cvtps_epi32(x); }
TURBOQUANT_INLINE ints shift_byte(ints x) { return _mm512_slli_epi32(x, 8); }
TURBOQUANT_INLINE floats first(floats x, int n) {
    return _mm512_maskz_mov_ps(__mmask16(n >= lanes ? 0xFFFF : n > 0 ? (1 << n) - 1 : 0), x);
}
TURBOQUANT_INLINE ints multiply_add_weights(ints sum, bytes a, bytes b) { return _mm512_dpbusd_epi32(sum, a, b); }

TURBOQUANT_INLINE void split_bytes(const ints * x, uint8_t * high, uint8_t * low) {
    const __m512i byte = _mm512_set1_epi16(255);
    const __m512i order = _mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
    const __m512i a = _mm512_packus_epi32(x[0], x[1]), b = _mm512_packus_epi32(x[2], x[3]);
    const __m512i upper = _mm512_packus_epi16(_mm512_srli_epi16(a, 8), _mm512_srli_epi16(b, 8));
    const __m512i lower = _mm512_packus_epi16(_mm512_and_si512(a, byte), _mm512_and_si512(b, byte));
    _mm512_storeu_si512(high, _mm512_permutexvar_epi32(order, upper));
    _mm512_storeu_si512(low, _mm512_permutexvar_epi32(order, lower));
}

// As interleave32 of x86.h, for twice as many channels.
TURBOQUANT_INLINE void interleave(const int8_t * level, int64_t stride, int8_t * tile) {
    const __m512i order = _mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
    __m512i row[4];
    for (int i = 0; i < 4; ++i) row[i] = _mm512_permutexvar_epi32(order, load_bytes(level + i * stride));
    const __m512i low01 = _mm512_unpacklo_epi8(row[0], row[1]), high01 = _mm512_unpackhi_epi8(row[0], row[1]);
    const __m512i low23 = _mm512_unpacklo_epi8(row[2], row[3]), high23 = _mm512_unpackhi_epi8(row[2], row[3]);
    _mm512_storeu_si512(tile, _mm512_unpacklo_epi16(low01, low23));
    _mm512_storeu_si512(tile + 64, _mm512_unpackhi_epi16(low01, low23));
    _mm512_storeu_si512(tile + 128, _mm512_unpacklo_epi16(high01, high23));
    _mm512_storeu_si512(tile + 192, _mm512_unpackhi_epi16(high01, high23));
}
#endif

} // namespace
} // namespace turboquant

#include "generic/codec.h"
#include "generic/trellis_vector.h"
#include "generic/attention.h"
#include "generic/scores.h"
#ifdef TURBOQUANT_VNNI
#include "generic/values.h"
#endif

namespace turboquant {
namespace {

// AVX-512 multiplies by powers of two in one instruction, so its softmax does not use softmax_tile.
//
// 2^x for x <= 0; 0 for x <= -126; NaN stays NaN. The polynomial approximates 2^x on -0.5 ... 0.5 with a relative error
// below 3.4e-6.
TURBOQUANT_INLINE floats exp2_negative(__m512 x) {
    const __mmask16 counts = _mm512_cmp_ps_mask(x, _mm512_set1_ps(-126.0f), _CMP_NLE_UQ);
    const __m512 n = _mm512_roundscale_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
    const __m512 f = _mm512_sub_ps(x, n);
    __m512 p = _mm512_set1_ps(1.3333558e-3f);
    p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(9.6181291e-3f));
    p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(5.5504109e-2f));
    p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(2.4022651e-1f));
    p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(6.9314718e-1f));
    p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(1.0f));
    return _mm512_maskz_scalef_ps(counts, p, n);
}

void softmax(float * s, const float * bias, float scale, float soft_cap, SoftmaxState * state, float * most) {
    if (soft_cap != 0.0f) return softmax_tile(s, bias, scale, soft_cap, state, most);
    constexpr int registers = tile_rows / lanes;
    const __m512 hidden = _mm512_set1_ps(-INFINITY);
    __m512 x[registers];
    for (int r = 0; r < registers; ++r) {
        const __m512 b = _mm512_loadu_ps(bias + lanes * r);
        const __mmask16 open = _mm512_cmp_ps_mask(b, hidden, _CMP_NEQ_UQ); // the score of a hidden row may be NaN
        x[r] = _mm512_mask_fmadd_ps(_mm512_loadu_ps(s + lanes * r), open, _mm512_set1_ps(scale), b);
        x[r] = _mm512_mask_mov_ps(hidden, open, x[r]);
    }
    const __m512 top = _mm512_max_ps(_mm512_max_ps(x[0], x[1]), _mm512_max_ps(x[2], x[3]));
    const float before = state->largest, now = _mm512_reduce_max_ps(top);
    const float largest = now > before ? now : before;
    if (largest == -INFINITY) return softmax_tile(s, bias, scale, soft_cap, state, most); // hidden or NaN so far
    const __m512 log2e = _mm512_set1_ps(1.44269504f), offset = _mm512_set1_ps(largest);
    __m512 sum = _mm512_setzero_ps();
    for (int r = 0; r < registers; ++r) {
        const __m512 w = exp2_negative(_mm512_mul_ps(_mm512_sub_ps(x[r], offset), log2e));
        sum = _mm512_add_ps(sum, w);
        _mm512_storeu_ps(s + lanes * r, w);
        _mm512_storeu_ps(most + lanes * r, _mm512_max_ps(_mm512_loadu_ps(most + lanes * r), w));
    }
    state->correction = before == largest ? 1.0f : before == -INFINITY ? 0.0f : exp_negative(before - largest);
    state->sum = state->sum * state->correction + _mm512_reduce_add_ps(sum);
    state->largest = largest;
}

#ifndef TURBOQUANT_VNNI
constexpr decltype(Kernels::values) values = nullptr;
constexpr decltype(Kernels::accumulate_levels) accumulate_levels = nullptr;
#endif

constexpr decltype(Kernels::lowest) lowest = nullptr;

} // namespace

#if defined(TURBOQUANT_VBMI)
const Kernels kernels_avx512vbmi = TURBOQUANT_KERNELS_TABLE("avx512vbmi");
#elif defined(TURBOQUANT_VNNI)
const Kernels kernels_avx512vnni = TURBOQUANT_KERNELS_TABLE("avx512vnni");
#else
const Kernels kernels_avx512 = TURBOQUANT_KERNELS_TABLE("avx512");
#endif

} // namespace turboquant
