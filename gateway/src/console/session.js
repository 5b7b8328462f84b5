// Who is at the desk, how the page speaks to the server, and how it tells what went wrong.

const $ = (id) => document.getElementById(id);
const KEY = "tidemill-key";
const NAME = "tidemill-name";
/** Before the server is asked again who this is. */
const AGAIN_MS = 3000;

/** An answer of the server that is an error. `status` 0: no answer at all. */
export class Refused extends Error {
  constructor(status, message, code) {
    super(message);
    this.status = status;
    this.code = code;
  }
}

/** The session of this tab. The key lives as long as the tab. */
export const session = {
  /** As the server knows the person; null before signing in. */
  annotator: null,
  /** The server asks for a key. */
  keyed: false,
  /** Runs the labeling queues, and does not only work in them. */
  operator: false,

  /** What a request must send. */
  headers() {
    const key = sessionStorage.getItem(KEY);
    return key ? { authorization: `Bearer ${key}` } : {};
  },
  name: () => sessionStorage.getItem(NAME),
  setName: (name) => sessionStorage.setItem(NAME, name),
  setKey: (key) => sessionStorage.setItem(KEY, key),
  leave() {
    sessionStorage.removeItem(KEY);
    sessionStorage.removeItem(NAME);
    location.reload();
  },
};

/** For those who hear the page: what appears in a place that was hidden is not always read to them. */
export function say(text) {
  $("spoken").textContent = text;
}

/** Tells the visitor something above the page; nothing takes it away. */
export function notice(text, good = false) {
  say(text ?? "");
  $("notice").textContent = text ?? "";
  $("notice").hidden = !text;
  $("notice").classList.toggle("good", good);
}

/** One request with a JSON answer; throws `Refused`. */
export async function call(method, path, body) {
  const headers = session.headers();
  if (body !== undefined) headers["content-type"] = "application/json";
  let response;
  try {
    response = await fetch(path, {
      method,
      headers,
      body: body === undefined ? undefined : JSON.stringify(body),
      cache: "no-store",
      credentials: "omit",
      signal: AbortSignal.timeout(20000),
    });
  } catch {
    throw new Refused(0, "The server cannot be reached.");
  }
  let answer = null;
  try {
    answer = await response.json();
  } catch {
    // Something between us and the server answered.
    throw new Refused(response.ok ? 0 : response.status, `The answer could not be read (HTTP ${response.status}).`);
  }
  if (!response.ok) throw new Refused(response.status, answer?.error?.message ?? `HTTP ${response.status}`, answer?.error?.code);
  return answer;
}

/** Whether trying the same again later can help. */
export function passing(error) {
  return error instanceof Refused && (error.status === 0 || error.status === 408 || error.status === 429 || error.status >= 500);
}

/** What tells annotators and those who run their queues who they are. */
export const LABELING = "/v1/labeling/me";

/** Asks the server who this is: true when signed in. `place` answers those who may see the page. */
async function meet(place) {
  const name = place === LABELING ? session.name() : null;
  try {
    const me = await call("GET", `${place}${name ? `?annotator=${encodeURIComponent(name)}` : ""}`);
    session.annotator = me.annotator;
    session.keyed = me.keyed;
    session.operator = me.operator;
  } catch (error) {
    if (error.status !== 401 && error.status !== 403) throw error;
    session.keyed = true;
    session.annotator = null;
    session.wrong = sessionStorage.getItem(KEY) ? error.message : null;
  }
  return session.annotator !== null;
}

/** A header has no other characters, and no key has spaces in it. */
const looksLikeKey = (value) => /^[!-~]+$/.test(value);

/** Shows the form and resolves when someone has signed in; `words` stand above it where a key is asked for. */
export function signIn(place = LABELING, words = "Your key opens the queues that you work on. It is kept until this tab is closed.") {
  const field = $("door-field");
  return new Promise((resolve) => {
    const show = () => {
      $("door-title").textContent = session.keyed ? "Sign in" : "Who is labeling?";
      $("door-text").textContent = session.keyed ? words : "This server has no keys. Your name stands beside your verdicts.";
      $("door-label").textContent = session.keyed ? "Key" : "Name";
      field.type = session.keyed ? "password" : "text";
      field.placeholder = session.keyed ? "tm-…" : "";
      field.setAttribute("aria-invalid", String(Boolean(session.wrong)));
      $("door-wrong").textContent = session.wrong ?? "";
      $("door").hidden = false;
      field.focus();
    };
    let asking = false;
    const submit = async (event) => {
      event.preventDefault();
      const value = field.value.trim();
      if (!value || asking) return;
      asking = true;
      // Of the try before.
      $("door-wrong").textContent = "";
      try {
        if (session.keyed && !looksLikeKey(value)) throw new Error("This is no key: one has letters, digits and signs of ASCII only, such as tm-….");
        if (session.keyed) session.setKey(value);
        else session.setName(value);
        if (await meet(place)) {
          $("door").removeEventListener("submit", submit);
          $("door").hidden = true;
          field.value = "";
          resolve();
          return;
        }
      } catch (error) {
        session.wrong = error.message;
      } finally {
        asking = false;
      }
      show();
    };
    $("door").addEventListener("submit", submit);
    show();
  });
}

/**
 * Resolves when it is known who is there, and says so at the top. `place` and `words` as `signIn` takes them; `nameless`: on a server
 * without keys nobody needs a name.
 */
export async function enter({ place = LABELING, words, nameless = false } = {}) {
  $("leave").addEventListener("click", () => session.leave());
  $("help-open").addEventListener("click", () => $("help").showModal());
  while (true) {
    try {
      if (!(await meet(place)) && (session.keyed || !nameless)) await signIn(place, words);
      break;
    } catch (error) {
      notice(error.message);
      await new Promise((resolve) => setTimeout(resolve, AGAIN_MS));
    }
  }
  notice(null);
  $("who").textContent = session.annotator ?? "";
  $("who").hidden = !session.annotator;
  $("leave").hidden = !session.keyed && !session.annotator;
}

// What comes back out of the browser's memory is of another time, and may be of somebody who has signed out.
addEventListener("pageshow", (event) => {
  if (event.persisted) location.reload();
});
