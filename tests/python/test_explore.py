"""`turboquant explore`: the command, the codec as WebAssembly, and the page in a real browser."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import webbrowser
from collections.abc import Iterator
from pathlib import Path

import browser as browsers
import numpy as np
import pytest
import turboquant
from browser import Browser
from turboquant import cli, explore, reference
from typer.testing import CliRunner, Result

ROOT = Path(__file__).parents[2]
MAKE_WASM = ROOT / "tools" / "make_wasm.py"
WASM_CLANG = bool(shutil.which("clang++") and shutil.which("wasm-ld"))


def command(*arguments: object) -> Result:
    return CliRunner().invoke(cli.app, ["explore", *(str(argument) for argument in arguments)])


# ---- the command -----------------------------------------------------------------------------------------------------


def test_page_is_one_small_file_that_loads_nothing():
    page = explore.page()
    assert len(page.encode()) < 200_000
    assert "{{" not in page
    assert not re.search(r"https?://|@import|url\(|<link|<img|\bsrc=", page)
    assert set(re.findall(r'href="([^"]*)"', page)) == {"#grid"}
    assert "default-src 'none'" in page


def test_writes_and_keeps_what_is_there(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    first = command()
    assert (first.exit_code, first.stdout, first.stderr) == (0, "turboquant-explore.html\n", "")
    assert (tmp_path / "turboquant-explore.html").read_text(encoding="utf-8") == explore.page()
    assert command().exit_code == 0  # the same page once more

    other = tmp_path / "mine.html"
    other.write_text("mine")
    refused = command("--out", other)
    assert (refused.exit_code, refused.stdout) == (1, "")
    assert refused.stderr == f"turboquant: {other} exists: name another file, or give --force to replace it\n"
    assert other.read_text() == "mine"
    assert command("--out", other, "--force").exit_code == 0
    assert other.read_text(encoding="utf-8") == explore.page()
    assert {path.name for path in tmp_path.iterdir()} == {"mine.html", "turboquant-explore.html"}


def test_to_stdout():
    assert command("--out", "-").stdout == explore.page()


def test_where_it_cannot_write(tmp_path):
    folder = command("-o", tmp_path)
    assert folder.exit_code == 1 and f"{tmp_path} is a folder: name a file in it" in folder.stderr
    missing = command("-o", tmp_path / "no" / "page.html")
    assert missing.exit_code == 1 and f"there is no folder {tmp_path / 'no'}" in missing.stderr
    assert not (tmp_path / "no").exists()


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_full_disk():
    result = command("-o", "/dev/full")
    assert result.exit_code == 1
    assert result.stderr == "turboquant: /dev/full cannot be written: No space left on device\n"


def test_interrupted_write_leaves_nothing(tmp_path, monkeypatch):
    def fail(*_: object) -> None:
        raise PermissionError(13, "Permission denied", "a temporary name")

    monkeypatch.setattr(os, "replace", fail)
    result = command("-o", tmp_path / "page.html")
    assert result.stderr == f"turboquant: {tmp_path / 'page.html'} cannot be written: Permission denied\n"
    assert list(tmp_path.iterdir()) == []


def test_opens_the_browser(tmp_path, monkeypatch):
    opened: list[str] = []
    monkeypatch.setattr(webbrowser, "open", lambda uri: opened.append(uri) is None)
    monkeypatch.delenv("DISPLAY", raising=False)
    monkeypatch.delenv("WAYLAND_DISPLAY", raising=False)
    page = tmp_path / "a page.html"
    command("-o", page, "--no-open")
    command("-o", page)  # nobody watches: stdout is no terminal
    assert opened == []
    assert command("-o", page, "--open").stderr == ""
    assert opened == [page.as_uri()]
    monkeypatch.setattr(webbrowser, "open", lambda uri: False)
    failed = command("-o", page, "--open")
    assert failed.exit_code == 0 and failed.stderr == f"turboquant: no browser could be started; open {page} yourself\n"


# ---- codec.wasm is that of the sources -------------------------------------------------------------------------------


def check_wasm(root: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    words = [sys.executable, root / "tools" / "make_wasm.py", "--check"]
    return subprocess.run(words, env={**os.environ, **environment}, capture_output=True, text=True, check=False)


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """A copy of the sources of codec.wasm."""
    for name in ("cpp/src", "cpp/include", "tools/wasm", "python/turboquant/explore"):
        shutil.copytree(ROOT / name, tmp_path / name)
    shutil.copy(MAKE_WASM, tmp_path / "tools")
    return tmp_path


def edit(path: Path, old: str, new: str) -> None:
    text = path.read_text(encoding="utf-8")
    assert old in text
    path.write_text(text.replace(old, new, 1), encoding="utf-8")


def test_the_controls_offer_the_types():
    frame = (ROOT / "python/turboquant/explore/page.html").read_text(encoding="utf-8")
    blocks = {int(value) for value in re.findall(r'name="n" value="(\d+)"', frame)}
    ranges = re.findall(r'data-state="bits" min="(\d)" max="(\d)"', frame)
    assert ranges
    for least, most in ranges:
        offered = {(bits, n) for bits in range(int(least), int(most) + 1) for n in blocks}
        assert offered == {(info.bits, info.block) for info in turboquant.types()}


def test_wasm_is_current():
    result = check_wasm(ROOT)
    if result.returncode == 3:
        pytest.skip(result.stderr.strip())
    assert result.returncode == 0, result.stderr


def test_wasm_of_other_sources_is_found(checkout, tmp_path_factory):
    no_compiler = {"PATH": str(tmp_path_factory.mktemp("empty")), "CXX": ""}
    assert check_wasm(checkout, **no_compiler).returncode == 0
    scalar = checkout / "cpp/src/scalar.cpp"
    edit(scalar, "if (e > best) {", "if (e >= best) {")
    unsure = check_wasm(checkout, **no_compiler)
    assert unsure.returncode == 3 and "cpp/src/scalar.cpp changed since" in unsure.stderr
    (checkout / "python/turboquant/explore/codec.wasm").write_bytes(b"another")
    assert check_wasm(checkout, **no_compiler).returncode == 1


@pytest.mark.skipif(not WASM_CLANG, reason="needs clang++ and wasm-ld")
def test_only_changes_of_the_codec_matter(checkout):
    record = json.loads((checkout / "python/turboquant/explore/codec.json").read_text())
    printed = subprocess.run(["clang++", "--version"], capture_output=True, text=True, check=True).stdout
    if printed.splitlines()[0] != record["compiler"]:
        pytest.skip(f"codec.wasm was made with {record['compiler']}")
    attention = "static inline int another(int x) { return x + 1; }\n\nconst Kernels kernels_scalar"
    edit(checkout / "cpp/src/scalar.cpp", "const Kernels kernels_scalar", attention)
    assert check_wasm(checkout, CXX="").returncode == 0
    edit(checkout / "cpp/src/scalar.cpp", "if (e > best) {", "if (e >= best) {")
    found = check_wasm(checkout, CXX="")
    assert found.returncode == 1 and "is older than its sources: python3 tools/make_wasm.py" in found.stderr


# ---- in the browser --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def shared_browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    with browsers.start(tmp_path_factory.mktemp("profile")) as browser:
        yield browser


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("page") / "explore.html"
    explore.write_page(path)
    return path


@pytest.fixture
def browser(shared_browser: Browser, page: Path) -> Iterator[Browser]:
    """The page, newly loaded; afterwards its console must be empty."""
    shared_browser.open(page)
    settle(shared_browser)
    shared_browser.console()
    yield shared_browser
    assert shared_browser.console() == []


def settle(browser: Browser) -> None:
    """Wait until everything is drawn."""
    browser.wait("document.querySelector('main').getAttribute('aria-busy') === 'false'")


def put(browser: Browser, **values: object) -> None:
    """Move controls by their ids: numbers for sliders, booleans for boxes, True for buttons."""
    for name, value in values.items():
        browser.run(
            """const [id, value] = arguments, input = document.getElementById(id);
            if (input.type === 'range') {
              input.value = value;
              input.dispatchEvent(new Event('input', { bubbles: true }));
            } else if (input.type !== 'checkbox' || input.checked !== value) input.click();""",
            name.replace("_", "-"),
            value,
        )


def choose(browser: Browser, name: str, value: object) -> None:
    browser.run("document.querySelector(`[name=${arguments[0]}][value='${arguments[1]}']`).click();", name, str(value))


def result(browser: Browser, section: str) -> str:
    return " ".join(browser.run(f"return document.querySelector('#{section} .result').textContent;").split())


def facts(browser: Browser, list_id: str) -> dict[str, str]:
    rows = browser.run(
        "return [...document.querySelectorAll(`#${arguments[0]} div`)]"
        ".map((row) => [row.querySelector('dt').textContent, row.querySelector('dd').textContent]);",
        list_id,
    )
    return dict(rows)


def numbers(browser: Browser) -> dict[str, list[str]]:
    """The table of the first experiment."""
    rows = browser.run(
        "return [...document.querySelectorAll('#grid-table tr')]"
        ".map((row) => [...row.children].map((cell) => cell.textContent));"
    )
    return {row[0]: row[1:] for row in rows}


def vector(browser: Browser) -> np.ndarray:
    """The vector that the page shows."""
    return np.array(browser.run("return Array.from(explore.vector());"), np.float32)


# Every golden line through the codec of the page; returns those that differ.
GOLDEN = """
const [text, id] = arguments;
const { bits, n } = explore.codec.types[id];
explore.codec.type = () => explore.codec.types[id]; // hides the method, which finds the first type of that size
const bytes = (hex) => Uint8Array.from(hex.match(/../g), (pair) => parseInt(pair, 16));
const isNaN32 = (word) => (word & 0x7fffffff) > 0x7f800000;
const wrong = [];
let count = 0;
for (const line of text.split('\\n')) {
  if (!line || line[0] === '#') continue;
  const [what, name, block, floats] = line.split(' ');
  const values = new Float32Array(bytes(floats).buffer);
  count++;
  if (what === 'encode') {
    const got = explore.codec.encode(bits, n, values);
    if (got.join() !== bytes(block).join()) wrong.push(`${what} ${name}`);
  } else {
    const got = new Uint32Array(explore.codec.decode(bits, n, bytes(block)).buffer);
    const want = new Uint32Array(values.buffer);
    const same = got.length === want.length && got.every((w, i) => w === want[i] || (isNaN32(w) && isNaN32(want[i])));
    if (!same) wrong.push(`${what} ${name}`);
  }
}
delete explore.codec.type;
return [count, wrong];
"""


def test_golden_vectors(browser):
    for info in turboquant.types():
        text = (ROOT / "tests/vectors" / f"{info.name}.txt").read_text(encoding="ascii")
        lines = [line for line in text.splitlines() if line and not line.startswith("#")]
        assert browser.run(GOLDEN, text, info.id) == [len(lines), []], info.name
        assert len(lines) > 20
    # A wrong bit is found.
    what, name, block, floats = lines[-2].split()
    assert what == "encode"
    for changed in (block[:-1] + "0123456789abcdef"[int(block[-1], 16) ^ 1], block):
        line = f"encode {name} {changed} {floats}"
        assert browser.run(GOLDEN, line, info.id) == [1, [f"encode {name}"] if changed != block else []]
    sign = floats[:6] + f"{int(floats[6:8], 16) ^ 0x80:02x}" + floats[8:]
    assert browser.run(GOLDEN, f"decode {name} {block} {sign}", info.id) == [1, [f"decode {name}"]]


def test_rotations_are_those_of_the_package(browser):
    rng = np.random.default_rng(5)
    for block in (128, 64, 32):
        x = rng.standard_normal(2 * block).astype(np.float32)
        for name, function in (("rotate", turboquant.rotate), ("unrotate", turboquant.unrotate)):
            call = f"return Array.from(explore.codec.{name}(arguments[0], new Float32Array(arguments[1])));"
            got = browser.run(call, block, x.tolist())
            assert np.array_equal(np.array(got, np.float32), function(x, block))


def test_loads_nothing_else(browser):
    assert browser.run("return performance.getEntriesByType('resource').map((entry) => entry.name);") == []
    answer = browser.run(
        "return new Promise((done) => { const image = new Image(); image.onload = () => done('loaded');"
        " image.onerror = () => done('refused'); image.src = 'data:image/gif;base64,R0lGODlhAQABAAAAACw='; });"
    )
    assert answer == "refused"
    assert all("Content Security Policy" in message for message in browser.console())


def test_numbers_of_the_first_experiment(browser):
    for n, bits in ((128, 4), (64, 3), (32, 2)):
        choose(browser, "n", n)
        put(browser, bits=bits)
        settle(browser)
        x = vector(browser)
        assert x.shape == (n,)
        table = numbers(browser)

        width = np.float64(x.max() - x.min()) / (2**bits - 1)
        plain = x.min() + np.round((x - x.min()) / width) * width
        name = f"turbo{bits}" + ("" if n == 128 else f"_{n}")
        turbo = turboquant.dequantize(turboquant.quantize(x, name), name)
        for column, decoded in enumerate((plain, turbo)):
            error = decoded - x
            assert float(table["RMS error"][column]) == pytest.approx(np.sqrt(np.mean(error**2)), rel=6e-3)
            assert float(table["Largest error"][column]) == pytest.approx(np.abs(error).max(), rel=6e-3)
            share = float(table["Error, relative to the vector"][column].removesuffix(" %"))
            assert share == pytest.approx(100 * np.linalg.norm(error) / np.linalg.norm(x), rel=6e-3)
        assert float(table["Distance of levels"][0]) == pytest.approx(width, rel=6e-3)
        per_value = next(info.bits_per_value for info in turboquant.types() if info.name == name)
        assert float(table["Bits per value"][1]) == per_value


def test_without_rotation_the_codebook_fails_too(browser):
    def error(column: int) -> float:
        return float(numbers(browser)["RMS error"][column])

    put(browser, bits=3)
    settle(browser)
    plain, turbo = error(0), error(1)
    put(browser, plain_rotate=True, turbo_rotate=False)
    settle(browser)
    assert error(1) > 1.5 * turbo
    assert error(0) < plain / 1.5
    x = vector(browser)
    unrotated = turboquant.dequantize(turboquant.quantize(reference.unrotate(x).astype(np.float32), "turbo3"), "turbo3")
    assert error(1) == pytest.approx(np.sqrt(np.mean((reference.rotate(unrotated) - x) ** 2)), rel=6e-3)


def test_butterfly_ends_at_the_codecs_rotation(browser):
    for n in (32, 64, 128):
        choose(browser, "n", n)
        put(browser, stage=99)
        settle(browser)
        assert f"These {n} values are those of the codec's own rotation, bit for bit." in result(browser, "butterfly")
    put(browser, stage=5)
    settle(browser)
    assert "has reached 16 of 128 outputs" in result(browser, "butterfly")
    assert "512 of 896 additions are done; a dense matrix would need 16,384" in result(browser, "butterfly")


@pytest.mark.parametrize("name", ["stage", "step"])
def test_play_goes_on_by_itself(browser, name):
    play, place = {f"{name}_play": True}, f"return explore.state.{name};"
    label = f"return document.querySelector('#{name}-play').textContent;"
    put(browser, **{name: 0}, **play)
    browser.wait(f"explore.state.{name} >= 2")
    assert browser.run(label) == "Stop"
    put(browser, **play)
    assert browser.run(label) == "Play"
    put(browser, **{name: 999}, **play)  # from the start again
    settled = browser.run(place)
    put(browser, **play)
    assert settled == 0


def test_bell_curve(browser):
    def distance() -> float:
        return float(facts(browser, "bell-facts")["Distance from the bell curve"])

    # A coordinate of a uniformly random unit vector is within 0.0011 of N(0, 1/128), and of 1,280,000 independent numbers
    # one sample in a thousand is farther than 0.0017 from their distribution (Kolmogorov-Smirnov).
    choose(browser, "how", "uniform")
    settle(browser)
    assert facts(browser, "bell-facts")["Standard deviation"] == "0.0884 (1/√128 = 0.0884)"
    assert distance() < 0.006
    assert "10,000 rotations: 1,280,000 coordinates" in result(browser, "bell")
    put(browser, outliers=1, size=50)
    choose(browser, "how", "once")
    settle(browser)
    assert distance() > 0.2  # two humps: one value far above the rest, plus or minus
    choose(browser, "how", "twice")
    settle(browser)
    assert distance() < 0.006
    put(browser, count=0)
    settle(browser)
    assert result(browser, "bell").startswith("1 rotation: 128 coordinates")


def test_lloyd_arrives_at_the_codebook(browser):
    for bits in (2, 3, 4):
        put(browser, lloyd_bits=bits, lloyd_start=True)
        settle(browser)
        start = float(facts(browser, "lloyd-facts")["Squared error of these levels"])
        put(browser, lloyd_step=True)
        settle(browser)
        assert float(facts(browser, "lloyd-facts")["Squared error of these levels"]) < start
        put(browser, lloyd_run=True)
        settle(browser)
        levels = browser.run("return explore.state.levels;")
        assert levels == pytest.approx(reference.lloyd_max(bits), abs=1e-5)
        assert "the least there is" in result(browser, "lloyd")
        # Max 1960, table I, and 4^-b.
        assert float(facts(browser, "lloyd-facts")["Least possible (Lloyd-Max)"]) == pytest.approx(
            {2: 0.1175, 3: 0.03454, 4: 0.009497}[bits], rel=6e-4
        )
        assert float(facts(browser, "lloyd-facts")[f"Shannon's limit, 4−{bits}"]) == pytest.approx(4.0**-bits, rel=1e-3)


def test_stored_bytes(browser):
    for bits, n in ((4, 128), (3, 128), (3, 32), (2, 64)):
        choose(browser, "n", n)
        put(browser, bits=bits, element=n - 3)
        settle(browser)
        name = f"turbo{bits}" + ("" if n == 128 else f"_{n}")
        block = turboquant.quantize(vector(browser), name)
        shown = browser.run("return document.querySelector('#stored-bytes').textContent;")
        assert shown.replace(" ", "") == block.tobytes().hex()
        index = reference.unpack(block[2:], bits)[n - 3]
        level = reference.levels(bits)[index]
        text = result(browser, "stored").replace("−", "-")
        assert f"its index, {index}, is in" in text and f"stands for the level {level}:" in text
        value = turboquant.dequantize(block, name, rotated=True)[n - 3]
        assert float(text.removesuffix(".").split("= ")[-1]) == pytest.approx(value, rel=6e-3)


def test_collisions(browser):
    for row in (0, 77):
        put(browser, row=row)
        settle(browser)
        assert facts(browser, "without-facts")["Indices in which A and B differ"] == "0 of 128"
        a = np.float32(reference.hadamard(128)[row])
        b = a.copy()
        b[0] += 1
        blocks = [reference.unpack(turboquant.quantize(x, "turbo4")[2:], 4) for x in (a, b)]
        count = int((blocks[0] != blocks[1]).sum())
        assert count > 20
        assert facts(browser, "with-facts")["Indices in which A and B differ"] == f"{count} of 128"
        assert f"With signs they differ in {count} of 128" in result(browser, "signs")
    put(browser, **{"raise": 0})
    settle(browser)
    assert result(browser, "signs") == "A and B are the same vector now."


def test_trellis(browser):
    for bits, n, step in ((4, 128, 54), (4, 64, 0), (3, 32, 31), (2, 128, 5), (3, 128, 127)):
        choose(browser, "n", n)
        put(browser, trellis_bits=bits, step=step)
        settle(browser)
        x, name = vector(browser), f"turbo{bits}_tcq" + ("" if n == 128 else f"_{n}")
        block = turboquant.quantize(x, name)
        shown = browser.run("return document.querySelector('#trellis-bytes').textContent;")
        assert shown.replace(" ", "") == block.tobytes().hex()

        path = np.unpackbits(block, bitorder="little")[10 : 16 + n]
        element = step % 8 * (n // 8) + step // 8  # FORMAT.md, section 6
        subset = reference.subsets(path)[step]
        _, levels = reference.FORMATS[name].family.split(block)
        value = turboquant.dequantize(block, name, rotated=True)[element]
        text = result(browser, "trellis").replace("−", "-")
        assert text.startswith(f"{name}: step {step} is value {element} of the rotated vector")
        assert f"It is {path[6 + step]}: subset {subset}. " in text
        assert f"The nearest level there is {levels[element]}, " in text
        decoded = re.search(rf"decoded as \S+ · \S+ · {levels[element]} = (\S+)\. ", text)
        assert decoded and float(decoded[1]) == pytest.approx(value, rel=6e-3)

        window = "".join(str(bit) for bit in path[step : step + 7])  # of steps -6 ... step; the start state is first
        register = browser.run("return document.querySelector('#register-chart svg').getAttribute('aria-label');")
        assert register == f"Path bits of steps {step - 6} to {step}: {window}, subset {subset}"

        errors = facts(browser, "trellis-facts")
        assert errors.pop("The path of this page and that of the codec") == "the same"
        shares = {label: float(share.removesuffix(" %")) / 100 for label, share in errors.items()}
        free, greedy, best, coded, finer = shares.values()
        for share, type in ((free, name.replace("_tcq", "")), (coded, name)):
            error = turboquant.dequantize(turboquant.quantize(x, type), type) - x
            assert share == pytest.approx(np.sum(error**2) / np.sum(x**2), rel=6e-3)
        assert finer < best < greedy


def test_costs_of_the_trellis_are_those_of_the_encoder(browser):
    # A path that the encoder did not choose costs at least as much as its own.
    rng = np.random.default_rng(8)
    for bits, n in ((4, 128), (3, 64), (2, 32)):
        x = rng.standard_normal(n).astype(np.float32)
        unit, metric = browser.run(
            "const { unit, metric } = explore.codec.metrics(arguments[0], arguments[1], new Float32Array(arguments[2]));"
            "return [unit, metric];", bits, n, x.tolist(),
        )  # fmt: skip
        name = f"turbo{bits}_tcq" + ("" if n == 128 else f"_{n}")
        family, block = reference.FORMATS[name].family, turboquant.quantize(x, name)
        path = np.unpackbits(block, bitorder="little")[10 : 16 + n]
        assert np.array_equal(reference.best_path(np.array(metric)), path)
        order = np.arange(n).reshape(8, n // 8).T.reshape(n)
        values = np.clip(turboquant.rotate(x, n)[order] / unit, -135, 135)
        distance = np.abs(values[:, None, None] - family.levels.reshape(-1, 4)).min(axis=1) * 2 ** (bits - 1)
        # distances are rounded to the grid, twice, by 0.6 at most; a metric is the square without its low bits
        assert (np.abs(np.array(metric) - np.minimum(distance, 255) ** 2 / 256) <= 1.2 * distance / 256 + 1.01).all()


def test_pointing_at_the_lattice_chooses_the_step(browser):
    def point(share: float) -> int:
        browser.run(
            "const chart = document.querySelector('#lattice-chart'), box = chart.getBoundingClientRect();"
            "chart.dispatchEvent(new PointerEvent('pointermove',"
            " { clientX: box.left + arguments[0] * box.width, clientY: box.top + 50 }));", share,
        )  # fmt: skip
        settle(browser)
        step = browser.run("return explore.state.step;")
        assert f"step {step} is value" in result(browser, "trellis")
        assert browser.run("return Number(document.querySelector('#step').value);") == step
        return int(step)

    put(browser, step=70)
    settle(browser)
    assert (point(0), point(0.5), point(1)) == (64, 79, 95)  # the 32 steps that are shown


def test_every_control_changes_its_experiment(browser):
    moves = [
        ("grid", {"outliers": 3}), ("grid", {"size": 3}), ("grid", {"bits": 2}), ("grid", {"another": True}),
        ("grid", {"plain_rotate": True}), ("grid", {"turbo_rotate": False}), ("butterfly", {"stage": 1}),
        ("butterfly", {"stage_next": True}), ("butterfly", {"stage_back": True}), ("bell", {"count": 1}),
        ("bell", {"again": True}), ("lloyd", {"lloyd_start": True}), ("lloyd", {"lloyd_step": True}),
        ("lloyd", {"lloyd_run": True}), ("lloyd", {"lloyd_codec": True}), ("lloyd", {"lloyd_bits": 3}),
        ("stored", {"element": 99}), ("signs", {"row": 3}), ("signs", {"raise": 2}), ("bell", {"bits": 4}),
        ("stored", {"bits": 2}), ("signs", {"bits": 3}), ("butterfly", {"another": True}), ("lloyd", {"another": True}),
        ("trellis", {"step": 9}), ("trellis", {"step_next": True}), ("trellis", {"step_back": True}),
        ("trellis", {"trellis_bits": 2}), ("trellis", {"another": True}),
    ]  # fmt: skip
    known = browser.run("return [...document.querySelectorAll('input:not([type=radio]), button')].map((c) => c.id);")
    assert set(known) == {name.replace("_", "-") for _, move in moves for name in move} | {"stage-play", "step-play"}
    for section, move in moves:
        markup = f"return document.querySelector('#{section}').innerHTML;"
        before = browser.run(markup)
        put(browser, **move)
        settle(browser)
        assert browser.run(markup) != before, f"{move} changed nothing in {section}"


def test_extremes_give_numbers(browser):
    for n in (32, 64, 128):
        choose(browser, "n", n)
        for outliers, size, bits in ((0, 1, 2), (99, 50, 4), (1, 50, 3)):
            put(browser, outliers=outliers, size=size, bits=bits, stage=99, row=127, element=127, step=127)
            settle(browser)
            text = browser.run("return document.querySelector('main').outerHTML;")
            assert not re.search(r"NaN|undefined|Infinity|\[object", text)
            assert browser.run("return [...document.querySelectorAll('svg')].every((s) => s.querySelector('path'));")


def test_nothing_overflows(browser):
    for width in (1000, 700, 400, 320):
        browser.resize(width)
        browser.wait(  # the charts follow the window
            f"innerWidth === {width} &&"
            "[...document.querySelectorAll('svg')].every((svg) => svg.parentElement.clientWidth === svg.clientWidth)"
        )
        assert browser.run("return document.documentElement.scrollWidth;") == width
        outside = browser.run(
            """return [...document.querySelectorAll('body *:not(.hidden):not(.skip)')]
            .filter((e) => e.getBoundingClientRect().right > innerWidth + 0.5 || e.getBoundingClientRect().left < -0.5)
            .map((e) => e.outerHTML.slice(0, 80));"""
        )
        assert outside == []


# WCAG contrast of every visible piece of text against the nearest background that is not transparent.
CONTRAST = """
const color = (css) => css.match(/[\\d.]+/g).map(Number);
const luminance = ([r, g, b]) => [r, g, b].map((v) => v / 255)
  .map((v) => (v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4))
  .reduce((total, v, i) => total + v * [0.2126, 0.7152, 0.0722][i], 0);
const background = (e) => {
  for (; e; e = e.parentElement) {
    const c = color(getComputedStyle(e).backgroundColor);
    if (c.length === 3 || c[3] === 1) return c;
  }
  return [255, 255, 255];
};
const least = { ratio: 99 };
for (const e of document.querySelectorAll('body *')) {
  if (![...e.childNodes].some((node) => node.nodeType === 3 && node.data.trim())) continue;
  if (e.closest('script, .hidden, :disabled')) continue;
  const style = getComputedStyle(e);
  const a = luminance(color(e.closest('svg') ? style.fill : style.color)), b = luminance(background(e));
  const ratio = (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05);
  if (ratio < least.ratio) Object.assign(least, { ratio, text: e.outerHTML.slice(0, 120) });
}
return [least.ratio, least.text, luminance(background(document.body))];
"""


def test_both_colour_schemes_are_readable(browser):
    put(browser, bits=3)  # all kinds of bytes
    settle(browser)
    for scheme in ("light", "dark"):
        browser.media(prefers_color_scheme=scheme, prefers_reduced_motion="reduce")  # no colours on their way
        browser.wait(f"matchMedia('(prefers-color-scheme: {scheme})').matches")
        ratio, text, paper = browser.run(CONTRAST)
        assert ratio >= 4.5, text
        assert (paper > 0.8) if scheme == "light" else (paper < 0.05)


def test_less_motion(browser):
    duration = "return getComputedStyle(document.querySelector('button')).transitionDuration;"
    assert browser.run(duration) != "0s"
    browser.media(prefers_reduced_motion="reduce")
    assert browser.run(duration) == "0s"


def test_keyboard(browser):
    from selenium.webdriver import ActionChains
    from selenium.webdriver.common.keys import Keys

    def press(key: str) -> None:
        ActionChains(browser.driver).send_keys(key).perform()

    visited = []
    for _ in range(60):
        press(Keys.TAB)
        name, outline = browser.run(
            "const e = document.activeElement;"
            "return [e.id || e.name || e.className, getComputedStyle(e).outlineStyle];"
        )
        if name in visited or name == "":
            break
        visited.append(name)
        assert outline == "solid", name
    every = browser.run(
        "return [...new Set([...document.querySelectorAll('input, button')]"
        ".map((e) => (e.type === 'radio' ? e.name : e.id)))];"
    )
    assert visited == ["skip", *every]

    assert browser.run("return document.querySelector('#announcement').textContent;") == ""
    browser.run("document.querySelector('#bits').focus();")
    press(Keys.ARROW_LEFT)
    settle(browser)
    assert browser.run("return explore.state.bits;") == 3
    assert "At 3 bits" in result(browser, "grid")
    # The change is announced when the control no longer moves, and not before.
    browser.wait("document.querySelector('#announcement').textContent")
    assert browser.run("return document.querySelector('#announcement').textContent;") == result(browser, "grid")
    browser.run("document.querySelector('#plain-rotate').focus();")
    press(Keys.SPACE)
    assert browser.run("return explore.state.plainRotate;") is True


def test_every_control_and_chart_has_a_name(browser):
    nameless = browser.run(
        """return [...document.querySelectorAll('input, button, svg')].filter((e) =>
        !(e.labels?.[0] ?? e).textContent.trim() && !e.getAttribute('aria-label')).map((e) => e.id);"""
    )
    assert nameless == []
    assert browser.run("return [...document.querySelectorAll('h1, h2, h3')].map((h) => h.tagName)[0];") == "H1"


def test_a_browser_that_cannot_run_it_says_so(shared_browser, tmp_path):
    broken = tmp_path / "broken.html"
    broken.write_text(re.sub(r'(id="codec-wasm">).{40}', r"\1AAAA", explore.page()), encoding="utf-8")
    shared_browser.open(broken)
    shared_browser.wait("!document.querySelector('#problem').hidden")
    told = shared_browser.run("return document.querySelector('#problem').textContent;")
    assert told.startswith("This browser could not start the experiments")
    shared_browser.console()
