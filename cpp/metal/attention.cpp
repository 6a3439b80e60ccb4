// Plans calls of attention: the dispatches of attention.metal.
#include "turboquant_metal.h"

#include "arguments.h"

#include <algorithm>
#include <cmath>

namespace turboquant {
namespace metal {
namespace {

constexpr int wanted_groups = 256; // threadgroups of a call, so that large GPUs are busy
constexpr int least_rows = 128;    // of a run of rows, if there are several

struct Kernels {
    const char *one, *two, *merge; // for 8 and 16 columns
};

Kernels kernels_of(int head) {
    switch (head) {
#define TURBOQUANT_CASE(D) \
    case D: return {"turboquant_attention_" #D "_1", "turboquant_attention_" #D "_2", "turboquant_merge_" #D};
        TURBOQUANT_CASE(64)
        TURBOQUANT_CASE(96)
        TURBOQUANT_CASE(128)
        TURBOQUANT_CASE(192)
        TURBOQUANT_CASE(256)
#undef TURBOQUANT_CASE
        default: return {nullptr, nullptr, nullptr};
    }
}

bool is_turbo(int type) { return type >= 0 && type < TQ_TYPE_COUNT; }

// The scales of a row; 0 if the type is not covered.
int blocks_of(int type, int head) {
    if (type == row_f16 || type == row_q8_0 || type == row_f32) return 1;
    const int block = is_turbo(type) ? tq_type_get(tq_type(type))->block : 0;
    return block && head % block == 0 && head / block <= most_blocks ? head / block : 0;
}
static_assert(int(row_f16) == TQ_ROW_F16 && int(row_q8_0) == TQ_ROW_Q8_0 && int(row_f32) == TQ_ROW_F32, "row types");

bool aligned(int type, const Buffer & data, int64_t row, int64_t head, int64_t stream) {
    const uint64_t bits = uint64_t(data.offset) | uint64_t(row | head | stream);
    return bits % (type == row_f32 ? 4 : 2) == 0;
}

bool covers(const Source & s, int head, bool cache) {
    const int blocks_k = blocks_of(s.type_k, head), blocks_v = blocks_of(s.type_v, head);
    const bool turbo = is_turbo(s.type_k) || is_turbo(s.type_v);
    const bool floats = s.type_k == row_f32 || s.type_v == row_f32;
    return blocks_k && blocks_v && turbo == cache && !(cache && floats) && s.n_kv >= 0 && s.n_kv < int64_t(1) << 30 &&
           aligned(s.type_k, s.k, s.k_row, s.k_head, s.k_stream) &&
           aligned(s.type_v, s.v, s.v_row, s.v_head, s.v_stream) &&
           aligned(row_f16, s.mask, s.mask_token, s.mask_head, s.mask_stream);
}

struct Plan {
    int group, columns, column_tile, padded;
    std::vector<int> chunks, chunk_rows; // of the sources
    int parts;
};

Plan plan_of(const Attention & a) {
    Plan p = {};
    p.group = a.heads / a.kv_heads;
    p.columns = p.group * a.tokens;
    p.column_tile = p.columns <= 8 ? 8 : 16;
    p.padded = (p.columns + p.column_tile - 1) / p.column_tile * p.column_tile;
    const int64_t groups = std::max<int64_t>(1, int64_t(p.padded / p.column_tile) * a.kv_heads * a.streams);
    for (const Source & s : a.sources) {
        const int64_t most = (s.n_kv + least_rows - 1) / least_rows, tile = tile_rows(a.head);
        const int64_t wanted = std::max<int64_t>(1, std::min<int64_t>(wanted_groups / groups, most));
        const int64_t rows = ((s.n_kv + wanted - 1) / wanted + tile - 1) / tile * tile;
        p.chunk_rows.push_back(int(rows));
        p.chunks.push_back(rows ? int((s.n_kv + rows - 1) / rows) : 0);
        p.parts += p.chunks.back();
    }
    return p;
}

int64_t states_of(const Attention & a, const Plan & p) {
    return int64_t(a.streams) * a.kv_heads * p.padded * p.parts;
}

void take_slopes(const Attention & a, AttentionArguments & to) {
    if (a.max_bias <= 0) return;
    to.slope_heads = 1;
    while (2 * to.slope_heads <= a.heads) to.slope_heads *= 2;
    to.slope0 = std::pow(2.0f, -a.max_bias / float(to.slope_heads));
    to.slope1 = std::pow(2.0f, -a.max_bias / 2.0f / float(to.slope_heads));
}

AttentionArguments arguments_of(const Attention & a, const Plan & p, const Source & s) {
    AttentionArguments to = {};
    to.q_token = a.q_token;
    to.q_head = a.q_head;
    to.q_stream = a.q_stream;
    to.k_row = s.k_row;
    to.k_head = s.k_head;
    to.k_stream = s.k_stream;
    to.v_row = s.v_row;
    to.v_head = s.v_head;
    to.v_stream = s.v_stream;
    to.mask_token = s.mask_token;
    to.mask_head = s.mask_head;
    to.mask_stream = s.mask_stream;
    to.masked = s.mask.object != nullptr;
    to.mask_heads = s.mask_heads;
    to.mask_streams = s.mask_streams;
    to.tokens = a.tokens;
    to.heads = a.heads;
    to.kv_heads = a.kv_heads;
    to.group = p.group;
    to.streams = a.streams;
    to.kv_streams = a.kv_streams;
    to.n_kv = int32_t(s.n_kv);
    to.columns = p.columns;
    to.padded_columns = p.padded;
    to.blocks = std::max(blocks_of(s.type_k, a.head), blocks_of(s.type_v, a.head));
    to.parts = p.parts;
    to.scale = a.scale;
    to.soft_cap = a.soft_cap;
    to.sparse_v = a.sparse_v;
    take_slopes(a, to);
    return to;
}

} // namespace

bool covers(const Attention & a) {
    if (!kernels_of(a.head).merge || a.sources.empty() || a.kv_heads <= 0 || a.heads % a.kv_heads ||
        a.kv_streams <= 0 || a.streams % a.kv_streams || (a.q_token | a.q_head | a.q_stream) % 4)
        return false;
    const int64_t most = int64_t(1) << 30;
    if (int64_t(a.heads) * a.tokens * a.streams >= most || int64_t(a.heads) * a.tokens >= most) return false;
    for (const Source & s : a.sources)
        if (!covers(s, a.head, &s == &a.sources.front())) return false;
    return true;
}

size_t workspace_bytes(const Attention & a) {
    return size_t(states_of(a, plan_of(a))) * (size_t(a.head) + 2) * sizeof(float);
}

bool attention(const Attention & a, Encoder & encoder) {
    if (!covers(a)) return false;
    const int64_t rows = int64_t(a.heads) * a.tokens * a.streams;
    if (rows == 0) return true;
    const Plan p = plan_of(a);
    const Kernels kernels = kernels_of(a.head);
    const Buffer states = {a.workspace.object,
                           a.workspace.offset + size_t(states_of(a, p)) * size_t(a.head) * sizeof(float)};
    int part = 0;
    for (size_t i = 0; i < a.sources.size(); ++i) {
        const Source & s = a.sources[i];
        if (p.chunks[i] == 0) continue;
        AttentionArguments arguments = arguments_of(a, p, s);
        arguments.chunks = p.chunks[i];
        arguments.chunk_rows = p.chunk_rows[i];
        arguments.first_part = part;
        part += p.chunks[i];
        encoder.dispatch({p.column_tile == 8 ? kernels.one : kernels.two,
                          {{constant_type_k, s.type_k}, {constant_type_v, s.type_v}},
                          &arguments,
                          sizeof(arguments),
                          {a.q, s.k, s.v, s.mask.object ? s.mask : a.q, a.workspace, states},
                          size_t(memory_offset(memory_end, a.head, p.column_tile, arguments.blocks) + 15) / 16 * 16,
                          {p.chunks[i], p.padded / p.column_tile * a.kv_heads, a.streams},
                          32 * simdgroups});
    }
    encoder.barrier();
    MergeArguments merge = {};
    merge.rows = int32_t(rows);
    merge.tokens = a.tokens;
    merge.heads = a.heads;
    merge.group = p.group;
    merge.kv_heads = a.kv_heads;
    merge.padded_columns = p.padded;
    merge.parts = p.parts;
    const int type_v = a.sources.front().type_v;
    merge.rotated_parts = is_turbo(type_v) ? p.chunks.front() : 0;
    merge.block = is_turbo(type_v) ? tq_type_get(tq_type(type_v))->block : 0;
    merge.has_sinks = a.sinks.object != nullptr;
    // Without parts there are no states to bind.
    const Buffer partial = p.parts ? a.workspace : a.dst;
    encoder.dispatch({kernels.merge,
                      {},
                      &merge,
                      sizeof(merge),
                      {partial, p.parts ? states : a.dst, a.sinks.object ? a.sinks : a.q, a.dst},
                      0,
                      {int((rows + simdgroups - 1) / simdgroups), 1, 1},
                      32 * simdgroups});
    return true;
}

} // namespace metal
} // namespace turboquant
