// turbo-guard.h: the guard, which stores K in a better type in layers with noisy scores. Part of libllama.
#pragma once

#include <vector>

struct turbo_layer_power;
struct turbo_layer_types;

// Gives K of each layer above the limit the next better type with which the predicted noise of its scores is within it.
void turbo_apply_guard(turbo_layer_types & chosen, const std::vector<turbo_layer_power> & powers);
