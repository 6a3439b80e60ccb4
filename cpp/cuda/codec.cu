// Encoding, decoding and rotation of rows. A warp encodes or rotates a block; 4, 8 or 16 lanes decode one. The bytes
// and floats are those of scalar.cpp, so this file must be compiled without contraction and without fast math.
#include "turboquant_cuda.h"

#include "launch.h"
#include "levels.cuh"
#include "trellis.cuh"

#include <type_traits>

namespace turboquant {
namespace cuda {
namespace {

constexpr int encode_warps = 4; // of a thread block
constexpr int decode_threads = 256;

// ---- addresses of rows

// The x dimension of a grid is over the blocks of the rows i1; y and z are over i2 and i3. A grid is limited in y and
// z, so kernels loop over the remaining i2 and i3.
constexpr int64_t most_yz = 65535;

__device__ __forceinline__ int64_t row_of(const Index & index, int64_t i1, int64_t i2, int64_t i3) {
    if (!index.data) return i1;
    const char * p = static_cast<const char *>(index.data) + i1 * index.nb[0] + i2 % index.ne[1] * index.nb[1] +
                     i3 % index.ne[2] * index.nb[2];
    return index.is64 ? *reinterpret_cast<const int64_t *>(p) : *reinterpret_cast<const int32_t *>(p);
}

// ---- encode

// For each coarse magnitude, the magnitude of the centroid that it is assigned to under each scale of the search.
struct SearchTable {
    uint2 steps[128];
};

template <int Bits> constexpr SearchTable make_search_table() {
    SearchTable table{};
    for (int r = 0; r < 128; ++r) {
        uint32_t words[2] = {0, 0};
        for (int s = 0; s < search_steps; ++s) {
            int m = 0;
            for (int t = 0; t < (1 << (Bits - 1)) - 1; ++t) m += r > Codebook<Bits>::coarse_thresholds[s][t];
            words[s / 4] |= uint32_t(Codebook<Bits>::magnitudes[m]) << (s % 4 * 8);
        }
        table.steps[r].x = words[0];
        table.steps[r].y = words[1];
    }
    return table;
}

static_assert(search_steps == 8, "a table entry has eight bytes");

// The index of a family in TURBOQUANT_FAMILIES.
template <typename Family> constexpr int find_family() {
    int index = 0;
#define TURBOQUANT_FIND(X, ID, name, family, bits, id)           \
    if (std::is_same<Family, family<bits>>::value) return index; \
    ++index;
    TURBOQUANT_FAMILIES(TURBOQUANT_FIND, )
#undef TURBOQUANT_FIND
    return -1;
}
template <typename Family> constexpr int family_index = find_family<Family>(); // a constant in device code as well

template <typename Family> struct SearchTableOf {
    static constexpr SearchTable make() { return {}; }
};
template <int Bits> struct SearchTableOf<LloydMax<Bits>> {
    static constexpr SearchTable make() { return make_search_table<Bits>(); }
};
__device__ const SearchTable search_tables[] = { // by family
#define TURBOQUANT_TABLE(X, ID, name, family, bits, id) SearchTableOf<family<bits>>::make(),
    TURBOQUANT_FAMILIES(TURBOQUANT_TABLE, )
#undef TURBOQUANT_TABLE
};

// The scale of the centroids with the least squared error. Lanes s, s + 8, ... compute step s.
template <int P>
__device__ __forceinline__ float search_scale(const int (&magnitude)[P], int lane, const SearchTable & table) {
    uint32_t coarse = 0, low[4] = {}, high[4] = {};
#pragma unroll
    for (int j = 0; j < P; ++j) {
        const int r = min((magnitude[j] + coarse_unit / 2) / coarse_unit, 127);
        coarse |= uint32_t(r) << (8 * j);
        const uint2 entry = table.steps[r];
        low[j] = entry.x;
        high[j] = entry.y;
    }
    transpose_bytes(low);
    transpose_bytes(high);
    int a = 0, b = 0;
#pragma unroll
    for (int s = 0; s < search_steps; ++s) {
        const uint32_t m = s < 4 ? low[s % 4] : high[s % 4];
        const int sum_a = warp_sum(__dp4a(int(coarse), int(m), 0)), sum_b = warp_sum(__dp4a(int(m), int(m), 0));
        if (lane % search_steps == s) {
            a = sum_a;
            b = sum_b;
        }
    }
    double best = double(a) * double(a) / double(b);
    const float scale = float(double(coarse_unit) * double(a) / double(b));
    int step = lane % search_steps;
#pragma unroll
    for (int h = 1; h < search_steps; h *= 2) {
        const double other = __shfl_xor_sync(all_lanes, best, h);
        const int other_step = __shfl_xor_sync(all_lanes, step, h);
        if (other > best || (other == best && other_step < step)) { // the first of equal steps
            best = other;
            step = other_step;
        }
    }
    return __shfl_sync(all_lanes, scale, step);
}

// Device code cannot read arrays of the host, so their elements become constants. t is known after unrolling, which
// removes the switch.
template <int Bits, int T> struct Midpoint {
    static constexpr float value =
        T < (1 << (Bits - 1)) - 1 ? Codebook<Bits>::midpoints[T % ((1 << (Bits - 1)) - 1)] : 0;
};
template <int Bits> __device__ __forceinline__ float midpoint(int t) {
    switch (t) {
        case 0: return Midpoint<Bits, 0>::value;
        case 1: return Midpoint<Bits, 1>::value;
        case 2: return Midpoint<Bits, 2>::value;
        case 3: return Midpoint<Bits, 3>::value;
        case 4: return Midpoint<Bits, 4>::value;
        case 5: return Midpoint<Bits, 5>::value;
        default: return Midpoint<Bits, 6>::value;
    }
}

// Stores the indices of a block: index[j] belongs to element lane + 32 j.
template <int Bits, int N>
__device__ __forceinline__ void store_indices(const uint32_t (&index)[N / 32], uint8_t * q, int lane) {
    constexpr int P = N / 32;
    if constexpr (Bits == 4) {
        if constexpr (N == 32) {
            const uint32_t upper = __shfl_down_sync(all_lanes, index[0], 16);
            if (lane < 16) q[lane] = uint8_t(index[0] | upper << 4);
        } else {
#pragma unroll
            for (int j = 0; j < P / 2; ++j) q[lane + 32 * j] = uint8_t(index[j] | index[j + P / 2] << 4);
        }
    } else {
        uint32_t low[P];
#pragma unroll
        for (int j = 0; j < P; ++j) low[j] = index[j] & 3;
        store_fields<2, N>(low, q, lane);
        if constexpr (Bits == 3) {
#pragma unroll
            for (int j = 0; j < P; ++j) {
                const uint32_t word = __ballot_sync(all_lanes, index[j] & 4);
                if (lane < 4) q[N / 4 + 4 * j + lane] = uint8_t(word >> (8 * lane));
            }
        }
    }
}

// The values of a block in the units of the encoder, after steps 1 to 5 of FORMAT.md, "Encoder". Lane l has elements l,
// l + 32, ...
template <int N> struct Units {
    int z[N / 32];
    int energy, k;
    float rms;
    bool codable; // neither zero nor not finite; else nothing else is set
};

template <int N> __device__ __forceinline__ Units<N> to_units(const float * x, int lane) {
    constexpr int P = N / 32;
    Units<N> out = {};
    float y[P];
    uint32_t largest = 0;
#pragma unroll
    for (int j = 0; j < P; ++j) {
        y[j] = x[lane + 32 * j];
        largest = max(largest, __float_as_uint(y[j]) & 0x7fffffff);
    }
    largest = warp_max(largest);
    out.codable = largest != 0 && largest < 0x7f800000;
    if (!out.codable) return out;
    out.k = min(max(int(largest >> 23) - 127, -126), 126);
    const float shrink = __uint_as_float(uint32_t(127 - out.k) << 23);
#pragma unroll
    for (int j = 0; j < P; ++j) y[j] = flip_sign(__fmul_rn(y[j], shrink), s1_word(j), lane);
    hadamard_warp<N>(y);
#pragma unroll
    for (int j = 0; j < P; ++j) y[j] = flip_sign(y[j], s2_word(j), lane);

    // Sixteen running sums, as in the specification: lanes l and l + 16 hold the terms of sum l in turn.
    float sum = 0;
#pragma unroll
    for (int j = 0; j < P; ++j) {
        const float own = __fmul_rn(y[j], y[j]), other = __shfl_xor_sync(all_lanes, own, 16);
        sum = __fadd_rn(sum, lane < 16 ? own : other);
        sum = __fadd_rn(sum, lane < 16 ? other : own);
    }
#pragma unroll
    for (int h = 8; h > 0; h /= 2) sum = __fadd_rn(sum, __shfl_xor_sync(all_lanes, sum, h));
    out.rms = __fsqrt_rn(__fmul_rn(sum, 1.0f / N));
    const float unit = __fdiv_rn(float(rms_unit), out.rms);
#pragma unroll
    for (int j = 0; j < P; ++j) {
        out.z[j] = __float2int_rn(__fmul_rn(y[j], unit));
        out.energy += out.z[j] * out.z[j];
    }
    out.energy = warp_sum(out.energy);
    return out;
}

// The stored scale before it is rounded; a = sum |z| c of the assignment.
template <typename F> __device__ __forceinline__ double exact_scale(const Units<F::block> & units, int a) {
    return double(units.energy) / double(a) * double(units.rms) * F::scale_unit *
           double(__uint_as_float(uint32_t(127 + units.k) << 23));
}

// The memory that the warps of a thread block use to encode blocks of one family.
template <int N> union EncodeShared {
    SearchTable table;
    TrellisScratch<N> trellis[encode_warps];
};

// Encodes a block with a warp, in the steps of FORMAT.md, "Encoder".
template <int Bits, int N>
__device__ __forceinline__ void encode_block(Format<LloydMax<Bits>, N>, const float * x, uint8_t * dst, int lane,
                                             EncodeShared<N> & shared) {
    using F = Format<LloydMax<Bits>, N>;
    using T = Table<typename F::family>;
    constexpr int P = N / 32, M = F::half_levels;
    const Units<N> units = to_units<N>(x, lane);
    uint32_t index[P];
    uint16_t d = 0;
    if (units.codable) {
        int magnitude[P];
#pragma unroll
        for (int j = 0; j < P; ++j) magnitude[j] = abs(units.z[j]);
        const float scale = search_scale(magnitude, lane, shared.table);
        int a = 0;
        int m[P] = {};
#pragma unroll
        for (int t = 0; t < M - 1; ++t) {
            const int threshold = __float2int_rn(__fmul_rn(midpoint<Bits>(t), scale));
#pragma unroll
            for (int j = 0; j < P; ++j) m[j] += magnitude[j] > threshold;
        }
#pragma unroll
        for (int j = 0; j < P; ++j) {
            // The upper half of a codebook has its magnitudes.
            const uint32_t c = Bits == 4   ? prmt(T::c2, T::c3, m[j])
                               : Bits == 3 ? prmt(T::c1, 0, m[j])
                                           : prmt(T::c0, 0, 2 + m[j]);
            a += magnitude[j] * int(c & 0xff);
            index[j] = uint32_t(units.z[j] < 0 ? M - 1 - m[j] : M + m[j]);
        }
        const float exact = float(exact_scale<F>(units, warp_sum(a)));
        d = exact >= 65520.0f ? uint16_t(0x7bff) : __half_as_ushort(__float2half_rn(exact));
    }
    if (d == 0) {
#pragma unroll
        for (int j = 0; j < P; ++j) index[j] = 0;
    }
    if (lane == 0) *reinterpret_cast<uint16_t *>(dst) = d;
    store_indices<Bits, N>(index, dst + 2, lane);
}

// In the steps of FORMAT.md, "Encoder of the trellis-coded types".
template <int Bits, int N>
__device__ __forceinline__ void encode_block(Format<Trellis<Bits>, N>, const float * x, uint8_t * dst, int lane,
                                             EncodeShared<N> & shared) {
    using F = Format<Trellis<Bits>, N>;
    constexpr int P = N / 32, limit = Grid<Bits>::limit, halves = (2 + N / 8) / 2;
    TrellisScratch<N> & scratch = shared.trellis[threadIdx.x / 32];
    const GridTable<Bits> & table = grid_table<Bits>;
    const Branches branches(lane); // loaded early
    const Units<N> units = to_units<N>(x, lane);
    uint32_t low[P] = {}, high[P] = {};
    uint32_t first = 0; // the lane's two of the first bytes
    if (units.codable) {
        const int ratio = choose_ratio<Bits, N>(units.z);
        uint32_t rests[P];
#pragma unroll
        for (int j = 0; j < P; ++j) {
            const int g = (units.z[j] * ratio + (1 << 14)) >> 15, i = lane + 32 * j;
            const auto entry = table.entry[min(max(g, -limit), limit) + limit];
            rests[j] = entry.rests;
            reinterpret_cast<uint32_t *>(scratch.metrics)[i % (N / 8) * 8 + i / (N / 8)] = entry.metrics;
        }
        __syncwarp();
        find_path(scratch, branches, lane);
        const uint8_t * path = reinterpret_cast<const uint8_t *>(scratch.words) + 2 + lane % (N / 8);
        const uint32_t window = load_u8(path - 1) | load_u8(path) << 8; // the steps of the lane, and those before
        int a = 0;
#pragma unroll
        for (int j = 0; j < P; ++j) {
            const uint32_t from_newest = window >> (2 + lane / (N / 8) + 256 / N * j); // u_t in bit 6, u_t-6 in bit 0
            uint32_t subset = 0;
#pragma unroll
            for (int k = 0; k <= path_memory; ++k)
                subset ^= (from_newest >> (path_memory - k) & 1) * ((path_taps0 >> k & 1) | (path_taps1 >> k & 1) << 1);
            const uint32_t rest = rests[j] >> (4 * subset) & 15;
            a += units.z[j] * table.level[4 * rest + subset];
            low[j] = Bits == 2 ? 0 : rest & 3;
            high[j] = Bits == 2 ? rest : rest >> 2;
        }
        a = warp_sum(a);
        const double d = exact_scale<F>(units, a);
        uint32_t code = 0;
        if (a > 0)
            code = d >= 65520.0 ? greatest_scale_code
                                : min((__half_as_ushort(__float2half_rn(float(d))) + 16) >> 5, greatest_scale_code);
        if (lane < halves) first = reinterpret_cast<const uint16_t *>(scratch.words)[lane];
        first |= lane == 0 ? code : 0;
        if (code == 0) {
            first = 0;
#pragma unroll
            for (int j = 0; j < P; ++j) low[j] = high[j] = 0;
        }
    }
    if (lane < halves) reinterpret_cast<uint16_t *>(dst)[lane] = uint16_t(first);
    if constexpr (Bits >= 3) store_fields<2, N>(low, dst + 2 + N / 8, lane);
    if constexpr (Bits != 3) store_fields<1, N>(high, dst + 2 + N / 8 + (Bits == 4 ? N / 4 : 0), lane);
}

// One or two stores. The thread blocks from number first_groups on belong to the second.
struct Stores {
    Store store[2];
    int64_t blocks[2]; // of a row
    int family[2];     // family_index
    unsigned first_groups;
    bool beside; // see encode_beside
};

template <int N> __global__ void __launch_bounds__(32 * encode_warps) encode_kernel(const __grid_constant__ Stores s) {
    __shared__ EncodeShared<N> shared;
    static_assert(32 * encode_warps == sizeof(shared.table.steps) / sizeof(shared.table.steps[0]),
                  "a thread to an entry");
    let_next_start();
    const unsigned which = blockIdx.x >= s.first_groups, group = blockIdx.x - (which ? s.first_groups : 0);
    const Store & store = s.store[which];
    const int index = s.family[which];
    shared.table.steps[threadIdx.x] = search_tables[index].steps[threadIdx.x];
    const int64_t blocks = s.blocks[which], item = int64_t(group) * encode_warps + threadIdx.x / 32;
    const int64_t i1 = blocks == 1 ? item : uint32_t(item) / uint32_t(blocks), b = item - i1 * blocks;
    if (item < blocks * store.ne[1] && threadIdx.x % 32 == 0) {
        prefetch(row_at(store.src, i1, blockIdx.y, blockIdx.z) + b * N * sizeof(float));
        if (store.index.data) prefetch(store.index.data);
    }
    __syncthreads();
    if (!s.beside) wait_for_previous();
    if (item >= blocks * store.ne[1]) return;
    for (int64_t i3 = blockIdx.z; i3 < store.ne[3]; i3 += gridDim.z)
        for (int64_t i2 = blockIdx.y; i2 < store.ne[2]; i2 += gridDim.y) {
            const float * x = reinterpret_cast<const float *>(row_at(store.src, i1, i2, i3)) + b * N;
            uint8_t * row =
                reinterpret_cast<uint8_t *>(row_at(store.dst, row_of(store.index, i1, i2, i3), i2, i3));
            const int lane = threadIdx.x % 32;
            switch (index) {
#define TURBOQUANT_CASE(X, ID, name, family, bits, id)                                                             \
    case family_index<family<bits>>:                                                                               \
        if constexpr (has_kernels<family<bits>>)                                                                   \
            encode_block(Format<family<bits>, N>(), x, row + b * Format<family<bits>, N>::bytes, lane, shared);    \
        break;
                TURBOQUANT_FAMILIES(TURBOQUANT_CASE, )
#undef TURBOQUANT_CASE
            }
        }
    if (s.beside) wait_for_previous();
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

cudaError_t encode(const Store * stores, int count, cudaStream_t stream, bool beside = false) {
    Stores s = {};
    s.beside = beside;
    dim3 size(0, 1, 1);
    int block = 0;
    for (int i = 0; i < count; ++i) {
        const Store & store = stores[i];
        int own_block = 0;
        const bool covered = with_format(store.type, [&](auto format) {
            own_block = format.block;
            s.family[i] = family_index<typename decltype(format)::family>;
        });
        if (!covered || store.ne[0] % own_block || (block && own_block != block)) return cudaErrorNotSupported;
        block = own_block;
        Grid grid = {dim3(0, 1, 1), 1};
        if (grid_for(store.ne, block, encode_warps, grid) && int64_t(grid.size.x) * encode_warps > UINT32_MAX)
            return cudaErrorNotSupported;
        s.store[i] = store;
        s.blocks[i] = grid.blocks;
        if (i == 0) s.first_groups = grid.size.x;
        size = dim3(size.x + grid.size.x, size.y > grid.size.y ? size.y : grid.size.y,
                    size.z > grid.size.z ? size.z : grid.size.z);
    }
    if (size.x == 0) return cudaSuccess;
    switch (block) {
#define TURBOQUANT_CASE(N) \
    case N: return launch(encode_kernel<N>, size, 32 * encode_warps, 0, stream, s);
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

cudaError_t encode_beside(const Store & first, const Store & second, cudaStream_t stream) {
    const Store stores[2] = {first, second};
    return encode(stores, 2, stream, true);
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
