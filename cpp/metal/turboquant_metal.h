// The host interface of the Metal kernels. It describes dispatches, and depends neither on Objective-C nor on ggml: an
// Encoder of the host makes the pipelines and encodes the dispatches.
//
// Conventions
//  - Strides are in bytes. Addresses and strides of rows are multiples of 4 bytes for float32, and of 2 bytes for
//  encoded
//    blocks, q8_0 and binary16.
//  - A function that returns a bool encodes dispatches, or returns false, and encodes nothing, if the kernels do not
//  cover
//    the call.
//  - Every function is thread-safe.
#ifndef TURBOQUANT_METAL_H
#define TURBOQUANT_METAL_H

#include "turboquant.h"

#include <cstddef>
#include <cstdint>
#include <utility>
#include <vector>

namespace turboquant {
namespace metal {

// A place in a buffer of the device.
struct Buffer {
    void * object; // the host's; nullptr: none
    size_t offset;
};

struct Dispatch {
    const char * kernel;
    std::vector<std::pair<int, int>> constants; // of the pipeline: number and value
    const void * arguments;                     // buffer 0
    size_t argument_bytes;
    std::vector<Buffer> buffers;                // from 1 on
    size_t threadgroup_bytes;                   // threadgroup memory 0; a multiple of 16
    int groups[3];
    int threads;                                // of a threadgroup
};

class Encoder {
public:
    virtual ~Encoder() = default;
    virtual void dispatch(const Dispatch & dispatch) = 0;
    // Dispatches that follow see what those before have written.
    virtual void barrier() = 0;
};

// The source of all kernels, as one text.
extern const char * const library_source;

// ---- rows

// Rows of contiguous values. Row (i1, i2, i3) begins at data + i1 * nb[0] + i2 * nb[1] + i3 * nb[2].
struct Rows {
    Buffer data;
    int64_t nb[3];
};

// The rows of the encoded side: row i1 is encoded to, or decoded from, the row that element (i1, i2 mod ne[1], i3 mod
// ne[2]) of a tensor names; i2 and i3 are the same on both sides. The elements are not checked.
struct Index {
    Buffer data;          // no object: row i1
    bool is64;            // whether the elements are int64, else int32
    int64_t ne[3], nb[3]; // shape and strides of the tensor
};

// Encodes rows of float32 to the bytes of tq_encode. ne[0] is the number of values in a row, a multiple of the type's
// block; ne[1..3] count the rows of src, and the index selects rows of dst.
bool encode_rows(tq_type type, const Rows & src, const Rows & dst, const int64_t ne[4], const Index & index,
                 Encoder & encoder);

// Decodes rows to the floats of tq_decode, in float32 or, if `half_floats`, in binary16. ne counts the values and the
// rows of dst; the index selects rows of src.
bool decode_rows(tq_type type, const Rows & src, const Rows & dst, const int64_t ne[4], const Index & index,
                 bool half_floats, Encoder & encoder);

// ---- attention

// Rows of K and V that attention reads, and their mask.
struct Source {
    int type_k, type_v; // tq_type, TQ_ROW_F16, TQ_ROW_Q8_0 or TQ_ROW_F32
    int64_t n_kv;       // rows of a KV stream, less than 2^31
    Buffer k;           // [kv_streams][n_kv][kv_heads] rows of a head
    int64_t k_row, k_head, k_stream;
    Buffer v; // as k
    int64_t v_row, v_head, v_stream;
    Buffer mask; // binary16 [mask_streams][mask_heads][tokens][n_kv], added to the scores; or no object
    int64_t mask_token, mask_head, mask_stream;
    int mask_heads, mask_streams; // head h and stream s have the mask of h % mask_heads and s % mask_streams
};

// A call: softmax(scale * Q K^T [soft cap] + slope * mask) V for every query, over the rows of all sources. A query
// that sees no row gets zeros. A row that the mask hides (-inf) from a query does not affect it, whatever bytes the row
// has. If a row of V that has no turbo type has a value that is not finite, all values of the queries that see it are
// NaN.
struct Attention {
    std::vector<Source> sources; // the cache, whose K or V is turbo; then others, none of which is turbo
    int head;                    // values in a head of K and of V
    int heads, kv_heads;         // query heads and KV heads; heads is a multiple of kv_heads (GQA)
    int tokens, streams;         // of the queries
    int kv_streams;              // divides streams; consecutive streams share a KV stream
    Buffer q;                    // float32 [streams][heads][tokens][head]
    int64_t q_token, q_head, q_stream;
    Buffer sinks; // float32 [heads], scores that count in the softmax without a row of V; or no object
    float scale, max_bias, soft_cap; // max_bias > 0: ALiBi, else slope = 1; soft_cap 0 = none
    float sparse_v; // V of a tile of rows is left out of the sum (but counts in the softmax) if its weights, relative
                    // to the largest so far, are at most this for all queries that are computed together
    Buffer dst;       // float32 [streams][tokens][heads][head] without gaps
    Buffer workspace; // workspace_bytes(), aligned to 16 bytes
};

// Whether attention() covers the call; buffers need no objects, except that one tells whether there is a mask.
bool covers(const Attention & a);
// Memory that a call which is covered needs. It depends on shapes and types only.
size_t workspace_bytes(const Attention & a);
bool attention(const Attention & a, Encoder & encoder);

} // namespace metal
} // namespace turboquant

#endif
