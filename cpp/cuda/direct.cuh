// The kernel template for attention of a few tokens, whose columns share the expansion of rows (speculative decoding, a
// few requests). wide.cu prepares the queries and launches calls.
//
// A thread block takes a run of KV rows of a KV head, and 16 of its query columns. Each of its warps copies tiles of 32
// rows to shared memory, and makes the operands of all columns from the encoded rows, in registers:
//
//   scores: A = K, levels plus 128 as unsigned bytes; B = queries rounded to int8, from shared memory
//   output: A = V transposed, levels in binary16; B = weights times V's scales, in binary16
//
// So rows are neither expanded in shared memory nor expanded again for other columns, and no warp waits for another one
// until all tiles are computed. Then the warps' results are merged in shared memory.
#ifndef TURBOQUANT_CUDA_DIRECT_H
#define TURBOQUANT_CUDA_DIRECT_H

#include "mma.cuh"
#include "wide.cuh"

namespace turboquant {
namespace cuda {

constexpr int direct_operands = 2;                  // of eight query columns, of a warp
constexpr int direct_columns = 8 * direct_operands; // of a thread block
constexpr int direct_warps = 12;                    // of a thread block
constexpr int direct_stages = 3;                    // tiles of a warp in shared memory

namespace {

// Weights of a tile are at most this, so that they are finite in binary16. References are less far below the largest
// scores than in wide.cuh, because a weight that is too large costs a second computation of the scores.
constexpr float most_direct_weight = 32768, direct_lowered_by = 4;

// The share of a warp.
struct DirectPlace {
    int lane, quad, in_quad, warp;
    int kv_head, stream, kv_stream;
    int first_column, columns; // of the thread block: the first one among those of the KV head, and their number
    int64_t begin;             // the first KV row of the thread block, a multiple of tile_rows
    int length;                // the number of its KV rows

    __device__ __forceinline__ explicit DirectPlace(const AttentionCall & call) {
        const Attention & a = call.a;
        const AttentionPlan & p = call.plan;
        lane = threadIdx.x % 32;
        quad = lane / 4;
        in_quad = lane % 4;
        warp = keep(threadIdx.x / 32);
        const int column_tile = quotient(blockIdx.y, a.kv_heads);
        first_column = column_tile * p.column_tile;
        columns = min(p.columns - first_column, p.column_tile);
        kv_head = int(blockIdx.y) - column_tile * a.kv_heads;
        stream = blockIdx.z;
        kv_stream = a.streams == a.kv_streams ? stream : stream / (a.streams / a.kv_streams);
        begin = int64_t(blockIdx.x) * p.chunk_rows;
        length = int(begin + p.chunk_rows < a.n_kv ? p.chunk_rows : a.n_kv - begin);
    }
};

// Bytes of a row of one head in shared memory: an odd number of units of 16 bytes, so that eight rows start in
// different banks. A row keeps its address modulo 16.
constexpr int direct_pitch(int bytes) { return ((bytes + 14 + 15) / 16 | 1) * 16; }

// As keep(), for a pointer.
__device__ __forceinline__ const uint8_t * keep(const uint8_t * p) {
    const uint64_t bits = reinterpret_cast<uint64_t>(p);
    return reinterpret_cast<const uint8_t *>(uint64_t(uint32_t(keep(int(bits >> 32)))) << 32 |
                                             uint32_t(keep(int(uint32_t(bits)))));
}

// Copies rows of the cache to shared memory, in steps of Step rows. A stage has rows of K, then the same rows of V, of
// which the warp copies Own rows from row `own` on.
template <KV TK, KV TV, int D, int Step, int Own> struct DirectRows {
    using LK = Layout<TK, D>;
    using LV = Layout<TV, D>;
    static constexpr int pitch_k = direct_pitch(LK::bytes), pitch_v = direct_pitch(LV::bytes);
    static constexpr int at_v = Step * pitch_k, bytes = at_v + Step * pitch_v; // of a stage
    static constexpr int lanes = 8, units = 16 * lanes; // lanes of a row, which copy 16 bytes each, or more
    static constexpr int apart = 32 / lanes;            // rows between those of a lane
    const AttentionCall & call;
    const DirectPlace & place;
    const uint8_t *k, *v; // row 0
    uint8_t * memory;     // of the stages
    int own;              // the first row of a step that the warp copies, a multiple of eight
    int step;             // the next one
    // If all rows have the same address modulo 16, a lane copies the same part of each of its rows, as long as there
    // are rows behind, whose bytes may be read.
    int64_t regular;         // rows that are copied so
    const uint8_t * from[2]; // the part of row own + lane / lanes of the next step of K and V
    int to[2];               // its place in a stage; negative if the lane has no part
    // The offsets in a stage of row own + quad of K and V, and of rows 2 * in_quad and 2 * in_quad + 1 of V.
    int row_k, row_v, row_v0, row_v1;

    __device__ __forceinline__ DirectRows(const AttentionCall & call, const DirectPlace & place, uint8_t * memory,
                                          int own, int first_step)
        : call(call), place(place), memory(memory), own(own), step(first_step) {
        const Attention & a = call.a;
        k = static_cast<const uint8_t *>(a.k) + place.kv_stream * a.k_stream + place.kv_head * a.k_head;
        v = static_cast<const uint8_t *>(a.v) + place.kv_stream * a.v_stream + place.kv_head * a.v_head;
        regular = (a.k_row | a.v_row) % 16 || max(LK::bytes, LV::bytes) + 15 > units ? 0 : a.n_kv - 1;
        const int row = own + place.lane / lanes, unit = place.lane % lanes * 16;
#pragma unroll
        for (int of_v = 0; of_v < 2; ++of_v) {
            const Side of = side(of_v);
            const int offset = int(reinterpret_cast<uintptr_t>(of.base) & 15);
            from[of_v] = keep(of.base - offset + (int64_t(first_step) * Step + row) * of.stride + unit);
            to[of_v] = keep(unit < offset + of.chunk ? of_v * at_v + row * of.pitch + unit : -1);
        }
        const auto offset = [&](bool of_v, int r) {
            const Side of = side(of_v);
            return of_v * at_v + r * of.pitch +
                   row_offset(uint32_t(reinterpret_cast<uintptr_t>(of.base)), uint32_t(of.stride), r);
        };
        row_k = keep(offset(false, own + place.quad));
        row_v = keep(offset(true, own + place.quad));
        row_v0 = keep(offset(true, 2 * place.in_quad));
        row_v1 = keep(offset(true, 2 * place.in_quad + 1));
    }
    __device__ __forceinline__ Side side(bool of_v) const {
        const Attention & a = call.a;
        return of_v ? Side{v, a.v_row, LV::bytes, pitch_v} : Side{k, a.k_row, LK::bytes, pitch_k};
    }

    // Starts to copy the warp's rows of the next step, unless it does not exist, and ends a group of copies. The step
    // after it is `further` steps further on.
    __device__ __forceinline__ void load(bool exists, int stage, int further) {
        if (exists) {
            const int64_t first = int64_t(step) * Step;
            const uint32_t shared = uint32_t(__cvta_generic_to_shared(memory)) + stage * bytes;
            if (first + Step <= regular) {
#pragma unroll
                for (int of_v = 0; of_v < 2; ++of_v) {
                    if (to[of_v] < 0) continue;
                    const int64_t stride = apart * (of_v ? call.a.v_row : call.a.k_row);
                    const uint8_t * at = from[of_v];
#pragma unroll
                    for (int r = 0; r < Own; r += apart, at += stride)
                        copy_async(shared + to[of_v] + r * (of_v ? pitch_v : pitch_k), at, 16);
                }
            } else {
#pragma unroll 1
                for (int of_v = 0; of_v < 2; ++of_v)
                    load_rows(shared + of_v * at_v + own * side(of_v).pitch, side(of_v), Own, first + own, call.a.n_kv,
                              {unsigned(place.lane), 32});
            }
        }
        copy_commit();
        step += further;
        from[0] += further * Step * call.a.k_row;
        from[1] += further * Step * call.a.v_row;
    }
};

// ---- operands

// The first of the thread block's columns among those of all streams and KV heads.
__device__ __forceinline__ int64_t first_prepared(const WideCall & wide, const DirectPlace & place) {
    const AttentionPlan & p = wide.call.plan;
    return (int64_t(place.stream) * wide.call.a.kv_heads + place.kv_head) * p.column_tiles * p.column_tile +
           place.first_column;
}
// The number of an exact tile among those of all streams and KV heads.
__device__ __forceinline__ int64_t exact_tile(const WideCall & wide, const DirectPlace & place, int tile) {
    return (int64_t(place.kv_stream) * wide.call.a.kv_heads + place.kv_head) * wide.arrays.exact_tiles + tile;
}
// The first of four words of a prepared row of an exact tile, or of prepared queries, that are a lane's.
__device__ __forceinline__ const uint4 * exact_row(const DirectPlace & place, const uint16_t * rows, int64_t row,
                                                   int units) {
    return reinterpret_cast<const uint4 *>(rows) + row * units + place.in_quad;
}

// Register i of levels, plus 128 as unsigned bytes.
template <typename L, typename Levels>
__device__ __forceinline__ uint32_t biased_register(const Levels & levels, int i) {
    uint32_t part[L::parts];
#pragma unroll
    for (int p = 0; p < L::parts; ++p) part[p] = levels.x[p][i];
    return biased_levels(part);
}
// Two of the bytes level + 128 as levels in binary16. Byte 0x64 above such a byte gives 1024 + byte.
__device__ __forceinline__ uint32_t level_halves(uint32_t bytes, uint32_t selector) {
    const uint32_t bits = prmt(bytes, 0x64646464, selector);
    const half2 level = __hsub2(*reinterpret_cast<const half2 *>(&bits), __floats2half2_rn(1152.0f, 1152.0f));
    return *reinterpret_cast<const uint32_t *>(&level);
}

// Which tiles of a word any of the columns sees: of the cache, or of an exact window.
__device__ __forceinline__ SeenTiles seen_by_columns(const WideCall & wide, const DirectPlace & place, bool of_exact,
                                                     int word) {
    const Attention & a = wide.call.a;
    const MaskRows mask = of_exact ? MaskRows(a.exact, a.tokens) : MaskRows(a);
    const SeenTiles * seen = of_exact ? wide.arrays.exact_seen : wide.arrays.seen;
    const int words = of_exact ? wide.arrays.exact_words : wide.arrays.words;
    SeenTiles all = {0, 0};
    if (!mask.base) {
        const int64_t left = mask.rows - int64_t(word) * seen_rows; // rows from the word's on
        const int tiles = int(min(left / tile_rows, int64_t(32)));
        all.mixed = left < seen_rows && left % tile_rows ? 1u << tiles : 0;
        all.some = (tiles < 32 ? (1u << tiles) - 1 : ~0u) | all.mixed;
        return all;
    }
    const int group = wide.call.plan.group, first = quotient(place.first_column, group),
              tokens = quotient(place.first_column + place.columns - 1, group) + 1 - first;
#pragma unroll 1
    for (int i = place.lane; i < mask.heads * tokens; i += 32) {
        const int head = quotient(i, tokens), token = first + i - head * tokens;
        const SeenTiles one = seen[mask.number(token, head, place.stream, a.tokens) * words + word];
        all.some |= one.some;
        all.mixed |= one.mixed;
    }
#pragma unroll
    for (int h = 16; h > 0; h /= 2) {
        all.some |= __shfl_xor_sync(all_lanes, all.some, h);
        all.mixed |= __shfl_xor_sync(all_lanes, all.mixed, h);
    }
    return all;
}

// The warps of the thread block collect which of its tiles any of the columns sees: words of the cache from tile
// `first_tile` on, then those of an exact window. The last warps begin, because the first ones load queries.
__device__ __forceinline__ void collect_seen(const WideCall & wide, const DirectPlace & place, SeenTiles * seen,
                                             int first_tile, int words, int warp, int warps) {
    const int all_words = words + (wide.call.a.windowed ? wide.arrays.exact_words : 0);
#pragma unroll 1
    for (int w = warps - 1 - warp; w < all_words; w += warps) {
        const SeenTiles one = seen_by_columns(wide, place, w >= words, w < words ? first_tile / 32 + w : w - words);
        if (place.lane == 0) seen[w] = one;
    }
}

// Stores what the thread block has of its column c, for merge_kernel: four values of each lane.
template <int D>
__device__ __forceinline__ void store_part(const AttentionCall & call, const DirectPlace & place, int c,
                                           const SoftmaxState & state, const float4 & values) {
    static_assert(D == 4 * 32, "a lane has four values");
    const int64_t at =
        query_row(call, place.stream, place.kv_head, place.first_column + c) * call.all_parts + blockIdx.x;
    if (place.lane == 0) call.states[at] = state;
    reinterpret_cast<float4 *>(call.partial + at * D)[place.lane] = values;
}

// A tile of 32 rows: of the cache, or of the rows of an exact window.
struct DirectTile {
    int number;
    bool exact;
    bool mixed; // whether rows are hidden from a column, or have biases
    // Of the cache: row `quad` of K and of V, and rows 2 in_quad and 2 in_quad + 1 of V, in shared memory.
    const uint8_t *row_k, *row_v, *row_v0, *row_v1;
};

// What the warps of a thread block share.
template <int D> struct DirectMemory {
    uint4 queries[D / 32][32];                      // of both operands: [product][lane]
    uint2 start[direct_operands][4];                // of the products: magic_bits, less what the bias of K adds
    float2 factors[direct_operands][4];             // of the queries
    float biases[direct_warps][direct_columns][36]; // of a warp's tile; no two lanes read from the same bank
};
// What a warp has at the end.
template <int D> struct __align__(16) DirectResults {
    float values[direct_columns][D + 4]; // no two lanes write to the same bank
    SoftmaxState states[direct_columns];
    float unit;
};
// The bytes of the warps' stages, or of their results, which replace these.
template <int D> __host__ __device__ __forceinline__ int direct_row_bytes(const AttentionPlan & p) {
    const int stages = direct_warps * direct_stages * tile_rows * (p.pitch_k + p.pitch_v);
    const int results = direct_warps * int(sizeof(DirectResults<D>));
    return stages > results ? stages : results;
}

// The columns of a warp, two operands of eight. A lane has columns 8 n + 2 in_quad + i of rows quad + 8 j.
template <KV TK, KV TV, int D> struct DirectColumns {
    using LK = Layout<TK, D>;
    using LV = Layout<TV, D>;
    using Rows = DirectRows<TK, TV, D, tile_rows, tile_rows>;
    using Scores = float[lane_rows][direct_operands][2];
    static constexpr int N = direct_operands, steps = D / 32;
    static constexpr float of_exact = 128; // the unit of exact values: value_unit is that of 128 levels
    static_assert(LK::block == D && LV::block == D, "a row is a block");
    static_assert(N == 2, "the queries of both operands are read at a time");

    using Memory = DirectMemory<D>;

    const WideCall & wide;
    const DirectPlace & place;
    Memory & memory;
    const typename LK::LookUpLevels look_up_k;
    const typename LV::LookUpLevels look_up_v;
    float to_log2[N][2], reference[N][2], sum[N][2];
    float output[D / 16][N][4] = {}; // in multiples of `unit`, whose values have the place that for_output says
    float unit = 0x1p-40f;           // a power of two that is not less than V's scales so far

    __device__ __forceinline__ DirectColumns(const WideCall & wide, const DirectPlace & place, Memory & memory,
                                             uint32_t zero)
        : wide(wide), place(place), memory(memory), look_up_k(zero), look_up_v(zero) {
#pragma unroll
        for (int n = 0; n < N; ++n) {
            const float2 factors = memory.factors[n][place.in_quad];
            to_log2[n][0] = factors.x;
            to_log2[n][1] = factors.y;
#pragma unroll
            for (int i = 0; i < 2; ++i) {
                reference[n][i] = nothing_seen;
                sum[n][i] = 0;
            }
        }
    }

    // The first two warps write the queries of an operand to the memory.
    static __device__ __forceinline__ void load_queries(const WideCall & wide, const DirectPlace & place,
                                                        Memory & memory) {
        const int n = place.warp;
        if (n >= N) return;
        const int64_t column = first_prepared(wide, place) + 8 * n;
        const uint2 * words = reinterpret_cast<const uint2 *>(wide.arrays.queries + (column + place.quad) * D);
        uint2 * operands = reinterpret_cast<uint2 *>(memory.queries);
        int total = 0;
#pragma unroll
        for (int i = 0; i < steps; ++i) {
            // The unit of a row of K that a lane has in product i, in the order of operand_position.
            const uint2 b = words[place.in_quad + (LK::nibbles ? 4 * i : 4 * (i >> 1) + 8 * (i & 1))];
            total = __dp4a(int(b.x), 0x01010101, __dp4a(int(b.y), 0x01010101, total));
            operands[(32 * i + place.lane) * N + n] = b;
        }
        total += __shfl_xor_sync(all_lanes, total, 1);
        total += __shfl_xor_sync(all_lanes, total, 2);
        if (place.in_quad == 0) reinterpret_cast<int *>(memory.start[n])[place.quad] = magic_bits - 128 * total;
        if (place.lane < 8)
            reinterpret_cast<float *>(memory.factors[n])[place.lane] = wide.arrays.factors[column + place.lane];
    }

    // Computes the scores of a tile of the cache, without the factors of the queries. `scale` has K's scales.
    __device__ __forceinline__ void compute_scores(const uint8_t * row, const float (&scale)[lane_rows],
                                                   Scores & s) const {
        int c[2][N][4];
#pragma unroll
        for (int n = 0; n < N; ++n) {
            const uint2 two = memory.start[n][place.in_quad];
#pragma unroll
            for (int t = 0; t < 2; ++t)
#pragma unroll
                for (int i = 0; i < 4; ++i) c[t][n][i] = int(i % 2 ? two.y : two.x);
        }
#pragma unroll
        for (int step = 0; step < steps; ++step) {
            uint32_t k[2][4];
#pragma unroll
            for (int j = 0; j < lane_rows; ++j) {
                const auto levels =
                    key_levels<TK, D>(look_up_k, row + 8 * j * Rows::pitch_k, step, place.in_quad);
#pragma unroll
                for (int i = 0; i < 2; ++i) k[j / 2][j % 2 + 2 * i] = biased_register<LK>(levels, i);
            }
            const uint4 q = memory.queries[step][place.lane];
#pragma unroll
            for (int t = 0; t < 2; ++t) {
                mma_unsigned(c[t][0], k[t], q.x, q.y);
                mma_unsigned(c[t][1], k[t], q.z, q.w);
            }
        }
#pragma unroll
        for (int j = 0; j < lane_rows; ++j) {
            const float offset = -magic * scale[j];
#pragma unroll
            for (int n = 0; n < N; ++n)
#pragma unroll
                for (int i = 0; i < 2; ++i)
                    s[j][n][i] = __fmaf_rn(__int_as_float(c[j / 2][n][j % 2 * 2 + i]), scale[j], offset);
        }
    }

    // The same for a tile of exact rows. The inner index of the products has an order in which a lane's four registers
    // of a row are adjacent elements.
    __device__ __forceinline__ void compute_exact_scores(int tile, Scores & s) const {
        const uint4 * queries =
            exact_row(place, wide.arrays.exact_queries, first_prepared(wide, place) + place.quad, D / 8);
        const uint4 * keys =
            exact_row(place, wide.arrays.exact_k, exact_tile(wide, place, tile) * tile_rows + place.quad, D / 8);
        float c[2][N][4] = {};
#pragma unroll 1
        for (int i = 0; i < D / 32; ++i) {
            uint4 k[lane_rows];
#pragma unroll
            for (int j = 0; j < lane_rows; ++j) k[j] = keys[j * D + 4 * i];
#pragma unroll
            for (int n = 0; n < N; ++n) {
                const uint4 q = queries[n * D + 4 * i];
#pragma unroll
                for (int t = 0; t < 2; ++t) {
                    mma_f16(c[t][n], k[2 * t].x, k[2 * t + 1].x, k[2 * t].y, k[2 * t + 1].y, q.x, q.y);
                    mma_f16(c[t][n], k[2 * t].z, k[2 * t + 1].z, k[2 * t].w, k[2 * t + 1].w, q.z, q.w);
                }
            }
        }
#pragma unroll
        for (int j = 0; j < lane_rows; ++j)
#pragma unroll
            for (int n = 0; n < N; ++n)
#pragma unroll
                for (int i = 0; i < 2; ++i) s[j][n][i] = c[j / 2][n][j % 2 * 2 + i];
    }

    __device__ __forceinline__ void cap(Scores & s) const {
        const float limit = wide.call.a.soft_cap * log2e;
#pragma unroll
        for (int n = 0; n < N; ++n)
#pragma unroll
            for (int i = 0; i < 2; ++i) {
                const float to = to_log2[n][i] / limit, from = limit / to_log2[n][i];
#pragma unroll
                for (int j = 0; j < lane_rows; ++j) s[j][n][i] = from * tanhf(s[j][n][i] * to);
            }
    }

    // Adds the mask of a tile. A lane reads the masks of a row. What they add to scores passes through shared memory.
    __device__ __forceinline__ void apply_mask(const DirectTile & tile, Scores & s) {
        const Attention & a = wide.call.a;
        const MaskRows mask = tile.exact ? MaskRows(a.exact, a.tokens) : MaskRows(a);
        const int64_t row = int64_t(tile.number) * tile_rows + place.lane;
        const uint8_t * of_row = mask.row(0, 0, place.stream) + 2 * row;
        const int group = wide.call.plan.group;
        auto & biases = memory.biases[place.warp];
        int token = quotient(place.first_column, group), in_group = place.first_column - token * group;
        __syncwarp();
#pragma unroll 1
        for (int c = 0; c < 8 * N; c += 8) {
            float bias[8], slope[8];
#pragma unroll
            for (int i = 0; i < 8; ++i) {
                const int head = place.kv_head * group + in_group;
                const uint8_t * at = of_row + token * mask.token + remainder_of(head, mask.heads) * mask.head;
                bias[i] = row >= mask.rows || token >= a.tokens ? -INFINITY : mask.base ? load_half(at) : 0.0f;
                slope[i] = a.max_bias > 0 ? alibi_slope(wide.call, head) : 1.0f;
                if (++in_group == group) {
                    in_group = 0;
                    ++token;
                }
            }
            const float * factors = reinterpret_cast<const float *>(memory.factors) + c;
#pragma unroll
            for (int i = 0; i < 8; ++i)
                biases[c + i][place.lane] = bias[i] * __fdividef(log2e * slope[i], factors[i]);
        }
        __syncwarp();
#pragma unroll
        for (int n = 0; n < N; ++n)
#pragma unroll
            for (int i = 0; i < 2; ++i)
#pragma unroll
                for (int j = 0; j < lane_rows; ++j) {
                    const float bias = biases[8 * n + 2 * place.in_quad + i][place.quad + 8 * j];
                    s[j][n][i] = bias == -INFINITY ? -INFINITY : s[j][n][i] + bias;
                }
    }

    // Chooses a higher reference for columns with scores that exceed theirs by far. Sets the factors of earlier sums,
    // and returns whether they are not all one.
    __device__ __forceinline__ bool raise_references(const Scores & s, float (&correction)[N][2]) {
        bool some = false;
#pragma unroll
        for (int n = 0; n < N; ++n)
#pragma unroll
            for (int i = 0; i < 2; ++i) {
                float top = fmaxf(fmaxf(s[0][n][i], s[1][n][i]), fmaxf(s[2][n][i], s[3][n][i])) * to_log2[n][i];
                top = over_quads(top, [](float a, float b) { return fmaxf(a, b); });
                const float before = reference[n][i];
                if (top > before + direct_lowered_by) reference[n][i] = top - direct_lowered_by;
                correction[n][i] = exp2f(before - reference[n][i]);
                some = some || correction[n][i] != 1.0f;
            }
        return __any_sync(all_lanes, some);
    }
    __device__ __forceinline__ void correct(const float (&correction)[N][2]) {
#pragma unroll
        for (int n = 0; n < N; ++n)
#pragma unroll
            for (int i = 0; i < 2; ++i) {
                sum[n][i] *= correction[n][i];
#pragma unroll
                for (int m = 0; m < D / 16; ++m) {
                    output[m][n][i] *= correction[n][i];
                    output[m][n][i + 2] *= correction[n][i];
                }
            }
    }

    // Turns scores into weights. Returns the sum of the lane's weights, which is not less than any of them, and sets
    // `added` to those of the columns.
    __device__ __forceinline__ float weigh(Scores & s, float (&added)[N][2]) const {
        float all = 0;
#pragma unroll
        for (int n = 0; n < N; ++n)
#pragma unroll
            for (int i = 0; i < 2; ++i) {
#pragma unroll
                for (int j = 0; j < lane_rows; ++j)
                    s[j][n][i] = exp2f(__fmaf_rn(s[j][n][i], to_log2[n][i], -reference[n][i]));
                added[n][i] = (s[0][n][i] + s[1][n][i]) + (s[2][n][i] + s[3][n][i]);
                all += added[n][i];
            }
        return all;
    }

    __device__ __forceinline__ void correct_output(float correction) {
#pragma unroll
        for (int m = 0; m < D / 16; ++m)
#pragma unroll
            for (int n = 0; n < N; ++n)
#pragma unroll
                for (int i = 0; i < 4; ++i) output[m][n][i] *= correction;
    }

    // Adds a tile. `first`: whether it is the warp's first one.
    __device__ __forceinline__ void add_tile(const DirectTile & tile, bool first) {
        float scale_k[lane_rows], scale_v[lane_rows];
#pragma unroll
        for (int j = 0; j < lane_rows; ++j) {
            scale_k[j] = 0;
            scale_v[j] = of_exact;
            if (tile.exact) continue;
            scale_k[j] = LK::load_block_scale(tile.row_k + 8 * j * Rows::pitch_k) * LK::step;
            scale_v[j] = LV::load_block_scale(tile.row_v + 8 * j * Rows::pitch_v);
            // As in WideRows::expand, a row whose V is not finite has a score that is NaN instead.
            if (!(fabsf(scale_v[j]) <= 65504.0f)) {
                scale_v[j] = 0;
                scale_k[j] = __uint_as_float(0x7fc00000);
            }
        }
        Scores s;
        float added[N][2];
        bool careful = first || tile.exact || tile.mixed || wide.call.a.soft_cap != 0;
#pragma unroll 1
        while (true) {
            if (tile.exact) compute_exact_scores(tile.number, s);
            else compute_scores(tile.row_k, scale_k, s);
            if (careful) {
                if (wide.call.a.soft_cap != 0) cap(s);
                if (tile.mixed) apply_mask(tile, s);
                float correction[N][2];
                if (raise_references(s, correction)) correct(correction);
            }
            const float all = weigh(s, added);
            if (careful || !__any_sync(all_lanes, !(all <= most_direct_weight))) break;
            careful = true;
        }
#pragma unroll
        for (int n = 0; n < N; ++n)
#pragma unroll
            for (int i = 0; i < 2; ++i) sum[n][i] += added[n][i];
        float largest = fabsf(scale_v[0]);
#pragma unroll
        for (int j = 1; j < lane_rows; ++j) largest = fmaxf(largest, fabsf(scale_v[j]));
        if (__any_sync(all_lanes, largest > unit)) {
            const float before = unit;
            unit = __uint_as_float((warp_max(__float_as_uint(largest)) + 0x007fffff) & 0x7f800000);
            correct_output(before / unit);
        }
        const float to_unit = 1 / unit;
        uint32_t weights[N][lane_rows]; // operand B
#pragma unroll
        for (int j = 0; j < lane_rows; ++j) {
            const float scale = scale_v[j] * to_unit;
#pragma unroll
            for (int n = 0; n < N; ++n) {
                const half2 pair = __floats2half2_rn(s[j][n][0] * scale, s[j][n][1] * scale);
                weights[n][j] = transpose_matrix(*reinterpret_cast<const uint32_t *>(&pair));
            }
        }
        if (tile.exact) add_exact_values(tile.number, weights);
        else add_values(tile, weights);
    }

    // Adds product m: V of two times 16 rows, times weights.
    __device__ __forceinline__ void multiply(int m, const uint32_t (&v)[2][4],
                                             const uint32_t (&weights)[N][lane_rows]) {
#pragma unroll
        for (int t = 0; t < 2; ++t)
#pragma unroll
            for (int n = 0; n < N; ++n)
                mma_f16(output[m][n], v[t][0], v[t][1], v[t][2], v[t][3], weights[n][2 * t], weights[n][2 * t + 1]);
    }
    __device__ __forceinline__ void add_values(const DirectTile & tile, const uint32_t (&weights)[N][lane_rows]) {
        const uint8_t * row[8];
#pragma unroll
        for (int i = 0; i < 8; ++i)
            row[i] = (i & 2 ? tile.row_v1 : tile.row_v0) + (i / 4 * 2 + i % 2) * 8 * Rows::pitch_v;
        const ValueBlock<TV, D> values(row, 0, place.quad);
        constexpr int products = ValueUnits<TV, D>::products;
#pragma unroll
        for (int m = 0; m < D / 16; ++m) {
            const auto levels = values.levels(look_up_v, m / products, m % products);
            uint32_t v[2][4];
#pragma unroll
            for (int i = 0; i < 4; ++i) {
                const uint32_t bytes = biased_register<LV>(levels, i);
                v[i / 2][i % 2] = level_halves(bytes, even_bytes);
                v[i / 2][i % 2 + 2] = level_halves(bytes, odd_bytes);
            }
            multiply(m, v, weights);
        }
    }
    __device__ __forceinline__ void add_exact_values(int tile, const uint32_t (&weights)[N][lane_rows]) {
        using Units = ValueUnits<TV, D>;
#pragma unroll
        for (int m = 0; m < D / 16; ++m) {
            uint4 row[2];
#pragma unroll
            for (int half = 0; half < 2; ++half) {
                const int of_row = Units::unit(place.quad, m / Units::products);
                const int element = unit_element<typename LV::BlockFormat>(of_row, half) + m % Units::products;
                row[half] = *exact_row(place, wide.arrays.exact_v, exact_tile(wide, place, tile) * D + element,
                                       tile_rows / 8);
            }
            const uint32_t v[2][4] = {{row[0].x, row[1].x, row[0].y, row[1].y},
                                      {row[0].z, row[1].z, row[0].w, row[1].w}};
            multiply(m, v, weights);
        }
    }

    // Stores what the warp has.
    __device__ __forceinline__ void store(DirectResults<D> & results) {
        if (place.lane == 0) results.unit = unit * LV::step;
#pragma unroll
        for (int n = 0; n < N; ++n)
#pragma unroll
            for (int i = 0; i < 2; ++i) {
                const int column = 8 * n + 2 * place.in_quad + i;
                const float total = over_quads(sum[n][i], [](float a, float b) { return a + b; });
                if (place.quad == 0) results.states[column] = {reference[n][i], total};
                Sums<D, 1> values;
#pragma unroll
                for (int m = 0; m < D / 16; ++m)
#pragma unroll
                    for (int half = 0; half < 2; ++half) values[m][half][0] = output[m][n][2 * half + i];
                store_output<TV, D, 1>(results.values[column], values, 0, place.quad);
            }
    }

    // Merges what the warps have stored, and stores it for merge_kernel. Each warp merges some columns.
    static __device__ __forceinline__ void merge(const AttentionCall & call, const DirectPlace & place,
                                                 const DirectResults<D> * results) {
#pragma unroll 1
        for (int c = place.warp; c < place.columns; c += direct_warps) {
            SoftmaxState all = {nothing_seen, 0};
#pragma unroll
            for (int w = 0; w < direct_warps; ++w) all.largest = fmaxf(all.largest, results[w].states[c].largest);
            float4 sum = make_float4(0, 0, 0, 0);
#pragma unroll
            for (int w = 0; w < direct_warps; ++w) {
                const SoftmaxState one = results[w].states[c];
                const float weight = exp2f(one.largest - all.largest), factor = weight * results[w].unit;
                const float4 x = *reinterpret_cast<const float4 *>(results[w].values[c] + 4 * place.lane);
                all.sum += weight * one.sum;
                sum.x += factor * x.x;
                sum.y += factor * x.y;
                sum.z += factor * x.z;
                sum.w += factor * x.w;
            }
            store_part<D>(call, place, c, all, sum);
        }
    }
};

// ---- the kernel

template <KV TK, KV TV, int D>
__global__ void __launch_bounds__(32 * direct_warps, 1) direct_kernel(const __grid_constant__ WideCall wide) {
    using Columns = DirectColumns<TK, TV, D>;
    using Memory = DirectMemory<D>;
    using Results = DirectResults<D>;
    extern __shared__ __align__(16) uint8_t shared[];
    const AttentionCall & call = wide.call;
    const Attention & a = call.a;
    const AttentionPlan & plan = call.plan;
    const DirectPlace place(call);
    Memory & memory = *reinterpret_cast<Memory *>(shared);
    const int first_tile = int(place.begin / tile_rows), tiles = (place.length + tile_rows - 1) / tile_rows;
    const int words = (first_tile % 32 + tiles + 31) / 32;
    uint8_t * of_rows = shared + sizeof(Memory);
    SeenTiles * seen = reinterpret_cast<SeenTiles *>(of_rows + direct_row_bytes<D>(plan)); // and of an exact window

    // The thread block's tiles are those of an exact window, then those of the cache. The warps take them in turn.
    const int exact = a.windowed ? (wide.arrays.exact_tiles - int(blockIdx.x) + plan.chunks - 1) / plan.chunks : 0;
    int item = place.warp, next = item; // next: the next one that is copied
    while (next < exact) next += direct_warps;
    typename Columns::Rows rows(call, place, of_rows + place.warp * direct_stages * Columns::Rows::bytes, 0,
                                first_tile + next - exact);
    const auto load = [&](int stage) {
        rows.load(next < exact + tiles, stage, direct_warps);
        next += direct_warps;
    };
    const auto load_first = [&] {
#pragma unroll 1
        for (int stage = 0; stage < direct_stages - 1; ++stage) load(stage);
    };
    // If the merge stores the batch, no kernel before it writes rows of the cache.
    const bool early = call.triggers_late;
    if (early) load_first();
    wait_for_previous();
    let_next_start(); // now what the merge stores is complete
    if (!early) load_first();
    Columns::load_queries(wide, place, memory);
    collect_seen(wide, place, seen, first_tile, words, place.warp, direct_warps);
    __syncthreads();
    Columns columns(wide, place, memory, unknown_zero());
    int stage = 0;
    bool first = true;
    DirectTile tile = {};
#pragma unroll 1
    for (; item < exact + tiles; item += direct_warps) {
        tile.exact = item < exact;
        int in_words;
        if (tile.exact) {
            tile.number = int(blockIdx.x) + item * plan.chunks;
            in_words = 32 * words + tile.number;
        } else {
            tile.number = first_tile + item - exact;
            in_words = first_tile % 32 + item - exact;
            copy_wait<direct_stages - 2>();
            __syncwarp(); // all lanes have used the stage that is loaded now
            load(stage == 0 ? direct_stages - 1 : stage - 1);
            const uint8_t * of_tile = rows.memory + stage * rows.bytes;
            tile.row_k = of_tile + rows.row_k;
            tile.row_v = of_tile + rows.row_v;
            tile.row_v0 = of_tile + rows.row_v0;
            tile.row_v1 = of_tile + rows.row_v1;
            stage = stage + 1 == direct_stages ? 0 : stage + 1;
        }
        const SeenTiles one = seen[in_words / 32];
        if (!(one.some >> in_words % 32 & 1)) continue;
        tile.mixed = one.mixed >> in_words % 32 & 1;
        columns.add_tile(tile, first);
        first = false;
    }
    copy_wait<0>();
    __syncthreads(); // the results replace the stages
    Results * results = reinterpret_cast<Results *>(of_rows);
    columns.store(results[place.warp]);
    __syncthreads();
    Columns::merge(call, place, results);
}

} // namespace

// The kernel for a pair of types, or nullptr if there is none.
WideKernel direct_kernel_128(KV type_k, KV type_v);

namespace {

template <int D> WideKernel direct_kernel_for(KV type_k, KV type_v) {
    return kernel_for_pair<D>(type_k, type_v, [](auto k, auto v) -> WideKernel {
        if constexpr (Kind<k()>::turbo && Kind<v()>::turbo) return direct_kernel<k(), v(), D>;
        else return nullptr;
    });
}

} // namespace

} // namespace cuda
} // namespace turboquant

#endif
