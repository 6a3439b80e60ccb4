"""turboquant.attention compared with the reference attention over the decoded K and V."""
import math

import gguf
import ml_dtypes
import numpy as np
import pytest
import turboquant
from turboquant import reference


def inputs(type_k, type_v, *, heads=4, kv_heads=2, n_query=3, n_kv=37, head_k=128, head_v=128, seed=0):
    rng = np.random.default_rng(seed)
    q = rng.standard_normal((heads, n_query, head_k)).astype(np.float32)
    k = turboquant.quantize(rng.standard_normal((kv_heads, n_kv, head_k)).astype(np.float32), type_k)
    v = turboquant.quantize(rng.standard_normal((kv_heads, n_kv, head_v)).astype(np.float32), type_v)
    return q, k, v


def grid_queries(q, block):
    """The nearest queries that are int8 after rotation. Rounding does not change them, so results are nearly exact."""
    integers = np.clip(np.rint(reference.rotate(q, block) * 40), -126, 126).reshape(-1, block)
    integers[:, 0] = 127
    return reference.unrotate(integers / 64, block).reshape(q.shape).astype(np.float32)


def assert_close(actual, expected, relative):
    assert actual.dtype == np.float32 and actual.shape == expected.shape
    assert np.linalg.norm(actual - expected) <= relative * np.linalg.norm(expected)


def near(n_kv):
    """Bound of the relative error of the selected kernels if rounding does not change the query.

    Kernels with dot products of 8 bits round softmax weights to 16 bits, or to 8 bits if none is above 1/128 of their
    sum (cpp/src/generic/values.h).
    """
    selected = next(k.name for k in turboquant.kernels() if k.selected)
    if selected not in ("avx512vbmi", "avx512vnni", "avxvnni"):
        return 2e-5
    return 6e-5 if n_kv <= 128 else 0.01


PAIRS = [("turbo4", "turbo4"), ("turbo3", "turbo2"), ("turbo2", "turbo4_64"), ("turbo4_32", "turbo3"),
         ("turbo3_64", "turbo3_32"), ("turbo2_32", "turbo2_64"), ("turbo3_tcq", "turbo2_tcq_64"),
         ("turbo4_tcq_64", "turbo4_tcq_32"), ("turbo2_tcq_32", "turbo4")]


@pytest.mark.parametrize("type_k, type_v", PAIRS)
@pytest.mark.parametrize("heads, kv_heads", [(1, 1), (4, 4), (6, 2), (5, 1)])
def test_type_pairs_and_head_groups(kernels, type_k, type_v, heads, kv_heads):
    q, k, v = inputs(type_k, type_v, heads=heads, kv_heads=kv_heads)
    options = {"type_k": type_k, "type_v": type_v}
    assert_close(turboquant.attention(q, k, v, **options), reference.attention(q, k, v, **options), 0.02)
    q = grid_queries(q, next(t.block for t in turboquant.types() if t.name == type_k))
    assert_close(turboquant.attention(q, k, v, **options), reference.attention(q, k, v, **options), near(37))


@pytest.mark.parametrize("head_k, head_v", [(128, 256), (256, 128), (512, 512), (384, 128)])
@pytest.mark.parametrize("n_query, n_kv", [(1, 1), (1, 513), (2, 127), (7, 128), (129, 129)])
def test_sizes(kernels, head_k, head_v, n_query, n_kv):
    options = {"type_k": "turbo4", "type_v": "turbo3"}
    q, k, v = inputs("turbo4", "turbo3", n_query=n_query, n_kv=n_kv, head_k=head_k, head_v=head_v)
    q = grid_queries(q, 128)
    assert_close(turboquant.attention(q, k, v, **options), reference.attention(q, k, v, **options), near(n_kv))


def cache_rows(x, type):
    """Rows of x (..., head) encoded in a type of attention; the gguf package encodes ggml's types."""
    if type in ("f16", "f32"):
        return x.astype({"f16": np.float16, "f32": np.float32}[type])
    if type == "bf16":
        return x.astype(ml_dtypes.bfloat16)
    if type in ("q8_0", "q4_0"):
        return gguf.quantize(x, gguf.GGMLQuantizationType[type.upper()])
    return turboquant.quantize(x, type)


@pytest.mark.parametrize("type", ["f16", "bf16", "q8_0", "q4_0", "f32"])
def test_reference_decodes_ggml_types(type):
    rows = cache_rows(np.random.default_rng(0).standard_normal((3, 5, 96)).astype(np.float32), type)
    expected = (gguf.dequantize(rows, gguf.GGMLQuantizationType[type.upper()]) if rows.dtype == np.uint8
                else rows.astype(np.float32))
    np.testing.assert_allclose(reference.decode_rows(rows, type), expected, rtol=1e-6)


@pytest.mark.parametrize("type_k, type_v", [("q8_0", "turbo3"), ("q4_0", "turbo4_32"), ("f16", "turbo2"),
                                            ("bf16", "turbo4"), ("turbo4_32", "q8_0"), ("turbo3", "f16"),
                                            ("q8_0", "q8_0"), ("f16", "bf16"), ("q4_0", "q4_0"), ("f32", "f32"),
                                            ("turbo4", "f32"), ("f32", "turbo3")])
@pytest.mark.parametrize("head_k, head_v, n_query, n_kv", [(128, 128, 1, 300), (256, 128, 9, 65), (128, 256, 33, 100)])
def test_ggml_types(kernels, type_k, type_v, head_k, head_v, n_query, n_kv):
    """The bound is 0.01, because queries are rounded to int8 for K of 4 and 8 bits, as in llama.cpp, and f32 is too."""
    rng = np.random.default_rng(1)
    q = rng.standard_normal((6, n_query, head_k)).astype(np.float32)
    k, v = rng.standard_normal((2, n_kv, head_k)), rng.standard_normal((2, n_kv, head_v))
    k, v = cache_rows(k.astype(np.float32), type_k), cache_rows(v.astype(np.float32), type_v)
    options = {"type_k": type_k, "type_v": type_v}
    expected = reference.attention(q, k, v, **options)
    assert_close(turboquant.attention(q, k, v, **options), expected, 0.01 if type_k not in ("f16", "bf16") else max(1e-3, near(n_kv)))
    raw = turboquant.attention(q, k.view(np.uint8), v.view(np.uint8), **options)
    np.testing.assert_array_equal(raw, turboquant.attention(q, k, v, **options))


def test_small_heads_of_ggml_types(kernels):
    rng = np.random.default_rng(2)
    q, k, v = (rng.standard_normal((2, n, 96)).astype(np.float32) for n in (3, 70, 70))
    options = {"type_k": "q8_0", "type_v": "turbo4_32"}
    k, v = cache_rows(k, "q8_0"), cache_rows(v, "turbo4_32")
    assert_close(turboquant.attention(q, k, v, **options), reference.attention(q, k, v, **options), 0.01)


@pytest.mark.parametrize("type_v", ["turbo4", "turbo3", "q8_0", "f16"])
def test_sparse_v_leaves_out_what_does_not_count(kernels, type_v):
    """With scores of standard deviation 8 most weights are below 1e-6 of the largest."""
    rng = np.random.default_rng(3)
    q = (8 * rng.standard_normal((4, 1, 128))).astype(np.float32)
    k, v = (rng.standard_normal((4, 4096, 128)).astype(np.float32) for _ in range(2))
    k, v = cache_rows(k, "turbo4"), cache_rows(v, type_v)
    options = {"type_k": "turbo4", "type_v": type_v, "return_skip_rate": True}
    everything, none = turboquant.attention(q, k, v, **options)
    almost, some = turboquant.attention(q, k, v, sparse_v=1e-6, **options)
    coarse, most = turboquant.attention(q, k, v, sparse_v=0.5, **options)
    assert none < 0.01 and 0.3 < some < most < 1
    assert_close(almost, everything, 1e-4)
    assert np.linalg.norm(coarse - everything) > 1e-3 * np.linalg.norm(everything)
    weights = reference.attention_weights(q, k, type_k="turbo4")
    relative = weights / weights.max(axis=-1, keepdims=True)
    # The largest weight so far is at most the largest of all, so fewer rows are left out than with the latter.
    assert most <= (relative <= 0.5).mean() and some <= (relative <= 1e-6).mean()


def test_many_small_weights_are_not_lost(kernels):
    """One row of 64 is a peak, the others are 500 times smaller: 11% of the sum, each below half an 8-bit step."""
    n_kv = 16384
    scores = np.where(np.arange(n_kv) % 64 == 0, 0.0, -np.log(500)).astype(np.float32)
    direction = reference.unrotate(np.ones(128), 128).astype(np.float32)  # its block has one level, exactly
    k = turboquant.quantize(scores[None, :, None] * direction, "turbo4")
    v = np.ones((1, n_kv, 128), np.float32)
    v[:, ::64] = 3
    v = turboquant.quantize(v, "turbo4")
    q = (direction / 128)[None, None]
    options = {"type_k": "turbo4", "type_v": "turbo4", "scale": 1.0}
    assert_close(turboquant.attention(q, k, v, **options), reference.attention(q, k, v, **options), 0.002)


def test_float32_bytes_that_are_not_aligned():
    rng = np.random.default_rng(2)
    q, k = (rng.standard_normal((1, n, 64)).astype(np.float32) for n in (2, 9))
    room = np.zeros(k.nbytes + 1, np.uint8)
    room[1:] = k.view(np.uint8).ravel()
    odd = room[1:].reshape(1, 9, 256)
    assert odd.ctypes.data % 4
    options = {"type_k": "f32", "type_v": "f32"}
    np.testing.assert_array_equal(turboquant.attention(q, odd, odd, **options), turboquant.attention(q, k, k, **options))


OPTIONS = {"type_k": "turbo4", "type_v": "turbo4"}


@pytest.fixture
def qkv():
    q, k, v = inputs("turbo4", "turbo4", n_query=5, n_kv=40)
    return grid_queries(q, 128), k, v


@pytest.mark.parametrize("scale", [None, 1.0, 0.02, -0.1])
@pytest.mark.parametrize("soft_cap", [0, 0.5, 20.0])
def test_scale_and_soft_cap(qkv, scale, soft_cap):
    options = {**OPTIONS, "scale": scale, "soft_cap": soft_cap}
    assert_close(turboquant.attention(*qkv, **options), reference.attention(*qkv, **options), near(40))


def test_default_scale_is_one_over_sqrt_head(qkv):
    np.testing.assert_array_equal(turboquant.attention(*qkv, **OPTIONS),
                                  turboquant.attention(*qkv, scale=1 / math.sqrt(128), **OPTIONS))


def test_soft_cap_comes_before_the_mask(qkv):
    mask = np.full((5, 40), 3.0, dtype=np.float32)
    mask[:, ::2] = -7
    options = {**OPTIONS, "mask": mask, "soft_cap": 1.0}
    assert_close(turboquant.attention(*qkv, **options), reference.attention(*qkv, **options), near(40))


def test_masks(qkv, kernels):
    allowed = np.random.default_rng(1).random((5, 40)) < 0.5
    allowed[2] = False
    added = np.where(allowed, 0, -np.inf).astype(np.float32)
    expected = reference.attention(*qkv, mask=added, **OPTIONS)
    for mask in (allowed, added, added.astype(np.float16), np.asfortranarray(added)):
        result = turboquant.attention(*qkv, mask=mask, **OPTIONS)
        assert_close(result, expected, near(40))
        assert not result[:, 2].any()  # masked everywhere
    assert_close(turboquant.attention(*qkv, mask=allowed[1], **OPTIONS),
                 reference.attention(*qkv, mask=np.tile(added[1], (5, 1)), **OPTIONS), near(40))


def test_masked_rows_do_not_matter(qkv):
    """Masked rows have no effect, not even if they contain NaN."""
    q, k, v = qkv
    allowed = np.arange(40) < 30
    expected = turboquant.attention(q, k[:, :30], v[:, :30], **OPTIONS)
    k, v = k.copy(), v.copy()
    for cache in (k, v):
        cache[:, 30:, :2] = np.array([0x7E00], dtype="<u2").view(np.uint8)  # the scale is NaN
    np.testing.assert_array_equal(turboquant.attention(q, k, v, mask=allowed, **OPTIONS), expected)


def test_causal(qkv, kernels):
    q, k, v = qkv
    result = turboquant.attention(q, k, v, causal=True, **OPTIONS)
    for i in range(5):
        seen = 40 - 5 + i + 1
        alone = reference.attention(q[:, i:i + 1], k[:, :seen], v[:, :seen], **OPTIONS)
        assert_close(result[:, i:i + 1], alone, near(40))
    both = turboquant.attention(q, k, v, causal=True, mask=np.arange(40) > 3, **OPTIONS)
    visible = (np.arange(40) > 3) & (np.arange(40)[None] <= 35 + np.arange(5)[:, None])
    np.testing.assert_array_equal(both, turboquant.attention(q, k, v, mask=visible, **OPTIONS))


@pytest.mark.parametrize("threads", [2, 3, 16])
def test_threads_do_not_change_results(qkv, threads):
    np.testing.assert_array_equal(turboquant.attention(*qkv, threads=threads, **OPTIONS),
                                  turboquant.attention(*qkv, **OPTIONS))


def test_batches(qkv):
    q, k, v = (np.stack([np.stack([a, a[..., ::-1, :]])] * 3) for a in qkv)
    masks = np.random.default_rng(2).random((3, 2, 5, 40)) < 0.7
    result = turboquant.attention(q, k, v, mask=masks, **OPTIONS)
    assert result.shape == (3, 2, 4, 5, 128)
    for item in np.ndindex(3, 2):
        np.testing.assert_array_equal(result[item], turboquant.attention(q[item], k[item], v[item], mask=masks[item],
                                                                         **OPTIONS))


def test_dtypes_and_strides(qkv):
    q, k, v = qkv
    half = q.astype(np.float16)
    np.testing.assert_array_equal(turboquant.attention(half, k, v, **OPTIONS),
                                  turboquant.attention(half.astype(np.float32), k, v, **OPTIONS))
    moved = (np.asfortranarray(q), np.asfortranarray(k), v.transpose(1, 0, 2).copy().transpose(1, 0, 2))
    np.testing.assert_array_equal(turboquant.attention(*moved, **OPTIONS), turboquant.attention(*qkv, **OPTIONS))


def test_nothing_to_attend_to():
    q, k, v = inputs("turbo4", "turbo4", n_kv=0)
    assert not turboquant.attention(q, k, v, **OPTIONS).any()
    assert turboquant.attention(q[:, :0], k, v, **OPTIONS).shape == (4, 0, 128)


def test_non_finite_queries_are_not_hidden(qkv):
    q, k, v = qkv
    q = q.copy()
    q[0, 0, 3] = np.nan
    result = turboquant.attention(q, k, v, **OPTIONS)
    assert np.isnan(result[0, 0]).all() and np.isfinite(result[1:]).all() and np.isfinite(result[0, 1:]).all()


# ---- the exact window ------------------------------------------------------------------------------------------------

WINDOWED = [("turbo4", "turbo4"), ("turbo3", "turbo2_64"), ("turbo4_32", "q8_0"), ("q8_0", "turbo3"), ("f16", "q4_0")]


def windowed(type_k, type_v, rows, *, heads=6, kv_heads=2, n_query=5, n_kv=150, head_k=128, head_v=256, seed=4):
    """Queries, encoded K and V, and the last rows of these before they were encoded."""
    rng = np.random.default_rng(seed)
    q = rng.standard_normal((heads, n_query, head_k)).astype(np.float32)
    k = rng.standard_normal((kv_heads, n_kv, head_k)).astype(np.float32)
    v = rng.standard_normal((kv_heads, n_kv, head_v)).astype(np.float32)
    return q, cache_rows(k, type_k), cache_rows(v, type_v), (k[:, n_kv - rows:], v[:, n_kv - rows:])


@pytest.mark.parametrize("type_k, type_v", WINDOWED)
@pytest.mark.parametrize("rows", [0, 1, 63, 64, 65, 150])
def test_window(kernels, type_k, type_v, rows):
    q, k, v, window = windowed(type_k, type_v, rows)
    options = {"type_k": type_k, "type_v": type_v}
    result = turboquant.attention(q, k, v, window=window, **options)
    expected = reference.attention(q, k, v, window=window, **options)
    assert_close(result, expected, 0.02)
    if rows == 0:
        np.testing.assert_array_equal(result, turboquant.attention(q, k, v, **options))
    elif rows > 60:  # the rows do make a difference
        plain = reference.attention(q, k, v, **options)
        if type_k != "f16":
            assert np.linalg.norm(result - plain) > 2 * np.linalg.norm(result - expected)


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16, np.float32])
def test_windows_of_other_floats(kernels, dtype):
    q, k, v, window = windowed("turbo4", "turbo3", 40)
    window = tuple(rows.astype(dtype) for rows in window)
    options = {"type_k": "turbo4", "type_v": "turbo3", "window": window}
    expected = reference.attention(q, k, v, **options)
    assert_close(turboquant.attention(q, k, v, **options), expected, 0.02)
    mixed = {**options, "window": (window[0].astype(np.float32), window[1])}
    assert_close(turboquant.attention(q, k, v, **mixed), expected, 0.02)


@pytest.mark.parametrize("heads, kv_heads", [(1, 1), (4, 4), (5, 1)])
def test_windows_and_head_groups(kernels, heads, kv_heads):
    q, k, v, window = windowed("turbo4", "turbo4", 33, heads=heads, kv_heads=kv_heads, n_query=130)
    assert_close(turboquant.attention(q, k, v, window=window, **OPTIONS),
                 reference.attention(q, k, v, window=window, **OPTIONS), 0.02)


@pytest.mark.parametrize("soft_cap", [0, 0.5])
@pytest.mark.parametrize("rows", [7, 90, 150])
def test_masks_hold_in_a_window(kernels, rows, soft_cap):
    q, k, v, window = windowed("turbo4", "turbo3", rows)
    options = {"type_k": "turbo4", "type_v": "turbo3", "window": window, "soft_cap": soft_cap}
    rng = np.random.default_rng(5)
    mask = np.where(rng.random((5, 150)) < 0.5, rng.standard_normal((5, 150)), -np.inf).astype(np.float32)
    mask[0, 150 - rows:] = -np.inf  # sees nothing of the window,
    mask[1, :150 - rows] = -np.inf  # nothing else,
    mask[2] = -np.inf  # nothing at all
    result = turboquant.attention(q, k, v, mask=mask, **options)
    assert_close(result, reference.attention(q, k, v, mask=mask, **options), 0.02)
    assert not result[:, 2].any()
    future = np.triu(np.full((5, 150), -np.inf), k=146)
    assert_close(turboquant.attention(q, k, v, causal=True, **options),
                 reference.attention(q, k, v, mask=future, **options), 0.02)


def test_what_a_window_stands_for_is_not_read(kernels):
    q, k, v, window = windowed("turbo4", "turbo4", 20)
    expected = turboquant.attention(q, k, v, window=window, **OPTIONS)
    k, v = k.copy(), v.copy()
    for cache in (k, v):
        cache[:, -20:, :2] = np.array([0x7E00], dtype="<u2").view(np.uint8)  # the scale is NaN
    np.testing.assert_array_equal(turboquant.attention(q, k, v, window=window, **OPTIONS), expected)


@pytest.mark.parametrize("type", ["turbo4", "q8_0"])
def test_non_finite_rows_are_not_hidden_by_a_merge(kernels, type):
    q, k, v, window = windowed(type, type, 20)
    options = {"type_k": type, "type_v": type}
    nan = window[0].astype(np.float16)
    nan[0, 3, 5] = np.nan
    result = turboquant.attention(q, k, v, window=(nan, window[1]), **options)
    assert np.isnan(result[:3]).all() and np.isfinite(result[3:]).all()
    mask = np.ones(150, bool)
    mask[133] = False  # that row
    assert np.isfinite(turboquant.attention(q, k, v, window=(nan, window[1]), mask=mask, **options)).all()
    k = k.copy()
    k[1, 4, :2] = np.array([0x7E00], dtype="<u2").view(np.uint8)
    result = turboquant.attention(q, k, v, window=window, **options)
    assert np.isfinite(result[:3]).all() and np.isnan(result[3:]).all()


def test_windows_by_threads_batches_and_strides():
    q, k, v, window = windowed("turbo4", "turbo4", 20)
    expected = turboquant.attention(q, k, v, window=window, **OPTIONS)
    np.testing.assert_array_equal(turboquant.attention(q, k, v, window=window, threads=3, **OPTIONS), expected)
    moved = tuple(np.asfortranarray(rows) for rows in window)
    np.testing.assert_array_equal(turboquant.attention(q, k, v, window=moved, **OPTIONS), expected)
    many = [np.stack([a, a[:, ::-1]]) for a in (q, k, v, *window)]
    result = turboquant.attention(*many[:3], window=many[3:], **OPTIONS)
    for item in range(2):
        np.testing.assert_array_equal(result[item], turboquant.attention(
            *(a[item] for a in many[:3]), window=tuple(a[item] for a in many[3:]), **OPTIONS))


def test_sparse_v_counts_the_rows_of_a_window():
    q, k, v, window = windowed("turbo4", "turbo4", 20)
    _, none = turboquant.attention(q, k, v, window=window, return_skip_rate=True, **OPTIONS)
    _, some = turboquant.attention(q, k, v, window=window, sparse_v=0.3, return_skip_rate=True, **OPTIONS)
    allowed = np.arange(150) < 145
    _, masked = turboquant.attention(q, k, v, window=window, mask=allowed, return_skip_rate=True, **OPTIONS)
    assert none < 0.01 < some < 1 and masked == pytest.approx(5 / 150)


Q_, K_ = np.zeros((4, 5, 128), dtype=np.float32), np.zeros((2, 40, 66), dtype=np.uint8)
W_ = np.zeros((2, 8, 128), dtype=np.float32)


@pytest.mark.parametrize("arguments, options, error, message", [
    ((Q_[0], K_, K_), {}, ValueError, r"q: got shape \(5, 128\), wanted \(..., n_head, n_query, head_k\)"),
    ((Q_, K_[0], K_), {}, ValueError, r"k: got shape \(40, 66\), wanted"),
    ((Q_, K_, K_[:, :39]), {}, ValueError, r"v: got shape \(2, 39, 66\), wanted \(2, 40, 66\)"),
    ((Q_[:3], K_, K_), {}, ValueError, r"q: got 3 heads .* multiple of the 2 heads of k"),
    ((Q_, K_[:0], K_[:0]), {}, ValueError, r"q: got 4 heads .* multiple of the 0"),
    ((Q_[..., :64], K_, K_), {}, ValueError, r"q: got shape \(4, 5, 64\), wanted .* multiple of 128"),
    ((np.tile(Q_, 2), K_, K_), {}, ValueError, r"k: got shape \(2, 40, 66\), wanted \(2, 40, 132\): turbo4 rows"),
    ((Q_, K_, K_), {"type_k": "turbo3"}, ValueError, r"k: got shape .* multiple of 50 .* of turbo3\)"),
    ((Q_, K_, K_), {"type_v": "turbo9"}, ValueError, r"type_v: got 'turbo9', wanted one of"),
    ((Q_, K_, K_), {"mask": np.zeros((4, 40), np.float32)}, ValueError, r"mask: got shape \(4, 40\), wanted \(5, 40\)"),
    ((Q_, K_, K_), {"mask": np.zeros((5, 40), int)}, TypeError, r"mask: got an array of int64"),
    ((Q_, K_, K_), {"soft_cap": -1}, ValueError, r"soft_cap: got -1.0, wanted 0"),
    ((Q_, K_, K_), {"sparse_v": 1}, ValueError, r"sparse_v: got 1.0, wanted 0 \(off\) or more, and less than 1"),
    ((Q_, K_, K_), {"type_k": "q8_0"}, ValueError, r"k: got shape .* multiple of 34 .* of q8_0\)"),
    ((Q_, K_.astype(np.float16), K_), {}, TypeError, r"k: got an array of float16, wanted the uint8"),
    ((Q_, K_, K_), {"soft_cap": "no"}, TypeError, r"soft_cap: got 'no' \(str\), wanted a number"),
    ((Q_, K_, K_), {"scale": math.nan}, ValueError, r"scale: got nan, wanted a finite number"),
    ((Q_, K_[:, :3], K_[:, :3]), {"causal": True}, ValueError, r"causal: got 5 queries and 3 KV rows"),
    ((Q_.astype(float), K_, K_), {}, TypeError, r"q: got an array of float64"),
    ((Q_, K_.astype(np.int8), K_), {}, TypeError, r"k: got an array of int8, wanted the uint8"),
    ((Q_[None], K_, K_), {}, ValueError, r"k: got shape \(2, 40, 66\), wanted \(1, 2, 40, 66\)"),
    ((Q_, K_, K_), {"type_k": "f32"}, ValueError, r"k: got shape .* multiple of 128 .* of f32\)"),
    ((Q_, K_, K_), {"window": W_}, TypeError, r"window: got ndarray, wanted two float arrays"),
    ((Q_, K_, K_), {"window": (W_,)}, TypeError, r"window: got 1 of them, wanted two float arrays"),
    ((Q_, K_, K_), {"window": (W_, K_)}, TypeError, r"window: got an array of uint8 for v, wanted float32"),
    ((Q_, K_, K_), {"window": (W_[0], W_[0])}, ValueError,
     r"window: got shape \(8, 128\) for k, wanted \(2, W, 128\): heads and rows as those of k"),
    ((Q_, K_, K_), {"window": (W_, W_[..., :64])}, ValueError, r"window: got shape \(2, 8, 64\) for v, wanted \(2, W, 128\)"),
    ((Q_, K_, K_), {"window": (W_, W_[:, :7])}, ValueError, r"window: got 8 rows of k and 7 of v, wanted as many of both"),
    ((Q_, K_[:, :7], K_[:, :7]), {"window": (W_, W_)}, ValueError,
     r"window: got 8 rows of k, wanted at most the 7 rows of k and v"),
])
def test_refused(arguments, options, error, message):
    with pytest.raises(error, match=message):
        turboquant.attention(*arguments, **{**OPTIONS, **options})
