"""The whole console by keyboard: Tab, Enter and arrows only, and wherever one is, one sees it."""

import asyncio

import pytest

from conftest import MODEL
from mill import at_work
from queues import ask
from server import eventually
from visitor import TABS, visitor

# A machine with other work takes long for what the first test waits for.
pytestmark = pytest.mark.timeout(900)


@pytest.fixture(scope="module")
def mill(server, tmp_path_factory):
    with at_work(tmp_path_factory.mktemp("keyboard"), server) as mill:
        yield mill


async def follow(person, selector: str, back: bool = False) -> str:
    """A link that Tab leads to; its page's title."""
    await person.tab(selector, back)
    async with person.page.expect_navigation():
        await person.page.keyboard.press("Enter")
    return await person.title()


async def place(person, name: str) -> str:
    """A page by its link at the top, which lies behind where a page begins."""
    return await follow(person, f"#places a[href='/console/{name}']", back=True)


async def press(person, selector: str, key: str = "Enter") -> None:
    await person.tab(selector)
    await person.page.keyboard.press(key)


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_wherever_tab_leads_one_sees_it_and_it_has_a_name(mill, scheme):
    pages = ["", "/rollouts", f"/rollouts/{mill.rollout['id']}", "/loops", "/loops/shorter", "/datasets", "/datasets/better@1",
             "/trainings", "/adapters", "/adapters/champion", "/playground", "/queues"]

    async def visit():
        async with visitor(mill, color_scheme=scheme) as person:
            await person.page.goto(person.url + "/console")
            await person.page.wait_for_selector("#door-field:focus")
            assert (await person.focus())["name"] == "Key"
            await person.sign_in(mill.server.keys["admin"])
            for page in pages:
                await person.page.goto(person.url + "/console" + page)
                await person.title()
                # What is closed has its own stops.
                await person.page.evaluate("document.querySelectorAll('#place details').forEach(node => { node.open = true; })")
                # From where a page begins through its end and its top, all the way round; between end and top is the window.
                stops = []
                for _ in range(TABS):
                    await person.page.keyboard.press("Tab")
                    found = await person.focus()
                    if found and found in stops[:1]:
                        break
                    stops += [found] if found else []
                else:
                    raise AssertionError(f"{page} has no end: {stops}")
                names = [stop["name"] for stop in stops]
                top = names.index("Skip to the page")
                assert names[top + 1 : top + 4] == ["Tidemill", "Overview", "Rollouts"], names
            await person.check()

    asyncio.run(visit())


def test_an_operator_works_through_a_day_by_keyboard_alone(mill):
    path = f"/v1/rollouts/{mill.rollout['id']}"

    def status() -> str:
        return ask(mill.server, "GET", path)["state"]["status"]["kind"]

    async def roll_back(person):
        """Paused, resumed and, when it was asked for twice, rolled back."""
        await press(person, "#act-pause-Pause")
        await person.page.wait_for_selector("#act-resume-Resume:enabled")
        assert status() == "paused" and (await person.focus())["id"] == "part-title", "near where it was pressed"
        await press(person, "#act-resume-Resume")
        await person.page.wait_for_selector("#act-pause-Pause:enabled")
        assert status() == "running"
        await press(person, "[id='act-rollback-Roll back']")
        await person.page.wait_for_selector("#sure[open]")
        assert (await person.focus())["name"] == "Leave it", "what is final is not what Enter does"
        await person.page.keyboard.press("Enter")
        await person.page.wait_for_selector("#sure:not([open])", state="attached")
        assert status() == "running" and (await person.focus())["name"] == "Roll back"
        await person.page.keyboard.press("Enter")
        await person.page.wait_for_selector("#sure[open]")
        await person.tab("#sure-yes", back=True)
        await person.page.keyboard.press("Enter")
        await person.page.wait_for_selector("#standing >> text=rolled back")
        assert status() == "rolled_back"

    async def compare(person):
        """Two variants, chosen by arrows; the left answer is liked better."""
        await person.page.wait_for_selector("#prompt:focus")
        await person.focus()
        chosen = []
        for field in ["other", "one"]:
            await person.tab(f"#{field}", back=True)
            before = await person.page.locator(f"#{field}").evaluate("node => node.selectedIndex")
            await person.page.keyboard.press("ArrowDown" if before == 0 else "ArrowUp")
            after = await person.page.locator(f"#{field}").evaluate("node => node.selectedIndex")
            assert after != before
            chosen.append(after)
        assert chosen[0] != chosen[1], "two different ones"
        await person.tab("#most")
        await person.page.keyboard.press("Control+a")
        await person.page.keyboard.type("12")
        await person.tab("#prompt")
        await person.page.keyboard.type("Tell me something about the sea.")
        await press(person, "#send")
        await person.page.wait_for_selector("#choices button:enabled")
        assert (await person.focus())["id"] == "left"
        assert "Both have answered" in await person.page.locator("#spoken").inner_text()
        await person.tab("[data-choice=left]")
        await asyncio.sleep(0.3)
        await person.page.keyboard.press("Enter")
        await person.page.wait_for_selector("#outcome:not([hidden])")
        assert (await person.focus())["id"] == "prompt"
        return await person.page.locator("#outcome-text").inner_text()

    async def visit():
        async with visitor(mill, viewport={"width": 900, "height": 800}) as person:
            await person.sign_in(mill.server.keys["admin"])
            assert await person.title() == "Overview"
            # What is wider than the window is read with arrows.
            await person.tab(".compare .scroll")
            await person.page.keyboard.press("ArrowRight")
            await person.page.wait_for_function("() => document.activeElement.scrollLeft > 0")
            assert await follow(person, f"#place a[href$='{mill.rollout['id']}']") == "greeting"
            await roll_back(person)
            assert await place(person, "loops") == "Loops"
            assert await follow(person, "#place a[href='/console/loops/shorter']") == "shorter"
            await press(person, "#act-run")
            await person.page.wait_for_selector("#notice.good")
            assert await place(person, "datasets") == "Datasets"
            assert await follow(person, "#place a[href='/console/datasets/better%401']") == "better@1"
            await press(person, "#numbers-plot-0 summary")
            await person.page.wait_for_selector("#numbers-plot-0[open] td")
            assert await place(person, "playground") == "Playground"
            said = await compare(person)
            assert said.startswith("Left was ") and "You preferred" in said, said
            await person.check()
            return said

    said = asyncio.run(visit())
    assert MODEL in said
    stored = ask(mill.server, "GET", "/v1/feedback?source=playground&limit=10")["data"]
    assert len(stored) == 1 and stored[0]["author"] == "e2e-admin"
    eventually("the loop heard of it", lambda: ask(mill.server, "GET", "/v1/loops/shorter")["cycles"])
