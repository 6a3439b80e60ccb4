// The softmax of a query row, which is computed in parts over the KV rows; the merge of the parts, and the step from
// their sum to the output.
#ifndef TURBOQUANT_CUDA_SOFTMAX_H
#define TURBOQUANT_CUDA_SOFTMAX_H

#include "device.cuh"

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

// The largest score of a column in a tile. Each lane of a quad has the scores of eight rows.
__device__ __forceinline__ float largest_score(const float (&s)[8]) {
    float top = -INFINITY;
#pragma unroll
    for (int i = 0; i < 8; ++i) top = fmaxf(top, s[i]);
    top = fmaxf(top, __shfl_xor_sync(all_lanes, top, 1));
    return fmaxf(top, __shfl_xor_sync(all_lanes, top, 2));
}

// Replaces the lane's scores of a tile by weights. `top` is the largest score of the column in the tile. `state` has
// the largest score of the column, and the sum over the lane's rows. Returns the factor of all earlier sums.
__device__ __forceinline__ float add_scores(SoftmaxState & state, float top, float (&s)[8]) {
    const float before = state.largest;
    state.largest = fmaxf(state.largest, top);
    const float correction = exp2f(before - state.largest);
    state.sum *= correction;
#pragma unroll
    for (int i = 0; i < 8; ++i) {
        s[i] = exp2f(s[i] - state.largest);
        state.sum += s[i];
    }
    return correction;
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

    // x: the part's values, which are ignored if the part has seen no row. Otherwise a NaN is kept, even if the factor
    // is 0.
    __device__ __forceinline__ void add(const SoftmaxState & part, const float (&x)[P]) {
        const float weight = MergedSum::add(part);
        if (!saw_rows(part)) return;
#pragma unroll
        for (int j = 0; j < P; ++j) y[j] += weight * x[j];
    }
};

// The block length of turbo types in heads of D values.
template <int D> constexpr int rotated_block = D < 128 ? D : 128;

// The number V of values that a lane reads from a part at a time: those from V * lane + 32 * j on, where j is a
// multiple of V.
template <int D> constexpr int values_at_once = D / 32 < 4 ? D / 32 : 4;

// Finishes a block of a query row: divides the values by the sum of the weights, rotates them back, and stores them. A
// lane has elements lane + 32 j.
template <int N>
__device__ __forceinline__ void finish(float (&y)[N / 32], float sum, bool rotated, float * out, int lane) {
    const float inverse = sum == 0 ? 0.0f : 1.0f / sum; // zeros if no row was seen; a NaN stays NaN
#pragma unroll
    for (int j = 0; j < N / 32; ++j) y[j] *= inverse;
    if (rotated) transform_warp<N, true>(y);
#pragma unroll
    for (int j = 0; j < N / 32; ++j) out[lane + 32 * j] = y[j];
}

} // namespace
} // namespace cuda
} // namespace turboquant

#endif
