// turbo-cuda.cu: the turbo types in ggml's CUDA backend, by the kernels of cpp/cuda. Part of ggml-cuda.
//
// Attention takes one of two ways. A few query tokens go to the kernel that reads the blocks as they are. Everything
// else, prefill above all, decodes K and V to f16 once, in the rotated domain, and calls ggml's own attention on them;
// queries are rotated before, the output is rotated back after.

#include "cuda/turbo-cuda.h"

#include "common.cuh"
#include "convert.cuh"
#include "fattn.cuh"

#include "turboquant_cuda.h"

#include <cstring>

namespace {

namespace tq = turboquant::cuda;

tq_type to_tq(ggml_type type) {
    return (tq_type) turbo_to_tq(type);
}

tq::Rows rows_of(const ggml_tensor * t) {
    return { t->data, { (int64_t) t->nb[1], (int64_t) t->nb[2], (int64_t) t->nb[3] } };
}

// The rows of a tensor of `row` bytes and t's shape without gaps.
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

// A format may have kernels for the CPU alone.
bool is_covered(const ggml_tensor * op) {
    bool covered = !turbo_is_type(op->type) || tq::codec_supports(to_tq(op->type));
    for (const ggml_tensor * src : op->src) {
        covered = covered && (!src || !turbo_is_type(src->type) || tq::codec_supports(to_tq(src->type)));
    }
    return covered;
}

bool whole_rows(const ggml_tensor * t) {
    return t->nb[0] == ggml_type_size(t->type);
}

// The decoder stores four values at once.
bool aligned_rows(const ggml_tensor * t) {
    return t->nb[1] % 16 == 0 && t->nb[2] % 16 == 0 && t->nb[3] % 16 == 0 && t->view_offs % 16 == 0;
}

// ---- copies --------------------------------------------------------------------------------------------------------

bool is_copy(const ggml_tensor * src, const ggml_tensor * dst) {
    if (!ggml_are_same_shape(src, dst) || !whole_rows(src) || !whole_rows(dst)) {
        return false;
    }
    if (turbo_is_type(src->type)) {
        return (dst->type == GGML_TYPE_F32 || dst->type == GGML_TYPE_F16) && aligned_rows(dst);
    }
    return src->type == GGML_TYPE_F32 && turbo_is_type(dst->type);
}

bool is_set_rows(const ggml_tensor * op) {
    return turbo_is_type(op->type) && op->src[0]->type == GGML_TYPE_F32 && whole_rows(op->src[0]) && whole_rows(op) &&
           (op->src[1]->type == GGML_TYPE_I64 || op->src[1]->type == GGML_TYPE_I32);
}

tq::Store store_of(const ggml_tensor * src, const ggml_tensor * dst, const tq::Index & index) {
    return { to_tq(dst->type), rows_of(src), rows_of(dst), { src->ne[0], src->ne[1], src->ne[2], src->ne[3] }, index };
}

tq::Store store_of(const ggml_tensor * set_rows) {
    return store_of(set_rows->src[0], set_rows, index_of(set_rows->src[1]));
}

// Then it counts which is written first.
bool overlap(const ggml_tensor * a, const ggml_tensor * b) {
    const char * at_a = static_cast<const char *>(a->data);
    const char * at_b = static_cast<const char *>(b->data);
    return at_a < at_b + ggml_nbytes(b) && at_b < at_a + ggml_nbytes(a);
}

bool is_get_rows(const ggml_tensor * op) {
    return turbo_is_type(op->src[0]->type) && op->type == GGML_TYPE_F32 && op->src[1]->type == GGML_TYPE_I32 &&
           whole_rows(op->src[0]) && whole_rows(op) && aligned_rows(op) && op->src[1]->ne[3] == 1;
}

// ---- attention -----------------------------------------------------------------------------------------------------

// The type as the decode kernel knows it, whose blocks are the largest that divide the head.
bool kv_type(ggml_type type, int64_t head, tq::KV & kv) {
    if (turbo_is_type(type)) {
        if (turbo_type_for_head(turbo_family(type), head) != type) {
            return false;
        }
        switch (turbo_family(type)) {
            case GGML_TYPE_TURBO4: kv = tq::KV::turbo4; return true;
            case GGML_TYPE_TURBO3: kv = tq::KV::turbo3; return true;
            case GGML_TYPE_TURBO2: kv = tq::KV::turbo2; return true;
            default: return false;
        }
    }
    switch (type) {
        case GGML_TYPE_Q8_0: kv = tq::KV::q8_0; return true;
        case GGML_TYPE_F16: kv = tq::KV::f16; return true;
        default: return false;
    }
}

bool has_turbo(const ggml_tensor * op) {
    return turbo_is_type(op->src[1]->type) || turbo_is_type(op->src[2]->type);
}

// What both ways demand.
bool is_attention(const ggml_tensor * op) {
    const ggml_tensor *q = op->src[0], *k = op->src[1], *v = op->src[2], *mask = op->src[3];
    return has_turbo(op) && q->type == GGML_TYPE_F32 && op->type == GGML_TYPE_F32 && whole_rows(q) && whole_rows(k) &&
           whole_rows(v) && k->ne[2] == v->ne[2] && k->ne[3] == v->ne[3] && q->ne[2] % k->ne[2] == 0 &&
           q->ne[3] % k->ne[3] == 0 && (!mask || (mask->type == GGML_TYPE_F16 && whole_rows(mask)));
}

// Describes op for the decode kernel and plans it; false if that does not cover it.
bool plan_decode(const ggml_tensor * op, tq::Attention & a, tq::AttentionPlan & plan) {
    const ggml_tensor *q = op->src[0], *k = op->src[1], *v = op->src[2], *mask = op->src[3], *sinks = op->src[4];
    if (!is_attention(op) || q->ne[0] != v->ne[0] || !kv_type(k->type, k->ne[0], a.type_k) ||
        !kv_type(v->type, v->ne[0], a.type_v)) {
        return false;
    }
    a.head       = (int) q->ne[0];
    a.heads      = (int) q->ne[2];
    a.kv_heads   = (int) k->ne[2];
    a.tokens     = (int) q->ne[1];
    a.streams    = (int) q->ne[3];
    a.kv_streams = (int) k->ne[3];
    a.n_kv       = k->ne[1];
    a.q          = (const float *) q->data;
    a.q_token    = q->nb[1];
    a.q_head     = q->nb[2];
    a.q_stream   = q->nb[3];
    a.k          = k->data;
    a.k_row      = k->nb[1];
    a.k_head     = k->nb[2];
    a.k_stream   = k->nb[3];
    a.v          = v->data;
    a.v_row      = v->nb[1];
    a.v_head     = v->nb[2];
    a.v_stream   = v->nb[3];
    a.mask       = nullptr;
    a.mask_token = a.mask_head = a.mask_stream = 0;
    a.mask_heads = a.mask_streams = 1;
    if (mask) {
        a.mask         = mask->data;
        a.mask_token   = mask->nb[1];
        a.mask_head    = mask->nb[2];
        a.mask_stream  = mask->nb[3];
        a.mask_heads   = (int) mask->ne[2];
        a.mask_streams = (int) mask->ne[3];
    }
    a.sinks = sinks ? (const float *) sinks->data : nullptr;
    float params[3];
    memcpy(params, op->op_params, sizeof(params));
    a.scale    = params[0];
    a.max_bias = params[1];
    a.soft_cap = params[2];
    a.sparse_v = turbo_sparse_v();
    a.dst      = (float *) op->data;
    return tq::plan_attention(a, plan);
}

// K and V of an op as dense f16 tensors, and the op on them.
struct HalfAttention {
    ggml_tensor q, k, v, op;
    bool        shared; // V is the front of K's rows

    explicit HalfAttention(const ggml_tensor * original)
        : q(*original->src[0]), k(*original->src[1]), v(*original->src[2]), op(*original) {
        const ggml_tensor *k_src = original->src[1], *v_src = original->src[2];
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

    // As a cache lies: [head][kv head][row], so that rows that are whole in the cache are decoded as they lie.
    static void to_half(ggml_tensor & t) {
        if (t.type == GGML_TYPE_F16) {
            return;
        }
        t.type      = GGML_TYPE_F16;
        t.nb[0]     = sizeof(half);
        t.nb[2]     = sizeof(half) * t.ne[0];
        t.nb[1]     = t.nb[2] * t.ne[2];
        t.nb[3]     = t.nb[1] * t.ne[1];
        t.view_src  = nullptr;
        t.view_offs = 0;
    }
};

bool half_supports(int device, const ggml_tensor * op) {
    if (!is_attention(op)) {
        return false;
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

// Decode t, a cache of turbo or another type, to the tensor that HalfAttention made of it.
void decode_half(const ggml_tensor * t, const ggml_tensor & out, cudaStream_t stream) {
    const size_t row    = ggml_row_size(t->type, t->ne[0]);
    const bool   beside = t->nb[2] == row; // the heads of a token lie side by side: rows of all of them
    if (!turbo_is_type(t->type)) {
        const to_fp16_nc_cuda_t convert = ggml_get_to_fp16_nc_cuda(t->type);
        const int64_t size = ggml_type_size(t->type), s1 = t->nb[1] / size, s2 = t->nb[2] / size, s3 = t->nb[3] / size;
        if (beside) {
            convert(t->data, (half *) out.data, t->ne[0] * t->ne[2], t->ne[1], 1, t->ne[3], s1, s1, s3, stream);
        } else { // it writes dense rows in the order of its arguments
            convert(t->data, (half *) out.data, t->ne[0], t->ne[2], t->ne[1], t->ne[3], s2, s1, s3, stream);
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

void attention_by_half(ggml_backend_cuda_context & ctx, ggml_tensor * dst) {
    const ggml_tensor *         q = dst->src[0], *k = dst->src[1], *v = dst->src[2];
    cudaStream_t                stream = ctx.stream();
    ggml_cuda_pool_alloc<half>  k_half(ctx.pool()), v_half(ctx.pool());
    ggml_cuda_pool_alloc<float> q_rotated(ctx.pool());
    HalfAttention               halves(dst);
    if (k->type != GGML_TYPE_F16) {
        halves.k.data = k_half.alloc(ggml_nelements(k));
        decode_half(k, halves.k, stream);
    }
    if (halves.shared) {
        halves.v.data = halves.k.data;
    } else if (v->type != GGML_TYPE_F16) {
        halves.v.data = v_half.alloc(ggml_nelements(v));
        decode_half(v, halves.v, stream);
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

} // namespace

bool turbo_cuda_supports_op(int device, const ggml_tensor * op) {
    if (ggml_op_is_empty(op->op)) {
        return true;
    }
    if (!is_covered(op)) {
        return false;
    }
    switch (op->op) {
        case GGML_OP_DUP:
        case GGML_OP_CONT:
        case GGML_OP_CPY:
            if (op->src[0]->type == op->type) {
                return ggml_is_contiguous(op->src[0]) && ggml_is_contiguous(op); // bytes
            }
            return is_copy(op->src[0], op);
        case GGML_OP_SET_ROWS: return is_set_rows(op);
        case GGML_OP_GET_ROWS: return is_get_rows(op);
        case GGML_OP_FLASH_ATTN_EXT: {
            int before = 0;
            if (!has_turbo(op) || cudaGetDevice(&before) != cudaSuccess) {
                return false;
            }
            ggml_cuda_set_device(device);
            tq::Attention     a;
            tq::AttentionPlan plan;
            const bool        supported = half_supports(device, op) || plan_decode(op, a, plan);
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
    GGML_ASSERT(is_set_rows(dst));
    CUDA_CHECK(tq::encode_rows(store_of(dst), ctx.stream()));
    return true;
}

int turbo_cuda_try_fuse(ggml_backend_cuda_context & ctx, const ggml_cgraph * graph, int at) {
    const ggml_tensor * first = graph->nodes[at];
    // with several streams, what the second stores may not be there yet
    if (first->op != GGML_OP_SET_ROWS || !turbo_is_type(first->type) || ctx.curr_stream_no != 0) {
        return 0;
    }
    for (int i = at + 1; i < graph->n_nodes; ++i) {
        const ggml_tensor * second = graph->nodes[i];
        if (ggml_op_is_empty(second->op)) {
            continue;
        }
        if (second->op != GGML_OP_SET_ROWS || !turbo_is_type(second->type) ||
            ggml_blck_size(second->type) != ggml_blck_size(first->type) ||
            !(second->flags & GGML_TENSOR_FLAG_COMPUTE) || overlap(first, second)) {
            return 0;
        }
        GGML_ASSERT(is_set_rows(first) && is_set_rows(second));
        CUDA_CHECK(tq::encode_rows(store_of(first), store_of(second), ctx.stream()));
        return i - at;
    }
    return 0;
}

bool turbo_cuda_get_rows(ggml_backend_cuda_context & ctx, ggml_tensor * dst) {
    if (!turbo_is_type(dst->src[0]->type)) {
        return false;
    }
    GGML_ASSERT(is_get_rows(dst));
    CUDA_CHECK(tq::decode_rows(to_tq(dst->src[0]->type), rows_of(dst->src[0]), rows_of(dst), dst->ne,
                               index_of(dst->src[1]), false, false, ctx.stream()));
    return true;
}

bool turbo_cuda_cpy(ggml_backend_cuda_context & ctx, const ggml_tensor * src, ggml_tensor * dst) {
    if (src->type == dst->type || (!turbo_is_type(src->type) && !turbo_is_type(dst->type))) {
        return false;
    }
    GGML_ASSERT(is_copy(src, dst));
    if (turbo_is_type(dst->type)) {
        CUDA_CHECK(tq::encode_rows(store_of(src, dst, no_index), ctx.stream()));
    } else {
        CUDA_CHECK(tq::decode_rows(to_tq(src->type), rows_of(src), rows_of(dst), src->ne, no_index,
                                   dst->type == GGML_TYPE_F16, false, ctx.stream()));
    }
    return true;
}

bool turbo_cuda_flash_attn_ext(ggml_backend_cuda_context & ctx, ggml_tensor * dst) {
    if (!has_turbo(dst)) {
        return false;
    }
    tq::Attention     a;
    tq::AttentionPlan plan;
    if (plan_decode(dst, a, plan)) {
        ggml_cuda_pool_alloc<char> workspace(ctx.pool(), plan.workspace_bytes);
        CUDA_CHECK(tq::attention(a, plan, workspace.get(), ctx.stream()));
    } else {
        attention_by_half(ctx, dst);
    }
    return true;
}
