// Tests turbo_op_kind and turbo_describe_attention with tensors without memory. Compiled against a patched llama.cpp.
#include "ggml/turbo-ops.h"

#include "ggml-cpp.h"

#include <cstdio>

static int wrong = 0;

static void expect(bool right, const char * what) {
    if (!right) {
        std::printf("%s\n", what);
        ++wrong;
    }
}

int main() {
    ggml_context_ptr holder{ ggml_init({ 128 * ggml_tensor_overhead(), nullptr, true }) };
    ggml_context *   ctx    = holder.get();
    const auto       tensor = [&](ggml_type type, int64_t a, int64_t b, int64_t c = 1, int64_t d = 1) {
        return ggml_new_tensor_4d(ctx, type, a, b, c, d);
    };
    const auto is = [&](const ggml_tensor * op, turbo_op kind, const char * what) {
        expect(turbo_op_kind(op) == kind, what);
    };
    const ggml_type turbo = GGML_TYPE_TURBO4, f32 = GGML_TYPE_F32, f16 = GGML_TYPE_F16;

    ggml_tensor * cache = tensor(turbo, 256, 64);
    ggml_tensor * rows  = tensor(f32, 256, 8);
    ggml_tensor * index = tensor(GGML_TYPE_I32, 8, 1);
    is(ggml_add(ctx, rows, rows), turbo_op::untouched, "add");
    is(cache, turbo_op::view, "a tensor");
    is(ggml_permute(ctx, cache, 0, 2, 1, 3), turbo_op::view, "permute");
    is(ggml_cpy(ctx, cache, tensor(turbo, 256, 64)), turbo_op::bytes, "copy of bytes");
    is(ggml_cpy(ctx, tensor(f32, 256, 64), cache), turbo_op::encode, "copy to turbo4");
    is(ggml_cpy(ctx, cache, tensor(f32, 256, 64)), turbo_op::decode, "copy from turbo4");
    is(ggml_cpy(ctx, rows, tensor(GGML_TYPE_TURBO_Q128, 256, 8)), turbo_op::other, "copy to prepared queries");
    is(ggml_set_rows(ctx, cache, rows, index), turbo_op::store, "set_rows");
    is(ggml_get_rows(ctx, cache, index), turbo_op::load, "get_rows");
    is(ggml_mul_mat(ctx, cache, rows), turbo_op::multiply, "mul_mat");
    is(ggml_mul_mat(ctx, tensor(f32, 256, 2), cache), turbo_op::other, "mul_mat with turbo4 on the other side");

    // 6 query heads on 3 KV heads, 5 tokens, 4 streams on 2 caches, one mask for two streams each
    ggml_tensor * q    = ggml_permute(ctx, tensor(f32, 128, 6, 5, 4), 0, 2, 1, 3);
    ggml_tensor * k    = ggml_permute(ctx, tensor(turbo, 128, 3, 64, 4), 0, 2, 1, 3);
    ggml_tensor * v    = ggml_permute(ctx, tensor(f16, 64, 3, 64, 4), 0, 2, 1, 3);
    ggml_tensor * mask = tensor(f16, 64, 5, 1, 2);
    ggml_tensor * op   = ggml_flash_attn_ext(ctx, q, k, v, mask, 0.5f, 8.0f, 30.0f);
    k->ne[3] = v->ne[3] = 2; // ggml's function requires as many caches as streams, but the glue does not
    is(op, turbo_op::attention, "attention");
    turbo_attention a;
    expect(turbo_describe_attention(op, a), "attention is described");
    expect(a.type_k == turbo && a.type_v == f16 && a.head_k == 128 && a.head_v == 64, "types and heads");
    expect(a.heads == 6 && a.kv_heads == 3 && a.group == 2 && a.tokens == 5 && a.n_kv == 64, "shape");
    expect(a.streams == 4 && a.kv_streams == 2 && a.kv_stream(1) == 0 && a.kv_stream(2) == 1, "streams");
    expect(a.scale == 0.5f && a.max_bias == 8.0f && a.soft_cap == 30.0f && !a.sinks, "numbers");
    const char * base = (const char *) 0x10000; // nothing is read
    a.k.data = a.mask.data = base;
    a.out                  = (float *) base;
    expect(a.k.at(7, 2, 1) == base + 7 * 3 * 66 + 2 * 66 + 64 * 3 * 66, "a row of K");
    expect((const char *) a.mask_row(3, 5, 3) == base + 3 * 128 + 5 * 128, "a row of the mask");
    expect((const char *) a.result(2, 4, 1) == base + 4 * ((1 * 5 + 2) * 6 + 4) * 64, "a row of the output");
    // of 6 heads, 4 have the slopes 2^-2, 2^-4, ...; those of the others are between them
    const float slopes[6] = { 0.25f, 0.0625f, 0.015625f, 0.00390625f, 0.5f, 0.125f };
    for (int head = 0; head < 6; ++head) {
        expect(turbo_mask_slope(a, head) == slopes[head], "ALiBi");
    }
    turbo_attention plain;
    k->ne[3] = v->ne[3] = 4;
    expect(turbo_describe_attention(ggml_flash_attn_ext(ctx, q, k, v, nullptr, 1.0f, 0.0f, 0.0f), plain) &&
               !plain.mask_row(3, 5, 3) && turbo_mask_slope(plain, 5) == 1.0f, "no mask, no ALiBi");

    ggml_tensor * half = ggml_permute(ctx, tensor(f16, 128, 3, 64, 4), 0, 2, 1, 3);
    expect(!turbo_describe_attention(ggml_flash_attn_ext(ctx, q, half, v, mask, 1.0f, 0.0f, 0.0f), a), "no turbo type");
    for (int source = 5; source < GGML_MAX_SRC; ++source) {
        op->src[source] = mask;
        expect(!turbo_describe_attention(op, a), "an operand that the description does not know");
        op->src[source] = nullptr;
    }
    op->src[3] = tensor(f32, 64, 5, 1, 2);
    expect(!turbo_describe_attention(op, a), "a mask of another type");
    return wrong != 0;
}
