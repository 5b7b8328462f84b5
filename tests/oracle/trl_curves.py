"""Loss curves and adapters of TRL + PEFT on the default model, in float32 on the CPU.

    python trl_curves.py MODEL.gguf GOLDENS/trl [NAME…]

Writes rows.jsonl, and per training NAME.json with its curve; the small ones also leave their adapter in NAME/ and, in
NAME/expected.json, what `transformers` + PEFT compute with it.
"""

import json
import shutil
import sys
from importlib.metadata import version
from pathlib import Path

import torch
from peft import PeftModel

from default_model import load, sha256, templated
from recorded import logits_of, rounded, versions, write_json
from trl_rows import rows
from trl_training import PROJECTIONS, curve, trainer

STEPS, BATCH, HELD_OUT, SEED = 20, 2, 6, 7
WHOLE = dict(r=8, lora_alpha=16)
SMALL = dict(r=2, lora_alpha=8, layers_to_transform=[0, 15, 29])
TRAININGS = {
    "sft": dict(method="sft", rate=5e-4, lora=WHOLE),
    "dpo": dict(method="dpo", rate=1e-4, lora=WHOLE),
    "dpo-small": dict(method="dpo", rate=1e-3, lora=SMALL),
}
METRICS = {
    "sft": ["loss", "grad_norm", "learning_rate"],
    "dpo": ["loss", "grad_norm", "learning_rate", "rewards/margins", "logps/chosen", "logps/rejected"],
}
# Of the vocabulary of 49,152, every so many; all would make a file of a megabyte.
TOKEN_STEP = 192


def saved(model, folder: Path) -> None:
    """The adapter's two files, the same bytes every time."""
    model.peft_config["default"].base_model_name_or_path = "smollm2-135m-instruct"
    shutil.rmtree(folder, ignore_errors=True)
    model.save_pretrained(folder)
    (folder / "README.md").unlink(missing_ok=True)
    path = folder / "adapter_config.json"
    config = json.loads(path.read_text())
    config["target_modules"] = sorted(config["target_modules"], key=PROJECTIONS.index)
    path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
    for file in folder.iterdir():
        file.chmod(0o644)


def expected(path: Path, folder: Path, row: dict) -> dict:
    """Log-probabilities of some tokens behind some prefixes of a held-out conversation, with the adapter in `folder`."""
    model, tokenizer = load(path)
    model = PeftModel.from_pretrained(model, folder).to(torch.float32).eval()
    ids = tokenizer(templated(tokenizer, row["prompt"]) + row["chosen"][0]["content"], add_special_tokens=False)["input_ids"]
    positions = [0, len(ids) // 3, 2 * len(ids) // 3, len(ids) - 1]
    found = logits_of(model, ids).double().log_softmax(-1)
    return {
        "made_with": {**versions(), "peft": version("peft")},
        "ids": ids,
        "positions": positions,
        "token_step": TOKEN_STEP,
        "log_probs": [[rounded(value) for value in found[position, ::TOKEN_STEP].tolist()] for position in positions],
    }


def main() -> None:
    path, out = Path(sys.argv[1]), Path(sys.argv[2])
    out.mkdir(parents=True, exist_ok=True)
    made = rows(False, STEPS * BATCH + HELD_OUT, SEED)
    (out / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in made))
    train, held_out = made[:-HELD_OUT], made[-HELD_OUT:]
    for name in sys.argv[3:] or TRAININGS:
        training = TRAININGS[name]
        method, lora, rate = training["method"], training["lora"], training["rate"]
        model, tokenizer = load(path)
        run = trainer(
            method, model, tokenizer, train, held_out, lora=lora, seed=SEED, batch=BATCH, steps=STEPS, rate=rate, bf16=False
        )
        tokens = run.train_dataset[0]
        tokens = tokens["input_ids"] if method == "sft" else tokens["prompt_ids"] + tokens["chosen_ids"]
        run.train()
        values = curve(run, METRICS[method])
        print(name, [round(value, 4) for value in values["loss"]], flush=True)
        write_json(
            out / f"{name}.json",
            {
                "made_with": {**versions(), "peft": version("peft"), "trl": version("trl")},
                "model_sha256": sha256(path),
                "method": method,
                "lora": lora,
                "seed": SEED,
                "batch": BATCH,
                "held_out": HELD_OUT,
                "learning_rate_peak": rate,
                "warmup_steps": 2,
                "first_row_ids": tokens,
                "eval_loss": run.evaluate()["eval_loss"],
                **{key: list(map(rounded, value)) for key, value in values.items()},
            },
        )
        if lora is SMALL:
            saved(run.model, out / name)
            write_json(out / name / "expected.json", expected(path, out / name, held_out[0]))


if __name__ == "__main__":
    main()
