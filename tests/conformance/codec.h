// The conformance list of the codec: rows of every type, which every backend must encode and decode to the bytes and
// floats of the specification (the scalar kernels), and rotations of every block length.
#ifndef TURBOQUANT_TESTS_CODEC_CASES_H
#define TURBOQUANT_TESTS_CODEC_CASES_H

#include "extent.h"
#include "inputs.h"

#include <algorithm>
#include <string>
#include <vector>

struct CodecCase {
    std::string name;
    int64_t blocks, rows;      // blocks of a row
    int pad_values, pad_bytes; // between rows of floats, and between encoded rows
    const Input * input;       // the values to encode and decode; nullptr for random bytes to decode
    int scale;                 // the stored scale of random bytes; -1 for any scale
    Extent extent;
};

// The part of a case that runs for a type. Cases with many blocks are about rounding, above all in the transform, which
// all families share. The plain encoder of the trellis types, with which others are compared, takes several times as
// long as that of the other types.
inline CodecCase part_for(CodecCase c, const tq_type_info & type) {
    const int64_t most = 512; // blocks to encode
    if (c.input && is_trellis(type)) {
        c.blocks = c.blocks < most ? c.blocks : most;
        c.rows = c.rows < most / c.blocks ? c.rows : most / c.blocks;
    }
    return c;
}

struct RotationCase {
    std::string name;
    int64_t blocks, rows;
    const Input * input;
    Extent extent;
};

namespace codec_list {

constexpr int64_t sizes[] = {1, 2, 3, 127, 128, 129}; // blocks of a row, and rows

inline std::string described(int64_t blocks, int64_t rows) {
    return std::to_string(rows) + (rows == 1 ? " row of " : " rows of ") + std::to_string(blocks) +
           (blocks == 1 ? " block" : " blocks");
}

class List {
public:
    std::vector<CodecCase> cases;

    void encode(const Input & input, int64_t blocks, int64_t rows, Extent extent, int pad_values = 0,
                int pad_bytes = 0) {
        add(input.name, {"", blocks, rows, pad_values, pad_bytes, &input, -1, extent});
    }
    void decode(int64_t blocks, int64_t rows, Extent extent, int scale = -1, int pad_bytes = 0) {
        add("random bytes", {"", blocks, rows, 0, pad_bytes, nullptr, scale, extent});
    }

private:
    void add(const char * what, CodecCase c) {
        c.name = std::string(what) + ": " + described(c.blocks, c.rows);
        if (c.scale >= 0) c.name += ", scale " + std::to_string(c.scale);
        if (c.pad_values || c.pad_bytes)
            c.name += ", padded by " + std::to_string(c.pad_values) + " and " + std::to_string(c.pad_bytes);
        cases.push_back(c);
    }
};

} // namespace codec_list

// Every name occurs once.
inline std::vector<CodecCase> codec_cases() {
    using namespace codec_list;
    List list;
    const Input & first = inputs().front(); // normal values
    for (const Input & input : inputs()) {
        for (const int64_t blocks : sizes)
            list.encode(input, blocks, 1, &input == &first && blocks == 1 ? Extent::brief : Extent::usual);
        list.encode(input, 3, 5, &input == &first ? Extent::brief : Extent::usual);
        list.encode(input, 8, 300, Extent::whole);
    }
    // A different rounding (a fused multiply-add, another order of a sum) changes few blocks in ten thousand.
    list.encode(first, 20000, 1, Extent::usual);
    list.encode(first, 1, 20000, Extent::whole);
    list.encode(inputs()[1], 8, 4000, Extent::whole);
    for (const int64_t rows : sizes)
        for (const int pad_bytes : {3, 6}) list.encode(first, 2, rows, Extent::usual, 5, pad_bytes);
    for (const int64_t blocks : sizes) {
        list.decode(blocks, 1, Extent::usual);
        for (const uint16_t scale : odd_scales()) list.decode(blocks, 1, Extent::usual, scale);
    }
    for (const int64_t blocks : {1, 2, 9})
        for (const int64_t rows : {1, 3, 131}) list.decode(blocks, rows, Extent::brief, -1, 6);
    return list.cases;
}

inline std::vector<RotationCase> rotation_cases() {
    using namespace codec_list;
    std::vector<RotationCase> list;
    const auto add = [&](const Input & input, int64_t blocks, int64_t rows, Extent extent) {
        list.push_back({std::string(input.name) + ": " + described(blocks, rows), blocks, rows, &input, extent});
    };
    for (const Input & input : inputs())
        for (const int64_t blocks : sizes) add(input, blocks, 1, Extent::usual);
    add(inputs().front(), 3, 7, Extent::brief);
    return list;
}

// Rows of a case: their values, `stride` apart, if the case has values; and their blocks, `pitch` bytes apart. These are
// the CPU's of the values, with `padding` between them, or any bytes.
struct CodecRows {
    int64_t n, stride; // values of a row; with the padding
    size_t pitch;
    std::vector<float> values;
    std::vector<uint8_t> blocks;
};

inline CodecRows codec_rows(tq_type type, const CodecCase & c, uint8_t padding) {
    const tq_type_info & info = *tq_type_get(type);
    CodecRows rows;
    rows.n = c.blocks * info.block;
    rows.stride = rows.n + c.pad_values;
    rows.pitch = tq_row_bytes(type, rows.n) + size_t(c.pad_bytes);
    Random random(seed_of(c.name) + uint64_t(type));
    if (!c.input) {
        rows.blocks.resize(rows.pitch * size_t(c.rows));
        for (int64_t r = 0; r < c.rows; ++r) {
            uint8_t * row = rows.blocks.data() + size_t(r) * rows.pitch;
            fill_blocks(random, row, c.blocks, info.block_bytes);
            for (int64_t b = 0; b < c.blocks && c.scale >= 0; ++b) {
                row[b * info.block_bytes] = uint8_t(c.scale);
                row[b * info.block_bytes + 1] = uint8_t(c.scale >> 8);
            }
        }
        return rows;
    }
    std::vector<float> dense(size_t(rows.n * c.rows));
    c.input->fill(random, dense.data(), rows.n * c.rows, info.block);
    rows.values.resize(size_t(rows.stride * c.rows));
    rows.blocks.assign(rows.pitch * size_t(c.rows), padding);
    for (int64_t r = 0; r < c.rows; ++r) {
        float * x = rows.values.data() + r * rows.stride;
        std::copy_n(dense.begin() + r * rows.n, rows.n, x);
        tq_encode_row(type, x, rows.blocks.data() + size_t(r) * rows.pitch, rows.n);
    }
    return rows;
}

#endif
