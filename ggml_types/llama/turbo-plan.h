// turbo-plan.h: plans, which name the types of K and V of each layer. Part of libllama; docs/tune.md has the format.
#pragma once

#include "ggml.h"

#include <stdbool.h>
#include <stddef.h>

struct llama_model;

#ifdef __cplusplus
extern "C" {
#endif

// The JSON object that identifies the model in a plan, as in "model" of a plan file. False if it does not fit `size`.
GGML_API bool turbo_plan_model_json(const struct llama_model * model, char * out, size_t size);

#ifdef __cplusplus
}

#include <cstdint>
#include <string>
#include <vector>

struct turbo_layer_power;
struct turbo_model;
struct turbo_options;

// GGML_TYPE_COUNT stands for a layer without a cache.
struct turbo_plan {
    std::string            origin; // the file, or the model's metadata
    std::vector<ggml_type> k;      // type of each layer of the model
    std::vector<ggml_type> v;
    std::string            model;  // JSON; empty if the plan does not name its model
};

// For example "q8_0*2,turbo4,-": names in the order of the layers, with NAME*COUNT for equal neighbours and '-' for a
// layer without a cache.
std::string turbo_types_to_text(const std::vector<ggml_type> & types);

enum class turbo_plan_state { none, found, refused };

// The plan for a context with a type "auto": the file that the options name for this model or for the draft model, or else
// the plan in the model's metadata. The log gives the reason for a refusal.
turbo_plan_state turbo_choose_plan(const llama_model & model, const turbo_model & about, const turbo_options & options,
                                   const std::vector<turbo_layer_power> & powers, turbo_plan & plan);

// The types of a plan, with the blocks that fit the heads; the log names `origin` if a type does not fit.
bool turbo_take_plan(const std::vector<ggml_type> & wanted, std::vector<ggml_type> & types, const turbo_model & model,
                     bool keys, const std::string & origin);
#endif
