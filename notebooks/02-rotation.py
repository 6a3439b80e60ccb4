# %% [markdown]
# # 2. Random rotation and the Walsh-Hadamard transform
#
# Outliers are outliers in one basis. Multiply the vector by an orthonormal matrix and its energy is shared out among
# all channels; multiply by the transpose and it is back. Attention does not even need the way back:
# $\langle Rq, Rk\rangle = \langle q, k\rangle$.
#
# This notebook shows what a random rotation does to the distribution of values, how the **Walsh-Hadamard transform**
# does the same with 18 times fewer operations, and why it needs random signs.

# %%
import math
import timeit

import matplotlib.pyplot as plt
import numpy as np
from common import outlier_vectors, real_layer, sliders, table

import turboquant
from turboquant import reference
from turboquant.theory import rotation

d = 128

# %% [markdown]
# ## A dense random rotation
#
# The Q of the QR decomposition of a Gaussian matrix is uniformly distributed over all rotations (and reflections).
# Lengths and inner products stay; the peak does not.

# %%
R = rotation.random_rotation(d)
x = outlier_vectors(10_000, d, outliers=5, factor=20, seed=1)
q = np.random.default_rng(2).standard_normal((10_000, d))

norm_change = np.abs(np.linalg.norm(x @ R.T, axis=1) / np.linalg.norm(x, axis=1) - 1).max()
dot_change = np.abs(((q @ R.T) * (x @ R.T)).sum(1) - (q * x).sum(1)).max()
print(f"largest change of a norm: {norm_change:.1e} (relative), of an inner product: {dot_change:.1e}")
assert norm_change < 1e-12 and dot_change < 1e-10

# %% [markdown]
# ## The Walsh-Hadamard transform
#
# $H_1 = (1)$, and $H_{2n}$ is built from four copies of $H_n$: $\begin{pmatrix}H_n & H_n\\ H_n & -H_n\end{pmatrix}$.
# All entries are $\pm1$, all rows are orthogonal, so $H_n/\sqrt n$ is orthonormal, and it is its own inverse.

# %%
H = {n: rotation.hadamard(n) for n in (2, 4, 8, 16, 128)}
for n, matrix in H.items():
    assert (matrix @ matrix.T == n * np.eye(n)).all()

figure, axes = plt.subplots(1, 5, figsize=(9, 2.1))
for axis, (n, matrix) in zip(axes, H.items()):
    axis.imshow(matrix, cmap="gray", interpolation="nearest")
    axis.set(title=f"$H_{{{n}}}$", xticks=[], yticks=[])
    axis.spines[:].set_visible(True)
    axis.grid(False)
plt.show()

# %% [markdown]
# Because of that structure nobody multiplies by the matrix. One stage replaces pairs of channels $(a, b)$ by
# $(a+b,\ a-b)$; stages pair channels at distance 1, 2, 4, …, and after $\log_2 n$ of them every output has seen every
# input: a *butterfly*. Watch a single outlier of 8 spread over 16 channels:

# %%
spike = np.zeros(16)
spike[5] = 8.0
stages = rotation.butterfly_stages(spike)
norms = np.linalg.norm(stages, axis=1)

figure, axis = plt.subplots(figsize=(7, 2.6))
picture = axis.imshow(stages / np.sqrt(2.0 ** np.arange(5))[:, None], cmap="RdBu_r", vmin=-8, vmax=8, aspect="auto")
axis.set(xlabel="channel", ylabel="stage", yticks=range(5), title="The butterfly (each stage divided by √2)")
axis.grid(False)
figure.colorbar(picture, label="value")
plt.show()
assert np.allclose(stages[-1], H[16] @ spike)

# %%
dense, butterfly = rotation.dense_multiplications(d), rotation.walsh_hadamard_additions(d)
print(f"d = {d}: dense rotation {dense:,} multiply-adds, butterfly {butterfly} additions")
print(f"{dense / butterfly:.0f} times fewer operations")

batch = x.astype(np.float32)
dense32 = R.astype(np.float32)
seconds = {
    "dense, NumPy's BLAS": min(timeit.repeat(lambda: batch @ dense32.T, number=1, repeat=5)),
    "butterfly, stages in NumPy": min(timeit.repeat(lambda: rotation.walsh_hadamard(x), number=1, repeat=3)),
    f"butterfly with signs, turboquant ({next(one.name for one in turboquant.kernels() if one.selected)})":
        min(timeit.repeat(lambda: turboquant.rotate(batch), number=1, repeat=5)),
}
print("\nnanoseconds per vector of 128, on the machine that ran this notebook:")
for name, value in seconds.items():
    print(f"{value / len(x) * 1e9:10.0f}  {name}")

# %% [markdown]
# BLAS is superb at dense products, and still the butterfly wins where its additions stay in registers. The weights of
# the rotation, 64 KiB of floats for a dense one, are gone as well.
#
# ## Before and after

# %%
flatten = {
    "as it is": x,
    "dense random rotation": x @ R.T,
    "Walsh-Hadamard": rotation.walsh_hadamard(x),
    "Walsh-Hadamard with signs": reference.rotate(x),
}
peak = {name: float(rotation.peak_to_mean(values).mean()) for name, values in flatten.items()}
table(("10,000 vectors of 128 channels, five of them 20x", "", list(peak)), ("max/mean", ".2f", list(peak.values())))


# %%
def show(factor=20.0, rotate=True):
    vector = outlier_vectors(1, d, outliers=5, factor=factor, seed=1)[0]
    after = reference.rotate(vector) if rotate else vector
    figure, (left, right) = plt.subplots(1, 2, sharey=True)
    left.bar(range(d), vector, color="tab:red")
    right.bar(range(d), after, color="tab:blue")
    left.set(xlabel="channel", ylabel="value", title=f"before: max/mean {rotation.peak_to_mean(vector):.1f}")
    right.set(xlabel="channel", title=f"after: max/mean {rotation.peak_to_mean(after):.1f}")
    plt.show()


show()

# %%
sliders(show, factor=(1.0, 40.0, 1.0), rotate=[True, False])

# %% [markdown]
# ## What distribution do rotated values have?
#
# One coordinate of a randomly rotated unit vector has a density proportional to $(1-x^2)^{(d-3)/2}$, whatever the
# vector was; at $d=128$ that is $N(0, 1/d)$ to the eye, with $\sigma = 1/\sqrt{128} = 0.0884$. **That is the point of
# rotating: the quantizer knows the distribution before it has seen the data.** One coordinate from each of the
# 10,000 vectors, and the same for real K:

# %%
def unit(vectors):
    return vectors / np.linalg.norm(vectors, axis=-1, keepdims=True)


layer = real_layer()
k = np.concatenate(layer.k)[:4096].astype(np.float64)


def one_coordinate(rows):
    """Coordinate i mod d of row i: one number from each vector."""
    return rows[np.arange(len(rows)), np.arange(len(rows)) % d]


def normal_quantiles(count):
    grid = np.linspace(-5, 5, 20_001)
    cumulative = np.cumsum(np.exp(-np.square(grid) / 2))
    return np.interp((np.arange(count) + 0.5) / count, cumulative / cumulative[-1], grid)


def ks_distance(values, sigma):
    """Kolmogorov-Smirnov: the largest distance between the cumulative distribution of the values and N(0, sigma²)."""
    ordered = np.sort(values) / sigma
    theory = np.array([(1 + math.erf(value / math.sqrt(2))) / 2 for value in ordered])
    steps = np.arange(len(ordered) + 1) / len(ordered)
    return max(np.abs(theory - steps[1:]).max(), np.abs(theory - steps[:-1]).max())


samples = {
    "outliers, dense rotation": one_coordinate(unit(x @ R.T)),
    "outliers, Walsh-Hadamard": one_coordinate(unit(reference.rotate(x))),
    "real K, Walsh-Hadamard": one_coordinate(unit(reference.rotate(k))),
    "real K as it is": one_coordinate(unit(k)),
}
sigma = 1 / math.sqrt(d)
std = {name: float(values.std()) for name, values in samples.items()}
distance = {name: ks_distance(values, sigma) for name, values in samples.items()}
critical = {name: 1.63 / math.sqrt(len(values)) for name, values in samples.items()}
print(f"theory: σ = {sigma:.4f}")
table(("", "", samples), ("measured σ", ".4f", std.values()), ("KS distance", ".4f", distance.values()),
      ("1% critical", ".4f", critical.values()))

# %%
figure, axes = plt.subplots(2, 4, figsize=(9, 4.6))
for column, (name, values) in enumerate(samples.items()):
    bell = np.linspace(-4, 4, 200) * sigma
    axes[0, column].hist(values, bins=np.linspace(-4, 4, 61) * sigma, density=True, color="0.75")
    axes[0, column].plot(bell, np.exp(-np.square(bell / sigma) / 2) / (sigma * math.sqrt(2 * math.pi)), "tab:red")
    axes[0, column].set(title=name.replace(", ", ",\n"), xlabel="value", yticks=[])
    theory = normal_quantiles(len(values)) * sigma
    axes[1, column].plot(theory, np.sort(values), ".", markersize=2)
    axes[1, column].plot([-4 * sigma, 4 * sigma], [-4 * sigma, 4 * sigma], "tab:red", linewidth=0.8)
    axes[1, column].set(xlabel="quantile of N(0, 1/d)", xlim=(-0.36, 0.36), ylim=(-0.6, 0.6))
axes[0, 0].set_ylabel("density")
axes[1, 0].set_ylabel("quantile of the values")
plt.show()

# %% [markdown]
# The dense rotation passes the test. The Walsh-Hadamard transform of the extreme vectors does not, and it should not:
# a coordinate is a signed sum of mostly five numbers, so its tails are *shorter* than the bell's. That is no loss, as
# nothing falls outside the codebook. Real K, whose energy sits in more channels, comes out close to the bell (4096
# values can still tell them apart), and is nowhere near it unrotated.
#
# ## Why signs? The collision
#
# Without random signs the transform is one fixed matrix, and vectors that look like one of its rows meet their match:
# all their energy collides in a single channel. Rows of $H$ are square waves, which real data do resemble: a constant
# offset is one of them. Random signs before the transform ($S_1$) make the dangerous vectors random vectors.

# %%
patterns = {
    "constant": np.ones(d),
    "alternating": np.where(np.arange(d) % 2, -1.0, 1.0),
    "square wave": np.where(np.arange(d) // 16 % 2, -1.0, 1.0),
}
collision = {name: (float(rotation.peak_to_mean(rotation.walsh_hadamard(pattern))),
                    float(rotation.peak_to_mean(reference.rotate(pattern)))) for name, pattern in patterns.items()}

figure, axes = plt.subplots(2, 3, sharex=True, sharey="row", figsize=(9, 3.8))
for column, (name, pattern) in enumerate(patterns.items()):
    axes[0, column].bar(range(d), rotation.walsh_hadamard(pattern), width=1.5, color="tab:red")
    axes[1, column].bar(range(d), reference.rotate(pattern), width=1.5, color="tab:blue")
    axes[0, column].set_title(name)
    axes[1, column].set_xlabel("channel")
axes[0, 0].set_ylabel("H alone")
axes[1, 0].set_ylabel("with signs")
plt.show()
table(("vector", "", list(collision)), ("max/mean, H alone", ".1f", [a for a, _ in collision.values()]),
      ("with signs", ".1f", [b for _, b in collision.values()]))

# %% [markdown]
# ## Why signs after the transform, too?
#
# For the error, the second sign vector $S_2$ does nothing: the codebook is symmetric, so flipping a value flips its
# reconstruction. What it does is to make the result safe for whatever transforms come next. $H$ undoes itself, and
# llama.cpp has a Hadamard rotation of its own for quantized caches:

# %%
S1, S2 = reference.signs(1), reference.signs(2)
wht = rotation.walsh_hadamard
twice = {
    "x": x,
    "H S1 x": wht(S1 * x),
    "H (H S1 x)": wht(wht(S1 * x)),
    "H (S2 H S1 x)": wht(S2 * wht(S1 * x)),
}
twice_peak = {name: float(rotation.peak_to_mean(values).mean()) for name, values in twice.items()}
table(("", "", list(twice_peak)), ("max/mean", ".2f", list(twice_peak.values())))

# %% [markdown]
# Two bare Hadamards are no rotation at all, and the outliers are back. With signs on both sides no neighbour can
# cancel the transform. The two sign vectors are fixed: the first 128 bits of a hash of their names, so that nobody
# chose them.
#
# ## What to take with you
#
# - A rotation keeps every norm and inner product, and takes max/mean from 22 to below 4.
# - Rotated values follow one known distribution, $N(0, 1/d)$, or something with shorter tails.
# - The Walsh-Hadamard transform needs 896 additions where a dense rotation needs 16,384 multiply-adds. With signs
#   before and after it is all the randomness that is needed.
#
# With the distribution known, the levels can be placed where the values are:
# [PolarQuant and Lloyd-Max](03-polarquant.ipynb).
