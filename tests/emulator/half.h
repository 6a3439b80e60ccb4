// Binary16 in integers, so that no mode of the host's floating-point unit changes the result.
#ifndef TURBOQUANT_TESTS_HALF_H
#define TURBOQUANT_TESTS_HALF_H

#include <cstdint>

namespace emulator {

float float_of_half(uint16_t bits);
uint16_t half_of_float(float x); // rounds to nearest even

} // namespace emulator

#endif
