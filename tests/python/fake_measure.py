"""A stand-in for turboquant-measure, which simulates a model with the costs of K and V in the file costs.json.

The KLD of a plan is the noise floor plus, for each layer and side, the cost times the relative error of the type,
limited to 2 nats. For the text of the check (chunk 0) it is 1.5 times as high. Every plan is appended to runs.txt.
Files in the folder of the program change its behaviour: with "stop" it waits in the run with that number until it is
killed, with "refuse" it refuses plans with types that contain that text, with "windows" it appends the environment
variable of the exact window to that file, with "other" it reports other types, and "short" is the number of chunks.
"""

from __future__ import annotations

import json
import stat
import sys
from pathlib import Path
from typing import Any

ERRORS = {
    "f16": 0.0, "q8_0": 3e-5, "q4_0": 0.006, "turbo4": 0.0095, "turbo3": 0.0345, "turbo2": 0.1175,
    "turbo4_tcq": 0.006, "turbo3_tcq": 0.0212, "turbo2_tcq": 0.0747,
}  # fmt: skip

SCRIPT = '''#!{python}
import json, math, os, sys, time
from pathlib import Path

ERRORS = {errors!r}
here = Path(__file__).parent
costs = json.loads((here / "costs.json").read_text())
model, text, first, count, context, threads, gpu_layers, scratch = sys.argv[1:]
say = lambda **record: print(json.dumps(record), flush=True)
option = lambda name: (here / name).read_text() if (here / name).exists() else None

if (here / "windows").exists():
    with open(here / "windows", "a") as file:
        print(os.environ.get("LLAMA_ARG_CACHE_WINDOW"), file=file)
available = int(option("short") or 1000) * 512 // int(context)
first = available * int(first[:-1]) // 100 if first.endswith("%") else int(first)
layers = [dict(layer=i, window=bool(one.get("window"))) for i, one in enumerate(costs["layers"]) if one]
say(record="model", model=dict(architecture="llama", layers=len(costs["layers"])), vocabulary=258,
    available=available, first=first, window=costs.get("swa", 0), layers=layers)
if first + int(count) > available:
    say(record="error", why=f"{{text}} has {{available}} chunks of {{context}} tokens: give a longer text")
    sys.exit(1)
open(scratch, "x").close()
say(record="step", done=int(count), of=int(count))
say(record="base", nll=3.0)

def compact(types):
    runs = []
    for one in types:
        name = one or "-"
        if name.startswith("turbo"):
            name += costs.get("block", "")
        if runs and runs[-1][0] == name:
            runs[-1][1] += 1
        else:
            runs.append([name, 1])
    return ",".join(name if count == 1 else f"{{name}}*{{count}}" for name, count in runs)

for line in sys.stdin:
    plan = json.loads(Path(line.strip().removeprefix("plan ")).read_text())
    with open(here / "runs.txt", "a") as file:
        print(first, compact(plan["k"]), compact(plan["v"]), file=file)
    if (stop := option("stop")) and len((here / "runs.txt").read_text().splitlines()) == int(stop):
        (here / "waiting").touch()
        time.sleep(600)
    if (refused := option("refuse")) and any(one and refused in one for one in plan["k"] + plan["v"]):
        say(record="failure", why=f"turboquant: no {{refused}} today")
        continue
    kld = 0
    for index, one in enumerate(costs["layers"]):
        for side in "kv" if one else "":
            kld += 2 * math.tanh(one[side] * ERRORS[plan[side][index]] / 2)
    kld = (kld + costs["floor"]) * (1.5 if first == 0 else 1)
    say(record="step", done=int(count), of=int(count))
    say(record="result", kld=kld if not option("nan") else None, error=kld / 20, same_top=1 - kld / 3, nll=3 + kld,
        chunks=[kld] * int(count), types=option("other") or f"K {{compact(plan['k'])}}; V {{compact(plan['v'])}}")
'''


def write_measure(folder: Path, layers: list[dict[str, Any] | None], **more: Any) -> Path:
    """Write the program to `folder`; `layers` have their "k" and "v", KLD per unit of relative error."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "costs.json").write_text(json.dumps({"floor": 0.004, **more, "layers": layers}), encoding="utf-8")
    program = folder / "turboquant-measure"
    program.write_text(SCRIPT.format(python=sys.executable, errors=ERRORS), encoding="utf-8")
    program.chmod(program.stat().st_mode | stat.S_IXUSR)
    return folder
