// The encoder of the trellis-coded types that all vector ISAs share: the steps of generic/trellis.h. codec.h must be
// included before. An ISA file also defines
//
//   min_words, max_words      of two registers
//   excess(x, t)              max(x - t, 0); both are at least 0
//   multiply_rounded(a, b)    (a * b + 2^14) >> 15
//   square_shifted<S>(x)      x * x >> S, as unsigned words
//   load_words(p)             2 * lanes bytes, extended with their signs to words
//   store_fours(m, out)       stores four registers of words so that the four words of a lane are neighbours; those of
//                             lane i are at out + fours_offset(i), which is a sum over the bits of i
//   load_four(p)              four words in each 64 bits of a register
//   word_index, look_up_word(four, index)
//                             the words 0 ... 3 of `four` that the numbers in another register select
//   flags, greater(a, b), store_flags
//                             comparison of words; stores those of the first and of the last half of the states as bits
//   state_at                  the costs of states are kept in `state_registers` registers, the first half of the states
//                             in the first half of these; the state at a position of the first half
//   interleave_states         arranges the costs of states 2 j and of states 2 j + 1, j < path_states / 2
//   least_lane(x)             the least of all words
#ifndef TURBOQUANT_GENERIC_TRELLIS_VECTOR_H
#define TURBOQUANT_GENERIC_TRELLIS_VECTOR_H

#include "trellis.h"

#include <type_traits>

namespace turboquant {
namespace {

constexpr int state_registers = path_states / (2 * lanes);

template <int Bits, int N> int choose_scale(const words * magnitude) {
    constexpr const ScaleTable<Bits, N> & table = ScaleTables<Bits, N>::table;
    int best = 0;
    int32_t least = INT32_MAX;
    for (int s = 0; s < trellis_scales; ++s) {
        const words outermost = all_words(table.outermost[s]);
        ints sum = zero_ints();
        for (int r = 0; r < N / (2 * lanes); ++r) {
            const words over = excess(magnitude[r], outermost);
            sum = multiply_add_words(sum, over, over);
        }
        const int32_t error = table.granular[s] + reduce_add(sum);
        best = error < least ? s : best;
        least = error < least ? error : least;
    }
    return best;
}

// The metrics of the four subsets. The levels are symmetric: subset c of g is subset 3 - c of -g.
template <int Bits> TURBOQUANT_INLINE void store_metrics(words g, int16_t * out) {
    const words magnitude = abs_words(g);
    words metric[4];
    for (int c = 0; c < 4; ++c) {
        words least = all_words(most_distance);
        for (int r = Grid<Bits>::in_subset / 2 - 1; r < Grid<Bits>::in_subset; ++r) // the last negative level
            least = min_words(least, abs_words(sub(magnitude, all_words(Grid<Bits>::level(c, r)))));
        metric[c] = square_shifted<metric_shift>(least);
    }
    for (int c = 0; c < 2; ++c) { // exchanged where g is negative
        const words change = select_negative(g, xor_words(metric[c], metric[3 - c]));
        metric[c] = xor_words(metric[c], change);
        metric[3 - c] = xor_words(metric[3 - c], change);
    }
    store_fours(metric, out);
}

// For the branches from the states j < path_states / 2 with a path bit of 0, in the order of state_at, the subset. Both
// the newest and the oldest bit change the subset by 2 alone, so the other branches of a state 2 j or 2 j + 1 have the
// same subset or this one.
static_assert((path_taps0 & 0101) == 0 && (path_taps1 & 0101) == 0101, "the newest and the oldest bit");
constexpr int opposite = 2;
struct BranchTable {
    alignas(64) int8_t same[path_states / 2], other[path_states / 2];
    constexpr BranchTable() : same(), other() {
        for (int i = 0; i < path_states / 2; ++i) {
            same[i] = int8_t(subset_of(unsigned(2 * state_at(i))));
            other[i] = int8_t(same[i] ^ opposite);
        }
    }
};
constexpr BranchTable branch_table{};

template <int N> struct StepTable { // where the metrics of a step are
    uint16_t offset[N];
    constexpr StepTable() : offset() {
        for (int t = 0; t < N; ++t) offset[t] = uint16_t(fours_offset(Trellis<4>::element<N>(t)));
    }
};
template <int N> constexpr StepTable<N> step_table{};

// Finds the least costs of all states step by step. Bit 32 u + j of decisions[t] is set if the best path to state
// 2 j + u comes from state 32 + j, and clear if it comes from state j. Returns the best state at the end.
template <int N> int find_costs(const int16_t * metric, uint64_t * decisions) {
    constexpr int half = state_registers / 2;
    bytes same[half], other[half];
    words cost[state_registers];
    for (int r = 0; r < half; ++r) {
        same[r] = word_index(load_words(branch_table.same + 2 * lanes * r));
        other[r] = word_index(load_words(branch_table.other + 2 * lanes * r));
    }
    for (int r = 0; r < state_registers; ++r) cost[r] = all_words(0);
    for (int t = 0; t < N; ++t) {
        const words four = load_four(metric + step_table<N>.offset[t]);
        words even[half], odd[half];
        flags upper_even[half], upper_odd[half];
        for (int r = 0; r < half; ++r) {
            const words m = look_up_word(four, same[r]), n = look_up_word(four, other[r]);
            const words lower0 = add(cost[r], m), upper0 = add(cost[half + r], n);
            const words lower1 = add(cost[r], n), upper1 = add(cost[half + r], m);
            upper_even[r] = greater(lower0, upper0);
            upper_odd[r] = greater(lower1, upper1);
            even[r] = min_words(lower0, upper0);
            odd[r] = min_words(lower1, upper1);
        }
        store_flags(upper_even, upper_odd, decisions + t);
        interleave_states(even, odd, cost);
    }
    words least = cost[0];
    for (int r = 1; r < state_registers; ++r) least = min_words(least, cost[r]);
    least = all_words(least_lane(least));
    flags above[state_registers];
    for (int r = 0; r < state_registers; ++r) above[r] = greater(cost[r], least);
    uint64_t others;
    store_flags(above, above + half, &others);
    return __builtin_ctzll(~others);
}

// Follows the best paths of Together blocks back at once, so that latencies overlap. Writes for each step the number of
// its decision, whose bit 5 is the path bit, and replaces the states at the end by those at the start.
template <int N, int Together> void follow(const uint64_t (*decisions)[N], uint8_t (*visited)[N], int * state) {
    uint64_t at[Together]; // the path bit, then the five bits before, the latest lowest; garbage above
    for (int g = 0; g < Together; ++g) at[g] = uint64_t(state[g] >> 1 | state[g] << 5);
    for (int t = N - 1; t >= 0; --t)
        for (int g = 0; g < Together; ++g) {
            const uint64_t upper = decisions[g][t] >> (at[g] & 63);
            visited[g][t] = uint8_t(at[g]);
            at[g] = (at[g] >> 1 & 15) | (upper << 4 & 16) | at[g] << 5;
        }
    for (int g = 0; g < Together; ++g) state[g] = int((at[g] & 31) << 1 | (at[g] >> 5 & 1));
}

// As many bytes of a plane as fit into an integer.
template <int N> using PlanePart = std::conditional_t<N == 32, uint32_t, uint64_t>;
template <int N> constexpr PlanePart<N> low_bits = PlanePart<N>(each_byte); // of all bytes

// Stores a path that is in bit 5 of the bytes of `visited`.
template <int N> void store_path(const uint8_t * visited, uint8_t * q) {
    for (int t = 0; t < N; t += 8) {
        uint64_t eight;
        std::memcpy(&eight, visited + t, 8);
        q[t / 8] = uint8_t((eight >> 5 & each_byte) * 0x0102040810204080 >> 56); // bit 8 k moves to bit 56 + k
    }
}

// The subset of each element, from the path at q and the path bits before it.
template <int N> void find_subsets(const uint8_t * q, int8_t * subset) {
    using Part = PlanePart<N>;
    for (int j = 0; j < N / 8; j += int(sizeof(Part))) {
        Part path, c0 = 0, c1 = 0;
        std::memcpy(&path, q + j, sizeof(path));
        const unsigned before = load16(q + j - 2);
        for (int k = 0; k <= path_memory; ++k) {
            const Part earlier = Part(path << k | before >> (16 - k)); // by k steps
            if (path_taps0 >> k & 1) c0 ^= earlier;
            if (path_taps1 >> k & 1) c1 ^= earlier;
        }
        for (int b = 0; b < 8; ++b) {
            const Part x = (c0 >> b & low_bits<N>) | (c1 >> b & low_bits<N>) << 1;
            std::memcpy(subset + b * (N / 8) + j, &x, sizeof(x));
        }
    }
}

// Stores bit `From` of each byte of rest as a plane.
template <int From, int N> void store_plane(const uint8_t * rest, uint8_t * plane) {
    using Part = PlanePart<N>;
    for (int j = 0; j < N / 8; j += int(sizeof(Part))) {
        Part bits = 0;
        for (int b = 0; b < 8; ++b) {
            Part x;
            std::memcpy(&x, rest + b * (N / 8) + j, sizeof(x));
            bits |= Part((x >> From & low_bits<N>) << b);
        }
        std::memcpy(plane + j, &bits, sizeof(bits));
    }
}

template <int N> void store_crumbs(const uint8_t * rest, uint8_t * crumbs) {
    for (int j = 0; j < N / 4; j += 8) {
        uint64_t bits = 0;
        for (int b = 0; b < 4; ++b) {
            uint64_t x;
            std::memcpy(&x, rest + b * (N / 4) + j, 8);
            bits |= (x & 3 * each_byte) << (2 * b);
        }
        std::memcpy(crumbs + j, &bits, 8);
    }
}

template <int Bits> struct MidpointTable {
    alignas(8) int16_t row[Grid<Bits>::in_subset - 1][4]; // [number][subset]
    constexpr MidpointTable() : row() {
        for (int r = 0; r + 1 < Grid<Bits>::in_subset; ++r)
            for (int c = 0; c < 4; ++c) row[r][c] = int16_t(Grid<Bits>::midpoint(c, r));
    }
};
template <int Bits> constexpr MidpointTable<Bits> midpoint_table{};

// Stores the bits of the elements other than the path, which is at q.
template <int Bits, int N> void store_rest(const words * grid, uint8_t * q) {
    alignas(64) int8_t subset[N];
    alignas(64) uint8_t rest[N];
    find_subsets<N>(q, subset);
    words m[N / (2 * lanes)]; // the number of the nearest level of the subset
    for (int r = 0; r < N / (2 * lanes); ++r) {
        const bytes index = word_index(load_words(subset + 2 * lanes * r));
        m[r] = all_words(0);
        for (int t = 0; t + 1 < Grid<Bits>::in_subset; ++t)
            m[r] = add_greater(m[r], grid[r], look_up_word(load_four(midpoint_table<Bits>.row[t]), index));
    }
    for (int r = 0; r < N / (2 * lanes); r += word_registers) store_low_bytes(m + r, rest + 2 * lanes * r);
    if constexpr (Bits == 2) store_plane<0, N>(rest, q + N / 8);
    if constexpr (Bits >= 3) store_crumbs<N>(rest, q + N / 8);
    if constexpr (Bits == 4) store_plane<2, N>(rest, q + N / 8 + N / 4);
}

// The sum of z times the levels of a block.
template <typename F> int32_t multiply_levels(const words * z, const uint8_t * q) {
    constexpr int N = F::block;
    alignas(64) int8_t level[N];
    store_levels<N>(level, expand(F(), q));
    ints sum = zero_ints();
    for (int r = 0; r < N / (2 * lanes); ++r) sum = multiply_add_words(sum, z[r], load_words(level + 2 * lanes * r));
    return reduce_add(sum);
}

template <int Bits, int N>
void encode_blocks(Format<Trellis<Bits>, N>, const Encoding<N> * work, const int8_t *, int count, uint8_t * dst,
                   tq_encode_report * report) {
    using F = Format<Trellis<Bits>, N>;
    constexpr int registers = Encoding<N>::registers;
    const words limit = all_words(Grid<Bits>::limit), negative_limit = all_words(-Grid<Bits>::limit);
    alignas(64) int16_t metric[4 * N];
    alignas(64) uint64_t decisions[encode_group][N];
    uint8_t visited[encode_group][N];
    words grid[encode_group][registers];
    int block[encode_group], state[encode_group], codable = 0;
    for (int g = 0; g < count; ++g) {
        if (!work[g].codable()) {
            std::memset(dst + g * F::bytes, 0, F::bytes);
            report->nonfinite += work[g].largest != 0;
            continue;
        }
        const words ratio = all_words(ScaleTables<Bits, N>::table.ratio[choose_scale<Bits, N>(work[g].magnitude)]);
        for (int r = 0; r < registers; ++r) {
            const words x = max_words(min_words(multiply_rounded(work[g].z[r], ratio), limit), negative_limit);
            grid[codable][r] = x;
            store_metrics<Bits>(x, metric + 4 * 2 * lanes * r);
        }
        block[codable] = g;
        state[codable] = find_costs<N>(metric, decisions[codable]);
        ++codable;
    }
    if (codable == encode_group)
        follow<N, encode_group>(decisions, visited, state);
    else
        for (int i = 0; i < codable; ++i) follow<N, 1>(decisions + i, visited + i, state + i);
    for (int i = 0; i < codable; ++i) {
        const EncodingBase & base = work[block[i]];
        uint8_t * out = dst + block[i] * F::bytes;
        store16(out, start_bits(state[i]));
        store_path<N>(visited[i], out + 2);
        store_rest<Bits, N>(grid[i], out + 2);
        store_trellis_scale<F>(base, multiply_levels<F>(work[block[i]].z, out + 2), out, report);
    }
}

} // namespace
} // namespace turboquant

#endif
