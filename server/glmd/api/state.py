"""State that routes share: settings, model names, engine client, chat layer."""

from __future__ import annotations

import asyncio
import hashlib
import logging
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from functools import partial
from pathlib import Path
from typing import Annotated, TypeVar

from fastapi import Depends, Request

from glmd import __version__
from glmd.api.auth import ApiKeyStore
from glmd.api.body_reader import BodyReader
from glmd.api.generation_request import Defaults
from glmd.api.observability.request_stats import RequestRegistry
from glmd.chat.output_processor import ChatOutputProcessor
from glmd.chat.prompt import Done, Steps, advance, prompt_steps
from glmd.chat.template_process import TemplateProcess
from glmd.chat.tokenizer import Tokenizer, utf8_size
from glmd.chat.turn_cache import TurnTokenCache
from glmd.chat.types import MAX_NAME, Conversation, Prompt, check_length
from glmd.checkpoint.config import read_sampling, sampling_defaults
from glmd.config import Settings
from glmd.engine_client.admission import AdmissionQueue
from glmd.engine_client.client import EngineClient
from glmd.engine_client.process import EngineProcess, EngineProcessConfig
from glmd.errors import InvalidRequest, ModelNotFound
from glmd.ipc import GrammarSpec
from glmd.structured_output.compiler import GrammarCompiler
from glmd.structured_output.request import OutputSpec
from glmd.utils.clock import loop_time
from glmd.utils.disk_lru import DiskLRU
from glmd.utils.memory import exit_if_out_of_memory
from glmd.utils.text import did_you_mean

log = logging.getLogger("glmd.api")

T = TypeVar("T")

TURN_TOKENS = 8192
"""Tokens of a prompt after which other clients' prompts have their turn: 20 to 100 ms."""

MIN_CHECKED_BYTES = 64 * 1024
"""Text of a conversation up to which its tokens are counted rather than estimated."""


@dataclass(frozen=True, slots=True)
class ServedModel:
    """Identity of the model that a server serves.

    Attributes:
        id: name in responses.
        folder: checkpoint folder.
        created: Unix time of config.json.
        owner: organisation of a hub id, else "local".
        names: names that requests may use, `id` first; `*` matches any text.
    """

    id: str
    folder: Path
    created: int
    owner: str
    names: tuple[str, ...]

    @classmethod
    def of(cls, id: str, folder: Path, aliases: tuple[str, ...] = ()) -> ServedModel:
        """The model in `folder`, under the name `id` and the last part of a hub id."""
        config = folder / "config.json"
        model = cls(
            id=id,
            folder=folder,
            created=int(config.stat().st_mtime) if config.is_file() else 0,
            owner=id.rpartition("/")[0] or "local",
            names=(),
        )
        return model.with_aliases(aliases)

    def with_aliases(self, aliases: tuple[str, ...]) -> ServedModel:
        short = self.id.rpartition("/")[2]
        return replace(self, names=tuple(dict.fromkeys((self.id, short, "default", *aliases))))

    def has_name(self, name: str) -> bool:
        return any(fnmatchcase(name, own) for own in self.names)


class PerClientLock:
    """Per-client mutex: at most one job per client is queued on the workers.

    Clients therefore take turns at workers that run one job at a time (the prompt thread, the
    grammar process).
    """

    def __init__(self) -> None:
        self._locks: dict[str, asyncio.Lock] = {}
        self._users: Counter[str] = Counter()

    @asynccontextmanager
    async def acquire(self, client: str) -> AsyncIterator[None]:
        """Hold the client's lock in the block; first come, first served."""
        lock = self._locks.setdefault(client, asyncio.Lock())
        self._users[client] += 1
        try:
            async with lock:
                yield
        finally:
            self._users[client] -= 1
            if not self._users[client]:
                del self._users[client], self._locks[client]

    def __len__(self) -> int:
        """Number of clients that hold their lock or wait for their lock."""
        return len(self._locks)


class AppState:
    """State of one app, as `app.state.glmd`.

    Attributes:
        settings: current settings; `configure` replaces the object.
        model: the served model.
        keys: API keys.
        engine: client of the engine process.
        tokenizer: the checkpoint's tokenizer.
        fingerprint: `system_fingerprint` of responses; depends on glmd's version and the model.
        client_lock: one large body, prompt or grammar at a time for each client.
        bodies: reads large bodies.
        registry: statistics of the requests to the engine.
        started: `time.monotonic()` of the start, in seconds.
        disk_file: as given.
    """

    def __init__(
        self,
        settings: Settings,
        model: ServedModel,
        launch: EngineProcessConfig,
        keys: ApiKeyStore | None = None,
        process: EngineProcess | None = None,
        disk_file: Path | None = None,
    ) -> None:
        """Load everything but weights from the checkpoint.

        Args:
            launch: how to start the engine process.
            keys: API keys; None: the keys that the settings name.
            process: the engine process, started already; None: `start` starts it.
            disk_file: file in which turns and responses survive a restart; None: they do not.

        Raises:
            SettingsError: the key file cannot be read.
            CheckpointError: tokenizer, chat template or generation config are missing or invalid.
        """
        self.settings = settings
        self.model = model
        self.keys = ApiKeyStore.of(settings) if keys is None else keys
        queue = AdmissionQueue(settings.max_queue, settings.max_queue_tokens, loop_time)
        minutes = settings.idle_unload
        self.engine = EngineClient(
            launch,
            queue=queue,
            hang_timeout=settings.hang_timeout,
            idle_unload=None if minutes is None else 60 * minutes,
            process=process,
        )
        self.tokenizer = Tokenizer.load(model.folder)
        self._sampling = sampling_defaults(model.folder)
        self.fingerprint = system_fingerprint(__version__, model.id, str(model.created))
        self.registry = RequestRegistry()
        self.started = time.monotonic()
        self._grammars = GrammarCompiler(self.tokenizer.controls)
        self._template = TemplateProcess.load(model.folder, self.tokenizer.controls)
        self.disk_file = disk_file
        self._turns = self._open_turns()
        # A thread, because encoding a long prompt must not block the event loop; one thread,
        # because `TurnTokenCache` is not thread-safe.
        self._worker = ThreadPoolExecutor(1, "prompts")
        self.client_lock = PerClientLock()
        self._reader = ThreadPoolExecutor(1, "requests")
        self.bodies = BodyReader()

    def _open_turns(self) -> TurnTokenCache | None:
        tokens = self.settings.turn_memory
        if not tokens:
            return None
        stored = None
        if self.disk_file is not None:
            stored = DiskLRU(self.disk_file, "turns", 4 * tokens)
        tokenizer = (self.model.folder / "tokenizer.json").read_bytes()
        digest = hashlib.blake2b(tokenizer, digest_size=16).digest()
        return TurnTokenCache(tokens, stored=stored, tokenizer=digest)

    def configure(self, settings: Settings) -> None:
        """Replace the settings that each request reads."""
        self.settings = settings
        self.model = self.model.with_aliases(settings.aliases)

    def defaults(self, model: str | None, profile: str | None = None) -> Defaults:
        """Return the default parameters of a request.

        Args:
            model: the request's model name; `NAME:PROFILE` also names a profile; None: not given.
            profile: the request's profile, in APIs with a field for the profile; None: not given.

        Raises:
            ModelNotFound: unknown model, or unknown profile in `model`.
            InvalidRequest: `profile` is unknown or contradicts `model`, or a name is too long.
        """
        check_length(model, MAX_NAME, "model")
        check_length(profile, MAX_NAME, "profile")
        by_name = self.profile_of(model) if model is not None else None
        if profile is not None and by_name not in (None, profile):
            raise InvalidRequest(
                f"profile: {profile!r} contradicts {by_name!r}, the profile that model names.",
                param="profile",
            )
        name = by_name or profile
        profiles = self.settings.all_profiles
        if name is not None and name not in profiles:
            raise InvalidRequest(
                f"profile: unknown profile {name!r}{did_you_mean(name, profiles)}", param="profile"
            )
        return Defaults.of(
            self.settings,
            self._sampling,
            profiles[name] if name is not None else None,
            self._template.defaults,
        )

    def describe_sampling(self) -> str:
        """Describe the default sampling parameters and their origins, for the log."""
        given = read_sampling(self.model.folder)
        name = self.settings.profile
        profile = self.settings.all_profiles[name] if name else None
        sampling = self.defaults(None).sampling
        parts = []
        for field in ("temperature", "top_p", "top_k", "min_p", "repetition_penalty"):
            origin = "model card"
            if profile is not None and field in profile.values:
                origin = f"profile {name}"
            elif getattr(self.settings, field, None) is not None:
                origin = "settings"
            elif field in given:
                origin = "generation_config.json"
            parts.append(f"{field}={getattr(sampling, field):g} ({origin})")
        return " ".join(parts)

    def profile_of(self, model: str) -> str | None:
        """Return the profile that a model name selects; None: none.

        Raises:
            ModelNotFound: the name is neither a model's nor a profile's.
        """
        profiles = self.settings.all_profiles
        base, colon, suffix = model.rpartition(":")
        is_suffixed = bool(colon) and self.model.has_name(base)
        if is_suffixed and suffix in profiles:
            return suffix
        for name, profile in profiles.items():
            if any(fnmatchcase(model, alias) for alias in profile.aliases):
                return name
        if self.model.has_name(model):
            return None
        if is_suffixed:
            raise ModelNotFound(
                f"Model {base!r} has no profile {suffix!r}{did_you_mean(suffix, profiles)}"
            )
        raise ModelNotFound(
            f"Model {model!r} not found. This server has {self.model.id!r} (or 'default')."
        )

    async def start(self) -> None:
        """Start the engine in the background."""
        await self.engine.start()

    async def close(self) -> None:
        """Stop the engine, with the requests that are running."""
        await self.engine.close()
        await self._grammars.close()
        self._worker.shutdown()
        if self._turns is not None:
            self._turns.close()
        self._reader.shutdown()
        self._template.close()
        self.bodies.close()

    @property
    def is_ready(self) -> bool:
        """Whether the engine accepts requests."""
        return self.engine.state == "ready"

    async def build_prompt(
        self, conversation: Conversation, owner: str, *, param: str | None = None
    ) -> Prompt:
        """Render and tokenize a conversation.

        Args:
            owner: whose cached turns may be used.
            param: the request's field, if the prompt must leave room for an answer; else None.

        Raises:
            InvalidRequest: the chat template refuses the conversation, or the prompt is too long.
        """
        if param is not None:
            await self.run_in_worker(partial(self._check_bytes, conversation, param))
        steps = prompt_steps(
            conversation,
            tokenizer=self.tokenizer,
            template=self._template,
            turn_cache=self._turns,
            owner=owner,
        )
        return await self.take_turns(steps, param=param)

    async def take_turns(self, steps: Steps[T], *, param: str | None = None) -> T:
        """Do a client's steps on the prompt thread, and those of other clients in between.

        Args:
            param: the request's field, if a prompt must leave room for an answer; else None.

        Raises:
            InvalidRequest: the prompt is too long.
        """
        while True:
            reached = await self.run_in_worker(partial(advance, steps, TURN_TOKENS))
            if isinstance(reached, Done):
                return reached.result
            if param is not None:
                self.check_length(reached, param=param, exact=False)

    async def compile_grammar(
        self, structure: OutputSpec, prompt: Prompt | None = None
    ) -> GrammarSpec | None:
        """Compile the grammar of an answer; None: the answer is unconstrained.

        Args:
            prompt: the chat prompt; None: a completion of raw text.

        Raises:
            InvalidRequest: the structure cannot be enforced.
        """
        if structure.format is not None and prompt is not None and prompt.content:
            raise InvalidRequest(
                "messages: structured output (such as response_format) cannot be combined with an"
                " assistant prefill.",
                param="messages",
            )
        in_reasoning = prompt is not None and prompt.in_reasoning
        return await self._grammars.compile(structure, in_reasoning=in_reasoning)

    def cache_turn(self, prompt: Prompt, answer: ChatOutputProcessor) -> None:
        """Keep the tokens of a finished answer for later requests of the conversation."""
        if self._turns is not None:
            future = self._worker.submit(self._turns.remember, prompt, answer.turn())
            future.add_done_callback(_log_turn_error)

    async def run_in_worker(self, task: Callable[[], T]) -> T:
        """Run a slow task on the prompt thread."""
        return await asyncio.get_running_loop().run_in_executor(self._worker, task)

    async def run_by_size(self, request: Request, task: Callable[[], T]) -> T:
        """Run a task whose time grows with the body, on a thread if the body is large."""
        if not getattr(request.state, "large_body", False):
            return task()
        return await asyncio.get_running_loop().run_in_executor(self._reader, task)

    def _check_bytes(self, conversation: Conversation, param: str) -> None:
        """Check that the text of a conversation can be a prompt, without rendering it.

        Raises:
            InvalidRequest: the prompt is too long.
        """
        texts = (message.text for message in conversation.messages)
        size = sum(map(utf8_size, texts))
        if size > MIN_CHECKED_BYTES:
            self.check_length(size // self.tokenizer.longest_token, param=param, exact=False)

    def check_length(self, tokens: int, *, param: str, exact: bool = True) -> None:
        """Check that a prompt of `tokens` tokens leaves room for an answer.

        Claude Code compacts its conversation when it reads `prompt is too long`, other clients when
        they read the code.

        Args:
            exact: False: the prompt has at least so many tokens.

        Raises:
            InvalidRequest: the prompt is too long.
        """
        info = self.engine.info
        if info is not None and tokens >= info.max_context:
            raise InvalidRequest(
                f"{param}: prompt is too long: {'' if exact else 'at least '}{tokens} tokens"
                f" > {info.max_context} maximum,"
                " which the prompt and the answer share.",
                param=param,
                code="context_length_exceeded",
            )


def _log_turn_error(done: Future[None]) -> None:
    if (error := done.exception()) is not None:
        exit_if_out_of_memory(error)
        log.error("Turn not cached.", exc_info=error)


def system_fingerprint(*parts: str) -> str:
    return f"fp_{hashlib.sha256(chr(0).join(parts).encode()).hexdigest()[:10]}"


async def get_state(request: Request) -> AppState:
    """FastAPI dependency: the app's state."""
    state: AppState = request.app.state.glmd
    return state


StateDep = Annotated[AppState, Depends(get_state)]
