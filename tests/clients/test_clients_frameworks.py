"""Frameworks on OpenAI's or Anthropic's API, each with a tool call and its result."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import pytest
from live import LiveServer

CALL = "<tool_call>get_weather<arg_key>city</arg_key><arg_value>Rome</arg_value></tool_call>"
TOOL = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "The weather in a city.",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}},
    },
}


def get_weather(city: str) -> str:
    """The weather in a city."""
    return f"{city}: ⟦</think>{city} is warm.⟧"


# -- litellm ------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def litellm() -> Any:
    module = pytest.importorskip("litellm", reason="litellm is not installed")
    module.telemetry = False
    module.suppress_debug_info = True
    return module


def test_litellm_calls_a_tool_and_reads_reasoning(litellm: Any, scripted: LiveServer) -> None:
    options = {"model": "openai/tiny", "api_base": f"{scripted.url}/v1", "api_key": "none"}
    messages: list[Any] = [{"role": "user", "content": f"⟦Hm.</think>Wait.{CALL}⟧"}]
    answer = litellm.completion(messages=messages, tools=[TOOL], **options)
    message = answer.choices[0].message
    assert message.reasoning_content == "Hm."
    (call,) = message.tool_calls
    assert json.loads(call.function.arguments) == {"city": "Rome"}
    result = {"role": "tool", "tool_call_id": call.id, "content": get_weather("Rome")}
    messages += [message.model_dump(), result]
    chunks = list(litellm.completion(messages=messages, tools=[TOOL], stream=True, **options))
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks)
    assert text == "Rome is warm."
    whole = litellm.stream_chunk_builder(chunks)
    assert whole.choices[0].finish_reason == "stop"


def test_litellm_speaks_anthropics_api(litellm: Any, scripted: LiveServer) -> None:
    options = {
        "model": "anthropic/tiny",
        "api_base": scripted.url,
        "api_key": "none",
        "thinking": {"type": "enabled", "budget_tokens": 1024},
        "allowed_openai_params": ["thinking"],  # It cannot know that this model thinks.
    }
    messages: list[Any] = [{"role": "user", "content": f"⟦Hm.</think>Wait.{CALL}⟧"}]
    answer = litellm.completion(messages=messages, tools=[TOOL], **options)
    message = answer.choices[0].message
    assert message.reasoning_content == "Hm."
    assert message.content == "Wait."
    (call,) = message.tool_calls
    result = {"role": "tool", "tool_call_id": call.id, "content": get_weather("Rome")}
    messages += [message.model_dump(), result]
    answer = litellm.completion(messages=messages, tools=[TOOL], **options)
    assert answer.choices[0].message.content == "Rome is warm."


# -- LangChain ----------------------------------------------------------------------------


@pytest.mark.parametrize("responses", [False, True], ids=["chat", "responses"])
def test_langchain_calls_a_tool_and_streams(scripted: LiveServer, responses: bool) -> None:
    langchain = pytest.importorskip("langchain_openai", reason="langchain-openai is not installed")
    from langchain_core.messages import HumanMessage, ToolMessage  # noqa: PLC0415

    model = langchain.ChatOpenAI(
        model="tiny",
        base_url=f"{scripted.url}/v1",
        api_key="none",
        max_retries=0,
        use_responses_api=responses,
    ).bind_tools([get_weather])
    messages: list[Any] = [HumanMessage(f"⟦Hm.</think>Wait.{CALL}⟧")]
    answer = model.invoke(messages)
    (call,) = answer.tool_calls
    assert (call["name"], call["args"]) == ("get_weather", {"city": "Rome"})
    assert answer.usage_metadata["output_tokens"] > 0
    messages += [answer, ToolMessage(get_weather("Rome"), tool_call_id=call["id"])]
    pieces = list(model.stream(messages))
    whole = pieces[0]
    for piece in pieces[1:]:
        whole += piece
    assert whole.text == "Rome is warm."
    assert len(pieces) > 2


# -- Pydantic AI --------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["chat", "responses"])
def test_pydantic_ai_runs_an_agent(scripted: LiveServer, kind: str) -> None:
    pydantic_ai = pytest.importorskip("pydantic_ai", reason="pydantic-ai is not installed")
    from pydantic_ai.models.openai import OpenAIChatModel, OpenAIResponsesModel  # noqa: PLC0415
    from pydantic_ai.providers.openai import OpenAIProvider  # noqa: PLC0415

    model = {"chat": OpenAIChatModel, "responses": OpenAIResponsesModel}[kind]
    provider = OpenAIProvider(base_url=f"{scripted.url}/v1", api_key="none")
    agent = pydantic_ai.Agent(model("tiny", provider=provider), tools=[get_weather])
    prompt = f"⟦Hm.</think>Wait.{CALL}⟧"
    result = agent.run_sync(prompt)
    assert result.output == "Rome is warm."
    kinds = [type(part).__name__ for message in result.all_messages() for part in message.parts]
    assert "ThinkingPart" in kinds
    assert "ToolReturnPart" in kinds

    async def stream() -> str:
        # It takes the first text for the answer, whatever calls follow.
        async with agent.run_stream(f"⟦Hm.</think>{CALL}⟧") as streamed:
            return str(await streamed.get_output())

    assert asyncio.run(stream()) == "Rome is warm."
