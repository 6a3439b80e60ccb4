// turbo-llama.cpp: the types of each layer's K and V, chosen when a context is made. Part of libllama.

#include "llama/turbo-llama.h"

#include "llama/turbo-noise.h"
#include "llama/turbo-plan.h"

#include "ggml-cpp.h"

#include <cstdlib>
#include <cstring>
#include <map>
#include <mutex>
#include <set>
#include <tuple>

namespace {

constexpr ggml_type k_none = GGML_TYPE_COUNT;

// What was chosen for the context that this thread makes. The cache is made within llama_init_from_model.
struct chosen_types {
    const llama_model *    model = nullptr;
    std::vector<ggml_type> k;             // of each layer of the model; k_none without a cache
    std::vector<ggml_type> v;
    ggml_type              asked_k = k_none;  // before the guard
    std::vector<ggml_type> inner_v;           // before boundary V
    std::vector<double>    sigma;         // score noise of asked_k in each layer; 0: not known or not asked for
    float                  limit = 0.0f;
};
thread_local chosen_types t_chosen;

std::vector<uint32_t> cache_layers(const llama_hparams & hparams) {
    std::vector<uint32_t> layers;
    for (uint32_t il = 0; il < hparams.n_layer_all; ++il) {
        if (turbo_has_cache(hparams, il)) {
            layers.push_back(il);
        }
    }
    return layers;
}

// "0-3, 7"
std::string ranges(const std::vector<uint32_t> & layers) {
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

std::string layer_list(const std::vector<uint32_t> & layers) {
    return (layers.size() == 1 ? "layer " : "layers ") + ranges(layers);
}

std::string number(double value) {
    char text[32];
    snprintf(text, sizeof(text), "%.3g", value);
    return text;
}

// ---- one type for all layers ---------------------------------------------------------------------------------------

// The type for all heads in `heads` (values per head, one per layer with a cache): their largest common block.
// k_none, and the layer in *bad, if there is none.
ggml_type type_for_heads(ggml_type type, const std::vector<uint32_t> & heads, size_t * bad) {
    ggml_type result = type;
    for (size_t i = 0; i < heads.size(); ++i) {
        const ggml_type fits = turbo_type_for_head(type, heads[i]);
        if (fits == GGML_TYPE_COUNT) {
            *bad = i;
            return k_none;
        }
        if (ggml_blck_size(fits) < ggml_blck_size(result)) {
            result = fits;
        }
    }
    return result;
}

// Resolve one of the context's types in place. what: "K" or "V"; option: the option that sets it.
bool resolve(ggml_type & type, const std::vector<uint32_t> & heads, const std::vector<uint32_t> & layers,
             const char * what, const char * option) {
    if (!turbo_is_type(type)) {
        return true;
    }
    size_t          bad    = 0;
    const ggml_type result = type_for_heads(type, heads, &bad);
    if (result == k_none) {
        if (heads[bad] % 32 != 0) {
            LLAMA_LOG_ERROR("turboquant: %s type %s does not work with the head size %u (layer %u); multiples of 32 do "
                    "(64, 96, 128, 192, 256, 512, 576): use %s f16 with this model\n",
                    what, ggml_type_name(type), heads[bad], layers[bad], option);
        } else {
            LLAMA_LOG_ERROR("turboquant: %s type %s: its block does not divide the head size %u (layer %u): use "
                    "%s %s, which takes the largest block that does, or %s f16\n",
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
        LLAMA_LOG_WARN("turboquant: %s type %s -> %s, because the head size is %u: "
                "%.4g instead of %.4g bits per value\n", what, ggml_type_name(type), ggml_type_name(result), heads[why],
                turbo_bits_per_value(result), turbo_bits_per_value(type));
        type = result;
    }
    return true;
}

// ---- boundary V ----------------------------------------------------------------------------------------------------

// True if il is among the first or the last n of the model's layers that have a cache. Layers for multi-token
// prediction, which come after the model's own, do not count.
bool is_boundary(const llama_hparams & hparams, uint32_t il, int n) {
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

bool apply_boundary(const llama_hparams & hparams, const turbo_boundary & boundary) {
    for (uint32_t il = 0; il < hparams.n_layer_all; ++il) {
        if (!is_boundary(hparams, il, boundary.layers) || t_chosen.v[il] == k_none) {
            continue;
        }
        const uint32_t  head = hparams.n_embd_head_v(il);
        const ggml_type type = turbo_type_for_head(boundary.type, head);
        if (type == GGML_TYPE_COUNT) {
            if (turbo_better_type(t_chosen.v[il], boundary.type) == t_chosen.v[il]) {
                continue;
            }
            LLAMA_LOG_ERROR("turboquant: --cache-boundary-v: the block of %s (%d values) does not divide the head size "
                    "%u of layer %u: use %d:f16\n", ggml_type_name(boundary.type), (int) ggml_blck_size(boundary.type),
                    head, il, boundary.layers);
            return false;
        }
        t_chosen.v[il] = turbo_better_type(t_chosen.v[il], type);
    }
    return true;
}

// ---- the guard -----------------------------------------------------------------------------------------------------

// The layers that attend to the cache of layer il: itself, and later ones without keys of their own, which read the
// last cache of their kind (full attention, or a sliding window).
std::vector<uint32_t> readers(const llama_hparams & hparams, uint32_t il) {
    std::vector<uint32_t> list = { il };
    for (uint32_t other = il + 1; other < hparams.n_layer(); ++other) {
        if (hparams.is_swa(other) != hparams.is_swa(il)) {
            continue;
        }
        if (hparams.has_kv(other)) {
            break;
        }
        list.push_back(other);
    }
    return list;
}

// Keep K of each layer in the next type that holds the predicted noise of its scores below the limit.
void apply_guard(const llama_hparams & hparams, const std::vector<turbo_layer_power> & powers) {
    std::map<std::string, std::vector<uint32_t>> unknown;
    const char * disable = getenv("LLAMA_ATTN_ROT_DISABLE");
    const bool   rotated = turbo_rotates_by_layer(*t_chosen.model) && hparams.n_embd_head_k() % 64 == 0 &&
                         !(disable && atoi(disable));
    for (uint32_t il = 0; il < hparams.n_layer_all; ++il) {
        if (!turbo_has_cache(hparams, il)) {
            continue;
        }
        double     sigma = 0;
        const auto noise = [&](ggml_type type) {
            double worst = 0;
            for (const uint32_t reader : readers(hparams, il)) {
                if (powers[reader].unknown.empty()) {
                    worst = std::max(worst, turbo_score_noise(powers[il], powers[reader], type, rotated));
                }
            }
            return worst;
        };
        if (!powers[il].unknown.empty()) {
            unknown[powers[il].unknown].push_back(il);
            continue;
        }
        t_chosen.sigma[il] = sigma = noise(t_chosen.k[il]);
        // Keys that a bias makes large are nearly the same, and so are their errors in q8_0, which softmax then ignores:
        // what is predicted for q8_0 counts half.
        const auto limit = [](ggml_type type) { return type == GGML_TYPE_Q8_0 ? 2 * t_chosen.limit : t_chosen.limit; };
        for (const ggml_type wanted : { GGML_TYPE_TURBO4, GGML_TYPE_Q8_0, GGML_TYPE_F16 }) {
            const ggml_type better = turbo_type_for_head(wanted, hparams.n_embd_head_k(il));
            if (sigma <= limit(t_chosen.k[il])) {
                break;
            }
            if (better != GGML_TYPE_COUNT && turbo_bits_per_value(better) > turbo_bits_per_value(t_chosen.k[il])) {
                sigma          = noise(better);
                t_chosen.k[il] = better;
            }
        }
    }
    for (const auto & [why, layers] : unknown) {
        if (why == "the weights are not loaded") { // only the memory is being counted
            continue;
        }
        LLAMA_LOG_WARN("turboquant: guard: K of %s cannot be predicted (%s) and stays in %s; measure this model with "
                "`turboquant compare` before you rely on it\n", layer_list(layers).c_str(), why.c_str(),
                ggml_type_name(t_chosen.asked_k));
    }
}

// ---- plans ---------------------------------------------------------------------------------------------------------

// Plan files that fitted a model of this process: they need not fit the draft model, too.
std::mutex                                   g_fitted_mutex;
std::map<std::string, const llama_model *>   g_fitted;

bool fitted_another(const std::string & path, const llama_model & model) {
    const std::lock_guard<std::mutex> lock(g_fitted_mutex);
    const auto                        found = g_fitted.find(path);
    return found != g_fitted.end() && found->second != &model;
}

void remember_fitted(const std::string & path, const llama_model & model) {
    const std::lock_guard<std::mutex> lock(g_fitted_mutex);
    g_fitted.emplace(path, &model);
}

enum class plan_state { none, found, refused };

plan_state plan_from_file(const char * option, const char * path, const llama_model & model,
                          const std::vector<turbo_layer_power> & powers, turbo_plan & plan, std::string & why) {
    std::string error;
    plan = turbo_plan();
    if (!turbo_plan_read(path, plan, error)) {
        why = std::string(option) + ": " + error;
        return plan_state::refused;
    }
    error = turbo_plan_mismatch(plan, model, powers);
    if (error.empty()) {
        remember_fitted(path, model);
        return plan_state::found;
    }
    if (fitted_another(path, model)) {
        LLAMA_LOG_INFO("turboquant: %s is the plan of another model, and not used for this one\n", path);
        return plan_state::none;
    }
    why = std::string(option) + ": " + path + " is not a plan for this model: " + error +
          "; make one with `turboquant tune`, or leave the option out";
    return plan_state::refused;
}

bool is_file(const char * value) {
    return value && *value && strcmp(value, "auto") != 0 && strcmp(value, "off") != 0;
}

// The plan for a context with a type "auto": the file that the options name for this model or for the draft model, else
// the one in the model's metadata.
plan_state choose_plan(const llama_model & model, const std::vector<turbo_layer_power> & powers, turbo_plan & plan) {
    std::string why;
    std::string refused;
    for (const auto & [option, variable] : { std::make_pair("--cache-plan", TURBO_PLAN_ENV),
                                             std::make_pair("--cache-plan-draft", TURBO_PLAN_DRAFT_ENV) }) {
        const char * path  = getenv(variable);
        const char * draft = getenv(TURBO_PLAN_DRAFT_ENV);
        // The draft model can be the same one once more.
        if (is_file(path) && !(path != draft && is_file(draft) && fitted_another(path, model))) {
            const plan_state state = plan_from_file(option, path, model, powers, plan, why);
            if (state == plan_state::found) {
                return state;
            }
            refused = state == plan_state::refused && refused.empty() ? why : refused;
        }
    }
    if (!refused.empty()) {
        LLAMA_LOG_ERROR("turboquant: %s\n", refused.c_str());
        return plan_state::refused;
    }
    const char * own   = getenv(TURBO_PLAN_ENV);
    bool         found = false;
    plan               = turbo_plan();
    if (own && strcmp(own, "off") == 0) {
        return plan_state::none;
    }
    if (turbo_plan_from_metadata(model, plan, found, why)) {
        if (!found) {
            return plan_state::none;
        }
        why = turbo_plan_mismatch(plan, model, powers);
        if (why.empty()) {
            return plan_state::found;
        }
        why = "the plan in the model's metadata is not one for this model: " + why;
    }
    LLAMA_LOG_WARN("turboquant: %s; it is not used, and the guard chooses the types (make a plan with `turboquant "
            "tune`, or silence this with --cache-plan off)\n", why.c_str());
    return plan_state::none;
}

// The types of a plan in the blocks that fit the heads.
bool take_plan(const std::vector<ggml_type> & wanted, std::vector<ggml_type> & types, const llama_hparams & hparams,
               bool keys, const std::string & origin) {
    for (const uint32_t il : cache_layers(hparams)) {
        if (wanted[il] == k_none) { // V of multi-head latent attention
            continue;
        }
        const uint32_t head = keys ? hparams.n_embd_head_k(il) : hparams.n_embd_head_v(il);
        types[il] = turbo_type_for_head(wanted[il], head);
        if (types[il] == GGML_TYPE_COUNT) {
            LLAMA_LOG_ERROR("turboquant: %s names %s for %s of layer %u, whose block (%d values) does not divide the "
                    "head size %u: use f16 there\n", origin.c_str(), ggml_type_name(wanted[il]), keys ? "K" : "V", il,
                    (int) ggml_blck_size(wanted[il]), head);
            return false;
        }
    }
    return true;
}

// What llama.cpp takes for the type of the whole cache: it decides on rotation (never for turbo types, which rotate for
// themselves) and on flash attention (always for quantized V).
ggml_type common_type(const std::vector<ggml_type> & types) {
    const auto rank = [](ggml_type type) {
        return std::make_tuple(!turbo_is_type(type), !ggml_is_quantized(type), turbo_bits_per_value(type));
    };
    ggml_type best = k_none;
    for (const ggml_type type : types) {
        if (type != k_none && (best == k_none || rank(type) < rank(best))) {
            best = type;
        }
    }
    return best;
}

// ---- devices -------------------------------------------------------------------------------------------------------

// Ask the devices that hold the cache whether they can fill it and read it. Without this the scheduler aborts at the
// first graph: the cache is allocated already, so it cannot fall back to the CPU.
bool check_devices(const llama_model & model, const llama_context_params & params) {
    if (!params.offload_kqv) {
        return true;
    }
    const llama_hparams & hparams = model.hparams;
    std::set<std::tuple<ggml_backend_dev_t, ggml_type, ggml_type>> asked;
    for (const uint32_t il : cache_layers(hparams)) {
        ggml_backend_dev_t dev    = model.dev_layer(il);
        const ggml_type    type_k = t_chosen.k[il];
        const ggml_type    type_v = hparams.is_mla() ? type_k : t_chosen.v[il];
        if (!dev || !(turbo_is_type(type_k) || turbo_is_type(type_v)) || !asked.insert({ dev, type_k, type_v }).second) {
            continue;
        }
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

double mean_bits(const std::vector<ggml_type> & types, const llama_hparams & hparams, bool keys) {
    double bits   = 0;
    double values = 0;
    for (uint32_t il = 0; il < types.size(); ++il) {
        if (types[il] != k_none) {
            const double n = keys ? hparams.n_embd_k_gqa(il) : hparams.n_embd_v_gqa(il);
            bits += n * turbo_bits_per_value(types[il]);
            values += n;
        }
    }
    return values > 0 ? bits / values : 0.0;
}

bool fail(const char * error) {
    LLAMA_LOG_ERROR("turboquant: %s\n", error);
    return false;
}

}  // namespace

// ---- hooks ---------------------------------------------------------------------------------------------------------

bool turbo_init_context(const llama_model & model, llama_context_params & params) {
    t_chosen = chosen_types();
    if (const char * error = turbo_kernels_error()) {
        return fail(error);
    }
    turbo_boundary boundary;
    float          sparse_v;
    char           error[512];
    if (!turbo_boundary_from_env(&boundary, error, sizeof(error)) ||
        !turbo_sparse_v_parse(getenv(TURBO_SPARSE_V_ENV), &sparse_v, error, sizeof(error)) ||
        !turbo_guard_parse(getenv(TURBO_GUARD_ENV), &t_chosen.limit, error, sizeof(error))) {
        return fail(error);
    }
    const llama_hparams &       hparams = model.hparams;
    const std::vector<uint32_t> layers  = cache_layers(hparams);
    const bool auto_k = params.type_k == GGML_TYPE_TURBO_AUTO;
    const bool auto_v = params.type_v == GGML_TYPE_TURBO_AUTO;
    const bool turbo  = turbo_is_type(params.type_k) || turbo_is_type(params.type_v) || auto_k || auto_v;
    if (!turbo && boundary.layers == 0) {
        return true;
    }

    // The guard needs them for keys in turbo types, and a plan to be recognized.
    const bool predict = auto_k || auto_v || (turbo_is_type(params.type_k) && t_chosen.limit > 0.0f);
    const std::vector<turbo_layer_power> powers =
            predict ? turbo_predict_powers(model, params.n_threads_batch) : std::vector<turbo_layer_power>();
    turbo_plan       plan;
    const plan_state planned = auto_k || auto_v ? choose_plan(model, powers, plan) : plan_state::none;
    if (planned == plan_state::refused) {
        return false;
    }
    const bool plan_k = planned == plan_state::found && auto_k;
    const bool plan_v = planned == plan_state::found && auto_v;
    params.type_k = auto_k ? GGML_TYPE_TURBO4 : params.type_k;
    params.type_v = auto_v ? GGML_TYPE_TURBO4 : params.type_v;

    std::vector<uint32_t> heads_k;
    std::vector<uint32_t> heads_v;
    for (const uint32_t il : layers) {
        heads_k.push_back(hparams.n_embd_head_k(il));
        heads_v.push_back(hparams.n_embd_head_v(il));
    }
    // Multi-head latent attention caches one row, K, whose front is V; upstream wants both types to be the same.
    const bool same = hparams.is_mla() && params.type_k == params.type_v;
    if (!plan_k && !resolve(params.type_k, heads_k, layers, "K", "-ctk")) {
        return false;
    }
    if (same) {
        params.type_v = params.type_k;
    } else if (!plan_v && !resolve(params.type_v, heads_v, layers, "V", "-ctv")) {
        return false;
    }
    t_chosen.model   = &model;
    t_chosen.k.assign(hparams.n_layer_all, k_none);
    t_chosen.v.assign(hparams.n_layer_all, k_none);
    t_chosen.sigma.assign(hparams.n_layer_all, 0.0);
    for (const uint32_t il : layers) {
        t_chosen.k[il] = params.type_k;
        t_chosen.v[il] = hparams.is_mla() ? k_none : params.type_v;
    }
    if ((plan_k && !take_plan(plan.k, t_chosen.k, hparams, true, plan.origin)) ||
        (plan_v && !take_plan(plan.v, t_chosen.v, hparams, false, plan.origin))) {
        t_chosen = chosen_types();
        return false;
    }
    if (plan_k) {
        params.type_k = common_type(t_chosen.k);
    }
    if (plan_v) {
        params.type_v = hparams.is_mla() ? params.type_k : common_type(t_chosen.v);
    }
    t_chosen.asked_k = params.type_k;
    t_chosen.inner_v = t_chosen.v;
    const bool guarded = !plan_k && turbo_is_type(params.type_k) && t_chosen.limit > 0.0f;
    if (guarded) {
        apply_guard(hparams, powers);
    }
    if (!apply_boundary(hparams, boundary)) {
        t_chosen = chosen_types();
        return false;
    }
    if (!check_devices(model, params)) {
        t_chosen = chosen_types();
        return false;
    }
    if (guarded) {
        std::string sigmas;
        for (const uint32_t il : layers) {
            sigmas += (sigmas.empty() ? "" : ", ") + number(t_chosen.sigma[il]);
        }
        LLAMA_LOG_INFO("turboquant: guard: noise of scores with K in %s, by layer: %s (limit %s)\n",
                ggml_type_name(t_chosen.asked_k), sigmas.c_str(), number(t_chosen.limit).c_str());
    }
    if (planned == plan_state::found) {
        LLAMA_LOG_INFO("turboquant: the plan in %s sets the types of %s\n", plan.origin.c_str(),
                plan_k && plan_v ? "K and V" : plan_k ? "K" : "V");
    }
    LLAMA_LOG_INFO("turboquant: K %s (%.4g bits per value), V %s (%.4g bits per value), %s kernels\n",
            ggml_type_name(params.type_k), mean_bits(t_chosen.k, hparams, true), ggml_type_name(params.type_v),
            hparams.is_mla() ? mean_bits(t_chosen.k, hparams, true) : mean_bits(t_chosen.v, hparams, false),
            turbo_kernels_name());
    LLAMA_LOG_INFO("turboquant: cache types: K %s; V %s\n", turbo_types_to_text(t_chosen.k).c_str(),
            turbo_types_to_text(t_chosen.v).c_str());
    return true;
}

void turbo_set_layer_types(ggml_tensor * k, ggml_tensor * v, const llama_model & model, const llama_hparams & hparams,
                           uint32_t il) {
    if (t_chosen.model != &model || &hparams != &model.hparams) {
        return;
    }
    const auto set = [](ggml_tensor * tensor, ggml_type type) {
        if (!tensor || type == k_none || tensor->type == type) {
            return;
        }
        tensor->type  = type;
        tensor->nb[0] = ggml_type_size(type);
        tensor->nb[1] = ggml_row_size(type, tensor->ne[0]);
        for (int i = 2; i < GGML_MAX_DIMS; ++i) {
            tensor->nb[i] = tensor->nb[i - 1] * tensor->ne[i - 1];
        }
    };
    set(k, t_chosen.k[il]);
    set(v, t_chosen.v[il]);
}

void turbo_log_types(const std::vector<turbo_logged_layer> & layers, const llama_model & model) {
    if (t_chosen.model != &model) {
        return;
    }
    const auto mib = [](const ggml_tensor * tensor, ggml_type type) {
        return ggml_row_size(type, tensor->ne[0]) * tensor->ne[1] * tensor->ne[2] / 1048576.0;
    };
    // The guard: layers by the type that they got.
    std::map<ggml_type, std::vector<uint32_t>> promoted;
    std::map<ggml_type, std::string>           sigmas;
    double                                     more = 0;
    std::vector<uint32_t>                      boundary;
    for (const auto & layer : layers) {
        const double sigma = t_chosen.sigma[layer.il];
        if (layer.k && sigma > t_chosen.limit && layer.k->type != t_chosen.asked_k) {
            promoted[layer.k->type].push_back(layer.il);
            sigmas[layer.k->type] += (sigmas[layer.k->type].empty() ? "" : ", ") + number(sigma);
            more += mib(layer.k, layer.k->type) - mib(layer.k, t_chosen.asked_k);
        }
        if (layer.v && t_chosen.v[layer.il] != t_chosen.inner_v[layer.il]) {
            boundary.push_back(layer.il);
        }
    }
    if (!promoted.empty()) {
        std::string text;
        for (const auto & [type, list] : promoted) {
            text += (text.empty() ? "" : "; ") + std::string("K of ") + layer_list(list) + " is kept in " +
                    ggml_type_name(type) + " (noise " + sigmas[type] + ")";
        }
        LLAMA_LOG_WARN("turboquant: guard: %s, because %s would put noise of more than %s nats into their scores; this "
                "takes %.2f MiB more, and --cache-guard off turns it off\n", text.c_str(),
                ggml_type_name(t_chosen.asked_k), number(t_chosen.limit).c_str(), more);
    }
    if (!boundary.empty()) {
        const ggml_type better = t_chosen.v[boundary[0]];
        const ggml_type inner  = t_chosen.inner_v[boundary[0]];
        LLAMA_LOG_INFO("turboquant: boundary V: %d of %d layers keep V in %s (%.4g bits per value) instead of %s: %s\n",
                (int) boundary.size(), (int) layers.size(), ggml_type_name(better), turbo_bits_per_value(better),
                ggml_type_name(inner), ranges(boundary).c_str());
    }
}
