// turbo-window.h: the exact window: the newest tokens of a cache at high precision, beside their blocks.
//
// Every layer with a window has slots: rows of K and V in a type of their own. After a batch is stored, its last rows go
// into slots, too, and a tag tells which cell each slot belongs to. While a later batch is computed, attention reads the
// cells that have a slot from there, and the batch's own rows as they were computed; in the mask of the blocks all of
// these cells are hidden, and a second mask shows them in the slots and in the batch. The blocks of every cell are
// complete, so that a tag can be dropped at any time. It must be dropped where a cell's bytes change otherwise than by
// the graph: ggml_types/README.md lists the places.
#pragma once

#include "ggml.h"

#include <cstdint>
#include <map>
#include <vector>

struct llama_hparams;
struct llama_model;
class llm_graph_result;

// The part of a cache object: slots, tags. Its methods are the hooks in llama-kv-cache.cpp.
class turbo_window {
public:
    struct layer {
        ggml_tensor * k; // [values of a row, slots of all streams and one more], as is v
        ggml_tensor * v;
        ggml_tensor * cache_k; // whose slots these are
    };

    // After K and V of layer il were made: makes its slots in the same context, if the layer has a window.
    void add_layer(ggml_context * ctx, const llama_model & model, const llama_hparams & hparams, uint32_t il,
                   ggml_tensor * k, ggml_tensor * v, uint32_t n_stream);
    void log() const;

    void forget();                                     // all cells
    void forget(uint32_t stream);                      // all cells of a stream
    void forget(uint32_t stream, uint32_t cell);
    template <typename Cells> void forget_shifted(uint32_t stream, const Cells & cells) {
        for (const uint32_t cell : tagged(stream)) {
            if (cells.get_shift(cell) != 0) {
                forget(stream, cell);
            }
        }
    }

    // Null if the layer has no window.
    const layer * find(int il) const;

    int64_t slots() const { return slots_; }
    int64_t cells() const { return cells_; }
    int64_t streams() const { return (int64_t) tags_.size(); }
    // True if no layer of the cache reads the mask without reading slots.
    bool    in_all_layers() const { return layers_.size() == n_layers_; }

    // The cell that a slot belongs to, or -1.
    int64_t tag(int64_t stream, int64_t slot) const { return tags_[stream][slot].cell; }
    // Gives slots to the last of these cells of a stream, which are stored now, and takes away those that others of them
    // had. slot[i] is the slot of cells[i], or -1.
    void    assign(int64_t stream, const std::vector<int64_t> & cells, std::vector<int64_t> & slot);

private:
    struct owner {
        int64_t  cell    = -1;
        uint64_t written = 0; // the clock when it was, which ticks with every row
    };

    std::vector<uint32_t> tagged(uint32_t stream) const;

    std::map<int, layer>             layers_;
    std::vector<std::vector<owner>>  tags_; // [stream][slot]
    size_t                           n_layers_ = 0; // of the cache
    int64_t                          slots_    = 0;
    int64_t                          cells_    = 0; // of a stream
    uint64_t                         clock_    = 1;
};

// Hook before attention is built: while it lives, build_attn_mha's hook adds the slots to the attention op; its end stores
// the batch's last rows in the slots.
class turbo_window_scope {
public:
    // k_idxs: where the batch's rows are stored, [tokens]. mask: the blocks', [cells, tokens of a stream, 1, streams].
    // k_cur, v_cur: the batch's rows as they are stored, [head, heads, tokens], or null.
    turbo_window_scope(turbo_window & window, llm_graph_result & res, ggml_context * ctx, ggml_cgraph * gf,
                       ggml_tensor * k_idxs, ggml_tensor * mask, ggml_tensor * k_cur, ggml_tensor * v_cur, int il);
    ~turbo_window_scope();

    turbo_window_scope(const turbo_window_scope &)             = delete;
    turbo_window_scope & operator=(const turbo_window_scope &) = delete;

private:
    friend void turbo_window_attach(ggml_tensor * attention);
    void attach(ggml_tensor * attention);

    const turbo_window::layer * layer_ = nullptr;
    class turbo_window_input *  input_ = nullptr;
    ggml_context *              ctx_;
    ggml_cgraph *               gf_;
    ggml_tensor *               k_cur_;
    ggml_tensor *               v_cur_;
    bool                        attached_ = false;
    turbo_window_scope *        outer_;
};

// Hook after an attention op was made.
void turbo_window_attach(ggml_tensor * attention);
