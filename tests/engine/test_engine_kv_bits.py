"""Quantised KV: the same answers alone, in a batch, from the cache, after preemption, drafted."""

from __future__ import annotations

import numpy as np
import pytest
from engines import assert_idle, request, run, tiny_engine, tiny_model

from glmd.ipc import EngineRequest
from glmd.kv_cache.stored_keys import KVBits, QuantizedKeys

PROMPTS = [np.random.default_rng(i).integers(3, 500, 150 + 40 * i).tolist() for i in range(4)]


def _asked(index: int) -> EngineRequest:
    return request(
        str(index), PROMPTS[index], max_tokens=60, ignore_eos=True, temperature=2.0, seed=index
    )


def _alone(kv_bits: KVBits) -> list[list[int]]:
    """The answers of engines that serve one request."""
    model = tiny_model(max_position_embeddings=400, num_nextn_predict_layers=1)
    answers = []
    for index in range(len(PROMPTS)):
        engine = tiny_engine(model, kv_bits=kv_bits, mtp=0)
        answers.append(run(engine, _asked(index)).answer(str(index)).tokens)
    return answers


@pytest.mark.parametrize("kv_bits", [8, 4])
def test_batch_cache_preemption_and_drafts_change_no_answer(kv_bits: KVBits) -> None:
    model = tiny_model(max_position_embeddings=400, num_nextn_predict_layers=1)
    expected = _alone(kv_bits)
    asked = [_asked(i) for i in range(len(PROMPTS))]
    for mtp, kv_tokens in ((0, 400 + 256), (2, 400 + 256), (2, 10_000)):
        engine = tiny_engine(
            model, kv_bits=kv_bits, mtp=mtp, kv_tokens=kv_tokens, max_step_tokens=100
        )
        for _ in range(2):
            running = run(engine, *asked)
            assert [running.answer(one.id).tokens for one in asked] == expected
        stats = engine.stats()
        if kv_tokens < 1000:
            assert stats.preemptions
        else:
            assert stats.prompt_tokens_cached
        assert bool(stats.drafted) == bool(mtp)
        assert_idle(engine)


@pytest.mark.parametrize("kv_bits", [8, 4])
def test_no_vector_is_kept_in_full_precision(kv_bits: KVBits) -> None:
    engine = tiny_engine(kv_bits=kv_bits)
    run(engine, _asked(0))
    tree = engine.scheduler.tree
    for node in tree.nodes():
        assert node.kv is not None
        assert all(isinstance(layer, QuantizedKeys) for layer in node.kv.layers)
    assert tree.nbytes == tree.tokens * engine.info.kv_bytes_per_token
    assert engine.info.kv_bits == kv_bits
