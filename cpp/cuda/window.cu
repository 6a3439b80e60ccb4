// The rows of an exact window for attention on a cache that was decoded to binary16: they replace the rows of the cache
// that they are more precise copies of. The values are rotated as those of codec.cu, so this file must be compiled
// without contraction and without fast math.
#include "device.cuh"

#include <algorithm>

namespace turboquant {
namespace cuda {
namespace {

constexpr int warps_of_block = 4;
constexpr int64_t most_yz = 65535; // thread blocks in the y and z dimensions of a grid

// The row of the cache that exact row number `row` replaces, or -1.
__device__ __forceinline__ int64_t cell_of(const WindowCells & cells, int64_t row, int64_t stream) {
    const auto word = [&](const uint16_t * words) {
        return uint32_t(reinterpret_cast<const uint16_t *>(reinterpret_cast<const char *>(words) +
                                                           stream * cells.stream)[row]);
    };
    return int64_t(word(cells.low) | word(cells.high) << 16) - 1;
}

// A warp writes a block of N values of an exact row.
template <int N, bool Rotated>
__global__ void __launch_bounds__(32 * warps_of_block)
    half_kernel(const __grid_constant__ WindowRows w, const WindowCells cells, const Rows dst, int64_t blocks) {
    const int lane = threadIdx.x % 32;
    const int64_t item = int64_t(blockIdx.x) * warps_of_block + threadIdx.x / 32;
    if (item >= blocks * (w.n_slots + w.n_batch)) return;
    const int64_t row = item / blocks, b = item - row * blocks;
    for (int64_t stream = blockIdx.z; stream < w.streams; stream += gridDim.z) {
        const int64_t cell = cell_of(cells, row, stream);
        if (cell < 0) continue;
        float y[N / 32];
#pragma unroll
        for (int j = 0; j < N / 32; ++j) {
            const int64_t e = b * N + lane + 32 * j;
            if (row >= w.n_slots) {
                y[j] = reinterpret_cast<const float *>(row_at(w.batch, row - w.n_slots, 0, stream))[e];
                continue;
            }
            const char * slot = row_at(w.slots, row, 0, stream);
            const uint8_t * q8_0 = reinterpret_cast<const uint8_t *>(slot) + e / 32 * 34;
            y[j] = w.half_slots ? __half2float(reinterpret_cast<const half *>(slot)[e])
                                : __fmul_rn(load_half(q8_0), float(int8_t(q8_0[2 + lane])));
        }
        if constexpr (Rotated) transform_warp<N, false>(y);
        half * out = reinterpret_cast<half *>(row_at(dst, cell, 0, stream)) + b * N;
#pragma unroll
        for (int j = 0; j < N / 32; ++j) out[lane + 32 * j] = __float2half_rn(y[j]);
    }
}

// A thread block has a row of the mask.
__global__ void mask_kernel(const Rows exact, const WindowCells cells, const Rows mask, int64_t rows, int64_t heads,
                            int64_t streams) {
    for (int64_t stream = blockIdx.z; stream < streams; stream += gridDim.z)
        for (int64_t head = blockIdx.y; head < heads; head += gridDim.y) {
            const uint16_t * from = reinterpret_cast<const uint16_t *>(row_at(exact, blockIdx.x, head, stream));
            uint16_t * to = reinterpret_cast<uint16_t *>(row_at(mask, blockIdx.x, head, stream));
            for (int64_t row = threadIdx.x; row < rows; row += blockDim.x) {
                const int64_t cell = cell_of(cells, row, stream);
                if (cell >= 0) to[cell] = from[row];
            }
        }
}

struct WindowStore {
    bool half_slots;
    Rows batch, slots;
    int64_t n_batch, groups, stored; // rows of a stream; groups of 32 values in a row, and in all rows
};

// A warp stores 32 values: those of K come first.
__global__ void __launch_bounds__(32 * warps_of_block)
    store_kernel(const __grid_constant__ WindowStore k, const __grid_constant__ WindowStore v, const int64_t * index) {
    const int64_t item = int64_t(blockIdx.x) * warps_of_block + threadIdx.x / 32;
    const int lane = threadIdx.x % 32;
    const bool keys = item < k.stored;
    const WindowStore & side = keys ? k : v;
    const int64_t own = keys ? item : item - k.stored;
    if (own >= side.stored) return;
    const int64_t row = own / side.groups, group = own % side.groups;
    const float * from = reinterpret_cast<const float *>(row_at(side.batch, row % side.n_batch, 0, row / side.n_batch));
    store_exact_values(side.half_slots, row_at(side.slots, index[row], 0, 0), int(group), from[32 * group + lane],
                       lane);
}

WindowStore store_of(const WindowRows & w, const Rows & slots) {
    return {w.half_slots, w.batch, slots, w.n_batch, w.values / 32, w.values / 32 * w.n_batch * w.streams};
}

} // namespace

cudaError_t window_to_half(const WindowRows & window, const WindowCells & cells, int block, bool rotated,
                           const Rows & dst, cudaStream_t stream) {
    if (block_index(block) < 0 || window.values % block) return cudaErrorNotSupported;
    const int64_t blocks = window.values / block, items = blocks * (window.n_slots + window.n_batch);
    if (items == 0 || window.streams == 0) return cudaSuccess;
    const dim3 grid(unsigned((items + warps_of_block - 1) / warps_of_block), 1,
                    unsigned(std::min(window.streams, most_yz)));
#define TURBOQUANT_WINDOW(N)                                                                                  \
    if (block == N)                                                                                           \
        (rotated ? half_kernel<N, true> : half_kernel<N, false>)<<<grid, 32 * warps_of_block, 0, stream>>>(   \
            window, cells, dst, blocks);
    TURBOQUANT_BLOCKS(TURBOQUANT_WINDOW)
#undef TURBOQUANT_WINDOW
    return cudaGetLastError();
}

cudaError_t window_to_mask(const Rows & exact, const WindowCells & cells, const Rows & mask, const int64_t ne[4],
                           cudaStream_t stream) {
    for (int i = 0; i < 4; ++i)
        if (ne[i] == 0) return cudaSuccess;
    const dim3 grid(unsigned(ne[1]), unsigned(std::min(ne[2], most_yz)), unsigned(std::min(ne[3], most_yz)));
    mask_kernel<<<grid, 256, 0, stream>>>(exact, cells, mask, ne[0], ne[2], ne[3]);
    return cudaGetLastError();
}

cudaError_t store_window(const WindowRows & k, const WindowRows & v, const int64_t * index, const Rows & k_slots,
                         const Rows & v_slots, cudaStream_t stream) {
    if (k.values % 32 || v.values % 32) return cudaErrorNotSupported;
    const WindowStore sides[2] = {store_of(k, k_slots), store_of(v, v_slots)};
    const int64_t items = sides[0].stored + sides[1].stored;
    if (items == 0) return cudaSuccess;
    store_kernel<<<unsigned((items + warps_of_block - 1) / warps_of_block), 32 * warps_of_block, 0, stream>>>(
        sides[0], sides[1], index);
    return cudaGetLastError();
}

} // namespace cuda
} // namespace turboquant
