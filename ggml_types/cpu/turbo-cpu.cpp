// turbo-cpu.cpp: which ops ggml's CPU backend supports for the types, and GGML_OP_FLASH_ATTN_EXT over a turbo cache
// with the codec's tile engine. Part of ggml-cpu.
//
// A unit of work is a KV head of a stream and a run of tokens: all query rows that read the head share every decoded
// tile. A prefill has many units, which are distributed over the threads. A decode step has one run of tokens, and most
// of its time is spent reading the cache. So the KV range is divided into chunks, which are distributed over the
// threads. A thread computes the heads of a chunk one after the other, because their rows are adjacent in the cache,
// and prefetches the next chunk at the same time. With an exact window there are three sources of rows. Partial results
// over exact rows are kept apart from those over blocks, because V of blocks may be in the rotated domain.

#include "cpu/turbo-cpu.h"
#include "ggml/turbo-count.h"
#include "ggml/turbo-ops.h"
#include "ggml/turbo-options.h"

#include "turboquant.h"

#include "ggml-cpu-impl.h"
#include "ggml-cpu.h"

#include <algorithm>
#include <cmath>
#include <cstring>

namespace {

constexpr int64_t rows_per_unit  = 128; // query rows that share a decoded tile
constexpr int64_t chunk_bytes    = 256 << 10; // of K and V, so that a chunk and the next one fit into the L2 cache
constexpr int64_t chunk_rows_max = 512;

// A range of KV rows of a stream, for all KV heads.
struct Chunk {
    int32_t stream, source, index; // index: of the chunk in the source
};

// Rows that attention reads: the cache's blocks, and with an exact window the slots and the batch's own rows.
struct Source {
    turbo_source    rows;
    tq_attention_kv kv;     // without the addresses of a KV head
    int64_t         chunks; // of a stream
};

struct Plan {
    turbo_attention a;
    Source  sources[3];
    int     n_sources;
    int     kinds;        // of partial results: those over blocks, whose V may be rotated, and those over exact rows
    int64_t tokens;       // of a unit
    int64_t token_runs;   // units of a KV head
    int64_t units;        // of all KV heads and streams
    int64_t chunk_rows;   // KV rows of a chunk; chunks are used if there is one run of tokens
    int64_t unit_rows;    // maximum query rows of a unit
    size_t  rounded;      // bytes of the batch's own rows in q8_0; 0: they are read as they are
    size_t  engine;       // bytes of the engine's scratch memory
    size_t  list;         // bytes of the list of chunks
    size_t  scratch;      // bytes of a thread: the engine's, the query rows', the list of chunks
    size_t  partial;      // bytes of a unit's partial results
    size_t  results;      // bytes of a thread: partial results of all units (or of one), by kind, and of a chunk
    size_t  total;        // bytes of all threads
};

size_t align(size_t n) {
    return (n + 63) & ~(size_t) 63;
}

// The batch's own rows as q8_0, dense in `data`: those of K, then those of V.
turbo_source rounded_batch(const turbo_attention & a, const char * data) {
    turbo_source batch = a.batch;
    const auto   place = [&](turbo_rows & rows, ggml_type & type, int64_t head) {
        type              = GGML_TYPE_Q8_0;
        rows.data         = data;
        rows.head_bytes   = ggml_row_size(type, head);
        rows.row_bytes    = rows.head_bytes * a.kv_heads;
        rows.stream_bytes = rows.row_bytes * batch.n_kv;
        data += rows.stream_bytes * a.kv_streams;
    };
    place(batch.k, batch.type_k, a.head_k);
    place(batch.v, batch.type_v, a.head_v);
    return batch;
}

// Computes a thread's share of them.
void round_batch(const turbo_attention & a, const turbo_source & to, char * data, int64_t thread, int64_t threads) {
    const auto           round = ggml_get_type_traits_cpu(GGML_TYPE_Q8_0)->from_float;
    const turbo_source & from  = a.batch;
    for (int64_t i = thread; i < a.kv_streams * from.n_kv; i += threads) {
        const int64_t stream = i / from.n_kv, row = i % from.n_kv;
        for (int64_t head = 0; head < a.kv_heads; ++head) {
            round((const float *) from.k.at(row, head, stream), data + (to.k.at(row, head, stream) - data), a.head_k);
            round((const float *) from.v.at(row, head, stream), data + (to.v.at(row, head, stream) - data), a.head_v);
        }
    }
}

// False if the engine does not cover op. In this case ggml's generic path computes op, unless it has an exact window.
bool plan_attention(const ggml_tensor * op, int n_threads, Plan & plan) {
    turbo_attention & a = plan.a;
    if (turbo_generic_attention() || !turbo_describe_attention(op, a)) {
        return false;
    }
    if (a.type_k == GGML_TYPE_F32 || a.type_v == GGML_TYPE_F32) {
        return false; // the engine would round f32 to int8, as it rounds the batch's own rows
    }
    plan.tokens     = std::max<int64_t>(1, std::min(a.tokens, rows_per_unit / a.group));
    plan.token_runs = (a.tokens + plan.tokens - 1) / plan.tokens;
    plan.n_sources  = a.windowed ? 3 : 1;
    plan.kinds      = a.windowed ? 2 : 1;
    // Every run of tokens reads the batch's own rows, so these are rounded once.
    const turbo_source rounded = a.windowed ? rounded_batch(a, nullptr) : turbo_source();
    plan.rounded = a.windowed && plan.token_runs > 1 ?
                       align((rounded.k.stream_bytes + rounded.v.stream_bytes) * a.kv_streams) : 0;
    int64_t n_kv = 0;
    for (int i = 0; i < plan.n_sources; ++i) {
        const turbo_source & rows   = i == 0 ? a : i == 1 ? a.slots : plan.rounded ? rounded : a.batch;
        const int            type_k = turbo_to_row(rows.type_k);
        const int            type_v = turbo_to_row(rows.type_v);
        if (type_k < 0 || type_v < 0 || !tq_attention_supports(type_k, type_v, a.head_k, a.head_v)) {
            return false;
        }
        plan.sources[i] = { rows,
                            { type_k, type_v, a.head_k, a.head_v, nullptr, nullptr, (size_t) rows.k.row_bytes,
                              (size_t) rows.v.row_bytes, a.scale, a.soft_cap, turbo_sparse_v(), {}, {} },
                            0 };
        n_kv += rows.n_kv;
    }

    plan.units      = a.streams * a.kv_heads * plan.token_runs;
    plan.unit_rows  = plan.tokens * a.group;
    const int64_t token_bytes = a.kv_heads * (ggml_row_size(a.type_k, a.head_k) + ggml_row_size(a.type_v, a.head_v));
    const int64_t share = (n_kv * a.kv_heads * a.streams / n_threads + a.kv_heads - 1) / a.kv_heads; // rows of a thread
    plan.chunk_rows = std::max<int64_t>(64, std::min({ chunk_rows_max, chunk_bytes / token_bytes, share }) / 64 * 64);

    int64_t chunks = 0;
    plan.engine    = 0;
    for (Source * source = plan.sources; source < plan.sources + plan.n_sources; ++source) {
        source->chunks = (source->rows.n_kv + plan.chunk_rows - 1) / plan.chunk_rows;
        chunks += source->chunks;
        plan.engine = std::max(plan.engine, align(tq_attention_scratch(&source->kv, plan.unit_rows)));
    }
    plan.list    = align(a.streams * chunks * sizeof(Chunk));
    plan.scratch = plan.engine + align(plan.unit_rows * (sizeof(float *) + sizeof(void *) + sizeof(float))) + plan.list;
    plan.partial = align(plan.unit_rows * (a.head_v + 2) * sizeof(float));
    plan.results = plan.partial * ((plan.token_runs == 1 ? plan.units : 1) * plan.kinds + 1);
    plan.total   = 64 + n_threads * (plan.scratch + plan.results) + plan.rounded;
    return true;
}

// The position of a unit in the tensors.
struct Unit {
    int64_t stream, head, token, tokens;
};

Unit unit_at(const Plan & plan, int64_t index) {
    const int64_t run  = index % plan.token_runs;
    const int64_t head = index / plan.token_runs % plan.a.kv_heads;
    Unit unit = { index / plan.token_runs / plan.a.kv_heads, head, run * plan.tokens, 0 };
    unit.tokens = std::min(plan.tokens, plan.a.tokens - unit.token);
    return unit;
}

// Computes the partial results of a unit over rows first ... last-1 of a source. `next` is the chunk to prefetch at the
// same time, or null. Returns the number of rows of V that were left out.
int64_t compute_rows(const Plan & plan, const Source & source, const Unit & unit, int64_t first, int64_t last,
                     float * partial, char * memory, const Chunk * next, bool next_v) {
    const turbo_attention & a = plan.a;

    char *         arrays  = memory + plan.engine;
    const float ** q_rows  = (const float **) arrays;
    const void **  masks   = (const void **) (arrays + plan.unit_rows * sizeof(float *));
    float *        slopes  = (float *) (arrays + plan.unit_rows * (sizeof(float *) + sizeof(void *)));
    int64_t        rows    = 0;
    for (int64_t t = unit.token; t < unit.token + unit.tokens; ++t) {
        for (int64_t h = unit.head * a.group; h < (unit.head + 1) * a.group; ++h, ++rows) {
            q_rows[rows] = a.query(t, h, unit.stream);
            masks[rows]  = source.rows.mask_row(t, h, unit.stream);
            slopes[rows] = turbo_mask_slope(a, h);
        }
    }
    tq_attention_kv kv = source.kv;
    kv.k = source.rows.k.at(0, unit.head, a.kv_stream(unit.stream));
    kv.v = source.rows.v.at(0, unit.head, a.kv_stream(unit.stream));
    for (int i = 0; next && i < (next_v ? 2 : 1); ++i) {
        const turbo_source & after = plan.sources[next->source].rows;
        const turbo_rows &   t     = i == 0 ? after.k : after.v;
        if (t.row_bytes < a.kv_heads * t.head_bytes) {
            continue; // in this layout the heads of a chunk are not adjacent
        }
        // The computation of each head prefetches an equal share.
        const int64_t begin = next->index * plan.chunk_rows, end = std::min(begin + plan.chunk_rows, after.n_kv);
        const size_t  share = ((end - begin) * t.row_bytes / a.kv_heads + 63) / 64 * 64;
        kv.ahead[i]       = t.at(begin, 0, a.kv_stream(next->stream)) + unit.head * share;
        kv.ahead_bytes[i] = share;
    }
    const tq_attention_queries queries = { rows, q_rows, masks, 0, slopes };
    return tq_attention_partial(&kv, &queries, first, last, partial, memory);
}

// Whether a query may attend to one of the rows of a chunk. Chunks without such rows are not read.
bool visible(const Plan & plan, const Chunk & chunk) {
    const turbo_source & rows = plan.sources[chunk.source].rows;
    const int64_t first = chunk.index * plan.chunk_rows, last = std::min(first + plan.chunk_rows, rows.n_kv);
    for (int64_t token = 0; token < plan.a.tokens; ++token) {
        for (int64_t head = 0; head < rows.mask_heads; ++head) {
            const ggml_fp16_t * mask = rows.mask_row(token, head, chunk.stream);
            if (!mask || std::any_of(mask + first, mask + last, [](ggml_fp16_t x) { return x != 0xFC00; })) {
                return true;
            }
        }
    }
    return false;
}

// Finishes a query row of a unit. blocks: its partial result over blocks; exact: that over exact rows, or null.
void finish_row(const Plan & plan, const Unit & unit, int64_t row, float * blocks, const float * exact) {
    const turbo_attention & a = plan.a;
    const int64_t head   = unit.head * a.group + row % a.group;
    const int64_t token  = unit.token + row / a.group;
    int           type_v = plan.sources[0].kv.type_v;
    if (exact) {
        tq_attention_unrotate(type_v, blocks, a.head_v);
        tq_attention_merge(blocks, exact, a.head_v);
        type_v = TQ_ROW_F32;
    }
    tq_attention_finish(type_v, blocks, a.head_v, a.sinks ? a.sinks + head : nullptr, a.result(token, head, unit.stream));
}

// Sets partial results to those over no KV rows.
void clear_rows(float * row, int64_t rows, int64_t head) {
    for (int64_t m = 0; m < rows; ++m, row += head + 2) {
        std::fill(row, row + head + 2, 0.0f);
        row[head] = -INFINITY;
    }
}

void merge_rows(float * into, const float * from, int64_t rows, int64_t head) {
    for (int64_t m = 0; m < rows; ++m, into += head + 2, from += head + 2) {
        tq_attention_merge(into, from, head);
    }
}

// Lists the visible chunks; the list is the same in every thread.
int64_t list_chunks(const Plan & plan, Chunk * list) {
    int64_t count = 0;
    for (int32_t stream = 0; stream < plan.a.streams; ++stream) {
        for (int32_t source = 0; source < plan.n_sources; ++source) {
            for (int32_t index = 0; index < plan.sources[source].chunks; ++index) {
                const Chunk chunk = { stream, source, index };
                if (visible(plan, chunk)) {
                    list[count++] = chunk;
                }
            }
        }
    }
    return count;
}

int64_t rows_of(const Plan & plan, const Chunk & chunk) {
    return std::min(plan.chunk_rows, plan.sources[chunk.source].rows.n_kv - chunk.index * plan.chunk_rows);
}

// The first item of a thread, where an item is a chunk of the list for one KV head; the end of the list for thread
// `threads`. Threads get nearly equal numbers of rows, although chunks differ: those of a window are shorter.
int64_t first_item(const Plan & plan, const Chunk * list, int64_t count, int64_t thread, int64_t threads) {
    int64_t total = 0;
    for (const Chunk * chunk = list; chunk < list + count; ++chunk) {
        total += rows_of(plan, *chunk);
    }
    const int64_t heads = plan.a.kv_heads, before = total * heads * thread / threads;
    int64_t       row = 0;
    for (int64_t i = 0; i < count; row += rows_of(plan, list[i++]) * heads) {
        const int64_t rows = rows_of(plan, list[i]);
        if (row + rows * heads >= before) {
            return i * heads + (before - row + rows - 1) / rows;
        }
    }
    return count * heads;
}

// Computes this thread's share of the chunks. `results` gets the partial result of each unit over blocks, then that of
// each unit over exact rows, merged over the chunks of the thread.
void compute_chunks(const Plan & plan, const Chunk * list, int64_t count, int64_t thread, int64_t threads, char * scratch,
                    char * results) {
    const int64_t heads  = plan.a.kv_heads, head_v = plan.a.head_v;
    float *       chunk_result = (float *) (results + plan.kinds * plan.units * plan.partial);
    for (int64_t u = 0; u < plan.kinds * plan.units; ++u) {
        clear_rows((float *) (results + u * plan.partial), plan.unit_rows, head_v);
    }
    const int64_t begin = first_item(plan, list, count, thread, threads);
    const int64_t end   = first_item(plan, list, count, thread + 1, threads);
    bool fetch_v = true;
    for (int64_t item = begin; item < end; ++item) {
        const Chunk &  chunk  = list[item / heads];
        const Source & source = plan.sources[chunk.source];
        const Chunk *  next   = (item / heads + 1) * heads < end ? &chunk + 1 : nullptr;
        const int64_t  u      = chunk.stream * heads + item % heads;
        const int64_t  first  = chunk.index * plan.chunk_rows;
        const int64_t  last   = first + rows_of(plan, chunk);
        const int64_t  left_out =
            compute_rows(plan, source, unit_at(plan, u), first, last, chunk_result, scratch, next, fetch_v);
        fetch_v = left_out < (last - first) / 2; // unless sparse V left out half of the rows
        const int64_t kind = chunk.source > 0;
        merge_rows((float *) (results + (kind * plan.units + u) * plan.partial), chunk_result, plan.unit_rows, head_v);
    }
}

// Computes and finishes whole units, each in one thread, over rows first[i] ... last[i]-1 of source i.
void compute_units(const Plan & plan, const int64_t * first, const int64_t * last, int64_t thread, int64_t threads,
                   char * scratch, char * results) {
    const int64_t head_v = plan.a.head_v;
    float *       blocks = (float *) results;
    float *       exact  = plan.kinds > 1 ? (float *) (results + plan.partial) : nullptr;
    float *       more   = (float *) (results + plan.kinds * plan.partial);
    for (int64_t u = thread; u < plan.units; u += threads) {
        const Unit    unit = unit_at(plan, u);
        const int64_t rows = unit.tokens * plan.a.group;
        for (int i = 0; i < plan.n_sources; ++i) {
            float * partial = i == 0 ? blocks : i == 1 ? exact : more;
            compute_rows(plan, plan.sources[i], unit, first[i], last[i], partial, scratch, nullptr, false);
        }
        if (exact) {
            merge_rows(exact, more, rows, head_v);
        }
        for (int64_t row = 0; row < rows; ++row) {
            finish_row(plan, unit, row, blocks + row * (head_v + 2), exact ? exact + row * (head_v + 2) : nullptr);
        }
    }
}

} // namespace

bool turbo_cpu_refuses(const struct ggml_tensor * op) {
    const ggml_tensor * a = op->src[0];
    const ggml_tensor * b = op->src[1];
    switch (turbo_op_kind(op)) {
        case turbo_op::untouched:
        case turbo_op::view:
        case turbo_op::bytes:
            return false;
        case turbo_op::encode:
            return !ggml_is_contiguous(op) || !turbo_whole_rows(a) ||
                   (a->type != GGML_TYPE_F32 && a->type != GGML_TYPE_F16 && a->type != GGML_TYPE_BF16);
        case turbo_op::decode:
        case turbo_op::load:
            return op->type != GGML_TYPE_F32;
        case turbo_op::store:
            return false;
        case turbo_op::multiply:
            return b->type != GGML_TYPE_F32;
        case turbo_op::attention:
            if (op->src[TURBO_SRC_SLOTS_K]) { // ggml's own attention would ignore the window
                Plan plan;
                return !plan_attention(op, 1, plan);
            }
            return a->type != GGML_TYPE_F32 || op->type != GGML_TYPE_F32;
        case turbo_op::other:
            // This op reads K through vec_dot. It is compared by name, because the oldest proven tree lacks it.
            return strcmp(ggml_op_name(op->op), "LIGHTNING_INDEXER") != 0;
    }
    return true;
}

bool turbo_cpu_compute_forward(const struct ggml_compute_params * params, struct ggml_tensor * op) {
    Plan plan;
    if (params->use_ref || !plan_attention(op, params->nth, plan) || params->wsize < plan.total) {
        GGML_ASSERT(!(op->op == GGML_OP_FLASH_ATTN_EXT && op->src[TURBO_SRC_SLOTS_K]) && "ggml does not know the window");
        if (turbo_counts() && params->ith == 0 && turbo_op_kind(op) == turbo_op::attention) {
            turbo_count("attention by ggml's kernels", op->src[0]->ne[1], op->src[0]->ne[3]);
        }
        return false;
    }
    if (params->ith == 0) {
        turbo_count("attention by the tile engine", plan.a.tokens, plan.a.streams);
    }
    char *        base    = (char *) align((size_t) params->wdata);
    char *        scratch = base + params->ith * plan.scratch;
    char *        results = base + params->nth * plan.scratch; // of all threads
    char *        mine    = results + params->ith * plan.results;

    int64_t first[3] = {}, last[3] = {};
    if (plan.token_runs > 1) {
        if (plan.rounded > 0) {
            char *         data  = base + params->nth * (plan.scratch + plan.results);
            turbo_source & batch = plan.sources[2].rows;
            batch                = rounded_batch(plan.a, data);
            round_batch(plan.a, batch, data, params->ith, params->nth);
            ggml_barrier(params->threadpool);
        }
        for (int i = 0; i < plan.n_sources; ++i) {
            last[i] = plan.sources[i].rows.n_kv;
        }
        compute_units(plan, first, last, params->ith, params->nth, scratch, mine);
        return true;
    }
    Chunk *       list  = (Chunk *) (scratch + plan.scratch - plan.list);
    const int64_t count = list_chunks(plan, list);
    bool          brief = plan.a.streams == 1; // whether each source has at most one visible chunk
    for (const Chunk * chunk = list; chunk < list + count && brief; ++chunk) {
        brief                = last[chunk->source] == 0;
        first[chunk->source] = chunk->index * plan.chunk_rows;
        last[chunk->source]  = std::min(first[chunk->source] + plan.chunk_rows, plan.sources[chunk->source].rows.n_kv);
    }
    if (brief) { // in a short context a thread computes whole units, so no thread waits for others
        compute_units(plan, first, last, params->ith, params->nth, scratch, mine);
        return true;
    }
    compute_chunks(plan, list, count, params->ith, params->nth, scratch, mine);
    ggml_barrier(params->threadpool);
    const int64_t stride = plan.a.head_v + 2;
    for (int64_t item = params->ith; item < plan.units * plan.unit_rows; item += params->nth) {
        const int64_t u = item / plan.unit_rows, row = item % plan.unit_rows;
        float *       kinds[2] = { nullptr, nullptr };
        for (int kind = 0; kind < plan.kinds; ++kind) {
            char * of_first = results + (kind * plan.units + u) * plan.partial;
            kinds[kind]     = (float *) of_first + row * stride;
            for (int64_t thread = 1; thread < params->nth; ++thread) {
                const char * of_thread = of_first + thread * plan.results;
                tq_attention_merge(kinds[kind], (const float *) of_thread + row * stride, plan.a.head_v);
            }
        }
        finish_row(plan, unit_at(plan, u), row, kinds[0], kinds[1]);
    }
    return true;
}

void turbo_cpu_work_size(int n_threads, const struct ggml_tensor * op, size_t * size) {
    Plan plan;
    if (plan_attention(op, n_threads, plan)) {
        *size = std::max(*size, plan.total);
    }
}
