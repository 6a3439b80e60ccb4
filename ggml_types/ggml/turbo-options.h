// turbo-options.h: the options, as rows, and everything else that the environment says. C++, exported from ggml-base.
//
// An option travels from the command line to libllama and ggml through its environment variable, so that llama.cpp's
// parameter structs stay as they are and programs that do not use common (llama-bench) have the options, too.
#pragma once

#include "ggml/turbo-types.h"

#include <cstddef>
#include <string>

// The values of all options, with their defaults.
struct turbo_options {
    std::string plan;                      // the plan's file; empty: none was named
    bool        plan_off = false;          // the plan in the model's metadata is not used, either
    std::string plan_draft;                // the same for the draft model
    float       guard = 1.0f;              // nats; 0 = off. docs/guard.md has the measurements behind the default.
    int         boundary_layers = 0;       // the first and the last so many attention layers; 0 = off
    ggml_type   boundary_type = GGML_TYPE_Q8_0;
    float       sparse_v = 1e-6f;          // 0 = off
    int         window = 256;              // the exact window: the newest so many tokens; 0 = off
    ggml_type   window_type = GGML_TYPE_Q8_0; // that they are kept in, too. docs/window.md has the measurements.
    // Whether the option, given on a command line, sets the types of the cache or of the draft model's to auto.
    bool        auto_types = false;
    bool        auto_types_draft = false;
};

// One option. All that knows options goes through these rows: the command line, the environment, the refusals.
struct turbo_option {
    const char * flag;     // "--cache-guard"
    const char * variable; // of the environment: "LLAMA_ARG_CACHE_GUARD"
    const char * values;   // "off|LIMIT", for --help
    const char * help;
    // Sets the option's fields of `options`; an empty text is the default. False, with the rest of a sentence that begins
    // with the flag and the text, if the text is wrong.
    bool (*parse)(const std::string & text, turbo_options & options, std::string & wrong);
};

constexpr size_t TURBO_OPTION_COUNT = 6;
GGML_API const turbo_option & turbo_option_row(size_t index);

// False, with one sentence in `error`, if the text is wrong for the option.
GGML_API bool turbo_option_parse(const turbo_option & option, const std::string & text, turbo_options & options,
                                 std::string & error);

// All options from the environment. False, with one sentence in `error`, if one is wrong.
GGML_API bool turbo_options_from_env(turbo_options & options, std::string & error);

// Hand an option's value, which must be right, to libllama and ggml.
GGML_API void turbo_option_to_env(const char * flag, const char * text);

// Sparse V: rows of V whose softmax weight, relative to the row's largest, is at most this are not read. It is read once;
// the default if it is wrong (context creation has refused it before).
GGML_API float turbo_sparse_v(void);

// ---- variables that are no options ---------------------------------------------------------------------------------

// TURBOQUANT_GENERIC_ATTENTION: for comparisons, and a way out for users. It is read once.
GGML_API bool turbo_generic_attention(void);

// TURBOQUANT_RPC: remote servers are patched, too.
GGML_API bool turbo_trusts_rpc(void);

// Null if the codec's kernels are usable, else one sentence (TURBOQUANT_KERNELS is wrong); in a static buffer.
GGML_API const char * turbo_kernels_error(void);

// The name of the kernels in use.
GGML_API const char * turbo_kernels_name(void);
