// AVX2, FMA, F16C. The functions and their order are scalar.cpp's; comments here only explain the vector tricks.
#include "attention_tile.h"
#include "format.h"
#include "kernels.h"

#include <immintrin.h>

namespace turboquant {
namespace {

constexpr int lanes = 8;

// The sign vectors as operands: float sign bits, and +-1 for vpsignb.
struct SignTables {
    alignas(32) uint32_t bits1[128] = {};
    alignas(32) uint32_t bits2[128] = {};
    alignas(32) int8_t levels2[128] = {};
    constexpr SignTables() {
        for (int i = 0; i < 128; ++i) {
            bits1[i] = sign_bit(signs1, i) ? 0x80000000u : 0u;
            bits2[i] = sign_bit(signs2, i) ? 0x80000000u : 0u;
            levels2[i] = sign_bit(signs2, i) ? -1 : 1;
        }
    }
};
constexpr SignTables sign_tables;

__m256 flip(__m256 x, const uint32_t * bits, int r) {
    return _mm256_xor_ps(x, _mm256_load_ps(reinterpret_cast<const float *>(bits + lanes * r)));
}

// One stage inside a register: s is each lane's partner, and `lane` is -1 where the difference is taken. The product is
// exact, so the sum rounds as in scalar.cpp.
__m256 butterfly(__m256 x, __m256 s, __m256 lane) { return _mm256_fmadd_ps(x, lane, s); }

// The stages between registers; templates, so that the compiler unrolls them all.
template <int R, int H> TURBOQUANT_INLINE void across_registers(__m256 * y) {
    if constexpr (H < R) {
        for (int i = 0; i < R / 2; ++i) {
            const int j = i / H * 2 * H + i % H;
            const __m256 a = y[j], b = y[j + H];
            y[j] = _mm256_add_ps(a, b);
            y[j + H] = _mm256_sub_ps(a, b);
        }
        across_registers<R, 2 * H>(y);
    }
}

template <int R> TURBOQUANT_INLINE void hadamard(__m256 * y) {
    const __m256 lane1 = _mm256_setr_ps(1, -1, 1, -1, 1, -1, 1, -1);
    const __m256 lane2 = _mm256_setr_ps(1, 1, -1, -1, 1, 1, -1, -1);
    const __m256 lane4 = _mm256_setr_ps(1, 1, 1, 1, -1, -1, -1, -1);
    for (int r = 0; r < R; ++r) {
        y[r] = butterfly(y[r], _mm256_permute_ps(y[r], 0xB1), lane1);
        y[r] = butterfly(y[r], _mm256_permute_ps(y[r], 0x4E), lane2);
        y[r] = butterfly(y[r], _mm256_permute2f128_ps(y[r], y[r], 1), lane4);
    }
    across_registers<R, 1>(y);
}

// The same in 16-bit integers, 16 to a register. Exact, so the order of the stages is free.
__m256i butterfly(__m256i x, __m256i s, __m256i sign) { return _mm256_add_epi16(s, _mm256_sign_epi16(x, sign)); }

template <int R, int H> TURBOQUANT_INLINE void across_registers(__m256i * w) {
    if constexpr (H < R) {
        for (int i = 0; i < R / 2; ++i) {
            const int j = i / H * 2 * H + i % H;
            const __m256i a = w[j], b = w[j + H];
            w[j] = _mm256_add_epi16(a, b);
            w[j + H] = _mm256_sub_epi16(a, b);
        }
        across_registers<R, 2 * H>(w);
    }
}

template <int R> TURBOQUANT_INLINE void hadamard(__m256i * w) {
    across_registers<R, 1>(w);
    const __m256i sign1 = _mm256_set1_epi32(int(0xFFFF0001));
    const __m256i sign2 = _mm256_set1_epi64x(int64_t(0xFFFFFFFF00010001));
    const __m256i sign4 = _mm256_setr_epi32(0x00010001, 0x00010001, -1, -1, 0x00010001, 0x00010001, -1, -1);
    const __m256i sign8 = _mm256_setr_epi32(0x00010001, 0x00010001, 0x00010001, 0x00010001, -1, -1, -1, -1);
    const __m256i swap16 = _mm256_setr_epi8(2, 3, 0, 1, 6, 7, 4, 5, 10, 11, 8, 9, 14, 15, 12, 13,
                                            2, 3, 0, 1, 6, 7, 4, 5, 10, 11, 8, 9, 14, 15, 12, 13);
    for (int r = 0; r < R; ++r) {
        w[r] = butterfly(w[r], _mm256_permute4x64_epi64(w[r], 0x4E), sign8);
        w[r] = butterfly(w[r], _mm256_shuffle_epi32(w[r], 0x4E), sign4);
        w[r] = butterfly(w[r], _mm256_shuffle_epi32(w[r], 0xB1), sign2);
        w[r] = butterfly(w[r], _mm256_shuffle_epi8(w[r], swap16), sign1);
    }
}

int32_t reduce_add(__m256i x) {
    __m128i s = _mm_add_epi32(_mm256_castsi256_si128(x), _mm256_extracti128_si256(x, 1));
    s = _mm_add_epi32(s, _mm_shuffle_epi32(s, 0x4E));
    return _mm_cvtsi128_si32(_mm_add_epi32(s, _mm_shuffle_epi32(s, 0xB1)));
}

template <int N> TURBOQUANT_INLINE uint32_t largest_bits(const __m256 * x) {
    const __m256i magnitude = _mm256_set1_epi32(0x7fffffff);
    __m256i largest = _mm256_setzero_si256();
    for (int r = 0; r < N / lanes; ++r)
        largest = _mm256_max_epu32(largest, _mm256_and_si256(_mm256_castps_si256(x[r]), magnitude));
    __m128i m = _mm_max_epu32(_mm256_castsi256_si128(largest), _mm256_extracti128_si256(largest, 1));
    m = _mm_max_epu32(m, _mm_shuffle_epi32(m, 0x4E));
    return uint32_t(_mm_cvtsi128_si32(_mm_max_epu32(m, _mm_shuffle_epi32(m, 0xB1))));
}

template <int N> TURBOQUANT_INLINE void load(const float * src, __m256 * x) {
    for (int r = 0; r < N / lanes; ++r) x[r] = _mm256_loadu_ps(src + lanes * r);
}

template <int N> TURBOQUANT_INLINE void forward(const __m256 * x, float scale, __m256 * y) {
    const __m256 s = _mm256_set1_ps(scale);
    for (int r = 0; r < N / lanes; ++r) y[r] = flip(_mm256_mul_ps(x[r], s), sign_tables.bits1, r);
    hadamard<N / lanes>(y);
    for (int r = 0; r < N / lanes; ++r) y[r] = flip(y[r], sign_tables.bits2, r);
}

template <int N> float sum_of_squares(const __m256 * y) {
    __m256 low = _mm256_mul_ps(y[0], y[0]), high = _mm256_mul_ps(y[1], y[1]);
    for (int r = 2; r < N / lanes; r += 2) {
        low = _mm256_add_ps(low, _mm256_mul_ps(y[r], y[r]));
        high = _mm256_add_ps(high, _mm256_mul_ps(y[r + 1], y[r + 1]));
    }
    const __m256 l8 = _mm256_add_ps(low, high);
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
                const uint32_t high = uint32_t(_mm256_movemask_epi8(_mm256_slli_epi16(v, 5))); // bit 2 to bit 7
                std::memcpy(q + Format<Bits, N>::high_offset + i / 8, &high, 4);
            }
    }
}

// int8 levels, 32 to a register.
template <int N> struct Levels {
    static constexpr int registers = N / 32;
    __m256i v[registers];
};

// Bit i of 32 becomes byte i: 4 where it is set, else 0.
__m256i spread_third_bits(const uint8_t * high) {
    int32_t bits;
    std::memcpy(&bits, high, 4);
    const __m256i source = _mm256_setr_epi8(0, 0, 0, 0, 0, 0, 0, 0, 1, 1, 1, 1, 1, 1, 1, 1,
                                            2, 2, 2, 2, 2, 2, 2, 2, 3, 3, 3, 3, 3, 3, 3, 3);
    const __m256i bit = _mm256_set1_epi64x(int64_t(0x8040201008040201));
    const __m256i bytes = _mm256_and_si256(_mm256_shuffle_epi8(_mm256_set1_epi32(bits), source), bit);
    return _mm256_and_si256(_mm256_cmpeq_epi8(bytes, bit), _mm256_set1_epi8(4));
}

template <int Bits, int N> TURBOQUANT_INLINE Levels<N> expand(const uint8_t * q) {
    constexpr int registers = Levels<N>::registers;
    const __m256i table =
        _mm256_broadcastsi128_si256(_mm_loadu_si128(reinterpret_cast<const __m128i *>(Format<Bits, N>::centroids)));
    __m256i index[registers];
    if constexpr (Bits == 4) {
        const __m256i mask = _mm256_set1_epi8(15);
        if constexpr (N == 32) {
            const __m256i bytes =
                _mm256_broadcastsi128_si256(_mm_loadu_si128(reinterpret_cast<const __m128i *>(q)));
            index[0] = _mm256_and_si256(_mm256_srlv_epi64(bytes, _mm256_setr_epi64x(0, 0, 4, 4)), mask);
        } else {
            for (int r = 0; r < registers / 2; ++r) {
                const __m256i bytes = _mm256_loadu_si256(reinterpret_cast<const __m256i *>(q + 32 * r));
                index[r] = _mm256_and_si256(bytes, mask);
                index[r + registers / 2] = _mm256_and_si256(_mm256_srli_epi16(bytes, 4), mask);
            }
        }
    } else {
        const __m256i mask = _mm256_set1_epi8(3);
        if constexpr (N == 128) {
            const __m256i bytes = _mm256_loadu_si256(reinterpret_cast<const __m256i *>(q));
            index[0] = _mm256_and_si256(bytes, mask);
            index[1] = _mm256_and_si256(_mm256_srli_epi16(bytes, 2), mask);
            index[2] = _mm256_and_si256(_mm256_srli_epi16(bytes, 4), mask);
            index[3] = _mm256_and_si256(_mm256_srli_epi16(bytes, 6), mask);
        } else if constexpr (N == 64) {
            const __m256i bytes =
                _mm256_broadcastsi128_si256(_mm_loadu_si128(reinterpret_cast<const __m128i *>(q)));
            index[0] = _mm256_and_si256(_mm256_srlv_epi64(bytes, _mm256_setr_epi64x(0, 0, 2, 2)), mask);
            index[1] = _mm256_and_si256(_mm256_srlv_epi64(bytes, _mm256_setr_epi64x(4, 4, 6, 6)), mask);
        } else {
            const __m256i bytes =
                _mm256_broadcastq_epi64(_mm_loadl_epi64(reinterpret_cast<const __m128i *>(q)));
            index[0] = _mm256_and_si256(_mm256_srlv_epi64(bytes, _mm256_setr_epi64x(0, 2, 4, 6)), mask);
        }
        if constexpr (Bits == 3)
            for (int r = 0; r < registers; ++r)
                index[r] = _mm256_or_si256(index[r], spread_third_bits(q + Format<Bits, N>::high_offset + 4 * r));
    }
    Levels<N> out;
    for (int r = 0; r < registers; ++r) out.v[r] = _mm256_shuffle_epi8(table, index[r]);
    return out;
}

template <int N> void rotate(const float * src, float * dst, int64_t blocks) {
    const __m256 norm = _mm256_set1_ps(Block<N>::one_over_sqrt_n);
    for (int64_t b = 0; b < blocks; ++b, src += N, dst += N) {
        __m256 y[N / lanes];
        load<N>(src, y);
        for (int r = 0; r < N / lanes; ++r) y[r] = flip(y[r], sign_tables.bits1, r);
        hadamard<N / lanes>(y);
        for (int r = 0; r < N / lanes; ++r)
            _mm256_storeu_ps(dst + lanes * r, _mm256_mul_ps(flip(y[r], sign_tables.bits2, r), norm));
    }
}

template <int N> void unrotate(const float * src, float * dst, int64_t blocks) {
    const __m256 norm = _mm256_set1_ps(Block<N>::one_over_sqrt_n);
    for (int64_t b = 0; b < blocks; ++b, src += N, dst += N) {
        __m256 y[N / lanes];
        load<N>(src, y);
        for (int r = 0; r < N / lanes; ++r) y[r] = flip(y[r], sign_tables.bits2, r);
        hadamard<N / lanes>(y);
        for (int r = 0; r < N / lanes; ++r)
            _mm256_storeu_ps(dst + lanes * r, flip(_mm256_mul_ps(y[r], norm), sign_tables.bits1, r));
    }
}

template <int N> void query(const float * src, void * dst, int64_t blocks) {
    auto * out = static_cast<typename QueryBlock<N>::type *>(dst);
    for (int64_t b = 0; b < blocks; ++b, src += N, ++out) {
        __m256 y[N / lanes];
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
        const __m256 inverse = _mm256_set1_ps(127.0f / largest);
        __m256i sum = _mm256_setzero_si256();
        for (int r = 0; r < N / lanes; ++r) {
            const __m256i q = _mm256_cvtps_epi32(_mm256_mul_ps(y[r], inverse));
            sum = _mm256_add_epi32(sum, q);
            const __m128i words = _mm_packs_epi32(_mm256_castsi256_si128(q), _mm256_extracti128_si256(q, 1));
            _mm_storel_epi64(reinterpret_cast<__m128i *>(out->q + lanes * r), _mm_packs_epi16(words, words));
        }
        out->sum = reduce_add(sum);
        out->scale = largest * Block<N>::query_scale * power_of_two(k);
    }
}

__m256i multiply_add8(__m256i sum, __m256i a, __m256i b) { // 0 <= a, b <= 127: pairs stay inside int16
    return _mm256_add_epi32(sum, _mm256_madd_epi16(_mm256_maddubs_epi16(a, b), _mm256_set1_epi16(1)));
}

// The sums of eight registers, one in each lane of the result.
__m256i reduce_add8(const __m256i * v) {
    const __m256i low = _mm256_hadd_epi32(_mm256_hadd_epi32(v[0], v[1]), _mm256_hadd_epi32(v[2], v[3]));
    const __m256i high = _mm256_hadd_epi32(_mm256_hadd_epi32(v[4], v[5]), _mm256_hadd_epi32(v[6], v[7]));
    return _mm256_add_epi32(_mm256_permute2x128_si256(low, high, 0x20), _mm256_permute2x128_si256(low, high, 0x31));
}

template <int N> struct Encoding : EncodingBase {
    static constexpr int words = N / 16; // registers of 16 int16
    static constexpr int bytes = N / 32; // registers of 32 int8
    __m256i z[words], magnitude[words], coarse[bytes];
};

template <int N> void transform(const float * x, Encoding<N> & work) {
    __m256 y[N / lanes];
    load<N>(x, y);
    work.largest = largest_bits<N>(y);
    if (!work.codable()) return;
    work.k = scale_exponent(work.largest);
    forward<N>(y, power_of_two(-work.k), y);
    work.rms = std::sqrt(sum_of_squares<N>(y) * (1.0f / N));
    const __m256 unit = _mm256_set1_ps(rms_unit / work.rms);
    __m256i energy = _mm256_setzero_si256(), rounded[work.words];
    static_assert(coarse_unit == 1 << 6, "the shift below");
    for (int r = 0; r < work.words; ++r) {
        const __m256i low = _mm256_cvtps_epi32(_mm256_mul_ps(y[2 * r], unit));
        const __m256i high = _mm256_cvtps_epi32(_mm256_mul_ps(y[2 * r + 1], unit));
        work.z[r] = _mm256_permute4x64_epi64(_mm256_packs_epi32(low, high), 0xD8);
        work.magnitude[r] = _mm256_abs_epi16(work.z[r]);
        energy = _mm256_add_epi32(energy, _mm256_madd_epi16(work.z[r], work.z[r]));
        rounded[r] = _mm256_srli_epi16(_mm256_add_epi16(work.magnitude[r], _mm256_set1_epi16(coarse_unit / 2)), 6);
    }
    work.energy = reduce_add(energy);
    for (int r = 0; r < work.bytes; ++r) // saturates at 127; the search does not mind the order
        work.coarse[r] = _mm256_packs_epi16(rounded[2 * r], rounded[2 * r + 1]);
}

template <int Bits, int N> void search(Encoding<N> * work, int count) {
    using F = Format<Bits, N>;
    static_assert(search_steps == 8, "one lane for each step");
    const __m256i table =
        _mm256_broadcastsi128_si256(_mm_loadu_si128(reinterpret_cast<const __m128i *>(F::magnitudes)));
    for (Encoding<N> * w = work; w < work + count; ++w) {
        if (!w->codable()) continue;
        __m256i as[search_steps], bs[search_steps];
        for (int s = 0; s < search_steps; ++s) {
            as[s] = bs[s] = _mm256_setzero_si256();
            for (int r = 0; r < w->bytes; ++r) {
                __m256i m = _mm256_setzero_si256();
                for (int t = 0; t < F::half_levels - 1; ++t) {
                    const __m256i threshold = _mm256_set1_epi8(F::coarse_thresholds[s][t]);
                    m = _mm256_sub_epi8(m, _mm256_cmpgt_epi8(w->coarse[r], threshold));
                }
                const __m256i c = _mm256_shuffle_epi8(table, m);
                as[s] = multiply_add8(as[s], w->coarse[r], c);
                bs[s] = multiply_add8(bs[s], c, c);
            }
        }
        alignas(32) int32_t a8[8], b8[8];
        _mm256_store_si256(reinterpret_cast<__m256i *>(a8), reduce_add8(as));
        _mm256_store_si256(reinterpret_cast<__m256i *>(b8), reduce_add8(bs));
        int best = 0;
        double best_explained = -1.0;
        for (int s = 0; s < search_steps; ++s) {
            const double e = explained(a8[s], b8[s]);
            best = e > best_explained ? s : best;
            best_explained = e > best_explained ? e : best_explained;
        }
        w->scale = least_squares_scale(a8[best], b8[best]);
    }
}

// How many thresholds each magnitude exceeds, in the low byte of each word; the high byte is 0x80, which tells pshufb to
// write a zero there.
template <int Thresholds> __m256i count_exceeded(__m256i magnitude, const int16_t * thresholds) {
    __m256i m = _mm256_set1_epi16(int16_t(0x8000));
    for (int t = 0; t < Thresholds; ++t)
        m = _mm256_sub_epi16(m, _mm256_cmpgt_epi16(magnitude, _mm256_set1_epi16(thresholds[t])));
    return m;
}

template <int Bits> __m256i look_up(__m256i count) {
    const __m128i table = _mm_loadu_si128(reinterpret_cast<const __m128i *>(Codebook<Bits>::magnitudes));
    return _mm256_shuffle_epi8(_mm256_broadcastsi128_si256(table), count);
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
    __m256i a = _mm256_setzero_si256(), m[work.words];
    for (int r = 0; r < work.words; ++r) {
        const __m256i count = count_exceeded<M - 1>(work.magnitude[r], thresholds);
        a = _mm256_add_epi32(a, _mm256_madd_epi16(work.magnitude[r], look_up<Bits>(count)));
        const __m256i upper = _mm256_add_epi16(_mm256_and_si256(count, _mm256_set1_epi16(15)), _mm256_set1_epi16(M));
        // M - 1 - m is M + m with all its bits flipped
        m[r] = _mm256_xor_si256(upper, _mm256_and_si256(_mm256_srai_epi16(work.z[r], 15),
                                                        _mm256_set1_epi16(2 * M - 1)));
    }
    const uint16_t d = block_scale<Bits, N>(work, reduce_add(a), &report->saturated);
    if (d == 0) {
        std::memset(dst, 0, F::bytes);
        return;
    }
    alignas(32) uint8_t index[N];
    for (int r = 0; r < work.words; r += 2)
        _mm256_store_si256(reinterpret_cast<__m256i *>(index + 16 * r),
                           _mm256_permute4x64_epi64(_mm256_packus_epi16(m[r], m[r + 1]), 0xD8));
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
    constexpr int words = N / 16;
    for (int64_t b = 0; b < blocks; ++b, src += F::bytes, dst += N) {
        const __m256 scale = _mm256_set1_ps(load_scale(src) * F::step_n);
        const Levels<N> level = expand<Bits, N>(src + 2);
        __m256i w[words];
        for (int r = 0; r < Levels<N>::registers; ++r) {
            const __m256i v = _mm256_sign_epi8(
                level.v[r], _mm256_load_si256(reinterpret_cast<const __m256i *>(sign_tables.levels2 + 32 * r)));
            w[2 * r] = _mm256_cvtepi8_epi16(_mm256_castsi256_si128(v));
            w[2 * r + 1] = _mm256_cvtepi8_epi16(_mm256_extracti128_si256(v, 1));
        }
        hadamard<words>(w);
        for (int r = 0; r < words; ++r) {
            const __m256 low = _mm256_cvtepi32_ps(_mm256_cvtepi16_epi32(_mm256_castsi256_si128(w[r])));
            const __m256 high = _mm256_cvtepi32_ps(_mm256_cvtepi16_epi32(_mm256_extracti128_si256(w[r], 1)));
            _mm256_storeu_ps(dst + 16 * r, flip(_mm256_mul_ps(scale, low), sign_tables.bits1, 2 * r));
            _mm256_storeu_ps(dst + 16 * r + 8, flip(_mm256_mul_ps(scale, high), sign_tables.bits1, 2 * r + 1));
        }
    }
}

template <int Bits, int N> void decode_rotated(const uint8_t * src, float * dst, int64_t blocks) {
    using F = Format<Bits, N>;
    for (int64_t b = 0; b < blocks; ++b, src += F::bytes, dst += N) {
        const __m256 scale = _mm256_set1_ps(load_scale(src) * F::step);
        const Levels<N> level = expand<Bits, N>(src + 2);
        for (int r = 0; r < Levels<N>::registers; ++r) {
            const __m128i half[2] = {_mm256_castsi256_si128(level.v[r]), _mm256_extracti128_si256(level.v[r], 1)};
            for (int h = 0; h < 2; ++h) {
                float * out = dst + 32 * r + 16 * h;
                const __m256 low = _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(half[h]));
                const __m256 high = _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_srli_si128(half[h], 8)));
                _mm256_storeu_ps(out, _mm256_mul_ps(scale, low));
                _mm256_storeu_ps(out + 8, _mm256_mul_ps(scale, high));
            }
        }
    }
}

// maddubs multiplies unsigned by signed, so the level's sign moves to the query (neither is ever -128, and a pair is at
// most 2 * 127 * 127, inside int16).
template <int N> int32_t dot_levels(const Levels<N> & level, const typename QueryBlock<N>::type * q) {
    __m256i sum = _mm256_setzero_si256();
    for (int r = 0; r < Levels<N>::registers; ++r) {
        const __m256i values = _mm256_loadu_si256(reinterpret_cast<const __m256i *>(q->q + 32 * r));
        const __m256i pairs =
            _mm256_maddubs_epi16(_mm256_abs_epi8(level.v[r]), _mm256_sign_epi8(values, level.v[r]));
        sum = _mm256_add_epi32(sum, _mm256_madd_epi16(pairs, _mm256_set1_epi16(1)));
    }
    return reduce_add(sum);
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
            for (int i = 0; i < Levels<N>::registers; ++i)
                _mm256_storeu_si256(reinterpret_cast<__m256i *>(level + 32 * i), expanded.v[i]);
        }
    }
}

#ifdef TURBOQUANT_VNNI
// A lane of 32 bits holds four channels of one KV row (K) or one channel of four KV rows (V), as in avx512.cpp.
__m256i dot4(__m256i sum, __m256i a, __m256i b) { // a unsigned, b signed
#ifdef __AVXVNNI__
    return _mm256_dpbusd_avx_epi32(sum, a, b);
#else
    return _mm256_dpbusd_epi32(sum, a, b);
#endif
}

// 8 rows of 4 dwords, `stride` bytes apart, to columns of 8 rows, 64 rows apart.
void transpose8(const int8_t * src, int64_t stride, int8_t * dst) {
    __m256i row[4];
    for (int j = 0; j < 4; ++j)
        row[j] = _mm256_loadu2_m128i(reinterpret_cast<const __m128i *>(src + (j + 4) * stride),
                                     reinterpret_cast<const __m128i *>(src + j * stride));
    const __m256i low01 = _mm256_unpacklo_epi32(row[0], row[1]), high01 = _mm256_unpackhi_epi32(row[0], row[1]);
    const __m256i low23 = _mm256_unpacklo_epi32(row[2], row[3]), high23 = _mm256_unpackhi_epi32(row[2], row[3]);
    const __m256i column[4] = {_mm256_unpacklo_epi64(low01, low23), _mm256_unpackhi_epi64(low01, low23),
                               _mm256_unpacklo_epi64(high01, high23), _mm256_unpackhi_epi64(high01, high23)};
    for (int i = 0; i < 4; ++i) // the instruction multiplies unsigned by signed: levels are offset by 128
        _mm256_store_si256(reinterpret_cast<__m256i *>(dst + i * 4 * tile_rows),
                           _mm256_xor_si256(column[i], _mm256_set1_epi8(-128)));
}

// tile: [head / 4][tile_rows] dwords.
void keys(const int8_t * level, int64_t head, int8_t * tile) {
    for (int r = 0; r < tile_rows; r += 8)
        for (int64_t c = 0; c < head; c += 16) transpose8(level + r * head + c, head, tile + c * tile_rows + 4 * r);
}

// The four bytes at p, in every lane.
__m256i broadcast4(const void * p) {
    int32_t four;
    std::memcpy(&four, p, 4);
    return _mm256_set1_epi32(four);
}

// s[m] (+)= the products of Rows queries with 8 * Registers rows of K over one block.
template <int N, int Rows, int Registers>
void scores_block(const int8_t * tile, const float * scale, const typename QueryBlock<N>::type * q, int64_t q_stride,
                  bool add, float * s) {
    __m256i sum[Rows][Registers];
    for (int m = 0; m < Rows; ++m)
        for (int j = 0; j < Registers; ++j) sum[m][j] = _mm256_set1_epi32(-128 * q[m * q_stride].sum);
    for (int c = 0; c < N; c += 4, tile += 4 * tile_rows) {
        __m256i k[Registers];
        for (int j = 0; j < Registers; ++j) k[j] = _mm256_load_si256(reinterpret_cast<const __m256i *>(tile + 32 * j));
        for (int m = 0; m < Rows; ++m) {
            const __m256i values = broadcast4(q[m * q_stride].q + c);
            for (int j = 0; j < Registers; ++j) sum[m][j] = dot4(sum[m][j], k[j], values);
        }
    }
    for (int j = 0; j < Registers; ++j) {
        const __m256 scales = _mm256_loadu_ps(scale + lanes * j);
        for (int m = 0; m < Rows; ++m) {
            float * out = s + m * tile_rows + lanes * j;
            const __m256 product = _mm256_mul_ps(_mm256_cvtepi32_ps(sum[m][j]), _mm256_set1_ps(q[m * q_stride].scale));
            _mm256_storeu_ps(out, add ? _mm256_fmadd_ps(product, scales, _mm256_loadu_ps(out))
                                      : _mm256_mul_ps(product, scales));
        }
    }
}

template <int N>
void scores(const int8_t * tile, const float * scale, int64_t blocks, const void * query, int rows, float * s) {
    auto * q = static_cast<const typename QueryBlock<N>::type *>(query);
    for (int r = 0; r < tile_rows; r += 16) {
        int m = 0;
        for (; m + 4 <= rows; m += 4)
            for (int64_t b = 0; b < blocks; ++b)
                scores_block<N, 4, 2>(tile + b * N * tile_rows + 4 * r, scale + b * tile_rows + r, q + m * blocks + b,
                                      blocks, b > 0, s + m * tile_rows + r);
        for (; m < rows; ++m)
            for (int64_t b = 0; b < blocks; ++b)
                scores_block<N, 1, 2>(tile + b * N * tile_rows + 4 * r, scale + b * tile_rows + r, q + m * blocks + b,
                                      blocks, b > 0, s + m * tile_rows + r);
    }
}
#else
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
                    values[r] = _mm256_loadu_si256(reinterpret_cast<const __m256i *>(block.q + 32 * r));
                    magnitudes[r] = _mm256_abs_epi8(values[r]);
                }
                for (int i = 0; i < 8; ++i) {
                    const int8_t * k = level + ((r0 + i) * blocks + b) * N;
                    sums[i] = _mm256_setzero_si256();
                    for (int r = 0; r < Levels<N>::registers; ++r) {
                        const __m256i v = _mm256_loadu_si256(reinterpret_cast<const __m256i *>(k + 32 * r));
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
#endif

void scores_float(const float * k, int64_t head, const float * q, int rows, float * s) {
    scores_float_tile(k, head, q, rows, s);
}

void softmax(float * s, const float * bias, float scale, float soft_cap, SoftmaxState * state, float * most) {
    softmax_tile(s, bias, scale, soft_cap, state, most);
}

// Rows x 8 * Registers outputs stay in registers while all rows of V pass by.
template <int Rows, int Registers>
void accumulate_block(const float * v, int count, int64_t head, const float * weights, const SoftmaxState * state,
                      float * sum, int64_t stride) {
    __m256 a[Rows][Registers];
    for (int m = 0; m < Rows; ++m)
        for (int c = 0; c < Registers; ++c)
            a[m][c] = _mm256_mul_ps(_mm256_set1_ps(state[m].correction), _mm256_loadu_ps(sum + m * stride + lanes * c));
    for (int r = 0; r < count; ++r, v += head) {
        __m256 value[Registers];
        for (int c = 0; c < Registers; ++c) value[c] = _mm256_loadu_ps(v + lanes * c);
        for (int m = 0; m < Rows; ++m) {
            const __m256 weight = _mm256_set1_ps(weights[m * tile_rows + r]);
            for (int c = 0; c < Registers; ++c) a[m][c] = _mm256_fmadd_ps(weight, value[c], a[m][c]);
        }
    }
    for (int m = 0; m < Rows; ++m)
        for (int c = 0; c < Registers; ++c) _mm256_storeu_ps(sum + m * stride + lanes * c, a[m][c]);
}

template <int Rows, int Registers>
void accumulate_rows(const float * v, int count, int64_t head, const float * weights, const SoftmaxState * state,
                     float * sum, int64_t stride) {
    for (int64_t c = 0; c < head; c += Registers * lanes)
        accumulate_block<Rows, Registers>(v + c, count, head, weights, state, sum + c, stride);
}

void accumulate(const float * v, int count, int64_t head, const float * weights, const SoftmaxState * state, int rows,
                float * sum, int64_t stride) {
    int m = 0;
    for (; m + 6 <= rows; m += 6)
        accumulate_rows<6, 2>(v, count, head, weights + m * tile_rows, state + m, sum + m * stride, stride);
    for (; m + 4 <= rows; m += 4)
        accumulate_rows<4, 2>(v, count, head, weights + m * tile_rows, state + m, sum + m * stride, stride);
    for (; m < rows; ++m)
        accumulate_rows<1, 4>(v, count, head, weights + m * tile_rows, state + m, sum + m * stride, stride);
}

#ifdef TURBOQUANT_VNNI
// tile: [count / 4][head] dwords. Dwords are permuted before the bytes of four rows are interleaved, as unpacking works
// inside lanes of 128 bits.
void values(const int8_t * level, int count, int64_t head, int8_t * tile) {
    const __m256i order = _mm256_setr_epi32(0, 2, 4, 6, 1, 3, 5, 7);
    for (int r = 0; r < count; r += 4, level += 4 * head)
        for (int64_t c = 0; c < head; c += 32, tile += 128) {
            __m256i row[4];
            for (int i = 0; i < 4; ++i)
                row[i] = _mm256_permutevar8x32_epi32(
                    _mm256_loadu_si256(reinterpret_cast<const __m256i *>(level + i * head + c)), order);
            const __m256i low01 = _mm256_unpacklo_epi8(row[0], row[1]), high01 = _mm256_unpackhi_epi8(row[0], row[1]);
            const __m256i low23 = _mm256_unpacklo_epi8(row[2], row[3]), high23 = _mm256_unpackhi_epi8(row[2], row[3]);
            __m256i * out = reinterpret_cast<__m256i *>(tile);
            _mm256_store_si256(out, _mm256_unpacklo_epi16(low01, low23));
            _mm256_store_si256(out + 1, _mm256_unpackhi_epi16(low01, low23));
            _mm256_store_si256(out + 2, _mm256_unpacklo_epi16(high01, high23));
            _mm256_store_si256(out + 3, _mm256_unpackhi_epi16(high01, high23));
        }
}

// Whether the tile's weights need 16 bits (see coarse_share); a NaN does.
bool needs_16_bits(const float * weights, int count, const SoftmaxState & state) {
    float largest = 0;
    for (int r = 0; r < count; ++r) largest = weights[r] > largest ? weights[r] : largest;
    return !(largest <= coarse_share * state.sum);
}

// A query row's weights times V's scales, as multiples of `unit`: of 8 bits, or the upper and lower bytes of 16.
struct Weights {
    alignas(32) uint8_t high[tile_rows], low[tile_rows];
    float unit;
};

void round_weights(const float * weights, const float * scale, int count, bool fine, Weights & out) {
    const float limit = fine ? 65535.0f : 255.0f;
    alignas(32) float w[tile_rows] = {};
    for (int r = 0; r < count; ++r) w[r] = weights[r] * scale[r];
    __m256i largest = _mm256_setzero_si256(); // of bits: NaN is above all
    for (int r = 0; r < tile_rows; r += lanes)
        largest = _mm256_max_epu32(largest, _mm256_castps_si256(_mm256_load_ps(w + r)));
    __m128i most = _mm_max_epu32(_mm256_castsi256_si128(largest), _mm256_extracti128_si256(largest, 1));
    most = _mm_max_epu32(most, _mm_shuffle_epi32(most, 0x4E));
    most = _mm_max_epu32(most, _mm_shuffle_epi32(most, 0xB1));
    const float top = bits_float(uint32_t(_mm_cvtsi128_si32(most)));
    const bool usable = top > 0 && top < INFINITY;
    out.unit = usable ? top / limit : top; // not finite: the sums must show it
    const __m256 inverse = _mm256_set1_ps(usable ? limit / top : 0.0f);
    const __m256i byte = _mm256_set1_epi16(255), order = _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7);
    for (int r = 0; r < tile_rows; r += 32) {
        __m256i x[4];
        for (int i = 0; i < 4; ++i) {
            const __m256 offset = fine ? _mm256_setzero_ps() : _mm256_load_ps(dither.row + r + lanes * i);
            x[i] = _mm256_cvtps_epi32(_mm256_fmadd_ps(_mm256_load_ps(w + r + lanes * i), inverse, offset));
        }
        const __m256i a = _mm256_packus_epi32(x[0], x[1]), b = _mm256_packus_epi32(x[2], x[3]);
        const __m256i high = _mm256_packus_epi16(_mm256_srli_epi16(a, 8), _mm256_srli_epi16(b, 8));
        const __m256i low = _mm256_packus_epi16(_mm256_and_si256(a, byte), _mm256_and_si256(b, byte));
        _mm256_store_si256(reinterpret_cast<__m256i *>(out.high + r), _mm256_permutevar8x32_epi32(high, order));
        _mm256_store_si256(reinterpret_cast<__m256i *>(out.low + r), _mm256_permutevar8x32_epi32(low, order));
    }
}

// The upper bytes' products with V, shifted, and those of the lower bytes: Rows x 8 * Registers sums in registers.
template <int Rows, int Registers>
void accumulate_levels_block(const int8_t * tile, int count, int64_t head, const Weights * weights, bool fine,
                             const SoftmaxState * state, float * sum, int64_t stride) {
    __m256i a[Rows][Registers];
    for (int m = 0; m < Rows; ++m)
        for (int c = 0; c < Registers; ++c) a[m][c] = _mm256_setzero_si256();
    const auto pass = [&](uint8_t const (Weights::*bytes)[tile_rows]) {
        const int8_t * v = tile;
        for (int r = 0; r < count; r += 4, v += 4 * head) {
            __m256i value[Registers];
            for (int c = 0; c < Registers; ++c)
                value[c] = _mm256_load_si256(reinterpret_cast<const __m256i *>(v + 32 * c));
            for (int m = 0; m < Rows; ++m) {
                const __m256i weight = broadcast4((weights[m].*bytes) + r);
                for (int c = 0; c < Registers; ++c) a[m][c] = dot4(a[m][c], weight, value[c]);
            }
        }
    };
    if (fine) {
        pass(&Weights::high);
        for (int m = 0; m < Rows; ++m)
            for (int c = 0; c < Registers; ++c) a[m][c] = _mm256_slli_epi32(a[m][c], 8);
    }
    pass(&Weights::low);
    for (int m = 0; m < Rows; ++m)
        for (int c = 0; c < Registers; ++c) {
            float * out = sum + m * stride + lanes * c;
            const __m256 before = _mm256_mul_ps(_mm256_set1_ps(state[m].correction), _mm256_loadu_ps(out));
            const __m256 unit = _mm256_set1_ps(weights[m].unit);
            _mm256_storeu_ps(out, _mm256_fmadd_ps(_mm256_cvtepi32_ps(a[m][c]), unit, before));
        }
}

template <int Rows, int Registers>
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
        for (int64_t c = b * block; c < (b + 1) * block; c += Registers * lanes)
            accumulate_levels_block<Rows, Registers>(tile + 4 * c, count, head, rounded, any_fine, state, sum + c, stride);
    }
}

void accumulate_levels(const int8_t * tile, const float * scale, int block, int count, int64_t head,
                       const float * weights, const SoftmaxState * state, int rows, float * sum, int64_t stride) {
    int m = 0;
    for (; m + 4 <= rows; m += 4)
        accumulate_levels_rows<4, 2>(tile, scale, block, count, head, weights + m * tile_rows, state + m,
                                     sum + m * stride, stride);
    for (; m < rows; ++m)
        accumulate_levels_rows<1, 4>(tile, scale, block, count, head, weights + m * tile_rows, state + m,
                                     sum + m * stride, stride);
}
#else
constexpr decltype(Kernels::values) values = nullptr;
constexpr decltype(Kernels::accumulate_levels) accumulate_levels = nullptr;
#endif

void load_f16(const uint8_t * src, float * dst, int64_t n) {
    for (int64_t i = 0; i < n; i += lanes)
        _mm256_storeu_ps(dst + i, _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i *>(src + 2 * i))));
}

void query_plain(const float * src, void * dst, int64_t blocks) {
    auto * out = static_cast<tq_query32 *>(dst);
    for (int64_t b = 0; b < blocks; ++b, src += 32, ++out) {
        __m256 x[4];
        load<32>(src, x);
        const float largest = bits_float(largest_bits<32>(x));
        if (!(largest < INFINITY) || largest == 0) {
            std::memset(out, 0, sizeof(*out));
            out->scale = largest == 0 ? 0.0f : NAN;
            continue;
        }
        const __m256 inverse = _mm256_set1_ps(127.0f / largest);
        __m256i q[4];
        for (int r = 0; r < 4; ++r) q[r] = _mm256_cvtps_epi32(_mm256_mul_ps(x[r], inverse));
        const __m256i words = _mm256_packs_epi16(_mm256_packs_epi32(q[0], q[1]), _mm256_packs_epi32(q[2], q[3]));
        _mm256_storeu_si256(reinterpret_cast<__m256i *>(out->q),
                            _mm256_permutevar8x32_epi32(words, _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7)));
        out->sum = reduce_add(_mm256_add_epi32(_mm256_add_epi32(q[0], q[1]), _mm256_add_epi32(q[2], q[3])));
        out->scale = largest / 127.0f;
    }
}

#ifdef TURBOQUANT_VNNI
constexpr decltype(Kernels::lowest) lowest = nullptr;
#else
bool lowest(const int8_t * level, int64_t n) {
    __m256i least = _mm256_setzero_si256();
    for (int64_t i = 0; i < n; i += 32)
        least = _mm256_min_epi8(least, _mm256_loadu_si256(reinterpret_cast<const __m256i *>(level + i)));
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
