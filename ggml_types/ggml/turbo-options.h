// turbo-options.h: the options as rows, and the other environment variables. The header is C++; the functions are
// exported from ggml-base.
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
    float       guard = 1.0f;              // limit of score noise in nats; 0 = off. docs/guard.md explains the default
    int         boundary_layers = 0;       // attention layers at each end whose V has boundary_type; 0 = off
    ggml_type   boundary_type = GGML_TYPE_Q8_0;
    float       sparse_v = 1e-6f;          // threshold of relative weights, see turbo_sparse_v; 0 = off
    int         window = 256;              // tokens of the exact window; 0 = off. docs/window.md explains the default
    ggml_type   window_type = GGML_TYPE_Q8_0; // of the window's slots: q8_0 or f16
    // Whether the option, given on a command line, sets the types of the cache, or of the draft model's cache, to auto.
    bool        auto_types = false;
    bool        auto_types_draft = false;
};

// One option. The command line, the environment and the error messages use these rows.
struct turbo_option {
    const char * flag;     // "--cache-guard"
    const char * variable; // environment variable: "LLAMA_ARG_CACHE_GUARD"
    const char * values;   // "off|LIMIT", for --help
    const char * help;     // for --help
    // Sets the option's fields of `options`; an empty text stands for the default. If the text is invalid, the result
    // is false, and `wrong` is the rest of a sentence that begins with the flag and the text.
    bool (*parse)(const std::string & text, turbo_options & options, std::string & wrong);
};

// The rows of the options; index is less than TURBO_OPTION_COUNT.
constexpr size_t TURBO_OPTION_COUNT = 6;
GGML_API const turbo_option & turbo_option_row(size_t index);

// Sets the option's fields of `options`. False, with one sentence in `error`, if the text is invalid for the option.
GGML_API bool turbo_option_parse(const turbo_option & option, const std::string & text, turbo_options & options,
                                 std::string & error);

// Reads all options from the environment; options whose variable is not set stay unchanged. False, with one sentence in
// `error`, if one is invalid.
GGML_API bool turbo_options_from_env(turbo_options & options, std::string & error);

// Passes the value of the option with this flag to libllama and ggml, by setting its variable. The value must be valid;
// an unknown flag is ignored.
GGML_API void turbo_option_to_env(const char * flag, const char * text);

// The threshold of sparse V: rows of V are not read if their softmax weights, relative to the largest weight of the
// query row so far, are at most this for all queries that read the rows together. The variables are read once. If the
// variable of an option is invalid, which context creation refuses, the result is the default.
GGML_API float turbo_sparse_v(void);

// ---- variables that are not options --------------------------------------------------------------------------------

// TURBOQUANT_GENERIC_ATTENTION: if true, the CPU's fused attention is off, for comparisons and as a workaround. The
// variable is read once; empty and "0" mean false.
GGML_API bool turbo_generic_attention(void);

// TURBOQUANT_RPC: if true, remote servers are declared to be patched as well. Any value means true.
GGML_API bool turbo_trusts_rpc(void);

// Null if the codec's kernels are usable. If TURBOQUANT_KERNELS is invalid, the result is a sentence that says so, in
// static memory.
GGML_API const char * turbo_kernels_error(void);

// The name of the codec's kernels in use: "scalar" if TURBOQUANT_KERNELS is invalid.
GGML_API const char * turbo_kernels_name(void);
