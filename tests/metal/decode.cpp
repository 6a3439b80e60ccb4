// Runs a model on the CPU and on the fake Metal device, through llama.cpp and ggml's scheduler, and compares the
// logits.
//
//   decode MODEL TYPE_K TYPE_V
//
// Decodes a prompt, some tokens one by one, and one more after a context shift if the model permits it. Prints for each
// step the relative error of the device's logits, then the largest errors of single ops, and the number of dispatches
// by kernel. The status is 3 if something cannot run.
#include "fake_metal.h"

#include "ggml-backend.h"
#include "ggml-metal.h"
#include "ggml.h"
#include "llama.h"

#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <vector>

constexpr int prompt = 40, steps = 4, shifted = 8;

static ggml_type type_of(const char * name) {
    for (int i = 0; i < GGML_TYPE_COUNT; ++i) {
        const char * known = ggml_type_name((ggml_type) i);
        if (known && strcmp(known, name) == 0) {
            return (ggml_type) i;
        }
    }
    fprintf(stderr, "no type %s\n", name);
    exit(3);
}

static void must(bool right, const char * what) {
    if (!right) {
        fprintf(stderr, "cannot %s\n", what);
        exit(3);
    }
}

// The logits after the prompt, after each token, and after the shift.
static std::vector<std::vector<float>> run(const char * file, ggml_type type_k, ggml_type type_v, bool device) {
    ggml_backend_dev_t   cpu[] = { nullptr };
    llama_model_params   model_params = llama_model_default_params();
    model_params.n_gpu_layers = device ? 99 : 0;
    if (!device) {
        model_params.devices = cpu;
    }
    llama_model * model = llama_model_load_from_file(file, model_params);
    must(model, "load the model");
    llama_context_params params = llama_context_default_params();
    params.n_ctx           = 256;
    params.n_threads       = params.n_threads_batch = 1;
    params.type_k          = type_k;
    params.type_v          = type_v;
    params.flash_attn_type = LLAMA_FLASH_ATTN_TYPE_ENABLED;
    llama_context * context = llama_init_from_model(model, params);
    must(context, "make a context");
    const int vocabulary = llama_vocab_n_tokens(llama_model_get_vocab(model));
    std::vector<llama_token> tokens;
    for (int i = 0; i < prompt + steps + 1; ++i) {
        tokens.push_back((i * 37 + 11) % vocabulary);
    }
    std::vector<std::vector<float>> results;
    const auto decode = [&](int first, int count) {
        must(llama_decode(context, llama_batch_get_one(tokens.data() + first, count)) == 0, "decode");
        const float * logits = llama_get_logits_ith(context, -1);
        results.emplace_back(logits, logits + vocabulary);
    };
    decode(0, prompt);
    for (int i = 0; i < steps; ++i) {
        decode(prompt + i, 1);
    }
    llama_memory_t memory = llama_get_memory(context);
    if (llama_memory_can_shift(memory)) {
        must(llama_memory_seq_rm(memory, 0, 0, shifted), "remove tokens");
        llama_memory_seq_add(memory, 0, shifted, -1, -shifted);
        decode(prompt + steps, 1);
    }
    llama_free(context);
    llama_model_free(model);
    return results;
}

int main(int argc, char ** argv) {
    if (argc != 4) {
        fprintf(stderr, "see the head of this file for the arguments\n");
        return 3;
    }
    llama_backend_init();
    const ggml_type type_k = type_of(argv[2]), type_v = type_of(argv[3]);
    const auto      want = run(argv[1], type_k, type_v, false);
    ggml_backend_register(ggml_backend_metal_reg());
    const auto got = run(argv[1], type_k, type_v, true);
    for (size_t i = 0; i < want.size(); ++i) {
        double difference = 0, total = 0;
        for (size_t j = 0; j < want[i].size(); ++j) {
            difference += std::pow(double(got[i][j]) - want[i][j], 2);
            total += std::pow(double(want[i][j]), 2);
        }
        printf("error %.2e\n", std::sqrt(difference / total));
    }
    printf("attention %.2e\nwrong rows %d\n", fake_metal_error, fake_metal_wrong_rows);
    for (const auto & kernel : fake_metal_dispatches) {
        printf("kernel %s %d\n", kernel.first.c_str(), kernel.second);
    }
    return 0;
}
