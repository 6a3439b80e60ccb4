// turbo-mask.h: a template that fills the mask of a decode step faster than llama.cpp. Part of libllama.
#pragma once

#include "ggml/turbo-types.h"

#include "llama.h"

#include <algorithm>
#include <cmath>
#include <vector>

// Hook in set_input_kq_mask, for the single token of a decode step. llama.cpp tests every cell, which takes longer than
// attention on a GPU at long contexts. If the used cells are the first ones, belong to the token's sequence alone, and
// have no later position than the token, these cells are visible and the others are not.
//
// mask: F16 or F32, of which one row is filled. window: whether the cache has a sliding window. The other arguments are
// those of set_input_kq_mask and members of the cache. The result is false, and the mask stays unchanged, if it is not
// certain which cells are visible, or if the cache has no turbo type; llama.cpp's own code then fills the mask.
template <typename Ubatch, typename Layers, typename Hparams, typename Cells>
bool turbo_fill_mask(ggml_tensor * mask, const Ubatch & ubatch, bool causal, const Layers & layers,
                     const Hparams & hparams, bool window, const Cells & v_cells,
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
    // seq_to_stream has an entry for each sequence that the cache can have.
    for (llama_seq_id other = 0; other < (llama_seq_id) seq_to_stream.size(); ++other) {
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
