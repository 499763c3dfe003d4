"""What holds for a request that does not say: by settings, checkpoint, and the profile it names."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import msgspec

from glmd.config import Profile, Settings
from glmd.ipc import SamplingParams

SAMPLING = frozenset(SamplingParams.__struct_fields__)


@dataclass(frozen=True, slots=True)
class Defaults:
    """The values of one request's parameters that are left out.

    Attributes:
        sampling: of its tokens.
        enable_thinking: think before answering.
        clear_thinking: drop the reasoning of earlier turns from the prompt.
        asked_to_think: a profile that the request itself names wants thinking.
        max_tokens: of the answer; None: up to the context limit.
    """

    sampling: SamplingParams
    enable_thinking: bool
    clear_thinking: bool
    asked_to_think: bool
    max_tokens: int | None

    @classmethod
    def of(
        cls, settings: Settings, checkpoint: SamplingParams, named: Profile | None = None
    ) -> Defaults:
        """A profile over the settings over the checkpoint.

        Args:
            checkpoint: how it is meant to be sampled.
            named: the profile that the request names; None: the one of the settings, if any.
        """
        default = settings.all_profiles[settings.profile] if settings.profile else None
        profile = named or default
        said = profile.values if profile else {}

        def choose(name: str) -> Any:
            return said.get(name, getattr(settings, name, None))

        sampling = {name: value for name in SAMPLING if (value := choose(name)) is not None}
        return cls(
            sampling=msgspec.structs.replace(checkpoint, **sampling),
            enable_thinking=choose("enable_thinking"),
            clear_thinking=choose("clear_thinking"),
            asked_to_think=bool(named and named.enable_thinking),
            max_tokens=choose("max_tokens"),
        )
