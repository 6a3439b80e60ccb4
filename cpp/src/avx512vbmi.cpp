// AVX-512 with VNNI and VBMI: the same kernels; the encoder's search uses a table of 128 bytes.
#define TURBOQUANT_VNNI
#define TURBOQUANT_VBMI
#include "avx512.cpp"
