// The options of a chat: what is filled in is sent, the rest is as the server has it.

import { byId, make, say } from "./dom.js";

const form = byId("composer");
const { profile, system, tools, enable_thinking, clear_thinking } = form.elements;
const switches = [enable_thinking, clear_thinking];
const numbers = form.querySelectorAll("input[type=number]");
let offered = "";
let choices = {};

/** Take over what the server does where a request says nothing, and its profiles. */
export function offer({ defaults, profiles }) {
  const now = JSON.stringify([defaults, profiles]);
  if (now === offered) return;
  offered = now;
  const chosen = profile.value || profile.dataset.wanted;
  choices = { "": defaults, ...profiles };
  profile.replaceChildren(
    ...Object.keys(choices).map((name) => make("option", { value: name }, name || "default")),
  );
  profile.value = chosen in choices ? chosen : "";
  show();
}

/** Let empty fields and untouched switches show what they stand for. */
function show() {
  const values = choices[profile.value] ?? {};
  for (const each of switches) {
    if (!each.dataset.touched) each.checked = values[each.name] ?? each.checked;
  }
  for (const each of numbers) {
    each.placeholder = values[each.name] ?? (each.name === "seed" ? "random" : "no limit");
  }
}

/** What is filled in, as a chat keeps it. */
export function options() {
  const kept = {};
  for (const each of switches) if (each.dataset.touched) kept[each.name] = each.checked;
  for (const each of [...numbers, profile, system, tools]) if (each.value) kept[each.name] = each.value;
  return kept;
}

/** Fill in what a chat has kept. */
export function restore(kept) {
  for (const each of switches) {
    delete each.dataset.touched;
    if (each.name in kept) each.dataset.touched = "yes";
    each.checked = kept[each.name] ?? each.checked;
  }
  for (const each of [...numbers, system, tools]) each.value = kept[each.name] ?? "";
  profile.dataset.wanted = kept.profile ?? "";
  profile.value = profile.dataset.wanted in choices ? profile.dataset.wanted : "";
  check();
  show();
}

/** Call `changed()` when something else is filled in. */
export function onOptions(changed) {
  form.addEventListener("change", (event) => {
    if (event.target.name && event.target.type !== "file") changed();
  });
}

/** The fields of the request. */
export function fields() {
  const body = {};
  for (const each of switches) body[each.name] = each.checked;
  for (const each of numbers) {
    if (each.value !== "") body[each.name] = each.valueAsNumber;
  }
  if (profile.value) body.profile = profile.value;
  if (tools.value.trim()) body.tools = JSON.parse(tools.value);
  return body;
}

/** Whether they are such as can be sent; where not, the user is shown which. */
export function optionsHold() {
  if (form.checkValidity()) return true;
  showOptions(true);
  return form.reportValidity();
}

function showOptions(shown) {
  byId("options").hidden = !shown;
  byId("options-button").setAttribute("aria-expanded", shown);
}

/** Tools are JSON, of which the server checks the rest. */
function check() {
  let wrong = "";
  try {
    if (tools.value.trim() && !Array.isArray(JSON.parse(tools.value))) wrong = "Tools: must be a list.";
  } catch (error) {
    wrong = `Tools: no JSON (${error.message}).`;
  }
  tools.setCustomValidity(wrong);
  say(byId("tools-error"), wrong);
}

byId("options-button").addEventListener("click", () => showOptions(byId("options").hidden));
tools.addEventListener("input", check);
for (const each of switches) each.addEventListener("change", () => (each.dataset.touched = "yes"));
profile.addEventListener("change", () => {
  for (const each of switches) delete each.dataset.touched; // A profile may say how to think.
  show();
});
