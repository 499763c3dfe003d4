// The few things that every part of the page does with the document. Text is only ever text.

/** The element with an id, which is there. */
export const byId = (id) => document.getElementById(id);

/** A new element: attributes (null and false: none), listeners as `onclick`, and children. */
export function make(name, attributes = {}, ...children) {
  const element = document.createElement(name);
  assign(element, attributes);
  element.append(...children);
  return element;
}

/** The same, of SVG. */
export function draw(name, attributes = {}, ...children) {
  const element = document.createElementNS("http://www.w3.org/2000/svg", name);
  assign(element, attributes);
  element.append(...children);
  return element;
}

function assign(element, attributes) {
  for (const [name, value] of Object.entries(attributes)) {
    if (typeof value === "function") element.addEventListener(name.slice(2), value);
    else if (value !== null && value !== false) element.setAttribute(name, value === true ? "" : value);
  }
}

/** Set an element's text, and leave it alone where it is the same, so that selections survive. */
export function say(element, text) {
  if (element.textContent !== text) element.textContent = text;
}

/** Copy text, and let the button say so. */
export async function copy(button, text) {
  try {
    await navigator.clipboard.writeText(text);
    say(button, "Copied");
  } catch {
    say(button, "Not copied"); // The browser refuses, as where the page is not from a secure origin.
  }
  setTimeout(() => say(button, "Copy"), 1500);
}

/** Offer text as a file. */
export function download(name, text, type) {
  const address = URL.createObjectURL(new Blob([text], { type }));
  make("a", { href: address, download: name }).click();
  URL.revokeObjectURL(address);
}
