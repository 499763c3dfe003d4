"""Routes `/glmd/status` and `/glmd/requests/{id}/cancel`."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator
from itertools import islice
from typing import Annotated, Any

import msgspec
from fastapi import APIRouter, Query
from pydantic import AliasPath, BaseModel, ConfigDict, Field
from starlette.exceptions import HTTPException

from glmd import __version__
from glmd.api.auth import Access
from glmd.api.context import AccessDep
from glmd.api.generation_request import Defaults
from glmd.api.observability.request_stats import (
    HISTORY,
    Api,
    Finish,
    RequestState,
    RequestStats,
)
from glmd.api.routes.health import Loading
from glmd.api.routes.models import Model, describe_model
from glmd.api.state import AppState, StateDep
from glmd.engine_client.client import Condition
from glmd.errors import Cancelled

router = APIRouter(prefix="/glmd", tags=["Monitoring"])

SERIES_SECONDS = 120
"""Length of the series in a status."""

RATE_SECONDS = 5
"""Seconds that the current rates average over."""

SAMPLING_FIELDS = (
    "temperature", "top_p", "top_k", "min_p", "repetition_penalty", "presence_penalty",
    "frequency_penalty",
)  # fmt: skip


def of_exchange(name: str, description: str | None = None) -> Any:
    """A field whose value is an attribute of the request's `HttpExchange`."""
    return Field(validation_alias=AliasPath("exchange", name), description=description)


OWN_REASONS = ("whole", "off")
"""Reasons that say nothing about the requests of others."""


class RequestStatus(BaseModel):
    """A request to the engine."""

    model_config = ConfigDict(from_attributes=True)

    id: str = Field(description="Id of the response, such as chatcmpl-….")
    request_id: str = of_exchange("id", "x-request-id of the HTTP request.")
    api: Api
    path: str = of_exchange("path")
    client: str = of_exchange("client", "Address of the client.")
    model: str | None = of_exchange("model", "Model name in the request.")
    stream: bool = of_exchange("stream")
    sequences: int = Field(description="Number of answers (n).")
    state: RequestState
    started: float = of_exchange("started_at", "Unix time of arrival.")
    seconds: float = Field(description="Seconds from arrival to the end, or to now.")
    queue_seconds: float | None = Field(description="Seconds from arrival to admission.")
    ttft: float | None = Field(description="Seconds from arrival to the first token.")
    mean_gap: float | None = Field(description="Mean seconds between two tokens.")
    longest_gap: float = Field(description="Maximum seconds between two tokens.")
    prompt_tokens: int
    computed_tokens: int = Field(description="Prompt tokens in KV, including cached tokens.")
    cached_tokens: int
    cache_reason: str | None = Field(
        None,
        validation_alias=AliasPath("match", "reason"),
        description="Why no more was cached at admission: whole (all was cached), new (nothing is"
        " cached beyond that prefix), differs (the cache continues differently), evicted, off. Only"
        " admin keys see new, differs and evicted: they tell about requests of other keys.",
    )
    generated_tokens: int
    drafted: int = Field(description="Verified MTP drafts.")
    accepted: int = Field(description="Accepted MTP drafts.")
    finish: Finish | None = None
    error: str | None = Field(None, description="Why the request failed or was cancelled.")


class EngineStatus(BaseModel):
    state: Condition
    pid: int | None
    restarts: int = Field(description="Number of engine restarts.")
    failure: str | None = Field(description="Why the engine last exited or did not start.")
    loading: Loading | None = Field(description="Bytes of weights loaded, until ready.")
    stats: dict[str, int | float] = Field(
        description="Counters and gauges of the engine, updated every second: queues, memory, KV,"
        " cache, steps, drafts. Empty for keys that are not an admin's."
    )


class FirstToken(BaseModel):
    time: float = Field(description="Unix time.")
    ttft: float = Field(description="Seconds from arrival.")


class Speed(BaseModel):
    """Throughput of the last seconds."""

    generated_per_second: float = Field(description=f"Mean of {RATE_SECONDS} seconds.")
    computed_per_second: float = Field(description="Prompt tokens, mean of the same seconds.")
    until: int = Field(description="Unix second at which the series end.")
    generated: list[int] = Field(description=f"Tokens by second, {SERIES_SECONDS} s.")
    computed: list[int] = Field(description="Computed prompt tokens by second.")
    first_tokens: list[FirstToken] = Field(description="Recent first tokens, latest last.")


class DefaultValues(BaseModel):
    """Values of parameters that a request omits."""

    temperature: float
    top_p: float
    top_k: int
    min_p: float
    repetition_penalty: float
    presence_penalty: float
    frequency_penalty: float
    max_tokens: int | None = Field(description="null: up to the context length.")
    enable_thinking: bool
    clear_thinking: bool

    @classmethod
    def of(cls, defaults: Defaults) -> DefaultValues:
        return cls(
            max_tokens=defaults.max_tokens,
            enable_thinking=defaults.enable_thinking,
            clear_thinking=defaults.clear_thinking,
            **{name: getattr(defaults.sampling, name) for name in SAMPLING_FIELDS},
        )


class Status(BaseModel):
    version: str
    time: float = Field(description="Unix time.")
    uptime: float = Field(description="Seconds since the server started.")
    model: Model
    defaults: DefaultValues = Field(description="Without a profile.")
    profiles: dict[str, DefaultValues] = Field(description="By profile.")
    engine: EngineStatus
    speed: Speed | None = Field(description="null for keys that are not an admin's.")
    running: list[RequestStatus] = Field(
        description="Running requests of the key, or of all keys for an admin's, in order of"
        " arrival."
    )
    recent: list[RequestStatus] = Field(description="Finished requests, latest first.")


class CancelledRequests(BaseModel):
    cancelled: list[str] = Field(description="Ids of the cancelled requests.")


@router.get("/status")
async def status(
    state: StateDep,
    access: AccessDep,
    recent: Annotated[
        int, Query(ge=0, le=HISTORY, description="Maximum number of finished requests.")
    ] = HISTORY,
) -> Status:
    """Model, engine, memory, cache, throughput, running and recent requests."""
    engine, registry = state.engine, state.registry
    return Status(
        version=__version__,
        time=time.time(),
        uptime=time.monotonic() - state.started,
        model=describe_model(state),
        defaults=DefaultValues.of(state.defaults(None)),
        profiles={
            name: DefaultValues.of(state.defaults(None, name))
            for name in state.settings.all_profiles
        },
        engine=EngineStatus(
            state=engine.condition,
            pid=engine.pid,
            restarts=engine.restarts,
            failure=engine.failure,
            loading=Loading.of(state),
            stats=msgspec.structs.asdict(engine.stats) if access.sees_all else {},
        ),
        speed=measure_speed(state) if access.sees_all else None,
        running=list(rows(registry.running.values(), access)),
        recent=list(islice(rows(reversed(registry.recent), access), recent)),
    )


def rows(requests: Iterable[RequestStats], access: Access) -> Iterator[RequestStatus]:
    """The requests that `access` may see."""
    for stats in requests:
        if access.may_see(stats.exchange.owner):
            row = RequestStatus.model_validate(stats)
            if not access.sees_all and row.cache_reason not in OWN_REASONS:
                row.cache_reason = None
            yield row


@router.post("/requests/{id}/cancel")
async def cancel(id: str, state: StateDep, access: AccessDep) -> CancelledRequests:
    """Cancel a running request, by response id or x-request-id.

    The client gets an error.
    """
    found = [stats for stats in state.registry.find(id) if access.may_see(stats.exchange.owner)]
    if not found:
        raise HTTPException(404, f"No running request {id!r}.")
    for stats in found:
        state.engine.abort(stats.id, Cancelled("The request was cancelled at the server."))
    return CancelledRequests(cancelled=[stats.id for stats in found])


def measure_speed(state: AppState) -> Speed:
    seconds = state.registry.last_seconds(SERIES_SECONDS)
    recent = seconds[-RATE_SECONDS:]
    return Speed(
        generated_per_second=sum(second.generated for second in recent) / RATE_SECONDS,
        computed_per_second=sum(second.computed for second in recent) / RATE_SECONDS,
        until=seconds[-1].number + 1,
        generated=[second.generated for second in seconds],
        computed=[second.computed for second in seconds],
        first_tokens=[
            FirstToken(time=moment, ttft=wait) for moment, wait in state.registry.first_tokens
        ],
    )
