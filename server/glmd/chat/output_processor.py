"""One sequence's way from engine outputs to events."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import numpy as np

from glmd.chat.detokenizer import Detokenizer
from glmd.chat.events import (
    ContentDelta,
    Event,
    Finished,
    ReasoningDelta,
    TokenInfo,
    ToolCallDelta,
    ToolCallStart,
)
from glmd.chat.glm4_parser import Glm4OutputParser
from glmd.chat.messages import AssistantMessage, ToolCall, arguments_of
from glmd.chat.prompt import Prompt
from glmd.chat.text_stream import TextStream
from glmd.chat.tokenizer import Tokenizer
from glmd.chat.tools import Tool
from glmd.chat.turn_cache import GeneratedTurn
from glmd.errors import InvalidRequest
from glmd.ipc import FinishReason, SequenceOutput


class ChatOutputProcessor:
    """A chat answer: detokenizer, parser, stop strings, log-probabilities, finish reason.

    Attributes:
        completion_tokens: tokens generated so far, end token included.
        reasoning_tokens: those of them in the reasoning, `</think>` included.
        finished: the answer is over; later outputs are ignored.
        stopped: a stop string matched or a call too many began, so the engine should be told to
            cancel the sequence.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        prompt: Prompt,
        *,
        tools: Sequence[Tool] = (),
        stop: Sequence[str] = (),
        single_call: bool = False,
    ) -> None:
        """
        Args:
            tools: the tools that may be called; none (no tools, `tool_choice: "none"`) means that
                a call the model writes anyway is left out, markup and all.
            stop: stop strings, matched over content only: not in reasoning, not in arguments.
            single_call: the answer ends where a second call begins.
        """
        self.completion_tokens = 0
        self.reasoning_tokens = 0
        self.finished = False
        self.stopped = False
        self._tokenizer = tokenizer
        self._spellings = tokenizer.spellings
        self._parser = Glm4OutputParser(tokenizer.tags, tools, in_reasoning=prompt.in_reasoning)
        self._detokenizer = Detokenizer()
        self._reasoning = TextStream(ReasoningDelta)
        self._content = TextStream(ContentDelta, stop=stop, hold_blank=True)
        self._calls: list[tuple[ToolCallStart, list[str]]] = []
        self._tokens: list[int] = []
        self._section_start = 0
        """Index into `_tokens` where the present section began."""
        self._single_call = single_call
        self._call_start = 0
        """Index into `_tokens` of the last call's `<tool_call>`."""
        self._has_call_too_many = False
        self._whole = False
        """The answer ended as answers do: by itself, at its limit, or at a stop string."""

    def feed(self, output: SequenceOutput) -> list[Event]:
        """Events of one engine output, in order.

        An output that ends "cancelled" or "error" gives what text was left, and no `Finished`:
        the caller knows what happened.
        """
        if self.finished:
            return []
        events: list[Event] = []
        tokens = output.tokens
        self.completion_tokens += len(tokens)
        if output.finish_reason == "stop" and tokens and not self._is_ours(tokens[-1]):
            tokens = tokens[:-1]
        data = b""
        for index, token in enumerate(tokens):
            if self._has_call_too_many:
                break
            self._tokens.append(token)
            if self._parser.section == "reasoning":
                self.reasoning_tokens += 1
            if token in self._spellings:
                events += self._text(data)
                data = b""
                events += self._tag(token)
            elif output.logprobs is None:
                data += self._tokenizer.token_bytes(token)
            else:
                info = TokenInfo(token, output.logprobs[index])
                events += self._text(self._tokenizer.token_bytes(token), info)
        events += self._text(data)
        if self.stopped or output.finish_reason is not None:
            events += self._finish(output.finish_reason or "stop")
        return events

    def turn(self) -> GeneratedTurn | None:
        """What to remember (`TurnTokenCache.remember`) of the finished answer, if anything.

        Nothing of one that broke off inside a call, that holds a call the client was not told of,
        or a tag that would open a turn. A call too many is not part of it.
        """
        parser = self._parser
        if not self._whole or parser.dropped_calls or parser.broken_calls:
            return None
        if not self._tokenizer.special.isdisjoint(self._tokens):
            return None
        closing = parser.closing()
        if self._has_call_too_many:
            closing = ()
            tags = [token for token in self._tokens if token in self._spellings]
            if tags[-1] != self._tokenizer.tags.end_tool_call:
                return None
        try:
            calls = tuple(
                ToolCall(start.id, start.name, arguments_of("".join(pieces), "arguments"))
                for start, pieces in self._calls
            )
        except InvalidRequest:  # nested more deeply than could be read when it returns
            return None
        seen = AssistantMessage(self._content.text, self._reasoning.text, calls)
        return GeneratedTurn(seen, np.array(self._tokens, np.int32), closing)

    def _is_ours(self, token: int) -> bool:
        """A tag that means something even as the last token (a stop token): not an end token."""
        return token in self._spellings and token not in self._tokenizer.special

    def _text(self, data: bytes, info: TokenInfo | None = None) -> list[Event]:
        if not data:
            return []
        return self._place(self._detokenizer.feed(data), info)

    def _place(self, text: str, info: TokenInfo | None = None) -> list[Event]:
        if not text and info is None:
            return []
        match self._parser.section:
            case "reasoning":
                return self._reasoning.feed(text, info)
            case "content":
                events = self._content.feed(text, info)
                self.stopped = self._content.stopped_by is not None
                return events
            case "call":
                return self._record(self._parser.call_text(text)) if text else []

    def _tag(self, token: int) -> list[Event]:
        events = self._place(self._detokenizer.flush())
        if self.stopped:
            return events
        before, opened = self._parser.section, self._parser.opened_calls
        told = self._parser.tag(token, self._spellings[token])
        if self._parser.opened_calls != opened:
            self._call_start = len(self._tokens) - 1
        if self._parser.section != before:
            self._section_start = len(self._tokens)
            if before == "reasoning":
                events += self._reasoning.end()
            elif before == "content":
                events += self._content.end(drop_blank=True)
        return events + self._record(told)

    def _record(self, events: list[Event]) -> list[Event]:
        """Take note of calls; gives the events that are to be told."""
        for number, event in enumerate(events):
            if isinstance(event, ToolCallStart):
                if self._single_call and self._calls:
                    self.stopped = self._has_call_too_many = True
                    del self._tokens[self._call_start :]
                    return events[:number]
                self._calls.append((event, []))
            elif isinstance(event, ToolCallDelta):
                self._calls[-1][1].append(event.arguments)
        return events

    def _finish(self, finish: FinishReason) -> list[Event]:
        self.finished = True
        if self._has_call_too_many:
            self._whole = True
            return [Finished("tool_calls")]
        events = self._place(self._detokenizer.flush())
        if self.stopped:
            finish = "stop"
            self._tokens = self._shown_tokens()
        events += self._record(self._parser.end(cut=finish != "stop"))
        events += self._reasoning.end()
        events += self._content.end(drop_blank=bool(self._calls))
        if finish == "length":
            events.append(Finished("length"))
        elif finish == "stop":
            reason: Literal["tool_calls", "stop"] = "tool_calls" if self._calls else "stop"
            events.append(Finished(reason, self._content.stopped_by))
        self._whole = finish in ("stop", "length")
        return events

    def _shown_tokens(self) -> list[int]:
        """The generated ids as far as the client sees them: to the last character before a stop
        string, which may lie inside a token."""
        shown = self._content.segment.encode()
        tokens = self._tokens[self._section_start :]
        texts = [
            b"" if token in self._spellings else self._tokenizer.token_bytes(token)
            for token in tokens
        ]
        count = length = 0
        for data in texts:
            if shown[length : length + len(data)] != data:
                break
            count += 1
            length += len(data)
        while length < len(shown) and shown[length] & 0xC0 == 0x80:  # inside a character
            count -= 1
            length -= len(texts[count])
        rest = self._tokenizer.encode(shown[length:].decode())
        return self._tokens[: self._section_start] + tokens[:count] + rest


class CompletionOutputProcessor:
    """A raw text completion: everything is content, stop strings apply, tags are not parsed.

    Special tokens are left out of the text; other tags (`<think>`) are spelled.

    Attributes: as `ChatOutputProcessor`'s; `reasoning_tokens` is 0.
    """

    def __init__(self, tokenizer: Tokenizer, *, stop: Sequence[str] = ()) -> None:
        self.completion_tokens = 0
        self.reasoning_tokens = 0
        self.finished = False
        self.stopped = False
        self._tokenizer = tokenizer
        self._detokenizer = Detokenizer()
        self._content = TextStream(ContentDelta, stop=stop)

    def feed(self, output: SequenceOutput) -> list[Event]:
        """Events of one engine output: content, and `Finished` at the end."""
        if self.finished:
            return []
        events: list[Event] = []
        tokens = output.tokens[:-1] if output.finish_reason == "stop" else output.tokens
        self.completion_tokens += len(output.tokens)
        for index, token in enumerate(tokens):
            special = token in self._tokenizer.special
            data = b"" if special else self._tokenizer.token_bytes(token)
            info = None if output.logprobs is None else TokenInfo(token, output.logprobs[index])
            events += self._content.feed(self._detokenizer.feed(data), info)
        if output.finish_reason is not None:
            events += self._content.feed(self._detokenizer.flush())
        self.stopped = self._content.stopped_by is not None
        if output.finish_reason is None and not self.stopped:
            return events
        self.finished = True
        events += self._content.end()
        if self.stopped or output.finish_reason == "stop":
            events.append(Finished("stop", self._content.stopped_by))
        elif output.finish_reason == "length":
            events.append(Finished("length"))
        return events
