"""`GET /api/v0/models`: what LM Studio's front ends ask, answered as LM Studio does."""

from __future__ import annotations

from typing import Annotated, Literal

from fastapi import APIRouter, Depends
from pydantic import BaseModel, Field

from glmd.api.state import AppState, get_state
from glmd.checkpoint.config import MODEL_TYPE

router = APIRouter(tags=["Models"])

GivenService = Annotated[AppState, Depends(get_state)]


class LMStudioModel(BaseModel):
    """LM Studio's model object (https://lmstudio.ai/docs/developer/rest/endpoints)."""

    id: str
    object: Literal["model"] = "model"
    type: Literal["llm"] = "llm"
    publisher: str
    arch: str = MODEL_TYPE
    compatibility_type: Literal["mlx"] = "mlx"
    quantization: str | None = Field(description="Bits per weight; null until the engine is ready.")
    state: Literal["loaded", "not-loaded"]
    max_context_length: int | None = Field(
        description="Prompt and answer together, in tokens; null until the engine is ready."
    )
    loaded_context_length: int | None = Field(description="The same.")
    capabilities: list[Literal["tool_use"]] = ["tool_use"]


class LMStudioModels(BaseModel):
    object: Literal["list"] = "list"
    data: list[LMStudioModel]


@router.get("/api/v0/models")
async def list_models(service: GivenService) -> LMStudioModels:
    """The one model of this server, and whether it is loaded."""
    return LMStudioModels(data=[describe(service)])


@router.get("/api/v0/models/{id:path}")
async def retrieve_model(id: str, service: GivenService) -> LMStudioModel:
    """The model, by its id, short name or an alias."""
    service.defaults(id)
    return describe(service)


def describe(service: AppState) -> LMStudioModel:
    model, info = service.model, service.engine.info
    context = info.max_context if info else None
    return LMStudioModel(
        id=model.id,
        publisher=model.owner,
        quantization=f"{info.bits_per_weight:.1f}bit" if info else None,
        state="loaded" if service.is_ready else "not-loaded",
        max_context_length=context,
        loaded_context_length=context,
    )
