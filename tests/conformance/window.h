// A problem of which some rows are read with high precision: those of an exact window.
#ifndef TURBOQUANT_TESTS_WINDOW_H
#define TURBOQUANT_TESTS_WINDOW_H

#include "problem.h"

// The last rows, as many as there are tokens, are the batch's own; of those before, every third is in a slot.
struct Windowed {
    int64_t slots, batch;              // rows of a stream
    std::vector<uint16_t> slots_k, slots_v; // binary16 [kv_stream][slot][KV head][head]
    std::vector<float> batch_k, batch_v;    // [kv_stream][row][KV head][head]
    std::vector<uint16_t> far;         // binary16 [stream][token][rows]: the mask without them
    std::vector<uint16_t> exact;       // [stream][token][slots + batch]: theirs

    // The values of the rows in slots become what binary16 makes of them, in the problem, too.
    explicit Windowed(Problem & p) {
        const AttentionCase & c = p.c;
        batch = std::min<int64_t>(c.tokens, c.rows);
        std::vector<int64_t> rows; // of the exact columns
        for (int64_t r = 0; r < c.rows - batch; r += 3) rows.push_back(r);
        rows.insert(rows.begin() + int64_t(rows.size()) / 2, -1); // an empty slot
        slots = int64_t(rows.size());
        for (int64_t r = c.rows - batch; r < c.rows; ++r) rows.push_back(r);
        for (int64_t s = 0; s < c.kv_streams; ++s)
            for (const int64_t r : rows)
                for (int h = 0; h < c.kv_heads; ++h) {
                    const bool own = r >= c.rows - batch;
                    const auto take = [&](Cache & cache, std::vector<uint16_t> & halves, std::vector<float> & floats) {
                        if (r < 0) {
                            halves.insert(halves.end(), size_t(cache.head), uint16_t(0x7e00));
                            return;
                        }
                        const float *& values = cache.values[size_t((s * c.rows + r) * c.kv_heads + h)];
                        if (own) {
                            floats.insert(floats.end(), values, values + cache.head);
                            return;
                        }
                        rounded.emplace_back(values, values + cache.head);
                        for (float & x : rounded.back()) {
                            halves.push_back(binary16_of(x));
                            x = float(half_at(reinterpret_cast<const uint8_t *>(&halves.back())));
                        }
                        values = rounded.back().data();
                    };
                    take(p.k, slots_k, batch_k);
                    take(p.v, slots_v, batch_v);
                }
        far = p.mask;
        if (far.empty()) far.assign(size_t(int64_t(c.streams) * c.tokens * c.rows), 0);
        for (int64_t query = 0; query < int64_t(c.streams) * c.tokens; ++query)
            for (const int64_t r : rows) {
                uint16_t * at = r < 0 ? nullptr : &far[size_t(query * c.rows + r)];
                exact.push_back(at ? *at : uint16_t(0xfc00));
                if (at) *at = 0xfc00;
            }
    }
    Windowed(const Windowed &) = delete;

private:
    std::deque<std::vector<float>> rounded;
};

#endif
