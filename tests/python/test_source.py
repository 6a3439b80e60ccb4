"""The sources of llama.cpp, fetched from a folder of fake source packages without a network."""

from __future__ import annotations

import hashlib
import io
import os
import shutil
import sys
import tarfile
from pathlib import Path

import pytest
from fake_llama import BACKEND, COMMIT, FILES, make_sdist, make_tree, write
from rich.console import Console
from turboquant import cli
from turboquant.llama import source
from turboquant.llama.files import hash_files, list_files, sync
from turboquant.llama.progress import Reporter
from typer.testing import CliRunner

pytest.importorskip("pip")
VERSION = "9.9.9"


@pytest.fixture
def index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of packages, a fast replacement of pip, and a separate cache."""
    folder = tmp_path / "index"
    folder.mkdir()
    monkeypatch.setenv("TURBOQUANT_CACHE", str(tmp_path / "cache"))

    def copy(version: str, to: Path, reporter: Reporter, path: str | None, fresh: bool) -> Path:
        to.mkdir()
        return Path(shutil.copy(folder / f"llama_cpp_python-{version}.tar.gz", to))

    monkeypatch.setattr(source, "_pip_download", copy)
    return folder


@pytest.fixture
def pip_index(index: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """As `index`, with the real pip."""
    monkeypatch.undo()
    monkeypatch.setenv("TURBOQUANT_CACHE", str(index.parent / "cache"))
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(index))
    return index


@pytest.fixture
def said() -> io.StringIO:
    return io.StringIO()


@pytest.fixture
def reporter(said: io.StringIO) -> Reporter:
    return Reporter(Console(file=said, width=200))


def known(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Pin the checksum of a fake archive."""
    data = path.read_bytes()
    archive = source.Archive(hashlib.sha256(data).hexdigest(), len(data))
    monkeypatch.setitem(source.PROVEN, VERSION, archive)


def contents(root: Path) -> dict[str, str]:
    return {name: (root / name).read_text() for name in list_files(root)}


def test_fetch_unpacks_llama_without_what_no_build_needs(index, reporter, said):
    make_sdist(index, VERSION)
    tree = source.fetch(VERSION, reporter, unproven=True)
    assert contents(tree.root) == FILES
    assert tree.commit == COMMIT[:9]
    assert os.access(tree.root / "scripts/tool.sh", os.X_OK)
    assert not os.access(tree.root / "CMakeLists.txt", os.X_OK)
    assert "was compared with no checksum" in said.getvalue()  # of an unknown version the user is told
    assert [path.name for path in tree.root.parent.parent.iterdir()] == [f"llama-cpp-python-{VERSION}"]


def test_with_pip_itself(pip_index, reporter, said, monkeypatch):
    with pytest.raises(source.SourceError, match="(?s)No matching distribution.*--source DIR"):
        source.fetch(VERSION, reporter, unproven=True)
    known(make_sdist(pip_index, VERSION), monkeypatch)
    first = source.fetch(VERSION, reporter)
    assert contents(first.root) == FILES
    assert "not one of the releases" not in said.getvalue()
    monkeypatch.setattr(source, "_pip_download", lambda *args, **kwargs: pytest.fail("fetched again"))
    assert source.fetch(VERSION, reporter) == first == source.cached(VERSION)


def test_nothing_of_a_replaced_package_is_run(pip_index, reporter, said, tmp_path, monkeypatch):
    """pip compares the checksum before the build backend, which would leave a trace, runs."""
    trace = tmp_path / "trace"
    known(make_sdist(pip_index, VERSION), monkeypatch)
    leave = f"import pathlib; pathlib.Path({str(trace)!r}).touch()\n"
    make_sdist(pip_index, VERSION, {f"llama_cpp_python-{VERSION}/backend.py": leave + BACKEND.replace("{version}", VERSION)})
    with pytest.raises(source.SourceError, match=f"corrupt, twice .sha256 [0-9a-f]{{64}}, expected {source.PROVEN[VERSION].sha256}"):
        source.fetch(VERSION, reporter)
    assert not trace.exists() and source.cached(VERSION) is None
    assert "is corrupt (sha256 " in said.getvalue() and "fetching it again" in said.getvalue()
    monkeypatch.delitem(source.PROVEN, VERSION)
    source.fetch(VERSION, reporter, unproven=True)
    assert trace.exists()  # so the trace would have shown


def test_unproven_releases_need_a_word(index, reporter, monkeypatch):
    make_sdist(index, VERSION)
    real = source._pip_download
    monkeypatch.setattr(source, "_pip_download", lambda *args, **kwargs: pytest.fail("fetched"))
    with pytest.raises(source.UnprovenError, match="0.3.36.*pip would run its build code unchecked. Give --unproven"):
        source.fetch(VERSION, reporter)
    monkeypatch.setattr(source, "_pip_download", real)
    tree = source.fetch(VERSION, reporter, unproven=True)
    assert source.fetch(VERSION, reporter) == tree  # it is already cached


@pytest.mark.parametrize(("terminal", "answer", "code"), [(False, "", 1), (True, "n\n", 1), (True, "\n", 1), (True, "y\n", 0)])
def test_the_command_asks_on_a_terminal(index, tmp_path, monkeypatch, terminal, answer, code):
    asked = []

    def build(*args, unproven, **options):
        asked.append(unproven)
        if not unproven:
            raise source.UnprovenError("nothing of it was checked")
        return tmp_path

    monkeypatch.setattr("turboquant.llama.build.build", build)
    stdin = io.StringIO(answer)
    stdin.isatty = lambda: terminal
    stderr = io.StringIO()
    stderr.isatty = lambda: terminal
    runner = CliRunner()
    with monkeypatch.context() as patch, runner.isolation():
        patch.setattr(sys, "stdin", stdin)
        patch.setattr(sys, "stderr", stderr)
        with pytest.raises(SystemExit) as ended:
            cli.app(["build", "--version", VERSION])
        sys.stdout.flush()
        printed = sys.stdout.buffer.getvalue().decode()
    assert ended.value.code == code and "nothing of it was checked" in stderr.getvalue()
    assert printed == (f"{tmp_path}\n" if code == 0 else "")
    assert ("[y/N]" in stderr.getvalue()) == terminal
    assert asked == ([False, True] if code == 0 else [False])
    assert CliRunner().invoke(cli.app, ["build", "--version", VERSION, "--unproven"]).exit_code == 0
    assert asked[-1]


def test_damaged_cache_is_fetched_again(index, reporter, monkeypatch):
    known(make_sdist(index, VERSION), monkeypatch)
    tree = source.fetch(VERSION, reporter)
    (tree.root / "ggml/include/ggml.h").unlink()
    assert source.cached(VERSION) is None
    assert contents(source.fetch(VERSION, reporter).root) == FILES


@pytest.mark.parametrize("bad_times", [0, 1, 2])
def test_corrupt_download_is_fetched_once_more(index, reporter, said, monkeypatch, bad_times):
    known(make_sdist(index, VERSION), monkeypatch)
    real, calls = source._pip_download, []

    def flaky(*args, **kwargs):
        archive = real(*args, **kwargs)
        calls.append(kwargs["fresh"])
        if len(calls) <= bad_times:
            archive.write_bytes(archive.read_bytes()[:-100])
        return archive

    monkeypatch.setattr(source, "_pip_download", flaky)
    if bad_times < 2:
        assert contents(source.fetch(VERSION, reporter).root) == FILES
    else:
        with pytest.raises(source.SourceError, match="corrupt, twice"):
            source.fetch(VERSION, reporter)
        assert source.cached(VERSION) is None
    assert calls == [False, True][: bad_times + 1]  # the second time past pip's cache
    assert ("is corrupt" in said.getvalue()) == (bad_times > 0)


def test_truncated_archive_of_an_unknown_version_is_noticed(index, reporter, monkeypatch):
    make_sdist(index, VERSION)
    real = source._pip_download

    def truncated(*args, **kwargs):
        archive = real(*args, **kwargs)
        archive.write_bytes(archive.read_bytes()[: archive.stat().st_size // 2])
        return archive

    monkeypatch.setattr(source, "_pip_download", truncated)
    with pytest.raises(source.SourceError, match="not a readable tar.gz"):
        source.fetch(VERSION, reporter, unproven=True)


@pytest.mark.parametrize("where", ["vendor/llama.cpp/../../../evil.txt", "vendor/llama.cpp/src/../../../../evil.txt"])
def test_archive_cannot_write_outside(tmp_path, where):
    archive = make_sdist(tmp_path / "index", VERSION, {f"llama_cpp_python-{VERSION}/{where}": "gotcha"})
    target = tmp_path / "a" / "b" / "tree"
    with pytest.raises(source.SourceError, match="outside of its folder"):
        source._unpack(archive, target, lambda done: None)
    assert not list(tmp_path.rglob("evil.txt"))


def test_links_in_an_archive_are_not_made(tmp_path):
    plain = make_sdist(tmp_path / "index", VERSION)
    archive = tmp_path / "linked.tar.gz"
    with tarfile.open(plain) as old, tarfile.open(archive, "w:gz") as new:
        link = tarfile.TarInfo(f"llama_cpp_python-{VERSION}/vendor/llama.cpp/src")
        link.type, link.linkname = tarfile.SYMTYPE, str(tmp_path / "outside")
        new.addfile(link)
        for member in old:
            new.addfile(member, old.extractfile(member))
    source._unpack(archive, tmp_path / "tree", lambda done: None)
    assert contents(tmp_path / "tree") == FILES
    assert not (tmp_path / "outside").exists()


def test_archive_without_llama_names_what_is_missing(tmp_path):
    archive = make_sdist(tmp_path / "index", VERSION)
    stripped = tmp_path / "stripped.tar.gz"
    with tarfile.open(archive) as old, tarfile.open(stripped, "w:gz") as new:
        for member in old:
            if not member.name.endswith("common/arg.cpp"):
                new.addfile(member, old.extractfile(member))
    with pytest.raises(source.SourceError, match="lacks common/arg.cpp$"):
        source._unpack(stripped, tmp_path / "tree", lambda done: None)


@pytest.mark.parametrize("version", ["", "latest", "0.3.36; rm", "--help", "../1.0", "0.3.36 "])
def test_version_must_look_like_one(version):
    with pytest.raises(source.SourceError, match="is no version"):
        source.fetch(version)


def test_missing_pip_is_told(index, reporter, monkeypatch):
    monkeypatch.setattr(source.pip, "is_installed", lambda: False)
    with pytest.raises(source.SourceError, match="ensurepip.*--source DIR"):
        source.fetch("0.3.36", reporter)


def test_leftovers_of_a_killed_run_are_removed(index, reporter, tmp_path, monkeypatch):
    leftover = write(tmp_path / "cache" / "sources" / f".{VERSION}.abc", {"llama.cpp/half.c": "x"})
    known(make_sdist(index, VERSION), monkeypatch)
    source.fetch(VERSION, reporter)
    assert not leftover.exists()


def test_local_tree(tmp_path):
    root = make_tree(tmp_path / "my llama")
    write(root, {"build-it/CMakeCache.txt": "", "out/CMakeCache.txt": "", "out/x.cpp": "", "src/a.o": "object"})
    tree = source.local(root)
    assert list(tree.files()) == sorted(FILES, key=lambda name: (name.count("/") > 0, name))
    assert tree.slug == "my-llama"
    write(root, {"docs/more.md": "unread"})
    assert source.local(root).digest == tree.digest
    write(root, {"src/more.cpp": "read"})
    assert source.local(root).digest != tree.digest


def test_links_to_folders_are_part_of_a_local_tree(tmp_path):
    """A ggml folder that is a link, as when several trees share it, is copied, and its changes are noticed."""
    root = make_tree(tmp_path / "llama")
    plain = source.local(root)
    shutil.move(root / "ggml", tmp_path / "ggml")
    (root / "ggml").symlink_to(tmp_path / "ggml", target_is_directory=True)
    (root / "src/back").symlink_to(root, target_is_directory=True)  # a link to its own folder
    (root / "src/nowhere").symlink_to(tmp_path / "gone")
    tree = source.local(root)
    assert tree.digest == plain.digest and list(tree.files()) == list(plain.files())
    assert sync(tree.root, tree.files(), tmp_path / "copy") == len(FILES)
    assert contents(tmp_path / "copy") == FILES and not (tmp_path / "copy/ggml").is_symlink()
    write(tmp_path, {"ggml/include/ggml.h": "enum ggml_type { GGML_TYPE_COUNT = 601 };\n"})
    assert source.local(root).digest != tree.digest


def test_a_link_out_of_the_tree_has_an_end(tmp_path, monkeypatch):
    root = make_tree(tmp_path / "llama")
    write(tmp_path, {f"much/{number}.c": "" for number in range(20)})
    (root / "src/much").symlink_to(tmp_path / "much", target_is_directory=True)
    monkeypatch.setattr(source, "_MAX_FILES", 20)
    with pytest.raises(source.SourceError, match="more than 20 files in it; does a link lead out of the tree"):
        source.local(root)


def test_local_tree_that_is_no_llama_names_what_it_lacks(tmp_path):
    root = make_tree(tmp_path / "tree")
    (root / "common/arg.cpp").unlink()
    (root / "tools/CMakeLists.txt").unlink()
    with pytest.raises(source.SourceError, match=r"lacks common/arg\.cpp, tools/CMakeLists\.txt$"):
        source.local(root)
    with pytest.raises(source.SourceError, match="no such folder"):
        source.local(tmp_path / "nowhere")
    make_tree(tmp_path / "outer" / "vendor" / "llama.cpp")
    with pytest.raises(source.SourceError, match="did you mean .*vendor.llama.cpp"):
        source.local(tmp_path / "outer")


def test_sync_touches_only_what_changed(tmp_path):
    old = write(tmp_path / "source", {"a.c": "1", "b/c.c": "2", "b/d.c": "3"})
    to = tmp_path / "target"
    assert sync(old, list_files(old), to) == 3
    for name in ("a.c", "b/c.c"):
        os.utime(to / name, (1, 1))
    write(old, {"b/c.c": "changed", "e.c": "new"})
    (old / "b/d.c").unlink()
    assert sync(old, list_files(old), to) == 3
    assert contents(to) == {"a.c": "1", "b/c.c": "changed", "e.c": "new"}
    assert (to / "a.c").stat().st_mtime == 1
    assert (to / "b/c.c").stat().st_mtime > 1
    assert sync(old, list_files(old), to) == 0


def test_hash_sees_names_and_borders(tmp_path):
    trees = [{"a": "xy", "b": ""}, {"a": "x", "b": "y"}, {"a": "", "b": "xy"}, {"a": "xy", "c": ""}]
    roots = [write(tmp_path / str(number), files) for number, files in enumerate(trees)]
    assert len({hash_files(root, list_files(root)) for root in roots}) == len(trees)
