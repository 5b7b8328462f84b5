"""Similarity of texts by the packages that people use, for graders of the kind `text_similarity`.

    python similarity.py GOLDENS

Needs rapidfuzz, nltk and rouge-score; no downloads: METEOR runs without WordNet.
"""

import importlib.metadata
import json
import re
import sys
from pathlib import Path

from nltk.stem.porter import PorterStemmer
from nltk.translate.bleu_score import SmoothingFunction, sentence_bleu
from nltk.translate.gleu_score import sentence_gleu
from nltk.translate.meteor_score import single_meteor_score
from rapidfuzz import fuzz
from rouge_score.rouge_scorer import RougeScorer

# (text, reference)
CASES = [
    ("the cat sat on the mat", "the cat is on the mat"),
    ("The quick brown fox jumps over the lazy dog.", "A quick brown dog jumps over the lazy fox."),
    ("It is a guide to action which ensures that the military always obeys the commands of the party",
     "It is a guide to action that ensures that the military will forever heed Party commands"),
    ("Paris", "Paris"),
    ("paris.", "Paris"),
    ("Rome", "Paris"),
    ("", "Paris"),
    ("the the the the the the the", "the cat is on the mat"),
    ("running runners ran happily generalizations", "the runner runs with happy generalization"),
    ("one two three four five six seven", "one two three four five six seven"),
    ("seven six five four three two one", "one two three four five six seven"),
    ("x = 3.14, y = -2;", "x = 3.14; y = 2"),
    ("To whom it may concern: the meeting, planned for Monday, moves to Tuesday at 10:30.",
     "The meeting planned for Monday was moved to Tuesday, 10:30. Please tell everyone whom it may concern!"),
    ("a b c d e f g h", "a b x d e y g h i j k l m n o p"),
]


class NoSynonyms:
    def synsets(self, _word):
        return []


def pieces(text: str) -> list[str]:
    return re.findall(r"\w+|[^\w\s]", text)


def measured(text: str, reference: str) -> dict:
    ours, theirs = pieces(text), pieces(reference)
    rouge = RougeScorer(["rouge1", "rouge2", "rouge3", "rouge4", "rouge5", "rougeL"]).score(reference, text)
    stemmer = PorterStemmer(mode=PorterStemmer.ORIGINAL_ALGORITHM)
    meteor = single_meteor_score([word.lower() for word in theirs], [word.lower() for word in ours], stemmer=stemmer, wordnet=NoSynonyms())
    return {
        "text": text, "reference": reference,
        "fuzzy_match": fuzz.ratio(text, reference) / 100,
        "bleu": sentence_bleu([theirs], ours, smoothing_function=SmoothingFunction().method1) if ours else 0.0,
        "gleu": sentence_gleu([theirs], ours) if ours else 0.0,
        "meteor": meteor if ours else 0.0,
        **{f"rouge_{name[5:].lower()}": score.fmeasure for name, score in rouge.items()},
    }


if __name__ == "__main__":
    lines = ",\n".join(" " + json.dumps(measured(*case)) for case in CASES)
    Path(sys.argv[1], "similarity.json").write_text(f"[\n{lines}\n]\n")
    print({name: importlib.metadata.version(name) for name in ["rapidfuzz", "nltk", "rouge-score"]})
