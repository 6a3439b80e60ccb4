// turbo-cuda.h: what the hooks in ggml-cuda call. Defined in turbo-cuda.cu, which is part of ggml-cuda.
//
// HIP and MUSA compile the same sources of ggml without our kernels: there the types are refused.
#pragma once

#include "ggml/turbo-ops.h"

struct ggml_backend_cuda_context;
struct ggml_cgraph;

// True if op reads or writes a turbo type: then turbo_cuda_supports_op alone decides.
inline bool turbo_cuda_touches(const ggml_tensor * op) { return turbo_op_kind(op) != turbo_op::untouched; }

#if defined(GGML_USE_HIP) || defined(GGML_USE_MUSA)

inline bool turbo_cuda_supports_op(int, const ggml_tensor * op) { return turbo_op_kind(op) == turbo_op::view; }
inline bool turbo_cuda_set_rows(ggml_backend_cuda_context &, ggml_tensor *) { return false; }
inline bool turbo_cuda_get_rows(ggml_backend_cuda_context &, ggml_tensor *) { return false; }
inline bool turbo_cuda_cpy(ggml_backend_cuda_context &, const ggml_tensor *, ggml_tensor *) { return false; }
inline bool turbo_cuda_flash_attn_ext(ggml_backend_cuda_context &, ggml_tensor *) { return false; }
inline int  turbo_cuda_try_fuse(ggml_backend_cuda_context &, const ggml_cgraph *, int) { return 0; }

#else

// Exactly what the functions below compute on the device.
bool turbo_cuda_supports_op(int device, const ggml_tensor * op);

// Each returns false, and does nothing, if the op has no turbo type that is its business.
bool turbo_cuda_set_rows(ggml_backend_cuda_context & ctx, ggml_tensor * dst);
bool turbo_cuda_get_rows(ggml_backend_cuda_context & ctx, ggml_tensor * dst);
bool turbo_cuda_cpy(ggml_backend_cuda_context & ctx, const ggml_tensor * src, ggml_tensor * dst);
bool turbo_cuda_flash_attn_ext(ggml_backend_cuda_context & ctx, ggml_tensor * dst);

// Computes node `at` together with nodes after it, and returns how many these are. K and V are stored by one kernel.
int turbo_cuda_try_fuse(ggml_backend_cuda_context & ctx, const ggml_cgraph * graph, int at);

#endif
