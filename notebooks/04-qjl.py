# %% [markdown]
# # 4. The QJL lesson
#
# Rounding to centroids shortens inner products a little: a *bias*. TurboQuant's second algorithm removes it. It
# spends one of the bits on QJL: the signs of random projections of what rounding left over, from which inner products
# can be estimated **without bias**. Theory likes unbiased estimators.
#
# Attention does not care. This notebook compares 3 bits of centroids plus 1 bit of QJL with 4 bits of centroids, at
# the same size, and follows the error through the softmax. **Variance is what hurts, and QJL has six times more of
# it.**

# %%
import math

import matplotlib.pyplot as plt
import numpy as np
from common import real_layer, sliders, table

import turboquant
from turboquant import reference
from turboquant.theory import codebook, errors, polarquant, qjl

d = 128
R = reference.rotation_matrix(d)

# %% [markdown]
# ## One bit per projection
#
# Take a Gaussian matrix $S$ and keep of a vector $x$ only the signs of $Sx$, and its length. Then
# $$\frac{\sqrt{\pi/2}}{m}\,|x| \sum_{i=1}^{m} \langle s_i, q\rangle\, \mathrm{sign}\langle s_i, x\rangle$$
# has the mean $\langle q, x\rangle$ and the variance $\left(\frac\pi2 |q|^2|x|^2 - \langle q,x\rangle^2\right)/m$.
# Here is the same pair of vectors under 2000 different $S$, beside plain 1-bit centroids under 2000 random sign
# patterns of the rotation:

# %%
rng = np.random.default_rng(4)
x = rng.standard_normal(d)
q = 0.6 * x + 0.8 * rng.standard_normal(d)
exact = float(q @ x)

qjl_estimates, centroid_estimates = [], []
for seed in range(2000):
    S = qjl.projections(d, seed=seed)
    qjl_estimates.append(float(qjl.dot(q, qjl.encode(x, S), S)))
    turned = reference.hadamard(d) / math.sqrt(d) * rng.choice([-1.0, 1.0], d)
    centroid_estimates.append(float(q @ polarquant.roundtrip(x, 1, turned, norm_correction=False)))

qjl_mean, qjl_std = float(np.mean(qjl_estimates)), float(np.std(qjl_estimates))
theory_std = math.sqrt(qjl.variance(q, x, d))
centroid_mean, centroid_std = float(np.mean(centroid_estimates)), float(np.std(centroid_estimates))
standard_error = qjl_std / math.sqrt(2000)
table(("one bit per channel", "", ["exact", "QJL", "centroids"]), ("mean", ".2f", [exact, qjl_mean, centroid_mean]),
      ("standard deviation", ".2f", [0, qjl_std, centroid_std]))
print(f"QJL's theory: mean {exact:.2f} (seen: {(qjl_mean - exact) / standard_error:+.1f} standard errors off), "
      f"standard deviation {theory_std:.2f}; centroids shorten by {1 - centroid_mean / exact:.0%}, "
      f"theory {1 - 2 / math.pi:.0%}")

plt.figure(figsize=(7, 2.9))
bins = np.linspace(exact - 70, exact + 70, 71)
plt.hist(qjl_estimates, bins, alpha=0.6, label="QJL")
plt.hist(centroid_estimates, bins, alpha=0.6, label="centroids")
plt.axvline(exact, color="k", linewidth=1, label="exact")
plt.xlabel("estimate of ⟨q, x⟩")
plt.ylabel("count of 2000")
plt.legend()
plt.show()

# %% [markdown]
# Both are as the theory says: QJL is centred and wide; centroids are narrow and too small. But the shortening is much
# the same factor for every key, and a factor can be divided out. The width cannot.
#
# ## At the same size: 3 bits + QJL, or 4 bits
#
# The residual of 3 bits has a squared length of 0.0345. QJL reads it with a variance $\frac\pi2$ times that over $d$;
# the error of 4 bits of centroids is 0.0095 over $d$. That is a ratio of $\frac\pi2 \cdot 0.0345/0.0095 = 5.7$.

# %%
S = qjl.projections(d, seed=1)
schemes = {
    "4 bits of centroids": lambda x: polarquant.roundtrip(x, 4, R),
    "3 bits of centroids": lambda x: polarquant.roundtrip(x, 3, R),
    "3 bits + 1 bit of QJL": lambda x: qjl.with_residual(x, 4, R, S),
    "turbo4": lambda x: turboquant.dequantize(turboquant.quantize(np.float32(x), "turbo4"), "turbo4"),
}
layer = real_layer()
real_k, real_v, real_q = (np.asarray(values, dtype=np.float64) for values in (layer.k, layer.v, layer.q))
gaussian_k, gaussian_q = np.random.default_rng(6).standard_normal((2, 4000, d))


def product_error(queries, keys, approximate):
    """Squared errors of inner products, relative to |q|²|k|²/d, and the mean factor on ⟨k, k⟩."""
    change = (queries * (approximate - keys)).sum(-1)
    size = np.square(queries).sum(-1) * np.square(keys).sum(-1) / d
    factor = (keys * approximate).sum(-1) / np.square(keys).sum(-1)
    return float((np.square(change) / size).mean()), float(factor.mean())


rows = {name: product_error(gaussian_q, gaussian_k, scheme(gaussian_k)) for name, scheme in schemes.items()}
table(("", "", list(rows)), ("squared error of ⟨q, k⟩", ".4f", [error for error, _ in rows.values()]),
      ("mean factor on ⟨k, k⟩", ".4f", [factor for _, factor in rows.values()]))
variance_ratio = rows["3 bits + 1 bit of QJL"][0] / rows["4 bits of centroids"][0]
theory_ratio = math.pi / 2 * codebook.lloyd_max(codebook.normal(), 3).mse / codebook.lloyd_max(codebook.normal(), 4).mse
print(f"QJL's error is {variance_ratio:.1f} times that of 4 bits of centroids; theory {theory_ratio:.1f}")

# %% [markdown]
# The factor 0.995 is what norm correction has left of the bias, half a percent; the codec's choice of scale leaves
# none of it. For that half percent QJL pays more than if its bit had been thrown away.
#
# ## Through the softmax
#
# A score that is off by $\delta$ multiplies the weight of its key by $e^\delta$, and $E[e^\delta] = e^{v/2}$ for a
# centred error of variance $v$: the exponential turns symmetric noise into weight for the wrong keys. For scores that
# are off independently, the KL divergence of the attention weights is about $v/2$, less what the normalisation takes
# back where few keys have all the weight.
#
# First with real queries, keys and values, causal, the last 64 queries at each context:

# %%
def attention_errors(queries, keys, values, contexts, last):
    found = {name: [] for name in schemes}
    for name, scheme in schemes.items():
        approximate = scheme(keys)
        for n in contexts:
            # K alone is quantized: V is the subject of the next notebook
            found[name].append(errors.attention_error(last(queries, n), keys[:, :n], values[:, :n], approximate[:, :n],
                                                      values[:, :n], causal=last is real_last))
    return found


def real_last(queries, n):
    return queries[:, n - 64 : n]


def all_of_them(queries, n):
    return queries


real_contexts = [256, 512, 1024, 2048]
real = attention_errors(real_q, real_k, real_v, real_contexts, real_last)

# %% [markdown]
# Then synthetic keys, to 32,768 of them: Gaussian, with queries that give scores the standard deviation that this
# layer has. And as attention is there to find something, every query has one key that it looks for, with a score of
# 12: at 256 keys it has nearly all the weight, at 32,768 it has to hold out against a crowd.

# %%
spread = float(np.mean([(real_q[h, -64:] @ real_k[h // 2].T * layer.scale).std(axis=1).mean() for h in range(4)]))
rng = np.random.default_rng(7)
k = rng.standard_normal((1, 32768, d))
v = rng.standard_normal((1, 32768, d))
queries = spread * rng.standard_normal((1, 64, d))
wanted = rng.permutation(256)[:64]  # the place of each query's key
missing = 12 * math.sqrt(d) - (k[0, wanted] * queries[0]).sum(-1)
k[0, wanted] += (missing / np.square(queries[0]).sum(-1))[:, None] * queries[0]
contexts = [256, 1024, 4096, 16384, 32768]
synthetic = attention_errors(queries, k, v, contexts, all_of_them)

print(f"scores have a standard deviation of {spread:.1f}\n")
for title, found, lengths in (("real K", real, real_contexts), ("synthetic K", synthetic, contexts)):
    for metric in ("kl", "output"):
        print({"kl": f"{title}: KL divergence of the attention weights, nats",
               "output": f"{title}: squared error of the output, relative"}[metric])
        table(("keys", "", lengths), *((name, ".4f", [getattr(one, metric) for one in values])
                                       for name, values in found.items()))
        print()

# %%
figure, axes = plt.subplots(1, 2, figsize=(9, 3.4))
for name, color in zip(schemes, ("tab:blue", "tab:green", "tab:red", "0.3")):
    for axis, metric in zip(axes, ("kl", "output")):
        real_errors, synthetic_errors = ([getattr(one, metric) for one in found[name]] for found in (real, synthetic))
        axis.loglog(real_contexts, real_errors, "o-", color=color, label=f"{name}, real")
        axis.loglog(contexts, synthetic_errors, "s--", color=color, alpha=0.6,
                    label="dashed: synthetic" if name == "turbo4" else None)
axes[0].set(xlabel="keys", ylabel="KL of attention weights, nats")
axes[1].set(xlabel="keys", ylabel="squared error of output")
axes[0].legend(fontsize=8)
for axis in axes:
    axis.set_xticks(contexts, ["256", "1K", "4K", "16K", "32K"])
    axis.minorticks_off()
plt.show()

# %%
kl_ratio = [b.kl / a.kl for a, b in zip(real["4 bits of centroids"] + synthetic["4 bits of centroids"],
                                        real["3 bits + 1 bit of QJL"] + synthetic["3 bits + 1 bit of QJL"])]
growth = {name: values[-1].kl / values[0].kl for name, values in synthetic.items()}
print(f"KL of QJL over KL of 4 bits: {min(kl_ratio):.1f} to {max(kl_ratio):.1f}")
print("from 256 to 32,768 synthetic keys KL grows by",
      ", ".join(f"{by:.0f}x ({name})" for name, by in growth.items()))

# %% [markdown]
# QJL's bit is worse than no bit at all, in every row. Where the answer has to be found in a crowd, errors grow with
# context, by an order of magnitude here: with more keys less is taken back by the normalisation, until KL levels off
# at about $v/2$. QJL has the larger $v$, so it has more to lose.
#
# Unbiasedness does not help against that. The softmax is not linear: the mean of the weights under a noisy score is
# not the weight of the mean score.
#
# Is there a rate where QJL wins? Its bit makes the residual's variance $\frac\pi2$ times larger, where one more bit
# of centroids takes about three quarters of it away; that is so at every rate.

# %%
def by_bits(n=1024):
    bits = [2, 3, 4, 5]
    parts = real_q[:, n - 64 : n], real_k[:, :n], real_v[:, :n]
    curves = {"centroids": lambda b: polarquant.roundtrip(parts[1], b, R),
              "centroids and QJL": lambda b: qjl.with_residual(parts[1], b, R, S)}
    plt.figure(figsize=(6, 3))
    for name, scheme in curves.items():
        kl = [errors.attention_error(*parts, scheme(b), parts[2], causal=True).kl for b in bits]
        plt.semilogy(bits, kl, "o-", label=name)
    plt.xlabel("bits per value, in all")
    plt.ylabel("KL of attention weights, nats")
    plt.xticks(bits)
    plt.title(f"real K, {n} keys")
    plt.legend()
    plt.show()


by_bits()

# %%
sliders(by_bits, n=[256, 512, 1024, 2048])

# %% [markdown]
# ## What to take with you
#
# - QJL does what its paper says: it is unbiased, with the variance that the paper has.
# - At equal size its error in a score has 5.7 times the variance of plain centroids, and the softmax turns variance
#   into wrong weights.
# - The bias that it removes is half a percent at 4 bits. The choice of a block's scale deals with it for nothing, so
#   all bits go to centroids.
#
# So much for K. [The next notebook](05-asymmetric-kv.ipynb) asks why V is so much less demanding.
