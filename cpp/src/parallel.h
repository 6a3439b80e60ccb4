// Distribute a range of independent items over threads.
#ifndef TURBOQUANT_PARALLEL_H
#define TURBOQUANT_PARALLEL_H

#include <cstdint>
#include <system_error>
#include <thread>
#include <vector>

namespace turboquant {

// Calls body(first, last, part) for up to `threads` contiguous parts of [0, count). Parts whose thread cannot be
// started run in the calling thread, so the work is always done.
template <typename Body> void parallel(int64_t count, int threads, const Body & body) {
    const int64_t parts = count < threads ? count : threads;
    if (parts <= 1) {
        if (count > 0) body(int64_t(0), count, 0);
        return;
    }
    auto edge = [&](int64_t p) { return count * p / parts; };
    std::vector<std::thread> running;
    int64_t started = 1;
    try {
        running.reserve(size_t(parts));
        for (; started < parts; ++started) running.emplace_back(body, edge(started), edge(started + 1), int(started));
    } catch (const std::exception &) {
    }
    body(int64_t(0), edge(1), 0);
    for (int64_t p = started; p < parts; ++p) body(edge(p), edge(p + 1), int(p));
    for (auto & thread : running) thread.join();
}

} // namespace turboquant

#endif
