// Tests the Metal attention in the emulator: the conformance list, and the cases that it refuses.
#include "arguments.h"
#include "check.h"
#include "device.h"
#include "problem.h"
#include "window.h"

#include <optional>

using namespace turboquant::metal;

namespace {

// Rounding errors: queries, levels and weights are float32 or exact, sums are float32. Values of other types than the
// turbo types have 11 bits. exp2 and tanh are those of the CPU.
constexpr double floats = 2e-5, halves = 2e-3;

// The cases that turboquant_metal.h lists as supported.
bool is_covered(const AttentionCase & c) {
    const auto turbo = [&](int type) { return type < TQ_TYPE_COUNT; };
    const auto known = [&](int type) {
        if (!turbo(type)) return type == TQ_ROW_Q8_0 || type == TQ_ROW_F16;
        const int block = tq_type_get(tq_type(type))->block;
        return c.head_k % block == 0 && c.head_k / block <= 4;
    };
    bool head = false;
    for (const int n : {64, 96, 128, 192, 256}) head = head || (c.head_k == n && c.head_v == n);
    return head && known(c.type_k) && known(c.type_v) && (turbo(c.type_k) || turbo(c.type_v));
}

// A window's rows on the device.
struct Window {
    Windowed host;
    DeviceArray<uint8_t> slots_k, slots_v;
    DeviceArray<uint16_t> far, exact;
    DeviceArray<float> batch_k, batch_v;

    Window(Problem & p, int type)
        : host(p, type), slots_k(host.slots_k), slots_v(host.slots_v), far(host.far), exact(host.exact),
          batch_k(host.batch_k), batch_v(host.batch_v) {}

    // The slots and the batch as sources.
    void add_to(Attention & a, const AttentionCase & c) const {
        const auto source = [&](int row_type, int64_t rows, const Buffer & k, const Buffer & v, int64_t k_head,
                                int64_t v_head, int64_t first_column) {
            Source s = {};
            s.type_k = s.type_v = row_type;
            s.n_kv = rows;
            s.k = k;
            s.v = v;
            s.k_head = k_head;
            s.v_head = v_head;
            s.k_row = k_head * c.kv_heads;
            s.v_row = v_head * c.kv_heads;
            s.k_stream = s.k_row * rows;
            s.v_stream = s.v_row * rows;
            s.mask = exact.buffer();
            s.mask.offset += size_t(first_column) * 2;
            s.mask_token = (host.slots + host.batch) * 2;
            s.mask_head = s.mask_token * c.tokens;
            s.mask_stream = s.mask_head * c.mask_heads;
            s.mask_heads = c.mask_heads;
            s.mask_streams = c.streams;
            a.sources.push_back(s);
        };
        source(host.type, host.slots, slots_k.buffer(), slots_v.buffer(), host.slot_head_k, host.slot_head_v, 0);
        source(TQ_ROW_F32, host.batch, batch_k.buffer(), batch_v.buffer(), c.head_k * 4, c.head_v * 4, host.slots);
    }
};

Attention call_of(const AttentionCase & c, const Problem & p) {
    Attention a = {};
    a.head = c.head_k;
    a.heads = c.heads;
    a.kv_heads = c.kv_heads;
    a.tokens = c.tokens;
    a.streams = c.streams;
    a.kv_streams = c.kv_streams;
    a.q_head = c.head_k * 4;
    a.q_token = a.q_head * c.heads;
    a.q_stream = a.q_token * c.tokens;
    a.scale = p.scale;
    a.max_bias = c.max_bias;
    a.soft_cap = c.soft_cap;
    a.sparse_v = c.sparse_v;
    Source s = {};
    s.type_k = c.type_k;
    s.type_v = c.type_v;
    s.n_kv = c.rows;
    s.k_row = p.k.row;
    s.k_head = p.k.apart;
    s.k_stream = p.k.stream;
    s.v_row = p.v.row;
    s.v_head = p.v.apart;
    s.v_stream = p.v.stream;
    s.mask_token = c.rows * 2;
    s.mask_head = s.mask_token * c.tokens;
    s.mask_stream = s.mask_head * c.mask_heads;
    s.mask_heads = c.mask_heads;
    s.mask_streams = c.streams;
    a.sources.push_back(s);
    return a;
}

// slots: the type of a window's, or no_window.
constexpr int no_window = -1;
void conforms(const AttentionCase & c, int slots) {
    check::Case case_(c.name, slots == no_window    ? ""
                              : slots == TQ_ROW_F16 ? ", with a window in f16"
                                                    : ", with a window in q8_0");
    Problem p(c);
    Attention a = call_of(c, p);
    const DeviceArray<uint8_t> k_data(p.k.bytes), v_data(p.v.bytes);
    const DeviceArray<float> q_data(p.q), sink_data(p.sinks);
    const DeviceArray<uint16_t> mask_data(p.mask);
    a.q = q_data.buffer();
    a.sources[0].k = k_data.buffer();
    a.sources[0].v = v_data.buffer();
    if (!p.mask.empty()) a.sources[0].mask = mask_data.buffer();
    if (!p.sinks.empty()) a.sinks = sink_data.buffer();
    const DeviceArray<float> dst(size_t(p.results() * c.head_v));
    a.dst = dst.buffer();
    std::optional<Window> window;
    if (slots != no_window) {
        window.emplace(p, slots);
        a.sources[0].mask = window->far.buffer();
        window->add_to(a, c);
    }
    if (!CHECK_EQ(c.head_k == c.head_v && covers(a), is_covered(c)) || !is_covered(c)) return;
    const DeviceArray<uint8_t> workspace(workspace_bytes(a));
    a.workspace = workspace.buffer();
    EmulatorEncoder encoder;
    CHECK(attention(a, encoder));

    const std::vector<double> want = p.want(p.q);
    const std::vector<float> got = dst.host();
    const double e = relative_error(got.data(), want.data(), int64_t(want.size()));
    const bool half = c.type_k >= TQ_TYPE_COUNT || c.type_v >= TQ_TYPE_COUNT || slots != no_window;
    const double bound = (half ? halves : floats) + double(c.sparse_v) * double(c.rows);
    static double worst[2] = {0, 0};
    if (e > worst[half] || !(e <= bound)) {
        worst[half] = std::max(worst[half], e);
        std::printf("%-100s %.2e\n", check::where.c_str(), e);
    }
    CHECK(e <= bound);
}

// Blocks that are shorter than the longest that divides the head, mixed families, and the heads that the list lacks.
std::vector<AttentionCase> more_cases() {
    const struct {
        int k, v, head;
    } types[] = {{TQ_TURBO4_32, TQ_TURBO3_64, 128},     {TQ_TURBO2_TCQ_64, TQ_TURBO4, 256},
                 {TQ_TURBO3_32, TQ_TURBO3_32, 96},      {TQ_TURBO4_TCQ_32, TQ_ROW_Q8_0, 96},
                 {TQ_TURBO3_TCQ_64, TQ_TURBO2_64, 192}, {TQ_ROW_F16, TQ_TURBO4_TCQ_32, 128}};
    attention_list::List list;
    for (const auto & t : types)
        for (const int tokens : {1, 5}) {
            AttentionCase c;
            c.type_k = t.k;
            c.type_v = t.v;
            c.head_k = c.head_v = t.head;
            c.tokens = tokens;
            c.rows = 75;
            c.sinks = Sinks::normal;
            list.add("pairs", c, Extent::brief);
        }
    return list.cases;
}

} // namespace

// The arguments are an extent of the list, and which of `of` shares of it runs.
int main(int argc, char ** argv) {
    const Extent extent = extent_from(argc > 1 ? argv[1] : "usual");
    const int share = argc > 3 ? std::atoi(argv[2]) : 0, of = argc > 3 ? std::atoi(argv[3]) : 1;
    int covered = 0, number = 0;
    std::vector<AttentionCase> cases = attention_cases();
    for (AttentionCase & c : more_cases()) cases.push_back(c);
    for (const AttentionCase & c : cases) {
        if (c.extent > extent || number++ % of != share) continue;
        if (c.for_gpus && c.streams > 1 && extent < Extent::whole) continue; // these kernels have no code of their own
        conforms(c, no_window);
        covered += is_covered(c);
        const bool plain = c.bytes == Bytes::encoded || c.bytes == Bytes::any; // f16 has their range
        // A far row's weight is zero beside the rows of a window, and a NaN in it counts only by chance.
        if (plain && c.tokens <= c.rows && c.rows <= 5000 && c.spread == 1 && c.head_k == c.head_v &&
            !(c.far && c.bad_value >= 0))
            conforms(c, covered % 2 ? TQ_ROW_F16 : TQ_ROW_Q8_0);
    }
    std::printf("%d cases\n", covered);
    for (const int head : {64, 96, 128, 192, 256})
        for (const int columns : {8, 16})
            CHECK(turboquant::memory_offset(turboquant::memory_end, head, columns, turboquant::most_blocks) <= 32768);
    return check::summary();
}
