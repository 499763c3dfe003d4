"""Long conversations with a tool through the official clients, on the demo checkpoint.

No client sends a turn back as the model wrote it, but every turn computes only the new tokens: the
user's or the tool's text, and the tags around it.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import anthropic
import openai
import pytest
from anthropic.types import ToolParam
from live import LiveServer, live_server
from openai.types.chat import ChatCompletionFunctionToolParam
from openai.types.responses import FunctionToolParam

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
