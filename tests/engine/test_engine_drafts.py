"""The MTP layer's drafts and KV, against one forward pass over the whole sequence."""

from __future__ import annotations

import itertools
from typing import Any

import mlx.core as mx
import numpy as np
import numpy.typing as npt
import pytest
from engines import (
    Run,
    assert_idle,
    assert_reference_tokens,
    request,
    run,
    tiny_engine,
    tiny_model,
)
from mlx_lm.models.base import create_attention_mask

from glmd.engine.core import Engine
from glmd.engine.spec_decode.controller import DraftPlan
from glmd.kv_cache.node import Node
from glmd.kv_cache.segment import Segment
from glmd.kv_cache.stored_keys import dequantize
from glmd.kv_cache.tail_pool import TailPool
from glmd.model.batch import ForwardBatch, PrefillChunk
from glmd.model.loader import LoadedModel

PROMPT = np.random.default_rng(2).integers(0, 500, 70).tolist()


def _model(**config: Any) -> LoadedModel:
    return tiny_model(num_nextn_predict_layers=1, **config)


def _reference_drafts(model: LoadedModel, tokens: list[int]) -> npt.NDArray[np.float32]:
    """Logits [n - 1, vocabulary] of mlx-lm's layer: row i is for the token at i + 2."""
    assert model.mtp is not None
    weights, inner = model.mtp._weights, model._model.model
    ids = mx.array(np.array(tokens, np.int32))[None]
    hidden = inner(ids[:, :-1])
    embed = weights.embed_tokens if "embed_tokens" in weights else inner.embed_tokens
    x = mx.concatenate([weights.enorm(embed(ids[:, 1:])), weights.hnorm(hidden)], axis=-1)
    x = weights.eh_proj(x)
    h = weights(x, create_attention_mask(x, None, return_array=True))
    return np.array(model.mtp.logits(weights.shared_head.norm(h))[0])


KV = npt.NDArray[np.float32]
"""[layers, tokens, kv_width], the MTP layer last."""


def _reference_kv(model: LoadedModel, tokens: list[int]) -> KV:
    """KV of all tokens but the last, whose successor is not known, from one forward pass."""
    assert model.mtp is not None
    ids = mx.array(np.array(tokens, np.int32))
    count = len(tokens) - 1
    chunk = PrefillChunk(0, count, [], True, count)
    batch = ForwardBatch(ids[:-1], mx.arange(count), [], [chunk])
    tails = TailPool(model.kv_layers, model.shape.kv_width, model.dtype)
    hidden, caches = model.forward(batch, tails)
    caches.append(model.mtp.compute_kv(ids[1:], hidden, batch, tails))
    return np.array(mx.stack([dequantize(kv) for kv in caches]))


def _stored_prefix(node: Node[Segment]) -> tuple[list[int], KV]:
    """The tokens and the KV of the prefix that ends with a node."""
    keys: list[int] = []
    parts: list[mx.array] = []
    end, place = len(node), node
    while place.parent is not None:
        assert place.kv is not None
        keys = [*place.keys[:end].tolist(), *keys]
        parts.insert(0, mx.stack([dequantize(layer[:end]) for layer in place.kv.layers]))
        end, place = place.offset, place.parent
    # A key is a pair of tokens (`Sequence.cache_keys`).
    tokens = [*(key >> 32 for key in keys), keys[-1] & 0xFFFFFFFF]
    return tokens, np.array(mx.concatenate(parts, axis=1))


def _compute_all_deferred(engine: Engine) -> int:
    """Catch up on all deferred segments; returns their number."""
    proposer = engine._runner._proposer
    assert proposer is not None
    nodes = [n for n in engine.scheduler.tree.nodes() if n.kv is not None and n.kv.deferred]
    for node in nodes:
        while node.kv is not None and node.kv.deferred:
            assert 0 < proposer._compute_deferred(node, 29) <= 29
    return len(nodes)


def _assert_same_kv(found: KV, expected: KV) -> None:
    for layer, (one, other) in enumerate(zip(found, expected, strict=True)):
        np.testing.assert_allclose(one, other, atol=2e-3, err_msg=f"layer {layer}")


@pytest.mark.parametrize("mtp", [1, 3])
def test_kv_in_tree_and_tails_is_that_of_one_forward_pass(mtp: int) -> None:
    """In all layers, the MTP layer's included: through prefill in chunks beside decoding sequences,
    shared prefixes, refused drafts, and tails that move into the tree."""
    model = _model(vocab_size=96, eos_token_id=[1])
    running = Run(tiny_engine(model, mtp=mtp, max_step_tokens=33))
    scheduler = running.engine.scheduler
    prompt = [token % 90 + 3 for token in PROMPT]
    prompts = [prompt, prompt[:50], [*prompt[:50], 7, 8, *prompt[:40]], prompt[:1], [*prompt, 9]]
    tails: list[tuple[str, int, KV]] = []  # (request, start, KV from there on)
    coming = [
        request(f"{i}", each, max_tokens=150, ignore_eos=True, temperature=4.0, seed=i)
        for i, each in enumerate(prompts)
    ]
    while coming or running.engine.has_work:
        if coming and running.steps % 3 == 0:
            running.submit(coming.pop(0))
        running.step()
        for sequence in scheduler.running:
            start = sequence.num_cached_tokens
            count = min(sequence.num_computed_tokens, sequence.length - 1) - start
            if count > 0:
                views = [scheduler.tails.view(i) for i in range(model.kv_layers)]
                pool = mx.stack([dequantize(view) for view in views])
                kv = np.array(pool[:, sequence.slot, :count])
                tails.append((sequence.request.id, start, kv))
    stats = running.engine.stats()
    assert stats.prompt_tokens_cached > 2 * 48
    assert 0 < stats.accepted < stats.drafted
    assert len(tails) > 300
    expected = {
        f"{i}": _reference_kv(model, each + running.answer(f"{i}").tokens)
        for i, each in enumerate(prompts)
    }
    for id, start, kv in tails:
        _assert_same_kv(kv, expected[id][:, start : start + kv.shape[1]])
    nodes = list(scheduler.tree.nodes())
    assert max(map(len, nodes)) > 100
    for node in nodes:
        tokens, kv = _stored_prefix(node)
        _assert_same_kv(kv, _reference_kv(model, tokens))


OFF, ON = DraftPlan(0), DraftPlan(1)
PROBE, GAPS = DraftPlan(1, sequences=1), DraftPlan(1, with_gaps=True)
SCREEN = DraftPlan(1, sequences=2, with_gaps=True, screens=True)


@pytest.mark.parametrize(
    "plans",
    [
        [OFF],
        [OFF, ON],
        [ON, OFF, PROBE, GAPS, OFF, ON, OFF],
        [GAPS, OFF, PROBE, ON, PROBE, OFF],
        [OFF, SCREEN, OFF, SCREEN, PROBE, SCREEN, ON, OFF],
    ],
    ids=lambda plans: f"{len(plans)} plans",
)
def test_deferred_kv_is_that_of_one_forward_pass_once_caught_up(plans: list[DraftPlan]) -> None:
    """Whatever was deferred and caught up meanwhile: through shared prefixes, tails that move into
    the tree, preemption, and segments that were computed partly."""
    model = _model(vocab_size=96, eos_token_id=[1])
    running = Run(tiny_engine(model, mtp="auto", max_step_tokens=33))
    engine, scheduler = running.engine, running.engine.scheduler
    current = itertools.chain.from_iterable(itertools.repeat(plan, 17) for plan in plans)
    current = itertools.chain(current, itertools.repeat(plans[-1]))
    engine._draft_controller.choose = lambda sequences: next(current)  # type: ignore[method-assign]
    prompt = [token % 90 + 3 for token in PROMPT]
    prompts = [prompt, prompt[:50], [*prompt[:50], 7, 8, *prompt[:40]], [*prompt, 9], [5, 7]]
    asked = [
        request(f"{i}", each, max_tokens=70, ignore_eos=True, temperature=4.0, seed=i)
        for i, each in enumerate(prompts)
    ]
    coming = list(asked)
    while coming or engine.has_work:
        if coming and running.steps % 12 == 0:
            running.submit(coming.pop(0))
        if running.steps == 45:
            scheduler.preempt(scheduler.running[0])
        running.step()
        leases = {s.lease for s in scheduler.running}
        complete = engine._runner._proposer._complete  # type: ignore[union-attr]
        for lease in leases & complete:
            assert lease is not None
            assert not any(p.node.kv and p.node.kv.deferred for p in scheduler.tree.path(lease))
    stats = engine.stats()
    assert stats.preemptions
    assert stats.prompt_tokens_cached > 2 * 48
    assert (stats.drafted > 0) == (plans != [OFF])
    for one in asked:
        assert_reference_tokens(model, one, running.answer(one.id))
    assert_idle(engine)
    assert _compute_all_deferred(engine) or plans[-1] is ON
    assert_idle(engine)
    for node in scheduler.tree.nodes():
        tokens, kv = _stored_prefix(node)
        _assert_same_kv(kv, _reference_kv(model, tokens))


def test_a_screen_leaves_no_pieces_behind() -> None:
    """A path is read in as many parts after a screen as before, or each step would pay for it."""
    running = Run(tiny_engine(_model(), mtp="auto"))
    engine = running.engine
    plans = itertools.chain(
        [OFF] * 40, [SCREEN] * 10, [OFF] * 60, [SCREEN] * 10, itertools.repeat(OFF)
    )
    engine._draft_controller.choose = lambda sequences: next(plans)  # type: ignore[method-assign]
    running.submit(request("a", PROMPT, max_tokens=400, ignore_eos=True))
    pieces = []
    while engine.has_work:
        running.step()
        for sequence in engine.scheduler.running:
            assert sequence.lease is not None
            pieces.append(len(engine.scheduler.tree.path(sequence.lease)))
    assert engine.stats().drafted
    assert max(pieces) <= 2
    assert pieces[-1] == 1
    assert_idle(engine)


def test_drafting_catches_up_with_what_was_deferred() -> None:
    """The drafts behind a deferred prompt and answer are those of one forward pass."""
    model = _model()
    running = Run(tiny_engine(model, mtp="auto", max_step_tokens=33))
    engine = running.engine
    plans = itertools.chain(itertools.repeat(OFF, 100), itertools.repeat(ON))
    engine._draft_controller.choose = lambda sequences: next(plans)  # type: ignore[method-assign]
    running.submit(request("a", PROMPT, max_tokens=180, ignore_eos=True))
    drafts: list[tuple[int, int]] = []
    while engine.has_work:
        running.step()
        step = engine.pending_step
        if step is not None and step.drafted:
            assert not step.with_gaps
            assert step.counts is not None
            assert step.drafts is not None
            known = step.rows.sampled[0].sequence.length
            drafts.append((known + int(step.counts[0]), int(step.drafts[0, 0])))
    tokens = PROMPT + running.answer("a").tokens
    logits = _reference_drafts(model, tokens)
    compared = [(position, token) for position, token in drafts if position - 2 < len(logits)]
    assert len(compared) > 40
    for position, token in compared:
        row = logits[position - 2]
        assert row[token] >= row.max() - 1e-3


@pytest.mark.parametrize(("mtp", "shares_vocabulary"), [(1, True), (3, False)])
def test_drafts_are_those_of_one_forward_pass(mtp: int, shares_vocabulary: bool) -> None:
    """Through prefill in chunks, tails that move into the tree, and refused drafts."""
    model = _model(mtp_shares_vocabulary=shares_vocabulary)
    running = Run(tiny_engine(model, mtp=mtp, max_step_tokens=33))
    running.submit(request("a", PROMPT, max_tokens=180, ignore_eos=True))
    drafts: list[tuple[int, int]] = []  # (position, token)
    while running.engine.has_work:
        running.step()
        step = running.engine.pending_step
        if step is None or step.drafts is None:
            continue
        assert step.counts is not None
        # The step's first row is the last known token, and some of its drafts are confirmed.
        known = step.rows.sampled[0].sequence.length
        drafts.append((known + int(step.counts[0]), int(step.drafts[0, 0])))
    tokens = PROMPT + running.answer("a").tokens
    logits = _reference_drafts(model, tokens)
    compared = 0
    for position, token in drafts:
        if position - 2 < len(logits):
            row = logits[position - 2]
            assert row[token] >= row.max() - 1e-3
            compared += 1
    assert compared > 170


def test_drafts_are_accepted_when_the_noise_decides() -> None:
    """At a high temperature the noise decides, which is the same for draft and model."""
    engine = tiny_engine(_model(), mtp=1)
    asked = request("a", PROMPT, max_tokens=150, ignore_eos=True, temperature=100.0, seed=1)
    answer = run(engine, asked).answer("a")
    assert_reference_tokens(_model(), asked, answer)
    stats = engine.stats()
    assert stats.accepted > 0.7 * stats.drafted
    assert len(answer.steps) < 100
    assert stats.tokens_generated == 150


@pytest.mark.parametrize("mtp", [1, 3])
def test_answers_after_accepted_and_refused_drafts_are_the_references(mtp: int) -> None:
    """At this temperature both noise and logits matter: a third of the drafts is accepted, and
    wrong KV gives other tokens. Tails move into the tree while drafts are in flight."""
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
        assert_reference_tokens(model, one, together.answer(one.id))


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
        assert_reference_tokens(
            _model(), asked, run(tiny_engine(_model(), mtp=mtp), asked).answer("a")
        )


def test_the_mtp_layer_counts_in_weights_and_kv() -> None:
    with_mtp, without = _model(), tiny_model(num_nextn_predict_layers=0)
    assert with_mtp.kv_bytes_per_token == without.kv_bytes_per_token * 3 // 2
    assert with_mtp.weight_bytes > without.weight_bytes
