// turbo-rotation.h: llama.cpp's own rotation of keys, queries and values, layer by layer: the hooks in llama-kv-cache.cpp
// and llama-graph.cpp.
//
// llama.cpp rotates either all layers of a quantized cache or none. The turbo types have a rotation of their own, and a
// second Hadamard transform before it would undo it. Half precision needs no rotation, and a context shift would not undo
// it. So in a cache of several types the layers of q8_0 and similar types are rotated, as in a cache of only such a type,
// and the other layers are not.
#pragma once

#include "ggml/turbo-types.h"
#include "llama/turbo-model.h"

#include "ggml.h"

#include <cstring>

// Architectures whose own code stores keys or computes attention. Either all their layers are rotated or none.
inline bool turbo_has_own_attention(const char * arch) {
    for (const char * one : { "deepseek32", "deepseek4", "dflash", "dots3note", "glm-dsa", "minimax-m3", "qwen4exp" }) {
        if (strcmp(arch, one) == 0) {
            return true;
        }
    }
    return false;
}

// Hook where the cache's constructor decides on rotation. False if a cache with turbo types has no layer to rotate.
template <typename Layers> bool turbo_rotates(const Layers & layers, const llama_model & model, bool keys) {
    bool turbo = false;
    bool other = false;
    for (const auto & layer : layers) {
        const ggml_tensor * cache = keys ? layer.k : layer.v;
        if (cache) {
            turbo = turbo || turbo_is_type(cache->type);
            other = other || (ggml_is_quantized(cache->type) && !turbo_is_type(cache->type));
        }
    }
    return !turbo || (other && turbo_rotates_by_layer(model));
}

// Hook at the top of build_attn. During the object's lifetime the function has no rotation for a layer that is stored
// without one.
class turbo_layer_rotation {
public:
    template <typename Cache>
    turbo_layer_rotation(ggml_context * ctx, ggml_cgraph * gf, const char * arch, const Cache & cache, int il,
                         ggml_tensor *& k, ggml_tensor *& v)
        : k_(k), v_(v), k_before_(k), v_before_(v) {
        if (turbo_has_own_attention(arch)) {
            return;
        }
        if (k && stored_plain(cache.get_k(ctx, il))) {
            ggml_build_forward_expand(gf, k); // an input that no layer of this graph uses would get no memory
            k = nullptr;
        }
        if (v && stored_plain(cache.get_v(ctx, il))) {
            ggml_build_forward_expand(gf, v);
            v = nullptr;
        }
    }

    ~turbo_layer_rotation() {
        k_ = k_before_;
        v_ = v_before_;
    }

    turbo_layer_rotation(const turbo_layer_rotation &)             = delete;
    turbo_layer_rotation & operator=(const turbo_layer_rotation &) = delete;

private:
    static bool stored_plain(const ggml_tensor * cache) {
        return turbo_is_type(cache->type) || !ggml_is_quantized(cache->type);
    }

    ggml_tensor *& k_;
    ggml_tensor *& v_;
    ggml_tensor *  k_before_;
    ggml_tensor *  v_before_;
};
