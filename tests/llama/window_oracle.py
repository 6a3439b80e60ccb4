"""A one-layer llama and its KV cache with the exact window, in NumPy: what the logits must be after any operations.

Keys and values of a one-layer model depend on a token and its position alone, so that every cell can be computed from
the formulas. The cache keeps what llama.cpp's keeps (cells, their sequences, where the next token goes) and the rule of
the window: a query reads its own ubatch and the cells that own a slot at high precision, all others from their blocks.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from copy import deepcopy
from dataclasses import dataclass, field
from pathlib import Path

import gguf
import numpy as np
import turboquant
from harness import Probe, log_softmax
from make_model import Shape

#: One token of a batch: token, position, sequence.
Item = tuple[int, int, int]


def q8(x: np.ndarray, scale: type = np.float16) -> np.ndarray:
    """Rounded as blocks of 32 int8 with a scale of that type: q8_0, or what attention makes of float32 rows."""
    blocks = x.astype(np.float32).reshape(*x.shape[:-1], -1, 32)
    step = np.abs(blocks).max(-1, keepdims=True) / 127
    levels = np.round(np.divide(blocks, step, out=np.zeros_like(blocks), where=step > 0))
    return (levels * step.astype(scale)).astype(np.float64).reshape(x.shape)


def stored(x: np.ndarray, name: str) -> np.ndarray:
    """Rows as a cache of the type holds them."""
    rows = np.ascontiguousarray(x, np.float32)
    if name == "f16":
        return rows.astype(np.float16).astype(np.float64)
    if name == "q8_0":
        return q8(rows)
    return turboquant.dequantize(turboquant.quantize(rows, name), name).astype(np.float64)


def is_tie(x: np.ndarray, name: str) -> bool:
    """Whether the last bits of float32, in which llama.cpp and the oracle differ, decide how a row of turbo blocks is
    stored: two scales of the encoder's search are equally good, and with the other one many values change."""
    if not name.startswith("turbo"):
        return False
    row = stored(x, name)
    noise = np.random.default_rng(1).standard_normal((16, *x.shape))
    change = np.linalg.norm(stored(x * (1 + 1e-6 * noise), name) - row, axis=-1)
    return bool((change > 0.12 * np.linalg.norm(row, axis=-1)).any())  # one value of another level makes 0.09 at most


def rounded(q: np.ndarray, name: str) -> np.ndarray:
    """Queries as attention rounds them for keys of the type: to int8, in the rotated domain if the type is turbo."""
    if name == "f16":
        return q
    if name in ("q8_0", "f32"):
        return q8(q, np.float32)
    block = next(info.block for info in turboquant.types() if info.name == name)
    prepared = turboquant.prepare(np.ascontiguousarray(q, np.float32), block)
    values = prepared["q"] * prepared["scale"][..., None]
    return turboquant.unrotate(values.reshape(q.shape).astype(np.float32), block).astype(np.float64)


class Model:
    """The one-layer llama of make_model.py in float64."""

    def __init__(self, path: Path, shape: Shape) -> None:
        assert shape.arch == "llama" and shape.layers == 1
        self.shape = shape
        self.w = {t.name: np.array(t.data, np.float64) for t in gguf.GGUFReader(path).tensors}

    def rope(self, x: np.ndarray, positions: np.ndarray) -> np.ndarray:
        """Pairs (0, 1), (2, 3), ... of the heads x [tokens, heads, head] turn by position * 10000^(-2i/head)."""
        size = self.shape.head
        angle = positions[:, None] * 10000.0 ** (-np.arange(0, size, 2) / size)
        cos, sin = np.cos(angle)[:, None], np.sin(angle)[:, None]
        even, odd = x[..., 0::2], x[..., 1::2]
        return np.stack([even * cos - odd * sin, even * sin + odd * cos], -1).reshape(x.shape)

    def qkv(self, tokens: np.ndarray, positions: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        s = self.shape
        h = _norm(self.w["token_embd.weight"][tokens])
        q, k, v = (
            (h @ self.w[f"blk.0.attn_{name}.weight"].T).reshape(-1, heads, s.head)
            for name, heads in (("q", s.heads), ("k", s.kv_heads), ("v", s.kv_heads))
        )
        return self.rope(q, positions), self.rope(k, positions), v

    def logits(self, token: int, attention: np.ndarray) -> np.ndarray:
        """attention: [heads, head]."""
        w = self.w
        x = w["token_embd.weight"][token] + w["blk.0.attn_output.weight"] @ attention.ravel()
        h = _norm(x)
        gate = w["blk.0.ffn_gate.weight"] @ h
        x = x + w["blk.0.ffn_down.weight"] @ (gate / (1 + np.exp(-gate)) * (w["blk.0.ffn_up.weight"] @ h))
        return w["output.weight"] @ _norm(x)


def _norm(x: np.ndarray) -> np.ndarray:
    return x / np.sqrt((x * x).mean(-1, keepdims=True) + 1e-5)


@dataclass
class Cell:
    pos: int = -1
    seqs: set[int] = field(default_factory=set)
    shift: int = 0
    k: np.ndarray | None = None  # from the blocks
    v: np.ndarray | None = None


@dataclass
class Slot:
    cell: int = -1
    written: int = 0
    k: np.ndarray | None = None
    v: np.ndarray | None = None


@dataclass
class Stream:
    cells: list[Cell]
    slots: list[Slot]
    head: int = 0

    def used(self) -> int:
        return sum(bool(cell.seqs) for cell in self.cells)

    def forget(self, cells: Iterable[int] | None = None) -> None:
        for slot in self.slots:
            if cells is None or slot.cell in cells:
                slot.cell, slot.written = -1, 0


class Cache:
    """`stale` names the events at which this cache wrongly keeps its tags: copy, shift, restore, clear, store."""

    def __init__(
        self, model: Model, ctk: str, ctv: str, window: int, slot: str = "q8_0", size: int = 256, n_seq: int = 1,
        unified: bool = False, n_ubatch: int = 512, stale: Sequence[str] = (),
    ) -> None:
        self.model, self.types, self.slot, self.n_ubatch, self.stale = model, (ctk, ctv), slot, n_ubatch, set(stale)
        self.clock = 0
        self.has_tie = False  # whether a row was stored that llama.cpp may rightly have stored otherwise
        self.streams = [
            Stream([Cell() for _ in range(size)], [Slot() for _ in range(min(window, size))])
            for _ in range(1 if unified else n_seq)
        ]
        self.copies: list[tuple[int, int]] = []

    def stream(self, seq: int) -> Stream:
        return self.streams[seq if len(self.streams) > 1 else 0]

    def end(self, seq: int) -> int:
        """The position of the sequence's next token."""
        return 1 + max((c.pos for c in self.stream(seq).cells if seq in c.seqs), default=-1)

    # ---- operations ----------------------------------------------------------------------------------------------

    def rm(self, seq: int, p0: int, p1: int) -> None:
        for stream in self.streams if seq < 0 else [self.stream(seq)]:
            freed = []
            for i, cell in enumerate(stream.cells):
                if cell.seqs and p0 <= cell.pos and (p1 < 0 or cell.pos < p1) and (seq < 0 or seq in cell.seqs):
                    cell.seqs = cell.seqs - {seq} if seq >= 0 else set()
                    freed += [] if cell.seqs else [i]
            stream.head = min([stream.head, *freed])

    def keep(self, seq: int) -> None:
        stream = self.stream(seq)
        freed = []
        for i, cell in enumerate(stream.cells):
            if cell.seqs and seq not in cell.seqs:
                cell.seqs = set()
                freed.append(i)
            cell.seqs &= {seq}
        stream.head = min([stream.head, *freed])

    def cp(self, src: int, dst: int) -> None:
        """All of a sequence."""
        a, b = self.stream(src), self.stream(dst)
        if a is b:
            for cell in a.cells:
                cell.seqs |= {dst} if src in cell.seqs else set()
            return
        self.copies.append((src, dst))
        for x, y in zip(a.cells, b.cells, strict=True):
            y.pos, y.shift, y.seqs = x.pos, x.shift, {dst} if src in x.seqs else set()
        b.head = a.head

    def add(self, seq: int, p0: int, p1: int, delta: int) -> None:
        for cell in self._between(seq, p0, p1):
            cell.pos += delta
            cell.shift += delta
            assert cell.pos >= 0
        self.stream(seq).head = 0

    def div(self, seq: int, p0: int, p1: int, divisor: int) -> None:
        for cell in self._between(seq, p0, p1):
            cell.shift += cell.pos - cell.pos // divisor  # llama.cpp turns these keys the wrong way
            cell.pos //= divisor

    def _between(self, seq: int, p0: int, p1: int) -> list[Cell]:
        return [cell for cell in self.stream(seq).cells if seq in cell.seqs and p0 <= cell.pos < p1]

    def clear(self) -> None:
        for stream in self.streams:
            for cell in stream.cells:
                cell.seqs, cell.shift = set(), 0
            stream.head = 0
            if "clear" not in self.stale:
                stream.forget()

    def save(self, seq: int = -1) -> list[list[Cell]]:
        """The cells of each stream, of a sequence or of all."""
        return [deepcopy([c for c in s.cells if (c.seqs if seq < 0 else seq in c.seqs)]) for s in self.streams]

    def load(self, state: list[list[Cell]], seq: int = -1) -> None:
        if seq < 0:
            self.clear()
            targets = list(zip(self.streams, state, strict=True))
        else:
            self.rm(seq, 0, -1)
            targets = [(self.stream(seq), cells) for cells in state if cells]
        for stream, saved in targets:
            where = list(range(len(saved))) if seq < 0 else self._find(stream, len(saved))
            for i, cell in zip(where, saved, strict=True):
                stream.cells[i] = Cell(cell.pos, {seq} if seq >= 0 else set(cell.seqs), 0, cell.k, cell.v)
            if "restore" not in self.stale:
                stream.forget(where)

    def _stored(self, x: np.ndarray, name: str) -> np.ndarray:
        self.has_tie = self.has_tie or is_tie(x, name)
        return stored(x, name)

    # ---- a batch -------------------------------------------------------------------------------------------------

    @staticmethod
    def _find(stream: Stream, n: int) -> list[int]:
        """Where llama.cpp would put n tokens."""
        start = 0 if stream.head > stream.used() + 2 * n else stream.head
        size = len(stream.cells)
        free = [i % size for i in range(start, start + size) if not stream.cells[i % size].seqs]
        assert len(free) >= n, "the cache is full"
        return free[:n]

    def _update(self) -> None:
        """What is pending since the last batch: copies of streams, then shifts."""
        for src, dst in self.copies:
            a, b = self.streams[src], self.streams[dst]
            for x, y in zip(a.cells, b.cells, strict=True):
                y.k, y.v = x.k, x.v
            if "copy" not in self.stale:
                b.forget()
        self.copies = []
        if not any(cell.shift for stream in self.streams for cell in stream.cells if cell.seqs):
            return
        for stream in self.streams:
            moved = [i for i, cell in enumerate(stream.cells) if cell.seqs and cell.shift]
            for cell in stream.cells:  # every key is decoded, turned and encoded
                if cell.seqs:
                    turned = self.model.rope(cell.k[None], np.array([cell.shift]))
                    cell.k, cell.shift = self._stored(turned[0], self.types[0]), 0
            if "shift" not in self.stale:
                stream.forget(moved)

    def decode(self, batch: Sequence[Item]) -> np.ndarray:
        """The logits of every token. In a cache with several streams all sequences of a batch have as many tokens."""
        self._update()
        rows: dict[int, np.ndarray] = {}
        for ubatch in self._split(batch):
            for index, row in zip(ubatch, self._compute([batch[i] for i in ubatch]), strict=True):
                rows[index] = row
        return np.stack([rows[i] for i in range(len(batch))])

    def _split(self, batch: Sequence[Item]) -> list[list[int]]:
        if len(self.streams) == 1:
            return [list(range(i, min(i + self.n_ubatch, len(batch)))) for i in range(0, len(batch), self.n_ubatch)]
        by_seq = [[i for i, item in enumerate(batch) if item[2] == seq] for seq in sorted({b[2] for b in batch})]
        assert len({len(one) for one in by_seq}) == 1
        step = self.n_ubatch // len(by_seq)
        return [[i for one in by_seq for i in one[at : at + step]] for at in range(0, len(by_seq[0]), step)]

    def _compute(self, items: list[Item]) -> list[np.ndarray]:
        tokens, positions = np.array([i[0] for i in items]), np.array([i[1] for i in items])
        q, k, v = self.model.qkv(tokens, positions)
        where = [-1] * len(items)
        for stream in self.streams:
            own = [n for n, item in enumerate(items) if self.stream(item[2]) is stream]
            if own:
                for n, i in zip(own, self._find(stream, len(own)), strict=True):
                    where[n] = i
                    kv = (self._stored(t[n], name) for t, name in zip((k, v), self.types, strict=True))
                    stream.cells[i] = Cell(items[n][1], {items[n][2]}, 0, *kv)
                stream.head = where[own[-1]] + 1
        exact = [q8(t, np.float32) for t in (k, v)]
        rows = []
        for n, (token, pos, seq) in enumerate(items):
            stream = self.stream(seq)
            tagged = {slot.cell: slot for slot in stream.slots if slot.cell >= 0}
            own = {where[m]: m for m, item in enumerate(items) if self.stream(item[2]) is stream}
            keys, values, kinds = [], [], []
            for i, cell in enumerate(stream.cells):
                if seq not in cell.seqs or cell.pos > pos:
                    continue
                if stream.slots and i in own and not (i in tagged and "store" in self.stale):
                    row = exact[0][own[i]], exact[1][own[i]], "f32"
                elif i in tagged:
                    row = tagged[i].k, tagged[i].v, self.slot
                else:
                    row = cell.k, cell.v, self.types[0]
                for column, item in zip((keys, values, kinds), row, strict=True):
                    column.append(item)
            rows.append(self.model.logits(token, self._attend(q[n], np.stack(keys), np.stack(values), kinds)))
        for stream in self.streams:
            own = [n for n, item in enumerate(items) if self.stream(item[2]) is stream]
            if own and stream.slots:
                self._assign(stream, [where[n] for n in own], [k[n] for n in own], [v[n] for n in own])
        return rows

    def _attend(self, q: np.ndarray, k: np.ndarray, v: np.ndarray, kinds: list[str]) -> np.ndarray:
        """kinds: the type of each key."""
        group = self.model.shape.heads // self.model.shape.kv_heads
        k, v = np.repeat(k, group, axis=1), np.repeat(v, group, axis=1)
        query = {kind: rounded(q, kind) for kind in set(kinds)}
        scores = np.einsum("jhd,jhd->hj", np.stack([query[kind] for kind in kinds]), k) / np.sqrt(q.shape[-1])
        weights = np.exp(scores - scores.max(-1, keepdims=True))
        return np.einsum("hj,jhd->hd", weights / weights.sum(-1, keepdims=True), v)

    def _assign(self, stream: Stream, where: list[int], k: list[np.ndarray], v: list[np.ndarray]) -> None:
        """The last cells get slots: each its own if it has one, else that of the cell that was stored longest ago."""
        first = max(0, len(where) - len(stream.slots))
        if "store" not in self.stale:
            stream.forget(where[:first])
        mine = {slot.cell: slot for slot in stream.slots if slot.cell in where[first:]}
        if "store" in self.stale:
            mine = {}
        for n in range(first, len(where)):
            others = (slot for slot in stream.slots if slot.cell not in mine)
            slot = mine.get(where[n]) or min(others, key=lambda slot: slot.written)
            self.clock += 1
            slot.cell, slot.written = where[n], self.clock
            slot.k, slot.v = (q8(t[n]) if self.slot == "q8_0" else stored(t[n], "f16") for t in (k, v))


class Twin:
    """A context of the probe and its oracle. Every batch is compared; `worst` is the largest KLD of a token so far.

    With `stale`, a second oracle keeps the tags at those events: `far` is its largest KLD, and must be far above.
    """

    def __init__(
        self, probe: Probe, model: Model, ctk: str, ctv: str, window: int, slot: str = "q8_0", *, size: int = 256,
        n_seq: int = 1, unified: bool = False, n_ubatch: int = 512, stale: Sequence[str] = (), seed: int = 0,
        **options: object,
    ) -> None:
        self.probe, self.rng = probe, np.random.default_rng(seed)
        total = size if unified else size * n_seq
        probe.context(ctk, ctv, n_ctx=total, n_seq=n_seq, unified=int(unified), n_ubatch=n_ubatch, **options)
        arguments = (model, ctk, ctv, window, slot, size, n_seq, unified, n_ubatch)
        self.oracles = [Cache(*arguments)] + ([Cache(*arguments, stale)] if stale else [])
        self.worst = self.far = 0.0
        self.states: dict[Path, list[list[list[Cell]]]] = {}

    def end(self, seq: int = 0) -> int:
        return self.oracles[0].end(seq)

    def decode(self, n: int, *seqs: int, single: bool = False) -> float:
        """n random tokens of each of the sequences, as one batch, or token by token. Returns the largest KLD."""
        if single:
            return max(self.decode(1, *seqs) for _ in range(n))
        batch: list[Item] = []
        for seq in seqs or (0,):
            tokens = self.rng.integers(0, 256, n)
            batch += [(int(token), self.end(seq) + i, seq) for i, token in enumerate(tokens)]
        for token, pos, seq in batch:
            self.probe.add([token], pos, seq)
        logits = self.probe.run()
        distances = [max_kld(oracle.decode(batch), logits) for oracle in self.oracles]
        self.worst = max(self.worst, distances[0])
        self.far = max(self.far, distances[-1])
        return distances[0]

    def _both(self, line: str, name: str, *arguments: object) -> None:
        self.probe.command(line)
        for oracle in self.oracles:
            getattr(oracle, name)(*arguments)

    def rm(self, seq: int, p0: int = 0, p1: int = -1) -> None:
        self._both(f"rm {seq} {p0} {p1}", "rm", seq, p0, p1)

    def rollback(self, n: int, seq: int = 0) -> None:
        self.rm(seq, self.end(seq) - n)

    def keep(self, seq: int) -> None:
        self._both(f"keep {seq}", "keep", seq)

    def cp(self, src: int, dst: int) -> None:
        self._both(f"cp {src} {dst} -1 -1", "cp", src, dst)

    def add(self, seq: int, p0: int, p1: int, delta: int) -> None:
        self._both(f"shift {seq} {p0} {p1} {delta}", "add", seq, p0, p1, delta)

    def div(self, seq: int, p0: int, p1: int, divisor: int) -> None:
        self._both(f"div {seq} {p0} {p1} {divisor}", "div", seq, p0, p1, divisor)

    def clear(self, data: bool) -> None:
        self._both(f"clear {int(data)}", "clear")

    def save(self, path: Path, seq: int = -1) -> None:
        self.probe.command(f"save {path}" if seq < 0 else f"saveseq {path} {seq}")
        self.states[path] = [oracle.save(seq) for oracle in self.oracles]

    def load(self, path: Path, seq: int = -1, of: Twin | None = None) -> None:
        self.probe.command(f"load {path}" if seq < 0 else f"loadseq {path} {seq}")
        for oracle, state in zip(self.oracles, (of or self).states[path], strict=True):
            oracle.load(deepcopy(state), seq)


def max_kld(base: np.ndarray, other: np.ndarray) -> float:
    """The largest KL(base || other) of a row, in nats."""
    assert base.shape == other.shape and np.isfinite(base).all() and np.isfinite(other).all()
    p, q = log_softmax(base), log_softmax(other)
    return float((np.exp(p) * (p - q)).sum(-1).max())
