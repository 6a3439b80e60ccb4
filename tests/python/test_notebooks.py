"""The notebooks run, and the numbers in their text are right.

Expected values come from theory or from a definition, with their origin in a comment. Values that are only measured
(real K and V, one text) have bounds that express the statement of the text.
"""
import importlib.util
import json
import os
import re
import sys
from pathlib import Path

import pytest

jupytext = pytest.importorskip("jupytext", reason="needs pip install '.[notebooks]'")
nbformat = pytest.importorskip("nbformat")

ROOT = Path(__file__).resolve().parents[2]
NOTEBOOKS = sorted((ROOT / "notebooks").glob("[0-9]*.ipynb"))

# Jupyter's own: event loops and paths that are going to change.
pytestmark = pytest.mark.filterwarnings("default")


def load_tool(name):
    spec = importlib.util.spec_from_file_location(name, ROOT / "tools" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


tool = load_tool("make_notebooks")


def near(value, relative=0.0, absolute=0.0):
    return pytest.approx(value, rel=relative or None, abs=absolute or None)


class Between:
    """Equal to every number from low to high."""

    def __init__(self, low, high):
        self.low, self.high = low, high

    def __eq__(self, other):
        return self.low <= other <= self.high

    def __repr__(self):
        return f"{self.low} ... {self.high}"


MAX = {2: 0.1175, 3: 0.03454, 4: 0.009497}  # Max 1960, table I

#: notebook -> {expression in its namespace: what it must equal}
EXPECTED = {
    "01": {
        "[len(x), int(large.sum())]": [64, 5],
        # the definition: slot width (max - min) / (2^b - 1), worst error at most half of it
        "[width[b] * (2**b - 1) / span for b in bits]": near([1.0] * 7),
        "max(worst[b] / width[b] for b in bits)": Between(0.4, 0.5),
        "bits": [2, 3, 4, 5, 6, 7, 8],
        # with 4 bits most levels are where no value is; each further bit wastes more
        "used[4]": Between(2, 8),
        "all(used[b] / 2**b <= used[b - 1] / 2 ** (b - 1) for b in bits[1:])": True,
        "price": Between(3, 3.6),  # log2 of the ratio of ranges: 5 N(0,1) x 20 against 64 N(0,1)
        "float((rms['K'].max(1) / np.median(rms['K'], axis=1)).max())": Between(10, 17),  # "ten times the others"
        "float((rms['V'].max(1) / np.median(rms['V'], axis=1)).max())": Between(1, 2),
        "real_price": Between(0.8, 1.2),  # "pays a bit for them"
    },
    "02": {
        "[dense, butterfly]": [16384, 896],  # d^2, d log2 d
        "peak['as it is']": near(22, 0.03),
        "max(value for name, value in peak.items() if name != 'as it is')": Between(2, 4),
        "round(sigma, 4)": 0.0884,  # 1/sqrt(128)
        "list(std.values())": near([0.0884] * 4, 0.02),
        "distance['outliers, dense rotation'] < critical['outliers, dense rotation']": True,
        "distance['real K as it is'] > 2 * distance['real K, Walsh-Hadamard']": True,
        # all energy in one of 128 channels, exactly
        "[a for a, b in collision.values()]": near([128.0] * 3),
        "max(b for a, b in collision.values())": Between(2, 5),
        # H H = n: the outliers are back
        "twice_peak['H (H S1 x)'] / twice_peak['x']": near(1),
        "twice_peak['H (S2 H S1 x)']": Between(2, 4),
        "norms.tolist()": near([8 * 2 ** (stage / 2) for stage in range(5)]),  # a stage is sqrt(2) times a rotation
    },
    "03": {
        "[lloyd[b] for b in (2, 3, 4)]": near(list(MAX.values()), 1e-3),
        "[shannon[b] for b in (2, 3, 4)]": [1 / 16, 1 / 64, 1 / 256],  # 4^-b
        "[spaced[b] for b in (2, 3, 4)]": near([0.1188, 0.03744, 0.01154], 1e-3),  # Max 1960, table II
        "max(gap_db.values()) < 4.36": True,  # the limit for many levels, pi sqrt(3) / 2
        "[rotated[b][0] for b in (2, 3, 4)]": near(list(MAX.values()), 0.03),
        "max(rotated[b][i] / lloyd[b] for b in (2, 3, 4) for i in range(4))": Between(0.9, 1.02),  # "or a little less"
        "min(unrotated[b][2] / lloyd[b] for b in (2, 3, 4))": Between(3, 30),  # real K without rotation
        "list(length['norm correction'].values())": near([1.0] * 3),
        "list(slope['the codec'].values())": near([1.0] * 3, 1e-3),
        "slope['norm as it is'][2] < slope['norm correction'][2] < 1": True,
        "[round(ratio[name], 2) for name in ('turbo4', 'turbo3', 'turbo2')]": [3.88, 5.12, 7.53],
        "max(above['trellis'].values())": Between(0, 2),  # "within 2 dB of the limit"
        "max(above['trellis'][b] / gap_db[b] for b in widths)": Between(0, 0.5),  # "more than half of the gap"
        # FORMAT.md, section 6, on other values
        "list(coded.values())": near([0.1295, 0.0823, 0.0329, 0.0202, 0.00793, 0.00498], 0.01),
        "max(coded_above[f'turbo{b}_tcq'] for b in widths)": Between(0, 2),
        "min(coded_above[f'turbo{b}'] for b in widths)": Between(3.5, 4.4),
    },
    "04": {
        "(qjl_mean - exact) / standard_error": Between(-4, 4),  # unbiased
        "qjl_std / theory_std": near(1, 0.06),  # 4 standard errors of a standard deviation from 2000
        "1 - centroid_mean / exact": near(1 - 2 / 3.14159265, 0.02),  # E|x|^2 of N(0,1)
        "qjl_std > 2 * centroid_std": True,
        "rows['3 bits + 1 bit of QJL'][1]": near(1, 0.002),
        "rows['4 bits of centroids'][1]": Between(0.99, 0.998),
        "theory_ratio": near(3.14159265 / 2 * MAX[3] / MAX[4], 2e-3),
        "variance_ratio / theory_ratio": near(1, 0.06),
        "[len(real_contexts), contexts[-1]]": [4, 32768],
        "min(kl_ratio)": Between(4, 10),
        "all(a.kl > b.kl for a, b in zip(real['3 bits + 1 bit of QJL'] + synthetic['3 bits + 1 bit of QJL'],"
        " real['3 bits of centroids'] + synthetic['3 bits of centroids']))": True,  # "worse than no bit at all"
        "min(growth.values())": Between(5, 30),  # "by an order of magnitude"
    },
    "05": {
        "v_is_linear": near(1, 1e-6),  # attention is linear in V
        "sharp_k[3] / sharp_k[2] > 1.5 * sharp_v[3] / sharp_v[2]": True,
        "from_k[0] / from_v[0]": Between(1.5, 4),
        "[additive.min(), additive.max()]": [Between(0.9, 1), Between(1, 1.1)],  # "errors simply add up"
        "[live[2, 0] / live[0, 2], live[4, 0] / live[0, 4]]": [Between(1.3, 3)] * 2,  # "half as much again"
        # the live table is in order: each row and column loses with fewer bits
        "bool((np.diff(live, axis=0) > 0).all() and (np.diff(live, axis=1) > 0).all())": True,
        "min(share_of_k.values())": Between(0.7, 0.9),  # "nearly four times as much"
        "all(grid[b, a]['kld'] > 1.5 * grid[a, b]['kld'] for a, b in swaps)": True,
        "boundary['0']['kld'] > boundary['1']['kld'] > 2 * grid['turbo4', 'turbo3']['kld']": True,  # "a poor bargain"
        "all(rates == sorted(rates) for rates in skip.values())": True,
        "all(skip[1][i] <= skip[2][i] <= skip[4][i] for i in range(6))": True,
        "max(rows[0] for rows in change.values())": Between(0, 1e-10),  # "not more than rounding does"
        "skip[4][0]": Between(0.1, 0.5),  # "sharp heads skip a large part"
        "all(block_mse[f'turbo{b}'][i] > block_mse[f'turbo{b}_64'][i] > block_mse[f'turbo{b}_32'][i]"
        " for b in (4, 3, 2) for i in (0, 1))": True,
    },
    "06": {
        "[round(ratio[name, name], 2) for name in ('turbo4', 'turbo3', 'turbo2')]": [3.88, 5.12, 7.53],
        "cache_gib(131072, 'f16', 'f16')": 16.0,  # 131072 tokens x 32 layers x 2 x 8 heads x 128 x 2 bytes
        "cache_gib(32768, 'turbo4', 'turbo4')": near(4 * 4.125 / 16),
        # "rotation does most of it"; "at 2 bits they halve what rotation leaves"
        "steps[4][0].kl / steps[4][1].kl": Between(2, 6),
        "steps[4][4].kl == min(one.kl for one in steps[4])": True,
        "steps[2][1].kl / steps[2][3].kl": Between(1.5, 4),  # Lloyd-Max against min-max, both rotated
        # the function of the model is not changed by outliers or by convert
        "max(abs(row['f16', 'f16']['ppl'] / stack['clean']['f16', 'f16']['ppl'] - 1) for row in stack.values())":
            Between(0, 1e-3),
        "turbo4['outliers'] / turbo4['clean']": Between(5, 30),
        "turbo4['outliers, converted'] / turbo4['clean, converted']": near(1, 0.1),  # convert undoes the outliers
        "float(np.median(gain['outliers']))": Between(4, 20),
        "q4['outliers', 'plain'] / q4['outliers', 'rotated']": Between(4, 30),
        "sorted(timed) == sorted({row['pair'] for row in timing['layer']}) and 'f16:f16' in timed": True,
    },
}


def test_every_notebook_is_tested():
    assert [one.name[:2] for one in NOTEBOOKS] == list(EXPECTED) == [f"{n:02}" for n in range(1, 7)]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_stored_notebook(path):
    """It has the cells of its source, was run from top to bottom, has pictures, and is small enough for display."""
    assert tool.check(path.with_suffix(".py")) == ""
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in code] == list(range(1, len(code) + 1))
    outputs = [output for cell in code for output in cell.outputs]
    assert {output.output_type for output in outputs} <= {"stream", "display_data", "execute_result"}
    assert {output.name for output in outputs if output.output_type == "stream"} == {"stdout"}  # no warnings
    assert sum("image/png" in output.get("data", {}) for output in outputs) >= 2
    assert any("sliders(" in cell.source for cell in code)
    assert path.stat().st_size < 600 * 1024


@pytest.mark.slow
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebook_runs(path, monkeypatch, tmp_path):
    """Run the stored notebook in a kernel of this Python, then compare its variables."""
    monkeypatch.setenv("IPYTHONDIR", str(tmp_path))
    monkeypatch.setenv("JUPYTER_DATA_DIR", str(tmp_path))
    notebook = nbformat.read(path, as_version=4)
    expected = EXPECTED[path.name[:2]]
    marker = "the values of the test: "
    question = f"import json\nprint({marker!r} + json.dumps([eval(one, globals()) for one in {list(expected)!r}], " \
               "default=lambda value: value.item()))"
    notebook.cells.append(nbformat.v4.new_code_cell(question))
    tool.execute(notebook)
    printed = "".join(output.text for output in notebook.cells[-1].outputs)
    values = json.loads(printed.split(marker)[1])
    wrong = [f"{expression} is {value}, not {expected[expression]}"
             for expression, value in zip(expected, values) if not value == expected[expression]]
    assert not wrong, "\n".join(wrong)


def test_failing_cell_is_told_and_nothing_is_written(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(tool, "FOLDER", tmp_path)
    source = tmp_path / "01-broken.py"
    source.write_text("# %%\n1 / 0\n")
    monkeypatch.setattr(sys, "argv", ["make_notebooks.py"])
    assert tool.main() == 1
    assert "ZeroDivisionError" in capsys.readouterr().out
    assert [one.name for one in tmp_path.iterdir()] == [source.name]


def test_check_sees_a_difference(tmp_path, monkeypatch):
    monkeypatch.setattr(tool, "FOLDER", tmp_path)
    source = tmp_path / "01-small.py"
    source.write_text("# %% [markdown]\n# # Title\n\n# %%\nx = 1\n")
    assert "missing" in tool.check(source)
    nbformat.write(tool.from_source(source), source.with_suffix(".ipynb"))
    assert tool.check(source) == ""
    source.write_text(source.read_text().replace("x = 1", "x = 2"))
    assert "is not what" in tool.check(source)


def test_contents_page_lists_them():
    page = (ROOT / "notebooks" / "README.md").read_text(encoding="utf-8")
    listed = re.findall(r"^\| \[(.+?)\]\((.+?\.ipynb)\)", page, re.MULTILINE)
    titles = [re.match(r"# (.+)", nbformat.read(path, as_version=4).cells[0].source)[1] for path in NOTEBOOKS]
    assert listed == list(zip(titles, (path.name for path in NOTEBOOKS)))


# ---- the data --------------------------------------------------------------------------------------------------------

def test_sample_is_what_the_page_says():
    from turboquant import dump

    path = ROOT / "notebooks" / "data" / "kv-prose-8m.safetensors"
    assert path.stat().st_size <= 5_000_000
    layers = dump.load(path)
    assert list(layers) == [1]
    layer = layers[1]
    assert (layer.q.shape, layer.k.shape, layer.v.shape) == ((4, 2048, 128), (2, 2048, 128), (2, 2048, 128))
    assert layer.scale == pytest.approx(128**-0.5, rel=1e-5)  # the file has six digits


def test_measurements_are_of_what_they_say(monkeypatch, tmp_path):
    """tools/measure_notebooks.py asks for the right pairs, models and variables; llama.cpp is left out."""
    from turboquant.evaluate.rows import Row
    from turboquant.measure.kvsize import Cache, Caches, CacheSize
    from turboquant.measure.measurer import BASELINE, Quality
    from turboquant.measure.pairs import Window
    from turboquant.measure.perplexity import Divergence

    measuring = load_tool("measure_notebooks")
    runs, windows = [], []

    class FakeMeasurer:
        def __init__(self, model, text, *_):
            assert (model.name, text.name) == ("prose-8m-q8_0.gguf", "heldout.txt")

        def quality(self, asked):
            windows.extend((str(run.pair), run.pair.window, run.decode) for run in asked)
            tokens = {run: run.pair.window.tokens if run.pair.window else 0 for run in asked}
            return {run: Quality(Divergence(*[0.0] * 12),
                                 Caches([Cache(2048, 1, CacheSize(1, 1, run.pair.k, run.pair.v, tokens[run], "q8_0", 1))], 0))
                    for run in asked}

    def measure(options, programs, results, scratch, progress):
        variables = {key: value for key, value in os.environ.items() if key.startswith("LLAMA_")}
        assert {pair.window for pair in options.pairs if pair.may_have_window} <= {Window(0)}
        runs.append((options.model.name, len(options.pairs), variables, options.needles))
        return [Row(pair.k, pair.v, 16, 4, 1, 1, 30.0, 1, None if pair == BASELINE else 0.01, 0.001, 99, 1)
                for pair in dict.fromkeys([BASELINE, *options.pairs])]

    for name in [key for key in os.environ if key.startswith("LLAMA_")]:
        monkeypatch.delenv(name)
    monkeypatch.setattr(measuring, "measure", measure)
    monkeypatch.setattr(measuring, "Measurer", FakeMeasurer)
    monkeypatch.setattr(measuring, "cache_dir", lambda: tmp_path / "cache")
    monkeypatch.setattr(measuring, "convert", lambda source, target, **_: target.write_bytes(source.read_bytes()))
    for name in ("tame.gguf", "wild.gguf", "text.txt"):
        (tmp_path / name).write_text("x")
    files = [str(tmp_path / name) for name in ("tame.gguf", "wild.gguf", "text.txt", "out.json")]
    options = ["--model", files[0], "--outliers", files[1], "--text", files[2], "-o", files[3], "--bin", str(tmp_path)]
    assert measuring.main([*options, "--threads", "1"]) == 0

    names = {"tame.gguf", "wild.gguf", "tame-converted.gguf", "wild-converted.gguf"}
    assert {model for model, _, _, _ in runs} == names
    assert [run[:3] for run in runs if run[2]] == [
        ("tame.gguf", 3, {"LLAMA_ATTN_ROT_DISABLE": "1"}), ("wild.gguf", 3, {"LLAMA_ATTN_ROT_DISABLE": "1"}),
        ("tame.gguf", 1, {"LLAMA_ARG_CACHE_BOUNDARY_V": "1"}), ("tame.gguf", 1, {"LLAMA_ARG_CACHE_BOUNDARY_V": "2"}),
        *(("tame.gguf", 1, {"LLAMA_ARG_CACHE_SPARSE_V": f"{one:g}"}) for one in measuring.THRESHOLDS),
    ]
    assert all(needles == 0 for _, _, _, needles in runs)
    assert not [key for key in os.environ if key.startswith("LLAMA_")]
    found = json.loads((tmp_path / "out.json").read_text())
    stored = json.loads((ROOT / "notebooks" / "data" / "measured.json").read_text())

    def shape(value):
        """Keys and lengths, for comparison."""
        if isinstance(value, dict):
            return {key: shape(one) for key, one in value.items() if key != "about"}
        if not isinstance(value, list):
            return None
        names = ("type", "window") if value and "window" in value[0] else ("k", "v")
        return [tuple(row[name] for name in names) for row in value]

    assert shape(found) == shape(stored)
    assert len(windows) == len(set(windows)) == 2 * (1 + len(stored["windows"]["rows"]))
    before = (tmp_path / "out.json").read_text()
    (tmp_path / "out.json").write_text(json.dumps({**found, "windows": {}}, indent=1) + "\n")
    assert measuring.main(["--only-windows", "-o", files[3], "--bin", str(tmp_path)]) == 0
    assert (tmp_path / "out.json").read_text() == before
    assert measuring.main([*options, "--bin", str(tmp_path / "missing")]) == 1


def test_measurements_need_files(capsys):
    with pytest.raises(SystemExit):
        load_tool("measure_notebooks").main(["--model", "no.gguf", "--outliers", "no.gguf", "--text", "no.txt"])
    assert "no.gguf: no such file" in capsys.readouterr().err
