"""Merged models as `transformers` opens them, against what it computed with base and adapter apart.

    python merged.py MERGED GOLDENS

MERGED/<family>/<adapter>/ is what engine/tests/merge.rs leaves with TIDEMILL_WRITE_MERGED: `folder` (safetensors), `from-gguf` (safetensors out
of GGUF), `converted.gguf` (GGUF out of safetensors), `model.gguf`, and `adapter.gguf` as llama.cpp reads it.
GOLDENS/<family>/adapters/<adapter>/expected.json holds what PEFT computed with base and adapter.
"""

import json
import sys
from pathlib import Path

import numpy as np
import torch
from gguf import GGUFReader
from transformers import AutoConfig, AutoModelForCausalLM

from recorded import greedy_with_gaps, logits_of
from tiny_gguf import interleaved

TOLERANCE = 1e-3
GGUF_NAMES = {
    "q_proj": "attn_q", "k_proj": "attn_k", "v_proj": "attn_v", "o_proj": "attn_output",
    "gate_proj": "ffn_gate", "up_proj": "ffn_up", "down_proj": "ffn_down",
}


def opened(path: Path, base: Path):
    """A merged model in float32, from a folder as it is or from a GGUF file with the base's configuration."""
    options = dict(dtype=torch.float32, attn_implementation="eager")
    if path.is_dir():
        return AutoModelForCausalLM.from_pretrained(path, **options).eval()
    # transformers does not read all of the configuration from a GGUF file.
    config = AutoConfig.from_pretrained(base)
    return AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, config=config, **options).eval()


def difference(model, expected: dict) -> float:
    """The largest difference of a logit from base and adapter, whose greedy answer must be the merged model's, too."""
    prompt, greedy = expected["prompt_ids"], expected["greedy"]
    logits = logits_of(model, prompt + greedy)[expected["positions"]]
    found, _ = greedy_with_gaps(model, prompt, len(greedy), stops=[])
    if found != greedy:
        raise SystemExit("the merged model answers something else than base and adapter")
    return float((logits - torch.tensor(expected["logits"])).abs().max())


def check_adapter(path: Path, folder: Path, base: Path) -> float:
    """The largest difference of `alpha / rank · B A` in llama.cpp's file from PEFT's, over the adapted matrices."""
    from peft import PeftConfig, PeftModel

    reader = GGUFReader(path)
    field = lambda name: reader.fields[name].contents()
    config = json.loads((base / "config.json").read_text())
    if (field("general.type"), field("adapter.type")) != ("adapter", "lora"):
        raise SystemExit(f"{path} is no adapter of llama.cpp")
    tensors = {tensor.name: np.asarray(tensor.data, dtype=np.float32) for tensor in reader.tensors}
    peft = PeftModel.from_pretrained(opened(base, base), folder).to(torch.float32)
    assert isinstance(peft.peft_config["default"], PeftConfig)
    worst, pairs = 0.0, 0
    for name, module in peft.named_modules():
        if not hasattr(module, "get_delta_weight") or "default" not in getattr(module, "lora_A", {}):
            continue
        parts = name.split(".")
        layer, projection = parts[parts.index("layers") + 1], parts[-1]
        wanted = module.get_delta_weight("default").detach().numpy()
        if field("general.architecture") == "llama" and projection in ("q_proj", "k_proj"):
            heads = config["num_attention_heads" if projection == "q_proj" else "num_key_value_heads"]
            wanted = interleaved(wanted, heads)
        own = f"blk.{layer}.{GGUF_NAMES[projection]}.weight"
        a, b = tensors[f"{own}.lora_a"], tensors[f"{own}.lora_b"]
        found = field("adapter.lora.alpha") / a.shape[0] * (b @ a)
        worst, pairs = max(worst, float(np.abs(found - wanted).max())), pairs + 1
    if 2 * pairs != len(tensors):
        raise SystemExit(f"{path} holds {len(tensors)} tensors for {pairs} adapted matrices")
    return worst


def main() -> None:
    merged, goldens = map(Path, sys.argv[1:3])
    overall = 0.0
    for expected in sorted(goldens.glob("*/adapters/*/expected.json")):
        folder = expected.parent
        base, place = folder.parents[1], merged / folder.parents[1].name / folder.name
        values = json.loads(expected.read_text())
        # A base with SentencePiece's tokenizer is not converted.
        converted = [] if base.name.startswith("gemma") else ["converted.gguf"]
        for name in ["folder", "from-gguf", *converted, "model.gguf"]:
            error = difference(opened(place / name, base), values)
            overall = max(overall, error)
            print(f"{base.name} {folder.name} {name}: max |Δ logit| {error:.2e}", flush=True)
        error = check_adapter(place / "adapter.gguf", folder, base)
        overall = max(overall, error)
        print(f"{base.name} {folder.name} adapter.gguf: max |Δ of B A| {error:.2e}", flush=True)
    print(f"largest difference {overall:.2e}")
    if overall > TOLERANCE:
        raise SystemExit("a merged model is not base and adapter")


if __name__ == "__main__":
    main()
