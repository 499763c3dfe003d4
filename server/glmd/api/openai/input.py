"""Fields of several OpenAI requests: conversation, limits and output options."""

from __future__ import annotations

from functools import cached_property
from typing import Annotated, Any, ClassVar, Literal

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field

from glmd.api.generation_request import (
    NO_OP,
    Defaults,
    Effort,
    FailFastList,
    Integer,
    NoOp,
    RequestBody,
    RequestFields,
    StrictModel,
    TokenId,
    agreed_value,
    check_stops,
    limit_members,
    optional,
)
from glmd.chat.history import HistoryReader
from glmd.chat.messages import read_messages
from glmd.chat.tools import read_tools
from glmd.chat.types import MAX_STOP_TOKENS, Conversation, Tool
from glmd.errors import invalid_field
from glmd.structured_output.request import GUIDED, AnswerFormat, read_guided

TEXT = {"type": "string"}
TEXT_PART = {
    "type": "object",
    "required": ["type", "text"],
    "properties": {"type": {"enum": ["text"]}, "text": TEXT},
}
MESSAGES_SCHEMA: dict[str, Any] = {
    "type": "array",
    "minItems": 1,
    "items": {
        "type": "object",
        "required": ["role"],
        "properties": {
            "role": {"enum": ["system", "developer", "user", "assistant", "tool"]},
            "content": {"anyOf": [TEXT, {"type": "array", "items": TEXT_PART}, {"type": "null"}]},
            "reasoning_content": {"type": ["string", "null"]},
            "tool_calls": {"type": ["array", "null"], "items": {"type": "object"}},
            "tool_call_id": {"type": ["string", "null"]},
        },
    },
}


MAX_TEMPLATE_VARIABLES = 100


def check_limit(value: int | None) -> int | None:
    if value == 0:
        raise ValueError("must be at least 1")
    return None if value == -1 else value


Limit = Annotated[Integer | None, Field(ge=-1), AfterValidator(check_limit)]
"""Number of tokens. -1, which LM Studio's clients send: no limit."""


Stops = Annotated[
    str | FailFastList[str] | None,
    BeforeValidator(lambda value: None if value == "" else value),
    AfterValidator(check_stops),
]
StopTokens = Annotated[FailFastList[TokenId] | None, Field(max_length=MAX_STOP_TOKENS)]


class Thinking(StrictModel):
    """Thinking options in Anthropic's and z.ai's form."""

    type: Literal["enabled", "adaptive", "disabled"] | None = None
    budget_tokens: Integer | None = optional("The same as thinking_budget.", ge=0)
    clear_thinking: bool | None = None


class ReasoningOptions(StrictModel):
    """Thinking options in OpenRouter's form."""

    enabled: bool | None = None
    effort: Effort = optional("The same as reasoning_effort.")
    max_tokens: Integer | None = optional("The same as thinking_budget.", ge=0)
    exclude: bool | None = optional("The opposite of include_reasoning.")


class StreamOptions(StrictModel):
    include_usage: bool | None = optional("End with a chunk that holds the usage.")
    include_obfuscation: NoOp = None


def check_stream_options(options: BaseModel | None, stream: bool | None) -> None:
    """
    Raises:
        InvalidRequest: there are options for a stream, and no stream.
    """
    if options is not None and options.model_fields_set and not stream:
        raise invalid_field("stream_options", "needs stream to be true.")


class OpenAINoOps(BaseModel):
    """Fields without effect of all OpenAI requests."""

    prompt_cache_key: NoOp = optional(NO_OP + " Prefixes are cached by content.")
    prompt_cache_retention: NoOp = None
    prompt_cache_options: NoOp = None
    safety_identifier: NoOp = None
    service_tier: NoOp = None
    user: NoOp = None


class ConversationFields(RequestBody):
    """Fields that decide the prompt; `/tokenize` and `/apply-template` have them too."""

    model_config = ConfigDict(strict=True, extra="allow", allow_inf_nan=False)

    messages: FailFastList[dict[str, Any]] = Field(json_schema_extra=MESSAGES_SCHEMA)
    tools: FailFastList[dict[str, Any]] | None = optional("Functions that the model may call.")
    enable_thinking: bool | None = optional("Think before answering.")
    clear_thinking: bool | None = optional("Drop the reasoning of earlier turns from the prompt.")
    thinking: Thinking | None = optional("The same in another form.")
    reasoning: ReasoningOptions | None = optional("The same in another form.")
    think: bool | Effort = optional("enable_thinking or reasoning_effort in Ollama's form.")
    reasoning_effort: Effort = optional(
        "none: no thinking. Other efforts limit the reasoning to the tokens of the"
        " server's setting effort_budgets, unless a budget is given."
    )
    chat_template_kwargs: Annotated[
        dict[str, Any] | None, limit_members(MAX_TEMPLATE_VARIABLES)
    ] = optional("Variables of the chat template.")
    continue_final_message: bool | None = optional("Continue the last message, the assistant's.")
    add_generation_prompt: bool | None = optional("The opposite of continue_final_message.")
    cache_salt: str | None = optional("Requests with different salts share no cached prefix.")

    @cached_property
    def tools_read(self) -> tuple[list[Tool], list[str]]:
        """The functions, and the names of tools that are left out.

        Raises:
            InvalidRequest: a tool is malformed.
        """
        ignored: list[str] = []
        return read_tools(self.tools, ignored), ignored

    @property
    def effort(self) -> Effort:
        """The effort, by any of its names.

        Raises:
            InvalidRequest: two names contradict each other.
        """
        return agreed_value(
            {
                "reasoning_effort": self.reasoning_effort,
                "reasoning.effort": self.reasoning.effort if self.reasoning else None,
                "think": None if isinstance(self.think, bool) else self.think,
            },
            default=None,
        )

    def conversation(self, defaults: Defaults) -> Conversation:
        """The conversation, with all tools.

        Raises:
            InvalidRequest: a field is malformed or contradicts another field.
        """
        if self.add_generation_prompt is not None and (
            self.add_generation_prompt == bool(self.continue_final_message)
        ):
            raise invalid_field("add_generation_prompt", "contradicts continue_final_message.")
        thinking_type = self.thinking.type if self.thinking else None
        effort = self.effort
        enable_thinking = agreed_value(
            {
                "enable_thinking": self.enable_thinking,
                "chat_template_kwargs.enable_thinking": self._template_flag("enable_thinking"),
                "thinking.type": thinking_type and thinking_type != "disabled",
                "reasoning.enabled": self.reasoning.enabled if self.reasoning else None,
                "think": self.think if isinstance(self.think, bool) else None,
                # Other efforts change the default only.
                "reasoning_effort": False if effort == "none" else None,
            },
            default=defaults.enable_thinking or effort is not None,
        )
        clear_thinking = agreed_value(
            {
                "clear_thinking": self.clear_thinking,
                "chat_template_kwargs.clear_thinking": self._template_flag("clear_thinking"),
                "thinking.clear_thinking": self.thinking.clear_thinking if self.thinking else None,
            },
            default=defaults.clear_thinking,
        )
        reader = HistoryReader(self.tools_read[0])
        return Conversation(
            messages=read_messages(self.messages, reader),
            tools=list(reader.tools.values()),
            offered=reader.offered,
            omitted=reader.omitted,
            template_kwargs={
                **(self.chat_template_kwargs or {}),
                "enable_thinking": enable_thinking,
                "clear_thinking": clear_thinking,
            },
            continue_final=bool(self.continue_final_message),
            cache_salt=self.cache_salt or "",
        )

    def _template_flag(self, name: str) -> bool | None:
        value = (self.chat_template_kwargs or {}).get(name)
        if value is not None and not isinstance(value, bool):
            param = f"chat_template_kwargs.{name}"
            raise invalid_field(param, "must be true or false.")
        return value


class OpenAIFields(RequestFields, OpenAINoOps):
    """Fields of chat and text completions."""

    refused: ClassVar = {
        "grammar": "use guided_grammar.",
        "guided_whitespace_pattern": "whitespace between the parts of JSON cannot be restricted.",
        "chat_template": "the checkpoint's template is used. Send chat_template_kwargs.",
        "functions": "this is deprecated. Send tools.",
        "function_call": "this is deprecated. Send tool_choice.",
        "audio": "the model writes text only.",
        "web_search_options": "there is no web search.",
        "prompt_logprobs": "log-probabilities of the prompt are not available.",
        "use_beam_search": "beam search is not available.",
        "logits_processors": "code in requests is not run.",
    }

    stream_options: StreamOptions | None = None
    n: Integer | None = optional("Answers per prompt.", ge=1, le=128)
    max_tokens: Limit = optional("Limit of the answer, reasoning included; -1: none.")
    min_tokens: Integer | None = optional("No end before this many tokens.", ge=0)
    stop: Stops = optional("Strings that end the answer; not part of it.")
    stop_token_ids: StopTokens = optional("Further end tokens.")
    ignore_eos: bool | None = optional("Continue after an end token.")
    guided_json: Any = optional("JSON schema of the answer, as an object or a string.")
    guided_regex: Any = optional("Regular expression, without lookaround.")
    guided_choice: Any = optional("List of strings to choose from.")
    guided_grammar: Any = optional("Grammar in GBNF or llguidance's variant of Lark.")
    structured_outputs: Any = optional("json, json_object, regex, choice or grammar, as in vLLM.")
    return_token_ids: bool | None = optional("Return the token ids of prompt and answer.")
    priority: Integer | None = optional(
        "Larger goes first among the client's own waiting requests; below 0 lets"
        " requests of all clients go first.",
    )
    cache_salt: str | None = optional("Requests with different salts share no cached prefix.")
    metadata: NoOp = None
    store: NoOp = None
    prediction: NoOp = None

    @property
    def stops(self) -> list[str]:
        return [self.stop] if isinstance(self.stop, str) else list(self.stop or ())

    def guided_format(self) -> AnswerFormat | None:
        """Form that the `guided_…` fields and `structured_outputs` require.

        Raises:
            InvalidRequest: a field is malformed, or several are set.
        """
        return read_guided({name: getattr(self, name) for name in GUIDED})

    def checked_min_tokens(self, max_tokens: int | None) -> int:
        """`min_tokens`, or 0.

        Raises:
            InvalidRequest: `min_tokens` exceeds the answer's limit.
        """
        min_tokens = self.min_tokens or 0
        if max_tokens is not None and min_tokens > max_tokens:
            raise invalid_field("min_tokens", f"{min_tokens} exceeds the limit, {max_tokens}.")
        return min_tokens
