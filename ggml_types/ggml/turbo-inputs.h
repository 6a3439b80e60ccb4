// turbo-inputs.h: copies the inputs of a graph over a turbo cache to an NVIDIA GPU at once. ggml's scheduler waits for
// the GPU before and after each of them, about 9 us, and a step has eight. A template for a hook in ggml-backend.cpp,
// which leaves out graphs that several GPUs compute at the same time, because there the scheduler waits for less.
#pragma once

#include "ggml/turbo-count.h"
#include "ggml/turbo-ops.h"

#include "ggml-backend.h"

#include <cstring>

// Whether the scheduler's copy of an input may be a part of a stream of copies: from memory of the CPU to the backend's
// own memory. Weights are left to the scheduler, which may copy a part of them.
inline bool turbo_copies_from_host(ggml_backend_t backend, const ggml_tensor * from, const ggml_tensor * to) {
    return from->buffer && to->buffer && ggml_backend_buffer_is_host(from->buffer) &&
           ggml_backend_buffer_get_usage(from->buffer) != GGML_BACKEND_BUFFER_USAGE_WEIGHTS &&
           ggml_backend_buffer_get_type(to->buffer) == ggml_backend_get_default_buffer_type(backend) &&
           ggml_nbytes(from) == ggml_nbytes(to);
}

// Copies all inputs of a part of the graph to its backend, after the graph before, and waits for them, because their
// memory may change afterwards. copy_of: the copy of an input. Returns false, and does nothing, if the graph is not one
// over a turbo cache on an NVIDIA GPU, or if an input needs more than a copy from memory of the CPU.
template <typename CopyOf>
bool turbo_copy_inputs(ggml_backend_t backend, ggml_tensor * const * inputs, int n, const CopyOf & copy_of) {
    bool turbo = false;
    for (int i = 0; i < n; ++i) {
        turbo = turbo || turbo_is_mask_of_cache(inputs[i]);
    }
    const ggml_backend_dev_t device = turbo ? ggml_backend_get_device(backend) : nullptr;
    const ggml_backend_reg_t reg    = device ? ggml_backend_dev_backend_reg(device) : nullptr; // null for several GPUs
    if (!reg || strcmp(ggml_backend_reg_name(reg), "CUDA") != 0) {
        return false;
    }
    for (int i = 0; i < n; ++i) {
        if (!turbo_copies_from_host(backend, inputs[i], copy_of(inputs[i]))) {
            return false;
        }
    }
    for (int i = 0; i < n; ++i) {
        ggml_backend_tensor_set_async(backend, copy_of(inputs[i]), inputs[i]->data, 0, ggml_nbytes(inputs[i]));
    }
    ggml_backend_synchronize(backend);
    turbo_count("inputs copied at once", n, 1);
    return true;
}
