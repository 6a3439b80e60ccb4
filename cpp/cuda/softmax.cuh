// The softmax of a query row, which is computed in parts over the KV rows; the merge of the parts, and the step from
// their sum to the output.
#ifndef TURBOQUANT_CUDA_SOFTMAX_H
#define TURBOQUANT_CUDA_SOFTMAX_H

#include "device.cuh"
#include "turboquant_cuda.h"

namespace turboquant {
namespace cuda {

// The largest score of a part that has seen no row. It is finite, so that the difference of two such scores is not NaN.
constexpr float nothing_seen = -1e30f;

// The state of the softmax over the KV rows seen so far. A NaN score makes the sum NaN and is ignored by `largest`.
struct __align__(8) SoftmaxState {
    float largest; // score; scores are multiplied by log2e
    float sum;     // of the weights 2^(score - largest)
};

namespace {

constexpr float log2e = 1.44269504f;

// Combines a value of each lane over the lanes that have the same columns, those with the same place in their quads.
template <typename Combine> __device__ __forceinline__ float over_quads(float x, const Combine & combine) {
#pragma unroll
    for (int h = 4; h < 32; h *= 2) x = combine(x, __shfl_xor_sync(all_lanes, x, h));
    return x;
}

// Sums each of B values over the warp, and leaves the sum of number lane % B in a lane. B is a power of two.
template <int B> __device__ __forceinline__ float sum_for_lanes(float (&x)[B], int lane) {
#pragma unroll
    for (int n = B / 2; n > 0; n /= 2)
#pragma unroll
        for (int i = 0; i < n; ++i) {
            const bool upper = lane & n;
            const float other = __shfl_xor_sync(all_lanes, upper ? x[i] : x[i + n], n);
            x[i] = (upper ? x[i + n] : x[i]) + other;
        }
#pragma unroll
    for (int h = B; h < 32; h *= 2) x[0] += __shfl_xor_sync(all_lanes, x[0], h);
    return x[0];
}

// The largest score of each of a lane's columns in a tile.
template <int R, int C>
__device__ __forceinline__ void largest_scores(const float (&s)[R][C], float (&top)[C]) {
#pragma unroll
    for (int h = 0; h < C; ++h) {
        top[h] = s[0][h];
#pragma unroll
        for (int j = 1; j < R; ++j) top[h] = fmaxf(top[h], s[j][h]);
        top[h] = over_quads(top[h], [](float a, float b) { return fmaxf(a, b); });
    }
}

// Makes the largest score of each column at least `top`. `correction` is set to the factor of all earlier sums, and that
// of the weights is corrected.
template <int C>
__device__ __forceinline__ void raise_largest(SoftmaxState (&state)[C], const float (&top)[C], float (&correction)[C]) {
#pragma unroll
    for (int h = 0; h < C; ++h) {
        const float before = state[h].largest;
        state[h].largest = fmaxf(before, top[h]);
        correction[h] = exp2f(before - state[h].largest);
        state[h].sum *= correction[h];
    }
}

// Replaces the lane's scores of a tile by weights. `top` is the largest score of each column in the tile. A state has
// the largest score of its column, and the sum over the lane's rows. `correction` is set to the factor of all earlier
// sums.
template <int R, int C>
__device__ __forceinline__ void add_scores(SoftmaxState (&state)[C], const float (&top)[C], float (&s)[R][C],
                                           float (&correction)[C]) {
    raise_largest(state, top, correction);
#pragma unroll
    for (int h = 0; h < C; ++h) {
#pragma unroll
        for (int j = 0; j < R; ++j) {
            s[j][h] = exp2f(s[j][h] - state[h].largest);
            state[h].sum += s[j][h];
        }
    }
}

// An attention sink counts as a row with a score and without values.
__device__ __forceinline__ SoftmaxState sink_state(const float * sinks, int head) {
    return {sinks ? sinks[head] * log2e : -INFINITY, 1.0f};
}

// The largest score of the sink and of `count` parts at a distance of `stride`. Every warp computes it.
__device__ __forceinline__ float largest_of(const SoftmaxState & sink, const SoftmaxState * parts, int stride,
                                            int count, int lane) {
    float top = fmaxf(sink.largest, nothing_seen);
#pragma unroll 4
    for (int i = lane; i < count; i += 32) top = fmaxf(top, parts[i * stride].largest);
#pragma unroll
    for (int h = 16; h > 0; h /= 2) top = fmaxf(top, __shfl_xor_sync(all_lanes, top, h));
    return top;
}

__device__ __forceinline__ bool saw_rows(const SoftmaxState & part) { return !(part.largest <= nothing_seen); }

// The merge of parts: the sum of weights relative to the largest score of all parts, which the caller computes.
struct MergedSum {
    float largest, sum = 0;

    __device__ __forceinline__ explicit MergedSum(float largest) : largest(largest) {}

    // Returns the factor of the part. The sum of a part without a largest score is added as well, because it is NaN if
    // a score was NaN.
    __device__ __forceinline__ float add(const SoftmaxState & part) {
        const float weight = saw_rows(part) ? exp2f(part.largest - largest) : 0.0f;
        sum += weight * part.sum;
        return weight;
    }
};

// The merge of parts with P values of a row.
template <int P> struct Merged : MergedSum {
    float y[P] = {};

    using MergedSum::MergedSum;

    // Makes the sums relative to a score that is not smaller than the largest one so far.
    __device__ __forceinline__ void change_largest(float score) {
        const float factor = exp2f(largest - score);
        largest = score;
        sum *= factor;
#pragma unroll
        for (int j = 0; j < P; ++j) y[j] *= factor;
    }

    // x: the part's values, which are ignored if the part has seen no row. Otherwise a NaN is kept, even if the factor
    // is 0.
    __device__ __forceinline__ void add(const SoftmaxState & part, const float (&x)[P]) {
        const float weight = MergedSum::add(part);
        if (!saw_rows(part)) return;
#pragma unroll
        for (int j = 0; j < P; ++j) y[j] += weight * x[j];
    }
};

// The number V of values that a lane reads from a part at a time: those from V * lane + 32 * j on, where j is a
// multiple of V.
template <int D> constexpr int values_at_once = D % 128 == 0 ? 4 : D % 64 == 0 ? 2 : 1;

// Stores B blocks of 32 values, one of each lane, rounded as by ggml's kernel for the operand of a product with
// quantized weights (quantize_q8_1 in ggml-cuda/quantize.cu).
template <int B> __device__ __forceinline__ void store_quantized(QuantizedValues * to, const float (&x)[B], int lane) {
    float sums[B];
#pragma unroll
    for (int j = 0; j < B; ++j) sums[j] = x[j];
    const float sum = sum_for_lanes(sums, lane);
#pragma unroll
    for (int j = 0; j < B; ++j) {
        const float largest = __uint_as_float(warp_max(__float_as_uint(fabsf(x[j]))));
        const float inverse = largest > 1e-30f ? __fdividef(127.0f, largest) : 0.0f;
        to[j].values[lane] = int8_t(__float2int_rn(x[j] * inverse));
        if (lane == j) {
            to[j].scale = __half_as_ushort(__float2half(largest * (1.0f / 127.0f)));
            to[j].sum = __half_as_ushort(__float2half(sum));
        }
    }
}

// Finishes a block of a query row: divides the values by the sum of the weights, rotates them back, and stores them in
// `out` and, if it is not nullptr, in `quantized`. A lane has elements lane + 32 j.
template <int N>
__device__ __forceinline__ void finish(float (&y)[N / 32], float sum, bool rotated, float * out, int lane,
                                       QuantizedValues * quantized = nullptr) {
    const float inverse = sum == 0 ? 0.0f : 1.0f / sum; // zeros if no row was seen; a NaN stays NaN
#pragma unroll
    for (int j = 0; j < N / 32; ++j) y[j] *= inverse;
    if (rotated) transform_warp<N, true>(y);
#pragma unroll
    for (int j = 0; j < N / 32; ++j) out[lane + 32 * j] = y[j];
    if (quantized) store_quantized(quantized, y, lane);
}

} // namespace
} // namespace cuda
} // namespace turboquant

#endif
