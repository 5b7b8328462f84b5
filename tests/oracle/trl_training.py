"""A training with TRL whose every choice is pinned: rows in file order, no dropout, LoRA numbers (PEFT) of our own drawing."""

import json
import os
import tempfile
from pathlib import Path

import numpy as np
import torch
from datasets import Dataset, disable_caching, disable_progress_bars
from peft import LoraConfig
from trl import DPOConfig, DPOTrainer, SFTConfig, SFTTrainer

PROJECTIONS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
MASK = (1 << 64) - 1

disable_caching()
disable_progress_bars()


def mix(value):
    """The finaliser of SplitMix64, on Python integers below 2^64 or on numpy's uint64."""
    if isinstance(value, int):
        value = ((value ^ (value >> 30)) * 0xBF58476D1CE4E5B9) & MASK
        value = ((value ^ (value >> 27)) * 0x94D049BB133111EB) & MASK
        return value ^ (value >> 31)
    value = (value ^ (value >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    value = (value ^ (value >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return value ^ (value >> np.uint64(31))


def first_numbers(seed: int, layer: int, projection: int, rank: int, width: int) -> np.ndarray:
    """`A` of a new adapter as `rlhf::model` draws it: uniform within ±1/√in, a function of seed, layer and projection alone."""
    start = mix(seed ^ mix(layer * len(PROJECTIONS) + projection + 1))
    steps = np.arange(1, rank * width + 1, dtype=np.uint64)
    bits = mix(np.uint64(start) + steps * np.uint64(0x9E3779B97F4A7C15))
    unit = (bits >> np.uint64(11)).astype(np.float64) / float(1 << 53)
    return ((unit * 2.0 - 1.0) / np.sqrt(width)).astype(np.float32).reshape(rank, width)


def trainable(model):
    """A model whose weights are plain numbers by now; that they came from a quantised file must not forbid training."""
    if getattr(model.config, "quantization_config", None) is not None:
        model.is_quantized, model.hf_quantizer = False, None
        del model.config.quantization_config
    return model


def start(model, seed: int) -> None:
    """Gives a new LoRA adapter the numbers that ours starts with."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_A" in name:
                parts = name.split(".")
                layer, projection = int(parts[parts.index("layers") + 1]), PROJECTIONS.index(parts[parts.index("lora_A") - 1])
                numbers = first_numbers(seed, layer, projection, *parameter.shape)
                parameter.copy_(torch.from_numpy(numbers))
            elif "lora_B" in name:
                assert not parameter.any(), name


def read_rows(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def trainer(
    method: str, model, tokenizer, rows: list[dict], held_out: list[dict],
    *, lora: dict | None, seed: int, batch: int, steps: int, rate: float, bf16: bool, weight_decay: float = 0.0,
):
    """A TRL trainer over `rows` in their order: of a LoRA adapter on every linear layer that starts where ours does, or of all weights."""
    os.environ["TQDM_DISABLE"] = "1"
    common = dict(
        output_dir=tempfile.mkdtemp(prefix="trl-"),
        per_device_train_batch_size=batch,
        per_device_eval_batch_size=batch,
        max_steps=steps,
        learning_rate=rate,
        lr_scheduler_type="linear",
        warmup_steps=2,
        weight_decay=weight_decay,
        max_grad_norm=1.0,
        optim="adamw_torch",
        train_sampling_strategy="sequential",
        max_length=None,
        gradient_checkpointing=False,
        bf16=bf16,
        fp16=False,
        use_cpu=True,
        logging_steps=1,
        save_strategy="no",
        eval_strategy="no",
        report_to="none",
        disable_tqdm=True,
        dataloader_pin_memory=False,
        seed=42,
    )
    if method == "dpo":
        columns, config, kind = ("prompt", "chosen", "rejected"), DPOConfig(beta=0.1, loss_type="sigmoid", **common), DPOTrainer
        pick = lambda row: {name: row[name] for name in columns}
    else:
        config, kind = SFTConfig(packing=False, completion_only_loss=True, **common), SFTTrainer
        pick = lambda row: {"prompt": row["prompt"], "completion": row["chosen"]}
    dataset = Dataset.from_list([pick(row) for row in rows])
    evaluation = Dataset.from_list([pick(row) for row in held_out]) if held_out else None
    peft = LoraConfig(task_type="CAUSAL_LM", lora_dropout=0.0, target_modules=PROJECTIONS, **lora) if lora else None
    made = kind(
        model=trainable(model), args=config, train_dataset=dataset, eval_dataset=evaluation, processing_class=tokenizer, peft_config=peft
    )
    if lora:
        start(made.model, seed)
    return made


def curve(trained, names: list[str]) -> dict[str, list[float]]:
    """What the trainer logged at each step."""
    lines = [line for line in trained.state.log_history if "loss" in line]
    return {name: [line[name] for line in lines] for name in names}
