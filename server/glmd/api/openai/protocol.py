"""Requests and responses of `/v1/chat/completions` and `/v1/completions`.

Response fields are written only if they were set: an explicit null stays, an absent field stays
absent.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any, ClassVar, Literal

from pydantic import AfterValidator, BaseModel, BeforeValidator, Field

from glmd.api.generation_request import (
    Defaults,
    FailFastList,
    GenerationRequest,
    Integer,
    NoOp,
    StrictModel,
    TokenId,
    agreed_value,
    new_id,
    optional,
)
from glmd.api.observability.request_stats import Api
from glmd.api.openai.input import (
    ConversationFields,
    Limit,
    OpenAIFields,
    check_stream_options,
)
from glmd.api.streaming import TokenUsage
from glmd.chat.tokenizer import Tokenizer
from glmd.chat.types import FinishReason, TokenInfo
from glmd.errors import invalid_field
from glmd.structured_output.request import (
    OutputSpec,
    make_structure,
    only_format,
    read_response_format,
)

DEFAULT_MAX_TOKENS = 16
"""OpenAI's, for `/v1/completions`."""

MAX_PROMPTS = 128

# -- requests -----------------------------------------------------------------------------


ToolChoiceMode = Literal["none", "auto", "required"]


class FunctionName(StrictModel):
    name: str


class FunctionToolChoice(StrictModel):
    """The function to call; `name` alone has the form of Responses."""

    type: Literal["function"]
    function: FunctionName | None = None
    name: str | None = None

    @property
    def named(self) -> str:
        """
        Raises:
            InvalidRequest: there is no name.
        """
        name = self.function.name if self.function else self.name
        if name is None:
            raise invalid_field("tool_choice.function", "is missing.")
        return name


class AllowedTools(StrictModel):
    mode: Literal["auto", "required"] = "auto"
    tools: FailFastList[dict[str, Any]]

    def names(self, param: str) -> list[str]:
        """Names of the functions and custom tools that may be called.

        Others are not served.

        Raises:
            InvalidRequest: a function has no name.
        """
        found = []
        for index, tool in enumerate(self.tools):
            if tool.get("type", "function") not in ("function", "custom"):
                continue
            nested = tool.get("function") or tool.get("custom")
            named = nested if isinstance(nested, dict) else tool
            if not isinstance(named.get("name"), str):
                raise invalid_field(f"{param}[{index}].name", "must be a string.")
            namespace = named.get("namespace")
            found.append(f"{namespace}__{named['name']}" if namespace else named["name"])
        return found


class AllowedToolChoice(StrictModel):
    """The tools that may be called, of those that the prompt describes."""

    type: Literal["allowed_tools"]
    allowed_tools: AllowedTools


class ChatCompletionRequest(OpenAIFields, ConversationFields):
    api: ClassVar[Api] = "chat"

    tool_choice: ToolChoiceMode | FunctionToolChoice | AllowedToolChoice | None = optional(
        "auto: the default."
    )
    parallel_tool_calls: bool | None = optional("False: the answer ends after its first tool call.")
    response_format: dict[str, Any] | None = optional("text, json_object or json_schema.")
    max_completion_tokens: Limit = optional("The newer name of max_tokens.")
    logprobs: bool | None = optional("Log-probabilities of the answer's tokens.")
    top_logprobs: Integer | None = optional("Alternatives per token; needs logprobs.", ge=0, le=20)
    modalities: FailFastList[Literal["text", "audio"]] | None = optional("text only.")
    thinking_budget: Integer | None = optional(
        "Tokens after which the reasoning is closed and the answer continues.", ge=0
    )
    thinking_token_budget: Integer | None = optional("thinking_budget's name in vLLM.", ge=0)
    include_reasoning: bool | None = optional("False: the reasoning is not in the answer.")
    return_progress: bool | None = optional("While streaming, report the prompt's progress.")
    verbosity: NoOp = None

    def to_generation_request(self, defaults: Defaults) -> GenerationRequest:
        """Check the request and put it into neutral form.

        Raises:
            InvalidRequest: a field is malformed, unsupported or contradicts another field.
        """
        if "audio" in (self.modalities or ()):
            raise invalid_field("modalities", "the model writes text only.")
        if self.top_logprobs and not self.logprobs:
            raise invalid_field("top_logprobs", "needs logprobs to be true.")
        check_stream_options(self.stream_options, self.stream)
        max_tokens = self._limit() or defaults.max_tokens
        min_tokens = self.checked_min_tokens(max_tokens)
        conversation = self.conversation(defaults)
        choice = self.tool_choice
        allowed = choice.allowed_tools if isinstance(choice, AllowedToolChoice) else None
        names = allowed.names("tool_choice.allowed_tools.tools") if allowed else None
        calls = choice != "none" and names != []
        return GenerationRequest(
            id=new_id("chatcmpl-"),
            prompt=conversation,
            param="messages",
            sampling=self.sampling(
                defaults.sampling, (self.top_logprobs or 0) if self.logprobs else None
            ),
            tools=conversation.tools if calls else (),
            output=make_structure(
                only_format(read_response_format(self.response_format), self.guided_format()),
                conversation.offered if calls else (),
                required=choice == "required" or bool(allowed and allowed.mode == "required"),
                named=choice.named if isinstance(choice, FunctionToolChoice) else None,
                allowed=names,
                parallel=self.parallel_tool_calls is not False,
            ),
            n=self.n or 1,
            max_tokens=max_tokens,
            min_tokens=min_tokens,
            stop=self.stops,
            stop_token_ids=tuple(self.stop_token_ids or ()),
            ignore_eos=bool(self.ignore_eos),
            thinking_budget=self._thinking_budget(defaults),
            single_call=self.parallel_tool_calls is False,
            priority=self.priority or 0,
            cache_salt=self.cache_salt or "",
            include_reasoning=self._include_reasoning(),
            report_tokens=bool(self.return_token_ids),
            report_progress=bool(self.return_progress and self.stream),
            ignored=self.tools_read[1],
        )

    def _include_reasoning(self) -> bool:
        exclude = self.reasoning.exclude if self.reasoning else None
        return agreed_value(
            {
                "include_reasoning": self.include_reasoning,
                "reasoning.exclude": None if exclude is None else not exclude,
            },
            default=True,
        )

    def _limit(self) -> int | None:
        limits = {self.max_tokens, self.max_completion_tokens} - {None}
        if len(limits) > 1:
            raise invalid_field("max_tokens", "contradicts max_completion_tokens.")
        return limits.pop() if limits else None

    def _thinking_budget(self, defaults: Defaults) -> int | None:
        budget = agreed_value(
            {
                "thinking_budget": self.thinking_budget,
                "thinking_token_budget": self.thinking_token_budget,
                "thinking.budget_tokens": self.thinking.budget_tokens if self.thinking else None,
                "reasoning.max_tokens": self.reasoning.max_tokens if self.reasoning else None,
            },
            default=None,
        )
        return defaults.effort_budgets.get(self.effort) if budget is None else budget


Tokens = Annotated[FailFastList[TokenId], Field(min_length=1)]
Prompts = Annotated[FailFastList[str], Field(min_length=1, max_length=MAX_PROMPTS)]
TokenPrompts = Annotated[FailFastList[Tokens], Field(min_length=1, max_length=MAX_PROMPTS)]


class CompletionRequest(OpenAIFields):
    api: ClassVar[Api] = "completions"

    prompt: str | Tokens | Prompts | TokenPrompts = Field(
        description="Text in which tags are tags, or token ids; or a list of either."
    )
    echo: bool | None = optional("Begin the answer with the prompt.")
    max_tokens: Annotated[
        Integer | None,
        Field(ge=-1),
        AfterValidator(lambda value: None if value == -1 else value),
    ] = optional("Limit of the answer; 0: only the prompt is computed; -1: none.")
    logprobs: Integer | None = optional(
        "Log-probabilities, and alternatives per token; with echo, of the prompt's tokens, too.",
        ge=0,
        le=20,
    )
    prompt_logprobs: Annotated[
        Integer | None, BeforeValidator(lambda value: None if value is False else value)
    ] = optional("Log-probabilities of the prompt, and alternatives per token.", ge=0, le=20)
    best_of: Integer | None = optional("1 only.", ge=1)
    suffix: str | None = optional("Refused: the model cannot fill in.")

    def to_generation_request(self, defaults: Defaults) -> GenerationRequest:
        """Check the request and put it into neutral form.

        Raises:
            InvalidRequest: a field is malformed, unsupported or contradicts another field.
        """
        if self.suffix:
            raise invalid_field("suffix", "the model cannot fill in the middle.")
        if self.best_of is not None and self.best_of != 1:
            raise invalid_field("best_of", "must be 1. For several answers, send n.")
        check_stream_options(self.stream_options, self.stream)
        max_tokens = self.max_tokens
        if max_tokens is None:
            max_tokens = defaults.max_tokens or DEFAULT_MAX_TOKENS
        scored = [self.prompt_logprobs, self.logprobs if self.echo else None]
        alternatives = [count for count in scored if count is not None]
        return GenerationRequest(
            id=new_id("cmpl-"),
            prompt=self._prompts(),
            param="prompt",
            sampling=self.sampling(defaults.sampling, self.logprobs),
            output=OutputSpec(self.guided_format()),
            n=self.n or 1,
            max_tokens=max_tokens,
            min_tokens=self.checked_min_tokens(max_tokens),
            stop=self.stops,
            stop_token_ids=tuple(self.stop_token_ids or ()),
            ignore_eos=bool(self.ignore_eos),
            priority=self.priority or 0,
            cache_salt=self.cache_salt or "",
            prompt_logprobs=max(alternatives, default=None),
            report_tokens=bool(self.return_token_ids),
        )

    def _prompts(self) -> list[str | list[int]]:
        if isinstance(self.prompt, str):
            return [self.prompt]
        if isinstance(self.prompt[0], int):
            return [[id for id in self.prompt if isinstance(id, int)]]
        return [prompt for prompt in self.prompt if not isinstance(prompt, int)]


# -- responses ----------------------------------------------------------------------------


class PromptTokensDetails(BaseModel):
    cached_tokens: int = Field(description="Prompt tokens found in the cache.")


class CompletionTokensDetails(BaseModel):
    reasoning_tokens: int
    accepted_prediction_tokens: int = Field(description="Accepted draft tokens.")
    rejected_prediction_tokens: int = Field(description="Rejected draft tokens.")


class CompletionUsage(BaseModel):
    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptTokensDetails
    completion_tokens_details: CompletionTokensDetails

    @classmethod
    def of(cls, usage: TokenUsage) -> CompletionUsage:
        return cls(
            prompt_tokens=usage.prompt_tokens,
            completion_tokens=usage.completion_tokens,
            total_tokens=usage.prompt_tokens + usage.completion_tokens,
            prompt_tokens_details=PromptTokensDetails(cached_tokens=usage.cached_tokens),
            completion_tokens_details=CompletionTokensDetails(
                reasoning_tokens=usage.reasoning_tokens,
                accepted_prediction_tokens=usage.accepted,
                rejected_prediction_tokens=usage.drafted - usage.accepted,
            ),
        )


class TopLogprob(BaseModel):
    token: str = Field(description="Text, with U+FFFD for bytes that are not UTF-8.")
    logprob: float
    bytes: list[int]

    @staticmethod
    def spell(tokenizer: Tokenizer, id: int) -> dict[str, Any]:
        """A token's text and bytes."""
        data = tokenizer.token_bytes(id)
        return {"token": data.decode("utf-8", "replace"), "bytes": list(data)}


class TokenLogprob(TopLogprob):
    top_logprobs: list[TopLogprob]

    @classmethod
    def of(cls, tokenizer: Tokenizer, tokens: Sequence[TokenInfo]) -> list[TokenLogprob]:
        """Tokens with their log-probabilities and alternatives."""
        return [
            cls(
                **cls.spell(tokenizer, token.id),
                logprob=token.logprobs.logprob,
                top_logprobs=[
                    TopLogprob(**cls.spell(tokenizer, id), logprob=logprob)
                    for id, logprob in zip(
                        token.logprobs.top_ids, token.logprobs.top_logprobs, strict=True
                    )
                ],
            )
            for token in tokens
        ]


class ChatLogprobs(BaseModel):
    content: list[TokenLogprob] | None
    refusal: None = None
    reasoning_content: list[TokenLogprob] | None = optional("Tokens of the reasoning.")


class FunctionCall(BaseModel):
    name: str
    arguments: str = Field(description="A JSON object, as text.")


class FunctionToolCall(BaseModel):
    id: str
    type: Literal["function"]
    function: FunctionCall


class ChatMessage(BaseModel):
    role: Literal["assistant"]
    content: str | None
    refusal: None = None
    reasoning_content: str | None = optional("null without reasoning.")
    reasoning: str | None = optional("The same, with the setting reasoning_alias; else absent.")
    tool_calls: list[FunctionToolCall] | None = optional("Absent if none.")


class ChatChoice(BaseModel):
    index: int
    message: ChatMessage
    logprobs: ChatLogprobs | None
    finish_reason: FinishReason
    token_ids: list[int] | None = optional("With return_token_ids.")


class ChatCompletion(BaseModel):
    id: str
    object: Literal["chat.completion"]
    created: int
    model: str
    system_fingerprint: str
    choices: list[ChatChoice]
    usage: CompletionUsage
    prompt_token_ids: list[int] | None = optional("With return_token_ids.")


class FunctionDelta(BaseModel):
    name: str | None = None
    arguments: str


class CallDelta(BaseModel):
    index: int
    id: str | None = None
    type: Literal["function"] | None = None
    function: FunctionDelta


class ChatDelta(BaseModel):
    role: Literal["assistant"] | None = None
    content: str | None = None
    reasoning_content: str | None = optional("null where there is none.")
    reasoning: str | None = optional("The same, with the setting reasoning_alias; else absent.")
    tool_calls: list[CallDelta] | None = None


class ChunkChoice(BaseModel):
    index: int
    delta: ChatDelta
    logprobs: ChatLogprobs | None
    finish_reason: FinishReason | None
    token_ids: list[int] | None = optional("With return_token_ids.")


class PromptProgress(BaseModel):
    """In tokens, as llama.cpp reports it."""

    total: int
    processed: int


class ChatCompletionChunk(BaseModel):
    id: str
    object: Literal["chat.completion.chunk"]
    created: int
    model: str
    system_fingerprint: str
    choices: list[ChunkChoice]
    usage: CompletionUsage | None = optional("In the last chunk, with include_usage.")
    prompt_progress: PromptProgress | None = optional("With return_progress.")
    prompt_token_ids: list[int] | None = optional("In the first chunk, with return_token_ids.")


class CompletionLogprobs(BaseModel):
    tokens: list[str]
    token_logprobs: list[float | None]
    top_logprobs: list[dict[str, float] | None]
    text_offset: list[int]


class PromptLogprob(BaseModel):
    logprob: float
    rank: int | None = Field(description="1: the most likely; null: not one of the alternatives.")
    decoded_token: str


class CompletionChoice(BaseModel):
    index: int
    text: str
    logprobs: CompletionLogprobs | None
    finish_reason: Literal["stop", "length"] | None
    prompt_token_ids: list[int] | None = optional(
        "With return_token_ids; in a stream, first chunk only."
    )
    token_ids: list[int] | None = optional("With return_token_ids.")
    prompt_logprobs: list[dict[str, PromptLogprob] | None] | None = optional(
        "With prompt_logprobs, as vLLM has it: by token id, of each prompt token and of the most"
        " likely ones in its place; null for the first. In a stream, first chunk only."
    )


class TextCompletion(BaseModel):
    """Answer of `/v1/completions`, whole or as a chunk."""

    id: str
    object: Literal["text_completion"]
    created: int
    model: str
    system_fingerprint: str
    choices: list[CompletionChoice]
    usage: CompletionUsage | None = None
