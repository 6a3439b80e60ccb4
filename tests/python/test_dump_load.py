"""turboquant.dump.load: reading the files of `turboquant dump-kv`."""
import json

import numpy as np
import pytest

pytest.importorskip("safetensors", reason="needs pip install '.[convert]'")
from safetensors.numpy import save_file  # noqa: E402

from turboquant import dump  # noqa: E402


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
