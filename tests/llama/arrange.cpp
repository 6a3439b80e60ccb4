// arrange: checks how RoPE of queries is moved to that of keys in a graph, which product is found behind attention, and
// which attention ops share notes of masks (ggml_types/cuda/turbo-graph.h).
#include "cuda/turbo-graph.h"

#include <cstdio>
#include <map>
#include <string>
#include <vector>

namespace {

constexpr int head = 128, heads = 4, kv_heads = 2, tokens = 3, width = 256, rows = 32;

struct Case {
    const char * name;
    ggml_type    cache;
    bool         bias, bias_in_place, norm, reads, in_place;
    float        base; // of the angles of keys
    bool         moves;
};

struct Layer {
    ggml_tensor *q, *k, *q_source;
};

ggml_tensor * named(ggml_tensor * t, const char * name) {
    ggml_set_name(t, name);
    return t;
}

Layer add_layer(ggml_context * ctx, ggml_cgraph * graph, const Case & c, ggml_tensor * x, ggml_tensor * positions) {
    const auto weights = [&](int n) { return ggml_new_tensor_2d(ctx, GGML_TYPE_F32, width, n * head); };
    const auto turned  = [&](ggml_tensor * t, float base, bool in_place) {
        return (in_place ? ggml_rope_ext_inplace : ggml_rope_ext)(ctx, t, positions, nullptr, head, GGML_ROPE_TYPE_NEOX,
                                                                  4096, base, 1, 0, 1, 32, 1);
    };
    Layer layer;
    layer.q_source = ggml_reshape_3d(ctx, ggml_mul_mat(ctx, weights(heads), x), head, heads, tokens);
    layer.q        = named(turned(layer.q_source, 10000, c.in_place), "q");
    ggml_build_forward_expand(graph, layer.q);
    ggml_tensor * v = named(ggml_mul_mat(ctx, weights(kv_heads), x), "v");
    if (c.bias) {
        v = named((c.bias_in_place ? ggml_add_inplace : ggml_add)(
                      ctx, v, ggml_new_tensor_1d(ctx, GGML_TYPE_F32, kv_heads * head)),
                  "bias");
    }
    if (c.norm) {
        v = named(ggml_rms_norm(ctx, v, 1e-5f), "norm");
    }
    if (c.reads) {
        v = named(ggml_mul_mat(ctx, ggml_new_tensor_2d(ctx, GGML_TYPE_F32, heads * head, kv_heads * head),
                               ggml_reshape_2d(ctx, layer.q, heads * head, tokens)),
                  "reader");
    }
    ggml_build_forward_expand(graph, v);
    ggml_tensor * k = ggml_mul_mat(ctx, weights(kv_heads), x);
    layer.k         = named(turned(ggml_reshape_3d(ctx, k, head, kv_heads, tokens), c.base, false), "k");
    ggml_build_forward_expand(graph, layer.k);
    ggml_tensor * index = ggml_new_tensor_1d(ctx, GGML_TYPE_I64, tokens);
    ggml_tensor * cache[2];
    for (int i = 0; i < 2; ++i) {
        cache[i] = ggml_new_tensor_2d(ctx, c.cache, kv_heads * head, rows);
        ggml_build_forward_expand(
            graph, ggml_set_rows(ctx, cache[i], ggml_reshape_2d(ctx, i ? v : layer.k, kv_heads * head, tokens), index));
        cache[i] = ggml_permute(ctx, ggml_reshape_3d(ctx, cache[i], head, kv_heads, rows), 0, 2, 1, 3);
    }
    ggml_tensor * q = ggml_permute(ctx, layer.q, 0, 2, 1, 3);
    ggml_build_forward_expand(graph, ggml_flash_attn_ext(ctx, q, cache[0], cache[1], nullptr, 0.1f, 0, 0));
    return layer;
}

int position(const ggml_cgraph * graph, const ggml_tensor * t) {
    for (int i = 0; i < graph->n_nodes; ++i) {
        if (graph->nodes[i] == t) {
            return i;
        }
    }
    return -1;
}

// Whether every node comes after its sources.
bool in_order(const ggml_cgraph * graph) {
    for (int i = 0; i < graph->n_nodes; ++i) {
        for (const ggml_tensor * src : graph->nodes[i]->src) {
            if (src && position(graph, src) > i) {
                return false;
            }
        }
    }
    return true;
}

bool passes(const Case & c) {
    ggml_init_params params{ 1 << 20, nullptr, true };
    ggml_context *   ctx       = ggml_init(params);
    ggml_cgraph *    graph     = ggml_new_graph(ctx);
    ggml_tensor *    positions = ggml_new_tensor_1d(ctx, GGML_TYPE_I32, tokens);
    std::vector<Layer> layers;
    for (int i = 0; i < 2; ++i) {
        layers.push_back(
            add_layer(ctx, graph, c, ggml_new_tensor_2d(ctx, GGML_TYPE_F32, width, tokens), positions));
    }
    const std::vector<ggml_tensor *> before(graph->nodes, graph->nodes + graph->n_nodes);
    turbo_arrange_ropes(graph, nullptr);
    bool ok = std::equal(before.begin(), before.end(), graph->nodes);
    std::vector<ggml_tensor *> kept;
    const turbo_keep           keep = [&](ggml_tensor * tensor, ggml_tensor * until) {
        kept.push_back(tensor);
        kept.push_back(until);
    };
    for (int times = 0; times < 2; ++times) { // a graph may be arranged again
        kept.clear();
        turbo_arrange_ropes(graph, keep);
        ok = ok && in_order(graph) && kept.size() == (c.moves ? 4 : 0);
        for (size_t i = 0; ok && i < layers.size(); ++i) {
            const Layer & layer = layers[i];
            ok = !c.moves || (position(graph, layer.q) + 1 == position(graph, layer.k) &&
                              kept[2 * i] == layer.q_source && kept[2 * i + 1] == layer.k);
        }
    }
    ok = ok && (c.moves || std::equal(before.begin(), before.end(), graph->nodes));
    std::vector<ggml_tensor *> now(graph->nodes, graph->nodes + graph->n_nodes), sorted = before;
    std::sort(now.begin(), now.end());
    std::sort(sorted.begin(), sorted.end());
    ok = ok && now == sorted;
    ggml_free(ctx);
    return ok;
}

// Attention, and a product of weights with its output.
struct Product {
    const char * name;
    ggml_type    weights;
    int          columns;
    bool         of_half, between; // whether it reads half of the output; whether another op is between
    bool         found;
};

bool passes(const Product & c) {
    constexpr int    padding = 512, most_columns = 8; // as in ggml-cuda
    ggml_init_params params{ 1 << 20, nullptr, true };
    ggml_context *   ctx   = ggml_init(params);
    ggml_cgraph *    graph = ggml_new_graph(ctx);
    ggml_tensor *    q     = ggml_new_tensor_3d(ctx, GGML_TYPE_F32, head, c.columns, heads);
    ggml_tensor *    cache = ggml_new_tensor_3d(ctx, GGML_TYPE_TURBO4, head, rows, kv_heads);
    ggml_tensor *    op    = ggml_flash_attn_ext(ctx, q, cache, cache, nullptr, 0.1f, 0, 0);
    const int        count = (c.of_half ? heads / 2 : heads) * head;
    ggml_tensor *    values = c.of_half ? ggml_view_2d(ctx, op, count, c.columns, heads * head * sizeof(float), 0) :
                                          ggml_reshape_2d(ctx, op, count, c.columns);
    ggml_tensor *    product = ggml_mul_mat(ctx, ggml_new_tensor_2d(ctx, c.weights, count, width), values);
    ggml_build_forward_expand(graph, op);
    ggml_tensor * other = ggml_scale(ctx, ggml_new_tensor_1d(ctx, GGML_TYPE_F32, width), 2);
    if (c.between) {
        ggml_build_forward_expand(graph, other);
    }
    ggml_build_forward_expand(graph, product);
    for (ggml_tensor * node : { op, product, other }) {
        node->flags |= GGML_TENSOR_FLAG_COMPUTE;
    }
    const int           at   = turbo_next_node(graph, position(graph, op));
    const ggml_tensor * found = turbo_product_of(graph, op, at, most_columns, padding);
    const bool          ok   = found == (c.found ? product : nullptr) &&
                    !turbo_product_of(graph, op, graph->n_nodes, most_columns, padding);
    ggml_free(ctx);
    return ok;
}

// Layers of a model, whose attention ops share notes of masks. An evaluation has a letter for each op that is computed:
// w if it writes notes, r if it reads those of an op that is computed before it, - if there is no memory for them.
class Layers {
  public:
    ggml_cgraph *               graph;
    std::vector<ggml_tensor *>  ops;
    std::map<ggml_tensor *, int> keys;    // 0 if it is not here
    ggml_tensor *               by_half = nullptr; // an op that the kernels do not cover
    turbo_notes<int>            notes;

    // masks: a letter for each layer, which names its mask, and one for its exact mask.
    Layers(const std::string & masks, const std::string & exact) : ctx_(ggml_init({ 1 << 20, nullptr, true })) {
        graph = ggml_new_graph(ctx_);
        for (size_t i = 0; i < masks.size(); ++i) {
            ggml_tensor * q     = ggml_new_tensor_3d(ctx_, GGML_TYPE_F32, head, tokens, heads);
            ggml_tensor * cache = ggml_new_tensor_3d(ctx_, GGML_TYPE_TURBO4, head, rows, kv_heads);
            ggml_tensor * op    = ggml_flash_attn_ext(ctx_, q, cache, cache, mask(masks[i]), 0.1f, 0, 0);
            op->src[TURBO_SRC_EXACT_MASK] = mask(exact[i]);
            ggml_build_forward_expand(graph, ggml_scale(ctx_, op, 2)); // so that not every node is attention
            ops.push_back(op);
            op->flags |= GGML_TENSOR_FLAG_COMPUTE;
        }
    }
    Layers(const Layers &) = delete;
    ~Layers() { ggml_free(ctx_); }

    std::string evaluate(const ggml_cgraph * part) {
        std::string                       letters;
        std::vector<const ggml_tensor *> computed;
        for (int at = 0; at < part->n_nodes; ++at) {
            ggml_tensor * op = part->nodes[at];
            if (turbo_op_kind(op) != turbo_op::attention || !(op->flags & GGML_TENSOR_FLAG_COMPUTE) ||
                ggml_is_empty(op)) {
                continue;
            }
            notes.forget(op);
            if (op == by_half) {
                continue;
            }
            const int key = keys[op];
            if (const auto * found = notes.find(part, at, key)) {
                letters += std::count(computed.begin(), computed.end(), found->writer) == 1 ? 'r' : '!';
            } else if (auto * entry = notes.choose(part, at, 1)) {
                entry->writer = op;
                entry->index  = at;
                entry->key    = key;
                letters += 'w';
            } else {
                letters += '-';
            }
            computed.push_back(op);
        }
        return letters;
    }
    std::string evaluate() { return evaluate(graph); }

  private:
    ggml_context *                  ctx_;
    std::map<char, ggml_tensor *> masks_;

    ggml_tensor * mask(char name) {
        ggml_tensor *& t = masks_[name];
        t                = t ? t : ggml_new_tensor_2d(ctx_, GGML_TYPE_F16, rows, tokens);
        return t;
    }
};

int expect(const char * name, const std::string & found, const std::string & wanted) {
    std::printf("%s: %s\n", name, found == wanted ? "passed" : ("failed: " + found).c_str());
    return found != wanted;
}

int shared_notes() {
    int     failures   = 0;
    int64_t no_streams = 0;
    {
        Layers layers("aaa", "xxx");
        failures += expect("notes of the first layer", layers.evaluate(), "wrr");
        failures += expect("the next evaluation writes them again", layers.evaluate(), "wrr");
        ggml_cgraph part = ggml_graph_view(layers.graph, 1, layers.graph->n_nodes); // from the scale on
        failures += expect("a view of later nodes", layers.evaluate(&part), "wr");
        failures += expect("the graph after its view", layers.evaluate(), "wrr");
        layers.ops[0]->flags &= ~GGML_TENSOR_FLAG_COMPUTE;
        failures += expect("a first op that is not computed", layers.evaluate(), "wr");
        layers.ops[0]->flags |= GGML_TENSOR_FLAG_COMPUTE;
        failures += expect("and is computed again", layers.evaluate(), "wrr");
        std::swap(layers.ops[0]->ne[3], no_streams);
        failures += expect("a first op without streams", layers.evaluate(), "wr");
        std::swap(layers.ops[0]->ne[3], no_streams);
        failures += expect("and with streams", layers.evaluate(), "wrr");
        layers.by_half = layers.ops[0];
        failures += expect("a first op that ggml computes", layers.evaluate(), "wr");
        layers.by_half = nullptr;
        failures += expect("and that does not any more", layers.evaluate(), "wrr");
        layers.ops[0]->op = GGML_OP_ADD;
        failures += expect("another op where the first one was", layers.evaluate(), "wr");
    }
    {
        Layers layers("abab", "xxxx");
        failures += expect("two masks", layers.evaluate(), "wwrr");
        failures += expect("two masks again", layers.evaluate(), "wwrr");
    }
    {
        Layers layers("aaaa", "xyyx");
        failures += expect("two exact masks", layers.evaluate(), "wwrr");
    }
    {
        Layers layers("aaa", "xxx");
        layers.keys[layers.ops[1]] = 1;
        failures += expect("another key", layers.evaluate(), "wwr");
    }
    {
        Layers layers("abcdeae", "xxxxxxx");
        failures += expect("more masks than entries", layers.evaluate(), "wwww-r-");
        failures += expect("more masks than entries again", layers.evaluate(), "wwww-r-");
    }
    {
        Layers layers("aa", "xx");
        auto & entries   = layers.notes.entries;
        entries[1].bytes = 5;
        entries[2].bytes = 3;
        const auto chosen = [&](size_t bytes) {
            return std::to_string(layers.notes.choose(layers.graph, 0, bytes) - entries);
        };
        failures += expect("the smallest memory that suffices, else the largest", chosen(2) + chosen(4) + chosen(6),
                           "211");
    }
    return failures;
}

template <typename C> int run(const C & c) {
    const bool ok = passes(c);
    std::printf("%s: %s\n", c.name, ok ? "passed" : "failed");
    return !ok;
}

} // namespace

int main() {
    const Case cases[] = {
        { "a turbo cache", GGML_TYPE_TURBO4, false, false, false, false, false, 10000, true },
        { "a sum between", GGML_TYPE_TURBO3, true, false, false, false, false, 10000, true },
        { "a sum in place", GGML_TYPE_TURBO3, true, true, false, false, false, 10000, false },
        { "another cache", GGML_TYPE_Q8_0, false, false, false, false, false, 10000, false },
        { "other angles", GGML_TYPE_TURBO4, false, false, false, false, false, 20000, false },
        { "another op between", GGML_TYPE_TURBO4, false, false, true, false, false, 10000, false },
        { "a reader between", GGML_TYPE_TURBO4, false, false, false, true, false, 10000, false },
        { "RoPE in place", GGML_TYPE_TURBO4, false, false, false, false, true, 10000, false },
    };
    const Product products[] = {
        { "a product of attention's output", GGML_TYPE_Q4_0, 1, false, false, true },
        { "a product with eight columns", GGML_TYPE_Q6_K, 8, false, false, true },
        { "a product with nine columns", GGML_TYPE_Q4_0, 9, false, false, false },
        { "a product of weights in f16", GGML_TYPE_F16, 1, false, false, false },
        { "a product of half of the output", GGML_TYPE_Q4_0, 1, true, false, false },
        { "an op before the product", GGML_TYPE_Q4_0, 1, false, true, false },
    };
    int failures = shared_notes();
    for (const Case & c : cases) {
        failures += run(c);
    }
    for (const Product & c : products) {
        failures += run(c);
    }
    return failures;
}
