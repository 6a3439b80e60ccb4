"""Stand-ins for llama.cpp's programs in tests of `turboquant compare`: scripts with the output format of the programs.

`perplexity` has a KLD for every pair and path, `completion` finds the hidden number unless V is turbo2, and `bench` is
slower at greater depths. Each appends its arguments to runs.txt, and `perplexity` the sizes of its batches to
batches.txt. Files in the folder of the programs change their behaviour: the pair named in "broken" has a wrong
one-token path, the pair in "nan" has no finite predictions, llama-completion and llama-bench fail for the pair in
"unasked", and llama-perplexity fails for types that contain the text in "unsupported". With "window" the build has an exact window, of 256 tokens by default, which divides a KLD by 10 in batches
and by 5 token by token. With "damaged" the model predicts NaN, with "types" the log has these types of the layers, and
with "slow" llama-perplexity waits, token by token, until it is killed.
"""

from __future__ import annotations

import stat
import sys
from pathlib import Path

#: KLD in batches and token by token, by pair.
KLD = {
    "f16": (0.0, 0.0004),
    "q8_0": (0.0007, 0.0008),
    "q4_0": (0.0132, 0.0135),
    "turbo4": (0.0092, 0.0093),
    "turbo3": (0.0434, 0.0441),
    "turbo2": (0.19, 0.192),
    "q8_0/turbo3": (0.0112, 0.0111),
    "turbo4_tcq": (0.0058, 0.0059),
    "turbo3_tcq": (0.0266, 0.0271),
    "turbo2_tcq": (0.121, 0.122),
    "q8_0/turbo3_tcq": (0.0069, 0.0068),
}
MIB = {"f16": 8.0, "q8_0": 4.25, "q4_0": 2.25, "turbo4": 2.0625, "turbo3": 1.5625, "turbo2": 1.0625}
MIB |= {f"{name}_tcq": size for name, size in MIB.items() if name.startswith("turbo")}

SCRIPT = '''#!{python}
import json, os, re, sys, time
from pathlib import Path

KLD, MIB, HELP, BASE, DIVERGENCE = {texts!r}
args, here = sys.argv[1:], Path(__file__).parent
name = Path(__file__).name
if args == ["--help"]:
    print(HELP)
    print("--cache-window N[:TYPE]" if (here / "window").exists() else "")
    sys.exit()
value = lambda option: args[args.index(option) + 1]
k, v = value("-ctk"), value("-ctv")
pair = k if k == v else k + "/" + v
log = lambda text: print("0.00.001.000 " + text, file=sys.stderr)
alone = "-ub" in args and value("-ub") == "1"
named = lambda file: (here / file).exists() and (here / file).read_text() == pair
asked = os.environ.get("LLAMA_ARG_CACHE_WINDOW")
newest, _, window_type = (asked or "256").partition(":")
newest = int(newest) if (here / "window").exists() and "turbo" in k + v else 0
with open(here / "runs.txt", "a") as file:
    file.write(name + " " + pair + (" token by token" if alone else "") + (f" window {{asked}}" if asked else "") + "\\n")

if name != "llama-perplexity" and named("unasked") and value("-n") != "1":
    log("E main: no kernel for this type")
    sys.exit(1)
if name == "llama-bench":
    depth = int(value("-d"))
    common = dict(build_commit="abc1234", build_number=7, cpu_info="A CPU", gpu_info="", backends="CPU", n_depth=depth)
    for prompt, generated, speed in ((512, 0, 900), (0, 32, 100)):
        rate = speed / (1 + depth / 1000)
        print(json.dumps(dict(common, n_prompt=prompt, n_gen=generated, avg_ts=rate, stddev_ts=rate / 50)))
elif name == "llama-completion":
    prompt = Path(value("-f")).read_text()
    tokens = len(prompt) // 4
    if tokens > int(value("-c")) - 4:
        log(f"E main: prompt is too long ({{tokens}} tokens, max {{int(value('-c')) - 4}})")
        sys.exit(1)
    number = re.search(r"is (\\d{{5}})", prompt)[1]
    print("", "00000" if v == "turbo2" else number)
    log("I common_perf_print: total time = 119.14 ms / 217 tokens")
else:
    if (here / "unsupported").exists() and (here / "unsupported").read_text() in k + v:
        log(f"E turboquant: GPU0 holds the KV cache of layer 0 and cannot run SET_ROWS on {{k}}")
        sys.exit(1)
    if k == "q5_0":
        log("E llama_init_from_model: K type q5_0 does not work with this model: use -ctk f16")
        log("E common_init_from_params: failed to create context")
        sys.exit(1)
    if newest:
        log(f"I turboquant: window: the newest {{newest}} tokens in {{window_type or 'q8_0'}} (6 of 6 layers), "
            f"{{newest / 512:.2f}} MiB")
    log(f"I llama_kv_cache: size = {{MIB[k] + MIB[v]:7.2f}} MiB (  2048 cells,   6 layers,  1/1 seqs), "
        f"K ({{k}}): {{MIB[k]:7.2f}} MiB, V ({{v}}): {{MIB[v]:7.2f}} MiB")
    if (here / "types").exists():
        log("I turboquant: cache types: " + (here / "types").read_text())
    base = Path(value("--kl-divergence-base"))
    with open(here / "batches.txt", "a") as file:
        print(pair, value("-ub") if "-ub" in args else "-", file=file)
    if "--kl-divergence" not in args:
        base.write_text("predictions")
        if (here / "damaged").exists():
            print("[1]nan,[2]nan,[3]nan,[4]nan,")
            log("E Unexpected negative standard deviation of log(prob)")
            sys.exit()
        print(BASE.replace("over 4 chunks", f"over {{value('--chunks')}} chunks"))
        sys.exit()
    assert base.read_text() == "predictions"
    if alone and (here / "slow").exists():
        (here / "sleeping").touch()
        time.sleep(600)
    unfused = args[::-1][args[::-1].index("-fa") - 1] == "off"
    kld = 1.5 if alone and named("broken") else KLD[pair][alone]
    kld /= 1 if not newest else 5 if alone else 10
    lost = named("nan") or unfused and named("nan unfused")
    told = f"{{kld:10.6f}} ± {{kld / 40:10.6f}}" if not lost else "nan ± nan"
    print(DIVERGENCE.replace("0.010706 ±   0.000272", told))
'''


def write_programs(folder: Path, help: str, base: str, divergence: str) -> None:
    """Write llama-perplexity, llama-completion and llama-bench to `folder`, with what they print."""
    folder.mkdir(parents=True, exist_ok=True)
    script = SCRIPT.format(python=sys.executable, texts=(KLD, MIB, help, base, divergence))
    for name in ("llama-perplexity", "llama-completion", "llama-bench"):
        program = folder / name
        program.write_text(script, encoding="utf-8")
        program.chmod(program.stat().st_mode | stat.S_IXUSR)
