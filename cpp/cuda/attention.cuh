// The kernel template for attention of a few query tokens over a long cache (flash decoding). attention.cu plans and
// launches calls, and merges partial results. The instances of the template are compiled in files of their own.
//
// A thread block takes a run of KV rows of several KV heads, whose rows are adjacent, and up to eight query columns of
// each (query heads of the KV head, times tokens). It copies encoded rows to shared memory (load.cuh).
// Each warp takes one KV head and tiles of 32 rows. Scores and output are products of int8 matrices on the tensor cores
// (mma.cuh), or of binary16 matrices for K or V in f16. Byte permutes turn encoded rows into int8 operands
// (operands.cuh). A thread block rotates its queries once (query.cuh), and the output is rotated back once, after all
// its parts have been merged (softmax.cuh).
#ifndef TURBOQUANT_CUDA_ATTENTION_H
#define TURBOQUANT_CUDA_ATTENTION_H

#include "exact.cuh"
#include "mma.cuh"
#include "query.cuh"

#include <type_traits>

namespace turboquant {
namespace cuda {
namespace {

// Stores a warp's partial results of its query rows for merge_kernel.
template <KV TV, int D, int C>
__device__ __forceinline__ void store_part(const AttentionCall & call, const Place & place,
                                           const LaneColumns<C> & columns, const SoftmaxState (&state)[C],
                                           const Sums<D, C> & sums) {
    const int part = call.first_part + blockIdx.x * place.row_tiles + place.row_tile;
#pragma unroll
    for (int h = 0; h < C; ++h) {
        if (!columns.valid[h]) continue;
        const int64_t at = query_row(call, place.stream, place.kv_head(), columns.number[h]) * call.all_parts + part;
        if (place.quad == 0) call.states[at] = state[h];
        store_output_global<TV, D, C>(call.partial + at * D, sums, h, place.quad);
    }
}

// Finishes the query rows of a thread block that has computed all KV rows. The warps exchange their partial results in
// shared memory, and each warp merges and finishes some of the query rows. Slots of an exact window are only a part of
// their query rows, so these are merged, and rotated as the other parts are.
template <bool OfSlots, KV TV, int D, int C>
__device__ __forceinline__ void finish_rows(const AttentionCall & call, const Place & place, uint8_t * shared,
                                            const SoftmaxState (&state)[C], const Sums<D, C> & sums) {
    const Attention & a = call.a;
    const AttentionPlan & p = call.plan;
    const int lane = place.lane, warps = blockDim.x / 32;
    // results is [warp][column][D], states is [warp][column]
    float * results = reinterpret_cast<float *>(shared);
    SoftmaxState * states = reinterpret_cast<SoftmaxState *>(results + warps * p.column_tile * D);
    __syncthreads();
#pragma unroll
    for (int h = 0; h < C; ++h) {
        const int row = place.warp * p.column_tile + C * place.in_quad + h;
        if (place.quad == 0) states[row] = state[h];
        if (saw_rows(state[h])) store_output<TV, D, C>(results + row * D, sums, h, place.quad);
    }
    __syncthreads();
    for (int task = place.warp; task < place.block_heads * p.column_tile; task += warps) {
        const int h = task / p.column_tile, c = task % p.column_tile, column = place.first_column + c;
        if (column >= place.end_column) continue;
        const int kv_head = place.first_head + h;
        const SoftmaxState sink = sink_state(a.sinks, kv_head * p.group + column % p.group);
        const int first = h * p.column_tile + c, apart = place.block_heads * p.column_tile; // between row tiles
        Merged<D / 32> row(largest_of(sink, states + first, apart, place.row_tiles, lane));
        row.MergedSum::add(sink);
#pragma unroll
        for (int r = 0; r < most_warps; ++r) {
            const SoftmaxState part = r < place.row_tiles ? states[first + r * apart] : SoftmaxState{nothing_seen, 0};
            float x[D / 32];
#pragma unroll
            for (int j = 0; j < D / 32; ++j)
                x[j] = saw_rows(part) ? results[(first + r * apart) * D + lane + 32 * j] : 0.0f;
            row.add(part, x);
        }
        const int64_t query = query_row(call, place.stream, kv_head, column);
        const int64_t part = query * call.all_parts + call.first_part + blockIdx.x;
        if (OfSlots && lane == 0) call.states[part] = {row.largest, row.sum};
        float * out = OfSlots ? call.partial + part * D : a.dst + query * D;
        constexpr int N = rotated_block<D>, B = N / 32;
#pragma unroll
        for (int b = 0; b < D / N; ++b) {
            float y[B];
#pragma unroll
            for (int j = 0; j < B; ++j) y[j] = row.y[b * B + j];
            if constexpr (OfSlots) {
                if (call.rotates_part) transform_warp<N, false>(y);
#pragma unroll
                for (int j = 0; j < B; ++j) out[b * N + lane + 32 * j] = y[j];
            } else {
                finish<N>(y, row.sum, Layout<TV, D>::turbo, out + b * N, lane);
            }
        }
    }
}

// Whether the rows are the slots of an exact window, and not a cache.
template <KV TK, KV TV> constexpr bool is_slots = TK == KV::q8_0 && TV == KV::q8_0;

// The loop over the tiles of a warp.
enum class Loop {
    simple, // for few tiles, where the code that a warp executes once takes longest, and for eight columns
    kept,   // products are kept over tiles (KeptProducts)
    runs    // the same, where the rows of a thread block's heads are runs (Stages)
};
constexpr int least_kept_tiles = 3; // of a warp
constexpr int kept_rows = 1024;     // of a thread block, after which its warps choose the unit of products again

// Whether there are kernels with the other loops. Products of more than a block of V, or of eight columns, would take
// too many registers.
template <KV TV, int D> constexpr bool keeps_products = Layout<TV, D>::turbo && Layout<TV, D>::block == D;

// Gathered: whether lists name the rows of each token. C: columns of a lane. Thread blocks have four or eight columns.
template <KV TK, KV TV, int D, bool Windowed, bool Gathered, int C, Loop L>
__global__ void __launch_bounds__(32 * most_warps, resident_blocks(D, C))
    attention_kernel(const __grid_constant__ AttentionCall call) {
    constexpr bool of_slots = is_slots<TK, TV>, keeps = L != Loop::simple;
    extern __shared__ __align__(16) uint8_t all_shared[];
    if (!call.triggers_late) let_next_start();
    uint8_t * shared = all_shared + barrier_bytes;
    Place place(call, Gathered, L == Loop::runs);
    const AttentionPlan & plan = call.plan;
    const LaneColumns<C> columns(call, place);
    Mask<C> mask(call, place, columns);
    const Stages<TK, TV, D, Gathered, L == Loop::runs> stages(call, place, shared);

    stages.prefetch_rows();
    if (threadIdx.x == 0) {
        prefetch(call.a.q);
        if (mask.row) prefetch(mask.row);
        if (plan.merged) prefetch(call.partial);
        if constexpr (Windowed) prefetch(call.a.exact.mask);
    }
    if constexpr (Windowed) prefetch_exact(call, place);
    stages.start_barriers();
    if (!call.waits_last) wait_for_previous();
    if (!Windowed && call.triggers_late) let_next_start();
    if (Gathered && !place.take_list(call)) mask.show_list(place.begin + place.length);
    uint8_t * unused = shared + (plan.stages - 1) * stages.bytes; // start() does not fill the last stage
    uint8_t * scratch = unused + place.head_in_block * query_scratch(D);
    SoftmaxState state[C];
#pragma unroll
    for (int h = 0; h < C; ++h) state[h] = {nothing_seen, 0};
    Sums<D, C> sums = {};
    float q[4][D / 32]; // the four columns, if there are not eight
    Columns<TK, D> own_columns;
    Query<TK, D, C> query;
    const bool alone = place.row_tiles == 1; // the warp shares the scratch memory of its KV head with no other warp
    const int64_t first_row = place.begin + place.row_tile * tile_rows; // of the warp
    // Loads the masks of the warp's tiles from the step on that begins with `row`.
    const auto load_masks = [&](int row) {
        mask.load(call, place, first_row + row, stages.rows, place.length - row);
    };
    const auto load = [&] {
        if constexpr (C == 1) load_columns<D>(call, place, 0, q);
        else own_columns.load(call, place);
    };
    const auto prepare = [&] {
        if constexpr (C == 1) own_columns.take(place, q);
        own_columns.template write_all<4 * C>(call, place, scratch);
    };
    const auto sync_head = [&] {
        if (alone) __syncwarp();
        else __syncthreads();
    };
    const auto prepared = [&] {
        sync_head();
        query = Query<TK, D, C>(place, scratch);
    };
    if constexpr (!Windowed) {
        load_masks(0);
        load();
        stages.start();
        prepare();
        prepared();
    } else {
        bool needed = place.length > 0; // whether a query may see rows of the cache that the thread block has
        if (needed) load_masks(0);
        if (needed || C == 1) load();
        ExactAttention<TV, D, Gathered, C> exact(call, place, columns);
        if (needed && plan.likely_hidden) {
            mask.examine();
            needed = __syncthreads_or(!mask.hides_next());
        }
        if (needed) {
            stages.start();
            prepare();
            prepared();
            sync_head();
        } else {
            place.length = 0;
        }
        if (call.triggers_late) let_next_start();
        float * row = reinterpret_cast<float *>(alone ? scratch : unused + place.warp * D * sizeof(float));
        if (exact.any()) exact.attend(q, row, state, sums);
    }
    if (stages.bulk()) before_bulk_copies();
    const uint32_t zero = unknown_zero();
    const typename Layout<TK, D>::LookUpLevels look_up_keys(zero);
    const typename Layout<TV, D>::LookUpLevels look_up_values(zero);

    const int ahead = (plan.stages - 1) * stages.rows; // rows that are loaded in advance
    mask.examine();
    [[maybe_unused]] std::conditional_t<keeps, KeptProducts<TV, D>, int> kept;
    int stage = -1, parity = 1;
    for (int row = 0; row < place.length; row += stages.rows) {
        stage = stages.after(stage);
        parity ^= stage == 0;
        stages.advance(row, stage, parity, ahead);
        const int first = row + place.row_tile * tile_rows; // row of the warp's tile
        if (first >= place.length) continue;
        if (!mask.examined()) {
            load_masks(row);
            mask.examine();
            if constexpr (keeps)
                if (row % kept_rows < 8 * stages.rows) kept.choose_again();
        }
        const bool visible = mask.shows_next(), hidden = mask.hides_next();
        mask.advance();
        if (hidden) continue;
        const auto memory = [&](int offset) { return shared_pointer(stage * stages.bytes + offset); };
        float score[lane_rows][C];
        scores<TK, D, C>(query, look_up_keys, memory(stages.k_row), stages.pitch_k, place.in_quad, score);
        scale_scores<C>(call.a.soft_cap, query.factor, score);
        if (!visible) mask.apply(call, columns, place.begin + first, score);
        if constexpr (keeps) {
            if (!kept.weigh(sums, state, score, call.a.sparse_v)) continue;
            kept.add(sums, score, visible, look_up_values, memory(stages.v_row), memory(stages.v_row0),
                     memory(stages.v_row1), stages.pitch_v, place.quad);
            continue;
        }
        float largest[C], correction[C];
        float(&weight)[lane_rows][C] = score;
        largest_scores(score, largest);
        add_scores(state, largest, weight, correction);
        correct_output<D, C>(sums, correction);
        // Sparse V leaves out V of a tile whose weights are all at most the threshold. A NaN keeps the tile.
        bool needed = false;
#pragma unroll
        for (int h = 0; h < C; ++h)
            needed = needed || (columns.valid[h] && !(exp2f(largest[h] - state[h].largest) <= call.a.sparse_v));
        if (!__any_sync(all_lanes, needed)) continue;
        output<TV, D, C>(sums, look_up_values, weight, visible, memory(stages.v_row), memory(stages.v_row0),
                         memory(stages.v_row1), stages.pitch_v, place.quad);
    }
    if constexpr (keeps) kept.flush(sums);
#pragma unroll
    for (int h = 0; h < C; ++h) state[h].sum = over_quads(state[h].sum, [](float a, float b) { return a + b; });
    if (call.waits_last) wait_for_previous();
    if (Windowed || (!of_slots && plan.merged)) store_part<TV, D, C>(call, place, columns, state, sums);
    else finish_rows<of_slots, TV, D, C>(call, place, shared, state, sums);
}

} // namespace

using AttentionKernel = void (*)(AttentionCall);

struct KernelChoice {
    KV type_k, type_v;
    bool windowed, four; // four: whether a thread block has four columns, not eight
    Loop loop;           // of four columns, if there are kernels with it
};

// The kernel, or the one that gathers rows, or nullptr if there is none for the pair of types. The functions are in
// files of their own, so the instances can be compiled in parallel.
#define TURBOQUANT_DECLARE(D)                                          \
    AttentionKernel attention_kernel_##D(const KernelChoice & choice); \
    AttentionKernel gathering_kernel_##D(const KernelChoice & choice);
TURBOQUANT_KV_HEADS(TURBOQUANT_DECLARE)
#undef TURBOQUANT_DECLARE

namespace {

template <KV TK, KV TV, int D, bool Windowed, bool Gathered>
AttentionKernel kernel_for_loop(const KernelChoice & choice) {
    if (!choice.four) return attention_kernel<TK, TV, D, Windowed, Gathered, 2, Loop::simple>;
    if constexpr (keeps_products<TV, D>) {
        if constexpr (Kind<TK>::turbo)
            if (choice.loop == Loop::runs) return attention_kernel<TK, TV, D, Windowed, Gathered, 1, Loop::runs>;
        if (Gathered || choice.loop != Loop::simple)
            return attention_kernel<TK, TV, D, Windowed, Gathered, 1, Loop::kept>;
    }
    if constexpr (!Gathered || !keeps_products<TV, D>)
        return attention_kernel<TK, TV, D, Windowed, Gathered, 1, Loop::simple>;
    return nullptr;
}

template <KV TK, KV TV, int D, bool Gathered> AttentionKernel kernel_for_types(const KernelChoice & choice) {
    return choice.windowed ? kernel_for_loop<TK, TV, D, true, Gathered>(choice)
                           : kernel_for_loop<TK, TV, D, false, Gathered>(choice);
}

// Whether there is a kernel that gathers rows. Any pair could have one; those with V in q8_0, or with a side in f16, are
// rare, and each pair has four kernels for every head.
template <KV TK, KV TV> constexpr bool can_gather = (Kind<TK>::turbo || TK == KV::q8_0) && Kind<TV>::turbo;

template <KV TK, int D, bool Gathered> AttentionKernel kernel_for_key(const KernelChoice & choice) {
    if constexpr (is_slots<TK, TK> && !Gathered)
        if (choice.type_v == TK)
            return choice.four ? attention_kernel<TK, TK, D, false, false, 1, Loop::simple>
                               : attention_kernel<TK, TK, D, false, false, 2, Loop::simple>;
    switch (choice.type_v) {
#define TURBOQUANT_CASE(name)                                                                      \
    case KV::name:                                                                                 \
        if constexpr (covers_pair<TK, KV::name, D> && (!Gathered || can_gather<TK, KV::name>))     \
            return kernel_for_types<TK, KV::name, D, Gathered>(choice);                              \
        break;
        TURBOQUANT_KV(TURBOQUANT_CASE)
#undef TURBOQUANT_CASE
    }
    return nullptr;
}

template <int D, bool Gathered> AttentionKernel kernel_for(const KernelChoice & choice) {
    switch (choice.type_k) {
#define TURBOQUANT_CASE(name) \
    case KV::name: return kernel_for_key<KV::name, D, Gathered>(choice);
        TURBOQUANT_KV(TURBOQUANT_CASE)
#undef TURBOQUANT_CASE
    }
    return nullptr;
}

} // namespace

} // namespace cuda
} // namespace turboquant

#endif
