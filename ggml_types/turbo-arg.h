// turbo-arg.h: the command-line options that the cache types bring. Included by common/arg.cpp.
#pragma once

#include "turbo-ggml.h"

#include "arg.h"

#include <stdexcept>
#include <string>

// The values reach libllama and ggml through the environment, so that llama.cpp's parameter structs stay as they are and
// programs that do not use common (llama-bench) have the options too.
template <typename AddOption> void turbo_add_options(AddOption && add_opt) {
    add_opt(common_arg(
        {"--cache-boundary-v"}, "N[:TYPE]",
        "keep V of the first and the last N attention layers in TYPE, a KV cache data type (default: q8_0),\n"
        "where it has more bits per value than the type that -ctv gives (default: 0 = off)",
        [](common_params & params, const std::string & value) {
            (void) params;
            turbo_boundary boundary;
            char           error[512];
            if (!turbo_boundary_parse(value.c_str(), &boundary, error, sizeof(error))) {
                throw std::invalid_argument(error);
            }
            turbo_option_to_env(TURBO_BOUNDARY_ENV, value.c_str());
        }
    ).set_env(TURBO_BOUNDARY_ENV));
    add_opt(common_arg(
        {"--cache-sparse-v"}, "X",
        "with a turbo KV cache: do not read rows of V whose softmax weight, relative to the row's largest,\n"
        "is at most X (default: 1e-6, 0 = off)",
        [](common_params & params, const std::string & value) {
            (void) params;
            float threshold;
            char  error[512];
            if (!turbo_sparse_v_parse(value.c_str(), &threshold, error, sizeof(error))) {
                throw std::invalid_argument(error);
            }
            turbo_option_to_env(TURBO_SPARSE_V_ENV, value.c_str());
        }
    ).set_env(TURBO_SPARSE_V_ENV));
}
