"""Token bytes to text, and text to deltas up to the first stop string."""

from __future__ import annotations

import codecs
from collections import deque
from collections.abc import Sequence
from functools import lru_cache

from glmd.chat.types import ContentDelta, Event, ReasoningDelta, TokenInfo

_utf8 = codecs.getincrementaldecoder("utf-8")


class Detokenizer:
    """Incremental UTF-8 decoding.

    A character split over tokens is returned when it is complete. Invalid bytes become U+FFFD, as
    when all bytes are decoded at once.
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


class StopStrings:
    """Finds the first stop string, and withholds only text that may become one.

    The string that is complete first wins; of several that end at the same character, the longest.
    The result does not depend on how the text is split. Each character takes constant time per stop
    string (Knuth, Morris, Pratt; SIAM J. Comput. 6(2), 1977).

    Attributes:
        matched: the stop string that was found, or None.
    """

    def __init__(self, strings: Sequence[str]) -> None:
        """
        Args:
            strings: stop strings, none of them empty.
        """
        self.matched: str | None = None
        self._strings = [(string, border_lengths(string)) for string in strings]
        self._lengths = [0] * len(strings)
        """Length of each string's prefix that the text ends with."""
        self._held = ""

    def feed(self, text: str) -> str:
        """Take the next text, and return the text that no stop string can include."""
        if self.matched is not None:
            return ""
        seen = self._held + text
        for end, character in enumerate(text, start=len(self._held) + 1):
            for index, (string, borders) in enumerate(self._strings):
                length = self._lengths[index]
                while length and string[length] != character:
                    length = borders[length]
                length += string[length] == character
                self._lengths[index] = length
                if length == len(string) > len(self.matched or ""):
                    self.matched = string
            if self.matched is not None:
                self._held = ""
                return seen[: end - len(self.matched)]
        safe = len(seen) - max(self._lengths)
        self._held = seen[safe:]
        return seen[:safe]

    def flush(self) -> str:
        """Return the withheld text, and start again."""
        held, self._held = self._held, ""
        self._lengths = [0] * len(self._strings)
        return held


@lru_cache(maxsize=256)  # shared by the `n` answers to one prompt
def border_lengths(string: str) -> list[int]:
    """For each prefix, the length of the longest proper prefix that is its suffix."""
    borders = [0, 0]
    length = 0
    for character in string[1:]:
        while length and string[length] != character:
            length = borders[length]
        length += string[length] == character
        borders.append(length)
    return borders


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
