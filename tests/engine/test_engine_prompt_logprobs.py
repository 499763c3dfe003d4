"""Log-probabilities of prompt tokens, computed in the chunks that run anyway."""

from __future__ import annotations

from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from engines import (
    Run,
    assert_idle,
    one_shot_logits,
    refuse_memory,
    request,
    tiny_engine,
    tiny_model,
)

from glmd.ipc import EngineRequest, TokenLogprobs
from glmd.model.loader import LoadedModel

PROMPT = np.random.default_rng(3).integers(0, 500, 300).tolist()

K = 3


def scores(running: Run, *requests: EngineRequest) -> dict[str, dict[int, TokenLogprobs]]:
    """Run to the end; the log-probabilities of each request's prompt, by position."""
    found: dict[str, dict[int, TokenLogprobs]] = {one.id: {} for one in requests}
    begun = set()
    running.submit(*requests)
    while running.engine.has_work:
        assert running.steps < 500
        for output in running.step():
            for piece in output.prompt_logprobs or ():
                assert (output.id, output.index) not in begun
                found[output.id] |= dict(enumerate(piece.tokens, piece.start))
            if output.tokens:
                begun.add((output.id, output.index))
    return found


def assert_one_shot(model: LoadedModel, prompt: list[int], found: dict[int, TokenLogprobs]) -> None:
    logits = one_shot_logits(model, prompt, expanded=True).astype(np.float64)
    logprobs = logits - np.log(np.exp(logits).sum(axis=-1, keepdims=True))
    assert sorted(found) == list(range(1, len(prompt)))
    for position, entry in found.items():
        row = logprobs[position - 1]
        assert entry.logprob == pytest.approx(row[prompt[position]], abs=1e-3)
        assert entry.top_logprobs == pytest.approx(np.sort(row)[::-1][:K], abs=1e-3)
        assert [row[id] for id in entry.top_ids] == pytest.approx(entry.top_logprobs, abs=1e-3)


@pytest.mark.parametrize("mtp_layers", [0, 1])
@pytest.mark.parametrize("max_step_tokens", [16, 2048])
def test_they_are_those_of_a_one_shot_forward(mtp_layers: int, max_step_tokens: int) -> None:
    model = tiny_model(num_nextn_predict_layers=mtp_layers)
    running = Run(tiny_engine(model, max_step_tokens=max_step_tokens))
    found = scores(
        running,
        request("plain", PROMPT[:40], max_tokens=3),
        request("scored", PROMPT, max_tokens=0, prompt_logprobs=K),
        request("short", PROMPT[:2], max_tokens=2, prompt_logprobs=K, n=2),
    )
    assert_one_shot(model, PROMPT, found["scored"])
    assert_one_shot(model, PROMPT[:2], found["short"])
    assert not found["plain"]
    answer = running.answer("scored")
    assert (answer.tokens, answer.finish) == ([], "length")
    assert len(running.answer("short", 1).tokens) == 2
    assert_idle(running.engine)


def test_a_cached_prefix_is_computed_again_and_stored_once() -> None:
    model = tiny_model()
    running = Run(tiny_engine(model))
    asked: dict[str, Any] = {"max_tokens": 2, "ignore_eos": True}
    plain = scores(running, request("first", PROMPT, **asked))
    stored = running.engine.scheduler.tree.tokens
    found = scores(running, request("second", PROMPT, prompt_logprobs=K, **asked))
    assert not plain["first"]
    assert_one_shot(model, PROMPT, found["second"])
    assert running.answer("second").cached_tokens == 0
    assert running.answer("second").tokens == running.answer("first").tokens
    assert running.engine.scheduler.tree.tokens == stored
    scores(running, request("third", PROMPT, **asked))
    assert running.answer("third").cached_tokens == len(PROMPT) - 1


def test_two_requests_for_one_prompt_both_get_them() -> None:
    model = tiny_model()
    running = Run(tiny_engine(model, max_step_tokens=64))
    both = [request(id, PROMPT, max_tokens=0, prompt_logprobs=K) for id in "ab"]
    for found in scores(running, *both).values():
        assert_one_shot(model, PROMPT, found)


def test_they_survive_a_step_without_memory() -> None:
    model = tiny_model()
    running = Run(tiny_engine(model, max_step_tokens=64))
    refuse_memory(running.engine, {2}, late=True)
    found = scores(running, request("a", PROMPT, max_tokens=1, prompt_logprobs=K))
    assert_one_shot(model, PROMPT, found["a"])


def test_a_prompt_of_one_token_has_none() -> None:
    running = Run(tiny_engine())
    found = scores(running, request("a", [5], max_tokens=0, prompt_logprobs=0))
    assert found == {"a": {}}
    assert running.answer("a").finish == "length"


def test_few_rows_of_logits_are_in_memory_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model()
    shapes: list[int] = []
    logits = model.logits

    def record(hidden: mx.array) -> mx.array:
        shapes.append(hidden.shape[0])
        return logits(hidden)

    monkeypatch.setattr(model, "logits", record)
    found = scores(Run(tiny_engine(model)), request("a", PROMPT, prompt_logprobs=K, max_tokens=1))
    assert max(shapes) == 64
    assert_one_shot(model, PROMPT, found["a"])
