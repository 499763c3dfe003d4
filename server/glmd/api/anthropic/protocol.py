"""Requests, responses and events of `/v1/messages`.

See https://docs.anthropic.com/en/api/messages. Only what the model reads is checked closely:
clients send cache marks and much else that concerns Anthropic's own servers.
"""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal

from fastapi.responses import JSONResponse
from pydantic import AfterValidator, BaseModel, Field, RootModel
from starlette.types import Scope

from glmd.api.anthropic.input import (
    MESSAGES_SCHEMA,
    SYSTEM_SCHEMA,
    TOOLS_SCHEMA,
    read_messages,
    read_tools,
)
from glmd.api.errors import ErrorInfo, register_error_format
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
    check_stops,
    new_id,
    optional,
)
from glmd.api.observability.request_stats import Api
from glmd.api.streaming import TokenUsage
from glmd.chat.history import HistoryReader
from glmd.chat.types import AssistantMessage, Conversation, Tool
from glmd.errors import InvalidRequest, invalid_field
from glmd.structured_output.request import make_structure, read_response_format

# -- the request --------------------------------------------------------------------------


class ThinkingConfig(StrictModel):
    type: Literal["enabled", "adaptive", "disabled"]
    budget_tokens: Integer | None = optional(
        "Tokens after which the thinking is closed and the answer continues. With"
        " adaptive, 0 (sent by Claude Code) is no limit.",
        ge=0,
    )
    display: Literal["summarized", "omitted"] | None = optional(
        "omitted: thinking blocks are empty."
    )


class OutputConfig(StrictModel):
    effort: Effort = optional(
        "Limits the thinking to the tokens of the server's setting effort_budgets,"
        " unless a budget is given."
    )
    format: dict[str, Any] | None = optional("json_schema with its schema.")


class ToolChoice(StrictModel):
    type: Literal["auto", "none", "any", "tool"]
    name: str | None = optional("The tool's name, with type tool.")
    disable_parallel_tool_use: bool | None = optional("True: end the answer after a tool call.")


class CountTokensRequest(RequestFields):
    """Fields of both routes, because clients send the same body to both."""

    refused: ClassVar = {
        "output_format": "use output_config.format.",
        "container": "code containers are not available.",
        "mcp_servers": "MCP servers are called by the client.",
    }

    messages: FailFastList[dict[str, Any]] = Field(json_schema_extra=MESSAGES_SCHEMA)
    system: str | FailFastList[dict[str, Any]] | None = optional(
        "Text, or text blocks.", json_schema_extra=SYSTEM_SCHEMA
    )
    tools: FailFastList[dict[str, Any]] | None = optional(
        "Tools with an input_schema. Anthropic's server tools are ignored.",
        json_schema_extra=TOOLS_SCHEMA,
    )
    tool_choice: ToolChoice | None = None
    thinking: ThinkingConfig | None = optional("Absent: off, unless the profile enables it.")
    output_config: OutputConfig | None = None
    thread: Any = optional("Refused: conversations are sent whole.")
    cache_control: NoOp = optional(NO_OP + " Prefixes are cached by content.")
    context_management: NoOp = optional(NO_OP + " Nothing is dropped or edited.")
    metadata: NoOp = None
    service_tier: NoOp = None
    speed: NoOp = None
    inference_geo: NoOp = None
    diagnostics: NoOp = None
    user_profile_id: NoOp = None
    betas: NoOp = None

    def conversation(self, defaults: Defaults, tools: list[Tool]) -> Conversation:
        """The conversation; a last message of the assistant without calls is continued.

        Thinking is off unless requested: other clients do not expect thinking blocks.

        Raises:
            InvalidRequest: a message is malformed.
        """
        if self.thread is not None:
            raise InvalidRequest(
                "thread: conversations are not stored. Send all messages, without thread.",
                param="thread",
                code="thread_unsupported_request",  # On this code, Anthropic's clients do so.
            )
        enable_thinking = defaults.asked_to_think
        if self.thinking is not None:
            enable_thinking = self.thinking.type != "disabled"
        reader = HistoryReader(tools)
        messages = read_messages(self.messages, self.system, reader)
        last = messages[-1] if messages else None
        return Conversation(
            messages=messages,
            tools=list(reader.tools.values()),
            offered=reader.offered,
            omitted=reader.omitted,
            template_kwargs={
                "enable_thinking": enable_thinking,
                "clear_thinking": defaults.clear_thinking,
            },
            continue_final=isinstance(last, AssistantMessage) and not last.calls,
        )


StopSequences = Annotated[FailFastList[str] | None, AfterValidator(check_stops)]


class MessagesRequest(CountTokensRequest):
    api: ClassVar[Api] = "messages"

    max_tokens: Integer = Field(
        ge=1, description="Limit of the answer's tokens, thinking included."
    )
    stop_sequences: StopSequences = optional("Strings that end the answer; not part of it.")

    def to_generation_request(self, defaults: Defaults) -> GenerationRequest:
        """Check the request and put it into neutral form.

        Raises:
            InvalidRequest: a field is malformed, unsupported or contradicts another field.
        """
        tools, ignored = read_tools(self.tools)
        choice = self.tool_choice or ToolChoice.model_validate({"type": "auto"})
        conversation = self.conversation(defaults, tools)
        calls = choice.type != "none"
        if choice.type == "tool" and choice.name is None:
            raise invalid_field("tool_choice.name", "is missing.")
        form = self.output_config.format if self.output_config else None
        return GenerationRequest(
            id=new_id("msg_"),
            prompt=conversation,
            param="messages",
            sampling=self.sampling(defaults.sampling),
            tools=conversation.tools if calls else (),
            output=make_structure(
                read_response_format(form, "output_config.format", flat=True, strict=True),
                conversation.offered if calls else (),
                required=choice.type == "any",
                named=choice.name if choice.type == "tool" else None,
                parallel=not choice.disable_parallel_tool_use,
            ),
            max_tokens=self.max_tokens,
            stop=self.stop_sequences or (),
            thinking_budget=self._thinking_budget(defaults),
            single_call=bool(choice.disable_parallel_tool_use),
            ignored=ignored,
        )

    def _thinking_budget(self, defaults: Defaults) -> int | None:
        budget = self.thinking.budget_tokens if self.thinking else None
        if budget:
            return budget
        if budget == 0 and self.thinking is not None and self.thinking.type == "enabled":
            raise invalid_field("thinking.budget_tokens", "must be 1 or more.")
        effort = self.output_config.effort if self.output_config else None
        return defaults.effort_budgets.get(effort)


# -- the message --------------------------------------------------------------------------

StopReason = Literal[
    "end_turn", "max_tokens", "stop_sequence", "tool_use", "model_context_window_exceeded"
]


class TextBlock(BaseModel):
    type: Literal["text"] = "text"
    text: str


class ThinkingBlock(BaseModel):
    type: Literal["thinking"] = "thinking"
    thinking: str
    signature: str = Field(description="Digest of the thinking. Not checked if it is sent back.")


class ToolUseBlock(BaseModel):
    type: Literal["tool_use"] = "tool_use"
    id: str
    name: str
    input: dict[str, Any]


Block = Annotated[TextBlock | ThinkingBlock | ToolUseBlock, Field(discriminator="type")]


class MessageTokensDetails(BaseModel):
    thinking_tokens: int


class MessageUsage(BaseModel):
    input_tokens: int = Field(description="Prompt tokens that were computed.")
    cache_creation_input_tokens: int = Field(
        default=0, description="Always 0: all prompt tokens are cached."
    )
    cache_read_input_tokens: int = Field(description="Prompt tokens found in the cache.")
    output_tokens: int
    output_tokens_details: MessageTokensDetails

    @classmethod
    def of(cls, usage: TokenUsage) -> MessageUsage:
        return cls(
            input_tokens=usage.prompt_tokens - usage.cached_tokens,
            cache_read_input_tokens=usage.cached_tokens,
            output_tokens=usage.completion_tokens,
            output_tokens_details=MessageTokensDetails(thinking_tokens=usage.reasoning_tokens),
        )


class AnthropicMessage(BaseModel):
    id: str
    type: Literal["message"] = "message"
    role: Literal["assistant"] = "assistant"
    model: str
    content: list[Block]
    stop_reason: StopReason | None
    stop_sequence: str | None
    usage: MessageUsage


class TokenCount(BaseModel):
    input_tokens: int


# -- events of a stream -------------------------------------------------------------------


class TextBlockDelta(BaseModel):
    type: Literal["text_delta"] = "text_delta"
    text: str


class ThinkingDelta(BaseModel):
    type: Literal["thinking_delta"] = "thinking_delta"
    thinking: str


class SignatureDelta(BaseModel):
    type: Literal["signature_delta"] = "signature_delta"
    signature: str


class InputJsonDelta(BaseModel):
    type: Literal["input_json_delta"] = "input_json_delta"
    partial_json: str


BlockDelta = Annotated[
    TextBlockDelta | ThinkingDelta | SignatureDelta | InputJsonDelta, Field(discriminator="type")
]


class MessageStart(BaseModel):
    type: Literal["message_start"] = "message_start"
    message: AnthropicMessage


class ContentBlockStart(BaseModel):
    type: Literal["content_block_start"] = "content_block_start"
    index: int
    content_block: Block


class ContentBlockDelta(BaseModel):
    type: Literal["content_block_delta"] = "content_block_delta"
    index: int
    delta: BlockDelta


class ContentBlockStop(BaseModel):
    type: Literal["content_block_stop"] = "content_block_stop"
    index: int


class StopDetails(BaseModel):
    stop_reason: StopReason
    stop_sequence: str | None


class MessageDelta(BaseModel):
    type: Literal["message_delta"] = "message_delta"
    delta: StopDetails
    usage: MessageUsage


class MessageStop(BaseModel):
    type: Literal["message_stop"] = "message_stop"


class PingEvent(BaseModel):
    type: Literal["ping"] = "ping"


AnyMessageEvent = (
    MessageStart
    | ContentBlockStart
    | ContentBlockDelta
    | ContentBlockStop
    | MessageDelta
    | MessageStop
    | PingEvent
)


class MessageEvent(RootModel[Annotated[AnyMessageEvent, Field(discriminator="type")]]):
    """An event of a stream, whose SSE name is its type."""


PATH = "/v1/messages"

OVERLOADED = 529
"""Anthropic's own status, which its clients wait out; other APIs say 503."""

ERROR_TYPES = {
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    413: "request_too_large",
    429: "rate_limit_error",
    504: "timeout_error",
    OVERLOADED: "overloaded_error",
}
"""Other statuses below 500 are an `invalid_request_error`, those above an `api_error`."""


def error_status(problem: ErrorInfo) -> int:
    return OVERLOADED if problem.type == "overloaded_error" else problem.status


def error_body(problem: ErrorInfo, request_id: str) -> dict[str, Any]:
    code = error_status(problem)
    type = ERROR_TYPES.get(code, "invalid_request_error" if code < 500 else "api_error")
    error: dict[str, Any] = {"type": type, "message": problem.message}
    if problem.code is not None:
        error["details"] = {"error_code": problem.code}
    return {"type": "error", "error": error, "request_id": request_id}


def error_response(error: ErrorInfo, scope: Scope) -> JSONResponse:
    return JSONResponse(
        error_body(error, scope["state"]["request_id"]), error_status(error), error.headers
    )


register_error_format(PATH, error_response)
