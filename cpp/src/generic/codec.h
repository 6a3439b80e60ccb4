// The vector kernels of the codec, written once: the functions of scalar.cpp in the same order, over the primitives
// below, which an ISA file defines before it includes this file. Everything here has internal linkage and is compiled
// with the flags of the ISA.
//
//   lanes                     floats in a register, which has as many ints, twice as many words, four times as many
// bytes
//   floats, ints, words, bytes, Steps
//                             registers of float, int32, int16, int8; one int32 for each step of the search
//   load, load_bytes, store   loads and stores without alignment
//   all, all_words, zero_ints the same value in every lane
//   mul, add, sub             arithmetic of floats, rounded after each operation; add and sub also of words
//   flip_signs(x, bits)       x with its signs changed where the sign bits at `bits` are set
//   butterflies<R>            the Hadamard stages inside each of R registers of floats or words
//   reduce_add                the sum of ints; the sum of floats, computed as in sum_of_squares of scalar.cpp
//   max_magnitude(m, x)       the greater of m and the bits of |x|, as ints; largest_lane: the greatest lane as uint32
//   store_rounded             stores byte_registers of floats, times a factor, rounded to int8; adds them to a sum
//   round_words(a, b, unit)   two registers of floats times unit, rounded to words
//   abs_words, xor_words, add_greater(m, x, t), select_negative(z, flags)
//                             |x|; a ^ b; m + 1 in lanes with x > t; the flags in lanes with z < 0
//   multiply_add_words, multiply_add_bytes
//                             ints plus products; bytes are in 0 ... 127
//   store_coarse, load_coarse word_registers of magnitudes in coarse units, limited to 127, in any order
//   store_low_bytes           stores word_registers of words as bytes
//   centroids_under<Family>   the centroids of coarse magnitudes in a step of the search
//   look_up<Family>           the centroid for each number of exceeded thresholds
//   reduce_steps, choose      the sums of each step for the blocks of a register; keeps the scale of the best step
//   Levels                    the int8 levels of a block
//   pack, expand              overloads for the families' layouts; families without them use their own plain code
//   transform_levels          applies S2 and the Hadamard transform to levels, in words
//   floats_of<Half>           half a register of words as floats
//   store_scaled, store_levels
//                             stores levels times a scale as floats; stores levels
//   load_query, level_offset, offset_levels, multiply_add_levels
//                             loads a prepared query; adds level_offset to levels; ints plus offset levels times
// queries
#ifndef TURBOQUANT_GENERIC_CODEC_H
#define TURBOQUANT_GENERIC_CODEC_H

namespace turboquant {
namespace {

TURBOQUANT_INLINE floats flip(floats x, const uint32_t * bits, int r) { return flip_signs(x, bits + lanes * r); }

// The stages between registers, as templates, so that the compiler unrolls all of them and keeps y in registers.
template <int R, int H = 1, typename Register> TURBOQUANT_INLINE void across_registers(Register * y) {
    if constexpr (H < R) {
        for (int i = 0; i < R / 2; ++i) {
            const int j = i / H * 2 * H + i % H;
            const Register a = y[j], b = y[j + H];
            y[j] = add(a, b);
            y[j + H] = sub(a, b);
        }
        across_registers<R, 2 * H>(y);
    }
}

template <int N> TURBOQUANT_INLINE void hadamard(floats * y) {
    butterflies<N / lanes>(y);
    across_registers<N / lanes>(y);
}

// In words of 16 bits. The arithmetic is exact, so the order of the stages is free.
template <int N> TURBOQUANT_INLINE void hadamard(words * w) {
    across_registers<N / (2 * lanes)>(w);
    butterflies<N / (2 * lanes)>(w);
}

template <int N> TURBOQUANT_INLINE uint32_t largest_bits(const floats * x) {
    ints largest = zero_ints();
    for (int r = 0; r < N / lanes; ++r) largest = max_magnitude(largest, x[r]);
    return largest_lane(largest);
}

template <int N> TURBOQUANT_INLINE uint32_t largest_bits(const float * x) {
    ints largest = zero_ints();
    for (int r = 0; r < N / lanes; ++r) largest = max_magnitude(largest, load(x + lanes * r));
    return largest_lane(largest);
}

template <int N> TURBOQUANT_INLINE void forward(const float * x, float scale, floats * y) {
    const floats s = all(scale);
    for (int r = 0; r < N / lanes; ++r) y[r] = flip(mul(load(x + lanes * r), s), sign_tables.bits1, r);
    hadamard<N>(y);
    for (int r = 0; r < N / lanes; ++r) y[r] = flip(y[r], sign_tables.bits2, r);
}

// Sixteen running sums.
template <int N> float sum_of_squares(const floats * y) {
    constexpr int registers = 16 / lanes;
    floats sum[registers];
    for (int r = 0; r < registers; ++r) sum[r] = mul(y[r], y[r]);
    for (int i = registers; i < N / lanes; i += registers)
        for (int r = 0; r < registers; ++r) sum[r] = add(sum[r], mul(y[i + r], y[i + r]));
    for (int h = registers / 2; h > 0; h /= 2)
        for (int r = 0; r < h; ++r) sum[r] = add(sum[r], sum[r + h]);
    return reduce_add(sum[0]);
}

// The transform and its inverse differ in which signs come first.
template <int N>
TURBOQUANT_INLINE void transform_blocks(const float * src, float * dst, int64_t blocks, const uint32_t * before,
                                        const uint32_t * after) {
    const floats norm = all(Block<N>::one_over_sqrt_n);
    for (int64_t b = 0; b < blocks; ++b, src += N, dst += N) {
        floats y[N / lanes];
        for (int r = 0; r < N / lanes; ++r) y[r] = flip(load(src + lanes * r), before, r);
        hadamard<N>(y);
        for (int r = 0; r < N / lanes; ++r) store(dst + lanes * r, flip(mul(y[r], norm), after, r));
    }
}
template <int N> void rotate(const float * src, float * dst, int64_t blocks) {
    transform_blocks<N>(src, dst, blocks, sign_tables.bits1, sign_tables.bits2);
}
template <int N> void unrotate(const float * src, float * dst, int64_t blocks) {
    transform_blocks<N>(src, dst, blocks, sign_tables.bits2, sign_tables.bits1);
}

// Stores y * inverse rounded to int8, and returns the sum.
template <int N> TURBOQUANT_INLINE int32_t round_to_bytes(const floats * y, float inverse, int8_t * q) {
    const floats factor = all(inverse);
    ints sum = zero_ints();
    for (int r = 0; r < N / lanes; r += byte_registers) sum = store_rounded(y + r, factor, q + lanes * r, sum);
    return reduce_add(sum);
}

template <int N> void query(const float * src, void * dst, int64_t blocks) {
    auto * out = static_cast<typename QueryBlock<N>::type *>(dst);
    for (int64_t b = 0; b < blocks; ++b, src += N, ++out) {
        const uint32_t bits = largest_bits<N>(src);
        if (bits == 0 || bits >= 0x7f800000) {
            std::memset(out, 0, sizeof(*out));
            if (bits) out->scale = NAN;
            continue;
        }
        const int k = scale_exponent(bits);
        floats y[N / lanes];
        forward<N>(src, power_of_two(-k), y);
        const float largest = bits_float(largest_bits<N>(y));
        out->sum = round_to_bytes<N>(y, 127.0f / largest, out->q);
        out->scale = largest * Block<N>::query_scale * power_of_two(k);
    }
}

template <typename Family, int N>
TURBOQUANT_INLINE void pack(Format<Family, N>, const uint8_t * index, uint8_t * q) {
    Family::template pack<N>(index, q);
}

template <typename Family, int N> TURBOQUANT_INLINE Levels<N> expand(Format<Family, N>, const uint8_t * q) {
    alignas(64) int8_t level[N > 4 * lanes ? N : 4 * lanes] = {};
    Family::template expand<N>(q, level);
    Levels<N> out;
    for (int r = 0; r < Levels<N>::registers; ++r) out.v[r] = load_bytes(level + 4 * lanes * r);
    return out;
}

template <int N> struct Encoding : EncodingBase {
    static constexpr int registers = N / (2 * lanes);
    words z[registers], magnitude[registers];
};

// Number of blocks whose coarse magnitudes fill a register of bytes.
template <int N> constexpr int searched_together = 4 * lanes > N ? 4 * lanes / N : 1;

template <int N> void transform(const float * x, Encoding<N> & work, int8_t * coarse) {
    work.largest = largest_bits<N>(x);
    if (!work.codable()) {
        std::memset(coarse, 0, N); // the search reads it together with a neighbour
        return;
    }
    work.k = scale_exponent(work.largest);
    floats y[N / lanes];
    forward<N>(x, power_of_two(-work.k), y);
    work.rms = std::sqrt(sum_of_squares<N>(y) * (1.0f / N));
    const floats unit = all(rms_unit / work.rms);
    ints energy = zero_ints();
    for (int r = 0; r < work.registers; ++r) {
        work.z[r] = round_words(y[2 * r], y[2 * r + 1], unit);
        work.magnitude[r] = abs_words(work.z[r]);
        energy = multiply_add_words(energy, work.z[r], work.z[r]);
    }
    work.energy = reduce_add(energy);
    for (int r = 0; r < work.registers; r += word_registers) store_coarse(work.magnitude + r, coarse + 2 * lanes * r);
}

template <typename F> void search(Encoding<F::block> * work, const int8_t * coarse, int count) {
    constexpr int N = F::block;
    constexpr int registers = Levels<N>::registers, together = searched_together<N>;
    for (int w = 0; w < count; w += together, coarse += together * N) {
        if (together == 1 && !work[w].codable()) continue;
        bytes x[registers];
        for (int r = 0; r < registers; ++r) x[r] = load_coarse(coarse + 4 * lanes * r);
        ints as[search_steps], bs[search_steps];
        for (int s = 0; s < search_steps; ++s) {
            as[s] = bs[s] = zero_ints();
            for (int r = 0; r < registers; ++r) {
                const bytes c = centroids_under<typename F::family>(s, x[r]);
                as[s] = multiply_add_bytes(as[s], x[r], c);
                bs[s] = multiply_add_bytes(bs[s], c, c);
            }
        }
        Steps a[together], b[together];
        reduce_steps<together>(as, a);
        reduce_steps<together>(bs, b);
        for (int i = 0; i < together; ++i)
            if (w + i < count && work[w + i].codable()) choose(work[w + i], a[i], b[i]);
    }
}

template <typename F> void assign(const Encoding<F::block> & work, uint8_t * dst, tq_encode_report * report) {
    constexpr int N = F::block, M = F::half_levels;
    if (!work.codable()) {
        std::memset(dst, 0, F::bytes);
        report->nonfinite += work.largest != 0;
        return;
    }
    int16_t thresholds[M];
    thresholds_under<typename F::family>(work.scale, thresholds);
    ints a = zero_ints();
    words m[work.registers];
    for (int r = 0; r < work.registers; ++r) {
        m[r] = all_words(0);
        for (int t = 0; t < M - 1; ++t) m[r] = add_greater(m[r], work.magnitude[r], all_words(thresholds[t]));
        a = multiply_add_words(a, work.magnitude[r], look_up<typename F::family>(m[r]));
        // M - 1 - m is M + m with all bits inverted
        m[r] = xor_words(add(m[r], all_words(M)), select_negative(work.z[r], all_words(2 * M - 1)));
    }
    const uint16_t d = block_scale<F>(work, reduce_add(a), &report->saturated);
    if (d == 0) {
        std::memset(dst, 0, F::bytes);
        return;
    }
    alignas(64) uint8_t index[N];
    for (int r = 0; r < work.registers; r += word_registers) store_low_bytes(m + r, index + 2 * lanes * r);
    store16(dst, d);
    pack(F(), index, dst + 2);
}

template <int Bits, int N>
TURBOQUANT_INLINE void encode_blocks(Format<LloydMax<Bits>, N>, Encoding<N> * work, int8_t * coarse, int count,
                                     uint8_t * dst, tq_encode_report * report) {
    using F = Format<LloydMax<Bits>, N>;
    if (count % searched_together<N>) std::memset(coarse + count * N, 0, N);
    search<F>(work, coarse, count);
    for (int g = 0; g < count; ++g) assign<F>(work[g], dst + g * F::bytes, report);
}

template <typename F> void encode(const float * src, uint8_t * dst, int64_t blocks, tq_encode_report * report) {
    constexpr int N = F::block;
    for (int64_t first = 0; first < blocks; first += encode_group) { // groups, so that latencies overlap
        const int count = int(blocks - first < encode_group ? blocks - first : encode_group);
        Encoding<N> work[encode_group];
        alignas(64) int8_t coarse[encode_group * N];
        for (int g = 0; g < count; ++g) transform(src + (first + g) * N, work[g], coarse + g * N);
        encode_blocks(F(), work, coarse, count, dst + first * F::bytes, report);
    }
}

template <typename F> void decode(const uint8_t * src, float * dst, int64_t blocks) {
    constexpr int N = F::block;
    for (int64_t b = 0; b < blocks; ++b, src += F::bytes, dst += N) {
        const floats scale = all(F::load_scale(src) * F::step_n);
        words w[N / (2 * lanes)];
        transform_levels<N>(expand(F(), src + 2), w);
        for (int r = 0; r < N / (2 * lanes); ++r) {
            float * out = dst + 2 * lanes * r;
            store(out, flip(mul(scale, floats_of<0>(w[r])), sign_tables.bits1, 2 * r));
            store(out + lanes, flip(mul(scale, floats_of<1>(w[r])), sign_tables.bits1, 2 * r + 1));
        }
    }
}

template <typename F> void decode_rotated(const uint8_t * src, float * dst, int64_t blocks) {
    constexpr int N = F::block;
    for (int64_t b = 0; b < blocks; ++b, src += F::bytes, dst += N)
        store_scaled<N>(dst, expand(F(), src + 2), all(F::load_scale(src) * F::step));
}

template <int N> TURBOQUANT_INLINE int32_t dot_block(const Levels<N> & level, const typename QueryBlock<N>::type & q) {
    ints sum = zero_ints();
    for (int r = 0; r < Levels<N>::registers; ++r)
        sum = multiply_add_levels(sum, offset_levels(level.v[r]), load_query<N>(q.q + 4 * lanes * r));
    return reduce_add(sum) - level_offset * q.sum;
}

template <typename F> float dot(const uint8_t * src, const void * query, int64_t blocks) {
    constexpr int N = F::block;
    auto * q = static_cast<const typename QueryBlock<N>::type *>(query);
    float sum = 0;
    for (int64_t b = 0; b < blocks; ++b, src += F::bytes, ++q)
        sum += F::load_scale(src) * F::step * q->scale * float(dot_block<N>(expand(F(), src + 2), *q));
    return sum;
}

} // namespace
} // namespace turboquant

#endif
