// turbo-count.cpp: the counts of TURBOQUANT_COUNT. Part of ggml-base.

#include "ggml/turbo-count.h"

#include <cinttypes>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <map>
#include <mutex>
#include <string>
#include <tuple>

namespace {

struct Counts {
    std::mutex                                                mutex;
    std::map<std::tuple<std::string, int64_t, int64_t>, long> calls; // by code, tokens and streams

    ~Counts() {
        for (const auto & [key, number] : calls) {
            const auto & [what, tokens, streams] = key;
            fprintf(stderr, "turboquant: count %ld %s, tokens %" PRId64 ", streams %" PRId64 "\n", number, what.c_str(),
                    tokens, streams);
        }
    }
};

Counts & counts() {
    static Counts all;
    return all;
}

} // namespace

bool turbo_counts(void) {
    static const bool asked = []() {
        const char * text = getenv("TURBOQUANT_COUNT");
        return text && *text && strcmp(text, "0") != 0;
    }();
    return asked;
}

void turbo_count(const char * what, int64_t tokens, int64_t streams) {
    if (turbo_counts()) {
        Counts &                          all = counts();
        const std::lock_guard<std::mutex> guard(all.mutex);
        ++all.calls[{ what, tokens, streams }];
    }
}
