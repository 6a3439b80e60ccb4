"""The package's layers: modules import only from lower layers, also in functions; and the package's errors."""

from __future__ import annotations

import ast
import builtins
from collections.abc import Iterator
from pathlib import Path

import pytest
import turboquant

PACKAGE = Path(turboquant.__file__).parent

#: Units of the package (its modules and packages), lowest first. A unit imports only from the lines above its own.
LAYERS = (
    ("_core", "errors", "known_models", "reference"),
    ("_arrays", "_kernels", "_types", "llama", "theory"),
    ("_attention", "_codec", "_output", "explore", "fetch", "measure", "models"),
    ("_plot", "dump", "gguf", "plan"),
    ("convert", "evaluate", "tune"),
    ("analyze",),
    ("cli",),
)
#: The package itself, `turboquant`, exports the codec. Units that need its version or functions are above these.
FACADE = ("_core", "_attention", "_codec", "_kernels", "_types")

LEVEL = {unit: level for level, units in enumerate(LAYERS) for unit in units}


def imported(path: Path, package: Path = PACKAGE) -> Iterator[tuple[int, str]]:
    """The line and the name of every import from the package in a file: "measure.pairs"; "" is the package itself."""
    inside = path.relative_to(package).parts[:-1]
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            full = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level <= len(inside) + 1, f"{path}:{node.lineno} imports from outside the package"
            start = ["turboquant", *inside][: len(inside) + 2 - node.level] if node.level else []
            module = ".".join([*start, *([node.module] if node.module else [])])
            # `from . import patch` may name a module, and `from .. import __version__` something of the package.
            full = [
                f"{module}.{alias.name}" if is_module(module, alias.name, package) else module for alias in node.names
            ]
        else:
            continue
        for name in full:
            first, _, rest = name.partition(".")
            if first == "turboquant":
                yield node.lineno, rest


def is_module(module: str, name: str, package: Path) -> bool:
    """Whether `name` is a module of the package `module`, and not something in it."""
    first, *rest = module.split(".")
    folder = package.joinpath(*rest)
    compiled = any(folder.glob(f"{name}.*.so")) or (folder / f"{name}.pyi").is_file()
    return first == "turboquant" and ((folder / f"{name}.py").is_file() or (folder / name).is_dir() or compiled)


def unit(path: Path, package: Path = PACKAGE) -> str:
    return path.relative_to(package).parts[0].removesuffix(".py")


def upward(package: Path = PACKAGE) -> list[str]:
    """Every import that is not from a lower layer, as "file:line imports name"."""
    found = []
    for path in sorted(package.rglob("*.py")):
        here = unit(path, package)
        for line, name in imported(path, package):
            there = name.partition(".")[0]
            if here == "__init__":
                allowed = there in FACADE
            else:
                below = max(LEVEL[one] for one in FACADE) if there == "" else LEVEL[there]
                allowed = here == there or below < LEVEL[here]
            if not allowed:
                found.append(f"{path.relative_to(package).as_posix()}:{line} imports {name or 'turboquant'}")
    return found


def circle(edges: dict[str, set[str]]) -> list[str]:
    """The nodes of a cycle in a graph; empty if there is none."""
    done: set[str] = set()

    def follow(node: str, way: list[str]) -> list[str]:
        if node in way:
            return way[way.index(node) :]
        if node in done:
            return []
        for following in sorted(edges.get(node, ())):
            if found := follow(following, [*way, node]):
                return found
        done.add(node)
        return []

    return next((found for node in sorted(edges) if (found := follow(node, []))), [])


def test_every_unit_has_a_layer():
    there = {unit(path) for path in PACKAGE.rglob("*.py")} - {"__init__"}
    assert there | {"_core"} == set(LEVEL)


def test_imports_come_from_below():
    assert upward() == []


def test_no_modules_import_each_other():
    edges: dict[str, set[str]] = {}
    for path in PACKAGE.rglob("*.py"):
        name = ".".join(path.relative_to(PACKAGE).with_suffix("").parts).removesuffix("__init__").rstrip(".")
        edges[name] = {there for _, there in imported(path)} - {name}
    assert len(edges) > 50 and "measure.programs" in edges["measure.perplexity"]
    assert circle(edges) == []


@pytest.mark.parametrize(
    ("line", "name"),
    [
        ("from ..evaluate.page import table", "evaluate.page"),
        ("from ..evaluate import page", "evaluate.page"),
        ("from .. import evaluate", "evaluate"),
        ("import turboquant.evaluate.page as page", "evaluate.page"),
        ("from turboquant import evaluate", "evaluate"),
        ("def late():\n    from ..evaluate.page import table", "evaluate.page"),
        ("if TYPE_CHECKING:\n    from ..evaluate.page import table", "evaluate.page"),
    ],
)
def test_an_import_from_above_is_seen(tmp_path, line, name):
    for folder in ("evaluate", "measure"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "__init__.py").touch()
    (tmp_path / "evaluate" / "page.py").touch()
    (tmp_path / "measure" / "pairs.py").write_text(f"import math\n{line}\n")
    number = 2 + line.count("\n")
    assert upward(tmp_path) == [f"measure/pairs.py:{number} imports {name}"]


def test_a_circle_is_seen():
    assert circle({"a": {"b", "c"}, "b": {"c"}, "c": {"d"}}) == []
    assert circle({"a": {"b"}, "b": {"c"}, "c": {"d"}, "d": {"b"}}) == ["b", "c", "d"]


#: Exceptions that never leave their package, because they are caught and converted to a `TurboQuantError`.
INNER = {"convert.paths.Refusal", "llama.source._CorruptError", "models.header.HeaderError"}


def test_every_error_is_a_turboquant_error():
    """The command line prints these errors as a message, and a traceback for all others."""
    roots = set()
    for path in PACKAGE.rglob("*.py"):
        module = ".".join(path.relative_to(PACKAGE).with_suffix("").parts)
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if not isinstance(node, ast.ClassDef):
                continue
            bases = [getattr(builtins, base.id, object) for base in node.bases if isinstance(base, ast.Name)]
            if any(issubclass(base, Exception) for base in bases):
                roots.add(f"{module}.{node.name}")
    assert roots == INNER | {"errors.TurboQuantError"}
