"""The console's playground in a real browser: blind, by keyboard, and what is preferred is kept."""

import asyncio

import pytest

from conftest import MODEL
from mill import at_work
from queues import ask
from server import eventually
from visitor import visitor

# A machine with other work takes long for what the first test waits for.
pytestmark = pytest.mark.timeout(900)


@pytest.fixture(scope="module")
def mill(server, tmp_path_factory):
    with at_work(tmp_path_factory.mktemp("playground"), server) as mill:
        yield mill


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


def test_a_form_that_came_late_works_and_one_failure_ends_both(mill):
    async def visit():
        async with visitor(mill) as person:
            page = person.page

            async def fail(route):
                await route.abort()

            await page.route("**/parts/playground", fail)
            await person.sign_in(mill.server.keys["admin"], "/console/playground")
            await page.wait_for_selector("#notice >> text=cannot be reached")
            await page.unroute("**/parts/playground")
            await page.evaluate("document.dispatchEvent(new Event('visibilitychange'))")
            await page.wait_for_selector("#prompt:focus")
            await page.keyboard.type("   ")
            await page.keyboard.press("Control+Enter")
            await page.wait_for_selector("#notice >> text=nothing to ask")
            await page.keyboard.type("Count from one to a thousand.")
            await page.fill("#most", "2000")

            # One of the two is refused: the other does not write on for nobody.
            refused = []

            async def refuse(route):
                if refused:
                    await route.continue_()
                else:
                    refused.append(route)
                    error = {"error": {"message": "No more for today.", "type": "x", "param": None, "code": None}}
                    await route.fulfill(status=429, json=error)

            await page.route("**/v1/chat/completions", refuse)
            await page.locator("#prompt").focus()
            await page.keyboard.press("Control+Enter")
            await page.wait_for_selector("#notice >> text=No more for today.")
            assert await page.locator("#choices").is_hidden() and await page.locator("#send").is_enabled()
            assert await page.evaluate("document.activeElement.id") == "prompt"
            await page.unroute("**/v1/chat/completions")

    asyncio.run(visit())
    eventually("nothing is generated any more", lambda: mill.server.metrics().get("tidemill:num_requests_running") == 0)
