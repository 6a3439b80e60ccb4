"""Output files that get their name only when they are complete, and that never replace another file."""

from __future__ import annotations

import errno
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from .errors import TurboQuantError

__all__ = ["OutputError", "check_new", "explain", "partial_file", "publish"]

_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}


class OutputError(TurboQuantError):
    """A file could not be written. The text says what to do."""


def explain(target: Path, error: OSError) -> OutputError:
    """The message for a failure to write `target`."""
    what = error.strerror or str(error)
    if error.errno in _FULL:
        return OutputError(f"{target} cannot be written ({what}): make room, or give a file on another disk")
    return OutputError(f"{target} cannot be written ({what}): give a file in a folder that you may write to")


def check_new(target: Path) -> None:
    """Raise OutputError if `target` exists or its folder is not writable. Callers check before they start long work."""
    if not target.parent.is_dir():
        raise OutputError(f"{target.parent}: no such folder; make it first, or give a file in another one")
    if os.path.lexists(target):
        raise OutputError(f"{target} exists already: remove it, or give another name")
    try:
        tempfile.TemporaryFile(prefix=f".{target.name}.", dir=target.parent).close()
    except OSError as error:
        raise explain(target, error) from error


@contextmanager
def partial_file(target: Path) -> Iterator[Path]:
    """A new temporary file in the folder of `target`. If it still has its temporary name at the end, it is deleted.

    Raises:
        OutputError: the file cannot be created, or the ``with`` block raised OSError.
    """
    partial = None
    try:
        descriptor, name = tempfile.mkstemp(prefix=f".{target.name}.", suffix=".partial", dir=target.parent)
        os.close(descriptor)
        partial = Path(name)
        yield partial
    except OSError as error:
        raise explain(target, error) from error
    finally:
        if partial:
            partial.unlink(missing_ok=True)


def publish(partial: Path, target: Path) -> None:
    """Give a complete file its final name and the usual permissions.

    Raises:
        OutputError: a file of that name was created in the meantime.
        OSError: the file system failed.
    """
    partial.chmod(0o666 & ~_umask())
    try:
        os.link(partial, target)  # unlike a rename, a link cannot replace an existing file
        partial.unlink()
    except FileExistsError:
        raise OutputError(f"{target} has been made by something else in the meantime: give another name") from None
    except OSError:  # a file system without hard links
        check_new(target)
        os.rename(partial, target)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
