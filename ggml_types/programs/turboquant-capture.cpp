// The program turboquant-capture: prints the queries, keys and values of a model on a text, as attention reads them (after
// RoPE, biases and norms), and how each is computed from the model's weights. `turboquant convert` and `turboquant
// dump-kv` read its output.
//
//   turboquant-capture MODEL TEXT TOKENS CONTEXT THREADS GPU_LAYERS
//
// The first TOKENS tokens of the file TEXT are evaluated in pieces of CONTEXT tokens, each with an empty cache of f16. If
// the model has a token for the beginning of a text, it replaces the first token of each piece, as in llama-perplexity.
// stdout is a stream of records. A record is a line of JSON; if it has "bytes", that many bytes of float32 follow.
//
//   {"record":"model", "tokens":n, "available":n, "context":n}     once, first; `available` tokens are in the text
//   {"record":"attention", "use":u, "layer":l, "scale":x, "head_k":n, "head_v":n, "heads":n, "kv_heads":n}   } with the
//   {"record":"path", "role":"k", "use":u, "layer":l, "steps":[...]}                                         } first
//   {"record":"data", "role":"q", "use":u, "layer":l, "first":t, "ne":[head,heads,tokens], "bytes":n}
//   {"record":"end"}                                                once, last
//
// "layer" is the layer whose cache holds K and V ("cache_k_l<layer>" of llama.cpp). Layers may share a cache, so "use"
// counts the attentions of a piece. Roles q and o have both numbers, k and v only the layer. "scale" is the factor of q·k
// in attention. Role o is the path from the output of an attention to a matrix that multiplies it.
//
// A step has "op", "ne" and "nb" of a tensor, and "sne" and "snb" of its source, in ggml's order (fastest dimension first,
// strides in bytes). The first step is the tensor whose values "data" contains. A path goes against the flow of the data,
// from this tensor to the weight (role o: to the attention). Views have "offset", relative to the viewed tensor; RoPE has
// "dims" and "mode"; an operation with a weight has the weight's name and shape, "weight" and "wne". A path ends with a
// matrix multiplication, or with the first operation that this program cannot follow.

#include "programs/turbo-record.h"

#include "ggml-backend.h"
#include "ggml.h"
#include "llama.h"

#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <fstream>
#include <map>
#include <string>
#include <vector>

namespace {

// ---- JSON --------------------------------------------------------------------------------------------------------------

template <typename T> std::string list(const T (&values)[GGML_MAX_DIMS]) {
    std::string out;
    for (const T value : values) {
        out += (out.empty() ? "[" : ",") + std::to_string(value);
    }
    return out + "]";
}

// ---- paths -------------------------------------------------------------------------------------------------------------

bool is_layout(ggml_op op) {
    return op == GGML_OP_VIEW || op == GGML_OP_RESHAPE || op == GGML_OP_PERMUTE || op == GGML_OP_TRANSPOSE;
}

bool is_copy(ggml_op op) {
    return op == GGML_OP_CONT || op == GGML_OP_CPY || op == GGML_OP_DUP;
}

bool is_weight(const ggml_tensor * t) {
    return t && t->op == GGML_OP_NONE && !(t->flags & GGML_TENSOR_FLAG_INPUT);
}

const ggml_tensor * other(const ggml_tensor * t, const ggml_tensor * main) {
    return t->src[0] == main ? t->src[1] : t->src[0];
}

std::string step(const ggml_tensor * t, const ggml_tensor * from) {
    std::string out = "{\"op\":" + quoted(ggml_op_name(t->op)) + ",\"ne\":" + list(t->ne) + ",\"nb\":" + list(t->nb);
    if (from) {
        out += ",\"sne\":" + list(from->ne) + ",\"snb\":" + list(from->nb);
    }
    if (is_layout(t->op)) {
        const size_t base = from->view_src ? from->view_offs : 0;  // both offsets are relative to the same tensor
        out += ",\"offset\":" + std::to_string((int64_t) (t->view_offs - base));
    } else if (t->op == GGML_OP_ROPE) {
        const int32_t * params = (const int32_t *) t->op_params;
        out += ",\"dims\":" + std::to_string(params[1]) + ",\"mode\":" + std::to_string(params[2]);
    } else if (t->op == GGML_OP_MUL_MAT) {
        out += ",\"weight\":" + quoted(t->src[0]->name) + ",\"wne\":" + list(t->src[0]->ne);
    } else if (t->op == GGML_OP_ADD || t->op == GGML_OP_MUL) {
        const ggml_tensor * weight = other(t, from);
        if (is_weight(weight)) {
            out += ",\"weight\":" + quoted(weight->name) + ",\"wne\":" + list(weight->ne);
        }
    }
    return out + "}";
}

// The path from `t` back to the weight that it is a product with, or to an operation that cannot be followed.
std::string path_to_weight(const ggml_tensor * t) {
    std::string out;
    for (bool end = false; t && !end;) {
        const ggml_tensor * from = nullptr;
        switch (t->op) {
            case GGML_OP_ROPE: case GGML_OP_SCALE: case GGML_OP_NORM: case GGML_OP_RMS_NORM: case GGML_OP_L2_NORM:
                from = t->src[0];
                break;
            case GGML_OP_ADD: case GGML_OP_MUL:
                from = is_weight(t->src[0]) ? t->src[1] : t->src[0];
                end  = !is_weight(other(t, from));
                break;
            case GGML_OP_MUL_MAT:
                end = true;
                break;
            default:
                if (is_layout(t->op) || is_copy(t->op)) {
                    from = t->src[0];
                } else {
                    end = true;
                }
        }
        out += (out.empty() ? "[" : ",") + step(t, from);
        t = from;
    }
    return out + "]";
}

// The path from the input of a matrix multiplication back to the attention that computes it; "" if there is none.
std::string path_to_attention(const ggml_tensor * product, const ggml_tensor ** attention) {
    std::string out = "[" + step(product, product->src[1]);
    for (const ggml_tensor * t = product->src[1]; t; t = t->src[0]) {
        if (t->op == GGML_OP_FLASH_ATTN_EXT) {
            *attention = t;
            return out + "]";
        }
        if (!is_layout(t->op) && !is_copy(t->op) && t->op != GGML_OP_MUL) {
            break;
        }
        out += "," + step(t, t->src[0]);
    }
    return "";
}

// ---- capture -----------------------------------------------------------------------------------------------------------

struct capture {
    bool    with_paths = true;
    int64_t first      = 0;  // first token of the current batch in the text
    int     uses       = 0;  // number of attentions in the batch so far
    std::map<const ggml_tensor *, int> use_of;
    std::vector<uint8_t> raw;
    std::vector<float>   values;
};

// The layer in "cache_k_l12"; -1 for any other name.
int cache_layer(const ggml_tensor * t, char role) {
    const char prefix[] = {'c', 'a', 'c', 'h', 'e', '_', role, '_', 'l', 0};
    const ggml_tensor * root = t->view_src ? t->view_src : t;
    return std::strncmp(root->name, prefix, 9) == 0 ? std::atoi(root->name + 9) : -1;
}

void emit_attention(int use, int layer, const ggml_tensor * t) {
    float scale;
    std::memcpy(&scale, t->op_params, sizeof(scale));
    emit("{\"record\":\"attention\",\"use\":" + std::to_string(use) + ",\"layer\":" + std::to_string(layer) +
         ",\"scale\":" + std::to_string(scale) + ",\"head_k\":" + std::to_string(t->src[0]->ne[0]) + ",\"head_v\":" +
         std::to_string(t->src[2]->ne[0]) + ",\"heads\":" + std::to_string(t->src[0]->ne[2]) + ",\"kv_heads\":" +
         std::to_string(t->src[1]->ne[2]) + "}");
}

void emit_path(const char * role, int use, int layer, const std::string & steps) {
    emit("{\"record\":\"path\",\"role\":\"" + std::string(role) + "\",\"use\":" + std::to_string(use) + ",\"layer\":" +
         std::to_string(layer) + ",\"steps\":" + steps + "}");
}

// Writes the tensor with its dimensions in the order head, heads, tokens; `order` has their positions in the tensor.
bool emit_data(capture & c, const char * role, int use, int layer, const ggml_tensor * t, const int (&order)[3]) {
    const ggml_type_traits * traits = ggml_get_type_traits(t->type);
    if ((t->type != GGML_TYPE_F32 && t->type != GGML_TYPE_F16) || t->ne[3] != 1) {
        std::fprintf(stderr, "turboquant-capture: %s of layer %d is %s of %d streams, not one of f32\n", role, layer,
                     traits->type_name, (int) t->ne[3]);
        return false;
    }
    c.raw.resize(ggml_nbytes(t));
    ggml_backend_tensor_get(t, c.raw.data(), 0, c.raw.size());
    const int64_t n[3] = {t->ne[order[0]], t->ne[order[1]], t->ne[order[2]]};
    const size_t  s[3] = {t->nb[order[0]], t->nb[order[1]], t->nb[order[2]]};
    c.values.resize(n[0] * n[1] * n[2]);
    float * out = c.values.data();
    for (int64_t token = 0; token < n[2]; token++) {
        for (int64_t head = 0; head < n[1]; head++) {
            for (int64_t i = 0; i < n[0]; i++) {
                const uint8_t * at = c.raw.data() + token * s[2] + head * s[1] + i * s[0];
                if (t->type == GGML_TYPE_F32) {
                    std::memcpy(out++, at, sizeof(float));
                } else {
                    *out++ = ggml_fp16_to_fp32(*(const ggml_fp16_t *) at);
                }
            }
        }
    }
    emit("{\"record\":\"data\",\"role\":\"" + std::string(role) + "\",\"use\":" + std::to_string(use) + ",\"layer\":" +
         std::to_string(layer) + ",\"first\":" + std::to_string(c.first) + ",\"ne\":[" + std::to_string(n[0]) + "," +
         std::to_string(n[1]) + "," + std::to_string(n[2]) + "],\"bytes\":" +
         std::to_string(c.values.size() * sizeof(float)) + "}");
    return std::fwrite(c.values.data(), sizeof(float), c.values.size(), stdout) == c.values.size();
}

// llama.cpp calls this function for every operation: first to ask whether the result is needed (`ask`), then with the
// result.
bool on_node(ggml_tensor * t, bool ask, void * user) {
    capture & c = *(capture *) user;
    if (t->op == GGML_OP_FLASH_ATTN_EXT) {
        const int layer = cache_layer(t->src[1], 'k');
        if (ask) {
            const int use = c.use_of[t] = c.uses++;
            if (c.with_paths) {
                emit_attention(use, layer, t);
                emit_path("q", use, layer, path_to_weight(t->src[0]));
            }
            return true;
        }
        return emit_data(c, "q", c.use_of[t], layer, t->src[0], {0, 2, 1});  // {head, tokens, heads}
    }
    if (t->op == GGML_OP_SET_ROWS) {
        const bool is_k  = cache_layer(t, 'k') >= 0;
        const int  layer = is_k ? cache_layer(t, 'k') : cache_layer(t, 'v');
        if (layer < 0) {
            return !ask;
        }
        if (ask) {
            if (c.with_paths) {
                emit_path(is_k ? "k" : "v", -1, layer, path_to_weight(t->src[0]));
            }
            return true;
        }
        return emit_data(c, is_k ? "k" : "v", -1, layer, t->src[0], {0, 2, 1});  // {heads * head, tokens, 1}
    }
    if (ask && c.with_paths && t->op == GGML_OP_MUL_MAT && is_weight(t->src[0])) {
        const ggml_tensor * attention = nullptr;
        const std::string   steps     = path_to_attention(t, &attention);
        if (attention) {
            emit_path("o", c.use_of[attention], cache_layer(attention->src[1], 'k'), steps);
        }
    }
    return !ask;
}

int fail(const std::string & why) {
    std::fprintf(stderr, "turboquant-capture: %s\n", why.c_str());
    return 1;
}

}  // namespace

int main(int argc, char ** argv) {
    if (argc != 7) {
        return fail("usage: turboquant-capture MODEL TEXT TOKENS CONTEXT THREADS GPU_LAYERS > STREAM");
    }
    const int wanted = std::atoi(argv[3]), n_ctx = std::atoi(argv[4]), threads = std::atoi(argv[5]);
    if (wanted < 1 || n_ctx < 1 || threads < 1) {
        return fail("TOKENS, CONTEXT and THREADS must be positive");
    }

    ggml_backend_load_all();
    llama_model_params model_params = llama_model_default_params();
    model_params.n_gpu_layers       = std::atoi(argv[6]);
    llama_model * model             = llama_model_load_from_file(argv[1], model_params);
    if (!model) {
        return fail(std::string("cannot load ") + argv[1]);
    }

    std::ifstream file(argv[2], std::ios::binary);
    std::string   text((size_t) 64 * wanted, '\0');  // more bytes per token on average are no text
    file.read(&text[0], (std::streamsize) text.size());
    text.resize((size_t) file.gcount());
    while (file && !text.empty() && ((unsigned char) text.back() & 0xC0) == 0x80) {
        text.pop_back();  // the text was cut within a character
    }
    if (file && !text.empty() && (unsigned char) text.back() >= 0xC0) {
        text.pop_back();
    }
    const llama_vocab *      vocab = llama_model_get_vocab(model);
    std::vector<llama_token> tokens(text.size() + 8);
    const int found = llama_tokenize(vocab, text.data(), (int32_t) text.size(), tokens.data(), (int32_t) tokens.size(),
                                     true, false);
    if (found < 1) {
        return fail(std::string(argv[2]) + " has no text in it");
    }
    tokens.resize(found < wanted ? found : wanted);
    emit("{\"record\":\"model\",\"tokens\":" + std::to_string(tokens.size()) + ",\"available\":" +
         std::to_string(found) + ",\"context\":" + std::to_string(n_ctx) + "}");

    capture              state;
    llama_context_params params = llama_context_default_params();
    params.n_ctx                = (uint32_t) n_ctx;
    params.n_batch = params.n_ubatch = (uint32_t) (n_ctx < 512 ? n_ctx : 512);
    params.n_seq_max = 1;
    params.n_threads = params.n_threads_batch = threads;
    params.type_k = params.type_v = GGML_TYPE_F16;
    params.flash_attn_type        = LLAMA_FLASH_ATTN_TYPE_ENABLED;
    params.offload_kqv            = model_params.n_gpu_layers != 0;
    params.op_offload             = model_params.n_gpu_layers != 0;
    params.no_perf                = true;
    params.cb_eval                = on_node;
    params.cb_eval_user_data      = &state;
    llama_context * ctx           = llama_init_from_model(model, params);
    if (!ctx) {
        return fail("llama.cpp could not make a context for this model");
    }

    const bool  with_bos = llama_vocab_get_add_bos(vocab);
    llama_batch batch    = llama_batch_init((int32_t) params.n_batch, 0, 1);
    for (size_t start = 0; start < tokens.size(); start += batch.n_tokens) {
        const size_t in_piece = start % n_ctx;
        if (in_piece == 0) {
            llama_memory_clear(llama_get_memory(ctx), true);
        }
        size_t count = params.n_batch;
        count        = count < n_ctx - in_piece ? count : n_ctx - in_piece;
        count        = count < tokens.size() - start ? count : tokens.size() - start;
        batch.n_tokens = (int32_t) count;
        for (size_t i = 0; i < count; i++) {
            batch.token[i]     = with_bos && in_piece + i == 0 ? llama_vocab_bos(vocab) : tokens[start + i];
            batch.pos[i]       = (llama_pos) (in_piece + i);
            batch.n_seq_id[i]  = 1;
            batch.seq_id[i][0] = 0;
            batch.logits[i]    = i + 1 == count;
        }
        state.first = (int64_t) start;
        state.uses  = 0;
        state.use_of.clear();
        if (llama_decode(ctx, batch) != 0) {
            return fail("llama.cpp could not evaluate the text");
        }
        state.with_paths = false;
        if (std::ferror(stdout)) {
            return 1;  // the reader of the stream has ended
        }
    }
    emit("{\"record\":\"end\"}");
    llama_batch_free(batch);
    llama_free(ctx);
    llama_model_free(model);
    return std::fflush(stdout) == 0 ? 0 : 1;
}
