// turbo-devices.cpp: asks devices for the ops on a cache of the selected types. Part of libllama.

#include "llama/turbo-devices.h"

#include "ggml/turbo-ops.h"
#include "ggml/turbo-options.h"
#include "ggml/turbo-types.h"
#include "llama/turbo-layers.h"

#include "ggml-cpp.h"

#include <cstring>
#include <map>
#include <set>
#include <tuple>
#include <utility>
#include <vector>

using cache_op = std::pair<const ggml_tensor *, ggml_type>;

// The ops on a layer's cache, which store rows and compute attention, and the turbo type of each.
static std::vector<cache_op> cache_ops(ggml_context * ctx, const turbo_layer & layer, ggml_type type_k, ggml_type type_v,
                                       bool mla, bool flash_attention) {
    const int64_t n_kv     = 256;
    const int64_t n_tokens = 32;
    const int64_t head_k   = layer.head_k;
    const int64_t head_v   = layer.head_v;
    const int64_t n_kv_h   = layer.kv_heads;

    std::vector<cache_op> ops;
    const auto set_rows = [&](ggml_type type, int64_t head) {
        ggml_tensor * cache = ggml_new_tensor_2d(ctx, type, head * n_kv_h, n_kv);
        ggml_tensor * rows  = ggml_new_tensor_2d(ctx, GGML_TYPE_F32, head * n_kv_h, n_tokens);
        ggml_tensor * index = ggml_new_tensor_1d(ctx, GGML_TYPE_I64, n_tokens);
        ops.emplace_back(ggml_set_rows(ctx, cache, rows, index), type);
    };
    if (turbo_is_type(type_k)) {
        set_rows(type_k, head_k);
    }
    if (turbo_is_type(type_v) && !mla) {
        set_rows(type_v, head_v);
    }

    ggml_tensor * k = ggml_new_tensor_3d(ctx, type_k, head_k, n_kv_h, n_kv);
    k = ggml_permute(ctx, k, 0, 2, 1, 3);
    ggml_tensor * q = ggml_new_tensor_3d(ctx, GGML_TYPE_F32, head_k, n_tokens, layer.heads);
    const ggml_type type_any = turbo_is_type(type_k) ? type_k : type_v;
    if (!flash_attention) {
        ops.emplace_back(ggml_mul_mat(ctx, k, q), type_any);
    } else {
        ggml_tensor * v;
        if (mla) { // V is the front of K's rows
            v = ggml_view_4d(ctx, k, head_v, k->ne[1], k->ne[2], k->ne[3], k->nb[1], k->nb[2], k->nb[3], 0);
        } else {
            v = ggml_permute(ctx, ggml_new_tensor_3d(ctx, type_v, head_v, n_kv_h, n_kv), 0, 2, 1, 3);
        }
        ggml_tensor * mask = ggml_new_tensor_2d(ctx, GGML_TYPE_F16, n_kv, 64);
        ops.emplace_back(ggml_flash_attn_ext(ctx, q, k, v, mask, 1.0f, 0.0f, 0.0f), type_any);
    }
    return ops;
}

// A remote device (RPC) cannot be asked which types its server knows.
static bool is_remote(ggml_backend_dev_t dev) {
    const ggml_backend_reg_t reg = ggml_backend_dev_backend_reg(dev);
    return reg && strcmp(ggml_backend_reg_name(reg), "RPC") == 0;
}

ggml_type turbo_auto_type(const turbo_model & model, bool offloaded) {
    for (const uint32_t il : turbo_cached_layers(model)) {
        ggml_backend_dev_t dev = offloaded ? model.layers[il].device : nullptr;
        if (dev && ggml_backend_dev_type(dev) != GGML_BACKEND_DEVICE_TYPE_CPU) {
            return GGML_TYPE_TURBO4;
        }
    }
    return GGML_TYPE_TURBO4_TCQ;
}

bool turbo_check_devices(const turbo_layer_types & chosen, bool flash_attention) {
    const bool mla = chosen.about.mla;
    std::set<std::tuple<ggml_backend_dev_t, ggml_type, ggml_type>> asked;
    for (const uint32_t il : turbo_cached_layers(chosen.about)) {
        const turbo_layer & layer  = chosen.about.layers[il];
        ggml_backend_dev_t  dev    = layer.device;
        const ggml_type     type_k = chosen.k[il];
        const ggml_type     type_v = mla ? type_k : chosen.v[il];
        if (!dev || !(turbo_is_type(type_k) || turbo_is_type(type_v)) || !asked.insert({ dev, type_k, type_v }).second) {
            continue;
        }
        if (is_remote(dev) && !turbo_trusts_rpc()) {
            turbo_error("%s holds the KV cache of layer %u, and a remote server cannot be asked "
                    "whether it knows %s: keep the cache here with -nkvo, or set TURBOQUANT_RPC=1 if its rpc-server is "
                    "patched too",
                    ggml_backend_dev_name(dev), il, ggml_type_name(turbo_is_type(type_k) ? type_k : type_v));
            return false;
        }

        ggml_context_ptr ctx{ ggml_init({ 32 * ggml_tensor_overhead(), nullptr, true }) };
        const auto       ops = cache_ops(ctx.get(), layer, type_k, type_v, mla, flash_attention);
        for (const auto & [op, type] : ops) {
            if (!ggml_backend_dev_supports_op(dev, op)) {
                turbo_error("%s (%s) holds the KV cache of layer %u and cannot run %s on %s: keep the "
                        "cache in the CPU's memory with -nkvo, keep the layers there with -ngl 0, or build this "
                        "backend with TurboQuant's kernels", ggml_backend_dev_name(dev),
                        ggml_backend_dev_description(dev), il, ggml_op_name(op->op), ggml_type_name(type));
                return false;
            }
        }
    }
    return true;
}

// True if attention on the device reads an exact window of this layer with this number of slots.
static bool reads_window(ggml_backend_dev_t dev, const turbo_layer & layer, ggml_type type_k, ggml_type type_v,
                         int64_t slots, ggml_type slot_type) {
    ggml_context_ptr ctx_ptr{ ggml_init({ 32 * ggml_tensor_overhead(), nullptr, true }) };
    ggml_context *   ctx      = ctx_ptr.get();
    const int64_t    n_tokens = 32;
    const auto rows = [&](ggml_type type, int64_t head, int64_t n) {
        return ggml_permute(ctx, ggml_new_tensor_3d(ctx, type, head, layer.kv_heads, n), 0, 2, 1, 3);
    };
    ggml_tensor * q  = ggml_new_tensor_3d(ctx, GGML_TYPE_F32, layer.head_k, n_tokens, layer.heads);
    ggml_tensor * op = ggml_flash_attn_ext(ctx, q, rows(type_k, layer.head_k, 256), rows(type_v, layer.head_v, 256),
                                           ggml_new_tensor_2d(ctx, GGML_TYPE_F16, 256, n_tokens), 1.0f, 0.0f, 0.0f);
    op->src[TURBO_SRC_SLOTS_K]    = rows(slot_type, layer.head_k, slots);
    op->src[TURBO_SRC_SLOTS_V]    = rows(slot_type, layer.head_v, slots);
    op->src[TURBO_SRC_EXACT_MASK] = ggml_new_tensor_2d(ctx, GGML_TYPE_F16, slots + n_tokens, n_tokens + TURBO_CELL_ROWS);
    op->src[TURBO_SRC_BATCH_K]    = rows(GGML_TYPE_F32, layer.head_k, n_tokens);
    op->src[TURBO_SRC_BATCH_V]    = rows(GGML_TYPE_F32, layer.head_v, n_tokens);
    return ggml_backend_dev_supports_op(dev, op);
}

void turbo_choose_windows(turbo_layer_types & chosen, bool offloaded) {
    const turbo_model & model = chosen.about;
    chosen.windowed.assign(model.layers.size(), false);
    if (chosen.window == 0 || model.mla || model.own_attention) {
        return;
    }
    std::map<ggml_backend_dev_t, std::vector<uint32_t>> unread;
    for (const uint32_t il : turbo_cached_layers(model)) {
        const turbo_layer & layer = model.layers[il];
        ggml_backend_dev_t  dev =
            offloaded && layer.device ? layer.device : ggml_backend_dev_by_type(GGML_BACKEND_DEVICE_TYPE_CPU);
        // If other layers read the cache of a layer, the batch would overwrite its slots before they read these.
        if ((!turbo_is_type(chosen.k[il]) && !turbo_is_type(chosen.v[il])) || turbo_readers(model, il).size() > 1) {
            continue;
        }
        chosen.windowed[il] = reads_window(dev, layer, chosen.k[il], chosen.v[il], chosen.window, chosen.window_type);
        if (!chosen.windowed[il]) {
            unread[dev].push_back(il);
        }
    }
    for (const auto & [dev, layers] : unread) {
        turbo_info("no exact window for %s: attention on %s does not read one with K %s and V %s",
                   turbo_layer_list(layers).c_str(), ggml_backend_dev_name(dev), ggml_type_name(chosen.k[layers[0]]),
                   ggml_type_name(chosen.v[layers[0]]));
    }
}
