"""The header of a GGUF file: it is read as by the gguf package, and damaged files are refused with a message."""

from __future__ import annotations

import struct
from pathlib import Path

import gguf
import numpy as np
import pytest
from make_model import SHAPES, write_model
from turboquant import cli
from turboquant.errors import TurboQuantError
from turboquant.models import header
from turboquant.models.header import read_header
from turboquant.models.modelfile import ModelError, ModelFile
from turboquant.plan import read_shape
from typer.testing import CliRunner

U8, U32, F32, STRING, ARRAY, U64 = 0, 4, 6, 8, 9, 10


def text(value: str | bytes) -> bytes:
    raw = value.encode() if isinstance(value, str) else value
    return struct.pack("<Q", len(raw)) + raw


def pair(key: str | bytes, kind: int, value: bytes) -> bytes:
    return text(key) + struct.pack("<I", kind) + value


def array(kind: int, count: int, body: bytes = b"") -> bytes:
    return struct.pack("<IQ", kind, count) + body


def number(value: int) -> bytes:
    return struct.pack("<I", value)


def info(name: str | bytes, shape: tuple[int, ...], offset: int, kind: int = 0) -> bytes:
    return text(name) + struct.pack(f"<I{len(shape)}QIQ", len(shape), *shape, kind, offset)


LLAMA = {
    "general.architecture": pair("general.architecture", STRING, text("llama")),
    "llama.context_length": pair("llama.context_length", U32, number(4096)),
    "llama.block_count": pair("llama.block_count", U32, number(1)),
}
EMBEDDING = info("token_embd.weight", (32, 4), 0)


def file(
    *metadata: bytes, infos: tuple[bytes, ...] = (EMBEDDING,), size: int = 4096, counts: tuple[int, int] | None = None,
    version: int = 3,
) -> bytes:  # fmt: skip
    """A file of `size` bytes with a small language model, and the given metadata and tensors."""
    known = {**LLAMA, **{key: b"" for key in LLAMA if any(key.encode() in one for one in metadata)}}
    parts = [*filter(None, known.values()), *metadata]
    tensors, fields = counts or (len(infos), len(parts))
    head = b"GGUF" + struct.pack("<IQQ", version, tensors, fields) + b"".join(parts) + b"".join(infos)
    return head.ljust(size, b"\0")


HOSTILE = {
    "2^20 strings": (file(pair("x", ARRAY, array(STRING, 1 << 20))), "x claims 1048576 strings, and"),
    "2^24 strings": (file(pair("x", ARRAY, array(STRING, 1 << 24))), "x claims 16777216 strings, and"),
    "2^24 bytes": (file(pair("x", ARRAY, array(U8, 1 << 24))), "16777216 bytes are claimed at"),
    "2^62 numbers": (file(pair("x", ARRAY, array(U64, 1 << 62))), "bytes are claimed at"),
    "lists of lists": (file(pair("x", ARRAY, array(ARRAY, 1 << 20))), "x is a list of lists"),
    "unknown kind": (file(pair("x", 77, b"")), "x has the unknown type 77"),
    "long key": (file(struct.pack("<Q", 1 << 40)), "a key of its metadata claims 1099511627776 bytes"),
    "long string": (file(pair("x", STRING, struct.pack("<Q", 1 << 40))), "1099511627776 bytes are claimed at"),
    "many metadata": (file(counts=(1, 1 << 60)), "truncated or damaged"),
    "many tensors": (file(counts=(1 << 60, 3)), "has 0 dimensions"),
    "key not UTF-8": (file(pair(b"\xff\xfe", U32, number(1))), r"a key of its metadata is not UTF-8: b'\xff\xfe'"),
    "name not UTF-8": (file(infos=(info(b"\xc3", (32,), 0),)), "a tensor's name is not UTF-8"),
    "key twice": (file(pair("x", U32, number(1)), pair("x", U32, number(2))), "it has x twice in its metadata"),
    "control characters": (file(pair("\x1b[31m\n", 77, b"")), r"'\x1b[31m\n' has the unknown type 77"),
    "zero dimensions": (file(infos=(info("t", (), 0),)), "tensor t has 0 dimensions"),
    "five dimensions": (file(infos=(info("t", (32, 1, 1, 1, 1), 0),)), "tensor t has 5 dimensions"),
    "2^30 dimensions": (file(infos=(text("t") + number(1 << 30),)), "tensor t has 1073741824 dimensions"),
    "empty dimension": (file(infos=(info("t", (32, 0), 0),)), "tensor t has the shape (32, 0)"),
    "2^60 rows": (file(infos=(info("t", (32, 1 << 60), 0),)), "tensor t ends at"),
    "half a block": (file(infos=(info("t", (33, 2), 0, 2),)), "tensor t has the shape (33, 2), which Q4_0 cannot have"),
    "beyond the end": (file(infos=(info("t", (32,), 1 << 62),)), "tensor t ends at"),
    "between multiples": (file(infos=(info("t", (32,), 8),)), "tensor t begins at 8, which is no multiple of 32"),
    "overlap": (file(infos=(info("a", (32,), 0), info("b", (64, 2), 64))), "tensors a and b overlap"),
    "within another": (file(infos=(info("a", (32, 8), 0), info("b", (8,), 64))), "tensors a and b overlap"),
    "tensor twice": (file(infos=(info("a", (32,), 0), info("a", (32,), 128))), "it has two tensors a"),
    "unknown type": (file(infos=(info("t", (32,), 0, 9999),)), "cannot be used: tensor t has the type 9999"),
    "old": (file(version=1), "cannot be used: it has version 1"),
    "big-endian": (file(version=3 << 24), "byte order of another kind of machine; gguf-convert-endian"),
    "alignment 0": (file(pair("general.alignment", U32, number(0))), "general.alignment is 0"),
    "alignment 2^31": (file(pair("general.alignment", U32, number(1 << 31))), "general.alignment is 2147483648"),
    "alignment name": (file(pair("general.alignment", STRING, text("no"))), "general.alignment is 'no'"),
    "layers in words": (file(pair("llama.block_count", STRING, text("six"))), "llama.block_count is 'six', wanted a"),
    "context in words": (file(pair("llama.context_length", STRING, text("x"))), "llama.context_length is 'x'"),
    "parts in words": (file(pair("split.count", STRING, text("two"))), "split.count is 'two', wanted a number"),
    "architecture 7": (file(pair("general.architecture", U32, number(7))), "general.architecture is 7, wanted a name"),
    "no tensors": (file(infos=()), "has no tensors in it"),
}  # fmt: skip


@pytest.mark.parametrize(("raw", "words"), HOSTILE.values(), ids=HOSTILE)
def test_damage_is_a_sentence(tmp_path: Path, raw: bytes, words: str) -> None:
    path = tmp_path / "evil.gguf"
    path.write_bytes(raw)
    with pytest.raises(ModelError) as info:
        ModelFile(path)
    assert str(info.value).startswith(str(path)) and words in str(info.value)
    with pytest.raises(TurboQuantError, match="evil"):
        read_shape(path)
    for command in (
        ["compare", "-m", path],
        ["convert", path, tmp_path / "out.gguf"],
        ["tune", "-m", path, "-o", tmp_path / "plan.json", "--bits", "4"],
    ):
        done = CliRunner().invoke(cli.app, [*map(str, command)])
        assert done.exit_code == 1 and str(path) in done.stderr, done.stderr
        assert done.stderr.count("\n") == 1 and done.stderr.rstrip("\n").isprintable()
        assert not isinstance(done.exception, AssertionError)
    assert list(tmp_path.iterdir()) == [path]


def test_an_embedding_of_one_dimension(tmp_path: Path) -> None:
    path = tmp_path / "evil.gguf"
    path.write_bytes(file(infos=(info("token_embd.weight", (32,), 0),)))
    done = CliRunner().invoke(cli.app, ["compare", "-m", str(path)])
    assert done.exit_code == 1 and done.stderr.count("\n") == 1
    assert f"{path} holds no language model (architecture 'llama')" in done.stderr


@pytest.mark.parametrize("size", [0, 3, 23])
def test_next_to_nothing(tmp_path: Path, size: int) -> None:
    path = tmp_path / "short.gguf"
    path.write_bytes(file()[:size])
    with pytest.raises(ModelError, match=r"short\.gguf is truncated or damaged \(it is shorter than"):
        ModelFile(path)


def test_every_shorter_head(tmp_path: Path) -> None:
    whole = file(pair("x", ARRAY, array(STRING, 2, text("a") + text("bc"))), pair("y", F32, struct.pack("<f", 0.5)))
    path = tmp_path / "short.gguf"
    path.write_bytes(whole)
    end = read_header(path).tensors[0].end
    for size in range(end):
        path.write_bytes(whole[:size])
        with pytest.raises(ModelError, match="truncated or damaged"):
            ModelFile(path)


def test_text_that_is_not_utf8_is_harmless(tmp_path: Path) -> None:
    path = tmp_path / "latin.gguf"
    path.write_bytes(file(pair("general.name", STRING, text("Käse".encode("latin-1")))))
    with ModelFile(path) as model:
        assert model.metadata["general.name"] == "K\ufffdse"


@pytest.mark.parametrize("shape", ["head128", "biased", "mla", "fused", "hybrid", "sinks"])
def test_models_are_read_as_the_gguf_package_reads_them(tmp_path: Path, shape: str) -> None:
    path = write_model(tmp_path / "model.gguf", SHAPES[shape])
    reader, head = gguf.GGUFReader(path), read_header(path)
    assert [(t.name, t.tensor_type.name, tuple(t.shape), t.data_offset, t.n_bytes) for t in reader.tensors] == [
        (t.name, t.type, t.shape, t.offset, t.bytes) for t in head.tensors
    ]
    assert (head.alignment, head.data) == (reader.alignment, reader.data_offset)
    fields = {name: field for name, field in reader.fields.items() if not name.startswith("GGUF.")}
    assert head.fields == len(fields)
    short = {name: field.contents() for name, field in fields.items() if gguf.GGUFValueType.STRING not in field.types[1:]}
    assert head.metadata == short


def test_values_of_every_kind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "kinds.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    values: dict[str, object] = {}
    for kind, value in {"uint8": 255, "int8": -128, "uint16": 65535, "int16": -5, "uint32": 1 << 31, "int32": -9,
                        "uint64": 1 << 63, "int64": -(1 << 62), "float32": 0.5, "float64": 0.1, "bool": True,
                        "string": "ä"}.items():  # fmt: skip
        getattr(writer, f"add_{kind}")(f"a.{kind}", value)
        values[f"a.{kind}"] = value
    for name, items in {"numbers": [1, 2, 3], "floats": [0.5, -1.5], "truths": [True, False]}.items():
        writer.add_array(f"b.{name}", items)
        values[f"b.{name}"] = items
    writer.add_array("c.words", ["a", "b"])
    writer.add_array("c.long", list(range(5000)))
    writer.add_string("c.text", "x" * 100)
    writer.add_tensor("t", np.zeros(8, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    monkeypatch.setattr(header, "_TEXT", 99)
    assert read_header(path).metadata == {"general.architecture": "llama", **values}
