"""turboquant.convert without llama.cpp: scales, paths through the graph, weights, model files."""

from __future__ import annotations

import io
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from fake_measure import write_measure
from fake_programs import write_programs
from make_model import Shape, write_model
from rich.console import Console
from test_evaluate import BASE, DIVERGENCE, HELP, needs_posix
from turboquant._output import OutputError, check_new, partial_file, publish
from turboquant.convert import report
from turboquant.convert import run as convert_run
from turboquant.convert.balance import Problem, groups, noise, solve, solve_powers
from turboquant.convert.paths import Refusal, trace, trace_output
from turboquant.convert.plan import Balanced, Measurement, Plan, make_plan
from turboquant.errors import TurboQuantError
from turboquant.measure.capture import Attention, Route
from turboquant.models import weights
from turboquant.models.modelfile import ModelError, ModelFile, Scaling, replace_metadata
from turboquant.plan import Plan as CachePlan

QUANTIZED = ("Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K", "IQ4_NL", "IQ4_XS")


# ---- scales ----------------------------------------------------------------------------------------------------------


def problem(seed: int = 0, blocks: int = 2, n: int = 32, pairs: bool = True) -> Problem:
    rng = np.random.default_rng(seed)
    cached, reader = np.exp(rng.standard_normal((2, blocks * n)) * 2)
    label = np.arange(blocks * n)
    joined = [(label[::2], label[1::2])] if pairs else []
    return Problem(cached, reader, label // n, groups(blocks * n, joined))


def test_groups_joins_chains() -> None:
    label = groups(8, [(np.array([0, 1, 2]), np.array([1, 2, 3])), (np.array([7]), np.array([5]))])
    assert label.tolist() == [0, 0, 0, 0, 1, 2, 3, 2]


def test_best_scales_reach_the_bound_of_cauchy_and_schwarz() -> None:
    p = problem()
    scale = solve(p)
    assert np.array_equal(scale[::2], scale[1::2])
    k, q = (m.reshape(2, -1, 2).sum(axis=2) for m in (p.cached, p.reader))
    assert noise(p, scale) == pytest.approx((np.sqrt(k * q).sum(axis=1) ** 2 / 32).sum())
    assert noise(p, scale) < 0.8 * noise(p, np.ones(64))
    for block in (slice(0, 32), slice(32, 64)):  # f16 values that did not overflow must not overflow now
        assert (p.cached * scale**2)[block].sum() <= p.cached[block].sum() * (1 + 1e-9)


def test_scales_that_blocks_share_are_a_minimum() -> None:
    """One norm's weight for two heads has no closed form, so the test checks that small changes are not better."""
    p = problem(pairs=False)
    p = Problem(p.cached, p.reader, p.block, np.tile(np.arange(32), 2))
    scale = solve(p)
    assert np.array_equal(scale[:32], scale[32:])
    least = noise(p, scale)
    assert least < 0.9 * noise(p, np.ones(64))
    for group in range(32):
        for factor in (0.99, 1.01):
            assert noise(p, np.where(p.group == group, factor * scale, scale)) > least


def test_powers_of_two() -> None:
    p = problem()
    free = np.full(64, 100)
    scale = solve_powers(p, -free, free)
    assert (np.frexp(scale)[0] == 0.5).all() and np.array_equal(scale[::2], scale[1::2])
    exact, found, before = (noise(p, s) for s in (solve(p), scale, np.ones(64)))
    assert exact < found < 1.15 * exact < before  # rounding log2 s by at most ½ costs a few percent
    low, high = np.full(64, -1), np.full(64, 2)
    high[5] = 0
    limited = solve_powers(p, low, high)
    assert limited.min() >= 0.5 and limited.max() <= 4 and limited[4] <= 1
    assert found < noise(p, limited) <= before
    assert (solve_powers(p, free * 0, free * 0) == 1).all()


def test_powers_stay_near_one() -> None:
    """Multiples of a scale by powers of two have the same noise, so the one nearest to 1 is taken (fp16)."""
    p, free = problem(), np.full(64, 100)
    scale = solve_powers(p, -free, free)
    assert np.abs(np.log2(scale / solve(p))).max() <= 1


def test_silent_channels_stay_finite() -> None:
    p = problem()
    p.cached[:5] = 0
    p.reader[3:9] = 0
    assert np.isfinite(solve(p)).all() and (solve(p) > 0).all()
    assert noise(p, solve(p)) <= noise(p, np.ones(64))


def test_balanced_stays_as_it_is() -> None:
    p = problem()
    p = Problem(p.cached, p.cached, p.block, p.group)
    assert np.allclose(solve(p), 1)
    free = np.full(64, 100)
    assert (solve_powers(p, -free, free) == 1).all()


# ---- the graph -------------------------------------------------------------------------------------------------------


def tensor(op: str, ne: list[int], nb: list[int] | None = None, **more: object) -> dict:
    shape = [*ne, *[1] * (4 - len(ne))]
    return {"op": op, "ne": shape, "nb": nb or [4 * int(n) for n in np.cumprod([1, *shape[:3]])], **more}


def source(of: list[int], nb: list[int] | None = None) -> dict:
    made = tensor("", of, nb)
    return {"sne": made["ne"], "snb": made["nb"]}


def rows(count: int) -> np.ndarray:
    return np.stack([np.arange(count), *[np.zeros(count, np.int64)] * 3], axis=1)


def k_steps(mode: int, dims: int = 8, **rope: object) -> list[dict]:
    """K of 2 heads of 8 and 5 tokens, as llama.cpp makes it."""
    return [
        tensor("VIEW", [16, 5], offset=0, **source([8, 2, 5])),
        tensor("ROPE", [8, 2, 5], mode=mode, dims=dims, **source([8, 2, 5]), **rope),
        tensor("RESHAPE", [8, 2, 5], offset=0, **source([16, 5])),
        tensor("ADD", [16, 5], weight="k.bias", wne=[16, 1, 1, 1], **source([16, 5])),
        tensor("MUL_MAT", [16, 5], weight="k.weight", wne=[32, 16, 1, 1]),
    ]


def same(found, count: int) -> list[list[int]]:
    label = groups(count, found.pairs)
    return sorted(np.flatnonzero(label == one).tolist() for one in range(label.max() + 1))


def test_rope_of_either_layout() -> None:
    normal, neox = (trace(k_steps(mode), rows(16)) for mode in (0, 2))
    assert [(leaf.tensor, leaf.axis) for leaf in normal.leaves] == [("k.bias", "elements"), ("k.weight", "rows")]
    assert all(np.array_equal(leaf.index, np.arange(16)) for leaf in normal.leaves)
    assert same(normal, 16) == [[i, i + 1] for i in range(0, 16, 2)]
    assert same(neox, 16) == [[i, i + 4] for i in (0, 1, 2, 3, 8, 9, 10, 11)]


def test_channels_outside_of_a_partial_rope_are_free() -> None:
    assert same(trace(k_steps(2, dims=4), rows(8)[:8]), 8) == [[0, 2], [1, 3], [4], [5], [6], [7]]


@pytest.mark.parametrize(
    ("mode", "name"), [(8, "M-RoPE"), (24, "vision RoPE"), (40, "interleaved M-RoPE"), (3, "mode 3")]
)
def test_other_ropes_are_refused_by_name(mode: int, name: str) -> None:
    with pytest.raises(Refusal, match=name):
        trace(k_steps(mode), rows(16))


def test_permuted_queries_and_a_norm_that_all_heads_share() -> None:
    """Q as attention takes it, {head, tokens, heads}: 3 heads of 4, 5 tokens; the norm's weight is what is scaled."""
    steps = [
        tensor("PERMUTE", [4, 5, 3], [4, 48, 16, 240], offset=0, **source([4, 3, 5])),
        tensor("SCALE", [4, 3, 5], **source([4, 3, 5])),
        tensor("ROPE", [4, 3, 5], mode=2, dims=4, **source([4, 3, 5])),
        tensor("MUL", [4, 3, 5], weight="q_norm", wne=[4, 1, 1, 1], **source([4, 3, 5])),
        tensor("RMS_NORM", [4, 3, 5], **source([4, 3, 5])),
    ]
    at = np.zeros((12, 4), np.int64)
    at[:, 2], at[:, 0] = np.divmod(np.arange(12), 4)
    (leaf,) = trace(steps, at).leaves
    assert (leaf.tensor, leaf.axis) == ("q_norm", "elements")
    assert leaf.index.tolist() == [0, 1, 2, 3] * 3


def test_fused_projection() -> None:
    """V is the last part of the rows of a fused matrix: 2 query heads, 1 KV head of 4; rows of 16."""
    fused = source([16, 5])
    steps = [
        tensor("VIEW", [4, 5], [4, 64, 320, 320], offset=0, **source([4, 1, 5], [4, 16, 64, 320])),
        tensor("VIEW", [4, 1, 5], [4, 16, 64, 320], offset=48, **fused),
        tensor("MUL_MAT", [16, 5], weight="qkv", wne=[32, 16, 1, 1]),
    ]
    (leaf,) = trace(steps, rows(4)).leaves
    assert leaf.index.tolist() == [12, 13, 14, 15]


def test_copies_and_single_factors_change_nothing() -> None:
    steps = [
        tensor("CONT", [12, 5], **source([4, 3, 5], [4, 80, 16, 240])),
        tensor("MUL", [4, 3, 5], weight="scale", wne=[1, 1, 1, 1], **source([4, 3, 5])),
        tensor("RESHAPE", [4, 3, 5], offset=0, **source([12, 5])),
        tensor("MUL_MAT", [12, 5], weight="w", wne=[8, 12, 1, 1]),
    ]
    (leaf,) = trace(steps, rows(12)).leaves
    assert leaf.tensor == "w" and leaf.index.tolist() == list(range(12))


@pytest.mark.parametrize(
    ("step", "reason"),
    [
        (tensor("RMS_NORM", [16, 5]), "normalised"),
        (tensor("CONCAT", [16, 5]), "CONCAT"),
        (tensor("ADD", [16, 5]), "ADD"),
        (tensor("CLAMP", [16, 5]), "CLAMP"),
        (tensor("MUL_MAT", [16, 5], weight="w", wne=[8, 16, 4, 1]), "per head"),
        (tensor("VIEW", [16, 5], offset=4, **source([16, 1])), "cannot be followed"),
    ],
)
def test_what_does_not_commute_is_refused(step: dict, reason: str) -> None:
    with pytest.raises(Refusal, match=reason):
        trace([step], rows(16))


def test_columns_of_the_output() -> None:
    plain = [
        tensor("MUL_MAT", [32, 5], weight="o", wne=[12, 32, 1, 1]),
        tensor("RESHAPE", [12, 5], offset=0, **source([4, 3, 5])),
    ]
    assert trace_output(plain, 3, 4).index.tolist() == list(range(12))
    with pytest.raises(Refusal, match="as it is"):
        trace_output(plain, 2, 4)


# ---- weights ---------------------------------------------------------------------------------------------------------


def encoded(type: str, count: int = 6, seed: int = 0) -> np.ndarray:
    """Random blocks with ordinary fp16 scales, at least two per row, (count, bytes)."""
    layout = weights.block(type)
    rng = np.random.default_rng(seed)
    raw = rng.integers(0, 256, (count, 512 // layout.values, layout.bytes), np.uint8)
    for at in layout.scales:
        raw[:, :, at : at + 2] = rng.uniform(0.001, 0.01, raw.shape[:2]).astype("<f2")[..., None].view(np.uint8)
    return raw.reshape(count, -1)


def decoded(raw: np.ndarray, type: str) -> np.ndarray:
    return gguf.quants.dequantize(raw, gguf.GGMLQuantizationType[type])


@pytest.mark.parametrize("type", QUANTIZED)
def test_quantized_rows_are_scaled_to_the_bit(type: str) -> None:
    raw = encoded(type)
    before = raw.copy()
    factors = 2.0 ** np.array([-2, -1, 0, 1, 5, 11])
    assert np.array_equal(decoded(weights.scale_rows(raw, type, factors), type), decoded(raw, type) * factors[:, None])
    assert np.array_equal(raw, before)


@pytest.mark.parametrize("type", QUANTIZED)
def test_exponents_are_as_far_as_it_goes(type: str) -> None:
    raw = encoded(type)
    low, high = weights.exponents(raw, type)
    assert (low < 0).all() and (high > 0).all()
    for limit, beyond in ((low, low - 1), (high, high + 1)):
        scaled = weights.scale_rows(raw, type, 2.0**limit)
        assert np.array_equal(decoded(scaled, type), decoded(raw, type) * 2.0 ** limit[:, None])
        for row in range(len(raw)):
            with pytest.raises(ValueError, match="range"):
                weights.scale_rows(raw[row : row + 1], type, 2.0 ** beyond[row : row + 1])


def test_rows_of_zeros_can_be_scaled_by_anything() -> None:
    low, high = weights.exponents(np.zeros((2, 34), np.uint8), "Q8_0")
    assert (low <= -100).all() and (high >= 100).all()


@pytest.mark.parametrize("type", [type for type in QUANTIZED if not type.endswith(("_K", "XS"))])
def test_columns_of_whole_blocks(type: str) -> None:
    raw = encoded(type)
    factors = np.repeat(2.0 ** (np.arange(16) % 5 - 2), 32)
    assert np.array_equal(decoded(weights.scale_columns(raw, type, factors), type), decoded(raw, type) * factors)
    low, high = weights.exponents(raw, type, "columns")
    assert low.shape == high.shape == (512,) and (low < 0).all() and (high > 0).all()
    weights.scale_columns(raw, type, 2.0**low)
    factors[7] *= 2
    with pytest.raises(ValueError, match="one .* block"):
        weights.scale_columns(raw, type, factors)


def test_only_powers_of_two_for_blocks() -> None:
    with pytest.raises(ValueError, match="powers of two"):
        weights.scale_rows(encoded("Q4_K"), "Q4_K", np.full(6, 3.0))


@pytest.mark.parametrize(("type", "digits"), [("F32", 24), ("F16", 11), ("BF16", 8)])
def test_floats_are_rounded_once(type: str, digits: int) -> None:
    rng = np.random.default_rng(0)
    raw = gguf.quants.quantize(rng.standard_normal((4, 64), dtype=np.float32), gguf.GGMLQuantizationType[type])
    raw = raw.view(np.uint8)
    values = decoded(raw, type).astype(np.float64)
    for scale, factors in (
        (weights.scale_rows, np.array([1.7, 0.3, 2.0, 1.0])),
        (weights.scale_columns, rng.uniform(0.5, 2, 64)),
    ):
        wanted = values * (factors[:, None] if len(factors) == 4 else factors)
        found = decoded(scale(raw, type, factors), type)
        assert (np.abs(found - wanted) <= np.abs(wanted) * 2.0**-digits).all()
        assert np.array_equal(decoded(scale(raw, type, np.full(len(factors), 4.0)), type), values * 4)


def test_overflow_is_an_error() -> None:
    raw = np.full((1, 4), 60000, "<f2").view(np.uint8)
    assert weights.exponents(raw, "F16")[1].tolist() == [0]
    with pytest.raises(ValueError, match="range of F16"):
        weights.scale_rows(raw, "F16", np.array([2.0]))


# ---- model files -----------------------------------------------------------------------------------------------------


@pytest.fixture
def model(tmp_path: Path) -> Path:
    path = tmp_path / "in.gguf"
    rng = np.random.default_rng(0)
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_name("names: ä, 名")
    writer.add_array("some.strings", ["a", "", "ccc"])
    writer.add_float64("some.float", 0.1)
    writer.add_tensor("rows", rng.standard_normal((5, 8), dtype=np.float32))
    writer.add_tensor("columns", rng.standard_normal((3, 8)).astype(np.float16))
    writer.add_tensor("vector", rng.standard_normal(7, dtype=np.float32))
    writer.add_tensor("untouched", rng.integers(0, 255, (3, 34), np.uint8), raw_dtype=gguf.GGMLQuantizationType.Q8_0)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


SCALINGS = {
    "rows": [Scaling("rows", np.arange(1.0, 6))],
    "columns": [Scaling("columns", 2.0 ** np.arange(8))],
    "vector": [Scaling("elements", np.full(7, 0.5))],
}


def test_write_changes_what_it_must_and_nothing_else(model: Path, tmp_path: Path) -> None:
    written = tmp_path / "out.gguf"
    added = {"turboquant.a": "text  ", "turboquant.b": 7, "turboquant.c": [1.5, 2.5], "turboquant.d": ["x", "yz"]}
    later = {"turboquant.a": "new", "turboquant.d": ["x", "z"], "turboquant.c": [0.5], "turboquant.b": "n"}
    with ModelFile(model) as opened:
        opened.write(written, SCALINGS, added)
    with pytest.raises(ValueError, match="4 keys of .* bytes cannot take the place of 4"):
        replace_metadata(written, added, {**later, "turboquant.a": "much longer than it was"})
    with pytest.raises(ValueError, match="3 keys of"):
        replace_metadata(written, added, {key: later[key] for key in list(later)[:3]})
    replace_metadata(written, added, later)
    old, new = gguf.GGUFReader(model), gguf.GGUFReader(written)
    own = [name for name in old.fields if not name.startswith("GGUF.")]
    assert [old.fields[name].contents() for name in own] == [new.fields[name].contents() for name in own]
    found = [new.fields[name].contents() for name in later]
    assert found[:3] == ["new", ["x", "z"], [0.5]] and found[3].rstrip() == "n"
    assert new.fields.keys() - old.fields.keys() == later.keys()
    before, after = ({t.name: t for t in reader.tensors} for reader in (old, new))
    assert list(before) == list(after)
    assert [t.tensor_type for t in old.tensors] == [t.tensor_type for t in new.tensors]
    assert np.array_equal(after["rows"].data, before["rows"].data * np.arange(1, 6, dtype=np.float32)[:, None])
    assert np.array_equal(after["columns"].data, before["columns"].data * 2 ** np.arange(8).astype(np.float16))
    assert np.array_equal(after["vector"].data, before["vector"].data / 2)
    assert np.array_equal(after["untouched"].data, before["untouched"].data)


def test_tensors_in_pieces(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole, pieces = tmp_path / "whole", tmp_path / "pieces"
    with ModelFile(model) as opened:
        opened.write(whole, SCALINGS, {})
        monkeypatch.setattr("turboquant.models.modelfile._PIECE", 40)  # a row and a bit
        opened.write(pieces, SCALINGS, {})
    assert pieces.read_bytes() == whole.read_bytes()


@pytest.mark.parametrize("kept", [3, 30, 200, -60])
def test_truncated_files(model: Path, tmp_path: Path, kept: int) -> None:
    short = tmp_path / "short.gguf"
    short.write_bytes(model.read_bytes()[:kept])
    with pytest.raises(ModelError, match=r"short\.gguf is truncated.*: get the file again"):
        ModelFile(short)


# ---- plans -----------------------------------------------------------------------------------------------------------


HEADS, HEAD = 2, 32


def planned(
    tmp_path: Path,
    v_steps: list[dict],
    types: dict[str, str] | None = None,
    sizes: dict[str, float] | None = None,
    **options: object,
) -> dict:
    """Plan a layer with 2 query heads and a KV head of 32, in a file with weights of the given types and sizes."""
    rng = np.random.default_rng(0)
    writer = gguf.GGUFWriter(tmp_path / "model.gguf", "llama")
    for name, shape in {"q": (64, 256), "k": (32, 256), "v": (32, 256), "o": (256, 64)}.items():
        kind = gguf.GGMLQuantizationType[(types or {}).get(name, "F32")]
        values = rng.standard_normal(shape, dtype=np.float32) * np.float32((sizes or {}).get(name, 1))
        writer.add_tensor(name, gguf.quants.quantize(values, kind), raw_dtype=kind)
    writer.add_tensor("bias", np.full(HEAD, 60000, np.float16))  # as large as fp16 allows
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()

    def rotated(heads: int, weight: str) -> list[dict]:
        return [
            tensor("ROPE", [HEAD, heads, 5], mode=2, dims=HEAD, **source([HEAD, heads, 5])),
            tensor("RESHAPE", [HEAD, heads, 5], offset=0, **source([HEAD * heads, 5])),
            tensor("MUL_MAT", [HEAD * heads, 5], weight=weight, wne=[256, HEAD * heads, 1, 1]),
        ]

    seen = tensor("PERMUTE", [HEAD, 5, HEADS], [4, 256, 128, 1280], offset=0, **source([HEAD, HEADS, 5]))
    q = [seen, *rotated(2, "q")]
    k = [tensor("VIEW", [HEAD, 5], offset=0, **source([HEAD, 1, 5])), *rotated(1, "k")]
    o = [
        tensor("MUL_MAT", [256, 5], weight="o", wne=[64, 256, 1, 1]),
        tensor("RESHAPE", [64, 5], offset=0, **source([HEAD, HEADS, 5])),
    ]
    measured = Measurement(100, 100, [Attention(0, 0, HEAD**-0.5, HEAD, HEAD, HEADS, 1)])
    for role, number, steps in (("q", 0, q), ("k", 0, k), ("v", 0, v_steps), ("o", 0, o)):
        measured.routes[role, number] = [Route(role, number, 0, steps)]
    for role, count in (("q", HEADS * HEAD), ("k", HEAD), ("v", HEAD)):
        measured.moments[role, 0] = np.exp(rng.standard_normal(count) * 2)
    with ModelFile(tmp_path / "model.gguf") as model:
        plan = make_plan(model, measured, options.pop("mode", "auto"), **options)
    return {"scalings": plan.scalings, "mode": plan.mode, **{part.what: part for part in plan.parts}}


def from_matrix(weight: str) -> list[dict]:
    return [tensor("MUL_MAT", [HEAD, 5], weight=weight, wne=[256, HEAD, 1, 1])]


def test_a_layer_is_balanced(tmp_path: Path) -> None:
    found = planned(tmp_path, from_matrix("v"))
    assert found["K"].ratio < 0.8 and found["V"].ratio < 0.8 and found["mode"] == "exact"
    q, k, v, o = (found["scalings"][name][0] for name in "qkvo")
    assert (q.axis, k.axis, v.axis, o.axis) == ("rows", "rows", "rows", "columns")
    assert np.allclose(q.factors.reshape(2, HEAD) * k.factors, 1)
    assert np.allclose(o.factors.reshape(2, HEAD) * v.factors, 1)
    assert np.array_equal(k.factors[:16], k.factors[16:])  # RoPE's pairs
    assert set(planned(tmp_path, from_matrix("v"), values=False)["scalings"]) == {"q", "k"}


def test_exact_scales_beyond_fp16_become_powers_of_two(tmp_path: Path) -> None:
    """With a weight of 60000, only scales are planned that can be written."""
    large = {"types": {"k": "F16"}, "sizes": {"k": 15000}}
    found = planned(tmp_path, from_matrix("v"), **large)
    assert (found["K"].exact, found["K"].refused, found["V"].exact, found["mode"]) == (False, "", True, "mixed")
    assert 1 > found["K"].ratio
    with ModelFile(tmp_path / "model.gguf") as model:
        model.write(tmp_path / "out.gguf", found["scalings"], {})
    (k,) = (tensor for tensor in gguf.GGUFReader(tmp_path / "out.gguf").tensors if tensor.name == "k")
    assert np.isfinite(k.data).all()
    found = planned(tmp_path, from_matrix("v"), mode="exact", **large)
    assert found["K"].refused == "its scales take k out of the range of its type: convert without --exact"


@pytest.mark.parametrize("mode", ["auto", "pow2"])
@pytest.mark.parametrize("type", ["F16", "F32", "BF16"])
def test_weights_that_are_not_finite_stay(tmp_path: Path, mode: str, type: str) -> None:
    found = planned(tmp_path, from_matrix("v"), {"k": type}, {"k": np.inf}, mode=mode)
    assert found["K"].refused == "k has weights that are not finite" and not found["V"].refused


def test_a_weight_out_of_range_is_a_sentence(model: Path, tmp_path: Path) -> None:
    with ModelFile(model) as opened, pytest.raises(ModelError, match=r"in\.gguf: columns cannot be scaled \(a weight"):
        opened.write(tmp_path / "out.gguf", {"columns": [Scaling("columns", np.full(8, 1e6))]}, {})


@pytest.mark.parametrize("mode", ["auto", "pow2"])
def test_biases_have_limits_too(tmp_path: Path, mode: str) -> None:
    steps = [tensor("ADD", [HEAD, 5], weight="bias", wne=[HEAD, 1, 1, 1]), *from_matrix("v")]
    found = planned(tmp_path, steps, mode=mode)
    assert not found["V"].refused and not found["V"].exact
    assert found["scalings"]["bias"][0].factors.max() == 1
    with ModelFile(tmp_path / "model.gguf") as model:
        model.write(tmp_path / "out.gguf", found["scalings"], {})


@pytest.mark.parametrize("values", [True, False])
@pytest.mark.parametrize("normalised", [True, False])
def test_keys_that_are_values_too_stay(tmp_path: Path, values: bool, normalised: bool) -> None:
    """V depends on the matrix of K, so scaling its rows for K would also scale V."""
    steps = [tensor("RMS_NORM", [HEAD, 5])] * normalised + from_matrix("k")
    found = planned(tmp_path, steps, values=values)
    assert found["K"].refused == "k has another use, too" and not found["scalings"]


@pytest.mark.parametrize(
    ("types", "mode", "k", "v", "scales"),
    [
        ({"q": "Q8_0", "k": "F16"}, "auto", "", "", "mixed"),
        ({"q": "Q8_0"}, "exact", "q is Q8_0, which takes powers of two only: convert without --exact", "", "exact"),
        ({"q": "BF16"}, "auto", "", "", "mixed"),
        ({"q": "BF16"}, "exact", "", "", "exact"),
        ({"k": "TQ1_0"}, "pow2", "k is TQ1_0, which cannot be scaled", "", "pow2"),
        ({}, "pow2", "", "", "pow2"),
    ],
)
def test_types_decide(tmp_path: Path, types: dict[str, str], mode: str, k: str, v: str, scales: str) -> None:
    found = planned(tmp_path, from_matrix("v"), types, mode=mode)
    assert (found["K"].refused, found["V"].refused, found["mode"]) == (k, v, scales)
    if not k and mode != "exact":
        exponents = np.log2(found["scalings"]["k"][0].factors)
        assert np.array_equal(exponents, np.round(exponents)) == (not found["K"].exact)


# ---- the check -------------------------------------------------------------------------------------------------------


@pytest.fixture
def converting(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Any]:
    """`convert` on `model` with stand-ins for llama-perplexity and for the measurement."""
    monkeypatch.setenv("TURBOQUANT_CACHE", str(tmp_path / "cache"))
    write_programs(tmp_path / "bin", HELP, BASE, DIVERGENCE)
    (tmp_path / "text.txt").write_text("some text")
    modes: list[str] = []

    def plan(model: ModelFile, measured: Measurement, mode: str, values: bool) -> Plan:
        modes.append(mode)
        return Plan(SCALINGS, [Balanced(0, "K", exact=mode != "pow2", before=2.0, after=1.0)])

    monkeypatch.setattr(convert_run, "measure", lambda *_, **__: Measurement(2048, 2048))
    monkeypatch.setattr(convert_run, "make_plan", plan)

    def run(**options: Any) -> Any:
        target = tmp_path / "out" / "out.gguf"
        target.parent.mkdir(exist_ok=True)
        try:
            return convert_run.convert(model, target, tmp_path / "text.txt", bin=tmp_path / "bin", threads=1, **options)
        except TurboQuantError as error:
            assert list(target.parent.iterdir()) == []
            return f"{modes} {error}"

    return run


@needs_posix
def test_the_check_passes(converting: Callable[..., Any], tmp_path: Path) -> None:
    assert converting().recommended == ("turbo4_tcq", "turbo4_tcq")
    assert (tmp_path / "out" / "out.gguf").is_file()


@needs_posix
def test_a_gpu_gets_the_types_that_it_reads_faster(converting: Callable[..., Any], tmp_path: Path) -> None:
    assert converting(gpu_layers=1).recommended == ("turbo4", "turbo4")
    assert "_tcq" not in (tmp_path / "bin" / "runs.txt").read_text()


@needs_posix
def test_a_device_without_the_trellis_coded_types(converting: Callable[..., Any], tmp_path: Path) -> None:
    """The types with as many bits are tried in their place."""
    (tmp_path / "bin" / "unsupported").write_text("_tcq")
    assert converting().recommended == ("turbo4", "turbo4")
    tried = [line.split()[1] for line in (tmp_path / "bin" / "runs.txt").read_text().splitlines()]
    assert tried.index("turbo3_tcq") < tried.index("turbo3") < tried.index("turbo4_tcq") < tried.index("turbo4")


@needs_posix
def test_caches_are_tried_without_a_window(
    converting: Callable[..., Any], model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With one turbo2 would do, as these few tokens are read from it."""
    (tmp_path / "bin" / "window").touch()
    write_model(model, Shape(layers=3))
    write_measure(tmp_path / "bin", [{"k": 1, "v": 1}] * 3)
    scaling = {"blk.0.attn_q.weight": [Scaling("rows", np.ones(512))]}
    monkeypatch.setattr(convert_run, "make_plan", lambda *_: Plan(scaling, [Balanced(0, "K", before=2.0, after=1.0)]))
    done = converting()
    assert done.recommended == ("turbo4_tcq", "turbo4_tcq")
    tried = [line for line in (tmp_path / "bin" / "runs.txt").read_text().splitlines() if "turbo" in line]
    assert tried and all(line.endswith(" window 0") for line in tried)
    # 257 rows of two heads of 128 values, K and V
    assert done.window_mib == 3 * 257 * 2 * 256 * 34 / 32 / (1 << 20)
    console = Console(file=io.StringIO(), width=200)
    report.show(done, console)
    assert f"the newest 256 tokens in q8_0, takes {done.window_mib:.2f} MiB more" in console.file.getvalue()
    (tmp_path / "out" / "out.gguf").unlink()
    monkeypatch.setenv("LLAMA_ARG_CACHE_WINDOW", "many")
    assert "LLAMA_ARG_CACHE_WINDOW: window: got 'many'" in converting()


@needs_posix
@pytest.mark.parametrize(("mode", "tried"), [("auto", ["auto", "pow2"]), ("exact", ["exact"]), ("pow2", ["pow2"])])
def test_predictions_that_are_no_numbers_exceed_the_limit(
    converting: Callable[..., Any], tmp_path: Path, mode: str, tried: list[str]
) -> None:
    (tmp_path / "bin" / "nan").write_text("f16")
    said = converting(mode=mode)
    if mode == "exact":
        assert said.startswith(f"{tried} the converted model differs from the original by inf nats with an f16 cache")
    else:
        assert said.startswith(f"{tried} {tmp_path / 'in.gguf'}: its predictions without flash attention are not")


@needs_posix
def test_a_cache_without_predictions_is_not_recommended(converting: Callable[..., Any], tmp_path: Path) -> None:
    (tmp_path / "bin" / "nan").write_text("turbo4_tcq")
    assert converting().recommended == ("q8_0", "turbo3_tcq")


@needs_posix
def test_a_model_that_predicts_nothing(converting: Callable[..., Any], tmp_path: Path) -> None:
    """NaN weights after the last keys and values do not affect the measurement, but the original's predictions."""
    (tmp_path / "bin" / "damaged").touch()
    said = converting()
    what = f"{tmp_path / 'in.gguf'}: its predictions of {tmp_path / 'text.txt'} are not finite"
    assert said == f"['auto'] {what}; is the model damaged?"
    assert (tmp_path / "bin" / "runs.txt").read_text().count("llama-perplexity") == 1


@needs_posix
@pytest.mark.parametrize("guarded", [True, False])
def test_the_file_has_a_plan_of_what_is_recommended(
    converting: Callable[..., Any], model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, guarded: bool
) -> None:
    """The plan has the types that the guard chose, and replaces an older plan in the model."""
    write_model(model, Shape(layers=3))
    with ModelFile(model) as source:
        old = tmp_path / "old.gguf"
        source.write(old, {}, {"turboquant.plan.version": 1, "turboquant.plan.type_k": "f16*3"})
    old.replace(model)
    scaling = {"blk.0.attn_q.weight": [Scaling("rows", np.ones(512))]}
    monkeypatch.setattr(convert_run, "make_plan", lambda *_: Plan(scaling, [Balanced(0, "K", before=2.0, after=1.0)]))
    write_measure(tmp_path / "bin", [{"k": 1, "v": 1}] * 3)
    if guarded:  # names as long as they can be, and no two neighbours alike
        (tmp_path / "bin" / "types").write_text("K turbo4_tcq_32,turbo4_tcq_64,turbo4_tcq_32; V turbo4_tcq*3")
    k = ("turbo4_tcq_32", "turbo4_tcq_64", "turbo4_tcq_32") if guarded else ("turbo4_tcq",) * 3
    assert converting().layers == (k, ("turbo4_tcq",) * 3)
    with ModelFile(tmp_path / "out" / "out.gguf") as written:
        found = CachePlan.from_metadata(written.metadata, "out.gguf")
        assert found is not None and (found.k, found.v) == (k, ("turbo4_tcq",) * 3)
        assert found.model == {"architecture": "llama", "layers": 3}
        assert written.metadata["turboquant.cache_type_k"] == "turbo4_tcq"


# ---- files that appear whole -----------------------------------------------------------------------------------------


def test_a_file_appears_at_the_end(tmp_path: Path) -> None:
    target = tmp_path / "out"
    check_new(target)
    with partial_file(target) as partial:
        partial.write_text("whole")
        assert not target.exists() and partial.parent == tmp_path
        publish(partial, target)
    assert target.read_text() == "whole" and list(tmp_path.iterdir()) == [target]
    (tmp_path / "plain").touch()
    assert target.stat().st_mode == (tmp_path / "plain").stat().st_mode


def test_nothing_is_overwritten(tmp_path: Path) -> None:
    target = tmp_path / "out"
    with pytest.raises(OutputError, match="made by something else"), partial_file(target) as partial:
        target.write_text("of the user")
        publish(partial, target)
    assert target.read_text() == "of the user" and list(tmp_path.iterdir()) == [target]
    with pytest.raises(OutputError, match="exists already: remove it, or give another name"):
        check_new(target)


def test_without_hard_links(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(os, "link", refuse)
    target = tmp_path / "out"
    with partial_file(target) as partial:
        partial.write_text("whole")
        publish(partial, target)
    assert target.read_text() == "whole" and list(tmp_path.iterdir()) == [target]
    with pytest.raises(OutputError, match="exists already"), partial_file(target) as partial:
        publish(partial, target)
    assert target.read_text() == "whole" and list(tmp_path.iterdir()) == [target]


def test_an_interruption_leaves_nothing_behind(model: Path, tmp_path: Path) -> None:
    def interrupt(done: int) -> None:
        raise KeyboardInterrupt

    target = tmp_path / "folder" / "out.gguf"
    target.parent.mkdir()
    with ModelFile(model) as opened, pytest.raises(KeyboardInterrupt), partial_file(target) as partial:
        opened.write(partial, {}, {}, interrupt)
    assert list(target.parent.iterdir()) == []


_LIMITED = """
import resource, signal, sys
from pathlib import Path
from turboquant._output import OutputError, partial_file
from turboquant.models.modelfile import ModelFile
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))
try:
    with ModelFile(Path(sys.argv[1])) as model, partial_file(Path(sys.argv[2])) as partial:
        model.write(partial, {}, {"key": "x" * 8192})
except OutputError as error:
    print(error)
"""


def test_a_full_disk_leaves_nothing_behind(model: Path, tmp_path: Path) -> None:
    target = tmp_path / "folder" / "out.gguf"
    target.parent.mkdir()
    done = subprocess.run([sys.executable, "-c", _LIMITED, model, target], capture_output=True, text=True)
    wanted = f"{target} cannot be written (File too large): make room, or give a file on another disk\n"
    assert done.stdout == wanted, done.stderr
    assert list(target.parent.iterdir()) == []


# ---- memory ----------------------------------------------------------------------------------------------------------


_MEMORY = """
import sys
from pathlib import Path
import numpy as np
from turboquant.models.modelfile import ModelFile, Scaling
def peak():
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmHWM")) / 1024
with ModelFile(Path(sys.argv[1])) as model:
    before = peak()
    big = model.tensors["big"]
    model.write(Path(sys.argv[2]), {"big": [Scaling("rows", np.full(big.rows, 1.5))]}, {})
    print(big.bytes / 2**20, peak() - before)
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_memory_does_not_grow_with_the_tensor(tmp_path: Path) -> None:
    path = tmp_path / "big.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_tensor("big", np.zeros((80 << 10, 512), np.float16))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    done = subprocess.run([sys.executable, "-c", _MEMORY, path, tmp_path / "out"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    tensor, grown = map(float, done.stdout.split())
    # 4 MiB of f16 at a time are 16 MiB as float64, in a few copies.
    assert tensor == 80 and grown < 60, (tensor, grown)
