// The kernel template for attention of a few query tokens over a long cache (flash decoding). attention.cu plans and
// launches calls, and merges partial results. The instances of the template are compiled in files of their own.
//
// A thread block takes a run of KV rows of several KV heads, whose rows are adjacent, and up to eight query columns of
// each (query heads of the KV head, times tokens). It copies encoded rows to shared memory with cp.async (load.cuh).
// Each warp takes one KV head and tiles of 32 rows. Scores and output are products of int8 matrices on the tensor cores
// (mma.cuh), or of binary16 matrices for K or V in f16. Byte permutes turn encoded rows into int8 operands
// (operands.cuh). A thread block rotates its queries once (query.cuh), and the output is rotated back once, after all
// its parts have been merged (softmax.cuh).
#ifndef TURBOQUANT_CUDA_ATTENTION_H
#define TURBOQUANT_CUDA_ATTENTION_H

#include "exact.cuh"
#include "mma.cuh"
#include "query.cuh"

namespace turboquant {
namespace cuda {
namespace {

// Adds the lanes' sums after the last tile, so that they are sums over all rows of the warp.
template <int D>
__device__ __forceinline__ void add_lanes(SoftmaxState & state, float (&sums)[D / 16][4], bool paired) {
    state.sum += __shfl_xor_sync(all_lanes, state.sum, 1);
    state.sum += __shfl_xor_sync(all_lanes, state.sum, 2);
    if (!paired) return;
#pragma unroll
    for (int i = 0; i < D / 16; ++i)
#pragma unroll
        for (int j = 0; j < 4; ++j) sums[i][j] += __shfl_xor_sync(all_lanes, sums[i][j], 2); // the low bytes
}

// Stores a warp's partial results of its query rows for merge_kernel.
template <KV TV, int D>
__device__ __forceinline__ void store_part(const AttentionCall & call, const Place & place, const SoftmaxState & state,
                                           const float (&sums)[D / 16][4], bool has_state, bool has_output) {
    const AttentionPlan & p = call.plan;
    const int part = blockIdx.x * p.row_tiles + place.row_tile;
    const auto at = [&](int column) { return query_row(call, place.stream, place.kv_head(), column) * p.parts + part; };
    if (has_state) call.states[at(place.first_column + place.quad)] = state;
    if (!has_output) return;
#pragma unroll
    for (int j = 0; j < 2; ++j) {
        const int column = place.first_column + 2 * place.in_quad + j;
        if (column < p.columns) store_output<TV, D>(call.partial + at(column) * D, sums, j, place.quad);
    }
}

// Finishes the query rows of a thread block that has computed all KV rows. The warps exchange their partial results in
// shared memory, and each warp merges and finishes some of the query rows.
template <KV TV, int D>
__device__ __forceinline__ void finish_rows(const AttentionCall & call, const Place & place, uint8_t * shared,
                                            const SoftmaxState & state, const float (&sums)[D / 16][4], bool has_state,
                                            bool has_output) {
    const Attention & a = call.a;
    const AttentionPlan & p = call.plan;
    const int lane = place.lane, warps = blockDim.x / 32;
    // results is [warp][column][D], states is [warp][column]
    float * results = reinterpret_cast<float *>(shared);
    SoftmaxState * states = reinterpret_cast<SoftmaxState *>(results + warps * p.column_tile * D);
    const bool some = __any_sync(all_lanes, saw_rows(state));
    __syncthreads();
    if (has_state) states[place.warp * p.column_tile + place.quad] = state;
    if (has_output && some) {
#pragma unroll
        for (int j = 0; j < 2; ++j) {
            const int row = place.warp * p.column_tile + 2 * place.in_quad + j;
            store_output<TV, D>(results + row * D, sums, j, place.quad);
        }
    }
    __syncthreads();
    for (int task = place.warp; task < p.block_heads * p.column_tile; task += warps) {
        const int h = task / p.column_tile, c = task % p.column_tile, column = place.first_column + c;
        if (column >= p.columns) continue;
        const int kv_head = place.first_head + h;
        const SoftmaxState sink = sink_state(a.sinks, kv_head * p.group + column % p.group);
        const int first = h * p.column_tile + c, apart = p.block_heads * p.column_tile; // between row tiles
        Merged<D / 32> row(largest_of(sink, states + first, apart, p.row_tiles, lane));
        row.MergedSum::add(sink);
#pragma unroll
        for (int r = 0; r < most_warps; ++r) {
            const SoftmaxState part = r < p.row_tiles ? states[first + r * apart] : SoftmaxState{nothing_seen, 0};
            float x[D / 32];
#pragma unroll
            for (int j = 0; j < D / 32; ++j)
                x[j] = saw_rows(part) ? results[(first + r * apart) * D + lane + 32 * j] : 0.0f;
            row.add(part, x);
        }
        float * out = a.dst + query_row(call, place.stream, kv_head, column) * D;
        constexpr int N = rotated_block<D>, B = N / 32;
#pragma unroll
        for (int b = 0; b < D / N; ++b) {
            float y[B];
#pragma unroll
            for (int j = 0; j < B; ++j) y[j] = row.y[b * B + j];
            finish<N>(y, row.sum, Layout<TV, D>::turbo, out + b * N, lane);
        }
    }
}

template <KV TK, KV TV, int D, bool Windowed>
__global__ void __launch_bounds__(32 * most_warps, D <= 128 ? 2 : 1)
    attention_kernel(const __grid_constant__ AttentionCall call) {
    extern __shared__ __align__(16) uint8_t shared[];
    let_next_start();
    const AttentionPlan & plan = call.plan;
    const Place place(call);
    const int quad = place.quad, in_quad = place.in_quad, kv_head = place.kv_head();
    const int column = place.first_column + (place.paired ? quad % 4 : quad); // of the lane's scores
    const bool valid = column < plan.columns;
    const int token = valid ? column / plan.group : 0;
    const int head = kv_head * plan.group + (valid ? column % plan.group : 0);
    Mask mask(call, place, token, head);
    const Stages<TK, TV, D> stages(call, place, shared);

    stages.prefetch_rows();
    if (threadIdx.x == 0) prefetch(call.a.q);
    if (mask.row && threadIdx.x == 0) prefetch(mask.row);
    if constexpr (Windowed) prefetch_exact(call, place);
    wait_for_previous();
    float values[4][D / 32];
    load_queries<D>(call, place, place.row_tile, plan.row_tiles, values);
    SoftmaxState state = {nothing_seen, 0};
    float sums[D / 16][4] = {};
    uint8_t * unused = shared + (plan.stages - 1) * stages.bytes; // start() does not fill the last stage
    uint8_t * scratch = unused + place.head_in_block * query_scratch<D>;
    if constexpr (Windowed) {
        ExactAttention<TV, D> exact(call, place, valid, token, head);
        stages.start();
        // A KV head's only warp shares the head's scratch memory with no other warp.
        const bool alone = plan.row_tiles == 1;
        exact.attend(values, reinterpret_cast<float *>(alone ? scratch : unused + place.warp * D * sizeof(float)), state,
                     sums);
        if (!alone) __syncthreads();
    } else {
        stages.start();
    }
    mask.load(place.begin + place.row_tile * tile_rows);
    uint32_t query[D / 32][4];
    const float to_score =
        prepare_queries<TK, D>(call, place, scratch, values, query);
    const KeyBias<TK, D> bias(query);
    const bool capped = call.a.soft_cap != 0;
    const float to_log2 = capped ? log2e : to_score * log2e;

    const int ahead = (plan.stages - 1) * stages.rows; // rows that are loaded in advance
    for (int row = 0, stage = 0; row < place.length; row += stages.rows, stage = stages.after(stage)) {
        stages.advance(row, stage, ahead);
        const int first = row + place.row_tile * tile_rows; // row of the warp's tile
        if (first >= place.length) continue;
        if (mask.hides_all()) {
            if (first + stages.rows < place.length) mask.load(place.begin + first + stages.rows);
            continue;
        }
        const uint8_t * memory = shared + stage * stages.bytes;
        float score[8];
        scores<TK, D>(query, bias, memory, stages, plan.pitch_k, in_quad, score);
        if (capped) cap_scores(call.a.soft_cap, to_score, score);
        mask.apply(to_log2, score);
        if (first + stages.rows < place.length) mask.load(place.begin + first + stages.rows); // for the next step
        const float largest = largest_score(score);
        float(&weight)[8] = score;
        const float correction = add_scores(state, largest, weight);
        correct_output<D>(sums, correction, in_quad);
        // Sparse V leaves out V of a tile whose weights are all at most the threshold. A NaN keeps the tile.
        if (!__any_sync(all_lanes, valid && !(exp2f(largest - state.largest) <= call.a.sparse_v))) continue;
        const uint8_t *row0 = memory + stages.v_row0, *row1 = memory + stages.v_row1;
        if (place.paired) output<TV, D, true>(sums, weight, row0, row1, plan.pitch_v, quad, in_quad);
        else output<TV, D, false>(sums, weight, row0, row1, plan.pitch_v, quad, in_quad);
    }
    add_lanes<D>(state, sums, place.paired);

    const bool has_state = in_quad == 0 && (!place.paired || quad < 4), has_output = !place.paired || in_quad < 2;
    if (plan.merged) store_part<TV, D>(call, place, state, sums, has_state && valid, has_output);
    else finish_rows<TV, D>(call, place, shared, state, sums, has_state, has_output);
}

} // namespace

using AttentionKernel = void (*)(AttentionCall);

// The kernel for a pair of types, or nullptr if there is none. The function of each head size is in a file of its own,
// so the instances can be compiled in parallel.
#define TURBOQUANT_DECLARE(D) AttentionKernel attention_kernel_##D(KV type_k, KV type_v, bool windowed);
TURBOQUANT_KV_HEADS(TURBOQUANT_DECLARE)
#undef TURBOQUANT_DECLARE

namespace {

template <int D, KV TK> AttentionKernel kernel_for(KV type_v, bool windowed) {
    switch (type_v) {
#define TURBOQUANT_CASE(name)                                                                     \
    case KV::name:                                                                                \
        if constexpr (covers_pair<TK, KV::name>)                                                  \
            return windowed ? attention_kernel<TK, KV::name, D, true> : attention_kernel<TK, KV::name, D, false>; \
        break;
        TURBOQUANT_KV(TURBOQUANT_CASE)
#undef TURBOQUANT_CASE
    }
    return nullptr;
}

template <int D> AttentionKernel kernel_for(KV type_k, KV type_v, bool windowed) {
    switch (type_k) {
#define TURBOQUANT_CASE(name) \
    case KV::name: return kernel_for<D, KV::name>(type_v, windowed);
        TURBOQUANT_KV(TURBOQUANT_CASE)
#undef TURBOQUANT_CASE
    }
    return nullptr;
}

} // namespace

} // namespace cuda
} // namespace turboquant

#endif
