// Attention: plans and launches.
#include "attention.cuh"
#include "gather.h"
#include "launch.h"
#include "merge.cuh"
#include "wide.h"

#include <algorithm>
#include <cmath>
#include <map>
#include <utility>
#include <vector>

namespace turboquant {
namespace cuda {
namespace {

// Columns that attention.cuh takes at most, and those above which wide.cuh is faster. Measured on an H200 (32 query
// heads, 8 KV heads of 128, turbo4, microseconds of a layer): 16 columns take 20.7 and 22.0 at 8192 rows, 45.7 and
// 52.7 at 32768; 32 columns take 29.8 and 26.4, 78.8 and 60.1. Over a short cache the latency of its additional kernel
// counts more. The kernels for a few tokens are faster than both.
constexpr int most_decode_columns = 32, few_columns = 16, short_cache = 2048;

// Whether a kernel for a few tokens (direct.cuh, hopper_direct.cuh) is faster than the others, if one covers the call.
// Measured on an H200 (32 query heads, 8 KV heads of 128, turbo4, microseconds of a layer, with these kernels / with
// the others). With a window of 256:
//
//   rows          256    2304    8192   32768    131072
//    8 columns  14/21   15/25   18/22   33/37     79/86
//   16          14/23   15/26   18/31   33/55     80/144
//   32          17/30   17/23   24/27   41/53    102/138
//   48          17/20   20/24   29/28   61/55    181/141
//
// Without a window the kernel that prepares the queries makes a short call longer: 16 columns take 15 / 12 at 256 rows,
// 17 / 19 at 1024 and 23 / 26 at 8192.
bool prefers_direct(const Attention & a, int columns) {
    constexpr int shortest = 512, shorter = 4096;
    if (columns <= 4 || (!a.windowed && a.n_kv <= shortest)) return false;
    return columns <= (a.n_kv <= shorter ? 64 : 32);
}

// Slots of an exact window that a warp computes one by one, at most. A kernel of their own computes more as tiles.
// Measured on an H200 with 8 KV heads of 128, in a model: 8 streams of 4096 rows, whose warps have 8 slots each, took 29
// us a layer without and 36 us with that kernel; with 32 such streams, whose warps have 32, it made a step 9% faster.
constexpr int most_own_exact_rows = 16;

struct Device {
    int version, multiprocessors, shared_per_block, shared_per_multiprocessor;
};

// The properties of all devices, indexed by the number of the device.
const std::vector<Device> & all_devices() {
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
    return devices;
}

// The properties of the current device, whose number is written to id; nullptr if there is none.
const Device * current_device(int & id) {
    const std::vector<Device> & devices = all_devices();
    return cudaGetDevice(&id) == cudaSuccess && id >= 0 && size_t(id) < devices.size() ? &devices[size_t(id)] : nullptr;
}

// The parts of Kind and Layout that a plan needs, for a type that is known only at run time.
struct RowType {
    bool turbo, floats;
    int bytes; // of a row of one head
};
template <int D> RowType row_type(KV type) {
    switch (type) {
#define TURBOQUANT_CASE(name) \
    case KV::name: return {Kind<KV::name>::turbo, Kind<KV::name>::floats, Layout<KV::name, D>::bytes};
        TURBOQUANT_KV(TURBOQUANT_CASE)
#undef TURBOQUANT_CASE
    }
    return {};
}

// Bytes of a row in shared memory: an odd multiple of 16, so that eight consecutive rows start in different banks. A
// row, whose address is even, keeps its address modulo 16 there, which takes up to 14 more bytes.
int pitch_for(const void * base, int64_t row, int64_t stream, int chunk) {
    const bool aligned = ((reinterpret_cast<uintptr_t>(base) | uint64_t(row) | uint64_t(stream)) & 15) == 0;
    const int units = (chunk + (aligned ? 0 : 14) + 15) / 16;
    return (units | 1) * 16;
}

// The functions that are compiled for a head size.
struct Head {
    int size;
    RowType (*row_type)(KV type);
    AttentionKernel (*kernel)(const KernelChoice & choice);
    AttentionKernel (*gathering)(const KernelChoice & choice);
    cudaError_t (*merge)(const AttentionCall & call, const StoredBeside & stores, bool rotated, int multiprocessors,
                         cudaStream_t stream);
    cudaError_t (*store)(const AttentionCall & call, const StoredBeside & stores, cudaStream_t stream);
};
const Head heads[] = {
#define TURBOQUANT_HEAD(D) \
    {D, row_type<D>, attention_kernel_##D, gathering_kernel_##D, launch_merge<D>, launch_store<D>},
    TURBOQUANT_KV_HEADS(TURBOQUANT_HEAD)
#undef TURBOQUANT_HEAD
};

// The functions for a head size; nullptr if there are none.
const Head * head_of(int size) {
    for (const Head & head : heads)
        if (head.size == size) return &head;
    return nullptr;
}

} // namespace

cudaError_t allow_shared(const void * kernel, int device, int bytes) {
    static thread_local std::map<std::pair<const void *, int>, int> allowed;
    int & known = allowed[{kernel, device}];
    if (known >= bytes) return cudaSuccess;
    cudaFuncAttributes attributes;
    cudaError_t error = cudaFuncGetAttributes(&attributes, kernel);
    if (error != cudaSuccess) return error;
    // The kernel's own shared memory counts, too.
    const int most = all_devices()[size_t(device)].shared_per_block - int(attributes.sharedSizeBytes);
    error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, most);
    if (error == cudaSuccess) known = most;
    return error;
}

bool kv_of_type(int type, int head, KV & kv) {
    if (!head_of(head)) return false;
    const int place = block_index(block_of_head(head)); // the index of the type in its family
#define TURBOQUANT_CASE(X, ID, name, family, bits, id) \
    if (type == TQ_##ID + place) {                     \
        kv = KV::name;                                 \
        return Kind<KV::name>::covered;                \
    }
    TURBOQUANT_FAMILIES(TURBOQUANT_CASE, )
#undef TURBOQUANT_CASE
    kv = type == TQ_ROW_F16 ? KV::f16 : KV::q8_0;
    return type == TQ_ROW_F16 || type == TQ_ROW_Q8_0;
}

namespace {

// The slots of an exact window as a cache.
Attention slots_of(const Attention & a) {
    const ExactRows & x = a.exact;
    Attention slots = a;
    slots.windowed = false;
    slots.type_k = slots.type_v = x.type;
    slots.n_kv = x.slots;
    slots.k = x.k;
    slots.k_row = x.k_row;
    slots.k_head = x.k_head;
    slots.k_stream = x.k_stream;
    slots.v = x.v;
    slots.v_row = x.v_row;
    slots.v_head = x.v_head;
    slots.v_stream = x.v_stream;
    slots.mask = x.mask;
    slots.mask_token = x.mask_token;
    slots.mask_head = x.mask_head;
    slots.mask_stream = x.mask_stream;
    slots.mask_heads = x.mask_heads;
    slots.mask_streams = x.mask_streams;
    slots.sinks = nullptr; // the rows of the cache count them
    return slots;
}

struct Planner {
    const Attention & a;
    const Device & device;
    const Head & head;
    RowType k, v;

    Planner(const Attention & a, const Device & device, const Head & head)
        : a(a), device(device), head(head), k(head.row_type(a.type_k)), v(head.row_type(a.type_v)) {}

    void columns(AttentionPlan & p) const {
        p.group = a.heads / a.kv_heads;
        p.columns = p.group * a.tokens;
    }

    // The shared memory of a multiprocessor for each of its thread blocks.
    int share(const AttentionPlan & p) const {
        const int reserved = 1024; // that CUDA takes for a thread block
        return device.shared_per_multiprocessor / resident(p) - reserved - barrier_bytes;
    }
    // The thread blocks of a multiprocessor, as in the launch bounds of the kernel.
    int resident(const AttentionPlan & p) const { return resident_blocks(a.head, p.column_tile / 4); }

    // Bytes in which the warps of a thread block exchange their results.
    int result_bytes(const AttentionPlan & p) const {
        return p.block_heads * p.row_tiles * p.column_tile * (a.head + 2) * int(sizeof(float));
    }

    // Rows of all KV heads, or of each group of them, that a thread block takes.
    bool take_heads(AttentionPlan & p, int heads) const {
        if (a.kv_heads % heads) return false;
        p.block_heads = heads;
        p.head_groups = a.kv_heads / heads;
        // The pitches also depend on the alignment of the first head of each group.
        const uint64_t group_k = p.head_groups > 1 ? uint64_t(heads * a.k_head) : 0;
        const uint64_t group_v = p.head_groups > 1 ? uint64_t(heads * a.v_head) : 0;
        p.pitch_k = pitch_for(a.k, a.k_row, int64_t(a.k_stream | group_k), heads * k.bytes);
        p.pitch_v = pitch_for(a.v, a.v_row, int64_t(a.v_stream | group_v), heads * v.bytes);
        p.gapless = a.k_row == p.pitch_k && heads * k.bytes == p.pitch_k && a.v_row == p.pitch_v &&
                    heads * v.bytes == p.pitch_v;
        const auto aligned = [&](const void * base, int64_t row, uint64_t group, int bytes) {
            return ((reinterpret_cast<uintptr_t>(base) | uint64_t(row) | group | uint64_t(heads * bytes)) & 15) == 0;
        };
        return !p.gathered || (aligned(a.k, a.k_row, group_k, k.bytes) && aligned(a.v, a.v_row, group_v, v.bytes));
    }

    // The plan of slots_of() some call: a thread block takes one KV head and merges its warps' results.
    AttentionPlan slots(const AttentionPlan & of) const {
        AttentionPlan p = {};
        p.device = of.device;
        columns(p);
        p.column_tile = p.columns <= 4 ? 4 : most_columns;
        p.column_tiles = (p.columns + p.column_tile - 1) / p.column_tile;
        take_heads(p, 1);
        p.gapless = false;
        p.stages = 2;
        const int row_tile = tile_rows * (p.pitch_k + p.pitch_v);
        const int64_t tiles = (a.n_kv + tile_rows - 1) / tile_rows;
        // The second stage of a single run of rows has queries alone.
        const auto bytes = [&] {
            const int stage = p.row_tiles * row_tile;
            return stage + (p.row_tiles < tiles ? stage : query_scratch(a.head));
        };
        p.row_tiles = int(std::min<int64_t>(most_warps, tiles));
        while (p.row_tiles > 1 && bytes() > share(p)) --p.row_tiles;
        // The kernel of the cache starts when all of these thread blocks have, so they are resident at the same time.
        const int64_t wanted = int64_t(device.multiprocessors) * resident(p) /
                               (int64_t(p.head_groups) * p.column_tiles * a.streams);
        p.chunks = int(std::max<int64_t>(1, std::min(wanted, tiles / p.row_tiles)));
        const int64_t step = p.row_tiles * tile_rows;
        p.chunk_rows = (a.n_kv + p.chunks * step - 1) / (p.chunks * step) * step;
        p.chunks = p.long_chunks = int((a.n_kv + p.chunk_rows - 1) / p.chunk_rows);
        p.parts = p.chunks;
        p.shared_bytes = barrier_bytes + std::max(bytes(), result_bytes(p));
        return p;
    }

    // Divides the rows into as many runs as are wanted, if half of the thread blocks or more can have a step less.
    static void divide_evenly(AttentionPlan & p, int64_t wanted, int64_t steps) {
        const int64_t least = steps / wanted, rest = steps % wanted; // steps of a run, and those that are left
        if (p.gathered || least == 0 || rest == 0 || 2 * rest > wanted) return;
        p.chunks = int(wanted);
        p.long_chunks = int(rest);
        p.short_chunks = int(wanted - rest);
    }

    // Plans the kernel of attention.cuh. The plan has the device, the group and the columns.
    bool decode(AttentionPlan & p) const {
        p.wide = p.direct = p.hopper = false;
        p.eights = 0;
        const int columns = p.gathered ? p.group : p.columns; // that see the same rows
        p.column_tile = columns <= 4 ? 4 : most_columns;
        p.column_tiles = (columns + p.column_tile - 1) / p.column_tile * (p.gathered ? a.tokens : 1);
        if (!p.gathered && p.columns > most_decode_columns) return false;

        const bool adjacent = a.k_head == k.bytes && a.v_head == v.bytes;
        // The rows of a short cache are a single run. A thread block has one KV head, all warps of which take rows, and
        // without an exact window it finishes the query rows itself, so no second kernel is launched. With a window a
        // second tile of a warp costs more than it saves.
        const bool shortest = a.n_kv <= (a.windowed ? 1 : 2) * most_warps * tile_rows;
        for (int heads = adjacent && !shortest ? most_warps : 1; heads >= 1; --heads) {
            if (!take_heads(p, heads)) continue;
            const int most = device.shared_per_block - barrier_bytes;
            const int row_tile = tile_rows * (p.pitch_k + p.pitch_v);
            p.row_tiles = most_warps / heads;
            while (p.row_tiles > 1 && 2 * p.row_tiles * row_tile > most) --p.row_tiles;
            const int stage = p.row_tiles * row_tile;
            if (2 * stage > most) continue;
            p.stages = 3 * stage <= share(p) && 3 * stage <= most ? 3 : 2;
            p.shared_bytes = p.stages * stage;
            const int64_t beside = int64_t(p.head_groups) * p.column_tiles * a.streams;
            if (beside / a.streams > 65535) return false;
            const int64_t at_once = int64_t(device.multiprocessors) * (p.shared_bytes <= share(p) ? resident(p) : 1);
            const int64_t wanted = at_once / beside > 1 ? at_once / beside : 1;
            const int64_t step = int64_t(p.row_tiles) * tile_rows, steps = (a.n_kv + step - 1) / step;
            p.chunk_rows = (shortest ? steps : (steps + wanted - 1) / wanted) * step;
            p.chunks = p.long_chunks = int((a.n_kv + p.chunk_rows - 1) / p.chunk_rows);
            p.short_chunks = 0;
            p.kept = p.gathered || p.chunk_rows >= least_kept_tiles * step;
            // A window that has a slot for each row of the cache has all rows, unless several sequences share the
            // cache.
            p.likely_hidden = a.windowed && a.mask && a.n_kv <= a.exact.slots && a.n_kv <= p.row_tiles * tile_rows;
            p.first_exact = 0;
            if (a.windowed) {
                // The batch's own rows do not count: a part for a single row of them costs more than a warp with two
                // rows.
                const int64_t exact = (a.exact.slots + most_exact_rows - 1) / most_exact_rows,
                              exact_chunks = (exact + p.row_tiles - 1) / p.row_tiles;
                if (exact > 0 && p.chunks + exact_chunks <= wanted && !p.likely_hidden && !p.gathered) {
                    // Thread blocks of their own take the exact rows while the others compute rows of the cache.
                    p.first_exact = p.chunks * p.row_tiles;
                    p.chunks += int(exact_chunks);
                } else {
                    divide_evenly(p, wanted, steps);
                    // Not more chunks than the cache has rows for, unless a warp would have many exact rows.
                    p.chunks = std::max(p.chunks, int(std::min(wanted, exact_chunks)));
                }
            } else {
                divide_evenly(p, wanted, steps);
            }
            p.parts = p.chunks * p.row_tiles;
            p.exact_parts = p.parts - p.first_exact;
            p.merged = p.chunks > 1 || a.windowed;
            if (!p.merged) p.shared_bytes = std::max(p.shared_bytes, result_bytes(p)); // in the memory of the stages
            p.shared_bytes += barrier_bytes;
            p.slot_parts = 0;
            if (a.windowed && !p.gathered && a.exact.type == KV::q8_0 &&
                a.exact.slots > int64_t(most_own_exact_rows) * p.parts) {
                const Attention own = slots_of(a);
                p.slot_parts = Planner(own, device, head).slots(p).parts;
            }
            const size_t parts = size_t(query_rows(a)) * size_t(p.parts + p.slot_parts);
            p.states_at = parts * size_t(a.head) * sizeof(float);
            p.notes_bytes = p.gathered ? list_bytes(a) : 0;
            p.workspace_bytes = p.states_at + parts * sizeof(SoftmaxState) + p.notes_bytes;
            return true;
        }
        return false;
    }
};

} // namespace

bool plan_attention(const Attention & a, AttentionPlan & p) {
    const Device * device = current_device(p.device);
    const Head * head = head_of(a.head);
    if (a.kv_heads < 1 || a.heads % a.kv_heads || a.tokens < 1 || a.streams < 1 || a.kv_streams < 1 ||
        a.streams % a.kv_streams || a.n_kv < 1 || a.n_kv > 1 << 30 || a.streams > 65535 || !device ||
        device->version < 80 || !head)
        return false;
    const Planner planner(a, *device, *head);
    const RowType &k = planner.k, &v = planner.v;
    if (!(k.turbo || v.turbo) || !head->kernel({a.type_k, a.type_v, a.windowed, true})) return false;
    if (a.windowed && !covers_exact(a)) return false;
    // The kernels read f16 in words, and all other types in half words.
    const uint64_t all_k = reinterpret_cast<uintptr_t>(a.k) | uint64_t(a.k_row | a.k_head | a.k_stream);
    const uint64_t all_v = reinterpret_cast<uintptr_t>(a.v) | uint64_t(a.v_row | a.v_head | a.v_stream);
    if (all_k & (k.floats ? 3 : 1) || all_v & (v.floats ? 3 : 1)) return false;

    planner.columns(p);
    p.kept = false;
    // The decode kernel computes rows of one request for few columns of others. It skips the other rows, or does not
    // even read them, if lists have those that a token sees. Bulk copies, of Hopper and newer GPUs, gather such rows.
    const bool separate = a.requests > 1 && 2 * a.requests > a.tokens;
    const AttentionKernel gathering = head->gathering({a.type_k, a.type_v, a.windowed, true});
    p.gathered = gathering && separate && a.n_kv > short_cache && can_list(a) && device->version >= 90 &&
                 can_overlap(reinterpret_cast<const void *>(gathering));
    if (p.gathered && planner.decode(p)) return true;
    p.gathered = false;
    p.slot_parts = 0;
    const WideDevice of_wide = {device->multiprocessors, device->shared_per_block};
    const int pitch_k = pitch_for(a.k, a.k_row, a.k_stream | a.k_head, k.bytes),
              pitch_v = pitch_for(a.v, a.v_row, a.v_stream | a.v_head, v.bytes);
    if (!separate && prefers_direct(a, p.columns) && plan_direct(a, of_wide, k.bytes, v.bytes, p)) return true;
    p.direct = false;
    p.eights = 0;
    if (p.columns > (a.n_kv > short_cache && !separate ? few_columns : most_decode_columns) &&
        plan_wide(a, of_wide, pitch_k, pitch_v, p))
        return true;
    return planner.decode(p);
}

namespace {

// Launches a kernel of attention.cuh.
cudaError_t launch_attention(const Head & head, AttentionCall call, cudaStream_t stream) {
    const Attention & a = call.a;
    const AttentionPlan & p = call.plan;
    call.stage_rows = p.row_tiles * tile_rows;
    call.stage_bytes = call.stage_rows * (p.pitch_k + p.pitch_v);
    call.one_mask_row = a.mask_heads == 1 && (a.tokens == 1 || p.group % p.column_tile == 0 || p.gathered);
    const bool runs = p.gapless && p.block_heads == most_warps && p.row_tiles == 1;
    const Loop loop = !p.kept ? Loop::simple : runs ? Loop::runs : Loop::kept;
    const KernelChoice choice = {a.type_k, a.type_v, a.windowed, p.column_tile == 4, loop};
    const AttentionKernel kernel = p.gathered ? head.gathering(choice) : head.kernel(choice);
    const cudaError_t error = allow_shared(reinterpret_cast<const void *>(kernel), p.device, p.shared_bytes);
    if (error != cudaSuccess) return error;
    const dim3 grid(unsigned(p.chunks), unsigned(p.head_groups * p.column_tiles), unsigned(a.streams));
    return launch(kernel, grid, dim3(unsigned(32 * p.block_heads * p.row_tiles)), size_t(p.shared_bytes), stream, call);
}

// Launches the kernels of the lists, of the slots of an exact window, and of the cache, as far as the plan has them.
cudaError_t launch_decode(const Head & head, const AttentionCall & call, MaskNotes notes, cudaStream_t stream) {
    AttentionCall cache = call;
    if (call.plan.gathered) {
        int * lists = static_cast<int *>(notes.memory);
        int * lengths = lists + call.a.tokens * call.a.n_kv;
        cache.lists = lists;
        cache.list_lengths = lengths;
        const cudaError_t error = notes.written ? cudaSuccess : launch_lists(call, lists, lengths, stream);
        if (error != cudaSuccess) return error;
    }
    if (call.plan.slot_parts) { // before the cache, which takes longer, and does not wait for this kernel
        AttentionCall slots = call;
        slots.a = slots_of(call.a);
        slots.plan = Planner(slots.a, all_devices()[size_t(call.plan.device)], head).slots(call.plan);
        slots.triggers_late = true;
        slots.rotates_part = head.row_type(call.a.type_v).turbo;
        slots.first_part = call.plan.parts;
        const cudaError_t error = launch_attention(head, slots, stream);
        if (error != cudaSuccess) return error;
        cache.waits_last = true;
        ExactRows & own = cache.a.exact; // the batch's rows are left
        own.mask = static_cast<const uint16_t *>(own.mask) + own.slots;
        own.slots = 0;
    }
    return launch_attention(head, cache, stream);
}

} // namespace

MaskNotesKey notes_key(const Attention & a, const AttentionPlan & p) {
    const auto address = [](const void * mask) { return int64_t(reinterpret_cast<uintptr_t>(mask)); };
    MaskNotesKey key = {int64_t(p.notes_bytes), p.gathered, p.device, a.tokens,
                        address(a.mask), a.n_kv, a.mask_token, a.mask_head, a.mask_stream, a.mask_heads,
                        a.mask_streams};
    if (!p.wide || !a.windowed) return key; // the notes are of the cache's mask alone
    const ExactRows & x = a.exact;
    const MaskNotesKey exact = {address(x.mask), x.slots, x.mask_token, x.mask_head, x.mask_stream, x.mask_heads,
                                x.mask_streams};
    std::copy_n(exact.begin(), 7, key.end() - 7);
    return key;
}

cudaError_t attention(const Attention & a, const AttentionPlan & plan, void * workspace, cudaStream_t stream,
                      const Store * stores, MaskNotes notes) {
    if (a.quantized && !plan.merged) return cudaErrorNotSupported;
    if (!notes.memory) notes = {static_cast<char *>(workspace) + plan.workspace_bytes - plan.notes_bytes, false};
    AttentionCall call = {};
    call.a = a;
    call.plan = plan;
    call.partial = static_cast<float *>(workspace);
    call.states = reinterpret_cast<SoftmaxState *>(static_cast<char *>(workspace) + plan.states_at);
    call.slope_heads = 1;
    while (call.slope_heads * 2 <= a.heads) call.slope_heads *= 2;
    call.slope0 = std::pow(2.0f, -a.max_bias / float(call.slope_heads));
    call.slope1 = std::pow(2.0f, -a.max_bias / 2.0f / float(call.slope_heads));
    const Head & head = *head_of(a.head);
    call.stored_rows = stored_rows(a);
    call.all_parts = plan.parts + plan.slot_parts;
    call.triggers_late = stores != nullptr;
    StoredBeside beside = {};
    if (stores) {
        dim3 size;
        const cudaError_t error = describe_stores(stores, 2, beside.stores, size);
        if (error != cudaSuccess) return error;
        if (beside.stores.block != block_of_head(a.head) || size.x > 1u << 30) return cudaErrorNotSupported;
        beside.groups = int(size.x);
    }
    const cudaError_t launched =
        plan.wide ? launch_wide(call, workspace, notes, stream) : launch_decode(head, call, notes, stream);
    if (launched != cudaSuccess) return launched;
    if (!plan.merged) // the kernel has written the output
        return plan.hopper ? head.store(call, beside, stream)
               : stores    ? encode_rows(stores[0], stores[1], stream)
                           : cudaSuccess;
    return head.merge(call, beside, head.row_type(a.type_v).turbo,
                      all_devices()[size_t(plan.device)].multiprocessors, stream);
}

} // namespace cuda
} // namespace turboquant
