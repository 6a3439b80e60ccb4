// Rows of K and V: their layout in a cache, and the pipeline that copies them to shared memory.
#ifndef TURBOQUANT_CUDA_LOAD_H
#define TURBOQUANT_CUDA_LOAD_H

#include "call.cuh"
#include "launch.h"
#include "levels.cuh"

namespace turboquant {
namespace cuda {
namespace {

// ---- cache types

// The properties of a row type. A turbo type has indices of levels, in blocks whose length depends on the head size D.
// The other types have int8 levels in blocks that share a scale, or floats.
template <typename Family_> struct TurboKind {
    using Family = Family_;
    static constexpr bool covered = has_kernels<Family>, turbo = true, floats = false;
    static constexpr bool nibbles = packs_nibbles<Family>, signs = signed_units<Family>;
    static constexpr int parts = level_parts<Family>;
    static constexpr float step = Family::step;
    template <int D> static constexpr int block = rotated_block<D>;
    template <int D> static constexpr int block_bytes = TURBOQUANT_BLOCK_BYTES(Family::bits, block<D>);
    template <int D> using BlockFormat = Format<Family, rotated_block<D>>;
    using LookUpLevels = LookUp<Family>;
};
template <int Block, int Bytes, bool Floats> struct PlainKind {
    using Family = void;
    static constexpr bool covered = true, turbo = false, floats = Floats;
    static constexpr bool nibbles = false, signs = false;
    static constexpr int parts = 1;
    static constexpr float step = 1.0f;
    template <int D> static constexpr int block = Block;
    template <int D> static constexpr int block_bytes = Bytes;
    template <int D> using BlockFormat = void;
    struct LookUpLevels {
        __device__ explicit LookUpLevels(uint32_t) {}
    };
};

template <KV T> struct Kind;
#define TURBOQUANT_KIND(X, ID, name, family, bits, id) \
    template <> struct Kind<KV::name> : TurboKind<family<bits>> {};
TURBOQUANT_FAMILIES(TURBOQUANT_KIND, )
#undef TURBOQUANT_KIND
template <> struct Kind<KV::q8_0> : PlainKind<32, 34, false> {};
template <> struct Kind<KV::f16> : PlainKind<32, 64, true> {};

// Whether two types are of one family of any width.
template <typename A, typename B> constexpr bool are_related = false;
template <template <int> class Family, int A, int B> constexpr bool are_related<Family<A>, Family<B>> = true;

// Builds for tests may leave out kernels.
#ifndef TURBOQUANT_COMPILES
#define TURBOQUANT_COMPILES(type_k, type_v, head) true
#endif

// Whether there is a kernel for a pair of types: related turbo types, or a turbo type with another type. Hosts have
// kernels of their own for pairs without a turbo type.
template <KV TK, KV TV, int D>
constexpr bool covers_pair =
    TURBOQUANT_COMPILES(TK, TV, D) && Kind<TK>::covered && Kind<TV>::covered &&
    (Kind<TK>::turbo && Kind<TV>::turbo ? are_related<typename Kind<TK>::Family, typename Kind<TV>::Family>
                                        : Kind<TK>::turbo || Kind<TV>::turbo);

// The layout of a row of one head: blocks of `block` values, which share a scale unless they are floats.
template <KV T, int D> struct Layout {
    using Family = typename Kind<T>::Family;                        // of a turbo type
    using BlockFormat = typename Kind<T>::template BlockFormat<D>;
    using LookUpLevels = typename Kind<T>::LookUpLevels;
    static constexpr float step = Kind<T>::step; // a value is its level * step * the stored scale of the block
    static constexpr bool turbo = Kind<T>::turbo, floats = Kind<T>::floats;
    static constexpr bool nibbles = Kind<T>::nibbles, signs = Kind<T>::signs; // see levels.cuh
    static constexpr int parts = Kind<T>::parts;                               // of a level, as an operand
    static constexpr int block = Kind<T>::template block<D>;
    static constexpr int block_bytes = Kind<T>::template block_bytes<D>;
    static constexpr int bytes = D / block * block_bytes;

    static __device__ __forceinline__ float load_block_scale(const uint8_t * p) {
        if constexpr (turbo) return load_scale(BlockFormat(), p);
        else return load_half(p);
    }
};

// ---- copies to shared memory

// Copies 16 bytes from global to shared memory. Only `valid` bytes are read; the others become zeros.
__device__ __forceinline__ void copy_async(uint32_t shared, const void * global, int valid) {
#if __CUDA_ARCH__ >= 800
    asm volatile("cp.async.cg.shared.global.L2::128B [%0], [%1], 16, %2;" ::"r"(shared), "l"(global), "r"(valid)
                 : "memory");
#endif
}
__device__ __forceinline__ void copy_commit() {
#if __CUDA_ARCH__ >= 800
    asm volatile("cp.async.commit_group;" ::: "memory");
#endif
}
template <int N> __device__ __forceinline__ void copy_wait() {
#if __CUDA_ARCH__ >= 800
    asm volatile("cp.async.wait_group %0;" ::"n"(N) : "memory");
#endif
}

__device__ __forceinline__ void store_shared(uint32_t shared, uint32_t x) {
    asm volatile("st.shared.u16 [%0], %1;" ::"r"(shared), "h"(uint16_t(x)) : "memory");
}

// As copy_async, for any even number `valid`, negative ones and those above 16 included. `any` is a readable address
// for the case that nothing is valid.
__device__ __forceinline__ void copy_end(uint32_t shared, const uint8_t * global, const uint8_t * any, int valid) {
    if (valid >= 16 || valid <= 0) {
        copy_async(shared, valid > 0 ? global : any, valid > 0 ? 16 : 0);
        return;
    }
    uint16_t x[8]; // all loads are issued before the first store
#pragma unroll
    for (int i = 0; i < 8; ++i) x[i] = 2 * i < valid ? uint16_t(load_u16(global + 2 * i)) : uint16_t(0);
#pragma unroll
    for (int i = 0; i < 8; ++i) store_shared(shared + 2 * i, x[i]);
}

// ---- bulk copies, of Hopper and newer GPUs

#if __CUDA_ARCH__ >= 900
#define TURBOQUANT_BULK_COPIES
#endif
#ifdef TURBOQUANT_BULK_COPIES
#define TURBOQUANT_BULK(...) asm volatile(__VA_ARGS__)
constexpr bool bulk_copies = true;
#else
#define TURBOQUANT_BULK(...)
constexpr bool bulk_copies = false;
#endif

// A barrier in shared memory completes a phase when it has its arrivals and all bytes that were announced for the
// phase. Phases have the parities 0, 1, 0, ...
__device__ __forceinline__ void start_barrier(uint32_t barrier, int arrivals) {
    TURBOQUANT_BULK("mbarrier.init.shared::cta.b64 [%0], %1;\n"
                    "fence.mbarrier_init.release.cluster;" ::"r"(barrier), "r"(arrivals) : "memory");
}
__device__ __forceinline__ void arrive(uint32_t barrier) {
    TURBOQUANT_BULK("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(barrier) : "memory");
}
__device__ __forceinline__ void wait_for_phase(uint32_t barrier, int parity) {
    TURBOQUANT_BULK("{\n"
                    ".reg .pred done;\n"
                    "again:\n"
                    "mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n"
                    "@!done bra again;\n"
                    "}" ::"r"(barrier), "r"(parity) : "memory");
}
// Announces bytes for the barrier's phase, and copies them from global to shared memory. Addresses and sizes are
// multiples of 16.
__device__ __forceinline__ void copy_bulk(uint32_t shared, const void * global, int bytes, uint32_t barrier) {
    TURBOQUANT_BULK("mbarrier.expect_tx.relaxed.cta.shared::cta.b64 [%3], %2;\n"
                    "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];"
                    ::"r"(shared), "l"(global), "r"(bytes), "r"(barrier) : "memory");
}

// The thread blocks of a cluster. An address in the shared memory of another one is that of the same place in the own
// memory, mapped; the rank of the thread block is in the upper bits of both. Nothing may reach a thread block that has
// not started or has ended, so sync_cluster is called before the first and after the last access. The latter is not
// needed if the accessed thread block waits for it.
__device__ __forceinline__ int rank_in_cluster() {
    int rank = 0;
    TURBOQUANT_BULK("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
    return rank;
}
__device__ __forceinline__ uint32_t map_to(uint32_t shared, int rank) {
    uint32_t mapped = shared;
    TURBOQUANT_BULK("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(mapped) : "r"(shared), "r"(rank));
    return mapped;
}
__device__ __forceinline__ uint32_t load_mapped(uint32_t mapped) {
    uint32_t x = 0;
    TURBOQUANT_BULK("ld.shared::cluster.u32 %0, [%1];" : "=r"(x) : "r"(mapped) : "memory");
    return x;
}
// Arrives without a fence between the thread blocks, so it may only tell that memory has been read.
__device__ __forceinline__ void arrive_mapped(uint32_t barrier) {
    TURBOQUANT_BULK("mbarrier.arrive.shared::cluster.b64 _, [%0];" ::"r"(barrier) : "memory");
}
// Announces bytes that other thread blocks copy, and arrives.
__device__ __forceinline__ void arrive_for_bytes(uint32_t barrier, int bytes) {
    TURBOQUANT_BULK("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(barrier), "r"(bytes) : "memory");
}
// Copies bytes of the own memory to another thread block, which announces them for the phase of its barrier.
__device__ __forceinline__ void copy_mapped(uint32_t mapped, uint32_t from, int bytes, uint32_t mapped_barrier) {
    TURBOQUANT_BULK("cp.async.bulk.shared::cluster.shared::cta.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];"
                    ::"r"(mapped), "r"(from), "r"(bytes), "r"(mapped_barrier) : "memory");
}
// Stores a word in another thread block, which announces its four bytes for the phase of its barrier.
__device__ __forceinline__ void store_mapped(uint32_t mapped, uint32_t x, uint32_t mapped_barrier) {
    TURBOQUANT_BULK("st.async.shared::cluster.mbarrier::complete_tx::bytes.u32 [%0], %1, [%2];"
                    ::"r"(mapped), "r"(x), "r"(mapped_barrier) : "memory");
}
// All threads of the cluster wait for each other. The instructions count warps, so their lanes must be together.
__device__ __forceinline__ void sync_cluster() {
    __syncwarp();
    TURBOQUANT_BULK("barrier.cluster.arrive.release.aligned;\n"
                    "barrier.cluster.wait.acquire.aligned;" ::: "memory");
}
// Orders a thread's accesses to shared memory before later bulk copies to the same memory.
__device__ __forceinline__ void before_bulk_copies() { TURBOQUANT_BULK("fence.proxy.async.shared::cta;" ::: "memory"); }
// A warp waits until all other warps of the thread block have called tell_waiting_warp with the same number, 1, 2, ...
__device__ __forceinline__ void wait_for_warps(int number) {
    TURBOQUANT_BULK("barrier.cta.sync %0, %1;" ::"r"(number), "r"(blockDim.x) : "memory");
}
__device__ __forceinline__ void tell_waiting_warp(int number) {
    TURBOQUANT_BULK("barrier.cta.arrive %0, %1;" ::"r"(number), "r"(blockDim.x) : "memory");
}

// The rows of K or V of a thread block's heads.
struct Side {
    const uint8_t * base; // row 0
    int64_t stride;       // bytes between rows
    int chunk, pitch;     // bytes of a row in the cache, and in shared memory
};

// Threads that copy rows together: the number of the calling thread among them, and how many they are.
struct Copiers {
    unsigned thread, threads;
};

// Starts to copy rows first ... first + rows - 1 to shared memory; rows from n_kv on become zeros. A row keeps its
// address modulo 16 (row_offset).
__device__ __forceinline__ void load_rows(uint32_t shared, const Side & side, int rows, int64_t first, int64_t n_kv,
                                          Copiers by = {threadIdx.x, blockDim.x}) {
    const uint8_t * any = side.base - (reinterpret_cast<uintptr_t>(side.base) & 15);
    if (side.stride == side.pitch && side.chunk == side.pitch) { // rows without gaps are one run of bytes
        const uint8_t * from = side.base + first * side.stride + by.thread * 16;
        const int step = by.threads * 16, all = rows * side.pitch;
        if (first + rows <= n_kv) {
#pragma unroll 4
            for (int at = by.thread * 16; at < all; at += step, from += step) copy_async(shared + at, from, 16);
        } else {
            const int end = int(n_kv - first) * side.pitch;
#pragma unroll 1
            for (int at = by.thread * 16; at < all; at += step, from += step)
                copy_end(shared + at, from, any, end - at);
        }
        return;
    }
    const int log_lanes = side.pitch <= 128 ? 3 : side.pitch <= 256 ? 4 : 5, lanes = 1 << log_lanes; // that copy a row
    const int apart = by.threads >> log_lanes, unit = (by.thread & (lanes - 1)) * 16;
    int r = by.thread >> log_lanes;
    const uint8_t * from = side.base + (first + r) * side.stride + unit;
    shared += r * side.pitch + unit;
    const int64_t from_step = apart * side.stride;
    const int to_step = apart * side.pitch;
    const int left = int(n_kv - 1 - first); // rows before the last one: the bytes behind them may be read
    const int simple = min(left, rows);
    if (side.pitch <= 512) {
#pragma unroll 4
        for (; r < simple; r += apart, from += from_step, shared += to_step) {
            const int offset = int(reinterpret_cast<uintptr_t>(from) & 15);
            if (unit < offset + side.chunk) copy_async(shared, from - offset, 16);
        }
    } else {
#pragma unroll 1
        for (; r < simple; r += apart, from += from_step, shared += to_step) {
            const int offset = int(reinterpret_cast<uintptr_t>(from) & 15), bytes = offset + side.chunk - unit;
            const uint8_t * unit_from = from - offset;
#pragma unroll 4
            for (int at = 0; at < bytes; at += 512, unit_from += 512) copy_async(shared + at, unit_from, 16);
        }
    }
#pragma unroll 1
    for (; r < rows; r += apart, from += from_step, shared += to_step) {
        const int offset = int(reinterpret_cast<uintptr_t>(from) & 15), bytes = offset + side.chunk - unit;
#pragma unroll 1
        for (int at = 0; at < bytes; at += lanes * 16)
            copy_end(shared + at, from - offset + at, any, r == left ? bytes - at : 0);
    }
}

// Copies rows without gaps, which are one run of bytes. A whole warp calls this.
__device__ __forceinline__ void load_run(uint32_t shared, const Side & side, int rows, int64_t first, int64_t n_kv,
                                         int lane, uint32_t barrier) {
    const int valid = first + rows <= n_kv ? rows : int(n_kv - first);
    if (lane == 0) copy_bulk(shared, side.base + first * side.stride, valid * side.pitch, barrier);
    for (int at = valid * side.pitch + 2 * lane; at < rows * side.pitch; at += 64) store_shared(shared + at, 0);
}

// Copies the rows that a list of length `listed` names; the rest of `rows` become zeros. Rows are aligned to 16 bytes.
// Most of them follow each other, because a prompt's rows do. A whole warp calls this.
__device__ __forceinline__ void load_listed(uint32_t shared, const Side & side, int rows, const int * list, int listed,
                                            int lane, uint32_t barrier) {
#pragma unroll 1
    for (int r = lane; r - lane < listed; r += 32) {
        const int row = r < listed ? list[r] : -1, first = __shfl_sync(all_lanes, row, 0);
        const bool run = side.stride == side.pitch && __all_sync(all_lanes, row == first + lane);
        if (row >= 0 && (!run || lane == 0))
            copy_bulk(shared + r * side.pitch, side.base + row * side.stride, run ? 32 * side.pitch : side.chunk,
                      barrier);
    }
#pragma unroll 1
    for (int at = listed * side.pitch + 2 * lane; at < rows * side.pitch; at += 64) store_shared(shared + at, 0);
}

// The address of row r of a tile, modulo 16; `low` is that of row 0. Strides are even, so it depends only on r mod 8.
__device__ __forceinline__ int row_offset(uint32_t low, uint32_t stride, int r) {
    return int((low + uint32_t(r) * stride) & 15);
}

// The address of shared memory as a pointer. Compilers compute that of `shared` again where they need it, for lack of
// registers, but not one that was computed from an address.
__device__ __forceinline__ const uint8_t * shared_pointer(uint32_t address) {
    return static_cast<const uint8_t *>(__cvta_shared_to_generic(address));
}

// ---- the pipeline

// The pipeline: the rows of K and V of a thread block pass through plan.stages stages in shared memory. While the warps
// compute with the rows of one stage, the other stages are loaded. A stage has rows of K, then the same rows of V.
// Before the stages are their barriers.
//
// Runs: whether a thread block has most_warps KV heads whose rows are runs of bytes, as those of many models are. Then
// the distances between rows are constants, which instructions need not compute.
template <KV TK, KV TV, int D, bool Gathered, bool Runs> struct Stages {
    using LK = Layout<TK, D>;
    using LV = Layout<TV, D>;
    const AttentionCall & call;
    const Place & place;
    const uint8_t *k, *v; // row 0 of the thread block's heads
    uint32_t barriers, shared_address; // of the first stage
    // Addresses in the first stage, in blocks of the lane's rows of its warp's tile: row `quad`, and for the levels of V
    // rows 2 * in_quad and 2 * in_quad + 1. The lane's other rows are 8, 16 and 24 rows further on.
    int k_row, v_row, v_row0, v_row1;
    int pitch_k, pitch_v, rows, bytes; // of the plan; rows and bytes are those of a stage

    // shared: where the stages begin.
    __device__ __forceinline__ Stages(const AttentionCall & call, const Place & place, const uint8_t * shared)
        : call(call), place(place) {
        const Attention & a = call.a;
        const AttentionPlan & p = call.plan;
        k = static_cast<const uint8_t *>(a.k) + place.kv_stream * a.k_stream + place.first_head * a.k_head;
        v = static_cast<const uint8_t *>(a.v) + place.kv_stream * a.v_stream + place.first_head * a.v_head;
        pitch_k = Runs ? most_warps * LK::bytes : p.pitch_k;
        pitch_v = Runs ? most_warps * LV::bytes : p.pitch_v;
        rows = Runs ? tile_rows : call.stage_rows;
        bytes = Runs ? tile_rows * (pitch_k + pitch_v) : call.stage_bytes;
        shared_address = uint32_t(__cvta_generic_to_shared(shared));
        // Without the lane the compiler would know that all lanes have the same address, and compute it in every step.
        barriers = uint32_t(keep(int(shared_address - barrier_bytes) + place.lane)) - place.lane;
        // A step advances by a multiple of 32 rows, so the addresses of later tiles are the same modulo 16.
        const uint32_t row = uint32_t(place.begin + place.row_tile * tile_rows);
        const uint32_t k_stride = uint32_t(a.k_row), v_stride = uint32_t(a.v_row);
        const auto offset = [](uint32_t low, uint32_t stride, int r) { return Runs ? 0 : row_offset(low, stride, r); };
        const uint32_t k_low = uint32_t(reinterpret_cast<uintptr_t>(k)) + row * k_stride,
                       v_low = uint32_t(reinterpret_cast<uintptr_t>(v)) + row * v_stride;
        const int k_at = place.row_tile * tile_rows * pitch_k + place.head_in_block * LK::bytes;
        const int v_at =
            rows * pitch_k + place.row_tile * tile_rows * pitch_v + place.head_in_block * LV::bytes;
        const int quad = place.quad, even = 2 * place.in_quad, odd = even + 1;
        k_row = keep(int(shared_address) + k_at + quad * pitch_k + offset(k_low, k_stride, quad));
        v_row = keep(int(shared_address) + v_at + quad * pitch_v + offset(v_low, v_stride, quad));
        v_row0 = keep(int(shared_address) + v_at + even * pitch_v + offset(v_low, v_stride, even));
        v_row1 = keep(int(shared_address) + v_at + odd * pitch_v + offset(v_low, v_stride, odd));
    }

    // Prefetches the rows of the first stage. The preceding kernel may still be running and store some of them.
    __device__ __forceinline__ void prefetch_rows() const {
        if (int(threadIdx.x) >= min(rows, place.length)) return;
        prefetch(k + (place.begin + threadIdx.x) * call.a.k_row);
        prefetch(v + (place.begin + threadIdx.x) * call.a.v_row);
    }

    __device__ __forceinline__ Side keys() const {
        return {k, call.a.k_row, place.block_heads * LK::bytes, pitch_k};
    }
    __device__ __forceinline__ Side values() const {
        return {v, call.a.v_row, place.block_heads * LV::bytes, pitch_v};
    }
    __device__ __forceinline__ bool bulk() const { return bulk_copies && (Gathered || Runs || call.plan.gapless); }
    // The warp that loads a stage by bulk copies.
    __device__ __forceinline__ bool loads(int stage) const {
        return place.warp == min(stage, int(blockDim.x / 32) - 1);
    }
    __device__ __forceinline__ uint32_t barrier(int stage) const { return barriers + 8 * stage; }

    // Starts to load the thread block's rows from `at` on into a stage. One warp calls this for bulk copies, else all.
    __device__ __forceinline__ void load(int at, int stage) const {
        const uint32_t to_k = barriers + barrier_bytes + stage * bytes, to_v = to_k + rows * pitch_k;
        const int64_t first = place.begin + at, n_kv = call.a.n_kv;
        if (bulk()) {
            if constexpr (Gathered) {
                const int * list = call.lists + place.token(call) * n_kv + first;
                const int listed = min(rows, place.length - at);
#pragma unroll 1
                for (int side = 0; side < 2; ++side)
                    load_listed(side ? to_v : to_k, side ? values() : keys(), rows, list, listed, place.lane,
                                barrier(stage));
            } else {
                load_run(to_k, keys(), rows, first, n_kv, place.lane, barrier(stage));
                load_run(to_v, values(), rows, first, n_kv, place.lane, barrier(stage));
            }
            __syncwarp();
            if (place.lane == 0) arrive(barrier(stage));
        } else {
            if (at < place.length) {
#pragma unroll 1
                for (int side = 0; side < 2; ++side)
                    load_rows(side ? to_v : to_k, side ? values() : keys(), rows, first, n_kv);
            }
            copy_commit(); // of a group without rows as well, because copy_wait counts groups
        }
    }
    // Must be called by all threads before start().
    __device__ __forceinline__ void start_barriers() const {
        if (!bulk()) return;
        if (int(threadIdx.x) < call.plan.stages) start_barrier(barrier(int(threadIdx.x)), 1);
        __syncthreads();
    }
    // Starts to load all stages but the last. With bulk copies, the first warp does it.
    __device__ __forceinline__ void start() const {
        if (bulk() && place.warp > 0) return;
#pragma unroll 1
        for (int stage = 0, at = 0; stage < call.plan.stages - 1; ++stage, at += rows)
            if (!bulk() || at < place.length) load(at, stage);
    }
    // Waits for `stage`, which has the rows from `at` on, and starts to load the rows `ahead` of these into the
    // preceding stage as soon as all warps have read it. With bulk copies, only the warp that loads waits for the other
    // warps. `parity` changes when the stages are used again.
    __device__ __forceinline__ void advance(int at, int stage, int parity, int ahead) const {
        const int stages = call.plan.stages, preceding = stage ? stage - 1 : stages - 1;
        if (bulk()) {
            if (at + ahead < place.length) {
                if (loads(preceding)) {
                    wait_for_warps(preceding + 1);
                    load(at + ahead, preceding);
                } else {
                    tell_waiting_warp(preceding + 1);
                }
            }
            wait_for_phase(barrier(stage), parity);
        } else {
            if (stages == 3) copy_wait<1>();
            else copy_wait<0>();
            __syncthreads();
            load(at + ahead, preceding);
        }
    }
    __device__ __forceinline__ int after(int stage) const { return stage + 1 == call.plan.stages ? 0 : stage + 1; }
};

} // namespace
} // namespace cuda
} // namespace turboquant

#endif
