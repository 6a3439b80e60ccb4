// turbo-llama.h: the functions that the hooks in llama-context.cpp and llama-kv-cache.cpp call. Part of libllama.
#pragma once

#include "llama/turbo-layers.h"
#include "llama/turbo-mask.h"
#include "llama/turbo-rotation.h"
#include "llama/turbo-shift.h"

struct llama_context_params;

// Hook at the top of llama_init_from_model: selects the types of every layer, and refuses, with one sentence, what cannot
// work. Returns false if the context must not be created. Contexts without turbo types and without a plan stay unchanged.
bool turbo_init_context(const llama_model & model, llama_context_params & params);
