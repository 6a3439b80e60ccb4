// The checked functions of turboquant.h, and the type table.
#include "format.h"
#include "kernels.h"
#include "parallel.h"

#include <atomic>
#include <cstddef>

namespace turboquant {
namespace {

#define TURBOQUANT_INFO(ID, name, FIRST, family, bits, block, bytes, id)                                            \
    {#name, bits, block, bytes, FormatOf<TQ_##ID>::levels, FormatOf<TQ_##ID>::step, FormatOf<TQ_##ID>::centroids, \
     TQ_##FIRST, id},
const tq_type_info types[TQ_TYPE_COUNT] = {TURBOQUANT_TYPES(TURBOQUANT_INFO)};
#undef TURBOQUANT_INFO

#define TURBOQUANT_INFO(ID, name, FIRST, family, bits, block, bytes, id) {#name, block, bytes},
const tq_row_info encoded_rows[TQ_TYPE_COUNT] = {TURBOQUANT_TYPES(TURBOQUANT_INFO)};
#undef TURBOQUANT_INFO

bool valid(tq_type type) { return int(type) >= 0 && type < TQ_TYPE_COUNT; }

size_t query_block_bytes(int block) { return size_t(block) + offsetof(tq_query128, q); }

tq_status check(tq_type type, const void * src, const void * dst, int64_t rows, int64_t n, int threads) {
    if (!valid(type)) return TQ_ERROR_TYPE;
    if (rows < 0 || n < 0 || n % types[type].block) return TQ_ERROR_LENGTH;
    if (threads < 1) return TQ_ERROR_ARGUMENT;
    if (rows > 0 && n > 0 && (!src || !dst)) return TQ_ERROR_NULL;
    return tq_kernels_status();
}

template <typename Function>
tq_status decode_with(Function function, tq_type type, const void * src, size_t src_stride, float * dst,
                      int64_t dst_stride, int64_t rows, int64_t n, int threads) {
    const tq_status status = check(type, src, dst, rows, n, threads);
    if (status != TQ_OK || n == 0) return status;
    const int64_t blocks = n / types[type].block;
    parallel(rows, threads, [=](int64_t first, int64_t last, int) {
        for (int64_t r = first; r < last; ++r)
            function(static_cast<const uint8_t *>(src) + size_t(r) * src_stride, dst + r * dst_stride, blocks);
    });
    return TQ_OK;
}

template <typename Function>
tq_status rotate_with(Function function, int block, const float * src, float * dst, int64_t n, int threads) {
    if (block_index(block) < 0) return TQ_ERROR_TYPE;
    if (n < 0 || n % block) return TQ_ERROR_LENGTH;
    if (threads < 1) return TQ_ERROR_ARGUMENT;
    if (n > 0 && (!src || !dst)) return TQ_ERROR_NULL;
    const tq_status status = tq_kernels_status();
    if (status != TQ_OK) return status;
    parallel(n / block, threads, [=](int64_t first, int64_t last, int) {
        function(src + first * block, dst + first * block, last - first);
    });
    return TQ_OK;
}

} // namespace
} // namespace turboquant

using namespace turboquant;

const char * tq_status_text(tq_status status) {
    switch (status) {
        case TQ_OK:                        return "success";
        case TQ_ERROR_TYPE:                return "no such TurboQuant type or block length";
        case TQ_ERROR_LENGTH:              return "a length is negative or not a multiple of the type's block";
        case TQ_ERROR_NULL:                return "a required pointer is null";
        case TQ_ERROR_KERNELS_UNKNOWN:     return "TURBOQUANT_KERNELS or the selection names kernels that do not exist";
        case TQ_ERROR_KERNELS_UNSUPPORTED: return "TURBOQUANT_KERNELS or the selection names kernels that this CPU or "
                                                  "this build cannot run";
        case TQ_ERROR_MEMORY:              return "memory for scratch space could not be allocated";
        case TQ_ERROR_ARGUMENT:            return "an argument is out of its range";
    }
    return "unknown status";
}

const tq_type_info * tq_type_get(tq_type type) { return valid(type) ? &types[type] : nullptr; }

tq_type tq_type_from_name(const char * name) {
    for (int t = 0; name && t < TQ_TYPE_COUNT; ++t)
        if (std::strcmp(types[t].name, name) == 0) return tq_type(t);
    return TQ_TYPE_COUNT;
}

tq_type tq_type_for_head(tq_type type, int64_t head) {
    if (!valid(type) || head <= 0) return TQ_TYPE_COUNT;
    for (int t = 0; t < TQ_TYPE_COUNT; ++t) // in a family types are in descending order of their blocks
        if (types[t].family == types[type].family && head % types[t].block == 0) return tq_type(t);
    return TQ_TYPE_COUNT;
}

size_t tq_row_bytes(tq_type type, int64_t n) {
    if (!valid(type) || n < 0 || n % types[type].block) return 0;
    return size_t(n / types[type].block) * size_t(types[type].block_bytes);
}

const tq_row_info * tq_row_get(int type) {
    if (type >= 0 && type < TQ_TYPE_COUNT) return &encoded_rows[type];
    switch (type) {
#define TURBOQUANT_ROW(ID, name, number, block, bytes)              \
    case TQ_ROW_##ID: {                                             \
        static constexpr tq_row_info info = {#name, block, bytes}; \
        return &info;                                               \
    }
        TURBOQUANT_ROW_TYPES(TURBOQUANT_ROW)
#undef TURBOQUANT_ROW
    }
    return nullptr;
}

const uint8_t * tq_signs(int which) { return which == 1 ? signs1 : which == 2 ? signs2 : nullptr; }

tq_status tq_encode(tq_type type, const float * src, int64_t src_stride, void * dst, size_t dst_stride, int64_t rows,
                    int64_t n, int threads, tq_encode_report * report) {
    if (report) *report = {0, 0};
    const tq_status status = check(type, src, dst, rows, n, threads);
    if (status != TQ_OK || n == 0) return status;
    const int64_t blocks = n / types[type].block;
    const auto function = kernels().encode[type];
    std::atomic<int64_t> nonfinite{0}, saturated{0};
    parallel(rows, threads, [&](int64_t first, int64_t last, int) {
        tq_encode_report part = {0, 0};
        for (int64_t r = first; r < last; ++r)
            function(src + r * src_stride, static_cast<uint8_t *>(dst) + size_t(r) * dst_stride, blocks, &part);
        nonfinite += part.nonfinite;
        saturated += part.saturated;
    });
    if (report) *report = {nonfinite, saturated};
    return TQ_OK;
}

tq_status tq_decode(tq_type type, const void * src, size_t src_stride, float * dst, int64_t dst_stride, int64_t rows,
                    int64_t n, int threads) {
    return decode_with(valid(type) ? kernels().decode[type] : nullptr, type, src, src_stride, dst, dst_stride, rows, n,
                       threads);
}

tq_status tq_decode_rotated(tq_type type, const void * src, size_t src_stride, float * dst, int64_t dst_stride,
                            int64_t rows, int64_t n, int threads) {
    return decode_with(valid(type) ? kernels().decode_rotated[type] : nullptr, type, src, src_stride, dst, dst_stride,
                       rows, n, threads);
}

tq_status tq_rotate(int block, const float * src, float * dst, int64_t n, int threads) {
    const int i = block_index(block);
    return rotate_with(i < 0 ? nullptr : kernels().rotate[i], block, src, dst, n, threads);
}

tq_status tq_unrotate(int block, const float * src, float * dst, int64_t n, int threads) {
    const int i = block_index(block);
    return rotate_with(i < 0 ? nullptr : kernels().unrotate[i], block, src, dst, n, threads);
}

size_t tq_query_bytes(int block, int64_t n) {
    if (block_index(block) < 0 || n < 0 || n % block) return 0;
    return size_t(n / block) * query_block_bytes(block);
}

tq_status tq_query(int block, const float * src, void * dst, int64_t n) {
    if (block_index(block) < 0) return TQ_ERROR_TYPE;
    if (n < 0 || n % block) return TQ_ERROR_LENGTH;
    if (n > 0 && (!src || !dst)) return TQ_ERROR_NULL;
    const tq_status status = tq_kernels_status();
    if (status == TQ_OK) tq_query_row(block, src, dst, n);
    return status;
}

tq_status tq_dot(tq_type type, const void * src, size_t src_stride, const void * query, float * out, int64_t rows,
                 int64_t n) {
    const tq_status status = check(type, src, out, rows, n, 1);
    if (status != TQ_OK) return status;
    if (rows > 0 && n > 0 && !query) return TQ_ERROR_NULL;
    const auto function = kernels().dot[type];
    for (int64_t r = 0; r < rows; ++r)
        out[r] = function(static_cast<const uint8_t *>(src) + size_t(r) * src_stride, query, n / types[type].block);
    return TQ_OK;
}

void tq_encode_row(tq_type type, const float * src, void * dst, int64_t n) {
    tq_encode_report ignored = {0, 0};
    kernels().encode[type](src, static_cast<uint8_t *>(dst), n / types[type].block, &ignored);
}

void tq_decode_row(tq_type type, const void * src, float * dst, int64_t n) {
    kernels().decode[type](static_cast<const uint8_t *>(src), dst, n / types[type].block);
}

void tq_query_row(int block, const float * src, void * dst, int64_t n) {
    kernels().query[block_index(block)](src, dst, n / block);
}

float tq_dot_row(tq_type type, const void * src, const void * query, int64_t n) {
    return kernels().dot[type](static_cast<const uint8_t *>(src), query, n / types[type].block);
}
