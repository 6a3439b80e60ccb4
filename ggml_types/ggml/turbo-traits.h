/*
 * turbo-traits.h: encoding, decoding and dot products of the types, for ggml's tables and type switches.
 *
 * The header is C and C++. The functions are exported from ggml-base.
 */
#ifndef TURBO_TRAITS_H
#define TURBO_TRAITS_H

#include <stddef.h>

#include "ggml/turbo-types.h"

#ifdef __cplusplus
extern "C" {
#endif

/* ---- traits: one row of k values, a multiple of the block ------------------------------------------------------ */

/* For each stored type: encoding of a row x to blocks y, decoding of blocks x to a row y, and the dot product *s of an
 * encoded row x of n values and a prepared query row y. The strides bs, bx, by and the number of rows nrc are ignored,
 * because ggml computes one row at a time for these types. The functions check nothing. */
#define TURBO_DECLARE(ID, name, ...)                                                             \
    GGML_API void turbo_encode_##name(const float * x, void * y, int64_t k);                     \
    GGML_API void turbo_decode_##name(const void * x, float * y, int64_t k);                     \
    GGML_API void turbo_dot_##name(int n, float * s, size_t bs, const void * x, size_t bx, const void * y, size_t by, \
                                   int nrc);
TURBOQUANT_TYPES(TURBO_DECLARE)
#undef TURBO_DECLARE

/* For each type of prepared queries: the preparation of a query row x. */
#define TURBO_DECLARE(ID, name, ...) GGML_API void turbo_prepare_##name(const float * x, void * y, int64_t k);
TURBO_QUERY_TYPES(TURBO_DECLARE)
#undef TURBO_DECLARE

#ifndef __cplusplus /* the table is in a C file */
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
/* The types' rows of type_traits in ggml.c. */
#define TURBO_TRAITS                      \
    TURBOQUANT_TYPES(TURBO_TRAITS_ROW)    \
    TURBO_QUERY_TYPES(TURBO_QUERY_TRAITS_ROW) TURBO_OPTION_TYPES(TURBO_OPTION_TRAITS_ROW)
#endif

/* ---- type switches of ggml ------------------------------------------------------------------------------------- */

/* Encodes nrows contiguous rows of n_per_row values, a multiple of the block, to a stored type. Returns the number of
 * bytes written. */
GGML_API size_t turbo_quantize(enum ggml_type type, const float * src, void * dst, int64_t nrows, int64_t n_per_row);

/* Checks blocks of a stored type. False, with a line on stderr, if a scale is not finite. nbytes is a multiple of the
 * bytes of a block. */
GGML_API bool turbo_validate_row_data(enum ggml_type type, const void * data, size_t nbytes);

#ifdef __cplusplus
}
#endif

#endif
