// AVX-512 (F, BW, DQ, VL). avx512vnni.cpp and avx512vbmi.cpp compile this file again with more instructions.
// The functions and their order are scalar.cpp's; comments here only explain the vector tricks.
#include "attention_tile.h"
#include "format.h"
#include "kernels.h"

#include <immintrin.h>

namespace turboquant {
namespace {

constexpr int lanes = 16;

constexpr uint64_t sign_mask64(const uint8_t * signs, int r) {
    uint64_t m = 0;
    for (int i = 0; i < 8; ++i) m |= uint64_t(signs[8 * r + i]) << (8 * i);
    return m;
}

// The sign vectors as operands: float sign bits.
struct SignTables {
    alignas(64) uint32_t bits1[128] = {}, bits2[128] = {};
    constexpr SignTables() {
        for (int i = 0; i < 128; ++i) {
            bits1[i] = sign_bit(signs1, i) ? 0x80000000 : 0;
            bits2[i] = sign_bit(signs2, i) ? 0x80000000 : 0;
        }
    }
};
constexpr SignTables sign_tables;

__m512 flip(__m512 x, const uint32_t * bits, int r) {
    return _mm512_xor_ps(x, _mm512_load_ps(bits + lanes * r));
}

// +1, or -1 in the lanes whose bit h is set: those take the difference.
template <int H> __m512 difference_lanes() {
    return _mm512_mask_mov_ps(_mm512_set1_ps(1.0f), H == 1 ? 0xAAAA : H == 2 ? 0xCCCC : H == 4 ? 0xF0F0 : 0xFF00,
                              _mm512_set1_ps(-1.0f));
}

// One stage inside a register, s being each lane's partner. The product is exact, so the sum rounds as in scalar.cpp.
template <int H> __m512 butterfly(__m512 x, __m512 s) { return _mm512_fmadd_ps(x, difference_lanes<H>(), s); }

// The stages between registers; templates, so that the compiler unrolls them all and keeps y in registers.
template <int R, int H> TURBOQUANT_INLINE void across_registers(__m512 * y) {
    if constexpr (H < R) {
        for (int i = 0; i < R / 2; ++i) {
            const int j = i / H * 2 * H + i % H;
            const __m512 a = y[j], b = y[j + H];
            y[j] = _mm512_add_ps(a, b);
            y[j + H] = _mm512_sub_ps(a, b);
        }
        across_registers<R, 2 * H>(y);
    }
}

template <int R> TURBOQUANT_INLINE void hadamard(__m512 * y) {
    for (int r = 0; r < R; ++r) y[r] = butterfly<1>(y[r], _mm512_permute_ps(y[r], 0xB1));
    for (int r = 0; r < R; ++r) y[r] = butterfly<2>(y[r], _mm512_permute_ps(y[r], 0x4E));
    for (int r = 0; r < R; ++r) y[r] = butterfly<4>(y[r], _mm512_shuffle_f32x4(y[r], y[r], 0xB1));
    for (int r = 0; r < R; ++r) y[r] = butterfly<8>(y[r], _mm512_shuffle_f32x4(y[r], y[r], 0x4E));
    across_registers<R, 1>(y);
}

// The same in 16-bit integers, 32 to a register. Exact, so the order of the stages is free.
__m512i butterfly(__m512i x, __m512i s, __mmask32 upper) {
    return _mm512_mask_sub_epi16(_mm512_add_epi16(x, s), upper, s, x);
}

template <int R, int H> TURBOQUANT_INLINE void across_registers(__m512i * w) {
    if constexpr (H < R) {
        for (int i = 0; i < R / 2; ++i) {
            const int j = i / H * 2 * H + i % H;
            const __m512i a = w[j], b = w[j + H];
            w[j] = _mm512_add_epi16(a, b);
            w[j + H] = _mm512_sub_epi16(a, b);
        }
        across_registers<R, 2 * H>(w);
    }
}

template <int R> TURBOQUANT_INLINE void hadamard(__m512i * w) {
    across_registers<R, 1>(w);
    for (int r = 0; r < R; ++r) {
        w[r] = butterfly(w[r], _mm512_shuffle_i64x2(w[r], w[r], 0x4E), 0xFFFF0000);
        w[r] = butterfly(w[r], _mm512_shuffle_i64x2(w[r], w[r], 0xB1), 0xFF00FF00);
        w[r] = butterfly(w[r], _mm512_shuffle_epi32(w[r], _MM_PERM_ENUM(0x4E)), 0xF0F0F0F0);
        w[r] = butterfly(w[r], _mm512_shuffle_epi32(w[r], _MM_PERM_ENUM(0xB1)), 0xCCCCCCCC);
        w[r] = butterfly(w[r], _mm512_rol_epi32(w[r], 16), 0xAAAAAAAA);
    }
}

template <int N> TURBOQUANT_INLINE uint32_t largest_bits(const __m512 * x) {
    const __m512i magnitude = _mm512_set1_epi32(0x7fffffff);
    __m512i largest = _mm512_setzero_si512();
    for (int r = 0; r < N / lanes; ++r)
        largest = _mm512_max_epu32(largest, _mm512_and_si512(_mm512_castps_si512(x[r]), magnitude));
    return _mm512_reduce_max_epu32(largest);
}

template <int N> TURBOQUANT_INLINE void load(const float * src, __m512 * x) {
    for (int r = 0; r < N / lanes; ++r) x[r] = _mm512_loadu_ps(src + lanes * r);
}

template <int N> TURBOQUANT_INLINE void forward(const __m512 * x, float scale, __m512 * y) {
    const __m512 s = _mm512_set1_ps(scale);
    for (int r = 0; r < N / lanes; ++r) y[r] = flip(_mm512_mul_ps(x[r], s), sign_tables.bits1, r);
    hadamard<N / lanes>(y);
    for (int r = 0; r < N / lanes; ++r) y[r] = flip(y[r], sign_tables.bits2, r);
}

template <int N> float sum_of_squares(const __m512 * y) {
    __m512 lane = _mm512_mul_ps(y[0], y[0]);
    for (int r = 1; r < N / lanes; ++r) lane = _mm512_add_ps(lane, _mm512_mul_ps(y[r], y[r]));
    const __m256 l8 = _mm256_add_ps(_mm512_castps512_ps256(lane), _mm512_extractf32x8_ps(lane, 1));
    const __m128 l4 = _mm_add_ps(_mm256_castps256_ps128(l8), _mm256_extractf128_ps(l8, 1));
    const __m128 l2 = _mm_add_ps(l4, _mm_movehl_ps(l4, l4));
    return _mm_cvtss_f32(_mm_add_ss(l2, _mm_movehdup_ps(l2)));
}

template <int Bits, int N> void pack(const uint8_t * index, uint8_t * q) {
    if constexpr (Bits == 4) {
        constexpr int half = N / 2;
        for (int j = 0; j < half; j += 16) {
            const __m128i low = _mm_loadu_si128(reinterpret_cast<const __m128i *>(index + j));
            const __m128i high = _mm_loadu_si128(reinterpret_cast<const __m128i *>(index + half + j));
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
                const __m256i v = _mm256_loadu_si256(reinterpret_cast<const __m256i *>(index + i));
                const uint32_t high = _mm256_test_epi8_mask(v, _mm256_set1_epi8(4));
                std::memcpy(q + Format<Bits, N>::high_offset + i / 8, &high, 4);
            }
    }
}

// int8 levels, 64 to a register; a block of 32 fills the lower half and leaves the upper half undefined.
template <int N> struct Levels {
    static constexpr int registers = N == 128 ? 2 : 1;
    __m512i v[registers];
};

// The index bytes are copied to every part of the register that they serve and shifted by a different amount in each.
template <int Bits, int N> TURBOQUANT_INLINE Levels<N> expand(const uint8_t * q) {
    const __m128i * p = reinterpret_cast<const __m128i *>(q);
    const __m512i table =
        _mm512_broadcast_i32x4(_mm_loadu_si128(reinterpret_cast<const __m128i *>(Format<Bits, N>::centroids)));
    Levels<N> out;
    __m512i index[Levels<N>::registers];
    if constexpr (Bits == 4) {
        const __m512i mask = _mm512_set1_epi8(15);
        if constexpr (N == 128) {
            const __m512i bytes = _mm512_loadu_si512(q);
            index[0] = _mm512_and_si512(bytes, mask);
            index[1] = _mm512_and_si512(_mm512_srli_epi16(bytes, 4), mask);
        } else if constexpr (N == 64) {
            const __m512i bytes = _mm512_broadcast_i64x4(_mm256_loadu_si256(reinterpret_cast<const __m256i *>(q)));
            const __m512i shift = _mm512_inserti64x4(_mm512_setzero_si512(), _mm256_set1_epi16(4), 1);
            index[0] = _mm512_and_si512(_mm512_srlv_epi16(bytes, shift), mask);
        } else {
            const __m512i bytes = _mm512_broadcast_i32x4(_mm_loadu_si128(p));
            const __m512i shift = _mm512_set_epi64(0, 0, 0, 0, 0x0004000400040004, 0x0004000400040004, 0, 0);
            index[0] = _mm512_and_si512(_mm512_srlv_epi16(bytes, shift), mask);
        }
    } else {
        const __m512i mask = _mm512_set1_epi8(3);
        if constexpr (N == 128) {
            const __m512i bytes = _mm512_broadcast_i64x4(_mm256_loadu_si256(reinterpret_cast<const __m256i *>(q)));
            const __m512i shift = _mm512_inserti64x4(_mm512_setzero_si512(), _mm256_set1_epi16(2), 1);
            index[0] = _mm512_and_si512(_mm512_srlv_epi16(bytes, shift), mask);
            index[1] = _mm512_and_si512(_mm512_srlv_epi16(_mm512_srli_epi16(bytes, 4), shift), mask);
        } else if constexpr (N == 64) {
            const __m512i bytes = _mm512_broadcast_i32x4(_mm_loadu_si128(p));
            const __m512i shift = _mm512_set_epi64(0x0006000600060006, 0x0006000600060006, 0x0004000400040004,
                                                   0x0004000400040004, 0x0002000200020002, 0x0002000200020002, 0, 0);
            index[0] = _mm512_and_si512(_mm512_srlv_epi16(bytes, shift), mask);
        } else {
            const __m512i bytes = _mm512_broadcastq_epi64(_mm_loadl_epi64(p));
            const __m512i shift =
                _mm512_set_epi64(0, 0, 0, 0, 0x0006000600060006, 0x0004000400040004, 0x0002000200020002, 0);
            index[0] = _mm512_and_si512(_mm512_srlv_epi16(bytes, shift), mask);
        }
        if constexpr (Bits == 3)
            for (int r = 0; r < Levels<N>::registers; ++r) {
                uint64_t high = 0; // the third bits are a lane mask as they are
                std::memcpy(&high, q + Format<Bits, N>::high_offset + 8 * r, N == 32 ? 4 : 8);
                index[r] = _mm512_mask_add_epi8(index[r], high, index[r], _mm512_set1_epi8(4));
            }
    }
    for (int r = 0; r < Levels<N>::registers; ++r) out.v[r] = _mm512_shuffle_epi8(table, index[r]);
    return out;
}

template <int N> void rotate(const float * src, float * dst, int64_t blocks) {
    const __m512 norm = _mm512_set1_ps(Block<N>::one_over_sqrt_n);
    for (int64_t b = 0; b < blocks; ++b, src += N, dst += N) {
        __m512 y[N / lanes];
        load<N>(src, y);
        for (int r = 0; r < N / lanes; ++r) y[r] = flip(y[r], sign_tables.bits1, r);
        hadamard<N / lanes>(y);
        for (int r = 0; r < N / lanes; ++r)
            _mm512_storeu_ps(dst + lanes * r, _mm512_mul_ps(flip(y[r], sign_tables.bits2, r), norm));
    }
}

template <int N> void unrotate(const float * src, float * dst, int64_t blocks) {
    const __m512 norm = _mm512_set1_ps(Block<N>::one_over_sqrt_n);
    for (int64_t b = 0; b < blocks; ++b, src += N, dst += N) {
        __m512 y[N / lanes];
        load<N>(src, y);
        for (int r = 0; r < N / lanes; ++r) y[r] = flip(y[r], sign_tables.bits2, r);
        hadamard<N / lanes>(y);
        for (int r = 0; r < N / lanes; ++r)
            _mm512_storeu_ps(dst + lanes * r, flip(_mm512_mul_ps(y[r], norm), sign_tables.bits1, r));
    }
}

template <int N> void query(const float * src, void * dst, int64_t blocks) {
    auto * out = static_cast<typename QueryBlock<N>::type *>(dst);
    for (int64_t b = 0; b < blocks; ++b, src += N, ++out) {
        __m512 y[N / lanes];
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
        const __m512 inverse = _mm512_set1_ps(127.0f / largest);
        __m512i sum = _mm512_setzero_si512();
        for (int r = 0; r < N / lanes; ++r) {
            const __m512i q = _mm512_cvtps_epi32(_mm512_mul_ps(y[r], inverse));
            sum = _mm512_add_epi32(sum, q);
            _mm_storeu_si128(reinterpret_cast<__m128i *>(out->q + lanes * r), _mm512_cvtepi32_epi8(q));
        }
        out->sum = _mm512_reduce_add_epi32(sum);
        out->scale = largest * Block<N>::query_scale * power_of_two(k);
    }
}

__m512i multiply_add16(__m512i sum, __m512i a, __m512i b) { // products of int16 pairs into int32
#ifdef TURBOQUANT_VNNI
    return _mm512_dpwssd_epi32(sum, a, b);
#else
    return _mm512_add_epi32(sum, _mm512_madd_epi16(a, b));
#endif
}

__m512i multiply_add8(__m512i sum, __m512i a, __m512i b) { // 0 <= a, b <= 127: pairs stay inside int16
#ifdef TURBOQUANT_VNNI
    return _mm512_dpbusd_epi32(sum, a, b);
#else
    return _mm512_add_epi32(sum, _mm512_madd_epi16(_mm512_maddubs_epi16(a, b), _mm512_set1_epi16(1)));
#endif
}

// Each 128-bit lane: the four sums of that lane of v[0 ... 3].
__m512i reduce_add4(const __m512i * v) {
    const __m512i low = _mm512_add_epi32(_mm512_unpacklo_epi32(v[0], v[1]), _mm512_unpackhi_epi32(v[0], v[1]));
    const __m512i high = _mm512_add_epi32(_mm512_unpacklo_epi32(v[2], v[3]), _mm512_unpackhi_epi32(v[2], v[3]));
    return _mm512_add_epi32(_mm512_unpacklo_epi64(low, high), _mm512_unpackhi_epi64(low, high));
}

// The sums of the lower halves of eight registers, then those of the upper halves.
__m512i reduce_add_halves(const __m512i * v) {
    const __m512i low = reduce_add4(v), high = reduce_add4(v + 4);
    const __m512i sum = _mm512_add_epi32(_mm512_shuffle_i32x4(low, high, 0x88), _mm512_shuffle_i32x4(low, high, 0xDD));
    return _mm512_shuffle_i32x4(sum, sum, 0xD8);
}

#ifdef TURBOQUANT_VBMI
// The centroid of every coarse magnitude, for each step of the search.
template <int Bits> struct CoarseTable {
    struct Rows {
        alignas(64) int8_t row[search_steps][128];
        constexpr Rows() : row() {
            for (int s = 0; s < search_steps; ++s)
                for (int r = 0, t = 0; r < 128; ++r) {
                    while (t < (1 << (Bits - 1)) - 1 && r > Codebook<Bits>::coarse_thresholds[s][t]) ++t;
                    row[s][r] = Codebook<Bits>::magnitudes[t];
                }
        }
    };
    static constexpr Rows rows{};
};
#endif

template <int N> struct Encoding : EncodingBase {
    static constexpr int words = N / 32; // registers of 32 int16
    __m512i z[words], magnitude[words];
    __m256i coarse[words];
};

template <int N> void transform(const float * x, Encoding<N> & work) {
    __m512 y[N / lanes];
    load<N>(x, y);
    work.largest = largest_bits<N>(y);
    if (!work.codable()) {
        for (int r = 0; r < work.words; ++r) work.coarse[r] = _mm256_setzero_si256(); // a neighbour is searched with it
        return;
    }
    work.k = scale_exponent(work.largest);
    forward<N>(y, power_of_two(-work.k), y);
    work.rms = std::sqrt(sum_of_squares<N>(y) * (1.0f / N));
    const __m512 unit = _mm512_set1_ps(rms_unit / work.rms);
    __m512i energy = _mm512_setzero_si512();
    static_assert(coarse_unit == 1 << 6, "the shift below");
    for (int r = 0; r < work.words; ++r) {
        const __m256i low = _mm512_cvtepi32_epi16(_mm512_cvtps_epi32(_mm512_mul_ps(y[2 * r], unit)));
        const __m256i high = _mm512_cvtepi32_epi16(_mm512_cvtps_epi32(_mm512_mul_ps(y[2 * r + 1], unit)));
        work.z[r] = _mm512_inserti64x4(_mm512_castsi256_si512(low), high, 1);
        work.magnitude[r] = _mm512_abs_epi16(work.z[r]);
        energy = multiply_add16(energy, work.z[r], work.z[r]);
        const __m512i rounded = _mm512_add_epi16(work.magnitude[r], _mm512_set1_epi16(coarse_unit / 2));
        work.coarse[r] = _mm512_cvtsepi16_epi8(_mm512_srli_epi16(rounded, 6)); // saturates at 127
    }
    work.energy = _mm512_reduce_add_epi32(energy);
}

// The centroids of 64 coarse magnitudes under step s of the search.
template <int Bits> __m512i centroids_under(int s, __m512i coarse) {
#ifdef TURBOQUANT_VBMI
    const int8_t * table = CoarseTable<Bits>::rows.row[s];
    return _mm512_permutex2var_epi8(_mm512_load_si512(table), coarse, _mm512_load_si512(table + 64));
#else
    using C = Codebook<Bits>;
    __m512i c = _mm512_set1_epi8(C::magnitudes[0]);
    for (int t = 0; t < (1 << (Bits - 1)) - 1; ++t) // thresholds ascend, so the last one exceeded decides
        c = _mm512_mask_mov_epi8(c, _mm512_cmpgt_epi8_mask(coarse, _mm512_set1_epi8(C::coarse_thresholds[s][t])),
                                 _mm512_set1_epi8(C::magnitudes[t + 1]));
    return c;
#endif
}

// Keep the step that explains most. a, b: its sums, one lane for each step.
void choose(EncodingBase & work, __m256i a, __m256i b) {
    const __m512d wide = _mm512_cvtepi32_pd(a);
    const __m512d e = _mm512_div_pd(_mm512_mul_pd(wide, wide), _mm512_cvtepi32_pd(b));
    const int best = __builtin_ctz(_mm512_cmpeq_pd_mask(e, _mm512_set1_pd(_mm512_reduce_max_pd(e))));
    alignas(32) int32_t a8[8], b8[8];
    _mm256_store_si256(reinterpret_cast<__m256i *>(a8), a);
    _mm256_store_si256(reinterpret_cast<__m256i *>(b8), b);
    work.scale = least_squares_scale(a8[best], b8[best]);
}

template <int Bits, int N> void search(Encoding<N> * work, int count) {
    static_assert(search_steps == 8, "one lane for each step");
    constexpr int together = N == 32 ? 2 : 1; // blocks that fill a register of bytes
    for (Encoding<N> * w = work; w < work + count; w += together) {
        Levels<N> coarse;
        if constexpr (N == 32) {
            const bool second = w + 1 < work + count;
            coarse.v[0] = _mm512_inserti64x4(_mm512_castsi256_si512(w->coarse[0]),
                                             second ? w[1].coarse[0] : _mm256_setzero_si256(), 1);
        } else
            for (int r = 0; r < Levels<N>::registers; ++r)
                coarse.v[r] = _mm512_inserti64x4(_mm512_castsi256_si512(w->coarse[2 * r]), w->coarse[2 * r + 1], 1);
        __m512i as[search_steps], bs[search_steps];
        for (int s = 0; s < search_steps; ++s) {
            as[s] = bs[s] = _mm512_setzero_si512();
            for (int r = 0; r < Levels<N>::registers; ++r) {
                const __m512i c = centroids_under<Bits>(s, coarse.v[r]);
                as[s] = multiply_add8(as[s], coarse.v[r], c);
                bs[s] = multiply_add8(bs[s], c, c);
            }
        }
        const __m512i a = reduce_add_halves(as), b = reduce_add_halves(bs);
        const __m256i a0 = _mm512_castsi512_si256(a), a1 = _mm512_extracti64x4_epi64(a, 1);
        const __m256i b0 = _mm512_castsi512_si256(b), b1 = _mm512_extracti64x4_epi64(b, 1);
        if constexpr (N == 32) {
            if (w->codable()) choose(*w, a0, b0);
            if (w + 1 < work + count && w[1].codable()) choose(w[1], a1, b1);
        } else if (w->codable())
            choose(*w, _mm256_add_epi32(a0, a1), _mm256_add_epi32(b0, b1));
    }
}

// How many thresholds each magnitude exceeds.
template <int Thresholds> __m512i count_exceeded(__m512i magnitude, const int16_t * thresholds) {
    __m512i m = _mm512_setzero_si512();
    for (int t = 0; t < Thresholds; ++t)
        m = _mm512_mask_add_epi16(m, _mm512_cmpgt_epi16_mask(magnitude, _mm512_set1_epi16(thresholds[t])), m,
                                  _mm512_set1_epi16(1));
    return m;
}

// Centroids by count: into the low byte of each word.
template <int Bits> __m512i look_up(__m512i m) {
    const __m128i table = _mm_loadu_si128(reinterpret_cast<const __m128i *>(Codebook<Bits>::magnitudes));
    return _mm512_maskz_shuffle_epi8(0x5555555555555555, _mm512_broadcast_i32x4(table), m);
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
    __m512i a = _mm512_setzero_si512();
    alignas(64) uint8_t index[N];
    for (int r = 0; r < work.words; ++r) {
        __m512i m = count_exceeded<M - 1>(work.magnitude[r], thresholds);
        a = multiply_add16(a, work.magnitude[r], look_up<Bits>(m));
        // M - 1 - m is M + m with all its bits flipped
        m = _mm512_xor_si512(_mm512_add_epi16(m, _mm512_set1_epi16(M)),
                             _mm512_and_si512(_mm512_srai_epi16(work.z[r], 15), _mm512_set1_epi16(2 * M - 1)));
        _mm256_store_si256(reinterpret_cast<__m256i *>(index + 32 * r), _mm512_cvtepi16_epi8(m));
    }
    const uint16_t d = block_scale<Bits, N>(work, _mm512_reduce_add_epi32(a), &report->saturated);
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

template <int Bits, int N> void decode(const uint8_t * src, float * dst, int64_t blocks) {
    using F = Format<Bits, N>;
    constexpr int words = N / 32;
    for (int64_t b = 0; b < blocks; ++b, src += F::bytes, dst += N) {
        const __m512 scale = _mm512_set1_ps(load_scale(src) * F::step_n);
        Levels<N> level = expand<Bits, N>(src + 2);
        __m512i w[words];
        for (int r = 0; r < Levels<N>::registers; ++r) {
            const __m512i v =
                _mm512_mask_sub_epi8(level.v[r], sign_mask64(signs2, r), _mm512_setzero_si512(), level.v[r]);
            w[2 * r] = _mm512_cvtepi8_epi16(_mm512_castsi512_si256(v));
            if constexpr (N > 32) w[2 * r + 1] = _mm512_cvtepi8_epi16(_mm512_extracti64x4_epi64(v, 1));
        }
        hadamard<words>(w);
        for (int r = 0; r < words; ++r) {
            const __m512 low = _mm512_cvtepi32_ps(_mm512_cvtepi16_epi32(_mm512_castsi512_si256(w[r])));
            const __m512 high = _mm512_cvtepi32_ps(_mm512_cvtepi16_epi32(_mm512_extracti64x4_epi64(w[r], 1)));
            _mm512_storeu_ps(dst + 32 * r, flip(_mm512_mul_ps(scale, low), sign_tables.bits1, 2 * r));
            _mm512_storeu_ps(dst + 32 * r + 16, flip(_mm512_mul_ps(scale, high), sign_tables.bits1, 2 * r + 1));
        }
    }
}

template <int Bits, int N> void decode_rotated(const uint8_t * src, float * dst, int64_t blocks) {
    using F = Format<Bits, N>;
    for (int64_t b = 0; b < blocks; ++b, src += F::bytes, dst += N) {
        const __m512 scale = _mm512_set1_ps(load_scale(src) * F::step);
        const Levels<N> level = expand<Bits, N>(src + 2);
        alignas(64) int8_t bytes[64 * Levels<N>::registers];
        for (int r = 0; r < Levels<N>::registers; ++r) _mm512_store_si512(bytes + 64 * r, level.v[r]);
        for (int r = 0; r < N / lanes; ++r) {
            const __m128i v = _mm_load_si128(reinterpret_cast<const __m128i *>(bytes + lanes * r));
            _mm512_storeu_ps(dst + lanes * r, _mm512_mul_ps(scale, _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(v))));
        }
    }
}

// Sums over four bytes. VNNI multiplies unsigned by signed, so the level is offset by 128 and 128 times the query's sum
// is taken off again; without VNNI the level's sign moves to the query (neither is ever -128).
template <int N> int32_t dot_levels(const Levels<N> & level, const typename QueryBlock<N>::type * q) {
    __m512i sum = _mm512_setzero_si512();
    for (int r = 0; r < Levels<N>::registers; ++r) {
        const __m512i values = N == 32 ? _mm512_maskz_loadu_epi8(0xFFFFFFFF, q->q) : _mm512_loadu_si512(q->q + 64 * r);
#ifdef TURBOQUANT_VNNI
        sum = _mm512_dpbusd_epi32(sum, _mm512_xor_si512(level.v[r], _mm512_set1_epi8(-128)), values);
#else
        const __m512i moved = _mm512_mask_sub_epi8(values, _mm512_movepi8_mask(level.v[r]), _mm512_setzero_si512(),
                                                   values);
        const __m512i pairs = _mm512_maddubs_epi16(_mm512_abs_epi8(level.v[r]), moved);
        sum = _mm512_add_epi32(sum, _mm512_madd_epi16(pairs, _mm512_set1_epi16(1)));
#endif
    }
#ifdef TURBOQUANT_VNNI
    return _mm512_reduce_add_epi32(sum) - 128 * q->sum;
#else
    return _mm512_reduce_add_epi32(sum);
#endif
}

template <int Bits, int N> float dot(const uint8_t * src, const void * query, int64_t blocks) {
    using F = Format<Bits, N>;
    auto * q = static_cast<const typename QueryBlock<N>::type *>(query);
    float sum = 0;
    for (int64_t b = 0; b < blocks; ++b, src += F::bytes, ++q)
        sum += load_scale(src) * F::step * q->scale * float(dot_levels<N>(expand<Bits, N>(src + 2), q));
    return sum;
}

template <int Bits, int N> void levels(const CacheRows & rows, int64_t blocks, int8_t * level, float * scale) {
    using F = Format<Bits, N>;
    for (int r = 0; r < rows.count; ++r) {
        const uint8_t * src = rows[r];
        for (int64_t b = 0; b < blocks; ++b, src += F::bytes, level += N) {
            scale[b * tile_rows + r] = load_scale(src) * F::step;
            const Levels<N> expanded = expand<Bits, N>(src + 2);
            if constexpr (N == 32)
                _mm256_storeu_si256(reinterpret_cast<__m256i *>(level), _mm512_castsi512_si256(expanded.v[0]));
            else
                for (int i = 0; i < Levels<N>::registers; ++i) _mm512_storeu_si512(level + 64 * i, expanded.v[i]);
        }
    }
}

// ---- attention: a lane of 32 bits holds four channels of one KV row (K) or one channel of four KV rows (V), so that
// the dot-product instruction leaves nothing to add across lanes.

// 16 rows of 16 dwords, `stride` bytes apart, to columns of 16 rows, 64 rows apart. A register first takes the same
// 16 bytes of every fourth row; two rounds of unpacking put them in order.
void transpose16(const int8_t * src, int64_t stride, int8_t * dst) {
    for (int part = 0; part < 4; ++part) {
        const auto load = [&](int r) {
            return _mm_loadu_si128(reinterpret_cast<const __m128i *>(src + r * stride + 16 * part));
        };
        __m512i row[4];
        for (int j = 0; j < 4; ++j) {
            row[j] = _mm512_castsi128_si512(load(j));
            row[j] = _mm512_mask_broadcast_i32x4(row[j], 0x00F0, load(j + 4));
            row[j] = _mm512_mask_broadcast_i32x4(row[j], 0x0F00, load(j + 8));
            row[j] = _mm512_mask_broadcast_i32x4(row[j], 0xF000, load(j + 12));
        }
        const __m512i low01 = _mm512_unpacklo_epi32(row[0], row[1]), high01 = _mm512_unpackhi_epi32(row[0], row[1]);
        const __m512i low23 = _mm512_unpacklo_epi32(row[2], row[3]), high23 = _mm512_unpackhi_epi32(row[2], row[3]);
        const __m512i column[4] = {_mm512_unpacklo_epi64(low01, low23), _mm512_unpackhi_epi64(low01, low23),
                                   _mm512_unpacklo_epi64(high01, high23), _mm512_unpackhi_epi64(high01, high23)};
#ifdef TURBOQUANT_VNNI // multiplies unsigned by signed: levels are offset by 128
        const __m512i offset = _mm512_set1_epi8(-128);
#else
        const __m512i offset = _mm512_setzero_si512();
#endif
        for (int i = 0; i < 4; ++i)
            _mm512_store_si512(dst + (4 * part + i) * 4 * tile_rows, _mm512_xor_si512(column[i], offset));
    }
}

// tile: [head / 4][tile_rows] dwords. The last half of a head of 32 * odd values reads and writes 32 bytes too many.
void keys(const int8_t * level, int64_t head, int8_t * tile) {
    for (int r = 0; r < tile_rows; r += 16)
        for (int64_t c = 0; c < head; c += 64) transpose16(level + r * head + c, head, tile + c * tile_rows + 4 * r);
}

// The four bytes of a query at p, in every lane.
__m512i broadcast4(const void * p) {
    int32_t four;
    std::memcpy(&four, p, 4);
    return _mm512_set1_epi32(four);
}

// s[m] (+)= the products of Rows queries with 16 * Registers rows of K over one block.
template <int N, int Rows, int Registers>
void scores_block(const int8_t * tile, const float * scale, const typename QueryBlock<N>::type * q, int64_t q_stride,
                  bool add, float * s) {
    __m512i sum[Rows][Registers];
    for (int m = 0; m < Rows; ++m)
        for (int j = 0; j < Registers; ++j)
#ifdef TURBOQUANT_VNNI
            sum[m][j] = _mm512_set1_epi32(-128 * q[m * q_stride].sum);
#else
            sum[m][j] = _mm512_setzero_si512();
#endif
    for (int c = 0; c < N; c += 4, tile += 4 * tile_rows) {
        __m512i k[Registers];
        for (int j = 0; j < Registers; ++j) k[j] = _mm512_load_si512(tile + 64 * j);
#ifdef TURBOQUANT_VNNI
        for (int m = 0; m < Rows; ++m) {
            const __m512i values = broadcast4(q[m * q_stride].q + c);
            for (int j = 0; j < Registers; ++j) sum[m][j] = _mm512_dpbusd_epi32(sum[m][j], k[j], values);
        }
#else // the level's sign moves to the query (neither is ever -128), so that pairs stay inside int16
        for (int j = 0; j < Registers; ++j) {
            const __mmask64 negative = _mm512_movepi8_mask(k[j]);
            const __m512i magnitude = _mm512_abs_epi8(k[j]);
            for (int m = 0; m < Rows; ++m) {
                const __m512i values = broadcast4(q[m * q_stride].q + c);
                const __m512i moved = _mm512_mask_sub_epi8(values, negative, _mm512_setzero_si512(), values);
                const __m512i pairs = _mm512_maddubs_epi16(magnitude, moved);
                sum[m][j] = _mm512_add_epi32(sum[m][j], _mm512_madd_epi16(pairs, _mm512_set1_epi16(1)));
            }
        }
#endif
    }
    for (int j = 0; j < Registers; ++j) {
        const __m512 scales = _mm512_loadu_ps(scale + lanes * j);
        for (int m = 0; m < Rows; ++m) {
            float * out = s + m * tile_rows + lanes * j;
            const __m512 product = _mm512_mul_ps(_mm512_cvtepi32_ps(sum[m][j]), _mm512_set1_ps(q[m * q_stride].scale));
            _mm512_storeu_ps(out, add ? _mm512_fmadd_ps(product, scales, _mm512_loadu_ps(out))
                                      : _mm512_mul_ps(product, scales));
        }
    }
}

template <int N>
void scores(const int8_t * tile, const float * scale, int64_t blocks, const void * query, int rows, float * s) {
    auto * q = static_cast<const typename QueryBlock<N>::type *>(query);
    int m = 0;
    for (; m + 4 <= rows; m += 4)
        for (int64_t b = 0; b < blocks; ++b)
            scores_block<N, 4, 4>(tile + b * N * tile_rows, scale + b * tile_rows, q + m * blocks + b, blocks, b > 0,
                                  s + m * tile_rows);
    for (; m < rows; ++m)
        for (int64_t b = 0; b < blocks; ++b)
            scores_block<N, 1, 4>(tile + b * N * tile_rows, scale + b * tile_rows, q + m * blocks + b, blocks, b > 0,
                                  s + m * tile_rows);
}

// 2^x; 0 from -126 down; NaN stays NaN. The polynomial is 2^x's on -0.5 ... 0.5, relative error below 3.4e-6.
__m512 exp2_negative(__m512 x) {
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
        const __mmask16 open = _mm512_cmp_ps_mask(b, hidden, _CMP_NEQ_UQ); // what is hidden may even be a NaN
        x[r] = _mm512_mask_fmadd_ps(_mm512_loadu_ps(s + lanes * r), open, _mm512_set1_ps(scale), b);
        x[r] = _mm512_mask_mov_ps(hidden, open, x[r]);
    }
    const __m512 top = _mm512_max_ps(_mm512_max_ps(x[0], x[1]), _mm512_max_ps(x[2], x[3]));
    const float before = state->largest, now = _mm512_reduce_max_ps(top);
    const float largest = now > before ? now : before;
    if (largest == -INFINITY) return softmax_tile(s, bias, scale, soft_cap, state, most); // hidden so far, or NaN
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

// Rows x 16 * Registers outputs stay in registers while all rows of V pass by.
template <int Rows, int Registers>
void accumulate_block(const float * v, int count, int64_t head, const float * weights, const SoftmaxState * state,
                      float * sum, int64_t stride) {
    __m512 a[Rows][Registers];
    for (int m = 0; m < Rows; ++m)
        for (int c = 0; c < Registers; ++c)
            a[m][c] = _mm512_mul_ps(_mm512_set1_ps(state[m].correction), _mm512_loadu_ps(sum + m * stride + lanes * c));
    for (int r = 0; r < count; ++r, v += head) {
        __m512 value[Registers];
        for (int c = 0; c < Registers; ++c) value[c] = _mm512_loadu_ps(v + lanes * c);
        for (int m = 0; m < Rows; ++m) {
            const __m512 weight = _mm512_set1_ps(weights[m * tile_rows + r]);
            for (int c = 0; c < Registers; ++c) a[m][c] = _mm512_fmadd_ps(weight, value[c], a[m][c]);
        }
    }
    for (int m = 0; m < Rows; ++m)
        for (int c = 0; c < Registers; ++c) _mm512_storeu_ps(sum + m * stride + lanes * c, a[m][c]);
}

template <int Rows>
void accumulate_rows(const float * v, int count, int64_t head, const float * weights, const SoftmaxState * state,
                     float * sum, int64_t stride) {
    int64_t c = 0;
    for (; c + 4 * lanes <= head; c += 4 * lanes)
        accumulate_block<Rows, 4>(v + c, count, head, weights, state, sum + c, stride);
    for (; c < head; c += 2 * lanes)
        accumulate_block<Rows, 2>(v + c, count, head, weights, state, sum + c, stride);
}

void accumulate(const float * v, int count, int64_t head, const float * weights, const SoftmaxState * state, int rows,
                float * sum, int64_t stride) {
    int m = 0;
    for (; m + 6 <= rows; m += 6)
        accumulate_rows<6>(v, count, head, weights + m * tile_rows, state + m, sum + m * stride, stride);
    for (; m + 4 <= rows; m += 4)
        accumulate_rows<4>(v, count, head, weights + m * tile_rows, state + m, sum + m * stride, stride);
    for (; m < rows; ++m)
        accumulate_rows<1>(v, count, head, weights + m * tile_rows, state + m, sum + m * stride, stride);
}

#ifdef TURBOQUANT_VNNI
// tile: [count / 4][head] dwords. Dwords are permuted before the bytes of four rows are interleaved, as unpacking works
// inside lanes of 128 bits.
void values(const int8_t * level, int count, int64_t head, int8_t * tile) {
    const __m512i order = _mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
    const __m256i half_order = _mm256_setr_epi32(0, 2, 4, 6, 1, 3, 5, 7);
    for (int r = 0; r < count; r += 4, level += 4 * head, tile += 4 * head) {
        int64_t c = 0;
        for (; c + 64 <= head; c += 64) {
            __m512i row[4];
            for (int i = 0; i < 4; ++i)
                row[i] = _mm512_permutexvar_epi32(order, _mm512_loadu_si512(level + i * head + c));
            const __m512i low01 = _mm512_unpacklo_epi8(row[0], row[1]), high01 = _mm512_unpackhi_epi8(row[0], row[1]);
            const __m512i low23 = _mm512_unpacklo_epi8(row[2], row[3]), high23 = _mm512_unpackhi_epi8(row[2], row[3]);
            _mm512_storeu_si512(tile + 4 * c, _mm512_unpacklo_epi16(low01, low23));
            _mm512_storeu_si512(tile + 4 * c + 64, _mm512_unpackhi_epi16(low01, low23));
            _mm512_storeu_si512(tile + 4 * c + 128, _mm512_unpacklo_epi16(high01, high23));
            _mm512_storeu_si512(tile + 4 * c + 192, _mm512_unpackhi_epi16(high01, high23));
        }
        if (c < head) {
            __m256i row[4];
            for (int i = 0; i < 4; ++i)
                row[i] = _mm256_permutevar8x32_epi32(
                    _mm256_loadu_si256(reinterpret_cast<const __m256i *>(level + i * head + c)), half_order);
            const __m256i low01 = _mm256_unpacklo_epi8(row[0], row[1]), high01 = _mm256_unpackhi_epi8(row[0], row[1]);
            const __m256i low23 = _mm256_unpacklo_epi8(row[2], row[3]), high23 = _mm256_unpackhi_epi8(row[2], row[3]);
            __m256i * out = reinterpret_cast<__m256i *>(tile + 4 * c);
            _mm256_storeu_si256(out, _mm256_unpacklo_epi16(low01, low23));
            _mm256_storeu_si256(out + 1, _mm256_unpackhi_epi16(low01, low23));
            _mm256_storeu_si256(out + 2, _mm256_unpacklo_epi16(high01, high23));
            _mm256_storeu_si256(out + 3, _mm256_unpackhi_epi16(high01, high23));
        }
    }
}

// Whether the tile's weights need 16 bits (see coarse_share); a NaN does.
bool needs_16_bits(const float * weights, int count, const SoftmaxState & state) {
    __m512 largest = _mm512_setzero_ps();
    for (int r = 0; r < count; r += lanes) largest = _mm512_max_ps(largest, _mm512_loadu_ps(weights + r));
    return !(_mm512_reduce_max_ps(largest) <= coarse_share * state.sum);
}

// A query row's weights times V's scales, as multiples of `unit`: of 8 bits, or the upper and lower bytes of 16.
struct Weights {
    alignas(64) uint8_t high[tile_rows], low[tile_rows];
    float unit;
};

void round_weights(const float * weights, const float * scale, int count, bool fine, Weights & out) {
    constexpr int registers = tile_rows / lanes;
    const float limit = fine ? 65535.0f : 255.0f;
    __m512 w[registers];
    __m512i largest = _mm512_setzero_si512(); // of bits: NaN is above all
    for (int r = 0; r < registers; ++r) {
        const int rest = count - lanes * r;
        const __mmask16 there = __mmask16(rest >= lanes ? 0xFFFF : rest > 0 ? (1 << rest) - 1 : 0);
        w[r] = _mm512_maskz_mul_ps(there, _mm512_loadu_ps(weights + lanes * r), _mm512_loadu_ps(scale + lanes * r));
        largest = _mm512_max_epu32(largest, _mm512_castps_si512(w[r]));
    }
    const float top = bits_float(_mm512_reduce_max_epu32(largest));
    const bool usable = top > 0 && top < INFINITY;
    out.unit = usable ? top / limit : top; // not finite: the sums must show it
    const __m512 inverse = _mm512_set1_ps(usable ? limit / top : 0.0f);
    __m512i x[registers];
    for (int r = 0; r < registers; ++r) {
        const __m512 offset = fine ? _mm512_setzero_ps() : _mm512_load_ps(dither.row + lanes * r);
        x[r] = _mm512_cvtps_epi32(_mm512_fmadd_ps(w[r], inverse, offset));
    }
    const __m512i a = _mm512_packus_epi32(x[0], x[1]), b = _mm512_packus_epi32(x[2], x[3]);
    const __m512i byte = _mm512_set1_epi16(255);
    const __m512i order = _mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
    const __m512i low = _mm512_packus_epi16(_mm512_and_si512(a, byte), _mm512_and_si512(b, byte));
    const __m512i high = _mm512_packus_epi16(_mm512_srli_epi16(a, 8), _mm512_srli_epi16(b, 8)); // 0 unless fine
    _mm512_store_si512(out.high, _mm512_permutexvar_epi32(order, high));
    _mm512_store_si512(out.low, _mm512_permutexvar_epi32(order, low));
}

// The upper bytes' products with V, shifted, and those of the lower bytes: Rows x 16 * Registers sums in registers.
template <int Rows, int Registers>
void accumulate_levels_block(const int8_t * tile, int count, int64_t head, const Weights * weights, bool fine,
                             const SoftmaxState * state, float * sum, int64_t stride) {
    __m512i a[Rows][Registers];
    for (int m = 0; m < Rows; ++m)
        for (int c = 0; c < Registers; ++c) a[m][c] = _mm512_setzero_si512();
    const auto pass = [&](uint8_t const (Weights::*bytes)[tile_rows]) {
        const int8_t * v = tile;
        for (int r = 0; r < count; r += 4, v += 4 * head) {
            __m512i value[Registers];
            for (int c = 0; c < Registers; ++c) value[c] = _mm512_loadu_si512(v + 64 * c);
            for (int m = 0; m < Rows; ++m) {
                const __m512i weight = broadcast4((weights[m].*bytes) + r);
                for (int c = 0; c < Registers; ++c) a[m][c] = _mm512_dpbusd_epi32(a[m][c], weight, value[c]);
            }
        }
    };
    if (fine) {
        pass(&Weights::high);
        for (int m = 0; m < Rows; ++m)
            for (int c = 0; c < Registers; ++c) a[m][c] = _mm512_slli_epi32(a[m][c], 8);
    }
    pass(&Weights::low);
    for (int m = 0; m < Rows; ++m)
        for (int c = 0; c < Registers; ++c) {
            float * out = sum + m * stride + lanes * c;
            const __m512 before = _mm512_mul_ps(_mm512_set1_ps(state[m].correction), _mm512_loadu_ps(out));
            const __m512 unit = _mm512_set1_ps(weights[m].unit);
            _mm512_storeu_ps(out, _mm512_fmadd_ps(_mm512_cvtepi32_ps(a[m][c]), unit, before));
        }
}

template <int Rows>
void accumulate_levels_rows(const int8_t * tile, const float * scale, int block, int count, int64_t head,
                            const float * weights, const SoftmaxState * state, float * sum, int64_t stride) {
    Weights rounded[Rows];
    bool fine[Rows], any_fine = false; // each row for itself, so that it does not matter which rows go together
    for (int m = 0; m < Rows; ++m) {
        fine[m] = needs_16_bits(weights + m * tile_rows, count, state[m]);
        any_fine = any_fine || fine[m];
    }
    for (int64_t b = 0; b < head / block; ++b, scale += tile_rows) {
        for (int m = 0; m < Rows; ++m) round_weights(weights + m * tile_rows, scale, count, fine[m], rounded[m]);
        for (int64_t c = b * block; c < (b + 1) * block; c += block == 32 ? 32 : 64)
            if (block == 32)
                accumulate_levels_block<Rows, 2>(tile + 4 * c, count, head, rounded, any_fine, state, sum + c, stride);
            else
                accumulate_levels_block<Rows, 4>(tile + 4 * c, count, head, rounded, any_fine, state, sum + c, stride);
    }
}

void accumulate_levels(const int8_t * tile, const float * scale, int block, int count, int64_t head,
                       const float * weights, const SoftmaxState * state, int rows, float * sum, int64_t stride) {
    int m = 0;
    for (; m + 4 <= rows; m += 4)
        accumulate_levels_rows<4>(tile, scale, block, count, head, weights + m * tile_rows, state + m, sum + m * stride,
                                  stride);
    for (; m < rows; ++m)
        accumulate_levels_rows<1>(tile, scale, block, count, head, weights + m * tile_rows, state + m, sum + m * stride,
                                  stride);
}
#else
constexpr decltype(Kernels::values) values = nullptr;
constexpr decltype(Kernels::accumulate_levels) accumulate_levels = nullptr;
#endif

void load_f16(const uint8_t * src, float * dst, int64_t n) {
    for (int64_t i = 0; i < n; i += lanes)
        _mm512_storeu_ps(dst + i, _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i *>(src + 2 * i))));
}

void query_plain(const float * src, void * dst, int64_t blocks) {
    auto * out = static_cast<tq_query32 *>(dst);
    for (int64_t b = 0; b < blocks; ++b, src += 32, ++out) {
        __m512 x[2];
        load<32>(src, x);
        const float largest = bits_float(largest_bits<32>(x));
        if (!(largest < INFINITY) || largest == 0) {
            std::memset(out, 0, sizeof(*out));
            out->scale = largest == 0 ? 0.0f : NAN;
            continue;
        }
        const __m512 inverse = _mm512_set1_ps(127.0f / largest);
        const __m512i low = _mm512_cvtps_epi32(_mm512_mul_ps(x[0], inverse));
        const __m512i high = _mm512_cvtps_epi32(_mm512_mul_ps(x[1], inverse));
        _mm_storeu_si128(reinterpret_cast<__m128i *>(out->q), _mm512_cvtepi32_epi8(low));
        _mm_storeu_si128(reinterpret_cast<__m128i *>(out->q + 16), _mm512_cvtepi32_epi8(high));
        out->sum = _mm512_reduce_add_epi32(_mm512_add_epi32(low, high));
        out->scale = largest / 127.0f;
    }
}

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
