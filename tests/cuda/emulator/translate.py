#!/usr/bin/env python3
"""Translate a preprocessed CUDA source (`g++ -E`) into C++ for the emulator, line by line.

What CUDA adds to C++ in the kernels' files, and what it becomes:

- an asm statement: calls of its instructions in emulator/instructions.h, so an unknown instruction does not compile
- `kernel<<<...>>>(...)`: an operator of emulator/include/cuda_runtime.h
- `__shared__` variables: references to the memory of the thread block
- `__global__` functions: functions that begin with a call of enter_kernel

Everything else is in headers. Text of other files, such as the host's, is kept as it is.
"""

from __future__ import annotations

import argparse
import re
import sys
from pathlib import Path


class Unknown(Exception):
    """The translator does not know a construct."""


def end_of(text: str, start: int) -> int:
    """The index behind the bracket that closes the one at `start`."""
    depth = 0
    for match in re.compile(r'"(?:\\.|[^"\\])*"|\'(?:\\.|[^\'\\])*\'|[(\[{]|[)\]}]').finditer(text, start):
        token = match[0]
        if token in "([{":
            depth += 1
        elif token in ")]}":
            depth -= 1
            if depth == 0:
                return match.end()
    raise Unknown(f"a bracket is not closed: {text[start : start + 80]}")


def split(text: str, separator: str) -> list[str]:
    """Split at a separator outside of brackets and strings."""
    parts, depth, last = [], 0, 0
    pattern = re.compile(r'"(?:\\.|[^"\\])*"|[(\[{]|[)\]}]|' + re.escape(separator))
    for match in pattern.finditer(text):
        token = match[0]
        if token in "([{":
            depth += 1
        elif token in ")]}":
            depth -= 1
        elif token == separator and depth == 0:
            parts.append(text[last : match.start()])
            last = match.end()
    return [*parts, text[last:]]


def operand(text: str, values: list[str], written: int) -> str:
    """An operand of an instruction as an argument in C++. The first `written` of the values are written."""
    text = text.strip()
    if text.startswith("{"):
        numbers = [int(part.strip()[1:]) for part in text[1:-1].split(",")]
        kinds = {number < written for number in numbers}
        if len(kinds) != 1:
            raise Unknown(f"registers that are written and others: {text}")
        function = "outputs" if kinds.pop() else "inputs"
        return f"::emulator::ptx::{function}({', '.join(values[number] for number in numbers)})"
    text = text.removeprefix("[").removesuffix("]")
    if re.fullmatch(r"%\d+", text):
        return values[int(text[1:])]
    if re.fullmatch(r"%%\w+(\.\w+)?", text):  # a special register
        return f"::emulator::ptx::{text[2:].replace('.', '_')}()"
    if re.fullmatch(r"-?\d+|0x[0-9a-f]+", text):
        return text
    raise Unknown(f"operand {text}")


def call(instruction: str, values: list[str], written: int, line: int) -> str:
    name, _, rest = instruction.strip().partition(" ")
    arguments = [operand(part, values, written) for part in split(rest, ",") if part.strip() not in ("", "_")]
    return f"::emulator::ptx::{re.sub('[.:]', '_', name)}({', '.join([str(line), *arguments])})"


def translate_asm(body: str, line: int) -> str:
    """The calls for what is between the parentheses of an asm statement."""
    parts = split(body, ":")
    strings = re.findall(r'"((?:\\.|[^"\\])*)"', parts[0])
    template = "".join(strings).replace("\\n", " ")
    values, written = [], 0
    for number, part in enumerate(parts[1:3]):
        for item in split(part, ","):
            if item.strip():
                match = re.fullmatch(r'\s*"[=+]?\w"\s*(\(.*\))\s*', item, re.DOTALL)
                if not match:
                    raise Unknown(f"operand {item}")
                values.append(" ".join(match[1].split()))
                written += number == 0
    # A loop around an instruction that gives a predicate.
    loop = re.fullmatch(r"\{ *\.reg \.pred (\w+); *(\w+): *(\S+) \1, ([^;]*); *@!\1 bra \2; *\}", template.strip())
    if loop:
        return f"while (!{call(f'{loop[3]} {loop[4]}', values, written, line)}) {{}}"
    # A predicate to and from an instruction.
    vote = re.fullmatch(
        r"\{ *\.reg \.pred (\w+), (\w+); *setp\.ne\.s32 \1, (%\d+), 0; *(\S+) \2, ([^;]*), \1; *"
        r"selp\.s32 (%\d+), 1, 0, \2; *\}",
        template.strip(),
    )
    if vote:
        given = call(f"{vote[4]} {vote[5]}, {vote[3]}", values, written, line)
        return f"{values[int(vote[6][1:])]} = {given};"
    instructions = [part for part in template.split(";") if part.strip()]
    if not instructions:
        return f"::emulator::ptx::nothing({', '.join([str(line), *values])});"
    return f"do {{ {' '.join(call(part, values, written, line) + ';' for part in instructions)} }} while (false);"


CONSTRUCT = re.compile(
    r"(?:template\s*<(?P<parameters>[^>]*)>\s*)?(?P<kernel>__global__\s+void)\b"
    r"|\basm\b(?:\s+volatile\b)?\s*(?P<asm>\()"
    r"|<<<(?P<configuration>.*?)>>>"
    r"|extern\s+__shared__\s[^;]*?(?P<dynamic>\w+)\[\];"
    r"|__shared__\s+(?:__attribute__\(\(\w+\(\d+\)\)\)\s+)?"
    r"(?P<type>[^;]*?)\s(?P<variable>\w+)(?P<size>\[[^;]*\])?;",
    re.DOTALL,
)


def translate_kernel(text: str, start: int, parameters: str | None, flush: bool) -> tuple[str, str, int]:
    """The head of a kernel, of which `start` is behind `void`; its name with the template's parameters as arguments,
    and the end of the head."""
    at, most = start, "::emulator::most_threads"
    bounds = re.compile(r"\s*__launch_bounds__\s*\(").match(text, at)
    if bounds:
        at = end_of(text, bounds.end() - 1)
        most = split(" ".join(text[bounds.end() : at - 1].split()), ",")[0]
    name = re.compile(r"\s*(\w+)\s*\(").match(text, at)
    opening = name and re.compile(r"\s*\{").match(text, end_of(text, name.end() - 1))
    if not name or not opening:
        raise Unknown(f"a kernel without a body: {text[start : start + 80]}")
    kernel = name[1]
    if parameters is not None:
        kernel += f"<{', '.join(part.split()[-1] for part in parameters.split(','))}>"
    enter = f' ::emulator::enter_kernel("{name[1]}", {most}, {str(flush).lower()});'
    return "\n" * text.count("\n", start, at) + text[at : opening.end()] + enter, kernel, opening.end()


def translate(text: str, line: int, flush: bool) -> str:
    """Translate text that begins in a line of a file of kernels."""
    out, at, kernel, shared_of = [], 0, None, None
    while match := CONSTRUCT.search(text, at):
        out.append(text[at : match.start()])
        end = match.end()
        here = line + text.count("\n", 0, match.start())
        if match["asm"]:
            end = end_of(text, match.start("asm"))
            behind = re.compile(r"\s*;").match(text, end)
            if not behind:
                raise Unknown("an asm statement without a semicolon")
            new = translate_asm(text[match.end() : end - 1], here)
            end = behind.end()
        elif match["kernel"]:
            head, kernel, at = translate_kernel(text, end, match["parameters"], flush)
            out += [match[0].replace("__global__", ""), head]
            continue
        elif match["configuration"] is not None:
            new = f"->* ::emulator::Configuration({' '.join(match['configuration'].split())})"
        elif match["dynamic"]:
            new = f"uint8_t * const {match['dynamic']} = ::emulator::dynamic_shared();"
        else:
            if kernel is None or shared_of == kernel:
                raise Unknown(f"line {here}: a kernel may have one static variable in shared memory")
            shared_of = kernel
            of = f"{match['type']}{match['size'] or ''}"
            new = f"auto & {match['variable']} = ::emulator::StaticShared<{of}, &{kernel}>::get();"
        out.append(new + "\n" * text.count("\n", match.start(), end))
        at = end
    return "".join(out) + text[at:]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", type=Path, help="the preprocessed text")
    parser.add_argument("output", type=Path)
    parser.add_argument("--folder", type=Path, required=True, help="the folder of the kernels' files")
    parser.add_argument("--flush", action="store_true", help="floats below the normal ones are zeros")
    given = parser.parse_args()
    folder = given.folder.resolve()
    # A line marker: # LINE "FILE" FLAGS
    parts = re.split(r'^(# (\d+) "(.*?)".*\n)', given.source.read_text(), flags=re.MULTILINE)
    out = [parts[0]]
    try:
        for marker, line, name, text in zip(parts[1::4], parts[2::4], parts[3::4], parts[4::4], strict=True):
            ours = folder in Path(name).resolve().parents
            out += [marker, translate(text, int(line), given.flush) if ours else text]
    except Unknown as problem:
        sys.exit(f"{name}: {problem}")
    given.output.write_text("".join(out))


if __name__ == "__main__":
    main()
