"""DPO pairs per second, ours beside TRL + PEFT on torch's CPU, with one line per trick; rewrites a part of docs/benchmarks.md.

    python tests/bench_train.py BENCH MODEL.gguf ORACLE_PYTHON [--steps N] [--rounds N] [--rivals fp32,bf16,bf16-weights] [--each]

BENCH is the program of `cargo bench -p tidemill-rlhf --bench train`, ORACLE_PYTHON that of the oracle's environment (`make oracle`).
Every round measures all of them one after the other, so that what else the machine does falls on all alike; processor seconds stand
beside those of the clock for the same reason. Only the standard library is used.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from document import machine, put

ROOT = Path(__file__).resolve().parents[1]
DOCUMENT = ROOT / "docs/benchmarks.md"
TRICKS = {
    "shared-prompt": "prompt computed once per completion",
    "packing": "texts padded to the longest",
    "kept-reference": "reference computed in every step",
    "labels-only": "all logits of all rows, by candle",
    "frozen-weights": "gradients of frozen weights, too",
    "bf16": "products in f32",
    "all": "all of these together (naive)",
}
HELD_OUT = 16


def run(command: list[str], environment: dict[str, str]) -> dict:
    found = subprocess.run(command, env={**os.environ, **environment}, stdout=subprocess.PIPE, text=True, cwd=ROOT / "tests/oracle")
    if found.returncode:
        sys.exit(f"{' '.join(command)} failed")
    return json.loads(found.stdout.splitlines()[-1])


def load() -> float:
    return os.getloadavg()[0]


def measure(options, rows: Path) -> tuple[dict[str, list[dict]], list[float]]:
    """Name to one result per round, and the machine's load before each measurement."""
    results, loads = {}, []
    offline = {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_VERBOSITY": "error", "PYTHONDONTWRITEBYTECODE": "1", "PYTHONWARNINGS": "ignore"}
    offline["OMP_NUM_THREADS"] = offline["RAYON_NUM_THREADS"] = str(options.threads)
    ours = [options.bench, "--model", options.model, "--rows", str(rows), "--held-out", str(HELD_OUT), "--steps", str(options.steps)]
    ours += ["--threads", str(options.threads)]
    plan = [("Tidemill", ours)]
    rival = [options.python, str(ROOT / "tests/oracle/trl_bench.py"), options.model, str(rows), str(HELD_OUT)]
    plan += [(f"TRL + PEFT, {p}", [*rival, p, str(options.steps), str(options.threads)]) for p in options.rivals.split(",") if p]
    if options.each:
        plan += [(trick, [*ours, "--without", trick]) for trick in TRICKS]
    for _ in range(options.rounds):
        for name, command in plan:
            loads.append(load())
            result = run(command, offline)
            results.setdefault(name, []).append(result)
            print(name, json.dumps(result), flush=True)
    return results, loads


def median(results: list[dict], key: str) -> float:
    return statistics.median(result[key] for result in results)


def table(results: dict[str, list[dict]], names: list[str], titles: dict[str, str], base: str) -> list[str]:
    """One line per measurement; × is the first line's pairs per second over its own, by the clock and by processor time."""
    lines = [
        "| | pairs/s | × | pairs per processor second | × | peak memory, MiB | held-out loss |",
        "|---|--:|--:|--:|--:|--:|--:|",
    ]
    pace = lambda name, key: median(results[name], "pairs") / median(results[name], key)
    for name in names:
        wall, cpu = pace(name, "wall_s"), pace(name, "cpu_s")
        factors = [pace(base, key) / own for key, own in [("wall_s", wall), ("cpu_s", cpu)]]
        marks = ["", ""] if name == base else [f"{factor:.2f}" for factor in factors]
        title = titles.get(name, name)
        lines.append(
            f"| {title} | {wall:.2f} | {marks[0]} | {cpu:.2f} | {marks[1]} | {median(results[name], 'peak_mib'):.0f} "
            f"| {median(results[name], 'held_out_loss'):.4f} |"
        )
    return lines


def document(options, results: dict[str, list[dict]], loads: list[float]) -> str:
    ours, rivals = results["Tidemill"][0], [name for name in results if name.startswith("TRL")]
    lines = [
        f"{time.strftime('%Y-%m-%d')}. {machine()}; {options.threads} threads each. DPO on SmolLM2-135M-Instruct (Q4_1), LoRA r 16 on "
        f"every linear layer, {options.steps} steps of 4 pairs of {ours['tokens_a_side']:.0f} tokens a side, {HELD_OUT} pairs held out; "
        f"{options.rounds} round(s). Load of the machine before each measurement: {min(loads):.1f} to {max(loads):.1f}.",
        "",
        *table(results, ["Tidemill", *rivals], {}, "Tidemill"),
        "",
    ]
    if rivals:
        lines += [f"Rival: {results[rivals[0]][0]['build']}. The loss before training is {ours['first_loss']:.4f}.", ""]
    if options.each:
        titles = {"Tidemill": "everything on", **TRICKS}
        lines += ["One trick undone at a time:", "", *table(results, ["Tidemill", *TRICKS], titles, "Tidemill"), ""]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bench")
    parser.add_argument("model")
    parser.add_argument("python")
    parser.add_argument("--steps", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--rivals", default="fp32,bf16,bf16-weights")
    parser.add_argument("--each", action="store_true")
    options = parser.parse_args()
    options.bench, options.model = os.path.abspath(options.bench), os.path.abspath(options.model)
    # Not resolved: a virtual environment is known by the path of its link.
    options.python = os.path.abspath(options.python)
    with tempfile.TemporaryDirectory() as folder:
        rows = Path(folder) / "rows.jsonl"
        made = subprocess.run(
            [sys.executable, ROOT / "tests/oracle/trl_rows.py", "long", str(options.steps * 4 + HELD_OUT), "7"], stdout=subprocess.PIPE, check=True
        )
        rows.write_bytes(made.stdout)
        results, loads = measure(options, rows)
    put(DOCUMENT, "train", document(options, results, loads))


if __name__ == "__main__":
    main()
