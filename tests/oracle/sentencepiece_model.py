"""A small SentencePiece BPE model with byte fallback, as GGUF metadata describes one, and what SentencePiece makes of texts.

    sentencepiece_model.py OUTPUT.json
"""

import io
import json
import sys

import sentencepiece

CORPUS = """The tide mill stood at the mouth of the creek. When the water rose the miller shut the gate.
When it fell he opened it and the stones began to turn. The stones turned all night and the flour was white.
Der Müller öffnete das Tor. La marée monte et le moulin tourne. How deep is the water at the gate of the mill?
def gate(depth):\n    return depth > 2.5\nfor stone in stones:\n    turn(stone)
"""

TEXTS = [
    "", " ", "  ", "a", "the", " the", "The tide mill", "  two  spaces ", "line\nbreak\n\n", "tab\tbed", "stones turned the stones",
    "Müller öffnete", "潮が満ちる", "emoji 🌊🏽 end", "1,204 stones", "def gate(x):\n    return x", "▁ is a space", "e\u0301 combined",
    "thethethethe", "unturned", "ththth", "MILL", "\u00a0nbsp", "   ", "a   b", "<0x41> is text", "gate" * 50,
]


def main(output):
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(CORPUS.split("\n") * 4), model_writer=model, model_type="bpe", vocab_size=420, byte_fallback=True,
        character_coverage=1.0, normalization_rule_name="identity", remove_extra_whitespaces=False, allow_whitespace_only_pieces=True,
        add_dummy_prefix=True, split_digits=True, minloglevel=2,
    )
    processor = sentencepiece.SentencePieceProcessor(model_proto=model.getvalue())
    size = processor.get_piece_size()
    kind = lambda i: 2 if processor.is_unknown(i) else 3 if processor.is_control(i) else 6 if processor.is_byte(i) else 1
    result = {
        "made_with": {"sentencepiece": sentencepiece.__version__},
        "tokens": [processor.id_to_piece(i) for i in range(size)],
        "scores": [processor.get_score(i) for i in range(size)],
        "token_types": [kind(i) for i in range(size)],
        "encode": [{"text": text, "ids": processor.encode(text), "decoded": processor.decode(processor.encode(text))} for text in TEXTS],
    }
    with open(output, "w", encoding="utf-8") as file:
        json.dump(result, file, ensure_ascii=False)
        file.write("\n")


main(sys.argv[1])
