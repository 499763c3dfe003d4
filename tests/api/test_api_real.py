"""The API over the real engine, on a tiny checkpoint of random weights.

The answers are noise; reproducibility, counts, freed rows and restarts do not depend on them.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest
import sse
from live import LiveServer, live_server, serving

from glmd.ipc import EngineStats

MESSAGES = [{"role": "user", "content": "What is a random weight?"}]


@pytest.fixture(scope="module")
def real(random_checkpoint: Path) -> Iterator[LiveServer]:
    with live_server(folder=random_checkpoint, engine="glmd.engine.core") as live:
        yield live


@pytest.fixture
def http(real: LiveServer) -> Iterator[httpx.Client]:
    with real.client() as client:
        yield client


def ask(http: httpx.Client, **parameters: Any) -> dict[str, Any]:
    body = {"messages": MESSAGES, "max_tokens": 20, "ignore_eos": True, **parameters}
    response = http.post("/v1/chat/completions", json=body)
    assert response.status_code == 200, response.text
    answer: dict[str, Any] = response.json()
    return answer


def test_a_seed_gives_the_same_answer_alone_and_in_a_batch(http: httpx.Client) -> None:
    alone = ask(http, seed=7, temperature=1.0)["choices"][0]["message"]
    with ThreadPoolExecutor(8) as pool:
        seeds = [7, 1, 2, 7, 3, 4, 5, 7]
        crowd = list(pool.map(lambda seed: ask(http, seed=seed, temperature=1.0), seeds))
    answers = [answer["choices"][0]["message"] for answer in crowd]
    assert [answers[index] for index in (0, 3, 7)] == [alone] * 3
    assert len({json.dumps(answer) for answer in answers}) == 6


def test_a_stream_adds_up_to_the_whole_answer(http: httpx.Client) -> None:
    body = {"messages": MESSAGES, "max_tokens": 30, "temperature": 0, "stream": True}
    body["stream_options"] = {"include_usage": True}
    with http.stream("POST", "/v1/chat/completions", json=body) as response:
        *chunks, last = sse.read(response.read()).chunks
    whole = ask(http, max_tokens=30, temperature=0, ignore_eos=False)
    for field in ("content", "reasoning_content"):
        streamed = "".join(chunk["choices"][0]["delta"].get(field) or "" for chunk in chunks)
        assert streamed == (whole["choices"][0]["message"].get(field) or "")
    for count in ("prompt_tokens", "completion_tokens"):
        assert last["usage"][count] == whole["usage"][count]


def test_a_prompt_sent_again_is_cached_but_for_its_last_token(http: httpx.Client) -> None:
    messages = [{"role": "user", "content": "Something not said before."}]
    first, second = (ask(http, messages=messages)["usage"] for _ in range(2))
    assert second["prompt_tokens_details"]["cached_tokens"] == second["prompt_tokens"] - 1
    assert first["prompt_tokens_details"]["cached_tokens"] < second["prompt_tokens"] - 1


def test_logprobs_are_sorted_and_cover_every_token(http: httpx.Client) -> None:
    answer = ask(http, logprobs=True, top_logprobs=5, enable_thinking=False, temperature=0)
    tokens = answer["choices"][0]["logprobs"]["content"]
    tokens += answer["choices"][0]["logprobs"].get("reasoning_content") or []
    assert 0 < len(tokens) <= 20
    for token in tokens:
        tops = [top["logprob"] for top in token["top_logprobs"]]
        assert tops == sorted(tops, reverse=True)
        assert token["logprob"] == pytest.approx(tops[0], abs=1e-4)


def test_the_reasoning_ends_at_its_budget(http: httpx.Client) -> None:
    # Without a bias, noise might end the reasoning by itself, or begin another.
    tags = http.post("/tokenize", json={"prompt": "</think><think>"}).json()["tokens"]
    bias = {str(tag): -100 for tag in tags}
    answer = ask(http, thinking_budget=5, max_tokens=12, logit_bias=bias)
    assert answer["usage"]["completion_tokens_details"]["reasoning_tokens"] == 6  # and </think>
    assert answer["usage"]["completion_tokens"] == 12


def test_disconnecting_frees_the_row(real: LiveServer, http: httpx.Client) -> None:
    body = {"messages": MESSAGES, "max_tokens": 4000, "ignore_eos": True, "stream": True}
    with http.stream("POST", "/v1/chat/completions", json=body) as response:
        pieces = response.iter_raw()
        next(pieces)
    real.wait_until_idle()


def test_the_engine_killed_mid_stream_is_an_error_event_and_the_next_request_works(
    real: LiveServer, http: httpx.Client
) -> None:
    before = ask(http, temperature=0)["choices"]
    body = {"messages": MESSAGES, "max_tokens": 4000, "ignore_eos": True, "stream": True}
    with http.stream("POST", "/v1/chat/completions", json=body) as response:
        pieces = response.iter_raw()
        received = next(pieces)
        pid = real.service.engine.pid
        assert pid is not None
        os.kill(pid, signal.SIGKILL)
        received += b"".join(pieces)
    events = sse.read(received)
    assert events.chunks[-1]["error"]["code"] == "engine_unavailable"
    assert not events.done
    real.wait_for("ready")
    assert ask(http, temperature=0)["choices"] == before


# -- the command ----------------------------------------------------------------------------


def wait_until_ready(url: str) -> None:
    deadline = time.monotonic() + 60
    while httpx.get(f"{url}/health", timeout=60).status_code != 200:
        assert time.monotonic() < deadline
        time.sleep(0.05)


def listens(url: str) -> bool:
    try:
        httpx.get(f"{url}/livez", timeout=60)
    except httpx.ConnectError:
        return False
    return True


def engine_of(process: subprocess.Popen[str]) -> psutil.Process:
    """The server's child that holds the model."""
    deadline = time.monotonic() + 20
    while True:
        for child in psutil.Process(process.pid).children():
            if "glmd.engine.main" in child.cmdline():
                return child
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_sigterm_ends_the_server_with_0_and_leaves_nothing(random_checkpoint: Path) -> None:
    with serving(str(random_checkpoint)) as (process, url):
        engine = engine_of(process)
        assert httpx.get(f"{url}/livez", timeout=60).status_code == 200
        process.send_signal(signal.SIGTERM)
        assert process.wait(30) == 0
        engine.wait(10)


def test_conversations_survive_a_restart_and_the_death_of_the_engine(
    random_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The client sends its turns back without their reasoning, and nothing is computed again."""
    monkeypatch.setenv("GLMD_DISK_CACHE_FOLDER", str(tmp_path))
    messages = [{"role": "user", "content": "Count the ways. " * 20}]
    computed: list[int] = []

    def turn(url: str) -> None:
        wait_until_ready(url)
        with httpx.Client(base_url=url, timeout=60) as http:
            answer = ask(http, messages=messages, max_tokens=40)
        details = answer["usage"]["prompt_tokens_details"]
        computed.append(answer["usage"]["prompt_tokens"] - details["cached_tokens"])
        content = answer["choices"][0]["message"]["content"] or ""
        messages.extend([{"role": "assistant", "content": content.strip()}])
        messages.extend([{"role": "user", "content": "More."}])

    def disk_bytes(url: str) -> int:
        stats = httpx.get(f"{url}/glmd/status", timeout=60).json()["engine"]["stats"]
        return int(stats["disk_bytes"])

    with serving(str(random_checkpoint)) as (process, url):
        turn(url)
        process.send_signal(signal.SIGTERM)
        assert process.wait(30) == 0
    with serving(str(random_checkpoint)) as (process, url):
        wait_until_ready(url)
        before = disk_bytes(url)
        assert before > 0
        turn(url)
        while disk_bytes(url) == before:
            time.sleep(0.02)
        engine = engine_of(process)
        engine.kill()
        engine.wait(10)
        turn(url)
    assert computed[0] > 200
    assert max(computed[1:]) < 60
    assert {file.stat().st_mode & 0o777 for file in tmp_path.iterdir()} == {0o600}


def test_the_server_killed_takes_its_loading_engine_with_it(random_checkpoint: Path) -> None:
    with serving(str(random_checkpoint)) as (process, _):
        engine = engine_of(process)
        process.kill()
        engine.wait(20)


def test_a_second_sigterm_does_not_wait_for_streams(random_checkpoint: Path) -> None:
    with serving(str(random_checkpoint)) as (process, url), httpx.Client(timeout=30) as http:
        engine = engine_of(process)
        wait_until_ready(url)
        body = {"messages": MESSAGES, "max_tokens": 4000, "ignore_eos": True, "stream": True}
        with http.stream("POST", f"{url}/v1/chat/completions", json=body) as response:
            pieces = response.iter_raw()
            next(pieces)
            process.send_signal(signal.SIGTERM)
            while listens(url):
                time.sleep(0.02)
            assert process.poll() is None
            process.send_signal(signal.SIGTERM)
            assert process.wait(10) == 0
            engine.wait(20)


def test_an_unsupported_checkpoint_ends_the_server_with_one_line(
    random_checkpoint: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "other"
    folder.mkdir()
    for file in random_checkpoint.iterdir():
        (folder / file.name).symlink_to(file)
    config = json.loads((random_checkpoint / "config.json").read_text())
    (folder / "config.json").unlink()
    (folder / "config.json").write_text(json.dumps(config | {"model_type": "llama"}))
    run = subprocess.run(
        [sys.executable, "-m", "glmd", "serve", str(folder), "--port", "0"],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert run.returncode == 1
    assert run.stderr.splitlines()[-1].startswith("glmd: ")
    assert "llama" in run.stderr.splitlines()[-1]
    assert "Traceback" not in run.stderr


def test_stats_count_the_engines_work(real: LiveServer, http: httpx.Client) -> None:
    ask(http)
    real.wait_until_idle()
    stats: EngineStats = real.service.engine.stats
    assert stats.tokens_generated > 0
    assert stats.prompt_tokens_computed > 0
    assert stats.footprint_bytes > stats.weight_bytes


def complete(http: httpx.Client, **body: Any) -> dict[str, Any]:
    response = http.post("/v1/completions", json={"temperature": 0} | body)
    assert response.status_code == 200, response.text
    answer: dict[str, Any] = response.json()
    return answer


@pytest.mark.parametrize("as_ids", [False, True])
def test_a_prompts_log_probabilities_are_those_of_continuing_it(
    http: httpx.Client, as_ids: bool
) -> None:
    contexts = ["What is two?", "A lazy dog"]

    def tokens(text: str) -> list[int]:
        found: list[int] = http.post("/tokenize", json={"prompt": text}).json()["tokens"]
        return found

    ids, ends = list(map(tokens, contexts)), [tokens(" Two"), tokens("!")]
    pairs = list(zip(ids, ends, strict=True))
    whole = [context + end for context, end in pairs]
    prompts: Any = whole
    if not as_ids:
        sent = [http.post("/detokenize", json={"tokens": each}).json() for each in whole]
        prompts = [each.get("content", each.get("prompt")) for each in sent]
    fields = {"prompt": prompts, "max_tokens": 1, "logprobs": 1, "seed": 1234, "echo": True}
    choices = complete(http, **fields)["choices"]
    # As the model continues the context alone, token by token.
    for choice, (context, end) in zip(choices, pairs, strict=True):
        found = choice["logprobs"]
        assert len(found["tokens"]) == len(context) + len(end) + 1
        assert (found["token_logprobs"][0], found["top_logprobs"][0]) == (None, None)
        continued = zip(
            found["token_logprobs"][len(context) : -1],
            found["top_logprobs"][len(context) : -1],
            strict=True,
        )
        for count, (logprob, top) in enumerate(continued):
            alone = complete(
                http,
                prompt=[*context, *end[:count]],
                logprobs=1,
                max_tokens=1,
                ignore_eos=True,
            )["choices"][0]["logprobs"]
            (best,) = alone["token_logprobs"]
            assert max(top.values()) == pytest.approx(best, abs=1e-3)
            assert logprob in top.values()
            assert logprob <= max(top.values())


def test_a_prompt_alone_is_scored_without_an_answer(http: httpx.Client) -> None:
    body = {"prompt": "A lazy dog sleeps.", "echo": True, "max_tokens": 0}
    whole = complete(http, **body, logprobs=2, prompt_logprobs=1)
    (choice,) = whole["choices"]
    assert (choice["text"], choice["finish_reason"]) == (body["prompt"], "length")
    assert whole["usage"]["completion_tokens"] == 0
    found, shown = choice["logprobs"], choice["prompt_logprobs"]
    assert "".join(found["tokens"]) == choice["text"]
    assert len(shown) == len(found["tokens"]) == whole["usage"]["prompt_tokens"]
    assert shown[0] is None
    for entry, logprob, offset, token in zip(
        shown[1:],
        found["token_logprobs"][1:],
        found["text_offset"][1:],
        found["tokens"][1:],
        strict=True,
    ):
        own = [one for one in entry.values() if one["decoded_token"] == token]
        assert [one["logprob"] for one in own] == [logprob]
        assert choice["text"][offset:].startswith(token)
    with http.stream(
        "POST", "/v1/completions", json={"temperature": 0, **body, "logprobs": 2, "stream": True}
    ) as response:
        chunks = sse.read(response.read()).chunks
    assert chunks[0]["choices"][0]["logprobs"] == found
    assert "prompt_logprobs" not in chunks[0]["choices"][0]
    only = complete(http, prompt=body["prompt"], max_tokens=0)
    assert only["choices"][0]["text"] == ""
