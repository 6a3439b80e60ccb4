// Rows of K and V: their scales, and the tile of them in threadgroup memory. A row of a turbo type becomes the levels
// of its codebook, which binary16 represents exactly, and a scale for each block; the other types become values.
#ifndef TURBOQUANT_METAL_LOAD_H
#define TURBOQUANT_METAL_LOAD_H

#include "levels.h"

namespace turboquant {

inline bool is_turbo(int type) { return type < 3 * families; }
inline int block_of(int type) { return type % 3 == 0 ? 128 : type % 3 == 1 ? 64 : 32; } // of a turbo type
// Values of a row that share a scale.
inline int scaled_values(int type, int head) { return is_turbo(type) ? block_of(type) : head; }

// Writes the 2 x 4 values of a unit, and zeros instead if `exists` is false.
template <int F, int N>
inline void put_unit(device const uchar * row, bool exists, uint unit, threadgroup const half * table,
                     threadgroup half * to) {
    const uint block = unit / (N / 8), in_block = unit % (N / 8);
    Unit x = {{0, 0}};
    if (exists) x = load_unit<F, N>(row + block * Format<F, N>::bytes, in_block);
    FOR_UNROLLED (uint run = 0; run < 2; ++run) {
        threadgroup half * four = to + block * N + run_start<F, N>(in_block, run);
        FOR_UNROLLED (uint i = 0; i < 4; ++i) four[i] = exists ? table[x.numbers[run] >> (8 * i) & 255u] : half(0.0f);
    }
}

// The value of element i of a row that is not turbo.
inline half load_value(int type, device const uchar * row, uint i) {
    if (type == row_f16) return as_type<half>(ushort(load_u16(row + 2 * i)));
    if (type == row_f32) return half(reinterpret_cast<device const float *>(row)[i]);
    device const uchar * block = row + i / 32 * 34;
    return half(float_of_half(load_u16(block)) * float(int8_t(block[2 + i % 32])));
}

// Loads those rows of a tile whose bits are set in `seen`, and zeros for the others, whose bytes may have any values.
// All threads of the threadgroup take part. If only_finite, values that are not finite become zeros; the result has the
// bits of the rows in which the thread has found one.
template <int D>
inline uint load_tile(int type, device const uchar * rows, long row_bytes, uint seen, bool only_finite,
                      threadgroup const half * table, threadgroup half * tile, uint thread_index) {
    const int in_tile = tile_rows(D);
    uint found = 0;
    for (uint u = thread_index; u < uint(in_tile * D / 8); u += 32 * simdgroups) {
        const uint row = u / (D / 8), unit = u % (D / 8);
        const bool exists = seen >> row & 1u;
        device const uchar * from = rows + (exists ? long(row) * row_bytes : 0);
        threadgroup half * to = tile + row * tile_pitch(D);
        switch (type) {
#define TURBOQUANT_CASE(F)                                                                  \
    case 3 * F: if (D % 128 == 0) put_unit<F, 128>(from, exists, unit, table, to); break;   \
    case 3 * F + 1: if (D % 64 == 0) put_unit<F, 64>(from, exists, unit, table, to); break; \
    case 3 * F + 2: put_unit<F, 32>(from, exists, unit, table, to); break;
            TURBOQUANT_EACH_FAMILY(TURBOQUANT_CASE)
#undef TURBOQUANT_CASE
            default:
                for (uint i = 8 * unit; i < 8 * unit + 8; ++i) {
                    half x = exists ? load_value(type, from, i) : half(0.0f);
                    if (only_finite && (as_type<ushort>(x) & 0x7c00u) == 0x7c00u) {
                        found |= 1u << row;
                        x = half(0.0f);
                    }
                    to[i] = x;
                }
        }
    }
    return found;
}

// Loads the scales of the rows, with the factor by which levels become values. scales is [blocks][rows of the tile].
template <int D>
inline void load_scales(int type, device const uchar * rows, long row_bytes, uint seen, threadgroup float * scales,
                        uint thread_index) {
    const uint in_tile = uint(tile_rows(D)), blocks = uint(D / scaled_values(type, D));
    for (uint i = thread_index; i < blocks * in_tile; i += 32 * simdgroups) {
        const uint row = i % in_tile, block = i / in_tile;
        float scale = 1.0f;
        if (!(seen >> row & 1u)) scale = 0.0f;
        else if (is_turbo(type)) {
            device const uchar * p = rows + long(row) * row_bytes;
            switch (type) {
#define TURBOQUANT_CASE(F)                                                                                \
    case 3 * F: scale = load_scale<F>(p + block * Format<F, 128>::bytes) * steps[F]; break;               \
    case 3 * F + 1: scale = load_scale<F>(p + block * Format<F, 64>::bytes) * steps[F]; break;            \
    case 3 * F + 2: scale = load_scale<F>(p + block * Format<F, 32>::bytes) * steps[F]; break;
                TURBOQUANT_EACH_FAMILY(TURBOQUANT_CASE)
#undef TURBOQUANT_CASE
            }
        }
        scales[i] = scale;
    }
}

// Rotates a row of D values in blocks, or applies the inverse. Lane l has elements l, l + 32, ...
template <int D> inline void rotate_row(thread float * y, int block, bool inverse, ushort lane) {
    if (block == 128 && D % 128 == 0)
        for (int j = 0; j < D / 32; j += 4) transform<128>(y + j, inverse, lane);
    if (block == 64 && D % 64 == 0)
        for (int j = 0; j < D / 32; j += 2) transform<64>(y + j, inverse, lane);
    if (block == 32)
        FOR_UNROLLED (int j = 0; j < D / 32; ++j) transform<32>(y + j, inverse, lane);
}

} // namespace turboquant

#endif
