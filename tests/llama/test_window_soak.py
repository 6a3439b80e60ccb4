"""Random operations on a cache with the exact window, each batch compared with window_oracle.py.

TURBOQUANT_SOAK_SECONDS: how long (default 30). TURBOQUANT_SOAK_SEED: the first seed; a failure names its own.
"""

from __future__ import annotations

import os
import random
import time
from pathlib import Path

import pytest
from harness import Probe, ProbeError
from make_model import Shape, write_model
from window_oracle import Model, Twin

SHAPE = Shape(layers=1, heads=4, kv_heads=2, head=128)
SECONDS = float(os.environ.get("TURBOQUANT_SOAK_SECONDS", "30"))
SEED = int(os.environ.get("TURBOQUANT_SOAK_SEED", "1"))
STEPS = 60
#: The largest KLD of a token to the oracle: 1e-5, and 3e-3 in 1 of 100 runs, where another sum rounds a value to another
#: level. What a stale slot makes is mostly above 0.1.
LIMIT = 1e-2


class Soak:
    """One context and its oracle under random operations. `history` is what was done."""

    def __init__(self, build, path: Path, model: Model, folder: Path, seed: int) -> None:
        self.random = choose = random.Random(seed)
        self.folder = folder
        self.window = choose.choice([1, 2, 7, 16, 40, 256])
        self.slot = choose.choice(["q8_0", "f16"])
        self.types = choose.choice([("turbo2", "turbo2"), ("turbo4", "turbo3"), ("turbo3", "f16"), ("f16", "turbo2")])
        self.options = {
            "n_seq": choose.randint(1, 4),
            "unified": choose.random() < 0.5,
            "n_ubatch": choose.choice([4, 8, 19, 64, 512]),
            "threads": choose.choice([1, 1, 2]),
        }
        self.history = [f"window {self.window}:{self.slot}, {self.types}, {self.options}"]
        self.probe = Probe(build, path, folder, {"LLAMA_ARG_CACHE_WINDOW": f"{self.window}:{self.slot}"})
        self.twin = Twin(self.probe, model, *self.types, self.window, self.slot, seed=seed, **self.options)
        self.n_seq: int = self.options["n_seq"]
        self.saved: dict[int, Path] = {}  # by sequence; -1 is the whole state

    def close(self) -> None:
        self.probe.__exit__()

    def free(self, seq: int) -> int:
        stream = self.twin.oracles[0].stream(seq)
        return len(stream.cells) - stream.used()

    def settled(self) -> bool:
        """Nothing is pending that llama.cpp does at the next batch only."""
        oracle = self.twin.oracles[0]
        return not oracle.copies and not any(c.shift for s in oracle.streams for c in s.cells if c.seqs)

    # ---- operations ----------------------------------------------------------------------------------------------

    def batch(self, most: int) -> None:
        first = self.random.randrange(self.n_seq)
        seqs = list(range(first, self.random.randint(first, self.n_seq - 1) + 1))
        n = self.random.randint(1, most)
        unified = self.options["unified"]
        while min(self.free(seq) for seq in seqs) < n * (len(seqs) if unified else 1):
            victim = self.random.choice(range(self.n_seq) if unified else seqs)
            self.history.append(f"rm {victim}")
            self.twin.rm(victim)
        self.history.append(f"decode {n} of {seqs}")
        self.twin.decode(n, *seqs)

    def decode(self) -> None:
        self.batch(self.random.choice([1, 1, 1, 4, 40]))

    def speculate(self) -> None:
        """Drafts are rejected, one token of another kind is taken."""
        seq = self.random.randrange(self.n_seq)
        for _ in range(3):
            n = self.random.randint(1, 6)
            if self.free(seq) < n:
                return
            rejected = self.random.randint(0, n - 1)
            self.history.append(f"draft {n} of {seq}, reject {rejected}")
            self.twin.decode(n, seq)
            if rejected:
                self.twin.rollback(rejected, seq)

    def rollback(self) -> None:
        seq = self.random.randrange(self.n_seq)
        n = min(self.random.randint(1, 30), self.twin.end(seq))
        if n:
            self.history.append(f"rollback {n} of {seq}")
            self.twin.rollback(n, seq)

    def remove(self) -> None:
        seq = self.random.randrange(self.n_seq)
        first = self.random.randint(0, self.twin.end(seq))
        last = first + self.random.randint(1, 20)
        self.history.append(f"rm {seq} {first} {last}")
        self.twin.rm(seq, first, last)

    def shift(self) -> None:
        """The start of a sequence is kept, what follows goes, the rest moves down."""
        seq = self.random.randrange(self.n_seq)
        end = self.twin.end(seq)
        if end < 12:
            return
        keep, gone = self.random.randint(0, 4), self.random.randint(1, end // 2)
        self.history.append(f"shift {seq}: {keep} stay, {gone} go")
        self.twin.rm(seq, keep, keep + gone)
        self.twin.add(seq, keep + gone, end, -gone)

    def divide(self) -> None:
        seq = self.random.randrange(self.n_seq)
        end = self.twin.end(seq)
        if end > 8:
            self.history.append(f"div {seq} from {end // 2}")
            self.twin.div(seq, end // 2, end, 2)

    def copy(self) -> None:
        src, dst = self.random.randrange(self.n_seq), self.random.randrange(self.n_seq)
        if src == dst:
            return
        if self.options["unified"]:
            self.twin.rm(dst)
        self.history.append(f"cp {src} {dst}")
        self.twin.cp(src, dst)

    def keep(self) -> None:
        if self.random.random() < 0.3:
            seq = self.random.randrange(self.n_seq)
            self.history.append(f"keep {seq}")
            self.twin.keep(seq)

    def clear(self) -> None:
        if self.random.random() < 0.3:
            data = self.random.random() < 0.5
            self.history.append(f"clear {data}")
            self.twin.clear(data)

    def save(self) -> None:
        seq = self.random.randint(-1, self.n_seq - 1)
        if self.settled() and (seq < 0 or self.twin.end(seq)):
            self.saved[seq] = self.folder / f"state{seq}"
            self.history.append(f"save {seq}")
            self.twin.save(self.saved[seq], seq)

    def load(self) -> None:
        if not self.saved or not self.settled():
            return
        seq = self.random.choice(sorted(self.saved))
        path = self.saved[seq]
        to = -1 if seq < 0 else self.random.randrange(self.n_seq)
        if to >= 0:
            self.twin.rm(to)
            if self.free(to) < sum(len(cells) for cells in self.twin.states[path][0]):
                return
        self.history.append(f"load {seq} to {to}")
        self.twin.load(path, to)

    def step(self) -> None:
        operations = [self.decode] * 8 + [self.speculate] * 3 + [self.rollback] * 2 + [
            self.remove, self.shift, self.divide, self.copy, self.keep, self.clear, self.save, self.load,
        ]  # fmt: skip
        self.random.choice(operations)()


def test_random_operations(build, tmp_path: Path) -> None:
    path = write_model(tmp_path / "model.gguf", SHAPE)
    model = Model(path, SHAPE)
    deadline = time.monotonic() + SECONDS
    seed = SEED
    while time.monotonic() < deadline or seed < SEED + 3:
        soak = Soak(build, path, model, tmp_path, seed)
        try:
            for step in range(STEPS):
                soak.step()
                assert soak.twin.worst <= LIMIT, f"KLD {soak.twin.worst:.1e}"
        except (AssertionError, ProbeError) as problem:
            told = "\n".join(soak.history[-40:])
            pytest.fail(f"TURBOQUANT_SOAK_SEED={seed}, step {step}: {problem}\n{soak.history[0]}\n...\n{told}")
        finally:
            soak.close()
        seed += 1
