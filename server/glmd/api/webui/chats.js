// The list of conversations: opened, deleted, exported and imported.

import { exported, imported } from "./conversation.js";
import { byId, download, make, say } from "./dom.js";
import * as store from "./store.js";

const PLAIN = /[^\p{L}\p{N}]+/gu;

export class Chats {
  /**
   * @param {() => object} current gives the conversation that is shown.
   * @param {(conversation: object | null) => void} open shows one; null: a new one.
   */
  constructor(current, open) {
    this.current = current;
    this.open = open;
    this.deleted = null;
    const input = byId("import-file");
    byId("import").addEventListener("click", () => input.click());
    input.addEventListener("change", async () => {
      for (const file of input.files) await this.#import(file);
      input.value = "";
    });
    byId("export").addEventListener("click", () => {
      const conversation = this.current();
      const name = conversation.title.replace(PLAIN, "-").replace(/^-|-$/g, "") || "chat";
      download(`${name}.json`, exported(conversation), "application/json");
    });
    byId("undo").addEventListener("click", async () => {
      await store.save(this.deleted);
      this.#tell("");
      this.open(this.deleted);
    });
    document.addEventListener("visibilitychange", () => document.hidden || this.show()); // Of other tabs.
    store.keeps().then((kept) => kept || say(byId("kept"), "This browser stores nothing: chats end with the page."));
    this.show();
  }

  /** Bring the list up to date. */
  async show() {
    const heads = await store.list();
    const id = this.current().id;
    const items = heads.map((head) =>
      make("li", {},
        make("button", {
          type: "button",
          class: "quiet title",
          "aria-current": head.id === id && "true",
          onclick: async () => this.open(await store.load(head.id)),
        }, head.title),
        make("button", {
          type: "button",
          class: "quiet",
          "aria-label": `Delete ${head.title}`,
          onclick: () => this.#delete(head.id),
        }, "×")),
    );
    const held = byId("chat-list").contains(document.activeElement);
    byId("chat-list").replaceChildren(...items);
    if (held) (byId("chat-list").querySelector("[aria-current]") ?? byId("message")).focus();
    byId("export").disabled = !this.current().messages.length;
  }

  async #delete(id) {
    this.deleted = await store.load(id);
    await store.remove(id);
    if (id === this.current().id) this.open(null);
    else this.show();
    this.#tell(`Deleted “${this.deleted.title}”.`, true);
    byId("undo").focus();
  }

  async #import(file) {
    try {
      const conversation = imported(await file.text());
      await store.save(conversation);
      this.#tell("");
      this.open(conversation);
    } catch (error) {
      this.#tell(`${file.name}: ${error.message}`);
    }
  }

  #tell(text, undo = false) {
    say(byId("chats-note"), text);
    byId("undo").hidden = !undo;
  }
}
