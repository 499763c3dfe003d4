"""OpenAI's Python client and its helpers on the Responses API."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import openai
import pytest
from live import LiveServer
from openai.lib._pydantic import to_strict_json_schema
from openai.types.responses import FunctionToolParam
from pydantic import BaseModel


class GetWeather(BaseModel):
    """The weather in a city."""

    city: str
    days: int


CALL = (
    "Hm.</think>Wait.<tool_call>GetWeather<arg_key>city</arg_key><arg_value>Rome</arg_value>"
    "<arg_key>days</arg_key><arg_value>3</arg_value></tool_call>"
)
FUNCTION: FunctionToolParam = {
    "type": "function",
    "name": "GetWeather",
    "parameters": to_strict_json_schema(GetWeather),
    "strict": True,
}


@pytest.fixture
def client(scripted: LiveServer) -> Iterator[openai.OpenAI]:
    url = f"{scripted.url}/v1"
    with openai.OpenAI(base_url=url, api_key="none", max_retries=0, timeout=30) as client:
        yield client


def test_parse_reads_a_calls_arguments(client: openai.OpenAI) -> None:
    answer = client.chat.completions.parse(
        model="tiny",
        messages=[{"role": "user", "content": f"⟦{CALL}⟧"}],
        tools=[openai.pydantic_function_tool(GetWeather)],
    )
    (call,) = answer.choices[0].message.tool_calls or []
    assert call.function.parsed_arguments == GetWeather(city="Rome", days=3)


def test_a_response_and_its_parsed_call(client: openai.OpenAI) -> None:
    tool = openai.pydantic_function_tool(GetWeather)
    response = client.responses.parse(model="tiny", input=f"⟦{CALL}⟧", tools=[tool])
    assert response.output_text == "Wait."
    (call,) = [item for item in response.output if item.type == "function_call"]
    assert call.parsed_arguments == GetWeather(city="Rome", days=3)
    assert response.usage is not None
    assert response.usage.output_tokens_details.reasoning_tokens


def test_the_stream_helper_puts_a_response_together(client: openai.OpenAI) -> None:
    with client.responses.stream(
        model="tiny", input=f"⟦{CALL}⟧", tools=[FUNCTION], reasoning={"summary": "auto"}
    ) as stream:
        events = list(stream)
        response = stream.get_final_response()
    assert [event.sequence_number for event in events] == list(range(len(events)))
    summary = [event for event in events if event.type == "response.reasoning_summary_text.done"]
    assert summary[0].text == "Hm."
    reasoning, message, call = response.output
    assert (reasoning.type, message.type) == ("reasoning", "message")
    assert call.type == "function_call"
    assert json.loads(call.arguments) == {"city": "Rome", "days": 3}


def test_ten_turns_with_a_tool_compute_only_what_is_new(client: openai.OpenAI) -> None:
    """With previous_response_id, and with items sent back."""
    for by_id in (True, False):
        call = (
            "Hm {}.</think><tool_call>GetWeather<arg_key>city</arg_key><arg_value>{}</arg_value>"
            "</tool_call>"
        )
        items: list[Any] = [{"role": "user", "content": f"{by_id}⟦{call.format(0, 'Rome')}⟧"}]
        previous: str | openai.Omit = openai.omit
        new, size = items, 0
        for turn in range(1, 10):
            response = client.responses.create(
                model="tiny",
                input=new if by_id else items,
                previous_response_id=previous,
                tools=[FUNCTION],
            )
            assert response.usage is not None
            assert response.usage.input_tokens_details.cached_tokens >= size
            size = response.usage.input_tokens
            (made,) = [item for item in response.output if item.type == "function_call"]
            script = call.format(turn, f"City {turn}")
            new = [
                {
                    "type": "function_call_output",
                    "call_id": made.call_id,
                    "output": f"20 °C ⟦{script}⟧",
                }
            ]
            items += [item.to_dict() for item in response.output]
            items += new
            if by_id:
                previous = response.id


def test_retrieve_cancel_and_delete(client: openai.OpenAI) -> None:
    response = client.responses.create(model="tiny", input="⟦</think>Yes.⟧")
    assert client.responses.retrieve(response.id) == response
    counted = client.responses.input_tokens.count(model="tiny", input="⟦</think>Yes.⟧")
    assert response.usage is not None
    assert counted.input_tokens == response.usage.input_tokens
    client.responses.delete(response.id)
    with pytest.raises(openai.NotFoundError):
        client.responses.retrieve(response.id)
    waiting = client.responses.create(model="tiny", input="⟦Hm{wait}⟧", background=True)
    assert client.responses.cancel(waiting.id).status == "cancelled"


def test_a_lost_stream_is_taken_up_again(client: openai.OpenAI) -> None:
    seen = []
    for event in client.responses.create(
        model="tiny", input=f"⟦{CALL}⟧", tools=[FUNCTION], background=True, stream=True
    ):
        seen.append(event)
        if event.type == "response.in_progress":
            break
    assert seen[0].type == "response.created"
    id = seen[0].response.id
    seen += client.responses.retrieve(id, stream=True, starting_after=len(seen) - 1)
    assert [event.sequence_number for event in seen] == list(range(len(seen)))
    assert seen[-1].type == "response.completed"
    assert seen[-1].response == client.responses.retrieve(id)
    with client.responses.stream(response_id=id, starting_after=4) as stream:
        assert next(stream).sequence_number == 5
        assert stream.get_final_response().output_text == "Wait."


def test_input_items_are_listed_page_by_page(client: openai.OpenAI) -> None:
    texts = ["One.", "Two.", "⟦</think>Yes.⟧"]
    items: list[Any] = [{"role": "user", "content": text} for text in texts]
    id = client.responses.create(model="tiny", input=items).id
    pages = client.responses.input_items.list(
        id, limit=2, order="asc", include=["reasoning.encrypted_content"]
    )
    assert [item.to_dict()["content"] for item in pages] == [
        [{"type": "input_text", "text": text}] for text in texts
    ]


def test_errors_have_the_sdks_types(client: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError) as bad:
        client.responses.create(model="tiny", input="Hi", temperature=9)
    assert bad.value.param == "temperature"
    with pytest.raises(openai.InternalServerError):
        client.responses.create(model="tiny", input="⟦{busy}⟧")
