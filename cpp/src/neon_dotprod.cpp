// NEON with the dot-product extension (Armv8.2): neon.cpp with sdot in place of widening multiplications.
#define TURBOQUANT_NEON_DOTPROD
#include "neon.cpp"
