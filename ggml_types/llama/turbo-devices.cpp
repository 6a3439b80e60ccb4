// turbo-devices.cpp: see turbo-devices.h.

#include "llama/turbo-devices.h"

#include "ggml/turbo-options.h"
#include "llama/turbo-layers.h"

#include "ggml-cpp.h"

#include <cstring>
#include <set>
#include <tuple>
#include <utility>

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
        const ggml_backend_reg_t reg = ggml_backend_dev_backend_reg(dev);
        if (reg && strcmp(ggml_backend_reg_name(reg), "RPC") == 0 && !turbo_trusts_rpc()) {
            turbo_error("%s holds the KV cache of layer %u, and a remote server cannot be asked "
                    "whether it knows %s: keep the cache here with -nkvo, or set TURBOQUANT_RPC=1 if its rpc-server is "
                    "patched too",
                    ggml_backend_dev_name(dev), il, ggml_type_name(turbo_is_type(type_k) ? type_k : type_v));
            return false;
        }

        const int64_t n_kv     = 256;
        const int64_t n_tokens = 32;
        const int64_t head_k   = layer.head_k;
        const int64_t head_v   = layer.head_v;
        const int64_t n_head   = layer.heads;
        const int64_t n_kv_h   = layer.kv_heads;

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
        if (turbo_is_type(type_v) && !mla) {
            set_rows(type_v, head_v);
        }

        ggml_tensor * k = ggml_new_tensor_3d(ctx, type_k, head_k, n_kv_h, n_kv);
        k = ggml_permute(ctx, k, 0, 2, 1, 3);
        ggml_tensor * q = ggml_new_tensor_3d(ctx, GGML_TYPE_F32, head_k, n_tokens, n_head);
        const ggml_type type_any = turbo_is_type(type_k) ? type_k : type_v;
        if (!flash_attention) {
            ops.emplace_back(ggml_mul_mat(ctx, k, q), type_any);
        } else {
            ggml_tensor * v;
            if (mla) { // V is the first part of K's rows
                v = ggml_view_4d(ctx, k, head_v, k->ne[1], k->ne[2], k->ne[3], k->nb[1], k->nb[2], k->nb[3], 0);
            } else {
                v = ggml_permute(ctx, ggml_new_tensor_3d(ctx, type_v, head_v, n_kv_h, n_kv), 0, 2, 1, 3);
            }
            ggml_tensor * mask = ggml_new_tensor_2d(ctx, GGML_TYPE_F16, n_kv, 64);
            ops.emplace_back(ggml_flash_attn_ext(ctx, q, k, v, mask, 1.0f, 0.0f, 0.0f), type_any);
        }
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
