"""LoRA adapters made by PEFT for the tiny models, with what `transformers` + PEFT compute with them.

    python adapters.py GOLDENS [family ...]

For each adapter: GOLDENS/<family>/adapters/<name>/ with adapter_config.json and adapter_model.safetensors as PEFT saves them, and
expected.json. Expected values come from the files just written, read back by PEFT onto the model read from its files.
"""

import json
import shutil
import sys
from pathlib import Path

import peft
import torch
from peft import LoraConfig, PeftModel, get_peft_model

from recorded import greedy_with_gaps, logits_of, rounded, versions, write_json
from tiny_models import FEWEST_DISTINCT, SMALLEST_GAP, load

NEW_TOKENS = 32
ALL = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]

ADAPTERS = {
    "llama": {
        # The common case: every matrix, one rank.
        "all": dict(r=4, lora_alpha=8, lora_dropout=0.05, target_modules=ALL),
        # Some matrices of some layers, stored as bfloat16.
        "some": dict(r=8, lora_alpha=4, target_modules=["q_proj", "v_proj"], layers_to_transform=[0, 2], dtype=torch.bfloat16),
        # A regular expression, ranks and alphas of their own, and the scale of rsLoRA.
        "patterns": dict(
            r=3, lora_alpha=5, use_rslora=True, target_modules=r"model\.layers\.(0|1)\..*(q|o|up|down)_proj",
            rank_pattern={r"layers\.1\.self_attn\.q_proj": 5, "up_proj": 7},
            alpha_pattern={"down_proj": 9.5},
        ),
    },
    "mixtral": {
        # What can be adapted of a model with experts.
        "attention": dict(r=4, lora_alpha=8, target_modules=["q_proj", "k_proj", "v_proj", "o_proj"]),
    },
    "dbrx": {
        # Query, key and value in one matrix.
        "attention": dict(r=4, lora_alpha=8, target_modules=["Wqkv", "out_proj"]),
    },
    "gemma2": {
        "all": dict(r=4, lora_alpha=8, target_modules=ALL),
    },
    "gemma3": {
        "all": dict(r=4, lora_alpha=8, target_modules=ALL),
    },
    "mpt": {
        "all": dict(r=4, lora_alpha=8, target_modules=["Wqkv", "out_proj", "up_proj", "down_proj"]),
    },
    "qwen3": {
        "all": dict(r=4, lora_alpha=8, target_modules="all-linear", exclude_modules=["k_proj"]),
    },
}


def build(family: str, name: str, folder: Path, seed: int) -> None:
    """Writes the adapter's files; its weights are random and large enough to matter."""
    options = dict(ADAPTERS[family][name])
    dtype = options.pop("dtype", torch.float32)
    model, _ = load(folder.parents[1])
    model = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", **options))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter_name, parameter in sorted(model.named_parameters()):
            if "lora_" in parameter_name:
                values = torch.randn(parameter.shape, generator=generator) / parameter.shape[1] ** 0.5
                parameter.data = (0.5 * values).to(dtype)
    model.peft_config["default"].base_model_name_or_path = f"tidemill/tiny-{family}"
    shutil.rmtree(folder, ignore_errors=True)
    model.save_pretrained(folder)
    (folder / "README.md").unlink(missing_ok=True)
    # Sets have no order, and the file should be the same every time.
    path = folder / "adapter_config.json"
    config = json.loads(path.read_text())
    if isinstance(config["target_modules"], list):
        config["target_modules"].sort()
    path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
    for file in folder.iterdir():
        file.chmod(0o644)


def expected(family: str, folder: Path, seed: int) -> dict | None:
    """The adapter's goldens, or None when the greedy path is degenerate, too close to a tie or the base's own."""
    base = json.loads((folder.parents[1] / "expected.json").read_text())
    model, tokenizer = load(folder.parents[1])
    model = PeftModel.from_pretrained(model, folder).to(torch.float32).eval()
    prompt_ids = base["prompt_ids"]
    tokens, gaps = greedy_with_gaps(model, prompt_ids, NEW_TOKENS, stops=[])
    if min(gaps) < SMALLEST_GAP or len(set(tokens)) < FEWEST_DISTINCT / 2 or max(tokens) >= len(tokenizer):
        return None
    ends = model.generation_config.eos_token_id
    if set(ends if isinstance(ends, list) else [ends]) & set(tokens) or tokens[:4] == base["greedy"][:4]:
        return None
    logits = logits_of(model, prompt_ids + tokens)
    last = len(prompt_ids) - 1
    positions = [0, 17, last, last + NEW_TOKENS - 1]
    return {
        "made_with": {**versions(), "peft": peft.__version__},
        "seed": seed,
        "prompt_ids": prompt_ids,
        "greedy": tokens,
        "smallest_top2_gap": rounded(min(gaps)),
        "positions": positions,
        "logits": [[rounded(value) for value in logits[position].tolist()] for position in positions],
    }


def main() -> None:
    goldens = Path(sys.argv[1])
    for family in sys.argv[2:] or ADAPTERS:
        adapters = ADAPTERS[family]
        for name in adapters:
            folder = goldens / family / "adapters" / name
            for seed in range(1, 200):
                build(family, name, folder, seed)
                result = expected(family, folder, seed)
                if result is not None:
                    break
            else:
                raise SystemExit(f"{family}/{name}: no seed gives a clear greedy path")
            write_json(folder / "expected.json", result)
            print(family, name, "seed", seed, "gap", result["smallest_top2_gap"], flush=True)


if __name__ == "__main__":
    main()
