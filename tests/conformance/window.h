// A problem of which some rows are read with high precision: those of an exact window.
#ifndef TURBOQUANT_TESTS_WINDOW_H
#define TURBOQUANT_TESTS_WINDOW_H

#include "problem.h"

// Which rows are in slots: every third, all, or all but one in the middle. In the last two cases there are at least as
// many slots as rows in the cache.
enum class InSlots { third, all, all_but_one };

// The last rows, as many as there are tokens, are the batch's own; some of those before are in slots.
struct Windowed {
    const int type;                         // of the slots: TQ_ROW_F16 or TQ_ROW_Q8_0
    int64_t slots, batch;                   // rows of a stream
    int64_t slot_head_k, slot_head_v;       // bytes of a head's values in a slot
    std::vector<uint8_t> slots_k, slots_v;  // [kv_stream][slot][KV head]
    std::vector<float> batch_k, batch_v;    // [kv_stream][row][KV head][head]
    std::vector<uint16_t> far;              // the mask without them
    std::vector<uint16_t> exact;            // theirs: binary16 [stream][mask head][token][slots + batch]

    // The values of the rows in slots become what the type makes of them, in the problem, too.
    Windowed(Problem & p, int type, InSlots in_slots = InSlots::third)
        : type(type), slot_head_k(int64_t(row_bytes(type, p.c.head_k))),
          slot_head_v(int64_t(row_bytes(type, p.c.head_v))) {
        const AttentionCase & c = p.c;
        batch = std::min<int64_t>(c.tokens, c.rows);
        std::vector<int64_t> rows; // of the exact columns
        for (int64_t r = 0; r < c.rows - batch; r += in_slots == InSlots::third ? 3 : 1)
            if (in_slots != InSlots::all_but_one || r != c.rows / 2) rows.push_back(r);
        do rows.insert(rows.begin() + int64_t(rows.size()) / 2, -1); // empty slots
        while (in_slots != InSlots::third && int64_t(rows.size()) < c.rows);
        slots = int64_t(rows.size());
        for (int64_t r = c.rows - batch; r < c.rows; ++r) rows.push_back(r);
        for (int64_t s = 0; s < c.kv_streams; ++s)
            for (const int64_t r : rows)
                for (int h = 0; h < c.kv_heads; ++h) {
                    const bool own = r >= c.rows - batch;
                    const auto take = [&](Cache & cache, std::vector<uint8_t> & bytes, std::vector<float> & floats) {
                        const size_t size = row_bytes(type, cache.head);
                        if (r < 0) {
                            bytes.insert(bytes.end(), size, uint8_t(0xff)); // NaN in f16, and as the scale of q8_0
                            return;
                        }
                        const float *& values = cache.values[size_t((s * c.rows + r) * c.kv_heads + h)];
                        if (own) {
                            floats.insert(floats.end(), values, values + cache.head);
                            return;
                        }
                        bytes.resize(bytes.size() + size);
                        uint8_t * to = bytes.data() + bytes.size() - size;
                        encode_row(type, values, to, cache.head);
                        rounded.emplace_back(size_t(cache.head));
                        decode_row(type, to, rounded.back().data(), cache.head);
                        values = rounded.back().data();
                    };
                    take(p.k, slots_k, batch_k);
                    take(p.v, slots_v, batch_v);
                }
        far = p.mask;
        const int64_t mask_rows = int64_t(c.streams) * c.mask_heads * c.tokens;
        if (far.empty()) far.assign(size_t(mask_rows * c.rows), 0);
        for (int64_t i = 0; i < mask_rows; ++i)
            for (const int64_t r : rows) {
                uint16_t * at = r < 0 ? nullptr : &far[size_t(i * c.rows + r)];
                exact.push_back(at ? *at : uint16_t(0xfc00));
                if (at) *at = 0xfc00;
            }
    }
    Windowed(const Windowed &) = delete;

private:
    std::deque<std::vector<float>> rounded;
};

#endif
