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

// GGML_TYPE_COUNT stands for "no cache".
struct turbo_plan {
    std::string            origin; // the file, or the model's metadata
    std::vector<ggml_type> k;      // of each layer of the model
    std::vector<ggml_type> v;
    std::string            model;  // JSON; empty if the plan does not say which model it is for
};

// "q8_0*2,turbo4,-": names in the order of the layers, runs as NAME*COUNT, '-' for a layer without a cache.
std::string turbo_types_to_text(const std::vector<ggml_type> & types);

// The plan in a JSON file. False, with one sentence in `error`, if it cannot be read.
bool turbo_plan_read(const std::string & path, turbo_plan & plan, std::string & error);

// The plan in the model's metadata; `found` tells whether there is one.
bool turbo_plan_from_metadata(const llama_model & model, turbo_plan & plan, bool & found, std::string & error);

// Why the plan is not one for this model; empty if it is. Without powers (weights that are not loaded) they are not
// compared.
std::string turbo_plan_mismatch(const turbo_plan & plan, const llama_model & model,
                                const std::vector<turbo_layer_power> & powers);
#endif
