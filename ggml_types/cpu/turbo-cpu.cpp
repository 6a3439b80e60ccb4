// turbo-cpu.cpp: which ops ggml's CPU backend supports for the types, and GGML_OP_FLASH_ATTN_EXT over a turbo cache with
// the codec's tile engine. Part of ggml-cpu.
//
// A unit of work is a stream's KV head and a run of tokens: all query rows that read the head share every decoded tile.
// A prefill has many units, which are distributed over the threads. A decode has one run of tokens, and most of its time
// is spent reading the cache. So the KV range is divided into chunks, which are distributed over the threads. A thread
// works through all heads of a chunk, whose rows lie side by side in the cache, and meanwhile prefetches the next chunk.

#include "cpu/turbo-cpu.h"
#include "ggml/turbo-ops.h"
#include "ggml/turbo-options.h"

#include "turboquant.h"

#include "ggml-cpu-impl.h"

#include <algorithm>
#include <cmath>
#include <cstring>

namespace {

constexpr int64_t rows_per_unit  = 128; // query rows that share a decoded tile
constexpr int64_t chunk_bytes    = 256 << 10; // of K and V, so that this chunk and the next fit into the L2 cache
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
    int32_t stream, index;
};

struct Plan {
    turbo_attention a;
    tq_attention_kv kv;
    int64_t tokens;       // of a unit
    int64_t token_runs;   // units of a KV head
    int64_t units;
    int64_t chunk_rows;   // KV rows; chunks are used if there is one run of tokens
    int64_t chunks;       // of the KV range
    int64_t unit_rows;    // maximum query rows of a unit
    size_t  scratch;      // bytes of a thread: for the engine, the query rows and the list of chunks
    size_t  partial;      // bytes of a unit's partial results
    size_t  results;      // bytes of a thread: for the partial results of all units, and those of a chunk
    size_t  total;        // bytes
};

size_t align(size_t n) {
    return (n + 63) & ~(size_t) 63;
}

// False if the engine does not cover op; ggml's generic path computes it in this case.
bool plan_attention(const ggml_tensor * op, int n_threads, Plan & plan) {
    turbo_attention & a = plan.a;
    if (turbo_generic_attention() || !turbo_describe_attention(op, a)) {
        return false;
    }
    const int type_k = row_type(a.type_k);
    const int type_v = row_type(a.type_v);
    if (type_k < 0 || type_v < 0 || !tq_attention_supports(type_k, type_v, a.head_k, a.head_v)) {
        return false;
    }
    plan.kv = { type_k, type_v, a.head_k, a.head_v, nullptr, nullptr, (size_t) a.k.row_bytes, (size_t) a.v.row_bytes,
                a.scale, a.soft_cap, turbo_sparse_v(), {}, {} };

    plan.tokens     = std::max<int64_t>(1, std::min(a.tokens, rows_per_unit / a.group));
    plan.token_runs = (a.tokens + plan.tokens - 1) / plan.tokens;
    plan.units      = a.streams * a.kv_heads * plan.token_runs;
    plan.unit_rows  = plan.tokens * a.group;
    const int64_t token_bytes = a.kv_heads * (ggml_row_size(a.type_k, a.head_k) + ggml_row_size(a.type_v, a.head_v));
    const int64_t share = (a.n_kv * a.kv_heads * a.streams / n_threads + a.kv_heads - 1) / a.kv_heads; // rows per thread
    plan.chunk_rows = std::max<int64_t>(64, std::min({ chunk_rows_max, chunk_bytes / token_bytes, share }) / 64 * 64);
    plan.chunks     = (a.n_kv + plan.chunk_rows - 1) / plan.chunk_rows;

    plan.scratch = align(tq_attention_scratch(&plan.kv, plan.unit_rows)) +
                   align(plan.unit_rows * (sizeof(float *) + sizeof(void *) + sizeof(float))) +
                   align(a.streams * plan.chunks * sizeof(Chunk));
    plan.partial = align(plan.unit_rows * (plan.kv.head_v + 2) * sizeof(float));
    plan.results = plan.partial * (plan.token_runs == 1 ? plan.units + 1 : 1);
    plan.total   = 64 + n_threads * (plan.scratch + plan.results);
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

// Returns the number of rows of V that were left out. `next` is the chunk to prefetch meanwhile, or null.
int64_t compute_rows(const Plan & plan, const Unit & unit, int64_t first, int64_t last, float * partial, char * memory,
                     const Chunk * next, bool next_v) {
    const turbo_attention & a = plan.a;

    char *         arrays  = memory + align(tq_attention_scratch(&plan.kv, plan.unit_rows));
    const float ** q_rows  = (const float **) arrays;
    const void **  masks   = (const void **) (arrays + plan.unit_rows * sizeof(float *));
    float *        slopes  = (float *) (arrays + plan.unit_rows * (sizeof(float *) + sizeof(void *)));
    int64_t        rows    = 0;
    for (int64_t t = unit.token; t < unit.token + unit.tokens; ++t) {
        for (int64_t h = unit.head * a.group; h < (unit.head + 1) * a.group; ++h, ++rows) {
            q_rows[rows] = a.query(t, h, unit.stream);
            masks[rows]  = a.mask_row(t, h, unit.stream);
            slopes[rows] = turbo_mask_slope(a, h);
        }
    }
    tq_attention_kv kv = plan.kv;
    kv.k = a.k.at(0, unit.head, a.kv_stream(unit.stream));
    kv.v = a.v.at(0, unit.head, a.kv_stream(unit.stream));
    const turbo_rows * cache[2] = { &a.k, &a.v };
    for (int i = 0; next && i < (next_v ? 2 : 1); ++i) {
        const turbo_rows & t = *cache[i];
        if (t.row_bytes < a.kv_heads * t.head_bytes) {
            continue; // in this layout the heads of a chunk do not lie side by side
        }
        // the computation of each head prefetches its share
        const int64_t begin = next->index * plan.chunk_rows, end = std::min(begin + plan.chunk_rows, a.n_kv);
        const size_t  share = ((end - begin) * t.row_bytes / a.kv_heads + 63) / 64 * 64;
        kv.ahead[i]       = t.at(begin, 0, a.kv_stream(next->stream)) + unit.head * share;
        kv.ahead_bytes[i] = share;
    }
    const tq_attention_queries queries = { rows, q_rows, masks, 0, slopes };
    return tq_attention_partial(&kv, &queries, first, last, partial, memory);
}

// Whether a query may attend to one of the rows of a chunk. Other chunks are not read.
bool visible(const Plan & plan, const Chunk & chunk) {
    const turbo_attention & a = plan.a;
    const int64_t first = chunk.index * plan.chunk_rows, last = std::min(first + plan.chunk_rows, a.n_kv);
    for (int64_t token = 0; token < a.tokens; ++token) {
        for (int64_t head = 0; head < a.mask_heads; ++head) {
            const ggml_fp16_t * mask = a.mask_row(token, head, chunk.stream);
            if (!mask || std::any_of(mask + first, mask + last, [](ggml_fp16_t x) { return x != 0xFC00; })) {
                return true;
            }
        }
    }
    return false;
}

void finish_row(const Plan & plan, const Unit & unit, int64_t row, float * partial) {
    const turbo_attention & a = plan.a;
    const int64_t head  = unit.head * a.group + row % a.group;
    const int64_t token = unit.token + row / a.group;
    tq_attention_finish(plan.kv.type_v, partial, plan.kv.head_v, a.sinks ? a.sinks + head : nullptr,
                        a.result(token, head, unit.stream));
}

// Lists the visible chunks; the list is the same in every thread.
int64_t list_chunks(const Plan & plan, Chunk * list) {
    int64_t count = 0;
    for (int32_t stream = 0; stream < plan.a.streams; ++stream) {
        for (int32_t index = 0; index < plan.chunks; ++index) {
            const Chunk chunk = { stream, index };
            if (visible(plan, chunk)) {
                list[count++] = chunk;
            }
        }
    }
    return count;
}

// Computes this thread's share of the chunks. The result of each unit is merged over the chunks of the thread.
void compute_chunks(const Plan & plan, const Chunk * list, int64_t count, int64_t thread, int64_t threads, char * scratch,
                    char * results) {
    const int64_t heads  = plan.a.kv_heads;
    const int64_t n_kv   = plan.a.n_kv;
    const int64_t stride = plan.kv.head_v + 2;
    float *       chunk_result = (float *) (results + plan.units * plan.partial);
    for (int64_t u = 0; u < plan.units; ++u) {
        float * row = (float *) (results + u * plan.partial);
        for (int64_t m = 0; m < plan.unit_rows; ++m, row += stride) {
            std::fill(row, row + stride, 0.0f);
            row[plan.kv.head_v] = -INFINITY;
        }
    }
    const int64_t items = count * heads, begin = items * thread / threads, end = items * (thread + 1) / threads;
    bool fetch_v = true;
    for (int64_t item = begin; item < end; ++item) {
        const Chunk & chunk = list[item / heads];
        const Chunk * next  = (item / heads + 1) * heads < end ? &chunk + 1 : nullptr;
        const Unit    unit  = unit_at(plan, chunk.stream * heads + item % heads);
        const int64_t first = chunk.index * plan.chunk_rows, last = std::min(first + plan.chunk_rows, n_kv);
        const int64_t left_out = compute_rows(plan, unit, first, last, chunk_result, scratch, next, fetch_v);
        fetch_v = left_out < (last - first) / 2; // sparse V
        float * into = (float *) (results + (unit.stream * heads + unit.head) * plan.partial);
        for (int64_t m = 0; m < plan.unit_rows; ++m) {
            tq_attention_merge(into + m * stride, chunk_result + m * stride, plan.kv.head_v);
        }
    }
}

// Computes units over the KV rows first ... last-1, each in one thread.
void compute_units(const Plan & plan, int64_t first, int64_t last, int64_t thread, int64_t threads, char * scratch,
                   float * partial) {
    for (int64_t u = thread; u < plan.units; u += threads) {
        const Unit unit = unit_at(plan, u);
        compute_rows(plan, unit, first, last, partial, scratch, nullptr, false);
        for (int64_t row = 0; row < unit.tokens * plan.a.group; ++row) {
            finish_row(plan, unit, row, partial + row * (plan.kv.head_v + 2));
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
            return a->type != GGML_TYPE_F32 || op->type != GGML_TYPE_F32;
        case turbo_op::other:
            // Compared by name, because the oldest proven tree lacks this op, which reads K through vec_dot.
            return strcmp(ggml_op_name(op->op), "LIGHTNING_INDEXER") != 0;
    }
    return true;
}

bool turbo_cpu_compute_forward(const struct ggml_compute_params * params, struct ggml_tensor * op) {
    Plan plan;
    if (params->use_ref || !plan_attention(op, params->nth, plan) || params->wsize < plan.total) {
        return false;
    }
    char *        base    = (char *) align((size_t) params->wdata);
    char *        scratch = base + params->ith * plan.scratch;
    char *        results = base + params->nth * plan.scratch; // of all threads
    char *        mine    = results + params->ith * plan.results;
    const int64_t stride  = plan.kv.head_v + 2;

    if (plan.token_runs > 1) {
        compute_units(plan, 0, plan.a.n_kv, params->ith, params->nth, scratch, (float *) mine);
        return true;
    }
    Chunk *       list  = (Chunk *) (scratch + plan.scratch - align(plan.a.streams * plan.chunks * sizeof(Chunk)));
    const int64_t count = list_chunks(plan, list);
    if (count == 1 && plan.a.streams == 1) { // in a short context nothing is merged, so no thread waits for others
        const int64_t first = list->index * plan.chunk_rows;
        compute_units(plan, first, std::min(first + plan.chunk_rows, plan.a.n_kv), params->ith, params->nth, scratch,
                      (float *) mine);
        return true;
    }
    compute_chunks(plan, list, count, params->ith, params->nth, scratch, mine);
    ggml_barrier(params->threadpool);
    for (int64_t item = params->ith; item < plan.units * plan.unit_rows; item += params->nth) {
        const int64_t u = item / plan.unit_rows, row = item % plan.unit_rows;
        char *  first = results + u * plan.partial;
        float * into  = (float *) first + row * stride;
        for (int64_t thread = 1; thread < params->nth; ++thread) {
            tq_attention_merge(into, (const float *) (first + thread * plan.results) + row * stride, plan.kv.head_v);
        }
        finish_row(plan, unit_at(plan, u), row, into);
    }
    return true;
}

void turbo_cpu_work_size(int n_threads, const struct ggml_tensor * op, size_t * size) {
    Plan plan;
    if (plan_attention(op, n_threads, plan)) {
        *size = std::max(*size, plan.total);
    }
}
