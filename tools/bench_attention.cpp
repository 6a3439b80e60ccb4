// Times one layer's attention as llama.cpp runs it: the FLASH_ATTN_EXT node over a KV cache, for pairs of cache types.
// Also measures the two limits of the machine: memory bandwidth and multiply-adds per second. bench_attention.py
// compiles this file against a built llama.cpp, and makes the table and the plot.
//
//   bench_attention HEADS KV_HEADS HEAD SPREAD SECONDS THREADS,... DEPTHS,... QUERIES,... K:V ...
//
// Prints one JSON object per line.
#include "ggml-backend.h"
#include "ggml-cpu.h"
#include "ggml.h"

#include <algorithm>
#include <chrono>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <random>
#include <sstream>
#include <string>
#include <thread>
#include <vector>
#if defined(__AVX2__)
#include <immintrin.h>
#elif defined(__ARM_NEON)
#include <arm_neon.h>
#endif

namespace {

using Clock = std::chrono::steady_clock;
double since(Clock::time_point start) { return std::chrono::duration<double>(Clock::now() - start).count(); }

[[noreturn]] void fail(const std::string & what) {
    std::fprintf(stderr, "bench_attention: %s\n", what.c_str());
    std::exit(1);
}

// ---- limits --------------------------------------------------------------------------------------------------------

// Work per second of all threads together.
template <typename F> double in_parallel(int threads, F work) {
    double best = 0;
    for (int round = 0; round < 3; ++round) {
        std::vector<double> done(size_t(threads), 0.0);
        std::vector<std::thread> pool;
        const Clock::time_point start = Clock::now();
        for (int t = 0; t < threads; ++t) pool.emplace_back([&, t] { done[size_t(t)] = work(t); });
        for (std::thread & one : pool) one.join();
        double sum = 0;
        for (const double d : done) sum += d;
        best = std::max(best, sum / since(start));
    }
    return best;
}

// Bytes per second that `threads` threads read, each from its own half GiB.
double read_bandwidth(int threads) {
    constexpr size_t words = size_t(1) << 26; // 512 MiB of uint64
    std::vector<std::unique_ptr<uint64_t[]>> memory;
    for (int t = 0; t < threads; ++t) {
        memory.emplace_back(new uint64_t[words]);
        for (size_t i = 0; i < words; ++i) memory.back()[i] = i;
    }
    return in_parallel(threads, [&](int t) {
        const uint64_t * p = memory[size_t(t)].get();
        uint64_t sum[8] = {};
        for (size_t i = 0; i < words; i += 8)
            for (int l = 0; l < 8; ++l) sum[l] += p[i + size_t(l)];
        volatile uint64_t kept = sum[0] + sum[1] + sum[2] + sum[3] + sum[4] + sum[5] + sum[6] + sum[7];
        (void)kept;
        return double(words * sizeof(uint64_t));
    });
}

constexpr int chains = 12; // independent sums, enough to hide the latency
constexpr int64_t peak_rounds = 20000000;

// Multiply-adds per second in float32.
double float_macs(int threads) {
    return in_parallel(threads, [](int) {
#if defined(__AVX512F__)
        __m512 sum[chains], a = _mm512_set1_ps(0.999f), b = _mm512_set1_ps(1e-3f);
        for (auto & s : sum) s = b;
        for (int64_t i = 0; i < peak_rounds; ++i) {
            for (auto & s : sum) s = _mm512_fmadd_ps(s, a, b);
            asm volatile("" : "+v"(a));
        }
        constexpr int lanes = 16;
        volatile float kept = 0;
        for (auto & s : sum) kept = kept + _mm512_cvtss_f32(s);
#elif defined(__AVX2__)
        __m256 sum[chains], a = _mm256_set1_ps(0.999f), b = _mm256_set1_ps(1e-3f);
        for (auto & s : sum) s = b;
        for (int64_t i = 0; i < peak_rounds; ++i) {
            for (auto & s : sum) s = _mm256_fmadd_ps(s, a, b);
            asm volatile("" : "+x"(a));
        }
        constexpr int lanes = 8;
        volatile float kept = 0;
        for (auto & s : sum) kept = kept + _mm256_cvtss_f32(s);
#elif defined(__ARM_NEON)
        float32x4_t sum[chains], a = vdupq_n_f32(0.999f), b = vdupq_n_f32(1e-3f);
        for (auto & s : sum) s = b;
        for (int64_t i = 0; i < peak_rounds; ++i) {
            for (auto & s : sum) s = vfmaq_f32(b, s, a);
            asm volatile("" : "+w"(a));
        }
        constexpr int lanes = 4;
        volatile float kept = 0;
        for (auto & s : sum) kept = kept + vgetq_lane_f32(s, 0);
#else
        float sum[chains], a = 0.999f, b = 1e-3f;
        for (auto & s : sum) s = b;
        for (int64_t i = 0; i < peak_rounds; ++i) {
            for (auto & s : sum) s = s * a + b;
            asm volatile("" : "+r"(a));
        }
        constexpr int lanes = 1;
        volatile float kept = 0;
        for (auto & s : sum) kept = kept + s;
#endif
        return double(peak_rounds) * chains * lanes;
    });
}

// Multiply-adds per second of 8-bit integers, or of float32 if the compiler has no instruction for 8-bit ones.
double byte_macs(int threads) {
#if defined(__AVX512VNNI__)
    return in_parallel(threads, [](int) {
        __m512i sum[chains], a = _mm512_set1_epi8(3), b = _mm512_set1_epi8(5);
        for (auto & s : sum) s = b;
        for (int64_t i = 0; i < peak_rounds; ++i) {
            for (auto & s : sum) s = _mm512_dpbusd_epi32(s, a, b);
            asm volatile("" : "+v"(a));
        }
        volatile int kept = 0;
        for (auto & s : sum) kept = kept + _mm512_cvtsi512_si32(s);
        return double(peak_rounds) * chains * 64;
    });
#elif defined(__AVX2__)
    return in_parallel(threads, [](int) {
        __m256i sum[chains], a = _mm256_set1_epi8(3), b = _mm256_set1_epi8(5);
        for (auto & s : sum) s = b;
        for (int64_t i = 0; i < peak_rounds; ++i) {
            for (auto & s : sum)
                s = _mm256_add_epi32(s, _mm256_madd_epi16(_mm256_maddubs_epi16(a, b), _mm256_set1_epi16(1)));
            asm volatile("" : "+x"(a));
        }
        volatile int kept = 0;
        for (auto & s : sum) kept = kept + _mm256_extract_epi32(s, 0);
        return double(peak_rounds) * chains * 32;
    });
#elif defined(__ARM_FEATURE_DOTPROD)
    return in_parallel(threads, [](int) {
        int32x4_t sum[chains];
        int8x16_t a = vdupq_n_s8(3), b = vdupq_n_s8(5);
        for (auto & s : sum) s = vdupq_n_s32(0);
        for (int64_t i = 0; i < peak_rounds; ++i) {
            for (auto & s : sum) s = vdotq_s32(s, a, b);
            asm volatile("" : "+w"(a));
        }
        volatile int kept = 0;
        for (auto & s : sum) kept = kept + vgetq_lane_s32(s, 0);
        return double(peak_rounds) * chains * 16;
    });
#else
    return float_macs(threads);
#endif
}

// ---- attention -----------------------------------------------------------------------------------------------------

std::vector<std::string> split(const std::string & text, char at) {
    std::vector<std::string> parts;
    std::stringstream stream(text);
    for (std::string part; std::getline(stream, part, at);) parts.push_back(part);
    return parts;
}

ggml_type type_named(const std::string & name) {
    for (int i = 0; i < GGML_TYPE_COUNT; ++i) {
        const char * known = ggml_type_name(ggml_type(i));
        if (known && name == known) return ggml_type(i);
    }
    fail("no cache type " + name + " in this build");
}

struct Sizes {
    int64_t heads, kv_heads, head, depth, queries;
};

// A cache of `rows` tokens and its graph: a node per layer, each with its own K and V, laid out as llama.cpp does.
class Bench {
public:
    static constexpr int layers = 2;

    Bench(const Sizes & s, ggml_type type_k, ggml_type type_v, float spread) : sizes(s) {
        const size_t overhead = ggml_tensor_overhead() * 64 + ggml_graph_overhead();
        context.reset(ggml_init({overhead, nullptr, true}));
        backend.reset(ggml_backend_cpu_init());
        ggml_context * c = context.get();
        const int64_t rows = (s.depth + s.queries + 255) / 256 * 256; // the cache is padded
        ggml_tensor * q = ggml_new_tensor_3d(c, GGML_TYPE_F32, s.head, s.heads, s.queries);
        ggml_tensor * mask = ggml_new_tensor_2d(c, GGML_TYPE_F16, rows, s.queries);
        ggml_tensor *k[layers], *v[layers];
        graph = ggml_new_graph(c);
        for (int l = 0; l < layers; ++l) {
            k[l] = ggml_new_tensor_2d(c, type_k, s.head * s.kv_heads, rows);
            v[l] = ggml_new_tensor_2d(c, type_v, s.head * s.kv_heads, rows);
            ggml_tensor * out = ggml_flash_attn_ext(c, ggml_permute(c, q, 0, 2, 1, 3), by_head(k[l]), by_head(v[l]),
                                                    mask, 1.0f / std::sqrt(float(s.head)), 0.0f, 0.0f);
            ggml_flash_attn_ext_set_prec(out, GGML_PREC_F32);
            ggml_build_forward_expand(graph, out);
        }
        buffer.reset(ggml_backend_alloc_ctx_tensors(c, backend.get()));
        if (!buffer) fail("out of memory for a cache of " + std::to_string(rows) + " rows");

        std::mt19937 random(1);
        std::normal_distribution<float> normal;
        std::vector<float> values(size_t(ggml_nelements(q)));
        for (float & x : values) x = spread * normal(random); // scores of that standard deviation
        ggml_backend_tensor_set(q, values.data(), 0, values.size() * sizeof(float));
        for (int l = 0; l < layers; ++l)
            for (ggml_tensor * t : {k[l], v[l]}) fill(t, random, normal);
        std::vector<ggml_fp16_t> hidden(size_t(ggml_nelements(mask)));
        for (int64_t i = 0; i < s.queries; ++i)
            for (int64_t j = 0; j < rows; ++j)
                hidden[size_t(i * rows + j)] = ggml_fp32_to_fp16(j <= s.depth + i ? 0.0f : -INFINITY);
        ggml_backend_tensor_set(mask, hidden.data(), 0, hidden.size() * sizeof(ggml_fp16_t));
        cache_bytes = double(s.depth + s.queries) * double(ggml_row_size(type_k, s.head * s.kv_heads) +
                                                           ggml_row_size(type_v, s.head * s.kv_heads));
    }

    double cache_bytes; // of one layer

    // Seconds per layer: the best of the runs that fit into `seconds`, at least three.
    double time(ggml_threadpool * pool, int threads, double seconds) {
        ggml_backend_cpu_set_threadpool(backend.get(), pool);
        ggml_backend_cpu_set_n_threads(backend.get(), threads);
        double best = INFINITY;
        const Clock::time_point begin = Clock::now();
        for (int run = 0; run < 4 || since(begin) < seconds; ++run) { // the first warms up
            const Clock::time_point start = Clock::now();
            if (ggml_backend_graph_compute(backend.get(), graph) != GGML_STATUS_SUCCESS) fail("the graph failed");
            if (run) best = std::min(best, since(start) / layers);
        }
        return best;
    }

private:
    struct Free {
        void operator()(ggml_context * c) const { ggml_free(c); }
        void operator()(ggml_backend_t b) const { ggml_backend_free(b); }
        void operator()(ggml_backend_buffer_t b) const { ggml_backend_buffer_free(b); }
    };
    Sizes sizes;
    std::unique_ptr<ggml_context, Free> context;
    std::unique_ptr<ggml_backend, Free> backend;
    std::unique_ptr<ggml_backend_buffer, Free> buffer;
    ggml_cgraph * graph;

    ggml_tensor * by_head(ggml_tensor * cache) {
        ggml_tensor * view = ggml_view_3d(context.get(), cache, sizes.head, sizes.kv_heads, cache->ne[1],
                                          ggml_row_size(cache->type, sizes.head), cache->nb[1], 0);
        return ggml_permute(context.get(), view, 0, 2, 1, 3);
    }

    // 256 different rows are repeated, because encoding is not measured.
    static void fill(ggml_tensor * t, std::mt19937 & random, std::normal_distribution<float> & normal) {
        const int64_t n = t->ne[0], different = std::min<int64_t>(256, t->ne[1]);
        std::vector<float> values(size_t(n * different));
        for (float & x : values) x = normal(random);
        std::vector<uint8_t> rows(ggml_row_size(t->type, n) * size_t(different));
        const ggml_type_traits_cpu * traits = ggml_get_type_traits_cpu(t->type);
        if (!traits->from_float) fail(std::string("cannot encode ") + ggml_type_name(t->type));
        for (int64_t r = 0; r < different; ++r)
            traits->from_float(values.data() + r * n, rows.data() + size_t(r) * ggml_row_size(t->type, n), n);
        for (size_t at = 0; at < ggml_nbytes(t); at += rows.size())
            ggml_backend_tensor_set(t, rows.data(), at, std::min(rows.size(), ggml_nbytes(t) - at));
    }
};

} // namespace

int main(int argc, char ** argv) {
    if (argc < 10) fail("run tools/bench_attention.py, which knows the arguments");
    const int64_t heads = std::atoll(argv[1]), kv_heads = std::atoll(argv[2]), head = std::atoll(argv[3]);
    const float spread = float(std::atof(argv[4]));
    const double seconds = std::atof(argv[5]);
    std::vector<int> threads;
    for (const std::string & t : split(argv[6], ',')) threads.push_back(std::atoi(t.c_str()));

    for (const int t : threads) {
        std::printf("{\"limit\": true, \"threads\": %d, \"read\": %.6g, \"float_macs\": %.6g, "
                    "\"byte_macs\": %.6g}\n",
                    t, read_bandwidth(t), float_macs(t), byte_macs(t));
        std::fflush(stdout);
    }
    for (const std::string & depth : split(argv[7], ','))
        for (const std::string & queries : split(argv[8], ',')) {
            const Sizes sizes = {heads, kv_heads, head, std::atoll(depth.c_str()), std::atoll(queries.c_str())};
            for (int i = 9; i < argc; ++i) {
                const std::vector<std::string> pair = split(argv[i], ':');
                Bench bench(sizes, type_named(pair.front()), type_named(pair.back()), spread);
                for (const int t : threads) {
                    ggml_threadpool_params params = ggml_threadpool_params_default(t);
                    ggml_threadpool * pool = ggml_threadpool_new(&params);
                    const double best = bench.time(pool, t, seconds);
                    ggml_threadpool_free(pool);
                    std::printf("{\"pair\": \"%s\", \"depth\": %s, \"queries\": %s, \"threads\": %d, "
                                "\"seconds\": %.6g, \"cache_bytes\": %.0f}\n",
                                argv[i], depth.c_str(), queries.c_str(), t, best, bench.cache_bytes);
                    std::fflush(stdout);
                }
            }
        }
    return 0;
}
