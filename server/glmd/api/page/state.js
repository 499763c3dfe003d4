// What is served, and how it is, at the head of the page.

import { byId, say } from "./dom.js";
import { bytes } from "./units.js";

const PAUSE = 2000;

/** Ask for as long as the page is looked at. */
export async function watchState() {
  for (;;) {
    if (!document.hidden) show(await ask());
    await new Promise((resolve) => setTimeout(resolve, PAUSE));
  }
}

async function ask() {
  try {
    const response = await fetch("health", { cache: "no-store" });
    return await response.json(); // 503, while it is not ready, says why.
  } catch {
    return { status: "unreachable" };
  }
}

function show({ status, model, loading, failure }) {
  if (model) {
    say(byId("model"), model);
    document.title = `${model} · glmd`;
  }
  const read = loading?.total_bytes ? ` ${bytes(loading.done_bytes)} of ${bytes(loading.total_bytes)}` : "";
  say(byId("state"), status + read);
  byId("state").dataset.state = status;
  byId("state").title = failure ?? "";
}
