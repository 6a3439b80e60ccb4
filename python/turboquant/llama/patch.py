"""Insert the hooks of ``ggml_types/*/hooks.toml`` into a llama.cpp tree, check their state, and remove them again.

A hook is a pure insertion at an anchor (a regular expression that must match exactly once), bracketed by two comments::

    /* turboquant:begin kv-cache-types */ TURBO_KV_CACHE_TYPES /* turboquant:end kv-cache-types */

so `unpatch` needs no record of the insertions: it removes the brackets and the text between them, which restores the
file byte for byte. `patch` removes all insertions first and then inserts the present ones. So it is idempotent, and it
updates a tree that an older version patched. Files that do not change are not written, so they cause no rebuild.
"""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import stat
import sys
import tempfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

from ..errors import TurboQuantError
from .paths import native_dir

__all__ = [
    "AnchorError",
    "Hook",
    "HookState",
    "HooksFileError",
    "LinkError",
    "MarkerError",
    "NotLlamaError",
    "PatchError",
    "Site",
    "check",
    "cmake_args",
    "load_hooks",
    "patch",
    "unpatch",
]

_Row = tuple[Path, dict[str, Any]]  # of a hooks.toml, as it was read
State = Literal["applied", "missing", "outdated", "skipped", "broken"]

_ID = r"[a-z0-9][a-z0-9-]*"
_BEGIN = "/* turboquant:begin {} */"
_END = "/* turboquant:end {} */"
_INSERTED = re.compile(rf"/\* turboquant:begin (?P<id>{_ID}) \*/(?P<text>.*?)/\* turboquant:end (?P=id) \*/", re.DOTALL)
_MARKER = "turboquant:begin "
_INNER = r"#if.*\n(?:(?!#if|#endif).*\n)*#endif.*\n"
_BLOCK = rf"#if.*\n(?:{_INNER}|(?!#if|#endif).*\n)*#endif.*\n"  # conditional, which may contain others
_FIRST_INCLUDE = rf"\A(?:{_BLOCK}|(?!#if|#include).*\n)*#include .*\n"
_HEADER = "ggml/include/ggml.h"
_VERSIONED = "ggml/src/ggml.c"  # check.cmake reads the hooks' version in it
_LAST = (_VERSIONED, _HEADER)
_FOLDERS = ("ggml", "src", "common", "include", "tools", "tests", "examples")
_SUFFIXES = {".c", ".cc", ".cpp", ".h", ".hpp", ".cu", ".cuh", ".m", ".metal"}


class PatchError(TurboQuantError):
    """A llama.cpp tree could not be patched, checked or unpatched."""


class HooksFileError(PatchError):
    """A hooks.toml has an error."""


class NotLlamaError(PatchError):
    """The folder is not a llama.cpp source tree."""


class AnchorError(PatchError):
    """The anchor of a hook does not match, or matches more than once."""


class LinkError(PatchError):
    """A folder of the tree is a link to another place, where no file may be written."""


class MarkerError(PatchError):
    """The brackets around an insertion are damaged."""


@dataclass(frozen=True)
class Site:
    """One place where a hook may go: a file of llama.cpp, an anchor in it, and the text to insert there."""

    file: str
    anchor: str
    where: Literal["before", "after"]
    text: str


@dataclass(frozen=True)
class Hook:
    """One row of a hooks.toml. The first of `sites` whose anchor matches exactly once is used."""

    id: str
    why: str
    sites: tuple[Site, ...]
    optional: str = ""  # why a tree may lack the place; empty if the hook is required
    tests: bool = False  # whether only llama.cpp's own tests need it

    @property
    def file(self) -> str:
        """The file of the first site, for messages."""
        return self.sites[0].file


@dataclass(frozen=True)
class HookState:
    """The state of one hook in a tree.

    - ``applied``: the hook is inserted as this version inserts it.
    - ``missing``: the hook is not inserted, but can be.
    - ``outdated``: the hook is inserted, but its text or place differs from this version's.
    - ``skipped``: the hook is optional, and the tree lacks the place.
    - ``broken``: the anchor does not match exactly once; ``detail`` explains it.
    """

    hook: Hook
    state: State
    file: str
    detail: str = ""

    @property
    def id(self) -> str:
        return self.hook.id


# ---- hooks.toml ------------------------------------------------------------------------------------------------------


def load_hooks(*files: Path) -> list[Hook]:
    """The hooks of `files` (default: this project's files, one hooks.toml in each folder of ggml_types), in order.

    ``{version}`` in a text is replaced by a digest of the files, which ``ggml_types/check.cmake`` computes as well.

    Raises:
        HooksFileError: a field is missing, unknown or of the wrong type, an id occurs twice, or a regex is invalid.
    """
    files = files or tuple(sorted((native_dir() / "ggml_types").glob("*/hooks.toml")))
    hashes = ""
    rows: list[_Row] = []
    for path in files:
        try:
            data = path.read_bytes()
            table = tomllib.loads(data.decode("utf-8").replace("\r\n", "\n"))
        except (OSError, ValueError) as error:
            raise HooksFileError(f"{path}: {error}") from error
        hashes += hashlib.sha256(data).hexdigest()
        rows += [(path, row) for row in table.get("hook", [])]
    if not rows:
        raise HooksFileError(f"{', '.join(map(str, files)) or native_dir()}: no [[hook]] in it")
    version = hashlib.sha256(hashes.encode()).hexdigest()[:16]
    hooks = _include_hooks(rows) + [_parse_hook(path, row, version) for path, row in rows]
    seen: set[str] = set()
    for hook in hooks:
        if hook.id in seen:
            raise HooksFileError(f"{', '.join(map(str, files))}: the id {hook.id!r} occurs twice")
        seen.add(hook.id)
    return hooks


def _include_hooks(rows: list[_Row]) -> list[Hook]:
    """A hook for every header that hooks of a file request with `include`.

    It goes after the file's first #include outside of conditional blocks, such as those for Windows alone.
    """
    wanted: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for path, row in rows:
        if "include" in row:
            header, file = row["include"], row.get("file")
            if not isinstance(header, str) or not isinstance(file, str):
                raise HooksFileError(f"{path}: hook {row.get('id', '?')!r}: include and file must be strings")
            wanted.setdefault((file, header), []).append(row)
    hooks = []
    for (file, header), users in wanted.items():
        text = f'#include "{header}" // not found? CMake needs the argument that `turboquant patch` prints'
        site = Site(file, _FIRST_INCLUDE, "after", text)
        name = "include-" + re.sub(r"[^a-z0-9]+", "-", file.rpartition("/")[2].lower())
        why = "Declares what the hooks of this file use."
        hooks.append(Hook(name, why, (site,), tests=all(row.get("tests", False) for row in users)))
    return hooks


def _parse_hook(path: Path, row: dict[str, Any], version: str) -> Hook:
    name = row.get("id", "?")

    def field(source: dict[str, Any], key: str) -> str:
        value = source.get(key)
        if not isinstance(value, str) or not value:
            raise HooksFileError(f"{path}: hook {name!r}: {key} must be a non-empty string, got {value!r}")
        return value

    if not re.fullmatch(_ID, field(row, "id")):
        raise HooksFileError(f"{path}: hook id {name!r} must match {_ID}")
    unknown = set(row) - {"id", "why", "file", "anchor", "where", "text", "include", "optional", "tests", "alternative"}
    if unknown:
        raise HooksFileError(f"{path}: hook {name!r}: unknown field {min(unknown)!r}")
    sites = []
    for source in (row, *row.get("alternative", [])):
        merged = {**row, **source}  # an alternative has only the fields that differ
        where = field(merged, "where")
        if where not in ("before", "after"):
            raise HooksFileError(f"{path}: hook {name!r}: where must be 'before' or 'after', got {where!r}")
        text = field(merged, "text").strip("\n").replace("{version}", version)
        if "turboquant:" in text:
            raise HooksFileError(f"{path}: hook {name!r}: the text must not contain 'turboquant:'")
        anchor = field(merged, "anchor")
        try:
            re.compile(anchor, re.MULTILINE)
        except re.error as error:
            raise HooksFileError(f"{path}: hook {name!r}: anchor {anchor!r} is no regex: {error}") from error
        sites.append(Site(field(merged, "file"), anchor, "before" if where == "before" else "after", text))
    optional = row.get("optional", "")
    if not isinstance(optional, str):
        raise HooksFileError(f"{path}: hook {name!r}: optional must be the reason, as a string, got {optional!r}")
    return Hook(row["id"], field(row, "why"), tuple(sites), optional, bool(row.get("tests", False)))


# ---- text ------------------------------------------------------------------------------------------------------------


def _insertion(hook: Hook, site: Site, at_line_start: bool, newline: str) -> str:
    text = site.text.replace("\n", newline)
    gap = newline if "\n" in text or "//" in text else " "
    # At the start of a line the insertion forms separate lines; elsewhere it stays within the line.
    tail = newline if at_line_start else ""
    return f"{_BEGIN.format(hook.id)}{gap}{text}{gap}{_END.format(hook.id)}{tail}"


def _strip(text: str, file: str) -> tuple[str, dict[str, str]]:
    """`text` without insertions, and the insertions by hook id."""
    if _MARKER not in text:
        return text, {}
    found: dict[str, str] = {}
    pieces: list[str] = []
    position = 0
    for match in _INSERTED.finditer(text):
        start, end = match.span()
        if match["id"] in found or _MARKER in match["text"]:
            raise MarkerError(_damaged(file, match["id"]))
        if start == 0 or text[start - 1] == "\n":
            for newline in ("\r\n", "\n"):
                if text.startswith(newline, end):
                    end += len(newline)
                    break
            else:
                raise MarkerError(_damaged(file, match["id"]))
        found[match["id"]] = text[start:end]
        pieces.append(text[position:start])
        position = end
    pieces.append(text[position:])
    stripped = "".join(pieces)
    if "turboquant:begin" in stripped or "turboquant:end" in stripped:
        raise MarkerError(_damaged(file, "turboquant"))
    return stripped, found


def _damaged(file: str, what: str) -> str:
    return (
        f"{file}: the comments 'turboquant:begin' and 'turboquant:end' around {what!r} were changed by hand; restore "
        f"this file from its original (git checkout {file}, or unpack the sources again), then patch"
    )


def _locate(site: Site, text: str) -> tuple[int | None, int]:
    """The position of the insertion (None unless the anchor matches exactly once), and the number of matches."""
    matches = list(re.finditer(site.anchor, text, re.MULTILINE))
    if len(matches) != 1:
        return None, len(matches)
    return (matches[0].start() if site.where == "before" else matches[0].end()), 1


# ---- trees -----------------------------------------------------------------------------------------------------------


def _root(directory: str | os.PathLike[str]) -> Path:
    root = Path(directory).expanduser()
    if not root.is_dir():
        raise NotLlamaError(f"{root}: no such folder")
    if not (root / _HEADER).is_file() or not (root / "src/llama-context.cpp").is_file():
        inner = root / "vendor" / "llama.cpp"
        hint = f"; did you mean {inner}?" if (inner / "ggml/include/ggml.h").is_file() else ""
        raise NotLlamaError(
            f"{root}: not a llama.cpp source tree (it has no ggml/include/ggml.h and src/llama-context.cpp){hint}"
        )
    return root


def _read(path: Path) -> str:
    # No newline translation; bytes that are no UTF-8 are preserved.
    try:
        return path.read_bytes().decode("utf-8", "surrogateescape")
    except OSError as error:
        raise PatchError(f"{path}: cannot be read: {error.strerror}") from error


def _write_all(files: dict[Path, str]) -> None:
    """Give every file its new content, in this order.

    All new contents are written to the disk before the first file is replaced. If an error occurs afterwards, the files
    that were replaced are restored. Files with new content remain only if the process is killed or a file cannot be
    restored, which the error then names. In both cases the same command completes the work.

    Raises:
        PatchError: a file cannot be written; the text names the file and the state of the tree.
    """
    staged: list[tuple[Path, Path, Path]] = []  # the file, its new content, a copy of its old content
    temporaries: list[Path] = []
    replaced = 0

    def temporary(path: Path) -> Path:
        descriptor, name = tempfile.mkstemp(prefix=path.name + ".", dir=path.parent)
        os.close(descriptor)
        temporaries.append(Path(name))
        return temporaries[-1]

    path = Path()
    try:
        for path, text in files.items():
            target = path.resolve()  # a link stays a link
            new, old = temporary(target), temporary(target)
            new.write_bytes(text.encode("utf-8", "surrogateescape"))
            os.chmod(new, stat.S_IMODE(target.stat().st_mode))
            shutil.copy2(target, old)
            staged.append((target, new, old))
        for path, (target, new, _) in zip(files, staged, strict=True):
            os.replace(new, target)
            replaced += 1
    except BaseException as error:
        changed = _put_back(staged[:replaced])
        if not isinstance(error, OSError):
            raise
        state = f"{', '.join(map(str, changed))} changed already" if changed else "nothing was changed"
        raise PatchError(
            f"{path}: cannot be written: {error.strerror}; {state}: run the same command again when it can"
        ) from error
    finally:
        for one in temporaries:
            one.unlink(missing_ok=True)


def _put_back(staged: list[tuple[Path, Path, Path]]) -> list[Path]:
    """Restore the replaced files; returns those that could not be restored."""
    failed = []
    for target, _, old in staged:
        try:
            os.replace(old, target)
        except OSError:
            failed.append(target)
    return failed


def _patched_files(root: Path) -> Iterator[Path]:
    """Every source file of the tree with an insertion, also those of versions with other hooks."""
    for folder in _FOLDERS:
        for path in sorted((root / folder).rglob("*")):
            if path.suffix in _SUFFIXES and path.is_file() and _is_patched(path):
                yield path


def _is_patched(path: Path) -> bool:
    return _MARKER.encode() in path.read_bytes()


def _refuse_links(root: Path, files: Iterable[str]) -> None:
    """Raise LinkError if a file would be written through a link to a folder."""
    for file in files:
        place, real = root, root.resolve()
        for part in Path(file).parent.parts:
            place, real = place / part, real / part
            if place.is_dir() and place.resolve() != real:
                raise LinkError(
                    f"{place} is a link to {place.resolve()}, which other trees may use as well: patch the tree that it "
                    f"belongs to, or put a copy in its place. `turboquant build --source {root}` copies the sources and "
                    "needs neither"
                )


@dataclass
class _Plan:
    """The present and the patched contents of a tree's files, and the state of every hook."""

    before: dict[str, str]
    after: dict[str, str]
    states: list[HookState]


def _plan(root: Path, hooks: list[Hook]) -> _Plan:
    before: dict[str, str] = {}
    original: dict[str, str] = {}
    present: dict[str, tuple[str, str]] = {}  # hook id -> file, insertion
    wanted = {site.file for hook in hooks for site in hook.sites}
    wanted |= {path.relative_to(root).as_posix() for path in _patched_files(root)}
    _refuse_links(root, sorted(wanted))
    crlf: set[str] = set()
    for file in sorted(wanted):
        path = root / file
        if path.is_file():
            before[file] = text = _read(path)
            # Anchors are written for \n. A file with \r\n throughout is matched as if it had \n.
            if 0 < text.count("\r\n") == text.count("\n"):
                crlf.add(file)
                text = text.replace("\r\n", "\n")
            original[file], found = _strip(text, file)
            present.update({name: (file, text) for name, text in found.items()})

    states: list[HookState] = []
    places: dict[str, list[tuple[int, str]]] = {file: [] for file in original}
    for hook in hooks:
        failures = []
        for site in hook.sites:
            if site.file not in original:
                failures.append(f"{site.file} is not in this tree")
                continue
            text = original[site.file]
            position, count = _locate(site, text)
            if position is None:
                how = "not found" if count == 0 else f"found {count} times instead of once"
                mixed = " (the file's line ends are mixed, \\r\\n and \\n: git checkout restores it)" if "\r\n" in text else ""
                failures.append(f"{site.file}: anchor {how}: {site.anchor}{mixed}")
                continue
            newline = "\r\n" if "\r\n" in text else "\n"
            insertion = _insertion(hook, site, position == 0 or text[position - 1] == "\n", newline)
            places[site.file].append((position, insertion))
            known = present.get(hook.id)
            state: State = "missing" if known is None else "outdated"
            if known == (site.file, insertion):
                state = "applied"
            states.append(HookState(hook, state, site.file))
            break
        else:
            detail = "; ".join(failures)
            if hook.optional:
                states.append(HookState(hook, "skipped", hook.file, hook.optional))
            else:
                states.append(HookState(hook, "broken", hook.file, _broken(root, hook, detail)))

    after = {}
    for file, text in original.items():
        # The sort is stable: hooks at the same position keep their order.
        pieces, position = [], 0
        for start, insertion in sorted(places[file], key=lambda place: place[0]):
            pieces += [text[position:start], insertion]
            position = start
        after[file] = "".join([*pieces, text[position:]])
        if file in crlf:
            after[file], text = after[file].replace("\n", "\r\n"), text.replace("\n", "\r\n")
        if _strip(after[file], file)[0] != text:
            raise HooksFileError(f"{file}: the hooks would not come out again byte for byte: overlapping insertions?")
    return _Plan(before, after, states)


def _broken(root: Path, hook: Hook, detail: str) -> str:
    return (
        f"{root}: hook {hook.id!r} does not fit this llama.cpp: {detail}. It is needed because: {hook.why} Use a "
        f"llama.cpp that is proven (see ggml_types/README.md; `turboquant build` fetches one), or give the hook "
        f"another anchor in its hooks.toml in {native_dir() / 'ggml_types'}"
    )


# ---- public ----------------------------------------------------------------------------------------------------------


def patch(directory: str | os.PathLike[str], hooks: list[Hook] | None = None) -> list[HookState]:
    """Insert all hooks into the llama.cpp tree `directory`. Idempotent.

    Either all files change or none; `_write_all` describes the exceptions. ggml.c, which has the version of the hooks,
    and ggml.h, which defines the types' ids, are replaced last. CMake refuses a tree without them, so a partly patched
    tree cannot be built.

    Returns:
        The states of the hooks after the insertion (``applied`` or ``skipped``).

    Raises:
        NotLlamaError, AnchorError, LinkError, MarkerError, HooksFileError: the reason; no file was written.
        PatchError: a file cannot be written; see `_write_all`.
    """
    root = _root(directory)
    plan = _plan(root, load_hooks() if hooks is None else hooks)
    broken = [state for state in plan.states if state.state == "broken"]
    if broken:
        raise AnchorError("\n".join(state.detail for state in broken))
    order = sorted(plan.after, key=lambda file: _LAST.index(file) if file in _LAST else -1)
    _write_all({root / file: plan.after[file] for file in order if plan.after[file] != plan.before[file]})
    return [s if s.state == "skipped" else HookState(s.hook, "applied", s.file) for s in plan.states]


def check(directory: str | os.PathLike[str], hooks: list[Hook] | None = None) -> list[HookState]:
    """The state of every hook in the llama.cpp tree `directory`. No file is written.

    Raises:
        NotLlamaError, LinkError, MarkerError, HooksFileError.
    """
    return _plan(_root(directory), load_hooks() if hooks is None else hooks).states


def unpatch(directory: str | os.PathLike[str]) -> list[str]:
    """Remove every insertion from the llama.cpp tree `directory`, also those of other versions of this package.

    Returns:
        The files that changed, relative to `directory`.

    Raises:
        NotLlamaError, MarkerError, HooksFileError: the reason; no file was written.
        PatchError: a file cannot be written; see `_write_all`.
    """
    root = _root(directory)
    files = set(_patched_files(root))
    # Older versions wrote through links to folders, which `_patched_files` does not follow.
    sites = {root / site.file for hook in load_hooks() for site in hook.sites}
    files |= {path for path in sites - files if path.is_file() and _is_patched(path)}
    # ggml.h first: see `patch`.
    order = sorted(files, key=lambda path: (path != root / _HEADER, path))
    clean = {path: _strip(_read(path), path.relative_to(root).as_posix())[0] for path in order}
    _write_all(clean)
    return [path.relative_to(root).as_posix() for path in clean]


def cmake_args() -> list[str]:
    """The arguments that a patched tree needs when it is configured with CMake (3.19 or newer)."""
    return [f"-DCMAKE_PROJECT_ggml_INCLUDE={(native_dir() / 'ggml_types' / 'inject.cmake').as_posix()}"]
