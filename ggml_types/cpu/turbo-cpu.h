/*
 * turbo-cpu.h: the functions and tables that the hooks in ggml-cpu use. turbo-cpu.cpp, a part of ggml-cpu, defines them.
 */
#ifndef TURBO_CPU_H
#define TURBO_CPU_H

#include "ggml/turbo-traits.h"

#ifdef __cplusplus
extern "C" {
#endif

struct ggml_compute_params;

#ifndef __cplusplus /* the table is in a C file */
#define TURBO_CPU_TRAITS_ROW(ID, name, FIRST, family, bits, block, bytes, id) \
    [GGML_TYPE_##ID] = {                             \
        .from_float   = turbo_encode_##name,         \
        .vec_dot      = turbo_dot_##name,            \
        .vec_dot_type = GGML_TYPE_TURBO_Q##block,    \
        .nrows        = 1,                           \
    },
#define TURBO_QUERY_CPU_TRAITS_ROW(ID, name, block, id) [GGML_TYPE_##ID] = { .from_float = turbo_prepare_##name, },
/* The types' rows of type_traits_cpu in ggml-cpu.c. */
#define TURBO_CPU_TRAITS TURBOQUANT_TYPES(TURBO_CPU_TRAITS_ROW) TURBO_QUERY_TYPES(TURBO_QUERY_CPU_TRAITS_ROW)
#endif

/* True if op reads or writes a turbo type in a way that ggml's CPU backend does not support, so that it would abort. */
bool turbo_cpu_refuses(const struct ggml_tensor * op);

/* Computes a thread's share of GGML_OP_FLASH_ATTN_EXT with a turbo K or V; all params->nth threads call it. False,
 * without an effect, if the fused attention does not cover op, if params->use_ref is set, or if params->wsize is less
 * than turbo_cpu_work_size requires. If op has an exact window, which ggml's attention would ignore, it aborts instead. */
bool turbo_cpu_compute_forward(const struct ggml_compute_params * params, struct ggml_tensor * op);
/* Increases *size to the bytes of scratch memory that turbo_cpu_compute_forward needs for op with n_threads threads.
 * *size stays unchanged if it is large enough, and for other ops. */
void turbo_cpu_work_size(int n_threads, const struct ggml_tensor * op, size_t * size);

#ifdef __cplusplus
}
#endif

#endif
