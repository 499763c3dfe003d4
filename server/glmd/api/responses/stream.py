"""Events of a response's stream, and the response that they add up to."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import count
from typing import Any, Literal

import pydantic_core

from glmd.api.errors import ErrorInfo
from glmd.api.openai.protocol import TokenLogprob
from glmd.api.responses.input import TOOL_SEARCH, RequestTools
from glmd.api.responses.objects import (
    CustomToolCallItem,
    DeltaEvent,
    DoneEvent,
    EventInItem,
    FunctionCallItem,
    IncompleteDetails,
    ItemEvent,
    ItemStatus,
    MessageItem,
    OutputItem,
    OutputText,
    PartEvent,
    ReasoningItem,
    ReasoningText,
    ResponseError,
    ResponseEvent,
    ResponseEventType,
    ResponseUsage,
    SummaryText,
    ToolSearchCallItem,
)
from glmd.api.responses.store import StoredResponse
from glmd.api.streaming import Generation, StreamEvent, sse_frame
from glmd.chat.history import CUSTOM_INPUT
from glmd.chat.tokenizer import Tokenizer
from glmd.chat.tool_args import record_arguments
from glmd.chat.types import (
    ContentDelta,
    Finished,
    ReasoningDelta,
    ToolCallDelta,
    ToolCallStart,
)


@dataclass(frozen=True, slots=True)
class PartNames:
    """Names in the events of a part with text."""

    part: str
    text: str
    index: Literal["content_index", "summary_index"]


PART_NAMES = {
    "output_text": PartNames("content_part", "output_text", "content_index"),
    "reasoning_text": PartNames("content_part", "reasoning_text", "content_index"),
    "summary_text": PartNames("reasoning_summary_part", "reasoning_summary_text", "summary_index"),
}


class ResponsesBuilder:
    """Events of a response, and the response that they add up to.

    Args:
        stored: The response and its conversation.
        summarise: Write the reasoning as a summary.
        on_done: Called when the response is done, before its last event.
    """

    def __init__(
        self,
        stored: StoredResponse,
        generation: Generation,
        *,
        tools: RequestTools,
        tokenizer: Tokenizer,
        summarise: bool,
        on_done: Callable[[StoredResponse], None],
    ) -> None:
        self.stored = stored
        self.response = stored.response
        self._generation = generation
        self._tools = tools
        self._tokenizer = tokenizer
        self._summarise = summarise
        self._on_done = on_done
        self._numbers = count()
        self._item: OutputItem | None = None
        """The open item, which is the last of the output."""
        self._part: OutputText | ReasoningText | SummaryText | None = None
        """The open part of the open item."""
        self._arguments = ""
        """JSON of the open call's arguments."""
        self._is_incomplete = False

    def queue(self) -> Iterator[bytes]:
        """First events of a response in the background, before those of `start`."""
        self.response.status = "queued"
        yield self._response_event("response.created")
        yield self._response_event("response.queued")

    def start(self) -> Iterator[bytes]:
        self.response.status = "in_progress"
        if not self.response.background:
            yield self._response_event("response.created")
        yield self.heartbeat()

    def heartbeat(self) -> bytes:
        return self._response_event("response.in_progress")

    def add(self, index: int, event: StreamEvent) -> Iterator[bytes]:
        match event:
            case ReasoningDelta(text) if text:
                if not isinstance(self._item, ReasoningItem):
                    yield from self._open_reasoning()
                yield from self._write(text)
            case ContentDelta(text, tokens) if text or tokens:
                if not isinstance(self._item, MessageItem):
                    yield from self._open_message()
                yield from self._write(text, TokenLogprob.of(self._tokenizer, tokens))
            case ToolCallStart(_, id, name):
                yield from self._open(self._new_call(id, name))
                self._arguments = ""
            case ToolCallDelta(_, arguments):
                self._arguments += arguments
                if isinstance(self._item, FunctionCallItem):
                    self._item.arguments += arguments
                    name = "function_call_arguments.delta"
                    yield self._event(DeltaEvent, name, delta=arguments)
            case Finished(reason):
                self._is_incomplete = reason == "length"
                yield from self._close("incomplete" if self._is_incomplete else "completed")

    def end(self) -> Iterator[bytes]:
        response = self.response
        response.usage = ResponseUsage.of(self._generation.usage)
        response.status = "incomplete" if self._is_incomplete else "completed"
        if self._is_incomplete:
            response.incomplete_details = IncompleteDetails(reason="max_output_tokens")
        else:
            response.completed_at = int(time.time())
        self._on_done(self.stored)
        yield self._response_event(
            "response.incomplete" if self._is_incomplete else "response.completed"
        )

    def cancel(self) -> Iterator[bytes]:
        """Last events of a cancelled response; OpenAI has no event of that name."""
        yield from self._close("incomplete")
        self.response.status = "cancelled"
        yield self._response_event("response.incomplete")

    def fail(self, error: ErrorInfo) -> bytes:
        self.response.status = "failed"
        self.response.error = ResponseError(
            code="invalid_prompt" if error.status == 400 else "server_error",
            message=error.message,
        )
        return self._response_event("response.failed")

    def to_json(self) -> str:
        return self.response.model_dump_json()

    # -- items ----------------------------------------------------------------------------

    def _new_id(self, kind: str) -> str:
        """ID of a new item.

        It holds the response's ID, by which `ResponseStore` finds the item.
        """
        return f"{kind}_{self.response.id.removeprefix('resp_')}_{len(self.response.output)}"

    def _new_call(
        self, id: str, full_name: str
    ) -> FunctionCallItem | CustomToolCallItem | ToolSearchCallItem:
        if full_name == TOOL_SEARCH and self._tools.searches:
            return ToolSearchCallItem(
                id=self._new_id("tsc"), status="in_progress", call_id=id, arguments={}
            )
        namespace, name = self._tools.namespaces.get(full_name, (None, full_name))
        fields: dict[str, Any] = {
            "status": "in_progress",
            "call_id": id,
            "name": name,
            "namespace": namespace,
        }
        if full_name in self._tools.custom:
            return CustomToolCallItem(id=self._new_id("ctc"), input="", **fields)
        return FunctionCallItem(id=self._new_id("fc"), arguments="", **fields)

    def _open_message(self) -> Iterator[bytes]:
        item = MessageItem(id=self._new_id("msg"), status="in_progress", content=[])
        yield from self._open(item)
        part = OutputText(text="")
        yield from self._open_part(part)
        item.content.append(part)

    def _open_reasoning(self) -> Iterator[bytes]:
        item = ReasoningItem(id=self._new_id("rs"), status="in_progress", summary=[], content=[])
        yield from self._open(item)
        if self._summarise:
            summary = SummaryText(text="")
            yield from self._open_part(summary)
            item.summary.append(summary)
        else:
            part = ReasoningText(text="")
            yield from self._open_part(part)
            item.content.append(part)

    def _open(self, item: OutputItem) -> Iterator[bytes]:
        yield from self._close()
        self.response.output.append(item)
        self._item = item
        yield self._item_event("response.output_item.added", item)

    def _open_part(self, part: OutputText | ReasoningText | SummaryText) -> Iterator[bytes]:
        self._part = part
        names = PART_NAMES[part.type]
        yield self._event(PartEvent, f"{names.part}.added", **{names.index: 0}, part=part)

    def _write(self, text: str, logprobs: list[TokenLogprob] | None = None) -> Iterator[bytes]:
        """Add text to the open part."""
        part = self._part
        assert part is not None
        part.text += text
        if isinstance(part, OutputText):
            part.logprobs += logprobs or []
        names = PART_NAMES[part.type]
        fields: dict[str, Any] = {names.index: 0, "logprobs": logprobs}
        yield self._event(DeltaEvent, f"{names.text}.delta", delta=text, **fields)

    def _close(self, status: ItemStatus = "completed") -> Iterator[bytes]:
        item, part = self._item, self._part
        if item is None:
            return
        if part is not None:
            names = PART_NAMES[part.type]
            index = {names.index: 0}
            logprobs = part.logprobs if isinstance(part, OutputText) else None
            fields: dict[str, Any] = {"text": part.text, "logprobs": logprobs}
            yield self._event(DoneEvent, f"{names.text}.done", **index, **fields)
            yield self._event(PartEvent, f"{names.part}.done", **index, part=part)
        elif isinstance(item, FunctionCallItem):
            fields = {"name": item.name, "arguments": item.arguments}
            yield self._event(DoneEvent, "function_call_arguments.done", **fields)
        elif isinstance(item, CustomToolCallItem):
            item.input = custom_input(self._arguments)
            yield self._event(DeltaEvent, "custom_tool_call_input.delta", delta=item.input)
            yield self._event(DoneEvent, "custom_tool_call_input.done", input=item.input)
        elif isinstance(item, ToolSearchCallItem):
            item.arguments = record_arguments(self._arguments)
        is_call = isinstance(item, FunctionCallItem | CustomToolCallItem | ToolSearchCallItem)
        item.status = "completed" if is_call and is_json(self._arguments) else status
        self._item = self._part = None
        yield self._item_event("response.output_item.done", item)

    # -- frames ---------------------------------------------------------------------------

    def _response_event(self, type: ResponseEventType) -> bytes:
        event = ResponseEvent(
            type=type, sequence_number=next(self._numbers), response=self.response
        )
        return sse_frame(event.model_dump_json(), event.type)

    def _item_event(
        self,
        type: Literal["response.output_item.added", "response.output_item.done"],
        item: OutputItem,
    ) -> bytes:
        event = ItemEvent(
            type=type,
            sequence_number=next(self._numbers),
            output_index=len(self.response.output) - 1,
            item=item,
        )
        return sse_frame(event.model_dump_json(), event.type)

    def _event(self, model: Callable[..., EventInItem], type: str, **fields: Any) -> bytes:
        """An event within the open item."""
        event = model(
            type=f"response.{type}",
            sequence_number=next(self._numbers),
            output_index=len(self.response.output) - 1,
            item_id=self.response.output[-1].id,
            **fields,
        )
        return sse_frame(event.model_dump_json(exclude_none=True), f"response.{type}")


def custom_input(arguments: str) -> str:
    """Input of a custom tool call, as far as it was generated."""
    partial = pydantic_core.from_json(arguments or "{}", allow_partial="trailing-strings")
    text = partial.get(CUSTOM_INPUT)
    return text if isinstance(text, str) else ""


def is_json(text: str) -> bool:
    try:
        pydantic_core.from_json(text)
    except ValueError:
        return False
    return True
