// turbo-ops.h: which ops of a graph use the types, and a description of attention over them: shapes, masks, ALiBi,
// sinks, streams, types. The glue of every backend uses it. The header is C++; the functions are exported from
// ggml-base.
#pragma once

#include "ggml/turbo-types.h"

#include <cstddef>
#include <cstdint>

// ---- ops -----------------------------------------------------------------------------------------------------------

enum class turbo_op {
    untouched, // neither the op nor a source has a turbo type
    view,      // computes nothing
    bytes,     // a copy from a type to itself
    encode,    // a copy of src[0], which has no stored type, to a stored type
    decode,    // a copy of src[0], which has a stored type, to another type
    store,     // SET_ROWS into a stored type
    load,      // GET_ROWS from a stored type
    multiply,  // MUL_MAT or MUL_MAT_ID with weights of a stored type
    attention, // FLASH_ATTN_EXT; turbo_describe_attention checks whether turbo kernels may compute it
    other,     // any other op on the types
};

// How op uses the types. A backend supports the kinds for which it has kernels, within the limits of its kernels.
GGML_API turbo_op turbo_op_kind(const ggml_tensor * op);

// True if the values of a row are contiguous.
inline bool turbo_whole_rows(const ggml_tensor * t) {
    return t->nb[0] == ggml_type_size(t->type);
}

// The copies that the kernels of GPUs cover: rows of float32 are encoded, and rows are decoded to float32 or float16.

inline bool turbo_encodes_rows(const ggml_tensor * src, const ggml_tensor * dst) {
    return src->type == GGML_TYPE_F32 && turbo_whole_rows(src) && turbo_whole_rows(dst);
}

inline bool turbo_copies_rows(const ggml_tensor * src, const ggml_tensor * dst) {
    if (!ggml_are_same_shape(src, dst)) {
        return false;
    }
    return turbo_is_type(dst->type) ? turbo_encodes_rows(src, dst) :
                                      (dst->type == GGML_TYPE_F32 || dst->type == GGML_TYPE_F16) &&
                                          turbo_whole_rows(src) && turbo_whole_rows(dst);
}

inline bool turbo_sets_rows(const ggml_tensor * op) {
    return turbo_encodes_rows(op->src[0], op) &&
           (op->src[1]->type == GGML_TYPE_I64 || op->src[1]->type == GGML_TYPE_I32);
}

inline bool turbo_gets_rows(const ggml_tensor * op) {
    return op->type == GGML_TYPE_F32 && op->src[1]->type == GGML_TYPE_I32 && turbo_whole_rows(op->src[0]) &&
           turbo_whole_rows(op) && op->src[1]->ne[3] == 1;
}

// ---- attention -----------------------------------------------------------------------------------------------------

// The rows of an operand. A row begins at data + row * row_bytes + head * head_bytes + stream * stream_bytes.
struct turbo_rows {
    const char * data;
    int64_t      row_bytes, head_bytes, stream_bytes;

    const char * at(int64_t row, int64_t head, int64_t stream) const {
        return data + row * row_bytes + head * head_bytes + stream * stream_bytes;
    }
};

// Rows of K and V that attention reads, and their mask.
struct turbo_source {
    ggml_type  type_k, type_v;
    int64_t    n_kv;                   // rows of K and V of a KV stream
    turbo_rows k, v;                   // rows (KV row, KV head, KV stream)
    bool       masked;
    turbo_rows mask;                   // float16 rows (token, head, stream) of n_kv values; see mask_row
    int64_t    mask_heads, mask_streams;

    // The mask row of a query, or null without a mask. Heads and streams share masks if there are fewer masks.
    const ggml_fp16_t * mask_row(int64_t token, int64_t head, int64_t stream) const {
        return masked ? (const ggml_fp16_t *) mask.at(token, head % mask_heads, stream % mask_streams) : nullptr;
    }
};

// The sources of FLASH_ATTN_EXT with an exact window, after the five that ggml knows:
//   slots K, V   q8_0 or f16 [head, slots, KV heads, KV streams]
//   exact mask   float16 [slots + tokens, tokens + 2, mask heads, mask streams], with the columns of the slots first. The
//                mask of the cache hides the rows of which the exact rows are copies. The last two rows of each stream
//                have, for each column, 1 + the number of this row, or 0: the lower and the upper 16 bits
//   batch K, V   float32 [head, tokens, KV heads, KV streams]: the batch's own rows
enum { TURBO_CELL_ROWS = 2 };
enum { TURBO_SRC_SLOTS_K = 5, TURBO_SRC_SLOTS_V, TURBO_SRC_EXACT_MASK, TURBO_SRC_BATCH_K, TURBO_SRC_BATCH_V };

// Of op_params of an op with an exact window, which are set before each batch:
//   SHOWS_BATCH  whether it sees the batch's own rows in the window alone: then the mask of the cache hides them, and it
//                may be computed before they are stored there
//   REQUESTS     the number of sequences in the batch, if they share a KV stream; else 1
enum { TURBO_PARAM_REQUESTS = 14, TURBO_PARAM_SHOWS_BATCH = 15 };
inline bool turbo_shows_batch(const ggml_tensor * op) {
    return op->op == GGML_OP_FLASH_ATTN_EXT && op->src[TURBO_SRC_EXACT_MASK] && op->op_params[TURBO_PARAM_SHOWS_BATCH];
}

// The mask of attention over a cache with turbo types, an input of the graph, is marked in its op_params, so that
// ggml's scheduler can tell such a graph from others.
enum { TURBO_PARAM_OF_CACHE = 0 };
inline void turbo_mark_mask(ggml_tensor * mask) { mask->op_params[TURBO_PARAM_OF_CACHE] = GGML_TYPE_TURBO4; }
inline bool turbo_is_mask_of_cache(const ggml_tensor * t) {
    return t->op == GGML_OP_NONE && t->op_params[TURBO_PARAM_OF_CACHE] == GGML_TYPE_TURBO4;
}

// FLASH_ATTN_EXT over a cache with a turbo type; the base describes the cache. Pointers may be dereferenced only if the
// tensors have memory.
struct turbo_attention : turbo_source {
    int64_t    head_k, head_v;         // values of a head
    int64_t    heads, kv_heads, group; // query heads, KV heads, query heads of a KV head
    int64_t    tokens, streams;        // of the queries
    int64_t    kv_streams;             // divides streams; see kv_stream
    bool       windowed;               // whether there is an exact window; otherwise slots and batch are empty
    int32_t    requests;               // sequences whose tokens share a KV stream, if known; else 1
    turbo_source slots;                // the window's slots, q8_0 or f16
    turbo_source batch;                // the batch's own rows, float32
    turbo_rows q;                      // float32 rows (token, query head, stream)
    const float * sinks;               // one for each query head, or null
    float *    out;                    // float32 [stream][token][query head][head_v] without gaps
    float      scale, max_bias, soft_cap; // max_bias > 0: ALiBi; soft_cap 0 = none

    // The KV stream of a stream of queries.
    int64_t kv_stream(int64_t stream) const { return stream / (streams / kv_streams); }

    // The values of a query row.
    const float * query(int64_t token, int64_t head, int64_t stream) const {
        return (const float *) q.at(token, head, stream);
    }

    // The output row of a query.
    float * result(int64_t token, int64_t head, int64_t stream) const {
        return out + ((stream * tokens + token) * heads + head) * head_v;
    }
};

// Describes op. False if op is not attention over a turbo type, if it has operands, element types or shapes that the
// description does not cover, or if the values of a row are not contiguous.
GGML_API bool turbo_describe_attention(const ggml_tensor * op, turbo_attention & attention);

// The factor of the mask of a query head: its ALiBi slope, or 1 without ALiBi.
GGML_API float turbo_mask_slope(const turbo_attention & attention, int64_t head);
