"""`/livez`: the process answers. `/health`: the model does."""

from __future__ import annotations

from typing import Annotated, Literal

from fastapi import APIRouter, Depends, Response
from pydantic import BaseModel, Field

from glmd.api.state import AppState, get_state

router = APIRouter(tags=["Health"])


class Alive(BaseModel):
    status: Literal["alive"] = "alive"


class Loading(BaseModel):
    done_bytes: int
    total_bytes: int


class Health(BaseModel):
    status: Literal["ready", "loading", "restarting", "failed", "stopped"]
    model: str
    loading: Loading | None = Field(None, description="Weights read so far, until ready.")
    failure: str | None = Field(None, description="Why the engine is not running.")
    restarts: int = Field(description="How often the engine has been started again.")


@router.get("/api/hello", include_in_schema=False)  # where Claude Code asks
@router.get("/livez")
async def livez() -> Alive:
    """200 as long as the server runs at all."""
    return Alive()


@router.get("/health", responses={503: {"model": Health, "description": "Not ready"}})
async def health(response: Response, service: Annotated[AppState, Depends(get_state)]) -> Health:
    """200 when requests are served, else 503."""
    engine = service.engine
    response.status_code = 200 if service.is_ready else 503
    return Health(
        status=engine.state,
        model=service.model.id,
        loading=Loading.model_validate(engine.progress, from_attributes=True)
        if engine.progress
        else None,
        failure=engine.failure,
        restarts=engine.restarts,
    )
