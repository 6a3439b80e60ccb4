// The exact window: rows of K and V with high precision, which a warp adds to its columns, before tiles of the cache if
// it has any, while the first of these are copied to shared memory. What a batch leaves in the slots is stored by the
// kernel that merges the parts, after all reads of the slots.
#ifndef TURBOQUANT_CUDA_EXACT_H
#define TURBOQUANT_CUDA_EXACT_H

#include "mask.cuh"
#include "mma.cuh"
#include "query.cuh"

namespace turboquant {
namespace cuda {
namespace {

constexpr int most_exact_rows = 2; // of a warp, if more thread blocks can take them

// The exact rows of a KV head: the slots, then the batch's own rows.
struct ExactHead {
    const char *k, *v, *batch_k, *batch_v; // row 0
    int slots, rows;

    // Row number i in the order in which parts take rows: the batch's rows are the first, so that no part waits for
    // them last.
    __device__ __forceinline__ int in_turn(int i) const { return i < rows - slots ? slots + i : i - (rows - slots); }

    ExactHead() = default;
    __device__ __forceinline__ ExactHead(const Attention & a, int kv_stream, int kv_head)
        : slots(int(a.exact.slots)), rows(int(a.exact.slots) + a.tokens) {
        const ExactRows & x = a.exact;
        const auto at = [&](const void * base, int64_t stream_bytes, int64_t head_bytes) {
            return static_cast<const char *>(base) + kv_stream * stream_bytes + kv_head * head_bytes;
        };
        k = at(x.k, x.k_stream, x.k_head);
        v = at(x.v, x.v_stream, x.v_head);
        batch_k = at(x.batch_k, x.batch_k_stream, x.batch_k_head);
        batch_v = at(x.batch_v, x.batch_v_stream, x.batch_v_head);
    }
};

// A lane's elements of an exact row of K and of V, those of lane_element, as they lie in memory. K and V are read at the
// same time, and nothing is computed from them at once, so that other work can go on.
template <int D> struct ExactRow {
    static constexpr int P = D / 32;
    enum { q8_0, f16, f32 } type;
    // A float or a number in f16 in each, or two of q8_0 in each of the first ones. If the lane has no run, one of q8_0
    // in each, with the scale of its block in the upper half.
    uint32_t k[P], v[P];
    uint32_t scale_k, scale_v;

    ExactRow() = default;
    __device__ __forceinline__ ExactRow(const ExactRows & x, const ExactHead & head, int row, int lane) {
        if (row >= head.slots) {
            type = f32;
            const char *from_k = head.batch_k + (row - head.slots) * x.batch_k_row,
                       *from_v = head.batch_v + (row - head.slots) * x.batch_v_row;
#pragma unroll
            for (int j = 0; j < P; ++j) {
                k[j] = reinterpret_cast<const uint32_t *>(from_k)[lane_element<D>(lane, j)];
                v[j] = reinterpret_cast<const uint32_t *>(from_v)[lane_element<D>(lane, j)];
            }
            return;
        }
        const uint8_t *from_k = reinterpret_cast<const uint8_t *>(head.k + row * x.k_row),
                      *from_v = reinterpret_cast<const uint8_t *>(head.v + row * x.v_row);
        type = x.type == KV::f16 ? f16 : q8_0;
        if (type == f16) {
#pragma unroll
            for (int j = 0; j < P; ++j) {
                k[j] = load_u16(from_k + 2 * lane_element<D>(lane, j));
                v[j] = load_u16(from_v + 2 * lane_element<D>(lane, j));
            }
        } else if constexpr (!has_runs<D>) {
#pragma unroll
            for (int j = 0; j < P; ++j) {
                k[j] = from_k[34 * j + 2 + lane] | load_u16(from_k + 34 * j) << 16;
                v[j] = from_v[34 * j + 2 + lane] | load_u16(from_v + 34 * j) << 16;
            }
        } else {
            const int block = P * lane / 32 * 34, at = block + 2 + P * lane % 32;
            scale_k = load_u16(from_k + block);
            scale_v = load_u16(from_v + block);
#pragma unroll
            for (int j = 0; j < P / 2; ++j) {
                k[j] = load_u16(from_k + at + 2 * j);
                v[j] = load_u16(from_v + at + 2 * j);
            }
        }
    }

    // The values of k and scale_k, or of v and scale_v.
    __device__ __forceinline__ void values(const uint32_t (&words)[P], uint32_t scale, float (&x)[P]) const {
        const auto half_value = [](uint32_t bits) { return __half2float(__ushort_as_half(uint16_t(bits))); };
        if (type == f32) {
#pragma unroll
            for (int j = 0; j < P; ++j) x[j] = __uint_as_float(words[j]);
        } else if (type == f16) {
#pragma unroll
            for (int j = 0; j < P; ++j) x[j] = half_value(words[j]);
        } else if constexpr (!has_runs<D>) {
#pragma unroll
            for (int j = 0; j < P; ++j) x[j] = half_value(words[j] >> 16) * float(int8_t(words[j]));
        } else {
            const float unit = half_value(scale);
#pragma unroll
            for (int j = 0; j < P; ++j) x[j] = unit * float(int8_t(words[j / 2] >> (8 * (j % 2))));
        }
    }
};

// The mask of a query in the exact rows.
__device__ __forceinline__ const uint16_t * exact_mask(const Attention & a, int stream, int token, int head) {
    const ExactRows & x = a.exact;
    return reinterpret_cast<const uint16_t *>(static_cast<const char *>(x.mask) + token * x.mask_token +
                                          remainder_of(head, x.mask_heads) * x.mask_head +
                                          remainder_of(stream, x.mask_streams) * x.mask_stream);
}

// The number of the warp's part among those with exact rows; negative: it has none.
__device__ __forceinline__ int exact_part(const AttentionCall & call, const Place & place) {
    return int(blockIdx.x) * place.row_tiles + place.row_tile - call.plan.first_exact;
}

// Lets the exact rows of the warp's KV head be fetched to the L2 cache before the previous kernel has ended: it may
// write the batch's rows, but not the slots. A warp that also has rows of the cache computes its queries while it loads
// exact rows, and needs no prefetch.
__device__ __forceinline__ void prefetch_exact(const AttentionCall & call, const Place & place) {
    if (place.length > 0 && !call.plan.likely_hidden) return;
    const ExactHead rows(call.a, place.kv_stream, place.kv_head());
    const ExactRows & x = call.a.exact;
    const int part = exact_part(call, place);
    if (part < 0) return;
    const int row = rows.in_turn(part + place.lane / 8 * call.plan.exact_parts);
    const int unit = place.lane % 4 * 64; // bytes of f16, at most
    if (row < rows.slots && unit < (x.type == KV::f16 ? 2 : 1) * call.a.head)
        prefetch((place.lane & 4 ? rows.v + row * x.v_row : rows.k + row * x.k_row) + unit);
}

// Attention of a warp's columns over its exact rows: that with the number of its exact_part, and every `exact_parts`
// further on. The constructor loads the first of them, so that this overlaps with other work.
template <KV TV, int D, bool Gathered, int C> class ExactAttention {
    static constexpr int P = D / 32;
    const AttentionCall & call;
    const Place & place;
    ExactHead rows;
    const uint16_t * mask[C]; // of the lane's columns, or nullptr
    float slope[C];
    uint32_t bias[C]; // binary16
    int turn; // the number of the loaded row, in turn
    ExactRow<D> bytes;
    static constexpr uint32_t hidden = minus_infinity;

    // Skips rows that are hidden. If each token sees rows of its own, most are hidden from the warp's only token.
    __device__ __forceinline__ void skip_hidden() {
#pragma unroll 1
        for (; turn < rows.rows; turn += 32 * call.plan.exact_parts) {
            const int own = turn + place.lane * call.plan.exact_parts;
            const uint16_t * shown = exact_mask(call.a, place.stream, place.token(call), 0);
            const uint32_t seen =
                __ballot_sync(all_lanes, own < rows.rows && shown[rows.in_turn(own)] != hidden);
            if (!seen) continue;
            turn += (__ffs(int(seen)) - 1) * call.plan.exact_parts;
            return;
        }
    }

    __device__ __forceinline__ void load() {
        if constexpr (Gathered) skip_hidden();
        if (turn >= rows.rows) return;
        const int row = rows.in_turn(turn);
#pragma unroll
        for (int h = 0; h < C; ++h) bias[h] = mask[h] ? mask[h][row] : hidden;
        bytes = ExactRow<D>(call.a.exact, rows, row, place.lane);
    }

public:
    __device__ __forceinline__ ExactAttention(const AttentionCall & call, const Place & place,
                                              const LaneColumns<C> & columns)
        : call(call), place(place), turn(exact_part(call, place)) {
        if (!any()) return;
        rows = ExactHead(call.a, place.kv_stream, place.kv_head());
#pragma unroll
        for (int h = 0; h < C; ++h) {
            mask[h] = columns.valid[h] ? exact_mask(call.a, place.stream, columns.token[h], columns.head[h]) : nullptr;
            slope[h] = log2e * alibi_slope(call, columns.head[h]);
            bias[h] = hidden;
        }
        load();
    }

    // Whether the warp may have exact rows; else nothing else may be called.
    __device__ __forceinline__ bool any() const { return turn >= 0; }

    // Sets what the warp has of its columns in the lanes' order of the kernel. q: what load_columns loads of the first
    // four columns, or nothing if there are eight, which would take too many registers. `scratch` takes D floats of the
    // warp, aligned to 16 bytes.
    __device__ __forceinline__ void attend(float (&q)[4][P], float * scratch, SoftmaxState (&state)[C],
                                           Sums<D, C> & sums) {
        const Attention & a = call.a;
        const int lane = place.lane, in_quad = place.in_quad;
        while (turn < rows.rows) {
            float k[P], v[P], own_bias[C];
            bytes.values(bytes.k, bytes.scale_k, k);
            bytes.values(bytes.v, bytes.scale_v, v);
            bool seen = false;
#pragma unroll
            for (int h = 0; h < C; ++h) {
                own_bias[h] = __half2float(__ushort_as_half(uint16_t(bias[h])));
                seen = seen || own_bias[h] != -INFINITY;
            }
            turn += call.plan.exact_parts;
            load(); // the next row, while this one is computed
            if (!__any_sync(all_lanes, seen)) continue;
            float score[C] = {};
#pragma unroll 1
            for (int c0 = 0; c0 < 4 * C; c0 += 4) {
                if constexpr (C > 1) load_columns<D>(call, place, c0, q);
                float dots[4] = {};
#pragma unroll
                for (int j = 0; j < P; ++j)
#pragma unroll
                    for (int c = 0; c < 4; ++c) dots[c] += q[c][j] * k[j];
                const float sum = sum_for_lanes(dots, lane);
#pragma unroll
                for (int h = 0; h < C; ++h) {
                    const int column = C * in_quad + h;
                    const float own = C == 1 ? sum : __shfl_sync(all_lanes, sum, column % 4);
                    if (column / 4 == c0 / 4) score[h] = own * a.scale;
                }
            }
            float correction[C], weight[C];
#pragma unroll
            for (int h = 0; h < C; ++h) {
                float s = score[h];
                if (a.soft_cap != 0) s = a.soft_cap * tanhf(s / a.soft_cap);
                s = s * log2e + slope[h] * own_bias[h];
                if (own_bias[h] == -INFINITY) s = -INFINITY; // whatever bytes the row has
                const float before = state[h].largest;
                state[h].largest = fmaxf(before, s);
                correction[h] = exp2f(before - state[h].largest);
                weight[h] = exp2f(s - state[h].largest);
                state[h].sum = state[h].sum * correction[h] + (place.quad == 0 ? weight[h] : 0.0f); // of one lane
            }
            correct_output<D, C>(sums, correction);

            if constexpr (Layout<TV, D>::turbo) transform_row<D>(v);
            if constexpr (!has_runs<D>) {
#pragma unroll
                for (int j = 0; j < P; ++j) scratch[lane_element<D>(lane, j)] = v[j];
            } else if constexpr (P == 2) {
                reinterpret_cast<float2 *>(scratch)[lane] = make_float2(v[0], v[1]);
            } else {
#pragma unroll
                for (int j = 0; j < P; j += 4)
                    reinterpret_cast<float4 *>(scratch)[P / 4 * lane + j / 4] =
                        make_float4(v[j], v[j + 1], v[j + 2], v[j + 3]);
            }
            __syncwarp();
#pragma unroll
            for (int h = 0; h < C; ++h) // a NaN in a row that is hidden from the column must not reach it
                if (own_bias[h] != -INFINITY) add_output<TV, D, C>(sums, scratch, weight[h], h, place.quad);
            __syncwarp();
        }
    }
};

// Rows of heads of the batch's K and V, which a warp stores at a time.
inline int64_t stored_rows(const Attention & a) {
    return a.windowed && a.exact.store_rows ? int64_t(2) * a.kv_streams * a.tokens * a.kv_heads : 0;
}

// The alignment of rows must be that of the words in which they are read, and store_exact numbers rows in 32 bits.
inline bool covers_exact(const Attention & a) {
    const ExactRows & x = a.exact;
    const auto bits = [](const void * base, int64_t row, int64_t head, int64_t stream) {
        return reinterpret_cast<uintptr_t>(base) | uint64_t(row | head | stream);
    };
    const uint64_t slots = bits(x.k, x.k_row, x.k_head, x.k_stream) | bits(x.v, x.v_row, x.v_head, x.v_stream) |
                           bits(x.store_k, 0, 0, 0) | bits(x.store_v, 0, 0, 0);
    const uint64_t batch = bits(x.batch_k, x.batch_k_row, x.batch_k_head, x.batch_k_stream) |
                           bits(x.batch_v, x.batch_v_row, x.batch_v_head, x.batch_v_stream);
    return (x.type == KV::q8_0 || x.type == KV::f16) && x.slots >= 0 && x.slots <= 1 << 20 && a.tokens <= 1 << 20 &&
           stored_rows(a) >> 31 == 0 && (slots & 1) == 0 && (batch & 3) == 0;
}

// ---- stores

// Stores row number `number` in its slot, rounded to q8_0 or f16.
template <int D> __device__ __forceinline__ void store_exact(const Attention & a, uint32_t number, int lane) {
    const ExactRows & x = a.exact;
    const uint32_t of_heads = number / uint32_t(a.kv_heads), row = of_heads / 2; // row: of all streams
    const int kv_head = int(number - of_heads * uint32_t(a.kv_heads));
    const int stream = int(row / uint32_t(a.tokens)), token = int(row - uint32_t(stream) * uint32_t(a.tokens));
    const bool keys = of_heads % 2 == 0;
    const char * from = keys ? reinterpret_cast<const char *>(x.batch_k) + stream * x.batch_k_stream +
                                   token * x.batch_k_row + kv_head * x.batch_k_head
                             : reinterpret_cast<const char *>(x.batch_v) + stream * x.batch_v_stream +
                                   token * x.batch_v_row + kv_head * x.batch_v_head;
    char * to = static_cast<char *>(keys ? x.store_k : x.store_v) + x.store_rows[row] * (keys ? x.k_row : x.v_row) +
                kv_head * (keys ? x.k_head : x.v_head);
    const float * values = reinterpret_cast<const float *>(from);
    constexpr int P = D / 32;
    if constexpr (P % 2 == 0) {
        float own[P];
        const bool aligned = (reinterpret_cast<uintptr_t>(from) & 15) == 0;
        if constexpr (P == 2) {
            own[0] = values[2 * lane];
            own[1] = values[2 * lane + 1];
        } else {
#pragma unroll
            for (int j = 0; j < P; j += 4) load_four(values + P * lane + j, aligned, own + j);
        }
        store_exact_row(x.type == KV::f16, to, own, lane);
    } else {
        float own[P];
#pragma unroll
        for (int j = 0; j < P; ++j) own[j] = values[32 * j + lane];
#pragma unroll
        for (int j = 0; j < P; ++j) store_exact_values(x.type == KV::f16, to, j, own[j], lane);
    }
}

} // namespace
} // namespace cuda
} // namespace turboquant

#endif
