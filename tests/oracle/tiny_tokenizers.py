"""Small real tokenizers, one per published style, trained on a few lines.

Each function returns a `tokenizers.Tokenizer` whose JSON has the same parts (normaliser, pre-tokeniser, post-processor,
decoder, special tokens) as the family's published `tokenizer.json`; only the vocabulary is small.
"""

import json

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

TRAINING_LINES = [
    "The tide mill stood at the mouth of the creek, and its wheel turned twice a day with the sea.",
    "When the water rose the miller shut the gate; when it fell he opened it and the stones began to turn.",
    "What is the weather today? It is raining in the harbour, and the boats are staying home.",
    "def add(first, second):\n    return first + second\n\nprint(add(2, 40))",
    "She said: \"I'll be there at 10:45, don't wait for me; we're late and they've left.\"",
    "In 1836 there were 1,204 mills; by 2024 only 17 were left, 3 of them working.",
    "Der Müller öffnet das Tor. La marée monte à l'aube. El molino está cerrado. 潮が満ちる。",
    "user assistant system You are a helpful assistant. Answer the question in one sentence.",
    "The quick brown fox jumps over the lazy dog, then the dog sleeps while the fox runs on.",
    "The stones, the water, the wheel, the gate, the grain and the flour: the miller counted them all.",
]

# The pattern that Llama 3 and, with single digits, Qwen2 publish.
LLAMA3_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
QWEN2_SPLIT = LLAMA3_SPLIT.replace(r"\p{N}{1,3}", r"\p{N}")


def _byte_level(vocabulary: int, split, special: list[str], normalizer=None) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE(ignore_merges=False))
    if normalizer is not None:
        tokenizer.normalizer = normalizer
    tokenizer.pre_tokenizer = split
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary - len(special),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(TRAINING_LINES, trainer)
    # Special tokens come after the vocabulary, as Llama 3 and Qwen publish them.
    tokenizer.add_special_tokens([AddedToken(token, normalized=False, special=True) for token in special])
    return tokenizer


def smollm2(vocabulary: int) -> Tokenizer:
    """GPT-2 splitting with digits one by one, ChatML tokens at the start of the vocabulary."""
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)]
    )
    tokenizer.decoder = decoders.ByteLevel(add_prefix_space=True, trim_offsets=True, use_regex=True)
    tokenizer.train_from_iterator(
        TRAINING_LINES,
        trainers.BpeTrainer(
            vocab_size=vocabulary,
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            special_tokens=[AddedToken(token, normalized=False, special=True) for token in special],
            show_progress=False,
        ),
    )
    return tokenizer


def mpt(vocabulary: int) -> Tokenizer:
    """GPT-2 splitting and nothing else, ChatML tokens at the start of the vocabulary."""
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    tokenizer.decoder = decoders.ByteLevel(add_prefix_space=True, trim_offsets=True, use_regex=True)
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=[AddedToken(token, normalized=False, special=True) for token in special],
        show_progress=False,
    )
    tokenizer.train_from_iterator(TRAINING_LINES, trainer)
    return tokenizer


def llama3(vocabulary: int) -> Tokenizer:
    """Llama 3: regex split, digits in threes, a post-processor that adds the start token."""
    special = ["<|begin_of_text|>", "<|end_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eom_id|>", "<|eot_id|>"]
    split = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(LLAMA3_SPLIT), behavior="isolated", invert=False),
            pre_tokenizers.ByteLevel(add_prefix_space=False, trim_offsets=True, use_regex=False),
        ]
    )
    tokenizer = _byte_level(vocabulary, split, special)
    bos = special[0]
    tokenizer.post_processor = processors.Sequence(
        [
            processors.ByteLevel(trim_offsets=True),
            processors.TemplateProcessing(
                single=f"{bos} $A", pair=f"{bos} $A {bos}:1 $B:1", special_tokens=[(bos, tokenizer.token_to_id(bos))]
            ),
        ]
    )
    return tokenizer


def mistral(vocabulary: int) -> Tokenizer:
    """SentencePiece style: spaces become ▁, unknown characters fall back to bytes, the start token is added."""
    special = ["<unk>", "<s>", "</s>"]
    byte_tokens = [f"<0x{byte:02X}>" for byte in range(256)]
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.train_from_iterator(
        # Published SentencePiece vocabularies hold no merges across words.
        [word for line in TRAINING_LINES for word in line.split(" ")],
        trainers.BpeTrainer(
            vocab_size=vocabulary,
            special_tokens=[AddedToken(token, normalized=False, special=True) for token in special]
            + [AddedToken(token, normalized=False, special=False) for token in byte_tokens],
            limit_alphabet=60,
            show_progress=False,
        ),
    )
    # The trainer marks what it is given as special; published byte tokens are ordinary entries of the vocabulary.
    content = json.loads(tokenizer.to_str())
    content["added_tokens"] = [token for token in content["added_tokens"] if token["content"] in special]
    tokenizer = Tokenizer.from_str(json.dumps(content))
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A <s>:1 $B:1", special_tokens=[("<s>", tokenizer.token_to_id("<s>"))]
    )
    return tokenizer


def qwen2(vocabulary: int) -> Tokenizer:
    """Qwen2 and Qwen3: NFC, regex split with digits one by one, ChatML tokens after the vocabulary."""
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    split = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(QWEN2_SPLIT), behavior="isolated", invert=False),
            pre_tokenizers.ByteLevel(add_prefix_space=False, trim_offsets=False, use_regex=False),
        ]
    )
    tokenizer = _byte_level(vocabulary, split, special, normalizers.NFC())
    tokenizer.post_processor = processors.ByteLevel(add_prefix_space=False, trim_offsets=False, use_regex=False)
    return tokenizer


GEMMA_CONTROL = ["<pad>", "<eos>", "<bos>", "<unk>", "<start_of_turn>", "<end_of_turn>"]
# Runs that are one token each whatever is beside them.
GEMMA_RUNS = ["\n", "\n\n", "▁▁", "▁▁▁", "▁▁▁▁"]


def gemma_scores(vocab: dict[str, int]) -> dict[str, float]:
    """The scores that SentencePiece gives: 0 for what is defined by hand, then the later a piece the lower."""
    by_hand = len(GEMMA_CONTROL) + len(GEMMA_RUNS) + 256
    return {piece: 0.0 if index < by_hand else -float(index) for piece, index in vocab.items()}


def gemma(vocabulary: int) -> Tokenizer:
    """Gemma 2 and 3: SentencePiece without a space before the text, runs of spaces and newlines defined by hand, merges by score."""
    by_hand = GEMMA_CONTROL + GEMMA_RUNS + [f"<0x{byte:02X}>" for byte in range(256)]
    trained = Tokenizer(models.BPE())
    trained.normalizer = normalizers.Replace(" ", "▁")
    words = [word if first else " " + word for line in TRAINING_LINES for first, word in zip([True] + [False] * 99, line.split(" "))]
    trained.train_from_iterator(
        words, trainers.BpeTrainer(vocab_size=vocabulary - len(by_hand), limit_alphabet=60, show_progress=False)
    )
    learned = sorted(trained.get_vocab().items(), key=lambda item: item[1])
    pieces = by_hand + [piece for piece, _ in learned if piece not in by_hand]
    vocab = {piece: index for index, piece in enumerate(pieces)}
    scores = gemma_scores(vocab)
    ways = [
        (scores[piece], len(piece[:at]), len(piece[at:]), piece[:at], piece[at:])
        for piece in pieces
        for at in sorted(range(1, len(piece)), key=lambda at: (vocab.get(piece[:at], 0), vocab.get(piece[at:], 0)))
        if piece[:at] in vocab and piece[at:] in vocab
    ]
    # As transformers converts a SentencePiece model: sorting keeps the order of equals.
    merges = [(left, right) for *_, left, right in sorted(ways, key=lambda way: way[:3], reverse=True)]
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    tokenizer.normalizer = normalizers.Replace(" ", "▁")
    tokenizer.pre_tokenizer = pre_tokenizers.Split(" ", behavior="merged_with_previous", invert=False)
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    tokenizer.add_special_tokens([AddedToken(token, normalized=False, special=True) for token in GEMMA_CONTROL])
    tokenizer.add_tokens([AddedToken(token, normalized=False, special=False) for token in GEMMA_RUNS])
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<bos> $A", pair="<bos> $A <bos>:1 $B:1", special_tokens=[("<bos>", tokenizer.token_to_id("<bos>"))]
    )
    return tokenizer
