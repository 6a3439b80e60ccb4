"""turboquant.analyze on made-up queries, keys and values."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file
from turboquant import cli
from turboquant.analyze import measure, report
from turboquant.analyze.measure import AnalyzeError, analyze
from turboquant.dump import FORMAT
from typer.testing import CliRunner

TOKENS, HEADS, KV_HEADS, HEAD = 160, 4, 2, 128
TYPES = ("turbo4", "turbo3", "q8_0", "q4_0")


def values(seed: int, heads: int, head: int = HEAD) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((TOKENS, heads, head), dtype=np.float32)


def write(path: Path, tensors: dict[str, np.ndarray], **metadata: str) -> Path:
    scales = {name: 1 / math.sqrt(x.shape[2]) for name, x in tensors.items() if name.startswith("q")}
    about = {"format": FORMAT, "model": "made.gguf", "text": "up.txt", "tokens": str(TOKENS)}
    about["scale"] = json.dumps(scales)
    save_file(tensors, path, {**about, **metadata})
    return path


@pytest.fixture(scope="module")
def dumped(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Five layers of normal values; in layer 2 channel 5 of every K head is 64 times larger, and that of Q smaller."""
    tensors = {}
    for layer in range(5):
        q, k, v = values(3 * layer, HEADS), values(3 * layer + 1, KV_HEADS), values(3 * layer + 2, KV_HEADS)
        if layer == 2:
            k[..., 5] *= 64
            q[..., 5] /= 64
        tensors |= {f"q.{layer}": q, f"k.{layer}": k, f"v.{layer}": v}
    return write(tmp_path_factory.mktemp("dump") / "kv.safetensors", tensors)


@pytest.fixture(scope="module")
def found(dumped: Path) -> measure.Analysis:
    return analyze(dumped, TYPES)


def test_normal_values_are_found_normal(found: measure.Analysis) -> None:
    for half in (found.layers[0].k, found.layers[2].v):
        assert half.outlier < 1.3 and half.outlier_rotated < 1.3  # RMS over 160 tokens: ±6 %, and the largest of 256
        assert half.kurtosis == pytest.approx(3 * HEAD / (HEAD + 2), abs=0.1)
        assert half.kurtosis_rotated == pytest.approx(3 * HEAD / (HEAD + 2), abs=0.1)
        assert half.fit < 0.01  # 40,960 values: 1.36 / sqrt(N) = 0.007 at 95 %
        # Lloyd-Max of N(0,1) leaves 0.0095 and 0.0345; the search over scales gains up to a fifth.
        assert 0.0076 < half.effects["turbo4"].mse < 0.0098 and 0.030 < half.effects["turbo3"].mse < 0.036
        assert half.effects["q8_0"].mse < 1e-4 < 0.005 < half.effects["q4_0"].mse < 0.01
    assert found.layers[0].balance > 0.95


def test_an_outlier_is_found_and_rotated_away(found: measure.Analysis) -> None:
    k = found.layers[2].k
    assert k.outlier == pytest.approx(64, rel=0.2) and k.outlier_rotated < 2
    # One channel has nearly all of the energy, so the rotated values are nearly all of one size.
    assert k.kurtosis > 50 and k.kurtosis_rotated < 3 and k.fit > 0.1
    # Balanced, 127 + 1 channels have the noise of 128; before, (127 + 64²)(127 + 64⁻²) / 128² of it.
    assert found.layers[2].balance == pytest.approx(128**2 / (127 + 64**2) / 127, rel=0.1)
    for type in TYPES[:2]:
        assert found.protect("k", type) == [2] and found.protect("v", type) == []


def test_errors_of_scores_are_those_of_attention(found: measure.Analysis, dumped: Path) -> None:
    """Against plain loops over all queries, of which 160 are few enough to take most."""
    from safetensors.numpy import load_file

    tensors = load_file(dumped)
    q, k, v = (tensors[f"{name}.0"].astype(np.float64) for name in "qkv")
    k_hat, v_hat = (measure.stored(tensors[f"{name}.0"], "turbo3", HEAD).astype(np.float64) for name in "kv")
    picked = np.unique(np.linspace(0, TOKENS - 1, measure.QUERIES).round().astype(int))
    errors, divergences, lost, kept = [], [], 0.0, 0.0
    for head in range(HEADS):
        own = head // (HEADS // KV_HEADS)
        for i in picked:
            exact, off = (x[: i + 1, own] @ q[i, head] / math.sqrt(HEAD) for x in (k, k_hat))
            errors += list(off - exact - (off - exact).mean())
            p, p_hat = (np.exp(s - s.max()) / np.exp(s - s.max()).sum() for s in (exact, off))
            divergences.append((p * np.log(p / p_hat)).sum())
            lost += np.square(p @ (v_hat - v)[: i + 1, own]).sum()
            kept += np.square(p @ v[: i + 1, own]).sum()
    effect_k, effect_v = found.layers[0].k.effects["turbo3"], found.layers[0].v.effects["turbo3"]
    assert effect_k.score == pytest.approx(np.sqrt(np.mean(np.square(errors))))
    assert effect_k.harm == pytest.approx(np.mean(divergences))
    assert effect_v.harm == pytest.approx(lost / kept)
    assert effect_k.mse == pytest.approx(np.square(k_hat - k).sum() / np.square(k).sum())


def test_llama_cpps_types_are_rotated_where_llama_cpp_does(found: measure.Analysis) -> None:
    """One large channel in a block of 32 would cost the other 31 their digits; rotated, all 128 bear it alike."""
    x = values(0, 1)
    x[..., 5] *= 64
    error = np.square(measure.stored(x, "q4_0", HEAD) - x)
    assert error[..., :32].mean() == pytest.approx(error[..., 32:].mean(), rel=0.1)
    plain = x[..., :96]  # 64 does not divide 96
    error = np.square(measure.stored(np.ascontiguousarray(plain), "q4_0", 96) - plain)
    assert error[..., :32].mean() > 20 * error[..., 32:].mean()


def test_heads_that_no_block_divides(tmp_path: Path) -> None:
    tensors = {"q.3": values(0, 2, 80), "k.3": values(1, 1, 80), "v.3": values(2, 1, 64)}
    found = analyze(write(tmp_path / "kv.safetensors", tensors), TYPES)
    (layer,) = found.layers
    assert set(layer.k.effects.values()) == {None} and layer.k.fit is None and layer.k.outlier_rotated is None
    assert layer.v.effects["turbo4"] and layer.v.fit is not None
    assert found.protect("k", "turbo4") == []
    assert json.loads(report.to_json(found))["layers"][0]["k"]["fit"] is None


def test_layers_that_share_a_cache(tmp_path: Path) -> None:
    """Two attentions read one cache: as one with all of their heads."""
    q, k, v = values(0, 4), values(1, 1), values(2, 1)
    one = analyze(write(tmp_path / "one", {"q.0": q, "k.0": k, "v.0": v}), TYPES[:1]).layers[0]
    first, second = (np.ascontiguousarray(half) for half in (q[:, :2], q[:, 2:]))
    two = analyze(write(tmp_path / "two", {"q.0": first, "q.0.1": second, "k.0": k, "v.0": v}), TYPES[:1]).layers[0]
    assert two.heads == one.heads == 4 and two.balance == pytest.approx(one.balance)
    for a, b in ((one.k, two.k), (one.v, two.v)):
        assert b.effects["turbo4"].harm == pytest.approx(a.effects["turbo4"].harm)


# ---- the command -----------------------------------------------------------------------------------------------------


def run(*arguments: object):
    return CliRunner().invoke(cli.app, ["analyze", *map(str, arguments)])


def test_tables_and_verdict(dumped: Path) -> None:
    done = run(dumped, "--types", "turbo4,turbo3,q8_0")
    assert done.exit_code == 0, done.stderr
    rows = [line.split() for line in done.stdout.splitlines()]
    assert [row[0] for row in rows if row and row[0].isdigit()] == list("01234") * 4
    assert "  K: layer 2\n  V: none stands out\n" in done.stdout
    assert "`turboquant convert` could leave 3% of the noise of K in layer 2." in done.stdout
    assert [row[0] for row in rows if any(cell.endswith("*") and cell != "*" for cell in row)] == ["2"]
    assert all(len(line) <= 120 for line in done.stdout.splitlines())


def test_the_table_of_all_types_has_whole_names(dumped: Path) -> None:
    """K and V are one below the other if their columns do not fit side by side."""
    done = run(dumped)
    assert done.exit_code == 0, done.stderr
    headings = [line.split() for line in done.stdout.splitlines() if line.startswith("layer   turbo4")]
    assert headings == [["layer", *measure.TYPES]] * 5  # errors of K and V, scores, KLD, output
    assert all(len(line) <= 120 for line in done.stdout.splitlines())


def test_json_is_all_that_is_printed(dumped: Path) -> None:
    done = run(dumped, "--json", "--types", "turbo3")
    said = json.loads(done.stdout)
    assert said["format"] == "turboquant-analysis 1" and said["types"] == ["turbo3"] and said["tokens"] == TOKENS
    assert [layer["layer"] for layer in said["layers"]] == [0, 1, 2, 3, 4]
    assert said["layers"][0]["k"]["effects"]["turbo3"].keys() == {"mse", "score", "harm"}
    assert said["protect"] == {"k": {"turbo3": [2]}, "v": {"turbo3": []}}


def test_a_boundary_is_advised_where_it_helps() -> None:
    """V of the first and the last layer suffer most."""

    def layer(number: int, harm: float) -> measure.Layer:
        half = measure.Half(1.1, 1.1, 3, 3, 0, {"turbo3": measure.Effect(0.03, 0.01, 0.1)})
        v = measure.Half(1.1, 1.1, 3, 3, 0, {"turbo3": measure.Effect(0.03, harm)})
        return measure.Layer(number, 128, 128, 4, 2, half, v, 1.0)

    def advice(*harms: float) -> str:
        layers = [layer(number, harm) for number, harm in enumerate(harms)]
        return "\n".join(report.verdict(measure.Analysis("m", "t", 8, 8, ("turbo3",), layers)))

    assert "--cache-boundary-v 1 " in advice(9, 1, 1, 1, 1, 9)
    assert "--cache-boundary-v 2 " in advice(1, 1, 1, 1, 9, 1)
    assert "not at the ends" in advice(1, 1, 9, 1, 1)
    assert "--cache-boundary-v" not in advice(1, 1, 1, 1)


def test_plot(dumped: Path, tmp_path: Path) -> None:
    for suffix, magic in ((".png", b"\x89PNG"), (".svg", b"<?xml")):
        path = tmp_path / f"plot{suffix}"
        assert run(dumped, "--types", "turbo4", "--plot", path).exit_code == 0
        assert path.read_bytes().startswith(magic)
    again = run(dumped, "--types", "turbo4", "--plot", path)
    assert again.exit_code == 1 and "exists already" in again.stderr


def test_what_is_no_dump_is_refused(dumped: Path, tmp_path: Path) -> None:
    short = tmp_path / "short.safetensors"
    short.write_bytes(dumped.read_bytes()[:-5000])
    other = write(tmp_path / "other.safetensors", {"x": np.zeros(3, np.float32)}, format="pt")
    empty = write(tmp_path / "empty.safetensors", {"q.0": values(0, 1), "k.0": values(1, 1)})
    for path, message in (
        (tmp_path / "missing", "no such file; `turboquant dump-kv` makes one"),
        (short, "is no whole safetensors file .*: make it again with `turboquant dump-kv`"),
        (Path(__file__), "is no whole safetensors file"),
        (other, "was not made by `turboquant dump-kv` of this version: its format is 'pt'"),
        (empty, "has no layer with K and V of its own"),
    ):
        with pytest.raises(AnalyzeError, match=message):
            analyze(path)
        done = run(path)
        assert done.exit_code == 1 and done.stdout == "" and done.stderr.count("\n") <= 2, done.stderr
    for arguments, message in (
        (("--types", "turbo5"), "got 'turbo5', wanted one of turbo4.*; did you mean 'turbo4'.*; or one of q8_0"),
        (("--types", ""), "got ''"),
        (("--plot", tmp_path / "x.txt"), "no picture's name: it must end in .png"),
        (("--plot", tmp_path / "no" / "x.png"), "no such folder"),
    ):
        with pytest.raises(AssertionError, match=message):
            assert not run(dumped, *arguments).stderr


def test_help_teaches() -> None:
    text = run("--help").stdout
    assert "KV.safetensors" in text and "--json" in text and "--plot" in text and "turbo4,turbo3" in text
