// The part of CUDA's binary16 that the kernels and tests use.
#ifndef TURBOQUANT_CUDA_EMULATOR_FP16_H
#define TURBOQUANT_CUDA_EMULATOR_FP16_H

#include "half.h"

struct __half {
    uint16_t bits;
};
using half = __half;
struct alignas(4) __half2 {
    __half x, y;
};
using half2 = __half2;

inline __half __ushort_as_half(uint16_t bits) { return {bits}; }
inline uint16_t __half_as_ushort(__half x) { return x.bits; }
inline float __half2float(__half x) { return emulator::float_of_half(x.bits); }
inline __half __float2half_rn(float x) { return {emulator::half_of_float(x)}; }
inline __half __float2half(float x) { return __float2half_rn(x); }
inline __half2 __floats2half2_rn(float x, float y) { return {__float2half_rn(x), __float2half_rn(y)}; }
inline __half2 __float2half2_rn(float x) { return __floats2half2_rn(x, x); }
// Products and differences of two halves are exact in float32 or round in the same way.
inline __half2 __hmul2(__half2 a, __half2 b) {
    return __floats2half2_rn(__half2float(a.x) * __half2float(b.x), __half2float(a.y) * __half2float(b.y));
}
inline __half2 __hsub2(__half2 a, __half2 b) {
    return __floats2half2_rn(__half2float(a.x) - __half2float(b.x), __half2float(a.y) - __half2float(b.y));
}

#endif
