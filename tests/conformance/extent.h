// The part of a list that runs. Each case has the smallest extent that includes it.
#ifndef TURBOQUANT_TESTS_EXTENT_H
#define TURBOQUANT_TESTS_EXTENT_H

#include <cstdio>
#include <cstdlib>
#include <cstring>

enum class Extent {
    brief, // for tools that are a hundred times slower, such as compute-sanitizer
    usual, // for sanitizers, emulators, and kernels that are not the best ones of a CPU
    whole
};

inline Extent extent_from(const char * name) {
    const char * names[] = {"brief", "usual", "whole"};
    for (int i = 0; i < 3; ++i)
        if (std::strcmp(name, names[i]) == 0) return Extent(i);
    std::fprintf(stderr, "%s is none of brief, usual, whole\n", name);
    std::exit(EXIT_FAILURE);
}

#endif
