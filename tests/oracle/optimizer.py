"""torch's AdamW with clipping and parameter groups, and transformers' schedules, on fixed numbers.

    optimizer.py OUTPUT.json
"""

import json
import sys

import torch
import transformers

STEPS = 12


def gradient(step: int, parameter: int, count: int) -> list[float]:
    """Whole 64ths, so that they are exact in float32 and in JSON."""
    return [((step * 37 + parameter * 101 + place * 53) % 129 - 64) / 64 for place in range(count)]


def adamw() -> dict:
    first = torch.nn.Parameter(torch.tensor([0.5, -1.25, 2.0, 0.0, -0.125]))
    second = torch.nn.Parameter(torch.tensor([1.0, -3.0, 0.25]))
    groups = [{"params": [first], "weight_decay": 0.1}, {"params": [second], "weight_decay": 0.0, "lr": 0.05}]
    optimizer = torch.optim.AdamW(groups, lr=0.01, betas=(0.9, 0.999), eps=1e-8, foreach=False)
    schedule = transformers.get_cosine_schedule_with_warmup(optimizer, 3, STEPS)
    trace = []
    for step in range(STEPS):
        for index, parameter in enumerate((first, second)):
            parameter.grad = torch.tensor(gradient(step, index, parameter.numel()))
        norm = torch.nn.utils.clip_grad_norm_([first, second], 1.0, foreach=False)
        rate = optimizer.param_groups[0]["lr"]
        optimizer.step()
        schedule.step()
        trace.append({"learning_rate": rate, "grad_norm": norm.item(), "first": first.tolist(), "second": second.tolist()})
    moments = {name: [optimizer.state[p][key].tolist() for p in (first, second)] for name, key in (("mean", "exp_avg"), ("square", "exp_avg_sq"))}
    return {"trace": trace, **moments}


def schedules() -> list[dict]:
    found = []
    for name in ("constant", "constant_with_warmup", "linear", "cosine"):
        for warmup, total in ((0, 10), (3, 10), (12, 10)):
            optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
            schedule = transformers.get_scheduler(name, optimizer, num_warmup_steps=warmup, num_training_steps=total)
            rates = []
            for _ in range(total + 2):
                rates.append(optimizer.param_groups[0]["lr"])
                optimizer.step()
                schedule.step()
            found.append({"name": name, "warmup": warmup, "total": total, "rates": rates})
    return found


made_with = {"torch": torch.__version__.split("+")[0], "transformers": transformers.__version__}
with open(sys.argv[1], "w") as file:
    json.dump({"made_with": made_with, "adamw": adamw(), "schedules": schedules()}, file, indent=1)
    file.write("\n")
