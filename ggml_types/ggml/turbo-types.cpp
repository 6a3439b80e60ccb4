// turbo-types.cpp: the types' ids, names and blocks, implemented with turboquant.h. Part of ggml-base.

#include "ggml/turbo-types.h"

#include "turboquant.h"

#include <cstring>

#define TURBO_CHECK(ID, name, FIRST, family, bits, block, bytes, id) \
    static_assert((int) GGML_TYPE_##ID == id && id < (int) GGML_TYPE_COUNT, "ggml/hooks.toml has the id of " #name);
TURBOQUANT_TYPES(TURBO_CHECK)
#undef TURBO_CHECK
#define TURBO_CHECK(ID, name, block, id)                                                                               \
    static_assert((int) GGML_TYPE_##ID == id && id < (int) GGML_TYPE_COUNT, "ggml/hooks.toml has the id of " #name);        \
    static_assert(sizeof(tq_query##block) == TURBO_QUERY_BYTES(block), "bytes of a block of " #name);
TURBO_QUERY_TYPES(TURBO_CHECK)
#undef TURBO_CHECK
#define TURBO_CHECK(ID, name, id) \
    static_assert((int) GGML_TYPE_##ID == id && id < (int) GGML_TYPE_COUNT, "ggml/hooks.toml has the id of " #name);
TURBO_OPTION_TYPES(TURBO_CHECK)
#undef TURBO_CHECK

namespace {

tq_type to_tq(ggml_type type) {
    return (tq_type) turbo_to_tq(type);
}

ggml_type from_tq(tq_type type) {
    const tq_type_info * info = tq_type_get(type);
    return info ? (ggml_type) info->file_id : GGML_TYPE_COUNT;
}

// llama.cpp's own types for a cache, then the stored types.
const ggml_type k_cache_types[] = {
    GGML_TYPE_F32,  GGML_TYPE_F16,  GGML_TYPE_BF16,   GGML_TYPE_Q8_0, GGML_TYPE_Q4_0,
    GGML_TYPE_Q4_1, GGML_TYPE_Q5_0, GGML_TYPE_IQ4_NL, GGML_TYPE_Q5_1, TURBO_TYPE_LIST
};

}  // namespace

// ---- names ---------------------------------------------------------------------------------------------------------

int turbo_to_tq(ggml_type type) {
    switch ((int) type) {
#define TURBO_TO_TQ(ID, ...) case GGML_TYPE_##ID: return TQ_##ID;
        TURBOQUANT_TYPES(TURBO_TO_TQ)
#undef TURBO_TO_TQ
        default: return -1;
    }
}

int turbo_to_row(ggml_type type) {
    switch ((int) type) {
#define TURBO_TO_ROW(ID, ...) case GGML_TYPE_##ID: return TQ_ROW_##ID;
        TURBOQUANT_ROW_TYPES(TURBO_TO_ROW)
#undef TURBO_TO_ROW
        default: return turbo_to_tq(type);
    }
}

ggml_type turbo_type_from_name(const char * name) {
    return from_tq(tq_type_from_name(name));
}

ggml_type turbo_option_from_name(const char * name) {
    return strcmp(name, ggml_type_name(GGML_TYPE_TURBO_AUTO)) == 0 ? GGML_TYPE_TURBO_AUTO : turbo_type_from_name(name);
}

ggml_type turbo_cache_type_from_name(const char * name) {
    for (const ggml_type type : k_cache_types) {
        if (strcmp(name, ggml_type_name(type)) == 0) {
            return type;
        }
    }
    return GGML_TYPE_COUNT;
}

ggml_type turbo_cache_type(int index) {
    return index < (int) (sizeof(k_cache_types) / sizeof(k_cache_types[0])) ? k_cache_types[index] : GGML_TYPE_COUNT;
}

// ---- the cache -----------------------------------------------------------------------------------------------------

ggml_type turbo_family(ggml_type type) {
    return from_tq(tq_type_get(to_tq(type))->family);
}

ggml_type turbo_type_for_head(ggml_type type, int64_t head) {
    if (head > 0 && head % ggml_blck_size(type) == 0) {
        return type;
    }
    if (!turbo_is_type(type) || turbo_family(type) != type) {
        return GGML_TYPE_COUNT;
    }
    return from_tq(tq_type_for_head(to_tq(type), head));
}

double turbo_bits_per_value(ggml_type type) {
    return 8.0 * (double) ggml_type_size(type) / (double) ggml_blck_size(type);
}

ggml_type turbo_better_type(ggml_type own, ggml_type other) {
    return turbo_bits_per_value(own) >= turbo_bits_per_value(other) ? own : other;
}
