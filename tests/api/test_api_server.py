"""HTTP behaviour of all routes: health, models, errors, keys, bodies, startup errors."""

from __future__ import annotations

import asyncio
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import httpx
import pytest
from live import LiveServer, live_server

from glmd.api.sockets import listen
from glmd.errors import SettingsError


def error_of(response: httpx.Response) -> dict[str, str | None]:
    """Return the error object; it must have OpenAI's format."""
    body = response.json()
    assert list(body) == ["error"]
    assert list(body["error"]) == ["message", "type", "param", "code"]
    assert isinstance(body["error"]["message"], str)
    assert isinstance(body["error"]["type"], str)
    error: dict[str, str | None] = body["error"]
    return error


def test_livez_and_health_are_200_when_ready(http: httpx.Client) -> None:
    assert http.get("/livez").json() == {"status": "alive"}
    health = http.get("/health")
    assert health.status_code == 200
    assert health.json() == {
        "status": "ready",
        "model": "test/tiny",
        "kv_bits": 16,
        "loading": None,
        "failure": None,
        "restarts": health.json()["restarts"],
    }


def test_models_lists_the_model_with_context_and_names(http: httpx.Client) -> None:
    (model,) = http.get("/v1/models").json()["data"]
    assert model["id"] == "test/tiny"
    assert model["object"] == "model"
    assert model["owned_by"] == "test"
    assert model["aliases"] == ["tiny", "default", "gpt-test"]
    assert model["context_length"] == model["max_model_len"] == 4096


@pytest.mark.parametrize("name", ["test/tiny", "tiny", "default", "gpt-test"])
def test_a_model_is_found_by_every_name(http: httpx.Client, name: str) -> None:
    assert http.get(f"/v1/models/{name}").json()["id"] == "test/tiny"


def test_an_unknown_model_is_404_in_openais_shape(http: httpx.Client) -> None:
    response = http.get("/v1/models/gpt-5")
    assert response.status_code == 404
    error = error_of(response)
    assert error["code"] == "model_not_found"
    assert "'gpt-5'" in str(error["message"])


def test_unknown_paths_and_methods_have_openais_error_format(http: httpx.Client) -> None:
    response = http.get("/v1/nothing")
    assert response.status_code == 404
    assert error_of(response)["message"] == "Path /v1/nothing not found."
    response = http.get("/v1/chat/completions")
    assert response.status_code == 405
    assert response.headers["allow"] == "POST"
    assert "GET" in str(error_of(response)["message"])


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"{",
        b'{"messages": NaN}',
        b"[" * 1000,
        b"\xff",
        b'{"messages": "\\ud8"}',
        b"[]",
        b"1",
    ],
)
def test_invalid_json_is_400(http: httpx.Client, body: bytes) -> None:
    response = http.post(
        "/v1/chat/completions", content=body, headers={"content-type": "application/json"}
    )
    assert response.status_code == 400
    assert error_of(response)["type"] == "invalid_request_error"


@pytest.mark.parametrize(
    ("sent", "read"),
    [
        (r"cut \ud83d", "cut \ufffd"),
        (r"\uDE00 cut", "\ufffd cut"),
        (r"\ud83d\ud83d\ude00", "\ufffd😀"),
        (r"\ud83dx\ude00", "\ufffdx\ufffd"),
        (r"\\ud83d \\\ud83d", "\\ud83d \\\ufffd"),
    ],
)
def test_a_lone_surrogate_becomes_a_replacement_character(
    http: httpx.Client, sent: str, read: str
) -> None:
    """Agents cut the output of tools inside surrogate pairs."""
    body = f'{{"messages": [{{"role": "user", "content": "{sent}"}}]}}'
    response = http.post(
        "/apply-template", content=body, headers={"content-type": "application/json"}
    )
    assert response.status_code == 200, response.text
    assert f"<|user|>{read}<|assistant|>" in response.json()["prompt"]


def test_head_is_answered_like_get(http: httpx.Client) -> None:
    for path in ("/livez", "/health", "/v1/models", "/v1/models/tiny", "/openapi.json"):
        response = http.head(path)
        assert response.status_code == 200
        assert response.content == b""
    assert http.head("/v1/models/nobody").status_code == 404
    assert http.head("/v1/messages").status_code == 405


@pytest.mark.parametrize(
    "content_type",
    ["text/plain", "application/x-www-form-urlencoded", "application/json; charset=latin-1"],
)
def test_other_content_types_are_415(http: httpx.Client, content_type: str) -> None:
    response = http.post(
        "/v1/chat/completions", content=b"{}", headers={"content-type": content_type}
    )
    assert response.status_code == 415
    assert "application/json" in str(error_of(response)["message"])


def test_every_response_has_a_request_id_preferably_the_clients(http: httpx.Client) -> None:
    assert len(http.get("/livez").headers["x-request-id"]) == 32
    mine = http.get("/livez", headers={"x-request-id": "abc-1"})
    assert mine.headers["x-request-id"] == "abc-1"
    forged = http.get("/livez", headers={"x-request-id": "a b\tc"})
    assert forged.headers["x-request-id"] != "a b\tc"


def test_a_body_over_the_limit_is_413_with_or_without_content_length() -> None:
    with live_server(max_body="2KiB") as live, live.client() as http:
        headers = {"content-type": "application/json"}
        for content in (b" " * 3000, iter([b" " * 1500] * 2)):
            response = http.post("/v1/chat/completions", content=content, headers=headers)
            assert response.status_code == 413
            assert "2048 bytes" in str(error_of(response)["message"])


def test_with_a_key_all_routes_but_health_require_it() -> None:
    with live_server(api_key="s3cret-ß") as live, live.client() as http:
        assert http.get("/livez").status_code == 200
        assert http.get("/health").status_code == 200
        for header in ({}, {"authorization": "Bearer wrong"}, {"authorization": "Basic s3cret"}):
            response = http.get("/v1/models", headers=header)
            assert response.status_code == 401
            assert response.headers["www-authenticate"] == "Bearer"
            assert error_of(response)["code"] == "invalid_api_key"
        known = http.get("/v1/models", headers={b"authorization": "Bearer s3cret-ß".encode()})
        assert known.status_code == 200


def test_while_loading_health_and_requests_are_503_with_retry_after(tmp_path: Path) -> None:
    config = {"on_load": "wait"}
    with live_server(engine="fake_engine", config=config, ready=False) as live:
        live.wait_for("loading")
        with live.client() as http:
            assert http.get("/health").status_code == 503
            response = http.post("/v1/chat/completions", json={"messages": [{"role": "user"}]})
            assert response.status_code == 503
            assert response.headers["retry-after"] == "1"
            assert "loading" in str(error_of(response)["message"])
            assert http.get("/v1/models").json()["data"][0]["context_length"] is None


def glmd(*arguments: str, **options: Any) -> subprocess.CompletedProcess[str]:
    """Run a command that exits."""
    done: subprocess.CompletedProcess[str] = subprocess.run(
        [sys.executable, "-m", "glmd", *arguments],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
        **options,
    )
    return done


def test_a_startup_error_is_one_line_and_an_exit_code(
    scripted: LiveServer, random_checkpoint: Path, tmp_path: Path
) -> None:
    config = tmp_path / "glmd.toml"
    config.write_text("prot = 8000")
    port = scripted.url.rpartition(":")[2]
    checkpoint = str(random_checkpoint)
    for arguments, line in [
        (["serve", "./nowhere"], "nowhere"),
        (["serve", checkpoint, "--port", port], f"Cannot listen on 127.0.0.1 port {port}"),
        (["serve", "--config", str(config)], "did you mean port?"),
        (["serve", "--max-context", "0"], "--max-context"),
    ]:
        run = glmd(*arguments)
        assert run.returncode == 1, run
        last = run.stderr.splitlines()[-1]
        assert last.startswith("glmd: ")
        assert line in last
        assert "Traceback" not in run.stderr


def test_the_api_process_never_imports_the_array_libraries() -> None:
    script = (
        "import sys, glmd.cli, glmd.api.server, glmd.api.state; "
        "bad = {'mlx', 'mlx_lm', 'torch', 'transformers'} & set(sys.modules); "
        "sys.exit(f'imported: {bad}' if bad else 0)"
    )
    subprocess.run([sys.executable, "-c", script], check=True)


def test_localhost_listens_on_every_address_of_the_name() -> None:
    sockets = listen("localhost", 0)
    assert len({opened.getsockname()[1] for opened in sockets}) == 1
    for opened in sockets:
        with socket.create_connection(opened.getsockname()[:2], timeout=5):
            pass
        opened.close()


def test_an_unknown_host_is_reported() -> None:
    with pytest.raises(SettingsError, match=r"Cannot listen on no\.such\.host\.invalid port 1"):
        listen("no.such.host.invalid", 1)


def test_connections_have_tcp_nodelay() -> None:
    """Otherwise a small write waits for the acknowledgement of the previous write."""

    async def accepted() -> int:
        found: asyncio.Future[int] = asyncio.get_running_loop().create_future()

        def look(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            connection = writer.get_extra_info("socket")
            found.set_result(connection.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY))
            writer.close()

        (listening,) = listen("127.0.0.1", 0)
        async with await asyncio.start_server(look, sock=listening):
            _, writer = await asyncio.open_connection(*listening.getsockname())
            nodelay = await found
            writer.close()
        return nodelay

    assert asyncio.run(accepted())


def test_an_unexpected_error_has_the_request_id_and_closes_the_connection(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def fail(*_: object) -> None:
        raise ZeroDivisionError

    with live_server() as live, live.client() as http:
        monkeypatch.setattr(live.service, "defaults", fail)
        for path in ("/v1/chat/completions", "/v1/messages"):
            body = {"messages": [{"role": "user", "content": "Hi"}], "max_tokens": 1}
            answer = http.post(path, json=body, headers={"x-request-id": "mine"})
            assert answer.status_code == 500
            assert answer.headers["x-request-id"] == answer.headers["request-id"] == "mine"
            assert answer.headers["connection"] == "close"
