// turbo-ggml.cpp: ggml's traits and type switches in terms of turboquant.h. Part of ggml-base.

#include "turbo-ggml.h"

#include "turboquant.h"

#include <cctype>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <string>

#define TURBO_CHECK(ID, name, FIRST, family, bits, block, bytes, id) \
    static_assert((int) GGML_TYPE_##ID == id && id < (int) GGML_TYPE_COUNT, "hooks.toml has the id of " #name);
TURBOQUANT_TYPES(TURBO_CHECK)
#undef TURBO_CHECK
#define TURBO_CHECK(ID, name, block, id)                                                                               \
    static_assert((int) GGML_TYPE_##ID == id && id < (int) GGML_TYPE_COUNT, "hooks.toml has the id of " #name);        \
    static_assert(sizeof(tq_query##block) == TURBO_QUERY_BYTES(block), "bytes of a block of " #name);
TURBO_QUERY_TYPES(TURBO_CHECK)
#undef TURBO_CHECK
#define TURBO_CHECK(ID, name, id) \
    static_assert((int) GGML_TYPE_##ID == id && id < (int) GGML_TYPE_COUNT, "hooks.toml has the id of " #name);
TURBO_OPTION_TYPES(TURBO_CHECK)
#undef TURBO_CHECK

int turbo_to_tq(ggml_type type) {
    switch ((int) type) {
#define TURBO_TO_TQ(ID, ...) case GGML_TYPE_##ID: return TQ_##ID;
        TURBOQUANT_TYPES(TURBO_TO_TQ)
#undef TURBO_TO_TQ
        default: return -1;
    }
}

namespace {

tq_type to_tq(ggml_type type) {
    return (tq_type) turbo_to_tq(type);
}

ggml_type from_tq(tq_type type) {
    const tq_type_info * info = tq_type_get(type);
    return info ? (ggml_type) info->file_id : GGML_TYPE_COUNT;
}

bool is_any_turbo(ggml_type type) {
    switch ((int) type) {
        TURBO_QUERY_TYPES(TURBO_CASE) return true;
        default: return turbo_is_type(type);
    }
}

bool fail(char * error, size_t error_size, const std::string & text) {
    snprintf(error, error_size, "%s", text.c_str());
    return false;
}

}  // namespace

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
        tq_encode_row(to_tq(type), src + row * n_per_row, (char *) dst + row * row_size, n_per_row);
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

bool turbo_cpu_refuses(const ggml_tensor * op) {
    bool touched = is_any_turbo(op->type);
    for (int i = 0; i < GGML_MAX_SRC; ++i) {
        touched = touched || (op->src[i] && is_any_turbo(op->src[i]->type));
    }
    if (!touched) {
        return false;
    }
    const ggml_tensor * a = op->src[0];
    const ggml_tensor * b = op->src[1];
    switch (op->op) {
        case GGML_OP_NONE:
        case GGML_OP_RESHAPE:
        case GGML_OP_VIEW:
        case GGML_OP_PERMUTE:
        case GGML_OP_TRANSPOSE:
            return false;
        case GGML_OP_DUP:
        case GGML_OP_CONT:
        case GGML_OP_CPY:
            if (a->type == op->type) {
                return false;  // bytes
            }
            if (turbo_is_type(a->type)) {
                return op->type != GGML_TYPE_F32;
            }
            return !turbo_is_type(op->type) || !ggml_is_contiguous(op) || a->nb[0] != ggml_type_size(a->type) ||
                   (a->type != GGML_TYPE_F32 && a->type != GGML_TYPE_F16 && a->type != GGML_TYPE_BF16);
        case GGML_OP_SET_ROWS:
            return is_any_turbo(a->type) || is_any_turbo(b->type);
        case GGML_OP_GET_ROWS:
            return !turbo_is_type(a->type) || op->type != GGML_TYPE_F32;
        case GGML_OP_MUL_MAT:
        case GGML_OP_MUL_MAT_ID:
            return !turbo_is_type(a->type) || b->type != GGML_TYPE_F32;
        case GGML_OP_FLASH_ATTN_EXT:
            return a->type != GGML_TYPE_F32 || op->type != GGML_TYPE_F32;
        default:
            // Newer than the oldest tree, hence by name; its K goes through vec_dot.
            return strcmp(ggml_op_name(op->op), "LIGHTNING_INDEXER") != 0;
    }
}

ggml_type turbo_type_from_name(const char * name) {
    return from_tq(tq_type_from_name(name));
}

ggml_type turbo_option_from_name(const char * name) {
    return strcmp(name, ggml_type_name(GGML_TYPE_TURBO_AUTO)) == 0 ? GGML_TYPE_TURBO_AUTO : turbo_type_from_name(name);
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

// The types that upstream offers for a cache; ours are added to them.
static const ggml_type k_cache_types[] = {
    GGML_TYPE_F32,  GGML_TYPE_F16,  GGML_TYPE_BF16,   GGML_TYPE_Q8_0, GGML_TYPE_Q4_0,
    GGML_TYPE_Q4_1, GGML_TYPE_Q5_0, GGML_TYPE_IQ4_NL, GGML_TYPE_Q5_1, TURBO_TYPE_LIST
};

ggml_type turbo_cache_type_from_name(const char * name) {
    for (const ggml_type type : k_cache_types) {
        if (strcmp(name, ggml_type_name(type)) == 0) {
            return type;
        }
    }
    return GGML_TYPE_COUNT;
}

bool turbo_boundary_parse(const char * text, turbo_boundary * out, char * error, size_t error_size) {
    *out = { 0, GGML_TYPE_Q8_0 };
    if (!text || !*text) {
        return true;
    }
    const std::string value  = text;
    const size_t      colon  = value.find(':');
    const std::string number = value.substr(0, colon);
    bool digits = !number.empty() && number.size() <= 6;
    for (const char c : number) {
        digits = digits && isdigit((unsigned char) c);
    }
    if (!digits) {
        return fail(error, error_size,
                    "--cache-boundary-v '" + value + "': N must be a number of layers, as in 2 or 2:q8_0");
    }
    out->layers = atoi(number.c_str());
    if (colon == std::string::npos) {
        return true;
    }
    const std::string name = value.substr(colon + 1);
    out->type = turbo_cache_type_from_name(name.c_str());
    if (out->type != GGML_TYPE_COUNT) {
        return true;
    }
    std::string known;
    for (const ggml_type type : k_cache_types) {
        known += std::string(known.empty() ? "" : ", ") + ggml_type_name(type);
    }
    return fail(error, error_size,
                "--cache-boundary-v '" + value + "': unknown type '" + name + "'; known are " + known);
}

bool turbo_window_parse(const char * text, turbo_window_option * out, char * error, size_t error_size) {
    *out = { 256, GGML_TYPE_Q8_0 };
    if (!text || !*text) {
        return true;
    }
    const std::string value  = text;
    const size_t      colon  = value.find(':');
    const std::string number = value.substr(0, colon);
    bool digits = !number.empty() && number.size() <= 6;
    for (const char c : number) {
        digits = digits && isdigit((unsigned char) c);
    }
    if (!digits) {
        return fail(error, error_size,
                    "--cache-window '" + value + "': N must be a number of tokens, as in 256 or 256:f16");
    }
    out->tokens = atoi(number.c_str());
    if (colon == std::string::npos) {
        return true;
    }
    const std::string name = value.substr(colon + 1);
    for (const ggml_type type : { GGML_TYPE_Q8_0, GGML_TYPE_F16 }) {
        if (name == ggml_type_name(type)) {
            out->type = type;
            return true;
        }
    }
    return fail(error, error_size, "--cache-window '" + value + "': the type must be q8_0 or f16");
}

bool turbo_boundary_from_env(turbo_boundary * out, char * error, size_t error_size) {
    return turbo_boundary_parse(getenv(TURBO_BOUNDARY_ENV), out, error, error_size);
}

void turbo_option_to_env(const char * name, const char * text) {
#ifdef _WIN32
    _putenv_s(name, text);
#else
    setenv(name, text, 1);
#endif
}

const char * turbo_kernels_error(void) {
    const tq_status status = tq_kernels_status();
    if (status == TQ_OK) {
        return nullptr;
    }
    static const std::string text = [status]() {
        const char * chosen = getenv("TURBOQUANT_KERNELS");
        std::string  known;
        for (int i = 0; i < tq_kernels_count(); ++i) {
            if (tq_kernels_supported(i)) {
                known += std::string(known.empty() ? "" : ", ") + tq_kernels_name(i);
            }
        }
        const char * what = tq_status_text(status);
        if (status == TQ_ERROR_KERNELS_UNKNOWN) {
            what = "there are no kernels of that name";
        } else if (status == TQ_ERROR_KERNELS_UNSUPPORTED) {
            what = "this CPU or this build cannot run these kernels";
        }
        return std::string("TURBOQUANT_KERNELS=") + (chosen ? chosen : "") + ": " + what + "; choose one of " + known +
               ", or unset it to take the best";
    }();
    return text.c_str();
}

const char * turbo_kernels_name(void) {
    const char * name = tq_kernels_selected();
    return name ? name : "scalar";
}

bool turbo_sparse_v_parse(const char * text, float * out, char * error, size_t error_size) {
    *out = TURBO_SPARSE_V_DEFAULT;
    if (!text || !*text) {
        return true;
    }
    char *      end   = nullptr;
    const float value = strtof(text, &end);
    if (*end || !(value >= 0.0f && value < 1.0f)) {
        return fail(error, error_size, std::string("cache-sparse-v '") + text +
                    "': must be a number from 0 (off) to below 1, as in 1e-6");
    }
    *out = value;
    return true;
}

bool turbo_generic_attention(void) {
    static const bool asked = []() {
        const char * text = getenv("TURBOQUANT_GENERIC_ATTENTION");
        return text && *text && strcmp(text, "0") != 0;
    }();
    return asked;
}

bool turbo_window_supports(enum ggml_type type_k, enum ggml_type type_v) {
    if (turbo_generic_attention() || !(turbo_is_type(type_k) || turbo_is_type(type_v))) {
        return false;
    }
    for (const enum ggml_type type : { type_k, type_v }) {
        switch ((int) type) {
#define TURBO_ROW_TYPE(ID, ...) case GGML_TYPE_##ID:
            TURBOQUANT_ROW_TYPES(TURBO_ROW_TYPE)
#undef TURBO_ROW_TYPE
                break;
            default:
                if (!turbo_is_type(type)) {
                    return false;
                }
        }
    }
    return true;
}

float turbo_sparse_v(void) {
    static const float threshold = []() {
        float value;
        char  error[512];
        turbo_sparse_v_parse(getenv(TURBO_SPARSE_V_ENV), &value, error, sizeof(error));
        return value;
    }();
    return threshold;
}

bool turbo_guard_parse(const char * text, float * out, char * error, size_t error_size) {
    *out = TURBO_GUARD_DEFAULT;
    if (!text || !*text) {
        return true;
    }
    if (strcmp(text, "off") == 0) {
        *out = 0.0f;
        return true;
    }
    char *      end   = nullptr;
    const float value = strtof(text, &end);
    if (*end || !(value > 0.0f && value < INFINITY)) {
        return fail(error, error_size, std::string("--cache-guard '") + text +
                    "': must be off, or the highest noise of a score in nats that is allowed, as in 3");
    }
    *out = value;
    return true;
}

// ---- llama.cpp's own tests -----------------------------------------------------------------------------------------

// test-quantize-fns encodes 0.1 + 2 cos(i), 4096 values, and divides the RMSE by sqrt(4096) once more. With the
// codebooks' relative mean squared error e on N(0,1) that is 1.42 sqrt(e) / 64; the limits leave a quarter of headroom,
// because a pure tone does not become quite normal in one block.
float turbo_test_max_quantization_error(ggml_type type) {
    const tq_type_info * info = tq_type_get(to_tq(type));
    return info->bits == 4 ? 0.0027f : info->bits == 3 ? 0.0052f : 0.0096f;
}

float turbo_test_max_dot_error(ggml_type type) {
    const tq_type_info * info = tq_type_get(to_tq(type));
    return info->bits == 4 ? 0.01f : info->bits == 3 ? 0.02f : 0.03f;
}
