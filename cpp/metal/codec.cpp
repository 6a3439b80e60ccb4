// The dispatches of codec.metal.
#include "turboquant_metal.h"

#include "arguments.h"

namespace turboquant {
namespace metal {
namespace {

void copy(int64_t (&to)[3], const int64_t (&from)[3]) {
    for (int i = 0; i < 3; ++i) to[i] = from[i];
}

const char * kernel_of(bool encodes, int block) {
    switch (block) {
#define TURBOQUANT_CASE(N) \
    case N: return encodes ? "turboquant_encode_" #N : "turboquant_decode_" #N;
        TURBOQUANT_BLOCKS(TURBOQUANT_CASE)
#undef TURBOQUANT_CASE
        default: return nullptr;
    }
}

bool dispatch_rows(tq_type type, const Rows & src, const Rows & dst, const int64_t ne[4], const Index & index,
                   bool encodes, bool half_floats, Encoder & encoder) {
    const tq_type_info * info = tq_type_get(type);
    if (!info || ne[0] % info->block) return false;
    CodecArguments a = {};
    a.blocks = ne[0] / info->block;
    const int64_t items = a.blocks * ne[1], most = int64_t(1) << 31;
    if (items >= most || ne[2] >= most || ne[3] >= most) return false;
    if (items == 0 || ne[2] == 0 || ne[3] == 0) return true;
    for (int i = 0; i < 3; ++i) a.ne[i] = ne[i + 1];
    copy(a.src_nb, src.nb);
    copy(a.dst_nb, dst.nb);
    const bool indexed = index.data.object;
    if (indexed) {
        copy(a.index_nb, index.nb);
        a.index_ne[0] = index.ne[1];
        a.index_ne[1] = index.ne[2];
        a.index_bytes = index.is64 ? 8 : 4;
    }
    a.half_floats = half_floats;
    encoder.dispatch({kernel_of(encodes, info->block),
                      {{constant_type, type}},
                      &a,
                      sizeof(a),
                      {src.data, dst.data, indexed ? index.data : src.data},
                      0,
                      {int((items + simdgroups - 1) / simdgroups), int(ne[2]), int(ne[3])},
                      32 * simdgroups});
    return true;
}

} // namespace

bool encode_rows(tq_type type, const Rows & src, const Rows & dst, const int64_t ne[4], const Index & index,
                 Encoder & encoder) {
    return dispatch_rows(type, src, dst, ne, index, true, false, encoder);
}

bool decode_rows(tq_type type, const Rows & src, const Rows & dst, const int64_t ne[4], const Index & index,
                 bool half_floats, Encoder & encoder) {
    return dispatch_rows(type, src, dst, ne, index, false, half_floats, encoder);
}

} // namespace metal
} // namespace turboquant
