"""Perplexity of the default model and of its requantised variants, each dequantised to float32, by `transformers`.

    python perplexity.py MODEL.gguf TEXT OUT.json SCRATCH_DIR

Perplexity = exp(−mean over i ≥ 1 of log p(token i | tokens before it)), all tokens in one context, no special tokens added.
"""

import math
import sys
from pathlib import Path

import torch

from default_model import encoded, load, sha256
from recorded import logits_of, rounded, versions, write_json
from requantize import requantize

FORMATS = ["F16", "BF16", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "Q4_K", "Q5_K", "Q6_K"]


def log_probabilities(model, ids: list[int]) -> list[float]:
    """log p(ids[i] | ids[:i]) for i ≥ 1."""
    logits = logits_of(model, ids)[:-1].double()
    targets = torch.tensor(ids[1:])
    return torch.log_softmax(logits, dim=-1).gather(1, targets[:, None])[:, 0].tolist()


def perplexity(values: list[float]) -> float:
    return math.exp(-sum(values) / len(values))


def main() -> None:
    source, text, out, scratch = (Path(argument) for argument in sys.argv[1:])
    scratch.mkdir(parents=True, exist_ok=True)
    model, tokenizer = load(source)
    ids = encoded(tokenizer, text.read_text(encoding="utf-8"))
    values = log_probabilities(model, ids)
    result = {
        "made_with": versions(),
        "model": source.name,
        "sha256": sha256(source),
        "text": text.name,
        "ids": ids,
        "log_probabilities": [round(value, 4) for value in values],
        "perplexity": rounded(perplexity(values)),
    }
    print(len(ids), "tokens, perplexity", result["perplexity"], flush=True)
    variants = {}
    for name in FORMATS:
        target = scratch / f"{name}.gguf"
        requantize(source, {name: target})
        model, _ = load(target)
        variants[name] = {"perplexity": rounded(perplexity(log_probabilities(model, ids))), "sha256": sha256(target)}
        print(name, variants[name], flush=True)
        target.unlink()
    result["requantized"] = variants
    write_json(out, result)


if __name__ == "__main__":
    main()
