// A model's text as it comes: whitespace kept, fenced code set apart, nothing interpreted.

import { make } from "./dom.js";

const FENCE = /^ {0,3}(`{3,}|~{3,})[ \t]*([\w+#.-]*)[^`]*$/;
const MAYBE_FENCE = /^ {0,3}(?:`{1,2}|~{1,2}|(?:`{3,}|~{3,}).*)?$/s;

/** Appends text to `element`. What has been shown is never built again, however long it gets. */
export class Prose {
  constructor(element) {
    this.element = element;
    this.fence = null; // The marks that opened the present code block.
    this.line = ""; // The beginning of a line, while it may yet be a fence.
    this.held = true; // At the beginning of a line.
    this.node = null; // Where text goes.
  }

  append(text) {
    for (const piece of text.split(/(?<=\n)/)) this.#add(piece);
  }

  /** Show what was held back. */
  end() {
    if (this.held && this.line && !this.#turn(this.line)) this.#write(this.line);
    this.line = "";
    this.held = true;
  }

  /** Part of a line, or its rest. */
  #add(piece) {
    if (!this.held) {
      this.#write(piece);
      this.held = piece.endsWith("\n");
      return;
    }
    this.line += piece;
    const ended = this.line.endsWith("\n");
    const line = ended ? this.line.slice(0, -1) : this.line;
    if (!ended && MAYBE_FENCE.test(line)) return;
    if (!ended || !this.#turn(line)) this.#write(this.line);
    this.line = "";
    this.held = ended;
  }

  /** Open or close a code block, if a line does. */
  #turn(line) {
    const [, marks, language] = FENCE.exec(line) ?? [];
    if (!marks) return false;
    if (this.fence === null) {
      this.fence = marks;
      const code = make("code");
      this.node = code.appendChild(document.createTextNode(""));
      this.element.append(make("pre", { tabindex: 0, "data-language": language || null }, code));
      return true;
    }
    if (!marks.startsWith(this.fence) || language) return false;
    this.fence = null;
    this.node = null;
    return true;
  }

  #write(text) {
    if (this.node === null) {
      this.node = document.createTextNode("");
      this.element.append(make("div", { class: "text" }, this.node));
    }
    this.node.appendData(text);
  }
}
