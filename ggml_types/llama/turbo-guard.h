// turbo-guard.h: the guard, which keeps K of layers whose scores it would blur in a better type. Part of libllama.
#pragma once

#include <vector>

struct turbo_layer_power;
struct turbo_layer_types;

// Keep K of each layer in the next type that holds the predicted noise of its scores below the limit.
void turbo_apply_guard(turbo_layer_types & chosen, const std::vector<turbo_layer_power> & powers);
