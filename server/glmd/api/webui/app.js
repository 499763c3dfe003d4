// The page: who works in it, and which view is shown where there is no room for both.

import { useKeyDialog } from "./api.js";
import { Chat } from "./chat.js";
import { askForKey } from "./key.js";
import { Server } from "./server.js";

useKeyDialog(askForKey);
const server = new Server();
server.watch();
new Chat(() => server.wake());

const views = document.querySelectorAll("nav button");
for (const button of views) {
  button.addEventListener("click", () => {
    document.body.dataset.view = button.dataset.view;
    for (const each of views) each.setAttribute("aria-pressed", each === button);
  });
}
