// Compares turbo_fill_mask with the rule for each cell, on random caches. Compiled against a patched llama.cpp.
#include "llama/turbo-mask.h"

#include "llama-batch.h"
#include "llama-hparams.h"
#include "llama-kv-cells.h"

#include <cstdio>
#include <random>

struct Layer {
    ggml_tensor * k;
    ggml_tensor * v;
};

int main() {
    std::mt19937  random(1);
    const auto    below = [&](int n) { return (int) (random() % (unsigned) n); };
    llama_hparams hparams;
    int           wrong = 0, filled = 0, refused = 0;
    for (int round = 0; round < 4000; ++round) {
        const uint32_t              n_kv = 64, n_seq = 1 + below(2);
        std::vector<llama_kv_cells> v_cells(1);
        llama_kv_cells &            cells = v_cells[0];
        cells.resize(n_kv);
        const uint32_t used  = 1 + below(n_kv - 1);
        const bool     holes = below(4) == 0;
        llama_pos      last  = 0;
        for (uint32_t i = 0; i < used; ++i) {
            if (holes && below(8) == 0) {
                continue;
            }
            last = below(5) == 0 ? below(100) : last + 1;
            cells.pos_set(i, last);
            cells.seq_add(i, below(16) == 0 ? below(n_seq) : 0);
        }
        llama_seq_id   seq     = below(8) == 0 ? n_seq - 1 : 0;
        llama_pos      pos     = below(4) == 0 ? below(100) : 200;
        int32_t        n_seqs  = 1;
        llama_seq_id * seq_ids = &seq;
        llama_ubatch   ubatch  = {};
        ubatch.n_tokens        = 1;
        ubatch.n_pos           = 1;
        ubatch.pos             = &pos;
        ubatch.n_seq_id        = &n_seqs;
        ubatch.seq_id          = &seq_ids;

        ggml_tensor mask = {};
        mask.type        = round % 2 ? GGML_TYPE_F16 : GGML_TYPE_F32;
        mask.ne[0]       = n_kv;
        mask.ne[1] = mask.ne[2] = mask.ne[3] = 1;
        std::vector<float> data(n_kv, 7.0f);
        mask.data         = data.data();
        ggml_tensor turbo = {}, plain = {};
        turbo.type                                = GGML_TYPE_TURBO4;
        plain.type                                = GGML_TYPE_F16;
        const std::vector<Layer>    layers        = { { &plain, round % 5 ? &turbo : &plain } };
        const std::vector<uint32_t> seq_to_stream = { 0, 0 };
        if (!turbo_fill_mask(&mask, ubatch, true, layers, hparams, false, v_cells, seq_to_stream)) {
            ++refused;
            continue;
        }
        ++filled;
        wrong += round % 5 == 0; // no turbo type: llama.cpp's own mask
        for (uint32_t i = 0; i < n_kv; ++i) {
            const bool  visible = !cells.is_empty(i) && cells.seq_has(i, seq) && cells.pos_get(i) <= pos;
            const float want    = visible ? 0.0f : -INFINITY;
            const float got =
                mask.type == GGML_TYPE_F16 ? ggml_fp16_to_fp32(((ggml_fp16_t *) data.data())[i]) : data[i];
            wrong += got != want;
        }
    }
    printf("%d filled, %d left to upstream, %d wrong\n", filled, refused, wrong);
    return wrong == 0 && filled > 200 && refused > 200 ? 0 : 1;
}
