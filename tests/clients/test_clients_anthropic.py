"""Anthropic's Python client against a live server."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from typing import Any

import anthropic
import pytest
from anthropic.types import MessageParam
from live import LiveServer

THINK = {"type": "enabled", "budget_tokens": 2000}
WEATHER = {
    "name": "get_weather",
    "description": "The weather in a city.",
    "input_schema": {
        "type": "object",
        "properties": {"city": {"type": "string"}, "days": {"type": "integer"}},
        "required": ["city"],
    },
}
CALL = "<tool_call>get_weather<arg_key>city</arg_key><arg_value>{}</arg_value></tool_call>"


@pytest.fixture
def client(scripted: LiveServer) -> Iterator[Any]:
    with anthropic.Anthropic(
        base_url=scripted.url, api_key="none", max_retries=0, timeout=30
    ) as client:
        yield client


def user(text: str) -> MessageParam:
    return {"role": "user", "content": text}


def test_create(client: Any) -> None:
    message = client.messages.create(
        model="tiny", max_tokens=100, system="Be brief.", messages=[user("⟦Hello!⟧")]
    )
    assert message.content[0].text == "Hello!"
    assert message.stop_reason == "end_turn"
    assert message._request_id


def test_the_stream_helper_accumulates_thinking_text_and_calls(client: Any) -> None:
    with client.messages.stream(
        model="tiny",
        max_tokens=200,
        thinking=THINK,
        tools=[WEATHER],
        messages=[user(f"⟦Hm.</think>Wait.{CALL.format('Rome')}⟧")],
    ) as stream:
        kinds = {event.type for event in stream}
        message = stream.get_final_message()
    assert {"thinking", "signature", "text", "input_json"} <= kinds
    thinking, text, call = message.content
    assert thinking.thinking == "Hm."
    assert thinking.signature
    assert text.text == "Wait."
    assert call.input == {"city": "Rome"}
    assert message.stop_reason == "tool_use"
    assert message.usage.output_tokens > 0


@pytest.mark.parametrize("with_thinking", [True, False])
def test_ten_turns_with_a_tool_compute_only_what_is_new(client: Any, with_thinking: bool) -> None:
    """With thinking blocks sent back or dropped."""
    script = f"{with_thinking} {{}}.</think>{CALL.format('City {}')}{CALL.format('Rome')}"
    messages: list[Any] = [user(f"⟦{script.format(0, 0)}⟧")]
    size = 0
    for turn in range(1, 10):
        message = client.messages.create(
            model="tiny", max_tokens=500, thinking=THINK, tools=[WEATHER], messages=messages
        )
        usage = message.usage
        assert usage.cache_read_input_tokens >= size
        size = usage.cache_read_input_tokens + usage.input_tokens
        content = [block for block in message.content if with_thinking or block.type != "thinking"]
        messages.append({"role": "assistant", "content": content})
        results = [
            {
                "type": "tool_result",
                "tool_use_id": block.id,
                "content": [{"type": "text", "text": f"20 °C ⟦{script.format(turn, turn)}⟧"}],
            }
            for block in message.content
            if block.type == "tool_use"
        ]
        messages.append({"role": "user", "content": results})


def test_the_tool_runner(client: Any) -> None:
    @anthropic.beta_tool
    def get_weather(city: str) -> str:
        """The weather in a city.

        Args:
            city: Its name.
        """
        return f"{city}: ⟦{city} is warm.⟧"

    runner = client.beta.messages.tool_runner(
        model="tiny",
        max_tokens=200,
        tools=[get_weather],
        messages=[user(f"⟦{CALL.format('Rome')}⟧")],
    )
    *_, last = runner
    assert last.content[0].text == "Rome is warm."


def test_counting_and_models(client: Any) -> None:
    counted = client.messages.count_tokens(model="tiny", messages=[user("⟦Yes.⟧")])
    message = client.messages.create(model="tiny", max_tokens=9, messages=[user("⟦Yes.⟧")])
    usage = message.usage
    assert counted.input_tokens == usage.input_tokens + usage.cache_read_input_tokens
    assert [model.id for model in client.models.list()] == ["test/tiny"]
    assert client.models.retrieve("tiny").display_name == "tiny"


def test_errors_have_the_sdks_types(client: Any) -> None:
    def create(**parameters: Any) -> None:
        client.messages.create(
            **{"model": "tiny", "max_tokens": 9, "messages": [user("Hi")]} | parameters
        )

    with pytest.raises(anthropic.BadRequestError) as bad:
        create(stop_sequences=[""])
    assert "stop_sequences" in str(bad.value)
    with pytest.raises(anthropic.NotFoundError):
        create(model="claude-x")
    with pytest.raises(anthropic.InternalServerError) as busy:
        create(messages=[user("⟦{busy}⟧")])
    assert busy.value.status_code == 529


def test_many_streams_at_once(scripted: LiveServer) -> None:
    async def run() -> list[str]:
        async with anthropic.AsyncAnthropic(base_url=scripted.url, api_key="none") as client:

            async def one(number: int) -> str:
                async with client.messages.stream(
                    model="tiny", max_tokens=99, messages=[user(f"⟦Number {number}⟧")]
                ) as stream:
                    return await stream.get_final_text()

            return await asyncio.gather(*map(one, range(40)))

    assert asyncio.run(run()) == [f"Number {number}" for number in range(40)]
    scripted.wait_until_idle()
