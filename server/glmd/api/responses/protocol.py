"""Requests, responses and events of `/v1/responses`.

See https://platform.openai.com/docs/api-reference/responses.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal

from pydantic import (
    BaseModel,
    BeforeValidator,
    Field,
    RootModel,
    SerializerFunctionWrapHandler,
    model_serializer,
)

from glmd.api.generation_request import (
    NO_OP,
    Defaults,
    Effort,
    FailFastList,
    GenerationRequest,
    Integer,
    NoOp,
    RequestFields,
    StrictModel,
    limit_members,
    new_id,
    optional,
)
from glmd.api.observability.request_stats import Api
from glmd.api.openai.input import OpenAINoOps, check_stream_options
from glmd.api.openai.protocol import AllowedTools, TokenLogprob, ToolChoiceMode
from glmd.api.responses.input import (
    INPUT_SCHEMA,
    TOOLS_SCHEMA,
    InputItems,
    RequestTools,
    full_name,
)
from glmd.api.streaming import TokenUsage
from glmd.chat.history import HistoryReader
from glmd.chat.types import Conversation
from glmd.errors import invalid_field
from glmd.structured_output.request import make_structure, read_response_format

LOGPROBS = "message.output_text.logprobs"

MAX_SAFETY_IDENTIFIER = 64
"""Characters, by OpenAI's schema."""

# -- the request --------------------------------------------------------------------------


Summary = Literal["auto", "concise", "detailed"]


class Reasoning(StrictModel):
    effort: Effort = optional(
        "none: no thinking. Other efforts limit the reasoning to the tokens of the"
        " server's setting effort_budgets."
    )
    summary: Summary | None = optional("Write the reasoning as a summary, in full.")
    generate_summary: Summary | None = optional("The older name of summary.")
    context: Literal["auto", "current_turn", "all_turns"] | None = optional(
        "current_turn: drop earlier reasoning."
    )
    mode: Literal["standard"] | None = None

    @property
    def any_summary(self) -> str | None:
        return self.summary or self.generate_summary


class TextConfig(StrictModel):
    format: dict[str, Any] | None = optional("text, json_object or json_schema.")
    verbosity: NoOp = None


Metadata = dict[str, Annotated[str, Field(max_length=512)]]


class ToolChoiceName(StrictModel):
    """Function or custom tool to call."""

    type: Literal["function", "custom"]
    name: str
    namespace: str | None = None


class AllowedToolsChoice(AllowedTools):
    """The tools that may be called, of those that the prompt describes."""

    type: Literal["allowed_tools"]


class ResponsesStreamOptions(StrictModel):
    include_obfuscation: NoOp = None


def echoed(limit: int | None = None) -> BeforeValidator:
    """Keep a text of at most `limit` characters, which the response can show."""

    def keep(value: object) -> str | None:
        is_kept = isinstance(value, str) and (limit is None or len(value) <= limit)
        return str(value) if is_kept else None

    return BeforeValidator(keep)


class ResponsesRequest(RequestFields, OpenAINoOps):
    api: ClassVar[Api] = "responses"
    refused: ClassVar = {
        "conversation": "conversations are not stored. Send previous_response_id.",
        "prompt": "there are no stored prompts. Send instructions and input.",
        "moderation": "moderation is not available.",
        "stop": "the Responses API has no stop strings. Use /v1/chat/completions.",
        "n": "the Responses API gives one answer. Use /v1/chat/completions.",
        "max_tokens": "use max_output_tokens.",
        "max_completion_tokens": "use max_output_tokens.",
        "messages": "use input.",
        "response_format": "use text.format.",
    }

    input: str | FailFastList[dict[str, Any]] | None = Field(
        default=None,
        description="May be absent with previous_response_id.",
        json_schema_extra=INPUT_SCHEMA,
    )
    instructions: str | None = optional("System message for this answer only.")
    previous_response_id: str | None = optional("Stored response to continue.")
    tools: FailFastList[dict[str, Any]] | None = optional(
        "Functions and custom tools, also in namespaces. Hosted tools are ignored.",
        json_schema_extra=TOOLS_SCHEMA,
    )
    tool_choice: ToolChoiceMode | ToolChoiceName | AllowedToolsChoice | None = optional(
        "auto: the default."
    )
    parallel_tool_calls: bool | None = optional("False: the answer ends after its first tool call.")
    reasoning: Reasoning | None = None
    text: TextConfig | None = None
    max_output_tokens: Integer | None = optional("Limit of the answer, reasoning included.", ge=1)
    include: FailFastList[str] | None = optional(
        f"{LOGPROBS}: log-probabilities of the answer's tokens."
        " reasoning.encrypted_content: no effect, because reasoning is plain text."
    )
    top_logprobs: Integer | None = optional(
        "Alternatives per token; implies logprobs.", ge=0, le=20
    )
    stream_options: ResponsesStreamOptions | None = None
    background: bool | None = optional("Respond at once; retrieve the answer later.")
    store: bool | None = optional("False: the response is not stored.")
    metadata: Annotated[Metadata | None, limit_members(16)] = optional(
        "Stored with the response.", max_length=16
    )
    truncation: Literal["auto", "disabled"] | None = optional(NO_OP + " Long prompts are refused.")
    prompt_cache_key: Annotated[str | None, echoed()] = optional(
        NO_OP + " Prefixes are cached by content. Shown in the response."
    )
    safety_identifier: Annotated[str | None, echoed(MAX_SAFETY_IDENTIFIER)] = optional(
        NO_OP + " Shown in the response."
    )
    user: Annotated[str | None, echoed()] = optional(NO_OP + " Shown in the response.")
    max_tool_calls: NoOp = optional(NO_OP + " It counts hosted tools.")
    context_management: NoOp = optional(NO_OP + " Nothing is dropped or edited.")
    client_metadata: NoOp = None

    @property
    def new_input(self) -> str | list[dict[str, Any]]:
        """The input; empty if the request only continues a response.

        Raises:
            InvalidRequest: there is no response to continue, either.
        """
        if self.input is None and not self.previous_response_id:
            raise invalid_field("input", "is missing. Send input or previous_response_id.")
        return self.input if self.input is not None else []

    def to_generation_request(
        self, defaults: Defaults, items: InputItems, tools: RequestTools
    ) -> GenerationRequest:
        """Check the request and put it into neutral form.

        Raises:
            InvalidRequest: a field is malformed, unsupported or contradicts another field.
        """
        if self.background and self.stream:
            raise invalid_field("background", "cannot be combined with stream.")
        check_stream_options(self.stream_options, self.stream)
        if self.background and self.store is False:
            raise invalid_field("background", "needs store to be true.")
        logprobs = self.top_logprobs
        if logprobs is None and LOGPROBS in (self.include or ()):
            logprobs = 0
        choice = self.tool_choice
        named = None
        if isinstance(choice, ToolChoiceName):
            named = full_name(choice.namespace, choice.name)
        allowed = choice if isinstance(choice, AllowedToolsChoice) else None
        names = allowed.names("tool_choice.tools") if allowed else None
        calls = choice != "none" and names != []
        conversation = self.conversation(defaults, items, tools)
        effort = self.reasoning.effort if self.reasoning else None
        return GenerationRequest(
            id=new_id("resp_"),
            prompt=conversation,
            param="input",
            sampling=self.sampling(defaults.sampling, logprobs),
            tools=conversation.tools if calls else (),
            output=make_structure(
                read_response_format(
                    self.text.format if self.text else None, "text.format", flat=True
                ),
                conversation.offered if calls else (),
                required=choice == "required" or bool(allowed and allowed.mode == "required"),
                named=named,
                allowed=names,
                parallel=self.parallel_tool_calls is not False,
            ),
            max_tokens=self.max_output_tokens or defaults.max_tokens,
            thinking_budget=defaults.effort_budgets.get(effort),
            single_call=self.parallel_tool_calls is False,
            ignored=tools.ignored,
        )

    def conversation(
        self, defaults: Defaults, items: InputItems, tools: RequestTools
    ) -> Conversation:
        """The conversation, with all tools.

        Raises:
            InvalidRequest: an item is malformed.
        """
        enable_thinking, clear_thinking = defaults.enable_thinking, defaults.clear_thinking
        if self.reasoning is not None and self.reasoning.effort is not None:
            enable_thinking = self.reasoning.effort != "none"
        if self.reasoning is not None and self.reasoning.context not in (None, "auto"):
            clear_thinking = self.reasoning.context == "current_turn"
        reader = HistoryReader(tools.functions)
        return Conversation(
            messages=items.messages(self.instructions, reader, tools),
            tools=list(reader.tools.values()),
            offered=reader.offered,
            omitted=reader.omitted,
            template_kwargs={"enable_thinking": enable_thinking, "clear_thinking": clear_thinking},
        )


# -- the response -------------------------------------------------------------------------


class SparseModel(BaseModel):
    """Part of a response in which some fields are absent where there is nothing to say."""

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


class DeletedResponse(BaseModel):
    id: str
    object: Literal["response"] = "response"
    deleted: Literal[True] = True


# -- events of a stream -------------------------------------------------------------------


class NumberedEvent(BaseModel):
    sequence_number: int = Field(description="0 for the stream's first event.")


ResponseEventType = Literal[
    "response.created",
    "response.in_progress",
    "response.completed",
    "response.incomplete",
    "response.failed",
]


class ResponseEvent(NumberedEvent):
    type: ResponseEventType
    response: ResponseObject


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
            ResponseEvent | ItemEvent | PartEvent | DeltaEvent | DoneEvent,
            Field(discriminator="type"),
        ]
    ]
):
    """An event of a stream, whose SSE name is its type."""
