// turbo-window.h: the exact window, which keeps the newest tokens of a cache at high precision in addition to their
// blocks. Part of libllama.
//
// Every layer with a window has slots: rows of K and V in the window's type. After a batch is stored in its cells, its
// last rows are also stored in slots, and a tag names the cell that each slot belongs to. When a later batch is
// computed, attention reads the cells that have a slot from their slots, and the batch's own rows as they were
// computed. The mask of the blocks hides all of these cells, and a second mask shows them in the slots and in the
// batch. Every cell also has its complete blocks, so a tag can be dropped at any time. It must be dropped if the bytes
// of its cell change outside the graph of a batch; ggml_types/README.md lists these changes.
#pragma once

#include "ggml.h"

#include <cstdint>
#include <map>
#include <vector>

struct llama_hparams;
struct llama_model;
class llm_graph_result;

// The slots and tags of a cache, which are a member of the cache object. The hooks in llama-kv-cache.cpp call its
// methods.
class turbo_window {
public:
    struct layer {
        ggml_tensor * k;       // the slots: [values of a row of all heads, slots of all streams and one more row]
        ggml_tensor * v;       // as k
        ggml_tensor * cache_k; // the layer's K in the cache
    };

    // Hook after K and V of layer il are created: creates its slots in the same context, which has no memory yet, if
    // the layer has a window. The cache has n_stream streams. k and v may be null.
    void add_layer(ggml_context * ctx, const llama_model & model, const llama_hparams & hparams, uint32_t il,
                   ggml_tensor * k, ggml_tensor * v, uint32_t n_stream);
    // Writes the length, type and size of the window to the log, if a layer has one.
    void log() const;

    // Drop tags, so that the cells are read from their blocks. Streams and cells without tags are ignored.
    void forget();                               // the tags of all cells
    void forget(uint32_t stream);                // those of a stream
    void forget(uint32_t stream, uint32_t cell); // that of a cell
    // Drops the tags of cells with a pending shift of their position, which changes their keys.
    template <typename Cells> void forget_shifted(uint32_t stream, const Cells & cells) {
        for (const uint32_t cell : tagged(stream)) {
            if (cells.get_shift(cell) != 0) {
                forget(stream, cell);
            }
        }
    }

    // The slots of layer il, or null if it has no window.
    const layer * find(int il) const;

    int64_t slots() const { return slots_; } // of a stream; 0 if no layer has a window
    int64_t cells() const { return cells_; } // of a stream
    int64_t streams() const { return (int64_t) tags_.size(); }
    // True if every layer of the cache has a window. Then all of them can share the mask of the blocks.
    bool    in_all_layers() const { return layers_.size() == n_layers_; }

    // The cell that a slot belongs to, or -1.
    int64_t tag(int64_t stream, int64_t slot) const { return tags_[stream][slot].cell; }
    // Assigns slots to the cells of a stream in which a batch is stored, in the order of the batch. Each of the last
    // cells, up to the number of slots, keeps its slot or gets the oldest one; earlier cells lose theirs. slot[i]
    // becomes the slot of cells[i], or -1.
    void    assign(int64_t stream, const std::vector<int64_t> & cells, std::vector<int64_t> & slot);

private:
    struct owner {
        int64_t  cell    = -1;
        uint64_t written = 0; // the number of rows that were stored before it, plus 1; 0 = never
    };

    std::vector<uint32_t> tagged(uint32_t stream) const;

    std::map<int, layer>             layers_;
    std::vector<std::vector<owner>>  tags_; // [stream][slot]
    size_t                           n_layers_ = 0; // of the cache
    int64_t                          slots_    = 0; // of a stream
    int64_t                          cells_    = 0; // of a stream
    uint64_t                         clock_    = 1; // the number of rows that were stored, plus 1
};

// Hook before the attention of layer il is built. While the object exists, the hook in build_attn_mha adds the window
// to the attention op. The destructor adds the nodes that store the batch's last rows in slots.
class turbo_window_scope {
public:
    // k_idxs: where the batch's rows are stored, I64 [tokens]. mask: that of the blocks, F16 [cells, tokens of a
    // stream, 1, streams]. k_cur, v_cur: the batch's rows as they are stored, F32 [head, KV heads, tokens]. If one of
    // these is null or has another type, or if the layer has no window, attention has none.
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

// Hook after an attention op is created: adds the window to its sources (turbo-ops.h), if a scope exists in this
// thread, the layer has a window, and the op reads the layer's cache.
void turbo_window_attach(ggml_tensor * attention);
