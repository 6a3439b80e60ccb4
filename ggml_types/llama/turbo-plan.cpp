// turbo-plan.cpp: reads plans, compares them with models, and selects one. See turbo-plan.h.

#include "llama/turbo-plan.h"

#include "ggml/turbo-options.h"
#include "llama/turbo-model.h"
#include "llama/turbo-noise.h"

#include "llama.h"

#include <nlohmann/json.hpp>

#include <algorithm>
#include <cerrno>
#include <cmath>
#include <cstdio>
#include <cstring>
#include <map>
#include <mutex>
#include <thread>

using json = nlohmann::json;

namespace {

constexpr int    k_version   = 1;
constexpr size_t k_max_bytes = 1 << 20;
// The largest relative difference of two estimates of the same K's power: with other quantizations of the weights, or on
// other devices.
constexpr double k_tolerance = 0.05;

bool refuse(std::string & error, const std::string & text) {
    error = text;
    return false;
}

bool type_from_name(const std::string & name, ggml_type & type) {
    type = turbo_cache_type_from_name(name.c_str());
    return type != GGML_TYPE_COUNT;
}

bool types_from_json(const json & list, const char * what, std::vector<ggml_type> & types, std::string & error) {
    if (!list.is_array() || list.empty()) {
        return refuse(error, std::string("\"") + what + "\" must be a list with one type for each layer");
    }
    for (const json & one : list) {
        ggml_type type = GGML_TYPE_COUNT;
        if (one.is_string() ? !type_from_name(one.get<std::string>(), type) : !one.is_null()) {
            return refuse(error, std::string("\"") + what + "\" of layer " + std::to_string(types.size()) + " is " +
                          one.dump(-1, ' ', false, json::error_handler_t::replace).substr(0, 60) +
                          ", which is no cache type (null stands for a layer without a cache)");
        }
        types.push_back(type);
    }
    return true;
}

bool types_from_text(const std::string & text, const char * key, std::vector<ggml_type> & types, std::string & error) {
    size_t at = 0;
    while (at <= text.size()) {
        const size_t      end   = std::min(text.find(',', at), text.size());
        const std::string item  = text.substr(at, end - at);
        const size_t      star  = item.find('*');
        const std::string name  = item.substr(0, star);
        int               count = 1;
        char              rest  = 0;
        ggml_type         type  = GGML_TYPE_COUNT;
        if ((name != "-" && !type_from_name(name, type)) ||
            (star != std::string::npos && (sscanf(item.c_str() + star + 1, "%d%c", &count, &rest) != 1 || count < 1)) ||
            count > 4096) {
            return refuse(error, std::string(key) + " has '" + item.substr(0, 60) + "', which is no cache type");
        }
        types.insert(types.end(), count, type);
        at = end + 1;
    }
    return true;
}

bool metadata(const llama_model & model, const char * key, std::string & value) {
    const int32_t length = llama_model_meta_val_str(&model, key, nullptr, 0);
    if (length < 0) {
        return false;
    }
    value.resize((size_t) length + 1);
    llama_model_meta_val_str(&model, key, value.data(), value.size());
    value.resize((size_t) length);
    return true;
}

json describe(const llama_model & model, const turbo_model & about, const std::vector<turbo_layer_power> & powers) {
    json heads = json::array();
    json head  = json::array();
    json power = json::array();
    for (size_t il = 0; il < about.layers.size(); ++il) {
        const turbo_layer & layer  = about.layers[il];
        const bool          cached = layer.cached;
        heads.push_back(cached ? layer.kv_heads : 0);
        head.push_back(cached ? layer.head_k : 0);
        const double raw = cached && il < powers.size() ? powers[il].raw_k : 0.0;
        power.push_back(raw > 0 && std::isfinite(raw) ? json(std::round(raw * 1e6) / 1e6) : json());
    }
    std::string architecture;
    metadata(model, "general.architecture", architecture);
    return { { "architecture", architecture }, { "layers", about.layers.size() }, { "heads_kv", heads },
             { "head_k", head }, { "k_power", power } };
}

// Reads the plan in a JSON file. False, with one sentence in `error`, if it cannot be read.
bool read_plan(const std::string & path, turbo_plan & plan, std::string & error) {
    plan.origin = path;
    FILE * file = fopen(path.c_str(), "rb");
    if (!file) {
        return refuse(error, path + ": cannot be read (" + strerror(errno) +
                      "); give a file that `turboquant tune` has written");
    }
    std::string text(k_max_bytes + 1, '\0');
    text.resize(fread(text.data(), 1, text.size(), file));
    fclose(file);
    const json root = json::parse(text, nullptr, false);
    if (text.size() > k_max_bytes || !root.is_object() || root.value("format", json()) != "turboquant-plan") {
        return refuse(error, path + " is not a plan: a plan is a JSON file with \"format\": \"turboquant-plan\"");
    }
    const json version = root.value("version", json());
    if (!version.is_number_integer() || version != k_version) {
        return refuse(error, path + " is a plan of version " + version.dump(-1, ' ', false, json::error_handler_t::replace)
                      .substr(0, 20) + ", and this build reads version " + std::to_string(k_version) +
                      ": make it again with `turboquant tune`, or build llama.cpp with a newer TurboQuant");
    }
    if (!types_from_json(root.value("k", json()), "k", plan.k, error) ||
        !types_from_json(root.value("v", json()), "v", plan.v, error)) {
        error = path + ": " + error;
        return false;
    }
    if (root.contains("model")) {
        plan.model = root["model"].dump(-1, ' ', false, json::error_handler_t::replace);
    }
    return true;
}

// Reads the plan in the model's metadata; `found` is set if there is one.
bool plan_from_metadata(const llama_model & model, turbo_plan & plan, bool & found, std::string & error) {
    std::string version;
    std::string k;
    std::string v;
    plan.origin = "the model's metadata";
    found       = metadata(model, "turboquant.plan.version", version);
    if (!found) {
        return true;
    }
    if (version != std::to_string(k_version)) {
        return refuse(error, "the plan in the model's metadata has the version " + version.substr(0, 20) +
                      ", and this build reads version " + std::to_string(k_version));
    }
    if (!metadata(model, "turboquant.plan.type_k", k) || !metadata(model, "turboquant.plan.type_v", v)) {
        return refuse(error, "the plan in the model's metadata lacks turboquant.plan.type_k or turboquant.plan.type_v");
    }
    metadata(model, "turboquant.plan.model", plan.model);
    return types_from_text(k, "turboquant.plan.type_k", plan.k, error) &&
           types_from_text(v, "turboquant.plan.type_v", plan.v, error);
}

// The reason why the plan does not belong to this model; empty if it does. If the powers are unknown, because the weights
// are not loaded, they are not compared.
std::string plan_mismatch(const turbo_plan & plan, const llama_model & model, const turbo_model & about,
                          const std::vector<turbo_layer_power> & powers) {
    const size_t layers = about.layers.size();
    if (plan.k.size() != layers || plan.v.size() != layers) {
        return "it has types of K for " + std::to_string(plan.k.size()) + " and of V for " +
               std::to_string(plan.v.size()) + " layers, and the model has " + std::to_string(layers) + " layers";
    }
    for (const uint32_t il : turbo_cached_layers(about)) {
        if (plan.k[il] == GGML_TYPE_COUNT || (plan.v[il] == GGML_TYPE_COUNT && !about.mla)) {
            return "it names no type for layer " + std::to_string(il) + ", which has a cache";
        }
    }
    if (plan.model.empty()) {
        return "";
    }
    const json theirs = json::parse(plan.model, nullptr, false);
    const json ours   = describe(model, about, powers);
    if (!theirs.is_object()) {
        return "its \"model\" is damaged";
    }
    for (const char * key : { "architecture", "layers", "heads_kv", "head_k" }) {
        const json value = theirs.value(key, json());
        if (value != ours[key]) {
            return std::string("it was made for a model with another \"") + key + "\"";
        }
    }
    const json power = theirs.value("k_power", json());
    if (!power.is_array() || power.size() != layers) {
        return "its \"k_power\" is damaged";
    }
    for (size_t il = 0; il < layers; ++il) {
        if (!power[il].is_number() || !ours["k_power"][il].is_number()) {
            continue; // K cannot be predicted, or the weights are not loaded
        }
        const double a = power[il].get<double>();
        const double b = ours["k_power"][il].get<double>();
        if (!(std::abs(a - b) <= k_tolerance * b)) {
            char text[160];
            snprintf(text, sizeof(text), "it was made for other weights (the power of K in layer %zu is %.4g there, and "
                     "%.4g in this model)", il, a, b);
            return text;
        }
    }
    return "";
}

// ---- selection ------------------------------------------------------------------------------------------------------

// Plan files that fitted a model of this process. They need not fit the draft model as well.
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

turbo_plan_state plan_from_file(const char * option, const std::string & path, const llama_model & model,
                                const turbo_model & about, const std::vector<turbo_layer_power> & powers,
                                turbo_plan & plan, std::string & why) {
    std::string error;
    plan = turbo_plan();
    if (!read_plan(path, plan, error)) {
        why = std::string(option) + ": " + error;
        return turbo_plan_state::refused;
    }
    error = plan_mismatch(plan, model, about, powers);
    if (error.empty()) {
        remember_fitted(path, model);
        return turbo_plan_state::found;
    }
    if (fitted_another(path, model)) {
        turbo_info("%s is the plan of another model, and not used for this one", path.c_str());
        return turbo_plan_state::none;
    }
    why = std::string(option) + ": " + path + " is not a plan for this model: " + error +
          "; make one with `turboquant tune`, or leave the option out";
    return turbo_plan_state::refused;
}

}  // namespace

bool turbo_plan_model_json(const llama_model * model, char * out, size_t size) {
    const int         n_threads = (int) std::max(1u, std::thread::hardware_concurrency());
    const turbo_model about     = turbo_describe_model(*model);
    const auto        powers    = turbo_predict_powers(*model, about, n_threads);
    const std::string text      = describe(*model, about, powers).dump();
    if (text.size() + 1 > size) {
        return false;
    }
    memcpy(out, text.c_str(), text.size() + 1);
    return true;
}

std::string turbo_types_to_text(const std::vector<ggml_type> & types) {
    std::string text;
    for (size_t i = 0; i < types.size();) {
        size_t end = i;
        while (end < types.size() && types[end] == types[i]) {
            ++end;
        }
        text += (i ? "," : "") + std::string(types[i] == GGML_TYPE_COUNT ? "-" : ggml_type_name(types[i]));
        if (end - i > 1) {
            text += "*" + std::to_string(end - i);
        }
        i = end;
    }
    return text;
}

turbo_plan_state turbo_choose_plan(const llama_model & model, const turbo_model & about, const turbo_options & options,
                                   const std::vector<turbo_layer_power> & powers, turbo_plan & plan) {
    std::string why;
    std::string refused;
    // The draft model can be the same model.
    const bool draft = !options.plan_draft.empty() && fitted_another(options.plan, model);
    for (const auto & [option, path] : { std::make_pair("--cache-plan", draft ? std::string() : options.plan),
                                         std::make_pair("--cache-plan-draft", options.plan_draft) }) {
        if (!path.empty()) {
            const turbo_plan_state state = plan_from_file(option, path, model, about, powers, plan, why);
            if (state == turbo_plan_state::found) {
                return state;
            }
            refused = state == turbo_plan_state::refused && refused.empty() ? why : refused;
        }
    }
    if (!refused.empty()) {
        turbo_error("%s", refused.c_str());
        return turbo_plan_state::refused;
    }
    bool found = false;
    plan       = turbo_plan();
    if (options.plan_off) {
        return turbo_plan_state::none;
    }
    if (plan_from_metadata(model, plan, found, why)) {
        if (!found) {
            return turbo_plan_state::none;
        }
        why = plan_mismatch(plan, model, about, powers);
        if (why.empty()) {
            return turbo_plan_state::found;
        }
        why = "the plan in the model's metadata is not one for this model: " + why;
    }
    turbo_warn("%s; it is not used, and the guard chooses the types (make a plan with `turboquant "
            "tune`, or silence this with --cache-plan off)", why.c_str());
    return turbo_plan_state::none;
}

bool turbo_take_plan(const std::vector<ggml_type> & wanted, std::vector<ggml_type> & types, const turbo_model & model,
                     bool keys, const std::string & origin) {
    for (const uint32_t il : turbo_cached_layers(model)) {
        if (wanted[il] == GGML_TYPE_COUNT) { // multi-head latent attention has no V
            continue;
        }
        const uint32_t head = keys ? model.layers[il].head_k : model.layers[il].head_v;
        types[il] = turbo_type_for_head(wanted[il], head);
        if (types[il] == GGML_TYPE_COUNT) {
            turbo_error("%s names %s for %s of layer %u, whose block (%d values) does not divide the "
                    "head size %u: use f16 there", origin.c_str(), ggml_type_name(wanted[il]), keys ? "K" : "V", il,
                    (int) ggml_blck_size(wanted[il]), head);
            return false;
        }
    }
    return true;
}
