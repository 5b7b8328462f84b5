// The labeling page: one task at a time, by keyboard.

import { wordDiff } from "./diff.js";
import { markdown } from "./markdown.js";
import { Outbox } from "./outbox.js";
import { call, enter, notice, passing, say, session, signIn } from "./session.js";

const $ = (id) => document.getElementById(id);
const REASONS = ["I don't know enough about this", "Unclear or broken prompt", "Not a language I read", "Harmful or private content"];
const SAID = { left: "Left is better", right: "Right is better", tie: "Tie", both_bad: "Both bad" };
/** Keys pressed this soon after a task appeared were meant for the one before. */
const SETTLE_MS = 250;

const state = {
  queue: null,
  work: null,
  shownAt: 0,
  busy: false,
  diff: false,
  wide: false,
  outbox: null,
  retry: null,
  wait: 1000,
};

function show(part) {
  for (const id of ["door", "rest", "bench"]) $(id).hidden = id !== part;
  $("deck").hidden = part !== "bench";
  $("guide-toggle").hidden = part !== "bench" || !state.queue?.guidelines;
}

// What is on the screen.

function text(node, content) {
  node.replaceChildren();
  node.classList.remove("plain-text");
  if (content.trim() === "") {
    const nothing = document.createElement("p");
    nothing.className = "nothing";
    nothing.textContent = "(empty)";
    node.append(nothing);
  } else {
    node.append(markdown(content));
  }
}

function turn(message) {
  const row = document.createElement("div");
  row.className = `turn ${message.role === "system" ? "system" : ""}`;
  const role = document.createElement("span");
  role.className = "role";
  role.textContent = { system: "System", developer: "System", user: "User", assistant: "Assistant", tool: "Tool" }[message.role] ?? message.role;
  const body = document.createElement("div");
  body.className = "text";
  text(body, message.text);
  row.append(role, body);
  return row;
}

function answers() {
  const { left, right } = state.work;
  $("diff").setAttribute("aria-pressed", String(state.diff));
  if (!state.diff) {
    text($("left-text"), left);
    text($("right-text"), right);
    return;
  }
  const sides = wordDiff(left, right);
  [$("left-text"), $("right-text")].forEach((node, side) => {
    node.replaceChildren();
    node.classList.add("plain-text");
    for (const piece of sides[side]) {
      if (!piece.only) {
        node.append(piece.text);
        continue;
      }
      const mark = document.createElement("mark");
      mark.textContent = piece.text;
      node.append(mark);
    }
  });
}

function progress(of) {
  if (!of) return;
  const share = of.wanted ? Math.min(1, of.completed / of.wanted) : 0;
  const percent = Math.floor(share * 100);
  $("bar").value = share;
  $("progress").setAttribute("aria-valuenow", String(percent));
  $("progress").setAttribute("aria-valuetext", `${percent} percent of the queue, ${of.mine} by you`);
  $("progress-text").textContent = `${percent} % · ${of.mine} by you`;
  $("progress").hidden = false;
}

const RESTS = {
  done: ["All done", "Every pair in this queue has its verdicts. Thank you."],
  yours_done: ["You have seen everything", "What is left in this queue waits for other people. Thank you."],
  waiting: ["Nothing for you at the moment", "The rest is with other people or still being prepared. This page looks again by itself."],
  closed: ["This queue is closed", "Whoever runs it has stopped it. Your verdicts are stored."],
  none: ["No queue yet", "Someone with a key for training makes one with POST /v1/labeling/queues."],
};

function rest(why) {
  state.work = null;
  show("rest");
  const [title, words] = RESTS[why] ?? RESTS.waiting;
  $("rest-title").textContent = title;
  $("rest-text").textContent = words;
  $("rest-again").hidden = why === "closed";
  $("rest-undo").hidden = why === "none" || why === "closed";
  $("rest-title").focus();
  say(title);
  later(why === "waiting" || why === "none" ? 5000 : null);
}

function later(ms) {
  clearTimeout(state.retry);
  state.retry = ms === null ? null : setTimeout(next, ms);
}

/** What `next` and every verdict answer: a task, or why there is none. */
function arrive(answer) {
  progress(answer.progress);
  later(null);
  if (!answer.task) {
    rest(answer.why);
    return;
  }
  state.work = { ...answer.task };
  state.shownAt = performance.now();
  show("bench");
  $("bench").classList.toggle("wide", state.wide || !state.queue.guidelines);
  for (const side of ["left", "right"]) $(side).classList.remove("chosen");
  $("conversation").replaceChildren(...answer.task.prompt.map(turn));
  $("conversation").scrollTop = $("conversation").scrollHeight;
  answers();
  scrollTo({ top: 0 });
  $("prompt-title").focus({ preventScroll: true });
}

// What is done.

/** Runs one thing at a time; what the server or the network says against it is shown. */
async function once(action) {
  if (state.busy) return;
  state.busy = true;
  document.body.setAttribute("aria-busy", "true");
  try {
    await action();
  } catch (error) {
    await trouble(error);
  } finally {
    state.busy = false;
    document.body.removeAttribute("aria-busy");
  }
}

async function trouble(error) {
  if (passing(error)) {
    const kept = state.outbox?.items().length ?? 0;
    const words = kept ? `Offline. ${kept === 1 ? "Your verdict is" : `${kept} verdicts are`} kept on this device and will be sent.` : "Offline. Trying again.";
    notice(words);
    clearTimeout(state.retry);
    state.retry = setTimeout(next, state.wait);
    state.wait = Math.min(state.wait * 2, 15000);
  } else if (error.status === 401 || error.status === 403) {
    const before = session.annotator;
    session.wrong = error.message;
    session.keyed = true;
    state.work = null;
    show("door");
    await signIn();
    // Someone else has their own task and their own unsent verdicts.
    if (session.annotator !== before) location.reload();
    else setTimeout(next, 0);
  } else if (error.code === "lease_lost" || error.code === "already_judged" || error.status === 404) {
    notice(error.code === "lease_lost" ? "This task went to someone else while it was open, so your verdict was not needed. Here is the next one." : error.message);
    setTimeout(next, 0);
  } else {
    notice(error.message ?? String(error));
    if (!state.work) later(5000);
  }
}

const who = () => ({ annotator: session.keyed ? undefined : session.annotator });
const ask = () => call("POST", `/v1/labeling/queues/${state.queue.id}/next`, who());

/** Sends what is waiting and, unless there is a task on the screen, brings one. */
async function advance() {
  const answer = await state.outbox.flush(state.queue.id);
  if (answer || !state.work) arrive(answer ?? (await ask()));
  state.wait = 1000;
}

function next() {
  return once(async () => {
    if (!state.queue && !(await queues())) return;
    await advance();
    if ($("notice").textContent.startsWith("Offline")) notice(null);
  });
}

/** Writes the judgement down, then sends it; the answer brings the next task. */
function settle(what, body, words) {
  if (!state.work || performance.now() - state.shownAt < SETTLE_MS) return;
  once(async () => {
    const { assignment } = state.work;
    const latency_ms = Math.round(performance.now() - state.shownAt);
    state.outbox.add(state.queue.id, `/v1/labeling/assignments/${assignment}/${what}`, { ...who(), ...body, latency_ms, next: true });
    // Written down: from here on the task counts as judged, whatever the network does.
    state.work = null;
    notice(null);
    await advance();
    say(`${words}. ${state.work ? "Next task." : ""}`);
  });
}

function choose(choice) {
  if (!state.work || state.busy) return;
  if (performance.now() - state.shownAt < SETTLE_MS) return;
  for (const side of ["left", "right"]) $(side).classList.toggle("chosen", choice === side);
  settle("verdict", { choice }, SAID[choice]);
}

function skip(reason) {
  settle("skip", { reason }, "Skipped");
}

function undo() {
  once(async () => {
    if (state.outbox.items().length) {
      notice("Your last verdict is still on its way; undo works as soon as the server is back.");
      return;
    }
    const answer = await call("POST", `/v1/labeling/queues/${state.queue.id}/undo`, who());
    notice(answer.again ? "Taken back. Judge it again." : "Taken back. Someone else has this task now.", true);
    arrive(answer);
  });
}

function toggleDiff() {
  state.diff = !state.diff;
  if (state.work) answers();
}

function toggleGuide() {
  state.wide = !state.wide;
  $("bench").classList.toggle("wide", state.wide);
  $("guide-toggle").setAttribute("aria-expanded", String(!state.wide));
}

function openSkip() {
  if (!state.work || state.busy) return;
  $("reason").value = "";
  $("skip-dialog").showModal();
  $("reasons").querySelector("button").focus();
}

// Keys and buttons.

const KEYS = {
  1: () => choose("left"),
  2: () => choose("right"),
  t: () => choose("tie"),
  "=": () => choose("tie"),
  b: () => choose("both_bad"),
  s: openSkip,
  u: undo,
  d: toggleDiff,
  g: toggleGuide,
  "?": () => $("help").showModal(),
};

function onKey(event) {
  if (event.repeat) return;
  const key = event.key.toLowerCase();
  if ($("skip-dialog").open) {
    const reason = document.activeElement === $("reason") ? undefined : REASONS[Number(key) - 1];
    if (reason) {
      event.preventDefault();
      $("skip-dialog").close(reason);
    }
    return;
  }
  if ($("help").open || event.target.matches("input, select, textarea") || event.altKey) return;
  const control = event.ctrlKey || event.metaKey;
  const action = control ? (key === "z" && !event.shiftKey ? undo : null) : KEYS[key];
  if (!action || !$("door").hidden || !state.queue) return;
  event.preventDefault();
  action();
}

function connect() {
  document.addEventListener("keydown", onKey);
  for (const button of document.querySelectorAll("[data-choice]")) button.addEventListener("click", () => choose(button.dataset.choice));
  $("diff").addEventListener("click", toggleDiff);
  $("skip").addEventListener("click", openSkip);
  $("undo").addEventListener("click", undo);
  $("rest-undo").addEventListener("click", undo);
  $("rest-again").addEventListener("click", next);
  $("guide-toggle").addEventListener("click", toggleGuide);
  addEventListener("online", next);
  REASONS.forEach((reason, at) => {
    const button = document.createElement("button");
    button.type = "button";
    button.className = "plain";
    const key = document.createElement("kbd");
    key.textContent = String(at + 1);
    button.append(key, reason);
    button.addEventListener("click", () => $("skip-dialog").close(reason));
    const item = document.createElement("li");
    item.append(button);
    $("reasons").append(item);
  });
  $("skip-form").addEventListener("submit", (event) => {
    const reason = $("reason").value.trim();
    if (event.submitter?.value === "cancel") return;
    event.preventDefault();
    if (reason) $("skip-dialog").close(reason);
    else $("reason").focus();
  });
  $("skip-dialog").addEventListener("close", () => {
    const reason = $("skip-dialog").returnValue;
    $("skip-dialog").returnValue = "";
    if (reason && reason !== "cancel") skip(reason);
  });
  $("queue").addEventListener("change", () => {
    location.search = new URLSearchParams({ queue: $("queue").value });
  });
}

/** Finds the queue to work on: the one in the address, or the first open one. */
async function queues() {
  const { data } = await call("GET", "/v1/labeling/queues");
  const open = data.filter((queue) => !queue.closed);
  const wanted = new URLSearchParams(location.search).get("queue");
  state.queue = data.find((queue) => queue.id === wanted || queue.name === wanted) ?? open[0] ?? null;
  $("queue").replaceChildren(...data.map((queue) => new Option(queue.closed ? `${queue.name} (closed)` : queue.name, queue.name, false, queue === state.queue)));
  $("pick").hidden = data.length === 0;
  if (!state.queue) {
    rest("none");
    return false;
  }
  $("guide-text").replaceChildren(markdown(state.queue.guidelines));
  return true;
}

async function start() {
  connect();
  await enter();
  state.outbox = new Outbox(session.annotator);
  await next();
}

start();
