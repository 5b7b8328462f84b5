#!/usr/bin/env python3
"""People for a trial run: they ask a server, and they like short answers. Nothing but Python is needed.

    people.py compare    four people read two answers to each question and say which is better
    people.py ask        users ask, each one once, and give every answer a thumb
"""

import argparse
import json
import random
import urllib.error
import urllib.request
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

QUESTIONS = Path(__file__).with_name("questions.txt").read_text(encoding="utf-8").splitlines()
# Without a word about length a small model talks until the limit of tokens cuts it off.
BRIEFLY = "Explain in one or two sentences."
RATERS = ["ann", "bob", "cy", "dee"]


class Api:
    def __init__(self, url: str, key: str):
        self.url, self.head = url.rstrip("/"), {"Content-Type": "application/json", "Authorization": f"Bearer {key}"}

    def post(self, path: str, body) -> tuple[dict, dict]:
        """The answer's body and headers."""
        request = urllib.request.Request(self.url + path, json.dumps(body).encode(), self.head)
        try:
            with urllib.request.urlopen(request, timeout=600) as answer:
                return json.load(answer), dict(answer.headers)
        except urllib.error.HTTPError as error:
            raise SystemExit(f"{path} answered {error.code}: {error.read().decode()}") from None
        except urllib.error.URLError as error:
            raise SystemExit(f"nobody answers at {self.url}: {error.reason}; start the server with `make serve`") from None


def words(choice: dict) -> int:
    return len(choice["message"]["content"].split())


def whole(choice: dict) -> bool:
    """It ended by itself; the limit of tokens did not cut it off."""
    return choice["finish_reason"] == "stop"


def question(options, text: str, seed: int) -> dict:
    content = f"{text} {BRIEFLY}"
    return {"model": options.model, "messages": [{"role": "user", "content": content}], "temperature": 1, "max_tokens": options.max_tokens, "seed": seed}


def compare(options, api: Api) -> None:
    """Each question is answered four times; the shortest answer is held against the longest."""

    def one(number: int) -> dict | None:
        body = question(options, QUESTIONS[number], options.seed + number) | {"n": 4, "tidemill": {"compare": True}}
        choices = sorted(api.post("/chat/completions", body)[0]["choices"], key=words)
        short, long = next((choice for choice in choices if whole(choice) and words(choice) > 0), None), choices[-1]
        # Of nearly equal ones nobody would know which is shorter.
        if short is None or words(short) >= 0.67 * words(long):
            return None
        ids = [choice["tidemill"]["id"] for choice in (short, long)]
        return {"kind": "comparison", "author": RATERS[number % len(RATERS)], "value": {"candidates": ids, "winner": ids[0]}}

    with ThreadPoolExecutor(8) as pool:
        said = [judgement for judgement in pool.map(one, range(options.questions)) if judgement]
    api.post("/feedback", said)
    print(f"{options.questions} questions; {len(said)} comparisons by {len({judgement['author'] for judgement in said})} people")


def ask(options, api: Api) -> None:
    """Four at a time."""
    draw, served, liked = random.Random(options.seed), Counter(), Counter()
    people = [(f"user-{options.seed}-{number}", draw.choice(QUESTIONS), draw.randrange(2**31)) for number in range(options.people)]

    def one(person: tuple[str, str, int]) -> tuple[str, bool]:
        user, text, seed = person
        chat, head = api.post("/chat/completions", question(options, text, seed) | {"user": user})
        choice = chat["choices"][0]
        good = whole(choice) and words(choice) <= options.short
        api.post("/feedback", {"target": chat["id"], "kind": "thumb", "value": good, "author": user})
        return head.get("x-tidemill-variant", options.model), good

    with ThreadPoolExecutor(4) as pool:
        for variant, good in pool.map(one, people):
            served[variant] += 1
            liked[variant] += good
    for variant, count in served.most_common():
        print(f"{variant} answered {count} people; {liked[variant] / count:.0%} liked it")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["compare", "ask"])
    parser.add_argument("--url", default="http://127.0.0.1:8080/v1")
    parser.add_argument("--key", default="none", help="an API key, where the server wants one")
    parser.add_argument("--model", default="smollm2-135m-instruct")
    parser.add_argument("--questions", type=int, default=72, help=f"of {len(QUESTIONS)}, for compare")
    parser.add_argument("--people", type=int, default=500, help="for ask")
    parser.add_argument("--short", type=int, default=40, help="words that people who ask still like")
    parser.add_argument("--max-tokens", type=int, default=96)
    parser.add_argument("--seed", type=int, default=1)
    options = parser.parse_args()
    if not 1 <= options.questions <= len(QUESTIONS):
        parser.error(f"--questions is 1 to {len(QUESTIONS)}")
    {"compare": compare, "ask": ask}[options.what](options, Api(options.url, options.key))


if __name__ == "__main__":
    main()
