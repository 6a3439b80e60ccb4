// turbo-llama.h: what libllama does with the TurboQuant types: the hooks in llama-context.cpp and llama-kv-cache.cpp.
#pragma once

#include "ggml/turbo-ggml.h"
#include "llama/turbo-rotation.h"

#include "llama-batch.h"
#include "llama-hparams.h"
#include "llama-impl.h"
#include "llama-model.h"

#include "ggml-backend.h"

#include <algorithm>
#include <atomic>
#include <cmath>
#include <string>
#include <vector>

// True if layer il stores keys and values of tokens (and not only a recurrent state, or none of its own).
inline bool turbo_has_cache(const llama_hparams & hparams, uint32_t il) {
    return hparams.has_kv(il) && !hparams.is_recr(il) && hparams.n_head_kv(il) > 0;
}

// ---- context creation ----------------------------------------------------------------------------------------------

// Hook at the top of llama_init_from_model: chooses the types of every layer (turbo-llama.cpp) and refuses, with one
// sentence, what could not work. Returns false if the context must not be made. Leaves contexts without turbo types and
// without a plan alone.
bool turbo_init_context(const llama_model & model, llama_context_params & params);

// ---- types per layer -----------------------------------------------------------------------------------------------

// Hook in the cache's constructor, after K and V (which may be null) of layer il were made in a context without memory:
// gives them the types that turbo_init_context chose in this thread. A cache for something else than the model's own
// attention, as of an indexer, comes with hparams of its own and stays as it is.
void turbo_set_layer_types(ggml_tensor * k, ggml_tensor * v, const llama_model & model, const llama_hparams & hparams,
                           uint32_t il);

// One cached layer, for the log.
struct turbo_logged_layer {
    uint32_t            il;
    const ggml_tensor * k;
    const ggml_tensor * v;
};
void turbo_log_types(const std::vector<turbo_logged_layer> & layers, const llama_model & model);

// Hook at the constructor's size line, which knows one type of K and one of V only.
template <typename Layers> void turbo_log_layer_types(const Layers & layers, const llama_model & model) {
    std::vector<turbo_logged_layer> list;
    for (const auto & layer : layers) {
        list.push_back({ layer.il, layer.k, layer.v });
    }
    turbo_log_types(list, model);
}

// ---- context shift -------------------------------------------------------------------------------------------------

// Hook in get_can_shift. The shift rotates the first n_rot values of a key in place; they must be whole blocks, and the
// copy back must be contiguous. With a partial RoPE they are not.
template <typename Layers> bool turbo_refuses_shift(const Layers & layers, const llama_hparams & hparams) {
    for (const auto & layer : layers) {
        if (layer.k && turbo_is_type(layer.k->type) && hparams.n_rot(layer.il) != hparams.n_embd_head_k(layer.il)) {
            static std::atomic<bool> told{ false };
            if (!told.exchange(true)) {
                LLAMA_LOG_WARN("turboquant: no context shift: the model rotates %u of %u values of a key, and a block "
                        "of %s cannot be re-encoded in part; use another -ctk if you need it\n",
                        hparams.n_rot(layer.il), hparams.n_embd_head_k(layer.il), ggml_type_name(layer.k->type));
            }
            return true;
        }
    }
    return false;
}

// ---- the mask -------------------------------------------------------------------------------------------------------

// Hook in set_input_kq_mask, for the one token of a decode step. Upstream asks every cell of the cache, which at long
// contexts takes longer than attention on a GPU. If the cells in use come first and all belong to the token's sequence,
// and no position lies after the token's, then these cells are visible and the others are not. False if that is not
// certain, or if the cache has no turbo type: then upstream goes on.
template <typename Layers, typename Cells>
bool turbo_fill_mask(ggml_tensor * mask, const llama_ubatch & ubatch, bool causal, const Layers & layers,
                     const llama_hparams & hparams, bool window, const Cells & v_cells,
                     const std::vector<uint32_t> & seq_to_stream) {
    if (ubatch.n_tokens != 1 || mask->ne[3] != 1 || !causal || window || hparams.use_alibi || ubatch.is_pos_2d()) {
        return false;
    }
    bool turbo = false;
    for (const auto & layer : layers) {
        turbo = turbo || (layer.k && turbo_is_type(layer.k->type)) || (layer.v && turbo_is_type(layer.v->type));
    }
    const llama_seq_id seq   = ubatch.seq_id[0][0];
    const auto &       cells = v_cells.at(seq_to_stream[seq]);
    const int64_t      used  = cells.get_used();
    if (!turbo || used != (int64_t) cells.used_max_p1() || used > mask->ne[0] || cells.seq_pos_max(seq) > ubatch.pos[0]) {
        return false;
    }
    for (llama_seq_id other = 0; other < LLAMA_MAX_SEQ; ++other) {
        if (other != seq && cells.seq_pos_max(other) != -1) {
            return false;
        }
    }
    if (mask->type == GGML_TYPE_F16) {
        auto * row = (ggml_fp16_t *) mask->data;
        std::fill(row, row + used, ggml_fp32_to_fp16(0.0f));
        std::fill(row + used, row + mask->ne[0], ggml_fp32_to_fp16(-INFINITY));
    } else {
        auto * row = (float *) mask->data;
        std::fill(row, row + used, 0.0f);
        std::fill(row + used, row + mask->ne[0], -INFINITY);
    }
    return true;
}
