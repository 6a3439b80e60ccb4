// turbo-shift.h: refuses some context shifts. Part of libllama.
#pragma once

#include "ggml/turbo-types.h"
#include "llama/turbo-model.h"

#include <atomic>

// Hook in get_can_shift. The shift rotates the first n_rot values of a key in place. These must be whole blocks, and the
// copy to the cache must be contiguous, which is not so with a partial RoPE.
template <typename Layers, typename Hparams> bool turbo_refuses_shift(const Layers & layers, const Hparams & hparams) {
    for (const auto & layer : layers) {
        if (layer.k && turbo_is_type(layer.k->type) && hparams.n_rot(layer.il) != hparams.n_embd_head_k(layer.il)) {
            static std::atomic<bool> told{ false };
            if (!told.exchange(true)) {
                turbo_warn("no context shift: the model rotates %u of %u values of a key, and a block "
                        "of %s cannot be re-encoded in part; use another -ctk if you need it",
                        hparams.n_rot(layer.il), hparams.n_embd_head_k(layer.il), ggml_type_name(layer.k->type));
            }
            return true;
        }
    }
    return false;
}
