"""File functions for the cache: atomic writes, locks, content hashes, and synchronization of trees by content."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import stat
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

__all__ = [
    "Interrupted",
    "hash_files",
    "last_lines",
    "list_files",
    "lock",
    "read_json",
    "remove_tree",
    "sync",
    "write_json",
]


class Interrupted(KeyboardInterrupt):
    """Ctrl-C during work whose partial result is not kept. The text completes "the same command ..." in the message."""


# ---- single files ----------------------------------------------------------------------------------------------------


def write_json(path: Path, value: dict[str, Any]) -> None:
    """Write `value` to `path` so that a reader sees the old file or the new one, never half of it."""
    descriptor, temporary = tempfile.mkstemp(prefix=path.name + ".", dir=path.parent)
    try:
        with os.fdopen(descriptor, "w", encoding="utf-8") as file:
            json.dump(value, file, indent=1)
            file.write("\n")
        os.chmod(temporary, 0o644)  # mkstemp's mode 0600 would exclude other users of a shared cache
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


def read_json(path: Path) -> dict[str, Any] | None:
    """The JSON object in the file `path`; None if there is no such file, or it contains no JSON object."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return value if isinstance(value, dict) else None


def last_lines(text: str, count: int = 20) -> str:
    """The last `count` non-empty lines of `text`."""
    return "\n".join([line.rstrip() for line in text.splitlines() if line.strip()][-count:])


# ---- trees -----------------------------------------------------------------------------------------------------------


def list_files(
    root: Path, skip: Callable[[str, bool], bool] = lambda path, is_dir: False, follow: bool = False
) -> Iterator[str]:
    """The regular files below `root`, sorted, as relative paths with '/'.

    Files and folders for which `skip(path, is_dir)` is true are left out. With `follow`, links to folders are treated
    as folders, except links to a folder that contains the link; without `follow` they are left out.
    """
    return _list(root, skip, follow, (os.path.realpath(root),) if follow else ())


def _list(root: Path, skip: Callable[[str, bool], bool], follow: bool, above: tuple[str, ...]) -> Iterator[str]:
    folders: list[os.DirEntry[str]] = []
    files: list[os.DirEntry[str]] = []
    with os.scandir(root) as entries:
        for entry in entries:
            (folders if entry.is_dir(follow_symlinks=follow) else files).append(entry)
    for entry in sorted(files, key=lambda entry: entry.name):
        if entry.is_file() and not skip(entry.name, False):
            yield entry.name
    for name in sorted(entry.name for entry in folders):
        if not skip(name, True):

            def skip_below(path: str, is_dir: bool, name: str = name) -> bool:
                return skip(f"{name}/{path}", is_dir)

            real = os.path.realpath(root / name) if follow else ""
            if real in above:
                continue
            for path in _list(root / name, skip_below, follow, (*above, real) if follow else ()):
                yield f"{name}/{path}"


def hash_files(root: Path, files: Iterable[str]) -> str:
    """SHA-256 over the names and the contents of `files` (relative to `root`)."""
    total = hashlib.sha256()
    for name in files:
        data = (root / name).read_bytes()
        total.update(f"{name}\0{len(data)}\0".encode("utf-8", "surrogateescape"))
        total.update(data)
    return total.hexdigest()


def sync(source: Path, files: Iterable[str], target: Path) -> int:
    """Make `target` hold exactly `files` of `source`, and return how many files had to be written or removed.

    A file whose content is the same is not written, so it keeps its time and ninja does not rebuild what depends on it.
    A written file gets the present time, because it must be newer than what was built from its predecessor.
    """
    changes = 0
    wanted = set(files)
    target.mkdir(parents=True, exist_ok=True)
    for name in sorted(wanted):
        data = (source / name).read_bytes()
        to = target / name
        if to.is_file() and not to.is_symlink() and to.read_bytes() == data:
            continue
        changes += 1
        to.parent.mkdir(parents=True, exist_ok=True)
        descriptor, temporary = tempfile.mkstemp(prefix=to.name + ".", dir=to.parent)
        try:
            with os.fdopen(descriptor, "wb") as file:
                file.write(data)
            # The user must be able to write to the copy, and scripts must stay executable.
            os.chmod(temporary, 0o644 | (stat.S_IMODE((source / name).stat().st_mode) & 0o111))
            os.replace(temporary, to)
        except BaseException:
            Path(temporary).unlink(missing_ok=True)
            raise
    for name in list(list_files(target)):
        if name not in wanted:
            changes += 1
            (target / name).unlink()
    return changes


def remove_tree(path: Path) -> None:
    """Delete a folder of the cache, if it exists."""

    def writable(function: Callable[..., object], name: str, _error: object) -> None:
        os.chmod(name, stat.S_IRWXU)  # on Windows a read-only file cannot be removed
        function(name)

    if path.is_dir() and not path.is_symlink():
        if sys.version_info >= (3, 12):
            shutil.rmtree(path, onexc=writable)
        else:
            shutil.rmtree(path, onerror=writable)


# ---- locks -----------------------------------------------------------------------------------------------------------


@contextmanager
def lock(path: Path, waiting: Callable[[], None] | None = None, block: bool = True) -> Iterator[int | None]:
    """Hold the lock file `path` (made if missing, never deleted) and yield its descriptor.

    If another process holds the lock, `waiting` is called once and the call waits; with ``block=False`` it yields None
    at once. The operating system releases the lock when the process ends, even if it is killed. A child that inherits
    the descriptor shares the lock, so a compiler that outlives its parent still excludes others from its folder.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        told = False
        while not _try_lock(descriptor):
            if not block:
                yield None
                return
            if waiting and not told:
                waiting()
                told = True
            time.sleep(0.2)
        yield descriptor
    finally:
        os.close(descriptor)


if sys.platform == "win32":
    import msvcrt

    def _try_lock(descriptor: int) -> bool:
        try:
            msvcrt.locking(descriptor, msvcrt.LK_NBLCK, 1)
        except OSError:
            return False
        return True

else:
    import fcntl

    def _try_lock(descriptor: int) -> bool:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        return True
