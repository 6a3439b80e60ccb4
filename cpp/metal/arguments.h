// The arguments of the kernels, for the host and for the kernels. Strides are in bytes.
#ifndef TURBOQUANT_METAL_ARGUMENTS_H
#define TURBOQUANT_METAL_ARGUMENTS_H

#ifdef __METAL_VERSION__
#include "language.h"
#else
#include <cstdint>
#endif

namespace turboquant {

// The numbers of the function constants.
enum { constant_type = 0, constant_type_k = 1, constant_type_v = 2 };

enum { simdgroups = 4 }; // of a threadgroup, in all kernels

// The numbers of row types besides those of tq_type.
enum { row_f16 = 64, row_q8_0 = 66, row_f32 = 68 };

// Rows of `blocks` blocks, ne[0] * ne[1] * ne[2] of them. A kernel of codec.metal reads row (i1, i2, i3) of the source
// and writes it to the destination; `index` names i1 of the encoded side.
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
    int32_t blocks;                  // see memory_offset
    int32_t chunks, chunk_rows;      // runs of rows, each of which is a part of the result
    int32_t first_part, parts;       // the number of the first run among the parts of all sources
    float scale, soft_cap, sparse_v;
    float slope0, slope1; // ALiBi: the bases of the slopes of heads before slope_heads, and of the other heads
    int32_t slope_heads;  // 0 without ALiBi
};

struct MergeArguments {
    int32_t rows; // of the result
    int32_t tokens, heads, group, kv_heads, padded_columns;
    int32_t parts, rotated_parts; // the first `rotated_parts` parts are sums of rotated rows
    int32_t block;                // of the rotation
    int32_t has_sinks;
};

// ---- the threadgroup memory of attention

// Rows of K and V that a threadgroup computes at a time.
inline int tile_rows(int head) { return head > 128 ? 16 : 32; }
// Values from one row of the tile to the next.
inline int tile_pitch(int head) { return head + 8; }

enum { most_blocks = 4 }; // with scales of their own in a row of K or V
enum {
    memory_queries,  // float [columns][head]
    memory_tile,     // half [rows][pitch] of K, then of V
    memory_masks,    // binary16 [2][columns][rows]
    memory_factors,  // float [columns]: of the sums so far
    memory_flags,    // uint [2][simdgroups]: whether V is needed, and its rows that are not finite
    memory_scratch,  // float [simdgroups][8][8]
    memory_tables,   // half [2][32]: the codebooks of K and V
    memory_scales,   // float [2][blocks][rows] of K and V
    memory_products, // float [blocks][columns][rows]: products of queries and keys, then weights
    memory_end
};

// The offset of a part of the memory; `blocks` is the number of scales in a row of K or V, whichever is greater.
inline int memory_offset(int part, int head, int columns, int blocks) {
    const int rows = tile_rows(head);
    const int bytes[memory_end] = {4 * columns * head,
                                   2 * rows * tile_pitch(head),
                                   2 * 2 * columns * rows,
                                   4 * columns,
                                   4 * 2 * simdgroups,
                                   4 * simdgroups * 64,
                                   2 * 2 * 32,
                                   4 * 2 * blocks * rows,
                                   4 * blocks * columns * rows};
    int offset = 0;
    for (int i = 0; i < part; ++i) offset += bytes[i];
    return offset;
}

} // namespace turboquant

#endif
