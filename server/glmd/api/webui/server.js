// What the server is doing: asked for every second while the page is looked at.

import { call, keyGiven } from "./api.js";
import { byId, make, say } from "./dom.js";
import { offer } from "./options.js";
import { Plot } from "./plot.js";
import { RECENT, Requests } from "./requests.js";
import { bytes, count, rate, seconds } from "./units.js";

const PAUSE = 1000;

export class Server {
  constructor() {
    this.requests = new Requests(() => this.wake());
    this.speed = new Plot(byId("speed"), "Tokens per second", rate);
    this.ttft = new Plot(byId("ttft"), "Time to first token", seconds, { dots: true });
    this.wake = () => {};
    this.status = null; // The latest one; null: none yet, or the server cannot be asked.
    this.listeners = new Set();
    this.waiting = 0; // Messages that wait for the model.
    document.addEventListener("visibilitychange", () => this.wake());
    byId("key-button").addEventListener("click", () => this.wake());
  }

  async watch() {
    for (;;) {
      let pause = PAUSE;
      if (document.hidden && !this.waiting) pause = null;
      else {
        try {
          const response = await call(`glmd/status?recent=${RECENT}`);
          this.status = await response.json();
          this.#show(this.status);
          this.#tell(loadingText(this.status.engine));
        } catch (error) {
          this.status = null;
          this.#fail(error);
          this.#tell("");
          if (error.status === 401) pause = null; // Nobody is asked again and again.
        }
      }
      await this.#rest(pause);
    }
  }

  /** Call `listen(text)` with each status; the text says that the model is loading, or is empty. */
  onStatus(listen) {
    this.listeners.add(listen);
  }

  #tell(text) {
    for (const listen of this.listeners) listen(text);
  }

  /**
   * Resolves when the server takes requests, or cannot be asked: a request then says what is wrong.
   *
   * An engine that was ready before takes requests while it loads.
   */
  async accepting(signal) {
    const blocked = () => {
      const { engine, model } = this.status ?? {};
      return engine?.state === "restarting" || (engine?.state === "loading" && model.context_length === null);
    };
    this.waiting += 1;
    try {
      while (blocked()) {
        await new Promise((resolve, reject) => {
          const listen = () => {
            this.listeners.delete(listen);
            resolve();
          };
          this.onStatus(listen);
          signal.addEventListener("abort", () => reject(signal.reason), { once: true });
        });
      }
    } finally {
      this.waiting -= 1;
    }
  }

  /** Wait some milliseconds (null: for ever), or until something wakes us. */
  #rest(pause) {
    return new Promise((resolve) => {
      this.wake = resolve;
      if (pause === null) keyGiven().then(resolve);
      else setTimeout(resolve, pause);
    });
  }

  #fail(error) {
    byId("server").classList.add("stale");
    byId("loading").hidden = true;
    byId("key-button").hidden = error.status !== 401;
    state(error.status === 401 ? "locked" : "unreachable", error.message);
  }

  #show(status) {
    const { version, time, uptime, model, engine, speed, running, recent } = status;
    const { stats } = engine;
    offer(status);
    byId("server").classList.remove("stale");
    byId("key-button").hidden = true;
    say(byId("model"), model.id);
    document.title = `${model.display_name} · glmd`;
    state(engine.state, engine.failure ?? "");
    progress(engine);

    say(byId("failure"), engine.state === "ready" ? "" : (engine.failure ?? ""));
    this.requests.show(running, recent);
    if (speed !== null) this.#totals(time, model, stats, speed);
    list("engine", {
      Context: model.context_length === null ? "–" : `${count(model.context_length)} tokens`,
      Weights: model.bits_per_weight === null ? "–" : `${model.bits_per_weight.toFixed(3)} bits`,
      Uptime: seconds(uptime),
      Restarts: count(engine.restarts),
      Preemptions: speed === null ? "–" : count(stats.preemptions),
      glmd: version,
    });
  }

  /** Counts of all keys' requests, which the server shows to admins. */
  #totals(time, model, stats, speed) {
    list("facts", {
      Running: count(stats.running),
      Waiting: count(stats.waiting),
      "Prompt tokens/s": rate(speed.computed_per_second),
      "Prompt cached": share(stats.prompt_tokens_cached, stats.prompt_tokens_cached + stats.prompt_tokens_computed),
      "Drafts accepted": model.has_mtp === false ? "no MTP layer" : share(stats.accepted, stats.drafted),
      "Step": seconds(stats.step_seconds),
    });

    const span = speed.generated.length;
    const course = speed.generated.map((tokens, index) => [time - speed.until + span - index - 1, tokens]);
    this.speed.show(course, span, speed.generated_per_second);
    const waits = speed.first_tokens.map((first) => [time - first.time, first.ttft]);
    this.ttft.show(waits, span, waits.at(-1)?.[1] ?? null);

    memory(stats);
    list("tree", {
      "Tokens cached": count(stats.kv_tokens),
      "In use": count(stats.kv_tokens - stats.kv_idle_tokens),
      Segments: count(stats.kv_segments),
      Branches: count(stats.kv_branches),
      "Longest prefix": count(stats.kv_longest),
      Evicted: count(stats.evicted_tokens),
      ...disk(stats),
    });
  }
}

function state(name, title) {
  say(byId("state"), name);
  byId("state").dataset.state = name;
  byId("state").title = title;
}

/** What keeps the first token of a message away; empty: nothing. */
function loadingText({ state: name, loading }) {
  if (name === "restarting") return "The engine restarts";
  if (name !== "loading") return "";
  if (!loading?.total_bytes) return "Loading the model";
  return `Loading the model: ${bytes(loading.done_bytes)} of ${bytes(loading.total_bytes)}`;
}

/** How far the model is loaded, above the conversation. */
function progress(engine) {
  const text = loadingText(engine);
  const { done_bytes: done, total_bytes: total } = engine.loading ?? {};
  const bar = byId("loading-bar");
  byId("loading").hidden = !text && engine.state !== "unloaded";
  bar.hidden = !text;
  if (total) bar.value = done / total;
  else bar.removeAttribute("value");
  const idle = "The model is unloaded, and its memory is free. The next message loads it.";
  const wait = `${text}. Messages wait until it is ready.`;
  say(byId("loading-text"), text ? wait : engine.state === "unloaded" ? idle : "");
}

/** Fill a list of terms and what they are; it is built once. */
function list(id, entries) {
  const element = byId(id);
  for (const [name, text] of Object.entries(entries)) {
    let value = element.querySelector(`dd[data-name="${name}"]`);
    if (value === null) {
      value = make("dd", { "data-name": name });
      element.append(make("div", {}, make("dt", {}, name), value));
    }
    say(value, text);
  }
}

function disk(stats) {
  if (!stats.disk_budget_bytes) return {};
  return {
    "On disk": `${bytes(stats.disk_bytes)} of ${bytes(stats.disk_budget_bytes)}`,
    "Restored from disk": `${count(stats.disk_restored_tokens)} tokens, ${count(stats.disk_hits)} prompts`,
    "Read from disk": bytes(stats.disk_read_bytes),
    "Written to disk": `${bytes(stats.disk_written_bytes)} in total`,
  };
}

function memory(stats) {
  const held = stats.kv_tokens ? (stats.kv_tokens - stats.kv_idle_tokens) / stats.kv_tokens : 0;
  const other = Math.max(0, stats.active_bytes - stats.weight_bytes - stats.kv_bytes);
  const parts = {
    weights: stats.weight_bytes,
    used: stats.kv_bytes * held,
    kept: stats.kv_bytes * (1 - held),
    other,
  };
  const taken = Object.values(parts).reduce((sum, part) => sum + part, 0);
  const total = Math.max(stats.memory_budget_bytes, taken);
  if (!total) { // The engine does not run yet.
    for (const name of Object.keys(parts)) {
      byId(`memory-${name}`).style.width = 0;
      say(byId(`bytes-${name}`), "–");
    }
    say(byId("bytes-taken"), "");
    return say(byId("kv-room"), "");
  }
  for (const [name, part] of Object.entries(parts)) {
    byId(`memory-${name}`).style.width = `${(100 * part) / total}%`;
    say(byId(`bytes-${name}`), bytes(Math.round(part)));
  }
  say(byId("bytes-taken"), `${bytes(Math.round(taken))} of ${bytes(total)}`);
  say(byId("kv-room"), `KV budget: ${bytes(stats.kv_budget_bytes)}.`);
}

const share = (part, whole) => (whole ? `${Math.floor((100 * part) / whole)} %` : "–");
