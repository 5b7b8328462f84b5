"""Losses of TRL's RLOO and GRPO and their derivatives on small tensors, in float64.

    python online.py OUT.json

TRL's own `_compute_loss` runs on log-probabilities that are given, in place of a model's. Every number is a multiple of 1/64, so
that float32 holds it.
"""

import random
import sys
from importlib.metadata import version
from pathlib import Path
from types import SimpleNamespace

import torch
from trl import GRPOTrainer, RLOOTrainer

from recorded import versions, write_json

LENGTHS = [2, 3, 1, 4]
LOW, HIGH = 0.1875, 0.25


class Accelerator:
    """What a trainer asks of many processes, of one."""

    num_processes, sync_gradients = 1, True

    @staticmethod
    def gather(x):
        return x

    gather_for_metrics = gather

    @staticmethod
    def reduce(x, reduction=None):
        return x


class Metrics(dict):
    def __missing__(self, key):
        self[key] = []
        return self[key]


def padded(rows: list[list[float]]) -> torch.Tensor:
    rows = [torch.tensor(row, dtype=torch.float64) for row in rows]
    return torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)


def given(rng: random.Random, below: float, above: float) -> list[list[float]]:
    return [[rng.randint(int(below * 64), int(above * 64)) / 64 for _ in range(length)] for length in LENGTHS]


def measured(kind, fields: dict, now, old, reference, advantages) -> dict:
    log_probs = padded(now).requires_grad_()
    mask = padded([[1.0] * length for length in LENGTHS])
    ids = torch.zeros(len(LENGTHS), max(LENGTHS), dtype=torch.long)
    trainer = SimpleNamespace(
        _get_per_token_logps_and_entropies=lambda *_, **__: (log_probs, torch.zeros_like(log_probs), None),
        aux_loss_enabled=False,
        top_entropy_quantile=1.0,
        off_policy_mask_threshold=None,
        importance_sampling_level="token",
        beta=fields.get("beta", 0.0),
        loss_type=fields.get("loss_type", "dapo"),
        max_completion_length=fields.get("max_completion_length", 256),
        epsilon_low=LOW,
        epsilon_high=HIGH,
        use_vllm=False,
        current_gradient_accumulation_steps=1,
        _entropy_bonus_enabled=False,
        args=SimpleNamespace(delta=None, use_bias_correction_kl=False, steps_per_generation=1),
        accelerator=Accelerator(),
        model=SimpleNamespace(training=True),
        _metrics={"train": Metrics()},
    )
    inputs = {
        "prompt_ids": ids[:, :1],
        "prompt_mask": torch.ones_like(ids[:, :1]),
        "completion_ids": ids,
        "completion_mask": mask,
        "advantages": torch.tensor(advantages, dtype=torch.float64),
        "old_per_token_logps": padded(old),
        "old_logps": padded(old).sum(1),
        "ref_per_token_logps": padded(reference),
        "num_items_in_batch": mask.sum(),
    }
    loss = kind._compute_loss(trainer, None, inputs)
    loss.backward()
    gradient = [row[:length] for row, length in zip(log_probs.grad.tolist(), LENGTHS)]
    return {"fields": {**fields, "epsilon": LOW, "epsilon_high": HIGH}, "loss": loss.item(), "gradient": gradient}


def main() -> None:
    rng = random.Random(5)
    old = given(rng, -2.5, -0.25)
    now = [[o + d for o, d in zip(olds, moved)] for olds, moved in zip(old, given(rng, -0.5, 0.5))]
    reference = [[o + d for o, d in zip(olds, moved)] for olds, moved in zip(old, given(rng, -0.25, 0.25))]
    advantages = [1.25, -0.75, -1.0, 0.5]
    cases = [
        (RLOOTrainer, {"method": "rloo"}),
        (GRPOTrainer, {"method": "grpo", "loss_type": "dapo"}),
        (GRPOTrainer, {"method": "grpo", "loss_type": "grpo", "beta": 0.0625}),
        (GRPOTrainer, {"method": "grpo", "loss_type": "dr_grpo", "max_completion_length": 16}),
    ]
    shared = dict(now=now, old=old, reference=reference, advantages=advantages)
    found = [measured(kind, fields, **shared) for kind, fields in cases]
    for case in found:
        print(case["fields"], case["loss"])
    write_json(Path(sys.argv[1]), {"made_with": {**versions(), "trl": version("trl")}, **shared, "cases": found})


if __name__ == "__main__":
    main()
