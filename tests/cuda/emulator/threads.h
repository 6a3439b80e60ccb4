// The threads of a thread block, as fibers, and how they wait for each other.
//
// A thread of the host runs a thread block, or those of a cluster: warps in a random order, each of them until all its
// lanes wait. The lanes of a warp run one after the other, from one collective operation to the next. So a thread that
// does not wait for what it needs reads what the memory had before, in most orders.
//
// What makes the emulator stop, with a message and SIGABRT:
//   - lanes of a warp that reach different collective operations, or of which some have ended
//   - threads that wait at barriers with different numbers of threads, or forever
//   - warps of a warpgroup that reach different instructions of warpgroups
//   - accesses to a thread block outside of the cluster, or that has ended
//   - accesses outside of the allocations and of shared memory (not all of them: what lies behind an allocation up to a
//     multiple of 256 bytes may be read, and memory in it that belongs to something else is not distinguished)
//   - misaligned addresses, also of vectors
#ifndef TURBOQUANT_CUDA_EMULATOR_THREADS_H
#define TURBOQUANT_CUDA_EMULATOR_THREADS_H

#include "fiber.h"

#include <cstddef>
#include <cstdint>
#include <functional>
#include <vector>

struct uint3 {
    unsigned x, y, z;
};
extern __thread uint3 threadIdx, blockIdx, blockDim, gridDim; // of the current thread

namespace emulator {

constexpr int warp_size = 32;
constexpr int most_threads = 1024;              // of a thread block
constexpr size_t shared_capacity = 228u << 10;  // of a multiprocessor, at most
constexpr uint32_t shared_begin = 1024;         // the address of a thread block's shared memory: the GPU has the rest
constexpr int most_cluster = 8;                 // thread blocks of a cluster
constexpr int rank_shift = 24;                  // addresses have the rank of the thread block from this bit on

// A collective operation in the source, by its kind and line.
struct Site {
    const char * operation;
    int line;
};

// A copy of 16 bytes to shared memory that a thread has started. It happens when the thread waits for its group.
struct AsyncCopy {
    uint32_t to;
    const void * from;
    int valid, group;
};

// A matrix product that a warpgroup has started. It happens when the warp waits for it.
struct AsyncProduct {
    enum Kind { u8, s8, u8_s8, f16 } kind; // of both operands, or of A and B
    int columns;         // of B
    bool accumulate, transposed;
    int group; // negative: not committed
    uint32_t a[4];       // the lane's registers of A
    uint64_t b;          // the descriptor of B
    uint32_t * d[64];    // the lane's registers of the result
};

struct Block;

struct Thread {
    Fiber fiber;
    Block * block;
    uint3 index; // threadIdx
    int number, lane, warp;
    bool ended;
    Site waits; // where it waits
    int copy_group = 0;
    std::vector<AsyncCopy> copies;
    std::vector<AsyncProduct> products;
    int product_groups = 0, awaited_groups = 0; // committed; those whose products have been waited for
    size_t of_group = 0; // instructions of warpgroups that it has executed
    bool fenced = false; // whether products may use registers that were written before
};

struct Warp {
    uint32_t runnable, ended, arrived; // lanes
    // Of the collective operation in which some have arrived:
    Site site;
    void (*act)(void ** operands);
    void * operands[warp_size];
};

// What threads wait for at a barrier with a number.
struct NamedBarrier {
    int arrived = 0, expected = 0;
    bool any = false; // whether an argument of __syncthreads_or was true
    bool result = false;
    std::vector<Thread *> waiting;
};

// A barrier in shared memory, as its eight bytes.
struct MemoryBarrier {
    uint8_t mark, parity;      // mark: whether it was initialised
    uint8_t arrivals, missing; // of a phase, and of the current one
    int32_t bytes;             // that were announced and have not been copied
};
struct MemoryBarrierWait {
    Thread * thread;
    const MemoryBarrier * barrier;
    int parity;
};

// A bulk copy that was started.
struct BulkCopy {
    uint8_t * to;
    const void * from;
    uint32_t bytes;
    MemoryBarrier * barrier;
};

struct Cluster;

struct Block {
    uint3 index; // blockIdx
    int rank;    // in the cluster
    Cluster * cluster;
    Thread * first_thread;          // the others follow it
    uint8_t * shared;               // the memory from address shared_begin on
    size_t shared_bytes, static_bytes;
    int threads;
    std::vector<Warp> warps;
    NamedBarrier barriers[16];
    std::vector<std::vector<int>> of_groups; // the lines of the instructions that each warpgroup has executed
    int live; // threads that have not ended
};

// What the thread blocks of a cluster share.
struct Cluster {
    int size;        // thread blocks
    uint64_t random; // the state of a generator
    std::vector<Block> blocks;
    std::vector<MemoryBarrierWait> waits;
    std::vector<BulkCopy> bulk;
    NamedBarrier barrier;
    int live; // threads that have not ended
};

// Of the thread of the host: the thread that it runs, and the name of its kernel. (thread_local would call a function
// at each access.)
extern __thread Thread * current;
extern __thread const char * kernel_name;

// Stops the process with a message that names the kernel and the current thread.
[[noreturn]] void stop(const char * format, ...) __attribute__((format(printf, 1, 2)));

// ---- operations of the current thread

// Waits until all lanes of the warp have arrived. The last one calls act(operands), with those of all lanes.
void meet(Site site, void * operands, void (*act)(void ** operands));

template <typename Operands, void (*act)(Operands ** lanes)> void collective(Site site, Operands & own) {
    meet(site, &own, [](void ** operands) { act(reinterpret_cast<Operands **>(operands)); });
}

// Waits for so many threads at a barrier, or only counts the thread among them. Returns whether `any` is true for one.
bool barrier_sync(Site site, int number, int threads, bool any = false);
void barrier_arrive(Site site, int number, int threads);

MemoryBarrier & memory_barrier(Site site, uint32_t address, bool initialised = true);
void barrier_changed(MemoryBarrier & barrier); // ends the phase if nothing is missing
void wait_for_parity(Site site, uint32_t address, int parity);
void sync_cluster(Site site); // all threads of the cluster

// The bytes of shared memory from an address on, a multiple of `alignment`. A mapped address is that of a thread block
// of the cluster.
uint8_t * shared_at(Site site, uint32_t address, size_t bytes, size_t alignment);
uint32_t shared_address(const void * p);

// ---- grids

struct Grid {
    uint3 blocks, threads;
    unsigned cluster; // thread blocks, which follow each other in y
    size_t static_bytes, dynamic_bytes;
    std::function<void()> run_thread; // runs the kernel for the current thread
};
// Runs all thread blocks, several at a time.
void run(const Grid & grid);

} // namespace emulator

#endif
