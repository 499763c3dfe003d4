"""OpenAI's Python client against a live server."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator
from typing import Any

import openai
import pytest
from live import LiveServer
from openai.types.chat import ChatCompletionMessageParam, ChatCompletionToolParam


@pytest.fixture
def client(scripted: LiveServer) -> Iterator[openai.OpenAI]:
    url = f"{scripted.url}/v1"
    with openai.OpenAI(base_url=url, api_key="none", max_retries=0, timeout=30) as client:
        yield client


def user(text: str) -> ChatCompletionMessageParam:
    return {"role": "user", "content": text}


def reasoning_of(message: Any) -> str | None:
    """`reasoning_content`, an extra field in OpenAI's models."""
    return (message.model_extra or {}).get("reasoning_content")


WEATHER: ChatCompletionToolParam = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "The weather in a city.",
        "parameters": {
            "type": "object",
            "properties": {"city": {"type": "string"}, "days": {"type": "integer"}},
            "required": ["city"],
        },
    },
}


def test_create(client: openai.OpenAI) -> None:
    answer = client.chat.completions.create(
        model="tiny",
        messages=[{"role": "developer", "content": "Be brief."}, user("⟦Hm.</think>Hello!⟧")],
    )
    assert answer.choices[0].message.content == "Hello!"
    assert reasoning_of(answer.choices[0].message) == "Hm."
    assert answer.usage is not None
    assert answer.usage.completion_tokens_details is not None
    assert answer.usage.completion_tokens_details.reasoning_tokens
    assert answer._request_id


def test_stream(client: openai.OpenAI) -> None:
    stream = client.chat.completions.create(
        model="tiny",
        messages=[user("⟦Hm.</think>Hello!⟧")],
        stream=True,
        stream_options={"include_usage": True},
    )
    chunks = list(stream)
    deltas = [chunk.choices[0].delta for chunk in chunks if chunk.choices]
    assert "".join(delta.content or "" for delta in deltas) == "Hello!"
    assert "".join(reasoning_of(delta) or "" for delta in deltas) == "Hm."
    assert chunks[-1].usage is not None


def test_the_stream_helper_accumulates_tool_calls(client: openai.OpenAI) -> None:
    script = (
        "</think><tool_call>get_weather<arg_key>city</arg_key><arg_value>Rome</arg_value>"
        "<arg_key>days</arg_key><arg_value>3</arg_value></tool_call>"
    )
    with client.chat.completions.stream(
        model="tiny", messages=[user(f"⟦{script}⟧")], tools=[WEATHER]
    ) as stream:
        kinds = {event.type for event in stream}
        answer = stream.get_final_completion()
    assert "tool_calls.function.arguments.delta" in kinds
    (call,) = answer.choices[0].message.tool_calls or []
    assert json.loads(call.function.arguments) == {"city": "Rome", "days": 3}
    assert answer.choices[0].finish_reason == "tool_calls"


def test_a_tool_loop(client: openai.OpenAI) -> None:
    call = "<tool_call>get_weather<arg_key>city</arg_key><arg_value>{}</arg_value></tool_call>"
    messages = [user(f"⟦Two.</think>{call.format('Rome')}{call.format('Oslo')}⟧")]
    answer = client.chat.completions.create(model="tiny", messages=messages, tools=[WEATHER])
    message = answer.choices[0].message
    messages.append(message.to_dict())  # type: ignore[arg-type]
    for tool_call in reversed(message.tool_calls or []):
        assert tool_call.type == "function"
        city = json.loads(tool_call.function.arguments)["city"]
        result = f"{city}: ⟦</think>{city} came last.⟧"
        messages.append({"role": "tool", "tool_call_id": tool_call.id, "content": result})
    answer = client.chat.completions.create(model="tiny", messages=messages, tools=[WEATHER])
    # Sent in reverse, the results stand in the order of their calls.
    assert answer.choices[0].message.content == "Oslo came last."


def test_a_returning_turn_is_cached(client: openai.OpenAI) -> None:
    """OpenAI's client drops the reasoning; the server caches the generated turn."""
    messages = [user("⟦A long thought.</think>First  answer ⟧")]
    earlier = 0
    for number in range(3):
        answer = client.chat.completions.create(model="tiny", messages=messages)
        assert answer.usage is not None
        assert answer.usage.prompt_tokens_details is not None
        assert (answer.usage.prompt_tokens_details.cached_tokens or 0) >= earlier
        # The answer's tokens are in the next prompt as they were, so they are cached, too; but
        # for the scripted engine only prompts are.
        earlier = answer.usage.prompt_tokens
        messages.append({"role": "assistant", "content": answer.choices[0].message.content})
        messages.append(user(f"⟦Thought {number}.</think>Answer {number}⟧"))


def test_completions_and_models(client: openai.OpenAI) -> None:
    assert client.completions.create(model="tiny", prompt="⟦on⟧").choices[0].text == "on"
    chunks = client.completions.create(model="tiny", prompt="⟦on⟧", stream=True)
    assert "".join(chunk.choices[0].text for chunk in chunks) == "on"
    assert [model.id for model in client.models.list()] == ["test/tiny"]
    assert client.models.retrieve("test/tiny").id == "test/tiny"


def test_errors_have_the_sdks_types(client: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError) as bad:
        client.chat.completions.create(model="tiny", messages=[user("Hi")], temperature=9)
    assert bad.value.param == "temperature"
    with pytest.raises(openai.NotFoundError):
        client.chat.completions.create(model="gpt-5", messages=[user("Hi")])
    with pytest.raises(openai.NotFoundError):
        client.embeddings.create(model="tiny", input="Hi")
    with pytest.raises(openai.InternalServerError):
        client.chat.completions.create(model="tiny", messages=[user("⟦{busy}⟧")])


def test_two_hundred_streams_at_once(scripted: LiveServer) -> None:
    async def run() -> list[str]:
        url = f"{scripted.url}/v1"
        async with openai.AsyncOpenAI(base_url=url, api_key="none", max_retries=0) as client:

            async def one(number: int) -> str:
                stream = await client.chat.completions.create(
                    model="tiny", messages=[user(f"⟦</think>Number {number}⟧")], stream=True
                )
                return "".join([chunk.choices[0].delta.content or "" async for chunk in stream])

            return await asyncio.gather(*map(one, range(200)))

    assert asyncio.run(run()) == [f"Number {number}" for number in range(200)]
    scripted.wait_until_idle()
