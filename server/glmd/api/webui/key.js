// The dialog that asks for the API key.

import { make } from "./dom.js";

let given = null;
let answer = null;

const input = make("input", {
  type: "password", id: "key", required: true, pattern: "[!-~]+", title: "ASCII letters, digits and symbols",
  autocomplete: "off", spellcheck: "false",
});
const refusal = make("p", { class: "error", role: "alert", hidden: true }, "The server did not accept the key.");
const dialog = make(
  "dialog",
  { "aria-labelledby": "key-title" },
  make(
    "form",
    {
      method: "dialog",
      onsubmit: (event) => {
        event.preventDefault();
        given = input.value;
        dialog.close();
      },
    },
    make("h2", { id: "key-title" }, "This server requires an API key"),
    refusal,
    make("label", {}, "API key ", input),
    make("p", {}, "The key is kept in this tab until you close the tab, and sent to this server only."),
    make(
      "div",
      { class: "bar" },
      make("button", { type: "button", class: "quiet", onclick: () => dialog.close() }, "Cancel"),
      make("button", { type: "submit" }, "Continue"),
    ),
  ),
);
dialog.addEventListener("close", () => {
  input.value = "";
  answer(given);
});
document.body.append(dialog);

/** Show the dialog; gives the key that is entered, or null if there will be none. */
export function askForKey(refused) {
  refusal.hidden = !refused;
  given = null;
  dialog.showModal();
  input.focus();
  return new Promise((resolve) => (answer = resolve));
}
