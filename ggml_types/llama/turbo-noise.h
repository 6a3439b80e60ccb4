// turbo-noise.h: what the weights of a model say about its keys and queries before any token was seen. Part of libllama.
#pragma once

#include "ggml.h"

#include <cstdint>
#include <string>
#include <vector>

struct llama_model;

// Expected powers of the keys and queries of one layer, from weights alone: the input of W_k and W_q is taken as noise
// of unit power times the weights of the norm before them. RoPE leaves the power of a rotary pair as it is.
struct turbo_layer_power {
    std::string        unknown;   // why they cannot be predicted; empty if they can
    uint32_t           head = 0;  // values in a head
    float              scale = 0; // what q·k is multiplied by
    bool               adjacent = false; // a rotary pair is two neighbours, not a channel of each half of the head
    double             raw_k = 0; // mean over the channels of W_k's and its bias' output; 0 if it could not be computed
    std::vector<float> k;         // E k_c^2, (n_head_kv * head), as attention sees them
    std::vector<float> q;         // E q_c^2, (n_head * head)
};

// The powers of all layers of the model; those without attention are unknown with an empty K. Multiplies the weights
// with a few random vectors on the devices that hold them, so any weight type and layout will do.
std::vector<turbo_layer_power> turbo_predict_powers(const llama_model & model, int n_threads);

// The standard deviation, in nats, of the error that keys of that type cause in a score: the mean of the query heads that
// read the keys of `cache`, as one head that sees nothing but noise does little harm. Queries of other layers that read
// the same cache are passed as `reader`. rotated: llama.cpp rotates keys of types that do not rotate for themselves.
double turbo_score_noise(const turbo_layer_power & cache, const turbo_layer_power & reader, ggml_type type,
                         bool rotated);
