// A value over the last minutes, as a small picture.

import { draw, make, say } from "./dom.js";

/** The picture's own units, which stretch to the room that there is. */
const WIDTH = 1000;
const HEIGHT = 100;

export class Plot {
  /**
   * @param {Element} element to be filled.
   * @param {string} title what is shown.
   * @param {(value: number) => string} format a value in words.
   * @param {boolean} dots whether values are events, and not a course.
   */
  constructor(element, title, format, { dots = false } = {}) {
    this.title = title;
    this.format = format;
    this.dots = dots;
    this.now = make("strong");
    this.top = make("span", { class: "top", "aria-hidden": "true" });
    this.start = make("span");
    this.line = draw("path", { class: dots ? "dots" : "line" });
    this.area = draw("path", { class: "area" });
    this.picture = draw(
      "svg",
      { viewBox: `0 0 ${WIDTH} ${HEIGHT}`, preserveAspectRatio: "none", role: "img", "aria-label": title },
      this.area,
      this.line,
    );
    element.append(
      make("h3", {}, make("span", {}, title), this.now),
      make("div", { class: "picture" }, this.picture, this.top),
      make("p", { class: "ends", "aria-hidden": "true" }, this.start, make("span", {}, "now")),
    );
  }

  /**
   * Show a course.
   *
   * @param {[number, number][]} points seconds before now, and values; the latest last.
   * @param {number} span seconds that the picture is wide.
   * @param {number | null} value the present one.
   */
  show(points, span, value) {
    const shown = points.filter(([ago]) => ago <= span);
    const most = Math.max(0, ...shown.map(([, each]) => each));
    const top = ceiling(most);
    const place = ([ago, each]) =>
      `${(WIDTH * (1 - ago / span)).toFixed(1)} ${(HEIGHT * (1 - each / top)).toFixed(1)}`;
    const places = shown.map(place);
    const line = places.join("L");
    this.line.setAttribute("d", this.dots ? places.map((at) => `M${at}h0`).join("") : line && `M${line}`);
    if (!this.dots && line) {
      const [left, right] = [shown[0], shown.at(-1)].map(([ago]) => place([ago, 0]));
      this.area.setAttribute("d", `M${left}L${line}L${right}Z`);
    }

    const now = value === null ? "–" : this.format(value);
    say(this.now, now);
    say(this.top, most > 0 ? this.format(top).replace(/\.0+(?!\d)/, "") : "");
    say(this.start, `${span / 60} min ago`);
    const reached = most > 0 ? `, at most ${this.format(most)} in ${span / 60} minutes` : "";
    this.picture.setAttribute("aria-label", `${this.title}: ${now}${reached}`);
  }
}

/** The least number with one of a few leading digits that is not below `value`. */
function ceiling(value) {
  if (value <= 0) return 1;
  const power = 10 ** Math.floor(Math.log10(value));
  return [1, 1.5, 2, 3, 4, 6, 8, 10].map((digit) => digit * power).find((top) => top >= value) ?? value;
}
