"""Token bytes to text, and text to deltas up to the first stop string."""

from __future__ import annotations

import codecs
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

from glmd.chat.events import ContentDelta, Event, ReasoningDelta, TokenInfo

_utf8 = codecs.getincrementaldecoder("utf-8")


class Detokenizer:
    """Incremental UTF-8 decoding: a character split over tokens is returned when complete.

    Invalid bytes become U+FFFD, as when decoding all bytes at once.
    """

    def __init__(self) -> None:
        self._decoder = _utf8("replace")

    def feed(self, data: bytes) -> str:
        """Take the bytes of one or more tokens, and return the completed characters."""
        return self._decoder.decode(data)

    def flush(self) -> str:
        """Return the text of an incomplete character, if any, and start again."""
        rest = self._decoder.decode(b"", final=True)
        self._decoder.reset()
        return rest


@dataclass(frozen=True, slots=True)
class Automaton:
    """Automaton of Aho and Corasick (CACM 18(6), 1975). A state is a prefix of some stop string.

    Attributes:
        next: next state by character, for each state.
        fail: the longest proper suffix that is a state, for each state.
        found: the stop string that ends in each state, or None.
        length: number of characters of each state's prefix.
    """

    next: list[dict[str, int]]
    fail: list[int]
    found: list[str | None]
    length: list[int]


@lru_cache(maxsize=8)  # shared by the `n` answers to one prompt
def build_automaton(strings: tuple[str, ...]) -> Automaton:
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
    """Finds the first stop string in a stream, and withholds only text that may become one.

    The string that is complete first wins; of several that end at the same character, the longest.
    The result does not depend on how the text is split.

    Attributes:
        matched: the stop string that was found, or None.
    """

    def __init__(self, strings: Sequence[str]) -> None:
        """
        Args:
            strings: stop strings, none of them empty.
        """
        self.matched: str | None = None
        self._automaton = build_automaton(tuple(strings))
        self._state = 0
        self._held = ""

    def feed(self, text: str) -> str:
        """Take the next text, and return the text that no stop string can include any more."""
        if self.matched is not None:
            return ""
        state = self._state
        automaton = self._automaton
        for position, character in enumerate(text):
            while state and character not in automaton.next[state]:
                state = automaton.fail[state]
            state = automaton.next[state].get(character, 0)
            found = automaton.found[state]
            if found is not None:
                self.matched = found
                seen = self._held + text[: position + 1]
                self._held = ""
                return seen[: -len(found)]
        self._state = state
        seen = self._held + text
        safe = len(seen) - automaton.length[state]
        self._held = seen[safe:]
        return seen[:safe]

    def flush(self) -> str:
        """Return the withheld text, and start again."""
        held = self._held
        self._held = ""
        self._state = 0
        return held


class TextStream:
    """Reasoning or content: text in, deltas with their tokens out.

    The text consists of segments, separated by other sections of the answer (`end`).

    Attributes:
        stopped_by: the stop string that matched, or None; no text after it is shown.
        segment: text shown since the last `end`.
        text: all text shown.
    """

    def __init__(
        self,
        delta: type[ReasoningDelta] | type[ContentDelta],
        *,
        stop: Sequence[str] = (),
        hold_blank: bool = False,
    ) -> None:
        """
        Args:
            stop: stop strings.
            hold_blank: withhold whitespace at the start of a segment until other text follows, so
                that `end` can drop a segment of whitespace only.
        """
        self._delta = delta
        self._stop = StopStrings(stop) if stop else None
        self._hold_blank = hold_blank
        self._at_start = hold_blank
        self._blank = ""
        self._segment: list[str] = []
        self._segments: list[str] = []
        self._fed = 0
        self._shown = 0
        self._infos: deque[tuple[int, TokenInfo]] = deque()
        """Tokens not yet in a delta, with the position in the text where each token starts."""

    @property
    def stopped_by(self) -> str | None:
        return self._stop.matched if self._stop is not None else None

    @property
    def segment(self) -> str:
        return "".join(self._segment)

    @property
    def text(self) -> str:
        return "".join(self._segments) + self.segment

    def feed(self, text: str, info: TokenInfo | None = None) -> list[Event]:
        """Take the text of a token.

        Args:
            info: the token, if the request asks for log-probabilities. A token that only starts a
                character has no text; its `info` goes out with the next token's.
        """
        if info is not None:
            self._infos.append((self._fed, info))
        self._fed += len(text)
        if self._stop is not None:
            text = self._stop.feed(text)
        if self._at_start:
            text = self._blank + text
            if not text or (text.isspace() and self.stopped_by is None):
                self._blank = text
                return []
            self._at_start = False
            self._blank = ""
        return self._show(text) if text else []

    def end(self, *, drop_blank: bool = False) -> list[Event]:
        """End the segment: show the withheld text, and drop tokens behind a stop string.

        Args:
            drop_blank: drop the segment if it is all whitespace.
        """
        text = self._blank
        if self._stop is not None:
            text += self._stop.flush()
        if drop_blank and self._at_start and (not text or text.isspace()):
            self._infos.clear()
            text = ""
        events = self._show(text) if text else []
        if self._infos and self.stopped_by is None:  # tokens without text: half a character
            events.append(self._delta("", [info for _, info in self._infos]))
        self._infos.clear()
        self._shown = self._fed
        self._segments += self._segment
        self._segment = []
        self._at_start = self._hold_blank
        self._blank = ""
        return events

    def _show(self, text: str) -> list[Event]:
        self._segment.append(text)
        self._shown += len(text)
        infos: list[TokenInfo] = []
        while self._infos and self._infos[0][0] < self._shown:
            infos.append(self._infos.popleft()[1])
        return [self._delta(text, infos)]
