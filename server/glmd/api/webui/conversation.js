// A conversation: a tree of messages, of which one branch is shown. Plain data, as it is stored.
//
// A message: { id, parent, role, content }, a user's with `files`, an assistant's with `reasoning`, `calls`
// and `note`, a tool's with `call`.

const FORMAT = "glmd-conversation";
const ROLES = new Set(["user", "assistant", "tool"]);
const TITLE = 60;

export function create(options = {}) {
  const now = Date.now();
  return { id: crypto.randomUUID?.() ?? `${now}-${Math.random()}`, title: "", created: now, updated: now, options, messages: [], leaf: null };
}

const find = (conversation, id) => conversation.messages.find((message) => message.id === id);

/** Add a message behind another one (null: at the beginning), and show its branch. */
export function add(conversation, parent, message) {
  const id = conversation.messages.reduce((most, each) => Math.max(most, each.id), 0) + 1;
  const added = { ...message, id, parent };
  conversation.messages.push(added);
  conversation.leaf = id;
  conversation.updated = Date.now();
  if (!conversation.title && message.role === "user") {
    const line = (message.content || message.files?.[0]?.name || "").trim().split("\n")[0];
    conversation.title = line.length > TITLE ? `${line.slice(0, TITLE - 1)}…` : line;
  }
  return added;
}

/** The messages of the branch that is shown, from the beginning to `leaf`. */
export function path(conversation, leaf = conversation.leaf) {
  const found = [];
  for (let id = leaf; id !== null; id = found[0].parent) found.unshift(find(conversation, id));
  return found;
}

/** The messages in a message's place, itself among them. */
export function alternatives(conversation, message) {
  return conversation.messages.filter((each) => each.parent === message.parent);
}

/** Show the branch of a message, to its latest end. */
export function choose(conversation, message) {
  conversation.leaf = message.id;
  for (;;) {
    const next = conversation.messages.filter((each) => each.parent === conversation.leaf).at(-1);
    if (!next) return;
    conversation.leaf = next.id;
  }
}

/** The messages of a request that asks for what follows `leaf`. */
export function request(conversation, leaf) {
  const system = conversation.options.system?.trim() ? [{ role: "system", content: conversation.options.system }] : [];
  return [...system, ...path(conversation, leaf).map(asSent).filter(Boolean)];
}

function asSent({ role, content, files = [], reasoning, calls = [], call }) {
  if (role === "tool") return { role, tool_call_id: call, content };
  if (role === "user") return { role, content: [...files.map(asText), content].filter(Boolean).join("\n\n") };
  if (!content && !reasoning && !calls.length) return null;
  const message = { role, content };
  if (reasoning) message.reasoning_content = reasoning;
  if (calls.length) message.tool_calls = calls;
  return message;
}

/** A file as part of a question, in a fence that its text cannot close. */
function asText({ name, text }) {
  const longest = Math.max(2, ...(text.match(/`+/g) ?? []).map((marks) => marks.length));
  const fence = "`".repeat(longest + 1);
  return `${name}:\n${fence}\n${text}${text.endsWith("\n") ? "" : "\n"}${fence}`;
}

export const exported = (conversation) => JSON.stringify({ format: FORMAT, version: 1, ...conversation }, null, 2);

/**
 * A new conversation of an exported one, or of `{ messages }` as the APIs and `glmd chat` write them.
 *
 * @throws {Error} the text is neither; the message is a sentence.
 */
export function imported(text) {
  let data;
  try {
    data = JSON.parse(text);
  } catch {
    throw new Error("The file is not JSON.");
  }
  const own = data?.format === FORMAT;
  if (!Array.isArray(data?.messages)) throw new Error("The file holds no list `messages`.");
  const conversation = create(own && typeof data.options === "object" ? data.options : {});
  if (own) {
    for (const message of data.messages) takeOver(conversation, message);
    const found = find(conversation, data.leaf);
    if (found) conversation.leaf = found.id;
    conversation.title = String(data.title ?? "");
  } else {
    for (const message of data.messages) {
      if (message?.role === "system") conversation.options = { ...conversation.options, system: asString(message.content) };
      else add(conversation, conversation.leaf, fields(message));
    }
  }
  return conversation;
}

function takeOver(conversation, message) {
  const known = message?.parent === null || find(conversation, message?.parent);
  if (!known || find(conversation, message.id) || !Number.isSafeInteger(message.id)) {
    throw new Error("The file's messages are not a tree.");
  }
  add(conversation, message.parent, fields(message));
  const added = conversation.messages.at(-1);
  added.id = conversation.leaf = message.id;
}

function fields(message) {
  if (!ROLES.has(message?.role)) throw new Error(`The file has a message of role ${message?.role}.`);
  const taken = { role: message.role, content: asString(message.content) };
  const reasoning = message.reasoning ?? message.reasoning_content;
  const calls = message.calls ?? message.tool_calls;
  if (reasoning) taken.reasoning = asString(reasoning);
  if (Array.isArray(calls)) taken.calls = calls.map(asCall);
  if (message.note) taken.note = asString(message.note);
  if (message.role === "tool") taken.call = asString(message.call ?? message.tool_call_id);
  if (Array.isArray(message.files)) {
    taken.files = message.files.map(({ name, text }) => ({ name: asString(name), text: asString(text) }));
  }
  return taken;
}

const asCall = (call) => ({
  id: asString(call?.id),
  type: "function",
  function: { name: asString(call?.function?.name), arguments: asString(call?.function?.arguments) },
});

const asString = (value) => {
  if (Array.isArray(value)) return value.map((part) => part?.text ?? "").join("");
  return typeof value === "string" ? value : "";
};
