"""Engine outputs of one sequence to events."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from glmd.chat.detokenizer import Detokenizer, TextStream
from glmd.chat.glm4_parser import Glm4OutputParser
from glmd.chat.tokenizer import Tokenizer
from glmd.chat.tool_args import arguments_of
from glmd.chat.turn_cache import GeneratedTurn
from glmd.chat.types import (
    AssistantMessage,
    ContentDelta,
    Event,
    Finished,
    Prompt,
    ReasoningDelta,
    TokenInfo,
    Tool,
    ToolCall,
    ToolCallDelta,
    ToolCallStart,
)
from glmd.errors import InvalidRequest
from glmd.ipc import FinishReason, SequenceOutput


class ChatOutputProcessor:
    """A chat answer: detokenizer, parser, stop strings, logprobs, finish reason.

    Attributes:
        completion_tokens: number of tokens generated so far, end token included.
        reasoning_tokens: number of tokens in the reasoning, `</think>` included.
        finished: the answer is complete; later outputs are ignored.
        stopped: a stop string matched or a second call was refused, so the caller should abort the
            sequence in the engine.
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
            tools: the tools that may be called. Without any (`tool_choice: "none"`), calls are
                dropped from the answer.
            stop: stop strings, matched in content only, not in reasoning and arguments.
            single_call: end the answer before a second call.
        """
        self.completion_tokens = 0
        self.reasoning_tokens = 0
        self.finished = False
        self.stopped = False
        self._tokenizer = tokenizer
        self._spellings = tokenizer.spellings
        self._parser = Glm4OutputParser(
            tokenizer.special_tokens, tools, in_reasoning=prompt.in_reasoning
        )
        self._detokenizer = Detokenizer()
        self._reasoning = TextStream(ReasoningDelta)
        self._content = TextStream(ContentDelta, stop=stop, hold_blank=True)
        self._calls: list[tuple[ToolCallStart, list[str]]] = []
        self._tokens: list[int] = []
        self._section_start = 0
        """Index into `_tokens` of the present section's first token."""
        self._single_call = single_call
        self._call_start = 0
        """Index into `_tokens` of the last `<tool_call>`."""
        self._refused_call = False
        """A second call was refused."""
        self._is_complete = False
        """The answer ended by an end token, its length limit, or a stop string."""

    def feed(self, output: SequenceOutput) -> list[Event]:
        """Take one engine output, and return its events in order.

        An output that ends "cancelled" or "error" returns the last text without `Finished`.
        """
        if self.finished:
            return []
        events: list[Event] = []
        tokens = output.tokens
        self.completion_tokens += len(tokens)
        if output.finish_reason == "stop" and tokens and not self._is_tag_in_turn(tokens[-1]):
            tokens = tokens[:-1]
        data = b""
        for index, token in enumerate(tokens):
            if self._refused_call:
                break
            self._tokens.append(token)
            if self._parser.section == "reasoning":
                self.reasoning_tokens += 1
            if token in self._spellings:
                events += self._bytes(data)
                data = b""
                events += self._tag(token)
            elif output.logprobs is None:
                data += self._tokenizer.token_bytes(token)
            else:
                info = TokenInfo(token, output.logprobs[index])
                events += self._bytes(self._tokenizer.token_bytes(token), info)
        events += self._bytes(data)
        if self.stopped or output.finish_reason is not None:
            events += self._finish(output.finish_reason or "stop")
        return events

    def turn(self) -> GeneratedTurn | None:
        """The finished answer for `TurnTokenCache`; None if the turn cannot be reused.

        A turn cannot be reused if it ends inside a call, if a call was dropped, or if it contains a
        token that ends a turn. A refused second call is not part of the turn.
        """
        parser = self._parser
        if not self._is_complete or parser.has_dropped_call or parser.has_incomplete_call:
            return None
        if not self._tokenizer.special.isdisjoint(self._tokens):
            return None
        closing = parser.closing()
        if self._refused_call:
            closing = ()
            tags = [token for token in self._tokens if token in self._spellings]
            if tags[-1] != self._tokenizer.special_tokens.end_tool_call:
                return None
        try:
            calls = tuple(
                ToolCall(start.id, start.name, arguments_of("".join(pieces), "arguments"))
                for start, pieces in self._calls
            )
        except InvalidRequest:  # not readable when the client sends it back, such as 1e999
            return None
        seen = AssistantMessage(self._content.text, self._reasoning.text, calls)
        return GeneratedTurn(seen, np.array(self._tokens, np.int32), closing)

    def _is_tag_in_turn(self, token: int) -> bool:
        """Whether a last token is a tag of the answer, rather than an end token."""
        return token in self._spellings and token not in self._tokenizer.special

    def _bytes(self, data: bytes, info: TokenInfo | None = None) -> list[Event]:
        return self._text(self._detokenizer.feed(data), info) if data else []

    def _text(self, text: str, info: TokenInfo | None = None) -> list[Event]:
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
                return self._add_call_events(self._parser.call_text(text)) if text else []

    def _tag(self, token: int) -> list[Event]:
        events = self._text(self._detokenizer.flush())
        if self.stopped:
            return events
        section, num_opened = self._parser.section, self._parser.num_opened_calls
        call_events = self._parser.tag(token, self._spellings[token])
        if self._parser.num_opened_calls != num_opened:
            self._call_start = len(self._tokens) - 1
        if self._parser.section != section:
            self._section_start = len(self._tokens)
            if section == "reasoning":
                events += self._reasoning.end()
            elif section == "content":
                events += self._content.end(drop_blank=True)
        return events + self._add_call_events(call_events)

    def _add_call_events(self, events: list[Event]) -> list[Event]:
        """Record the calls, and return the events up to a refused second call."""
        for number, event in enumerate(events):
            if isinstance(event, ToolCallStart):
                if self._single_call and self._calls:
                    self.stopped = self._refused_call = True
                    del self._tokens[self._call_start :]
                    return events[:number]
                self._calls.append((event, []))
            elif isinstance(event, ToolCallDelta):
                self._calls[-1][1].append(event.arguments)
        return events

    def _finish(self, finish: FinishReason) -> list[Event]:
        self.finished = True
        if self._refused_call:
            self._is_complete = True
            return [Finished("tool_calls")]
        events = self._text(self._detokenizer.flush())
        if self.stopped:
            finish = "stop"
            self._tokens = self._shown_tokens()
        events += self._add_call_events(self._parser.end(cut=finish != "stop"))
        events += self._reasoning.end()
        events += self._content.end(drop_blank=bool(self._calls))
        if finish == "length":
            events.append(Finished("length"))
        elif finish == "stop":
            events.append(
                Finished("tool_calls" if self._calls else "stop", self._content.stopped_by)
            )
        self._is_complete = finish in ("stop", "length")
        return events

    def _shown_tokens(self) -> list[int]:
        """Token ids of the text before a stop string, which may start inside a token."""
        shown = self._content.segment.encode()
        tokens = self._tokens[self._section_start :]
        token_bytes = [
            b"" if token in self._spellings else self._tokenizer.token_bytes(token)
            for token in tokens
        ]
        count = length = 0
        for data in token_bytes:
            if shown[length : length + len(data)] != data:
                break
            count += 1
            length += len(data)
        while length < len(shown) and shown[length] & 0xC0 == 0x80:  # inside a character
            count -= 1
            length -= len(token_bytes[count])
        rest = self._tokenizer.encode(shown[length:].decode())
        return self._tokens[: self._section_start] + tokens[:count] + rest


class CompletionOutputProcessor:
    """A raw text completion: all text is content, and tags are not parsed.

    The text of special tokens is dropped; other tags, such as `<think>`, are spelled out.

    Attributes: as of `ChatOutputProcessor`; `reasoning_tokens` is 0.
    """

    def __init__(
        self, tokenizer: Tokenizer, *, stop: Sequence[str] = (), with_end: bool = False
    ) -> None:
        """
        Args:
            with_end: report the log-probabilities of the end token, too.
        """
        self.completion_tokens = 0
        self.reasoning_tokens = 0
        self.finished = False
        self.stopped = False
        self._tokenizer = tokenizer
        self._detokenizer = Detokenizer()
        self._content = TextStream(ContentDelta, stop=stop)
        self._with_end = with_end

    def feed(self, output: SequenceOutput) -> list[Event]:
        """Take one engine output, and return its events in order."""
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
        if output.finish_reason == "stop" and output.logprobs is not None and self._with_end:
            events += self._content.feed("", TokenInfo(output.tokens[-1], output.logprobs[-1]))
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
