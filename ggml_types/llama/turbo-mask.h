// turbo-mask.h: a template that fills the mask of attention faster than llama.cpp. Part of libllama.
#pragma once

#include "ggml/turbo-count.h"
#include "ggml/turbo-types.h"

#include "llama.h"

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <vector>

#if defined(__SSE2__)
#    include <emmintrin.h>
#endif

// Sets the values from `to` to before `end`. With `past_caches` they are stored to memory without reading it first.
template <typename T> void turbo_set(T * to, T * end, T value, bool past_caches) {
#if defined(__SSE2__)
    if (past_caches) {
        alignas(16) T copies[16 / sizeof(T)];
        std::fill_n(copies, 16 / sizeof(T), value);
        const __m128i vector = _mm_load_si128((const __m128i *) copies);
        for (; to < end && (uintptr_t) to % 16 != 0; ++to) {
            *to = value;
        }
        for (; end - to >= (int64_t) (16 / sizeof(T)); to += 16 / sizeof(T)) {
            _mm_stream_si128((__m128i *) to, vector);
        }
    }
#else
    (void) past_caches;
#endif
    std::fill(to, end, value);
}

// The cells that a token sees: from first to before end.
struct turbo_run {
    int64_t first, end;
};

// Fills the rows of a mask, of which `run` returns the visible cells.
template <typename T, typename Run> void turbo_set_rows(ggml_tensor * mask, int64_t rows, T hidden, const Run & run) {
    const int64_t n_kv = mask->ne[0];
    // The caches rarely hold a mask of this size until it is read, and without them stores take half the time.
    const bool    past = rows * n_kv * (int64_t) sizeof(T) >= 64 << 20;
    for (int64_t i = 0; i < rows; ++i) {
        T *             row  = (T *) mask->data + i * n_kv;
        const turbo_run seen = run(i);
        turbo_set(row, row + seen.first, hidden, past);
        turbo_set(row + seen.first, row + seen.end, T(), past); // 0.0 has no bits, in F16 as well
        turbo_set(row + seen.end, row + n_kv, hidden, past);
    }
#if defined(__SSE2__)
    _mm_sfence();
#endif
}

// The cells of a stream, of which each token sees one run.
template <typename Cells> struct turbo_mask_cells {
    const Cells * cells = nullptr;
    int64_t       used  = 0;     // the first cells, which alone are used
    bool          all   = false; // whether every token sees all of them; otherwise their positions ascend

    // False if it is not certain that the cells are as described, for tokens of sequence seq at these positions. The
    // cells may have those of `sequences` sequences. window: whether there is a sliding window.
    bool find(const Cells & of_stream, llama_seq_id seq, const llama_pos * pos, int64_t tokens, bool window,
              size_t sequences) {
        cells = &of_stream;
        used  = of_stream.get_used();
        if (used != (int64_t) of_stream.used_max_p1()) {
            return false;
        }
        for (llama_seq_id other = 0; other < (llama_seq_id) sequences; ++other) {
            if (other != seq && of_stream.seq_pos_max(other) != -1) {
                return false;
            }
        }
        all = !window && of_stream.seq_pos_max(seq) <= *std::min_element(pos, pos + tokens);
        bool descends = false;
        for (int64_t i = 1; !all && i < used; ++i) {
            descends |= of_stream.pos_get(i - 1) > of_stream.pos_get(i); // without a branch, for vector instructions
        }
        return !descends;
    }

    // The cells that a token at this position sees. left: whether the sliding window has left a position behind.
    template <typename Left> turbo_run run(llama_pos pos, const Left & left) const {
        if (all) {
            return { 0, used };
        }
        const int64_t end = count(used, [&](llama_pos p) { return p <= pos; });
        return { count(end, left), end };
    }

private:
    // How many of the first n cells have positions for which `is` is true. It is true for the first positions.
    template <typename Is> int64_t count(int64_t n, const Is & is) const {
        int64_t known = 0;
        while (known < n) {
            const int64_t middle = known + (n - known) / 2;
            if (is(cells->pos_get(middle))) {
                known = middle + 1;
            } else {
                n = middle;
            }
        }
        return known;
    }
};

// Hook in set_input_kq_mask. llama.cpp tests every cell for the first token of a sequence, which takes longer than
// attention on a GPU at long contexts, and copies the row for the other tokens. If the used cells of a stream are the
// first ones and belong to one sequence, and their positions ascend, each token sees one run of them.
//
// mask: F16 or F32, one row for each token. The other arguments are those of set_input_kq_mask and members of the cache.
// The result is false, and the mask stays unchanged, if it is not certain which cells are visible, or if the cache has
// no turbo type; llama.cpp's own code then fills the mask.
template <typename Ubatch, typename Layers, typename Hparams, typename Swa, typename Cells>
bool turbo_fill_mask(ggml_tensor * mask, const Ubatch & ubatch, bool causal, const Layers & layers,
                     const Hparams & hparams, uint32_t n_swa, Swa swa_type, const std::vector<Cells> & v_cells,
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
    const int64_t streams = mask->ne[3];
    const int64_t tokens  = ubatch.n_tokens / streams;

    std::vector<turbo_mask_cells<Cells>> cells(streams);
    for (int64_t s = 0; s < streams; ++s) {
        const int64_t      first = s * tokens;
        const llama_seq_id seq   = ubatch.seq_id[first][0]; // llama.cpp's loop looks at a token's first sequence alone
        for (int64_t i = first; i < first + tokens; ++i) {
            if (ubatch.seq_id[i][0] != seq) {
                return false;
            }
        }
        if (!cells[s].find(v_cells.at(seq_to_stream[seq]), seq, ubatch.pos + first, tokens, window,
                           seq_to_stream.size()) ||
            cells[s].used > mask->ne[0]) {
            return false;
        }
    }
    turbo_count("mask filled at once", tokens, streams);
    const auto run = [&](int64_t i) {
        const llama_pos pos = ubatch.pos[i];
        return cells[i / tokens].run(pos, [&](llama_pos p) { return Hparams::is_masked_swa(n_swa, swa_type, p, pos); });
    };
    if (mask->type == GGML_TYPE_F16) {
        turbo_set_rows(mask, streams * tokens, ggml_fp32_to_fp16(-INFINITY), run);
    } else {
        turbo_set_rows(mask, streams * tokens, -INFINITY, run);
    }
    return true;
}
