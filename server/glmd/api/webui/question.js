// What was asked, and what tools returned: shown as it was written, and edited in place.

import { make } from "./dom.js";

/** A question with its files, and what can be done with it. */
export function question({ content, files = [] }, ...actions) {
  const names = files.map(({ name, text }) =>
    make("details", { class: "file" }, make("summary", {}, name), make("pre", { tabindex: 0 }, text)),
  );
  return make(
    "div",
    { class: "asked" },
    make("div", { class: "question", role: "article", "aria-label": "Question" }, ...names, content),
    make("div", { class: "actions" }, ...actions),
  );
}

/** Put a form in place of a question; `send(text)` is called with the new text. */
export function edit(element, { content }, send) {
  const input = make("textarea", { "aria-label": "New text", rows: 3 });
  input.value = content;
  const close = () => form.replaceWith(element);
  const form = make(
    "form",
    { class: "edit" },
    input,
    make("div", { class: "bar" },
      make("button", { type: "button", class: "quiet", onclick: close }, "Cancel"),
      make("button", { type: "submit" }, "Send")),
  );
  form.addEventListener("submit", (event) => {
    event.preventDefault();
    if (input.value.trim()) send(input.value);
  });
  form.addEventListener("keydown", (event) => {
    if (event.key === "Escape") close();
    else if (event.key === "Enter" && !event.shiftKey && !event.isComposing) form.requestSubmit();
    else return;
    event.preventDefault();
    event.stopPropagation();
  });
  element.replaceWith(form);
  input.focus();
}

/** What a tool returned. */
export function result({ content, call }) {
  return make(
    "details",
    { class: "result" },
    make("summary", {}, `Result of ${call}`),
    make("pre", { tabindex: 0 }, content),
  );
}

/** A form for the results of calls; `send(results)` is called with one text per call. */
export function resultForm(calls, send) {
  const inputs = calls.map(({ function: { name } }) => make("textarea", { "aria-label": `Result of ${name}`, rows: 2, placeholder: `Result of ${name}` }));
  const form = make("form", { class: "edit" }, ...inputs, make("div", { class: "bar" }, make("button", { type: "submit" }, "Send the results")));
  form.addEventListener("submit", (event) => {
    event.preventDefault();
    send(inputs.map((input) => input.value));
  });
  return form;
}

/** Buttons that show the alternatives of a message, if it has any; `show(message)` shows one. */
export function branches(all, message, show) {
  if (all.length < 2) return [];
  const at = all.indexOf(message);
  const button = (label, text, other) =>
    make("button", { type: "button", class: "quiet", "aria-label": label, disabled: !other, onclick: () => show(other) }, text);
  return [
    make("span", { class: "branches", role: "group", "aria-label": "Branches" },
      button("Previous branch", "‹", all[at - 1]),
      make("span", {}, `${at + 1} of ${all.length}`),
      button("Next branch", "›", all[at + 1])),
  ];
}
