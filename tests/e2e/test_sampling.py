"""What changes the tokens that are drawn: n, seed, stop, bias, penalties; and the log-probabilities that report them."""

import math

import openai
import pytest

from conftest import MODEL
from test_chat import QUESTION, ask

LONG = [{"role": "user", "content": "Write a short story about a lighthouse keeper."}]


def text_of(answer, index: int = 0) -> str:
    return answer.choices[index].message.content


def test_two_choices_differ_and_the_prompt_counts_once(client):
    one = ask(client, LONG, max_tokens=24)
    answer = ask(client, LONG, n=2, temperature=1, seed=3, max_tokens=24)
    assert [choice.index for choice in answer.choices] == [0, 1]
    assert text_of(answer, 0) != text_of(answer, 1)
    assert answer.usage.prompt_tokens == one.usage.prompt_tokens
    assert answer.usage.completion_tokens <= 48
    assert answer.usage.completion_tokens > 24


def test_greedy_choices_are_all_the_same(client):
    answer = ask(client, LONG, n=2, max_tokens=24)
    assert text_of(answer, 0) == text_of(answer, 1) == text_of(ask(client, LONG, max_tokens=24))


def test_a_seed_fixes_the_answer_whatever_else_runs(server, client):
    options = dict(temperature=1, seed=1234, max_tokens=24)
    alone = text_of(ask(client, LONG, **options))
    noise = [ask(client, LONG, stream=True, temperature=1, max_tokens=300, extra_body={"ignore_eos": True}) for _ in range(3)]
    for stream in noise:
        next(iter(stream))
    beside = text_of(ask(client, LONG, **options))
    for stream in noise:
        stream.close()
    server.wait_idle()
    assert alone == beside
    assert alone != text_of(ask(client, LONG, **{**options, "seed": 1235}))


def test_without_a_seed_answers_vary(client):
    assert len({text_of(ask(client, LONG, temperature=1.2, max_tokens=24)) for _ in range(4)}) > 1


@pytest.mark.parametrize("stream", [False, True])
def test_the_answer_ends_before_a_stop_string(client, stream):
    full = text_of(ask(client, LONG, max_tokens=48))
    # A piece from the middle of the text that crosses a token's border.
    at = len(full) // 2
    stop = full[at : at + 6]
    cut = full[: full.index(stop)]
    if stream:
        chunks = list(ask(client, LONG, max_tokens=48, stop=stop, stream=True))
        text = "".join(choice.delta.content or "" for chunk in chunks for choice in chunk.choices)
        reason = chunks[-1].choices[0].finish_reason
    else:
        answer = ask(client, LONG, max_tokens=48, stop=[stop, "never in the text at all"])
        text, reason = text_of(answer), answer.choices[0].finish_reason
    assert (text, reason) == (cut, "stop")


def test_a_stop_string_that_only_begins_is_flushed_at_the_end(client):
    full = text_of(ask(client, LONG, max_tokens=20))
    assert text_of(ask(client, LONG, max_tokens=20, stop=full[-4:] + "\0never")) == full


def test_a_stop_string_may_be_kept(client):
    full = text_of(ask(client, LONG, max_tokens=48))
    at = len(full) // 2
    stop = full[at : at + 6]
    answer = ask(client, LONG, max_tokens=48, stop=stop, extra_body={"include_stop_str_in_output": True})
    assert text_of(answer) == full[: full.index(stop)] + stop


def test_stop_token_ids_end_the_answer(server):
    body = {"model": MODEL, "messages": LONG, "temperature": 0, "max_tokens": 20, "return_token_ids": True}
    ids = server.post("/v1/chat/completions", body).json()["choices"][0]["token_ids"]
    stopped = server.post("/v1/chat/completions", {**body, "stop_token_ids": [ids[9]]}).json()["choices"][0]
    assert stopped["finish_reason"] == "stop"
    assert stopped["token_ids"][: ids.index(ids[9])] == ids[: ids.index(ids[9])]
    assert len(stopped["token_ids"]) <= ids.index(ids[9]) + 1


def test_ignore_eos_goes_on_to_the_limit(client):
    answer = ask(client, [{"role": "user", "content": "Name three colours of the rainbow."}], max_tokens=100, extra_body={"ignore_eos": True})
    assert answer.usage.completion_tokens == 100
    assert answer.choices[0].finish_reason == "length"


def test_min_tokens_holds_the_end_back(client):
    short = [{"role": "user", "content": "Name three colours of the rainbow."}]
    plain = ask(client, short, max_tokens=200).usage.completion_tokens
    longer = ask(client, short, max_tokens=200, extra_body={"min_tokens": plain + 10}).usage.completion_tokens
    assert longer >= plain + 10


def test_a_bias_of_minus_100_bans_and_100_forces(server):
    body = {"model": MODEL, "messages": QUESTION, "temperature": 0, "max_tokens": 6, "return_token_ids": True}
    first = server.post("/v1/chat/completions", body).json()["choices"][0]["token_ids"][0]
    banned = server.post("/v1/chat/completions", {**body, "logit_bias": {str(first): -100}}).json()["choices"][0]["token_ids"]
    assert first not in banned
    forced = server.post("/v1/chat/completions", {**body, "logit_bias": {"504": 100}}).json()["choices"][0]["token_ids"]
    assert forced == [504] * 6


def test_penalties_break_repetition(server):
    body = {"model": MODEL, "prompt": "la la la la la la la la", "temperature": 0, "max_tokens": 40, "ignore_eos": True, "return_token_ids": True}
    distinct = lambda **options: len(set(server.post("/v1/completions", {**body, **options}).json()["choices"][0]["token_ids"]))
    plain = distinct()
    assert distinct(repetition_penalty=1.8) > plain
    assert distinct(frequency_penalty=2) > plain
    assert distinct(presence_penalty=2) > plain


@pytest.mark.parametrize("options", [{"top_k": 1}, {"min_p": 1.0}], ids=["top_k", "min_p"])
def test_the_narrowest_truncation_is_greedy(client, options):
    greedy = text_of(ask(client, LONG, max_tokens=16))
    assert text_of(ask(client, LONG, max_tokens=16, temperature=1.5, extra_body=options)) == greedy


def test_top_p_near_zero_is_greedy(client):
    greedy = text_of(ask(client, LONG, max_tokens=16))
    assert text_of(ask(client, LONG, max_tokens=16, temperature=1.5, top_p=1e-6)) == greedy


def test_logprobs_are_those_of_the_text_with_the_likeliest_beside(client):
    answer = ask(client, logprobs=True, top_logprobs=5, max_tokens=10)
    entries = answer.choices[0].logprobs.content
    assert len(entries) == answer.usage.completion_tokens
    assert b"".join(bytes(entry.bytes) for entry in entries).decode() == text_of(answer)
    for entry in entries:
        assert entry.logprob <= 0
        assert len(entry.top_logprobs) == 5
        values = [top.logprob for top in entry.top_logprobs]
        assert values == sorted(values, reverse=True)
        # Greedy: the drawn token is the likeliest.
        assert (entry.token, entry.logprob) == (entry.top_logprobs[0].token, entry.top_logprobs[0].logprob)
        assert sum(math.exp(value) for value in values) <= 1 + 1e-4


def test_top_logprobs_zero_gives_empty_lists(client):
    answer = ask(client, logprobs=True, top_logprobs=0)
    assert all(entry.top_logprobs == [] for entry in answer.choices[0].logprobs.content)


def test_streamed_logprobs_are_the_same(client):
    single = ask(client, logprobs=True, top_logprobs=2, max_tokens=10).choices[0].logprobs.content
    streamed = [
        entry
        for chunk in ask(client, logprobs=True, top_logprobs=2, max_tokens=10, stream=True)
        for choice in chunk.choices
        if choice.logprobs
        for entry in choice.logprobs.content or []
    ]
    assert [entry.token for entry in streamed] == [entry.token for entry in single]
    assert [entry.logprob for entry in streamed] == pytest.approx([entry.logprob for entry in single], abs=0.05)


def test_logprob_bytes_are_exact_inside_characters(client):
    messages = [{"role": "user", "content": "Repeat exactly: 🌊🚣 潮が満ちる 🌊🌊🌊"}]
    answer = ask(client, messages, logprobs=True, max_tokens=40)
    joined = b"".join(bytes(entry.bytes) for entry in answer.choices[0].logprobs.content)
    # The text shows the replacement character where the length ended it inside one.
    assert joined.decode(errors="replace").rstrip("\ufffd") == text_of(answer).rstrip("\ufffd")


def test_log_probabilities_are_shown_raw_or_processed(client):
    def content(mode):
        extra = {"top_k": 2, "logprobs_mode": mode}
        options = dict(temperature=0.5, top_p=1, seed=5, max_tokens=12, logprobs=True, top_logprobs=2, extra_body=extra)
        return ask(client, LONG, **options).choices[0].logprobs.content

    raw, processed = content("raw_logprobs"), content("processed_logprobs")
    assert [entry.token for entry in raw] == [entry.token for entry in processed]
    for before, after in zip(raw, processed):
        # Two tokens remain, and all probability is theirs; at temperature ½ their distance doubles.
        assert sum(math.exp(top.logprob) for top in after.top_logprobs) == pytest.approx(1, abs=1e-4)
        distances = [abs(entry.top_logprobs[0].logprob - entry.top_logprobs[1].logprob) for entry in (before, after)]
        assert distances[1] == pytest.approx(2 * distances[0], abs=1e-3)
    with pytest.raises(openai.BadRequestError) as refused:
        content("both")
    assert refused.value.param == "logprobs_mode"
