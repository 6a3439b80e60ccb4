// Speed of the codec on one core, for every kernel and type: encode, decode and rotate in GB/s of float32, compared
// with memcpy in the same run, and dot products in billions of multiply-adds per second.
//
//   cmake -S . -B build/tools -DTURBOQUANT_BUILD_TOOLS=ON -DTURBOQUANT_BUILD_PYTHON=OFF
//   cmake --build build/tools && build/tools/tools/bench_codec --help
#include "turboquant.h"

#include <algorithm>
#include <chrono>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <fstream>
#include <map>
#include <random>
#include <string>
#include <vector>

namespace {

const char * const usage =
    "usage: bench_codec [options]\n"
    "\n"
    "  --kernels NAME,...  kernels to run (default: all that this CPU supports)\n"
    "  --types NAME,...    types to run (default: all)\n"
    "  --sets NAME,...     working sets: l2, dram (default: both)\n"
    "  --seconds S         time for each measurement in each round (default 0.03)\n"
    "  --rounds N          rounds over all measurements; the best counts (default 3)\n"
    "  --json              machine-readable output\n"
    "  --help              this text\n"
    "\n"
    "GB/s count float32 bytes: read by encode and rotate, written by decode, copied by memcpy. The l2 set is 256 KiB\n"
    "of float32 that is used again and again; the dram set walks through 256 MiB (17 to 36 MiB when encoded, so that\n"
    "decode and dot may read from the last-level cache). Dot products are of rows of 128 values. Every kernel is\n"
    "checked against scalar before it is timed. A busy machine lowers the numbers: raise --rounds.\n";

constexpr int64_t slice_floats = 64 * 1024;         // one timed call: 256 KiB of float32
constexpr int64_t dram_floats = 64 * 1024 * 1024;   // 256 MiB, far beyond any cache
constexpr int64_t row = 128;                        // values of a row of dot products

struct Set {
    const char * name;
    int64_t floats;
};
const Set all_sets[] = {{"l2", slice_floats}, {"dram", dram_floats}};

enum Operation { encode, decode, rotate, dot, operation_count };
const char * const operation_names[] = {"encode", "decode", "rotate", "dot"};

[[noreturn]] void fail(const std::string & message) {
    std::fprintf(stderr, "bench_codec: %s\n", message.c_str());
    std::exit(2);
}

void require(tq_status status, const char * what) {
    if (status != TQ_OK) fail(std::string(what) + ": " + tq_status_text(status));
}

std::vector<std::string> split(const std::string & text) {
    std::vector<std::string> parts;
    for (size_t start = 0; start <= text.size();) {
        const size_t end = std::min(text.find(',', start), text.size());
        if (end > start) parts.push_back(text.substr(start, end - start));
        start = end + 1;
    }
    return parts;
}

struct Options {
    std::vector<std::string> kernels;
    std::vector<tq_type> types;
    std::vector<Set> sets;
    double seconds = 0.03;
    int rounds = 3;
    bool json = false;
};

Options parse(int argc, char ** argv) {
    Options o;
    for (int i = 1; i < argc; ++i) {
        const std::string option = argv[i];
        if (option == "--help" || option == "-h") {
            std::fputs(usage, stdout);
            std::exit(0);
        }
        if (option == "--json") {
            o.json = true;
            continue;
        }
        if (i + 1 == argc) fail("option " + option + " is unknown or lacks its value; see --help");
        const std::string value = argv[++i];
        if (option == "--kernels") {
            for (const std::string & name : split(value)) {
                const tq_status status = tq_kernels_select(name.c_str());
                if (status != TQ_OK) fail("kernels " + name + ": " + tq_status_text(status));
                o.kernels.push_back(name);
            }
        } else if (option == "--types") {
            for (const std::string & name : split(value)) {
                o.types.push_back(tq_type_from_name(name.c_str()));
                if (o.types.back() == TQ_TYPE_COUNT) fail("no type is named " + name + "; see --help");
            }
        } else if (option == "--sets") {
            for (const std::string & name : split(value)) {
                const Set * set = std::find_if(std::begin(all_sets), std::end(all_sets),
                                               [&](const Set & s) { return name == s.name; });
                if (set == std::end(all_sets)) fail("no working set is named " + name + "; l2 and dram are");
                o.sets.push_back(*set);
            }
        } else if (option == "--seconds" || option == "--rounds") {
            char * end = nullptr;
            const double number = std::strtod(value.c_str(), &end);
            if (*end || !(number > 0) || number > 3600) fail(option + " needs a positive number, got " + value);
            if (option == "--seconds") o.seconds = number;
            else o.rounds = std::max(1, int(number));
        } else {
            fail("option " + option + " is unknown; see --help");
        }
    }
    if (o.kernels.empty())
        for (int k = 0; k < tq_kernels_count(); ++k)
            if (tq_kernels_supported(k)) o.kernels.push_back(tq_kernels_name(k));
    if (o.types.empty())
        for (int t = 0; t < TQ_TYPE_COUNT; ++t) o.types.push_back(tq_type(t));
    if (o.sets.empty()) o.sets.assign(std::begin(all_sets), std::end(all_sets));
    return o;
}

// The floats and their encodings that all measurements share; they fit the largest working set.
struct Data {
    std::vector<float> x, y;
    std::vector<uint8_t> bytes;
    explicit Data(int64_t floats) : x(static_cast<size_t>(floats)), y(x.size()) {
        size_t most = 0;
        for (int t = 0; t < TQ_TYPE_COUNT; ++t) most = std::max(most, tq_row_bytes(tq_type(t), floats));
        bytes.resize(most);
        std::mt19937 random(1);
        std::normal_distribution<float> normal;
        for (int64_t i = 0; i < slice_floats; ++i) x[size_t(i)] = normal(random);
        for (int64_t i = slice_floats; i < floats; i += slice_floats)
            std::copy_n(x.begin(), slice_floats, x.begin() + i);
    }
};

// Items per second of the fastest of many calls; call(first) processes slice_floats values from `first` on.
template <typename Call> double best_rate(int64_t floats, double seconds, Call call) {
    using clock = std::chrono::steady_clock;
    int64_t first = 0;
    double best = 1e30, total = 0;
    for (int repeat = 0; repeat < 5 || total < seconds; ++repeat) {
        const auto start = clock::now();
        call(first);
        const double elapsed = std::chrono::duration<double>(clock::now() - start).count();
        best = std::min(best, elapsed);
        total += elapsed;
        first = (first + slice_floats) % floats;
    }
    return double(slice_floats) / best;
}

void check_against_scalar(const std::string & kernels, tq_type type, Data & data) {
    const size_t size = tq_row_bytes(type, slice_floats);
    std::vector<uint8_t> bytes(size);
    std::vector<float> floats(slice_floats);
    require(tq_kernels_select("scalar"), "scalar");
    tq_encode_row(type, data.x.data(), bytes.data(), slice_floats);
    tq_decode_row(type, bytes.data(), floats.data(), slice_floats);
    require(tq_kernels_select(kernels.c_str()), kernels.c_str());
    tq_encode_row(type, data.x.data(), data.bytes.data(), slice_floats);
    tq_decode_row(type, bytes.data(), data.y.data(), slice_floats);
    if (std::memcmp(bytes.data(), data.bytes.data(), size) != 0 ||
        std::memcmp(floats.data(), data.y.data(), floats.size() * sizeof(float)) != 0)
        fail(kernels + ", " + tq_type_get(type)->name + ": differs from scalar, so its speed means nothing");
}

// Bytes of float32 per second (dot: multiply-adds per second) of the selected kernels.
double measure(Operation operation, tq_type type, int64_t floats, double seconds, Data & data) {
    const tq_type_info & info = *tq_type_get(type);
    const auto offset = [&](int64_t first) { return tq_row_bytes(type, first); };
    const size_t row_bytes = tq_row_bytes(type, row);
    if (operation == encode)
        return sizeof(float) * best_rate(floats, seconds, [&](int64_t first) {
            tq_encode_row(type, data.x.data() + first, data.bytes.data() + offset(first), slice_floats);
        });
    if (operation == decode)
        return sizeof(float) * best_rate(floats, seconds, [&](int64_t first) {
            tq_decode_row(type, data.bytes.data() + offset(first), data.y.data() + first, slice_floats);
        });
    if (operation == rotate)
        return sizeof(float) * best_rate(floats, seconds, [&](int64_t first) {
            tq_rotate(info.block, data.x.data() + first, data.y.data() + first, slice_floats, 1);
        });
    std::vector<uint32_t> query(tq_query_bytes(info.block, row) / sizeof(uint32_t));
    std::vector<float> out(slice_floats / row);
    tq_query_row(info.block, data.x.data(), query.data(), row);
    return best_rate(floats, seconds, [&](int64_t first) {
        tq_dot(type, data.bytes.data() + offset(first), row_bytes, query.data(), out.data(), slice_floats / row, row);
    });
}

std::string cpu_name() {
    std::ifstream file("/proc/cpuinfo");
    for (std::string line; std::getline(file, line);)
        if (line.compare(0, 10, "model name") == 0) return line.substr(std::min(line.find(": ") + 2, line.size()));
    return "unknown CPU";
}

} // namespace

int main(int argc, char ** argv) {
    const Options o = parse(argc, argv);
    int64_t largest = 0;
    for (const Set & set : o.sets) largest = std::max(largest, set.floats);
    Data data(largest);
    std::map<std::string, double> copy;                               // set -> GB/s
    std::map<std::string, std::map<std::string, double>> best;        // set -> "kernels type operation" -> G/s
    const auto key = [](const std::string & kernels, tq_type type, int operation) {
        return kernels + " " + tq_type_get(type)->name + " " + operation_names[operation];
    };
    std::vector<std::string> kernels = o.kernels;
    if (std::find(kernels.begin(), kernels.end(), "scalar") == kernels.end()) kernels.push_back("scalar"); // the ratios

    for (const std::string & name : kernels)
        for (const tq_type type : o.types) check_against_scalar(name, type, data);
    for (int round = 0; round < o.rounds; ++round)
        for (const Set & set : o.sets) {
            double & rate = copy[set.name];
            rate = std::max(rate, 1e-9 * sizeof(float) * best_rate(set.floats, o.seconds, [&](int64_t first) {
                std::memcpy(data.y.data() + first, data.x.data() + first, slice_floats * sizeof(float));
            }));
            for (const tq_type type : o.types) {
                require(tq_kernels_select(nullptr), "default kernels"); // decode and dot read real blocks everywhere
                tq_encode_row(type, data.x.data(), data.bytes.data(), set.floats);
                for (const std::string & name : kernels) {
                    require(tq_kernels_select(name.c_str()), name.c_str());
                    for (int op = 0; op < operation_count; ++op) {
                        double & result = best[set.name][key(name, type, op)];
                        result = std::max(result, 1e-9 * measure(Operation(op), type, set.floats, o.seconds, data));
                    }
                }
            }
        }

    if (o.json) {
        std::printf("{\"cpu\": \"%s\", \"threads\": 1, \"results\": [", cpu_name().c_str());
        const char * separator = "\n";
        const auto print = [&](const char * set, const std::string & name, const char * type, const char * operation,
                               double rate) {
            const char * unit = std::strcmp(operation, "dot") == 0 ? "gmac_per_s" : "gb_per_s";
            std::printf("%s{\"set\": \"%s\", \"kernels\": \"%s\", ", separator, set, name.c_str());
            std::printf("\"type\": \"%s\", ", type);
            std::printf("\"operation\": \"%s\", \"%s\": %.3f}", operation, unit, rate);
            separator = ",\n";
        };
        for (const Set & set : o.sets) {
            print(set.name, "memcpy", "float32", "copy", copy[set.name]);
            for (const std::string & name : o.kernels)
                for (const tq_type type : o.types)
                    for (int op = 0; op < operation_count; ++op)
                        print(set.name, name, tq_type_get(type)->name, operation_names[op],
                              best[set.name][key(name, type, op)]);
        }
        std::printf("\n]}\n");
        return 0;
    }

    std::printf("%s, one core. GB/s of float32; dot in GMAC/s. Best of %d rounds.\n", cpu_name().c_str(), o.rounds);
    for (const Set & set : o.sets) {
        std::printf("\nWorking set %s, %lld KiB of float32: memcpy %.1f GB/s\n", set.name,
                    (long long) (set.floats * int64_t(sizeof(float)) / 1024), copy[set.name]);
        std::printf("%-13s%-11s", "kernels", "type");
        for (int op = 0; op < operation_count; ++op)
            std::printf(" | %7s%s %7s", operation_names[op], op == dot ? "" : " /memcpy", "/scalar");
        std::printf("\n");
        for (const std::string & name : o.kernels)
            for (const tq_type type : o.types) {
                std::printf("%-13s%-11s", name.c_str(), tq_type_get(type)->name);
                for (int op = 0; op < operation_count; ++op) {
                    const double rate = best[set.name][key(name, type, op)];
                    std::printf(" | %7.2f", rate);
                    if (op != dot) std::printf(" %7.2f", rate / copy[set.name]);
                    std::printf(" %7.1f", rate / best[set.name][key("scalar", type, op)]);
                }
                std::printf("\n");
            }
    }
    return 0;
}
