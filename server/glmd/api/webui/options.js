// The options of a message: what is filled in is sent, the rest is as the server has it.

import { byId, make } from "./dom.js";

const form = byId("composer");
const profile = form.elements.profile;
const switches = [form.elements.enable_thinking, form.elements.clear_thinking];
const numbers = form.querySelectorAll("input[type=number]");
let offered = "";
let choices = {};

/** Take over what the server does where a request says nothing, and its profiles. */
export function offer({ defaults, profiles }) {
  const now = JSON.stringify([defaults, profiles]);
  if (now === offered) return;
  offered = now;
  choices = { "": defaults, ...profiles };
  const chosen = profile.value;
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

/** The fields of the request. */
export function options() {
  const body = {};
  for (const each of switches) body[each.name] = each.checked;
  for (const each of numbers) {
    if (each.value !== "") body[each.name] = each.valueAsNumber;
  }
  if (profile.value) body.profile = profile.value;
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

byId("options-button").addEventListener("click", () => showOptions(byId("options").hidden));
for (const each of switches) each.addEventListener("change", () => (each.dataset.touched = "yes"));
profile.addEventListener("change", () => {
  for (const each of switches) delete each.dataset.touched; // A profile may say how to think.
  show();
});
