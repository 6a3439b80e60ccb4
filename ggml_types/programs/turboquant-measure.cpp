// The program turboquant-measure: measures the loss of a model with other cache types, as the KL divergence of its
// predictions from those with an f16 cache. It loads the model once and measures any number of plans. `turboquant tune`
// runs it.
//
//   turboquant-measure MODEL TEXT FIRST COUNT CONTEXT THREADS GPU_LAYERS SCRATCH
//
// The text is divided into chunks of CONTEXT tokens, and the chunks FIRST to FIRST + COUNT - 1 are evaluated in batches,
// each with an empty cache. FIRST may also be a percentage of the text: 50% begins in its middle. The second half of each
// chunk is scored, and the results are those of llama-perplexity. The predictions with f16 are stored in the file SCRATCH,
// which must not exist and is deleted at the end. It has 2 bytes for each scored token and entry of the vocabulary.
//
// Each line of stdin names a measurement:
//
//   plan PATH        a plan file (docs/tune.md)
//   types K V        the same types in all layers, without the guard
//
// stdout has a line of JSON for each record:
//
//   {"record":"model", "model":{...}, "vocabulary":n, "available":n, "first":n, "window":n,
//    "layers":[{"layer":l,"window":b}, ...]}
//       "model" identifies the model in a plan, "available" is the number of chunks of the text, "first" is the number
//       of the first evaluated chunk, "window" is the model's sliding window in tokens (0: none), and "layers" are the
//       layers with a cache, each with whether it has the window
//   {"record":"step", "done":n, "of":n}         after each chunk
//   {"record":"base", "nll":x}                  once, after the run with f16: the mean of -ln p of the scored tokens
//   {"record":"result", "kld":x, "error":x, "same_top":x, "nll":x, "chunks":[...], "types":s}
//       for each line: mean KLD in nats, its standard error, the share of tokens whose likeliest prediction is the same,
//       the mean KLD of each chunk, and the types as libllama logs them ("" if it logs none)
//   {"record":"failure", "why":s}               instead of a result, if the line cannot be measured
//   {"record":"error", "why":s}                 last, if nothing can be measured

#include "ggml/turbo-options.h"
#include "llama/turbo-plan.h"
#include "programs/turbo-record.h"

#include "ggml-backend.h"
#include "ggml.h"
#include "llama.h"

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <fstream>
#include <iostream>
#include <memory>
#include <string>
#include <thread>
#include <vector>

namespace {

constexpr int k_batch = 512;  // the batch size of llama-perplexity

// ---- output ------------------------------------------------------------------------------------------------------------

// JSON has no infinities, so a value that is not finite becomes null.
std::string number(double x) {
    char text[40];
    std::snprintf(text, sizeof(text), "%.9g", x);
    return std::isfinite(x) ? text : "null";
}

int fail(const std::string & why) {
    emit("{\"record\":\"error\",\"why\":" + quoted(why) + "}");
    return 1;
}

// ---- llama.cpp's log ---------------------------------------------------------------------------------------------------

// What only the log of a context's creation contains, and no function of llama.h returns.
struct context_log {
    std::string              error;   // the first error, which names the cause
    std::string              types;   // the types of each layer, if libllama logs them
    bool                     window = false;
    std::vector<std::string> layers;  // records
};

context_log g_log;

void on_log(ggml_log_level level, const char * text, void *) {
    std::fputs(text, stderr);
    int layer = 0;
    if (level == GGML_LOG_LEVEL_ERROR && g_log.error.empty()) {
        g_log.error = text;
        while (!g_log.error.empty() && g_log.error.back() == '\n') {
            g_log.error.pop_back();
        }
    } else if (const char * types = std::strstr(text, "turboquant: cache types: ")) {
        g_log.types = types + std::strlen("turboquant: cache types: ");
        g_log.types.erase(g_log.types.find_last_not_of('\n') + 1);
    } else if (std::strstr(text, "creating") && std::strstr(text, "SWA KV cache")) {
        g_log.window = !std::strstr(text, "non-SWA");
    } else if (const char * found = std::strstr(text, "layer ");
               found && std::strstr(text, ": dev = ") && std::sscanf(found, "layer %d:", &layer) == 1) {
        g_log.layers.push_back("{\"layer\":" + std::to_string(layer) + ",\"window\":" +
                               (g_log.window ? "true" : "false") + "}");
    }
}

// ---- predictions -------------------------------------------------------------------------------------------------------

// Calls work(i) for i in [0, n), on several threads.
template <typename Work> void parallel(int n, int threads, const Work & work) {
    std::atomic<int> next{ 0 };
    const auto       run = [&]() {
        for (int i = next++; i < n; i = next++) {
            work(i);
        }
    };
    std::vector<std::thread> workers;
    for (int i = 1; i < std::min(threads, n); i++) {
        workers.emplace_back(run);
    }
    run();
    for (std::thread & worker : workers) {
        worker.join();
    }
}

// The predictions of a token are stored as in llama-perplexity, so that the results are the same: log p = low + scale · q,
// where q has 16 bits. Values more than 16 nats below the largest are raised to this limit.
struct prediction {
    float scale;
    float low;
};

double log_sum_exp(const float * logits, int n, float largest) {
    double sum = 0.0;
    for (int i = 0; i < n; i++) {
        sum += std::exp(logits[i] - largest);
    }
    return std::log(sum);
}

// Returns -log p of `token`.
double keep(const float * logits, int n, int token, prediction & head, uint16_t * q) {
    const auto [least, most] = std::minmax_element(logits, logits + n);
    const float largest      = *most;
    const float smallest     = std::max(*least, largest - 16);
    const float log_sum      = (float) log_sum_exp(logits, n, largest);
    head.scale               = (largest - smallest) / 65535.0f;
    head.low                 = smallest - largest - log_sum;
    const float inverse      = head.scale > 0 ? 1 / head.scale : 0;
    for (int i = 0; i < n; i++) {
        q[i] = logits[i] > smallest ? (uint16_t) std::lrint(inverse * (logits[i] - smallest)) : 0;
    }
    return largest + log_sum - logits[token];
}

struct score {
    double kld, nll;
    bool   same_top;
};

score compare(const float * logits, int n, int token, const prediction & head, const uint16_t * q) {
    const int    top   = (int) (std::max_element(logits, logits + n) - logits);
    const float  total = logits[top] + (float) log_sum_exp(logits, n, logits[top]);
    score        out   = { 0.0, total - logits[token], false };
    int          base_top   = 0;
    float        base_log_p = -INFINITY;
    for (int i = 0; i < n; i++) {
        const float log_p = head.scale * q[i] + head.low;
        if (log_p > base_log_p) {
            base_log_p = log_p;
            base_top   = i;
        }
        if (log_p > -16.0f) {
            out.kld += std::exp(log_p) * (log_p - logits[i] + total);
        }
    }
    out.same_top = top == base_top;
    return out;
}

// ---- evaluation --------------------------------------------------------------------------------------------------------

struct options {
    int first, count, n_ctx, threads, gpu_layers;
};

struct text_chunks {
    std::vector<llama_token> tokens;
    bool                     with_bos = false;
    llama_token              bos      = 0;
};

using context_ptr = std::unique_ptr<llama_context, decltype(&llama_free)>;

context_ptr make_context(llama_model * model, const options & given, ggml_type type_k, ggml_type type_v) {
    llama_context_params params = llama_context_default_params();
    params.n_ctx                = (uint32_t) given.n_ctx;
    params.n_batch = params.n_ubatch = (uint32_t) std::min(given.n_ctx, k_batch);
    params.n_seq_max = 1;
    params.n_threads = params.n_threads_batch = given.threads;
    params.type_k          = type_k;
    params.type_v          = type_v;
    params.flash_attn_type = LLAMA_FLASH_ATTN_TYPE_ENABLED;
    params.swa_full        = false;
    params.offload_kqv     = given.gpu_layers != 0;
    params.op_offload      = given.gpu_layers != 0;
    params.no_perf         = true;
    g_log                  = {};
    return { llama_init_from_model(model, params), llama_free };
}

// Evaluates every chunk and calls scored(first, n) when the logits of n scored tokens are available; `first` is the index
// of the first of them over all chunks. False, with the reason in `why`, if an evaluation fails.
template <typename Scored>
bool evaluate(llama_context * ctx, const options & given, const text_chunks & text, std::string & why,
              const Scored & scored) {
    const int   half  = given.n_ctx / 2, per_chunk = given.n_ctx - 1 - half;
    llama_batch batch = llama_batch_init(k_batch, 0, 1);
    bool        good  = true;
    for (int chunk = 0; good && chunk < given.count; chunk++) {
        const llama_token * tokens = text.tokens.data() + (size_t) (given.first + chunk) * given.n_ctx;
        llama_memory_clear(llama_get_memory(ctx), true);
        for (int start = 0; good && start < given.n_ctx; start += k_batch) {
            const int end  = std::min(start + k_batch, given.n_ctx);
            batch.n_tokens = end - start;
            for (int i = start; i < end; i++) {
                batch.token[i - start]     = i == 0 && text.with_bos ? text.bos : tokens[i];
                batch.pos[i - start]       = i;
                batch.n_seq_id[i - start]  = 1;
                batch.seq_id[i - start][0] = 0;
                batch.logits[i - start]    = i >= half;  // also for the last token, although none follows it
            }
            if (llama_decode(ctx, batch) != 0) {
                why  = g_log.error.empty() ? "llama.cpp could not evaluate the text" : g_log.error;
                good = false;
                break;
            }
            const int from = std::max(start, half), to = std::min(end, given.n_ctx - 1);
            if (from < to) {
                good = scored(chunk * per_chunk + from - half, to - from, llama_get_logits(ctx), tokens + from + 1, why);
            }
        }
        emit("{\"record\":\"step\",\"done\":" + std::to_string(chunk + 1) + ",\"of\":" + std::to_string(given.count) + "}");
    }
    llama_batch_free(batch);
    return good;
}

// The record with the scores of all tokens.
std::string result(const std::vector<score> & scores, int chunks) {
    const size_t n = scores.size(), per_chunk = n / chunks;
    double       kld = 0, squares = 0, nll = 0, same = 0;
    std::string  means;
    for (int chunk = 0; chunk < chunks; chunk++) {
        double sum = 0;
        for (size_t i = chunk * per_chunk; i < (chunk + 1) * per_chunk; i++) {
            sum += scores[i].kld;
            squares += scores[i].kld * scores[i].kld;
            nll += scores[i].nll;
            same += scores[i].same_top;
        }
        kld += sum;
        means += (chunk ? "," : "") + number(sum / per_chunk);
    }
    kld /= n;
    const double variance = squares / n - kld * kld;
    return "{\"record\":\"result\",\"kld\":" + number(kld) + ",\"error\":" +
           number(n > 1 ? std::sqrt(std::max(variance, 0.0) / (n - 1)) : 0.0) + ",\"same_top\":" + number(same / n) +
           ",\"nll\":" + number(nll / n) + ",\"chunks\":[" + means + "],\"types\":" + quoted(g_log.types) + "}";
}

ggml_type type_of(const std::string & name) {
    for (int i = 0; i < GGML_TYPE_COUNT; i++) {
        const char * known = ggml_type_name((ggml_type) i);
        if (known && name == known) {
            return (ggml_type) i;
        }
    }
    return GGML_TYPE_COUNT;
}

// The file of predictions, which is deleted with the object.
struct scratch_file {
    std::string path;
    FILE *      file = nullptr;

    explicit scratch_file(const char * name) : path(name), file(std::fopen(name, "w+bx")) {}
    scratch_file(const scratch_file &)             = delete;
    scratch_file & operator=(const scratch_file &) = delete;
    ~scratch_file() {
        if (file) {
            std::fclose(file);
            std::remove(path.c_str());
        }
    }
};

}  // namespace

int main(int argc, char ** argv) {
    if (argc != 9) {
        return fail("usage: turboquant-measure MODEL TEXT FIRST COUNT CONTEXT THREADS GPU_LAYERS SCRATCH < LINES");
    }
    options given = { std::atoi(argv[3]), std::atoi(argv[4]), std::atoi(argv[5]), std::atoi(argv[6]),
                      std::atoi(argv[7]) };
    if (given.first < 0 || given.count < 1 || given.n_ctx < 8 || given.threads < 1) {
        return fail("FIRST must be 0 or more, COUNT and THREADS positive, and CONTEXT at least 8");
    }
    llama_log_set(on_log, nullptr);
    ggml_backend_load_all();
    llama_model_params model_params = llama_model_default_params();
    model_params.n_gpu_layers       = given.gpu_layers;
    const std::unique_ptr<llama_model, decltype(&llama_model_free)> model(
        llama_model_load_from_file(argv[1], model_params), llama_model_free);
    if (!model) {
        return fail(std::string("llama.cpp cannot load ") + argv[1] + (g_log.error.empty() ? "" : ": " + g_log.error));
    }

    std::ifstream file(argv[2], std::ios::binary);
    std::string   content((std::istreambuf_iterator<char>(file)), std::istreambuf_iterator<char>());
    if (!content.empty() && content.back() == '\n') {
        content.pop_back();  // as llama.cpp's programs do
    }
    const llama_vocab * vocab = llama_model_get_vocab(model.get());
    text_chunks         text;
    text.with_bos = llama_vocab_get_add_bos(vocab);
    text.bos      = llama_vocab_bos(vocab);
    text.tokens.resize(content.size() + 8);
    const int found = llama_tokenize(vocab, content.data(), (int32_t) content.size(), text.tokens.data(),
                                     (int32_t) text.tokens.size(), true, false);
    if (found < 1) {
        return fail(std::string(argv[2]) + " has no text in it");
    }
    text.tokens.resize(found);
    const int n_vocab = llama_vocab_n_tokens(vocab), available = found / given.n_ctx;

    if (std::strchr(argv[3], '%')) {
        given.first = (int) ((int64_t) available * given.first / 100);
    }

    context_ptr ctx = make_context(model.get(), given, GGML_TYPE_F16, GGML_TYPE_F16);
    if (!ctx) {
        return fail(g_log.error.empty() ? "llama.cpp could not make a context for this model" : g_log.error);
    }
    std::vector<char> json(1 << 20);
    if (!turbo_plan_model_json(model.get(), json.data(), json.size())) {
        return fail("the model has too many layers");
    }
    std::string layers;
    for (const std::string & layer : g_log.layers) {
        layers += (layers.empty() ? "" : ",") + layer;
    }
    emit("{\"record\":\"model\",\"model\":" + std::string(json.data()) + ",\"vocabulary\":" + std::to_string(n_vocab) +
         ",\"available\":" + std::to_string(available) + ",\"first\":" + std::to_string(given.first) + ",\"window\":" +
         std::to_string(std::max(0, llama_model_n_swa(model.get()))) + ",\"layers\":[" + layers + "]}");
    if (given.first + given.count > available) {
        return fail(std::string(argv[2]) + " has " + std::to_string(available) + " chunks of " +
                    std::to_string(given.n_ctx) + " tokens, and " + std::to_string(given.first + given.count) +
                    " are needed: give a longer text");
    }

    scratch_file scratch(argv[8]);
    if (!scratch.file) {
        return fail(std::string(argv[8]) + " cannot be written, or exists already (" + std::strerror(errno) + ")");
    }
    const int               scored = given.n_ctx - 1 - given.n_ctx / 2;
    std::vector<prediction> heads((size_t) scored * given.count);
    std::vector<uint16_t>   q((size_t) k_batch * n_vocab);
    std::vector<double>     nll(heads.size());
    std::string             why;
    const bool kept = evaluate(ctx.get(), given, text, why, [&](int first, int n, const float * logits,
                                                                const llama_token * next, std::string & reason) {
        parallel(n, given.threads, [&](int i) {
            nll[first + i] = keep(logits + (size_t) i * n_vocab, n_vocab, next[i], heads[first + i],
                                  q.data() + (size_t) i * n_vocab);
        });
        const size_t values = (size_t) n * n_vocab;
        if (std::fwrite(q.data(), sizeof(uint16_t), values, scratch.file) != values) {
            reason = scratch.path + " cannot be written (" + std::strerror(errno) + "): make room on its disk";
        }
        return reason.empty();
    });
    if (!kept) {
        return fail(why);
    }
    double sum = 0;
    for (const double one : nll) {
        sum += one;
    }
    if (!std::isfinite(sum)) {
        return fail("the model's own predictions on this text are not finite: is the file damaged?");
    }
    emit("{\"record\":\"base\",\"nll\":" + number(sum / nll.size()) + "}");

    std::vector<score> scores(heads.size());
    std::string        line;
    while (std::getline(std::cin, line)) {
        const size_t      space = line.find(' '), second = line.find(' ', space + 1);
        const std::string kind = line.substr(0, space), rest = space == line.npos ? "" : line.substr(space + 1);
        ggml_type         type_k = GGML_TYPE_TURBO_AUTO, type_v = GGML_TYPE_TURBO_AUTO;
        if (kind == "types" && second != line.npos) {
            type_k = type_of(line.substr(space + 1, second - space - 1));
            type_v = type_of(line.substr(second + 1));
        }
        if ((kind != "types" && kind != "plan") || rest.empty() || type_k == GGML_TYPE_COUNT || type_v == GGML_TYPE_COUNT) {
            emit("{\"record\":\"failure\",\"why\":" + quoted("no plan or types: " + line) + "}");
            continue;
        }
        turbo_option_to_env("--cache-plan", kind == "plan" ? rest.c_str() : "off");
        turbo_option_to_env("--cache-guard", "off");
        ctx.reset();  // before the next context is created: two caches may not fit into memory
        ctx = make_context(model.get(), given, type_k, type_v);
        why = ctx ? "" : g_log.error.empty() ? "llama.cpp could not make a context" : g_log.error;
        std::rewind(scratch.file);
        if (ctx && evaluate(ctx.get(), given, text, why, [&](int first, int n, const float * logits,
                                                             const llama_token * next, std::string & reason) {
                const size_t values = (size_t) n * n_vocab;
                if (std::fread(q.data(), sizeof(uint16_t), values, scratch.file) != values) {
                    reason = scratch.path + " cannot be read";
                    return false;
                }
                parallel(n, given.threads, [&](int i) {
                    scores[first + i] = compare(logits + (size_t) i * n_vocab, n_vocab, next[i], heads[first + i],
                                                q.data() + (size_t) i * n_vocab);
                });
                return true;
            })) {
            emit(result(scores, given.count));
        } else {
            emit("{\"record\":\"failure\",\"why\":" + quoted(why) + "}");
        }
    }
    return 0;
}
