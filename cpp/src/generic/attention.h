// The attention kernels that all vector ISAs share. codec.h must be included before. An ISA file also defines
//
//   fma(a, b, c)              a * b + c, rounded once
//   load_half                 loads `lanes` fp16 values as floats
//   accumulated_rows          greatest number of query rows that accumulate processes together
//   accumulated_registers<Rows>
//                             registers of sums per query row that fit into the register file with V and the weights
#ifndef TURBOQUANT_GENERIC_ATTENTION_H
#define TURBOQUANT_GENERIC_ATTENTION_H

namespace turboquant {
namespace {

template <typename F> TURBOQUANT_INLINE void block_levels(F format, const uint8_t * q, int8_t * level) {
    store_levels<F::block>(level, expand(format, q));
}

// Rows x (lanes * Registers) outputs stay in registers during the loop over all rows of V.
template <int Rows, int Registers>
void accumulate_block(const float * v, int count, int64_t head, const float * weights, const SoftmaxState * state,
                      float * sum, int64_t stride) {
    floats a[Rows][Registers];
    for (int m = 0; m < Rows; ++m)
        for (int c = 0; c < Registers; ++c) a[m][c] = mul(all(state[m].correction), load(sum + m * stride + lanes * c));
    for (int r = 0; r < count; ++r, v += head) {
        floats value[Registers];
        for (int c = 0; c < Registers; ++c) value[c] = load(v + lanes * c);
        for (int m = 0; m < Rows; ++m) {
            const floats weight = all(weights[m * tile_rows + r]);
            for (int c = 0; c < Registers; ++c) a[m][c] = fma(weight, value[c], a[m][c]);
        }
    }
    for (int m = 0; m < Rows; ++m)
        for (int c = 0; c < Registers; ++c) store(sum + m * stride + lanes * c, a[m][c]);
}

// Processes Rows query rows at a time, and the remaining ones in smaller groups.
template <int Rows>
void accumulate_rows(const float * v, int count, int64_t head, const float * weights, const SoftmaxState * state,
                     int rows, float * sum, int64_t stride) {
    constexpr int registers = accumulated_registers<Rows>, width = registers * lanes;
    for (; rows >= Rows; rows -= Rows, weights += Rows * tile_rows, state += Rows, sum += Rows * stride) {
        int64_t c = 0;
        for (; c + width <= head; c += width)
            accumulate_block<Rows, registers>(v + c, count, head, weights, state, sum + c, stride);
        if constexpr (width > 32) // a head is a multiple of 32
            for (; c < head; c += 32)
                accumulate_block<Rows, 32 / lanes>(v + c, count, head, weights, state, sum + c, stride);
    }
    if constexpr (Rows > 4)
        accumulate_rows<4>(v, count, head, weights, state, rows, sum, stride);
    else if constexpr (Rows > 1)
        accumulate_rows<1>(v, count, head, weights, state, rows, sum, stride);
}

void accumulate(const float * v, int count, int64_t head, const float * weights, const SoftmaxState * state, int rows,
                float * sum, int64_t stride) {
    accumulate_rows<accumulated_rows>(v, count, head, weights, state, rows, sum, stride);
}

void load_f16(const uint8_t * src, float * dst, int64_t n) {
    for (int64_t i = 0; i < n; i += lanes) store(dst + i, load_half(src + 2 * i));
}

void query_plain(const float * src, void * dst, int64_t blocks) {
    auto * out = static_cast<tq_query32 *>(dst);
    for (int64_t b = 0; b < blocks; ++b, src += 32, ++out) {
        const float largest = bits_float(largest_bits<32>(src));
        const float inverse = 127.0f / largest;
        if (!(largest < INFINITY) || inverse == INFINITY) {
            std::memset(out, 0, sizeof(*out));
            out->scale = largest < INFINITY ? 0.0f : NAN;
            continue;
        }
        floats x[32 / lanes];
        for (int r = 0; r < 32 / lanes; ++r) x[r] = load(src + lanes * r);
        out->sum = round_to_bytes<32>(x, inverse, out->q);
        out->scale = largest / 127.0f;
    }
}

} // namespace
} // namespace turboquant

#endif
