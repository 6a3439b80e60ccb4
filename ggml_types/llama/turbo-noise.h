// turbo-noise.h: predicts properties of a model's keys and queries from its weights, without any token. Part of libllama.
#pragma once

#include "ggml.h"

#include <cstdint>
#include <string>
#include <vector>

struct llama_model;
struct turbo_model;

// Expected powers of the keys and queries of one layer, computed from the weights: the input of W_k and W_q is modelled as
// noise of unit power times the weights of the norm before them. RoPE does not change the power of a rotary pair.
struct turbo_layer_power {
    std::string        unknown;   // why the powers cannot be predicted; empty if they can
    uint32_t           head = 0;  // values per head
    float              scale = 0; // factor of q·k
    bool               adjacent = false; // whether a rotary pair is two adjacent channels (else one in each half)
    double             raw_k = 0; // mean over the channels of the output of W_k and its bias; 0 if unknown
    std::vector<float> k;         // E k_c^2, (n_head_kv * head), as attention sees them
    std::vector<float> q;         // E q_c^2, (n_head * head)
};

// The powers of all layers of the model; layers without attention are unknown and have an empty K. The weights are
// multiplied by a few random vectors on the devices that hold them, so that every weight type and layout works. `about`
// describes the model.
std::vector<turbo_layer_power> turbo_predict_powers(const llama_model & model, const turbo_model & about, int n_threads);

// The standard deviation, in nats, of the error of a score that keys of the type cause: the mean over the query heads that
// read the keys of `cache`, because a single head with high noise does little harm. `reader` has the queries, which may be
// those of another layer that reads the same cache. `rotated`: whether llama.cpp rotates keys of its own quantized types.
double turbo_score_noise(const turbo_layer_power & cache, const turbo_layer_power & reader, ggml_type type,
                         bool rotated);
