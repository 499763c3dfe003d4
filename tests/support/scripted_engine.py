"""An engine that generates the text in the prompt, for tests of the API around the engine.

The last `⟦…⟧` in the prompt is the script: text with tags, followed by an end token. Directions in
braces:

    {die}     kill the process               {raise}   raise an exception in the step
    {wait}    generate nothing until cancelled
    {request} the engine request, as JSON
    {refuse}  refuse the request (400)       {busy}    no room for the request (503)
"""

from __future__ import annotations

import os
import re
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import msgspec

from glmd.chat.tokenizer import Tokenizer
from glmd.ipc import (
    EngineRequest,
    EngineStats,
    ErrorKind,
    FinishReason,
    ModelInfo,
    SequenceOutput,
    TokenLogprobs,
    unpack_tokens,
)

SCRIPT = re.compile(r"⟦(.*?)⟧", re.DOTALL)
DIRECTION = re.compile(r"\{(die|raise|wait|request|refuse|busy)\}")


@dataclass(frozen=True)
class EngineConfig:
    max_context: int = 4096
    step_seconds: float = 0.0


@dataclass
class Sequence:
    request: EngineRequest
    index: int
    script: list[int | str]
    tokens: list[int]
    """Prompt, and what was said; a prefix that later prompts find in the cache."""
    prompt_tokens: int
    cached_tokens: int
    said: int = 0


class ScriptedEngine:
    def __init__(self, folder: Path, config: EngineConfig) -> None:
        self._tokenizer = Tokenizer.load(folder)
        self._end = self._tokenizer.special_tokens.user
        self._pause = config.step_seconds
        self._sequences: dict[tuple[str, int], Sequence] = {}
        self._outbox: list[SequenceOutput] = []
        self._prompts: list[list[int]] = []
        self._steps = 0
        self.info = ModelInfo(
            path=str(folder),
            vocab_size=self._tokenizer.vocab_size,
            max_context=config.max_context,
            eos_token_ids=(self._end,),
            has_mtp=False,
            weight_bytes=1000,
            kv_bytes_per_token=1,
            bits_per_weight=5.5,
            device="fake",
        )

    @property
    def has_work(self) -> bool:
        return bool(self._outbox) or any(self._next(s) != "wait" for s in self._sequences.values())

    def _next(self, sequence: Sequence) -> int | str:
        return sequence.script[sequence.said] if sequence.said < len(sequence.script) else self._end

    def submit(self, request: EngineRequest) -> None:
        prompt = unpack_tokens(request.prompt).tolist()
        scripts = SCRIPT.findall(self._tokenizer.decode(prompt))
        script = self._script(scripts[-1] if scripts else "</think>?", request)
        if "refuse" in script or "busy" in script:
            kind: ErrorKind = "invalid_request" if "refuse" in script else "overloaded"
            self._outbox.append(
                SequenceOutput(
                    id=request.id, finish_reason="error", error="As you wish.", error_kind=kind
                )
            )
            return
        cached = max((common(prompt, earlier) for earlier in self._prompts), default=0)
        if request.prompt_progress:
            self._outbox += [
                SequenceOutput(id=request.id, computed_tokens=len(prompt) // 2),
                SequenceOutput(id=request.id, computed_tokens=len(prompt)),
            ]
        for index in range(request.n):
            tokens = list(prompt)
            self._prompts.append(tokens)
            self._sequences[request.id, index] = Sequence(
                request, index, script, tokens, len(prompt), min(cached, len(prompt) - 1)
            )

    def _script(self, text: str, request: EngineRequest) -> list[int | str]:
        script: list[int | str] = []
        for piece in DIRECTION.split(text):
            if piece == "request":
                fields = msgspec.to_builtins(request) | {"prompt": ""}
                script += list(self._tokenizer.encode(msgspec.json.encode(fields).decode()))
            elif DIRECTION.fullmatch(f"{{{piece}}}"):
                script.append(piece)
            else:
                script += list(map(int, self._tokenizer.encode_markup(piece)))
        return script

    def cancel(self, id: str, index: int | None = None) -> None:
        for key in list(self._sequences):
            if key[0] == id and index in (None, key[1]):
                del self._sequences[key]
                self._outbox.append(SequenceOutput(id=id, index=key[1], finish_reason="cancelled"))

    def step(self) -> list[SequenceOutput]:
        time.sleep(self._pause)
        self._steps += 1
        outputs, self._outbox = self._outbox, []
        for key, sequence in list(self._sequences.items()):
            token = self._next(sequence)
            if token == "wait":
                continue
            if token == "die":
                os.kill(os.getpid(), signal.SIGKILL)
            if isinstance(token, str):
                raise RuntimeError(f"the script says {token}")
            output = self._output(sequence, token)
            outputs.append(output)
            if output.finish_reason:
                del self._sequences[key]
        return outputs

    def _output(self, sequence: Sequence, token: int) -> SequenceOutput:
        request = sequence.request
        first = sequence.said == 0
        sequence.said += 1
        sequence.tokens.append(token)
        finish: FinishReason | None = None
        if token == self._end and not request.ignore_eos:
            finish = "stop"
        elif sequence.said == request.max_tokens:
            finish = "length"
        logprobs = None
        if (k := request.sampling.logprobs) is not None:
            logprobs = [TokenLogprobs(-0.25, list(range(k)), [-1.0] * k)]
        return SequenceOutput(
            id=request.id,
            index=sequence.index,
            tokens=[token],
            logprobs=logprobs,
            finish_reason=finish,
            drafted=1,
            accepted=sequence.said % 2,
            admitted=first,
            prompt_tokens=sequence.prompt_tokens if first else 0,
            cached_tokens=sequence.cached_tokens if first else 0,
        )

    def stats(self) -> EngineStats:
        return EngineStats(running=len(self._sequences), steps=self._steps)

    def close(self) -> None:
        pass


def common(a: list[int], b: list[int]) -> int:
    """Length of the common prefix."""
    length = 0
    for x, y in zip(a, b, strict=False):
        if x != y:
            break
        length += 1
    return length


def load_engine(
    folder: Path, config: EngineConfig, on_progress: Callable[[int, int], None]
) -> ScriptedEngine:
    on_progress(1000, 1000)
    return ScriptedEngine(folder, config)
