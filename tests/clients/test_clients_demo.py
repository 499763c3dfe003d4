"""Clients on the demo checkpoint: long conversations with a tool, and tasks of lm-eval.

No client sends a turn back as the model wrote it, but every turn computes only the new tokens: the
user's or the tool's text, and the tags around it.
"""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import anthropic
import openai
import pytest
from anthropic.types import ToolParam
from live import LiveServer, live_server
from openai.types.chat import ChatCompletionFunctionToolParam
from openai.types.responses import FunctionToolParam
from paths import ROOT

from glmd.checkpoint.hub import DEMO

TURNS = 10

SLACK = 4
"""Tokens that a returning turn may compute: its last token, which has no KV, the end of the turn,
and the prompt's last token."""

SCHEMA: dict[str, object] = {
    "type": "object",
    "properties": {"city": {"type": "string", "maxLength": 12}},
    "required": ["city"],
    "additionalProperties": False,
}


@pytest.fixture(scope="module")
def demo() -> Iterator[LiveServer]:
    with live_server(folder=DEMO, engine="glmd.engine.core") as live:
        yield live


def result(turn: int) -> str:
    return f"{15 + turn} degrees. Now the next city."


def test_chat_completions_without_reasoning(demo: LiveServer) -> None:
    """OpenAI's client does not send reasoning back."""
    tool: ChatCompletionFunctionToolParam = {
        "type": "function",
        "function": {"name": "get_weather", "parameters": SCHEMA},
    }
    messages: list[Any] = [{"role": "user", "content": "How is the weather in Rome?"}]
    whole = 0
    with openai.OpenAI(base_url=f"{demo.url}/v1", api_key="none", max_retries=0) as client:
        for turn in range(TURNS):
            answer = client.chat.completions.create(
                model="default",
                messages=messages,
                tools=[tool],
                tool_choice="required",
                parallel_tool_calls=False,
                temperature=0,
                extra_body={"thinking_budget": 20},
            )
            usage = answer.usage
            assert usage is not None
            assert usage.prompt_tokens_details is not None
            assert (usage.prompt_tokens_details.cached_tokens or 0) >= whole - SLACK
            whole = usage.total_tokens
            message = answer.choices[0].message
            (call,) = message.tool_calls or []
            assert call.type == "function"
            assert list(json.loads(call.function.arguments)) == ["city"]
            messages.append(
                {
                    "role": "assistant",
                    "content": message.content,
                    "tool_calls": [call.model_dump()],
                }
            )
            messages.append({"role": "tool", "tool_call_id": call.id, "content": result(turn)})


@pytest.mark.parametrize("by_id", [True, False])
def test_responses(demo: LiveServer, by_id: bool) -> None:
    tool: FunctionToolParam = {
        "type": "function",
        "name": "get_weather",
        "parameters": SCHEMA,
        "strict": True,
    }
    new: list[Any] = [{"role": "user", "content": f"How is the weather in {by_id}?"}]
    items: list[Any] = list(new)
    previous: str | openai.Omit = openai.omit
    whole = 0
    with openai.OpenAI(base_url=f"{demo.url}/v1", api_key="none", max_retries=0) as client:
        for turn in range(TURNS):
            response = client.responses.create(
                model="default",
                input=new if by_id else items,
                previous_response_id=previous,
                tools=[tool],
                tool_choice="required",
                parallel_tool_calls=False,
                temperature=0,
                reasoning={"effort": "none"},
            )
            usage = response.usage
            assert usage is not None
            assert usage.input_tokens_details.cached_tokens >= whole - SLACK
            whole = usage.total_tokens
            (call,) = [item for item in response.output if item.type == "function_call"]
            new = [
                {"type": "function_call_output", "call_id": call.call_id, "output": result(turn)}
            ]
            items += [*(item.to_dict() for item in response.output), *new]
            if by_id:
                previous = response.id


@pytest.mark.parametrize("thinking_returns", [True, False])
def test_messages(demo: LiveServer, thinking_returns: bool) -> None:
    tool: ToolParam = {"name": "get_weather", "input_schema": SCHEMA}
    messages: list[Any] = [{"role": "user", "content": f"Weather? {thinking_returns}"}]
    whole = 0
    with anthropic.Anthropic(base_url=demo.url, api_key="none", max_retries=0) as client:
        for turn in range(TURNS):
            with client.messages.stream(
                model="default",
                max_tokens=300,
                messages=messages,
                tools=[tool],
                tool_choice={"type": "any", "disable_parallel_tool_use": True},
                thinking={"type": "enabled", "budget_tokens": 20},
                extra_body={"temperature": 0},
            ) as stream:
                message = stream.get_final_message()
            usage = message.usage
            assert (usage.cache_read_input_tokens or 0) >= whole - SLACK
            whole = usage.input_tokens + (usage.cache_read_input_tokens or 0) + usage.output_tokens
            assert message.stop_reason == "tool_use"
            content = [
                block for block in message.content if thinking_returns or block.type != "thinking"
            ]
            call = message.content[-1]
            assert call.type == "tool_use"
            assert list(call.input) == ["city"]
            tool_result = {"type": "tool_result", "tool_use_id": call.id, "content": result(turn)}
            messages.append({"role": "assistant", "content": content})
            messages.append({"role": "user", "content": [tool_result]})


# -- lm-eval ------------------------------------------------------------------------------

PAGE = (ROOT / "docs" / "quality.md").read_text()

ANIMALS = [
    ("Which animal barks?", ["a fish", "a dog", "a bird of prey"]),
    ("Which animal swims?", ["a cat", "a fish"]),
    ("Which one flies?", ["an eagle", "a mouse", "the old horse"]),
]
CAPITALS = ["What is the capital of France?", "Where is Rome?", "What is two and two?"]


# Its command without the index of its own tasks, which takes ten seconds.
LM_EVAL = """
import functools
from lm_eval.tasks import TaskManager
TaskManager.__init__ = functools.partialmethod(TaskManager.__init__, include_defaults=False)
from lm_eval.__main__ import cli_evaluate
cli_evaluate()
"""


def lm_eval(live: LiveServer, tasks: list[str], folder: Path) -> dict[str, Any]:
    """Run the command of docs/quality.md in a folder of tasks, without a network.

    Returns:
        the metrics of each task, and under "samples" each task's samples.
    """
    pytest.importorskip("lm_eval", reason="lm-eval is not installed (make setup-clients)")
    written = re.search(r"^(lm-eval --model local-completions [^`]+)", PAGE, re.MULTILINE)
    assert written is not None
    command = written[1].replace("hellaswag,gsm8k", ",".join(tasks)).replace("FOLDER", str(DEMO))
    command = command.replace("http://127.0.0.1:8000", live.url).replace("=32768", "=4096")
    _, *arguments = shlex.split(command.replace("\\\n", " "))
    arguments += ["--include_path", ".", "--output_path", "out", "--log_samples"]
    offline = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "HF_HOME": str(folder / "hf")}
    done = subprocess.run(
        [sys.executable, "-c", LM_EVAL, *arguments], cwd=folder, env={**os.environ, **offline},
        capture_output=True, text=True, timeout=200, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    (results,) = folder.glob("out/**/results_*.json")
    found: dict[str, Any] = json.loads(results.read_text())["results"]
    found["samples"] = {}
    for task in tasks:
        (samples,) = folder.glob(f"out/**/samples_{task}_*.jsonl")
        found["samples"][task] = [json.loads(line) for line in samples.read_text().splitlines()]
    return found


def test_lm_eval_scores_tasks_of_ones_own(demo: LiveServer, tmp_path: Path) -> None:
    """With the log-probabilities and answers that `/v1/completions` gives when asked directly."""
    for task in re.findall(r"```yaml\n(.*?)```", PAGE, re.DOTALL):
        name = task.split()[1]
        (tmp_path / f"{name}.yaml").write_text(task)

    def write(name: str, rows: list[dict[str, Any]]) -> None:
        (tmp_path / f"{name}.jsonl").write_text("\n".join(map(json.dumps, rows)))

    with demo.client() as http:

        def tokens(text: str) -> list[int]:
            found: list[int] = http.post("/tokenize", json={"prompt": text}).json()["tokens"]
            return found

        def complete(**body: Any) -> dict[str, Any]:
            answer = http.post("/v1/completions", json={"temperature": 0, **body})
            assert answer.status_code == 200, answer.text
            choice: dict[str, Any] = answer.json()["choices"][0]
            return choice

        def log_likelihood(context: str, text: str) -> float:
            whole = tokens(context + text)
            echo = complete(prompt=whole, echo=True, logprobs=0, max_tokens=0)
            return float(sum(echo["logprobs"]["token_logprobs"][len(tokens(context)) :]))

        expected = [
            [log_likelihood(f"Question: {question}\nAnswer:", f" {choice}") for choice in choices]
            for question, choices in ANIMALS
        ]
        best = [max(range(len(each)), key=each.__getitem__) for each in expected]
        answers = [
            complete(prompt=tokens(f"Question: {text}\nAnswer:"), stop=["\n"], max_tokens=16)[
                "text"
            ]
            for text in CAPITALS
        ]
    # Two of three are right.
    best[2] = (best[2] + 1) % 3
    write(
        "animals",
        [
            {"question": question, "choices": choices, "answer": answer}
            for (question, choices), answer in zip(ANIMALS, best, strict=True)
        ],
    )
    given = [answer.strip() for answer in answers]
    pairs = zip(CAPITALS, [*given[:2], given[2] + "!"], strict=True)
    write("capitals", [{"question": question, "answer": answer} for question, answer in pairs])

    found = lm_eval(demo, ["animals", "capitals"], tmp_path)
    samples = found["samples"]
    assert found["animals"]["acc,none"] == pytest.approx(2 / 3)
    for sample, own in zip(samples["animals"], expected, strict=True):
        assert [float(each[0]) for each in sample["filtered_resps"]] == pytest.approx(own, abs=1e-3)
    assert found["capitals"]["exact_match,strip"] == pytest.approx(2 / 3)
    assert [sample["resps"][0][0] for sample in samples["capitals"]] == answers
