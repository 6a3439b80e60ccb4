// Scores from levels in the order of the cache, by a plain loop over the channels of a KV row.
#ifndef TURBOQUANT_GENERIC_SCORES_PLAIN_H
#define TURBOQUANT_GENERIC_SCORES_PLAIN_H

#include "../format.h"
#include "../kernels.h"

namespace turboquant {
namespace {

constexpr decltype(Kernels::keys) keys = nullptr;

template <int N>
void scores(const int8_t * level, const float * scale, int64_t blocks, const void * query, int rows, float * s) {
    auto * q = static_cast<const typename QueryBlock<N>::type *>(query);
    for (int m = 0; m < rows; ++m, q += blocks)
        for (int r = 0; r < tile_rows; ++r) {
            float sum = 0;
            for (int64_t b = 0; b < blocks; ++b) {
                const int8_t * k = level + (r * blocks + b) * N;
                int32_t product = 0;
                for (int i = 0; i < N; ++i) product += int32_t(k[i]) * q[b].q[i];
                sum += float(product) * q[b].scale * scale[b * tile_rows + r];
            }
            s[m * tile_rows + r] = sum;
        }
}

} // namespace
} // namespace turboquant

#endif
