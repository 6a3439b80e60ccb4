"""llama.cpp's own tests of quantized types, applied to the turbo types; and the hooks on every tested tree."""

from __future__ import annotations

import re

import pytest
from harness import TURBO_ALL

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


_ANY = "turbo[234](_tcq)?(_64|_32)?"
#: In each family one type of each block size and of each number of bits.
ATTENTION = ("turbo4", "turbo3_64", "turbo2_32", "turbo2_tcq", "turbo4_tcq_64", "turbo3_tcq_32")
#: The operations on a cache of the types, and the test cases of llama.cpp that run. Of three thousand cases of
#: attention a tenth runs, with short and long batches.
OPERATIONS = {
    "FLASH_ATTN_EXT": f"kv=512,nb=(1|75),.*type_K=({'|'.join(ATTENTION)}),",
    "SET_ROWS": f"type={_ANY}\\b|type_dst={_ANY}\\b",
    "GET_ROWS": f"type={_ANY}\\b",
    "CPY": f"type_src={_ANY}\\b|type_dst={_ANY}\\b",
    "MUL_MAT": f"type_a={_ANY}\\b",
}


@pytest.mark.parametrize("operation", OPERATIONS)
def test_backend_ops(build, operation: str) -> None:
    """The CPU backend against its reference implementation."""
    case = ("-o", operation, "-p", OPERATIONS[operation])
    result = build.run("test-backend-ops", "test", "-b", "CPU", "-j", 2, *case, timeout=900)
    text = ANSI.sub("", result.text)
    passed = re.search(r"(\d+)/(\d+) tests passed", text)
    assert passed and passed[1] == passed[2], result.describe()
    assert int(passed[2]) > 0, "no test case has our types"
    ran = [line for line in text.splitlines() if re.search(r"turbo\d", line) and line.rstrip().endswith("OK")]
    for name in ATTENTION if operation == "FLASH_ATTN_EXT" else TURBO_ALL:
        assert any(re.search(rf"\b{name}\b", line) for line in ran), f"{operation} was not tested with {name}"
