// The runtime: memory, the properties of the emulated GPU, and launches.
#include "settings.h"

#include "cuda_runtime.h"

#include <cstdlib>
#include <cstring>
#include <map>
#include <sys/mman.h>
#include <thread>
#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace emulator {
namespace {

uint64_t number_from(const char * name, uint64_t otherwise) {
    const char * text = std::getenv(name);
    return text && *text ? std::strtoull(text, nullptr, 10) : otherwise;
}

constexpr size_t page = 4096;
constexpr size_t alignment = 256; // of device memory
constexpr size_t usual_shared = 48 << 10;
size_t shared_of_multiprocessor() { return size_t(settings().shared_kibibytes) << 10; }
size_t opt_in_shared() { return shared_of_multiprocessor() - 1024; } // CUDA takes the rest for each thread block
constexpr uint8_t canary = 0xc3; // behind an allocation, up to the next multiple of `alignment`

struct Allocation {
    void * mapping;
    size_t mapped, bytes;
};

struct Kernel {
    size_t static_bytes = 0;
    size_t most_dynamic_bytes = usual_shared;
};

struct State {
    cudaError_t error = cudaSuccess;
    std::map<void *, Allocation> memory;
    std::map<const void *, Kernel> kernels;
};
State & state() {
    static State & s = *new State; // objects that are destroyed at the end may free memory
    return s;
}

cudaError_t failed(cudaError_t error) {
    if (error != cudaSuccess) state().error = error;
    return error;
}

} // namespace

const Settings & settings() {
    static const Settings s = {int(number_from("TURBOQUANT_EMULATED_MULTIPROCESSORS", 132)),
                               int(number_from("TURBOQUANT_EMULATED_SHARED", 228)),
                               int(number_from("TURBOQUANT_EMULATOR_THREADS", std::thread::hardware_concurrency())),
                               number_from("TURBOQUANT_EMULATOR_SEED", 1)};
    return s;
}

bool register_static_shared(const void * kernel, size_t bytes) {
    state().kernels[kernel].static_bytes = bytes;
    return true;
}

cudaError_t launch(const void * kernel, dim3 grid, dim3 block, dim3 cluster, size_t dynamic_bytes,
                   std::function<void()> run_thread) {
    const Kernel & k = state().kernels[kernel];
    const uint64_t threads = uint64_t(block.x) * block.y * block.z;
    if (threads == 0 || threads > uint64_t(most_threads) || grid.x == 0 || grid.y == 0 || grid.z == 0 ||
        grid.x > 0x7fffffffu || grid.y > 65535 || grid.z > 65535 || dynamic_bytes > k.most_dynamic_bytes ||
        k.static_bytes > usual_shared || cluster.x != 1 || cluster.z != 1 || cluster.y < 1 ||
        cluster.y > unsigned(most_cluster) || grid.y % cluster.y)
        return failed(cudaErrorInvalidConfiguration);
    run({{grid.x, grid.y, grid.z},
         {block.x, block.y, block.z},
         cluster.y,
         k.static_bytes,
         dynamic_bytes,
         std::move(run_thread)});
    return cudaSuccess;
}

void enter_kernel(const char * name, int most, bool flush) {
    kernel_name = name;
    if (current->block->threads > most) stop("%d threads, and the bound is %d", current->block->threads, most);
#if defined(__x86_64__)
    constexpr unsigned flush_bits = 0x8040; // results, and operands
    _mm_setcsr(flush ? _mm_getcsr() | flush_bits : _mm_getcsr() & ~flush_bits);
#else
    (void) flush;
#endif
}

} // namespace emulator

using namespace emulator;

const char * cudaGetErrorString(cudaError_t error) {
    switch (error) {
        case cudaSuccess: return "no error";
        case cudaErrorInvalidValue: return "invalid argument";
        case cudaErrorMemoryAllocation: return "out of memory";
        case cudaErrorInvalidConfiguration: return "invalid configuration argument";
        case cudaErrorNotSupported: return "operation not supported";
    }
    return "unknown error";
}

cudaError_t cudaGetLastError() {
    const cudaError_t error = state().error;
    state().error = cudaSuccess;
    return error;
}

cudaError_t cudaDeviceSynchronize() { return cudaSuccess; }

cudaError_t cudaGetDeviceCount(int * count) {
    *count = 1;
    return cudaSuccess;
}

cudaError_t cudaGetDevice(int * device) {
    *device = 0;
    return cudaSuccess;
}

cudaError_t cudaDeviceGetAttribute(int * value, cudaDeviceAttr attribute, int device) {
    if (device != 0) return failed(cudaErrorInvalidValue);
    switch (attribute) {
        case cudaDevAttrComputeCapabilityMajor: *value = EMULATED_ARCHITECTURE / 10; break;
        case cudaDevAttrComputeCapabilityMinor: *value = EMULATED_ARCHITECTURE % 10; break;
        case cudaDevAttrMultiProcessorCount: *value = settings().multiprocessors; break;
        case cudaDevAttrMaxSharedMemoryPerBlockOptin: *value = int(opt_in_shared()); break;
        case cudaDevAttrMaxSharedMemoryPerMultiprocessor: *value = int(shared_of_multiprocessor()); break;
    }
    return cudaSuccess;
}

// Behind an allocation is a page that may not be accessed.
cudaError_t cudaMalloc(void ** data, size_t bytes) {
    const size_t padded = (bytes + alignment - 1) / alignment * alignment;
    const size_t mapped = (padded + page - 1) / page * page + page;
    void * mapping = mmap(nullptr, mapped, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (mapping == MAP_FAILED) return failed(cudaErrorMemoryAllocation);
    uint8_t * const guard = static_cast<uint8_t *>(mapping) + mapped - page;
    mprotect(guard, page, PROT_NONE);
    *data = guard - padded;
    std::memset(static_cast<uint8_t *>(*data) + bytes, canary, padded - bytes);
    state().memory[*data] = {mapping, mapped, bytes};
    return cudaSuccess;
}

cudaError_t cudaFree(void * data) {
    if (!data) return cudaSuccess;
    const auto found = state().memory.find(data);
    if (found == state().memory.end()) return failed(cudaErrorInvalidValue);
    const Allocation & a = found->second;
    const uint8_t * bytes = static_cast<const uint8_t *>(data);
    for (size_t i = a.bytes; i % alignment; ++i)
        if (bytes[i] != canary) stop("a kernel wrote %zu bytes behind an allocation of %zu", i - a.bytes, a.bytes);
    munmap(a.mapping, a.mapped);
    state().memory.erase(found);
    return cudaSuccess;
}

cudaError_t cudaMemset(void * data, int value, size_t bytes) {
    std::memset(data, value, bytes);
    return cudaSuccess;
}

cudaError_t cudaMemcpy(void * to, const void * from, size_t bytes, cudaMemcpyKind) {
    if (bytes) std::memcpy(to, from, bytes);
    return cudaSuccess;
}

cudaError_t cudaFuncGetAttributes(cudaFuncAttributes * attributes, const void * kernel) {
    attributes->sharedSizeBytes = state().kernels[kernel].static_bytes;
    attributes->ptxVersion = EMULATED_ARCHITECTURE;
    return cudaSuccess;
}

cudaError_t cudaFuncSetAttribute(const void * kernel, cudaFuncAttribute, int value) {
    Kernel & k = state().kernels[kernel];
    if (value < 0 || size_t(value) + k.static_bytes > opt_in_shared()) return failed(cudaErrorInvalidValue);
    k.most_dynamic_bytes = size_t(value);
    return cudaSuccess;
}
