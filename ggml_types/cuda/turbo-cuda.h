// turbo-cuda.h: the functions that the hooks in ggml-cuda call. turbo-cuda.cu, a part of ggml-cuda, defines them.
//
// HIP and MUSA builds compile the same sources of ggml without the turbo kernels, so they refuse the types.
#pragma once

#include "ggml/turbo-ops.h"

#include <functional>

struct ggml_backend_cuda_context;
struct ggml_cgraph;

// Keeps the memory of a tensor until node `until` is computed.
using turbo_keep = std::function<void(ggml_tensor * tensor, ggml_tensor * until)>;

// True if op reads or writes a turbo type. Then turbo_cuda_supports_op alone determines whether it is supported.
inline bool turbo_cuda_touches(const ggml_tensor * op) { return turbo_op_kind(op) != turbo_op::untouched; }

#if defined(GGML_USE_HIP) || defined(GGML_USE_MUSA)

inline bool turbo_cuda_supports_op(int, const ggml_tensor * op) { return turbo_op_kind(op) == turbo_op::view; }
inline bool turbo_cuda_set_rows(ggml_backend_cuda_context &, ggml_tensor *) { return false; }
inline bool turbo_cuda_get_rows(ggml_backend_cuda_context &, ggml_tensor *) { return false; }
inline bool turbo_cuda_cpy(ggml_backend_cuda_context &, const ggml_tensor *, ggml_tensor *) { return false; }
inline bool turbo_cuda_flash_attn_ext(ggml_backend_cuda_context &, ggml_tensor *) { return false; }
inline int  turbo_cuda_try_fuse(ggml_backend_cuda_context &, const ggml_cgraph *, int) { return 0; }
inline const void * turbo_cuda_quantized_output(ggml_backend_cuda_context &, const ggml_tensor *, const ggml_tensor *) {
    return nullptr;
}
inline void turbo_cuda_arrange(ggml_cgraph *, const turbo_keep &) {}

#else

// True if CUDA device number `device` can compute op, which must have a turbo type: if op is a view, a copy of bytes,
// which ggml computes, or one of the ops that the functions below compute. The tensors of op need no memory.
bool turbo_cuda_supports_op(int device, const ggml_tensor * op);

// Each of these functions computes an op with a turbo type, which must be supported. It returns false, and does
// nothing, if the op has no turbo type or only copies bytes. It aborts on errors, as ggml does.
bool turbo_cuda_set_rows(ggml_backend_cuda_context & ctx, ggml_tensor * dst);
bool turbo_cuda_get_rows(ggml_backend_cuda_context & ctx, ggml_tensor * dst);
bool turbo_cuda_cpy(ggml_backend_cuda_context & ctx, const ggml_tensor * src, ggml_tensor * dst);
bool turbo_cuda_flash_attn_ext(ggml_backend_cuda_context & ctx, ggml_tensor * dst);

// If node `at` and the next node that computes something store K and V in turbo types, or are RoPE of queries and keys
// of a turbo type, one kernel computes both. Returns the number of nodes after `at` that the caller must skip, or 0 if
// nothing was computed.
int turbo_cuda_try_fuse(ggml_backend_cuda_context & ctx, const ggml_cgraph * graph, int at);

// The rows of `values` as blocks of q8_1 without gaps, if attention has written them for the product with `weights`;
// else nullptr.
const void * turbo_cuda_quantized_output(ggml_backend_cuda_context & ctx, const ggml_tensor * weights,
                                         const ggml_tensor * values);

// Moves the RoPE ops together that turbo_cuda_try_fuse computes in one launch (turbo-graph.h). Must be called before
// the memory of the graph is allocated. keep: nullptr if the backend cannot keep memory; then nothing is moved.
void turbo_cuda_arrange(ggml_cgraph * graph, const turbo_keep & keep);

#endif
