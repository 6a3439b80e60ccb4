"""Builds for the end-to-end tests, made once and cached.

Three trees are compiled: the default llama.cpp with the hooks (all programs), the same llama.cpp without hooks (only
the library, for comparisons of stock types), and the oldest supported llama.cpp with the hooks (only the library, to
check that it compiles). To test an existing build, set TURBOQUANT_TEST_BIN to its bin folder and TURBOQUANT_TEST_SOURCE
to its tree.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parent))

import builds  # noqa: E402
from harness import MODEL, ROOT, Build, Probe  # noqa: E402
from make_model import SHAPES, Shape, write_model  # noqa: E402


@pytest.fixture(scope="session")
def build() -> Build:
    """llama.cpp with the TurboQuant types."""
    return builds.patched()


@pytest.fixture(scope="session")
def stock() -> Build:
    """The libraries of the same llama.cpp without the hooks."""
    return builds.stock()


@pytest.fixture(scope="session")
def prose_model() -> Path:
    assert MODEL.is_file(), f"{MODEL} is missing"
    return MODEL


@pytest.fixture(scope="session")
def heldout() -> str:
    """English prose that the bundled model was not trained on."""
    return (ROOT / "models" / "heldout.txt").read_text(encoding="utf-8")


class Tiny:
    """Makes the random models of make_model.py on demand."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __call__(self, shape: str | Shape) -> Path:
        name = shape if isinstance(shape, str) else f"{abs(hash(shape)):x}"
        path = self.folder / f"{name}.gguf"
        if not path.is_file():
            write_model(path, SHAPES[shape] if isinstance(shape, str) else shape)
        return path


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Tiny:
    return Tiny(tmp_path_factory.mktemp("models"))


@pytest.fixture
def probe(build: Build, tmp_path: Path, request: pytest.FixtureRequest):
    """Opens probes of the patched build that are closed after the test: probe(model, **environment)."""
    opened: list[Probe] = []

    def open_probe(model: Path, build: Build = build, **env: str) -> Probe:
        opened.append(Probe(build, model, tmp_path, env))
        return opened[-1]

    yield open_probe
    for one in opened:
        one.__exit__()


def pytest_report_header() -> list[str]:
    chosen = os.environ.get("TURBOQUANT_TEST_BIN")
    return [f"llama.cpp under test: {chosen}"] if chosen else []


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    here = Path(__file__).resolve().parent
    for item in items:
        if item.path.is_relative_to(here):
            item.add_marker("llama")
