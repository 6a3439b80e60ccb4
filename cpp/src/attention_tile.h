// The parts of the fused attention that compilers vectorise well. Every ISA file includes this file and compiles it
// with its flags. Fixed trip counts and independent lanes let compilers vectorise the loops without fast math.
#ifndef TURBOQUANT_ATTENTION_TILE_H
#define TURBOQUANT_ATTENTION_TILE_H

#include "format.h"
#include "kernels.h"

namespace turboquant {
namespace {

// e^x for x <= 0, relative error below 2e-7; 0 from -87 down; NaN stays NaN. Cody-Waite reduction and the polynomial of
// Cephes' expf.
inline float exp_negative(float x) {
    const float bounded = x <= -87.0f ? -87.0f : x;
    const float magic = 12582912.0f; // 1.5 * 2^23: the addition rounds to an integer in the low bits
    const float shifted = bounded * 1.44269504f + magic;
    const float n = shifted - magic;
    const float r = (bounded - n * 0.693359375f) + n * 2.12194440e-4f;
    float p = 1.9875691500e-4f;
    p = p * r + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    const float y = p * r * r + r + 1.0f;
    const float scaled = bits_float(float_bits(y) + (float_bits(shifted) << 23)); // * 2^n
    return x <= -87.0f ? 0.0f : x == x ? scaled : x;
}

inline float greater(float a, float b) { return a > b ? a : b; }

// Replaces the scores of a query row in a tile by weights relative to the row's running maximum. A NaN score makes the
// sum NaN.
void softmax_tile(float * s, const float * bias, float scale, float soft_cap, SoftmaxState * state, float * most) {
    if (soft_cap != 0.0f) {
        for (int r = 0; r < tile_rows; ++r) {
            const float x = s[r] * scale / soft_cap, t = exp_negative(x > 0 ? -2 * x : 2 * x);
            const float tanh = (1.0f - t) / (1.0f + t);
            s[r] = soft_cap * (x > 0 ? tanh : -tanh);
        }
        scale = 1.0f;
    }
    for (int r = 0; r < tile_rows; ++r) // the score of a masked row is ignored, also if it is NaN
        s[r] = bias[r] == -INFINITY ? -INFINITY : s[r] * scale + bias[r];

    float lane[16];
    for (int l = 0; l < 16; ++l) lane[l] = s[l];
    for (int r = 16; r < tile_rows; r += 16)
        for (int l = 0; l < 16; ++l) lane[l] = greater(s[r + l], lane[l]);
    for (int h = 8; h > 0; h /= 2)
        for (int l = 0; l < h; ++l) lane[l] = greater(lane[l], lane[l + h]);
    const float largest = greater(lane[0], state->largest);
    if (largest == -INFINITY) { // all rows so far are masked or NaN; a NaN must not be lost
        int nan = 0;
        for (int r = 0; r < tile_rows; ++r) nan |= s[r] != s[r];
        if (nan) state->sum = NAN;
        for (int r = 0; r < tile_rows; ++r) s[r] = 0.0f;
        state->correction = 1.0f;
        return;
    }
    for (int r = 0; r < tile_rows; ++r) s[r] = exp_negative(s[r] - largest);
    for (int r = 0; r < tile_rows; ++r) most[r] = most[r] > s[r] ? most[r] : s[r];
    for (int l = 0; l < 16; ++l) lane[l] = s[l];
    for (int r = 16; r < tile_rows; r += 16)
        for (int l = 0; l < 16; ++l) lane[l] += s[r + l];
    for (int h = 8; h > 0; h /= 2)
        for (int l = 0; l < h; ++l) lane[l] += lane[l + h];
    state->correction = state->largest == -INFINITY ? 0.0f : exp_negative(state->largest - largest);
    state->sum = state->sum * state->correction + lane[0];
    state->largest = largest;
}

// Scores of K as floats.
void scores_float(const float * k, int64_t head, const float * q, int rows, float * s) {
    for (int m = 0; m < rows; ++m)
        for (int r = 0; r < tile_rows; ++r) {
            const float * a = q + m * head;
            const float * b = k + r * head;
            float lane[16] = {};
            for (int64_t c = 0; c < head; c += 16)
                for (int l = 0; l < 16; ++l) lane[l] += a[c + l] * b[c + l];
            for (int h = 8; h > 0; h /= 2)
                for (int l = 0; l < h; ++l) lane[l] += lane[l + h];
            s[m * tile_rows + r] = lane[0];
        }
}

// A format's blocks; every file has its own block_levels(F(), indices, level).
template <typename F> void levels(const CacheRows & rows, int64_t blocks, int8_t * level, float * scale) {
    for (int r = 0; r < rows.count; ++r) {
        const uint8_t * src = rows[r];
        for (int64_t b = 0; b < blocks; ++b, src += F::bytes, level += F::block) {
            scale[b * tile_rows + r] = F::load_scale(src) * F::step;
            block_levels(F(), src + 2, level);
        }
    }
}

// ggml's q8_0 and q4_0 blocks: fp16 scale, then 32 int8, or 16 bytes with elements j and j + 16.
void levels_q8_0(const CacheRows & rows, int64_t blocks, int8_t * level, float * scale) {
    for (int r = 0; r < rows.count; ++r) {
        const uint8_t * src = rows[r];
        for (int64_t b = 0; b < blocks; ++b, src += 34, level += 32) {
            scale[b * tile_rows + r] = load_scale(src);
            std::memcpy(level, src + 2, 32);
        }
    }
}

void levels_q4_0(const CacheRows & rows, int64_t blocks, int8_t * level, float * scale) {
    for (int r = 0; r < rows.count; ++r) {
        const uint8_t * src = rows[r];
        for (int64_t b = 0; b < blocks; ++b, src += 18, level += 32) {
            scale[b * tile_rows + r] = load_scale(src);
            scale[b * tile_rows + r] = std::fabs(scale[b * tile_rows + r]);
            const uint64_t flip = load16(src) >> 15; // half of ggml's scales are negative; level -8 then becomes 8
            for (int w = 0; w < 4; ++w) {            // eight levels at a time: compilers do not vectorise this
                uint64_t v;
                std::memcpy(&v, src + 2 + 8 * (w % 2), 8);
                v = v >> (w < 2 ? 0 : 4) & each_byte * 15;
                v = (v ^ each_byte * 15 * flip) + each_byte * flip;       // or 16 - v
                v = ((v | each_byte * 128) - each_byte * 8) ^ each_byte * 128; // v - 8
                std::memcpy(level + 8 * w, &v, 8);
            }
        }
    }
}

void load_f16(const uint8_t * src, float * dst, int64_t n); // defined by every ISA file

void bias_tile(const void * mask, bool f32, float slope, int rows, float * bias) {
    alignas(64) uint8_t padded[tile_rows * sizeof(float)];
    const size_t size = f32 ? sizeof(float) : sizeof(uint16_t);
    if (!mask || rows < tile_rows) {
        std::memset(padded, 0, sizeof(padded));
        if (mask) std::memcpy(padded, mask, size_t(rows) * size);
        mask = padded;
    }
    if (f32)
        std::memcpy(bias, mask, tile_rows * sizeof(float));
    else
        load_f16(static_cast<const uint8_t *>(mask), bias, tile_rows);
    if (slope != 1.0f)
        for (int r = 0; r < tile_rows; ++r) bias[r] *= slope;
    for (int r = rows; r < tile_rows; ++r) bias[r] = -INFINITY;
}

void load_bf16_row(const uint8_t * src, float * dst, int64_t n) {
    for (int64_t i = 0; i < n; ++i) dst[i] = bits_float(uint32_t(load16(src + 2 * i)) << 16);
}

} // namespace
} // namespace turboquant

#endif
