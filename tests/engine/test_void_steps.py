"""An error that MLX raises once voids what was in flight: no token of it is delivered.

Metal reports a failed command buffer at whatever waits for the device next, and clears the error.
Results of the failed work can be read afterwards, and are arbitrary.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from engines import Answer, Run, assert_idle, request, tiny_engine, tiny_model
from grammars import CONTROLS

from glmd.chat.tokenizer import SpecialTokens
from glmd.engine.core import Engine
from glmd.ipc import EngineRequest, GrammarSpec
from glmd.kv_cache.stored_keys import dequantize
from glmd.structured_output.compiler import build_grammar
from glmd.structured_output.request import OutputSpec, Regex

OUT_OF_MEMORY = (
    "[METAL] Command buffer execution failed: Insufficient Memory"
    " (00000008:kIOGPUCommandBufferCallbackErrorOutOfMemory)."
)
TIMEOUT = (
    "[METAL] Command buffer execution failed: Caused GPU Timeout Error"
    " (00000002:kIOGPUCommandBufferCallbackErrorTimeout)."
)
GARBAGE = 97
"""A token that the failed work seems to have chosen."""


def _engine() -> Engine:
    model = tiny_model(num_nextn_predict_layers=1)
    return tiny_engine(model, mtp=1, max_step_tokens=40, max_running=5)


def _requests() -> list[EngineRequest]:
    prompt = np.random.default_rng(4).integers(0, 250, 90).tolist()
    form = OutputSpec(Regex("[a-c]{2}( [0-9]+,){2,}", "p"))
    grammar = GrammarSpec(
        grammar=build_grammar(form, SpecialTokens.find(CONTROLS, "tokenizer.json")).text
    )
    kinds: dict[str, dict[str, Any]] = {
        "long": {"max_tokens": 40},
        "sampled": {"temperature": 2.0, "n": 2, "logprobs": 1},
        "penalised": {"repetition_penalty": 1.3, "frequency_penalty": 0.5},
        "held to a grammar": {"grammar": grammar, "temperature": 1.0},
        "cancelled": {"temperature": 3.0},
        "late": {"min_tokens": 3, "temperature": 1.0},
    }
    shared = {"max_tokens": 14, "ignore_eos": True}
    return [
        request(kind, prompt[: 90 - 15 * seed], **shared | {"seed": seed} | fields)
        for seed, (kind, fields) in enumerate(kinds.items())
    ]


def _void(engine: Engine) -> None:
    """Replace what MLX has not delivered yet, and all KV."""
    step = engine.pending_step
    if step is not None and step.tokens is not None:
        assert step.counts is not None
        step.ready = step.tokens = mx.full(step.tokens.shape, GARBAGE, mx.int32)
        step.counts = mx.ones_like(step.counts)
        step.last = mx.full(step.counts.shape, GARBAGE, mx.int32)
        for index, arrays in step.logprobs.items():
            chosen, ids, values = (mx.zeros_like(array) for array in arrays)
            step.logprobs[index] = chosen, ids, values
    tree, tails = engine.scheduler.tree, engine.scheduler.tails
    for layers in [*(n.kv.layers for n in tree.nodes() if n.kv is not None), tails._pools]:
        layers[:] = [mx.full(each.shape, mx.nan, dequantize(each).dtype) for each in layers]


@contextmanager
def _fault(engine: Engine, number: int | None, message: str) -> Iterator[list[int]]:
    """Let one evaluation fail, counted from 0; yields a list of the counted ones."""
    counted: list[int] = []
    with pytest.MonkeyPatch.context() as patch:
        for name in ("eval", "async_eval"):
            evaluate = getattr(mx, name)

            def run(*arrays: Any, evaluate: Any = evaluate) -> None:
                counted.append(len(counted))
                if counted[-1] == number:
                    _void(engine)
                    raise RuntimeError(message)
                evaluate(*arrays)

            patch.setattr(mx, name, run)
        yield counted


def _serve(engine: Engine, number: int | None, message: str) -> tuple[Run, int, list[str]]:
    """Answers, the number of evaluations, and the errors raised by the engine."""
    running = Run(engine)
    *early, late = _requests()
    left, raised = [late], []
    with _fault(engine, number, message) as counted:
        running.submit(*early)
        while engine.has_work or left:
            try:
                if running.steps == 12 and left:
                    running.submit(left.pop())
                    engine.cancel("cancelled")
                running.step()
            except RuntimeError as error:
                raised.append(str(error))
    return running, len(counted), raised


@cache
def _undisturbed() -> tuple[dict[tuple[str, int], Answer], int]:
    running, evaluations, raised = _serve(_engine(), None, "")
    assert not raised
    return running.answers, evaluations


@pytest.mark.parametrize(
    ("message", "first"), [(OUT_OF_MEMORY, 0), (TIMEOUT, 9)], ids=["memory", "timeout"]
)
def test_answers_are_the_same_whichever_evaluation_fails(message: str, first: int) -> None:
    """In prefill, decoding, verification, sampling under a grammar, moves of tails into the tree,
    growth of the pool, the end of sequences and their cancellation."""
    expected, evaluations = _undisturbed()
    assert evaluations > 100
    for number in range(first, evaluations, evaluations // 6):
        engine = _engine()
        running, _, raised = _serve(engine, number, message)
        assert raised == ([TIMEOUT] if message is TIMEOUT else [])
        assert engine.stats().out_of_memory == (message is OUT_OF_MEMORY)
        assert running.answers.keys() == expected.keys()
        for key, answer in running.answers.items():
            tokens = expected[key].tokens
            if answer.finish == "cancelled":
                shorter = min(len(tokens), len(answer.tokens))
                assert answer.tokens[:shorter] == tokens[:shorter], (number, key)
                continue
            assert (answer.tokens, answer.finish) == (tokens, expected[key].finish), (number, key)
            np.testing.assert_allclose(answer.logprobs, expected[key].logprobs, atol=1e-3)
        assert_idle(engine)
