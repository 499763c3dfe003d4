"""The body of `POST /v1/chat/completions`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from glmd.api.openai.input import ConversationFields
from glmd.api.openai.parameters import Limit, Parameters
from glmd.api.request_body import FailFastList
from glmd.api.sampling import INT64, NO_OP
from glmd.chat.messages import read_tools
from glmd.chat.types import Tool
from glmd.errors import InvalidRequest
from glmd.structured_output import OutputSpec, make_structure, only_format, read_response_format


class NamedFunction(BaseModel):
    model_config = ConfigDict(strict=True)

    name: str


class NamedTool(BaseModel):
    model_config = ConfigDict(strict=True)

    type: Literal["function"]
    function: NamedFunction


class ChatCompletionRequest(Parameters, ConversationFields):
    tool_choice: Literal["none", "auto", "required"] | NamedTool | None = Field(
        None, description="none, auto (the default with tools), required, or a function."
    )
    parallel_tool_calls: bool | None = Field(
        None, description="False: the answer ends after its first tool call."
    )
    response_format: dict[str, Any] | None = Field(
        None, description="text, json_object, or json_schema, which the answer then is for sure."
    )
    max_completion_tokens: Limit = Field(
        None, description="The same as max_tokens, under its newer name."
    )
    logprobs: bool | None = Field(None, description="Log-probabilities of the answer's tokens.")
    top_logprobs: int | None = Field(
        None, ge=0, le=20, description="And of so many likely others; needs logprobs."
    )
    modalities: FailFastList[Literal["text", "audio"]] | None = Field(
        None, description="text only."
    )
    thinking_budget: int | None = Field(
        None,
        ge=0,
        lt=INT64,
        description="Tokens after which the reasoning is closed, and the answer goes on.",
    )
    return_progress: bool | None = Field(
        None, description="While streaming, report how much of the prompt is computed."
    )
    verbosity: Any = Field(None, description=NO_OP)

    @property
    def token_limit(self) -> int | None:
        """`max_completion_tokens`, or `max_tokens`, which is its older name.

        Raises:
            InvalidRequest: they differ.
        """
        limits = {self.max_tokens, self.max_completion_tokens} - {None}
        if len(limits) > 1:
            raise InvalidRequest(
                "max_tokens and max_completion_tokens are one limit, but have two values.",
                param="max_tokens",
            )
        return limits.pop() if limits else None

    @property
    def top_k_logprobs(self) -> int | None:
        """How many likely tokens to report beside each chosen one; None: report nothing."""
        if self.top_logprobs and not self.logprobs:
            raise InvalidRequest("top_logprobs needs logprobs to be true.", param="top_logprobs")
        return self.top_logprobs or 0 if self.logprobs else None

    def reasoning_limit(self, budgets: Mapping[Any, int]) -> int | None:
        """Tokens that the reasoning may have: the budget, else what the effort allows.

        Args:
            budgets: of the efforts.

        Raises:
            InvalidRequest: two budgets are given.
        """
        said = self.thinking.budget_tokens if self.thinking else None
        if self.thinking_budget is None:
            return said if said is not None else budgets.get(self.reasoning_effort)
        if said not in (None, self.thinking_budget):
            raise InvalidRequest(
                "thinking.budget_tokens contradicts thinking_budget.",
                param="thinking.budget_tokens",
            )
        return self.thinking_budget

    def callable_tools(self) -> list[Tool]:
        """The tools that the answer may call."""
        return [] if self.tool_choice == "none" else read_tools(self.tools)

    def structure(self, tools: Sequence[Tool]) -> OutputSpec:
        """What the answer has to be.

        Args:
            tools: that it may call.

        Raises:
            InvalidRequest: names the field at fault.
        """
        choice = self.tool_choice
        return make_structure(
            only_format(read_response_format(self.response_format), self.guided_format),
            tools,
            required=choice == "required",
            named=choice.function.name if isinstance(choice, NamedTool) else None,
            parallel=self.parallel_tool_calls is not False,
        )

    def refuse_unsupported(self) -> None:
        """Raise InvalidRequest for what is no text."""
        if "audio" in (self.modalities or ()):
            raise InvalidRequest("The model writes text only.", param="modalities")
