"""The labeling page in a real browser: two people at once, by keyboard, and what the store holds afterwards."""

import asyncio
import json
import os
import shutil
import sqlite3
import subprocess
import time
from contextlib import asynccontextmanager, closing
from pathlib import Path

import pytest
from playwright.async_api import Page, async_playwright

from server import PATIENCE, binary, eventually

PAIRS = 40
OVERLAP = 2
SHOTS = os.environ.get("TIDEMILL_SCREENSHOTS")
ATTACK = (
    "<img src=x onerror=\"window.pwned='img'\"><script>window.pwned='script'</script>"
    "<svg onload=\"window.pwned='svg'\"></svg> [click](javascript:window.pwned='link') "
    "[data](data:text/html,<script>parent.pwned=1</script>) ![i](https://example.invalid/track.png)"
)
GUIDELINES = (
    "**Prefer** the answer that\n\n1. is *correct*,\n2. does what was asked, no more,\n3. says so if it does not know.\n\n"
    "A longer answer is not a better one. Use **both bad** when you would send neither."
)
QUESTIONS = [
    "Why is the sky blue?",
    "How do I reverse a list in Python?",
    "Write a polite reminder about an unpaid invoice.",
    "What is the difference between TCP and UDP?",
]
GOOD = [
    "Sunlight is scattered by the molecules of the air, and **blue light is scattered more** than red, because its wavelength is shorter.",
    "Use `reversed` for an iterator, or a slice for a new list:\n\n```python\nitems = [1, 2, 3]\nprint(items[::-1])  # [3, 2, 1]\n```\n\nTo reverse in place, call `items.reverse()`.",
    "Subject: Invoice 1042\n\nDear Ms Okafor,\n\nour invoice of 3 May seems to be still open. Could you let us know when we may expect the payment?\n\nKind regards",
    "| | TCP | UDP |\n|---|---|---|\n| Order | kept | not kept |\n| Loss | repaired | yours to handle |\n\nTake **TCP** for files, **UDP** for calls.",
]
WORSE = [
    "Sunlight is reflected by the water of the oceans, and blue light is reflected more than red, because the sea is blue.",
    "Use `reversed` for a new list:\n\n```python\nitems = [1, 2, 3]\nprint(items.reversed())\n```\n\nTo reverse in place, sort it:\n\n- first ascending\n- then descending",
    "Hey,\n\nyou did not pay. Our invoice of 3 May is still open. Pay it today.\n\nKind regards",
    "They are both protocols. TCP is older, UDP is newer and better. Take UDP.",
]


def pair(number: int) -> dict:
    question = QUESTIONS[number % len(QUESTIONS)]
    good, worse = GOOD[number % len(GOOD)], WORSE[number % len(WORSE)]
    if number == 7:
        worse += "\n\n" + ATTACK
        question += " " + ATTACK
    return {
        "source": f"pair-{number}",
        "prompt": [{"role": "system", "content": "You are brief."}, {"role": "user", "content": f"{question} (no. {number})"}],
        "answer_a": good,
        "answer_b": worse,
    }


@asynccontextmanager
async def chromium():
    path = shutil.which("chromium")
    assert path, "no chromium: apt-get install chromium (make test-e2e does)"
    flags = ["--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
             "--disable-component-update", "--disable-sync"]
    async with async_playwright() as playwright:
        browser = await playwright.chromium.launch(executable_path=path, args=flags)
        try:
            yield browser
        finally:
            await browser.close()


class Annotator:
    """A person at the page, who knows which answer is good and uses the keyboard only."""

    def __init__(self, name: str, page: Page):
        self.name, self.page = name, page
        self.judged: list[str] = []
        self.errors: list[str] = []
        page.on("pageerror", lambda error: self.errors.append(str(error)))
        page.on("console", lambda message: self.errors.append(message.text) if message.type == "error" else None)

    async def sign_in(self, url: str) -> None:
        await self.page.goto(url)
        await self.page.wait_for_selector("#door-field")
        await self.page.keyboard.type(self.name)
        await self.page.keyboard.press("Enter")

    async def settled(self) -> str:
        """What the page shows once it stands still: the task's question, or `None`-like text when there is none."""
        await self.page.wait_for_function(
            "() => !document.body.hasAttribute('aria-busy') && (!document.getElementById('bench').hidden || !document.getElementById('rest').hidden)"
        )
        # Keys in the first moment belong to the task before.
        await asyncio.sleep(0.3)
        if await self.page.locator("#rest").is_visible():
            return ""
        return (await self.page.locator(".turn").last.inner_text()).strip()

    async def press(self, key: str, question: str) -> None:
        await self.page.keyboard.press(key)
        await self.page.wait_for_function(
            "before => !document.getElementById('rest').hidden || [...document.querySelectorAll('.turn')].at(-1)?.innerText.trim() !== before",
            arg=question,
        )

    async def good_side(self) -> str:
        left = await self.page.locator("#left-text").inner_text()
        markers = ["scattered by the molecules", "items.reverse()", "Dear Ms Okafor", "for calls"]
        return "1" if any(marker in left for marker in markers) else "2"

    async def work(self, limit: int = PAIRS) -> None:
        while len(self.judged) < limit:
            question = await self.settled()
            if not question:
                # The other one holds the last pairs.
                await asyncio.sleep(0.3)
                await self.page.locator("#rest-again").click()
                continue
            assert question not in self.judged, "the same task twice"
            turn = len(self.judged)
            key = "t" if turn % 10 == 4 else "=" if turn % 10 == 9 else "b" if turn % 13 == 6 else await self.good_side()
            if turn % 8 == 3:
                await self.page.keyboard.press("d")
                await self.page.wait_for_selector("#left-text mark, #right-text mark")
                await self.page.keyboard.press("d")
            await self.press(key, question)
            if turn % 7 == 5 and limit == PAIRS:
                await self.settled()
                after = await self.page.locator(".turn").last.inner_text()
                await self.page.keyboard.press("u" if turn % 2 else "Control+z")
                await self.page.wait_for_selector("#notice.good")
                again = await self.settled()
                if again == question:
                    await self.press(key, question)
                else:
                    # The other one took it in between: it comes back later or not at all.
                    assert after
                    continue
            self.judged.append(question)

    async def skip(self) -> str:
        question = await self.settled()
        await self.page.keyboard.press("s")
        await self.page.wait_for_selector("#skip-dialog[open]")
        await self.shoot("skip")
        await self.page.keyboard.press("2")
        await self.page.wait_for_function(
            "before => !document.getElementById('rest').hidden || [...document.querySelectorAll('.turn')].at(-1)?.innerText.trim() !== before",
            arg=question,
        )
        return question

    async def shoot(self, name: str) -> None:
        if SHOTS:
            Path(SHOTS).mkdir(parents=True, exist_ok=True)
            await self.page.screenshot(path=f"{SHOTS}/{name}.png")


def rows(database: Path, query: str) -> list[sqlite3.Row]:
    with closing(sqlite3.connect(f"file:{database}?mode=ro", uri=True)) as connection:
        connection.row_factory = sqlite3.Row
        return connection.execute(query).fetchall()


def make_queue(server, name: str, **fields) -> dict:
    made = server.post("/v1/labeling/queues", {"name": name, "guidelines": GUIDELINES, "gold_share": 0.0, **fields})
    assert made.status == 201, made.body
    return made.json()


def test_two_people_label_forty_pairs_by_keyboard(start, tmp_path):
    server = start()
    queue = make_queue(server, "answers", overlap=OVERLAP)
    pairs = {"tasks": [pair(number) for number in range(PAIRS)]}
    assert server.post(f"/v1/labeling/queues/{queue['id']}/tasks", pairs).json() == {"added": PAIRS, "known": 0}
    assert server.post(f"/v1/labeling/queues/{queue['id']}/tasks", pairs).json() == {"added": 0, "known": PAIRS}
    url = f"http://127.0.0.1:{server.port}/console/label"

    async def label():
        async with chromium() as browser:
            contexts = [await browser.new_context(viewport={"width": 1440, "height": 960}, color_scheme=scheme) for scheme in ["light", "dark", "light"]]
            ann, bob, carl = [Annotator(name, await context.new_page()) for name, context in zip(["ann", "bob", "carl"], contexts)]
            await asyncio.gather(ann.sign_in(url), bob.sign_in(url))
            # Ann skips one for good and another one only to take it back.
            skipped = await ann.skip()
            regretted = await ann.skip()
            await ann.settled()
            await ann.page.keyboard.press("u")
            await ann.page.wait_for_selector("#notice.good")
            assert await ann.settled() == regretted
            await asyncio.gather(ann.work(PAIRS - 1), bob.work(PAIRS))
            await carl.sign_in(url)
            await carl.work(1)
            assert carl.judged == [skipped]
            for person in [ann, bob, carl]:
                assert await person.settled() == "", "nothing is left"
                assert await person.page.evaluate("window.pwned") is None
                assert person.errors == []

    asyncio.run(label())

    database = tmp_path / "run0" / "data" / "tidemill.db"
    tasks = rows(database, "SELECT id, source, verdicts, done FROM label_tasks")
    assert len(tasks) == PAIRS
    assert all(task["verdicts"] == OVERLAP and task["done"] == 1 for task in tasks)
    done = rows(database, "SELECT * FROM label_assignments WHERE state = 'done'")
    assert len(done) == PAIRS * OVERLAP
    assert len({(row["task_id"], row["annotator"]) for row in done}) == len(done), "nobody judged a task twice"
    skips = rows(database, "SELECT annotator, reason FROM label_assignments WHERE state = 'skipped'")
    assert [(row["annotator"], bool(row["reason"])) for row in skips] == [("ann", True)]
    # Both sides occur; for 80 fair coins, outside of 10..70 is rarer than one in 10¹¹.
    assert 10 <= sum(row["a_is_left"] for row in done) <= 70

    feedback = server.get("/v1/labeling/queues/answers/statistics").json()
    assert feedback["progress"]["verdicts"] == PAIRS * OVERLAP
    stored = {row["id"]: row for row in rows(database, "SELECT * FROM feedback WHERE kind = 'comparison' AND withdrawn = 0")}
    assert len(stored) == PAIRS * OVERLAP
    assert rows(database, "SELECT COUNT(*) AS n FROM feedback WHERE withdrawn = 1")[0]["n"] >= 5, "undone verdicts stay, withdrawn"

    for row in done:
        verdict = stored[row["feedback_id"]]
        value = json.loads(verdict["value"])
        a, b = value["candidates"]
        assert value["shown"] == ([a, b] if row["a_is_left"] else [b, a])
        assert value["ranking"] == {"a": [[a], [b]], "b": [[b], [a]]}.get(row["verdict"], [[a, b]])
        assert value["both_bad"] == (row["verdict"] == "both_bad")
        assert (verdict["author"], verdict["source"], verdict["task_id"]) == (row["annotator"], "console", row["task_id"])
    # They used the keys for what they know to be better, whichever side it was on.
    assert {row["verdict"] for row in done} == {"a", "tie", "both_bad"}
    assert feedback["agreement"]["tasks"] == PAIRS


def test_a_verdict_given_offline_is_kept_and_sent_once(start, tmp_path):
    server = start()
    queue = make_queue(server, "offline")
    server.post(f"/v1/labeling/queues/{queue['id']}/tasks", {"tasks": [pair(number) for number in range(3)]})

    async def label():
        async with chromium() as browser:
            context = await browser.new_context()
            ann = Annotator("ann", await context.new_page())
            await ann.sign_in(f"http://127.0.0.1:{server.port}/console/label")
            question = await ann.settled()
            await context.set_offline(True)
            await ann.page.keyboard.press("1")
            await ann.page.wait_for_function("() => document.getElementById('notice').textContent.startsWith('Offline')")
            assert "kept" in await ann.page.locator("#notice").inner_text()
            await ann.shoot("offline")
            # A second key must not judge it again, and the page may even be closed.
            await ann.page.keyboard.press("2")
            await context.set_offline(False)
            await ann.page.wait_for_function(
                "before => [...document.querySelectorAll('.turn')].at(-1)?.innerText.trim() !== before", arg=question
            )
            await context.set_offline(True)
            await ann.settled()
            await ann.page.keyboard.press("t")
            await ann.page.wait_for_function("() => document.getElementById('notice').textContent.startsWith('Offline')")
            await context.set_offline(False)
            await ann.page.reload()
            await ann.settled()
            assert await ann.page.evaluate("localStorage.length") == 0

    asyncio.run(label())
    done = rows(tmp_path / "run0" / "data" / "tidemill.db", "SELECT verdict, a_is_left FROM label_assignments WHERE state = 'done' ORDER BY finished")
    assert len(done) == 2
    assert done[0]["verdict"] == ("a" if done[0]["a_is_left"] else "b"), "the first key counts"
    assert done[1]["verdict"] == "tie"


def test_keys_name_the_annotators_and_a_lost_lease_is_said(start, tmp_path):
    server = start()
    queue = make_queue(server, "keys", lease_seconds=600)
    server.post(f"/v1/labeling/queues/{queue['id']}/tasks", {"tasks": [pair(number) for number in range(2)]})
    data = tmp_path / "run0" / "data"

    def key(name: str, scope: str) -> str:
        command = [binary(), "key", "create", "--name", name, "--scope", scope, "--data", data]
        return subprocess.run([str(part) for part in command], capture_output=True, text=True, check=True).stdout.strip()

    ann_key, bob_key, chat_key = key("ann", "label"), key("bob", "label"), key("app", "chat")
    eventually("the server asks for a key", lambda: server.get("/v1/models").status == 401)

    async def label():
        async with chromium() as browser:
            url = f"http://127.0.0.1:{server.port}/console/label"
            ann, bob = [Annotator(secret, await (await browser.new_context()).new_page()) for secret in [ann_key, bob_key]]
            await ann.page.goto(url)
            for wrong in ["tm-nonsense", chat_key]:
                await ann.page.wait_for_selector("#door-field")
                assert await ann.page.locator("#door-field").get_attribute("type") == "password"
                await ann.page.locator("#door-field").fill(wrong)
                await ann.page.keyboard.press("Enter")
                await ann.page.wait_for_function("() => document.getElementById('door-wrong').textContent !== ''")
            await ann.page.locator("#door-field").fill(ann_key)
            await ann.page.keyboard.press("Enter")
            first = await ann.settled()
            assert await ann.page.locator("#who").inner_text() == "ann"
            # She looks away for longer than the lease, and the task goes to someone else. Here the lease ends at once.
            with closing(sqlite3.connect(data / "tidemill.db", timeout=PATIENCE)) as connection, connection:
                connection.execute("UPDATE label_tasks SET leased_until = 1 WHERE leased_until > 1")
            await bob.sign_in(url)
            assert await bob.settled() == first
            await ann.page.keyboard.press("1")
            await ann.page.wait_for_function("() => document.getElementById('notice').textContent.includes('went to someone else')")
            second = await ann.settled()
            assert second and second != first
            await bob.press("t", first)
            await ann.press("b", second)

    asyncio.run(label())
    database = data / "tidemill.db"
    done = rows(database, "SELECT annotator, verdict FROM label_assignments WHERE state = 'done' ORDER BY annotator")
    assert [tuple(row) for row in done] == [("ann", "both_bad"), ("bob", "tie")]
    names = rows(database, "SELECT f.author, k.name FROM feedback f JOIN api_keys k ON k.id = f.key_id ORDER BY f.author")
    assert [tuple(row) for row in names] == [("ann", "ann"), ("bob", "bob")]


@pytest.mark.timeout(600)
def test_traffic_and_prompts_become_pairs(start):
    server = start()
    made = make_queue(server, "traffic", rule={"from": "traffic", "share": 1.0})
    prompts = make_queue(server, "prompts")
    sent = {"prompts": ["Name a colour and say why you like it.", [{"role": "user", "content": "Tell me a very short story."}]]}
    assert server.post(f"/v1/labeling/queues/{prompts['id']}/prompts", sent).json() == {"added": 2, "known": 0}
    answer = server.post(
        "/v1/chat/completions",
        {"model": server.model, "messages": [{"role": "user", "content": "Say hello."}], "max_tokens": 64, "temperature": 0},
    )
    assert answer.status == 200

    # Four answers of up to a thousand tokens each.
    progress = lambda: server.get(f"/v1/labeling/queues/{prompts['id']}").json()["progress"]
    eventually("both prompts have an end", lambda: progress()["tasks"] + progress()["failed"] == 2, seconds=240)
    assert progress()["tasks"] == 2, progress()
    tasks = server.get(f"/v1/labeling/queues/{prompts['id']}/tasks").json()["data"]
    for task in tasks:
        assert task["answer_a"] != task["answer_b"]
        assert task["candidate_a"] and task["candidate_b"]
    if answer.json()["choices"][0]["finish_reason"] == "stop":
        tasks = lambda: server.get(f"/v1/labeling/queues/{made['id']}/tasks").json()["data"]
        eventually("the answer has got another beside it", tasks, seconds=240)
        found = tasks()
        assert found[0]["answer_a"] == answer.json()["choices"][0]["message"]["content"]
        assert found[0]["answer_b"] != found[0]["answer_a"]


RENDERED = [
    ("*a* **b _c_** `*d*` ~~e~~", "<p><em>a</em> <strong>b <em>c</em></strong> <code>*d*</code> <s>e</s></p>"),
    ("- a\n  - b\n- c", "<ul><li>a<ul><li>b</li></ul></li><li>c</li></ul>"),
    ("in\n1984. no list", "<p>in<br>1984. no list</p>"),
    ("# h\n> q", "<h3>h</h3><blockquote><p>q</p></blockquote>"),
    ("```html\n<b>&\n```", "<pre><code>&lt;b&gt;&amp;</code></pre>"),
    ("|a|b|\n|-|-|\n|1|2|", "<table><thead><tr><th>a</th><th>b</th></tr></thead><tbody><tr><td>1</td><td>2</td></tr></tbody></table>"),
    ("[x](javascript:alert(1)) <script>alert(1)</script>", "<p>[x](javascript:alert(1)) &lt;script&gt;alert(1)&lt;/script&gt;</p>"),
    ("![p](https://e.org/a.png)", '<p><a href="https://e.org/a.png" rel="noopener noreferrer nofollow" target="_blank" title="https://e.org/a.png">p</a></p>'),
]
SLOW = ["**a " * 20000, "`a ``b " * 15000, "[" * 50000, "[a](" * 20000, ">" * 20000 + "x", "|" * 50000 + "\n|-|", "https://" + "a(" * 20000,
        "# a" + " " * 20000 + "b", "#" + " " * 20000 + "\u2028b", "a" + " " * 100000 + "b", "|a|\n" + " " * 50000 + "x-"]


def test_markdown_becomes_nodes_and_a_diff_loses_nothing(start):
    server = start()

    async def look():
        async with chromium() as browser:
            page = await (await browser.new_context()).new_page()
            await page.goto(f"http://127.0.0.1:{server.port}/console/label")
            render = """async texts => {
                const { markdown } = await import('/console/markdown.js');
                return texts.map(text => { const div = document.createElement('div'); div.append(markdown(text)); return div.innerHTML; });
            }"""
            assert await page.evaluate(render, [text for text, _ in RENDERED]) == [html for _, html in RENDERED]
            begin = time.monotonic()
            await page.evaluate(render, SLOW)
            # Each is done in a blink; with a square of their lengths in it, hours.
            assert time.monotonic() - begin < PATIENCE, "hostile text must not hang the page"
            diff = """async () => {
                const { wordDiff } = await import('/console/diff.js');
                const join = pieces => pieces.map(piece => piece.text).join('');
                const kept = pieces => pieces.filter(piece => !piece.only).map(piece => piece.text).join('').replace(/\\s+/g, '');
                let state = 7;
                const random = below => { state = (state * 1103515245 + 12345) % 2147483648; return Math.floor(state / 65536) % below; };
                const text = () => Array.from({ length: random(40) }, () => ['ab', 'cd', ' ', '. ', '\\n'][random(5)]).join('');
                for (let round = 0; round < 500; round += 1) {
                    const [a, b] = [text(), text()];
                    const [left, right] = wordDiff(a, b);
                    if (join(left) !== a || join(right) !== b || kept(left) !== kept(right)) return [a, b];
                }
                return null;
            }"""
            assert await page.evaluate(diff) is None
            # The policy holds: strings cannot become markup or code even if a script tried.
            tried = "() => { try { document.body.innerHTML = '<b>x</b>'; return 'written'; } catch (error) { return error.name; } }"
            assert await page.evaluate(tried) == "TypeError"

    asyncio.run(look())
