"""What the routes share: the settings, the model's names, the engine's client, the chat layer."""

from __future__ import annotations

import asyncio
import hashlib
import logging
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from functools import partial
from pathlib import Path
from typing import TypeVar

from fastapi import Request

from glmd import __version__
from glmd.api.auth import ApiKeyStore
from glmd.api.defaults import Defaults
from glmd.api.observability.request_stats import RequestRegistry
from glmd.api.per_client_lock import PerClientLock
from glmd.chat.output_processor import ChatOutputProcessor
from glmd.chat.prompt import build_prompt
from glmd.chat.request_limits import MAX_NAME, check_length
from glmd.chat.template_process import TemplateProcess
from glmd.chat.tokenizer import Tokenizer
from glmd.chat.turn_cache import TurnTokenCache
from glmd.chat.types import Conversation, Prompt
from glmd.checkpoint.generation_config import sampling_defaults
from glmd.config import Settings
from glmd.engine_client.admission import AdmissionQueue
from glmd.engine_client.client import EngineClient
from glmd.engine_client.process import EngineProcessConfig
from glmd.errors import InvalidRequest, ModelNotFound
from glmd.ipc import GrammarSpec
from glmd.structured_output import GrammarCompiler, OutputSpec
from glmd.utils.suggest import did_you_mean

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
        owner = id.rpartition("/")[0]
        model = cls(
            id=id,
            folder=folder,
            created=int(config.stat().st_mtime) if config.is_file() else 0,
            owner=owner or "local",
            names=(),
        )
        return model.called(aliases)

    def called(self, aliases: tuple[str, ...]) -> ServedModel:
        """The same model under other aliases."""
        short = self.id.rpartition("/")[2]
        names = dict.fromkeys((self.id, short, "default", *aliases))
        return replace(self, names=tuple(names))

    def answers_to(self, name: str) -> bool:
        return any(fnmatchcase(name, own) for own in self.names)


class AppState:
    """What the routes work with, for the life of one app.

    Attributes:
        settings: of this server; `configure` replaces them.
        model: what is served.
        keys: that let requests in.
        engine: the way to the engine process.
        tokenizer: the checkpoint's.
        fingerprint: changes with glmd's version and with the checkpoint.
        one_each: by which clients take turns at the worker and the grammars.
        requests: what is known of the requests to the engine.
        began: in `time.monotonic`'s seconds.
    """

    def __init__(
        self,
        settings: Settings,
        model: ServedModel,
        launch: EngineProcessConfig,
        keys: ApiKeyStore | None = None,
    ) -> None:
        """Read what the API needs of the checkpoint, which is everything but weights.

        Args:
            keys: that let requests in; None: those that the settings name.

        Raises:
            SettingsError: the file of keys cannot be read.
            CheckpointError: tokenizer, chat template or generation config are missing or bad.
        """
        self.settings = settings
        self.model = model
        self.keys = ApiKeyStore.of(settings) if keys is None else keys
        queue = AdmissionQueue(settings.max_queue, settings.max_queue_tokens)
        self.engine = EngineClient(launch, queue=queue)
        self.tokenizer = Tokenizer.load(model.folder)
        self._sampling = sampling_defaults(model.folder)
        self.fingerprint = fingerprint(__version__, model.id, str(model.created))
        self.requests = RequestRegistry()
        self.began = time.monotonic()
        self._grammars = GrammarCompiler(self.tokenizer.controls)
        self._template = TemplateProcess.load(model.folder, self.tokenizer.controls)
        self._turns = TurnTokenCache(settings.turn_memory) if settings.turn_memory else None
        # One thread, because `TurnTokenCache` wants to be used by one, and because encoding a book
        # must not keep the event loop from passing tokens on.
        self._worker = ThreadPoolExecutor(1, "prompts")
        self.one_each = PerClientLock()

    def configure(self, settings: Settings) -> None:
        """Go on with these settings, as far as they are read anew by each request."""
        self.settings = settings
        self.model = self.model.called(settings.aliases)

    def defaults(self, model: str | None, profile: str | None = None) -> Defaults:
        """What a request gets that does not say otherwise.

        Args:
            model: what it calls the model; `NAME:PROFILE` names a profile, too; None: nothing.
            profile: what it calls the profile, where it has a field for that.

        Raises:
            ModelNotFound: this model does not answer to the name, or there is no such profile.
            InvalidRequest: `profile` is unknown, or contradicts the model's name; one of them is
                no name by its length.
        """
        check_length(model, MAX_NAME, "model")
        check_length(profile, MAX_NAME, "profile")
        by_name = self.profile_of(model) if model is not None else None
        if profile is not None and by_name not in (None, profile):
            raise InvalidRequest(
                f"profile is {profile!r}, but the model's name says {by_name!r}.", param="profile"
            )
        name = by_name or profile
        profiles = self.settings.all_profiles
        if name is not None and name not in profiles:
            raise InvalidRequest(
                f"There is no profile {name!r} here{did_you_mean(name, profiles)}", param="profile"
            )
        return Defaults.of(
            self.settings, self._sampling, profiles[name] if name is not None else None
        )

    def profile_of(self, model: str) -> str | None:
        """The profile that a model's name chooses; None: none.

        Raises:
            ModelNotFound: nothing here has that name.
        """
        profiles = self.settings.all_profiles
        own, colon, suffix = model.rpartition(":")
        is_ours = bool(colon) and self.model.answers_to(own)
        if is_ours and suffix in profiles:
            return suffix
        for name, profile in profiles.items():
            if any(fnmatchcase(model, alias) for alias in profile.aliases):
                return name
        if self.model.answers_to(model):
            return None
        if is_ours:
            raise ModelNotFound(
                f"There is no profile {suffix!r} of {own!r} here{did_you_mean(suffix, profiles)}"
            )
        raise ModelNotFound(
            f"There is no model {model!r} here; this server has {self.model.id!r} (or 'default')."
        )

    async def start(self) -> None:
        """Start the engine in the background."""
        await self.engine.start()

    async def close(self) -> None:
        """End the engine, and with it what is still in flight."""
        await self.engine.close()
        await self._grammars.close()
        self._worker.shutdown()
        self._template.close()

    @property
    def is_ready(self) -> bool:
        """Requests can be served."""
        return self.engine.state == "ready"

    async def build_prompt(self, conversation: Conversation) -> Prompt:
        """The conversation as tokens.

        Raises:
            InvalidRequest: the template refuses it.
        """
        return await self.run_in_worker(
            partial(
                build_prompt,
                conversation,
                tokenizer=self.tokenizer,
                template=self._template,
                turn_cache=self._turns,
            )
        )

    async def compile_grammar(
        self, structure: OutputSpec, prompt: Prompt | None = None
    ) -> GrammarSpec | None:
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

    def cache_turn(self, prompt: Prompt, answer: ChatOutputProcessor) -> None:
        """Keep a finished answer's tokens for when the client sends the turn back."""
        if self._turns is not None:
            kept = self._worker.submit(self._turns.remember, prompt, answer.turn())
            kept.add_done_callback(log_failure)

    async def run_in_worker(self, task: Callable[[], T]) -> T:
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


async def get_state(request: Request) -> AppState:
    """FastAPI dependency: the app's service."""
    service: AppState = request.app.state.service
    return service
