// turbo-llama.h: what libllama does with the TurboQuant types. Included by llama-context.cpp and llama-kv-cache.cpp.
#pragma once

#include "turbo-ggml.h"

#include "llama-batch.h"
#include "llama-cparams.h"
#include "llama-hparams.h"
#include "llama-impl.h"
#include "llama-model.h"

#include "ggml-backend.h"
#include "ggml-cpp.h"

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdlib>
#include <cstring>
#include <set>
#include <stdexcept>
#include <string>
#include <vector>

// True if layer il stores keys and values of tokens (and not only a recurrent state, or none of its own).
inline bool turbo_has_cache(const llama_hparams & hparams, uint32_t il) {
    return hparams.has_kv(il) && !hparams.is_recr(il) && hparams.n_head_kv(il) > 0;
}

// All such layers.
inline std::vector<uint32_t> turbo_cache_layers(const llama_hparams & hparams) {
    std::vector<uint32_t> layers;
    for (uint32_t il = 0; il < hparams.n_layer_all; ++il) {
        if (turbo_has_cache(hparams, il)) {
            layers.push_back(il);
        }
    }
    return layers;
}

// ---- boundary V ----------------------------------------------------------------------------------------------------

// True if il is among the first or the last n of the model's layers that have a cache. Layers for multi-token
// prediction, which come after the model's own, do not count.
inline bool turbo_is_boundary(const llama_hparams & hparams, uint32_t il, int n) {
    if (n <= 0 || il >= hparams.n_layer() || !turbo_has_cache(hparams, il)) {
        return false;
    }
    int before = 0;
    int after  = 0;
    for (uint32_t other = 0; other < hparams.n_layer(); ++other) {
        if (turbo_has_cache(hparams, other)) {
            before += other < il;
            after  += other > il;
        }
    }
    return before < n || after < n;
}

// The type in which layer il keeps V, given the cache's type: never one of fewer bits per value.
// Throws if the environment variable is wrong (turbo_init_context has refused it before).
inline ggml_type turbo_layer_type_v(const llama_hparams & hparams, uint32_t il, ggml_type type_v) {
    turbo_boundary boundary;
    char           error[512];
    if (!turbo_boundary_from_env(&boundary, error, sizeof(error))) {
        throw std::runtime_error(error);
    }
    if (!turbo_is_boundary(hparams, il, boundary.layers)) {
        return type_v;
    }
    const ggml_type type = turbo_type_for_head(boundary.type, hparams.n_embd_head_v(il));
    return type == GGML_TYPE_COUNT ? type_v : turbo_better_type(type_v, type);
}

// Hook in the cache's constructor, after the tensor of V was made in a context without memory: gives it its layer's
// type.
inline void turbo_set_layer_type_v(ggml_tensor * v, const llama_hparams & hparams, uint32_t il) {
    if (!v) {
        return;
    }
    v->type  = turbo_layer_type_v(hparams, il, v->type);
    v->nb[0] = ggml_type_size(v->type);
    v->nb[1] = ggml_row_size(v->type, v->ne[0]);
    for (int i = 2; i < GGML_MAX_DIMS; ++i) {
        v->nb[i] = v->nb[i - 1] * v->ne[i - 1];
    }
}

// Hook at the constructor's size line, which knows one type of V only.
template <typename Layers> void turbo_log_layer_types_v(const Layers & layers, ggml_type type_v) {
    int         count = 0;
    std::string which;
    ggml_type   type = type_v;
    for (const auto & layer : layers) {
        if (layer.v && layer.v->type != type_v) {
            type = layer.v->type;
            which += (count++ ? ", " : "") + std::to_string(layer.il);
        }
    }
    if (count > 0) {
        LLAMA_LOG_INFO("turboquant: boundary V: %d of %d layers keep V in %s (%.4g bits per value) instead of %s: %s\n",
                count, (int) layers.size(), ggml_type_name(type), turbo_bits_per_value(type), ggml_type_name(type_v),
                which.c_str());
    }
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

// ---- context creation ----------------------------------------------------------------------------------------------

// The type for all heads in `heads` (values per head, one per layer with a cache): their largest common block.
// GGML_TYPE_COUNT, and the layer in *bad, if there is none.
inline ggml_type turbo_type_for_heads(ggml_type type, const std::vector<uint32_t> & heads, size_t * bad) {
    ggml_type result = type;
    for (size_t i = 0; i < heads.size(); ++i) {
        const ggml_type fits = turbo_type_for_head(type, heads[i]);
        if (fits == GGML_TYPE_COUNT) {
            *bad = i;
            return GGML_TYPE_COUNT;
        }
        if (ggml_blck_size(fits) < ggml_blck_size(result)) {
            result = fits;
        }
    }
    return result;
}

// Resolve one of the context's types in place. what: "K" or "V"; option: the option that sets it.
inline bool turbo_resolve(ggml_type & type, const std::vector<uint32_t> & heads, const std::vector<uint32_t> & layers,
                          const char * what, const char * option) {
    if (!turbo_is_type(type)) {
        return true;
    }
    size_t          bad    = 0;
    const ggml_type result = turbo_type_for_heads(type, heads, &bad);
    if (result == GGML_TYPE_COUNT) {
        if (heads[bad] % 32 != 0) {
            LLAMA_LOG_ERROR("turboquant: %s type %s does not work with the head size %u (layer %u); multiples of 32 do "
                    "(64, 96, 128, 192, 256, 512, 576): use %s f16 with this model\n",
                    what, ggml_type_name(type), heads[bad], layers[bad], option);
        } else {
            LLAMA_LOG_ERROR("turboquant: %s type %s: its block does not divide the head size %u (layer %u): use "
                    "%s %.6s, which takes the largest block that does, or %s f16\n",
                    what, ggml_type_name(type), heads[bad], layers[bad], option, ggml_type_name(type), option);
        }
        return false;
    }
    if (result != type) {
        const uint32_t block = ggml_blck_size(result);
        size_t         why   = 0;
        while (why + 1 < heads.size() && heads[why] % (2 * block) == 0) {
            ++why;
        }
        LLAMA_LOG_WARN("turboquant: %s type %s -> %s, because the head size is %u: "
                "%.4g instead of %.4g bits per value\n", what, ggml_type_name(type), ggml_type_name(result), heads[why],
                turbo_bits_per_value(result), turbo_bits_per_value(type));
        type = result;
    }
    return true;
}

// Ask the devices that hold the cache whether they can fill it and read it. Without this the scheduler aborts at the
// first graph: the cache is allocated already, so it cannot fall back to the CPU.
inline bool turbo_check_devices(const llama_model & model, const llama_context_params & params,
                                const std::vector<uint32_t> & layers) {
    if (!params.offload_kqv) {
        return true;
    }
    const llama_hparams &        hparams = model.hparams;
    std::set<ggml_backend_dev_t> asked;
    for (const uint32_t il : layers) {
        ggml_backend_dev_t dev = model.dev_layer(il);
        if (!dev || !asked.insert(dev).second) {
            continue;
        }
        const ggml_type type_k = params.type_k;
        const ggml_type type_v = turbo_layer_type_v(hparams, il, params.type_v);

        const ggml_backend_reg_t reg = ggml_backend_dev_backend_reg(dev);
        if (reg && strcmp(ggml_backend_reg_name(reg), "RPC") == 0 && !getenv("TURBOQUANT_RPC")) {
            LLAMA_LOG_ERROR("turboquant: %s holds the KV cache of layer %u, and a remote server cannot be asked "
                    "whether it knows %s: keep the cache here with -nkvo, or set TURBOQUANT_RPC=1 if its rpc-server is "
                    "patched too\n",
                    ggml_backend_dev_name(dev), il, ggml_type_name(turbo_is_type(type_k) ? type_k : type_v));
            return false;
        }

        const int64_t n_kv     = 256;
        const int64_t n_tokens = 32;
        const int64_t head_k   = hparams.n_embd_head_k(il);
        const int64_t head_v   = hparams.n_embd_head_v(il);
        const int64_t n_head   = hparams.n_head(il);
        const int64_t n_kv_h   = hparams.n_head_kv(il);

        ggml_context_ptr ctx_ptr{ ggml_init({ 32 * ggml_tensor_overhead(), nullptr, true }) };
        ggml_context *   ctx = ctx_ptr.get();

        std::vector<std::pair<const ggml_tensor *, ggml_type>> ops;
        const auto set_rows = [&](ggml_type type, int64_t head) {
            ggml_tensor * cache = ggml_new_tensor_2d(ctx, type, head * n_kv_h, n_kv);
            ggml_tensor * rows  = ggml_new_tensor_2d(ctx, GGML_TYPE_F32, head * n_kv_h, n_tokens);
            ggml_tensor * index = ggml_new_tensor_1d(ctx, GGML_TYPE_I64, n_tokens);
            ops.emplace_back(ggml_set_rows(ctx, cache, rows, index), type);
        };
        if (turbo_is_type(type_k)) {
            set_rows(type_k, head_k);
        }
        if (turbo_is_type(type_v) && !hparams.is_mla()) {
            set_rows(type_v, head_v);
        }

        ggml_tensor * k = ggml_new_tensor_3d(ctx, type_k, head_k, n_kv_h, n_kv);
        k = ggml_permute(ctx, k, 0, 2, 1, 3);
        ggml_tensor * q = ggml_new_tensor_3d(ctx, GGML_TYPE_F32, head_k, n_tokens, n_head);
        const ggml_type type_any = turbo_is_type(type_k) ? type_k : type_v;
        if (params.flash_attn_type == LLAMA_FLASH_ATTN_TYPE_DISABLED) {
            ops.emplace_back(ggml_mul_mat(ctx, k, q), type_any);
        } else {
            ggml_tensor * v;
            if (hparams.is_mla()) { // V is the front of K's rows
                v = ggml_view_4d(ctx, k, head_v, k->ne[1], k->ne[2], k->ne[3], k->nb[1], k->nb[2], k->nb[3], 0);
            } else {
                v = ggml_permute(ctx, ggml_new_tensor_3d(ctx, type_v, head_v, n_kv_h, n_kv), 0, 2, 1, 3);
            }
            ggml_tensor * mask = ggml_new_tensor_2d(ctx, GGML_TYPE_F16, n_kv, 64);
            ops.emplace_back(ggml_flash_attn_ext(ctx, q, k, v, mask, 1.0f, 0.0f, 0.0f), type_any);
        }
        for (const auto & [op, type] : ops) {
            if (!ggml_backend_dev_supports_op(dev, op)) {
                LLAMA_LOG_ERROR("turboquant: %s (%s) holds the KV cache of layer %u and cannot run %s on %s: keep the "
                        "cache in the CPU's memory with -nkvo, keep the layers there with -ngl 0, or build this "
                        "backend with TurboQuant's kernels\n", ggml_backend_dev_name(dev),
                        ggml_backend_dev_description(dev), il, ggml_op_name(op->op), ggml_type_name(type));
                return false;
            }
        }
    }
    return true;
}

// Hook at the top of llama_init_from_model: choose the blocks that fit the model's heads and refuse, with one sentence,
// what could not work. Returns false if the context must not be made. Leaves contexts without turbo types alone.
inline bool turbo_init_context(const llama_model & model, llama_context_params & params) {
    if (const char * error = turbo_kernels_error()) {
        LLAMA_LOG_ERROR("turboquant: %s\n", error);
        return false;
    }
    turbo_boundary boundary;
    char           error[512];
    if (!turbo_boundary_from_env(&boundary, error, sizeof(error))) {
        LLAMA_LOG_ERROR("turboquant: %s\n", error);
        return false;
    }
    float sparse_v;
    if (!turbo_sparse_v_parse(getenv(TURBO_SPARSE_V_ENV), &sparse_v, error, sizeof(error))) {
        LLAMA_LOG_ERROR("turboquant: %s\n", error);
        return false;
    }
    const bool turbo = turbo_is_type(params.type_k) || turbo_is_type(params.type_v);
    if (!turbo && boundary.layers == 0) {
        return true;
    }

    const llama_hparams &       hparams = model.hparams;
    const std::vector<uint32_t> layers  = turbo_cache_layers(hparams);
    std::vector<uint32_t>       heads_k;
    std::vector<uint32_t>       heads_v;
    for (const uint32_t il : layers) {
        heads_k.push_back(hparams.n_embd_head_k(il));
        heads_v.push_back(hparams.n_embd_head_v(il));
    }
    // Multi-head latent attention caches one row, K, whose front is V; upstream wants both types to be the same.
    const bool same = hparams.is_mla() && params.type_k == params.type_v;
    if (!turbo_resolve(params.type_k, heads_k, layers, "K", "-ctk")) {
        return false;
    }
    if (same) {
        params.type_v = params.type_k;
    } else if (!turbo_resolve(params.type_v, heads_v, layers, "V", "-ctv")) {
        return false;
    }
    for (const uint32_t il : layers) {
        const uint32_t head = hparams.n_embd_head_v(il);
        if (turbo_is_boundary(hparams, il, boundary.layers) &&
            turbo_better_type(params.type_v, boundary.type) != params.type_v &&
            turbo_type_for_head(boundary.type, head) == GGML_TYPE_COUNT) {
            LLAMA_LOG_ERROR("turboquant: --cache-boundary-v: the block of %s (%d values) does not divide the head size "
                    "%u of layer %u: use %d:f16\n", ggml_type_name(boundary.type), (int) ggml_blck_size(boundary.type),
                    head, il, boundary.layers);
            return false;
        }
    }
    if (!turbo && !turbo_is_type(turbo_better_type(params.type_v, boundary.type))) {
        return true;
    }
    if (!turbo_check_devices(model, params, layers)) {
        return false;
    }
    LLAMA_LOG_INFO("turboquant: K %s (%.4g bits per value), V %s (%.4g bits per value), %s kernels\n",
            ggml_type_name(params.type_k), turbo_bits_per_value(params.type_k), ggml_type_name(params.type_v),
            turbo_bits_per_value(params.type_v), turbo_kernels_name());
    return true;
}
