// turbo-metal.cpp: the turbo types in ggml's Metal backend, with the kernels of cpp/metal. Part of ggml-metal.
//
// The kernels are a library of their own, which ggml's functions compile from the source in this program. So it does
// not matter whether ggml's own library is embedded. One kernel computes attention for prompts and for single tokens;
// it reads the blocks directly. The rows of an exact window are further sources of the same kernel.

#include "metal/turbo-metal.h"

#include "ggml/turbo-ops.h"
#include "ggml/turbo-options.h"

#include "ggml-backend-impl.h"
#include "ggml-impl.h"

#include "turboquant_metal.h"

#include <cstdio>
#include <map>
#include <mutex>
#include <string>

namespace {

namespace tq = turboquant::metal;

tq_type to_tq(ggml_type type) {
    return (tq_type) turbo_to_tq(type);
}

// ---- the library ---------------------------------------------------------------------------------------------------

// The kernels on a device, or null if they do not compile. They live as long as the process.
ggml_metal_library_t library_of(ggml_metal_device_t dev) {
    static std::mutex                                          mutex;
    static std::map<ggml_metal_device_t, ggml_metal_library_t> libraries;
    std::lock_guard<std::mutex>                                lock(mutex);
    const auto                                                 found = libraries.find(dev);
    if (found != libraries.end()) {
        return found->second;
    }
    return libraries[dev] = ggml_metal_library_init_from_source(dev, tq::library_source, true);
}

ggml_metal_pipeline_with_params pipeline_of(ggml_metal_library_t lib, const tq::Dispatch & dispatch) {
    std::string name = dispatch.kernel;
    for (const auto & constant : dispatch.constants) {
        name += "_" + std::to_string(constant.first) + "_" + std::to_string(constant.second);
    }
    ggml_metal_pipeline_with_params pipeline = ggml_metal_library_get_pipeline(lib, name.c_str());
    if (pipeline.pipeline) {
        return pipeline;
    }
    ggml_metal_cv_t constants = dispatch.constants.empty() ? nullptr : ggml_metal_cv_init();
    for (const auto & constant : dispatch.constants) {
        ggml_metal_cv_set_int32(constants, constant.second, constant.first);
    }
    pipeline = ggml_metal_library_compile_pipeline(lib, dispatch.kernel, name.c_str(), constants);
    if (constants) {
        ggml_metal_cv_free(constants);
    }
    return pipeline;
}

class Encoder : public tq::Encoder {
  public:
    Encoder(ggml_metal_library_t lib, ggml_metal_encoder_t enc) : lib(lib), enc(enc) {}

    void dispatch(const tq::Dispatch & dispatch) override {
        const ggml_metal_pipeline_with_params pipeline = pipeline_of(lib, dispatch);
        GGML_ASSERT(pipeline.pipeline);
        GGML_ASSERT(ggml_metal_pipeline_max_theads_per_threadgroup(pipeline) >= dispatch.threads);
        ggml_metal_encoder_set_pipeline(enc, pipeline);
        ggml_metal_encoder_set_bytes(enc, const_cast<void *>(dispatch.arguments), dispatch.argument_bytes, 0);
        int index = 1;
        for (const tq::Buffer & buffer : dispatch.buffers) {
            ggml_metal_encoder_set_buffer(enc, { buffer.object, buffer.offset }, index++);
        }
        if (dispatch.threadgroup_bytes) {
            ggml_metal_encoder_set_threadgroup_memory_size(enc, dispatch.threadgroup_bytes, 0);
        }
        ggml_metal_encoder_dispatch_threadgroups(enc, dispatch.groups[0], dispatch.groups[1], dispatch.groups[2],
                                                 dispatch.threads, 1, 1);
    }

    void barrier() override { ggml_metal_encoder_memory_barrier(enc); }

  private:
    ggml_metal_library_t lib;
    ggml_metal_encoder_t enc;
};

// ---- operands ------------------------------------------------------------------------------------------------------

// The place of a tensor in a buffer. Without memory there is no object, and the offset is that in the tensor's view.
tq::Buffer buffer_of(const ggml_tensor * t) {
    ggml_backend_buffer_t buffer = t->view_src ? t->view_src->buffer : t->buffer;
    if (!buffer) {
        return { nullptr, t->view_offs };
    }
    const ggml_metal_buffer_id id = ggml_metal_buffer_get_id((ggml_metal_buffer_t) buffer->context, t);
    return { id.metal, id.offs };
}

tq::Rows rows_of(const ggml_tensor * t) {
    return { buffer_of(t), { (int64_t) t->nb[1], (int64_t) t->nb[2], (int64_t) t->nb[3] } };
}

tq::Index index_of(const ggml_tensor * t) {
    return { buffer_of(t),
             t->type == GGML_TYPE_I64,
             { t->ne[0], t->ne[1], t->ne[2] },
             { (int64_t) t->nb[0], (int64_t) t->nb[1], (int64_t) t->nb[2] } };
}

const tq::Index no_index = { { nullptr, 0 }, false, { 1, 1, 1 }, { 0, 0, 0 } };

// ---- attention -----------------------------------------------------------------------------------------------------

void take_rows(const turbo_rows & from, int64_t & row, int64_t & head, int64_t & stream) {
    row    = from.row_bytes;
    head   = from.head_bytes;
    stream = from.stream_bytes;
}

// A source of rows, and the first column of the mask that is its own.
tq::Source source_of(const turbo_source & from, const ggml_tensor * k, const ggml_tensor * v, const ggml_tensor * mask,
                     int64_t first_column) {
    tq::Source to = {};
    to.type_k     = turbo_to_row(from.type_k);
    to.type_v     = turbo_to_row(from.type_v);
    to.n_kv       = from.n_kv;
    to.k          = buffer_of(k);
    to.v          = buffer_of(v);
    take_rows(from.k, to.k_row, to.k_head, to.k_stream);
    take_rows(from.v, to.v_row, to.v_head, to.v_stream);
    if (mask) {
        to.mask = buffer_of(mask);
        to.mask.offset += first_column * sizeof(ggml_fp16_t);
        take_rows(from.mask, to.mask_token, to.mask_head, to.mask_stream);
    }
    to.mask_heads   = (int) from.mask_heads;
    to.mask_streams = (int) from.mask_streams;
    return to;
}

// Describes the call for the kernels. False if they do not cover it.
bool describe(const ggml_tensor * op, tq::Attention & call) {
    turbo_attention a;
    if (!turbo_describe_attention(op, a) || a.head_k != a.head_v) {
        return false;
    }
    const int64_t most = 1 << 30;
    if (a.heads > most || a.tokens > most || a.streams > most) {
        return false;
    }
    call.sources.push_back(source_of(a, op->src[1], op->src[2], op->src[3], 0));
    if (a.windowed) {
        const ggml_tensor * mask = op->src[TURBO_SRC_EXACT_MASK];
        call.sources.push_back(
            source_of(a.slots, op->src[TURBO_SRC_SLOTS_K], op->src[TURBO_SRC_SLOTS_V], mask, 0));
        call.sources.push_back(
            source_of(a.batch, op->src[TURBO_SRC_BATCH_K], op->src[TURBO_SRC_BATCH_V], mask, a.slots.n_kv));
    }
    call.head       = (int) a.head_k;
    call.heads      = (int) a.heads;
    call.kv_heads   = (int) a.kv_heads;
    call.tokens     = (int) a.tokens;
    call.streams    = (int) a.streams;
    call.kv_streams = (int) a.kv_streams;
    call.q          = buffer_of(op->src[0]);
    take_rows(a.q, call.q_token, call.q_head, call.q_stream);
    call.sinks    = op->src[4] ? buffer_of(op->src[4]) : tq::Buffer{ nullptr, 0 };
    call.scale    = a.scale;
    call.max_bias = a.max_bias;
    call.soft_cap = a.soft_cap;
    call.sparse_v = turbo_sparse_v();
    call.dst      = buffer_of(op);
    return tq::covers(call);
}

// The offset of the partial results behind the output.
size_t workspace_offset(const ggml_tensor * op) {
    return (ggml_nbytes(op) + 15) / 16 * 16;
}

}  // namespace

bool turbo_metal_touches(const ggml_tensor * op) {
    return turbo_op_kind(op) != turbo_op::untouched;
}

bool turbo_metal_is_library(const char * source) {
    return source == tq::library_source;
}

bool turbo_metal_supports_op(ggml_metal_device_t dev, const ggml_tensor * op) {
    const turbo_op kind = turbo_op_kind(op);
    if (kind == turbo_op::view) {
        return true;
    }
    const ggml_metal_device_props * props = ggml_metal_device_get_props(dev);
    if (!props->has_simdgroup_mm || !props->has_simdgroup_reduction || props->max_theadgroup_memory_size < 32768 ||
        !library_of(dev)) {
        return false;
    }
    switch (kind) {
        case turbo_op::encode:
        case turbo_op::decode: return turbo_copies_rows(op->src[0], op);
        case turbo_op::store: return turbo_sets_rows(op);
        case turbo_op::load: return turbo_gets_rows(op);
        case turbo_op::attention: {
            tq::Attention call = {};
            return describe(op, call);
        }
        default: return false;
    }
}

bool turbo_metal_encode(ggml_metal_device_t dev, ggml_metal_encoder_t enc, const ggml_tensor * op) {
    const turbo_op kind = turbo_op_kind(op);
    if (kind == turbo_op::untouched) {
        return false;
    }
    Encoder             encoder(library_of(dev), enc);
    const ggml_tensor * src     = op->src[0];
    bool                encoded = false;
    switch (kind) {
        case turbo_op::encode:
            encoded = tq::encode_rows(to_tq(op->type), rows_of(src), rows_of(op), src->ne, no_index, encoder);
            break;
        case turbo_op::decode:
            encoded = tq::decode_rows(to_tq(src->type), rows_of(src), rows_of(op), src->ne, no_index,
                                      op->type == GGML_TYPE_F16, encoder);
            break;
        case turbo_op::store:
            encoded =
                tq::encode_rows(to_tq(op->type), rows_of(src), rows_of(op), src->ne, index_of(op->src[1]), encoder);
            break;
        case turbo_op::load:
            encoded = tq::decode_rows(to_tq(src->type), rows_of(src), rows_of(op), op->ne, index_of(op->src[1]), false,
                                      encoder);
            break;
        case turbo_op::attention: {
            tq::Attention call = {};
            if (describe(op, call)) {
                call.workspace = { call.dst.object, call.dst.offset + workspace_offset(op) };
                encoded        = tq::attention(call, encoder);
            }
            break;
        }
        default: break;
    }
    GGML_ASSERT(encoded && "an op that turbo_metal_supports_op refuses");
    return true;
}

size_t turbo_metal_alloc_size(const ggml_tensor * tensor) {
    tq::Attention call = {};
    if (turbo_op_kind(tensor) != turbo_op::attention || !describe(tensor, call)) {
        return ggml_nbytes(tensor);
    }
    return workspace_offset(tensor) + tq::workspace_bytes(call);
}
