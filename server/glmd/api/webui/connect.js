// The dialog that says how other programs reach this server, with the address and key of this page.

import { call, givenKey } from "./api.js";
import { byId, make, say } from "./dom.js";
import { codeBlock, showMarkdown } from "./markdown.js";

const dialog = byId("connect");
const choice = byId("client");
let clients = [];

byId("connect-button").addEventListener("click", async () => {
  dialog.showModal();
  say(byId("connect-error"), "");
  const url = new URL(".", location.href).href.replace(/\/$/, "");
  clients = general(url);
  try {
    const response = await call(`glmd/clients?url=${encodeURIComponent(url)}`);
    clients.push(...(await response.json()).clients);
  } catch (error) {
    say(byId("connect-error"), error.message);
  }
  const chosen = choice.value;
  choice.replaceChildren(...clients.map(({ title }, index) => make("option", { value: index }, title)));
  choice.value = chosen || 0;
  addresses({ OpenAI: `${url}/v1`, Anthropic: url, Model: "default", Key: givenKey() ?? "none needed" });
  show();
});
choice.addEventListener("change", show);
byId("connect-close").addEventListener("click", () => dialog.close());

function show() {
  const { name, parts } = clients[choice.value];
  const shown = parts.flatMap(({ heading, text, language }) => [
    ...(heading ? [make("p", { class: "dim" }, heading.replace("# ", ""))] : []),
    language ? codeBlock(text, language) : showMarkdown(make("div"), text),
  ]);
  if (name) {
    shown.unshift(make("p", { class: "dim" }, "In a terminal, this merges the settings into the program's file:"), codeBlock(`glmd connect ${name} --write`, "sh"));
  }
  byId("snippet").replaceChildren(...shown);
}

function addresses(entries) {
  const rows = Object.entries(entries).map(([name, value]) =>
    make("div", {}, make("dt", {}, name), make("dd", {}, make("code", {}, value))),
  );
  byId("addresses").replaceChildren(...rows);
}

/** Snippets for a client of one's own. */
function general(url) {
  const key = givenKey();
  const header = key === null ? "" : ` \\\n  -H "Authorization: Bearer ${key}"`;
  const body = `{"model": "default", "messages": [{"role": "user", "content": "Hello"}]}`;
  return [
    {
      title: "curl",
      parts: [{ language: "sh", text: `curl ${url}/v1/chat/completions${header} \\\n  -H "Content-Type: application/json" \\\n  -d '${body}'\n` }],
    },
    {
      title: "Python",
      parts: [{
        language: "python",
        text: `from openai import OpenAI

client = OpenAI(base_url="${url}/v1", api_key="${key ?? "none"}")
answer = client.chat.completions.create(
    model="default", messages=[{"role": "user", "content": "Hello"}]
)
print(answer.choices[0].message.content)
`,
      }],
    },
    {
      title: "JavaScript",
      parts: [{
        language: "js",
        text: `import OpenAI from "openai";

const client = new OpenAI({ baseURL: "${url}/v1", apiKey: "${key ?? "none"}" });
const answer = await client.chat.completions.create({
  model: "default",
  messages: [{ role: "user", content: "Hello" }],
});
console.log(answer.choices[0].message.content);
`,
      }],
    },
  ];
}
