"""Preference rows for comparisons with TRL, made from a small grammar: the same text on every machine, no data set to fetch.

    python trl_rows.py short COUNT SEED > ROWS.jsonl     about 45 tokens a side
    python trl_rows.py long COUNT SEED > ROWS.jsonl      about 190 tokens a side

The chosen answers are calm and name their source; the rejected ones shout and guess. So there is something to learn, and a loss on
held-out rows falls.
"""

import json
import random
import sys

PLACES = ["the harbour", "the mill", "the salt marsh", "the lighthouse", "the ferry", "the weir", "the old quay", "the lock"]
THINGS = ["the gate", "the wheel", "the winch", "the pump", "the lamp", "the rope", "the sluice", "the gauge", "the bell"]
STATES = ["stuck", "too loud", "leaking", "a hand's breadth too low", "warm to the touch", "slower than last week", "rusty", "loose"]
TIMES = ["since Monday", "at high water", "after the storm", "every morning", "when the wind turns", "on cold nights"]
PEOPLE = ["the keeper", "my neighbour", "the carpenter", "the crew", "an apprentice", "the inspector"]
STEPS = [
    "close the upper valve and wait until the level has settled",
    "write down what the scale says before anything is moved",
    "loosen the two outer bolts by half a turn each",
    "clean the bearing with a dry cloth and look for scratches",
    "ask for a second pair of hands, since the frame is heavy",
    "turn the shaft slowly by hand and listen for a click",
    "compare the reading with the one in the log book",
    "grease the pin sparingly and put the cover back",
]
SOURCES = ["the manual", "the log book", "last year's report", "the maker's drawing"]
SHOUTS = [
    "JUST hit it harder!!!",
    "who cares, it is OLD anyway!!!",
    "no idea, maybe magnets???",
    "throw it away and buy TEN new ones!!!",
    "I would not even look, lol!!!",
    "everything is broken ALWAYS!!!",
    "try it with your eyes closed, WHY NOT!!!",
    "it is probably ghosts, they LOVE this place!!!",
    "ask anybody else, I am BUSY!!!",
]


def question(rng: random.Random, long: bool) -> str:
    place, thing, state, time = (rng.choice(words) for words in (PLACES, THINGS, STATES, TIMES))
    if not long:
        return f"At {place}, {thing} is {state}. What now?"
    person, other, again = rng.choice(PEOPLE), rng.choice(THINGS), rng.choice(STATES)
    return (
        f"I look after {place}. {time.capitalize()}, {thing} is {state}, and {person} says that it was never like this before. "
        f"Yesterday {other} was {again}, too, but that went away by itself after an hour. I have a spanner, some grease and the whole "
        "afternoon, and nobody may be hurt. What should I do first, and what should I leave alone?"
    )


def chosen(rng: random.Random, long: bool) -> str:
    steps = rng.sample(STEPS, 4 if long else 1)
    source = rng.choice(SOURCES)
    if not long:
        return f"Please {steps[0]}. That is what {source} says."
    first, second, third, fourth = steps
    return (
        f"That is worth a careful look. First, {first}. Then {second}; this takes a few minutes and tells you most. "
        f"If nothing has changed, {third}, and only then {fourth}. That is the order in {source}. Leave the rest alone until you know more."
    )


def rejected(rng: random.Random, long: bool) -> str:
    return " ".join(rng.sample(SHOUTS, 7 if long else 2))


def rows(long: bool, count: int, seed: int) -> list[dict]:
    """Rows as conversations: prompt, chosen and rejected are lists of messages."""
    rng = random.Random(seed)
    made = []
    for _ in range(count):
        prompt, good, bad = question(rng, long), chosen(rng, long), rejected(rng, long)
        made.append(
            {
                "prompt": [{"role": "user", "content": prompt}],
                "chosen": [{"role": "assistant", "content": good}],
                "rejected": [{"role": "assistant", "content": bad}],
            }
        )
    return made


def main() -> None:
    length, count, seed = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
    for row in rows(length == "long", count, seed):
        print(json.dumps(row))


if __name__ == "__main__":
    main()
