// Markdown as it comes. markdown-it makes tokens, tokens become elements, and text stays text: there is
// no markup in between, so there is nothing to sanitise.

import MarkdownIt from "./markdown-it.min.js";
import { copy, make } from "./dom.js";
import { addMath, formula } from "./math.js";

const parser = addMath(new MarkdownIt({ linkify: true }));
parser.linkify.set({ fuzzyLink: false, fuzzyEmail: false });

/** Characters of code in one element: a browser lays out the whole element for each change in it. */
const CHUNK = 500;

/** Below the page's own headings. */
const HEADINGS = { h1: "h3", h2: "h4", h3: "h5", h4: "h6", h5: "h6", h6: "h6" };

const WEB = /^(https?:|mailto:)/i;

/** Shows Markdown in `element` while it is written. Finished blocks are never built again. */
export class Markdown {
  constructor(element) {
    this.element = element;
    this.rest = ""; // From the last block on, which may go on.
    this.settled = 0; // Number of blocks before it.
    this.known = {}; // The addresses of links that these blocks define.
    this.drawing = false;
  }

  append(text) {
    this.rest += text;
    if (this.drawing) return;
    this.drawing = true;
    requestAnimationFrame(() => this.end());
  }

  /** Show what there is, now. */
  end() {
    this.drawing = false;
    this.rest = this.rest.replace(/\r\n?/g, "\n");
    // The last definition may be incomplete, so what it says is not kept yet.
    const env = { references: { ...this.known } };
    const tokens = parser.parse(this.rest, env);
    const next = make("div");
    build(tokens, next);
    patch(this.element, next, this.settled);
    const starts = tokens.filter((token) => token.level === 0 && token.nesting >= 0).map((token) => token.map[0]);
    let last = starts.length - 1; // What may go on, as a formula may that has no end yet.
    while (last > 0 && starts[last] > env.unclosed) last -= 1;
    if (last < 1) return;
    this.settled += last;
    const lines = this.rest.split("\n");
    const done = lines.splice(0, starts[last]).join("\n");
    this.rest = lines.join("\n");
    if (done.includes("]:")) parser.parse(done, { references: this.known });
  }
}

/** Show a whole text. */
export function showMarkdown(element, text) {
  const markdown = new Markdown(element);
  markdown.rest = text;
  markdown.end();
  return element;
}

function build(tokens, root) {
  const open = [root];
  for (const token of tokens) {
    const parent = open.at(-1);
    if (token.type === "inline") build(token.children, parent);
    else if (token.hidden) continue; // A paragraph of a tight list.
    else if (token.nesting < 0) open.pop();
    else if (token.nesting === 0) parent.append(leaf(token));
    else open.push(container(token, parent));
  }
}

/** Append the element that a token opens; returns where its children go. */
function container(token, parent) {
  const element = make(HEADINGS[token.tag] ?? token.tag);
  if (token.type === "table_open") {
    const frame = { class: "scroll", role: "group", "aria-label": "Table", tabindex: 0 };
    parent.append(make("div", frame, element));
    return element;
  }
  if (token.type === "link_open") return parent.appendChild(link(token.attrGet("href")));
  if (token.type === "ordered_list_open" && token.attrGet("start")) {
    element.start = token.attrGet("start");
  }
  const align = /text-align:(\w+)/.exec(token.attrGet("style") ?? "");
  if (align) element.className = align[1];
  parent.append(element);
  return element;
}

/** A link to the web. Others, such as into this server, are only text. */
function link(href) {
  if (!WEB.test(href)) return make("span", { title: href });
  return make("a", { href, target: "_blank", rel: "noopener noreferrer" });
}

function leaf(token) {
  switch (token.type) {
    case "text":
      return document.createTextNode(token.content);
    case "softbreak":
      return document.createTextNode("\n");
    case "hardbreak":
      return make("br");
    case "hr":
      return make("hr");
    case "code_inline":
      return make("code", {}, token.content);
    case "math":
      return formula(token.content, token.meta.display);
    case "image": // It is not loaded: the page asks no other server for anything.
      return imageLink(token);
    default:
      return codeBlock(token.content, token.info.trim().split(/\s+/)[0]);
  }
}

function imageLink(token) {
  const element = link(token.attrGet("src"));
  element.textContent = token.content || "image";
  return element;
}

/** Code, with its language and a button that copies it. */
export function codeBlock(text, language = "") {
  const code = make("code");
  const lines = text.match(/.*\n|.+$/g) ?? [];
  for (let start = 0, size = 0, end = 0; end < lines.length; ) {
    size += lines[end].length;
    end += 1;
    if (size < CHUNK && end < lines.length) continue;
    code.append(make("span", { class: "lines" }, lines.slice(start, end).join("")));
    start = end;
    size = 0;
  }
  const label = `Code${language && `, ${language}`}`;
  return make(
    "div",
    { class: "code" },
    make(
      "div",
      { class: "code-head" },
      make("span", {}, language || "text"),
      make("button", { type: "button", class: "quiet copy", "aria-label": `Copy the ${label.toLowerCase()}` }, "Copy"),
    ),
    make("pre", { tabindex: 0, role: "group", "aria-label": label }, code),
  );
}

// One listener for all: blocks are patched, and listeners of what is dropped would be lost.
document.addEventListener("click", (event) => {
  const button = event.target.closest?.("button.copy");
  if (button) copy(button, button.closest(".code").querySelector("code").textContent);
});

/** Make the children of `old`, from one on, equal to those of `next`; equal nodes stay as they are. */
function patch(old, next, from = 0) {
  const there = [...old.childNodes].slice(from);
  const wanted = [...next.childNodes];
  wanted.forEach((node, index) => {
    const present = there[index];
    if (present === undefined) old.append(node);
    else if (present.nodeType === Node.TEXT_NODE && node.nodeType === Node.TEXT_NODE) write(present, node.data);
    else if (present.nodeName === node.nodeName && present.cloneNode().isEqualNode(node.cloneNode())) patch(present, node);
    else present.replaceWith(node);
  });
  for (const node of there.slice(wanted.length)) node.remove();
}

function write(node, text) {
  if (text.startsWith(node.data)) node.appendData(text.slice(node.data.length));
  else node.data = text;
}
