"""`/v1/responses`: create, count, retrieve, cancel and delete."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Mapping
from contextlib import aclosing
from functools import partial
from typing import Annotated, Any

from fastapi import APIRouter, Depends, Query, Request, Response
from starlette.exceptions import HTTPException

from glmd.api.auth import Access
from glmd.api.context import AccessDep, ContextDep
from glmd.api.errors import RefusedBody, log_unhandled, to_error
from glmd.api.generation_request import NO_OP, Defaults, GenerationRequest, omitted_header
from glmd.api.request_body import NO_MEMORY
from glmd.api.responses.input import InputItems, RequestTools, read_tools
from glmd.api.responses.input_items import Order, list_items, read_input, referred_ids
from glmd.api.responses.objects import (
    DeletedResponse,
    InputItemList,
    InputTokenCount,
    ReasoningConfig,
    ResponseObject,
    TextOptions,
)
from glmd.api.responses.peers import PeerRoute, get_peers
from glmd.api.responses.protocol import AllowedToolsChoice, ResponsesRequest, ToolChoiceName
from glmd.api.responses.store import (
    EventLog,
    ResponseNotStored,
    ResponseStore,
    StoredResponse,
    get_store,
)
from glmd.api.responses.stream import ResponsesBuilder
from glmd.api.serving import Frames, count_prompt_tokens, follow_stream, json_response, serve
from glmd.api.state import StateDep
from glmd.api.streaming import Generation
from glmd.chat.types import Conversation
from glmd.errors import InvalidRequest, invalid_field
from glmd.utils.fair_limiter import Reservation

router = APIRouter(tags=["Responses"], route_class=PeerRoute)

Include = Annotated[
    list[str] | None,
    Query(alias="include[]", description=NO_OP + " Shown is what the creation included."),
]

GivenStore = Annotated[ResponseStore, Depends(get_store)]


@router.post("/v1/responses", response_model=ResponseObject)
async def create_response(
    body: ResponsesRequest,
    http: Request,
    state: StateDep,
    store: GivenStore,
    context: ContextDep,
) -> Response:
    """Continue a conversation: streamed, whole, or in the background.

    A stream in the background can be lost and taken up again, by its sequence numbers.
    """
    stored = await find_referred(http, body, store, context.owner)
    tools, items = await state.run_by_size(http, partial(read_parts, body, stored))
    memory: Reservation = http.state.body_memory

    def read(defaults: Defaults) -> GenerationRequest:
        return body.to_generation_request(defaults, items, tools)

    def build(generation: Generation) -> ResponsesBuilder:
        response = new_response(body, items, tools, state.model.id, generation.request)
        return ResponsesBuilder(
            StoredResponse(response, items, context.owner),
            generation,
            tools=tools,
            tokenizer=state.tokenizer,
            summarise=bool(response.reasoning.summary),
            on_done=keep if response.store and not body.background else lambda stored: None,
        )

    def keep(stored: StoredResponse) -> None:
        memory.hold()
        store.keep(stored, memory.release)

    def run_in_background(builder: ResponsesBuilder, frames: Frames) -> Frames | None:
        stored = builder.stored
        stored.events = EventLog(memory) if body.stream else None
        memory.hold()
        store.run(stored, finish(builder, frames, stored.events), memory.release)
        return stored.events.follow(0) if stored.events is not None else None

    return await serve(
        http,
        state,
        context,
        body,
        read,
        build,
        run_in_background=run_in_background if body.background else None,
    )


@router.post("/v1/responses/input_tokens")
async def count_input_tokens(
    body: ResponsesRequest,
    http: Request,
    response: Response,
    state: StateDep,
    store: GivenStore,
    access: AccessDep,
) -> InputTokenCount:
    """Count the tokens of a request's prompt."""
    body.unknown_parameters()
    defaults = state.defaults(body.model, body.profile)
    stored = await find_referred(http, body, store, access.owner)

    def read() -> Conversation:
        tools, items = read_parts(body, stored)
        conversation = body.conversation(defaults, items, tools)
        response.headers.update(omitted_header(conversation))
        return conversation

    return InputTokenCount(input_tokens=await count_prompt_tokens(http, state, access, read))


async def find_referred(
    http: Request, body: ResponsesRequest, store: ResponseStore, owner: str
) -> dict[str, StoredResponse]:
    """The owner's responses that a request refers to, counted with its body.

    Those that are not stored here may be stored by a peer.

    Raises:
        RefusedBody: there is no room in memory for them.
    """
    ids = dict.fromkeys(referred_ids(body.new_input, body.previous_response_id))
    found = await store.find(ids)
    if missing := [id for id in ids if id not in found]:
        found |= await get_peers(http).find(missing, http)
    own = {id: stored for id, stored in found.items() if stored.owner == owner}
    memory: Reservation = http.state.body_memory
    if not memory.grow(sum(stored.nbytes for stored in own.values())):
        raise RefusedBody(NO_MEMORY)
    return own


def read_parts(
    body: ResponsesRequest, stored: Mapping[str, StoredResponse]
) -> tuple[RequestTools, InputItems]:
    """The tools of a request, and the items of its conversation.

    Raises:
        InvalidRequest: a tool is malformed, a response or item is not stored, or there is no input.
    """
    return read_tools(body.tools), read_input(body.new_input, body.previous_response_id, stored)


@router.get("/v1/responses", include_in_schema=False)
async def refuse_websocket(http: Request) -> Response:
    """Refuse the WebSocket that Codex tries first, so that it falls back to HTTP."""
    if "upgrade" in http.headers:
        message = "Responses are not served over WebSocket. Send POST /v1/responses."
        raise HTTPException(426, message, {"Upgrade": "HTTP/1.1"})
    raise HTTPException(405, "Send POST /v1/responses, or GET /v1/responses/{id}.")


@router.post("/v1/responses/compact", include_in_schema=False)
async def refuse_compaction() -> Response:
    """Say what there is instead of compaction."""
    raise HTTPException(
        501, "Compaction is not available. Ask for a summary in a message of your own."
    )


@router.get("/v1/responses/{id}", response_model=ResponseObject)
async def retrieve_response(
    id: str,
    state: StateDep,
    store: GivenStore,
    access: AccessDep,
    stream: Annotated[bool, Query(description="Needs stream and background at creation.")] = False,
    starting_after: Annotated[
        int | None, Query(ge=0, description="Sequence number of the last event that is known.")
    ] = None,
    include: Include = None,
    include_obfuscation: Annotated[
        bool | None, Query(description=NO_OP + " Events are not padded.")
    ] = None,
) -> Response:
    """Retrieve a stored response, or resume the stream of a background response."""
    if starting_after is not None and not stream:
        raise invalid_field("starting_after", "needs stream to be true.")
    stored = await visible(store, id, access)
    if not stream:
        return whole(stored)
    if stored.events is None:
        raise invalid_field(
            "stream",
            "the events of this response are not stored. They are kept in memory for a response"
            " created with background and stream. Retrieve it without stream.",
        )
    frames = stored.events.follow(0 if starting_after is None else starting_after + 1)
    return await follow_stream(state, frames)


@router.get("/v1/responses/{id}/conversation", include_in_schema=False)
async def send_conversation(id: str, store: GivenStore, access: AccessDep) -> Response:
    """Send a stored response with its conversation to a peer."""
    stored = await visible(store, id, access)
    return Response(await asyncio.to_thread(stored.encode), media_type="application/json")


@router.get("/v1/responses/{id}/input_items")
async def list_input_items(
    id: str,
    store: GivenStore,
    access: AccessDep,
    limit: Annotated[int, Query(ge=1, le=100)] = 20,
    order: Order = "desc",
    after: Annotated[str | None, Query(description="ID of the item before the page.")] = None,
    include: Include = None,
) -> InputItemList:
    """List the input items of a stored response and of those that it continues."""
    return list_items(await visible(store, id, access), after=after, limit=limit, order=order)


@router.post("/v1/responses/{id}/cancel", response_model=ResponseObject)
async def cancel_response(id: str, store: GivenStore, access: AccessDep) -> Response:
    """Cancel a response in the background."""
    await visible(store, id, access)
    stored = await store.cancel(id)
    if stored is None:
        raise InvalidRequest(f"Response {id!r} does not run in the background.")
    return whole(stored)


@router.delete("/v1/responses/{id}")
async def delete_response(id: str, store: GivenStore, access: AccessDep) -> DeletedResponse:
    """Delete a stored response; responses that continued it are unaffected."""
    await visible(store, id, access)
    await store.delete(id)
    return DeletedResponse(id=id)


def new_response(
    body: ResponsesRequest,
    items: InputItems,
    tools: RequestTools,
    model: str,
    request: GenerationRequest,
) -> ResponseObject:
    """The response before generation begins."""
    effort, format = body.configured(items)
    reasoning, choice = body.reasoning, body.tool_choice
    if isinstance(choice, ToolChoiceName | AllowedToolsChoice):
        shown_choice: Any = choice.model_dump(exclude_none=True)
    else:
        shown_choice = choice or "auto"
    return ResponseObject(
        id=request.id,
        created_at=int(time.time()),
        status="queued" if body.background else "in_progress",
        background=bool(body.background),
        frequency_penalty=request.sampling.frequency_penalty,
        instructions=body.instructions,
        max_output_tokens=body.max_output_tokens,
        metadata=body.metadata or {},
        model=model,
        parallel_tool_calls=not request.single_call,
        presence_penalty=request.sampling.presence_penalty,
        previous_response_id=body.previous_response_id,
        prompt_cache_key=body.prompt_cache_key,
        reasoning=ReasoningConfig(
            effort=effort,
            summary=reasoning.any_summary if reasoning else None,
        ),
        safety_identifier=body.safety_identifier,
        store=body.store is not False,
        temperature=request.sampling.temperature,
        text=TextOptions.of(format),
        tool_choice=shown_choice,
        tools=tools.shown,
        top_logprobs=body.top_logprobs or 0,
        top_p=request.sampling.top_p,
        user=body.user,
    )


async def finish(builder: ResponsesBuilder, frames: Frames, events: EventLog | None) -> None:
    """Finish a response in the background; an error becomes its status.

    Args:
        events: Takes the frames.
    """
    add = events.add if events is not None else lambda frame: None
    try:
        async with aclosing(frames):
            for frame in builder.queue():
                add(frame)
            async for frame in frames:
                add(frame)
    except asyncio.CancelledError:
        for frame in builder.cancel():
            add(frame)
        raise
    except Exception as error:
        log_unhandled(error)
        add(builder.fail(to_error(error)))


async def visible(store: ResponseStore, id: str, access: Access) -> StoredResponse:
    """The stored response, if the request may see it.

    Raises:
        ResponseNotStored: it is not, or the request may not.
    """
    stored = (await store.find([id])).get(id)
    if stored is None or not access.may_see(stored.owner):
        raise ResponseNotStored(id)
    return stored


def whole(stored: StoredResponse) -> Response:
    return json_response(stored.response.model_dump_json())
