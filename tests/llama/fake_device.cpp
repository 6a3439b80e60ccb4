// fake_device: the CPU as a "GPU" that does not support one operation on the turbo types.
//
//   fake_device MODEL OP TYPE_K TYPE_V FLASH_ATTENTION OFFLOAD_KQV REGISTRY
//
// OP is an op's name (SET_ROWS, ...) or "none"; FLASH_ATTENTION -1, 0 or 1; REGISTRY is the name of the backend, or
// NONE if the device has none.
// Loads MODEL onto the device, makes a context, decodes eight tokens and then three more, one at a time. Prints
// "refused" (status 2), or "decoded" and a hash of the logits. An asynchronous copy is made when the device is
// synchronized; if a graph comes first, the status is 4.

#include "ggml-backend-impl.h"
#include "ggml-cpu.h"
#include "llama.h"

#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <string>
#include <vector>

static std::string         lacking;
static std::string         registry_name;
static ggml_backend_dev_t  cpu;
static ggml_backend_device device;

struct Copy {
    ggml_tensor * to;
    const void *  from;
    size_t        offset, bytes;
};
static std::vector<Copy> copies; // that were not made yet

static bool is_turbo(const ggml_tensor * tensor) {
    return tensor && strncmp(ggml_type_name(tensor->type), "turbo", 5) == 0;
}

static bool supports_op(ggml_backend_dev_t, const ggml_tensor * op) {
    bool turbo = is_turbo(op);
    for (const ggml_tensor * source : op->src) {
        turbo = turbo || is_turbo(source);
    }
    return !(turbo && lacking == ggml_op_name(op->op)) && ggml_backend_dev_supports_op(cpu, op);
}

// The CPU's memory, but not host memory, so that the scheduler has to copy to and from it.
static ggml_backend_buffer_type_t buffer_type(ggml_backend_dev_t) {
    static ggml_backend_buffer_type type = [] {
        ggml_backend_buffer_type copy = *ggml_backend_cpu_buffer_type();
        copy.iface.get_name = [](ggml_backend_buffer_type_t) { return "FAKE"; };
        copy.iface.is_host  = nullptr;
        copy.device         = &device;
        return copy;
    }();
    return &type;
}

static ggml_backend_t init_backend(ggml_backend_dev_t dev, const char *) {
    static ggml_guid guid = { 0x74, 0x75, 0x72, 0x62, 0x6f };
    ggml_backend_i   iface{};
    iface.get_name = [](ggml_backend_t) { return "FAKE0"; };
    iface.free     = [](ggml_backend_t backend) {
        ggml_backend_free((ggml_backend_t) backend->context);
        delete backend;
    };
    iface.set_tensor_async = [](ggml_backend_t, ggml_tensor * to, const void * from, size_t offset, size_t bytes) {
        copies.push_back({ to, from, offset, bytes });
    };
    iface.synchronize = [](ggml_backend_t) {
        for (const Copy & copy : copies) {
            ggml_backend_tensor_set(copy.to, copy.from, copy.offset, copy.bytes);
        }
        copies.clear();
    };
    iface.graph_compute = [](ggml_backend_t backend, ggml_cgraph * graph) {
        if (!copies.empty()) {
            fputs("nobody waited for the copy of an input, whose memory may change\n", stderr);
            exit(4);
        }
        return ggml_backend_graph_compute((ggml_backend_t) backend->context, graph);
    };
    return new ggml_backend{ &guid, iface, dev, ggml_backend_cpu_init() };
}

static void get_props(ggml_backend_dev_t dev, ggml_backend_dev_props * props) {
    *props              = {};
    props->name         = dev->iface.get_name(dev);
    props->description  = dev->iface.get_description(dev);
    props->type         = dev->iface.get_type(dev);
    props->memory_free  = props->memory_total = (size_t) 8 << 30;
}

static ggml_type type_of(const char * name) {
    for (int i = 0; i < GGML_TYPE_COUNT; ++i) {
        const char * known = ggml_type_name((ggml_type) i);
        if (known && strcmp(known, name) == 0) {
            return (ggml_type) i;
        }
    }
    fprintf(stderr, "no type %s\n", name);
    exit(3);
}

int main(int argc, char ** argv) {
    if (argc != 8) {
        fprintf(stderr, "see the head of this file for the arguments\n");
        return 3;
    }
    lacking       = argv[2];
    registry_name = argv[7];
    llama_backend_init();
    cpu = ggml_backend_dev_by_type(GGML_BACKEND_DEVICE_TYPE_CPU);

    static ggml_backend_reg registry{};
    registry.api_version            = GGML_BACKEND_API_VERSION;
    registry.iface.get_name         = [](ggml_backend_reg_t) { return registry_name.c_str(); };
    registry.iface.get_device_count = [](ggml_backend_reg_t) { return (size_t) 1; };
    registry.iface.get_device       = [](ggml_backend_reg_t, size_t) { return &device; };
    device.iface                    = {};
    device.iface.get_name           = [](ggml_backend_dev_t) { return "FAKE0"; };
    device.iface.get_description    = [](ggml_backend_dev_t) { return "the CPU in disguise"; };
    device.iface.get_memory         = [](ggml_backend_dev_t, size_t * unused, size_t * total) {
        *unused = *total = (size_t) 8 << 30;
    };
    device.iface.get_type           = [](ggml_backend_dev_t) { return GGML_BACKEND_DEVICE_TYPE_GPU; };
    device.iface.get_props          = get_props;
    device.iface.init_backend       = init_backend;
    device.iface.get_buffer_type    = buffer_type;
    device.iface.supports_op        = supports_op;
    device.iface.supports_buft      = [](ggml_backend_dev_t dev, ggml_backend_buffer_type_t type) {
        return type == buffer_type(dev);
    };
    device.reg = &registry;
    ggml_backend_register(&registry);

    llama_model_params model_params = llama_model_default_params();
    model_params.n_gpu_layers       = 99;
    llama_model * model             = llama_model_load_from_file(argv[1], model_params);
    if (!model) {
        return 3;
    }
    llama_context_params params = llama_context_default_params();
    params.n_ctx                = 256;
    params.type_k               = type_of(argv[3]);
    params.type_v               = type_of(argv[4]);
    params.flash_attn_type      = (llama_flash_attn_type) atoi(argv[5]);
    params.offload_kqv          = atoi(argv[6]) != 0;
    llama_context * context     = llama_init_from_model(model, params);
    if (!context) {
        puts("refused");
        return 2;
    }
    if (registry_name == "NONE") {
        device.reg = nullptr; // as ggml's device for the tensors that several GPUs share
    }
    llama_token tokens[8] = { 1, 2, 3, 4, 5, 6, 7, 8 };
    if (llama_decode(context, llama_batch_get_one(tokens, 8)) != 0) {
        return 3;
    }
    const int n      = llama_vocab_n_tokens(llama_model_get_vocab(model));
    uint64_t  digest = 0;
    for (llama_token token = 9; token < 12; ++token) {
        if (llama_decode(context, llama_batch_get_one(&token, 1)) != 0) {
            return 3;
        }
        for (int i = 0; i < n; ++i) {
            uint32_t bits = 0;
            memcpy(&bits, llama_get_logits_ith(context, -1) + i, sizeof(bits));
            digest = digest * 0x9e3779b97f4a7c15 + bits;
        }
    }
    printf("decoded %016llx\n", (unsigned long long) digest);
    llama_free(context);
    llama_model_free(model);
    return 0;
}
