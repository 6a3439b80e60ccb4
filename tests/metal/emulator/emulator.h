// Executes Metal kernels that were compiled as C++ against the shim `metal_stdlib`.
//
// A thread is a fiber. The threads of a SIMD group take turns until all have reached the same SIMD-group function or
// barrier, and the SIMD groups of a threadgroup until all have reached the same barrier. The kernels are compiled with
// -fsanitize=thread, without its runtime: the emulator defines the functions that the compiler calls for every access
// to memory, so it sees all of them. It stops with a message at
//   - an access outside of the allocations, of the threadgroup's memory and of the thread's own stack
//   - a read of threadgroup memory that was not written
//   - two accesses of different threads to the same bytes, one of them a write, that no barrier separates: in
//   threadgroup
//     memory within a threadgroup, and in allocations between all threads since the last barrier of the encoder (there,
//     a write after a read is not seen)
//   - threads of a SIMD group that reach different SIMD-group functions, and threads of a threadgroup that reach
//     different barriers, or of which some have ended
//
// What it cannot judge: whether Apple's compiler accepts the sources, its code, the limits of registers, speed, and
// memory of an alignment that only hardware demands.
#ifndef TURBOQUANT_EMULATOR_H
#define TURBOQUANT_EMULATOR_H

#include "half.h"

#include <cstddef>
#include <cstdint>
#include <map>
#include <string>
#include <tuple>
#include <vector>

namespace emulator {

// ---- types of the shim

struct uint3 {
    uint32_t x, y, z;
};

// binary16, which rounds to nearest even.
struct half {
    uint16_t bits;
    half() = default;
    __attribute__((no_sanitize("thread"))) half(float x) : bits(half_of_float(x)) {}
    __attribute__((no_sanitize("thread"))) operator float() const { return float_of_half(bits); }
};

struct Fragment { // the elements of a matrix that a lane has
    float element[2];
};

// ---- what the shim calls on behalf of the current thread

enum class Reduction { add_int, add_float, max_uint, max_float, min_uint, bits_or };
uint32_t shuffle(uint32_t x, int lane, int line);
uint32_t shuffle_xor(uint32_t x, int mask, int line);
uint32_t reduce(Reduction how, uint32_t x, int line);
void barrier(bool of_threadgroup, int flags, int line);
void matrix_move(Fragment & m, void * p, int element_bytes, uint64_t elements_per_row, bool transpose, bool store,
                 int line);
void matrix_multiply(Fragment & d, const Fragment & a, const Fragment & b, const Fragment & c, int line);

// ---- memory

// Registers memory that kernels may access, or removes it.
void add_memory(void * data, size_t bytes);
void remove_memory(void * data);
// Memory that is written by one dispatch may be read by a later one only after this call.
void encoder_barrier();

// ---- dispatches

struct Dispatch {
    std::string kernel;
    std::map<int, int> constants;     // of the pipeline, by number
    std::vector<uint8_t> arguments;   // buffer 0
    std::vector<void *> buffers;      // from 1 on
    size_t threadgroup_bytes = 0;     // threadgroup memory 0
    uint32_t groups[3] = {1, 1, 1};
    uint32_t threads = 32;            // of a threadgroup, a multiple of 32
};

// Whether numbers below float's normal ones are read and written as zeros, as some GPUs do. Only on x86-64.
void flush_subnormals(bool flush);

bool has_kernel(const std::string & name);
// Executes a dispatch. Stops the process with a message if something is wrong.
void run(const Dispatch & dispatch);

// ---- the registry of kernels: parameters in the order arguments, buffers, threadgroup memory, the position of the
// threadgroup, the lane, the SIMD group. A test compares this order with the attributes in the sources.

struct Frame { // of the current thread
    const Dispatch * dispatch;
    void * threadgroup;
    uint3 group;
    uint16_t lane, simd;
    int pointers, words; // parameters that were bound
};
using Call = void (*)(Frame &);

struct Registered {
    Registered(const char * name, Call call);
};
struct RegisteredConstant {
    RegisteredConstant(int number, int * value);
};

void * bind_pointer(Frame & frame);
const void * bind_arguments(Frame & frame, size_t bytes);
uint3 bind_group(Frame & frame);
uint16_t bind_word(Frame & frame);
void check_bound(const Frame & frame);

template <typename T> struct Parameter;
template <typename T> struct Parameter<const T &> {
    static const T & take(Frame & frame) { return *static_cast<const T *>(bind_arguments(frame, sizeof(T))); }
};
template <typename T> struct Parameter<T *> {
    static T * take(Frame & frame) { return static_cast<T *>(bind_pointer(frame)); }
};
template <> struct Parameter<uint3> {
    static uint3 take(Frame & frame) { return bind_group(frame); }
};
template <> struct Parameter<uint16_t> {
    static uint16_t take(Frame & frame) { return bind_word(frame); }
};

template <typename F> struct Binding;
template <typename... A> struct Binding<void (*)(A...)> {
    template <void (*function)(A...)> static void call(Frame & frame) {
        const std::tuple<A...> arguments{Parameter<A>::take(frame)...}; // braces evaluate from left to right
        check_bound(frame);
        std::apply(function, arguments);
    }
};

} // namespace emulator

#endif
