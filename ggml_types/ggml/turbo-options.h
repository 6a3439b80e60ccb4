// turbo-options.h: the options as rows, and the other environment variables. C++; the functions are exported from
// ggml-base.
//
// The command line passes an option to libllama and ggml through its environment variable. So llama.cpp's parameter
// structs stay unchanged, and programs that do not use common (llama-bench) have the options as well.
#pragma once

#include "ggml/turbo-types.h"

#include <cstddef>
#include <string>

// The values of all options, with their defaults.
struct turbo_options {
    std::string plan;                      // the plan's file, or empty
    bool        plan_off = false;          // if true, the plan in the model's metadata is not used either
    std::string plan_draft;                // the plan's file for the draft model, or empty
    float       guard = 1.0f;              // nats; 0 = off. docs/guard.md has the measurements behind the default.
    int         boundary_layers = 0;       // number of attention layers at each end; 0 = off
    ggml_type   boundary_type = GGML_TYPE_Q8_0;
    float       sparse_v = 1e-6f;          // 0 = off
    int         window = 256;              // the exact window: the newest so many tokens; 0 = off
    ggml_type   window_type = GGML_TYPE_Q8_0; // that they are kept in, too. docs/window.md has the measurements.
    // Whether the option, given on a command line, sets the types of the cache or of the draft model's to auto.
    bool        auto_types = false;
    bool        auto_types_draft = false;
};

// One option. The command line, the environment and the error messages use these rows.
struct turbo_option {
    const char * flag;     // "--cache-guard"
    const char * variable; // of the environment: "LLAMA_ARG_CACHE_GUARD"
    const char * values;   // "off|LIMIT", for --help
    const char * help;
    // Sets the option's fields of `options`; an empty text stands for the default. If the text is invalid, the result is
    // false, and `wrong` is the rest of a sentence that begins with the flag and the text.
    bool (*parse)(const std::string & text, turbo_options & options, std::string & wrong);
};

constexpr size_t TURBO_OPTION_COUNT = 6;
GGML_API const turbo_option & turbo_option_row(size_t index);

// False, with one sentence in `error`, if the text is invalid for the option.
GGML_API bool turbo_option_parse(const turbo_option & option, const std::string & text, turbo_options & options,
                                 std::string & error);

// Reads all options from the environment. False, with one sentence in `error`, if one is invalid.
GGML_API bool turbo_options_from_env(turbo_options & options, std::string & error);

// Passes an option's value, which must be valid, to libllama and ggml.
GGML_API void turbo_option_to_env(const char * flag, const char * text);

// The threshold of sparse V: rows of V are not read if their softmax weight, relative to the largest of the query row, is
// at most this. The variable is read once. An invalid value, which context creation refuses, gives the default.
GGML_API float turbo_sparse_v(void);

// ---- variables that are no options ---------------------------------------------------------------------------------

// TURBOQUANT_GENERIC_ATTENTION: turns the fused attention off, for comparisons and as a workaround. It is read once.
GGML_API bool turbo_generic_attention(void);

// TURBOQUANT_RPC: declares that remote servers are patched as well.
GGML_API bool turbo_trusts_rpc(void);

// Null if the codec's kernels are usable, else one sentence in a static buffer: TURBOQUANT_KERNELS is invalid.
GGML_API const char * turbo_kernels_error(void);

// The name of the selected kernels.
GGML_API const char * turbo_kernels_name(void);
