// turbo-boundary.h: boundary V, which stores V of the first and the last layers in a better type. Part of libllama.
#pragma once

struct turbo_layer_types;
struct turbo_options;

// Sets the types of these layers. False, with a line in the log, if the type does not fit the heads of such a layer.
bool turbo_apply_boundary(turbo_layer_types & chosen, const turbo_options & options);
