// turbo-options.cpp: the options' rows and parsers, and the other environment variables. Part of ggml-base.

#include "ggml/turbo-options.h"

#include "turboquant.h"

#include <cctype>
#include <cmath>
#include <cstdlib>
#include <cstring>

namespace {

// ---- parsers -------------------------------------------------------------------------------------------------------

bool is_file(const std::string & text) {
    return !text.empty() && text != "auto" && text != "off";
}

bool parse_plan(const std::string & text, turbo_options & options, std::string &) {
    options.plan       = is_file(text) ? text : "";
    options.plan_off   = text == "off";
    options.auto_types = text != "auto" && text != "off";
    return true;
}

bool parse_plan_draft(const std::string & text, turbo_options & options, std::string &) {
    options.plan_draft       = is_file(text) ? text : "";
    options.auto_types_draft = true;
    return true;
}

bool parse_guard(const std::string & text, turbo_options & options, std::string & wrong) {
    if (text.empty()) {
        return true;
    }
    char * end    = nullptr;
    options.guard = text == "off" ? 0.0f : strtof(text.c_str(), &end);
    wrong = "must be off, or the highest noise of a score in nats that is allowed, as in 3";
    return text == "off" || (!*end && options.guard > 0.0f && options.guard < INFINITY);
}

// Splits "N" or "N:TYPE"; without a type the name is empty. False if N is not a number of at most six digits, or if
// nothing follows the colon.
bool split_count(const std::string & text, int & count, std::string & name) {
    const size_t      colon  = text.find(':');
    const std::string number = text.substr(0, colon);
    if (number.empty() || number.size() > 6 || number.find_first_not_of("0123456789") != std::string::npos) {
        return false;
    }
    count = atoi(number.c_str());
    name  = colon == std::string::npos ? "" : text.substr(colon + 1);
    return colon == std::string::npos || !name.empty();
}

bool parse_window(const std::string & text, turbo_options & options, std::string & wrong) {
    if (text.empty()) {
        return true;
    }
    std::string name;
    wrong = "must be a number of tokens, or one and a type, q8_0 or f16, as in 256 or 256:f16";
    if (!split_count(text, options.window, name)) {
        return false;
    }
    for (const ggml_type type : { GGML_TYPE_Q8_0, GGML_TYPE_F16 }) {
        if (name == ggml_type_name(type)) {
            options.window_type = type;
            return true;
        }
    }
    return name.empty();
}

bool parse_boundary_v(const std::string & text, turbo_options & options, std::string & wrong) {
    if (text.empty()) {
        return true;
    }
    std::string name;
    if (!split_count(text, options.boundary_layers, name)) {
        wrong = "N must be a number of layers, as in 2 or 2:q8_0";
        return false;
    }
    if (name.empty()) {
        return true;
    }
    options.boundary_type  = turbo_cache_type_from_name(name.c_str());
    wrong = "unknown type '" + name + "'; known are ";
    for (int i = 0; turbo_cache_type(i) != GGML_TYPE_COUNT; ++i) {
        wrong += std::string(i ? ", " : "") + ggml_type_name(turbo_cache_type(i));
    }
    return options.boundary_type != GGML_TYPE_COUNT;
}

bool parse_sparse_v(const std::string & text, turbo_options & options, std::string & wrong) {
    if (text.empty()) {
        return true;
    }
    char * end       = nullptr;
    options.sparse_v = strtof(text.c_str(), &end);
    wrong = "must be a number from 0 (off) to below 1, as in 1e-6";
    return !*end && options.sparse_v >= 0.0f && options.sparse_v < 1.0f;
}

// ---- the rows ------------------------------------------------------------------------------------------------------

const turbo_option k_options[] = {
    { "--cache-plan", "LLAMA_ARG_CACHE_PLAN", "FILE|auto|off",
      "the plan for -ctk auto and -ctv auto, with types of K and V for each layer: a file that `turboquant tune` has\n"
      "written (sets -ctk and -ctv to auto, unless they follow); auto: the plan in the model's metadata, or\n"
      "turbo4_tcq and the guard if there is none (turbo4 if a GPU holds the cache); off: the same without the plan in\n"
      "the metadata (default: auto)",
      parse_plan },
    { "--cache-plan-draft", "LLAMA_ARG_CACHE_PLAN_DRAFT", "FILE",
      "the plan file for the draft model (sets -ctkd and -ctvd to auto, unless they follow)",
      parse_plan_draft },
    { "--cache-guard", "LLAMA_ARG_CACHE_GUARD", "off|LIMIT",
      "with a turbo type for K: layers whose attention scores it would blur by more than LIMIT (standard deviation,\n"
      "in nats) keep K in the next better type; off: all layers have the type of -ctk (default: 1)",
      parse_guard },
    { "--cache-window", "LLAMA_ARG_CACHE_WINDOW", "N[:TYPE]",
      "with a turbo type for K or V: keep the newest N tokens of every such layer in TYPE, too, q8_0 or f16, and\n"
      "attend to them there (default: 256:q8_0, 0 = off)",
      parse_window },
    { "--cache-boundary-v", "LLAMA_ARG_CACHE_BOUNDARY_V", "N[:TYPE]",
      "keep V of the first and the last N attention layers in TYPE, a KV cache data type (default: q8_0),\n"
      "where it has more bits per value than the type that -ctv gives (default: 0 = off)",
      parse_boundary_v },
    { "--cache-sparse-v", "LLAMA_ARG_CACHE_SPARSE_V", "X",
      "with a turbo KV cache: do not read rows of V whose softmax weight, relative to the row's largest,\n"
      "is at most X (default: 1e-6, 0 = off)",
      parse_sparse_v },
};
static_assert(sizeof(k_options) / sizeof(k_options[0]) == TURBO_OPTION_COUNT, "turbo-options.h counts the rows");

}  // namespace

const turbo_option & turbo_option_row(size_t index) {
    return k_options[index];
}

bool turbo_option_parse(const turbo_option & option, const std::string & text, turbo_options & options,
                        std::string & error) {
    std::string wrong;
    if (option.parse(text, options, wrong)) {
        return true;
    }
    error = std::string(option.flag) + " '" + text + "': " + wrong;
    return false;
}

bool turbo_options_from_env(turbo_options & options, std::string & error) {
    for (const turbo_option & option : k_options) {
        const char * text = getenv(option.variable);
        if (text && !turbo_option_parse(option, text, options, error)) {
            return false;
        }
    }
    return true;
}

void turbo_option_to_env(const char * flag, const char * text) {
    for (const turbo_option & option : k_options) {
        if (strcmp(option.flag, flag) == 0) {
#ifdef _WIN32
            _putenv_s(option.variable, text);
#else
            setenv(option.variable, text, 1);
#endif
        }
    }
}

float turbo_sparse_v(void) {
    static const float threshold = []() {
        turbo_options options;
        std::string   error;
        return turbo_options_from_env(options, error) ? options.sparse_v : turbo_options().sparse_v;
    }();
    return threshold;
}

// ---- variables that are not options ---------------------------------------------------------------------------------

bool turbo_generic_attention(void) {
    static const bool asked = []() {
        const char * text = getenv("TURBOQUANT_GENERIC_ATTENTION");
        return text && *text && strcmp(text, "0") != 0;
    }();
    return asked;
}

bool turbo_trusts_rpc(void) {
    return getenv("TURBOQUANT_RPC") != nullptr;
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
