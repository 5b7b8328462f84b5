"""DPO with TRL + PEFT on torch's CPU, measured: one JSON line.

    python trl_bench.py MODEL.gguf ROWS.jsonl HELD_OUT PRECISION STEPS THREADS

PRECISION is fp32, bf16 (TRL's own: autocast, weights in fp32) or bf16-weights (weights in bf16, adapter in fp32 under autocast).
The clock runs from the trainer's construction (TRL tokenises there) to the last step, reference passes included; loading the model and
the evaluation on the last HELD_OUT rows are outside.

Every adapter is judged in float32, whatever it was trained in. Under autocast PEFT adds the adapter's part, in bf16, to an output that is
rounded to bf16 already: what is less than half a step of it is gone. So bf16 sees less of an adapter than it has learnt.
"""

import json
import resource
import sys
import time
from importlib.metadata import version
from pathlib import Path

import torch

from default_model import load
from trl_training import read_rows, trainer

BATCH, SEED = 4, 7


def main() -> None:
    path, rows, held_out = Path(sys.argv[1]), read_rows(Path(sys.argv[2])), int(sys.argv[3])
    precision, steps, threads = sys.argv[4], int(sys.argv[5]), int(sys.argv[6])
    torch.set_num_threads(threads)
    model, tokenizer = load(path)
    # What TRL would use when it loads the model itself.
    model.set_attn_implementation("sdpa")
    if precision == "bf16-weights":
        model = model.to(torch.bfloat16)
    before, began = resource.getrusage(resource.RUSAGE_SELF), time.monotonic()
    run = trainer(
        "dpo", model, tokenizer, rows[:-held_out], rows[-held_out:],
        lora=dict(r=16, lora_alpha=32), seed=SEED, batch=BATCH, steps=steps, rate=1e-4, bf16=precision != "fp32",
    )
    run.train()
    wall, after = time.monotonic() - began, resource.getrusage(resource.RUSAGE_SELF)
    peak = after.ru_maxrss / 1024
    learnt = {name: value.detach().float() for name, value in run.model.named_parameters() if "lora_" in name}
    judge = trainer(
        "dpo", load(path)[0], tokenizer, rows[:BATCH], rows[-held_out:],
        lora=dict(r=16, lora_alpha=32), seed=SEED, batch=BATCH, steps=1, rate=1e-4, bf16=False,
    )
    with torch.no_grad():
        for name, value in judge.model.named_parameters():
            if name in learnt:
                value.copy_(learnt[name])
    steps_taken = [line["loss"] for line in run.state.log_history if "loss" in line]
    print(
        json.dumps(
            {
                "name": f"TRL + PEFT, {precision}",
                "pairs": steps * BATCH,
                "wall_s": wall,
                "cpu_s": after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime,
                "peak_mib": peak,
                "first_loss": steps_taken[0],
                "held_out_loss": judge.evaluate()["eval_loss"],
                "build": f"trl {version('trl')}, peft {version('peft')}, torch {version('torch')}",
            }
        )
    )


if __name__ == "__main__":
    main()
