// turbo-graph.h: the order of a graph's nodes, for launches that compute several of them, prepare the next one, or use
// what an earlier one has found out. It needs no GPU, so tests/llama/arrange.cpp tests it on every machine.
#pragma once

#include "cuda/turbo-cuda.h"

#include "ggml-impl.h"

#include <algorithm>
#include <cstring>

// The index of the next node after `at` that computes something, or n_nodes.
inline int turbo_next_node(const ggml_cgraph * graph, int at) {
    do {
        ++at;
    } while (at < graph->n_nodes && ggml_op_is_empty(graph->nodes[at]->op));
    return at;
}

// Whether the next attention after node `at` is over a turbo type, if only RoPE and stores are before it.
inline bool turbo_attention_follows(const ggml_cgraph * graph, int at) {
    for (; at < graph->n_nodes; at = turbo_next_node(graph, at)) {
        const ggml_tensor * op = graph->nodes[at];
        if (op->op == GGML_OP_FLASH_ATTN_EXT) {
            return turbo_op_kind(op) == turbo_op::attention;
        }
        if (op->op != GGML_OP_ROPE && op->op != GGML_OP_SET_ROWS) {
            break;
        }
    }
    return false;
}

// The product of quantized weights with the output of attention `op`, if node `at` is one and has at most `most_columns`
// columns, whose values are a multiple of `padding`; else nullptr.
inline const ggml_tensor * turbo_product_of(const ggml_cgraph * graph, const ggml_tensor * op, int at,
                                            int64_t most_columns, int64_t padding) {
    const ggml_tensor * product = at < graph->n_nodes ? graph->nodes[at] : nullptr;
    if (!product || product->op != GGML_OP_MUL_MAT || !(product->flags & GGML_TENSOR_FLAG_COMPUTE)) {
        return nullptr;
    }
    const ggml_tensor *weights = product->src[0], *values = product->src[1];
    const bool all = (values == op || values->view_src == op) && ggml_is_contiguous(values) &&
                     ggml_nelements(values) == ggml_nelements(op);
    const bool few = values->ne[1] <= most_columns && values->ne[2] == 1 && values->ne[3] == 1;
    return all && few && values->type == GGML_TYPE_F32 && values->ne[0] % padding == 0 &&
                   ggml_is_quantized(weights->type) && weights->ne[2] == 1 && weights->ne[3] == 1 ?
               product :
               nullptr;
}

// Notes of masks (turboquant_cuda.h) that attention ops have written, for later ops of the same evaluation of a graph.
// Each attention op over a turbo type must be passed to forget() before it is computed. So if the writer is a node that
// this evaluation computes before the op, it has written its notes in this evaluation: those of an earlier one were
// forgotten. A graph does not write to a mask between the ops that read it.
template <typename Key> struct turbo_notes {
    struct Entry {
        const ggml_tensor * writer = nullptr; // may not exist any more, if it is not a node of the graph
        int                 index  = 0;       // of the writer in its graph
        Key                 key    = {};
        void *              memory = nullptr;
        size_t              bytes  = 0;
    };
    Entry entries[4]; // as many different masks of a graph have notes; most models have one or two

    void forget(const ggml_tensor * op) {
        for (Entry & entry : entries) {
            entry.writer = entry.writer == op ? nullptr : entry.writer;
        }
    }

    // Whether node `at` of the graph may read the entry's notes, if its masks are the writer's.
    static bool is_current(const Entry & entry, const ggml_cgraph * graph, int at) {
        const ggml_tensor * op = entry.writer;
        return op && entry.index < at && graph->nodes[entry.index] == op && !ggml_is_empty(op) &&
               (op->flags & GGML_TENSOR_FLAG_COMPUTE) && turbo_op_kind(op) == turbo_op::attention;
    }

    // The notes of `key` that node `at` may read, or nullptr.
    const Entry * find(const ggml_cgraph * graph, int at, const Key & key) const {
        const ggml_tensor * op = graph->nodes[at];
        for (const Entry & entry : entries) {
            if (is_current(entry, graph, at) && entry.key == key && entry.writer->src[3] == op->src[3] &&
                entry.writer->src[TURBO_SRC_EXACT_MASK] == op->src[TURBO_SRC_EXACT_MASK]) {
                return &entry;
            }
        }
        return nullptr;
    }

    // The entry in which node `at` may write notes: the smallest one with enough memory that no later node may read,
    // else the largest one. nullptr if there is none.
    Entry * choose(const ggml_cgraph * graph, int at, size_t bytes) {
        Entry * best = nullptr;
        for (Entry & entry : entries) {
            if (is_current(entry, graph, at)) {
                continue;
            }
            const bool fits = entry.bytes >= bytes, best_fits = best && best->bytes >= bytes;
            if (!best || (fits != best_fits ? fits : fits == (entry.bytes < best->bytes))) {
                best = &entry;
            }
        }
        return best;
    }
};

// Whether two RoPE ops turn by the same angles.
inline bool turbo_same_angles(const ggml_tensor * a, const ggml_tensor * b) {
    return a->src[1] == b->src[1] && a->src[2] == b->src[2] && a->src[0]->ne[2] == b->src[0]->ne[2] &&
           memcmp(a->op_params, b->op_params, sizeof(a->op_params)) == 0;
}

// The index of the next RoPE op after `at` with the same angles, if node `at` can be moved to it; else -1. The nodes
// between must not depend on node `at`.
inline int turbo_next_rope(const ggml_cgraph * graph, int at) {
    const ggml_tensor * rope = graph->nodes[at];
    for (int i = at + 1; i < graph->n_nodes; ++i) {
        const ggml_tensor * node = graph->nodes[i];
        for (const ggml_tensor * src : node->src) {
            if (src == rope) {
                return -1;
            }
        }
        if (node->op == GGML_OP_ROPE) {
            return turbo_same_angles(rope, node) ? i : -1;
        }
        const bool writes_view = node->view_src && !ggml_op_is_empty(node->op);
        if (writes_view || (!ggml_op_is_empty(node->op) && node->op != GGML_OP_MUL_MAT && node->op != GGML_OP_ADD)) {
            return -1;
        }
    }
    return -1;
}

// Moves RoPE of queries to that of keys, and keeps its source until then, if attention over a turbo type reads them.
// Without `keep` nothing is moved.
inline void turbo_arrange_ropes(ggml_cgraph * graph, const turbo_keep & keep) {
    if (!keep) {
        return;
    }
    for (int at = 0; at < graph->n_nodes; ++at) {
        ggml_tensor * rope = graph->nodes[at];
        if (rope->op != GGML_OP_ROPE || rope->view_src) {
            continue;
        }
        const int other = turbo_next_rope(graph, at);
        if (other >= 0 && turbo_attention_follows(graph, other)) {
            std::copy(graph->nodes + at + 1, graph->nodes + other, graph->nodes + at);
            graph->nodes[other - 1] = rope;
            keep(rope->src[0], graph->nodes[other]);
            at = other;
        }
    }
}
