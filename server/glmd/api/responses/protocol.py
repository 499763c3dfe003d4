"""The shapes of the Responses API (https://platform.openai.com/docs/api-reference/responses)."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, Field, RootModel

from glmd.api.generation import Usage as Counted
from glmd.api.openai.protocol import TokenLogprob

Status = Literal["in_progress", "completed", "incomplete", "failed", "cancelled"]
ItemStatus = Literal["in_progress", "completed", "incomplete"]


class OutputText(BaseModel):
    type: Literal["output_text"] = "output_text"
    text: str
    annotations: list[Any] = Field(default_factory=list)
    logprobs: list[TokenLogprob] = Field(default_factory=list, description="If asked for.")


class MessageItem(BaseModel):
    id: str
    type: Literal["message"] = "message"
    role: Literal["assistant"] = "assistant"
    status: ItemStatus
    content: list[OutputText]


class ReasoningText(BaseModel):
    type: Literal["reasoning_text"] = "reasoning_text"
    text: str


class SummaryText(BaseModel):
    type: Literal["summary_text"] = "summary_text"
    text: str


class ReasoningItem(BaseModel):
    id: str
    type: Literal["reasoning"] = "reasoning"
    status: ItemStatus
    summary: list[SummaryText] = Field(description="All the reasoning, if a summary was asked for.")
    content: list[ReasoningText] = Field(description="All the reasoning, if none was.")
    encrypted_content: None = None


class FunctionCallItem(BaseModel):
    id: str
    type: Literal["function_call"] = "function_call"
    status: ItemStatus
    call_id: str
    name: str
    namespace: str | None = None
    arguments: str = Field(description="A JSON object, as text.")


class CustomToolCallItem(BaseModel):
    id: str
    type: Literal["custom_tool_call"] = "custom_tool_call"
    status: ItemStatus
    call_id: str
    name: str
    namespace: str | None = None
    input: str


OutputItem = Annotated[
    MessageItem | ReasoningItem | FunctionCallItem | CustomToolCallItem,
    Field(discriminator="type"),
]


class InputTokensDetails(BaseModel):
    cached_tokens: int = Field(description="Prompt tokens that were not computed again.")
    cache_write_tokens: int = Field(description="Those that were, and are cached now.")


class OutputTokensDetails(BaseModel):
    reasoning_tokens: int


class ResponseUsage(BaseModel):
    input_tokens: int
    input_tokens_details: InputTokensDetails
    output_tokens: int
    output_tokens_details: OutputTokensDetails
    total_tokens: int

    @classmethod
    def of(cls, counted: Counted) -> ResponseUsage:
        return cls(
            input_tokens=counted.prompt_tokens,
            input_tokens_details=InputTokensDetails(
                cached_tokens=counted.cached_tokens,
                cache_write_tokens=counted.prompt_tokens - counted.cached_tokens,
            ),
            output_tokens=counted.completion_tokens,
            output_tokens_details=OutputTokensDetails(reasoning_tokens=counted.reasoning_tokens),
            total_tokens=counted.prompt_tokens + counted.completion_tokens,
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


class ResponseObject(BaseModel):
    """A response, on its way or done."""

    id: str
    object: Literal["response"] = "response"
    created_at: int
    completed_at: int | None = None
    status: Status = "in_progress"
    background: bool
    error: ResponseError | None = None
    incomplete_details: IncompleteDetails | None = None
    instructions: str | None
    max_output_tokens: int | None
    max_tool_calls: None = None
    metadata: dict[str, str]
    model: str
    output: list[OutputItem] = Field(default_factory=list)
    parallel_tool_calls: bool
    previous_response_id: str | None
    reasoning: ReasoningConfig
    service_tier: Literal["default"] = "default"
    store: bool
    temperature: float
    text: TextOptions
    tool_choice: Literal["auto", "none", "required"] | dict[str, Any]
    tools: list[dict[str, Any]]
    top_logprobs: int
    top_p: float
    truncation: Literal["disabled"] = "disabled"
    usage: ResponseUsage | None = None
    user: None = None


class InputTokenCount(BaseModel):
    object: Literal["response.input_tokens"] = "response.input_tokens"
    input_tokens: int


class Deleted(BaseModel):
    id: str
    object: Literal["response"] = "response"
    deleted: Literal[True] = True


# -- what a stream holds ----------------------------------------------------------------------


class Numbered(BaseModel):
    sequence_number: int = Field(description="0 for the stream's first event.")


ResponseEventType = Literal[
    "response.created",
    "response.in_progress",
    "response.completed",
    "response.incomplete",
    "response.failed",
]


class ResponseEvent(Numbered):
    type: ResponseEventType
    response: ResponseObject


class OfItem(Numbered):
    output_index: int


class ItemEvent(OfItem):
    type: Literal["response.output_item.added", "response.output_item.done"]
    item: OutputItem


class OfPart(OfItem):
    item_id: str


class ContentPartEvent(OfPart):
    type: Literal["response.content_part.added", "response.content_part.done"]
    content_index: Literal[0] = 0
    part: OutputText | ReasoningText


class OutputTextDelta(OfPart):
    type: Literal["response.output_text.delta"] = "response.output_text.delta"
    content_index: Literal[0] = 0
    delta: str
    logprobs: list[TokenLogprob]


class OutputTextDone(OfPart):
    type: Literal["response.output_text.done"] = "response.output_text.done"
    content_index: Literal[0] = 0
    text: str
    logprobs: list[TokenLogprob]


class ReasoningTextDelta(OfPart):
    type: Literal["response.reasoning_text.delta"] = "response.reasoning_text.delta"
    content_index: Literal[0] = 0
    delta: str


class ReasoningTextDone(OfPart):
    type: Literal["response.reasoning_text.done"] = "response.reasoning_text.done"
    content_index: Literal[0] = 0
    text: str


class SummaryPartEvent(OfPart):
    type: Literal["response.reasoning_summary_part.added", "response.reasoning_summary_part.done"]
    summary_index: Literal[0] = 0
    part: SummaryText


class SummaryTextDelta(OfPart):
    type: Literal["response.reasoning_summary_text.delta"] = "response.reasoning_summary_text.delta"
    summary_index: Literal[0] = 0
    delta: str


class SummaryTextDone(OfPart):
    type: Literal["response.reasoning_summary_text.done"] = "response.reasoning_summary_text.done"
    summary_index: Literal[0] = 0
    text: str


class ArgumentsDelta(OfPart):
    type: Literal["response.function_call_arguments.delta"] = (
        "response.function_call_arguments.delta"
    )
    delta: str


class ArgumentsDone(OfPart):
    type: Literal["response.function_call_arguments.done"] = "response.function_call_arguments.done"
    name: str
    arguments: str


class CustomInputDelta(OfPart):
    type: Literal["response.custom_tool_call_input.delta"] = "response.custom_tool_call_input.delta"
    delta: str = Field(description="All of the input.")


class CustomInputDone(OfPart):
    type: Literal["response.custom_tool_call_input.done"] = "response.custom_tool_call_input.done"
    input: str


StreamEvent = Annotated[
    ResponseEvent
    | ItemEvent
    | ContentPartEvent
    | OutputTextDelta
    | OutputTextDone
    | ReasoningTextDelta
    | ReasoningTextDone
    | SummaryPartEvent
    | SummaryTextDelta
    | SummaryTextDone
    | ArgumentsDelta
    | ArgumentsDone
    | CustomInputDelta
    | CustomInputDone,
    Field(discriminator="type"),
]


class ResponseStreamEvent(RootModel[StreamEvent]):
    """An event of a stream, where it is named as its type is."""
