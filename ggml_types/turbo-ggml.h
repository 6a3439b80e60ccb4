/*
 * turbo-ggml.h: TurboQuant's types as ggml types. What the hooks in ggml, llama.cpp's libraries and its tests see.
 *
 * C and C++. The functions are exported from ggml-base, beside which the codec itself (turboquant.h) is linked.
 */
#ifndef TURBO_GGML_H
#define TURBO_GGML_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "ggml.h"
#include "turboquant_formats.h"

#ifdef __cplusplus
extern "C" {
#endif

/* The stored types are the rows of TURBOQUANT_TYPES; GGML_TYPE_<ID> is the row's id. Further types of ours are of two other
 * kinds. */

/* X(ID, name, block, id): prepared query rows (rotated int8), the vec_dot_type of the stored types; never stored. */
#define TURBO_QUERY_TYPES(X)            \
    X(TURBO_Q128, turbo_q128, 128, 521) \
    X(TURBO_Q64,  turbo_q64,   64, 522) \
    X(TURBO_Q32,  turbo_q32,   32, 523)

/* X(ID, name, id): what -ctk and -ctv take besides stored types. No tensor has one: it stands in a context's parameters
 * only. "auto" is chosen for each layer when a context is made. */
#define TURBO_OPTION_TYPES(X) \
    X(TURBO_AUTO, auto, 524)

/* Bytes of one block of a prepared query. */
#define TURBO_QUERY_BYTES(block) (8 + (block))

#define TURBO_CASE(ID, ...) case GGML_TYPE_##ID:
/* In a switch over enum ggml_type, the stored types. */
#define TURBO_TYPE_CASES TURBOQUANT_TYPES(TURBO_CASE)
/* Everything that the enum hook adds, for a switch that names every type. */
#define TURBO_ENUM_CASES \
    TURBO_TYPE_CASES TURBO_QUERY_TYPES(TURBO_CASE) TURBO_OPTION_TYPES(TURBO_CASE) case GGML_TYPE_COUNT_UPSTREAM:

/* The stored types as a comma-separated list, for initializers. */
#define TURBO_TYPE_ITEM(ID, ...) GGML_TYPE_##ID,
#define TURBO_TYPE_LIST TURBOQUANT_TYPES(TURBO_TYPE_ITEM)
/* What -ctk and -ctv take besides upstream's types. */
#define TURBO_CACHE_TYPE_LIST TURBO_TYPE_LIST TURBO_OPTION_TYPES(TURBO_TYPE_ITEM)

static inline bool turbo_is_type(enum ggml_type type) {
    switch ((int) type) {
        TURBO_TYPE_CASES return true;
        default: return false;
    }
}

/* ---- traits: one row of k values ------------------------------------------------------------------------------ */

#define TURBO_DECLARE(ID, name, ...)                                                             \
    GGML_API void turbo_encode_##name(const float * x, void * y, int64_t k);                     \
    GGML_API void turbo_decode_##name(const void * x, float * y, int64_t k);                     \
    GGML_API void turbo_dot_##name(int n, float * s, size_t bs, const void * x, size_t bx, const void * y, size_t by, \
                                   int nrc);
TURBOQUANT_TYPES(TURBO_DECLARE)
#undef TURBO_DECLARE

#define TURBO_DECLARE(ID, name, ...) GGML_API void turbo_prepare_##name(const float * x, void * y, int64_t k);
TURBO_QUERY_TYPES(TURBO_DECLARE)
#undef TURBO_DECLARE

#ifndef __cplusplus /* the tables are C */
#define TURBO_TRAITS_ROW(ID, name, FIRST, family, bits, block, bytes, id) \
    [GGML_TYPE_##ID] = {                                        \
        .type_name      = #name,                                \
        .blck_size      = block,                                \
        .type_size      = bytes,                                \
        .is_quantized   = true,                                 \
        .to_float       = turbo_decode_##name,                  \
        .from_float_ref = (ggml_from_float_t) turbo_encode_##name, \
    },
#define TURBO_QUERY_TRAITS_ROW(ID, name, block, id)    \
    [GGML_TYPE_##ID] = {                               \
        .type_name    = #name,                         \
        .blck_size    = block,                         \
        .type_size    = TURBO_QUERY_BYTES(block),      \
        .is_quantized = true,                          \
    },
#define TURBO_OPTION_TRAITS_ROW(ID, name, id) [GGML_TYPE_##ID] = { .type_name = #name, },
/* Rows of ggml.c's type_traits. */
#define TURBO_TRAITS                      \
    TURBOQUANT_TYPES(TURBO_TRAITS_ROW)    \
    TURBO_QUERY_TYPES(TURBO_QUERY_TRAITS_ROW) TURBO_OPTION_TYPES(TURBO_OPTION_TRAITS_ROW)

#define TURBO_CPU_TRAITS_ROW(ID, name, FIRST, family, bits, block, bytes, id) \
    [GGML_TYPE_##ID] = {                             \
        .from_float   = turbo_encode_##name,         \
        .vec_dot      = turbo_dot_##name,            \
        .vec_dot_type = GGML_TYPE_TURBO_Q##block,    \
        .nrows        = 1,                           \
    },
#define TURBO_QUERY_CPU_TRAITS_ROW(ID, name, block, id) [GGML_TYPE_##ID] = { .from_float = turbo_prepare_##name, },
/* Rows of ggml-cpu.c's type_traits_cpu. */
#define TURBO_CPU_TRAITS TURBOQUANT_TYPES(TURBO_CPU_TRAITS_ROW) TURBO_QUERY_TYPES(TURBO_QUERY_CPU_TRAITS_ROW)
#endif

/* ---- type switches of ggml ------------------------------------------------------------------------------------- */

/* Encode nrows rows of n_per_row values; returns the bytes written. */
GGML_API size_t turbo_quantize(enum ggml_type type, const float * src, void * dst, int64_t nrows, int64_t n_per_row);

/* False, with a line on stderr, if a block's scale is not finite. nbytes is a multiple of the block. */
GGML_API bool turbo_validate_row_data(enum ggml_type type, const void * data, size_t nbytes);

/* True if op reads or writes a turbo type in a way that ggml's CPU backend cannot compute (it would abort). */
GGML_API bool turbo_cpu_refuses(const struct ggml_tensor * op);

/* The codec's number of a stored type (tq_type), or -1. */
GGML_API int turbo_to_tq(enum ggml_type type);

/* The stored type of that name, or GGML_TYPE_COUNT. */
GGML_API enum ggml_type turbo_type_from_name(const char * name);

/* The same with "auto", for programs that have a list of their own of what -ctk and -ctv take. */
GGML_API enum ggml_type turbo_option_from_name(const char * name);

/* Any type that a cache can have, upstream's included, or GGML_TYPE_COUNT. */
GGML_API enum ggml_type turbo_cache_type_from_name(const char * name);

/* ---- the cache ------------------------------------------------------------------------------------------------- */

/* Of a stored type, the type of the same family with the longest block. */
GGML_API enum ggml_type turbo_family(enum ggml_type type);

/* The type to store heads of `head` values in: `type` itself if its block divides the head; otherwise, if it has the
 * longest block of its family, the one with the largest block that does. GGML_TYPE_COUNT if there is none. */
GGML_API enum ggml_type turbo_type_for_head(enum ggml_type type, int64_t head);

GGML_API double turbo_bits_per_value(enum ggml_type type);

/* Of two types for the same V, the one with more bits per value; `own` if they have as many. */
GGML_API enum ggml_type turbo_better_type(enum ggml_type own, enum ggml_type other);

/* Boundary V: "N" or "N:TYPE". */
typedef struct turbo_boundary {
    int            layers; /* the first and the last so many attention layers; 0 = off */
    enum ggml_type type;
} turbo_boundary;

#define TURBO_BOUNDARY_ENV "LLAMA_ARG_CACHE_BOUNDARY_V"

/* Parse `text` (null or empty: off). On failure returns false and writes one sentence into error. */
GGML_API bool turbo_boundary_parse(const char * text, turbo_boundary * out, char * error, size_t error_size);

/* Parse the environment variable. */
GGML_API bool turbo_boundary_from_env(turbo_boundary * out, char * error, size_t error_size);

/* The exact window: "N" or "N:TYPE". */
typedef struct turbo_window_option {
    int            tokens; /* the newest so many of every layer with a turbo type; 0 = off */
    enum ggml_type type;   /* that they are kept in, too */
} turbo_window_option;

#define TURBO_WINDOW_ENV "LLAMA_ARG_CACHE_WINDOW"

/* Parse `text` (null or empty: the default). On failure returns false and writes one sentence into error. */
GGML_API bool turbo_window_parse(const char * text, turbo_window_option * out, char * error, size_t error_size);

/* The guard: layers whose scores K would blur by more than a limit keep K in a better type. */
#define TURBO_GUARD_ENV "LLAMA_ARG_CACHE_GUARD"
/* docs/guard.md has the measurements behind it. */
#define TURBO_GUARD_DEFAULT 1.0f

/* Parse `text` (null or empty: the default): "off" (*out is 0) or a positive number. On failure returns false and
 * writes one sentence into error. */
GGML_API bool turbo_guard_parse(const char * text, float * out, char * error, size_t error_size);

/* The plan with the types of each layer: a file, "auto" or "off"; and a file for the draft model. */
#define TURBO_PLAN_ENV       "LLAMA_ARG_CACHE_PLAN"
#define TURBO_PLAN_DRAFT_ENV "LLAMA_ARG_CACHE_PLAN_DRAFT"

/* Hand an option's value that was checked to libllama and ggml, which read the environment variable. */
GGML_API void turbo_option_to_env(const char * name, const char * text);

/* Null if the codec's kernels are usable, else one sentence (TURBOQUANT_KERNELS is wrong); in a static buffer. */
GGML_API const char * turbo_kernels_error(void);

/* The name of the kernels in use. */
GGML_API const char * turbo_kernels_name(void);

/* ---- attention on the CPU -------------------------------------------------------------------------------------- */

struct ggml_compute_params;

/* GGML_OP_FLASH_ATTN_EXT with a turbo K or V: true if the fused engine computed it. Defined in ggml-cpu. */
bool turbo_cpu_compute_forward(const struct ggml_compute_params * params, struct ggml_tensor * op);
/* Raise *size to the scratch bytes that it needs. */
void turbo_cpu_work_size(int n_threads, const struct ggml_tensor * op, size_t * size);

/* Sparse V: rows of V whose softmax weight, relative to the row's largest, is at most this are not read. */
#define TURBO_SPARSE_V_ENV "LLAMA_ARG_CACHE_SPARSE_V"
#define TURBO_SPARSE_V_DEFAULT 1e-6f

/* Parse `text` (null or empty: the default): a number from 0 to below 1. On failure returns false and writes one
 * sentence into error. */
GGML_API bool turbo_sparse_v_parse(const char * text, float * out, char * error, size_t error_size);
/* The environment variable's value, read once; the default if it is wrong (context creation has refused it before). */
GGML_API float turbo_sparse_v(void);

/* True if the environment asks for ggml's own attention on the CPU: for comparisons, and a way out for users. */
GGML_API bool turbo_generic_attention(void);
/* True if the attention that runs over these types of K and V reads the slots of an exact window. */
GGML_API bool turbo_window_supports(enum ggml_type type_k, enum ggml_type type_v);

/* ---- llama.cpp's own tests ------------------------------------------------------------------------------------- */

/* Limits for test-quantize-fns (its own are for blocks of 32 and other codebooks). */
GGML_API float turbo_test_max_quantization_error(enum ggml_type type);
GGML_API float turbo_test_max_dot_error(enum ggml_type type);

#ifdef __cplusplus
}
#endif

#endif
