// The requests in flight, with a button that ends each, and the last ones that ended.

import { call } from "./api.js";
import { byId, make, say } from "./dom.js";
import { count, rate, seconds } from "./units.js";

/** How many of those that ended are shown. */
export const RECENT = 5;

/** Rows by id, brought up to date in place, so that focus and selections survive. */
class Rows {
  constructor(body, build) {
    this.body = body;
    this.build = build;
    this.rows = new Map();
  }

  show(requests) {
    const there = new Set(requests.map((request) => request.id));
    for (const [id, row] of this.rows) {
      if (!there.has(id)) this.#remove(id, row);
    }
    requests.forEach((request, index) => {
      let row = this.rows.get(request.id);
      if (row === undefined) {
        row = this.build(request);
        this.rows.set(request.id, row);
      }
      row.update(request);
      if (this.body.children[index] !== row.element) {
        this.body.insertBefore(row.element, this.body.children[index] ?? null);
      }
    });
  }

  /** Whoever stood on the row's button goes on from the next one. */
  #remove(id, { element }) {
    const held = element.contains(document.activeElement);
    const near = element.nextElementSibling ?? element.previousElementSibling;
    element.remove();
    this.rows.delete(id);
    if (held) (near?.querySelector("button") ?? byId("requests")).focus();
  }
}

export class Requests {
  /** @param {() => void} refresh asks for the state again. */
  constructor(refresh) {
    this.refresh = refresh;
    this.running = new Rows(byId("running"), (request) => this.#row(request));
    this.recent = new Rows(byId("recent"), () => row((request) => request.finish));
  }

  show(running, recent) {
    this.running.show(running);
    this.recent.show(recent);
    byId("idle").hidden = running.length > 0;
    byId("past").hidden = recent.length === 0;
  }

  #row({ id, api, client }) {
    const button = make("button", {
      type: "button",
      class: "quiet",
      "aria-label": `Cancel the ${api} request of ${client}, ${id}`,
      onclick: () => this.#cancel(id, button),
    }, "Cancel");
    return row((request) => request.state, button);
  }

  async #cancel(id, button) {
    if (button.ariaDisabled) return;
    button.ariaDisabled = "true"; // And not `disabled`, which would lose the focus.
    try {
      await call(`glmd/requests/${encodeURIComponent(id)}/cancel`, { method: "POST" });
      byId("cancel-error").hidden = true;
    } catch (error) {
      // 404: it has ended by itself meanwhile, which is what was wanted.
      if (error.status !== 404) {
        say(byId("cancel-error"), error.message);
        byId("cancel-error").hidden = false;
        button.ariaDisabled = null;
      }
    }
    this.refresh();
  }
}

function row(stateOf, ...last) {
  const cells = Array.from({ length: 5 }, () => make("td"));
  const element = make("tr", {}, ...cells, make("td", {}, ...last));
  const update = (request) => {
    const texts = [request.api, stateOf(request), prompt(request), written(request), seconds(request.seconds)];
    texts.forEach((text, index) => say(cells[index], text));
    element.title = [request.client, request.id, request.error].filter(Boolean).join("\n");
  };
  return { element, update };
}

/** The prompt's length, and how much of it was cached, or is read so far. */
function prompt({ state, prompt_tokens, computed_tokens, cached_tokens }) {
  const part = (tokens) => `${Math.floor((100 * tokens) / prompt_tokens)} %`;
  if (state === "prefill") return `${count(prompt_tokens)} (${part(computed_tokens)} read)`;
  return count(prompt_tokens) + (cached_tokens ? ` (${part(cached_tokens)})` : "");
}

function written({ generated_tokens, mean_gap, sequences }) {
  return count(generated_tokens) + (mean_gap ? ` (${rate(sequences / mean_gap)}/s)` : "");
}
