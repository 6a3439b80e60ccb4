// AVX-512 with VNNI: the same kernels; 8-bit and 16-bit dot products take one instruction.
#define TURBOQUANT_VNNI
#include "avx512.cpp"
