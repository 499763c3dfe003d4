// The chat: shows a conversation's branch, sends it to the server, and stores what has come of it.

import { ApiError, call, events } from "./api.js";
import { Answer } from "./answer.js";
import { Chats } from "./chats.js";
import { add, alternatives, choose, create, path, request } from "./conversation.js";
import { byId, make, say } from "./dom.js";
import { Files } from "./files.js";
import { fields, onOptions, options, optionsHold, restore } from "./options.js";
import { branches, edit, question, result, resultForm } from "./question.js";
import { save } from "./store.js";

/** Pixels from the end within which the reader is at the end. */
const NEAR = 48;

export class Chat {
  /** @param {Server} server whose state the chat looks at. */
  constructor(server) {
    this.server = server;
    this.form = byId("composer");
    this.input = byId("message");
    this.log = byId("log");
    this.empty = byId("empty");
    this.conversation = create();
    this.running = new Map(); // By conversation's id: { conversation, answer, stopper }.
    this.following = true;
    this.drawing = false;
    this.files = new Files();
    this.chats = new Chats(() => this.conversation, (conversation) => this.open(conversation));

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
    document.addEventListener("formulas", () => this.#follow());
    // What has come of an answer is kept if the page goes.
    document.addEventListener("visibilitychange", () => {
      if (document.hidden) for (const { conversation } of this.running.values()) this.#save(conversation);
    });
    byId("stop").addEventListener("click", () => this.stop());
    byId("new").addEventListener("click", () => this.open(null));
    onOptions(() => {
      this.conversation.options = options();
      if (this.conversation.messages.length) this.#save(this.conversation);
    });
    server.onStatus((text) => {
      for (const { answer } of this.running.values()) if (text) answer.wait(text);
    });
    this.#show();
  }

  /** Send what is in the field, with the files. */
  send() {
    const content = this.input.value;
    if (this.#now || !(content.trim() || this.files.files.length) || !optionsHold()) return;
    this.input.value = "";
    const files = this.files.give();
    this.#ask({ role: "user", content, ...(files.length && { files }) }, this.conversation.leaf);
  }

  /** End the answer that is coming; what has come of it stays. */
  stop() {
    this.#now?.stopper.abort();
  }

  /** Show a conversation; null: a new one with the same options. An answer that is coming goes on. */
  open(conversation) {
    const running = conversation && this.running.get(conversation.id);
    this.conversation = running?.conversation ?? conversation ?? create(options());
    restore(this.conversation.options);
    this.#show();
    this.chats.show();
    document.body.dataset.view = "chat";
    byId("views").dispatchEvent(new Event("shown"));
    this.input.focus();
  }

  get #now() {
    return this.running.get(this.conversation.id);
  }

  /** Build what is seen of the conversation. */
  #show() {
    const now = this.#now;
    const parts = path(this.conversation).map((message) => this.#part(message, now));
    this.log.replaceChildren(this.empty, ...parts);
    this.empty.hidden = parts.length > 0;
    byId("send").hidden = now !== undefined;
    byId("stop").hidden = now === undefined;
    this.following = true;
    this.#follow();
  }

  #part(message, now) {
    const all = now ? [] : alternatives(this.conversation, message);
    const others = branches(all, message, (other) => this.#choose(other));
    if (message.role === "tool") return result(message);
    if (message.role === "user") {
      const button = make("button", { type: "button", class: "quiet" }, "Edit");
      const element = question(message, ...(now ? [] : [button]), ...others);
      button.addEventListener("click", () =>
        edit(element, message, (content) => this.#again({ ...message, content }, message.parent)),
      );
      return element;
    }
    if (now?.answer.message === message) return now.answer.element;
    const answer = Answer.of(message);
    this.#offer(answer, message, others, now);
    return answer.element;
  }

  #offer(answer, message, others, now) {
    if (now) return answer.offer();
    const again = make("button", { type: "button", class: "quiet", onclick: () => this.#again(null, message.parent) }, "Try again");
    answer.offer(again, ...others);
    if (message.calls?.length && this.conversation.leaf === message.id) {
      answer.calls.append(resultForm(message.calls, (texts) => this.#return(message, texts)));
    }
  }

  async #choose(message) {
    choose(this.conversation, message);
    await this.#save(this.conversation);
    this.#show();
  }

  /** Ask again, in a branch of its own. */
  #again(message, parent) {
    if (this.#now || !optionsHold()) return;
    this.input.focus();
    this.#ask(message, parent);
  }

  /** Give the results of a message's calls back to the model. */
  #return(message, texts) {
    if (this.#now || !optionsHold()) return;
    let parent = message.id;
    message.calls.forEach(({ id }, index) => {
      parent = add(this.conversation, parent, { role: "tool", content: texts[index], call: id }).id;
    });
    this.#ask(null, parent);
  }

  /** Add a message behind `parent` (null: none), and have it answered. */
  async #ask(message, parent) {
    const { conversation } = this;
    conversation.options = options();
    if (message) parent = add(conversation, parent, message).id;
    const body = { messages: request(conversation, parent), stream: true, stream_options: { include_usage: true }, return_progress: true, ...fields() };
    const answer = new Answer(add(conversation, parent, { role: "assistant" }));
    const stopper = new AbortController();
    this.running.set(conversation.id, { conversation, answer, stopper });
    this.#show();
    this.#save(conversation).then(() => this.chats.show());

    const announce = (phase) => conversation === this.conversation && this.#announce(phase);
    announce("Waiting");
    try {
      await this.server.accepting(stopper.signal);
      await this.#stream(answer, body, stopper.signal, announce);
      answer.end();
      announce("The answer is complete.");
    } catch (error) {
      if (stopper.signal.aborted) {
        answer.end("stopped");
        announce("Stopped.");
      } else {
        answer.fail(error); // An alert, so it announces itself.
        announce("");
        if (!(error instanceof ApiError)) console.error(error);
      }
    }
    // Only what is stored is shown as complete: a page that is left just then loses nothing.
    await this.#save(conversation);
    this.running.delete(conversation.id);
    if (conversation !== this.conversation) return;
    // The answer's element stays, with what is selected in it; the others get their buttons back.
    const parts = path(conversation).map((each) => (each === answer.message ? answer.element : this.#part(each)));
    const others = branches(alternatives(conversation, answer.message), answer.message, (other) => this.#choose(other));
    this.#offer(answer, answer.message, others);
    const old = [...this.log.children].slice(1);
    parts.forEach((part, index) => old[index] === part || old[index].replaceWith(part));
    byId("send").hidden = false;
    byId("stop").hidden = true;
    this.#follow();
  }

  async #stream(answer, body, signal, announce) {
    const response = await call("v1/chat/completions", { method: "POST", body, signal });
    for await (const data of events(response)) {
      if (data === "[DONE]") return;
      announce(answer.take(JSON.parse(data)));
      this.#follow();
    }
    throw new ApiError("The stream ended before the answer was complete.");
  }

  async #save(conversation) {
    try {
      await save(structuredClone(conversation));
    } catch (error) {
      say(byId("kept"), `The chat could not be stored: ${error.message}`);
    }
  }

  #announce(phase) {
    if (byId("progress").textContent === phase) return;
    say(byId("progress"), phase);
    this.server.wake();
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
