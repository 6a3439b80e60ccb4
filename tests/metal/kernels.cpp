// The kernels, compiled for the emulator.
#include "attention.metal"
#include "codec.metal"

// Only tests rotate rows by themselves.
namespace turboquant {

template <int N>
kernel void rotate(constant CodecArguments & a, device const float * src, device float * dst, uint3 group, ushort lane,
                   ushort simd) {
    const ulong at = ulong(group.x * simdgroups + simd) * N;
    if (at >= ulong(a.blocks) * N) return;
    float y[N / 32];
    for (int j = 0; j < N / 32; ++j) y[j] = src[at + lane + 32 * j];
    transform<N>(y, a.half_floats != 0, lane); // the field stands for the inverse
    for (int j = 0; j < N / 32; ++j) dst[at + lane + 32 * j] = y[j];
}

TURBOQUANT_KERNEL(rotate_128, rotate<128>)
TURBOQUANT_KERNEL(rotate_64, rotate<64>)
TURBOQUANT_KERNEL(rotate_32, rotate<32>)

} // namespace turboquant
