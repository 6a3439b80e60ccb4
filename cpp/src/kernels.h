// The table of kernels that each ISA file defines. CONTRIBUTING.md describes how to add one.
#ifndef TURBOQUANT_KERNELS_H
#define TURBOQUANT_KERNELS_H

#include "turboquant.h"

namespace turboquant {

// ---- the tile engine of attention.cpp

constexpr int tile_rows = 64; // KV rows that are decoded at a time

struct SoftmaxState {
    float largest;    // of the scores so far
    float sum;        // of the weights so far, relative to the largest score
    float correction; // factor of the sums of the tiles before the last one
};

// Rows of a cache at a distance of `stride` bytes: the first `count` rows, or `count` rows selected by `index`.
struct CacheRows {
    const uint8_t * first;
    size_t stride;
    int count;
    const uint8_t * index; // null = all
    const uint8_t * operator[](int r) const { return first + size_t(index ? index[r] : r) * stride; }
};

#define TURBOQUANT_ONE_MORE(N) +1
constexpr int block_count = 0 TURBOQUANT_BLOCKS(TURBOQUANT_ONE_MORE);
#undef TURBOQUANT_ONE_MORE

// All functions work on whole blocks that follow each other without gaps. Arrays over types are indexed by tq_type,
// arrays over blocks by block_index.
struct Kernels {
    const char * name;
    void  (*rotate[block_count])  (const float * src, float * dst, int64_t blocks); // dst may equal src
    void  (*unrotate[block_count])(const float * src, float * dst, int64_t blocks); // dst may equal src
    void  (*query[block_count])   (const float * src, void * dst, int64_t blocks);
    void  (*encode[TQ_TYPE_COUNT])(const float * src, uint8_t * dst, int64_t blocks, tq_encode_report * report); // adds
    void  (*decode[TQ_TYPE_COUNT])(const uint8_t * src, float * dst, int64_t blocks);
    void  (*decode_rotated[TQ_TYPE_COUNT])(const uint8_t * src, float * dst, int64_t blocks);
    float (*dot[TQ_TYPE_COUNT])(const uint8_t * src, const void * query, int64_t blocks);

    // Attention. Rows beyond the KV range have scale 0; s and weights are [query row][tile_rows].
    // levels writes the int8 levels of rows, [count][blocks * N], and their scales d * step, [blocks][tile_rows].
    void (*levels[TQ_TYPE_COUNT])(const CacheRows & rows, int64_t blocks, int8_t * level, float * scale);
    void (*levels_q8_0)(const CacheRows & rows, int64_t blocks, int8_t * level, float * scale); // ggml's blocks of 32
    void (*levels_q4_0)(const CacheRows & rows, int64_t blocks, int8_t * level, float * scale);
    // keys arranges levels [tile_rows][head] for `scores`, in as many bytes (head rounded up to 64). It is null if
    // `scores` reads unarranged levels. 64 bytes behind level are readable.
    void (*keys)(const int8_t * level, int64_t head, int8_t * tile);
    // s = sum over blocks of q.scale * scale * <q, level>; q [rows][blocks] prepared.
    void (*scores[block_count])(const int8_t * tile, const float * scale, int64_t blocks, const void * q, int rows, float * s);
    void (*scores_float)(const float * k, int64_t head, const float * q, int rows, float * s);
    // bias computes the addends of a query row's scores: slope * mask (fp16 or float32), and -inf from `rows` on.
    void (*bias)(const void * mask, bool f32, float slope, int rows, float * bias);
    // softmax replaces the scores s by weights; most[tile_rows] is updated to their maximum over query rows.
    void (*softmax)(float * s, const float * bias, float scale, float soft_cap, SoftmaxState * state, float * most);
    // V as int8 levels, if that is faster than floats; else both are null. values arranges [count][head], count rounded
    // up to 4. sum[m] = correction[m] * sum[m] + (weights[m] * scale) . level; the products are rounded (coarse_share).
    void (*values)(const int8_t * level, int count, int64_t head, int8_t * tile);
    void (*accumulate_levels)(const int8_t * tile, const float * scale, int block, int count, int64_t head,
                              const float * weights, const SoftmaxState * state, int rows, float * sum, int64_t stride);
    // V as floats:
    void (*accumulate)(const float * v, int count, int64_t head, const float * weights, const SoftmaxState * state,
                       int rows, float * sum, int64_t stride);
    void (*load_f16)(const uint8_t * src, float * dst, int64_t n);
    void (*load_bf16)(const uint8_t * src, float * dst, int64_t n);
    // query_plain rounds a query to int8 in blocks of 32 without a rotation, for K types that are not rotated.
    void (*query_plain)(const float * src, void * dst, int64_t blocks);
    // lowest returns whether one of n levels (n a multiple of 32) is -128. It is null if `scores` is right for -128.
    bool (*lowest)(const int8_t * level, int64_t n);
};

// Initializes a Kernels from the functions that an ISA file defines or includes.
#define TURBOQUANT_ROTATE(N) rotate<N>,
#define TURBOQUANT_UNROTATE(N) unrotate<N>,
#define TURBOQUANT_PREPARE(N) query<N>,
#define TURBOQUANT_SCORES(N) scores<N>,
#define TURBOQUANT_ENCODE(ID, ...) encode<FormatOf<TQ_##ID>>,
#define TURBOQUANT_DECODE(ID, ...) decode<FormatOf<TQ_##ID>>,
#define TURBOQUANT_DECODE_ROTATED(ID, ...) decode_rotated<FormatOf<TQ_##ID>>,
#define TURBOQUANT_DOT(ID, ...) dot<FormatOf<TQ_##ID>>,
#define TURBOQUANT_LEVELS(ID, ...) levels<FormatOf<TQ_##ID>>,
#define TURBOQUANT_KERNELS_TABLE(NAME)                                                                          \
    {NAME,                                                                                                      \
     {TURBOQUANT_BLOCKS(TURBOQUANT_ROTATE)},                                                                    \
     {TURBOQUANT_BLOCKS(TURBOQUANT_UNROTATE)},                                                                  \
     {TURBOQUANT_BLOCKS(TURBOQUANT_PREPARE)},                                                                   \
     {TURBOQUANT_TYPES(TURBOQUANT_ENCODE)},                                                                     \
     {TURBOQUANT_TYPES(TURBOQUANT_DECODE)},                                                                     \
     {TURBOQUANT_TYPES(TURBOQUANT_DECODE_ROTATED)},                                                             \
     {TURBOQUANT_TYPES(TURBOQUANT_DOT)},                                                                        \
     {TURBOQUANT_TYPES(TURBOQUANT_LEVELS)},                                                                     \
     levels_q8_0, levels_q4_0, keys,                                                                            \
     {TURBOQUANT_BLOCKS(TURBOQUANT_SCORES)},                                                                    \
     scores_float, bias_tile, softmax, values, accumulate_levels, accumulate, load_f16, load_bf16_row,          \
     query_plain, lowest}

extern const Kernels kernels_scalar;
extern const Kernels kernels_avx2;
extern const Kernels kernels_avxvnni;
extern const Kernels kernels_avx512;
extern const Kernels kernels_avx512vnni;
extern const Kernels kernels_avx512vbmi;
extern const Kernels kernels_neon;
extern const Kernels kernels_neon_dotprod;

// The selected kernels (dispatch.cpp); scalar if TURBOQUANT_KERNELS names unknown or unsupported ones.
const Kernels & kernels();

} // namespace turboquant

#endif
