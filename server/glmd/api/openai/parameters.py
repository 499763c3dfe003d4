"""What the chat and the completions request have in common: sampling, limits, stream, no-ops."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import AfterValidator, BaseModel, ConfigDict, Field

from glmd.api.request_body import FailFastList
from glmd.api.sampling import INT64, NO_OP, SamplingFields, ignored_header
from glmd.chat.request_limits import MAX_STOP_LENGTH, MAX_STOP_TOKENS
from glmd.errors import InvalidRequest
from glmd.structured_output import GUIDED, AnswerFormat, read_guided

MAX_STOPS = 16

REFUSED = {
    "grammar": "The grammar is called guided_grammar here.",
    "guided_whitespace_pattern": "Whitespace between the parts of JSON is as models write it.",
    "chat_template": "The checkpoint's own chat template is used; send chat_template_kwargs.",
    "functions": "This is the old form of tools; send tools.",
    "function_call": "This is the old form of tool_choice; send tool_choice.",
    "audio": "The model writes text only.",
    "web_search_options": "There is no web search here.",
    "prompt_logprobs": "Log-probabilities of the prompt are not available.",
    "use_beam_search": "Beam search is not available.",
    "logits_processors": "Code in requests is not run.",
}
"""Parameters of other servers that would change the answer, and why they are not honoured."""


def check_stops(value: str | list[str] | None) -> str | list[str] | None:
    strings = [value] if isinstance(value, str) else value or []
    if len(strings) > MAX_STOPS:
        raise ValueError(f"at most {MAX_STOPS} stop strings are allowed")
    if any(len(string) > MAX_STOP_LENGTH for string in strings):
        raise ValueError(f"a stop string must not have more than {MAX_STOP_LENGTH} characters")
    if "" in strings:
        raise ValueError("a stop string must not be empty")
    return value


def check_limit(value: int | None) -> int | None:
    if value == 0:
        raise ValueError("must be at least 1")
    return None if value == -1 else value


Limit = Annotated[int | None, Field(ge=-1), AfterValidator(check_limit)]
"""Tokens; -1, which LM Studio's clients send, is no limit."""

TokenId = Annotated[int, Field(ge=0, lt=2**31)]


class StreamOptions(BaseModel):
    model_config = ConfigDict(strict=True)

    include_usage: bool | None = Field(None, description="End with a chunk that holds the usage.")
    include_obfuscation: bool | None = Field(None, description=NO_OP)


class Parameters(SamplingFields):
    """The common parameters."""

    model: str | None = Field(None, description="The served model's id, short name or an alias.")
    stream: bool | None = Field(None, description="Answer with server-sent events.")
    stream_options: StreamOptions | None = None
    n: int | None = Field(None, ge=1, le=128, description="Answers to the same prompt.")

    max_tokens: Limit = Field(
        None, description="Most tokens of the answer, reasoning included; -1: no limit."
    )
    min_tokens: int | None = Field(None, ge=0, description="No end before this many tokens.")
    stop: Annotated[str | FailFastList[str] | None, AfterValidator(check_stops)] = Field(
        None, description=f"Strings that end the answer, at most {MAX_STOPS}; not part of it."
    )
    stop_token_ids: FailFastList[TokenId] | None = Field(
        None, max_length=MAX_STOP_TOKENS, description="Further end tokens."
    )
    ignore_eos: bool | None = Field(None, description="Go on after an end token.")

    guided_json: Any = Field(
        None, description="A JSON schema, or a string of it: the answer is JSON that is valid."
    )
    guided_regex: Any = Field(
        None, description="A regular expression, without lookaround, that the answer matches."
    )
    guided_choice: Any = Field(None, description="Strings, one of which the answer is.")
    guided_grammar: Any = Field(
        None, description="A grammar of the answer, in GBNF or llguidance's variant of Lark."
    )
    structured_outputs: Any = Field(
        None, description="One of json, json_object, regex, choice and grammar, as vLLM has it."
    )

    return_token_ids: bool | None = Field(
        None, description="Give the token ids of prompt and answer, too."
    )
    priority: int | None = Field(
        None,
        ge=-INT64,
        lt=INT64,
        description="Larger goes first among the client's own waiting requests; below 0 lets"
        " everyone's go ahead.",
    )
    cache_salt: str | None = Field(
        None, description="Requests with different salts share no cached prefix."
    )
    user: Any = Field(None, description=NO_OP)
    metadata: Any = Field(None, description=NO_OP)
    store: Any = Field(None, description=NO_OP)
    service_tier: Any = Field(None, description=NO_OP)
    safety_identifier: Any = Field(None, description=NO_OP)
    prompt_cache_key: Any = Field(None, description=NO_OP + " Prefixes are cached by content.")
    prompt_cache_retention: Any = Field(None, description=NO_OP)
    prompt_cache_options: Any = Field(None, description=NO_OP)
    prediction: Any = Field(None, description=NO_OP)

    @property
    def guided_format(self) -> AnswerFormat | None:
        """What the `guided_…` fields and `structured_outputs` say.

        Raises:
            InvalidRequest: they are malformed, or there is more than one.
        """
        return read_guided({name: getattr(self, name) for name in GUIDED})

    @property
    def stops(self) -> list[str]:
        return [self.stop] if isinstance(self.stop, str) else list(self.stop or ())

    @property
    def wants_usage_chunk(self) -> bool:
        return bool(self.stream_options and self.stream_options.include_usage)

    def ignored_header(self) -> dict[str, str]:
        """The response header that lists parameters which nothing here knows.

        Raises:
            InvalidRequest: one of them is known to change what a client expects.
        """
        return ignored_header(self.unknown(REFUSED))

    def engine_options(self, max_tokens: int | None) -> dict[str, Any]:
        """The fields of `EngineRequest` that these parameters are.

        Raises:
            InvalidRequest: the answer would have to be longer than it may be.
        """
        min_tokens = self.min_tokens or 0
        if max_tokens is not None and min_tokens > max_tokens:
            raise InvalidRequest(
                f"min_tokens is {min_tokens}, above the limit of {max_tokens} tokens.",
                param="min_tokens",
            )
        return {
            "n": self.n or 1,
            "max_tokens": max_tokens,
            "min_tokens": min_tokens,
            "stop_token_ids": tuple(self.stop_token_ids or ()),
            "ignore_eos": bool(self.ignore_eos),
            "priority": self.priority or 0,
            "cache_salt": self.cache_salt or "",
        }
