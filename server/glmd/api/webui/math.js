// Formulas in Markdown: $…$, \(…\), $$…$$ and \[…\] are tokens, and KaTeX makes MathML of them. The
// browser draws that with the system's mathematical font, so no fonts are bundled.

import { make } from "./dom.js";

const DISPLAY = { "$$": "$$", "\\[": "\\]" };
const MARKS = Object.entries({ ...DISPLAY, "\\(": "\\)", $: "$" });

/** KaTeX, once the first formula has asked for it. */
let katex = null;
let loading = null;

/** Have a markdown-it parser know formulas. */
export function addMath(parser) {
  parser.inline.ruler.before("escape", "math", inline);
  const alt = ["paragraph", "reference", "blockquote", "list"];
  parser.block.ruler.before("fence", "math", block, { alt });
  return parser;
}

function inline(state, silent) {
  const { src, pos, posMax } = state;
  for (const [open, close] of MARKS) {
    if (!src.startsWith(open, pos)) continue;
    const start = pos + open.length;
    const end = open === "$" ? closingDollar(state, start) : closing(state, close, start);
    if (end < 0 || end + close.length > posMax || !src.slice(start, end).trim()) continue;
    if (!silent) push(state, src.slice(start, end), open in DISPLAY);
    state.pos = end + close.length;
    return true;
  }
  return false;
}

/** Where a mark is next. A mark that has not been found is not looked for again, which keeps it linear. */
function closing(state, mark, start) {
  state.missing ??= new Set();
  if (state.missing.has(mark)) return -1;
  const end = state.src.indexOf(mark, start);
  if (end < 0) state.missing.add(mark);
  return end;
}

/** Amounts of money are no formulas: no blank within the dollars, and no digit behind them. */
function closingDollar(state, start) {
  const { src } = state;
  if (/\s/.test(src[start] ?? " ")) return -1;
  const end = closing(state, "$", start);
  return end < 0 || /[\s\\]/.test(src[end - 1]) || /\d/.test(src[end + 1] ?? "") ? -1 : end;
}

function block(state, first, last, silent) {
  const begin = (line) => state.bMarks[line] + state.tShift[line];
  const open = Object.keys(DISPLAY).find((mark) => state.src.startsWith(mark, begin(first)));
  if (open === undefined || state.sCount[first] - state.blkIndent >= 4) return false;
  const lines = [];
  for (let line = first; line < last; line += 1) {
    const start = begin(line) + (line === first ? open.length : 0);
    const text = state.src.slice(start, state.eMarks[line]);
    const end = text.indexOf(DISPLAY[open]);
    if (end < 0) {
      lines.push(text);
      continue;
    }
    if (text.slice(end + open.length).trim()) return false;
    if (silent) return true;
    state.line = line + 1;
    push(state, [...lines, text.slice(0, end)].join("\n"), true).map = [first, state.line];
    return true;
  }
  state.env.unclosed ??= first;
  return false;
}

function push(state, tex, display) {
  const token = state.push("math", "math", 0);
  token.content = tex.trim();
  token.meta = { display };
  return token;
}

/** The element of a formula: its source, until KaTeX is there. */
export function formula(tex, display) {
  const element = make("span", { class: display ? "math display" : "math" });
  if (katex) render(element, tex, display);
  else {
    element.dataset.tex = tex;
    element.textContent = tex;
    loading ??= import("./katex.min.js").then(() => {
      katex = self.katex;
      for (const each of document.querySelectorAll("[data-tex]")) {
        render(each, each.dataset.tex, each.classList.contains("display"));
        delete each.dataset.tex;
      }
      document.dispatchEvent(new Event("formulas")); // They are higher than their source.
    });
  }
  return element;
}

function render(element, tex, displayMode) {
  try {
    katex.render(tex, element, { output: "mathml", displayMode, strict: "ignore", maxExpand: 500 });
  } catch (error) {
    if (!(error instanceof katex.ParseError)) throw error;
    element.replaceChildren(make("code", { title: error.message }, tex));
  }
}
