"""turboquant.theory against closed forms, published tables and the reference codec."""
import math

import numpy as np
import pytest
from turboquant import reference
from turboquant.theory import codebook, errors, polarquant, qjl, rotation, uniform

#: Mean squared error of the best 2**bits levels for N(0,1), and of the best equally spaced: Max 1960, tables I, II.
MAX_TABLE = {1: (0.3634, 0.3634), 2: (0.1175, 0.1188), 3: (0.03454, 0.03744), 4: (0.009497, 0.01154),
             5: (0.002499, 0.003490)}


def gauss(shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape)


# ---- uniform ---------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("bits", [1, 2, 4, 8])
def test_uniform_is_the_definition(bits):
    x = gauss((50, 64)) * np.where(np.arange(64) < 5, 20, 1)
    done = uniform.quantize(x, bits)
    np.testing.assert_allclose(done.width, (x.max(1) - x.min(1)) / (2**bits - 1))
    worst = np.abs(done.values - x).max(axis=1)
    assert (worst <= done.width / 2 * (1 + 1e-12)).all()
    assert done.index.min() == 0 and done.index.max() == 2**bits - 1  # both ends of the range are levels
    grid = x.min(1)[:, None, None] + done.width[:, None, None] * np.arange(2**bits)[:, None]
    np.testing.assert_allclose(done.values, grid[np.arange(50)[:, None], done.index, 0])
    np.testing.assert_allclose(np.abs(done.values - x), np.abs(x[:, None] - grid).min(axis=1), atol=1e-12)
    assert done.used(bits).tolist() == [len(set(row)) for row in done.index]


def test_uniform_error_is_a_twelfth_of_the_squared_slot():
    """For values that are spread evenly within the slots."""
    done = uniform.quantize(x := np.random.default_rng(1).random((1, 200_000)), 6)
    assert np.square(done.values - x).mean() == pytest.approx(float(done.width[0]) ** 2 / 12, rel=0.01)


def test_uniform_of_equal_values_is_exact():
    done = uniform.quantize(np.full(8, 3.7), 4)
    assert done.width == 0 and (done.values == 3.7).all()


def test_uniform_refuses_no_bits():
    with pytest.raises(ValueError, match="bits: got 0"):
        uniform.quantize([1.0, 2.0], 0)


# ---- rotation --------------------------------------------------------------------------------------------------------

def test_random_rotation_is_orthonormal_and_uniform():
    n = 64
    matrices = np.array([rotation.random_rotation(n, seed) for seed in range(300)])
    np.testing.assert_allclose(matrices[0] @ matrices[0].T, np.eye(n), atol=1e-12)
    assert not np.allclose(matrices[0], matrices[1])
    np.testing.assert_array_equal(matrices[3], rotation.random_rotation(n, 3))
    drawn_alike = matrices[0] @ gauss((n, n), seed=0).T  # vectors of the same seed are vectors like all others
    assert np.square(np.diag(drawn_alike)).mean() < 2  # n/2 if the matrix were made of the same numbers
    # Every entry has mean 0 and variance 1/n. LAPACK's own signs would make the last column's diagonal one-sided.
    diagonal = np.einsum("mii->mi", matrices)
    assert np.abs(diagonal.mean(axis=0)).max() < 5 / math.sqrt(300 * n)
    assert np.square(matrices).mean(axis=0) == pytest.approx(1 / n, abs=6 * math.sqrt(2 / 300) / n)


@pytest.mark.parametrize("n", [1, 2, 32, 128])
def test_butterfly_is_the_matrix(n):
    x = gauss((3, n))
    stages = rotation.butterfly_stages(x)
    assert stages.shape == (n.bit_length(), 3, n)
    np.testing.assert_array_equal(stages[0], x)
    np.testing.assert_allclose(stages[-1], x @ rotation.hadamard(n).T, atol=1e-11)
    np.testing.assert_allclose(rotation.walsh_hadamard(rotation.walsh_hadamard(x)), x, atol=1e-12)
    for number, stage in enumerate(stages):  # a stage is H of order 2**number in every group of as many channels
        step = np.kron(np.eye(n >> number), rotation.hadamard(1 << number))
        np.testing.assert_allclose(stage, x @ step.T, atol=1e-11)


@pytest.mark.parametrize("shape", [(3,), (2, 0), (), (4, 96)])
def test_butterfly_needs_a_power_of_two(shape):
    with pytest.raises(ValueError, match="power of two"):
        rotation.butterfly_stages(np.zeros(shape))


def test_operations():
    assert (rotation.dense_multiplications(128), rotation.walsh_hadamard_additions(128)) == (16384, 896)


def test_peak_to_mean():
    assert rotation.peak_to_mean([[1, -1, 1, -1], [0, 0, -3, 0]]).tolist() == [1, 4]


# ---- codebooks -------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("bits", MAX_TABLE)
def test_normal_codebooks_are_those_of_max(bits):
    best = codebook.lloyd_max(codebook.normal(), bits)
    spaced = codebook.best_uniform(codebook.normal(), bits)
    assert best.mse == pytest.approx(MAX_TABLE[bits][0], rel=2.5e-3)  # the table has four digits, the last uncertain
    assert spaced.mse == pytest.approx(MAX_TABLE[bits][1], rel=2.5e-3)
    assert codebook.shannon_bound(bits) < best.mse <= spaced.mse + 1e-9
    if bits <= 4:  # solved in closed form there, by integration here
        np.testing.assert_allclose(best.levels, reference.lloyd_max(bits), atol=1e-6)


@pytest.mark.parametrize("density", [codebook.normal(), codebook.laplace(0.3), codebook.sphere_coordinate(16)])
def test_codebook_is_optimal_on_samples(density):
    """Its error on random values is what it says, and no level can be moved without loss."""
    book = codebook.lloyd_max(density, 3)
    x = np.linspace(density.low, density.high, 1_000_001)
    weight = density.function(x)
    weight /= weight.sum()

    def error(levels):
        return float(weight @ np.square(x - levels[codebook.nearest(x, levels)]))

    least = error(book.levels)
    assert least == pytest.approx(book.mse, rel=1e-4)
    for at in range(8):
        for move in (-0.01, 0.01):
            moved = book.levels.copy()
            moved[at] += move * (book.levels[-1] - book.levels[0])
            assert error(moved) > least


def test_one_bit_laplace_is_the_closed_form():
    """The best two levels of a symmetric density are +-E|x|, which is sigma/sqrt(2) here; the error is sigma**2 / 2."""
    book = codebook.lloyd_max(codebook.laplace(2.0), 1)
    np.testing.assert_allclose(book.levels, [-math.sqrt(2), math.sqrt(2)], rtol=1e-3)
    assert book.mse == pytest.approx(2.0, rel=1e-4)


def test_sphere_coordinate_is_what_rotated_unit_vectors_have():
    n = 16
    points = gauss((100_000, n))
    first = np.sort(points[:, 0] / np.linalg.norm(points, axis=1))
    density = codebook.sphere_coordinate(n)
    grid = np.linspace(-1, 1, 20_001)
    cumulative = np.cumsum(density.function(grid))
    theory = np.interp(first, grid, cumulative / cumulative[-1])
    distance = np.abs(theory - (np.arange(len(first)) + 0.5) / len(first)).max()
    assert distance < 1.95 / math.sqrt(len(first))  # Kolmogorov-Smirnov, one in a thousand


def test_nearest_is_nearest():
    levels = np.array([-1.0, 0.25, 2.0])
    x = gauss((4, 50)) * 2
    np.testing.assert_array_equal(codebook.nearest(x, levels), np.abs(x[..., None] - levels).argmin(axis=-1))


def test_codebook_errors():
    with pytest.raises(ValueError, match="bits: got 9"):
        codebook.lloyd_max(codebook.normal(), 9)
    with pytest.raises(ArithmeticError, match="after 3 steps"):
        codebook.lloyd_max(codebook.normal(), 4, steps=3)


# ---- polarquant ------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("bits", [2, 3, 4])
def test_polarquant_error_does_not_depend_on_the_vectors(bits):
    """Theorem 1 of TurboQuant: over random rotations the error is that of the codebook, even for the most lopsided."""
    x = gauss((50, 128))
    spike = np.eye(128)[:50] * 1e6
    wild = x * np.where(np.arange(128) % 40 == 0, 50, 1) * np.exp(gauss((50, 1), 1) * 4)
    theory = MAX_TABLE[bits][0]
    for vectors in (x, wild, spike):
        found = []
        for seed in range(30):
            back = polarquant.roundtrip(vectors, bits, rotation.random_rotation(128, seed), norm_correction=False)
            found.append((np.square(back - vectors).sum(1) / np.square(vectors).sum(1)).mean())
        assert np.mean(found) == pytest.approx(theory, rel=0.06)


def test_norm_correction_keeps_the_length():
    matrix, x = rotation.random_rotation(64), gauss((200, 64)) * 7
    exact = polarquant.roundtrip(x, 2, matrix)
    plain = polarquant.roundtrip(x, 2, matrix, norm_correction=False)
    norms = np.linalg.norm(x, axis=1)
    np.testing.assert_allclose(np.linalg.norm(exact, axis=1), norms)
    # Levels are conditional means: |c|**2 is 1 - mse of |x|**2 on average.
    shrunk = np.square(np.linalg.norm(plain, axis=1) / norms).mean()
    assert shrunk == pytest.approx(1 - MAX_TABLE[2][0], abs=0.01)


def test_polarquant_of_zeros_is_zeros():
    assert not polarquant.roundtrip(np.zeros((2, 32)), 3, np.eye(32)).any()


# ---- QJL -------------------------------------------------------------------------------------------------------------

def test_qjl_is_unbiased_with_the_stated_variance():
    n, m, draws = 32, 16, 4000
    q, x = gauss(n, 1), gauss(n, 2) * 3
    estimates = []
    for seed in range(draws):
        matrix = qjl.projections(n, m, seed)
        estimates.append(float(qjl.dot(q, qjl.encode(x, matrix), matrix)))
    variance = float(qjl.variance(q, x, m))
    assert np.mean(estimates) == pytest.approx(q @ x, abs=4 * math.sqrt(variance / draws))
    assert np.var(estimates) == pytest.approx(variance, rel=4 * math.sqrt(2 / draws) * 1.2)
    assert variance <= math.pi / 2 / m * (q @ q) * (x @ x)  # lemma 4 of TurboQuant


def test_qjl_decode_gives_the_same_products():
    q, x, matrix = gauss((5, 32)), gauss((2, 7, 32), 1), qjl.projections(32, 48, 2)
    signs = qjl.encode(x, matrix)
    assert set(np.unique(signs.sign)) == {-1, 1} and signs.sign.shape == (2, 7, 48) and signs.sign.dtype == np.int8
    products = np.einsum("qn,abn->qab", q, qjl.decode(signs, matrix))
    np.testing.assert_allclose(qjl.dot(q, signs, matrix), products, atol=1e-10)


def test_second_stage_is_unbiased_where_centroids_are_not():
    """Theorem 2 of TurboQuant. The centroids of its first stage alone shorten every product by their squared error."""
    n, draws = 32, 3000
    matrix = rotation.random_rotation(n)
    x = gauss(n, 1)
    q = x + 0.3 * gauss(n, 2)
    with_signs = [q @ qjl.with_residual(x, 2, matrix, qjl.projections(n, seed=seed)) for seed in range(draws)]
    error = np.std(with_signs) / math.sqrt(draws)
    assert np.mean(with_signs) == pytest.approx(q @ x, abs=4 * error)
    centroids = q @ polarquant.roundtrip(x, 1, matrix, norm_correction=False)
    assert q @ x - centroids > 20 * error


# ---- errors ----------------------------------------------------------------------------------------------------------

def test_kl_divergence_by_hand():
    p, q = [0.5, 0.5, 0.0], [0.25, 0.5, 0.25]
    assert errors.kl_divergence(p, q) == pytest.approx(0.5 * math.log(2))
    assert errors.kl_divergence([p, q], [p, q]).tolist() == [0, 0]
    assert errors.kl_divergence(q, p) == math.inf


def test_attention_error():
    q, k, v = gauss((4, 3, 32)), gauss((2, 40, 32), 1), gauss((2, 40, 16), 2)
    assert errors.attention_error(q, k, v, k, v) == (0.0, 0.0, 1.0)
    assert errors.attention_error(q, k, v, k, 1.1 * v).output == pytest.approx(0.01)
    assert errors.attention_error(q, k, v, k, 1.1 * v).kl == 0.0
    # a shift of all keys changes all scores of a query alike, and the softmax not at all
    shifted = errors.attention_error(q, k, v, k + 5.0, v)
    assert shifted.kl == pytest.approx(0, abs=1e-9) and shifted.same_top == 1.0
    wrong = errors.attention_error(q, k, v, -3 * k, v)
    assert wrong.kl > 1 and wrong.output > 0.1 and wrong.same_top < 0.5


def test_attention_error_causal():
    """Keys that no query may see do not matter; the last query sees them all."""
    q, k, v = gauss((2, 3, 32)), gauss((1, 10, 32), 1), gauss((1, 10, 32), 2)
    changed = k.copy()
    changed[:, 9] *= -1
    assert errors.attention_error(q[:, :2], k[:, :9], v[:, :9], changed[:, :9], v[:, :9], causal=True).kl == 0
    assert errors.attention_error(q, k, v, changed, v, causal=True).kl > 0
    mask = errors.causal_mask(3, 10)
    assert np.isfinite(mask).sum(axis=1).tolist() == [8, 9, 10]


def test_relative_mse():
    assert errors.relative_mse([3.0, 4.0], [3.0, 3.0]) == pytest.approx(1 / 25)
