// A small interpreter over llama.h for the tests: commands on stdin, one reply line each on stdout ("ok ..." or
// "error ..."), llama.cpp's log on stderr. Unlike the programs, it gives the logits of every token, for every
// division into batches, for several sequences, and with state files and cache shifts.
//
//   model PATH                        load a model
//   context key=value ...             new context (ctk ctv n_ctx n_batch n_ubatch n_seq unified offload swa_full threads fa)
//   tokenize FILE                     -> ok token token ...
//   add SEQ POS token token ...       queue tokens
//   run FILE                          decode the queue; append the logits of every queued token to FILE, float32
//   abort N                           the next run ends before its Nth node
//   canshift                          -> ok 0|1
//   save FILE | load FILE             the state of the whole context
//   saveseq FILE SEQ | loadseq FILE SEQ
//   rm SEQ P0 P1 | keep SEQ | shift SEQ P0 P1 D | div SEQ P0 P1 D | cp SRC DST P0 P1 | clear DATA

#include "ggml.h"
#include "llama.h"

#include <cstdio>
#include <cstring>
#include <fstream>
#include <iostream>
#include <iterator>
#include <map>
#include <memory>
#include <sstream>
#include <string>
#include <vector>

namespace {

struct item {
    llama_token  token;
    llama_pos    pos;
    llama_seq_id seq;
};

llama_model *     model = nullptr;
llama_context *   ctx   = nullptr;
std::vector<item> queue;
int               nodes_left = -1; // before the abort that was asked for; -1: none was

void reply(const std::string & line) {
    std::cout << line << std::endl;
}

void ok(const std::string & rest = "") {
    reply(rest.empty() ? "ok" : "ok " + rest);
}

void error(const std::string & why) {
    reply("error " + why);
}

bool type_from_name(const std::string & name, ggml_type & type) {
    for (int i = 0; i < GGML_TYPE_COUNT; i++) {
        const char * candidate = ggml_type_name((ggml_type) i);
        if (candidate && name == candidate) {
            type = (ggml_type) i;
            return true;
        }
    }
    return false;
}

void load_model(std::istringstream & in) {
    std::string path;
    std::getline(in >> std::ws, path);
    llama_model_params params = llama_model_default_params();
    model = llama_model_load_from_file(path.c_str(), params);
    model ? ok() : error("cannot load " + path);
}

void new_context(std::istringstream & in) {
    std::map<std::string, std::string> given;
    for (std::string word; in >> word;) {
        const size_t at = word.find('=');
        given[word.substr(0, at)] = word.substr(at + 1);
    }
    const auto number = [&](const char * key, int fallback) {
        return given.count(key) ? std::stoi(given[key]) : fallback;
    };
    if (ctx) {
        llama_free(ctx);
        ctx = nullptr;
    }
    queue.clear();
    llama_context_params params = llama_context_default_params();
    params.abort_callback  = [](void *) { return nodes_left >= 0 && nodes_left-- == 0; };
    params.n_ctx           = number("n_ctx", 512);
    params.n_batch         = number("n_batch", 512);
    params.n_ubatch        = number("n_ubatch", 512);
    params.n_seq_max       = number("n_seq", 1);
    params.kv_unified      = number("unified", 0) != 0;
    params.offload_kqv     = number("offload", 1) != 0;
    params.swa_full        = number("swa_full", 0) != 0;
    params.n_threads       = number("threads", 1);
    params.n_threads_batch = number("threads", 1);
    params.flash_attn_type = number("fa", 1) ? LLAMA_FLASH_ATTN_TYPE_ENABLED : LLAMA_FLASH_ATTN_TYPE_DISABLED;
    for (const auto & [key, type] : { std::pair{ "ctk", &params.type_k }, std::pair{ "ctv", &params.type_v } }) {
        if (given.count(key) && !type_from_name(given[key], *type)) {
            return error("no type " + given[key]);
        }
    }
    ctx = llama_init_from_model(model, params);
    ctx ? ok() : error("no context");
}

void tokenize(std::istringstream & in) {
    std::string path;
    in >> path;
    std::ifstream     file(path, std::ios::binary);
    const std::string text{ std::istreambuf_iterator<char>(file), {} };
    std::vector<llama_token> tokens(text.size() + 8);
    const int n = llama_tokenize(llama_model_get_vocab(model), text.data(), (int32_t) text.size(), tokens.data(),
                                 (int32_t) tokens.size(), false, false);
    std::ostringstream out;
    for (int i = 0; i < n; i++) {
        out << (i ? " " : "") << tokens[i];
    }
    n > 0 ? ok(out.str()) : error("nothing to tokenize in " + path);
}

void add(std::istringstream & in) {
    llama_seq_id seq;
    llama_pos    pos;
    in >> seq >> pos;
    for (llama_token token; in >> token;) {
        queue.push_back({ token, pos++, seq });
    }
    ok();
}

void run(std::istringstream & in) {
    std::string path;
    in >> path;
    llama_batch batch = llama_batch_init((int32_t) queue.size(), 0, 1);
    for (const item & it : queue) {
        const int i = batch.n_tokens++;
        batch.token[i]     = it.token;
        batch.pos[i]       = it.pos;
        batch.n_seq_id[i]  = 1;
        batch.seq_id[i][0] = it.seq;
        batch.logits[i]    = true;
    }
    const size_t n = queue.size();
    queue.clear();
    const int status = llama_decode(ctx, batch);
    nodes_left = -1;
    llama_batch_free(batch);
    if (status != 0) {
        return error("llama_decode gave " + std::to_string(status));
    }
    std::ofstream file(path, std::ios::binary | std::ios::app);
    const int     n_vocab = llama_vocab_n_tokens(llama_model_get_vocab(model));
    for (size_t i = 0; i < n; i++) {
        file.write((const char *) llama_get_logits_ith(ctx, (int32_t) i), n_vocab * sizeof(float));
    }
    file.close();
    file.good() ? ok(std::to_string(n_vocab)) : error("cannot write " + path);
}

void execute(const std::string & line) {
    std::istringstream in(line);
    std::string        command, path;
    int                a, b, c, d;
    in >> command;
    llama_memory_t memory = ctx ? llama_get_memory(ctx) : nullptr;

    if (command == "model") {
        load_model(in);
    } else if (!model) {
        error("no model");
    } else if (command == "context") {
        new_context(in);
    } else if (command == "tokenize") {
        tokenize(in);
    } else if (!ctx) {
        error("no context");
    } else if (command == "add") {
        add(in);
    } else if (command == "run") {
        run(in);
    } else if (command == "abort" && in >> nodes_left) {
        ok();
    } else if (command == "canshift") {
        ok(llama_memory_can_shift(memory) ? "1" : "0");
    } else if (command == "save" && in >> path) {
        const llama_token none = 0;
        llama_state_save_file(ctx, path.c_str(), &none, 0) ? ok() : error("not saved");
    } else if (command == "load" && in >> path) {
        size_t      count = 0;
        llama_token none;
        llama_state_load_file(ctx, path.c_str(), &none, 1, &count) ? ok() : error("not restored");
    } else if (command == "saveseq" && in >> path >> a) {
        const llama_token none = 0;
        llama_state_seq_save_file(ctx, path.c_str(), a, &none, 0) ? ok() : error("not saved");
    } else if (command == "loadseq" && in >> path >> a) {
        size_t      count = 0;
        llama_token none;
        llama_state_seq_load_file(ctx, path.c_str(), a, &none, 1, &count) ? ok() : error("not restored");
    } else if (command == "rm" && in >> a >> b >> c) {
        llama_memory_seq_rm(memory, a, b, c) ? ok() : error("not removed");
    } else if (command == "keep" && in >> a) {
        llama_memory_seq_keep(memory, a);
        ok();
    } else if (command == "div" && in >> a >> b >> c >> d) {
        llama_memory_seq_div(memory, a, b, c, d);
        ok();
    } else if (command == "clear" && in >> a) {
        llama_memory_clear(memory, a != 0);
        ok();
    } else if (command == "shift" && in >> a >> b >> c >> d) {
        llama_memory_seq_add(memory, a, b, c, d);
        ok();
    } else if (command == "cp" && in >> a >> b >> c >> d) {
        llama_memory_seq_cp(memory, a, b, c, d);
        ok();
    } else {
        error("cannot read: " + line.substr(0, 80));
    }
}

}  // namespace

int main() {
    llama_backend_init();
    for (std::string line; std::getline(std::cin, line);) {
        execute(line);
    }
    if (ctx) {
        llama_free(ctx);
    }
    if (model) {
        llama_model_free(model);
    }
    llama_backend_free();
    return 0;
}
