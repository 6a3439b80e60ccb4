// The emulator's threads, memory and dispatches; see emulator.h.
#include "emulator.h"

#include "fiber.h"

#include <link.h>

#include <cmath>
#include <cstdarg>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <sys/mman.h>
#include <utility>
#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace emulator {
namespace {

constexpr int width = 32; // of a SIMD group
constexpr size_t stack_bytes = 256 << 10;

// ---- state

enum class Waiting { no, simd, simd_barrier, threadgroup_barrier, ended };

struct Thread {
    Fiber fiber;
    Frame frame;
    uint8_t * stack;
    int number; // in the threadgroup
    Waiting waiting;
    int line, operation; // where it waits; the operation is part of the place
    uint32_t in, out;    // of a shuffle or a reduction
    int lane;            // the source of a shuffle
    Fragment * d;
    const Fragment *a, *b, *c;
    uint8_t * memory; // of a matrix
};

// Accesses to two bytes of threadgroup memory. Epochs are counted from 1.
struct Shadow {
    uint32_t written, written_simd, read, read_simd; // epochs of the threadgroup and of the thread's SIMD group
    int16_t writer, reader;                          // several_readers after reads by several threads
};
constexpr int16_t several_readers = -1, several_groups = -2;

struct Memory {
    ~Memory() { std::free(writer); }
    uint8_t * data;
    size_t bytes;
    uint64_t * writer; // of two bytes: the epoch of the encoder, and the thread's number in it
};

struct State {
    std::map<std::string, Call> kernels;
    std::multimap<int, int *> constants;
    std::map<uint8_t *, std::unique_ptr<Memory>> memory;
    std::vector<std::pair<const uint8_t *, const uint8_t *>> image; // the program's own constants
    Memory * last = nullptr;

    const Dispatch * dispatch = nullptr;
    std::vector<Thread> threads;
    Fiber scheduler;
    Thread * current = nullptr;
    std::vector<uint8_t> threadgroup;
    std::vector<Shadow> shadow;
    uint32_t epoch = 1;
    std::vector<uint32_t> simd_epoch;
    uint64_t encoder_epoch = 1, thread_base = 0; // threads of the encoder's epoch before this threadgroup
    bool flush = false;
};
State & state() {
    static State s;
    return s;
}
State & global = state(); // an access is far more frequent than a call

[[noreturn]] __attribute__((format(printf, 1, 2))) void stop(const char * format, ...) {
    const Thread * t = global.current;
    std::fprintf(stderr, "emulator: ");
    if (global.dispatch) std::fprintf(stderr, "%s: ", global.dispatch->kernel.c_str());
    if (t)
        std::fprintf(stderr, "threadgroup (%u, %u, %u), SIMD group %d, lane %d: ", t->frame.group.x, t->frame.group.y,
                     t->frame.group.z, t->frame.simd, t->frame.lane);
    va_list arguments;
    va_start(arguments, format);
    std::vfprintf(stderr, format, arguments);
    va_end(arguments);
    std::fprintf(stderr, "\n");
    std::fflush(stdout);
    std::abort();
}

// ---- accesses

// Whether a barrier lies between the access of thread `other` in these epochs and t.
bool is_separated(const Thread & t, uint32_t epoch, uint32_t simd_epoch, int other) {
    const int simd = t.number / width;
    return epoch < global.epoch || (other / width == simd && simd_epoch < global.simd_epoch[size_t(simd)]);
}

void access_threadgroup(const Thread & t, size_t offset, size_t bytes, bool write) {
    const uint32_t simd_epoch = global.simd_epoch[size_t(t.number / width)];
    for (size_t i = offset / 2; i < (offset + bytes + 1) / 2; ++i) {
        Shadow & s = global.shadow[i];
        if (s.written == 0 && !write) stop("read of threadgroup memory at %zu, which was not written", 2 * i);
        if (s.written && s.writer != t.number && !is_separated(t, s.written, s.written_simd, s.writer))
            stop("%s of threadgroup memory at %zu, which thread %d has written since the last barrier",
                 write ? "write" : "read", 2 * i, s.writer);
        if (write) {
            if (s.read == global.epoch && s.reader != t.number) {
                const bool separated = s.reader != several_groups && s.read_simd >> 20 == uint32_t(t.number / width) &&
                                       (s.read_simd & 0xfffff) < simd_epoch;
                if (!separated)
                    stop("write of threadgroup memory at %zu, which another thread has read since the last barrier",
                         2 * i);
            }
            s.written = global.epoch;
            s.written_simd = simd_epoch;
            s.writer = int16_t(t.number);
            continue;
        }
        const uint32_t own = uint32_t(t.number / width) << 20 | (simd_epoch & 0xfffff);
        // An earlier read of the SIMD group, before its last barrier, is superseded: what conflicts with it does so
        // with this.
        if (s.read != global.epoch ||
            (s.reader != several_groups && s.read_simd >> 20 == own >> 20 && s.read_simd < own))
            s.reader = int16_t(t.number);
        else if (s.reader == several_groups || s.read_simd >> 20 != own >> 20) s.reader = several_groups;
        else if (s.reader != t.number) s.reader = several_readers;
        s.read = global.epoch;
        s.read_simd = own;
    }
}

void access_memory(const Thread & t, Memory & m, size_t offset, size_t bytes, bool write) {
    if (!m.writer) m.writer = static_cast<uint64_t *>(std::calloc(m.bytes / 2 + 1, sizeof(uint64_t))); // touched lazily
    const uint64_t own = global.encoder_epoch << 40 | (global.thread_base + uint64_t(t.number));
    for (size_t i = offset / 2; i < (offset + bytes + 1) / 2; ++i) {
        uint64_t & writer = m.writer[i];
        if (writer >> 40 == global.encoder_epoch && writer != own) {
            // Two threads may have the two bytes.
            if (bytes != 1)
                stop("%s of memory at %zu of %zu, which another thread has written", write ? "write" : "read", 2 * i,
                     m.bytes);
        }
        if (write) writer = own;
    }
}

Memory * find_memory(const uint8_t * p) {
    if (global.last && p >= global.last->data && p < global.last->data + global.last->bytes) return global.last;
    auto found = global.memory.upper_bound(const_cast<uint8_t *>(p));
    if (found == global.memory.begin()) return nullptr;
    Memory * m = (--found)->second.get();
    if (p >= m->data + m->bytes) return nullptr;
    return global.last = m;
}

void access(Thread & t, const void * address, size_t bytes, bool write) {
    const uint8_t * p = static_cast<const uint8_t *>(address);
    if (p >= t.stack && p < t.stack + stack_bytes) return;
    const uint8_t * base = global.threadgroup.data();
    if (p >= base && p < base + global.dispatch->threadgroup_bytes) {
        if (p + bytes > base + global.dispatch->threadgroup_bytes) stop("access beyond the end of threadgroup memory");
        return access_threadgroup(t, size_t(p - base), bytes, write);
    }
    if (Memory * m = find_memory(p)) {
        if (p + bytes > m->data + m->bytes)
            stop("access of %zu bytes at the end of an allocation of %zu", bytes, m->bytes);
        if (uintptr_t(p) % (bytes > 8 ? 8 : bytes) != 0) stop("access of %zu bytes at an unaligned address", bytes);
        return access_memory(t, *m, size_t(p - m->data), bytes, write);
    }
    const auto & arguments = global.dispatch->arguments;
    if (!write && p >= arguments.data() && p + bytes <= arguments.data() + arguments.size()) return;
    for (const auto & part : global.image)
        if (!write && p >= part.first && p + bytes <= part.second) return;
    if (p >= t.stack - stack_bytes && p < t.stack) stop("stack overflow");
    stop("%s of %zu bytes that are in no allocation", write ? "write" : "read", bytes);
}

void find_image() {
    if (!global.image.empty()) return;
    dl_iterate_phdr(
        [](dl_phdr_info * info, size_t, void *) {
            for (int i = 0; i < info->dlpi_phnum; ++i)
                if (info->dlpi_phdr[i].p_type == PT_LOAD) {
                    const uint8_t * at =
                        reinterpret_cast<const uint8_t *>(info->dlpi_addr + info->dlpi_phdr[i].p_vaddr);
                    global.image.emplace_back(at, at + info->dlpi_phdr[i].p_memsz);
                }
            return 0;
        },
        nullptr);
}

// ---- the scheduler

Thread * simd_of(const Thread & t) { return &global.threads[size_t(t.number / width * width)]; }

void run_thread() {
    Thread & t = *global.current;
    const auto found = global.kernels.find(global.dispatch->kernel);
    found->second(t.frame);
    t.waiting = Waiting::ended;
    t.line = t.operation = 0;
    switch_fiber(t.fiber, global.scheduler);
    std::abort();
}

void resume(Thread & t, Fiber & from) {
    global.current = &t;
    switch_fiber(from, t.fiber);
}

// Whether all threads of the SIMD group wait at the place where t does.
bool all_wait(const Thread & t) {
    const Thread * lanes = simd_of(t);
    for (int i = 0; i < width; ++i) {
        if (lanes[i].waiting == Waiting::no) return false;
        if (lanes[i].waiting != t.waiting || lanes[i].line != t.line || lanes[i].operation != t.operation) {
            if (lanes[i].waiting == Waiting::ended) stop("lane %d has ended, and this one waits in line %d", i, t.line);
            if (t.waiting == Waiting::ended)
                stop("this lane has ended, and lane %d waits in line %d", i, lanes[i].line);
            stop("lane %d waits in line %d, and this one in line %d", i, lanes[i].line, t.line);
        }
    }
    return true;
}

// Waits until the SIMD group has arrived; the last lane calls act(lanes).
template <typename Act> void meet(int line, int operation, const Act & act) {
    Thread & t = *global.current;
    t.waiting = Waiting::simd;
    t.line = line;
    t.operation = operation;
    Thread * lanes = simd_of(t);
    // Lanes arrive in order, beginning with the one after the lane that was the last to arrive before.
    Thread & next = lanes[(t.number + 1) % width];
    if (next.waiting == Waiting::no) {
        resume(next, t.fiber);
        global.current = &t;
        return;
    }
    if (!all_wait(t)) stop("lane %d waits in line %d, and this one in line %d", next.frame.lane, next.line, line);
    act(lanes);
    for (int i = 0; i < width; ++i) lanes[i].waiting = Waiting::no;
}

void run_threadgroup(const Dispatch & dispatch, uint3 group) {
    const int count = int(dispatch.threads);
    for (int i = 0; i < count; ++i) {
        Thread & t = global.threads[size_t(i)];
        t.frame = {&dispatch, global.threadgroup.data(), group, uint16_t(i % width), uint16_t(i / width), 0, 0};
        t.number = i;
        t.waiting = Waiting::no;
        t.line = t.operation = 0;
        t.fiber.start(t.stack, stack_bytes, run_thread);
    }
    global.epoch = 1;
    global.simd_epoch.assign(size_t(count / width), 1);
    global.shadow.assign(dispatch.threadgroup_bytes / 2 + 1, Shadow{});
    std::memset(global.threadgroup.data(), 0xff, dispatch.threadgroup_bytes);
    for (;;) {
        // Each SIMD group runs until all its threads have ended or wait at a barrier of the threadgroup.
        for (int first = 0; first < count; first += width)
            for (;;) {
                Thread * runnable = nullptr;
                for (int i = first; i < first + width && !runnable; ++i)
                    if (global.threads[size_t(i)].waiting == Waiting::no) runnable = &global.threads[size_t(i)];
                if (!runnable) break;
                resume(*runnable, global.scheduler);
            }
        const Thread & t = global.threads[0];
        for (int i = 0; i < count; ++i) {
            const Thread & other = global.threads[size_t(i)];
            global.current = &global.threads[size_t(i)];
            if (other.waiting == Waiting::simd) stop("other lanes do not reach the function in line %d", other.line);
            if (other.waiting != t.waiting || other.line != t.line)
                stop("waits at a barrier in line %d (0: has ended), and thread 0 in line %d", other.line, t.line);
        }
        global.current = nullptr;
        if (t.waiting == Waiting::ended) break;
        if (t.operation & 2) ++global.epoch;
        for (int i = 0; i < count; ++i) global.threads[size_t(i)].waiting = Waiting::no;
    }
    global.thread_base += uint64_t(count);
}

int place(int row, int column) { return row * 8 + column; } // of an element, among the lanes' pairs

} // namespace

// ---- functions of the shim

uint32_t shuffle(uint32_t x, int lane, int line) {
    Thread & t = *global.current;
    if (lane < 0 || lane >= width) stop("shuffle from lane %d in line %d", lane, line);
    t.in = x;
    t.lane = lane;
    meet(line, 1, [](Thread * lanes) {
        for (int i = 0; i < width; ++i) lanes[i].out = lanes[lanes[i].lane].in;
    });
    return t.out;
}

uint32_t shuffle_xor(uint32_t x, int mask, int line) { return shuffle(x, global.current->frame.lane ^ mask, line); }

uint32_t reduce(Reduction how, uint32_t x, int line) {
    Thread & t = *global.current;
    t.in = x;
    meet(line, 16 + int(how), [how](Thread * lanes) {
        uint32_t r = lanes[0].in;
        const auto as_float = [](uint32_t bits) {
            float f;
            std::memcpy(&f, &bits, 4);
            return f;
        };
        for (int i = 1; i < width; ++i) {
            const uint32_t y = lanes[i].in;
            float f = as_float(r);
            switch (how) {
                case Reduction::add_int: r += y; break;
                case Reduction::max_uint: r = y > r ? y : r; break;
                case Reduction::min_uint: r = y < r ? y : r; break;
                case Reduction::bits_or: r |= y; break;
                case Reduction::add_float: f += as_float(y); std::memcpy(&r, &f, 4); break;
                case Reduction::max_float:
                    if (std::isnan(f) || std::isnan(as_float(y))) stop("simd_max of a NaN is not specified");
                    f = std::fmax(f, as_float(y));
                    std::memcpy(&r, &f, 4);
                    break;
            }
        }
        for (int i = 0; i < width; ++i) lanes[i].out = r;
    });
    return t.out;
}

void barrier(bool of_threadgroup, int flags, int line) {
    Thread & t = *global.current;
    if (!of_threadgroup) {
        meet(line, 4, [&](Thread * lanes) {
            if (flags & 2) ++global.simd_epoch[size_t(lanes->number / width)];
        });
        return;
    }
    t.waiting = Waiting::threadgroup_barrier;
    t.line = line;
    t.operation = flags;
    switch_fiber(t.fiber, global.scheduler);
    global.current = &t;
}

void matrix_move(Fragment & m, void * p, int element_bytes, uint64_t elements_per_row, bool transpose, bool store,
                 int line) {
    Thread & t = *global.current;
    t.d = &m;
    t.memory = static_cast<uint8_t *>(p);
    if (elements_per_row < 8) stop("rows of %d elements of a matrix in line %d", int(elements_per_row), line);
    meet(line, store ? 6 : 5, [&](Thread * lanes) {
        for (int i = 1; i < width; ++i)
            if (lanes[i].memory != lanes[0].memory) stop("the lanes' addresses of a matrix differ in line %d", line);
        for (int row = 0; row < 8; ++row)
            for (int column = 0; column < 8; ++column) {
                const int at = transpose ? place(column, row) : place(row, column);
                Thread & owner = lanes[at / 2];
                float & x = owner.d->element[at % 2];
                uint8_t * q =
                    lanes[0].memory + (size_t(row) * elements_per_row + size_t(column)) * size_t(element_bytes);
                access(owner, q, size_t(element_bytes), store);
                if (element_bytes == 4) {
                    if (store) std::memcpy(q, &x, 4);
                    else std::memcpy(&x, q, 4);
                } else {
                    uint16_t bits = half_of_float(x);
                    if (store) std::memcpy(q, &bits, 2);
                    else std::memcpy(&bits, q, 2);
                    if (!store) x = float_of_half(bits);
                }
            }
    });
}

void matrix_multiply(Fragment & d, const Fragment & a, const Fragment & b, const Fragment & c, int line) {
    Thread & t = *global.current;
    t.d = &d;
    t.a = &a;
    t.b = &b;
    t.c = &c;
    meet(line, 7, [](Thread * lanes) {
        float x[64], y[64], z[64];
        for (int i = 0; i < 64; ++i) {
            x[i] = lanes[i / 2].a->element[i % 2];
            y[i] = lanes[i / 2].b->element[i % 2];
            z[i] = lanes[i / 2].c->element[i % 2];
        }
        for (int row = 0; row < 8; ++row)
            for (int k = 0; k < 8; ++k)
                for (int column = 0; column < 8; ++column)
                    z[place(row, column)] += x[place(row, k)] * y[place(k, column)];
        for (int i = 0; i < 64; ++i) lanes[i / 2].d->element[i % 2] = z[i];
    });
}

// ---- memory and dispatches

static void check_access(const void * p, size_t bytes, bool write) {
    if (Thread * t = global.dispatch ? global.current : nullptr) access(*t, p, bytes, write);
}

void add_memory(void * data, size_t bytes) {
    uint8_t * p = static_cast<uint8_t *>(data);
    if (bytes) global.memory[p].reset(new Memory{p, bytes, nullptr});
}

void remove_memory(void * data) {
    global.last = nullptr;
    global.memory.erase(static_cast<uint8_t *>(data));
}

void encoder_barrier() {
    ++global.encoder_epoch;
    global.thread_base = 1;
}

Registered::Registered(const char * name, Call call) { state().kernels[name] = call; }
RegisteredConstant::RegisteredConstant(int number, int * value) { state().constants.emplace(number, value); }

void * bind_pointer(Frame & frame) {
    const size_t i = size_t(frame.pointers++);
    if (i < frame.dispatch->buffers.size()) return frame.dispatch->buffers[i];
    if (i > frame.dispatch->buffers.size() || frame.dispatch->threadgroup_bytes == 0)
        stop("buffer %zu is not set", i + 1);
    return frame.threadgroup;
}

const void * bind_arguments(Frame & frame, size_t bytes) {
    if (frame.dispatch->arguments.size() != bytes)
        stop("%zu bytes of arguments, wanted %zu", frame.dispatch->arguments.size(), bytes);
    return frame.dispatch->arguments.data();
}

uint3 bind_group(Frame & frame) { return frame.group; }

uint16_t bind_word(Frame & frame) { return frame.words++ == 0 ? frame.lane : frame.simd; }

void check_bound(const Frame & frame) {
    const size_t given = frame.dispatch->buffers.size() + (frame.dispatch->threadgroup_bytes ? 1 : 0);
    if (size_t(frame.pointers) != given) stop("the kernel has %d buffers, and %zu are set", frame.pointers, given);
}

void flush_subnormals(bool flush) { global.flush = flush; }

bool has_kernel(const std::string & name) { return global.kernels.count(name) != 0; }

void run(const Dispatch & dispatch) {
    find_image();
    global.dispatch = &dispatch;
    if (!has_kernel(dispatch.kernel)) stop("there is no such kernel");
    if (dispatch.threads == 0 || dispatch.threads % width || dispatch.threads > 1024)
        stop("%u threads", dispatch.threads);
    if (dispatch.threadgroup_bytes > 32768 || dispatch.threadgroup_bytes % 16)
        stop("%zu bytes of threadgroup memory", dispatch.threadgroup_bytes);
    for (const auto & entry : global.constants) {
        const auto given = dispatch.constants.find(entry.first);
        *entry.second = given == dispatch.constants.end() ? -1 : given->second;
    }
    while (global.threads.size() < dispatch.threads) {
        Thread t = {};
        void * memory = mmap(nullptr, 2 * stack_bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
        if (memory == MAP_FAILED || mprotect(memory, stack_bytes, PROT_NONE) != 0) stop("no memory for stacks");
        t.stack = static_cast<uint8_t *>(memory) + stack_bytes;
        global.threads.push_back(t);
    }
    global.threadgroup.resize(dispatch.threadgroup_bytes + 16);
#if defined(__x86_64__)
    const unsigned mode = _mm_getcsr();
    if (global.flush) _mm_setcsr(mode | 0x8040);
#endif
    for (uint32_t z = 0; z < dispatch.groups[2]; ++z)
        for (uint32_t y = 0; y < dispatch.groups[1]; ++y)
            for (uint32_t x = 0; x < dispatch.groups[0]; ++x) run_threadgroup(dispatch, {x, y, z});
#if defined(__x86_64__)
    _mm_setcsr(mode);
#endif
    global.dispatch = nullptr;
}

} // namespace emulator

// ---- what -fsanitize=thread calls

extern "C" {
void __tsan_init() {}
void __tsan_func_entry(void *) {}
void __tsan_func_exit() {}
#define EMULATOR_ACCESS(bytes)                                                                                         \
    void __tsan_read##bytes(void * p) { emulator::check_access(p, bytes, false); }                                     \
    void __tsan_write##bytes(void * p) { emulator::check_access(p, bytes, true); }                                     \
    void __tsan_unaligned_read##bytes(void * p) { emulator::check_access(p, bytes, false); }                           \
    void __tsan_unaligned_write##bytes(void * p) { emulator::check_access(p, bytes, true); }
EMULATOR_ACCESS(1)
EMULATOR_ACCESS(2)
EMULATOR_ACCESS(4)
EMULATOR_ACCESS(8)
EMULATOR_ACCESS(16)
void __tsan_read_range(void * p, unsigned long bytes) { emulator::check_access(p, bytes, false); }
void __tsan_write_range(void * p, unsigned long bytes) { emulator::check_access(p, bytes, true); }
}
