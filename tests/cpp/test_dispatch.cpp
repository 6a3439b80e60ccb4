// Which kernels run. Each mode needs its own process, as TURBOQUANT_KERNELS is read once:
//   test_dispatch list            the public list and forcing by name
//   test_dispatch default         TURBOQUANT_KERNELS unset or empty: the best supported
//   test_dispatch forced NAME     TURBOQUANT_KERNELS=NAME honoured, or refused if unsupported
//   test_dispatch unknown         TURBOQUANT_KERNELS names no kernels
#include "check.h"
#include "inputs.h"

#include <iterator>
#include <thread>

namespace {

std::string name_of(const char * name) { return name ? name : "(null)"; }

std::string best() {
    for (int i = 0; i < tq_kernels_count(); ++i)
        if (tq_kernels_supported(i)) return tq_kernels_name(i);
    return "(none)";
}

int find(const char * name) {
    for (int i = 0; i < tq_kernels_count(); ++i)
        if (std::strcmp(tq_kernels_name(i), name) == 0) return i;
    return -1;
}

// What every checked function answers when TURBOQUANT_KERNELS cannot be honoured, and that the unchecked ones work.
void refused(tq_status want) {
    CHECK_EQ(tq_kernels_status(), want);
    CHECK(tq_kernels_selected() == nullptr);
    float x[128], y[128];
    uint8_t bytes[66], query[136], row[66];
    Random r(1);
    for (float & v : x) v = r.normal();
    CHECK_EQ(tq_encode(TQ_TURBO4, x, 128, bytes, 66, 1, 128, 1, nullptr), want);
    tq_encode_row(TQ_TURBO4, x, row, 128);
    tq_query_row(128, x, query, 128);
    const float dot_scalar = tq_dot_row(TQ_TURBO4, row, query, 128);
    CHECK_EQ(tq_decode(TQ_TURBO4, row, 66, y, 128, 1, 128, 1), want);
    CHECK_EQ(tq_decode_rotated(TQ_TURBO4, row, 66, y, 128, 1, 128, 1), want);
    CHECK_EQ(tq_rotate(128, x, y, 128, 1), want);
    CHECK_EQ(tq_unrotate(128, x, y, 128, 1), want);
    CHECK_EQ(tq_query(128, x, query, 128), want);
    float dot = 0;
    CHECK_EQ(tq_dot(TQ_TURBO4, row, 66, query, &dot, 1, 128), want);
    tq_attention_args a = {};
    a.q = x; a.k = row; a.v = row; a.out = y;
    a.type_k = a.type_v = TQ_TURBO4;
    a.n_head = a.n_kv_head = a.n_query = a.n_kv = a.threads = 1;
    a.head_k = a.head_v = 128;
    a.scale = 1;
    CHECK_EQ(tq_attention(&a), want);

    // A selection by name is the way out, and scalar is what the unchecked functions had used.
    CHECK_EQ(tq_kernels_select("scalar"), TQ_OK);
    CHECK_EQ(tq_kernels_status(), TQ_OK);
    CHECK_EQ(name_of(tq_kernels_selected()), "scalar");
    CHECK_EQ(tq_encode(TQ_TURBO4, x, 128, bytes, 66, 1, 128, 1, nullptr), TQ_OK);
    CHECK(std::memcmp(bytes, row, 66) == 0);
    CHECK_EQ(tq_dot(TQ_TURBO4, row, 66, query, &dot, 1, 128), TQ_OK);
    CHECK(same(dot, dot_scalar));
}

void list() {
    const char * order[] = {"avx512vbmi", "avx512vnni", "avx512", "avxvnni", "avx2", "neon_dotprod", "neon", "scalar"};
    CHECK(tq_kernels_count() >= 1);
    CHECK_EQ(name_of(tq_kernels_name(tq_kernels_count() - 1)), "scalar");
    CHECK_EQ(tq_kernels_supported(tq_kernels_count() - 1), 1);
    int last = -1;
    for (int i = 0; i < tq_kernels_count(); ++i) {
        int position = -1;
        for (int o = 0; o < int(std::size(order)); ++o)
            if (std::strcmp(order[o], tq_kernels_name(i)) == 0) position = o;
        CHECK(position > last); // known, and in the documented order
        last = position;
        std::printf("%-14s%s\n", tq_kernels_name(i), tq_kernels_supported(i) ? "" : "skipped: not supported here");
        const std::string before = name_of(tq_kernels_selected());
        if (tq_kernels_supported(i)) {
            CHECK_EQ(tq_kernels_select(tq_kernels_name(i)), TQ_OK);
            CHECK_EQ(name_of(tq_kernels_selected()), tq_kernels_name(i));
        } else {
            CHECK_EQ(tq_kernels_select(tq_kernels_name(i)), TQ_ERROR_KERNELS_UNSUPPORTED);
            CHECK_EQ(name_of(tq_kernels_selected()), before); // a refusal changes nothing
        }
    }
    for (const char * name : order)
        if (find(name) < 0) CHECK_EQ(tq_kernels_select(name), TQ_ERROR_KERNELS_UNSUPPORTED);
    CHECK_EQ(tq_kernels_select("scalar"), TQ_OK);
    for (const char * name : {"avx", "SCALAR", "scalar ", "sse9"})
        CHECK_EQ(tq_kernels_select(name), TQ_ERROR_KERNELS_UNKNOWN);
    CHECK_EQ(name_of(tq_kernels_selected()), "scalar");
    for (const char * name : {static_cast<const char *>(nullptr), ""}) {
        CHECK_EQ(tq_kernels_select("scalar"), TQ_OK);
        CHECK_EQ(tq_kernels_select(name), TQ_OK);
        CHECK_EQ(name_of(tq_kernels_selected()), best());
    }
    CHECK(tq_kernels_name(-1) == nullptr);
    CHECK(tq_kernels_name(tq_kernels_count()) == nullptr);
    CHECK_EQ(tq_kernels_supported(-1), 0);
    CHECK_EQ(tq_kernels_supported(tq_kernels_count()), 0);
}

// The first use comes from many threads at once.
void from_many_threads() {
    std::string seen[8];
    std::thread threads[8];
    for (int i = 0; i < 8; ++i) threads[i] = std::thread([&seen, i] { seen[i] = name_of(tq_kernels_selected()); });
    for (std::thread & thread : threads) thread.join();
    for (const std::string & name : seen) CHECK_EQ(name, name_of(tq_kernels_selected()));
}

} // namespace

int main(int argc, char ** argv) {
    const std::string mode = argc > 1 ? argv[1] : "";
    const char * variable = std::getenv("TURBOQUANT_KERNELS");
    if (mode != "list") from_many_threads();
    if (mode == "list") {
        list();
    } else if (mode == "default") {
        CHECK(!variable || !*variable);
        CHECK_EQ(tq_kernels_status(), TQ_OK);
        CHECK_EQ(name_of(tq_kernels_selected()), best());
    } else if (mode == "forced" && argc == 3) {
        CHECK_EQ(name_of(variable), argv[2]);
        const int i = find(argv[2]);
        if (i < 0 || !tq_kernels_supported(i)) {
            refused(TQ_ERROR_KERNELS_UNSUPPORTED);
        } else {
            CHECK_EQ(tq_kernels_status(), TQ_OK);
            CHECK_EQ(name_of(tq_kernels_selected()), argv[2]);
        }
    } else if (mode == "unknown") {
        CHECK(variable && *variable);
        refused(TQ_ERROR_KERNELS_UNKNOWN);
    } else {
        std::fprintf(stderr, "usage: %s list | default | forced NAME | unknown\n", argv[0]);
        return EXIT_FAILURE;
    }
    return check::summary();
}
