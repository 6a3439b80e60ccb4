// turbo-noise.cpp: the prediction of score noise from the weights. See turbo-noise.h.

#include "llama/turbo-noise.h"

#include "ggml/turbo-types.h"
#include "llama/turbo-model.h"

#include "ggml-backend.h"
#include "ggml-cpp.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <map>
#include <memory>
#include <mutex>

namespace {

// Random vectors per matrix. The relative error of a power is 1/sqrt(4 * rows) at best, and 1/2 if one direction
// dominates. The noise is the square root of a power.
constexpr int k_probes = 8;

// Random bits that depend only on `at` (splitmix64), so that a model has the same powers on every machine.
uint64_t bits(uint64_t at) {
    uint64_t x = (at + 1) * 0x9e3779b97f4a7c15u;
    x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9u;
    x = (x ^ (x >> 27)) * 0x94d049bb133111ebu;
    return x ^ (x >> 31);
}

float sign(uint64_t channel, uint64_t probe) {
    return bits(channel * k_probes + probe) & 1 ? 1.0f : -1.0f;
}

double uniform(uint64_t at) {
    return (double) (bits(at) >> 11) * 0x1p-53;
}

// Reads a tensor that no backend stores in a layout of its own: a norm, a bias, a scale.
std::vector<float> read_vector(const ggml_tensor * tensor) {
    std::vector<float> values(ggml_nelements(tensor));
    if (tensor->type == GGML_TYPE_F32) {
        ggml_backend_tensor_get(tensor, values.data(), 0, ggml_nbytes(tensor));
        return values;
    }
    const auto * traits = ggml_get_type_traits(tensor->type);
    if (!traits->to_float) {
        return {};
    }
    std::vector<char> bytes(ggml_nbytes(tensor));
    ggml_backend_tensor_get(tensor, bytes.data(), 0, bytes.size());
    traits->to_float(bytes.data(), values.data(), values.size());
    return values;
}

bool has_data(const ggml_tensor * tensor) {
    return tensor->buffer && ggml_backend_buffer_get_size(tensor->buffer) > 0;
}

// One matrix and its multiplicands.
struct product {
    const ggml_tensor * weight;
    std::vector<float>  input;  // (n_embd, columns): the random vectors, and the bias of the norm, if any
    int                 columns;
    ggml_tensor *       x = nullptr;
    ggml_tensor *       y = nullptr;
    std::vector<float>  output; // (rows, columns); empty if the device cannot compute the product
};

// The device that computes with a weight without a copy of it.
ggml_backend_dev_t device_of(const ggml_tensor * weight) {
    ggml_backend_buffer_type_t buft = ggml_backend_buffer_get_type(weight->buffer);
    ggml_backend_dev_t         dev  = ggml_backend_buft_get_device(buft);
    return !dev || ggml_backend_buft_is_host(buft) ? ggml_backend_dev_by_type(GGML_BACKEND_DEVICE_TYPE_CPU) : dev;
}

bool can_compute(ggml_backend_dev_t dev) {
    const auto type = ggml_backend_dev_type(dev);
    return type == GGML_BACKEND_DEVICE_TYPE_CPU || type == GGML_BACKEND_DEVICE_TYPE_GPU ||
           type == GGML_BACKEND_DEVICE_TYPE_IGPU;
}

void compute(ggml_backend_dev_t dev, const std::vector<product *> & products, int n_threads) {
    const size_t     leaves = 2 * products.size();
    ggml_context_ptr ctx_ptr{ ggml_init({ (leaves + products.size()) * ggml_tensor_overhead() +
            ggml_graph_overhead_custom(leaves + 1, false), nullptr, true }) };
    ggml_context * ctx   = ctx_ptr.get();
    ggml_cgraph *  graph = ggml_new_graph_custom(ctx, leaves + 1, false);
    bool           any   = false;
    for (product * one : products) {
        one->x = ggml_new_tensor_2d(ctx, GGML_TYPE_F32, one->weight->ne[0], one->columns);
        one->y = ggml_mul_mat(ctx, const_cast<ggml_tensor *>(one->weight), one->x);
        if (ggml_backend_dev_supports_op(dev, one->y)) {
            ggml_build_forward_expand(graph, one->y);
            any = true;
        } else {
            one->y = nullptr;
        }
    }
    ggml_backend_ptr backend{ any ? ggml_backend_dev_init(dev, nullptr) : nullptr };
    if (!backend) {
        return;
    }
    ggml_backend_reg_t reg = ggml_backend_dev_backend_reg(dev);
    auto * set_threads = (ggml_backend_set_n_threads_t) ggml_backend_reg_get_proc_address(reg, "ggml_backend_set_n_threads");
    if (set_threads) {
        set_threads(backend.get(), std::max(1, n_threads));
    }
    ggml_backend_buffer_ptr buffer{ ggml_backend_alloc_ctx_tensors(ctx, backend.get()) };
    if (!buffer) {
        return;
    }
    for (product * one : products) {
        ggml_backend_tensor_set(one->x, one->input.data(), 0, ggml_nbytes(one->x));
    }
    if (ggml_backend_graph_compute(backend.get(), graph) != GGML_STATUS_SUCCESS) {
        return;
    }
    for (product * one : products) {
        if (one->y) {
            one->output.resize(ggml_nelements(one->y));
            ggml_backend_tensor_get(one->y, one->output.data(), 0, ggml_nbytes(one->y));
        }
    }
}

// The tensors of a layer by their names in the file.
struct names {
    const llama_model & model;
    std::string         prefix;

    names(const llama_model & model, uint32_t il) : model(model), prefix("blk." + std::to_string(il) + ".") {}

    const ggml_tensor * operator()(const char * name) const { return turbo_weight(model, prefix + name); }
};

// The rows of a layer's matrices that compute its keys and queries.
struct layer_work {
    product *           k = nullptr;
    product *           q = nullptr;
    int64_t             first_k = 0; // row of the first key; the first query has row 0
    int64_t             q_chunk = 0; // rows from one query head to the next
    const ggml_tensor * bias_k = nullptr;
    const ggml_tensor * bias_q = nullptr;
    int64_t             first_bias_k = 0;
};

// The powers of `rows` rows of a product, starting at row `first`.
std::vector<float> row_powers(const product & one, int64_t first, int64_t rows, const std::vector<float> & bias,
                              int64_t first_bias, float factor) {
    const int64_t      stride = one.weight->ne[1];
    std::vector<float> powers(rows);
    for (int64_t row = 0; row < rows; ++row) {
        double random = 0;
        for (int c = 0; c < k_probes; ++c) {
            const double y = one.output[c * stride + first + row];
            random += y * y;
        }
        double constant = one.columns > k_probes ? factor * one.output[k_probes * stride + first + row] : 0.0;
        constant += bias.empty() ? 0.0 : bias[first_bias + row];
        powers[row] = (float) (factor * factor * random / k_probes + constant * constant);
    }
    return powers;
}

// Applies a norm of keys or queries: over each head (with weights for one head or for every head), or over all heads.
bool apply_norm(std::vector<float> & powers, uint32_t head, const ggml_tensor * weight, const ggml_tensor * bias) {
    const std::vector<float> w = read_vector(weight);
    const std::vector<float> b = bias ? read_vector(bias) : std::vector<float>();
    const size_t             n = powers.size();
    if (!(w.size() == head || w.size() == n) || !(b.empty() || b.size() == w.size())) {
        return false;
    }
    const size_t width = w.size() == n && weight->ne[1] == 1 ? n : head;
    for (size_t first = 0; first < n; first += width) {
        double sum = 0;
        for (size_t i = first; i < first + width; ++i) {
            sum += powers[i];
        }
        for (size_t i = first; i < first + width; ++i) {
            const float wi = w[i % w.size()];
            const float bi = b.empty() ? 0.0f : b[i % b.size()];
            powers[i] = (float) (sum > 0 ? powers[i] * width / sum : 1.0) * wi * wi + bi * bi;
        }
    }
    return true;
}

// Applies RoPE, which rotates the two channels of a pair: each gets the mean power of both.
void mix_pairs(std::vector<float> & powers, uint32_t head, uint32_t n_rot, bool adjacent) {
    const uint32_t half = n_rot / 2;
    for (size_t first = 0; first + head <= powers.size(); first += head) {
        for (uint32_t p = 0; p < half; ++p) {
            float & a = powers[first + (adjacent ? 2 * p : p)];
            float & b = powers[first + (adjacent ? 2 * p + 1 : p + half)];
            a = b = 0.5f * (a + b);
        }
    }
}

// The mean squared error of a type on N(0,1), which is measured once on 64 blocks of 128 values.
double relative_error(ggml_type type) {
    static std::mutex                  mutex;
    static std::map<ggml_type, double> known;
    const std::lock_guard<std::mutex>  lock(mutex);
    const auto                         found = known.find(type);
    if (found != known.end()) {
        return found->second;
    }
    const auto *       traits = ggml_get_type_traits(type);
    const int64_t      n      = 64 * 128;
    std::vector<float> x(n);
    for (int64_t i = 0; i < n; ++i) { // Box-Muller
        const double u = uniform(2 * i);
        const double v = uniform(2 * i + 1);
        x[i] = (float) (std::sqrt(-2.0 * std::log(1.0 - u)) * std::cos(2.0 * M_PI * v));
    }
    std::vector<char>  bytes(ggml_row_size(type, n));
    std::vector<float> y(n);
    traits->from_float_ref(x.data(), bytes.data(), n);
    traits->to_float(bytes.data(), y.data(), n);
    double error = 0;
    double power = 0;
    for (int64_t i = 0; i < n; ++i) {
        error += ((double) y[i] - x[i]) * ((double) y[i] - x[i]);
        power += (double) x[i] * x[i];
    }
    return known[type] = error / power;
}

}  // namespace

std::vector<turbo_layer_power> turbo_predict_powers(const llama_model & model, const turbo_model & about, int n_threads) {
    std::vector<turbo_layer_power> powers(about.layers.size());
    std::vector<layer_work>        work(powers.size());
    std::vector<std::unique_ptr<product>> products;

    const auto multiply = [&](const ggml_tensor * weight, const std::vector<float> & gain,
                              const std::vector<float> & constant) {
        auto one = std::make_unique<product>();
        one->weight  = weight;
        one->columns = k_probes + !constant.empty();
        for (int c = 0; c < k_probes; ++c) {
            for (int64_t i = 0; i < weight->ne[0]; ++i) {
                one->input.push_back(sign(i, c) * (gain.empty() ? 1.0f : gain[i]));
            }
        }
        one->input.insert(one->input.end(), constant.begin(), constant.end());
        products.push_back(std::move(one));
        return products.back().get();
    };

    for (uint32_t il = 0; il < powers.size(); ++il) {
        turbo_layer_power & power = powers[il];
        const turbo_layer & layer = about.layers[il];
        const names         tensor(model, il);
        const uint32_t      head   = layer.head_k;
        const int64_t       rows_q = (int64_t) layer.heads * head;
        const int64_t       rows_k = (int64_t) layer.kv_heads * head;
        power.head  = head;
        power.scale = layer.scale;
        if (layer.recurrent || rows_q == 0) {
            power.unknown = "no attention";
            continue;
        }
        if (about.mla) {
            power.unknown = "multi-head latent attention";
            continue;
        }
        const ggml_tensor * fused = tensor("attn_qkv.weight");
        const ggml_tensor * w_q   = fused ? fused : tensor("attn_q.weight");
        const ggml_tensor * w_k   = fused ? fused : tensor("attn_k.weight");
        const bool          own_k = layer.has_kv;
        if (!w_q || (own_k && !w_k)) {
            power.unknown = "W_q or W_k is not a matrix of its own";
            continue;
        }
        if (!has_data(w_q) || (own_k && !has_data(w_k))) {
            power.unknown = "the weights are not loaded";
            continue;
        }
        layer_work & todo = work[il];
        if (fused ? fused->ne[1] < rows_q + rows_k : w_q->ne[1] % rows_q != 0 || w_q->ne[1] > 2 * rows_q ||
                                                         (own_k && w_k->ne[1] != rows_k)) {
            power.unknown = "W_q has " + std::to_string(w_q->ne[1]) + " rows for " + std::to_string(rows_q) + " values";
            continue;
        }
        // Falcon 40B has a separate norm for the input of attention.
        const bool          second = tensor("attn_norm_2.weight") && about.arch == "falcon";
        const ggml_tensor * norm   = tensor(second ? "attn_norm_2.weight" : "attn_norm.weight");
        const ggml_tensor * norm_b = tensor(second ? "attn_norm_2.bias" : "attn_norm.bias");
        // A norm may have no weights (OLMo), or keys and queries may be normalized instead of the input (OLMo 2).
        const std::vector<float> gain     = norm ? read_vector(norm) : std::vector<float>();
        const std::vector<float> constant = norm_b ? read_vector(norm_b) : std::vector<float>();
        if ((norm && (int64_t) gain.size() != w_q->ne[0]) || (!constant.empty() && constant.size() != gain.size())) {
            power.unknown = "the norm before attention has another width";
            continue;
        }
        todo.q       = multiply(w_q, gain, constant);
        todo.k       = fused ? todo.q : own_k ? multiply(w_k, gain, constant) : nullptr;
        todo.first_k = fused ? rows_q : 0;
        todo.q_chunk = fused ? head : w_q->ne[1] / layer.heads; // with a gate, query and gate alternate by head
        todo.bias_q  = tensor("attn_q.bias");
        todo.bias_k  = tensor("attn_k.bias");
        if (const ggml_tensor * bias = tensor("attn_qkv.bias")) {
            todo.bias_q = todo.bias_k = bias;
            todo.first_bias_k = rows_q;
        }
    }

    std::map<ggml_backend_dev_t, std::vector<product *>> by_device;
    for (const auto & one : products) {
        ggml_backend_dev_t dev = device_of(one->weight);
        if (dev && can_compute(dev)) {
            by_device[dev].push_back(one.get());
        }
    }
    for (const auto & [dev, list] : by_device) {
        compute(dev, list, n_threads);
    }

    for (uint32_t il = 0; il < powers.size(); ++il) {
        turbo_layer_power & power = powers[il];
        const turbo_layer & layer = about.layers[il];
        const layer_work &  todo  = work[il];
        if (!power.unknown.empty()) {
            continue;
        }
        if (todo.q->output.empty() || (todo.k && todo.k->output.empty())) {
            power.unknown = std::string("its device cannot multiply with weights of type ") +
                            ggml_type_name(todo.q->weight->type);
            continue;
        }
        const names tensor(model, il);
        const auto  factor = [&](const char * name) { // the scale of a matrix, if it has a single one
            const ggml_tensor * scale = tensor(name);
            return scale && ggml_nelements(scale) == 1 ? read_vector(scale)[0] : 1.0f;
        };
        const bool               fused  = todo.k == todo.q;
        const float              unit_q = factor(fused ? "attn_qkv.scale" : "attn_q.scale");
        const float              unit_k = factor(fused ? "attn_qkv.scale" : "attn_k.scale");
        const std::vector<float> bias_q = todo.bias_q ? read_vector(todo.bias_q) : std::vector<float>();
        const std::vector<float> bias_k = todo.bias_k ? read_vector(todo.bias_k) : std::vector<float>();
        for (uint32_t h = 0; h < layer.heads; ++h) {
            const int64_t first = h * todo.q_chunk;
            if (!bias_q.empty() && (size_t) (first + power.head) > bias_q.size()) {
                power.unknown = "the bias of W_q has another width";
                break;
            }
            const auto one = row_powers(*todo.q, first, power.head, bias_q, first, unit_q);
            power.q.insert(power.q.end(), one.begin(), one.end());
        }
        const int64_t rows_k = (int64_t) layer.kv_heads * power.head;
        if (todo.k) {
            if (!bias_k.empty() && (size_t) (todo.first_bias_k + rows_k) > bias_k.size()) {
                power.unknown = "the bias of W_k has another width";
                continue;
            }
            power.k = row_powers(*todo.k, todo.first_k, rows_k, bias_k, todo.first_bias_k, unit_k);
            for (const float one : power.k) {
                power.raw_k += one / rows_k;
            }
        }
        const ggml_tensor * norm_q = tensor("attn_q_norm.weight");
        const ggml_tensor * norm_k = tensor("attn_k_norm.weight");
        if ((norm_q && !apply_norm(power.q, power.head, norm_q, tensor("attn_q_norm.bias"))) ||
            (norm_k && todo.k && !apply_norm(power.k, power.head, norm_k, tensor("attn_k_norm.bias")))) {
            power.unknown = "the norm of keys or queries has another width";
            continue;
        }
        if (about.rope != LLAMA_ROPE_TYPE_NONE) {
            power.adjacent = about.rope == LLAMA_ROPE_TYPE_NORM;
            mix_pairs(power.k, power.head, layer.n_rot, power.adjacent);
            mix_pairs(power.q, power.head, layer.n_rot, power.adjacent);
        }
        for (const auto & channel : { power.k, power.q }) {
            for (const float one : channel) {
                if (!std::isfinite(one)) {
                    power.unknown = "its weights are not finite";
                }
            }
        }
    }
    return powers;
}

double turbo_score_noise(const turbo_layer_power & cache, const turbo_layer_power & reader, ggml_type type,
                         bool rotated) {
    if (!ggml_is_quantized(type)) {
        return 0.0; // half precision has noise five orders of magnitude below that of turbo types
    }
    const size_t head     = cache.head;
    const size_t heads_k  = cache.k.size() / head;
    const size_t heads_q  = reader.q.size() / head;
    const bool   spread   = rotated || turbo_is_type(type);
    size_t       block    = ggml_blck_size(type);
    if (rotated && !turbo_is_type(type)) { // llama.cpp rotates blocks of the largest power of two that divides the head
        for (block = 64; head % (2 * block) == 0;) {
            block *= 2;
        }
    }
    const size_t group    = std::max<size_t>(1, heads_q / std::max<size_t>(1, heads_k));
    double       sum      = 0.0; // sum of the heads' standard deviations
    for (size_t h = 0; h < heads_q; ++h) {
        const float * q     = reader.q.data() + h * head;
        const float * k     = cache.k.data() + std::min(h / group, heads_k - 1) * head;
        double        noise = 0.0;
        for (size_t first = 0; first + block <= head; first += block) {
            double sum_k = 0.0;
            double sum_q = 0.0;
            double top_k = 0.0;
            for (size_t i = first; i < first + block; ++i) {
                sum_k += k[i];
                sum_q += q[i];
                top_k = std::max(top_k, (double) k[i]);
            }
            if (spread) { // the rotation distributes a relative error evenly over the block
                noise += relative_error(type) * sum_k * sum_q / block;
            } else {
                // The distance of levels is proportional to the largest value. The square of this value is 4.4 times
                // the mean for 32 normal values. If one rotary pair is far larger, it is the power of the pair's channel
                // in the block, or of the larger of both: on average 1/2 + 1/pi of their total power as they rotate.
                const double top = cache.adjacent ? 2.0 * (0.5 + M_1_PI) * top_k : top_k;
                const double step = std::min(sum_k, std::max(4.4 * sum_k / block, top)) / (127.0 * 127.0);
                noise += step / 12.0 * sum_q;
            }
        }
        sum += std::sqrt(noise);
    }
    return heads_q ? cache.scale * sum / heads_q : 0.0;
}
