// Compares the kernels for the rows of an exact window with plain code.
#include "check.h"
#include "codec.h"
#include "device.h"
#include "rows.h"
#include "turboquant_cuda.h"

#include <cuda_fp16.h>

#include <algorithm>
#include <numeric>

using namespace turboquant::cuda;

namespace {

uint16_t half_bits(float x) { return __half_as_ushort(__float2half_rn(x)); }

constexpr uint16_t unwritten = 0x0101 * poison;
constexpr int64_t streams = 2;

// A different row of the cache for most exact rows of each stream, and none for the others. Rows from 70000 on need more
// than 16 bits.
struct Cells {
    int64_t rows;
    std::vector<int64_t> cell;   // [stream][row], or -1
    std::vector<uint16_t> words; // [stream][low, high][row]
    DeviceArray<uint16_t> data;

    Cells(int64_t rows, int64_t n_kv, Random & random)
        : rows(rows), cell(size_t(rows * streams)), words(size_t(2 * rows * streams)), data(fill(n_kv, random)) {}

    const std::vector<uint16_t> & fill(int64_t n_kv, Random & random) {
        for (int64_t s = 0; s < streams; ++s) {
            std::vector<int64_t> all(static_cast<size_t>(n_kv));
            std::iota(all.begin(), all.end(), 0);
            for (int64_t r = 0; r < rows; ++r) {
                std::swap(all[size_t(r)], all[size_t(r) + random.below(uint32_t(n_kv - r))]);
                const int64_t c = random.below(5) == 0 ? -1 : all[size_t(r)];
                cell[size_t(s * rows + r)] = c;
                words[size_t(2 * s * rows + r)] = uint16_t(c + 1);
                words[size_t((2 * s + 1) * rows + r)] = uint16_t((c + 1) >> 16);
            }
        }
        return words;
    }
    WindowCells on_device() const { return {data.get(), data.get() + rows, 4 * rows}; }
};

struct Window {
    bool half_slots;
    int64_t n_slots, n_batch, values, slot_row, batch_row; // bytes of a slot, floats of a row of the batch
    std::vector<float> want;                               // [stream][row][value]
    std::vector<uint8_t> slots;
    std::vector<float> batch;

    Window(bool half_slots, int64_t n_slots, int64_t n_batch, int64_t values, Random & random)
        : half_slots(half_slots), n_slots(n_slots), n_batch(n_batch), values(values),
          slot_row(int64_t(row_bytes(type(), values)) + 2), batch_row(values + 3),
          want(size_t(values * (n_slots + n_batch) * streams)), slots(size_t(slot_row * n_slots * streams)),
          batch(size_t(batch_row * n_batch * streams)) {
        for (int64_t s = 0; s < streams; ++s)
            for (int64_t r = 0; r < n_slots + n_batch; ++r) {
                float * x = want.data() + (s * (n_slots + n_batch) + r) * values;
                for (int64_t i = 0; i < values; ++i) x[i] = random.normal();
                if (r >= n_slots) {
                    std::copy(x, x + values, batch.data() + (s * n_batch + r - n_slots) * batch_row);
                    continue;
                }
                uint8_t * to = slots.data() + (s * n_slots + r) * slot_row;
                encode_row(type(), x, to, values);
                decode_row(type(), to, x, values);
            }
    }
    int type() const { return half_slots ? TQ_ROW_F16 : TQ_ROW_Q8_0; }
    WindowRows rows(uint8_t * slot_data, float * batch_data) const {
        return {half_slots, {slot_data, {slot_row, 0, slot_row * n_slots}},
                {batch_data, {batch_row * 4, 0, batch_row * n_batch * 4}}, n_slots, n_batch, values, streams};
    }
};

void replaces_rows(int block, bool rotated, bool half_slots, int64_t n_slots, int64_t n_batch, int64_t n_kv) {
    check::Case c("rows ", block, rotated ? ", rotated" : "", half_slots ? ", f16 " : ", q8_0 ", n_slots, " ", n_batch);
    Random random(uint64_t(block + n_slots));
    Window window(half_slots, n_slots, n_batch, 3 * block, random);
    const Cells cells(n_slots + n_batch, n_kv, random);
    const int64_t values = window.values, out = values + 6; // halves of a row
    std::vector<uint16_t> want(size_t(out * n_kv * streams), unwritten);
    for (int64_t s = 0; s < streams; ++s)
        for (int64_t r = 0; r < cells.rows; ++r) {
            const int64_t cell = cells.cell[size_t(s * cells.rows + r)];
            if (cell < 0) continue;
            float * x = window.want.data() + (s * cells.rows + r) * values;
            if (rotated) CHECK_EQ(tq_rotate(block, x, x, values, 1), TQ_OK);
            for (int64_t i = 0; i < values; ++i) want[size_t((s * n_kv + cell) * out + i)] = half_bits(x[i]);
        }
    DeviceArray<uint8_t> slots(window.slots);
    DeviceArray<float> batch(window.batch);
    DeviceArray<uint16_t> dst(want.size());
    const Rows to = {dst.get(), {out * 2, 0, out * n_kv * 2}};
    must(window_to_half(window.rows(slots.get(), batch.get()), cells.on_device(), block, rotated, to, nullptr),
         "window_to_half");
    CHECK(dst.host() == want);
}

void replaces_mask(int64_t rows, int64_t tokens, int64_t heads, int64_t n_kv) {
    check::Case c("mask ", rows, " ", tokens, " ", heads);
    Random random(uint64_t(rows + tokens));
    const Cells cells(rows, n_kv, random);
    std::vector<uint16_t> exact(size_t(rows * tokens * heads * streams)), want(size_t(n_kv * tokens * heads * streams));
    for (uint16_t & x : exact) x = uint16_t(random.below(0x7c00));
    for (uint16_t & x : want) x = uint16_t(random.below(0x7c00));
    DeviceArray<uint16_t> from(exact), mask(want);
    for (int64_t i = 0; i < tokens * heads * streams; ++i)
        for (int64_t r = 0; r < rows; ++r) {
            const int64_t cell = cells.cell[size_t(i / (tokens * heads) * rows + r)];
            if (cell >= 0) want[size_t(i * n_kv + cell)] = exact[size_t(i * rows + r)];
        }
    const auto dense = [&](uint16_t * data, int64_t row) {
        return Rows{data, {2 * row, 2 * row * tokens, 2 * row * tokens * heads}};
    };
    const int64_t ne[4] = {rows, tokens, heads, streams};
    must(window_to_mask(dense(from.get(), rows), cells.on_device(), dense(mask.get(), n_kv), ne, nullptr),
         "window_to_mask");
    CHECK(mask.host() == want);
}

void stores(bool half_slots, int64_t n_batch, int64_t values_k, int64_t values_v) {
    check::Case c("stores ", half_slots ? "f16 " : "q8_0 ", n_batch, " ", values_k, " ", values_v);
    Random random(uint64_t(n_batch + values_k));
    const int64_t n_slots = n_batch * streams + 3;
    std::vector<int64_t> index(static_cast<size_t>(n_slots));
    std::iota(index.begin(), index.end(), 0);
    for (size_t i = index.size(); i > 1; --i) std::swap(index[i - 1], index[random.below(uint32_t(i))]);
    index.resize(size_t(n_batch * streams));
    DeviceArray<int64_t> rows(index);
    Window k(half_slots, 0, n_batch, values_k, random), v(half_slots, 0, n_batch, values_v, random);
    DeviceArray<float> batch_k(k.batch), batch_v(v.batch);
    DeviceArray<uint8_t> to_k(size_t(k.slot_row * n_slots)), to_v(size_t(v.slot_row * n_slots));
    const auto slots = [&](uint8_t * data, const Window & w) {
        return Rows{data, {w.slot_row, 0, 0}};
    };
    must(store_window(k.rows(nullptr, batch_k.get()), v.rows(nullptr, batch_v.get()), rows.get(), slots(to_k.get(), k),
                      slots(to_v.get(), v), nullptr),
         "store_window");
    for (const Window * w : {&k, &v}) {
        std::vector<uint8_t> want(size_t(w->slot_row * n_slots), poison);
        for (size_t i = 0; i < index.size(); ++i)
            encode_row(w->type(), w->want.data() + int64_t(i) * w->values, want.data() + index[i] * w->slot_row, w->values);
        // A value of q8_0 that lies between two levels may be rounded to either, because the scale's inverse is rounded.
        // Relative errors are about 2^-23, so fewer than 127 * 2^-22 of the values, 3 in 100000, lie so near.
        const std::vector<uint8_t> got = (w == &k ? to_k : to_v).host();
        int64_t differ = 0, between = 0;
        for (size_t i = 0; i < want.size(); ++i) {
            const int apart = std::abs(int(int8_t(want[i])) - int(int8_t(got[i])));
            differ += apart > (half_slots ? 0 : 1);
            between += apart == 1;
        }
        CHECK_EQ(differ, int64_t(0));
        CHECK(between * 1000 <= int64_t(want.size()));
    }
}

} // namespace

int main() {
    need_device(75);
    for (const bool half_slots : {false, true}) {
        for (const int block : {128, 64, 32})
            for (const bool rotated : {false, true}) {
                replaces_rows(block, rotated, half_slots, 7, 3, 40);
                replaces_rows(block, rotated, half_slots, 256, 0, 512);
                replaces_rows(block, rotated, half_slots, 0, 70, 70);
            }
        for (const int64_t n_batch : {1, 70})
            stores(half_slots, n_batch, 96, n_batch == 1 ? 32 : 128);
    }
    replaces_rows(32, true, false, 256, 70, 140000);
    replaces_mask(9, 5, 1, 24);
    replaces_mask(300, 70, 3, 1000);
    replaces_mask(326, 2, 1, 140000);
    const WindowRows odd = {false, {nullptr, {0, 0, 0}}, {nullptr, {0, 0, 0}}, 1, 1, 96, 1};
    const WindowCells none = {nullptr, nullptr, 0};
    CHECK_EQ(window_to_half(odd, none, 64, true, {nullptr, {0, 0, 0}}, nullptr), cudaErrorNotSupported);
    must(cudaDeviceSynchronize(), "at the end");
    return check::summary();
}
