// What the numbers mean: decoding, rotation and dot products against their formulas in double precision, the encoder's
// error against theory, exact recovery of points that the format can represent. With the default kernels; test_kernels
// ties all others to scalar.
#include "check.h"
#include "inputs.h"

#include <algorithm>
#include <vector>

namespace {

// Error classes.
constexpr double float_rotation = 4e-7; // of the block's norm: the transform's log2(n) roundings
constexpr double float_rounding = 3e-7; // relative, of one value: a few roundings after exact integers
constexpr double query_rounding = 0.5;  // of one int8 unit of a prepared query, per value

double sign(int which, int i) { return (tq_signs(which)[i / 8] >> (i % 8)) & 1 ? -1 : 1; }

double hadamard(int i, int j) { // entry of H_n
    int parity = 0;
    for (unsigned b = unsigned(i & j); b; b >>= 1) parity ^= int(b & 1);
    return parity ? -1 : 1;
}

// S2 . H/sqrt(n) . S1 . x and its inverse, by the definition.
std::vector<double> rotated(const float * x, int n) {
    std::vector<double> y(size_t(n), 0.0);
    for (int i = 0; i < n; ++i) {
        for (int j = 0; j < n; ++j) y[size_t(i)] += hadamard(i, j) * sign(1, j) * x[j];
        y[size_t(i)] *= sign(2, i) / std::sqrt(double(n));
    }
    return y;
}
std::vector<double> unrotated(const double * y, int n) {
    std::vector<double> x(size_t(n), 0.0);
    for (int i = 0; i < n; ++i) {
        for (int j = 0; j < n; ++j) x[size_t(i)] += hadamard(i, j) * sign(2, j) * y[j];
        x[size_t(i)] *= sign(1, i) / std::sqrt(double(n));
    }
    return x;
}

double norm(const std::vector<double> & v) {
    double sum = 0;
    for (const double x : v) sum += x * x;
    return std::sqrt(sum);
}

// The first two bytes without what is not the scale.
int scale_word(const tq_type_info & t, const uint8_t * block) {
    return (block[0] | block[1] << 8) & (is_trellis(t) ? 0x3ff : 0xffff);
}
// The difference of the words of two scales of which one is the double of the other.
int scale_octave(const tq_type_info & t) { return is_trellis(t) ? 1 << 5 : 1 << 10; }

double scale_of(const tq_type_info & t, const uint8_t * block) {
    const int word = scale_word(t, block);
    return float_of_binary16(uint16_t(is_trellis(t) ? word << 5 : word));
}

// The number of element i's level, bit by bit as the layout is written in FORMAT.md.
int level_number(const tq_type_info & t, const uint8_t * block, int i) {
    const int n = t.block;
    // the bit, or the two bits, of element i in a field that begins at byte `first`
    const auto bit = [&](int first) { return (block[first + i % (n / 8)] >> (i / (n / 8))) & 1; };
    const auto crumb = [&](int first) { return (block[first + i % (n / 4)] >> (2 * (i / (n / 4)))) & 3; };
    const auto subset = [&] {
        const int step = i % (n / 8) * 8 + i / (n / 8);
        const auto u = [&](int back) { return (block[(16 + step - back) / 8] >> ((16 + step - back) % 8)) & 1; };
        return (u(2) ^ u(5)) + 2 * (u(0) ^ u(1) ^ u(6));
    };
    switch (t.family) {
        case TQ_TURBO4: return i < n / 2 ? block[2 + i] & 15 : block[2 + i - n / 2] >> 4;
        case TQ_TURBO3: return crumb(2) + 4 * ((block[2 + n / 4 + i / 8] >> (i % 8)) & 1);
        case TQ_TURBO2: return crumb(2);
        case TQ_TURBO4_TCQ: return subset() + 4 * crumb(2 + n / 8) + 16 * bit(2 + n / 8 + n / 4);
        case TQ_TURBO3_TCQ: return subset() + 4 * crumb(2 + n / 8);
        case TQ_TURBO2_TCQ: return subset() + 4 * bit(2 + n / 8);
        default:
            std::fprintf(stderr, "test_codec: the layout of %s is to be written here\n", t.name);
            std::exit(EXIT_FAILURE);
    }
}

std::vector<double> rotated_values(const tq_type_info & t, const uint8_t * block) {
    std::vector<double> y(static_cast<size_t>(t.block));
    const double d = scale_of(t, block);
    for (int i = 0; i < t.block; ++i) y[size_t(i)] = d * double(t.step) * t.codebook[level_number(t, block, i)];
    return y;
}

void rotation_is_the_formula() {
    for (const int n : {128, 64, 32}) {
        Random r{uint64_t(n)};
        float x[128], y[128], back[128];
        for (int repeat = 0; repeat < 50; ++repeat) {
            check::Case case_("block ", n, ", repeat ", repeat);
            for (int i = 0; i < n; ++i) x[i] = r.normal();
            const std::vector<double> want = rotated(x, n);
            const double bound = float_rotation * norm(want);
            CHECK_EQ(tq_rotate(n, x, y, n, 1), TQ_OK);
            for (int i = 0; i < n; ++i) CHECK(std::fabs(y[i] - want[size_t(i)]) <= bound);
            CHECK_EQ(tq_unrotate(n, y, back, n, 1), TQ_OK);
            for (int i = 0; i < n; ++i) CHECK(std::fabs(back[i] - x[i]) <= 2 * bound);
        }
    }
}

void decoding_is_the_formula() {
    for (int t = 0; t < TQ_TYPE_COUNT; ++t) {
        const tq_type_info & info = *tq_type_get(tq_type(t));
        check::Case type_case(info.name);
        Random r(uint64_t(20 + t));
        uint8_t block[66];
        float x[128], y[128];
        for (int repeat = 0; repeat < 100; ++repeat) {
            for (int i = 0; i < info.block_bytes; ++i) block[i] = uint8_t(r.bits());
            const int exponent = 31 * scale_octave(info);
            if ((scale_word(info, block) & exponent) == exponent) block[1] &= is_trellis(info) ? 0xfd : 0xbf; // finite
            const std::vector<double> want_y = rotated_values(info, block);
            const std::vector<double> want_x = unrotated(want_y.data(), info.block);
            tq_decode_row(tq_type(t), block, x, info.block);
            CHECK_EQ(tq_decode_rotated(tq_type(t), block, sizeof(block), y, info.block, 1, info.block, 1), TQ_OK);
            for (int i = 0; i < info.block; ++i) {
                const double tiny = 1e-12 * norm(want_y); // the double-precision formula's own rounding
                CHECK(std::fabs(y[i] - want_y[size_t(i)]) <= float_rounding * std::fabs(want_y[size_t(i)]));
                CHECK(std::fabs(x[i] - want_x[size_t(i)]) <= float_rounding * std::fabs(want_x[size_t(i)]) + tiny);
            }
        }
    }
}

void dot_is_the_formula() {
    for (int t = 0; t < TQ_TYPE_COUNT; ++t) {
        const tq_type_info & info = *tq_type_get(tq_type(t));
        check::Case type_case(info.name);
        Random r(uint64_t(40 + t));
        const int64_t n = 3 * info.block;
        std::vector<float> x(static_cast<size_t>(n)), q(static_cast<size_t>(n));
        std::vector<uint8_t> row(tq_row_bytes(tq_type(t), n)), query(tq_query_bytes(info.block, n));
        for (int repeat = 0; repeat < 50; ++repeat) {
            for (float & v : x) v = r.normal();
            for (float & v : q) v = r.normal();
            tq_encode_row(tq_type(t), x.data(), row.data(), n);
            tq_query_row(info.block, q.data(), query.data(), n);
            double exact = 0, prepared = 0, magnitude = 0, bound = 0;
            for (int b = 0; b < 3; ++b) {
                const std::vector<double> y = rotated_values(info, row.data() + b * info.block_bytes);
                const std::vector<double> rq = rotated(q.data() + b * info.block, info.block);
                const uint8_t * p = query.data() + size_t(b) * (size_t(info.block) + 8);
                float scale;
                int32_t sum, want_sum = 0;
                std::memcpy(&scale, p, 4);
                std::memcpy(&sum, p + 4, 4);
                for (int i = 0; i < info.block; ++i) {
                    const int level = int8_t(p[8 + i]);
                    want_sum += level;
                    CHECK(std::fabs(level * double(scale) - rq[size_t(i)]) <= query_rounding * double(scale) * 1.0001);
                    exact += rq[size_t(i)] * y[size_t(i)];
                    prepared += level * double(scale) * y[size_t(i)];
                    magnitude += std::fabs(level * double(scale) * y[size_t(i)]);
                    bound += query_rounding * 1.0001 * double(scale) * std::fabs(y[size_t(i)]);
                }
                CHECK_EQ(sum, want_sum);
            }
            const double got = tq_dot_row(tq_type(t), row.data(), query.data(), n);
            CHECK(std::fabs(got - prepared) <= 1e-6 * magnitude);
            CHECK(std::fabs(got - exact) <= bound + 1e-6 * magnitude);
        }
    }
}

// Queries of every magnitude that float32 has, subnormals included.
void query_keeps_magnitude() {
    for (const int n : {128, 64, 32}) {
        Random r{uint64_t(n)};
        float x[128], scale;
        uint32_t query[34];
        for (int exponent = -140; exponent <= 120; exponent += 5) {
            check::Case case_("block ", n, ", 2^", exponent);
            for (int i = 0; i < n; ++i) x[i] = std::ldexp(r.normal(), exponent);
            const std::vector<double> want = rotated(x, n);
            CHECK_EQ(tq_query(n, x, query, n), TQ_OK);
            std::memcpy(&scale, query, 4);
            CHECK(scale > 0);
            const double bound = query_rounding * 1.0001 * double(scale) + 127 * 0x1p-149; // the scale may be subnormal
            for (int i = 0; i < n; ++i) {
                const int level = reinterpret_cast<const int8_t *>(query + 2)[i];
                CHECK(std::fabs(level * double(scale) - want[size_t(i)]) <= bound);
            }
        }
    }
}

// Mean squared error on N(0,1). The encoders search the scale, so those of the Lloyd-Max types may do better than the
// plain quantizer, but never noticeably worse. Those of the trellis types must keep most of what a trellis gains.
void error_is_that_of_theory() {
    const double lloyd_max[] = {0, 0, 0.1175, 0.0345, 0.0095}, trellis[] = {0, 0, 0.0835, 0.0240, 0.0066};
    for (int t = 0; t < TQ_TYPE_COUNT; ++t) {
        const tq_type_info & info = *tq_type_get(tq_type(t));
        check::Case type_case(info.name);
        Random r(uint64_t(60 + t));
        const int64_t n = 2048 * 128;
        std::vector<float> x(static_cast<size_t>(n)), y(static_cast<size_t>(n));
        std::vector<uint8_t> row(tq_row_bytes(tq_type(t), n));
        for (float & v : x) v = r.normal();
        tq_encode_row(tq_type(t), x.data(), row.data(), n);
        tq_decode_row(tq_type(t), row.data(), y.data(), n);
        double error = 0, energy = 0;
        for (size_t i = 0; i < size_t(n); ++i) {
            error += (double(x[i]) - y[i]) * (double(x[i]) - y[i]);
            energy += double(x[i]) * x[i];
        }
        // An inner-product-preserving scale costs up to 1 / (1 - D).
        const double most = is_trellis(info) ? trellis[info.bits] : lloyd_max[info.bits] * 1.15;
        const double shannon = std::exp2(-2.0 * 8 * info.block_bytes / info.block); // for all stored bits
        std::printf("%-14s relative MSE %.5f, at most %.4f, Shannon's limit %.5f\n", info.name, error / energy, most,
                    shannon);
        CHECK(error / energy <= most);
        CHECK(error / energy >= shannon); // less would mean that the test measures nothing
    }
}

// Points of a Lloyd-Max type: what was decoded encodes to the same indices, and to the same scale within one fp16 step.
// (The encoder of the trellis types chooses the path under a scale of its own, so that other paths are better there.)
void grid_points_come_back() {
    for (int t = 0; t < TQ_TYPE_COUNT; ++t) {
        const tq_type_info & info = *tq_type_get(tq_type(t));
        if (is_trellis(info)) continue;
        check::Case type_case(info.name);
        Random r(uint64_t(80 + t));
        uint8_t first[66], second[66];
        float x[128];
        for (int repeat = 0; repeat < 500; ++repeat) {
            check::Case repeat_case("repeat ", repeat);
            for (int i = 0; i < info.block; ++i) x[i] = r.normal() * std::ldexp(1.0f, repeat % 20 - 10);
            tq_encode_row(tq_type(t), x, first, info.block);
            tq_decode_row(tq_type(t), first, x, info.block);
            tq_encode_row(tq_type(t), x, second, info.block);
            CHECK(std::memcmp(first + 2, second + 2, size_t(info.block_bytes) - 2) == 0);
            CHECK(std::abs((first[0] | first[1] << 8) - (second[0] | second[1] << 8)) <= 1);
        }
    }
}

// Scaling the input by a power of two scales d and leaves the indices. In the Lloyd-Max types negating the input
// mirrors the indices. (The mirror image of a trellis's path is not a path.)
void encoder_symmetries() {
    for (int t = 0; t < TQ_TYPE_COUNT; ++t) {
        const tq_type_info & info = *tq_type_get(tq_type(t));
        check::Case type_case(info.name);
        Random r(uint64_t(100 + t));
        float x[128], scaled[128], y[128], z[128];
        uint8_t a[66], b[66];
        for (int repeat = 0; repeat < 100; ++repeat) {
            for (int i = 0; i < info.block; ++i) x[i] = r.normal();
            tq_encode_row(tq_type(t), x, a, info.block);
            for (int i = 0; i < info.block; ++i) scaled[i] = x[i] * 8;
            tq_encode_row(tq_type(t), scaled, b, info.block);
            CHECK(std::memcmp(a + 2, b + 2, size_t(info.block_bytes) - 2) == 0);
            CHECK_EQ(b[0] | b[1] << 8, (a[0] | a[1] << 8) + 3 * scale_octave(info));
            if (is_trellis(info)) continue;
            for (int i = 0; i < info.block; ++i) scaled[i] = -x[i];
            tq_encode_row(tq_type(t), scaled, b, info.block);
            CHECK(a[0] == b[0] && a[1] == b[1]);
            tq_decode_row(tq_type(t), a, y, info.block);
            tq_decode_row(tq_type(t), b, z, info.block);
            double difference = 0; // a value that rounds to 0 has no sign, so a few may differ
            for (int i = 0; i < info.block; ++i) difference += (y[i] + z[i]) * (y[i] + z[i]);
            CHECK(difference <= 0.05 * info.block);
        }
    }
}

// Through the top of fp16: the stored scale grows up to the largest finite one and stays there, and the report says
// from where on.
void scale_saturates() {
    for (int t = 0; t < TQ_TYPE_COUNT; ++t) {
        const tq_type_info & info = *tq_type_get(tq_type(t));
        check::Case type_case(info.name);
        Random r(uint64_t(120 + t));
        float x[128], scaled[128];
        uint8_t block[66];
        for (int i = 0; i < info.block; ++i) x[i] = r.normal();
        tq_encode_row(tq_type(t), x, block, info.block);
        const double d = scale_of(info, block), largest = is_trellis(info) ? 64512 : 65504;
        const double precision = 2.0 / scale_octave(info); // half for d, half for the scale that is stored
        double before = 0;
        int64_t saturated = 0;
        for (int want = 60000; want < 68000; want += 10) { // the scale aimed at
            check::Case scale_case("scale ", want);
            for (int i = 0; i < info.block; ++i) scaled[i] = float(x[i] * (want / d));
            tq_encode_report report;
            CHECK_EQ(tq_encode(tq_type(t), scaled, 0, block, 0, 1, info.block, 1, &report), TQ_OK);
            const double stored = scale_of(info, block);
            CHECK(stored <= largest);
            CHECK(stored >= before);
            CHECK(report.saturated >= saturated);
            CHECK_EQ(report.nonfinite, 0);
            if (report.saturated) CHECK_EQ(stored, largest);
            CHECK(std::fabs(stored - want) <= want * precision || report.saturated);
            before = stored;
            saturated = report.saturated;
        }
        CHECK_EQ(before, largest);
        CHECK_EQ(saturated, 1);
    }
}

void attention_is_the_formula() {
    const struct { tq_type k, v; int64_t head_k, head_v; } cases[] = {
        {TQ_TURBO4, TQ_TURBO3, 128, 128}, {TQ_TURBO3_64, TQ_TURBO2_32, 64, 96}, {TQ_TURBO2, TQ_TURBO4_64, 256, 64}};
    const int64_t n_head = 4, n_kv_head = 2, n_query = 3, n_kv = 17;
    for (const auto & c : cases)
        for (const float soft_cap : {0.0f, 2.0f}) {
            check::Case case_("K ", tq_type_get(c.k)->name, ", V ", tq_type_get(c.v)->name, ", soft cap ", soft_cap);
            Random r(7);
            const size_t row_k = tq_row_bytes(c.k, c.head_k), row_v = tq_row_bytes(c.v, c.head_v);
            std::vector<float> q(size_t(n_head * n_query * c.head_k)), out(size_t(n_head * n_query * c.head_v), -1.0f);
            std::vector<float> mask(size_t(n_query * n_kv)), x(size_t(std::max(c.head_k, c.head_v)));
            std::vector<uint8_t> k(size_t(n_kv_head * n_kv) * row_k), v(size_t(n_kv_head * n_kv) * row_v);
            for (float & value : q) value = r.normal();
            for (int64_t i = 0; i < n_kv_head * n_kv; ++i) {
                for (float & value : x) value = r.normal();
                tq_encode_row(c.k, x.data(), k.data() + size_t(i) * row_k, c.head_k);
                for (float & value : x) value = r.normal();
                tq_encode_row(c.v, x.data(), v.data() + size_t(i) * row_v, c.head_v);
            }
            for (int64_t i = 0; i < n_query * n_kv; ++i) // the last query sees nothing
                mask[size_t(i)] = i / n_kv == n_query - 1 || r.below(4) == 0 ? -INFINITY : r.normal();
            tq_attention_args a = {q.data(), k.data(), v.data(), mask.data(), out.data(), c.k, c.v, n_head, n_kv_head,
                                   n_query, n_kv, c.head_k, c.head_v, 0.1f, soft_cap, 0.0f, 2, nullptr, nullptr};
            CHECK_EQ(tq_attention(&a), TQ_OK);

            std::vector<uint32_t> prepared(tq_query_bytes(tq_type_get(c.k)->block, c.head_k) / 4);
            for (int64_t h = 0; h < n_head; ++h)
                for (int64_t i = 0; i < n_query; ++i) {
                    const float * q_row = q.data() + (h * n_query + i) * c.head_k;
                    tq_query_row(tq_type_get(c.k)->block, q_row, prepared.data(), c.head_k);
                    std::vector<double> want(size_t(c.head_v), 0.0);
                    double total = 0;
                    for (int64_t j = 0; j < n_kv; ++j) {
                        const size_t cell = size_t(h / (n_head / n_kv_head) * n_kv + j);
                        double score = a.scale * tq_dot_row(c.k, k.data() + cell * row_k, prepared.data(), c.head_k);
                        if (soft_cap != 0.0f) score = soft_cap * std::tanh(score / soft_cap);
                        const double weight = std::exp(score + mask[size_t(i * n_kv + j)]);
                        total += weight;
                        tq_decode_row(c.v, v.data() + cell * row_v, x.data(), c.head_v);
                        for (int64_t e = 0; e < c.head_v; ++e) want[size_t(e)] += weight * x[size_t(e)];
                    }
                    for (int64_t e = 0; e < c.head_v; ++e) {
                        const double expected = total > 0 ? want[size_t(e)] / total : 0;
                        // some kernels round the weights to 16 bits, relative to the largest
                        CHECK(std::fabs(out[size_t((h * n_query + i) * c.head_v + e)] - expected) <= 5e-5);
                    }
                }
        }
}

} // namespace

int main() {
    rotation_is_the_formula();
    decoding_is_the_formula();
    dot_is_the_formula();
    query_keeps_magnitude();
    error_is_that_of_theory();
    grid_points_come_back();
    encoder_symmetries();
    scale_saturates();
    attention_is_the_formula();
    return check::summary();
}
