// The arguments of the kernels, for the host and for the kernels. Strides are in bytes.
#ifndef TURBOQUANT_METAL_ARGUMENTS_H
#define TURBOQUANT_METAL_ARGUMENTS_H

#ifndef __METAL_VERSION__
#include <cstdint>
#endif

namespace turboquant {

// The numbers of the function constants.
enum { constant_type = 0, constant_type_k = 1, constant_type_v = 2 };

enum { simdgroups = 4 }; // of a threadgroup, in all kernels

// Rows of `blocks` blocks, ne[0] * ne[1] * ne[2] of them. A kernel of codec.metal reads row (i1, i2, i3) of the source and
// writes it to the destination; `index` names i1 of the encoded side.
struct CodecArguments {
    int64_t blocks;
    int64_t ne[3], src_nb[3], dst_nb[3];
    int64_t index_ne[2], index_nb[3]; // elements (i1, i2 mod index_ne[0], i3 mod index_ne[1])
    int32_t index_bytes;              // of an element: 8, 4, or 0 without an index
    int32_t half_floats;              // the destination of `decode` has binary16 values
};

enum { nothing_indexed = 0 };

// Rows of one source of K and V: a cache, the slots of an exact window, or the rows of a batch.
struct AttentionArguments {
    int64_t q_token, q_head, q_stream;
    int64_t k_row, k_head, k_stream;
    int64_t v_row, v_head, v_stream;
    int64_t mask_token, mask_head, mask_stream;
    int32_t masked, mask_heads, mask_streams;
    int32_t tokens, heads, kv_heads, group; // group: query heads of a KV head
    int32_t streams, kv_streams;
    int32_t n_kv;
    int32_t columns, padded_columns; // of a KV head: group * tokens, and the next multiple of a threadgroup's columns
    int32_t chunks, chunk_rows;      // runs of rows, each of which is a part of the result
    int32_t first_part, parts;       // the number of the first run among the parts of all sources
    float scale, soft_cap, sparse_v;
    float slope0, slope1; // ALiBi: the bases of the slopes of heads before slope_heads, and of the other heads
    int32_t slope_heads;  // 0 without ALiBi
};

struct MergeArguments {
    int32_t tokens, heads, group;
    int32_t kv_heads, padded_columns;
    int32_t parts, rotated_parts; // the first `rotated_parts` parts are sums of rotated rows
    int32_t block;                // of the rotation
    int32_t has_sinks;
};

} // namespace turboquant

#endif
