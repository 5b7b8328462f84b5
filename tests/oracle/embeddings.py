"""Hidden states of the tiny models, pooled as sentence-transformers pools them.

    python embeddings.py GOLDENS [family ...]

Writes GOLDENS/<family>/embeddings.json for models that tiny_models.py made: for each text the ids, the hidden state of the last
token and the mean over all tokens, both behind the model's last norm (`last_hidden_state`), in float32 and not scaled.
"""

import sys
from pathlib import Path

import torch
from transformers import AutoModel, AutoTokenizer

from recorded import rounded, versions, write_json

FAMILIES = ["llama", "qwen3"]
TEXTS = [
    "a",
    "The tide mill stood at the mouth of the creek.",
    "La marée monte, 潮が満ちる. 🌊",
    "When the water rose the miller shut the gate; when it fell he opened it and 1,204 stones began to turn. " * 2,
]


def pooled(folder: Path) -> list[dict]:
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModel.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager").eval()
    texts = []
    for text in TEXTS:
        ids = tokenizer(text)["input_ids"]
        with torch.no_grad():
            hidden = model(torch.tensor([ids])).last_hidden_state[0]
        last, mean = ([rounded(value) for value in row.tolist()] for row in (hidden[-1], hidden.mean(0)))
        texts.append({"text": text, "ids": ids, "last": last, "mean": mean})
    return texts


def main() -> None:
    goldens = Path(sys.argv[1])
    for family in sys.argv[2:] or FAMILIES:
        folder = goldens / family
        write_json(folder / "embeddings.json", {"made_with": versions(), "texts": pooled(folder)})
        print(family, flush=True)


main()
