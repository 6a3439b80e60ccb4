"""The statements of the documents: the README's example prints what its comments say, its commands exist, links work."""

import contextlib
import io
import re
from pathlib import Path

import pytest
import turboquant

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
