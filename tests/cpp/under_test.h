// Arguments of a test: the name of a table of kernels, or "best" for those of this CPU; and the extent of a conformance
// list.
#ifndef TURBOQUANT_TESTS_UNDER_TEST_H
#define TURBOQUANT_TESTS_UNDER_TEST_H

#include "check.h"
#include "extent.h"
#include "turboquant.h"

inline const char * kernels_under_test;

inline void use(const char * name) {
    if (tq_kernels_select(name) != TQ_OK || std::strcmp(tq_kernels_selected(), name) != 0) {
        std::fprintf(stderr, "cannot select %s\n", name);
        std::exit(EXIT_FAILURE);
    }
}

// The main function of a test: selects the kernels and calls run(extent). The exit status is 77 (skipped) if this CPU or
// this build cannot run the kernels.
template <typename Run> int test_kernels(int argc, char ** argv, const Run & run) {
    if (argc != 3) {
        std::fprintf(stderr, "usage: %s KERNELS|best brief|usual|whole\n", argv[0]);
        return EXIT_FAILURE;
    }
    const bool best = std::strcmp(argv[1], "best") == 0;
    const tq_status status = tq_kernels_select(best ? nullptr : argv[1]);
    kernels_under_test = best ? tq_kernels_selected() : argv[1];
    if (status == TQ_ERROR_KERNELS_UNSUPPORTED) {
        std::printf("skipped: this CPU or this build cannot run %s\n", kernels_under_test);
        return check::exit_skipped;
    }
    if (CHECK_EQ(status, TQ_OK)) run(extent_from(argv[2]));
    return check::summary();
}

#endif
