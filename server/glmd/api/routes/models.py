"""`GET /v1/models`: what is served, and the names it answers to."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Depends
from pydantic import BaseModel, Field

from glmd.api.state import AppState, get_state

router = APIRouter(tags=["Models"])


class Model(BaseModel):
    """OpenAI's and Anthropic's model object, with what clients ask a local server for."""

    id: str
    object: Literal["model"] = "model"
    type: Literal["model"] = "model"
    created: int = Field(description="Unix time at which the checkpoint's config was written.")
    created_at: str = Field(description="The same, as RFC 3339 has it.")
    owned_by: str
    display_name: str
    lifecycle: Literal["active"] = "active"
    aliases: list[str] = Field(description="Further names that the model answers to.")
    context_length: int | None = Field(
        description="Prompt and answer together, in tokens; null until the engine is ready."
    )
    max_model_len: int | None = Field(description="`context_length` under vLLM's name.")
    max_input_tokens: int | None = Field(description="And under Anthropic's.")
    has_mtp: bool | None = Field(description="Whether it drafts by multi-token prediction.")
    bits_per_weight: float | None
    size_bytes: int | None = Field(description="Of all weights in memory.")
    profile: str | None = Field(
        description="What requests under this id get where they do not say otherwise."
    )
    profiles: dict[str, dict[str, Any]] = Field(
        description="Every profile that `ID:PROFILE` chooses, and its values."
    )


class ModelList(BaseModel):
    object: Literal["list"] = "list"
    data: list[Model]
    has_more: Literal[False] = False
    first_id: str
    last_id: str


@router.get("/v1/models")
async def list_models(service: Annotated[AppState, Depends(get_state)]) -> ModelList:
    """The one model of this server, and once more for each profile that its settings define."""
    listed = [describe(service), *(describe(service, name) for name in service.settings.profiles)]
    return ModelList(data=listed, first_id=listed[0].id, last_id=listed[-1].id)


@router.get("/v1/models/{id:path}")
async def retrieve_model(id: str, service: Annotated[AppState, Depends(get_state)]) -> Model:
    """The model, by its id, short name or an alias; with `:PROFILE` as that profile has it."""
    return describe(service, service.profile_of(id))


def describe(service: AppState, profile: str | None = None) -> Model:
    model, info = service.model, service.engine.info
    id = model.id if profile is None else f"{model.id}:{profile}"
    profiles = service.settings.all_profiles
    aliases = model.names if profile is None else profiles[profile].aliases
    return Model(
        id=id,
        created=model.created,
        created_at=datetime.fromtimestamp(model.created, UTC).strftime("%Y-%m-%dT%H:%M:%SZ"),
        owned_by=model.owner,
        display_name=id.rpartition("/")[2],
        aliases=[name for name in aliases if name != model.id],
        context_length=info.max_context if info else None,
        max_model_len=info.max_context if info else None,
        max_input_tokens=info.max_context if info else None,
        has_mtp=info.has_mtp if info else None,
        bits_per_weight=info.bits_per_weight if info else None,
        size_bytes=info.weight_bytes if info else None,
        profile=profile or service.settings.profile,
        profiles={name: each.values for name, each in profiles.items()},
    )
