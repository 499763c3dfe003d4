"""What the routes share: the settings, the model's names, the engine's client, the chat layer."""

from __future__ import annotations

import asyncio
import hashlib
import logging
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import partial
from pathlib import Path
from typing import TypeVar

import msgspec
from fastapi import Request

from glmd import __version__
from glmd.chat.answer import Answer
from glmd.chat.grammar import GrammarCompiler, Structure
from glmd.chat.messages import Conversation
from glmd.chat.prompt import Prompt, build_prompt
from glmd.chat.template import ChatTemplate
from glmd.chat.tokenizer import Tokenizer
from glmd.chat.turns import Turns
from glmd.checkpoint.generation import sampling_defaults
from glmd.engine.client import EngineClient
from glmd.engine.supervisor import Launch
from glmd.errors import InvalidRequest, ModelNotFound
from glmd.messages import Guidance, SamplingParams
from glmd.settings import Settings

log = logging.getLogger("glmd.api")

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class ServedModel:
    """The one model of a server.

    Attributes:
        id: what responses call it.
        folder: where its checkpoint lies.
        created: Unix time of its config.json.
        owner: the first half of a hub id, or "local".
        names: everything that requests may call it; `id` first. `*` stands for any text.
    """

    id: str
    folder: Path
    created: int
    owner: str
    names: tuple[str, ...]

    @classmethod
    def of(cls, id: str, folder: Path, aliases: tuple[str, ...] = ()) -> ServedModel:
        """The model in `folder`, called `id`; the last part of a hub id is its short name."""
        config = folder / "config.json"
        owner, _, short = id.rpartition("/")
        return cls(
            id=id,
            folder=folder,
            created=int(config.stat().st_mtime) if config.is_file() else 0,
            owner=owner or "local",
            names=tuple(dict.fromkeys((id, short, "default", *aliases))),
        )

    def require(self, name: str | None) -> None:
        """Raise ModelNotFound unless this model answers to `name`; None means the one there is."""
        if name is not None and not any(fnmatchcase(name, own) for own in self.names):
            raise ModelNotFound(
                f"There is no model {name!r} here; this server has {self.id!r} (or 'default')."
            )


class Service:
    """What the routes work with, for the life of one app.

    Attributes:
        settings: of this server.
        model: what is served.
        engine: the way to the engine process.
        tokenizer: the checkpoint's.
        sampling: for requests that name no parameters.
        fingerprint: changes with glmd's version and with the checkpoint.
    """

    def __init__(self, settings: Settings, model: ServedModel, launch: Launch) -> None:
        """Read what the API needs of the checkpoint, which is everything but weights.

        Raises:
            CheckpointError: tokenizer, chat template or generation config are missing or bad.
        """
        self.settings = settings
        self.model = model
        self.engine = EngineClient(launch)
        self.tokenizer = Tokenizer.load(model.folder)
        self.sampling = default_sampling(settings, model.folder)
        self.fingerprint = fingerprint(__version__, model.id, str(model.created))
        self._grammars = GrammarCompiler(self.tokenizer.controls)
        self._template = ChatTemplate.load(model.folder, self.tokenizer.controls)
        self._turns = Turns(settings.turn_memory) if settings.turn_memory else None
        # One thread, because `Turns` wants to be used by one, and because encoding a book
        # must not keep the event loop from passing tokens on.
        self._worker = ThreadPoolExecutor(1, "prompts")

    async def start(self) -> None:
        """Start the engine in the background."""
        await self.engine.start()

    async def close(self) -> None:
        """End the engine, and with it what is still in flight."""
        await self.engine.close()
        await self._grammars.close()
        self._worker.shutdown()

    @property
    def is_ready(self) -> bool:
        """Requests can be served."""
        return self.engine.state == "ready"

    async def build_prompt(self, conversation: Conversation) -> Prompt:
        """The conversation as tokens.

        Raises:
            InvalidRequest: the template refuses it.
        """
        return await self.work(
            partial(
                build_prompt,
                conversation,
                tokenizer=self.tokenizer,
                template=self._template,
                turns=self._turns,
            )
        )

    async def guide(self, structure: Structure, prompt: Prompt | None = None) -> Guidance | None:
        """What holds the answer to `prompt`, or to raw text, to a structure; None if nothing must.

        Raises:
            InvalidRequest: the structure cannot be enforced.
        """
        if structure.format is not None and prompt is not None and prompt.content:
            raise InvalidRequest(
                "An answer that the client has begun cannot be held to a form.", param="messages"
            )
        in_reasoning = prompt is not None and prompt.in_reasoning
        return await self._grammars.compile(structure, in_reasoning=in_reasoning)

    def remember(self, prompt: Prompt, answer: Answer) -> None:
        """Keep a finished answer's tokens for when the client sends the turn back."""
        if self._turns is not None:
            kept = self._worker.submit(self._turns.remember, prompt, answer.turn())
            kept.add_done_callback(log_failure)

    async def work(self, task: Callable[[], T]) -> T:
        """Run something that may take long beside the event loop."""
        return await asyncio.get_running_loop().run_in_executor(self._worker, task)

    def check_length(self, tokens: int, *, param: str) -> None:
        """Raise InvalidRequest if a prompt leaves no room for an answer.

        Claude Code makes its conversation shorter when it reads `prompt is too long`, other
        clients by the code.
        """
        info = self.engine.info
        if info is not None and tokens >= info.max_context:
            raise InvalidRequest(
                f"The prompt is too long: {tokens} tokens > {info.max_context} maximum, which is"
                " for prompt and answer together.",
                param=param,
                code="context_length_exceeded",
            )


def log_failure(done: Future[None]) -> None:
    error = done.exception()
    if error is not None:
        log.error("A turn could not be remembered.", exc_info=error)


def fingerprint(*parts: str) -> str:
    return f"fp_{hashlib.sha256(chr(0).join(parts).encode()).hexdigest()[:10]}"


def default_sampling(settings: Settings, folder: Path) -> SamplingParams:
    """The checkpoint's sampling parameters, but for those that are set.

    Raises:
        CheckpointError: generation_config.json is malformed.
    """
    names = ("temperature", "top_p", "top_k", "min_p")
    given = {name: value for name in names if (value := getattr(settings, name)) is not None}
    return msgspec.structs.replace(sampling_defaults(folder), **given)


def get_service(request: Request) -> Service:
    """FastAPI dependency: the app's service."""
    service: Service = request.app.state.service
    return service
