// The table that each ISA file fills, and the ordered list of tables. To add kernels: define the vocabulary of generic/
// in a file, export one table here, add a row to dispatch.cpp and the file with its flags to turboquant.cmake.
#ifndef TURBOQUANT_KERNELS_H
#define TURBOQUANT_KERNELS_H

#include "turboquant.h"

namespace turboquant {

// ---- the tile engine of attention.cpp

constexpr int tile_rows = 64; // KV rows that are decoded at a time

struct SoftmaxState {
    float largest;    // of the scores so far
    float sum;        // of the weights so far, relative to it
    float correction; // factor of what was accumulated before the last tile
};

// Rows of a cache, `stride` bytes apart: the first `count`, or those that `index` picks.
struct CacheRows {
    const uint8_t * first;
    size_t stride;
    int count;
    const uint8_t * index; // null = all
    const uint8_t * operator[](int r) const { return first + size_t(index ? index[r] : r) * stride; }
};

// All functions work on whole blocks that follow each other without gaps. Arrays over types are indexed by tq_type,
// arrays over blocks by 0 = 128, 1 = 64, 2 = 32.
struct Kernels {
    const char * name;
    void  (*rotate[3])  (const float * src, float * dst, int64_t blocks); // dst may equal src
    void  (*unrotate[3])(const float * src, float * dst, int64_t blocks); // dst may equal src
    void  (*query[3])   (const float * src, void * dst, int64_t blocks);
    void  (*encode[TQ_TYPE_COUNT])(const float * src, uint8_t * dst, int64_t blocks, tq_encode_report * report); // adds
    void  (*decode[TQ_TYPE_COUNT])(const uint8_t * src, float * dst, int64_t blocks);
    void  (*decode_rotated[TQ_TYPE_COUNT])(const uint8_t * src, float * dst, int64_t blocks);
    float (*dot[TQ_TYPE_COUNT])(const uint8_t * src, const void * query, int64_t blocks);

    // Attention. Rows beyond the KV range have scale 0; s and weights are [query row][tile_rows].
    // levels: the rows' int8 levels [count][blocks * N], and their scales d * step [blocks][tile_rows].
    void (*levels[TQ_TYPE_COUNT])(const CacheRows & rows, int64_t blocks, int8_t * level, float * scale);
    void (*levels_q8_0)(const CacheRows & rows, int64_t blocks, int8_t * level, float * scale); // ggml's blocks of 32
    void (*levels_q4_0)(const CacheRows & rows, int64_t blocks, int8_t * level, float * scale);
    // Arranges levels [tile_rows][head] as `scores` wants them, into as many bytes (head rounded up to 64); null if it
    // takes them as they are. level has 64 bytes to spare.
    void (*keys)(const int8_t * level, int64_t head, int8_t * tile);
    // s = sum over blocks of q.scale * scale * <q, level>; q [rows][blocks] prepared.
    void (*scores[3])(const int8_t * tile, const float * scale, int64_t blocks, const void * q, int rows, float * s);
    void (*scores_float)(const float * k, int64_t head, const float * q, int rows, float * s);
    // What is added to a query row's scores: slope * mask (fp16 or float32), and -inf from `rows` to tile_rows.
    void (*bias)(const void * mask, bool f32, float slope, int rows, float * bias);
    // s = weights; most[tile_rows] = their maximum over query rows.
    void (*softmax)(float * s, const float * bias, float scale, float soft_cap, SoftmaxState * state, float * most);
    // V as int8 levels, where that is faster than floats, else both null. values arranges [count][head], count rounded
    // up to 4. sum[m] = correction[m] * sum[m] + (weights[m] * scale) . level; the products are rounded (coarse_share).
    void (*values)(const int8_t * level, int count, int64_t head, int8_t * tile);
    void (*accumulate_levels)(const int8_t * tile, const float * scale, int block, int count, int64_t head,
                              const float * weights, const SoftmaxState * state, int rows, float * sum, int64_t stride);
    // V as floats:
    void (*accumulate)(const float * v, int count, int64_t head, const float * weights, const SoftmaxState * state,
                       int rows, float * sum, int64_t stride);
    void (*load_f16)(const uint8_t * src, float * dst, int64_t n);
    void (*load_bf16)(const uint8_t * src, float * dst, int64_t n);
    // The plain int8 rounding of a query for K types that are not rotated, in blocks of 32.
    void (*query_plain)(const float * src, void * dst, int64_t blocks);
    // Whether one of n levels, a multiple of 32, is -128, which `scores` would take wrongly; null if it takes them all.
    bool (*lowest)(const int8_t * level, int64_t n);
};

// Fills a Kernels from the functions that an ISA file defines or includes, so that the nine rows are written once.
#define TURBOQUANT_KERNELS_TABLE(NAME)                                                                          \
    {NAME,                                                                                                      \
     {rotate<128>, rotate<64>, rotate<32>},                                                                     \
     {unrotate<128>, unrotate<64>, unrotate<32>},                                                               \
     {query<128>, query<64>, query<32>},                                                                        \
     {encode<4, 128>, encode<4, 64>, encode<4, 32>, encode<3, 128>, encode<3, 64>, encode<3, 32>,               \
      encode<2, 128>, encode<2, 64>, encode<2, 32>},                                                            \
     {decode<4, 128>, decode<4, 64>, decode<4, 32>, decode<3, 128>, decode<3, 64>, decode<3, 32>,               \
      decode<2, 128>, decode<2, 64>, decode<2, 32>},                                                            \
     {decode_rotated<4, 128>, decode_rotated<4, 64>, decode_rotated<4, 32>, decode_rotated<3, 128>,             \
      decode_rotated<3, 64>, decode_rotated<3, 32>, decode_rotated<2, 128>, decode_rotated<2, 64>,              \
      decode_rotated<2, 32>},                                                                                   \
     {dot<4, 128>, dot<4, 64>, dot<4, 32>, dot<3, 128>, dot<3, 64>, dot<3, 32>, dot<2, 128>, dot<2, 64>,        \
      dot<2, 32>},                                                                                              \
     {levels<4, 128>, levels<4, 64>, levels<4, 32>, levels<3, 128>, levels<3, 64>, levels<3, 32>,               \
      levels<2, 128>, levels<2, 64>, levels<2, 32>},                                                            \
     levels_q8_0, levels_q4_0, keys,                                                                            \
     {scores<128>, scores<64>, scores<32>},                                                                     \
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

// dispatch.cpp: the selected kernels; scalar if TURBOQUANT_KERNELS cannot be honoured.
const Kernels & kernels();

} // namespace turboquant

#endif
