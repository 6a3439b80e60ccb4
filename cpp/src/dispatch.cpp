// Selection of kernels from an ordered list, best first, once per process or by name.
#include "kernels.h"

#include <atomic>
#include <cstdlib>
#include <cstring>

#if defined(TURBOQUANT_X86)
#include <cpuid.h>
#elif defined(__aarch64__) && defined(__linux__)
#include <sys/auxv.h>
#ifndef HWCAP_ASIMDDP
#define HWCAP_ASIMDDP (1 << 20)
#endif
#elif defined(__aarch64__) && defined(__APPLE__)
#include <sys/sysctl.h>
#endif

namespace turboquant {
namespace {

[[maybe_unused]] bool always() { return true; }

#if defined(TURBOQUANT_X86)
bool has_avx2() { // every CPU with AVX2 has F16C, which older Clang versions cannot query
    return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
}
// A register of CPUID's leaf 7. In a virtual machine the instruction takes tens of microseconds, so callers keep the
// answer.
unsigned cpuid7(unsigned subleaf, int number) {
    unsigned r[4] = {}; // eax, ebx, ecx, edx
    return __get_cpuid_count(7, subleaf, &r[0], &r[1], &r[2], &r[3]) ? r[number] : 0;
}
// Every CPU with AVX-VNNI (Intel's since Alder Lake, AMD's since Zen 5) or with AVX-512 VNNI and VBMI (since Ice Lake
// and Zen 4) has GFNI, but a virtual machine may hide it.
bool has_gfni() {
    static const bool found = cpuid7(0, 2) >> 8 & 1;
    return found;
}
#if defined(TURBOQUANT_AVXVNNI)
bool has_avxvnni() { // GCC before 13 cannot query this feature
    static const bool found = cpuid7(1, 0) >> 4 & 1;
    return has_avx2() && has_gfni() && found;
}
#endif
bool has_avx512() {
    return has_avx2() && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
           __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
}
bool has_avx512vnni() {
    return has_avx512() && __builtin_cpu_supports("avx512vnni");
}
bool has_avx512vbmi() { // since Ice Lake and Zen 4; earlier CPUs with VNNI lack it
    return has_avx512vnni() && has_gfni() && __builtin_cpu_supports("avx512vbmi");
}
#elif defined(TURBOQUANT_ARM64)
bool has_dotprod() {
#if defined(__linux__)
    return getauxval(AT_HWCAP) & HWCAP_ASIMDDP;
#elif defined(__APPLE__)
    int yes = 0;
    size_t size = sizeof(yes);
    return sysctlbyname("hw.optional.arm.FEAT_DotProd", &yes, &size, nullptr, 0) == 0 && yes;
#else
    return false;
#endif
}
#endif

struct Row {
    const Kernels * kernels;
    bool (*supported)();
};

const Row rows[] = {
#if defined(TURBOQUANT_X86)
    {&kernels_avx512vbmi, has_avx512vbmi},
    {&kernels_avx512vnni, has_avx512vnni},
    {&kernels_avx512, has_avx512},
#if defined(TURBOQUANT_AVXVNNI)
    {&kernels_avxvnni, has_avxvnni},
#endif
    {&kernels_avx2, has_avx2},
#elif defined(TURBOQUANT_ARM64)
    {&kernels_neon_dotprod, has_dotprod},
    {&kernels_neon, always},
#endif
    {&kernels_scalar, always},
};
constexpr int row_count = int(sizeof(rows) / sizeof(rows[0]));

// All names, also those of kernels for other CPUs, whose selection fails as "unsupported" and not as "unknown".
const char * const all_names[] = {"avx512vbmi", "avx512vnni", "avx512", "avxvnni", "avx2",
                                  "neon_dotprod", "neon", "scalar"};

struct Selection {
    const Kernels * kernels;
    tq_status status;
};

Selection find(const char * name) {
    if (!name || !*name) {
        for (const Row & row : rows)
            if (row.supported()) return {row.kernels, TQ_OK};
    }
    for (const Row & row : rows)
        if (std::strcmp(row.kernels->name, name) == 0)
            return row.supported() ? Selection{row.kernels, TQ_OK}
                                   : Selection{&kernels_scalar, TQ_ERROR_KERNELS_UNSUPPORTED};
    for (const char * known : all_names)
        if (std::strcmp(known, name) == 0) return {&kernels_scalar, TQ_ERROR_KERNELS_UNSUPPORTED};
    return {&kernels_scalar, TQ_ERROR_KERNELS_UNKNOWN};
}

std::atomic<const Kernels *> selected{nullptr};
std::atomic<tq_status> selected_status{TQ_OK};

} // namespace

const Kernels & kernels() {
    const Kernels * k = selected.load(std::memory_order_acquire);
    if (k) return *k;
    const Selection s = find(std::getenv("TURBOQUANT_KERNELS"));
    // Several threads may get here. They compute the same selection, and the first one stores it.
    selected_status.store(s.status, std::memory_order_relaxed);
    const Kernels * expected = nullptr;
    selected.compare_exchange_strong(expected, s.kernels, std::memory_order_acq_rel);
    return *selected.load(std::memory_order_acquire);
}

} // namespace turboquant

using namespace turboquant;

int tq_kernels_count(void) { return row_count; }

const char * tq_kernels_name(int index) {
    return index >= 0 && index < row_count ? rows[index].kernels->name : nullptr;
}

int tq_kernels_supported(int index) { return index >= 0 && index < row_count && rows[index].supported(); }

tq_status tq_kernels_status(void) {
    kernels();
    return selected_status.load(std::memory_order_relaxed);
}

const char * tq_kernels_selected(void) {
    const Kernels & k = kernels();
    return tq_kernels_status() == TQ_OK ? k.name : nullptr;
}

tq_status tq_kernels_select(const char * name) {
    const Selection s = find(name);
    if (s.status != TQ_OK) return s.status;
    selected_status.store(TQ_OK, std::memory_order_relaxed);
    selected.store(s.kernels, std::memory_order_release);
    return TQ_OK;
}
