// AVX2 with AVX-VNNI: the same kernels, attention by 8-bit dot products in one instruction.
#define TURBOQUANT_VNNI
#include "avx2.cpp"
