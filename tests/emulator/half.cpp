#include "half.h"

#include <cmath>
#include <cstring>

namespace emulator {

float float_of_half(uint16_t h) {
    const uint32_t sign = uint32_t(h & 0x8000) << 16, e = (h >> 10) & 31, m = h & 0x3ff;
    uint32_t bits = sign | ((e + 112) << 23) | (m << 13);
    if (e == 31) bits = sign | 0x7f800000 | (m << 13);
    float x;
    if (e == 0) x = float(m) * 0x1p-24f;
    else std::memcpy(&x, &bits, 4);
    return e == 0 && sign ? -x : x;
}

uint16_t half_of_float(float x) {
    uint32_t b;
    std::memcpy(&b, &x, 4);
    const uint32_t sign = (b >> 16) & 0x8000, a = b & 0x7fffffff;
    if (a > 0x7f800000) return uint16_t(sign | 0x7e00);
    if (a >= 0x477ff000) return uint16_t(sign | 0x7c00);
    if (a < 0x38800000) return uint16_t(sign | uint32_t(std::nearbyint(std::fabs(x) * 0x1p24f)));
    return uint16_t(sign | ((a - 0x38000000 + 0xfff + ((a >> 13) & 1)) >> 13));
}

} // namespace emulator
