"""The engine process and its client: outputs, cancellation, crash and restart."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import tempfile
import textwrap
from collections.abc import AsyncIterator, Callable
from contextlib import aclosing, asynccontextmanager
from pathlib import Path

import fake_engine
import psutil
import pytest

from glmd.engine_client import client as engine_client
from glmd.engine_client.admission import RequestTimeouts
from glmd.engine_client.client import EngineClient
from glmd.engine_client.output_collector import OutputCollector
from glmd.engine_client.process import EngineProcess, EngineProcessConfig
from glmd.errors import EngineUnavailable, InvalidRequest, Overloaded
from glmd.ipc import EngineRequest, SequenceOutput, TokenLogprobs, pack_tokens

pytestmark = pytest.mark.anyio


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


@asynccontextmanager
async def client(model: Path, **config: int | float | str) -> AsyncIterator[EngineClient]:
    client = EngineClient(EngineProcessConfig(model, config, engine="fake_engine"))
    await client.start()
    try:
        yield client
    finally:
        await client.close()


@asynccontextmanager
async def ready_client(model: Path, **config: int | float | str) -> AsyncIterator[EngineClient]:
    async with client(model, **config) as it:
        assert await it.wait_for("ready", "failed") == "ready", it.failure
        yield it


def request(*prompt: int, id: str = "r", n: int = 1, max_tokens: int = 16) -> EngineRequest:
    return EngineRequest(id=id, prompt=pack_tokens(prompt), n=n, max_tokens=max_tokens)


async def collect(client: EngineClient, request: EngineRequest) -> dict[int, list[int]]:
    tokens: dict[int, list[int]] = {}
    async for output in client.generate(request):
        tokens.setdefault(output.index, []).extend(output.tokens)
    return tokens


async def rows_are_free(client: EngineClient) -> None:
    """Wait until the engine reports that nothing runs."""
    async with asyncio.timeout(60):
        while client.stats.running or not client.stats.steps:
            await asyncio.sleep(0.02)


async def test_tokens_arrive_in_order_and_the_last_output_says_why_it_ended(tmp_path: Path) -> None:
    async with ready_client(tmp_path) as it:
        outputs = [output async for output in it.generate(request(5, 6, 7, max_tokens=7))]
    assert [token for output in outputs for token in output.tokens] == [5, 6, 7, 5, 6, 7, 5]
    assert outputs[0].prompt_tokens == 3
    assert [output.finish_reason for output in outputs] == [None] * (len(outputs) - 1) + ["length"]


async def test_requests_and_their_sequences_do_not_mix(tmp_path: Path) -> None:
    async with ready_client(tmp_path) as it:
        answers = await asyncio.gather(
            *(
                collect(it, request(k + 1, k + 2, id=str(k), n=1 + k % 3, max_tokens=4 + k))
                for k in range(20)
            )
        )
        assert it.in_flight == 0
    for k, answer in enumerate(answers):
        expected = [(k + 1, k + 2)[i % 2] for i in range(4 + k)]
        assert answer == dict.fromkeys(range(1 + k % 3), expected)


async def test_closing_the_iterator_frees_the_row(tmp_path: Path) -> None:
    async with ready_client(tmp_path) as it:
        async with aclosing(it.generate(request(1, max_tokens=10**9))) as outputs:
            await anext(outputs)
        await rows_are_free(it)
        assert it.in_flight == 0


async def test_cancelling_the_reader_frees_the_row_before_its_first_token(tmp_path: Path) -> None:
    async with ready_client(tmp_path) as it:
        reader = asyncio.create_task(collect(it, request(fake_engine.SILENT)))
        await collect(it, request(1, id="other"))
        reader.cancel()
        with pytest.raises(asyncio.CancelledError):
            await reader
        await rows_are_free(it)


async def test_a_slow_reader_loses_its_row_even_if_it_never_reads_again(
    tmp_path: Path,
) -> None:
    it = EngineClient(EngineProcessConfig(tmp_path, {}, engine="fake_engine"), buffer_tokens=100)
    await it.start()
    try:
        assert await it.wait_for("ready", "failed") == "ready", it.failure
        async with aclosing(it.generate(request(1, max_tokens=10**9))) as outputs:
            await anext(outputs)
            await rows_are_free(it)
            assert it.in_flight == 1
            with pytest.raises(Overloaded, match="100 tokens are unread"):
                await anext(outputs)
        assert it.in_flight == 0
    finally:
        await it.close()


async def test_cancelling_one_sequence_leaves_the_others_running(tmp_path: Path) -> None:
    async with ready_client(tmp_path, step_seconds=0.001) as it:
        first, second = 0, 0
        async with aclosing(it.generate(request(1, n=2, max_tokens=10**9))) as outputs:
            async for output in outputs:
                if output.index == 0:
                    first += 1
                    it.cancel("r", 0)
                elif first:
                    second += len(output.tokens)
                if second >= 200 and it.stats.running == 1:
                    break
        assert first == 1, "no output after the one at which it was cancelled"


async def test_a_rejected_request_raises_with_its_field(tmp_path: Path) -> None:
    async with ready_client(tmp_path) as it:
        with pytest.raises(InvalidRequest, match="No such thing") as caught:
            await collect(it, request(fake_engine.REFUSE))
        assert caught.value.param == "prompt"
        with pytest.raises(Overloaded):
            await collect(it, request(fake_engine.OVERLOAD))


async def test_a_request_during_loading_is_rejected_with_the_reason(tmp_path: Path) -> None:
    async with client(tmp_path, on_load="wait") as it:
        assert it.state == "loading"
        with pytest.raises(EngineUnavailable, match="loading"):
            await collect(it, request(1))
        (tmp_path / "go").touch()
        await it.wait_for("ready")
        assert await collect(it, request(1, max_tokens=2)) == {0: [1, 1]}


async def test_loading_progress_is_visible(tmp_path: Path) -> None:
    async with client(tmp_path, on_load="wait") as it:
        async with asyncio.timeout(60):
            while it.progress is None or not it.progress.total_bytes:
                await asyncio.sleep(0.01)
        assert (it.progress.done_bytes, it.progress.total_bytes) == (6, 12)


@pytest.mark.parametrize("prompt", [fake_engine.DIE, fake_engine.RAISE])
async def test_a_crash_fails_requests_in_flight_and_restarts_the_engine(
    tmp_path: Path, prompt: int
) -> None:
    async with ready_client(tmp_path) as it:
        first = it.pid
        waiting = asyncio.create_task(collect(it, request(fake_engine.SILENT, id="waiting")))
        await collect(it, request(1, id="before"))
        with pytest.raises(EngineUnavailable):
            await collect(it, request(prompt))
        with pytest.raises(EngineUnavailable):
            await waiting
        assert it.state == "restarting"
        with pytest.raises(EngineUnavailable, match="restarting"):
            await collect(it, request(1, id="meanwhile"))
        assert await it.wait_for("ready", "failed") == "ready"
        assert it.pid != first
        assert it.restarts == 1
        assert await collect(it, request(3, max_tokens=2)) == {0: [3, 3]}


async def test_an_undecodable_message_restarts_the_engine_and_is_logged(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    async with ready_client(tmp_path) as it:
        first = it.pid
        assert first is not None
        with pytest.raises(EngineUnavailable):
            await collect(it, request(fake_engine.UNDECODABLE))
        async with asyncio.timeout(60):
            assert await it.wait_for("ready", "failed") == "ready"
        assert it.restarts == 1
        assert not psutil.pid_exists(first)
        assert "ValidationError" in caplog.text
        assert await collect(it, request(3, max_tokens=2)) == {0: [3, 3]}


async def test_a_refused_checkpoint_is_final_and_reports_the_reason(tmp_path: Path) -> None:
    async with client(tmp_path, on_load="refuse") as it:
        assert await it.wait_for("ready", "failed") == "failed"
        assert it.failure == f"{tmp_path} holds no checkpoint."
        assert it.restarts == 0
        with pytest.raises(EngineUnavailable, match="holds no checkpoint"):
            await collect(it, request(1))


async def test_an_engine_that_crashes_during_loading_is_given_up(tmp_path: Path) -> None:
    async with client(tmp_path, on_load="crash") as it:
        assert await it.wait_for("ready", "failed") == "failed"
        assert it.failure is not None
        assert "exit code 7" in it.failure


async def test_close_leaves_no_process_and_no_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    async with ready_client(tmp_path) as it:
        pid = it.pid
        assert pid is not None
        (folder,) = tmp_path.glob("glmd-*")
        assert folder.stat().st_mode & 0o777 == 0o700
        reader = asyncio.create_task(collect(it, request(fake_engine.SILENT)))
        await collect(it, request(1, id="other"))
    with pytest.raises(EngineUnavailable):
        await reader
    assert not psutil.pid_exists(pid)
    assert not list(tmp_path.glob("glmd-*"))


async def test_a_process_that_was_started_before_the_client_is_used(tmp_path: Path) -> None:
    config = EngineProcessConfig(tmp_path, {}, engine="fake_engine")
    process = EngineProcess.start(config)
    await asyncio.sleep(0.5)  # The process tries to connect before the client listens.
    it = EngineClient(config, process=process)
    await it.start()
    try:
        assert await it.wait_for("ready", "failed") == "ready", it.failure
        assert it.pid == process.pid
        os.kill(process.pid, signal.SIGKILL)
        await it.wait_for("restarting")
        assert await it.wait_for("ready", "failed") == "ready"
        assert it.pid != process.pid
    finally:
        await it.close()
    assert not psutil.pid_exists(process.pid)


async def test_a_process_that_no_client_took_over_can_be_killed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    process = EngineProcess.start(EngineProcessConfig(tmp_path, {}, engine="fake_engine"))
    assert list(tmp_path.glob("glmd-*"))
    process.kill()
    assert not psutil.pid_exists(process.pid)
    assert not list(tmp_path.glob("glmd-*"))
    process.kill()  # Nothing is left to do.


async def test_close_ends_an_engine_that_is_still_loading(tmp_path: Path) -> None:
    async with client(tmp_path, on_load="wait") as it:
        async with asyncio.timeout(60):
            while it.progress is None or not it.progress.total_bytes:
                await asyncio.sleep(0.01)
        pid = it.pid
    assert pid is not None
    assert not psutil.pid_exists(pid)


async def test_the_engine_exits_when_its_parent_is_killed(tmp_path: Path) -> None:
    script = textwrap.dedent(
        """
        import asyncio, sys
        from pathlib import Path
        from glmd.engine_client.client import EngineClient
        from glmd.engine_client.process import EngineProcessConfig

        async def main():
            client = EngineClient(EngineProcessConfig(Path(sys.argv[1]), engine="fake_engine"))
            await client.start()
            await client.wait_for("ready")
            print(client.pid, flush=True)
            await asyncio.Event().wait()

        asyncio.run(main())
        """
    )
    parent = subprocess.Popen(
        [sys.executable, "-c", script, str(tmp_path)],
        stdout=subprocess.PIPE,
        env={**os.environ, "TMPDIR": str(tmp_path)},
    )
    assert parent.stdout is not None
    engine = psutil.Process(int(parent.stdout.readline()))
    assert list(tmp_path.glob("glmd-*"))
    parent.send_signal(signal.SIGKILL)
    parent.wait()
    parent.stdout.close()
    engine.wait(timeout=60)
    assert not list(tmp_path.glob("glmd-*"))


async def test_unread_outputs_are_merged() -> None:
    collector = OutputCollector(n=1, limit=100)
    logprobs = [TokenLogprobs(-0.5, [], [])]
    collector.put(
        SequenceOutput(id="r", tokens=[1], logprobs=logprobs, prompt_tokens=9, cached_tokens=4)
    )
    collector.put(
        SequenceOutput(id="r", tokens=[2, 3], logprobs=2 * logprobs, drafted=2, accepted=1)
    )
    collector.put(
        SequenceOutput(id="r", tokens=[4], logprobs=logprobs, drafted=1, finish_reason="stop")
    )
    (output,) = await collector.get()
    assert output == SequenceOutput(
        id="r",
        tokens=[1, 2, 3, 4],
        logprobs=4 * logprobs,
        prompt_tokens=9,
        cached_tokens=4,
        drafted=3,
        accepted=1,
        finish_reason="stop",
    )
    assert collector.finished


async def test_outputs_before_a_failure_are_read_before_the_error() -> None:
    collector = OutputCollector(n=1, limit=100)
    collector.put(SequenceOutput(id="r", tokens=[1]))
    collector.fail(EngineUnavailable("gone"))
    collector.put(SequenceOutput(id="r", tokens=[2]))
    assert [output.tokens for output in await collector.get()] == [[1]]
    with pytest.raises(EngineUnavailable):
        await collector.get()


async def test_a_slow_reader_gets_an_error_at_the_limit() -> None:
    collector = OutputCollector(n=1, limit=100)
    for _ in range(101):
        collector.put(SequenceOutput(id="r", tokens=[1]))
    with pytest.raises(Overloaded, match="100 tokens are unread"):
        await collector.get()


async def test_an_answer_whose_last_output_exceeds_the_limit_is_delivered_whole() -> None:
    collector = OutputCollector(n=2, limit=100)
    collector.put(SequenceOutput(id="r", index=0, tokens=[1] * 40, finish_reason="stop"))
    collector.put(SequenceOutput(id="r", index=1, tokens=[2] * 60))
    collector.put(SequenceOutput(id="r", index=1, tokens=[3, 4], finish_reason="length"))
    assert not collector.failed
    first, second = await collector.get()
    assert (first.tokens, first.finish_reason) == ([1] * 40, "stop")
    assert (second.tokens, second.finish_reason) == ([2] * 60 + [3, 4], "length")
    assert collector.finished


async def test_tokens_of_a_dropped_sequence_do_not_count_towards_the_limit() -> None:
    collector = OutputCollector(n=2, limit=100)
    collector.put(SequenceOutput(id="r", index=0, tokens=[1] * 90))
    assert collector.end(0)
    collector.put(SequenceOutput(id="r", index=1, tokens=[2] * 90))
    (output,) = await collector.get()
    assert output.tokens == [2] * 90


@asynccontextmanager
async def unloading_client(model: Path, seconds: float = 0.2) -> AsyncIterator[EngineClient]:
    config = EngineProcessConfig(model, {}, engine="fake_engine")
    client = EngineClient(config, idle_unload=seconds)
    await client.start()
    try:
        async with asyncio.timeout(120):
            yield client
    finally:
        await client.close()


async def test_an_idle_engine_ends_and_the_next_requests_start_it_once(tmp_path: Path) -> None:
    async with unloading_client(tmp_path) as it:
        for _ in range(2):
            await it.wait_for("unloaded")
            async with asyncio.timeout(60):
                while it.pid is not None:
                    await asyncio.sleep(0.02)
            assert it.accepts_requests
            answers = await asyncio.gather(
                *(collect(it, request(k + 1, id=str(k), max_tokens=2)) for k in range(4))
            )
            assert answers == [{0: [k + 1, k + 1]} for k in range(4)]
        assert (it.restarts, it.failure) == (0, None)


async def test_a_request_in_the_moment_of_unloading_is_answered(tmp_path: Path) -> None:
    async with unloading_client(tmp_path) as it:
        for _ in range(3):
            await it.wait_for("unloaded")
            assert it.pid is not None, "the process has not been stopped yet"
            assert await collect(it, request(7, max_tokens=2)) == {0: [7, 7]}
        assert (it.restarts, it.failure) == (0, None)


async def test_an_engine_with_a_request_is_not_unloaded(tmp_path: Path) -> None:
    async with unloading_client(tmp_path, 0.1) as it:
        await it.wait_for("unloaded")
        async with aclosing(it.generate(request(1, max_tokens=10**9))) as outputs:
            await anext(outputs)
            await asyncio.sleep(0.5)
            assert it.state != "unloaded"
            await anext(outputs)
        assert await it.wait_for("unloaded") == "unloaded"


async def test_a_request_that_waits_for_the_engine_can_time_out_or_be_closed(
    tmp_path: Path,
) -> None:
    async with unloading_client(tmp_path) as it:
        await it.wait_for("unloaded")
        now = asyncio.get_running_loop().time()
        timeouts = RequestTimeouts(now, queue=0.001)
        with pytest.raises(Overloaded, match="Queue timeout"):
            async for _ in it.generate(request(1), timeouts):
                pass
        assert await collect(it, request(2, max_tokens=1)) == {0: [2]}


async def test_an_unloaded_engine_that_cannot_start_again_is_an_error(tmp_path: Path) -> None:
    async with unloading_client(tmp_path) as it:
        await it.wait_for("unloaded")
        it._config = EngineProcessConfig(tmp_path, {}, engine="no_such_engine")
        with pytest.raises(EngineUnavailable):
            await collect(it, request(1))


async def test_an_engine_that_was_stopped_is_noticed_and_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(engine_client, "PING_INTERVAL", 0.05)
    monkeypatch.setattr(engine_client, "STALLED_AFTER", 0.3)
    async with ready_client(tmp_path) as it:
        assert it.pid is not None
        os.kill(it.pid, signal.SIGSTOP)
        answer = asyncio.create_task(collect(it, request(5)))
        await until(lambda: it.condition == "stalled")
        os.kill(it.pid, signal.SIGCONT)
        await until(lambda: it.condition == "ready")
        assert (await answer)[0] == [5] * 16
        assert it.restarts == 0


@pytest.mark.parametrize("at", ["work", "start"])
async def test_an_engine_that_hangs_is_restarted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, at: str
) -> None:
    monkeypatch.setattr(engine_client, "PING_INTERVAL", 0.05)
    monkeypatch.setattr(engine_client, "STALLED_AFTER", 0.3)
    monkeypatch.setattr(engine_client, "LOADING_FACTOR", 1 if at == "start" else 100)
    config = EngineProcessConfig(tmp_path, {}, engine="fake_engine")
    it = EngineClient(config, hang_timeout=3.0)
    await it.start()
    try:
        if at == "work":
            await it.wait_for("ready")
        await until(lambda: it.pid is not None)
        first = it.pid
        assert first is not None
        os.kill(first, signal.SIGSTOP)
        if at == "work":
            with pytest.raises(EngineUnavailable, match="stopped while"):
                await collect(it, request(5))
            assert it.failure is not None
            assert "did not answer for" in it.failure
        await until(lambda: it.pid not in (None, first))
        monkeypatch.setattr(engine_client, "LOADING_FACTOR", 100)
        await it.wait_for("ready")
        assert (await collect(it, request(5, id="again")))[0] == [5] * 16
    finally:
        await it.close()


async def test_an_engine_may_be_stopped_by_a_debugger_and_a_long_step_is_no_hang(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(engine_client, "PING_INTERVAL", 0.05)
    monkeypatch.setattr(engine_client, "STALLED_AFTER", 0.1)
    config = EngineProcessConfig(tmp_path, {"step_seconds": 0.5}, engine="fake_engine")
    it = EngineClient(config, hang_timeout=0)
    await it.start()
    try:
        await it.wait_for("ready")
        assert len((await collect(it, request(5, max_tokens=3)))[0]) == 3
        assert it.restarts == 0
    finally:
        await it.close()


async def until(happened: Callable[[], bool]) -> None:
    async with asyncio.timeout(60):
        while not happened():
            await asyncio.sleep(0.02)
