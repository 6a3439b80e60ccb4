"""llama.cpp's own tests of quantized types, with ours among them; and the hooks on every tree they are proven with."""

from __future__ import annotations

import re

import pytest
from harness import TURBO, TURBO_ALL

ANSI = re.compile(r"\x1b\[[0-9;]*m")


def test_quantize_fns(build) -> None:
    result = build.run("test-quantize-fns", "-v")
    lines = ANSI.sub("", result.text).splitlines()
    for name in TURBO_ALL:
        mine = [line for line in lines if line.split()[:1] == [name]]
        checks = ("absolute quantization error", "reference implementation error", "dot product error")
        for check in checks:
            assert any(check in line and "ok" in line for line in mine), (name, check, mine)
    assert "0 tests failed" in result.text


#: Operations that a cache of our types goes through.
OPERATIONS = {
    "FLASH_ATTN_EXT": r"type_K={0}\b|type_V={0}\b",
    "SET_ROWS": r"type={0}\b|type_dst={0}\b",
    "GET_ROWS": r"type={0}\b",
    "CPY": r"type_src={0}\b|type_dst={0}\b",
    "MUL_MAT": r"type_a={0}\b",
}


@pytest.mark.parametrize("operation", OPERATIONS)
def test_backend_ops(build, operation: str) -> None:
    """The CPU backend against its reference implementation."""
    pattern = OPERATIONS[operation].replace("{0}", "turbo[234](_64|_32)?")
    result = build.run("test-backend-ops", "test", "-b", "CPU", "-o", operation, "-p", pattern, timeout=600)
    text = ANSI.sub("", result.text)
    passed = re.search(r"(\d+)/(\d+) tests passed", text)
    assert passed and passed[1] == passed[2], result.describe()
    assert int(passed[2]) > 0, "no test case has our types"
    ran = [line for line in text.splitlines() if re.search(r"turbo\d", line) and line.rstrip().endswith("OK")]
    # llama.cpp's list of attention cases has heads of 64 alone for types other than f16
    for name in [f"{name}_64" for name in TURBO] if operation == "FLASH_ATTN_EXT" else TURBO:
        assert any(re.search(rf"\b{name}\b", line) for line in ran), f"{operation} was not tested with {name}"
