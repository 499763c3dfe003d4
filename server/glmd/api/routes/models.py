"""Routes that describe the model.

`/v1/models` (OpenAI, Anthropic), `/api/v0/models` and `/api/v1/models` (LM Studio), `/props`
(llama-server).
"""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any, Literal

from fastapi import APIRouter
from pydantic import BaseModel, Field

from glmd import __version__
from glmd.api.state import AppState, StateDep
from glmd.checkpoint.config import MODEL_TYPE

router = APIRouter(tags=["Models"])


class ModelMeta(BaseModel):
    """As of llama-server."""

    n_ctx: int = Field(description="`context_length` under llama-server's name.")
    n_vocab: int
    size: int = Field(description="`size_bytes` under llama-server's name.")


class Model(BaseModel):
    """Model object of OpenAI and Anthropic, with fields for local servers."""

    id: str
    object: Literal["model"] = "model"
    type: Literal["model"] = "model"
    created: int = Field(description="Unix time of the checkpoint's config.json.")
    created_at: str = Field(description="`created` in RFC 3339.")
    owned_by: str
    display_name: str
    lifecycle: Literal["active"] = "active"
    aliases: list[str] = Field(description="Other names that requests may use.")
    context_length: int | None = Field(
        description="Maximum tokens of prompt and answer together; null until the engine is ready."
    )
    max_model_len: int | None = Field(description="`context_length` under vLLM's name.")
    max_input_tokens: int | None = Field(description="`context_length` under Anthropic's name.")
    kv_bits: int | None = Field(description="Bits of a cached value: the setting, or its choice.")
    meta: ModelMeta | None = Field(description="Null until the engine is ready.")
    has_mtp: bool | None = Field(description="Whether multi-token prediction drafts tokens.")
    bits_per_weight: float | None
    size_bytes: int | None = Field(description="Size of all weights in memory.")
    profile: str | None = Field(description="Profile of requests that use this id.")
    profiles: dict[str, dict[str, Any]] = Field(
        description="Profiles, used as `ID:PROFILE`, with their values."
    )


class ModelList(BaseModel):
    object: Literal["list"] = "list"
    data: list[Model]
    has_more: Literal[False] = False
    first_id: str
    last_id: str


class LMStudioModel(BaseModel):
    """Model object of LM Studio (https://lmstudio.ai/docs/developer/rest/endpoints)."""

    id: str
    object: Literal["model"] = "model"
    type: Literal["llm"] = "llm"
    publisher: str
    arch: str = MODEL_TYPE
    compatibility_type: Literal["mlx"] = "mlx"
    quantization: str | None = Field(description="Bits per weight; null until the engine is ready.")
    state: Literal["loaded", "not-loaded"]
    max_context_length: int | None = Field(
        description="Maximum tokens of prompt and answer together; null until the engine is ready."
    )
    loaded_context_length: int | None = Field(description="Equal to `max_context_length`.")
    capabilities: list[Literal["tool_use"]] = ["tool_use"]


class LMStudioModels(BaseModel):
    object: Literal["list"] = "list"
    data: list[LMStudioModel]


@router.get("/v1/models")
async def list_models(state: StateDep) -> ModelList:
    """List the model, and the model with each profile of the settings."""
    data = [describe_model(state)]
    data += [describe_model(state, profile) for profile in state.settings.profiles]
    return ModelList(data=data, first_id=data[0].id, last_id=data[-1].id)


@router.get("/v1/models/{id:path}")
async def retrieve_model(id: str, state: StateDep) -> Model:
    """Get the model by id, short name or alias; `:PROFILE` selects a profile."""
    return describe_model(state, state.profile_of(id))


def describe_model(state: AppState, profile: str | None = None) -> Model:
    model, info = state.model, state.engine.info
    id = model.id if profile is None else f"{model.id}:{profile}"
    profiles = state.settings.all_profiles
    aliases = model.names if profile is None else profiles[profile].aliases
    context = info.max_context if info else None
    return Model(
        id=id,
        created=model.created,
        created_at=datetime.fromtimestamp(model.created, UTC).strftime("%Y-%m-%dT%H:%M:%SZ"),
        owned_by=model.owner,
        display_name=id.rpartition("/")[2],
        aliases=[name for name in aliases if name != model.id],
        context_length=context,
        max_model_len=context,
        max_input_tokens=context,
        kv_bits=info.kv_bits if info else None,
        meta=ModelMeta(n_ctx=info.max_context, n_vocab=info.vocab_size, size=info.weight_bytes)
        if info
        else None,
        has_mtp=info.has_mtp if info else None,
        bits_per_weight=info.bits_per_weight if info else None,
        size_bytes=info.weight_bytes if info else None,
        profile=profile or state.settings.profile,
        profiles={name: each.values for name, each in profiles.items()},
    )


@router.get("/api/v0/models")
async def list_lmstudio_models(state: StateDep) -> LMStudioModels:
    """List the model in LM Studio's format."""
    return LMStudioModels(data=[describe_lmstudio_model(state)])


@router.get("/api/v0/models/{id:path}")
async def retrieve_lmstudio_model(id: str, state: StateDep) -> LMStudioModel:
    """Get the model in LM Studio's format, by id, short name or alias."""
    state.defaults(id)  # Raises for an unknown name.
    return describe_lmstudio_model(state)


def describe_lmstudio_model(state: AppState) -> LMStudioModel:
    model, info = state.model, state.engine.info
    context = info.max_context if info else None
    return LMStudioModel(
        id=model.id,
        publisher=model.owner,
        quantization=f"{info.bits_per_weight:.1f}bit" if info else None,
        state="loaded" if state.is_ready else "not-loaded",
        max_context_length=context,
        loaded_context_length=context,
    )


# -- LM Studio's newer API ------------------------------------------------------------------


class LMStudioQuantization(BaseModel):
    name: str
    bits_per_weight: float


class LMStudioConfig(BaseModel):
    context_length: int


class LMStudioInstance(BaseModel):
    id: str
    config: LMStudioConfig


class LMStudioCapabilities(BaseModel):
    vision: Literal[False] = False
    trained_for_tool_use: Literal[True] = True


class LMStudioModelInfo(BaseModel):
    """Model object of LM Studio 0.4 (https://lmstudio.ai/docs/developer/rest/list)."""

    type: Literal["llm"] = "llm"
    publisher: str
    key: str = Field(description="The model's ID.")
    display_name: str
    architecture: str = MODEL_TYPE
    quantization: LMStudioQuantization | None = Field(description="Null until the engine is ready.")
    size_bytes: int | None
    params_string: None = None
    loaded_instances: list[LMStudioInstance] = Field(description="Empty until the engine is ready.")
    max_context_length: int | None
    format: Literal["mlx"] = "mlx"
    capabilities: LMStudioCapabilities = LMStudioCapabilities()
    description: None = None


class LMStudioModelInfos(BaseModel):
    models: list[LMStudioModelInfo]


@router.get("/api/v1/models")
async def list_lmstudio_model_infos(state: StateDep) -> LMStudioModelInfos:
    """List the model in the format of LM Studio 0.4."""
    model, info = state.model, state.engine.info
    context = info.max_context if info else None
    instances = []
    if context is not None and state.is_ready:
        config = LMStudioConfig(context_length=context)
        instances.append(LMStudioInstance(id=model.id, config=config))
    described = LMStudioModelInfo(
        publisher=model.owner,
        key=model.id,
        display_name=model.id.rpartition("/")[2],
        quantization=LMStudioQuantization(
            name=f"{info.bits_per_weight:.1f}bit", bits_per_weight=info.bits_per_weight
        )
        if info
        else None,
        size_bytes=info.weight_bytes if info else None,
        loaded_instances=instances,
        max_context_length=context,
    )
    return LMStudioModelInfos(models=[described])


# -- llama-server -----------------------------------------------------------------------------


class GenerationSettings(BaseModel):
    n_ctx: int | None = Field(description="Context length; null until the engine is ready.")
    params: dict[str, Any] = Field(description="Default sampling parameters.")


class Modalities(BaseModel):
    vision: Literal[False] = False
    audio: Literal[False] = False


class ServerProps(BaseModel):
    """Properties of the server, as llama-server has them."""

    default_generation_settings: GenerationSettings
    model_alias: str
    modalities: Modalities = Modalities()
    build_info: str


@router.get("/props")
async def get_props(state: StateDep) -> ServerProps:
    """Context length and default parameters, for clients of llama-server."""
    info = state.engine.info
    sampling = state.defaults(None).sampling
    names = ("temperature", "top_k", "top_p", "min_p")
    return ServerProps(
        default_generation_settings=GenerationSettings(
            n_ctx=info.max_context if info else None,
            params={name: getattr(sampling, name) for name in names},
        ),
        model_alias=state.model.id,
        build_info=f"glmd {__version__}",
    )
