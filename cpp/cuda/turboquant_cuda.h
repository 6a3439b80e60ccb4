// The CUDA kernels' host interface: raw device pointers and a stream, no ggml. Strides are in bytes. The functions
// that return an error only launch: it is the launch's, or cudaErrorNotSupported for a type, shape or device that the
// kernels do not cover (nothing was launched then). All memory is the caller's.
#ifndef TURBOQUANT_CUDA_H
#define TURBOQUANT_CUDA_H

#include "turboquant.h"

#include <cuda_runtime_api.h>

#include <cstddef>
#include <cstdint>

namespace turboquant {
namespace cuda {

// Rows of ne[0] values at data + i1 * nb[0] + i2 * nb[1] + i3 * nb[2]; the values of a row follow each other.
struct Rows {
    void * data;
    int64_t nb[3];
};

// Which rows of the other side a row goes to (encode) or comes from (decode): the element (i1, i2 mod ne[1], i3 mod
// ne[2]) of a tensor of int32 or int64. data = nullptr: row i1.
struct Index {
    const void * data;
    bool is64;
    int64_t ne[3], nb[3];
};

// Float32 rows of ne[0] values to encode; ne[1..3] count the rows of src.
struct Store {
    tq_type type;
    Rows src, dst;
    int64_t ne[4];
    Index index;
};

// Whether encode_rows and decode_rows cover the type.
bool codec_supports(tq_type type);

// Encode: the bytes are those of tq_encode. Two stores, of K and of V, take one launch if their types' blocks have
// the same length; else cudaErrorNotSupported.
cudaError_t encode_rows(const Store & store, cudaStream_t stream);
cudaError_t encode_rows(const Store & first, const Store & second, cudaStream_t stream);

// Decode to float32, or to binary16 if half; ne[1..3] count the rows of dst. The floats are those of tq_decode, or of
// tq_decode_rotated if rotated. With an index, row (i1, i2, i3) of dst is row (index, i2, i3) of src.
cudaError_t decode_rows(tq_type type, const Rows & src, const Rows & dst, const int64_t ne[4], const Index & index,
                        bool half, bool rotated, cudaStream_t stream);

// The transform of a block's length and its inverse, per block: floats of tq_rotate and tq_unrotate. src and
// dst may be the same.
cudaError_t rotate_rows(int block, bool inverse, const Rows & src, const Rows & dst, const int64_t ne[4],
                        cudaStream_t stream);

// ---- attention of a few query tokens over a long cache

// X(name): the types of rows, which are the families of turboquant_formats.h, in blocks of min(head, 128), and ggml's.
#define TURBOQUANT_KV(X) TURBOQUANT_FAMILIES(TURBOQUANT_KV_FAMILY, X) X(q8_0) X(f16)
#define TURBOQUANT_KV_FAMILY(X, ID, name, family, bits, id) X(name)
enum class KV {
#define TURBOQUANT_ENUMERATOR(name) name,
    TURBOQUANT_KV(TURBOQUANT_ENUMERATOR)
#undef TURBOQUANT_ENUMERATOR
};

// X(head): values in a row.
#define TURBOQUANT_KV_HEADS(X) X(64) X(128) X(256)

// The kernels' name for a tq_type or TQ_ROW_... in rows of that head; false if they do not take it.
bool kv_of_type(int type, int head, KV & kv);

// Rows of an exact window, which attention reads besides those of the cache: slots, and the call's own rows of K and V. A
// mask row has their columns, first the slots'.
struct ExactRows {
    KV type;       // of the slots: q8_0 or f16
    int64_t slots; // of a stream
    const void * k;
    int64_t k_row, k_head, k_stream;
    const void * v;
    int64_t v_row, v_head, v_stream;
    const float * batch_k; // [kv_streams][tokens of a stream][kv_heads][head] by strides
    int64_t batch_k_row, batch_k_head, batch_k_stream;
    const float * batch_v;
    int64_t batch_v_row, batch_v_head, batch_v_stream;
    const void * mask; // binary16 [..][tokens][slots + tokens]
    int64_t mask_token, mask_head, mask_stream;
    int mask_heads, mask_streams; // broadcast
    // After all reads, row i of the batch (of all KV streams) is stored in row store_rows[i] of store_k and of store_v, whose
    // strides are those of the slots. nullptr: the batch is not stored.
    const int64_t * store_rows;
    void *store_k, *store_v;
};

// A row that the mask hides from a query does not count for it, whatever the row's bytes are. One exception: where V is
// f16, a value that is not finite reaches every query that sees one of the 32 rows which are computed together, because
// the tensor cores multiply hidden values by zero.
struct Attention {
    KV type_k, type_v;
    int head;            // of K and of V: one of TURBOQUANT_KV_HEADS
    int heads, kv_heads; // heads is a multiple of kv_heads
    int tokens, streams; // of the queries
    int kv_streams;      // divides streams
    int64_t n_kv;        // KV rows
    const float * q;     // [streams][heads][tokens][head] by strides
    int64_t q_token, q_head, q_stream;
    const void * k;
    int64_t k_row, k_head, k_stream;
    const void * v;
    int64_t v_row, v_head, v_stream;
    const void * mask; // binary16 [..][tokens][n_kv], or nullptr
    int64_t mask_token, mask_head, mask_stream;
    int mask_heads, mask_streams;    // broadcast
    const float * sinks;             // [heads], or nullptr
    float scale, max_bias, soft_cap; // soft_cap 0 = none
    float sparse_v; // tiles of V whose weights are all at most this, relative to the largest, are left out
    float * dst;    // [streams][tokens][heads][head], dense
    bool windowed;  // `exact` is there
    ExactRows exact;
};

// How a call is cut into thread blocks, and what it needs: made once per call and passed on.
struct AttentionPlan {
    int device;             // that was current
    size_t workspace_bytes; // of device memory, aligned to 16
    size_t states_at;       // of these, behind the partial results
    int group;              // query heads of a KV head
    int columns;            // group * tokens
    int column_tile;        // 4 or 8: columns of a thread block
    int column_tiles;
    int block_heads;      // KV heads of a thread block
    int head_groups;      // thread blocks beside each other
    int row_tiles;        // warps beside each other on the rows of a head
    int stages;           // of the pipeline
    int pitch_k, pitch_v; // bytes of a row in shared memory
    int chunks;           // runs of KV rows
    int64_t chunk_rows;   // a multiple of row_tiles times a warp's rows
    int parts;            // partial results of a query row: chunks * row_tiles, then those of an exact window
    int exact_parts;
    bool merged;          // they are merged by a kernel of their own, else by the thread block that had all rows
    int shared_bytes;
};

// False if attention() does not cover the call on the current device.
bool plan_attention(const Attention & a, AttentionPlan & plan);

// With the plan that was made of the same call for the device that is current.
cudaError_t attention(const Attention & a, const AttentionPlan & plan, void * workspace, cudaStream_t stream);

} // namespace cuda
} // namespace turboquant

#endif
