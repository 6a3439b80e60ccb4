// turbo-mask.h: a template that fills the mask of attention faster than llama.cpp. Part of libllama.
#pragma once

#include "ggml/turbo-types.h"

#include "llama.h"

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <vector>

// The cells of a stream in which each token sees one run of cells.
struct turbo_mask_cells {
    int64_t                used = 0; // the first cells, which alone are used
    std::vector<llama_pos> pos;      // their positions in ascending order; empty if every token sees all of them
};

// Finds the cells for the tokens of a stream. False if it is not certain that each token sees one run of cells.
//
// all: of the cache, with those of the sequences that `seq_to_stream` lists. window: whether there is a sliding window.
template <typename Cells>
bool turbo_find_mask_cells(const Cells & all, llama_seq_id seq, const llama_pos * pos, int64_t tokens, int64_t n_kv,
                           bool window, size_t sequences, turbo_mask_cells & found) {
    found.used = all.get_used();
    if (found.used != (int64_t) all.used_max_p1() || found.used > n_kv) {
        return false;
    }
    for (llama_seq_id other = 0; other < (llama_seq_id) sequences; ++other) {
        if (other != seq && all.seq_pos_max(other) != -1) {
            return false;
        }
    }
    if (!window && all.seq_pos_max(seq) <= *std::min_element(pos, pos + tokens)) {
        return true;
    }
    found.pos.resize(found.used);
    for (int64_t i = 0; i < found.used; ++i) {
        found.pos[i] = all.pos_get(i);
    }
    return std::is_sorted(found.pos.begin(), found.pos.end());
}

// Fills the row of the mask, n_kv values, of a token that sees the cells from `first` to before `end`.
template <typename T> void turbo_fill_mask_row(T * row, int64_t n_kv, int64_t first, int64_t end, T hidden) {
    std::fill(row, row + first, hidden);
    std::fill(row + first, row + end, T()); // 0.0 has no bits, in F16 as well
    std::fill(row + end, row + n_kv, hidden);
}

// Hook in set_input_kq_mask. llama.cpp tests every cell for the first token of a sequence, which takes longer than
// attention on a GPU at long contexts, and copies the row for the other tokens. If the used cells of a stream are the
// first ones and belong to one sequence, and their positions ascend, each token sees one run of them.
//
// mask: F16 or F32, one row for each token. The other arguments are those of set_input_kq_mask and members of the cache.
// The result is false, and the mask stays unchanged, if it is not certain which cells are visible, or if the cache has
// no turbo type; llama.cpp's own code then fills the mask.
template <typename Ubatch, typename Layers, typename Hparams, typename Swa, typename Cells>
bool turbo_fill_mask(ggml_tensor * mask, const Ubatch & ubatch, bool causal, const Layers & layers,
                     const Hparams & hparams, uint32_t n_swa, Swa swa_type, const Cells & v_cells,
                     const std::vector<uint32_t> & seq_to_stream) {
    if (!causal || hparams.use_alibi || ubatch.is_pos_2d()) {
        return false;
    }
    bool turbo = false;
    for (const auto & layer : layers) {
        turbo = turbo || (layer.k && turbo_is_type(layer.k->type)) || (layer.v && turbo_is_type(layer.v->type));
    }
    if (!turbo) {
        return false;
    }
    const bool    window  = swa_type != Swa(); // LLAMA_SWA_TYPE_NONE is 0
    const int64_t n_kv    = mask->ne[0];
    const int64_t streams = mask->ne[3];
    const int64_t tokens  = ubatch.n_tokens / streams;

    std::vector<turbo_mask_cells> cells(streams);
    for (int64_t s = 0; s < streams; ++s) {
        const int64_t      first = s * tokens;
        const llama_seq_id seq   = ubatch.seq_id[first][0];
        for (int64_t i = first; i < first + tokens; ++i) {
            if (ubatch.seq_id[i][0] != seq) {
                return false;
            }
        }
        if (!turbo_find_mask_cells(v_cells.at(seq_to_stream[seq]), seq, ubatch.pos + first, tokens, n_kv, window,
                                   seq_to_stream.size(), cells[s])) {
            return false;
        }
    }
    for (int64_t i = 0; i < streams * tokens; ++i) {
        const turbo_mask_cells & seen  = cells[i / tokens];
        const llama_pos          pos   = ubatch.pos[i];
        int64_t                  first = 0, end = seen.used;
        if (!seen.pos.empty()) {
            const auto begin = seen.pos.begin(), last = std::upper_bound(begin, seen.pos.end(), pos);
            const auto left  = [&](llama_pos p) { return Hparams::is_masked_swa(n_swa, swa_type, p, pos); };
            first = std::partition_point(begin, last, left) - begin;
            end   = last - begin;
        }
        if (mask->type == GGML_TYPE_F16) {
            turbo_fill_mask_row((ggml_fp16_t *) mask->data + i * n_kv, n_kv, first, end, ggml_fp32_to_fp16(-INFINITY));
        } else {
            turbo_fill_mask_row((float *) mask->data + i * n_kv, n_kv, first, end, -INFINITY);
        }
    }
    return true;
}
