"""`POST /v1/messages` and `POST /v1/messages/count_tokens`."""

from __future__ import annotations

import uuid
from functools import partial
from typing import Annotated

from fastapi import APIRouter, Depends, Request, Response

from glmd.api.anthropic.input import read_conversation, read_tools
from glmd.api.anthropic.protocol import Message, TokenCount
from glmd.api.anthropic.request import REFUSED, CountTokensRequest, MessagesRequest
from glmd.api.anthropic.stream import MessageBuilder, error_frame
from glmd.api.context import ClientDep, ContextDep, RequestContext, prepare_slot
from glmd.api.generation import Generation
from glmd.api.request_body import JsonRoute
from glmd.api.sampling import ignored_header
from glmd.api.serving import start_generation
from glmd.api.sse import EventStream, cancel_on_disconnect, prime
from glmd.api.state import AppState, get_state
from glmd.api.streaming import drain, encode_sse, stream_events

router = APIRouter(tags=["Anthropic"], route_class=JsonRoute)

GivenService = Annotated[AppState, Depends(get_state)]


@router.post("/v1/messages", response_model=Message)
async def create_message(
    body: MessagesRequest, request: Request, service: GivenService, terms: ContextDep
) -> Response:
    """Continue a conversation, streamed or whole."""
    _, left_out = read_tools(body)
    headers = ignored_header([*body.unknown(REFUSED), *left_out])
    async with prepare_slot(request, service, terms):
        generation, teller = await prepare(body, service, terms)
    events = stream_events(teller, generation, keep_alive=service.settings.keep_alive)
    if body.stream:
        opened = await prime(
            encode_sse(events), on_error=partial(error_frame, request_id=request.state.request_id)
        )
        return EventStream(opened, keep_alive=0, headers=headers)
    await cancel_on_disconnect(request, drain(events))
    whole = teller.message.model_dump_json()
    return Response(whole, media_type="application/json", headers=headers)


@router.post("/v1/messages/count_tokens")
async def count_tokens(
    body: CountTokensRequest, service: GivenService, client: ClientDep
) -> TokenCount:
    """How many tokens the prompt of such a request has."""
    defaults = service.defaults(body.model, body.profile)
    body.unknown(REFUSED)
    async with service.client_lock.acquire(client):
        prompt = await service.build_prompt(read_conversation(body, defaults))
    return TokenCount(input_tokens=len(prompt.tokens))


async def prepare(
    body: MessagesRequest, service: AppState, terms: RequestContext
) -> tuple[Generation, MessageBuilder]:
    """Everything up to the engine: checks, prompt, request.

    Raises:
        ModelNotFound, InvalidRequest: the request cannot be served.
    """
    terms.exchange.set_request("messages", body.model, stream=body.stream)
    defaults = service.defaults(body.model, body.profile)
    conversation = read_conversation(body, defaults)
    choice = body.tool_choice
    tools = () if choice is not None and choice.type == "none" else conversation.tools
    structure = body.structure(tools)
    prompt = await service.build_prompt(conversation)
    id = f"msg_{uuid.uuid4().hex}"
    generation = start_generation(
        service,
        prompt,
        terms,
        id=id,
        sampling=body.sampling(defaults.sampling),
        param="messages",
        tools=tools,
        stop=body.stop_sequences or (),
        reasoning_limit=body.reasoning_limit(service.settings.effort_budgets),
        single_call=choice is not None and bool(choice.disable_parallel_tool_use),
        grammar=await service.compile_grammar(structure, prompt),
        max_tokens=body.max_tokens,
    )
    teller = MessageBuilder(
        id,
        service.model.id,
        generation,
        max_tokens=body.max_tokens,
        omit_thinking=body.thinking is not None and body.thinking.display == "omitted",
    )
    return generation, teller
