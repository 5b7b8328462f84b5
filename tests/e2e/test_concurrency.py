"""Many clients at once, clients that leave, and clients that do not read."""

import asyncio
import json
import signal
import socket
import subprocess
import sys
import time

from conftest import MODEL
from server import eventually
from test_chat import ask

STREAMS = 200
TOKENS = 24
QUESTIONS = [
    "What is gravity?", "Write a haiku about the sea.", "How do I boil an egg?", "Who was Ada Lovelace?", "What is an API?",
    "Give me a shopping list for pancakes.", "What is the largest planet?", "Tell me a joke about computers.",
    "Describe the colour red to a blind person.", "What are the main differences between a lake and a river?",
]


def messages(index: int) -> list[dict]:
    return [{"role": "user", "content": QUESTIONS[index % len(QUESTIONS)]}]


def test_200_streams_at_once_all_finish_with_the_answer_of_a_single_run(server, client):
    alone = [ask(client, messages(i), max_tokens=TOKENS).choices[0].message.content for i in range(len(QUESTIONS))]

    async def one(caller, index: int) -> tuple[str, int, str]:
        stream = await caller.chat.completions.create(
            model=MODEL, messages=messages(index), temperature=0, max_tokens=TOKENS, stream=True, stream_options={"include_usage": True}
        )
        text, tokens, reason = "", 0, None
        async for chunk in stream:
            for choice in chunk.choices:
                text += choice.delta.content or ""
                reason = choice.finish_reason or reason
            tokens = chunk.usage.completion_tokens if chunk.usage else tokens
        return text, tokens, reason

    async def everyone() -> list[tuple[str, int, str]]:
        async with server.async_client() as caller:
            return await asyncio.gather(*(one(caller, index) for index in range(STREAMS)))

    results = asyncio.run(everyone())
    assert len(results) == STREAMS
    for index, (text, tokens, reason) in enumerate(results):
        assert reason in ("length", "stop"), index
        assert tokens == TOKENS if reason == "length" else tokens <= TOKENS, index
    different = [index for index, (text, _, _) in enumerate(results) if text != alone[index % len(alone)]]
    assert not different, f"{len(different)} of {STREAMS} answers differ from the single run, the first is {results[different[0]][0]!r}, alone it was {alone[different[0] % len(alone)]!r}"
    metrics = server.wait_idle()
    assert metrics.get("tidemill:request_failure_total", 0) == 0


KILLED_CLIENT = """
import sys, openai
client = openai.OpenAI(base_url=sys.argv[1], api_key="none")
stream = client.chat.completions.create(
    model=sys.argv[2], messages=[{"role": "user", "content": "Write a long story."}], stream=True, max_tokens=4000, extra_body={"ignore_eos": True})
for chunk in stream:
    if chunk.choices[0].delta.content:
        print("streaming", flush=True)
"""


def test_a_client_killed_mid_stream_frees_its_blocks(server):
    before = server.wait_idle()
    process = subprocess.Popen([sys.executable, "-c", KILLED_CLIENT, server.base_url, MODEL], stdout=subprocess.PIPE, text=True)
    try:
        for _ in range(20):
            assert process.stdout.readline() == "streaming\n"
        during = server.metrics()
        assert during["tidemill:num_requests_running"] == 1
        assert during["tidemill:kv_cache_usage_perc"] > before["tidemill:kv_cache_usage_perc"]
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
    after = server.wait_idle()
    assert after["tidemill:generation_tokens_total"] < before["tidemill:generation_tokens_total"] + 4000, "it ended by itself"
    assert after["tidemill:kv_cache_usage_perc"] == before["tidemill:kv_cache_usage_perc"]
    made = after["tidemill:generation_tokens_total"]
    time.sleep(0.3)
    assert server.metrics()["tidemill:generation_tokens_total"] == made


def test_a_client_that_leaves_before_its_answer_is_cancelled_too(server):
    before = server.wait_idle()
    body = json.dumps({"model": MODEL, "messages": messages(0), "max_tokens": 4000, "ignore_eos": True}).encode()
    with socket.create_connection(("127.0.0.1", server.port)) as connection:
        connection.sendall(b"POST /v1/chat/completions HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\ncontent-length: %d\r\n\r\n%s" % (len(body), body))
        eventually("it runs", lambda: server.metrics()["tidemill:num_requests_running"] == 1)
    after = server.wait_idle()
    assert after["tidemill:generation_tokens_total"] < before["tidemill:generation_tokens_total"] + 4000, "it ended by itself"


def test_a_client_that_does_not_read_does_not_stall_others(server, client):
    before = server.wait_idle()["tidemill:generation_tokens_total"]
    body = json.dumps({"model": MODEL, "messages": messages(0), "max_tokens": 6000, "ignore_eos": True, "stream": True, "logprobs": True, "top_logprobs": 20}).encode()
    stalled = []
    try:
        for _ in range(2):
            connection = socket.socket()
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            connection.connect(("127.0.0.1", server.port))
            connection.sendall(b"POST /v1/chat/completions HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\ncontent-length: %d\r\n\r\n%s" % (len(body), body))
            stalled.append(connection)
        eventually("both are being answered", lambda: server.metrics()["tidemill:generation_tokens_total"] > before + 100)
        # Enough for the sockets' buffers to fill, where the machine has nothing else to do.
        time.sleep(4)
        # It would never come if these two held it up, and late if they were answered first.
        answer = ask(client, messages(1), max_tokens=48, extra_body={"ignore_eos": True})
        during = server.metrics()
    finally:
        for connection in stalled:
            connection.close()
    assert answer.usage.completion_tokens == 48
    assert during["tidemill:generation_tokens_total"] < before + 2 * 6000, "the two had ended"
    server.wait_idle()


def test_clients_that_come_and_go_leave_nothing_behind(server):
    before = server.wait_idle()

    async def visitor(caller, index: int) -> None:
        stream = await caller.chat.completions.create(
            model=MODEL, messages=messages(index), temperature=1, n=1 + index % 3, max_tokens=500, stream=True, extra_body={"ignore_eos": True}
        )
        seen = 0
        async for _ in stream:
            seen += 1
            if seen > index % 17:
                break
        await stream.close()

    async def everyone() -> None:
        async with server.async_client() as caller:
            await asyncio.gather(*(visitor(caller, index) for index in range(60)))

    asyncio.run(everyone())
    after = server.wait_idle()
    assert after["tidemill:kv_cache_usage_perc"] == before["tidemill:kv_cache_usage_perc"]
    server.assert_alive()
