// turbo-mask.h: a template that fills the mask of attention faster than llama.cpp. Part of libllama.
#pragma once

#include "ggml/turbo-count.h"
#include "ggml/turbo-ops.h"

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

// Cells that follow each other: from first to before end.
struct turbo_run {
    int64_t first, end;
};

// A sequence that has tokens in the batch, and its cells: runs with the same sequences and ascending positions.
template <typename Cells> struct turbo_mask_sequence {
    llama_seq_id           id;
    const Cells *          cells; // of its stream
    llama_pos              least; // the lowest position of its tokens
    std::vector<turbo_run> runs;
    int64_t                row;   // a row of the mask that was filled for it, or -1

    // The part of a run that a token at this position sees without a sliding window.
    turbo_run visible(turbo_run run, llama_pos pos) const {
        if (cells->pos_get(run.end - 1) > pos) {
            run.end = split(run, [&](llama_pos p) { return p <= pos; });
        }
        return run;
    }

    // The first cell of a run with a position for which `is` is false. It is true for the positions before.
    template <typename Is> int64_t split(turbo_run run, const Is & is) const {
        while (run.first < run.end) {
            const int64_t middle = run.first + (run.end - run.first) / 2;
            if (is(cells->pos_get(middle))) {
                run.first = middle + 1;
            } else {
                run.end = middle;
            }
        }
        return run.first;
    }
};

// Whether two cells belong to the same ones of these sequences.
template <typename Cells, typename Sequences>
auto turbo_same_sequences(const Cells & cells, int64_t a, int64_t b, const Sequences &, int)
    -> decltype(cells.seq_get_all(a) == cells.seq_get_all(b)) {
    return cells.seq_get_all(a) == cells.seq_get_all(b);
}

template <typename Cells, typename Sequences> // until 0.3.35
bool turbo_same_sequences(const Cells & cells, int64_t a, int64_t b, const Sequences & sequences, long) {
    return std::all_of(sequences.begin(), sequences.end(),
                       [&](const auto * one) { return cells.seq_has(a, one->id) == cells.seq_has(b, one->id); });
}

// Finds the runs of all sequences of a stream that have tokens in the batch, in its first n_kv cells. Sequences have
// ids below `ids`. window: whether there is a sliding window.
template <typename Cells>
void turbo_find_runs(const Cells & cells, const std::vector<turbo_mask_sequence<Cells> *> & sequences, int64_t n_kv,
                     bool window, size_t ids) {
    const int64_t end   = std::min<int64_t>(cells.used_max_p1(), n_kv);
    bool          alone = sequences.size() == 1; // whether all cells belong to one sequence
    for (llama_seq_id id = 0; alone && id < (llama_seq_id) ids; ++id) {
        alone = id == sequences[0]->id || cells.seq_pos_max(id) == -1;
    }
    if (alone && end > 0 && cells.get_used() == cells.used_max_p1()) { // without empty cells
        // The order is irrelevant if every token sees every cell. The loop has no branch, for vector instructions.
        const bool all      = !window && cells.seq_pos_max(sequences[0]->id) <= sequences[0]->least;
        bool       descends = false;
        for (int64_t i = 1; !all && i < end; ++i) {
            descends |= cells.pos_get(i - 1) > cells.pos_get(i);
        }
        if (!descends) {
            sequences[0]->runs.push_back({ 0, end });
            return;
        }
    }
    for (int64_t first = 0, i; first < end; first = i) {
        i = first + 1;
        if (cells.is_empty(first)) {
            continue;
        }
        while (i < end && !cells.is_empty(i) && cells.pos_get(i - 1) <= cells.pos_get(i) &&
               (alone || turbo_same_sequences(cells, first, i, sequences, 0))) {
            ++i;
        }
        for (turbo_mask_sequence<Cells> * one : sequences) {
            if (cells.seq_has(first, one->id)) {
                one->runs.push_back({ first, i });
            }
        }
    }
}

// Hook in set_input_kq_mask. llama.cpp tests every cell for the first token of each sequence, which takes longer than
// attention on a GPU at long contexts, and copies the row for the other tokens of the sequence.
//
// mask: F16 or F32, one row for each token. The other arguments are those of set_input_kq_mask, and members of the
// cache. The result is false, and the mask keeps its values, if attention is not causal, has ALiBi or positions in two
// dimensions, or if the cache has no turbo type. llama.cpp's own code then fills the mask. The mask of a cache with
// turbo types is marked in any case.
template <typename Ubatch, typename Layers, typename Hparams, typename Swa, typename Cells>
bool turbo_fill_mask(ggml_tensor * mask, const Ubatch & ubatch, bool causal, const Layers & layers,
                     const Hparams & hparams, uint32_t n_swa, Swa swa_type, const std::vector<Cells> & v_cells,
                     const std::vector<uint32_t> & seq_to_stream) {
    bool turbo = false;
    for (const auto & layer : layers) {
        turbo = turbo || (layer.k && turbo_is_type(layer.k->type)) || (layer.v && turbo_is_type(layer.v->type));
    }
    if (!turbo) {
        return false;
    }
    turbo_mark_mask(mask);
    if (!causal || hparams.use_alibi || ubatch.is_pos_2d()) {
        return false;
    }
    const bool    window = swa_type != Swa(); // LLAMA_SWA_TYPE_NONE is 0
    const int64_t n_kv = mask->ne[0], tokens = ubatch.n_tokens;

    std::vector<turbo_mask_sequence<Cells>> sequences;
    std::vector<int32_t>                    index(seq_to_stream.size(), -1); // by id
    for (int64_t i = 0; i < tokens; ++i) {
        const llama_seq_id id = ubatch.seq_id[i][0]; // llama.cpp's code uses the first sequence of a token alone
        if (index[id] < 0) {
            index[id] = (int32_t) sequences.size();
            sequences.push_back({ id, &v_cells.at(seq_to_stream[id]), ubatch.pos[i], {}, -1 });
        }
        llama_pos & least = sequences[index[id]].least;
        least = std::min(least, ubatch.pos[i]);
    }
    std::vector<std::vector<turbo_mask_sequence<Cells> *>> of_stream(v_cells.size());
    for (turbo_mask_sequence<Cells> & one : sequences) {
        of_stream[seq_to_stream[one.id]].push_back(&one);
    }
    for (size_t s = 0; s < v_cells.size(); ++s) {
        if (!of_stream[s].empty()) {
            turbo_find_runs(v_cells[s], of_stream[s], n_kv, window, seq_to_stream.size());
        }
    }
    turbo_count("mask filled at once", tokens / mask->ne[3], mask->ne[3]);

    const auto fill = [&](auto * data, auto hidden) {
        using T = decltype(hidden);
        // The caches rarely hold a mask of this size until it is read, and without them stores take half the time.
        const bool large = tokens * n_kv * (int64_t) sizeof(T) >= 64 << 20;
        for (int64_t i = 0; i < tokens; ++i) {
            turbo_mask_sequence<Cells> & one  = sequences[index[ubatch.seq_id[i][0]]];
            const llama_pos              pos  = ubatch.pos[i];
            T *                          row  = data + i * n_kv;
            const bool                   many = one.runs.size() > 8;
            if (many && !window && one.row >= 0) { // only runs with later positions differ
                std::copy_n(data + one.row * n_kv, n_kv, row);
                for (const turbo_run & run : one.runs) {
                    if (one.cells->pos_get(run.end - 1) > one.least) {
                        const turbo_run seen = one.visible(run, pos);
                        turbo_set(row + run.first, row + seen.end, T(), false);
                        turbo_set(row + seen.end, row + run.end, hidden, false);
                    }
                }
                continue;
            }
            int64_t at = 0;
            for (const turbo_run & run : one.runs) {
                turbo_run seen = one.visible(run, pos);
                if (window) {
                    const auto left = [&](llama_pos p) { return Hparams::is_masked_swa(n_swa, swa_type, p, pos); };
                    seen.first = one.split(seen, left);
                }
                if (seen.first < seen.end) {
                    turbo_set(row + at, row + seen.first, hidden, large && !many);
                    turbo_set(row + seen.first, row + seen.end, T(), large && !many); // 0.0 has no bits, in F16 as well
                    at = seen.end;
                }
            }
            turbo_set(row + at, row + n_kv, hidden, large && !many);
            one.row = i;
        }
    };
    if (mask->type == GGML_TYPE_F16) {
        fill((ggml_fp16_t *) mask->data, ggml_fp32_to_fp16(-INFINITY));
    } else {
        fill((float *) mask->data, -INFINITY);
    }
#if defined(__SSE2__)
    _mm_sfence();
#endif
    return true;
}
