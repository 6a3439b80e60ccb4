#!/usr/bin/env python3
"""Compare the guard's prediction, the noise of each layer's scores, with the KLD that the layer alone causes.

For every model the program prints the predicted noise (standard deviation of a score's error, in nats) with K of all
layers in one type, and the mean KLD from the model's own f16 cache when K of a single layer has that type and all else
is f16. docs/guard.md has the tables. With --plant it also measures variants of an f16 prose model in the shape of Qwen
2.5: one rotary pair of K in one layer gets a constant bias, as in layers of Qwen, which queries do not read, so that
the model computes the same function and only the noise grows. Results are stored, so the same command continues an
interrupted run.

Requirements: pip install '.[convert]', and a build (`turboquant build`).
"""

from __future__ import annotations

import argparse
import json
import re
import sys
import tempfile
from dataclasses import asdict
from pathlib import Path

import gguf
import numpy as np
from turboquant.llama.build import where
from turboquant.llama.paths import cache_dir
from turboquant.llama.progress import Reporter
from turboquant.measure.pairs import CachePair, Window
from turboquant.measure.perplexity import run_base, run_divergence
from turboquant.measure.programs import Programs
from turboquant.measure.results import Results, file_hash

_SIGMAS = re.compile(r"guard: noise of scores with K in (\S+), by layer: ([\d.e+-]+(?:, [\d.e+-]+)*) \(limit")
#: The noises of the variants of --plant, in nats.
SIZES = (0.25, 0.5, 1, 2, 4, 8, 16, 32)


class Watched(CachePair):
    """One type for K of all layers, with a limit of the guard that no noise exceeds; the guard logs its prediction."""

    @property
    def arguments(self) -> list[str]:
        return [*super().arguments, "--cache-guard", "1e9"]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", metavar="MODEL", nargs="*", type=Path, help="GGUF models")
    parser.add_argument("--plant", metavar="MODEL", type=Path, help="an f16 prose model to plant biases in")
    parser.add_argument("--plant-layer", metavar="N", type=int, default=4, help="the layer that gets them (4)")
    parser.add_argument("--text", metavar="FILE", type=Path, required=True, help="a UTF-8 text")
    parser.add_argument("--ctx", metavar="N", type=int, default=512, help="tokens in a chunk (512)")
    parser.add_argument("--chunks", metavar="N", type=int, default=4, help="chunks (4)")
    parser.add_argument("--type", metavar="TYPE", default="turbo4", help="the type of K (turbo4)")
    parser.add_argument("--bin", metavar="DIR", type=Path, help="the programs of a build (the last build's)")
    parser.add_argument("--threads", metavar="N", type=int, help="threads (all CPUs)")
    options = parser.parse_args()
    folder = cache_dir() / "guard"
    folder.mkdir(parents=True, exist_ok=True)
    programs = Programs(options.bin or where(), folder / "logs", options.threads)
    measure = Measure(programs, Results(folder / "results"), options)
    for model in options.models:
        measure.table(model)
    if options.plant:
        with tempfile.TemporaryDirectory(dir=folder) as scratch:
            measure.planted(options.plant, options.plant_layer, Path(scratch))
    return 0


class Measure:
    """Measures models and prints their tables as Markdown."""

    def __init__(self, programs: Programs, results: Results, options: argparse.Namespace) -> None:
        self.programs, self.results, self.options = programs, results, options
        self.build = programs.fingerprint()
        self.limits = {"ctx": options.ctx, "chunks": options.chunks}

    def table(self, model: Path) -> None:
        """All layers of one model."""
        found = self.model(model, None)
        print(f"\n{model.name}, {found['type']}: all layers {found['all']:.4g}, with the guard {found['guarded']:.4g}\n")
        print("| layer | predicted noise | KLD alone |\n|--:|--:|--:|")
        for layer, (sigma, kld) in enumerate(zip(found["sigma"], found["kld"], strict=True)):
            print(f"| {layer} | {sigma:.3g} | {kld:.5f} |")
        sys.stdout.flush()

    def planted(self, model: Path, layer: int, scratch: Path) -> None:
        """Variants of one model with different biases in one layer."""
        print(f"\n{model.name} in the shape of Qwen 2.5, a bias of K in layer {layer}\n")
        print("| predicted noise | KLD of the layer alone | all layers | all layers, guard |\n|--:|--:|--:|--:|")
        for size in (0.0, *SIZES):
            variant = scratch / f"planted-{size:g}.gguf"
            plant(model, variant, layer, size)
            found = self.model(variant, layer)
            print(f"| {found['sigma'][layer]:.3g} | {found['kld'][0]:.5f} | {found['all']:.4g} | {found['guarded']:.4g} |")
            sys.stdout.flush()
            variant.unlink()

    def model(self, model: Path, only: int | None) -> dict:
        """Predictions and measurements of all layers, or of one."""
        options = self.options
        key = {
            "what": "guard", "build": self.build, "model": file_hash(model, self.results), "only": only,
            "text": file_hash(options.text, self.results), "type": options.type, **self.limits,
        }  # fmt: skip
        if (known := self.results.get(key)) is not None:
            return known
        with tempfile.TemporaryDirectory(dir=self.results.folder.parent) as name:
            scratch = Path(name)
            base = scratch / "f16.kld"
            run_base(self.programs, model, options.text, base, **self.limits)
            none = Window(0)  # the newest tokens would hide the noise
            pair = Watched(options.type, "f16", window=none)
            whole, _ = run_divergence(self.programs, model, base, pair, **self.limits)
            log = (self.programs.logs / f"perplexity-{str(pair).replace('/', '-')}.log").read_text(errors="replace")
            match = _SIGMAS.search(log)
            if match is None:
                raise SystemExit(f"{model}: the guard predicts nothing for this model; log: {self.programs.logs}")
            sigma = [float(one) for one in match[2].split(", ")]
            caches = CachePair(options.type, "f16", window=none)
            guarded, _ = run_divergence(self.programs, model, base, caches, **self.limits)
            klds = []
            layers = range(len(sigma)) if only is None else [only]
            with Reporter().track(f"layers of {model.name}", len(layers)) as track:
                for layer in layers:
                    plan = scratch / f"{layer}.json"
                    k = ["f16"] * len(sigma)
                    k[layer] = options.type
                    plan.write_text(json.dumps({"format": "turboquant-plan", "version": 1, "k": k, "v": ["f16"] * len(k)}))
                    caches = CachePair("auto", "auto", plan, none)
                    alone, _ = run_divergence(self.programs, model, base, caches, **self.limits)
                    klds.append(alone.kld)
                    track.update(len(klds))
        found = {"type": match[1], "sigma": sigma, "kld": klds, "all": whole.kld, "guarded": guarded.kld}
        found["divergence"] = asdict(whole)
        self.results.put(key, found)
        return found


# ---- planting --------------------------------------------------------------------------------------------------------


def plant(source: Path, target: Path, layer: int, size: float) -> None:
    """Write `source`, a llama model with f16 weights, as a qwen2 model with a biased pair of K in one layer.

    RoPE of llama rotates pairs of neighbouring channels, and RoPE of qwen2 channels of the two halves of a head, so the
    rows of W_q and W_k are permuted. The pair's rows of W_q and W_k are zero, so that the bias changes no score. The
    bias causes a noise of `size` nats with 4 bits, by the guard's formula.
    """
    reader = gguf.GGUFReader(source)
    get = lambda name: reader.get_field(f"llama.{name}").contents()  # noqa: E731
    heads, kv_heads, head = get("attention.head_count"), get("attention.head_count_kv"), get("attention.key_length")
    tensors = {tensor.name: np.array(tensor.data) for tensor in reader.tensors}
    writer = gguf.GGUFWriter(target, "qwen2")
    for name, field in reader.fields.items():
        if name.startswith("GGUF.") or name in ("general.architecture", "llama.rope.dimension_count"):
            continue
        kind = field.types[0]
        sub = field.types[-1] if kind == gguf.GGUFValueType.ARRAY else None
        writer.add_key_value(name.replace("llama.", "qwen2."), field.contents(), kind, sub)
    order = np.concatenate([np.arange(0, head, 2), np.arange(1, head, 2)])
    for name, data in tensors.items():
        count = heads if name.endswith("attn_q.weight") else kv_heads if name.endswith("attn_k.weight") else 0
        if count:
            data = data.reshape(count, head, -1)[:, order].copy()
            if name.startswith(f"blk.{layer}."):
                data[:, [head // 2 - 1, head - 1]] = 0  # the pair with the lowest frequency
            data = data.reshape(count * head, -1)
            data = np.ascontiguousarray(data)
        writer.add_tensor(name, data)
    blocks = int(get("block_count"))
    for one in range(blocks):
        prefix = f"blk.{one}.attn_"
        gain = tensors[f"blk.{one}.attn_norm.weight"].astype(np.float64)
        for which, count in (("q", heads), ("k", kv_heads), ("v", kv_heads)):
            bias = np.zeros(count * head, np.float32)
            if which == "k" and one == layer and size:
                weight = tensors[f"{prefix}q.weight"].astype(np.float64) * gain
                power = np.square(weight).sum(axis=1).reshape(heads, head).sum(axis=1).max()
                # noise² = 0.0095 · b² · power / (128 · head)
                bias.reshape(count, head)[:, head - 1] = size * np.sqrt(128 * head / (0.0095 * power))
            writer.add_tensor(f"{prefix}{which}.bias", bias)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


if __name__ == "__main__":
    sys.exit(main())
