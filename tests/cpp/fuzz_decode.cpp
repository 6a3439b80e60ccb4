// libFuzzer target: any bytes decode, without a memory error, to the same values with every kernel. The input's first
// byte chooses the type, the rest are encoded rows; a tail shorter than a block is a truncated row, which the checked
// functions refuse. Every buffer has exactly the size that the call may touch, at the end of a heap allocation.
#include "turboquant.h"

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <vector>

namespace {

#define REQUIRE(condition)                                                                        \
    do {                                                                                          \
        if (!(condition)) {                                                                       \
            std::fprintf(stderr, "%s:%d: %s (kernels %s, type %s, %lld values)\n", __FILE__,      \
                         __LINE__, #condition, tq_kernels_selected(), tq_type_get(type)->name,    \
                         (long long) n);                                                          \
            std::abort();                                                                         \
        }                                                                                         \
    } while (0)

bool same(float a, float b) { return std::memcmp(&a, &b, 4) == 0 || (std::isnan(a) && std::isnan(b)); }

template <typename T> std::unique_ptr<T[]> heap(size_t count) { return std::unique_ptr<T[]>(new T[count]); }

void fuzz_type(tq_type type, const uint8_t * data, size_t size) {
    const tq_type_info & info = *tq_type_get(type);
    const int64_t blocks = int64_t(size) / info.block_bytes, n = blocks * info.block;
    const auto encoded = heap<uint8_t>(size_t(blocks * info.block_bytes));
    std::copy_n(data, size_t(blocks * info.block_bytes), encoded.get());
    const size_t row_bytes = tq_row_bytes(type, n);
    REQUIRE(row_bytes == size_t(blocks * info.block_bytes));

    // A row whose length is no multiple of the block is refused before anything is read or written.
    float nothing = 0;
    REQUIRE(tq_decode(type, encoded.get(), row_bytes, &nothing, n + 1, 1, n + 1, 1) == TQ_ERROR_LENGTH);
    REQUIRE(tq_decode_rotated(type, encoded.get(), row_bytes, &nothing, n + 31, 1, n + 31, 1) == TQ_ERROR_LENGTH);
    REQUIRE(tq_dot(type, encoded.get(), row_bytes, encoded.get(), &nothing, 1, n + 7) == TQ_ERROR_LENGTH);
    if (n == 0) return;

    // A query from the same bytes: finite values of moderate size.
    const auto x = heap<float>(size_t(n));
    for (int64_t i = 0; i < n; ++i) x[size_t(i)] = float(int8_t(data[size_t(i) % size])) * (1 + float(i % 5));
    const size_t query_bytes = tq_query_bytes(info.block, n);
    const auto query = heap<uint32_t>(query_bytes / 4);
    const auto floats = heap<float>(size_t(n)), want = heap<float>(size_t(n)), want_rotated = heap<float>(size_t(n));

    REQUIRE(tq_kernels_select("scalar") == TQ_OK);
    REQUIRE(tq_decode(type, encoded.get(), row_bytes, want.get(), n, 1, n, 1) == TQ_OK);
    REQUIRE(tq_decode_rotated(type, encoded.get(), row_bytes, want_rotated.get(), n, 1, n, 1) == TQ_OK);
    REQUIRE(tq_query(info.block, x.get(), query.get(), n) == TQ_OK);
    float want_dot = 0, want_block_dots = 0;
    REQUIRE(tq_dot(type, encoded.get(), row_bytes, query.get(), &want_dot, 1, n) == TQ_OK);
    for (int64_t b = 0; b < blocks; ++b)
        want_block_dots += std::fabs(tq_dot_row(type, encoded.get() + b * info.block_bytes,
                                                query.get() + size_t(b) * tq_query_bytes(info.block, info.block) / 4,
                                                info.block));

    for (int k = 0; k < tq_kernels_count(); ++k) {
        if (!tq_kernels_supported(k)) continue;
        REQUIRE(tq_kernels_select(tq_kernels_name(k)) == TQ_OK);
        REQUIRE(tq_decode(type, encoded.get(), row_bytes, floats.get(), n, 1, n, 1) == TQ_OK);
        for (int64_t i = 0; i < n; ++i) REQUIRE(same(floats[size_t(i)], want[size_t(i)]));
        // The same blocks as rows of one block each.
        REQUIRE(tq_decode(type, encoded.get(), size_t(info.block_bytes), floats.get(), info.block, blocks, info.block,
                          1) == TQ_OK);
        for (int64_t i = 0; i < n; ++i) REQUIRE(same(floats[size_t(i)], want[size_t(i)]));
        REQUIRE(tq_decode_rotated(type, encoded.get(), row_bytes, floats.get(), n, 1, n, 1) == TQ_OK);
        for (int64_t i = 0; i < n; ++i) REQUIRE(same(floats[size_t(i)], want_rotated[size_t(i)]));
        float dot = 0;
        REQUIRE(tq_dot(type, encoded.get(), row_bytes, query.get(), &dot, 1, n) == TQ_OK);
        if (std::isfinite(want_block_dots))
            REQUIRE(std::fabs(double(dot) - want_dot) <= 1e-6 * double(want_block_dots));
        else
            REQUIRE(same(dot, want_dot) || !std::isfinite(want_dot));

        // The bytes as floats: the encoder takes anything, and what it writes decodes to finite values.
        if (size >= 4 * size_t(info.block)) {
            const auto input = heap<float>(size_t(info.block));
            std::memcpy(input.get(), data, 4 * size_t(info.block));
            const auto block = heap<uint8_t>(size_t(info.block_bytes));
            const auto scalar = heap<uint8_t>(size_t(info.block_bytes));
            tq_encode_row(type, input.get(), block.get(), info.block);
            tq_decode_row(type, block.get(), floats.get(), info.block);
            for (int i = 0; i < info.block; ++i) REQUIRE(std::isfinite(floats[size_t(i)]));
            REQUIRE(tq_kernels_select("scalar") == TQ_OK);
            tq_encode_row(type, input.get(), scalar.get(), info.block);
            REQUIRE(std::memcmp(block.get(), scalar.get(), size_t(info.block_bytes)) == 0);
        }
    }
}

} // namespace

extern "C" int LLVMFuzzerTestOneInput(const uint8_t * data, size_t size) {
    if (size == 0) return 0;
    fuzz_type(tq_type(data[0] % TQ_TYPE_COUNT), data + 1, size - 1);
    return 0;
}
