// Attention with one table of kernels, named on the command line, against the formula in double precision over decoded
// rows. Exits with 77 (skipped) where this CPU or this build cannot run them.
#include "buffer.h"
#include "check.h"
#include "inputs.h"

#include <algorithm>
#include <vector>

namespace {

const char * kernels_under_test;

// Error class of attention: the norm of an output row's error, relative to the row's. Kernels that take V as levels
// round the weights of tiles where none is above 1/128 of the sum to 8 bits, else to 16.
constexpr double attention_bound = 0.01;

void use(const char * name) {
    if (tq_kernels_select(name) != TQ_OK) {
        std::fprintf(stderr, "cannot select %s\n", name);
        std::exit(EXIT_FAILURE);
    }
}

const char * type_name(int type) {
    switch (type) {
        case TQ_ROW_F16: return "f16";
        case TQ_ROW_BF16: return "bf16";
        case TQ_ROW_Q8_0: return "q8_0";
        case TQ_ROW_Q4_0: return "q4_0";
    }
    return tq_type_get(tq_type(type))->name;
}

int block_of(int type) { return type < TQ_TYPE_COUNT ? tq_type_get(tq_type(type))->block : 32; }

size_t block_bytes(int type) {
    switch (type) {
        case TQ_ROW_F16:
        case TQ_ROW_BF16: return 64;
        case TQ_ROW_Q8_0: return 34;
        case TQ_ROW_Q4_0: return 18;
    }
    return size_t(tq_type_get(tq_type(type))->block_bytes);
}

bool has_scale(int type) { return type != TQ_ROW_F16 && type != TQ_ROW_BF16; }

// Any bytes that are finite: scales of either sign, all levels, -128 too.
std::vector<uint8_t> random_rows(Random & r, int type, int64_t blocks) {
    std::vector<uint8_t> bytes(size_t(blocks) * block_bytes(type));
    for (uint8_t & byte : bytes) byte = uint8_t(r.bits());
    const auto set_half = [&](size_t at, int h) {
        bytes[at] = uint8_t(h);
        bytes[at + 1] = uint8_t(h >> 8);
    };
    const auto half_near_one = [&] { return (r.below(2) << 15) + 0x3800 + r.below(0x0800); }; // +-0.5 ... 2
    for (size_t at = 0; at < bytes.size(); at += block_bytes(type)) {
        if (has_scale(type)) set_half(at, half_near_one() - (type == TQ_ROW_Q8_0 ? 6 << 10 : 0));
        if (type == TQ_ROW_F16)
            for (size_t i = 0; i < 64; i += 2) set_half(at + i, half_near_one());
        if (type == TQ_ROW_BF16)
            for (size_t i = 0; i < 64; i += 2) set_half(at + i, (r.below(2) << 15) + 0x3f00 + r.below(0x100));
        if (type == TQ_ROW_Q8_0)
            for (size_t i = 2; i < 34; i += 1 + size_t(r.below(16))) bytes[at + i] = 0x80;
    }
    return bytes;
}

// Makes the value or the scale at the start of a row an infinity or a NaN.
void spoil(int type, uint8_t * row, bool nan) {
    row[0] = 0x00;
    row[1] = type == TQ_ROW_BF16 ? 0x7f : 0x7c;
    if (nan || type == TQ_ROW_BF16) row[0] = nan ? 0xc1 : 0x80;
}

void decode_row(int type, const uint8_t * src, float * dst, int64_t n) {
    if (type < TQ_TYPE_COUNT) return tq_decode_row(tq_type(type), src, dst, n);
    for (int64_t i = 0; i < n; ++i) {
        const uint8_t * block = src + size_t(i / 32) * block_bytes(type);
        const int j = int(i % 32);
        const auto half_at = [&](int at) { return block[at] | block[at + 1] << 8; };
        if (type == TQ_ROW_F16) dst[i] = float(float_of_binary16(half_at(2 * j)));
        if (type == TQ_ROW_BF16) dst[i] = float_of(uint32_t(half_at(2 * j)) << 16);
        if (type == TQ_ROW_Q8_0) dst[i] = float(float_of_binary16(half_at(0)) * int8_t(block[2 + j]));
        if (type == TQ_ROW_Q4_0)
            dst[i] = float(float_of_binary16(half_at(0)) * ((block[2 + j % 16] >> (j / 16 * 4) & 15) - 8));
    }
}

// One KV head: encoded rows, and what they mean.
struct Cache {
    int type;
    int64_t head, rows;
    std::vector<uint8_t> bytes;
    std::vector<float> values; // [rows][head]; in the original domain

    Cache(Random & r, int type_, int64_t head_, int64_t rows_)
        : type(type_), head(head_), rows(rows_), bytes(random_rows(r, type_, rows_ * (head_ / block_of(type_)))) {
        decode();
    }
    size_t row_bytes() const { return size_t(head / block_of(type)) * block_bytes(type); }
    uint8_t * row(int64_t i) { return bytes.data() + size_t(i) * row_bytes(); }
    void decode() {
        use("scalar");
        values.resize(size_t(rows * head));
        for (int64_t i = 0; i < rows; ++i) decode_row(type, row(i), values.data() + i * head, head);
    }
};

// Queries that rounding to int8 does not change: for turbo types after the rotation.
void fill_query(Random & r, int type_k, float * q, int64_t n) {
    for (int64_t i = 0; i < n; ++i) q[i] = float(r.below(9) - 4) / 8;
    const int block = block_of(type_k);
    for (int64_t i = 0; i < n; i += block) q[i] = 127.0f / 8 / 32 * (r.below(2) ? 32 : -32);
    for (int64_t i = 0; i < n; ++i) q[i] /= 64;
    if (type_k < TQ_TYPE_COUNT) {
        use("scalar");
        std::vector<float> rotated(q, q + n);
        CHECK_EQ(tq_unrotate(block, rotated.data(), q, n, 1), TQ_OK);
    }
}

struct Options {
    float scale = 1.0f, soft_cap = 0.0f;
};

double score(const Cache & k, int64_t row, const float * q, const Options & o) {
    double s = 0;
    for (int64_t c = 0; c < k.head; ++c) s += double(q[c]) * double(k.values[size_t(row * k.head + c)]);
    s *= double(o.scale);
    return o.soft_cap != 0.0f ? double(o.soft_cap) * std::tanh(s / double(o.soft_cap)) : s;
}

// softmax(scores + mask) V of one query; `added` of a row is -inf where it is masked. sink: null or a score.
template <typename Added>
std::vector<double> formula(const Cache & k, const Cache & v, const float * q, const Options & o, const float * sink,
                            const Added & added) {
    std::vector<double> s(size_t(k.rows), -INFINITY), out(size_t(v.head), 0.0);
    double largest = sink ? double(*sink) : -INFINITY, sum = 0;
    for (int64_t r = 0; r < k.rows; ++r)
        if (added(r) != -INFINITY) {
            s[size_t(r)] = score(k, r, q, o) + added(r);
            largest = std::max(largest, s[size_t(r)]);
        }
    if (sink) sum = std::exp(double(*sink) - largest);
    for (int64_t r = 0; r < k.rows; ++r) {
        if (s[size_t(r)] == -INFINITY) continue;
        const double w = std::exp(s[size_t(r)] - largest);
        sum += w;
        for (int64_t c = 0; c < v.head; ++c) out[size_t(c)] += w * double(v.values[size_t(r * v.head + c)]);
    }
    for (double & x : out) x = sum > 0 ? x / sum : 0;
    return out;
}

template <typename Want> void check_row(const float * got, const std::vector<Want> & want, double bound) {
    double error = 0, norm = 0;
    for (size_t c = 0; c < want.size(); ++c) {
        const double difference = double(got[c]) - double(want[c]);
        error += difference * difference;
        norm += double(want[c]) * double(want[c]);
    }
    if (!CHECK(std::sqrt(error) <= bound * std::sqrt(norm))) // a NaN fails
        std::fprintf(stderr, "relative error %g\n", std::sqrt(error / norm));
}

bool all_nan(const float * x, int64_t n) {
    return std::all_of(x, x + n, [](float y) { return std::isnan(y); });
}
bool all_finite(const float * x, int64_t n) {
    return std::all_of(x, x + n, [](float y) { return std::isfinite(y); });
}

const struct { int k, v; int64_t head_k, head_v; } pairs[] = {
    {TQ_TURBO4, TQ_TURBO3, 128, 128},     {TQ_TURBO3_64, TQ_TURBO4_32, 64, 96}, {TQ_TURBO2_32, TQ_TURBO2_64, 96, 64},
    {TQ_ROW_Q8_0, TQ_ROW_Q8_0, 128, 128}, {TQ_ROW_Q4_0, TQ_ROW_Q4_0, 96, 96},   {TQ_TURBO3, TQ_ROW_F16, 128, 64},
    {TQ_ROW_F16, TQ_TURBO4, 64, 128},     {TQ_ROW_Q8_0, TQ_ROW_BF16, 64, 64}};

// Several tiles of KV rows, several runs of tokens and GQA groups, and a mask of which every part is different.
void random_masks() {
    const int64_t n_head = 4, n_kv_head = 2, n_query = 150, n_kv = 200;
    for (const auto & p : pairs) {
        check::Case case_("random masks, K ", type_name(p.k), ", V ", type_name(p.v));
        Random r(uint64_t(100 * p.k + p.v));
        std::vector<Cache> k, v;
        std::vector<uint8_t> k_bytes, v_bytes;
        for (int64_t h = 0; h < n_kv_head; ++h) {
            k.emplace_back(r, p.k, p.head_k, n_kv);
            v.emplace_back(r, p.v, p.head_v, n_kv);
            k_bytes.insert(k_bytes.end(), k.back().bytes.begin(), k.back().bytes.end());
            v_bytes.insert(v_bytes.end(), v.back().bytes.begin(), v.back().bytes.end());
        }
        std::vector<float> q(size_t(n_head * n_query * p.head_k)), mask(size_t(n_query * n_kv));
        std::vector<float> out(size_t(n_head * n_query * p.head_v), -1.0f);
        for (int64_t i = 0; i < n_head * n_query; ++i) fill_query(r, p.k, q.data() + i * p.head_k, p.head_k);
        for (int64_t t = 0; t < n_query; ++t)
            for (int64_t j = 0; j < n_kv; ++j) {
                const bool hidden = t == n_query - 1 || (t % 64 == 0 && j / 64 == 1) || r.below(2) == 0;
                mask[size_t(t * n_kv + j)] = hidden ? -INFINITY : r.normal();
            }
        tq_attention_args a = {q.data(), k_bytes.data(), v_bytes.data(), mask.data(), out.data(), p.k, p.v, n_head,
                               n_kv_head, n_query, n_kv, p.head_k, p.head_v, 1.0f, 0.0f, 0.0f, 2, nullptr, nullptr};
        use(kernels_under_test);
        CHECK_EQ(tq_attention(&a), TQ_OK);
        for (int64_t h = 0; h < n_head; ++h)
            for (int64_t t = 0; t < n_query; ++t) {
                check::Case row_case("head ", h, ", query ", t);
                const auto kv = size_t(h / (n_head / n_kv_head));
                const auto want = formula(k[kv], v[kv], q.data() + (h * n_query + t) * p.head_k, {}, nullptr,
                                          [&](int64_t j) { return double(mask[size_t(t * n_kv + j)]); });
                check_row(out.data() + (h * n_query + t) * p.head_v, want, attention_bound);
            }
    }
}

// A host's calls for the query rows that share a KV head.
struct Call {
    Cache & k;
    Cache & v;
    Options options;
    std::vector<float> q;                    // [rows][head_k]
    std::vector<std::vector<uint16_t>> mask; // [rows][n_kv], fp16; or empty; a single one is that of all rows
    std::vector<float> slope;                // or empty
    int64_t left_out = 0;
    const char * size_kernels = nullptr; // selected when the size of the scratch memory is asked for

    int64_t rows() const { return int64_t(q.size()) / k.head; }
    int64_t stride() const { return v.head + 2; }

    std::vector<float> partial(int64_t first, int64_t last) {
        const tq_attention_kv kv = {k.type, v.type, k.head, v.head, k.bytes.data(), v.bytes.data(), k.row_bytes(),
                                    v.row_bytes(), options.scale, options.soft_cap, 0.0f, {}, {}};
        std::vector<const float *> q_rows;
        std::vector<const void *> masks;
        for (int64_t m = 0; m < rows(); ++m) {
            q_rows.push_back(q.data() + m * k.head);
            if (!mask.empty()) masks.push_back(mask_of(m).data());
        }
        const tq_attention_queries queries = {rows(), q_rows.data(), mask.empty() ? nullptr : masks.data(), 0,
                                              slope.empty() ? nullptr : slope.data()};
        if (size_kernels) use(size_kernels);
        Buffer<uint8_t> scratch(tq_attention_scratch(&kv, rows()));
        if (size_kernels) use(kernels_under_test);
        std::vector<float> result(size_t(rows() * stride()));
        left_out = tq_attention_partial(&kv, &queries, first, last, result.data(), scratch.data());
        CHECK(scratch.intact());
        return result;
    }
    std::vector<float> finished(std::vector<float> result, const float * sink) const {
        std::vector<float> out(size_t(rows() * v.head));
        for (int64_t m = 0; m < rows(); ++m)
            tq_attention_finish(v.type, result.data() + m * stride(), v.head, sink, out.data() + m * v.head);
        return out;
    }
    void merge(std::vector<float> & into, const std::vector<float> & from) const {
        for (int64_t m = 0; m < rows(); ++m)
            tq_attention_merge(into.data() + m * stride(), from.data() + m * stride(), v.head);
    }
    std::vector<float> nothing() const { // what a host merges into
        std::vector<float> result(size_t(rows() * stride()), 0.0f);
        for (int64_t m = 0; m < rows(); ++m) result[size_t(m * stride() + v.head)] = -INFINITY;
        return result;
    }
    const std::vector<uint16_t> & mask_of(int64_t m) const { return mask[mask.size() == 1 ? 0 : size_t(m)]; }
    double added(int64_t m, int64_t j) const {
        const uint16_t h = mask_of(m)[size_t(j)];
        return h == 0xfc00 ? -INFINITY : float_of_binary16(h) * (slope.empty() ? 1.0 : double(slope[size_t(m)]));
    }
};

// Ranges of KV rows in any number and order, with sinks, are what one range is, and that is the formula.
void splits_and_sinks() {
    const int64_t n_kv = 200;
    for (const auto & p : pairs)
        for (const bool far : {false, true}) { // far: scores so far apart that e^(difference) overflows
            check::Case case_("splits, K ", type_name(p.k), ", V ", type_name(p.v), far ? ", scores far apart" : "");
            Random r(uint64_t(200 * p.k + p.v));
            Cache k(r, p.k, p.head_k, n_kv), v(r, p.v, p.head_v, n_kv);
            Call call = {k, v, {far ? 1e4f : 1.0f, far ? 0.0f : 3.0f}, {}, {}, {1.0f, 0.5f, 2.0f}};
            call.q.resize(size_t(3 * p.head_k));
            for (int m = 0; m < 3; ++m) {
                fill_query(r, p.k, call.q.data() + m * p.head_k, p.head_k);
                call.mask.emplace_back();
                for (int64_t j = 0; j < n_kv; ++j) { // the third query sees nothing in the first 70 rows
                    const bool hidden = r.below(4) == 0 || (m == 2 && j < 70);
                    call.mask.back().push_back(uint16_t(hidden ? 0xfc00 : 0x3800 + r.below(0x800)));
                }
            }
            use(kernels_under_test);
            const auto whole = call.partial(0, n_kv);
            const float largest = whole[size_t(v.head)];
            const float sinks[] = {largest - 1, largest + 2, -INFINITY};
            for (const float * sink : {static_cast<const float *>(nullptr), sinks, sinks + 1, sinks + 2}) {
                check::Case sink_case(sink ? "sink " : "no sink", sink ? double(*sink) : 0.0);
                use(kernels_under_test);
                const auto want = call.finished(whole, sink);
                for (int64_t m = 0; m < 3; ++m)
                    if (!far) // K is not exact enough there
                        check_row(want.data() + m * v.head,
                                  formula(k, v, call.q.data() + m * k.head, call.options, sink,
                                          [&](int64_t j) { return call.added(m, j); }),
                                  attention_bound);
                for (const int64_t middle : {1, 64, 70, 100, 199})
                    for (const bool backwards : {false, true}) {
                        check::Case split_case("split at ", middle, backwards ? ", backwards" : "");
                        const auto a = call.partial(0, middle), b = call.partial(middle, n_kv);
                        const auto none = call.partial(5, 5);
                        auto merged = call.nothing();
                        call.merge(merged, backwards ? b : a);
                        call.merge(merged, none);
                        call.merge(merged, backwards ? a : b);
                        const auto got = call.finished(merged, sink);
                        for (int64_t m = 0; m < 3; ++m)
                            check_row(got.data() + m * v.head,
                                      std::vector<float>(want.begin() + m * v.head, want.begin() + (m + 1) * v.head),
                                      attention_bound);
                    }
            }
        }
}

// The heads of a group share their token's mask, and each has its own slope (ALiBi).
void slopes_over_one_mask() {
    const int64_t n_kv = 100;
    Random r(5);
    Cache k(r, TQ_TURBO4, 128, n_kv), v(r, TQ_TURBO4, 128, n_kv);
    Call call = {k, v, {}, {}, {{}}, {1.0f, 0.25f, 4.0f}};
    call.q.resize(3 * 128);
    for (int m = 0; m < 3; ++m) fill_query(r, k.type, call.q.data() + m * 128, 128);
    for (int64_t j = 0; j < n_kv; ++j) call.mask[0].push_back(uint16_t(0x3800 + r.below(0x800)));
    use(kernels_under_test);
    const auto got = call.finished(call.partial(0, n_kv), nullptr);
    for (int64_t m = 0; m < 3; ++m)
        check_row(got.data() + m * 128,
                  formula(k, v, call.q.data() + m * 128, call.options, nullptr,
                          [&](int64_t j) { return call.added(m, j); }),
                  attention_bound);
}

void fully_masked_with_sink() {
    Random r(3);
    Cache k(r, TQ_TURBO4, 128, 70), v(r, TQ_TURBO4, 128, 70);
    Call call = {k, v, {}, std::vector<float>(128, 0.01f), {std::vector<uint16_t>(70, 0xfc00)}, {}};
    use(kernels_under_test);
    for (const float sink : {0.0f, -INFINITY})
        for (const float x : call.finished(call.partial(0, 70), &sink)) CHECK_EQ(x, 0.0f);
}

// A score that is NaN is seen in the result, wherever ranges end and whatever else is masked.
void nan_survives_merging() {
    const int64_t n_kv = 200;
    for (const auto & p : pairs) {
        if (!has_scale(p.k)) continue;
        for (const int64_t bad : {0, 15, 63, 64, 130, 199})
            for (const bool alone : {false, true}) { // whether its tile's other rows are masked
                check::Case case_("NaN in row ", bad, alone ? ", alone" : "", ", K ", type_name(p.k), ", V ",
                                  type_name(p.v));
                Random r(uint64_t(300 * p.k + p.v));
                Cache k(r, p.k, p.head_k, n_kv), v(r, p.v, p.head_v, n_kv);
                spoil(p.k, k.row(bad), true);
                Call call = {k, v, {}, {}, {}, {}};
                call.q.resize(size_t(2 * p.head_k)); // the second query does not see the row
                for (int m = 0; m < 2; ++m) {
                    fill_query(r, p.k, call.q.data() + m * p.head_k, p.head_k);
                    call.mask.emplace_back(size_t(n_kv), uint16_t(0));
                    for (int64_t j = bad / 64 * 64; alone && j < std::min(n_kv, bad / 64 * 64 + 64); ++j)
                        call.mask.back()[size_t(j)] = 0xfc00;
                    call.mask.back()[size_t(bad)] = m == 0 ? 0 : 0xfc00;
                }
                use(kernels_under_test);
                const float sink = 1;
                const auto check_result = [&](const std::vector<float> & result) {
                    for (const float * s : {static_cast<const float *>(nullptr), &sink}) {
                        const auto out = call.finished(result, s);
                        CHECK(all_nan(out.data(), v.head));
                        CHECK(all_finite(out.data() + v.head, v.head));
                    }
                };
                check_result(call.partial(0, n_kv));
                for (const int64_t middle : {1, 16, 64, 128, 199})
                    for (const bool backwards : {false, true}) {
                        check::Case split_case("split at ", middle, backwards ? ", backwards" : "");
                        const auto a = call.partial(0, middle), b = call.partial(middle, n_kv);
                        auto merged = call.nothing();
                        call.merge(merged, backwards ? b : a);
                        call.merge(merged, backwards ? a : b);
                        check_result(merged);
                    }
            }
    }
}

// Two requests in one cache: what is not finite in the rows of one does not reach the other.
void slots_are_apart() {
    const int64_t n_kv = 100, rows = 7;
    for (const auto & p : pairs)
        for (const bool nan : {false, true}) {
            check::Case case_(nan ? "NaN" : "infinity", " in V, K ", type_name(p.k), ", V ", type_name(p.v));
            Random r(uint64_t(400 * p.k + p.v));
            Cache k(r, p.k, p.head_k, n_kv), v(r, p.v, p.head_v, n_kv);
            Call call = {k, v, {}, {}, {}, {}};
            call.q.resize(size_t(rows * p.head_k));
            for (int64_t m = 0; m < rows; ++m) {
                fill_query(r, p.k, call.q.data() + m * p.head_k, p.head_k);
                call.mask.emplace_back();
                for (int64_t j = 0; j < n_kv; ++j) call.mask.back().push_back(j % 2 == m % 2 ? 0 : 0xfc00);
            }
            use(kernels_under_test);
            const auto want = call.finished(call.partial(0, n_kv), nullptr);
            const int64_t left_out = call.left_out;
            for (const int64_t j : {6, 20, 70}) spoil(p.v, v.row(j), nan);
            const auto got = call.finished(call.partial(0, n_kv), nullptr);
            CHECK_EQ(call.left_out, left_out);
            for (int64_t m = 0; m < rows; ++m) {
                check::Case row_case("query ", m);
                if (m % 2 == 0)
                    CHECK(!all_finite(got.data() + m * v.head, v.head));
                else
                    check_row(got.data() + m * v.head,
                              std::vector<float>(want.begin() + m * v.head, want.begin() + (m + 1) * v.head),
                              attention_bound);
            }
        }
}

// A host may ask for the size of the scratch memory before other kernels are selected.
void scratch_serves_all_kernels() {
    for (const auto & p : pairs)
        for (int i = 0; i < tq_kernels_count(); ++i) {
            if (!tq_kernels_supported(i)) continue;
            check::Case case_("scratch for ", tq_kernels_name(i), ", K ", type_name(p.k), ", V ", type_name(p.v));
            Random r(uint64_t(500 * p.k + p.v));
            Cache k(r, p.k, p.head_k, 70), v(r, p.v, p.head_v, 70);
            Call call = {k, v, {}, std::vector<float>(size_t(3 * p.head_k), 0.01f), {}, {}};
            use(kernels_under_test);
            const auto want = call.partial(0, 70);
            call.size_kernels = tq_kernels_name(i);
            CHECK(call.partial(0, 70) == want);
        }
}

} // namespace

int main(int argc, char ** argv) {
    if (argc != 2) {
        std::fprintf(stderr, "usage: %s KERNELS\n", argv[0]);
        return EXIT_FAILURE;
    }
    kernels_under_test = argv[1];
    const tq_status status = tq_kernels_select(kernels_under_test);
    if (status == TQ_ERROR_KERNELS_UNSUPPORTED) {
        std::printf("skipped: this CPU or this build cannot run %s\n", kernels_under_test);
        return check::exit_skipped;
    }
    if (!CHECK_EQ(status, TQ_OK)) return check::summary();
    random_masks();
    splits_and_sinks();
    slopes_over_one_mask();
    fully_masked_with_sink();
    nan_survives_merging();
    slots_are_apart();
    scratch_serves_all_kernels();
    return check::summary();
}
