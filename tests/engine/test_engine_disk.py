"""The disk tier: what was computed is found again after an eviction, a restart or a crash."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from concurrent.futures import Future, wait
from pathlib import Path
from typing import Any

import hypothesis.strategies as st
import numpy as np
import pytest
from engines import (
    Run,
    assert_idle,
    assert_reference_tokens,
    fresh_folder,
    request,
    run,
    tiny_engine,
    tiny_model,
)
from hypothesis import given, settings

from glmd.engine.config import EngineConfig
from glmd.engine.core import Engine
from glmd.engine.scheduler.disk_tier import DiskTier
from glmd.errors import SettingsError
from glmd.kv_cache.disk_cache import HostArrays
from glmd.kv_cache.disk_file import StoredSegment
from glmd.kv_cache.stored_keys import QuantizedKeys
from glmd.model.loader import LoadedModel

LONG = np.random.default_rng(0).integers(0, 500, 1200).tolist()
OTHER = np.random.default_rng(1).integers(0, 500, 1200).tolist()


@pytest.fixture(params=[0, 1], ids=["plain", "mtp"])
def model(request: pytest.FixtureRequest) -> LoadedModel:
    return tiny_model(num_nextn_predict_layers=request.param)


def disk_engine(folder: Path, model: LoadedModel | None = None, **options: Any) -> Engine:
    return tiny_engine(model, disk_cache=1 << 30, disk_cache_folder=str(folder), **options)


def tier(engine: Engine) -> DiskTier:
    assert engine.scheduler.disk is not None
    return engine.scheduler.disk


def test_a_restarted_engine_computes_only_what_is_new(tmp_path: Path, model: LoadedModel) -> None:
    first = disk_engine(tmp_path, model)
    asked = request("a", LONG, max_tokens=20, ignore_eos=True)
    answer = run(first, asked).answer("a")
    first.close()
    second = disk_engine(tmp_path, model)
    again = run(second, asked).answer("a")
    assert again.tokens == answer.tokens
    assert (again.cached_tokens, second.stats().prompt_tokens_computed) == (len(LONG) - 1, 1)
    longer = request("b", [*LONG, *answer.tokens, 1, 2, 3], max_tokens=5)
    third = run(second, longer)
    assert third.answer("b").cached_tokens >= len(LONG) + 18
    assert_reference_tokens(model, longer, third.answer("b"))
    assert_idle(second)
    stats = second.stats()
    assert stats.disk_hits == 1
    assert stats.disk_restored_tokens == len(LONG) - 1
    # Without the MTP layer's KV, which may be deferred.
    layer_bytes = model.kv_bytes_per_token // model.kv_layers
    layers = model.args.num_hidden_layers
    assert stats.disk_read_bytes >= (len(LONG) - 1) * layers * layer_bytes
    second.close()


def test_quantised_segments_are_restored_to_their_own_bits(tmp_path: Path) -> None:
    model = tiny_model(num_nextn_predict_layers=1)
    asked = request("a", LONG, max_tokens=20, ignore_eos=True, temperature=2.0, seed=1)
    first = disk_engine(tmp_path, model, kv_bits=8)
    answer = run(first, asked).answer("a")
    first.close()
    written = tier(first).cache.written_bytes
    assert written < 1.2 * (len(LONG) + 20) * first.info.kv_bytes_per_token
    second = disk_engine(tmp_path, model, kv_bits=8)
    again = run(second, asked).answer("a")
    assert (again.tokens, again.cached_tokens) == (answer.tokens, len(LONG) - 1)
    assert second.stats().prompt_tokens_computed == 1
    for node in second.scheduler.tree.nodes():
        assert node.kv is not None
        assert all(isinstance(layer, QuantizedKeys) for layer in node.kv.layers)
    assert_idle(second)
    second.close()
    third = disk_engine(tmp_path, model, kv_bits=16)
    assert run(third, asked).answer("a").cached_tokens == 0
    third.close()


def test_the_files_of_an_engine_that_died_when_idle_are_complete(tmp_path: Path) -> None:
    """Sealed segments are written when no request runs, not only at the end."""
    first = disk_engine(tmp_path)
    run(first, request("a", LONG, max_tokens=20, ignore_eos=True))
    tier(first).cache.close(60)  # Waits for the writer; the engine saves nothing more.
    second = disk_engine(tmp_path)
    assert run(second, request("b", LONG, max_tokens=2)).answer("b").cached_tokens == len(LONG) - 1
    second.close()


def test_long_prefixes_are_saved_while_their_sequence_runs(tmp_path: Path) -> None:
    engine = disk_engine(tmp_path)
    running = Run(engine)
    running.submit(request("a", LONG, max_tokens=500, ignore_eos=True))
    while not (saves := tier(engine)._saves):
        running.step()
    saves[0].done.result()
    assert engine.stats().running == 1
    assert engine.stats().disk_written_bytes >= len(LONG[:-1]) * engine.info.kv_bytes_per_token
    engine.cancel("a")
    running.finish()
    engine.close()


def test_conversations_beyond_the_memory_are_computed_once(tmp_path: Path) -> None:
    """In turn, with memory for three of fifteen: nothing is computed or written twice."""
    model = tiny_model(max_position_embeddings=512)
    engine = disk_engine(tmp_path, model, kv_tokens=1300, max_step_tokens=128)
    conversations = [
        np.random.default_rng(number).integers(0, 500, 300).tolist() for number in range(15)
    ]
    for turn in range(3):
        for number, tokens in enumerate(conversations):
            running = Run(engine)
            id = f"{turn}.{number}"
            running.submit(request(id, tokens, max_tokens=8, ignore_eos=True))
            while engine.has_work:
                running.step()
                assert engine.scheduler.kv_bytes <= engine.scheduler.kv_budget
            wait([save.done for save in tier(engine)._saves])
            answer = running.answer(id)
            if turn:
                assert answer.cached_tokens >= len(tokens) - 25
            tokens += [*answer.tokens, *range(20)]
    stats = engine.stats()
    least = sum(len(tokens) for tokens in conversations) - 15 * (8 + 20)
    assert stats.evicted_tokens > least
    assert stats.prompt_tokens_computed <= 1.1 * least
    engine.close()
    distinct = (least + 15 * 8) * engine.info.kv_bytes_per_token
    assert tier(engine).cache.written_bytes <= 1.2 * distinct


class HeldReads:
    """Reads of a cache that are held back until `release`."""

    def __init__(self, engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
        cache = tier(engine).cache
        self.read = cache.read
        self.held: list[tuple[StoredSegment, Future[HostArrays | None]]] = []
        monkeypatch.setattr(cache, "read", self._hold)

    def _hold(self, stored: StoredSegment) -> Future[HostArrays | None]:
        future: Future[HostArrays | None] = Future()
        self.held.append((stored, future))
        return future

    def release(self) -> None:
        for stored, future in self.held:
            if future.set_running_or_notify_cancel():
                future.set_result(self.read(stored).result())
        self.held.clear()


@pytest.fixture
def restarted(tmp_path: Path) -> Iterator[Engine]:
    """An engine with `LONG` on disk only."""
    first = disk_engine(tmp_path)
    run(first, request("a", LONG, max_tokens=2))
    first.close()
    second = disk_engine(tmp_path)
    yield second
    second.close()


def test_no_step_waits_for_the_disk(restarted: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    """While files are read, streams get a token in each step, and other prompts are computed."""
    reads = HeldReads(restarted, monkeypatch)
    running = Run(restarted)
    running.submit(request("stream", OTHER[:20], max_tokens=200, ignore_eos=True))
    while not running.answers:
        running.step()
    running.submit(request("restored", LONG, max_tokens=4))
    running.submit(request("computed", OTHER[100:500], max_tokens=4, ignore_eos=True))
    before = len(running.answer("stream").tokens)
    for _ in range(40):
        running.step()
    assert len(running.answer("stream").tokens) == before + 40
    assert running.answer("computed").finish == "length"
    assert not running.answer("restored").tokens
    assert reads.held
    while not running.answer("restored").finish:
        reads.release()
        running.step()
    assert running.answer("restored").cached_tokens == len(LONG) - 1
    assert running.answer("stream").finish is None
    restarted.cancel("stream")
    running.finish()
    assert_idle(restarted)


def test_requests_for_one_prefix_read_it_once(
    restarted: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    reads = HeldReads(restarted, monkeypatch)
    running = Run(restarted)
    running.submit(*(request(str(n), LONG[: 950 + 50 * n], max_tokens=3) for n in range(4)))
    names: set[str] = set()
    while restarted.has_work:
        assert names.isdisjoint(stored.name for stored, _ in reads.held)
        names |= {stored.name for stored, _ in reads.held}
        reads.release()
        running.step()
    assert [running.answer(str(n)).cached_tokens for n in range(4)] == [949, 999, 1049, 1099]
    assert len(names) == 2
    assert_idle(restarted)


class LateRead(Future[HostArrays | None]):
    """A read that ends right after the engine first asked for it."""

    asked = 0

    def done(self) -> bool:
        self.asked += 1
        return self.asked > 1


def test_a_prefix_that_several_wait_for_is_in_memory_once(
    restarted: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also if its file has been read between the looks of two of them."""
    cache = tier(restarted).cache

    def read(stored: StoredSegment) -> LateRead:
        late = LateRead()
        late.set_result(cache._read(stored))
        return late

    monkeypatch.setattr(cache, "read", read)
    running = Run(restarted)
    running.submit(*(request(str(n), LONG, max_tokens=3) for n in range(3)))
    held: list[int] = []
    while not held or held[-1]:
        running.step()
        held.append(tier(restarted).held_bytes)
        assert restarted.scheduler.tree.nbytes + held[-1] <= cache.index.nbytes
    assert max(held) > 0
    running.finish()
    assert_idle(restarted)


def test_a_request_that_ends_while_it_is_restored_leaves_nothing(
    restarted: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    reads = HeldReads(restarted, monkeypatch)
    running = Run(restarted)
    running.submit(request("a", LONG, max_tokens=3), request("b", LONG, max_tokens=3))
    running.step()
    assert len(reads.held) == 2
    restarted.cancel("a")
    while restarted.has_work:
        running.step()
        reads.release()
    assert running.answer("a").finish == "cancelled"
    assert running.answer("b").cached_tokens == len(LONG) - 1
    assert tier(restarted).held_bytes == 0
    assert_idle(restarted)


@pytest.mark.parametrize("change", ["cut", "flip", "gone"])
def test_a_file_that_is_damaged_meanwhile_is_computed_instead(
    tmp_path: Path, restarted: Engine, change: str
) -> None:
    (largest, *_) = sorted(tmp_path.glob("*.safetensors"), key=lambda file: -file.stat().st_size)
    content = bytearray(largest.read_bytes())
    content[-5] ^= 1
    if change == "gone":
        largest.unlink()
    else:
        largest.write_bytes(content if change == "flip" else content[:-1])
    asked = request("a", LONG, max_tokens=6, ignore_eos=True)
    answer = run(restarted, asked).answer("a")
    assert_reference_tokens(tiny_model(), asked, answer)
    assert answer.cached_tokens < len(LONG) - 1
    assert_idle(restarted)


def test_salts_share_nothing_on_disk(restarted: Engine) -> None:
    answers = run(restarted, request("a", LONG, max_tokens=2, cache_salt="mine"))
    assert answers.answer("a").cached_tokens == 0


def test_another_model_or_dtype_finds_nothing(tmp_path: Path) -> None:
    first = disk_engine(tmp_path)
    run(first, request("a", LONG, max_tokens=2))
    first.close()
    second = disk_engine(tmp_path, tiny_model(num_hidden_layers=3))
    assert second.stats().disk_segments == 0
    assert run(second, request("b", LONG, max_tokens=2)).answer("b").cached_tokens == 0
    second.close()


def test_a_second_engine_on_one_folder_runs_without_it(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    first = disk_engine(tmp_path)
    second = disk_engine(tmp_path)
    assert "another server uses its folder" in caplog.text
    assert second.scheduler.disk is None
    assert run(second, request("b", LONG[:50], max_tokens=2)).answer("b").finish
    second.close()
    first.close()


def test_without_the_setting_nothing_is_written() -> None:
    assert EngineConfig().disk_cache == 0
    assert tiny_engine().scheduler.disk is None
    with pytest.raises(SettingsError, match="disk_cache_folder"):
        EngineConfig(disk_cache=1)


@settings(max_examples=8, deadline=None)
@given(st.data())
def test_any_sequence_of_requests_and_restarts_gives_the_reference_tokens(
    data: st.DataObject,
) -> None:
    """With little memory, so that prefixes move between memory and disk."""
    mtp = data.draw(st.sampled_from([0, 1]))
    model = tiny_model(num_nextn_predict_layers=mtp, max_position_embeddings=512)
    folder = fresh_folder()
    known: list[list[int]] = [[]]
    engine = disk_engine(folder, model, kv_tokens=800, max_step_tokens=64)
    ids = itertools.count()
    for _ in range(data.draw(st.integers(2, 4))):
        asked = []
        for _ in range(data.draw(st.integers(1, 3))):
            before = data.draw(st.sampled_from(known))
            kept = data.draw(st.integers(0, len(before)))
            seed = data.draw(st.integers(0, 3))
            more = np.random.default_rng(seed).integers(0, 9, 1 + 40 * seed).tolist()
            tokens = (before[:kept] + more)[:250]
            asked.append(request(str(next(ids)), tokens, max_tokens=12, ignore_eos=True))
            known.append(tokens)
        running = Run(engine)
        running.submit(*asked)
        if data.draw(st.booleans()):
            for _ in range(data.draw(st.integers(1, 6))):
                running.step()
            engine.cancel(asked[0].id)
        while engine.has_work:
            running.step()
            assert engine.scheduler.kv_bytes <= engine.scheduler.kv_budget
        for one in asked:
            assert_reference_tokens(model, one, running.answer(one.id))
        assert_idle(engine)
        if data.draw(st.booleans()):
            engine.close()
            engine = disk_engine(folder, model, kv_tokens=800, max_step_tokens=64)
    engine.close()
