// AVX2 with AVX-VNNI: the same kernels; attention uses 8-bit dot products of one instruction.
#define TURBOQUANT_VNNI
#include "avx2.cpp"
