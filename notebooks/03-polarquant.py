# %% [markdown]
# # 3. PolarQuant: length, direction, and the best levels
#
# After a random rotation the values of a vector of length 1 follow $N(0, 1/d)$, whatever the vector was. So the
# levels can be chosen once and for all, where that density has its mass. What remains of each vector is one number,
# its length. That is PolarQuant's idea (length and direction apart), and TurboQuant's first algorithm: **no zero
# points, no ranges, no calibration data; one codebook for every vector.**

# %%
import matplotlib.pyplot as plt
import numpy as np
from common import outlier_vectors, real_layer, sliders, table

import turboquant
from turboquant import reference
from turboquant.theory import codebook, errors, polarquant, rotation, uniform

d = 128

# %% [markdown]
# ## The best levels for a known density: Lloyd and Max
#
# Two conditions must hold at the optimum: a boundary lies midway between its two levels, and a level is the mean of
# the density in its slot. Alternate the two, and they settle.

# %%
normal = codebook.normal()
books = {b: codebook.lloyd_max(normal, b) for b in range(1, 7)}
for b in (2, 3, 4):
    print(f"{b} bits: ±", books[b].levels[2 ** (b - 1):])
assert np.allclose(books[4].levels, reference.lloyd_max(4), atol=1e-6)  # the codec's, solved from closed forms


# %%
def show(bits=3):
    book = codebook.lloyd_max(normal, bits)
    x = np.linspace(-4, 4, 800)
    figure, axis = plt.subplots(figsize=(7, 2.9))
    axis.plot(x, np.exp(-np.square(x) / 2) / np.sqrt(2 * np.pi), color="0.4")
    axis.vlines(book.bounds, 0, 0.42, color="0.8", linewidth=0.8, label="boundaries")
    axis.plot(book.levels, np.zeros_like(book.levels), "o", color="tab:red", clip_on=False, label="Lloyd-Max levels")
    axis.plot(codebook.best_uniform(normal, bits).levels, np.full(2**bits, 0.02), "|", color="tab:blue",
              label="best equally spaced levels")
    axis.set(xlabel="value of N(0,1)", ylabel="density", ylim=(0, 0.42))
    axis.set_title(f"{2**bits} levels, mean squared error {book.mse:.4f}")
    axis.legend(loc="upper right")
    plt.show()


show()

# %%
sliders(show, bits=(1, 5, 1))

# %% [markdown]
# Slots are narrow where values are dense and wide in the tails. How good is that? Shannon's limit for $N(0,1)$ is
# $4^{-b}$: no code of that rate can do better, however many values it treats at once.

# %%
bits = list(books)
lloyd = {b: books[b].mse for b in bits}
spaced = {b: codebook.best_uniform(normal, b).mse for b in bits}
shannon = {b: codebook.shannon_bound(b) for b in bits}
gap_db = {b: 10 * np.log10(lloyd[b] / shannon[b]) for b in bits}
table(("bits", "", bits), ("Shannon", ".5f", list(shannon.values())), ("Lloyd-Max", ".5f", list(lloyd.values())),
      ("above Shannon, dB", ".2f", list(gap_db.values())), ("best equal spacing", ".5f", list(spaced.values())))

# %% [markdown]
# Lloyd-Max stays within 4.4 dB, about 0.7 bit, of what is possible at all; a scalar quantizer cannot close that gap,
# a code over many values can, as the section on the trellis shows. Against equal spacing Lloyd-Max gains little at 2
# bits and a fifth of the error at 4.
#
# ## One codebook for every vector
#
# Gaussian vectors, vectors with outliers, real keys and values: rotate, divide by the length, round to the nearest
# level. The error relative to the vector is the codebook's, or a little less where a few channels dominate and the
# tails are short. Without the rotation the same codebook is useless for all but Gaussian vectors.

# %%
layer = real_layer()
vectors = {
    "N(0,1)": np.random.default_rng(5).standard_normal((4096, d)),
    "five outliers": outlier_vectors(4096, d, seed=3),
    "real K": np.concatenate(layer.k).astype(np.float64),
    "real V": np.concatenate(layer.v).astype(np.float64),
}
R, I = reference.rotation_matrix(d), np.eye(d)


def per_vector(x, y):
    """Squared error relative to each vector, then the mean over vectors."""
    return float((np.square(y - x).sum(-1) / np.square(x).sum(-1)).mean())


rotated = {b: [per_vector(x, polarquant.roundtrip(x, b, R, norm_correction=False)) for x in vectors.values()]
           for b in (2, 3, 4)}
unrotated = {b: [per_vector(x, polarquant.roundtrip(x, b, I, norm_correction=False)) for x in vectors.values()]
             for b in (2, 3, 4)}
minmax = {b: [per_vector(x, uniform.quantize(x, b).values) for x in vectors.values()] for b in (2, 3, 4)}
table(("vectors", "", list(vectors)),
      *((f"{b} bits", ".4f", rotated[b]) for b in rotated),
      *((f"unrotated, {b}", ".4f", unrotated[b]) for b in unrotated),
      *((f"min-max, {b}", ".4f", minmax[b]) for b in minmax))
print("theory: " + ", ".join(f"{lloyd[b]:.4f} at {b} bits" for b in rotated))


# %%
def scatter(bits=3, rotate=True):
    figure, axes = plt.subplots(1, 4, figsize=(9, 2.6))
    for axis, (name, x) in zip(axes, vectors.items()):
        some = x[:: len(x) // 24]
        back = polarquant.roundtrip(some, bits, R if rotate else I)
        axis.plot(some.ravel(), back.ravel(), ".", markersize=1.5)
        axis.axline((0, 0), slope=1, color="tab:red", linewidth=0.6)
        axis.set(title=f"{name}: {per_vector(some, back):.3f}", xlabel="value")
    axes[0].set_ylabel(f"after {bits} bits")
    plt.show()


scatter()

# %%
sliders(scatter, bits=(1, 6, 1), rotate=[True, False])

# %% [markdown]
# ## Norm correction
#
# Levels are means, and means vary less than the values they stand for. So a reconstruction is too short on average:
# its squared length is $1 - \mathrm{MSE}$ of the original's, and every inner product with it shrinks by as much.
# Attention scores are inner products. The cure is free: store the length divided by the length of the *chosen
# levels*. The squared error hardly changes, and the bias shrinks. (The codec goes one step further. It chooses the
# scale so that the inner product of a block with itself comes out right, and searches for the best assignment first.)

# %%
x = vectors["real K"]
back = {
    "norm as it is": {b: polarquant.roundtrip(x, b, R, norm_correction=False) for b in (2, 3, 4)},
    "norm correction": {b: polarquant.roundtrip(x, b, R) for b in (2, 3, 4)},
    "the codec": {b: turboquant.dequantize(turboquant.quantize(np.float32(x), f"turbo{b}"), f"turbo{b}").astype(float)
                  for b in (2, 3, 4)},
}
length = {name: {b: float(np.linalg.norm(y, axis=1).mean() / np.linalg.norm(x, axis=1).mean()) for b, y in row.items()}
          for name, row in back.items()}
slope = {name: {b: float(((x * y).sum(1) / np.square(x).sum(1)).mean()) for b, y in row.items()}
         for name, row in back.items()}
loss = {name: {b: per_vector(x, y) for b, y in row.items()} for name, row in back.items()}
for title, values in (("length, relative to the original", length), ("inner product with the original", slope),
                      ("squared error", loss)):
    print(title)
    table(("", "", list(values)), *((f"{b} bits", ".4f", [row[b] for row in values.values()]) for b in (2, 3, 4)))
    print()

# %% [markdown]
# ## A code over many values: the trellis
#
# Lloyd-Max has the best levels for values that are rounded one by one. Trellis-coded quantization takes twice as many
# levels, but a value may use only every fourth of them, its *subset*. One of its $b$ bits is a path bit; the last seven
# path bits determine the subset, and the other $b - 1$ bits choose a level in it. So all values of a block are rounded
# together: the encoder compares the paths and takes the one whose subsets suit the values best. That is a search over
# $2^{134}$ paths for a block of 128, and the Viterbi algorithm does it exactly with 64 states. (`turboquant explore`
# draws the path of a block.)
#
# Here the levels of the `_tcq` types quantize N(0,1) at exactly $b$ bits, in paths of 512 values.

# %%
normals = np.random.default_rng(6).standard_normal((512, 512))


def trellis_mse(b):
    levels = turboquant.codebook(f"turbo{b}_tcq").astype(np.float64)
    error = np.stack([np.square(normals - subset[codebook.nearest(normals, subset)])
                      for subset in (levels[c::4] for c in range(4))], axis=-1)  # of every subset
    path = reference.best_path(np.rint(1e6 * error).astype(np.int64))
    return float(np.take_along_axis(error, reference.subsets(path)[..., None], axis=-1).mean())


widths = [2, 3, 4]
trellis = {b: trellis_mse(b) for b in widths}
names = {"best equal spacing": spaced, "Lloyd-Max": lloyd, "trellis": trellis}
above = {name: {b: 10 * np.log10(mse[b] / shannon[b]) for b in widths} for name, mse in names.items()}
table(("bits", "", widths), ("Shannon", ".5f", [shannon[b] for b in widths]),
      *((name, ".5f", [mse[b] for b in widths]) for name, mse in names.items()),
      *((f"{name}, dB", ".2f", list(row.values())) for name, row in above.items()))

# %%
figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.2))
left.semilogy(widths, [shannon[b] for b in widths], color="0.4", label="Shannon's limit")
for (name, mse), mark, color in zip(names.items(), "|os", ("tab:blue", "tab:red", "tab:green")):
    left.semilogy(widths, [mse[b] for b in widths], mark, color=color, markersize=9, label=name)
    right.plot(widths, list(above[name].values()), marker=mark, color=color, label=name)
left.set(xlabel="bits per value", ylabel="mean squared error of N(0,1)", xticks=widths)
right.set(xlabel="bits per value", ylabel="dB above Shannon's limit", xticks=widths, ylim=(0, None))
left.legend()
plt.show()

# %% [markdown]
# The trellis closes more than half of the gap, with the same number of bits. The codec's types have the same advantage.
# They also store a scale for each block of 128, which costs an eighth of a bit per value and lets the levels follow the
# block, and they correct the norm as before. So they are compared with Shannon's limit at $b + 1/8$ bits.

# %%
blocks = normals.reshape(-1, d).astype(np.float32)
coded = {f"turbo{b}{kind}": errors.relative_mse(blocks, turboquant.dequantize(
             turboquant.quantize(blocks, f"turbo{b}{kind}"), f"turbo{b}{kind}"))
         for b in widths for kind in ("", "_tcq")}
coded_above = {info.name: 10 * np.log10(coded[info.name] / codebook.shannon_bound(info.bits_per_value))
               for info in turboquant.types() if info.name in coded}
table(("type", "", list(coded)), ("squared error", ".5f", list(coded.values())),
      ("above Shannon, dB", ".2f", [coded_above[name] for name in coded]))

# %% [markdown]
# ## What it costs in memory
#
# A block of $n$ values stores $n$ indices and one fp16 scale. With blocks of 128 the scale is 0.125 bit per value.

# %%
types = turboquant.types()
ratio = {info.name: 16 / info.bits_per_value for info in types}
table(("type", "", [info.name for info in types]), ("values", "", [info.block for info in types]),
      ("bytes", "", [info.block_bytes for info in types]), ("bits/value", "g", [info.bits_per_value for info in types]),
      ("smaller than f16 by", ".2f", list(ratio.values())))

# %% [markdown]
# ## What to take with you
#
# - The error of a rotated vector does not depend on the vector: 0.1175, 0.0345, 0.0095 at 2, 3, 4 bits.
# - Each bit is worth a factor of nearly 4, as Shannon says it must; Lloyd-Max is up to 4.4 dB above his limit.
# - A trellis rounds the values of a block together and stays within 2 dB of the limit, without a bit more.
# - Correct the norm: the bias of rounding is systematic, and inner products see it.
#
# The paper has a second stage for the bias: one bit per channel of QJL. [The next notebook](04-qjl.ipynb) shows why
# the codec does not use it.
