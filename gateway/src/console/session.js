// Who is at the desk, and how the page speaks to the server.

const KEY = "tidemill-key";
const NAME = "tidemill-name";

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
  /** May see statistics. */
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

const LABELING = "/v1/labeling/me";

/** Asks the server who this is: true when signed in. `place` answers those who may see the page. */
export async function meet(place = LABELING) {
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

/** Shows the form and resolves when someone has signed in; `words` stand above it where a key is asked for. */
export function signIn({ door, title, text, label, field, wrong }, { me = LABELING, words = null } = {}) {
  return new Promise((resolve) => {
    const show = () => {
      title.textContent = session.keyed ? "Sign in" : "Who is labeling?";
      const keyed = words?.text ?? "Your key opens the queues that you work on. It is kept until this tab is closed.";
      text.textContent = session.keyed ? keyed : "This server has no keys. Your name stands beside your verdicts.";
      label.textContent = session.keyed ? "Key" : "Name";
      field.type = session.keyed ? "password" : "text";
      field.placeholder = session.keyed ? "tm-…" : "";
      wrong.textContent = session.wrong ?? "";
      door.hidden = false;
      field.focus();
    };
    const submit = async (event) => {
      event.preventDefault();
      const value = field.value.trim();
      if (!value) return;
      if (session.keyed) session.setKey(value);
      else session.setName(value);
      try {
        if (await meet(me)) {
          door.removeEventListener("submit", submit);
          door.hidden = true;
          field.value = "";
          resolve();
          return;
        }
      } catch (error) {
        session.wrong = error.message;
      }
      show();
    };
    door.addEventListener("submit", submit);
    show();
  });
}

/** The form's parts, by id. */
export function doorParts() {
  const part = (id) => document.getElementById(id);
  return { door: part("door"), title: part("door-title"), text: part("door-text"), label: part("door-label"), field: part("door-field"), wrong: part("door-wrong") };
}
