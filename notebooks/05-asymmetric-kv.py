# %% [markdown]
# # 5. Asymmetric K and V
#
# K and V take the same memory and do different jobs. An error in K goes through an exponential: it changes *which*
# tokens are read. An error in V is averaged over the tokens that are read, and stays as small as it is. **So bits
# belong to K first.** This notebook measures how much, on one layer here and on a whole model, and then what else can
# be had from V: protecting a few layers, and not reading what has no weight.

# %%
import gguf
import matplotlib.pyplot as plt
import numpy as np
from common import column, measured, real_layer, sliders, table

import turboquant
from turboquant.theory import errors

layer = real_layer()
q, k, v = layer.q[:, -128:], layer.k, layer.v  # the last 128 queries over 2048 keys

# %% [markdown]
# ## The same noise in K and in V
#
# Gaussian noise of a share $\varepsilon$ of each vector's size, added to K alone or V alone. For V the output is
# linear, so its squared error is exactly proportional to $\varepsilon^2$. For K it depends on how far apart the
# scores are: a second axis scales the queries, which sharpens or flattens attention.

# %%
rng = np.random.default_rng(0)
noise_k, noise_v = (rng.standard_normal(x.shape) * np.sqrt(np.square(x).mean(-1, keepdims=True)) for x in (k, v))


def output_error(share_k, share_v, sharpness=1.0):
    return errors.attention_error(sharpness * q, k, v, k + share_k * noise_k, v + share_v * noise_v, causal=True).output


shares = [0.01, 0.03, 0.1, 0.3]
from_k = [output_error(share, 0) for share in shares]
from_v = [output_error(0, share) for share in shares]
table(("noise", "", shares), ("output error / noise², in K", ".3f", [e / s**2 for e, s in zip(from_k, shares)]),
      ("in V", ".3f", [e / s**2 for e, s in zip(from_v, shares)]))
v_is_linear = max(from_v[i] / shares[i] ** 2 for i in range(4)) / min(from_v[i] / shares[i] ** 2 for i in range(4))

sharpness = [0.25, 0.5, 1, 2, 4]
sharp_k = [output_error(0.1, 0, s) for s in sharpness]
sharp_v = [output_error(0, 0.1, s) for s in sharpness]

figure, (left, right) = plt.subplots(1, 2)
left.loglog(shares, from_k, "o-", label="noise in K")
left.loglog(shares, from_v, "s-", label="noise in V")
left.set(xlabel="noise, relative to each vector", ylabel="squared error of output")
left.legend()
right.loglog(sharpness, sharp_k, "o-", label="10% noise in K")
right.loglog(sharpness, sharp_v, "s-", label="10% noise in V")
right.set(xlabel="scores multiplied by", ylabel="squared error of output")
right.set_xticks(sharpness, [f"{one:g}" for one in sharpness])
right.minorticks_off()
right.legend()
plt.show()
print(f"scores twice as far apart: the error from K grows {sharp_k[3] / sharp_k[2]:.1f}-fold, "
      f"the error from V {sharp_v[3] / sharp_v[2]:.1f}-fold")

# %% [markdown]
# V's error is less than its noise: weights sum to 1, and independent errors average out. K's error has no such limit.
# It grows with the spread of the scores, and models make scores as spread as they need them.
#
# ## Every pair of types, live
#
# The package's attention reads K and V in any pair of types, as llama.cpp does with the plugin. Error of the output
# on this layer, against f16:

# %%
types = ["f16", "q8_0", "turbo4", "turbo3", "turbo2"]


def encode(x, name):
    if name == "f16":
        return np.float16(x)
    if name.startswith("q"):
        return gguf.quants.quantize(x, gguf.GGMLQuantizationType[name.upper()])
    return turboquant.quantize(x, name)


stored_k, stored_v = ({name: encode(x, name) for name in types} for x in (k, v))
exact = turboquant.attention(q, stored_k["f16"], stored_v["f16"], type_k="f16", type_v="f16", causal=True)


def pair_error(type_k, type_v):
    out = turboquant.attention(q, stored_k[type_k], stored_v[type_v], type_k=type_k, type_v=type_v, causal=True)
    return float((np.square(out - exact).sum(-1) / np.square(exact).sum(-1)).mean())


live = np.array([[pair_error(a, b) for b in types] for a in types])


def heatmap(axis, values, title, spec):
    shown = np.log10(np.maximum(values, np.min(values[values > 0])))
    axis.imshow(shown, cmap="viridis_r")
    for (i, j), value in np.ndenumerate(values):
        axis.text(j, i, format(value, spec), ha="center", va="center", fontsize=8,
                  color="w" if shown[i, j] > shown.mean() else "k")
    axis.set(xticks=range(len(types)), xticklabels=types, yticks=range(len(types)), yticklabels=types, xlabel="V",
             ylabel="K", title=title)
    axis.grid(False)


grid = {(row["k"], row["v"]): row for row in measured()["grid"]}
kld = np.array([[grid[a, b]["kld"] or 0.0 for b in types] for a in types])
about = measured()["about"]

figure, axes = plt.subplots(1, 2, figsize=(9, 4.2))
heatmap(axes[0], live, "Squared error of this layer's output", ".4f")
heatmap(axes[1], kld, f"KL divergence of the predictions\n({about['model']})", ".4f")
plt.show()
additive = live[2:, 2:] / (live[2:, :1] + live[:1, 2:])
print(f"error of a pair over the sum of K's alone and V's alone: {additive.min():.2f} to {additive.max():.2f}")

# %% [markdown]
# On the left one layer, just computed; on the right a whole model, measured with llama.cpp and this plugin:
# KL divergence of its predictions from those with its own f16 cache, in nats per token. (Measured by
# `tools/measure_notebooks.py`: `prose-36m`, a model of 36 million parameters with heads of 128, on books that it has
# never seen, 4 chunks of 2048 tokens; standard errors are about 2% of each number.)
#
# Taking bits from K (down a column) costs more than taking them from V (along a row): half as much again on this
# layer, nearly four times as much in the whole model. Errors of K and V simply add up, so the pair to choose is the
# one where neither dominates.

# %%
share_of_k = {name: kld[i, 0] / (kld[i, 0] + kld[0, i]) for i, name in enumerate(types) if name.startswith("turbo")}
for name, share in share_of_k.items():
    print(f"{name}: {share:.0%} of the damage comes from K")

print("\nperplexity:")
table(("K \\ V", "", types), *((b, ".3f", [grid[a, b]["ppl"] for a in types]) for b in types))

swaps = [("turbo4", "turbo2"), ("turbo3", "turbo2"), ("turbo4", "turbo3"), ("q8_0", "turbo4"), ("q8_0", "turbo3"),
         ("q8_0", "turbo2")]
print("\nthe same bits the wrong way round:")
table(("K/V", "", [f"{a}/{b}" for a, b in swaps]), ("bits/value", "g", [grid[a, b]["bits"] for a, b in swaps]),
      ("KLD", ".4f", [grid[a, b]["kld"] for a, b in swaps]), ("swapped", ".4f", [grid[b, a]["kld"] for a, b in swaps]))

# %% [markdown]
# ## Boundary V
#
# The first and the last layers of many models react most to errors in V. `--cache-boundary-v N` stores V of the first
# and last N layers in q8_0.

# %%
boundary = measured()["boundary"]
f16_mib = grid["f16", "f16"]["mib"]
table(("layers at each end", "", boundary),
      ("bits/value", ".3f", [16 * row["mib"] / f16_mib for row in boundary.values()]),
      ("KLD", ".4f", column(boundary.values(), "kld")), ("perplexity", ".3f", column(boundary.values(), "ppl")))

# %% [markdown]
# K in turbo4, V in turbo2. On this model of 10 layers it is a poor bargain: for as many bits as one layer at each end
# takes, turbo4/turbo3 loses half as much. In a model of 60 layers the same layers cost a sixth of the bits. Measure it on
# yours.
#
# ## Sparse V
#
# Softmax weights are very unequal. A row of V whose weight is below some small share of the largest adds next to
# nothing to the output, so it need not even be read (`--cache-sparse-v`). The package reports the share of rows that
# it skipped; here one query at a time, as in decoding. The heads of larger models are sharper than this layer's, so
# the same is done with scores two and four times as far apart.

# %%
thresholds = [1e-6, 1e-5, 1e-4, 1e-3, 1e-2, 1e-1]
positions = range(1920, 2048, 8)


def decode(at, threshold, sharpness=1.0):
    one = np.float32(sharpness) * layer.q[:, at : at + 1]
    rows_k, rows_v = stored_k["turbo4"][:, : at + 1], stored_v["turbo3"][:, : at + 1]
    return turboquant.attention(one, rows_k, rows_v, type_k="turbo4", type_v="turbo3", sparse_v=threshold,
                                return_skip_rate=True)


skip, change = {}, {}
for sharpness in (1, 2, 4):
    full = [decode(at, 0.0, sharpness)[0] for at in positions]
    results = [[decode(at, threshold, sharpness) for at in positions] for threshold in thresholds]
    skip[sharpness] = [float(np.mean([rate for _, rate in row])) for row in results]
    change[sharpness] = [float(np.mean([errors.relative_mse(a, b) for a, (b, _) in zip(full, row)])) for row in results]

print("this layer:")
table(("threshold", "g", thresholds), ("skipped", ".2%", skip[1]), ("change of the output", ".0e", change[1]),
      ("scores x2", ".2%", skip[2]), ("change", ".0e", change[2]), ("scores x4", ".2%", skip[4]),
      ("change", ".0e", change[4]))
sparse = measured()["sparse"]
print("\nthe whole model, turbo4/turbo3:")
table(("threshold", "", sparse), ("KLD", ".5f", column(sparse.values(), "kld")),
      ("perplexity", ".4f", column(sparse.values(), "ppl")))

# %%
plt.figure(figsize=(6, 3))
for sharpness, rates in skip.items():
    plt.semilogx(thresholds, np.multiply(100, rates), "o-", label=f"scores x{sharpness}")
plt.xlabel("threshold, relative to the largest weight")
plt.ylabel("rows of V skipped, %")
plt.title("Sparse V at 2048 keys, 2 query heads per KV head")
plt.legend()
plt.show()

# %% [markdown]
# The default, 1e-6, is far on the safe side: whatever is skipped, the output does not change by more than rounding
# does. This small model with its flat attention has next to nothing to skip at that threshold; sharp heads skip a
# large part, and the longer the context the larger.
#
# ## Block size
#
# A smaller block follows the data more closely and pays for more scales. Its rotation also mixes fewer channels.

# %%
blocks = {(row["k"]): row for row in measured()["blocks"]}
names = [f"turbo{b}{suffix}" for b in (4, 3, 2) for suffix in ("", "_64", "_32")]


def block_error(x, name):
    return errors.relative_mse(x, turboquant.dequantize(turboquant.quantize(x, name), name))


block_mse = {name: (block_error(k, name), block_error(v, name)) for name in names}
table(("type", "", names), ("bits/value", "g", [blocks[name]["bits"] for name in names]),
      ("this K, error", ".4f", [block_mse[name][0] for name in names]),
      ("this V", ".4f", [block_mse[name][1] for name in names]),
      ("model, KLD", ".4f", [blocks[name]["kld"] for name in names]),
      ("KLD · 4^(bits - 4)", ".4f", [blocks[name]["kld"] * 4 ** (blocks[name]["bits"] - 4) for name in names]))


# %%
def curve(which="K"):
    plt.figure(figsize=(6, 3))
    for bits in (4, 3, 2):
        mine = [name for name in names if name.startswith(f"turbo{bits}")]
        error = [block_mse[name]["KV".index(which)] for name in mine]
        plt.semilogy([blocks[name]["bits"] for name in mine], error, "o-", label=f"turbo{bits}")
    plt.xlabel("bits per value")
    plt.ylabel("squared error, relative")
    plt.title(f"Blocks of 128, 64 and 32, real {which}")
    plt.legend()
    plt.show()


curve()

# %%
sliders(curve, which=["K", "V"])

# %% [markdown]
# The last column charges for the bits: a bit is worth a factor of 4. Smaller blocks are smaller errors at more bits,
# and where the head allows it 128 is the better bargain or an equal one.
#
# ## What to take with you
#
# - K's errors choose the wrong tokens, V's only blur the right ones. K deserves more bits, and the same bits the
#   wrong way round cost several times as much.
# - Errors of K and V add up: raise the type that dominates.
# - Boundary V and sparse V are worth trying on your model; their gains depend on it.
#
# [The last notebook](06-everything.ipynb) puts all parts together.
