"""turboquant.dump.load: reading the files of `turboquant dump-kv`."""
import json

import numpy as np
import pytest

pytest.importorskip("safetensors", reason="needs pip install '.[convert]'")
from safetensors.numpy import save_file  # noqa: E402
from turboquant import cli, dump  # noqa: E402
from typer.testing import CliRunner  # noqa: E402


def written(path, tensors, **metadata):
    scales = {name: 0.125 for name in tensors if name.startswith("q.")}
    save_file(tensors, path, {"format": dump.FORMAT, "scale": json.dumps(scales), **metadata})
    return path


def tensors(layers=(0, 3), kind=np.float32):
    rng = np.random.default_rng(0)
    return {f"{role}.{layer}": rng.standard_normal((5, heads, head)).astype(kind)
            for layer in layers for role, heads, head in (("q", 4, 64), ("k", 2, 64), ("v", 2, 32))}


@pytest.mark.parametrize("kind", [np.float32, np.float16])
def test_layers_heads_first(tmp_path, kind):
    stored = tensors(kind=kind)
    layers = dump.load(written(tmp_path / "x.safetensors", stored))
    assert list(layers) == [0, 3]
    for number, layer in layers.items():
        assert layer.scale == 0.125
        for role in "qkv":
            array = getattr(layer, role)
            assert array.dtype == np.float32 and array.flags.c_contiguous
            np.testing.assert_array_equal(array, stored[f"{role}.{number}"].swapaxes(0, 1).astype(np.float32))


def test_further_attentions_are_left_out(tmp_path):
    stored = tensors(layers=(10, 2))
    stored["q.2.1"] = stored["q.2"] * 2
    layers = dump.load(str(written(tmp_path / "x.safetensors", stored)))
    assert list(layers) == [2, 10]
    np.testing.assert_array_equal(layers[2].q, stored["q.2"].swapaxes(0, 1))


def test_refusals(tmp_path):
    stored = tensors(layers=(1,))
    del stored["v.1"]
    with pytest.raises(dump.DumpError, match=r"mla\.safetensors has no v\.1"):
        dump.load(written(tmp_path / "mla.safetensors", stored))
    with pytest.raises(dump.DumpError, match=r"other\.safetensors .*'else'.*turboquant-kv 1"):
        dump.load(written(tmp_path / "other.safetensors", tensors(), format="else"))
    text = tmp_path / "text.txt"
    text.write_text("no tensors here, but enough of bytes to look for a header")
    with pytest.raises(dump.DumpError, match=r"text\.txt is not a safetensors file"):
        dump.load(text)
    with pytest.raises(OSError):
        dump.load(tmp_path / "missing")


def one(shape=(5, 2, 64), kind=np.float32):
    return np.zeros(shape, kind)


GOOD = {"q.0": one((5, 4, 64)), "k.0": one(), "v.0": one()}
#: Tensors in place of those above, metadata, and what is said of it.
DAMAGED = {
    "no scale": ({}, {"scale": ""}, "names no scales of its queries"),
    "deep scale": ({}, {"scale": "[" * 100_000}, "names no scales of its queries"),
    "list of scales": ({}, {"scale": "[1]"}, "names no scales of its queries"),
    "scale in words": ({}, {"scale": '{"q.0": "x"}'}, "names no scales of its queries"),
    "endless scale": ({}, {"scale": '{"q.0": 1e999}'}, "names no scales of its queries"),
    "other scale": ({}, {"scale": '{"q.1": 1}'}, "names no scale of q.0"),
    "matrix": ({"k.0": one((5, 64))}, {}, "k.0 is F32 of shape (5, 64), wanted floats (tokens, heads, head)"),
    "numbers": ({"v.0": one(kind=np.int8)}, {}, "v.0 is I8 of shape"),
    "nothing": ({"v.0": one((5, 0, 64))}, {}, "v.0 is F32 of shape (5, 0, 64)"),
    "many heads of nothing": ({"k.0": one((5, 1 << 40, 0))}, {}, "k.0 is F32 of shape (5, 1099511627776, 0)"),
    "fewer tokens": ({"v.0": one((4, 2, 64))}, {}, "has different numbers of tokens: 5 in"),
    "odd heads": ({"q.0": one((5, 3, 64))}, {}, "q.0 has 3 heads of 64, which do not go with 2 of 64 in K"),
    "other head": ({"q.0": one((5, 4, 32))}, {}, "q.0 has 4 heads of 32, which do not go with 2 of 64 in K"),
    "odd values": ({"v.0": one((5, 1, 64))}, {}, "v.0 has 1 heads of 64, which do not go with 2 of 64 in K"),
}


def refused(path):
    """What `turboquant analyze` says of the file: one sentence, after the line that tells what it does."""
    done = CliRunner().invoke(cli.app, ["analyze", str(path)])
    assert done.exit_code == 1 and done.stdout == ""
    start, said = done.stderr.splitlines()
    assert start == "analyzing layers ..."
    return said


@pytest.mark.parametrize("change, metadata, words", DAMAGED.values(), ids=DAMAGED)
def test_damage_is_a_sentence(tmp_path, change, metadata, words):
    about = {"model": "m", "text": "t", "tokens": "5", **metadata}
    path = written(tmp_path / "evil.safetensors", {**GOOD, **change}, **about)
    with pytest.raises(dump.DumpError) as info:
        dump.load(path)
    assert str(path) in str(info.value) and words in str(info.value)
    said = refused(path)
    assert str(path) in said and words in said


@pytest.mark.parametrize("name", ["k.x", "k.-1", "k.01", f"k.{'9' * 5000}", "v", "q.0.0.0", "k.0\n"])
def test_names_of_others_are_left_alone(tmp_path, name):
    path = written(tmp_path / "more.safetensors", {**GOOD, name: one((3,), np.int8)}, model="m", text="t", tokens="5")
    assert list(dump.load(path)) == [0]
    assert CliRunner().invoke(cli.app, ["analyze", str(path)]).exit_code == 0


@pytest.mark.parametrize("missing", ["model", "text", "tokens"])
def test_analyze_needs_to_know_what_it_reports(tmp_path, missing):
    about = {key: "5" for key in ("model", "text", "tokens") if key != missing}
    path = written(tmp_path / "evil.safetensors", GOOD, **about)
    assert f"{path} names no {missing}" in refused(path)


def test_analyze_refuses_what_is_no_number(tmp_path):
    stored = {**GOOD, "k.0": np.full((5, 2, 64), np.nan, np.float32)}
    path = written(tmp_path / "evil.safetensors", stored, model="m", text="t", tokens="5")
    assert f"{path}: k.0 is not finite" in refused(path)


def test_analyze_needs_queries(tmp_path):
    stored = {name: GOOD[name] for name in ("k.0", "v.0")}
    path = written(tmp_path / "evil.safetensors", stored, model="m", text="t", tokens="5")
    assert f"{path} has no q.0" in refused(path)
