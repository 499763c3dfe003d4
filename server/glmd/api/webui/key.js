// The dialog that asks for the API key.

import { byId } from "./dom.js";

const dialog = byId("key-dialog");
const input = byId("key");
let given = null;
let answer = null;

/** Show the dialog; gives the key that is entered, or null if there will be none. */
export function askForKey(refused) {
  byId("key-refused").hidden = !refused;
  given = null;
  dialog.showModal();
  input.focus();
  return new Promise((resolve) => (answer = resolve));
}

dialog.querySelector("form").addEventListener("submit", (event) => {
  event.preventDefault();
  given = input.value;
  dialog.close();
});
byId("key-cancel").addEventListener("click", () => dialog.close());
dialog.addEventListener("close", () => {
  input.value = "";
  answer(given);
});
