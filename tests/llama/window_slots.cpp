// Slots and tags of turbo-window.cpp on random stores, rollbacks and rewritten cells, beside a model that remembers
// what each cell and each slot holds. Compiled with turbo-window.cpp, against a patched llama.cpp. Argument: a seed.
#include "llama/turbo-window.h"

#include "ggml/turbo-types.h"
#include "llama/turbo-layers.h"

#include "llama-model.h"

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <map>
#include <random>
#include <set>
#include <vector>

namespace {

struct Slot {
    int64_t cell    = -1;
    int     version = 0;
};

// One stream: what the cells hold, what was stored in the slots, and when each cell was last stored with a slot.
struct Stream {
    std::vector<int>           version;
    std::vector<Slot>          slot;
    std::map<int64_t, int>     stored; // the version of each cell that must have a slot
};

int g_round = 0, g_step = 0;

void require(bool right, const char * what) {
    if (!right) {
        printf("round %d, step %d: %s\n", g_round, g_step, what);
        exit(1);
    }
}

void check(const turbo_window & window, const std::vector<Stream> & streams) {
    for (size_t s = 0; s < streams.size(); ++s) {
        std::set<int64_t> tagged;
        for (int64_t i = 0; i < window.slots(); ++i) {
            const int64_t cell = window.tag((int64_t) s, i);
            if (cell < 0) {
                continue;
            }
            require(tagged.insert(cell).second, "a cell has two slots");
            require(streams[s].slot[i].cell == cell, "a slot holds another cell than its tag says");
            require(streams[s].slot[i].version == streams[s].version[cell], "a slot holds what its cell held before");
        }
        std::set<int64_t> wanted;
        for (const auto & one : streams[s].stored) {
            wanted.insert(one.first);
        }
        require(tagged == wanted, "other cells than the newest have slots");
    }
}

}  // namespace

int main(int argc, char ** argv) {
    std::mt19937 random(argc > 1 ? (unsigned) atoi(argv[1]) : 1);
    const auto   below = [&](int64_t n) { return (int64_t) (random() % (uint64_t) n); };
    alignas(64) static char none[sizeof(llama_model)] = {}; // only addresses in it count
    const auto &        model   = *reinterpret_cast<const llama_model *>(none);
    turbo_layer_types & chosen  = turbo_chosen_types();
    chosen.model       = &model;
    chosen.window_type = GGML_TYPE_F16;
    chosen.windowed    = { true };
    for (g_round = 0; g_round < 400; ++g_round) {
        const int64_t  cells = 1 + below(40);
        const uint32_t n_stream = 1 + (uint32_t) below(3);
        chosen.window = 1 + (int) below(below(2) ? 8 : 60);
        ggml_context * ctx = ggml_init({ 16 * ggml_tensor_overhead(), nullptr, true });
        ggml_tensor *  k   = ggml_new_tensor_3d(ctx, turbo_type_from_name("turbo4"), 128, cells, n_stream);
        turbo_window   window;
        window.add_layer(ctx, model, model.hparams, 0, k, k, n_stream);
        const int64_t slots = std::min<int64_t>(chosen.window, cells);
        require(window.slots() == slots && window.streams() == n_stream && window.cells() == cells, "sizes");
        require(window.find(0) && window.find(0)->k->ne[1] == slots * n_stream + 1, "rows of a layer");
        std::vector<Stream> streams(n_stream);
        for (Stream & stream : streams) {
            stream.version.resize(cells);
            stream.slot.resize(slots);
        }
        int version = 0;
        for (g_step = 0; g_step < 200; ++g_step) {
            const int64_t s = below(n_stream);
            Stream &      stream = streams[s];
            const int64_t what = below(12);
            if (what == 0) { // a state is restored into some cells
                for (int64_t n = below(4); n >= 0; --n) {
                    const int64_t cell = below(cells);
                    stream.version[cell] = ++version;
                    stream.stored.erase(cell);
                    window.forget((uint32_t) s, (uint32_t) cell);
                }
            } else if (what == 1 && below(4) == 0) {
                stream.stored.clear();
                window.forget((uint32_t) s);
            } else if (what == 2 && below(8) == 0) {
                for (Stream & one : streams) {
                    one.stored.clear();
                }
                window.forget();
            } else { // a batch: the next cells, those of a rollback, or any
                std::vector<int64_t> batch(cells);
                for (int64_t i = 0, first = below(3) ? g_step % cells : below(cells); i < cells; ++i) {
                    batch[i] = (first + i) % cells;
                }
                if (below(4) == 0) {
                    std::shuffle(batch.begin(), batch.end(), random);
                }
                batch.resize(1 + below(below(2) ? std::min<int64_t>(cells, 4) : cells));
                std::vector<int64_t> slot;
                window.assign(s, batch, slot);
                require(slot.size() == batch.size(), "a slot or none for each cell");
                const size_t first = batch.size() - std::min<size_t>(batch.size(), slots);
                for (size_t i = 0; i < batch.size(); ++i) {
                    stream.version[batch[i]] = version + (int) i + 1;
                    stream.stored.erase(batch[i]);
                    require((slot[i] >= 0) == (i >= first), "the last cells of a batch get slots, and no others");
                }
                for (size_t i = first; i < batch.size(); ++i) {
                    require(slot[i] < slots, "a slot that is none");
                    stream.slot[slot[i]] = { batch[i], stream.version[batch[i]] };
                    stream.stored[batch[i]] = stream.version[batch[i]];
                }
                version += (int) batch.size();
                std::set<int64_t> unique(slot.begin() + (std::ptrdiff_t) first, slot.end());
                require(unique.size() == batch.size() - first, "two cells share a slot");
                while ((int64_t) stream.stored.size() > slots) { // who was stored longest ago gives way
                    stream.stored.erase(std::min_element(stream.stored.begin(), stream.stored.end(),
                        [](const auto & a, const auto & b) { return a.second < b.second; }));
                }
            }
            check(window, streams);
        }
        ggml_free(ctx);
    }
    printf("ok\n");
    return 0;
}
