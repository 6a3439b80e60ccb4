"""turboquant.evaluate: parsers on lines that llama.cpp printed, prompts, the table, and the cache of results.

Small scripts replace the programs here; tests/llama runs the real ones.
"""

import errno
import io
import json
import os
import re
import signal
import stat
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest
import turboquant
from rich.console import Console
from turboquant.evaluate import demo, report
from turboquant.evaluate.rows import Options, Row, measure
from turboquant.measure import needle
from turboquant.measure.kvsize import parse_cache_size
from turboquant.measure.pairs import CachePair, bits_per_value, parse_pairs
from turboquant.measure.perplexity import parse_base, parse_divergence
from turboquant.measure.programs import ProgramError, Programs, parse_cache_types
from turboquant.measure.results import Results, file_hash
from turboquant.measure.scratch import scratch_folder

BASE = """\
0.00.344.075 I perplexity: calculating perplexity over 4 chunks, n_ctx=2048, batch_size=2048, n_seq=1
0.02.194.096 I perplexity: 1.83 seconds per pass - ETA 0.12 minutes
[1]35.5729,[2]33.5146,[3]35.3792,[4]37.1605,
0.12.722.862 I Final estimate: PPL = 37.1605 +/- 1.70023
"""
DIVERGENCE = """\
chunk             PPL               ln(PPL(Q)/PPL(base))          KL Divergence              Δp RMS            Same top p
   1      35.5155 ±    3.2483      -0.00161 ±    0.00493       0.00941 ±    0.00037     2.062 ±  0.126 %    93.548 ±  0.768 %
   2      33.7213 ±    2.1537       0.00615 ±    0.00351       0.00979 ±    0.00028     2.038 ±  0.087 %    93.744 ±  0.536 %

====== Perplexity statistics ======
Mean PPL(Q)                   :  37.506273 ±   1.716770
Mean PPL(base)                :  37.151286 ±   1.699170
Cor(ln(PPL(Q)), ln(PPL(base))):  99.83%
Mean ln(PPL(Q)/PPL(base))     :   0.009510 ±   0.002646

====== KL divergence statistics ======
Mean    KLD:   0.010706 ±   0.000272
Maximum KLD:   0.353830
99.9%   KLD:   0.267419
Median  KLD:   0.006490
Minimum KLD:  -0.000001

====== Token probability statistics ======
Mean    Δp: -0.124 ± 0.033 %
RMS Δp    :  2.100 ± 0.077 %
Same top p: 92.937 ± 0.401 %
"""
SIZE = (
    "0.00.045.178 I llama_kv_cache: size =    4.88 MiB (  2048 cells,   6 layers,  1/1 seqs), "
    "K (q4_0):    1.69 MiB, V (q8_0):    3.19 MiB\n"
)
HELP = """\
-ctk,  --cache-type-k TYPE              KV cache data type for K
                                        allowed values: f32, f16, bf16, q8_0, q4_0, q4_1, iq4_nl, q5_0,
                                        q5_1
                                        (default: f16)
                                        (env: LLAMA_ARG_CACHE_TYPE_K)
"""


# ---- what llama.cpp prints -------------------------------------------------------------------------------------------


def test_base():
    base = parse_base(BASE)
    assert (base.ppl, base.ppl_error) == (37.1605, 1.70023)


def test_divergence():
    found = parse_divergence(DIVERGENCE)
    assert (found.ppl, found.ppl_error) == (37.506273, 1.716770)
    assert (found.kld, found.kld_error) == (0.010706, 0.000272)
    assert (found.same_top, found.same_top_error) == (92.937, 0.401)


@pytest.mark.parametrize("missing", ["Mean PPL(Q) ", "Mean    KLD:", "Same top p:"])
def test_divergence_incomplete(missing):
    lines = [line for line in DIVERGENCE.splitlines() if not line.startswith(missing)]
    assert len(lines) == len(DIVERGENCE.splitlines()) - 1
    with pytest.raises(ValueError, match=re.escape(" ".join(missing.split()).rstrip(":"))):
        parse_divergence("\n".join(lines))


def test_base_incomplete():
    with pytest.raises(ValueError, match="Final estimate"):
        parse_base(BASE.rsplit("\n", 2)[0])


def test_cache_size():
    size = parse_cache_size("something\n" + SIZE + "llama_context: n_ctx = 2048\n")
    assert (size.k_mib, size.v_mib, size.mib) == (1.69, 3.19, 4.88)
    assert (size.type_k, size.type_v) == ("q4_0", "q8_0")


def test_cache_size_of_two_caches():
    """A model with sliding-window layers logs one line per cache; block types resolved by head size are named."""
    second = SIZE.replace("q4_0", "turbo4_64").replace("1.69", "0.31").replace("3.19", "0.50")
    size = parse_cache_size(SIZE + second)
    assert (size.k_mib, size.v_mib) == (2.0, 3.69)
    assert (size.type_k, size.type_v) == ("q4_0+turbo4_64", "q8_0")


def test_cache_size_missing():
    with pytest.raises(ValueError, match="no line 'size ="):
        parse_cache_size("llama_kv_cache:        CPU KV buffer size =     4.88 MiB\n")


def test_cache_types_of_help():
    assert parse_cache_types(HELP) == ["f32", "f16", "bf16", "q8_0", "q4_0", "q4_1", "iq4_nl", "q5_0", "q5_1"]
    assert parse_cache_types("usage: something else") == []


# ---- types -----------------------------------------------------------------------------------------------------------


def test_pairs():
    assert parse_pairs("q8_0, turbo4,q8_0/turbo3,turbo4") == [
        CachePair("q8_0", "q8_0"),
        CachePair("turbo4", "turbo4"),
        CachePair("q8_0", "turbo3"),
    ]
    assert [str(pair) for pair in parse_pairs("f16,f16/f16,q8_0/turbo3")] == ["f16", "q8_0/turbo3"]
    assert CachePair("q8_0", "turbo3").arguments == ["-ctk", "q8_0", "-ctv", "turbo3"]


@pytest.mark.parametrize("text", ["", "f16,", "a/b/c", "/turbo3", "turbo3/"])
def test_pairs_malformed(text):
    with pytest.raises(ValueError, match="TYPE_K/TYPE_V"):
        parse_pairs(text)


def test_bits():
    for info in turboquant.types():
        assert bits_per_value(info.name) == info.bits_per_value == 8 * info.block_bytes / info.block
    assert [bits_per_value(name) for name in ("f16", "q8_0", "q4_0", "q5_1")] == [16, 8.5, 4.5, 6]
    assert bits_per_value("turbo5") is None
    assert bits_per_value("turbo4_128") is None


# ---- needles ---------------------------------------------------------------------------------------------------------


def prose(paragraphs=400):
    return "\n\n".join(f"Paragraph {index} says {'very ' * (index % 40)}little." for index in range(paragraphs)) + "\n"


def test_needles():
    text = prose()
    needles = needle.make_needles(text, count=4, distance=6000)
    assert len({one.name for one in needles}) == len({one.number for one in needles}) == 4
    starts = []
    for one in needles:
        assert re.fullmatch(r"\d{5}", one.number) and one.name in needle.NAMES
        before, after = one.prompt.split(f"\n\nNote: The secret number of {one.name} is {one.number}.\n\n")
        hay, question = after.split("\n\nQuestion: ")
        assert question == f"{one.question}\nAnswer: The secret number of {one.name} is"
        # Only the note contains the answer, at the requested distance (in whole paragraphs).
        assert one.prompt.count(one.number) == 1
        assert one.distance == len(hay) and 6000 <= len(hay) < 6600
        assert hay in text and before in text
        starts.append(text.index(before))
    assert starts == sorted(set(starts))
    assert needle.make_needles(text, count=4, distance=6000) == needles


TEXTS = {
    "lines": "".join(f" Line {index} of it has no blank one after it . \n" for index in range(9000)),
    "CRLF": prose(400).replace("\n", "\r\n"),
    "one word": "x" * 40_000,
    "CJK": "".join(chr(0x4E00 + index % 5000) for index in range(40_000)),
    "late CJK": prose(800) + "漢字" * 20_000,
}


@pytest.mark.parametrize("unit", [4, 1])
@pytest.mark.parametrize("text", TEXTS.values(), ids=TEXTS)
def test_needles_fit(text, unit):
    """The prompt fits with four bytes per token, and with one byte per token."""

    def count(prompt: str) -> int:
        return len(prompt.encode()) // unit

    for ctx in (4096, 512):
        needles = needle.fit_needles(text, 4, 6000, ctx, count, template=needle.TEMPLATES["plain"])
        assert all(count(one.prompt) <= ctx - 12 for one in needles)
        assert all(one.prompt.count(one.number) == 1 and one.distance > ctx / 20 for one in needles)
        assert "\r" not in needles[0].prompt
        for index, position in enumerate((0.1, 0.5, 0.9) if ctx > 512 else ()):
            one = needle.fit_grid_needle(text, ctx, position, index, count)
            assert count(one.prompt) <= ctx - 12 and one.prompt.count(one.number) == 1
    with pytest.raises(ValueError, match="no needle of it fits into 64 tokens"):
        needle.fit_needles(text, 4, 6000, 64, count, template=needle.TEMPLATES["plain"])


def test_a_long_line_is_cut():
    """The distance does not grow with the lengths of lines."""
    for text in TEXTS.values():
        for one in needle.make_needles(text, 4):
            assert 6000 <= one.distance < 6600 and len(one.prompt) < 8000


def test_needles_with_another_prompt():
    for one in needle.make_needles(prose(), count=2, template=needle.TEMPLATES["plain"]):
        assert one.note == f"Remember this: the secret number of {one.name} is {one.number}."
        assert one.question == f"What is the secret number of {one.name}, which the text above tells?"
        assert one.note in one.prompt.splitlines() and f"\nQuestion: {one.question}\n" in one.prompt


def test_needles_need_text():
    with pytest.raises(ValueError, match="too few for a needle 6000 characters back"):
        needle.make_needles(prose(50), count=1)
    with pytest.raises(ValueError, match="expected 1 to 30, got 31"):
        needle.make_needles(prose(), count=31)


def test_bundled_text_is_enough():
    text = (Path(__file__).parents[2] / "models" / "heldout.txt").read_text(encoding="utf-8")
    assert len(needle.make_needles(text, count=30)) == 30
    assert "secret number" not in text


@pytest.mark.parametrize(
    "text, number",
    [(" 48213.\n\nQu", "48213"), ("48213", "48213"), (" 4821", "4821"), (" 482134", "482134"), (" the\nsame", "the")],
)
def test_answer(text, number):
    assert needle.answer(text) == number


# ---- the table -------------------------------------------------------------------------------------------------------


def row(**changes):
    values = dict(k="f16", v="f16", bits_k=16.0, bits_v=16.0, k_mib=6.0, v_mib=6.0, ppl=37.1605, ppl_error=1.7)
    values |= dict(kld=None, kld_error=None, same_top=None, same_top_error=None)
    values |= dict(answers=["12345", "54321"], expected=["12345", "54321"])
    return Row(**(values | changes))


ROWS = [
    row(),
    row(k="q8_0", v="turbo3", bits_k=8.5, bits_v=3.125, k_mib=3.19, v_mib=1.17, ppl=37.5063, kld=0.010706,
        kld_error=0.000272, same_top=92.937, same_top_error=0.401, answers=["12345", "54322"]),
]  # fmt: skip


def test_cells():
    assert report.cells(ROWS[0]) == ["f16", "16", "12.00", "37.160", "–", "–", "2/2"]
    assert report.cells(ROWS[1]) == [
        "q8_0/turbo3", "5.8125", "4.36", "37.506", "0.01071 ± 0.00027", "92.94 ± 0.40 %", "1/2",
    ]  # fmt: skip
    assert report.cells(row(answers=[], expected=[]))[-1] == "–"


def test_table():
    stream = io.StringIO()
    Console(file=stream, width=80).print(report.table(ROWS))
    lines = [line for line in stream.getvalue().splitlines() if line.strip(" ─")]
    assert lines[0].split() == ["bits/", "same", "top", "needles"]
    assert lines[1].split() == ["cache", "K/V", "value", "KV", "MiB", "perplexity", "KLD", "token", "found"]
    assert lines[3].split() == ["q8_0/turbo3", "5.8125", "4.36", "37.506", "0.01071±0.00027", "92.94±0.40%", "1/2"]
    assert max(map(len, lines)) <= 80 and "…" not in stream.getvalue()
    assert "\x1b" not in stream.getvalue()


def test_markdown():
    lines = report.to_markdown(ROWS).splitlines()
    assert len(lines) == 4 and len({line.count("|") for line in lines}) == 1
    assert lines[3].startswith("| q8_0/turbo3 | 5.8125 | 4.36 |")


def test_json():
    data = json.loads(report.to_json(ROWS, ctx=2048))
    assert data["ctx"] == 2048
    assert [one["kld"] for one in data["rows"]] == [None, 0.010706]
    assert [(one["bits"], one["found"]) for one in data["rows"]] == [(16, 2), (5.8125, 1)]


# ---- results ---------------------------------------------------------------------------------------------------------


def test_results(tmp_path):
    results = Results(tmp_path / "new")
    assert results.get({"a": 1}) is None
    results.put({"a": 1}, [1.5, "x"])
    assert results.get({"a": 1}) == [1.5, "x"]
    assert results.get({"a": 2}) is None
    (stored,) = results.folder.iterdir()
    for broken in ("", "{", "[]", '{"key": {"a": 2}, "value": 3}', '{"key": {"a": 1}}'):
        stored.write_text(broken)
        assert results.get({"a": 1}) is None
    results.put({"a": 1}, 2)
    assert results.get({"a": 1}) == 2 and len(list(results.folder.iterdir())) == 1


def test_file_hash(tmp_path):
    file, results = tmp_path / "file", Results(tmp_path / "results")
    file.write_bytes(b"abc")
    assert file_hash(file, results) == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
    file.write_bytes(b"abcd")
    assert file_hash(file, results) != "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
    assert not results.folder.exists()  # such a young file may change once more within the same tick


def test_file_hash_is_remembered(tmp_path, monkeypatch):
    """The stored hash is not used if only path, size and time are the same, which tools can restore."""
    file, results = tmp_path / "file", Results(tmp_path / "results")
    later = time.time_ns() + 10**10
    monkeypatch.setattr("turboquant.measure.results.time.time_ns", lambda: later)
    file.write_bytes(b"abc")
    before, times = file_hash(file, results), file.stat()
    (stored,) = results.folder.iterdir()
    stored.write_text(stored.read_text().replace(before, "remembered"))
    assert file_hash(file, results) == "remembered"

    file.write_bytes(b"abd")
    os.utime(file, ns=(times.st_atime_ns, times.st_mtime_ns))
    changed = file_hash(file, results)
    assert changed != "remembered"
    other = tmp_path / "other"
    other.write_bytes(b"abe")
    os.utime(other, ns=(times.st_atime_ns, times.st_mtime_ns))
    os.replace(other, file)
    assert file_hash(file, results) not in (changed, "remembered")


def test_a_file_that_changes_while_it_is_hashed(tmp_path, monkeypatch):
    file, results = tmp_path / "file", Results(tmp_path / "results")
    file.write_bytes(b"abc")
    monkeypatch.setattr("turboquant.measure.results.time.time_ns", lambda: file.write_bytes(b"abcd") and 1 << 62)
    file_hash(file, results)
    assert not results.folder.exists()


# ---- scratch folders -------------------------------------------------------------------------------------------------


def test_scratch_folders_in_use_stay(tmp_path):
    with scratch_folder(tmp_path) as first:
        (first / "f16.kld").touch()
        with scratch_folder(tmp_path) as second:
            assert second != first
        assert (first / "f16.kld").exists() and not second.exists()
    assert list(tmp_path.iterdir()) == []


def test_scratch_folders_that_were_left_behind_go(tmp_path):
    """A killed run leaves its folder, and the system releases its lock."""
    code = "import os, sys; from pathlib import Path; from turboquant.measure.scratch import scratch_folder\n"
    code += "with scratch_folder(Path(sys.argv[1])) as folder: (folder / 'f16.kld').touch(); os._exit(9)"
    assert subprocess.run([sys.executable, "-c", code, tmp_path]).returncode == 9
    (left,) = (path for path in tmp_path.iterdir() if path.is_dir())
    with scratch_folder(tmp_path):
        assert not left.exists()
    assert list(tmp_path.iterdir()) == []


def test_scratch_folders_of_other_machines_stay(tmp_path, monkeypatch):
    """In a shared cache, the processes and perhaps the locks of other machines are not visible."""
    monkeypatch.setattr("platform.node", lambda: "other-machine")
    with scratch_folder(tmp_path) as theirs:
        monkeypatch.setattr("platform.node", lambda: "other")
        monkeypatch.setattr("turboquant.llama.files._try_lock", lambda descriptor: True)
        with scratch_folder(tmp_path):
            assert theirs.is_dir()
        assert theirs.is_dir()


def test_scratch_folders_without_locks(tmp_path, monkeypatch):
    """On a file system without locks, only the own folder is deleted."""

    def refuse(descriptor):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr("turboquant.llama.files._try_lock", refuse)
    with scratch_folder(tmp_path) as first, scratch_folder(tmp_path):
        assert first.is_dir()
    assert list(tmp_path.iterdir()) == []


# ---- measuring, with stand-ins for the programs ----------------------------------------------------------------------

needs_posix = pytest.mark.skipif(os.name != "posix", reason="the stand-ins are scripts")

FAKE = """\
#!{python}
import re, sys, time
from pathlib import Path
args, here = sys.argv[1:], Path(__file__).parent
if args == ["--help"]:
    print(HELP)
    sys.exit()
k, v = args[args.index("-ctk") + 1], args[args.index("-ctv") + 1]
with open(here / "runs.txt", "a") as file:
    file.write(f"{{Path(__file__).name}} {{k}}/{{v}}\\n")
runs = (here / "runs.txt").read_text().count("\\n")
log = lambda text: print(text, file=sys.stderr)
if (here / "window").exists() and k == "q4_0":
    log("turboquant: window: the newest 256 tokens in q8_0 (6 of 6 layers), 0.80 MiB")
mib = {{"f16": 6.0, "q8_0": 3.19, "q4_0": 1.69, "turbo4": 1.55, "turbo3": 1.17}}
log(f"size = {{mib[k] + mib[v]:7.2f}} MiB (  2048 cells,   6 layers,  1/1 seqs), "
    f"K ({{k}}): {{mib[k]:7.2f}} MiB, V ({{v}}): {{mib[v]:7.2f}} MiB")
{body}
"""
PERPLEXITY = """\
base = Path(args[args.index("--kl-divergence-base") + 1])
if "--kl-divergence" in args:
    assert base.read_text() == "predictions"
    if (here / "slow").exists():
        (here / "sleeping").touch()
        time.sleep(600)
    if (here / "breaks").exists() and (here / "breaks").read_text() == k:
        log("E main: out of memory")
        sys.exit(1)
    print(DIVERGENCE.replace("0.010706 ±   0.000272", "nan ± nan") if (here / "nan").exists() else DIVERGENCE)
else:
    base.write_text("predictions")
    print(BASE)
"""
COMPLETION = """\
if "-p" in args:
    if "--single-turn" in args and "-cnv" not in args:
        if (here / "chat").exists():
            log("chat template is available, enabling conversation mode (disable it with -no-cnv)")
        log("common_perf_print:       total time =     119.14 ms /   217 tokens")
    elif "-cnv" in args:
        print("1. Sun.\\n2. Water.\\n3. Patience.", end="", flush=True)
        time.sleep(0.1)  # so that it comes in two pieces
        print(" [end of text]\\n\\n\\n")
    else:
        print(" he \\x1b[31msaw\\x1b[0m a light.\\n\\n")
    sys.exit()
prompt = Path(args[args.index("-f") + 1]).read_text()
tokens = len(prompt.encode()) // (1 if (here / "bytes").exists() else 4)
room = int(args[args.index("-c") + 1]) - 4
if tokens > room:
    log(f"E main: prompt is too long ({tokens} tokens, max {room})")
    sys.exit(1)
if (here / "fails").exists() and (here / "fails").read_text() == k and room > 252:
    log("E main: no kernel for this type")
    sys.exit(1)
number = re.search(r"is (\\d+)", prompt)[1]
print(f" {number}.")
if not (here / "busy").exists() or runs % 2 == 0:
    log("common_perf_print:       total time =     119.14 ms /   217 tokens")
"""


@pytest.fixture
def fake(tmp_path):
    """A bin folder, a model, a text and the results' folder."""
    folder = tmp_path / "bin"
    folder.mkdir()
    texts = f"HELP, BASE, DIVERGENCE = {HELP!r}, {BASE!r}, {DIVERGENCE!r}\n"
    for name, body in (("llama-perplexity", PERPLEXITY), ("llama-completion", COMPLETION)):
        program = folder / name
        script = FAKE.format(python=sys.executable, body=body)
        shebang, rest = script.split("\n", 1)
        program.write_text(f"{shebang}\n{texts}{rest}", encoding="utf-8")
        program.chmod(program.stat().st_mode | stat.S_IXUSR)
    (tmp_path / "model.gguf").write_bytes(b"GGUF")
    (tmp_path / "text.txt").write_text(prose(), encoding="utf-8")
    return tmp_path


def measured(root, types="q8_0,q4_0/q8_0", **changes):
    """Measure, and return the rows and the runs."""
    runs = root / "bin" / "runs.txt"
    options = Options(root / "model.gguf", root / "text.txt", parse_pairs(types), chunks=4, needles=2)
    programs, results = Programs(root / "bin", root / "logs", threads=1), Results(root / "results")
    rows = measure(Options(**(vars(options) | changes)), programs, results, root / "scratch")
    after = runs.read_text().splitlines() if runs.exists() else []
    runs.unlink(missing_ok=True)
    return rows, after


@needs_posix
def test_measure(fake):
    rows, runs = measured(fake)
    assert [one.label for one in rows] == ["f16", "q8_0", "q4_0/q8_0"]
    assert [one.bits for one in rows] == [16, 8.5, 6.5]
    assert [one.mib for one in rows] == [12.0, 6.38, 4.88]
    assert [one.kld for one in rows] == [None, 0.010706, 0.010706]
    assert [(one.found, len(one.expected)) for one in rows] == [(2, 2)] * 3
    assert [run for run in runs if "perplexity" in run] == [
        "llama-perplexity f16/f16",
        "llama-perplexity q8_0/q8_0",
        "llama-perplexity q4_0/q8_0",
    ]
    assert len(runs) == 3 + 3 * 2 + 2  # two prompts are counted
    assert list((fake / "scratch").iterdir()) == []  # the predictions are gone

    again, runs = measured(fake)
    assert again == rows and runs == []


@needs_posix
def test_windows_are_counted(fake):
    """In the size, and said below the table; bits are those of K and V."""
    (fake / "bin" / "window").touch()
    rows, _ = measured(fake, needles=0)
    assert [one.mib for one in rows] == [12.0, 6.38, pytest.approx(4.88 + 0.8)]
    assert [one.bits for one in rows] == [16, 8.5, 6.5]
    assert (rows[2].window_tokens, rows[2].window_type, rows[2].window_mib) == (256, "q8_0", 0.8)
    words = "KV MiB of q4_0/q8_0 counts the exact window: the newest 256 tokens in q8_0, 0.80 MiB; bits/value does not."
    assert report.notes(rows)[0] == words and words in report.to_markdown(rows)
    assert report.notes(rows[:2]) == []
    stored = json.loads(report.to_json(rows))["rows"][2]
    assert (stored["window_tokens"], stored["window_mib"], stored["mib"]) == (256, 0.8, pytest.approx(5.68))


@needs_posix
def test_measure_runs_only_what_is_new(fake):
    measured(fake, "q8_0")
    _, runs = measured(fake, "q8_0,q4_0")
    assert sorted(set(runs)) == [
        "llama-completion q4_0/q4_0",
        "llama-perplexity f16/f16",  # the others' base
        "llama-perplexity q4_0/q4_0",
    ]
    for change in ({"chunks": 3}, {"ctx": 1024}):
        assert measured(fake, "q8_0", **change)[1] == ["llama-perplexity f16/f16", "llama-perplexity q8_0/q8_0"]
    assert {run.split()[0] for run in measured(fake, "q8_0", distance=5000)[1]} == {"llama-completion"}
    (fake / "model.gguf").write_bytes(b"GGUF 2")
    assert len(measured(fake, "q8_0")[1]) == 2 + 2 * 2 + 2
    (fake / "bin" / "libggml-cpu.so").write_bytes(b"another build")
    assert len(measured(fake, "q8_0")[1]) == 2 + 2 * 2


@needs_posix
@pytest.mark.parametrize("damage", ["{}", "[]", "7", '{"values": {"kld": 1}, "caches": {}}'])
def test_damaged_results_are_measured_again(fake, damage):
    rows, first = measured(fake, "q8_0", needles=0)
    for path in (fake / "results").iterdir():
        stored = json.loads(path.read_text(encoding="utf-8"))
        path.write_text(json.dumps({"key": stored["key"], "value": json.loads(damage)}))
    assert measured(fake, "q8_0", needles=0) == (rows, first)


@needs_posix
def test_truncated_output_is_run_again(fake):
    """llama.cpp can lose the end of its output at exit; a part of a number is no answer."""
    (fake / "bin" / "busy").touch()
    rows, runs = measured(fake, "q8_0")
    assert [one.found for one in rows] == [2, 2]
    assert len([run for run in runs if "completion" in run]) > 2 * 2


@needs_posix
@pytest.mark.parametrize("unit", [4, 1])
@pytest.mark.parametrize("text", TEXTS.values(), ids=TEXTS)
def test_needles_of_any_text_are_asked(fake, text, unit):
    """Prompts fit for texts without blank lines or breaks, with other line ends, or with three bytes per character."""
    (fake / "text.txt").write_bytes(text.encode())
    if unit == 1:
        (fake / "bin" / "bytes").touch()
    rows, _ = measured(fake, "q8_0")
    assert [(one.found, one.asked, one.needle_failure) for one in rows] == [(2, 2, None)] * 2
    assert rows[0].distance >= 6000 or len(text.encode()) / unit > 4096


@needs_posix
def test_one_failure_is_a_row(fake):
    """If a pair other than f16 fails, the table has the results of the others."""
    (fake / "bin" / "breaks").write_text("q4_0")
    (fake / "bin" / "fails").write_text("q8_0")
    rows, _ = measured(fake, "q4_0,q8_0,f16/q8_0")
    assert [one.label for one in rows] == ["f16", "q4_0", "q8_0", "f16/q8_0"]
    assert rows[1].failure == "llama-perplexity exited with 1: out of memory" and rows[1].bits is None
    assert rows[2].answers == [None, None] and rows[2].kld == 0.010706
    assert rows[2].needle_failure == "llama-completion exited with 1: no kernel for this type"
    assert rows[0].found == rows[3].found == 2 and rows[3].needle_failure is None
    assert report.cells(rows[1]) == ["q4_0", *["–"] * 6] and report.cells(rows[2])[-1] == "–"
    (fake / "bin" / "nan").touch()
    (fake / "bin" / "breaks").unlink()
    rows, _ = measured(fake, "q4_0")
    assert rows[1].failure == "its predictions are not finite (KLD nan)"
    json.loads(report.to_json(rows), parse_constant=pytest.fail)


@needs_posix
def test_text_too_short_for_needles(fake):
    """All other results are in the table, and the reason is below it."""
    (fake / "text.txt").write_text("A word. " * 500)
    done = subprocess.run(
        command_line(fake, "--types", "q4_0", "--demo", "q4_0", "--markdown", fake / "table.md"),
        env=environment(fake), capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    why = "text: 4000 characters are too few for a needle 6000 characters back."
    assert f"No question is asked: {why}" in done.stdout
    assert f"Needles of f16, q4_0 were not asked for: {why}" in done.stdout
    assert re.search(r"^q4_0 +4\.5 +3\.38 +37\.506 .* –$", done.stdout, re.MULTILINE)
    words = (fake / "table.md").read_text(encoding="utf-8")
    assert words.endswith(f"\n\nNeedles of f16, q4_0 were not asked for: {why}\n")


@needs_posix
def test_unknown_type(fake):
    way_out = "; `turboquant build` makes one that has it"
    for name, more in (("turbo4", way_out), ("turbo4_tcq", way_out), ("turbo5_tcq", "")):
        with pytest.raises(ProgramError, match=f"knows no cache type '{name}'; it has f32, f16, .*, q5_1{more}$"):
            measured(fake, name)
    assert not (fake / "bin" / "runs.txt").exists()


@needs_posix
def test_too_short_text(fake):
    with pytest.raises(ProgramError, match="text.txt has 4 chunks of 2048 tokens, 5 were asked for"):
        measured(fake, chunks=5)


@needs_posix
def test_failure_shows_the_log(fake):
    program = fake / "bin" / "llama-perplexity"
    program.write_text(f"#!{sys.executable}\nimport sys\nsys.exit('out of memory')\n")
    with pytest.raises(ProgramError, match="llama-perplexity exited with 1\n(.*\n)+.*out of memory") as info:
        measured(fake)
    assert str(fake / "logs" / "perplexity-f16.log") in str(info.value)


def test_missing_programs(tmp_path):
    with pytest.raises(ProgramError, match="turboquant build"):
        Programs(tmp_path / "nowhere", tmp_path)
    with pytest.raises(ProgramError, match="has no llama-perplexity"):
        Programs(tmp_path, tmp_path).path("llama-perplexity")


def command_line(root, *arguments):
    command = [sys.executable, "-m", "turboquant.evaluate", "--bin", root / "bin", "--model", root / "model.gguf"]
    command += ["--text", root / "text.txt", "--chunks", 4, "--needles", 2, "--threads", 1, *arguments]
    return [str(part) for part in command]


def environment(root):
    return os.environ | {"TURBOQUANT_CACHE": str(root / "cache"), "FORCE_COLOR": "1", "PYTHONUTF8": "1"}


@needs_posix
def test_command_line(fake):
    arguments = ("--types", "q8_0", "--markdown", fake / "table.md", "--json", fake / "table.json")
    done = subprocess.run(command_line(fake, *arguments), env=environment(fake), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert re.search(r"^q8_0 +8\.5 +6\.38 +37\.506 ", done.stdout, re.MULTILINE)
    assert done.stderr.splitlines() == [
        "measuring perplexity f16 (4 x 2048), base ...", "measuring perplexity q8_0 (4 x 2048) ...",
        "measuring needle f16 ...", "measuring needle q8_0 ...",
    ]  # fmt: skip
    # Not a terminal: no escape sequences and nothing overwritten, FORCE_COLOR or not.
    assert not re.search(r"[\x00-\x09\x0b-\x1f\x7f]", done.stdout + done.stderr)
    assert (fake / "table.md").read_text(encoding="utf-8").splitlines()[3].startswith("| q8_0 | 8.5 | 6.38 |")
    assert json.loads((fake / "table.json").read_text(encoding="utf-8"))["rows"][1]["found"] == 2


@needs_posix
@pytest.mark.parametrize(
    "arguments, reason",
    [
        (["--types", "f16/"], "expected TYPE or TYPE_K/TYPE_V, got 'f16/'"),
        (["--model", "none.gguf"], "none.gguf: no such file; give a GGUF model, or the name of one"),
        (["--types", "turbo4"], "knows no cache type 'turbo4'"),
    ],
)
def test_command_line_errors(fake, arguments, reason):
    done = subprocess.run(command_line(fake, *arguments), env=environment(fake), capture_output=True, text=True)
    assert done.returncode == 1
    assert reason in done.stderr and "Traceback" not in done.stderr


@pytest.mark.parametrize("size", [1, 5, 1000])
@pytest.mark.parametrize(
    "printed, shown",
    [
        ("A light.", "A light."),
        ("A light. [end of text]\n\n\n", "A light."),
        ("A light.\n [end of text]\n", "A light."),
        ("[end of text]\n is what it says", "[end of text]\n is what it says"),
        ("A light [end of", "A light [end of"),
        (" [end of text]", ""),
    ],
)
def test_end_of_text_is_not_shown(printed, shown, size):
    pieces = []
    stream = demo._WithoutEnd(pieces.append)
    for start in range(0, len(printed), size):
        stream.write(printed[start : start + size])
    stream.flush()
    assert "".join(pieces) == shown


@needs_posix
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_interrupted(fake, number):
    """An interruption of the second of three runs ends the program and removes the predictions; f16 is kept."""
    slow, sleeping = fake / "bin" / "slow", fake / "bin" / "sleeping"
    slow.touch()
    # The child must not inherit an ignored SIGINT, as it would from a shell's background job.
    command = [sys.executable, "-c", textwrap.dedent("""
        import os, signal, sys
        signal.signal(signal.SIGINT, signal.default_int_handler)
        os.execv(sys.argv[1], sys.argv[1:])
    """)] + command_line(fake, "--types", "q8_0")  # fmt: skip
    child = subprocess.Popen(
        command, env=environment(fake), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        start_new_session=True,
    )  # fmt: skip
    try:
        while not sleeping.exists():
            assert child.poll() is None, child.communicate()
            time.sleep(0.05)
        child.send_signal(number)
        _, errors = child.communicate(timeout=60)
        assert child.returncode == 128 + number
        assert "Traceback" not in errors
        with pytest.raises(ProcessLookupError):  # nothing of its process group is left
            os.killpg(child.pid, 0)
    finally:
        if child.poll() is None:
            os.killpg(child.pid, signal.SIGKILL)
    assert not list((fake / "cache" / "evaluate").glob("kld-base-*"))
    slow.unlink()
    sleeping.unlink()
    done = subprocess.run(command_line(fake, "--types", "q8_0"), env=environment(fake), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
