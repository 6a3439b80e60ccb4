// The layout of the indices in a block (FORMAT.md): that of one element, and those of a unit of eight.
#ifndef TURBOQUANT_METAL_LEVELS_H
#define TURBOQUANT_METAL_LEVELS_H

#include "device.h"

namespace turboquant {

// The subset of an element of a trellis-coded type. `path` has the path bits of six steps before and of the element's
// own in its lower seven bits, the newest in bit 6.
inline uint subset_at(uint path) { return subset_words[path >> 4 & 7u] >> (2 * (path & 15u)) & 3u; }

// The number of the level of element i in the codebook.
template <int F, int N> inline uint level_number(device const uchar * block, uint i) {
    device const uchar * q = block + 2;
    if (Family<F>::trellis) {
        const uint x = i % (N / 8), c = i / (N / 8);
        const uint path = (uint(block[1 + x]) | uint(q[x]) << 8) >> (c + 2);
        device const uchar * rests = q + N / 8;
        uint rest = Family<F>::bits == 2 ? rests[x] >> c & 1 : rests[i % (N / 4)] >> (i / (N / 4) * 2) & 3;
        if (Family<F>::bits == 4) rest |= (rests[N / 4 + x] >> c & 1u) << 2;
        return 4 * rest + subset_at(path);
    }
    if (Family<F>::bits == 4) return q[i % (N / 2)] >> (i / (N / 2) * 4) & 15;
    const uint low = q[i % (N / 4)] >> (i / (N / 4) * 2) & 3;
    return Family<F>::bits == 2 ? low : low | (q[N / 4 + i / 8] >> (i % 8) & 1u) << 2;
}

// ---- units

// A unit is eight elements in two runs of four; a block has N / 8 units. Each byte of a word has the number of a level.
struct Unit {
    uint numbers[2]; // of the runs
};

// The first element of a run of a unit.
template <int F, int N> inline uint run_start(uint unit, uint run) {
    if (!Family<F>::trellis && Family<F>::bits == 4) return 4 * unit + N / 2 * run;
    return 4 * (unit >> 1) + N / 4 * ((unit & 1) + 2 * run);
}

// Four bits of a plane, as bit `to` of the bytes of a word.
inline uint spread_bits(uint bits, uint to) {
    return ((bits & 1u) | (bits & 2u) << 7 | (bits & 4u) << 14 | (bits & 8u) << 21) << to;
}

template <int F, int N> inline Unit load_unit(device const uchar * block, uint unit) {
    device const uchar * q = block + 2;
    Unit out;
    if (!Family<F>::trellis && Family<F>::bits == 4) {
        const uint word = load_u32(q + 4 * unit);
        out.numbers[0] = word & 0x0f0f0f0fu;
        out.numbers[1] = word >> 4 & 0x0f0f0f0fu;
        return out;
    }
    const uint bytes = 4 * (unit >> 1), field = unit & 1; // the runs have fields `field` and field + 2 of four bytes
    if (!Family<F>::trellis) {
        const uint word = load_u32(q + bytes) >> (2 * field);
        FOR_UNROLLED (uint run = 0; run < 2; ++run) {
            out.numbers[run] = word >> (4 * run) & 0x03030303u;
            if (Family<F>::bits == 3) {
                const uint e = run_start<F, N>(unit, run);
                out.numbers[run] |= spread_bits(q[N / 4 + e / 8] >> (e % 8), 2);
            }
        }
        return out;
    }
    const uint x = bytes % (N / 8), first = 2 * field + bytes / (N / 8); // bit of the first run in the bytes of planes
    device const uchar * rests = q + N / 8;
    const uint path = load_u32(q + x), before = block[1 + x];
    const uint crumbs = Family<F>::bits == 2 ? 0u : load_u32(rests + bytes) >> (2 * field);
    const uint plane = Family<F>::bits == 3 ? 0u : load_u32(rests + (Family<F>::bits == 4 ? N / 4 : 0) + x) >> first;
    FOR_UNROLLED (uint run = 0; run < 2; ++run) {
        uint rest = Family<F>::bits == 2 ? 0u : crumbs >> (4 * run) & 0x03030303u;
        rest |= (plane >> (4 * run) & 0x01010101u) << (Family<F>::bits == 4 ? 2 : 0);
        uint subsets = 0;
        FOR_UNROLLED (uint byte = 0; byte < 4; ++byte) {
            const uint two = byte == 0 ? before | path << 8 : path >> (8 * byte - 8);
            subsets |= subset_at(two >> (first + 4 * run + 2)) << (8 * byte);
        }
        out.numbers[run] = rest << 2 | subsets;
    }
    return out;
}

} // namespace turboquant

#endif
