// Attention over rows of K and V of one source, and the merge of the results of all sources.
//
// A threadgroup has up to 16 query columns (query heads of a KV head, times tokens) and a run of rows, which it
// computes in tiles of 32 or 16 rows. It decodes the rows of K of a tile to threadgroup memory, multiplies them with
// its queries, turns the products into weights, decodes V to the same memory, and adds the product of weights and V to
// its sums. The matrices of the SIMD groups compute the products: a factor in float32, which has the queries or the
// weights times the scales of V, and a factor in binary16, which has levels. The sums of rotated rows are rotated back
// by the merge.
#include "load.h"

namespace turboquant {

TURBOQUANT_FUNCTION_CONSTANT(function_type_k, constant_type_k) // row types
TURBOQUANT_FUNCTION_CONSTANT(function_type_v, constant_type_v)

constant float log2e = 1.44269504f;
// The largest score where no row is seen. It is finite, so that the difference of two such scores is not NaN.
constant float nothing_seen = -1e30f;
constant uint hidden_bits = 0xfc00u; // of the mask: -inf

// The factor of the mask of a query head: its ALiBi slope, or 1 without ALiBi.
inline float alibi_slope(constant AttentionArguments & a, int head) {
    if (a.slope_heads == 0) return 1.0f;
    return head < a.slope_heads ? powr(a.slope0, float(head + 1))
                                : powr(a.slope1, float(2 * (head - a.slope_heads) + 1));
}

// Multiplies the rows of a matrix of sums by factors, which only the memory gives access to.
inline void multiply_rows(thread simdgroup_float8x8 & sums, threadgroup const float * factors,
                          threadgroup float * scratch, ushort lane) {
    simdgroup_store(sums, scratch, 8);
    simdgroup_barrier(mem_flags::mem_threadgroup);
    for (uint e = lane; e < 64; e += 32) scratch[e] *= factors[e / 8];
    simdgroup_barrier(mem_flags::mem_threadgroup);
    simdgroup_load(sums, scratch, 8);
    simdgroup_barrier(mem_flags::mem_threadgroup);
}

// D: values of a head; T: tiles of eight columns.
template <int D, int T>
inline void attend(constant AttentionArguments & a, device const uchar * q, device const uchar * k,
                   device const uchar * v, device const uchar * mask, device float * partial, device float * states,
                   threadgroup uchar * shared, uint3 group, ushort lane, ushort simd) {
    enum { C = 8 * T, own_columns = C / simdgroups, own_tiles = D / 32 }; // of a SIMD group
    const int R = tile_rows(D), pitch = tile_pitch(D);
    const uint thread_index = simd * 32 + lane;
    const int kv_head = int(group.y) % a.kv_heads, stream = int(group.z);
    const int first_column = int(group.y) / a.kv_heads * C;
    const int first = int(group.x) * a.chunk_rows, last = min(first + a.chunk_rows, a.n_kv);
    const int values_k = scaled_values(function_type_k, D), values_v = scaled_values(function_type_v, D);
    const int blocks_k = D / values_k, blocks_v = D / values_v;

    threadgroup float * queries = reinterpret_cast<threadgroup float *>(shared);
    threadgroup half * tile = reinterpret_cast<threadgroup half *>(shared + memory_offset(memory_tile, D, C, a.blocks));
    threadgroup ushort * masks =
        reinterpret_cast<threadgroup ushort *>(shared + memory_offset(memory_masks, D, C, a.blocks));
    threadgroup float * factors =
        reinterpret_cast<threadgroup float *>(shared + memory_offset(memory_factors, D, C, a.blocks));
    threadgroup uint * flags =
        reinterpret_cast<threadgroup uint *>(shared + memory_offset(memory_flags, D, C, a.blocks));
    threadgroup float * scratch =
        reinterpret_cast<threadgroup float *>(shared + memory_offset(memory_scratch, D, C, a.blocks)) + 64 * simd;
    threadgroup half * tables =
        reinterpret_cast<threadgroup half *>(shared + memory_offset(memory_tables, D, C, a.blocks));
    threadgroup float * scales_k =
        reinterpret_cast<threadgroup float *>(shared + memory_offset(memory_scales, D, C, a.blocks));
    threadgroup float * scales_v = scales_k + a.blocks * R;
    threadgroup float * products =
        reinterpret_cast<threadgroup float *>(shared + memory_offset(memory_products, D, C, a.blocks));

    // The queries, rotated as K is, and the codebooks.
    for (int c = simd; c < C; c += simdgroups) {
        const int column = first_column + c, token = column / a.group, head = kv_head * a.group + column % a.group;
        device const float * row = reinterpret_cast<device const float *>(
            q + long(token) * a.q_token + long(head) * a.q_head + long(stream) * a.q_stream);
        float y[D / 32];
        FOR_UNROLLED (int j = 0; j < D / 32; ++j) y[j] = column < a.columns ? row[lane + 32 * j] : 0.0f;
        if (is_turbo(function_type_k)) rotate_row<D>(y, block_of(function_type_k), false, lane);
        FOR_UNROLLED (int j = 0; j < D / 32; ++j) queries[c * D + lane + 32 * j] = y[j];
    }
    if (simd < 2) {
        const int type = simd == 0 ? function_type_k : function_type_v;
        tables[32 * simd + lane] = half(is_turbo(type) ? float(codebooks[type / 3][lane]) : 0.0f);
    }

    // The rows of the KV head, and the columns of the SIMD group: simd, simd + 4, ...
    const int kv_stream = stream / (a.streams / a.kv_streams);
    device const uchar * rows_k = k + long(kv_head) * a.k_head + long(kv_stream) * a.k_stream;
    device const uchar * rows_v = v + long(kv_head) * a.v_head + long(kv_stream) * a.v_stream;
    float largest[own_columns], sum[own_columns], slope[own_columns];
    FOR_UNROLLED (int i = 0; i < own_columns; ++i) {
        largest[i] = nothing_seen;
        sum[i] = 0.0f;
        slope[i] = log2e * alibi_slope(a, kv_head * a.group + (first_column + simd + i * simdgroups) % a.group);
    }
    simdgroup_float8x8 sums[T][own_tiles];
    FOR_UNROLLED (int t = 0; t < T; ++t)
        FOR_UNROLLED (int i = 0; i < own_tiles; ++i) sums[t][i] = make_filled_simdgroup_matrix<float, 8>(0.0f);

    // Threads may still read the mask of a tile when others begin the next one.
    for (int row = first, turn = 0; row < last; row += R, turn ^= C * R) {
        for (int i = int(thread_index); i < C * R; i += 32 * simdgroups) {
            const int column = first_column + i / R, r = i % R;
            uint bits = hidden_bits;
            if (column < a.columns && row + r < last) {
                bits = 0;
                if (a.masked) {
                    const int token = column / a.group, head = kv_head * a.group + column % a.group;
                    bits = load_u16(mask + long(token) * a.mask_token + long(head % a.mask_heads) * a.mask_head +
                                    long(stream % a.mask_streams) * a.mask_stream + 2 * long(row + r));
                }
            }
            masks[turn + i] = ushort(bits);
        }
        threadgroup_barrier(mem_flags::mem_threadgroup);
        bool seen_row = false; // the lane's
        for (int c = 0; c < C && int(lane) < R; ++c) seen_row = seen_row || masks[turn + c * R + lane] != hidden_bits;
        const uint seen = simd_or((seen_row ? 1u : 0u) << lane);
        if (seen == 0) continue;

        load_tile<D>(function_type_k, rows_k + long(row) * a.k_row, a.k_row, seen, false, tables, tile, thread_index);
        load_scales<D>(function_type_k, rows_k + long(row) * a.k_row, a.k_row, seen, scales_k, thread_index);
        load_scales<D>(function_type_v, rows_v + long(row) * a.v_row, a.v_row, seen, scales_v, thread_index);
        threadgroup_barrier(mem_flags::mem_threadgroup);

        // Products: [block][column][row]
        for (int pair = simd; pair < R / 8 * T; pair += simdgroups) {
            const int r = pair % (R / 8) * 8, c = pair / (R / 8) * 8;
            for (int block = 0; block < blocks_k; ++block) {
                simdgroup_float8x8 product = make_filled_simdgroup_matrix<float, 8>(0.0f);
                for (int e = block * values_k; e < (block + 1) * values_k; e += 8) {
                    simdgroup_float8x8 of_queries;
                    simdgroup_half8x8 of_keys;
                    simdgroup_load(of_queries, queries + c * D + e, D);
                    simdgroup_load(of_keys, tile + r * pitch + e, pitch, 0, true);
                    simdgroup_multiply_accumulate(product, of_queries, of_keys, product);
                }
                simdgroup_store(product, products + (block * C + c) * R + r, R);
            }
        }
        threadgroup_barrier(mem_flags::mem_threadgroup);

        // Weights, times the scales of V, take the place of the products. A lane has a row.
        bool needed = false;
        FOR_UNROLLED (int i = 0; i < own_columns; ++i) {
            const int c = simd + i * simdgroups;
            const bool in_tile = int(lane) < R;
            const uint bits = in_tile ? uint(masks[turn + c * R + lane]) : hidden_bits;
            const bool hidden = bits == hidden_bits;
            float score = 0.0f;
            for (int block = 0; block < blocks_k && in_tile; ++block)
                score += products[(block * C + c) * R + lane] * scales_k[block * R + lane];
            score *= a.scale;
            if (a.soft_cap != 0.0f) score = a.soft_cap * precise::tanh(score / a.soft_cap);
            score = score * log2e + slope[i] * float_of_half(bits);
            const float top = simd_max(hidden || is_nan(score) ? nothing_seen : score);
            const float before = largest[i];
            largest[i] = max(before, top);
            const float factor = exp2(before - largest[i]);
            const float weight = hidden ? 0.0f : exp2(score - largest[i]);
            sum[i] = sum[i] * factor + simd_sum(weight);
            needed = needed || !(weight <= a.sparse_v);
            for (int block = 0; block < blocks_v && in_tile; ++block) // a row without weight must not give a NaN
                products[(block * C + c) * R + lane] = weight == 0.0f ? 0.0f : weight * scales_v[block * R + lane];
            if (lane == 0) factors[c] = factor;
        }
        if (a.sparse_v > 0.0f) { // if no weight is above it, the largest scores are those of earlier tiles
            needed = simd_any(needed);
            if (lane == 0) flags[simd] = needed ? 1u : 0u;
            threadgroup_barrier(mem_flags::mem_threadgroup);
            uint any = 0;
            for (uint i = 0; i < simdgroups; ++i) any |= flags[i];
            if (any == 0) continue;
        }
        const uint found = load_tile<D>(function_type_v, rows_v + long(row) * a.v_row, a.v_row, seen, true, tables + 32,
                                        tile, thread_index);
        const uint found_any = simd_or(found);
        if (lane == 0) flags[simdgroups + simd] = found_any;
        threadgroup_barrier(mem_flags::mem_threadgroup);

        // A matrix would multiply values that are not finite by zero where they are hidden. So queries that see such a
        // row get a sum of weights that is NaN instead. In rows of turbo types only the scales may be not finite.
        uint not_finite = 0;
        FOR_UNROLLED (uint i = 0; i < simdgroups; ++i) not_finite |= flags[simdgroups + i];
        FOR_UNROLLED (int i = 0; i < own_columns; ++i) {
            const int c = simd + i * simdgroups;
            const bool sees = (not_finite >> lane & 1u) && masks[turn + c * R + lane] != hidden_bits;
            if (not_finite && simd_any(sees)) sum[i] = as_type<float>(0x7fc00000u);
        }

        // Sums: a SIMD group has a quarter of the values.
        if (simd_any(lane < C && factors[lane % C] != 1.0f))
            FOR_UNROLLED (int t = 0; t < T; ++t)
                FOR_UNROLLED (int i = 0; i < own_tiles; ++i) multiply_rows(sums[t][i], factors + 8 * t, scratch, lane);
        for (int r = 0; r < R; r += 8) {
            simdgroup_float8x8 weights[T];
            int loaded = -1;
            FOR_UNROLLED (int i = 0; i < own_tiles; ++i) {
                const int e = simd * (D / simdgroups) + 8 * i, block = e / values_v;
                for (int t = 0; t < T && block != loaded; ++t)
                    simdgroup_load(weights[t], products + (block * C + 8 * t) * R + r, R);
                loaded = block;
                simdgroup_half8x8 of_values;
                simdgroup_load(of_values, tile + r * pitch + e, pitch);
                FOR_UNROLLED (int t = 0; t < T; ++t)
                    simdgroup_multiply_accumulate(sums[t][i], weights[t], of_values, sums[t][i]);
            }
        }
    }

    const int part = a.first_part + int(group.x);
    const long at = (long(stream) * a.kv_heads + kv_head) * a.padded_columns + first_column;
    FOR_UNROLLED (int t = 0; t < T; ++t)
        FOR_UNROLLED (int i = 0; i < own_tiles; ++i)
            simdgroup_store(sums[t][i], partial + ((at + 8 * t) * a.parts + part) * D + simd * (D / simdgroups) + 8 * i,
                            ulong(a.parts) * D);
    FOR_UNROLLED (int i = 0; i < own_columns; ++i)
        if (lane == 0) {
            device float * state = states + ((at + simd + i * simdgroups) * a.parts + part) * 2;
            state[0] = largest[i];
            state[1] = sum[i];
        }
}

// ---- merge

// A SIMD group has a row of the result.
template <int D>
inline void merge_parts(constant MergeArguments & a, device const float * partial, device const float * states,
                        device const float * sinks, device float * dst, uint3 group, ushort lane, ushort simd) {
    const int row = int(group.x) * simdgroups + int(simd);
    if (row >= a.rows) return;
    const int head = row % a.heads, token = row / a.heads % a.tokens, stream = row / a.heads / a.tokens;
    const int column = token * a.group + head % a.group;
    const long at = ((long(stream) * a.kv_heads + head / a.group) * a.padded_columns + column) * a.parts;
    const float sink = a.has_sinks ? sinks[head] * log2e : nothing_seen;
    float top = max(nothing_seen, sink);
    for (int p = lane; p < a.parts; p += 32) top = max(top, states[(at + p) * 2]);
    top = simd_max(top);

    float sum = a.has_sinks ? exp2(sink - top) : 0.0f; // an attention sink counts as a row without values
    float y[D / 32];
    FOR_UNROLLED (int j = 0; j < D / 32; ++j) y[j] = 0.0f;
    for (int p = 0; p < a.parts; ++p) {
        if (p == a.rotated_parts && p > 0) rotate_row<D>(y, a.block, true, lane);
        const float largest = states[(at + p) * 2];
        const bool saw_rows = !(largest <= nothing_seen);
        const float weight = saw_rows ? exp2(largest - top) : 0.0f;
        sum += weight * states[(at + p) * 2 + 1]; // NaN if a score was NaN, also without a largest score
        for (int j = 0; j < D / 32 && saw_rows; ++j) y[j] += weight * partial[(at + p) * D + lane + 32 * j];
    }
    if (a.parts == a.rotated_parts) rotate_row<D>(y, a.block, true, lane);
    const float inverse = sum == 0.0f ? 0.0f : 1.0f / sum; // zeros if no row was seen
    FOR_UNROLLED (int j = 0; j < D / 32; ++j) dst[long(row) * D + lane + 32 * j] = y[j] * inverse;
}

} // namespace turboquant

// ---- kernels

template <int D, int T>
kernel void turboquant_attention(constant turboquant::AttentionArguments & a [[buffer(0)]],
                                 device const uchar * q [[buffer(1)]], device const uchar * k [[buffer(2)]],
                                 device const uchar * v [[buffer(3)]], device const uchar * mask [[buffer(4)]],
                                 device float * partial [[buffer(5)]], device float * states [[buffer(6)]],
                                 threadgroup uchar * shared TURBOQUANT_THREADGROUP(0),
                                 uint3 group [[threadgroup_position_in_grid]],
                                 ushort lane [[thread_index_in_simdgroup]],
                                 ushort simd [[simdgroup_index_in_threadgroup]]) {
    turboquant::attend<D, T>(a, q, k, v, mask, partial, states, shared, group, lane, simd);
}

template <int D>
kernel void turboquant_merge(constant turboquant::MergeArguments & a [[buffer(0)]],
                             device const float * partial [[buffer(1)]], device const float * states [[buffer(2)]],
                             device const float * sinks [[buffer(3)]], device float * dst [[buffer(4)]],
                             uint3 group [[threadgroup_position_in_grid]],
                             ushort lane [[thread_index_in_simdgroup]],
                             ushort simd [[simdgroup_index_in_threadgroup]]) {
    turboquant::merge_parts<D>(a, partial, states, sinks, dst, group, lane, simd);
}

#define TURBOQUANT_ATTENTION(D)                                                \
    TURBOQUANT_KERNEL(turboquant_attention_##D##_1, turboquant_attention<D, 1>) \
    TURBOQUANT_KERNEL(turboquant_attention_##D##_2, turboquant_attention<D, 2>) \
    TURBOQUANT_KERNEL(turboquant_merge_##D, turboquant_merge<D>)
TURBOQUANT_ATTENTION(64)
TURBOQUANT_ATTENTION(96)
TURBOQUANT_ATTENTION(128)
TURBOQUANT_ATTENTION(192)
TURBOQUANT_ATTENTION(256)
#undef TURBOQUANT_ATTENTION
