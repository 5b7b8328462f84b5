"""GGUF files of the tiny models: the same weights in float32 under GGUF's names, tokenizer and template as metadata.

    python tiny_gguf.py GOLDENS [family ...]

Writes GOLDENS/<family>/<family>.gguf for the families below; the family's expected.json holds for it too. Rows of q and k of the
llama architecture are permuted for interleaved rotary embedding, as llama.cpp's converter does.
"""

import json
import sys
from pathlib import Path

import gguf
import numpy as np
from safetensors.numpy import load_file

from tiny_tokenizers import gemma_scores

ARCHITECTURE = {
    "llama": "llama", "llama3": "llama", "qwen2": "qwen2", "qwen3": "qwen3",
    "mixtral": "llama", "qwen2_moe": "qwen2moe", "qwen3_moe": "qwen3moe", "dbrx": "dbrx",
    "gemma2": "gemma2", "gemma3": "gemma3",
    "mpt": "mpt",
    "yarn": "llama",
}
# `tokenizer.ggml.pre`: which splitting the byte-level BPE has.
PRE = {
    "llama": "smollm", "llama3": "llama-bpe", "qwen2": "qwen2", "qwen3": "qwen2",
    "mixtral": "smollm", "qwen2_moe": "qwen2", "qwen3_moe": "qwen2", "dbrx": "dbrx",
    "gemma2": "default", "gemma3": "default",
    "mpt": "mpt",
    "yarn": "smollm",
}
# Names of an expert's matrices: in Mixtral's files, in others.
PARTS = {"w1": "gate_proj", "w3": "up_proj", "w2": "down_proj"}


def weights(folder: Path) -> dict[str, np.ndarray]:
    tensors = {}
    for file in sorted(folder.glob("model*.safetensors")):
        tensors.update(load_file(file))
    return tensors


def stacked(tensors: dict[str, np.ndarray], layers: int, experts: int) -> dict[str, np.ndarray]:
    """Experts as llama.cpp's converter puts them together: one tensor [experts, rows, columns] for each matrix of a layer."""
    rest = {name: tensor for name, tensor in tensors.items() if ".experts." not in name}
    for layer in range(layers):
        for own, name in PARTS.items():
            here = f"model.layers.{layer}.mlp.experts"
            mixtral = f"model.layers.{layer}.block_sparse_moe.experts"
            if f"{here}.gate_up_proj" in tensors:
                gate, up = np.split(tensors[f"{here}.gate_up_proj"], 2, axis=1)
                all_experts = {"gate_proj": gate, "up_proj": up, "down_proj": tensors[f"{here}.down_proj"]}[name]
            elif f"{mixtral}.0.{own}.weight" in tensors:
                all_experts = np.stack([tensors[f"{mixtral}.{expert}.{own}.weight"] for expert in range(experts)])
            else:
                all_experts = np.stack([tensors[f"{here}.{expert}.{name}.weight"] for expert in range(experts)])
            rest[f"{here}.{name}.weight"] = all_experts
    return rest


def plain_names(config: dict) -> dict:
    """DBRX's configuration under the names that the others' have."""
    attention, ffn = config["attn_config"], config["ffn_config"]
    return {
        **config, "hidden_size": config["d_model"], "num_attention_heads": config["n_heads"], "num_hidden_layers": config["n_layers"],
        "max_position_embeddings": config["max_seq_len"], "intermediate_size": ffn["ffn_hidden_size"],
        "num_experts": ffn["moe_num_experts"], "num_experts_per_tok": ffn["moe_top_k"],
        "num_key_value_heads": attention["kv_n_heads"], "rope_theta": attention["rope_theta"], "rope_scaling": None,
    }


def plain_mpt_names(config: dict) -> dict:
    """The same for MPT."""
    return {
        **config, "hidden_size": config["d_model"], "num_attention_heads": config["n_heads"], "num_hidden_layers": config["n_layers"],
        "max_position_embeddings": config["max_seq_len"], "intermediate_size": config["expansion_ratio"] * config["d_model"],
        "rope_scaling": None,
    }


def dbrx_experts(tensors: dict[str, np.ndarray], experts: int) -> dict[str, np.ndarray]:
    """[experts * ffn, hidden] as llama.cpp's converter has them: [experts, ffn, hidden], the down projection [experts, hidden, ffn]."""
    split = {}
    for name, tensor in tensors.items():
        if ".experts.mlp." in name:
            tensor = tensor.reshape(experts, -1, tensor.shape[1])
            name, tensor = f"{name}.weight", tensor.transpose(0, 2, 1) if name.endswith("w2") else tensor
        split[name] = tensor
    return split


def interleaved(rows: np.ndarray, heads: int) -> np.ndarray:
    """Rows (head, half, i) become (head, i, half): pairs that rotate together lie side by side."""
    dim = rows.shape[0] // heads
    return rows.reshape(heads, 2, dim // 2, *rows.shape[1:]).swapaxes(1, 2).reshape(rows.shape)


def llama3_factors(scaling: dict, theta: float, head_dim: int) -> np.ndarray:
    """`rope_freqs.weight`: what each pair's frequency is divided by (Llama 3.1's piecewise rule)."""
    frequency = 1.0 / theta ** (np.arange(0, head_dim, 2, dtype=np.float64) / head_dim)
    wavelength = 2 * np.pi / frequency
    original = scaling["original_max_position_embeddings"]
    low, high, factor = scaling["low_freq_factor"], scaling["high_freq_factor"], scaling["factor"]
    smooth = (original / wavelength - low) / (high - low)
    middle = 1 / ((1 - smooth) / factor + smooth)
    return np.where(wavelength < original / high, 1.0, np.where(wavelength > original / low, factor, middle)).astype(np.float32)


def token_types(tokenizer: dict, count: int) -> list[int]:
    types = [gguf.TokenType.NORMAL] * count
    for token in tokenizer["added_tokens"]:
        types[token["id"]] = gguf.TokenType.CONTROL if token["special"] else gguf.TokenType.USER_DEFINED
    return [int(kind) for kind in types]


def write(folder: Path) -> Path:
    config = json.loads((folder / "config.json").read_text())
    tokenizer = json.loads((folder / "tokenizer.json").read_text())
    tokenizer_config = json.loads((folder / "tokenizer_config.json").read_text())
    tensors = weights(folder)
    is_dbrx = config["model_type"] == "dbrx"
    if is_dbrx:
        config = plain_names(config)
    is_mpt = config["model_type"] == "mpt"
    if is_mpt:
        config = plain_mpt_names(config)
    experts = config.get("num_local_experts", config.get("num_experts"))
    if experts:
        tensors = dbrx_experts(tensors, experts) if is_dbrx else stacked(tensors, config["num_hidden_layers"], experts)
    architecture = ARCHITECTURE[folder.name]
    is_gemma = architecture.startswith("gemma")
    path = folder / f"{folder.name}.gguf"
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_name(f"tiny {folder.name}")
    writer.add_file_type(gguf.LlamaFileType.ALL_F32)
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    if not is_mpt:
        writer.add_head_count_kv(config["num_key_value_heads"])
        writer.add_rope_freq_base(config["rope_theta"])
    if is_dbrx or is_mpt:
        writer.add_layer_norm_eps(1e-5)
        writer.add_clamp_kqv(config["attn_config"]["clip_qkv"])
    else:
        writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    if is_mpt:
        writer.add_max_alibi_bias(config["attn_config"]["alibi_bias_max"])
    head_dim = config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]
    if experts:
        writer.add_expert_count(experts)
        writer.add_expert_used_count(config["num_experts_per_tok"])
        if "moe_intermediate_size" in config:
            writer.add_expert_feed_forward_length(config["moe_intermediate_size"])
        if "shared_expert_intermediate_size" in config:
            writer.add_expert_shared_feed_forward_length(config["shared_expert_intermediate_size"])
    if is_gemma:
        # As llama.cpp's converter; the scale it leaves out, because it is that of a head's width in published models.
        writer.add_sliding_window(config["sliding_window"])
        writer.add_attention_scale(config["query_pre_attn_scalar"] ** -0.5)
        if architecture == "gemma2":
            writer.add_attn_logit_softcapping(config["attn_logit_softcapping"])
            writer.add_final_logit_softcapping(config["final_logit_softcapping"])
        else:
            writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
            writer.add_rope_scaling_factor(config["rope_scaling"]["factor"])
    if architecture in ("qwen3", "qwen3moe") or is_gemma:
        writer.add_key_length(head_dim)
        writer.add_value_length(head_dim)
    if architecture == "llama":
        writer.add_vocab_size(config["vocab_size"])
        writer.add_rope_dimension_count(head_dim)
    if folder.name == "yarn":
        # As llama.cpp's converter has them.
        scaling = config["rope_scaling"]
        writer.add_rope_scaling_type(gguf.RopeScalingType.YARN)
        writer.add_rope_scaling_factor(scaling["factor"])
        writer.add_rope_scaling_orig_ctx_len(scaling["original_max_position_embeddings"])
        writer.add_rope_scaling_yarn_beta_fast(scaling["beta_fast"])
    elif config["rope_scaling"] and not is_gemma:
        writer.add_tensor("rope_freqs.weight", llama3_factors(config["rope_scaling"], config["rope_theta"], head_dim))

    ids = {token: index for token, index in tokenizer["model"]["vocab"].items()}
    ids.update({token["content"]: token["id"] for token in tokenizer["added_tokens"]})
    names = {index: token for token, index in ids.items()}
    # The converter names the rows past the tokenizer [PADn] and marks them unused.
    count = config["vocab_size"]
    types = token_types(tokenizer, count)
    for index in range(len(names), count):
        types[index] = int(gguf.TokenType.UNUSED)
    tokens = [names.get(index, f"[PAD{index}]") for index in range(count)]
    writer.add_tokenizer_model("llama" if is_gemma else "gpt2")
    writer.add_tokenizer_pre(PRE[folder.name])
    if is_gemma:
        # Scores in the place of merges; runs of spaces are written as spaces.
        scores = gemma_scores(tokenizer["model"]["vocab"])
        for index, token in enumerate(tokens):
            if types[index] == gguf.TokenType.USER_DEFINED:
                tokens[index] = token.replace("▁", " ")
            elif token.startswith("<0x"):
                types[index] = int(gguf.TokenType.BYTE)
            elif token == "<unk>":
                types[index] = int(gguf.TokenType.UNKNOWN)
        writer.add_token_scores([scores.get(names.get(index), -10000.0) for index in range(count)])
        writer.add_add_space_prefix(False)
        writer.add_unk_token_id(ids["<unk>"])
        writer.add_eot_token_id(ids["<end_of_turn>"])
    else:
        writer.add_token_merges([" ".join(pair) for pair in tokenizer["model"]["merges"]])
    writer.add_token_list(tokens)
    writer.add_token_types(types)
    if tokenizer_config["bos_token"]:
        writer.add_bos_token_id(ids[tokenizer_config["bos_token"]])
    writer.add_eos_token_id(ids[tokenizer_config["eos_token"]])
    if tokenizer_config["pad_token"]:
        writer.add_pad_token_id(ids[tokenizer_config["pad_token"]])
    # Llama 3's files leave this out and its `pre` means true; the others say false. The tokenizer of the tiny DBRX is Llama 3's, so it
    # says true.
    if folder.name != "llama3":
        writer.add_add_bos_token(is_dbrx or is_gemma)
    writer.add_chat_template(tokenizer_config["chat_template"])

    layer_map = gguf.get_tensor_name_map(getattr(gguf.MODEL_ARCH, architecture.upper()), config["num_hidden_layers"])
    for name, tensor in tensors.items():
        # A vector there.
        if "shared_expert_gate" in name:
            tensor = tensor[0]
        if architecture == "llama" and ".q_proj." in name:
            tensor = interleaved(tensor, config["num_attention_heads"])
        if architecture == "llama" and ".k_proj." in name:
            tensor = interleaved(tensor, config["num_key_value_heads"])
        # What norms multiply with, where the publisher has 1 less.
        if is_gemma and name.endswith("norm.weight"):
            tensor = tensor + 1
        writer.add_tensor(layer_map.get_name(name, try_suffixes=(".weight", ".bias")), np.ascontiguousarray(tensor, dtype=np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def check_factors(folder: Path) -> None:
    """The frequency factors are what `transformers` makes of the same configuration."""
    from transformers import AutoConfig
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    raw = json.loads((folder / "config.json").read_text())
    if (raw.get("rope_scaling") or {}).get("rope_type") != "llama3":
        return
    config = AutoConfig.from_pretrained(folder)
    scaled = ROPE_INIT_FUNCTIONS["llama3"](config, "cpu")[0].numpy()
    plain = 1.0 / raw["rope_theta"] ** (np.arange(0, raw["head_dim"], 2) / raw["head_dim"])
    np.testing.assert_allclose(plain / scaled, llama3_factors(raw["rope_scaling"], raw["rope_theta"], raw["head_dim"]), rtol=1e-5)


def check(folder: Path, path: Path) -> None:
    """`transformers` reads the GGUF file back and must give the expected logits."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    from recorded import logits_of

    expected = json.loads((folder / "expected.json").read_text())
    # transformers reads neither `key_length` nor `rope_freqs.weight` from a GGUF file: the configuration comes from JSON.
    model = AutoModelForCausalLM.from_pretrained(
        folder, gguf_file=path.name, config=AutoConfig.from_pretrained(folder), dtype=torch.float32, attn_implementation="eager"
    ).eval()
    logits = logits_of(model, expected["prompt_ids"] + expected["greedy"])[expected["positions"]]
    error = float((logits - torch.tensor(expected["logits"])).abs().max())
    print(path.name, path.stat().st_size, "bytes, max |Δ logit| through GGUF", error)
    if error > 1e-4:
        raise SystemExit(f"{path} does not hold the same model")


def main() -> None:
    for family in sys.argv[2:] or ARCHITECTURE:
        folder = Path(sys.argv[1]) / family
        path = write(folder)
        # transformers reads no Mixtral, DBRX or MPT out of GGUF; `engine/tests/parity.rs` compares the files with the same expected values.
        if family not in ("mixtral", "dbrx", "mpt"):
            check(folder, path)
        check_factors(folder)


if __name__ == "__main__":
    main()
