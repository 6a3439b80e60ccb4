"""The page of ``turboquant explore``: experiments with the codec in one HTML file that needs no server and no network.

`page.html` is its frame, `style.css` its looks; `codec.js` wraps the codec (`codec.wasm`, which ``tools/make_wasm.py``
compiles from ``cpp/src/scalar.cpp``), `math.js` and `chart.js` are what the experiments of `page.js` need.
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
    """What stands for ``{{name}}`` in page.html: a file of this folder, WebAssembly as base64, or the version."""
    if name == "version":
        return html.escape(metadata.version("turboquant"))
    data = (_FOLDER / name).read_bytes()
    return base64.b64encode(data).decode() if name.endswith(".wasm") else data.decode().strip()


def page() -> str:
    """The whole page as HTML."""
    frame = (_FOLDER / "page.html").read_text(encoding="utf-8")
    return re.sub(r"\{\{([\w.]+)\}\}", lambda match: _part(match[1]), frame)


def write_page(target: Path, *, force: bool = False) -> None:
    """Write the page to the file `target`, whole or not at all.

    Raises:
        FileExistsError: `target` holds something else than this very page, and `force` is not given.
        OSError: `target` cannot be written.
    """
    data = page().encode()
    if target.is_dir():
        raise IsADirectoryError(f"{target} is a folder: name a file in it, such as {target / 'explore.html'}")
    if target.exists() and not force:
        if target.read_bytes() == data:
            return
        raise FileExistsError(f"{target} exists: name another file, or give --force to replace it")
    try:
        descriptor, temporary = tempfile.mkstemp(prefix=f".{target.name}.", dir=target.parent)
        try:
            with os.fdopen(descriptor, "wb") as file:
                file.write(data)
            os.chmod(temporary, 0o666 & ~_umask())
            os.replace(temporary, target)
        except BaseException:
            Path(temporary).unlink(missing_ok=True)
            raise
    except OSError as error:
        raise OSError(f"{target} cannot be written: {error.strerror}") from error


def show(target: Path, *, wanted: bool = False) -> bool:
    """Open `target` in the user's browser: always if `wanted`, else only if a person with a screen is there to see it.

    Returns False if that was tried and failed.
    """
    screen = sys.platform in ("darwin", "win32") or any(os.environ.get(name) for name in ("DISPLAY", "WAYLAND_DISPLAY"))
    if not wanted and not (screen and sys.stdout.isatty()):
        return True
    return webbrowser.open(target.resolve().as_uri())


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
