// One table of kernels, named on the command line, against the scalar ones: the same bytes, the same floats, no access
// outside the buffers. Exits with 77 (skipped) where this CPU or this build cannot run them.
#include "buffer.h"
#include "check.h"
#include "inputs.h"

#include <memory>

namespace {

const char * kernels_under_test;
const int64_t sizes[] = {1, 2, 3, 127, 128, 129}; // blocks of a row, and rows

// Error class of tq_dot: relative to the sum of the blocks' magnitudes. The integer part is exact; one rounding for
// each factor and addition is allowed to differ.
constexpr double dot_bound = 1e-6;

void use(const char * name) {
    if (tq_kernels_select(name) != TQ_OK || std::strcmp(tq_kernels_selected(), name) != 0) {
        std::fprintf(stderr, "cannot select %s\n", name);
        std::exit(EXIT_FAILURE);
    }
}

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

void encode_matches(Random & r, tq_type type, const Buffer<float> & x) {
    const int64_t n = int64_t(x.size());
    const size_t bytes = tq_row_bytes(type, n);
    Buffer<uint8_t> want(bytes);
    tq_encode_report want_report, got_report;
    use("scalar");
    CHECK_EQ(tq_encode(type, x.data(), n, want.data(), bytes, 1, n, 1, &want_report), TQ_OK);
    use(kernels_under_test);
    auto source = placed_copy(r, x);
    auto got = placed<uint8_t>(r, bytes);
    CHECK_EQ(tq_encode(type, source->data(), n, got->data(), bytes, 1, n, 1, &got_report), TQ_OK);
    check_bytes(*got, want);
    CHECK_EQ(got_report.nonfinite, want_report.nonfinite);
    CHECK_EQ(got_report.saturated, want_report.saturated);
}

void decode_matches(Random & r, tq_type type, const Buffer<uint8_t> & encoded) {
    const int64_t n = int64_t(encoded.size()) / tq_type_get(type)->block_bytes * tq_type_get(type)->block;
    for (const auto function : {tq_decode, tq_decode_rotated}) {
        check::Case which(function == tq_decode ? "decode" : "decode_rotated");
        Buffer<float> want{size_t(n)};
        use("scalar");
        CHECK_EQ(function(type, encoded.data(), encoded.bytes(), want.data(), n, 1, n, 1), TQ_OK);
        use(kernels_under_test);
        auto source = placed_copy(r, encoded);
        auto got = placed<float>(r, size_t(n));
        CHECK_EQ(function(type, source->data(), encoded.bytes(), got->data(), n, 1, n, 1), TQ_OK);
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

void dot_matches(Random & r, tq_type type, const Buffer<uint8_t> & encoded, const Buffer<uint8_t> & query) {
    const int block = tq_type_get(type)->block;
    const size_t block_bytes = size_t(tq_type_get(type)->block_bytes), query_block_bytes = tq_query_bytes(block, block);
    const int64_t n = int64_t(encoded.size() / block_bytes) * block;
    use("scalar");
    double magnitude = 0;
    for (size_t b = 0; b < encoded.size() / block_bytes; ++b) {
        float part;
        CHECK_EQ(tq_dot(type, encoded.data() + b * block_bytes, block_bytes, query.data() + b * query_block_bytes,
                        &part, 1, block), TQ_OK);
        magnitude += std::fabs(double(part));
    }
    float want = 0, got = 0;
    CHECK_EQ(tq_dot(type, encoded.data(), encoded.bytes(), query.data(), &want, 1, n), TQ_OK);
    use(kernels_under_test);
    auto source = placed_copy(r, encoded);
    Buffer<uint8_t> prepared(query.size(), any_place(r), any_gap(r, sizeof(float)));
    std::memcpy(prepared.data(), query.data(), query.bytes());
    CHECK_EQ(tq_dot(type, source->data(), source->bytes(), prepared.data(), &got, 1, n), TQ_OK);
    if (std::isfinite(want)) {
        if (!CHECK(std::fabs(double(got) - want) <= dot_bound * magnitude))
            std::fprintf(stderr, "dot: got %a, want %a, magnitude %g\n", double(got), double(want), magnitude);
    } else {
        CHECK(same(got, want));
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

void types_match() {
    for (int t = 0; t < TQ_TYPE_COUNT; ++t) {
        const tq_type type = tq_type(t);
        const tq_type_info & info = *tq_type_get(type);
        check::Case type_case(info.name);
        Random r(uint64_t(1000 + t));
        for (const int64_t blocks : sizes) {
            check::Case size_case(blocks, " blocks");
            Buffer<float> x(size_t(blocks * info.block));
            Buffer<uint8_t> encoded(tq_row_bytes(type, blocks * info.block));
            Buffer<uint8_t> query(tq_query_bytes(info.block, blocks * info.block));
            for (const Input & input : inputs()) {
                check::Case input_case(input.name);
                input.fill(r, x.data(), int64_t(x.size()), info.block);
                encode_matches(r, type, x);
                use("scalar");
                tq_encode_row(type, x.data(), encoded.data(), int64_t(x.size()));
                decode_matches(r, type, encoded);
                tq_query_row(info.block, x.data(), query.data(), int64_t(x.size()));
                dot_matches(r, type, encoded, query);
            }
            {
                check::Case input_case("random blocks");
                fill_blocks(r, encoded.data(), blocks, info.block_bytes);
                fill_query(r, query.data(), blocks, info.block);
                decode_matches(r, type, encoded);
                dot_matches(r, type, encoded, query);
            }
            for (const uint16_t d : odd_scales()) {
                check::Case input_case("random indices, d = ", d);
                fill_blocks(r, encoded.data(), blocks, info.block_bytes);
                for (int64_t b = 0; b < blocks; ++b) {
                    encoded[size_t(b * info.block_bytes)] = uint8_t(d);
                    encoded[size_t(b * info.block_bytes + 1)] = uint8_t(d >> 8);
                }
                decode_matches(r, type, encoded);
            }
        }
    }
}

// A different rounding (a fused multiply-add, another order of a sum) changes few blocks in ten thousand.
void many_blocks_match() {
    for (int t = 0; t < TQ_TYPE_COUNT; ++t) {
        const tq_type type = tq_type(t);
        const tq_type_info & info = *tq_type_get(type);
        check::Case type_case(info.name, ", many blocks");
        Random r(uint64_t(5000 + t));
        Buffer<float> x(size_t(20000 * info.block));
        for (int64_t i = 0; i < int64_t(x.size()); ++i) x[size_t(i)] = r.normal();
        encode_matches(r, type, x);
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
                decode_matches(r, type, encoded);
                dot_matches(r, type, encoded, query);
            }
    }
}

void rotations_match() {
    for (const int block : {128, 64, 32}) {
        check::Case block_case("block ", block);
        Random r(uint64_t(3000 + block));
        for (const int64_t blocks : sizes) {
            check::Case size_case(blocks, " blocks");
            Buffer<float> x(size_t(blocks * block));
            for (const Input & input : inputs()) {
                check::Case input_case(input.name);
                input.fill(r, x.data(), int64_t(x.size()), block);
                rotate_matches(r, block, x);
                query_matches(r, block, x);
            }
        }
    }
}

// Many short rows, with gaps between them that must stay as they are.
void rows_match() {
    const int64_t row_blocks = 2;
    for (int t = 0; t < TQ_TYPE_COUNT; ++t) {
        const tq_type type = tq_type(t);
        const tq_type_info & info = *tq_type_get(type);
        check::Case type_case(info.name);
        Random r(uint64_t(4000 + t));
        for (const int64_t rows : sizes) {
            check::Case size_case(rows, " rows");
            const int64_t n = row_blocks * info.block, stride = n + 5;
            const size_t row_bytes = tq_row_bytes(type, n), byte_stride = row_bytes + 3;
            const size_t span = size_t((rows - 1) * stride + n), byte_span = size_t(rows - 1) * byte_stride + row_bytes;
            Buffer<float> x(span), want(span), got(span);
            Buffer<uint8_t> want_bytes(byte_span), got_bytes(byte_span);
            std::vector<float> want_dot(size_t(rows), 0.0f), got_dot(size_t(rows), 0.0f);
            std::vector<uint32_t> query(tq_query_bytes(info.block, n) / 4);
            for (size_t i = 0; i < span; ++i) x[i] = r.normal();
            for (const bool scalar : {true, false}) {
                use(scalar ? "scalar" : kernels_under_test);
                auto & bytes = scalar ? want_bytes : got_bytes;
                auto & floats = scalar ? want : got;
                CHECK_EQ(tq_encode(type, x.data(), stride, bytes.data(), byte_stride, rows, n, 2, nullptr), TQ_OK);
                CHECK_EQ(tq_decode(type, bytes.data(), byte_stride, floats.data(), stride, rows, n, 2), TQ_OK);
                CHECK_EQ(tq_query(info.block, x.data(), query.data(), n), TQ_OK);
                float * dots = (scalar ? want_dot : got_dot).data();
                CHECK_EQ(tq_dot(type, bytes.data(), byte_stride, query.data(), dots, rows, n), TQ_OK);
            }
            check_bytes(got_bytes, want_bytes); // fresh buffers hold one pattern, so gaps are compared too
            check_floats(got, want);
            for (size_t i = 0; i < size_t(rows); ++i)
                CHECK(std::fabs(double(got_dot[i]) - want_dot[i]) <= dot_bound * double(n) * 4);
        }
    }
}

} // namespace

int main(int argc, char ** argv) {
    if (argc != 2) {
        std::fprintf(stderr, "usage: %s KERNELS\n", argv[0]);
        return EXIT_FAILURE;
    }
    kernels_under_test = argv[1];
    const tq_status status = tq_kernels_select(kernels_under_test);
    if (status == TQ_ERROR_KERNELS_UNSUPPORTED) {
        std::printf("skipped: this CPU or this build cannot run %s\n", kernels_under_test);
        return check::exit_skipped;
    }
    if (!CHECK_EQ(status, TQ_OK)) return check::summary();
    types_match();
    many_blocks_match();
    extreme_sums_match();
    rotations_match();
    rows_match();
    return check::summary();
}
