"""mlx-lm's side: its `BatchGenerator`, fed as its own server feeds it.

With the LRU prompt cache in front, as `mlx_lm.server` has it: the nearest stored prompt is
looked up when a request arrives, and what a request leaves behind is stored when it ends, or not
at all when it is cancelled. Sizes of batches and chunks are mlx-lm's defaults.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx
from mlx_lm.generate import BatchGenerator
from mlx_lm.models.cache import LRUPromptCache, trim_prompt_cache
from mlx_lm.utils import load_model

from glmd.bench.runner import Progress, Session
from glmd.ipc import TokenArray

_KEY = "the one model there is"


class MlxLmSide:
    """mlx-lm with its weights loaded.

    Args:
        folder: a checkpoint that mlx-lm reads.
        dtype: of activations, KV, and unquantised weights.
    """

    name = "mlx-lm"

    def __init__(self, folder: Path, dtype: mx.Dtype) -> None:
        self._model, _ = load_model(folder)
        self._model.set_dtype(dtype)
        mx.eval(self._model.parameters())

    def open(self) -> Session:
        """A session with an empty KV store."""
        return MlxLmSession(self._model)


@dataclass(slots=True)
class _Running:
    request: int
    cached: int
    rest: int
    """Prompt tokens to compute."""
    done: int = 0
    """Of these, so many are computed."""
    announced: bool = False


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
        if not rest:  # known to the last token, of which the logits are needed all the same
            trim_prompt_cache(cache, 1)
            rest = tokens[-1:]
        cached = len(tokens) - len(rest)
        (uid,) = self._generator.insert(
            [rest], [max_tokens], caches=[cache], all_tokens=[tokens[:cached]]
        )
        self._running[uid] = _Running(request, cached, len(rest))

    def cancel(self, request: int) -> None:
        for uid, running in list(self._running.items()):
            if running.request == request:
                self._generator.remove([uid])
                del self._running[uid]

    def step(self) -> list[Progress]:
        prefilled, generated = self._generator.next()
        out = []
        for response in prefilled:
            running = self._running[response.uid]
            done, _ = response.progress
            self._computed += done - running.done
            running.done = done
            out.append(Progress(running.request, prefilled=running.cached + done))
        for response in generated:
            running = self._running[response.uid]
            ended = response.finish_reason is not None
            cached = None if running.announced else running.cached
            running.announced = True
            out.append(Progress(running.request, (response.token,), cached=cached, ended=ended))
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
    def resting_kv_bytes(self) -> int:
        return int(self._prompts.nbytes)

    @property
    def resting_arrays(self) -> int:
        return len(self._prompts) * 2 * self._layers

    def close(self) -> None:
        self._generator.close()
