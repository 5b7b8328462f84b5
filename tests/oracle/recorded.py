"""How expected values are computed and written: greedy paths with their margins, logits, rounding, versions."""

import json
import platform
from importlib.metadata import version
from pathlib import Path

import torch


def versions() -> dict:
    """What made a file of expected values."""
    names = ["transformers", "torch", "tokenizers", "gguf", "numpy", "safetensors"]
    return {"python": platform.python_version(), **{name: version(name) for name in names}}


def rounded(value: float) -> float:
    """Seven significant digits: what float32 holds."""
    return float(f"{value:.7g}")


def write_json(path: Path, value: dict) -> None:
    """One key per line, long lists on one line each, non-ASCII kept: readable in a diff and small."""
    lines = []
    for key, item in value.items():
        if isinstance(item, list) and item and isinstance(item[0], (dict, list)):
            rows = ",\n    ".join(json.dumps(row, ensure_ascii=False) for row in item)
            lines.append(f"  {json.dumps(key)}: [\n    {rows}\n  ]")
        else:
            lines.append(f"  {json.dumps(key)}: {json.dumps(item, ensure_ascii=False)}")
    path.write_text("{\n" + ",\n".join(lines) + "\n}\n", encoding="utf-8")


@torch.no_grad()
def logits_of(model, ids: list[int]) -> torch.Tensor:
    """Logits [positions, vocabulary] of one full forward pass without a cache."""
    return model(torch.tensor([ids]), use_cache=False).logits[0]


@torch.no_grad()
def greedy_with_gaps(model, prompt: list[int], count: int, stops: list[int]) -> tuple[list[int], list[float]]:
    """Greedy tokens (a stop token ends the list and is part of it) and, per step, best logit minus second best."""
    tokens, gaps, cache = [], [], None
    step = torch.tensor([prompt])
    for _ in range(count):
        output = model(step, past_key_values=cache, use_cache=True)
        cache = output.past_key_values
        best = output.logits[0, -1].double().topk(2)
        gaps.append(float(best.values[0] - best.values[1]))
        token = int(best.indices[0])
        tokens.append(token)
        if token in stops:
            break
        step = torch.tensor([[token]])
    return tokens, gaps
