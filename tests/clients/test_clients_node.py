"""JavaScript clients against a live server: the `openai` package, and Vercel's AI SDK."""

from __future__ import annotations

import json
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
from live import LiveServer

CLIENTS = Path(__file__).resolve().parent


@pytest.fixture(scope="module")
def node() -> str:
    found = shutil.which("node")
    if found is None:
        pytest.skip("there is no Node.js")
    if not (CLIENTS / "node_modules").is_dir():
        pytest.skip("the packages of tests/clients are not installed (make setup-clients)")
    return found


def run(node: str, live: LiveServer, script: str, case: str) -> dict[str, Any]:
    """JSON output of a script."""
    command = [node, script, f"{live.url}/v1", case]
    done = subprocess.run(
        command, cwd=CLIENTS, capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 0, done.stderr
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def test_run_tools(node: str, scripted: LiveServer) -> None:
    found = run(node, scripted, "openai.mjs", "runTools")
    assert found["asked"] == [{"city": "Rome"}]
    assert found["content"] == "Rome is warm."
    assert found["roles"] == ["user", "assistant", "tool", "assistant"]
    assert found["usage"]["completion_tokens"] > 0


def test_streamed_run_tools(node: str, scripted: LiveServer) -> None:
    found = run(node, scripted, "openai.mjs", "streamedRunTools")
    assert found["content"] == "Rome is warm."
    assert found["deltas"] == "Wait.Rome is warm."


def test_responses_continue_stored_responses(node: str, scripted: LiveServer) -> None:
    found = run(node, scripted, "openai.mjs", "responses")
    assert found["types"][0] == "response.created"
    assert found["types"][-1] == "response.completed"
    assert found["kinds"] == ["reasoning", "message", "function_call"]
    assert found["content"] == "Rome is warm."


def test_errors_have_the_packages_types(node: str, scripted: LiveServer) -> None:
    found = run(node, scripted, "openai.mjs", "errors")
    assert found == {"name": "NotFoundError", "status": 404, "code": "model_not_found"}


@pytest.mark.parametrize("case", ["generate", "stream"])
def test_the_ai_sdk_runs_its_tool(node: str, scripted: LiveServer, case: str) -> None:
    found = run(node, scripted, "ai_sdk.mjs", case)
    first, second = found["steps"]
    assert first == {
        "reasoning": "Hm.",
        "text": "Wait.",
        "calls": [{"toolName": "get_weather", "input": {"city": "Rome"}}],
        "finish": "tool-calls",
    }
    assert second == {
        "reasoning": "Warm.",
        "text": "Rome is warm.",
        "calls": [],
        "finish": "stop",
    }
    assert found["tokens"] > 0
    if case == "stream":
        assert {"reasoning-delta", "text-delta", "tool-input-delta"} <= set(found["parts"])
