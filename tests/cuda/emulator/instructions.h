// The PTX instructions of the kernels' asm statements: translate.py makes a call of each, with the name in which
// underscores stand for dots and colons, the line, and the operands in their order. An instruction that is not here is
// an error of the compiler. Registers in braces are an array: pointers to those that an instruction writes, values of
// the others.
#ifndef TURBOQUANT_CUDA_EMULATOR_INSTRUCTIONS_H
#define TURBOQUANT_CUDA_EMULATOR_INSTRUCTIONS_H

#include "threads.h"

#include <array>
#include <cstring>

namespace emulator {
namespace ptx {

template <typename T, typename... More> std::array<T *, 1 + sizeof...(More)> outputs(T & first, More &... more) {
    return {&first, &more...};
}
template <typename... T> std::array<uint32_t, sizeof...(T)> inputs(T... x) {
    static_assert(((sizeof(T) == 4) && ...), "registers have 32 bits");
    return {uint32_t(x)...};
}

template <int N> using Floats = std::array<float *, N>;
template <int N> using Integers = std::array<int *, N>;
template <int N> using Words = std::array<uint32_t, N>;

// ---- arithmetic

inline void prmt_b32(int, uint32_t & d, uint32_t a, uint32_t b, uint32_t selector) {
    const uint64_t bytes = uint64_t(b) << 32 | a;
    d = 0;
    for (int i = 0; i < 4; ++i) {
        const uint32_t nibble = selector >> (4 * i) & 15;
        const uint32_t byte = uint32_t(bytes >> (8 * (nibble & 7))) & 0xff;
        d |= (nibble & 8 ? (byte & 0x80 ? 0xffu : 0u) : byte) << (8 * i);
    }
}
inline void lop3_b32(int, uint32_t & d, uint32_t a, uint32_t b, uint32_t c, int table) {
    d = 0;
    for (int i = 0; i < 8; ++i)
        if (table >> i & 1) d |= (i & 4 ? a : ~a) & (i & 2 ? b : ~b) & (i & 1 ? c : ~c);
}
inline void mad_lo_u32(int, uint32_t & d, uint32_t a, uint32_t b, uint32_t c) { d = a * b + c; }
inline void mul_lo_u32(int, uint32_t & d, uint32_t a, uint32_t b) { d = a * b; }
inline void mul_hi_u32(int, uint32_t & d, uint32_t a, uint32_t b) { d = uint32_t(uint64_t(a) * b >> 32); }
inline void dp2a_lo_u32_u32(int, uint32_t & d, uint32_t a, uint32_t b, uint32_t c) {
    d = c + (a & 0xffff) * (b & 0xff) + (a >> 16) * (b >> 8 & 0xff);
}
inline void max_ftz_NaN_f32(int, float & d, float a, float b) { d = a != a || b != b ? a + b : a < b ? b : a; }
void fma_rn_f32(int line, float & d, float a, float b, float c); // keeps floats below the normal ones
inline void mov_b32(int, int & d, int a) { d = a; }
inline void mov_u32(int, int & d, unsigned a) { d = int(a); }
inline void mapa_shared__cluster_u32(int, uint32_t & d, uint32_t address, int rank) {
    d = (address & ((1u << rank_shift) - 1)) | uint32_t(rank) << rank_shift;
}
inline unsigned tid_x() { return threadIdx.x; }
inline int cluster_ctarank() { return current->block->rank; }
// An empty statement, which only keeps registers.
template <typename T> void nothing(int, T & x) { asm volatile("" : "+m"(x)); }

// ---- memory

inline void prefetch_global_L2(int, const void *) {}
inline void st_global_v2_b32(int, void * to, Words<2> x) { std::memcpy(to, x.data(), sizeof(x)); }
inline void st_global_v4_b32(int, void * to, Words<4> x) { std::memcpy(to, x.data(), sizeof(x)); }
void st_shared_u16(int line, uint32_t address, uint16_t x);
void cp_async_cg_shared_global_L2__128B(int line, uint32_t to, const void * from, int bytes, int valid);
void cp_async_commit_group(int line);
void cp_async_wait_group(int line, int pending);
void mbarrier_init_shared__cta_b64(int line, uint32_t barrier, int arrivals);
void mbarrier_arrive_shared__cta_b64(int line, uint32_t barrier);
void mbarrier_expect_tx_relaxed_cta_shared__cta_b64(int line, uint32_t barrier, int bytes);
bool mbarrier_try_wait_parity_shared__cta_b64(int line, uint32_t barrier, int parity); // waits until it is true
void cp_async_bulk_shared__cluster_global_mbarrier__complete_tx__bytes(int line, uint32_t to, const void * from,
                                                                       int bytes, uint32_t barrier);
void cp_async_bulk_shared__cluster_shared__cta_mbarrier__complete_tx__bytes(int line, uint32_t to, uint32_t from,
                                                                            int bytes, uint32_t barrier);
void mbarrier_arrive_shared__cluster_b64(int line, uint32_t barrier);
void st_async_shared__cluster_mbarrier__complete_tx__bytes_u32(int line, uint32_t to, uint32_t x, uint32_t barrier);
void mbarrier_arrive_expect_tx_shared__cta_b64(int line, uint32_t barrier, int bytes);
void ld_shared__cluster_u32(int line, uint32_t & d, uint32_t address);
inline void barrier_cluster_arrive_release_aligned(int) {}
inline void barrier_cluster_wait_acquire_aligned(int line) { sync_cluster({"barrier.cluster", line}); }
// What memory the instructions see is the same for all of them here.
inline void fence_mbarrier_init_release_cluster(int) {}
inline void fence_proxy_async_shared__cta(int) {}

// ---- barriers, and the order of kernels

inline void bar_sync(int line, int barrier, int threads) { barrier_sync({"bar.sync", line}, barrier, threads); }
inline void barrier_cta_sync(int line, int barrier, int threads) {
    barrier_sync({"barrier.cta.sync", line}, barrier, threads);
}
inline bool barrier_cta_red_or_pred(int line, int barrier, int threads, int x) {
    return barrier_sync({"barrier.cta.red", line}, barrier, threads, x != 0);
}
inline void barrier_cta_arrive(int line, int barrier, int threads) {
    emulator::barrier_arrive({"barrier.cta.arrive", line}, barrier, threads);
}
// Kernels run one after the other.
inline void griddepcontrol_wait(int) {}
inline void griddepcontrol_launch_dependents(int) {}
inline void setmaxnreg_inc_sync_aligned_u32(int, int) {}
inline void setmaxnreg_dec_sync_aligned_u32(int, int) {}

// ---- matrices of a warp

void movmatrix_sync_aligned_m8n8_trans_b16(int line, uint32_t & d, uint32_t a);
void ldmatrix_sync_aligned_m8n8_x4_shared_b16(int line, std::array<uint32_t *, 4> d, uint32_t address);
void ldmatrix_sync_aligned_m8n8_x4_trans_shared_b16(int line, std::array<uint32_t *, 4> d, uint32_t address);
void stmatrix_sync_aligned_m8n8_x4_trans_shared_b16(int line, uint32_t address, Words<4> a);
void mma_sync_aligned_m16n8k32_row_col_s32_s8_s8_s32(int line, Integers<4> d, Words<4> a, Words<2> b, Integers<4> c);
void mma_sync_aligned_m16n8k32_row_col_s32_u8_s8_s32(int line, Integers<4> d, Words<4> a, Words<2> b, Integers<4> c);
void mma_sync_aligned_m16n8k16_row_col_f32_f16_f16_f32(int line, Floats<4> d, Words<4> a, Words<2> b, Floats<4> c);

// ---- matrices of a warpgroup

void wgmma_fence_sync_aligned(int line);
void wgmma_commit_group_sync_aligned(int line);
void wgmma_wait_group_sync_aligned(int line, int pending);
void wgmma_mma_async_sync_aligned_m64n64k32_s32_u8_u8(int line, Integers<32> d, Words<4> a, uint64_t b, int add);
void wgmma_mma_async_sync_aligned_m64n64k32_s32_s8_s8(int line, Integers<32> d, Words<4> a, uint64_t b, int add);
void wgmma_mma_async_sync_aligned_m64n128k16_f32_f16_f16(int line, Floats<64> d, Words<4> a, uint64_t b, int add,
                                                         int scale_a, int scale_b, int transpose_b);
void wgmma_mma_async_sync_aligned_m64n32k16_f32_f16_f16(int line, Floats<16> d, Words<4> a, uint64_t b, int add,
                                                        int scale_a, int scale_b, int transpose_b);
void wgmma_mma_async_sync_aligned_m64n16k32_s32_u8_s8(int line, Integers<8> d, Words<4> a, uint64_t b, int add);
void wgmma_mma_async_sync_aligned_m64n32k32_s32_u8_s8(int line, Integers<16> d, Words<4> a, uint64_t b, int add);
void wgmma_mma_async_sync_aligned_m64n16k16_f32_f16_f16(int line, Floats<8> d, Words<4> a, uint64_t b, int add,
                                                        int scale_a, int scale_b, int transpose_b);

} // namespace ptx
} // namespace emulator

#endif
