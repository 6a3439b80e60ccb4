// Inputs that codecs get wrong, by name, and bit-exact comparison. Everything is deterministic.
#ifndef TURBOQUANT_TESTS_INPUTS_H
#define TURBOQUANT_TESTS_INPUTS_H

#include "turboquant.h"

#include <cfloat>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <string>
#include <vector>

// SplitMix64.
class Random {
public:
    explicit Random(uint64_t seed) : state(seed) {}
    uint64_t bits() {
        uint64_t z = (state += 0x9e3779b97f4a7c15u);
        z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9u;
        z = (z ^ (z >> 27)) * 0x94d049bb133111ebu;
        return z ^ (z >> 31);
    }
    double uniform() { return (double(bits() >> 11) + 0.5) * 0x1p-53; } // in (0, 1)
    float normal() { return float(std::sqrt(-2 * std::log(uniform())) * std::cos(6.283185307179586 * uniform())); }
    int below(int n) { return int(bits() % uint64_t(n)); }

private:
    uint64_t state;
};

// The seed of a case with a name (FNV-1a).
inline uint64_t seed_of(const std::string & name) {
    uint64_t hash = 0xcbf29ce484222325u;
    for (const char c : name) hash = (hash ^ uint8_t(c)) * 0x100000001b3u;
    return hash;
}

inline uint32_t bits_of(float x) { uint32_t b; std::memcpy(&b, &x, 4); return b; }
inline float float_of(uint32_t b) { float x; std::memcpy(&x, &b, 4); return x; }

// A finite IEEE binary16 by its definition.
inline double float_of_binary16(int h) {
    const int e = (h >> 10) & 31, m = h & 1023;
    const double value = e == 0 ? std::ldexp(m, -24) : std::ldexp(1024 + m, e - 25);
    return h & 0x8000 ? -value : value;
}

// Bit-equal, zeros' signs included; any NaN equals any NaN.
inline bool same(float a, float b) { return bits_of(a) == bits_of(b) || (std::isnan(a) && std::isnan(b)); }

// The first index where two arrays of floats differ, or -1.
inline int64_t first_difference(const float * a, const float * b, int64_t n) {
    for (int64_t i = 0; i < n; ++i)
        if (!same(a[i], b[i])) return i;
    return -1;
}
inline int64_t first_difference(const uint8_t * a, const uint8_t * b, size_t n) {
    for (size_t i = 0; i < n; ++i)
        if (a[i] != b[i]) return int64_t(i);
    return -1;
}

inline bool is_trellis(const tq_type_info & t) {
    return t.family == TQ_TURBO4_TCQ || t.family == TQ_TURBO3_TCQ || t.family == TQ_TURBO2_TCQ;
}

struct Input {
    const char * name;
    void (*fill)(Random & r, float * x, int64_t n, int block); // n values, blocks of `block`
};

namespace inputs_detail {

template <typename F> void each(float * x, int64_t n, F f) {
    for (int64_t i = 0; i < n; ++i) x[i] = f(i);
}

inline float sign_of(int which, int64_t i) { return (tq_signs(which)[i / 8] >> (i % 8)) & 1 ? -1.0f : 1.0f; }
inline float walsh(int64_t row, int64_t i) { // entry of H_n
    int parity = 0;
    for (uint64_t b = uint64_t(row & i); b; b >>= 1) parity ^= int(b & 1);
    return parity ? -1.0f : 1.0f;
}

inline void gaussian(Random & r, float * x, int64_t n, int) { each(x, n, [&](int64_t) { return r.normal(); }); }
inline void heavy_tailed(Random & r, float * x, int64_t n, int) { // Cauchy
    each(x, n, [&](int64_t) { return float(std::tan(3.141592653589793 * (r.uniform() - 0.5))); });
}
inline void channel_outliers(Random & r, float * x, int64_t n, int block) {
    each(x, n, [&](int64_t i) { return r.normal() * (i % block == 3 || i % block == 17 ? 60.0f : 1.0f); });
}
inline void zeros(Random &, float * x, int64_t n, int) { each(x, n, [](int64_t) { return 0.0f; }); }
inline void signed_zeros(Random & r, float * x, int64_t n, int) {
    each(x, n, [&](int64_t) { return r.below(2) ? -0.0f : 0.0f; });
}
inline void constant(Random & r, float * x, int64_t n, int block) {
    float c = 0;
    each(x, n, [&](int64_t i) { return i % block == 0 ? c = r.normal() : c; });
}
inline void one_hot(Random & r, float * x, int64_t n, int block) {
    each(x, n, [](int64_t) { return 0.0f; });
    for (int64_t b = 0; b < n; b += block) x[b + (b / block) % block] = r.normal();
}
inline void one_hot_rotated(Random & r, float * x, int64_t n, int block) { // all energy in one value after the rotation
    for (int64_t b = 0; b < n; b += block) {
        const int64_t row = (b / block) % block;
        const float amplitude = r.normal();
        for (int64_t i = 0; i < block; ++i) x[b + i] = amplitude * sign_of(1, i) * walsh(row, i);
    }
}
inline void alternating(Random & r, float * x, int64_t n, int block) {
    float c = 0;
    each(x, n, [&](int64_t i) { return i % block == 0 ? c = r.normal() : i % 2 ? -c : c; });
}

// Values whose rotation is y.
template <typename F> void each_rotated(float * x, int64_t n, int block, F y) {
    each(x, n, y);
    tq_unrotate(block, x, x, n, 1);
}
inline void equal_rotated(Random & r, float * x, int64_t n, int block) { // equal magnitudes: ties between paths
    each_rotated(x, n, block, [&](int64_t) { return r.below(2) ? 1.0f : -1.0f; });
}
inline void alternating_rotated(Random &, float * x, int64_t n, int block) {
    each_rotated(x, n, block, [](int64_t i) { return i % 2 ? 1.0f : -1.0f; });
}
inline void small_integers_rotated(Random & r, float * x, int64_t n, int block) {
    each_rotated(x, n, block, [&](int64_t) { return float(r.below(5) - 2); });
}
inline void spikes_rotated(Random & r, float * x, int64_t n, int block) { // around the outermost levels of all scales
    float size = 0;
    each_rotated(x, n, block, [&](int64_t i) {
        if (i % block == 0) size = float(1 + 11 * r.uniform());
        return r.below(block / 2) ? r.normal() : r.below(2) ? size : -size;
    });
}
inline void outliers_rotated(Random & r, float * x, int64_t n, int block) { // heavy tails after the rotation
    each_rotated(x, n, block, [&](int64_t) {
        const float v = r.normal();
        return v * v * v;
    });
}
inline void small_integers(Random & r, float * x, int64_t n, int) { // every sum is exact, many ties
    each(x, n, [&](int64_t) { return float(r.below(9) - 4); });
}
inline void denormals(Random & r, float * x, int64_t n, int) {
    each(x, n, [&](int64_t) { return float_of(uint32_t(r.bits()) & 0x807fffff); });
}
inline void smallest_denormal(Random & r, float * x, int64_t n, int block) {
    each(x, n, [](int64_t) { return 0.0f; });
    for (int64_t b = 0; b < n; b += block) x[b + r.below(block)] = float_of(1);
}
inline void below_half(Random & r, float * x, int64_t n, int) { // scales around fp16's smallest values
    each(x, n, [&](int64_t i) { return r.normal() * std::ldexp(1.0f, -26 + int(i / 256 % 14)); });
}
inline void around_half_limit(Random & r, float * x, int64_t n, int block) { // scales around 65504
    float size = 0;
    each(x, n, [&](int64_t i) {
        if (i % block == 0) size = 65504.0f * float(0.9 + 0.2 * r.uniform());
        return r.normal() * size;
    });
}
inline void saturating(Random & r, float * x, int64_t n, int) {
    each(x, n, [&](int64_t) { return r.normal() * 1e6f; });
}
inline void huge(Random & r, float * x, int64_t n, int) { each(x, n, [&](int64_t) { return r.normal() * 1e30f; }); }
inline void largest_float(Random & r, float * x, int64_t n, int) {
    each(x, n, [&](int64_t) { return r.below(2) ? FLT_MAX : -FLT_MAX; });
}
inline void any_exponent(Random & r, float * x, int64_t n, int) { // finite, all magnitudes in one block
    each(x, n, [&](int64_t) {
        const uint32_t b = uint32_t(r.bits());
        return float_of((b & 0x7f800000) == 0x7f800000 ? b & 0x807fffff : b);
    });
}
inline void any_bits(Random & r, float * x, int64_t n, int) {
    each(x, n, [&](int64_t) { return float_of(uint32_t(r.bits())); });
}
inline void nonfinite(Random & r, float * x, int64_t n, int block) { // some blocks of a row, not all
    const float bad[] = {NAN, -NAN, INFINITY, -INFINITY, float_of(0x7f800001)};
    each(x, n, [&](int64_t) { return r.normal(); });
    for (int64_t b = 0; b < n; b += block)
        for (int count = r.below(3); count > 0; --count) x[b + r.below(block)] = bad[r.below(5)];
}

} // namespace inputs_detail

inline const std::vector<Input> & inputs() {
    using namespace inputs_detail;
    static const std::vector<Input> list = {
        {"gaussian", gaussian}, {"heavy-tailed", heavy_tailed}, {"channel outliers", channel_outliers},
        {"zeros", zeros}, {"signed zeros", signed_zeros}, {"constant", constant}, {"one-hot", one_hot},
        {"one-hot after rotation", one_hot_rotated}, {"alternating", alternating},
        {"equal magnitudes after rotation", equal_rotated}, {"alternating after rotation", alternating_rotated},
        {"small integers after rotation", small_integers_rotated}, {"spikes after rotation", spikes_rotated},
        {"heavy-tailed after rotation", outliers_rotated},
        {"small integers", small_integers}, {"denormals", denormals},
        {"smallest denormal", smallest_denormal}, {"around fp16's smallest", below_half},
        {"around fp16's largest", around_half_limit}, {"saturating", saturating}, {"1e30", huge},
        {"largest float", largest_float}, {"any exponent", any_exponent}, {"any bits", any_bits},
        {"NaN and infinity", nonfinite}};
    return list;
}

// Stored scales that an encoder may or may not emit: zeros, subnormals, one, the largest, infinities, NaNs, negatives.
inline const std::vector<uint16_t> & odd_scales() {
    static const std::vector<uint16_t> list = {0x0000, 0x8000, 0x0001, 0x8001, 0x03ff, 0x0400, 0x3c00, 0xbc00, 0x7bff,
                                               0xfbff, 0x7c00, 0xfc00, 0x7c01, 0x7e00, 0xfe00, 0x7fff, 0xffff};
    return list;
}

// Random encoded blocks: any index bytes; scales ordinary, odd or random.
inline void fill_blocks(Random & r, uint8_t * bytes, int64_t blocks, int block_bytes) {
    for (int64_t b = 0; b < blocks; ++b, bytes += block_bytes) {
        for (int i = 0; i < block_bytes; ++i) bytes[i] = uint8_t(r.bits());
        const int kind = r.below(4);
        if (kind == 3) continue;
        const uint16_t d = kind == 0 ? odd_scales()[size_t(r.below(int(odd_scales().size())))]
                                     : uint16_t(0x3800 + r.below(0x0800)); // 0.5 ... 2
        bytes[0] = uint8_t(d);
        bytes[1] = uint8_t(d >> 8);
    }
}

#endif
