"""Helpers of the end-to-end tests: a build of llama.cpp, its programs, and the probe (probe.cpp) as a Python object."""

from __future__ import annotations

import json
import os
import re
import select
import socket
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import turboquant

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent
MODEL = ROOT / "models" / "prose-8m-q8_0.gguf"

#: The types without a block size in their names, and all types.
TURBO = tuple(info.name for info in turboquant.types() if info.family == info.name)
TURBO_ALL = tuple(info.name for info in turboquant.types())
#: Threads that wait in a barrier sleep instead of spinning, which makes small models very slow on a busy machine.
QUIET = {"OMP_WAIT_POLICY": "passive"}


class ProbeError(Exception):
    """The probe refused a command. `log` is the output of llama.cpp since the start of the probe."""

    def __init__(self, message: str, log: str) -> None:
        super().__init__(f"{message}\n{log[-2000:]}")
        self.message, self.log = message, log


@dataclass(frozen=True)
class Build:
    """A folder of built programs and libraries, and the llama.cpp tree that it was built from."""

    bin: Path
    source: Path
    probe: Path

    def program(self, name: str) -> Path:
        path = self.bin / name
        if not path.is_file():
            raise FileNotFoundError(f"{path} was not built")
        return path

    def run(
        self, name: str, *args: object, env: dict[str, str] | None = None, timeout: float = 300, check: bool = True
    ) -> Result:
        """Run a program to its end. With `check`, a non-zero status raises AssertionError with the output."""
        command = [str(self.program(name)), *map(str, args)]
        environment = {**os.environ, **QUIET, **(env or {})}
        done = subprocess.run(
            command, capture_output=True, stdin=subprocess.DEVNULL, timeout=timeout, env=environment
        )
        result = Result(
            command, done.returncode, done.stdout.decode(errors="replace"), done.stderr.decode(errors="replace")
        )
        if check:
            assert result.status == 0, f"{result.describe()}"
        return result


@dataclass(frozen=True)
class Result:
    command: list[str]
    status: int
    out: str
    err: str

    @property
    def text(self) -> str:
        return self.out + self.err

    @property
    def crashed(self) -> bool:
        """Whether a signal ended the program (abort, segmentation fault)."""
        return self.status < 0

    def describe(self) -> str:
        return f"{' '.join(self.command)}\nstatus {self.status}\n{self.out[-2000:]}\n{self.err[-4000:]}"


class Probe:
    """One process of probe.cpp with one model. Use it as a context manager."""

    def __init__(self, build: Build, model: Path, scratch: Path, env: dict[str, str] | None = None) -> None:
        self._out = scratch / f"probe-{os.getpid()}-{id(self)}.logits"
        self._log_path = self._out.with_suffix(".log")  # a file, so that it is complete when a reply arrives
        with self._log_path.open("wb") as log:
            self._process = subprocess.Popen(
                [str(build.probe)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                env={**os.environ, **QUIET, **(env or {})},
            )
        self.command(f"model {model}")

    def __enter__(self) -> Probe:
        return self

    def __exit__(self, *_: object) -> None:
        assert self._process.stdin and self._process.stdout
        try:
            self._process.stdin.close()
        except BrokenPipeError:
            pass
        try:
            self._process.wait(timeout=30)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._process.stdout.close()
        self._out.unlink(missing_ok=True)

    @property
    def log(self) -> str:
        """The output of llama.cpp so far."""
        return self._log_path.read_text(errors="replace")

    def command(self, line: str, timeout: float = 300) -> str:
        """Send a command and return what follows "ok". Raises ProbeError on "error" or when the process ends."""
        assert self._process.stdin and self._process.stdout
        reply = b""
        try:
            self._process.stdin.write(line.encode() + b"\n")
            self._process.stdin.flush()
            if select.select([self._process.stdout], [], [], timeout)[0]:
                reply = self._process.stdout.readline()
            else:
                self._process.kill()
        except BrokenPipeError:
            pass
        if not reply:
            status = self._process.wait(timeout=30)
            raise ProbeError(f"the probe ended with status {status} at: {line[:80]}", self.log)
        text = reply.decode(errors="replace").strip()
        if text == "ok" or text.startswith("ok "):
            return text[3:]
        raise ProbeError(text, self.log)

    @property
    def alive(self) -> bool:
        return self._process.poll() is None

    def context(self, ctk: str = "f16", ctv: str = "f16", **options: object) -> None:
        words = " ".join(f"{key}={value}" for key, value in options.items())
        self.command(f"context ctk={ctk} ctv={ctv} {words}")

    def tokenize(self, text: str) -> list[int]:
        path = self._out.with_suffix(".txt")
        path.write_text(text, encoding="utf-8")
        try:
            return [int(word) for word in self.command(f"tokenize {path}").split()]
        finally:
            path.unlink()

    def add(self, tokens: Iterable[int], pos: int = 0, seq: int = 0) -> None:
        self.command(f"add {seq} {pos} {' '.join(map(str, tokens))}")

    def run(self) -> np.ndarray:
        """Decode the queued tokens. Returns their logits, float32 (tokens, vocabulary)."""
        self._out.unlink(missing_ok=True)
        n_vocab = int(self.command(f"run {self._out}"))
        return np.fromfile(self._out, np.float32).reshape(-1, n_vocab)

    def logits(self, tokens: Sequence[int], pos: int = 0, seq: int = 0, step: int | None = None) -> np.ndarray:
        """Decode tokens in batches of `step` (None = all at once); returns all logits, (tokens, vocabulary)."""
        step = step or len(tokens)
        parts = []
        for start in range(0, len(tokens), step):
            self.add(tokens[start : start + step], pos + start, seq)
            parts.append(self.run())
        return np.concatenate(parts)

    def greedy(self, last: np.ndarray, n: int, pos: int, seq: int = 0) -> tuple[list[int], np.ndarray]:
        """Generate `n` greedy tokens after the logits `last`. Returns the tokens and the logits after each of them."""
        tokens: list[int] = []
        rows = []
        for i in range(n):
            tokens.append(int(last.argmax()))
            last = self.logits([tokens[-1]], pos + i, seq)[0]
            rows.append(last)
        return tokens, np.stack(rows)


def log_softmax(logits: np.ndarray) -> np.ndarray:
    x = logits.astype(np.float64)
    x -= x.max(axis=-1, keepdims=True)
    return x - np.log(np.exp(x).sum(axis=-1, keepdims=True))


def perplexity_report(text: str) -> tuple[float, float]:
    """Perplexity and mean KLD that llama-perplexity --kl-divergence printed."""
    mean = re.search(r"Mean\s+KLD:\s+([\d.]+)", text)
    ppl = re.search(r"Mean PPL\(Q\)\s*:\s+([\d.]+)", text)
    assert mean and ppl, text[-2000:]
    return float(ppl[1]), float(mean[1])


def kld(base: np.ndarray, other: np.ndarray) -> float:
    """Mean Kullback-Leibler divergence KL(base || other) over the rows of logits, in nats."""
    assert base.shape == other.shape and np.isfinite(base).all() and np.isfinite(other).all()
    p, q = log_softmax(base), log_softmax(other)
    return float((np.exp(p) * (p - q)).sum(axis=-1).mean())


def same_top(base: np.ndarray, other: np.ndarray) -> float:
    """Share of rows whose largest logit is at the same token."""
    return float((base.argmax(axis=-1) == other.argmax(axis=-1)).mean())


def random_tokens(n: int, seed: int = 0) -> list[int]:
    """Byte tokens for the random models of make_model.py."""
    return [int(t) for t in np.random.default_rng(seed).integers(0, 256, n)]


def compile_probe(bin_dir: Path, source: Path, target: Path) -> Path:
    """Compile probe.cpp against a build, unless `target` is newer than its inputs."""
    inputs = [HERE / "probe.cpp", bin_dir / "libllama.so"]
    if target.is_file() and all(target.stat().st_mtime >= path.stat().st_mtime for path in inputs):
        return target
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = target.with_name(f"{target.name}.{os.getpid()}.tmp")
    command = [os.environ.get("CXX", "c++"), "-std=c++17", "-O1", str(HERE / "probe.cpp")]
    command += ["-I", str(source / "include"), "-I", str(source / "ggml" / "include")]
    command += ["-L", str(bin_dir), "-lllama", "-lggml", "-lggml-base"]
    command += [f"-Wl,-rpath,{bin_dir}", f"-Wl,-rpath-link,{bin_dir}", "-o", str(temporary)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    os.replace(temporary, target)
    return target


def run_beside_glue(build: Build, source: str, folder: Path, *args: object) -> None:
    """Compile a test of the glue's headers against a build and run it; its output lists the failures."""
    program = folder / Path(source).stem
    glue = build.source.parent / "native"
    command = [os.environ.get("CXX", "c++"), "-std=c++17", "-O1", str(HERE / source)]
    command += [f"-I{build.source / folder}" for folder in ("src", "include", "ggml/include", "ggml/src")]
    command += [f"-I{glue / folder}" for folder in ("ggml_types", "cpp/include")]
    command += [f"-L{build.bin}", "-lllama", "-lggml", "-lggml-base", "-lggml-cpu"]
    command += [f"-Wl,-rpath,{build.bin}", f"-Wl,-rpath-link,{build.bin}", "-o", str(program)]
    compiled = subprocess.run(command, check=False, capture_output=True, text=True)
    assert compiled.returncode == 0, compiled.stderr
    done = subprocess.run([program, *map(str, args)], check=False, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def kv_sizes(log: str) -> list[dict[str, object]]:
    """The "K (type): x MiB, V (type): y MiB" lines of the KV cache, in order."""
    line = re.compile(r"size =\s*([\d.]+) MiB .*?K \((\S+?)\):\s*([\d.]+) MiB, V \((.+?)\):\s*([\d.]+) MiB")
    return [
        {"total": float(m[1]), "type_k": m[2], "k": float(m[3]), "type_v": m[4], "v": float(m[5])}
        for m in line.finditer(log)
    ]


class Server:
    """A llama-server process on a free port of this machine. Use it as a context manager."""

    def __init__(self, build: Build, model: Path, *args: object, log: Path, env: dict[str, str] | None = None) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        self._log_path = log
        self._log_file = log.open("wb")
        command = [str(build.program("llama-server")), "-m", str(model), "--host", "127.0.0.1"]
        command += ["--port", str(self.port), "--no-warmup", *map(str, args)]
        self._process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=self._log_file,
            stderr=subprocess.STDOUT,
            env={**os.environ, **QUIET, **(env or {})},
        )

    def __enter__(self) -> Server:
        try:
            self._wait_until_ready()
        except BaseException:
            self.__exit__()
            raise
        return self

    def _wait_until_ready(self) -> None:
        deadline = time.monotonic() + 120
        while time.monotonic() < deadline:
            if self._process.poll() is not None:
                raise AssertionError(f"llama-server ended with status {self._process.returncode}\n{self.log[-4000:]}")
            try:
                if self.request("GET", "/health")[0] == 200:
                    return
            except OSError:
                pass
            time.sleep(0.05)
        raise AssertionError(f"llama-server is not ready\n{self.log[-4000:]}")

    def __exit__(self, *_: object) -> None:
        self._process.terminate()
        try:
            self._process.wait(timeout=30)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._log_file.close()

    @property
    def log(self) -> str:
        return self._log_path.read_text(errors="replace")

    @property
    def alive(self) -> bool:
        return self._process.poll() is None

    def request(self, method: str, path: str, body: object = None) -> tuple[int, dict[str, Any]]:
        """Status and JSON body of one HTTP request; an error status does not raise."""
        request = urllib.request.Request(
            f"http://127.0.0.1:{self.port}{path}",
            data=None if body is None else json.dumps(body).encode(),
            headers={"Content-Type": "application/json"},
            method=method,
        )
        opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        try:
            with opener.open(request, timeout=300) as response:
                return response.status, json.loads(response.read())
        except urllib.error.HTTPError as problem:
            return problem.code, json.loads(problem.read())

    def complete(self, prompt: str, n: int, slot: int = -1, **more: object) -> dict[str, Any]:
        """Greedy completion; the reply's "tokens" holds the generated tokens."""
        body = {"prompt": prompt, "n_predict": n, "temperature": 0.0, "id_slot": slot, "cache_prompt": True}
        status, reply = self.request("POST", "/completion", {**body, "return_tokens": True, **more})
        assert status == 200, reply
        return reply
