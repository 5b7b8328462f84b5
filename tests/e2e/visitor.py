"""Somebody at the console in a real browser, and what can be seen there."""

import os
from contextlib import asynccontextmanager
from pathlib import Path

from test_labeling import chromium

# More than any page has places where Tab stops.
TABS = 200
SHOTS = os.environ.get("TIDEMILL_SCREENSHOTS")

# Contrast by WCAG 2 between two colours as the browser computes them, and the ground behind a node.
CONTRAST = """
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
    const contrast = (colour, below) => {
        const [high, low] = [luminance(over(read(colour), below)), luminance(below)].sort((a, b) => b - a);
        return (high + 0.05) / (low + 0.05);
    };
"""

# Text that is too pale for its ground: 4.5 to 1, and 3 to 1 where it is large. What is disabled may be pale. Fields are seen by their
# edge: 3 to 1 (WCAG 1.4.11).
PALE = "() => {" + CONTRAST + """
    const pale = [];
    for (const node of document.querySelectorAll("body *")) {
        if (!node.checkVisibility({ visibilityProperty: true }) || node.closest(":disabled, .visually-hidden, title, .skip-link")) continue;
        const style = getComputedStyle(node);
        if (node.matches("input, select, textarea")) {
            const edge = contrast(style.borderTopColor, ground(node.parentElement));
            if (edge < 3) pale.push([`edge of ${node.id}`, Math.round(edge * 100) / 100]);
        }
        const text = [...node.childNodes].filter(child => child.nodeType === 3).map(child => child.data).join("").trim();
        if (!text) continue;
        const ratio = contrast(node.ownerSVGElement ? style.fill : style.color, ground(node));
        const size = parseFloat(style.fontSize);
        const large = size >= 24 || (size >= 18.66 && Number(style.fontWeight) >= 700);
        if (ratio < (large ? 3 : 4.5)) pale.push([text.slice(0, 40), Math.round(ratio * 100) / 100]);
    }
    return pale;
}"""

# What has the focus: what it is called, and whether one sees it: it is in the window, nothing lies over its middle, and its outline
# stands out from what is around it.
FOCUS = "() => {" + CONTRAST + """
    const node = document.activeElement;
    if (!node || node === document.body) return null;
    const { left, top, right, bottom } = node.getBoundingClientRect();
    const style = getComputedStyle(node);
    const at = [Math.max(left, 0) + Math.min(right, innerWidth), Math.max(top, 0) + Math.min(bottom, innerHeight)].map(sum => sum / 2);
    const seen = document.elementFromPoint(...at);
    const field = node.labels?.[0]?.innerText;
    return {
        id: node.id,
        tag: node.tagName.toLowerCase(),
        name: (node.getAttribute("aria-label") ?? field ?? (node.getAttribute("aria-labelledby") ? document.getElementById(node.getAttribute("aria-labelledby"))?.innerText : node.innerText) ?? "").trim(),
        inside: right > 0 && bottom > 0 && left < innerWidth && top < innerHeight,
        uncovered: Boolean(seen) && (node.contains(seen) || seen.contains(node)),
        outline: style.outlineStyle !== "none" && parseFloat(style.outlineWidth) >= 2 ? contrast(style.outlineColor, ground(node.parentElement)) : 0,
    };
}"""


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

    async def focus(self) -> dict | None:
        """What has the focus, of which everybody must see that it has it, and which has a name for those who do not."""
        found = await self.page.evaluate(FOCUS)
        if found and found["id"] != "part-title":
            assert found["name"], found
            assert found["inside"] and found["uncovered"] and found["outline"] >= 3, found
        return found

    async def tab(self, selector: str, back: bool = False) -> dict:
        """With Tab to what the selector names."""
        seen = []
        for _ in range(TABS):
            await self.page.keyboard.press("Shift+Tab" if back else "Tab")
            found = await self.focus()
            if found and await self.page.evaluate("selector => document.activeElement.matches(selector)", selector):
                return found
            seen.append(found and found["name"][:30])
        raise AssertionError(f"Tab does not lead to {selector}, but to {seen}")

    async def look_again(self) -> None:
        """Now, and not at the end of ten seconds; returns when the browser has the answer."""
        async with self.page.expect_event("requestfinished", lambda request: "/v1/" in request.url):
            await self.page.evaluate("document.dispatchEvent(new Event('visibilitychange'))")

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


