// The CUDA attention against one in double precision over the values that the CPU's decoder gives.
#include "check.h"
#include "device.h"
#include "inputs.h"
#include "turboquant_cuda.h"

#include <cuda_fp16.h>

#include <algorithm>
#include <cmath>
#include <cstring>

using namespace turboquant::cuda;

namespace {

const char * name_of(KV type) {
    const char * names[] = {"turbo4", "turbo3", "turbo2", "q8_0", "f16"};
    return names[int(type)];
}
bool turbo(KV type) { return type == KV::turbo4 || type == KV::turbo3 || type == KV::turbo2; }
tq_type codec_type(KV type, int head) {
    const tq_type base = type == KV::turbo4 ? TQ_TURBO4 : type == KV::turbo3 ? TQ_TURBO3 : TQ_TURBO2;
    return tq_type(int(base) + (head == 64));
}
int row_bytes(KV type, int head) {
    return type == KV::f16    ? 2 * head
           : type == KV::q8_0 ? head / 32 * 34
                              : int(tq_row_bytes(codec_type(type, head), head));
}

void encode_row(KV type, const std::vector<float> & x, uint8_t * bytes) {
    const int head = int(x.size());
    if (turbo(type)) {
        tq_encode_row(codec_type(type, head), x.data(), bytes, head);
    } else if (type == KV::f16) {
        for (int i = 0; i < head; ++i) {
            const __half h = __float2half_rn(x[size_t(i)]);
            std::memcpy(bytes + 2 * i, &h, 2);
        }
    } else {
        for (int b = 0; b < head / 32; ++b) {
            float top = 0;
            for (int i = 0; i < 32; ++i) top = std::max(top, std::fabs(x[size_t(32 * b + i)]));
            const __half d = __float2half_rn(top / 127);
            std::memcpy(bytes + 34 * b, &d, 2);
            for (int i = 0; i < 32; ++i) {
                const int q = top > 0 ? int(std::lround(x[size_t(32 * b + i)] * 127 / top)) : 0;
                bytes[34 * b + 2 + i] = uint8_t(int8_t(q));
            }
        }
    }
}

double half_at(const uint8_t * bytes) {
    __half h;
    std::memcpy(&h, bytes, 2);
    return __half2float(h);
}

void decode_row(KV type, const uint8_t * bytes, double * values, int head) {
    if (turbo(type)) {
        std::vector<float> y(static_cast<size_t>(head));
        tq_decode_row(codec_type(type, head), bytes, y.data(), head);
        std::copy(y.begin(), y.end(), values);
    } else if (type == KV::f16) {
        for (int i = 0; i < head; ++i) values[i] = half_at(bytes + 2 * i);
    } else {
        for (int i = 0; i < head; ++i) {
            const uint8_t * block = bytes + 34 * (i / 32);
            values[i] = half_at(block) * int8_t(block[2 + i % 32]);
        }
    }
}

// The scales of a row's blocks become scale(); a row of f16 has none.
template <typename F> void replace_scales(KV type, uint8_t * bytes, int head, F scale) {
    if (type == KV::f16) return;
    const int block = type == KV::q8_0 ? 34 : int(tq_type_get(codec_type(type, head))->block_bytes);
    for (int at = 0; at < row_bytes(type, head); at += block) {
        const uint16_t d = scale();
        std::memcpy(bytes + at, &d, 2);
    }
}

// Scales that decoders must take and that no encoder writes, beside zeros and ones.
enum class Scales { encoded, odd, subnormal };
uint16_t odd_scale(Scales scales, Random & random) {
    const uint16_t odd[] = {0xbc00, 0xb800, 0x3c00, 0x0000, 0x8000, 0x8123, 0x0123}; // -1, -0.5, 1, zeros, subnormals
    const uint16_t subnormal[] = {0x83ff, 0x8200, 0x02ab, 0x8155};
    return scales == Scales::odd ? odd[random.below(7)] : subnormal[random.below(4)];
}

struct Shape {
    KV type_k = KV::turbo4, type_v = KV::turbo4;
    int head = 128, heads = 8, kv_heads = 2, tokens = 1, streams = 1, kv_streams = 1;
    int64_t n_kv = 300;
    bool heads_adjacent = true; // as in a cache; else a head's rows follow each other
    int pad = 0;                // bytes between cache rows
    bool mask = true, sinks = false;
    float max_bias = 0, soft_cap = 0, sparse = 0, spread = 1; // spread: standard deviation of the scores
    int64_t first = 0, last = INT64_MAX; // rows before and behind these are hidden, and hold NaN
    Scales scales = Scales::encoded;
    int64_t bad_key = -1, bad_value = -1; // rows that hold NaN; of all masks only the causal one hides them
    bool far = false; // the first half of the rows has next to no weight
};

// ||got - want|| / ||want|| of what is finite; infinite if not the same is.
double error(const std::vector<float> & got, const std::vector<double> & want) {
    double d = 0, w = 0;
    for (size_t i = 0; i < want.size(); ++i) {
        if (std::isfinite(want[i]) != std::isfinite(got[i])) return INFINITY;
        if (!std::isfinite(want[i])) continue;
        d += (got[i] - want[i]) * (got[i] - want[i]);
        w += want[i] * want[i];
    }
    return w > 0 ? std::sqrt(d / w) : std::sqrt(d);
}

void equals_reference(const Shape & s, double bound) {
    check::Case c(name_of(s.type_k), "/", name_of(s.type_v), " head ", s.head, ", heads ", s.heads, "/", s.kv_heads,
                  ", ", s.tokens, " tokens, ", s.streams, "/", s.kv_streams, " streams, ", s.n_kv, " rows",
                  s.heads_adjacent ? "" : ", heads apart", s.pad ? ", padded" : "", s.mask ? "" : ", no mask",
                  s.sinks ? ", sinks" : "", ", bias ", s.max_bias, ", cap ", s.soft_cap, ", sparse ", s.sparse,
                  ", spread ", s.spread, s.first > 0 || s.last < s.n_kv ? ", partly hidden" : "",
                  s.scales == Scales::odd ? ", odd scales" : s.scales == Scales::subnormal ? ", subnormal scales" : "",
                  s.bad_key >= 0 ? ", NaN in K" : "", s.bad_value >= 0 ? ", NaN in V" : "",
                  s.far ? ", far" : "");
    Random random(uint64_t(s.head * 1000 + s.heads * 10 + s.tokens + s.n_kv));
    const int head = s.head;
    const size_t cells = size_t(s.kv_streams) * size_t(s.n_kv) * size_t(s.kv_heads);

    // K and V: bytes by strides, values as [stream][row][head]
    const auto cache = [&](KV type, Attention & a, bool key, std::vector<double> & values) {
        const int64_t bytes = row_bytes(type, head);
        const int64_t row = (s.heads_adjacent ? bytes * s.kv_heads : bytes) + s.pad,
                      apart = s.heads_adjacent ? bytes : row * s.n_kv;
        const int64_t stream = (s.heads_adjacent ? row : row * s.kv_heads) * s.n_kv;
        std::vector<uint8_t> data(size_t(stream * s.kv_streams), poison);
        values.resize(cells * size_t(head));
        std::vector<float> x(static_cast<size_t>(head));
        for (size_t cell = 0; cell < cells; ++cell) {
            for (float & v : x) v = random.normal();
            const int64_t h = int64_t(cell) % s.kv_heads, r = int64_t(cell) / s.kv_heads % s.n_kv,
                          st = int64_t(cell) / s.kv_heads / s.n_kv;
            uint8_t * to = data.data() + st * stream + r * row + h * apart;
            encode_row(type, x, to);
            if (s.scales != Scales::encoded)
                replace_scales(type, to, head, [&] { return odd_scale(s.scales, random); });
            if (r == (key ? s.bad_key : s.bad_value)) std::memset(to, 0xff, size_t(bytes));
            decode_row(type, to, values.data() + cell * size_t(head), head);
            if (r < s.first || r > s.last) std::memset(to, 0xff, size_t(bytes));
        }
        (key ? a.k_row : a.v_row) = row;
        (key ? a.k_head : a.v_head) = apart;
        (key ? a.k_stream : a.v_stream) = stream;
        return data;
    };
    Attention a = {};
    std::vector<double> k, v;
    DeviceArray<uint8_t> k_data(cache(s.type_k, a, true, k)), v_data(cache(s.type_v, a, false, v));

    std::vector<float> q(size_t(s.streams * s.tokens * s.heads * head));
    for (float & x : q) x = random.normal() * s.spread;
    std::vector<__half> mask(size_t(s.streams) * size_t(s.tokens) * size_t(s.n_kv));
    for (int64_t i = 0; i < int64_t(mask.size()); ++i) {
        const int64_t r = i % s.n_kv, token = i / s.n_kv % s.tokens;
        const bool seldom = random.below(10) == 0 && r != s.bad_key && r != s.bad_value;
        const bool hidden = r > s.n_kv - s.tokens + token || seldom || r < s.first || r > s.last;
        const float bias = s.max_bias > 0 ? -float(r % 50) : s.far && r < s.n_kv / 2 ? -200.0f : 0.0f;
        mask[size_t(i)] = __float2half_rn(hidden ? -INFINITY : bias);
    }
    std::vector<float> sinks(size_t(s.heads));
    for (float & x : sinks) x = random.normal() + 3;

    DeviceArray<float> q_data(q), sink_data(sinks);
    DeviceArray<__half> mask_data(mask);
    a.type_k = s.type_k;
    a.type_v = s.type_v;
    a.head = head;
    a.heads = s.heads;
    a.kv_heads = s.kv_heads;
    a.tokens = s.tokens;
    a.streams = s.streams;
    a.kv_streams = s.kv_streams;
    a.n_kv = s.n_kv;
    a.q = q_data.get(); // [stream][token][head]: as llama.cpp permutes it
    a.q_head = head * 4;
    a.q_token = a.q_head * s.heads;
    a.q_stream = a.q_token * s.tokens;
    a.k = k_data.get();
    a.v = v_data.get();
    a.mask = s.mask ? mask_data.get() : nullptr;
    a.mask_token = s.n_kv * 2;
    a.mask_stream = a.mask_token * s.tokens;
    a.mask_heads = 1;
    a.mask_streams = s.streams;
    a.sinks = s.sinks ? sink_data.get() : nullptr;
    a.scale = 1.0f / std::sqrt(float(head));
    a.max_bias = s.max_bias;
    a.soft_cap = s.soft_cap;
    a.sparse_v = s.sparse;
    const size_t results = size_t(s.streams * s.tokens * s.heads * head);
    DeviceArray<float> dst(results);
    a.dst = dst.get();
    AttentionPlan plan;
    if (!CHECK(plan_attention(a, plan))) return;
    DeviceArray<uint8_t> workspace(plan.workspace_bytes);
    must(attention(a, plan, workspace.get(), nullptr), "attention");
    must(cudaDeviceSynchronize(), "attention");
    const std::vector<float> got = dst.host();

    std::vector<double> want(results);
    int log2_heads = 1;
    while (2 * log2_heads <= s.heads) log2_heads *= 2;
    for (int st = 0; st < s.streams; ++st)
        for (int token = 0; token < s.tokens; ++token)
            for (int h = 0; h < s.heads; ++h) {
                const int kv_head = h / (s.heads / s.kv_heads), kv_stream = st / (s.streams / s.kv_streams);
                const float * query = q.data() + ((size_t(st) * s.tokens + token) * s.heads + h) * head;
                const double slope = s.max_bias <= 0  ? 1.0
                                     : h < log2_heads ? std::pow(std::pow(2.0, -double(s.max_bias) / log2_heads), h + 1)
                                                      : std::pow(std::pow(2.0, -double(s.max_bias) / 2 / log2_heads),
                                                                 2 * (h - log2_heads) + 1);
                std::vector<double> score(size_t(s.n_kv));
                double largest = s.sinks ? sinks[size_t(h)] : -INFINITY;
                for (int64_t r = 0; r < s.n_kv; ++r) {
                    const double * key = k.data() + ((size_t(kv_stream) * s.n_kv + r) * s.kv_heads + kv_head) * head;
                    double x = 0;
                    for (int i = 0; i < head; ++i) x += query[i] * key[i];
                    x *= a.scale;
                    if (s.soft_cap > 0) x = s.soft_cap * std::tanh(x / s.soft_cap);
                    const double bias =
                        s.mask ? __half2float(mask[(size_t(st) * s.tokens + token) * s.n_kv + r]) : 0.0;
                    x = bias == -INFINITY ? bias : x + slope * bias; // a hidden row's bytes do not matter
                    score[size_t(r)] = x;
                    largest = std::max(largest, x);
                }
                double total = s.sinks ? std::exp(sinks[size_t(h)] - largest) : 0;
                double * out = want.data() + ((size_t(st) * s.tokens + token) * s.heads + h) * head;
                for (int64_t r = 0; r < s.n_kv; ++r) {
                    if (score[size_t(r)] == -INFINITY) continue;
                    const double w = std::exp(score[size_t(r)] - largest);
                    total += w;
                    const double * value = v.data() + ((size_t(kv_stream) * s.n_kv + r) * s.kv_heads + kv_head) * head;
                    for (int i = 0; i < head; ++i) out[i] += w * value[i];
                }
                for (int i = 0; i < head && total > 0; ++i) out[i] /= total; // zeros where nothing is seen
            }
    const double e = error(got, want);
    static double worst = 0;
    if (e > worst || !(e <= bound)) {
        worst = std::max(worst, e);
        std::printf("%-100s %.2e\n", check::where.c_str(), e);
    }
    CHECK(e <= bound);
}

// Rounding: queries and weights are integers of 15 bits, f16 queries and weights have 11; sums are of float32.
constexpr double integers = 2e-4, halves = 2e-3;

double bound_of(const Shape & s) { return s.type_k == KV::f16 || s.type_v == KV::f16 ? halves : integers; }

// Blocks that are valid and that no encoder writes.
void takes_any_scale(const Shape & base) {
    for (const Scales scales : {Scales::odd, Scales::subnormal})
        for (const int heads : {8, 16}) // 4 and 8 columns
            for (const int64_t n_kv : {300, 2100}) {
                Shape s = base;
                s.scales = scales;
                s.heads = heads;
                s.n_kv = n_kv;
                equals_reference(s, bound_of(s));
            }
}

// NaN in a row reaches every query that sees the row, however KV rows are cut into parts, and no other.
void keeps_nan(const Shape & base) {
    for (const int64_t n_kv : {256, 2100}) // one run of rows, which the warps of a thread block share; several runs
        for (const bool sinks : {false, true}) {
            const auto both = [&](Shape s, int64_t row) {
                s.n_kv = n_kv;
                s.sinks = sinks;
                s.bad_key = row;
                equals_reference(s, bound_of(s));
                s.bad_key = -1;
                s.bad_value = row;
                equals_reference(s, bound_of(s));
            };
            Shape s = base;
            both(s, n_kv / 3);
            s.far = true; // the weight of the row's part is zero when the parts are merged
            both(s, 5);
            s = base;
            s.first = s.last = n_kv / 2; // nothing else is seen
            both(s, n_kv / 2);
            if (s.type_v == KV::f16) continue; // its hidden rows must be finite
            s = base;
            s.tokens = 3;
            both(s, n_kv - 2); // the first token does not see it
        }
}

} // namespace

// "quick": one case of each kernel with heads of 128, and a few shapes; for compute-sanitizer.
int main(int argc, char ** argv) {
    need_device(80);
    const bool quick = argc > 1 && std::strcmp(argv[1], "quick") == 0;
    const KV types[] = {KV::turbo4, KV::turbo3, KV::turbo2, KV::q8_0, KV::f16};
    for (const KV k : types)
        for (const KV v : types) {
            if (!turbo(k) && !turbo(v)) continue;
            for (const int head : {64, 128, 256}) {
                Shape s;
                s.type_k = k;
                s.type_v = v;
                s.head = head;
                if (quick && head != 128) continue;
                equals_reference(s, bound_of(s)); // group of 4
                if (quick) continue;
                s.heads = 16;
                s.n_kv = 517;
                equals_reference(s, bound_of(s)); // of 8
                s.kv_heads = 16;
                equals_reference(s, bound_of(s)); // of 1, two head groups
            }
        }
    for (const KV k : types)
        for (const KV v : types) {
            if (!turbo(k) && !turbo(v)) continue;
            for (const int head : {64, 128, 256}) {
                if (head != 128 ? quick || k != v : quick && k != KV::turbo4) continue;
                Shape s;
                s.type_k = k;
                s.type_v = v;
                s.head = head;
                takes_any_scale(s);
                keeps_nan(s);
            }
        }
    for (const KV k : {KV::turbo4, KV::turbo3, KV::q8_0}) {
        Shape base;
        base.type_k = k;
        base.type_v = k == KV::q8_0 ? KV::turbo3 : k;
        for (const int64_t n_kv : {1, 33, 1024, 2, 31, 32, 255, 256, 511, 512, 513, 5000}) {
            Shape s = base;
            s.n_kv = n_kv;
            equals_reference(s, bound_of(s));
            if (quick && n_kv == 1024) break;
        }
        for (const int64_t n_kv : {256, 512, 2100})
            for (const int tokens : {1, 3})
                for (const bool sinks : {false, true}) {
                    Shape s = base;
                    s.n_kv = n_kv;
                    s.tokens = tokens;
                    s.sinks = sinks;
                    s.last = 40; // a cache in its beginning
                    equals_reference(s, bound_of(s));
                    s.first = 33; // a sliding window
                    equals_reference(s, bound_of(s));
                    s.last = 32; // nothing at all
                    equals_reference(s, bound_of(s));
                }
        if (quick) { // 8 columns in two tiles, over several runs of rows
            Shape s = base;
            s.tokens = 3;
            s.n_kv = 700;
            equals_reference(s, bound_of(s));
            continue;
        }
        for (const int tokens : {2, 3, 5, 8})
            for (const int kv_heads : {1, 2, 3, 4, 5, 8}) {
                Shape s = base;
                s.tokens = tokens;
                s.kv_heads = kv_heads;
                s.heads = kv_heads * (kv_heads == 3 ? 3 : kv_heads == 5 ? 1 : 4);
                s.n_kv = 700;
                equals_reference(s, bound_of(s));
            }
        Shape s = base;
        s.heads_adjacent = false;
        equals_reference(s, bound_of(s));
        s.pad = 2;
        equals_reference(s, bound_of(s));
        s.heads_adjacent = true;
        equals_reference(s, bound_of(s));
        s = base;
        s.streams = s.kv_streams = 3;
        equals_reference(s, bound_of(s));
        s.kv_streams = 1;
        equals_reference(s, bound_of(s));
        s = base;
        s.mask = false;
        equals_reference(s, bound_of(s));
        s.n_kv = 113;
        equals_reference(s, bound_of(s));
        s = base;
        s.n_kv = 113; // odd: a token's mask may start at an odd half word
        s.tokens = 2;
        equals_reference(s, bound_of(s));
        s = base;
        s.max_bias = 8;
        s.heads = 12; // no power of two
        equals_reference(s, bound_of(s));
        s = base;
        s.soft_cap = 10;
        s.spread = 5;
        equals_reference(s, bound_of(s));
        s = base;
        s.sinks = true;
        equals_reference(s, bound_of(s));
        s = base;
        s.spread = 8; // peaked
        s.n_kv = 4000;
        equals_reference(s, bound_of(s));
        s.sparse = 1e-6f; // leaves out less than n_kv * 1e-6 of the weight
        equals_reference(s, 4000e-6 + bound_of(s));
        s = base;
        s.heads = 32;
        s.kv_heads = 8;
        s.n_kv = 20000;
        equals_reference(s, bound_of(s));
    }
    Attention a = {};
    AttentionPlan plan;
    a.heads = a.kv_heads = a.tokens = a.streams = a.kv_streams = 1;
    a.n_kv = 32;
    a.head = 96;
    CHECK(!plan_attention(a, plan));
    a.head = 128;
    a.type_k = a.type_v = KV::f16;
    CHECK(!plan_attention(a, plan));
    must(cudaDeviceSynchronize(), "at the end");
    return check::summary();
}
