"""A soak of the exact window: random operations through llama.h, each batch compared with window_oracle.py, and
llama-server with all that it does to a cache.

TURBOQUANT_SOAK_SECONDS: how long the random operations go on (default 30).
TURBOQUANT_SOAK_SEED: the first seed; a failure names its own.
"""

from __future__ import annotations

import os
import random
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NoReturn

import numpy as np
import pytest
from harness import MODEL, Probe, ProbeError, Server, kld
from make_model import Shape, write_model
from window_oracle import Model, Twin

SHAPE = Shape(layers=1, heads=4, kv_heads=2, head=128)
SECONDS = float(os.environ.get("TURBOQUANT_SOAK_SECONDS", "30"))
SEED = int(os.environ.get("TURBOQUANT_SOAK_SEED", "1"))
STEPS = 60
#: The largest KLD of a token to the oracle: mostly 1e-5. Where another sum rounds a value to another level, it is up to
#: 1.4e-2 (once in 350 seeds, with or without a window). What a stale slot makes is mostly above 0.1.
LIMIT = 5e-2


class Soak:
    """One context and its oracle under random operations. `history` is what was done."""

    def __init__(self, build, path: Path, model: Model, folder: Path, seed: int) -> None:
        self.random = choose = random.Random(seed)
        self.folder = folder
        self.window = choose.choice([1, 2, 7, 16, 40, 256])
        self.slot = choose.choice(["q8_0", "f16"])
        self.types = choose.choice([
            ("turbo2", "turbo2"), ("turbo4", "turbo3"), ("turbo3", "f16"), ("f16", "turbo2"),
            # Another sum can change the whole path of a block. With four bits this is a small change.
            ("turbo4_tcq", "turbo4_tcq"),
        ])  # fmt: skip
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
            self.remove, self.copy, self.keep, self.clear, self.save, self.load,
        ]  # fmt: skip
        # A shift encodes keys again. Next to the boundary of two centroids the last bits of float32 decide, in which the
        # oracle differs. The same operations with keys in q8_0, turbo4 and turbo4_tcq, whose path changes as a whole, have
        # led to a KLD of 1.3e-3, 7e-3 and 5.7e-2; with two and three bits 0.11 and 0.09 were seen.
        if self.types[0] in ("turbo4", "f16"):
            operations += [self.shift, self.divide]
        self.random.choice(operations)()


def fail(seed: int, step: int, problem: Exception, history: list[str]) -> NoReturn:
    """Fail with the seed, and with what was done."""
    told = "\n".join(history[-40:])
    pytest.fail(f"TURBOQUANT_SOAK_SEED={seed}, step {step}: {problem}\n{history[0]}\n...\n{told}")


def test_random_operations(build, tmp_path: Path) -> None:
    path = write_model(tmp_path / "model.gguf", SHAPE)
    model = Model(path, SHAPE)
    deadline = time.monotonic() + SECONDS
    seed, ties = SEED, 0
    while time.monotonic() < deadline or seed < SEED + 3:
        soak = Soak(build, path, model, tmp_path, seed)
        try:
            for step in range(STEPS):
                soak.step()
                if soak.twin.oracles[0].has_tie:
                    ties += 1
                    break
                assert soak.twin.worst <= LIMIT, f"KLD {soak.twin.worst:.1e}"
        except (AssertionError, ProbeError) as problem:
            fail(seed, step, problem, soak.history)
        finally:
            soak.close()
        seed += 1
    print(f"{ties} of {seed - SEED} sequences ended early, at a tie of the encoder")
    assert ties <= 1 + (seed - SEED) / 20


#: Mean KLD of a batch to f16 with K and V in turbo4 (measured: up to 0.15). A stale slot makes 0.3 to 2.
NEAR = 0.3


class Pair:
    """The same operations on a cache of f16 and on one of turbo4 with a window: whole models, which no oracle computes."""

    def __init__(self, build, model: Path, folder: Path, seed: int, whole: bool) -> None:
        self.random = choose = random.Random(seed)
        self.folder = folder
        self.whole = whole  # sequences can only be removed as a whole
        self.n_seq = 2 + seed // 2 % 2
        self.window = choose.choice([3, 16, 60, 512])
        options = {"n_seq": self.n_seq, "unified": seed % 2, "n_ubatch": choose.choice([8, 32, 512])}
        self.size = 512
        options["n_ctx"] = self.size if options["unified"] else self.size * self.n_seq
        self.probes = [Probe(build, model, folder, {"LLAMA_ARG_CACHE_WINDOW": str(self.window)}) for _ in range(2)]
        self.history = [f"{model.name}, window {self.window}, {options}"]
        for p, name in zip(self.probes, ("f16", "turbo4"), strict=True):
            p.context(name, name, **options)
        self.ends = [0] * self.n_seq
        self.shared = False  # sequences have cells in common, which a shift would move for all of them
        self.worst = 0.0

    def close(self) -> None:
        for p in self.probes:
            p.__exit__()

    def command(self, line: str) -> None:
        self.history.append(line)
        for p in self.probes:
            p.command(line)

    def decode(self, seq: int, n: int) -> None:
        if max(self.ends) + n > self.size // self.n_seq:
            self.command(f"rm {seq} -1 -1")
            self.ends[seq] = 0
        tokens = [self.random.randrange(256) for _ in range(n)]
        self.history.append(f"decode {n} of {seq}")
        rows = [p.logits(tokens, self.ends[seq], seq) for p in self.probes]
        self.ends[seq] += n
        self.worst = max(self.worst, kld(*rows))

    def step(self) -> None:
        seq = self.random.randrange(self.n_seq)
        end = self.ends[seq]
        what = self.random.choice(["decode"] * 6 + ["draft"] * 3 + ["copy", "state", "state", "shift", "clear"])
        if what == "decode":
            self.decode(seq, self.random.choice([1, 1, 3, 20, 60]))
        elif what == "draft" and not self.whole:
            n = self.random.randint(1, 5)
            self.decode(seq, n)
            rejected = self.random.randint(0, n - 1)
            if rejected:
                self.ends[seq] -= rejected
                self.command(f"rm {seq} {self.ends[seq]} -1")
        elif what == "copy":
            to = self.random.randrange(self.n_seq)
            if to != seq and end:
                self.command(f"rm {to} -1 -1")
                self.command(f"cp {seq} {to} -1 -1")
                self.ends[to] = end
                self.shared = True
                self.decode(to, 1)
        elif what == "state" and end:
            self.decode(seq, 2)
            for i, p in enumerate(self.probes):
                p.command(f"saveseq {self.folder}/state{i} {seq}")
            to, end = self.random.randrange(self.n_seq), self.ends[seq]
            self.command(f"rm {to} -1 -1")
            self.ends[to] = 0
            self.decode(to, self.random.randint(1, 30))
            for i, p in enumerate(self.probes):
                p.command(f"loadseq {self.folder}/state{i} {to}")
            self.history.append(f"state of {seq} to {to}")
            self.ends[to] = end
            self.decode(to, 3)
        elif what == "shift" and not self.whole and not self.shared and end > 20:
            self.command(f"rm {seq} 2 12")
            self.command(f"shift {seq} 12 {end} -10")
            self.ends[seq] -= 10
            self.decode(seq, 2)
        elif what == "clear" and self.random.random() < 0.3:
            self.command(f"clear {self.random.randint(0, 1)}")
            self.ends = [0] * self.n_seq
            self.shared = False


@pytest.mark.parametrize("model", ["iswa", "sinks", "hybrid", "deep"])
def test_random_operations_on_whole_models(build, tiny, tmp_path: Path, model: str) -> None:
    deadline = time.monotonic() + SECONDS / 10
    seed = SEED
    while time.monotonic() < deadline or seed < SEED + 4:
        pair = Pair(build, tiny(model), tmp_path, seed, whole=model == "hybrid")
        try:
            for step in range(STEPS):
                pair.step()
                assert pair.worst <= NEAR, f"KLD {pair.worst:.1e}"
        except (AssertionError, ProbeError) as problem:
            fail(seed, step, problem, pair.history)
        finally:
            pair.close()
        seed += 1


# ---- llama-server ----------------------------------------------------------------------------------------------------


@pytest.fixture
def judge(probe, prose_model):
    """A tokenizer, and how far a token that a server took is below the best one by the model with an f16 cache: the
    largest difference of their logits."""
    p = probe(prose_model)

    def regret(prompt: list[int], tokens: list[int]) -> float:
        p.context("f16", "f16", n_ctx=1024, n_batch=1024, n_ubatch=1024)
        logits = p.logits(prompt + tokens)[len(prompt) - 1 : -1]
        return float((logits.max(-1) - logits[np.arange(len(tokens)), tokens]).max())

    return p.tokenize, regret


SPECULATION = {
    "no": (),
    "draft model": (
        "--spec-type", "draft-simple", "-md", MODEL, "-ctkd", "turbo2", "-ctvd", "turbo2", "--spec-draft-n-max", 5,
    ),
    "prompt lookup": ("--spec-type", "ngram-simple", "--spec-ngram-simple-size-n", 2, "--spec-ngram-simple-size-m", 6),
}  # fmt: skip
#: Measured: 0.3 with either window, 0.9 without one.
REGRET = 1.0


@pytest.mark.parametrize("speculation", SPECULATION)
@pytest.mark.parametrize("streams", ["--kv-unified", "--no-kv-unified"])
@pytest.mark.parametrize("window", [512, 48])
def test_server(build, prose_model, heldout, judge, tmp_path, window: int, streams: str, speculation: str) -> None:
    """Three slots at once, again and again, with speculation; then a slot is saved, used for another text, restored."""
    (tmp_path / "slots").mkdir()
    tokenize, regret = judge
    prompts = [tokenize(heldout[at : at + 240]) for at in (0, 3000, 6000, 9000, 12000, 15000)]
    prompts[1] += prompts[1]  # something to look up
    arguments = ("-ctk", "turbo4", "-ctv", "turbo4", "--cache-window", window, "-c", 2048, "-np", 3, streams)
    arguments += ("--slot-save-path", tmp_path / "slots", *SPECULATION[speculation])
    with Server(build, prose_model, *arguments, log=tmp_path / "server.log") as server:
        with ThreadPoolExecutor(3) as pool:
            replies = list(pool.map(lambda i: server.complete(prompts[i], 60, slot=i % 3, ignore_eos=True), range(6)))
        worst = [regret(prompt, reply["tokens"]) for prompt, reply in zip(prompts, replies, strict=True)]
        assert [len(reply["tokens"]) for reply in replies] == [60] * 6
        assert max(worst) <= REGRET, worst
        drafted = sum(reply["timings"].get("draft_n", 0) for reply in replies)
        assert (drafted > 0) == (speculation != "no"), "nothing was drafted"

        text = prompts[5] + replies[5]["tokens"]
        assert server.request("POST", "/slots/2?action=save", {"filename": "slot"})[0] == 200
        server.complete(prompts[0] + prompts[3], 20, slot=2)
        assert server.request("POST", "/slots/2?action=restore", {"filename": "slot"})[0] == 200
        after = server.complete(text, 30, slot=2, ignore_eos=True)
        assert after["timings"]["cache_n"] >= len(text) - 2, "the restored slot was not used"
        assert regret(text, after["tokens"]) <= REGRET


@pytest.mark.parametrize("window", [16, 512])
def test_server_shifts_its_context(build, prose_model, heldout, tmp_path, window: int) -> None:
    arguments = ("-ctk", "turbo4", "-ctv", "turbo4", "--cache-window", window, "-c", 256, "-np", 1, "--context-shift")
    with Server(build, prose_model, *arguments, log=tmp_path / "server.log") as server:
        reply = server.complete(heldout[:300], 500, ignore_eos=True)
        assert len(reply["tokens"]) == 500
        assert server.log.count("context shift") >= 3, server.log[-3000:]
        assert server.alive
