// Attention over an encoded KV cache: the tile engine.
//
// All query rows that read one KV head (the heads of its GQA group, times a run of tokens) share each decoded tile of
// 64 KV rows. K is expanded to int8 levels and multiplied with queries that were rotated and rounded to int8 once; V is
// decoded to floats in the rotated domain, accumulated there, and un-rotated once per output row. The softmax is the
// usual online one (Milakov and Gimelshein 2018; Dao et al. 2022): a running maximum and sum per query row, so that any
// range of KV rows gives a partial result, and partial results merge.
#include "format.h"
#include "kernels.h"
#include "parallel.h"

#include <atomic>
#include <memory>
#include <new>

namespace turboquant {
namespace {

// What the engine must know of a row type; turbo types and the plain types that may stand on the other side.
struct RowType {
    int block;    // values that share a scale; 0 = not covered
    bool turbo;   // rotated
    bool integer; // int8 levels and a scale, else floats
};

RowType row_type(int type) {
    if (type >= 0 && type < TQ_TYPE_COUNT) return {tq_type_get(tq_type(type))->block, true, true};
    switch (type) {
        case TQ_ROW_F16:
        case TQ_ROW_BF16: return {32, false, false};
        case TQ_ROW_Q8_0:
        case TQ_ROW_Q4_0: return {32, false, true};
    }
    return {0, false, false};
}

size_t row_bytes(int type, int64_t n) {
    switch (type) {
        case TQ_ROW_F16:
        case TQ_ROW_BF16: return size_t(n) * 2;
        case TQ_ROW_Q8_0: return size_t(n / 32) * 34;
        case TQ_ROW_Q4_0: return size_t(n / 32) * 18;
    }
    return tq_row_bytes(tq_type(type), n);
}

constexpr int64_t query_tile = 64; // query rows that share a decoded tile; their sums stay in the L2 cache

int block_index(int block) { return block == 128 ? 0 : block == 64 ? 1 : 2; }

// ggml's q8_0 and q4_0 blocks: fp16 scale, then 32 int8, or 16 bytes with elements j and j + 16.
void plain_levels(int type, const uint8_t * src, int64_t blocks, int8_t * level, float * scale) {
    for (int64_t b = 0; b < blocks; ++b, level += 32) {
        scale[b * tile_rows] = load_scale(src);
        src += 2;
        if (type == TQ_ROW_Q8_0) {
            std::memcpy(level, src, 32);
            src += 32;
        } else {
            for (int j = 0; j < 16; ++j) {
                level[j] = int8_t((src[j] & 15) - 8);
                level[j + 16] = int8_t((src[j] >> 4) - 8);
            }
            src += 16;
        }
    }
}

void plain_values(int type, const uint8_t * src, int64_t n, float * dst) {
    const Kernels & kernel = kernels();
    if (type == TQ_ROW_F16) return kernel.load_f16(src, dst, n);
    if (type == TQ_ROW_BF16) return kernel.load_bf16(src, dst, n);
    for (int64_t i = 0; i < n; i += 32, src += type == TQ_ROW_Q8_0 ? 34 : 18) {
        int8_t level[32];
        float scale;
        plain_levels(type, src, 1, level, &scale);
        for (int j = 0; j < 32; ++j) dst[i + j] = scale * float(level[j]);
    }
}

// Scratch memory of one call, carved from one allocation; every array starts on a cache line.
struct Scratch {
    uint8_t * query;      // [rows] prepared query rows (floats if K is not integer)
    int8_t * level;       // [tile_rows][head_k]
    float * level_scale;  // [blocks of K][tile_rows]
    float * key;          // [tile_rows][head_k], if K is not integer
    float * weight;       // [rows][tile_rows] scores, then weights
    float * bias;         // [tile_rows] of the masks of one query row
    float * value;        // [tile_rows][head_v]
    SoftmaxState * state; // [rows]
    size_t bytes;
};

Scratch layout(const tq_attention_kv & kv, const RowType & k, int64_t rows, void * base) {
    size_t at = 0;
    auto take = [&](size_t bytes) {
        uint8_t * p = static_cast<uint8_t *>(base) + at;
        at += (bytes + 63) & ~size_t(63);
        return p;
    };
    const int64_t blocks = kv.head_k / k.block;
    const size_t query_row = k.integer ? tq_query_bytes(k.block, kv.head_k) : size_t(kv.head_k) * sizeof(float);
    Scratch s;
    s.query = take(size_t(rows) * query_row + 64); // a vector load may start at the last block's values
    s.level = reinterpret_cast<int8_t *>(take(k.integer ? size_t(tile_rows * kv.head_k) : 0));
    s.level_scale = reinterpret_cast<float *>(take(k.integer ? size_t(blocks * tile_rows) * sizeof(float) : 0));
    s.key = reinterpret_cast<float *>(take(k.integer ? 0 : size_t(tile_rows * kv.head_k) * sizeof(float)));
    s.weight = reinterpret_cast<float *>(take(size_t(rows * tile_rows) * sizeof(float)));
    s.bias = reinterpret_cast<float *>(take(tile_rows * sizeof(float)));
    s.value = reinterpret_cast<float *>(take(size_t(tile_rows * kv.head_v) * sizeof(float)));
    s.state = reinterpret_cast<SoftmaxState *>(take(size_t(rows) * sizeof(SoftmaxState)));
    s.bytes = at;
    return s;
}

void prepare_queries(const tq_attention_kv & kv, const RowType & k, const tq_attention_queries & queries, Scratch & s) {
    const size_t row = k.integer ? tq_query_bytes(k.block, kv.head_k) : size_t(kv.head_k) * sizeof(float);
    for (int64_t m = 0; m < queries.rows; ++m) {
        uint8_t * out = s.query + size_t(m) * row;
        if (k.turbo)
            tq_query_row(k.block, queries.q[m], out, kv.head_k);
        else if (k.integer)
            kernels().query_plain(queries.q[m], out, kv.head_k / 32);
        else
            std::memcpy(out, queries.q[m], row);
    }
}

void load_keys(const tq_attention_kv & kv, const RowType & k, int64_t first, int rows, Scratch & s) {
    const int64_t blocks = kv.head_k / k.block;
    const uint8_t * src = static_cast<const uint8_t *>(kv.k) + size_t(first) * kv.stride_k;
    for (int r = 0; r < rows; ++r, src += kv.stride_k) {
        if (k.turbo)
            kernels().levels[kv.type_k](src, blocks, s.level + r * kv.head_k, s.level_scale + r);
        else if (k.integer)
            plain_levels(kv.type_k, src, blocks, s.level + r * kv.head_k, s.level_scale + r);
        else
            plain_values(kv.type_k, src, kv.head_k, s.key + r * kv.head_k);
    }
    const size_t rest = size_t(tile_rows - rows);
    if (rest == 0) return;
    if (k.integer) {
        std::memset(s.level + rows * kv.head_k, 0, rest * size_t(kv.head_k));
        for (int64_t b = 0; b < blocks; ++b)
            std::memset(s.level_scale + b * tile_rows + rows, 0, rest * sizeof(float));
    } else {
        std::memset(s.key + rows * kv.head_k, 0, rest * size_t(kv.head_k) * sizeof(float));
    }
}

// A query row's mask; fp16 or float32.
struct Mask {
    const void * row;
    bool f32;
    bool open(int64_t i) const {
        return f32 ? static_cast<const float *>(row)[i] != -INFINITY : static_cast<const uint16_t *>(row)[i] != 0xFC00;
    }
};

Mask mask_of(const tq_attention_queries & queries, int64_t m) {
    return {queries.mask ? queries.mask[m] : nullptr, queries.mask_f32 != 0};
}

// Masks first: a tile that no query may see is not even decoded.
bool visible(const tq_attention_queries & queries, int64_t first, int rows) {
    const void * known = nullptr;
    for (int64_t m = 0; m < queries.rows; ++m) {
        const Mask mask = mask_of(queries, m);
        if (!mask.row) return true;
        if (mask.row == known) continue; // the heads of a group share their token's mask
        known = mask.row;
        for (int r = 0; r < rows; ++r)
            if (mask.open(first + r)) return true;
    }
    return false;
}

// What is added to the scores of one query row: slope * mask, and -inf beyond the tile's rows.
void load_bias(const Mask & mask, float slope, int64_t first, int rows, float * bias) {
    for (int r = 0; r < tile_rows; ++r) bias[r] = r < rows ? 0.0f : -INFINITY;
    if (!mask.row) return;
    float values[tile_rows];
    if (mask.f32) {
        std::memcpy(values, static_cast<const float *>(mask.row) + first, size_t(rows) * sizeof(float));
    } else if (rows == tile_rows) {
        kernels().load_f16(static_cast<const uint8_t *>(mask.row) + 2 * first, values, tile_rows);
    } else {
        for (int r = 0; r < rows; ++r) values[r] = half_to_float(static_cast<const uint16_t *>(mask.row)[first + r]);
    }
    for (int r = 0; r < rows; ++r) bias[r] = slope * values[r];
}

// Decode V for the rows whose weight matters and close the gaps in the weights; returns how many there are.
int load_values(const tq_attention_kv & kv, bool turbo, int64_t first, int rows, int64_t queries, Scratch & s) {
    const uint8_t * src = static_cast<const uint8_t *>(kv.v) + size_t(first) * kv.stride_v;
    float needed[tile_rows];
    for (int r = 0; r < tile_rows; ++r) needed[r] = s.weight[r];
    for (int64_t m = 1; m < queries; ++m)
        for (int r = 0; r < tile_rows; ++r) {
            const float w = s.weight[m * tile_rows + r];
            needed[r] = w > needed[r] ? w : needed[r];
        }
    int live[tile_rows], count = 0;
    for (int r = 0; r < rows; ++r)
        if (!(needed[r] <= kv.sparse_v)) live[count++] = r; // NaN counts as needed
    const tq_type_info * info = turbo ? tq_type_get(tq_type(kv.type_v)) : nullptr;
    for (int i = 0; i < count; ++i) {
        const uint8_t * row = src + size_t(live[i]) * kv.stride_v;
        float * out = s.value + i * kv.head_v;
        if (turbo)
            kernels().decode_rotated[kv.type_v](row, out, kv.head_v / info->block);
        else
            plain_values(kv.type_v, row, kv.head_v, out);
    }
    if (count < rows)
        for (int64_t m = 0; m < queries; ++m)
            for (int i = 0; i < count; ++i) s.weight[m * tile_rows + i] = s.weight[m * tile_rows + live[i]];
    return count;
}

} // namespace
} // namespace turboquant

using namespace turboquant;

int tq_attention_supports(int type_k, int type_v, int64_t head_k, int64_t head_v) {
    const RowType k = row_type(type_k), v = row_type(type_v);
    return k.block && v.block && head_k > 0 && head_v > 0 && head_k % k.block == 0 && head_v % v.block == 0;
}

size_t tq_attention_scratch(const tq_attention_kv * kv, int64_t rows) {
    return layout(*kv, row_type(kv->type_k), rows, nullptr).bytes + 64;
}

int64_t tq_attention_partial(const tq_attention_kv * args, const tq_attention_queries * args_queries, int64_t first,
                             int64_t last, float * partial, void * scratch) {
    const tq_attention_kv & kv = *args;
    const tq_attention_queries & queries = *args_queries;
    const Kernels & kernel = kernels();
    const RowType k = row_type(kv.type_k), v = row_type(kv.type_v);
    Scratch s = layout(kv, k, queries.rows,
                       reinterpret_cast<void *>((reinterpret_cast<uintptr_t>(scratch) + 63) & ~uintptr_t(63)));
    const int64_t stride = kv.head_v + 2;
    for (int64_t m = 0; m < queries.rows; ++m) {
        s.state[m] = {-INFINITY, 0.0f, 1.0f};
        std::memset(partial + m * stride, 0, size_t(kv.head_v) * sizeof(float));
    }
    prepare_queries(kv, k, queries, s);

    const int m_rows = int(queries.rows);
    int64_t skipped = 0;
    for (int64_t tile = first; tile < last; tile += tile_rows) {
        const int rows = int(last - tile < tile_rows ? last - tile : tile_rows);
        if (!visible(queries, tile, rows)) continue;
        load_keys(kv, k, tile, rows, s);
        if (k.integer)
            kernel.scores[block_index(k.block)](s.level, s.level_scale, kv.head_k / k.block, s.query, m_rows, s.weight);
        else
            kernel.scores_float(s.key, kv.head_k, reinterpret_cast<const float *>(s.query), m_rows, s.weight);
        for (int m = 0; m < m_rows; ++m) {
            const Mask mask = mask_of(queries, m);
            const float slope = queries.slope ? queries.slope[m] : 1.0f;
            const bool same = m > 0 && mask.row == mask_of(queries, m - 1).row &&
                              (!queries.slope || slope == queries.slope[m - 1]);
            if (!same) load_bias(mask, slope, tile, rows, s.bias);
            kernel.softmax(s.weight + m * tile_rows, s.bias, kv.scale, kv.soft_cap, &s.state[m]);
        }
        const int count = load_values(kv, v.turbo, tile, rows, queries.rows, s);
        skipped += rows - count;
        kernel.accumulate(s.value, count, kv.head_v, s.weight, s.state, m_rows, partial, stride);
    }
    for (int64_t m = 0; m < queries.rows; ++m) {
        partial[m * stride + kv.head_v] = s.state[m].largest;
        partial[m * stride + kv.head_v + 1] = s.state[m].sum;
    }
    return skipped;
}

void tq_attention_merge(float * into, const float * from, int64_t head_v) {
    const float a = into[head_v], b = from[head_v];
    const float largest = a > b ? a : b;
    if (b == -INFINITY && from[head_v + 1] == 0) return;
    const float scale_a = a == -INFINITY ? 0.0f : std::exp(a - largest);
    const float scale_b = b == -INFINITY ? 0.0f : std::exp(b - largest);
    for (int64_t c = 0; c < head_v; ++c) into[c] = into[c] * scale_a + from[c] * scale_b;
    into[head_v] = largest;
    into[head_v + 1] = into[head_v + 1] * scale_a + from[head_v + 1] * scale_b;
}

void tq_attention_finish(int type_v, float * partial, int64_t head_v, const float * sink, float * out) {
    float largest = partial[head_v], sum = partial[head_v + 1], scale = 1.0f;
    if (sink) {
        const float top = *sink > largest ? *sink : largest;
        scale = largest == -INFINITY ? 0.0f : std::exp(largest - top);
        sum = sum * scale + std::exp(*sink - top);
    }
    const float inverse = sum == 0 ? 0.0f : scale / sum; // a NaN is not hidden
    for (int64_t c = 0; c < head_v; ++c) partial[c] *= inverse;
    const RowType v = row_type(type_v);
    if (v.turbo)
        kernels().unrotate[block_index(v.block)](partial, out, head_v / v.block);
    else
        std::memcpy(out, partial, size_t(head_v) * sizeof(float));
}

tq_status tq_attention(const tq_attention_args * args) {
    if (!args) return TQ_ERROR_NULL;
    const tq_attention_args & a = *args;
    const RowType k = row_type(a.type_k), v = row_type(a.type_v);
    if (!k.block || !v.block) return TQ_ERROR_TYPE;
    if (a.n_head < 1 || a.n_kv_head < 1 || a.n_head % a.n_kv_head || a.n_query < 0 || a.n_kv < 0 ||
        !tq_attention_supports(a.type_k, a.type_v, a.head_k, a.head_v))
        return TQ_ERROR_LENGTH;
    if (a.threads < 1) return TQ_ERROR_ARGUMENT;
    if (a.n_query > 0 && (!a.q || !a.out || (a.n_kv > 0 && (!a.k || !a.v)))) return TQ_ERROR_NULL;
    const tq_status status = tq_kernels_status();
    if (status != TQ_OK) return status;

    const int64_t group = a.n_head / a.n_kv_head;
    const int64_t tokens = group < query_tile ? query_tile / group : 1; // of one item of work
    const int64_t items_per_head = (a.n_query + tokens - 1) / tokens;
    std::atomic<bool> failed{false};
    std::atomic<int64_t> seen{0}, left_out{0};
    parallel(a.n_kv_head * items_per_head, a.threads, [&](int64_t first, int64_t last, int) {
        tq_attention_kv kv = {a.type_k, a.type_v, a.head_k, a.head_v, nullptr, nullptr, row_bytes(a.type_k, a.head_k),
                              row_bytes(a.type_v, a.head_v), a.scale, a.soft_cap, a.sparse_v};
        const int64_t most = group * tokens, stride = a.head_v + 2;
        const std::unique_ptr<uint8_t[]> scratch(new (std::nothrow) uint8_t[tq_attention_scratch(&kv, most)]);
        const std::unique_ptr<float[]> partial(new (std::nothrow) float[size_t(most * stride)]);
        const std::unique_ptr<const float *[]> q(new (std::nothrow) const float *[size_t(most)]);
        const std::unique_ptr<const void *[]> mask(new (std::nothrow) const void *[size_t(most)]);
        if (!scratch || !partial || !q || !mask) {
            failed = true;
            return;
        }
        for (int64_t item = first; item < last; ++item) {
            const int64_t head = item / items_per_head, token = item % items_per_head * tokens;
            const int64_t count = a.n_query - token < tokens ? a.n_query - token : tokens;
            kv.k = static_cast<const uint8_t *>(a.k) + size_t(head * a.n_kv) * kv.stride_k;
            kv.v = static_cast<const uint8_t *>(a.v) + size_t(head * a.n_kv) * kv.stride_v;
            int64_t rows = 0;
            for (int64_t t = token; t < token + count; ++t)
                for (int64_t h = head * group; h < (head + 1) * group; ++h, ++rows) {
                    q[size_t(rows)] = a.q + (h * a.n_query + t) * a.head_k;
                    mask[size_t(rows)] = a.mask ? a.mask + t * a.n_kv : nullptr;
                }
            const tq_attention_queries queries = {rows, q.get(), mask.get(), 1, nullptr};
            left_out += tq_attention_partial(&kv, &queries, 0, a.n_kv, partial.get(), scratch.get());
            seen += a.n_kv;
            for (int64_t m = 0; m < rows; ++m) {
                const int64_t h = head * group + m % group, t = token + m / group;
                tq_attention_finish(a.type_v, partial.get() + m * stride, a.head_v, nullptr,
                                    a.out + (h * a.n_query + t) * a.head_v);
            }
        }
    });
    if (a.report) {
        a.report->rows += seen;
        a.report->left_out += left_out;
    }
    return failed ? TQ_ERROR_MEMORY : TQ_OK;
}
