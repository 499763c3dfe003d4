"""Requests of `/v1/responses`; `glmd.api.responses.objects` has the answers.

See https://platform.openai.com/docs/api-reference/responses.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal

from pydantic import BeforeValidator, Field

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
from glmd.api.openai.protocol import AllowedTools, ToolChoiceMode
from glmd.api.responses.input import (
    INPUT_SCHEMA,
    TOOLS_SCHEMA,
    InputItems,
    RequestTools,
    full_name,
)
from glmd.chat.history import HistoryReader
from glmd.chat.types import Conversation
from glmd.errors import invalid_field
from glmd.structured_output.request import make_structure, read_response_format

LOGPROBS = "message.output_text.logprobs"

MAX_SAFETY_IDENTIFIER = 64
"""Characters, by OpenAI's schema."""

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
    background: bool | None = optional(
        "Respond at once, or stream; retrieve the answer or take up the stream later."
    )
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
        effort, format = self.configured(items)
        return GenerationRequest(
            id=new_id("resp_"),
            prompt=conversation,
            param="input",
            sampling=self.sampling(defaults.sampling, logprobs),
            tools=conversation.tools if calls else (),
            output=make_structure(
                read_response_format(format, "text.format", flat=True),
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

    def configured(self, items: InputItems) -> tuple[str | None, Mapping[str, Any] | None]:
        """Reasoning effort and format, which items of the conversation may set."""
        return items.configured(
            self.reasoning.effort if self.reasoning else None,
            self.text.format if self.text else None,
        )

    def conversation(
        self, defaults: Defaults, items: InputItems, tools: RequestTools
    ) -> Conversation:
        """The conversation, with all tools.

        Raises:
            InvalidRequest: an item is malformed.
        """
        enable_thinking, clear_thinking = defaults.enable_thinking, defaults.clear_thinking
        effort, _ = self.configured(items)
        if effort is not None:
            enable_thinking = effort != "none"
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
