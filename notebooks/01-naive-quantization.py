# %% [markdown]
# # 1. Why naive quantization fails
#
# A model that generates text keeps the *keys* and *values* of all tokens so far: the KV cache. At long context it is
# larger than anything else that is read per token, so one would like to store it in 4 bits per value instead of 16.
#
# The obvious way: take the smallest and the largest value of a vector, put $2^b$ equally spaced levels between them,
# and round. This notebook shows why that fails for keys, and what exactly goes wrong: **a few large channels choose
# the spacing, and all other channels pay for it.**

# %%
import matplotlib.pyplot as plt
import numpy as np
from common import outlier_vectors, real_layer, sliders, table

from turboquant.theory import errors, uniform

# %% [markdown]
# ## A vector with five outliers
#
# 64 channels from $N(0,1)$, and five of them 20 times larger. Keys of real models look like this: the same few
# channels are large in every token.

# %%
x = outlier_vectors(1, channels=64, outliers=5, factor=20, seed=56)[0]
large = np.abs(x) > 4

print("outlier channels:", np.flatnonzero(large), "with values", x[large])
print(f"all others lie between {x[~large].min():.2f} and {x[~large].max():.2f}")

# %% [markdown]
# ## Min-max quantization
#
# With $b$ bits the slot width is
# $$\Delta = \frac{\max - \min}{2^b - 1},$$
# and as every value goes to the nearest level, no error exceeds $\Delta/2$.

# %%
bits = list(range(2, 9))
done = {b: uniform.quantize(x, b) for b in bits}
width = {b: float(done[b].width) for b in bits}
worst = {b: float(np.abs(done[b].values - x).max()) for b in bits}
mse = {b: float(np.square(done[b].values - x).mean()) for b in bits}
used = {b: int(done[b].used(b)) for b in bits}

span = x.max() - x.min()
for b in bits:
    assert np.isclose(width[b], span / (2**b - 1)) and worst[b] <= width[b] / 2

print(f"range: {x.min():.2f} ... {x.max():.2f}, {span:.2f} wide\n")
table(("bits", "", bits), ("levels", "", [2**b for b in bits]), ("slot width", ".3f", list(width.values())),
      ("half a slot", ".3f", [w / 2 for w in width.values()]), ("worst error", ".3f", list(worst.values())),
      ("mean squared error", ".4f", list(mse.values())), ("levels used", "", list(used.values())),
      ("levels wasted", ".0%", [1 - used[b] / 2**b for b in bits]))


# %%
def show(bits=4, factor=20.0):
    vector = np.where(large, x * factor / 20, x)
    quantized = uniform.quantize(vector, bits)
    figure, (left, right) = plt.subplots(1, 2, width_ratios=(3, 2))
    left.bar(range(64), vector, color=np.where(large, "tab:red", "tab:blue"))
    left.hlines(quantized.low + quantized.width * np.arange(2**bits), -1, 64, colors="0.6", linewidths=0.5)
    left.set(xlabel="channel", ylabel="value", title=f"The {2**bits} levels of {bits} bits (grey)")
    order = np.sort(vector[~large])
    right.plot(order, order, color="0.7", label="exact")
    right.plot(order, uniform.quantize(vector, bits).values[~large][np.argsort(vector[~large])], ".", label="quantized")
    right.set(xlabel="value", ylabel="value after quantization", title="The 59 ordinary channels")
    right.legend()
    plt.show()


show(bits=4, factor=20)

# %% [markdown]
# The five red channels are served well. The 59 blue ones, where most of the information is, are left with two or
# three of the 16 levels: what comes back is little more than a sign. Move the sliders to see when it breaks (in
# Jupyter; the figure above is what readers on a forge see).

# %%
sliders(show, bits=(2, 8, 1), factor=(1.0, 40.0, 1.0))

# %% [markdown]
# ## How many bits do outliers cost?
#
# An ordinary channel's error is that of its slot, $\Delta^2/12$, relative to its own variance, which is 1 here. The
# same vectors without outliers need fewer bits for the same error. Each bit halves $\Delta$, so the price in bits is
# the logarithm of the ratio of ranges.

# %%
many = {factor: outlier_vectors(2000, 64, factor=factor, seed=1) for factor in (1, 20)}
ordinary = np.abs(many[20]) == np.abs(many[1])  # the same random numbers, so the same channels
small_mse = {factor: [float(np.square(uniform.quantize(v, b).values - v)[ordinary].mean()) for b in bits]
             for factor, v in many.items()}
ranges = {factor: float(np.ptp(v, axis=1).mean()) for factor, v in many.items()}
price = np.log2(ranges[20] / ranges[1])

plt.figure(figsize=(6, 3.2))
for factor, label in ((20, "five outliers, 20x"), (1, "no outliers")):
    plt.semilogy(bits, small_mse[factor], "o-", label=label)
plt.axhline(1, color="0.6", linestyle=":", label="keeping nothing")
plt.xlabel("bits per value")
plt.ylabel("error of ordinary channels\n(squared, relative to variance)")
plt.title("The same channels, quantized beside outliers or not")
plt.legend()
plt.show()
print(f"range with outliers {ranges[20]:.1f}, without {ranges[1]:.1f}: outliers cost {price:.1f} bits of every value")

# %% [markdown]
# ## Real keys and values
#
# One layer of the bundled model, 2048 tokens of a novel, two KV heads of 128 channels.

# %%
layer = real_layer()
k, v = layer.k, layer.v
rms = {name: np.sqrt(np.square(values).mean(axis=1)) for name, values in (("K", k), ("V", v))}

figure, axes = plt.subplots(1, 2, sharey=True)
for axis, (name, values) in zip(axes, rms.items()):
    axis.plot(np.sort(values, axis=1)[:, ::-1].T)
    axis.set(xlabel="channel, by size", title=f"{name}: RMS of each channel (one line per head)", yscale="log")
axes[0].set_ylabel("RMS over 2048 tokens")
plt.show()
for name, values in rms.items():
    ratio = (values.max(axis=1) / np.median(values, axis=1)).max()
    print(f"{name}: the largest channel is {ratio:.1f} times the median one")


# %%
def error(x, b):
    return errors.relative_mse(x, uniform.quantize(x, b).values)


gaussian = np.random.default_rng(2).standard_normal((4096, 128))
real_error = {name: [error(values, b) for b in bits]
              for name, values in (("real K", k), ("real V", v), ("N(0,1)", gaussian))}
table(("bits", "", bits), *((name, ".5f", values) for name, values in real_error.items()))
real_price = np.log2(real_error["real K"][2] / real_error["N(0,1)"][2]) / 2
print(f"\nat 4 bits K has the error that Gaussian vectors have with {real_price:.1f} bit less")

# %% [markdown]
# Squared error relative to the mean square, with one range per head and token. V is harmless. K has a handful of
# channels ten times the others, the same ones in every token, and pays a bit for them. That is a mild case: this
# model is small, and larger ones have worse channels. And the number flatters: a relative error of the whole vector
# is mostly that of the large channels, which are stored well.
#
# ## What to take with you
#
# - The range of a vector is set by its largest values; the resolution is needed by all the others.
# - Smaller blocks with a range each (q4_0 has blocks of 32) contain the damage, at 0.5 bit per value for the ranges.
# - More bits help slowly: each halves the slot width, and five outliers of 20x cost more than three.
#
# There is another way out. The outliers are outliers *in this basis*. [The next notebook](02-rotation.ipynb) turns
# the vector until no channel stands out.
