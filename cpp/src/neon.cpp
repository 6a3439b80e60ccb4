// NEON for AArch64: the primitives of generic/, and algorithms that differ for NEON. neon_dotprod.cpp compiles this
// file again with sdot.
#include "attention_tile.h"
#include "format.h"
#include "generic/signs.h"
#include "kernels.h"

#include <arm_neon.h>

namespace turboquant {
namespace {

constexpr int lanes = 4;
using floats = float32x4_t;
using ints = int32x4_t;
using words = int16x8_t;
using bytes = int8x16_t;
struct Steps {
    int32_t sum[search_steps];
};

TURBOQUANT_INLINE floats load(const float * p) { return vld1q_f32(p); }
TURBOQUANT_INLINE bytes load_bytes(const int8_t * p) { return vld1q_s8(p); }
TURBOQUANT_INLINE void store(float * p, floats x) { vst1q_f32(p, x); }
TURBOQUANT_INLINE floats all(float x) { return vdupq_n_f32(x); }
TURBOQUANT_INLINE words all_words(int x) { return vdupq_n_s16(int16_t(x)); }
TURBOQUANT_INLINE ints zero_ints() { return vdupq_n_s32(0); }

TURBOQUANT_INLINE floats add(floats a, floats b) { return vaddq_f32(a, b); }
TURBOQUANT_INLINE floats sub(floats a, floats b) { return vsubq_f32(a, b); }
TURBOQUANT_INLINE floats mul(floats a, floats b) { return vmulq_f32(a, b); }
TURBOQUANT_INLINE floats fma(floats a, floats b, floats c) { return vfmaq_f32(c, a, b); }
TURBOQUANT_INLINE words add(words a, words b) { return vaddq_s16(a, b); }
TURBOQUANT_INLINE words sub(words a, words b) { return vsubq_s16(a, b); }
TURBOQUANT_INLINE words abs_words(words x) { return vabsq_s16(x); }
TURBOQUANT_INLINE words xor_words(words a, words b) { return veorq_s16(a, b); }
TURBOQUANT_INLINE words select_negative(words z, words flags) { return vandq_s16(vshrq_n_s16(z, 15), flags); }
TURBOQUANT_INLINE words add_greater(words m, words x, words threshold) {
    return vsubq_s16(m, vreinterpretq_s16_u16(vcgtq_s16(x, threshold)));
}

TURBOQUANT_INLINE floats flip_signs(floats x, const uint32_t * bits) {
    return vreinterpretq_f32_u32(veorq_u32(vreinterpretq_u32_f32(x), vld1q_u32(bits)));
}

// The stages inside registers process two registers at a time. Transposing ever larger units (trn1, trn2) moves the
// partners of a stage to the same lane of the two registers. After the last stage one de-interleave (uzp1, uzp2)
// restores the order of all lanes.
TURBOQUANT_INLINE void butterflies(floats & a, floats & b) { // h = 1, 2
    float32x4_t p = vtrn1q_f32(a, b), q = vtrn2q_f32(a, b);
    a = vaddq_f32(p, q);
    b = vsubq_f32(p, q);
    p = vreinterpretq_f32_f64(vtrn1q_f64(vreinterpretq_f64_f32(a), vreinterpretq_f64_f32(b)));
    q = vreinterpretq_f32_f64(vtrn2q_f64(vreinterpretq_f64_f32(a), vreinterpretq_f64_f32(b)));
    const float32x4_t sum = vaddq_f32(p, q), difference = vsubq_f32(p, q);
    a = vuzp1q_f32(sum, difference);
    b = vuzp2q_f32(sum, difference);
}

template <int R> TURBOQUANT_INLINE void butterflies(floats * y) {
    for (int r = 0; r < R; r += 2) butterflies(y[r], y[r + 1]);
}

TURBOQUANT_INLINE void butterflies(words & a, words & b) { // h = 1, 2, 4
    int16x8_t p = vtrn1q_s16(a, b), q = vtrn2q_s16(a, b);
    a = vaddq_s16(p, q);
    b = vsubq_s16(p, q);
    p = vreinterpretq_s16_s32(vtrn1q_s32(vreinterpretq_s32_s16(a), vreinterpretq_s32_s16(b)));
    q = vreinterpretq_s16_s32(vtrn2q_s32(vreinterpretq_s32_s16(a), vreinterpretq_s32_s16(b)));
    a = vaddq_s16(p, q);
    b = vsubq_s16(p, q);
    p = vreinterpretq_s16_s64(vtrn1q_s64(vreinterpretq_s64_s16(a), vreinterpretq_s64_s16(b)));
    q = vreinterpretq_s16_s64(vtrn2q_s64(vreinterpretq_s64_s16(a), vreinterpretq_s64_s16(b)));
    const int16x8_t sum = vaddq_s16(p, q), difference = vsubq_s16(p, q);
    a = vuzp1q_s16(sum, difference);
    b = vuzp2q_s16(sum, difference);
}

template <int R> TURBOQUANT_INLINE void butterflies(words * w) {
    for (int r = 0; r < R; r += 2) butterflies(w[r], w[r + 1]);
}

TURBOQUANT_INLINE int32_t reduce_add(ints x) { return vaddvq_s32(x); }
TURBOQUANT_INLINE float reduce_add(floats x) {
    const float32x2_t l2 = vadd_f32(vget_low_f32(x), vget_high_f32(x));
    return vget_lane_f32(l2, 0) + vget_lane_f32(l2, 1);
}
TURBOQUANT_INLINE ints max_magnitude(ints m, floats x) {
    const uint32x4_t bits = vandq_u32(vreinterpretq_u32_f32(x), vdupq_n_u32(0x7fffffff));
    return vreinterpretq_s32_u32(vmaxq_u32(vreinterpretq_u32_s32(m), bits));
}
TURBOQUANT_INLINE uint32_t largest_lane(ints x) { return vmaxvq_u32(vreinterpretq_u32_s32(x)); }

// ---- the codec

TURBOQUANT_INLINE words round_words(floats a, floats b, floats unit) {
    const ints low = vcvtnq_s32_f32(vmulq_f32(a, unit)), high = vcvtnq_s32_f32(vmulq_f32(b, unit));
    return vcombine_s16(vqmovn_s32(low), vqmovn_s32(high));
}

constexpr int byte_registers = 2;

TURBOQUANT_INLINE ints store_rounded(const floats * y, floats factor, int8_t * q, ints sum) {
    const words x = round_words(y[0], y[1], factor);
    vst1_s8(q, vqmovn_s16(x));
    return vpadalq_s16(sum, x);
}

TURBOQUANT_INLINE ints multiply_add_words(ints sum, words a, words b) {
    return vmlal_high_s16(vmlal_s16(sum, vget_low_s16(a), vget_low_s16(b)), a, b);
}

TURBOQUANT_INLINE ints multiply_add_bytes(ints sum, bytes a, bytes b) {
#if defined(TURBOQUANT_NEON_DOTPROD)
    return vdotq_s32(sum, a, b);
#else
    // Neither operand is ever -128, so the sum of two products is at most 2 * 127 * 127 and fits int16.
    const words low = vmull_s8(vget_low_s8(a), vget_low_s8(b));
    return vpadalq_s16(sum, vmlal_high_s8(low, a, b));
#endif
}

constexpr int word_registers = 2;

TURBOQUANT_INLINE void store_coarse(const words * magnitude, int8_t * coarse) {
    static_assert(coarse_unit == 1 << 6, "the shift below, which rounds and saturates at 127");
    vst1q_s8(coarse, vqrshrn_high_n_s16(vqrshrn_n_s16(magnitude[0], 6), magnitude[1], 6));
}

TURBOQUANT_INLINE bytes load_coarse(const int8_t * coarse) { return load_bytes(coarse); }

TURBOQUANT_INLINE void store_low_bytes(const words * m, uint8_t * out) {
    vst1q_u8(out, vreinterpretq_u8_s8(vmovn_high_s16(vmovn_s16(m[0]), m[1])));
}

template <typename Family> TURBOQUANT_INLINE bytes centroids_under(int s, bytes coarse) {
    uint8x16_t m = vdupq_n_u8(0);
    for (int t = 0; t < Family::half_levels - 1; ++t)
        m = vsubq_u8(m, vcgtq_s8(coarse, vdupq_n_s8(Family::coarse_thresholds[s][t])));
    return vqtbl1q_s8(load_bytes(Family::magnitudes), m);
}

template <int Together> TURBOQUANT_INLINE void reduce_steps(const ints * v, Steps * out) {
    static_assert(search_steps == 8 && Together == 1, "two registers of sums");
    for (int h = 0; h < 8; h += 4)
        vst1q_s32(out->sum + h, vpaddq_s32(vpaddq_s32(v[h], v[h + 1]), vpaddq_s32(v[h + 2], v[h + 3])));
}

TURBOQUANT_INLINE void choose(EncodingBase & work, const Steps & a, const Steps & b) {
    work.scale = best_scale(a.sum, b.sum);
}

template <typename Family> TURBOQUANT_INLINE words look_up(words count) { // an index above 15 gives zero
    const uint8x16_t index = vreinterpretq_u8_s16(vorrq_s16(count, vdupq_n_s16(int16_t(0x8000))));
    return vreinterpretq_s16_s8(vqtbl1q_s8(load_bytes(Family::magnitudes), index));
}

// int8 levels, 16 to a register.
template <int N> struct Levels {
    static constexpr int registers = N / 16;
    bytes v[registers];
};

// Shift-left-insert keeps the lower bits of its first operand, so a chain of these instructions from the lowest part
// upwards packs without masks: the next part overwrites the bits of an index above its lower two.
template <int Bits, int N>
TURBOQUANT_INLINE void pack(Format<LloydMax<Bits>, N>, const uint8_t * index_bytes, uint8_t * q) {
    constexpr int registers = N / 16;
    uint8x16_t index[registers];
    for (int r = 0; r < registers; ++r) index[r] = vld1q_u8(index_bytes + 16 * r);
    if constexpr (Bits == 4) {
        for (int r = 0; r < registers / 2; ++r)
            vst1q_u8(q + 16 * r, vsliq_n_u8(index[r], index[r + registers / 2], 4));
    } else {
        if constexpr (N == 32) {
            uint8x8_t low = vsli_n_u8(vget_low_u8(index[0]), vget_high_u8(index[0]), 2);
            low = vsli_n_u8(low, vget_low_u8(index[1]), 4);
            vst1_u8(q, vsli_n_u8(low, vget_high_u8(index[1]), 6));
        } else {
            constexpr int quarter = registers / 4;
            for (int r = 0; r < quarter; ++r) {
                uint8x16_t low = vsliq_n_u8(index[r], index[r + quarter], 2);
                low = vsliq_n_u8(low, index[r + 2 * quarter], 4);
                vst1q_u8(q + 16 * r, vsliq_n_u8(low, index[r + 3 * quarter], 6));
            }
        }
        if constexpr (Bits == 3) {
            const uint8x16_t place = vreinterpretq_u8_u64(vdupq_n_u64(0x8040201008040201));
            uint8x16_t bit[registers];
            for (int r = 0; r < registers; ++r) bit[r] = vandq_u8(vtstq_u8(index[r], vdupq_n_u8(4)), place);
            // Three pairwise additions combine eight bytes with different bits to one byte.
            uint8_t bytes[16];
            if constexpr (N == 128) {
                const uint8x16_t low = vpaddq_u8(vpaddq_u8(bit[0], bit[1]), vpaddq_u8(bit[2], bit[3]));
                const uint8x16_t high = vpaddq_u8(vpaddq_u8(bit[4], bit[5]), vpaddq_u8(bit[6], bit[7]));
                vst1q_u8(bytes, vpaddq_u8(low, high));
            } else {
                const uint8x16_t two = vpaddq_u8(bit[0], bit[1]);
                const uint8x16_t other = N == 64 ? vpaddq_u8(bit[registers - 2], bit[registers - 1]) : two;
                const uint8x16_t four = vpaddq_u8(two, other);
                vst1q_u8(bytes, vpaddq_u8(four, four));
            }
            std::memcpy(q + high_offset<N>, bytes, N / 8);
        }
    }
}

// Expands the bits of bytes 2r and 2r + 1 of `high` to sixteen bytes: 4 if the bit is set, else 0.
TURBOQUANT_INLINE uint8x16_t spread_third_bits(uint8x16_t high, int r) {
    const uint8x16_t source = vcombine_u8(vdup_n_u8(uint8_t(2 * r)), vdup_n_u8(uint8_t(2 * r + 1)));
    const uint8x16_t place = vreinterpretq_u8_u64(vdupq_n_u64(0x8040201008040201));
    return vandq_u8(vtstq_u8(vqtbl1q_u8(high, source), place), vdupq_n_u8(4));
}

template <int Bits, int N> TURBOQUANT_INLINE Levels<N> expand(Format<LloydMax<Bits>, N>, const uint8_t * q) {
    constexpr int registers = Levels<N>::registers;
    const int8x16_t table = vld1q_s8(LloydMax<Bits>::centroids);
    uint8x16_t index[registers];
    if constexpr (Bits == 4) {
        for (int r = 0; r < registers / 2; ++r) {
            const uint8x16_t bytes = vld1q_u8(q + 16 * r);
            index[r] = vandq_u8(bytes, vdupq_n_u8(15));
            index[r + registers / 2] = vshrq_n_u8(bytes, 4);
        }
    } else {
        const uint8x16_t mask = vdupq_n_u8(3);
        if constexpr (N == 32) {
            const uint8x8_t bytes = vld1_u8(q);
            index[0] = vandq_u8(vcombine_u8(bytes, vshr_n_u8(bytes, 2)), mask);
            index[1] = vandq_u8(vcombine_u8(vshr_n_u8(bytes, 4), vshr_n_u8(bytes, 6)), mask);
        } else {
            constexpr int quarter = registers / 4;
            for (int r = 0; r < quarter; ++r) {
                const uint8x16_t bytes = vld1q_u8(q + 16 * r);
                index[r] = vandq_u8(bytes, mask);
                index[r + quarter] = vandq_u8(vshrq_n_u8(bytes, 2), mask);
                index[r + 2 * quarter] = vandq_u8(vshrq_n_u8(bytes, 4), mask);
                index[r + 3 * quarter] = vshrq_n_u8(bytes, 6);
            }
        }
        if constexpr (Bits == 3) {
            uint8_t bytes[16] = {};
            std::memcpy(bytes, q + high_offset<N>, N / 8);
            const uint8x16_t high = vld1q_u8(bytes);
            for (int r = 0; r < registers; ++r) index[r] = vorrq_u8(index[r], spread_third_bits(high, r));
        }
    }
    Levels<N> out;
    for (int r = 0; r < registers; ++r) out.v[r] = vqtbl1q_s8(table, index[r]);
    return out;
}

// The trellis-coded types. A plane has one bit of each element: bit b of byte l belongs to element b * N/8 + l. So a
// register of levels consists of 128/N lanes of N/8 bytes, and the elements of a lane have the same b. Each plane is
// copied to all lanes, and shifted down in each by the number of the lane: bit r * 128/N then belongs to register r.
static_assert(path_taps0 == (1 << 2 | 1 << 5) && path_taps1 == (1 << 0 | 1 << 1 | 1 << 6), "the shifts below");

template <int N> TURBOQUANT_INLINE uint8x16_t every_lane(const uint8_t * p) {
    if constexpr (N == 128) return vld1q_u8(p);
    if constexpr (N == 64) return vcombine_u8(vld1_u8(p), vld1_u8(p));
    uint32_t four;
    std::memcpy(&four, p, 4);
    return vreinterpretq_u8_u32(vdupq_n_u32(four));
}

template <int N> TURBOQUANT_INLINE uint8x16_t shift_lanes(uint8x16_t x) {
    const int64_t by2[2] = {0, -1};
    const int32_t by4[4] = {0, -1, -2, -3};
    if constexpr (N == 64) return vreinterpretq_u8_u64(vshlq_u64(vreinterpretq_u64_u8(x), vld1q_s64(by2)));
    if constexpr (N == 32) return vreinterpretq_u8_u32(vshlq_u32(vreinterpretq_u32_u8(x), vld1q_s32(by4)));
    return x;
}

// The path bits of K steps before, from the path's bytes and the bytes before each.
template <int K> TURBOQUANT_INLINE uint8x16_t path_before(uint8x16_t path, uint8x16_t before) {
    return vsliq_n_u8(vshrq_n_u8(before, 8 - K), path, K);
}

// The levels of register R, whose nibbles are the lower ones in `index`. With four bits, the plane with the third bits
// of the rests, which are the signs of the levels, is the fifth bit of an index.
template <int Bits, int N, int R> TURBOQUANT_INLINE int8x16_t look_up_levels(uint8x16_t index, uint8x16_t signs) {
    const int8_t * table = repeated_levels<Bits>.level;
    if constexpr (Bits < 4) return vqtbl1q_s8(vld1q_s8(table), index);
    constexpr int place = R * 128 / N;
    uint8x16_t sign = signs;
    if constexpr (place < 4) sign = vshlq_n_u8(signs, 4 - place);
    if constexpr (place > 4) sign = vshrq_n_u8(signs, place - 4);
    const int8x16x2_t all = {{vld1q_s8(table), vld1q_s8(table + 16)}};
    return vqtbl2q_s8(all, vbslq_u8(vdupq_n_u8(16), sign, index));
}

// Looks up the registers First and First + Step, which are in the nibbles of `index`.
template <int Bits, int N, int First, int Step>
TURBOQUANT_INLINE void look_up_nibbles(uint8x16_t index, uint8x16_t signs, bytes * level) {
    level[First] = look_up_levels<Bits, N, First>(vandq_u8(index, vdupq_n_u8(15)), signs);
    level[First + Step] = look_up_levels<Bits, N, First + Step>(vshrq_n_u8(index, 4), signs);
}

template <int Bits, int N> TURBOQUANT_INLINE Levels<N> expand(Format<Trellis<Bits>, N>, const uint8_t * q) {
    const uint8x16_t path = every_lane<N>(q), before = every_lane<N>(q - 1);
    const uint8x16_t c0 = shift_lanes<N>(veorq_u8(path_before<2>(path, before), path_before<5>(path, before)));
    const uint8x16_t c1 = shift_lanes<N>(
        veorq_u8(veorq_u8(path, path_before<1>(path, before)), path_before<6>(path, before)));
    const uint8_t * r = q + N / 8;
    const uint8x16_t plane = Bits == 2 ? shift_lanes<N>(every_lane<N>(r)) : c0; // of the rests
    const uint8x16_t signs = Bits == 4 ? shift_lanes<N>(every_lane<N>(r + N / 4)) : c0;
    const uint8x16_t even = vdupq_n_u8(0x55), low = vdupq_n_u8(0x33);
    const auto lower = [&](uint8x16_t subset, uint8x16_t rest) { return vbslq_u8(low, subset, vshlq_n_u8(rest, 2)); };
    const auto upper = [&](uint8x16_t subset, uint8x16_t rest) { return vbslq_u8(low, vshrq_n_u8(subset, 2), rest); };

    Levels<N> out;
    const uint8x16_t subsets = vbslq_u8(even, c0, vshlq_n_u8(c1, 1)); // crumbs, of the even bits
    uint8x16_t rests = vandq_u8(plane, even);
    if constexpr (Bits > 2 && N == 32) rests = vcombine_u8(vld1_u8(r), vshr_n_u8(vld1_u8(r), 2));
    if constexpr (Bits > 2 && N > 32) rests = vld1q_u8(r);
    if constexpr (N == 32) {
        look_up_nibbles<Bits, N, 0, 1>(lower(subsets, rests), signs, out.v);
    } else if constexpr (N == 64) {
        look_up_nibbles<Bits, N, 0, 2>(lower(subsets, rests), signs, out.v);
        look_up_nibbles<Bits, N, 1, 2>(upper(subsets, rests), signs, out.v);
    } else {
        const uint8x16_t odd_subsets = vbslq_u8(even, vshrq_n_u8(c0, 1), c1);
        uint8x16_t odd_rests = vandq_u8(vshrq_n_u8(plane, 1), even);
        if constexpr (Bits > 2) odd_rests = vld1q_u8(r + 16);
        look_up_nibbles<Bits, N, 0, 4>(lower(subsets, rests), signs, out.v);
        look_up_nibbles<Bits, N, 1, 4>(lower(odd_subsets, odd_rests), signs, out.v);
        look_up_nibbles<Bits, N, 2, 4>(upper(subsets, rests), signs, out.v);
        look_up_nibbles<Bits, N, 3, 4>(upper(odd_subsets, odd_rests), signs, out.v);
    }
    return out;
}

template <int N> TURBOQUANT_INLINE void store_levels(int8_t * dst, const Levels<N> & level) {
    for (int r = 0; r < Levels<N>::registers; ++r) vst1q_s8(dst + 16 * r, level.v[r]);
}

template <int Half> TURBOQUANT_INLINE floats floats_of(words w) {
    return vcvtq_f32_s32(Half ? vmovl_high_s16(w) : vmovl_s16(vget_low_s16(w)));
}

template <int N> TURBOQUANT_INLINE void store_scaled(float * dst, const Levels<N> & level, floats scale) {
    for (int r = 0; r < Levels<N>::registers; ++r) {
        const words half[2] = {vmovl_s8(vget_low_s8(level.v[r])), vmovl_high_s8(level.v[r])};
        for (int h = 0; h < 2; ++h) {
            store(dst + 16 * r + 8 * h, mul(floats_of<0>(half[h]), scale));
            store(dst + 16 * r + 8 * h + 4, mul(floats_of<1>(half[h]), scale));
        }
    }
}

template <int N> TURBOQUANT_INLINE void hadamard(words * w);

// The stage h = N/2 also widens to int16. Its two halves are then transformed with length N/2.
template <int N> TURBOQUANT_INLINE void transform_levels(const Levels<N> & level, words * w) {
    constexpr int registers = Levels<N>::registers, count = N / 8;
    bytes v[registers];
    for (int r = 0; r < registers; ++r) v[r] = vmulq_s8(level.v[r], vld1q_s8(sign_tables.levels2 + 16 * r));
    for (int r = 0; r < registers / 2; ++r) {
        const bytes a = v[r], b = v[r + registers / 2];
        w[2 * r] = vaddl_s8(vget_low_s8(a), vget_low_s8(b));
        w[2 * r + 1] = vaddl_high_s8(a, b);
        w[2 * r + count / 2] = vsubl_s8(vget_low_s8(a), vget_low_s8(b));
        w[2 * r + 1 + count / 2] = vsubl_high_s8(a, b);
    }
    hadamard<N / 2>(w);
    hadamard<N / 2>(w + count / 2);
}

template <int N> TURBOQUANT_INLINE bytes load_query(const int8_t * q) { return load_bytes(q); }

constexpr int level_offset = 0;
TURBOQUANT_INLINE bytes offset_levels(bytes level) { return level; }
TURBOQUANT_INLINE ints multiply_add_levels(ints sum, bytes level, bytes q) { return multiply_add_bytes(sum, level, q); }

// ---- the encoder of the trellis-coded types

TURBOQUANT_INLINE words min_words(words a, words b) { return vminq_s16(a, b); }
TURBOQUANT_INLINE words max_words(words a, words b) { return vmaxq_s16(a, b); }
TURBOQUANT_INLINE words excess(words x, words t) {
    return vreinterpretq_s16_u16(vqsubq_u16(vreinterpretq_u16_s16(x), vreinterpretq_u16_s16(t)));
}
TURBOQUANT_INLINE words multiply_rounded(words a, words b) { return vqrdmulhq_s16(a, b); }
template <int S> TURBOQUANT_INLINE words square_shifted(words x) {
    const uint16x8_t u = vreinterpretq_u16_s16(x);
    return vreinterpretq_s16_u16(vshrq_n_u16(vmulq_u16(u, u), S));
}
TURBOQUANT_INLINE words load_words(const int8_t * p) { return vmovl_s8(vld1_s8(p)); }

constexpr int fours_offset(int i) { return 4 * i; }
TURBOQUANT_INLINE void store_fours(const words * m, int16_t * out) {
    const int16x8x4_t all = {{m[0], m[1], m[2], m[3]}};
    vst4q_s16(out, all);
}
TURBOQUANT_INLINE words load_four(const int16_t * p) {
    int64_t four;
    std::memcpy(&four, p, 8);
    return vreinterpretq_s16_s64(vdupq_n_s64(four));
}
TURBOQUANT_INLINE bytes word_index(words number) { // of its two bytes
    return vreinterpretq_s8_s16(vaddq_s16(vmulq_n_s16(number, 0x0202), vdupq_n_s16(0x0100)));
}
TURBOQUANT_INLINE words look_up_word(words four, bytes index) {
    return vreinterpretq_s16_s8(vqtbl1q_s8(vreinterpretq_s8_s16(four), vreinterpretq_u8_s8(index)));
}

using flags = uint16x8_t;
constexpr int state_at(int position) { return position; }
TURBOQUANT_INLINE flags greater(words a, words b) { return vcgtq_s16(a, b); }
TURBOQUANT_INLINE void store_flags(const flags * first, const flags * last, uint64_t * out) {
    const uint8x16_t place = vreinterpretq_u8_u64(vdupq_n_u64(0x8040201008040201));
    const auto bits = [&](const flags * f) {
        return vandq_u8(vuzp1q_u8(vreinterpretq_u8_u16(f[0]), vreinterpretq_u8_u16(f[1])), place);
    };
    // Three pairwise additions combine eight bytes with different bits to one byte.
    const uint8x16_t sum = vpaddq_u8(vpaddq_u8(bits(first), bits(first + 2)), vpaddq_u8(bits(last), bits(last + 2)));
    *out = vgetq_lane_u64(vreinterpretq_u64_u8(vpaddq_u8(sum, sum)), 0);
}
TURBOQUANT_INLINE void interleave_states(const words * even, const words * odd, words * cost) {
    for (int r = 0; r < 4; ++r) {
        cost[2 * r] = vzip1q_s16(even[r], odd[r]);
        cost[2 * r + 1] = vzip2q_s16(even[r], odd[r]);
    }
}
TURBOQUANT_INLINE int least_lane(words x) { return vminvq_s16(x); }

// ---- attention

TURBOQUANT_INLINE floats load_half(const uint8_t * p) { return vcvt_f32_f16(vreinterpret_f16_u8(vld1_u8(p))); }

constexpr int accumulated_rows = 4;
template <int Rows> constexpr int accumulated_registers = 4;

} // namespace
} // namespace turboquant

#include "generic/codec.h"
#include "generic/trellis_vector.h"
#include "generic/attention.h"
#include "generic/scores_plain.h" // compilers convert its loop to sdot or smlal

namespace turboquant {
namespace {

constexpr decltype(Kernels::softmax) softmax = softmax_tile;
constexpr decltype(Kernels::values) values = nullptr;
constexpr decltype(Kernels::accumulate_levels) accumulate_levels = nullptr;
constexpr decltype(Kernels::lowest) lowest = nullptr;

} // namespace

#if defined(TURBOQUANT_NEON_DOTPROD)
const Kernels kernels_neon_dotprod = TURBOQUANT_KERNELS_TABLE("neon_dotprod");
#else
const Kernels kernels_neon = TURBOQUANT_KERNELS_TABLE("neon");
#endif

} // namespace turboquant
