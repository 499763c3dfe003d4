"""What both processes keep after hundreds of requests that differ in all that may be a key.

All containers that the garbage collector knows are compared at two moments. One that grew has no
bound. The bounds that stand in bytes are small here, so that they are reached before.
"""

from __future__ import annotations

import gc
from asyncio import BaseEventLoop
from collections import Counter, OrderedDict, defaultdict, deque
from collections.abc import Iterator
from functools import _lru_cache_wrapper
from pathlib import Path
from sqlite3 import Connection
from types import FrameType
from typing import Any

import httpx
import pytest
from _pytest.logging import LogCaptureHandler
from engines import request, run, tiny_engine, tiny_model
from grammars import TAGS
from live import live_server

from glmd.api import retries
from glmd.ipc import GrammarSpec
from glmd.kv_cache import node
from glmd.structured_output.compiler import build_grammar
from glmd.structured_output.request import JsonSchema, OutputSpec
from glmd.utils.lru import LRUCache

ROUND = 8
"""Distinct values of each kind in a round."""

CONTAINERS = {dict, OrderedDict, defaultdict, Counter, list, set, deque, bytearray}

Sizes = dict[int, tuple[int, Any]]


@pytest.fixture(autouse=True, scope="module")
def _whole_heap() -> Iterator[None]:
    """The walk finds no containers in the collector's permanent generation."""
    gc.unfreeze()
    yield
    gc.freeze()


def containers() -> Sizes:
    """Length and value of each container without a bound of its own, by id."""
    gc.collect()
    objects = gc.get_objects()
    # `type`, as `isinstance` asks objects that stand for others.
    caches = [
        o for o in objects if type(o) is _lru_cache_wrapper and o.cache_parameters()["maxsize"]
    ]
    # A connection removes its weak references to dead cursors after 200 of them.
    databases = [o for o in objects if type(o) is Connection]
    bounded = {id(value) for value in gc.get_referents(*caches, *databases)}
    bounded |= {id(o._entries) for o in objects if type(o) is LRUCache}
    # The loop removes cancelled timers when they are the half of a hundred.
    bounded |= {id(o._scheduled) for o in objects if issubclass(type(o), BaseEventLoop)}
    bounded |= {id(o.records) for o in objects if type(o) is LogCaptureHandler}  # pytest's
    # What holds only numbers or text is known to its owner alone.
    found = {id(o): (len(o), o) for o in gc.get_referents(*objects) if type(o) in CONTAINERS}
    return {
        id: each
        for id, each in found.items()
        if id not in bounded and getattr(each[1], "maxlen", None) is None
    }


def grown(before: Sizes, after: Sizes) -> list[str]:
    """Containers, with their owners, that grew by a good part of a round."""
    return [
        f"{size} to {after[key][0]}: {owners(value)} {str(value)[:200]}"
        for key, (size, value) in before.items()
        if key in after and after[key][1] is value and after[key][0] - size > ROUND // 2
    ]


def owners(value: Any) -> list[str]:
    found = []
    for owner in gc.get_referrers(value):
        if not isinstance(owner, FrameType) and type(owner) is not tuple:
            names = [n for n, v in getattr(owner, "__dict__", {}).items() if v is value]
            found.append(f"{type(owner).__name__}.{names[0]}" if names else type(owner).__name__)
    return found


def rounds(start: int, count: int = ROUND) -> Iterator[tuple[int, str]]:
    for number in range(start, start + count):
        yield number, f"name_{number}"


def attack(url: str, keys: tuple[str, ...], start: int) -> None:
    """Send requests that differ in all that may be a key of something."""
    for number, name in rounds(start):
        key = keys[number % len(keys)]
        own = {"authorization": f"Bearer {key}", "x-request-id": f"id-{number}"}
        with httpx.Client(base_url=url, headers=own, timeout=30) as http:
            schema = {"type": "object", "properties": {name: {"pattern": f"^a{{{number}}}$"}}}
            text = f"⟦</think>{name}⟧"
            messages = [{"role": "user", "content": text}]
            chat: dict[str, Any] = {
                "messages": messages,
                "user": name,
                "cache_salt": name,
                "tools": [{"type": "function", "function": {"name": name, "parameters": schema}}],
                "stop": [name * 20],
            }
            form = {"type": "json_schema", "json_schema": {"name": name, "schema": schema}}
            http.post("/v1/chat/completions", json=chat, headers={"authorization": name})
            http.request(f"METHOD{number}", f"/{name}")
            http.get(f"/v1/models/{name}", headers={"origin": f"http://{name}", "host": name})
            http.post("/v1/chat/completions", json={**chat, "model": name})
            http.post("/v1/chat/completions", json={**chat, "messages": number})
            http.post("/v1/chat/completions", json=chat)
            http.post("/v1/chat/completions", json={"messages": messages, "response_format": form})
            endless = {"prompt": f"⟦{name}{{wait}}⟧", "stream": True}
            with http.stream("POST", "/v1/completions", json=endless) as response:
                next(response.iter_bytes())  # the client leaves
            http.post("/tokenize", json={"prompt": name * 99})
            http.post("/detokenize", json={"tokens": [number + 10**6]})
            plain = {"input": text, "instructions": name, "metadata": {name: name}}
            made = http.post("/v1/responses", json=plain).json()
            http.post("/v1/responses", json={**plain, "previous_response_id": made["id"]})
            http.post("/v1/responses", json={**plain, "background": True})
            http.delete(f"/v1/responses/{made['id']}")
            http.get(f"/v1/responses/{name}")
            http.post("/v1/messages", json={"max_tokens": 5, "system": name, "messages": messages})
            http.post(f"/glmd/requests/{name}/cancel")
            http.get("/glmd/status")
            http.get("/metrics")


def test_the_api_process_keeps_nothing_without_a_bound(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(retries, "KEEP_BYTES", 20_000)
    keys = tmp_path / "keys"
    keys.touch(0o600)
    keys.write_text("one\ntwo\n")
    with live_server(
        api_key="admin", api_key_file=keys, disk_file=tmp_path / "kept", response_store=100_000
    ) as live:
        vocabulary = list(range(live.service.tokenizer.vocab_size))
        headers = {"authorization": "Bearer admin"}
        with live.client(headers=headers) as http:  # the bytes of each token are kept
            assert http.post("/detokenize", json={"tokens": vocabulary}).status_code == 200
        for start in (0, ROUND):
            attack(live.url, ("admin", "one", "two"), start)
        live.wait_until_idle()
        before = containers()
        attack(live.url, ("admin", "one", "two"), 2 * ROUND)
        live.wait_until_idle()
        found = grown(before, containers())
        assert not found, "\n".join(found)


def test_the_engine_keeps_nothing_without_a_bound(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(node, "MAX_EVICTED_CHILDREN", ROUND)
    engine = tiny_engine(tiny_model(max_position_embeddings=64), kv_tokens=64 + 256, max_running=4)

    def serve(start: int) -> None:
        for number, name in rounds(start):
            form = OutputSpec(JsonSchema({"enum": [f"value {number}"]}, "schema"))
            grammar = GrammarSpec(grammar=build_grammar(form, TAGS).text)
            prompt = [*range(10, 25), 30 + number, *range(10, 30)]
            fields = {"client": name, "max_tokens": 3}
            salted = request(f"{name} salt", prompt, cache_salt=name, **fields)
            shared = request(f"{name} form", prompt, grammar=grammar, **fields)
            running = run(engine, salted, shared)
            running.submit(request(f"{name} gone", prompt, **fields))
            engine.step()
            engine.cancel(f"{name} gone")
            running.finish()

    for start in range(0, 4 * ROUND, ROUND):
        serve(start)
    before = containers()
    serve(4 * ROUND)
    found = grown(before, containers())
    assert not found, "\n".join(found)
    assert engine.stats().evicted_tokens > 1000


def test_the_walk_finds_what_has_no_bound() -> None:
    kept: dict[str, int] = {}
    owner = [kept]
    before = containers()
    owner[0].update((name, number) for number, name in rounds(0))
    assert len(grown(before, containers())) == 1
