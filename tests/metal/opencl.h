// A second look at the sources: Clang compiles them as C++ for OpenCL, which has the same address spaces as Metal, and
// no conversions between them. The functions of Metal's library are only declared.
#ifndef TURBOQUANT_TESTS_METAL_OPENCL_H
#define TURBOQUANT_TESTS_METAL_OPENCL_H

#pragma OPENCL EXTENSION cl_khr_fp16 : enable

#define device __global
#define threadgroup __local
#define thread __private
#undef constant
#define constant __constant
#undef kernel
#define kernel
#define TURBOQUANT_EMULATED
#define TURBOQUANT_KERNEL(name, ...) void name##_instance() { (void) &__VA_ARGS__; }
#define TURBOQUANT_FUNCTION_CONSTANT(name, index) constant int name = 0;
#define TURBOQUANT_THREADGROUP(index)
#define FOR_UNROLLED(...) _Pragma("clang loop unroll(full)") for (__VA_ARGS__)

typedef unsigned char uint8_t, uchar;
typedef unsigned short uint16_t, ushort;
typedef unsigned int uint32_t, uint;
typedef unsigned long uint64_t, ulong;
typedef signed char int8_t;
typedef int int32_t;
typedef long int64_t;

namespace metal {

template <typename To, typename From> To as_type(From x);
template <typename T> T min(T a, T b);
template <typename T> T max(T a, T b);
template <typename T> T clamp(T x, T low, T high);
int abs(int x);
float rint(float x);
float sqrt(float x);
float exp2(float x);
float powr(float x, float y);
uint clz(uint x);
namespace precise {
float tanh(float x);
}
template <typename T> T simd_shuffle(T x, ushort lane);
template <typename T> T simd_shuffle_xor(T x, ushort mask);
template <typename T> T simd_sum(T x);
template <typename T> T simd_max(T x);
template <typename T> T simd_min(T x);
template <typename T> T simd_or(T x);
bool simd_any(bool x);
enum class mem_flags { mem_none, mem_device, mem_threadgroup };
void threadgroup_barrier(mem_flags flags);
void simdgroup_barrier(mem_flags flags);

template <typename T> struct Matrix8x8 {
    T elements[2];
};
typedef Matrix8x8<float> simdgroup_float8x8;
typedef Matrix8x8<half> simdgroup_half8x8;
template <typename T, int N> Matrix8x8<T> make_filled_simdgroup_matrix(T x);
template <typename T>
void simdgroup_load(thread Matrix8x8<T> & m, threadgroup const T * p, ulong elements_per_row, ulong origin = 0,
                    bool transpose = false);
template <typename T> void simdgroup_store(Matrix8x8<T> m, threadgroup T * p, ulong elements_per_row);
template <typename T> void simdgroup_store(Matrix8x8<T> m, device T * p, ulong elements_per_row);
template <typename A, typename B>
void simdgroup_multiply_accumulate(thread Matrix8x8<float> & d, Matrix8x8<A> a, Matrix8x8<B> b, Matrix8x8<float> c);

} // namespace metal

// OpenCL has functions of these names, too.
namespace turboquant {
using metal::abs;
using metal::clz;
using metal::exp2;
using metal::powr;
using metal::rint;
using metal::sqrt;
} // namespace turboquant

#endif
