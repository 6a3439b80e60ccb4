"""Measured results on disk, each in a small JSON file that is written atomically."""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
import time
from pathlib import Path
from typing import Any

__all__ = ["Results", "file_hash", "write_text"]

_SETTLED = 3 * 10**9  # nanoseconds; file times are coarsest on FAT, where they differ by two seconds


class Results:
    """A folder of results. The name of a result is the hash of all its inputs."""

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)

    def _path(self, key: dict[str, Any]) -> Path:
        text = json.dumps(key, sort_keys=True)
        return self.folder / f"{hashlib.sha256(text.encode()).hexdigest()[:32]}.json"

    def get(self, key: dict[str, Any]) -> Any | None:
        """The stored value, or None if there is none or its file cannot be read."""
        try:
            stored = json.loads(self._path(key).read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return None
        return stored.get("value") if isinstance(stored, dict) and stored.get("key") == key else None

    def put(self, key: dict[str, Any], value: Any) -> None:
        """Store a value that JSON can represent."""
        self.folder.mkdir(parents=True, exist_ok=True)
        write_text(self._path(key), json.dumps({"key": key, "value": value}, indent=1))


def file_hash(path: Path, results: Results) -> str:
    """SHA-256 of a file. It is stored with the file's attributes, because hashing a model of many gigabytes takes long.

    The time of the last change of the inode (ctime) cannot be set back, unlike that of the content, and another file of
    the same name has another inode. A file that changed a moment ago may change again without a change of its time, so
    its hash is not stored.

    Raises:
        OSError: the file cannot be read.
    """
    key = _identity(path)
    if isinstance(known := results.get(key), str):
        return known
    started = time.time_ns()
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    settled = all(abs(started - key[time]) > _SETTLED for time in ("mtime_ns", "ctime_ns"))
    if settled and _identity(path) == key:
        results.put(key, digest.hexdigest())
    return digest.hexdigest()


def _identity(path: Path) -> dict[str, Any]:
    status = path.stat()
    return {
        "hash of": str(path.resolve()), "inode": status.st_ino, "size": status.st_size,
        "mtime_ns": status.st_mtime_ns, "ctime_ns": status.st_ctime_ns,
    }  # fmt: skip


def write_text(path: Path, text: str) -> None:
    """Write `text` to `path` in UTF-8, so that a reader sees the old file or the new one, never half of it.

    Raises:
        OSError: the folder is missing or read-only, or the disk is full; `path` is unchanged.
    """
    handle, partial = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.write(text)
        os.chmod(partial, 0o666 & ~_umask())
        os.replace(partial, path)
    except BaseException:
        Path(partial).unlink(missing_ok=True)
        raise


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
