// Encoding, decoding and rotation of rows. A SIMD group has a block. The bytes and floats are those of scalar.cpp.
#include "trellis.h"

namespace turboquant {

TURBOQUANT_FUNCTION_CONSTANT(function_type, constant_type) // a tq_type: a family and a block

// The block of a SIMD group, and the addresses of its row. False if there is none.
struct Place {
    uint row, block; // i1, and the number of the block in the row
    long plain, encoded; // offsets of the row of values, and of the encoded row

    // Rows of values are on the side with the strides plain_nb.
    bool find(constant CodecArguments & a, device const uchar * index, constant int64_t * plain_nb,
              constant int64_t * encoded_nb, uint3 group, ushort simd) {
        const uint item = group.x * simdgroups + simd, blocks = uint(a.blocks);
        row = item / blocks;
        block = item % blocks;
        if (row >= uint(a.ne[0])) return false;
        long to = long(row);
        if (a.index_bytes != nothing_indexed) {
            device const uchar * p = index + long(row) * a.index_nb[0] + long(group.y) % a.index_ne[0] * a.index_nb[1] +
                                     long(group.z) % a.index_ne[1] * a.index_nb[2];
            to = a.index_bytes == 8 ? *reinterpret_cast<device const long *>(p)
                                    : long(*reinterpret_cast<device const int *>(p));
        }
        plain = long(row) * plain_nb[0] + long(group.y) * plain_nb[1] + long(group.z) * plain_nb[2];
        encoded = to * encoded_nb[0] + long(group.y) * encoded_nb[1] + long(group.z) * encoded_nb[2];
        return true;
    }
};

// ---- encode

// The values of a block in the units of the encoder, after steps 1 to 5 of FORMAT.md, "Encoder". Lane l has elements l,
// l + 32, ...
template <int N> struct Units {
    int z[N / 32];
    int energy, k;
    float rms;
    bool codable; // neither zero nor not finite; else nothing else is set
};

template <int N> inline void to_units(device const float * x, thread Units<N> & out, ushort lane) {
    enum { P = N / 32 };
    float y[P];
    uint largest = 0;
    FOR_UNROLLED (int j = 0; j < P; ++j) {
        y[j] = x[lane + 32 * j];
        largest = max(largest, as_type<uint>(y[j]) & 0x7fffffffu);
    }
    largest = simd_max(largest);
    out.codable = largest != 0 && largest < 0x7f800000u;
    if (!out.codable) return;
    out.k = clamp(int(largest >> 23) - 127, -126, 126);
    const float shrink = as_type<float>(uint(127 - out.k) << 23);
    FOR_UNROLLED (int j = 0; j < P; ++j) y[j] = flip_sign(y[j] * shrink, signs1[j], lane);
    hadamard<N>(y, lane);
    FOR_UNROLLED (int j = 0; j < P; ++j) y[j] = flip_sign(y[j], signs2[j], lane);

    // Sixteen running sums, as in the specification: lanes l and l + 16 hold the terms of sum l in turn.
    float sum = 0;
    FOR_UNROLLED (int j = 0; j < P; ++j) {
        const float own = y[j] * y[j], other = simd_shuffle_xor(own, ushort(16));
        sum = sum + (lane < 16 ? own : other);
        sum = sum + (lane < 16 ? other : own);
    }
    for (ushort h = 8; h > 0; h /= 2) sum = sum + simd_shuffle_xor(sum, h);
    out.rms = sqrt(sum * (1.0f / N));
    out.codable = as_type<uint>(out.rms) >= 0x00800000u; // a GPU may read subnormal values as zeros
    if (!out.codable) return;
    const float unit = float(rms_unit) / out.rms;
    out.energy = 0;
    FOR_UNROLLED (int j = 0; j < P; ++j) {
        out.z[j] = int(rint(y[j] * unit));
        out.energy += out.z[j] * out.z[j];
    }
    out.energy = simd_sum(out.energy);
}

// The stored scale before it is rounded to binary16; a = sum |z| c of the assignment.
template <int F, int N> inline float exact_scale(thread const Units<N> & units, int a) {
    const ulong ratio = double_divide(double_of_uint(ulong(uint(units.energy))), double_of_uint(ulong(uint(a))));
    const ulong d =
        double_multiply(double_multiply(ratio, double_of_float(units.rms)), scale_units[F][Block<N>::index]);
    return float_of_double(scale_by(d, units.k));
}

// Stores fields of Width bits: element i is field i / bytes of byte i % bytes. value[j] belongs to element lane + 32 j.
template <int Width, int N> inline void store_fields(thread const uint * value, device uchar * to, ushort lane) {
    enum { bytes = N * Width / 8 };
    uint byte = 0;
    FOR_UNROLLED (int j = 0; j < N / 32; ++j) byte |= value[j] << (32 * j / bytes * Width);
    byte <<= lane / bytes * Width;
    for (ushort h = bytes; h < 32; h *= 2) byte |= simd_shuffle_xor(byte, h);
    if (lane < bytes) to[lane] = uchar(byte);
}

// The scale of the centroids with the least squared error. Lanes s, s + 8, ... have step s.
template <int F, int N> inline float search_scale(thread const int * magnitude, ushort lane) {
    enum { half_levels = Family<F>::levels / 2 };
    uint a = 1, b = 1;
    for (int s = 0; s < search_steps; ++s) {
        int sum_a = 0, sum_b = 0;
        FOR_UNROLLED (int j = 0; j < N / 32; ++j) {
            const int r = min((magnitude[j] + coarse_unit / 2) / coarse_unit, 127);
            int m = 0;
            for (int t = 0; t < half_levels - 1; ++t) m += r > coarse_thresholds[F][s][t] ? 1 : 0;
            const int c = codebooks[F][half_levels + m];
            sum_a += r * c;
            sum_b += c * c;
        }
        sum_a = simd_sum(sum_a);
        sum_b = simd_sum(sum_b);
        a = lane % search_steps == s ? uint(sum_a) : a;
        b = lane % search_steps == s ? uint(sum_b) : b;
    }
    // a^2 / b is less than 2^21, so that of two positive doubles the one with the greater bits is greater.
    const ulong explained = double_divide(double_of_uint(ulong(a) * ulong(a)), double_of_uint(ulong(b)));
    uint high = uint(explained >> 32), low = uint(explained), step = lane % search_steps;
    for (ushort h = 1; h < search_steps; h *= 2) {
        const uint other_high = simd_shuffle_xor(high, h), other_low = simd_shuffle_xor(low, h);
        const uint other_step = simd_shuffle_xor(step, h);
        const bool equal = other_high == high && other_low == low;
        if (other_high > high || (other_high == high && other_low > low) || (equal && other_step < step)) {
            high = other_high; // the first of equal steps
            low = other_low;
            step = other_step;
        }
    }
    const ulong scaled = ulong(a) * ulong(coarse_unit);
    return simd_shuffle(float_of_double(double_divide(double_of_uint(scaled), double_of_uint(ulong(b)))), ushort(step));
}

// Encodes a block in the steps of FORMAT.md, "Encoder".
template <int F, int N> inline void encode_plain(device const float * x, device uchar * dst, ushort lane) {
    enum { P = N / 32, B = Family<F>::bits, M = Family<F>::levels / 2 };
    Units<N> units;
    to_units<N>(x, units, lane);
    uint index[P];
    uint d = 0;
    if (units.codable) {
        int magnitude[P], m[P];
        FOR_UNROLLED (int j = 0; j < P; ++j) {
            magnitude[j] = abs(units.z[j]);
            m[j] = 0;
        }
        const float scale = search_scale<F, N>(magnitude, lane);
        for (int t = 0; t < M - 1; ++t) {
            const int threshold = int(rint(midpoints[F][t] * scale));
            FOR_UNROLLED (int j = 0; j < P; ++j) m[j] += magnitude[j] > threshold ? 1 : 0;
        }
        int a = 0;
        FOR_UNROLLED (int j = 0; j < P; ++j) {
            a += magnitude[j] * codebooks[F][M + m[j]];
            index[j] = uint(units.z[j] < 0 ? M - 1 - m[j] : M + m[j]);
        }
        const float exact = exact_scale<F, N>(units, simd_sum(a));
        d = exact >= 65520.0f ? 0x7bffu : half_of_float(exact);
    }
    FOR_UNROLLED (int j = 0; j < P; ++j) index[j] = d == 0 ? 0u : index[j];
    if (lane == 0) *reinterpret_cast<device ushort *>(dst) = ushort(d);
    device uchar * q = dst + 2;
    if (B == 4) {
        if (N == 32) {
            const uint upper = simd_shuffle_xor(index[0], ushort(16));
            if (lane < 16) q[lane] = uchar(index[0] | upper << 4);
        } else {
            FOR_UNROLLED (int j = 0; j < P / 2; ++j) q[lane + 32 * j] = uchar(index[j] | index[j + P / 2] << 4);
        }
        return;
    }
    uint low[P];
    FOR_UNROLLED (int j = 0; j < P; ++j) low[j] = index[j] & 3u;
    store_fields<2, N>(low, q, lane);
    if (B == 3)
        FOR_UNROLLED (int j = 0; j < P; ++j) {
            const uint word = simd_or((index[j] >> 2) << lane);
            if (lane < 4) q[N / 4 + 4 * j + lane] = uchar(word >> (8 * lane));
        }
}

// In the steps of FORMAT.md, "Encoder of the trellis-coded types".
template <int F, int N> inline void encode_trellis(device const float * x, device uchar * dst, ushort lane) {
    enum { P = N / 32, B = Family<F>::bits, limit = (127 + grid_margin) << (B - 1), words_count = N / 32 + 1 };
    Units<N> units;
    to_units<N>(x, units, lane);
    uint low[P], high[P], words[words_count];
    FOR_UNROLLED (int j = 0; j < P; ++j) low[j] = high[j] = 0;
    FOR_UNROLLED (int w = 0; w < words_count; ++w) words[w] = 0;
    if (units.codable) {
        const int ratio = choose_ratio<F, N>(units.z);
        uint metrics[P], rests[P];
        FOR_UNROLLED (int j = 0; j < P; ++j) {
            const GridEntry entry =
                grid_entry<F>(clamp((units.z[j] * ratio + (1 << 14)) >> 15, -int(limit), int(limit)));
            metrics[j] = entry.metrics;
            rests[j] = entry.rests;
        }
        find_path<N>(metrics, words, lane);
        const uint at = lane % (N / 8) + 1; // two bytes of the block: the steps of the lane, and those before
        uint path = 0;
        FOR_UNROLLED (uint w = 0; w < words_count; ++w) {
            path |= w == at / 4 ? words[w] >> (8 * (at % 4)) : 0u;
            path |= w == at / 4 + 1 && at % 4 == 3 ? words[w] << 8 : 0u;
        }
        int a = 0;
        FOR_UNROLLED (int j = 0; j < P; ++j) {
            const uint subset = subset_at(path >> (2 + (lane + 32 * j) / (N / 8)));
            const uint rest = rests[j] >> (4 * subset) & 15u;
            a += units.z[j] * codebooks[F][4 * rest + subset];
            low[j] = B == 2 ? 0u : rest & 3u;
            high[j] = B == 2 ? rest : rest >> 2;
        }
        a = simd_sum(a);
        uint code = 0;
        if (a > 0) {
            const float d = exact_scale<F, N>(units, a);
            code = d >= 65520.0f ? uint(greatest_scale_code)
                                 : min((half_of_float(d) + 16u) >> (15 - scale_bits), uint(greatest_scale_code));
        }
        words[0] |= code;
        FOR_UNROLLED (int w = 0; w < words_count; ++w) words[w] = code == 0 ? 0u : words[w];
        FOR_UNROLLED (int j = 0; j < P; ++j) {
            low[j] = code == 0 ? 0u : low[j];
            high[j] = code == 0 ? 0u : high[j];
        }
    }
    FOR_UNROLLED (uint w = 0; w < words_count; ++w)
        if (uint(lane) / 2 == w && lane < (2 + N / 8) / 2)
            *reinterpret_cast<device ushort *>(dst + 2 * lane) = ushort(words[w] >> (16 * (lane & 1)));
    device uchar * q = dst + 2 + N / 8;
    if (B >= 3) store_fields<2, N>(low, q, lane);
    if (B != 3) store_fields<1, N>(high, q + (B == 4 ? N / 4 : 0), lane);
}

template <int F, int N> inline void encode_block(device const float * x, device uchar * dst, ushort lane) {
    if (Family<F>::trellis) encode_trellis<F, N>(x, dst, lane);
    else encode_plain<F, N>(x, dst, lane);
}

template <int N>
inline void encode_rows(constant CodecArguments & a, device const uchar * src, device uchar * dst,
                        device const uchar * index, uint3 group, ushort lane, ushort simd) {
    Place place;
    if (!place.find(a, index, a.src_nb, a.dst_nb, group, simd)) return;
    device const float * x = reinterpret_cast<device const float *>(src + place.plain) + place.block * N;
    device uchar * row = dst + place.encoded;
    switch (function_type / 3) {
#define TURBOQUANT_CASE(F) \
    case F: encode_block<F, N>(x, row + place.block * Format<F, N>::bytes, lane); break;
        TURBOQUANT_EACH_FAMILY(TURBOQUANT_CASE)
#undef TURBOQUANT_CASE
    }
}

// ---- decode

template <int F, int N>
inline void decode_block(device const uchar * block, device uchar * to, bool half_floats, ushort lane) {
    enum { P = N / 32 };
    float w[P];
    FOR_UNROLLED (int j = 0; j < P; ++j) // sums of levels are integers, and exact
        w[j] = flip_sign(float(codebooks[F][level_number<F, N>(block, lane + 32 * j)]), signs2[j], lane);
    hadamard<N>(w, lane);
    const float scale = load_scale<F>(block) * steps_over_sqrt[F][Block<N>::index];
    FOR_UNROLLED (int j = 0; j < P; ++j) {
        const float x = flip_sign(scale * w[j], signs1[j], lane);
        if (half_floats) reinterpret_cast<device ushort *>(to)[lane + 32 * j] = ushort(half_of_float(x));
        else reinterpret_cast<device float *>(to)[lane + 32 * j] = x;
    }
}

template <int N>
inline void decode_rows(constant CodecArguments & a, device const uchar * src, device uchar * dst,
                        device const uchar * index, uint3 group, ushort lane, ushort simd) {
    Place place;
    if (!place.find(a, index, a.dst_nb, a.src_nb, group, simd)) return;
    device uchar * to = dst + place.plain + place.block * N * (a.half_floats ? 2 : 4);
    device const uchar * row = src + place.encoded;
    switch (function_type / 3) {
#define TURBOQUANT_CASE(F) \
    case F: decode_block<F, N>(row + place.block * Format<F, N>::bytes, to, a.half_floats != 0, lane); break;
        TURBOQUANT_EACH_FAMILY(TURBOQUANT_CASE)
#undef TURBOQUANT_CASE
    }
}

} // namespace turboquant

// ---- kernels

template <int N>
kernel void turboquant_encode(constant turboquant::CodecArguments & a [[buffer(0)]],
                              device const uchar * src [[buffer(1)]], device uchar * dst [[buffer(2)]],
                              device const uchar * index [[buffer(3)]], uint3 group [[threadgroup_position_in_grid]],
                              ushort lane [[thread_index_in_simdgroup]],
                              ushort simd [[simdgroup_index_in_threadgroup]]) {
    turboquant::encode_rows<N>(a, src, dst, index, group, lane, simd);
}

template <int N>
kernel void turboquant_decode(constant turboquant::CodecArguments & a [[buffer(0)]],
                              device const uchar * src [[buffer(1)]], device uchar * dst [[buffer(2)]],
                              device const uchar * index [[buffer(3)]], uint3 group [[threadgroup_position_in_grid]],
                              ushort lane [[thread_index_in_simdgroup]],
                              ushort simd [[simdgroup_index_in_threadgroup]]) {
    turboquant::decode_rows<N>(a, src, dst, index, group, lane, simd);
}

TURBOQUANT_KERNEL(turboquant_encode_128, turboquant_encode<128>)
TURBOQUANT_KERNEL(turboquant_encode_64, turboquant_encode<64>)
TURBOQUANT_KERNEL(turboquant_encode_32, turboquant_encode<32>)
TURBOQUANT_KERNEL(turboquant_decode_128, turboquant_decode<128>)
TURBOQUANT_KERNEL(turboquant_decode_64, turboquant_decode<64>)
TURBOQUANT_KERNEL(turboquant_decode_32, turboquant_decode<32>)
