"""Measured results on disk, one small JSON file each, written atomically."""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from pathlib import Path
from typing import Any

__all__ = ["Results", "file_hash", "write_text"]


class Results:
    """A folder of results; a result's name is the hash of everything it depends on."""

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)

    def _path(self, key: dict[str, Any]) -> Path:
        text = json.dumps(key, sort_keys=True)
        return self.folder / f"{hashlib.sha256(text.encode()).hexdigest()[:32]}.json"

    def get(self, key: dict[str, Any]) -> Any | None:
        """The stored value, or None. A file that cannot be read counts as absent: it is measured again."""
        try:
            stored = json.loads(self._path(key).read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return None
        return stored["value"] if isinstance(stored, dict) and stored.get("key") == key else None

    def put(self, key: dict[str, Any], value: Any) -> None:
        """Store a value that JSON can hold."""
        self.folder.mkdir(parents=True, exist_ok=True)
        write_text(self._path(key), json.dumps({"key": key, "value": value}, indent=1))


def file_hash(path: Path, results: Results) -> str:
    """SHA-256 of a file; remembered by path, size and time, as a model may have many gigabytes.

    Raises:
        OSError: the file cannot be read.
    """
    status = path.stat()
    key = {"hash of": str(path.resolve()), "size": status.st_size, "mtime_ns": status.st_mtime_ns}
    if isinstance(known := results.get(key), str):
        return known
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    results.put(key, digest.hexdigest())
    return digest.hexdigest()


def write_text(path: Path, text: str) -> None:
    """Write `text` to `path` in UTF-8, so that a reader sees the old file or the new one, never half of it.

    Raises:
        OSError: its folder is missing or read-only, the disk is full; `path` is as it was.
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
