// Encoding, decoding and rotation of rows. A warp encodes or rotates a block; 4, 8 or 16 lanes decode one. The bytes
// and floats are those of scalar.cpp, so this file must be compiled without contraction and without fast math.
#include "turboquant_cuda.h"

#include "encode.cuh"

namespace turboquant {
namespace cuda {
namespace {

constexpr int decode_threads = 256;

// ---- addresses of rows

// The x dimension of a grid is over the blocks of the rows i1; y and z are over i2 and i3. A grid is limited in y and
// z, so kernels loop over the remaining i2 and i3.
constexpr int64_t most_yz = 65535;

// ---- encode

template <int N, typename Shared>
__global__ void __launch_bounds__(32 * encode_warps) encode_kernel(const __grid_constant__ Stores s) {
    __shared__ Shared shared;
    let_next_start();
    encode_group<N>(s, blockIdx.x, true, shared);
}

// ---- decode

__device__ __forceinline__ void store4(float * dst, const float (&x)[4]) {
    *reinterpret_cast<float4 *>(dst) = make_float4(x[0], x[1], x[2], x[3]);
}
__device__ __forceinline__ void store4(half * dst, const float (&x)[4]) {
    const half2 a = __floats2half2_rn(x[0], x[1]), b = __floats2half2_rn(x[2], x[3]);
    *reinterpret_cast<uint2 *>(dst) =
        make_uint2(*reinterpret_cast<const uint32_t *>(&a), *reinterpret_cast<const uint32_t *>(&b));
}

// N / 8 lanes decode a block, and each lane decodes a unit. The transform computes with two int16 in an int32,
// low + 65536 high: sums and differences are right without separating them, and |W| <= 128 * 127 fits an int16.
template <typename F, typename T, bool Rotated>
__global__ void __launch_bounds__(decode_threads)
    decode_kernel(const Rows src, const Rows dst, const int64_t blocks, const int64_t ne1, const int64_t ne2,
                  const int64_t ne3, const Index index) {
    constexpr int N = F::block, lanes = N / 8;
    const int unit = threadIdx.x % lanes;
    const int64_t item = (int64_t(blockIdx.x) * decode_threads + threadIdx.x) / lanes;
    const bool live = item < blocks * ne1;
    const int64_t i1 = !live         ? 0
                       : blocks == 1 ? item
                                     : uint64_t(item) / uint64_t(blocks),
                  b = live ? item - i1 * blocks : 0;
    uint32_t sign_in = 0, sign_out = 0; // of the unit's eight elements
#pragma unroll
    for (int i = 0; i < 8; ++i) {
        const int e = unit_element<F>(unit, i);
        sign_in |= (s2_word(e / 32) >> (e % 32) & 1) << i;
        sign_out |= (s1_word(e / 32) >> (e % 32) & 1) << i;
    }
    for (int64_t i3 = blockIdx.z; i3 < ne3; i3 += gridDim.z)
        for (int64_t i2 = blockIdx.y; i2 < ne2; i2 += gridDim.y) {
            const uint8_t * block =
                reinterpret_cast<const uint8_t *>(row_at(src, row_of(index, i1, i2, i3), i2, i3)) + b * F::bytes;
            T * out = reinterpret_cast<T *>(row_at(dst, i1, i2, i3)) + b * N;
            const Unit packed = load_unit<F>(block + 2, unit);
            int level[8];
#pragma unroll
            for (int half = 0; half < 2; ++half) {
                using Levels = LookUp<typename F::family>;
                uint32_t part[Levels::parts];
                Levels(0)(packed.nibbles >> (16 * half), packed.signs >> (16 * half), 0, part);
#pragma unroll
                for (int i = 0; i < 4; ++i) {
                    level[4 * half + i] = int8_t(part[0] >> (8 * i));
                    if constexpr (Levels::parts == 2) level[4 * half + i] -= int8_t(part[1] >> (8 * i));
                }
            }
            float x[2][4]; // [half of the block][element]
            if (Rotated) {
                const float scale = __fmul_rn(load_scale(F(), block), F::step);
#pragma unroll
                for (int i = 0; i < 8; ++i) x[i & 1][i >> 1] = __fmul_rn(scale, float(level[i]));
            } else {
                // Nibbles 2m and 2m + 1 are half a block apart. The stage of this distance comes first, so that its
                // sums and differences can be packed in pairs; the order of the stages does not matter for integers.
                int w[4];
#pragma unroll
                for (int m = 0; m < 4; ++m) {
                    const int a = sign_in >> (2 * m) & 1 ? -level[2 * m] : level[2 * m];
                    const int c = sign_in >> (2 * m + 1) & 1 ? -level[2 * m + 1] : level[2 * m + 1];
                    w[m] = (a + c) + (a - c) * 65536;
                }
#pragma unroll
                for (int h = 1; h < 4; h *= 2)
#pragma unroll
                    for (int m = 0; m < 4; ++m)
                        if (!(m & h)) {
                            const int a = w[m], c = w[m + h];
                            w[m] = a + c;
                            w[m + h] = a - c;
                        }
#pragma unroll
                for (int h = 1; h < lanes; h *= 2)
#pragma unroll
                    for (int m = 0; m < 4; ++m) {
                        const int other = __shfl_xor_sync(all_lanes, w[m], h);
                        w[m] = unit & h ? other - w[m] : w[m] + other;
                    }
                const float scale = __fmul_rn(load_scale(F(), block), F::step_n);
#pragma unroll
                for (int m = 0; m < 4; ++m) {
                    const int low = int(int16_t(w[m])), high = (w[m] - low) >> 16;
                    x[0][m] = flip_sign(__fmul_rn(scale, float(low)), sign_out, 2 * m);
                    x[1][m] = flip_sign(__fmul_rn(scale, float(high)), sign_out, 2 * m + 1);
                }
            }
            if (live) {
                store4(out + unit_element<F>(unit, 0), x[0]);
                store4(out + unit_element<F>(unit, 1), x[1]);
            }
        }
}

// ---- rotate

template <int N, bool Inverse>
__global__ void __launch_bounds__(32 * encode_warps)
    rotate_kernel(const Rows src, const Rows dst, const int64_t blocks, const int64_t ne1, const int64_t ne2,
                  const int64_t ne3) {
    const int lane = threadIdx.x % 32;
    const int64_t item = int64_t(blockIdx.x) * encode_warps + threadIdx.x / 32;
    if (item >= blocks * ne1) return;
    const int64_t i1 = blocks == 1 ? item : uint64_t(item) / uint64_t(blocks), b = item - i1 * blocks;
    for (int64_t i3 = blockIdx.z; i3 < ne3; i3 += gridDim.z)
        for (int64_t i2 = blockIdx.y; i2 < ne2; i2 += gridDim.y) {
            const float * in = reinterpret_cast<const float *>(row_at(src, i1, i2, i3)) + b * N;
            float * out = reinterpret_cast<float *>(row_at(dst, i1, i2, i3)) + b * N;
            float y[N / 32];
#pragma unroll
            for (int j = 0; j < N / 32; ++j) y[j] = in[lane + 32 * j];
            transform_warp<N, Inverse>(y);
#pragma unroll
            for (int j = 0; j < N / 32; ++j) out[lane + 32 * j] = y[j];
        }
}

// ---- launch

struct Grid {
    dim3 size;
    int64_t blocks; // of a row
};

// The grid for rows in blocks of `block` values, of which a thread block takes items_per_group. False if there are no
// values.
bool grid_for(const int64_t ne[4], int block, int64_t items_per_group, Grid & grid) {
    if (ne[0] <= 0 || ne[1] <= 0 || ne[2] <= 0 || ne[3] <= 0) return false;
    grid.blocks = ne[0] / block;
    grid.size = dim3(unsigned((grid.blocks * ne[1] + items_per_group - 1) / items_per_group),
                     unsigned(ne[2] < most_yz ? ne[2] : most_yz), unsigned(ne[3] < most_yz ? ne[3] : most_yz));
    return true;
}

// Calls `function` with the Format of `type`. False, without a call, if there are no kernels for the type.
template <typename Function> bool with_format(tq_type type, const Function & function) {
    switch (type) {
#define TURBOQUANT_CASE(ID, name, FIRST, family, bits, ...)                                \
    case TQ_##ID:                                                                          \
        if constexpr (has_kernels<family<bits>>) function(FormatOf<TQ_##ID>());            \
        return has_kernels<family<bits>>;
        TURBOQUANT_TYPES(TURBOQUANT_CASE)
#undef TURBOQUANT_CASE
        default: return false;
    }
}

template <typename F>
void launch_decode(const Grid & grid, const Rows & src, const Rows & dst, const int64_t ne[4], const Index & index,
                   bool half_out, bool rotated, cudaStream_t stream) {
    if (half_out && rotated)
        decode_kernel<F, half, true>
            <<<grid.size, decode_threads, 0, stream>>>(src, dst, grid.blocks, ne[1], ne[2], ne[3], index);
    else if (half_out)
        decode_kernel<F, half, false>
            <<<grid.size, decode_threads, 0, stream>>>(src, dst, grid.blocks, ne[1], ne[2], ne[3], index);
    else if (rotated)
        decode_kernel<F, float, true>
            <<<grid.size, decode_threads, 0, stream>>>(src, dst, grid.blocks, ne[1], ne[2], ne[3], index);
    else
        decode_kernel<F, float, false>
            <<<grid.size, decode_threads, 0, stream>>>(src, dst, grid.blocks, ne[1], ne[2], ne[3], index);
}

} // namespace

cudaError_t describe_stores(const Store * stores, int count, Stores & s, dim3 & size) {
    s = {};
    size = dim3(0, 1, 1);
    for (int i = 0; i < count; ++i) {
        const Store & store = stores[i];
        int block = 0;
        const bool covered = with_format(store.type, [&](auto format) {
            block = format.block;
            s.family[i] = family_index<typename decltype(format)::family>;
        });
        if (!covered || store.ne[0] % block || (s.block && block != s.block)) return cudaErrorNotSupported;
        s.block = block;
        Grid grid = {dim3(0, 1, 1), 1};
        if (grid_for(store.ne, block, encode_warps, grid) && int64_t(grid.size.x) * encode_warps > UINT32_MAX)
            return cudaErrorNotSupported;
        s.store[i] = store;
        s.blocks[i] = grid.blocks;
        if (i == 0) s.first_groups = grid.size.x;
        size = dim3(size.x + grid.size.x, size.y > grid.size.y ? size.y : grid.size.y,
                    size.z > grid.size.z ? size.z : grid.size.z);
    }
    return cudaSuccess;
}

namespace {

cudaError_t encode(const Store * stores, int count, cudaStream_t stream) {
    Stores s;
    dim3 size;
    const cudaError_t error = describe_stores(stores, count, s, size);
    if (error != cudaSuccess || size.x == 0) return error;
    switch (s.block) {
#define TURBOQUANT_CASE(N)                                                                                           \
    case N:                                                                                                          \
        return launch(has_trellis(s) ? encode_kernel<N, EncodeShared<N>> : encode_kernel<N, ScalarShared>, size,     \
                      32 * encode_warps, 0, stream, s);
        TURBOQUANT_BLOCKS(TURBOQUANT_CASE)
#undef TURBOQUANT_CASE
        default: return cudaErrorNotSupported;
    }
}

} // namespace

bool codec_supports(tq_type type) {
    return with_format(type, [](auto) {});
}

cudaError_t encode_rows(const Store & store, cudaStream_t stream) { return encode(&store, 1, stream); }

cudaError_t encode_rows(const Store & first, const Store & second, cudaStream_t stream) {
    const Store stores[2] = {first, second};
    return encode(stores, 2, stream);
}

cudaError_t decode_rows(tq_type type, const Rows & src, const Rows & dst, const int64_t ne[4], const Index & index,
                        bool half, bool rotated, cudaStream_t stream) {
    cudaError_t result = cudaErrorNotSupported;
    with_format(type, [&](auto format) {
        using F = decltype(format);
        if (ne[0] % F::block) return;
        Grid grid;
        result = cudaSuccess;
        if (!grid_for(ne, F::block, decode_threads / (F::block / 8), grid)) return;
        launch_decode<F>(grid, src, dst, ne, index, half, rotated, stream);
        result = cudaGetLastError();
    });
    return result;
}

cudaError_t rotate_rows(int block, bool inverse, const Rows & src, const Rows & dst, const int64_t ne[4],
                        cudaStream_t stream) {
    if (block_index(block) < 0 || ne[0] % block) return cudaErrorNotSupported;
    Grid grid;
    if (!grid_for(ne, block, encode_warps, grid)) return cudaSuccess;
    const auto start = [&](auto kernel) {
        kernel<<<grid.size, 32 * encode_warps, 0, stream>>>(src, dst, grid.blocks, ne[1], ne[2], ne[3]);
    };
#define TURBOQUANT_ROTATE(N) \
    if (block == N) start(inverse ? rotate_kernel<N, true> : rotate_kernel<N, false>);
    TURBOQUANT_BLOCKS(TURBOQUANT_ROTATE)
#undef TURBOQUANT_ROTATE
    return cudaGetLastError();
}

} // namespace cuda
} // namespace turboquant
