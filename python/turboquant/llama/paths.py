"""The folders of the package's native sources (the codec, the hooks, the bundled model) and of its cache."""

from __future__ import annotations

import os
from pathlib import Path

__all__ = ["bundled_model", "bundled_text", "cache_dir", "native_dir"]

_PACKAGE = Path(__file__).resolve().parent.parent


def native_dir() -> Path:
    """The folder that holds ``cpp/``, ``ggml_types/`` and ``models/``.

    It is ``turboquant/_native`` in an installed package, and the root of the checkout if the package runs from one.

    Raises:
        FileNotFoundError: neither exists (a broken installation).
    """
    candidates = (_PACKAGE / "_native", _PACKAGE.parent.parent)
    for folder in candidates:
        if (folder / "ggml_types" / "inject.cmake").is_file():
            return folder
    looked = ", ".join(str(folder) for folder in candidates)
    raise FileNotFoundError(f"ggml_types/inject.cmake is in none of {looked}: reinstall turboquant")


def bundled_model() -> Path:
    """The model that comes with the package."""
    return native_dir() / "models" / "prose-8m-q8_0.gguf"


def bundled_text() -> Path:
    """The text that comes with the package. The bundled model was not trained on it."""
    return native_dir() / "models" / "heldout.txt"


def cache_dir() -> Path:
    """The cache folder: ``$TURBOQUANT_CACHE``, else ``$XDG_CACHE_HOME/turboquant``, else ``~/.cache/turboquant``.

    This function does not create it.
    """
    chosen = os.environ.get("TURBOQUANT_CACHE")
    if chosen:
        return Path(chosen).expanduser().resolve()
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base).expanduser() if base else Path.home() / ".cache").resolve() / "turboquant"
