# %% [markdown]
# # 6. Everything together
#
# Rotate with signs, give every value the nearest Lloyd-Max centroid, choose the block's scale so that inner products
# come out right, and give K more bits than V. This notebook adds the parts up: first on one layer, part by part; then
# a whole model with caches 1.9 to 7.5 times smaller than f16, beside llama.cpp's own types; then what it brings to keep
# the newest tokens exact; then speed and memory.

# %%
import matplotlib.pyplot as plt
import numpy as np
from common import column, measured, real_layer, sliders, speed, table

import turboquant
from turboquant import reference
from turboquant.theory import errors, polarquant, uniform

# %% [markdown]
# ## Part by part
#
# Real queries, keys and values of one layer; K and V quantized to the same bits, one more part of the method at a
# time.

# %%
layer = real_layer()
q, k, v = layer.q[:, -64:], layer.k, layer.v
R = reference.rotation_matrix(128)


def codec(x, bits):
    return turboquant.dequantize(turboquant.quantize(np.float32(x), f"turbo{bits}"), f"turbo{bits}")


parts = {
    "min-max": lambda x, b: uniform.quantize(x, b).values,
    "+ rotation": lambda x, b: uniform.quantize(x @ R.T, b).values @ R,
    "+ Lloyd-Max": lambda x, b: polarquant.roundtrip(x, b, R, norm_correction=False),
    "+ norm correction": lambda x, b: polarquant.roundtrip(x, b, R),
    "the codec": codec,
}
bits = [4, 3, 2]
steps = {b: [errors.attention_error(q, k, v, part(k, b), part(v, b), causal=True) for part in parts.values()]
         for b in bits}
table(("KL of attention weights, nats", "", parts),
      *((f"{b} bits", ".4f", [one.kl for one in steps[b]]) for b in bits))
print()
table(("squared error of output", "", parts),
      *((f"{b} bits", ".4f", [one.output for one in steps[b]]) for b in bits))

figure, axis = plt.subplots(figsize=(7, 3))
for place, b in enumerate(bits):
    axis.bar(np.arange(len(parts)) + 0.27 * (place - 1), [one.output for one in steps[b]], 0.25, label=f"{b} bits")
axis.set(yscale="log", xticks=range(len(parts)), xticklabels=parts, ylabel="squared error of output")
axis.legend()
plt.show()

# %% [markdown]
# Rotation does most of it. Lloyd-Max levels pay where bits are few: at 2 bits they halve what rotation leaves. The
# codec's scale, which keeps inner products right instead of making the squared error least, helps at 4 bits and looks
# like a loss at 2 and 3 on this one layer. It was chosen on whole models, where bias adds up from layer to layer and
# noise does not (the table in [FORMAT.md](../cpp/FORMAT.md)).
#
# ## A whole model
#
# KL divergence of the model's predictions from those with its own f16 cache, in nats per token, and perplexity,
# without the exact window that comes below. The same was measured with *outlier channels* planted in its K and V:
# three rotary pairs of K and three channels of V per head are made 16 times larger, and Q and the output weights
# smaller to match, so that the function of the model is what it was. Larger models have such channels by themselves.
# `turboquant convert` balances K against Q and V against the output inside the weights, and undoes them.

# %%
data = measured()
about = data["about"]
print(f"{about['model']}, {about['text']}, {about['chunks']} chunks of {about['ctx']} tokens")

stack = {name: {(row["k"], row["v"]): row for row in rows} for name, rows in data["stack"].items()}
pairs = [pair for pair in stack["clean"] if pair != ("f16", "f16")]
ratio = {pair: 16 / stack["clean"][pair]["bits"] for pair in pairs}


def label(pair):
    return pair[0] if pair[0] == pair[1] else "/".join(pair)


def kld_of(name):
    return [stack[name][pair]["kld"] for pair in pairs]


table(("cache K/V", "", map(label, pairs)), ("bits", "g", [stack["clean"][pair]["bits"] for pair in pairs]),
      ("smaller by", ".2f", [ratio[pair] for pair in pairs]), ("KLD", ".4f", kld_of("clean")),
      ("converted", ".4f", kld_of("clean, converted")), ("with outliers", ".4f", kld_of("outliers")),
      ("converted", ".4f", kld_of("outliers, converted")))
print("\nperplexity, f16: " + ", ".join(f"{row['f16', 'f16']['ppl']:.2f} ({name})" for name, row in stack.items()))
table(("cache K/V", "", [label(pair) for pair in pairs]),
      *((name, ".2f", [stack[name][pair]["ppl"] for pair in pairs]) for name in stack))

# %%
stock = {name: {kind: [row for row in rows if row["k"] != "f16"] for kind, rows in kinds.items()}
         for name, kinds in data["stock"].items()}
print("llama.cpp's own types, KLD:")
plain = stock["clean"]["plain"]
table(("type", "", column(plain, "k")), ("bits", "g", column(plain, "bits")),
      *((f"{name}, {kind}", ".4f", column(rows, "kld"))
        for name, kinds in stock.items() for kind, rows in kinds.items()))


# %%
def plane(model="clean"):
    figure, axis = plt.subplots(figsize=(8, 4.4))
    series = {
        "turbo": ([stack[model][pair] for pair in pairs], "o", "tab:blue"),
        "turbo, converted": ([stack[f"{model}, converted"][pair] for pair in pairs], "o", "tab:green"),
        "llama.cpp, with its rotation": (stock[model]["rotated"], "s", "tab:orange"),
        "llama.cpp, no rotation": (stock[model]["plain"], "s", "tab:red"),
    }
    for name, (rows, marker, color) in series.items():
        rows = sorted(rows, key=lambda row: row["bits"])
        hollow = {"markerfacecolor": "none", "markersize": 8} if "converted" in name else {}
        axis.semilogy(column(rows, "bits"), column(rows, "kld"), marker, color=color, label=name, **hollow)
    for pair in pairs:
        row = stack[model][pair]
        place = (4, -9) if pair == ("turbo4", "turbo2") else (4, 4)
        axis.annotate(label(pair), (row["bits"], row["kld"]), place, textcoords="offset points", fontsize=7)
    for row in stock[model]["rotated"]:
        axis.annotate(row["k"], (row["bits"], row["kld"]), (4, -9), textcoords="offset points", fontsize=7)
    axis.set(xlabel="bits per value, mean of K and V", ylabel="KL divergence, nats per token", title=f"model: {model}")
    axis.legend(fontsize=8)
    plt.show()


plane("clean")
plane("outliers")

# %%
sliders(plane, model=["clean", "outliers"])

# %% [markdown]
# Down and to the left is better. A bit is worth a factor of four, so compare types of different size by
# KLD · 4^(bits − 4):

# %%
def per_bit(row):
    return row["kld"] * 4 ** (row["bits"] - 4)


ranked = sorted([*(stack["clean"][pair] for pair in pairs), *stock["clean"]["rotated"]], key=per_bit)
table(("cache K/V", "", [label((row["k"], row["v"])) for row in ranked]), ("bits", "g", column(ranked, "bits")),
      ("KLD", ".4f", column(ranked, "kld")), ("KLD · 4^(bits − 4)", ".4f", map(per_bit, ranked)))

gain = {name: [a / b for a, b in zip(kld_of(name), kld_of(f"{name}, converted"))] for name in ("clean", "outliers")}
q4 = {(name, kind): next(row["kld"] for row in rows if row["k"] == "q4_0")
      for name, kinds in stock.items() for kind, rows in kinds.items()}
turbo4 = {name: stack[name]["turbo4", "turbo4"]["kld"] for name in stack}
print(f"\nconvert divides KLD by {np.median(gain['clean']):.2f} on the clean model and by "
      f"{np.median(gain['outliers']):.0f} on the one with outliers (medians over the pairs)")
print(f"without any rotation outliers multiply q4_0's KLD by {q4['outliers', 'plain'] / q4['clean', 'plain']:.0f}")

# %% [markdown]
# ## The newest tokens, exactly
#
# A token looks at its neighbours most of all. So what it costs least to keep exact is what it costs most to blur: the
# newest few tokens. The *exact window* ([window.md](../docs/window.md)) keeps the last $W$ rows of K and V in q8_0,
# beside their blocks, and attention reads them there. Its size is the same whatever the context is. Below is the
# bundled model, token by token, as text is generated; dashed is f16's own KLD between the two paths, which no cache
# can be below.

# %%
windows = data["windows"]
print("{model}, {text}, {chunks} chunks of {ctx} tokens".format(**windows["about"]))
curves = {}
for row in windows["rows"]:
    curves.setdefault(row["type"], []).append(row)
sizes = column(curves["turbo4"], "window")
table(("tokens in the window", "", sizes), ("MiB", ".2f", column(curves["turbo4"], "window_mib")),
      *((f"{name}, KLD", ".4f", column(rows, "kld")) for name, rows in curves.items()))
print("\nK and V without the window, MiB:", ", ".join(f"{name} {rows[0]['mib']}" for name, rows in curves.items()))

figure, (axis, beside) = plt.subplots(1, 2, figsize=(10, 3.6))
for name, rows in curves.items():
    places = [max(row["window"], 4) for row in rows]
    axis.loglog(places, column(rows, "kld"), "o-", label=name)
    beside.semilogy([row["mib"] + row["window_mib"] for row in rows], column(rows, "kld"), "o-", label=name)
axis.axhline(windows["floor"], color="gray", linestyle="--", linewidth=1)
axis.set(xlabel="tokens in the window", ylabel="KL divergence, nats per token", xticks=[4, *sizes[1:]],
         xticklabels=["none", *sizes[1:]])
axis.minorticks_off()
axis.legend()
beside.set(xlabel="K, V and window at 2048 tokens, MiB", title="the same by bytes")
plt.show()

none, some, most = ({name: row["kld"] for name, rows in curves.items() for row in rows if row["window"] == size}
                    for size in (0, 16, 256))
print("a window of 16 tokens divides KLD by", ", ".join(f"{none[name] / some[name]:.1f} ({name})" for name in curves))
print("one of 256 tokens by", ", ".join(f"{none[name] / most[name]:.1f} ({name})" for name in curves))

# %% [markdown]
# Sixteen tokens do most of it. A longer window is worth its bytes where the context is long: at 32768 tokens 256 of
# them in q8_0 are a few percent of a cache in turbo2. This model is small; measure your own.
#
# A prompt is read in batches, and a batch sees all of its own tokens exactly in any case: in batches of 512 the same
# KLDs are lower still, and say less about the window.

# %%
table(("tokens in the window", "", sizes), *((f"{name}, in batches", ".4f", column(rows, "kld_batched"))
                                             for name, rows in curves.items()))

# %% [markdown]
# ## Speed
#
# A smaller cache is less to read. Time of one layer's attention (32 query heads, 8 KV heads of 128, as in an 8B
# model) for one new token, through ggml, with llama.cpp's kernels for its own types and the plugin's for turbo types.
# One run of `tools/bench_attention.py` on two cores of an AMD EPYC with AVX-512; other machines give other numbers.

# %%
timing = speed()
depths = sorted({row["depth"] for row in timing["layer"]})
threads = max(row["threads"] for row in timing["layer"])
decode = {(row["pair"], row["depth"]): row["seconds"] for row in timing["layer"]
          if row["queries"] == 1 and row["threads"] == threads}
timed = list(dict.fromkeys(pair for pair, _ in decode))
print(f"microseconds per layer, {threads} threads, by tokens in the cache:")
table(("cache K/V", "", [label(tuple(pair.split(":"))) for pair in timed]),
      *((f"{depth}", ".0f", [decode[pair, depth] * 1e6 for pair in timed]) for depth in depths))
faster = {pair: decode["f16:f16", depths[-1]] / decode[pair, depths[-1]] for pair in timed if pair != "f16:f16"}
print(f"\nfaster than f16 at {depths[-1]} tokens:",
      ", ".join(f"{label(tuple(pair.split(':')))} {value:.1f}x" for pair, value in faster.items()))

# %% [markdown]
# ## Memory
#
# What the cache of a model with 32 layers and 8 KV heads of 128 takes (Llama 3 8B):

# %%
def cache_gib(tokens, type_k, type_v, layers=32, heads=8, head=128):
    bits = {"f16": 16, "q8_0": 8.5, "q4_0": 4.5, **{info.name: info.bits_per_value for info in turboquant.types()}}
    return tokens * layers * heads * head * (bits[type_k] + bits[type_v]) / 8 / 2**30


contexts = [8192, 32768, 131072]
shown = [("f16", "f16"), ("q8_0", "q8_0"), ("q8_0", "turbo3"), ("turbo4", "turbo4"), ("turbo4", "turbo3"),
         ("turbo3", "turbo3"), ("turbo2", "turbo2")]
table(("cache K/V", "", [label(pair) for pair in shown]),
      *((f"{n // 1024}K tokens, GiB", ".2f", [cache_gib(n, *pair) for pair in shown]) for n in contexts))

# %% [markdown]
# ## Which pair?
#
# - The default: `turbo4`, a quarter of f16, or `turbo4/turbo3` for some quality less. Both are better per bit than
#   any other pair here, q4_0 and q5_0 included.
# - Quality first: `q8_0/turbo4`. V in fewer bits wastes what K has been given.
# - When memory is what stops you: `turbo3` or `turbo3/turbo2`. At 7.5x, `turbo2` for K and V costs a tenth of the
#   perplexity and more.
# - Run `turboquant convert` on the model first. It costs nothing at run time, changes little on a tame model, and is
#   what saves one with outliers.
#
# And measure on your own model and text: [`turboquant compare`](../docs/compare.md) makes such tables.
