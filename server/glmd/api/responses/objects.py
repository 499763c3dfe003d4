"""Answers of `/v1/responses`: responses, their items, and the events of streams.

They follow OpenAI's schemas (https://github.com/openai/openai-openapi).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal

from pydantic import (
    BaseModel,
    Field,
    RootModel,
    SerializerFunctionWrapHandler,
    model_serializer,
)

from glmd.api.generation_request import Integer, optional
from glmd.api.openai.protocol import TokenLogprob, ToolChoiceMode
from glmd.api.streaming import TokenUsage


class SparseModel(BaseModel):
    """Part of a response in which some fields are absent instead of null."""

    absent: ClassVar[frozenset[str]] = frozenset()
    """Fields that OpenAI's schema does not allow to be null."""

    @model_serializer(mode="wrap")
    def _leave_out(self, serialize: SerializerFunctionWrapHandler) -> dict[str, Any]:
        fields: dict[str, Any] = serialize(self)
        return {k: v for k, v in fields.items() if v is not None or k not in self.absent}


ItemStatus = Literal["in_progress", "completed", "incomplete"]


class OutputText(BaseModel):
    type: Literal["output_text"] = "output_text"
    text: str
    annotations: list[Any] = Field(default_factory=list)
    logprobs: list[TokenLogprob] = Field(default_factory=list, description="If included.")


class ReasoningText(BaseModel):
    type: Literal["reasoning_text"] = "reasoning_text"
    text: str


class SummaryText(BaseModel):
    type: Literal["summary_text"] = "summary_text"
    text: str


class MessageItem(BaseModel):
    id: str
    type: Literal["message"] = "message"
    role: Literal["assistant"] = "assistant"
    status: ItemStatus
    content: list[OutputText]


class ReasoningItem(BaseModel):
    id: str
    type: Literal["reasoning"] = "reasoning"
    status: ItemStatus
    summary: list[SummaryText] = Field(description="The reasoning, if a summary is requested.")
    content: list[ReasoningText] = Field(description="The reasoning, if no summary is requested.")


class FunctionCallItem(SparseModel):
    absent = frozenset({"namespace"})

    id: str
    type: Literal["function_call"] = "function_call"
    status: ItemStatus
    call_id: str
    name: str
    namespace: str | None = None
    arguments: str = Field(description="A JSON object, as text.")


class CustomToolCallItem(SparseModel):
    absent = frozenset({"namespace"})

    id: str
    type: Literal["custom_tool_call"] = "custom_tool_call"
    status: ItemStatus
    call_id: str
    name: str
    namespace: str | None = None
    input: str


class ToolSearchCallItem(BaseModel):
    id: str
    type: Literal["tool_search_call"] = "tool_search_call"
    status: ItemStatus
    call_id: str
    execution: Literal["client"] = "client"
    arguments: dict[str, Any] = Field(description="Empty until the item is done.")


OutputItem = Annotated[
    MessageItem | ReasoningItem | FunctionCallItem | CustomToolCallItem | ToolSearchCallItem,
    Field(discriminator="type"),
]


class InputTokensDetails(BaseModel):
    cached_tokens: int = Field(description="Prompt tokens found in the cache.")
    cache_write_tokens: int = Field(description="Prompt tokens computed and added to the cache.")


class OutputTokensDetails(BaseModel):
    reasoning_tokens: int


class ResponseUsage(BaseModel):
    input_tokens: int
    input_tokens_details: InputTokensDetails
    output_tokens: int
    output_tokens_details: OutputTokensDetails
    total_tokens: int

    @classmethod
    def of(cls, usage: TokenUsage) -> ResponseUsage:
        return cls(
            input_tokens=usage.prompt_tokens,
            input_tokens_details=InputTokensDetails(
                cached_tokens=usage.cached_tokens,
                cache_write_tokens=usage.prompt_tokens - usage.cached_tokens,
            ),
            output_tokens=usage.completion_tokens,
            output_tokens_details=OutputTokensDetails(reasoning_tokens=usage.reasoning_tokens),
            total_tokens=usage.prompt_tokens + usage.completion_tokens,
        )


class ResponseError(BaseModel):
    code: Literal["server_error", "rate_limit_exceeded", "invalid_prompt"]
    message: str


class IncompleteDetails(BaseModel):
    reason: Literal["max_output_tokens"]


class ReasoningConfig(BaseModel):
    effort: str | None
    summary: str | None


class TextOptions(BaseModel):
    format: dict[str, Any]

    @classmethod
    def of(cls, format: Mapping[str, Any] | None) -> TextOptions:
        """The request's format with the fields that OpenAI's schema requires."""
        shown = dict(format or {"type": "text"})
        if shown["type"] == "json_schema":
            shown |= {"name": shown.get("name") or "answer", "strict": bool(shown.get("strict"))}
        return cls(format={key: value for key, value in shown.items() if value is not None})


class ResponseObject(SparseModel):
    """A response, in progress or done."""

    absent = frozenset({"usage", "user"})

    id: str
    object: Literal["response"] = "response"
    created_at: int
    completed_at: int | None = None
    status: Literal["queued", "in_progress", "completed", "incomplete", "failed", "cancelled"] = (
        "in_progress"
    )
    background: bool
    error: ResponseError | None = None
    frequency_penalty: float
    incomplete_details: IncompleteDetails | None = None
    instructions: str | None
    max_output_tokens: Integer | None
    max_tool_calls: None = None
    metadata: dict[str, str]
    model: str
    output: list[OutputItem] = Field(default_factory=list)
    parallel_tool_calls: bool
    presence_penalty: float
    previous_response_id: str | None
    prompt_cache_key: str | None
    reasoning: ReasoningConfig
    safety_identifier: str | None
    service_tier: Literal["default"] = "default"
    store: bool
    temperature: float
    text: TextOptions
    tool_choice: ToolChoiceMode | dict[str, Any]
    tools: list[dict[str, Any]]
    top_logprobs: int
    top_p: float
    truncation: Literal["disabled"] = "disabled"
    usage: ResponseUsage | None = optional("Absent until the response is done.")
    user: str | None = optional("The request's, if any.")


class InputTokenCount(BaseModel):
    object: Literal["response.input_tokens"] = "response.input_tokens"
    input_tokens: int


class InputItemList(BaseModel):
    """A page of a response's input items."""

    object: Literal["list"] = "list"
    data: list[dict[str, Any]]
    first_id: str = Field(description="Empty if the page is.")
    last_id: str = Field(description="Empty if the page is.")
    has_more: bool


class DeletedResponse(BaseModel):
    id: str
    object: Literal["response"] = "response"
    deleted: Literal[True] = True


# -- events of a stream -------------------------------------------------------------------


class NumberedEvent(BaseModel):
    sequence_number: int = Field(description="0 for the stream's first event.")


ResponseEventType = Literal[
    "response.created",
    "response.queued",
    "response.in_progress",
    "response.completed",
    "response.incomplete",
    "response.failed",
]


class ResponseEvent(NumberedEvent):
    type: ResponseEventType
    response: ResponseObject


class ErrorEvent(NumberedEvent):
    """End of a stream whose further events cannot be sent."""

    type: Literal["error"] = "error"
    code: str
    message: str
    param: None = None


class ItemEvent(NumberedEvent):
    type: Literal["response.output_item.added", "response.output_item.done"]
    output_index: int
    item: OutputItem


class EventInItem(NumberedEvent):
    """Optional fields are present where the type has them."""

    output_index: int
    item_id: str
    content_index: Literal[0] | None = None
    summary_index: Literal[0] | None = None


class PartEvent(EventInItem):
    type: Literal[
        "response.content_part.added",
        "response.content_part.done",
        "response.reasoning_summary_part.added",
        "response.reasoning_summary_part.done",
    ]
    part: OutputText | ReasoningText | SummaryText


class DeltaEvent(EventInItem):
    type: Literal[
        "response.output_text.delta",
        "response.reasoning_text.delta",
        "response.reasoning_summary_text.delta",
        "response.function_call_arguments.delta",
        "response.custom_tool_call_input.delta",
    ]
    delta: str = Field(description="Of a custom tool call: the whole input.")
    logprobs: list[TokenLogprob] | None = None


class DoneEvent(EventInItem):
    type: Literal[
        "response.output_text.done",
        "response.reasoning_text.done",
        "response.reasoning_summary_text.done",
        "response.function_call_arguments.done",
        "response.custom_tool_call_input.done",
    ]
    text: str | None = None
    logprobs: list[TokenLogprob] | None = None
    name: str | None = optional("The function's.")
    arguments: str | None = None
    input: str | None = None


class ResponseStreamEvent(
    RootModel[
        Annotated[
            ResponseEvent | ErrorEvent | ItemEvent | PartEvent | DeltaEvent | DoneEvent,
            Field(discriminator="type"),
        ]
    ]
):
    """An event of a stream, whose SSE name is its type."""
