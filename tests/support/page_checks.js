// What tests of the page look at, from within it: loaded before its own scripts.

window.checks = { violations: [], seen: [] };

document.addEventListener("securitypolicyviolation", (event) => {
  checks.violations.push(`${event.violatedDirective}: ${event.blockedURI}`);
});

/** Note which parts of an answer are written, in their order. Reasoning that comes in one frame with
 * the answer is folded away at once. */
checks.watch = () => {
  const parts = { reasoning: ".reasoning .prose", content: ".answer .content" };
  new MutationObserver(() => {
    for (const [name, place] of Object.entries(parts)) {
      const written = document.querySelector(place)?.textContent;
      if (written && !checks.seen.includes(name)) checks.seen.push(name);
    }
  }).observe(document.body, { childList: true, characterData: true, subtree: true });
};

/** Controls, regions and pictures without a name for those who do not see them. */
checks.unnamed = () => {
  const kinds = "button, input, select, textarea, [role=img], [role=log], dialog, section, nav, table";
  const named = (element) =>
    element.getAttribute("aria-label") ||
    element.labels?.length ||
    document.getElementById(element.getAttribute("aria-labelledby"))?.textContent.trim() ||
    element.querySelector("caption")?.textContent.trim() ||
    (element.tagName === "BUTTON" && element.textContent.trim());
  const elements = [...document.querySelectorAll(kinds)].filter((element) => !named(element));
  return elements.map((element) => element.outerHTML.slice(0, 120));
};

/** Visible text whose contrast with its ground is below 4.5, the least of WCAG's level AA. */
checks.faint = () => {
  const channels = (colour) => (colour.match(/[\d.]+/g) ?? []).map(Number);
  const light = (colour) => {
    const [r, g, b] = channels(colour)
      .map((c) => c / 255)
      .map((c) => (c <= 0.04045 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4));
    return 0.2126 * r + 0.7152 * g + 0.0722 * b;
  };
  const ground = (element) => {
    for (; element; element = element.parentElement) {
      const colour = getComputedStyle(element).backgroundColor;
      if (channels(colour)[3] !== 0) return colour;
    }
    return "rgb(255, 255, 255)";
  };
  const found = new Set();
  const walk = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  while (walk.nextNode()) {
    const text = walk.currentNode.data.trim();
    const element = walk.currentNode.parentElement;
    if (!text || !element.checkVisibility()) continue;
    const pair = [light(getComputedStyle(element).color), light(ground(element))];
    const contrast = (Math.max(...pair) + 0.05) / (Math.min(...pair) + 0.05);
    if (contrast < 4.5) found.add(`${contrast.toFixed(2)}: ${text.slice(0, 60)}`);
  }
  return [...found];
};
