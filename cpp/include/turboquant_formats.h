/*
 * turboquant_formats.h: the list of formats, for C, C++ and CUDA. Enums, tables and traits are generated from its rows.
 *
 * A family encodes a rotated block in one way, and has one type for each block length. To add a family, describe it in
 * a file in cpp/src/families, include that file in cpp/src/format.h, and append a row here.
 */
#ifndef TURBOQUANT_FORMATS_H
#define TURBOQUANT_FORMATS_H

/* F(X, ID, name, family, bits, id)
 *   ID, name  of the type with the longest block; those of the other types have the block's length as suffix
 *   family    the C++ template in cpp/src/families, instantiated with the bits of an index
 *   id        of the first type in files (GGUF, saved states); those of the other types follow. Released ids never
 *             change. ggml_types/ggml/turbo-types.h uses 521 to 524 */
#define TURBOQUANT_FAMILIES(F, X)              \
    F(X, TURBO4, turbo4, LloydMax, 4, 512) \
    F(X, TURBO3, turbo3, LloydMax, 3, 515) \
    F(X, TURBO2, turbo2, LloydMax, 2, 518) \
    F(X, TURBO4_TCQ, turbo4_tcq, Trellis, 4, 525) \
    F(X, TURBO3_TCQ, turbo3_tcq, Trellis, 3, 528) \
    F(X, TURBO2_TCQ, turbo2_tcq, Trellis, 2, 531)

/* X(block): the block lengths, longest first. */
#define TURBOQUANT_BLOCKS(X) X(128) X(64) X(32)

/* X(ID, name, FIRST, family, bits, block, bytes, id): the types in the order of tq_type. FIRST is the ID of the
 * family's type with the longest block. bytes is the size of an encoded block, a binary16 scale and the indices. */
#define TURBOQUANT_TYPES(X) TURBOQUANT_FAMILIES(TURBOQUANT_FAMILY_TYPES, X)
#define TURBOQUANT_FAMILY_TYPES(X, ID, name, family, bits, id)                                    \
    X(ID, name, ID, family, bits, 128, TURBOQUANT_BLOCK_BYTES(bits, 128), id)                     \
    X(ID##_64, name##_64, ID, family, bits, 64, TURBOQUANT_BLOCK_BYTES(bits, 64), ((id) + 1))     \
    X(ID##_32, name##_32, ID, family, bits, 32, TURBOQUANT_BLOCK_BYTES(bits, 32), ((id) + 2))
#define TURBOQUANT_BLOCK_BYTES(bits, block) (2 + (block) * (bits) / 8)

/* X(ID, name, type, block, bytes): rows of ggml's own types that K or V may have in attention; type is TQ_ROW_ID. Rows
 * of floats have no blocks; their length must be a multiple of 32. Attention rounds rows of f32 to int8 in blocks of 32,
 * with a float32 scale. */
#define TURBOQUANT_ROW_TYPES(X) \
    X(F16,  f16,  64, 32, 64) \
    X(BF16, bf16, 65, 32, 64) \
    X(Q8_0, q8_0, 66, 32, 34) \
    X(Q4_0, q4_0, 67, 32, 18) \
    X(F32,  f32,  68, 32, 128)

#endif
