// Encoding of rows: a warp encodes a block. The bytes are those of scalar.cpp, so files with this code must be compiled
// without contraction and without fast math (see turboquant-cuda.cmake).
#ifndef TURBOQUANT_CUDA_ENCODE_H
#define TURBOQUANT_CUDA_ENCODE_H

#include "launch.h"
#include "levels.cuh"
#include "trellis.cuh"

#include <type_traits>

namespace turboquant {
namespace cuda {

// One or two stores. The groups of encode_warps blocks from number first_groups on belong to the second.
struct Stores {
    Store store[2];
    int64_t blocks[2]; // of a row
    int family[2];     // family_index
    unsigned first_groups;
    int block; // the length of the blocks
};

// Describes one or two stores, and the grid of thread blocks that encode them: none if there is nothing to store. The
// result is that of encode_rows.
cudaError_t describe_stores(const Store * stores, int count, Stores & s, dim3 & size);

namespace {

constexpr int encode_warps = 4; // of a thread block

__device__ __forceinline__ int64_t row_of(const Index & index, int64_t i1, int64_t i2, int64_t i3) {
    if (!index.data) return i1;
    const char * p = static_cast<const char *>(index.data) + i1 * index.nb[0] + i2 % index.ne[1] * index.nb[1] +
                     i3 % index.ne[2] * index.nb[2];
    return index.is64 ? *reinterpret_cast<const int64_t *>(p) : *reinterpret_cast<const int32_t *>(p);
}

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

template <typename Family> struct IsTrellis : std::false_type {};
template <int Bits> struct IsTrellis<Trellis<Bits>> : std::true_type {};

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

// Whether a type of the stores is trellis-coded.
inline bool has_trellis(const Stores & s) {
    constexpr bool trellis[] = { // by family
#define TURBOQUANT_IS_TRELLIS(X, ID, name, family, bits, id) IsTrellis<family<bits>>::value,
        TURBOQUANT_FAMILIES(TURBOQUANT_IS_TRELLIS, )
#undef TURBOQUANT_IS_TRELLIS
    };
    return trellis[s.family[0]] || trellis[s.family[1]];
}

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

// The memory that the warps of a thread block use to encode blocks of one family, and that of a thread block without
// trellis-coded types.
template <int N> union EncodeShared {
    SearchTable table;
    TrellisScratch<N> trellis[encode_warps];
};
struct ScalarShared {
    SearchTable table;
};

// Encodes a block with a warp, in the steps of FORMAT.md, "Encoder".
template <int Bits, int N>
__device__ __forceinline__ void encode_block(Format<LloydMax<Bits>, N>, const float * x, uint8_t * dst, int lane,
                                             const SearchTable & search_table) {
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
        const float scale = search_scale(magnitude, lane, search_table);
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
                                             TrellisScratch<N> & scratch) {
    using F = Format<Trellis<Bits>, N>;
    constexpr int P = N / 32, limit = Grid<Bits>::limit, halves = (2 + N / 8) / 2;
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

// Encodes group number `group` of the stores with the first encode_warps warps of a thread block. With `wait`, the
// preceding kernel may still compute the rows. Shared: EncodeShared<N>, or ScalarShared if no type is trellis-coded, with
// which threads need fewer registers.
template <int N, typename Shared>
__device__ __forceinline__ void encode_group(const Stores & s, unsigned group, bool wait, Shared & shared) {
    constexpr bool with_trellis = std::is_same<Shared, EncodeShared<N>>::value;
    static_assert(32 * encode_warps == sizeof(shared.table.steps) / sizeof(shared.table.steps[0]),
                  "a thread to an entry");
    const unsigned which = group >= s.first_groups;
    group -= which ? s.first_groups : 0;
    const Store & store = s.store[which];
    if (blockIdx.y >= store.ne[2]) return;
    const int index = s.family[which];
    shared.table.steps[threadIdx.x] = search_tables[index].steps[threadIdx.x];
    const int64_t blocks = s.blocks[which], item = int64_t(group) * encode_warps + threadIdx.x / 32;
    const int64_t i1 = blocks == 1 ? item : uint32_t(item) / uint32_t(blocks), b = item - i1 * blocks;
    if (item < blocks * store.ne[1] && threadIdx.x % 32 == 0) {
        prefetch(row_at(store.src, i1, blockIdx.y, blockIdx.z) + b * N * sizeof(float));
        if (store.index.data) prefetch(store.index.data);
    }
    asm volatile("bar.sync 1, %0;" ::"n"(32 * encode_warps) : "memory"); // for the first warps only
    if (wait) wait_for_previous();
    if (item >= blocks * store.ne[1]) return;
    for (int64_t i3 = blockIdx.z; i3 < store.ne[3]; i3 += gridDim.z)
        for (int64_t i2 = blockIdx.y; i2 < store.ne[2]; i2 += gridDim.y) {
            const float * x = reinterpret_cast<const float *>(row_at(store.src, i1, i2, i3)) + b * N;
            uint8_t * row =
                reinterpret_cast<uint8_t *>(row_at(store.dst, row_of(store.index, i1, i2, i3), i2, i3));
            const int lane = threadIdx.x % 32;
            switch (index) {
#define TURBOQUANT_CASE(X, ID, name, family, bits, id)                                                            \
    case family_index<family<bits>>: {                                                                            \
        using F = Format<family<bits>, N>;                                                                        \
        if constexpr (!has_kernels<family<bits>>) break;                                                          \
        else if constexpr (!IsTrellis<family<bits>>::value)                                                       \
            encode_block(F(), x, row + b * F::bytes, lane, shared.table);                                         \
        else if constexpr (with_trellis)                                                                          \
            encode_block(F(), x, row + b * F::bytes, lane, shared.trellis[threadIdx.x / 32]);                     \
        break;                                                                                                    \
    }
                TURBOQUANT_FAMILIES(TURBOQUANT_CASE, )
#undef TURBOQUANT_CASE
            }
        }
}

} // namespace
} // namespace cuda
} // namespace turboquant

#endif
