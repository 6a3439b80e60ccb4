// turbo-window.cpp: the exact window's slots, tags and graph inputs. Part of libllama.

#include "llama/turbo-window.h"

#include "ggml/turbo-ops.h"
#include "llama/turbo-layers.h"

#include "llama-graph.h"

#include <algorithm>
#include <numeric>

// ---- slots and tags ------------------------------------------------------------------------------------------------

void turbo_window::add_layer(ggml_context * ctx, const llama_model & model, const llama_hparams & hparams, uint32_t il,
                             ggml_tensor * k, ggml_tensor * v, uint32_t n_stream) {
    ++n_layers_;
    const turbo_layer_types & chosen = turbo_chosen_types();
    if (chosen.model != &model || !turbo_is_own_cache(model, hparams) || chosen.windowed.empty() ||
        !chosen.windowed[il] || !k || !v) {
        return;
    }
    if (slots_ == 0) {
        cells_ = k->ne[1];
        slots_ = std::min<int64_t>(chosen.window, cells_);
        tags_.assign(n_stream, std::vector<owner>(slots_));
    }
    const auto slots = [&](ggml_tensor * cache, const char * what) {
        // One more row receives the rows that get no slot.
        ggml_tensor * t = ggml_new_tensor_2d(ctx, chosen.window_type, cache->ne[0], slots_ * n_stream + 1);
        ggml_format_name(t, "cache_%s_l%u_window", what, il);
        return t;
    };
    layers_[(int) il] = { slots(k, "k"), slots(v, "v"), k };
}

void turbo_window::log() const {
    if (layers_.empty()) {
        return;
    }
    double bytes = 0;
    for (const auto & [il, layer] : layers_) {
        bytes += ggml_nbytes(layer.k) + ggml_nbytes(layer.v);
    }
    turbo_info("window: the newest %d tokens in %s (%zu of %zu layers), %.2f MiB", (int) slots_,
               ggml_type_name(layers_.begin()->second.k->type), layers_.size(), n_layers_, bytes / 1048576.0);
}

void turbo_window::forget() {
    for (auto & stream : tags_) {
        stream.assign(stream.size(), owner());
    }
}

void turbo_window::forget(uint32_t stream) {
    if (stream < tags_.size()) {
        tags_[stream].assign(tags_[stream].size(), owner());
    }
}

void turbo_window::forget(uint32_t stream, uint32_t cell) {
    if (stream < tags_.size()) {
        for (owner & slot : tags_[stream]) {
            slot = slot.cell == (int64_t) cell ? owner() : slot;
        }
    }
}

std::vector<uint32_t> turbo_window::tagged(uint32_t stream) const {
    std::vector<uint32_t> cells;
    if (stream < tags_.size()) {
        for (const owner & slot : tags_[stream]) {
            if (slot.cell >= 0) {
                cells.push_back((uint32_t) slot.cell);
            }
        }
    }
    return cells;
}

const turbo_window::layer * turbo_window::find(int il) const {
    const auto found = layers_.find(il);
    return found == layers_.end() ? nullptr : &found->second;
}

void turbo_window::assign(int64_t stream, const std::vector<int64_t> & cells, std::vector<int64_t> & slot) {
    std::vector<owner> & owners = tags_[stream];
    const size_t         first  = cells.size() > owners.size() ? cells.size() - owners.size() : 0;
    slot.assign(cells.size(), -1);
    std::map<int64_t, size_t> stored;
    for (size_t i = 0; i < cells.size(); ++i) {
        stored[cells[i]] = i;
    }
    // A cell that has a slot keeps it, so tokens that speculation rolls back and stores again displace no older tokens.
    for (size_t s = 0; s < owners.size(); ++s) {
        const auto found = owners[s].cell < 0 ? stored.end() : stored.find(owners[s].cell);
        if (found == stored.end()) {
            continue;
        }
        owners[s] = owner();
        if (found->second >= first) {
            owners[s]           = { found->first, clock_ + found->second };
            slot[found->second] = (int64_t) s;
        }
    }
    std::vector<size_t> order(owners.size());
    std::iota(order.begin(), order.end(), 0);
    const auto   older = [&](size_t a, size_t b) {
        return owners[a].written != owners[b].written ? owners[a].written < owners[b].written : a < b;
    };
    const size_t count = std::min(order.size(), cells.size() - first);
    std::partial_sort(order.begin(), order.begin() + count, order.end(), older);
    size_t next = 0;
    for (size_t i = first; i < cells.size(); ++i) {
        if (slot[i] < 0) {
            slot[i]               = (int64_t) order[next];
            owners[order[next++]] = { cells[i], clock_ + i };
        }
    }
    clock_ += cells.size();
}

// ---- the graph's inputs --------------------------------------------------------------------------------------------

// The inputs of a graph for the window of a cache. set_input reads the mask of the blocks, which an earlier input
// fills.
class turbo_window_input : public llm_graph_input_i {
public:
    turbo_window_input(turbo_window & window, ggml_context * ctx, ggml_tensor * k_idxs, ggml_tensor * mask)
        : window(window), k_idxs(k_idxs), mask(mask) {
        far = window.in_all_layers() ? mask : input(ctx, GGML_TYPE_F16, mask->ne[0], mask->ne[1], mask->ne[3], "far");
        near = input(ctx, GGML_TYPE_F16, window.slots() + mask->ne[1], mask->ne[1] + TURBO_CELL_ROWS, mask->ne[3], "near");
        slot_idxs = input(ctx, GGML_TYPE_I64, k_idxs->ne[0], 1, 1, "slots");
    }

    void set_input(const llama_ubatch * ubatch) override;

    // The shapes follow from those of the input with the blocks' mask, which llama.cpp asks as well.
    bool can_reuse(const llm_graph_params & params) override {
        (void) params;
        return true;
    }

    turbo_window & window;
    ggml_tensor *  k_idxs;    // I64 [tokens]: stream * cells + cell
    ggml_tensor *  mask;      // F16 [cells, tokens of a stream, 1, streams]
    ggml_tensor *  far;       // `mask` without the cells that `near` shows; the same tensor if every layer has a window
    ggml_tensor *  near;      // F16 [slots + tokens of a stream, tokens of a stream + 2, 1, streams]; see turbo-ops.h
    ggml_tensor *  slot_idxs; // I64 [tokens]: stream * slots + slot, or the additional row
    int            scopes   = 0; // attention ops that read the mask
    std::vector<ggml_tensor *> attached; // those of them that read slots

private:
    static ggml_tensor * input(ggml_context * ctx, ggml_type type, int64_t n0, int64_t n1, int64_t n3,
                               const char * name) {
        ggml_tensor * t = ggml_new_tensor_4d(ctx, type, n0, n1, 1, n3);
        ggml_set_input(t);
        ggml_format_name(t, "attn_inp_window_%s", name);
        return t;
    }
};

void turbo_window_input::set_input(const llama_ubatch * ubatch) {
    if (!near->buffer || !slot_idxs->buffer || !mask->buffer || !k_idxs->buffer) {
        return;
    }
    constexpr ggml_fp16_t hidden  = 0xfc00; // -inf
    const int64_t         n_kv    = mask->ne[0];
    const int64_t         tokens  = mask->ne[1];
    const int64_t         columns = near->ne[0];
    const bool            apart   = far != mask;
    const bool            shown   = apart || (int) attached.size() == scopes; // ops without the window need all cells
    for (ggml_tensor * op : attached) {
        op->op_params[TURBO_PARAM_SHOWS_BATCH] = shown;
        op->op_params[TURBO_PARAM_REQUESTS]    = mask->ne[3] == 1 ? (int32_t) ubatch->n_seqs_unq : 1;
    }
    const int64_t *       index   = (const int64_t *) k_idxs->data;
    int64_t *             store   = (int64_t *) slot_idxs->data;

    std::vector<int64_t> column(columns); // the cell that a column of `near` shows, or -1
    struct run {
        int64_t column, cell, length; // cell: the first one, or -1
    };
    std::vector<run>     runs;
    std::vector<int64_t> cells(tokens), slot;
    for (int64_t s = 0; s < mask->ne[3]; ++s, index += tokens, store += tokens) {
        const int64_t stream = index[0] / window.cells();
        for (int64_t i = 0; i < tokens; ++i) {
            cells[i] = column[window.slots() + i] = index[i] % window.cells();
        }
        std::vector<int64_t> stored = cells;
        std::sort(stored.begin(), stored.end());
        for (int64_t i = 0; i < window.slots(); ++i) {
            const int64_t cell = window.tag(stream, i);
            column[i] = cell < n_kv && !std::binary_search(stored.begin(), stored.end(), cell) ? cell : -1;
        }
        // Columns mostly show cells that follow each other, and a prompt has a row of the mask for each of its tokens.
        runs.clear();
        for (int64_t i = 0; i < columns; ++i) {
            const run * last = runs.empty() ? nullptr : &runs.back();
            if (last && column[i] == (last->cell < 0 ? -1 : last->cell + last->length)) {
                ++runs.back().length;
            } else {
                runs.push_back({ i, column[i], 1 });
            }
        }
        for (int64_t t = 0; t < tokens; ++t) {
            ggml_fp16_t * all   = (ggml_fp16_t *) ((char *) mask->data + t * mask->nb[1] + s * mask->nb[3]);
            ggml_fp16_t * exact = (ggml_fp16_t *) ((char *) near->data + t * near->nb[1] + s * near->nb[3]);
            ggml_fp16_t * rest  = (ggml_fp16_t *) ((char *) far->data + t * far->nb[1] + s * far->nb[3]);
            if (apart) {
                std::copy(all, all + n_kv, rest);
            }
            for (const run & r : runs) {
                if (r.cell < 0 || !shown) {
                    std::fill_n(exact + r.column, r.length, hidden);
                } else {
                    std::copy_n(all + r.cell, r.length, exact + r.column);
                }
            }
            for (const run & r : runs) {
                if (r.cell >= 0 && shown) {
                    std::fill_n(rest + r.cell, r.length, hidden);
                }
            }
        }
        uint16_t * low  = (uint16_t *) ((char *) near->data + tokens * near->nb[1] + s * near->nb[3]);
        uint16_t * high = low + columns;
        for (int64_t i = 0; i < columns; ++i) {
            const uint32_t cell = shown && column[i] >= 0 ? (uint32_t) column[i] + 1 : 0;
            low[i]              = (uint16_t) cell;
            high[i]             = (uint16_t) (cell >> 16);
        }
        window.assign(stream, cells, slot);
        for (int64_t i = 0; i < tokens; ++i) {
            store[i] = slot[i] < 0 ? window.slots() * window.streams() : stream * window.slots() + slot[i];
        }
    }
}

// ---- the graph -----------------------------------------------------------------------------------------------------

namespace {

thread_local turbo_window_scope * t_scope = nullptr;

// The graph's input with this mask, or null.
turbo_window_input * find_input(const llm_graph_result & res, const ggml_tensor * mask) {
    for (const auto & input : res.inputs) {
        auto * one = dynamic_cast<turbo_window_input *>(input.get());
        if (one && one->mask == mask) {
            return one;
        }
    }
    return nullptr;
}

// The view [head, rows, heads, streams] of slots t, [head * heads, all rows], from row `first` on.
ggml_tensor * rows_of(ggml_context * ctx, ggml_tensor * t, int64_t head, int64_t heads, int64_t rows, int64_t streams,
                      int64_t first) {
    const size_t row = ggml_row_size(t->type, head * heads);
    return ggml_permute(ctx, ggml_view_4d(ctx, t, head, heads, rows, streams, ggml_row_size(t->type, head), row,
                                          row * rows, row * first), 0, 2, 1, 3);
}

// The view [head, tokens, heads, streams] of the batch's rows t, [head, heads, tokens of all streams].
ggml_tensor * batch_of(ggml_context * ctx, ggml_tensor * t, int64_t tokens) {
    return ggml_permute(ctx, ggml_view_4d(ctx, t, t->ne[0], t->ne[1], tokens, t->ne[2] / tokens, t->nb[1], t->nb[2],
                                          t->nb[2] * tokens, 0), 0, 2, 1, 3);
}

}  // namespace

turbo_window_scope::turbo_window_scope(turbo_window & window, llm_graph_result & res, ggml_context * ctx,
                                       ggml_cgraph * gf, ggml_tensor * k_idxs, ggml_tensor * mask, ggml_tensor * k_cur,
                                       ggml_tensor * v_cur, int il)
    : ctx_(ctx), gf_(gf), k_cur_(k_cur), v_cur_(v_cur), outer_(t_scope) {
    t_scope = this;
    if (window.slots() == 0 || !k_idxs || !mask || mask->type != GGML_TYPE_F16) {
        return;
    }
    input_ = find_input(res, mask);
    if (!input_) {
        auto input = std::make_unique<turbo_window_input>(window, ctx, k_idxs, mask);
        input_     = static_cast<turbo_window_input *>(res.add_input(std::move(input)));
    }
    ++input_->scopes;
    const bool whole = k_cur && v_cur && k_cur->type == GGML_TYPE_F32 && v_cur->type == GGML_TYPE_F32;
    layer_ = whole ? window.find(il) : nullptr;
}

void turbo_window_scope::attach(ggml_tensor * attention) {
    const ggml_tensor * k = attention->src[1];
    // The window belongs to the rows of the cache. Other ops attend to the batch alone.
    if (!layer_ || attached_ || k->view_src != layer_->cache_k) {
        return;
    }
    const turbo_window & window  = input_->window;
    const int64_t        tokens  = input_->mask->ne[1];
    const int64_t        streams = k->ne[3];
    const int64_t        first   = k->view_offs / layer_->cache_k->nb[2] * window.slots();
    attention->src[3]                 = input_->far;
    attention->src[TURBO_SRC_SLOTS_K] = rows_of(ctx_, layer_->k, k->ne[0], k->ne[2], window.slots(), streams, first);
    attention->src[TURBO_SRC_SLOTS_V] = rows_of(ctx_, layer_->v, v_cur_->ne[0], v_cur_->ne[1], window.slots(), streams, first);
    attention->src[TURBO_SRC_EXACT_MASK] = input_->near;
    attention->src[TURBO_SRC_BATCH_K] = batch_of(ctx_, k_cur_, tokens);
    attention->src[TURBO_SRC_BATCH_V] = batch_of(ctx_, v_cur_, tokens);
    attached_ = true;
    input_->attached.push_back(attention);
}

turbo_window_scope::~turbo_window_scope() {
    t_scope = outer_;
    if (!attached_) {
        return;
    }
    for (const auto & [slots, rows] : { std::make_pair(layer_->k, k_cur_), std::make_pair(layer_->v, v_cur_) }) {
        ggml_tensor * flat = ggml_view_2d(ctx_, rows, rows->ne[0] * rows->ne[1], rows->ne[2], rows->nb[2], 0);
        ggml_build_forward_expand(gf_, ggml_set_rows(ctx_, slots, flat, input_->slot_idxs));
    }
}

void turbo_window_attach(ggml_tensor * attention) {
    if (t_scope) {
        t_scope->attach(attention);
    }
}
