// Calls to the server that this page came from, with the key that it may want.

const KEY = "glmd.key";

/** What the server, or the way to it, has against a call; `message` is a sentence. */
export class ApiError extends Error {
  constructor(message, status = 0) {
    super(message);
    this.status = status;
  }
}

let askForKey = async () => null;
let asking = null;
const waiting = [];

/** Have `ask(refused)` give the key, or null, when a call is refused without one. */
export function useKeyDialog(ask) {
  askForKey = ask;
}

/** The key that has been entered, or null. */
export const givenKey = () => sessionStorage.getItem(KEY);

/** Resolves when a key has been entered. */
export function keyGiven() {
  return new Promise((resolve) => waiting.push(resolve));
}

/**
 * Call the server; the path is relative, so that the page also works below a proxy's prefix.
 *
 * A refused key is asked for, once for all calls that wait for it.
 *
 * @throws {ApiError} any answer but success, or none.
 */
export async function call(path, { method = "GET", body, signal } = {}) {
  for (;;) {
    const key = sessionStorage.getItem(KEY);
    const headers = {};
    if (key !== null) headers.authorization = `Bearer ${key}`;
    if (body !== undefined) headers["content-type"] = "application/json";
    const options = { method, headers, body: JSON.stringify(body), signal, cache: "no-store" };
    const response = await reach(fetch(path, options), "The server cannot be reached.");
    if (response.ok) return response;
    if (response.status !== 401) throw await problem(response);
    if (key === sessionStorage.getItem(KEY)) {
      asking ??= askForKey(key !== null).finally(() => (asking = null));
      const given = await asking;
      if (given === null) throw await problem(response);
      sessionStorage.setItem(KEY, given);
      waiting.splice(0).forEach((resolve) => resolve());
    }
  }
}

/** The data of each server-sent event of a response, as it comes. */
export async function* events(response) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  const lost = "The connection to the server was lost.";
  let rest = "";
  try {
    for (;;) {
      const { value, done } = await reach(reader.read(), lost);
      if (done) return;
      const frames = (rest + value).split("\n\n");
      rest = frames.pop();
      for (const frame of frames) {
        if (frame.startsWith("data: ")) yield frame.slice(6);
      }
    }
  } finally {
    reader.cancel().catch(() => {}); // It fails where reading has failed, which is known.
  }
}

/** Name a failure of the network, which browsers report as a TypeError. */
async function reach(promise, message) {
  try {
    return await promise;
  } catch (error) {
    throw error instanceof TypeError ? new ApiError(message) : error;
  }
}

async function problem(response) {
  const text = await response.text();
  try {
    return new ApiError(JSON.parse(text).error.message, response.status);
  } catch {
    return new ApiError(`The server answered with status ${response.status}.`, response.status);
  }
}
