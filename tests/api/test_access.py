"""Access control: listening address, allowed hosts and origins, API keys."""

from __future__ import annotations

import json
import logging
import re
import socket
import stat
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from live import LiveServer, live_server
from typer.testing import CliRunner

from glmd.api import auth as keys
from glmd.api.app import create_app
from glmd.api.auth import (
    ApiKeyStore,
    create_key,
    read_store,
    require_key_on_public_bind,
    revoke_key,
)
from glmd.api.middleware import HostCheckMiddleware
from glmd.cli.main import app
from glmd.config import Settings
from glmd.errors import SettingsError

FRONT_END = "http://front.example:3000"
CHAT = {"messages": [{"role": "user", "content": "⟦</think>Tweet.⟧"}]}


def error_of(response: httpx.Response, status: int) -> dict[str, Any]:
    assert response.status_code == status, response.text
    error: dict[str, Any] = response.json()["error"]
    return error


def private(file: Path, text: str) -> Path:
    file.touch(0o600)
    file.write_text(text)
    return file


# -- the address ----------------------------------------------------------------------------


@pytest.mark.parametrize("host", ["127.0.0.1", "::1", "localhost", "127.8.8.8"])
def test_loopback_needs_no_key(host: str) -> None:
    require_key_on_public_bind(Settings(host=host), ApiKeyStore())


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.0.2.7"])
def test_a_public_address_needs_a_key_or_allow_unauthenticated(host: str) -> None:
    settings = Settings(host=host)
    with pytest.raises(SettingsError, match=f"{host} is reachable .* --allow-unauthenticated"):
        require_key_on_public_bind(settings, ApiKeyStore())
    require_key_on_public_bind(settings, ApiKeyStore.of(Settings(api_key="secret")))
    require_key_on_public_bind(Settings(host=host, allow_unauthenticated=True), ApiKeyStore())


def test_serve_refuses_a_public_address_before_loading_the_model(tmp_path: Path) -> None:
    run = subprocess.run(
        [sys.executable, "-m", "glmd", "serve", "no/such-model", "--host", "0.0.0.0"],
        env={"PYTHONPATH": ":".join(sys.path), "HOME": str(tmp_path)},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert run.returncode == 1
    (line,) = run.stderr.splitlines()
    assert line.startswith("glmd: host: 0.0.0.0 is reachable from other machines")
    assert "glmd key create" in line


# -- keys -----------------------------------------------------------------------------------


def name_of(ring: ApiKeyStore, key: str) -> str | None:
    found = ring.lookup(key.encode())
    return None if found is None else found.name


def test_keys_come_from_the_setting_and_from_a_file(tmp_path: Path) -> None:
    file = private(tmp_path / "keys", "# of the team\nfirst\n\n  second ß \n")
    ring = ApiKeyStore.of(Settings(api_key="third", api_key_file=file))
    assert ring.required
    assert {key: name_of(ring, key) for key in ("first", "second ß", "third", "fourth", "")} == {
        "first": "keys:2", "second ß": "keys:4", "third": "api_key", "fourth": None, "": None,
    }  # fmt: skip


@pytest.mark.parametrize("mode", [0o640, 0o604, 0o620, 0o660])
def test_a_key_file_accessible_to_other_users_is_refused(tmp_path: Path, mode: int) -> None:
    file = private(tmp_path / "keys", "secret\n")
    file.chmod(mode)
    with pytest.raises(SettingsError, match=r"accessible to other users. Run: chmod 600 .*/keys"):
        ApiKeyStore.of(Settings(api_key_file=file))


@pytest.mark.parametrize(
    ("content", "why"), [(None, "No such file"), ("# none\n\n", "no API key"), (b"\xff", "UTF-8")]
)
def test_a_key_file_without_keys_is_refused(
    tmp_path: Path, content: str | bytes | None, why: str
) -> None:
    file = tmp_path / "keys"
    if content is not None:
        private(file, "").write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(SettingsError, match=why):
        ApiKeyStore.of(Settings(api_key_file=file))
    file.unlink(missing_ok=True)
    file.mkdir()
    with pytest.raises(SettingsError, match="keys"):
        ApiKeyStore.of(Settings(api_key_file=file))


def test_key_command_creates_lists_and_revokes_keys_and_stores_hashes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = tmp_path / "glmd" / "keys.json"
    monkeypatch.setattr(keys, "default_store", lambda: store)
    run = CliRunner().invoke
    made = [run(app, ["key", "create", name]) for name in ("laptop", "phone")]
    first, second = (each.stdout.strip() for each in made)
    assert re.fullmatch(r"glmd_[\w-]{43}", first)
    assert first != second
    assert stat.S_IMODE(store.stat().st_mode) == 0o600
    assert first not in store.read_text()
    listed = run(app, ["key", "list"]).stdout
    assert re.fullmatch(r"laptop  20\S+Z\nphone  20\S+Z\n", listed)
    assert name_of(ApiKeyStore.of(Settings(), store), second) == "phone"
    assert "first key" in made[0].stderr
    assert "first key" not in made[1].stderr

    for arguments, message in [
        (["create", "laptop"], "Key laptop already exists"),
        (["create", "../x"], "Invalid key name"),
        (["revoke", "lapptop"], "did you mean laptop?"),
    ]:
        refused = run(app, ["key", *arguments])
        assert isinstance(refused.exception, SettingsError)
        assert message in refused.exception.message
    assert run(app, ["key", "revoke", "laptop"]).stdout == "Revoked: laptop\n"
    assert ApiKeyStore.of(Settings(), store).lookup(first.encode()) is None
    assert "the last key" in run(app, ["key", "revoke", "phone"]).stderr
    assert not ApiKeyStore.of(Settings(), store).required


@pytest.mark.parametrize(
    "text", ["", "[]", '{"keys": [{"name": "a"}]}', '{"keys": [{"name": "a", "sha256": "x"}]}']
)
def test_a_damaged_key_store_is_refused(tmp_path: Path, text: str) -> None:
    store = private(tmp_path / "keys.json", text)
    with pytest.raises(SettingsError, match="damaged"):
        ApiKeyStore.of(Settings(), store)


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("keys") / "keys.json"


@pytest.fixture(scope="module")
def guarded(store: Path) -> Iterator[LiveServer]:
    """A server with a key store, an allowed host and an allowed origin."""
    with live_server(
        keys=store, allowed_hosts=("*.example.org",), cors_origins=(FRONT_END, "app://*")
    ) as live:
        yield live


def test_a_running_server_reloads_keys_and_stays_closed_without_keys(
    guarded: LiveServer, store: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    with guarded.client() as http:
        assert http.get("/v1/models").status_code == 200
        first, second = (create_key(store, name) for name in ("first", "second"))
        assert error_of(http.get("/v1/models"), 401)["code"] == "invalid_api_key"
        for key in (first, second):
            for headers in ({"authorization": f"Bearer {key}"}, {"x-api-key": key}):
                assert http.get("/v1/models", headers=headers).status_code == 200
        assert http.get("/v1/models", headers={"x-api-key": first + "x"}).status_code == 401
        revoke_key(store, "first")
        assert http.get("/v1/models", headers={"x-api-key": first}).status_code == 401
        assert http.get("/v1/models", headers={"x-api-key": second}).status_code == 200

        store.chmod(0o644)  # It may hold a revocation that nobody has read.
        assert http.get("/v1/models", headers={"x-api-key": second}).status_code == 401
        assert "chmod 600" in caplog.text
        store.chmod(0o600)
        assert http.get("/v1/models", headers={"x-api-key": second}).status_code == 200
        revoke_key(store, "second")
        for headers in ({}, {"x-api-key": second}):
            assert http.get("/v1/models", headers=headers).status_code == 401
        assert http.get("/health").status_code == 200
    assert first not in caplog.text
    assert second not in caplog.text


def test_a_revocation_counts_while_another_key_file_cannot_be_read(tmp_path: Path) -> None:
    lines = private(tmp_path / "keys", "line\n")
    store = tmp_path / "keys.json"
    first, second = (create_key(store, name) for name in ("first", "second"))
    ring = ApiKeyStore.of(Settings(api_key_file=lines), store)
    lines.unlink()
    revoke_key(store, "first")
    ring.reload_if_changed()
    assert [name_of(ring, key) for key in (first, second, "line")] == [None, "second", None]
    private(lines, "line\n")
    ring.reload_if_changed()
    assert [name_of(ring, key) for key in (first, second, "line")] == [None, "second", "keys:1"]


def test_keys_created_and_revoked_at_the_same_time_are_all_kept(tmp_path: Path) -> None:
    store = tmp_path / "glmd" / "keys.json"
    create_key(store, "old")
    program = (
        "import sys; from pathlib import Path; from glmd.api.auth import create_key;"
        "[create_key(Path(sys.argv[1]), f'{sys.argv[2]}-{n}') for n in range(10)]"
    )
    makers = [
        subprocess.Popen([sys.executable, "-c", program, str(store), name]) for name in "abcd"
    ]
    revoke_key(store, "old")
    assert [maker.wait(60) for maker in makers] == [0] * 4
    names = {key.name for key in read_store(store)}
    assert names == {f"{name}-{number}" for name in "abcd" for number in range(10)}


# -- names and origins ----------------------------------------------------------------------


@pytest.mark.parametrize(
    "host",
    [
        "127.0.0.1",
        "localhost:1234",
        "LOCALHOST",
        "localhost.",
        "[::1]:8000",
        "127.9.9.9",
        "host.docker.internal:8000",
    ],
)
def test_names_of_this_machine_are_allowed_hosts(http: httpx.Client, host: str) -> None:
    assert http.get("/v1/models", headers={"host": host}).status_code == 200


@pytest.mark.parametrize(
    "host",
    [
        "evil.example", "localhost.evil.example", "127.0.0.1.evil.example", "192.0.2.7",
        "evil.example@127.0.0.1", "[evil.example]", "127.0.0.1:8000:1", "", "0.0.0.0", "[::]",
    ],
)  # fmt: skip
@pytest.mark.parametrize("path", ["/v1/models", "/health", "/", "/v1/messages"])
def test_dns_rebinding_is_refused(http: httpx.Client, host: str, path: str) -> None:
    response = http.get(path, headers={"host": host})
    assert "allowed_hosts" in error_of(response, 421)["message"]
    assert (response.json().get("type") == "error") == (path == "/v1/messages")


def test_a_server_on_every_address_accepts_addresses_but_not_foreign_names(
    scripted: LiveServer,
) -> None:
    check = HostCheckMiddleware(create_app(scripted.service), "0.0.0.0", ["llm.example.org"])
    for host in ("192.0.2.7:8000", "[2001:db8::1]", "llm.example.org", socket.gethostname()):
        assert check.is_allowed(host), host
    for host in ("evil.example", "x.llm.example.org", "llm.example.org.evil.example"):
        assert not check.is_allowed(host), host


def test_a_client_of_http_1_0_needs_no_host(scripted: LiveServer) -> None:
    address = scripted.url.removeprefix("http://").split(":")
    with socket.create_connection((address[0], int(address[1])), timeout=10) as opened:
        opened.sendall(b"GET /livez HTTP/1.0\r\n\r\n")
        assert b" 200 OK\r\n" in opened.recv(4096)


@pytest.mark.parametrize(
    "origin",
    ["https://evil.example", "null", "http://localhost:1", "http://127.0.0.1", "x", "http://["],
)
def test_requests_of_foreign_origins_are_refused(http: httpx.Client, origin: str) -> None:
    for path, shape in (("/v1/chat/completions", "openai"), ("/v1/messages", "anthropic")):
        response = http.post(path, json=CHAT, headers={"origin": origin})
        assert error_of(response, 403)["type"] == "permission_error"
        assert ("type" in response.json()) == (shape == "anthropic")
        assert "access-control-allow-origin" not in response.headers
    asked = http.options(
        "/v1/chat/completions",
        headers={"origin": origin, "access-control-request-method": "POST"},
    )
    assert asked.status_code == 403


def test_requests_of_the_same_origin_are_allowed(scripted: LiveServer, http: httpx.Client) -> None:
    answer = http.post("/v1/chat/completions", json=CHAT, headers={"origin": scripted.url})
    assert answer.status_code == 200
    own = {"origin": "http://localhost:5", "host": "localhost:5"}
    assert http.get("/v1/models", headers=own).status_code == 200


def test_an_allowed_origin_can_read_responses_including_401(
    guarded: LiveServer, store: Path
) -> None:
    key = create_key(store, "front")
    with guarded.client() as http:
        for origin in (FRONT_END, "app://obsidian.md"):
            asked = http.options(
                "/v1/chat/completions",
                headers={
                    "origin": origin,
                    "access-control-request-method": "POST",
                    "access-control-request-headers": "authorization, content-type",
                },
            )
            assert asked.status_code == 200
            assert asked.headers["access-control-allow-origin"] == origin
            assert "authorization" in asked.headers["access-control-allow-headers"]
            refused = http.post("/v1/chat/completions", json=CHAT, headers={"origin": origin})
            assert refused.status_code == 401
            assert refused.headers["access-control-allow-origin"] == origin
            headers = {"origin": origin, "authorization": f"Bearer {key}"}
            answer = http.post("/v1/chat/completions", json=CHAT, headers=headers)
            assert answer.status_code == 200
            assert answer.headers["access-control-allow-origin"] == origin
            assert "x-request-id" in answer.headers["access-control-expose-headers"]
        assert http.get("/health", headers={"origin": FRONT_END + ".evil"}).status_code == 403
        assert http.get("/health", headers={"host": "llm.example.org:80"}).status_code == 200
        assert http.get("/health", headers={"host": "example.org"}).status_code == 421


# -- the head of a request ------------------------------------------------------------------


def test_headers_that_are_too_large_are_431_with_the_headers_name(http: httpx.Client) -> None:
    large = http.get("/v1/models", headers={"cookie": "c" * 33_000, "x-small": "s"})
    error = error_of(large, 431)
    assert error["param"] == "headers.cookie"
    assert "32768 bytes" in error["message"]
    many = http.get("/v1/models", headers=[(f"x-{number}", "1") for number in range(130)])
    assert error_of(many, 431)["param"] == "headers"


def test_a_url_that_is_too_long_is_414(http: httpx.Client) -> None:
    error = error_of(http.get("/v1/models/" + "a" * 9000), 414)
    assert error["param"] == "url"
    assert len(error["message"]) < 100


def test_endless_headers_are_refused_by_the_http_server(scripted: LiveServer) -> None:
    address = scripted.url.removeprefix("http://").split(":")
    with socket.create_connection((address[0], int(address[1])), timeout=30) as opened:
        opened.sendall(b"GET / HTTP/1.1\r\nHost: localhost\r\nX: ")
        received = b""
        try:
            for _ in range(100):
                opened.sendall(b"x" * 4096)
            received = opened.recv(4096)
        except ConnectionError:
            pass  # Closed while we were still talking.
        assert b"200" not in received[:20]
    with scripted.client() as http:
        assert http.get("/livez").status_code == 200


def test_the_key_store_file_has_the_documented_format(store: Path, tmp_path: Path) -> None:
    key = create_key(tmp_path / "k.json", "one")
    (entry,) = json.loads((tmp_path / "k.json").read_text())["keys"]
    assert entry.keys() == {"name", "sha256", "created", "admin"}
    assert key not in json.dumps(entry)
    assert [each.name for each in read_store(tmp_path / "k.json")] == ["one"]
