// Attention over encoded K and V, the plain path: one query row at a time, K through dot products with the prepared
// query, V accumulated in the rotated domain and un-rotated once per output row.
#include "format.h"
#include "kernels.h"
#include "parallel.h"

#include <atomic>
#include <memory>
#include <new>

namespace turboquant {
namespace {

struct Scratch {
    std::unique_ptr<uint8_t[]> query;  // prepared query row
    std::unique_ptr<float[]> score;    // n_kv
    std::unique_ptr<float[]> value;    // one decoded V row, rotated domain
    std::unique_ptr<float[]> sum;      // output row, rotated domain
    Scratch(size_t query_bytes, int64_t n_kv, int64_t head_v)
        : query(new (std::nothrow) uint8_t[query_bytes]), score(new (std::nothrow) float[size_t(n_kv)]),
          value(new (std::nothrow) float[size_t(head_v)]), sum(new (std::nothrow) float[size_t(head_v)]) {}
    bool ok() const { return query && score && value && sum; }
};

void attend(const tq_attention_args & a, int64_t head, int64_t row, const Scratch & s) {
    const tq_type_info & type_k = *tq_type_get(a.type_k);
    const tq_type_info & type_v = *tq_type_get(a.type_v);
    const size_t row_k = tq_row_bytes(a.type_k, a.head_k), row_v = tq_row_bytes(a.type_v, a.head_v);
    const int64_t group = head / (a.n_head / a.n_kv_head);
    const uint8_t * k = static_cast<const uint8_t *>(a.k) + size_t(group * a.n_kv) * row_k;
    const uint8_t * v = static_cast<const uint8_t *>(a.v) + size_t(group * a.n_kv) * row_v;
    float * out = a.out + (head * a.n_query + row) * a.head_v;
    const float * mask = a.mask ? a.mask + row * a.n_kv : nullptr;

    tq_query_row(type_k.block, a.q + (head * a.n_query + row) * a.head_k, s.query.get(), a.head_k);
    float largest = -INFINITY;
    for (int64_t i = 0; i < a.n_kv; ++i) {
        if (mask && mask[i] == -INFINITY) {
            s.score[i] = -INFINITY;
            continue;
        }
        float score = tq_dot_row(a.type_k, k + size_t(i) * row_k, s.query.get(), a.head_k) * a.scale;
        if (a.soft_cap != 0.0f) score = a.soft_cap * std::tanh(score / a.soft_cap);
        if (mask) score += mask[i];
        s.score[i] = score;
        largest = score > largest ? score : largest;
    }

    std::memset(s.sum.get(), 0, size_t(a.head_v) * sizeof(float));
    float total = 0;
    for (int64_t i = 0; i < a.n_kv; ++i) {
        if (s.score[i] == -INFINITY) continue; // also keeps -inf - -inf out of a row that is masked everywhere
        const float weight = std::exp(s.score[i] - largest);
        kernels().decode_rotated[a.type_v](v + size_t(i) * row_v, s.value.get(), a.head_v / type_v.block);
        for (int64_t c = 0; c < a.head_v; ++c) s.sum[c] += weight * s.value[c];
        total += weight;
    }
    const float inverse = total > 0 ? 1.0f / total : total == 0 ? 0.0f : NAN; // NaN scores are not hidden
    for (int64_t c = 0; c < a.head_v; ++c) s.sum[c] *= inverse;
    tq_unrotate(type_v.block, s.sum.get(), out, a.head_v, 1);
}

} // namespace
} // namespace turboquant

using namespace turboquant;

tq_status tq_attention(const tq_attention_args * args) {
    if (!args) return TQ_ERROR_NULL;
    const tq_attention_args & a = *args;
    const tq_type_info * type_k = tq_type_get(a.type_k);
    const tq_type_info * type_v = tq_type_get(a.type_v);
    if (!type_k || !type_v) return TQ_ERROR_TYPE;
    if (a.n_head < 1 || a.n_kv_head < 1 || a.n_head % a.n_kv_head || a.n_query < 0 || a.n_kv < 0 || a.head_k < 1 ||
        a.head_v < 1 || a.head_k % type_k->block || a.head_v % type_v->block)
        return TQ_ERROR_LENGTH;
    if (a.threads < 1) return TQ_ERROR_ARGUMENT;
    if (a.n_query > 0 && (!a.q || !a.out || (a.n_kv > 0 && (!a.k || !a.v)))) return TQ_ERROR_NULL;
    const tq_status status = tq_kernels_status();
    if (status != TQ_OK) return status;

    std::atomic<bool> failed{false};
    parallel(a.n_head * a.n_query, a.threads, [&](int64_t first, int64_t last, int) {
        const Scratch scratch(tq_query_bytes(type_k->block, a.head_k), a.n_kv, a.head_v);
        if (!scratch.ok()) {
            failed = true;
            return;
        }
        for (int64_t i = first; i < last; ++i) attend(a, i / a.n_query, i % a.n_query, scratch);
    });
    return failed ? TQ_ERROR_MEMORY : TQ_OK;
}
