// The encoder of the trellis-coded types in plain code (FORMAT.md, "Trellis-coded types"). After the transform it
// computes in integers, so that every ISA gives the same bytes.
#ifndef TURBOQUANT_GENERIC_TRELLIS_H
#define TURBOQUANT_GENERIC_TRELLIS_H

namespace turboquant {
namespace {

constexpr int trellis_scales = 16; // candidates
constexpr double trellis_scale[trellis_scales] = { // of the levels, relative to the RMS
    0.73, 0.78, 0.83, 0.89, 0.95, 1.01, 1.08, 1.15, 1.23, 1.31, 1.40, 1.50, 1.75, 2.20, 3.00, 4.20};
constexpr int most_distance = 255; // from a level. A metric is its square over 2^metric_shift; 128 of them fit int16
constexpr int metric_shift = 8;
constexpr int grid_margin = 8; // levels beyond the outermost one to which values are limited

constexpr int32_t round_positive(double x) { return int32_t(x + 0.5); }

// The grid on which values are compared with levels: Bits - 1 fractional bits of a level.
template <int Bits> struct Grid {
    static constexpr int fraction = Bits - 1, unit = 1 << fraction;
    static constexpr int limit = (127 + grid_margin) * unit;
    static constexpr int in_subset = Trellis<Bits>::levels / 4;
    static constexpr int level(int subset, int number) { return Trellis<Bits>::centroids[4 * number + subset] * unit; }
    // of the levels `number` and number + 1 of a subset; an integer
    static constexpr int midpoint(int subset, int number) {
        return (level(subset, number) + level(subset, number + 1)) / 2;
    }
};

// For each candidate scale, in units of z: the outermost level, and the granular error of a block; and the factor from
// z to the grid, times 2^15.
template <int Bits, int N> struct ScaleTable {
    int32_t outermost[trellis_scales], granular[trellis_scales], ratio[trellis_scales];
    constexpr ScaleTable() : outermost(), granular(), ratio() {
        for (int s = 0; s < trellis_scales; ++s) {
            const double f = trellis_scale[s], unit = double(Trellis<Bits>::step) * f * rms_unit; // of the levels
            outermost[s] = round_positive(127 * unit);
            granular[s] = round_positive(Trellis<Bits>::granular * f * f * rms_unit * rms_unit * N);
            ratio[s] = round_positive(double(32768 << Grid<Bits>::fraction) / unit);
        }
    }
};
template <int Bits, int N> struct ScaleTables { static constexpr ScaleTable<Bits, N> table{}; };

// The candidate that is expected to leave the least error, the first of equals: the granular error grows with the
// square of the scale, and values beyond the outermost level are cut off.
template <int Bits, int N> int choose_scale(const int16_t * z) {
    constexpr const ScaleTable<Bits, N> & table = ScaleTables<Bits, N>::table;
    int best = 0;
    int32_t least = INT32_MAX;
    for (int s = 0; s < trellis_scales; ++s) {
        int32_t error = table.granular[s]; // |z| <= 2048 sqrt(N), so that all sums fit
        for (int i = 0; i < N; ++i) {
            const int over = (z[i] < 0 ? -z[i] : z[i]) - table.outermost[s];
            if (over > 0) error += over * over;
        }
        if (error < least) {
            least = error;
            best = s;
        }
    }
    return best;
}

template <int Bits> int to_grid(int z, int ratio) {
    const int g = (z * ratio + (1 << 14)) >> 15;
    return g > Grid<Bits>::limit ? Grid<Bits>::limit : g < -Grid<Bits>::limit ? -Grid<Bits>::limit : g;
}

// The metric of each subset for a value on the grid: the squared distance from its nearest level.
template <int Bits> constexpr void subset_metrics(int g, int16_t (&metric)[4]) {
    for (int c = 0; c < 4; ++c) {
        int least = most_distance;
        for (int r = 0; r < Grid<Bits>::in_subset; ++r) {
            const int x = g - Grid<Bits>::level(c, r), distance = x < 0 ? -x : x;
            least = distance < least ? distance : least;
        }
        metric[c] = int16_t(least * least >> metric_shift);
    }
}

// The Viterbi algorithm: the path with the least sum of metrics over all start states. A state has the last six path
// bits, the newest in bit 0. Of two equal branches the one from the state with a clear bit 5 wins, of equal ends the
// smallest state. Writes the path bits by step, and returns the start state.
template <int N> int best_path(const int16_t (*metric)[4], uint8_t * path) {
    constexpr int S = path_states;
    int16_t cost[S] = {};
    uint8_t from_upper[N][S];
    for (int t = 0; t < N; ++t) {
        int16_t next[S];
        for (int s = 0; s < S; ++s) {
            const int lower = s >> 1, upper = lower | S / 2, u = s & 1; // the states before
            const int a = cost[lower] + metric[t][subset_of(unsigned(lower << 1 | u))];
            const int b = cost[upper] + metric[t][subset_of(unsigned(upper << 1 | u))];
            from_upper[t][s] = b < a;
            next[s] = int16_t(b < a ? b : a);
        }
        std::memcpy(cost, next, sizeof(cost));
    }
    int s = 0;
    for (int i = 1; i < S; ++i) s = cost[i] < cost[s] ? i : s;
    for (int t = N - 1; t >= 0; --t) {
        path[t] = uint8_t(s & 1);
        s = s >> 1 | from_upper[t][s] << (path_memory - 1);
    }
    return s;
}

// The scale's ten bits, rounded to nearest, ties upwards; 64512, the greatest, for those that exceed it.
constexpr int greatest_scale_code = 0x3df;
inline int scale_code(double d, int64_t * saturated) {
    const int code = d >= 65520.0 ? greatest_scale_code + 1 : (float_to_half(float(d)) + 16) >> 5;
    if (code <= greatest_scale_code) return code;
    ++*saturated;
    return greatest_scale_code;
}

// The first two bytes of a block without the scale: the path bits before the first step.
inline uint16_t start_bits(int state) {
    int word = 0;
    for (int k = 0; k < path_memory; ++k) word |= (state >> k & 1) << (15 - k);
    return uint16_t(word);
}

// Adds the scale to an encoded block; a = sum z * level. As in block_scale.
template <typename F>
void store_trellis_scale(const EncodingBase & work, int32_t a, uint8_t * dst, tq_encode_report * report) {
    const double d = double(work.energy) / double(a) * double(work.rms) * F::scale_unit * double(power_of_two(work.k));
    const int code = a > 0 ? scale_code(d, &report->saturated) : 0; // a <= 0: all values are near zero on the grid
    if (code == 0)
        std::memset(dst, 0, F::bytes);
    else
        store16(dst, uint16_t(load16(dst) | code));
}

// Encodes a block of values z in units of RMS / 2048, as the encoder of all families has them after the transform.
template <typename F>
void encode_trellis(const int16_t * z, const EncodingBase & work, uint8_t * dst, tq_encode_report * report) {
    constexpr int N = F::block, B = F::bits;
    std::memset(dst, 0, F::bytes);
    if (!work.codable()) {
        report->nonfinite += work.largest != 0;
        return;
    }
    const int ratio = ScaleTables<B, N>::table.ratio[choose_scale<B, N>(z)];
    int16_t grid[N], metric[N][4]; // by step
    for (int t = 0; t < N; ++t) {
        grid[t] = int16_t(to_grid<B>(z[F::template element<N>(t)], ratio));
        subset_metrics<B>(grid[t], metric[t]);
    }
    uint8_t path[N], *q = dst + 2;
    const int start = best_path<N>(metric, path);
    unsigned window = unsigned(start);
    int32_t a = 0; // sum z * level
    for (int t = 0; t < N; ++t) {
        window = window << 1 | path[t];
        const int i = F::template element<N>(t), c = subset_of(window);
        int rest = 0; // the number of the nearest level of the subset
        for (int r = 0; r + 1 < Grid<B>::in_subset; ++r) rest += grid[t] > Grid<B>::midpoint(c, r);
        q[t / 8] |= uint8_t(path[t] << (t % 8));
        F::template set_rest<N>(q, i, rest);
        a += z[i] * F::centroids[4 * rest + c];
    }
    store16(dst, start_bits(start));
    store_trellis_scale<F>(work, a, dst, report);
}

} // namespace
} // namespace turboquant

#endif
