// Assertions for the C++ tests: a failed CHECK prints where, what and in which case, is counted, and the test goes on.
#ifndef TURBOQUANT_TESTS_CHECK_H
#define TURBOQUANT_TESTS_CHECK_H

#include <atomic>
#include <cstdio>
#include <cstdlib>
#include <sstream>
#include <string>

namespace check {

constexpr int exit_skipped = 77; // CTest's SKIP_RETURN_CODE

inline std::atomic<long> checks{0}, failures{0};
inline thread_local std::string where; // the case at hand: kernels, type, input, size

// Names a case for as long as it lives; cases nest.
class Case {
public:
    template <typename... Parts> explicit Case(const Parts &... parts) : length(where.size()) {
        std::ostringstream text;
        (void) (text << ... << parts);
        where += (where.empty() ? "" : "; ") + text.str();
    }
    ~Case() { where.resize(length); }
    Case(const Case &) = delete;

private:
    size_t length;
};

inline bool report(bool ok, const char * file, int line, const std::string & text) {
    ++checks;
    if (!ok) {
        if (++failures <= 50) std::fprintf(stderr, "%s:%d: %s [%s]\n", file, line, text.c_str(), where.c_str());
        if (failures == 51) std::fprintf(stderr, "... more failures are counted, not printed\n");
    }
    return ok;
}

template <typename A, typename B>
bool equal(const A & a, const B & b, const char * text, const char * file, int line) {
    if (a == b) return report(true, file, line, "");
    std::ostringstream message;
    message << text << ": got " << a << ", want " << b;
    return report(false, file, line, message.str());
}

inline int summary() {
    std::printf("%ld checks, %ld failures\n", checks.load(), failures.load());
    return failures || checks == 0 ? EXIT_FAILURE : EXIT_SUCCESS;
}

} // namespace check

#define CHECK(condition) check::report(bool(condition), __FILE__, __LINE__, #condition)
#define CHECK_EQ(got, want) check::equal(got, want, #got, __FILE__, __LINE__)

#endif
