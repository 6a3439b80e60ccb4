"""The documents are true: the README's example prints what its comments say, commands exist, links work."""

import contextlib
import io
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import turboquant
import typer
from turboquant import cli
from turboquant.known_models import MODELS
from turboquant.llama.build import DEFAULT_TARGETS

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")
DOCUMENTS = [
    "README.md", "CONTRIBUTING.md", "models/README.md", "ggml_types/README.md", "notebooks/README.md",
    *sorted(path.relative_to(ROOT).as_posix() for path in (ROOT / "docs").glob("*.md")),
]


def test_example():
    blocks = re.findall(r"^```python\n(.*?)^```$", README, re.MULTILINE | re.DOTALL)
    assert len(blocks) == 1
    promised = re.findall(r"^print\(.*\)  # (.+)$", blocks[0], re.MULTILINE)
    assert len(promised) == len(re.findall(r"\bprint\(", blocks[0])) > 0
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        exec(compile(blocks[0], "README.md", "exec"), {"__name__": "__main__"})
    assert printed.getvalue().splitlines() == promised


def test_types():
    text = (ROOT / "docs" / "use.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| `(turbo\w+)` \| (\d+) \| (\d+) \| ([\d.]+) \| ([\d.]+) \|$", text, re.MULTILINE)
    assert [(name, int(block), int(size), float(bits), ratio) for name, block, size, bits, ratio in rows] == [
        (info.name, info.block, info.block_bytes, info.bits_per_value, f"{16 / info.bits_per_value:.2f}")
        for info in turboquant.types()
    ]


def commands(document: str) -> list[list[str]]:
    """The words of every command in the shell blocks of a document, without comments; $(…) is a separate command."""
    text = (ROOT / document).read_text(encoding="utf-8")
    lines = "".join(re.findall(r"^```sh\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)).replace("\\\n", " ").splitlines()
    found = []
    for line in lines:
        inner = re.findall(r"\$\((.*?)\)", line)
        for command in [*inner, *re.split(r"&&|;", re.sub(r"\$\((.*?)\)", "SUBSTITUTED", line))]:
            found.append(shlex.split(command, comments=True))
    return [words for words in found if words]


@pytest.mark.parametrize("document", DOCUMENTS)
def test_commands_exist(document):
    """Every `turboquant` command line is one that the program accepts; scripts, extras, models and programs exist."""
    program = typer.main.get_command(cli.app)
    project = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    extras = set(re.findall(r"^(\w+) = \[", project.partition("[project.optional-dependencies]")[2], re.MULTILINE))
    for words in commands(document):
        if words[0] == "turboquant":
            command = program.commands[words[1]]
            command.make_context(words[1], words[2:])  # parses them, but runs nothing
            if words[1] == "fetch":
                assert set(words[2:]) <= set(MODELS), words
        elif words[:2] == ["pip", "install"]:
            for extra in re.findall(r"\.\[([\w,]+)\]", " ".join(words)):
                assert set(extra.split(",")) <= extras, words
        elif words[0].startswith(("$BIN/", "SUBSTITUTED/")):
            assert words[0].partition("/")[2] in DEFAULT_TARGETS, words
        elif words[0] == "python3" and words[1].startswith("tools/"):
            assert (ROOT / words[1]).is_file(), words


def test_commands_of_the_readme_are_complete():
    """In the README a file that a command reads is part of a checkout, and a variable was set by an earlier command."""
    known = set()
    for block in re.findall(r"^```sh\n(.*?)^```$", README, re.MULTILINE | re.DOTALL):
        for line in block.splitlines():
            command = line.partition("#")[0]
            assert set(re.findall(r"\$(\w+)", command)) <= known, line
            known |= set(re.findall(r"^(\w+)=", command))
            made = {"plan.json", "balanced.gguf"}
            for path in re.findall(r"[\w/.-]+\.(?:txt|gguf|json|py)\b", command):
                assert path in made or (ROOT / path).is_file(), line


@pytest.mark.parametrize("script", ["quickstart", "test"])
def test_options_of_scripts_exist(script):
    path = f"tools/{script}.py"
    helped = subprocess.run([sys.executable, ROOT / path, "--help"], capture_output=True, text=True, check=True).stdout
    for document in DOCUMENTS:
        for words in commands(document):
            if path in words:
                options = {word for word in words[words.index(path) + 1 :] if word.startswith("--") and word != "--"}
                assert options <= set(re.findall(r"--[\w-]+", helped)), f"{document}: {words}"


@pytest.mark.parametrize("document", DOCUMENTS)
def test_links(document):
    folder = (ROOT / document).parent
    text = (ROOT / document).read_text(encoding="utf-8")
    for target in re.findall(r"\]\(([^)#]+)", text):
        assert target.startswith("https://") or (folder / target).exists(), f"{document}: {target}"


def test_bundled_files():
    import hashlib

    text = (ROOT / "models" / "README.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| `([\w.-]+)` \| ([\d,]+) \| `([0-9a-f]{64})` \|$", text, re.MULTILINE)
    assert {name for name, _, _ in rows} == {path.name for path in (ROOT / "models").iterdir()} - {"README.md"}
    for name, size, digest in rows:
        data = (ROOT / "models" / name).read_bytes()
        assert (f"{len(data):,}", hashlib.sha256(data).hexdigest()) == (size, digest)
