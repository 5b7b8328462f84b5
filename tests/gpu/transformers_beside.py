"""transformers' continuous batching on the card, beside `throughput`: the same sizes, prompts, answers and ways of counting.

Prints rows for the same table, or one plain line saying why nothing was compared. `--layers N` cuts the model as `throughput` cuts its own.
With --tiny it runs on the CPU, to test itself.
"""

import sys
import time

BATCHES = (1, 32, 128)
PROMPT, ANSWER = 1024, 192
SIZES = dict(
    hidden_size=4096,
    intermediate_size=14336,
    num_hidden_layers=32,
    num_attention_heads=32,
    num_key_value_heads=8,
    head_dim=128,
    vocab_size=128256,
    max_position_embeddings=8192,
)
TINY = dict(
    hidden_size=64,
    intermediate_size=96,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=16,
    vocab_size=300,
    max_position_embeddings=64,
)


def rates(model, batch, prompt, answer):
    """Tokens per second of prompts, to the last first token, and of answers, from there to the first end."""
    from transformers import GenerationConfig

    vocabulary = model.config.vocab_size
    inputs = [[(at * 7919 + i * 104729) % vocabulary for at in range(prompt)] for i in range(batch)]
    wanted = GenerationConfig(max_new_tokens=answer, do_sample=False, eos_token_id=-1, pad_token_id=0)
    results = list(model.generate_batch(inputs, generation_config=wanted, record_timestamps=True).values())
    if len(results) != batch or any(len(result.generated_tokens) != answer for result in results):
        raise RuntimeError(f"{len(results)} of {batch} answers, or shorter ones than asked for")
    times = [result.timestamps for result in results]
    begun = min(result.created_time for result in results)
    all_begun, first_end = max(t[0] for t in times), min(t[-1] for t in times)
    prefill = batch * prompt / (all_begun - begun)
    if first_end <= all_begun:
        return prefill, None
    between = sum(1 for t in times for moment in t if all_begun < moment <= first_end)
    return prefill, between / (first_end - all_begun)


def told(why):
    return str(why).replace("|", "/").replace("\n", " ")[:250]


def main():
    tiny = "--tiny" in sys.argv
    if "--layers" in sys.argv:
        SIZES["num_hidden_layers"] = int(sys.argv[sys.argv.index("--layers") + 1])
    sizes, batches, prompt, answer = (TINY, (1, 2), 20, 8) if tiny else (SIZES, BATCHES, PROMPT, ANSWER)
    try:
        import torch
        import transformers
    except Exception as missing:  # a library that does not load is no ImportError everywhere
        print(f"| transformers | | not compared: {type(missing).__name__}: {told(missing)} | | |")
        return
    if not tiny and not torch.cuda.is_available():
        print(f"| transformers | | not compared: torch {torch.__version__}, for CUDA {torch.version.cuda}, sees no card | | |")
        return
    torch.manual_seed(1)
    torch.set_default_dtype(torch.bfloat16)
    with torch.device("cpu" if tiny else "cuda"):
        config = transformers.LlamaConfig(**sizes, tie_word_embeddings=False, bos_token_id=None, eos_token_id=None)
        model = transformers.LlamaForCausalLM._from_config(config, attn_implementation="sdpa").eval()
    name = f"transformers {transformers.__version__}, {model.config._attn_implementation}, bf16"
    warm = False
    for batch in batches:
        started = time.monotonic()
        try:
            # Libraries load with the first run. With this attention there are no graphs to capture, and nothing is compiled.
            if not warm:
                rates(model, batch, prompt, 4)
                warm = True
            prefill, _ = rates(model, batch, prompt, 2)
            print(f"| {name} | {batch} | prompts of {prompt} | {prefill:.0f} | |", flush=True)
            _, decode = rates(model, batch, prompt, answer)
        except Exception as why:  # whatever it is, the other rows are worth having
            print(f"| {name} | {batch} | | failed: {type(why).__name__}: {told(why)} | |", flush=True)
            continue
        print(f"| {name} | {batch} | {answer} tokens after {prompt} | {decode or 0:.0f} | |", flush=True)
        print(f"batch {batch}: {time.monotonic() - started:.0f} s", file=sys.stderr)


if __name__ == "__main__":
    main()
