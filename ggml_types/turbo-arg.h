// turbo-arg.h: the command-line option that the cache types bring. Included by common/arg.cpp.
#pragma once

#include "turbo-ggml.h"

#include "arg.h"

#include <stdexcept>
#include <string>

// --cache-boundary-v. The value reaches libllama through the environment, so that llama.cpp's parameter structs stay
// as they are and programs that do not use common (llama-bench) have the option too.
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
            turbo_boundary_to_env(value.c_str());
        }
    ).set_env(TURBO_BOUNDARY_ENV));
}
