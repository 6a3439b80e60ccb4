// turbo-cuda.h: the functions that the hooks in ggml-cuda call. turbo-cuda.cu, a part of ggml-cuda, defines them.
//
// HIP and MUSA compile the same sources of ggml, but without the turbo kernels, so there the types are refused.
#pragma once

#include "ggml/turbo-ops.h"

struct ggml_backend_cuda_context;
struct ggml_cgraph;

// True if op reads or writes a turbo type; only turbo_cuda_supports_op decides about such an op.
inline bool turbo_cuda_touches(const ggml_tensor * op) { return turbo_op_kind(op) != turbo_op::untouched; }

#if defined(GGML_USE_HIP) || defined(GGML_USE_MUSA)

inline bool turbo_cuda_supports_op(int, const ggml_tensor * op) { return turbo_op_kind(op) == turbo_op::view; }
inline bool turbo_cuda_set_rows(ggml_backend_cuda_context &, ggml_tensor *) { return false; }
inline bool turbo_cuda_get_rows(ggml_backend_cuda_context &, ggml_tensor *) { return false; }
inline bool turbo_cuda_cpy(ggml_backend_cuda_context &, const ggml_tensor *, ggml_tensor *) { return false; }
inline bool turbo_cuda_flash_attn_ext(ggml_backend_cuda_context &, ggml_tensor *) { return false; }
inline int  turbo_cuda_try_fuse(ggml_backend_cuda_context &, const ggml_cgraph *, int) { return 0; }

#else

// True for exactly those ops that the functions below compute on the device.
bool turbo_cuda_supports_op(int device, const ggml_tensor * op);

// Each of these computes an op with a turbo type. It returns false, and does nothing, for other ops.
bool turbo_cuda_set_rows(ggml_backend_cuda_context & ctx, ggml_tensor * dst);
bool turbo_cuda_get_rows(ggml_backend_cuda_context & ctx, ggml_tensor * dst);
bool turbo_cuda_cpy(ggml_backend_cuda_context & ctx, const ggml_tensor * src, ggml_tensor * dst);
bool turbo_cuda_flash_attn_ext(ggml_backend_cuda_context & ctx, ggml_tensor * dst);

// Computes node `at` together with nodes after it, and returns their number: one kernel stores both K and V.
int turbo_cuda_try_fuse(ggml_backend_cuda_context & ctx, const ggml_cgraph * graph, int at);

#endif
