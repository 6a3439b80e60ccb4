// The codec for the page of `turboquant explore`: the scalar kernels without attention, exported to JavaScript.
// tools/make_wasm.py compiles this file.
#include "scalar.cpp" // included, so that the linker drops what is not exported

// This namespace prevents conflicts with names in scalar.cpp.
namespace page {
namespace {

namespace tq = turboquant;

constexpr int capacity = 1000 * 128; // values that one call can take

constexpr int most_bytes() {
    int most = 0;
#define TURBOQUANT_BYTES(ID, name, FIRST, family, bits, block, bytes, id) \
    most = capacity / block * bytes > most ? capacity / block * bytes : most;
    TURBOQUANT_TYPES(TURBOQUANT_BYTES)
#undef TURBOQUANT_BYTES
    return most;
}

alignas(16) float input[capacity], output[capacity];
alignas(16) uint8_t encoded[most_bytes()];
uint8_t index_of[128];
int16_t metric_of[128][4];
tq_encode_report ignored;

// Calls `function` with the Format of the type. Returns false if there is no such type.
template <typename Function> bool with_format(int type, const Function & function) {
    switch (type) {
#define TURBOQUANT_CASE(ID, ...) \
    case TQ_##ID: function(tq::FormatOf<TQ_##ID>()); return true;
        TURBOQUANT_TYPES(TURBOQUANT_CASE)
#undef TURBOQUANT_CASE
    }
    return false;
}

// The index of element i in the first block; in the trellis-coded types the number of its level in the subset.
template <int Bits, int N> int index_at(tq::Format<tq::LloydMax<Bits>, N>, int i) {
    return tq::LloydMax<Bits>::template index_at<N>(encoded + 2, i);
}
template <int Bits, int N> int index_at(tq::Format<tq::Trellis<Bits>, N>, int i) {
    return tq::Trellis<Bits>::template rest_at<N>(encoded + 2, i);
}

// The metrics of the first block's values, by step. Returns the distance, in the rotated vector, of levels whose
// difference is 1; 0 for a zero block, and for types without a trellis.
template <int Bits, int N> float metrics(tq::Format<tq::LloydMax<Bits>, N>) { return 0; }
template <int Bits, int N> float metrics(tq::Format<tq::Trellis<Bits>, N>) {
    tq::Encoding<N> work;
    tq::transform(input, work);
    if (!work.codable()) return 0;
    const int scale = tq::choose_scale<Bits, N>(work.z), ratio = tq::ScaleTables<Bits, N>::table.ratio[scale];
    for (int t = 0; t < N; ++t)
        tq::subset_metrics<Bits>(tq::to_grid<Bits>(work.z[tq::Trellis<Bits>::template element<N>(t)], ratio), metric_of[t]);
    return float(tq::trellis_scale[scale]) * tq::Trellis<Bits>::step * work.rms * tq::Block<N>::one_over_sqrt_n *
           tq::power_of_two(work.k);
}

template <int N> struct Constant { static constexpr int value = N; };

// Calls `function` with the block length as a Constant. Returns false if there is no such length.
template <typename Function> bool with_block(int block, const Function & function) {
    switch (block) {
#define TURBOQUANT_CASE(N) \
    case N: function(Constant<N>()); return true;
        TURBOQUANT_BLOCKS(TURBOQUANT_CASE)
#undef TURBOQUANT_CASE
    }
    return false;
}

} // namespace

#define EXPORT(NAME) extern "C" __attribute__((export_name(#NAME)))

// The addresses of the buffers for JavaScript: floats in, floats out, encoded blocks, indices and metrics of one
// block, signs.
EXPORT(capacity) int exported_capacity() { return capacity; }
EXPORT(values) float * exported_values() { return input; }
EXPORT(results) float * exported_results() { return output; }
EXPORT(bytes) uint8_t * exported_bytes() { return encoded; }
EXPORT(indices) uint8_t * exported_indices() { return index_of; }
EXPORT(metric_buffer) int16_t * exported_metric_buffer() { return &metric_of[0][0]; }
EXPORT(signs) const uint8_t * exported_signs(int which) { return which == 1 ? tq::signs1 : tq::signs2; }

// The types are numbered from 0, as in tq_type: bits of an index, values and bytes of a block, the step, and the
// centroids, ascending, with their number.
EXPORT(types) int exported_types() { return TQ_TYPE_COUNT; }
#define EXPORT_FACT(TYPE, NAME, VALUE)                                          \
    EXPORT(NAME) TYPE exported_##NAME(int type) {                               \
        TYPE result = 0;                                                        \
        with_format(type, [&](auto f) { result = decltype(f)::VALUE; });        \
        return result;                                                          \
    }
EXPORT_FACT(int, bits, bits)
EXPORT_FACT(int, block, block)
EXPORT_FACT(int, block_bytes, bytes)
EXPORT_FACT(float, step, step)
EXPORT_FACT(int, levels, levels)
EXPORT_FACT(const int8_t *, centroids, centroids)

// Functions on contiguous blocks: values -> bytes, bytes -> results, values -> results. They return false if there is
// no such type or length.
EXPORT(encode) bool exported_encode(int type, int blocks) {
    return with_format(type, [&](auto f) { tq::encode<decltype(f)>(input, encoded, blocks, &ignored); });
}
EXPORT(decode) bool exported_decode(int type, int blocks) {
    return with_format(type, [&](auto f) { tq::decode<decltype(f)>(encoded, output, blocks); });
}
EXPORT(decode_rotated) bool exported_decode_rotated(int type, int blocks) {
    return with_format(type, [&](auto f) { tq::decode_rotated<decltype(f)>(encoded, output, blocks); });
}
EXPORT(rotate) bool exported_rotate(int block, int blocks) {
    return with_block(block, [&](auto n) { tq::rotate<n.value>(input, output, blocks); });
}
EXPORT(unrotate) bool exported_unrotate(int block, int blocks) {
    return with_block(block, [&](auto n) { tq::unrotate<n.value>(input, output, blocks); });
}
// The first block's bytes -> its indices.
EXPORT(unpack) bool exported_unpack(int type) {
    return with_format(type, [&](auto f) {
        for (int i = 0; i < f.block; ++i) index_of[i] = uint8_t(index_at(f, i));
    });
}
// The first block's values -> its metrics.
EXPORT(metrics) float exported_metrics(int type) {
    float unit = 0;
    with_format(type, [&](auto f) { unit = metrics(f); });
    return unit;
}

} // namespace page
