// Prints cpp/metal/constants.h: the list of formats and the tables of their families for the Metal kernels, which
// cannot include C++ headers. tests/metal compares the file with the output:
//
//   make_metal_constants > cpp/metal/constants.h
#include "../cpp/src/format.h"

#include "../cpp/src/generic/trellis.h"

#include <cinttypes>
#include <cstdio>
#include <initializer_list>
#include <type_traits>

namespace turboquant {
namespace {

template <typename Family> constexpr int trellis_bits = 0;
template <int Bits> constexpr int trellis_bits<Trellis<Bits>> = Bits;
template <typename Family> constexpr int plain_bits = 0;
template <int Bits> constexpr int plain_bits<LloydMax<Bits>> = Bits;

template <typename T> void print(const T & x) {
    if constexpr (std::is_same<T, float>::value) std::printf("%.8ef", double(x)); // nine digits are exact
    else if constexpr (std::is_same<T, uint64_t>::value) std::printf("0x%016" PRIx64 "ul", x);
    else if constexpr (std::is_same<T, uint32_t>::value) std::printf("0x%08xu", x);
    else std::printf("%d", int(x));
}

// A row of a table, filled with zeros.
template <typename T> void print_row(const T * values, int count, int width) {
    std::printf("{");
    for (int i = 0; i < width; ++i) {
        std::printf("%s", i ? ", " : "");
        print(i < count ? values[i] : T(0));
    }
    std::printf("},\n");
}

uint64_t bits_of(double x) {
    uint64_t b;
    std::memcpy(&b, &x, sizeof(b));
    return b;
}

#define EACH_FAMILY(CALL) TURBOQUANT_FAMILIES(EACH_FAMILY_ROW, CALL)
#define EACH_FAMILY_ROW(CALL, ID, name, family, bits, id) CALL(name, family<bits>)

void print_families() {
    int count = 0;
    std::printf("// X(family): the rows of TURBOQUANT_FAMILIES\n#define TURBOQUANT_EACH_FAMILY(X)");
#define ROW(name, F) std::printf(" X(%d)", count++);
    EACH_FAMILY(ROW)
#undef ROW
    std::printf("\n\ntemplate <int F> struct Family;\n");
    int number = 0;
#define ROW(name, F)                                                                                              \
    std::printf("template <> struct Family<%d> { enum { bits = %d, levels = %d, trellis = %d }; }; // " #name "\n", \
                number++, F::bits, F::levels, trellis_bits<F> > 0);
    EACH_FAMILY(ROW)
#undef ROW
    std::printf(
        "\nenum { families = %d, rms_unit = %d, coarse_unit = %d, search_steps = %d, path_memory = %d, "
        "scale_bits = %d,\n       trellis_scales = %d, most_distance = %d, metric_shift = %d, grid_margin = %d, "
        "greatest_scale_code = %d };\n\n",
        count, rms_unit, coarse_unit, search_steps, path_memory, scale_bits, trellis_scales, most_distance,
        metric_shift, grid_margin, greatest_scale_code);
}

void print_signs() {
    for (const uint8_t * signs : {signs1, signs2}) {
        uint32_t words[4] = {};
        for (int i = 0; i < 16; ++i) words[i / 4] |= uint32_t(signs[i]) << (i % 4 * 8);
        std::printf("constant uint signs%d[4] = ", signs == signs1 ? 1 : 2);
        std::printf("{");
        for (int i = 0; i < 4; ++i) std::printf("%s0x%08xu", i ? ", " : "", words[i]);
        std::printf("};\n");
    }
    std::printf("constant float one_over_sqrt[3] = ");
    std::printf("{%.8ef, %.8ef, %.8ef}; // by block: 128, 64, 32\n\n", double(one_over_sqrt[0]),
                double(one_over_sqrt[1]), double(one_over_sqrt[2]));
}

template <typename F> void print_levels() { print_row(F::centroids, F::levels, 32); }
template <typename F> void print_units() {
    const uint64_t units[3] = {bits_of(Format<F, 128>::scale_unit), bits_of(Format<F, 64>::scale_unit),
                               bits_of(Format<F, 32>::scale_unit)};
    print_row(units, 3, 3);
}

template <typename F> void print_midpoints() {
    if constexpr (plain_bits<F> > 0) print_row(F::midpoints, F::half_levels - 1, 7);
    else std::printf("{},\n");
}
template <typename F> void print_thresholds() {
    std::printf("{");
    if constexpr (plain_bits<F> > 0) {
        std::printf("\n");
        for (int s = 0; s < search_steps; ++s) print_row(F::coarse_thresholds[s], F::half_levels - 1, 7);
    }
    std::printf("},\n");
}

template <typename F> void print_scales(const char * what) {
    std::printf("{");
    if constexpr (trellis_bits<F> > 0) {
        constexpr int B = trellis_bits<F>;
        const ScaleTable<B, 128> a;
        const ScaleTable<B, 64> b;
        const ScaleTable<B, 32> c;
        std::printf("\n");
        const auto rows = [&](const auto & t) {
            const int32_t * row = what[0] == 'o' ? t.outermost : what[0] == 'g' ? t.granular : t.ratio;
            print_row(row, trellis_scales, trellis_scales);
        };
        rows(a), rows(b), rows(c);
    }
    std::printf("},\n");
}

void print_tables() {
    std::printf("// By family: the levels of the codebook, ascending.\nconstant int8_t codebooks[families][32] = {\n");
#define ROW(name, F) print_levels<F>();
    EACH_FAMILY(ROW)
#undef ROW
    std::printf("};\n\n// By family: the decoder's step.\nconstant float steps[families] = {");
#define ROW(name, F) std::printf("%.8ef, ", double(F::step));
    EACH_FAMILY(ROW)
#undef ROW
    std::printf(
        "};\n\n// By family and block: the step over sqrt(block).\nconstant float steps_over_sqrt[families][3] = {\n");
#define ROW(name, F) print_row(F::step_over_sqrt, 3, 3);
    EACH_FAMILY(ROW)
#undef ROW
    std::printf("};\n\n// By family and block: the bits of Format::scale_unit, a double.\n"
                "constant ulong scale_units[families][3] = {\n");
#define ROW(name, F) print_units<F>();
    EACH_FAMILY(ROW)
#undef ROW
    std::printf(
        "};\n\n// By family: the midpoints of neighbouring magnitudes, and the search's thresholds by step. The\n"
        "// trellis-coded types have none.\nconstant float midpoints[families][7] = {\n");
#define ROW(name, F) print_midpoints<F>();
    EACH_FAMILY(ROW)
#undef ROW
    std::printf("};\nconstant int8_t coarse_thresholds[families][search_steps][7] = {\n");
#define ROW(name, F) print_thresholds<F>();
    EACH_FAMILY(ROW)
#undef ROW
    std::printf(
        "};\n\n// By family, block and candidate scale: ScaleTable of generic/trellis.h. The other types have none.\n");
    for (const char * what : {"outermost", "granular", "ratios"}) {
        std::printf("constant int scale_%s[families][3][trellis_scales] = {\n", what);
#define ROW(name, F) print_scales<F>(what);
        EACH_FAMILY(ROW)
#undef ROW
        std::printf("};\n");
    }
    // Bit 6 of the number has the newest path bit, as in the bytes of a block.
    std::printf("\n// The subsets of the seven path bits that lie before an element's end in memory: two bits each.\n"
                "constant uint subset_words[8] = {");
    for (int word = 0; word < 8; ++word) {
        uint32_t bits = 0;
        for (int i = 0; i < 16; ++i) {
            unsigned window = 0;
            for (int k = 0; k <= path_memory; ++k) window |= unsigned((16 * word + i) >> (path_memory - k) & 1) << k;
            bits |= uint32_t(subset_of(window)) << (2 * i);
        }
        std::printf("%s0x%08xu", word ? ", " : "", bits);
    }
    std::printf("};\n");
}

} // namespace
} // namespace turboquant

int main() {
    std::printf("// Generated by tools/make_metal_constants.cpp from the list of formats: do not edit.\n"
                "#ifndef TURBOQUANT_METAL_CONSTANTS_H\n#define TURBOQUANT_METAL_CONSTANTS_H\n\n"
                "#include \"language.h\"\n\nnamespace turboquant {\n\n");
    turboquant::print_families();
    turboquant::print_signs();
    turboquant::print_tables();
    std::printf("\n} // namespace turboquant\n\n#endif\n");
}
