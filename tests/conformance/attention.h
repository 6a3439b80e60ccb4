// The conformance list of attention: the cases that every backend must compute, as data. The test of a backend compares
// the backend with the formula (problem.h) in all cases that it covers, and checks that it refuses the others.
#ifndef TURBOQUANT_TESTS_ATTENTION_CASES_H
#define TURBOQUANT_TESTS_ATTENTION_CASES_H

#include "extent.h"
#include "turboquant.h"

#include <cmath>
#include <cstdint>
#include <sstream>
#include <string>
#include <vector>

// The bytes of K and V.
enum class Bytes {
    encoded,   // encoded normal values
    odd,       // encoded, with scales that no encoder writes: negative ones, zeros, subnormals
    subnormal, // encoded, with subnormal scales
    any        // any indices and levels, also -128; scales of either sign
};
enum class Mask {
    none,
    causal,      // the last token sees all rows, the one before it all but the last, ...; a tenth is hidden at random
    random,      // tokens see a random half of the rows, with random biases; the last token sees nothing, and every 64th
                 // token sees none of the rows 64 to 127
    alternating, // requests that share a cache: a token sees the rows of its own parity
    runs,        // requests whose rows lie one after the other: token t sees quarter t % 4 of the rows
    prefixes,    // token t sees the first seen[t % 3] rows
    first        // the first token sees all rows, the others all but the bad one
};
enum class Sinks { none, normal, hidden }; // hidden is -infinity
enum class Bad { nan, infinity };          // all bytes of a row are 0xff; its first value or scale is infinite

struct AttentionCase {
    std::string name;
    int type_k = TQ_TURBO4, type_v = TQ_TURBO4; // tq_type or TQ_ROW_...
    int head_k = 128, head_v = 128, heads = 8, kv_heads = 2, tokens = 1;
    int streams = 1, kv_streams = 1; // of the queries, and of the cache, whose number divides the former
    int64_t rows = 300;              // of K and V
    bool heads_adjacent = true;      // whether the rows of all heads of a cell are adjacent, else those of one head
    int pad = 0;                     // bytes between cache rows
    Bytes bytes = Bytes::encoded;
    Mask mask = Mask::causal;
    int mask_heads = 1; // head h has mask h % mask_heads
    Sinks sinks = Sinks::none;
    float max_bias = 0, soft_cap = 0, sparse_v = 0;
    float spread = 1;                      // standard deviation of the scores if K has standard deviation 1
    int64_t first = 0, last = INT64_MAX;   // the rows before and after these are hidden, and their bytes are 0xff
    int64_t seen[3] = {0, 0, 0};           // see Mask::prefixes
    int64_t bad_key = -1, bad_value = -1;  // rows that are not finite
    Bad bad = Bad::nan;
    bool alone = false; // whether the other 64 rows around the bad row are hidden
    bool far = false;   // whether the first half of the rows has almost no weight
    bool steep = false; // whether V's scales are 2^9 times as large in the second half of the rows, not trellis-coded
    bool for_gpus = false; // the CPU has no code of its own for so many tokens or caches
    Extent extent = Extent::whole;

    int group() const { return heads / kv_heads; }
    // Whether values of V that are not finite are next to a query that does not see them.
    bool hides_bad_values() const {
        if (bad_value >= 0) return tokens > 1;
        return bad_key < 0 && (first > 0 || last < rows - 1);
    }
};

namespace attention_list {

// Whether a row's type is trellis-coded.
inline bool is_trellis(int type) { return type >= TQ_TURBO4_TCQ && type < TQ_TYPE_COUNT; }

// The type of a family that a host uses for a head.
inline int for_head(int type, int head) {
    return type < TQ_TYPE_COUNT ? int(tq_type_for_head(tq_type(type), head)) : type;
}

inline AttentionCase with_types(int k, int v, int head_k = 128, int head_v = 0) {
    AttentionCase c;
    c.head_k = head_k;
    c.head_v = head_v ? head_v : head_k;
    c.type_k = for_head(k, c.head_k);
    c.type_v = for_head(v, c.head_v);
    return c;
}

inline std::string described(const AttentionCase & c) {
    std::ostringstream s;
    s << tq_row_get(c.type_k)->name << "/" << tq_row_get(c.type_v)->name << ", heads of " << c.head_k;
    if (c.head_v != c.head_k) s << "/" << c.head_v;
    s << ", " << c.heads << "/" << c.kv_heads << " heads, " << c.tokens << (c.tokens == 1 ? " token, " : " tokens, ");
    if (c.streams > 1) s << c.streams << "/" << c.kv_streams << " streams, ";
    s << c.rows << " rows";
    if (!c.heads_adjacent) s << ", heads apart";
    if (c.pad) s << ", padded by " << c.pad;
    const char * bytes[] = {"", ", odd scales", ", subnormal scales", ", any bytes"};
    const char * masks[] = {", no mask", "", ", random masks", ", alternating masks",
                            ", masks of runs", "", ", seen by the first token"};
    const char * sinks[] = {"", ", sinks", ", sinks of -infinity"};
    s << bytes[int(c.bytes)] << masks[int(c.mask)] << sinks[int(c.sinks)];
    if (c.mask_heads > 1) s << " of " << c.mask_heads << " heads";
    if (c.max_bias > 0) s << ", ALiBi " << c.max_bias;
    if (c.soft_cap > 0) s << ", soft cap " << c.soft_cap;
    if (c.sparse_v > 0) s << ", sparse V " << c.sparse_v;
    if (c.spread != 1) s << ", spread " << c.spread;
    if (c.first > 0) s << ", from row " << c.first;
    if (c.last < INT64_MAX) s << ", to row " << c.last;
    const char * bad = c.bad == Bad::nan ? ", NaN in " : ", infinity in ";
    if (c.bad_key >= 0) s << bad << "K's row " << c.bad_key;
    if (c.bad_value >= 0) s << bad << "V's row " << c.bad_value;
    if (c.mask == Mask::prefixes) s << ", prefixes of " << c.seen[0] << ", " << c.seen[1] << ", " << c.seen[2];
    if (c.alone) s << " alone";
    if (c.far) s << ", first half far";
    if (c.steep) s << ", second half of V large";
    return s.str();
}

class List {
public:
    std::vector<AttentionCase> cases;

    void add(const char * subject, AttentionCase c, Extent extent = Extent::whole) {
        c.name = std::string(subject) + ": " + described(c);
        c.extent = extent;
        cases.push_back(c);
    }
};

struct Pair {
    int k, v, head_k, head_v;
};
// Every family and row type, and different heads of K and V.
constexpr Pair mixed_pairs[] = {
    {TQ_TURBO4, TQ_TURBO3, 128, 128},     {TQ_TURBO3, TQ_TURBO4, 64, 96},     {TQ_TURBO2, TQ_TURBO2, 96, 64},
    {TQ_ROW_Q8_0, TQ_ROW_Q8_0, 128, 128}, {TQ_ROW_Q4_0, TQ_ROW_Q4_0, 96, 96}, {TQ_TURBO3, TQ_ROW_F16, 128, 64},
    {TQ_ROW_F16, TQ_TURBO4, 64, 128},     {TQ_ROW_Q8_0, TQ_ROW_BF16, 64, 64},
    {TQ_TURBO4_TCQ, TQ_TURBO2_TCQ, 128, 128}, {TQ_TURBO3_TCQ, TQ_TURBO4_TCQ, 64, 64}};

// A turbo type with each type that GPUs support in a pair with it.
inline std::vector<Pair> turbo_pairs() {
    std::vector<Pair> pairs;
    const int types[] = {TQ_TURBO4, TQ_TURBO3, TQ_TURBO2, TQ_ROW_Q8_0, TQ_ROW_F16};
    for (const int k : types)
        for (const int v : types)
            if (k < TQ_TYPE_COUNT || v < TQ_TYPE_COUNT)
                for (const int head : {64, 96, 128, 256}) pairs.push_back({k, v, head, head});
    return pairs;
}

inline void types_and_heads(List & list) {
    for (const Pair & p : turbo_pairs()) {
        AttentionCase c = with_types(p.k, p.v, p.head_k);
        list.add("types", c, p.head_k == 128 ? Extent::brief : Extent::usual); // group of 4
        c.heads = 16;
        c.rows = 517;
        list.add("types", c); // group of 8
        c.kv_heads = 16;
        list.add("types", c); // group of 1
    }
    for (const int type : {TQ_TURBO4_TCQ, TQ_TURBO3_TCQ, TQ_TURBO2_TCQ})
        for (const int head : {64, 96, 128, 256}) {
            AttentionCase c = with_types(type, type, head);
            list.add("types", c, head == 128 ? Extent::brief : Extent::usual);
            c.heads = 16;
            c.rows = 517;
            list.add("types", c);
        }
    for (const int head : {32, 192, 512, 576}) { // further head sizes of llama.cpp's models
        AttentionCase c = with_types(TQ_TURBO4, TQ_TURBO3, head);
        c.rows = 100;
        list.add("heads", c, Extent::usual);
    }
    const Pair blocks[] = {{TQ_TURBO3_64, TQ_TURBO2_32, 64, 96}, {TQ_TURBO2, TQ_TURBO4_64, 256, 64},
                           {TQ_TURBO4_32, TQ_TURBO3_32, 32, 32}};
    for (const Pair & p : blocks)
        for (const float soft_cap : {0.0f, 2.0f}) {
            AttentionCase c = with_types(TQ_TURBO4, TQ_TURBO4, p.head_k, p.head_v);
            c.type_k = p.k; // shorter blocks than the longest that divides the head
            c.type_v = p.v;
            c.heads = 4;
            c.tokens = 3;
            c.rows = 17;
            c.soft_cap = soft_cap;
            list.add("blocks", c, Extent::usual);
        }
}

// Several tiles of rows, several runs of tokens and GQA groups, and a mask with different values in every part.
inline void masks(List & list) {
    for (const Pair & p : mixed_pairs)
        for (const int tokens : {3, 150}) {
            AttentionCase c = with_types(p.k, p.v, p.head_k, p.head_v);
            c.bytes = Bytes::any;
            c.mask = Mask::random;
            c.heads = 4;
            c.tokens = tokens;
            c.rows = 200;
            list.add("masks", c, Extent::usual);
        }
}

// Every query sees a prefix of the rows, as in a batch, which is longer or shorter than that of the query before it.
inline void prefixes(List & list) {
    const int64_t seen[][3] = {{90, 10, 130}, {130, 90, 10}, {10, 130, 90}, {1, 64, 64}, {128, 129, 127}};
    for (const Pair & p : mixed_pairs)
        for (const auto & lengths : seen) {
            AttentionCase c = with_types(p.k, p.v, p.head_k, p.head_v);
            c.bytes = Bytes::any;
            c.mask = Mask::prefixes;
            for (int i = 0; i < 3; ++i) {
                c.seen[i] = lengths[i];
                c.last = i == 0 || lengths[i] > c.last + 1 ? lengths[i] - 1 : c.last; // later rows are 0xff
            }
            c.heads = 4;
            c.tokens = 3;
            c.rows = 200;
            list.add("prefixes", c, Extent::usual);
        }
}

// Valid blocks that no encoder writes.
inline void scales(List & list) {
    for (const Pair & p : turbo_pairs()) {
        if (p.head_k != 128 && p.k != p.v) continue;
        const bool first = p.k == TQ_TURBO4 || p.k == TQ_TURBO4_TCQ;
        const Extent extent = p.head_k == 128 && first ? Extent::brief : Extent::whole;
        for (const Bytes bytes : {Bytes::odd, Bytes::subnormal})
            for (const int heads : {8, 16}) // groups of 4 and 8
                for (const int64_t rows : {300, 2100}) {
                    AttentionCase c = with_types(p.k, p.v, p.head_k);
                    c.bytes = bytes;
                    c.heads = heads;
                    c.rows = rows;
                    list.add("scales", c, extent);
                }
    }
}

// Values of a row that are not finite affect every query that sees the row, and no other, for every division of the rows.
inline void not_finite(List & list) {
    for (const Pair & p : turbo_pairs()) {
        if (p.head_k != 128 && p.k != p.v) continue;
        const bool first = p.k == TQ_TURBO4 || p.k == TQ_TURBO4_TCQ;
        const Extent extent = p.head_k == 128 && first ? Extent::brief : Extent::whole;
        for (const int64_t rows : {256, 2100}) // one part of rows; several parts
            for (const Sinks sinks : {Sinks::none, Sinks::normal}) {
                AttentionCase base = with_types(p.k, p.v, p.head_k);
                base.rows = rows;
                base.sinks = sinks;
                const auto both = [&](AttentionCase c, int64_t row) {
                    c.bad_key = row;
                    list.add("not finite", c, extent);
                    c.bad_key = -1;
                    c.bad_value = row;
                    list.add("not finite", c, extent);
                };
                both(base, rows / 3);
                AttentionCase c = base;
                c.far = true; // the weight of the part with the row is zero in the merge
                both(c, 5);
                c = base;
                c.first = c.last = rows / 2; // no other row is seen
                both(c, rows / 2);
                c = base;
                c.tokens = 3;
                both(c, rows - 2); // the first token does not see it
            }
    }
    for (const Pair & p : mixed_pairs)
        for (const int64_t row : {0, 15, 63, 64, 130, 199})
            for (const bool alone : {false, true})
                for (const Sinks sinks : {Sinks::none, Sinks::normal}) {
                    AttentionCase c = with_types(p.k, p.v, p.head_k, p.head_v);
                    c.bytes = Bytes::any;
                    c.mask = Mask::first;
                    c.sinks = sinks;
                    c.heads = c.kv_heads = 1;
                    c.tokens = 2;
                    c.rows = 200;
                    c.bad_key = row;
                    c.alone = alone;
                    list.add("not finite", c, Extent::usual);
                }
    for (const Pair & p : mixed_pairs)
        for (const Bad bad : {Bad::nan, Bad::infinity})
            for (const int64_t row : {6, 20, 70}) {
                AttentionCase c = with_types(p.k, p.v, p.head_k, p.head_v);
                c.bytes = Bytes::any;
                c.mask = Mask::alternating;
                c.heads = c.kv_heads = 1;
                c.tokens = 7;
                c.rows = 100;
                c.bad_value = row;
                c.bad = bad;
                list.add("requests", c, Extent::usual);
            }
}

// The pairs of types for shapes and options.
inline std::vector<AttentionCase> bases() {
    return {with_types(TQ_TURBO4, TQ_TURBO4), with_types(TQ_TURBO3, TQ_TURBO3), with_types(TQ_ROW_Q8_0, TQ_TURBO3),
            with_types(TQ_TURBO4_TCQ, TQ_TURBO3_TCQ)};
}

inline void row_counts(List & list) {
    for (const AttentionCase & base : bases()) {
        for (const int64_t rows : {0, 1, 2, 31, 32, 33, 63, 64, 65, 255, 256, 511, 512, 513, 1024, 5000}) {
            AttentionCase c = base;
            c.rows = rows;
            const bool brief = rows == 1 || rows == 33 || rows == 1024;
            list.add("rows", c, brief ? Extent::brief : rows <= 65 ? Extent::usual : Extent::whole);
            if (rows == 0) {
                c.sinks = Sinks::normal;
                list.add("rows", c, Extent::usual);
            }
        }
        for (const int64_t rows : {256, 512, 2100})
            for (const int tokens : {1, 3})
                for (const Sinks sinks : {Sinks::none, Sinks::normal}) {
                    AttentionCase c = base;
                    c.rows = rows;
                    c.tokens = tokens;
                    c.sinks = sinks;
                    c.last = 40;
                    list.add("a cache in its beginning", c, Extent::brief);
                    c.first = 33;
                    list.add("a sliding window", c, Extent::brief);
                    c.last = 32;
                    list.add("nothing is seen", c, Extent::brief);
                }
        AttentionCase c = base;
        c.heads = 32;
        c.kv_heads = 8;
        c.rows = 20000;
        list.add("rows", c);
    }
    AttentionCase c = with_types(TQ_TURBO4, TQ_TURBO4);
    c.heads = c.kv_heads = 1;
    c.rows = 70;
    c.first = 1;
    c.last = 0;
    for (const Sinks sinks : {Sinks::none, Sinks::normal, Sinks::hidden}) {
        c.sinks = sinks;
        list.add("nothing is seen", c, Extent::usual);
    }
}

inline void shapes(List & list) {
    for (const AttentionCase & base : bases()) {
        for (const int tokens : {2, 3, 5, 8})
            for (const int kv_heads : {1, 2, 3, 4, 5, 8}) {
                AttentionCase c = base;
                c.tokens = tokens;
                c.kv_heads = kv_heads;
                c.heads = kv_heads * (kv_heads == 3 ? 3 : kv_heads == 5 ? 1 : 4);
                c.rows = 700;
                const bool brief = tokens == 3 && kv_heads == 2, usual = tokens == 3 && kv_heads == 8;
                list.add("groups", c, brief ? Extent::brief : usual ? Extent::usual : Extent::whole);
            }
        AttentionCase c = base;
        c.heads_adjacent = false;
        list.add("strides", c, Extent::usual);
        c.pad = 2;
        list.add("strides", c, Extent::usual);
        c.heads_adjacent = true;
        list.add("strides", c, Extent::usual);
        c = base;
        c.streams = c.kv_streams = 3;
        list.add("streams", c, Extent::usual);
        c.kv_streams = 1;
        list.add("streams", c, Extent::usual);
        c = base;
        c.mask = Mask::none;
        list.add("no mask", c, Extent::usual);
        c.rows = 113;
        list.add("no mask", c, Extent::usual);
        c.mask = Mask::causal;
        c.tokens = 2;
        list.add("a mask that starts at an odd half word", c, Extent::usual);
    }
}

// Requests that share a cache: each token sees rows of its own.
inline void requests(List & list) {
    struct Shape {
        int tokens, heads;
        Mask mask;
        Extent extent;
    };
    const Shape shapes[] = {{3, 32, Mask::runs, Extent::usual},    {9, 8, Mask::alternating, Extent::usual},
                            {3, 16, Mask::random, Extent::usual},  {4, 64, Mask::runs, Extent::whole},
                            {3, 128, Mask::causal, Extent::whole}, {33, 32, Mask::runs, Extent::whole}};
    const std::vector<AttentionCase> all = bases();
    for (const AttentionCase & base : all)
        for (const Shape & shape : shapes) {
            AttentionCase c = base;
            c.tokens = shape.tokens;
            c.heads = shape.heads;
            c.kv_heads = 8;
            c.rows = 2120;
            c.mask = shape.mask;
            list.add("requests of a cache", c, &base == &all[0] ? shape.extent : Extent::whole);
        }
    for (const Pair & p : {Pair{TQ_TURBO4, TQ_TURBO4, 64, 64}, Pair{TQ_TURBO3, TQ_TURBO2, 96, 96},
                           Pair{TQ_TURBO4_TCQ, TQ_TURBO4_TCQ, 96, 96}, Pair{TQ_TURBO4, TQ_TURBO4, 256, 256}})
        for (const Mask mask : {Mask::runs, Mask::random}) { // random masks have biases
            AttentionCase c = with_types(p.k, p.v, p.head_k);
            c.tokens = 3;
            c.heads = 16;
            c.kv_heads = p.head_k == 256 ? 4 : 8; // whose rows are multiples of 16 bytes together
            c.rows = 2120;
            c.mask = mask;
            list.add("requests of a cache", c, mask == Mask::runs ? Extent::usual : Extent::whole);
        }
    AttentionCase c = with_types(TQ_TURBO4, TQ_TURBO4);
    c.heads = c.kv_heads = 8;
    c.tokens = 3;
    c.rows = 2120;
    c.mask = Mask::prefixes;
    c.seen[0] = 2100;
    c.seen[1] = 0;
    c.seen[2] = 7;
    c.last = 2099;
    for (const Sinks sinks : {Sinks::none, Sinks::normal}) {
        c.sinks = sinks;
        list.add("requests of a cache", c, sinks == Sinks::normal ? Extent::usual : Extent::whole);
    }
    c.sinks = Sinks::none;
    c.last = INT64_MAX;
    c.tokens = 2;
    c.rows = 300000;
    c.mask = Mask::runs;
    list.add("requests of a cache", c);
    for (const Pair & p : {Pair{TQ_TURBO4, TQ_TURBO4, 128, 128}, Pair{TQ_TURBO3, TQ_ROW_Q8_0, 64, 64},
                           Pair{TQ_TURBO4, TQ_TURBO2, 256, 256}}) { // so many that a thread block has few of a stream
        AttentionCase c = with_types(p.k, p.v, p.head_k);
        c.heads = 2;
        c.kv_heads = 1;
        c.streams = c.kv_streams = 80;
        for (const int64_t rows : {200, 1300}) {
            c.rows = rows;
            list.add("requests with caches of their own", c, p.head_k == 128 ? Extent::usual : Extent::whole);
        }
    }
}

// Several caches of eight KV heads, so that a warp of a GPU has many tiles of a cache.
inline void many_tiles(List & list) {
    const Pair pairs[] = {{TQ_TURBO4, TQ_TURBO4, 128, 128}, {TQ_TURBO3, TQ_TURBO2, 64, 64},
                          {TQ_TURBO4_TCQ, TQ_TURBO3_TCQ, 128, 128}, {TQ_ROW_Q8_0, TQ_TURBO4, 128, 128}};
    for (const Pair & p : pairs) {
        AttentionCase c = with_types(p.k, p.v, p.head_k);
        c.heads = 16;
        c.kv_heads = 8;
        c.streams = c.kv_streams = 24;
        c.rows = 1500;
        const Extent extent = p.k == TQ_TURBO4 ? Extent::usual : Extent::whole;
        c.spread = 5; // later weights are far greater
        list.add("many tiles", c, extent);
        c.spread = 1;
        c.tokens = 2; // with masks of their own
        c.mask = Mask::prefixes;
        c.seen[0] = 1300;
        c.seen[1] = 40;
        list.add("many tiles", c, extent);
        c.tokens = 1;
        c.mask = Mask::random;
        c.bytes = Bytes::any;
        c.soft_cap = 3;
        c.max_bias = 8;
        c.sparse_v = 1e-4f;
        list.add("many tiles", c, extent);
    }
}

// Heads of three blocks, a number that is no power of two, of which GPUs compute two together.
inline void three_blocks(List & list) {
    const int types[][2] = {{TQ_TURBO4, TQ_TURBO4},     {TQ_TURBO3, TQ_TURBO2},     {TQ_ROW_Q8_0, TQ_TURBO4},
                            {TQ_TURBO2, TQ_ROW_F16},    {TQ_TURBO4_TCQ, TQ_TURBO4_TCQ}, {TQ_TURBO2_TCQ, TQ_TURBO3_TCQ}};
    for (const auto & [k, v] : types) {
        AttentionCase c = with_types(k, v, 96);
        c.bytes = Bytes::any;
        for (const int kv_heads : {2, 8}) {
            c.heads = 8;
            c.kv_heads = kv_heads;
            c.tokens = 3;
            c.rows = 700;
            list.add("three blocks", c, Extent::usual);
        }
        c.heads_adjacent = false;
        c.pad = 4;
        c.streams = c.kv_streams = 2;
        c.mask = Mask::random;
        c.sinks = Sinks::normal;
        c.max_bias = 8;
        c.soft_cap = 3;
        c.rows = 200;
        list.add("three blocks", c, Extent::usual);
        c = with_types(k, v, 96);
        c.heads = c.kv_heads = 4; // a group of one
        c.tokens = 8;
        c.mask = Mask::prefixes;
        c.seen[0] = 1;
        c.seen[1] = 1100;
        c.seen[2] = 2080;
        c.last = 2079;
        c.rows = 2133;
        list.add("three blocks", c, Extent::usual);
        c.last = INT64_MAX;
        c.mask = Mask::causal;
        for (const int64_t rows : {33, 256, 5000}) {
            c.rows = rows;
            list.add("three blocks", c, rows < 5000 ? Extent::usual : Extent::whole);
        }
        c.rows = 2100;
        c.tokens = 3;
        c.bad_value = c.rows - 2; // the first token does not see it
        list.add("three blocks", c, Extent::usual);
        c.bad_key = c.bad_value;
        c.bad_value = -1;
        list.add("three blocks", c, Extent::usual);
    }
}

inline void options(List & list) {
    for (const AttentionCase & base : bases()) {
        AttentionCase c = base;
        c.max_bias = 8;
        c.heads = 12; // not a power of two
        list.add("slopes", c, Extent::usual);
        c.heads = 3; // the heads share a mask
        c.kv_heads = 1;
        c.rows = 100;
        list.add("slopes", c, Extent::usual);
        c = base;
        c.soft_cap = 10;
        c.spread = 5;
        list.add("soft cap", c, Extent::usual);
        c = base;
        c.sinks = Sinks::normal;
        list.add("sinks", c, Extent::usual);
        c.sinks = Sinks::hidden;
        list.add("sinks", c, Extent::usual);
        c = base;
        c.spread = 8; // peaked scores
        c.rows = 4000;
        list.add("peaked", c);
        c.sparse_v = 1e-6f; // the weight of the omitted rows is less than rows * 1e-6
        list.add("sparse V", c);
    }
    for (const Pair & p : mixed_pairs)
        for (const Sinks sinks : {Sinks::none, Sinks::normal, Sinks::hidden}) {
            AttentionCase c = with_types(p.k, p.v, p.head_k, p.head_v);
            c.bytes = Bytes::any;
            c.mask = Mask::random;
            c.sinks = sinks;
            c.heads = 3;
            c.kv_heads = 1;
            c.tokens = 2; // the second token sees nothing
            c.rows = 200;
            c.max_bias = 8;
            c.soft_cap = 3;
            list.add("all options", c, Extent::usual);
        }
    for (const Pair & p : mixed_pairs) { // so far apart that e^(difference) overflows
        AttentionCase c = with_types(p.k, p.v, p.head_k, p.head_v);
        c.heads = 3;
        c.kv_heads = 1;
        c.rows = 200;
        c.spread = 1e4f;
        list.add("scores far apart", c, Extent::usual);
    }
}

// Up to 64 query columns: drafts of speculative decoding, and a few requests.
inline void few_tokens(List & list) {
    for (const AttentionCase & base : bases()) {
        if (base.type_k >= TQ_TYPE_COUNT) continue;
        AttentionCase c = base;
        c.tokens = 4;
        c.rows = 2133;
        c.mask = Mask::prefixes; // which hides no row of most tiles
        c.seen[0] = c.rows;
        c.seen[1] = 2000;
        c.seen[2] = 1500;
        c.spread = 20; // later tiles have much larger scores
        list.add("few tokens", c, Extent::usual);
        c.spread = 1;
        if (c.type_v == TQ_TURBO4 || c.type_v == TQ_TURBO3) {
            c.steep = true;
            list.add("few tokens", c, Extent::usual);
            c.steep = false;
        }
        c.bytes = Bytes::any;
        list.add("few tokens", c, Extent::usual);
        c.heads = 4;
        c.kv_heads = 1;
        c.tokens = 7;
        if (c.type_v == TQ_TURBO4 || c.type_v == TQ_TURBO3) { // more columns over more rows have kernels of their own
            AttentionCase more = c;
            more.rows = more.seen[0] = 8261;
            more.seen[1] = 4100;
            more.seen[2] = 8200;
            more.spread = 20;
            list.add("few tokens", more, Extent::whole);
            AttentionCase half = more; // steps that no token sees follow steps that one sees
            for (int64_t & seen : half.seen) seen /= 2;
            half.spread = 1;
            list.add("few tokens", half, Extent::whole);
            more.steep = true;
            more.mask = Mask::random;
            more.max_bias = 8;
            more.soft_cap = 20;
            list.add("few tokens", more, Extent::whole);
            AttentionCase busy = c; // a thread block of a large GPU has all rows of a head, which pass through its stages
            busy.heads = 16;
            busy.kv_heads = 4;
            busy.streams = busy.kv_streams = 33;
            busy.tokens = 4;
            busy.rows = busy.seen[0] = 1261;
            busy.seen[1] = 700;
            busy.seen[2] = 1200;
            busy.spread = 20;
            list.add("stages of a large GPU", busy, Extent::whole);
            busy.kv_streams = 1;
            busy.tokens = 7;
            busy.rows = busy.seen[0] = 8261;
            list.add("stages of a large GPU", busy, Extent::whole);
        }
        c.mask = Mask::random;
        list.add("few tokens", c, Extent::usual);
        c.soft_cap = 3;
        c.max_bias = 8;
        c.heads = 3;
        c.mask_heads = 3;
        c.streams = c.kv_streams = 33; // so a thread block has several tiles of a window
        c.tokens = 5;
        c.rows = 200;
        list.add("few tokens", c, Extent::usual);
        c = base;
        c.tokens = 3;
        c.mask = Mask::prefixes;
        c.seen[0] = 1;
        c.seen[1] = 1100;
        c.seen[2] = 2080;
        c.last = 2079; // hidden rows have no finite scale
        c.rows = 2112;
        list.add("few tokens", c, Extent::usual);
        c = base;
        c.tokens = 4;
        c.mask = Mask::none;
        c.rows = 17 * 32; // of the last 64 rows, 32 exist
        list.add("few tokens", c, Extent::usual);
        c.mask = Mask::causal;
        c.rows = 2133;
        c.bad_value = c.rows - 3; // only the last tokens see it
        list.add("few tokens", c, Extent::usual);
        c.bad_value = -1;
        c.rows = 300;
        c.heads_adjacent = false;
        c.pad = 2;
        list.add("few tokens", c, Extent::usual);
    }
}

// Many query columns: prefill, and batches of several requests.
inline void columns(List & list) {
    struct Shape {
        int tokens, heads, kv_heads;
        int64_t rows;
    };
    const Shape shapes[] = {{9, 4, 1, 300}, {17, 8, 2, 517}, {40, 8, 4, 1300}, {33, 2, 2, 64}, {70, 8, 2, 700},
                            {50, 14, 2, 200}, {300, 1, 1, 520}, {8, 8, 2, 2100}};
    for (const AttentionCase & base : bases())
        for (const Shape & shape : shapes)
            for (const Mask mask : {Mask::none, Mask::causal, Mask::runs}) {
                AttentionCase c = base;
                c.tokens = shape.tokens;
                c.heads = shape.heads;
                c.kv_heads = shape.kv_heads;
                c.rows = shape.rows;
                c.mask = mask;
                list.add("columns", c, mask == Mask::runs || c.rows <= 300 ? Extent::usual : Extent::whole);
            }
    std::vector<Pair> pairs = turbo_pairs();
    for (const int head : {64, 128, 256})
        for (const int k : {TQ_TURBO4_TCQ, TQ_TURBO3_TCQ, TQ_TURBO2_TCQ})
            pairs.push_back({k, TQ_TURBO3_TCQ, head, head});
    for (const Pair & p : pairs) {
        AttentionCase c = with_types(p.k, p.v, p.head_k);
        c.tokens = 9;
        c.heads = 8;
        c.kv_heads = 2;
        c.rows = 200;
        c.mask = Mask::causal;
        list.add("columns", c, p.head_k == 128 ? Extent::usual : Extent::whole);
    }
    const Pair wider[] = {{TQ_TURBO4, TQ_TURBO4, 64, 64}, {TQ_TURBO4, TQ_ROW_Q8_0, 128, 128},
                          {TQ_TURBO3, TQ_ROW_F16, 64, 64}, {TQ_TURBO3, TQ_TURBO2, 256, 256},
                          {TQ_ROW_Q8_0, TQ_TURBO4, 256, 256}};
    for (const Pair & p : wider) {
        AttentionCase c = with_types(p.k, p.v, p.head_k);
        c.tokens = 20;
        c.rows = 700;
        list.add("columns", c, Extent::usual);
    }
    for (const AttentionCase & base : bases()) { // two and four tiles of columns, whose thread blocks may share rows
        if (base.type_k >= TQ_TYPE_COUNT) continue;
        const Extent extent = base.type_k == TQ_TURBO4 ? Extent::usual : Extent::whole;
        AttentionCase c = base;
        c.heads = 4;
        c.kv_heads = 1;
        c.tokens = 60;
        c.rows = 1100;
        for (const Mask mask : {Mask::none, Mask::causal, Mask::runs}) {
            c.mask = mask;
            list.add("columns", c, mask == Mask::none ? Extent::whole : extent);
        }
        c.mask = Mask::prefixes;
        c.seen[0] = c.seen[1] = c.seen[2] = 1090;
        c.spread = 40; // later rows, of tiles that all queries see, have much larger scores
        list.add("columns", c, extent);
        c.spread = 1;
        c.tokens = 120;
        c.mask = Mask::prefixes;
        c.seen[0] = 1;
        c.seen[1] = 640;
        c.seen[2] = 1090;
        list.add("columns", c, extent);
    }
    for (const AttentionCase & base : bases()) { // so many streams that a GPU's thread block has many rows of a stream
        AttentionCase c = base;
        c.heads = 4;
        c.kv_heads = 1;
        c.streams = 33;
        c.tokens = 5;
        c.rows = 2900;
        c.mask = Mask::random;
        list.add("columns", c);
        c.tokens = 17;
        c.rows = 1500;
        c.mask = Mask::runs;
        list.add("columns", c);
    }
    for (const int head : {64, 128, 256})
        for (const int k : {int(TQ_TURBO4), int(TQ_ROW_Q8_0)})
            for (const int tokens : {12, 40}) {
                AttentionCase c = with_types(k, TQ_TURBO3, head);
                c.tokens = tokens;
                c.mask = Mask::random;
                c.mask_heads = 4;
                c.streams = c.kv_streams = 2;
                c.sinks = Sinks::normal;
                c.max_bias = 8;
                c.soft_cap = 3;
                c.rows = 200;
                list.add("columns", c, head == 128 ? Extent::usual : Extent::whole);
            }
    for (const AttentionCase & base : bases()) {
        AttentionCase c = base;
        c.tokens = 24;
        c.rows = 2100;
        c.mask = Mask::prefixes;
        c.seen[0] = 1;
        c.seen[1] = 640;
        c.seen[2] = 2050;
        c.last = 2049;
        list.add("columns", c, Extent::usual);
        c.last = INT64_MAX;
        c.rows = 300;
        c.mask = Mask::causal;
        c.streams = c.kv_streams = 3;
        list.add("columns", c, Extent::usual);
        c.kv_streams = 1;
        list.add("columns", c, Extent::usual);
        c.streams = 1;
        c.heads_adjacent = false;
        c.pad = 2;
        list.add("columns", c, Extent::usual);
        c.heads_adjacent = true;
        c.pad = 0;
        c.sinks = Sinks::normal;
        c.max_bias = 8;
        c.heads = 12;
        list.add("columns", c, Extent::usual);
        c.max_bias = 0;
        c.soft_cap = 10;
        list.add("columns", c, Extent::usual);
        c.soft_cap = 0;
        c.sparse_v = 1e-6f;
        list.add("columns", c, Extent::usual);
        c.spread = 100; // so that V is left out
        if (c.type_k < TQ_TYPE_COUNT) list.add("columns", c, Extent::usual);
        c.spread = 1;
        c.sparse_v = 0;
        c.first = c.last = 150; // no other row is seen
        list.add("columns", c, Extent::usual);
        c.first = 0;
        c.last = INT64_MAX;
        c.bytes = Bytes::odd;
        list.add("columns", c, Extent::usual);
        c.bytes = Bytes::encoded;
        c.bad_key = c.rows - 20; // only the last tokens see it
        list.add("columns", c, Extent::usual);
        c.bad_key = -1;
        c.bad_value = c.rows - 20;
        for (const Bad bad : {Bad::nan, Bad::infinity}) {
            c.bad = bad;
            list.add("columns", c, Extent::usual);
        }
    }
}

} // namespace attention_list

// Every name occurs once.
inline std::vector<AttentionCase> attention_cases() {
    using namespace attention_list;
    List list;
    types_and_heads(list);
    masks(list);
    prefixes(list);
    scales(list);
    not_finite(list);
    row_counts(list);
    shapes(list);
    requests(list);
    three_blocks(list);
    options(list);
    const size_t before = list.cases.size();
    columns(list);
    many_tiles(list);
    for (size_t i = before; i < list.cases.size(); ++i) list.cases[i].for_gpus = true;
    few_tokens(list);
    return list.cases;
}

#endif
