// Compares the Metal codec in the emulator with that of the CPU: the conformance list, and rows scattered by an index.
#include "arguments.h"
#include "check.h"
#include "codec.h"
#include "device.h"
#include "rows.h"

#include <algorithm>

using namespace turboquant::metal;

namespace {

const Index no_index = {{nullptr, 0}, false, {1, 1, 1}, {0, 0, 0}};

Rows dense(Buffer data, int64_t row, int64_t ne1 = 1, int64_t ne2 = 1) {
    return {data, {row, row * ne1, row * ne1 * ne2}};
}

tq_type type_at(int i) { return tq_type(i); }

// Rows are decoded to the floats of tq_decode, and to binary16.
void decodes(tq_type type, const std::vector<uint8_t> & encoded, size_t pitch, int64_t n, int64_t rows) {
    std::vector<float> want(size_t(n * rows));
    CHECK_EQ(tq_decode(type, encoded.data(), pitch, want.data(), n, rows, n, 1), TQ_OK);
    const DeviceArray<uint8_t> src(encoded);
    const DeviceArray<float> dst(want.size());
    const DeviceArray<uint16_t> dst16(want.size());
    const int64_t ne[4] = {n, rows, 1, 1};
    const Rows from = dense(src.buffer(), int64_t(pitch));
    EmulatorEncoder encoder;
    CHECK(decode_rows(type, from, dense(dst.buffer(), n * 4), ne, no_index, false, encoder));
    const std::vector<float> got = dst.host();
    CHECK_EQ(first_difference(got.data(), want.data(), n * rows), int64_t(-1));
    CHECK(decode_rows(type, from, dense(dst16.buffer(), n * 2), ne, no_index, true, encoder));
    const std::vector<uint16_t> got16 = dst16.host();
    int64_t differ = 0;
    for (size_t i = 0; i < want.size(); ++i)
        differ += got16[i] != binary16_of(want[i]) && !(std::isnan(want[i]) && (got16[i] & 0x7fff) > 0x7c00);
    CHECK_EQ(differ, int64_t(0));
}

// The kernels read encoded rows in half words.
bool covers(const CodecCase & c) { return c.pad_bytes % 2 == 0; }

// The emulator takes too long for all blocks of the largest cases.
CodecCase shortened(CodecCase c) {
    c.blocks = std::min<int64_t>(c.blocks, 1000);
    return c;
}

void encodes(tq_type type, const CodecCase & c) {
    const CodecRows rows = codec_rows(type, c, poison);
    const DeviceArray<float> src(rows.values);
    const DeviceArray<uint8_t> dst(rows.blocks.size());
    EmulatorEncoder encoder;
    const int64_t ne[4] = {rows.n, c.rows, 1, 1};
    const Rows from = dense(src.buffer(), rows.stride * 4), to = dense(dst.buffer(), int64_t(rows.pitch));
    CHECK(encode_rows(type, from, to, ne, no_index, encoder));
    const std::vector<uint8_t> got = dst.host();
    CHECK_EQ(first_difference(got.data(), rows.blocks.data(), got.size()), int64_t(-1));
    decodes(type, rows.blocks, rows.pitch, rows.n, c.rows);
}

void decodes_any(tq_type type, const CodecCase & c) {
    const CodecRows rows = codec_rows(type, c, poison);
    decodes(type, rows.blocks, rows.pitch, rows.n, c.rows);
}

void conforms(const CodecCase & c, bool flush) {
    check::Case case_(c.name, flush ? ", subnormal floats as zeros" : "");
    emulator::flush_subnormals(flush);
    for (int i = 0; i < TQ_TYPE_COUNT; ++i) {
        const tq_type_info & info = *tq_type_get(type_at(i));
        check::Case type_case(info.name);
        if (c.input) encodes(type_at(i), part_for(shortened(c), info));
        else decodes_any(type_at(i), c);
    }
    emulator::flush_subnormals(false);
}

void conforms(const RotationCase & c) {
    check::Case case_(c.name);
    for (const int block : {128, 64, 32}) {
        check::Case block_case("block ", block);
        const int64_t n = c.blocks * block * c.rows;
        std::vector<float> x(static_cast<size_t>(n)), want(x.size());
        Random random(seed_of(c.name) + uint64_t(block));
        c.input->fill(random, x.data(), n, block);
        for (const bool inverse : {false, true}) {
            CHECK_EQ((inverse ? tq_unrotate : tq_rotate)(block, x.data(), want.data(), n, 1), TQ_OK);
            const DeviceArray<float> src(x), dst(x.size());
            turboquant::CodecArguments a = {};
            a.blocks = n / block;
            a.half_floats = inverse; // the kernel's flag
            const char * kernel = block == 128 ? "rotate_128" : block == 64 ? "rotate_64" : "rotate_32";
            const int groups = int((a.blocks + 3) / 4);
            EmulatorEncoder().dispatch(
                {kernel, {}, &a, sizeof(a), {src.buffer(), dst.buffer()}, 0, {groups, 1, 1}, 128});
            const std::vector<float> got = dst.host();
            CHECK_EQ(first_difference(got.data(), want.data(), n), int64_t(-1));
        }
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
    std::vector<I> where(size_t(2 * rows * ne3)); // index [rows][1][ne3], with a gap between its elements
    for (int64_t i3 = 0; i3 < ne3; ++i3) {
        std::vector<I> all(static_cast<size_t>(cache_rows));
        for (int64_t i = 0; i < cache_rows; ++i) all[size_t(i)] = I(i);
        for (size_t i = all.size() - 1; i > 0; --i) std::swap(all[i], all[size_t(random.below(int(i + 1)))]);
        for (int64_t r = 0; r < rows; ++r) where[size_t(2 * (r + i3 * rows))] = all[size_t(r)];
    }
    std::vector<uint8_t> want(bytes * size_t(cache_rows * ne2 * ne3), poison);
    for (int64_t i = 0; i < rows * ne2 * ne3; ++i) {
        const int64_t r = i % rows, i23 = i / rows, row = i23 * cache_rows + where[size_t(2 * (r + i23 / ne2 * rows))];
        tq_encode_row(type, x.data() + i * (n + pad), want.data() + size_t(row) * bytes, n);
    }
    const DeviceArray<float> src(x);
    const DeviceArray<I> index_data(where);
    const DeviceArray<uint8_t> cache(want.size());
    const int64_t step = 2 * sizeof(I);
    const Index index = {index_data.buffer(), sizeof(I) == 8, {rows, 1, ne3}, {step, step * rows, step * rows}};
    const int64_t ne[4] = {n, rows, ne2, ne3};
    const Rows to = dense(cache.buffer(), int64_t(bytes), cache_rows, ne2);
    EmulatorEncoder encoder;
    CHECK(encode_rows(type, dense(src.buffer(), (n + pad) * 4, rows, ne2), to, ne, index, encoder));
    const std::vector<uint8_t> got = cache.host();
    CHECK_EQ(first_difference(got.data(), want.data(), want.size()), int64_t(-1)); // other rows are untouched

    encoder.barrier();
    const DeviceArray<float> back(size_t(n * rows * ne2 * ne3));
    CHECK(decode_rows(type, to, dense(back.buffer(), n * 4, rows, ne2), ne, index, false, encoder));
    const std::vector<float> values = back.host();
    std::vector<float> row(static_cast<size_t>(n));
    for (int64_t i = 0; i < rows * ne2 * ne3; ++i) {
        const int64_t r = i % rows, i23 = i / rows, from = i23 * cache_rows + where[size_t(2 * (r + i23 / ne2 * rows))];
        tq_decode_row(type, want.data() + size_t(from) * bytes, row.data(), n);
        CHECK_EQ(first_difference(values.data() + i * n, row.data(), n), int64_t(-1));
    }
}

} // namespace

// The argument is an extent of the list.
int main(int argc, char ** argv) {
    const Extent extent = extent_from(argc > 1 ? argv[1] : "usual");
    for (const CodecCase & c : codec_cases())
        if (c.extent <= extent && covers(c)) {
            conforms(c, false);
            if (c.blocks * c.rows <= 20) conforms(c, true);
        }
    for (const RotationCase & c : rotation_cases())
        if (c.extent <= extent) conforms(c);
    for (int i = 0; i < TQ_TYPE_COUNT; ++i) {
        scatter_and_gather<int32_t>(type_at(i));
        scatter_and_gather<int64_t>(type_at(i));
    }
    EmulatorEncoder encoder;
    const Rows nothing = dense({nullptr, 0}, 0);
    const int64_t odd[4] = {100, 1, 1, 1};
    CHECK(!encode_rows(TQ_TYPE_COUNT, nothing, nothing, odd, no_index, encoder));
    CHECK(!encode_rows(TQ_TURBO4, nothing, nothing, odd, no_index, encoder));
    return check::summary();
}
