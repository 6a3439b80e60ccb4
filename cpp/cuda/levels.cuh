// From the bytes of a block to int8 levels: the layouts of the families, and their codebooks as tables for byte
// permutes.
//
// A unit is eight values of a block that are decoded together; a block of N values has N / 8 units. Its eight indices
// become the nibbles of a word, which are selectors of byte permutes.
#ifndef TURBOQUANT_CUDA_LEVELS_H
#define TURBOQUANT_CUDA_LEVELS_H

#include "device.cuh"

namespace turboquant {
namespace cuda {
namespace {

// ---- codebooks

// Four levels in a word, the lowest index in the lowest byte.
constexpr uint32_t pack4(const int8_t * c) {
    return uint32_t(uint8_t(c[0])) | uint32_t(uint8_t(c[1])) << 8 | uint32_t(uint8_t(c[2])) << 16 |
           uint32_t(uint8_t(c[3])) << 24;
}

// A codebook as words of four levels. If it has 16 levels or more, the magnitudes of its negative half: those of the
// first eight levels in this order, and those of the other levels backwards.
template <typename Family> struct Table {
    static constexpr const int8_t * centroids = Family::centroids;
    static constexpr uint32_t word(int i) { return 4 * i < Family::levels ? pack4(centroids + 4 * i) : 0; }
    static constexpr uint32_t magnitude(int i) { return uint32_t(-centroids[i < Family::levels / 2 ? i : 0]); }
    static constexpr uint32_t magnitudes(int first, int step) {
        return magnitude(first) | magnitude(first + step) << 8 | magnitude(first + 2 * step) << 16 |
               magnitude(first + 3 * step) << 24;
    }
    static constexpr uint32_t c0 = word(0), c1 = word(1), c2 = word(2), c3 = word(3);
    static constexpr uint32_t low0 = magnitudes(0, 1), low1 = magnitudes(4, 1), high0 = magnitudes(15, -1),
                              high1 = magnitudes(11, -1);
    static constexpr bool symmetric() {
        for (int i = 0; i < Family::levels; ++i)
            if (centroids[i] != -centroids[Family::levels - 1 - i]) return false;
        return true;
    }
};

// Levels that need two permutes are the difference of two operands, whose products with the other matrix are
// subtracted.
template <typename Family> constexpr int level_parts = Family::levels >= 16 ? 2 : 1;
// Whether an index has a fifth bit, which is the sign of its level and has a selector of its own, that of Unit.
template <typename Family> constexpr bool signed_units = Family::levels == 32;

// Looks up the levels of the four indices in the low 16 bits of `nibbles`. If the upper bit of a nibble is set, prmt
// repeats the sign of the selected byte, which is 0 for magnitudes. So of a permute with the nibbles and one with their
// complements, one gives a magnitude and the other gives 0.
//   16 levels: the magnitude of a negative level, and that of a positive one.
//   32 levels: the nibble is that of a magnitude. The level is positive if bit `sign_bit` of the nibble in `signs` is
//     set, whatever the other bits are. Otherwise eight bits of the magnitude are complemented, and -1 is subtracted;
//     or, if sign_bit is 3, seven bits, and 127.
template <typename Family> class LookUp {
    using T = Table<Family>;
    static_assert(T::symmetric(), "both halves have the same magnitudes");
    uint32_t low0, high0, ones, bits[4]; // in registers; the second operands of prmt may be constants

    // Eight bytes, of which the lower bits of a nibble select one: the bits that are complemented, if `bit` of the
    // nibble is 0. If its upper bit is set, prmt repeats the sign of the byte. This changes neither 0 nor -1, and makes
    // 0 of 127.
    static __host__ __device__ constexpr uint32_t first_bits(int bit) {
        return bit == 0 ? 0x00ff00ff : bit == 1 ? 0x0000ffff : bit == 2 ? 0xffffffff : 0x7f7f7f7f;
    }
    static __host__ __device__ constexpr uint32_t last_bits(int bit) { return bit == 2 ? 0 : first_bits(bit); }

    // The multiplication does not need the units that permute and combine bits, which are the busiest.
    __device__ __forceinline__ uint32_t complement(uint32_t x) const { return x * ones + ones; }

public:
    static constexpr int parts = level_parts<Family>;

    // If the compiler does not know that `zero` is 0, it does not load the constants again for each lookup.
    __device__ __forceinline__ explicit LookUp(uint32_t zero)
        : low0(opaque(T::low0, zero)), high0(opaque(T::high0, zero)), ones(opaque(0xffffffff, zero)),
          bits{opaque(first_bits(0), zero), opaque(first_bits(1), zero), ones, opaque(first_bits(3), zero)} {}

    __device__ __forceinline__ void operator()(uint32_t nibbles, uint32_t signs, int sign_bit,
                                               uint32_t (&part)[parts]) const {
        if constexpr (Family::levels == 32) {
            const uint32_t magnitude =
                prmt(low0, T::low1, nibbles) | prmt(high0, T::high1, complement(nibbles));
            const uint32_t negative = prmt(bits[sign_bit], last_bits(sign_bit), signs);
            part[0] = magnitude ^ negative;
            part[1] = negative;
        } else if constexpr (Family::levels == 16) {
            part[0] = prmt(low0, T::low1, complement(nibbles));
            part[1] = prmt(low0, T::low1, nibbles);
        } else {
            part[0] = prmt(T::c0, T::c1, nibbles);
        }
    }
};

constexpr uint32_t four_biases = 0x80808080; // signed bytes plus 128, or unsigned bytes less 128, are the exclusive or

// Four levels plus 128, as unsigned bytes, from the parts of LookUp. None of these sums is negative or exceeds a byte,
// so one sum of three words gives all four.
template <int Parts> __device__ __forceinline__ uint32_t biased_levels(const uint32_t (&part)[Parts]) {
    if constexpr (Parts == 1) return part[0] ^ four_biases;
    return part[0] - part[Parts - 1] + four_biases;
}

// ---- units

template <typename Family> constexpr bool packs_nibbles = false; // indices of four bits, else crumbs of two and planes
template <> constexpr bool packs_nibbles<LloydMax<4>> = true;

// A unit: its nibbles, and if signed_units the selectors of its signs, which are bit `sign_bit` of each nibble.
struct Unit {
    uint32_t nibbles, signs;
    int sign_bit;
};

constexpr uint32_t even_bits = 0x55555555, low_crumbs = 0x33333333;

// A word of crumbs is two units: the units `field` = 0 and 1 take the lower and the upper crumb of each half byte.
// Fields are constants; move() makes field 0 of one that is not.
template <typename F> struct Crumbs;

template <int Bits, int N> struct Crumbs<Format<LloydMax<Bits>, N>> {
    uint32_t low;
    const uint8_t * high; // of three bits: the upper bits of field 0
    int shift;

    __device__ __forceinline__ Crumbs(const uint8_t * indices, int word)
        : low(load_u32(indices + 4 * word)), high(indices + N / 4 + (word >> 1)), shift(4 * (word & 1)) {}
    // Word number word + N / 32 * half, where `half` is a constant.
    __device__ __forceinline__ Crumbs(const uint8_t * indices, int word, int half)
        : Crumbs(indices, word + N / 32 * half) {}
    __device__ __forceinline__ void move(int field) {
        low >>= 2 * field;
        high += field * (N / 32);
    }
    __device__ __forceinline__ Unit unit(int field) const {
        uint32_t n = shift_right(low, 2 * field) & low_crumbs;
        if constexpr (Bits == 3) {
            const uint8_t * p = high + field * (N / 32);
            // Each product moves four bits to the third bit of every other nibble.
            n |= (((p[0] >> shift) & 15) * 0x00810204u) & 0x04040404;
            n |= (((p[N / 16] >> shift) & 15) * 0x08102040u) & 0x40404040;
        }
        return {n, 0, 0};
    }
};

// Byte j of the path and of a plane has a bit for each of the elements j + r N / 8, r = 0 ... 7. The elements with r =
// 2 f + odd are the crumbs of byte j + odd N / 8, so half of a word of the path belongs to a word of crumbs.

// The path bits of a word and those before: bit 16 + i of the string (low, high) is that of step i of the word.
struct PathString {
    uint32_t low, high;
    __device__ __forceinline__ explicit PathString(const uint8_t * word)
        : low(load_u32(word - 2)), high(load_u16(word + 2)) {}
    // The path bits of `before` steps before those of the word.
    __device__ __forceinline__ uint32_t earlier(int before) const { return __funnelshift_r(low, high, 16 - before); }
};

// The subsets of half a word of the path, as crumbs that are complemented where a bit of `complement` is set. c0 is in
// the even bits of the crumbs and c1 in the odd ones, so one shift can serve a tap of c0 and the tap of c1 that is a
// step later.
__device__ __forceinline__ uint32_t subset_crumbs(const uint8_t * word, int odd, uint32_t complement) {
    const PathString path(word);
    uint32_t c0 = 0, c1 = 0, both = complement;
    static_assert((path_taps0 & 1) == 0, "c0 has no tap in the step itself");
#pragma unroll
    for (int k = 0; k <= path_memory; ++k) { // a tap of c0 from k + 1 steps before, one of c1 from k steps before
        const bool tap0 = path_taps0 >> (k + 1) & 1, tap1 = path_taps1 >> k & 1;
        const uint32_t shifted = path.earlier(k + 1 - odd);
        if (tap0 && tap1) both ^= shifted;
        else if (tap0) c0 ^= shifted;
        else if (tap1) c1 ^= shifted;
    }
    return select(even_bits, c0, c1) ^ both;
}

// The same if both halves are needed and `odd` is a constant: c0 and c1 of all steps take fewer operations than those
// of two halves. `complement` has a bit for each step.
__device__ __forceinline__ uint32_t subset_crumbs_of_word(const uint8_t * word, int odd, uint32_t complement) {
    const PathString path(word);
    uint32_t c0 = complement, c1 = complement;
#pragma unroll
    for (int k = 0; k <= path_memory; ++k) {
        const uint32_t shifted = k ? path.earlier(k) : load_u32(word);
        if (path_taps0 >> k & 1) c0 ^= shifted;
        if (path_taps1 >> k & 1) c1 ^= shifted;
    }
    return select(even_bits, shift_right(c0, odd), shift_left(c1, 1 - odd));
}

// The index of a level is 4 rest + subset. With 32 levels, those of positive levels, whose upper bit is set, are
// complemented, so that the lower four bits select a magnitude of the negative half.
template <int Bits, int N> struct Crumbs<Format<Trellis<Bits>, N>> {
    uint32_t subsets, rests;
    uint32_t signs; // if signed_units
    int sign_bit;   // of field 0; that of field 1 is two bits above

    __device__ __forceinline__ Crumbs(const uint8_t * indices, int crumbs) {
        const int word = crumbs % (N / 32), odd = crumbs / (N / 32);
        signs = (plane(indices, word) >> odd) & even_bits;
        sign_bit = 0;
        const uint32_t complement = Bits == 4 ? 3 * signs : 0;
        subsets = subset_crumbs(indices + 4 * word, odd, complement);
        rests = Bits == 2 ? signs : load_u32(indices + N / 8 + 4 * crumbs) ^ complement;
    }
    // Word number word + N / 32 * odd, where `odd` is a constant, if the caller needs both halves of the path's word.
    __device__ __forceinline__ Crumbs(const uint8_t * indices, int word, int odd) {
        signs = plane(indices, word);
        sign_bit = odd;
        const uint32_t upper = shift_right(signs, odd) & even_bits;
        subsets = subset_crumbs_of_word(indices + 4 * word, odd, Bits == 4 ? signs : 0);
        rests = Bits == 2 ? upper
                          : load_u32(indices + N / 8 + 4 * (word + N / 32 * odd)) ^ (Bits == 4 ? 3 * upper : 0);
    }
    __device__ __forceinline__ void move(int field) {
        subsets >>= 2 * field;
        rests >>= 2 * field;
        signs >>= 2 * field;
    }
    __device__ __forceinline__ Unit unit(int field) const {
        return {select(low_crumbs, shift_right(subsets, 2 * field), shift_left(rests, 2 - 2 * field)), signs,
                sign_bit + 2 * field};
    }

private:
    static __device__ __forceinline__ uint32_t plane(const uint8_t * indices, int word) {
        return Bits == 3 ? 0 : load_u32(indices + N / 8 + (Bits == 4 ? N / 4 : 0) + 4 * word);
    }
};

// Loads a unit whose field is not known in advance. The signs of its levels are bit 0.
template <typename F> __device__ __forceinline__ Unit load_unit(const uint8_t * indices, int unit) {
    if constexpr (packs_nibbles<typename F::family>) return {load_u32(indices + 4 * unit), 0, 0};
    else {
        Crumbs<F> crumbs(indices, unit >> 1);
        crumbs.move(unit & 1);
        return crumbs.unit(0);
    }
}

// The element that a nibble of a unit belongs to. Nibbles 2m and 2m + 1 are N / 2 elements apart.
template <typename F> __device__ __forceinline__ int unit_element(int unit, int nibble) {
    constexpr int N = F::block;
    const int byte = nibble >> 1, half = nibble & 1;
    if constexpr (packs_nibbles<typename F::family>) return 4 * unit + byte + N / 2 * half;
    return 4 * (unit >> 1) + byte + N / 4 * ((unit & 1) + 2 * half);
}

// The scale of a block.
template <int Bits, int N>
__device__ __forceinline__ float load_scale(Format<LloydMax<Bits>, N>, const uint8_t * block) {
    return load_half(block);
}
template <int Bits, int N>
__device__ __forceinline__ float load_scale(Format<Trellis<Bits>, N>, const uint8_t * block) {
    // The sign is a path bit.
    return fabsf(__half2float(__ushort_as_half(uint16_t(load_u16(block) << (15 - scale_bits)))));
}

} // namespace
} // namespace cuda
} // namespace turboquant

#endif
