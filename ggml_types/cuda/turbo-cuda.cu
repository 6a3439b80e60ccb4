// turbo-cuda.cu: the turbo types in ggml's CUDA backend, with the kernels of cpp/cuda. Part of ggml-cuda.
//
// There are two paths for attention. Up to some number of query columns, the kernels of cpp/cuda read the blocks
// directly. For all other calls, mainly prefill, K and V are decoded to f16 in the rotated domain, and ggml's own
// attention is called with them. The queries are rotated before this call, and the output is rotated back after it.

#include "cuda/turbo-cuda.h"

#include "cuda/turbo-graph.h"
#include "ggml/turbo-count.h"
#include "ggml/turbo-options.h"

#include "common.cuh"
#include "convert.cuh"
#include "fattn.cuh"
#include "mmvq.cuh"

#include "turboquant_cuda.h"

#include <algorithm>
#include <map>
#include <mutex>
#include <utility>

namespace {

namespace tq = turboquant::cuda;

tq_type to_tq(ggml_type type) {
    return (tq_type) turbo_to_tq(type);
}

tq::Rows rows_of(const ggml_tensor * t) {
    return { t->data, { (int64_t) t->nb[1], (int64_t) t->nb[2], (int64_t) t->nb[3] } };
}

// The rows of a tensor that has the shape of t, rows of `row` bytes, and no gaps.
tq::Rows dense_rows(void * data, const ggml_tensor * t, int64_t row) {
    return { data, { row, row * t->ne[1], row * t->ne[1] * t->ne[2] } };
}

tq::Index index_of(const ggml_tensor * t) {
    return { t->data,
             t->type == GGML_TYPE_I64,
             { t->ne[0], t->ne[1], t->ne[2] },
             { (int64_t) t->nb[0], (int64_t) t->nb[1], (int64_t) t->nb[2] } };
}

const tq::Index no_index = { nullptr, false, { 1, 1, 1 }, { 0, 0, 0 } };

// Whether there are CUDA kernels for all turbo types of op. A format may have only CPU kernels.
bool is_covered(const ggml_tensor * op) {
    bool covered = !turbo_is_type(op->type) || tq::codec_supports(to_tq(op->type));
    for (const ggml_tensor * src : op->src) {
        covered = covered && (!src || !turbo_is_type(src->type) || tq::codec_supports(to_tq(src->type)));
    }
    return covered;
}

// Whether the rows are aligned to the vectors of four values that the decoder stores.
bool aligned_rows(const ggml_tensor * t) {
    return t->nb[1] % 16 == 0 && t->nb[2] % 16 == 0 && t->nb[3] % 16 == 0 && t->view_offs % 16 == 0;
}

// ---- copies --------------------------------------------------------------------------------------------------------

// The kernels also need aligned rows where they decode.

bool can_copy(const ggml_tensor * src, const ggml_tensor * dst) {
    return turbo_copies_rows(src, dst) && (turbo_is_type(dst->type) || aligned_rows(dst));
}

bool can_get_rows(const ggml_tensor * op) {
    return turbo_gets_rows(op) && aligned_rows(op);
}

tq::Store store_of(const ggml_tensor * src, const ggml_tensor * dst, const tq::Index & index) {
    return { to_tq(dst->type), rows_of(src), rows_of(dst), { src->ne[0], src->ne[1], src->ne[2], src->ne[3] }, index };
}

tq::Store store_of(const ggml_tensor * set_rows) {
    return store_of(set_rows->src[0], set_rows, index_of(set_rows->src[1]));
}

// Whether the memory of two tensors overlaps, so that the order in which they are written matters.
bool overlap(const ggml_tensor * a, const ggml_tensor * b) {
    const char * at_a = static_cast<const char *>(a->data);
    const char * at_b = static_cast<const char *>(b->data);
    return at_a < at_b + ggml_nbytes(b) && at_b < at_a + ggml_nbytes(a);
}

// ---- the product that follows attention ----------------------------------------------------------------------------

static_assert(sizeof(tq::QuantizedValues) == sizeof(block_q8_1), "attention writes the blocks of q8_1");

// The output of the last attention op of a context, rounded for the product that reads it.
struct QuantizedOutput {
    tq::QuantizedValues * blocks = nullptr;
    size_t                count  = 0;
    const ggml_tensor *   weights = nullptr, *values = nullptr; // operands of the product, if it is still to come
};

std::mutex contexts_mutex; // of what is kept of contexts

// Memory of a context's blocks stays in use by its CUDA graphs, so it is never freed: 1.1 bytes for a value of eight
// tokens. The caller holds the mutex.
QuantizedOutput & quantized_output(const ggml_backend_cuda_context & ctx) {
    static std::map<std::pair<const ggml_backend_cuda_context *, int>, QuantizedOutput> outputs;
    return outputs[{ &ctx, ctx.device }];
}

// Notes that the next attention op also writes its output in blocks for `product`, or, if it is nullptr, that it does
// not. Returns the memory of the blocks.
tq::QuantizedValues * expect_product(const ggml_backend_cuda_context & ctx, const ggml_tensor * product) {
    const std::lock_guard<std::mutex> lock(contexts_mutex);
    QuantizedOutput & output = quantized_output(ctx);
    output.weights = output.values = nullptr;
    if (!product) {
        return nullptr;
    }
    const size_t needed = size_t(product->src[1]->ne[0] / QK8_1 * MMVQ_MAX_BATCH_SIZE);
    if (output.count < needed) {
        CUDA_CHECK(cudaMalloc((void **) &output.blocks, needed * sizeof(block_q8_1)));
        output.count = needed;
    }
    output.weights = product->src[0];
    output.values  = product->src[1];
    return output.blocks;
}

// ---- attention -----------------------------------------------------------------------------------------------------

// Copies the address and the strides of rows to the arguments of the kernels.
template <typename T>
void take_rows(const turbo_rows & from, const T *& data, int64_t & row, int64_t & head, int64_t & stream) {
    data   = (const T *) from.data;
    row    = from.row_bytes;
    head   = from.head_bytes;
    stream = from.stream_bytes;
}

// Describes the exact rows for the kernels that read blocks. False if the kernels do not support them.
bool describe_exact(const turbo_attention & a, tq::ExactRows & exact) {
    if (a.slots.type_k != a.slots.type_v || !tq::kv_of_type(turbo_to_row(a.slots.type_k), (int) a.head_k, exact.type)) {
        return false;
    }
    exact.slots = a.slots.n_kv;
    take_rows(a.slots.k, exact.k, exact.k_row, exact.k_head, exact.k_stream);
    take_rows(a.slots.v, exact.v, exact.v_row, exact.v_head, exact.v_stream);
    take_rows(a.batch.k, exact.batch_k, exact.batch_k_row, exact.batch_k_head, exact.batch_k_stream);
    take_rows(a.batch.v, exact.batch_v, exact.batch_v_row, exact.batch_v_head, exact.batch_v_stream);
    take_rows(a.slots.mask, exact.mask, exact.mask_token, exact.mask_head, exact.mask_stream);
    exact.mask_heads   = (int) a.slots.mask_heads;
    exact.mask_streams = (int) a.slots.mask_streams;
    return a.batch.n_kv == a.tokens;
}

// Describes the call for the kernels that read blocks, and plans it. False if they do not cover the call.
bool plan_blocks(const turbo_attention & a, tq::Attention & call, tq::AttentionPlan & plan) {
    if (a.head_k != a.head_v || !tq::kv_of_type(turbo_to_row(a.type_k), (int) a.head_k, call.type_k) ||
        !tq::kv_of_type(turbo_to_row(a.type_v), (int) a.head_v, call.type_v)) {
        return false;
    }
    call.head         = (int) a.head_k;
    call.heads        = (int) a.heads;
    call.kv_heads     = (int) a.kv_heads;
    call.tokens       = (int) a.tokens;
    call.streams      = (int) a.streams;
    call.kv_streams   = (int) a.kv_streams;
    call.n_kv         = a.n_kv;
    take_rows(a.q, call.q, call.q_token, call.q_head, call.q_stream);
    take_rows(a.k, call.k, call.k_row, call.k_head, call.k_stream);
    take_rows(a.v, call.v, call.v_row, call.v_head, call.v_stream);
    take_rows(a.mask, call.mask, call.mask_token, call.mask_head, call.mask_stream);
    call.mask_heads   = (int) a.mask_heads;
    call.mask_streams = (int) a.mask_streams;
    call.sinks        = a.sinks;
    call.scale        = a.scale;
    call.max_bias     = a.max_bias;
    call.soft_cap     = a.soft_cap;
    call.sparse_v     = turbo_sparse_v();
    call.dst          = a.out;
    call.windowed     = a.windowed;
    call.requests     = a.requests;
    call.quantized    = nullptr;
    call.exact        = {};
    return (!a.windowed || describe_exact(a, call.exact)) && tq::plan_attention(call, plan);
}

// The notes of masks of a context.
struct ContextNotes {
    turbo_notes<tq::MaskNotesKey> notes;
    const ggml_cgraph *           graph = nullptr; // if its node `at`, which is attention, is computed next
    int                           at    = 0;
};

// The memory of notes, too, stays in use by the context's CUDA graphs, so it is never freed. If it must grow, it is
// replaced by at least twice as much, so no more is lost than is in use. The caller holds the mutex.
ContextNotes & context_notes(const ggml_backend_cuda_context & ctx) {
    static std::map<std::pair<const ggml_backend_cuda_context *, int>, ContextNotes> all;
    return all[{ &ctx, ctx.device }];
}

// The notes that attention `op` reads or writes. graph: nullptr, or the graph that is computed, of which it is node `at`.
tq::MaskNotes notes_for(const ggml_backend_cuda_context & ctx, const ggml_cgraph * graph, int at,
                        const ggml_tensor * op, const tq::Attention & call, const tq::AttentionPlan & plan) {
    const std::lock_guard<std::mutex> lock(contexts_mutex);
    auto &                            notes = context_notes(ctx).notes;
    notes.forget(op);
    if (!graph || plan.notes_bytes == 0) {
        return {};
    }
    const tq::MaskNotesKey key = tq::notes_key(call, plan);
    if (const auto * found = notes.find(graph, at, key)) {
        turbo_count("notes of masks that an earlier layer has written", call.tokens, call.streams);
        return { found->memory, true };
    }
    auto * entry = notes.choose(graph, at, plan.notes_bytes);
    if (!entry) {
        return {};
    }
    entry->writer = nullptr;
    if (entry->bytes < plan.notes_bytes) {
        const size_t bytes  = std::max(plan.notes_bytes, 2 * entry->bytes);
        void *       memory = nullptr;
        if (cudaMalloc(&memory, bytes) != cudaSuccess) {
            (void) cudaGetLastError(); // so that no later check finds this error
            return {};
        }
        entry->memory = memory;
        entry->bytes  = bytes;
    }
    entry->writer = op;
    entry->index  = at;
    entry->key    = key;
    return { entry->memory, false };
}

// Of attention that does not call notes_for.
void forget_notes(const ggml_backend_cuda_context & ctx, const ggml_tensor * op) {
    const std::lock_guard<std::mutex> lock(contexts_mutex);
    context_notes(ctx).notes.forget(op);
}

// Node `at` of the graph is computed next. If it is attention, the function that computes it asks for the graph, which
// it does not get from ggml.
void expect_attention(const ggml_backend_cuda_context & ctx, const ggml_cgraph * graph, int at) {
    if (turbo_op_kind(graph->nodes[at]) != turbo_op::attention) {
        return;
    }
    const std::lock_guard<std::mutex> lock(contexts_mutex);
    ContextNotes &                    notes = context_notes(ctx);
    notes.graph = graph;
    notes.at    = at;
}

// The graph of which `op` is node `at`, or nullptr if that is not known.
const ggml_cgraph * expected_graph(const ggml_backend_cuda_context & ctx, const ggml_tensor * op, int & at) {
    const std::lock_guard<std::mutex> lock(contexts_mutex);
    ContextNotes &                    notes = context_notes(ctx);
    const ggml_cgraph *               graph = std::exchange(notes.graph, nullptr);
    at                                      = notes.at;
    return graph && graph->nodes[at] == op ? graph : nullptr;
}

// Attention `op`, which is node `at` of the graph, if this is not nullptr.
void compute_blocks(ggml_backend_cuda_context & ctx, const ggml_cgraph * graph, int at, const ggml_tensor * op,
                    const tq::Attention & call, const tq::AttentionPlan & plan, const tq::Store * stores = nullptr) {
    turbo_count(plan.direct     ? "attention by the kernel for a few tokens"
                : plan.hopper   ? "attention by the kernel for Hopper GPUs"
                : plan.wide     ? "attention by the kernel for many columns"
                : plan.gathered ? "attention by the decode kernel over gathered rows"
                                : "attention by the decode kernel",
                call.tokens, call.streams);
    const tq::MaskNotes        notes = notes_for(ctx, graph, at, op, call, plan);
    ggml_cuda_pool_alloc<char> workspace(ctx.pool(), plan.workspace_bytes - (notes.memory ? plan.notes_bytes : 0));
    CUDA_CHECK(tq::attention(call, plan, workspace.get(), ctx.stream(), stores, notes));
}

// K or V of an exact window.
tq::WindowRows window_of(const ggml_tensor * slots, const ggml_tensor * batch) {
    return { slots->type == GGML_TYPE_F16, rows_of(slots), rows_of(batch), slots->ne[1], batch->ne[1],
             slots->ne[0] * slots->ne[2], slots->ne[3] };
}

tq::WindowRows window_of(const ggml_tensor * op, bool keys) {
    return keys ? window_of(op->src[TURBO_SRC_SLOTS_K], op->src[TURBO_SRC_BATCH_K]) :
                  window_of(op->src[TURBO_SRC_SLOTS_V], op->src[TURBO_SRC_BATCH_V]);
}

// The rows of the cache that the exact rows replace.
tq::WindowCells cells_of(const ggml_tensor * op) {
    const ggml_tensor * exact = op->src[TURBO_SRC_EXACT_MASK];
    const char *        low   = (const char *) exact->data + op->src[0]->ne[1] * exact->nb[1];
    return { (const uint16_t *) low, (const uint16_t *) (low + exact->nb[1]), (int64_t) exact->nb[3] };
}

// A copy of an attention op for ggml's kernels. Operands that must be converted become new tensors, which have no
// memory yet: Q that must be rotated, K and V that are not f16, and with an exact window K, V and the mask.
struct HalfAttention {
    ggml_tensor q, k, v, mask, op;
    bool        shared;   // whether V is the front of K's rows
    bool        windowed; // whether the rows of an exact window replace rows of the cache

    explicit HalfAttention(const ggml_tensor * original)
        : q(*original->src[0]), k(*original->src[1]), v(*original->src[2]), op(*original) {
        const ggml_tensor *k_src = original->src[1], *v_src = original->src[2];
        windowed = original->src[TURBO_SRC_SLOTS_K];
        if (windowed) {
            dense_half(k);
            dense_half(v);
            mask = *original->src[3];
            set_strides(mask, sizeof(half));
            op.src[3] = &mask;
            for (int i = TURBO_SRC_SLOTS_K; i <= TURBO_SRC_BATCH_V; ++i) {
                op.src[i] = nullptr;
            }
        }
        shared =
            v_src->type == k_src->type && v_src->view_src &&
            (v_src->view_src == k_src || (v_src->view_src == k_src->view_src && v_src->view_offs == k_src->view_offs));
        to_half(k);
        if (shared) {
            for (int i = 0; i < GGML_MAX_DIMS; ++i) {
                v.nb[i] = k.nb[i];
            }
            v.type      = GGML_TYPE_F16;
            v.view_src  = &k;
            v.view_offs = 0;
        } else {
            to_half(v);
        }
        if (turbo_is_type(k_src->type)) {
            set_strides(q, sizeof(float));
        }
        op.src[0] = &q;
        op.src[1] = &k;
        op.src[2] = &v;
    }
    HalfAttention(const HalfAttention &) = delete;

    static void set_strides(ggml_tensor & t, size_t element) {
        t.nb[0]     = element;
        t.nb[1]     = element * t.ne[0];
        t.nb[2]     = t.nb[1] * t.ne[1];
        t.nb[3]     = t.nb[2] * t.ne[2];
        t.view_src  = nullptr;
        t.view_offs = 0;
    }

    static void to_half(ggml_tensor & t) {
        if (t.type != GGML_TYPE_F16) {
            dense_half(t);
        }
    }

    // The layout is [row][KV head][value], as in a cache, so that contiguous rows of a cache are decoded in order.
    static void dense_half(ggml_tensor & t) {
        t.type      = GGML_TYPE_F16;
        t.nb[0]     = sizeof(half);
        t.nb[2]     = sizeof(half) * t.ne[0];
        t.nb[1]     = t.nb[2] * t.ne[2];
        t.nb[3]     = t.nb[1] * t.ne[1];
        t.view_src  = nullptr;
        t.view_offs = 0;
    }
};

bool heads_adjacent(const ggml_tensor * t) {
    return t->nb[2] == ggml_row_size(t->type, t->ne[0]);
}

bool half_supports(int device, const ggml_tensor * op) {
    if (op->src[TURBO_SRC_SLOTS_K]) {
        for (const int i : { 1, 2, (int) TURBO_SRC_SLOTS_K, (int) TURBO_SRC_SLOTS_V, (int) TURBO_SRC_BATCH_K,
                             (int) TURBO_SRC_BATCH_V }) {
            if (!heads_adjacent(op->src[i])) {
                return false;
            }
        }
        const ggml_tensor *far = op->src[3], *exact = op->src[TURBO_SRC_EXACT_MASK];
        if (!far || !ggml_is_contiguous(far) || far->ne[2] != exact->ne[2] || far->ne[3] != exact->ne[3] ||
            far->ne[3] != op->src[1]->ne[3]) {
            return false;
        }
    }
    for (int i = 1; i <= 2; ++i) {
        const ggml_type type = op->src[i]->type;
        if (!turbo_is_type(type) && type != GGML_TYPE_F16 && !ggml_get_to_fp16_nc_cuda(type)) {
            return false;
        }
    }
    const HalfAttention halves(op);
    return ggml_cuda_flash_attn_ext_supported(device, &halves.op);
}

// Query columns of a KV head, from which on attention by f16 is as fast as on blocks. Measured on an H200 (32 query
// heads, 8 KV heads of 128, 32768 rows, microseconds of a layer): 512 tokens, which are 2048 columns, take 981 on
// blocks and about 940 in ggml's kernel alone; 128 tokens take 265 on blocks. This does not concern the kernel for
// Hopper GPUs, which is faster than f16 there, nor gathered rows, which are few.
constexpr int most_block_columns = 512;

// As plan_blocks. False also for calls that attention by f16 computes as fast.
bool prefers_blocks(int device, const ggml_tensor * op, const turbo_attention & a, tq::Attention & call,
                    tq::AttentionPlan & plan) {
    return plan_blocks(a, call, plan) &&
           (plan.columns <= most_block_columns || plan.hopper || plan.gathered || !half_supports(device, op));
}

// Decodes t, a cache of any type, to the rotated domain if its type is turbo. `out` is the tensor of HalfAttention,
// whose streams may have more rows.
void decode_half(const ggml_tensor * t, const ggml_tensor & out, cudaStream_t stream) {
    const bool beside = heads_adjacent(t); // if so, the heads of a row are decoded as one row
    if (t->type == GGML_TYPE_F16) {
        for (int64_t s = 0; s < t->ne[3]; ++s) {
            CUDA_CHECK(cudaMemcpy2DAsync((char *) out.data + s * out.nb[3], out.nb[1],
                                         (const char *) t->data + s * t->nb[3], t->nb[1], out.nb[1], t->ne[1],
                                         cudaMemcpyDeviceToDevice, stream));
        }
        return;
    }
    if (!turbo_is_type(t->type)) {
        const to_fp16_nc_cuda_t convert = ggml_get_to_fp16_nc_cuda(t->type);
        const int64_t size = ggml_type_size(t->type), s1 = t->nb[1] / size, s2 = t->nb[2] / size;
        for (int64_t s = 0; s < t->ne[3]; ++s) { // convert writes dense rows, in the order of dense_half
            const char * from = (const char *) t->data + s * t->nb[3];
            half *       to   = (half *) ((char *) out.data + s * out.nb[3]);
            if (beside) {
                convert(from, to, t->ne[0] * t->ne[2], t->ne[1], 1, 1, s1, s1, s1, stream);
            } else {
                convert(from, to, t->ne[0], t->ne[2], t->ne[1], 1, s2, s1, s1, stream);
            }
        }
        return;
    }
    if (beside) {
        const int64_t ne[4] = { t->ne[0] * t->ne[2], t->ne[1], 1, t->ne[3] };
        CUDA_CHECK(tq::decode_rows(to_tq(t->type), rows_of(t), rows_of(&out), ne, no_index, true, true, stream));
    } else {
        CUDA_CHECK(tq::decode_rows(to_tq(t->type), rows_of(t), rows_of(&out), t->ne, no_index, true, true, stream));
    }
}

// Replaces rows of a cache in `out` by the exact rows, rotated if the cache has a turbo type.
void take_exact_rows(const ggml_tensor * op, const ggml_tensor * cache, bool keys, const ggml_tensor & out,
                     cudaStream_t stream) {
    const bool turbo = turbo_is_type(cache->type);
    CUDA_CHECK(tq::window_to_half(window_of(op, keys), cells_of(op), turbo ? (int) ggml_blck_size(cache->type) : 32,
                                  turbo, rows_of(&out), stream));
}

// Computes attention with ggml's kernels, on K and V in f16.
void attention_by_half(ggml_backend_cuda_context & ctx, ggml_tensor * dst) {
    forget_notes(ctx, dst);
    const ggml_tensor *         q = dst->src[0], *k = dst->src[1], *v = dst->src[2];
    turbo_count("attention by ggml's kernels over f16", q->ne[1], q->ne[3]);
    cudaStream_t                stream = ctx.stream();
    ggml_cuda_pool_alloc<half>  k_half(ctx.pool()), v_half(ctx.pool()), masks(ctx.pool());
    ggml_cuda_pool_alloc<float> q_rotated(ctx.pool());
    HalfAttention               halves(dst);
    if (k->type != GGML_TYPE_F16 || halves.windowed) {
        halves.k.data = k_half.alloc(ggml_nelements(&halves.k));
        decode_half(k, halves.k, stream);
    }
    if (halves.shared) {
        halves.v.data = halves.k.data;
    } else if (v->type != GGML_TYPE_F16 || halves.windowed) {
        halves.v.data = v_half.alloc(ggml_nelements(&halves.v));
        decode_half(v, halves.v, stream);
    }
    if (halves.windowed) {
        const ggml_tensor *far = dst->src[3], *exact = dst->src[TURBO_SRC_EXACT_MASK];
        take_exact_rows(dst, k, true, halves.k, stream);
        take_exact_rows(dst, v, false, halves.v, stream);
        halves.mask.data = masks.alloc(ggml_nelements(&halves.mask));
        CUDA_CHECK(cudaMemcpyAsync(halves.mask.data, far->data, ggml_nbytes(far), cudaMemcpyDeviceToDevice, stream));
        const int64_t ne[4] = { exact->ne[0], far->ne[1], far->ne[2], far->ne[3] };
        CUDA_CHECK(tq::window_to_mask(rows_of(exact), cells_of(dst), rows_of(&halves.mask), ne, stream));
    }
    if (turbo_is_type(k->type)) {
        halves.q.data = q_rotated.alloc(ggml_nelements(q));
        CUDA_CHECK(tq::rotate_rows(ggml_blck_size(k->type), false, rows_of(q), rows_of(&halves.q), q->ne, stream));
    }
    ggml_cuda_flash_attn_ext(ctx, &halves.op);
    if (turbo_is_type(v->type)) {
        const tq::Rows rows  = dense_rows(dst->data, dst, dst->nb[1]);
        const int64_t  ne[4] = { dst->ne[0], dst->ne[1], dst->ne[2], dst->ne[3] };
        CUDA_CHECK(tq::rotate_rows(ggml_blck_size(v->type), true, rows, rows, ne, stream));
    }
}

// Whether node `at` and the next one that computes something, `next`, store K and V and can share a launch.
bool are_stores(const ggml_cgraph * graph, int at, int & next) {
    const ggml_tensor * first = graph->nodes[at];
    next                      = turbo_next_node(graph, at);
    if (first->op != GGML_OP_SET_ROWS || !turbo_is_type(first->type) || next == graph->n_nodes) {
        return false;
    }
    const ggml_tensor * second = graph->nodes[next];
    if (second->op != GGML_OP_SET_ROWS || !turbo_is_type(second->type) ||
        ggml_blck_size(second->type) != ggml_blck_size(first->type) || !(second->flags & GGML_TENSOR_FLAG_COMPUTE) ||
        overlap(first, second)) {
        return false;
    }
    GGML_ASSERT(turbo_sets_rows(first) && turbo_sets_rows(second));
    return true;
}

// Whether `node` stores the batch's rows of one side of an exact window in its slots.
bool stores_batch(const ggml_tensor * node, const ggml_tensor * slots, const ggml_tensor * batch, int64_t rows) {
    return node->op == GGML_OP_SET_ROWS && (node->flags & GGML_TENSOR_FLAG_COMPUTE) && node->type == slots->type &&
           node->view_src == slots->view_src && node->nb[1] == slots->nb[1] && node->src[0]->data == batch->data &&
           node->src[0]->type == GGML_TYPE_F32 && ggml_nrows(node->src[0]) == rows &&
           node->src[0]->nb[1] == batch->nb[1] && node->src[1]->type == GGML_TYPE_I64 &&
           ggml_is_contiguous(node->src[1]);
}

// Attention with an exact window at node `at`, and the two SET_ROWS that fill its slots afterwards. `stores`: nullptr,
// or stores of the batch in the cache that were put off. Returns how many nodes after `at` are done, too; -1 if nothing
// is done.
int fuse_window(ggml_backend_cuda_context & ctx, const ggml_cgraph * graph, int at, const tq::Store * stores) {
    ggml_tensor * op = at < graph->n_nodes ? graph->nodes[at] : nullptr;
    if (!op || op->op != GGML_OP_FLASH_ATTN_EXT || !op->src[TURBO_SRC_SLOTS_K] ||
        !(op->flags & GGML_TENSOR_FLAG_COMPUTE)) {
        return -1;
    }
    const int store_k = turbo_next_node(graph, at);
    const int store_v = store_k < graph->n_nodes ? turbo_next_node(graph, store_k) : store_k;
    if (store_v >= graph->n_nodes) {
        return -1;
    }
    const ggml_tensor *k = graph->nodes[store_k], *v = graph->nodes[store_v];
    turbo_attention    a;
    tq::Attention      call;
    tq::AttentionPlan  plan;
    GGML_ASSERT(turbo_describe_attention(op, a));
    const int64_t rows = a.tokens * a.kv_streams;
    if (!stores_batch(k, op->src[TURBO_SRC_SLOTS_K], op->src[TURBO_SRC_BATCH_K], rows) ||
        !stores_batch(v, op->src[TURBO_SRC_SLOTS_V], op->src[TURBO_SRC_BATCH_V], rows) ||
        k->src[1]->data != v->src[1]->data) {
        return -1;
    }
    const int64_t * slots = (const int64_t *) k->src[1]->data;
    if (prefers_blocks(ctx.device, op, a, call, plan)) {
        const ggml_tensor * product = turbo_product_of(graph, op, turbo_next_node(graph, store_v),
                                                       MMVQ_MAX_BATCH_SIZE, MATRIX_ROW_PADDING);
        call.quantized              = expect_product(ctx, plan.merged ? product : nullptr);
        call.exact.store_rows = slots;
        call.exact.store_k    = k->data;
        call.exact.store_v    = v->data;
        compute_blocks(ctx, graph, at, op, call, plan, stores);
    } else if (stores) {
        return -1;
    } else {
        expect_product(ctx, nullptr);
        attention_by_half(ctx, op);
        CUDA_CHECK(tq::store_window(window_of(op, true), window_of(op, false), slots, rows_of(k), rows_of(v),
                                    ctx.stream()));
    }
    return store_v - at;
}

// Two SET_ROWS, of K and of V, as one launch. If they store the batch in the cache of an attention op that reads the
// batch from its window, they are made beside this op. Returns how many nodes after `at` are done, too.
int fuse_stores(ggml_backend_cuda_context & ctx, const ggml_cgraph * graph, int at) {
    int next = 0;
    if (!are_stores(graph, at, next)) {
        return 0;
    }
    const ggml_tensor *k = graph->nodes[at], *v = graph->nodes[next];
    const tq::Store    stores[2] = { store_of(k), store_of(v) };
    const int          reader    = turbo_next_node(graph, next);
    if (reader < graph->n_nodes) {
        const ggml_tensor * op   = graph->nodes[reader];
        const auto          reads = [&](int src, const ggml_tensor * stored) {
            return op->src[src] && stored->view_src && op->src[src]->view_src == stored->view_src;
        };
        if (turbo_shows_batch(op) && reads(1, k) && reads(2, v)) {
            const int fused = fuse_window(ctx, graph, reader, stores);
            if (fused >= 0) {
                return reader + fused - at;
            }
        }
    }
    CUDA_CHECK(tq::encode_rows(stores[0], stores[1], ctx.stream()));
    return next - at;
}

// ---- RoPE ----------------------------------------------------------------------------------------------------------

// Whether no kernel of a graph computes the tensor, so that it has its values when the graph starts.
bool is_given(const ggml_tensor * t) {
    return t->op == GGML_OP_NONE && !t->view_src;
}

// The angles of a RoPE op, as ggml's kernels read its parameters. False if the kernel does not cover the op.
bool describe_rope(const ggml_tensor * op, tq::RopeAngles & angles) {
    const ggml_tensor *x = op->src[0], *positions = op->src[1], *factors = op->src[2];
    const int32_t *    ints = op->op_params;
    float              floats[6]; // base, scale, extrapolation, magnitude, the two limits of YaRN
    memcpy(floats, ints + 5, sizeof(floats));
    const int values = ints[1], mode = ints[2], n_ctx_orig = ints[4], first = ints[15];
    // The kernel reads positions and factors while preceding kernels still run, so none of these may compute them.
    if (x->type != GGML_TYPE_F32 || op->type != GGML_TYPE_F32 || x->ne[3] != 1 || !turbo_whole_rows(x) ||
        !turbo_whole_rows(op) || (mode != GGML_ROPE_TYPE_NORMAL && mode != GGML_ROPE_TYPE_NEOX) || first < 0 ||
        first + values > x->ne[0] || positions->type != GGML_TYPE_I32 || !is_given(positions) ||
        (factors && (factors->type != GGML_TYPE_F32 || !is_given(factors)))) {
        return false;
    }
    angles = { x->ne[2],
               (const int32_t *) positions->data,
               factors ? (const float *) factors->data : nullptr,
               first,
               values,
               mode == GGML_ROPE_TYPE_NORMAL,
               powf(floats[0], -2.0f / values),
               floats[1],
               floats[2],
               {},
               floats[3] };
    ggml_rope_yarn_corr_dims(values, n_ctx_orig, floats[0], floats[4], floats[5], angles.ramp);
    return tq::rope_supports(angles);
}

tq::Rope rope_of(const ggml_tensor * op) {
    return { rows_of(op->src[0]), rows_of(op), (int) op->ne[0], (int) op->ne[1] };
}

// RoPE of queries and of keys as one launch. Returns how many nodes after `at` are done, too.
int fuse_ropes(ggml_backend_cuda_context & ctx, const ggml_cgraph * graph, int at) {
    const ggml_tensor * first = graph->nodes[at];
    const int           next  = turbo_next_node(graph, at);
    if (first->op != GGML_OP_ROPE || next == graph->n_nodes) {
        return 0;
    }
    const ggml_tensor * second = graph->nodes[next];
    tq::RopeAngles      angles, same;
    if (second->op != GGML_OP_ROPE || !(second->flags & GGML_TENSOR_FLAG_COMPUTE) ||
        !turbo_same_angles(first, second) || !describe_rope(first, angles) || !describe_rope(second, same) ||
        !turbo_attention_follows(graph, next) || overlap(first, second) ||
        overlap(first, second->src[0]) || overlap(first->src[0], second)) {
        return 0;
    }
    turbo_count("RoPE of queries and keys in one launch", angles.tokens, 1);
    CUDA_CHECK(tq::rope(rope_of(first), rope_of(second), angles, ctx.stream()));
    return next - at;
}

} // namespace

const void * turbo_cuda_quantized_output(ggml_backend_cuda_context & ctx, const ggml_tensor * weights,
                                         const ggml_tensor * values) {
    const std::lock_guard<std::mutex> lock(contexts_mutex);
    QuantizedOutput & output = quantized_output(ctx);
    if (!output.weights || weights != output.weights || values != output.values) {
        return nullptr;
    }
    output.weights = output.values = nullptr;
    turbo_count("product of attention's output, which attention has rounded", values->ne[1], 1);
    return output.blocks;
}

void turbo_cuda_arrange(ggml_cgraph * graph, const turbo_keep & keep) {
    turbo_arrange_ropes(graph, keep);
}

bool turbo_cuda_supports_op(int device, const ggml_tensor * op) {
    const turbo_op kind = turbo_op_kind(op);
    if (kind == turbo_op::view) {
        return true;
    }
    if (!is_covered(op)) {
        return false;
    }
    switch (kind) {
        case turbo_op::bytes: return ggml_is_contiguous(op->src[0]) && ggml_is_contiguous(op);
        case turbo_op::encode:
        case turbo_op::decode: return can_copy(op->src[0], op);
        case turbo_op::store: return turbo_sets_rows(op);
        case turbo_op::load: return can_get_rows(op);
        case turbo_op::attention: {
            turbo_attention a;
            int             before = 0;
            if (!turbo_describe_attention(op, a) || cudaGetDevice(&before) != cudaSuccess) {
                return false;
            }
            ggml_cuda_set_device(device);
            tq::Attention     call;
            tq::AttentionPlan plan;
            const bool        supported = half_supports(device, op) || plan_blocks(a, call, plan);
            ggml_cuda_set_device(before);
            return supported;
        }
        default: return false;
    }
}

bool turbo_cuda_set_rows(ggml_backend_cuda_context & ctx, ggml_tensor * dst) {
    if (!turbo_is_type(dst->type)) {
        return false;
    }
    GGML_ASSERT(turbo_sets_rows(dst));
    CUDA_CHECK(tq::encode_rows(store_of(dst), ctx.stream()));
    return true;
}

int turbo_cuda_try_fuse(ggml_backend_cuda_context & ctx, const ggml_cgraph * graph, int at) {
    // On a stream other than 0, ggml computes branches of the graph concurrently, and the source of a later op may not
    // be computed yet.
    if (ctx.curr_stream_no != 0) {
        return 0;
    }
    if (const int ropes = fuse_ropes(ctx, graph, at)) {
        return ropes;
    }
    const int pair = fuse_stores(ctx, graph, at);
    const int done = pair ? pair : std::max(0, fuse_window(ctx, graph, at, nullptr));
    if (!done) {
        expect_attention(ctx, graph, at);
    }
    return done;
}

bool turbo_cuda_get_rows(ggml_backend_cuda_context & ctx, ggml_tensor * dst) {
    if (!turbo_is_type(dst->src[0]->type)) {
        return false;
    }
    GGML_ASSERT(can_get_rows(dst));
    CUDA_CHECK(tq::decode_rows(to_tq(dst->src[0]->type), rows_of(dst->src[0]), rows_of(dst), dst->ne,
                               index_of(dst->src[1]), false, false, ctx.stream()));
    return true;
}

bool turbo_cuda_cpy(ggml_backend_cuda_context & ctx, const ggml_tensor * src, ggml_tensor * dst) {
    if (src->type == dst->type || (!turbo_is_type(src->type) && !turbo_is_type(dst->type))) {
        return false;
    }
    GGML_ASSERT(can_copy(src, dst));
    if (turbo_is_type(dst->type)) {
        CUDA_CHECK(tq::encode_rows(store_of(src, dst, no_index), ctx.stream()));
    } else {
        CUDA_CHECK(tq::decode_rows(to_tq(src->type), rows_of(src), rows_of(dst), src->ne, no_index,
                                   dst->type == GGML_TYPE_F16, false, ctx.stream()));
    }
    return true;
}

bool turbo_cuda_flash_attn_ext(ggml_backend_cuda_context & ctx, ggml_tensor * dst) {
    turbo_attention a;
    if (turbo_op_kind(dst) != turbo_op::attention) {
        return false;
    }
    GGML_ASSERT(turbo_describe_attention(dst, a));
    expect_product(ctx, nullptr);
    int                 at    = 0;
    const ggml_cgraph * graph = expected_graph(ctx, dst, at);
    tq::Attention       call;
    tq::AttentionPlan   plan;
    if (prefers_blocks(ctx.device, dst, a, call, plan)) {
        compute_blocks(ctx, graph, at, dst, call, plan);
    } else {
        attention_by_half(ctx, dst);
    }
    return true;
}
