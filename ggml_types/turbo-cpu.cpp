// turbo-cpu.cpp: GGML_OP_FLASH_ATTN_EXT over a turbo cache, by the codec's tile engine. Part of ggml-cpu.
//
// One unit of work is a stream's KV head and a run of tokens: all query rows that read the head share every decoded
// tile. A prefill has many units, which the threads share. A decode has one run of tokens, and reading the cache is what
// takes time: there the KV range is cut into chunks, the threads share these, and walk through all heads of a chunk,
// whose rows lie side by side in the cache, while the next chunk is fetched.

#include "turbo-ggml.h"

#include "turboquant.h"

#include "ggml-cpu-impl.h"

#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <cstring>

namespace {

constexpr int64_t rows_per_unit  = 128; // query rows that share a decoded tile
constexpr int64_t chunk_bytes    = 256 << 10; // of K and V: this chunk and the next fit the L2 cache
constexpr int64_t chunk_rows_max = 512;

int row_type(ggml_type type) {
    switch ((int) type) {
#define TURBO_ROW_TYPE(ID, ...) case GGML_TYPE_##ID: return TQ_ROW_##ID;
        TURBOQUANT_ROW_TYPES(TURBO_ROW_TYPE)
#undef TURBO_ROW_TYPE
        default: return turbo_to_tq(type);
    }
}

struct Chunk {
    int32_t stream, source, index;
};

// Rows of K and V that attention reads: the cache; and with an exact window its slots and the batch's own rows, whose
// masks lie side by side.
struct Source {
    const ggml_tensor * k;
    const ggml_tensor * v;
    const ggml_tensor * mask;
    int64_t             column; // of the mask, for the first row
    int64_t             chunks; // of its rows
    tq_attention_kv     kv;
};

struct Plan {
    Source  sources[3];
    int     n_sources;
    int64_t group;        // query heads of a KV head
    int64_t tokens;       // of a unit
    int64_t token_runs;   // units of a KV head
    int64_t units;
    int64_t chunk_rows;   // KV rows, if there is one run of tokens: then the threads share chunks, else units
    int64_t unit_rows;    // most query rows of a unit
    int     kinds;        // of partial results: over blocks, and over exact rows
    size_t  engine;       // bytes of the engine's scratch
    size_t  list;         // bytes of the list of chunks
    size_t  scratch;      // bytes of a thread: the engine's, the query rows', the list of chunks
    size_t  partial;      // bytes of a unit's partial results
    size_t  results;      // bytes of a thread: partial results of all units, over blocks and over exact rows, and those
                          // of a chunk
    size_t  total;        // bytes
    float   max_bias;
};

size_t align(size_t n) {
    return (n + 63) & ~(size_t) 63;
}

// False if the engine does not cover op: then ggml's generic path computes it.
bool plan_attention(const ggml_tensor * op, int n_threads, Plan & plan) {
    if (op->op != GGML_OP_FLASH_ATTN_EXT || turbo_generic_attention()) {
        return false;
    }
    const ggml_tensor * q    = op->src[0];
    const ggml_tensor * k    = op->src[1];
    const ggml_tensor * v    = op->src[2];
    const ggml_tensor * mask = op->src[3];
    if (!turbo_is_type(k->type) && !turbo_is_type(v->type)) {
        return false;
    }
    const int type_k = row_type(k->type);
    const int type_v = row_type(v->type);
    if (k->type == GGML_TYPE_F32 || v->type == GGML_TYPE_F32) { // the engine rounds it
        return false;
    }
    if (type_k < 0 || type_v < 0 || !tq_attention_supports(type_k, type_v, k->ne[0], v->ne[0])) {
        return false;
    }
    if (q->type != GGML_TYPE_F32 || op->type != GGML_TYPE_F32 || q->nb[0] != sizeof(float) ||
        k->nb[0] != ggml_type_size(k->type) || v->nb[0] != ggml_type_size(v->type) ||
        k->ne[2] != v->ne[2] || k->ne[3] != v->ne[3] || q->ne[2] % k->ne[2] != 0 || q->ne[3] % k->ne[3] != 0 ||
        (mask && (mask->type != GGML_TYPE_F16 || mask->nb[0] != sizeof(uint16_t)))) {
        return false;
    }

    float params[3];
    memcpy(params, op->op_params, sizeof(params));
    plan.max_bias = params[1];
    const auto add_source = [&](const ggml_tensor * keys, const ggml_tensor * values, const ggml_tensor * masks,
                                int64_t column) {
        plan.sources[plan.n_sources++] = {
            keys, values, masks, column, 0,
            { row_type(keys->type), row_type(values->type), keys->ne[0], values->ne[0], nullptr, nullptr, keys->nb[1],
              values->nb[1], params[0], params[2], turbo_sparse_v(), {}, {} }
        };
    };
    plan.n_sources = 0;
    add_source(k, v, mask, 0);
    if (op->src[5]) {
        add_source(op->src[5], op->src[6], op->src[7], 0);
        add_source(op->src[8], op->src[9], op->src[7], op->src[5]->ne[1]);
    }

    int64_t n_kv = 0;
    for (int i = 0; i < plan.n_sources; ++i) {
        n_kv += plan.sources[i].k->ne[1];
    }
    plan.group      = q->ne[2] / k->ne[2];
    plan.tokens     = std::max<int64_t>(1, std::min(q->ne[1], rows_per_unit / plan.group));
    plan.token_runs = (q->ne[1] + plan.tokens - 1) / plan.tokens;
    plan.units      = q->ne[3] * k->ne[2] * plan.token_runs;
    plan.unit_rows  = plan.tokens * plan.group;
    const int64_t token_bytes = k->ne[2] * (ggml_row_size(k->type, k->ne[0]) + ggml_row_size(v->type, v->ne[0]));
    const int64_t share       = (n_kv * k->ne[2] * q->ne[3] / n_threads + k->ne[2] - 1) / k->ne[2]; // rows of a thread
    plan.chunk_rows = std::max<int64_t>(64, std::min({ chunk_rows_max, chunk_bytes / token_bytes, share }) / 64 * 64);
    plan.engine = 0;
    int64_t chunks = 0;
    for (int i = 0; i < plan.n_sources; ++i) {
        Source & source = plan.sources[i];
        source.chunks   = (source.k->ne[1] + plan.chunk_rows - 1) / plan.chunk_rows;
        chunks += source.chunks;
        plan.engine = std::max(plan.engine, align(tq_attention_scratch(&source.kv, plan.unit_rows)));
    }
    plan.list    = align(q->ne[3] * chunks * sizeof(Chunk));
    plan.scratch = plan.engine + align(plan.unit_rows * (sizeof(float *) + sizeof(void *) + sizeof(float))) + plan.list;
    plan.partial = align(plan.unit_rows * (v->ne[0] + 2) * sizeof(float));
    plan.kinds   = plan.n_sources > 1 ? 2 : 1;
    plan.results = plan.partial * ((plan.token_runs == 1 ? plan.units : 1) * plan.kinds + 1);
    plan.total   = 64 + n_threads * (plan.scratch + plan.results);
    return true;
}

float alibi_slope(const Plan & plan, int64_t head, int64_t n_head) {
    if (plan.max_bias <= 0.0f) {
        return 1.0f;
    }
    const int64_t n_head_log2 = 1ll << (int64_t) floor(log2((double) n_head));
    const float   m0 = powf(2.0f, -plan.max_bias / n_head_log2);
    const float   m1 = powf(2.0f, -(plan.max_bias / 2.0f) / n_head_log2);
    return head < n_head_log2 ? powf(m0, head + 1) : powf(m1, 2 * (head - n_head_log2) + 1);
}

// A unit's place in the tensors.
struct Unit {
    int64_t stream, head, token, tokens;
};

Unit unit_at(const Plan & plan, const ggml_tensor * op, int64_t index) {
    const int64_t run  = index % plan.token_runs;
    const int64_t head = index / plan.token_runs % op->src[1]->ne[2];
    Unit unit = { index / plan.token_runs / op->src[1]->ne[2], head, run * plan.tokens, 0 };
    unit.tokens = std::min(plan.tokens, op->src[0]->ne[1] - unit.token);
    return unit;
}

const ggml_fp16_t * mask_row(const Source & source, int64_t token, int64_t head, int64_t stream) {
    const ggml_tensor * mask = source.mask;
    if (!mask) {
        return nullptr;
    }
    return (const ggml_fp16_t *) ((const char *) mask->data + token * mask->nb[1] + head % mask->ne[2] * mask->nb[2] +
                                  stream % mask->ne[3] * mask->nb[3]) + source.column;
}

// Returns how many rows of V were left out. `next`: the chunk to fetch meanwhile, or null.
int64_t compute_rows(const Plan & plan, const ggml_tensor * op, const Source & source, const Unit & unit, int64_t first,
                     int64_t last, float * partial, char * memory, const Chunk * next, bool next_v) {
    const ggml_tensor * q = op->src[0];
    const ggml_tensor * k = source.k;
    const ggml_tensor * v = source.v;

    char *         arrays  = memory + plan.engine;
    const float ** q_rows  = (const float **) arrays;
    const void **  masks   = (const void **) (arrays + plan.unit_rows * sizeof(float *));
    float *        slopes  = (float *) (arrays + plan.unit_rows * (sizeof(float *) + sizeof(void *)));
    int64_t        rows    = 0;
    for (int64_t t = unit.token; t < unit.token + unit.tokens; ++t) {
        for (int64_t h = unit.head * plan.group; h < (unit.head + 1) * plan.group; ++h, ++rows) {
            q_rows[rows] =
                (const float *) ((const char *) q->data + t * q->nb[1] + h * q->nb[2] + unit.stream * q->nb[3]);
            masks[rows]  = mask_row(source, t, h, unit.stream);
            slopes[rows] = alibi_slope(plan, h, q->ne[2]);
        }
    }
    tq_attention_kv kv     = source.kv;
    const int64_t   stream = unit.stream / (q->ne[3] / k->ne[3]);
    kv.k = (const char *) k->data + unit.head * k->nb[2] + stream * k->nb[3];
    kv.v = (const char *) v->data + unit.head * v->nb[2] + stream * v->nb[3];
    const Source *      after    = next ? &plan.sources[next->source] : nullptr;
    const ggml_tensor * cache[2] = { after ? after->k : nullptr, after ? after->v : nullptr };
    for (int i = 0; next && i < (next_v ? 2 : 1); ++i) {
        const ggml_tensor * t = cache[i];
        const int64_t heads = t->ne[2];
        if (t->nb[1] < heads * t->nb[2]) {
            continue; // another layout: a chunk's heads do not lie side by side
        }
        // each head fetches its share
        const int64_t begin = next->index * plan.chunk_rows, end = std::min(begin + plan.chunk_rows, t->ne[1]);
        const size_t  share = ((end - begin) * t->nb[1] / heads + 63) / 64 * 64;
        const char *  data  = (const char *) t->data + next->stream / (q->ne[3] / t->ne[3]) * t->nb[3];
        kv.ahead[i]       = data + begin * t->nb[1] + unit.head * share;
        kv.ahead_bytes[i] = share;
    }
    const tq_attention_queries queries = { rows, q_rows, masks, 0, slopes };
    return tq_attention_partial(&kv, &queries, first, last, partial, memory);
}

// A chunk that no query may see is not worth fetching.
bool visible(const Plan & plan, const ggml_tensor * op, const Chunk & chunk) {
    const Source & source = plan.sources[chunk.source];
    const int64_t  first = chunk.index * plan.chunk_rows, last = std::min(first + plan.chunk_rows, source.k->ne[1]);
    const int64_t  heads = source.mask ? source.mask->ne[2] : 1; // masks that differ
    for (int64_t token = 0; token < op->src[0]->ne[1]; ++token) {
        for (int64_t head = 0; head < heads; ++head) {
            const ggml_fp16_t * mask = mask_row(source, token, head, chunk.stream);
            if (!mask || std::any_of(mask + first, mask + last, [](ggml_fp16_t x) { return x != 0xFC00; })) {
                return true;
            }
        }
    }
    return false;
}

// partial: over blocks; exact: over exact rows, or null.
void finish_row(const Plan & plan, ggml_tensor * op, const Unit & unit, int64_t row, float * partial,
                const float * exact) {
    const int64_t       head  = unit.head * plan.group + row % plan.group;
    const int64_t       token = unit.token + row / plan.group;
    const ggml_tensor * sinks = op->src[4];
    float * out = (float *) ((char *) op->data +
                             (unit.stream * op->ne[2] * op->ne[1] + head + token * op->ne[1]) * op->nb[1]);
    const float * sink = sinks ? (const float *) sinks->data + head : nullptr;
    const tq_attention_kv & kv = plan.sources[0].kv;
    if (exact) {
        tq_attention_unrotate(kv.type_v, partial, kv.head_v);
        tq_attention_merge(partial, exact, kv.head_v);
    }
    tq_attention_finish(exact ? TQ_ROW_F32 : kv.type_v, partial, kv.head_v, sink, out);
}

void clear_rows(float * row, int64_t rows, int64_t head) {
    for (int64_t m = 0; m < rows; ++m, row += head + 2) {
        std::fill(row, row + head + 2, 0.0f);
        row[head] = -INFINITY;
    }
}

void merge_rows(float * into, const float * from, int64_t rows, int64_t head) {
    for (int64_t m = 0; m < rows; ++m) {
        tq_attention_merge(into + m * (head + 2), from + m * (head + 2), head);
    }
}

// This thread's share of the chunks: the partial results of all that it saw, of every unit over blocks, then of every
// unit over exact rows.
void compute_chunks(const Plan & plan, const ggml_tensor * op, int64_t thread, int64_t threads, char * scratch,
                    char * results) {
    const int64_t heads = op->src[1]->ne[2], head_v = op->src[2]->ne[0];
    float *       chunk_result = (float *) (results + plan.units * plan.kinds * plan.partial);
    for (int64_t u = 0; u < plan.units * plan.kinds; ++u) {
        clear_rows((float *) (results + u * plan.partial), plan.unit_rows, head_v);
    }
    Chunk * list  = (Chunk *) (scratch + plan.scratch - plan.list);
    int64_t count = 0;
    for (int32_t stream = 0; stream < op->src[0]->ne[3]; ++stream) {
        for (int32_t source = 0; source < plan.n_sources; ++source) {
            for (int32_t index = 0; index < plan.sources[source].chunks; ++index) {
                const Chunk chunk = { stream, source, index };
                if (visible(plan, op, chunk)) {
                    list[count++] = chunk;
                }
            }
        }
    }
    const int64_t items = count * heads, begin = items * thread / threads, end = items * (thread + 1) / threads;
    bool fetch_v = true;
    for (int64_t item = begin; item < end; ++item) {
        const Chunk &  chunk  = list[item / heads];
        const Source & source = plan.sources[chunk.source];
        const Chunk *  next   = (item / heads + 1) * heads < end ? &chunk + 1 : nullptr;
        const int64_t  u      = chunk.stream * heads + item % heads;
        const int64_t  first  = chunk.index * plan.chunk_rows;
        const int64_t  last   = std::min(first + plan.chunk_rows, source.k->ne[1]);
        const int64_t  left_out = compute_rows(plan, op, source, unit_at(plan, op, u), first, last, chunk_result, scratch,
                                               next, fetch_v);
        fetch_v = left_out < (last - first) / 2; // sparse V
        const int64_t kind = chunk.source > 0;
        merge_rows((float *) (results + (kind * plan.units + u) * plan.partial), chunk_result, plan.unit_rows, head_v);
    }
}

} // namespace

bool turbo_cpu_compute_forward(const struct ggml_compute_params * params, struct ggml_tensor * op) {
    Plan plan;
    if (params->use_ref || !plan_attention(op, params->nth, plan) || params->wsize < plan.total) {
        // The generic path would not see the tokens of the window.
        GGML_ASSERT(op->op != GGML_OP_FLASH_ATTN_EXT || !op->src[5]);
        return false;
    }
    char *        base    = (char *) align((size_t) params->wdata);
    char *        scratch = base + params->ith * plan.scratch;
    char *        results = base + params->nth * plan.scratch; // of all threads
    char *        mine    = results + params->ith * plan.results;
    const int64_t head_v = op->src[2]->ne[0], stride = head_v + 2;

    if (plan.token_runs > 1) {
        float * blocks = (float *) mine;
        float * exact  = (float *) (mine + plan.partial);
        float * more   = (float *) (mine + plan.kinds * plan.partial);
        for (int64_t u = params->ith; u < plan.units; u += params->nth) {
            const Unit    unit = unit_at(plan, op, u);
            const int64_t rows = unit.tokens * plan.group;
            for (int i = 0; i < plan.n_sources; ++i) {
                const Source & source = plan.sources[i];
                compute_rows(plan, op, source, unit, 0, source.k->ne[1], i == 0 ? blocks : i == 1 ? exact : more,
                             scratch, nullptr, false);
            }
            if (plan.kinds > 1) {
                merge_rows(exact, more, rows, head_v);
            }
            for (int64_t row = 0; row < rows; ++row) {
                finish_row(plan, op, unit, row, blocks + row * stride, plan.kinds > 1 ? exact + row * stride : nullptr);
            }
        }
        return true;
    }
    compute_chunks(plan, op, params->ith, params->nth, scratch, mine);
    ggml_barrier(params->threadpool);
    for (int64_t item = params->ith; item < plan.units * plan.unit_rows; item += params->nth) {
        const int64_t u = item / plan.unit_rows, row = item % plan.unit_rows;
        float *       of_kind[2] = { nullptr, nullptr };
        for (int kind = 0; kind < plan.kinds; ++kind) {
            char * first  = results + (kind * plan.units + u) * plan.partial;
            of_kind[kind] = (float *) first + row * stride;
            for (int64_t thread = 1; thread < params->nth; ++thread) {
                tq_attention_merge(of_kind[kind], (const float *) (first + thread * plan.results) + row * stride, head_v);
            }
        }
        finish_row(plan, op, unit_at(plan, op, u), row, of_kind[0], of_kind[1]);
    }
    return true;
}

void turbo_cpu_work_size(int n_threads, const struct ggml_tensor * op, size_t * size) {
    Plan plan;
    if (plan_attention(op, n_threads, plan)) {
        *size = std::max(*size, plan.total);
    }
}
