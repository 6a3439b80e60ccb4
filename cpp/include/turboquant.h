/*
 * turboquant.h: the whole public interface of the TurboQuant core (C ABI, no dependencies).
 *
 * A row of floats is divided into blocks of 128, 64 or 32 values. Each block is rotated (random signs, Walsh-Hadamard
 * transform, random signs), and every rotated value is replaced by the index of its nearest Lloyd-Max centroid, or by a
 * step of the best path through a trellis; one scale is shared by the block. FORMAT.md specifies the bytes.
 *
 * Conventions
 *  - Every function is thread-safe, allocates no memory unless stated, and never prints, aborts or throws.
 *  - Rows are contiguous; `n` counts values and must be a multiple of the type's block. Pointers need no alignment
 *    beyond their element type (encoded rows: none). Source and destination must not overlap unless stated otherwise.
 *  - All kernels (scalar, avx2, avx512, ...) give the same bytes and the same floats; only the results of tq_dot and
 *    attention differ between kernels, by rounding.
 *  - The functions named *_row are for hosts that have checked their arguments: they check nothing.
 */
#ifndef TURBOQUANT_H
#define TURBOQUANT_H

#include <stddef.h>
#include <stdint.h>

#include "turboquant_formats.h"

#if defined(_WIN32) && defined(TURBOQUANT_SHARED)
#  ifdef TURBOQUANT_BUILD
#    define TURBOQUANT_API __declspec(dllexport)
#  else
#    define TURBOQUANT_API __declspec(dllimport)
#  endif
#elif defined(__GNUC__)
#  define TURBOQUANT_API __attribute__((visibility("default")))
#else
#  define TURBOQUANT_API
#endif

#ifdef __cplusplus
extern "C" {
#endif

#define TURBOQUANT_VERSION "0.1.0"

typedef enum tq_status {
    TQ_OK = 0,
    TQ_ERROR_TYPE,               /* no such tq_type */
    TQ_ERROR_LENGTH,             /* a length is negative, zero where it may not be, or no multiple of the block */
    TQ_ERROR_NULL,               /* a required pointer is null */
    TQ_ERROR_KERNELS_UNKNOWN,    /* there are no kernels of that name */
    TQ_ERROR_KERNELS_UNSUPPORTED,/* known kernels, but this CPU or this build cannot run them */
    TQ_ERROR_MEMORY,             /* scratch memory could not be allocated */
    TQ_ERROR_ARGUMENT            /* any other value out of its range */
} tq_status;

/* One English sentence without a full stop; never null. */
TURBOQUANT_API const char * tq_status_text(tq_status status);

/* ---- types ------------------------------------------------------------------------------------------------- */

/* TQ_TURBO4, TQ_TURBO4_64, TQ_TURBO4_32, TQ_TURBO3, ...: the rows of turboquant_formats.h. */
typedef enum tq_type {
#define TURBOQUANT_ENUMERATOR(ID, name, FIRST, family, bits, block, bytes, id) TQ_##ID,
    TURBOQUANT_TYPES(TURBOQUANT_ENUMERATOR)
#undef TURBOQUANT_ENUMERATOR
    TQ_TYPE_COUNT
} tq_type;

typedef struct tq_type_info {
    const char *   name;        /* "turbo4", "turbo4_64", ... */
    int            bits;        /* bits of one value beside the scale: 4, 3, 2 */
    int            block;       /* values in a block: 128, 64, 32 */
    int            block_bytes; /* bytes of an encoded block */
    int            levels;      /* of the codebook: 1 << bits, and 2 << bits in the trellis-coded types */
    float          step;        /* rotated value = d * step * level */
    const int8_t * codebook;    /* the levels, ascending */
    tq_type        family;      /* the type of the same family with the longest block, whose name has no suffix */
    int            file_id;     /* the type's number in files: GGUF, saved states */
} tq_type_info;

/* The row of the type in the type table, or null if there is no such type. */
TURBOQUANT_API const tq_type_info * tq_type_get(tq_type type);
/* The type of that name, or TQ_TYPE_COUNT if there is none. */
TURBOQUANT_API tq_type tq_type_from_name(const char * name);
/* The type of the same family as `type` with the largest block that divides `head`, or TQ_TYPE_COUNT if none does. */
TURBOQUANT_API tq_type tq_type_for_head(tq_type type, int64_t head);
/* Bytes of a row of n values; 0 if the type or n is invalid. */
TURBOQUANT_API size_t tq_row_bytes(tq_type type, int64_t n);
/* The sign vectors of the rotation, 128 bits each; bit i = 1 means that value i is negated. which: 1 = S1, 2 = S2;
 * null for other values. */
TURBOQUANT_API const uint8_t * tq_signs(int which);

/* ---- encode, decode, rotate -------------------------------------------------------------------------------- */

typedef struct tq_encode_report {
    int64_t nonfinite;  /* blocks with a NaN or an infinity: stored as zeros */
    int64_t saturated;  /* blocks whose scale exceeds fp16's range: stored with the largest finite scale */
} tq_encode_report;

/* Encode `rows` rows of n floats. src_stride: floats between row starts; dst_stride: bytes between row starts.
 * report may be null; otherwise it is overwritten. threads >= 1; more than one starts std::threads. */
TURBOQUANT_API tq_status tq_encode(tq_type type, const float * src, int64_t src_stride, void * dst, size_t dst_stride,
                                   int64_t rows, int64_t n, int threads, tq_encode_report * report);

/* Decode `rows` rows of n floats into the original domain. Safe for untrusted input: any bytes decode (a non-finite
 * stored scale gives non-finite values). */
TURBOQUANT_API tq_status tq_decode(tq_type type, const void * src, size_t src_stride, float * dst, int64_t dst_stride,
                                   int64_t rows, int64_t n, int threads);

/* As tq_decode, but returns the values in the rotated domain: d * step * level, without inverse transform. */
TURBOQUANT_API tq_status tq_decode_rotated(tq_type type, const void * src, size_t src_stride, float * dst,
                                           int64_t dst_stride, int64_t rows, int64_t n, int threads);

/* y = S2 . H/sqrt(block) . S1 . x for every block of `n` contiguous values (orthonormal), and its inverse.
 * block: 128, 64 or 32. dst may equal src. */
TURBOQUANT_API tq_status tq_rotate  (int block, const float * src, float * dst, int64_t n, int threads);
TURBOQUANT_API tq_status tq_unrotate(int block, const float * src, float * dst, int64_t n, int threads);

/* ---- dot products ------------------------------------------------------------------------------------------ */

/* tq_query128, tq_query64, tq_query32: a block of a prepared query row, which is rotated and rounded to int8 with one
 * float scale. The layout is for memory only and never stored. q is in -127 ... 127, as tq_query writes it; tq_dot may
 * be wrong if q contains -128. sum is the sum of q. */
#define TURBOQUANT_QUERY(N) typedef struct tq_query##N { float scale; int32_t sum; int8_t q[N]; } tq_query##N;
TURBOQUANT_BLOCKS(TURBOQUANT_QUERY)
#undef TURBOQUANT_QUERY

/* Bytes of a prepared query row of n values for block 128, 64 or 32; 0 if invalid. */
TURBOQUANT_API size_t tq_query_bytes(int block, int64_t n);
/* Prepare a query row. A block with a non-finite value gets the scale NaN, so that its dot products are NaN. */
TURBOQUANT_API tq_status tq_query(int block, const float * src, void * dst, int64_t n);
/* out[r] = <query, row r> for `rows` encoded rows of n values. */
TURBOQUANT_API tq_status tq_dot(tq_type type, const void * src, size_t src_stride, const void * query, float * out,
                                int64_t rows, int64_t n);

/* ---- attention --------------------------------------------------------------------------------------------- */

/* Row types besides the tq_types that K or V may have: ggml's f16, bf16, q8_0, q4_0 and f32. */
enum {
#define TURBOQUANT_ENUMERATOR(ID, name, type, block, bytes) TQ_ROW_##ID = type,
    TURBOQUANT_ROW_TYPES(TURBOQUANT_ENUMERATOR)
#undef TURBOQUANT_ENUMERATOR
};

typedef struct tq_row_info {
    const char * name;        /* "turbo4", "f16", ... */
    int          block;       /* values in a block; rows of floats are multiples of 32 */
    int          block_bytes; /* bytes of a block */
} tq_row_info;

/* The layout of rows of a tq_type or TQ_ROW_..., or null if there is no such type. */
TURBOQUANT_API const tq_row_info * tq_row_get(int type);

/* The effect of sparse V. rows: rows of V, masked ones included, times tiles of queries; left_out: how many of these
 * were not decoded. */
typedef struct tq_attention_report {
    int64_t rows;
    int64_t left_out;
} tq_attention_report;

/* An exact window: the newest rows of K and V in other types, which attention reads instead of the last encoded rows. */
typedef struct tq_attention_window {
    const void * k;              /* [n_kv_head][rows] rows of head_k values */
    const void * v;              /* [n_kv_head][rows] rows of head_v values */
    int          type_k, type_v; /* tq_type or TQ_ROW_... */
    int64_t      rows;           /* at most n_kv; 0 = none */
} tq_attention_window;

/* out = softmax(scale * Q K^T [soft cap] + mask) V over encoded K and V, in float32.
 *   q    [n_head][n_query][head_k] floats                   mask [n_query][n_kv] floats or null, added to the scores
 *   k    [n_kv_head][n_kv] encoded rows of head_k values    v    [n_kv_head][n_kv] encoded rows of head_v values
 *   out  [n_head][n_query][head_v] floats
 * n_head must be a multiple of n_kv_head (GQA). soft_cap 0 = none, else s -> soft_cap * tanh(s / soft_cap).
 * A query row that is masked everywhere (-inf) gives zeros. Each thread allocates scratch memory. */
typedef struct tq_attention_args {
    const float * q;
    const void *  k;
    const void *  v;
    const float * mask;
    float *       out;
    int           type_k, type_v; /* tq_type or TQ_ROW_... */
    int64_t       n_head, n_kv_head, n_query, n_kv, head_k, head_v;
    float         scale, soft_cap;
    float         sparse_v;       /* see tq_attention_kv */
    int           threads;
    tq_attention_report * report; /* its counts are increased; may be null */
    const tq_attention_window * window; /* may be null */
} tq_attention_args;

TURBOQUANT_API tq_status tq_attention(const tq_attention_args * args);

/* The same engine for hosts with their own threads and memory. A host gathers the query rows that share a KV head (a
 * GQA group, times several tokens), calls tq_attention_partial for ranges of KV rows, merges the partial results of
 * each query row, and finishes the row. These functions check nothing and allocate nothing. */

typedef struct tq_attention_kv {
    int          type_k, type_v;     /* tq_type or TQ_ROW_... */
    int64_t      head_k, head_v;     /* values in a row */
    const void * k;                  /* the KV head's rows */
    const void * v;
    size_t       stride_k, stride_v; /* bytes between rows */
    float        scale, soft_cap;    /* as in tq_attention_args */
    float        sparse_v;           /* a row of V is left out of the sum (but counts in the softmax) if its weight,
                                        relative to the largest so far, is at most this for all query rows */
    const void * ahead[2];           /* two pieces of memory to prefetch meanwhile, which the caller reads next */
    size_t       ahead_bytes[2];     /* 0 = none */
} tq_attention_kv;

typedef struct tq_attention_queries {
    int64_t                  rows;
    const float * const *    q;      /* [rows] */
    const void * const *     mask;   /* [rows] of n_kv each, added to the scores; the array or a row may be null */
    int                      mask_f32; /* masks are float32, else fp16 */
    const float *            slope;  /* [rows] factors of the masks (ALiBi), or null */
} tq_attention_queries;

/* 1 if the engine supports this pair of row types and head sizes, else 0. */
TURBOQUANT_API int    tq_attention_supports(int type_k, int type_v, int64_t head_k, int64_t head_v);
/* Bytes of scratch memory that tq_attention_partial needs; they do not depend on the selected kernels. */
TURBOQUANT_API size_t tq_attention_scratch(const tq_attention_kv * kv, int64_t rows);
/* Attention over KV rows first ... last-1. partial is [rows][head_v + 2] floats: the unnormalised sum of V (in the
 * rotated domain if V is turbo), then the largest score (-inf if all are masked), then the sum of weights, which is NaN
 * if a score is NaN. Rows of V with non-finite values affect only queries that give these rows a weight other than 0.
 * Returns the number of rows of V that were left out. */
TURBOQUANT_API int64_t tq_attention_partial(const tq_attention_kv * kv, const tq_attention_queries * queries,
                                            int64_t first, int64_t last, float * partial, void * scratch);
/* Merge the partial result `from` of a query row into `into`. */
TURBOQUANT_API void   tq_attention_merge(float * into, const float * from, int64_t head_v);
/* Transform the partial result of a query row from the rotated domain back to that of V, in place. After that it can be
 * merged with a partial result over rows of V that are not turbo, and type_v of tq_attention_finish is theirs. */
TURBOQUANT_API void   tq_attention_unrotate(int type_v, float * partial, int64_t head_v);
/* Normalise the result of a query row and write it to out [head_v]. sink: a score that counts in the softmax without a
 * row of V, or null. partial is overwritten. */
TURBOQUANT_API void   tq_attention_finish(int type_v, float * partial, int64_t head_v, const float * sink, float * out);

/* ---- kernels ----------------------------------------------------------------------------------------------- */

/* The ordered list, best first: those of avx512vbmi, avx512vnni, avx512, avxvnni, avx2, neon_dotprod, neon, scalar that
 * this build has. */
TURBOQUANT_API int          tq_kernels_count(void);
TURBOQUANT_API const char * tq_kernels_name(int index);      /* null if out of range */
TURBOQUANT_API int          tq_kernels_supported(int index); /* 1 if this CPU can run them */
/* The name of the selected kernels. At first use the environment variable TURBOQUANT_KERNELS selects them, or else the
 * best supported kernels are selected. The result is null if TURBOQUANT_KERNELS names unknown or unsupported kernels:
 * the checked functions then return that error, and the *_row functions, which return no status, use scalar. */
TURBOQUANT_API const char * tq_kernels_selected(void);
/* Select kernels by name for the whole process; null or "" = the best supported ones. A call that is in progress finishes
 * with the kernels with which it began. */
TURBOQUANT_API tq_status    tq_kernels_select(const char * name);
/* TQ_OK, or the error of the kernels that TURBOQUANT_KERNELS names. */
TURBOQUANT_API tq_status    tq_kernels_status(void);

/* ---- hot path: one row, unchecked -------------------------------------------------------------------------- */

TURBOQUANT_API void  tq_encode_row (tq_type type, const float * src, void * dst, int64_t n);
TURBOQUANT_API void  tq_decode_row (tq_type type, const void * src, float * dst, int64_t n);
TURBOQUANT_API void  tq_query_row  (int block, const float * src, void * dst, int64_t n);
TURBOQUANT_API float tq_dot_row    (tq_type type, const void * src, const void * query, int64_t n);

#ifdef __cplusplus
}
#endif

#endif
