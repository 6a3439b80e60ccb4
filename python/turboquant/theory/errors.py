"""Errors of quantized vectors, and the errors that quantized K and V cause in attention."""
from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from ..reference import softmax_weights

__all__ = ["AttentionError", "attention_error", "causal_mask", "kl_divergence", "relative_mse"]

Floats = NDArray[np.float64]


class AttentionError(NamedTuple):
    """Means over all heads and queries."""

    kl: float  #: Kullback-Leibler divergence of the softmax weights from the exact ones, nats
    output: float  #: squared error of the output divided by the squared output: |o' - o|**2 / |o|**2
    same_top: float  #: share of the queries whose heaviest key is the same, 0 ... 1


def relative_mse(x: ArrayLike, approximation: ArrayLike) -> float:
    """|x' - x|**2 / |x|**2 over all values: the mean squared error divided by the mean square."""
    exact = np.asarray(x, dtype=np.float64)
    return float(np.square(np.asarray(approximation, dtype=np.float64) - exact).sum() / np.square(exact).sum())


def kl_divergence(p: ArrayLike, q: ArrayLike) -> Floats:
    """sum p log(p/q) in nats over the last axis of distributions (..., n): (...). Infinite where q is 0 and p not."""
    exact, other = np.asarray(p, dtype=np.float64), np.asarray(q, dtype=np.float64)
    with np.errstate(divide="ignore"):
        ratio = np.log(np.where(exact > 0, exact, 1.0)) - np.log(np.where(exact > 0, other, 1.0))
    return np.asarray((exact * ratio).sum(axis=-1))


def causal_mask(n_query: int, n_kv: int) -> Floats:
    """The causal mask (n_query, n_kv): 0 up to key n_kv - n_query + i for query i, and -inf beyond."""
    return np.triu(np.full((n_query, n_kv), -np.inf), k=n_kv - n_query + 1)


def attention_error(
    q: ArrayLike, k: ArrayLike, v: ArrayLike, k_hat: ArrayLike, v_hat: ArrayLike, *, scale: float | None = None,
    causal: bool = False,
) -> AttentionError:
    """Compare attention over k_hat and v_hat with attention over k and v.

    Args:
        q: (n_head, n_query, head_k).
        k, k_hat: (n_kv_head, n_kv, head_k), n_head a multiple of n_kv_head.
        v, v_hat: (n_kv_head, n_kv, head_v).
        scale: factor of the scores; 1 / sqrt(head_k) if None.
        causal: whether attention is causal. Query i, of the last n_query tokens, attends to the keys up to its own.
    """
    n_query, n_kv = np.shape(q)[1], np.shape(k)[1]
    mask = causal_mask(n_query, n_kv) if causal else None
    exact, other = (softmax_weights(q, keys, scale=scale, mask=mask) for keys in (k, k_hat))
    group = len(exact) // len(np.asarray(v))
    out, out_hat = (weights @ np.repeat(np.asarray(values, dtype=np.float64), group, axis=0)
                    for weights, values in ((exact, v), (other, v_hat)))
    error = np.square(out_hat - out).sum(axis=-1) / np.square(out).sum(axis=-1)
    same = exact.argmax(axis=-1) == other.argmax(axis=-1)
    return AttentionError(float(kl_divergence(exact, other).mean()), float(error.mean()), float(same.mean()))
