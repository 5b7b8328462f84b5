// Verdicts that are not known to be stored yet. They are written down before they are sent, survive a reload and a closed tab, and
// are sent until the server has answered; the server takes the same one twice without counting it twice.

import { call, passing } from "./session.js";

const place = (annotator) => `tidemill-outbox:${annotator}`;

export class Outbox {
  constructor(annotator) {
    this.place = place(annotator);
  }

  items() {
    try {
      return JSON.parse(localStorage.getItem(this.place)) ?? [];
    } catch {
      return [];
    }
  }

  write(items) {
    if (items.length) localStorage.setItem(this.place, JSON.stringify(items));
    else localStorage.removeItem(this.place);
  }

  add(path, body) {
    this.write([...this.items(), { path, body }]);
  }

  /**
   * Sends what is waiting, in order. Resolves with the last answer, or throws: a passing error keeps everything, any other error
   * means that the server has decided against this one, and it is dropped.
   */
  async flush() {
    let answer = null;
    while (true) {
      const [first] = this.items();
      if (!first) return answer;
      try {
        answer = await call("POST", first.path, first.body);
      } catch (error) {
        const signIn = error.status === 401 || error.status === 403;
        if (!passing(error) && !signIn) this.write(this.items().slice(1));
        throw error;
      }
      this.write(this.items().slice(1));
    }
  }
}
