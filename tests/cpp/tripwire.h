// Memory whose first read calls a function in the reading thread before the thread continues. So a test can act in the
// middle of a call, always at the same place. POSIX only.
#ifndef TURBOQUANT_TESTS_TRIPWIRE_H
#define TURBOQUANT_TESTS_TRIPWIRE_H

#if !defined(_WIN32)

#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <vector>

#include <signal.h>
#include <sys/mman.h>
#include <unistd.h>

// A copy of some bytes, one page of which is a tripwire: the first page that begins at least `from` bytes after their
// start. Only one such copy may exist at a time. `then` runs in a signal handler of the reading thread.
class Tripwire {
public:
    Tripwire(const std::vector<uint8_t> & bytes, size_t from, std::function<void()> then)
        : page(size_t(sysconf(_SC_PAGESIZE))), size((bytes.size() + page - 1) / page * page), action(std::move(then)) {
        void * map = mmap(nullptr, size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
        if (map == MAP_FAILED || (from = (from + page - 1) / page * page) + page > size || armed) std::abort();
        start = static_cast<uint8_t *>(map);
        std::memcpy(start, bytes.data(), bytes.size());
        wire = start + from;
        armed = this;
        struct sigaction handler = {};
        handler.sa_sigaction = handle;
        handler.sa_flags = SA_SIGINFO;
        sigaction(SIGSEGV, &handler, &before[0]);
        sigaction(SIGBUS, &handler, &before[1]); // macOS raises this signal
        if (mprotect(wire, page, PROT_NONE) != 0) std::abort();
    }
    ~Tripwire() {
        sigaction(SIGSEGV, &before[0], nullptr);
        sigaction(SIGBUS, &before[1], nullptr);
        munmap(start, size);
        armed = nullptr;
    }
    Tripwire(const Tripwire &) = delete;

    const uint8_t * data() const { return start; }
    bool tripped() const { return done; }

private:
    static inline Tripwire * armed = nullptr;
    const size_t page, size;
    const std::function<void()> action;
    uint8_t *start, *wire;
    bool done = false;
    struct sigaction before[2];

    static void handle(int, siginfo_t * info, void *) {
        Tripwire & self = *armed;
        const auto * at = static_cast<const uint8_t *>(info->si_addr);
        if (self.done || at < self.wire || at >= self.wire + self.page) std::abort(); // a real fault
        self.done = true;
        if (mprotect(self.wire, self.page, PROT_READ) != 0) std::abort();
        self.action();
    }
};

#endif

#endif
