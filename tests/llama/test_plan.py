"""Plans: types of K and V for each layer, from a file or from the model's metadata."""

from __future__ import annotations

import json
import re
import struct
from pathlib import Path

import gguf
import numpy as np
import pytest
from harness import ROOT, ProbeError, Server, kld, kv_sizes, random_tokens
from test_cli import PROMPT, generate
from test_guard import types

TOKENS = random_tokens(160, seed=6)
MIXED_K = ["turbo4", "q8_0", "turbo3", "f16", "turbo2", "turbo4_32"]
MIXED_V = ["turbo2", "turbo3", "q8_0", "turbo4", "f16", "q4_0"]


def write(path: Path, k: list, v: list, **fields: object) -> Path:
    path.write_text(json.dumps({"format": "turboquant-plan", "version": 1, "k": k, "v": v, **fields}))
    return path


def with_metadata(source: Path, target: Path, values: dict[str, object]) -> Path:
    """A copy of a model with more metadata."""
    reader = gguf.GGUFReader(source)
    writer = gguf.GGUFWriter(target, reader.get_field("general.architecture").contents())
    for name, field in reader.fields.items():
        if not name.startswith("GGUF.") and name != "general.architecture":
            array = field.types[0] == gguf.GGUFValueType.ARRAY
            writer.add_key_value(name, field.contents(), field.types[0], field.types[-1] if array else None)
    for name, value in values.items():
        writer.add_uint32(name, value) if isinstance(value, int) else writer.add_string(name, value)
    for tensor in reader.tensors:
        writer.add_tensor(tensor.name, np.array(tensor.data), raw_dtype=tensor.tensor_type)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return target


def test_every_layer_gets_its_types(probe, tiny, tmp_path) -> None:
    plan = write(tmp_path / "plan.json", MIXED_K, MIXED_V)
    p = probe(tiny("deep"), LLAMA_ARG_CACHE_PLAN=str(plan))
    p.context("auto", "auto")
    assert types(p.log) == (MIXED_K, MIXED_V)
    row = {"turbo4": 66, "q8_0": 136, "turbo3": 50, "f16": 256, "turbo2": 34, "turbo4_32": 72, "q4_0": 72}
    size = kv_sizes(p.log)[-1]
    assert size["k"] == pytest.approx(512 * 2 * sum(row[name] for name in MIXED_K) / 2**20, abs=0.006)
    assert size["v"] == pytest.approx(512 * 2 * sum(row[name] for name in MIXED_V) / 2**20, abs=0.006)
    batched = p.logits(TOKENS)
    p.context("auto", "auto")
    single = p.logits(TOKENS, step=1)
    p.context()
    base = p.logits(TOKENS)
    assert kld(batched, single) <= 2e-3
    assert 0 < kld(base, batched) < 0.5


@pytest.mark.parametrize("side", ["k", "v"])
def test_sides_on_their_own(probe, tiny, tmp_path, side: str) -> None:
    """K or V has its requested type if that is not auto."""
    plan = write(tmp_path / "plan.json", MIXED_K, MIXED_V)
    p = probe(tiny("deep"), LLAMA_ARG_CACHE_PLAN=str(plan))
    p.context(*(("auto", "turbo3") if side == "k" else ("turbo3", "auto")))
    assert types(p.log) == ((MIXED_K, ["turbo3"] * 6) if side == "k" else (["turbo3"] * 6, MIXED_V))
    p.context("q8_0", "f16")  # neither K nor V is auto
    assert (kv_sizes(p.log)[-1]["type_k"], kv_sizes(p.log)[-1]["type_v"]) == ("q8_0", "f16")


def first_record(state: bytes, type: str, row: int) -> bytes:
    """The bytes in a state file of the first layer and side with the given type and row size, for all of TOKENS."""
    ids = {"f16": 1, "q8_0": 8, "turbo4": 512, "turbo2": 518}
    head = struct.pack("<iQ", ids[type], row)
    start = state.index(head) + len(head)
    return state[start : start + len(TOKENS) * row]


@pytest.mark.parametrize("side", ["k", "v"])
@pytest.mark.parametrize("type", ["q8_0", "turbo4", "f16"])
def test_a_layer_is_stored_as_in_a_cache_of_its_type(probe, tiny, tmp_path, type: str, side: str) -> None:
    """Stored bytes equal those of a uniform cache, so llama.cpp rotates a layer if its own type is rotated."""
    others = [one for one in ("q8_0", "turbo4", "f16") if one != type]
    records = []
    for own in ([type] * 6, [type, *others, *others, type]):
        sides = (own, ["turbo2"] * 6) if side == "k" else (["turbo2"] * 6, own)
        p = probe(tiny("deep"), LLAMA_ARG_CACHE_PLAN=str(write(tmp_path / "plan.json", *sides)))
        p.context("auto", "auto")
        p.logits(TOKENS)
        p.command(f"save {tmp_path}/state")
        row = {"q8_0": 2 * 136, "turbo4": 2 * 66, "f16": 2 * 256}[type]
        records.append(first_record((tmp_path / "state").read_bytes(), type, row))
    assert any(records[0]) and records[0] == records[1]


@pytest.mark.parametrize("pair", [("q8_0", "f16"), ("q8_0", "turbo4"), ("q4_0", "turbo3"), ("f16", "turbo4")])
@pytest.mark.parametrize("model", ["deep", "iswa", "hybrid", "head64"])
def test_mixed_layers_lose_no_more_than_uniform_ones(probe, tiny, tmp_path, model: str, pair: tuple[str, str]) -> None:
    """Queries and outputs are rotated in the layers in which keys and values are rotated."""
    p = probe(tiny(model))
    p.context()
    base = p.logits(TOKENS)
    uniform = []
    for type in pair:
        p.context(type, type)
        uniform.append(kld(base, p.logits(TOKENS)))
    p.context("turbo4", "turbo4")  # logs which layers have a cache
    k = [None if one == "-" else pair[number // 2 % 2] for number, one in enumerate(types(p.log)[0])]
    v = [None if one == "-" else pair[(number // 2 + 1) % 2] for number, one in enumerate(types(p.log)[1])]
    q = probe(tiny(model), LLAMA_ARG_CACHE_PLAN=str(write(tmp_path / "plan.json", k, v)))
    q.context("auto", "auto")
    assert 0 < kld(base, q.logits(TOKENS)) <= 1.3 * max(uniform)


def test_uniform_plan_is_the_plain_cache(probe, tiny, tmp_path) -> None:
    """A plan with one type gives the same bits as -ctk and -ctv of that type with the guard off."""
    for k, v in (("turbo4", "turbo3"), ("q8_0", "turbo2"), ("q8_0", "q4_0")):
        plan = write(tmp_path / "plan.json", [k] * 6, [v] * 6)
        p = probe(tiny("deep"), LLAMA_ARG_CACHE_PLAN=str(plan), LLAMA_ARG_CACHE_GUARD="off")
        p.context("auto", "auto")
        planned = p.logits(TOKENS)
        p.context(k, v)
        assert np.array_equal(planned, p.logits(TOKENS))


def test_names_take_the_block_that_fits(probe, tiny, tmp_path) -> None:
    plan = write(tmp_path / "plan.json", ["turbo4", "q8_0", "turbo3"], ["turbo2", "turbo4_32", "f16"])
    p = probe(tiny("head64"), LLAMA_ARG_CACHE_PLAN=str(plan))
    p.context("auto", "auto")
    assert types(p.log) == (["turbo4_64", "q8_0", "turbo3_64"], ["turbo2_64", "turbo4_32", "f16"])


def test_hybrid_and_sliding_window(probe, tiny, tmp_path) -> None:
    plan = write(tmp_path / "plan.json", [None, "turbo4", None, "q8_0"] * 2, [None, "turbo3"] * 4)
    p = probe(tiny("hybrid"), LLAMA_ARG_CACHE_PLAN=str(plan))
    p.context("auto", "auto")
    assert types(p.log) == (["-", "turbo4", "-", "q8_0"] * 2, ["-", "turbo3"] * 4)
    p.logits(TOKENS)
    plan = write(tmp_path / "iswa.json", ["turbo4", "q8_0", "turbo3", "f16"], ["turbo4"] * 3 + ["q8_0"])
    p = probe(tiny("iswa"), LLAMA_ARG_CACHE_PLAN=str(plan))
    p.context("auto", "auto")
    p.logits(TOKENS)
    full, window = kv_sizes(p.log)[-2:]  # odd layers have full attention, even layers a sliding window
    assert full["k"] == pytest.approx(512 * 2 * (136 + 256) / 2**20, abs=0.006)
    assert window["k"] / (2 * (66 + 50)) == pytest.approx(window["v"] / (2 * (66 + 66)), rel=0.1)


def test_boundary_v_on_top(probe, tiny, tmp_path) -> None:
    plan = write(tmp_path / "plan.json", ["turbo4"] * 6, ["turbo2"] * 5 + ["f16"])
    p = probe(tiny("deep"), LLAMA_ARG_CACHE_PLAN=str(plan), LLAMA_ARG_CACHE_BOUNDARY_V="1:q8_0")
    p.context("auto", "auto")
    assert types(p.log)[1] == ["q8_0"] + ["turbo2"] * 4 + ["f16"]
    assert re.findall(r"boundary V: .*", p.log) == [
        "boundary V: 1 of 6 layers keep V in q8_0 (8.5 bits per value) instead of turbo2: 0"  # f16 has more bits
    ]


def test_states_of_another_plan_are_refused(probe, tiny, tmp_path) -> None:
    one = write(tmp_path / "one.json", MIXED_K, MIXED_V)
    p = probe(tiny("deep"), LLAMA_ARG_CACHE_PLAN=str(one))
    p.context("auto", "auto")
    p.logits(TOKENS)
    p.command(f"save {tmp_path}/state")
    p.command(f"saveseq {tmp_path}/seq 0")
    expected = p.logits([7], pos=len(TOKENS))
    p.context("auto", "auto")
    p.command(f"load {tmp_path}/state")
    assert np.array_equal(p.logits([7], pos=len(TOKENS)), expected)
    swapped = [MIXED_K[1], MIXED_K[0], *MIXED_K[2:]]
    write(one, swapped, MIXED_V)
    for what in ("load", "loadseq"):
        p.context("auto", "auto")
        with pytest.raises(ProbeError):
            p.command(f"{what} {tmp_path}/{'state' if what == 'load' else 'seq 0'}")
        assert p.alive


def test_context_shift_of_a_mixed_cache(build, prose_model, tmp_path) -> None:
    plan = write(tmp_path / "plan.json", ["turbo4", "q8_0", "turbo3", "f16", "turbo4", "turbo4"], ["turbo4"] * 6)
    with Server(build, prose_model, "-c", 256, "-np", 1, "--context-shift", "--cache-plan", plan,
                log=tmp_path / "log") as server:  # fmt: skip
        reply = server.complete(PROMPT, 400)
    assert reply["tokens_predicted"] == 400


def test_model_is_checked(probe, tiny, tmp_path, build, prose_model) -> None:
    """A plan with a fingerprint fits its model, also in other quantizations, and no other model."""
    def refused(model: Path, plan: Path) -> str:
        p = probe(model, LLAMA_ARG_CACHE_PLAN=str(plan))
        with pytest.raises(ProbeError, match="no context") as error:
            p.context("auto", "auto")
        assert p.alive
        return error.value.log

    text = ROOT / "models" / "heldout.txt"
    done = build.run("turboquant-measure", prose_model, text, 0, 1, 128, 1, 0, tmp_path / "scratch")
    model = json.loads(done.out.splitlines()[0])["model"]
    assert model["architecture"] == "llama" and model["layers"] == 6 and all(one > 0 for one in model["k_power"])
    plan = write(tmp_path / "plan.json", MIXED_K, MIXED_V, model=model)
    p = probe(prose_model, LLAMA_ARG_CACHE_PLAN=str(plan))
    p.context("auto", "auto")
    assert types(p.log)[0] == MIXED_K
    smaller = tmp_path / "q4.gguf"
    build.run("llama-quantize", "--allow-requantize", prose_model, smaller, "Q4_K_M")
    p = probe(smaller, LLAMA_ARG_CACHE_PLAN=str(plan))
    p.context("auto", "auto")
    assert "another \"heads_kv\"" in refused(tiny("deep"), write(tmp_path / "b.json", MIXED_K, MIXED_V, model={
        **model, "heads_kv": [4] * 6}))  # fmt: skip
    assert "another \"architecture\"" in refused(prose_model, write(tmp_path / "c.json", MIXED_K, MIXED_V, model={
        **model, "architecture": "qwen2"}))  # fmt: skip
    power = [*model["k_power"]]
    power[3] *= 1.1
    log = refused(prose_model, write(tmp_path / "d.json", MIXED_K, MIXED_V, model={**model, "k_power": power}))
    assert "other weights" in log and "layer 3" in log and "turboquant tune" in log
    assert "6 layers" in refused(tiny("gqa"), plan)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (None, "cannot be read"),
        ("", "is not a plan"),
        ("[]", "is not a plan"),
        ("{}", "is not a plan"),
        ("\x00\x01", "is not a plan"),
        ("[" * 100000, "is not a plan"),
        ('{"format": "turboquant-plan", "version": 2}', "version 2"),
        ('{"format": "turboquant-plan", "version": "1"}', "version"),
        ('{"format": "turboquant-plan", "version": 1}', '"k" must be a list'),
        ('{"format": "turboquant-plan", "version": 1, "k": ["turbo5"], "v": []}', '"turbo5"'),
        ('{"format": "turboquant-plan", "version": 1, "k": [4], "v": []}', "no cache type"),
        ('{"format": "turboquant-plan", "version": 1, "k": ["auto"], "v": ["auto"]}', '"auto"'),
        ('{"format": "turboquant-plan", "version": 1, "k": ["f16"], "v": ["f16"]}', "the model has 6 layers"),
        ('{"format": "turboquant-plan", "version": 1, "k": [null,null,null,null,null,null], "v": ["f16","f16","f16",'
         '"f16","f16","f16"]}', "names no type for layer 0"),
        ('{"format": "turboquant-plan", "version": 1, "k": ["f16","f16","f16","f16","f16","f16"], "v": ["f16","f16",'
         '"f16","f16","f16","f16"], "model": 7}', '"model" is damaged'),
    ],
)  # fmt: skip
def test_broken_files_are_refused(build, prose_model, tmp_path, text: str | None, said: str) -> None:
    plan = tmp_path / "plan.json"
    if text is not None:
        plan.write_text(text)
    result = generate(build, prose_model, "--cache-plan", plan, n=2, check=False)
    assert result.status != 0 and not result.crashed, result.describe()
    assert str(plan) in result.text and said in result.text, result.describe()


def test_option_sets_the_types(build, prose_model, tmp_path) -> None:
    plan = write(tmp_path / "plan.json", MIXED_K, MIXED_V)
    for extra, expected in (((), (MIXED_K, MIXED_V)), (("-ctv", "turbo3"), (MIXED_K, ["turbo3"] * 6))):
        assert types(generate(build, prose_model, "--cache-plan", plan, *extra, "-v", n=2).text) == expected
    help_text = build.run("llama-completion", "--help").text
    assert "--cache-plan" in help_text and "LLAMA_ARG_CACHE_PLAN" in help_text and "--cache-guard" in help_text


class TestMetadata:
    PLAN = {
        "turboquant.plan.version": 1,
        "turboquant.plan.type_k": "q8_0,turbo4*4,f16",
        "turboquant.plan.type_v": "turbo3*6",
    }

    def test_auto_takes_it(self, probe, prose_model, tmp_path) -> None:
        model = with_metadata(prose_model, tmp_path / "m.gguf", self.PLAN)
        p = probe(model)
        p.context("auto", "auto")
        assert types(p.log) == (["q8_0", *["turbo4"] * 4, "f16"], ["turbo3"] * 6)
        p.context("turbo4", "turbo4")
        assert types(p.log)[0] == ["turbo4"] * 6
        p = probe(model, LLAMA_ARG_CACHE_PLAN="off")
        p.context("auto", "auto")
        assert types(p.log) == (["turbo4_tcq"] * 6, ["turbo4_tcq"] * 6)

    def test_auto_without_one_is_turbo4_tcq_with_the_guard(self, probe, tiny) -> None:
        p = probe(tiny("biased"))
        p.context("auto", "auto")
        assert types(p.log) == (["turbo4_tcq_64", "q8_0", "turbo4_tcq_64"], ["turbo4_tcq_64"] * 3)

    @pytest.mark.parametrize(
        ("broken", "said"),
        [
            ({"turboquant.plan.version": 9}, "version 9"),
            ({"turboquant.plan.version": "one"}, "version one"),
            ({"turboquant.plan.type_k": "turbo4*5"}, "K for 5"),
            ({"turboquant.plan.type_k": "turbo4*999999999"}, "no cache type"),
            ({"turboquant.plan.type_k": "turbo4*-6"}, "no cache type"),
            ({"turboquant.plan.type_k": "turbo4*6,"}, "no cache type"),
            ({"turboquant.plan.type_v": "turbo9*6"}, "turbo9"),
            ({"turboquant.plan.model": "{"}, "damaged"),
            ({"turboquant.plan.model": '{"architecture": "qwen2"}'}, "architecture"),
        ],
    )
    def test_broken_one_is_ignored_with_a_warning(self, probe, prose_model, tmp_path, broken, said: str) -> None:
        """A damaged plan in the metadata is ignored and the guard is used; a damaged plan file would be refused."""
        p = probe(with_metadata(prose_model, tmp_path / "m.gguf", {**self.PLAN, **broken}))
        p.context("auto", "auto")
        assert types(p.log) == (["turbo4_tcq"] * 6, ["turbo4_tcq"] * 6)
        assert said in p.log and "is not used" in p.log

    def test_survives_quantization(self, build, probe, prose_model, tmp_path) -> None:
        model = with_metadata(prose_model, tmp_path / "m.gguf", self.PLAN)
        build.run("llama-quantize", "--allow-requantize", model, tmp_path / "q.gguf", "Q4_0")
        p = probe(tmp_path / "q.gguf")
        p.context("auto", "auto")
        assert types(p.log)[1] == ["turbo3"] * 6


def test_bench_takes_it(build, prose_model, tmp_path) -> None:
    plan = write(tmp_path / "plan.json", MIXED_K, MIXED_V)
    args = ("-m", prose_model, "-ctk", "auto", "-ctv", "auto", "-fa", 1, "-p", 16, "-n", 2, "-r", 1, "-v")
    result = build.run("llama-bench", *args, env={"LLAMA_ARG_CACHE_PLAN": str(plan)})
    assert types(result.text) == (MIXED_K, MIXED_V)


def test_draft_has_its_own(build, prose_model, tmp_path) -> None:
    """The model is its own draft model: the first context uses the plan, the second the draft's plan or types."""
    main = write(tmp_path / "main.json", MIXED_K, MIXED_V)
    draft = write(tmp_path / "draft.json", ["turbo4"] * 6, ["q8_0"] * 6)
    args = ("-c", 512, "-np", 1, "-v", "-md", prose_model, "--spec-type", "draft-simple", "--cache-plan", main)
    for number, (extra, expected) in enumerate((
        ((), set()),  # f16
        (("-ctkd", "turbo3", "-ctvd", "turbo3"), {("turbo3*6", "turbo3*6")}),
        (("--cache-plan-draft", draft), {("turbo4*6", "q8_0*6")}),
    )):  # fmt: skip
        log = tmp_path / f"log{number}"
        with Server(build, prose_model, *args, *extra, log=log) as server:
            server.complete(PROMPT, 8)
            found = set(re.findall(r"cache types: K (\S+); V (\S+)", server.log))
        assert found == {(",".join(MIXED_K), ",".join(MIXED_V)), *expected}
