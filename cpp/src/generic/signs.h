// The sign vectors as operands: sign bits of floats, and +1 or -1 for int8 levels.
#ifndef TURBOQUANT_GENERIC_SIGNS_H
#define TURBOQUANT_GENERIC_SIGNS_H

#include "../format.h"

namespace turboquant {
namespace {

struct SignTables {
    alignas(64) uint32_t bits1[128] = {};
    alignas(64) uint32_t bits2[128] = {};
    alignas(64) int8_t levels2[128] = {};
    constexpr SignTables() {
        for (int i = 0; i < 128; ++i) {
            bits1[i] = sign_bit(signs1, i) ? 0x80000000u : 0u;
            bits2[i] = sign_bit(signs2, i) ? 0x80000000u : 0u;
            levels2[i] = sign_bit(signs2, i) ? -1 : 1;
        }
    }
};
constexpr SignTables sign_tables;

} // namespace
} // namespace turboquant

#endif
