// turbo-boundary.cpp: see turbo-boundary.h.

#include "llama/turbo-boundary.h"

#include "ggml/turbo-options.h"
#include "llama/turbo-layers.h"

// True if il is one of the first or the last n layers with a cache. Layers for multi-token prediction, which follow the
// model's own layers, do not count.
static bool is_boundary(const turbo_model & model, uint32_t il, int n) {
    if (n <= 0 || il >= model.own_layers || !model.layers[il].cached) {
        return false;
    }
    int before = 0;
    int after  = 0;
    for (uint32_t other = 0; other < model.own_layers; ++other) {
        if (model.layers[other].cached) {
            before += other < il;
            after  += other > il;
        }
    }
    return before < n || after < n;
}

bool turbo_apply_boundary(turbo_layer_types & chosen, const turbo_options & options) {
    const ggml_type wanted = options.boundary_type;
    for (uint32_t il = 0; il < chosen.v.size(); ++il) {
        if (!is_boundary(chosen.about, il, options.boundary_layers) || chosen.v[il] == GGML_TYPE_COUNT) {
            continue;
        }
        const uint32_t  head = chosen.about.layers[il].head_v;
        const ggml_type type = turbo_type_for_head(wanted, head);
        if (type == GGML_TYPE_COUNT) {
            if (turbo_better_type(chosen.v[il], wanted) == chosen.v[il]) {
                continue;
            }
            turbo_error("--cache-boundary-v: the block of %s (%d values) does not divide the head size %u of layer %u: use "
                        "%d:f16", ggml_type_name(wanted), (int) ggml_blck_size(wanted), head, il, options.boundary_layers);
            return false;
        }
        chosen.v[il] = turbo_better_type(chosen.v[il], type);
    }
    return true;
}
