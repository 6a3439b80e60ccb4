/*
 * turbo-types.h: which types of ggml are TurboQuant's: ids, lists, names, and which one fits a head.
 *
 * C and C++. The functions are exported from ggml-base, beside which the codec itself (turboquant.h) is linked.
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

/* True for the stored types. */
static inline bool turbo_is_type(enum ggml_type type) {
    switch ((int) type) {
        TURBO_TYPE_CASES return true;
        default: return false;
    }
}

/* ---- names ----------------------------------------------------------------------------------------------------- */

/* The codec's number of a stored type (tq_type), or -1. */
GGML_API int turbo_to_tq(enum ggml_type type);

/* The stored type of that name, or GGML_TYPE_COUNT. */
GGML_API enum ggml_type turbo_type_from_name(const char * name);

/* The same with "auto", for programs that have a list of their own of what -ctk and -ctv take. */
GGML_API enum ggml_type turbo_option_from_name(const char * name);

/* Any type that a cache can have, upstream's included, or GGML_TYPE_COUNT. */
GGML_API enum ggml_type turbo_cache_type_from_name(const char * name);

/* The types that a cache can have, one by one from index 0; GGML_TYPE_COUNT after the last. */
GGML_API enum ggml_type turbo_cache_type(int index);

/* ---- the cache ------------------------------------------------------------------------------------------------- */

/* Of a stored type, the type of the same family with the longest block. */
GGML_API enum ggml_type turbo_family(enum ggml_type type);

/* The type to store heads of `head` values in: `type` itself if its block divides the head; otherwise, if it has the
 * longest block of its family, the one with the largest block that does. GGML_TYPE_COUNT if there is none. */
GGML_API enum ggml_type turbo_type_for_head(enum ggml_type type, int64_t head);

GGML_API double turbo_bits_per_value(enum ggml_type type);

/* Of two types for the same V, the one with more bits per value; `own` if they have as many. */
GGML_API enum ggml_type turbo_better_type(enum ggml_type own, enum ggml_type other);

#ifdef __cplusplus
}
#endif

#endif
