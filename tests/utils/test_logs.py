"""Log formats, the access log, explanations of slow requests, and no prompts in the log."""

from __future__ import annotations

import io
import json
import logging
import os
import pty
import re
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import pytest
from live import LiveServer, live_server

from glmd.api.observability.access_log import explain
from glmd.api.observability.request_stats import HttpExchange, RequestStats
from glmd.cli import service
from glmd.ipc import CacheMatch
from glmd.utils.logging import (
    JsonFormatter,
    TextFormatter,
    choose_format,
    json_line_to_text,
    request_id,
)

pytestmark = pytest.mark.e2e

SECRET = "xyzzy plugh"


@pytest.fixture(scope="module")
def live() -> Iterator[LiveServer]:
    with live_server(keep_alive=0.2, api_key="secret") as server:
        yield server


@pytest.fixture
def http(live: LiveServer) -> Iterator[httpx.Client]:
    with live.client(headers={"authorization": "Bearer secret"}) as client:
        yield client


class Lines(logging.Handler):
    """Handler that keeps records and waits for the record of a request."""

    def __init__(self) -> None:
        super().__init__(logging.DEBUG)
        self.records: list[logging.LogRecord] = []
        self._changed = threading.Condition()

    def emit(self, record: logging.LogRecord) -> None:
        with self._changed:
            self.records.append(record)
            self._changed.notify_all()

    def of(self, response: httpx.Response, kind: str = "method") -> dict[str, Any]:
        id = response.headers["x-request-id"]

        def found() -> dict[str, Any] | None:
            every = [getattr(record, "fields", {}) for record in self.records]
            mine = [each for each in every if each.get("request_id") == id and kind in each]
            assert len(mine) < 2
            return mine[0] if mine else None

        with self._changed:
            assert self._changed.wait_for(lambda: found() is not None, 120)
            fields = found()
        assert fields is not None
        return fields

    @property
    def text(self) -> str:
        return "\n".join(
            formatter.format(record)
            for record in self.records
            for formatter in (TextFormatter(), JsonFormatter())
        )


@pytest.fixture
def lines() -> Iterator[Lines]:
    handler, logger = Lines(), logging.getLogger("glmd")
    level = logger.level
    logger.addHandler(handler)
    logger.setLevel(logging.DEBUG)
    yield handler
    logger.removeHandler(handler)
    logger.setLevel(level)


def chat(text: str) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": text}]}


BODIES: dict[str, dict[str, Any]] = {
    "/v1/chat/completions": chat(f"⟦Hm.</think>{SECRET}.⟧"),
    "/v1/completions": {"prompt": f"⟦{SECRET}⟧"},
    "/v1/responses": {"input": f"⟦Hm.</think>{SECRET}.⟧"},
    "/v1/messages": {**chat(f"⟦Hm.</think>{SECRET}.⟧"), "max_tokens": 50},
}


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("path", BODIES)
def test_each_request_has_one_line_with_its_figures_and_without_its_text(
    http: httpx.Client, lines: Lines, path: str, stream: bool
) -> None:
    response = http.post(path, json={**BODIES[path], "stream": stream})
    assert response.status_code == 200
    assert stream or "plugh" in response.text
    fields = lines.of(response)
    assert (fields["method"], fields["path"], fields["status"]) == ("POST", path, 200)
    assert fields["client"] == "127.0.0.1"
    assert fields["key"]
    assert "secret" not in str(fields)
    assert fields.get("stream", False) is stream
    assert 0 <= fields["queued"] <= fields["ttft"] <= fields["seconds"]
    assert fields["finish"] == "stop"
    assert fields["prompt"] > fields["cached"] >= 0
    assert fields["generated"] > 0
    assert "plugh" not in lines.text


def tool_about(text: str) -> dict[str, Any]:
    """Return a tool in which every string is `text`, with keywords that are not enforced."""
    value = {"type": "string", "description": text, "format": text, "not": {"const": text}}
    parameters = {"type": "object", "properties": {text: value}, "required": [text]}
    function = {"name": text.replace(" ", "_"), "description": text, "parameters": parameters}
    return {"type": "function", "function": function}


def test_neither_process_logs_the_text_of_a_request_whatever_its_outcome(
    lines: Lines, capfd: pytest.CaptureFixture[str]
) -> None:
    """At level DEBUG, with system messages and tools, also for rejections and crashes."""
    root = logging.getLogger()
    root.addHandler(lines)  # loggers of other libraries
    path, statuses = "/v1/chat/completions", []
    try:
        with live_server(log_level="DEBUG", slow_request=1e-6) as live, live.client() as http:
            odd = [{"role": SECRET}], [{"role": "user", "content": {SECRET: SECRET}}], SECRET
            for messages in odd:
                body: dict[str, Any] = {
                    "messages": messages,
                    "stop": [SECRET],
                    "tools": [{SECRET: SECRET}],
                }
                statuses.append(http.post(path, json=body).status_code)
            broken = http.post(path, content=SECRET, headers={"content-type": "application/json"})
            statuses.append(broken.status_code)
            for script in ("</think>{}", "</think>{}{{refuse}}", "{}{{raise}}", "{}{{die}}"):
                live.wait_for("ready")
                body = chat(f"⟦{script.format(SECRET)}⟧")
                body["messages"].insert(0, {"role": "system", "content": SECRET})
                body |= {"tools": [tool_about(SECRET)], "tool_choice": "required", "user": SECRET}
                statuses.append(http.post(path, json=body).status_code)
    finally:
        root.removeHandler(lines)
    assert statuses == [400] * 4 + [200, 400, 503, 503]
    written = capfd.readouterr().err
    assert "the script says raise" in written, "the engine's output is captured"
    assert "Slow request " in lines.text
    assert "schema keywords not enforced: tools[0]=1" in lines.text
    assert "plugh" not in written + lines.text


def test_a_line_contains_the_outcome_of_the_request(http: httpx.Client, lines: Lines) -> None:
    path = "/v1/chat/completions"
    assert lines.of(http.post(path, json=chat("⟦{refuse}⟧")))["finish"] == "error"
    assert lines.of(http.post(path, content=b"{"))["status"] in (400, 415)
    assert lines.of(http.get("/nowhere"))["status"] == 404
    with http.stream("POST", path, json={**chat("⟦</think>One{wait}⟧"), "stream": True}) as left:
        chunks = left.iter_raw()
        next(chunks)
    assert lines.of(left)["finish"] == "cancelled"


def test_a_background_response_has_a_second_line_at_its_end(
    http: httpx.Client, lines: Lines
) -> None:
    response = http.post("/v1/responses", json={"input": "⟦</think>Yes.⟧", "background": True})
    assert lines.of(response)["status"] == 200
    done = lines.of(response, kind="background")
    assert (done["background"], done["finish"]) == (response.json()["id"], "stop")


def test_health_checks_are_logged_at_debug_level(http: httpx.Client, lines: Lines) -> None:
    lines.of(http.get("/health"))
    lines.of(http.get("/v1/models"))
    levels = {
        record.fields["path"]: record.levelname
        for record in lines.records
        if hasattr(record, "fields")
    }
    assert levels == {"/health": "DEBUG", "/v1/models": "INFO"}


def test_a_slow_request_is_explained(lines: Lines) -> None:
    with live_server(slow_request=1e-6) as live, live.client() as http:
        response = http.post("/v1/chat/completions", json=chat("⟦</think>One.⟧"))
        assert lines.of(response, kind="slow")["slow"] == response.json()["id"]
    (record,) = [r for r in lines.records if r.levelno == logging.WARNING]
    assert re.match(
        r"Slow request chatcmpl-\w+: queued for \d.* s, first token \d.* s later",
        record.getMessage(),
    )


@pytest.mark.parametrize(
    ("match", "sentence"),
    [
        (
            CacheMatch(tokens=9, reason="whole"),
            "9 of 10 prompt tokens cached: the whole",
        ),
        (
            CacheMatch(tokens=3, reason="new"),
            "3 of 10 prompt tokens cached: nothing is",
        ),
        (
            CacheMatch(tokens=3, reason="differs", diverging_tokens=70),
            "cached: the cache continues differently there, for 70 tokens.",
        ),
        (
            CacheMatch(tokens=3, reason="evicted"),
            "3 of 10 prompt tokens cached: the rest was evicted.",
        ),
        (
            CacheMatch(tokens=0, reason="off"),
            "0 of 10 prompt tokens cached: the prefix",
        ),
    ],
)
def test_a_cache_miss_is_explained(match: CacheMatch, sentence: str) -> None:
    exchange = HttpExchange("id", "POST", "/", "")
    record = RequestStats("chatcmpl-1", exchange, 1, 10, match=match, queue_seconds=0.0)
    record.first_token = exchange.started + 40
    assert sentence in explain(record)


def make(message: str, *arguments: object, **extra: Any) -> logging.LogRecord:
    record = logging.LogRecord("glmd.test", logging.INFO, "", 0, message, arguments, None)
    record.__dict__.update(extra)
    return record


def test_json_lines_are_objects_with_their_fields_and_exceptions() -> None:
    record = make("It is %s\nso", "just", fields={"status": 200})
    try:
        raise ValueError("boom")
    except ValueError:
        record.exc_info = sys.exc_info()
    text = JsonFormatter().format(record)
    assert "\n" not in text
    line = json.loads(text)
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}\+00:00", line.pop("time"))
    assert "ValueError: boom" in line.pop("exception")
    assert line == {
        "level": "INFO",
        "logger": "glmd.test",
        "message": "It is just\nso",
        "status": 200,
    }


def test_a_client_cannot_forge_lines_in_the_text_format() -> None:
    text = TextFormatter().format(make("path=%s", "/x\r\n2026-01-01 ERROR forged\x1b[31m"))
    assert text.isprintable()
    assert r"\r\n" in text


def test_lines_of_a_request_contain_its_id() -> None:
    token = request_id.set("abc")
    try:
        assert TextFormatter().format(make("So.")).endswith("So. [abc]")
        assert json.loads(JsonFormatter().format(make("So.")))["request_id"] == "abc"
    finally:
        request_id.reset(token)


def test_json_lines_convert_to_text_and_other_lines_are_unchanged() -> None:
    record = make("Done\x1b[31m", fields={"request_id": "abc"})
    line = JsonFormatter().format(record)
    text = json_line_to_text(line)
    assert re.fullmatch(
        r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d\.\d{3} INFO glmd\.test: Done\\x1b\[31m \[abc\]", text
    )
    assert json_line_to_text(f"Nov 24 10:00:00 mac glmd[7]: {line}") == text
    for other in ("libc++abi: terminating", "{}", '{"time": 1}', "{broken", "[1]", ""):
        assert json_line_to_text(other) == other


def test_the_automatic_format_is_text_on_a_terminal_and_json_elsewhere() -> None:
    assert choose_format("auto", io.StringIO()) == "json"
    assert choose_format("text", io.StringIO()) == "text"
    parent, child = pty.openpty()
    with open(child, "w") as terminal:
        assert choose_format("auto", terminal) == "text"
        assert choose_format("json", terminal) == "json"
    os.close(parent)


def test_both_processes_write_json(tmp_path: Path) -> None:
    """Including the engine's traceback."""
    (tmp_path / "config.json").write_text("{}")
    script = (
        "import asyncio, sys; from pathlib import Path\n"
        "from glmd.engine_client.client import EngineClient\n"
        "from glmd.engine_client.process import EngineProcessConfig\n"
        "from glmd.utils.logging import configure\n"
        "configure('INFO', 'json')\n"
        "async def main():\n"
        "    launch = EngineProcessConfig(Path(sys.argv[1]), {'step_seconds': 0},\n"
        "        engine='fake_engine', log_level='DEBUG', log_format='json')\n"
        "    client = EngineClient(launch)\n"
        "    await client.start(); await client.wait_for('ready')\n"
        "    from glmd.ipc import EngineRequest, pack_tokens\n"
        "    try:\n"
        "        request = EngineRequest(id='a', prompt=pack_tokens([902]))\n"
        "        async for _ in client.generate(request): pass\n"
        "    except Exception: pass\n"
        "    await client.close()\n"
        "asyncio.run(main())\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, str(tmp_path)],
        capture_output=True,
        text=True,
        check=True,
        timeout=300,
    )
    written = [json.loads(line) for line in done.stderr.splitlines()]
    loggers = {line["logger"] for line in written}
    assert {"glmd.engine", "glmd.engine_client"} <= loggers
    assert any("the test asked for it" in line.get("exception", "") for line in written)


@pytest.mark.parametrize("on_terminal", [False, True])
def test_the_services_log_is_text_on_a_terminal_and_unchanged_elsewhere(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
    on_terminal: bool,
) -> None:
    line = JsonFormatter().format(make("Ready."))
    file = tmp_path / "log"
    file.write_text(f"{line}\nabort\n")
    manager = SimpleNamespace(log_command=lambda lines, follow: ["cat", str(file)])
    monkeypatch.setattr("glmd.cli.service.find_manager", lambda: manager)
    monkeypatch.setattr("glmd.cli.service.require_installed", lambda manager: None)
    monkeypatch.setattr(sys.stdout, "isatty", lambda: on_terminal, raising=False)
    service.logs(lines=100, follow=False)
    shown = capfd.readouterr().out.splitlines()
    assert shown == [json_line_to_text(line) if on_terminal else line, "abort"]
