// V as int8 levels, where a lane holds one channel of four KV rows, for a dot product of four unsigned and four signed
// bytes. After scores.h; an ISA file also defines
//
//   interleave                4 * lanes channels of four rows, `stride` apart, to dwords; interleave32 does 32 channels
//   leveled_registers<Rows>   registers of sums of each of Rows query rows
//   first(x, n)               x with zeros from the nth lane on; max, reduce_max; max_bits(m, x), of x >= 0
//   split_bytes               four registers of ints below 2^16 to their upper and lower bytes
//   to_ints                   floats rounded to the nearest
//   multiply_add_weights      ints plus weights times levels; shift_byte: ints times 256
#ifndef TURBOQUANT_GENERIC_VALUES_H
#define TURBOQUANT_GENERIC_VALUES_H

namespace turboquant {
namespace {

// Weights are rounded to 8 bits in tiles where none is above this share of the sum so far, else to 16.
constexpr float coarse_share = 1.0f / 128;

// What is added before rounding to 8 bits, in units, so that many small weights are not all lost: the van der Corput
// sequence over the tile's rows, between -0.5 and 0.5.
struct Dither {
    alignas(64) float row[tile_rows];
    constexpr Dither() : row() {
        for (int r = 0; r < tile_rows; ++r) {
            int reversed = 0;
            for (int bit = 0; bit < 6; ++bit) reversed |= (r >> bit & 1) << (5 - bit);
            row[r] = (float(reversed) + 0.5f) / tile_rows - 0.5f;
        }
    }
};
static_assert(tile_rows == 64, "six bits");
constexpr Dither dither;

// tile: [count / 4][head] dwords.
void values(const int8_t * level, int count, int64_t head, int8_t * tile) {
    for (int r = 0; r < count; r += 4, level += 4 * head, tile += 4 * head) {
        int64_t c = 0;
        for (; c + 4 * lanes <= head; c += 4 * lanes) interleave(level + c, head, tile + 4 * c);
        if constexpr (4 * lanes > 32)
            if (c < head) interleave32(level + c, head, tile + 4 * c);
    }
}

// Whether the tile's weights need 16 bits (see coarse_share); a NaN does, which made the sum NaN.
bool needs_16_bits(const float * weights, int count, const SoftmaxState & state) {
    floats largest = all(0.0f);
    for (int r = 0; r < count; r += lanes) largest = max(largest, first(load(weights + r), count - r));
    return !(reduce_max(largest) <= coarse_share * state.sum);
}

// A query row's weights times V's scales, as multiples of `unit`: of 8 bits, or the upper and lower bytes of 16.
struct Weights {
    alignas(64) uint8_t high[tile_rows], low[tile_rows];
    float unit;
};

void round_weights(const float * weights, const float * scale, int count, bool fine, Weights & out) {
    constexpr int registers = tile_rows / lanes;
    const float limit = fine ? 65535.0f : 255.0f;
    floats w[registers];
    ints largest = zero_ints(); // of bits: NaN is above all
    for (int r = 0; r < registers; ++r) {
        w[r] = first(mul(load(weights + lanes * r), load(scale + lanes * r)), count - lanes * r);
        largest = max_bits(largest, w[r]);
    }
    const float top = bits_float(largest_lane(largest));
    const bool usable = top > 0 && top < INFINITY;
    out.unit = usable ? top / limit : top; // not finite: the sums must show it
    const floats inverse = all(usable ? limit / top : 0.0f);
    for (int r = 0; r < registers; r += 4) {
        ints x[4];
        for (int i = 0; i < 4; ++i) {
            const floats offset = fine ? all(0.0f) : load(dither.row + lanes * (r + i));
            x[i] = to_ints(fma(w[r + i], inverse, offset));
        }
        split_bytes(x, out.high + lanes * r, out.low + lanes * r);
    }
}

// The upper bytes' products with V, shifted, and those of the lower bytes.
template <int Rows, int Registers>
void accumulate_levels_block(const int8_t * tile, int count, int64_t head, const Weights * weights, bool fine,
                             const SoftmaxState * state, float * sum, int64_t stride) {
    ints a[Rows][Registers];
    for (int m = 0; m < Rows; ++m)
        for (int c = 0; c < Registers; ++c) a[m][c] = zero_ints();
    const auto pass = [&](uint8_t const (Weights::*part)[tile_rows]) {
        const int8_t * v = tile;
        for (int r = 0; r < count; r += 4, v += 4 * head) {
            bytes value[Registers];
            for (int c = 0; c < Registers; ++c) value[c] = load_bytes(v + 4 * lanes * c);
            for (int m = 0; m < Rows; ++m) {
                const bytes weight = all_four((weights[m].*part) + r);
                for (int c = 0; c < Registers; ++c) a[m][c] = multiply_add_weights(a[m][c], weight, value[c]);
            }
        }
    };
    if (fine) {
        pass(&Weights::high);
        for (int m = 0; m < Rows; ++m)
            for (int c = 0; c < Registers; ++c) a[m][c] = shift_byte(a[m][c]);
    }
    pass(&Weights::low);
    for (int m = 0; m < Rows; ++m)
        for (int c = 0; c < Registers; ++c) {
            float * out = sum + m * stride + lanes * c;
            const floats before = mul(all(state[m].correction), load(out));
            store(out, fma(to_floats(a[m][c]), all(weights[m].unit), before));
        }
}

template <int Rows>
void accumulate_levels_rows(const int8_t * tile, const float * scale, int block, int count, int64_t head,
                            const float * weights, const SoftmaxState * state, float * sum, int64_t stride) {
    constexpr int registers = leveled_registers<Rows>, width = registers * lanes;
    Weights rounded[Rows];
    bool fine[Rows], any_fine = false; // each row for itself, so that it does not matter which rows go together
    for (int m = 0; m < Rows; ++m) {
        fine[m] = needs_16_bits(weights + m * tile_rows, count, state[m]);
        any_fine = any_fine || fine[m];
    }
    for (int64_t b = 0; b < head / block; ++b, scale += tile_rows) {
        for (int m = 0; m < Rows; ++m) round_weights(weights + m * tile_rows, scale, count, fine[m], rounded[m]);
        int64_t c = b * block;
        for (; c + width <= (b + 1) * block; c += width)
            accumulate_levels_block<Rows, registers>(tile + 4 * c, count, head, rounded, any_fine, state, sum + c,
                                                     stride);
        if constexpr (width > 32)
            if (c < (b + 1) * block)
                accumulate_levels_block<Rows, 32 / lanes>(tile + 4 * c, count, head, rounded, any_fine, state, sum + c,
                                                          stride);
    }
}

void accumulate_levels(const int8_t * tile, const float * scale, int block, int count, int64_t head,
                       const float * weights, const SoftmaxState * state, int rows, float * sum, int64_t stride) {
    int m = 0;
    for (; m + 4 <= rows; m += 4)
        accumulate_levels_rows<4>(tile, scale, block, count, head, weights + m * tile_rows, state + m, sum + m * stride,
                                  stride);
    for (; m < rows; ++m)
        accumulate_levels_rows<1>(tile, scale, block, count, head, weights + m * tile_rows, state + m, sum + m * stride,
                                  stride);
}

} // namespace
} // namespace turboquant

#endif
