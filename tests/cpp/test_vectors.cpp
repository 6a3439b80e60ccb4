// The golden vectors of tests/vectors (see its README) against every supported kernel. The argument is that folder.
#include "buffer.h"
#include "check.h"
#include "inputs.h"

#include <fstream>

namespace {

bool parse_hex(const std::string & text, std::vector<uint8_t> & bytes) {
    bytes.clear();
    if (text.size() % 2) return false;
    for (size_t i = 0; i < text.size(); i += 2) {
        char * end = nullptr;
        const std::string byte = text.substr(i, 2);
        bytes.push_back(uint8_t(std::strtoul(byte.c_str(), &end, 16)));
        if (*end) return false;
    }
    return true;
}

// Floats are stored as their bits, little-endian.
float stored_float(const uint8_t * p) {
    return float_of(uint32_t(p[0]) | uint32_t(p[1]) << 8 | uint32_t(p[2]) << 16 | uint32_t(p[3]) << 24);
}

void run(tq_type type, const std::string & path) {
    const tq_type_info & info = *tq_type_get(type);
    std::ifstream file(path);
    if (!CHECK(file.good())) {
        std::fprintf(stderr, "%s: cannot be read\n", path.c_str());
        return;
    }
    int decoded = 0, encoded = 0;
    std::string line;
    while (std::getline(file, line)) {
        if (line.empty() || line[0] == '#') continue;
        std::istringstream fields(line);
        std::string what, name, block_hex, floats_hex;
        fields >> what >> name >> block_hex >> floats_hex;
        check::Case line_case(what, " ", name);
        std::vector<uint8_t> block, floats;
        const bool parsed = parse_hex(block_hex, block) && parse_hex(floats_hex, floats);
        if (!CHECK(parsed && int(block.size()) == info.block_bytes && int(floats.size()) == 4 * info.block)) continue;
        Buffer<uint8_t> source(block.size()), bytes(block.size());
        Buffer<float> values{size_t(info.block)};
        if (what == "decode") {
            ++decoded;
            std::memcpy(source.data(), block.data(), block.size());
            tq_decode_row(type, source.data(), values.data(), info.block);
            for (int i = 0; i < info.block; ++i) {
                const float want = stored_float(floats.data() + 4 * i);
                if (!CHECK(same(values[size_t(i)], want)))
                    std::fprintf(stderr, "value %d: got %a, want %a\n", i, double(values[size_t(i)]), double(want));
            }
        } else if (what == "encode") {
            ++encoded;
            for (int i = 0; i < info.block; ++i) values[size_t(i)] = stored_float(floats.data() + 4 * i);
            tq_encode_row(type, values.data(), bytes.data(), info.block);
            CHECK_EQ(first_difference(bytes.data(), block.data(), block.size()), -1);
        } else {
            CHECK(!"a line is neither decode nor encode");
        }
    }
    CHECK(decoded > 0);
    CHECK(encoded > 0);
}

} // namespace

int main(int argc, char ** argv) {
    if (argc != 2) {
        std::fprintf(stderr, "usage: %s tests/vectors\n", argv[0]);
        return EXIT_FAILURE;
    }
    for (int k = 0; k < tq_kernels_count(); ++k) {
        if (!tq_kernels_supported(k)) {
            std::printf("%s: skipped, not supported here\n", tq_kernels_name(k));
            continue;
        }
        CHECK_EQ(tq_kernels_select(tq_kernels_name(k)), TQ_OK);
        check::Case kernels_case(tq_kernels_selected());
        for (int t = 0; t < TQ_TYPE_COUNT; ++t) {
            const std::string name = tq_type_get(tq_type(t))->name;
            check::Case type_case(name);
            run(tq_type(t), std::string(argv[1]) + "/" + name + ".txt");
        }
    }
    return check::summary();
}
