// One answer of the model: what has come of it, and how it is shown.

import { ApiError } from "./api.js";
import { copy, make, say } from "./dom.js";
import { Markdown, codeBlock, showMarkdown } from "./markdown.js";
import { count, rate, seconds } from "./units.js";

const REASONS = { length: "cut off at the token limit" };

export class Answer {
  /** @param {object} message to be filled, or shown as it was stored. */
  constructor(message) {
    this.message = Object.assign(message, { content: message.content ?? "", reasoning: message.reasoning ?? "" });
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
    this.calls = make("div", { class: "calls" });
    this.note = make("p", { class: "note" }, "Waiting");
    this.actions = make("div", { class: "actions" });
    this.element = make(
      "article",
      { class: "answer", "aria-label": "Answer", "aria-busy": "true" },
      this.details,
      words,
      this.calls,
      make("footer", {}, this.note, this.actions),
    );
    this.thoughts = new Markdown(thoughts);
    this.words = new Markdown(words);
  }

  /** An answer that was stored. */
  static of(message) {
    const answer = new Answer(message);
    answer.details.hidden = !message.reasoning;
    answer.details.open = false;
    say(answer.summary, message.thought ?? "Thoughts");
    showMarkdown(answer.thoughts.element, message.reasoning);
    showMarkdown(answer.words.element, message.content);
    answer.#showCalls();
    say(answer.note, message.note ?? "");
    return answer;
  }

  /** Why nothing comes yet. */
  wait(text) {
    if (this.first === null) say(this.note, text);
  }

  /**
   * Take in one chunk of the stream; returns what phase the answer is in.
   *
   * @throws {ApiError} the chunk is an error.
   */
  take(chunk) {
    if (chunk.error) throw new ApiError(chunk.error.message);
    if (chunk.usage) this.usage = chunk.usage;
    if (chunk.prompt_progress) {
      const { processed, total } = chunk.prompt_progress;
      this.wait(`Processing the prompt: ${count(processed)} of ${count(total)} tokens`);
    }
    for (const { delta, finish_reason } of chunk.choices ?? []) {
      if (delta.reasoning_content) this.#think(delta.reasoning_content);
      if (delta.content) this.#speak(delta.content);
      for (const call of delta.tool_calls ?? []) this.#call(call);
      this.reason = finish_reason ?? this.reason;
    }
    return this.answered !== null ? "Answering" : this.first !== null ? "Thinking" : "Waiting";
  }

  #think(text) {
    this.#mark();
    this.message.reasoning += text;
    this.details.hidden = false;
    this.thoughts.append(text);
  }

  #speak(text) {
    this.#mark();
    this.#conclude();
    this.message.content += text;
    this.words.append(text);
  }

  /** The beginning of a tool call, or more of its arguments. */
  #call({ index, id, function: part }) {
    this.#mark();
    this.#conclude();
    this.message.calls ??= [];
    const call = (this.message.calls[index] ??= { id, type: "function", function: { name: "", arguments: "" } });
    call.function.name += part.name ?? "";
    call.function.arguments += part.arguments ?? "";
    this.#showCalls();
  }

  #showCalls() {
    const shown = (this.message.calls ?? []).map(({ function: { name, arguments: text } }) =>
      make(
        "details",
        { class: "call", open: true },
        make("summary", {}, "Called ", make("code", {}, name)),
        codeBlock(pretty(text), "json"),
      ),
    );
    this.calls.replaceChildren(...shown);
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
    if (this.answered !== null) return;
    this.answered = performance.now();
    this.thoughts.end();
    if (this.message.reasoning) {
      this.details.open = false;
      this.message.thought = `Thought for ${seconds((this.answered - this.first) / 1000)}`;
      say(this.summary, this.message.thought);
    }
  }

  /** Nothing more comes; `outcome` says why, where it is not the answer's own end. */
  end(outcome = "") {
    this.thoughts.end();
    this.words.end();
    if (this.answered === null && this.message.reasoning) {
      this.message.thought = "Thought without an answer";
      say(this.summary, this.message.thought);
    }
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
    this.message.note = said.filter(Boolean).join(" · ");
    say(this.note, this.message.note);
  }

  /** The same, because of an error. */
  fail(error) {
    this.end();
    const shown = make("p", { class: "error", role: "alert" }, error.message);
    this.element.insertBefore(shown, this.element.lastElementChild);
  }

  /** The answer is complete and stored: what can be done with it. */
  offer(...actions) {
    this.element.setAttribute("aria-busy", "false");
    const text = this.message.content;
    const button = make("button", { type: "button", class: "quiet", onclick: () => copy(button, text) }, "Copy");
    this.actions.replaceChildren(...(text ? [button] : []), ...actions);
  }
}

function pretty(text) {
  try {
    return JSON.stringify(JSON.parse(text), null, 2);
  } catch {
    return text; // Not complete yet.
  }
}
