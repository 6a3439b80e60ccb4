// Attention: plans, launches and merges. The kernel is in attention.cuh.
#include "attention.cuh"
#include "launch.h"

#include <atomic>
#include <cmath>
#include <vector>

namespace turboquant {
namespace cuda {
namespace {

constexpr int most_column_tiles = 4; // beyond that K and V are read so often that decoding them once is faster

struct Device {
    int version, multiprocessors, shared_per_block, shared_per_multiprocessor;
};

// Of the current device; false if there is none.
bool current_device(Device & device, int & id) {
    static const std::vector<Device> devices = [] {
        int count = 0;
        if (cudaGetDeviceCount(&count) != cudaSuccess) count = 0;
        std::vector<Device> all(static_cast<size_t>(count));
        for (int i = 0; i < count; ++i) {
            int major = 0, minor = 0;
            Device & d = all[size_t(i)];
            cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, i);
            cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, i);
            d.version = 10 * major + minor;
            cudaDeviceGetAttribute(&d.multiprocessors, cudaDevAttrMultiProcessorCount, i);
            cudaDeviceGetAttribute(&d.shared_per_block, cudaDevAttrMaxSharedMemoryPerBlockOptin, i);
            cudaDeviceGetAttribute(&d.shared_per_multiprocessor, cudaDevAttrMaxSharedMemoryPerMultiprocessor, i);
        }
        return all;
    }();
    if (cudaGetDevice(&id) != cudaSuccess || id < 0 || size_t(id) >= devices.size()) return false;
    device = devices[size_t(id)];
    return true;
}

bool is_turbo(KV type) { return type == KV::turbo4 || type == KV::turbo3 || type == KV::turbo2; }

int row_bytes(KV type, int head) {
    switch (type) {
        case KV::q8_0: return head / 32 * 34;
        case KV::f16: return head * 2;
        default: {
            const int bits = type == KV::turbo4 ? 4 : type == KV::turbo3 ? 3 : 2, block = head < 128 ? head : 128;
            return head / block * (2 + block * bits / 8);
        }
    }
}

AttentionKernel kernel_of(const Attention & a) {
    switch (a.head) {
        case 64: return attention_kernel_64(a.type_k, a.type_v);
        case 128: return attention_kernel_128(a.type_k, a.type_v);
        case 256: return attention_kernel_256(a.type_k, a.type_v);
    }
    return nullptr;
}

// Bytes of a row in shared memory: an odd multiple of 16, so that the rows of a tile start in different banks.
int pitch_for(const void * base, int64_t row, int64_t stream, int chunk) {
    const bool aligned = ((reinterpret_cast<uintptr_t>(base) | uint64_t(row) | uint64_t(stream)) & 15) == 0;
    const int units = (chunk + (aligned ? 0 : 15) + 15) / 16;
    return (units | 1) * 16;
}

bool plan_attention(const Attention & a, AttentionPlan & p) {
    Device device;
    int id;
    if (a.kv_heads < 1 || a.heads % a.kv_heads || a.tokens < 1 || a.streams < 1 || a.kv_streams < 1 ||
        a.streams % a.kv_streams || a.n_kv < 1 || a.n_kv > 1 << 30 || a.streams > 65535 ||
        !current_device(device, id) || device.version < 80 || !kernel_of(a))
        return false;
    const int bytes_k = row_bytes(a.type_k, a.head), bytes_v = row_bytes(a.type_v, a.head);
    // f16 is read as words, everything else as half words
    const uint64_t all_k = reinterpret_cast<uintptr_t>(a.k) | uint64_t(a.k_row | a.k_head | a.k_stream);
    const uint64_t all_v = reinterpret_cast<uintptr_t>(a.v) | uint64_t(a.v_row | a.v_head | a.v_stream);
    if (all_k & (a.type_k == KV::f16 ? 3 : 1) || all_v & (a.type_v == KV::f16 ? 3 : 1)) return false;

    p.group = a.heads / a.kv_heads;
    p.columns = p.group * a.tokens;
    p.column_tile = p.columns <= 4 ? 4 : most_columns;
    p.column_tiles = (p.columns + p.column_tile - 1) / p.column_tile;
    if (p.column_tiles > most_column_tiles) return false;

    const bool adjacent = a.k_head == bytes_k && a.v_head == bytes_v;
    // A short cache is one run of rows, finished by the thread blocks that computed it: all their warps take rows.
    const bool shortest = a.n_kv <= 2 * most_warps * tile;
    for (int heads = adjacent && !shortest ? most_warps : 1; heads >= 1; --heads) {
        if (a.kv_heads % heads) continue;
        p.block_heads = heads;
        p.head_groups = a.kv_heads / heads;
        // the first head of a group may start anywhere
        const uint64_t group_k = p.head_groups > 1 ? uint64_t(heads * a.k_head) : 0;
        const uint64_t group_v = p.head_groups > 1 ? uint64_t(heads * a.v_head) : 0;
        p.pitch_k = pitch_for(a.k, a.k_row, int64_t(a.k_stream | group_k), heads * bytes_k);
        p.pitch_v = pitch_for(a.v, a.v_row, int64_t(a.v_stream | group_v), heads * bytes_v);
        const int resident = a.head <= 128 ? 2 : 1, reserved = 1024; // of each thread block
        const int share = device.shared_per_multiprocessor / resident - reserved;
        const int row_tile = tile * (p.pitch_k + p.pitch_v);
        p.row_tiles = most_warps / heads;
        while (p.row_tiles > 1 && 2 * p.row_tiles * row_tile > device.shared_per_block) --p.row_tiles;
        const int stage = p.row_tiles * row_tile;
        if (2 * stage > device.shared_per_block) continue;
        p.stages = 3 * stage <= share && 3 * stage <= device.shared_per_block ? 3 : 2;
        p.shared_bytes = p.stages * stage;
        const int64_t beside = int64_t(p.head_groups) * p.column_tiles * a.streams;
        if (beside / a.streams > 65535) return false;
        const int64_t at_once = int64_t(device.multiprocessors) * (p.shared_bytes <= share ? resident : 1);
        const int64_t wanted = at_once / beside > 1 ? at_once / beside : 1;
        const int64_t step = int64_t(p.row_tiles) * tile, steps = (a.n_kv + step - 1) / step;
        p.chunk_rows = (shortest ? steps : (steps + wanted - 1) / wanted) * step;
        p.chunks = int((a.n_kv + p.chunk_rows - 1) / p.chunk_rows);
        p.parts = p.chunks * p.row_tiles;
        if (p.chunks == 1) { // the warps' results meet in the same memory
            const int results = p.block_heads * p.row_tiles * p.column_tile * (a.head + 2) * int(sizeof(float));
            p.shared_bytes = p.shared_bytes > results ? p.shared_bytes : results;
        }
        return true;
    }
    return false;
}

int64_t query_rows(const Attention & a) { return int64_t(a.streams) * a.tokens * a.heads; }

size_t partial_bytes(const Attention & a, const AttentionPlan & p) {
    return (size_t(query_rows(a)) * p.parts * a.head * sizeof(float) + 15) & ~size_t(15);
}

// One thread block to a query row: adds its partial results up, with the sink, and un-rotates the sum. Warp w takes
// parts w, w + warps, ...
constexpr int most_merge_warps = 32;

template <int D>
__global__ void __launch_bounds__(32 * most_merge_warps)
    merge_kernel(const float * partial, const float2 * meta, const float * sinks, float * dst, int heads, int parts,
                 bool turbo) {
    constexpr int P = D / 32, V = P < 4 ? P : 4; // elements of a lane; of one load
    __shared__ __align__(16) float sums[most_merge_warps * D];
    __shared__ float totals[most_merge_warps];
    const int64_t row = blockIdx.x;
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, warps = blockDim.x / 32;
    partial += row * parts * D;
    meta += row * parts;

    let_next_start();
    wait_for_previous();
    const float sink = sinks ? sinks[row % heads] * 1.44269504f : -INFINITY;
    float largest = fmaxf(sink, -1e30f);
#pragma unroll 4
    for (int i = lane; i < parts; i += 32) largest = fmaxf(largest, meta[i].x); // every warp for itself
    float y[P], total = 0;
#pragma unroll
    for (int j = 0; j < P; ++j) y[j] = 0;
    for (int h = 16; h > 0; h /= 2) largest = fmaxf(largest, __shfl_xor_sync(all_lanes, largest, h));
    constexpr int batch = 4; // parts whose loads are under way at once
#pragma unroll 1
    for (int first = warp; first < parts; first += batch * warps) {
        float2 m[batch];
        float x[batch][P];
#pragma unroll
        for (int b = 0; b < batch; ++b) {
            const int i = min(first + b * warps, parts - 1);
            const float * from = partial + int64_t(i) * D + V * lane;
            m[b] = meta[i];
#pragma unroll
            for (int j = 0; j < P; j += V) {
                if constexpr (V == 4) {
                    const float4 four = *reinterpret_cast<const float4 *>(from + 32 * j);
                    x[b][j] = four.x;
                    x[b][j + 1] = four.y;
                    x[b][j + 2] = four.z;
                    x[b][j + 3] = four.w;
                } else {
                    const float2 two = *reinterpret_cast<const float2 *>(from + 32 * j);
                    x[b][j] = two.x;
                    x[b][j + 1] = two.y;
                }
            }
        }
#pragma unroll
        for (int b = 0; b < batch; ++b) {
            const float weight = first + b * warps < parts ? exp2f(m[b].x - largest) : 0.0f;
            total += weight * m[b].y;
#pragma unroll
            for (int j = 0; j < P; ++j) y[j] += weight * x[b][j];
        }
    }
#pragma unroll
    for (int j = 0; j < P; ++j) sums[warp * D + 32 * (j / V * V) + V * lane + j % V] = y[j];
    if (lane == 0) totals[warp] = total;
    __syncthreads();
    const int e = threadIdx.x;
    if (e >= D) return;
    float sum = 0;
    total = exp2f(sink - largest);
#pragma unroll 8
    for (int i = 0; i < warps; ++i) {
        sum += sums[i * D + e];
        total += totals[i];
    }
    const float value = total == 0 ? 0.0f : sum / total; // a NaN is not hidden
    if (!turbo) {
        dst[row * D + e] = value;
        return;
    }
    constexpr int block = D < 128 ? D : 128;
    static_assert(D % 32 == 0, "whole warps");
    sums[e] = value; // its own slot: nobody else reads it any more before the barrier
    asm volatile("bar.sync 1, %0;" ::"n"(D) : "memory"); // of the first D threads
    if (e / 32 >= D / block) return;
    float part[block / 32];
    for (int j = 0; j < block / 32; ++j) part[j] = sums[warp * block + lane + 32 * j];
    unrotate_warp<block>(part);
    for (int j = 0; j < block / 32; ++j) dst[row * D + warp * block + lane + 32 * j] = part[j];
}

template <int D> cudaError_t launch_merge(const AttentionCall & call, cudaStream_t stream) {
    int warps = D / 32;
    while (warps < call.p.parts && warps < most_merge_warps) warps *= 2;
    return launch(merge_kernel<D>, dim3(unsigned(query_rows(call.a))), dim3(unsigned(32 * warps)), 0, stream,
                  call.partial, call.meta, call.a.sinks, call.a.dst, call.a.heads, call.p.parts,
                  is_turbo(call.a.type_v));
}

// Kernels need leave for more than 48 KB of shared memory, once per device.
cudaError_t allow_shared(AttentionKernel kernel, const Attention & a, int id, int bytes) {
    constexpr int most_devices = 64;
    static std::atomic<int> allowed[most_devices][3][25];
    if (id >= most_devices) return cudaErrorNotSupported;
    std::atomic<int> & known = allowed[id][a.head == 64 ? 0 : a.head == 128 ? 1 : 2][int(a.type_k) * 5 + int(a.type_v)];
    if (known.load(std::memory_order_relaxed) >= bytes) return cudaSuccess;
    Device device;
    if (!current_device(device, id)) return cudaErrorNoDevice;
    const cudaError_t error = cudaFuncSetAttribute(
        reinterpret_cast<const void *>(kernel), cudaFuncAttributeMaxDynamicSharedMemorySize, device.shared_per_block);
    if (error == cudaSuccess) known.store(device.shared_per_block, std::memory_order_relaxed);
    return error;
}

} // namespace

bool attention_supports(const Attention & a) {
    AttentionPlan p;
    return plan_attention(a, p);
}

size_t attention_workspace(const Attention & a) {
    AttentionPlan p;
    if (!plan_attention(a, p)) return 0;
    return partial_bytes(a, p) + size_t(query_rows(a)) * p.parts * sizeof(float2);
}

cudaError_t attention(const Attention & a, void * workspace, cudaStream_t stream) {
    AttentionCall call;
    call.a = a;
    if (!plan_attention(a, call.p)) return cudaErrorNotSupported;
    Device device;
    int id = 0;
    if (!current_device(device, id)) return cudaErrorNoDevice;
    const AttentionKernel kernel = kernel_of(a);
    const cudaError_t error = allow_shared(kernel, a, id, call.p.shared_bytes);
    if (error != cudaSuccess) return error;
    call.partial = static_cast<float *>(workspace);
    call.meta = reinterpret_cast<float2 *>(static_cast<char *>(workspace) + partial_bytes(a, call.p));
    call.slope_heads = 1;
    while (call.slope_heads * 2 <= a.heads) call.slope_heads *= 2;
    call.slope0 = std::pow(2.0f, -a.max_bias / float(call.slope_heads));
    call.slope1 = std::pow(2.0f, -a.max_bias / 2.0f / float(call.slope_heads));
    const dim3 grid(unsigned(call.p.chunks), unsigned(call.p.head_groups * call.p.column_tiles), unsigned(a.streams));
    const cudaError_t launched = launch(kernel, grid, dim3(unsigned(32 * call.p.block_heads * call.p.row_tiles)),
                                        size_t(call.p.shared_bytes), stream, call);
    if (launched != cudaSuccess || call.p.chunks == 1)
        return launched; // a single run of rows is finished where it was computed
    switch (a.head) {
        case 64: return launch_merge<64>(call, stream);
        case 128: return launch_merge<128>(call, stream);
        default: return launch_merge<256>(call, stream);
    }
}

} // namespace cuda
} // namespace turboquant
