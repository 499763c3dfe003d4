"""Requests and answers that mean the same in each chat API, for tests of all three."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import httpx
import sse
from grammars import CONTROLS

Finish = Literal["stop", "length", "tool_calls"]

CLOSING = {str(id): 12 for id in [*b'"}]', CONTROLS["</think>"], CONTROLS["</arg_value>"]]}
CLOSING |= {str(CONTROLS[name]): 12 for name in ("</tool_call>", "<|observation|>")}
CLOSING |= {str(ord(",")): -3}
"""Biases with which a model of random weights ends its answers soon."""


@dataclass(frozen=True)
class Answer:
    """One answer, in no API's form."""

    reasoning: str
    content: str
    calls: list[tuple[str, dict[str, Any]]]
    finish: Finish


@dataclass(frozen=True)
class Ask:
    """A request, in no API's form.

    Attributes:
        choice: Tool choice. "named": the function.
        schema: JSON schema of the answer. None: plain text.
        fields: Further fields of the request.
    """

    text: str
    thinking: bool = False
    function: Mapping[str, Any] | None = None
    choice: Literal["auto", "none", "required", "named"] = "auto"
    schema: Mapping[str, Any] | None = None
    max_tokens: int = 1000
    parallel: bool = True
    n: int = 1
    fields: Mapping[str, Any] | None = None


class ChatApi:
    """How an API spells requests and answers.

    Attributes:
        overloaded: Status of a refusal for lack of room.
    """

    path: ClassVar[str]
    overloaded: ClassVar[int] = 503

    def body(self, ask: Ask) -> dict[str, Any]:
        raise NotImplementedError

    def answers(self, response: Mapping[str, Any]) -> list[Answer]:
        """The answers of a whole response."""
        raise NotImplementedError

    def fold(self, stream: bytes) -> dict[str, Any]:
        """The response that a client puts together; every event must be in its place."""
        raise NotImplementedError

    def ask(self, http: httpx.Client, ask: Ask, *, stream: bool = False) -> list[Answer]:
        response = http.post(self.path, json=self.body(ask) | {"stream": stream})
        assert response.status_code == 200, response.text
        is_stream = response.headers["content-type"].startswith("text/event-stream")
        assert is_stream == stream
        return self.answers(self.fold(response.content) if stream else response.json())


class ChatCompletionsApi(ChatApi):
    path = "/v1/chat/completions"

    def body(self, ask: Ask) -> dict[str, Any]:
        body: dict[str, Any] = {
            "messages": [{"role": "user", "content": ask.text}],
            "enable_thinking": ask.thinking,
            "max_tokens": ask.max_tokens,
            "parallel_tool_calls": ask.parallel,
            "n": ask.n,
        }
        if ask.function is not None:
            named = {"type": "function", "function": {"name": ask.function["name"]}}
            body["tools"] = [{"type": "function", "function": ask.function}]
            body["tool_choice"] = named if ask.choice == "named" else ask.choice
        if ask.schema is not None:
            form = {"name": "n", "schema": ask.schema, "strict": True}
            body["response_format"] = {"type": "json_schema", "json_schema": form}
        return body | dict(ask.fields or {})

    def answers(self, response: Mapping[str, Any]) -> list[Answer]:
        assert [choice["index"] for choice in response["choices"]] == list(
            range(len(response["choices"]))
        )
        return [
            Answer(
                choice["message"]["reasoning_content"] or "",
                choice["message"]["content"] or "",
                [
                    (call["function"]["name"], json.loads(call["function"]["arguments"]))
                    for call in choice["message"].get("tool_calls", ())
                ],
                choice["finish_reason"],
            )
            for choice in response["choices"]
        ]

    def fold(self, stream: bytes) -> dict[str, Any]:
        events = sse.read(stream)
        assert events.done
        choices: dict[int, dict[str, Any]] = {}
        for chunk in events.chunks:
            assert chunk["object"] == "chat.completion.chunk"
            assert "usage" not in chunk
            assert all(chunk[key] == events.chunks[0][key] for key in ("id", "created", "model"))
            (piece,) = chunk["choices"]
            index, delta = piece["index"], dict(piece["delta"])
            if index not in choices:
                assert delta == {"role": "assistant", "content": "", "reasoning_content": None}
                choices[index] = {"index": index, "message": delta, "finish_reason": None}
                continue
            choice, message = choices[index], choices[index]["message"]
            assert choice["finish_reason"] is None
            choice["finish_reason"] = piece["finish_reason"]
            assert (piece["finish_reason"] is None) != (delta == {"reasoning_content": None})
            for key in ("content", "reasoning_content"):
                if delta.get(key) is not None:
                    message[key] = (message.get(key) or "") + delta[key]
            for call in delta.get("tool_calls", ()):
                calls = message.setdefault("tool_calls", [])
                if "id" in call:
                    assert call["type"] == "function"
                    assert call["index"] == len(calls)
                    calls.append({"id": call["id"], "function": dict(call["function"])})
                else:
                    assert call["index"] == len(calls) - 1
                    calls[-1]["function"]["arguments"] += call["function"]["arguments"]
        return {"choices": [choices[index] for index in sorted(choices)]}


class ResponsesApi(ChatApi):
    path = "/v1/responses"

    def body(self, ask: Ask) -> dict[str, Any]:
        body: dict[str, Any] = {
            "input": ask.text,
            "reasoning": {"effort": "max" if ask.thinking else "none"},
            "max_output_tokens": ask.max_tokens,
            "parallel_tool_calls": ask.parallel,
        }
        if ask.function is not None:
            named = {"type": "function", "name": ask.function["name"]}
            body["tools"] = [{"type": "function", **ask.function}]
            body["tool_choice"] = named if ask.choice == "named" else ask.choice
        if ask.schema is not None:
            form = {"type": "json_schema", "name": "n", "schema": ask.schema, "strict": True}
            body["text"] = {"format": form}
        return body | dict(ask.fields or {})

    def answers(self, response: Mapping[str, Any]) -> list[Answer]:
        items = response["output"]
        reasoning = [part["text"] for item in items for part in texts_of(item, "reasoning")]
        content = [part["text"] for item in items for part in texts_of(item, "message")]
        calls = [
            (item["name"], json.loads(item["arguments"]))
            for item in items
            if item["type"] == "function_call"
        ]
        finish: Finish = "tool_calls" if calls else "stop"
        if response["status"] == "incomplete":
            assert response["incomplete_details"] == {"reason": "max_output_tokens"}
            assert response["completed_at"] is None
            finish = "length"
        else:
            assert response["status"] == "completed"
        return [Answer("".join(reasoning), "".join(content), calls, finish)]

    def fold(self, stream: bytes) -> dict[str, Any]:
        return fold_response(sse.read_named(stream))


class MessagesApi(ChatApi):
    path = "/v1/messages"
    overloaded = 529

    def body(self, ask: Ask) -> dict[str, Any]:
        body: dict[str, Any] = {
            "messages": [{"role": "user", "content": ask.text}],
            "thinking": {"type": "adaptive" if ask.thinking else "disabled"},
            "max_tokens": ask.max_tokens,
        }
        if ask.function is not None:
            schema = ask.function["parameters"]
            body["tools"] = [{"name": ask.function["name"], "input_schema": schema}]
            kinds = {"required": "any", "named": "tool"}
            choice: dict[str, Any] = {"type": kinds.get(ask.choice, ask.choice)}
            if ask.choice == "named":
                choice["name"] = ask.function["name"]
            body["tool_choice"] = choice | {"disable_parallel_tool_use": not ask.parallel}
        if ask.schema is not None:
            form = {"type": "json_schema", "schema": ask.schema}
            body["output_config"] = {"format": form}
        return body | dict(ask.fields or {})

    def answers(self, response: Mapping[str, Any]) -> list[Answer]:
        blocks = response["content"]
        finishes: dict[str, Finish] = {
            "end_turn": "stop",
            "max_tokens": "length",
            "tool_use": "tool_calls",
        }
        return [
            Answer(
                "".join(block["thinking"] for block in blocks if block["type"] == "thinking"),
                "".join(block["text"] for block in blocks if block["type"] == "text"),
                [
                    (block["name"], block["input"])
                    for block in blocks
                    if block["type"] == "tool_use"
                ],
                finishes[response["stop_reason"]],
            )
        ]

    def fold(self, stream: bytes) -> dict[str, Any]:
        return fold_message(sse.read_named(stream))


CHAT_APIS = {"chat": ChatCompletionsApi(), "responses": ResponsesApi(), "messages": MessagesApi()}


def texts_of(item: Mapping[str, Any], type: str) -> list[Any]:
    return list(item["content"]) if item["type"] == type else []


def fold_response(events: list[dict[str, Any]]) -> dict[str, Any]:  # noqa: PLR0912
    """The response that a client puts together from a stream, each event being in its place."""
    assert [event["sequence_number"] for event in events] == list(range(len(events)))
    first, second, *rest, last = events
    assert (first["type"], second["type"]) == ("response.created", "response.in_progress")
    assert first["response"]["output"] == []
    output: list[dict[str, Any]] = []
    item: dict[str, Any] | None = None
    for event in rest:
        kind = event["type"]
        if kind == "response.in_progress":
            continue
        if kind == "response.output_item.added":
            assert item is None
            assert event["output_index"] == len(output)
            item = event["item"]
            assert item["status"] == "in_progress"
            continue
        assert item is not None
        assert event["output_index"] == len(output)
        if kind == "response.output_item.done":
            assert event["item"]["status"] != "in_progress"
            assert event["item"] | {"status": None} == item | {"status": None}
            output.append(event["item"])
            item = None
            continue
        assert event["item_id"] == item["id"]
        match kind.removeprefix("response."):
            case "content_part.added":
                assert event["content_index"] == len(item["content"]) == 0
                item["content"].append(event["part"])
            case "reasoning_summary_part.added":
                assert event["summary_index"] == len(item["summary"]) == 0
                item["summary"].append(event["part"])
            case "output_text.delta":
                item["content"][0]["text"] += event["delta"]
                item["content"][0]["logprobs"] += event["logprobs"]
            case "reasoning_text.delta":
                item["content"][0]["text"] += event["delta"]
            case "reasoning_summary_text.delta":
                item["summary"][0]["text"] += event["delta"]
            case "function_call_arguments.delta":
                item["arguments"] += event["delta"]
            case "output_text.done" | "reasoning_text.done":
                assert event["text"] == item["content"][0]["text"]
            case "reasoning_summary_text.done":
                assert event["text"] == item["summary"][0]["text"]
            case "custom_tool_call_input.delta":
                item["input"] += event["delta"]
            case "custom_tool_call_input.done":
                assert event["input"] == item["input"]
            case "function_call_arguments.done":
                assert event["arguments"] == item["arguments"]
            case "content_part.done":
                assert event["part"] == item["content"][0]
            case "reasoning_summary_part.done":
                assert event["part"] == item["summary"][0]
            case _:
                raise AssertionError(kind)
    assert item is None
    response: dict[str, Any] = last["response"]
    assert last["type"] == f"response.{response['status']}"
    assert response["output"] == output
    return response


def fold_message(events: list[dict[str, Any]]) -> dict[str, Any]:
    """The message that a client puts together from a stream, each event being in its place."""
    first, *rest = [event for event in events if event["type"] != "ping"]
    message: dict[str, Any] = first["message"]
    assert first["type"] == "message_start"
    assert message["content"] == []
    open_block: dict[str, Any] | None = None
    arguments = ""
    for event in rest:
        match event:
            case {"type": "content_block_start", "index": index, "content_block": block}:
                assert open_block is None
                assert index == len(message["content"])
                open_block = dict(block)
                message["content"].append(open_block)
                arguments = ""
            case {"type": "content_block_delta", "index": index, "delta": delta}:
                assert open_block is not None
                assert index == len(message["content"]) - 1
                delta = dict(delta)
                assert (
                    delta.pop("type")
                    in {
                        "text": ("text_delta",),
                        "thinking": ("thinking_delta", "signature_delta"),
                        "tool_use": ("input_json_delta",),
                    }[open_block["type"]]
                )
                arguments += delta.pop("partial_json", "")
                for key, piece in delta.items():
                    open_block[key] += piece
            case {"type": "content_block_stop"}:
                assert open_block is not None
                if open_block["type"] == "tool_use":
                    open_block["input"] = json.loads(arguments)
                open_block = None
            case {"type": "message_delta", "delta": delta, "usage": usage}:
                assert open_block is None
                message |= delta
                message["usage"] |= usage
    assert rest[-1] == {"type": "message_stop"}
    assert rest[-2]["type"] == "message_delta"
    return message
