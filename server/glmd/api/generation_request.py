"""Request fields and defaults of all APIs, and the neutral generation request.

Each API's request model turns itself into a `GenerationRequest`; `glmd.api.serving` takes it from
there.
"""

from __future__ import annotations

import logging
import re
import uuid
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal, Self, TypeAlias, TypeVar
from urllib.parse import quote

import msgspec
from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    model_validator,
)

from glmd.api.observability.request_stats import Api
from glmd.chat.types import (
    MAX_BIASED_TOKENS,
    MAX_STOP_LENGTH,
    Conversation,
    Tool,
)
from glmd.config import Profile, Settings
from glmd.errors import invalid_field
from glmd.ipc import SamplingParams
from glmd.structured_output.request import OutputSpec
from glmd.utils.text import quoted

log = logging.getLogger("glmd.api")

INT64 = 2**63

IGNORED_HEADER = "x-glmd-ignored-parameters"
OMITTED_HEADER = "x-glmd-omitted"

MAX_LISTED, MAX_NAME = 32, 64
"""Names in a header, and characters of each name."""

MAX_MEMBERS = 1000
"""Fields of a body, known and unknown."""

MAX_STOPS = 16

NO_OP = "Accepted, without effect."

Effort = Annotated[
    Literal["none", "minimal", "low", "medium", "high", "xhigh", "max"] | None,
    # Clients with a menu of efforts send these for the model's own.
    BeforeValidator(lambda value: None if value in ("", "auto", "default") else value),
]


@dataclass(frozen=True, slots=True)
class Defaults:
    """Values of the parameters that a request leaves out.

    Attributes:
        sampling: Sampling parameters.
        enable_thinking: Think before answering.
        clear_thinking: Drop the reasoning of earlier turns from the prompt.
        asked_to_think: The profile that the request names enables thinking.
        max_tokens: Limit of an answer. None: up to the context limit.
        effort_budgets: Tokens of reasoning by `reasoning_effort`. Absent effort: no limit.
    """

    sampling: SamplingParams
    enable_thinking: bool
    clear_thinking: bool
    asked_to_think: bool
    max_tokens: int | None
    effort_budgets: Mapping[Any, int]

    @classmethod
    def of(
        cls,
        settings: Settings,
        checkpoint: SamplingParams,
        named: Profile | None = None,
        thinking: Mapping[str, bool] | None = None,
    ) -> Defaults:
        """Values of the profile, else of the settings, else of the checkpoint.

        Args:
            checkpoint: Sampling parameters of the checkpoint's generation config.
            thinking: Variables that the checkpoint's chat template sets, if they are not set.
            named: Profile that the request names. None: the settings' profile, if any.
        """
        default = settings.all_profiles[settings.profile] if settings.profile else None
        profile = named or default
        values = profile.values if profile else {}
        template = thinking or {}

        def choose(name: str) -> Any:
            if name not in values and name not in settings.model_fields_set and name in template:
                return template[name]
            return values.get(name, getattr(settings, name, None))

        chosen = {name: choose(name) for name in SamplingParams.__struct_fields__}
        sampling = {name: value for name, value in chosen.items() if value is not None}
        return cls(
            sampling=msgspec.structs.replace(checkpoint, **sampling),
            enable_thinking=choose("enable_thinking"),
            clear_thinking=choose("clear_thinking"),
            asked_to_think=bool(named and named.enable_thinking),
            max_tokens=choose("max_tokens"),
            effort_budgets=settings.effort_budgets,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class GenerationRequest:
    """A checked request of any API.

    Attributes:
        id: ID of the answer that the client reads, such as `chatcmpl-…`.
        prompt: A conversation, or raw prompts as text or token ids.
        param: Name of the field that holds the prompt, for errors.
        sampling: Sampling parameters, with defaults filled in.
        output: Required form of the answer.
        tools: Functions that the answer may call.
        n: Answers per prompt.
        max_tokens: Limit of an answer, reasoning included. None: up to the context limit.
        stop: Strings that end an answer.
        thinking_budget: Tokens after which reasoning is closed. None: no limit.
        single_call: End the answer after its first tool call.
        prompt_logprobs: Emit `PromptTokens` events, with so many alternatives per token.
        include_reasoning: Show the reasoning.
        report_tokens: Emit `GeneratedTokens` events.
        report_progress: Emit `PrefillProgress` events.
        ignored: Names of unknown parameters and of hosted tools, for the response header.

    The other attributes are those of `EngineRequest`.
    """

    id: str
    prompt: Conversation | Sequence[str | list[int]]
    param: str
    sampling: SamplingParams
    output: OutputSpec
    tools: Sequence[Tool] = ()
    n: int = 1
    max_tokens: int | None = None
    min_tokens: int = 0
    stop: Sequence[str] = ()
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    thinking_budget: int | None = None
    single_call: bool = False
    priority: int = 0
    cache_salt: str = ""
    prompt_logprobs: int | None = None
    include_reasoning: bool = True
    report_tokens: bool = False
    report_progress: bool = False
    ignored: Sequence[str] = ()


def new_id(prefix: str) -> str:
    """A unique ID, such as `msg_…`."""
    return prefix + uuid.uuid4().hex


# -- fields of requests -------------------------------------------------------------------


def check_bias(value: dict[str, float] | None) -> dict[str, float] | None:
    for key in value or {}:
        if not TOKEN_ID.fullmatch(key):
            raise ValueError(f"keys must be token ids, not {quoted(key)}")
    return value


def check_stops(value: str | list[str] | None) -> str | list[str] | None:
    strings = [value] if isinstance(value, str) else value or []
    if len(strings) > MAX_STOPS:
        raise ValueError(f"at most {MAX_STOPS} stop strings are allowed")
    if any(len(string) > MAX_STOP_LENGTH for string in strings):
        raise ValueError(f"a stop string must not have more than {MAX_STOP_LENGTH} characters")
    if "" in strings:
        raise ValueError("a stop string must not be empty")
    return value


def optional(description: str, **constraints: Any) -> Any:
    """A field that may be absent or null."""
    return Field(default=None, description=description, **constraints)


def limit_members(most: int) -> BeforeValidator:
    """Refuse an object with more than `most` members before the members are validated."""

    def check(value: object) -> object:
        if isinstance(value, dict) and len(value) > most:
            raise ValueError(f"must have at most {most} members, not {len(value)}")
        return value

    return BeforeValidator(check)


INTEGER = re.compile(r"[+-]?\d{1,19}", re.ASCII)


TOKEN_ID = re.compile(r"\d{1,10}", re.ASCII)


def to_integer(value: object) -> object:
    """An integer that was sent as a float (Lua, JavaScript) or as text (forms)."""
    if isinstance(value, float) and value.is_integer() and abs(value) < INT64:
        return int(value)
    if isinstance(value, str) and INTEGER.fullmatch(value):
        return int(value)
    return value


def to_number(value: object) -> object:
    """A number that was sent as text."""
    if isinstance(value, str):
        try:
            return float(value)
        except ValueError:
            return value
    return value


Integer = Annotated[int, BeforeValidator(to_integer), Field(ge=-INT64, lt=INT64)]
Number = Annotated[float, BeforeValidator(to_number)]

T = TypeVar("T")

FailFastList = Annotated[list[T], Field(fail_fast=True)]
"""List field of a request whose validation stops at the first invalid item.

An error takes ten times as long as a valid item, and a body may have millions of items."""

NoOp: TypeAlias = Annotated[Any, BeforeValidator(lambda _: None), Field(description=NO_OP)]
"""Field that is not read; its value is not kept."""

TokenId = Annotated[int, Field(ge=0, lt=2**31)]
Bias = Annotated[float, Field(ge=-100, le=100)]
LogitBias = Annotated[
    dict[str, Bias] | None,
    Field(max_length=MAX_BIASED_TOKENS),
    limit_members(MAX_BIASED_TOKENS),
    # Lua programs serialise an empty table as a list.
    BeforeValidator(lambda value: None if value == [] else value),
    AfterValidator(check_bias),
]


class StrictModel(BaseModel):
    """Object inside a request."""

    model_config = ConfigDict(strict=True)


class RequestBody(BaseModel):
    """Body of a request, with at most `MAX_MEMBERS` fields.

    Nothing reads the value of an unknown field, so only its kind is kept: True stands for a text,
    list or object that is not empty.
    """

    @model_validator(mode="before")
    @classmethod
    def limit_fields(cls, body: object) -> object:
        if isinstance(body, dict) and len(body) > MAX_MEMBERS:
            raise ValueError(f"must have at most {MAX_MEMBERS} fields, not {len(body)}")
        return body

    @model_validator(mode="after")
    def drop_unknown_values(self) -> Self:
        extra = self.model_extra or {}
        for name, value in extra.items():
            if isinstance(value, str | list | dict) and value:
                extra[name] = True
        return self


class RequestFields(RequestBody):
    """Fields of every generating request. null means absent."""

    model_config = ConfigDict(strict=True, extra="allow", allow_inf_nan=False)

    api: ClassVar[Api]
    refused: ClassVar[Mapping[str, str]]
    """Parameters that would change the answer and are not supported, with the reason."""

    model: str | None = optional("The served model's id, short name or an alias.")
    profile: str | None = optional("Profile of the server, for omitted parameters.")
    stream: bool | None = optional("Answer with server-sent events.")
    temperature: Number | None = optional("0: greedy.", ge=0, le=2)
    top_p: Number | None = optional("0: the likeliest token only.", ge=0, le=1)
    top_k: Integer | None = optional("0 or -1: off.", ge=-1)
    min_p: Number | None = Field(None, ge=0, le=1)
    repetition_penalty: Number | None = optional("1: off.", gt=0, le=10)
    repeat_penalty: Number | None = optional("repetition_penalty's name in llama.cpp.", gt=0, le=10)
    presence_penalty: Number | None = Field(None, ge=-2, le=2)
    frequency_penalty: Number | None = Field(None, ge=-2, le=2)
    logit_bias: LogitBias = optional("Values to add to logits, by token id.")
    seed: Integer | None = optional("Equal seeds give equal answers.")

    def sampling(self, defaults: SamplingParams, logprobs: int | None = None) -> SamplingParams:
        """The request's sampling parameters, else the defaults.

        Raises:
            InvalidRequest: two names of one parameter contradict each other.
        """
        given = self.model_dump(include=SAMPLING_NAMES, exclude_none=True)
        penalty = agreed_value(
            {
                "repetition_penalty": self.repetition_penalty,
                "repeat_penalty": self.repeat_penalty,
            },
            default=None,
        )
        if penalty is not None:
            given["repetition_penalty"] = penalty
        if self.top_k is not None:
            given["top_k"] = max(self.top_k, 0)
        if self.logit_bias is not None:
            given["logit_bias"] = {int(id): bias for id, bias in self.logit_bias.items()}
        return msgspec.structs.replace(defaults, **given, logprobs=logprobs)

    def unknown_parameters(self) -> list[str]:
        """Names of the parameters that glmd does not know.

        Raises:
            InvalidRequest: one of `refused` is set, and not to an empty value or false.
        """
        extra = self.model_extra or {}
        names = [name for name, value in extra.items() if value is not None]
        for name in names:
            is_off = extra[name] is False or extra[name] in ("", [], {})
            if name in self.refused and not is_off:
                raise invalid_field(name, self.refused[name])
        return [name for name in names if name not in self.refused]


def agreed_value(fields: Mapping[str, T | None], *, default: T) -> T:
    """Value of all fields that are set, else the default.

    Raises:
        InvalidRequest: two fields contradict each other.
    """
    given = [(name, value) for name, value in fields.items() if value is not None]
    for name, value in given[1:]:
        if value != given[0][1]:
            raise invalid_field(name, f"contradicts {given[0][0]}.")
    return given[0][1] if given else default


SAMPLING_NAMES = set(SamplingParams.__struct_fields__).intersection(RequestFields.model_fields)


def ignored_header(names: Iterable[str]) -> dict[str, str]:
    """Response header that lists the parameters that were ignored, if any."""
    return _list_header(IGNORED_HEADER, "Parameters ignored", list(names))


def omitted_header(prompt: object) -> dict[str, str]:
    """Response header that lists parts of the conversation missing in the prompt."""
    names = prompt.omitted if isinstance(prompt, Conversation) else ()
    return _list_header(OMITTED_HEADER, "Records omitted", names)


def _list_header(header: str, event: str, names: Sequence[str]) -> dict[str, str]:
    if not names:
        return {}
    # An empty name is spelt "", because a header's value must not end in a space.
    spelt = [quote(name[:MAX_NAME], safe="[].=") or '""' for name in names[:MAX_LISTED]]
    listed = ", ".join(spelt)
    log.info("%s: names=%s", event, listed)
    return {header: listed}


def object_schema(type: str, required: dict[str, Any], **optional: Any) -> dict[str, Any]:
    """JSON schema of an object with a `type`, for the OpenAPI document.

    Messages, items and tools are documented by schemas and not read by pydantic models, because
    the readers are more lenient, and name the wrong field more precisely.
    """
    return {
        "type": "object",
        "required": ["type", *required],
        "properties": {"type": {"enum": [type]}, **required, **optional},
    }
