"""Folders for the f16 predictions, which can take gigabytes and are never kept."""

from __future__ import annotations

import platform
import re
import secrets
import shutil
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from ..llama.files import lock

__all__ = ["scratch_folder"]


@contextmanager
def scratch_folder(parent: Path) -> Iterator[Path]:
    """A folder for predictions, which is deleted at the end.

    A run that was killed leaves its folder behind, so folders of this machine that no process holds are deleted. The
    cache may be shared with other machines; their folders stay, because this machine cannot determine whether they are
    in use.
    """
    parent.mkdir(parents=True, exist_ok=True)
    prefix = f"kld-base-{re.sub(r'[^A-Za-z0-9.]', '_', platform.node())}-"
    for old in parent.glob(f"{prefix}*"):
        if old.is_dir():
            with _held(old) as held:
                if held:
                    shutil.rmtree(old, ignore_errors=True)
            if held:
                _lock_file(old).unlink(missing_ok=True)
    folder = parent / f"{prefix}{secrets.token_hex(6)}"
    try:
        with _held(folder):  # before the folder is created, so that it never exists without a lock
            folder.mkdir()
            try:
                yield folder
            finally:
                shutil.rmtree(folder, ignore_errors=True)
    finally:
        _lock_file(folder).unlink(missing_ok=True)


@contextmanager
def _held(folder: Path) -> Iterator[bool]:
    """Whether this process holds the lock of a folder; always false on a file system without locks."""
    with ExitStack() as stack:
        try:
            held = stack.enter_context(lock(_lock_file(folder), block=False)) is not None
        except OSError:
            held = False
        yield held


def _lock_file(folder: Path) -> Path:
    return folder.with_name(f"{folder.name}.lock")
