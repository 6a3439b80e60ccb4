// The table that each ISA file fills, and the ordered list of tables. To add kernels: copy scalar.cpp, keep the order of
// its functions, export one table here, add a row to dispatch.cpp and the file with its flags to turboquant.cmake.
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

    // Attention. Rows beyond the KV range hold zeros; s and weights are [query row][tile_rows].
    // levels: a row's int8 levels, and scale[block * tile_rows] = d * step of each block.
    void (*levels[TQ_TYPE_COUNT])(const uint8_t * src, int64_t blocks, int8_t * level, float * scale);
    // s = sum over blocks of q.scale * scale * <q, level>; level [tile_rows][blocks * N], q [rows][blocks] prepared.
    void (*scores[3])(const int8_t * level, const float * scale, int64_t blocks, const void * q, int rows, float * s);
    void (*scores_float)(const float * k, int64_t head, const float * q, int rows, float * s);
    void (*softmax)(float * s, const float * bias, float scale, float soft_cap, SoftmaxState * state);
    // sum[m] = correction[m] * sum[m] + weights[m] . v; v [count][head], sum rows are `stride` floats apart.
    void (*accumulate)(const float * v, int count, int64_t head, const float * weights, const SoftmaxState * state,
                       int rows, float * sum, int64_t stride);
    void (*load_f16)(const uint8_t * src, float * dst, int64_t n);
    void (*load_bf16)(const uint8_t * src, float * dst, int64_t n);
    // The plain int8 rounding of a query for K types that are not rotated, in blocks of 32.
    void (*query_plain)(const float * src, void * dst, int64_t blocks);
};

// Fills a Kernels from an ISA file's function templates, so that the nine rows are written once.
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
     {scores<128>, scores<64>, scores<32>},                                                                     \
     scores_float, softmax_tile, accumulate, load_f16, load_bf16_row, query_plain}

extern const Kernels kernels_scalar;
extern const Kernels kernels_avx2;
extern const Kernels kernels_avx512;
extern const Kernels kernels_avx512vnni;
extern const Kernels kernels_avx512vbmi;
extern const Kernels kernels_neon;
extern const Kernels kernels_neon_dotprod;

// dispatch.cpp: the selected kernels; scalar if TURBOQUANT_KERNELS cannot be honoured.
const Kernels & kernels();

} // namespace turboquant

#endif
