"""llama-server: slots, their files, context shift."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import pytest
from harness import Server

PROMPTS = ("The old man looked at the sea and", "She opened the letter with trembling hands, and")


@pytest.fixture
def serve(build, prose_model, tmp_path):
    """Starts servers of the bundled model: serve(ctk, ctv, *arguments)."""
    started: list[Server] = []
    (tmp_path / "slots").mkdir()

    def start(ctk: str, ctv: str, *args: object, model=prose_model) -> Server:
        server = Server(
            build, model, "-ctk", ctk, "-ctv", ctv, "--slot-save-path", tmp_path / "slots", *args,
            log=tmp_path / f"server-{len(started)}.log",
        )
        started.append(server)
        return server.__enter__()

    yield start
    for server in started:
        server.__exit__()


@pytest.mark.parametrize(("ctk", "ctv"), [("turbo4", "turbo4"), ("q8_0", "turbo3")])
def test_slot_save_and_restore(serve, ctk: str, ctv: str) -> None:
    prompt = PROMPTS[0]
    server = serve(ctk, ctv, "-c", 1024, "-np", 1)
    first = server.complete(prompt, 24, slot=0)
    status, saved = server.request("POST", "/slots/0?action=save", {"filename": "slot"})
    assert status == 200 and saved["n_saved"] > 0, saved
    more = prompt + first["content"]
    live = server.complete(more, 24, slot=0)
    assert server.request("POST", "/slots/0?action=erase")[0] == 200
    status, restored = server.request("POST", "/slots/0?action=restore", {"filename": "slot"})
    assert status == 200 and restored["n_restored"] == saved["n_saved"], restored
    restored_then = server.complete(more, 24, slot=0)
    assert restored_then["timings"]["cache_n"] == live["timings"]["cache_n"] > 0, "the restored slot was not used"
    assert restored_then["tokens"] == live["tokens"]

    # A server with another type refuses the file with a message, and continues.
    other = serve("turbo3", "turbo3", "-c", 1024, "-np", 1)
    status, reply = other.request("POST", "/slots/0?action=restore", {"filename": "slot"})
    assert status == 400 and "error" in reply, reply
    assert "mismatched key type" in other.log
    assert len(other.complete(prompt, 8)["tokens"]) == 8
    assert other.alive


@pytest.mark.parametrize("streams", ["--kv-unified", "--no-kv-unified"])
def test_two_slots_at_once(serve, streams: str) -> None:
    server = serve("turbo4", "turbo3", "-c", 2048, "-np", 2, streams)
    alone = [server.complete(prompt, 32, slot=i, cache_prompt=False)["tokens"] for i, prompt in enumerate(PROMPTS)]
    with ThreadPoolExecutor(2) as pool:
        both = list(pool.map(lambda i: server.complete(PROMPTS[i], 32, slot=i, cache_prompt=False)["tokens"], (0, 1)))
    assert alone[0] != alone[1]
    for one, other in zip(alone, both, strict=True):
        assert len(other) == 32
        assert one[:6] == other[:6]


def test_context_shift(serve) -> None:
    server = serve("turbo4", "turbo4", "-c", 256, "-np", 1, "--context-shift")
    reply = server.complete(PROMPTS[0], 400, ignore_eos=True, temperature=1.0, seed=1)
    assert len(reply["tokens"]) == 400
    assert server.log.count("context shift") >= 2, server.log[-3000:]
    assert len(set(reply["tokens"][-80:])) > 20, "it should still be text"
    assert server.alive


def test_context_shift_refused_with_a_reason(serve, tiny) -> None:
    server = serve("turbo4", "turbo4", "-c", 256, "-np", 1, "--context-shift", model=tiny("partial"))
    assert server.alive
    assert "no context shift: the model rotates 32 of 128 values" in server.log, server.log[-3000:]
    reply = server.complete("hello", 400, ignore_eos=True)
    assert reply["truncated"] or len(reply["tokens"]) < 400
    assert server.alive
