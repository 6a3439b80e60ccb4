// turbo-arg.h: the command-line options that the cache types bring. Included by common/arg.cpp.
#pragma once

#include "turbo-ggml.h"

#include "arg.h"
#include "log.h"

#include <cstdlib>
#include <stdexcept>
#include <string>

// common's logger writes in a thread of its own and is never destroyed: on a busy machine a program's last lines, its
// results among them, are lost at exit.
inline void turbo_flush_log_at_exit() {
#ifndef _WIN32 // where threads are gone by then
    static const int registered = std::atexit([]() { common_log_flush(common_log_main()); });
    (void) registered;
#endif
}

// The values reach libllama and ggml through the environment, so that llama.cpp's parameter structs stay as they are and
// programs that do not use common (llama-bench) have the options too.
template <typename AddOption> void turbo_add_options(AddOption && add_opt) {
    turbo_flush_log_at_exit();
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
