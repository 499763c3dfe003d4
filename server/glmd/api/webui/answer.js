// One answer of the model: what has come of it, and how it is shown.

import { ApiError } from "./api.js";
import { make, say } from "./dom.js";
import { Prose } from "./prose.js";
import { count, rate, seconds } from "./units.js";

const REASONS = { length: "cut off at the token limit", stop: "" };

export class Answer {
  constructor() {
    this.reasoning = "";
    this.content = "";
    this.began = performance.now();
    this.first = null; // When the first token came,
    this.answered = null; // and the first one that is no reasoning,
    this.last = null; // and the last one. Milliseconds, as `began`.
    this.usage = null;
    this.reason = null;

    this.summary = make("summary", {}, "Thinking");
    const thoughts = make("div", { class: "prose" });
    this.details = make("details", { class: "reasoning", open: true, hidden: true }, this.summary, thoughts);
    const words = make("div", { class: "prose content" });
    this.note = make("p", { class: "note" }, "Waiting");
    this.actions = make("div", { class: "actions" });
    this.element = make(
      "article",
      { class: "answer", "aria-label": "Answer", "aria-busy": "true" },
      this.details,
      words,
      make("footer", {}, this.note, this.actions),
    );
    this.thoughts = new Prose(thoughts);
    this.words = new Prose(words);
  }

  /** What the conversation goes on with, if anything was said. */
  get message() {
    if (!this.reasoning && !this.content) return null;
    const message = { role: "assistant", content: this.content };
    if (this.reasoning) message.reasoning_content = this.reasoning;
    return message;
  }

  /**
   * Take in one chunk of the stream; returns what phase the answer is in.
   *
   * @throws {ApiError} the chunk is an error.
   */
  take(chunk) {
    if (chunk.error) throw new ApiError(chunk.error.message);
    if (chunk.usage) this.usage = chunk.usage;
    if (chunk.prompt_progress && this.first === null) {
      const { processed, total } = chunk.prompt_progress;
      say(this.note, `Processing the prompt: ${count(processed)} of ${count(total)} tokens`);
    }
    for (const { delta, finish_reason } of chunk.choices ?? []) {
      if (delta.reasoning_content) this.#think(delta.reasoning_content);
      if (delta.content) this.#speak(delta.content);
      this.reason = finish_reason ?? this.reason;
    }
    return this.answered !== null ? "Answering" : this.first !== null ? "Thinking" : "Waiting";
  }

  #think(text) {
    this.#mark();
    this.reasoning += text;
    this.details.hidden = false;
    this.thoughts.append(text);
  }

  #speak(text) {
    this.#mark();
    if (this.answered === null) this.#conclude();
    this.content += text;
    this.words.append(text);
  }

  #mark() {
    this.last = performance.now();
    if (this.first === null) {
      this.first = this.last;
      say(this.note, "");
    }
  }

  /** The reasoning is over: fold it away. */
  #conclude() {
    this.answered = performance.now();
    this.thoughts.end();
    if (this.reasoning) {
      this.details.open = false;
      say(this.summary, `Thought for ${seconds((this.answered - this.first) / 1000)}`);
    }
  }

  /** Nothing more comes; `outcome` says why, where it is not the answer's own end. */
  end(outcome = "") {
    this.thoughts.end();
    this.words.end();
    this.element.setAttribute("aria-busy", "false");
    if (this.answered === null && this.reasoning) say(this.summary, "Thought without an answer");
    const said = [outcome || REASONS[this.reason]];
    if (this.usage) {
      const { prompt_tokens: prompt, completion_tokens: made } = this.usage;
      const cached = this.usage.prompt_tokens_details?.cached_tokens ?? 0;
      said.push(`${count(prompt)} tokens read, ${count(cached)} of them cached`);
      said.push(`${count(made)} written`);
      const time = (this.last - this.first) / 1000;
      if (made > 1 && time > 0) said.push(`${rate((made - 1) / time)} tokens/s`);
    }
    if (this.first !== null) said.push(`first after ${seconds((this.first - this.began) / 1000)}`);
    say(this.note, said.filter(Boolean).join(" · "));
  }

  /** The same, because of an error. */
  fail(error) {
    this.end();
    this.element.insertBefore(
      make("p", { class: "error", role: "alert" }, error.message),
      this.element.lastElementChild,
    );
  }
}
