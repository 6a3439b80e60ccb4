"""Download one file with pip, from the package index that the user's pip is configured for."""

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
        options: further options for pip.
        folder: receives the file and pip's temporary files. It is created here, and the caller removes it.
        pattern: pattern of the file's name, such as "*.whl".
        label, size: label of the progress bar, and size of the file in bytes, if it is known.
        path: the PATH that pip runs with.
        sha256: the required SHA-256. pip checks it before it runs code of the file.

    Returns:
        The file, or None if pip failed; and the output of pip.

    Raises:
        Interrupted: the part of the file that pip downloaded is lost.
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
    # pip's temporary files go into this folder: they are on the same disk, the progress bar sees them, and they are
    # removed.
    env = dict(os.environ, TMPDIR=str(temporary), TEMP=str(temporary), TMP=str(temporary))
    if path:
        env["PATH"] = path
    with (folder / "pip.log").open("w+", encoding="utf-8", errors="replace") as log:
        with reporter.track(label, size, "bytes") as track:
            process = subprocess.Popen(command, env=env, stdin=subprocess.DEVNULL, stdout=log, stderr=log)
            done = 0  # never less than before, because pip moves the file at the end
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
    """Bytes of the file that pip has downloaded; 0 if unknown."""
    try:
        return max((file.stat().st_size for file in temporary.glob(f"pip-*/{pattern}")), default=0)
    except OSError:  # pip may move or remove files at any time
        return 0
