// turbo-count.h: counts which code computes attention over the types, and RoPE before it, for benchmarks and tests. The functions are
// exported from ggml-base.
#pragma once

#include "ggml.h"

#include <cstdint>

// TURBOQUANT_COUNT: if true, calls are counted, and a program writes the counts to stderr when it ends, in lines as
// "turboquant: count 64 attention by the decode kernel, tokens 1, streams 1". The variable is read once; empty and "0"
// mean false. A CUDA graph calls nothing when it is launched again, so GGML_CUDA_DISABLE_GRAPHS=1 must be set as well
// to count all calls.
GGML_API bool turbo_counts(void);

// Counts one call, if calls are counted. tokens: of a stream. Threads may call it at the same time.
GGML_API void turbo_count(const char * what, int64_t tokens, int64_t streams);
