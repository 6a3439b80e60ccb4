// Memory of the emulated device for the tests, and the encoder that runs dispatches in the emulator. Allocations end at
// their last byte, so that the emulator sees every access beyond it. Results are poisoned before.
#ifndef TURBOQUANT_TESTS_METAL_DEVICE_H
#define TURBOQUANT_TESTS_METAL_DEVICE_H

#include "emulator.h"
#include "turboquant_metal.h"

#include <cstring>
#include <vector>

constexpr unsigned char poison = 0xA5;

template <typename T> class DeviceArray {
public:
    explicit DeviceArray(size_t count) : data(count + 8), count(count) { // a gap to the next allocation
        std::memset(data.data(), poison, data.size() * sizeof(T));
        emulator::add_memory(data.data(), count * sizeof(T));
    }
    explicit DeviceArray(const std::vector<T> & host) : DeviceArray(host.size()) {
        if (count) std::memcpy(data.data(), host.data(), count * sizeof(T));
    }
    ~DeviceArray() { emulator::remove_memory(data.data()); }
    DeviceArray(const DeviceArray &) = delete;

    turboquant::metal::Buffer buffer() const { return {const_cast<T *>(data.data()), 0}; }
    std::vector<T> host() const { return {data.begin(), data.begin() + std::ptrdiff_t(count)}; }

private:
    std::vector<T> data;
    size_t count;
};

class EmulatorEncoder : public turboquant::metal::Encoder {
public:
    int dispatches = 0;

    ~EmulatorEncoder() override { emulator::encoder_barrier(); }
    void dispatch(const turboquant::metal::Dispatch & d) override {
        emulator::Dispatch to;
        to.kernel = d.kernel;
        to.constants.insert(d.constants.begin(), d.constants.end());
        const auto * arguments = static_cast<const uint8_t *>(d.arguments);
        to.arguments.assign(arguments, arguments + d.argument_bytes);
        for (const auto & b : d.buffers) to.buffers.push_back(static_cast<uint8_t *>(b.object) + b.offset);
        to.threadgroup_bytes = d.threadgroup_bytes;
        for (int i = 0; i < 3; ++i) to.groups[i] = uint32_t(d.groups[i]);
        to.threads = uint32_t(d.threads);
        emulator::run(to);
        ++dispatches;
    }
    void barrier() override { emulator::encoder_barrier(); }
};

#endif
