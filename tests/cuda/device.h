// Device memory for the tests: freed with its owner; results are poisoned before, so that what was not written shows.
#ifndef TURBOQUANT_TESTS_CUDA_DEVICE_H
#define TURBOQUANT_TESTS_CUDA_DEVICE_H

#include "check.h"

#include <cuda_runtime_api.h>

#include <cstdio>
#include <cstdlib>
#include <vector>

inline void must(cudaError_t error, const char * what) {
    if (error == cudaSuccess) return;
    std::fprintf(stderr, "%s: %s\n", what, cudaGetErrorString(error));
    std::exit(EXIT_FAILURE);
}

// The compute capability of the first device, times ten.
inline int device_version() {
    int major = 0, minor = 0;
    must(cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, 0), "compute capability");
    must(cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, 0), "compute capability");
    return 10 * major + minor;
}

// The greatest shared memory of a thread block, in bytes.
inline int shared_per_block() {
    int bytes = 0;
    must(cudaDeviceGetAttribute(&bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin, 0), "shared memory");
    return bytes;
}

// Exits with CTest's code for a skipped test where no device can be used.
inline void need_device(int least_version) {
    int count = 0;
    if (cudaGetDeviceCount(&count) != cudaSuccess || count == 0) {
        std::printf("skipped: no CUDA device\n");
        std::exit(check::exit_skipped);
    }
    const int version = device_version();
    if (version < least_version) {
        std::printf("skipped: compute capability %d.%d is below %d.%d\n", version / 10, version % 10,
                    least_version / 10, least_version % 10);
        std::exit(check::exit_skipped);
    }
}

constexpr unsigned char poison = 0xA5;

template <typename T> class DeviceArray {
public:
    explicit DeviceArray(size_t count) : count_(count) {
        must(cudaMalloc(reinterpret_cast<void **>(&data_), count * sizeof(T) + (count == 0)), "cudaMalloc");
        must(cudaMemset(data_, poison, count * sizeof(T)), "cudaMemset");
    }
    explicit DeviceArray(const std::vector<T> & host) : DeviceArray(host.size()) {
        must(cudaMemcpy(data_, host.data(), count_ * sizeof(T), cudaMemcpyHostToDevice), "cudaMemcpy to the device");
    }
    ~DeviceArray() { cudaFree(data_); }
    DeviceArray(const DeviceArray &) = delete;

    T * get() const { return data_; }
    std::vector<T> host() const {
        std::vector<T> out(count_);
        must(cudaMemcpy(out.data(), data_, count_ * sizeof(T), cudaMemcpyDeviceToHost), "cudaMemcpy from the device");
        return out;
    }

private:
    T * data_ = nullptr;
    size_t count_;
};

#endif
