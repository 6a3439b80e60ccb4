// NEON for AArch64; neon_dotprod.cpp compiles this file again with sdot. The functions and their order are
// scalar.cpp's; comments here only explain the vector tricks.
#include "attention_tile.h"
#include "format.h"
#include "kernels.h"

#include <arm_neon.h>

namespace turboquant {
namespace {

constexpr int lanes = 4;

// The sign vectors as operands: float sign bits, and +-1 for int8 levels.
struct SignTables {
    alignas(16) uint32_t bits1[128] = {};
    alignas(16) uint32_t bits2[128] = {};
    alignas(16) int8_t levels2[128] = {};
    constexpr SignTables() {
        for (int i = 0; i < 128; ++i) {
            bits1[i] = sign_bit(signs1, i) ? 0x80000000u : 0u;
            bits2[i] = sign_bit(signs2, i) ? 0x80000000u : 0u;
            levels2[i] = sign_bit(signs2, i) ? -1 : 1;
        }
    }
};
constexpr SignTables sign_tables;

float32x4_t flip(float32x4_t x, const uint32_t * bits, int r) {
    return vreinterpretq_f32_u32(veorq_u32(vreinterpretq_u32_f32(x), vld1q_u32(bits + lanes * r)));
}

// The stages inside registers work on two registers at a time. Transposing ever larger units (trn1, trn2) brings the
// partners of a stage into the same lane of the two; after the last stage one de-interleave (uzp1, uzp2) restores the
// order of all of them.
void hadamard_lanes(float32x4_t & a, float32x4_t & b) { // h = 1, 2
    float32x4_t p = vtrn1q_f32(a, b), q = vtrn2q_f32(a, b);
    a = vaddq_f32(p, q);
    b = vsubq_f32(p, q);
    p = vreinterpretq_f32_f64(vtrn1q_f64(vreinterpretq_f64_f32(a), vreinterpretq_f64_f32(b)));
    q = vreinterpretq_f32_f64(vtrn2q_f64(vreinterpretq_f64_f32(a), vreinterpretq_f64_f32(b)));
    const float32x4_t sum = vaddq_f32(p, q), difference = vsubq_f32(p, q);
    a = vuzp1q_f32(sum, difference);
    b = vuzp2q_f32(sum, difference);
}

// The stages between registers; templates, so that the compiler unrolls them all.
template <int R, int H> TURBOQUANT_INLINE void across_registers(float32x4_t * y) {
    if constexpr (H < R) {
        for (int i = 0; i < R / 2; ++i) {
            const int j = i / H * 2 * H + i % H;
            const float32x4_t a = y[j], b = y[j + H];
            y[j] = vaddq_f32(a, b);
            y[j + H] = vsubq_f32(a, b);
        }
        across_registers<R, 2 * H>(y);
    }
}

template <int R> TURBOQUANT_INLINE void hadamard(float32x4_t * y) {
    for (int r = 0; r < R; r += 2) hadamard_lanes(y[r], y[r + 1]);
    across_registers<R, 1>(y);
}

// The same in 16-bit integers, 8 to a register. Exact, so the order of the stages is free.
void hadamard_lanes(int16x8_t & a, int16x8_t & b) { // h = 1, 2, 4
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

template <int R, int H> TURBOQUANT_INLINE void across_registers(int16x8_t * w) {
    if constexpr (H < R) {
        for (int i = 0; i < R / 2; ++i) {
            const int j = i / H * 2 * H + i % H;
            const int16x8_t a = w[j], b = w[j + H];
            w[j] = vaddq_s16(a, b);
            w[j + H] = vsubq_s16(a, b);
        }
        across_registers<R, 2 * H>(w);
    }
}

template <int R> TURBOQUANT_INLINE void hadamard(int16x8_t * w) {
    across_registers<R, 1>(w);
    for (int r = 0; r < R; r += 2) hadamard_lanes(w[r], w[r + 1]);
}

template <int N> TURBOQUANT_INLINE uint32_t largest_bits(const float32x4_t * x) {
    const uint32x4_t magnitude = vdupq_n_u32(0x7fffffff);
    uint32x4_t largest = vdupq_n_u32(0);
    for (int r = 0; r < N / lanes; ++r)
        largest = vmaxq_u32(largest, vandq_u32(vreinterpretq_u32_f32(x[r]), magnitude));
    return vmaxvq_u32(largest);
}

template <int N> TURBOQUANT_INLINE void load(const float * src, float32x4_t * x) {
    for (int r = 0; r < N / lanes; ++r) x[r] = vld1q_f32(src + lanes * r);
}

template <int N> TURBOQUANT_INLINE void forward(const float32x4_t * x, float scale, float32x4_t * y) {
    for (int r = 0; r < N / lanes; ++r) y[r] = flip(vmulq_n_f32(x[r], scale), sign_tables.bits1, r);
    hadamard<N / lanes>(y);
    for (int r = 0; r < N / lanes; ++r) y[r] = flip(y[r], sign_tables.bits2, r);
}

// Sixteen running sums are four registers; no fused multiply-add, which would round once less.
template <int N> float sum_of_squares(const float32x4_t * y) {
    float32x4_t sum[4];
    for (int i = 0; i < 4; ++i) sum[i] = vmulq_f32(y[i], y[i]);
    for (int r = 4; r < N / lanes; ++r) sum[r % 4] = vaddq_f32(sum[r % 4], vmulq_f32(y[r], y[r]));
    const float32x4_t l4 = vaddq_f32(vaddq_f32(sum[0], sum[2]), vaddq_f32(sum[1], sum[3]));
    const float32x2_t l2 = vadd_f32(vget_low_f32(l4), vget_high_f32(l4));
    return vget_lane_f32(l2, 0) + vget_lane_f32(l2, 1);
}

// int8 levels or indices, 16 to a register.
template <int N> struct Levels {
    static constexpr int registers = N / 16;
    int8x16_t v[registers];
};

// Shift-left-insert keeps the lower bits of its first operand, so a chain of them from the lowest part upwards packs
// without masks: what an index has above its two bits is overwritten by the next part.
template <int Bits, int N> void pack(const uint8x16_t * index, uint8_t * q) {
    constexpr int registers = N / 16;
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
            // Eight bytes of different bits add up to one byte in three pairwise additions.
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
            std::memcpy(q + Format<Bits, N>::high_offset, bytes, N / 8);
        }
    }
}

// Bytes 2r and 2r + 1 of `high` become sixteen bytes: 4 where the bit is set, else 0.
uint8x16_t spread_third_bits(uint8x16_t high, int r) {
    const uint8x16_t source = vcombine_u8(vdup_n_u8(uint8_t(2 * r)), vdup_n_u8(uint8_t(2 * r + 1)));
    const uint8x16_t place = vreinterpretq_u8_u64(vdupq_n_u64(0x8040201008040201));
    return vandq_u8(vtstq_u8(vqtbl1q_u8(high, source), place), vdupq_n_u8(4));
}

template <int Bits, int N> TURBOQUANT_INLINE Levels<N> expand(const uint8_t * q) {
    using F = Format<Bits, N>;
    constexpr int registers = Levels<N>::registers;
    const int8x16_t table = vld1q_s8(F::centroids);
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
            std::memcpy(bytes, q + F::high_offset, N / 8);
            const uint8x16_t high = vld1q_u8(bytes);
            for (int r = 0; r < registers; ++r) index[r] = vorrq_u8(index[r], spread_third_bits(high, r));
        }
    }
    Levels<N> out;
    for (int r = 0; r < registers; ++r) out.v[r] = vqtbl1q_s8(table, index[r]);
    return out;
}

template <int N> void rotate(const float * src, float * dst, int64_t blocks) {
    for (int64_t b = 0; b < blocks; ++b, src += N, dst += N) {
        float32x4_t y[N / lanes];
        load<N>(src, y);
        for (int r = 0; r < N / lanes; ++r) y[r] = flip(y[r], sign_tables.bits1, r);
        hadamard<N / lanes>(y);
        for (int r = 0; r < N / lanes; ++r)
            vst1q_f32(dst + lanes * r, vmulq_n_f32(flip(y[r], sign_tables.bits2, r), Block<N>::one_over_sqrt_n));
    }
}

template <int N> void unrotate(const float * src, float * dst, int64_t blocks) {
    for (int64_t b = 0; b < blocks; ++b, src += N, dst += N) {
        float32x4_t y[N / lanes];
        load<N>(src, y);
        for (int r = 0; r < N / lanes; ++r) y[r] = flip(y[r], sign_tables.bits2, r);
        hadamard<N / lanes>(y);
        for (int r = 0; r < N / lanes; ++r)
            vst1q_f32(dst + lanes * r, flip(vmulq_n_f32(y[r], Block<N>::one_over_sqrt_n), sign_tables.bits1, r));
    }
}

// Eight floats times `unit`, rounded to the nearest integer, ties to even.
int16x8_t round_to_words(float32x4_t a, float32x4_t b, float unit) {
    const int32x4_t low = vcvtnq_s32_f32(vmulq_n_f32(a, unit)), high = vcvtnq_s32_f32(vmulq_n_f32(b, unit));
    return vcombine_s16(vqmovn_s32(low), vqmovn_s32(high));
}

template <int N> void query(const float * src, void * dst, int64_t blocks) {
    auto * out = static_cast<typename QueryBlock<N>::type *>(dst);
    for (int64_t b = 0; b < blocks; ++b, src += N, ++out) {
        float32x4_t y[N / lanes];
        load<N>(src, y);
        const uint32_t bits = largest_bits<N>(y);
        if (bits == 0 || bits >= 0x7f800000) {
            std::memset(out, 0, sizeof(*out));
            if (bits) out->scale = NAN;
            continue;
        }
        const int k = scale_exponent(bits);
        forward<N>(y, power_of_two(-k), y);
        const float largest = bits_float(largest_bits<N>(y));
        const float inverse = 127.0f / largest;
        int32x4_t sum = vdupq_n_s32(0);
        for (int r = 0; r < N / lanes; r += 2) {
            const int16x8_t q = round_to_words(y[r], y[r + 1], inverse);
            sum = vpadalq_s16(sum, q);
            vst1_s8(out->q + lanes * r, vqmovn_s16(q));
        }
        out->sum = vaddvq_s32(sum);
        out->scale = largest * Block<N>::query_scale * power_of_two(k);
    }
}

// sum[i] += four products of int8, in some order.
int32x4_t multiply_add(int32x4_t sum, int8x16_t a, int8x16_t b) {
#if defined(TURBOQUANT_NEON_DOTPROD)
    return vdotq_s32(sum, a, b);
#else
    // Neither operand is ever -128, and two products are at most 2 * 127 * 127: inside int16.
    const int16x8_t low = vmull_s8(vget_low_s8(a), vget_low_s8(b));
    return vpadalq_s16(sum, vmlal_high_s8(low, a, b));
#endif
}

int32x4_t multiply_add(int32x4_t sum, int16x8_t a, int16x8_t b) {
    return vmlal_high_s16(vmlal_s16(sum, vget_low_s16(a), vget_low_s16(b)), a, b);
}

template <int N> struct Encoding : EncodingBase {
    static constexpr int words = N / 8;  // registers of 8 int16
    static constexpr int bytes = N / 16; // registers of 16 int8
    int16x8_t z[words], magnitude[words];
    int8x16_t coarse[bytes];
};

template <int N> void transform(const float * x, Encoding<N> & work) {
    float32x4_t y[N / lanes];
    load<N>(x, y);
    work.largest = largest_bits<N>(y);
    if (!work.codable()) return;
    work.k = scale_exponent(work.largest);
    forward<N>(y, power_of_two(-work.k), y);
    work.rms = std::sqrt(sum_of_squares<N>(y) * (1.0f / N));
    const float unit = rms_unit / work.rms;
    int32x4_t energy = vdupq_n_s32(0);
    for (int r = 0; r < work.words; ++r) {
        work.z[r] = round_to_words(y[2 * r], y[2 * r + 1], unit);
        work.magnitude[r] = vabsq_s16(work.z[r]);
        energy = multiply_add(energy, work.z[r], work.z[r]);
    }
    work.energy = vaddvq_s32(energy);
    static_assert(coarse_unit == 1 << 6, "the shift below, which rounds and saturates at 127");
    for (int r = 0; r < work.bytes; ++r)
        work.coarse[r] = vqrshrn_high_n_s16(vqrshrn_n_s16(work.magnitude[2 * r], 6), work.magnitude[2 * r + 1], 6);
}

template <int Bits, int N> void search(Encoding<N> * work, int count) {
    using F = Format<Bits, N>;
    const int8x16_t table = vld1q_s8(F::magnitudes);
    for (Encoding<N> * w = work; w < work + count; ++w) {
        if (!w->codable()) continue;
        double best = -1.0;
        for (int s = 0; s < search_steps; ++s) {
            int32x4_t a = vdupq_n_s32(0), b = a;
            for (int r = 0; r < w->bytes; ++r) {
                uint8x16_t m = vdupq_n_u8(0);
                for (int t = 0; t < F::half_levels - 1; ++t)
                    m = vsubq_u8(m, vcgtq_s8(w->coarse[r], vdupq_n_s8(F::coarse_thresholds[s][t])));
                const int8x16_t c = vqtbl1q_s8(table, m);
                a = multiply_add(a, w->coarse[r], c);
                b = multiply_add(b, c, c);
            }
            const int32_t sum_a = vaddvq_s32(a), sum_b = vaddvq_s32(b);
            const double e = explained(sum_a, sum_b);
            if (e > best) {
                w->scale = least_squares_scale(sum_a, sum_b);
                best = e;
            }
        }
    }
}

// How many thresholds each of 16 magnitudes exceeds.
template <int Thresholds> uint8x16_t count_exceeded(const int16x8_t * magnitude, const int16_t * thresholds) {
    uint16x8_t count[2];
    for (int h = 0; h < 2; ++h) {
        count[h] = vdupq_n_u16(0);
        for (int t = 0; t < Thresholds; ++t)
            count[h] = vsubq_u16(count[h], vcgtq_s16(magnitude[h], vdupq_n_s16(thresholds[t])));
    }
    return vmovn_high_u16(vmovn_u16(count[0]), count[1]);
}

int32x4_t multiply_add(int32x4_t sum, const int16x8_t * magnitude, int8x16_t c) {
    sum = multiply_add(sum, magnitude[0], vmovl_s8(vget_low_s8(c)));
    return multiply_add(sum, magnitude[1], vmovl_high_s8(c));
}

template <int Bits, int N> void assign(const Encoding<N> & work, uint8_t * dst, tq_encode_report * report) {
    using F = Format<Bits, N>;
    constexpr int M = F::half_levels;
    if (!work.codable()) {
        std::memset(dst, 0, F::bytes);
        report->nonfinite += work.largest != 0;
        return;
    }
    int16_t thresholds[M];
    thresholds_under<Bits>(work.scale, thresholds);
    const int8x16_t table = vld1q_s8(F::magnitudes);
    uint8x16_t index[work.bytes];
    int32x4_t a = vdupq_n_s32(0);
    for (int r = 0; r < work.bytes; ++r) {
        const uint8x16_t m = count_exceeded<M - 1>(work.magnitude + 2 * r, thresholds);
        a = multiply_add(a, work.magnitude + 2 * r, vqtbl1q_s8(table, m));
        const uint16x8_t negative[2] = {vcltzq_s16(work.z[2 * r]), vcltzq_s16(work.z[2 * r + 1])};
        // M - 1 - m is M + m with all its bits flipped.
        const uint8x16_t flips = vmovn_high_u16(vmovn_u16(negative[0]), negative[1]);
        index[r] = veorq_u8(vaddq_u8(m, vdupq_n_u8(M)), vandq_u8(flips, vdupq_n_u8(2 * M - 1)));
    }
    const uint16_t d = block_scale<Bits, N>(work, vaddvq_s32(a), &report->saturated);
    if (d == 0) {
        std::memset(dst, 0, F::bytes);
        return;
    }
    store16(dst, d);
    pack<Bits, N>(index, dst + 2);
}

template <int Bits, int N> void encode(const float * src, uint8_t * dst, int64_t blocks, tq_encode_report * report) {
    for (int64_t first = 0; first < blocks; first += encode_group) { // step by step, so that their latencies overlap
        const int count = int(blocks - first < encode_group ? blocks - first : encode_group);
        Encoding<N> work[encode_group];
        for (int g = 0; g < count; ++g) transform(src + (first + g) * N, work[g]);
        search<Bits>(work, count);
        for (int g = 0; g < count; ++g) assign<Bits>(work[g], dst + (first + g) * Format<Bits, N>::bytes, report);
    }
}

// Eight int16 to floats, times scale, with their S1 signs.
void store_words(float * dst, int16x8_t w, float scale, int r) {
    const float32x4_t low = vmulq_n_f32(vcvtq_f32_s32(vmovl_s16(vget_low_s16(w))), scale);
    const float32x4_t high = vmulq_n_f32(vcvtq_f32_s32(vmovl_high_s16(w)), scale);
    vst1q_f32(dst + 8 * r, flip(low, sign_tables.bits1, 2 * r));
    vst1q_f32(dst + 8 * r + 4, flip(high, sign_tables.bits1, 2 * r + 1));
}

template <int Bits, int N> void decode(const uint8_t * src, float * dst, int64_t blocks) {
    using F = Format<Bits, N>;
    constexpr int words = N / 8;
    constexpr int registers = Levels<N>::registers;
    for (int64_t block = 0; block < blocks; ++block, src += F::bytes, dst += N) {
        const float scale = load_scale(src) * F::step_n;
        Levels<N> level = expand<Bits, N>(src + 2);
        for (int r = 0; r < registers; ++r)
            level.v[r] = vmulq_s8(level.v[r], vld1q_s8(sign_tables.levels2 + 16 * r));
        // The stage h = N/2 widens to int16 on its way; the two halves that it leaves are transforms of N/2.
        int16x8_t w[words];
        for (int r = 0; r < registers / 2; ++r) {
            const int8x16_t a = level.v[r], b = level.v[r + registers / 2];
            w[2 * r] = vaddl_s8(vget_low_s8(a), vget_low_s8(b));
            w[2 * r + 1] = vaddl_high_s8(a, b);
            w[2 * r + words / 2] = vsubl_s8(vget_low_s8(a), vget_low_s8(b));
            w[2 * r + 1 + words / 2] = vsubl_high_s8(a, b);
        }
        hadamard<words / 2>(w);
        hadamard<words / 2>(w + words / 2);
        for (int r = 0; r < words; ++r) store_words(dst, w[r], scale, r);
    }
}

template <int Bits, int N> void decode_rotated(const uint8_t * src, float * dst, int64_t blocks) {
    using F = Format<Bits, N>;
    for (int64_t b = 0; b < blocks; ++b, src += F::bytes, dst += N) {
        const float scale = load_scale(src) * F::step;
        const Levels<N> level = expand<Bits, N>(src + 2);
        for (int r = 0; r < Levels<N>::registers; ++r) {
            const int16x8_t half[2] = {vmovl_s8(vget_low_s8(level.v[r])), vmovl_high_s8(level.v[r])};
            for (int h = 0; h < 2; ++h) {
                float * out = dst + 16 * r + 8 * h;
                vst1q_f32(out, vmulq_n_f32(vcvtq_f32_s32(vmovl_s16(vget_low_s16(half[h]))), scale));
                vst1q_f32(out + 4, vmulq_n_f32(vcvtq_f32_s32(vmovl_high_s16(half[h])), scale));
            }
        }
    }
}

template <int Bits, int N> float dot(const uint8_t * src, const void * query, int64_t blocks) {
    using F = Format<Bits, N>;
    auto * q = static_cast<const typename QueryBlock<N>::type *>(query);
    float sum = 0;
    for (int64_t b = 0; b < blocks; ++b, src += F::bytes, ++q) {
        const Levels<N> level = expand<Bits, N>(src + 2);
        int32x4_t product = vdupq_n_s32(0);
        for (int r = 0; r < Levels<N>::registers; ++r)
            product = multiply_add(product, level.v[r], vld1q_s8(q->q + 16 * r));
        sum += load_scale(src) * F::step * q->scale * float(vaddvq_s32(product));
    }
    return sum;
}

template <int Bits, int N> void levels(const CacheRows & rows, int64_t blocks, int8_t * level, float * scale) {
    using F = Format<Bits, N>;
    for (int r = 0; r < rows.count; ++r) {
        const uint8_t * src = rows[r];
        for (int64_t b = 0; b < blocks; ++b, src += F::bytes, level += N) {
            scale[b * tile_rows + r] = load_scale(src) * F::step;
            const Levels<N> expanded = expand<Bits, N>(src + 2);
            for (int i = 0; i < Levels<N>::registers; ++i) vst1q_s8(level + 16 * i, expanded.v[i]);
        }
    }
}

constexpr decltype(Kernels::keys) keys = nullptr;

// Compilers turn this loop into sdot or smlal.
template <int N>
void scores(const int8_t * level, const float * scale, int64_t blocks, const void * query, int rows, float * s) {
    scores_tile<N>(level, scale, blocks, query, rows, s);
}

void softmax(float * s, const float * bias, float scale, float soft_cap, SoftmaxState * state, float * most) {
    softmax_tile(s, bias, scale, soft_cap, state, most);
}

// Four query rows x 16 outputs stay in registers while all rows of V pass by.
template <int Rows>
void accumulate_block(const float * v, int count, int64_t head, const float * weights, const SoftmaxState * state,
                      float * sum, int64_t stride) {
    float32x4_t a[Rows][4];
    for (int m = 0; m < Rows; ++m)
        for (int c = 0; c < 4; ++c) a[m][c] = vmulq_n_f32(vld1q_f32(sum + m * stride + lanes * c), state[m].correction);
    for (int r = 0; r < count; ++r, v += head) {
        float32x4_t value[4];
        for (int c = 0; c < 4; ++c) value[c] = vld1q_f32(v + lanes * c);
        for (int m = 0; m < Rows; ++m)
            for (int c = 0; c < 4; ++c) a[m][c] = vfmaq_n_f32(a[m][c], value[c], weights[m * tile_rows + r]);
    }
    for (int m = 0; m < Rows; ++m)
        for (int c = 0; c < 4; ++c) vst1q_f32(sum + m * stride + lanes * c, a[m][c]);
}

void accumulate(const float * v, int count, int64_t head, const float * weights, const SoftmaxState * state, int rows,
                float * sum, int64_t stride) {
    int m = 0;
    for (; m + 4 <= rows; m += 4)
        for (int64_t c = 0; c < head; c += 16)
            accumulate_block<4>(v + c, count, head, weights + m * tile_rows, state + m, sum + m * stride + c, stride);
    for (; m < rows; ++m)
        for (int64_t c = 0; c < head; c += 16)
            accumulate_block<1>(v + c, count, head, weights + m * tile_rows, state + m, sum + m * stride + c, stride);
}

constexpr decltype(Kernels::values) values = nullptr;
constexpr decltype(Kernels::accumulate_levels) accumulate_levels = nullptr;

void load_f16(const uint8_t * src, float * dst, int64_t n) {
    for (int64_t i = 0; i < n; i += 4)
        vst1q_f32(dst + i, vcvt_f32_f16(vreinterpret_f16_u8(vld1_u8(src + 2 * i))));
}

void query_plain(const float * src, void * dst, int64_t blocks) { query_plain_tile(src, dst, blocks); }

constexpr decltype(Kernels::lowest) lowest = nullptr;

} // namespace

#if defined(TURBOQUANT_NEON_DOTPROD)
const Kernels kernels_neon_dotprod = TURBOQUANT_KERNELS_TABLE("neon_dotprod");
#else
const Kernels kernels_neon = TURBOQUANT_KERNELS_TABLE("neon");
#endif

} // namespace turboquant
