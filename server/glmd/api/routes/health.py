"""Routes `/livez` (the process runs) and `/health` (the engine accepts requests)."""

from __future__ import annotations

from typing import Literal

from fastapi import APIRouter, Response
from pydantic import BaseModel, Field

from glmd.api.state import AppState, StateDep
from glmd.engine_client.client import Condition

router = APIRouter(tags=["Health"])


class Alive(BaseModel):
    status: Literal["alive"] = "alive"


class Loading(BaseModel):
    done_bytes: int
    total_bytes: int

    @classmethod
    def of(cls, state: AppState) -> Loading | None:
        progress = state.engine.progress
        return cls.model_validate(progress, from_attributes=True) if progress else None


class Health(BaseModel):
    status: Condition
    model: str
    kv_bits: int | None = Field(None, description="Bits of a cached value, once known.")
    loading: Loading | None = Field(None, description="Bytes of weights loaded, until ready.")
    failure: str | None = Field(None, description="Why the engine is not running.")
    restarts: int = Field(description="Number of engine restarts.")


@router.get("/api/hello", include_in_schema=False)  # requested by Claude Code
@router.get("/livez")
async def livez() -> Alive:
    """200 while the process runs."""
    return Alive()


@router.get("/health", responses={503: {"model": Health, "description": "Not ready"}})
async def health(response: Response, state: StateDep) -> Health:
    """200 if requests are served, also while the engine is unloaded; else 503."""
    served = state.engine.accepts_requests and not state.engine.stalled
    response.status_code = 200 if served else 503
    return Health(
        status=state.engine.condition,
        model=state.model.id,
        kv_bits=state.engine.info.kv_bits if state.engine.info else None,
        loading=Loading.of(state),
        failure=state.engine.failure,
        restarts=state.engine.restarts,
    )
