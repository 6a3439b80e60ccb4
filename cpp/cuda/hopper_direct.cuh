// The kernel template for attention of a few tokens on Hopper GPUs. It does what direct.cuh does, with the products of
// warpgroups (wgmma.cuh), so that the four warps of a warpgroup share the expansion of rows for all columns.
//
// A warpgroup takes 64 rows at a time. For the scores each of its warps expands 16 rows of K, for the output a quarter
// of the values of all 64 rows of V:
//
//   scores: A = K, levels plus 128 as unsigned bytes; B = queries rounded to int8
//   output: A = V transposed, levels in binary16; B = weights times V's scales, in binary16
//
// Operands A are in registers, operands B in shared memory. The warps of a warpgroup meet at a barrier when they have
// stored the weights of a step. The warpgroups of a thread block do not wait for each other until all steps are
// computed. Then their results are merged.
#ifndef TURBOQUANT_CUDA_HOPPER_DIRECT_H
#define TURBOQUANT_CUDA_HOPPER_DIRECT_H

#include "direct.cuh"
#include "wgmma.cuh"

namespace turboquant {
namespace cuda {

constexpr int group_rows = 64;  // of a step
constexpr int group_stages = 3; // steps of a warpgroup in shared memory
constexpr int group_warps = 4, most_groups = 4;
// Warpgroups of a thread block with so many times eight columns. With four, a thread has 128 registers.
constexpr int groups_of(int eights) { return eights > 2 ? 3 : 4; }

namespace {

// The share of a warp: `warp` is its number in the warpgroup.
struct GroupPlace : DirectPlace {
    int group, in_block; // the number of the warpgroup; that of the warp among those of the thread block

    __device__ __forceinline__ explicit GroupPlace(const AttentionCall & call) : DirectPlace(call) {
        in_block = warp;
        group = __shfl_sync(all_lanes, int(threadIdx.x / 128), 0); // in a register of the warp, as descriptors are
        warp = keep(in_block % group_warps);
    }
};

// The division of a thread block's shared memory. N: its columns are so many times eight.
template <int D, int N> struct GroupMemory {
    static constexpr int columns = 8 * N, groups = groups_of(N), warps = groups * group_warps;
    static constexpr int matrix = columns * 128; // bytes of the queries, and of the weights of a step
    static constexpr int most_words = 128;       // of SeenTiles
    static constexpr int bias_pitch = 20;        // no two lanes read from the same bank

    // What the warps share, behind the matrices.
    struct Variables {
        float4 scores[warps][columns / 2]; // of two columns: the factor of a query, and the reference, for each warp
        SeenTiles seen[most_words]; // of the cache, then of an exact window
        int start[columns];         // of the products: magic_bits, less what the bias of K adds
        float factors[columns];     // of the queries
        uint16_t exact_scale;       // V's, in binary16
        float tops[groups][group_warps][columns]; // the largest scores of a warp's rows
        float biases[warps][columns][bias_pitch];        // of a warp's rows
    };
    // What a warpgroup has at the end.
    struct __align__(16) Results {
        float values[columns][D + 4];
        float sums[group_warps][columns];
        float references[columns];
        float unit;
    };

    // The matrices of the queries and of the weights of each warpgroup are before the variables.
    static constexpr int weights_at = matrix, variables_at = weights_at + 2 * groups * matrix,
                         rows_at = variables_at + int(sizeof(Variables) + 15) / 16 * 16;
    // Of rows with so many bytes of K and V. The warpgroups' results replace their stages.
    static constexpr int bytes(int row) {
        const int stages = groups * group_stages * group_rows * row, results = groups * int(sizeof(Results));
        return matrix_alignment + rows_at + (stages > results ? stages : results);
    }

    uint8_t * base;
    uint32_t address; // of base
    Variables & variables;

    __device__ __forceinline__ explicit GroupMemory(uint8_t * shared)
        : base(shared + (-int(__cvta_generic_to_shared(shared)) & (matrix_alignment - 1))),
          address(uint32_t(__cvta_generic_to_shared(base))),
          variables(*reinterpret_cast<Variables *>(base + variables_at)) {}
    // The matrix of weights of a warpgroup, one of two.
    static __device__ __forceinline__ int weights(int group, int buffer) {
        return weights_at + (2 * group + buffer) * matrix;
    }
    __device__ __forceinline__ Results & results(int group) const {
        return reinterpret_cast<Results *>(base + rows_at)[group];
    }
};

// A step: rows of the cache, or of an exact window.
struct GroupStep {
    int number;
    bool exact;
    bool mixed; // whether rows are hidden from a column, or have biases
    // Of the cache: the rows that DirectRows names, in shared memory.
    const uint8_t *row_k, *row_v0, *row_v1;
    const uint8_t * scale_v; // of row `quad` of the warp's
    int to_scale;            // bytes from there to that of row quad + 8
};

// The nibbles of a lane's half of a unit of V, in its rows of 16: those of row 2 * in_quad and of the next one, and
// those of the rows eight further on. `rows` has them in the order of the selectors, 0, 8, 1 and 9.
template <KV TV, int D>
__device__ __forceinline__ void read_halves(const uint8_t * const (&rows)[4], int unit, int half,
                                            uint32_t (&selectors)[2]) {
    using L = Layout<TV, D>;
    uint32_t pairs[2]; // of rows 0 and 1, and of rows 8 and 9: nibbles 0 and 1 of both, then nibbles 2 and 3
    if constexpr (L::nibbles) {
        const int at = 2 + 4 * unit + 2 * half;
#pragma unroll
        for (int i = 0; i < 2; ++i) pairs[i] = prmt(load_u16(rows[i] + at), load_u16(rows[2 + i] + at), interleave_low);
    } else {
        uint32_t nibbles[4];
#pragma unroll
        for (int i = 0; i < 4; ++i) nibbles[i] = load_unit<typename L::BlockFormat>(rows[i] + 2, unit).nibbles;
#pragma unroll
        for (int i = 0; i < 2; ++i)
            pairs[i] = prmt(nibbles[i], nibbles[2 + i], half ? interleave_high : interleave_low);
    }
    // A half word of the results is the selector of one element in four rows, as in operands.cuh: of nibbles 0 and 2 in
    // the first one, of nibbles 1 and 3 in the second one.
    constexpr uint32_t low_nibbles = 0x0f0f0f0f;
    selectors[0] = select(low_nibbles, pairs[0], shift_left(pairs[1], 4));
    selectors[1] = select(low_nibbles, shift_right(pairs[0], 4), pairs[1]);
}

// The columns of a warpgroup. A lane has columns 8 n + 2 in_quad + i of rows quad + 8 h of its warp's 16 rows.
template <KV TK, KV TV, int D, int N> struct GroupColumns {
    using LK = Layout<TK, D>;
    using LV = Layout<TV, D>;
    using Memory = GroupMemory<D, N>;
    using Rows = DirectRows<TK, TV, D, group_rows, 16>;
    static constexpr int steps = D / 32;
    static constexpr float of_exact = 128; // the unit of exact values: value_unit is that of 128 levels
    static_assert(LK::block == D && LV::block == D && D == 128, "a row is a block, and a query is a row of a matrix");
    static_assert(!LV::signs, "the levels of V have no selectors of their own for signs");

    const WideCall & wide;
    const GroupPlace & place;
    const Memory & memory;
    const typename LK::LookUpLevels look_up_k;
    const typename LV::LookUpLevels look_up_v;
    float sum[N][2];
    float output[2][4 * N] = {}; // in multiples of `unit`
    float unit = 0x1p-40f, to_unit = 0x1p40f; // a power of two that is not less than V's scales so far, and its inverse
    int buffer = 0;                           // of the weights
    int store_at;                             // where the lane stores weights, in a matrix
    int first_query;                          // first_prepared()

    __device__ __forceinline__ GroupColumns(const WideCall & wide, const GroupPlace & place, const Memory & memory,
                                             uint32_t zero)
        : wide(wide), place(place), memory(memory), look_up_k(zero), look_up_v(zero) {
#pragma unroll
        for (int n = 0; n < N; ++n) {
            const float2 factors = *reinterpret_cast<const float2 *>(memory.variables.factors + column(n));
            if (place.quad == 0) scores(n) = make_float4(factors.x, nothing_seen, factors.y, nothing_seen);
            sum[n][0] = sum[n][1] = 0;
        }
        const int in_eight = place.lane % 8, unit_number = 2 * place.warp + place.lane / 8 % 2;
        first_query = keep(int(first_prepared(wide, place)));
        store_at = keep((place.lane / 16 * 8 + in_eight) * 128 + ((unit_number ^ in_eight) << 4));
        __syncwarp();
    }
    // The factor and the reference of columns 8 n + 2 in_quad and the next one.
    __device__ __forceinline__ float4 & scores(int n) const {
        return memory.variables.scores[place.in_block][column(n) / 2];
    }
    __device__ __forceinline__ int column(int n) const { return 8 * n + 2 * place.in_quad; }
    __device__ __forceinline__ int barrier() const { return 1 + place.group; }

    // The threads write the queries to the memory.
    static __device__ __forceinline__ void load_queries(const WideCall & wide, const GroupPlace & place,
                                                        const Memory & memory) {
        const int64_t first = first_prepared(wide, place);
        const int number = place.lane % 16; // of the unit of eight elements
        const int product = LK::nibbles ? number / 4 : number / 4 % 2 * 2 + number / 8;
#pragma unroll 1
        for (int c = 2 * place.in_block + place.lane / 16; c < Memory::columns; c += 2 * Memory::warps) {
            const uint2 unit = reinterpret_cast<const uint2 *>(wide.arrays.queries + (first + c) * D)[number];
            int total = __dp4a(int(unit.x), 0x01010101, __dp4a(int(unit.y), 0x01010101, 0));
#pragma unroll
            for (int h = 8; h > 0; h /= 2) total += __shfl_xor_sync(all_lanes, total, h);
            // The first four elements are in the first half of the product's 32, the others in the second half.
            uint8_t * row = memory.base + c * 128 + number % 4 * 4;
            *reinterpret_cast<uint32_t *>(row + ((2 * product ^ c % 8) << 4)) = unit.x;
            *reinterpret_cast<uint32_t *>(row + (((2 * product + 1) ^ c % 8) << 4)) = unit.y;
            if (number == 0) {
                memory.variables.start[c] = magic_bits - 128 * total;
                memory.variables.factors[c] = wide.arrays.factors[first + c];
            }
        }
    }

    // Computes the scores of a step of the cache, without the factors of the queries. `scale` has K's scales.
    __device__ __forceinline__ void compute_scores(const uint8_t * row, const float (&scale)[2], float (&s)[4 * N]) {
        uint32_t k[steps][4];
#pragma unroll
        for (int step = 0; step < steps; ++step)
#pragma unroll
            for (int h = 0; h < 2; ++h) {
                const auto levels =
                    key_levels<TK, D>(look_up_k, row + 8 * h * Rows::pitch_k, step, place.in_quad);
#pragma unroll
                for (int i = 0; i < 2; ++i) k[step][h + 2 * i] = biased_register<LK>(levels, i);
            }
        int c[4 * N];
#pragma unroll
        for (int n = 0; n < N; ++n) {
            const uint2 two = *reinterpret_cast<const uint2 *>(memory.variables.start + column(n));
#pragma unroll
            for (int i = 0; i < 4; ++i) c[4 * n + i] = int(i % 2 ? two.y : two.x);
        }
#pragma unroll
        for (int step = 0; step < steps; ++step) keep_registers(k[step]);
        keep_registers(c);
        products_fence();
        const uint32_t queries = key_matrix(memory.address);
#pragma unroll
        for (int step = 0; step < steps; ++step)
            multiply_levels(c, k[step], matrix_descriptor(queries + 2 * step));
        products_commit();
        products_wait<0>();
        keep_registers(c);
#pragma unroll
        for (int h = 0; h < 2; ++h) {
            const float offset = -magic * scale[h];
#pragma unroll
            for (int n = 0; n < N; ++n)
#pragma unroll
                for (int i = 2 * h; i < 2 * h + 2; ++i)
                    s[4 * n + i] = __fmaf_rn(__int_as_float(c[4 * n + i]), scale[h], offset);
        }
    }

    // Tile `half` of an exact step, or -1 if it does not exist.
    __device__ __forceinline__ int tile_of(int step, int half) const {
        const int tile = 2 * step + half;
        return tile < wide.arrays.exact_tiles ? tile : -1;
    }
    // The scores of a step of exact rows, which is two tiles. The inner index of the products has an order in which a
    // lane's four registers of a row are adjacent elements.
    __device__ __forceinline__ void compute_exact_scores(int step, float (&s)[4 * N]) {
        const int tile = keep(tile_of(step, place.warp / 2)); // addresses are not computed in other steps
#pragma unroll
        for (int i = 0; i < 4 * N; ++i) s[i] = 0;
        if (tile < 0) return;
        const uint4 * queries =
            exact_row(place, wide.arrays.exact_queries, keep(first_query) + place.quad, D / 8);
        const uint4 * keys =
            exact_row(place, wide.arrays.exact_k,
                      exact_tile(wide, place, tile) * tile_rows + place.warp % 2 * 16 + place.quad, D / 8);
#pragma unroll 1
        for (int i = 0; i < D / 32; ++i) {
            const uint4 k0 = keys[4 * i], k1 = keys[D + 4 * i];
#pragma unroll
            for (int n = 0; n < N; ++n) {
                const uint4 q = queries[n * D + 4 * i];
                float c[4] = {s[4 * n], s[4 * n + 1], s[4 * n + 2], s[4 * n + 3]};
                mma_f16(c, k0.x, k1.x, k0.y, k1.y, q.x, q.y);
                mma_f16(c, k0.z, k1.z, k0.w, k1.w, q.z, q.w);
#pragma unroll
                for (int j = 0; j < 4; ++j) s[4 * n + j] = c[j];
            }
        }
    }

    __device__ __forceinline__ void cap(float (&s)[4 * N]) const {
        const float limit = wide.call.a.soft_cap * log2e;
#pragma unroll
        for (int n = 0; n < N; ++n)
#pragma unroll
            for (int i = 0; i < 4; ++i) {
                const float factor = memory.variables.factors[column(n) + i % 2];
                s[4 * n + i] = limit / factor * tanhf(s[4 * n + i] * (factor / limit));
            }
    }

    // Adds the mask of the warp's rows. What it adds to scores passes through shared memory.
    __device__ __forceinline__ void apply_mask(const GroupStep & step, float (&s)[4 * N]) {
        const Attention & a = wide.call.a;
        const MaskRows mask = step.exact ? MaskRows(a.exact, a.tokens) : MaskRows(a);
        const int in_warp = place.lane % 16;
        const int64_t row = int64_t(keep(step.number)) * group_rows + 16 * place.warp + in_warp;
        const uint8_t * of_row = mask.row(0, 0, place.stream) + 2 * row;
        const int group = wide.call.plan.group;
        auto & biases = memory.variables.biases[place.in_block];
        constexpr int at_once = 4; // columns of a lane, each of which has every other column
        const auto move = [&](int & token, int & in_group, int by) {
            in_group += by;
            while (in_group >= group) {
                in_group -= group;
                ++token;
            }
        };
        int token = quotient(place.first_column, group), in_group = place.first_column - token * group;
        move(token, in_group, place.lane / 16);
        __syncwarp();
#pragma unroll 1
        for (int c = place.lane / 16; c < Memory::columns; c += 2 * at_once) {
            float bias[at_once], slope[at_once];
#pragma unroll
            for (int i = 0; i < at_once; ++i) {
                const int head = place.kv_head * group + in_group;
                const uint8_t * at = of_row + token * mask.token + remainder_of(head, mask.heads) * mask.head;
                bias[i] = row >= mask.rows || token >= a.tokens ? -INFINITY : mask.base ? load_half(at) : 0.0f;
                slope[i] = a.max_bias > 0 ? alibi_slope(wide.call, head) : 1.0f;
                move(token, in_group, 2);
            }
#pragma unroll
            for (int i = 0; i < at_once; ++i)
                biases[c + 2 * i][in_warp] =
                    bias[i] * __fdividef(log2e * slope[i], memory.variables.factors[c + 2 * i]);
        }
        __syncwarp();
#pragma unroll
        for (int n = 0; n < N; ++n)
#pragma unroll
            for (int i = 0; i < 4; ++i) {
                const float bias = biases[column(n) + i % 2][place.quad + i / 2 * 8];
                s[4 * n + i] = bias == -INFINITY ? -INFINITY : s[4 * n + i] + bias;
            }
    }

    // Chooses higher references for columns with scores that exceed theirs by far, and a larger unit, for all warps of
    // the warpgroup, and corrects the earlier sums.
    __device__ __forceinline__ void raise(const float (&s)[4 * N], float largest_scale, float * scales) {
        auto & tops = memory.variables.tops[place.group];
#pragma unroll
        for (int n = 0; n < N; ++n)
#pragma unroll
            for (int i = 0; i < 2; ++i) {
                const float top =
                    over_quads(fmaxf(s[4 * n + i], s[4 * n + 2 + i]) * memory.variables.factors[column(n) + i],
                               [](float a, float b) { return fmaxf(a, b); });
                if (place.quad == 0) tops[place.warp][column(n) + i] = top;
            }
        const float of_warp = __uint_as_float(warp_max(__float_as_uint(largest_scale)));
        if (place.lane == 0) scales[place.warp] = of_warp;
        sync_groups(barrier(), 1);
        float largest = 0;
#pragma unroll
        for (int w = 0; w < group_warps; ++w) largest = fmaxf(largest, scales[w]);
        const float before = unit;
        if (largest > unit) unit = __uint_as_float((__float_as_uint(largest) + 0x007fffff) & 0x7f800000);
        to_unit = 1 / unit;
        const float of_unit = before * to_unit;
#pragma unroll
        for (int n = 0; n < N; ++n) {
            const float4 both = scores(n);
            float references[2] = {both.y, both.w};
#pragma unroll
            for (int i = 0; i < 2; ++i) {
                float top = tops[0][column(n) + i];
#pragma unroll
                for (int w = 1; w < group_warps; ++w) top = fmaxf(top, tops[w][column(n) + i]);
                const float old = references[i];
                if (top > old + direct_lowered_by) references[i] = top - direct_lowered_by;
                const float correction = exp2f(old - references[i]);
                sum[n][i] *= correction;
#pragma unroll
                for (int m = 0; m < 2; ++m) {
                    output[m][4 * n + i] *= correction * of_unit;
                    output[m][4 * n + 2 + i] *= correction * of_unit;
                }
            }
            __syncwarp(); // all lanes have read it
            if (place.quad == 0) scores(n) = make_float4(both.x, references[0], both.z, references[1]);
        }
        __syncwarp();
    }

    // Turns scores into weights. Returns the sum of the lane's weights, which is not less than any of them, and sets
    // `added` to those of the columns.
    __device__ __forceinline__ float weigh(float (&s)[4 * N], float (&added)[N][2]) const {
#pragma unroll
        for (int n = 0; n < N; ++n) {
            const float4 both = scores(n);
#pragma unroll
            for (int i = 0; i < 2; ++i) {
                const float factor = i ? both.z : both.x, reference = i ? both.w : both.y;
                float &a = s[4 * n + i], &b = s[4 * n + 2 + i];
                a = exp2f(__fmaf_rn(a, factor, -reference));
                b = exp2f(__fmaf_rn(b, factor, -reference));
                added[n][i] = a + b;
            }
        }
        float all[N];
#pragma unroll
        for (int n = 0; n < N; ++n) all[n] = added[n][0] + added[n][1];
#pragma unroll
        for (int half = N / 2; half > 0; half /= 2)
#pragma unroll
            for (int n = 0; n < half; ++n) all[n] += all[n + half];
        return all[0];
    }

    // Writes weights times V's scales to the buffer: column c is row c of the matrix, and a unit has eight rows.
    __device__ __forceinline__ void store_weights(const float (&s)[4 * N], const half2 (&scale)[2]) const {
        const uint32_t to = memory.address + Memory::weights(place.group, buffer) + store_at;
#pragma unroll
        for (int n = 0; n < N; n += 2) {
            uint32_t x[4];
#pragma unroll
            for (int i = 0; i < 4; ++i) {
                const float * pair = s + 4 * (n + i / 2) + 2 * (i % 2);
                const half2 halves = __hmul2(__floats2half2_rn(pair[0], pair[1]), scale[i % 2]);
                x[i] = *reinterpret_cast<const uint32_t *>(&halves);
            }
            store_transposed(to + n * 8 * 128, x);
        }
        publish_writes();
    }

    // Computes the weights of a step, and stores them.
    __device__ __forceinline__ void add_scores(const GroupStep & step, bool first, float * scales) {
        float scale_k[2], scale_v[2];
#pragma unroll
        for (int h = 0; h < 2; ++h) {
            scale_k[h] = LK::load_block_scale(step.row_k + (step.exact ? 0 : 8 * h * Rows::pitch_k)) * LK::step;
            scale_v[h] = LV::load_block_scale(step.scale_v + h * step.to_scale);
            // As in WideRows::expand, a row whose V is not finite has a score that is NaN instead.
            if (!(fabsf(scale_v[h]) <= 65504.0f)) {
                scale_v[h] = 0;
                scale_k[h] = __uint_as_float(0x7fc00000);
            }
        }
        const float largest_scale = fmaxf(fabsf(scale_v[0]), fabsf(scale_v[1]));
        float s[4 * N], added[N][2];
        bool careful = first || step.exact || step.mixed || wide.call.a.soft_cap != 0;
        buffer ^= 1;
#pragma unroll 1
        while (true) {
            if (step.exact) {
                compute_exact_scores(step.number, s);
            } else {
                compute_scores(step.row_k, scale_k, s);
            }
            if (careful) {
                if (wide.call.a.soft_cap != 0) cap(s);
                if (step.mixed) apply_mask(step, s);
                raise(s, largest_scale, scales);
            }
            const float all = weigh(s, added);
            const half2 scale[2] = {__float2half2_rn(scale_v[0] * to_unit), __float2half2_rn(scale_v[1] * to_unit)};
            store_weights(s, scale);
            const bool again = !careful && (!(all <= most_direct_weight) || largest_scale > unit);
            if (!any_in_group(barrier(), again)) break;
            careful = true;
        }
#pragma unroll
        for (int n = 0; n < N; ++n)
#pragma unroll
            for (int i = 0; i < 2; ++i) sum[n][i] += added[n][i];
    }

    // Starts to add V times the weights in the buffer. finish_output waits.
    __device__ __forceinline__ void start_products(int t, uint32_t (&v)[2][4]) {
        const uint32_t weights = key_matrix(memory.address) + Memory::weights(place.group, buffer) / 16;
        keep_registers(v[0]);
        keep_registers(v[1]);
        products_fence();
#pragma unroll
        for (int m = 0; m < 2; ++m) multiply_halves(output[m], v[m], matrix_descriptor(weights + 2 * t));
    }
    __device__ __forceinline__ void add_values(const GroupStep & step) {
        constexpr int pitch = Rows::pitch_v;
        uint32_t v[group_rows / 16][2][4];
#pragma unroll
        for (int t = 0; t < group_rows / 16; ++t) {
            const uint8_t *const row0 = step.row_v0 + 16 * t * pitch, *const row1 = step.row_v1 + 16 * t * pitch;
            const uint8_t * const rows[4] = {row0, row0 + 8 * pitch, row1, row1 + 8 * pitch};
            uint32_t selectors[2];
            read_halves<TV, D>(rows, unit_of_lane(), half_of_lane(), selectors);
#pragma unroll
            for (int m = 0; m < 2; ++m)
#pragma unroll
                for (int h = 0; h < 2; ++h) { // nibble 2 m + h
                    uint32_t part[LV::parts];
                    look_up_v(shift_right(selectors[h], 16 * m), 0, 0, part);
                    const uint32_t bytes = biased_levels(part);
                    v[t][m][h] = level_halves(bytes, even_bytes);
                    v[t][m][h + 2] = level_halves(bytes, odd_bytes);
                }
        }
        const uint32_t weights = key_matrix(memory.address) + Memory::weights(place.group, buffer) / 16;
#pragma unroll
        for (int t = 0; t < group_rows / 16; ++t) {
            keep_registers(v[t][0]);
            keep_registers(v[t][1]);
        }
        products_fence();
#pragma unroll
        for (int t = 0; t < group_rows / 16; ++t)
#pragma unroll
            for (int m = 0; m < 2; ++m) multiply_halves(output[m], v[t][m], matrix_descriptor(weights + 2 * t));
        products_commit();
        finish_output();
    }
    __device__ __forceinline__ void add_exact_values(int step) {
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            const int tile = tile_of(step, half);
            uint4 row[2][2];
#pragma unroll
            for (int m = 0; m < 2; ++m)
#pragma unroll
                for (int h = 0; h < 2; ++h)
                    row[m][h] = tile < 0 ? make_uint4(0, 0, 0, 0)
                                         : *exact_row(place, wide.arrays.exact_v,
                                                      exact_tile(wide, place, tile) * D + element(m, h), tile_rows / 8);
#pragma unroll
            for (int t = 0; t < 2; ++t) {
                uint32_t v[2][4];
#pragma unroll
                for (int m = 0; m < 2; ++m)
#pragma unroll
                    for (int h = 0; h < 2; ++h) {
                        v[m][h] = t ? row[m][h].z : row[m][h].x;
                        v[m][h + 2] = t ? row[m][h].w : row[m][h].y;
                    }
                start_products(2 * half + t, v);
            }
        }
        products_commit();
        finish_output();
    }
    __device__ __forceinline__ void finish_output() {
        products_wait<0>();
        keep_registers(output[0]);
        keep_registers(output[1]);
    }

    // A lane has four elements of V: nibbles of half a unit. Those with m = 0 and m = 1 are adjacent.
    __device__ __forceinline__ int unit_of_lane() const { return 4 * place.warp + place.quad / 2; }
    __device__ __forceinline__ int half_of_lane() const { return place.quad % 2; }
    __device__ __forceinline__ int element(int m, int h) const {
        return unit_element<typename LV::BlockFormat>(unit_of_lane(), 4 * half_of_lane() + 2 * m + h);
    }

    // Stores what the warpgroup has.
    __device__ __forceinline__ void store(typename Memory::Results & results) {
        if (place.warp == 0 && place.lane == 0) results.unit = unit * LV::step;
#pragma unroll
        for (int n = 0; n < N; ++n)
#pragma unroll
            for (int i = 0; i < 2; ++i) {
                const float total = over_quads(sum[n][i], [](float a, float b) { return a + b; });
                if (place.quad == 0) {
                    results.sums[place.warp][column(n) + i] = total;
                    if (place.warp == 0) results.references[column(n) + i] = i ? scores(n).w : scores(n).y;
                }
#pragma unroll
                for (int h = 0; h < 2; ++h)
                    *reinterpret_cast<float2 *>(results.values[column(n) + i] + element(0, h)) =
                        make_float2(output[0][4 * n + 2 * h + i], output[1][4 * n + 2 * h + i]);
            }
    }

    // Merges what the warpgroups have stored, and stores it for merge_kernel. Each warp merges some columns.
    static __device__ __forceinline__ void merge(const AttentionCall & call, const GroupPlace & place,
                                                 const Memory & memory) {
#pragma unroll 1
        for (int c = place.in_block; c < place.columns; c += Memory::warps) {
            SoftmaxState all = {nothing_seen, 0};
#pragma unroll
            for (int g = 0; g < Memory::groups; ++g) all.largest = fmaxf(all.largest, memory.results(g).references[c]);
            float4 values = make_float4(0, 0, 0, 0);
#pragma unroll
            for (int g = 0; g < Memory::groups; ++g) {
                const typename Memory::Results & one = memory.results(g);
                const float weight = exp2f(one.references[c] - all.largest), factor = weight * one.unit;
                const float4 x = *reinterpret_cast<const float4 *>(one.values[c] + 4 * place.lane);
#pragma unroll
                for (int w = 0; w < group_warps; ++w) all.sum += weight * one.sums[w][c];
                values.x += factor * x.x;
                values.y += factor * x.y;
                values.z += factor * x.z;
                values.w += factor * x.w;
            }
            store_part<D>(call, place, c, all, values);
        }
    }
};

// ---- the kernel

template <KV TK, KV TV, int D, int N>
__global__ void __launch_bounds__(128 * groups_of(N), 1)
    hopper_direct_kernel(const __grid_constant__ WideCall wide) {
#if TURBOQUANT_WGMMA
    using Columns = GroupColumns<TK, TV, D, N>;
    using Memory = GroupMemory<D, N>;
    extern __shared__ __align__(16) uint8_t shared[];
    __shared__ float scales[most_groups][group_warps]; // of V; see code_for
    const AttentionCall & call = wide.call;
    const Attention & a = call.a;
    const AttentionPlan & plan = call.plan;
    const GroupPlace place(call);
    const Memory memory(shared);
    SeenTiles * seen = memory.variables.seen;
    const int first_step = int(place.begin / group_rows), steps = (place.length + group_rows - 1) / group_rows;
    const int first_tile = int(place.begin / tile_rows), tiles = (place.length + tile_rows - 1) / tile_rows;
    const int words = (first_tile % 32 + tiles + 31) / 32;
    using Rows = typename Columns::Rows;

    // The thread block's steps are those of an exact window, then those of the cache. The warpgroups take them in turn.
    const int exact_steps = (wide.arrays.exact_tiles + 1) / 2;
    const int exact = a.windowed ? (exact_steps - int(blockIdx.x) + plan.chunks - 1) / plan.chunks : 0;
    int item = place.group, next = item; // next: the next one that is copied
    while (next < exact) next += Memory::groups;
    Rows rows(call, place, memory.base + Memory::rows_at + place.group * group_stages * Rows::bytes,
              16 * place.warp, first_step + next - exact);
    const auto load = [&](int stage) {
        rows.load(next < exact + steps, stage, Memory::groups);
        next += Memory::groups;
    };
    const auto load_first = [&] {
#pragma unroll 1
        for (int stage = 0; stage < group_stages - 1; ++stage) load(stage);
    };
    // If the merge stores the batch, no kernel before it writes rows of the cache.
    const bool early = call.triggers_late;
    if (early) load_first();
    if (threadIdx.x == 0) memory.variables.exact_scale = __half_as_ushort(__float2half(Columns::of_exact));
    wait_for_previous();
    let_next_start(); // now what the merge stores is complete
    if (!early) load_first();
    Columns::load_queries(wide, place, memory);
    collect_seen(wide, place, seen, first_tile, words, place.in_block, Memory::warps);
    publish_writes();
    __syncthreads();
    Columns columns(wide, place, memory, unknown_zero());
    int stage = 0;
    bool first = true;
    GroupStep step = {};
#pragma unroll 1
    for (; item < exact + steps; item += Memory::groups) {
        step.exact = item < exact;
        int in_words;
        if (step.exact) {
            step.number = int(blockIdx.x) + item * plan.chunks;
            in_words = 32 * words + 2 * step.number;
            step.row_k = step.scale_v = reinterpret_cast<const uint8_t *>(&memory.variables.exact_scale);
            step.to_scale = 0;
        } else {
            step.number = first_step + item - exact;
            in_words = first_tile % 32 + 2 * (item - exact);
            copy_wait<group_stages - 2>();
            __syncwarp();
            const uint8_t * of_step = rows.memory + stage * rows.bytes;
            step.row_k = of_step + rows.row_k;
            step.scale_v = of_step + rows.row_v;
            step.to_scale = 8 * Rows::pitch_v;
            step.row_v0 = of_step + rows.row_v0;
            step.row_v1 = of_step + rows.row_v1;
        }
        const SeenTiles word = seen[in_words / 32];
        const uint32_t some = word.some >> in_words % 32 & 3;
        step.mixed = some != 3 || (word.mixed >> in_words % 32 & 3);
        if (some) {
            columns.add_scores(step, first, scales[place.group]);
            first = false;
        } else if (!step.exact) {
            sync_groups(columns.barrier(), 1);
        }
        // At the barrier, all warps had used the preceding step's stage.
        if (!step.exact) {
            load(stage == 0 ? group_stages - 1 : stage - 1);
            stage = stage + 1 == group_stages ? 0 : stage + 1;
        }
        if (!some) continue;
        if (step.exact) columns.add_exact_values(step.number);
        else columns.add_values(step);
    }
    copy_wait<0>();
    __syncthreads(); // the results replace the stages
    columns.store(memory.results(place.group));
    __syncthreads();
    Columns::merge(call, place, memory);
#endif
}

} // namespace

// The kernel for a pair of types and so many times eight columns, two or four, or nullptr if there is none.
WideKernel hopper_direct_kernel_128(KV type_k, KV type_v, int eights);

namespace {

template <int D> WideKernel hopper_direct_kernel_for(KV type_k, KV type_v, int eights) {
    return kernel_for_pair<D>(type_k, type_v, [&](auto k, auto v) -> WideKernel {
        using FamilyK = typename Kind<k()>::Family;
        using FamilyV = typename Kind<v()>::Family;
        if constexpr (are_related<FamilyK, LloydMax<4>> && are_related<FamilyV, LloydMax<4>>) {
            return eights == 2 ? hopper_direct_kernel<k(), v(), D, 2> : hopper_direct_kernel<k(), v(), D, 4>;
        } else {
            return nullptr;
        }
    });
}

} // namespace
} // namespace cuda
} // namespace turboquant

#endif
