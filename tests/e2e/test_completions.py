"""`/v1/completions`: all forms of a prompt, echo, log-probabilities, best_of."""

import openai
import pytest

from conftest import MODEL, golden

PROMPT = "The tide mill stood at the mouth of the creek"


def complete(client, prompt=PROMPT, **options):
    return client.completions.create(model=MODEL, prompt=prompt, **{"temperature": 0, "max_tokens": 8, **options})


def tokens_of(server, text: str) -> list[int]:
    return server.post("/tokenize", {"model": MODEL, "prompt": text}).json()["tokens"]


def test_a_string(client):
    answer = complete(client)
    assert answer.object == "text_completion"
    assert answer.id.startswith("cmpl-")
    [choice] = answer.choices
    assert choice.text and choice.finish_reason == "length" and choice.logprobs is None
    assert answer.usage.completion_tokens == 8


def test_sixteen_tokens_are_the_default(client):
    answer = client.completions.create(model=MODEL, prompt=PROMPT, temperature=0, extra_body={"ignore_eos": True})
    assert answer.usage.completion_tokens == 16


def test_token_ids_are_the_same_prompt(server, client):
    ids = tokens_of(server, PROMPT)
    answer = complete(client, ids)
    assert answer.choices[0].text == complete(client).choices[0].text
    assert answer.usage.prompt_tokens == len(ids)


def test_a_list_of_strings_and_of_token_lists(server, client):
    prompts = [PROMPT, "Once upon a time", "def add(a, b):"]
    alone = [complete(client, prompt).choices[0].text for prompt in prompts]
    together = complete(client, prompts)
    assert [choice.index for choice in together.choices] == [0, 1, 2]
    assert [choice.text for choice in together.choices] == alone
    as_ids = complete(client, [tokens_of(server, prompt) for prompt in prompts])
    assert [choice.text for choice in as_ids.choices] == alone
    assert together.usage.prompt_tokens == sum(len(tokens_of(server, prompt)) for prompt in prompts)
    assert together.usage.completion_tokens == 24


def test_several_prompts_times_several_choices(client):
    answer = complete(client, [PROMPT, "Once upon a time"], n=2)
    texts = [choice.text for choice in answer.choices]
    assert [choice.index for choice in answer.choices] == [0, 1, 2, 3]
    assert texts[0] == texts[1] and texts[2] == texts[3] and texts[0] != texts[2]


def test_echo_puts_the_prompt_first(client):
    assert complete(client, echo=True).choices[0].text == PROMPT + complete(client).choices[0].text


def test_logprobs_are_parallel_arrays(client):
    answer = complete(client, logprobs=3)
    report = answer.choices[0].logprobs
    assert len(report.tokens) == len(report.token_logprobs) == len(report.top_logprobs) == len(report.text_offset) == 8
    assert "".join(report.tokens) == answer.choices[0].text
    assert report.text_offset[0] == 0 and report.text_offset == sorted(report.text_offset)
    for token, value, top in zip(report.tokens, report.token_logprobs, report.top_logprobs):
        assert 3 <= len(top) <= 4
        # Greedy: the drawn token is the likeliest.
        assert top[token] == max(top.values()) == value


def test_echo_with_logprobs_scores_the_prompt(server, client):
    answer = complete(client, echo=True, logprobs=1, max_tokens=4)
    report = answer.choices[0].logprobs
    prompt_tokens = len(tokens_of(server, PROMPT))
    assert len(report.tokens) == prompt_tokens + 4
    assert report.token_logprobs[0] is None
    assert all(value <= 0 for value in report.token_logprobs[1:])
    assert "".join(report.tokens) == answer.choices[0].text
    assert [answer.choices[0].text[offset:].startswith(token) for offset, token in zip(report.text_offset, report.tokens)] == [True] * len(report.tokens)


def test_echo_with_no_new_tokens_only_scores(client):
    answer = complete(client, echo=True, logprobs=0, max_tokens=0)
    assert answer.choices[0].text == PROMPT
    assert len(answer.choices[0].logprobs.tokens) == answer.usage.prompt_tokens


def test_scores_of_a_prompt_do_not_depend_on_how_it_was_cached(client):
    expected = golden("smollm2/perplexity.json")["ids"][:300]
    score = lambda: complete(client, expected, echo=True, logprobs=0, max_tokens=1).choices[0].logprobs.token_logprobs[1:-1]
    assert score() == pytest.approx(score(), abs=1e-3)


def test_best_of_returns_the_likeliest(client):
    answer = complete(client, best_of=3, n=1, temperature=1, seed=9, logprobs=0)
    assert len(answer.choices) == 1
    for options in [dict(best_of=1, n=2), dict(best_of=2, stream=True)]:
        with pytest.raises(openai.BadRequestError) as raised:
            complete(client, **options)
        assert raised.value.param == "best_of"


@pytest.mark.parametrize(
    ("prompt", "param"),
    [([], "prompt"), ("", "prompt"), ([[]], "prompt.0"), ([1, "a"], "prompt.1"), ({"text": "a"}, "prompt"), ([10**6], "prompt"), ([-1], "prompt.0")],
)
def test_prompts_that_are_none(server, prompt, param):
    answer = server.post("/v1/completions", {"model": MODEL, "prompt": prompt})
    assert answer.status == 400
    assert answer.error["param"] == param, answer.error
