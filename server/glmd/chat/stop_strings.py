"""Stop strings, matched over text that arrives in pieces."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache


@dataclass(frozen=True, slots=True)
class Automaton:
    """Where each character leads, from each beginning of a string that is looked for.

    Attributes:
        next: for each state, the next one by character.
        fail: for each state, the longest proper suffix of it that is a state.
        found: for each state, the string that is complete in it.
        length: of what each state stands for.
    """

    next: list[dict[str, int]]
    fail: list[int]
    found: list[str | None]
    length: list[int]


@lru_cache(maxsize=8)  # For the answers to one prompt, of which there may be many.
def automaton(strings: tuple[str, ...]) -> Automaton:
    next: list[dict[str, int]] = [{}]
    found: list[str | None] = [None]
    length = [0]
    for string in strings:
        state = 0
        for depth, character in enumerate(string, start=1):
            if character not in next[state]:
                next[state][character] = len(next)
                next.append({})
                found.append(None)
                length.append(depth)
            state = next[state][character]
        found[state] = string
    fail = [0] * len(next)
    queue = deque(next[0].values())
    while queue:
        state = queue.popleft()
        for character, target in next[state].items():
            queue.append(target)
            back = fail[state]
            while back and character not in next[back]:
                back = fail[back]
            fail[target] = next[back].get(character, 0)
            found[target] = found[target] or found[fail[target]]
    return Automaton(next, fail, found, length)


class StopStrings:
    """Finds the first stop string in a stream and withholds no more than may become one.

    The automaton of Aho and Corasick (CACM 18(6), 1975): each character is looked at once, and
    what is found does not depend on how the text is cut. The string that is complete first wins;
    of several that end at one place, the longest.

    Attributes:
        matched: the stop string that was found, if one was.
    """

    def __init__(self, strings: Sequence[str]) -> None:
        """Look for `strings`, none of them empty."""
        self.matched: str | None = None
        self._automaton = automaton(tuple(strings))
        self._state = 0
        self._held = ""

    def feed(self, text: str) -> str:
        """The text that is safe to show now; once `matched` is set, nothing more follows."""
        if self.matched is not None:
            return ""
        state = self._state
        table = self._automaton
        for position, character in enumerate(text):
            while state and character not in table.next[state]:
                state = table.fail[state]
            state = table.next[state].get(character, 0)
            found = table.found[state]
            if found is not None:
                self.matched = found
                seen = self._held + text[: position + 1]
                self._held = ""
                return seen[: -len(found)]
        self._state = state
        seen = self._held + text
        safe = len(seen) - table.length[state]
        self._held = seen[safe:]
        return seen[:safe]

    def flush(self) -> str:
        """What was withheld, since other text than what follows cannot complete it."""
        held = self._held
        self._held = ""
        self._state = 0
        return held
