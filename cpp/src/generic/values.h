// Accumulation of V as int8 levels. A lane has one channel of four KV rows, for a dot product of four unsigned and four
// signed bytes. scores.h must be included before. An ISA file also defines
//
//   interleave                writes 4 * lanes channels of four rows, at a distance of `stride`, as dwords;
// interleave32
//                             writes 32 channels
//   leveled_registers<Rows>   registers of sums per query row, if Rows rows are processed together
//   first(x, n)               x with zeros from lane n on; max, reduce_max; max_bits(m, x) for x >= 0
//   split_bytes               stores the upper and the lower bytes of four registers of ints below 2^16
//   to_ints                   floats rounded to the nearest int
//   multiply_add_weights      ints plus weights times levels; shift_byte: ints times 256
#ifndef TURBOQUANT_GENERIC_VALUES_H
#define TURBOQUANT_GENERIC_VALUES_H

namespace turboquant {
namespace {

// Weights of a query row are rounded to 8 bits in tiles where none exceeds this share of the sum so far, else to 16
// bits.
constexpr float coarse_share = 1.0f / 128;

// The dither that is added before rounding to 8 bits, in units of the rounding, so that many small weights are not all
// rounded to 0: the van der Corput sequence over the rows of a tile, between -0.5 and 0.5.
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

// tile is [count / 4][head] dwords.
void values(const int8_t * level, int count, int64_t head, int8_t * tile) {
    for (int r = 0; r < count; r += 4, level += 4 * head, tile += 4 * head) {
        int64_t c = 0;
        for (; c + 4 * lanes <= head; c += 4 * lanes) interleave(level + c, head, tile + 4 * c);
        if constexpr (4 * lanes > 32)
            if (c < head) interleave32(level + c, head, tile + 4 * c);
    }
}

// Whether the weights of a tile need 16 bits (see coarse_share). A NaN makes the sum NaN, and then they do.
bool needs_16_bits(const float * weights, int count, const SoftmaxState & state) {
    floats largest = all(0.0f);
    for (int r = 0; r < count; r += lanes) largest = max(largest, first(load(weights + r), count - r));
    return !(reduce_max(largest) <= coarse_share * state.sum);
}

// Weights of a query row times V's scales, as multiples of `unit` of 8 bits, or of 16 bits in upper and lower bytes.
struct Weights {
    alignas(64) uint8_t high[tile_rows], low[tile_rows];
    float unit;
};

void round_weights(const float * weights, const float * scale, int count, bool fine, Weights & out) {
    constexpr int registers = tile_rows / lanes;
    const float limit = fine ? 65535.0f : 255.0f;
    floats w[registers];
    ints largest = zero_ints(); // of the bits, by which NaN is the largest
    for (int r = 0; r < registers; ++r) {
        w[r] = first(mul(load(weights + lanes * r), load(scale + lanes * r)), count - lanes * r);
        largest = max_bits(largest, w[r]);
    }
    const float top = bits_float(largest_lane(largest));
    const bool usable = top > 0 && top < INFINITY;
    out.unit = usable ? top / limit : top; // if not finite, the sums become not finite
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

// Sums of the products of the upper bytes with V, shifted, and of the lower bytes with V.
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
    bool fine[Rows], any_fine = false; // each row decides for itself, so that the other rows of the group do not matter
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
