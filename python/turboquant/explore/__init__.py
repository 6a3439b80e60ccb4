"""The page of ``turboquant explore``: experiments with the codec in one HTML file that needs no server and no network.

`page.html` is the frame and `style.css` the style. `codec.js` wraps the codec (`codec.wasm`, which
``tools/make_wasm.py`` compiles from ``cpp/src/scalar.cpp``). `experiments.js` uses `math.js` and `chart.js`, and
`page.js` has the controls.
"""

from __future__ import annotations

import base64
import html
import os
import re
import sys
import tempfile
import webbrowser
from importlib import metadata
from pathlib import Path

__all__ = ["page", "show", "write_page"]

_FOLDER = Path(__file__).parent


def _part(name: str) -> str:
    """The replacement of ``{{name}}`` in page.html: a file of this folder, WebAssembly as base64, or the version."""
    if name == "version":
        return html.escape(metadata.version("turboquant"))
    data = (_FOLDER / name).read_bytes()
    return base64.b64encode(data).decode() if name.endswith(".wasm") else data.decode().strip()


def page() -> str:
    """The whole page as HTML."""
    frame = (_FOLDER / "page.html").read_text(encoding="utf-8")
    return re.sub(r"\{\{([\w.]+)\}\}", lambda match: _part(match[1]), frame)


def write_page(target: Path, *, force: bool = False) -> None:
    """Write the page to the file `target`, completely or not at all.

    Raises:
        FileExistsError: `target` exists with other contents, and `force` is false.
        OSError: `target` cannot be written.
    """
    data = page().encode()
    if target.is_dir():
        raise IsADirectoryError(f"{target} is a folder: name a file in it, such as {target / 'explore.html'}")
    if not target.parent.is_dir():
        raise FileNotFoundError(f"{target} cannot be written: there is no folder {target.parent}")
    try:
        if target.exists() and not target.is_file():  # a device or a pipe, such as /dev/stdout
            target.write_bytes(data)
        elif not target.exists() or force:
            _replace(target, data)
        elif target.stat().st_size != len(data) or target.read_bytes() != data:
            raise FileExistsError(f"{target} exists: name another file, or give --force to replace it")
    except OSError as error:
        if error.strerror is None:  # ours
            raise
        raise OSError(f"{target} cannot be written: {error.strerror}") from error


def _replace(target: Path, data: bytes) -> None:
    descriptor, temporary = tempfile.mkstemp(prefix=f".{target.name}.", dir=target.parent)
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(data)
        os.chmod(temporary, 0o644)
        os.replace(temporary, target)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


def show(target: Path, *, wanted: bool = False) -> bool:
    """Open `target` in the user's browser if `wanted`, or if a terminal and a screen are there.

    Returns:
        False if the browser could not be started, else True.
    """
    screen = sys.platform in ("darwin", "win32") or any(os.environ.get(name) for name in ("DISPLAY", "WAYLAND_DISPLAY"))
    if not wanted and not (screen and sys.stdout.isatty()):
        return True
    return webbrowser.open(target.resolve().as_uri())
