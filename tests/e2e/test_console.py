"""The operators' console in a real browser, over a server that has been at work for long."""

import asyncio

import pytest

from conftest import MODEL
from mill import EPOCHS, EVIL, USERS, at_work
from queues import ask
from server import PATIENCE, eventually
from visitor import PALE, visitor

# A machine with other work takes long for what the first test waits for.
pytestmark = pytest.mark.timeout(900)
# Plots of the dataset, which is too small for most of them.
DRAWN = 1
PLACES = {"o": "Overview", "r": "Rollouts", "l": "Loops", "d": "Datasets", "t": "Training", "a": "Adapters", "p": "Playground"}


@pytest.fixture(scope="module")
def mill(server, tmp_path_factory):
    with at_work(tmp_path_factory.mktemp("console"), server, long=True) as mill:
        yield mill


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


def test_a_page_that_is_looked_at_again_takes_nothing_from_who_is_at_it(mill):
    rollout = f"/console/rollouts/{mill.rollout['id']}"

    async def rewrite(route, words: str, held=None, go=None):
        """The page with another heading, and not before it is to come."""
        answer = await route.fetch()
        if held:
            held.set()
            await go.wait()
        await route.fulfill(response=answer, body=(await answer.text()).replace("Where it stands", words))

    async def visit():
        async with visitor(mill) as person:
            page = person.page
            await person.sign_in(mill.server.keys["admin"], rollout)
            await person.title()
            # What was opened and scrolled stays, and so does the focus, on the same thing and not on the same place.
            await page.locator("#asked summary").click()
            await page.locator("#asked pre").evaluate("node => { node.scrollTop = 60; node.focus(); }")
            await page.locator("#numbers-metric-0 summary").click()
            await page.locator("#numbers-metric-0 .scroll").evaluate("node => { node.scrollTop = 40; node.focus(); }")
            await page.route("**/parts/**", lambda route: rewrite(route, "Where it is now"))
            await person.look_again()
            await page.wait_for_selector("#standing >> text=Where it is now")
            assert await page.locator("#asked pre").evaluate("node => node.scrollTop") == 60
            assert await page.evaluate("[document.activeElement.ariaLabel, document.activeElement.scrollTop]") == ["Numbers of error_rate: the variant's own", 40]
            await page.unroute("**/parts/**")

            # A page that comes while somebody decides is not wanted any more.
            held, go = asyncio.Event(), asyncio.Event()
            await page.route("**/parts/**", lambda route: rewrite(route, "Where it was", held, go))
            async with page.expect_event("requestfinished", lambda request: "/parts/" in request.url):
                await page.evaluate("document.dispatchEvent(new Event('visibilitychange'))")
                await held.wait()
                button = page.locator("[id='act-rollback-Roll back']")
                await button.click()
                await page.wait_for_selector("#sure[open]")
                go.set()
            await asyncio.sleep(0.3)
            await page.unroute("**/parts/**")
            await page.keyboard.press("Escape")
            assert await page.locator("#standing >> text=Where it is now").count() == 1
            assert await page.evaluate("document.activeElement.textContent") == "Roll back"

            # A page that cannot be looked at again says how old it is.
            await page.context.set_offline(True)
            await page.evaluate("document.dispatchEvent(new Event('visibilitychange'))")
            await page.wait_for_selector("#notice >> text=as it was at")
            await page.context.set_offline(False)
            await person.look_again()
            await page.wait_for_selector("#notice", state="hidden")

            # A key that is not taken any more has nothing to look at.
            await page.evaluate("sessionStorage.setItem('tidemill-key', 'tm-revoked')")
            await page.evaluate("document.dispatchEvent(new Event('visibilitychange'))")
            await page.wait_for_selector("#door-wrong >> text=Incorrect API key")
            assert await page.locator("#place").inner_text() == ""

    asyncio.run(visit())


def test_signing_in_says_what_is_wrong_and_who_only_looks_is_led_nowhere_closed(mill):
    async def visit():
        async with visitor(mill) as person:
            page = person.page
            await person.sign_in("ключ")
            await page.wait_for_selector("#door-wrong >> text=This is no key")
            assert await page.locator("#door-field").get_attribute("aria-invalid") == "true"
            assert await page.evaluate(PALE) == []
            await page.fill("#door-field", mill.server.keys["look"])
            await page.keyboard.press("Enter")
            assert await person.title() == "Overview"
            assert await page.locator("#places a:visible").all_inner_texts() == list(PLACES.values())
            await page.keyboard.press("g")
            await page.keyboard.press("q")
            assert page.url == person.url + "/console"
            # Who comes back to a page after signing out sees nothing of it.
            await page.locator("#leave").click()
            await page.wait_for_selector("#door:not([hidden])")
            async with page.expect_navigation():
                await page.evaluate("dispatchEvent(new PageTransitionEvent('pageshow', { persisted: true }))")
            await page.wait_for_selector("#door:not([hidden])")
            await person.check()

    async def without_scripts():
        async with visitor(mill, java_script_enabled=False) as person:
            await person.page.goto(person.url + "/console")
            assert "need JavaScript" in await person.page.locator("noscript").inner_text()

    asyncio.run(visit())
    asyncio.run(without_scripts())


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
            assert await person.title() == "greetings"
            assert await person.page.locator("#places [aria-current=page]").inner_text() == "Labeling"
            await person.page.keyboard.press("?")
            await person.page.wait_for_selector("#help[open]")
            helped = await person.page.locator("#help dd").all_inner_texts()
            assert helped[:8] == [*PLACES.values(), "Labeling"] and helped[-1] == "This list"
            await person.page.keyboard.press("Escape")
            # The page looks again without taking the focus from who is on their way through it.
            await person.page.locator("#place nav a").first.focus()
            await person.look_again()
            await asyncio.sleep(0.5)
            assert await person.page.evaluate("document.activeElement.closest('nav')?.ariaLabel") == "Queues"
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
            # The numbers are there for those who do not see the pictures.
            await person.page.locator("#numbers-plot-0 summary").click()
            assert await person.page.locator("#numbers-plot-0 td").count() > 1

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
                await person.page.wait_for_selector("#place:not([hidden]) #part-title, #bench:not([hidden])")
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
                if page == "/label":
                    assert await person.page.evaluate("document.getElementById('deck').offsetHeight") < 300, "what is judged has room"
                await person.page.set_viewport_size({"width": 1280, "height": 900})
            await person.check()

    asyncio.run(visit())


def test_names_as_long_as_they_may_be_break_no_page(mill):
    """The last of the file: what it makes is on every page."""
    name, variant = "n" * 100, "v" * 100
    spec = {
        "name": name, "model": MODEL, "kind": "ab", "arms": [{"variant": MODEL}, {"variant": variant, "model": f"{MODEL}:one"}],
        "metrics": [{"metric": "feedback.thumb", "goal": {"min": 0}}],
    }
    rollout = ask(mill.server, "POST", "/v1/rollouts", spec)
    ask(mill.server, "POST", "/v1/labeling/queues", {"name": name, "guidelines": name})

    async def visit():
        async with visitor(mill) as person:
            await person.sign_in(mill.server.keys["admin"])
            await person.title()
            for width in [1280, 400]:
                await person.page.set_viewport_size({"width": width, "height": 800})
                for page in ["", "/rollouts", f"/rollouts/{rollout['id']}", "/playground", f"/queues?queue={name}", f"/label?queue={name}"]:
                    await person.page.goto(f"{person.url}/console{page}")
                    await person.page.wait_for_selector("#place:not([hidden]) #part-title, #rest:not([hidden])")
                    await person.shoot(f"long/{page.split('?')[0].strip('/').split('/')[0] or 'overview'}-{width}-{len(page)}", full_page=True)
                    assert await person.page.evaluate("document.documentElement.scrollWidth") <= width, (page, width)
                await person.page.goto(f"{person.url}/console/rollouts/{rollout['id']}")
                await person.title()
                await person.page.locator(f"[id='act-promote-Promote {variant}']").click()
                await person.page.wait_for_selector("#sure[open]")
                await person.shoot(f"long/sure-{width}")
                assert await person.page.evaluate("document.getElementById('sure').scrollWidth <= document.getElementById('sure').clientWidth"), width
                await person.page.keyboard.press("Escape")
            await person.check()

    asyncio.run(visit())
