"""Reasoning or content on its way out: stop strings, and whose tokens stand behind which text."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence

from glmd.chat.events import ContentDelta, Event, ReasoningDelta, TokenInfo
from glmd.chat.stop_strings import StopStrings


class TextStream:
    """Text in, deltas out.

    Attributes:
        segment: what was shown since the last `end`.
        stopped_by: the stop string that matched; nothing is shown from there on.
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
            hold_blank: withhold whitespace at the beginning until text follows, so that `end`
                can drop what is nothing but space between tags.
        """
        self._delta = delta
        self._stop = StopStrings(stop) if stop else None
        self._hold_blank = hold_blank
        self._beginning = hold_blank
        self._blank = ""
        self._segment: list[str] = []
        self._segments: list[str] = []
        self._fed = 0
        self._shown = 0
        self._infos: deque[tuple[int, TokenInfo]] = deque()
        """Tokens not yet told of, with the position in all text where theirs begins."""

    @property
    def stopped_by(self) -> str | None:
        return self._stop.matched if self._stop is not None else None

    @property
    def segment(self) -> str:
        return "".join(self._segment)

    @property
    def text(self) -> str:
        """All that was shown."""
        return "".join(self._segments) + self.segment

    def feed(self, text: str, info: TokenInfo | None = None) -> list[Event]:
        """Text, with the token that it comes from if tokens are to be told of.

        A token that only begins a character brings no text; it goes with the next.
        """
        if info is not None:
            self._infos.append((self._fed, info))
        self._fed += len(text)
        if self._stop is not None:
            text = self._stop.feed(text)
        if self._beginning:
            text = self._blank + text
            if not text or (text.isspace() and self.stopped_by is None):
                self._blank = text
                return []
            self._beginning = False
            self._blank = ""
        return self._show(text) if text else []

    def end(self, *, drop_blank: bool = False) -> list[Event]:
        """The segment is over: show what was withheld."""
        text = self._blank
        if self._stop is not None:
            text += self._stop.flush()
        if drop_blank and self._beginning and (not text or text.isspace()):
            self._infos.clear()
            text = ""
        events = self._show(text) if text else []
        if self._infos and self.stopped_by is None:  # tokens of no text, such as half a character
            events.append(self._delta("", [info for _, info in self._infos]))
        self._infos.clear()
        self._shown = self._fed
        self._segments += self._segment
        self._segment = []
        self._beginning = self._hold_blank
        self._blank = ""
        return events

    def _show(self, text: str) -> list[Event]:
        self._segment.append(text)
        self._shown += len(text)
        infos: list[TokenInfo] = []
        while self._infos and self._infos[0][0] < self._shown:
            infos.append(self._infos.popleft()[1])
        return [self._delta(text, infos)]
