/*
 * turbo-cpu.h: what the hooks in ggml-cpu see. The functions are in turbo-cpu.cpp, which is part of ggml-cpu.
 */
#ifndef TURBO_CPU_H
#define TURBO_CPU_H

#include "ggml/turbo-traits.h"

#ifdef __cplusplus
extern "C" {
#endif

struct ggml_compute_params;

#ifndef __cplusplus /* the table is C */
#define TURBO_CPU_TRAITS_ROW(ID, name, FIRST, family, bits, block, bytes, id) \
    [GGML_TYPE_##ID] = {                             \
        .from_float   = turbo_encode_##name,         \
        .vec_dot      = turbo_dot_##name,            \
        .vec_dot_type = GGML_TYPE_TURBO_Q##block,    \
        .nrows        = 1,                           \
    },
#define TURBO_QUERY_CPU_TRAITS_ROW(ID, name, block, id) [GGML_TYPE_##ID] = { .from_float = turbo_prepare_##name, },
/* Rows of ggml-cpu.c's type_traits_cpu. */
#define TURBO_CPU_TRAITS TURBOQUANT_TYPES(TURBO_CPU_TRAITS_ROW) TURBO_QUERY_TYPES(TURBO_QUERY_CPU_TRAITS_ROW)
#endif

/* True if op reads or writes a turbo type in a way that ggml's CPU backend cannot compute (it would abort). */
bool turbo_cpu_refuses(const struct ggml_tensor * op);

/* GGML_OP_FLASH_ATTN_EXT with a turbo K or V: true if the fused engine computed it. */
bool turbo_cpu_compute_forward(const struct ggml_compute_params * params, struct ggml_tensor * op);
/* Raise *size to the scratch bytes that it needs. */
void turbo_cpu_work_size(int n_threads, const struct ggml_tensor * op, size_t * size);

#ifdef __cplusplus
}
#endif

#endif
