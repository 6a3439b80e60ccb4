// Compares the masks of turbo_fill_mask with those of llama.cpp's own loop, on random cells. Compiled against a patched
// llama.cpp. Argument: a model.
#include <array>
#include <cstdio>
#include <cstring>
#include <functional>
#include <map>
#include <memory>
#include <random>
#include <set>
#include <string>
#include <unordered_map>
#include <unordered_set>
#include <vector>

#define private public // the cells, and the kind of sliding window
#include "llama-kv-cache.h"
#undef private

#include "llama/turbo-mask.h"

#include "ggml-backend.h"
#include "ggml-cpp.h"
#include "llama-batch.h"
#include "llama-cpp.h"
#include "llama-hparams.h"

static std::mt19937 g_random(1);

static int below(int n) {
    return (int) (g_random() % (unsigned) n);
}

static bool chance(int percent) {
    return below(100) < percent;
}

constexpr uint32_t CELLS    = 256; // of a stream
constexpr int      ROUNDS   = 6000;
constexpr int      AT_LEAST = 40; // rounds of each kind

// The cells of releases until 0.3.35.
struct OldCells : llama_kv_cells {
    OldCells(const llama_kv_cells & cells) : llama_kv_cells(cells) {}
    void seq_get_all(uint32_t) const = delete;
};

struct Cache {
    llama_context_ptr context;
    llama_kv_cache *  cells;

    Cache(llama_model * model, ggml_type type, uint32_t sequences) {
        llama_context_params params = llama_context_default_params();
        params.n_ctx                = CELLS * sequences;
        params.n_seq_max            = sequences;
        params.kv_unified           = sequences == 1;
        params.type_k               = type;
        params.type_v               = type;
        params.flash_attn_type      = LLAMA_FLASH_ATTN_TYPE_ENABLED;
        context.reset(llama_init_from_model(model, params));
        cells = dynamic_cast<llama_kv_cache *>(llama_get_memory(context.get()));
    }

    void slide(uint32_t length, llama_swa_type type) {
        const_cast<uint32_t &>(cells->n_swa)          = length;
        const_cast<llama_swa_type &>(cells->swa_type) = type;
    }
};

// What a random cache has.
struct Kind {
    bool hole = false, shared = false, several = false, unordered = false;

    void add(const Kind & other) {
        hole |= other.hole;
        shared |= other.shared;
        several |= other.several;
        unordered |= other.unordered;
    }
};

// Fills the cells of a stream at random with those of sequences first ... first + n - 1. The last cells are those of
// the batch: sets the positions and sequences of its tokens. `shared`: cells may belong to another sequence as well.
static Kind fill(llama_kv_cells & cells, llama_seq_id first, int n, bool shared, int tokens, llama_pos * pos,
                 llama_seq_id * seq) {
    cells.reset();
    Kind       kind;
    const int  earlier = below(CELLS - tokens - 1), used = earlier + tokens;
    const bool leaps = chance(20), repeats = chance(20), shifted = chance(20), turns = chance(50);
    std::vector<llama_pos>    last(n, chance(30) ? below(1000) : 0), all(used);
    std::vector<llama_seq_id> owner(used);
    for (int i = 0; i < used; ++i) {
        const bool next = turns ? true : chance(5); // one cell of each sequence in turn, or prompts
        owner[i]        = i == 0 ? first : next ? first + (owner[i - 1] - first + 1) % n : owner[i - 1];
        llama_pos & p   = last[owner[i] - first];
        all[i]          = p;
        p               = repeats && chance(10) ? p : p + 1 + (leaps && chance(10) ? below(50) : 0);
    }
    if (chance(15)) {
        std::shuffle(all.begin(), all.begin() + earlier, g_random); // the earlier cells were reused
    }
    if (chance(10)) {
        std::shuffle(all.begin() + earlier, all.end(), g_random);
    }
    if (chance(5)) {
        std::shuffle(all.begin(), all.end(), g_random);
    }
    for (int i = 0; i < used; ++i) {
        cells.pos_set(i, all[i]);
        cells.seq_add(i, owner[i]);
        kind.several |= owner[i] != first;
        kind.unordered |= i > 0 && owner[i] == owner[i - 1] && all[i] < all[i - 1];
    }
    std::copy(all.begin() + earlier, all.end(), pos);
    std::copy(owner.begin() + earlier, owner.end(), seq);
    for (int holes = earlier > 0 && chance(20) ? 1 + below(20) : 0; holes > 0; --holes) {
        const int i = below(earlier);
        if (!cells.is_empty(i)) {
            cells.rm(i);
            kind.hole = true;
        }
    }
    for (int more = shared && earlier > 0 && chance(20) ? 1 + below(20) : 0; more > 0; --more) {
        const int          i     = below(earlier);
        const llama_seq_id other = first + below(n + 1); // a sequence without tokens, too
        if (!cells.is_empty(i) && !cells.seq_has(i, other)) {
            cells.seq_add(i, other);
            kind.shared = true;
        }
    }
    if (shifted) {
        for (int i = 0; i < used; ++i) {
            if (!cells.is_empty(i)) {
                cells.pos_add(i, 5);
            }
        }
        for (int i = 0; i < tokens; ++i) {
            pos[i] += 5;
        }
    }
    return kind;
}

// A mask of 64 MiB, which is stored past the caches. Returns whether it equals that of llama.cpp's loop.
static bool large_mask_is_right(Cache & plain, Cache & turbo, bool window) {
    constexpr int64_t           n_kv = 32768, tokens = 1024;
    llama_kv_cells &            cells = plain.cells->v_cells[0];
    std::vector<llama_pos>      pos(tokens);
    std::vector<llama_seq_id>   seq(tokens, 0);
    std::vector<llama_seq_id *> ids(tokens);
    cells.resize(n_kv);
    for (int i = 0; i < n_kv - 100; ++i) {
        cells.pos_set(i, i);
        cells.seq_add(i, 0);
    }
    for (int i = 0; i < tokens; ++i) {
        pos[i] = n_kv - 100 - tokens + i;
        ids[i] = &seq[i];
    }
    turbo.cells->v_cells = plain.cells->v_cells;
    llama_ubatch ubatch  = {};
    ubatch.n_tokens      = tokens;
    ubatch.n_pos         = 1;
    ubatch.pos           = pos.data();
    ubatch.seq_id        = ids.data();
    for (Cache * one : { &plain, &turbo }) {
        one->slide(window ? 3001 : 0, window ? LLAMA_SWA_TYPE_STANDARD : LLAMA_SWA_TYPE_NONE);
    }
    const ggml_context_ptr  ctx(ggml_init({ 2 * ggml_tensor_overhead(), nullptr, true }));
    ggml_tensor * const     masks[] = { ggml_new_tensor_2d(ctx.get(), GGML_TYPE_F16, n_kv, tokens),
                                        ggml_new_tensor_2d(ctx.get(), GGML_TYPE_F16, n_kv, tokens) };
    ggml_backend_buffer_ptr buffer(ggml_backend_alloc_ctx_tensors_from_buft(ctx.get(), ggml_backend_cpu_buffer_type()));
    memset(masks[0]->data, 0x77, ggml_nbytes(masks[0]));
    memset(masks[1]->data, 0x77, ggml_nbytes(masks[1]));
    masks[1]->buffer = nullptr; // only the hook can fill it
    plain.cells->set_input_kq_mask(masks[0], &ubatch, true);
    turbo.cells->set_input_kq_mask(masks[1], &ubatch, true);
    return memcmp(masks[0]->data, masks[1]->data, ggml_nbytes(masks[0])) == 0;
}

int main(int, char ** argv) {
    llama_log_set([](ggml_log_level level, const char * text, void *) {
        if (level >= GGML_LOG_LEVEL_ERROR) {
            fputs(text, stderr);
        }
    }, nullptr);
    const llama_model_ptr model(llama_model_load_from_file(argv[1], llama_model_default_params()));
    std::map<std::string, int> seen; // rounds of each kind
    int                        wrong = 0;
    for (const int streams : { 1, 3 }) {
        Cache plain(model.get(), GGML_TYPE_F16, streams), turbo(model.get(), GGML_TYPE_TURBO4, streams);
        for (int round = 0; round < ROUNDS; ++round) {
            const int            n = below(3) == 0 ? 1 : 1 + below(24); // tokens of a stream
            const llama_swa_type types[] = { LLAMA_SWA_TYPE_STANDARD, LLAMA_SWA_TYPE_CHUNKED,
                                             LLAMA_SWA_TYPE_SYMMETRIC };
            const bool           window  = chance(30);
            const llama_swa_type type    = window ? types[below(3)] : LLAMA_SWA_TYPE_NONE;
            const uint32_t       length  = window ? 1 + below(100) : 0;
            const bool           causal  = !chance(3);
            plain.slide(length, type);
            turbo.slide(length, type);

            std::vector<llama_pos>      pos(n * streams);
            std::vector<llama_seq_id>   seq(n * streams);
            std::vector<int32_t>        counts(n * streams, 1);
            std::vector<llama_seq_id *> ids(n * streams);
            Kind                        kind;
            bool                        every = !window; // whether each token sees all cells of its sequence
            for (int s = 0; s < streams; ++s) {
                llama_kv_cells & cells = plain.cells->v_cells[s];
                kind.add(fill(cells, s, streams == 1 ? 1 + below(3) : 1, streams == 1, n, &pos[s * n], &seq[s * n]));
                for (int i = s * n; i < (s + 1) * n; ++i) {
                    every = every && pos[i] >= cells.seq_pos_max(seq[i]);
                }
            }
            turbo.cells->v_cells = plain.cells->v_cells;
            for (size_t i = 0; i < seq.size(); ++i) {
                ids[i] = &seq[i];
            }
            llama_ubatch ubatch = {};
            ubatch.n_tokens     = n * streams;
            ubatch.n_pos        = 1;
            ubatch.pos          = pos.data();
            ubatch.n_seq_id     = counts.data();
            ubatch.seq_id       = ids.data();

            const int64_t           n_kv   = chance(20) ? 1 + below(CELLS) : CELLS;
            const ggml_type         format = chance(50) ? GGML_TYPE_F16 : GGML_TYPE_F32;
            const ggml_context_ptr  ctx(ggml_init({ 4 * ggml_tensor_overhead(), nullptr, true }));
            ggml_tensor * const     masks[] = { ggml_new_tensor_4d(ctx.get(), format, n_kv, n, 1, streams),
                                                ggml_new_tensor_4d(ctx.get(), format, n_kv, n, 1, streams),
                                                ggml_new_tensor_4d(ctx.get(), format, n_kv, n, 1, streams) };
            const size_t            bytes   = ggml_nbytes(masks[0]);
            ggml_backend_buffer_ptr buffer(
                ggml_backend_alloc_ctx_tensors_from_buft(ctx.get(), ggml_backend_cpu_buffer_type()));
            for (ggml_tensor * mask : masks) {
                memset(mask->data, 0x77, bytes);
            }
            const llama_kv_cache & k = *turbo.cells;
            plain.cells->set_input_kq_mask(masks[0], &ubatch, causal); // llama.cpp's loop
            const auto fill_with = [&](const auto & cells, const auto & layers, const llama_hparams & hparams,
                                       const llama_ubatch & tokens) {
                return turbo_fill_mask(masks[1], tokens, causal, layers, hparams, k.n_swa, k.swa_type, cells,
                                       k.seq_to_stream);
            };
            const bool filled = fill_with(k.v_cells, k.layers, k.hparams, ubatch);
            // Without a buffer llama.cpp's code would abort, so the hook has filled the mask.
            masks[2]->buffer = causal ? nullptr : masks[2]->buffer;
            k.set_input_kq_mask(masks[2], &ubatch, causal);

            const std::vector<char> untouched(bytes, 0x77);
            const void *            want = filled ? masks[0]->data : untouched.data();
            const bool right = filled == causal && memcmp(masks[1]->data, want, bytes) == 0 &&
                               memcmp(masks[2]->data, masks[0]->data, bytes) == 0;
            wrong += !right;
            const std::string size = n == 1 ? "one token" : "many tokens";
            const std::string many = size + (streams == 1 ? ", one stream" : ", streams");
            if (filled) {
                ++seen["filled: " + many + (window ? ", sliding window" : "")];
                seen["filled: holes"] += kind.hole;
                seen["filled: cells of two sequences"] += kind.shared;
                seen["filled: several sequences"] += kind.several;
                seen["filled: another order"] += kind.unordered;
                seen["filled: all cells visible, in any order"] += kind.unordered && every;
            } else {
                ++seen["left to llama.cpp: not causal"];
            }
            const std::vector<OldCells> old(k.v_cells.begin(), k.v_cells.end());
            memset(masks[1]->data, 0x77, bytes);
            wrong += causal && (!fill_with(old, k.layers, k.hparams, ubatch) ||
                                memcmp(masks[1]->data, masks[0]->data, bytes) != 0);
            // ALiBi, positions in two dimensions and llama.cpp's own types are left to its loop.
            llama_hparams alibi = k.hparams;
            alibi.use_alibi     = true;
            llama_ubatch image  = ubatch;
            image.n_pos         = 3;
            wrong += fill_with(k.v_cells, k.layers, alibi, ubatch);
            wrong += fill_with(k.v_cells, k.layers, k.hparams, image);
            wrong += fill_with(k.v_cells, plain.cells->layers, k.hparams, ubatch);
        }
        if (streams == 1) {
            wrong += !large_mask_is_right(plain, turbo, false) + !large_mask_is_right(plain, turbo, true);
        }
    }
    bool rare = false;
    for (const auto & [name, rounds] : seen) {
        printf("%5d %s\n", rounds, name.c_str());
        rare = rare || rounds < AT_LEAST;
    }
    printf("%zu kinds, %d wrong\n", seen.size(), wrong);
    return wrong || rare || seen.size() != 14 ? 1 : 0;
}
