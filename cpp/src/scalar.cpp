// The specification in code, with plain loops and without intrinsics. The vector kernels (generic/) have the same
// functions in the same order, and must give the same bytes and floats.
#include "attention_tile.h"
#include "format.h"
#include "generic/scores_plain.h"
#include "generic/trellis.h"
#include "kernels.h"

namespace turboquant {
namespace {

// H_n, unnormalised. The stages run from h = 1 upwards: float addition is not associative, so the order is part of the
// specification.
template <int N, typename T> void hadamard(T * y) {
    for (int h = 1; h < N; h *= 2)
        for (int i = 0; i < N; i += 2 * h)
            for (int j = i; j < i + h; ++j) {
                const T a = y[j], b = y[j + h];
                y[j] = T(a + b);
                y[j + h] = T(a - b);
            }
}

float flip(float x, const uint8_t * signs, int i) { return sign_bit(signs, i) ? -x : x; }

// The bits of the largest |x|. As integers, these bits are ordered like the floats, and every NaN is above infinity.
template <int N> uint32_t largest_bits(const float * x) {
    uint32_t largest = 0;
    for (int i = 0; i < N; ++i) {
        const uint32_t b = float_bits(x[i]) & 0x7fffffff;
        largest = b > largest ? b : largest;
    }
    return largest;
}

// y = S2 . H . S1 . (x * 2^-k), unnormalised.
template <int N> void forward(const float * x, float scale, float * y) {
    for (int i = 0; i < N; ++i) y[i] = flip(x[i] * scale, signs1, i);
    hadamard<N>(y);
    for (int i = 0; i < N; ++i) y[i] = flip(y[i], signs2, i);
}

// Sixteen running sums, whose upper half is then added to the lower half repeatedly. Registers of 16, 8 and 4 floats
// can all keep this order.
template <int N> float sum_of_squares(const float * y) {
    float lane[16] = {};
    for (int i = 0; i < N; i += 16)
        for (int l = 0; l < 16; ++l) lane[l] += y[i + l] * y[i + l];
    for (int h = 8; h > 0; h /= 2)
        for (int l = 0; l < h; ++l) lane[l] += lane[l + h];
    return lane[0];
}

template <int N> void rotate(const float * src, float * dst, int64_t blocks) {
    for (int64_t b = 0; b < blocks; ++b, src += N, dst += N) {
        float y[N];
        forward<N>(src, 1.0f, y);
        for (int i = 0; i < N; ++i) dst[i] = y[i] * Block<N>::one_over_sqrt_n;
    }
}

template <int N> void unrotate(const float * src, float * dst, int64_t blocks) {
    for (int64_t b = 0; b < blocks; ++b, src += N, dst += N) {
        float y[N];
        for (int i = 0; i < N; ++i) y[i] = flip(src[i], signs2, i);
        hadamard<N>(y);
        for (int i = 0; i < N; ++i) dst[i] = flip(y[i] * Block<N>::one_over_sqrt_n, signs1, i);
    }
}

template <int N> void query(const float * src, void * dst, int64_t blocks) {
    auto * out = static_cast<typename QueryBlock<N>::type *>(dst);
    for (int64_t b = 0; b < blocks; ++b, src += N, ++out) {
        std::memset(out, 0, sizeof(*out));
        const uint32_t bits = largest_bits<N>(src);
        if (bits == 0) continue;
        if (bits >= 0x7f800000) {
            out->scale = NAN;
            continue;
        }
        const int k = scale_exponent(bits);
        float y[N];
        forward<N>(src, power_of_two(-k), y);
        const float largest = bits_float(largest_bits<N>(y));
        const float inverse = 127.0f / largest;
        for (int i = 0; i < N; ++i) {
            out->q[i] = int8_t(std::nearbyint(y[i] * inverse));
            out->sum += out->q[i];
        }
        out->scale = largest * Block<N>::query_scale * power_of_two(k);
    }
}

template <int N> struct Encoding : EncodingBase {
    int16_t z[N], magnitude[N];
    int coarse[N];
};

// Rotates a block and rounds it to integers in units of RMS / 2048.
template <int N> void transform(const float * x, Encoding<N> & work) {
    work.largest = largest_bits<N>(x);
    if (!work.codable()) return;
    work.k = scale_exponent(work.largest);
    float y[N];
    forward<N>(x, power_of_two(-work.k), y);
    work.rms = std::sqrt(sum_of_squares<N>(y) * (1.0f / N));
    const float unit = rms_unit / work.rms;
    work.energy = 0;
    for (int i = 0; i < N; ++i) {
        work.z[i] = int16_t(std::nearbyint(y[i] * unit));
        work.magnitude[i] = int16_t(work.z[i] < 0 ? -work.z[i] : work.z[i]);
        work.energy += int32_t(work.z[i]) * work.z[i];
        const int r = (work.magnitude[i] + coarse_unit / 2) / coarse_unit;
        work.coarse[i] = r > 127 ? 127 : r;
    }
}

// Searches the scale whose thresholds give the least squared error, in coarse units.
template <typename F> void search(Encoding<F::block> * work, int count) {
    constexpr int N = F::block;
    for (Encoding<N> * w = work; w < work + count; ++w) {
        if (!w->codable()) continue;
        double best = -1.0;
        for (int s = 0; s < search_steps; ++s) {
            int32_t a = 0, b = 0;
            for (int i = 0; i < N; ++i) {
                int m = 0;
                for (int t = 0; t < F::half_levels - 1; ++t) m += w->coarse[i] > F::coarse_thresholds[s][t];
                a += w->coarse[i] * F::magnitudes[m];
                b += F::magnitudes[m] * F::magnitudes[m];
            }
            const double e = explained(a, b);
            if (e > best) {
                w->scale = least_squares_scale(a, b);
                best = e;
            }
        }
    }
}

// Assigns the nearest centroids under that scale at full precision, and computes the stored scale.
template <typename F> void assign(const Encoding<F::block> & work, uint8_t * dst, tq_encode_report * report) {
    constexpr int N = F::block, M = F::half_levels;
    std::memset(dst, 0, F::bytes);
    if (!work.codable()) {
        report->nonfinite += work.largest != 0;
        return;
    }
    int16_t thresholds[M];
    thresholds_under<typename F::family>(work.scale, thresholds);
    uint8_t index[N];
    int32_t a = 0;
    for (int i = 0; i < N; ++i) {
        int m = 0;
        for (int t = 0; t < M - 1; ++t) m += work.magnitude[i] > thresholds[t];
        a += work.magnitude[i] * F::magnitudes[m];
        index[i] = uint8_t(work.z[i] < 0 ? M - 1 - m : M + m);
    }
    const uint16_t d = block_scale<F>(work, a, &report->saturated);
    if (d == 0) return; // too small for fp16: a zero block
    store16(dst, d);
    F::family::template pack<N>(index, dst + 2);
}

template <int Bits, int N>
void encode_blocks(Format<LloydMax<Bits>, N>, Encoding<N> * work, int count, uint8_t * dst, tq_encode_report * report) {
    using F = Format<LloydMax<Bits>, N>;
    search<F>(work, count);
    for (int g = 0; g < count; ++g) assign<F>(work[g], dst + g * F::bytes, report);
}

template <int Bits, int N>
void encode_blocks(Format<Trellis<Bits>, N>, Encoding<N> * work, int count, uint8_t * dst, tq_encode_report * report) {
    using F = Format<Trellis<Bits>, N>;
    for (int g = 0; g < count; ++g) encode_trellis<F>(work[g].z, work[g], dst + g * F::bytes, report);
}

template <typename F> void encode(const float * src, uint8_t * dst, int64_t blocks, tq_encode_report * report) {
    constexpr int N = F::block;
    for (int64_t first = 0; first < blocks; first += encode_group) { // groups, so that latencies overlap
        const int count = int(blocks - first < encode_group ? blocks - first : encode_group);
        Encoding<N> work[encode_group];
        for (int g = 0; g < count; ++g) transform(src + (first + g) * N, work[g]);
        encode_blocks(F(), work, count, dst + first * F::bytes, report);
    }
}

// Decodes in integers up to the last step, as |W| <= 128 * 127 fits int16. Only the final multiplications round.
template <typename F> void decode(const uint8_t * src, float * dst, int64_t blocks) {
    constexpr int N = F::block;
    for (int64_t b = 0; b < blocks; ++b, src += F::bytes, dst += N) {
        const float scale = F::load_scale(src) * F::step_n;
        int8_t level[N];
        F::expand(src + 2, level);
        int16_t w[N];
        for (int i = 0; i < N; ++i) w[i] = int16_t(sign_bit(signs2, i) ? -level[i] : level[i]);
        hadamard<N>(w);
        for (int i = 0; i < N; ++i) dst[i] = flip(scale * float(w[i]), signs1, i);
    }
}

template <typename F> void decode_rotated(const uint8_t * src, float * dst, int64_t blocks) {
    constexpr int N = F::block;
    for (int64_t b = 0; b < blocks; ++b, src += F::bytes, dst += N) {
        const float scale = F::load_scale(src) * F::step;
        int8_t level[N];
        F::expand(src + 2, level);
        for (int i = 0; i < N; ++i) dst[i] = scale * float(level[i]);
    }
}

template <typename F> float dot(const uint8_t * src, const void * query, int64_t blocks) {
    constexpr int N = F::block;
    auto * q = static_cast<const typename QueryBlock<N>::type *>(query);
    float sum = 0;
    for (int64_t b = 0; b < blocks; ++b, src += F::bytes, ++q) {
        int8_t level[N];
        F::expand(src + 2, level);
        int32_t product = 0;
        for (int i = 0; i < N; ++i) product += int32_t(level[i]) * q->q[i];
        sum += F::load_scale(src) * F::step * q->scale * float(product);
    }
    return sum;
}

template <typename F> void block_levels(F, const uint8_t * q, int8_t * level) { F::expand(q, level); }

constexpr decltype(Kernels::softmax) softmax = softmax_tile;

void accumulate(const float * v, int count, int64_t head, const float * weights, const SoftmaxState * state, int rows,
                float * sum, int64_t stride) {
    for (int m = 0; m < rows; ++m) {
        float * out = sum + m * stride;
        for (int64_t c = 0; c < head; ++c) out[c] *= state[m].correction;
        for (int r = 0; r < count; ++r)
            for (int64_t c = 0; c < head; ++c) out[c] += weights[m * tile_rows + r] * v[r * head + c];
    }
}

constexpr decltype(Kernels::values) values = nullptr;
constexpr decltype(Kernels::accumulate_levels) accumulate_levels = nullptr;

void load_f16(const uint8_t * src, float * dst, int64_t n) {
    for (int64_t i = 0; i < n; ++i) dst[i] = half_to_float(load16(src + 2 * i));
}

void query_plain(const float * src, void * dst, int64_t blocks) {
    auto * out = static_cast<tq_query32 *>(dst);
    for (int64_t b = 0; b < blocks; ++b, src += 32, ++out) {
        std::memset(out, 0, sizeof(*out));
        const float largest = bits_float(largest_bits<32>(src)), inverse = 127.0f / largest;
        if (!(largest < INFINITY)) out->scale = NAN;
        if (!(largest < INFINITY) || inverse == INFINITY) continue; // zero, or so small that the query rounds to zero
        for (int i = 0; i < 32; ++i) {
            out->q[i] = int8_t(std::nearbyint(src[i] * inverse));
            out->sum += out->q[i];
        }
        out->scale = largest / 127.0f;
    }
}

constexpr decltype(Kernels::lowest) lowest = nullptr;

} // namespace

const Kernels kernels_scalar = TURBOQUANT_KERNELS_TABLE("scalar");

} // namespace turboquant
