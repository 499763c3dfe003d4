"""An engine without a model, for tests of the process around the engine.

A sequence repeats its prompt's tokens, one per step, until `max_tokens`. The first prompt token may
cause a failure instead.
"""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from glmd.errors import CheckpointError
from glmd.ipc import EngineRequest, EngineStats, ErrorKind, ModelInfo, SequenceOutput, unpack_tokens

DIE, RAISE, REFUSE, OVERLOAD = 901, 902, 903, 904
"""First prompt tokens that cause SIGKILL, an exception in a step, a 400, and a 503."""

SILENT = 905
"""First prompt token of a request that is admitted and generates nothing."""

UNDECODABLE = 906
"""First prompt token: an output that the client cannot decode."""


@dataclass(frozen=True)
class EngineConfig:
    max_context: int = 4096
    step_seconds: float = 0.0
    on_load: str = "succeed"
    """succeed | refuse | crash | wait (for a file named `go` in the model's folder)"""


class FakeEngine:
    def __init__(self, folder: Path, config: EngineConfig) -> None:
        self.info = ModelInfo(
            path=str(folder),
            vocab_size=1000,
            max_context=config.max_context,
            eos_token_ids=(0,),
            has_mtp=False,
            weight_bytes=12,
            kv_bytes_per_token=1,
            bits_per_weight=5.0,
            device="fake",
        )
        self._pause = config.step_seconds
        self._sequences: dict[tuple[str, int], tuple[EngineRequest, list[int], int]] = {}
        self._errors: list[SequenceOutput] = []
        self._steps = 0
        self._tokens = 0

    @property
    def has_work(self) -> bool:
        return bool(self._errors) or any(
            prompt[0] != SILENT for _, prompt, _ in self._sequences.values()
        )

    def submit(self, request: EngineRequest) -> None:
        prompt = unpack_tokens(request.prompt).tolist()
        if prompt[0] == REFUSE:
            self._refuse(request.id, "invalid_request", "No such thing.")
        elif prompt[0] == OVERLOAD:
            self._refuse(request.id, "overloaded", "No room.")
        else:
            for index in range(request.n):
                self._sequences[request.id, index] = (request, prompt, 0)

    def _refuse(self, id: str, kind: ErrorKind, message: str) -> None:
        self._errors.append(
            SequenceOutput(
                id=id, finish_reason="error", error=message, error_kind=kind, error_param="prompt"
            )
        )

    def cancel(self, id: str, index: int | None = None) -> None:
        for key in list(self._sequences):
            if key[0] == id and index in (None, key[1]):
                del self._sequences[key]

    def step(self) -> list[SequenceOutput]:
        time.sleep(self._pause)
        outputs, self._errors = self._errors, []
        self._steps += 1
        for key, (request, prompt, count) in list(self._sequences.items()):
            if prompt[0] == DIE:
                os.kill(os.getpid(), signal.SIGKILL)
            if prompt[0] == RAISE:
                raise RuntimeError("the test asked for it")
            if prompt[0] == SILENT:
                continue
            if prompt[0] == UNDECODABLE:
                outputs.append(SequenceOutput(id=key[0], finish_reason="unknown"))  # type: ignore[arg-type]
                continue
            done = count + 1 == (request.max_tokens or 16)
            self._tokens += 1
            outputs.append(
                SequenceOutput(
                    id=key[0],
                    index=key[1],
                    tokens=[prompt[count % len(prompt)]],
                    finish_reason="length" if done else None,
                    admitted=count == 0,
                    prompt_tokens=len(prompt) if count == 0 else 0,
                )
            )
            if done:
                del self._sequences[key]
            else:
                self._sequences[key] = (request, prompt, count + 1)
        return outputs

    def stats(self) -> EngineStats:
        return EngineStats(
            running=len(self._sequences),
            steps=self._steps,
            tokens_generated=self._tokens,
        )

    def close(self) -> None:
        pass


def load_engine(
    folder: Path, config: EngineConfig, on_progress: Callable[[int, int], None]
) -> FakeEngine:
    on_progress(6, 12)
    match config.on_load:
        case "refuse":
            raise CheckpointError(f"{folder} holds no checkpoint.")
        case "crash":
            sys.exit(7)
        case "wait":
            while not (folder / "go").exists():
                time.sleep(0.01)
    on_progress(12, 12)
    return FakeEngine(folder, config)
