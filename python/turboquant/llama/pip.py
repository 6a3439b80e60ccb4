"""Download one file with pip, from wherever the user's pip is set up to download from."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from .files import Interrupted
from .progress import Reporter

__all__ = ["download", "is_installed"]


def is_installed() -> bool:
    """Whether this Python has pip."""
    return importlib.util.find_spec("pip") is not None


def download(
    requirement: str,
    options: Sequence[str],
    folder: Path,
    pattern: str,
    reporter: Reporter,
    label: str,
    size: int | None,
    path: str | None = None,
    sha256: str | None = None,
) -> tuple[Path | None, str]:
    """Run `pip download --no-deps` for `requirement`, with progress.

    Args:
        requirement: "name==version".
        options: further ones for pip.
        folder: gets the file, and all that pip writes on the way; made here. It is the caller's to remove.
        pattern: of the file's name, such as "*.whl".
        label, size: what the progress bar shows; the size in bytes, if it is known.
        path: the PATH that pip runs with.
        sha256: what the file must have. pip looks at it before it runs anything that is in the file.

    Returns:
        The file, None if pip failed; and what pip printed.

    Raises:
        Interrupted: what pip has of the file so far is lost.
    """
    temporary = folder / "tmp"
    temporary.mkdir(parents=True)
    command = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--no-input", "download", "--no-deps"]
    command += [*options, "--progress-bar", "off", "--dest", str(folder)]
    if sha256:
        listed = folder / "requirements.txt"
        listed.write_text(f"{requirement} --hash=sha256:{sha256}\n", encoding="utf-8")
        command += ["--require-hashes", "-r", str(listed)]
    else:
        command.append(requirement)
    # pip's temporary files go where ours are: the same disk, seen by the progress bar, and removed with the rest.
    env = dict(os.environ, TMPDIR=str(temporary), TEMP=str(temporary), TMP=str(temporary))
    if path:
        env["PATH"] = path
    with (folder / "pip.log").open("w+", encoding="utf-8", errors="replace") as log:
        with reporter.track(label, size, "bytes") as track:
            process = subprocess.Popen(command, env=env, stdin=subprocess.DEVNULL, stdout=log, stderr=log)
            done = 0  # never less than before: in the end pip moves the file away
            try:
                while process.poll() is None:
                    time.sleep(0.1)
                    track.update(done := max(done, _downloaded(temporary, pattern)))
            except BaseException as error:
                process.terminate()
                process.wait()
                if isinstance(error, KeyboardInterrupt):
                    raise Interrupted("begins the download again") from error
                raise
        log.seek(0)
        output = log.read()
    files = sorted(folder.glob(pattern))
    return (files[0] if process.returncode == 0 and len(files) == 1 else None), output


def _downloaded(temporary: Path, pattern: str) -> int:
    """Bytes that pip has of the file so far; 0 if that cannot be told."""
    try:
        return max((file.stat().st_size for file in temporary.glob(f"pip-*/{pattern}")), default=0)
    except OSError:  # pip moves and removes files at any moment
        return 0
