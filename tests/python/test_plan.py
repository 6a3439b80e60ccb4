"""turboquant.plan: the compact syntax, files, metadata, hostile input, and the size of a cache."""

from __future__ import annotations

import json
import os
import random

import gguf
import pytest
from make_model import Shape, write_model
from turboquant._output import OutputError
from turboquant.measure.pairs import Window
from turboquant.models.modelfile import ModelFile
from turboquant.plan import (
    CacheShape,
    Layer,
    Plan,
    PlanError,
    check_target,
    compact,
    expand,
    fitting,
    read_plan,
    read_shape,
    shape_of,
    write_plan,
)

PLAN = Plan(("q8_0", "q8_0", "turbo4", None), ("turbo3", "turbo4", "turbo4", None), {"layers": 4}, {"tool": "test"})


# ---- compact syntax --------------------------------------------------------------------------------------------------


def test_compact():
    assert compact(PLAN.k) == "q8_0*2,turbo4,-"
    assert expand("q8_0*2,turbo4,-") == PLAN.k
    assert expand("turbo4_64*3,-*2") == ("turbo4_64",) * 3 + (None,) * 2


def test_compact_and_expand_are_inverse():
    rng = random.Random(0)
    for _ in range(200):
        types = tuple(rng.choices(("q8_0", "turbo4", "turbo2_64", "f16", None), k=rng.randint(1, 40)))
        assert expand(compact(types)) == types


@pytest.mark.parametrize(
    "text", ["", "q8_0,", "q8_0**2", "q8_0*0", "q8_0*-1", "q8_0*99999", "q8_0*2*2", "no_such", "Q8_0", "q8_0*4000,f16*97"]
)
def test_what_is_no_list(text):
    with pytest.raises(PlanError, match="^here: .*"):
        expand(text, "here")


def test_fitting():
    heads = {64: "turbo4_64", 128: "turbo4", 192: "turbo4_64", 96: "turbo4_32", 80: None}
    assert {head: fitting("turbo4", head) for head in heads} == heads
    assert fitting("turbo3_64", 128) == "turbo3_64" and fitting("turbo3_64", 96) is None
    assert fitting("q8_0", 96) == "q8_0" and fitting("q8_0", 80) is None and fitting("f16", 80) == "f16"


# ---- files -----------------------------------------------------------------------------------------------------------


def test_file_round_trip(tmp_path):
    path = tmp_path / "plan.json"
    assert write_plan(path, PLAN) is False
    assert read_plan(path) == PLAN
    value = json.loads(path.read_text(encoding="utf-8"))
    assert list(value) == ["format", "version", "model", "k", "v", "about"]
    assert (value["format"], value["version"], value["k"]) == ("turboquant-plan", 1, ["q8_0", "q8_0", "turbo4", None])
    assert list(tmp_path.iterdir()) == [path]


def test_a_plan_may_be_replaced_and_nothing_else(tmp_path):
    path = tmp_path / "plan.json"
    write_plan(path, PLAN)
    other = Plan(("f16",), ("f16",))
    assert check_target(path) is True and write_plan(path, other) is True and read_plan(path) == other
    assert list(tmp_path.iterdir()) == [path]
    for content in ("my notes", '{"format": "other"}', PLAN.to_json().replace('"version": 1', '"version": 2')):
        path.write_text(content, encoding="utf-8")
        with pytest.raises(PlanError, match=r"plan\.json exists and is no plan of this version: remove it, or give"):
            write_plan(path, PLAN)
        assert path.read_text(encoding="utf-8") == content
    with pytest.raises(OutputError, match="no such folder"):
        write_plan(tmp_path / "none" / "plan.json", PLAN)


def test_a_link_is_not_followed(tmp_path):
    target, link = tmp_path / "target.json", tmp_path / "link.json"
    write_plan(target, PLAN)
    os.symlink(target, link)
    with pytest.raises(PlanError, match="exists and is no plan"):
        write_plan(link, Plan(("f16",), ("f16",)))
    assert read_plan(target) == PLAN


def changed(**more: object) -> str:
    return json.dumps({**json.loads(PLAN.to_json()), **more})


HOSTILE = {
    "empty": ("", "is not a plan"),
    "no JSON": ("turbo4", "is not a plan"),
    "a list": ("[]", "is not a plan"),
    "deep": ("[" * 100000, "is not a plan"),
    "NaN": (changed(about={}).replace('"about": {}', '"about": {"kld": NaN}'), "NaN is no JSON"),
    "infinite": (changed().replace('"layers": 4', '"k_power": [Infinity]'), "Infinity is no JSON"),
    "other format": (changed(format="gguf"), "is not a plan"),
    "newer": (changed(version=2), "plan of version 2, and this TurboQuant reads version 1"),
    "version is a text": (changed(version="1"), "plan of version '1'"),
    "version is true": (changed(version=True), "plan of version True"),
    "k is a text": (changed(k="q8_0*4"), '"k" must be a list'),
    "no v": (changed(v=None), '"v" must be a list'),
    "empty k": (changed(k=[], v=[]), "k has 0 layers"),
    "too many": (changed(k=["f16"] * 5000, v=["f16"] * 5000), "k has 5000 layers"),
    "lengths": (changed(k=["f16"] * 3), "k has 3 layers and v has 4"),
    "unknown type": (changed(k=["f16", "f16", "turbo5", None]), "k: layer 2 has 'turbo5', which is no cache type"),
    "a number": (changed(v=["f16", 4, "f16", None]), "v: layer 1 has 4, which is no cache type"),
    "an object": (changed(v=["f16", {"a": "b" * 500}, "f16", None]), "v: layer 1 has"),
    "model": (changed(model=[1]), '"model" must be an object'),
    "about": (changed(about="me"), '"about" must be an object'),
}


@pytest.mark.parametrize("case", HOSTILE)
def test_hostile_files(tmp_path, case):
    content, message = HOSTILE[case]
    path = tmp_path / "plan.json"
    path.write_text(content, encoding="utf-8")
    with pytest.raises(PlanError) as caught:
        read_plan(path)
    text = str(caught.value)
    assert str(path) in text and message in text and len(text) < 400 + len(str(path)) and "\n" not in text


def test_files_that_are_no_text(tmp_path):
    path = tmp_path / "plan.json"
    path.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(PlanError, match="not UTF-8"):
        read_plan(path)
    path.write_bytes(b" " * (1 << 20) + b"{}")
    with pytest.raises(PlanError, match="more than 1048576 bytes"):
        read_plan(path)
    with pytest.raises(PlanError, match=r"cannot be read \(Is a directory\)"):
        read_plan(tmp_path)
    with pytest.raises(PlanError, match=r"none\.json cannot be read \(No such file"):
        read_plan(tmp_path / "none.json")


# ---- metadata --------------------------------------------------------------------------------------------------------


def test_metadata_round_trip():
    values = PLAN.to_metadata()
    assert values == {
        "turboquant.plan.version": 1,
        "turboquant.plan.type_k": "q8_0*2,turbo4,-",
        "turboquant.plan.type_v": "turbo3,turbo4*2,-",
        "turboquant.plan.model": '{"layers":4}',
    }
    found = Plan.from_metadata(values, "model.gguf")
    assert found == Plan(PLAN.k, PLAN.v, PLAN.model)
    assert Plan.from_metadata({}, "model.gguf") is None
    del values["turboquant.plan.model"]
    assert Plan.from_metadata(values, "model.gguf") == Plan(PLAN.k, PLAN.v)


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("version", 2, "holds a plan of version 2"),
        ("type_k", None, "turboquant.plan.type_k must be a string"),
        ("type_k", ["q8_0"], "turboquant.plan.type_k must be a string"),
        ("type_v", "turbo9*4", "layer 0 has 'turbo9'"),
        ("type_v", "turbo4*3", "k has 4 layers and v has 3"),
        ("model", "{", "must be a JSON object"),
        ("model", '{"k_power":[NaN]}', "must be a JSON object"),
        ("model", "[]", "must be a JSON object"),
        ("model", 7, "must be a JSON object"),
    ],
)
def test_broken_metadata(key, value, message):
    values = {**PLAN.to_metadata(), f"turboquant.plan.{key}": value}
    with pytest.raises(PlanError, match="^model.gguf") as caught:
        Plan.from_metadata(values, "model.gguf")
    assert message in str(caught.value)


def test_a_plan_in_a_model_file(tmp_path):
    path, target = write_model(tmp_path / "model.gguf", Shape(layers=4)), tmp_path / "with.gguf"
    with ModelFile(path) as model:
        model.write(target, {}, PLAN.to_metadata())
        before = {name: list(model.pieces(tensor))[0][1].tobytes() for name, tensor in model.tensors.items()}
    with ModelFile(target) as model:
        assert Plan.from_metadata(model.metadata, "model.gguf") == Plan(PLAN.k, PLAN.v, PLAN.model)
        assert before == {name: list(model.pieces(tensor))[0][1].tobytes() for name, tensor in model.tensors.items()}
    fields = gguf.GGUFReader(target).fields
    assert fields["turboquant.plan.version"].types == [gguf.GGUFValueType.UINT32]


# ---- what a cache takes ----------------------------------------------------------------------------------------------


def test_bits_and_mib():
    shape = CacheShape((Layer(2, 128, 128), Layer(2, 64, 128), Layer(1, 128, 128), None))
    k = (2 * 128 * 8.5 + 2 * 64 * 8.5 + 128 * 4.125) / (2 * 128 + 2 * 64 + 128)
    v = (2 * 128 * 3.125 + 2 * 128 * 4.125 + 128 * 4.125) / 640
    assert shape.mean_bits(PLAN, 1000, "k") == pytest.approx(k)
    assert shape.mean_bits(PLAN, 1000, "v") == pytest.approx(v)
    assert shape.mean_bits(PLAN, 1000) == pytest.approx((k * 512 + v * 640) / 1152)
    assert shape.mib(PLAN, 4096) == pytest.approx((k * 512 + v * 640) * 4096 / 8 / 2**20)
    four = Plan(("turbo4",) * 3 + (None,), ("turbo4",) * 3 + (None,))
    # Layer 1 has heads of 64, and with them blocks of 64: 4.25 bits.
    assert shape.mean_bits(four, 1, "k") == pytest.approx((4.125 * 384 + 4.25 * 128) / 512)


def test_sliding_windows_hold_what_llama_cpp_gives_them():
    """A window of 1000 and a batch of 512, rounded up to 256, as in measure.kvsize."""
    local, full = Layer(1, 128, 128, window=True), Layer(1, 128, 128)
    shape = CacheShape((local, full), window=1000)
    assert [shape.cells(local, n) for n in (512, 1536, 1537, 100000)] == [512, 1536, 1536, 1536]
    assert shape.cells(full, 100000) == 100000
    plan = Plan(("q8_0", "turbo4"), ("q8_0", "turbo4"))
    assert shape.mean_bits(plan, 1000) == pytest.approx((8.5 + 4.125) / 2)
    assert shape.mean_bits(plan, 15360) == pytest.approx((8.5 * 1536 + 4.125 * 15360) / (1536 + 15360))


def test_exact_windows_of_a_plan():
    """Of the layers with a turbo type: N rows of K and V and one more, or as many as the cache has cells."""
    local, full = Layer(2, 128, 64, window=True), Layer(1, 128, 128)
    shape = CacheShape((local, full, full, None), window=100)
    plan = Plan(("turbo4", "q8_0", "f16", None), ("q8_0", "turbo2", "f16", None))
    row = (2 * (128 + 64), 2 * 128)
    mib = shape.window_mib(plan, 4096, Window(1000))
    assert mib == ((768 + 1) * row[0] + (1000 + 1) * row[1]) * 34 / 32 / (1 << 20)
    assert shape.window_mib(plan, 4096, Window(10, "f16")) == 11 * sum(row) * 2 / (1 << 20)
    assert shape.window_mib(plan, 4096, Window(0)) == 0
    assert shape.window_mib(Plan(("f16",) * 3 + (None,), ("q8_0",) * 3 + (None,)), 4096, Window()) == 0


def test_plans_for_other_models():
    shape = CacheShape((Layer(2, 128, 128), Layer(2, 80, 80), None))
    with pytest.raises(PlanError, match="types for 4 layers, and the model has 3"):
        shape.check(PLAN)
    with pytest.raises(PlanError, match="no type of V for layer 0"):
        shape.check(Plan(("f16", "f16", None), (None, "f16", None)))
    with pytest.raises(PlanError, match="K in turbo4 does not fit heads of 80 values"):
        shape.check(Plan(("f16", "turbo4", None), ("f16", "f16", None)))


@pytest.mark.parametrize("arch", ["llama", "lfm2"])
def test_shape_of_a_model_file(tmp_path, arch):
    width = 256 if arch == "lfm2" else 64
    path = write_model(tmp_path / "model.gguf", Shape(arch=arch, heads=2, kv_heads=1, width=width, layers=4))
    layer = Layer(1, 128, 128)
    assert read_shape(path).layers == ((layer,) * 4 if arch == "llama" else (None, layer, None, layer))
    assert read_shape(path).context == 4096


def test_shape_of_metadata():
    known = {
        "general.architecture": "x", "x.block_count": 3, "x.attention.head_count": 4, "x.embedding_length": 256,
        "x.attention.head_count_kv": [2, 0, 1], "x.context_length": 8192,
    }  # fmt: skip
    assert shape_of(known, "m").layers == (Layer(2, 64, 64), None, Layer(1, 64, 64))
    local = {
        "x.attention.sliding_window": 512, "x.attention.sliding_window_pattern": [True, True, False],
        "x.attention.key_length": 128, "x.attention.value_length": 128, "x.attention.key_length_swa": 32,
    }  # fmt: skip
    shape = shape_of({**known, **local}, "m")
    assert shape.layers == (Layer(2, 32, 128, True), None, Layer(1, 128, 128)) and shape.window == 512


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("block_count", None, "names no number of layers"),
        ("block_count", "many", "names no number of layers"),
        ("block_count", 10**9, "names no number of layers"),
        ("attention.head_count_kv", [1], "wanted one number or one for each of 3 layers"),
        ("attention.head_count_kv", -1, "wanted one number"),
        ("attention.head_count_kv", 0, "no layer with a cache"),
        ("attention.key_length", 0, "attention.key_length is 0"),
        ("attention.kv_lora_rank", 512, "multi-head latent attention"),
    ],
)
def test_broken_models(key, value, message):
    known = {"general.architecture": "x", "x.block_count": 3, "x.attention.head_count": 4, "x.embedding_length": 256}
    with pytest.raises(PlanError, match="^m") as caught:
        shape_of({**known, f"x.{key}": value}, "m")
    assert message in str(caught.value)
