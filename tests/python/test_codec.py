"""The codec functions: comparison of all kernels with the scalar ones, shapes, dtypes, threads, errors, warnings.

test_reference.py compares the scalar kernels with the reference.
"""
import os
import subprocess
import sys
import threading
import time
import warnings

import numpy as np
import pytest
import turboquant
from turboquant import _arrays, reference

BLOCKS = {info.name: info.block for info in turboquant.types()}
ROWS = [1, 2, 3, 127, 128, 129]


def awkward(block, blocks_per_row, seed=0):
    """Finite rows that are difficult for kernels."""
    rng = np.random.default_rng(seed)
    n = block * blocks_per_row
    normal = rng.standard_normal((4, n))
    rows = [
        np.zeros(n), np.ones(n), np.full(n, -3.5), np.full(n, 1e30), normal[0], normal[1] * 1e-30, normal[2] * 1e30,
        normal[3] * 1e-39, np.full(n, 1e-45), rng.standard_t(1.5, n), rng.standard_t(1.5, n) * 100,
        np.where(np.arange(n) % 2, 1.0, -1.0), np.where(np.arange(n) % 7, 0.0, 1e-20), np.arange(n) - n / 2,
        rng.integers(-3, 4, n), np.where(rng.random(n) < 0.02, 300.0, 0.01) * rng.standard_normal(n), -np.zeros(n),
    ]
    for place in (0, 1, block - 1, n - 1):
        one_hot = np.zeros(n)
        one_hot[place] = -2.5
        rows.append(one_hot)
    return np.array(rows).astype(np.float32)


def quiet_quantize(x, type, **options):
    """quantize without warnings, for tests of the bytes of blocks that cause a warning."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)
        return turboquant.quantize(x, type, **options)


def assert_same_floats(actual, expected):
    """Compare bits; any NaN equals any NaN."""
    nan = np.isnan(expected)
    np.testing.assert_array_equal(np.isnan(actual), nan)
    np.testing.assert_array_equal(np.where(nan, 0, actual).view(np.uint32), np.where(nan, 0, expected).view(np.uint32))


# ---- types -----------------------------------------------------------------------------------------------------------

def test_released_types_are_those_of_the_format():
    table = {t.name: (t.bits, t.block, t.block_bytes, t.bits_per_value, len(t.levels)) for t in turboquant.types()}
    released = {
        "turbo4": (4, 128, 66, 4.125, 16), "turbo4_64": (4, 64, 34, 4.25, 16), "turbo4_32": (4, 32, 18, 4.5, 16),
        "turbo3": (3, 128, 50, 3.125, 8), "turbo3_64": (3, 64, 26, 3.25, 8), "turbo3_32": (3, 32, 14, 3.5, 8),
        "turbo2": (2, 128, 34, 2.125, 4), "turbo2_64": (2, 64, 18, 2.25, 4), "turbo2_32": (2, 32, 10, 2.5, 4),
    }
    # The trellis types have the same sizes, and twice as many levels.
    released |= {name.replace(f"turbo{bits}", f"turbo{bits}_tcq"): (bits, *row, 2 * levels)
                 for name, (bits, *row, levels) in released.items()}
    assert table.items() >= released.items() and list(table)[:18] == list(released)
    assert [t.id for t in turboquant.types()] == list(range(len(table)))


def test_codebook_is_symmetric_ascending_and_read_only(type_name):
    info = next(t for t in turboquant.types() if t.name == type_name)
    levels = info.levels.astype(int)
    assert (np.diff(levels) > 0).all() and (levels == -levels[::-1]).all() and levels[-1] == 127
    np.testing.assert_array_equal(turboquant.codebook(type_name), np.float32(info.step) * info.levels)
    assert turboquant.codebook(info).dtype == np.float32
    with pytest.raises(ValueError, match="read-only"):
        info.levels[0] = 0


@pytest.mark.parametrize("head, wanted", [(128, "turbo3"), (256, "turbo3"), (512, "turbo3"), (64, "turbo3_64"),
                                          (192, "turbo3_64"), (576, "turbo3_64"), (96, "turbo3_32")])
def test_type_for_head(head, wanted):
    assert turboquant.type_for_head("turbo3", head).name == wanted


@pytest.mark.parametrize("head", [80, 112, 0, -128])
def test_type_for_head_refuses(head):
    with pytest.raises(ValueError, match=f"head: got {head}, wanted a positive multiple of 32"):
        turboquant.type_for_head("turbo4", head)


# ---- every set of kernels gives the scalar ones' results ------------------------------------------------------------

@pytest.mark.parametrize("rows", ROWS)
def test_kernels_encode_and_decode_like_scalar(other_kernels, type_name, rows):
    rng = np.random.default_rng(rows)
    x = rng.standard_t(3, (rows, BLOCKS[type_name] * (1 + rows % 3))).astype(np.float32)
    with turboquant.use_kernels("scalar"):
        expected = turboquant.quantize(x, type_name)
        plain, rotated = (turboquant.dequantize(expected, type_name, rotated=r) for r in (False, True))
    np.testing.assert_array_equal(turboquant.quantize(x, type_name), expected)
    assert_same_floats(turboquant.dequantize(expected, type_name), plain)
    assert_same_floats(turboquant.dequantize(expected, type_name, rotated=True), rotated)


@pytest.mark.parametrize("blocks_per_row", [1, 2, 3])
def test_kernels_encode_awkward_rows_like_scalar(other_kernels, type_name, blocks_per_row):
    x = awkward(BLOCKS[type_name], blocks_per_row)
    with turboquant.use_kernels("scalar"):
        expected = quiet_quantize(x, type_name)
    np.testing.assert_array_equal(quiet_quantize(x, type_name), expected)


def test_kernels_treat_non_finite_blocks_like_scalar(other_kernels, type_name):
    block = BLOCKS[type_name]
    x = np.random.default_rng(3).standard_normal((64, 3 * block)).astype(np.float32)
    for row in range(len(x)):
        x[row, (row * 37) % x.shape[1]] = (np.nan, np.inf, -np.inf)[row % 3]
    with turboquant.use_kernels("scalar"):
        expected = quiet_quantize(x, type_name)
    np.testing.assert_array_equal(quiet_quantize(x, type_name), expected)


def test_kernels_decode_any_bytes_like_scalar(other_kernels, type_name):
    """Random indices with scales of every kind: zeros, subnormals, infinities, NaN and all exponents."""
    info = next(t for t in turboquant.types() if t.name == type_name)
    scales = np.r_[0:65536:13, 0:8, 0x3FC:0x404, 0x7BFC:0x7C04, 0x8000:0x8004, 0xFBFC:0xFC04, 0xFFFF].astype("<u2")
    q = np.random.default_rng(4).integers(0, 256, (len(scales), info.block_bytes), dtype=np.uint8)
    q[:, :2] = scales.view(np.uint8).reshape(-1, 2)
    with turboquant.use_kernels("scalar"):
        expected = [turboquant.dequantize(q, info, rotated=r) for r in (False, True)]
    for rotated in (False, True):
        assert_same_floats(turboquant.dequantize(q, info, rotated=rotated), expected[rotated])


@pytest.mark.parametrize("block", [128, 64, 32])
def test_kernels_rotate_like_scalar(other_kernels, block):
    for rows in ROWS:
        x = np.random.default_rng(rows).standard_normal((rows, block)).astype(np.float32)
        with turboquant.use_kernels("scalar"):
            expected, back = turboquant.rotate(x, block), turboquant.unrotate(x, block)
        assert_same_floats(turboquant.rotate(x, block), expected)
        assert_same_floats(turboquant.unrotate(x, block), back)
    x = awkward(block, 2)
    with turboquant.use_kernels("scalar"):
        expected = turboquant.rotate(x, block)
    assert_same_floats(turboquant.rotate(x, block), expected)


@pytest.mark.parametrize("block", [128, 64, 32])
def test_kernels_prepare_queries_like_scalar(other_kernels, block):
    x = np.concatenate([awkward(block, 3), np.random.default_rng(5).standard_t(3, (129, 3 * block))]).astype(np.float32)
    x[-1, 1], x[-2, 2] = np.nan, np.inf
    with turboquant.use_kernels("scalar"):
        expected = turboquant.prepare(x, block)
    actual = turboquant.prepare(x, block)
    assert_same_floats(actual["scale"], expected["scale"])
    np.testing.assert_array_equal(actual["q"], expected["q"])
    np.testing.assert_array_equal(actual["sum"], expected["sum"])


@pytest.mark.parametrize("blocks_per_row", [1, 2, 3, 8])
def test_kernels_dot_like_scalar(other_kernels, type_name, blocks_per_row):
    """The sums over a block are integers, so only the order of the blocks' float sums can differ."""
    rng = np.random.default_rng(6)
    n = BLOCKS[type_name] * blocks_per_row
    query, x = rng.standard_normal((3, n)).astype(np.float32), rng.standard_t(3, (129, n)).astype(np.float32)
    q = turboquant.quantize(x, type_name)
    with turboquant.use_kernels("scalar"):
        expected = turboquant.dot(query, q, type_name)
    bound = 1e-6 * np.linalg.norm(query, axis=1)[:, None] * np.linalg.norm(x, axis=1)
    assert (np.abs(turboquant.dot(query, q, type_name) - expected) <= bound).all()


# ---- selecting kernels -----------------------------------------------------------------------------------------------

def test_use_kernels_takes_effect_and_ends(kernels):
    assert [k.name for k in turboquant.kernels() if k.selected] == [kernels]
    with turboquant.use_kernels("scalar"):
        assert [k.name for k in turboquant.kernels() if k.selected] == ["scalar"]
    assert [k.name for k in turboquant.kernels() if k.selected] == [kernels]


def test_set_kernels_none_selects_the_best_supported(kernels):
    turboquant.set_kernels(None)
    assert [k.name for k in turboquant.kernels() if k.selected] == [
        next(k.name for k in turboquant.kernels() if k.supported)]


def test_set_kernels_refuses():
    before = turboquant.kernels()
    with pytest.raises(ValueError, match="avx1024.*kernels of this build: .*scalar"):
        turboquant.set_kernels("avx1024")
    with pytest.raises(ValueError, match="wanted a kernels' name or None"):
        turboquant.set_kernels("")
    with pytest.raises(TypeError, match="name: got 2 .int., wanted a str or None"):
        turboquant.set_kernels(2)
    assert turboquant.kernels() == before


def run_python(code, **environment):
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True,
                          env={**os.environ, **environment}, timeout=120)


def test_environment_forces_kernels(kernels):
    done = run_python("import turboquant as t; print([k.name for k in t.kernels() if k.selected])",
                      TURBOQUANT_KERNELS=kernels)
    assert done.stdout.strip() == f"['{kernels}']", done.stderr


def unrunnable():
    """Names in TURBOQUANT_KERNELS of kernels that do not exist or that this machine cannot run."""
    runnable = {k.name for k in turboquant.kernels() if k.supported}
    names = ("avx512vbmi", "avx512vnni", "avx512", "avxvnni", "avx2", "neon_dotprod", "neon")
    return [name for name in names if name not in runnable]


@pytest.mark.parametrize("name", ["avx1024", *unrunnable()])
def test_environment_with_kernels_that_cannot_run_is_an_error(name):
    done = run_python("import numpy as n, turboquant as t\n"
                      "assert not any(k.selected for k in t.kernels())\n"
                      "z = n.zeros((1, 128), n.float32)\n"
                      "for f in (lambda: t.quantize(z, 'turbo4'), lambda: t.rotate(z), lambda: t.prepare(z),\n"
                      "          lambda: t.dequantize(n.zeros((1, 66), n.uint8), 'turbo4')):\n"
                      "    try: f()\n"
                      "    except ValueError as e: print(e)\n", TURBOQUANT_KERNELS=name)
    lines = done.stdout.splitlines()
    assert done.returncode == 0 and len(lines) == 4, done.stderr
    assert all(line.startswith(f"TURBOQUANT_KERNELS={name}: ") and "scalar" in line for line in lines), lines


# ---- shapes, strides, dtypes, threads --------------------------------------------------------------------------------

@pytest.mark.parametrize("shape", [(128,), (1, 256), (2, 3, 128), (2, 3, 4, 384), (0, 128), (2, 0, 128)])
def test_shapes(shape):
    x = np.random.default_rng(7).standard_normal(shape).astype(np.float32)
    q = turboquant.quantize(x, "turbo3")
    assert q.dtype == np.uint8 and q.shape == (*shape[:-1], shape[-1] // 128 * 50) and q.flags.c_contiguous
    back = turboquant.dequantize(q, "turbo3")
    assert back.dtype == np.float32 and back.shape == shape
    assert turboquant.rotate(x).shape == shape and turboquant.prepare(x).shape == (*shape[:-1], shape[-1] // 128)
    for index in np.ndindex(shape[:-1]):
        np.testing.assert_array_equal(q[index], turboquant.quantize(x[index], "turbo3"))


STRIDED = {
    "every other row": lambda a: a[::2],
    "part of a row": lambda a: a[:, 128:384],
    "reversed rows": lambda a: a[::-1],
    "reversed values": lambda a: a[:, ::-1],
    "transposed": lambda a: a.T,
    "every other value": lambda a: a[:, ::2],
    "three axes": lambda a: a.reshape(4, 128, 512)[:, ::2, :256].transpose(1, 0, 2),
    "repeated row": lambda a: np.broadcast_to(a[0], (5, 512)),
    "misaligned": lambda a: np.frombuffer(b"x" + a.tobytes(), dtype=np.uint8)[1:].view(a.dtype).reshape(a.shape),
}


@pytest.mark.parametrize("view", STRIDED.values(), ids=STRIDED.keys())
def test_strided_input(view, kernels):
    x = view(np.random.default_rng(8).standard_normal((512, 512)).astype(np.float32))
    before = x.copy()
    q = turboquant.quantize(x, "turbo4_64")
    np.testing.assert_array_equal(q, turboquant.quantize(before, "turbo4_64"))
    np.testing.assert_array_equal(x, before)
    np.testing.assert_array_equal(turboquant.rotate(x, 32), turboquant.rotate(before, 32))


def test_strided_encoded_rows(kernels):
    q = turboquant.quantize(np.random.default_rng(9).standard_normal((64, 512)).astype(np.float32), "turbo3")
    query = np.ones(256, dtype=np.float32)
    for view in (q[::2, :100], q[::-1, 100:], q[:, 50:150]):
        copy = view.copy()
        np.testing.assert_array_equal(turboquant.dequantize(view, "turbo3"), turboquant.dequantize(copy, "turbo3"))
        np.testing.assert_array_equal(turboquant.dot(query, view, "turbo3"), turboquant.dot(query, copy, "turbo3"))


def test_only_what_strides_cannot_express_is_copied():
    x = np.zeros((16, 512), dtype=np.float32)
    for view in (x, x[::2], x[:, 128:256], x[3], x.reshape(2, 8, 512)[:, 1:2], x[:1, :128]):
        assert np.shares_memory(_arrays.as_rows(view), x)
    for view in (x[::-1], x[:, ::2], x.T, np.broadcast_to(x[0], (3, 512))):
        assert not np.shares_memory(_arrays.as_rows(view), x)


def test_sixteen_bit_floats():
    x = np.random.default_rng(10).standard_normal((5, 256)).astype(np.float32)
    dtypes = [np.dtype(np.float16), pytest.importorskip("ml_dtypes").bfloat16]
    for dtype in dtypes:
        narrow = x.astype(dtype)
        wide = narrow.astype(np.float32)
        np.testing.assert_array_equal(turboquant.quantize(narrow, "turbo4"), turboquant.quantize(wide, "turbo4"))
        np.testing.assert_array_equal(turboquant.rotate(narrow), turboquant.rotate(wide))
        np.testing.assert_array_equal(turboquant.prepare(narrow), turboquant.prepare(wide))


def test_big_endian_floats():
    x = np.random.default_rng(11).standard_normal((2, 128)).astype(np.float32)
    np.testing.assert_array_equal(turboquant.quantize(x.astype(">f4"), "turbo4"), turboquant.quantize(x, "turbo4"))


@pytest.mark.parametrize("threads", [2, 3, 8, 100])
def test_threads_do_not_change_results(threads, type_name):
    block = BLOCKS[type_name]
    x = np.random.default_rng(12).standard_normal((53, 2 * block)).astype(np.float32)
    x[7, 3] = np.nan
    with pytest.warns(RuntimeWarning, match="1 of 106 blocks"):
        q = turboquant.quantize(x, type_name, threads=threads)
    np.testing.assert_array_equal(q, quiet_quantize(x, type_name))
    for rotated in (False, True):
        np.testing.assert_array_equal(turboquant.dequantize(q, type_name, rotated=rotated, threads=threads),
                                      turboquant.dequantize(q, type_name, rotated=rotated))
    np.testing.assert_array_equal(turboquant.rotate(x, block, threads=threads), turboquant.rotate(x, block))
    np.testing.assert_array_equal(turboquant.unrotate(x, block, threads=threads), turboquant.unrotate(x, block))


def test_calls_from_several_python_threads():
    x = np.random.default_rng(13).standard_normal((8, 64, 1024)).astype(np.float32)
    results = [None] * len(x)

    def work(i):
        results[i] = turboquant.quantize(x[i], "turbo3")

    workers = [threading.Thread(target=work, args=(i,)) for i in range(len(x))]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    np.testing.assert_array_equal(np.array(results), turboquant.quantize(x, "turbo3"))


def test_gil_is_released():
    """Another thread runs Python code during a call."""
    x = np.random.default_rng(14).standard_normal((4096, 1024)).astype(np.float32)
    ends = []

    def work():
        ends.append(time.perf_counter())
        with turboquant.use_kernels("scalar"):
            turboquant.quantize(x, "turbo4")
        ends.append(time.perf_counter())

    worker = threading.Thread(target=work)
    seen = []
    worker.start()
    while worker.is_alive():
        seen.append(time.perf_counter())
        time.sleep(0.001)
    begin, end = ends
    assert any(0.25 < (moment - begin) / (end - begin) < 0.75 for moment in seen)


# ---- non-finite and very large input --------------------------------------------------------------------------------

def test_non_finite_blocks_become_zeros_and_the_others_stay(type_name, kernels):
    block = BLOCKS[type_name]
    x = np.random.default_rng(15).standard_normal((3, 4 * block)).astype(np.float32)
    clean = turboquant.quantize(x, type_name)
    x[0, 0], x[1, block + 5], x[1, block + 6], x[2, -1] = np.nan, np.inf, np.nan, -np.inf
    with pytest.warns(RuntimeWarning, match="x: 3 of 12 blocks hold NaN or infinity; they are stored as zeros"):
        q = turboquant.quantize(x, type_name)
    blocks, wanted = q.reshape(3, 4, -1), clean.reshape(3, 4, -1).copy()
    wanted[0, 0] = wanted[1, 1] = wanted[2, 3] = 0
    np.testing.assert_array_equal(blocks, wanted)


def test_scale_above_fp16_saturates(type_name, kernels):
    block = BLOCKS[type_name]
    x = np.random.default_rng(16).standard_normal((2, block)).astype(np.float32)
    x[1] *= 1e30
    with pytest.warns(RuntimeWarning, match="the scale of 1 of 2 blocks is above fp16's largest value"):
        q = turboquant.quantize(x, type_name)
    family = reference.FORMATS[type_name].family
    scale, level = family.split(q)
    assert scale[1] == (64512 if isinstance(family, reference.Trellis) else 65504)
    ordinary = turboquant.quantize(x[1:] / np.float32(1e30) * 4, type_name)
    np.testing.assert_array_equal(level[1:], family.split(ordinary)[1])
    assert np.isfinite(turboquant.dequantize(q, type_name)).all()


def test_scales_next_to_the_limit_are_finite(type_name):
    """The greatest blocks that are not counted as saturated: their scale must not be rounded to infinity."""
    block, most = BLOCKS[type_name], np.finfo(np.float16).max
    for x in np.random.default_rng(18).standard_normal((40, block)).astype(np.float32):
        low, high = np.float32(1e3), np.float32(1e6)  # factors, the second saturates
        while (middle := np.float32((float(low) + float(high)) / 2)) not in (low, high):
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                turboquant.quantize(x * middle, type_name)
            low, high = (low, middle) if caught else (middle, high)
        q = turboquant.quantize(x * low, type_name)
        scale, _ = reference.FORMATS[type_name].family.split(q)
        assert 0.97 * float(most) < scale <= most


def test_blocks_below_fp16_are_zero(type_name, kernels):
    x = np.random.default_rng(17).standard_normal((1, BLOCKS[type_name])).astype(np.float32) * np.float32(1e-12)
    q = turboquant.quantize(x, type_name)
    assert not q.any() and not turboquant.dequantize(q, type_name).any()


def test_queries_do_not_hide_non_finite_values():
    query = np.ones((2, 256), dtype=np.float32)
    query[1, 200] = np.nan
    q = turboquant.quantize(np.ones((3, 256), dtype=np.float32), "turbo4")
    result = turboquant.dot(query, q, "turbo4")
    assert np.isfinite(result[0]).all() and np.isnan(result[1]).all()


# ---- errors name the argument, what it was and what it has to be -----------------------------------------------------

X, Q = np.zeros((2, 128), dtype=np.float32), np.zeros((2, 66), dtype=np.uint8)

REFUSED = [
    (lambda: turboquant.quantize(X, "turbo5"), ValueError, r"type: got 'turbo5', wanted one of turbo4, .*; did you"),
    (lambda: turboquant.quantize(X, "TURBO4_64"), ValueError, r"did you mean 'turbo4_64'\?"),
    (lambda: turboquant.quantize(X, "q8"), ValueError, r"type: got 'q8', wanted one of turbo4, .*turbo2_tcq_32$"),
    (lambda: turboquant.quantize(X, 4), TypeError, r"type: got 4 \(int\), wanted a type's name"),
    (lambda: turboquant.quantize(X.astype(float), "turbo4"), TypeError, r"x: got an array of float64, wanted float32"),
    (lambda: turboquant.quantize(X.astype(int), "turbo4"), TypeError, r"x: got an array of int64"),
    (lambda: turboquant.quantize("abc", "turbo4"), TypeError, r"x: got an array of <U3"),
    (lambda: turboquant.quantize(X[:, :100], "turbo4"), ValueError, r"x: got shape \(2, 100\), .* multiple of 128"),
    (lambda: turboquant.quantize(X[:, :0], "turbo4"), ValueError, r"x: got shape \(2, 0\), .* positive multiple"),
    (lambda: turboquant.quantize(np.float32(1), "turbo4"), ValueError, r"x: got a scalar"),
    (lambda: turboquant.quantize(X, "turbo4", threads=0), ValueError, r"threads: got 0, wanted 1 to 1024"),
    (lambda: turboquant.quantize(X, "turbo4", threads=1.5), TypeError, r"threads: got 1.5 \(float\), wanted an int"),
    (lambda: turboquant.quantize(X, "turbo4", threads=True), TypeError, r"threads: got a bool"),
    (lambda: turboquant.dequantize(X, "turbo4"), TypeError, r"q: got an array of float32, wanted the uint8"),
    (lambda: turboquant.dequantize(Q, "turbo3"), ValueError, r"q: got shape \(2, 66\), wanted .* multiple of 50"),
    (lambda: turboquant.rotate(X, 16), ValueError, r"block: got 16, wanted 128, 64 or 32"),
    (lambda: turboquant.rotate(X, "128"), TypeError, r"block: got '128' \(str\)"),
    (lambda: turboquant.unrotate(X[:, 1:], 64), ValueError, r"x: got shape \(2, 127\), wanted .* multiple of 64"),
    (lambda: turboquant.prepare(X[:, :64]), ValueError, r"query: got shape \(2, 64\), wanted .* multiple of 128"),
    (lambda: turboquant.dot(np.zeros(256, np.float32), Q, "turbo4"), ValueError, r"query: got rows of 256 .* 128"),
    (lambda: turboquant.dot(turboquant.prepare(X, 64), Q, "turbo4"), TypeError, r"query: got an array of .* prepare"),
    (lambda: turboquant.dot(X[0], X, "turbo4"), TypeError, r"q: got an array of float32"),
    (lambda: turboquant.types()[0].row_bytes(100), ValueError, r"n: got 100, .* turbo4 .* 128"),
    (lambda: turboquant.types()[0].row_values(100), ValueError, r"row_bytes: got 100, .* 66 bytes"),
    (lambda: turboquant.codebook("turbo1"), ValueError, r"type: got 'turbo1'"),
]


@pytest.mark.parametrize("call, error, message", REFUSED, ids=[m for _, _, m in REFUSED])
def test_refused(call, error, message):
    with pytest.raises(error, match=message):
        call()


def test_core_checks_what_memory_safety_needs():
    """The private module checks arguments that the package never passes."""
    from turboquant import _core

    good, small = np.zeros((2, 66), dtype=np.uint8), np.zeros((2, 65), dtype=np.uint8)
    frozen = good.copy()
    frozen.flags.writeable = False
    for target in (small, good[:1], good[::-1], frozen):
        with pytest.raises(ValueError, match="_core"):
            _core.encode(0, X, target, 1)
    with pytest.raises(ValueError, match="_core"):
        _core.decode(0, small, np.zeros((2, 128), dtype=np.float32), False, 1)
    with pytest.raises(ValueError, match="no such TurboQuant type"):
        _core.encode(len(turboquant.types()), X, good, 1)
    with pytest.raises(TypeError):
        _core.encode(0, X.astype(np.float64), good, 1)
    with pytest.raises(ValueError, match="_core"):
        _core.dot(0, good, np.zeros((1, 100), dtype=np.uint8), np.zeros((1, 2), dtype=np.float32), 128)


def test_public_names():
    assert sorted(turboquant.__all__) == sorted(set(turboquant.__all__))
    assert all(hasattr(turboquant, name) for name in turboquant.__all__)
    assert all(getattr(turboquant, name).__doc__ for name in turboquant.__all__)
