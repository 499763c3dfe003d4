// Text files of the next message: chosen, pasted or dropped.

import { byId, make, say } from "./dom.js";

/** Bytes of one file: several times what the context holds. */
const LARGEST = 4 * 1024 * 1024;

export class Files {
  constructor() {
    this.files = []; // Of { name, text }.
    this.list = byId("files");
    this.error = byId("file-error");
    const input = byId("file");
    byId("attach").addEventListener("click", () => input.click());
    input.addEventListener("change", async () => {
      await this.take(input.files);
      input.value = "";
    });
    const chat = byId("chat");
    const holdsFiles = (event) => event.dataTransfer?.types.includes("Files");
    chat.addEventListener("dragover", (event) => {
      if (!holdsFiles(event)) return;
      event.preventDefault();
      chat.classList.add("dropping");
    });
    chat.addEventListener("dragleave", () => chat.classList.remove("dropping"));
    chat.addEventListener("drop", (event) => {
      if (!holdsFiles(event)) return;
      event.preventDefault();
      chat.classList.remove("dropping");
      this.take(event.dataTransfer.files);
    });
    byId("message").addEventListener("paste", (event) => {
      if (!event.clipboardData.files.length) return;
      event.preventDefault();
      this.take(event.clipboardData.files);
    });
  }

  async take(files) {
    say(this.error, "");
    for (const file of files) {
      try {
        this.files.push({ name: file.name, text: await textOf(file) });
      } catch (error) {
        say(this.error, `${file.name}: ${error.message}`);
      }
    }
    this.#show();
    byId("message").focus();
  }

  /** The files, which are those of the message that is sent now. */
  give() {
    const given = this.files;
    this.files = [];
    say(this.error, "");
    this.#show();
    return given;
  }

  #show() {
    const items = this.files.map((file) =>
      make("li", {}, file.name, make("button", {
        type: "button",
        class: "quiet",
        "aria-label": `Remove ${file.name}`,
        onclick: () => {
          this.files = this.files.filter((each) => each !== file);
          this.#show();
          byId("message").focus();
        },
      }, "×")),
    );
    this.list.replaceChildren(...items);
    this.list.hidden = !items.length;
  }
}

async function textOf(file) {
  if (file.size > LARGEST) throw new Error("larger than 4 MiB.");
  const bytes = await file.arrayBuffer();
  if (new Uint8Array(bytes).includes(0)) throw new Error("no text file.");
  try {
    return new TextDecoder("utf-8", { fatal: true }).decode(bytes);
  } catch {
    throw new Error("no text file in UTF-8.");
  }
}
