// Scores for registers of K that have four channels of one KV row in each lane, so that dot products of four bytes need
// no sums across lanes. codec.h must be included before. An ISA file also defines
//
//   transpose                 writes 16 bytes of `lanes` rows, at a distance of `stride`, as four columns of dwords, at
// a
//                             distance of 4 * tile_rows
//   scored_registers          registers of KV rows that fit into the register file with the sums of 4 query rows
//   all_ints, to_floats, all_four(p), load_tile, fma
#ifndef TURBOQUANT_GENERIC_SCORES_H
#define TURBOQUANT_GENERIC_SCORES_H

namespace turboquant {
namespace {

// tile is [head / 4][tile_rows] dwords, to whose bytes level_offset is added.
void keys(const int8_t * level, int64_t head, int8_t * tile) {
    for (int r = 0; r < tile_rows; r += lanes)
        for (int64_t c = 0; c < head; c += 16) transpose(level + r * head + c, head, tile + c * tile_rows + 4 * r);
}

// Writes the products of Rows queries with scored_registers of K over one block to s, or adds them to s.
template <int N, int Rows>
void scores_block(const int8_t * tile, const float * scale, const typename QueryBlock<N>::type * q, int64_t q_stride,
                  bool add, float * s) {
    constexpr int registers = scored_registers;
    ints sum[Rows][registers];
    for (int m = 0; m < Rows; ++m)
        for (int j = 0; j < registers; ++j) sum[m][j] = all_ints(-level_offset * q[m * q_stride].sum);
    for (int c = 0; c < N; c += 4, tile += 4 * tile_rows) {
        bytes k[registers];
        for (int j = 0; j < registers; ++j) k[j] = load_tile(tile + 4 * lanes * j);
        for (int m = 0; m < Rows; ++m) {
            const bytes values = all_four(q[m * q_stride].q + c);
            for (int j = 0; j < registers; ++j) sum[m][j] = multiply_add_levels(sum[m][j], k[j], values);
        }
    }
    for (int j = 0; j < registers; ++j) {
        const floats scales = load(scale + lanes * j);
        for (int m = 0; m < Rows; ++m) {
            float * out = s + m * tile_rows + lanes * j;
            const floats product = mul(to_floats(sum[m][j]), all(q[m * q_stride].scale));
            store(out, add ? fma(product, scales, load(out)) : mul(product, scales));
        }
    }
}

template <int N>
void scores(const int8_t * tile, const float * scale, int64_t blocks, const void * query, int rows, float * s) {
    auto * q = static_cast<const typename QueryBlock<N>::type *>(query);
    for (int r = 0; r < tile_rows; r += scored_registers * lanes) {
        int m = 0;
        for (; m + 4 <= rows; m += 4)
            for (int64_t b = 0; b < blocks; ++b)
                scores_block<N, 4>(tile + b * N * tile_rows + 4 * r, scale + b * tile_rows + r, q + m * blocks + b,
                                   blocks, b > 0, s + m * tile_rows + r);
        for (; m < rows; ++m)
            for (int64_t b = 0; b < blocks; ++b)
                scores_block<N, 1>(tile + b * N * tile_rows + 4 * r, scale + b * tile_rows + r, q + m * blocks + b,
                                   blocks, b > 0, s + m * tile_rows + r);
    }
}

} // namespace
} // namespace turboquant

#endif
