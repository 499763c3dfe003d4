"""The bodies of `POST /v1/messages` and `POST /v1/messages/count_tokens`.

Only what the model is to read is checked closely. Clients mark prompts for a cache that works
without marks here, and send much else that concerns Anthropic's own machines.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field

from glmd.api.anthropic.schemas import MESSAGES_SCHEMA, SYSTEM_SCHEMA, TOOLS_SCHEMA
from glmd.api.defaults import Defaults
from glmd.api.openai.input import Effort
from glmd.api.openai.parameters import MAX_STOPS
from glmd.api.request_body import FailFastList
from glmd.api.sampling import NO_OP, SamplingFields
from glmd.chat.types import Tool
from glmd.errors import InvalidRequest
from glmd.structured_output import OutputSpec, make_structure, read_response_format

REFUSED = {
    "output_format": "The format is called output_config.format here.",
    "container": "There are no code containers here.",
    "mcp_servers": "MCP servers are for the client to call.",
}
"""Parameters that would change the answer, and why they are not honoured."""


class ThinkingConfig(BaseModel):
    model_config = ConfigDict(strict=True)

    type: Literal["enabled", "adaptive", "disabled"]
    budget_tokens: int | None = Field(
        None,
        ge=0,
        description="Tokens after which the thinking is closed, and the answer goes on. With"
        " adaptive 0, which Claude Code sends, is no limit.",
    )
    display: Literal["summarized", "omitted"] | None = Field(
        None,
        description="omitted: thinking blocks come empty. Otherwise they hold all the thinking.",
    )


class OutputConfig(BaseModel):
    model_config = ConfigDict(strict=True)

    effort: Effort | None = Field(
        None,
        description="If it thinks and no budget is given, each effort allows so many tokens of"
        " thinking as the server's setting effort_budgets says.",
    )
    format: dict[str, Any] | None = Field(
        None, description="json_schema and its schema, which the answer then is valid under."
    )


class ToolChoice(BaseModel):
    model_config = ConfigDict(strict=True)

    type: Literal["auto", "none", "any", "tool"]
    name: str | None = Field(None, description="Of the tool, with type tool.")
    disable_parallel_tool_use: bool | None = Field(
        None, description="True: the answer ends after its first tool call."
    )


def check_stops(value: list[str] | None) -> list[str] | None:
    if len(value or ()) > MAX_STOPS:
        raise ValueError(f"at most {MAX_STOPS} stop sequences are allowed")
    if "" in (value or ()):
        raise ValueError("a stop sequence must not be empty")
    return value


class CountTokensRequest(SamplingFields):
    """What decides the prompt. Sampling is here because clients send one body to both routes."""

    model: str | None = Field(None, description="The served model's id, short name or an alias.")
    messages: FailFastList[dict[str, Any]] = Field(json_schema_extra=MESSAGES_SCHEMA)
    system: str | FailFastList[dict[str, Any]] | None = Field(
        None, description="Text, or text blocks.", json_schema_extra=SYSTEM_SCHEMA
    )
    tools: FailFastList[dict[str, Any]] | None = Field(
        None,
        description="Tools with an input_schema. Anthropic's server tools are left out.",
        json_schema_extra=TOOLS_SCHEMA,
    )
    tool_choice: ToolChoice | None = None
    thinking: ThinkingConfig | None = Field(
        None, description="Absent: no thinking, unless the profile that is named wants it."
    )
    output_config: OutputConfig | None = None

    thread: Any = Field(None, description="Refused: conversations are sent whole.")

    cache_control: Any = Field(None, description=NO_OP + " Prefixes are cached by content.")
    context_management: Any = Field(None, description=NO_OP + " Nothing is dropped or edited.")
    metadata: Any = Field(None, description=NO_OP)
    service_tier: Any = Field(None, description=NO_OP)
    speed: Any = Field(None, description=NO_OP)
    inference_geo: Any = Field(None, description=NO_OP)
    diagnostics: Any = Field(None, description=NO_OP)
    user_profile_id: Any = Field(None, description=NO_OP)
    betas: Any = Field(None, description=NO_OP)

    def thinks(self, defaults: Defaults) -> bool:
        """Whether thinking was asked for, here or by the profile that the request names.

        Without a word it is not: clients of this API that do not ask for thinking blocks do not
        expect any.
        """
        if self.thinking is None:
            return defaults.asked_to_think
        return self.thinking.type != "disabled"

    def reasoning_limit(self, budgets: Mapping[Any, int]) -> int | None:
        """Tokens that the thinking may have: the budget, else what the effort allows.

        Args:
            budgets: of the efforts.

        Raises:
            InvalidRequest: thinking is enabled, with no token for it.
        """
        thinking = self.thinking
        if thinking is not None and thinking.budget_tokens is not None:
            if thinking.budget_tokens:
                return thinking.budget_tokens
            if thinking.type == "enabled":
                raise InvalidRequest(
                    "thinking.budget_tokens must be 1 or more.", param="thinking.budget_tokens"
                )
        return budgets.get(self.output_config.effort) if self.output_config else None

    def structure(self, tools: Sequence[Tool]) -> OutputSpec:
        """What the answer has to be.

        Args:
            tools: that it may call.

        Raises:
            InvalidRequest: names the field at fault.
        """
        choice = self.tool_choice
        named = choice.name if choice is not None and choice.type == "tool" else None
        if choice is not None and choice.type == "tool" and named is None:
            raise InvalidRequest("tool_choice.name is missing.", param="tool_choice.name")
        form = self.output_config.format if self.output_config else None
        return make_structure(
            read_response_format(form, "output_config.format", flat=True, strict=True),
            tools,
            required=choice is not None and choice.type == "any",
            named=named,
            parallel=choice is None or not choice.disable_parallel_tool_use,
        )


class MessagesRequest(CountTokensRequest):
    max_tokens: int = Field(ge=1, description="Most tokens of the answer, thinking included.")
    stream: bool | None = Field(None, description="Answer with server-sent events.")
    stop_sequences: Annotated[FailFastList[str] | None, AfterValidator(check_stops)] = Field(
        None, description=f"Strings that end the answer, at most {MAX_STOPS}; not part of it."
    )
