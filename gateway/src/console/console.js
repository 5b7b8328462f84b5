// The operators' pages. The server writes them, but for the labeling queues; this fetches the one that the address names with the
// visitor's key, puts it in its place, looks again now and then, and sends what a button says.

import { path, places, showPlaces } from "./places.js";
import { playground } from "./playground.js";
import { queues } from "./queues.js";
import { call, enter, LABELING, notice, passing, Refused, session } from "./session.js";

const $ = (id) => document.getElementById(id);
const EVERY_MS = 10000;
const DOOR = "Your key opens the console. It is kept until this tab is closed. Labeling is at /console/label.";

const labels = path === "/console/queues";
/** Where this page's part is. */
const source = `/v1/console/parts${path === "/console" ? "/overview" : path.slice("/console".length)}${location.search}`;

/**
 * The part as a document of its own. It is parsed there, without running anything, and only its nodes come over: strings never
 * become markup of this page.
 */
function fetchPart() {
  return new Promise((resolve, reject) => {
    const request = new XMLHttpRequest();
    request.open("GET", source);
    request.responseType = "document";
    request.timeout = 60000;
    for (const [name, value] of Object.entries(session.headers())) request.setRequestHeader(name, value);
    request.onload = () => {
      if (request.status === 200 && request.responseXML) resolve({ title: request.responseXML.title, body: request.responseXML.body });
      // An error is JSON, which this kind of request cannot read: it is asked for as such.
      else call("GET", source).then(() => reject(new Refused(0, "The server's answer could not be read.")), reject);
    };
    request.onerror = request.ontimeout = () => reject(new Refused(0, "The server cannot be reached."));
    request.send();
  });
}

const within = (selector) => [...$("place").querySelectorAll(selector)];
/** What may have the focus, by what it is and not by where: lists grow between two looks. */
const known = (node) => node.id || [node.tagName, node.getAttribute("href"), node.getAttribute("aria-label") ?? node.textContent].join(" ");
const alike = (name) => within("a, button, summary, [tabindex]").filter((node) => known(node) === name);

/** What the visitor has opened and where they are: a page that is looked at again stays as it was. */
function bearings() {
  const at = $("place").contains(document.activeElement) ? document.activeElement : null;
  const name = at && known(at);
  return {
    open: within("details[id][open]").map((node) => node.id),
    scrolled: within(".scroll, pre").map(({ scrollLeft, scrollTop }) => ({ scrollLeft, scrollTop })),
    focus: at && { name, nth: alike(name).indexOf(at) },
  };
}

function restore({ open, scrolled, focus }) {
  for (const name of open) $(name)?.setAttribute("open", "");
  within(".scroll, pre").forEach((node, at) => Object.assign(node, scrolled[at]));
  if (focus) (alike(focus.name)[focus.nth] ?? $("part-title"))?.focus({ preventScroll: true });
}

/** Whether a button's act is under way. */
let acting = false;
/** How often the page was asked for: what was asked for earlier than the newest is older than it. */
let asked = 0;
/** What stands here as it was written, and when it came. */
let written = null;
let since = null;
/** What is asked and answered in the playground must not be taken away by a newer page. */
let playing = false;

/** Whether somebody is at something that a new page would take from them. */
function occupied() {
  const marked = getSelection();
  const reads = marked && !marked.isCollapsed && $("place").contains(marked.anchorNode);
  const at = document.activeElement?.matches("input, textarea, select");
  return document.hidden || playing || acting || $("place").matches(":active") || document.querySelector("dialog[open]") || at || reads;
}

/** Shows the page as it is now; `unless` says, when it has come, that it is not wanted any more. */
async function show(unless = () => false) {
  asked += 1;
  const own = asked;
  const { title, body } = await (labels ? queues() : fetchPart());
  if (own !== asked || unless()) return;
  since = new Date();
  // What somebody reads, or has read to them, is left alone as long as it is true.
  if (written?.isEqualNode(body)) return;
  const before = written && bearings();
  written = body.cloneNode(true);
  document.title = `${title} · Tidemill`;
  $("place").replaceChildren(...[...body.childNodes].map((node) => document.adoptNode(node)));
  $("place").hidden = false;
  if (before) restore(before);
  else if (document.activeElement === document.body) $("part-title")?.focus({ preventScroll: true });
  if ($("ask")) {
    playing = true;
    playground();
  }
}

/** Says why the page is not newer. */
function stale(error) {
  // The key is not taken any more: what it has shown goes, and the door says why.
  if (error.status === 401) location.reload();
  const of = since ? ` This page is as it was at ${since.toISOString().slice(11, 19)} UTC.` : "";
  notice(error.message + of);
  $("notice").dataset.passing = "true";
}

let timer = null;

/** Looks again, and goes on doing so. */
async function look() {
  clearTimeout(timer);
  // The first time somebody waits for it, whatever else they do.
  if (!since || !occupied()) {
    try {
      await show(() => since && occupied());
      if ($("notice").dataset.passing) notice(null);
      delete $("notice").dataset.passing;
    } catch (error) {
      stale(error);
    }
  }
  clearTimeout(timer);
  timer = setTimeout(look, EVERY_MS);
}

/** Asks whether it is meant; resolves with the answer. */
function sure(title, text) {
  $("sure-title").textContent = `${title}?`;
  $("sure-yes").textContent = title;
  $("sure-text").textContent = text;
  $("sure").returnValue = "";
  $("sure").showModal();
  return new Promise((resolve) => {
    $("sure").addEventListener("close", () => resolve($("sure").returnValue === "yes"), { once: true });
  });
}

/** Buttons that act; while one of them is at it, all wait, so that no press goes to a page that is about to be replaced. */
function enable(yes) {
  for (const button of $("place").querySelectorAll("button[data-post]")) button.disabled = !yes;
}

/** What the button says, once; then the page as it is afterwards. */
async function act(button) {
  const { post, body } = button.dataset;
  const words = button.textContent.trim();
  if (acting || (button.dataset.sure && !(await sure(words, button.dataset.sure)))) return;
  acting = true;
  enable(false);
  let said;
  try {
    await call("POST", post, body ? JSON.parse(body) : undefined);
    said = [`Done: ${words}.`, true];
  } catch (error) {
    said = [passing(error) ? `${error.message} Nothing is known of its effect; look before you repeat it.` : error.message];
  }
  await show().catch((error) => (said = [`${said[0]} ${error.message}`]));
  acting = false;
  enable(true);
  delete $("notice").dataset.passing;
  notice(...said);
  // What was pressed may be gone; whoever works by keyboard stays near it.
  ($(button.id) ?? $("part-title"))?.focus({ preventScroll: true });
}

async function start() {
  places();
  $("place").addEventListener("click", (event) => {
    const button = event.target.closest("button[data-post]");
    if (button) act(button);
  });
  // Without keys everyone may look, and needs no name.
  await enter({ place: labels ? LABELING : "/v1/console/me", words: labels ? undefined : DOOR, nameless: true });
  showPlaces(session.operator);
  document.addEventListener("visibilitychange", () => document.hidden || look());
  await look();
}

start();
