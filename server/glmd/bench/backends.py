"""glmd's side: the engine as the server runs it, with its default limits."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from glmd.bench.runner import Progress, Session
from glmd.engine import memory
from glmd.engine.config import EngineConfig
from glmd.engine.core import Engine
from glmd.engine.structured_output import StructuredOutputManager
from glmd.ipc import EngineRequest, SamplingParams, SequenceOutput, TokenArray, pack_tokens
from glmd.model.loader import load_model

Dtype = Literal["auto", "bfloat16", "float16", "float32"]


class GlmdSide:
    """glmd with its weights loaded.

    Args:
        folder: a checkpoint that glmd serves.
        dtype: of activations, KV, and unquantised weights.
        mtp: load the MTP layer, if there is one, and draft where that pays.
    """

    name = "glmd"

    def __init__(self, folder: Path, dtype: Dtype, *, mtp: bool = True) -> None:
        self._config = EngineConfig(dtype=dtype, mtp="auto" if mtp else 0)
        self._budget = memory.default_budget()
        memory.DeviceLimits.set(self._budget)
        self._model = load_model(folder, dtype, lambda done, total: None, mtp=mtp)
        self.kv_bytes_per_token = self._model.kv_bytes_per_token
        self.weight_bytes = self._model.weight_bytes

    def extend_context(self, tokens: int) -> None:
        """Let sequences have `tokens` tokens, though the checkpoint was made for fewer.

        Its answers make no sense there, as they make none to random prompts. What a step takes
        does not depend on that, and mlx-lm does not stop there either.
        """
        args = self._model.args
        args.max_position_embeddings = max(args.max_position_embeddings, tokens)

    def open(self) -> Session:
        """A session with an empty KV store."""
        return GlmdSession(self.engine())

    def engine(self, constraints: StructuredOutputManager | None = None) -> Engine:
        """An engine with an empty KV store.

        Args:
            constraints: with grammars that are compiled already; None: its own.
        """
        return Engine(self._model, self._config, self._budget, constraints)


class GlmdSession:
    """One engine.

    Args:
        form: fields of `EngineRequest` that all requests have beside the benchmark's own.
    """

    def __init__(self, engine: Engine, **form: Any) -> None:
        self._engine = engine
        self._form = form

    def submit(self, request: int, prompt: TokenArray, max_tokens: int) -> None:
        self._engine.submit(
            EngineRequest(
                id=str(request),
                prompt=pack_tokens(prompt),
                max_tokens=max_tokens,
                ignore_eos=True,
                prompt_progress=True,
                **{"sampling": SamplingParams(temperature=0), **self._form},
            )
        )

    def cancel(self, request: int) -> None:
        self._engine.cancel(str(request))

    def step(self) -> list[Progress]:
        return [_progress(output) for output in self._engine.step()]

    @property
    def kv_bytes(self) -> int:
        # Asked for in every step, and all of `stats` takes half a millisecond.
        return self._engine.scheduler.kv_bytes

    @property
    def computed(self) -> int:
        return self._engine.stats().prompt_tokens_computed

    @property
    def resting_kv_bytes(self) -> int:
        return self._engine.stats().kv_bytes

    @property
    def resting_arrays(self) -> int:
        return self._engine.stats().kv_segments * self._engine.kv_layers

    def close(self) -> None:
        self._engine.close()


def _progress(output: SequenceOutput) -> Progress:
    if output.error is not None:
        raise RuntimeError(f"request {output.id}: {output.error}")
    return Progress(
        int(output.id),
        tuple(output.tokens),
        prefilled=output.computed_tokens or None,
        # The first Output with tokens tells.
        cached=output.cached_tokens if output.prompt_tokens else None,
        ended=output.finish_reason is not None,
    )
