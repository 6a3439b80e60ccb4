// Compares one table of kernels, which the command line names, with the scalar kernels in the cases of the conformance
// list: the bytes and floats must be equal, with no access outside the buffers. The exit status is 77 (skipped) if this CPU
// or this build cannot run the kernels.
#include "buffer.h"
#include "check.h"
#include "codec.h"
#include "under_test.h"

#include <memory>

namespace {

// Error class of tq_dot: relative to the sum of the blocks' magnitudes. The integer part is exact; one rounding for
// each factor and addition is allowed to differ.
constexpr double dot_bound = 1e-6;

void check_floats(const Buffer<float> & got, const Buffer<float> & want) {
    const int64_t i = first_difference(got.data(), want.data(), int64_t(want.size()));
    if (i >= 0) {
        std::fprintf(stderr, "value %lld: got %a, want %a\n", (long long) i, double(got[size_t(i)]),
                     double(want[size_t(i)]));
    }
    CHECK_EQ(i, -1);
    CHECK(got.intact());
}

void check_bytes(const Buffer<uint8_t> & got, const Buffer<uint8_t> & want) {
    const int64_t i = first_difference(got.data(), want.data(), want.size());
    if (i >= 0)
        std::fprintf(stderr, "byte %lld: got %02x, want %02x\n", (long long) i, got[size_t(i)], want[size_t(i)]);
    CHECK_EQ(i, -1);
    CHECK(got.intact());
}

// Buffers of the kernels under test touch an inaccessible page, on either side, at any alignment.
Place any_place(Random & r) { return r.below(2) ? Place::at_end : Place::at_start; }
size_t any_gap(Random & r, size_t unit) { return r.below(2) ? 0 : unit * size_t(r.below(16)); }

template <typename T> std::unique_ptr<Buffer<T>> placed(Random & r, size_t count) {
    return std::make_unique<Buffer<T>>(count, any_place(r), any_gap(r, sizeof(T)));
}
template <typename T> std::unique_ptr<Buffer<T>> placed_copy(Random & r, const Buffer<T> & from) {
    auto to = placed<T>(r, from.size());
    std::memcpy(to->data(), from.data(), from.bytes());
    return to;
}

// Encoded rows and rows of floats, with strides.
struct Rows {
    tq_type type;
    int64_t n, rows, stride;
    size_t byte_stride;
    int threads;

    Rows(tq_type type_, const CodecCase & c)
        : type(type_), n(c.blocks * tq_type_get(type)->block), rows(c.rows), stride(n + c.pad_values),
          byte_stride(tq_row_bytes(type, n) + size_t(c.pad_bytes)), threads(c.rows > 1 ? 2 : 1) {}
    size_t floats() const { return size_t((rows - 1) * stride + n); }
    size_t bytes() const { return size_t(rows - 1) * byte_stride + tq_row_bytes(type, n); }
};

// New buffers have the same pattern, so that the gaps between rows are compared as well.
void encode_matches(Random & r, const Rows & a, const Buffer<float> & x, Buffer<uint8_t> & want) {
    tq_encode_report want_report, got_report;
    use("scalar");
    CHECK_EQ(tq_encode(a.type, x.data(), a.stride, want.data(), a.byte_stride, a.rows, a.n, 1, &want_report), TQ_OK);
    use(kernels_under_test);
    auto source = placed_copy(r, x);
    auto got = placed<uint8_t>(r, a.bytes());
    CHECK_EQ(tq_encode(a.type, source->data(), a.stride, got->data(), a.byte_stride, a.rows, a.n, a.threads,
                       &got_report), TQ_OK);
    check_bytes(*got, want);
    CHECK_EQ(got_report.nonfinite, want_report.nonfinite);
    CHECK_EQ(got_report.saturated, want_report.saturated);
}

void decode_matches(Random & r, const Rows & a, const Buffer<uint8_t> & encoded) {
    for (const auto function : {tq_decode, tq_decode_rotated}) {
        check::Case which(function == tq_decode ? "decode" : "decode_rotated");
        Buffer<float> want(a.floats());
        use("scalar");
        CHECK_EQ(function(a.type, encoded.data(), a.byte_stride, want.data(), a.stride, a.rows, a.n, 1), TQ_OK);
        use(kernels_under_test);
        auto source = placed_copy(r, encoded);
        auto got = placed<float>(r, a.floats());
        CHECK_EQ(function(a.type, source->data(), a.byte_stride, got->data(), a.stride, a.rows, a.n, a.threads), TQ_OK);
        check_floats(*got, want);
    }
}

void rotate_matches(Random & r, int block, const Buffer<float> & x) {
    const int64_t n = int64_t(x.size());
    for (const auto function : {tq_rotate, tq_unrotate}) {
        check::Case which(function == tq_rotate ? "rotate" : "unrotate");
        Buffer<float> want{size_t(n)};
        use("scalar");
        CHECK_EQ(function(block, x.data(), want.data(), n, 1), TQ_OK);
        use(kernels_under_test);
        auto source = placed_copy(r, x);
        auto got = placed<float>(r, size_t(n));
        CHECK_EQ(function(block, source->data(), got->data(), n, 1), TQ_OK);
        check_floats(*got, want);
        CHECK_EQ(function(block, source->data(), source->data(), n, 1), TQ_OK); // in place
        check_floats(*source, want);
    }
}

// A prepared query: per block float scale, int32 sum, int8 q[block].
void query_matches(Random & r, int block, const Buffer<float> & x) {
    const int64_t n = int64_t(x.size());
    const size_t bytes = tq_query_bytes(block, n), block_bytes = tq_query_bytes(block, block);
    Buffer<uint8_t> want(bytes);
    use("scalar");
    CHECK_EQ(tq_query(block, x.data(), want.data(), n), TQ_OK);
    use(kernels_under_test);
    auto source = placed_copy(r, x);
    Buffer<uint8_t> got(bytes, any_place(r), any_gap(r, sizeof(float)));
    CHECK_EQ(tq_query(block, source->data(), got.data(), n), TQ_OK);
    for (size_t b = 0; b < bytes; b += block_bytes) { // a NaN scale may be any NaN
        float want_scale, got_scale;
        std::memcpy(&want_scale, want.data() + b, 4);
        std::memcpy(&got_scale, got.data() + b, 4);
        if (std::isnan(want_scale) && std::isnan(got_scale)) std::memcpy(got.data() + b, want.data() + b, 4);
    }
    check_bytes(got, want);
}

void dot_matches(Random & r, const Rows & a, const Buffer<uint8_t> & encoded, const Buffer<uint8_t> & query) {
    const int block = tq_type_get(a.type)->block;
    const size_t block_bytes = size_t(tq_type_get(a.type)->block_bytes), query_block = tq_query_bytes(block, block);
    std::vector<float> want(size_t(a.rows), 0.0f), got(size_t(a.rows), 0.0f);
    std::vector<double> magnitude(size_t(a.rows), 0.0); // of the blocks of each row
    use("scalar");
    CHECK_EQ(tq_dot(a.type, encoded.data(), a.byte_stride, query.data(), want.data(), a.rows, a.n), TQ_OK);
    for (size_t row = 0; row < magnitude.size(); ++row)
        for (size_t b = 0; b < size_t(a.n / block); ++b) {
            const uint8_t * src = encoded.data() + row * a.byte_stride + b * block_bytes;
            magnitude[row] += std::fabs(double(tq_dot_row(a.type, src, query.data() + b * query_block, block)));
        }
    use(kernels_under_test);
    auto source = placed_copy(r, encoded);
    Buffer<uint8_t> prepared(query.size(), any_place(r), any_gap(r, sizeof(float)));
    std::memcpy(prepared.data(), query.data(), query.bytes());
    CHECK_EQ(tq_dot(a.type, source->data(), a.byte_stride, prepared.data(), got.data(), a.rows, a.n), TQ_OK);
    for (size_t row = 0; row < magnitude.size(); ++row) {
        const bool close = std::isfinite(want[row])
                               ? std::fabs(double(got[row]) - double(want[row])) <= dot_bound * magnitude[row]
                               : same(got[row], want[row]);
        if (!CHECK(close))
            std::fprintf(stderr, "dot of row %zu: got %a, want %a, magnitude %g\n", row, double(got[row]),
                         double(want[row]), magnitude[row]);
    }
}

// A query row that holds any values that a prepared query may, -127 ... 127, and an ordinary scale.
void fill_query(Random & r, uint8_t * bytes, int64_t blocks, int block) {
    for (int64_t b = 0; b < blocks; ++b, bytes += block + 8) {
        const float scale = r.normal();
        int32_t sum = 0;
        for (int i = 0; i < block; ++i) {
            const int8_t q = int8_t(r.below(4) ? r.below(255) - 127 : r.below(2) ? -127 : 127);
            sum += q;
            bytes[8 + i] = uint8_t(q);
        }
        std::memcpy(bytes, &scale, 4);
        std::memcpy(bytes + 4, &sum, 4);
    }
}

// The encoded rows are decoded again, and multiplied by the first row.
void encoded_rows_match(Random & r, const Rows & a, const CodecCase & c) {
    const int block = tq_type_get(a.type)->block;
    std::vector<float> dense(size_t(a.n * a.rows));
    c.input->fill(r, dense.data(), a.n * a.rows, block);
    Buffer<float> x(a.floats());
    for (int64_t row = 0; row < a.rows; ++row)
        std::memcpy(x.data() + row * a.stride, dense.data() + row * a.n, size_t(a.n) * sizeof(float));
    Buffer<uint8_t> encoded(a.bytes()), query(tq_query_bytes(block, a.n));
    encode_matches(r, a, x, encoded);
    decode_matches(r, a, encoded);
    use("scalar");
    tq_query_row(block, x.data(), query.data(), a.n);
    dot_matches(r, a, encoded, query);
}

void random_rows_match(Random & r, const Rows & a, const CodecCase & c) {
    const tq_type_info & info = *tq_type_get(a.type);
    Buffer<uint8_t> encoded(a.bytes()), query(tq_query_bytes(info.block, a.n));
    for (int64_t row = 0; row < a.rows; ++row) {
        uint8_t * bytes = encoded.data() + size_t(row) * a.byte_stride;
        fill_blocks(r, bytes, c.blocks, info.block_bytes);
        for (int64_t b = 0; b < c.blocks && c.scale >= 0; ++b) {
            bytes[b * info.block_bytes] = uint8_t(c.scale);
            bytes[b * info.block_bytes + 1] = uint8_t(c.scale >> 8);
        }
    }
    decode_matches(r, a, encoded);
    if (c.scale >= 0) return;
    fill_query(r, query.data(), c.blocks, info.block);
    dot_matches(r, a, encoded, query);
}

void conforms(const CodecCase & c) {
    check::Case case_(c.name);
    for (int t = 0; t < TQ_TYPE_COUNT; ++t) {
        const tq_type_info & info = *tq_type_get(tq_type(t));
        check::Case type_case(info.name);
        Random r(seed_of(c.name) + uint64_t(t));
        const CodecCase part = part_for(c, info);
        (c.input ? encoded_rows_match : random_rows_match)(r, Rows(tq_type(t), part), part);
    }
}

// The largest sums that the integer paths can meet: all indices at one end, the query at one end.
void extreme_sums_match() {
    for (int t = 0; t < TQ_TYPE_COUNT; ++t) {
        const tq_type type = tq_type(t);
        const tq_type_info & info = *tq_type_get(type);
        check::Case type_case(info.name);
        Random r(uint64_t(2000 + t));
        Buffer<uint8_t> encoded(tq_row_bytes(type, info.block)), query(tq_query_bytes(info.block, info.block));
        for (const uint8_t indices : {0x00, 0xff})
            for (const int8_t q : {-127, 127}) {
                check::Case case_("indices ", int(indices), ", query ", int(q));
                std::memset(encoded.data(), indices, encoded.bytes());
                encoded[0] = 0x00;
                encoded[1] = 0x3c; // 1.0
                std::memset(query.data(), uint8_t(q), query.bytes());
                const float scale = 1;
                const int32_t sum = q * info.block;
                std::memcpy(query.data(), &scale, 4);
                std::memcpy(query.data() + 4, &sum, 4);
                const Rows rows(type, {"", 1, 1, 0, 0, nullptr, -1, Extent::brief});
                decode_matches(r, rows, encoded);
                dot_matches(r, rows, encoded, query);
            }
    }
}

void conforms(const RotationCase & c) {
    check::Case case_(c.name);
    for (const int block : {128, 64, 32}) {
        check::Case block_case("block ", block);
        Random r(seed_of(c.name) + uint64_t(block));
        Buffer<float> x(size_t(c.blocks * c.rows * block));
        c.input->fill(r, x.data(), int64_t(x.size()), block);
        rotate_matches(r, block, x);
        query_matches(r, block, x);
    }
}

} // namespace

int main(int argc, char ** argv) {
    return test_kernels(argc, argv, [](Extent extent) {
        for (const CodecCase & c : codec_cases())
            if (c.extent <= extent) conforms(c);
        for (const RotationCase & c : rotation_cases())
            if (c.extent <= extent) conforms(c);
        extreme_sums_match();
    });
}
