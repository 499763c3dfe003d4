"""`/v1/responses`: create, count, retrieve, cancel and delete."""

from __future__ import annotations

import asyncio
import time
import uuid
from collections.abc import Coroutine, Mapping, Sequence
from functools import partial
from typing import Annotated, Any

from fastapi import APIRouter, Depends, Query, Request, Response
from starlette.exceptions import HTTPException

from glmd.api.context import ClientDep, ContextDep, RequestContext, prepare_slot
from glmd.api.defaults import Defaults
from glmd.api.errors import log_unhandled, to_error
from glmd.api.generation import Generation
from glmd.api.openai.logprobs import spell_logprobs
from glmd.api.request_body import JsonRoute
from glmd.api.responses.input import Item, as_items, read_items
from glmd.api.responses.protocol import (
    Deleted,
    InputTokenCount,
    ReasoningConfig,
    ResponseObject,
    TextOptions,
)
from glmd.api.responses.request import REFUSED, NamedChoice, ResponsesRequest
from glmd.api.responses.store import ResponseStore, Stored, get_store, size_of
from glmd.api.responses.stream import ResponsesBuilder
from glmd.api.responses.tools import Tools, read_tools
from glmd.api.sampling import ignored_header
from glmd.api.serving import start_generation
from glmd.api.sse import EventStream, cancel_on_disconnect, prime
from glmd.api.state import AppState, get_state
from glmd.api.streaming import drain, encode_sse, stream_events, write
from glmd.chat.request_limits import MAX_MESSAGES, check_count
from glmd.chat.types import Conversation, Message, SystemMessage
from glmd.errors import InvalidRequest
from glmd.ipc import SamplingParams

router = APIRouter(tags=["Responses"], route_class=JsonRoute)

GivenService = Annotated[AppState, Depends(get_state)]
GivenStore = Annotated[ResponseStore, Depends(get_store)]


@router.post("/v1/responses", response_model=ResponseObject)
async def create_response(
    body: ResponsesRequest,
    request: Request,
    service: GivenService,
    store: GivenStore,
    terms: ContextDep,
) -> Response:
    """Continue a conversation: streamed, whole, or in the background."""
    tools = read_tools(body.tools)
    headers = ignored_header([*body.unknown(REFUSED), *tools.left_out])
    async with prepare_slot(request, service, terms):
        stored, teller, generation = await prepare(body, tools, service, store, terms)
    events = stream_events(teller, generation, keep_alive=service.settings.keep_alive)
    if body.background:
        store.run(stored, finish(teller, drain(events)))
    elif body.stream:
        opened = await prime(
            encode_sse(events), on_error=lambda problem: write(teller.fail(problem))
        )
        return EventStream(opened, keep_alive=0, headers=headers)
    else:
        await cancel_on_disconnect(request, drain(events))
    return answer(stored, headers)


@router.post("/v1/responses/input_tokens")
async def count_input_tokens(
    body: ResponsesRequest, service: GivenService, store: GivenStore, client: ClientDep
) -> InputTokenCount:
    """How many tokens the prompt of such a request has."""
    body.unknown(REFUSED)
    defaults = service.defaults(body.model, body.profile)
    _, earlier, new = items_of(body, store)
    conversation = read_conversation(body, earlier, new, read_tools(body.tools), defaults)
    async with service.client_lock.acquire(client):
        prompt = await service.build_prompt(conversation)
    return InputTokenCount(input_tokens=len(prompt.tokens))


@router.get("/v1/responses/{id}", response_model=ResponseObject)
async def retrieve_response(
    id: str, store: GivenStore, stream: Annotated[bool, Query(description="false only.")] = False
) -> Response:
    """A stored response, or what there is of one in the background."""
    if stream:
        raise InvalidRequest(
            "stream: a response is streamed while it is made, not afterwards.", param="stream"
        )
    return answer(required(store.find(id), id))


@router.post("/v1/responses/{id}/cancel", response_model=ResponseObject)
async def cancel_response(id: str, store: GivenStore) -> Response:
    """End a response in the background."""
    stored = await store.cancel(id)
    if stored is None:
        required(store.find(id), id)
        raise InvalidRequest(
            f"The response {id!r} is not in the background, so there is nothing to cancel."
        )
    return answer(stored)


@router.delete("/v1/responses/{id}")
async def delete_response(id: str, store: GivenStore) -> Deleted:
    """Forget a stored response; others that went on from it keep what they need."""
    if not await store.delete(id):
        required(None, id)
    return Deleted(id=id)


async def prepare(
    body: ResponsesRequest,
    tools: Tools,
    service: AppState,
    store: ResponseStore,
    terms: RequestContext,
) -> tuple[Stored, ResponsesBuilder, Generation]:
    """Everything up to the engine: checks, prompt, request.

    Raises:
        ModelNotFound, InvalidRequest: the request cannot be served.
    """
    terms.exchange.set_request(
        "responses", body.model, stream=body.stream, background=body.background
    )
    defaults = service.defaults(body.model, body.profile)
    body.refuse_unsupported()
    previous, earlier, new = items_of(body, store)
    logprobs = body.top_k_logprobs
    sampling = body.sampling(defaults.sampling, logprobs)
    id = f"resp_{uuid.uuid4().hex}"
    conversation = read_conversation(body, earlier, new, tools, defaults)
    callable_tools = () if body.tool_choice == "none" else tools.functions
    structure = body.structure(callable_tools)
    prompt = await service.build_prompt(conversation)
    generation = start_generation(
        service,
        prompt,
        terms,
        id=id,
        sampling=sampling,
        param="input",
        tools=callable_tools,
        reasoning_limit=body.reasoning_limit(service.settings.effort_budgets),
        single_call=body.parallel_tool_calls is False,
        grammar=await service.compile_grammar(structure, prompt),
        max_tokens=body.max_output_tokens or defaults.max_tokens,
    )
    stored = Stored(
        describe(id, body, tools, sampling, service),
        [*earlier, *new],
        (previous.size if previous is not None else 0) + size_of(new),
    )
    teller = ResponsesBuilder(
        stored.response,
        generation,
        summarise=body.summarises,
        tools=tools,
        spell=partial(spell_logprobs, service.tokenizer),
        on_end=partial(store.keep, stored) if stored.response.store else None,
    )
    return stored, teller, generation


def items_of(
    body: ResponsesRequest, store: ResponseStore
) -> tuple[Stored | None, list[Item], list[Item]]:
    """The response that a request goes on from, its conversation, and the items that are new.

    Raises:
        InvalidRequest: something that is referred to is not here.
    """
    previous = store.previous(body.previous_response_id) if body.previous_response_id else None
    earlier = previous.conversation if previous is not None else []
    new = [
        store.resolve(item, f"input[{index}]") for index, item in enumerate(as_items(body.input))
    ]
    return previous, earlier, new


def read_conversation(
    body: ResponsesRequest,
    earlier: Sequence[Item],
    new: Sequence[Item],
    tools: Tools,
    defaults: Defaults,
) -> Conversation:
    """What decides the prompt.

    Raises:
        InvalidRequest: something in it cannot be honoured.
    """
    check_count([*earlier, *new], MAX_MESSAGES, "input")
    places = ["previous_response_id"] * len(earlier)
    places += [f"input[{index}]" for index in range(len(new))]
    messages: list[Message] = [SystemMessage(body.instructions)] if body.instructions else []
    messages += read_items([*earlier, *new], places)
    if not messages:
        raise InvalidRequest("input must hold at least one item.", param="input")
    return Conversation(
        messages=messages,
        tools=tools.functions,
        template_kwargs=body.template_kwargs(
            enable_thinking=defaults.enable_thinking, clear_thinking=defaults.clear_thinking
        ),
    )


def describe(
    id: str, body: ResponsesRequest, tools: Tools, sampling: SamplingParams, service: AppState
) -> ResponseObject:
    """The response before it has begun."""
    reasoning = body.reasoning
    choice = body.tool_choice
    return ResponseObject(
        id=id,
        created_at=int(time.time()),
        background=bool(body.background),
        instructions=body.instructions,
        max_output_tokens=body.max_output_tokens,
        metadata=body.metadata or {},
        model=service.model.id,
        parallel_tool_calls=body.parallel_tool_calls is not False,
        previous_response_id=body.previous_response_id,
        reasoning=ReasoningConfig(
            effort=reasoning.effort if reasoning else None,
            summary=(reasoning.summary or reasoning.generate_summary) if reasoning else None,
        ),
        store=body.store is not False,
        temperature=sampling.temperature,
        text=TextOptions(format=(body.text and body.text.format) or {"type": "text"}),
        tool_choice=choice.model_dump(exclude_none=True)
        if isinstance(choice, NamedChoice)
        else choice or "auto",
        tools=tools.raw,
        top_logprobs=body.top_logprobs or 0,
        top_p=sampling.top_p,
    )


async def finish(teller: ResponsesBuilder, work: Coroutine[Any, Any, None]) -> None:
    """Do the work of a response in the background; nobody waits for its errors."""
    try:
        await work
    except asyncio.CancelledError:
        teller.response.status = "cancelled"
        raise
    except Exception as error:
        log_unhandled(error)
        teller.fail(to_error(error))


def required(stored: Stored | None, id: str) -> Stored:
    """
    Raises:
        HTTPException: 404.
    """
    if stored is None:
        raise HTTPException(404, f"There is no response {id!r} here (any more).")
    return stored


def answer(stored: Stored, headers: Mapping[str, str] | None = None) -> Response:
    body = stored.response.model_dump_json()
    return Response(body, media_type="application/json", headers=headers)
