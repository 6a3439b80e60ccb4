// What the kernels need from the language: the standard library, kernels by name, constants that are set when a
// pipeline is made, and unrolled loops. tests/metal/emulator defines the same macros for C++.
#ifndef TURBOQUANT_METAL_LANGUAGE_H
#define TURBOQUANT_METAL_LANGUAGE_H

#include <metal_stdlib>

using namespace metal;

// The floats must be the CPU's. The host also compiles the library without fast math, as older compilers ignore the
// second pragma.
#ifndef TURBOQUANT_EMULATED
#pragma METAL fp contract(off)
#pragma METAL fp math_mode(safe)

// An instance of a kernel template as a kernel with a name.
#define TURBOQUANT_KERNEL(name, ...)    \
    typedef decltype(__VA_ARGS__) name##_t; \
    template [[host_name(#name)]] kernel name##_t __VA_ARGS__;

// A loop over registers, which must be unrolled.
#define FOR_UNROLLED(...) _Pragma("clang loop unroll(full)") for (__VA_ARGS__)

#define TURBOQUANT_THREADGROUP(index) [[threadgroup(index)]]
#define TURBOQUANT_FUNCTION_CONSTANT(name, index) constant int name [[function_constant(index)]];
#endif

#endif
