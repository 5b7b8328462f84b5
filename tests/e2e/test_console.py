"""The operators' console in a real browser, over a server with traffic, a rollout, a dataset, a training, an adapter and a remote model."""

import asyncio
import json
import math
import os
import sqlite3
import subprocess
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager, closing
from pathlib import Path
from types import SimpleNamespace

import pytest

from conftest import MODEL, running
from queues import ask, new_key
from server import PATIENCE, binary, default_model, eventually
from test_fine_tuning import question, said, supervised, upload
from test_labeling import chromium
from test_registry import write_adapter

# A machine with other work takes long for what the first test waits for.
pytestmark = pytest.mark.timeout(900)
SHOTS = os.environ.get("TIDEMILL_SCREENSHOTS")
EVIL = "<img src=x onerror=\"window.pwned='yes'\">"
USERS = 24
EPOCHS = 8
# Plots of the dataset, which is too small for most of them.
DRAWN = 1
# Of the canary, at most, each with an answer and a thumb.
CANARY_USERS = 400
# Answers of the last hours that a model which is not served any more has given.
HISTORY = 900
PLACES = {"o": "Overview", "r": "Rollouts", "l": "Loops", "d": "Datasets", "t": "Training", "a": "Adapters", "p": "Playground"}

# Text that is too pale for its ground, by WCAG 2: 4.5 to 1, and 3 to 1 where it is large. What is disabled may be pale.
PALE = """() => {
    const read = colour => { const [r, g, b, a = 1] = colour.match(/[\\d.]+/g).map(Number); return { r, g, b, a }; };
    const over = (top, below) => ({ r: top.r * top.a + below.r * (1 - top.a), g: top.g * top.a + below.g * (1 - top.a), b: top.b * top.a + below.b * (1 - top.a), a: 1 });
    const part = value => (value /= 255, value <= 0.04045 ? value / 12.92 : ((value + 0.055) / 1.055) ** 2.4);
    const luminance = ({ r, g, b }) => 0.2126 * part(r) + 0.7152 * part(g) + 0.0722 * part(b);
    const ground = node => {
        const layers = [];
        for (let at = node; at; at = at.parentElement) {
            const colour = read(getComputedStyle(at).backgroundColor);
            layers.push(colour);
            if (colour.a === 1) break;
        }
        return layers.reverse().reduce((below, top) => over(top, below), { r: 255, g: 255, b: 255, a: 1 });
    };
    const pale = [];
    for (const node of document.querySelectorAll("body *")) {
        const text = [...node.childNodes].filter(child => child.nodeType === 3).map(child => child.data).join("").trim();
        if (!text || !node.checkVisibility({ visibilityProperty: true }) || node.closest(":disabled, .visually-hidden, title, .skip-link")) continue;
        const style = getComputedStyle(node);
        const below = ground(node);
        const ink = over(read(node.ownerSVGElement ? style.fill : style.color), below);
        const [high, low] = [luminance(ink), luminance(below)].sort((a, b) => b - a);
        const ratio = (high + 0.05) / (low + 0.05);
        const size = parseFloat(style.fontSize);
        const large = size >= 24 || (size >= 18.66 && Number(style.fontWeight) >= 700);
        if (ratio < (large ? 3 : 4.5)) pale.push([text.slice(0, 40), Math.round(ratio * 100) / 100]);
    }
    return pale;
}"""


def chat(server, model: str, text: str, **extra) -> dict:
    body = {"model": model, "messages": [{"role": "user", "content": text}], "max_tokens": 6, **extra}
    return ask(server, "POST", "/v1/chat/completions", body)


def corrected(server, number: int) -> None:
    """An answer and a better one: a row to train on."""
    answer = chat(server, MODEL, f"What is {number} and {number}?", user=f"u{number}")
    ask(server, "POST", "/v1/feedback", {"target": answer["id"], "kind": "correction", "value": f"It is {2 * number}.", "author": f"r{number % 3}"})


def history(data: Path) -> None:
    """Answers from before this server began, in a database whose tables are there: three models, of which one is not served any more."""
    migration = (Path(__file__).parents[2] / "store/migrations/0015_traffic.sql").read_text()
    summed = next(part for part in migration.split(";") if "INSERT INTO traffic" in part)
    now = int(time.time() * 1e6)
    rows = []
    for number in range(HISTORY):
        # More by day than by night, and fewer and fewer of the closed model.
        hours = 1 + 21.5 * (1 - number / HISTORY) + 0.7 * math.sin(number / 40)
        model = ["archive", MODEL, "closed"][0 if number % 3 == 0 else 1 + (number * 7 % HISTORY > number)]
        first, whole = (30_000 + number * 7919 % 40_000, 300_000 + number * 104_729 % 500_000)
        scale = 1 if model == MODEL else 6
        rows.append((
            f"00000000-0000-7000-8000-{number:012d}", now - int(hours * 3.6e9), "chat", model, 0, "failed" if number % 90 == 30 else "ok", 0,
            400, 100, 150, first * scale, whole * scale, "c0ffee", "{}", 700,
        ))
    columns = "id, created, endpoint, model, adapter, status, compare, prompt_tokens, cached_tokens, output_tokens, first_token_us, " \
              "duration_us, config_hash, metadata, bytes"
    with closing(sqlite3.connect(data / "tidemill.db", timeout=60)) as database, database:
        database.executemany(f"INSERT INTO inferences ({columns}) VALUES ({', '.join('?' * 15)})", rows)
        database.execute(summed[summed.index("INSERT INTO traffic"):])


def canary(server) -> dict:
    """From the closed model to our own, which people like better: it ends by itself."""
    spec = {
        "name": "move-home", "model": "closed", "kind": "canary", "interval": "1s", "min_exposure": 20, "tuning": 100,
        "arms": [{"variant": "closed"}, {"variant": f"{MODEL}:one"}],
        "steps": [{"set_weight": 25}, {"pause": {"samples": 12}}, {"set_weight": 50}],
        "metrics": [
            {"metric": "feedback.thumb", "goal": {"min": 0}, "min_samples": 20},
            {"metric": "error_rate", "guardrail": {"max": 0.5}, "min_samples": 10},
        ],
    }
    made = ask(server, "POST", "/v1/rollouts", spec)
    path = f"/v1/rollouts/{made['id']}"

    def over() -> bool:
        return ask(server, "GET", path)["state"]["status"]["kind"] == "promoted"

    def visit(number: int) -> None:
        if not over():
            question = [{"role": "user", "content": f"Greet me, number {number}."}]
            body = {"model": "closed", "messages": question, "max_tokens": 2, "user": f"guest-{number}"}
            headers = {"content-type": "application/json", "authorization": f"Bearer {server.keys['admin']}"}
            answer = server.request("POST", "/v1/chat/completions", json.dumps(body).encode(), headers)
            assert answer.status == 200, answer.body
            ours = answer.headers["x-tidemill-variant"] != "closed"
            ask(server, "POST", "/v1/feedback", {"target": answer.json()["id"], "kind": "thumb", "value": ours == (number % 10 > 0)})

    with ThreadPoolExecutor(4) as visitors:
        list(visitors.map(visit, range(CANARY_USERS)))
    eventually("the canary is promoted", over)
    return made


def train(server) -> str:
    lines = [{"messages": [question(country), said("Ahoy!")]} for country in ["Chad", "Mali", "Togo", "Oman"]]
    with server.client(api_key=server.keys["admin"]) as client:
        files = [upload(client, lines[:3]), upload(client, lines[3:])]
        method = supervised(n_epochs=EPOCHS, batch_size=3, learning_rate_multiplier=2)
        job = client.fine_tuning.jobs.create(
            model=MODEL, training_file=files[0], validation_file=files[1], suffix="ahoy", seed=1, method=method
        )
        eventually("the training is done", lambda: client.fine_tuning.jobs.retrieve(job.id).status == "succeeded", seconds=600)
    return job.id


def roll_out(server) -> dict:
    """An A/B test between the model and its adapter, with answers of both that people liked."""
    spec = {
        "name": "greeting", "model": MODEL, "kind": "ab", "interval": "1s", "min_exposure": 1000,
        "arms": [{"variant": MODEL}, {"variant": f"{MODEL}:one"}],
        "metrics": [
            {"metric": "error_rate", "guardrail": {"max": 0.5}, "min_samples": 5},
            {"metric": "time_to_first_token_p95", "guardrail": {"max": 60}, "min_samples": 5},
            {"metric": "feedback.thumb", "goal": {"min": 0}, "min_samples": 5},
        ],
    }
    made = ask(server, "POST", "/v1/rollouts", spec)
    for number in range(USERS):
        answer = chat(server, MODEL, f"Say hello, number {number}.", user=f"user-{number}")
        ask(server, "POST", "/v1/feedback", {"target": answer["id"], "kind": "thumb", "value": number % 3 > 0})

    def measured() -> bool:
        latest = ask(server, "GET", f"/v1/rollouts/{made['id']}")["latest"]
        judged = {entry["metric"]: entry for entry in latest["judgements"]}
        return sum(latest["exposures"]) == USERS and judged["goal feedback.thumb"]["value"] is not None

    eventually("both arms are measured", measured)
    return made


@pytest.fixture(scope="module")
def mill(server, tmp_path_factory):
    """The server of the other tests answers the model `closed` for this one."""
    folder = tmp_path_factory.mktemp("console")
    config = folder / "console.toml"
    config.write_text(f"""
[upstreams.elsewhere]
url = "{server.base_url}"

[models.closed]
upstreams = ["elsewhere"]
model = "{MODEL}"

[prices.closed]
input = 1
output = 10

[prices.archive]
input = 1
output = 10

[loop.shorter]
model = "{MODEL}"

[loop.shorter.when]
preferences = 40
raters = 5

[loop.shorter.feedback]
from = ["correction"]

[loop.shorter.train]
method = "dpo"

[loop.shorter.evaluate]
rules = [{{ type = "length", max = 60, unit = "words" }}]

[loop.shorter.gates]
text_loss = "off"

[loop.shorter.rollout]
kind = "canary"
steps = [{{ set_weight = 25 }}, {{ pause = {{ samples = 100 }} }}]
metrics = [{{ metric = "error_rate", guardrail = {{ max = 0.02 }} }}, {{ metric = "feedback.thumb", goal = {{ min = 0 }} }}]
""")
    adapter = write_adapter(folder / "one", 3)
    # Any command makes the tables.
    subprocess.run([str(binary()), "key", "list", "--data", str(folder / "data")], check=True, capture_output=True, timeout=60)
    history(folder / "data")
    with running(folder, {MODEL: default_model()}, "--config", str(config)) as own:
        own.keys = {scope: new_key(own, scope) for scope in ["admin", "label", "look"]}
        ask(own, "POST", "/v1/adapters", {"name": "one", "path": str(adapter), "config": {"note": EVIL}, "metrics": {"win_rate": 0.75}})
        ask(own, "POST", "/v1/adapters/one/serve")
        ask(own, "POST", "/v1/adapter_aliases", {"alias": "champion", "adapter": "one"})
        for number in range(12):
            corrected(own, number)
        for number in range(3):
            chat(own, "closed", f"Say {number}.")
        build = ask(own, "POST", "/v1/datasets", {"name": "better"})
        job = train(own)
        rollout = roll_out(own)
        moved = canary(own)
        queue = ask(own, "POST", "/v1/labeling/queues", {"name": "greetings", "guidelines": "Prefer the **shorter** one.", "overlap": 2})
        tasks = [{"source": f"pair-{number}", "prompt": f"Greet {number}.", "answer_a": "Hello!", "answer_b": "Hello, hello!"} for number in range(3)]
        ask(own, "POST", f"/v1/labeling/queues/{queue['id']}/tasks", {"tasks": tasks})
        eventually("the dataset is built", lambda: ask(own, "GET", f"/v1/datasets/builds/{build['id']}")["status"] == "succeeded")
        yield SimpleNamespace(server=own, job=job, rollout=rollout, moved=moved, url=f"http://127.0.0.1:{own.port}")


class Visitor:
    """Somebody at the console; what the browser asks for, and what it complains about, is noted."""

    def __init__(self, page, url: str):
        self.page, self.url = page, url
        self.complaints: list[str] = []
        self.asked: list[str] = []
        page.on("pageerror", lambda error: self.complaints.append(str(error)))
        page.on("console", lambda message: self.complaints.append(message.text) if message.type == "error" else None)
        page.on("request", lambda request: self.asked.append(request.url))

    @property
    def errors(self) -> list[str]:
        """That a server with keys wants one is said to each page that comes without."""
        return [text for text in self.complaints if "status of 401" not in text]

    async def sign_in(self, key: str, path: str = "/console") -> None:
        await self.page.goto(self.url + path)
        await self.page.wait_for_selector("#door-field:focus")
        await self.page.keyboard.type(key)
        await self.page.keyboard.press("Enter")

    async def title(self) -> str:
        await self.page.wait_for_selector("#place:not([hidden]) #part-title")
        return await self.page.locator("#part-title").inner_text()

    async def go(self, letter: str) -> str:
        """By keyboard."""
        async with self.page.expect_navigation():
            await self.page.keyboard.press("g")
            await self.page.keyboard.press(letter)
        return await self.title()

    async def text(self) -> str:
        return await self.page.locator("#place").inner_text()

    async def shoot(self, name: str, **options) -> None:
        if SHOTS:
            path = Path(SHOTS, f"{name}.png")
            path.parent.mkdir(parents=True, exist_ok=True)
            await self.page.screenshot(path=path, **options)

    async def check(self) -> None:
        assert self.errors == []
        elsewhere = [url for url in self.asked if not url.startswith((self.url + "/", "data:"))]
        assert elsewhere == [], "the pages need nothing from elsewhere"
        assert await self.page.evaluate("window.pwned") is None
        assert await self.page.evaluate("document.cookie") == ""


@asynccontextmanager
async def visitor(mill, **context):
    async with chromium() as browser:
        opened = await browser.new_context(**{"viewport": {"width": 1280, "height": 900}, **context})
        yield Visitor(await opened.new_page(), mill.url)


def test_a_key_opens_the_console_and_every_page_is_reached_by_keyboard(mill):
    async def visit():
        async with visitor(mill) as person:
            for wrong in ["tm-nonsense", mill.server.keys["label"]]:
                await person.sign_in(wrong)
                await person.page.wait_for_function("() => document.getElementById('door-wrong').textContent !== ''")
                assert await person.page.locator("#place").is_hidden()
                await person.page.evaluate("sessionStorage.clear()")
            # That a key was refused is all that the browser complained of.
            assert all("status of 403" in error for error in person.errors) and person.errors, person.errors
            person.complaints.clear()

            await person.sign_in(mill.server.keys["admin"])
            assert await person.title() == "Overview"
            assert await person.page.locator("#who").inner_text() == "e2e-admin"
            for letter, title in PLACES.items():
                if letter != "p":
                    assert await person.go(letter) == title
            assert await person.go("p") == "Playground"
            # A letter in a field is a letter.
            await person.page.wait_for_selector("#prompt:focus")
            await person.page.keyboard.type("go")
            assert await person.page.locator("#prompt").input_value() == "go"
            await person.page.locator("#places a").first.focus()
            await person.page.keyboard.press("?")
            await person.page.wait_for_selector("#help[open]")
            await person.page.keyboard.press("Escape")
            await person.check()
            await person.page.locator("#leave").click()
            await person.page.wait_for_selector("#door:not([hidden])")
            assert await person.page.evaluate("sessionStorage.length") == 0

    asyncio.run(visit())


def test_the_overview_compares_models_here_and_elsewhere(mill):
    async def visit():
        async with visitor(mill) as person:
            await person.sign_in(mill.server.keys["admin"])
            await person.title()
            read = "rows => rows.map(row => [...row.cells].map(cell => cell.innerText.trim().replaceAll('\\n', ' ')))"
            rows = await person.page.locator(".told tbody tr").evaluate_all(read)
            cells = {f"{row[0]}|{row[1]}": row for row in rows if len(row) > 8}
            closed = cells["closed|–"]
            assert closed[2] == "elsewhere" and closed[9].startswith("$") and closed[9] != "$0", closed
            # 300 answers of 400 tokens in and 150 out, a million at 1 and 10 dollars; ten failed.
            assert cells["archive|–"][2:7] == ["here", "300", "3.33 %", "120\u202f000", "45\u202f000"], cells["archive|–"]
            assert cells["archive|–"][9:] == ["$0.57", "$1.90"], cells["archive|–"]
            assert cells[f"{MODEL}|–"][9] == "$0" and cells[f"{MODEL}|–"][2] == "here"
            assert f"{MODEL}|–" in cells and any(name.startswith(f"{MODEL}|{MODEL}:one") for name in cells), cells
            assert await person.page.locator("figure svg[role=img]").count() >= 3
            text = await person.text()
            assert "greeting" in text and "running" in text and "ready" in text
            # The numbers are there for those who do not see the pictures.
            await person.page.locator("#numbers-answers summary").focus()
            await person.page.keyboard.press("Enter")
            await person.page.wait_for_selector("#numbers-answers[open] td")
            # The page looks again by itself, and what was opened stays open.
            async with person.page.expect_response(lambda response: "/parts/overview" in response.url, timeout=PATIENCE * 1000):
                await person.page.mouse.move(5, 5)
            await asyncio.sleep(0.5)
            assert await person.page.locator("#numbers-answers[open]").count() == 1
            await person.page.locator("#numbers-answers summary").click()
            await person.page.set_viewport_size({"width": 1280, "height": 1500})
            await person.page.evaluate("document.activeElement.blur()")
            await person.shoot("console-overview")
            await person.page.goto(person.url + "/console?hours=1")
            await person.title()
            assert await person.page.locator(".windows [aria-current=true]").inner_text() == "1 h"
            await person.check()

    asyncio.run(visit())


def test_a_rollout_shows_its_metrics_over_time_and_does_what_the_buttons_say(mill):
    path = f"/v1/rollouts/{mill.rollout['id']}"

    def status() -> str:
        return ask(mill.server, "GET", path)["state"]["status"]["kind"]

    async def visit():
        async with visitor(mill) as person:
            await person.sign_in(mill.server.keys["admin"], "/console/rollouts")
            await person.title()
            await person.page.get_by_role("link", name="greeting").focus()
            async with person.page.expect_navigation():
                await person.page.keyboard.press("Enter")
            assert await person.title() == "greeting"
            titles = await person.page.locator("figure h3").all_inner_texts()
            assert [title.split(":")[0] for title in titles] == ["error_rate", "time_to_first_token_p95", "goal feedback.thumb"]
            pictures = person.page.locator("figure svg")
            assert await pictures.first.locator("path.band").count() == 1 and await pictures.first.locator("path.rule").count() == 1
            assert await pictures.nth(1).locator("path.band").count() == 0
            latest = ask(mill.server, "GET", path)["latest"]
            arms = await person.page.locator("section", has_text="Users exposed").locator("tbody tr").all_inner_texts()
            assert [int(row.split("\t")[2]) for row in arms] == latest["exposures"] and sum(latest["exposures"]) == USERS

            async def press(name: str):
                await person.page.get_by_role("button", name=name, exact=True).focus()
                await person.page.keyboard.press("Enter")

            await press("Pause")
            await person.page.wait_for_selector("text=paused by a person")
            assert status() == "paused"
            await press("Resume")
            # One act at a time: the next is taken when the page shows what became of this one.
            await person.page.wait_for_selector("#act-resume-Resume", state="detached")
            assert status() == "running"
            # What is final is asked for twice, and Enter alone leaves it.
            await press("Roll back")
            await person.page.wait_for_selector("#sure[open]")
            await person.page.keyboard.press("Enter")
            await person.page.wait_for_selector("#sure:not([open])", state="attached")
            assert status() == "running"
            await press("Roll back")
            await person.page.wait_for_selector("#sure[open]")
            await person.page.locator("#sure-yes").focus()
            await person.page.keyboard.press("Enter")
            await person.page.wait_for_selector("#standing >> text=rolled back")
            assert status() == "rolled_back"
            assert await person.page.locator("button[data-post]").count() == 0
            text = await person.text()
            assert "a person rolled it back" in text and "key e2e-admin" in text
            await person.check()

    asyncio.run(visit())


def test_a_rollout_that_is_over_has_its_sequence_and_what_was_decided_on_it(mill):
    async def visit():
        async with visitor(mill, viewport={"width": 1280, "height": 1400}) as person:
            await person.sign_in(mill.server.keys["look"], f"/console/rollouts/{mill.moved['id']}")
            assert await person.title() == "move-home"
            goal = person.page.locator("figure", has_text="goal feedback.thumb")
            assert await goal.locator("path.band").count() == 1
            marks = await goal.locator("text.mark").all_text_contents()
            titles = await goal.locator("g > title").all_text_contents()
            assert marks[0] == "▷" and marks[-1] == "★", marks
            assert any("step done" in title for title in titles) and "promoted" in titles[-1], titles
            # What was decided is what the picture shows: at the end the whole band is above the bound.
            await goal.locator("summary").click()
            newest = await goal.locator("tbody tr").first.locator("td").all_inner_texts()
            low = float(newest[3].split(" %")[0].replace("−", "-"))
            assert 0 < low < float(newest[2].split(" %")[0]), newest
            await goal.locator("summary").click()
            decisions = await person.page.locator("section", has=person.page.locator("h2", has_text="Decisions")).inner_text()
            assert f"promoted {MODEL}:one" in decisions and "the rollout" in decisions, decisions
            assert await person.page.locator("button[data-post]").count() == 0, "who may look may not act"
            await person.page.evaluate("document.activeElement.blur()")
            await person.shoot("console-rollout")
            await person.check()

    asyncio.run(visit())


def test_a_loop_is_begun_by_keyboard_and_says_why_it_refused(mill):
    async def visit():
        async with visitor(mill, viewport={"width": 1280, "height": 1000}) as person:
            await person.sign_in(mill.server.keys["admin"], "/console/loops")
            assert await person.title() == "Loops"
            await person.page.get_by_role("link", name="shorter").focus()
            async with person.page.expect_navigation():
                await person.page.keyboard.press("Enter")
            assert await person.title() == "shorter"
            assert "12 of 40 new judgements" in await person.text() and "3 of 5 people" in await person.text()
            await person.page.get_by_role("button", name="Begin a cycle now").focus()
            await person.page.keyboard.press("Enter")
            await person.page.wait_for_selector("#notice.good")

            def refused() -> bool:
                cycles = ask(mill.server, "GET", "/v1/loops/shorter")["cycles"]
                return bool(cycles) and cycles[0]["outcome"] == "refused"

            await asyncio.to_thread(eventually, "so few judgements are refused", refused)
            await person.page.reload()
            await person.title()
            cycle = person.page.locator("section", has=person.page.locator("h2", has_text="Cycle 1"))
            text = await cycle.inner_text()
            assert "refused" in text and "What would change it" in text and "size" in text, text
            await person.page.evaluate("document.activeElement.blur()")
            await person.shoot("console-loop")
            await person.check()

    asyncio.run(visit())


def test_the_labeling_page_of_operators_is_one_of_theirs(mill):
    """The same links and keys as everywhere."""
    async def visit():
        async with visitor(mill) as person:
            await person.sign_in(mill.server.keys["admin"])
            await person.title()
            async with person.page.expect_navigation():
                await person.page.keyboard.press("g")
                await person.page.keyboard.press("q")
            await person.page.wait_for_selector("#panel h1 >> text=greetings")
            assert await person.page.locator("#places [aria-current=page]").inner_text() == "Labeling"
            await person.page.keyboard.press("?")
            await person.page.wait_for_selector("#help[open]")
            assert await person.page.locator("#help dd").all_inner_texts() == [*PLACES.values(), "Labeling", "This list"]
            await person.page.keyboard.press("Escape")
            assert await person.go("o") == "Overview"
            await person.check()

    asyncio.run(visit())


def test_datasets_trainings_and_adapters_show_where_they_come_from(mill):
    async def visit():
        async with visitor(mill) as person:
            await person.sign_in(mill.server.keys["admin"], "/console/datasets")
            await person.title()
            await person.page.get_by_role("link", name="better@1").click()
            await person.page.wait_for_selector("text=Near duplicates", state="attached")
            assert await person.title() == "better@1" and await person.page.locator(".checks tbody tr").count() > 10
            assert await person.page.locator("figure svg[role=img]").count() >= DRAWN, await person.text()

            await person.page.goto(f"{person.url}/console/trainings/{mill.job}")
            assert await person.title() == mill.job
            loss = person.page.locator("figure", has_text="Loss").first
            assert await loss.locator("path.curve.c0[d*=L]").count() == 1, "the training's loss"
            assert await loss.locator("path.curve.c1[d*=L]").count() == 1, "and the held-out one"
            await person.page.evaluate("document.activeElement.blur()")
            await person.shoot("console-training")
            text = await person.text()
            assert "succeeded" in text and f"{EPOCHS} of {EPOCHS} steps" in text and "The job has successfully completed." in text

            await person.page.goto(f"{person.url}/console/adapters")
            await person.title()
            await person.page.get_by_role("link", name="one@").first.click()
            await person.page.wait_for_selector("text=Where it comes from")
            text = await person.text()
            assert "champion" in text and "serving" in text and "0.75" in text and EVIL.replace('"', '\\"') in text
            await person.page.goto(f"{person.url}/console/adapters/none")
            await person.page.wait_for_selector("#notice:not([hidden])")
            assert "none" in await person.page.locator("#notice").inner_text()
            assert all("status of 404" in error for error in person.errors) and person.errors, person.errors
            person.complaints.clear()
            await person.check()

    asyncio.run(visit())


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_every_page_is_readable(mill, scheme):
    pages = ["", "/rollouts", f"/rollouts/{mill.rollout['id']}", "/datasets", "/datasets/better@1", "/trainings",
             f"/trainings/{mill.job}", "/adapters", "/adapters/champion", "/playground", "/loops", "/loops/shorter", "/queues", "/label"]

    async def look(person, page: str, size: str):
        """Every page, for those who look at pictures."""
        name = page.replace(mill.rollout["id"], "one").replace(mill.job, "one").strip("/").replace("/", "-")
        await person.shoot(f"every/{name or 'overview'}-{scheme}-{size}", full_page=True)

    async def visit():
        async with visitor(mill, color_scheme=scheme) as person:
            await person.sign_in(mill.server.keys["admin"])
            ground = "getComputedStyle(document.body).backgroundColor.match(/\\d+/g).map(Number)[0]"
            for page in pages:
                await person.page.goto(f"{person.url}/console{page}")
                if page in ["/queues", "/label"]:
                    await person.page.wait_for_selector("#panel h1, #bench:not([hidden])")
                else:
                    await person.title()
                assert (await person.page.evaluate(ground) < 128) == (scheme == "dark"), page
                await look(person, page, "wide")
                await person.page.set_viewport_size({"width": 400, "height": 800})
                await look(person, page, "narrow")
                await person.page.set_viewport_size({"width": 1280, "height": 900})
                for details in await person.page.locator("details").all():
                    await details.evaluate("node => { node.open = true; }")
                assert await person.page.evaluate(PALE) == [], page
                # A phone: the page itself does not scroll sideways.
                await person.page.set_viewport_size({"width": 400, "height": 800})
                assert await person.page.evaluate("document.documentElement.scrollWidth") <= 400, page
                await person.page.set_viewport_size({"width": 1280, "height": 900})
            await person.check()

    asyncio.run(visit())


@pytest.mark.parametrize("heads", [True, False])
def test_the_playground_is_blind_and_keeps_the_preference(mill, heads):
    variants = [MODEL, "one"]
    since = len(stored(mill))

    async def visit():
        async with visitor(mill, viewport={"width": 1280, "height": 1000}) as person:
            # The lot is drawn by the browser's generator, which lands on a known side here.
            coin = f"crypto.getRandomValues = array => array.fill({int(heads)});"
            await person.page.add_init_script(coin)
            await person.sign_in(mill.server.keys["admin"], "/console/playground")
            await person.page.wait_for_selector("#prompt:focus")
            offered = await person.page.locator("#one option").all_inner_texts()
            assert set(variants) <= set(offered) and "closed" in offered, offered
            await person.page.select_option("#one", label=variants[0])
            await person.page.select_option("#other", label=variants[1])
            await person.page.fill("#most", "24")
            await person.page.locator("#prompt").focus()
            await person.page.keyboard.type("Tell me something about the sea.")
            # Nothing is asked twice, and a preference before the answers is none.
            await person.page.keyboard.press("Control+Enter")
            await person.page.keyboard.press("1")
            await person.page.wait_for_selector("#choices button:enabled")
            pair = [await person.page.locator(f"#{side}-text").inner_text() for side in ["left", "right"]]
            assert all(pair) and pair[0] != pair[1]
            seen = await person.page.locator("#answers").inner_text() + await person.page.locator("#choices").inner_text()
            assert MODEL not in seen and await person.page.locator("#outcome").is_hidden(), "nothing tells which is which"
            await asyncio.sleep(0.3)
            await person.page.keyboard.press("1" if heads else "3")
            await person.page.wait_for_selector("#outcome:not([hidden])")
            left, right = reversed(variants) if heads else variants
            said = await person.page.locator("#outcome-text").inner_text()
            assert said.startswith(f"Left was {left}, right was {right}."), said
            assert ("equally good" in said) != heads
            await person.shoot("console-playground")
            # The next question is typed at once; the same key again judges nothing twice.
            assert await person.page.evaluate("document.activeElement.id") == "prompt"
            await person.page.locator("#left").focus()
            await person.page.keyboard.press("2")
            await person.check()
            return pair, [left, right]

    texts, order = asyncio.run(visit())
    rows = stored(mill)
    assert len(rows) == since + 1
    value = rows[0]["value"]
    assert (rows[0]["source"], rows[0]["author"]) == ("playground", "e2e-admin")
    shown = value["shown"]
    assert value["ranking"] == ([[shown[0]], [shown[1]]] if heads else [shown])
    assert len(texts) == 2 and order[0] != order[1]


def stored(mill) -> list[dict]:
    path = "/v1/feedback?source=playground&limit=100"
    return ask(mill.server, "GET", path)["data"]


def test_an_answer_can_be_stopped_and_an_outage_is_said(mill):
    async def visit():
        async with visitor(mill) as person:
            await person.sign_in(mill.server.keys["admin"], "/console/playground")
            await person.page.wait_for_selector("#prompt:focus")
            await person.page.fill("#most", "2000")
            await person.page.fill("#prompt", "Count from one to a thousand.")
            # In one breath: an answer may be short, and a busy machine's browser slower than the model.
            await person.page.evaluate("""() => {
                const press = (init) => document.activeElement.dispatchEvent(new KeyboardEvent("keydown", { bubbles: true, ...init }));
                press({ key: "Enter", ctrlKey: true });
                setTimeout(() => press({ key: "Escape" }));
            }""")
            await person.page.wait_for_selector("text=Stopped")
            assert await person.page.locator("#choices").is_hidden()
            await person.page.context.set_offline(True)
            await person.page.keyboard.press("Control+Enter")
            await person.page.wait_for_selector("text=did not answer")
            await person.page.context.set_offline(False)

    asyncio.run(visit())
    eventually("nothing is generated any more", lambda: mill.server.metrics().get("tidemill:num_requests_running") == 0)
