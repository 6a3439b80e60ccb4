// Compares the CUDA codec with that of the CPU: the conformance list, and the parts of the interface that only CUDA has.
#include "check.h"
#include "codec.h"
#include "device.h"
#include "turboquant_cuda.h"

#include <cuda_fp16.h>

#include <algorithm>
#include <cstring>
#include <list>

using namespace turboquant::cuda;

namespace {

const Index no_index = {nullptr, false, {1, 1, 1}, {0, 0, 0}};

Rows dense(void * data, int64_t row, int64_t ne1 = 1, int64_t ne2 = 1) {
    return {data, {row, row * ne1, row * ne1 * ne2}};
}

tq_type type_at(int i) { return tq_type(i); }

// Rows are decoded to the floats of tq_decode and tq_decode_rotated, and to binary16.
void decodes(tq_type type, const std::vector<uint8_t> & encoded, size_t pitch, int64_t n, int64_t rows) {
    std::vector<float> want(size_t(n * rows)), want_rotated(want.size());
    CHECK_EQ(tq_decode(type, encoded.data(), pitch, want.data(), n, rows, n, 1), TQ_OK);
    CHECK_EQ(tq_decode_rotated(type, encoded.data(), pitch, want_rotated.data(), n, rows, n, 1), TQ_OK);
    DeviceArray<uint8_t> src(encoded);
    DeviceArray<float> dst(want.size());
    DeviceArray<__half> dst16(want.size());
    const int64_t ne[4] = {n, rows, 1, 1};
    const Rows from = dense(src.get(), int64_t(pitch));
    for (const bool rotated : {false, true}) {
        check::Case c2(rotated ? "rotated" : "original");
        const std::vector<float> & w = rotated ? want_rotated : want;
        must(decode_rows(type, from, dense(dst.get(), n * 4), ne, no_index, false, rotated, nullptr), "decode_rows");
        const std::vector<float> got = dst.host();
        CHECK_EQ(first_difference(got.data(), w.data(), n * rows), int64_t(-1));
        must(decode_rows(type, from, dense(dst16.get(), n * 2), ne, no_index, true, rotated, nullptr), "decode_rows");
        const std::vector<__half> got16 = dst16.host();
        int64_t differ = 0;
        for (size_t i = 0; i < w.size(); ++i)
            differ += !same(__half2float(got16[i]), __half2float(__float2half_rn(w[i])));
        CHECK_EQ(differ, int64_t(0));
    }
}

// The kernels read encoded rows in half words.
bool covers(const CodecCase & c) { return c.pad_bytes % 2 == 0; }

void encodes(tq_type type, const CodecCase & c) {
    const CodecRows rows = codec_rows(type, c, poison);
    DeviceArray<float> src(rows.values);
    DeviceArray<uint8_t> dst(rows.blocks.size());
    const Rows from = dense(src.get(), rows.stride * 4), to = dense(dst.get(), int64_t(rows.pitch));
    must(encode_rows({type, from, to, {rows.n, c.rows, 1, 1}, no_index}, nullptr), "encode_rows");
    const std::vector<uint8_t> got = dst.host();
    CHECK_EQ(first_difference(got.data(), rows.blocks.data(), got.size()), int64_t(-1));
    decodes(type, rows.blocks, rows.pitch, rows.n, c.rows);
}

void decodes_any(tq_type type, const CodecCase & c) {
    const CodecRows rows = codec_rows(type, c, poison);
    decodes(type, rows.blocks, rows.pitch, rows.n, c.rows);
}

void conforms(const CodecCase & c) {
    check::Case case_(c.name);
    for (int i = 0; i < TQ_TYPE_COUNT; ++i) {
        check::Case type_case(tq_type_get(type_at(i))->name);
        (c.input ? encodes : decodes_any)(type_at(i), c);
    }
}

void conforms(const RotationCase & c) {
    check::Case case_(c.name);
    for (const int block : {128, 64, 32}) {
        check::Case block_case("block ", block);
        const int64_t n = c.blocks * block;
        std::vector<float> x(size_t(n * c.rows)), want(x.size());
        Random random(seed_of(c.name) + uint64_t(block));
        c.input->fill(random, x.data(), n * c.rows, block);
        for (const bool inverse : {false, true}) {
            CHECK_EQ((inverse ? tq_unrotate : tq_rotate)(block, x.data(), want.data(), n * c.rows, 1), TQ_OK);
            DeviceArray<float> data(x);
            const int64_t ne[4] = {n, c.rows, 1, 1};
            const Rows rows = dense(data.get(), n * 4);
            must(rotate_rows(block, inverse, rows, rows, ne, nullptr), "rotate_rows");
            const std::vector<float> got = data.host();
            CHECK_EQ(first_difference(got.data(), want.data(), n * c.rows), int64_t(-1));
        }
    }
}

// Two stores at once are what they are one after the other.
void encode_two(tq_type first, tq_type second, int64_t first_blocks, int64_t first_rows, int64_t second_blocks) {
    check::Case c(tq_type_get(first)->name, " and ", tq_type_get(second)->name);
    const tq_type types[2] = {first, second};
    const int64_t blocks[2] = {first_blocks, second_blocks}, rows[2] = {first_rows, 5};
    Store stores[2];
    std::list<DeviceArray<float>> src;
    std::list<DeviceArray<uint8_t>> dst;
    std::vector<std::vector<uint8_t>> want;
    for (int i = 0; i < 2; ++i) {
        const int64_t n = blocks[i] * tq_type_get(types[i])->block;
        const size_t bytes = tq_row_bytes(types[i], n);
        std::vector<float> x(size_t(n * rows[i] + 1));
        Random random(uint64_t(i + 1));
        for (float & v : x) v = random.normal();
        want.emplace_back(bytes * size_t(rows[i]) + 1, poison);
        for (int64_t r = 0; r < rows[i]; ++r)
            tq_encode_row(types[i], x.data() + r * n, want.back().data() + size_t(r) * bytes, n);
        src.emplace_back(x);
        dst.emplace_back(want.back().size());
        stores[i] = {types[i], dense(src.back().get(), n * 4), dense(dst.back().get(), int64_t(bytes)),
                     {n, rows[i], 1, 1}, no_index};
    }
    const bool same = tq_type_get(first)->block == tq_type_get(second)->block;
    CHECK_EQ(encode_rows(stores[0], stores[1], nullptr), same ? cudaSuccess : cudaErrorNotSupported);
    if (!same) return;
    auto expected = want.begin();
    for (DeviceArray<uint8_t> & array : dst) {
        const std::vector<uint8_t> got = array.host();
        CHECK_EQ(first_difference(got.data(), expected->data(), expected->size()), int64_t(-1));
        ++expected;
    }
}

// Rows scattered by an index with strides and broadcasting, as ggml's SET_ROWS does; then gathered again.
template <typename I> void scatter_and_gather(tq_type type) {
    check::Case c(tq_type_get(type)->name, " scattered by int", 8 * sizeof(I));
    const int64_t n = 3 * tq_type_get(type)->block, rows = 5, ne2 = 3, ne3 = 2, cache_rows = 17, pad = 8;
    const size_t bytes = tq_row_bytes(type, n);
    Random random(7);
    std::vector<float> x(size_t((n + pad) * rows * ne2 * ne3));
    for (float & v : x) v = random.normal();
    // index [rows][1][ne3], with a gap between its elements
    std::vector<I> where(size_t(2 * rows * ne3));
    for (int64_t i3 = 0; i3 < ne3; ++i3) {
        std::vector<I> all(static_cast<size_t>(cache_rows));
        for (int64_t i = 0; i < cache_rows; ++i) all[size_t(i)] = I(i);
        for (size_t i = all.size() - 1; i > 0; --i) std::swap(all[i], all[size_t(random.below(int(i + 1)))]);
        for (int64_t r = 0; r < rows; ++r) where[size_t(2 * (r + i3 * rows))] = all[size_t(r)];
    }
    std::vector<uint8_t> want(bytes * size_t(cache_rows * ne2 * ne3), poison);
    for (int64_t i3 = 0; i3 < ne3; ++i3)
        for (int64_t i2 = 0; i2 < ne2; ++i2)
            for (int64_t r = 0; r < rows; ++r)
                tq_encode_row(
                    type, x.data() + ((i3 * ne2 + i2) * rows + r) * (n + pad),
                    want.data() + size_t((i3 * ne2 + i2) * cache_rows + where[size_t(2 * (r + i3 * rows))]) * bytes, n);

    DeviceArray<float> src(x);
    DeviceArray<I> index_data(where);
    DeviceArray<uint8_t> cache(want.size());
    const Index index = {index_data.get(),
                         sizeof(I) == 8,
                         {rows, 1, ne3},
                         {int64_t(2 * sizeof(I)), int64_t(2 * sizeof(I)) * rows, int64_t(2 * sizeof(I)) * rows}};
    const int64_t ne[4] = {n, rows, ne2, ne3};
    const Rows from = dense(src.get(), (n + pad) * 4, rows, ne2),
               to = dense(cache.get(), int64_t(bytes), cache_rows, ne2);
    must(encode_rows({type, from, to, {n, rows, ne2, ne3}, index}, nullptr), "encode_rows");
    const std::vector<uint8_t> got = cache.host();
    CHECK_EQ(first_difference(got.data(), want.data(), want.size()), int64_t(-1)); // other rows are untouched

    DeviceArray<float> back(size_t(n * rows * ne2 * ne3));
    must(decode_rows(type, to, dense(back.get(), n * 4, rows, ne2), ne, index, false, false, nullptr), "decode_rows");
    const std::vector<float> values = back.host();
    std::vector<float> row(static_cast<size_t>(n));
    for (int64_t i = 0; i < rows * ne2 * ne3; ++i) {
        const int64_t r = i % rows, i23 = i / rows, i3 = i23 / ne2;
        tq_decode_row(type, want.data() + size_t(i23 * cache_rows + where[size_t(2 * (r + i3 * rows))]) * bytes,
                      row.data(), n);
        CHECK_EQ(first_difference(values.data() + i * n, row.data(), n), int64_t(-1));
    }
}

} // namespace

// The argument is an extent of the list; brief is for compute-sanitizer.
int main(int argc, char ** argv) {
    need_device(75);
    const Extent extent = extent_from(argc > 1 ? argv[1] : "whole");
    for (const CodecCase & c : codec_cases())
        if (c.extent <= extent && covers(c)) conforms(c);
    for (const RotationCase & c : rotation_cases())
        if (c.extent <= extent) conforms(c);
    for (int i = 0; i < TQ_TYPE_COUNT; ++i) {
        CHECK(codec_supports(type_at(i)));
        scatter_and_gather<int32_t>(type_at(i));
        scatter_and_gather<int64_t>(type_at(i));
    }
    for (int first = 0; first < TQ_TYPE_COUNT; ++first)
        for (int second = 0; second < TQ_TYPE_COUNT; ++second) {
            encode_two(type_at(first), type_at(second), 8, 1, 8);
            encode_two(type_at(first), type_at(second), 3, 0, 1);
            encode_two(type_at(first), type_at(second), 1, 70, 2);
        }
    CHECK(!codec_supports(TQ_TYPE_COUNT));
    CHECK_EQ(encode_rows({TQ_TURBO4, dense(nullptr, 0), dense(nullptr, 0), {100, 1, 1, 1}, no_index}, nullptr),
             cudaErrorNotSupported);
    must(cudaDeviceSynchronize(), "at the end");
    return check::summary();
}
