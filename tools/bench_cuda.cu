// Speed of the CUDA kernels alone, as JSON lines, beside the card's measured copy bandwidth. tools/bench_cuda.py
// compiles and runs this; arguments: K:V pairs, then depths, comma-separated;
// [heads,kv_heads,head,tokens,window,requests], where window is the number of q8_0 slots of an exact window; with it,
// storing K and V is measured, too. A negative window measures attention alone. The tokens are the last rows of the
// cache; of several requests, whose tokens take turns, each sees an equal run of the rows before.
//
// Each figure is the median of several replays of a CUDA graph that holds one launch per layer of a cache larger than
// the card's L2 cache, as a model's layers are.
#include "turboquant_cuda.h"

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <sstream>
#include <string>
#include <vector>

using namespace turboquant::cuda;

namespace {

void must(cudaError_t error, const char * what) {
    if (error == cudaSuccess) return;
    std::fprintf(stderr, "bench_cuda: %s: %s\n", what, cudaGetErrorString(error));
    std::exit(EXIT_FAILURE);
}

std::vector<std::string> split(const std::string & text, char at) {
    std::vector<std::string> parts;
    std::stringstream in(text);
    for (std::string part; std::getline(in, part, at);) parts.push_back(part);
    return parts;
}

struct Type {
    const char * name;
    KV kv;
    tq_type encoded; // TQ_TYPE_COUNT: not a turbo type
    int block, bytes; // at heads of 128
    bool trellis;
};
const Type types[] = {
#define TURBOQUANT_BENCH(X, ID, name, family, bits, id) \
    {#name, KV::name, TQ_##ID, 128, TURBOQUANT_BLOCK_BYTES(bits, 128), std::strstr(#name, "_tcq") != nullptr},
    TURBOQUANT_FAMILIES(TURBOQUANT_BENCH, )
#undef TURBOQUANT_BENCH
    {"q8_0", KV::q8_0, TQ_TYPE_COUNT, 32, 34, false},
    {"f16", KV::f16, TQ_TYPE_COUNT, 1, 2, false}};
const Type & type_of(const std::string & name) {
    for (const Type & type : types)
        if (name == type.name) return type;
    std::fprintf(stderr, "bench_cuda: unknown type %s\n", name.c_str());
    std::exit(EXIT_FAILURE);
}

// Random index bytes; scales near one.
__global__ void fill(uint16_t * data, size_t words, int block_words, bool trellis) {
    for (size_t i = blockIdx.x * size_t(blockDim.x) + threadIdx.x; i < words; i += size_t(gridDim.x) * blockDim.x) {
        uint64_t z = i * 0x9e3779b97f4a7c15u + 12345;
        z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9u;
        z ^= z >> 27;
        data[i] = block_words == 1  ? uint16_t(0x3400 + (z & 0x87ff))
                  : i % block_words ? uint16_t(z)
                  : trellis         ? uint16_t((z & 0xfc1f) | 0x1c0) // ten bits of scale, six of the path
                                    : uint16_t(0x3800 + (z & 0x3ff));
    }
}

// Values between -1.73 and 1.73.
float * random_floats(size_t count) {
    std::vector<float> host(count);
    uint32_t state = 1;
    for (float & x : host) x = (float(state = state * 1664525 + 1013904223) / 4294967296.0f - 0.5f) * 3.46f;
    float * data;
    must(cudaMalloc(&data, count * 4), "cudaMalloc");
    must(cudaMemcpy(data, host.data(), count * 4, cudaMemcpyHostToDevice), "copy");
    return data;
}

// binary16 [tokens][depth]
void * mask_of(int64_t depth, int tokens, int requests) {
    std::vector<uint16_t> host(size_t(depth * tokens));
    for (int64_t t = 0; t < tokens; ++t)
        for (int64_t row = 0; row < depth; ++row) {
            const int64_t own = row - (depth - tokens), run = depth / requests;
            const bool shown = own >= 0 ? own <= t && own % requests == t % requests
                                       : requests == 1 || row / run == t % requests;
            host[size_t(t * depth + row)] = shown ? 0 : 0xfc00;
        }
    void * data;
    must(cudaMalloc(&data, host.size() * 2), "cudaMalloc");
    must(cudaMemcpy(data, host.data(), host.size() * 2, cudaMemcpyHostToDevice), "copy");
    return data;
}

void * random_cache(const Type & type, size_t bytes) {
    void * data;
    must(cudaMalloc(&data, bytes), "cudaMalloc");
    fill<<<4096, 256>>>(static_cast<uint16_t *>(data), bytes / 2, type.bytes / 2, type.trellis);
    must(cudaDeviceSynchronize(), "fill");
    return data;
}

// Microseconds of one launch: the median over replays of a graph of `launches`.
double microseconds(int launches, const std::function<void(int, cudaStream_t)> & launch) {
    cudaStream_t stream;
    must(cudaStreamCreate(&stream), "stream");
    launch(0, stream);
    must(cudaStreamSynchronize(stream), "first launch");
    cudaGraph_t graph;
    cudaGraphExec_t exec;
    must(cudaStreamBeginCapture(stream, cudaStreamCaptureModeThreadLocal), "capture");
    for (int i = 0; i < launches; ++i) launch(i, stream);
    must(cudaStreamEndCapture(stream, &graph), "capture");
    must(cudaGraphInstantiate(&exec, graph, 0), "graph");
    cudaEvent_t start, end;
    must(cudaEventCreate(&start), "event");
    must(cudaEventCreate(&end), "event");
    std::vector<float> times;
    for (int i = 0; i < 25; ++i) {
        must(cudaEventRecord(start, stream), "event");
        must(cudaGraphLaunch(exec, stream), "graph");
        must(cudaEventRecord(end, stream), "event");
        must(cudaEventSynchronize(end), "graph");
        float ms;
        must(cudaEventElapsedTime(&ms, start, end), "event");
        if (i >= 5) times.push_back(ms);
    }
    cudaGraphExecDestroy(exec);
    cudaGraphDestroy(graph);
    cudaEventDestroy(start);
    cudaEventDestroy(end);
    cudaStreamDestroy(stream);
    std::nth_element(times.begin(), times.begin() + times.size() / 2, times.end());
    return times[times.size() / 2] * 1e3 / launches;
}

} // namespace

int main(int argc, char ** argv) {
    if (argc < 3) {
        std::fprintf(stderr, "usage: bench_cuda K:V,... DEPTH,... [HEADS,KV_HEADS,HEAD,TOKENS[,WINDOW[,REQUESTS]]]\n");
        return EXIT_FAILURE;
    }
    int shape[6] = {32, 8, 128, 1, -1, 1}; // no stores
    if (argc > 3) {
        const std::vector<std::string> parts = split(argv[3], ',');
        for (size_t i = 0; i < 6 && i < parts.size(); ++i) shape[i] = std::atoi(parts[i].c_str());
    }
    const int heads = shape[0], kv_heads = shape[1], head = shape[2], tokens = shape[3], window = shape[4],
              requests = shape[5];
    cudaDeviceProp device;
    int driver = 0, runtime = 0;
    must(cudaGetDeviceProperties(&device, 0), "no CUDA device");
    must(cudaDriverGetVersion(&driver), "driver");
    must(cudaRuntimeGetVersion(&runtime), "runtime");

    const size_t copy_bytes = size_t(2) << 30;
    void *from, *to;
    must(cudaMalloc(&from, copy_bytes), "cudaMalloc");
    must(cudaMalloc(&to, copy_bytes), "cudaMalloc");
    fill<<<4096, 256>>>(static_cast<uint16_t *>(from), copy_bytes / 2, 1, false);
    const double copy = microseconds(
        4, [&](int, cudaStream_t s) { cudaMemcpyAsync(to, from, copy_bytes, cudaMemcpyDeviceToDevice, s); });
    const double copy_tb = 2.0 * double(copy_bytes) / copy * 1e-6;
    must(cudaFree(from), "free");
    must(cudaFree(to), "free");
    std::printf(
        "{\"device\": \"%s\", \"multiprocessors\": %d, \"l2_bytes\": %d, \"cuda\": \"%d.%d\", \"copy_tb_s\": %.3f}\n",
        device.name, device.multiProcessorCount, device.l2CacheSize, runtime / 1000, runtime % 1000 / 10, copy_tb);

    const size_t row_floats = size_t(heads) * tokens * head;
    float *q = random_floats(row_floats), *dst;
    must(cudaMalloc(&dst, row_floats * 4), "cudaMalloc");

    // An exact window: slots of each layer, the batch's rows, and where they are stored.
    ExactRows exact = {};
    const int64_t slot_head = head / 32 * 34, slot_row = slot_head * kv_heads, slot_bytes = slot_row * (window + 1);
    const int64_t width = int64_t(kv_heads) * head;
    const Index none = {nullptr, false, {1, 1, 1}, {0, 0, 0}};
    void * batch = random_floats(size_t(tokens) * size_t(width));
    if (window > 0) {
        void *rows, *shown;
        must(cudaMalloc(&rows, size_t(tokens) * 8), "cudaMalloc");
        must(cudaMalloc(&shown, size_t(window + tokens) * size_t(tokens) * 2), "cudaMalloc");
        must(cudaMemset(rows, 0, size_t(tokens) * 8), "memset");
        must(cudaMemset(shown, 0, size_t(window + tokens) * size_t(tokens) * 2), "memset");
        exact.type = KV::q8_0;
        exact.slots = window;
        exact.k_head = exact.v_head = slot_head;
        exact.k_row = exact.v_row = slot_row;
        exact.batch_k = exact.batch_v = static_cast<const float *>(batch);
        exact.batch_k_head = exact.batch_v_head = head * 4;
        exact.batch_k_row = exact.batch_v_row = head * 4 * kv_heads;
        exact.mask = shown;
        exact.mask_token = (window + tokens) * 2;
        exact.mask_heads = exact.mask_streams = 1;
        exact.store_rows = static_cast<const int64_t *>(rows);
    }

    for (const std::string & depth_text : split(argv[2], ',')) {
        const int64_t depth = std::atoll(depth_text.c_str());
        void * mask = mask_of(depth, tokens, requests);
        for (const std::string & pair : split(argv[1], ',')) {
            const std::vector<std::string> names = split(pair, ':');
            const Type &tk = type_of(names[0]), &tv = type_of(names.back());
            const int64_t row_k = int64_t(kv_heads) * head / tk.block * tk.bytes,
                          row_v = int64_t(kv_heads) * head / tv.block * tv.bytes;
            const size_t bytes = size_t(depth) * size_t(row_k + row_v);
            const int layers =
                int(std::min<size_t>(64, (size_t(3) * size_t(device.l2CacheSize) + bytes - 1) / bytes + 1));
            std::vector<void *> k, v, slots_k, slots_v;
            for (int i = 0; i < layers; ++i) {
                k.push_back(random_cache(tk, size_t(depth) * size_t(row_k)));
                v.push_back(random_cache(tv, size_t(depth) * size_t(row_v)));
                slots_k.push_back(random_cache(type_of("q8_0"), size_t(slot_bytes)));
                slots_v.push_back(random_cache(type_of("q8_0"), size_t(slot_bytes)));
            }
            Attention a = {};
            a.type_k = tk.kv;
            a.type_v = tv.kv;
            a.head = head;
            a.heads = heads;
            a.kv_heads = kv_heads;
            a.tokens = tokens;
            a.streams = a.kv_streams = a.mask_heads = a.mask_streams = 1;
            a.n_kv = depth;
            a.q = q;
            a.q_head = head * 4;
            a.q_token = a.q_head * heads;
            a.k_row = row_k;
            a.k_head = row_k / kv_heads;
            a.v_row = row_v;
            a.v_head = row_v / kv_heads;
            a.mask = mask;
            a.mask_token = depth * 2;
            a.scale = 1.0f / 11.3f;
            a.sparse_v = 1e-6f;
            a.dst = dst;
            a.windowed = window > 0;
            a.requests = requests;
            const auto take_layer = [&](Attention & layer, int i) {
                layer.k = k[size_t(i)];
                layer.v = v[size_t(i)];
                layer.exact = exact;
                layer.exact.k = layer.exact.store_k = slots_k[size_t(i)];
                layer.exact.v = layer.exact.store_v = slots_v[size_t(i)];
            };
            take_layer(a, 0);
            AttentionPlan plan;
            if (!plan_attention(a, plan)) {
                std::fprintf(stderr, "bench_cuda: %s with heads of %d is not covered\n", pair.c_str(), head);
                return EXIT_FAILURE;
            }
            void * workspace;
            must(cudaMalloc(&workspace, plan.workspace_bytes), "cudaMalloc");
            const double us = microseconds(layers, [&](int i, cudaStream_t s) {
                Attention layer = a;
                take_layer(layer, i);
                AttentionPlan layer_plan;
                // Into the first row of the cache, whose blocks are of one length.
                const bool store = window >= 0 && tk.block == 128 && tv.block == 128 && head >= 128;
                const auto store_to = [&](const Type & type, void * to, int64_t row) {
                    return Store{type.encoded, {batch, {width * 4, 0, 0}}, {to, {row, 0, 0}}, {width, tokens, 1, 1},
                                 none};
                };
                const Store stores[2] = {store_to(tk, k[size_t(i)], row_k), store_to(tv, v[size_t(i)], row_v)};
                const bool beside = store && window > 0;
                if (store && !beside) must(encode_rows(stores[0], stores[1], s), "encode_rows");
                must(plan_attention(layer, layer_plan)
                         ? attention(layer, layer_plan, workspace, s, beside ? stores : nullptr)
                         : cudaErrorNotSupported,
                     "attention");
            });
            std::printf("{\"pair\": \"%s\", \"depth\": %lld, \"layer_us\": %.2f, \"cache_bytes\": %zu, \"tb_s\": %.3f, "
                        "\"share\": %.3f, \"tflops\": %.1f}\n",
                        pair.c_str(), static_cast<long long>(depth), us, bytes, double(bytes) / us * 1e-6,
                        double(bytes) / us * 1e-6 / copy_tb,
                        4.0 * heads * head * double(depth) * tokens / us * 1e-6);
            std::fflush(stdout);
            must(cudaFree(workspace), "free");
            for (void * p : k) cudaFree(p);
            for (void * p : v) cudaFree(p);
            for (void * p : slots_k) cudaFree(p);
            for (void * p : slots_v) cudaFree(p);
        }
        must(cudaFree(mask), "free");
    }

    // Storing keys and values of tokens, and decoding a whole cache for a prefill.
    for (const Type & type : types) {
        if (type.encoded == TQ_TYPE_COUNT) continue;
        const int64_t rows = 131072, values_in = 1024, row = values_in / type.block * type.bytes, most_tokens = 8192;
        float * values = random_floats(size_t(most_tokens * values_in));
        void * encoded = random_cache(type, size_t(rows * row));
        void * decoded;
        must(cudaMalloc(&decoded, size_t(rows * values_in * 2)), "cudaMalloc");
        for (const int64_t tokens_in : {int64_t(1), int64_t(512), most_tokens}) {
            const Store store = {type.encoded, {values, {values_in * 4, 0, 0}}, {encoded, {row, 0, 0}},
                                 {values_in, tokens_in, 1, 1}, none};
            Store second = store; // V, to other rows
            second.dst.data = static_cast<char *>(encoded) + most_tokens * row;
            const double us =
                microseconds(16, [&](int, cudaStream_t s) { must(encode_rows(store, second, s), "encode_rows"); });
            const double floats = 2.0 * double(tokens_in * values_in);
            std::printf("{\"encode\": \"%s\", \"tokens\": %lld, \"us\": %.2f, \"gb_s\": %.1f, \"million_blocks_s\": %.1f}\n",
                        type.name, static_cast<long long>(tokens_in), us, floats * 4 / us * 1e-3,
                        floats / type.block / us);
        }
        const int64_t ne[4] = {values_in, rows, 1, 1};
        for (const bool rotated : {false, true}) {
            const double us = microseconds(4, [&](int, cudaStream_t s) {
                must(decode_rows(type.encoded, {encoded, {row, 0, 0}}, {decoded, {values_in * 2, 0, 0}}, ne, none, true,
                                 rotated, s),
                     "decode_rows");
            });
            const double moved = double(rows * (row + values_in * 2));
            std::printf("{\"decode\": \"%s\", \"rotated\": %s, \"rows\": %lld, \"us\": %.2f, \"share\": %.3f}\n",
                        type.name, rotated ? "true" : "false", static_cast<long long>(rows), us,
                        moved / us * 1e-6 / copy_tb);
        }
        cudaFree(values);
        cudaFree(encoded);
        cudaFree(decoded);
    }
    return EXIT_SUCCESS;
}
