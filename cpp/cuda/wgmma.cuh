// Instructions of Hopper GPUs: matrix products of warpgroups, and the division of registers among warpgroups. They
// exist only in code for sm_90a; elsewhere the functions are empty.
//
// A warpgroup is four consecutive warps. Operand A of a product has 64 rows, 16 of each warp, in registers, laid out as
// those of mma.sync. Operand B is in shared memory. Results are laid out as those of mma.sync: of each eight columns, a
// lane has columns 2 * in_quad and 2 * in_quad + 1, in rows `quad` and quad + 8.
#ifndef TURBOQUANT_CUDA_WGMMA_H
#define TURBOQUANT_CUDA_WGMMA_H

#include <cuda_runtime.h>

#include <cstdint>

#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
#define TURBOQUANT_WGMMA 1
#endif

namespace turboquant {
namespace cuda {
namespace {

// ---- matrices in shared memory
//
// Both matrices consist of rows of 128 bytes, and a group of eight rows is aligned to 1024 bytes. The unit of 16 bytes
// with number u of row r is in place u ^ r % 8.
constexpr int matrix_alignment = 1024;

// A matrix is a word with its address in units of 16 bytes, so that an offset may be added, and a distance. An address
// has less than 18 bits, and behind them the rank of the thread block in its cluster.
__device__ __forceinline__ uint32_t matrix_at(uint32_t address, int apart) {
    return (address & 0x3ffff) >> 4 | uint32_t(apart >> 4) << 16;
}
__device__ __forceinline__ uint64_t matrix_descriptor(uint32_t matrix) {
    constexpr uint32_t group_bytes = 1024; // of eight rows
    return uint64_t(group_bytes >> 4 | 1u << 30) << 32 | matrix;
}

// Operand B of the scores: rows of 128 int8 values of K or of queries, or of 64 binary16 values. A product takes 32
// bytes of these, 32 bytes further on each time.
__device__ __forceinline__ uint32_t key_matrix(uint32_t address) { return matrix_at(address, 16); }

// Operand B of the output: rows of 64 binary16 values of V. The next 64 values of the rows are `apart` bytes further
// on. A product takes 16 rows.
__device__ __forceinline__ uint32_t value_matrix(uint32_t address, int apart) { return matrix_at(address, apart); }

// ---- products

#define TURBOQUANT_4(c, d, i) c(d[i]), c(d[i + 1]), c(d[i + 2]), c(d[i + 3])
#define TURBOQUANT_16(c, d, i) \
    TURBOQUANT_4(c, d, i), TURBOQUANT_4(c, d, i + 4), TURBOQUANT_4(c, d, i + 8), TURBOQUANT_4(c, d, i + 12)

// Orders accesses of registers and the following products.
__device__ __forceinline__ void products_fence() {
#if TURBOQUANT_WGMMA
    asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
#endif
}
// Ends a group of products.
__device__ __forceinline__ void products_commit() {
#if TURBOQUANT_WGMMA
    asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
#endif
}
// Waits until all groups but the last N are complete.
template <int N> __device__ __forceinline__ void products_wait() {
#if TURBOQUANT_WGMMA
    asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(N) : "memory");
#endif
}
// Keeps the compiler from moving accesses of registers that products in flight read or write.
template <typename T, int N> __device__ __forceinline__ void keep_registers(T (&x)[N]) {
#if TURBOQUANT_WGMMA
#pragma unroll
    for (int i = 0; i < N; ++i) {
        if constexpr (sizeof(T) == 4 && T(0.5f) != T(0)) asm volatile("" : "+f"(x[i])::"memory");
        else asm volatile("" : "+r"(x[i])::"memory");
    }
#endif
}

#define TURBOQUANT_PRODUCT(types, mode, add)                                                                           \
    asm volatile("wgmma.mma_async.sync.aligned.m64n64k32.s32." types " "                                               \
                 "{%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15,%16,%17,%18,%19,%20,%21,%22,%23,%24,%25,%26," \
                 "%27,%28,%29,%30,%31}, {%32,%33,%34,%35}, %36, " add ";"                                              \
                 : TURBOQUANT_16(mode, d, 0), TURBOQUANT_16(mode, d, 16)                                               \
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b))
// d = a product of 64 x 32 bytes of A and 64 rows of B, all unsigned.
__device__ __forceinline__ void start_keys(int (&d)[32], const uint32_t (&a)[4], uint64_t b) {
#if TURBOQUANT_WGMMA
    TURBOQUANT_PRODUCT("u8.u8", "=r", "0");
#endif
}
// d += a product of 64 x 32 bytes of A and 64 rows of B, all signed.
__device__ __forceinline__ void multiply_keys(int (&d)[32], const uint32_t (&a)[4], uint64_t b) {
#if TURBOQUANT_WGMMA
    TURBOQUANT_PRODUCT("s8.s8", "+r", "1");
#endif
}
#undef TURBOQUANT_PRODUCT

// d += a product of 64 x 16 binary16 values of A, and 16 rows of 128 binary16 values of B.
__device__ __forceinline__ void multiply_values(float (&d)[64], const uint32_t (&a)[4], uint64_t b) {
#if TURBOQUANT_WGMMA
    asm volatile("wgmma.mma_async.sync.aligned.m64n128k16.f32.f16.f16 "
                 "{%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15,%16,%17,%18,%19,%20,%21,%22,%23,%24,%25,%26,"
                 "%27,%28,%29,%30,%31,%32,%33,%34,%35,%36,%37,%38,%39,%40,%41,%42,%43,%44,%45,%46,%47,%48,%49,%50,%51,"
                 "%52,%53,%54,%55,%56,%57,%58,%59,%60,%61,%62,%63}, {%64,%65,%66,%67}, %68, 1, 1, 1, 1;"
                 : TURBOQUANT_16("+f", d, 0), TURBOQUANT_16("+f", d, 16), TURBOQUANT_16("+f", d, 32),
                   TURBOQUANT_16("+f", d, 48)
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b));
#endif
}
// Adds to d[0] ... d[15] a product of 64 x 16 binary16 values of A, and 32 rows of 16 binary16 values of B. If First, d
// is zero before.
template <bool First>
__device__ __forceinline__ void multiply_exact(float (&d)[32], const uint32_t (&a)[4], uint64_t b) {
#if TURBOQUANT_WGMMA
#define TURBOQUANT_PRODUCT(mode, add)                                                                                  \
    asm volatile("wgmma.mma_async.sync.aligned.m64n32k16.f32.f16.f16 "                                                 \
                 "{%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15}, {%16,%17,%18,%19}, %20, " add ", 1, 1, 0;"  \
                 : TURBOQUANT_16(mode, d, 0)                                                                           \
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b))
    if constexpr (First) TURBOQUANT_PRODUCT("=f", "0");
    else TURBOQUANT_PRODUCT("+f", "1");
#undef TURBOQUANT_PRODUCT
#endif
}

// Products with operands B of 2 R rows, 16 or 32, that are laid out as keys.
#define TURBOQUANT_PRODUCTS(types, mode, end)                                                                          \
    static_assert(R == 8 || R == 16, "16 or 32 columns");                                                              \
    if constexpr (R == 8)                                                                                              \
        asm volatile("wgmma.mma_async.sync.aligned.m64n16" types " "                                                   \
                     "{%0,%1,%2,%3,%4,%5,%6,%7}, {%8,%9,%10,%11}, %12, " end                                           \
                     : TURBOQUANT_4(mode, d, 0), TURBOQUANT_4(mode, d, 4)                                              \
                     : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b));                                            \
    else                                                                                                               \
        asm volatile("wgmma.mma_async.sync.aligned.m64n32" types " "                                                   \
                     "{%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15}, {%16,%17,%18,%19}, %20, " end           \
                     : TURBOQUANT_16(mode, d, 0)                                                                       \
                     : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b))
// d += a product of 64 x 32 unsigned bytes of A, and 32 signed bytes of each row of B.
template <int R>
__device__ __forceinline__ void multiply_levels(int (&d)[R], const uint32_t (&a)[4], uint64_t b) {
#if TURBOQUANT_WGMMA
    TURBOQUANT_PRODUCTS("k32.s32.u8.s8", "+r", "1;");
#endif
}
// d += a product of 64 x 16 binary16 values of A, and 16 of each row of B.
template <int R>
__device__ __forceinline__ void multiply_halves(float (&d)[R], const uint32_t (&a)[4], uint64_t b) {
#if TURBOQUANT_WGMMA
    TURBOQUANT_PRODUCTS("k16.f32.f16.f16", "+f", "1, 1, 1, 0;");
#endif
}
#undef TURBOQUANT_PRODUCTS
#undef TURBOQUANT_16
#undef TURBOQUANT_4

// ---- other instructions

// Makes the thread's writes to shared memory visible to products.
__device__ __forceinline__ void publish_writes() {
#if TURBOQUANT_WGMMA
    asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
#endif
}

// A barrier for the threads of so many warpgroups. Barrier 0 is that of __syncthreads.
__device__ __forceinline__ void sync_groups(int barrier, int groups) {
    asm volatile("bar.sync %0, %1;" ::"r"(barrier), "r"(128 * groups) : "memory");
}

// A barrier for the threads of one warpgroup. Returns whether x is true for one of them.
__device__ __forceinline__ bool any_in_group(int barrier, bool x) {
    int any = 0;
#if TURBOQUANT_WGMMA
    asm volatile("{\n"
                 ".reg .pred own, any;\n"
                 "setp.ne.s32 own, %1, 0;\n"
                 "barrier.cta.red.or.pred any, %2, 128, own;\n"
                 "selp.s32 %0, 1, 0, any;\n"
                 "}"
                 : "=r"(any)
                 : "r"(int(x)), "r"(barrier)
                 : "memory");
#endif
    return any != 0;
}

// Stores four 8 x 8 matrices of 16-bit elements to shared memory, transposed. Lane 4 r + i has elements 2 i and 2 i + 1
// of row r, and the address of one column: that of column i % 8 of matrix i / 8, if it is lane i.
__device__ __forceinline__ void store_transposed(uint32_t address, const uint32_t (&x)[4]) {
#if TURBOQUANT_WGMMA
    asm volatile("stmatrix.sync.aligned.m8n8.x4.trans.shared.b16 [%0], {%1,%2,%3,%4};" ::"r"(address), "r"(x[0]),
                 "r"(x[1]), "r"(x[2]), "r"(x[3])
                 : "memory");
#endif
}

// Changes the number of registers of the warpgroup's threads.
template <int N> __device__ __forceinline__ void take_registers() {
#if TURBOQUANT_WGMMA
    asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(N));
#endif
}
template <int N> __device__ __forceinline__ void leave_registers() {
#if TURBOQUANT_WGMMA
    asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(N));
#endif
}

} // namespace
} // namespace cuda
} // namespace turboquant

#endif
