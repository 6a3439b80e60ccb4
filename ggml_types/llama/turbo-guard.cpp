// turbo-guard.cpp: see turbo-guard.h.

#include "llama/turbo-guard.h"

#include "ggml/turbo-types.h"
#include "llama/turbo-layers.h"
#include "llama/turbo-noise.h"

#include <algorithm>
#include <map>

// The type with 4 bits of the same kind: trellis-coded or not.
static ggml_type four_bits(ggml_type type) {
    switch ((int) turbo_family(type)) {
        case GGML_TYPE_TURBO4_TCQ:
        case GGML_TYPE_TURBO3_TCQ:
        case GGML_TYPE_TURBO2_TCQ: return GGML_TYPE_TURBO4_TCQ;
        default: return GGML_TYPE_TURBO4;
    }
}

void turbo_apply_guard(turbo_layer_types & chosen, const std::vector<turbo_layer_power> & powers) {
    const turbo_model & model = chosen.about;
    std::map<std::string, std::vector<uint32_t>> unknown;
    for (const uint32_t il : turbo_cached_layers(model)) {
        double     sigma = 0;
        const auto noise = [&](ggml_type type) {
            double worst = 0;
            for (const uint32_t reader : turbo_readers(model, il)) {
                if (powers[reader].unknown.empty()) {
                    worst = std::max(worst, turbo_score_noise(powers[il], powers[reader], type, model.rotated));
                }
            }
            return worst;
        };
        if (!powers[il].unknown.empty()) {
            unknown[powers[il].unknown].push_back(il);
            continue;
        }
        chosen.sigma[il] = sigma = noise(chosen.k[il]);
        // Keys that a bias makes large are nearly equal, and so are their errors in q8_0, and softmax ignores an equal
        // error of all keys. So the prediction for q8_0 counts half.
        const auto limit = [&](ggml_type type) { return type == GGML_TYPE_Q8_0 ? 2 * chosen.limit : chosen.limit; };
        for (const ggml_type wanted : { four_bits(chosen.asked_k), GGML_TYPE_Q8_0, GGML_TYPE_F16 }) {
            const ggml_type better = turbo_type_for_head(wanted, model.layers[il].head_k);
            if (sigma <= limit(chosen.k[il])) {
                break;
            }
            if (better != GGML_TYPE_COUNT && turbo_bits_per_value(better) > turbo_bits_per_value(chosen.k[il])) {
                sigma          = noise(better);
                chosen.k[il] = better;
            }
        }
    }
    for (const auto & [why, layers] : unknown) {
        if (why == "the weights are not loaded") { // llama.cpp only estimates the memory
            continue;
        }
        turbo_warn("guard: K of %s cannot be predicted (%s) and stays in %s; measure this model with "
                "`turboquant compare` before you rely on it", turbo_layer_list(layers).c_str(), why.c_str(),
                ggml_type_name(chosen.asked_k));
    }
}
