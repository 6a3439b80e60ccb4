// turbo-model.cpp: see turbo-model.h.

#include "llama/turbo-model.h"

#include "llama/turbo-rotation.h"

#include "llama-hparams.h"
#include "llama-impl.h"
#include "llama-model.h"

#include <cmath>
#include <cstdarg>
#include <cstdio>
#include <cstdlib>

turbo_model turbo_describe_model(const llama_model & model) {
    const llama_hparams & hparams = model.hparams;
    turbo_model           result;
    for (uint32_t il = 0; il < hparams.n_layer_all; ++il) {
        turbo_layer layer;
        layer.recurrent = hparams.is_recr(il);
        layer.has_kv    = hparams.has_kv(il);
        layer.window    = hparams.is_swa(il);
        layer.head_k    = hparams.n_embd_head_k(il);
        layer.head_v    = hparams.n_embd_head_v(il);
        layer.heads     = hparams.n_head(il);
        layer.kv_heads  = hparams.n_head_kv(il);
        layer.values_k  = hparams.n_embd_k_gqa(il);
        layer.values_v  = hparams.n_embd_v_gqa(il);
        layer.n_rot     = hparams.n_rot(il);
        layer.scale     = hparams.f_attention_scale != 0.0f ? hparams.f_attention_scale
                                                            : 1.0f / std::sqrt((float) layer.head_k);
        layer.cached    = layer.has_kv && !layer.recurrent && layer.kv_heads > 0;
        layer.device    = layer.cached ? model.dev_layer(il) : nullptr;
        result.layers.push_back(layer);
    }
    const char * disable = getenv("LLAMA_ATTN_ROT_DISABLE");
    result.own_layers    = hparams.n_layer();
    result.arch          = model.arch_name();
    result.rope          = llama_model_rope_type(&model);
    result.mla           = hparams.is_mla();
    result.own_attention = turbo_has_own_attention(result.arch.c_str());
    result.rotated = turbo_rotates_by_layer(model) && hparams.n_embd_head_k() % 64 == 0 && !(disable && atoi(disable));
    return result;
}

const ggml_tensor * turbo_weight(const llama_model & model, const std::string & name) {
    return model.get_tensor(name.c_str());
}

bool turbo_is_own_cache(const llama_model & model, const llama_hparams & hparams) {
    return &hparams == &model.hparams;
}

bool turbo_rotates_by_layer(const llama_model & model) {
    return !model.hparams.is_mla() && !turbo_has_own_attention(model.arch_name().c_str());
}

std::vector<uint32_t> turbo_readers(const turbo_model & model, uint32_t il) {
    std::vector<uint32_t> list = { il };
    for (uint32_t other = il + 1; other < model.own_layers; ++other) {
        if (model.layers[other].window != model.layers[il].window) {
            continue;
        }
        if (model.layers[other].has_kv) {
            break;
        }
        list.push_back(other);
    }
    return list;
}

std::vector<uint32_t> turbo_cached_layers(const turbo_model & model) {
    std::vector<uint32_t> layers;
    for (uint32_t il = 0; il < model.layers.size(); ++il) {
        if (model.layers[il].cached) {
            layers.push_back(il);
        }
    }
    return layers;
}

// ---- the log -------------------------------------------------------------------------------------------------------

static std::string format_line(const char * format, va_list arguments) {
    va_list again;
    va_copy(again, arguments);
    std::string text(vsnprintf(nullptr, 0, format, again), '\0');
    va_end(again);
    vsnprintf(&text[0], text.size() + 1, format, arguments);
    return text;
}

#define TURBO_DEFINE_LOG(name, LEVEL)                                                \
    void name(const char * format, ...) {                                            \
        va_list arguments;                                                           \
        va_start(arguments, format);                                                 \
        LLAMA_LOG_##LEVEL("turboquant: %s\n", format_line(format, arguments).c_str()); \
        va_end(arguments);                                                           \
    }
TURBO_DEFINE_LOG(turbo_info, INFO)
TURBO_DEFINE_LOG(turbo_warn, WARN)
TURBO_DEFINE_LOG(turbo_error, ERROR)

std::string turbo_layer_ranges(const std::vector<uint32_t> & layers) {
    std::string text;
    for (size_t i = 0; i < layers.size();) {
        size_t end = i;
        while (end + 1 < layers.size() && layers[end + 1] == layers[end] + 1) {
            ++end;
        }
        text += (i ? ", " : "") + std::to_string(layers[i]);
        if (end > i) {
            text += (end > i + 1 ? "-" : ", ") + std::to_string(layers[end]);
        }
        i = end + 1;
    }
    return text;
}

std::string turbo_layer_list(const std::vector<uint32_t> & layers) {
    return (layers.size() == 1 ? "layer " : "layers ") + turbo_layer_ranges(layers);
}

std::string turbo_number(double value) {
    char text[32];
    snprintf(text, sizeof(text), "%.3g", value);
    return text;
}
