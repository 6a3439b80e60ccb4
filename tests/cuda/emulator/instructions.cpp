// What instructions do; see instructions.h. A lane is 4 * quad + in_quad, as in the kernels.
#include "instructions.h"

#include "half.h"
#include "intrinsics.h"

#include <algorithm>

namespace emulator {

namespace {

constexpr uint32_t unset = 0x7fffffff; // NaN as a float

int8_t byte_of(uint32_t word, int i) { return int8_t(word >> (8 * i)); }
float half_of(uint32_t word, int i) { return float_of_half(uint16_t(word >> (16 * i))); }

// Fills a matrix of 16 rows from the four registers of each lane, in which a word has `Count` elements. `Get` is an
// element of a word.
template <typename T, int Count, typename Words, typename Get>
void fill_a(T (&a)[16][8 * Count], const Words & of_lane, const Get & get) {
    for (int lane = 0; lane < warp_size; ++lane)
        for (int r = 0; r < 4; ++r)
            for (int i = 0; i < Count; ++i)
                a[lane / 4 + 8 * (r & 1)][(lane % 4 + 4 * (r / 2)) * Count + i] = get(of_lane(lane)[r], i);
}

struct Multiply {
    const uint32_t * a;
    const uint32_t * b;
    uint32_t * const * c;
    uint32_t * const * d;
};
// d = c + a product of 16 x K and K x 8 elements, those of a and of b.
template <typename T, typename Sum, int Count, typename GetA, typename GetB>
void multiply(Multiply ** lanes, const GetA & get_a, const GetB & get_b) {
    constexpr int K = 8 * Count;
    T a[16][K], b[K][8];
    fill_a<T, Count>(a, [&](int lane) { return lanes[lane]->a; }, get_a);
    for (int lane = 0; lane < warp_size; ++lane)
        for (int r = 0; r < 2; ++r)
            for (int i = 0; i < Count; ++i)
                b[(lane % 4 + 4 * r) * Count + i][lane / 4] = get_b(lanes[lane]->b[r], i);
    for (int row = 0; row < 16; ++row) {
        Sum sums[8] = {};
        for (int k = 0; k < K; ++k)
            for (int column = 0; column < 8; ++column) sums[column] += Sum(a[row][k]) * Sum(b[k][column]);
        for (int column = 0; column < 8; ++column) {
            const Multiply & lane = *lanes[row % 8 * 4 + column / 2];
            const int i = row / 8 * 2 + column % 2;
            Sum c;
            std::memcpy(&c, lane.c[i], 4);
            c += sums[column];
            std::memcpy(lane.d[i], &c, 4);
        }
    }
}
void multiply_s8(Multiply ** lanes) { multiply<int8_t, int, 4>(lanes, byte_of, byte_of); }
void multiply_u8_s8(Multiply ** lanes) {
    multiply<int16_t, int, 4>(lanes, [](uint32_t word, int i) { return uint8_t(byte_of(word, i)); }, byte_of);
}
void multiply_f16(Multiply ** lanes) { multiply<float, float, 2>(lanes, half_of, half_of); }

template <void (*act)(Multiply **), typename Pointers>
void start_multiply(Site site, const Pointers & d, const ptx::Words<4> & a, const ptx::Words<2> & b,
                    const Pointers & c) {
    uint32_t * to[4];
    uint32_t * from[4];
    for (size_t i = 0; i < 4; ++i) {
        to[i] = reinterpret_cast<uint32_t *>(d[i]);
        from[i] = reinterpret_cast<uint32_t *>(c[i]);
    }
    Multiply own = {a.data(), b.data(), from, to};
    collective<Multiply, act>(site, own);
}

// ---- products of warpgroups

// The byte at an offset from the start of a matrix, whose rows of 128 bytes have units of 16 bytes that are exchanged.
const uint8_t * swizzled(uint64_t descriptor, uint32_t offset, size_t bytes) {
    const uint32_t rank = uint32_t(current->block->rank) << rank_shift; // products read the own memory alone
    const uint32_t address = (uint32_t(descriptor & 0x3fff) * 16 + offset) | rank;
    return shared_at({"wgmma", 0}, address ^ (address >> 7 & 7) << 4, bytes, bytes);
}

// Elements of B, by row k and column, from shared memory. In a transposed matrix the columns of a row are adjacent, 64
// in a row of 128 bytes.
template <int K> void load_b(const AsyncProduct & p, float (&b)[K][128]) {
    const uint32_t leading = uint32_t(p.b >> 16 & 0x3fff) * 16, stride = uint32_t(p.b >> 32 & 0x3fff) * 16;
    if (p.b >> 62 != 1) stop("wgmma: a matrix without the swizzle of 128 bytes");
    for (int k = 0; k < K; ++k)
        for (int n = 0; n < p.columns; ++n) {
            const uint32_t rows = uint32_t(p.transposed ? k : n), in_row = uint32_t(p.transposed ? n % 64 : k);
            const uint32_t at = rows / 8 * stride + rows % 8 * 128 + in_row * (p.kind == AsyncProduct::f16 ? 2 : 1) +
                                (p.transposed ? uint32_t(n / 64) * leading : 0);
            if (p.kind == AsyncProduct::f16) {
                uint16_t bits;
                std::memcpy(&bits, swizzled(p.b, at, 2), 2);
                b[k][n] = float_of_half(bits);
            } else {
                const uint8_t byte = *swizzled(p.b, at, 1);
                b[k][n] = p.kind == AsyncProduct::u8 ? float(byte) : float(int8_t(byte));
            }
        }
}

// The warp's 16 rows of a product. Sums of 32 products of bytes are exact in float32, and integers are added as such.
template <int K> void multiply_rows(AsyncProduct ** lanes) {
    const AsyncProduct & p = *lanes[0];
    static thread_local float a[16][K], b[K][128];
    constexpr int count = K == 32 ? 4 : 2;
    const auto element = [&](uint32_t word, int i) {
        if (p.kind == AsyncProduct::f16) return half_of(word, i);
        return p.kind == AsyncProduct::s8 ? float(byte_of(word, i)) : float(uint8_t(byte_of(word, i)));
    };
    fill_a<float, count>(a, [&](int lane) { return lanes[lane]->a; }, element);
    load_b<K>(p, b);
    for (int row = 0; row < 16; ++row) {
        float sums[128] = {};
        for (int k = 0; k < K; ++k)
            for (int n = 0; n < p.columns; ++n) sums[n] += a[row][k] * b[k][n];
        for (int n = 0; n < p.columns; ++n) {
            uint32_t * d = lanes[row % 8 * 4 + n % 8 / 2]->d[n / 8 * 4 + row / 8 * 2 + n % 2];
            if (p.kind == AsyncProduct::f16) {
                const float sum = (p.accumulate ? bits_as<float>(*d) : 0.0f) + sums[n];
                *d = bits_as<uint32_t>(sum);
            } else {
                *d = (p.accumulate ? *d : 0u) + uint32_t(int(sums[n]));
            }
        }
    }
}

// Computes the products of the groups that the warp waits for.
void finish_products(Thread ** lanes) {
    const std::vector<AsyncProduct> & first = lanes[0]->products;
    size_t count = 0;
    for (; count < first.size() && first[count].group < lanes[0]->awaited_groups; ++count) {
        if (first[count].group < 0) stop("wgmma: a wait for a product that was not committed");
        AsyncProduct * products[warp_size];
        for (int lane = 0; lane < warp_size; ++lane) {
            if (lanes[lane]->products.size() != first.size()) stop("wgmma: the lanes have started different products");
            products[lane] = &lanes[lane]->products[count];
            if (products[lane]->b != first[count].b) stop("wgmma: the lanes' descriptors differ");
        }
        if (first[count].kind == AsyncProduct::f16) multiply_rows<16>(products);
        else multiply_rows<32>(products);
    }
    for (int lane = 0; lane < warp_size; ++lane) {
        std::vector<AsyncProduct> & all = lanes[lane]->products;
        all.erase(all.begin(), all.begin() + std::ptrdiff_t(count));
    }
}

// All warps of a warpgroup must execute its instructions in the same order.
void execute_with_group(int line) {
    Thread & t = *current;
    if (t.lane) return;
    std::vector<int> & lines = t.block->of_groups[size_t(t.warp / 4)];
    if (t.of_group == lines.size()) lines.push_back(line);
    if (lines[t.of_group++] != line) stop("wgmma in line %d, and another warp of the warpgroup is not there", line);
}

template <typename Pointers>
void start_product(int line, AsyncProduct::Kind kind, const Pointers & d, const ptx::Words<4> & a, uint64_t b, int add,
                   bool transposed) {
    Thread & t = *current;
    execute_with_group(line);
    if (!t.fenced) stop("wgmma in line %d, and no fence since the last wait", line);
    AsyncProduct p = {};
    p.kind = kind;
    p.columns = int(d.size()) * 2;
    p.accumulate = add != 0;
    p.transposed = transposed;
    p.group = -1;
    p.b = b;
    for (size_t i = 0; i < 4; ++i) p.a[i] = a[i];
    for (size_t i = 0; i < d.size(); ++i) {
        p.d[i] = reinterpret_cast<uint32_t *>(d[i]);
        if (!add) *p.d[i] = unset; // until the wait
    }
    t.products.push_back(p);
}

// ---- matrices of 8 x 8 halves, of which lane 4 r + i has two of row r

struct Moved {
    uint32_t in, out;
};
void transpose_lanes(Moved ** lanes) {
    const auto element = [&](int row, int column) {
        return lanes[4 * row + column / 2]->in >> (16 * (column % 2)) & 0xffff;
    };
    for (int lane = 0; lane < warp_size; ++lane) {
        const int row = lane / 4, column = lane % 4 * 2;
        lanes[lane]->out = element(column, row) | element(column + 1, row) << 16;
    }
}

struct LoadedMatrices {
    const uint8_t * row;
    uint32_t * const * d;
    bool transposed;
};
void load_lanes(LoadedMatrices ** lanes) {
    for (int m = 0; m < 4; ++m)
        for (int lane = 0; lane < warp_size; ++lane) {
            uint32_t word = 0;
            for (int i = 0; i < 2; ++i) {
                int row = lane / 4, column = lane % 4 * 2 + i;
                if (lanes[0]->transposed) std::swap(row, column);
                uint16_t half;
                std::memcpy(&half, lanes[8 * m + row]->row + 2 * column, 2);
                word |= uint32_t(half) << (16 * i);
            }
            *lanes[lane]->d[m] = word;
        }
}
struct StoredMatrices {
    uint8_t * row;
    const uint32_t * a;
};
void store_lanes(StoredMatrices ** lanes) { // transposed
    for (int m = 0; m < 4; ++m)
        for (int lane = 0; lane < warp_size; ++lane)
            for (int i = 0; i < 2; ++i) {
                const uint16_t half = uint16_t(lanes[lane]->a[m] >> (16 * i));
                std::memcpy(lanes[8 * m + lane % 4 * 2 + i]->row + 2 * (lane / 4), &half, 2);
            }
}
void load_matrices(Site site, const std::array<uint32_t *, 4> & d, uint32_t address, bool transposed) {
    LoadedMatrices own = {shared_at(site, address, 16, 16), d.data(), transposed};
    collective<LoadedMatrices, load_lanes>(site, own);
}

void vote_lanes(Vote ** lanes) {
    unsigned all = 0;
    for (int i = 0; i < warp_size; ++i) all |= unsigned(lanes[i]->value) << i;
    for (int i = 0; i < warp_size; ++i) lanes[i]->lanes = all;
}

// As double, also of a float below the normal ones if the host treats these as zeros.
double exactly(float x) {
    const uint32_t bits = bits_as<uint32_t>(x);
    if (bits & 0x7f800000) return x;
    const double magnitude = double(bits & 0x7fffff) * 0x1p-149;
    return bits >> 31 ? -magnitude : magnitude;
}

} // namespace

unsigned ballot(const char * operation, int line, bool x) {
    Vote own = {x, 0};
    collective<Vote, vote_lanes>({operation, line}, own);
    return own.lanes;
}

namespace ptx {

void fma_rn_f32(int, float & d, float a, float b, float c) { d = float(exactly(a) * exactly(b) + exactly(c)); }

void st_shared_u16(int line, uint32_t address, uint16_t x) {
    std::memcpy(shared_at({"st.shared", line}, address, 2, 2), &x, 2);
}

// ---- copies

void cp_async_cg_shared_global_L2__128B(int line, uint32_t to, const void * from, int bytes, int valid) {
    const Site site = {"cp.async", line};
    if (bytes != 16 || valid < 0 || valid > 16) stop("cp.async in line %d of %d of %d bytes", line, valid, bytes);
    if (reinterpret_cast<uintptr_t>(from) % 16) stop("cp.async in line %d from a misaligned address", line);
    std::memset(shared_at(site, to, 16, 16), 0xff, 16);
    current->copies.push_back({to, from, valid, current->copy_group});
}
void cp_async_commit_group(int) { ++current->copy_group; }
void cp_async_wait_group(int line, int pending) {
    Thread & t = *current;
    size_t kept = 0;
    for (const AsyncCopy & copy : t.copies) {
        if (copy.group >= t.copy_group - pending) {
            t.copies[kept++] = copy;
            continue;
        }
        uint8_t * to = shared_at({"cp.async", line}, copy.to, 16, 16);
        std::memset(to, 0, 16);
        if (copy.valid) std::memcpy(to, copy.from, size_t(copy.valid));
    }
    t.copies.resize(kept);
}

void mbarrier_init_shared__cta_b64(int line, uint32_t address, int arrivals) {
    if (arrivals < 1 || arrivals > 255) stop("mbarrier.init in line %d for %d arrivals", line, arrivals);
    MemoryBarrier & barrier = memory_barrier({"mbarrier.init", line}, address, false);
    barrier.parity = 0;
    barrier.arrivals = barrier.missing = uint8_t(arrivals);
    barrier.bytes = 0;
}
void mbarrier_arrive_shared__cta_b64(int line, uint32_t address) {
    MemoryBarrier & barrier = memory_barrier({"mbarrier.arrive", line}, address);
    if (barrier.missing == 0) stop("mbarrier.arrive in line %d: too many arrivals in a phase", line);
    --barrier.missing;
    barrier_changed(barrier);
}
void mbarrier_arrive_shared__cluster_b64(int line, uint32_t address) {
    mbarrier_arrive_shared__cta_b64(line, address);
}
void mbarrier_arrive_expect_tx_shared__cta_b64(int line, uint32_t address, int bytes) {
    memory_barrier({"mbarrier.arrive.expect_tx", line}, address).bytes += bytes;
    mbarrier_arrive_shared__cta_b64(line, address);
}
void mbarrier_expect_tx_relaxed_cta_shared__cta_b64(int line, uint32_t address, int bytes) {
    memory_barrier({"mbarrier.expect_tx", line}, address).bytes += bytes;
}
bool mbarrier_try_wait_parity_shared__cta_b64(int line, uint32_t address, int parity) {
    wait_for_parity({"mbarrier.try_wait", line}, address, parity);
    return true;
}
void cp_async_bulk_shared__cluster_global_mbarrier__complete_tx__bytes(int line, uint32_t to, const void * from,
                                                                       int bytes, uint32_t barrier) {
    const Site site = {"cp.async.bulk", line};
    if (bytes <= 0 || bytes % 16 || reinterpret_cast<uintptr_t>(from) % 16)
        stop("cp.async.bulk in line %d of %d bytes from %p", line, bytes, from);
    uint8_t * at = shared_at(site, to, size_t(bytes), 16);
    std::memset(at, 0xff, size_t(bytes));
    current->block->cluster->bulk.push_back({at, from, uint32_t(bytes), &memory_barrier(site, barrier)});
}
void cp_async_bulk_shared__cluster_shared__cta_mbarrier__complete_tx__bytes(int line, uint32_t to, uint32_t from,
                                                                            int bytes, uint32_t barrier) {
    cp_async_bulk_shared__cluster_global_mbarrier__complete_tx__bytes(
        line, to, shared_at({"cp.async.bulk", line}, from, size_t(bytes), 16), bytes, barrier);
}
void st_async_shared__cluster_mbarrier__complete_tx__bytes_u32(int line, uint32_t to, uint32_t x, uint32_t barrier) {
    const Site site = {"st.async", line};
    std::memcpy(shared_at(site, to, 4, 4), &x, 4);
    MemoryBarrier & changed = memory_barrier(site, barrier);
    changed.bytes -= 4;
    barrier_changed(changed);
}
void ld_shared__cluster_u32(int line, uint32_t & d, uint32_t address) {
    std::memcpy(&d, shared_at({"ld.shared::cluster", line}, address, 4, 4), 4);
}

// ---- matrices

void movmatrix_sync_aligned_m8n8_trans_b16(int line, uint32_t & d, uint32_t a) {
    Moved own = {a, 0};
    collective<Moved, transpose_lanes>({"movmatrix", line}, own);
    d = own.out;
}
void ldmatrix_sync_aligned_m8n8_x4_shared_b16(int line, std::array<uint32_t *, 4> d, uint32_t address) {
    load_matrices({"ldmatrix", line}, d, address, false);
}
void ldmatrix_sync_aligned_m8n8_x4_trans_shared_b16(int line, std::array<uint32_t *, 4> d, uint32_t address) {
    load_matrices({"ldmatrix.trans", line}, d, address, true);
}
void stmatrix_sync_aligned_m8n8_x4_trans_shared_b16(int line, uint32_t address, Words<4> a) {
    const Site site = {"stmatrix.trans", line};
    StoredMatrices own = {shared_at(site, address, 16, 16), a.data()};
    collective<StoredMatrices, store_lanes>(site, own);
}
void mma_sync_aligned_m16n8k32_row_col_s32_s8_s8_s32(int line, Integers<4> d, Words<4> a, Words<2> b, Integers<4> c) {
    start_multiply<multiply_s8>({"mma.s8", line}, d, a, b, c);
}
void mma_sync_aligned_m16n8k32_row_col_s32_u8_s8_s32(int line, Integers<4> d, Words<4> a, Words<2> b, Integers<4> c) {
    start_multiply<multiply_u8_s8>({"mma.u8", line}, d, a, b, c);
}
void mma_sync_aligned_m16n8k16_row_col_f32_f16_f16_f32(int line, Floats<4> d, Words<4> a, Words<2> b, Floats<4> c) {
    start_multiply<multiply_f16>({"mma.f16", line}, d, a, b, c);
}

// ---- matrices of warpgroups

void wgmma_fence_sync_aligned(int line) {
    execute_with_group(line);
    ballot("wgmma.fence", line, false);
    current->fenced = true;
}
void wgmma_commit_group_sync_aligned(int line) {
    execute_with_group(line);
    ballot("wgmma.commit_group", line, false);
    for (AsyncProduct & p : current->products)
        if (p.group < 0) p.group = current->product_groups;
    ++current->product_groups;
}
void wgmma_wait_group_sync_aligned(int line, int pending) {
    execute_with_group(line);
    current->awaited_groups = std::max(current->awaited_groups, current->product_groups - pending);
    collective<Thread, finish_products>({"wgmma.wait_group", line}, *current);
    current->fenced = false;
}
void wgmma_mma_async_sync_aligned_m64n16k32_s32_u8_s8(int line, Integers<8> d, Words<4> a, uint64_t b, int add) {
    start_product(line, AsyncProduct::u8_s8, d, a, b, add, false);
}
void wgmma_mma_async_sync_aligned_m64n32k32_s32_u8_s8(int line, Integers<16> d, Words<4> a, uint64_t b, int add) {
    start_product(line, AsyncProduct::u8_s8, d, a, b, add, false);
}
void wgmma_mma_async_sync_aligned_m64n64k32_s32_u8_u8(int line, Integers<32> d, Words<4> a, uint64_t b, int add) {
    start_product(line, AsyncProduct::u8, d, a, b, add, false);
}
void wgmma_mma_async_sync_aligned_m64n64k32_s32_s8_s8(int line, Integers<32> d, Words<4> a, uint64_t b, int add) {
    start_product(line, AsyncProduct::s8, d, a, b, add, false);
}
static void start_halves(int line, int scale_a, int scale_b) {
    if (scale_a != 1 || scale_b != 1) stop("wgmma in line %d with a negative operand is not emulated", line);
}
void wgmma_mma_async_sync_aligned_m64n128k16_f32_f16_f16(int line, Floats<64> d, Words<4> a, uint64_t b, int add,
                                                         int scale_a, int scale_b, int transpose_b) {
    start_halves(line, scale_a, scale_b);
    start_product(line, AsyncProduct::f16, d, a, b, add, transpose_b != 0);
}
void wgmma_mma_async_sync_aligned_m64n16k16_f32_f16_f16(int line, Floats<8> d, Words<4> a, uint64_t b, int add,
                                                        int scale_a, int scale_b, int transpose_b) {
    start_halves(line, scale_a, scale_b);
    start_product(line, AsyncProduct::f16, d, a, b, add, transpose_b != 0);
}
void wgmma_mma_async_sync_aligned_m64n32k16_f32_f16_f16(int line, Floats<16> d, Words<4> a, uint64_t b, int add,
                                                        int scale_a, int scale_b, int transpose_b) {
    start_halves(line, scale_a, scale_b);
    start_product(line, AsyncProduct::f16, d, a, b, add, transpose_b != 0);
}

} // namespace ptx
} // namespace emulator
