// The operands of a case of attention.h: the bytes that a backend reads, and the formula in double precision for their
// values. Everything is deterministic.
#ifndef TURBOQUANT_TESTS_PROBLEM_H
#define TURBOQUANT_TESTS_PROBLEM_H

#include "attention.h"
#include "rows.h"

#include <deque>
#include <map>
#include <memory>
#include <tuple>

// Rows of one kind that problems share, because new rows for each problem would take most of the time.
struct RowPool {
    static constexpr int count = 1021;
    size_t row_bytes;
    std::vector<uint8_t> bytes;
    std::vector<float> values;

    RowPool(int type, int64_t head, Bytes kind)
        : row_bytes(::row_bytes(type, head)), bytes(count * row_bytes), values(size_t(count * head)) {
        Random r{uint64_t(type) * 4096 + uint64_t(head) * 4 + uint64_t(kind)};
        for (int i = 0; i < count; ++i) {
            uint8_t * row = bytes.data() + size_t(i) * row_bytes;
            make_row(r, type, kind, row, head);
            decode_row(type, row, values.data() + i * head, head);
        }
    }
    static const RowPool & of(int type, int64_t head, Bytes kind) {
        static std::map<std::tuple<int, int64_t, Bytes>, RowPool> pools;
        return pools.try_emplace({type, head, kind}, type, head, kind).first->second;
    }
};

// K or V: rows with strides, and their values [stream][row][KV head].
struct Cache {
    int type;
    int64_t head, row_bytes, row, apart, stream; // strides in bytes: of rows, heads, streams
    std::vector<uint8_t> bytes;
    std::vector<const float *> values;

    Cache(Random & r, const AttentionCase & c, bool key)
        : type(key ? c.type_k : c.type_v), head(key ? c.head_k : c.head_v),
          row_bytes(int64_t(::row_bytes(type, head))) {
        const RowPool & pool = RowPool::of(type, head, c.bytes);
        row = (c.heads_adjacent ? row_bytes * c.kv_heads : row_bytes) + c.pad;
        apart = c.heads_adjacent ? row_bytes : row * c.rows;
        stream = (c.heads_adjacent ? row : row * c.kv_heads) * c.rows;
        bytes.assign(size_t(stream * c.kv_streams), 0xa5);
        for (int64_t s = 0; s < c.kv_streams; ++s)
            for (int64_t i = 0; i < c.rows; ++i)
                for (int64_t h = 0; h < c.kv_heads; ++h) {
                    const int which = r.below(RowPool::count);
                    uint8_t * to = bytes.data() + s * stream + i * row + h * apart;
                    std::memcpy(to, pool.bytes.data() + size_t(which) * pool.row_bytes, pool.row_bytes);
                    values.push_back(pool.values.data() + which * head);
                    if (!key && c.steep && i >= c.rows / 2) { // the scale is binary16
                        to[1] = uint8_t(to[1] + (9 << 2)); // of the only block
                        own.emplace_back(size_t(head));
                        decode_row(type, to, own.back().data(), head);
                        values.back() = own.back().data();
                    }
                    if (i == (key ? c.bad_key : c.bad_value)) {
                        spoil_row(type, c.bad, to, head);
                        own.emplace_back(size_t(head));
                        decode_row(type, to, own.back().data(), head);
                        values.back() = own.back().data();
                    }
                    if (i < c.first || i > c.last) std::memset(to, 0xff, size_t(row_bytes));
                }
    }
    Cache(const Cache &) = delete;

private:
    std::deque<std::vector<float>> own; // values that are not in the pool
};

struct Problem {
    const AttentionCase c;
    Random random;
    Cache k, v;
    std::vector<float> q;       // [stream][token][head][head_k], in llama.cpp's order
    std::vector<uint16_t> mask; // binary16 [stream][mask head][token][rows], or empty
    std::vector<float> sinks;   // [head], or empty
    const float scale;

    explicit Problem(const AttentionCase & c_)
        : c(c_), random(seed_of(c.name)), k(random, c, true), v(random, c, false),
          q(size_t(c.streams * c.tokens * c.heads * c.head_k)), scale(1.0f / std::sqrt(float(c.head_k))) {
        for (float & x : q) x = random.normal() * c.spread;
        if (c.mask != Mask::none) mask.resize(size_t(int64_t(c.streams) * c.mask_heads * c.tokens * c.rows));
        for (int64_t i = 0; i < int64_t(mask.size()); ++i) mask[size_t(i)] = mask_at(i / c.rows % c.tokens, i % c.rows);
        if (c.sinks != Sinks::none) sinks.resize(size_t(c.heads));
        for (float & x : sinks) x = c.sinks == Sinks::normal ? random.normal() + 3 : -INFINITY;
    }

    int64_t results() const { return int64_t(c.streams) * c.tokens * c.heads; } // query rows
    const uint16_t * mask_row(int64_t stream, int64_t token, int head) const { // nullptr without a mask
        const int64_t row = (stream * c.mask_heads + head % c.mask_heads) * c.tokens + token;
        return mask.empty() ? nullptr : mask.data() + row * c.rows;
    }
    int kv_stream(int stream) const { return stream / (c.streams / c.kv_streams); }

    // The factor of a head's mask (ALiBi).
    float slope(int head) const {
        if (c.max_bias <= 0) return 1;
        int power = 1;
        while (2 * power <= c.heads) power *= 2;
        const double exponent = head < power ? double(head + 1) / power : (head - power + 0.5) / power;
        return float(std::pow(2.0, -double(c.max_bias) * exponent));
    }

    // softmax(scores) V of every query row: [stream][token][head][head_v]. `queries`
    // are the values of q after the backend's rounding.
    std::vector<double> want(const std::vector<float> & queries) const {
        std::vector<double> out(size_t(results() * c.head_v), 0.0), score(static_cast<size_t>(c.rows));
        for (int64_t i = 0; i < results(); ++i) {
            const int h = int(i % c.heads), stream = int(i / c.heads / c.tokens);
            const int64_t cell = kv_stream(stream) * c.rows * c.kv_heads + h / c.group();
            const float * query = queries.data() + i * c.head_k;
            const uint16_t * row_mask = mask_row(stream, i / c.heads % c.tokens, h);
            double largest = sinks.empty() ? -INFINITY : double(sinks[size_t(h)]);
            for (int64_t r = 0; r < c.rows; ++r) {
                double & s = score[size_t(r)];
                const int m = row_mask ? row_mask[r] : 0;
                s = -INFINITY; // the bytes of a hidden row have no effect
                if (m == 0xfc00) continue;
                s = double(scale) * dot(query, k.values[size_t(cell + r * c.kv_heads)]);
                if (c.soft_cap > 0) s = double(c.soft_cap) * std::tanh(s / double(c.soft_cap));
                s += double(slope(h)) * float_of_binary16(m);
                largest = std::max(largest, s);
            }
            double total = largest == -INFINITY || sinks.empty() ? 0 : std::exp(double(sinks[size_t(h)]) - largest);
            double * row = out.data() + i * c.head_v;
            for (int64_t r = 0; r < c.rows; ++r) {
                if (score[size_t(r)] == -INFINITY) continue;
                const double w = std::exp(score[size_t(r)] - largest);
                const float * value = v.values[size_t(cell + r * c.kv_heads)];
                total += w;
                for (int j = 0; j < c.head_v; ++j) row[j] += w * double(value[j]);
            }
            for (int j = 0; j < c.head_v && total != 0; ++j) row[j] /= total; // zeros if no row is seen
        }
        return out;
    }

private:
    double dot(const float * a, const float * b) const {
        double lane[8] = {}; // so that compilers vectorise the loop
        for (int i = 0; i < c.head_k; i += 8)
            for (int l = 0; l < 8; ++l) lane[l] += double(a[i + l]) * double(b[i + l]);
        return ((lane[0] + lane[1]) + (lane[2] + lane[3])) + ((lane[4] + lane[5]) + (lane[6] + lane[7]));
    }

    uint16_t mask_at(int64_t token, int64_t row) {
        const int64_t bad = std::max(c.bad_key, c.bad_value);
        bool hidden = row < c.first || row > c.last || (c.alone && row != bad && row / 64 == bad / 64);
        float bias = c.max_bias > 0 ? -float(row % 50) : c.far && row < c.rows / 2 ? -200.0f : 0.0f;
        switch (c.mask) {
            case Mask::none: break;
            case Mask::causal:
                hidden = hidden || row > c.rows - c.tokens + token || (random.below(10) == 0 && row != bad);
                break;
            case Mask::random:
                hidden = hidden || token == c.tokens - 1 || (token % 64 == 0 && row / 64 == 1) || random.below(2) == 0;
                bias = random.normal();
                break;
            case Mask::alternating: hidden = hidden || row % 2 != token % 2; break;
            case Mask::runs: hidden = hidden || row * 4 / c.rows != token % 4; break;
            case Mask::prefixes: hidden = hidden || row >= c.seen[token % 3]; break;
            case Mask::first: hidden = hidden || (token > 0 && row == bad); break;
        }
        return hidden ? 0xfc00 : binary16_of(bias);
    }
};

// ||got - want|| / ||want|| of the finite values; infinite if different values are finite. A row is not compared if all its
// weights are near float32's smallest values, which backends treat as 0.
inline double relative_error(const float * got, const double * want, int64_t n) {
    double d = 0, w = 0;
    for (int64_t i = 0; i < n; ++i) {
        if (std::isfinite(want[i]) != std::isfinite(got[i])) return INFINITY;
        if (!std::isfinite(want[i])) continue;
        d += (double(got[i]) - want[i]) * (double(got[i]) - want[i]);
        w += want[i] * want[i];
    }
    return std::sqrt(d) / std::max(std::sqrt(w), 1e-30);
}

#endif
