"""`/metrics`: formats, and agreement with the usage in responses."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Callable, Iterator
from typing import Any

import httpx
import pytest
import sse
from live import LiveServer, live_server
from paths import ROOT
from prometheus_client.openmetrics.parser import (
    text_string_to_metric_families as read_openmetrics,
)
from prometheus_client.parser import text_string_to_metric_families

from glmd.checkpoint.hub import DEMO

DASHBOARD = ROOT / "deploy" / "grafana" / "glmd.json"
ALERTS = ROOT / "deploy" / "prometheus" / "glmd-alerts.yml"

Values = dict[tuple[str, tuple[tuple[str, str], ...]], float]


def scrape(http: httpx.Client) -> Values:
    """Parse all samples, by name and labels."""
    response = http.get("/metrics")
    assert response.status_code == 200
    assert response.headers["content-type"].startswith("text/plain; version=0.0.4")
    values: Values = {}
    for family in text_string_to_metric_families(response.text):
        assert family.documentation, family.name
        assert family.name.startswith(("glmd_", "vllm:"))
        for sample in family.samples:
            key = sample.name, tuple(sorted(sample.labels.items()))
            assert key not in values
            values[key] = sample.value
    return values


def value(values: Values, name: str, **labels: str) -> float:
    return values.get((name, tuple(sorted(labels.items()))), 0.0)


@pytest.fixture(scope="module")
def live() -> Iterator[LiveServer]:
    with live_server(keep_alive=0.2, api_key="secret") as server:
        yield server


@pytest.fixture
def http(live: LiveServer) -> Iterator[httpx.Client]:
    with live.client(headers={"authorization": "Bearer secret"}) as client:
        yield client


def wait_until(http: httpx.Client, holds: Callable[[Values], bool]) -> Values:
    deadline = time.monotonic() + 20
    while not holds(values := scrape(http)):
        assert time.monotonic() < deadline, values
        time.sleep(0.02)
    return values


def chat(text: str) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": text}]}


def ask_everything(http: httpx.Client, text: str) -> list[dict[str, int]]:
    """Send one prompt to every API, streamed and not; return the normalised usage of each."""
    usages = []
    for stream in (False, True):
        calls: list[tuple[str, dict[str, Any]]] = [
            ("/v1/chat/completions", {**chat(text), "max_tokens": 12}),
            ("/v1/completions", {"prompt": [text, text + "!"], "max_tokens": 12}),
            ("/v1/responses", {"input": text, "max_output_tokens": 12}),
            ("/v1/messages", {**chat(text), "max_tokens": 12}),
        ]
        for path, body in calls:
            body["stream"] = stream
            if stream and "completions" in path:
                body["stream_options"] = {"include_usage": True}
            response = http.post(path, json=body)
            assert response.status_code == 200, response.text
            usages.append(usage_of(path, response, stream))
    return usages


def usage_of(path: str, response: httpx.Response, stream: bool) -> dict[str, int]:
    if "completions" in path:
        answer = sse.read(response.content).chunks[-1] if stream else response.json()
        usage = answer["usage"]
        return {
            "prompt": usage["prompt_tokens"],
            "cached": usage["prompt_tokens_details"]["cached_tokens"],
            "generated": usage["completion_tokens"],
        }
    if path == "/v1/responses":
        events = sse.read_named(response.content) if stream else []
        usage = (events[-1]["response"] if stream else response.json())["usage"]
        return {
            "prompt": usage["input_tokens"],
            "cached": usage["input_tokens_details"]["cached_tokens"],
            "generated": usage["output_tokens"],
        }
    if stream:
        events = sse.read_named(response.content)
        usage = {**events[0]["message"]["usage"]}
        for event in events:
            usage |= event.get("usage", {})
    else:
        usage = response.json()["usage"]
    cached = usage.get("cache_read_input_tokens") or 0
    return {
        "prompt": usage["input_tokens"] + cached,
        "cached": cached,
        "generated": usage["output_tokens"],
    }


def check_sums(before: Values, after: Values, usages: list[dict[str, int]]) -> None:
    for name, field in (
        ("glmd_prompt_tokens_total", "prompt"),
        ("glmd_prompt_tokens_cached_total", "cached"),
        ("glmd_generation_tokens_total", "generated"),
    ):
        told = sum(usage[field] for usage in usages)
        assert value(after, name) - value(before, name) == told, name


def test_counters_equal_the_sum_of_reported_usage(http: httpx.Client) -> None:
    before = scrape(http)
    usages = ask_everything(http, "⟦Hm.</think>One two three.⟧")
    after = scrape(http)
    check_sums(before, after, usages)
    for api, count in (("chat", 2), ("completions", 4), ("responses", 2), ("messages", 2)):
        ended = sum(
            v - before.get(key, 0)
            for key, v in after.items()
            if key[0] == "glmd_requests_total" and ("api", api) in key[1]
        )
        assert ended == count, api
    for name in (
        "time_to_first_token", "e2e_request_latency", "request_queue_time", "request_prefill_time",
    ):  # fmt: skip
        full = f"glmd_{name}_seconds_count"
        assert value(after, full) - value(before, full) == 10, full
    gaps = "glmd_inter_token_latency_seconds_count"
    generated = sum(usage["generated"] for usage in usages)
    # Tokens that arrive together with the first have no time between them.
    assert 0 < value(after, gaps) - value(before, gaps) <= generated - 10


def test_counters_of_the_demo_equal_its_usage_and_count_drafts() -> None:
    config = {"mtp": 1}
    with (
        live_server(folder=DEMO, engine="glmd.engine.core", config=config) as live,
        live.client() as http,
    ):
        before = scrape(http)
        usages = ask_everything(http, "What is 17 + 25?")
        live.wait_until_idle()
        # The engine's own numbers come once a second.
        after = wait_until(
            http,
            lambda v: (
                value(v, "glmd_num_sequences_running") == 0
                and value(v, "glmd_kv_cache_tokens") > 0
                and value(v, "glmd_kv_cache_evictable_tokens") == value(v, "glmd_kv_cache_tokens")
            ),
        )
        check_sums(before, after, usages)
        assert value(after, "glmd_prompt_tokens_cached_total") > 0
        assert value(after, "glmd_engine_step_rows_total") >= value(
            after, "glmd_prompt_tokens_computed_total"
        )
        assert value(after, "glmd_engine_step_seconds_total") > 0
        assert 0 < value(after, "glmd_kv_cache_usage_perc") < 1
        assert value(after, "glmd_kv_cache_evictable_tokens") == value(
            after, "glmd_kv_cache_tokens"
        )
        assert value(after, "glmd_kv_cache_nodes") >= value(after, "glmd_kv_cache_leaves") > 0
        for process in ("api", "engine"):
            assert value(after, "glmd_process_footprint_bytes", process=process) > 2**20
        for kind in ("weight", "kv", "active"):
            assert value(after, "glmd_memory_bytes", kind=kind) > 0
        drafted = value(after, "glmd_spec_decode_num_draft_tokens_total")
        accepted = value(after, "glmd_spec_decode_num_accepted_tokens_total")
        assert 0 < accepted <= drafted
        assert 1 < value(after, "glmd_spec_decode_mean_acceptance_length") <= 2
        (info,) = [dict(key[1]) for key in after if key[0] == "glmd_model_info"]
        assert info["has_mtp"] == "true"


def test_requests_are_counted_by_finish_reason(http: httpx.Client) -> None:
    before = scrape(http)
    path = "/v1/chat/completions"
    http.post(path, json=chat("⟦{refuse}⟧"))
    http.post(path, json={**chat("⟦</think>One two three⟧"), "max_tokens": 2})
    with http.stream(
        "POST", path, json={**chat("⟦</think>One{wait}⟧"), "stream": True}
    ) as response:
        chunks = response.iter_raw()  # The response is closed where this is forgotten.
        next(chunks)
        wait_until(http, lambda v: value(v, "glmd_num_requests_running") == 1)
    ways = [
        ("glmd_requests_total", {"api": "chat", "finished_reason": reason})
        for reason in ("error", "length", "cancelled")
    ]
    after = wait_until(http, lambda v: all(value(v, n, **labels) > 0 for n, labels in ways))
    for name, labels in ways:
        assert value(after, name, **labels) - value(before, name, **labels) == 1
    assert value(after, "glmd_num_requests_running") == 0


def test_responses_are_counted_by_route_and_status_not_by_unknown_paths(
    http: httpx.Client,
) -> None:
    before = scrape(http)
    http.get("/v1/models/tiny")
    http.get("/v1/models/nope")
    http.head("/v1/models")
    http.get("/nowhere/1")
    http.get("/nowhere/2")
    after = scrape(http)
    for route, status, count in (
        ("/v1/models/{id:path}", "200", 1),
        ("/v1/models/{id:path}", "404", 1),
        ("none", "404", 2),
    ):
        labels = {"method": "GET", "route": route, "status": status}
        name = "glmd_http_responses_total"
        assert value(after, name, **labels) - value(before, name, **labels) == count
    heads = {"method": "HEAD", "route": "/v1/models", "status": "200"}
    assert value(after, "glmd_http_responses_total", **heads) == 1
    assert not [key for key in after if "/nowhere" in str(key)]


def test_metrics_require_the_key(live: LiveServer) -> None:
    with live.client() as stranger:
        assert stranger.get("/metrics").status_code == 401


def test_openmetrics_is_chosen_by_the_accept_header(http: httpx.Client) -> None:
    response = http.get("/metrics", headers={"accept": "application/openmetrics-text"})
    assert response.headers["content-type"].startswith("application/openmetrics-text")
    states = next(f for f in read_openmetrics(response.text) if f.name == "glmd_engine_state")
    assert {s.labels["glmd_engine_state"]: s.value for s in states.samples}["ready"] == 1


def test_engine_restarts_are_counted_and_the_state_is_shown() -> None:
    with live_server() as live, live.client() as http:
        assert value(scrape(http), "glmd_engine_restarts_total") == 0
        http.post("/v1/chat/completions", json=chat("⟦{die}⟧"))
        values = wait_until(http, lambda v: value(v, "glmd_engine_restarts_total") >= 1)
        shown = [key for key in values if key[0] == "glmd_engine_state"]
        assert sum(values[key] for key in shown) == 1


def names_in(expression: str) -> set[str]:
    return set(re.findall(r"\bglmd_\w+", expression))


def test_dashboard_and_alerts_use_existing_metrics(http: httpx.Client) -> None:
    http.post("/v1/chat/completions", json=chat("⟦</think>One two.⟧"))
    there = {key[0] for key in scrape(http)}
    panels = json.loads(DASHBOARD.read_text())["panels"]
    queries = [t["expr"] for panel in panels for t in panel.get("targets", ())]
    alerts = re.findall(r"^ +expr: (.*)$", ALERTS.read_text(), re.MULTILINE)
    assert len(queries) > 20
    assert len(alerts) == 4
    for query in [*queries, *alerts]:
        assert names_in(query), query
        assert names_in(query) <= there, query


def test_every_metric_is_documented(http: httpx.Client) -> None:
    text = (DASHBOARD.parents[2] / "docs" / "monitoring.md").read_text()
    families = text_string_to_metric_families(http.get("/metrics").text)
    # Counters' names come without `_total`, infos' with `_info`.
    missing = [f.name for f in families if f"`{f.name.removesuffix('_info')}`" not in text]
    assert missing == []


def test_routers_read_the_load_under_vllms_names(http: httpx.Client) -> None:
    values = scrape(http)
    for name in ("num_requests_running", "num_requests_waiting"):
        shown = value(values, f"vllm:{name}", model_name="test/tiny")
        assert shown == value(values, f"glmd_{name}")
    usage = {key[0]: v for key, v in values.items() if key[0].endswith("cache_usage_perc")}
    assert usage.keys() == {
        "vllm:kv_cache_usage_perc", "vllm:gpu_cache_usage_perc", "glmd_kv_cache_usage_perc"
    }  # fmt: skip
    assert usage["vllm:kv_cache_usage_perc"] == usage["vllm:gpu_cache_usage_perc"]
