// A model's text as it comes: whitespace kept, fenced code set apart, nothing interpreted.

import { make } from "./dom.js";

const FENCE = /^ {0,3}(`{3,}|~{3,})[ \t]*([\w+#.-]*)[^`]*$/;
const MAYBE_FENCE = /^ {0,3}(?:`{1,2}|~{1,2}|(?:`{3,}|~{3,}).*)?$/s;

/**
 * Characters after which the next line begins a block of its own: a browser lays out the whole block
 * for each token that is added to it.
 */
const BLOCK = 500;

/** Appends text to `element`. What has been shown is never built again, however long it gets. */
export class Prose {
  constructor(element) {
    this.element = element;
    this.fence = null; // The marks that opened the present code block.
    this.line = ""; // The beginning of a line, while it may yet be a fence.
    this.held = true; // At the beginning of a line.
    this.code = null; // The present code block.
    this.node = null; // Where text goes; null: into a new block.
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
      this.node = null;
      this.code = make("code");
      this.element.append(make("pre", { tabindex: 0, "data-language": language || null }, this.code));
      return true;
    }
    if (!marks.startsWith(this.fence) || language) return false;
    this.fence = this.code = this.node = null;
    return true;
  }

  /** Add a line or a part of one. */
  #write(text) {
    if (this.node?.length > BLOCK && text.endsWith("\n")) {
      const line = text.slice(0, -1);
      const empty = !line && this.node.data.endsWith("\n"); // It would vanish at a block's end.
      if (!empty) {
        this.node.appendData(line); // The end of the block is the end of the line.
        this.node = null;
        return;
      }
    }
    if (this.node === null) {
      this.node = document.createTextNode("");
      (this.code ?? this.element).append(make("div", { class: "text" }, this.node));
    }
    this.node.appendData(text);
  }
}
