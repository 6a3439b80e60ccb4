// Tests the CUDA attention: the conformance list, and the cases that it refuses.
#include "check.h"
#include "device.h"
#include "problem.h"
#include "turboquant_cuda.h"
#include "window.h"

#include <algorithm>
#include <map>
#include <optional>
#include <set>

using namespace turboquant::cuda;

namespace {

// Rounding errors: queries and weights are integers of 15 bits; with f16 and eight columns they have 11 bits. With
// many columns weights and V have 11 bits, and so have queries, or 8 if K is turbo. Most such queries are already
// rounded to what the kernel makes of them, so that the bound is the smaller one. Sums are float32. If a warp has four
// columns, its weights over turbo types in heads of one block are integers with one scale for many tiles, which is
// chosen so that later weights may be larger.
constexpr double integers = 2e-4, kept_integers = 1e-3, halves = 2e-3, bytes = 2e-2;

// The cases that turboquant_cuda.h lists as supported.
bool covers(const AttentionCase & c) {
    const auto turbo = [&](int type) {
        return type < TQ_TYPE_COUNT && attention_list::for_head(type, c.head_k) == type;
    };
    const auto known = [&](int type) { return turbo(type) || type == TQ_ROW_Q8_0 || type == TQ_ROW_F16; };
    const bool few = c.tokens * c.group() <= 32; // columns, which the decode kernel takes
    const bool head = c.head_k == c.head_v &&
                      (c.head_k == 64 || c.head_k == 128 || c.head_k == 256 || (c.head_k == 96 && few));
    using attention_list::is_trellis;
    const bool pair = turbo(c.type_k) && turbo(c.type_v) ? is_trellis(c.type_k) == is_trellis(c.type_v)
                                                         : turbo(c.type_k) || turbo(c.type_v);
    return head && known(c.type_k) && known(c.type_v) && pair && c.rows > 0;
}

// Whether the buffers of a case that is covered may need more shared memory than the GPU has. GeForce GPUs have too
// little for some heads of 256 with K in q8_0 or f16, which depends on the alignment of rows, too.
bool may_not_fit(const AttentionCase & c) {
    return c.head_k == 256 && c.type_k >= TQ_TYPE_COUNT && c.tokens * c.group() > 32 && shared_per_block() < 128 << 10;
}

// Tensor cores multiply hidden values of f16 by zero, so hidden infinities and NaN have an effect.
bool exempt(const AttentionCase & c) { return c.type_v == TQ_ROW_F16 && c.hides_bad_values(); }

// A window's rows on the device. The slots end with a row for what gets no slot.
struct Window {
    Windowed host;
    DeviceArray<uint8_t> slots_k, slots_v;
    DeviceArray<uint16_t> far, exact;
    DeviceArray<float> batch_k, batch_v;
    std::vector<int64_t> store; // where the batch's rows of all streams go
    DeviceArray<int64_t> store_rows;

    Window(Problem & p, int type, InSlots in_slots)
        : host(p, type, in_slots), slots_k(with_one_more(host.slots_k, p.c, host.slot_head_k)),
          slots_v(with_one_more(host.slots_v, p.c, host.slot_head_v)), far(host.far), exact(host.exact),
          batch_k(host.batch_k), batch_v(host.batch_v), store(targets(p.c)), store_rows(store) {}

    ExactRows exact_rows(const AttentionCase & c) const {
        ExactRows x = {};
        x.type = host.type == TQ_ROW_F16 ? KV::f16 : KV::q8_0;
        x.slots = host.slots;
        x.k = x.store_k = slots_k.get();
        x.v = x.store_v = slots_v.get();
        x.k_head = host.slot_head_k;
        x.v_head = host.slot_head_v;
        x.k_row = x.k_head * c.kv_heads;
        x.v_row = x.v_head * c.kv_heads;
        x.k_stream = x.k_row * host.slots;
        x.v_stream = x.v_row * host.slots;
        x.batch_k = batch_k.get();
        x.batch_v = batch_v.get();
        x.batch_k_head = x.batch_v_head = c.head_k * 4;
        x.batch_k_row = x.batch_v_row = x.batch_k_head * c.kv_heads;
        x.batch_k_stream = x.batch_v_stream = x.batch_k_row * host.batch;
        x.mask = exact.get();
        x.mask_token = (host.slots + host.batch) * 2;
        x.mask_head = x.mask_token * c.tokens;
        x.mask_stream = x.mask_head * c.mask_heads;
        x.mask_heads = c.mask_heads;
        x.mask_streams = c.streams;
        x.store_rows = store_rows.get();
        return x;
    }

    // The batch is in its slots, rounded, and no other slot has changed.
    void check_slots(const AttentionCase & c) const {
        check_side(c, host.slots_k, host.slot_head_k, slots_k.host(), host.batch_k);
        check_side(c, host.slots_v, host.slot_head_v, slots_v.host(), host.batch_v);
    }

private:
    int64_t total(const AttentionCase & c) const { return host.slots * c.kv_streams; }

    static std::vector<uint8_t> with_one_more(std::vector<uint8_t> bytes, const AttentionCase & c, int64_t head) {
        bytes.resize(bytes.size() + size_t(head * c.kv_heads), 0);
        return bytes;
    }

    std::vector<int64_t> targets(const AttentionCase & c) const {
        std::vector<int64_t> rows;
        for (int64_t i = 0; i < host.batch * c.kv_streams; ++i) rows.push_back(std::max<int64_t>(total(c) - 1 - i, -1));
        for (int64_t & row : rows) row = row < 0 ? total(c) : row;
        return rows;
    }

    void check_side(const AttentionCase & c, const std::vector<uint8_t> & before, int64_t head,
                    const std::vector<uint8_t> & after, const std::vector<float> & batch) const {
        const int64_t row_size = head * c.kv_heads, values = c.head_k * c.kv_heads;
        bool kept = true;
        double worst = 0; // error over what rounding allows
        for (int64_t row = 0; row < total(c); ++row) {
            const auto found = std::find(store.begin(), store.end(), row);
            const uint8_t * now = after.data() + row * row_size;
            if (found == store.end()) {
                kept = kept && std::equal(now, now + row_size, before.data() + row * row_size);
                continue;
            }
            std::vector<float> y(static_cast<size_t>(values));
            decode_row(host.type, now, y.data(), values);
            const float * x = batch.data() + (found - store.begin()) * values;
            for (int64_t first = 0; first < values; first += 32) {
                float top = 0;
                for (int64_t i = first; i < first + 32; ++i) top = std::max(top, std::fabs(x[i]));
                for (int64_t i = first; i < first + 32; ++i) {
                    // half a level, and the scale's own rounding on 127 levels
                    const double allowed = host.type == TQ_ROW_F16 ? std::fabs(x[i]) / 2048 + 1e-7
                                                                   : top * (0.501 / 127 + 1.0 / 2048) + 1e-5;
                    worst = std::max(worst, std::fabs(double(y[size_t(i)]) - double(x[i])) / allowed);
                }
            }
        }
        CHECK(kept);
        CHECK(worst <= 1);
    }
};

// Rows of K and V that a call stores in blocks beside its attention.
struct Stored {
    static constexpr int rows = 3;
    const int64_t values;
    std::vector<float> host_k, host_v;
    DeviceArray<float> k, v;
    DeviceArray<uint8_t> blocks_k, blocks_v;
    Store stores[2];

    explicit Stored(const AttentionCase & c)
        : values(int64_t(c.kv_heads) * c.head_k), host_k(normal(values * rows, 1)), host_v(normal(values * rows, 2)),
          k(host_k), v(host_v), blocks_k(size_t(rows) * row_bytes(c.type_k, values)),
          blocks_v(size_t(rows) * row_bytes(c.type_v, values)),
          stores{store(c.type_k, k, blocks_k), store(c.type_v, v, blocks_v)} {}

    void check_blocks(const AttentionCase & c) const {
        check_side(c.type_k, host_k, blocks_k.host());
        check_side(c.type_v, host_v, blocks_v.host());
    }

private:
    static std::vector<float> normal(int64_t n, uint64_t seed) {
        Random random{seed};
        std::vector<float> x(static_cast<size_t>(n));
        for (float & value : x) value = random.normal();
        return x;
    }
    Store store(int type, const DeviceArray<float> & from, const DeviceArray<uint8_t> & to) const {
        const int64_t row = int64_t(row_bytes(type, values));
        return {tq_type(type), {from.get(), {values * 4, 0, 0}}, {to.get(), {row, 0, 0}}, {values, rows, 1, 1},
                {nullptr, false, {1, 1, 1}, {0, 0, 0}}};
    }
    void check_side(int type, const std::vector<float> & x, const std::vector<uint8_t> & got) const {
        std::vector<uint8_t> want(got.size());
        for (int i = 0; i < rows; ++i)
            encode_row(type, x.data() + i * values, want.data() + i * row_bytes(type, values), values);
        CHECK(got == want);
    }
};

// Queries near x that become integers without an error when the kernel for many columns rotates them and rounds them to
// bytes.
std::vector<float> on_grid(const std::vector<float> & x, int head) {
    const int block = std::min(head, 128);
    const int64_t n = int64_t(x.size());
    std::vector<float> y(x.size());
    tq_rotate(block, x.data(), y.data(), n, 1);
    for (int64_t first = 0; first < n; first += head) {
        float top = 0;
        for (int64_t i = first; i < first + head; ++i) top = std::max(top, std::fabs(y[size_t(i)]));
        for (int64_t i = first; i < first + head; ++i)
            if (top > 0) y[size_t(i)] = std::round(y[size_t(i)] * 127 / top) * top / 127;
    }
    tq_unrotate(block, y.data(), y.data(), n, 1);
    return y;
}

// The batch of a window, which a call stores in its rows of the cache: they are hidden from the queries that are
// computed.
struct StoredBatch {
    Store stores[2];

    StoredBatch(const AttentionCase & c, const Problem & p, const Window & window, const DeviceArray<uint8_t> & k,
                const DeviceArray<uint8_t> & v)
        : stores{store(c, p.k, window.batch_k, k, window.host.batch),
                 store(c, p.v, window.batch_v, v, window.host.batch)} {}

    // Nothing but these rows has changed.
    static void check_rows(const AttentionCase & c, const Cache & before, const std::vector<float> & batch,
                           int64_t rows, const std::vector<uint8_t> & after) {
        std::vector<uint8_t> want = before.bytes;
        const float * x = batch.data();
        for (int64_t s = 0; s < c.kv_streams; ++s)
            for (int64_t i = c.rows - rows; i < c.rows; ++i)
                for (int64_t h = 0; h < c.kv_heads; ++h, x += before.head)
                    encode_row(before.type, x, want.data() + s * before.stream + i * before.row + h * before.apart,
                               before.head);
        CHECK(after == want);
    }

private:
    static Store store(const AttentionCase & c, const Cache & cache, const DeviceArray<float> & batch,
                       const DeviceArray<uint8_t> & to, int64_t rows) {
        const int64_t head = cache.head * 4, row = head * c.kv_heads;
        return {tq_type(cache.type),
                {batch.get(), {row, head, row * rows}},
                {to.get() + (c.rows - rows) * cache.row, {cache.row, cache.apart, cache.stream}},
                {cache.head, rows, c.kv_heads, c.kv_streams},
                {nullptr, false, {1, 1, 1}, {0, 0, 0}}};
    }
};

// Checks the blocks of 32 values to which an output was rounded. Half of a unit is not exact, because the kernel may
// divide differently.
void check_quantized(const std::vector<QuantizedValues> & blocks, const std::vector<float> & output) {
    constexpr double ulp = 1.0 / 1024, smallest = 6e-8; // of binary16
    int wrong = 0;
    for (size_t b = 0; b < blocks.size(); ++b) {
        const float * x = output.data() + 32 * b;
        double largest = 0, sum = 0, all = 0;
        bool finite = true;
        for (int i = 0; i < 32; ++i) {
            largest = std::max(largest, std::fabs(double(x[i])));
            sum += double(x[i]);
            all += std::fabs(double(x[i]));
            finite = finite && std::isfinite(x[i]);
        }
        if (!finite) continue;
        const auto half = [](const uint16_t & bits) { return half_at(reinterpret_cast<const uint8_t *>(&bits)); };
        const double scale = largest / 127;
        bool right = std::fabs(half(blocks[b].scale) - scale) <= ulp * scale + smallest &&
                     std::fabs(half(blocks[b].sum) - sum) <= ulp * std::fabs(sum) + 1e-6 * all + smallest;
        for (int i = 0; i < 32; ++i)
            right = right && std::fabs(blocks[b].values[i] - (largest == 0 ? 0 : double(x[i]) / scale)) < 0.501;
        wrong += !right;
    }
    CHECK_EQ(wrong, 0);
}

std::set<std::string> left_out; // cases whose kernels were not compiled

// Whether notes_key differs for calls that have different notes, and only for these.
void check_keys(const Attention & a, const AttentionPlan & plan) {
    const auto differs = [&](auto change) {
        Attention b = a;
        AttentionPlan p = plan;
        change(b, p);
        return notes_key(b, p) != notes_key(a, plan);
    };
    CHECK(!differs([](Attention & b, AttentionPlan & p) {
        b.q = b.dst;
        b.k = b.v = nullptr;
        b.scale *= 2;
        b.exact.k = b.exact.v = nullptr;
        p.chunks += 1;
    }));
    const bool of_exact = plan.wide && a.windowed;
    const auto other = [](const void * mask) { return static_cast<const char *>(mask) + 16; };
    CHECK(differs([&](Attention & b, AttentionPlan &) { b.mask = other(b.mask); }));
    CHECK_EQ(differs([&](Attention & b, AttentionPlan &) { b.exact.mask = other(b.exact.mask); }), of_exact);
    CHECK_EQ(differs([](Attention & b, AttentionPlan &) { b.exact.slots += 1; }), of_exact);
    CHECK_EQ(differs([](Attention & b, AttentionPlan &) { b.windowed = !b.windowed; }), of_exact);
    CHECK(differs([](Attention & b, AttentionPlan &) { b.n_kv += 8; }));
    CHECK(differs([](Attention & b, AttentionPlan &) { b.tokens += 1; }));
    for (int64_t Attention::*stride : {&Attention::mask_token, &Attention::mask_head, &Attention::mask_stream})
        CHECK(differs([&](Attention & b, AttentionPlan &) { b.*stride += 16; }));
    for (int64_t ExactRows::*stride : {&ExactRows::mask_token, &ExactRows::mask_head, &ExactRows::mask_stream})
        CHECK_EQ(differs([&](Attention & b, AttentionPlan &) { b.exact.*stride += 16; }), of_exact);
    for (int Attention::*count : {&Attention::mask_heads, &Attention::mask_streams})
        CHECK(differs([&](Attention & b, AttentionPlan &) { b.*count += 1; }));
    for (int ExactRows::*count : {&ExactRows::mask_heads, &ExactRows::mask_streams})
        CHECK_EQ(differs([&](Attention & b, AttentionPlan &) { b.exact.*count += 1; }), of_exact);
    CHECK(differs([](Attention &, AttentionPlan & p) { p.notes_bytes = 0; }));
    CHECK(differs([](Attention &, AttentionPlan & p) { p.gathered = !p.gathered; }));
    CHECK(differs([](Attention &, AttentionPlan & p) { p.device += 1; }));
}

// Notes of masks that an earlier call has written, whose other operands were different.
struct SharedNotes {
    DeviceArray<uint8_t> memory; // and some bytes behind the notes
    std::vector<float> blind;    // the result of a call that reads notes that no row is seen

    SharedNotes(const Attention & a, const AttentionPlan & plan, const Problem & p)
        : memory(plan.notes_bytes + behind) {
        const DeviceArray<uint8_t> k(std::vector<uint8_t>(p.k.bytes.size())), v(std::vector<uint8_t>(p.v.bytes.size()));
        const DeviceArray<float> q(std::vector<float>(p.q.size(), 1));
        Attention other = a;
        other.k = k.get();
        other.v = v.get();
        other.q = q.get();
        const auto set = [&](int value) { must(cudaMemset(memory.get(), value, plan.notes_bytes), "cudaMemset"); };
        result(other, plan, false);
        const std::vector<uint8_t> written = memory.host();
        CHECK(std::all_of(written.end() - behind, written.end(), [](uint8_t x) { return x == poison; }));
        set(0);
        blind = result(a, plan, true);
        const std::vector<uint8_t> kept = memory.host();
        CHECK(std::all_of(kept.begin(), kept.end() - behind, [](uint8_t x) { return x == 0; }));
        set(poison);
        result(other, plan, false);
        CHECK(memory.host() == written);
    }
    MaskNotes notes(bool written) const { return {memory.get(), written}; }

private:
    static constexpr int behind = 64;

    // The call stores nothing.
    std::vector<float> result(Attention a, const AttentionPlan & plan, bool written) const {
        const DeviceArray<uint8_t> workspace(plan.workspace_bytes - plan.notes_bytes);
        const DeviceArray<float> dst(size_t(a.streams) * size_t(a.tokens) * size_t(a.heads) * size_t(a.head));
        a.dst = dst.get();
        a.quantized = nullptr;
        a.exact.store_rows = nullptr;
        must(attention(a, plan, workspace.get(), nullptr, nullptr, notes(written)), "attention");
        must(cudaDeviceSynchronize(), "attention");
        return dst.host();
    }
};

std::map<std::string, int> sharing; // by kind of plan: the calls that read notes of an earlier one
int finished = 0;                   // calls whose query rows the kernel for Hopper GPUs finishes

// Whether the case is one of the first of its kind of plan in which queries see some of the rows.
bool shares_notes(const AttentionCase & c, const Attention & a, const AttentionPlan & plan) {
    const bool usual = (c.mask == Mask::causal || c.mask == Mask::alternating || c.mask == Mask::runs) && c.rows > 64 &&
                       c.first == 0 && c.last == INT64_MAX && c.bad_key < 0 && c.bad_value < 0 && !c.far;
    if (plan.notes_bytes == 0 || !usual) return false;
    const char * kind = plan.gathered     ? "gathered rows"
                        : plan.eights > 0 ? "few tokens on Hopper GPUs"
                        : plan.direct     ? "few tokens"
                        : plan.hopper     ? "Hopper GPUs"
                                          : "many columns";
    return ++sharing[kind + std::string(a.windowed ? " with a window" : "")] <= 3;
}

// slots: the type of a window's, or no_window.
constexpr int no_window = -1;
void conforms(const AttentionCase & c, int slots, InSlots in_slots = InSlots::third, int requests = 0) {
    const bool windowed = slots != no_window;
    const char * window_name = slots == TQ_ROW_F16 ? ", with a window in f16" : ", with a window in q8_0";
    const char * of = in_slots == InSlots::all           ? " of all rows"
                      : in_slots == InSlots::all_but_one ? " of nearly all"
                                                         : "";
    check::Case case_(c.name, windowed ? window_name + std::string(of) : "");
    Problem p(c);
    DeviceArray<uint8_t> k_data(p.k.bytes), v_data(p.v.bytes);
    DeviceArray<float> q_data(p.q), sink_data(p.sinks);
    DeviceArray<uint16_t> mask_data(p.mask);
    Attention a = {};
    a.head = c.head_k;
    a.heads = c.heads;
    a.kv_heads = c.kv_heads;
    a.tokens = c.tokens;
    a.streams = c.streams;
    a.kv_streams = c.kv_streams;
    a.n_kv = c.rows;
    a.q = q_data.get();
    a.q_head = c.head_k * 4;
    a.q_token = a.q_head * c.heads;
    a.q_stream = a.q_token * c.tokens;
    a.k = k_data.get();
    a.k_row = p.k.row;
    a.k_head = p.k.apart;
    a.k_stream = p.k.stream;
    a.v = v_data.get();
    a.v_row = p.v.row;
    a.v_head = p.v.apart;
    a.v_stream = p.v.stream;
    a.mask = p.mask.empty() ? nullptr : mask_data.get();
    a.mask_token = c.rows * 2;
    a.mask_head = a.mask_token * c.tokens;
    a.mask_stream = a.mask_head * c.mask_heads;
    a.mask_heads = c.mask_heads;
    a.mask_streams = c.streams;
    a.sinks = p.sinks.empty() ? nullptr : sink_data.get();
    a.scale = p.scale;
    a.max_bias = c.max_bias;
    a.soft_cap = c.soft_cap;
    a.sparse_v = c.sparse_v;
    a.requests = requests;
    DeviceArray<float> dst(size_t(p.results() * c.head_v));
    a.dst = dst.get();
    std::optional<Window> window;
    if (windowed) {
        a.windowed = true;
        a.mask = window.emplace(p, slots, in_slots).far.get();
        a.exact = window->exact_rows(c);
    }
    DeviceArray<QuantizedValues> quantized(size_t(p.results() * c.head_v / 32));
    AttentionPlan plan = {};
    const bool types = kv_of_type(c.type_k, c.head_k, a.type_k) && kv_of_type(c.type_v, c.head_v, a.type_v);
#ifdef TURBOQUANT_COMPILES
    if (covers(c) && !TURBOQUANT_COMPILES(a.type_k, a.type_v, c.head_k)) {
        left_out.insert(c.name);
        return;
    }
#endif
    const bool planned = types && c.head_k == c.head_v && plan_attention(a, plan);
    if (!planned && covers(c) && may_not_fit(c)) return;
    if (!CHECK_EQ(planned, covers(c)) || !covers(c) || exempt(c)) return;
    CHECK(!(plan.wide && requests > 1 && plan.columns <= 32));
    if (c.kv_streams == 80 && c.rows > 1000 && slots == TQ_ROW_Q8_0) CHECK(plan.slot_parts > 0); // a kernel of its own
    if (requests > 1) { // rows are gathered where bulk copies can copy each of them
        bool aligned = false; // the rows of all heads, or of each group of them
        for (int heads = 1; heads <= 8; ++heads) {
            const size_t bytes = row_bytes(c.type_k, c.head_k) * size_t(heads),
                         others = row_bytes(c.type_v, c.head_k) * size_t(heads);
            aligned = aligned || (c.kv_heads % heads == 0 && bytes % 16 == 0 && others % 16 == 0 &&
                                  p.k.row % 16 == 0 && p.v.row % 16 == 0);
        }
        const bool types_listed = a.type_k <= KV::q8_0 && a.type_v < KV::q8_0;
        const bool listed = device_version() >= 90 && types_listed && aligned && c.heads_adjacent && c.rows % 8 == 0 &&
                            c.mask != Mask::none && c.mask_heads == 1;
        CHECK_EQ(plan.gathered, listed);
    }
    const bool in_bytes = plan.wide && c.type_k < TQ_TYPE_COUNT; // queries
    const bool rounded = in_bytes && (windowed || c.mask != Mask::none);
    std::optional<DeviceArray<float>> rounded_queries;
    if (rounded) {
        p.q = on_grid(p.q, c.head_k);
        a.q = rounded_queries.emplace(p.q).get();
    }
    finished += plan.hopper && !plan.merged;
    CHECK_EQ(plan.notes_bytes > 0, plan.gathered || (plan.wide && (a.mask || windowed)));
    std::optional<SharedNotes> shared;
    if (shares_notes(c, a, plan)) {
        check_keys(a, plan);
        shared.emplace(a, plan, p);
    }
    if (plan.merged) a.quantized = quantized.get();
    static int turn = 0;
    plan.kept = plan.kept || ++turn % 2; // plans keep products only where warps have many tiles, so in few cases
    DeviceArray<uint8_t> workspace(plan.workspace_bytes);
    std::optional<Stored> stored;
    std::optional<StoredBatch> stored_batch;
    if (c.type_k < TQ_TYPE_COUNT && c.type_v < TQ_TYPE_COUNT) {
        if (window) stored_batch.emplace(c, p, *window, k_data, v_data);
        else stored.emplace(c);
    }
    const Store * stores = stored ? stored->stores : stored_batch ? stored_batch->stores : nullptr;
    must(attention(a, plan, workspace.get(), nullptr, stores, shared ? shared->notes(true) : MaskNotes{}), "attention");
    must(cudaDeviceSynchronize(), "attention");

    const std::vector<double> want = p.want(p.q);
    const std::vector<float> got = dst.host();
    const double e = relative_error(got.data(), want.data(), int64_t(want.size()));
    const bool half = a.type_k == KV::f16 || a.type_v == KV::f16;
    const bool kept = plan.kept && plan.column_tile == 4 && c.type_v < TQ_TYPE_COUNT && c.head_v % 96 && c.head_v < 256;
    const double bound =
        (in_bytes && !rounded ? bytes : plan.wide || half ? halves : kept ? kept_integers : integers) +
                         double(c.sparse_v) * double(c.rows);
    static double worst = 0;
    if (e > worst || !(e <= bound)) {
        worst = std::max(worst, e);
        std::printf("%-100s %.2e\n", check::where.c_str(), e);
    }
    CHECK(e <= bound);
    if (shared) CHECK(shared->blind != got);
    if (plan.merged) check_quantized(quantized.host(), got);
    if (window) window->check_slots(c);
    if (stored) stored->check_blocks(c);
    if (stored_batch) {
        StoredBatch::check_rows(c, p.k, window->host.batch_k, window->host.batch, k_data.host());
        StoredBatch::check_rows(c, p.v, window->host.batch_v, window->host.batch, v_data.host());
    }
}

} // namespace

// The arguments are an extent of the list, of which brief is for compute-sanitizer, and the first letters of the names
// of the cases to run.
int main(int argc, char ** argv) {
    need_device(80);
    const Extent extent = extent_from(argc > 1 ? argv[1] : "whole");
    int covered = 0;
    for (const AttentionCase & c : attention_cases()) {
        if (c.extent > extent || (argc > 2 && c.name.rfind(argv[2], 0) != 0)) continue;
        conforms(c, no_window);
        const bool shared = c.tokens > 1 && c.streams == 1 && c.rows > 2048; // perhaps by requests of a token each
        if (shared) conforms(c, no_window, InSlots::third, c.tokens);
        covered += covers(c) && !exempt(c);
        const bool plain = c.bytes == Bytes::encoded || c.bytes == Bytes::any; // f16 has their range
        // A far row's weight is zero beside the rows of a window, and a NaN in it counts only by chance.
        if (plain && c.tokens <= c.rows && c.rows <= 5000 && c.spread == 1 && !(c.far && c.bad_value >= 0)) {
            conforms(c, covered % 2 ? TQ_ROW_F16 : TQ_ROW_Q8_0);
            if (shared || c.kv_streams == 80)
                for (const int type : {TQ_ROW_F16, TQ_ROW_Q8_0}) conforms(c, type, InSlots::third, c.tokens);
            if (c.rows <= 256) conforms(c, TQ_ROW_Q8_0, covered % 3 ? InSlots::all : InSlots::all_but_one);
        }
    }
    std::printf("%d cases\n", covered);
    for (const auto & [kind, calls] : sharing)
        std::printf("%d calls with notes of an earlier one: %s\n", std::min(calls, 3), kind.c_str());
    std::printf("%d calls that the kernel for Hopper GPUs finishes\n", finished);
    if (!left_out.empty()) std::printf("%zu of them skipped: their kernels are not compiled\n", left_out.size());
    Attention a = {};
    AttentionPlan plan;
    a.heads = a.kv_heads = a.tokens = a.streams = a.kv_streams = 1;
    a.n_kv = 32;
    a.head = 80;
    CHECK(!plan_attention(a, plan));
    a.head = 128;
    a.type_k = a.type_v = KV::f16;
    CHECK(!plan_attention(a, plan));
    a.type_k = a.type_v = KV::turbo4;
    a.n_kv = 300;
    a.windowed = true;
    a.exact.type = KV::q8_0; // without slots; the batch's own rows are left
    CHECK(plan_attention(a, plan) && plan.exact_parts > 0);
    must(cudaDeviceSynchronize(), "at the end");
    return check::summary();
}
