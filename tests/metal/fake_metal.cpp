// A Metal device without Metal: the functions of ggml-metal's Objective-C files in C++. The real C++ files of
// ggml-metal and the hooks in them describe the dispatches, which the emulator executes when they are encoded. Only ops
// on the turbo types take this way. The CPU computes all other ops, in the memory of the device.
#include "fake_metal.h"

#include "emulator.h"

#include "ggml-backend-impl.h"
#include "ggml-cpu.h"
#include "ggml-impl.h"
#include "ggml-metal-common.h"
#include "ggml-metal-context.h"
#include "ggml-metal-device.h"
#include "ggml-metal-fusion.h"
#include "ggml-metal-ops.h"
#include "ggml/turbo-ops.h"
#include "metal/turbo-metal.h"
#include "turboquant_metal.h"

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <map>
#include <mutex>
#include <string>
#include <vector>

const char * const turboquant::metal::library_source = "the kernels, which are a part of this program";

std::map<std::string, int> fake_metal_dispatches;

// ---- pipelines -----------------------------------------------------------------------------------------------------

struct ggml_metal_cv {
    std::map<int, int> values;
};

ggml_metal_cv_t ggml_metal_cv_init(void) { return new ggml_metal_cv; }
void ggml_metal_cv_free(ggml_metal_cv_t cv) { delete cv; }
void ggml_metal_cv_set_int16(ggml_metal_cv_t cv, int16_t value, int32_t i) { cv->values[i] = value; }
void ggml_metal_cv_set_int32(ggml_metal_cv_t cv, int32_t value, int32_t i) { cv->values[i] = value; }
void ggml_metal_cv_set_bool(ggml_metal_cv_t cv, bool value, int32_t i) { cv->values[i] = value; }

struct ggml_metal_pipeline {
    std::string kernel;
    std::map<int, int> constants;
};

ggml_metal_pipeline_t ggml_metal_pipeline_init(void) { return new ggml_metal_pipeline; }
void ggml_metal_pipeline_free(ggml_metal_pipeline_t pipeline) { delete pipeline; }
int ggml_metal_pipeline_max_theads_per_threadgroup(ggml_metal_pipeline_with_params) { return 1024; }

struct ggml_metal_library {
    ggml_metal_device_t device;
    std::map<std::string, ggml_metal_pipeline> pipelines;
};

ggml_metal_library_t ggml_metal_library_init(ggml_metal_device_t dev) { return new ggml_metal_library{ dev, {} }; }

ggml_metal_library_t ggml_metal_library_init_from_source(ggml_metal_device_t dev, const char * source, bool) {
    GGML_ASSERT(turbo_metal_is_library(source));
    return new ggml_metal_library{ dev, {} };
}

void ggml_metal_library_free(ggml_metal_library_t lib) { delete lib; }
ggml_metal_device_t ggml_metal_library_get_device(ggml_metal_library_t lib) { return lib->device; }

static ggml_metal_pipeline_with_params with_params(ggml_metal_pipeline_t pipeline) {
    ggml_metal_pipeline_with_params result = {};
    result.pipeline = pipeline;
    return result;
}

ggml_metal_pipeline_with_params ggml_metal_library_get_pipeline(ggml_metal_library_t lib, const char * name) {
    const auto found = lib->pipelines.find(name);
    return with_params(found == lib->pipelines.end() ? nullptr : &found->second);
}

ggml_metal_pipeline_with_params ggml_metal_library_compile_pipeline(ggml_metal_library_t lib, const char * base,
                                                                    const char * name, ggml_metal_cv_t cv) {
    if (!emulator::has_kernel(base)) {
        return with_params(nullptr);
    }
    lib->pipelines[name] = { base, cv ? cv->values : std::map<int, int>() };
    return with_params(&lib->pipelines[name]);
}

// ---- encoders ------------------------------------------------------------------------------------------------------

struct ggml_metal_encoder {
    emulator::Dispatch dispatch;
};

ggml_metal_encoder_t ggml_metal_encoder_init(ggml_metal_cmd_buf_t, bool) { return new ggml_metal_encoder; }
void ggml_metal_encoder_free(ggml_metal_encoder_t encoder) { delete encoder; }
void ggml_metal_encoder_debug_group_push(ggml_metal_encoder_t, const char *) {}
void ggml_metal_encoder_debug_group_pop(ggml_metal_encoder_t) {}

void ggml_metal_encoder_set_pipeline(ggml_metal_encoder_t encoder, ggml_metal_pipeline_with_params pipeline) {
    encoder->dispatch           = {};
    encoder->dispatch.kernel    = pipeline.pipeline->kernel;
    encoder->dispatch.constants = pipeline.pipeline->constants;
}

void ggml_metal_encoder_set_bytes(ggml_metal_encoder_t encoder, void * data, size_t size, int i) {
    GGML_ASSERT(i == 0 && size <= 4096); // Metal's limit
    const uint8_t * bytes = (const uint8_t *) data;
    encoder->dispatch.arguments.assign(bytes, bytes + size);
}

void ggml_metal_encoder_set_buffer(ggml_metal_encoder_t encoder, ggml_metal_buffer_id buffer, int i) {
    GGML_ASSERT(i > 0 && buffer.metal);
    encoder->dispatch.buffers.resize(std::max(encoder->dispatch.buffers.size(), (size_t) i));
    encoder->dispatch.buffers[i - 1] = (uint8_t *) buffer.metal + buffer.offs;
}

void ggml_metal_encoder_set_threadgroup_memory_size(ggml_metal_encoder_t encoder, size_t size, int i) {
    GGML_ASSERT(i == 0);
    encoder->dispatch.threadgroup_bytes = size;
}

void ggml_metal_encoder_dispatch_threadgroups(ggml_metal_encoder_t encoder, int g0, int g1, int g2, int t0, int t1,
                                              int t2) {
    GGML_ASSERT(t1 == 1 && t2 == 1);
    encoder->dispatch.groups[0] = g0;
    encoder->dispatch.groups[1] = g1;
    encoder->dispatch.groups[2] = g2;
    encoder->dispatch.threads   = t0;
    emulator::run(encoder->dispatch);
    ++fake_metal_dispatches[encoder->dispatch.kernel];
}

void ggml_metal_encoder_memory_barrier(ggml_metal_encoder_t) { emulator::encoder_barrier(); }
void ggml_metal_encoder_end_encoding(ggml_metal_encoder_t) { emulator::encoder_barrier(); }

// ---- the device ----------------------------------------------------------------------------------------------------

struct ggml_metal_device {
    ggml_metal_device_props props;
    ggml_metal_library_t library;
    ggml_metal_fusion_info * fusion;
};

ggml_metal_device_t ggml_metal_device_init(int device, int) {
    ggml_metal_device_t dev = new ggml_metal_device{};
    dev->props.device = device;
    strcpy(dev->props.name, "MTL0");
    strcpy(dev->props.desc, "an emulated GPU");
    dev->props.max_buffer_size = dev->props.max_working_set_size = (size_t) 4 << 30;
    dev->props.max_theadgroup_memory_size = 32768;
    dev->props.has_simdgroup_reduction = dev->props.has_simdgroup_mm = true;
    dev->props.has_unified_memory = dev->props.use_shared_buffers = true;
    dev->props.op_offload_min_batch_size = 1 << 30;
    dev->library = ggml_metal_library_init(dev);
    dev->fusion  = ggml_metal_fusion_info_init(true, 0);
    return dev;
}

void ggml_metal_device_free(ggml_metal_device_t dev) {
    ggml_metal_library_free(dev->library);
    ggml_metal_fusion_info_free(dev->fusion);
    delete dev;
}

const char * ggml_metal_device_id_token(ggml_metal_device_id) { return "fake"; }
void * ggml_metal_device_get_obj(ggml_metal_device_t dev) { return dev; }
void * ggml_metal_device_get_queue(ggml_metal_device_t dev) { return dev; }
ggml_metal_library_t ggml_metal_device_get_library(ggml_metal_device_t dev) { return dev->library; }
void ggml_metal_device_rsets_add(ggml_metal_device_t, ggml_metal_rset_t) {}
void ggml_metal_device_rsets_rm(ggml_metal_device_t, ggml_metal_rset_t) {}
void ggml_metal_device_rsets_keep_alive(ggml_metal_device_t) {}
ggml_metal_event_t ggml_metal_device_event_init(ggml_metal_device_t) { return nullptr; }
void ggml_metal_device_event_free(ggml_metal_device_t, ggml_metal_event_t) {}
void ggml_metal_device_event_synchronize(ggml_metal_device_t, ggml_metal_event_t) {}
void ggml_metal_event_encode_signal(ggml_metal_event_t, ggml_metal_cmd_buf_t) {}
void ggml_metal_event_encode_wait(ggml_metal_event_t, ggml_metal_cmd_buf_t) {}
const ggml_metal_device_props * ggml_metal_device_get_props(ggml_metal_device_t dev) { return &dev->props; }
ggml_metal_fusion_info * ggml_metal_device_get_fusion_info(ggml_metal_device_t dev) { return dev->fusion; }

void ggml_metal_device_get_memory(ggml_metal_device_t dev, size_t * free, size_t * total) {
    *free = *total = dev->props.max_working_set_size;
}

static ggml_backend_dev_t cpu_device() {
    return ggml_backend_dev_by_type(GGML_BACKEND_DEVICE_TYPE_CPU);
}

// As the hook in the Objective-C file says; the other ops are those of the CPU.
bool ggml_metal_device_supports_op(ggml_metal_device_t dev, const ggml_tensor * op) {
    return turbo_metal_touches(op) ? turbo_metal_supports_op(dev, op) : ggml_backend_dev_supports_op(cpu_device(), op);
}

// ---- buffers -------------------------------------------------------------------------------------------------------

struct ggml_metal_buffer {
    void * data;
    size_t size;
    bool own, shared;
};

ggml_metal_buffer_t ggml_metal_buffer_init(ggml_metal_device_t, size_t size, bool shared) {
    void * data = aligned_alloc(64, (size + 127) / 64 * 64); // the emulator sees what is beyond `size`
    memset(data, 0xff, size);                              // NaN in every type
    emulator::add_memory(data, size);
    return new ggml_metal_buffer{ data, size, true, shared };
}

ggml_metal_buffer_t ggml_metal_buffer_map(ggml_metal_device_t, void * data, size_t size, size_t) {
    emulator::add_memory(data, size);
    return new ggml_metal_buffer{ data, size, false, true };
}

void ggml_metal_buffer_free(ggml_metal_buffer_t buffer) {
    emulator::remove_memory(buffer->data);
    if (buffer->own) {
        free(buffer->data);
    }
    delete buffer;
}

void * ggml_metal_buffer_get_base(ggml_metal_buffer_t buffer) { return buffer->data; }
bool ggml_metal_buffer_is_shared(ggml_metal_buffer_t buffer) { return buffer->shared; }

void ggml_metal_buffer_memset_tensor(ggml_metal_buffer_t, ggml_tensor * tensor, uint8_t value, size_t offset,
                                     size_t size) {
    memset((char *) tensor->data + offset, value, size);
}
void ggml_metal_buffer_set_tensor(ggml_metal_buffer_t, ggml_tensor * tensor, const void * data, size_t offset,
                                  size_t size) {
    memcpy((char *) tensor->data + offset, data, size);
}
void ggml_metal_buffer_get_tensor(ggml_metal_buffer_t, const ggml_tensor * tensor, void * data, size_t offset,
                                  size_t size) {
    memcpy(data, (const char *) tensor->data + offset, size);
}
bool ggml_metal_buffer_cpy_tensor(ggml_metal_buffer_t, const ggml_tensor * src, ggml_tensor * dst) {
    if (!ggml_backend_buffer_is_host(src->buffer)) {
        return false;
    }
    memcpy(dst->data, src->data, ggml_nbytes(src));
    return true;
}
void ggml_metal_buffer_clear(ggml_metal_buffer_t buffer, uint8_t value) { memset(buffer->data, value, buffer->size); }

ggml_metal_buffer_id ggml_metal_buffer_get_id(ggml_metal_buffer_t buffer, const ggml_tensor * tensor) {
    return { buffer->data, size_t((char *) tensor->data - (char *) buffer->data) };
}

ggml_metal_rsets_t ggml_metal_rsets_init(ggml_metal_device_t) { return nullptr; }
void ggml_metal_rsets_free(ggml_metal_rsets_t) {}

// ---- the backend's context -----------------------------------------------------------------------------------------

struct ggml_metal {
    ggml_metal_device_t device;
    ggml_backend_t cpu;
};

ggml_metal_t ggml_metal_init(ggml_metal_device_t dev) { return new ggml_metal{ dev, ggml_backend_cpu_init() }; }

void ggml_metal_free(ggml_metal_t ctx) {
    ggml_backend_free(ctx->cpu);
    delete ctx;
}

const char * ggml_metal_get_name(ggml_metal_t ctx) { return ctx->device->props.name; }
void ggml_metal_synchronize(ggml_metal_t) {}

void ggml_metal_set_tensor_async(ggml_metal_t, ggml_tensor * tensor, const void * data, size_t offset, size_t size) {
    memcpy((char *) tensor->data + offset, data, size);
}
void ggml_metal_get_tensor_async(ggml_metal_t, const ggml_tensor * tensor, void * data, size_t offset, size_t size) {
    memcpy(data, (const char *) tensor->data + offset, size);
}
bool ggml_metal_cpy_tensor_async(ggml_metal_t, ggml_metal_t, const ggml_tensor *, ggml_tensor *) { return false; }

// ---- what the ops must give, in double precision
// ---------------------------------------------------------------------

double fake_metal_error;
int fake_metal_wrong_rows;

static std::vector<float> values_of(ggml_type type, const char * row, int64_t n) {
    std::vector<float> values(n);
    if (type == GGML_TYPE_F32) {
        memcpy(values.data(), row, n * sizeof(float));
    } else {
        ggml_get_type_traits(type)->to_float(row, values.data(), n);
    }
    return values;
}

// The largest relative error of a row of attention's output.
static double attention_error(const ggml_tensor * op) {
    turbo_attention a;
    GGML_ASSERT(turbo_describe_attention(op, a));
    double worst = 0;
    for (int64_t stream = 0; stream < a.streams; ++stream) {
        for (int64_t token = 0; token < a.tokens; ++token) {
            for (int64_t head = 0; head < a.heads; ++head) {
                std::vector<double> scores, sum(a.head_v);
                std::vector<std::vector<float>> rows;
                const turbo_source * sources[] = { &a, &a.slots, &a.batch };
                for (const turbo_source * source : sources) {
                    const ggml_fp16_t * mask = source->n_kv ? source->mask_row(token, head, stream) : nullptr;
                    for (int64_t r = 0; r < source->n_kv; ++r) {
                        const float bias = mask ? ggml_fp16_to_fp32(mask[r]) : 0;
                        if (bias == -INFINITY) {
                            continue;
                        }
                        const int64_t kv_head = head / a.group, kv_stream = a.kv_stream(stream);
                        const auto k = values_of(source->type_k, source->k.at(r, kv_head, kv_stream), a.head_k);
                        double dot = 0;
                        for (int64_t i = 0; i < a.head_k; ++i) {
                            dot += (double) a.query(token, head, stream)[i] * k[i];
                        }
                        dot *= a.scale;
                        if (a.soft_cap != 0) {
                            dot = a.soft_cap * tanh(dot / a.soft_cap);
                        }
                        scores.push_back(dot + turbo_mask_slope(a, head) * bias);
                        rows.push_back(values_of(source->type_v, source->v.at(r, kv_head, kv_stream), a.head_v));
                    }
                }
                double top = a.sinks ? a.sinks[head] : -INFINITY, difference = 0, square = 0;
                for (const double score : scores) {
                    top = std::max(top, score);
                }
                double total = a.sinks ? exp(a.sinks[head] - top) : 0;
                for (size_t r = 0; r < rows.size(); ++r) {
                    const double weight = exp(scores[r] - top);
                    total += weight;
                    for (int64_t i = 0; i < a.head_v; ++i) {
                        sum[i] += weight * rows[r][i];
                    }
                }
                for (int64_t i = 0; i < a.head_v; ++i) {
                    const double want = total > 0 ? sum[i] / total : 0;
                    difference += pow(a.result(token, head, stream)[i] - want, 2);
                    square += want * want;
                }
                worst = std::max(worst, sqrt(difference / std::max(square, 1e-30)));
            }
        }
    }
    return worst;
}

// The rows that SET_ROWS has not stored as the CPU does.
static int wrong_rows(const ggml_tensor * op) {
    const ggml_tensor *src = op->src[0], *index = op->src[1];
    std::vector<char> want(ggml_row_size(op->type, src->ne[0]));
    int wrong = 0;
    for (int64_t i = 0; i < src->ne[1]; ++i) {
        const char *  at  = (const char *) index->data + i * index->nb[0];
        const int64_t row = index->type == GGML_TYPE_I64 ? *(const int64_t *) at : *(const int32_t *) at;
        ggml_get_type_traits(op->type)->from_float_ref((const float *) ((const char *) src->data + i * src->nb[1]),
                                                       want.data(), src->ne[0]);
        wrong += memcmp((const char *) op->data + row * op->nb[1], want.data(), want.size()) != 0;
    }
    return wrong;
}

static void check(const ggml_tensor * op) {
    const turbo_op kind = turbo_op_kind(op);
    if (kind == turbo_op::attention) {
        fake_metal_error = std::max(fake_metal_error, attention_error(op));
    } else if (kind == turbo_op::store) {
        fake_metal_wrong_rows += wrong_rows(op);
    }
}

// Encodes a run of nodes with turbo types as ggml-metal does, with concurrency, so that the emulator sees a missing
// barrier.
static void encode(ggml_metal_t ctx, ggml_cgraph * graph, int first, int last) {
    ggml_metal_op_t op =
        ggml_metal_op_init(ctx->device, nullptr, graph, ctx->device->fusion, first, last, true, false, 0);
    for (int i = 0; i < ggml_metal_op_n_nodes(op);) {
        i += ggml_metal_op_encode(op, i);
    }
    ggml_metal_op_free(op);
}

ggml_status ggml_metal_graph_compute(ggml_metal_t ctx, ggml_cgraph * graph) {
    for (int i = 0, last; i < graph->n_nodes; i = last) {
        last = i + 1;
        if (turbo_metal_touches(graph->nodes[i])) {
            while (last < graph->n_nodes && turbo_metal_touches(graph->nodes[last])) {
                ++last;
            }
            encode(ctx, graph, i, last);
            for (int j = i; j < last; ++j) {
                check(graph->nodes[j]);
            }
            continue;
        }
        ggml_cgraph one = ggml_graph_view(graph, i, last);
        const ggml_status status = ggml_backend_graph_compute(ctx->cpu, &one);
        if (status != GGML_STATUS_SUCCESS) {
            return status;
        }
    }
    return GGML_STATUS_SUCCESS;
}

void ggml_metal_graph_optimize(ggml_metal_t, ggml_cgraph * graph) { ggml_graph_optimize(graph); }
void ggml_metal_event_record(ggml_metal_t, ggml_metal_event_t) {}
void ggml_metal_event_wait(ggml_metal_t, ggml_metal_event_t) {}
ggml_metal_event_t ggml_metal_get_ev_cpy(ggml_metal_t) { return nullptr; }
void ggml_metal_set_n_cb(ggml_metal_t, int) {}
void ggml_metal_set_abort_callback(ggml_metal_t, ggml_abort_callback, void *) {}
bool ggml_metal_supports_family(ggml_metal_t, int) { return true; }
void ggml_metal_capture_next_compute(ggml_metal_t) {}
