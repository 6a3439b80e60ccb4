// Attention over an encoded KV cache: the tile engine.
//
// All query rows that read one KV head (the heads of its GQA group, times a run of tokens) share each decoded tile of
// 64 KV rows. K is expanded to int8 levels and multiplied with queries that were rotated and rounded to int8 once (f16
// and bf16 are multiplied as floats). V is expanded to int8 levels if the kernels multiply these faster, and to floats
// otherwise. V is accumulated in the rotated domain, and the sum is rotated back once per output row. The softmax is
// computed online (Milakov and Gimelshein 2018; Dao et al. 2022), with a running maximum and sum per query row: every
// range of KV rows gives a partial result, and partial results can be merged.
#include "format.h"
#include "kernels.h"
#include "parallel.h"

#include <algorithm>
#include <atomic>
#include <memory>
#include <new>

namespace turboquant {
namespace {

// The properties of a row type: a turbo type, or one of ggml's types.
struct RowType {
    int block;    // values that share a scale; 0 = not supported
    bool turbo;   // whether rows are rotated
    bool integer; // whether rows are int8 levels with scales, else floats
};

RowType row_type(int type) {
    const tq_row_info * info = tq_row_get(type);
    if (!info) return {0, false, false};
    const bool turbo = type < TQ_TYPE_COUNT, floats = type == TQ_ROW_F16 || type == TQ_ROW_BF16;
    return {info->block, turbo, !floats};
}

size_t row_bytes(int type, int64_t n) {
    const tq_row_info & info = *tq_row_get(type);
    return size_t(n / info.block) * size_t(info.block_bytes);
}

constexpr int64_t query_tile = 128; // query rows that share a decoded tile; their sums stay in the L2 cache

// Rounds rows of floats to int8 levels and scales, as queries are rounded.
void levels_f32(const Kernels & kernel, const CacheRows & rows, int64_t blocks, int8_t * level, float * scale) {
    constexpr int64_t at_once = 8;
    for (int r = 0; r < rows.count; ++r) {
        for (int64_t first = 0; first < blocks; first += at_once) {
            tq_query32 block[at_once];
            const int64_t count = std::min(blocks - first, at_once);
            kernel.query_plain(reinterpret_cast<const float *>(rows[r]) + first * 32, block, count);
            for (int64_t b = 0; b < count; ++b, level += 32) {
                scale[(first + b) * tile_rows + r] = block[b].scale;
                std::memcpy(level, block[b].q, 32);
            }
        }
    }
}

// Loads the int8 levels of rows of `blocks` blocks, and their scales.
void load_levels(const Kernels & kernel, int type, const CacheRows & rows, int64_t blocks, int8_t * level,
                 float * scale) {
    if (type < TQ_TYPE_COUNT)
        kernel.levels[type](rows, blocks, level, scale);
    else if (type == TQ_ROW_Q8_0)
        kernel.levels_q8_0(rows, blocks, level, scale);
    else if (type == TQ_ROW_Q4_0)
        kernel.levels_q4_0(rows, blocks, level, scale);
    else
        levels_f32(kernel, rows, blocks, level, scale);
}

// Loads rows of n values as floats, in the rotated domain if the type is turbo.
void load_values(const Kernels & kernel, int type, const CacheRows & rows, int64_t n, float * dst) {
    for (int r = 0; r < rows.count; ++r, dst += n) {
        const uint8_t * src = rows[r];
        if (type < TQ_TYPE_COUNT) {
            kernel.decode_rotated[type](src, dst, n / tq_type_get(tq_type(type))->block);
        } else if (type == TQ_ROW_F16) {
            kernel.load_f16(src, dst, n);
        } else if (type == TQ_ROW_BF16) {
            kernel.load_bf16(src, dst, n);
        } else {
            for (int64_t i = 0; i < n; i += 32, src += row_bytes(type, 32)) {
                int8_t level[32];
                float scale;
                load_levels(kernel, type, {src, 0, 1, nullptr}, 1, level, &scale);
                for (int j = 0; j < 32; ++j) dst[i + j] = scale * float(level[j]);
            }
        }
    }
}

// The scratch memory of a call: arrays in one allocation, each of which starts on a cache line.
struct Scratch {
    uint8_t * query;      // [rows] prepared query rows (floats if K is not integer)
    int8_t * level;       // [tile_rows][head] levels of K or V in the order of the cache
    int8_t * tile;        // the same levels in the order that the kernels read
    float * key_scale;    // [blocks of K][tile_rows]
    float * value_scale;  // [blocks of V][tile_rows]
    float * key;          // [tile_rows][head_k], if K is not integer
    float * value;        // [tile_rows][head_v]
    float * weight;       // [rows][tile_rows] scores, then weights
    float * bias;         // [tile_rows] masks of one query row
    float * most;         // [tile_rows] greatest weight of all query rows
    SoftmaxState * state; // [rows]
    size_t bytes;
};

// The layout is the same for all kernels, because a host may query the size before other kernels are selected.
Scratch layout(const tq_attention_kv & kv, int64_t rows, uintptr_t base) {
    const RowType k = row_type(kv.type_k), v = row_type(kv.type_v);
    size_t at = 0;
    auto take = [&](size_t bytes) {
        uint8_t * p = reinterpret_cast<uint8_t *>(base + at);
        at += (bytes + 63) & ~size_t(63);
        return p;
    };
    const int64_t level_head = std::max(k.integer ? kv.head_k : 0, v.integer ? kv.head_v : 0);
    const int64_t level_bytes = level_head ? tile_rows * ((level_head + 63) / 64 * 64) + 64 : 0; // see Kernels::keys
    const size_t query_row = k.integer ? tq_query_bytes(k.block, kv.head_k) : size_t(kv.head_k) * sizeof(float);
    const auto floats = [&](int64_t n) { return reinterpret_cast<float *>(take(size_t(n) * sizeof(float))); };
    Scratch s;
    s.query = take(size_t(rows) * query_row + 64); // a vector load may start at the last block's values
    s.level = reinterpret_cast<int8_t *>(take(size_t(level_bytes)));
    s.tile = reinterpret_cast<int8_t *>(take(size_t(level_bytes)));
    s.key_scale = floats(k.integer ? kv.head_k / k.block * tile_rows : 0);
    s.value_scale = floats(v.integer ? kv.head_v / v.block * tile_rows : 0);
    s.key = floats(k.integer ? 0 : tile_rows * kv.head_k);
    s.value = floats(tile_rows * kv.head_v);
    s.weight = floats(rows * tile_rows);
    s.bias = floats(tile_rows);
    s.most = floats(tile_rows);
    s.state = reinterpret_cast<SoftmaxState *>(take(size_t(rows) * sizeof(SoftmaxState)));
    s.bytes = at;
    return s;
}

void prepare_queries(const Kernels & kernel, const tq_attention_kv & kv, const RowType & k,
                     const tq_attention_queries & queries, Scratch & s) {
    const size_t row = k.integer ? tq_query_bytes(k.block, kv.head_k) : size_t(kv.head_k) * sizeof(float);
    for (int64_t m = 0; m < queries.rows; ++m) {
        uint8_t * out = s.query + size_t(m) * row;
        if (k.turbo)
            kernel.query[block_index(k.block)](queries.q[m], out, kv.head_k / k.block);
        else if (k.integer)
            kernel.query_plain(queries.q[m], out, kv.head_k / 32);
        else
            std::memcpy(out, queries.q[m], row);
    }
}

void score(const Kernels & kernel, const tq_attention_kv & kv, const RowType & k, const CacheRows & rows, int queries,
           Scratch & s) {
    const int rest = tile_rows - rows.count;
    if (!k.integer) {
        load_values(kernel, kv.type_k, rows, kv.head_k, s.key);
        std::memset(s.key + rows.count * kv.head_k, 0, size_t(rest * kv.head_k) * sizeof(float));
        return kernel.scores_float(s.key, kv.head_k, reinterpret_cast<const float *>(s.query), queries, s.weight);
    }
    const int64_t blocks = kv.head_k / k.block;
    load_levels(kernel, kv.type_k, rows, blocks, s.level, s.key_scale);
    if (rest) {
        std::memset(s.level + rows.count * kv.head_k, 0, size_t(rest * kv.head_k));
        for (int64_t b = 0; b < blocks; ++b)
            std::memset(s.key_scale + b * tile_rows + rows.count, 0, size_t(rest) * sizeof(float));
    }
    const bool lowest = kv.type_k == TQ_ROW_Q8_0 && kernel.lowest && kernel.lowest(s.level, tile_rows * kv.head_k);
    const Kernels & scoring = lowest ? kernels_scalar : kernel; // ggml never writes -128, so this need not be fast
    if (scoring.keys) scoring.keys(s.level, kv.head_k, s.tile);
    const int8_t * tile = scoring.keys ? s.tile : s.level;
    scoring.scores[block_index(k.block)](tile, s.key_scale, blocks, s.query, queries, s.weight);
}

CacheRows rows_at(const void * cache, size_t stride, int64_t first, int count) {
    return {static_cast<const uint8_t *>(cache) + size_t(first) * stride, stride, count, nullptr};
}

// Prefetches memory that the caller reads next, a part at a time. The CPU's own prefetcher neither follows the rows of
// a head, which are not contiguous, nor crosses the end of a page.
class Ahead {
public:
    Ahead(const tq_attention_kv & kv, int64_t steps) { // steps: number of calls of fetch; 0 if there is no row
        for (int i = 0; i < 2; ++i) {
            at[i] = static_cast<const char *>(kv.ahead[i]);
            left[i] = kv.ahead_bytes[i];
            step[i] = (left[i] / size_t(steps > 0 ? steps : 1) / 64 + 1) * 64;
        }
    }
    void fetch() {
#ifdef __GNUC__
        for (int i = 0; i < 2; ++i) {
            const size_t bytes = std::min(left[i], step[i]);
            for (size_t b = 0; b < bytes; b += 64) __builtin_prefetch(at[i] + b, 0, 2);
            at[i] += bytes;
            left[i] -= bytes;
        }
#endif
    }

private:
    const char * at[2];
    size_t left[2], step[2];
};

// The mask of a query row, fp16 or float32.
struct Mask {
    const void * row;
    bool f32;
    const void * from(int64_t i) const {
        return row ? static_cast<const uint8_t *>(row) + size_t(i) * (f32 ? sizeof(float) : sizeof(uint16_t)) : nullptr;
    }
    bool open(int64_t i) const {
        return f32 ? static_cast<const float *>(row)[i] != -INFINITY : static_cast<const uint16_t *>(row)[i] != 0xFC00;
    }
};

Mask mask_of(const tq_attention_queries & queries, int64_t m) {
    return {queries.mask ? queries.mask[m] : nullptr, queries.mask_f32 != 0};
}

// The number of rows of a tile up to the last one to which a query may attend. Later rows are not decoded.
int visible_rows(const tq_attention_queries & queries, int64_t first, int rows) {
    const void * known = nullptr;
    int count = 0;
    for (int64_t m = 0; m < queries.rows && count < rows; ++m) {
        const Mask mask = mask_of(queries, m);
        if (!mask.row) return rows;
        if (mask.row == known) continue; // the heads of a group share their token's mask
        known = mask.row;
        int r = rows;
        while (r > count && !mask.open(first + r - 1)) --r;
        count = r;
    }
    return count;
}

// Selects the rows of V that have a weight above sparse_v for a query; removes the weights of the other rows.
CacheRows needed_rows(const CacheRows & rows, float sparse_v, int queries, Scratch & s, uint8_t * index) {
    int out = 0;
    for (int r = 0; r < tile_rows; ++r) out += s.most[r] <= sparse_v; // a row with a NaN is kept
    if (out == 0 && rows.count == tile_rows) return rows;
    int count = 0;
    for (int r = 0; r < rows.count; ++r)
        if (!(s.most[r] <= sparse_v)) index[count++] = uint8_t(r);
    if (count == rows.count) return rows;
    for (int m = 0; m < queries; ++m)
        for (int i = 0; i < count; ++i) s.weight[m * tile_rows + i] = s.weight[m * tile_rows + index[i]];
    return {rows.first, rows.stride, count, index};
}

// Selects the rows of V that have a weight other than 0 for one query; removes its other weights.
CacheRows weighted_rows(const CacheRows & rows, float * weight, uint8_t * index) {
    int count = 0;
    for (int r = 0; r < rows.count; ++r) {
        if (weight[r] == 0) continue;
        index[count] = rows.index ? rows.index[r] : uint8_t(r);
        weight[count++] = weight[r];
    }
    return {rows.first, rows.stride, count, index};
}

// Makes V's scales non-negative, as accumulate_levels requires, by negating levels. False if a level is -128, which has
// no negative in int8.
bool turn_negative_scales(const RowType & v, int64_t head, int rows, Scratch & s) {
    for (int64_t b = 0; b < head / v.block; ++b) {
        float * scale = s.value_scale + b * tile_rows;
        uint32_t sign = 0;
        for (int r = 0; r < rows; ++r) sign |= float_bits(scale[r]);
        if (sign >> 31 == 0) continue;
        for (int r = 0; r < rows; ++r) {
            if (!std::signbit(scale[r])) continue;
            scale[r] = -scale[r];
            int8_t * level = s.level + r * head + b * v.block;
            for (int c = 0; c < v.block; ++c) {
                if (level[c] == -128) return false;
                level[c] = int8_t(-level[c]);
            }
        }
    }
    return true;
}

// Adds the rows of V to the sums of `queries` query rows from m on.
void add_values(const Kernels & kernel, const tq_attention_kv & kv, const RowType & v, const CacheRows & rows,
                int64_t m, int queries, Scratch & s, float * partial) {
    const int64_t stride = kv.head_v + 2;
    const float * weight = s.weight + m * tile_rows;
    const SoftmaxState * state = s.state + m;
    float * sum = partial + m * stride;
    if (v.integer && kernel.accumulate_levels) {
        load_levels(kernel, kv.type_v, rows, kv.head_v / v.block, s.level, s.value_scale);
        if (turn_negative_scales(v, kv.head_v, rows.count, s)) {
            kernel.values(s.level, rows.count, kv.head_v, s.tile);
            return kernel.accumulate_levels(s.tile, s.value_scale, v.block, rows.count, kv.head_v, weight, state,
                                            queries, sum, stride);
        }
    }
    load_values(kernel, kv.type_v, rows, kv.head_v, s.value);
    kernel.accumulate(s.value, rows.count, kv.head_v, weight, state, queries, sum, stride);
}

bool finite(const float * x, int64_t n) {
    // The addition carries into the sign bit if all bits of an exponent are ones. Compilers vectorise the OR.
    uint32_t carry = 0;
    for (int64_t i = 0; i < n; ++i) carry |= (float_bits(x[i]) & 0x7fffffff) + 0x00800000;
    return carry >> 31 == 0;
}

// One pass over KV rows first ... last-1. With `apart`, queries are treated one by one in tiles where a row of V is not
// finite: 0 * Inf is NaN, so a query must not multiply a row that has no weight.
int64_t attend(const Kernels & kernel, const tq_attention_kv & kv, const tq_attention_queries & queries, int64_t first,
               int64_t last, bool apart, float * partial, Scratch & s) {
    const RowType k = row_type(kv.type_k), v = row_type(kv.type_v);
    for (int64_t m = 0; m < queries.rows; ++m) {
        s.state[m] = {-INFINITY, 0.0f, 1.0f};
        std::memset(partial + m * (kv.head_v + 2), 0, size_t(kv.head_v) * sizeof(float));
    }
    const int m_rows = int(queries.rows);
    Ahead ahead(kv, 3 * ((last - first + tile_rows - 1) / tile_rows));
    int64_t skipped = 0;
    for (int64_t tile = first; tile < last; tile += tile_rows) {
        const int in_range = int(last - tile < tile_rows ? last - tile : tile_rows);
        const int rows = visible_rows(queries, tile, in_range);
        if (rows == 0) continue;
        ahead.fetch();
        score(kernel, kv, k, rows_at(kv.k, kv.stride_k, tile, rows), m_rows, s);
        ahead.fetch();
        std::memset(s.most, 0, tile_rows * sizeof(float));
        for (int m = 0; m < m_rows; ++m) {
            const Mask mask = mask_of(queries, m);
            const float slope = queries.slope ? queries.slope[m] : 1.0f;
            const bool same = m > 0 && mask.row == mask_of(queries, m - 1).row &&
                              (!queries.slope || slope == queries.slope[m - 1]);
            if (!same) kernel.bias(mask.from(tile), mask.f32, slope, rows, s.bias);
            kernel.softmax(s.weight + m * tile_rows, s.bias, kv.scale, kv.soft_cap, &s.state[m], s.most);
        }
        uint8_t index[tile_rows];
        const CacheRows needed = needed_rows(rows_at(kv.v, kv.stride_v, tile, rows), kv.sparse_v, m_rows, s, index);
        ahead.fetch();
        skipped += in_range - needed.count;
        if (apart) load_values(kernel, kv.type_v, needed, kv.head_v, s.value);
        if (!apart || finite(s.value, needed.count * kv.head_v)) {
            add_values(kernel, kv, v, needed, 0, m_rows, s, partial);
            continue;
        }
        for (int m = 0; m < m_rows; ++m) {
            uint8_t own[tile_rows];
            add_values(kernel, kv, v, weighted_rows(needed, s.weight + m * tile_rows, own), m, 1, s, partial);
        }
    }
    return skipped;
}

int64_t partial_of(const Kernels & kernel, const tq_attention_kv & kv, const tq_attention_queries & queries,
                   int64_t first, int64_t last, float * partial, void * scratch) {
    Scratch s = layout(kv, queries.rows, (reinterpret_cast<uintptr_t>(scratch) + 63) & ~uintptr_t(63));
    prepare_queries(kernel, kv, row_type(kv.type_k), queries, s);
    int64_t skipped = attend(kernel, kv, queries, first, last, false, partial, s);
    const int64_t stride = kv.head_v + 2;
    bool apart = false; // a sum is not finite, perhaps because of a row of V that only another query needs
    for (int64_t m = 0; m < queries.rows && queries.rows > 1 && !apart; ++m)
        apart = std::isfinite(s.state[m].sum) && !finite(partial + m * stride, kv.head_v);
    if (apart) skipped = attend(kernel, kv, queries, first, last, true, partial, s);
    for (int64_t m = 0; m < queries.rows; ++m) {
        partial[m * stride + kv.head_v] = s.state[m].largest;
        partial[m * stride + kv.head_v + 1] = s.state[m].sum;
    }
    return skipped;
}

void unrotate(const Kernels & kernel, int type_v, float * partial, int64_t head_v) {
    const RowType v = row_type(type_v);
    if (v.turbo) kernel.unrotate[block_index(v.block)](partial, partial, head_v / v.block);
}

void finish(const Kernels & kernel, int type_v, float * partial, int64_t head_v, const float * sink, float * out) {
    float largest = partial[head_v], sum = partial[head_v + 1], scale = 1.0f;
    if (sink && *sink != -INFINITY) {
        const float top = *sink > largest ? *sink : largest;
        scale = largest == -INFINITY ? 0.0f : std::exp(largest - top);
        sum = sum * scale + std::exp(*sink - top);
    }
    const float inverse = sum == 0 ? 0.0f : scale / sum; // a NaN stays NaN
    for (int64_t c = 0; c < head_v; ++c) partial[c] *= inverse;
    const RowType v = row_type(type_v);
    if (v.turbo)
        kernel.unrotate[block_index(v.block)](partial, out, head_v / v.block);
    else
        std::memcpy(out, partial, size_t(head_v) * sizeof(float));
}

} // namespace
} // namespace turboquant

using namespace turboquant;

int tq_attention_supports(int type_k, int type_v, int64_t head_k, int64_t head_v) {
    const RowType k = row_type(type_k), v = row_type(type_v);
    return k.block && v.block && head_k > 0 && head_v > 0 && head_k % k.block == 0 && head_v % v.block == 0;
}

size_t tq_attention_scratch(const tq_attention_kv * kv, int64_t rows) {
    return layout(*kv, rows, 0).bytes + 64;
}

int64_t tq_attention_partial(const tq_attention_kv * kv, const tq_attention_queries * queries, int64_t first,
                             int64_t last, float * partial, void * scratch) {
    return partial_of(kernels(), *kv, *queries, first, last, partial, scratch);
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

void tq_attention_unrotate(int type_v, float * partial, int64_t head_v) {
    unrotate(kernels(), type_v, partial, head_v);
}

void tq_attention_finish(int type_v, float * partial, int64_t head_v, const float * sink, float * out) {
    finish(kernels(), type_v, partial, head_v, sink, out);
}

tq_status tq_attention(const tq_attention_args * args) {
    if (!args) return TQ_ERROR_NULL;
    const tq_attention_args & a = *args;
    const RowType k = row_type(a.type_k), v = row_type(a.type_v);
    if (!k.block || !v.block) return TQ_ERROR_TYPE;
    if (a.n_head < 1 || a.n_kv_head < 1 || a.n_head % a.n_kv_head || a.n_query < 0 || a.n_kv < 0 ||
        !tq_attention_supports(a.type_k, a.type_v, a.head_k, a.head_v))
        return TQ_ERROR_LENGTH;
    const tq_attention_window w = a.window ? *a.window : tq_attention_window{nullptr, nullptr, a.type_k, a.type_v, 0};
    if (!row_type(w.type_k).block || !row_type(w.type_v).block) return TQ_ERROR_TYPE;
    if (w.rows < 0 || w.rows > a.n_kv || !tq_attention_supports(w.type_k, w.type_v, a.head_k, a.head_v))
        return TQ_ERROR_LENGTH;
    if (a.threads < 1) return TQ_ERROR_ARGUMENT;
    const int64_t n_old = a.n_kv - w.rows; // rows that are read from the encoded K and V
    if (a.n_query > 0 && (!a.q || !a.out || (n_old > 0 && (!a.k || !a.v)) || (w.rows > 0 && (!w.k || !w.v))))
        return TQ_ERROR_NULL;
    const tq_status status = tq_kernels_status();
    if (status != TQ_OK) return status;
    const Kernels & kernel = kernels();

    const int64_t group = a.n_head / a.n_kv_head;
    const int64_t tokens = group < query_tile ? query_tile / group : 1; // tokens of an item of work
    const int64_t items_per_head = (a.n_query + tokens - 1) / tokens;
    std::atomic<bool> failed{false};
    std::atomic<int64_t> seen{0}, left_out{0};
    parallel(a.n_kv_head * items_per_head, a.threads, [&](int64_t first, int64_t last, int) {
        const auto source = [&](int type_k, int type_v) {
            return tq_attention_kv{type_k, type_v, a.head_k, a.head_v, nullptr, nullptr, row_bytes(type_k, a.head_k),
                                   row_bytes(type_v, a.head_v), a.scale, a.soft_cap, a.sparse_v, {}, {}};
        };
        tq_attention_kv kv = source(a.type_k, a.type_v), near = source(w.type_k, w.type_v);
        const int64_t most = group * tokens, stride = a.head_v + 2;
        const size_t needed = std::max(tq_attention_scratch(&kv, most), tq_attention_scratch(&near, most));
        const std::unique_ptr<uint8_t[]> scratch(new (std::nothrow) uint8_t[needed]);
        const std::unique_ptr<float[]> partial(new (std::nothrow) float[size_t(most * stride)]);
        const std::unique_ptr<float[]> newest(new (std::nothrow) float[size_t(w.rows > 0 ? most * stride : 1)]);
        const std::unique_ptr<const float *[]> q(new (std::nothrow) const float *[size_t(most)]);
        const std::unique_ptr<const void *[]> mask(new (std::nothrow) const void *[size_t(most)]);
        if (!scratch || !partial || !newest || !q || !mask) {
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
            left_out += partial_of(kernel, kv, queries, 0, n_old, partial.get(), scratch.get());
            seen += a.n_kv;
            int type_v = a.type_v;
            if (w.rows > 0) {
                near.k = static_cast<const uint8_t *>(w.k) + size_t(head * w.rows) * near.stride_k;
                near.v = static_cast<const uint8_t *>(w.v) + size_t(head * w.rows) * near.stride_v;
                for (int64_t m = 0; m < rows && a.mask; ++m)
                    mask[size_t(m)] = static_cast<const float *>(mask[size_t(m)]) + n_old;
                left_out += partial_of(kernel, near, queries, 0, w.rows, newest.get(), scratch.get());
                for (int64_t m = 0; m < rows; ++m) {
                    if (a.type_v != w.type_v) { // the two sums are in different domains
                        unrotate(kernel, a.type_v, partial.get() + m * stride, a.head_v);
                        unrotate(kernel, w.type_v, newest.get() + m * stride, a.head_v);
                    }
                    tq_attention_merge(partial.get() + m * stride, newest.get() + m * stride, a.head_v);
                }
                if (a.type_v != w.type_v) type_v = TQ_ROW_F32;
            }
            for (int64_t m = 0; m < rows; ++m) {
                const int64_t h = head * group + m % group, t = token + m / group;
                finish(kernel, type_v, partial.get() + m * stride, a.head_v, nullptr,
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
