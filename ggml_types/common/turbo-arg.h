// turbo-arg.h: the command-line options that the cache types bring. Included by common/arg.cpp.
#pragma once

#include "ggml/turbo-ggml.h"

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
        {"--cache-plan"}, "FILE|auto|off",
        "the plan for -ctk auto and -ctv auto, with types of K and V for each layer: a file that `turboquant tune` has\n"
        "written (sets -ctk and -ctv to auto, unless they follow); auto: the plan in the model's metadata, or\n"
        "turbo4 and the guard if there is none; off: turbo4 and the guard (default: auto)",
        [](common_params & params, const std::string & value) {
            turbo_option_to_env(TURBO_PLAN_ENV, value.c_str());
            if (value != "auto" && value != "off") {
                params.cache_type_k = params.cache_type_v = GGML_TYPE_TURBO_AUTO;
            }
        }
    ).set_env(TURBO_PLAN_ENV));
    add_opt(common_arg(
        {"--cache-plan-draft"}, "FILE",
        "the plan file for the draft model (sets -ctkd and -ctvd to auto, unless they follow)",
        [](common_params & params, const std::string & value) {
            turbo_option_to_env(TURBO_PLAN_DRAFT_ENV, value.c_str());
            params.speculative.draft.cache_type_k = params.speculative.draft.cache_type_v = GGML_TYPE_TURBO_AUTO;
        }
    ).set_env(TURBO_PLAN_DRAFT_ENV));
    add_opt(common_arg(
        {"--cache-guard"}, "off|LIMIT",
        "with a turbo type for K: layers whose attention scores it would blur by more than LIMIT (standard deviation,\n"
        "in nats) keep K in the next better type; off: all layers have the type of -ctk (default: 1)",
        [](common_params & params, const std::string & value) {
            (void) params;
            float limit;
            char  error[512];
            if (!turbo_guard_parse(value.c_str(), &limit, error, sizeof(error))) {
                throw std::invalid_argument(error);
            }
            turbo_option_to_env(TURBO_GUARD_ENV, value.c_str());
        }
    ).set_env(TURBO_GUARD_ENV));
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
