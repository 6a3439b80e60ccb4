/*
 * turbo-types.h: the TurboQuant types of ggml: ids, lists, names, and the type that fits a head.
 *
 * The header is C and C++. The functions are exported from ggml-base, which also contains the codec (turboquant.h).
 */
#ifndef TURBO_TYPES_H
#define TURBO_TYPES_H

#include <stdbool.h>
#include <stdint.h>

#include "ggml.h"
#include "turboquant_formats.h"

#ifdef __cplusplus
extern "C" {
#endif

/* The stored types are the rows of TURBOQUANT_TYPES, and GGML_TYPE_<ID> is the id of a row. There are two other kinds
 * of types. */

/* X(ID, name, block, id): the types of prepared query rows (rotated int8), which are the vec_dot_type of the stored
 * types. Such rows are never stored. */
#define TURBO_QUERY_TYPES(X)            \
    X(TURBO_Q128, turbo_q128, 128, 521) \
    X(TURBO_Q64,  turbo_q64,   64, 522) \
    X(TURBO_Q32,  turbo_q32,   32, 523)

/* X(ID, name, id): the types that -ctk and -ctv accept besides stored types. Only the parameters of a context have such
 * a type, never a tensor. "auto" is replaced by a type for each layer when a context is created. */
#define TURBO_OPTION_TYPES(X) \
    X(TURBO_AUTO, auto, 524)

/* The bytes of a block of a prepared query row. */
#define TURBO_QUERY_BYTES(block) (8 + (block))

#define TURBO_CASE(ID, ...) case GGML_TYPE_##ID:
/* The stored types as cases of a switch over enum ggml_type. */
#define TURBO_TYPE_CASES TURBOQUANT_TYPES(TURBO_CASE)
/* All values that the hook type-ids adds to the enum, as cases of a switch that names every type. */
#define TURBO_ENUM_CASES \
    TURBO_TYPE_CASES TURBO_QUERY_TYPES(TURBO_CASE) TURBO_OPTION_TYPES(TURBO_CASE) case GGML_TYPE_COUNT_UPSTREAM:

/* The stored types as a comma-separated list, for initializers. */
#define TURBO_TYPE_ITEM(ID, ...) GGML_TYPE_##ID,
#define TURBO_TYPE_LIST TURBOQUANT_TYPES(TURBO_TYPE_ITEM)
/* The types that -ctk and -ctv accept besides llama.cpp's own types, as such a list. */
#define TURBO_CACHE_TYPE_LIST TURBO_TYPE_LIST TURBO_OPTION_TYPES(TURBO_TYPE_ITEM)

/* True for the stored types. */
static inline bool turbo_is_type(enum ggml_type type) {
    switch ((int) type) {
        TURBO_TYPE_CASES return true;
        default: return false;
    }
}

/* ---- names ----------------------------------------------------------------------------------------------------- */

/* The codec's tq_type of a stored type; -1 for other types. */
GGML_API int turbo_to_tq(enum ggml_type type);

/* The row type of K or V in the codec's attention, a tq_type or TQ_ROW_...; -1 if there is none. */
GGML_API int turbo_to_row(enum ggml_type type);

/* The stored type of that name, or GGML_TYPE_COUNT if there is none. */
GGML_API enum ggml_type turbo_type_from_name(const char * name);

/* As turbo_type_from_name, but "auto" is also a name. Programs with lists of their own for -ctk and -ctv use it. */
GGML_API enum ggml_type turbo_option_from_name(const char * name);

/* The type of that name among the types that a cache can have, which include some of llama.cpp's own; GGML_TYPE_COUNT
 * if there is none. */
GGML_API enum ggml_type turbo_cache_type_from_name(const char * name);

/* The types that a cache can have, with an index from 0 on; GGML_TYPE_COUNT for an index after the last type. */
GGML_API enum ggml_type turbo_cache_type(int index);

/* ---- the cache ------------------------------------------------------------------------------------------------- */

/* The type with the longest block in the family of a stored type. */
GGML_API enum ggml_type turbo_family(enum ggml_type type);

/* The type in which heads of `head` values are stored: `type` itself if its block divides the head; otherwise, if
 * `type` is a stored type with the longest block of its family, the type of the family with the longest block that
 * divides the head. GGML_TYPE_COUNT if there is none. */
GGML_API enum ggml_type turbo_type_for_head(enum ggml_type type, int64_t head);

/* The bits per value of any type, scales included. */
GGML_API double turbo_bits_per_value(enum ggml_type type);

/* The one of two types that has more bits per value; `own` if both have equally many. */
GGML_API enum ggml_type turbo_better_type(enum ggml_type own, enum ggml_type other);

#ifdef __cplusplus
}
#endif

#endif
