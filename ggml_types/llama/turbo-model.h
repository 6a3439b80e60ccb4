// turbo-model.h: the properties of a model that determine the types, and llama.cpp's log, without llama.cpp's private
// headers. Part of libllama.
#pragma once

#include "llama.h"

#include "ggml-backend.h"

#include <cstdint>
#include <string>
#include <vector>

struct llama_hparams;

struct turbo_layer {
    bool               cached;    // whether it stores keys and values of tokens (and not only a recurrent state)
    bool               recurrent; // whether it has a recurrent state
    bool               has_kv;    // whether it has keys of its own
    bool               window;    // whether it has sliding-window attention
    uint32_t           head_k, head_v;     // values of a head
    uint32_t           heads, kv_heads;
    uint32_t           values_k, values_v; // of all heads of a token
    uint32_t           n_rot;     // values of a head that RoPE rotates
    float              scale;     // factor of q·k
    ggml_backend_dev_t device;
};

struct turbo_model {
    std::vector<turbo_layer> layers;     // all, those for multi-token prediction after the model's own
    uint32_t                 own_layers; // without those
    std::string              arch;       // name of its architecture
    llama_rope_type          rope;
    bool                     mla;        // multi-head latent attention caches one row, K, whose front is V
    bool                     own_attention; // its architecture's own code stores keys or computes attention
    bool                     rotated;    // llama.cpp rotates keys of quantized types that do not rotate for themselves
};

turbo_model turbo_describe_model(const llama_model & model);

// A tensor by its name in the file, or null. The names change less often than llama.cpp's structs.
const ggml_tensor * turbo_weight(const llama_model & model, const std::string & name);

// True if a cache with these hparams is for the model's own attention. A cache for something else, for example that of an
// indexer, has hparams of its own.
bool turbo_is_own_cache(const llama_model & model, const llama_hparams & hparams);

// True if each layer can be rotated independently of the others.
bool turbo_rotates_by_layer(const llama_model & model);

// The layers that attend to the cache of layer il: itself, and later ones without keys of their own, which read the
// last cache of their kind (full attention, or a sliding window).
std::vector<uint32_t> turbo_readers(const turbo_model & model, uint32_t il);

// The layers with a cache.
std::vector<uint32_t> turbo_cached_layers(const turbo_model & model);

// ---- llama.cpp's log: each call writes a line that begins with "turboquant: " ---------------------------------------

#ifdef __GNUC__
#define TURBO_FORMAT __attribute__((format(printf, 1, 2)))
#else
#define TURBO_FORMAT
#endif
void turbo_info(const char * format, ...) TURBO_FORMAT;
void turbo_warn(const char * format, ...) TURBO_FORMAT;
void turbo_error(const char * format, ...) TURBO_FORMAT;

// "layer 2", "layers 0-3, 7"
std::string turbo_layer_list(const std::vector<uint32_t> & layers);
// "0-3, 7"
std::string turbo_layer_ranges(const std::vector<uint32_t> & layers);
// The value with three digits.
std::string turbo_number(double value);
