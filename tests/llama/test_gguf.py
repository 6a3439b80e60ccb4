"""Weights of turbo types in a GGUF file give the same results as their dequantized copies."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from harness import TURBO_ALL, Probe, kld, random_tokens
from make_model import Shape, write_model

#: KLD between turbo weights and the same weights in float32, due to the rounding of activations to int8.
WEIGHTS = 1e-3

TOKENS = random_tokens(120, seed=6)

gguf = pytest.importorskip("gguf")


def convert(source: Path, turbo: Path, plain: Path, name: str) -> int:
    """Copy a model twice: its matrices encoded as `name`, and the same matrices decoded back to float32.

    Returns the number of encoded tensors.
    """
    import turboquant
    import turboquant.gguf

    member = turboquant.gguf.ggml_type(name)
    block = gguf.GGML_QUANT_SIZES[member][0]
    reader = gguf.GGUFReader(source)
    count = 0
    writers = [gguf.GGUFWriter(path, reader.fields["general.architecture"].contents()) for path in (turbo, plain)]
    for key, field in reader.fields.items():
        if key.startswith("GGUF.") or key == "general.architecture":
            continue
        kind = field.types[0]
        sub = field.types[-1] if kind == gguf.GGUFValueType.ARRAY else None
        for writer in writers:
            writer.add_key_value(key, field.contents(), kind, sub)
    for tensor in reader.tensors:
        data = np.array(tensor.data)
        if data.ndim == 2 and data.shape[1] % block == 0:
            encoded = turboquant.quantize(data, name)
            writers[0].add_tensor(tensor.name, encoded, raw_dtype=member)
            data = turboquant.dequantize(encoded, name)
            count += 1
        else:
            writers[0].add_tensor(tensor.name, data)
        writers[1].add_tensor(tensor.name, data)
    for writer in writers:
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
    return count


@pytest.mark.parametrize("name", TURBO_ALL)
def test_weights(build, tmp_path: Path, name: str) -> None:
    source = write_model(tmp_path / "f32.gguf", Shape(width=128, ff=256, layers=2))
    turbo, plain = tmp_path / "turbo.gguf", tmp_path / "plain.gguf"
    assert convert(source, turbo, plain, name) == 2 + 2 * 7  # embedding and output, seven matrices a layer
    logits = {}
    for path in (source, turbo, plain):
        with Probe(build, path, tmp_path) as probe:
            probe.context()
            logits[path] = probe.logits(TOKENS)
            one = probe.context() or probe.logits(TOKENS, step=1)
            assert kld(logits[path], one) <= 0.01 * max(1e-3, kld(logits[source], logits[path]))
    # The weights are the same; the products differ by the rounding of the activations to int8.
    assert kld(logits[plain], logits[turbo]) <= WEIGHTS
    assert kld(logits[source], logits[turbo]) > 4 * WEIGHTS, "the test cannot tell the types from float32"


def test_file_reads_back(tmp_path: Path) -> None:
    import turboquant
    import turboquant.gguf

    source = write_model(tmp_path / "f32.gguf", Shape(width=128, ff=256, layers=1))
    turbo, plain = tmp_path / "turbo.gguf", tmp_path / "plain.gguf"
    convert(source, turbo, plain, "turbo4")
    ours = {t.name: t for t in gguf.GGUFReader(turbo).tensors}
    theirs = {t.name: t for t in gguf.GGUFReader(plain).tensors}
    assert ours.keys() == theirs.keys()
    encoded = [name for name, t in ours.items() if t.tensor_type == turboquant.gguf.ggml_type("turbo4")]
    assert len(encoded) == 9
    for name in encoded:
        decoded = gguf.quants.dequantize(ours[name].data, ours[name].tensor_type)
        assert np.array_equal(decoded, theirs[name].data)
