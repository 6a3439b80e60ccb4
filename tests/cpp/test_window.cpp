// The exact window with one table of kernels, named on the command line: rows of f32, partial results brought into the
// domain of their V, and attention whose newest rows are exact. Exits with 77 (skipped) where this CPU or this build
// cannot run them.
#include "buffer.h"
#include "check.h"
#include "inputs.h"
#include "under_test.h"

#include <algorithm>
#include <cstring>
#include <vector>

namespace {

// As in test_attention.cpp, of rows that are rounded to 8 bits besides.
constexpr double attention_bound = 0.02;

// Rows of a KV head: as numbers, and encoded.
struct Rows {
    int type;
    int64_t head, count;
    std::vector<float> exact;   // [count][head]
    std::vector<float> values;  // what the encoded rows mean
    std::vector<uint8_t> bytes;

    Rows(Random & r, int type_, int64_t head_, int64_t count_) : type(type_), head(head_), count(count_) {
        exact.resize(size_t(count * head));
        for (float & x : exact) x = r.normal();
        values = exact;
        const tq_row_info & info = *tq_row_get(type);
        const size_t row = size_t(head / info.block * info.block_bytes);
        bytes.resize(size_t(count) * row);
        for (int64_t i = 0; i < count; ++i) {
            if (type == TQ_ROW_F32) {
                std::memcpy(bytes.data() + size_t(i) * row, exact.data() + i * head, row);
                continue;
            }
            tq_encode_row(tq_type(type), exact.data() + i * head, bytes.data() + size_t(i) * row, head);
            tq_decode_row(tq_type(type), bytes.data() + size_t(i) * row, values.data() + i * head, head);
        }
    }
    size_t row_bytes() const { return bytes.size() / size_t(count); }
};

std::vector<double> formula(const std::vector<float> & k, const std::vector<float> & v, const float * q, int64_t head_k,
                            int64_t head_v, float scale, const float * mask) {
    const int64_t rows = int64_t(k.size()) / head_k;
    std::vector<double> score(static_cast<size_t>(rows)), out(size_t(head_v), 0.0);
    double largest = -INFINITY, sum = 0;
    for (int64_t j = 0; j < rows; ++j) {
        double s = 0;
        for (int64_t c = 0; c < head_k; ++c) s += double(q[c]) * double(k[size_t(j * head_k + c)]);
        score[size_t(j)] = s * double(scale) + (mask ? double(mask[j]) : 0.0);
        largest = std::max(largest, score[size_t(j)]);
    }
    for (int64_t j = 0; j < rows && largest != -INFINITY; ++j) {
        const double w = std::exp(score[size_t(j)] - largest);
        sum += w;
        for (int64_t c = 0; c < head_v; ++c) out[size_t(c)] += w * double(v[size_t(j * head_v + c)]);
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

// The partial result of some query rows over the rows of one KV head.
std::vector<float> partial_of(const Rows & k, const Rows & v, const std::vector<float> & q, float scale, int64_t first,
                              int64_t last) {
    tq_attention_kv kv = {};
    kv.type_k = k.type; kv.type_v = v.type;
    kv.head_k = k.head; kv.head_v = v.head;
    kv.k = k.bytes.data(); kv.v = v.bytes.data();
    kv.stride_k = k.row_bytes(); kv.stride_v = v.row_bytes();
    kv.scale = scale;
    const int64_t rows = int64_t(q.size()) / k.head;
    std::vector<const float *> queries;
    for (int64_t m = 0; m < rows; ++m) queries.push_back(q.data() + m * k.head);
    const tq_attention_queries given = {rows, queries.data(), nullptr, 1, nullptr};
    std::vector<float> partial(size_t(rows * (v.head + 2)));
    std::vector<uint8_t> scratch(tq_attention_scratch(&kv, rows));
    tq_attention_partial(&kv, &given, first, last, partial.data(), scratch.data());
    return partial;
}

const struct { int k, v; int64_t head_k, head_v; } pairs[] = {
    {TQ_TURBO4, TQ_TURBO3, 128, 256}, {TQ_TURBO3_64, TQ_TURBO4_32, 64, 96}, {TQ_TURBO2, TQ_TURBO2_64, 256, 64}};

// Unrotating a partial result and finishing it as one of plain values is the same as finishing it as it is.
void unrotate() {
    for (const auto & p : pairs) {
        check::Case case_("unrotate, V ", tq_row_get(p.v)->name);
        Random r(uint64_t(p.v));
        const Rows k(r, p.k, p.head_k, 70), v(r, p.v, p.head_v, 70);
        std::vector<float> q(size_t(3 * p.head_k)), rotated(size_t(p.head_v)), plain(size_t(p.head_v));
        for (float & x : q) x = r.normal();
        std::vector<float> partial = partial_of(k, v, q, 0.1f, 0, 70);
        for (int64_t m = 0; m < 3; ++m) {
            float * row = partial.data() + m * (p.head_v + 2);
            std::vector<float> other(row, row + p.head_v + 2);
            const float largest = row[p.head_v], sum = row[p.head_v + 1];
            tq_attention_unrotate(p.v, other.data(), p.head_v);
            CHECK(same(other[size_t(p.head_v)], largest) && same(other[size_t(p.head_v) + 1], sum));
            tq_attention_finish(p.v, row, p.head_v, nullptr, rotated.data());
            tq_attention_finish(TQ_ROW_F32, other.data(), p.head_v, nullptr, plain.data());
            check_row(plain.data(), rotated, 1e-5);
        }
    }
    std::vector<float> untouched = {1, 2, 3, 4, 5, 6, 7, 8};
    std::vector<float> copy = untouched;
    for (const int type : {TQ_ROW_F32, TQ_ROW_F16, TQ_ROW_Q8_0}) tq_attention_unrotate(type, copy.data(), 6);
    CHECK_EQ(first_difference(copy.data(), untouched.data(), 8), -1);
}

// Rows of f32, in tiles that are not full, too, beside the formula; values that are exact in 8 bits are read exactly.
void f32_rows() {
    for (const int64_t count : {1, 63, 64, 200})
        for (const int64_t head : {32, 96, 128, 576}) {
            check::Case case_("f32, ", count, " rows of ", head);
            Random r(uint64_t(1000 * count + head));
            Rows k(r, TQ_ROW_F32, head, count), v(r, TQ_ROW_F32, head, count);
            std::vector<float> q(size_t(2 * head)), out(static_cast<size_t>(head));
            for (float & x : q) x = r.normal();
            const auto finished = [&](int64_t m) {
                std::vector<float> partial = partial_of(k, v, q, 0.05f, 0, count);
                tq_attention_finish(TQ_ROW_F32, partial.data() + m * (head + 2), head, nullptr, out.data());
            };
            for (int64_t m = 0; m < 2; ++m) {
                finished(m);
                check_row(out.data(), formula(k.exact, v.exact, q.data() + m * head, head, head, 0.05f, nullptr),
                          attention_bound);
            }
            const auto exact_in_8_bits = [&](std::vector<float> & x) {
                for (size_t i = 0; i < x.size(); ++i) x[i] = float(i % 32 == 0 ? 127 : r.below(255) - 127) / 64;
            };
            exact_in_8_bits(k.exact);
            exact_in_8_bits(q);
            v.exact.assign(v.exact.size(), 0.5f);
            std::memcpy(k.bytes.data(), k.exact.data(), k.bytes.size());
            std::memcpy(v.bytes.data(), v.exact.data(), v.bytes.size());
            finished(0);
            for (const float x : out) CHECK(std::fabs(x - 0.5f) <= 1e-3f);
            v.exact = k.exact;
            std::memcpy(v.bytes.data(), v.exact.data(), v.bytes.size());
            finished(0);
            // Scores and values are exact; weights are rounded as for other types.
            check_row(out.data(), formula(k.exact, v.exact, q.data(), head, head, 0.05f, nullptr), 0.01);
        }
}

// The guard page after each array is hit if a row of f32 is read beyond its end.
void f32_reads_no_further() {
    const int64_t head = 96, rows = 65;
    Buffer<float> k{size_t(rows * head)}, v{size_t(rows * head)}, q{size_t(head)}, out{size_t(head)};
    for (int64_t i = 0; i < rows * head; ++i) k[size_t(i)] = v[size_t(i)] = 1;
    for (int64_t i = 0; i < head; ++i) q[size_t(i)] = 1;
    tq_attention_args a = {};
    a.q = q.data(); a.k = k.data(); a.v = v.data(); a.out = out.data();
    a.type_k = a.type_v = TQ_ROW_F32;
    a.n_head = a.n_kv_head = a.n_query = a.threads = 1;
    a.n_kv = rows;
    a.head_k = a.head_v = head;
    a.scale = 1;
    CHECK_EQ(tq_attention(&a), TQ_OK);
    for (int64_t i = 0; i < head; ++i) CHECK(std::fabs(out[size_t(i)] - 1) <= 1e-3f);
}

// tq_attention with windows of every size, masks and GQA groups, beside the formula.
void windows() {
    const int64_t n_head = 4, n_kv_head = 2, n_query = 150, n_kv = 200, group = n_head / n_kv_head;
    for (const auto & p : pairs)
        for (const int64_t rows : {0, 1, 64, 130, 200})
            for (const bool masked : {false, true}) {
                check::Case case_("window of ", rows, ", K ", tq_row_get(p.k)->name, ", V ", tq_row_get(p.v)->name,
                                  masked ? ", masked" : "");
                Random r(uint64_t(1000 * p.k + rows));
                std::vector<float> q(size_t(n_head * n_query * p.head_k)), mask(size_t(n_query * n_kv));
                std::vector<float> out(size_t(n_head * n_query * p.head_v), -1.0f), k_new, v_new;
                std::vector<std::vector<float>> keys, values;
                std::vector<uint8_t> k_bytes, v_bytes;
                for (int64_t h = 0; h < n_kv_head; ++h) {
                    Rows k(r, p.k, p.head_k, n_kv), v(r, p.v, p.head_v, n_kv);
                    k_bytes.insert(k_bytes.end(), k.bytes.begin(), k.bytes.end());
                    v_bytes.insert(v_bytes.end(), v.bytes.begin(), v.bytes.end());
                    for (auto * one : {&k, &v})
                        std::copy(one->exact.end() - rows * one->head, one->exact.end(),
                                  one->values.end() - rows * one->head);
                    k_new.insert(k_new.end(), k.exact.end() - rows * p.head_k, k.exact.end());
                    v_new.insert(v_new.end(), v.exact.end() - rows * p.head_v, v.exact.end());
                    keys.push_back(k.values);
                    values.push_back(v.values);
                }
                for (float & x : q) x = r.normal();
                for (int64_t t = 0; t < n_query; ++t)
                    for (int64_t j = 0; j < n_kv; ++j) {
                        const bool old = j < n_kv - rows;
                        const bool hidden = t == 0 || (t == 1 && old) || (t == 2 && !old) || r.below(2) == 0;
                        mask[size_t(t * n_kv + j)] = hidden ? -INFINITY : r.normal();
                    }
                const float scale = 1 / std::sqrt(float(p.head_k));
                const tq_attention_window window = {k_new.data(), v_new.data(), TQ_ROW_F32, TQ_ROW_F32, rows};
                tq_attention_args a = {q.data(), k_bytes.data(), v_bytes.data(), masked ? mask.data() : nullptr,
                                       out.data(), p.k, p.v, n_head, n_kv_head, n_query, n_kv, p.head_k, p.head_v,
                                       scale, 0.0f, 0.0f, 2, nullptr, &window};
                CHECK_EQ(tq_attention(&a), TQ_OK);
                for (int64_t h = 0; h < n_head; ++h)
                    for (const int64_t t : {0, 1, 2, 77, 149}) {
                        check::Case row_case("head ", h, ", query ", t);
                        const auto want = formula(keys[size_t(h / group)], values[size_t(h / group)],
                                                  q.data() + (h * n_query + t) * p.head_k, p.head_k, p.head_v, scale,
                                                  masked ? mask.data() + t * n_kv : nullptr);
                        check_row(out.data() + (h * n_query + t) * p.head_v, want, attention_bound);
                    }
            }
}

} // namespace

int main(int argc, char ** argv) {
    return test_kernels(argc, argv, [](Extent) {
        unrotate();
        f32_rows();
        f32_reads_no_further();
        windows();
    });
}
