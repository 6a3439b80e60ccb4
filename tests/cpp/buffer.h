// Buffers between two inaccessible pages, so that an access past either end crashes at once, with or without ASan
// (which cannot see every masked vector load). What lies between the data and the pages holds a pattern; intact() tells
// whether it was overwritten.
#ifndef TURBOQUANT_TESTS_BUFFER_H
#define TURBOQUANT_TESTS_BUFFER_H

#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <cstring>

#if !defined(_WIN32)
#include <sys/mman.h>
#include <unistd.h>
#endif

enum class Place { at_end, at_start }; // which inaccessible page the data touches

template <typename T> class Buffer {
public:
    // `gap` bytes lie between the data and the page it is placed at: that is how pointers become unaligned.
    explicit Buffer(size_t count, Place place = Place::at_end, size_t gap = 0) : count_(count) {
        const size_t bytes = count * sizeof(T), page = page_size();
        space_ = (bytes + gap + page - 1) / page * page + (bytes + gap ? 0 : page);
#if !defined(_WIN32)
        void * base = mmap(nullptr, space_ + 2 * page, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
        if (base == MAP_FAILED) std::abort();
        space_start_ = static_cast<uint8_t *>(base) + page;
        if (mprotect(space_start_, space_, PROT_READ | PROT_WRITE) != 0) std::abort();
#else
        space_start_ = static_cast<uint8_t *>(std::malloc(space_));
        if (!space_start_) std::abort();
#endif
        std::memset(space_start_, pattern, space_);
        offset_ = place == Place::at_start ? gap : space_ - gap - bytes;
    }
    ~Buffer() {
#if !defined(_WIN32)
        munmap(space_start_ - page_size(), space_ + 2 * page_size());
#else
        std::free(space_start_);
#endif
    }
    Buffer(const Buffer &) = delete;
    Buffer & operator=(const Buffer &) = delete;

    T * data() { return reinterpret_cast<T *>(space_start_ + offset_); }
    const T * data() const { return reinterpret_cast<const T *>(space_start_ + offset_); }
    T & operator[](size_t i) { return data()[i]; }
    const T & operator[](size_t i) const { return data()[i]; }
    size_t size() const { return count_; }
    size_t bytes() const { return count_ * sizeof(T); }

    bool intact() const {
        const size_t end = offset_ + bytes();
        return is_pattern(space_start_, offset_) && is_pattern(space_start_ + end, space_ - end);
    }

private:
    static constexpr uint8_t pattern = 0xa5;
    static bool is_pattern(const uint8_t * at, size_t n) { // memcmp, because sanitizers and emulators run loops slowly
        return n == 0 || (at[0] == pattern && std::memcmp(at, at + 1, n - 1) == 0);
    }
    static size_t page_size() {
#if !defined(_WIN32)
        static const size_t size = size_t(sysconf(_SC_PAGESIZE));
        return size;
#else
        return 4096;
#endif
    }
    size_t count_, space_ = 0, offset_ = 0;
    uint8_t * space_start_ = nullptr;
};

#endif
