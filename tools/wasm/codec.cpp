// The codec for the page of `turboquant explore`: the scalar kernels themselves, without the parts for attention,
// exported to JavaScript. tools/make_wasm.py compiles it.
#include "scalar.cpp" // into this file, so that the linker drops what is not exported

// Names of our own are in a namespace of their own: scalar.cpp may come to use any.
namespace page {
namespace {

namespace tq = turboquant;

constexpr int capacity = 1000 * 128; // values that one call can take
alignas(16) float input[capacity], output[capacity];
alignas(16) uint8_t encoded[capacity / 32 * tq::Format<4, 32>::bytes];
tq_encode_report ignored;

template <int V> struct Constant { static constexpr int value = V; };

// Calls function(Constant<Bits>(), Constant<N>()) for the width and the block length; false if there are no such.
template <int Bits, typename Function> bool with_block(int block, const Function & function) {
    switch (block) {
        case 128: function(Constant<Bits>(), Constant<128>()); return true;
        case 64:  function(Constant<Bits>(), Constant<64>()); return true;
        case 32:  function(Constant<Bits>(), Constant<32>()); return true;
    }
    return false;
}

template <typename Function> bool with_format(int bits, int block, const Function & function) {
    switch (bits) {
        case 4: return with_block<4>(block, function);
        case 3: return with_block<3>(block, function);
        case 2: return with_block<2>(block, function);
    }
    return false;
}

} // namespace

#define EXPORT(NAME) extern "C" __attribute__((export_name(#NAME)))

// Where JavaScript finds the buffers: floats in, floats out, encoded blocks, and the signs.
EXPORT(capacity) int exported_capacity() { return capacity; }
EXPORT(values) float * exported_values() { return input; }
EXPORT(results) float * exported_results() { return output; }
EXPORT(bytes) uint8_t * exported_bytes() { return encoded; }
EXPORT(signs) const uint8_t * exported_signs(int which) { return which == 1 ? tq::signs1 : tq::signs2; }

// The format: bytes of a block (0 = no such format), the step, and the centroids, ascending.
EXPORT(block_bytes) int exported_block_bytes(int bits, int block) {
    int result = 0;
    with_format(bits, block, [&](auto b, auto n) { result = tq::Format<b.value, n.value>::bytes; });
    return result;
}
EXPORT(step) float exported_step(int bits) {
    float result = 0;
    with_format(bits, 128, [&](auto b, auto) { result = tq::Codebook<b.value>::step; });
    return result;
}
EXPORT(centroids) const int8_t * exported_centroids(int bits) {
    const int8_t * result = nullptr;
    with_format(bits, 128, [&](auto b, auto) { result = tq::Codebook<b.value>::centroids; });
    return result;
}

// Blocks that follow each other: values -> bytes, bytes -> results, values -> results. False: no such format.
EXPORT(encode) bool exported_encode(int bits, int block, int blocks) {
    return with_format(bits, block,
                       [&](auto b, auto n) { tq::encode<b.value, n.value>(input, encoded, blocks, &ignored); });
}
EXPORT(decode) bool exported_decode(int bits, int block, int blocks) {
    return with_format(bits, block, [&](auto b, auto n) { tq::decode<b.value, n.value>(encoded, output, blocks); });
}
EXPORT(decode_rotated) bool exported_decode_rotated(int bits, int block, int blocks) {
    return with_format(bits, block,
                       [&](auto b, auto n) { tq::decode_rotated<b.value, n.value>(encoded, output, blocks); });
}
EXPORT(rotate) bool exported_rotate(int block, int blocks) {
    return with_block<0>(block, [&](auto, auto n) { tq::rotate<n.value>(input, output, blocks); });
}
EXPORT(unrotate) bool exported_unrotate(int block, int blocks) {
    return with_block<0>(block, [&](auto, auto n) { tq::unrotate<n.value>(input, output, blocks); });
}

} // namespace page
