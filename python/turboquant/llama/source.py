"""The sources of llama.cpp: a folder of the user, or the copy inside a llama-cpp-python release.

llama-cpp-python's source package contains a complete llama.cpp, and pip downloads it from the configured package index.
Only ``vendor/llama.cpp`` of the archive is unpacked, without the folders that no build needs.
"""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from ..errors import TurboQuantError
from . import pip
from .files import hash_files, last_lines, list_files, lock, read_json, remove_tree, write_json
from .paths import cache_dir
from .progress import Reporter

__all__ = ["DEFAULT_VERSION", "PROVEN", "Archive", "Source", "SourceError", "UnprovenError", "cached", "fetch", "local"]

DEFAULT_VERSION = "0.3.36"


@dataclass(frozen=True)
class Archive:
    """The source package of one llama-cpp-python release."""

    sha256: str
    size: int  # bytes


# The releases that the hooks are tested with.
PROVEN: dict[str, Archive] = {
    "0.3.30": Archive("798c9b42652d2e0bff5fe81e7e762089f425a99e67f66ffe5ae156957876e0d1", 70191382),
    "0.3.33": Archive("369ba03d02caaef42c1ed07bbdc454f7436e47c7675b8b9757fa13fbac6acd92", 70533021),
    "0.3.35": Archive("1139dbb54509074b70893fab8554e3b079aa9f4d312058ce4018ef0019e3de12", 74868054),
    "0.3.36": Archive("832db0699007f1be95a7e41ef12e88926b02ba836461e36a36372db2760c1a2e", 76589250),
}

# Folders at the top of llama.cpp that no build reads: half of its 180 MB. (tests/, examples/, scripts/ and licenses/
# are read by CMake and stay.)
UNNEEDED = {"benches", "ci", "conversion", "docs", "gguf-py", "media", "models", "requirements", "skills"}
# Increased when the rule above changes, so that trees unpacked by the older rule are not reused.
_LAYOUT = 1
_MAX_FILES, _MAX_BYTES = 50_000, 2 << 30  # far above llama.cpp's size, to limit malicious archives

# A llama.cpp tree has these files.
_ESSENTIAL = (
    "CMakeLists.txt",
    "common/arg.cpp",
    "ggml/CMakeLists.txt",
    "ggml/include/ggml.h",
    "ggml/src/ggml-cpu/ggml-cpu.c",
    "include/llama.h",
    "src/llama-context.cpp",
    "tools/CMakeLists.txt",
)


class SourceError(TurboQuantError):
    """The sources of llama.cpp could not be obtained."""


class UnprovenError(SourceError):
    """The release is not in `PROVEN`, and `unproven` was not given."""


class _CorruptError(Exception):
    """pip downloaded a file with another checksum than the known one. The text names it."""


@dataclass(frozen=True)
class Source:
    """A llama.cpp source tree, which is read and never written.

    ``name`` is for messages and ``slug`` for folder names. ``identity`` distinguishes two sources independently of
    their present content. ``digest`` is a hash of the content. ``commit`` and ``number`` are the version that built
    programs print.
    """

    root: Path
    name: str
    slug: str
    identity: str
    digest: str
    commit: str = "unknown"
    number: int = 0

    def files(self) -> Iterator[str]:
        """The files a build needs, as sorted relative paths. Links to folders are followed.

        Raises:
            SourceError: there are far more files than llama.cpp has.
        """
        return _files(self.root)


def _files(root: Path) -> Iterator[str]:
    for count, file in enumerate(list_files(root, lambda path, is_dir: _skip(root, path, is_dir), follow=True)):
        if count >= _MAX_FILES:
            raise SourceError(f"{root} has more than {_MAX_FILES} files in it; does a link lead out of the tree?")
        yield file


def _skip(root: Path, path: str, is_dir: bool) -> bool:
    name = path.rpartition("/")[2]
    if not is_dir:
        return name.endswith((".gguf", ".o", ".a", ".so", ".dylib", ".pyc", ".orig", ".rej")) or name == ".git"
    if path == name and (name in UNNEEDED or name.startswith((".", "build"))):
        return True
    # A checkout may contain build folders with any names.
    return name in {"node_modules", "__pycache__", ".git"} or (root / path / "CMakeCache.txt").is_file()


# ---- a folder of the user's ------------------------------------------------------------------------------------------


def local(directory: str | os.PathLike[str]) -> Source:
    """The llama.cpp checkout `directory`.

    Raises:
        SourceError: there is no such folder, or it lacks files of llama.cpp (the text names them).
    """
    root = Path(directory).expanduser().resolve()
    if not root.is_dir():
        raise SourceError(f"{root}: no such folder")
    missing = [file for file in _ESSENTIAL if not (root / file).is_file()]
    if missing:
        inner = root / "vendor" / "llama.cpp"
        hint = f"; did you mean {inner}?" if (inner / "ggml/include/ggml.h").is_file() else ""
        raise SourceError(f"{root} is no llama.cpp source tree: it lacks {', '.join(missing)}{hint}")
    digest = hash_files(root, _files(root))
    commit, number = _git_version(root)
    slug = re.sub(r"[^A-Za-z0-9._-]+", "-", root.name).strip("-.") or "llama.cpp"
    return Source(root, str(root), slug, f"folder:{root}", digest, commit, number)


def _git_version(root: Path) -> tuple[str, int]:
    """Commit and number of commits of a git checkout; ("unknown", 0) if `root` is not the root of one."""

    def git(*args: str) -> str:
        done = subprocess.run(["git", "-C", str(root), *args], capture_output=True, text=True)
        return done.stdout.strip() if done.returncode == 0 else ""

    if not shutil.which("git"):
        return "unknown", 0
    top = git("rev-parse", "--show-toplevel")
    if not top or Path(top).resolve() != root:
        return "unknown", 0
    count = git("rev-list", "--count", "HEAD")
    return git("rev-parse", "--short", "HEAD") or "unknown", int(count) if count.isdigit() else 0


# ---- a release of llama-cpp-python -----------------------------------------------------------------------------------


def fetch(
    version: str = DEFAULT_VERSION, reporter: Reporter | None = None, path: str | None = None, unproven: bool = False
) -> Source:
    """The llama.cpp inside llama-cpp-python `version`, from the cache or, the first time, through pip.

    Args:
        version: such as "0.3.36". Releases in `PROVEN` are checked against a known checksum before code of them runs.
        reporter: receives the progress.
        path: the PATH that pip runs with; with cmake and ninja in it, pip does not download its own.
        unproven: also fetch other releases. Their build code runs on this machine, and their authenticity is not
            checked.

    Raises:
        UnprovenError: the release is not in `PROVEN`, and `unproven` is false.
        SourceError: the version is invalid, pip or the network is missing, the download is corrupt twice, or the
            archive contains no llama.cpp.
    """
    found = cached(version)
    if found:
        return found
    reporter = reporter or Reporter()
    if version not in PROVEN and not unproven:
        raise UnprovenError(
            f"llama-cpp-python {version} is not one of the releases that the hooks are proven with "
            f"({', '.join(PROVEN)}), so its checksum is not known here, and pip would run its build code unchecked. "
            "Give --unproven if you trust where your pip fetches from, or a llama.cpp checkout with --source DIR"
        )
    folder = cache_dir() / "sources"
    target = _folder(version)

    def waiting() -> None:
        reporter.say(f"another process is fetching llama-cpp-python {version}; waiting for it")

    with lock(cache_dir() / "locks" / f"source-{version}.lock", waiting):
        found = cached(version)  # another process fetched it while this one waited for the lock
        if found:
            return found
        folder.mkdir(parents=True, exist_ok=True)
        for leftover in folder.glob(f".{version}.*"):  # left by a run that was killed
            remove_tree(leftover)
        with tempfile.TemporaryDirectory(prefix=f".{version}.", dir=folder) as temporary:
            work = Path(temporary)
            archive, sha256 = _download(version, work, reporter, path)
            tree = work / "llama.cpp"
            with reporter.track("unpacking llama.cpp", archive.stat().st_size, "bytes") as track:
                commit = _unpack(archive, tree, track.update)
            record = {"layout": _LAYOUT, "version": version, "sha256": sha256, "commit": commit}
            write_json(work / "source.json", record)
            archive.unlink()
            remove_tree(target)  # with an older layout
            ready = work / "ready"
            ready.mkdir()
            os.replace(tree, ready / "llama.cpp")
            os.replace(work / "source.json", ready / "source.json")
            os.replace(ready, target)
    found = cached(version)
    if not found:
        raise SourceError(f"{target}: the tree that was just unpacked there is gone; is something cleaning the cache?")
    return found


def cached(version: str = DEFAULT_VERSION) -> Source | None:
    """The result of `fetch` if nothing has to be downloaded, else None.

    Raises:
        SourceError: `version` is no valid version.
    """
    target = _folder(version)
    record = read_json(target / "source.json")
    if not record or record.get("layout") != _LAYOUT or record.get("version") != version:
        return None
    root = target / "llama.cpp"
    if not all((root / file).is_file() for file in _ESSENTIAL):
        return None  # files of the cached tree were deleted
    sha256, commit = str(record.get("sha256")), str(record.get("commit"))
    return Source(
        root=root,
        name=f"llama.cpp of llama-cpp-python {version}",
        slug=f"llama.cpp-{version}",
        identity=f"llama-cpp-python:{version}:{sha256}",
        digest=f"{sha256}:{_LAYOUT}",
        commit=commit[:9],
    )


def _folder(version: str) -> Path:
    if not re.fullmatch(r"\d+(\.\d+)+([a-z]+\d+)?(\.post\d+)?", version):
        raise SourceError(f"{version!r} is no version of llama-cpp-python; give one such as {DEFAULT_VERSION}")
    return cache_dir() / "sources" / f"llama-cpp-python-{version}"


def _download(version: str, work: Path, reporter: Reporter, path: str | None) -> tuple[Path, str]:
    """Download the archive into `work`; returns it and its SHA-256. If it is corrupt, it is downloaded once more."""
    if not pip.is_installed():
        raise SourceError(
            f"pip is not installed for {sys.executable}, so llama-cpp-python {version} cannot be fetched; run "
            f"`{sys.executable} -m ensurepip`, or give a llama.cpp checkout with --source DIR"
        )
    known = PROVEN.get(version)
    for attempt in (1, 2):
        try:
            archive = _pip_download(version, work / f"download{attempt}", reporter, path, fresh=attempt > 1)
            problem, sha256 = _verify(archive, known)
        except _CorruptError as error:
            problem = str(error)
        if not problem:
            if known is None:
                reporter.say(
                    f"note: llama-cpp-python {version} is not one of the releases the hooks are proven with "
                    f"({', '.join(PROVEN)}): what was fetched, and the build code in it that pip ran, was compared with "
                    f"no checksum (it has sha256 {sha256})"
                )
            return archive, sha256
        if attempt == 1:
            reporter.say(f"llama-cpp-python {version} is corrupt ({problem}); fetching it again")
    raise SourceError(
        f"llama-cpp-python {version} is corrupt, twice ({problem}); does a proxy or a mirror change it? "
        f"Give a llama.cpp checkout with --source DIR instead"
    )


def _verify(archive: Path, known: Archive | None) -> tuple[str, str]:
    """What is wrong with `archive` ("" if it is intact), and its SHA-256."""
    digest = hashlib.sha256()
    with archive.open("rb") as file:
        for chunk in iter(lambda: file.read(1 << 20), b""):
            digest.update(chunk)
    sha256, size = digest.hexdigest(), archive.stat().st_size
    if known and sha256 != known.sha256:
        return f"{size} bytes with sha256 {sha256}, expected {known.size} bytes with {known.sha256}", sha256
    if not known:
        try:
            with tarfile.open(archive, "r:gz") as tar:
                for _ in tar:
                    pass
        except (tarfile.TarError, EOFError, OSError) as error:
            return f"not a readable tar.gz: {error}", sha256
    return "", sha256


def _pip_download(version: str, folder: Path, reporter: Reporter, path: str | None, fresh: bool) -> Path:
    """Fetch the source package with pip into `folder`.

    After the download pip always prepares the package's metadata, which runs the package's build backend. Therefore pip
    has to compare the checksum itself before that.

    Raises:
        _CorruptError: the checksum differs.
        SourceError: pip failed.
    """
    options = ["--no-binary", "llama-cpp-python", *["--no-cache-dir"] * fresh]
    known = PROVEN.get(version)
    archive, output = pip.download(
        f"llama-cpp-python=={version}", options, folder, "*.tar.gz", reporter,
        f"fetching llama-cpp-python {version}", known.size if known else None, path,
        known.sha256 if known else None,
    )  # fmt: skip
    if archive:
        return archive
    if known and "DO NOT MATCH THE HASHES" in output:
        got = re.search(r"Got\s+([0-9a-f]{64})", output)
        raise _CorruptError(f"sha256 {got[1] if got else 'unknown'}, expected {known.sha256}")
    raise SourceError(
        f"pip could not fetch llama-cpp-python {version}:\n{last_lines(output, 12)}\n"
        f"Is this machine offline, or the version misspelt? With a llama.cpp checkout at hand, "
        f"`turboquant build --source DIR` needs no download."
    )


def _unpack(archive: Path, target: Path, progress: Callable[[int], None]) -> str:
    """Write vendor/llama.cpp of `archive` to `target`; returns the commit that the archive names, or "unknown".

    Only regular files are written, and each path is built from checked parts, so no file can be written outside
    `target`.
    """
    commit, count, size = "unknown", 0, 0
    seen: set[str] = set()
    with archive.open("rb") as raw, tarfile.open(fileobj=raw, mode="r|gz") as tar:
        for member in tar:
            parts = PurePosixPath(member.name).parts
            if parts[1:] == (".git", "modules", "vendor", "llama.cpp", "HEAD") and member.isreg():
                text = _content(tar, member)[:200].decode("ascii", "replace").strip()
                commit = text if re.fullmatch(r"[0-9a-f]{40}", text) else commit
            if parts[1:3] != ("vendor", "llama.cpp") or not member.isreg():
                continue
            inner = parts[3:]
            if any(part == ".." or set(part) & set("/\\:\0") for part in parts):
                raise SourceError(f"{archive.name} has a file outside of its folder ({member.name!r}); not unpacked")
            if not inner or inner[0] in UNNEEDED or inner[0].startswith("."):
                continue
            count, size = count + 1, size + member.size
            if count > _MAX_FILES or size > _MAX_BYTES:
                raise SourceError(f"{archive.name}: more than {_MAX_FILES} files or {_MAX_BYTES >> 20} MiB in it")
            file = target.joinpath(*inner)
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_bytes(_content(tar, member))
            if member.mode & 0o100:
                file.chmod(0o755)
            seen.add("/".join(inner))
            progress(raw.tell())
    missing = [file for file in _ESSENTIAL if file not in seen]
    if missing:
        raise SourceError(f"{archive.name}: no llama.cpp in its vendor/llama.cpp: it lacks {', '.join(missing)}")
    return commit


def _content(tar: tarfile.TarFile, member: tarfile.TarInfo) -> bytes:
    file = tar.extractfile(member)
    assert file is not None  # a regular file
    return file.read()
