// turbo-limits.h: error limits for llama.cpp's test-quantize-fns, whose own limits are for blocks of 32 and other codebooks.
#pragma once

#include "ggml/turbo-types.h"

inline int turbo_test_bits(ggml_type type) {
    switch ((int) type) {
#define TURBO_BITS(ID, name, FIRST, family, bits, ...) case GGML_TYPE_##ID: return bits;
        TURBOQUANT_TYPES(TURBO_BITS)
#undef TURBO_BITS
        default: return 0;
    }
}

// The test encodes 4096 values of 0.1 + 2 cos(i), and divides the RMSE by sqrt(4096) once more. With the codebooks'
// relative mean squared error e on N(0,1) the result is 1.42 sqrt(e) / 64. The limits are a quarter higher, because the
// rotated values of a pure tone are only approximately normal.
inline float turbo_test_max_quantization_error(ggml_type type) {
    const int bits = turbo_test_bits(type);
    return bits == 4 ? 0.0027f : bits == 3 ? 0.0052f : 0.0096f;
}

inline float turbo_test_max_dot_error(ggml_type type) {
    const int bits = turbo_test_bits(type);
    return bits == 4 ? 0.01f : bits == 3 ? 0.02f : 0.03f;
}
