"""From a request model to a response: what all generating routes do."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Callable, Mapping, Sequence
from functools import partial
from hashlib import blake2b
from typing import TypeVar

import numpy as np
from fastapi import Request, Response

from glmd.api.auth import Access
from glmd.api.context import RequestContext, client_id, prepare_slot
from glmd.api.generation_request import (
    Defaults,
    GenerationRequest,
    RequestFields,
    ignored_header,
    omitted_header,
)
from glmd.api.state import AppState
from glmd.api.streaming import (
    EventStream,
    Generation,
    OutputProcessor,
    PromptRun,
    ResponseBuilder,
    cancel_on_disconnect,
    drain,
    sse_frame,
    stream_frames,
)
from glmd.chat.output_processor import ChatOutputProcessor, CompletionOutputProcessor
from glmd.chat.prompt import Steps
from glmd.chat.tokenizer import Tokenizer
from glmd.chat.types import Conversation, Prompt
from glmd.errors import invalid_field
from glmd.ipc import EngineRequest, TokenArray, pack_tokens

Builder = TypeVar("Builder", bound=ResponseBuilder)

Frames = AsyncGenerator[bytes, None]
"""Frames of a stream."""


async def serve(
    http: Request,
    state: AppState,
    context: RequestContext,
    body: RequestFields,
    read: Callable[[Defaults], GenerationRequest],
    build: Callable[[Generation], Builder],
    *,
    run_in_background: Callable[[Builder, Frames], Frames | None] | None = None,
) -> Response:
    """Generate an answer, streamed or whole.

    Args:
        read: Turns `body` into a `GenerationRequest`.
        build: Makes the response builder.
        run_in_background: Takes over the builder and the frames that generating makes, and returns
            the frames to stream. None instead of frames: respond with the answer as it is before.
            None: generate while the client waits.

    Raises:
        ModelNotFound, InvalidRequest: the request cannot be served.
        Overloaded, DeadlineExceeded, EngineUnavailable: see `prepare_slot` and the engine client.
    """
    context.exchange.set_request(
        body.api, body.model, stream=body.stream, background=run_in_background is not None
    )
    unknown = body.unknown_parameters()
    async with prepare_slot(http, state, context):
        defaults = state.defaults(body.model, body.profile)
        request = await state.run_by_size(http, partial(read, defaults))
        generation = await start_generation(state, context, request)
    builder = build(generation)
    headers = ignored_header([*unknown, *request.ignored]) | omitted_header(request.prompt)
    if run_in_background is not None:
        followed = run_in_background(builder, stream_frames(builder, generation))
        if followed is not None:
            return await follow_stream(state, followed, headers)
    elif body.stream:
        keep_alive = state.settings.keep_alive
        frames = stream_frames(builder, generation, heartbeat_interval=keep_alive)
        comments = keep_alive if builder.heartbeat is None else 0
        stream = EventStream(frames, builder.fail, comments=comments, headers=headers)
        return await stream.prime()
    else:
        await cancel_on_disconnect(http, drain(stream_frames(builder, generation)))
    return json_response(builder.to_json(), headers)


async def follow_stream(
    state: AppState, frames: Frames, headers: Mapping[str, str] | None = None
) -> EventStream:
    """Stream the frames of an answer that is generated in the background."""
    stream = EventStream(
        frames,
        lambda error: sse_frame(error.json, "error"),
        comments=state.settings.keep_alive,
        headers=headers or {},
    )
    return await stream.prime()


async def start_generation(
    state: AppState, context: RequestContext, request: GenerationRequest
) -> Generation:
    """Make the prompts, the grammar and the engine requests.

    Raises:
        InvalidRequest: a prompt is empty or too long, or the required form cannot be enforced.
    """
    is_chat = isinstance(request.prompt, Conversation)
    if isinstance(request.prompt, Conversation):
        prompt = await state.build_prompt(request.prompt, context.owner, param=request.param)
        prompts = [prompt]
    else:
        steps = encode_steps(request.prompt, state.tokenizer)
        prompts = await state.take_turns(steps, param=request.param)
    for prompt in prompts:
        state.check_length(len(prompt.tokens), param=request.param)
    grammar = await state.compile_grammar(request.output, prompts[0])

    def process(prompt: Prompt) -> OutputProcessor:
        if not is_chat:
            with_end = request.prompt_logprobs is not None
            return CompletionOutputProcessor(state.tokenizer, stop=request.stop, with_end=with_end)
        return ChatOutputProcessor(
            state.tokenizer,
            prompt,
            tools=request.tools,
            stop=request.stop,
            single_call=request.single_call,
        )

    runs = []
    for number, prompt in enumerate(prompts):
        sent = EngineRequest(
            id=request.id if is_chat else f"{request.id}-{number}",
            prompt=pack_tokens(prompt.tokens),
            sampling=request.sampling,
            n=request.n,
            max_tokens=request.max_tokens,
            min_tokens=request.min_tokens,
            stop_token_ids=request.stop_token_ids,
            ignore_eos=request.ignore_eos,
            thinking_budget=request.thinking_budget if prompt.in_reasoning else None,
            thinking_close=(state.tokenizer.special_tokens.end_think,),
            grammar=grammar,
            client=context.client,
            priority=request.priority,
            cache_salt=bind_salt(context.owner, request.cache_salt),
            prompt_logprobs=request.prompt_logprobs,
            prompt_progress=True,
        )
        processors = [process(prompt) for _ in range(request.n)]
        stats = state.registry.record(context.exchange, sent)
        runs.append(PromptRun(prompt, sent, stats, processors))
    return Generation(
        request,
        runs,
        engine=state.engine,
        registry=state.registry,
        timeouts=context.timeouts,
        on_finished=state.cache_turn,
    )


def encode_steps(prompts: Sequence[str | list[int]], tokenizer: Tokenizer) -> Steps[list[Prompt]]:
    """Raw prompts as token ids.

    Raises:
        InvalidRequest: a prompt is empty.
    """
    encoded = []
    for prompt in prompts:
        if isinstance(prompt, str):
            tokens = yield from markup_steps(prompt, tokenizer)
        else:
            tokens = np.array(prompt, np.int32)
            yield len(tokens)
        if not len(tokens):
            raise invalid_field("prompt", "must have at least one token.")
        encoded.append(Prompt(tokens, in_reasoning=False, turn_start=0, turn_key=b""))
    return encoded


def markup_steps(text: str, tokenizer: Tokenizer) -> Steps[TokenArray]:
    """Token ids of text in which spellings of control tokens are control tokens."""
    chunks: list[TokenArray] = []
    length = 0
    for chunk in tokenizer.encode_steps(tokenizer.split_markup(text)):
        chunks.append(chunk)
        length += len(chunk)
        yield length
    return np.concatenate(chunks)


def bind_salt(owner: str, salt: str) -> str:
    """Salt of an owner's requests, of fixed length; "" without a salt.

    Nobody can use another owner's salt, whether or not it can be guessed.
    """
    if not salt:
        return ""
    scope = f"{owner}\0{salt}".encode("utf-8", "surrogatepass")
    return blake2b(scope, digest_size=16).hexdigest()


async def count_prompt_tokens(
    http: Request, state: AppState, access: Access, read: Callable[[], Conversation]
) -> int:
    """Number of prompt tokens of the conversation that `read` reads."""
    async with state.client_lock.acquire(client_id(http.scope)):
        conversation = await state.run_by_size(http, read)
        prompt = await state.build_prompt(conversation, access.owner)
    return len(prompt.tokens)


def json_response(body: str, headers: Mapping[str, str] | None = None) -> Response:
    return Response(body, media_type="application/json", headers=headers)
