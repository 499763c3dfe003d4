// The chat: a conversation that lives in this page only, and goes to the server whole each time.

import { ApiError, call, events } from "./api.js";
import { Answer } from "./answer.js";
import { byId, make, say } from "./dom.js";
import { options, optionsHold } from "./options.js";

/** Pixels from the end within which the reader is at the end. */
const NEAR = 48;

export class Chat {
  /** @param {() => void} turned is called whenever an answer enters another phase. */
  constructor(turned) {
    this.turned = turned;
    this.form = byId("composer");
    this.input = byId("message");
    this.log = byId("log");
    this.empty = byId("empty");
    this.exchanges = []; // Of { question, answer, element }.
    this.running = null; // The AbortController of the answer that is coming.
    this.following = true;
    this.drawing = false;

    this.form.addEventListener("submit", (event) => {
      event.preventDefault();
      this.send();
    });
    this.input.addEventListener("keydown", (event) => {
      if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
      event.preventDefault();
      this.send();
    });
    this.log.addEventListener("scroll", () => {
      const { scrollHeight, scrollTop, clientHeight } = this.log;
      this.following = scrollHeight - scrollTop - clientHeight < NEAR;
    });
    document.addEventListener("keydown", (event) => {
      if (event.key === "Escape" && !document.querySelector("dialog[open]")) this.stop();
    });
    byId("stop").addEventListener("click", () => this.stop());
    byId("new").addEventListener("click", () => this.clear());
    this.#change(null);
  }

  /** Send what is in the field. */
  send() {
    const question = this.input.value;
    if (this.running || !question.trim() || !optionsHold()) return;
    this.input.value = "";
    this.#ask(question);
  }

  /** End the answer that is coming; what has come of it stays. */
  stop() {
    this.running?.abort();
  }

  /** Begin a new conversation. */
  clear() {
    this.stop();
    for (const { element } of this.exchanges) element.remove();
    this.exchanges = [];
    this.empty.hidden = false;
    this.input.focus();
  }

  /** Drop the last answer and ask for another one. */
  #again() {
    if (this.running || !optionsHold()) return;
    const { question, element } = this.exchanges.pop();
    element.remove();
    this.input.focus();
    this.#ask(question);
  }

  async #ask(question) {
    for (const { answer } of this.exchanges) answer.actions.replaceChildren();
    const answer = new Answer();
    const asked = make("div", { class: "question", role: "article", "aria-label": "Question" });
    asked.textContent = question;
    const element = make("div", { class: "exchange" }, asked, answer.element);
    this.exchanges.push({ question, answer, element });
    const body = this.#body();
    this.empty.hidden = true;
    this.log.append(element);
    this.following = true;
    this.#follow();

    const running = new AbortController();
    this.#change(running);
    this.#announce("Waiting");
    try {
      await this.#stream(answer, body, running.signal);
      answer.end();
      this.#announce("The answer is complete.");
    } catch (error) {
      if (running.signal.aborted) {
        answer.end("stopped");
        this.#announce("Stopped.");
      } else {
        answer.fail(error); // An alert, so it announces itself.
        this.#announce("");
        if (!(error instanceof ApiError)) console.error(error);
      }
    }
    if (this.running === running) this.#change(null);
    answer.actions.append(make("button", { type: "button", class: "quiet", onclick: () => this.#again() }, "Try again"));
    this.#follow();
  }

  async #stream(answer, body, signal) {
    const response = await call("v1/chat/completions", { method: "POST", body, signal });
    for await (const data of events(response)) {
      if (data === "[DONE]") return;
      this.#announce(answer.take(JSON.parse(data)));
      this.#follow();
    }
    throw new ApiError("The stream ended before the answer was complete.");
  }

  #body() {
    const messages = [];
    const system = this.form.elements.system.value;
    if (system.trim()) messages.push({ role: "system", content: system });
    for (const { question, answer } of this.exchanges) {
      messages.push({ role: "user", content: question });
      if (answer.message) messages.push(answer.message);
    }
    return {
      messages,
      stream: true,
      stream_options: { include_usage: true },
      return_progress: true,
      ...options(),
    };
  }

  #change(running) {
    this.running = running;
    byId("send").hidden = running !== null;
    byId("stop").hidden = running === null;
  }

  #announce(phase) {
    if (byId("progress").textContent === phase) return;
    say(byId("progress"), phase);
    this.turned();
  }

  /** Keep the end in view, once per frame, unless the reader has scrolled away from it. */
  #follow() {
    if (this.drawing) return;
    this.drawing = true;
    requestAnimationFrame(() => {
      this.drawing = false;
      if (this.following) this.log.scrollTop = this.log.scrollHeight;
    });
  }
}
