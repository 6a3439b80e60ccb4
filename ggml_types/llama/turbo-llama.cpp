// turbo-llama.cpp: the steps that select the types of each layer's K and V when a context is created. Part of libllama.

#include "llama/turbo-llama.h"

#include "ggml/turbo-options.h"
#include "llama/turbo-boundary.h"
#include "llama/turbo-devices.h"
#include "llama/turbo-guard.h"
#include "llama/turbo-noise.h"
#include "llama/turbo-plan.h"

#include "llama.h"

#include <string>
#include <utility>

static bool fail(const std::string & error) {
    turbo_error("%s", error.c_str());
    return false;
}

// Logs the selected types. `plan` is the origin of the plan in use, or null.
static void log_choice(const turbo_layer_types & chosen, const llama_context_params & params, bool guarded,
                       const std::string * plan, const char * sides) {
    if (guarded) {
        std::string sigmas;
        for (const uint32_t il : turbo_cached_layers(chosen.about)) {
            sigmas += (sigmas.empty() ? "" : ", ") + turbo_number(chosen.sigma[il]);
        }
        turbo_info("guard: noise of scores with K in %s, by layer: %s (limit %s)", ggml_type_name(chosen.asked_k),
                   sigmas.c_str(), turbo_number(chosen.limit).c_str());
    }
    if (plan) {
        turbo_info("the plan in %s sets the types of %s", plan->c_str(), sides);
    }
    const double bits_k = turbo_mean_bits(chosen.k, chosen.about, true);
    const double bits_v = chosen.about.mla ? bits_k : turbo_mean_bits(chosen.v, chosen.about, false);
    turbo_info("K %s (%.4g bits per value), V %s (%.4g bits per value), %s kernels", ggml_type_name(params.type_k), bits_k,
               ggml_type_name(params.type_v), bits_v, turbo_kernels_name());
    turbo_info("cache types: K %s; V %s", turbo_types_to_text(chosen.k).c_str(), turbo_types_to_text(chosen.v).c_str());
}

bool turbo_init_context(const llama_model & model, llama_context_params & params) {
    turbo_chosen_types() = turbo_layer_types();
    if (const char * error = turbo_kernels_error()) {
        return fail(error);
    }
    turbo_options options;
    std::string   error;
    if (!turbo_options_from_env(options, error)) {
        return fail(error);
    }
    const bool auto_k = params.type_k == GGML_TYPE_TURBO_AUTO;
    const bool auto_v = params.type_v == GGML_TYPE_TURBO_AUTO;
    const bool turbo  = turbo_is_type(params.type_k) || turbo_is_type(params.type_v) || auto_k || auto_v;
    if (!turbo && options.boundary_layers == 0) {
        return true;
    }

    turbo_layer_types chosen;
    chosen.model = &model;
    chosen.about = turbo_describe_model(model);
    chosen.limit = options.guard;
    chosen.window      = options.window;
    chosen.window_type = options.window_type;
    const turbo_model & about = chosen.about;

    // The guard needs the powers for keys in turbo types, and a plan for the comparison with the model.
    const bool predict = auto_k || auto_v || (turbo_is_type(params.type_k) && chosen.limit > 0.0f);
    const std::vector<turbo_layer_power> powers =
            predict ? turbo_predict_powers(model, about, params.n_threads_batch) : std::vector<turbo_layer_power>();
    turbo_plan             plan;
    const turbo_plan_state planned =
            auto_k || auto_v ? turbo_choose_plan(model, about, options, powers, plan) : turbo_plan_state::none;
    if (planned == turbo_plan_state::refused) {
        return false;
    }
    const bool plan_k = planned == turbo_plan_state::found && auto_k;
    const bool plan_v = planned == turbo_plan_state::found && auto_v;
    const bool flash_attention = params.flash_attn_type != LLAMA_FLASH_ATTN_TYPE_DISABLED;
    if (auto_k || auto_v) {
        const ggml_type type = turbo_auto_type(about, params.offload_kqv);
        params.type_k = auto_k ? type : params.type_k;
        params.type_v = auto_v ? type : params.type_v;
    }

    // llama.cpp requires the same type for K and V of multi-head latent attention.
    const bool same = about.mla && params.type_k == params.type_v;
    if (!plan_k && !turbo_resolve_type(params.type_k, about, true)) {
        return false;
    }
    if (same) {
        params.type_v = params.type_k;
    } else if (!plan_v && !turbo_resolve_type(params.type_v, about, false)) {
        return false;
    }
    chosen.k.assign(about.layers.size(), GGML_TYPE_COUNT);
    chosen.v.assign(about.layers.size(), GGML_TYPE_COUNT);
    chosen.sigma.assign(about.layers.size(), 0.0);
    for (const uint32_t il : turbo_cached_layers(about)) {
        chosen.k[il] = params.type_k;
        chosen.v[il] = about.mla ? GGML_TYPE_COUNT : params.type_v;
    }
    if ((plan_k && !turbo_take_plan(plan.k, chosen.k, about, true, plan.origin)) ||
        (plan_v && !turbo_take_plan(plan.v, chosen.v, about, false, plan.origin))) {
        return false;
    }
    if (plan_k) {
        params.type_k = turbo_common_type(chosen.k);
    }
    if (plan_v) {
        params.type_v = about.mla ? params.type_k : turbo_common_type(chosen.v);
    }
    chosen.asked_k = params.type_k;
    chosen.inner_v = chosen.v;
    const bool guarded = !plan_k && turbo_is_type(params.type_k) && chosen.limit > 0.0f;
    if (guarded) {
        turbo_apply_guard(chosen, powers);
    }
    if (!turbo_apply_boundary(chosen, options) ||
        (params.offload_kqv && !turbo_check_devices(chosen, flash_attention))) {
        return false;
    }
    if (flash_attention) {
        turbo_choose_windows(chosen, params.offload_kqv);
    }
    const char * sides = plan_k && plan_v ? "K and V" : plan_k ? "K" : "V";
    log_choice(chosen, params, guarded, planned == turbo_plan_state::found ? &plan.origin : nullptr, sides);
    turbo_chosen_types() = std::move(chosen);
    return true;
}
