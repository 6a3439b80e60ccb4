// turbo-layers.cpp: see turbo-layers.h.

#include "llama/turbo-layers.h"

#include "ggml/turbo-types.h"

#include <map>
#include <string>
#include <tuple>

turbo_layer_types & turbo_chosen_types() {
    static thread_local turbo_layer_types chosen;
    return chosen;
}

// The type with the longest block that divides all `heads` (values per head, for each layer with a cache). If there is
// none, the result is GGML_TYPE_COUNT, and *bad is the index of the layer.
static ggml_type type_for_heads(ggml_type type, const std::vector<uint32_t> & heads, size_t * bad) {
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

bool turbo_resolve_type(ggml_type & type, const turbo_model & model, bool keys) {
    if (!turbo_is_type(type)) {
        return true;
    }
    const char *                what   = keys ? "K" : "V";
    const char *                option = keys ? "-ctk" : "-ctv";
    const std::vector<uint32_t> layers = turbo_cached_layers(model);
    std::vector<uint32_t>       heads;
    for (const uint32_t il : layers) {
        heads.push_back(keys ? model.layers[il].head_k : model.layers[il].head_v);
    }
    size_t          bad    = 0;
    const ggml_type result = type_for_heads(type, heads, &bad);
    if (result == GGML_TYPE_COUNT) {
        if (heads[bad] % 32 != 0) {
            turbo_error("%s type %s does not work with the head size %u (layer %u); multiples of 32 do "
                    "(64, 96, 128, 192, 256, 512, 576): use %s f16 with this model",
                    what, ggml_type_name(type), heads[bad], layers[bad], option);
        } else {
            turbo_error("%s type %s: its block does not divide the head size %u (layer %u): use "
                    "%s %s, which takes the largest block that does, or %s f16",
                    what, ggml_type_name(type), heads[bad], layers[bad], option, ggml_type_name(turbo_family(type)),
                    option);
        }
        return false;
    }
    if (result != type) {
        const uint32_t block = ggml_blck_size(result);
        size_t         why   = 0;
        while (why + 1 < heads.size() && heads[why] % (2 * block) == 0) {
            ++why;
        }
        turbo_warn("%s type %s -> %s, because the head size is %u: "
                "%.4g instead of %.4g bits per value", what, ggml_type_name(type), ggml_type_name(result), heads[why],
                turbo_bits_per_value(result), turbo_bits_per_value(type));
        type = result;
    }
    return true;
}

ggml_type turbo_common_type(const std::vector<ggml_type> & types) {
    const auto rank = [](ggml_type type) {
        return std::make_tuple(!turbo_is_type(type), !ggml_is_quantized(type), turbo_bits_per_value(type));
    };
    ggml_type best = GGML_TYPE_COUNT;
    for (const ggml_type type : types) {
        if (type != GGML_TYPE_COUNT && (best == GGML_TYPE_COUNT || rank(type) < rank(best))) {
            best = type;
        }
    }
    return best;
}

double turbo_mean_bits(const std::vector<ggml_type> & types, const turbo_model & model, bool keys) {
    double bits   = 0;
    double values = 0;
    for (uint32_t il = 0; il < types.size(); ++il) {
        if (types[il] != GGML_TYPE_COUNT) {
            const double n = keys ? model.layers[il].values_k : model.layers[il].values_v;
            bits += n * turbo_bits_per_value(types[il]);
            values += n;
        }
    }
    return values > 0 ? bits / values : 0.0;
}

// ---- hooks ---------------------------------------------------------------------------------------------------------

void turbo_set_layer_types(ggml_tensor * k, ggml_tensor * v, const llama_model & model, const llama_hparams & hparams,
                           uint32_t il) {
    const turbo_layer_types & chosen = turbo_chosen_types();
    if (chosen.model != &model || !turbo_is_own_cache(model, hparams)) {
        return;
    }
    const auto set = [](ggml_tensor * tensor, ggml_type type) {
        if (!tensor || type == GGML_TYPE_COUNT || tensor->type == type) {
            return;
        }
        tensor->type  = type;
        tensor->nb[0] = ggml_type_size(type);
        tensor->nb[1] = ggml_row_size(type, tensor->ne[0]);
        for (int i = 2; i < GGML_MAX_DIMS; ++i) {
            tensor->nb[i] = tensor->nb[i - 1] * tensor->ne[i - 1];
        }
    };
    set(k, chosen.k[il]);
    set(v, chosen.v[il]);
}

void turbo_log_types(const std::vector<turbo_logged_layer> & layers, const llama_model & model) {
    const turbo_layer_types & chosen = turbo_chosen_types();
    if (chosen.model != &model) {
        return;
    }
    const auto mib = [](const ggml_tensor * tensor, ggml_type type) {
        return ggml_row_size(type, tensor->ne[0]) * tensor->ne[1] * tensor->ne[2] / 1048576.0;
    };
    // The guard: the layers by their new type.
    std::map<ggml_type, std::vector<uint32_t>> promoted;
    std::map<ggml_type, std::string>           sigmas;
    double                                     more = 0;
    std::vector<uint32_t>                      boundary;
    for (const auto & layer : layers) {
        const double sigma = chosen.sigma[layer.il];
        if (layer.k && sigma > chosen.limit && layer.k->type != chosen.asked_k) {
            promoted[layer.k->type].push_back(layer.il);
            sigmas[layer.k->type] += (sigmas[layer.k->type].empty() ? "" : ", ") + turbo_number(sigma);
            more += mib(layer.k, layer.k->type) - mib(layer.k, chosen.asked_k);
        }
        if (layer.v && chosen.v[layer.il] != chosen.inner_v[layer.il]) {
            boundary.push_back(layer.il);
        }
    }
    if (!promoted.empty()) {
        std::string text;
        for (const auto & [type, list] : promoted) {
            text += (text.empty() ? "" : "; ") + std::string("K of ") + turbo_layer_list(list) + " is kept in " +
                    ggml_type_name(type) + " (noise " + sigmas[type] + ")";
        }
        turbo_warn("guard: %s, because %s would put noise of more than %s nats into their scores; this "
                "takes %.2f MiB more, and --cache-guard off turns it off", text.c_str(),
                ggml_type_name(chosen.asked_k), turbo_number(chosen.limit).c_str(), more);
    }
    if (!boundary.empty()) {
        const ggml_type better = chosen.v[boundary[0]];
        const ggml_type inner  = chosen.inner_v[boundary[0]];
        turbo_info("boundary V: %d of %d layers keep V in %s (%.4g bits per value) instead of %s: %s",
                (int) boundary.size(), (int) layers.size(), ggml_type_name(better), turbo_bits_per_value(better),
                ggml_type_name(inner), turbo_layer_ranges(boundary).c_str());
    }
}
