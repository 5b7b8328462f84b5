#!/usr/bin/env python3
"""Writes a GGUF model as a Hugging Face directory (bf16 safetensors, config, tokenizer) for the servers that read only those.

The weights are the GGUF file's own, dequantised: every server under comparison answers from the same numbers, up to its
own rounding. Needs torch, transformers and gguf.
"""

import argparse
import copy
import json
import pathlib

import gguf
import torch
import transformers


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("gguf_file", type=pathlib.Path)
    parser.add_argument("directory", type=pathlib.Path)
    args = parser.parse_args()

    folder, name = str(args.gguf_file.parent), args.gguf_file.name
    source = transformers.AutoModelForCausalLM.from_pretrained(folder, gguf_file=name, dtype=torch.float32)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder, gguf_file=name)

    # transformers marks what it read from GGUF as quantised and then refuses to save it: move the weights to a plain model.
    config = copy.deepcopy(source.config)
    config.__dict__.pop("quantization_config", None)
    config.dtype = torch.bfloat16
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    model.load_state_dict(source.state_dict())
    model.tie_weights()
    model.save_pretrained(args.directory)
    tokenizer.save_pretrained(args.directory)

    versions = {"transformers": transformers.__version__, "torch": torch.__version__}
    # Written last: whoever finds this file finds a whole directory.
    (args.directory / "exported.json").write_text(json.dumps({"source": name, **versions}) + "\n")

    reader = gguf.GGUFReader(args.gguf_file)
    wanted = sum(int(tensor.n_elements) for tensor in reader.tensors)
    written = sum(parameter.numel() for parameter in model.parameters())
    print(f"{args.directory}: {written:,} parameters in bf16 (the GGUF file holds {wanted:,})")


if __name__ == "__main__":
    main()
