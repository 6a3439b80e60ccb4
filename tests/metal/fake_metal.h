// The dispatches that the fake Metal device has executed, by kernel.
#ifndef TURBOQUANT_TESTS_FAKE_METAL_H
#define TURBOQUANT_TESTS_FAKE_METAL_H

#include <map>
#include <string>

extern std::map<std::string, int> fake_metal_dispatches;

#endif
