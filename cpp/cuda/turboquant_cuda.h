// The host interface of the CUDA kernels. It takes raw device pointers and a stream, and does not depend on ggml.
//
// Conventions
//  - The caller owns all memory. Pointers to data are device pointers, and strides are in bytes.
//  - A function that returns a cudaError_t launches kernels on the current device and does not wait for them. It
//    returns the error of a launch, or cudaErrorNotSupported, without a launch, if the kernels do not cover the call.
//  - Addresses and strides of rows are multiples of 4 bytes for float32, and of 2 bytes for encoded blocks, q8_0 and
//    binary16, unless stated otherwise.
//  - Every function is thread-safe.
#ifndef TURBOQUANT_CUDA_H
#define TURBOQUANT_CUDA_H

#include "turboquant.h"

#include <cuda_runtime_api.h>

#include <array>
#include <cstddef>
#include <cstdint>

namespace turboquant {
namespace cuda {

// Rows of contiguous values. Row (i1, i2, i3) begins at data + i1 * nb[0] + i2 * nb[1] + i3 * nb[2].
struct Rows {
    void * data;
    int64_t nb[3];
};

// The rows of the other side: row i1 is encoded to, or decoded from, the row that element (i1, i2 mod ne[1], i3 mod
// ne[2]) of a tensor names; i2 and i3 are the same on both sides. The elements are not checked.
struct Index {
    const void * data;    // nullptr: row i1
    bool is64;            // whether the elements are int64, else int32
    int64_t ne[3], nb[3]; // shape and strides of the tensor
};

// A call of the encoder.
struct Store {
    tq_type type;  // of dst
    Rows src, dst; // float32 rows, and their blocks
    int64_t ne[4]; // ne[0] values in a row, a multiple of the type's block; ne[1..3] count the rows of src
    Index index;   // selects rows of dst
};

// Whether encode_rows and decode_rows support the type.
bool codec_supports(tq_type type);

// Encodes rows to the bytes of tq_encode. Two stores, for example of K and of V, take one launch and must not overlap.
// The result is cudaErrorNotSupported if a type has no kernels, if ne[0] is no multiple of its block, if the types of
// the two stores have different blocks, or if ne[1] rows have 2^32 blocks or more.
cudaError_t encode_rows(const Store & store, cudaStream_t stream);
cudaError_t encode_rows(const Store & first, const Store & second, cudaStream_t stream);

// Decodes rows to the floats of tq_decode, or of tq_decode_rotated if `rotated`. dst has float32 rows, aligned to 16
// bytes, or binary16 rows if `half`, aligned to 8 bytes. ne[0] is the number of values in a row, and ne[1..3] count the
// rows of dst; the index selects rows of src. The result is cudaErrorNotSupported if the type has no kernels or ne[0]
// is no multiple of its block.
cudaError_t decode_rows(tq_type type, const Rows & src, const Rows & dst, const int64_t ne[4], const Index & index,
                        bool half, bool rotated, cudaStream_t stream);

// Rotates the blocks of float32 rows, or applies the inverse, with the floats of tq_rotate and tq_unrotate. block is
// 128, 64 or 32. ne[0] is the number of values in a row, and ne[1..3] count the rows. src and dst may be the same rows.
// The result is cudaErrorNotSupported if there is no such block or ne[0] is no multiple of it.
cudaError_t rotate_rows(int block, bool inverse, const Rows & src, const Rows & dst, const int64_t ne[4],
                        cudaStream_t stream);

// ---- rotary position embeddings

// The angles of pairs of values: pair i of a token turns by position * base^i / factors[i], which YaRN changes.
struct RopeAngles {
    int64_t tokens;
    const int32_t * positions; // [tokens]; memory that no kernel writes
    const float * factors;     // [values / 2], memory that no kernel writes, or nullptr
    int first, values;         // the values of a head that turn; the others are copied
    bool adjacent;             // whether pairs are adjacent values, else values that are values / 2 apart
    float base;                // the angle of pair 1 at position 1
    float scale;               // of all angles
    float extrapolation;       // weight of the angles that are not scaled, for pairs before those of the ramp; 0 = none
    float ramp[2];             // pairs between which this weight falls to 0
    float magnitude;           // factor of the results
};

// Rows of one side, (head, token), whose `head` values turn. src and dst are the same rows or do not overlap.
struct Rope {
    Rows src, dst; // float32
    int head, heads;
};

// Whether rope() covers the angles: up to 256 values, in pairs.
bool rope_supports(const RopeAngles & angles);

// Turns the rows of two sides, for example queries and keys. The result is cudaErrorNotSupported if the angles are not
// covered.
cudaError_t rope(const Rope & first, const Rope & second, const RopeAngles & angles, cudaStream_t stream);

// ---- the rows of an exact window among those of a cache that was decoded to binary16

// Rows of K or of V of an exact window, with the values of all heads: of each stream first the slots, in q8_0 or
// binary16, then the float32 rows of the batch. nb[0] and nb[2] are the strides of rows and of streams.
struct WindowRows {
    bool half_slots; // binary16, else q8_0
    Rows slots, batch;
    int64_t n_slots, n_batch; // rows of a stream
    int64_t values;           // of a row
    int64_t streams;
};

// For each exact row of a stream, 1 + the row of the cache that it replaces, or 0: the lower and the upper 16 bits lie
// in two rows of words.
struct WindowCells {
    const uint16_t *low, *high; // of the first stream
    int64_t stream;             // stride of streams
};

// Writes each exact row that replaces a row of the cache to this row of dst, as binary16. If rotated, blocks of `block`
// values are transformed as in rotate_rows. The result is cudaErrorNotSupported if `values` is no multiple of `block`,
// or if there is no such block.
cudaError_t window_to_half(const WindowRows & window, const WindowCells & cells, int block, bool rotated,
                           const Rows & dst, cudaStream_t stream);

// Writes the mask of each exact row that replaces a row of the cache to this row's column of `mask`. Both are binary16;
// their rows are those of (token, head, stream), and ne counts the exact rows, tokens, heads and streams.
cudaError_t window_to_mask(const Rows & exact, const WindowCells & cells, const Rows & mask, const int64_t ne[4],
                           cudaStream_t stream);

// Stores the batch's rows of K and of V in the slots' format. Row i of the batch, counted over all streams, is stored
// in row index[i] of k_slots and of v_slots, whose nb[0] is the stride of rows. The result is cudaErrorNotSupported if
// `values` is no multiple of 32.
cudaError_t store_window(const WindowRows & k, const WindowRows & v, const int64_t * index, const Rows & k_slots,
                         const Rows & v_slots, cudaStream_t stream);

// ---- attention over a cache

// X(name): the types of rows of K and V: the families of turboquant_formats.h, in the longest blocks that divide a
// head, and two of ggml's types.
#define TURBOQUANT_KV(X) TURBOQUANT_FAMILIES(TURBOQUANT_KV_FAMILY, X) X(q8_0) X(f16)
#define TURBOQUANT_KV_FAMILY(X, ID, name, family, bits, id) X(name)
enum class KV {
#define TURBOQUANT_ENUMERATOR(name) name,
    TURBOQUANT_KV(TURBOQUANT_ENUMERATOR)
#undef TURBOQUANT_ENUMERATOR
};

// X(head): the numbers of values in a head, and those for which there are kernels for many columns.
#define TURBOQUANT_KV_HEADS(X) X(64) X(96) X(128) X(256)
#define TURBOQUANT_WIDE_HEADS(X) X(64) X(128) X(256)

// Sets kv to the row type of `type`, a tq_type or TQ_ROW_..., in heads of `head` values. False if there are no kernels
// for the type, for its block in such heads, or for the head.
bool kv_of_type(int type, int head, KV & kv);

// The rows of an exact window, which attention reads in addition to the rows of the cache: the window's slots, and the
// rows of K and V of the call's own tokens. The strides are those of rows, KV heads and KV streams. Slots are read
// while the preceding kernel of the stream still runs, so it must not write them.
struct ExactRows {
    KV type;        // of the slots: q8_0 or f16
    int64_t slots;  // of a KV stream
    const void * k; // [kv_streams][slots][kv_heads] rows of a head
    int64_t k_row, k_head, k_stream;
    const void * v; // as k
    int64_t v_row, v_head, v_stream;
    const float * batch_k; // [kv_streams][tokens][kv_heads][head]
    int64_t batch_k_row, batch_k_head, batch_k_stream;
    const float * batch_v; // as batch_k
    int64_t batch_v_row, batch_v_head, batch_v_stream;
    const void * mask; // binary16 [mask_streams][mask_heads][tokens][slots + tokens], as Attention::mask; not nullptr
    int64_t mask_token, mask_head, mask_stream;
    int mask_heads, mask_streams;
    // Row i of the batch, [kv_streams][tokens], is stored in row store_rows[i] of store_k and of store_v after all
    // reads of the slots, whose row and head strides these have. nullptr: the batch is not stored.
    const int64_t * store_rows;
    void *store_k, *store_v;
};

// A call: softmax(scale * Q K^T [soft cap] + slope * mask) V for every query. A query that sees no row gets zeros. The
// shapes name the dimensions of an array; the strides determine its layout.
//
// A row that the mask hides (-inf) from a query does not affect the query, whatever the bytes of the row are. There is
// one exception: if V is f16, tensor cores multiply hidden values by zero. So if a query sees one of the 32 rows of a
// tile, a value in this tile that is not finite may reach all queries that are computed together with this query.
// 32 values, as the blocks of q8_1 by which ggml multiplies weights.
struct QuantizedValues {
    uint16_t scale, sum; // binary16; the sum of the 32 values before rounding
    int8_t values[32];
};
struct Attention {
    KV type_k, type_v;   // at least one of the two is a turbo type; two turbo types are of one family
    int head;            // values in a head of K and of V: one of TURBOQUANT_KV_HEADS
    int heads, kv_heads; // query heads and KV heads; heads is a multiple of kv_heads (GQA)
    int tokens, streams; // of the queries; streams is at most 65535
    int kv_streams;      // divides streams; consecutive streams share a KV stream
    int64_t n_kv;        // KV rows of a KV stream: 1 ... 2^30
    const float * q;     // [streams][heads][tokens][head]
    int64_t q_token, q_head, q_stream;
    const void * k; // [kv_streams][n_kv][kv_heads] rows of a head; f16 is aligned to 4 bytes
    int64_t k_row, k_head, k_stream;
    const void * v; // as k
    int64_t v_row, v_head, v_stream;
    const void * mask; // binary16 [mask_streams][mask_heads][tokens][n_kv], added to the scores, or nullptr
    int64_t mask_token, mask_head, mask_stream;
    int mask_heads, mask_streams;    // head h and stream s have the mask of h % mask_heads and s % mask_streams
    const float * sinks;             // [heads] scores that count in the softmax without a row of V, or nullptr
    float scale, max_bias, soft_cap; // max_bias > 0: ALiBi, else slope = 1; soft_cap 0 = none
    float sparse_v; // V of a tile of 32 rows may be left out of the sum (but counts in the softmax) if its weights,
                    // relative to the largest so far, are at most this for all queries that are computed together
    float * dst;    // [streams][tokens][heads][head] without gaps
    QuantizedValues * quantized; // if not nullptr, `dst` is written here, too, as blocks in the same order. Only plans
                                 // that are `merged` cover it
    int requests;   // sequences whose tokens are computed, if they share a KV stream; 0 or 1 if that is not known. Each
                    // sees rows of its own, so the mask hides most rows from most queries
    bool windowed;  // whether `exact` is read
    ExactRows exact;
};

// The division of a call into thread blocks, and the memory that it needs. A thread block computes some query columns
// (query heads of a KV head, times tokens) of each of some KV heads, over a run of KV rows. There are two kernels: one
// for up to 32 columns, or for any number if each token sees `gathered` rows of its own; and a `wide` one.
struct AttentionPlan {
    int device;             // the current device when the plan was made
    size_t workspace_bytes; // of device memory, aligned to 16 bytes
    size_t notes_bytes;     // of these the last ones, for notes of masks; they are not used if `notes` has memory
    size_t states_at;       // offset of the softmax states in the workspace, behind the partial results
    int group;              // query heads of a KV head
    int columns;            // of a KV head: group * tokens
    int column_tile;        // columns of a thread block: 4 or 8; 16 to 256 if `wide`
    int column_tiles;       // of a KV head
    int block_heads;        // KV heads of a thread block
    int head_groups;        // kv_heads / block_heads
    int row_tiles;          // warps of a KV head, or of a column if `wide`, in a thread block: they take tiles in turn
    int stages;             // of the pipeline that copies rows to shared memory: 2 or 3
    int pitch_k, pitch_v;   // bytes of a row in shared memory
    bool gapless;           // whether a thread block's rows of K are one run of bytes, and those of V too
    bool kept;              // whether integer products are kept over the tiles of a warp, if there are four columns
    int chunks;             // runs of KV rows
    int64_t chunk_rows;     // rows of a run: a multiple of row_tiles * 32, of buffer_rows if `wide`, 32 or 64 if `direct`
    int long_chunks;        // runs of so many rows, unless `wide`; the short ones have row_tiles * 32 rows less
    int short_chunks;
    int parts;              // partial results of a query row: chunks * row_tiles, or chunks if `wide`
    int first_exact;        // the first part with rows of an exact window
    int exact_parts;        // parts with such rows
    int slot_parts;         // further ones: of the slots of an exact window, if a kernel of their own reads them
    bool gathered;          // whether lists name the rows that each token sees, so that only these are read
    bool likely_hidden;     // whether the queries probably see all rows in the exact window, and none in the cache
    bool merged;            // whether a second kernel merges them; else a query has one thread block for all rows
    int shared_bytes;       // dynamic shared memory of a thread block
    // The kernels for which a first one prepares the queries. Their thread blocks have one KV head.
    bool wide;
    bool direct;             // that for a few tokens
    int eights;              // of columns of a thread block, in that for a few tokens on Hopper GPUs, else 0
    bool hopper;             // that for Hopper GPUs
    int cluster;             // thread blocks that share expanded rows, in that for Hopper GPUs
    int operands;            // of 16 columns, of a warp
    bool separate;           // whether each row tile expands rows of its own, else a thread block expands rows together
    int buffer_rows;         // KV rows that are expanded together at a time
    size_t queries_at, factors_at, exact_at, exact_rows_at; // offsets in the workspace
};

// Plans a call on the current device. It reads no device memory, but the plan depends on the alignment of K, V and dst.
// The result is false if attention() does not cover the call: because of the device (compute capability below 8.0), the
// types, shapes or alignment, or because the rows do not fit into shared memory.
bool plan_attention(const Attention & a, AttentionPlan & plan);

// Notes of masks: what attention finds out about its masks before it reads rows. They are the rows that each token
// sees if these are `gathered`, the tiles of rows that each query sees if the plan is `wide`, and nothing in other
// plans. The layers of a model have the same masks, so they can share notes.
struct MaskNotes {
    void * memory; // notes_bytes of the plan, aligned to 16 bytes, or nullptr: the notes are in the workspace
    // Whether the call reads notes and does not write them. The last call that has written to the memory must have had
    // an equal notes_key and the same values in its masks. Both must be in one stream, and each kernel between them must
    // wait for the preceding one before it ends (wait_for_previous), so that the notes are visible.
    bool written;
};

// What the notes of a call depend on, but for the values of the masks: kind and size, and layout of the masks.
using MaskNotesKey = std::array<int64_t, 18>;
MaskNotesKey notes_key(const Attention & a, const AttentionPlan & plan);

// Computes attention with the plan of the same call for the current device. `stores`: nullptr, or two stores, of K and
// of V, that encode_rows takes. They are made beside the call, so `exact` must have the batch, and the rows that they
// write must be hidden from all queries; and the preceding kernel must not write the cache, which is read early, too.
cudaError_t attention(const Attention & a, const AttentionPlan & plan, void * workspace, cudaStream_t stream,
                      const Store * stores = nullptr, MaskNotes notes = {});

} // namespace cuda
} // namespace turboquant

#endif
