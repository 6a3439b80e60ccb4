"""The NumPy reference compared with theory, and the scalar kernels of the core compared with the reference."""
import doctest
import hashlib
import importlib.util
import itertools
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

#: Mean squared error on N(0,1) that the trellis types must not exceed in blocks of 128. Their encoder reaches 0.0823,
#: 0.0202 and 0.00498.
TRELLIS_ERROR = {2: 0.0835, 3: 0.0240, 4: 0.0066}

LLOYD_MAX = [name for name, form in reference.FORMATS.items() if isinstance(form.family, reference.LloydMax)]
TRELLIS = [name for name, form in reference.FORMATS.items() if isinstance(form.family, reference.Trellis)]


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


def test_every_type_has_a_family():
    assert [*LLOYD_MAX, *TRELLIS] == list(reference.FORMATS)


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


# ---- the oracle of the trellis types against the definition ----------------------------------------------------------

def fields_of(type_name, block):
    """Scale, path bits u(-6) ... u(n-1) by step, and rests by element, of one block: bit by bit as in FORMAT.md."""
    bits, n = reference.FORMATS[type_name].bits, reference.FORMATS[type_name].block
    number = int.from_bytes(bytes(block), "little")
    u = {t: number >> (16 + t) & 1 for t in range(-6, n)}
    scale = float(np.array((number & 0x3FF) << 5, "<u2").view("<f2"))
    rest_bits = 16 + n  # the first bit of the rests
    rests = []
    for i in range(n):
        low = number >> (rest_bits + 8 * (i % (n // 4)) + 2 * (i // (n // 4))) & 3 if bits >= 3 else 0
        high_bits = rest_bits + (2 * n if bits >= 3 else 0)
        high = number >> (high_bits + 8 * (i % (n // 8)) + i // (n // 8)) & 1 if bits != 3 else 0
        rests.append(low | high << 2 if bits == 4 else low | high)
    return scale, u, rests


def levels_of(type_name, block):
    """The levels of one block from the definition."""
    n, book = reference.FORMATS[type_name].block, reference.FORMATS[type_name].family.levels
    _, u, rests = fields_of(type_name, block)
    level = [0] * n
    for t in range(n):
        i = t % 8 * (n // 8) + t // 8
        c0, c1 = u[t - 2] ^ u[t - 5], u[t] ^ u[t - 1] ^ u[t - 6]
        level[i] = int(book[4 * rests[i] + 2 * c1 + c0])
    return level


@pytest.mark.parametrize("type_name", TRELLIS)
def test_trellis_split_is_the_documented_layout(type_name):
    form = reference.FORMATS[type_name]
    q = np.random.default_rng(1).integers(0, 256, (20, form.block_bytes), dtype=np.uint8)
    scale, level = form.family.split(q)
    for block, d, levels in zip(q, scale, level):
        assert levels.tolist() == levels_of(type_name, block)
        np.testing.assert_array_equal(np.float64(d), fields_of(type_name, block)[0])


def test_subsets_are_in_ungerboecks_form():
    """The two branches that leave a state, and the two that enter one, have subsets that differ in c1 alone, as far
    apart as possible; and a path bit changes exactly the steps in which it has a tap."""
    rng = np.random.default_rng(2)
    path = rng.integers(0, 2, (100, 6 + 20))
    for step, after in ((10, 0), (4, 6)):  # the newest bit of step 10's subset, the oldest
        flipped = path.copy()
        flipped[:, 6 + step] ^= 1
        assert (reference.subsets(path) ^ reference.subsets(flipped))[:, step + after].tolist() == [2] * 100
    changed = (reference.subsets(path) ^ reference.subsets(flipped)).tolist()
    assert changed == [[0] * 4 + [2, 2, 1, 0, 0, 1, 2] + [0] * 9] * 100


@pytest.mark.parametrize("seed", range(5))
def test_best_path_is_the_best_of_all_paths(seed):
    """Compared with all 2^(6 + n) paths of n = 6 steps. Small metrics have many ties."""
    n = 6
    metric = np.random.default_rng(seed).integers(0, 255 if seed else 3, (4, n, 4))
    every = np.array(list(itertools.product((0, 1), repeat=6 + n)))
    costs = metric[:, np.arange(n), reference.subsets(every)].sum(-1)  # (4, paths)
    found = reference.best_path(metric)
    cost = np.take_along_axis(metric, reference.subsets(found)[..., None], axis=-1)[..., 0].sum(-1)
    np.testing.assert_array_equal(cost, costs.min(-1))
    # Of equal paths the final state is the smallest, and then each bit, backwards, is 0 where it can be.
    newest_first = every[:, ::-1]
    for one, row in zip(found, costs):
        ties = newest_first[row == row.min()].tolist()
        final = min(ties, key=lambda bits: sum(bit << j for j, bit in enumerate(bits[:6])))[:6]
        assert one[::-1].tolist() == min(bits for bits in ties if bits[:6] == final)


@pytest.mark.parametrize("type_name", TRELLIS)
def test_trellis_error_and_inner_products(type_name):
    form = reference.FORMATS[type_name]
    x = np.random.default_rng(4).standard_normal((2048, 128)).astype(np.float32)
    for encode in (turboquant.quantize, reference.quantize):
        q = encode(x, type_name)
        assert squared_errors(x, q, type_name).sum() / energies(x, type_name).sum() <= TRELLIS_ERROR[form.bits]
        back = reference.dequantize(q, type_name).astype(np.float64)
        gain = (x * back).reshape(-1, form.block).sum(-1) / energies(x, type_name)
        # The scale has five bits of mantissa: half a step is between 1/64 and 1/128.
        assert np.abs(gain - 1).max() < 1 / 64 + 1e-3 and abs(gain.mean() - 1) < 2e-3
        # and the same for inner products with other vectors
        other = np.random.default_rng(5).standard_normal(x.shape)
        products, wanted = (other * back).sum(-1), (other * x).sum(-1)
        assert (products * wanted).sum() / np.square(wanted).sum() == pytest.approx(1, abs=0.02)


@pytest.mark.parametrize("type_name", TRELLIS)
def test_trellis_scale(type_name):
    """Rounded to ten bits with halves upwards; limited to 64512; a zero scale is a block of zeros."""
    form = reference.FORMATS[type_name]
    empty = np.random.default_rng(6).integers(0, 256, form.block_bytes, dtype=np.uint8)
    empty[0], empty[1] = 0, empty[1] & 0xFC
    step = 2.0**-19  # of the subnormal scales
    for d, stored in ((1, 1), (1 + 1 / 32, 1 + 1 / 32), (1 + 1 / 64, 1 + 1 / 32), (1 + 1 / 68, 1), (step / 2, step),
                      (0.4 * step, 0), (0, 0), (64512, 64512), (65520, 64512), (1e30, 64512)):
        block = form.family.with_scale(empty, np.float64(d))
        assert form.family.split(block)[0] == stored
        if stored:
            assert (block[2:] == empty[2:]).all() and block[1] >> 2 == empty[1] >> 2
        else:
            assert not block.any()


def test_trellis_constants_are_those_of_the_core():
    """The oracle repeats them; the core has them in two headers."""
    family = (ROOT / "cpp" / "src" / "families" / "trellis.h").read_text(encoding="utf-8")
    encoder = (ROOT / "cpp" / "src" / "generic" / "trellis.h").read_text(encoding="utf-8")

    def constant(name, text, form=r"([^;]+?)"):
        return re.search(rf"\b{name}(?:\[\w+\])? = {form};", text).group(1)

    for bits in (2, 3, 4):
        book = re.search(rf"struct TrellisBook<{bits}> {{(.*?)\n}};", family, re.S).group(1)
        positive = constant("positive", book, r"{(.*?)}")
        assert tuple(int(level) for level in positive.split(",")) == reference.TRELLIS_LEVELS[bits]
        assert float(constant("step", book).rstrip("f")) == reference.TRELLIS_STEP[bits]
        assert float(constant("granular", book)) == reference.GRANULAR[bits]
    scales = re.search(r"trellis_scale\[\w+\] = {(.*?)};", encoder, re.S).group(1).split("\n", 1)[1]
    assert tuple(float(scale) for scale in scales.split(",")) == reference.SCALES
    tapped = [int(reference.subsets(np.eye(7, dtype=int)[6 - ago])[0]) for ago in range(7)]
    for place, mask in enumerate(re.search(r"path_taps0 = (\d+), path_taps1 = (\d+);", family).groups()):
        assert int(mask, 8) == sum((subset >> place & 1) << ago for ago, subset in enumerate(tapped))
    assert int(constant("path_memory", family)) == reference.MEMORY
    assert int(constant("scale_bits", family)) == reference.SCALE_BITS
    assert int(constant("most_distance", encoder)) == reference.MOST_DISTANCE
    assert int(constant("metric_shift", encoder)) == reference.METRIC_SHIFT
    assert int(constant("grid_margin", encoder)) == reference.GRID_MARGIN
    assert int(constant("greatest_scale_code", encoder), 16) == reference.LARGEST_SCALE_CODE


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
    np.testing.assert_array_equal(info.levels, form.family.levels)
    assert np.float32(info.step) == np.float32(form.family.step)
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
    if type_name in TRELLIS:
        scale = np.array([[fields_of(type_name, block)[0]] for block in q])
        level = np.array([levels_of(type_name, block) for block in q])
    else:
        scale = q[:, :2].copy().view("<f2").astype(np.float64)
        level = reference.levels(form.bits)[reference.unpack(q[:, 2:], form.bits)]
    y = scale * form.family.step * level
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


@pytest.mark.parametrize("type_name", LLOYD_MAX)
def test_grid_points_survive(type_name):
    """Reconstructions encode to the bytes they came from, in the core and in the oracle.

    In a trellis type they get another path: the encoder searches it on a grid that is not that of the stored scale.
    """
    q = grid_rows(type_name, 4)
    x = turboquant.dequantize(q, type_name)
    np.testing.assert_array_equal(reference.quantize(x, type_name), q)
    np.testing.assert_array_equal(turboquant.quantize(x, type_name), q)


def exact_oracle():
    """The encoder of tools/make_vectors.py, which has the transform of the core in float32."""
    spec = importlib.util.spec_from_file_location("make_vectors", ROOT / "tools" / "make_vectors.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.encode


def hard_blocks(rng, count, n):
    """Name -> blocks (count, n) in which many values are equal, near boundaries, far out or on the edges of fp16."""
    normal = rng.standard_normal((count, n))
    sign, one_hot = rng.choice([-1, 1], (count, 1)), np.eye(n)[rng.integers(0, n, count)]
    some = rng.random((count, 1)) < 0.5
    return {
        "normal": normal,
        "spike": one_hot * sign * np.exp(rng.uniform(-10, 10, (count, 1))),
        "spike after the rotation": reference.unrotate(one_hot * sign, n) + 1e-3 * normal * some,
        "constant": np.repeat(normal[:, :1], n, axis=1),
        "alternating": np.where(np.arange(n) % 2, 1, -1) * normal[:, :1],
        "equal magnitudes after the rotation": reference.unrotate(np.sign(normal), n),
        "integers": rng.integers(-3, 4, (count, n)),
        "Cauchy": rng.standard_cauchy((count, n)),
        "heavy tails after the rotation": reference.unrotate(rng.standard_t(1.5, (count, n)), n),
        "every magnitude": normal * 2.0 ** rng.uniform(-149, 126, (count, 1)),
        "the smallest scales": normal * 2.0 ** rng.uniform(-26, -10, (count, 1)),
        "the largest scales": normal * 2.0 ** rng.uniform(15.5, 16.5, (count, 1)),
    }


def test_encode_gives_the_bytes_of_the_exact_oracle(type_name):
    encode = exact_oracle()
    for name, values in hard_blocks(np.random.default_rng(10), 40, reference.FORMATS[type_name].block).items():
        x = values.astype(np.float32)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", RuntimeWarning)  # some saturate
            np.testing.assert_array_equal(turboquant.quantize(x, type_name), encode(type_name, x), err_msg=name)


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


def worked_example(type_name):
    """The text of a worked example, its bytes, the decoded block, and a function that reads the numbers of a line."""
    text = re.search(rf"^####? {type_name}\n(.*?)^#", FORMAT, re.M | re.S).group(1)
    q = np.frombuffer(hex_after("bytes", text), dtype=np.uint8)
    x = ((7 * np.arange(32) % 32) - 15.5) / 4
    np.testing.assert_array_equal(q, reference.quantize(x, type_name))
    np.testing.assert_array_equal(q, turboquant.quantize(x.astype(np.float32), type_name))

    def numbers(label):
        line = re.search(rf"^    {label} +([-0-9 |]+)$", text, re.M).group(1)
        return [int(number) for number in line.replace("|", "").split()]

    return text.replace("\u2212", "-"), q, numbers


def check_decoded_values(type_name, text, q, level):
    """W, s and the two decoded values."""
    form = reference.FORMATS[type_name]
    integers = reference.hadamard(32) @ (reference.signs(2, 32) * level)
    decoded = reference.dequantize(q, type_name)
    scale, step, product = re.search(r"s = ([\d.]+) \u00b7\s(0x[\da-f.p-]+) =\s([\d.]+\d)", text).groups()
    assert float(scale) == form.family.split(q)[0]
    assert float.fromhex(step) == np.float32(form.family.step / math.sqrt(32))
    assert float(product) == pytest.approx(float(scale) * float.fromhex(step), rel=2e-6)
    for i in (0, 1):
        stated_integer = re.findall(rf"W_{i}[^.:]*?(?:: | = )(-?\d+)", text)
        assert [int(n) for n in stated_integer] == [int(integers[i])]
        stated = re.search(rf"x_{i} = -?\d+ s = (-?[\d.]*\d)", text).group(1)
        assert float(stated) == pytest.approx(decoded[i], rel=2e-6)


@pytest.mark.parametrize("type_name", ["turbo4_32", "turbo3_32", "turbo2_32"])
def test_format_document_decodes_its_blocks_rightly(type_name):
    """The worked examples of FORMAT.md: bytes, indices, centroids, W and the two decoded values."""
    form = reference.FORMATS[type_name]
    text, q, numbers = worked_example(type_name)
    index = reference.unpack(q[2:], form.bits)
    assert numbers("index") == index.tolist()
    assert numbers("k") == reference.levels(form.bits)[index].tolist()
    check_decoded_values(type_name, text, q, reference.levels(form.bits)[index])


@pytest.mark.parametrize("type_name", ["turbo4_tcq_32", "turbo3_tcq_32", "turbo2_tcq_32"])
def test_format_document_decodes_its_trellis_blocks_rightly(type_name):
    """The worked examples of FORMAT.md: bytes, scale, path, subsets, rests, levels, W and the two decoded values."""
    text, q, numbers = worked_example(type_name)
    scale, u, rests = fields_of(type_name, q)
    path = list(u.values())
    assert numbers("start") == path[:6] and numbers("u") == path[6:]
    assert numbers("c") == reference.subsets(np.array(path)).tolist()
    assert numbers("rest") == rests
    assert numbers("k") == levels_of(type_name, q)
    word = int(q[0]) | int(q[1]) << 8
    assert f"`word` = {word:#x}" in text and f"{word & 0x3FF:#x}" in text
    assert re.search(rf"{(word & 0x3FF) << 5:#x} = {scale}\b", text)
    check_decoded_values(type_name, text, q, np.array(levels_of(type_name, q)))


def test_format_document_has_the_constants():
    for which in (1, 2):
        bits = np.unpackbits(np.frombuffer(hex_after(f"S{which}", FORMAT), dtype=np.uint8), bitorder="little")
        np.testing.assert_array_equal(np.where(bits, -1, 1), reference.signs(which))
    for bits in (2, 3, 4):
        step, levels = re.search(rf"^\| {bits} \| (0x[0-9a-fp.-]+) .*? \| (.*) \|$", FORMAT, re.M).groups()
        assert float.fromhex(step) == np.float32(reference.step(bits))
        half = reference.levels(bits)[1 << (bits - 1):]
        assert levels == " ".join(f"\u00b1{level}" for level in half)


def test_format_document_has_the_constants_of_the_trellis():
    text = FORMAT[FORMAT.index("## 6. Trellis-coded types"):]
    for bits in (2, 3, 4):
        family = reference.Trellis(bits)
        row = rf"^\| {bits} \| (0x[0-9a-fp.-]+) \u2248 ([\d.]+) \| ([\d.]+) \| (.*) \|$"
        step, rounded, granular, levels = re.search(row, text, re.M).groups()
        assert float.fromhex(step) == family.step and float(rounded) == reference.TRELLIS_STEP[bits]
        assert float(granular) == reference.GRANULAR[bits]
        assert levels == " ".join(f"\u00b1{level}" for level in reference.TRELLIS_LEVELS[bits])
    listed = re.search(r"f = ([\d., \n]+),\s+the outermost", text).group(1)
    assert tuple(float(scale) for scale in listed.split(",")) == reference.SCALES


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
