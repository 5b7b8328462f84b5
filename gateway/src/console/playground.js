// The playground: both variants are asked at once, in an order that is drawn and not shown; the preference goes to the feedback API.

import { markdown } from "./markdown.js";
import { call, notice, Refused, say, session } from "./session.js";

const $ = (id) => document.getElementById(id);
const SIDES = ["left", "right"];
const KEYS = { 1: "left", 2: "right", 3: "tie" };
/** Keys pressed this soon after the answers ended were not meant for them. */
const SETTLE_MS = 250;

/** A coin that is not `Math.random`: who knows its draws would not be blind. */
const coin = () => crypto.getRandomValues(new Uint8Array(1))[0] % 2 === 1;

/** The payloads of a stream's `data:` lines, as they come. */
async function* payloads(response) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  while (true) {
    const { done, value } = await reader.read();
    if (done) return;
    const lines = (rest + value).split("\n");
    rest = lines.pop();
    for (const line of lines) {
      if (line.startsWith("data: ")) yield line.slice(6).trim();
    }
  }
}

/** Who is asked: a name, and what requests must say to get that one. */
function chosen(select) {
  const [option] = select.selectedOptions;
  return { name: option.textContent, model: option.value, variant: option.dataset.variant };
}

/** What the network says, in words; what the server or the visitor said stays as it is. */
function understood(error) {
  return error instanceof TypeError ? new Refused(0, "The server cannot be reached.") : error;
}

/** One answer, whose text grows in `node`; resolves with its id. */
async function ask({ model, variant }, question, node, signal) {
  const headers = { ...session.headers(), "content-type": "application/json" };
  // A rollout would decide by itself: a tester's request names the variant, and counts in no comparison of it.
  if (variant) headers["x-tidemill-variant"] = variant;
  const response = await fetch("/v1/chat/completions", {
    method: "POST",
    headers,
    body: JSON.stringify({ ...question, model, stream: true }),
    cache: "no-store",
    credentials: "omit",
    signal,
  });
  if (!response.ok) {
    const answer = await response.json().catch(() => null);
    throw new Refused(response.status, answer?.error?.message ?? `HTTP ${response.status}`, answer?.error?.code);
  }
  let id = null;
  let text = "";
  for await (const payload of payloads(response)) {
    if (payload === "[DONE]") break;
    const chunk = JSON.parse(payload);
    if (chunk.error) throw new Refused(500, chunk.error.message, chunk.error.code);
    id ??= chunk.id;
    const piece = chunk.choices?.[0]?.delta?.content;
    if (piece) {
      text += piece;
      node.textContent = text;
    }
  }
  if (!id) throw new Refused(0, "The answer ended before it began.");
  return { id, text };
}

/** Makes the form work. */
export function playground() {
  /** The question that is being answered or judged. */
  let round = null;
  const tally = new Map();

  function choices(enabled) {
    for (const button of $("choices").querySelectorAll("button")) button.disabled = !enabled;
  }

  function finish(side, text) {
    const node = $(`${side}-text`);
    node.classList.remove("plain-text");
    node.replaceChildren(text.trim() ? markdown(text) : "(empty)");
  }

  async function send() {
    const prompt = $("prompt").value.trim();
    // What is still on its way to the server would be told of the next question.
    if (round?.asking || round?.judging) return;
    if (!prompt) {
      notice("There is nothing to ask yet: write a prompt.");
      $("prompt").focus();
      return;
    }
    const stop = new AbortController();
    const asked = [chosen($("one")), chosen($("other"))];
    if (coin()) asked.reverse();
    const system = $("system").value.trim();
    const messages = [...(system ? [{ role: "system", content: system }] : []), { role: "user", content: prompt }];
    const question = { messages, max_completion_tokens: Number($("most").value) || 256, metadata: { source: "playground" } };
    round = { names: asked.map((one) => one.name), stop, asking: true, answers: null };
    const own = round;
    notice(null);
    for (const [id, hidden] of [["answers", false], ["choices", false], ["outcome", true], ["stop", false]]) $(id).hidden = hidden;
    $("send").disabled = true;
    choices(false);
    for (const side of SIDES) {
      $(side).classList.remove("chosen");
      $(`${side}-text`).textContent = "";
      $(`${side}-text`).classList.add("plain-text");
      $(side).setAttribute("aria-busy", "true");
    }
    $("left").focus();
    let failed = null;
    const answers = await Promise.all(asked.map(async (one, at) => {
      try {
        const answer = await ask(one, question, $(`${SIDES[at]}-text`), stop.signal);
        finish(SIDES[at], answer.text);
        return answer;
      } catch (error) {
        // The first of them counts: it ends the other, with which there is nothing to compare any more.
        failed ??= understood(error);
        stop.abort();
        return null;
      } finally {
        $(SIDES[at]).removeAttribute("aria-busy");
      }
    }));
    own.asking = false;
    $("send").disabled = false;
    // A key that was on its way to a button that goes would be lost with it.
    const stopped = document.activeElement === $("stop");
    $("stop").hidden = true;
    if (failed) {
      $("choices").hidden = true;
      if (stopped || $("left") === document.activeElement) $("prompt").focus({ preventScroll: true });
      notice(failed.name === "AbortError" ? "Stopped: there is nothing to compare." : `One of the two did not answer, so there is nothing to compare. ${failed.message}`);
      return;
    }
    if (stopped) $("left").focus({ preventScroll: true });
    own.answers = answers;
    own.since = performance.now();
    choices(true);
    say("Both have answered. Which is better?");
  }

  async function judge(choice) {
    const own = round;
    if (!own?.answers || own.judging || performance.now() - own.since < SETTLE_MS) return;
    own.judging = true;
    choices(false);
    const shown = own.answers.map((answer) => answer.id);
    const value = { candidates: shown, ...(choice === "tie" ? { tie: true } : { winner: shown[SIDES.indexOf(choice)] }) };
    const latency = Math.min(Math.round(performance.now() - own.since), 86400000);
    try {
      const who = session.annotator ? { author: session.annotator } : {};
      // The same key again is the same judgement: a repeated attempt counts once.
      const key = `playground-${shown.join("-")}`.slice(0, 256);
      await call("POST", "/v1/feedback", { kind: "comparison", value, shown, source: "playground", latency_ms: latency, idempotency_key: key, ...who });
    } catch (error) {
      own.judging = false;
      choices(true);
      $("choices").querySelector(`[data-choice=${choice}]`).focus({ preventScroll: true });
      notice(`Your preference is not stored yet. ${error.message}`);
      return;
    }
    notice(null);
    own.judging = false;
    own.answers = null;
    $("choices").hidden = true;
    if (choice !== "tie") $(choice).classList.add("chosen");
    reveal(own.names, choice);
    $("prompt").focus({ preventScroll: true });
    $("prompt").select();
  }

  function reveal(names, choice) {
    const [left, right] = names;
    const better = choice === "tie" ? "You found them equally good." : `You preferred ${names[SIDES.indexOf(choice)]}.`;
    $("outcome-text").textContent = `Left was ${left}, right was ${right}. ${better}`;
    for (const [at, name] of names.entries()) {
      const won = choice === "tie" ? 0.5 : Number(SIDES[at] === choice);
      const before = tally.get(name) ?? { won: 0, judged: 0 };
      tally.set(name, { won: before.won + won, judged: before.judged + 1 });
    }
    const list = document.createElement("ul");
    list.className = "legend";
    for (const [name, { won, judged }] of tally) {
      const item = document.createElement("li");
      item.textContent = `${name}: ${won} of ${judged} since you came`;
      list.append(item);
    }
    $("tally").replaceChildren(list);
    $("outcome").hidden = false;
  }

  $("ask").addEventListener("submit", (event) => {
    event.preventDefault();
    send();
  });
  $("stop").addEventListener("click", () => round?.stop.abort());
  $("choices").addEventListener("click", (event) => {
    const choice = event.target.closest("button[data-choice]")?.dataset.choice;
    if (choice) judge(choice);
  });
  document.addEventListener("keydown", (event) => {
    if (document.querySelector("dialog[open]")) return;
    if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) {
      event.preventDefault();
      $("ask").requestSubmit();
    } else if (event.key === "Escape" && round?.asking) {
      round.stop.abort();
    } else if (KEYS[event.key] && !event.ctrlKey && !event.metaKey && !event.altKey && !/^(INPUT|TEXTAREA|SELECT)$/.test(event.target.tagName)) {
      judge(KEYS[event.key]);
    }
  });
  $("prompt").focus({ preventScroll: true });
}
