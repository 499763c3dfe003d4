"""Sampling parameters, as every API takes them, and what becomes of parameters that none knows."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping
from typing import Annotated, Any
from urllib.parse import quote

import msgspec
from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field

from glmd.api.request_body import limit_members
from glmd.chat.request_limits import MAX_BIASED_TOKENS
from glmd.errors import InvalidRequest
from glmd.ipc import SamplingParams

log = logging.getLogger("glmd.api")

INT64 = 2**63

IGNORED_HEADER = "x-glmd-ignored-parameters"

MAX_LISTED, MAX_NAME = 32, 64
"""Unknown parameters that the header names, and how much of each name."""

NO_OP = "Accepted, without effect."


def says_nothing(value: object) -> bool:
    """Whether clients leave a parameter off by sending this: `use_beam_search: false`."""
    return value is False or value in ("", [], {})


def no_list(value: object) -> object:
    """Programs in which an empty table is an empty list send that for no bias."""
    return None if value == [] else value


def check_bias(value: dict[str, float] | None) -> dict[str, float] | None:
    for key in value or {}:
        if not (key.isascii() and key.isdigit()):
            raise ValueError(f"keys must be token ids, not {key!r}")
    return value


Bias = Annotated[float, Field(ge=-100, le=100)]
LogitBias = Annotated[
    dict[str, Bias] | None,
    limit_members(MAX_BIASED_TOKENS),
    BeforeValidator(no_list),
    AfterValidator(check_bias),
]


class SamplingFields(BaseModel):
    """null means absent, everywhere."""

    model_config = ConfigDict(strict=True, extra="allow", allow_inf_nan=False)

    temperature: float | None = Field(None, ge=0, le=2, description="0: greedy.")
    top_p: float | None = Field(None, ge=0, le=1, description="0: the likeliest token only.")
    top_k: int | None = Field(None, ge=-1, description="0 or -1: off.")
    min_p: float | None = Field(None, ge=0, le=1)
    repetition_penalty: float | None = Field(None, gt=0, le=10, description="1: off.")
    presence_penalty: float | None = Field(None, ge=-2, le=2)
    frequency_penalty: float | None = Field(None, ge=-2, le=2)
    logit_bias: LogitBias = Field(
        None,
        max_length=MAX_BIASED_TOKENS,
        description="From token ids to what is added to their logits.",
    )
    profile: str | None = Field(
        None, description="Profile of the server, whose values hold where the request has none."
    )
    seed: int | None = Field(
        None, ge=-INT64, lt=INT64, description="Equal seeds give equal answers."
    )

    def sampling(self, defaults: SamplingParams, logprobs: int | None = None) -> SamplingParams:
        """The request's sampling: what it says, else the defaults."""
        said: Mapping[str, Any] = {
            "temperature": self.temperature,
            "top_k": None if self.top_k is None else max(self.top_k, 0),
            "top_p": self.top_p,
            "min_p": self.min_p,
            "repetition_penalty": self.repetition_penalty,
            "presence_penalty": self.presence_penalty,
            "frequency_penalty": self.frequency_penalty,
            "logit_bias": self.logit_bias and {int(id): b for id, b in self.logit_bias.items()},
            "seed": self.seed,
            "logprobs": logprobs,
        }
        given = {name: value for name, value in said.items() if value is not None}
        return msgspec.structs.replace(defaults, **given)

    def unknown(self, refused: Mapping[str, str]) -> list[str]:
        """Names of the parameters that nothing here knows.

        Args:
            refused: those known to change what a client expects, and why they are not honoured.

        Raises:
            InvalidRequest: one of them is there, and says something.
        """
        extra = self.model_extra or {}
        names = [name for name, value in extra.items() if value is not None]
        for name in names:
            if name in refused and not says_nothing(extra[name]):
                raise InvalidRequest(f"{name}: {refused[name]}", param=name)
        return [name for name in names if name not in refused]


def ignored_header(names: Iterable[str]) -> dict[str, str]:
    """The response header that lists what was left out of account, if anything was."""
    names = list(names)
    if not names:
        return {}
    # A header's value must not end in a space, which a name of no characters would leave.
    spelt = [quote(name[:MAX_NAME], safe="[].=") or '""' for name in names[:MAX_LISTED]]
    listed = ", ".join(spelt)
    log.info("Ignored what is unknown here: %s", listed)
    return {IGNORED_HEADER: listed}
