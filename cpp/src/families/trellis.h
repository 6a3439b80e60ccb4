// The family turbo4_tcq, turbo3_tcq, turbo2_tcq: trellis-coded quantization (Marcellin and Fischer 1990) with a code in
// the form of Ungerboeck (1982). A codebook has twice as many levels as an index has values. The level numbers modulo 4
// are four subsets, and the subset of an element follows from its path bit and those of the six elements before it. Of
// the bits of an element one is the path bit, and the others choose a level of the subset. This file has the codebooks
// and the layout (FORMAT.md, "Trellis-coded types") in plain code; generic/trellis.h has the encoder. format.h includes
// this file.
#ifndef TURBOQUANT_FAMILIES_TRELLIS_H
#define TURBOQUANT_FAMILIES_TRELLIS_H

#include "../codebooks.h"

#include <cstdint>

namespace turboquant {
namespace {

constexpr int path_memory = 6; // path bits before an element's own that its subset depends on
constexpr int path_states = 1 << path_memory;
// Taps of the subset's bits: bit k stands for the path bit of k steps before.
constexpr unsigned path_taps0 = 044, path_taps1 = 0103;

constexpr int parity(unsigned x) {
    int p = 0;
    for (; x; x >>= 1) p ^= int(x & 1);
    return p;
}
struct SubsetTable {
    int8_t subset[2 * path_states];
    constexpr SubsetTable() : subset() {
        for (unsigned w = 0; w < 2 * path_states; ++w)
            subset[w] = int8_t(2 * parity(w & path_taps1) + parity(w & path_taps0));
    }
};
constexpr SubsetTable subset_table{};
// The subset of an element; the lower bits of `window` are the path bits of the element (bit 0) and of the six steps
// before.
constexpr int subset_of(unsigned window) { return subset_table.subset[window % (2 * path_states)]; }

// The positive half of the codebooks, the decoder's step, and the granular error of the encoder's choice of a scale.
template <int Bits> struct TrellisBook;
template <> struct TrellisBook<4> {
    static constexpr int8_t positive[16] = {2, 7, 12, 17, 22, 28, 33, 39, 45, 51, 58, 67, 77, 90, 105, 127};
    static constexpr float step = 0.0215f;
    static constexpr double granular = 0.00233;
};
template <> struct TrellisBook<3> {
    static constexpr int8_t positive[8] = {5, 15, 26, 38, 51, 68, 91, 127};
    static constexpr float step = 0.0194f;
    static constexpr double granular = 0.00938;
};
template <> struct TrellisBook<2> {
    static constexpr int8_t positive[4] = {12, 39, 72, 127};
    static constexpr float step = 0.0149f;
    static constexpr double granular = 0.0414;
};

template <int Bits> struct TrellisLevels {
    int8_t level[2 << Bits];
    constexpr TrellisLevels() : level() {
        for (int i = 0; i < 1 << Bits; ++i) {
            level[(1 << Bits) + i] = TrellisBook<Bits>::positive[i];
            level[(1 << Bits) - 1 - i] = int8_t(-TrellisBook<Bits>::positive[i]);
        }
    }
};
template <int Bits> struct TrellisTable { static constexpr TrellisLevels<Bits> levels{}; };

// The levels as a table for lookups in registers of any width: repeated, as the lookups ignore the upper bits of an
// index.
template <int Bits> struct RepeatedLevels {
    alignas(64) int8_t level[64];
    constexpr RepeatedLevels() : level() {
        for (int i = 0; i < 64; ++i) level[i] = TrellisTable<Bits>::levels.level[i % (2 << Bits)];
    }
};
template <int Bits> constexpr RepeatedLevels<Bits> repeated_levels{};

// The six upper bits of a block's first two bytes are the path bits before the first element: bit 15 is the last one.
// The ten lower bits are the scale, as binary16 without its sign and its five lowest bits.
constexpr int scale_bits = 10;

template <int Bits> struct Trellis : TrellisBook<Bits> {
    static constexpr int bits = Bits;
    static constexpr int levels = 2 << Bits;
    static constexpr const int8_t * centroids = TrellisTable<Bits>::levels.level; // ascending
    static constexpr float step_over_sqrt[3] = {
        TrellisBook<Bits>::step * one_over_sqrt[0], TrellisBook<Bits>::step * one_over_sqrt[1],
        TrellisBook<Bits>::step * one_over_sqrt[2]};

    static constexpr uint16_t scale_half(uint16_t word) { return uint16_t((word & ((1 << scale_bits) - 1)) << 5); }

    // The element that the trellis visits in step t: bit t of the path, a little-endian integer, is bit i / (N / 8) of
    // byte i % (N / 8) for element i.
    template <int N> static constexpr int element(int t) { return t % 8 * (N / 8) + t / 8; }

    // The other bits of an element follow the path: planes with a bit for each element, in the order of the path, and
    // crumbs with two bits, element i in bits 2 (i / (N / 4)) of byte i % (N / 4). Two bits: a plane. Three: crumbs.
    // Four: crumbs, then a plane with the upper bit.
    template <int N> static constexpr int rest_at(const uint8_t * q, int i) {
        const auto plane = [&](const uint8_t * p) { return p[i % (N / 8)] >> (i / (N / 8)) & 1; };
        if (Bits == 2) return plane(q + N / 8);
        const int low = q[N / 8 + i % (N / 4)] >> (i / (N / 4) * 2) & 3;
        return Bits == 3 ? low : low | plane(q + N / 8 + N / 4) << 2;
    }
    template <int N> static void set_rest(uint8_t * q, int i, int rest) {
        const auto set_plane = [&](uint8_t * p, int bit) { p[i % (N / 8)] |= uint8_t(bit << (i / (N / 8))); };
        if (Bits == 2) return set_plane(q + N / 8, rest);
        q[N / 8 + i % (N / 4)] |= uint8_t((rest & 3) << (i / (N / 4) * 2));
        if (Bits == 4) set_plane(q + N / 8 + N / 4, rest >> 2);
    }

    // The int8 levels of a block. q: the bytes after the first two, which are read, too.
    template <int N> static void expand(const uint8_t * q, int8_t * level) {
        unsigned window = 0;
        for (int k = 0; k < path_memory; ++k) window = window << 1 | (q[-1] >> (8 - path_memory + k) & 1);
        for (int t = 0; t < N; ++t) {
            const int i = element<N>(t);
            window = window << 1 | (q[t / 8] >> (t % 8) & 1);
            level[i] = centroids[4 * rest_at<N>(q, i) + subset_of(window)];
        }
    }
};

} // namespace
} // namespace turboquant

#endif
