"""The NumPy reference compared with theory, and the scalar kernels of the core compared with the reference."""
import doctest
import hashlib
import math
import re
import subprocess
import sys
import warnings
from pathlib import Path

import numpy as np
import pytest
import turboquant
from turboquant import reference

ROOT = Path(__file__).resolve().parents[2]
ROWS = [1, 2, 3, 127, 128, 129]

#: Mean squared error of the optimal quantizer of N(0,1): Max 1960, table I.
THEORY = {2: 0.1175, 3: 0.03454, 4: 0.009497}


@pytest.fixture(autouse=True)
def scalar_kernels():
    with turboquant.use_kernels("scalar"):
        yield


def gaussian_error(centroids):
    """The exact mean squared error of N(0,1) rounded to the nearest of the centroids."""
    def second_moment(low, high):  # of the part of the density between low and high
        def edge(x):
            return 0.0 if math.isinf(x) else x * reference.density(x)
        return edge(low) - edge(high) + reference.upper_tail(low) - reference.upper_tail(high)

    bounds = [-math.inf, *((a + b) / 2 for a, b in zip(centroids, centroids[1:])), math.inf]
    return sum(second_moment(low, high) - 2 * c * (
        (0.0 if math.isinf(low) else reference.density(low)) - (0.0 if math.isinf(high) else reference.density(high)))
        + c * c * (reference.upper_tail(low) - reference.upper_tail(high))
        for c, low, high in zip(centroids, bounds, bounds[1:]))


# ---- the oracle against theory ---------------------------------------------------------------------------------------

@pytest.mark.parametrize("bits", [2, 3, 4])
def test_codebooks_reach_the_theoretical_error(bits):
    exact = gaussian_error(reference.lloyd_max(bits))
    assert exact == pytest.approx(THEORY[bits], abs=5e-5)
    rounded = [reference.step(bits) * int(k) for k in reference.levels(bits)]
    assert exact <= gaussian_error(rounded) < exact * 1.002  # what int8 rounding may cost


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_codebooks_satisfy_both_conditions(bits):
    """Compared with the definition by numerical integration, without formulas of the solver."""
    centroids = np.array(reference.lloyd_max(bits))
    x = np.linspace(-9, 9, 2_000_001)
    weight = np.exp(-x * x / 2)
    nearest = np.searchsorted((centroids[1:] + centroids[:-1]) / 2, x)
    means = np.bincount(nearest, weight * x) / np.bincount(nearest, weight)
    np.testing.assert_allclose(means, centroids, atol=1e-4)
    np.testing.assert_array_equal(centroids, -centroids[::-1])


@pytest.mark.parametrize("n", [128, 64, 32])
def test_rotation_is_orthonormal(n):
    matrix = reference.rotation_matrix(n)
    np.testing.assert_allclose(matrix @ matrix.T, np.eye(n), atol=1e-13)
    np.testing.assert_allclose(np.abs(matrix), 1 / math.sqrt(n))
    x = np.random.default_rng(0).standard_normal((3, 2 * n))
    np.testing.assert_allclose(reference.unrotate(reference.rotate(x, n), n), x, atol=1e-13)


def test_hadamard_is_the_definition():
    """Entry (i, j) is (-1) to the number of ones that i and j share in binary."""
    matrix = reference.hadamard(32)
    assert all(matrix[i, j] == (-1) ** (i & j).bit_count() for i in range(32) for j in range(32))


@pytest.mark.parametrize("which", [1, 2])
def test_signs_are_the_hash_and_shorter_blocks_take_the_prefix(which):
    number = int.from_bytes(hashlib.sha256(f"turboquant S{which}".encode()).digest()[:16], "little")
    expected = [-1 if number >> i & 1 else 1 for i in range(128)]
    assert reference.signs(which).tolist() == expected
    assert reference.signs(which, 32).tolist() == expected[:32]


@pytest.mark.parametrize("bits", [2, 3, 4])
@pytest.mark.parametrize("n", [128, 64, 32])
def test_pack_is_the_documented_layout(bits, n):
    index = np.random.default_rng(bits).integers(0, 1 << bits, n).astype(np.uint8)
    packed = reference.pack(index, bits)
    assert packed.dtype == np.uint8 and packed.shape == (n * bits // 8,)
    np.testing.assert_array_equal(reference.unpack(packed, bits), index)
    for i in range(n):
        if bits == 4:
            value = packed[i % (n // 2)] >> (4 * (i // (n // 2))) & 15
        else:
            value = packed[i % (n // 4)] >> (2 * (i // (n // 4))) & 3
        if bits == 3:
            value |= (packed[n // 4 + i // 8] >> (i % 8) & 1) << 2
        assert value == index[i]


@pytest.mark.parametrize("type_name", [f"turbo{bits}" for bits in (4, 3, 2)])
def test_gaussian_distortion_is_that_of_the_codebook(type_name):
    """1 - cos^2 of the angle between block and reconstruction is the distortion that no choice of scale changes.

    For the optimal quantizer of N(0,1) it equals the mean squared error; the scale search gains a little on it.
    """
    x = np.random.default_rng(1).standard_normal((4096, 128)).astype(np.float32)
    for encode in (turboquant.quantize, reference.quantize):
        back = turboquant.dequantize(encode(x, type_name), type_name).astype(np.float64)
        cosine = (x * back).sum(1) / np.sqrt(np.square(x.astype(np.float64)).sum(1) * np.square(back).sum(1))
        distortion = (1 - cosine**2).mean()
        theory = THEORY[reference.FORMATS[type_name].bits]
        assert 0.8 * theory < distortion < theory


# ---- the core against the oracle -------------------------------------------------------------------------------------

def blocks(q, type):
    return q.reshape(-1, reference.FORMATS[type].block_bytes)


def squared_errors(x, q, type):
    """Per block."""
    difference = reference.dequantize(q, type).astype(np.float64) - x
    return np.square(difference).reshape(-1, reference.FORMATS[type].block).sum(-1)


def energies(x, type):
    return np.square(x.astype(np.float64)).reshape(-1, reference.FORMATS[type].block).sum(-1)


def heavy_tailed(rng, shape):
    return (rng.standard_t(2, shape) * np.where(rng.random(shape) < 0.01, 50, 1)).astype(np.float32)


def test_tables_match(type_name):
    info = next(t for t in turboquant.types() if t.name == type_name)
    form = reference.FORMATS[type_name]
    assert (info.bits, info.block, info.block_bytes) == (form.bits, form.block, form.block_bytes)
    np.testing.assert_array_equal(info.levels, reference.levels(form.bits))
    assert np.float32(info.step) == np.float32(reference.step(form.bits))
    np.testing.assert_array_equal(turboquant.codebook(type_name), reference.codebook(type_name))
    assert list(reference.FORMATS) == [t.name for t in turboquant.types()]


def test_signs_match():
    from turboquant import _core

    for which in (1, 2):
        bits = np.unpackbits(np.frombuffer(_core.signs(which), dtype=np.uint8), bitorder="little")
        np.testing.assert_array_equal(np.where(bits, -1, 1), reference.signs(which))


@pytest.mark.parametrize("rotated", [False, True])
def test_decode_is_bit_equal(type_name, rotated):
    """Every fp16 scale, over random indices."""
    size = reference.FORMATS[type_name].block_bytes
    q = np.random.default_rng(2).integers(0, 256, (65536, size), dtype=np.uint8)
    q[:, :2] = np.arange(65536, dtype="<u2").view(np.uint8).reshape(-1, 2)
    for part in (q[::7], q[31000:33000], q[63000:]):  # with all subnormals, infinities and many NaNs
        actual = turboquant.dequantize(part, type_name, rotated=rotated)
        expected = reference.dequantize(part, type_name, rotated=rotated)
        nan = np.isnan(expected)
        np.testing.assert_array_equal(np.isnan(actual), nan)
        np.testing.assert_array_equal(actual.view(np.uint32)[~nan], expected.view(np.uint32)[~nan])


def test_decode_is_the_formula(type_name):
    """x = R^T (d * step * level) in float64; the format's two float32 roundings leave 2^-24 each."""
    form = reference.FORMATS[type_name]
    q = reference.quantize(np.random.default_rng(3).standard_normal((64, form.block)), type_name)
    scale = q[:, :2].copy().view("<f2").astype(np.float64)
    y = scale * reference.step(form.bits) * reference.levels(form.bits)[reference.unpack(q[:, 2:], form.bits)]
    np.testing.assert_allclose(reference.dequantize(q, type_name), reference.unrotate(y, form.block), rtol=3 * 2**-24,
                               atol=1e-12)
    np.testing.assert_allclose(reference.dequantize(q, type_name, rotated=True), y, rtol=3 * 2**-24)


@pytest.mark.parametrize("draw", [lambda rng, shape: rng.standard_normal(shape).astype(np.float32), heavy_tailed],
                         ids=["normal", "heavy-tailed"])
def test_encode_is_as_good_as_the_oracle(type_name, draw):
    """Bytes differ where float32 and float64 decide a near-tie differently; the error is the same."""
    block = reference.FORMATS[type_name].block
    for rows in ROWS:
        x = draw(np.random.default_rng(rows), (rows, 2 * block))
        core, oracle = turboquant.quantize(x, type_name), reference.quantize(x, type_name)
        core_error, oracle_error = squared_errors(x, core, type_name), squared_errors(x, oracle, type_name)
        assert (core_error <= oracle_error + 0.002 * energies(x, type_name)).all()
        assert core_error.sum() <= oracle_error.sum() * (1.0001 if rows > 100 else 1.01)
        if rows > 100:
            assert (blocks(core, type_name) == blocks(oracle, type_name)).all(axis=1).mean() > 0.98


def grid_rows(type_name, seed):
    """Rows with a unique encoding: indices with the frequencies of N(0,1), shuffled, and fp16 scales."""
    form = reference.FORMATS[type_name]
    rng = np.random.default_rng(seed)
    centroids = np.array(reference.lloyd_max(form.bits))
    bounds = (centroids[1:] + centroids[:-1]) / 2
    quantiles = np.sort(rng.standard_normal(1_000_000))[((np.arange(form.block) + 0.5) / form.block * 1e6).astype(int)]
    index = np.searchsorted(bounds, quantiles).astype(np.uint8)
    index = np.array([rng.permutation(index) for _ in range(128)])
    scale = np.exp(rng.uniform(-9, 9, 128)).astype("<f2")
    return np.concatenate([scale[:, None].view(np.uint8), reference.pack(index, form.bits)], axis=1)


def test_grid_points_survive(type_name):
    """Reconstructions encode to the bytes they came from, in the core and in the oracle."""
    q = grid_rows(type_name, 4)
    x = turboquant.dequantize(q, type_name)
    np.testing.assert_array_equal(reference.quantize(x, type_name), q)
    np.testing.assert_array_equal(turboquant.quantize(x, type_name), q)


SPECIAL = {
    "zeros": np.zeros(128), "ones": np.ones(128), "constant": np.full(128, -3.5),
    "one-hot": np.eye(128)[5] * 7, "alternating": np.where(np.arange(128) % 2, 1.0, -1.0),
    "ramp": np.arange(128) - 60.0, "small": np.full(128, 1e-6), "outlier": np.r_[np.full(127, 0.01), 500.0],
}


@pytest.mark.parametrize("name", SPECIAL)
def test_special_blocks(type_name, name):
    x = SPECIAL[name].astype(np.float32)
    core, oracle = turboquant.quantize(x, type_name), reference.quantize(x, type_name)
    bound = squared_errors(x, oracle, type_name) + 0.01 * energies(x, type_name)
    assert (squared_errors(x, core, type_name) <= bound).all()
    if name == "zeros":
        assert not core.any() and not oracle.any()


@pytest.mark.parametrize("magnitude", [1e-45, 1e-39, 1e-20, 1e-9, 1e30, 3e38])
def test_extreme_magnitudes(type_name, magnitude):
    """Scales outside fp16 saturate or give zero for the same blocks, with the same indices as for ordinary input."""
    x = np.full(128, magnitude, dtype=np.float32)
    x[1::3] *= -1
    if magnitude < 1:
        core = turboquant.quantize(x, type_name)
    else:
        with pytest.warns(RuntimeWarning, match="above fp16"):
            core = turboquant.quantize(x, type_name)
    np.testing.assert_array_equal(core, reference.quantize(x, type_name))
    assert core.any() == (magnitude > 1)


def test_non_finite_blocks(type_name):
    x = np.random.default_rng(5).standard_normal((4, 256)).astype(np.float32)
    x[0, 1], x[1, 200], x[2, 130] = np.nan, np.inf, -np.inf
    with pytest.warns(RuntimeWarning, match="3 of"):
        core = turboquant.quantize(x, type_name)
    zero = (blocks(core, type_name) == 0).all(axis=1)
    np.testing.assert_array_equal(zero, (blocks(reference.quantize(x, type_name), type_name) == 0).all(axis=1))
    assert zero.sum() == 3


@pytest.mark.parametrize("block", [128, 64, 32])
def test_rotate(block):
    x = heavy_tailed(np.random.default_rng(6), (129, 2 * block))
    tolerance = 1e-6 * np.sqrt(np.square(x.astype(np.float64)).reshape(129, 2, block).sum(-1).max())
    np.testing.assert_allclose(turboquant.rotate(x, block), reference.rotate(x, block), rtol=0, atol=tolerance)
    np.testing.assert_allclose(turboquant.unrotate(x, block), reference.unrotate(x, block), rtol=0, atol=tolerance)
    np.testing.assert_allclose(turboquant.unrotate(turboquant.rotate(x, block), block), x, rtol=0, atol=tolerance)


@pytest.mark.parametrize("block", [128, 64, 32])
def test_prepare(block):
    x = heavy_tailed(np.random.default_rng(7), (129, 2 * block))
    core = turboquant.prepare(x, block)
    scale, integers = reference.prepare(x, block)
    np.testing.assert_allclose(core["scale"], scale, rtol=1e-6)
    assert np.abs(core["q"] - integers).max() <= 1 and (core["q"] != integers).mean() < 1e-3  # ties in the last bit
    np.testing.assert_array_equal(core["sum"], core["q"].sum(-1, dtype=np.int32))
    assert (np.abs(core["q"].astype(int)).max(-1) == 127).all()


def test_dot(type_name):
    """Equal to the reference up to float rounding, and to decoded rows up to the rounding of the query."""
    block = reference.FORMATS[type_name].block
    rng = np.random.default_rng(8)
    for rows in ROWS:
        query, x = rng.standard_normal((2, 2 * block)).astype(np.float32), heavy_tailed(rng, (rows, 2 * block))
        q = reference.quantize(x, type_name)
        back = reference.dequantize(q, type_name).astype(np.float64)
        result = turboquant.dot(query, q, type_name)
        assert result.shape == (2, rows)
        norms = np.linalg.norm(query, axis=1)[:, None] * np.linalg.norm(back, axis=1)
        assert (np.abs(result - query @ back.T) <= 0.01 * norms).all()
        # a tie of prepare in the last bit moves one product by a query step
        assert (np.abs(result - reference.dot(query, q, type_name)) <= 1e-3 * norms).all()


def test_dot_is_exact_on_grid_queries(type_name):
    """Queries whose rotation is integers times a power of two, so that only the last float sums are rounded."""
    block = reference.FORMATS[type_name].block
    rng = np.random.default_rng(9)
    integers = rng.integers(-126, 127, (5, 2, block))
    integers[..., 0] = 127
    query = reference.unrotate(integers.reshape(5, -1) / 64, block).astype(np.float32)
    q = reference.quantize(rng.standard_normal((129, 2 * block)), type_name)
    prepared = turboquant.prepare(query, block)
    np.testing.assert_array_equal(prepared["q"], integers)
    back = reference.dequantize(q, type_name).astype(np.float64)
    norms = np.linalg.norm(query, axis=1)[:, None] * np.linalg.norm(back, axis=1)
    for result in (turboquant.dot(query, q, type_name), turboquant.dot(prepared, q, type_name)):
        assert (np.abs(result - query.astype(np.float64) @ back.T) <= 1e-6 * norms).all()


# ---- the specification, and what was generated from it --------------------------------------------------------------

FORMAT = (ROOT / "cpp" / "FORMAT.md").read_text(encoding="utf-8")


def hex_after(label, text):
    """The bytes of the line `    label  50 c3 | 46 ...`."""
    return bytes.fromhex(re.search(rf"^    {label} +([0-9a-f |]+)$", text, re.M).group(1).replace("|", ""))


def test_format_document_lists_the_types():
    rows = re.findall(r"^\| (turbo[\w, ]+) \| ([\d, ]+) \| (\d) \| ([\d, ]+) \| ([\d., ]+) \|", FORMAT, re.M)
    listed = [
        (name, int(block), int(bits), int(size), float(per_value))
        for names, blocks, bits, sizes, values in rows
        for name, block, size, per_value in zip(*(part.split(", ") for part in (names, blocks, sizes, values)))
    ]
    assert listed == [(t.name, t.block, t.bits, t.block_bytes, t.bits_per_value) for t in turboquant.types()]


@pytest.mark.parametrize("type_name", ["turbo4_32", "turbo3_32", "turbo2_32"])
def test_format_document_decodes_its_blocks_rightly(type_name):
    """The worked examples of FORMAT.md: bytes, indices, centroids, W and the two decoded values."""
    form = reference.FORMATS[type_name]
    text = re.search(rf"^### {type_name}\n(.*?)^#", FORMAT, re.M | re.S).group(1)
    q = np.frombuffer(hex_after("bytes", text), dtype=np.uint8)
    x = ((7 * np.arange(32) % 32) - 15.5) / 4
    np.testing.assert_array_equal(q, reference.quantize(x, type_name))
    np.testing.assert_array_equal(q, turboquant.quantize(x.astype(np.float32), type_name))

    def numbers(label):
        line = re.search(rf"^    {label} +([-0-9 |]+)$", text, re.M).group(1)
        return [int(number) for number in line.replace("|", "").split()]

    index = reference.unpack(q[2:], form.bits)
    assert numbers("index") == index.tolist()
    assert numbers("k") == reference.levels(form.bits)[index].tolist()
    written = text.replace("\u2212", "-")
    integers = reference.hadamard(32) @ (reference.signs(2, 32) * reference.levels(form.bits)[index])
    decoded = reference.dequantize(q, type_name)
    for i in (0, 1):
        stated_integer = re.findall(rf"W_{i}[^.:]*?(?:: | = )(-?\d+)", written)
        assert [int(n) for n in stated_integer] == [int(integers[i])]
        stated = re.search(rf"x_{i} = -?\d+ s = (-?[\d.]*\d)", written).group(1)
        assert float(stated) == pytest.approx(decoded[i], rel=2e-6)


def test_format_document_has_the_constants():
    for which in (1, 2):
        bits = np.unpackbits(np.frombuffer(hex_after(f"S{which}", FORMAT), dtype=np.uint8), bitorder="little")
        np.testing.assert_array_equal(np.where(bits, -1, 1), reference.signs(which))
    for bits in (2, 3, 4):
        step, levels = re.search(rf"^\| {bits} \| (0x[0-9a-fp.-]+) .*? \| (.*) \|$", FORMAT, re.M).groups()
        assert float.fromhex(step) == np.float32(reference.step(bits))
        half = reference.levels(bits)[1 << (bits - 1):]
        assert levels == " ".join(f"\u00b1{level}" for level in half)


def golden(type_name):
    for line in (ROOT / "tests" / "vectors" / f"{type_name}.txt").read_text(encoding="utf-8").splitlines():
        if not line.startswith("#"):
            kind, name, block, floats = line.split()
            yield kind, name, np.frombuffer(bytes.fromhex(block), np.uint8), np.frombuffer(bytes.fromhex(floats), "<f4")


def test_golden_vectors(type_name):
    """Decoding: core and oracle, bit for bit. Encoding: the core's bytes."""
    seen = set()
    for kind, name, block, floats in golden(type_name):
        seen.add(kind)
        if kind == "decode":
            for decode in (turboquant.dequantize, reference.dequantize):
                actual, nan = decode(block, type_name), np.isnan(floats)
                np.testing.assert_array_equal(np.isnan(actual), nan, err_msg=name)
                np.testing.assert_array_equal(actual.view("<u4")[~nan], floats.view("<u4")[~nan], err_msg=name)
        else:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", RuntimeWarning)  # some hold NaN, some saturate
                np.testing.assert_array_equal(turboquant.quantize(floats, type_name), block, err_msg=name)
    assert seen == {"decode", "encode"}


@pytest.mark.parametrize("tool", ["make_codebooks.py", "make_vectors.py"])
def test_checked_in_files_are_what_their_generator_writes(tool):
    command = [sys.executable, ROOT / "tools" / tool, "--check"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stdout + done.stderr


# ---- attention -------------------------------------------------------------------------------------------------------

def test_a_window_stands_for_the_last_rows():
    """Rows of f32 are read as they are, so that a window of them is attention over other rows."""
    rng = np.random.default_rng(0)
    q, k, v = (rng.standard_normal((heads, n, 64)) for heads, n in ((4, 3), (2, 9), (2, 9)))
    options = {"type_k": "f32", "type_v": "f32", "mask": np.triu(np.full((3, 9), -np.inf), k=7), "soft_cap": 2.0}
    k, v = k.astype(np.float32), v.astype(np.float32)
    plain = reference.attention(q, k, v, **options)
    for rows in (0, 1, 4, 9):
        spoiled = [np.concatenate([x[:, :9 - rows], np.full((2, rows, 64), np.nan, np.float32)], axis=1) for x in (k, v)]
        window = (k[:, 9 - rows:], v[:, 9 - rows:])
        np.testing.assert_array_equal(reference.attention(q, *spoiled, window=window, **options), plain)
    assert not np.isfinite(reference.attention(q, *spoiled, **options)).any()


def test_a_window_is_nearer_to_exact_attention():
    rng = np.random.default_rng(1)
    q, k, v = (rng.standard_normal((2, n, 128)).astype(np.float32) for n in (8, 100, 100))
    exact = reference.attention(q, k, v, type_k="f32", type_v="f32")
    encoded = [reference.quantize(x, "turbo3") for x in (k, v)]
    errors = [
        np.linalg.norm(reference.attention(q, *encoded, type_k="turbo3", type_v="turbo3",
                                           window=(k[:, 100 - rows:], v[:, 100 - rows:])) - exact)
        for rows in (0, 30, 60, 100)
    ]
    assert errors == sorted(errors, reverse=True) and errors[-1] < 1e-12 < 0.2 * errors[0] < errors[2]


# ---- text ------------------------------------------------------------------------------------------------------------

def test_docstring_examples():
    assert doctest.testmod(turboquant).attempted > 0 and doctest.testmod(turboquant).failed == 0


def test_versions_agree():
    project = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    assert re.search(r'^version = "(.*)"', project, re.M).group(1) == turboquant.__version__
    assert f"VERSION {turboquant.__version__} " in (ROOT / "CMakeLists.txt").read_text(encoding="utf-8")
