"""Backends of the engine benchmark: glmd's engine and mlx-lm's `BatchGenerator`."""

from __future__ import annotations

from collections.abc import Callable
from copy import copy
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import mlx.core as mx
from mlx_lm.generate import BatchGenerator
from mlx_lm.models.cache import LRUPromptCache, trim_prompt_cache
from mlx_lm.utils import load_model as load_mlx_lm_model

from glmd.bench.runner import BackendSession, RequestProgress
from glmd.engine import memory
from glmd.engine.config import EngineConfig
from glmd.engine.core import Engine
from glmd.engine.structured_output import StructuredOutputManager
from glmd.ipc import EngineRequest, SamplingParams, SequenceOutput, TokenArray, pack_tokens
from glmd.model.loader import load_model

Dtype = Literal["auto", "bfloat16", "float16", "float32"]


class GlmdBackend:
    """glmd's engine with the server's default limits.

    Args:
        dtype: type of activations, KV cache and unquantized weights.
        mtp: load the checkpoint's MTP layer and draft where that is faster.
        name: of this side of a comparison.
    """

    def __init__(self, folder: Path, dtype: Dtype, *, mtp: bool = True, name: str = "glmd") -> None:
        self.name = name
        self._config = EngineConfig(dtype=dtype, mtp="auto" if mtp else 0)
        self._budget = memory.default_budget()
        memory.DeviceLimits.set(self._budget)
        self._model = load_model(folder, dtype, lambda done, total: None, mtp=mtp)
        self.kv_bytes_per_token = self._model.kv_bytes_per_token
        self.weight_bytes = self._model.weight_bytes
        self.acceptance = 0.0

    @property
    def has_mtp(self) -> bool:
        """Whether the model has an MTP layer, and it is loaded."""
        return self._model.mtp is not None

    def with_drafts(self, drafts: Literal[0, 1]) -> GlmdBackend:
        """Return a backend of the same weights with a fixed number of drafts per step."""
        other = copy(self)
        other._config = replace(self._config, mtp=drafts)
        return other

    def extend_context(self, tokens: int) -> None:
        """Raise the context limit to `tokens`, beyond that of the checkpoint.

        The answers become meaningless, but the duration of a step does not depend on them.
        """
        args = self._model.args
        args.max_position_embeddings = max(args.max_position_embeddings, tokens)

    def open(self) -> BackendSession:
        """Return a session with an empty KV cache."""
        return GlmdSession(self.engine(), on_close=self._ended)

    def _ended(self, engine: Engine) -> None:
        """Keep the share of accepted drafts of the latest session."""
        self.acceptance = engine.stats().acceptance

    def engine(self, grammars: StructuredOutputManager | None = None) -> Engine:
        """Return an engine with an empty KV cache.

        Args:
            grammars: manager to use. None: a new one.
        """
        return Engine(self._model, self._config, self._budget, grammars)


class GlmdSession:
    """One engine.

    Args:
        on_close: called with the engine before it is closed.
        fields: additional fields of `EngineRequest`, the same for all requests.
    """

    def __init__(
        self,
        engine: Engine,
        *,
        on_close: Callable[[Engine], None] = lambda engine: None,
        **fields: Any,
    ) -> None:
        self._engine = engine
        self._on_close = on_close
        self._fields = fields

    def submit(self, request: int, prompt: TokenArray, max_tokens: int) -> None:
        self._engine.submit(
            EngineRequest(
                id=str(request),
                prompt=pack_tokens(prompt),
                max_tokens=max_tokens,
                ignore_eos=True,
                prompt_progress=True,
                **{"sampling": SamplingParams(temperature=0), **self._fields},
            )
        )

    def cancel(self, request: int) -> None:
        self._engine.cancel(str(request))

    def step(self) -> list[RequestProgress]:
        return [_progress(output) for output in self._engine.step()]

    @property
    def kv_bytes(self) -> int:
        # Read in every step; `stats` would take half a millisecond.
        return self._engine.scheduler.kv_bytes

    @property
    def computed(self) -> int:
        return self._engine.stats().prompt_tokens_computed

    @property
    def idle_kv_bytes(self) -> int:
        return self._engine.stats().kv_bytes

    @property
    def idle_kv_arrays(self) -> int:
        return self._engine.stats().kv_segments * self._engine.kv_layers

    def close(self) -> None:
        self._on_close(self._engine)
        self._engine.close()


def _progress(output: SequenceOutput) -> RequestProgress:
    if output.error is not None:
        raise RuntimeError(f"request {output.id}: {output.error}")
    return RequestProgress(
        int(output.id),
        tuple(output.tokens),
        prefilled=output.computed_tokens or None,
        # set on the first output with tokens
        cached=output.cached_tokens if output.prompt_tokens else None,
        ended=output.finish_reason is not None,
    )


_KEY = "model"
"""Model name in the prompt cache."""


class MlxLmBackend:
    """mlx-lm's `BatchGenerator` and LRU prompt cache, as in `mlx_lm.server`.

    Batch and chunk sizes are mlx-lm's defaults. A request's KV cache is stored when the request
    ends, but not when it is cancelled.

    Args:
        dtype: type of activations, KV cache and unquantized weights.
    """

    name = "mlx-lm"

    def __init__(self, folder: Path, dtype: mx.Dtype) -> None:
        self._model, _ = load_mlx_lm_model(folder)
        self._model.set_dtype(dtype)
        mx.eval(self._model.parameters())

    def open(self) -> BackendSession:
        """Return a session with an empty KV cache."""
        return MlxLmSession(self._model)


@dataclass(slots=True)
class _Running:
    """A request in the generator.

    Attributes:
        computed: prompt tokens computed so far.
        reported: `cached` was reported.
    """

    request: int
    cached: int
    computed: int = 0
    reported: bool = False


class MlxLmSession:
    """One `BatchGenerator` and one prompt cache."""

    def __init__(self, model: Any) -> None:
        self._generator = BatchGenerator(model, stream=mx.default_stream(mx.default_device()))
        self._prompts = LRUPromptCache()
        self._layers = len(model.layers)
        self._running: dict[int, _Running] = {}
        self._computed = 0

    def submit(self, request: int, prompt: TokenArray, max_tokens: int) -> None:
        tokens = prompt.tolist()
        cache, rest = self._prompts.fetch_nearest_cache(_KEY, tokens)
        if not rest:  # the last token is computed for its logits
            trim_prompt_cache(cache, 1)
            rest = tokens[-1:]
        cached = len(tokens) - len(rest)
        (uid,) = self._generator.insert(
            [rest], [max_tokens], caches=[cache], all_tokens=[tokens[:cached]]
        )
        self._running[uid] = _Running(request, cached)

    def cancel(self, request: int) -> None:
        for uid, running in list(self._running.items()):
            if running.request == request:
                self._generator.remove([uid])
                del self._running[uid]

    def step(self) -> list[RequestProgress]:
        prefilled, generated = self._generator.next()
        out = []
        for response in prefilled:
            running = self._running[response.uid]
            done, _ = response.progress
            self._computed += done - running.computed
            running.computed = done
            out.append(RequestProgress(running.request, prefilled=running.cached + done))
        for response in generated:
            running = self._running[response.uid]
            ended = response.finish_reason is not None
            cached = None if running.reported else running.cached
            running.reported = True
            out.append(
                RequestProgress(running.request, (response.token,), cached=cached, ended=ended)
            )
            if ended:
                self._prompts.insert_cache(_KEY, response.all_tokens[:], response.prompt_cache)
                del self._running[response.uid]
        return out

    @property
    def kv_bytes(self) -> int:
        return int(self._generator.prompt_cache_nbytes + self._prompts.nbytes)

    @property
    def computed(self) -> int:
        return self._computed

    @property
    def idle_kv_bytes(self) -> int:
        return int(self._prompts.nbytes)

    @property
    def idle_kv_arrays(self) -> int:
        return len(self._prompts) * 2 * self._layers

    def close(self) -> None:
        self._generator.close()
