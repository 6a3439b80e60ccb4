// turbo-ops.cpp: which ops use the types, and the description of attention. Part of ggml-base.

#include "ggml/turbo-ops.h"

#include <cmath>
#include <cstring>
#include <initializer_list>

namespace {

// True also for the types of prepared queries, which no tensor of a graph should have.
bool is_any_turbo(ggml_type type) {
    switch ((int) type) {
        TURBO_QUERY_TYPES(TURBO_CASE) return true;
        default: return turbo_is_type(type);
    }
}

bool touches(const ggml_tensor * op) {
    bool touched = is_any_turbo(op->type);
    for (const ggml_tensor * src : op->src) {
        touched = touched || (src && is_any_turbo(src->type));
    }
    return touched;
}

turbo_rows rows_of(const ggml_tensor * t) {
    return { (const char *) t->data, (int64_t) t->nb[1], (int64_t) t->nb[2], (int64_t) t->nb[3] };
}

// Describes K, V and their mask, which may be null. False if their shapes differ, if the values of a row are not
// contiguous, or if the mask is not float16.
bool describe_source(const ggml_tensor * k, const ggml_tensor * v, const ggml_tensor * mask, turbo_source & source) {
    if (!turbo_whole_rows(k) || !turbo_whole_rows(v) || k->ne[1] != v->ne[1] || k->ne[2] != v->ne[2] ||
        k->ne[3] != v->ne[3] || (mask && (mask->type != GGML_TYPE_F16 || !turbo_whole_rows(mask)))) {
        return false;
    }
    source.type_k       = k->type;
    source.type_v       = v->type;
    source.n_kv         = k->ne[1];
    source.k            = rows_of(k);
    source.v            = rows_of(v);
    source.masked       = mask != nullptr;
    source.mask         = mask ? rows_of(mask) : turbo_rows{};
    source.mask_heads   = mask ? mask->ne[2] : 1;
    source.mask_streams = mask ? mask->ne[3] : 1;
    return true;
}

// Describes the exact window of an op. False if its sources are incomplete or not those of a window.
bool describe_window(const ggml_tensor * op, turbo_attention & attention) {
    const ggml_tensor *slots_k = op->src[TURBO_SRC_SLOTS_K], *slots_v = op->src[TURBO_SRC_SLOTS_V];
    const ggml_tensor *batch_k = op->src[TURBO_SRC_BATCH_K], *batch_v = op->src[TURBO_SRC_BATCH_V];
    const ggml_tensor *mask = op->src[TURBO_SRC_EXACT_MASK], *k = op->src[1], *v = op->src[2];
    if (!slots_k || !slots_v || !batch_k || !batch_v || !mask ||
        !describe_source(slots_k, slots_v, mask, attention.slots) ||
        !describe_source(batch_k, batch_v, mask, attention.batch)) {
        return false;
    }
    for (const ggml_tensor * t : { slots_k, slots_v, batch_k, batch_v }) {
        const ggml_tensor * cache = t == slots_k || t == batch_k ? k : v;
        if (t->ne[0] != cache->ne[0] || t->ne[2] != cache->ne[2] || t->ne[3] != cache->ne[3]) {
            return false;
        }
    }
    attention.batch.mask.data = (const char *) mask->data + slots_k->ne[1] * sizeof(ggml_fp16_t);
    const auto is_exact = [](ggml_type type) { return type == GGML_TYPE_Q8_0 || type == GGML_TYPE_F16; };
    return is_exact(slots_k->type) && is_exact(slots_v->type) && batch_k->type == GGML_TYPE_F32 &&
           batch_v->type == GGML_TYPE_F32 && mask->ne[0] == slots_k->ne[1] + batch_k->ne[1] &&
           mask->ne[1] == op->src[0]->ne[1] + TURBO_CELL_ROWS;
}

}  // namespace

turbo_op turbo_op_kind(const ggml_tensor * op) {
    if (!touches(op)) {
        return turbo_op::untouched;
    }
    const ggml_tensor * a = op->src[0];
    switch (op->op) {
        case GGML_OP_NONE:
        case GGML_OP_RESHAPE:
        case GGML_OP_VIEW:
        case GGML_OP_PERMUTE:
        case GGML_OP_TRANSPOSE:
            return turbo_op::view;
        case GGML_OP_DUP:
        case GGML_OP_CONT:
        case GGML_OP_CPY:
            return a->type == op->type       ? turbo_op::bytes :
                   turbo_is_type(a->type)    ? turbo_op::decode :
                   turbo_is_type(op->type)   ? turbo_op::encode :
                                               turbo_op::other;
        case GGML_OP_SET_ROWS:
            return turbo_is_type(op->type) && !is_any_turbo(a->type) ? turbo_op::store : turbo_op::other;
        case GGML_OP_GET_ROWS:
            return turbo_is_type(a->type) ? turbo_op::load : turbo_op::other;
        case GGML_OP_MUL_MAT:
        case GGML_OP_MUL_MAT_ID:
            return turbo_is_type(a->type) ? turbo_op::multiply : turbo_op::other;
        case GGML_OP_FLASH_ATTN_EXT:
            return turbo_op::attention;
        default:
            return turbo_op::other;
    }
}

bool turbo_describe_attention(const ggml_tensor * op, turbo_attention & attention) {
    if (op->op != GGML_OP_FLASH_ATTN_EXT) {
        return false;
    }
    const ggml_tensor *q = op->src[0], *k = op->src[1], *v = op->src[2], *mask = op->src[3], *sinks = op->src[4];
    if (!turbo_is_type(k->type) && !turbo_is_type(v->type)) {
        return false;
    }
    attention = {};
    if (q->type != GGML_TYPE_F32 || op->type != GGML_TYPE_F32 || !turbo_whole_rows(q) || q->ne[2] % k->ne[2] != 0 ||
        q->ne[3] % k->ne[3] != 0 || !describe_source(k, v, mask, attention)) {
        return false;
    }
    for (int i = TURBO_SRC_SLOTS_K; i < GGML_MAX_SRC; ++i) {
        attention.windowed = attention.windowed || op->src[i];
    }
    if (attention.windowed && !describe_window(op, attention)) {
        return false; // an unknown operand would be ignored
    }
    attention.requests   = attention.windowed && op->op_params[TURBO_PARAM_REQUESTS] > 1 ?
                               op->op_params[TURBO_PARAM_REQUESTS] : 1;
    attention.head_k     = k->ne[0];
    attention.head_v     = v->ne[0];
    attention.heads      = q->ne[2];
    attention.kv_heads   = k->ne[2];
    attention.group      = q->ne[2] / k->ne[2];
    attention.tokens     = q->ne[1];
    attention.streams    = q->ne[3];
    attention.kv_streams = k->ne[3];
    attention.q          = rows_of(q);
    attention.sinks      = sinks ? (const float *) sinks->data : nullptr;
    attention.out        = (float *) op->data;
    float params[3];
    memcpy(params, op->op_params, sizeof(params));
    attention.scale      = params[0];
    attention.max_bias   = params[1];
    attention.soft_cap   = params[2];
    return true;
}

float turbo_mask_slope(const turbo_attention & attention, int64_t head) {
    if (attention.max_bias <= 0.0f) {
        return 1.0f;
    }
    const int64_t whole = 1ll << (int64_t) floor(log2((double) attention.heads)); // the greatest power of two <= heads
    const float   m0    = powf(2.0f, -attention.max_bias / whole);
    const float   m1    = powf(2.0f, -(attention.max_bias / 2.0f) / whole);
    return head < whole ? powf(m0, head + 1) : powf(m1, 2 * (head - whole) + 1);
}
