// The page: who works in it.

import { useKeyDialog } from "./api.js";
import { Chat } from "./chat.js";
import { askForKey } from "./key.js";
import { watchState } from "./state.js";

useKeyDialog(askForKey);
new Chat();
watchState();
