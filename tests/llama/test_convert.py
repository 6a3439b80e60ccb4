"""The commands convert, dump-kv and analyze with a real llama.cpp."""

from __future__ import annotations

import json
import os
import resource
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import gguf
import numpy as np
import pytest
from harness import QUIET, Build
from safetensors.numpy import load_file
from turboquant import cli
from turboquant.convert.check import checker
from turboquant.convert.run import EXACT, MARK, ConvertError, convert
from turboquant.llama.progress import Reporter
from turboquant.measure.capture import Capture, Data
from typer.testing import CliRunner, Result

TURBO4 = ("turbo4", "turbo4")


@pytest.fixture(autouse=True)
def quiet_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in QUIET.items():
        monkeypatch.setenv(name, value)


@pytest.fixture
def tool(build: Build) -> Callable[..., Result]:
    """Runs a command of `turboquant` with the build under test, in this process."""

    def run(*arguments: object) -> Result:
        return CliRunner().invoke(cli.app, [*map(str, arguments), "--bin", str(build.bin)])

    return run


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory, heldout: str) -> Path:
    """A text with at least two chunks of 256 tokens of the bundled model."""
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text(heldout[:3500], encoding="utf-8")
    return path


def scale_row(tensors: dict, name: str, row: int, factor: float) -> None:
    """Scale a row of a Q8_0 matrix through the fp16 scales of its blocks."""
    tensors[name].data[row].reshape(-1, 34)[:, :2].view("<f2")[:] *= np.float16(factor)


def plant(model: Path, path: Path) -> Path:
    """A copy of the bundled model; three channel pairs of each head are 16 times larger in K, and smaller in Q."""
    shutil.copyfile(model, path)
    reader = gguf.GGUFReader(path, "r+")
    tensors = {tensor.name: tensor for tensor in reader.tensors}
    rng = np.random.default_rng(7)
    for layer in range(reader.fields["llama.block_count"].contents()):
        for kv_head in range(2):
            for pair in rng.choice(64, 3, replace=False):
                for channel in (2 * pair, 2 * pair + 1):
                    scale_row(tensors, f"blk.{layer}.attn_k.weight", kv_head * 128 + channel, 16)
                    for head in (2 * kv_head, 2 * kv_head + 1):
                        scale_row(tensors, f"blk.{layer}.attn_q.weight", head * 128 + channel, 1 / 16)
    reader.data.flush()
    return path


@pytest.fixture(scope="module")
def outliers(tmp_path_factory: pytest.TempPathFactory, prose_model: Path) -> Path:
    return plant(prose_model, tmp_path_factory.mktemp("models") / "outliers.gguf")


def klds(build: Build, model: Path, text: Path, measured: dict[Path, tuple[str, str]]) -> list[float]:
    """The KLDs of models with their caches from `model` with an f16 cache."""
    with checker(model, text, 256, 2, build.bin, None, Reporter()) as check:
        return [check.kld(path, *pair, what="a test") for path, pair in measured.items()]


# ---- convert ---------------------------------------------------------------------------------------------------------


def test_an_outlier_model_is_repaired(
    tool, build: Build, outliers: Path, prose_model: Path, text: Path, tmp_path: Path
) -> None:
    fixed, picture = tmp_path / "fixed.gguf", tmp_path / "noise.png"
    done = tool("convert", outliers, fixed, "-f", text, "--tokens", 512, "--pow2", "--plot", picture)
    assert done.exit_code == 0, done.stderr
    assert sorted(tmp_path.iterdir()) == [fixed, picture] and picture.read_bytes().startswith(b"\x89PNG")
    assert [line.split()[0] for line in done.stdout.splitlines() if line.strip()[:1].isdigit()] == list("012345")
    assert "powers of two" in done.stdout and "Recommended: -ctk" in done.stdout

    before, after = klds(build, outliers, text, {outliers: TURBO4, fixed: TURBO4})
    assert after <= before / 4
    (clean,) = klds(build, prose_model, text, {prose_model: TURBO4})
    assert after <= 1.1 * clean

    found = gguf.GGUFReader(fixed)
    said = {name: field.contents() for name, field in found.fields.items() if name.startswith("turboquant.")}
    assert said["turboquant.convert.mode"] == "pow2" and said["turboquant.convert.calibration_tokens"] == 512
    assert said["turboquant.convert.k_layers"] == list(range(6)) and max(said["turboquant.convert.k_noise"]) < 0.3
    pair = f"-ctk {said['turboquant.cache_type_k']} -ctv {said['turboquant.cache_type_v']}"
    assert f"{pair}, or -ctk auto -ctv auto\n" in done.stdout
    auto = ("-fa", "on", "-ctk", "auto", "-ctv", "auto", "-lv", 4)
    run = build.run("llama-completion", "-m", fixed, "-p", "x", "-n", 1, "-no-cnv", *auto)
    assert "the plan in the model's metadata sets the types of K and V" in run.text
    assert f"cache types: K {said['turboquant.plan.type_k']}; V {said['turboquant.plan.type_v']}\n" in run.text
    assert said[MARK] and len(said["turboquant.convert.calibration_sha256"]) == 64
    old = gguf.GGUFReader(outliers)
    assert [tensor.tensor_type for tensor in found.tensors] == [tensor.tensor_type for tensor in old.tensors]

    again = tool("convert", fixed, tmp_path / "again.gguf", "-f", text)
    assert again.exit_code == 1 and "is converted already" in again.stderr and not (tmp_path / "again.gguf").exists()


def test_weights_that_are_no_numbers(tool, prose_model: Path, text: Path, tmp_path: Path) -> None:
    """The NaN weights are after the last keys and values, so that they affect only the predictions."""
    broken = tmp_path / "broken.gguf"
    shutil.copyfile(prose_model, broken)
    reader = gguf.GGUFReader(broken, "r+")
    (last,) = (one for one in reader.tensors if one.name == "blk.5.ffn_down.weight")
    last.data[0].reshape(-1, 34)[:, :2].view("<f2")[:] = np.nan
    reader.data.flush()
    done = tool("convert", broken, tmp_path / "fixed.gguf", "-f", text, "--tokens", 512)
    assert done.exit_code == 1 and not (tmp_path / "fixed.gguf").exists()
    wanted = f"turboquant: {broken}: its predictions of {text} are not finite; is the model damaged?"
    assert done.stderr.splitlines()[-1] == wanted


def test_mixed_quantization(build: Build, outliers: Path, text: Path, tmp_path: Path) -> None:
    """In Q4_K_M rows of Q4_K and Q6_K are scaled through the scales of blocks; columns of the output cannot be."""
    model, fixed = tmp_path / "q4_k_m.gguf", tmp_path / "fixed.gguf"
    build.run("llama-quantize", "--allow-requantize", outliers, model, "Q4_K_M", 2)
    done = convert(model, fixed, text, mode="pow2", tokens=512, bin=build.bin)
    assert {part.refused for part in done.parts if part.what == "K"} == {""}
    assert {part.refused.replace(f"blk.{part.layer}.", "") for part in done.parts if part.what == "V"} == {
        "attn_output.weight is Q4_K, whose columns cannot be scaled on their own"
    }
    before, after = klds(build, model, text, {model: TURBO4, fixed: TURBO4})
    assert after <= before / 3  # measured: 3.5 times on a short text, as V's outliers stay


def uneven(model: Path, path: Path) -> Path:
    """A copy of a float model with channels of very different sizes in K and V."""
    shutil.copyfile(model, path)
    reader = gguf.GGUFReader(path, "r+")
    names = {tensor.name for tensor in reader.tensors}
    rng = np.random.default_rng(3)
    for tensor in reader.tensors:
        kind = tensor.name.split(".")[-2]
        if kind in ("attn_k", "attn_v", "attn_k_norm") and tensor.name.replace("k.", "k_norm.") not in names:
            factors = 2.0 ** rng.normal(0, 1.5, len(tensor.data))
            tensor.data[:] = (tensor.data.T * factors / np.sqrt(np.square(factors).mean())).T
        elif kind == "attn_qkv":
            heads, kv_heads, size = 4, 2, 64
            kv = tensor.data[heads * size :]
            factors = 2.0 ** rng.normal(0, 1.5, 2 * kv_heads * size)
            kv[:] *= (factors / np.sqrt(np.square(factors).mean()))[:, None]
    reader.data.flush()
    return path


@pytest.mark.parametrize("shape", ["fused", "partial", "hybrid", "iswa", "head96"])
def test_kinds_of_models(build: Build, tiny, heldout: str, tmp_path: Path, shape: str) -> None:
    """A fused QKV matrix, partial RoPE, QK-norm, two caches, blocks of 32: the same function, and less noise."""
    model, fixed, text = uneven(tiny(shape), tmp_path / "in.gguf"), tmp_path / "out.gguf", tmp_path / "text.txt"
    text.write_text(heldout[:3000], encoding="utf-8")
    done = convert(model, fixed, text, tokens=512, bin=build.bin)
    assert done.mode == "exact" and done.kld <= EXACT
    assert [part.refused for part in done.parts if part.what == "K"] == [""] * (len(done.parts) // 2)
    assert max(part.ratio for part in done.parts if part.what == "K") < 0.9
    v_refused = {part.refused for part in done.parts if part.what == "V"}
    assert v_refused == {""}, v_refused
    before, after = klds(build, model, text, {model: ("turbo4", "f16"), fixed: ("turbo4", "f16")})
    assert after < 0.9 * before


def test_exact_scales_that_cost_too_much_are_given_up(build: Build, tiny, heldout: str, tmp_path: Path) -> None:
    """Norms of a quantized model are f32, but another rounding of K also changes the rounding of activations."""
    model, text = tmp_path / "in.gguf", tmp_path / "text.txt"
    build.run("llama-quantize", uneven(tiny("hybrid"), tmp_path / "f32.gguf"), model, "Q8_0", 2)
    text.write_text(heldout[:1500], encoding="utf-8")
    said: list[str] = []
    reporter = Reporter()
    reporter.say = said.append  # type: ignore[method-assign]
    done = convert(model, tmp_path / "out.gguf", text, tokens=512, bin=build.bin, reporter=reporter)
    assert done.mode == "pow2" and done.kld <= done.limit
    assert any(line.startswith("exact scales cost ") for line in said)
    assert max(part.ratio for part in done.parts if part.what == "K") < 0.9


def test_other_ropes_are_named(build: Build, tiny, heldout: str, tmp_path: Path) -> None:
    """With M-RoPE, K stays unchanged and V is balanced."""
    model, text = uneven(tiny("mrope"), tmp_path / "in.gguf"), tmp_path / "text.txt"
    text.write_text(heldout[:1500], encoding="utf-8")
    done = convert(model, tmp_path / "out.gguf", text, tokens=512, bin=build.bin)
    refused = {part.what: part.refused for part in done.parts}
    assert "it is rotated by M-RoPE, and only normal and neox are known" in refused["K"] and not refused["V"]
    with pytest.raises(ConvertError, match=r"can be balanced.*\n  K: it is rotated by M-RoPE.*layers 0-2"):
        convert(model, tmp_path / "none.gguf", text, tokens=512, values=False, bin=build.bin)
    assert not (tmp_path / "none.gguf").exists()


def test_latent_attention_is_left_alone(build: Build, tiny, heldout: str, tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text(heldout[:1500], encoding="utf-8")
    with pytest.raises(ConvertError, match="nothing in it can be balanced.*\n  K: it goes through CONCAT") as caught:
        convert(tiny("mla"), tmp_path / "out.gguf", text, tokens=512, bin=build.bin)
    assert "V: V is not cached on its own" in str(caught.value)


def test_the_floor_is_what_rounding_does(build: Build, tiny, prose_model: Path, text: Path) -> None:
    """Quantized weights amplify rounding differences (measured: 0.0006 and 0.0034); float weights do not."""
    for model, low, high in ((prose_model, EXACT, 0.02), (tiny("mha"), -EXACT, EXACT)):
        with checker(model, text, 256, 2, build.bin, None, Reporter()) as check:
            assert low < check.floor(model) < high
            assert abs(check.kld(model, what="itself")) <= EXACT


def test_a_model_that_differs_is_not_written(
    build: Build, outliers: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The check detects a scaling that changes the function: here every second row of K is not scaled."""
    from turboquant.models import modelfile

    def forgetful(rows: np.ndarray, kind: str, factors: np.ndarray) -> np.ndarray:
        return real(rows, kind, np.where(np.arange(len(factors)) % 2, factors, 1))

    real = modelfile.scale_rows
    monkeypatch.setattr(modelfile, "scale_rows", forgetful)
    with pytest.raises(ConvertError, match="differs from the original by .* so it was not written"):
        convert(outliers, tmp_path / "out.gguf", text, mode="pow2", tokens=512, bin=build.bin)
    assert list(tmp_path.iterdir()) == []


# ---- what goes wrong -------------------------------------------------------------------------------------------------


def limit_files() -> None:
    """Simulate a full disk by a limit of 6 MiB for files. Python ignores SIGXFSZ."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (6 << 20, 6 << 20))


def unwritable(tmp_path: Path) -> Path:
    """A folder in which this user, even root, cannot create a file."""
    if os.geteuid() == 0:
        return Path("/proc/self/fdinfo")
    folder = tmp_path / "read-only"
    folder.mkdir(mode=0o555)
    return folder


@pytest.fixture
def broken(outliers: Path, heldout: str, tmp_path: Path) -> dict[str, Path]:
    """Files that are no model or no text."""
    folder = tmp_path / "in"
    folder.mkdir()
    paths = {name: folder / name for name in ("truncated.gguf", "no.gguf", "empty.txt", "short.txt")}
    paths["truncated.gguf"].write_bytes(outliers.read_bytes()[:-100000])
    paths["no.gguf"].write_text("PK not a model")
    paths["empty.txt"].write_text("")
    paths["short.txt"].write_text(heldout[:600])
    return paths


PROBLEMS = {
    "truncated": ("truncated.gguf", None, None, "truncated.gguf is truncated.*: get the file again"),
    "not a GGUF": ("no.gguf", None, None, "no.gguf is not a GGUF file.*: give a GGUF model"),
    "no model": ("missing.gguf", None, None, "missing.gguf: no such file; give a GGUF model"),
    "no text": (None, "empty.txt", None, "empty.txt has no text in it: give another text with -f"),
    "short text": (None, "short.txt", None, r"short.txt has \d+ tokens, .*: give a longer text"),
    "no folder": (None, None, "missing/out", "missing: no such folder; make it first"),
    "read-only folder": (None, None, "unwritable", r"cannot be written \(.*\): give a file in a folder"),
    "existing file": (None, None, "in/empty.txt", "empty.txt exists already: remove it, or give another name"),
}


@pytest.mark.parametrize("problem", PROBLEMS)
@pytest.mark.parametrize("command", ["convert", "dump-kv"])
def test_one_sentence_that_says_what_to_do(
    tool, outliers: Path, text: Path, tmp_path: Path, broken: dict[str, Path], command: str, problem: str
) -> None:
    model_name, text_name, target_name, message = PROBLEMS[problem]
    model = tmp_path / "in" / model_name if model_name else outliers
    words = tmp_path / "in" / text_name if text_name else text
    target = unwritable(tmp_path) / "out" if target_name == "unwritable" else tmp_path / (target_name or "out")
    before = sorted(tmp_path.rglob("*"))
    if command == "convert":
        done = tool("convert", model, target, "-f", words)
    else:
        done = tool("dump-kv", "-m", model, "-f", words, "-o", target, "--tokens", 512)
    assert done.exit_code == 1
    told = [line for line in done.stderr.splitlines() if not line.endswith(" ...")]  # the step that was interrupted
    assert len(told) == 1 and told[0].startswith("turboquant: "), done.stderr
    with pytest.raises(AssertionError, match=message):
        assert not told[0]
    assert sorted(tmp_path.rglob("*")) == before and done.stdout == ""


def test_a_full_disk(build: Build, outliers: Path, heldout: str, tmp_path: Path) -> None:
    text, folder = tmp_path / "text.txt", tmp_path / "out"
    text.write_text(heldout[:3000], encoding="utf-8")  # short, so that the check's own files stay small
    folder.mkdir()
    for command in (
        ["convert", outliers, folder / "out.gguf", "-f", text],
        ["dump-kv", "-m", outliers, "-f", text, "-o", folder / "kv", "--tokens", 600],
    ):
        words = [sys.executable, "-m", "turboquant.cli", *map(str, command), "--bin", str(build.bin)]
        done = subprocess.run(words, capture_output=True, text=True, preexec_fn=limit_files)
        assert done.returncode == 1 and "Traceback" not in done.stderr
        assert "cannot be written (" in done.stderr.splitlines()[-1], done.stderr
        assert done.stderr.endswith("): make room, or give a file on another disk\n")
        assert list(folder.iterdir()) == []


def test_ctrl_c_leaves_nothing(build: Build, outliers: Path, text: Path, tmp_path: Path) -> None:
    """An interruption during the check removes the temporary file."""
    command = [sys.executable, "-m", "turboquant.cli", "convert", outliers, tmp_path / "out.gguf", "-f", text]
    process = subprocess.Popen(
        [*map(str, command), "--bin", str(build.bin)], stderr=subprocess.PIPE, text=True, start_new_session=True
    )
    assert process.stderr
    for line in process.stderr:
        if line.startswith("predicting with the converted model"):
            break
    assert [path.suffix for path in tmp_path.iterdir()] == [".partial"]
    os.killpg(process.pid, signal.SIGINT)  # as a terminal does
    said = process.stderr.read()
    process.stderr.close()
    assert process.wait(timeout=60) == 130 and "interrupted" in said and "Traceback" not in said
    assert list(tmp_path.iterdir()) == []


# ---- dump-kv and analyze ---------------------------------------------------------------------------------------------


def test_dump_is_what_attention_sees(tool, tiny, tmp_path: Path) -> None:
    """K and V of the first layer of a random model equal those computed here from embedding, norm, matrix and RoPE."""
    model, target, text = tiny("gqa"), tmp_path / "kv.safetensors", tmp_path / "text.txt"
    text.write_bytes(bytes(range(97, 123)) * 4)
    done = tool("dump-kv", "-m", model, "-f", text, "-o", target, "--tokens", 40)
    assert done.exit_code == 0 and done.stdout == f"{target}\n", done.stderr
    dumped = load_file(target)
    assert {name: x.shape for name, x in dumped.items()} == {
        f"{name}.{layer}": (40, heads, 128) for layer in range(3) for name, heads in (("q", 8), ("k", 2), ("v", 2))
    }
    weights = {tensor.name: tensor.data for tensor in gguf.GGUFReader(model).tensors}
    x = weights["token_embd.weight"][[ord("a") + i % 26 for i in range(40)]].astype(np.float64)
    x /= np.sqrt(np.square(x).mean(axis=1, keepdims=True) + 1e-5)
    v, k = (x @ weights[f"blk.0.attn_{name}.weight"].T for name in "vk")
    angle = np.arange(40)[:, None, None] * 10000.0 ** (-np.arange(64) / 64)
    k = k.reshape(40, 2, 64, 2)
    even, odd = k[..., 0], k[..., 1]
    turned = np.stack([even * np.cos(angle) - odd * np.sin(angle), even * np.sin(angle) + odd * np.cos(angle)], axis=-1)
    assert np.allclose(dumped["v.0"], v.reshape(40, 2, 128), atol=1e-3)
    assert np.allclose(dumped["k.0"], turned.reshape(40, 2, 128), atol=1e-3)


def test_every_piece_begins_as_a_text(build: Build, tiny, heldout: str, tmp_path: Path) -> None:
    """If the model has a BOS token, every piece starts with it, so the first keys of all pieces are the same."""
    model, text = tmp_path / "bos.gguf", tmp_path / "text.txt"
    shutil.copyfile(tiny("gqa"), model)
    reader = gguf.GGUFReader(model, "r+")
    text.write_text(heldout[:200], encoding="utf-8")
    for wanted in (False, True):
        reader.fields["tokenizer.ggml.add_bos_token"].parts[-1][0] = wanted
        reader.data.flush()
        with Capture(model, text, tokens=48, context=16, bin=build.bin) as capture:
            keys = [item for item in capture if isinstance(item, Data) and (item.role, item.layer) == ("k", 0)]
        first, *others = (item.values[0] for item in keys)
        assert [item.first for item in keys] == [0, 16, 32]
        assert all(np.array_equal(first, other) for other in others) == wanted


def test_analyze_finds_the_planted_channels(tool, outliers: Path, text: Path, tmp_path: Path) -> None:
    target = tmp_path / "kv.safetensors"
    assert tool("dump-kv", "-m", outliers, "-f", text, "-o", target, "--tokens", 256).exit_code == 0
    done = CliRunner().invoke(cli.app, ["analyze", str(target), "--types", "turbo4,q8_0", "--json"])
    assert done.exit_code == 0, done.stderr
    said = json.loads(done.stdout)
    assert said["model"] == "outliers.gguf" and said["tokens"] == 256 and len(said["layers"]) == 6
    for layer in said["layers"]:
        assert layer["k"]["outlier"] > 10 > layer["v"]["outlier"]
        assert layer["k"]["outlier_rotated"] < layer["k"]["outlier"] / 3
        assert layer["balance"] < 0.5
        assert layer["k"]["effects"]["turbo4"]["score"] > 10 * layer["k"]["effects"]["q8_0"]["score"]
