// AVX-512 with VNNI, VBMI and GFNI: the same kernels; the encoder's search uses a table of 128 bytes, and the
// trellis-coded types are expanded by products with matrices of bits.
#define TURBOQUANT_VNNI
#define TURBOQUANT_VBMI
#include "avx512.cpp"
