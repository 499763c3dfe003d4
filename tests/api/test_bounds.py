"""Work for a request is bounded before it is done, and done off the event loop."""

from __future__ import annotations

import asyncio
import json
import os
import random
import re
import resource
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Generator, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest
from live import LiveServer, live_server
from requests_by_path import PATHS, body_of

from glmd.api import body_reader, request_body
from glmd.api.body_reader import BodyReader
from glmd.api.openai.protocol import CompletionRequest
from glmd.chat.template_process import TemplateProcess
from glmd.chat.tokenizer import STEP_CHARS
from glmd.chat.tool_args import RAW_ARGUMENTS, record_arguments
from glmd.chat.tools import order_tool_results
from glmd.chat.types import AssistantMessage, ToolCall, ToolMessage

CHAT = "/v1/chat/completions"
LARGE = request_body.INLINE_BYTES + 1
PADDING = {"x_padding": "x" * LARGE}


# -- large bodies ---------------------------------------------------------------------------


@pytest.mark.parametrize("path", PATHS)
def test_a_large_body_is_not_parsed_in_the_api_process(
    http: httpx.Client, monkeypatch: pytest.MonkeyPatch, path: str
) -> None:
    def refuse(body: bytes) -> Any:
        raise AssertionError

    monkeypatch.setattr(request_body, "parse_json", refuse)
    answer = http.post(path, json=body_of(path, "</think>Hi", **PADDING))
    assert answer.status_code == 200, answer.text
    assert answer.headers["x-glmd-ignored-parameters"] == "x_padding"


@pytest.mark.parametrize(
    ("path", "body"),
    [
        (CHAT, {"messages": [1]}),
        (CHAT, {"messages": [{"role": "x"}]}),
        (CHAT, {"messages": [{"role": "user", "content": "Hi"}], "stop": 1}),
        (CHAT, {}),
        (CHAT, []),
        ("/v1/completions", {"prompt": [[1, 2], [3, -1]]}),
        ("/v1/messages", {"messages": [{"role": "user", "content": 1}], "max_tokens": 1}),
        ("/v1/responses", {"input": [{"type": "x"}]}),
        ("/detokenize", {"tokens": [1, "2"]}),
        ("/tokenize", {"messages": [1]}),
        ("/tokenize", {"prompt": 1}),
    ],
)
def test_a_large_body_is_refused_like_a_small_one(
    http: httpx.Client, path: str, body: dict[str, Any] | list[Any]
) -> None:
    small = http.post(path, json=body)
    padded = body | PADDING if isinstance(body, dict) else [*body, PADDING]
    large = http.post(path, json=padded)
    assert small.status_code == large.status_code == 400
    assert json.dumps(small.json()).replace(small.headers["request-id"], "") == json.dumps(
        large.json()
    ).replace(large.headers["request-id"], "")


def test_free_memory_is_returned_after_a_large_body(
    http: httpx.Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    returned = threading.Event()
    monkeypatch.setattr(request_body, "return_free_memory", returned.set)
    monkeypatch.setattr(request_body, "TRIM_SECONDS", 0.01)
    large = {"x_padding": "x" * request_body.TRIM_BYTES}
    assert http.post(CHAT, json=body_of(CHAT, "</think>Hi", **large)).status_code == 200
    assert returned.wait(30)


def test_unknown_values_are_not_kept() -> None:
    fields = {"prompt": "a", "user": ["x"] * 9, "odd": {"x": [1]}, "grammar": [], "no": 0}
    body = CompletionRequest.model_validate(fields)
    assert body.user is None
    assert body.model_extra == {"odd": True, "grammar": [], "no": 0}
    assert body.unknown_parameters() == ["odd", "no"]


def test_a_body_with_very_many_fields_is_400(http: httpx.Client) -> None:
    fields = {f"x{number}": 0 for number in range(1001)}
    for path in (*PATHS, "/tokenize", "/detokenize"):
        answer = http.post(path, json=fields)
        assert answer.status_code == 400
        assert "at most 1000 fields" in answer.text


def test_texts_that_are_json_themselves_are_counted(http: httpx.Client) -> None:
    def call(arguments: str) -> dict[str, Any]:
        function = {"name": "f", "arguments": arguments}
        calls = [{"id": "a", "type": "function", "function": function}]
        return {
            "role": "assistant",
            "tool_calls": calls,
        }

    nested = f'{{"a": [{"[]," * 130_000}1]}}'
    assert record_arguments(nested) == {RAW_ARGUMENTS: nested}
    many = [call(nested)] * 8
    assert http.post(CHAT, json={"messages": many}).status_code == 413


@pytest.fixture
def reader() -> Iterator[BodyReader]:
    reader = BodyReader()
    yield reader
    reader.close()


BODY = json.dumps({"prompt": "Hi"}).encode()


def read(reader: BodyReader, body: bytes = BODY) -> Any:
    return asyncio.run(reader.read(body, CompletionRequest))[0]


def test_a_body_that_takes_too_much_time_is_413(reader: BodyReader) -> None:
    read(reader)
    pid = reader.worker.pid
    assert pid is not None
    os.kill(pid, signal.SIGSTOP)
    signals = (signal.SIGPROF, signal.SIGCONT)
    killer = threading.Timer(0.2, lambda: list(map(os.kill, (pid, pid), signals)))
    killer.start()
    assert read(reader).status == 413
    killer.join()
    assert read(reader).prompt == "Hi"


def test_a_process_that_keeps_much_memory_is_replaced(
    reader: BodyReader, monkeypatch: pytest.MonkeyPatch
) -> None:
    read(reader)
    monkeypatch.setattr(body_reader, "MAX_IDLE_BYTES", 0)
    assert read(reader).prompt == "Hi"
    assert reader.worker.pid is None
    assert read(reader).prompt == "Hi"


# -- memory ---------------------------------------------------------------------------------


def test_bodies_of_responses_in_the_background_count_until_they_end() -> None:
    with live_server(max_body=200_000) as live, live.client() as http:
        body = {"input": "⟦</think>One{wait}⟧", "background": True, "x": "x" * 150_000}
        ids = []
        while (answer := http.post("/v1/responses", json=body)).status_code == 200:
            ids.append(answer.json()["id"])
        assert answer.status_code == 503
        assert "request bodies" in answer.text
        # Half of the memory of sixteen bodies, of which each counts twice once it is parsed.
        assert len(ids) <= 8 * 200 / 150
        for id in ids:
            assert http.post(f"/v1/responses/{id}/cancel").status_code == 200
        assert http.post("/v1/responses", json=body).status_code == 200


@pytest.mark.skipif(sys.platform != "linux", reason="only on Linux can memory be limited")
def test_a_server_out_of_memory_ends_with_its_engine(
    random_checkpoint: Path, tmp_path: Path
) -> None:
    log = tmp_path / "log"
    with log.open("wb") as out:
        process = subprocess.Popen(
            [sys.executable, "-m", "glmd", "serve", str(random_checkpoint), "--port", "0"],
            stderr=out,
        )
    try:
        while not (found := re.search(r"at (http://127\.0\.0\.1:\d+)/v1", log.read_text())):
            assert process.poll() is None, log.read_text()
            time.sleep(0.05)
        url = found[1]
        children = psutil.Process(process.pid).children(recursive=True)
        limit = psutil.Process(process.pid).memory_info().vms + (48 << 20)
        resource.prlimit(process.pid, resource.RLIMIT_AS, (limit, limit))
        body = json.dumps({"prompt": "a" * (30 << 20)}).encode()
        headers = {"content-type": "application/json"}

        def send() -> None:
            with suppress(httpx.HTTPError):
                httpx.post(f"{url}/v1/completions", content=body, headers=headers, timeout=300)

        senders = [threading.Thread(target=send) for _ in range(4)]
        for sender in senders:
            sender.start()
        assert process.wait(300) != 0
        _, alive = psutil.wait_procs(children, timeout=120)
        assert not alive
        for sender in senders:
            sender.join()
    finally:
        process.kill()
        process.wait()


# -- prompts --------------------------------------------------------------------------------


def test_a_prompt_that_cannot_fit_is_refused_before_it_is_rendered(
    scripted: LiveServer, http: httpx.Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    service = scripted.service
    monkeypatch.setattr(TemplateProcess, "render", None)  # It cannot be called.
    text = "a" * (20 * 4096 * service.tokenizer.longest_token)
    answer = http.post(CHAT, json={"messages": [{"role": "user", "content": text}]})
    assert answer.status_code == 400
    error = answer.json()["error"]
    assert error["code"] == "context_length_exceeded"
    assert "prompt is too long: at least 81920 tokens > 4096 maximum" in error["message"]


@pytest.mark.parametrize("path", [CHAT, "/v1/completions"])
def test_a_prompt_is_refused_as_soon_as_it_is_too_long(
    scripted: LiveServer, http: httpx.Client, monkeypatch: pytest.MonkeyPatch, path: str
) -> None:
    encoded: list[int] = []
    encode = scripted.service.tokenizer.encode

    def note(text: str) -> list[int]:
        encoded.append(len(text))
        return encode(text)

    monkeypatch.setattr(scripted.service.tokenizer, "encode", note)
    monkeypatch.setattr(scripted.service, "_check_bytes", lambda *_: None)
    words = random.Random(path).choices(["word", "other", "Text"], k=200_000)
    answer = http.post(path, json=body_of(path, " ".join(words)))
    assert answer.status_code == 400
    assert "prompt is too long: at least" in answer.json()["error"]["message"]
    assert max(encoded) <= 2 * STEP_CHARS
    assert sum(encoded) <= 3 * STEP_CHARS


def test_clients_take_turns_at_the_prompt_thread(scripted: LiveServer) -> None:
    order: list[str] = []

    def steps(name: str, count: int) -> Generator[int, None, None]:
        for number in range(count):
            order.append(name)
            yield number * 10_000

    async def both() -> None:
        service = scripted.service
        await asyncio.gather(
            *(service.take_turns(steps(name, count)) for name, count in (("long", 9), ("hi", 1)))
        )

    asyncio.run(both())
    assert order.index("hi") <= 3
    assert order.count("long") == 9


def test_results_are_matched_with_calls_in_linear_time() -> None:
    class Id(str):
        __slots__ = ()
        compared = 0

        def __eq__(self, other: object) -> bool:
            Id.compared += 1
            return str.__eq__(self, other)

        __hash__ = str.__hash__

    def compared(count: int) -> int:
        Id.compared = 0
        calls = tuple(ToolCall(Id(f"call {number}"), "f", {}) for number in range(count))
        results = [ToolMessage("", Id(f"call {number}")) for number in reversed(range(count))]
        ordered = order_tool_results([AssistantMessage("", None, calls), *results])
        assert ordered[1:] == results[::-1]
        return Id.compared

    assert compared(2000) <= 12 * compared(200)


# -- what clients choose is no key of what is kept ------------------------------------------


def test_methods_that_clients_make_up_are_one_label(http: httpx.Client) -> None:
    for number in range(5):
        assert http.request(f"MADEUP{number}", "/v1/models").status_code == 405
    labels = [line for line in http.get("/metrics").text.splitlines() if "http_responses" in line]
    assert any('method="other"' in line for line in labels)
    assert not any("MADEUP" in line for line in labels)


def test_ids_outside_the_vocabulary_are_not_kept(scripted: LiveServer, http: httpx.Client) -> None:
    tokenizer = scripted.service.tokenizer
    ids = list(range(10**6, 10**6 + 1000))
    answer = http.post("/detokenize", json={"tokens": [*ids, tokenizer.encode("a")[0]]})
    assert answer.json()["prompt"] == "a"
    assert not tokenizer._bytes.keys() & set(ids)
