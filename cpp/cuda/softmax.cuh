// The softmax of a query row, computed over any part of the KV rows at a time; how parts are merged, and how the sum of
// all becomes the output.
#ifndef TURBOQUANT_CUDA_SOFTMAX_H
#define TURBOQUANT_CUDA_SOFTMAX_H

#include "device.cuh"

namespace turboquant {
namespace cuda {

// The largest score where no row was seen; finite, so that the difference of two of them is no NaN.
constexpr float nothing_seen = -1e30f;

// What was seen of the KV rows. A NaN among the scores makes the sum NaN, and is no largest score.
struct __align__(8) SoftmaxState {
    float largest; // score, as a power of two
    float sum;     // of the weights, 2^(score - largest)
};

namespace {

constexpr float log2e = 1.44269504f;

// The largest score of a column in a tile: lanes of a quad have eight rows each.
__device__ __forceinline__ float largest_score(const float (&s)[8]) {
    float top = -INFINITY;
#pragma unroll
    for (int i = 0; i < 8; ++i) top = fmaxf(top, s[i]);
    top = fmaxf(top, __shfl_xor_sync(all_lanes, top, 1));
    return fmaxf(top, __shfl_xor_sync(all_lanes, top, 2));
}

// The lane's scores of a tile, whose largest is `top`, to weights. `state` is that of the lane's rows, under the
// column's largest score. Returns the factor for what was summed so far.
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

// An attention sink counts as a row that has a score and no values.
__device__ __forceinline__ SoftmaxState sink_state(const float * sinks, int head) {
    return {sinks ? sinks[head] * log2e : -INFINITY, 1.0f};
}

// The largest score of the sink and of `count` parts, `stride` apart. Every warp finds it for itself.
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

// The merge: sums over parts, of which the caller knows the largest score.
struct MergedSum {
    float largest, sum = 0;

    __device__ __forceinline__ explicit MergedSum(float largest) : largest(largest) {}

    // Returns the part's factor. The sum may be NaN where no score was a number, too: it is added in any case.
    __device__ __forceinline__ float add(const SoftmaxState & part) {
        const float weight = saw_rows(part) ? exp2f(part.largest - largest) : 0.0f;
        sum += weight * part.sum;
        return weight;
    }
};

// With P of a row's values.
template <int P> struct Merged : MergedSum {
    float y[P] = {};

    using MergedSum::MergedSum;

    // x: the part's values; of a part that saw no row they need not be there. Else a NaN stays, however small the
    // factor is.
    __device__ __forceinline__ void add(const SoftmaxState & part, const float (&x)[P]) {
        const float weight = MergedSum::add(part);
        if (!saw_rows(part)) return;
#pragma unroll
        for (int j = 0; j < P; ++j) y[j] += weight * x[j];
    }
};

// Values of a row that are rotated together, where the type is turbo.
template <int D> constexpr int rotated_block = D < 128 ? D : 128;

// Values of a lane in a part in memory: V at a time, V * lane + 32 * j and those after it.
template <int D> constexpr int values_at_once = D / 32 < 4 ? D / 32 : 4;

// The finish: a warp's values of one block, lane + 32 j each, over the sum of the row's weights, and rotated back.
template <int N>
__device__ __forceinline__ void finish(float (&y)[N / 32], float sum, bool rotated, float * out, int lane) {
    const float inverse = sum == 0 ? 0.0f : 1.0f / sum; // zeros where nothing is seen; a NaN stays
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
