// turbo-arg.h: the options on the command line. Included by common/arg.cpp.
#pragma once

#include "ggml/turbo-options.h"

#include "arg.h"
#include "log.h"

#include <cstdlib>
#include <stdexcept>
#include <string>
#include <utility>

// common's logger writes in a thread of its own and is never destroyed. Without the flush a program on a busy machine
// loses its last lines, which may be its results.
inline void turbo_flush_log_at_exit() {
#ifndef _WIN32 // there, other threads have already ended at exit
    static const int registered = std::atexit([]() { common_log_flush(common_log_main()); });
    (void) registered;
#endif
}

// common accepts a plain function for each option, so the row is a template argument.
template <size_t Row> void turbo_take_option(common_params & params, const std::string & value) {
    const turbo_option & option = turbo_option_row(Row);
    turbo_options        options;
    std::string          error;
    if (!turbo_option_parse(option, value, options, error)) {
        throw std::invalid_argument(error);
    }
    turbo_option_to_env(option.flag, value.c_str());
    if (options.auto_types) {
        params.cache_type_k = params.cache_type_v = GGML_TYPE_TURBO_AUTO;
    }
    if (options.auto_types_draft) {
        params.speculative.draft.cache_type_k = params.speculative.draft.cache_type_v = GGML_TYPE_TURBO_AUTO;
    }
}

template <typename AddOption, size_t... Row>
void turbo_add_options(AddOption & add_opt, std::index_sequence<Row...>) {
    (add_opt(common_arg({ turbo_option_row(Row).flag }, turbo_option_row(Row).values, turbo_option_row(Row).help,
                        turbo_take_option<Row>).set_env(turbo_option_row(Row).variable)), ...);
}

// Hook after the option -ctv.
template <typename AddOption> void turbo_add_options(AddOption && add_opt) {
    turbo_flush_log_at_exit();
    turbo_add_options(add_opt, std::make_index_sequence<TURBO_OPTION_COUNT>());
}
