// The operators' pages. The server writes them; this fetches the one that the address names with the visitor's key, puts it in its
// place, looks again now and then, and sends what a button says.

import { path, places, showPlaces } from "./places.js";
import { playground } from "./playground.js";
import { call, doorParts, meet, passing, session, signIn } from "./session.js";

const $ = (id) => document.getElementById(id);
const ME = "/v1/console/me";
const EVERY_MS = 10000;
const DOOR = { text: "Your key opens the console. It is kept until this tab is closed. Labeling is at /console/label." };

/** Where this page's part is. */
const source = `/v1/console/parts${path === "/console" ? "/overview" : path.slice("/console".length)}${location.search}`;

function notice(text, good = false) {
  $("notice").textContent = text ?? "";
  $("notice").hidden = !text;
  $("notice").classList.toggle("good", good);
}

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
      if (request.status === 200 && request.responseXML) resolve(request.responseXML);
      // An error is JSON, which this kind of request cannot read: it is asked for as such.
      else call("GET", source).then(() => reject(new Error("The server's answer could not be read.")), reject);
    };
    request.onerror = request.ontimeout = () => reject(new Error("The server cannot be reached."));
    request.send();
  });
}

const within = (selector) => [...$("place").querySelectorAll(selector)];
const FOCUSABLE = "a, button, summary, [tabindex]";

/** What the visitor has opened and where they are: a page that is looked at again stays as it was. */
function bearings() {
  const at = document.activeElement;
  const open = within("details[id][open]").map((node) => node.id);
  return { open, scrolled: within(".scroll").map((node) => node.scrollLeft), id: at?.id, place: within(FOCUSABLE).indexOf(at) };
}

function restore({ open, scrolled, id, place }) {
  for (const name of open) $(name)?.setAttribute("open", "");
  within(".scroll").forEach((node, at) => { node.scrollLeft = scrolled[at] ?? 0; });
  if (place >= 0) (id ? $(id) : within(FOCUSABLE)[place])?.focus({ preventScroll: true });
}

async function show(first) {
  const part = await fetchPart();
  const before = bearings();
  document.title = `${part.title} · Tidemill`;
  $("place").replaceChildren(...[...part.body.childNodes].map((node) => document.adoptNode(node)));
  $("place").hidden = false;
  if (first) $("part-title")?.focus({ preventScroll: true });
  else restore(before);
}

/** Whether a button's act is under way. */
let acting = false;

/** Whether somebody is at something that a new page would take from them. */
function occupied() {
  const at = document.activeElement;
  const marked = getSelection();
  const reads = marked && !marked.isCollapsed && $("place").contains(marked.anchorNode);
  return document.hidden || acting || $("place").matches(":active") || document.querySelector("dialog[open]") || /^(INPUT|TEXTAREA|SELECT)$/.test(at?.tagName ?? "") || reads;
}

async function again() {
  if (!occupied()) {
    try {
      await show(false);
      if ($("notice").dataset.passing) notice(null);
      delete $("notice").dataset.passing;
    } catch (error) {
      notice(error.message);
      $("notice").dataset.passing = "true";
    }
  }
  setTimeout(again, EVERY_MS);
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
  await show(false).catch((error) => (said = [`${said[0]} ${error.message}`]));
  acting = false;
  enable(true);
  notice(...said);
  // What was pressed may be gone; whoever works by keyboard stays near it.
  ($(button.id) ?? $("part-title"))?.focus({ preventScroll: true });
}

function connect() {
  places();
  $("leave").addEventListener("click", () => session.leave());
  $("place").addEventListener("click", (event) => {
    const button = event.target.closest("button[data-post]");
    if (button) act(button);
  });
}

async function start() {
  connect();
  while (true) {
    try {
      // Without keys everyone may look.
      if (!(await meet(ME)) && session.keyed) await signIn(doorParts(), { me: ME, words: DOOR });
      break;
    } catch (error) {
      notice(error.message);
      await new Promise((resolve) => setTimeout(resolve, 3000));
    }
  }
  notice(null);
  $("who").textContent = session.annotator ?? "";
  $("who").hidden = !session.annotator;
  $("leave").hidden = !session.keyed;
  showPlaces();
  try {
    await show(true);
  } catch (error) {
    notice(error.message);
    $("notice").dataset.passing = "true";
  }
  // What is asked and answered there must not be taken away by a newer page.
  if ($("ask")) playground(notice);
  else setTimeout(again, EVERY_MS);
}

start();
