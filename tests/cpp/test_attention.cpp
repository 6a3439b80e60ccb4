// Tests attention with one table of kernels, which the command line names: the conformance list, and the parts of the
// interface that only this engine has. The exit status is 77 (skipped) if this CPU or this build cannot run the kernels.
#include "buffer.h"
#include "check.h"
#include "problem.h"
#include "under_test.h"

#include <set>

namespace {

// Error class of attention: the norm of an output row's error, relative to the row's. Kernels that take V as levels
// round the weights of tiles where none is above 1/128 of the sum to 8 bits, else to 16.
constexpr double attention_bound = 0.01;

// Rounds queries as the engine does for a K of int8 levels: to int8, for turbo types after the rotation.
std::vector<float> rounded_queries(const Problem & p) {
    const int type = p.k.type, block = tq_row_get(type)->block;
    if (!has_scale(type)) return p.q;
    std::vector<float> out(p.q.size());
    std::vector<uint32_t> prepared(tq_query_bytes(block, block) / 4);
    for (size_t at = 0; at < p.q.size(); at += size_t(block)) {
        const float * from = p.q.data() + at;
        float * to = out.data() + at;
        if (type < TQ_TYPE_COUNT) {
            CHECK_EQ(tq_query(block, from, prepared.data(), block), TQ_OK);
            float unit;
            std::memcpy(&unit, prepared.data(), 4);
            for (int i = 0; i < block; ++i) to[i] = unit * float(reinterpret_cast<const int8_t *>(&prepared[2])[i]);
            CHECK_EQ(tq_unrotate(block, to, to, block, 1), TQ_OK);
        } else {
            float top = 0;
            for (int i = 0; i < block; ++i) top = std::max(top, std::fabs(from[i]));
            const float unit = top / 127;
            for (int i = 0; i < block; ++i) to[i] = unit > 0 ? unit * std::nearbyint(from[i] / unit) : 0;
        }
    }
    return out;
}

// Makes the calls of a host: for each KV head the query rows of some tokens, over ranges of KV rows.
class Host {
public:
    const char * size_kernels = nullptr; // selected when the size of the scratch memory is asked for
    int64_t left_out = 0;                // number of rows of V so far

    explicit Host(const Problem & problem) : p(problem), stride(problem.c.head_v + 2) {}

    // [stream][token][head][head_v + 2]
    std::vector<float> partial(int64_t first, int64_t last) {
        const AttentionCase & c = p.c;
        std::vector<float> result(size_t(p.results() * stride));
        const int most = std::max(1, 96 / c.group()); // tokens per call
        for (int s = 0; s < c.streams; ++s)
            for (int h = 0; h < c.kv_heads; ++h)
                for (int t = 0; t < c.tokens; t += most)
                    call(s, h, t, std::min(c.tokens, t + most), first, last, result);
        return result;
    }
    std::vector<float> finished(std::vector<float> result) const {
        std::vector<float> out(size_t(p.results() * p.c.head_v));
        for (int64_t i = 0; i < p.results(); ++i)
            tq_attention_finish(p.v.type, result.data() + i * stride, p.c.head_v,
                                p.sinks.empty() ? nullptr : &p.sinks[size_t(i % p.c.heads)],
                                out.data() + i * p.c.head_v);
        return out;
    }
    // The same result from two ranges, merged in either order, with an empty range between them.
    std::vector<float> split(int64_t middle, bool backwards) {
        std::vector<float> merged(size_t(p.results() * stride), 0.0f); // an empty result, into which a host merges
        for (int64_t i = 0; i < p.results(); ++i) merged[size_t(i * stride + p.c.head_v)] = -INFINITY;
        const auto a = partial(0, middle), b = partial(middle, p.c.rows), none = partial(middle, middle);
        for (const auto * part : {backwards ? &b : &a, &none, backwards ? &a : &b})
            for (int64_t i = 0; i < p.results(); ++i)
                tq_attention_merge(merged.data() + i * stride, part->data() + i * stride, p.c.head_v);
        return finished(merged);
    }

private:
    const Problem & p;
    const int64_t stride;

    void call(int stream, int kv_head, int from, int to, int64_t first, int64_t last, std::vector<float> & result) {
        const AttentionCase & c = p.c;
        const auto base = [&](const Cache & cache) {
            return cache.bytes.data() + p.kv_stream(stream) * cache.stream + kv_head * cache.apart;
        };
        const tq_attention_kv kv = {p.k.type, p.v.type, c.head_k, c.head_v, base(p.k), base(p.v), size_t(p.k.row),
                                    size_t(p.v.row), p.scale, c.soft_cap, c.sparse_v, {}, {}};
        std::vector<const float *> q;
        std::vector<const void *> mask;
        std::vector<float> slope;
        std::vector<int64_t> place;
        for (int t = from; t < to; ++t)
            for (int h = kv_head * c.group(); h < (kv_head + 1) * c.group(); ++h) {
                const int64_t token = int64_t(stream) * c.tokens + t;
                place.push_back(token * c.heads + h);
                q.push_back(p.q.data() + place.back() * c.head_k);
                mask.push_back(p.mask_row(stream, t, h));
                slope.push_back(p.slope(h));
            }
        const int64_t rows = int64_t(q.size());
        const tq_attention_queries queries = {rows, q.data(), p.mask.empty() ? nullptr : mask.data(), 0,
                                              c.max_bias > 0 ? slope.data() : nullptr};
        if (size_kernels) use(size_kernels);
        Buffer<uint8_t> scratch(tq_attention_scratch(&kv, rows));
        if (size_kernels) use(kernels_under_test);
        std::vector<float> out(size_t(rows * stride));
        left_out += tq_attention_partial(&kv, &queries, first, last, out.data(), scratch.data());
        CHECK(scratch.intact());
        for (int64_t m = 0; m < rows; ++m)
            std::copy_n(out.begin() + m * stride, stride, result.begin() + place[size_t(m)] * stride);
    }
};

// Calls tq_attention, which supports dense tensors and one mask for all heads, and neither ALiBi nor sinks.
std::vector<float> by_one_call(const Problem & p) {
    const AttentionCase & c = p.c;
    const int query_rows = c.heads * c.tokens;
    std::vector<float> out(size_t(p.results() * c.head_v)), result(size_t(query_rows * c.head_v));
    std::vector<float> q(size_t(query_rows * c.head_k)), mask(size_t(p.mask.empty() ? 0 : c.tokens * c.rows));
    for (int s = 0; s < c.streams; ++s) {
        const auto dense = [&](const Cache & cache) {
            std::vector<uint8_t> bytes;
            const uint8_t * base = cache.bytes.data() + p.kv_stream(s) * cache.stream;
            for (int h = 0; h < c.kv_heads; ++h)
                for (int64_t r = 0; r < c.rows; ++r) {
                    const uint8_t * row = base + r * cache.row + h * cache.apart;
                    bytes.insert(bytes.end(), row, row + cache.row_bytes);
                }
            return bytes;
        };
        const auto k = dense(p.k), v = dense(p.v);
        for (int t = 0; t < c.tokens; ++t)
            for (int h = 0; h < c.heads; ++h)
                std::copy_n(p.q.begin() + ((int64_t(s) * c.tokens + t) * c.heads + h) * c.head_k, c.head_k,
                            q.begin() + (int64_t(h) * c.tokens + t) * c.head_k);
        for (size_t i = 0; i < mask.size(); ++i)
            mask[i] = float(half_at(reinterpret_cast<const uint8_t *>(&p.mask[size_t(s) * mask.size() + i])));
        const tq_attention_args a = {q.data(), k.data(), v.data(), mask.empty() ? nullptr : mask.data(), result.data(),
                                     p.k.type, p.v.type, c.heads, c.kv_heads, c.tokens, c.rows, c.head_k, c.head_v,
                                     p.scale, c.soft_cap, c.sparse_v, 2, nullptr, nullptr};
        CHECK_EQ(tq_attention(&a), TQ_OK);
        for (int t = 0; t < c.tokens; ++t)
            for (int h = 0; h < c.heads; ++h)
                std::copy_n(result.begin() + (int64_t(h) * c.tokens + t) * c.head_v, c.head_v,
                            out.begin() + ((int64_t(s) * c.tokens + t) * c.heads + h) * c.head_v);
    }
    return out;
}

void check_rows(const Problem & p, const std::vector<float> & got, const std::vector<double> & want) {
    const double bound = attention_bound + double(p.c.sparse_v) * double(p.c.rows);
    for (int64_t i = 0; i < p.results(); ++i) {
        const double e = relative_error(got.data() + i * p.c.head_v, want.data() + i * p.c.head_v, p.c.head_v);
        if (e <= bound) continue;
        check::Case row("stream ", i / p.c.heads / p.c.tokens, ", token ", i / p.c.heads % p.c.tokens, ", head ",
                        i % p.c.heads, ", relative error ", e);
        CHECK(e <= bound);
    }
    CHECK(true);
}

// Computes the case in one range, in two ranges, and with one call of tq_attention.
void conforms(const AttentionCase & c, Extent extent) {
    check::Case case_(c.name);
    use("scalar");
    const Problem p(c);
    const std::vector<double> want = p.want(rounded_queries(p));
    use(kernels_under_test);
    Host host(p);
    check_rows(p, host.finished(host.partial(0, c.rows)), want);
    const bool few = c.rows <= 200; // few rows are divided at many places, others at one
    static int64_t turn = 0;
    int64_t number = 0;
    for (const int64_t middle : {1, 16, 64, 70, 100, 128, 199})
        for (const bool backwards : {false, true}) {
            if (middle > c.rows || (!few && number++ != int64_t(c.name.size() % 14))) continue;
            if (few && turn++ % 5 && extent < Extent::whole) continue; // every place in some cases
            check::Case split_case("split at ", middle, backwards ? ", backwards" : "");
            check_rows(p, host.split(middle, backwards), want);
        }
    if (c.max_bias > 0 || c.sinks != Sinks::none || c.mask_heads > 1) return;
    check::Case call_case("one call");
    check_rows(p, by_one_call(p), want);
}

// Values that are not finite do not affect which rows of V are left out.
void counts_as_if_finite(const AttentionCase & c) {
    if (c.bad_value < 0) return;
    check::Case case_(c.name);
    AttentionCase finite = c;
    finite.bad_value = -1;
    const Problem p(c), other(finite);
    Host host(p), other_host(other);
    host.partial(0, c.rows);
    other_host.partial(0, c.rows);
    CHECK_EQ(host.left_out, other_host.left_out);
}

// Rows after the last one that any query of a tile sees are not decoded. They count neither as read nor as left out.
void rows_behind_all_prefixes(const AttentionCase & c) {
    const Problem p(c);
    Host whole(p), seen(p);
    const int64_t end = c.last + 1, tile_end = std::min((end + 63) / 64 * 64, c.rows);
    CHECK(whole.partial(0, c.rows) == seen.partial(0, end));
    CHECK_EQ(whole.left_out, seen.left_out + (tile_end - end) * c.kv_heads);
}

// A host may ask for the size of the scratch memory before other kernels are selected.
void scratch_serves_all_kernels() {
    for (const auto & pair : attention_list::mixed_pairs) {
        AttentionCase c = attention_list::with_types(pair.k, pair.v, pair.head_k, pair.head_v);
        c.rows = 70;
        use("scalar");
        const Problem p(c);
        use(kernels_under_test);
        const auto want = Host(p).partial(0, c.rows);
        for (int i = 0; i < tq_kernels_count(); ++i) {
            if (!tq_kernels_supported(i)) continue;
            check::Case case_("scratch for ", tq_kernels_name(i), ": ", attention_list::described(c));
            Host host(p);
            host.size_kernels = tq_kernels_name(i);
            CHECK(host.partial(0, c.rows) == want);
        }
    }
}

} // namespace

int main(int argc, char ** argv) {
    return test_kernels(argc, argv, [](Extent extent) {
        std::set<std::string> names;
        for (const AttentionCase & c : attention_cases()) {
            if (!CHECK(names.insert(c.name).second)) std::fprintf(stderr, "twice: %s\n", c.name.c_str());
            if (c.extent > extent || (c.for_gpus && extent < Extent::whole)) continue;
            conforms(c, extent);
            if (c.mask == Mask::alternating) counts_as_if_finite(c);
            if (c.mask == Mask::prefixes && c.last < c.rows) rows_behind_all_prefixes(c);
        }
        std::printf("%zu cases\n", names.size());
        scratch_serves_all_kernels();
    });
}
