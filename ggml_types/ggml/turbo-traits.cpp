// turbo-traits.cpp: ggml's traits and type switches, implemented with turboquant.h. Part of ggml-base.

#include "ggml/turbo-traits.h"

#include "turboquant.h"

#include <cstdio>
#include <cstring>

// ---- traits --------------------------------------------------------------------------------------------------------

#define TURBO_DEFINE(ID, name, ...)                                                                      \
    void turbo_encode_##name(const float * x, void * y, int64_t k) { tq_encode_row(TQ_##ID, x, y, k); }  \
    void turbo_decode_##name(const void * x, float * y, int64_t k) { tq_decode_row(TQ_##ID, x, y, k); }  \
    void turbo_dot_##name(int n, float * s, size_t, const void * x, size_t, const void * y, size_t, int) { \
        *s = tq_dot_row(TQ_##ID, x, y, n);                                                               \
    }
TURBOQUANT_TYPES(TURBO_DEFINE)
#undef TURBO_DEFINE

#define TURBO_DEFINE(ID, name, block, id) \
    void turbo_prepare_##name(const float * x, void * y, int64_t k) { tq_query_row(block, x, y, k); }
TURBO_QUERY_TYPES(TURBO_DEFINE)
#undef TURBO_DEFINE

// ---- type switches -------------------------------------------------------------------------------------------------

size_t turbo_quantize(ggml_type type, const float * src, void * dst, int64_t nrows, int64_t n_per_row) {
    const size_t row_size = ggml_row_size(type, n_per_row);
    for (int64_t row = 0; row < nrows; ++row) {
        tq_encode_row((tq_type) turbo_to_tq(type), src + row * n_per_row, (char *) dst + row * row_size, n_per_row);
    }
    return nrows * row_size;
}

bool turbo_validate_row_data(ggml_type type, const void * data, size_t nbytes) {
    const size_t size   = ggml_type_size(type);
    const size_t blocks = nbytes / size;
    for (size_t i = 0; i < blocks; ++i) {
        uint16_t d;
        memcpy(&d, (const char *) data + i * size, sizeof(d));
        if ((d & 0x7c00) == 0x7c00) {
            fprintf(stderr, "ggml_validate_row_data: the scale of %s block %zu is %s\n", ggml_type_name(type), i,
                    (d & 0x03ff) ? "nan" : "inf");
            return false;
        }
    }
    return true;
}
