/*
 * turbo-metal.h: the functions that the hooks in ggml-metal call. turbo-metal.cpp, a part of ggml-metal, defines them.
 *
 * The header is C, C++ and Objective-C.
 */
#ifndef TURBO_METAL_H
#define TURBO_METAL_H

#include <stdbool.h>
#include <stddef.h>

#include "ggml.h"

#include "ggml-metal-device.h"

#ifdef __cplusplus
extern "C" {
#endif

/* True if op reads or writes a turbo type. Then turbo_metal_supports_op alone determines whether it is supported. */
bool turbo_metal_touches(const struct ggml_tensor * op);

/* True if the device can compute op, which must have a turbo type: if op is a view, or if turbo_metal_encode encodes
 * it. The tensors of op need no memory. The first call for a device compiles the kernels; if they do not compile, the
 * types are not supported. */
bool turbo_metal_supports_op(ggml_metal_device_t dev, const struct ggml_tensor * op);

/* Encodes the dispatches of an op with a turbo type, which must be supported. Returns false, and does nothing, if the
 * op has no turbo type. Aborts on errors, as ggml does. */
bool turbo_metal_encode(ggml_metal_device_t dev, ggml_metal_encoder_t enc, const struct ggml_tensor * op);

/* The bytes that a tensor with a turbo type, or an op with such a source, needs in a buffer. */
size_t turbo_metal_alloc_size(const struct ggml_tensor * tensor);

/* True for the source of the turbo kernels. */
bool turbo_metal_is_library(const char * source);

#ifdef __cplusplus
}
#endif

#endif
