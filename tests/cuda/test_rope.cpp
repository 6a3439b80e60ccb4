// Compares rotary position embeddings with the definition, in double precision.
#include "check.h"
#include "codec.h"
#include "device.h"
#include "turboquant_cuda.h"

#include <algorithm>
#include <cmath>
#include <cstring>

using namespace turboquant::cuda;

namespace {

// A case. The magnitude and the angles of YaRN (https://arxiv.org/abs/2309.00071) are those of a context of four times
// the length.
struct Shape {
    const char * name;
    int64_t tokens;
    int head, heads[2], first, values;
    bool adjacent, factors, yarn, in_place;
    int last_position;
};

struct Side {
    std::vector<float> values, want, margin;
    int64_t head_stride, token_stride; // floats
};

void turns(const Shape & c) {
    check::Case where("rope ", c.name);
    Random random(uint64_t(c.tokens * 1000 + c.values));
    const int pairs = c.values / 2;
    std::vector<int32_t> positions(static_cast<size_t>(c.tokens));
    for (int32_t & p : positions) p = int32_t(random.below(uint32_t(c.last_position)));
    positions.back() = c.last_position;
    std::vector<float> factors(static_cast<size_t>(pairs));
    for (float & f : factors) f = 1.0f + float(random.below(700)) / 100.0f;
    DeviceArray<int32_t> own_positions(positions);
    DeviceArray<float> own_factors(factors);
    RopeAngles angles = {c.tokens, own_positions.get(), c.factors ? own_factors.get() : nullptr, c.first, c.values,
                         c.adjacent, std::pow(500000.0f, -2.0f / float(c.values)), 1, 0, {}, 1};
    if (c.yarn) {
        angles.scale = 0.25f;
        angles.extrapolation = 1;
        angles.ramp[0] = float(pairs) / 4;
        angles.ramp[1] = float(pairs) * 3 / 4;
        angles.magnitude = 1.25f;
    }
    Side side[2];
    for (int i = 0; i < 2; ++i) {
        Side & s = side[i];
        s.head_stride = c.head + 2;
        s.token_stride = s.head_stride * c.heads[i] + 4;
        s.values.resize(size_t(s.token_stride * c.tokens));
        for (float & x : s.values) x = random.normal();
        s.want = s.values;
        s.margin.assign(s.values.size(), 0.0f);
        if (!c.in_place) std::memset(s.want.data(), poison, 4 * s.want.size());
        for (int64_t t = 0; t < c.tokens; ++t)
            for (int h = 0; h < c.heads[i]; ++h) {
                const int64_t start = t * s.token_stride + h * s.head_stride, row = start + c.first;
                std::copy_n(s.values.begin() + start, c.head, s.want.begin() + start);
                for (int p = 0; p < pairs; ++p) {
                    const double far = positions[size_t(t)] * std::pow(double(angles.base), p) /
                                       (c.factors ? double(factors[size_t(p)]) : 1.0);
                    double angle = far, magnitude = 1;
                    if (c.yarn) {
                        const double mix =
                            1 - std::min(1.0, std::max(0.0, (p - pairs / 4.0) / (pairs * 3 / 4.0 - pairs / 4.0)));
                        angle = 0.25 * far * (1 - mix) + far * mix;
                        magnitude = 1.25 * (1 + 0.1 * std::log(4.0));
                    }
                    const size_t a = size_t(row + (c.adjacent ? 2 * p : p)), b = a + size_t(c.adjacent ? 1 : pairs);
                    const double x = s.values[a], y = s.values[b];
                    s.want[a] = float(magnitude * (x * std::cos(angle) - y * std::sin(angle)));
                    s.want[b] = float(magnitude * (x * std::sin(angle) + y * std::cos(angle)));
                    // Fast math has an error of 2^-22 in a logarithm, which the power multiplies by p.
                    const double turn = std::fabs(far) * (4e-7 * p + 5e-7) + 2e-6;
                    s.margin[a] = s.margin[b] = float(magnitude * (std::fabs(x) + std::fabs(y)) * turn + 1e-6);
                }
            }
    }
    DeviceArray<float> q(side[0].values), k(side[1].values), q_out(side[0].values.size()), k_out(side[1].values.size());
    const auto rows = [&](const Side & s, float * data) {
        return Rows{data, {4 * s.head_stride, 4 * s.token_stride, 0}};
    };
    float * const to[2] = {c.in_place ? q.get() : q_out.get(), c.in_place ? k.get() : k_out.get()};
    must(rope({rows(side[0], q.get()), rows(side[0], to[0]), c.head, c.heads[0]},
              {rows(side[1], k.get()), rows(side[1], to[1]), c.head, c.heads[1]}, angles, nullptr),
         "rope");
    for (int i = 0; i < 2; ++i) {
        const std::vector<float> got = (i ? c.in_place ? k : k_out : c.in_place ? q : q_out).host();
        int64_t wrong = 0;
        for (size_t j = 0; j < got.size(); ++j) wrong += !(std::fabs(got[j] - side[i].want[j]) <= side[i].margin[j]);
        CHECK_EQ(wrong, int64_t(0));
    }
}

} // namespace

int main() {
    need_device(75);
    const Shape shapes[] = {
        {"of one token", 1, 128, {32, 8}, 0, 128, true, true, false, true, 3000},
        {"of halves", 3, 128, {7, 1}, 0, 128, false, false, false, true, 3000},
        {"of many rows", 150, 128, {32, 8}, 0, 128, true, true, false, true, 3000}, // several heads to a warp
        {"of many rows, copied", 150, 64, {33, 3}, 0, 64, false, false, false, false, 3000},
        {"of a part of a head", 5, 128, {4, 4}, 16, 64, true, false, false, false, 3000},
        {"of a part of a head, in halves", 5, 128, {4, 4}, 32, 96, false, true, false, false, 3000},
        {"of an odd size", 2, 80, {6, 2}, 0, 80, false, false, false, true, 3000},
        {"of large heads", 2, 256, {3, 1}, 0, 256, false, false, false, true, 3000},
        {"with YaRN", 4, 128, {8, 2}, 0, 128, true, false, true, true, 3000},
        {"with YaRN and factors, in halves", 4, 128, {8, 2}, 0, 128, false, true, true, false, 3000},
        {"far away", 2, 128, {4, 1}, 0, 128, true, false, false, true, 130000},
    };
    for (const Shape & c : shapes) turns(c);
    RopeAngles odd = {1, nullptr, nullptr, 0, 258, true, 1, 1, 0, {}, 1};
    CHECK(!rope_supports(odd));
    CHECK_EQ(rope({}, {}, odd, nullptr), cudaErrorNotSupported);
    odd.values = 63;
    CHECK(!rope_supports(odd));
    odd.values = 64;
    CHECK(rope_supports(odd));
    odd.tokens = 0;
    CHECK_EQ(rope({}, {}, odd, nullptr), cudaSuccess);
    must(cudaDeviceSynchronize(), "at the end");
    return check::summary();
}
