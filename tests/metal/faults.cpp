// Kernels with mistakes that the emulator must see, and the same kernels without them.
#include <metal_stdlib>

using namespace metal;

struct Nothing {
    int unused;
};

#define PARAMETERS                                                                                                     \
    (constant Nothing &, device float * data, threadgroup uchar * memory, uint3 group, ushort lane, ushort simd)

template <int Beyond> kernel void write_all PARAMETERS {
    (void) memory;
    data[(group.x * 2 + simd) * 32 + lane + Beyond] = lane;
}

// Each thread takes the value of its neighbour in the next SIMD group, or in its own.
template <bool Write, bool Barrier, bool Neighbour> kernel void exchange PARAMETERS {
    threadgroup float * values = reinterpret_cast<threadgroup float *>(memory);
    if (Write) values[32 * simd + lane] = lane;
    if (Barrier) threadgroup_barrier(mem_flags::mem_threadgroup);
    else simdgroup_barrier(mem_flags::mem_threadgroup);
    const float x = values[32 * (Neighbour ? 1 - simd : simd) + (31 - lane)];
    data[64 * group.x + 32 * simd + lane] = x;
}

// A SIMD group that has no barrier of its own.
template <bool Barrier> kernel void reverse PARAMETERS {
    threadgroup float * values = reinterpret_cast<threadgroup float *>(memory);
    values[32 * simd + lane] = lane;
    if (Barrier) simdgroup_barrier(mem_flags::mem_threadgroup);
    const float x = values[32 * simd + 31 - lane];
    data[64 * group.x + 32 * simd + lane] = x;
}

// A SIMD group reads what a later one has written.
kernel void read_next PARAMETERS {
    threadgroup float * values = reinterpret_cast<threadgroup float *>(memory);
    values[32 * simd + lane] = lane;
    data[64 * group.x + 32 * simd + lane] = simd == 1 ? values[lane] : 0.0f;
}

// A thread reads what another one overwrites.
template <bool Barrier> kernel void overwrite PARAMETERS {
    threadgroup float * values = reinterpret_cast<threadgroup float *>(memory);
    values[32 * simd + lane] = lane;
    threadgroup_barrier(mem_flags::mem_threadgroup);
    const float x = values[32 + lane];
    if (Barrier) threadgroup_barrier(mem_flags::mem_threadgroup);
    if (simd == 1) values[32 + lane] = x + 1;
    data[64 * group.x + 32 * simd + lane] = x;
}

template <bool All> kernel void meet_at_barrier PARAMETERS {
    if (All || simd == 0) threadgroup_barrier(mem_flags::mem_threadgroup);
    (void) memory;
    data[64 * group.x + 32 * simd + lane] = lane;
}

template <bool All> kernel void sum_lanes PARAMETERS {
    (void) memory;
    float x = lane;
    if (All || lane < 16) x = simd_sum(x);
    data[64 * group.x + 32 * simd + lane] = x;
}

template <bool Own> kernel void write_apart PARAMETERS {
    (void) memory;
    if (lane == 0 && simd == 0) data[Own ? group.x : 0] = 1;
}

TURBOQUANT_KERNEL(write_all, write_all<0>)
TURBOQUANT_KERNEL(write_beyond, write_all<1>)
TURBOQUANT_KERNEL(exchange, exchange<true, true, true>)
TURBOQUANT_KERNEL(exchange_unwritten, exchange<false, true, true>)
TURBOQUANT_KERNEL(exchange_without_barrier, exchange<true, false, true>)
TURBOQUANT_KERNEL(exchange_in_simd_group, exchange<true, false, false>)
TURBOQUANT_KERNEL(reverse, reverse<true>)
TURBOQUANT_KERNEL(reverse_without_barrier, reverse<false>)
TURBOQUANT_KERNEL(read_next, read_next)
TURBOQUANT_KERNEL(overwrite, overwrite<true>)
TURBOQUANT_KERNEL(overwrite_without_barrier, overwrite<false>)
TURBOQUANT_KERNEL(meet_at_barrier, meet_at_barrier<true>)
TURBOQUANT_KERNEL(miss_barrier, meet_at_barrier<false>)
TURBOQUANT_KERNEL(sum_lanes, sum_lanes<true>)
TURBOQUANT_KERNEL(sum_half, sum_lanes<false>)
TURBOQUANT_KERNEL(write_apart, write_apart<true>)
TURBOQUANT_KERNEL(write_together, write_apart<false>)
