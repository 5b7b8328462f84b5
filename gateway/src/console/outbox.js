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

  add(queue, path, body) {
    this.write([...this.items(), { queue, path, body }]);
  }

  /** Takes this item out. Another tab may have sent it, too, and be further: what is in front now may not be sent yet. */
  drop(item) {
    const gone = JSON.stringify(item);
    this.write(this.items().filter((kept) => JSON.stringify(kept) !== gone));
  }

  /**
   * Sends what is waiting, in order. Resolves with the last answer about this queue, if any, or throws: a passing error keeps
   * everything, any other error means that the server has decided against this one, and it is dropped.
   */
  async flush(queue) {
    let last = null;
    while (true) {
      const [first] = this.items();
      if (!first) return last;
      try {
        const answer = await call("POST", first.path, first.body);
        if (first.queue === queue) last = answer;
      } catch (error) {
        const signIn = error.status === 401 || error.status === 403;
        if (!passing(error) && !signIn) this.drop(first);
        throw error;
      }
      this.drop(first);
    }
  }
}
