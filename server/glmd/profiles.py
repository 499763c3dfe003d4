"""Profiles: defaults of sampling and thinking under a name that a request can choose."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field

ProfileName = Annotated[str, Field(pattern=r"^[A-Za-z0-9_.-]+$")]
"""What can follow a model's name and a colon."""


class Profile(BaseModel):
    """What a request that names the profile, and does not say otherwise, gets.

    None: as without the profile.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    temperature: float | None = Field(None, ge=0, le=2)
    top_p: float | None = Field(None, gt=0, le=1)
    top_k: int | None = Field(None, ge=0, description="0: off.")
    min_p: float | None = Field(None, ge=0, le=1)
    repetition_penalty: float | None = Field(None, gt=0, le=10, description="1: off.")
    presence_penalty: float | None = Field(None, ge=-2, le=2)
    frequency_penalty: float | None = Field(None, ge=-2, le=2)
    max_tokens: int | None = Field(None, ge=1)
    enable_thinking: bool | None = None
    clear_thinking: bool | None = None
    aliases: tuple[str, ...] = Field(
        (), description="Names of the model that choose the profile, such as claude-haiku-*."
    )

    @property
    def values(self) -> dict[str, Any]:
        """What it says, without its aliases."""
        return self.model_dump(exclude_none=True, exclude={"aliases"})


BUILT_IN: Mapping[str, Profile] = {
    name: Profile.model_validate(values)
    for name, values in {
        "card": {"temperature": 0.2, "top_k": 50, "top_p": 0.95, "min_p": 0.01},
        "general": {"temperature": 1.0, "top_k": 0, "top_p": 0.95, "min_p": 0.0},
        "tools": {"temperature": 0.7, "top_k": 0, "top_p": 1.0, "min_p": 0.0},
    }.items()
}
"""Always there, until the settings define a profile of the name. `card` is what the card of the
mixed 8/5-bit model recommends (https://huggingface.co/leonsarmiento/GLM-4.7-Flash-5bit-mlx),
`general` and `tools` what the model's makers do (https://huggingface.co/zai-org/GLM-4.7-Flash)."""
