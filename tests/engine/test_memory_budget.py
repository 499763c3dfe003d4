"""The memory budget: checked before loading, kept, restored, and recovered from."""

from __future__ import annotations

import gc
import subprocess
import sys
from pathlib import Path
from typing import Any, Literal

import mlx.core as mx
import numpy as np
import pytest
from engines import (
    assert_complete,
    assert_idle,
    assert_reference_tokens,
    refuse_memory,
    request,
    run,
    tiny_engine,
    tiny_model,
)
from paths import TESTS

from glmd.bench.random_checkpoint import write_random_checkpoint
from glmd.checkpoint.config import load_config
from glmd.checkpoint.hub import DEMO
from glmd.checkpoint.stored import read_weights
from glmd.convert.inspect import inspect
from glmd.engine import memory
from glmd.engine.config import EngineConfig
from glmd.engine.core import Engine, load_engine
from glmd.engine.model_runner import ModelRunner
from glmd.errors import CheckpointError
from glmd.model.loader import load_model, weight_bytes

PROMPTS = [np.random.default_rng(i).integers(3, 500, 300).tolist() for i in range(4)]


@pytest.mark.parametrize("mtp", [True, False])
@pytest.mark.parametrize("kind", ["demo", "published", "own vocabulary"])
def test_the_size_of_the_weights_is_known_before_they_are_loaded(
    kind: str, mtp: bool, tmp_path: Path
) -> None:
    folder = DEMO
    if kind != "demo":
        folder = tmp_path / "random"
        shares = kind == "published"
        write_random_checkpoint(
            folder, num_nextn_predict_layers=1, mtp_shares_vocabulary=shares, num_hidden_layers=2
        )
    expected = weight_bytes(read_weights(folder, load_config(folder)), mx.float32, mtp=mtp)
    loaded = load_model(folder, "float32", lambda done, total: None, mtp=mtp)
    if kind == "own vocabulary" and mtp:
        # Only the loaded weights show that they are no copies.
        args = loaded.args
        expected += 2 * args.vocab_size * args.hidden_size * 4
    assert loaded.weight_bytes == expected


def test_a_model_that_does_not_fit_is_refused_before_loading_with_the_sum() -> None:
    loaded: list[int] = []
    config = EngineConfig(memory_budget=20 << 20)
    with pytest.raises(CheckpointError) as caught:
        load_engine(DEMO, config, lambda done, total: loaded.append(done))
    assert not loaded
    words = caught.value.message
    for part in ("Weights ", " + working memory ", " + KV of 4352 tokens ", "20.00 MiB"):
        assert part in words
    mebibytes = [float(word) for word in words.split() if word.replace(".", "").isdigit()]
    weights, working, _, kv, total, budget = mebibytes
    assert weights + working + kv == pytest.approx(total, abs=0.02)
    assert total > budget == 20


def plan_mac(gigabytes: int, config: EngineConfig) -> memory.MemoryPlan:
    """Plan GLM-4.7-Flash in mixed 8/5 bit on a Mac."""
    file = TESTS / "fixtures" / "glm-4.7-flash" / "config.json"
    found = inspect(file)
    assert found.mtp is not None
    return memory.plan_memory(
        file,
        load_config(file),
        config,
        memory.recommended_working_set(gigabytes),
        weights=found.main.nbytes,
        mtp_weights=found.mtp.nbytes,
        item=2,
    )


def test_a_large_mac_gives_up_nothing() -> None:
    plan = plan_mac(48, EngineConfig())
    assert plan.config == EngineConfig()
    assert plan.kv_bits == 16
    assert plan_mac(48, EngineConfig(mtp=1)).token_bytes == 54_144 + 1_152


def test_quantised_kv_comes_first_where_memory_is_short() -> None:
    plan = plan_mac(36, EngineConfig())
    assert plan.kv_bits == 8
    assert plan.token_bytes <= 29_400
    assert plan.config.mtp == "auto"
    assert plan.kv_tokens >= 100_000
    assert plan_mac(36, EngineConfig(kv_bits=16)).kv_tokens < 65_536
    assert plan_mac(36, EngineConfig(kv_bits=4)).token_bytes <= 16_400


def test_the_mtp_layer_is_left_out_where_memory_is_very_short() -> None:
    plan = plan_mac(32, EngineConfig())
    assert plan.config.mtp == 0
    assert plan.kv_tokens >= 36_000
    assert plan.config.max_step_tokens >= 512
    asked = plan_mac(32, EngineConfig(mtp=1))
    assert asked.config.mtp == 1
    assert asked.weights > plan.weights
    with pytest.raises(CheckpointError, match="does not fit"):
        plan_mac(24, EngineConfig())


@pytest.mark.parametrize("gigabytes", [32, 36, 48, 128])
@pytest.mark.parametrize("kv_bits", ["auto", 16, 8, 4])
def test_a_plan_divides_the_budget(gigabytes: int, kv_bits: Literal["auto", 16, 8, 4]) -> None:
    plan = plan_mac(gigabytes, EngineConfig(kv_bits=kv_bits))
    total = plan.weights + plan.activations + plan.kv
    assert total == memory.recommended_working_set(gigabytes)
    assert 1024 < plan.max_segment <= plan.activations // plan.token_bytes


def test_an_engine_with_little_memory_takes_smaller_chunks_and_answers_the_same() -> None:
    model = tiny_model(max_position_embeddings=2000)
    engine = tiny_engine(model, kv_tokens=2000 + 256 - 100)
    assert engine.config.max_step_tokens == EngineConfig().max_step_tokens // 2
    prompt = np.random.default_rng(7).integers(3, 500, 1500).tolist()
    asked = request("long", prompt, max_tokens=5, prompt_progress=True)
    answer = run(engine, asked).answer("long")
    assert answer.progress[0] == engine.config.max_step_tokens
    assert_reference_tokens(model, asked, answer)


def test_a_chunk_shrinks_to_the_room_that_is_left() -> None:
    model = tiny_model(max_position_embeddings=700)
    engine = tiny_engine(model, kv_tokens=700 + 256)
    prompt = np.random.default_rng(9).integers(3, 500, 650).tolist()
    asked = [
        request("long", prompt, max_tokens=40, ignore_eos=True),
        request("other", PROMPTS[1], max_tokens=200, ignore_eos=True, prompt_progress=True),
        request("third", PROMPTS[2], max_tokens=200, ignore_eos=True, priority=1),
    ]
    running = run(engine, *asked)
    for one in asked:
        assert_complete(model, one, running.answer(one.id), 700)
        assert_reference_tokens(model, one, running.answer(one.id))
    assert_idle(engine)


def test_the_peak_of_a_mixed_load_stays_within_the_budget() -> None:
    model = tiny_model(max_position_embeddings=1000, num_nextn_predict_layers=1)
    settings = EngineConfig(max_running=8, max_step_tokens=256, mtp=1)
    least = (
        memory.activation_bytes(model.args, settings, model.dtype.size, model.kv_bytes_per_token)
        + 1400 * model.kv_bytes_per_token
    )
    gc.collect()
    mx.synchronize()
    before = mx.get_active_memory()
    engine = Engine(model, settings, model.weight_bytes + least)
    mx.reset_peak_memory()
    fields: list[dict[str, Any]] = [{}, {"logprobs": 5}, {"temperature": 2.0, "top_p": 0.9}]
    prompts = [np.random.default_rng(i).integers(3, 500, 60 * i).tolist() for i in range(1, 9)]
    asked = [
        request(f"{i}", prompt, max_tokens=60, ignore_eos=True, **fields[i % 3])
        for i, prompt in enumerate(prompts)
    ]
    run(engine, *asked)
    assert mx.get_peak_memory() - before <= least


LIMITS = """
import gc, sys
import mlx.core as mx
from glmd.errors import CheckpointError
from glmd.llm import LLM

def limits():  # can only be read by being set
    memory, cache = mx.set_memory_limit(1 << 40), mx.set_cache_limit(1 << 20)
    mx.set_memory_limit(memory), mx.set_cache_limit(cache)
    return memory, cache

before, budget = limits(), 1 << 30
first = LLM(memory_budget=budget)
assert limits() == (budget, budget)
second = LLM(memory_budget=2 * budget)
first.close()
first.close()
assert limits() == (2 * budget, 2 * budget)
del second  # A user may never call close.
gc.collect()
assert limits() == before
try:
    LLM(memory_budget=1 << 20)
except CheckpointError:
    assert limits() == before
else:
    sys.exit("it fits")
"""


def test_mlxs_limits_are_restored_with_the_end_of_the_last_engine() -> None:
    """In its own process, since other tests' engines may exist in this one."""
    subprocess.run([sys.executable, "-c", LIMITS], check=True)


def test_running_out_of_memory_twice_changes_no_answer() -> None:
    model = tiny_model(num_nextn_predict_layers=1)
    fields: list[dict[str, Any]] = [
        {"temperature": 1.0},
        {"frequency_penalty": 0.4, "logprobs": 2},
        {"thinking_budget": 9, "thinking_close": (90, 91)},
        {"temperature": 8.0},
    ]
    asked = [
        request(str(i), PROMPTS[i], max_tokens=40, ignore_eos=True, seed=i, **fields[i])
        for i in range(4)
    ]
    for late in (False, True):
        engine = tiny_engine(model, mtp=2, max_step_tokens=200)
        refuse_memory(engine, {2, 17}, late=late)
        running = run(engine, *asked)
        assert engine.stats().out_of_memory == 2
        assert engine.scheduler.max_running == 1
        for one in asked:
            assert_complete(model, one, running.answer(one.id), 2000)
            assert_reference_tokens(model, one, running.answer(one.id))
        assert_idle(engine)


def test_a_request_that_fails_alone_is_dropped_and_others_are_served() -> None:
    model = tiny_model()
    engine = tiny_engine(model, max_step_tokens=400)
    refuse_memory(engine, {3, 6, 9}, late=True)
    asked = [request(str(i), PROMPTS[i], max_tokens=300, ignore_eos=True) for i in range(3)]
    running = run(engine, *asked)
    failed = [one for one in asked if running.answer(one.id).finish == "error"]
    assert len(failed) == 1
    assert "no memory" in (running.answer(failed[0].id).error or "")
    for one in asked:
        assert_reference_tokens(model, one, running.answer(one.id))
    assert engine.scheduler.max_running == EngineConfig().max_running
    assert_idle(engine)


def test_other_errors_are_raised(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = tiny_engine()

    def fail(*_: object) -> None:
        raise RuntimeError("[matmul] Last dimension of first input does not match.")

    monkeypatch.setattr(ModelRunner, "execute", fail)
    engine.submit(request("a", [1, 2, 3]))
    with pytest.raises(RuntimeError, match="matmul"):
        engine.step()
