// turbo-layers.h: the types of K and V of each layer that are selected for the context that this thread creates, and the
// hooks in the cache's constructor that use them. Part of libllama.
#pragma once

#include "llama/turbo-model.h"

#include "ggml.h"

#include <cstdint>
#include <vector>

struct turbo_layer_types {
    const llama_model *    model = nullptr;
    turbo_model            about;
    std::vector<ggml_type> k;                         // of each layer of the model; GGML_TYPE_COUNT without a cache
    std::vector<ggml_type> v;
    ggml_type              asked_k = GGML_TYPE_COUNT; // before the guard
    std::vector<ggml_type> inner_v;                   // before boundary V
    std::vector<double>    sigma;                     // score noise of asked_k in each layer; 0: not known or not asked for
    float                  limit = 0.0f;              // of the guard
    int                    window = 0;                // tokens of the exact window; 0 = off
    ggml_type              window_type = GGML_TYPE_Q8_0;
    std::vector<bool>      windowed;                  // the layers that have one
};

// The types for the context that this thread creates. llama_init_from_model also creates the cache.
turbo_layer_types & turbo_chosen_types();

// Replaces one of the context's types by the one with the longest block that divides the heads of all layers. False, with
// a line in the log, if there is none.
bool turbo_resolve_type(ggml_type & type, const turbo_model & model, bool keys);

// The type that llama.cpp uses as the type of the whole cache. It determines the rotation (turbo types have their own, and
// get none from llama.cpp) and flash attention (which quantized V requires).
ggml_type turbo_common_type(const std::vector<ggml_type> & types);

// The mean of the bits per value over all layers.
double turbo_mean_bits(const std::vector<ggml_type> & types, const turbo_model & model, bool keys);

// ---- hooks ---------------------------------------------------------------------------------------------------------

// Hook in the cache's constructor, after K and V (which may be null) of layer il are created in a context without memory:
// sets their selected types. A cache that is not for the model's own attention, for example that of an indexer, has
// hparams of its own and stays unchanged.
void turbo_set_layer_types(ggml_tensor * k, ggml_tensor * v, const llama_model & model, const llama_hparams & hparams,
                           uint32_t il);

// One cached layer, for the log.
struct turbo_logged_layer {
    uint32_t            il;
    const ggml_tensor * k;
    const ggml_tensor * v;
};
void turbo_log_types(const std::vector<turbo_logged_layer> & layers, const llama_model & model);

// Hook after the constructor's log line with the size, which names only one type of K and one of V.
template <typename Layers> void turbo_log_layer_types(const Layers & layers, const llama_model & model) {
    std::vector<turbo_logged_layer> list;
    for (const auto & layer : layers) {
        list.push_back({ layer.il, layer.k, layer.v });
    }
    turbo_log_types(list, model);
}
