// The way between the operators' pages: links at the top, G and a letter, and the list of keys.

const $ = (id) => document.getElementById(id);
/** Between G and the letter of a page. */
const GO_MS = 2000;

/** Where this page is. */
export const path = location.pathname.replace(/\/+$/, "");

/** When G was pressed: a letter soon after it goes to a page. One key alone would take a visitor away by mistake. */
let going = -Infinity;

function keys(event) {
  if (event.ctrlKey || event.metaKey || event.altKey || document.querySelector("dialog[open]")) return;
  if (/^(INPUT|TEXTAREA|SELECT)$/.test(event.target.tagName)) return;
  const key = event.key.toLowerCase();
  if (event.key === "?") {
    event.preventDefault();
    $("help").showModal();
    return;
  }
  const soon = event.timeStamp - going < GO_MS;
  going = key === "g" ? event.timeStamp : -Infinity;
  const place = soon && !$("places").hidden && [...$("places").children].find((link) => link.dataset.key === key && !link.hidden);
  if (place) {
    event.preventDefault();
    place.click();
  }
}

/** Makes links and keys work; the links are seen when someone has signed in. */
export function places() {
  document.addEventListener("keydown", keys);
  for (const link of $("places").querySelectorAll("a")) {
    const to = new URL(link.href).pathname;
    const here = to === "/console" ? path === to : path === to || path.startsWith(`${to}/`);
    if (here) link.setAttribute("aria-current", "page");
  }
}

/**
 * Shows the links; that of the labeling queues only to those who may see them. On a narrow screen they are in a row that scrolls: the
 * one of this page is brought into sight.
 */
export function showPlaces(operator) {
  $("places").querySelector("[data-key=q]").hidden = !operator;
  $("places").hidden = false;
  const here = $("places").querySelector("[aria-current]");
  if (here) $("places").scrollLeft = here.offsetLeft - ($("places").clientWidth - here.offsetWidth) / 2;
}
