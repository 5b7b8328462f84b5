"""Loss curves of TRL training all weights of the tiny models, in float32 on the CPU.

    python trl_full.py GOLDENS [NAME…]

Reads GOLDENS/trl/rows.jsonl (trl_curves.py) and the models in GOLDENS; writes GOLDENS/trl/NAME.json with its curve.
"""

import sys
from importlib.metadata import version
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from recorded import rounded, versions, write_json
from trl_curves import METRICS
from trl_training import curve, read_rows, trainer

STEPS, BATCH, HELD_OUT = 12, 2, 4
TRAININGS = {
    # Tied, with biases; and untied, with a decay that norms do not take part in.
    "full-sft": dict(method="sft", model="qwen2", rate=2e-3, weight_decay=0.0),
    "full-dpo": dict(method="dpo", model="llama", rate=1e-4, weight_decay=0.1),
}


def main() -> None:
    goldens = Path(sys.argv[1])
    rows = read_rows(goldens / "trl" / "rows.jsonl")[: STEPS * BATCH + HELD_OUT]
    for name in sys.argv[2:] or TRAININGS:
        training = TRAININGS[name]
        method, rate, decay = training["method"], training["rate"], training["weight_decay"]
        folder = goldens / training["model"]
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager")
        tokenizer = AutoTokenizer.from_pretrained(folder)
        run = trainer(
            method, model, tokenizer, rows[:-HELD_OUT], rows[-HELD_OUT:],
            lora=None, seed=0, batch=BATCH, steps=STEPS, rate=rate, bf16=False, weight_decay=decay,
        )
        tokens = run.train_dataset[0]
        tokens = tokens["input_ids"] if method == "sft" else tokens["prompt_ids"] + tokens["chosen_ids"]
        run.train()
        values = curve(run, METRICS[method])
        print(name, [round(value, 4) for value in values["loss"]], flush=True)
        write_json(
            goldens / "trl" / f"{name}.json",
            {
                "made_with": {**versions(), "trl": version("trl")},
                "model": training["model"],
                "method": method,
                "batch": BATCH,
                "held_out": HELD_OUT,
                "learning_rate_peak": rate,
                "warmup_steps": 2,
                "weight_decay": decay,
                "first_row_ids": tokens,
                "eval_loss": run.evaluate()["eval_loss"],
                **{key: list(map(rounded, value)) for key, value in values.items()},
            },
        )


if __name__ == "__main__":
    main()
