#!/usr/bin/env python3
"""Measure the figures of a real model for notebooks 5 and 6, and write notebooks/data/measured.json.

The figures are perplexity and KL divergence from the model's own f16 cache for many pairs of cache types, also after
`turboquant convert` and for a variant of the model with outlier channels; llama.cpp's own types with and without its
rotation; boundary V, sparse V and block sizes; and exact windows of several sizes with the bundled model. The program
needs `turboquant build`, and takes up to an hour on two cores. Results are stored, so a rerun continues.

    measure_notebooks.py --model model-f16.gguf --outliers model-outliers-f16.gguf --text text.txt
    measure_notebooks.py --only-windows                     # leaves the rest of the file as it is
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from turboquant import types
from turboquant.convert.run import convert
from turboquant.errors import TurboQuantError
from turboquant.evaluate.rows import Options, measure
from turboquant.llama.build import where
from turboquant.llama.paths import bundled_model, bundled_text, cache_dir
from turboquant.measure.measurer import BASELINE, Measurer, Run
from turboquant.measure.pairs import CachePair, Window, parse_pairs
from turboquant.measure.programs import ProgramError, Programs
from turboquant.measure.results import Results

ROOT = Path(__file__).resolve().parent.parent
TARGET = ROOT / "notebooks" / "data" / "measured.json"
GRID = ("f16", "q8_0", "turbo4", "turbo3", "turbo2")
STACK = "q8_0/turbo4,q8_0/turbo3,q8_0/turbo2,turbo4,turbo4/turbo3,turbo4/turbo2,turbo3,turbo3/turbo2,turbo2"
STOCK = "q8_0,q5_0,q4_0"
SPARSE = "turbo4/turbo3"
THRESHOLDS = (0.0, 1e-6, 1e-3, 1e-2, 1e-1)
BOUNDARY = "turbo4/turbo2"
WINDOWED = ("turbo4", "turbo3", "turbo2")
WINDOWS = (0, 16, 64, 128, 256, 512)
# Block lengths of the Lloyd-Max types. The notebooks do not measure the trellis-coded types.
BLOCKS = ",".join(info.name for info in types() if info.family in ("turbo4", "turbo3", "turbo2"))
KEPT = ("k", "v", "bits_k", "bits_v", "bits", "mib", "ppl", "ppl_error", "kld", "kld_error", "same_top")


class Bench:
    """Measures lists of pairs with one build and one text."""

    def __init__(self, given: argparse.Namespace) -> None:
        self.folder = cache_dir() / "evaluate"
        self.programs = Programs(given.bin or where(), self.folder / "logs", given.threads)
        self.text, self.ctx, self.chunks = given.text, given.ctx, given.chunks

    def rows(self, title: str, model: Path, pairs: str, **environment: str) -> list[dict[str, Any]]:
        """The table of `pairs` without an exact window, which would hide the differences between the pairs."""
        print(f"{title} ({model.name})", file=sys.stderr, flush=True)
        plain = [pair.with_window(Window(0)) for pair in parse_pairs(pairs)]
        options = Options(model, self.text, plain, self.ctx, self.chunks, needles=0)
        with variables(environment):
            found = measure(options, self.programs, Results(self.folder / "results"), self.folder, _Lines())
        for row in found:
            if row.failure:
                raise ProgramError(f"{row.label}: {row.failure}")
        return [{key: getattr(row, key) for key in KEPT} for row in found]

    def windows(self) -> dict[str, Any]:
        """KLDs of the bundled model with exact windows of several sizes, as text is generated and in batches."""
        model, text = bundled_model(), bundled_text()
        print(f"exact windows ({model.name})", file=sys.stderr, flush=True)
        measurer = Measurer(model, text, self.programs, Results(self.folder / "results"), self.folder, _Lines())
        pairs = {(name, tokens): CachePair(name, name).with_window(Window(tokens))
                 for name in WINDOWED for tokens in WINDOWS}
        runs = {pair: [Run(pair, self.ctx, self.chunks, decode) for decode in (True, False)]
                for pair in [BASELINE, *pairs.values()]}
        found = measurer.quality([run for both in runs.values() for run in both])
        rows = []
        for (name, tokens), pair in pairs.items():
            single, batched = (found[run].divergence for run in runs[pair])
            size = found[runs[pair][0]].caches.total()
            if single is None or batched is None or size.window_tokens != tokens:
                raise ProgramError(f"{pair} with a window of {tokens} tokens: got one of {size.window_tokens}")
            rows.append({
                "type": name, "window": tokens, "kld": single.kld, "kld_error": single.kld_error,
                "kld_batched": batched.kld, "mib": round(size.k_mib + size.v_mib, 2), "window_mib": size.window_mib,
            })  # fmt: skip
        floor = found[runs[BASELINE][0]].divergence
        about = {"model": model.name, "text": text.name, "ctx": self.ctx, "chunks": self.chunks}
        return {"about": about, "floor": floor.kld if floor else 0.0, "rows": rows}


class _Lines:
    """One line for every run."""

    def __init__(self) -> None:
        self.what = ""

    def __call__(self, what: str, done: int, total: int) -> None:
        if what != self.what:
            self.what = what
            print(f"  {what}", file=sys.stderr, flush=True)


@contextmanager
def variables(values: dict[str, str]) -> Iterator[None]:
    """Environment variables of llama.cpp, which are part of the key of stored results."""
    before = {key: os.environ.get(key) for key in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for key, value in before.items():
            if value is None:
                del os.environ[key]
            else:
                os.environ[key] = value


def converted(model: Path, given: argparse.Namespace) -> Path:
    """The model after `turboquant convert`, which runs once."""
    target = cache_dir() / "tools" / f"{model.stem}-converted.gguf"
    target.parent.mkdir(parents=True, exist_ok=True)
    if not target.exists():
        convert(model, target, bin=given.bin, threads=given.threads)
    return target


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, help="an f16 GGUF model with heads of 128")
    parser.add_argument("--outliers", type=Path, help="the same model with outlier channels in K and V")
    parser.add_argument("--text", type=Path, help="a text that the model has not seen")
    parser.add_argument("--only-windows", action="store_true", help="measure nothing but the exact windows")
    parser.add_argument("--chunks", type=int, default=4, help="default %(default)s")
    parser.add_argument("--ctx", type=int, default=2048, help="tokens in a chunk (default %(default)s)")
    parser.add_argument("--threads", type=int, help="default: all CPUs")
    parser.add_argument("--bin", type=Path, help="programs of a build (default: the last build's)")
    parser.add_argument("--output", "-o", type=Path, default=TARGET, metavar="FILE", help=f"default {TARGET}")
    given = parser.parse_args(arguments)
    for option, file in (("--model", given.model), ("--outliers", given.outliers), ("--text", given.text)):
        if not given.only_windows and (file is None or not file.is_file()):
            parser.error(f"{option} {file}: no such file")
    try:
        if given.only_windows:
            found = {**json.loads(given.output.read_text(encoding="utf-8")), "windows": Bench(given).windows()}
        else:
            found = run(given)
    except (TurboQuantError, OSError, ValueError) as error:
        print(f"measure_notebooks: {error}", file=sys.stderr)
        return 1
    partial = given.output.with_name(f".{given.output.name}.partial")
    partial.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    os.replace(partial, given.output)
    print(given.output)
    return 0


def run(given: argparse.Namespace) -> dict[str, Any]:
    bench = Bench(given)
    unrotated = {"LLAMA_ATTN_ROT_DISABLE": "1"}
    found: dict[str, Any] = {
        "about": {"model": given.model.name, "text": given.text.name, "ctx": given.ctx, "chunks": given.chunks},
        "grid": bench.rows("K x V", given.model, ",".join(f"{k}/{v}" for k in GRID for v in GRID)),
    }
    models = {"clean": given.model, "outliers": given.outliers}
    models |= {f"{name}, converted": converted(model, given) for name, model in models.items()}
    found["stack"] = {name: bench.rows(f"the stack, {name}", model, STACK) for name, model in models.items()}
    found["stock"] = {
        name: {
            "rotated": bench.rows(f"llama.cpp's own types, {name}", models[name], STOCK),
            "plain": bench.rows(f"llama.cpp's own types without rotation, {name}", models[name], STOCK, **unrotated),
        }
        for name in ("clean", "outliers")
    }
    found["blocks"] = bench.rows("block sizes", given.model, BLOCKS)
    found["boundary"] = {
        layers: bench.rows(f"boundary V of {layers} layers", given.model, BOUNDARY,
                           **({"LLAMA_ARG_CACHE_BOUNDARY_V": str(layers)} if layers else {}))[1]
        for layers in (0, 1, 2)
    }
    found["sparse"] = {
        f"{threshold:g}": bench.rows(f"sparse V at {threshold:g}", given.model, SPARSE,
                                     LLAMA_ARG_CACHE_SPARSE_V=f"{threshold:g}")[1]
        for threshold in THRESHOLDS
    }
    found["windows"] = bench.windows()
    return found


if __name__ == "__main__":
    sys.exit(main())
