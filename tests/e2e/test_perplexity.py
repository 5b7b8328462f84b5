"""Perplexity of each weight format within 1 % of the same file's dequantised weights, as `transformers` computes it."""

import hashlib
import math
import subprocess
import sys
from pathlib import Path

import pytest

from conftest import GOLDENS, MODEL, golden, running
from server import default_model

GOLDEN = golden("smollm2/perplexity.json")
REQUANTIZE = GOLDENS.parent / "oracle" / "requantize.py"
FORMATS = list(GOLDEN["requantized"])


def sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@pytest.fixture(scope="module")
def variants(tmp_path_factory) -> dict[str, Path]:
    """The default model in every format; made once, byte for byte what the expected values were made of."""
    folder = tmp_path_factory.mktemp("formats")
    files = {name: folder / f"{name}.gguf" for name in FORMATS}
    arguments = [str(part) for item in files.items() for part in item]
    subprocess.run([sys.executable, REQUANTIZE, default_model(), *arguments], check=True)
    yield files
    for file in files.values():
        file.unlink()


def perplexity(folder: Path, model: Path, *arguments: str) -> float:
    with running(folder, {MODEL: model}, "--max-model-len", "2048", "--max-seqs", "4", *arguments) as server:
        body = {"model": MODEL, "prompt": GOLDEN["ids"], "max_tokens": 0, "echo": True, "logprobs": 0}
        answer = server.post("/v1/completions", body)
        assert answer.status == 200, answer.body
        values = answer.json()["choices"][0]["logprobs"]["token_logprobs"][1 : len(GOLDEN["ids"])]
        assert len(values) == len(GOLDEN["ids"]) - 1
        return math.exp(-sum(values) / len(values))


def test_the_model_is_the_one_that_the_values_are_of():
    assert sha256(default_model()) == GOLDEN["sha256"]


def test_the_default_model_exactly(tmp_path):
    measured = perplexity(tmp_path, default_model(), "--weights", "f32", "--kv-dtype", "f32")
    assert measured == pytest.approx(GOLDEN["perplexity"], rel=1e-4)


@pytest.mark.parametrize("weights", ["auto", "bf16", "int8"])
def test_the_default_model_in_each_packing(tmp_path, weights):
    assert perplexity(tmp_path, default_model(), "--weights", weights) == pytest.approx(GOLDEN["perplexity"], rel=0.01)


@pytest.mark.parametrize("name", FORMATS)
def test_every_format(variants, tmp_path, name):
    expected = GOLDEN["requantized"][name]
    assert sha256(variants[name]) == expected["sha256"]
    assert perplexity(tmp_path, variants[name]) == pytest.approx(expected["perplexity"], rel=0.01)
