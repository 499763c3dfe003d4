"""The MTP layer's drafts, against a forward of the whole sequence through mlx-lm's layer."""

from __future__ import annotations

from typing import Any

import mlx.core as mx
import numpy as np
import numpy.typing as npt
import pytest
from engines import Run, assert_true, request, run, tiny_engine, tiny_model
from mlx_lm.models.base import create_attention_mask

from glmd.model.loader import LoadedModel

PROMPT = np.random.default_rng(2).integers(0, 500, 70).tolist()


def _model(**config: Any) -> LoadedModel:
    return tiny_model(num_nextn_predict_layers=1, **config)


def _reference_drafts(model: LoadedModel, tokens: list[int]) -> npt.NDArray[np.float32]:
    """Logits [n - 1, vocabulary]: row i, from tokens 0 to i + 1, is for the token at i + 2."""
    assert model.mtp is not None
    weights, inner = model.mtp._weights, model._model.model
    ids = mx.array(np.array(tokens, np.int32))[None]
    hidden = inner(ids[:, :-1])
    embed = weights.embed_tokens if "embed_tokens" in weights else inner.embed_tokens
    x = mx.concatenate([weights.enorm(embed(ids[:, 1:])), weights.hnorm(hidden)], axis=-1)
    x = weights.eh_proj(x)
    h = weights(x, create_attention_mask(x, None, return_array=True))
    return np.array(model.mtp.logits(weights.shared_head.norm(h))[0])


@pytest.mark.parametrize(("mtp", "shares_vocabulary"), [(1, True), (3, False)])
def test_drafts_are_those_of_a_forward_over_all_tokens(mtp: int, shares_vocabulary: bool) -> None:
    """Through prefill in chunks, sealed tails, and drafts that were refused."""
    model = _model(mtp_shares_vocabulary=shares_vocabulary)
    running = Run(tiny_engine(model, mtp=mtp, max_step_tokens=33))
    running.submit(request("a", PROMPT, max_tokens=180, ignore_eos=True))
    drafts: list[tuple[int, int]] = []  # (position, token)
    while running.engine.has_work:
        running.step()
        flight = running.engine._in_flight
        if flight is None or flight.drafts is None or not flight.sequences:
            continue
        assert flight.counts is not None
        # The flight's first row stands behind what is known, and some of its rows are confirmed.
        known = flight.sequences[0].length
        drafts.append((known + int(flight.counts[0]), int(flight.drafts[0, 0])))
    tokens = PROMPT + running.answer("a").tokens
    logits = _reference_drafts(model, tokens)
    compared = 0
    for position, token in drafts:
        if position - 2 < len(logits):
            row = logits[position - 2]
            assert row[token] >= row.max() - 1e-3
            compared += 1
    assert compared > 170


def test_a_draft_is_taken_as_often_as_it_is_right() -> None:
    """At a high temperature the noise decides, and both layers see the same noise."""
    engine = tiny_engine(_model(), mtp=1)
    asked = request("a", PROMPT, max_tokens=150, ignore_eos=True, temperature=100.0, seed=1)
    answer = run(engine, asked).answer("a")
    assert_true(_model(), asked, answer)
    stats = engine.stats()
    assert stats.accepted > 0.7 * stats.drafted
    assert len(answer.steps) < 100
    assert stats.tokens_generated == 150


@pytest.mark.parametrize("mtp", [1, 3])
def test_accepted_drafts_leave_the_kv_of_what_was_accepted(mtp: int) -> None:
    """At this temperature both the noise and the logits matter: a third of the drafts is taken,
    and wrong KV gives other tokens. Tails are sealed on the way, with drafts in flight."""
    model = _model(vocab_size=96, eos_token_id=[1])
    engine = tiny_engine(model, mtp=mtp)
    asked = [
        request(str(i), [5 + i, 6], max_tokens=280, ignore_eos=True, temperature=4.0, seed=i)
        for i in range(3)
    ]
    together = run(engine, *asked)
    stats = engine.stats()
    assert 0.2 < stats.accepted / stats.drafted < 0.8
    for one in asked:
        assert_true(model, one, together.answer(one.id))


@pytest.mark.parametrize("mtp", [1, 3, "auto"])
def test_drafts_change_no_answer(mtp: Any) -> None:
    sampling: list[dict[str, Any]] = [
        {},
        {"temperature": 8.0, "seed": 5},
        {"temperature": 30.0, "top_k": 9, "seed": 1, "logprobs": 1},
        {"temperature": 30.0, "seed": 2, "presence_penalty": 1.0},
    ]
    for fields in sampling:
        asked = request("a", PROMPT, max_tokens=30, ignore_eos=True, **fields)
        assert_true(_model(), asked, run(tiny_engine(_model(), mtp=mtp), asked).answer("a"))


def test_the_mtp_layer_counts_in_the_memory() -> None:
    with_mtp, without = _model(), tiny_model(num_nextn_predict_layers=0)
    assert with_mtp.kv_bytes_per_token == without.kv_bytes_per_token * 3 // 2
    assert with_mtp.weight_bytes > without.weight_bytes
