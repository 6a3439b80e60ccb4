// The scheduler of a thread block, and the threads of the host that run thread blocks; see threads.h.
#include "threads.h"

#include "settings.h"

#include <atomic>
#include <condition_variable>
#include <csignal>
#include <cstdarg>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <mutex>
#include <numeric>
#include <sys/mman.h>
#include <thread>
#if defined(__x86_64__)
#include <immintrin.h>
#endif

__thread uint3 threadIdx, blockIdx, blockDim, gridDim;

namespace emulator {

__thread Thread * current = nullptr;
__thread const char * kernel_name = "";

namespace {

constexpr size_t stack_bytes = 256 << 10, guard_bytes = 4096;
constexpr uint8_t barrier_mark = 0x5a;
constexpr uint8_t poison = 0xff; // NaN as binary16 and as float32

const Grid * running = nullptr; // the grid of all threads of the host

uint64_t next_random(uint64_t & state) { // xorshift64*
    state ^= state >> 12;
    state ^= state << 25;
    state ^= state >> 27;
    return state * 0x2545f4914f6cdd1d;
}
uint32_t random_below(Cluster & cluster, uint32_t n) { return uint32_t((next_random(cluster.random) >> 32) * n >> 32); }

uint8_t * map_memory(size_t bytes) {
    void * memory = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (memory == MAP_FAILED) stop("no memory");
    return static_cast<uint8_t *>(memory);
}

// What a thread of the host needs to run thread blocks.
struct Worker {
    Fiber scheduler;
    std::vector<Thread> threads; // of all thread blocks
    std::vector<uint8_t *> stacks;
    std::vector<uint8_t *> shared; // of each thread block
    Cluster cluster;

    Worker() {
        // Stops with a message where a fiber has accessed what it must not. The fiber's stack may be the reason.
        const size_t bytes = 64 << 10;
        const stack_t stack = {map_memory(bytes), 0, bytes};
        struct sigaction action = {};
        action.sa_handler = [](int) { stop("an access outside of the allocations, or a misaligned one"); };
        action.sa_flags = SA_ONSTACK | SA_RESETHAND;
        if (sigaltstack(&stack, nullptr) != 0 || sigaction(SIGSEGV, &action, nullptr) != 0) stop("no handler");
    }
    // Runs the thread block with this number, and the others of its cluster, which follow it in y.
    void run_cluster(const Grid & grid, uint64_t number, uint64_t seed);

private:
    void start_block(const Grid & grid, Block & block);
    void run_warps();
    bool copy_bulk();
    void stop_waiting();
};

thread_local Worker * worker = nullptr;

void switch_to(Thread & to, Fiber & from) {
    current = &to;
    threadIdx = to.index;
    blockIdx = to.block->index;
    switch_fiber(from, to.fiber);
}

uint32_t bit(int lane) { return 1u << lane; }

// Gives up the host until something makes the current thread runnable again.
void wait() {
    Thread & t = *current;
    Warp & warp = t.block->warps[size_t(t.warp)];
    warp.runnable &= ~bit(t.lane);
    if (warp.runnable) {
        // The next lane in turn, so that the order of the lanes differs between operations.
        const uint32_t after = warp.runnable & ~(2 * bit(t.lane) - 1);
        const int lane = __builtin_ctz(after ? after : warp.runnable);
        switch_to(t.block->first_thread[t.warp * warp_size + lane], t.fiber);
    } else {
        switch_fiber(t.fiber, worker->scheduler);
    }
}

void wake(const Thread & t) { t.block->warps[size_t(t.warp)].runnable |= bit(t.lane); }

void thread_entry() {
    running->run_thread();
    Thread & t = *current;
    Warp & warp = t.block->warps[size_t(t.warp)];
    if (warp.arrived)
        stop("has ended, and other lanes wait at %s in line %d", warp.site.operation, warp.site.line);
    t.ended = true;
    t.waits = {"the end", 0};
    warp.ended |= bit(t.lane);
    --t.block->live;
    --t.block->cluster->live;
    wait();
    std::abort();
}

// Ends a bulk copy at random, if there is one.
bool Worker::copy_bulk() {
    if (cluster.bulk.empty()) return false;
    const size_t i = random_below(cluster, uint32_t(cluster.bulk.size()));
    const BulkCopy copy = cluster.bulk[i];
    cluster.bulk.erase(cluster.bulk.begin() + int64_t(i));
    std::memcpy(copy.to, copy.from, copy.bytes);
    copy.barrier->bytes -= int32_t(copy.bytes);
    barrier_changed(*copy.barrier);
    return true;
}

// Reports, for each place where threads of a warp wait, the first of them.
void Worker::stop_waiting() {
    const Thread * before = nullptr;
    for (const Thread & t : threads) {
        if (!t.block || t.ended) continue;
        const bool same = before && before->block == t.block && before->warp == t.warp;
        if (same && before->waits.line == t.waits.line) continue;
        before = &t;
        std::fprintf(stderr, "emulator: rank %d, warp %d, lane %d waits at %s in line %d\n", t.block->rank, t.warp,
                     t.lane, t.waits.operation, t.waits.line);
        for (const MemoryBarrierWait & wait : cluster.waits)
            if (wait.thread == &t)
                std::fprintf(stderr, "    for the barrier at %zu, which misses %d arrivals and %d bytes\n",
                             reinterpret_cast<const uint8_t *>(wait.barrier) - t.block->shared, wait.barrier->missing,
                             wait.barrier->bytes);
    }
    current = nullptr;
    stop("the threads of a thread block wait for each other");
}

void Worker::run_warps() {
    std::vector<std::pair<Block *, int>> runnable; // warps
    while (cluster.live > 0) {
        if (random_below(cluster, 4) == 0) copy_bulk(); // at any time, but not at once
        runnable.clear();
        for (Block & block : cluster.blocks)
            for (size_t i = 0; i < block.warps.size(); ++i)
                if (block.warps[i].runnable) runnable.push_back({&block, int(i)});
        if (runnable.empty()) {
            if (!copy_bulk()) stop_waiting();
            continue;
        }
        const auto [block, warp] = runnable[random_below(cluster, uint32_t(runnable.size()))];
        const int lane = __builtin_ctz(block->warps[size_t(warp)].runnable);
        switch_to(block->first_thread[warp * warp_size + lane], scheduler);
        current = nullptr;
    }
}

void Worker::start_block(const Grid & grid, Block & block) {
    const int count = block.threads;
    block.static_bytes = grid.static_bytes;
    block.shared_bytes = (grid.static_bytes + 15) / 16 * 16 + grid.dynamic_bytes;
    block.shared = shared[size_t(block.rank)];
    block.live = count;
    for (NamedBarrier & barrier : block.barriers) barrier = {};
    std::memset(block.shared, poison, block.shared_bytes);
    block.warps.assign(size_t((count + warp_size - 1) / warp_size), Warp{});
    block.of_groups.assign(block.warps.size() / 4 + 1, {});
    for (int i = 0; i < count; ++i) {
        Thread & t = block.first_thread[i];
        t.block = &block;
        t.number = i;
        t.lane = i % warp_size;
        t.warp = i / warp_size;
        const unsigned n = unsigned(i);
        t.index = {n % grid.threads.x, n / grid.threads.x % grid.threads.y, n / grid.threads.x / grid.threads.y};
        t.ended = t.fenced = false;
        t.waits = {"the beginning", 0};
        t.copy_group = t.product_groups = t.awaited_groups = 0;
        t.of_group = 0;
        t.copies.clear();
        t.products.clear();
        // Stacks begin at different places in a page, or they would compete for the same lines of the host's cache.
        t.fiber.start(stacks[size_t(block.rank * count + i)], stack_bytes - size_t(i % warp_size) * 1088, thread_entry);
        block.warps[size_t(t.warp)].runnable |= bit(t.lane);
    }
    for (int i = count; i % warp_size; ++i) block.warps.back().ended |= bit(i % warp_size);
}

void Worker::run_cluster(const Grid & grid, uint64_t number, uint64_t seed) {
    worker = this;
    const int size = int(grid.cluster), count = int(grid.threads.x * grid.threads.y * grid.threads.z);
    blockDim = grid.threads;
    gridDim = grid.blocks;
    while (shared.size() < size_t(size)) {
        shared.push_back(map_memory(shared_capacity + guard_bytes));
        if (mprotect(shared.back() + shared_capacity, guard_bytes, PROT_NONE) != 0) stop("no memory");
    }
    while (stacks.size() < size_t(size * count)) {
        stacks.push_back(map_memory(stack_bytes));
        if (mprotect(stacks.back(), guard_bytes, PROT_NONE) != 0) stop("no memory");
    }
    threads.resize(std::max(threads.size(), size_t(size * count)));
    for (Thread & t : threads) t.block = nullptr;
    cluster.size = size;
    cluster.live = size * count;
    cluster.random = (seed + 1) * 0x9e3779b97f4a7c15 ^ (number + 1) * 0xd1342543de82ef95;
    cluster.waits.clear();
    cluster.bulk.clear();
    cluster.barrier = {};
    cluster.blocks.resize(size_t(size));
    const uint3 first = {unsigned(number % grid.blocks.x), unsigned(number / grid.blocks.x % grid.blocks.y),
                         unsigned(number / grid.blocks.x / grid.blocks.y)};
    for (int rank = 0; rank < size; ++rank) {
        Block & block = cluster.blocks[size_t(rank)];
        block.index = {first.x, first.y + unsigned(rank), first.z};
        block.rank = rank;
        block.cluster = &cluster;
        block.threads = count;
        block.first_thread = threads.data() + rank * count;
        start_block(grid, block);
    }
#if defined(__x86_64__)
    const unsigned mode = _mm_getcsr();
    run_warps();
    _mm_setcsr(mode); // kernels may change it (enter_kernel)
#else
    run_warps();
#endif
}

// Threads of the host, each of which takes the next thread block.
class Workers {
public:
    Workers() {
        for (int i = 1; i < settings().host_threads; ++i)
            std::thread([this] { serve(); }).detach(); // for as long as the process lives
    }
    void run(const Grid & grid) {
        std::unique_lock<std::mutex> lock(mutex_);
        running = &grid;
        clusters_ = uint64_t(grid.blocks.x) * grid.blocks.y * grid.blocks.z / grid.cluster;
        next_ = 0;
        ++launches_;
        uint64_t state = (settings().seed + launches_) * 0x9e3779b97f4a7c15;
        do stride_ = 1 + next_random(state) % clusters_; // of the numbers of the clusters, one after the other
        while (std::gcd(stride_, clusters_) != 1);
        if (clusters_ > 1) started_.notify_all();
        lock.unlock();
        take_blocks(launches_);
        lock.lock();
        ended_.wait(lock, [this] { return busy_ == 0; });
        running = nullptr;
    }

private:
    void take_blocks(uint64_t launch) {
        static thread_local std::unique_ptr<Worker> own;
        if (!own) own = std::make_unique<Worker>();
        for (;;) {
            const uint64_t i = next_++;
            if (i >= clusters_) break;
            const uint64_t x = running->blocks.x, number = i * stride_ % clusters_;
            own->run_cluster(*running, number / x * running->cluster * x + number % x, settings().seed + launch);
        }
    }
    void serve() {
        std::unique_lock<std::mutex> lock(mutex_);
        for (uint64_t seen = 0;;) {
            started_.wait(lock, [&] { return launches_ != seen; });
            seen = launches_;
            if (next_ >= clusters_) continue;
            ++busy_;
            lock.unlock();
            take_blocks(seen);
            lock.lock();
            if (--busy_ == 0) ended_.notify_all();
        }
    }

    std::mutex mutex_;
    std::condition_variable started_, ended_;
    std::atomic<uint64_t> next_{0};
    uint64_t clusters_ = 0, stride_ = 1, launches_ = 0;
    int busy_ = 0;
};

} // namespace

void stop(const char * format, ...) {
    std::fflush(stdout);
    std::fprintf(stderr, "emulator: ");
    std::fprintf(stderr, "%s: ", kernel_name);
    if (const Thread * t = current)
        std::fprintf(stderr, "thread block (%u, %u, %u), warp %d, lane %d: ", t->block->index.x, t->block->index.y,
                     t->block->index.z, t->warp, t->lane);
    va_list arguments;
    va_start(arguments, format);
    std::vfprintf(stderr, format, arguments);
    va_end(arguments);
    std::fprintf(stderr, "\n");
    std::abort();
}

void meet(Site site, void * operands, void (*act)(void ** operands)) {
    Thread & t = *current;
    Warp & warp = t.block->warps[size_t(t.warp)];
    if (warp.ended) stop("%s in line %d, and other lanes have ended", site.operation, site.line);
    if (!warp.arrived) {
        warp.site = site;
        warp.act = act;
    } else if (warp.site.line != site.line || warp.act != act) {
        stop("%s in line %d, and other lanes wait at %s in line %d", site.operation, site.line, warp.site.operation,
             warp.site.line);
    }
    t.waits = site;
    warp.operands[t.lane] = operands;
    warp.arrived |= bit(t.lane);
    if (warp.arrived != ~0u) return wait();
    act(warp.operands);
    warp.arrived = 0;
    warp.runnable = ~0u;
}

static NamedBarrier & arrive(Site site, int number, int threads) {
    if (number < 0 || number > 15) stop("%s in line %d: barrier %d", site.operation, site.line, number);
    NamedBarrier & barrier = current->block->barriers[number];
    if (threads <= 0 || threads % warp_size || threads > current->block->threads)
        stop("%s in line %d: a barrier for %d threads", site.operation, site.line, threads);
    if (barrier.arrived && barrier.expected != threads)
        stop("%s in line %d: barrier %d for %d threads, and others wait for %d", site.operation, site.line, number,
             threads, barrier.expected);
    barrier.expected = threads;
    ++barrier.arrived;
    return barrier;
}

static void complete(NamedBarrier & barrier) {
    if (barrier.arrived < barrier.expected) return;
    for (const Thread * t : barrier.waiting) wake(*t);
    barrier.waiting.clear();
    barrier.result = barrier.any;
    barrier.any = false;
    barrier.arrived = 0;
}

// The current thread, which has arrived at the barrier, waits for the others.
static void wait_at(Site site, NamedBarrier & barrier) {
    current->waits = site;
    if (barrier.arrived < barrier.expected) {
        barrier.waiting.push_back(current);
        wait();
    } else {
        complete(barrier);
    }
}

bool barrier_sync(Site site, int number, int threads, bool any) {
    const Block & block = *current->block;
    if (number == 0 && block.live != block.threads)
        stop("%s in line %d, and other threads have ended", site.operation, site.line);
    NamedBarrier & barrier = arrive(site, number, threads);
    barrier.any = barrier.any || any;
    wait_at(site, barrier);
    return barrier.result;
}

void sync_cluster(Site site) {
    Cluster & cluster = *current->block->cluster;
    if (cluster.live != cluster.size * current->block->threads)
        stop("%s in line %d, and other threads have ended", site.operation, site.line);
    cluster.barrier.expected = cluster.live;
    ++cluster.barrier.arrived;
    wait_at(site, cluster.barrier);
}

void barrier_arrive(Site site, int number, int threads) { complete(arrive(site, number, threads)); }

MemoryBarrier & memory_barrier(Site site, uint32_t address, bool initialised) {
    MemoryBarrier & barrier = *reinterpret_cast<MemoryBarrier *>(shared_at(site, address, sizeof(MemoryBarrier), 8));
    if (initialised && barrier.mark != barrier_mark)
        stop("%s in line %d: the barrier was not initialised", site.operation, site.line);
    barrier.mark = barrier_mark;
    return barrier;
}

void barrier_changed(MemoryBarrier & barrier) {
    if (barrier.missing > 0 || barrier.bytes != 0) return;
    barrier.parity ^= 1;
    barrier.missing = barrier.arrivals;
    auto & waits = worker->cluster.waits;
    for (size_t i = 0; i < waits.size();)
        if (waits[i].barrier == &barrier && waits[i].parity != barrier.parity) {
            wake(*waits[i].thread);
            waits[i] = waits.back();
            waits.pop_back();
        } else {
            ++i;
        }
}

void wait_for_parity(Site site, uint32_t address, int parity) {
    const MemoryBarrier & barrier = memory_barrier(site, address);
    if (barrier.parity != parity) return;
    current->waits = site;
    current->block->cluster->waits.push_back({current, &barrier, parity});
    wait();
}

uint8_t * shared_at(Site site, uint32_t address, size_t bytes, size_t alignment) {
    const Cluster & cluster = *current->block->cluster;
    const uint32_t rank = address >> rank_shift;
    if (rank >= uint32_t(cluster.size)) stop("%s in line %d: no thread block %u", site.operation, site.line, rank);
    const Block & block = cluster.blocks[rank];
    if (block.live == 0) stop("%s in line %d: thread block %u has ended", site.operation, site.line, rank);
    address &= (1u << rank_shift) - 1;
    if (address < shared_begin || address - shared_begin + bytes > block.shared_bytes)
        stop("%s in line %d: address %u of %zu bytes of shared memory", site.operation, site.line,
             address - shared_begin, block.shared_bytes);
    if (address % alignment) stop("%s in line %d: address %u is not aligned", site.operation, site.line, address);
    return block.shared + (address - shared_begin);
}

uint32_t shared_address(const void * p) {
    const Block & block = *current->block;
    const uint8_t * at = static_cast<const uint8_t *>(p);
    if (at < block.shared || at > block.shared + block.shared_bytes) stop("an address outside of shared memory");
    return (uint32_t(at - block.shared) + shared_begin) | uint32_t(block.rank) << rank_shift;
}

void run(const Grid & grid) {
    static Workers & workers = *new Workers; // its threads outlive the program's statics
    workers.run(grid);
}

} // namespace emulator
