"""The body of `POST /v1/responses`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from glmd.api.openai.input import Effort
from glmd.api.request_body import FailFastList, limit_members
from glmd.api.responses.schemas import INPUT_SCHEMA, TOOLS_SCHEMA
from glmd.api.responses.tools import full_name
from glmd.api.sampling import NO_OP, SamplingFields
from glmd.chat.types import Tool
from glmd.errors import InvalidRequest
from glmd.structured_output import OutputSpec, make_structure, read_response_format

REFUSED = {
    "conversation": "Conversations are not kept here; send previous_response_id.",
    "prompt": "There are no stored prompts here; send instructions and input.",
    "moderation": "There is no moderation here.",
    "stop": "The Responses API has no stop strings; /v1/chat/completions has.",
    "n": "The Responses API gives one answer; /v1/chat/completions gives several.",
    "max_tokens": "The limit is called max_output_tokens here.",
    "max_completion_tokens": "The limit is called max_output_tokens here.",
    "messages": "The conversation is called input here.",
    "response_format": "The format is called text.format here.",
}
"""Parameters that would change the answer, and why they are not honoured."""

LOGPROBS = "message.output_text.logprobs"


class Reasoning(BaseModel):
    model_config = ConfigDict(strict=True)

    effort: Effort | None = Field(
        None,
        description="none: no thinking. The others allow as many tokens of reasoning as the"
        " server's setting effort_budgets says.",
    )
    summary: Literal["auto", "concise", "detailed"] | None = Field(
        None, description="If given, the whole reasoning comes as the summary, else as content."
    )
    generate_summary: Literal["auto", "concise", "detailed"] | None = Field(
        None, description="The same, under its older name."
    )
    context: Literal["auto", "current_turn", "all_turns"] | None = Field(
        None, description="current_turn: the reasoning of earlier turns is dropped."
    )
    mode: Literal["standard"] | None = None


class TextConfig(BaseModel):
    model_config = ConfigDict(strict=True)

    format: dict[str, Any] | None = Field(
        None, description="text, json_object, or json_schema, which the answer then is for sure."
    )
    verbosity: Any = Field(None, description=NO_OP)


class NamedChoice(BaseModel):
    """The function or custom tool to call."""

    model_config = ConfigDict(strict=True)

    type: Literal["function", "custom"]
    name: str
    namespace: str | None = None


class ResponsesStreamOptions(BaseModel):
    model_config = ConfigDict(strict=True)

    include_obfuscation: bool | None = Field(None, description=NO_OP)


class ResponsesRequest(SamplingFields):
    model: str | None = Field(None, description="The served model's id, short name or an alias.")
    input: str | FailFastList[dict[str, Any]] = Field(json_schema_extra=INPUT_SCHEMA)
    instructions: str | None = Field(None, description="A system message, for this answer alone.")
    previous_response_id: str | None = Field(
        None, description="A stored response, whose conversation this one goes on with."
    )
    tools: FailFastList[dict[str, Any]] | None = Field(
        None,
        description="Functions and custom tools, alone or in namespaces. Hosted tools are left"
        " out.",
        json_schema_extra=TOOLS_SCHEMA,
    )
    tool_choice: Literal["none", "auto", "required"] | NamedChoice | None = Field(
        None, description="none, auto (the default with tools), required, or a function."
    )
    parallel_tool_calls: bool | None = Field(
        None, description="False: the answer ends after its first tool call."
    )
    reasoning: Reasoning | None = None
    text: TextConfig | None = None
    max_output_tokens: int | None = Field(
        None, ge=1, description="Most tokens of the answer, reasoning included."
    )
    include: FailFastList[str] | None = Field(
        None,
        description=f"{LOGPROBS}: log-probabilities of the answer's tokens."
        " reasoning.encrypted_content: without effect, reasoning comes in plain text.",
    )
    top_logprobs: int | None = Field(
        None, ge=0, le=20, description="And of so many likely others; they are then included."
    )
    stream: bool | None = Field(None, description="Answer with server-sent events.")
    stream_options: ResponsesStreamOptions | None = None
    background: bool | None = Field(
        None, description="Answer at once, and go on; the answer is for retrieval. Not streamed."
    )
    store: bool | None = Field(None, description="False: the response is not kept.")
    metadata: Annotated[
        dict[str, Annotated[str, Field(max_length=512)]] | None, limit_members(16)
    ] = Field(None, max_length=16, description="Kept with the response.")

    truncation: Literal["auto", "disabled"] | None = Field(
        None, description=NO_OP + " A prompt that is too long is refused."
    )
    max_tool_calls: Any = Field(None, description=NO_OP + " It counts hosted tools.")
    context_management: Any = Field(None, description=NO_OP + " Nothing is dropped or edited.")
    user: Any = Field(None, description=NO_OP)
    safety_identifier: Any = Field(None, description=NO_OP)
    service_tier: Any = Field(None, description=NO_OP)
    prompt_cache_key: Any = Field(None, description=NO_OP + " Prefixes are cached by content.")
    prompt_cache_retention: Any = Field(None, description=NO_OP)
    prompt_cache_options: Any = Field(None, description=NO_OP)
    client_metadata: Any = Field(None, description=NO_OP)

    @property
    def summarises(self) -> bool:
        """The reasoning is to come as a summary."""
        given = self.reasoning
        return given is not None and bool(given.summary or given.generate_summary)

    def reasoning_limit(self, budgets: Mapping[Any, int]) -> int | None:
        """Tokens that the reasoning may have, by the `budgets` of the efforts."""
        return budgets.get(self.reasoning.effort) if self.reasoning else None

    @property
    def top_k_logprobs(self) -> int | None:
        """How many likely tokens to report beside each chosen one; None: report nothing."""
        if self.top_logprobs is None and LOGPROBS not in (self.include or ()):
            return None
        return self.top_logprobs or 0

    def template_kwargs(self, *, enable_thinking: bool, clear_thinking: bool) -> dict[str, bool]:
        """The template's switches: the request's, else those given."""
        if self.reasoning is not None:
            if self.reasoning.effort is not None:
                enable_thinking = self.reasoning.effort != "none"
            if self.reasoning.context in ("current_turn", "all_turns"):
                clear_thinking = self.reasoning.context == "current_turn"
        return {"enable_thinking": enable_thinking, "clear_thinking": clear_thinking}

    def structure(self, tools: Sequence[Tool]) -> OutputSpec:
        """What the answer has to be.

        Args:
            tools: that it may call.

        Raises:
            InvalidRequest: names the field at fault.
        """
        choice = self.tool_choice
        named = None
        if isinstance(choice, NamedChoice):
            named = full_name(choice.namespace, choice.name)
        return make_structure(
            read_response_format(self.text.format if self.text else None, "text.format", flat=True),
            tools,
            required=choice == "required",
            named=named,
            parallel=self.parallel_tool_calls is not False,
        )

    def refuse_unsupported(self) -> None:
        """Raise InvalidRequest for what cannot be had together."""
        if self.background and self.stream:
            raise InvalidRequest(
                "background: an answer in the background is not streamed; retrieve it.",
                param="background",
            )
        if self.background and self.store is False:
            raise InvalidRequest(
                "background: what is not stored cannot be retrieved.", param="background"
            )
