"""`/glmd/status`: what the server is doing, for its page and for scripts; and ending a request."""

from __future__ import annotations

import time
from itertools import islice
from typing import Annotated, Literal

import msgspec
from fastapi import APIRouter, Depends, Query
from pydantic import BaseModel, Field
from starlette.exceptions import HTTPException

from glmd import __version__
from glmd.api.defaults import Defaults
from glmd.api.observability.exchange import Api
from glmd.api.observability.request_stats import HISTORY, Finish, RequestStats, State
from glmd.api.routes import models
from glmd.api.routes.health import Loading
from glmd.api.state import AppState, get_state
from glmd.errors import Cancelled

router = APIRouter(prefix="/glmd", tags=["Monitoring"])

GivenService = Annotated[AppState, Depends(get_state)]

SHOWN_SECONDS = 120
"""How much of the timeline a status has."""

RATE_SECONDS = 5
"""Over how many seconds the present rates are taken."""

SHOWN_SAMPLING = (
    "temperature", "top_p", "top_k", "min_p", "repetition_penalty", "presence_penalty",
    "frequency_penalty",
)  # fmt: skip


class RequestStatus(BaseModel):
    """One request to the engine."""

    id: str = Field(description="The answer's id, such as chatcmpl-….")
    request_id: str = Field(description="The HTTP request's x-request-id.")
    api: Api
    path: str
    client: str = Field(description="The address that it came from.")
    model: str | None = Field(description="The model that it named.")
    stream: bool
    sequences: int = Field(description="Answers to the prompt.")
    state: State
    started: float = Field(description="When it arrived, in Unix time.")
    seconds: float = Field(description="Since then, to its end or to now.")
    queue_seconds: float | None = Field(description="From its arrival until its turn came.")
    ttft: float | None = Field(description="Seconds to the first token.")
    mean_gap: float | None = Field(description="Seconds between two tokens, on average.")
    longest_gap: float = Field(description="Longest time between two tokens, in seconds.")
    prompt_tokens: int
    computed_tokens: int = Field(description="Prompt tokens ready, cached ones included.")
    cached_tokens: int
    cache_reason: str | None = Field(
        None,
        description="Why no more was cached when its turn came: whole (there is no more), new"
        " (nothing is stored behind that), differs (what is stored there goes on differently),"
        " evicted, salt (it is stored with another cache_salt), off.",
    )
    generated_tokens: int
    drafted: int = Field(description="MTP drafts verified.")
    accepted: int
    finish: Finish | None = None
    error: str | None = Field(None, description="Why it ended, if not by itself.")

    @classmethod
    def of(cls, record: RequestStats) -> RequestStatus:
        exchange = record.exchange
        return cls(
            id=record.id,
            request_id=exchange.id,
            api=record.api,
            path=exchange.path,
            client=exchange.client,
            model=exchange.model,
            stream=exchange.stream,
            sequences=record.sequences,
            state=record.state,
            started=exchange.began_at,
            seconds=record.seconds,
            queue_seconds=record.queue_seconds,
            ttft=record.ttft,
            mean_gap=record.mean_gap,
            longest_gap=record.longest_gap,
            prompt_tokens=record.prompt_tokens,
            computed_tokens=record.computed_tokens,
            cached_tokens=record.cached_tokens,
            cache_reason=record.match.reason if record.match else None,
            generated_tokens=record.generated_tokens,
            drafted=record.drafted,
            accepted=record.accepted,
            finish=record.finish if record.state == "finished" else None,
            error=record.error,
        )


class EngineStatus(BaseModel):
    state: Literal["loading", "ready", "restarting", "failed", "stopped"]
    pid: int | None
    restarts: int = Field(description="How often the engine has been started again.")
    failure: str | None = Field(description="Why it last died or refused to start.")
    loading: Loading | None = Field(description="Weights read so far, until ready.")
    stats: dict[str, int | float] = Field(
        description="The engine's counters and gauges, at most a second old: queues, memory, KV,"
        " cache, steps, drafts."
    )


class FirstToken(BaseModel):
    time: float = Field(description="When it came, in Unix time.")
    ttft: float = Field(description="Seconds from the request's arrival.")


class Speed(BaseModel):
    """What the last seconds gave."""

    generated_per_second: float = Field(description=f"Tokens, over {RATE_SECONDS} seconds.")
    computed_per_second: float = Field(description="Prompt tokens computed, likewise.")
    until: int = Field(description="The Unix second at which the series end.")
    generated: list[int] = Field(description=f"Tokens by second, {SHOWN_SECONDS} of them.")
    computed: list[int] = Field(description="Prompt tokens computed by second.")
    first_tokens: list[FirstToken] = Field(description="The last ones, the latest last.")


class DefaultValues(BaseModel):
    """What a request gets where it leaves something out."""

    temperature: float
    top_p: float
    top_k: int
    min_p: float
    repetition_penalty: float
    presence_penalty: float
    frequency_penalty: float
    max_tokens: int | None = Field(description="null: up to the context limit.")
    enable_thinking: bool
    clear_thinking: bool

    @classmethod
    def of(cls, defaults: Defaults) -> DefaultValues:
        return cls(
            max_tokens=defaults.max_tokens,
            enable_thinking=defaults.enable_thinking,
            clear_thinking=defaults.clear_thinking,
            **{name: getattr(defaults.sampling, name) for name in SHOWN_SAMPLING},
        )


class Status(BaseModel):
    version: str
    time: float = Field(description="Unix time of this status.")
    uptime: float = Field(description="Seconds since the server began.")
    model: models.Model
    defaults: DefaultValues = Field(description="For a request that names no profile.")
    profiles: dict[str, DefaultValues] = Field(description="For one that names it.")
    engine: EngineStatus
    speed: Speed
    running: list[RequestStatus] = Field(description="In flight, in order of arrival.")
    recent: list[RequestStatus] = Field(description="The last that ended, the latest first.")


class CancelledRequests(BaseModel):
    cancelled: list[str] = Field(description="Ids of the requests that were ended.")


@router.get("/status")
async def status(
    service: GivenService,
    recent: Annotated[
        int, Query(ge=0, le=HISTORY, description="Requests that ended, at most so many.")
    ] = HISTORY,
) -> Status:
    """The model, the engine, its memory and cache, speeds, and the requests now and lately."""
    engine, requests = service.engine, service.requests
    return Status(
        version=__version__,
        time=time.time(),
        uptime=time.monotonic() - service.began,
        model=models.describe(service),
        defaults=DefaultValues.of(service.defaults(None)),
        profiles={
            name: DefaultValues.of(service.defaults(None, name))
            for name in service.settings.all_profiles
        },
        engine=EngineStatus(
            state=engine.state,
            pid=engine.pid,
            restarts=engine.restarts,
            failure=engine.failure,
            loading=Loading.model_validate(engine.progress, from_attributes=True)
            if engine.progress
            else None,
            stats=msgspec.structs.asdict(engine.stats),
        ),
        speed=speed(service),
        running=[RequestStatus.of(record) for record in requests.running.values()],
        recent=[RequestStatus.of(record) for record in islice(reversed(requests.recent), recent)],
    )


@router.post("/requests/{id}/cancel")
async def cancel(id: str, service: GivenService) -> CancelledRequests:
    """End a request in flight, by the answer's id or by its x-request-id; its client is told."""
    found = service.requests.find(id)
    if not found:
        raise HTTPException(404, f"There is no request {id!r} in flight here.")
    for record in found:
        service.engine.abort(record.id, Cancelled("This request was cancelled at the server."))
    return CancelledRequests(cancelled=[record.id for record in found])


def speed(service: AppState) -> Speed:
    seconds = service.requests.timeline.last(SHOWN_SECONDS)
    lately = seconds[-RATE_SECONDS:]
    return Speed(
        generated_per_second=sum(second.generated for second in lately) / RATE_SECONDS,
        computed_per_second=sum(second.computed for second in lately) / RATE_SECONDS,
        until=seconds[-1].number + 1,
        generated=[second.generated for second in seconds],
        computed=[second.computed for second in seconds],
        first_tokens=[
            FirstToken(time=moment, ttft=wait) for moment, wait in service.requests.first_tokens
        ],
    )
