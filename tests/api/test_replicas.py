"""Replicas behind a router: what is computed, what is lost when one dies, and one that is added."""

from __future__ import annotations

import json
import os
import re
import shlex
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest
from kv_listener import Listener
from paths import ROOT
from replica_router import Lost, Replica, Router

WORDS = ["river", "stone", "lamp", "paper", "green", "seven", "window", "table", "garden", "music"]


def is_ready(replica: Replica) -> bool:
    """What a router's health check finds."""
    try:
        return replica.http.get("/health").status_code == 200
    except httpx.TransportError:
        return False


@dataclass
class Started:
    process: subprocess.Popen[bytes]
    replica: Replica

    def wait(self) -> None:
        """Wait until it is ready."""
        deadline = time.monotonic() + 120
        while time.monotonic() < deadline:
            if is_ready(self.replica):
                return
            time.sleep(0.2)
        raise AssertionError("not ready")

    def computed(self) -> int:
        """Prompt tokens that it has computed, once it is idle."""
        while True:
            text = self.replica.http.get("/metrics").text
            running, waiting, computed = (
                float(re.search(rf"^{name} ([\d.e+]+)$", text, re.MULTILINE)[1])  # type: ignore[index]
                for name in (
                    "glmd_num_sequences_running",
                    "glmd_num_sequences_waiting",
                    "glmd_prompt_tokens_computed_total",
                )
            )
            if not running and not waiting:
                return int(computed)
            time.sleep(0.2)


def free_ports(count: int) -> list[int]:
    with ExitStack() as stack:
        sockets = [
            stack.enter_context(socket.create_server(("127.0.0.1", 0))) for _ in range(count)
        ]
        return [each.getsockname()[1] for each in sockets]


@contextmanager
def started(folder: Path, port: int, peers: list[int]) -> Iterator[Started]:
    """One `glmd serve` of the demo, in its own process."""
    events, replay = free_ports(2)
    endpoints = [f"tcp://127.0.0.1:{each}" for each in (events, replay)]
    environment = os.environ | {
        "GLMD_KV_EVENTS": endpoints[0],
        "GLMD_KV_EVENTS_REPLAY": endpoints[1],
        "GLMD_MEMORY_BUDGET": "1GiB",
        "GLMD_DISK_CACHE": "0",
        "GLMD_PEERS": ",".join(f"http://127.0.0.1:{peer}" for peer in peers),
        "GLMD_LOG_FILE": str(folder / f"{port}.log"),
    }
    process = subprocess.Popen(
        [sys.executable, "-m", "glmd", "serve", "demo", "--port", str(port)],
        env=environment,
        start_new_session=True,
    )
    listener = Listener(*endpoints)
    try:
        yield Started(process, Replica(f"http://127.0.0.1:{port}", listener))
    finally:
        process.terminate()
        process.wait(60)
        listener.close()


def user(text: str) -> dict[str, str]:
    return {"role": "user", "content": text}


def opening(number: int, words: int = 500) -> list[dict[str, str]]:
    """The first messages of an agent: the same system prompt, then a file of its own."""
    text = " ".join(WORDS[(7 * number + i * (number + 3)) % len(WORDS)] for i in range(words))
    system = {"role": "system", "content": "You are an agent that edits files. " * 4}
    return [system, user(f"File {number}: {text}")]


def chat(messages: list[dict[str, str]], tokens: int = 12) -> dict[str, Any]:
    return {
        "model": "glmd-demo",
        "messages": messages,
        "enable_thinking": False,
        "max_tokens": tokens,
        "min_tokens": tokens,
        "temperature": 0,
    }


def read(router: Router, body: dict[str, Any]) -> tuple[str, int, Replica]:
    """The text of an answer, its tokens, and who gave it."""
    text, count, by = "", 0, None
    for by, line in router.stream(body):
        data = line.removeprefix("data: ")
        if not line.startswith("data: ") or data == "[DONE]":
            continue
        chunk = json.loads(data)
        if "error" in chunk:
            raise Lost(by)
        text += "".join(choice["delta"].get("content") or "" for choice in chunk["choices"])
        count = (chunk.get("usage") or {}).get("completion_tokens", count)
    assert by is not None
    return text, count, by


def new_tokens(ids: list[int], earlier: list[list[int]]) -> int:
    """Tokens of a prompt behind the longest prefix that an earlier one has."""
    longest = 0
    for other in earlier:
        same = next((i for i, (a, b) in enumerate(zip(ids, other, strict=False)) if a != b), None)
        longest = max(longest, min(len(ids), len(other)) if same is None else same)
    return len(ids) - longest


def test_replicas_behind_a_router(tmp_path: Path) -> None:
    with ExitStack() as stack:
        ports = free_ports(3)
        first, second, third = (
            stack.enter_context(started(tmp_path, port, ports)) for port in ports
        )
        for each in (first, second, third):
            each.wait()
        check_continued(first, second)
        with documented_router([first.replica, second.replica]) as documented:
            check_computed(documented, [first, second], range(10, 16))
        router = Router([first.replica, second.replica])
        check_computed(router, [first, second], range(6))
        check_killed(router, [first, second])
        check_added(router, third)
        check_drained(router, third)


def check_continued(first: Started, second: Started) -> None:
    """A response that one replica stores is continued by another."""
    body: dict[str, Any] = {"input": "Hello, I am Nora.", "max_output_tokens": 40}
    one = first.replica.http.post("/v1/responses", json=body).json()
    body |= {"input": "What is 17 + 25?", "previous_response_id": one["id"]}
    two = second.replica.http.post("/v1/responses", json=body)
    assert two.status_code == 200, two.text
    items = second.replica.http.get(f"/v1/responses/{two.json()['id']}/input_items").json()
    assert "I am Nora" in str(items)


@contextmanager
def documented_router(replicas: list[Replica]) -> Iterator[Router]:
    """The router that docs/replicas.md starts, with other addresses."""
    page = (ROOT / "docs" / "replicas.md").read_text(encoding="utf-8")
    [command] = re.findall(r"^smg launch (?:.*\\\n)*.*", page, re.MULTILINE)
    smg = Path(sys.executable).with_name("smg")
    if not smg.exists():
        pytest.skip("smg is not installed: make setup-clients")
    port, metrics = free_ports(2)
    changed = {
        r"http://mac-1.*:8000": " ".join(each.url for each in replicas),
        r"--port 8080": f"--port {port} --prometheus-port {metrics}",
        r"--api-key \$KEY": "",
    }
    for written, used in changed.items():
        command, count = re.subn(written, used, command)
        assert count == 1, written
    words = shlex.split(command.replace("\\\n", ""))
    process = subprocess.Popen([smg, *words[1:]], stdout=subprocess.DEVNULL)
    try:
        router = DocumentedRouter(replicas, f"http://127.0.0.1:{port}")
        deadline = time.monotonic() + 60
        while not router.knows(len(replicas)):
            assert time.monotonic() < deadline, "the router does not find the replicas"
            time.sleep(0.2)
        yield router
    finally:
        process.terminate()
        process.wait(30)


class DocumentedRouter(Router):
    """A router in a process of its own."""

    def __init__(self, replicas: list[Replica], url: str) -> None:
        super().__init__(replicas)
        self._http = httpx.Client(base_url=url, timeout=60)

    def knows(self, count: int) -> bool:
        try:
            workers = self._http.get("/workers").json()["workers"]
        except httpx.TransportError:
            return False
        return count == sum(bool(worker["is_healthy"]) for worker in workers)

    def stream(self, body: dict[str, Any]) -> Iterator[tuple[Replica, str]]:
        """The lines of a streamed answer. Who sent them is not known."""
        sent = body | {"stream": True, "stream_options": {"include_usage": True}}
        with self._http.stream("POST", "/v1/chat/completions", json=sent) as answer:
            assert answer.status_code == 200, answer.read()
            for line in answer.iter_lines():
                yield self.replicas[0], line


def check_computed(router: Router, servers: list[Started], agents: range) -> None:
    """The agents' turns compute hardly more than one large cache would."""
    before = [each.computed() for each in servers]

    def agent(number: int) -> list[tuple[list[int], int]]:
        messages, turns = opening(number), []
        for turn in range(3):
            body = chat(messages)
            text, count, _ = read(router, body)
            turns.append((router.tokens(body), count))
            messages = [*messages, {"role": "assistant", "content": text}, user(f"Go on, {turn}.")]
        return turns

    with ThreadPoolExecutor(4) as pool:
        done = list(pool.map(agent, agents))
    earlier: list[list[int]] = []
    least = 0
    for turns in done:
        answered = 0
        for ids, count in turns:
            least += new_tokens(ids, earlier) - answered
            earlier.append(ids)
            answered = count
    computed = [each.computed() - at for each, at in zip(servers, before, strict=True)]
    print(f"computed {computed}, least {least}: {sum(computed) / least:.3f}")
    assert all(computed), "one replica did everything"
    assert sum(computed) <= 1.10 * least


def check_killed(router: Router, servers: list[Started]) -> None:
    """Nothing is lost but what the replica that is killed was answering."""
    first, second = servers
    began = threading.Semaphore(0)
    outcomes: list[tuple[str, Replica]] = []

    def ask(number: int) -> None:
        by = None
        try:
            for by, line in router.stream(chat(opening(number, 30), 300)):
                if '"content":"' in line:
                    began.release()
                if line == "data: [DONE]":
                    outcomes.append(("answered", by))
        except Lost as error:
            outcomes.append(("lost", error.replica))

    threads = [threading.Thread(target=ask, args=(100 + number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    while not all(each.replica.in_flight for each in servers):
        time.sleep(0.01)
    for _ in range(4):
        began.acquire(timeout=30)
    os.killpg(second.process.pid, signal.SIGKILL)
    for thread in threads:
        thread.join(120)
    assert len(outcomes) == len(threads)
    assert {by for outcome, by in outcomes if outcome == "lost"} <= {second.replica}
    # Those that come now find out, and are answered by the other one.
    for number in range(2):
        _, count, by = read(router, chat(opening(200 + number, 30)))
        assert count == 12
        assert by is first.replica
    router.replicas.remove(second.replica)


def check_added(router: Router, added: Started) -> None:
    """A replica that is added takes load, and only what is not cached elsewhere."""
    before = added.computed()
    router.replicas.append(added.replica)
    cached = chat(opening(0))
    _, _, by = read(router, cached)
    assert by is not added.replica
    with ThreadPoolExecutor(4) as pool:
        done = list(
            pool.map(lambda number: read(router, chat(opening(number, 30))), range(300, 306))
        )
    assert {by for _, _, by in done} == set(router.replicas)
    assert added.computed() > before


def check_drained(router: Router, drained: Started) -> None:
    """A replica that is told to stop finishes its answers; new requests go elsewhere."""
    began = threading.Semaphore(0)
    texts: list[str] = []

    def ask() -> None:
        with drained.replica.http.stream(
            "POST", "/v1/chat/completions", json=chat(opening(400, 30), 300) | {"stream": True}
        ) as response:
            for line in response.iter_lines():
                texts.append(line)
                began.release()

    thread = threading.Thread(target=ask)
    thread.start()
    assert began.acquire(timeout=30)
    drained.process.terminate()
    while is_ready(drained.replica):
        time.sleep(0.01)
    for number in range(401, 404):
        _, count, by = read(router, chat(opening(number, 30)))
        assert count == 12
        assert by is not drained.replica
    thread.join(120)
    assert "data: [DONE]" in texts, texts[-3:]
    assert drained.process.wait(60) == 0


@pytest.mark.parametrize("path", ["/v1/responses", "/v1/messages"])
def test_a_replica_without_the_state_computes_again(path: str, http: httpx.Client) -> None:
    """A conversation whose turns another replica generated is continued from its text."""
    said = [user("One."), {"role": "assistant", "content": "Two."}, user("⟦Three.⟧")]
    body = {"input": said} if path == "/v1/responses" else {"messages": said, "max_tokens": 50}
    assert "Three." in http.post(path, json=body).text
