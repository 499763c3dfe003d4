// The reference of the API: the server's OpenAPI document as a page.

import { call, useKeyDialog } from "./api.js";
import { byId, make, say } from "./dom.js";
import { askForKey } from "./key.js";
import { showMarkdown } from "./markdown.js";

useKeyDialog(askForKey);

const note = byId("note");
try {
  const openapi = await (await call("openapi.json")).json();
  say(byId("model"), openapi.info.version);
  byId("reference").replaceChildren(...sections(openapi));
} catch (error) {
  say(note, error.message);
}

/** A section of each tag, with its routes. */
function sections({ paths, components }) {
  const tags = new Map();
  for (const [path, routes] of Object.entries(paths)) {
    for (const [method, route] of Object.entries(routes)) {
      const tag = route.tags?.[0] ?? "Other";
      if (!tags.has(tag)) tags.set(tag, []);
      tags.get(tag).push(operation(method.toUpperCase(), path, route, components.schemas ?? {}));
    }
  }
  return [...tags].map(([tag, routes]) => make("section", {}, make("h2", {}, tag), ...routes));
}

function operation(method, path, route, schemas) {
  const summary = make("summary", {}, make("code", {}, `${method} ${path}`), ` ${route.summary ?? ""}`);
  const details = make("details", {}, summary);
  // Most are long, and few are read: they are built when they are opened.
  details.addEventListener("toggle", () => details.append(...contents(route, schemas)), { once: true });
  return details;
}

function contents({ description, parameters = [], requestBody, responses }, schemas) {
  const parts = [prose(description)];
  const rows = parameters.map((each) => row(each.name, each.schema, each.required, each.description, schemas));
  if (rows.length) parts.push(make("h3", {}, "Parameters"), table(rows));
  const body = requestBody?.content?.["application/json"]?.schema;
  if (body) parts.push(make("h3", {}, "Body"), ...object(body, schemas));
  for (const [status, { description: text, content }] of Object.entries(responses ?? {})) {
    parts.push(make("h3", {}, `${status} ${text}`));
    const schema = content?.["application/json"]?.schema;
    if (schema) parts.push(...object(schema, schemas));
  }
  return parts;
}

/** What an object's schema says, and behind it the objects that it names. */
function object(schema, schemas) {
  const parts = [];
  const named = [nameOf(schema)].filter(Boolean);
  if (!named.length) parts.push(...fields(schema, schemas, named));
  for (let index = 0; index < named.length; index += 1) {
    const found = schemas[named[index]] ?? {};
    const shown = fields(found, schemas, named);
    if (shown.length) parts.push(make("h4", {}, named[index]), prose(found.description), ...shown);
  }
  return parts;
}

function fields({ properties, required = [], ...schema }, schemas, named) {
  const rows = Object.entries(properties ?? {}).map(([name, field]) => {
    for (const each of references(field)) if (!named.includes(each)) named.push(each);
    return row(name, field, required.includes(name), field.description, schemas);
  });
  if (rows.length) return [table(rows)];
  for (const each of references(schema)) if (!named.includes(each)) named.push(each);
  return [make("p", {}, make("code", {}, type(schema)))];
}

function row(name, schema, required, description, schemas) {
  const fallback = schema?.default === undefined || schema.default === null ? "" : JSON.stringify(schema.default);
  const text = description ?? schemas[nameOf(schema)]?.description ?? "";
  return make(
    "tr",
    {},
    make("th", { scope: "row" }, make("code", {}, name), required ? " (required)" : ""),
    make("td", {}, type(schema)),
    make("td", {}, fallback),
    make("td", {}, prose(text)),
  );
}

function table(rows) {
  const head = ["Name", "Type", "Default", "Description"].map((name) => make("th", { scope: "col" }, name));
  const frame = { class: "scroll", role: "group", "aria-label": "Fields", tabindex: 0 };
  return make("div", frame, make("table", {}, make("thead", {}, make("tr", {}, ...head)), make("tbody", {}, ...rows)));
}

const prose = (text) => showMarkdown(make("div"), text ?? "");

const nameOf = (schema) => schema?.$ref?.split("/").at(-1);

/** Names of the objects within a schema. */
function references(schema) {
  if (Array.isArray(schema)) return schema.flatMap(references);
  if (schema === null || typeof schema !== "object") return [];
  const own = nameOf(schema);
  return own ? [own] : Object.values(schema).flatMap(references);
}

/** A type in words, such as "string | list of Tool". */
function type(schema) {
  if (!schema) return "any";
  if (schema.$ref) return nameOf(schema);
  if (schema.enum || "const" in schema) return (schema.enum ?? [schema.const]).map((each) => JSON.stringify(each)).join(" | ");
  const kinds = schema.anyOf ?? schema.oneOf ?? schema.allOf;
  if (kinds) return [...new Set(kinds.map(type))].join(" | ");
  if (schema.type === "array") return `list of ${type(schema.items)}`;
  const bounds = [
    ["minimum", "≥"], ["exclusiveMinimum", ">"], ["maximum", "≤"], ["exclusiveMaximum", "<"],
  ].filter(([name]) => name in schema).map(([name, sign]) => `${sign} ${schema[name]}`);
  return [schema.type ?? "any", ...bounds].join(" ");
}
