// CUDA's built-in types and functions that the kernels use.
#ifndef TURBOQUANT_CUDA_EMULATOR_INTRINSICS_H
#define TURBOQUANT_CUDA_EMULATOR_INTRINSICS_H

#include "threads.h"

#include <cmath>
#include <cstdlib>
#include <cstring>
#include <type_traits>

// ---- vectors

struct alignas(8) float2 {
    float x, y;
};
struct alignas(16) float4 {
    float x, y, z, w;
};
struct alignas(8) uint2 {
    unsigned x, y;
};
struct alignas(16) uint4 {
    unsigned x, y, z, w;
};
inline float2 make_float2(float x, float y) { return {x, y}; }
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }
inline uint2 make_uint2(unsigned x, unsigned y) { return {x, y}; }
inline uint4 make_uint4(unsigned x, unsigned y, unsigned z, unsigned w) { return {x, y, z, w}; }

// ---- arithmetic

template <typename A, typename B> constexpr std::common_type_t<A, B> min(A a, B b) {
    using T = std::common_type_t<A, B>;
    return T(b) < T(a) ? T(b) : T(a);
}
template <typename A, typename B> constexpr std::common_type_t<A, B> max(A a, B b) {
    using T = std::common_type_t<A, B>;
    return T(a) < T(b) ? T(b) : T(a);
}

namespace emulator {
template <typename To, typename From> To bits_as(From x) {
    static_assert(sizeof(To) == sizeof(From), "the bits are kept");
    To out;
    std::memcpy(&out, &x, sizeof(out));
    return out;
}
} // namespace emulator

inline float __uint_as_float(unsigned x) { return emulator::bits_as<float>(x); }
inline float __int_as_float(int x) { return emulator::bits_as<float>(x); }
inline unsigned __float_as_uint(float x) { return emulator::bits_as<unsigned>(x); }

// Files are compiled without contraction, so these round each operation.
inline float __fadd_rn(float a, float b) { return a + b; }
inline float __fsub_rn(float a, float b) { return a - b; }
inline float __fmul_rn(float a, float b) { return a * b; }
inline float __fdiv_rn(float a, float b) { return a / b; }
inline float __fdividef(float a, float b) { return a / b; }
inline float __fsqrt_rn(float a) { return std::sqrt(a); }
inline float __fmaf_rn(float a, float b, float c) { return std::fma(a, b, c); }
inline int __float2int_rn(float x) { // NaN becomes 0, and others are clamped
    if (!(std::fabs(x) < 2147483648.0f)) return x != x ? 0 : x < 0 ? INT32_MIN : INT32_MAX;
    return int(std::nearbyint(x));
}
inline int __ffs(int x) { return __builtin_ffs(x); }
inline int __popc(unsigned x) { return __builtin_popcount(x); }
inline unsigned __brev(unsigned x) {
    unsigned out = 0;
    for (int i = 0; i < 32; ++i) out |= (x >> i & 1) << (31 - i);
    return out;
}
inline unsigned __funnelshift_r(unsigned low, unsigned high, unsigned shift) {
    return unsigned((uint64_t(high) << 32 | low) >> (shift & 31));
}
inline int __dp4a(int a, int b, int c) {
    for (int i = 0; i < 32; i += 8) c += int(int8_t(a >> i)) * int(int8_t(b >> i));
    return c;
}

inline size_t __cvta_generic_to_shared(const void * p) { return emulator::shared_address(p); }

// ---- collective operations, of whole warps

#define EMULATOR_LINE int line = __builtin_LINE()

inline void * __cvta_shared_to_generic(size_t address, EMULATOR_LINE) {
    return emulator::shared_at({"__cvta_shared_to_generic", line}, uint32_t(address), 1, 1);
}

namespace emulator {

inline void need_all(unsigned lanes, const char * operation, int line) {
    if (lanes != ~0u) stop("%s in line %d: some lanes do not take part", operation, line);
}

template <typename T> struct Shuffle {
    T value, result;
    int lane; // of the source
};
template <typename T> void shuffle_lanes(Shuffle<T> ** lanes) {
    for (int i = 0; i < warp_size; ++i) lanes[i]->result = lanes[lanes[i]->lane]->value;
}
template <typename T> T shuffle(const char * operation, int line, T x, int lane) {
    Shuffle<T> own = {x, x, lane};
    collective<Shuffle<T>, shuffle_lanes<T>>({operation, line}, own);
    return own.result;
}

struct Vote {
    bool value;
    unsigned lanes;
};
unsigned ballot(const char * operation, int line, bool x);

template <typename T> struct Reduction {
    T value;
};
struct Sum {
    template <typename T> static T of(T a, T b) { return a + b; }
};
struct Least {
    template <typename T> static T of(T a, T b) { return b < a ? b : a; }
};
struct Greatest {
    template <typename T> static T of(T a, T b) { return a < b ? b : a; }
};
template <typename T, typename How> void reduce_lanes(Reduction<T> ** lanes) {
    T all = lanes[0]->value;
    for (int i = 1; i < warp_size; ++i) all = How::of(all, lanes[i]->value);
    for (int i = 0; i < warp_size; ++i) lanes[i]->value = all;
}
template <typename How, typename T> T reduce(const char * operation, int line, T x) {
    Reduction<T> own = {x};
    collective<Reduction<T>, reduce_lanes<T, How>>({operation, line}, own);
    return own.value;
}

} // namespace emulator

template <typename T> T __shfl_sync(unsigned lanes, T x, int lane, EMULATOR_LINE) {
    emulator::need_all(lanes, "__shfl_sync", line);
    return emulator::shuffle("__shfl_sync", line, x, lane & 31);
}
template <typename T> T __shfl_xor_sync(unsigned lanes, T x, int mask, EMULATOR_LINE) {
    emulator::need_all(lanes, "__shfl_xor_sync", line);
    return emulator::shuffle("__shfl_xor_sync", line, x, (emulator::current->lane ^ mask) & 31);
}
template <typename T> T __shfl_up_sync(unsigned lanes, T x, int distance, EMULATOR_LINE) {
    emulator::need_all(lanes, "__shfl_up_sync", line);
    const int lane = emulator::current->lane, from = lane - distance;
    return emulator::shuffle("__shfl_up_sync", line, x, from >= 0 ? from : lane);
}
template <typename T> T __shfl_down_sync(unsigned lanes, T x, int distance, EMULATOR_LINE) {
    emulator::need_all(lanes, "__shfl_down_sync", line);
    const int lane = emulator::current->lane, from = lane + distance;
    return emulator::shuffle("__shfl_down_sync", line, x, from < 32 ? from : lane);
}
inline unsigned __ballot_sync(unsigned lanes, int x, EMULATOR_LINE) {
    emulator::need_all(lanes, "__ballot_sync", line);
    return emulator::ballot("__ballot_sync", line, x != 0);
}
inline int __any_sync(unsigned lanes, int x, EMULATOR_LINE) {
    emulator::need_all(lanes, "__any_sync", line);
    return emulator::ballot("__any_sync", line, x != 0) != 0;
}
inline int __all_sync(unsigned lanes, int x, EMULATOR_LINE) {
    emulator::need_all(lanes, "__all_sync", line);
    return emulator::ballot("__all_sync", line, x != 0) == ~0u;
}
template <typename T> T __reduce_add_sync(unsigned lanes, T x, EMULATOR_LINE) {
    emulator::need_all(lanes, "__reduce_add_sync", line);
    return emulator::reduce<emulator::Sum>("__reduce_add_sync", line, x);
}
template <typename T> T __reduce_min_sync(unsigned lanes, T x, EMULATOR_LINE) {
    emulator::need_all(lanes, "__reduce_min_sync", line);
    return emulator::reduce<emulator::Least>("__reduce_min_sync", line, x);
}
template <typename T> T __reduce_max_sync(unsigned lanes, T x, EMULATOR_LINE) {
    emulator::need_all(lanes, "__reduce_max_sync", line);
    return emulator::reduce<emulator::Greatest>("__reduce_max_sync", line, x);
}
inline void __syncwarp(unsigned lanes = ~0u, EMULATOR_LINE) {
    emulator::need_all(lanes, "__syncwarp", line);
    emulator::ballot("__syncwarp", line, false);
}

// ---- barriers of the thread block

inline void __syncthreads(EMULATOR_LINE) {
    emulator::barrier_sync({"__syncthreads", line}, 0, emulator::current->block->threads);
}
inline int __syncthreads_or(int x, EMULATOR_LINE) {
    return emulator::barrier_sync({"__syncthreads_or", line}, 0, emulator::current->block->threads, x != 0);
}

#endif
