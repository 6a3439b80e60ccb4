// AVX2 with AVX-VNNI and GFNI: the same kernels; attention uses 8-bit dot products of one instruction, and the
// trellis-coded types are expanded by products with matrices of bits.
#define TURBOQUANT_VNNI
#include "avx2.cpp"
