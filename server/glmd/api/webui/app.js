// The page: who works in it, and which view is shown where there is no room for all.

import { useKeyDialog } from "./api.js";
import { Chat } from "./chat.js";
import { byId } from "./dom.js";
import { askForKey } from "./key.js";
import { Server } from "./server.js";
import "./connect.js";

useKeyDialog(askForKey);
const server = new Server();
new Chat(server);
server.watch();

const views = byId("views");
for (const button of views.children) {
  button.addEventListener("click", () => {
    document.body.dataset.view = button.dataset.view;
    views.dispatchEvent(new Event("shown"));
  });
}
views.addEventListener("shown", () => {
  for (const each of views.children) each.setAttribute("aria-pressed", each.dataset.view === document.body.dataset.view);
});
