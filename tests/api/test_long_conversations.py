"""An agent's conversation goes on for 30 turns, with nearly all of each prompt in the cache.

The turns bring what agents bring: deferred tools, images, calls that `max_tokens` cut, and
reasoning that comes back inside the text.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

import httpx
import pytest
from live import CHECKPOINT, LiveServer, live_server

TURNS = 32

CACHED = 0.95
"""Least share of a prompt that is found in the cache."""

RULES = "Follow the rules of the house. " * 400
STRING = {"type": "string"}
PNG = "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJ"

MAX_CUT = 50
"""Limit of an answer that is cut inside a call."""


def schema(**properties: Any) -> dict[str, Any]:
    return {"type": "object", "properties": properties}


SEARCH = {"description": "Finds tools.", "parameters": schema(query=STRING)}
WRITE = {"name": "write", "parameters": schema(path=STRING, text=STRING)}


def paint(number: int) -> dict[str, Any]:
    """A deferred function; its argument is a string, whatever it looks like."""
    description = f"Paints with brush {number}."
    return {
        "name": f"paint_{number}",
        "description": description,
        "parameters": schema(code=STRING),
    }


@dataclass(frozen=True)
class Said:
    """An answer, in no API's form."""

    text: str
    reasoning: str
    calls: list[tuple[str, str, str]]
    """ID, name and arguments as text."""
    prompt_tokens: int
    cached_tokens: int
    omitted: str


class Agent:
    """A conversation in one API, sent whole with each request."""

    search: ClassVar[str] = "search"
    prefix: ClassVar[str] = ""
    """Of the names of deferred functions in the prompt."""

    def __init__(self, http: httpx.Client, rules: str = RULES) -> None:
        self.http = http
        self.rules = rules
        self.history: list[dict[str, Any]] = []
        self.found: list[dict[str, Any]] = []

    def post(self, path: str, body: dict[str, Any]) -> tuple[dict[str, Any], str]:
        response = self.http.post(path, json=body)
        assert response.status_code == 200, response.text
        answer: dict[str, Any] = response.json()
        return answer, response.headers.get("x-glmd-omitted", "")

    def user(self, text: str) -> None:
        self.history.append({"role": "user", "content": text})

    def ask(self, limit: int, forced: str | None = None, **fields: Any) -> Said:
        """Send the conversation, and add the answer as a client sends it back.

        Args:
            forced: The function to call. "": none.
            fields: Further fields of the request.
        """
        raise NotImplementedError

    def loaded(self, call: str, function: dict[str, Any], text: str) -> None:
        """Add the result of a tool search."""
        raise NotImplementedError

    def result(self, call: str, text: str, *, image: bool = False) -> None:
        raise NotImplementedError


class ChatAgent(Agent):
    def ask(self, limit: int, forced: str | None = None, **fields: Any) -> Said:
        functions = [{"name": "search", **SEARCH}, WRITE]
        tools: list[dict[str, Any]] = [
            {"type": "function", "function": function} for function in functions
        ]
        tools += [
            {"type": "function", "function": function, "defer_loading": True}
            for function in map(paint, range(8))
        ]
        messages = [{"role": "system", "content": self.rules}, *self.history]
        body = {"messages": messages, "tools": tools, "max_tokens": limit, **fields}
        if forced is not None:
            named = {"type": "function", "function": {"name": forced}}
            body |= {"tool_choice": named if forced else "none", "parallel_tool_calls": False}
        answer, omitted = self.post("/v1/chat/completions", body)
        message, usage = answer["choices"][0]["message"], answer["usage"]
        calls = message.get("tool_calls") or []
        reasoning = message["reasoning_content"]
        text = message["content"] or ""
        told = {"role": "assistant", "content": f"<think>\n{reasoning}\n</think>\n\n{text}"}
        self.history.append(told | ({"tool_calls": calls} if calls else {}))
        return Said(
            text,
            reasoning,
            [(c["id"], c["function"]["name"], c["function"]["arguments"]) for c in calls],
            usage["prompt_tokens"],
            usage["prompt_tokens_details"]["cached_tokens"],
            omitted,
        )

    def loaded(self, call: str, function: dict[str, Any], text: str) -> None:
        reference = {"type": "tool_reference", "tool_name": function["name"]}
        content = [reference, {"type": "text", "text": text}]
        self.history.append({"role": "tool", "tool_call_id": call, "content": content})

    def result(self, call: str, text: str, *, image: bool = False) -> None:
        content: list[Any] = [{"type": "text", "text": text}]
        if image:
            content.append(
                {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{PNG}"}}
            )
        self.history.append({"role": "tool", "tool_call_id": call, "content": content})


class MessagesAgent(Agent):
    def ask(self, limit: int, forced: str | None = None, **fields: Any) -> Said:
        functions = [{"name": "search", **SEARCH}, WRITE, *self.found]
        tools = [
            {
                "name": function["name"],
                "description": function.get("description", ""),
                "input_schema": function["parameters"],
                "defer_loading": function["name"].startswith("paint"),
            }
            for function in functions
        ]
        body = {
            "system": self.rules,
            "messages": self.history,
            "tools": tools,
            "max_tokens": limit,
            "thinking": {"type": "adaptive"},
            **fields,
        }
        if forced is not None:
            named = {"type": "tool", "name": forced, "disable_parallel_tool_use": True}
            body["tool_choice"] = named if forced else {"type": "none"}
        answer, omitted = self.post("/v1/messages", body)
        blocks, usage = answer["content"], answer["usage"]
        reasoning = "".join(b["thinking"] for b in blocks if b["type"] == "thinking")
        text = "".join(b["text"] for b in blocks if b["type"] == "text")
        calls = [block for block in blocks if block["type"] == "tool_use"]
        inline = {"type": "text", "text": f"<think>{reasoning}</think>{text}"}
        self.history.append({"role": "assistant", "content": [inline, *calls]})
        return Said(
            text,
            reasoning,
            [(call["id"], call["name"], json.dumps(call["input"])) for call in calls],
            usage["input_tokens"] + usage["cache_read_input_tokens"],
            usage["cache_read_input_tokens"],
            omitted,
        )

    def loaded(self, call: str, function: dict[str, Any], text: str) -> None:
        self.found.append(function)
        reference = {"type": "tool_reference", "tool_name": function["name"]}
        result = {"type": "tool_result", "tool_use_id": call, "content": [reference]}
        more = {"type": "text", "text": text}
        self.history.append({"role": "user", "content": [result, more]})

    def result(self, call: str, text: str, *, image: bool = False) -> None:
        content: list[Any] = [{"type": "text", "text": text}]
        if image:
            source = {"type": "base64", "media_type": "image/png", "data": PNG}
            content.append({"type": "image", "source": source})
        result = {"type": "tool_result", "tool_use_id": call, "content": content}
        self.history.append({"role": "user", "content": [result]})


class ResponsesAgent(Agent):
    search = "tool_search"
    prefix = "brushes__"

    def ask(self, limit: int, forced: str | None = None, **fields: Any) -> Said:
        tools = [{"type": "tool_search", "execution": "client", **SEARCH}]
        tools.append({"type": "function", **WRITE})
        body = {
            "instructions": self.rules,
            "input": self.history,
            "tools": tools,
            "max_output_tokens": limit,
            "store": False,
            **fields,
        }
        if forced is not None:
            space, _, name = forced.rpartition("__")
            named = {"type": "function", "name": name} | ({"namespace": space} if space else {})
            body |= {"tool_choice": named if forced else "none", "parallel_tool_calls": False}
        answer, omitted = self.post("/v1/responses", body)
        output, usage = answer["output"], answer["usage"]
        reasoning = text = ""
        calls = []
        for item in output:
            match item["type"]:
                case "reasoning":
                    reasoning += item["content"][0]["text"]
                case "message":
                    text += item["content"][0]["text"]
                    item["content"][0]["text"] = f"<think>{reasoning}</think>{text}"
                case "tool_search_call":
                    assert item["execution"] == "client"
                    calls.append((item["call_id"], "tool_search", json.dumps(item["arguments"])))
                case "function_call":
                    name = (
                        f"{item['namespace']}__{item['name']}"
                        if item.get("namespace")
                        else item["name"]
                    )
                    calls.append((item["call_id"], name, item["arguments"]))
        self.history += [item for item in output if item["type"] != "reasoning"]
        return Said(
            text,
            reasoning,
            calls,
            usage["input_tokens"],
            usage["input_tokens_details"]["cached_tokens"],
            omitted,
        )

    def loaded(self, call: str, function: dict[str, Any], text: str) -> None:
        member = {"type": "function", "defer_loading": True, **function}
        namespace = {"type": "namespace", "name": "brushes", "description": "", "tools": [member]}
        output = {"type": "tool_search_output", "call_id": call, "tools": [namespace]}
        self.history += [output | {"execution": "client"}, {"role": "developer", "content": text}]

    def result(self, call: str, text: str, *, image: bool = False) -> None:
        output: list[Any] = [{"type": "input_text", "text": text}]
        if image:
            url = f"data:image/png;base64,{PNG}"
            output.append({"type": "input_image", "image_url": url, "detail": "high"})
        item = {"type": "function_call_output", "call_id": call, "output": output}
        self.history.append(item)


@pytest.fixture(scope="module")
def roomy() -> Iterator[LiveServer]:
    with live_server(config={"max_context": 100_000}) as live:
        yield live


def call_script(name: str, key: str, value: str) -> str:
    argument = f"<arg_key>{key}</arg_key><arg_value>{value}</arg_value>"
    return f"⟦Now {name}.</think><tool_call>{name}{argument}</tool_call>⟧"


@pytest.mark.parametrize("kind", [ChatAgent, MessagesAgent, ResponsesAgent])
def test_a_conversation_goes_on_and_stays_cached(roomy: LiveServer, kind: type[Agent]) -> None:
    with roomy.client() as http:
        agent = kind(http)
        cut = f"⟦Write.</think><tool_call>write<arg_key>text</arg_key><arg_value>{'abc ' * 30}⟧"
        for turn in range(TURNS):
            number, step = divmod(turn, 4)
            if step == 0:
                agent.user(call_script(agent.search, "query", "paint"))
            said = agent.ask(MAX_CUT if step == 2 else 1000)
            if turn:
                assert said.cached_tokens >= CACHED * said.prompt_tokens, (turn, said)
            assert ("=i" in said.omitted) == (turn >= 2)  # the images, once there is one
            if step == 3:
                assert (said.text, said.reasoning) == ("All done.", "I think so.")
                continue
            ((id, name, arguments),) = said.calls
            if step == 0:
                assert (name, json.loads(arguments)) == (agent.search, {"query": "paint"})
                script = call_script(f"{agent.prefix}paint_{number}", "code", "12")
                agent.loaded(id, paint(number), script)
            elif step == 1:
                assert name == f"{agent.prefix}paint_{number}"
                assert json.loads(arguments) == {"code": "12"}  # typed by the deferred schema
                agent.result(id, cut, image=True)
            else:
                agent.result(id, "Invalid arguments. ⟦I think so.</think>All done.⟧")


REAL_TURNS = int(os.environ.get("AGENT_TURNS", "5"))
"""Turns with the real engine: each kind of turn returns. `AGENT_TURNS=32 pytest …` runs the whole
conversation, in each API; it takes half a minute."""

REAL_RULES = RULES[: len(RULES) * 5 // 8]

THOUGHT = 3
"""Tokens of reasoning before each answer of the real engine."""

BRIEF: dict[type[Agent], dict[str, Any]] = {
    ChatAgent: {"thinking_budget": THOUGHT},
    MessagesAgent: {"thinking": {"type": "enabled", "budget_tokens": THOUGHT}},
    ResponsesAgent: {"reasoning": {"effort": "low"}},
}
"""Fields that limit the reasoning."""

REAL_KINDS = list(BRIEF) if "AGENT_TURNS" in os.environ else [ChatAgent]


@pytest.fixture(scope="module")
def real(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LiveServer]:
    """The demo, with room for the conversation."""
    folder = tmp_path_factory.mktemp("demo")
    for file in CHECKPOINT.iterdir():
        (folder / file.name).symlink_to(file)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").unlink()
    (folder / "config.json").write_text(json.dumps(config | {"max_position_embeddings": 20_000}))
    with live_server(
        folder=folder, engine="glmd.engine.core", effort_budgets={"low": THOUGHT}
    ) as live:
        yield live


@pytest.mark.parametrize("kind", REAL_KINDS)
def test_the_engine_itself_keeps_the_conversation_cached(
    real: LiveServer, kind: type[Agent]
) -> None:
    """The answers are the demo's; `tool_choice` brings the calls."""
    with real.client() as http:
        agent = kind(http, REAL_RULES)
        for turn in range(REAL_TURNS):
            number, step = divmod(turn, 4)
            if step == 0:
                agent.user(f"Paint number {number}.")
            brush = f"{agent.prefix}paint_{number}"
            forced = (agent.search, brush, "write", "")[step]
            said = agent.ask(THOUGHT + 24, forced, temperature=0, **BRIEF[kind])
            if turn:
                assert said.cached_tokens >= CACHED * said.prompt_tokens, (turn, said)
            if step == 3:
                continue
            ((id, name, _),) = said.calls
            assert name == forced
            if step == 0:
                agent.loaded(id, paint(number), "Use it.")
            else:
                agent.result(id, "Done.", image=step == 1)
