"""From events to a response: the events of its stream, and the object that they add up to."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from itertools import count
from typing import TypedDict

import pydantic_core

from glmd.api.error_info import ErrorInfo
from glmd.api.generation import Generation
from glmd.api.openai.protocol import TokenLogprob
from glmd.api.responses.protocol import (
    ArgumentsDelta,
    ArgumentsDone,
    ContentPartEvent,
    CustomInputDelta,
    CustomInputDone,
    CustomToolCallItem,
    FunctionCallItem,
    IncompleteDetails,
    ItemEvent,
    ItemStatus,
    MessageItem,
    OutputItem,
    OutputText,
    OutputTextDelta,
    OutputTextDone,
    ReasoningItem,
    ReasoningText,
    ReasoningTextDelta,
    ReasoningTextDone,
    ResponseError,
    ResponseEvent,
    ResponseEventType,
    ResponseObject,
    ResponseUsage,
    StreamEvent,
    SummaryPartEvent,
    SummaryText,
    SummaryTextDelta,
    SummaryTextDone,
)
from glmd.api.responses.tools import INPUT, Tools
from glmd.chat.events import (
    ContentDelta,
    Event,
    Finished,
    ReasoningDelta,
    TokenInfo,
    ToolCallDelta,
    ToolCallStart,
)


class Place(TypedDict):
    sequence_number: int
    output_index: int
    item_id: str


class ResponsesBuilder:
    """Tells an answer's events, and adds them to the response (a `glmd.api.streaming.Teller`).

    What it tells holds parts of the response as they are at that moment.

    Attributes:
        response: what there is of it.
    """

    def __init__(
        self,
        response: ResponseObject,
        generation: Generation,
        *,
        summarise: bool,
        tools: Tools,
        spell: Callable[[Sequence[TokenInfo]], list[TokenLogprob]],
        on_end: Callable[[], None] | None = None,
    ) -> None:
        """
        Args:
            summarise: the reasoning is to come as a summary.
            tools: that the answer may call.
            spell: log-probabilities as the client reads them.
            on_end: called when the response is done, before the last event tells it.
        """
        self.response = response
        self._generation = generation
        self._summarise = summarise
        self._tools = tools
        self._arguments = ""
        """JSON of the open call's arguments."""
        self._spell = spell
        self._on_end = on_end
        self._numbers = count()
        self._is_open = False
        self._cut = False
        """The answer reached its limit."""

    def start(self) -> Iterator[StreamEvent]:
        yield self._of_response("response.created")
        yield self.keep_alive()

    def keep_alive(self) -> StreamEvent:
        return self._of_response("response.in_progress")

    def add(self, event: Event) -> Iterator[StreamEvent]:
        match event:
            case ReasoningDelta(text) if text:
                yield from self._think(text)
            case ContentDelta(text, tokens) if text or tokens:
                yield from self._say(text, self._spell(tokens))
            case ToolCallStart(_, id, name):
                yield from self._close()
                yield from self._open(self._call(id, name))
                self._arguments = ""
            case ToolCallDelta(_, arguments):
                self._arguments += arguments
                if isinstance(call := self._item, FunctionCallItem):
                    call.arguments += arguments
                    yield ArgumentsDelta(**self._place, delta=arguments)
            case Finished(reason):
                self._cut = reason == "length"
                yield from self._close("incomplete" if self._cut else "completed")

    def end(self) -> Iterator[StreamEvent]:
        response = self.response
        response.usage = ResponseUsage.of(self._generation.usage)
        response.status = "incomplete" if self._cut else "completed"
        if self._cut:
            response.incomplete_details = IncompleteDetails(reason="max_output_tokens")
        else:
            response.completed_at = int(time.time())
        if self._on_end is not None:
            self._on_end()
        yield self._of_response("response.incomplete" if self._cut else "response.completed")

    def fail(self, problem: ErrorInfo) -> StreamEvent:
        """The last event of an answer that broke off."""
        self.response.status = "failed"
        self.response.error = ResponseError(
            code="invalid_prompt" if problem.status == 400 else "server_error",
            message=problem.message,
        )
        return self._of_response("response.failed")

    # -- items ----------------------------------------------------------------------------

    @property
    def _item(self) -> OutputItem | None:
        """The open one."""
        return self.response.output[-1] if self._is_open else None

    @property
    def _index(self) -> int:
        return len(self.response.output) - 1

    @property
    def _place(self) -> Place:
        """Of the next event, within the open item."""
        return {
            "sequence_number": next(self._numbers),
            "output_index": self._index,
            "item_id": self.response.output[-1].id,
        }

    def _new_id(self, kind: str) -> str:
        """An item's id tells its response's: `store` finds what is referred to by id alone."""
        return f"{kind}_{self.response.id.removeprefix('resp_')}_{len(self.response.output)}"

    def _of_response(self, type: ResponseEventType) -> ResponseEvent:
        return ResponseEvent(type=type, sequence_number=next(self._numbers), response=self.response)

    def _open(self, item: OutputItem) -> Iterator[StreamEvent]:
        self.response.output.append(item)
        self._is_open = True
        yield ItemEvent(
            type="response.output_item.added",
            sequence_number=next(self._numbers),
            output_index=self._index,
            item=item,
        )

    def _call(self, id: str, name: str) -> FunctionCallItem | CustomToolCallItem:
        """The item of a call that begins."""
        is_custom = name in self._tools.custom
        namespace, name = self._tools.names.get(name, (None, name))
        if is_custom:
            return CustomToolCallItem(
                id=self._new_id("ctc"),
                status="in_progress",
                call_id=id,
                name=name,
                namespace=namespace,
                input="",
            )
        return FunctionCallItem(
            id=self._new_id("fc"),
            status="in_progress",
            call_id=id,
            name=name,
            namespace=namespace,
            arguments="",
        )

    def _say(self, text: str, logprobs: list[TokenLogprob]) -> Iterator[StreamEvent]:
        item = self._item
        if not isinstance(item, MessageItem):
            yield from self._close()
            item = MessageItem(id=self._new_id("msg"), status="in_progress", content=[])
            yield from self._open(item)
            part = OutputText(text="")
            yield ContentPartEvent(type="response.content_part.added", **self._place, part=part)
            item.content.append(part)
        item.content[0].text += text
        item.content[0].logprobs += logprobs
        yield OutputTextDelta(**self._place, delta=text, logprobs=logprobs)

    def _think(self, text: str) -> Iterator[StreamEvent]:
        item = self._item
        if not isinstance(item, ReasoningItem):
            yield from self._close()
            item = ReasoningItem(
                id=self._new_id("rs"), status="in_progress", summary=[], content=[]
            )
            yield from self._open(item)
            if self._summarise:
                summary = SummaryText(text="")
                yield SummaryPartEvent(
                    type="response.reasoning_summary_part.added", **self._place, part=summary
                )
                item.summary.append(summary)
            else:
                part = ReasoningText(text="")
                yield ContentPartEvent(type="response.content_part.added", **self._place, part=part)
                item.content.append(part)
        if self._summarise:
            item.summary[0].text += text
            yield SummaryTextDelta(**self._place, delta=text)
        else:
            item.content[0].text += text
            yield ReasoningTextDelta(**self._place, delta=text)

    def _close(self, status: ItemStatus = "completed") -> Iterator[StreamEvent]:
        item = self._item
        match item:
            case None:
                return
            case MessageItem(content=[said]):
                yield OutputTextDone(**self._place, text=said.text, logprobs=said.logprobs)
                yield ContentPartEvent(type="response.content_part.done", **self._place, part=said)
            case ReasoningItem(summary=[summary]):
                yield SummaryTextDone(**self._place, text=summary.text)
                yield SummaryPartEvent(
                    type="response.reasoning_summary_part.done", **self._place, part=summary
                )
            case ReasoningItem(content=[thought]):
                yield ReasoningTextDone(**self._place, text=thought.text)
                yield ContentPartEvent(
                    type="response.content_part.done", **self._place, part=thought
                )
            case FunctionCallItem():
                yield ArgumentsDone(**self._place, name=item.name, arguments=item.arguments)
            case CustomToolCallItem():
                item.input = input_of(self._arguments)
                yield CustomInputDelta(**self._place, delta=item.input)
                yield CustomInputDone(**self._place, input=item.input)
        is_call = isinstance(item, FunctionCallItem | CustomToolCallItem)
        whole = is_call and is_json(self._arguments)
        item.status = "completed" if whole else status
        self._is_open = False
        yield ItemEvent(
            type="response.output_item.done",
            sequence_number=next(self._numbers),
            output_index=self._index,
            item=item,
        )


def input_of(arguments: str) -> str:
    """The text that a custom tool is called with, as far as it was written."""
    given = pydantic_core.from_json(arguments or "{}", allow_partial="trailing-strings")
    text = given.get(INPUT)
    return text if isinstance(text, str) else ""


def is_json(text: str) -> bool:
    try:
        pydantic_core.from_json(text)
    except ValueError:
        return False
    return True
