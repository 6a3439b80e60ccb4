// Rows of every type that K or V may have: bytes for tests, and their values, in plain code.
#ifndef TURBOQUANT_TESTS_ROWS_H
#define TURBOQUANT_TESTS_ROWS_H

#include "attention.h"
#include "inputs.h"

#include <algorithm>

// Converts to binary16, and rounds to nearest even.
inline uint16_t binary16_of(float x) {
    const uint16_t sign = std::signbit(x) ? 0x8000 : 0;
    const double a = std::fabs(double(x));
    if (std::isnan(x)) return 0x7e00;
    if (a == 0 || a >= 65520) return uint16_t(sign | (a == 0 ? 0 : 0x7c00));
    int e = 0;
    std::frexp(a, &e);
    e = std::max(e, -13); // below, values are subnormal: multiples of 2^-24
    const int units = int(std::nearbyint(std::ldexp(a, 11 - e)));
    return uint16_t(sign | (e == -13 ? units : ((e + 14) << 10) + units - 1024));
}

inline void put_half(uint8_t * to, int h) {
    to[0] = uint8_t(h);
    to[1] = uint8_t(h >> 8);
}
inline double half_at(const uint8_t * from) {
    const int h = from[0] | from[1] << 8;
    if ((h & 0x7c00) != 0x7c00) return float_of_binary16(h);
    return h & 0x3ff ? NAN : h & 0x8000 ? -INFINITY : INFINITY;
}

inline bool has_scale(int type) { return type != TQ_ROW_F16 && type != TQ_ROW_BF16; }

// Replaces the scale of a block by the binary16 number h, or by what a trellis-coded type has of it.
inline void put_scale(int type, uint8_t * block, int h) {
    if (!attention_list::is_trellis(type)) return put_half(block, h);
    put_half(block, ((block[0] | block[1] << 8) & 0xfc00) | (h >> 5 & 0x3ff));
}

inline size_t row_bytes(int type, int64_t n) {
    const tq_row_info & info = *tq_row_get(type);
    return size_t(n / info.block) * size_t(info.block_bytes);
}

inline void encode_row(int type, const float * x, uint8_t * bytes, int64_t n) {
    if (type < TQ_TYPE_COUNT) return tq_encode_row(tq_type(type), x, bytes, n);
    for (int64_t i = 0; i < n && !has_scale(type); ++i)
        put_half(bytes + 2 * i, type == TQ_ROW_F16 ? binary16_of(x[i]) : int((bits_of(x[i]) + 0x8000) >> 16));
    if (!has_scale(type)) return;
    const float levels = type == TQ_ROW_Q8_0 ? 127.0f : 7.0f;
    for (int64_t b = 0; b < n / 32; ++b, x += 32, bytes += row_bytes(type, 32)) {
        float top = 0;
        for (int i = 0; i < 32; ++i) top = std::max(top, std::fabs(x[i]));
        put_half(bytes, binary16_of(top / levels));
        for (int i = 0; i < 16 && type == TQ_ROW_Q4_0; ++i) bytes[2 + i] = 0;
        for (int i = 0; i < 32; ++i) {
            const int q = top > 0 ? int(std::lround(x[i] * levels / top)) : 0;
            if (type == TQ_ROW_Q8_0) bytes[2 + i] = uint8_t(int8_t(q));
            else bytes[2 + i % 16] = uint8_t(bytes[2 + i % 16] | (q + 8) << (i / 16 * 4));
        }
    }
}

inline void decode_row(int type, const uint8_t * bytes, float * values, int64_t n) {
    if (type < TQ_TYPE_COUNT) return tq_decode_row(tq_type(type), bytes, values, n);
    for (int64_t i = 0; i < n; ++i) {
        const uint8_t * block = bytes + row_bytes(type, i / 32 * 32);
        const int j = int(i % 32);
        switch (type) {
            case TQ_ROW_F16: values[i] = float(half_at(block + 2 * j)); break;
            case TQ_ROW_BF16: values[i] = float_of(uint32_t(block[2 * j] | block[2 * j + 1] << 8) << 16); break;
            case TQ_ROW_Q8_0: values[i] = float(half_at(block) * int8_t(block[2 + j])); break;
            default: values[i] = float(half_at(block) * ((block[2 + j % 16] >> (j / 16 * 4) & 15) - 8));
        }
    }
}

// Sets the scales of a row to scale(); a row of floats has none.
template <typename Scale> void replace_scales(int type, uint8_t * bytes, int64_t n, const Scale & scale) {
    if (!has_scale(type)) return;
    const tq_row_info & info = *tq_row_get(type);
    for (int64_t i = 0; i < n; i += info.block, bytes += info.block_bytes) put_scale(type, bytes, scale());
}

// The scale that gives values near one, from a scale `h` near one: levels of q8_0 are up to 127.
inline int fitting_scale(int type, int h) { return type == TQ_ROW_Q8_0 && (h & 0x7c00) ? h - (6 << 10) : h; }

// Random bytes whose values are finite and of ordinary size.
inline void any_row(Random & r, int type, uint8_t * bytes, int64_t n) {
    const auto half_near_one = [&] { return (r.below(2) << 15) + 0x3800 + r.below(0x0800); }; // +-0.5 ... 2
    const int64_t size = int64_t(row_bytes(type, n));
    for (int64_t i = 0; i < size; ++i) bytes[i] = uint8_t(r.bits());
    if (!has_scale(type))
        for (int64_t i = 0; i < size; i += 2)
            put_half(bytes + i, type == TQ_ROW_F16 ? half_near_one() : (r.below(2) << 15) + 0x3f00 + r.below(0x100));
    if (type == TQ_ROW_Q8_0)
        for (int64_t i = 2; i < size; i += 1 + r.below(16)) bytes[i] = 0x80;
    replace_scales(type, bytes, n, [&] { return fitting_scale(type, half_near_one()); });
}

inline void make_row(Random & r, int type, Bytes kind, uint8_t * bytes, int64_t n) {
    if (kind == Bytes::any) return any_row(r, type, bytes, n);
    std::vector<float> x(static_cast<size_t>(n));
    for (float & value : x) value = r.normal();
    encode_row(type, x.data(), bytes, n);
    const uint16_t odd[] = {0xbc00, 0xb800, 0x3c00, 0x0000, 0x8000, 0x8123, 0x0123}; // -1, -0.5, 1, zeros, subnormals
    const uint16_t subnormal[] = {0x83ff, 0x8200, 0x02ab, 0x8155};
    if (kind == Bytes::odd) replace_scales(type, bytes, n, [&] { return fitting_scale(type, odd[r.below(7)]); });
    if (kind == Bytes::subnormal) replace_scales(type, bytes, n, [&] { return subnormal[r.below(4)]; });
}

inline void spoil_row(int type, Bad bad, uint8_t * bytes, int64_t n) {
    if (bad == Bad::nan) std::memset(bytes, 0xff, row_bytes(type, n));
    else put_scale(type, bytes, type == TQ_ROW_BF16 ? 0x7f80 : 0x7c00);
}

#endif
