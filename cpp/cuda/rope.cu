// Rotary position embeddings (RoPE) of the queries and keys of a layer, in one launch. Positions and powers are read
// and computed while the preceding kernel ends, and the next kernel may start at once.
//
// The expressions are those of ggml's kernel (ggml-cuda/rope.cu), and this file is compiled with the flags of its
// target, so that a cache of a turbo type has the same queries and keys as a cache in f16.
#include "device.cuh"
#include "launch.h"

#include <algorithm>

namespace turboquant {
namespace cuda {
namespace {

constexpr int rope_warps = 4;      // of a thread block
constexpr int most_heads = 8;      // of a warp
constexpr int enough_warps = 2048; // that keep a GPU busy; with more, a warp takes more heads and computes angles once

struct RopeCall {
    Rope side[2];
    RopeAngles angles;
    int heads;     // that a warp takes
    int groups[2]; // of so many heads
};

// The cosine and the sine of the angle of pair number `pair`, times the magnitude. power: base^pair.
__device__ __forceinline__ float2 rotation_of(const RopeAngles & a, int pair, int position, float power, float factor) {
    const float extrapolated = float(position) * power / factor;
    float angle = a.scale * extrapolated, magnitude = a.magnitude;
    if (a.extrapolation != 0.0f) {
        const float y = (float(pair) - a.ramp[0]) / fmaxf(0.001f, a.ramp[1] - a.ramp[0]);
        const float mix = (1.0f - fminf(1.0f, fmaxf(0.0f, y))) * a.extrapolation;
        angle = angle * (1 - mix) + extrapolated * mix;
        magnitude *= 1.0f + 0.1f * logf(1.0f / a.scale);
    }
    return make_float2(cosf(angle) * magnitude, sinf(angle) * magnitude);
}

// P: pairs of a lane. A thread block has a token, and each warp some of its heads.
template <int P>
__global__ void __launch_bounds__(32 * rope_warps) rope_kernel(const __grid_constant__ RopeCall call) {
    let_next_start();
    const RopeAngles & a = call.angles;
    const int lane = threadIdx.x % 32, pairs = a.values / 2;
    int group = int(blockIdx.y) * rope_warps + int(threadIdx.x) / 32;
    const bool second = group >= call.groups[0];
    group -= second ? call.groups[0] : 0;
    if (group >= call.groups[second]) return;
    const Rope & side = call.side[second];
    const int first_head = group * call.heads, end_head = min(first_head + call.heads, side.heads);
    const int64_t token = blockIdx.x;
    const int position = a.positions[token];
    float power[P], factor[P];
#pragma unroll
    for (int i = 0; i < P; ++i) {
        const int pair = lane + 32 * i;
        power[i] = powf(a.base, float(pair));
        factor[i] = a.factors && pair < pairs ? a.factors[pair] : 1.0f;
    }
    const auto first_of = [&](int pair) { return a.first + (a.adjacent ? 2 * pair : pair); };
    const int apart = a.adjacent ? 1 : pairs;
    wait_for_previous();
    float2 turn[P];
#pragma unroll 1
    for (int head = first_head; head < end_head; ++head) {
        const float * from = reinterpret_cast<const float *>(row_at(side.src, head, token, 0));
        float * to = reinterpret_cast<float *>(row_at(side.dst, head, token, 0));
        float x[P], y[P];
#pragma unroll
        for (int i = 0; i < P; ++i) {
            const int pair = lane + 32 * i;
            x[i] = pair < pairs ? from[first_of(pair)] : 0.0f;
            y[i] = pair < pairs ? from[first_of(pair) + apart] : 0.0f;
        }
        if (head == first_head) // while the rows are loaded
#pragma unroll
            for (int i = 0; i < P; ++i) turn[i] = rotation_of(a, lane + 32 * i, position, power[i], factor[i]);
#pragma unroll
        for (int i = 0; i < P; ++i) {
            const int pair = lane + 32 * i;
            if (pair >= pairs) continue;
            to[first_of(pair)] = x[i] * turn[i].x - y[i] * turn[i].y;
            to[first_of(pair) + apart] = x[i] * turn[i].y + y[i] * turn[i].x;
        }
        if (from == to) continue;
        for (int e = lane; e < side.head; e += 32)
            if (e < a.first || e >= a.first + a.values) to[e] = from[e];
    }
}

} // namespace

bool rope_supports(const RopeAngles & a) {
    return a.values >= 2 && a.values % 2 == 0 && a.values <= 256 && a.tokens < int64_t(1) << 31;
}

cudaError_t rope(const Rope & first, const Rope & second, const RopeAngles & angles, cudaStream_t stream) {
    if (!rope_supports(angles)) return cudaErrorNotSupported;
    RopeCall call = {{first, second}, angles, 1, {}};
    const int64_t rows = angles.tokens * (first.heads + second.heads);
    if (rows == 0) return cudaSuccess;
    call.heads = int(std::min<int64_t>(most_heads, std::max<int64_t>(1, rows / enough_warps)));
    for (int i = 0; i < 2; ++i) call.groups[i] = (call.side[i].heads + call.heads - 1) / call.heads;
    const int groups = call.groups[0] + call.groups[1];
    const dim3 grid(unsigned(angles.tokens), unsigned((groups + rope_warps - 1) / rope_warps));
    const auto kernel = angles.values <= 64 ? rope_kernel<1> : angles.values <= 128 ? rope_kernel<2> : rope_kernel<4>;
    return launch(kernel, grid, dim3(32 * rope_warps), 0, stream, call);
}

} // namespace cuda
} // namespace turboquant
