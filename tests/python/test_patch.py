"""The patch engine on small trees, and the real hooks on every llama.cpp that they are tested with."""

from __future__ import annotations

import os
import re
import shutil
import stat
import subprocess
from pathlib import Path

import pytest
import turboquant
from turboquant.llama import patch as engine
from turboquant.llama import paths, source
from turboquant.llama.progress import Reporter
from turboquant.llama.toolchain import find_tools

ROOT = Path(__file__).resolve().parents[2]

HEADER = "enum ggml_type {\n    GGML_TYPE_A = 0,\n    GGML_TYPE_COUNT   = 43,\n};\n"
CONTEXT = (
    '// first line\n#include "llama-context.h"\n#include <cstdio>\n\nint init(int a) {\n    return a;\n}\n\n'
    'static const char * names[] = {\n    "a",\n};\n'
)

HOOKS = """
[[hook]]
id = "ids"
why = "The ids."
file = "ggml/include/ggml.h"
anchor = '^    GGML_TYPE_COUNT(?=\\s*= \\d+,$)'
where = "after"
text = " = 99, GGML_TYPE_COUNT_UPSTREAM"

[[hook]]
id = "first-line"
why = "A statement."
file = "src/llama-context.cpp"
include = "glue.h"
anchor = '^int init\\(int a\\) \\{\\n'
where = "after"
text = "if (a < 0) { return 0; }"

[[hook]]
id = "table"
why = "Rows."
file = "src/llama-context.cpp"
include = "glue.h"
anchor = '^(?=\\};\\n\\Z)'
where = "before"
text = \"\"\"
    "b",
    "c",
\"\"\"
"""


@pytest.fixture
def hooks(tmp_path: Path) -> list[engine.Hook]:
    return load(tmp_path, HOOKS)


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    root = tmp_path / "llama.cpp"
    write(root, "ggml/include/ggml.h", HEADER.encode())
    write(root, "src/llama-context.cpp", CONTEXT.encode())
    write(root, "src/other.cpp", b"int untouched;\n")
    return root


def write(root: Path, name: str, data: bytes) -> Path:
    path = root / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)
    return path


def load(folder: Path, text: str) -> list[engine.Hook]:
    path = folder / "hooks.toml"
    path.write_text(text, encoding="utf-8")
    return engine.load_hooks(path)


def snapshot(root: Path) -> dict[str, bytes]:
    return {p.relative_to(root).as_posix(): p.read_bytes() for p in sorted(root.rglob("*")) if p.is_file()}


def states(root: Path, hooks: list[engine.Hook] | None = None) -> dict[str, str]:
    return {state.id: state.state for state in engine.check(root, hooks)}


# ---- the engine ------------------------------------------------------------------------------------------------------


def test_patch_inserts_where_the_hooks_say(tree, hooks):
    engine.patch(tree, hooks)
    header = (tree / "ggml/include/ggml.h").read_text()
    context = (tree / "src/llama-context.cpp").read_text()
    plain = re.sub(r"/\* turboquant:\w+ [\w-]+ \*/", "", header)
    assert re.search(r"GGML_TYPE_COUNT\s+= 99, GGML_TYPE_COUNT_UPSTREAM\s+= 43,\n", plain)
    assert (
        context.index('"glue.h"') < context.index("<cstdio>") < context.index("if (a < 0)") < context.index("return a")
    )
    assert context.count('#include "glue.h"') == 1
    assert context.index('"a"') < context.index('"b"') < context.index('"c"') < context.rindex("};")
    assert set(states(tree, hooks).values()) == {"applied"}
    assert set(states(tree, hooks)) == {"include-llama-context-cpp", "ids", "first-line", "table"}


def test_headers_are_not_included_for_one_system_alone(tree, hooks):
    windows = "#ifdef _WIN32\n#ifndef NOMINMAX\n#   define NOMINMAX\n#endif\n#include <windows.h>\n#endif\n\n"
    write(tree, "src/llama-context.cpp", (windows + CONTEXT).encode())
    engine.patch(tree, hooks)
    context = (tree / "src/llama-context.cpp").read_text()
    assert context.index('"llama-context.h"') < context.index('"glue.h"') < context.index("<cstdio>")


def test_patch_twice_is_patch_once_and_writes_nothing(tree, hooks):
    engine.patch(tree, hooks)
    once = snapshot(tree)
    times = {name: (tree / name).stat().st_mtime_ns for name in once}
    engine.patch(tree, hooks)
    assert snapshot(tree) == once
    assert {name: (tree / name).stat().st_mtime_ns for name in once} == times


@pytest.mark.parametrize(
    "change",
    [
        pytest.param(lambda data: data, id="plain"),
        pytest.param(lambda data: data.replace(b"\n", b"\r\n"), id="crlf"),
        pytest.param(lambda data: data.replace(b"first", b"fi\xe9st"), id="latin-1"),
        pytest.param(lambda data: b"\xef\xbb\xbf" + data, id="bom"),
    ],
)
def test_unpatch_restores_every_byte(tree, hooks, change):
    path = tree / "src/llama-context.cpp"
    path.write_bytes(change(path.read_bytes()))
    before = snapshot(tree)
    engine.patch(tree, hooks)
    once = snapshot(tree)
    assert once != before and set(states(tree, hooks).values()) == {"applied"}
    engine.patch(tree, hooks)
    assert snapshot(tree) == once
    assert (once["src/llama-context.cpp"].count(b"\n") == once["src/llama-context.cpp"].count(b"\r\n")) == (
        b"\r\n" in before["src/llama-context.cpp"]
    )
    assert sorted(engine.unpatch(tree)) == ["ggml/include/ggml.h", "src/llama-context.cpp"]
    assert snapshot(tree) == before
    assert engine.unpatch(tree) == []


def test_check_writes_nothing(tree, hooks):
    before = snapshot(tree)
    assert set(states(tree, hooks).values()) == {"missing"}
    assert snapshot(tree) == before


def test_a_tree_patched_by_another_version_is_brought_up_to_date(tree, hooks):
    before = snapshot(tree)
    older = HOOKS.replace("return 0;", "return 1;") + HOOKS.split("[[hook]]")[1].join(["[[hook]]", ""]).replace(
        '"ids"', '"gone"'
    ).replace("GGML_TYPE_COUNT(?=\\s*= \\d+,$)", "GGML_TYPE_A").replace('" = 99, GGML_TYPE_COUNT_UPSTREAM"', '"BC"')
    engine.patch(tree, load(tree.parent, older))
    assert "BC" in (tree / "ggml/include/ggml.h").read_text()
    assert states(tree, hooks)["first-line"] == "outdated"
    assert states(tree, hooks)["ids"] == "applied"
    engine.patch(tree, hooks)
    text = (tree / "src/llama-context.cpp").read_text() + (tree / "ggml/include/ggml.h").read_text()
    assert "return 0;" in text and "return 1;" not in text and "BC" not in text
    engine.unpatch(tree)
    assert snapshot(tree) == before


def test_a_user_edit_outside_the_brackets_survives_unpatch(tree, hooks):
    engine.patch(tree, hooks)
    path = tree / "src/llama-context.cpp"
    path.write_text(path.read_text().replace("return a;", "return a + 1;"))
    engine.unpatch(tree)
    assert path.read_text() == CONTEXT.replace("return a;", "return a + 1;")


def test_file_modes_are_kept(tree, hooks):
    path = tree / "src/llama-context.cpp"
    path.chmod(0o750)
    engine.patch(tree, hooks)
    assert stat.S_IMODE(path.stat().st_mode) == 0o750


def test_a_link_stays_a_link(tree, hooks):
    path = tree / "src/llama-context.cpp"
    elsewhere = write(tree.parent, "elsewhere.cpp", path.read_bytes())
    path.unlink()
    path.symlink_to(elsewhere)
    engine.patch(tree, hooks)
    assert path.is_symlink() and "turboquant:begin" in elsewhere.read_text()


def test_a_failed_write_says_so_and_can_be_repeated(tree, hooks, monkeypatch):
    before = snapshot(tree)
    replace, calls = os.replace, []

    def full_disk(source, target):
        calls.append(target)
        if len(calls) == 2:
            raise OSError(28, "No space left on device")
        replace(source, target)

    monkeypatch.setattr(engine.os, "replace", full_disk)
    told = "cannot be written: No space left on device; nothing was changed: run the same command again"
    with pytest.raises(engine.PatchError, match=told):
        engine.patch(tree, hooks)
    assert len(calls) == 3 and snapshot(tree) == before  # the first file is as it was, and no temporary file is left
    monkeypatch.undo()
    engine.patch(tree, hooks)
    assert set(states(tree, hooks).values()) == {"applied"}
    engine.unpatch(tree)
    assert snapshot(tree) == before


def test_room_on_the_disk_is_taken_before_anything_changes(tree, hooks, monkeypatch):
    before, write_bytes, calls = snapshot(tree), Path.write_bytes, []

    def full_disk(path, data):
        calls.append(path)
        if len(calls) == 2:
            raise OSError(28, "No space left on device")
        return write_bytes(path, data)

    monkeypatch.setattr(Path, "write_bytes", full_disk)
    monkeypatch.setattr(engine.os, "replace", lambda *names: pytest.fail("replaced"))
    with pytest.raises(engine.PatchError, match="nothing was changed"):
        engine.patch(tree, hooks)
    assert snapshot(tree) == before


def test_an_interruption_leaves_all_as_it_was(tree, hooks, monkeypatch):
    before = snapshot(tree)
    times = {name: (tree / name).stat().st_mtime_ns for name in before}
    replace, calls = os.replace, []

    def interrupted(source, target):
        calls.append(target)
        if len(calls) == 2:
            raise KeyboardInterrupt
        replace(source, target)

    monkeypatch.setattr(engine.os, "replace", interrupted)
    with pytest.raises(KeyboardInterrupt):
        engine.patch(tree, hooks)
    assert snapshot(tree) == before
    assert {name: (tree / name).stat().st_mtime_ns for name in before} == times  # nothing is compiled again for it


@pytest.mark.parametrize("action", ["patch", "unpatch"])
def test_a_killed_run_never_leaves_what_looks_patched(tree, hooks, monkeypatch, action):
    """ggml.h with the ids is patched last and unpatched first, so a partly patched tree does not compile."""
    original = snapshot(tree)
    if action == "unpatch":
        engine.patch(tree, hooks)
    replace, calls = os.replace, []

    class Killed(BaseException):
        pass

    def killed(source, target):
        if calls:
            raise Killed  # from the second on nothing happens, as in a process that is gone
        calls.append(target)
        replace(source, target)

    with monkeypatch.context() as patch:
        patch.setattr(engine.os, "replace", killed)
        patch.setattr(engine, "_put_back", lambda staged: [])
        with pytest.raises(Killed):
            engine.patch(tree, hooks) if action == "patch" else engine.unpatch(tree)
    assert "turboquant" not in (tree / "ggml/include/ggml.h").read_text()
    assert "turboquant" in (tree / "src/llama-context.cpp").read_text()
    if action == "patch":
        assert states(tree, hooks)["ids"] == "missing"
        engine.patch(tree, hooks)
        assert set(states(tree, hooks).values()) == {"applied"}
    engine.unpatch(tree)
    assert snapshot(tree) == original


def linked(tree: Path, name: str) -> Path:
    """Move a folder of the tree elsewhere, and put a link in its place."""
    elsewhere = tree.parent / "elsewhere" / name
    elsewhere.parent.mkdir(parents=True)
    shutil.move(tree / name, elsewhere)
    (tree / name).symlink_to(elsewhere, target_is_directory=True)
    return elsewhere


@pytest.mark.parametrize("name", ["ggml", "ggml/include", "src"])
def test_nothing_is_written_through_a_link_to_a_folder(tree, hooks, name):
    elsewhere = linked(tree, name)
    before = snapshot(elsewhere)
    for action in (engine.patch, engine.check):
        with pytest.raises(engine.LinkError) as caught:
            action(tree, hooks)
        assert f"{tree / name} is a link to {elsewhere}, which other trees" in str(caught.value)
        assert f"`turboquant build --source {tree}` copies the sources" in str(caught.value)
    assert snapshot(elsewhere) == before


def test_the_tree_itself_may_be_a_link(tree, hooks):
    link = tree.parent / "link"
    link.symlink_to(tree, target_is_directory=True)
    assert {state.state for state in engine.patch(link, hooks)} == {"applied"}
    assert len(engine.unpatch(link)) == 2


@pytest.mark.parametrize("name", ["ggml", "src"])
def test_unpatch_restores_what_older_versions_wrote_through_links(tree, hooks, monkeypatch, name):
    before = snapshot(tree)
    engine.patch(tree, hooks)
    linked(tree, name)
    monkeypatch.setattr(engine, "load_hooks", lambda: hooks)
    assert sorted(engine.unpatch(tree)) == ["ggml/include/ggml.h", "src/llama-context.cpp"]
    assert {file: (tree / file).read_bytes() for file in before} == before


def test_links_to_other_trees_are_left_alone(tree, hooks, tmp_path):
    """A user's example in another tree, which is patched and stays patched."""
    other = tmp_path / "other"
    shutil.copytree(tree, other)
    engine.patch(other, hooks)
    patched = snapshot(other)
    (tree / "examples").mkdir()
    (tree / "examples" / "mine").symlink_to(other / "src", target_is_directory=True)
    engine.patch(tree, hooks)
    engine.unpatch(tree)
    assert snapshot(other) == patched


def test_mixed_line_ends_are_told(tree, hooks):
    path = tree / "src/llama-context.cpp"
    path.write_bytes(path.read_bytes().replace(b"{\n", b"{\r\n"))
    with pytest.raises(engine.AnchorError, match=r"the file's line ends are mixed, \\r\\n and \\n: git checkout restores it"):
        engine.patch(tree, hooks)


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        pytest.param(CONTEXT.replace("int init(int a)", "int init(long a)"), "not found", id="nowhere"),
        pytest.param(CONTEXT + CONTEXT, "found 2 times instead of once", id="twice"),
    ],
)
def test_a_hook_that_does_not_fit_stops_before_anything_is_written(tree, hooks, text, problem):
    (tree / "src/llama-context.cpp").write_text(text)
    before = snapshot(tree)
    with pytest.raises(engine.AnchorError) as caught:
        engine.patch(tree, hooks)
    message = str(caught.value)
    for part in (
        "src/llama-context.cpp",
        hooks[2].sites[0].anchor,
        "first-line",
        problem,
        "turboquant build",
        "hooks.toml",
    ):
        assert part in message
    assert snapshot(tree) == before
    assert states(tree, hooks)["first-line"] == "broken"


def test_alternative_and_optional_places(tree):
    text = (
        HOOKS
        + """
[[hook.alternative]]
file = "src/other.cpp"
anchor = '^int untouched;\\n'

[[hook]]
id = "maybe"
why = "Nice to have."
optional = "trees before 1.0 have no such table"
file = "src/nowhere.cpp"
anchor = 'x'
where = "after"
text = "y"
"""
    )
    hooks = load(tree.parent, text)
    path = tree / "src/llama-context.cpp"
    path.write_text(path.read_text() + "// no table at the end\n")
    found = {state.id: state for state in engine.patch(tree, hooks)}
    assert (found["table"].state, found["table"].file) == ("applied", "src/other.cpp")
    assert (found["maybe"].state, found["maybe"].detail) == ("skipped", "trees before 1.0 have no such table")
    assert '"b"' in (tree / "src/other.cpp").read_text()


@pytest.mark.parametrize("damage", ["turboquant:end first-line", "turboquant:begin first-line"])
def test_damaged_brackets_are_refused(tree, hooks, damage):
    engine.patch(tree, hooks)
    path = tree / "src/llama-context.cpp"
    path.write_text(path.read_text().replace(damage, "oops"))
    before = snapshot(tree)
    for action in (engine.patch, engine.check):
        with pytest.raises(engine.MarkerError, match="src/llama-context.cpp.*by hand.*unpack the sources again"):
            action(tree, hooks)
    with pytest.raises(engine.MarkerError):
        engine.unpatch(tree)
    assert snapshot(tree) == before


def test_a_folder_that_is_no_llama_cpp_is_refused(tmp_path):
    for action in (engine.patch, engine.check, engine.unpatch):
        with pytest.raises(engine.NotLlamaError, match="no such folder"):
            action(tmp_path / "nowhere")
        with pytest.raises(engine.NotLlamaError, match=re.escape(str(tmp_path))):
            action(tmp_path)


def test_the_folder_around_llama_cpp_gets_a_hint(tmp_path, tree):
    shutil.move(tree, tmp_path / "package" / "vendor" / "llama.cpp")
    with pytest.raises(engine.NotLlamaError, match="did you mean .*vendor.llama.cpp"):
        engine.patch(tmp_path / "package")


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ('where = "after"', 'where = "beside"', "where must be 'before' or 'after'"),
        ('why = "The ids."', "", "why must be a non-empty string"),
        ('id = "table"', 'id = "ids"', "occurs twice"),
        ('id = "table"', 'id = "A table"', "must match"),
        ('id = "table"', 'id = "table"\nfiles = "x"', "unknown field 'files'"),
        ("= '^int init", "= '^int (init", "is no regex"),
        ("return 0;", "/* turboquant:end x */", "must not contain"),
        (HOOKS, "", "no \\[\\[hook\\]\\]"),
        (HOOKS, "[[hook", "hooks.toml"),
    ],
)
def test_mistakes_in_hooks_toml_are_named(tmp_path, old, new, message):
    with pytest.raises(engine.HooksFileError, match=message):
        load(tmp_path, HOOKS.replace(old, new, 1))


def test_every_error_is_a_patch_error():
    for name in engine.__all__:
        value = getattr(engine, name)
        if isinstance(value, type) and issubclass(value, Exception):
            assert issubclass(value, engine.PatchError)


def test_cmake_args_name_an_existing_file():
    (argument,) = engine.cmake_args()
    assert Path(argument.removeprefix("-DCMAKE_PROJECT_ggml_INCLUDE=")).is_file()


# ---- the hooks' version ----------------------------------------------------------------------------------------------

GGML = ROOT / "ggml_types"


def ggml_tree(root: Path) -> Path:
    """The part of a llama.cpp tree that has the ids and the version."""
    write(root, "ggml/include/ggml.h", b"enum ggml_type {\n        GGML_TYPE_COUNT   = 43,\n};\n")
    write(root, "ggml/src/ggml.c", b'#include "ggml.h"\n\nint untouched;\n')
    write(root, "ggml/CMakeLists.txt", b"cmake_minimum_required(VERSION 3.19)\nproject(ggml LANGUAGES NONE)\n")
    write(root, "src/llama-context.cpp", b"")
    return root


def versioned(glue: Path) -> list[engine.Hook]:
    hooks = engine.load_hooks(*sorted(glue.glob("*/hooks.toml")))
    return [hook for hook in hooks if hook.id in ("type-ids", "hooks-version")]


def configured(tree: Path, script: Path) -> str:
    """The error message of CMake for a project(ggml) that includes `script`; empty if there is none."""
    cmake = find_tools(Reporter()).cmake
    command = [str(cmake), "-S", str(tree / "ggml"), "-B", str(tree / "build"), f"-DCMAKE_PROJECT_ggml_INCLUDE={script}"]
    done = subprocess.run(command, check=False, capture_output=True, text=True)
    return "" if done.returncode == 0 else " ".join(done.stderr.split())


def copied_glue(folder: Path) -> Path:
    shutil.copytree(GGML, folder / "ggml_types")
    return folder / "ggml_types"


def test_a_tree_of_the_same_hooks_is_configured(tmp_path):
    tree = ggml_tree(tmp_path / "llama.cpp")
    assert "is not patched: run `turboquant patch`" in configured(tree, GGML / "check.cmake")
    engine.patch(tree, versioned(GGML))
    assert configured(tree, GGML / "check.cmake") == ""


@pytest.mark.parametrize("part", ["ggml", "cpu", "cuda", "llama", "common", "tests"])
def test_a_tree_of_other_hooks_is_refused(tmp_path, part):
    """The hooks change after an upgrade of this package, if the tree is not patched again."""
    glue = copied_glue(tmp_path)
    tree = ggml_tree(tmp_path / "llama.cpp")
    engine.patch(tree, versioned(GGML))
    hooks = glue / part / "hooks.toml"
    hooks.write_text(re.sub(r'(?m)^text = "(?!"")', 'text = "/* other */ ', hooks.read_text(), count=1))
    told = configured(tree, glue / "inject.cmake")
    assert f"{tree / 'ggml'} was patched with hooks of another version than those in {glue}" in told
    assert "run `turboquant unpatch` and `turboquant patch`" in told
    engine.patch(tree, versioned(glue))
    assert configured(tree, glue / "check.cmake") == ""


def test_the_version_and_the_ids_come_last_and_the_ids_go_first(tmp_path, monkeypatch):
    tree = ggml_tree(tmp_path / "llama.cpp")
    source = write(tree, "src/llama-model.cpp", b"int model;\n")
    written: list[str] = []
    replace = os.replace

    def noted(new, target):
        written.append(Path(target).name)
        replace(new, target)

    monkeypatch.setattr(engine.os, "replace", noted)
    site = engine.Site("src/llama-model.cpp", r"\A", "before", "int more;")
    engine.patch(tree, [*versioned(GGML), engine.Hook("more", "A hook.", (site,))])
    assert written == ["llama-model.cpp", "ggml.c", "ggml.h"] and "more" in source.read_text()
    written.clear()
    engine.unpatch(tree)
    assert written[0] == "ggml.h"


# ---- the project's hooks on real sources -----------------------------------------------------------------------------


def real_tree(version: str, target: Path) -> Path:
    """A copy of the sources in the cache; skips visibly if they are not there."""
    found = source.cached(version)
    if found is None:
        pytest.skip(f"the sources of llama-cpp-python {version} are not in {paths.cache_dir()}")
    for name in found.files():
        path = target / name
        path.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(found.root / name, path)
    return target


def test_the_hooks_are_few_and_explained():
    hooks = engine.load_hooks()
    assert all(len(hook.why) > 5 for hook in hooks)
    for hook in hooks:
        for site in hook.sites:
            families = {info.family for info in turboquant.types()}  # each has a line in the enum
            assert len(site.text.splitlines()) <= (len(families) + 3 if hook.id == "type-ids" else 3), hook.id


def test_the_enum_has_the_listed_ids():
    """ggml.h cannot include the list of formats, so its hook repeats the ids; rows of turbo-types.h name the others."""
    (hook,) = (hook for hook in engine.load_hooks() if hook.id == "type-ids")
    count, *members = re.findall(r"(\w*)\s*(?:= (\d+))?,|(\w+)\s*$", hook.sites[0].text)
    ids, value = {}, -1
    for name, given, last in members:
        value = int(given) if given else value + 1
        ids[(name or last).removeprefix("GGML_TYPE_")] = value
    assert ids.popitem()[0] == "COUNT_UPSTREAM"
    header = (ROOT / "ggml_types" / "ggml" / "turbo-types.h").read_text(encoding="utf-8")
    others = {name: int(id) for name, id in re.findall(r"^    X\((TURBO_\w+), .* (\d+)\)", header, re.M)}
    assert ids == {info.name.upper(): info.file_id for info in turboquant.types()} | others
    assert list(others.items()) == [("TURBO_Q128", 521), ("TURBO_Q64", 522), ("TURBO_Q32", 523), ("TURBO_AUTO", 524)]
    assert int(count[1]) == max(ids.values()) + 1


def test_few_files_include_private_headers_of_libllama():
    """These headers change with every version of llama.cpp; README.md says what the two files are for."""
    found = {}
    for path in sorted(path for path in GGML.rglob("*") if path.suffix in (".h", ".cpp", ".cu")):
        names = re.findall(r'#include\s*["<](?:.*/)?(llama-[\w-]+\.h)[">]', path.read_text(encoding="utf-8"))
        if names:
            found[path.relative_to(GGML).as_posix()] = names
    assert found == {
        "llama/turbo-model.cpp": ["llama-hparams.h", "llama-impl.h", "llama-model.h"],
        "llama/turbo-window.cpp": ["llama-graph.h"],
    }


@pytest.mark.parametrize("version", sorted(source.PROVEN))
def test_real_tree_with_crlf(version, tmp_path):
    """As git makes it on Windows."""
    tree = real_tree(version, tmp_path / "llama.cpp")
    for folder in ("ggml", "src", "common", "include", "tools", "tests"):
        for path in (tree / folder).rglob("*"):
            if path.suffix in (".h", ".c", ".cpp", ".cu", ".cuh", ".hpp") and b"\r" not in path.read_bytes():
                path.write_bytes(path.read_bytes().replace(b"\n", b"\r\n"))
    before = snapshot(tree)
    assert {state.state for state in engine.patch(tree)} == {"applied"}
    assert set(states(tree).values()) == {"applied"}
    engine.unpatch(tree)
    assert snapshot(tree) == before


@pytest.mark.parametrize("version", sorted(source.PROVEN))
def test_real_tree_patches_and_unpatches(version, tmp_path):
    tree = real_tree(version, tmp_path / "llama.cpp")
    before = snapshot(tree)
    assert set(states(tree).values()) == {"missing"}
    assert {state.state for state in engine.patch(tree)} == {"applied"}
    patched = snapshot(tree)
    assert set(states(tree).values()) == {"applied"}
    engine.patch(tree)
    assert snapshot(tree) == patched

    # Insertions only: every line that was there is still there, in its order, perhaps with something in it.
    for name, data in patched.items():
        if data != before[name]:
            inserted = rb"/\* turboquant:begin ([a-z0-9-]+) \*/.*?/\* turboquant:end \1 \*/"
            stripped = re.sub(inserted, b"", data, flags=re.DOTALL)
            assert b"".join(stripped.split()) == b"".join(before[name].split()), name
    engine.unpatch(tree)
    assert snapshot(tree) == before
