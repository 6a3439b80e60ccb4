// The contract of turboquant.h apart from the numbers: the type table, every error status, strides, thread counts and
// concurrent use.
#include "buffer.h"
#include "check.h"
#include "inputs.h"
#include "tripwire.h"

#include <algorithm>
#include <thread>

namespace {

// What is released never changes, whatever is added to the list.
void released_types() {
    const struct { const char * name; tq_type type; int bits, block, bytes, id; } want[] = {
        {"turbo4", TQ_TURBO4, 4, 128, 66, 512}, {"turbo4_64", TQ_TURBO4_64, 4, 64, 34, 513},
        {"turbo4_32", TQ_TURBO4_32, 4, 32, 18, 514}, {"turbo3", TQ_TURBO3, 3, 128, 50, 515},
        {"turbo3_64", TQ_TURBO3_64, 3, 64, 26, 516}, {"turbo3_32", TQ_TURBO3_32, 3, 32, 14, 517},
        {"turbo2", TQ_TURBO2, 2, 128, 34, 518}, {"turbo2_64", TQ_TURBO2_64, 2, 64, 18, 519},
        {"turbo2_32", TQ_TURBO2_32, 2, 32, 10, 520}, {"turbo4_tcq", TQ_TURBO4_TCQ, 4, 128, 66, 525},
        {"turbo4_tcq_64", TQ_TURBO4_TCQ_64, 4, 64, 34, 526}, {"turbo4_tcq_32", TQ_TURBO4_TCQ_32, 4, 32, 18, 527},
        {"turbo3_tcq", TQ_TURBO3_TCQ, 3, 128, 50, 528}, {"turbo3_tcq_64", TQ_TURBO3_TCQ_64, 3, 64, 26, 529},
        {"turbo3_tcq_32", TQ_TURBO3_TCQ_32, 3, 32, 14, 530}, {"turbo2_tcq", TQ_TURBO2_TCQ, 2, 128, 34, 531},
        {"turbo2_tcq_64", TQ_TURBO2_TCQ_64, 2, 64, 18, 532}, {"turbo2_tcq_32", TQ_TURBO2_TCQ_32, 2, 32, 10, 533}};
    int place = 0;
    for (const auto & w : want) {
        check::Case type_case(w.name);
        CHECK_EQ(int(w.type), place++);
        const tq_type_info * info = tq_type_get(w.type);
        if (!CHECK(info != nullptr)) continue;
        CHECK_EQ(std::string(info->name), w.name);
        CHECK_EQ(info->bits, w.bits);
        CHECK_EQ(info->block, w.block);
        CHECK_EQ(info->block_bytes, w.bytes);
        CHECK_EQ(info->file_id, w.id);
        CHECK_EQ(int(info->family), place - 1 - (place - 1) % 3);
    }
    CHECK_EQ(sizeof(tq_query128), 136u);
    CHECK_EQ(sizeof(tq_query64), 72u);
    CHECK_EQ(sizeof(tq_query32), 40u);
}

void type_table() {
    for (int t = 0; t < TQ_TYPE_COUNT; ++t) {
        const tq_type type = tq_type(t);
        const tq_type_info * info = tq_type_get(type);
        check::Case type_case("type ", t);
        if (!CHECK(info != nullptr)) continue;
        CHECK_EQ(info->block_bytes, 2 + info->block * info->bits / 8);
        CHECK(info->levels >= 1 << info->bits);
        CHECK(info->step > 0);
        for (int i = 0; i < info->levels; ++i) {
            CHECK_EQ(int(info->codebook[i]), -int(info->codebook[info->levels - 1 - i])); // symmetric
            if (i) CHECK(info->codebook[i] > info->codebook[i - 1]);
        }
        CHECK_EQ(int(info->codebook[info->levels - 1]), 127);
        const tq_type_info & first = *tq_type_get(info->family);
        CHECK_EQ(int(first.family), int(info->family));
        CHECK_EQ(first.block, 128);
        CHECK_EQ(std::string(info->name),
                 first.name + (info->block == 128 ? std::string() : "_" + std::to_string(info->block)));
        for (int other = 0; other < t; ++other) CHECK(tq_type_get(tq_type(other))->file_id != info->file_id);
        CHECK_EQ(tq_type_from_name(info->name), type);
        CHECK_EQ(tq_row_bytes(type, 0), 0u);
        CHECK_EQ(tq_row_bytes(type, 10 * info->block), size_t(10 * info->block_bytes));
        CHECK_EQ(tq_row_bytes(type, info->block + 1), 0u);
        CHECK_EQ(tq_row_bytes(type, info->block - 1), 0u);
        CHECK_EQ(tq_row_bytes(type, -info->block), 0u);
        CHECK_EQ(tq_query_bytes(info->block, 3 * info->block), size_t(3 * (info->block + 8)));
        const tq_row_info * row = tq_row_get(t);
        if (!CHECK(row != nullptr)) continue;
        CHECK_EQ(std::string(row->name), info->name);
        CHECK_EQ(row->block, info->block);
        CHECK_EQ(row->block_bytes, info->block_bytes);
    }
    const struct { int type; const char * name; int bytes; } rows[] = {
        {TQ_ROW_F16, "f16", 64}, {TQ_ROW_BF16, "bf16", 64}, {TQ_ROW_Q8_0, "q8_0", 34}, {TQ_ROW_Q4_0, "q4_0", 18},
        {TQ_ROW_F32, "f32", 128}};
    int number = 64;
    for (const auto & want : rows) {
        check::Case row_case(want.name);
        CHECK_EQ(want.type, number++);
        const tq_row_info * row = tq_row_get(want.type);
        if (!CHECK(row != nullptr)) continue;
        CHECK_EQ(std::string(row->name), want.name);
        CHECK_EQ(row->block, 32);
        CHECK_EQ(row->block_bytes, want.bytes);
    }
    for (const int type : {-1, int(TQ_TYPE_COUNT), 63, number}) CHECK(tq_row_get(type) == nullptr);
    for (const int t : {-1, int(TQ_TYPE_COUNT), 1000}) {
        CHECK(tq_type_get(tq_type(t)) == nullptr);
        CHECK_EQ(tq_row_bytes(tq_type(t), 128), 0u);
        CHECK_EQ(tq_type_for_head(tq_type(t), 128), TQ_TYPE_COUNT);
    }
    for (const char * name : {"", "turbo", "turbo4_128", "TURBO4", "turbo5", static_cast<const char *>(nullptr)})
        CHECK_EQ(tq_type_from_name(name), TQ_TYPE_COUNT);

    const struct { int64_t head; int offset; } heads[] = {{128, 0}, {256, 0}, {512, 0}, {64, 1}, {192, 1}, {576, 1},
                                                          {32, 2}, {96, 2}, {160, 2}, {80, -1}, {112, -1}, {1, -1},
                                                          {0, -1}, {-128, -1}};
    for (const auto & h : heads)
        for (int t = 0; t < TQ_TYPE_COUNT; ++t) {
            check::Case case_("head ", h.head, ", type ", t);
            const tq_type first = tq_type_get(tq_type(t))->family;
            const tq_type want_type = h.offset < 0 ? TQ_TYPE_COUNT : tq_type(first + h.offset);
            CHECK_EQ(tq_type_for_head(tq_type(t), h.head), want_type);
        }

    for (const int block : {0, 1, 16, 33, 256, -128}) CHECK_EQ(tq_query_bytes(block, 256), 0u);
    CHECK_EQ(tq_query_bytes(128, 64), 0u);
    CHECK_EQ(tq_query_bytes(32, -32), 0u);
    CHECK(tq_signs(1) && tq_signs(2) && tq_signs(1) != tq_signs(2));
    CHECK(!tq_signs(0) && !tq_signs(3));
}

void status_texts() {
    for (int s = TQ_OK; s <= TQ_ERROR_ARGUMENT; ++s) {
        const char * text = tq_status_text(tq_status(s));
        if (!CHECK(text && *text)) continue;
        CHECK(text[std::strlen(text) - 1] != '.');
        for (int other = TQ_OK; other < s; ++other) CHECK(std::string(text) != tq_status_text(tq_status(other)));
    }
    CHECK(tq_status_text(tq_status(99)) != nullptr);
}

void row_function_errors() {
    Buffer<float> x(128), y(128);
    Buffer<uint8_t> bytes(66);
    std::memset(bytes.data(), 0, 66);
    const uint8_t untouched = 0x77;
    for (int i = 0; i < 128; ++i) x[size_t(i)] = float(i);
    std::memset(y.data(), untouched, y.bytes());

    struct Arguments { int type; bool null_src, null_dst; int64_t rows, n; int threads; tq_status want; };
    const Arguments cases[] = {
        {-1, false, false, 1, 128, 1, TQ_ERROR_TYPE},
        {TQ_TYPE_COUNT, false, false, 1, 128, 1, TQ_ERROR_TYPE},
        {TQ_TURBO4, false, false, -1, 128, 1, TQ_ERROR_LENGTH},
        {TQ_TURBO4, false, false, 1, -128, 1, TQ_ERROR_LENGTH},
        {TQ_TURBO4, false, false, 1, 127, 1, TQ_ERROR_LENGTH},
        {TQ_TURBO4, false, false, 1, 64, 1, TQ_ERROR_LENGTH},
        {TQ_TURBO4_64, false, false, 1, 32, 1, TQ_ERROR_LENGTH},
        {TQ_TURBO4, false, false, 1, 128, 0, TQ_ERROR_ARGUMENT},
        {TQ_TURBO4, false, false, 1, 128, -3, TQ_ERROR_ARGUMENT},
        {TQ_TURBO4, true, false, 1, 128, 1, TQ_ERROR_NULL},
        {TQ_TURBO4, false, true, 1, 128, 1, TQ_ERROR_NULL},
        {TQ_TURBO4, true, true, 0, 128, 1, TQ_OK}, // nothing to do needs no pointers
        {TQ_TURBO4, true, true, 1, 0, 1, TQ_OK},
    };
    for (const Arguments & a : cases) {
        check::Case case_("type ", a.type, ", rows ", a.rows, ", n ", a.n, ", threads ", a.threads);
        tq_encode_report report = {7, 7};
        const auto type = tq_type(a.type);
        const float * floats = a.null_src ? nullptr : x.data();
        const uint8_t * source = a.null_src ? nullptr : bytes.data();
        Buffer<uint8_t> out(66);
        std::memset(out.data(), untouched, 66);
        CHECK_EQ(tq_encode(type, floats, 128, a.null_dst ? nullptr : out.data(), 66, a.rows, a.n, a.threads, &report),
                 a.want);
        for (size_t i = 0; i < 66; ++i) CHECK_EQ(int(out[i]), int(untouched)); // refused: nothing written
        CHECK_EQ(report.nonfinite + report.saturated, 0);
        for (const auto function : {tq_decode, tq_decode_rotated})
            CHECK_EQ(function(type, source, 66, a.null_dst ? nullptr : y.data(), 128, a.rows, a.n, a.threads), a.want);
    }
    for (size_t i = 0; i < y.bytes(); ++i) CHECK_EQ(int(reinterpret_cast<uint8_t *>(y.data())[i]), int(untouched));
    CHECK_EQ(tq_encode(TQ_TURBO4, x.data(), 128, bytes.data(), 66, 1, 128, 1, nullptr), TQ_OK); // report may be null
}

void block_function_errors() {
    Buffer<float> x(128), y(128);
    for (int i = 0; i < 128; ++i) x[size_t(i)] = y[size_t(i)] = float(i);
    Buffer<uint8_t> query(136), bytes(66);
    std::memset(bytes.data(), 0, 66);
    float out = 0;
    for (const auto function : {tq_rotate, tq_unrotate}) {
        for (const int block : {0, 16, 127, 256, -32})
            CHECK_EQ(function(block, x.data(), y.data(), 128, 1), TQ_ERROR_TYPE);
        CHECK_EQ(function(128, x.data(), y.data(), 64, 1), TQ_ERROR_LENGTH);
        CHECK_EQ(function(32, x.data(), y.data(), -32, 1), TQ_ERROR_LENGTH);
        CHECK_EQ(function(128, x.data(), y.data(), 128, 0), TQ_ERROR_ARGUMENT);
        CHECK_EQ(function(128, nullptr, y.data(), 128, 1), TQ_ERROR_NULL);
        CHECK_EQ(function(128, x.data(), nullptr, 128, 1), TQ_ERROR_NULL);
        CHECK_EQ(function(128, nullptr, nullptr, 0, 1), TQ_OK);
    }
    CHECK_EQ(tq_query(100, x.data(), query.data(), 100), TQ_ERROR_TYPE);
    CHECK_EQ(tq_query(128, x.data(), query.data(), 100), TQ_ERROR_LENGTH);
    CHECK_EQ(tq_query(128, nullptr, query.data(), 128), TQ_ERROR_NULL);
    CHECK_EQ(tq_query(128, x.data(), nullptr, 128), TQ_ERROR_NULL);
    CHECK_EQ(tq_query(128, nullptr, nullptr, 0), TQ_OK);
    CHECK_EQ(tq_query(128, x.data(), query.data(), 128), TQ_OK);

    CHECK_EQ(tq_dot(tq_type(-1), bytes.data(), 66, query.data(), &out, 1, 128), TQ_ERROR_TYPE);
    CHECK_EQ(tq_dot(TQ_TURBO4, bytes.data(), 66, query.data(), &out, 1, 100), TQ_ERROR_LENGTH);
    CHECK_EQ(tq_dot(TQ_TURBO4, bytes.data(), 66, query.data(), &out, -1, 128), TQ_ERROR_LENGTH);
    CHECK_EQ(tq_dot(TQ_TURBO4, nullptr, 66, query.data(), &out, 1, 128), TQ_ERROR_NULL);
    CHECK_EQ(tq_dot(TQ_TURBO4, bytes.data(), 66, nullptr, &out, 1, 128), TQ_ERROR_NULL);
    CHECK_EQ(tq_dot(TQ_TURBO4, bytes.data(), 66, query.data(), nullptr, 1, 128), TQ_ERROR_NULL);
    CHECK_EQ(tq_dot(TQ_TURBO4, nullptr, 66, nullptr, nullptr, 0, 128), TQ_OK);
    out = 5;
    CHECK_EQ(tq_dot(TQ_TURBO4, bytes.data(), 66, nullptr, &out, 1, 0), TQ_OK); // an empty sum
    CHECK_EQ(out, 0.0f);
}

void attention_errors() {
    std::vector<float> q(2 * 128), out(2 * 128);
    std::vector<uint8_t> k(66, 0), v(66, 0);
    const auto arguments = [&] {
        tq_attention_args a = {};
        a.q = q.data(); a.k = k.data(); a.v = v.data(); a.out = out.data();
        a.type_k = a.type_v = TQ_TURBO4;
        a.n_head = 2;
        a.n_kv_head = a.n_query = a.n_kv = a.threads = 1;
        a.head_k = a.head_v = 128;
        a.scale = 1;
        return a;
    };
    tq_attention_args a = arguments();
    CHECK_EQ(tq_attention(&a), TQ_OK);
    CHECK_EQ(tq_attention(nullptr), TQ_ERROR_NULL);
#define REFUSED(field, value, status)              \
    do {                                           \
        check::Case case_(#field " = " #value);    \
        a = arguments();                           \
        a.field = value;                           \
        CHECK_EQ(tq_attention(&a), status);        \
    } while (0)
    REFUSED(q, nullptr, TQ_ERROR_NULL);
    REFUSED(k, nullptr, TQ_ERROR_NULL);
    REFUSED(v, nullptr, TQ_ERROR_NULL);
    REFUSED(out, nullptr, TQ_ERROR_NULL);
    REFUSED(type_k, tq_type(-1), TQ_ERROR_TYPE);
    REFUSED(type_v, TQ_TYPE_COUNT, TQ_ERROR_TYPE);
    REFUSED(n_head, 0, TQ_ERROR_LENGTH);
    REFUSED(n_kv_head, 0, TQ_ERROR_LENGTH);
    REFUSED(n_kv_head, 3, TQ_ERROR_LENGTH);
    REFUSED(n_query, -1, TQ_ERROR_LENGTH);
    REFUSED(n_kv, -1, TQ_ERROR_LENGTH);
    REFUSED(head_k, 64, TQ_ERROR_LENGTH);
    REFUSED(head_v, 0, TQ_ERROR_LENGTH);
    REFUSED(threads, 0, TQ_ERROR_ARGUMENT);
    tq_attention_window window;
    const std::vector<float> exact(128);
#define REFUSED_WINDOW(field, value, status)                                         \
    do {                                                                             \
        check::Case case_("window " #field " = " #value);                            \
        window = {exact.data(), exact.data(), TQ_ROW_F32, TQ_ROW_F32, 1};            \
        window.field = value;                                                        \
        REFUSED(window, &window, status);                                            \
    } while (0)
    REFUSED_WINDOW(rows, 1, TQ_OK);
    REFUSED_WINDOW(k, nullptr, TQ_ERROR_NULL);
    REFUSED_WINDOW(v, nullptr, TQ_ERROR_NULL);
    REFUSED_WINDOW(type_k, -1, TQ_ERROR_TYPE);
    REFUSED_WINDOW(type_v, TQ_TYPE_COUNT, TQ_ERROR_TYPE);
    REFUSED_WINDOW(rows, -1, TQ_ERROR_LENGTH);
    REFUSED_WINDOW(rows, 2, TQ_ERROR_LENGTH);
#undef REFUSED_WINDOW
#undef REFUSED
    a = arguments();
    window = {exact.data(), exact.data(), TQ_ROW_F32, TQ_ROW_F32, 1};
    a.window = &window;
    a.k = a.v = nullptr; // every row is in the window
    CHECK_EQ(tq_attention(&a), TQ_OK);
    a = arguments();
    a.n_query = 0;
    a.q = nullptr;
    CHECK_EQ(tq_attention(&a), TQ_OK);
    a = arguments();
    a.n_kv = 0; // nothing to attend to: zeros
    std::fill(out.begin(), out.end(), 1.0f);
    CHECK_EQ(tq_attention(&a), TQ_OK);
    for (const float x : out) CHECK_EQ(x, 0.0f);
}

void reports() {
    const int64_t rows = 9, n = 4 * 128;
    std::vector<float> x(size_t(rows * n));
    std::vector<uint8_t> bytes(size_t(rows) * tq_row_bytes(TQ_TURBO3, n)), clean(bytes.size());
    Random r(5);
    for (float & value : x) value = r.normal();
    CHECK_EQ(tq_encode(TQ_TURBO3, x.data(), n, clean.data(), 200, rows, n, 1, nullptr), TQ_OK);
    x[0 * 512 + 5] = NAN;                                  // row 0, block 0: two bad values, one bad block
    x[0 * 512 + 6] = INFINITY;
    x[3 * 512 + 3 * 128 + 127] = -INFINITY;                // row 3, block 3
    for (int i = 0; i < 128; ++i) x[5 * 512 + 128 + size_t(i)] *= 1e6f; // row 5, block 1
    for (const int threads : {1, 2, 5}) {
        tq_encode_report report = {99, 99};
        CHECK_EQ(tq_encode(TQ_TURBO3, x.data(), n, bytes.data(), 200, rows, n, threads, &report), TQ_OK);
        CHECK_EQ(report.nonfinite, 2);
        CHECK_EQ(report.saturated, 1);
        for (int64_t b = 0; b < rows * 4; ++b) {
            check::Case case_("threads ", threads, ", block ", b);
            const uint8_t * got = bytes.data() + b * 50;
            if (b == 0 || b == 3 * 4 + 3) {
                for (int i = 0; i < 50; ++i) CHECK_EQ(int(got[i]), 0); // stored as zeros
            } else if (b == 5 * 4 + 1) {
                CHECK_EQ(got[0] | got[1] << 8, 0x7bff); // the largest finite scale
                CHECK(std::memcmp(got + 2, clean.data() + b * 50 + 2, 48) == 0);
            } else {
                CHECK(std::memcmp(got, clean.data() + b * 50, 50) == 0); // neighbours are unaffected
            }
        }
    }
}

// Any number of threads, including more than there are rows: the same bytes and floats, and the gaps stay.
void threads_agree() {
    for (const int64_t rows : {1, 2, 3, 127, 128, 129}) {
        const int64_t n = 3 * 64, stride = n + 7;
        const size_t row_bytes = tq_row_bytes(TQ_TURBO4_64, n), byte_stride = row_bytes + 1;
        const size_t span = size_t((rows - 1) * stride + n), byte_span = size_t(rows - 1) * byte_stride + row_bytes;
        Buffer<float> x(span), first_floats(span);
        Buffer<uint8_t> first(byte_span);
        Random r{uint64_t(rows)};
        for (size_t i = 0; i < span; ++i) x[i] = r.normal();
        Buffer<float> first_rotated(size_t(rows * 64)), rotated(size_t(rows * 64));
        for (const int threads : {1, 2, 3, 8, 200}) {
            check::Case case_(rows, " rows, ", threads, " threads");
            Buffer<float> floats(span);
            Buffer<uint8_t> bytes(byte_span);
            const tq_type type = TQ_TURBO4_64;
            CHECK_EQ(tq_encode(type, x.data(), stride, bytes.data(), byte_stride, rows, n, threads, nullptr), TQ_OK);
            CHECK_EQ(tq_decode(type, bytes.data(), byte_stride, floats.data(), stride, rows, n, threads), TQ_OK);
            CHECK_EQ(tq_rotate(64, x.data(), rotated.data(), rows * 64, threads), TQ_OK);
            CHECK(bytes.intact() && floats.intact() && rotated.intact());
            if (threads == 1) {
                std::memcpy(first.data(), bytes.data(), byte_span);
                std::memcpy(first_floats.data(), floats.data(), floats.bytes());
                std::memcpy(first_rotated.data(), rotated.data(), rotated.bytes());
            }
            CHECK(std::memcmp(bytes.data(), first.data(), byte_span) == 0);
            CHECK(std::memcmp(floats.data(), first_floats.data(), floats.bytes()) == 0);
            CHECK(std::memcmp(rotated.data(), first_rotated.data(), rotated.bytes()) == 0);
        }
    }
}

// One layer's attention, and what the scalar kernels make of it.
struct Attention {
    static constexpr int64_t n_head = 4, n_kv_head = 2, n_query = 5, n_kv = 1000, head = 128;
    std::vector<float> q, want;
    std::vector<uint8_t> k, v;

    explicit Attention(Random & r) : q(size_t(n_head * n_query * head)) {
        std::vector<float> x(size_t(n_kv_head * n_kv * head));
        const auto encoded = [&](tq_type type) {
            for (float & value : x) value = r.normal();
            std::vector<uint8_t> bytes(tq_row_bytes(type, int64_t(x.size())));
            tq_encode_row(type, x.data(), bytes.data(), int64_t(x.size()));
            return bytes;
        };
        for (float & value : q) value = r.normal();
        k = encoded(TQ_TURBO4);
        v = encoded(TQ_TURBO3);
        CHECK_EQ(tq_kernels_select("scalar"), TQ_OK);
        want = run();
    }
    std::vector<float> run() const { return run(k.data()); }
    std::vector<float> run(const uint8_t * keys) const {
        std::vector<float> out(q.size());
        tq_attention_args a = {};
        a.q = q.data(); a.k = keys; a.v = v.data(); a.out = out.data();
        a.type_k = TQ_TURBO4; a.type_v = TQ_TURBO3;
        a.n_head = n_head; a.n_kv_head = n_kv_head; a.n_query = n_query; a.n_kv = n_kv;
        a.head_k = a.head_v = head;
        a.scale = 0.1f;
        a.threads = 1;
        CHECK_EQ(tq_attention(&a), TQ_OK);
        return out;
    }
    void check_any_kernels() const { // some round the weights of V to 8 bits
        const std::vector<float> out = run();
        double error = 0, norm = 0;
        for (size_t i = 0; i < out.size(); ++i) {
            error += (out[i] - want[i]) * (out[i] - want[i]);
            norm += want[i] * want[i];
        }
        CHECK(std::sqrt(error) <= 0.01 * std::sqrt(norm));
    }
};

#if !defined(_WIN32)
// A selection in the middle of a call is for later calls: the results are those of the kernels that the call began with,
// to the bit.
void selection_during_a_call() {
    Random r(12);
    const Attention attention(r);
    std::vector<std::string> names;
    std::vector<std::vector<float>> want;
    for (int i = 0; i < tq_kernels_count(); ++i) {
        if (!tq_kernels_supported(i)) continue;
        names.push_back(tq_kernels_name(i));
        CHECK_EQ(tq_kernels_select(names.back().c_str()), TQ_OK);
        want.push_back(attention.run());
    }
    CHECK(names.size() == 1 || want.front() != want.back()); // else the test would see nothing
    for (size_t a = 0; a < names.size(); ++a)
        for (size_t b = 0; b < names.size(); ++b) {
            check::Case case_(names[a], ", then ", names[b]);
            CHECK_EQ(tq_kernels_select(names[a].c_str()), TQ_OK);
            const size_t middle = attention.k.size() / 4; // of the first KV head: the second is still to come
            const Tripwire keys(attention.k, middle, [&] { CHECK_EQ(tq_kernels_select(names[b].c_str()), TQ_OK); });
            CHECK(attention.run(keys.data()) == want[a]);
            CHECK(keys.tripped());
            CHECK_EQ(std::string(tq_kernels_selected()), names[b]);
        }
    CHECK_EQ(tq_kernels_select(nullptr), TQ_OK);
}
#endif

// Many callers at once, while the selection of kernels changes under them.
void concurrent_use() {
    const int64_t n = 128 * 4;
    std::vector<float> x(static_cast<size_t>(n));
    Random r(11);
    for (float & value : x) value = r.normal();
    CHECK_EQ(tq_kernels_select("scalar"), TQ_OK);
    const Attention attention(r);
    std::vector<std::vector<uint8_t>> want(TQ_TYPE_COUNT);
    std::vector<std::vector<float>> want_floats(TQ_TYPE_COUNT);
    for (int t = 0; t < TQ_TYPE_COUNT; ++t) {
        want[size_t(t)].resize(tq_row_bytes(tq_type(t), n));
        want_floats[size_t(t)].resize(size_t(n));
        tq_encode_row(tq_type(t), x.data(), want[size_t(t)].data(), n);
        tq_decode_row(tq_type(t), want[size_t(t)].data(), want_floats[size_t(t)].data(), n);
    }
    std::atomic<bool> stop{false};
    std::thread selector([&] {
        for (int i = 0; !stop; i = (i + 1) % tq_kernels_count())
            if (tq_kernels_supported(i)) CHECK_EQ(tq_kernels_select(tq_kernels_name(i)), TQ_OK);
    });
    std::vector<std::thread> callers;
    for (int caller = 0; caller < 6; ++caller)
        callers.emplace_back([&, caller] {
            std::vector<uint8_t> bytes;
            std::vector<float> floats(static_cast<size_t>(n));
            for (int round = 0; round < 30; ++round) {
                const auto t = size_t((caller + round) % TQ_TYPE_COUNT);
                check::Case case_("caller ", caller, ", type ", t);
                bytes.assign(want[t].size(), 0);
                CHECK_EQ(tq_encode(tq_type(t), x.data(), n, bytes.data(), bytes.size(), 1, n, 2, nullptr), TQ_OK);
                CHECK(bytes == want[t]);
                CHECK_EQ(tq_decode(tq_type(t), bytes.data(), bytes.size(), floats.data(), n, 1, n, 1), TQ_OK);
                CHECK(std::memcmp(floats.data(), want_floats[t].data(), floats.size() * sizeof(float)) == 0);
                for (int i = 0; i < 5; ++i) attention.check_any_kernels();
            }
        });
    for (std::thread & caller : callers) caller.join();
    stop = true;
    selector.join();
    CHECK_EQ(tq_kernels_select(nullptr), TQ_OK);
}

} // namespace

int main() {
    released_types();
    type_table();
    status_texts();
    row_function_errors();
    block_function_errors();
    attention_errors();
    reports();
    threads_agree();
#if !defined(_WIN32)
    selection_during_a_call();
#endif
    concurrent_use();
    return check::summary();
}
