"""Turns come back whole: each prompt goes on exactly where the last answer ended."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
from chat_kit import (
    Folded,
    fold,
    ids,
    json_values,
    outputs,
    tag_like,
    template,
    text_ids,
    texts,
    tokenizer,
    tool,
    written,
)
from hypothesis import given, settings
from hypothesis import strategies as st

from glmd.chat.messages import read_messages
from glmd.chat.output_processor import ChatOutputProcessor
from glmd.chat.prompt import build_prompt
from glmd.chat.turn_cache import TurnTokenCache
from glmd.chat.types import (
    AssistantMessage,
    Conversation,
    Message,
    Prompt,
    SystemMessage,
    ToolCall,
    UserMessage,
)
from glmd.errors import InvalidRequest
from glmd.utils.lru import LRUCache

TAGS = tokenizer().special_tokens
TOOLS = [tool("write", path={"type": "string"}, content={}), tool("now")]


def build(
    messages: Sequence[Message], turns: TurnTokenCache | None = None, **options: Any
) -> Prompt:
    conversation = Conversation(messages, **options)
    return build_prompt(conversation, tokenizer=tokenizer(), template=template(), turn_cache=turns)


def ask(text: str, turns: TurnTokenCache | None = None, **options: Any) -> Prompt:
    return build([UserMessage(text)], turns, **options)


def generate(
    prompt: Prompt,
    generated: Sequence[int],
    turns: TurnTokenCache,
    finish: Any = "stop",
    **options: Any,
) -> Folded:
    """Answer `prompt` with `generated` and remember it."""
    one = ChatOutputProcessor(tokenizer(), prompt, tools=TOOLS, **options)
    events = [event for output in outputs(generated, finish) for event in one.feed(output)]
    turns.remember(prompt, one.turn())
    return fold(events)


def starts_with(prompt: Prompt, before: Prompt, generated: Sequence[int]) -> bool:
    beginning = [*before.tokens.tolist(), *generated]
    return prompt.tokens[: len(beginning)].tolist() == beginning


# Prompts without memory


def test_a_prompt_is_the_rendered_template() -> None:
    prompt = ask("Hi")
    assert prompt.tokens.tolist() == ids("[gMASK]<sop><|user|>Hi<|assistant|><think>")
    assert prompt.tokens.dtype == np.int32
    assert prompt.in_reasoning
    assert prompt.tokens[prompt.turn_start :].tolist() == [TAGS.think]


def test_thinking_is_switched_off_by_the_template() -> None:
    prompt = ask("Hi", template_kwargs={"enable_thinking": False})
    assert prompt.tokens.tolist() == ids("[gMASK]<sop><|user|>Hi<|assistant|></think>")
    assert not prompt.in_reasoning


@given(tag_like, tag_like)
def test_text_of_clients_is_encoded_as_text(one: str, two: str) -> None:
    prompt = build([SystemMessage(one), UserMessage(two)])
    expected = [
        *ids("[gMASK]<sop>"), TAGS.system, *text_ids(one), TAGS.user, *text_ids(two),
        TAGS.assistant, TAGS.think,
    ]  # fmt: skip
    assert prompt.tokens.tolist() == expected


def test_tools_are_printed_as_they_were_sent() -> None:
    prompt = ask("Hi", tools=TOOLS)
    assert json.dumps(TOOLS[0].definition) in tokenizer().decode(prompt.tokens.tolist())


# Continuing a message


def test_content_is_continued_to_its_last_character() -> None:
    prompt = build([UserMessage("Hi"), AssistantMessage("x = ", "hm ")], continue_final=True)
    expected = ids("[gMASK]<sop><|user|>Hi<|assistant|><think>hm </think>x = ")
    assert prompt.tokens.tolist() == expected
    assert (prompt.in_reasoning, prompt.content, prompt.reasoning) == (False, "x = ", "hm ")


def test_content_without_reasoning_is_continued_without() -> None:
    prompt = build([UserMessage("Hi"), AssistantMessage("x")], continue_final=True)
    assert prompt.tokens.tolist() == ids("[gMASK]<sop><|user|>Hi<|assistant|></think>x")


def test_reasoning_without_content_is_continued_inside() -> None:
    prompt = build([UserMessage("Hi"), AssistantMessage("", "So")], continue_final=True)
    assert prompt.tokens.tolist() == ids("[gMASK]<sop><|user|>Hi<|assistant|><think>So")
    assert prompt.in_reasoning


def test_an_empty_message_is_continued_like_none() -> None:
    empty = build([UserMessage("Hi"), AssistantMessage("")], continue_final=True)
    assert empty.tokens.tolist() == ask("Hi").tokens.tolist()


@pytest.mark.parametrize(
    "last", [UserMessage("x"), AssistantMessage("", None, (ToolCall("", "f", {}),))]
)
def test_only_text_of_the_assistant_can_be_continued(last: Message) -> None:
    with pytest.raises(InvalidRequest, match="continued"):
        build([UserMessage("Hi"), last], continue_final=True)


def test_a_cut_turn_is_continued_from_the_ids_it_has() -> None:
    turns = TurnTokenCache()
    first = ask("Hi", turns)
    generated = [*ids("Hm</think>"), *text_ids("Fo"), *text_ids("ur ")]
    generate(first, generated, turns, "length")
    final = AssistantMessage("Four")
    again = build([UserMessage("Hi"), final], turns, continue_final=True)
    assert again.tokens.tolist() == [*first.tokens.tolist(), *generated]
    assert not again.in_reasoning

    generate(again, ids("teen.<|user|>"), turns)
    whole = [UserMessage("Hi"), AssistantMessage("Fourteen."), UserMessage("?")]
    assert starts_with(build(whole, turns), again, ids("teen.<|user|>"))


def test_cut_reasoning_is_continued_from_the_ids_it_has() -> None:
    turns = TurnTokenCache()
    first = ask("Hi", turns)
    generate(first, text_ids("So I thi"), turns, "length")
    again = build([UserMessage("Hi"), AssistantMessage("", "So I thi")], turns, continue_final=True)
    assert again.tokens.tolist() == [*first.tokens.tolist(), *text_ids("So I thi")]
    assert again.in_reasoning


# Turns that return


def test_a_turn_returns_with_its_reasoning_though_the_client_dropped_it() -> None:
    turns = TurnTokenCache()
    first = ask("Hi", turns)
    generated = ids("Hm, hm.</think>\n Hello! \n<|user|>")
    whole = generate(first, generated, turns)
    messages = [UserMessage("Hi"), AssistantMessage(whole.content.strip()), UserMessage("Bye")]
    again = build(messages, turns)
    assert starts_with(again, first, generated)
    assert again.spliced_turns == 1
    assert not starts_with(build(messages), first, generated)


def test_reasoning_that_the_client_changed_is_the_clients() -> None:
    turns = TurnTokenCache()
    first = ask("Hi", turns)
    generated = ids("Hm.</think>Hello!<|user|>")
    generate(first, generated, turns)

    def returning(reasoning: str | None) -> Prompt:
        answered = AssistantMessage("Hello!", reasoning)
        return build([UserMessage("Hi"), answered, UserMessage("Bye")], turns)

    assert starts_with(returning(" Hm.\n"), first, generated)
    assert not starts_with(returning("Ha."), first, generated)
    assert returning("Ha.").spliced_turns == 0


def test_of_answers_that_look_the_same_the_one_with_that_reasoning_or_the_last_returns() -> None:
    turns = TurnTokenCache()
    first = ask("Hi", turns)
    one, two = ids("One.</think>Hello!<|user|>"), ids("Two.</think>Hello!<|user|>")
    generate(first, one, turns)
    generate(first, two, turns)

    def returning(reasoning: str | None) -> Prompt:
        answered = AssistantMessage("Hello!", reasoning)
        return build([UserMessage("Hi"), answered, UserMessage("Bye")], turns)

    assert starts_with(returning("One."), first, one)
    assert starts_with(returning(None), first, two)


@pytest.mark.parametrize(
    ("messages", "options"),
    [
        ([UserMessage("Ho"), AssistantMessage("Hello!")], {}),
        ([SystemMessage("x"), UserMessage("Hi"), AssistantMessage("Hello!")], {}),
        ([UserMessage("Hi"), AssistantMessage("Hello!!")], {}),
        ([UserMessage("Hi"), AssistantMessage("Hello!")], {"tools": TOOLS}),
        ([UserMessage("Hi"), AssistantMessage("Hello!")], {"cache_salt": "another"}),
    ],
)
def test_a_turn_of_another_conversation_is_never_taken(
    messages: list[Message], options: Any
) -> None:
    turns = TurnTokenCache()
    generate(ask("Hi", turns), ids("Hm.</think>Hello!<|user|>"), turns)
    assert build([*messages, UserMessage("Bye")], turns, **options).spliced_turns == 0


def test_a_cut_turn_returns_closed() -> None:
    turns = TurnTokenCache()
    first = ask("Hi", turns)
    generate(first, text_ids("So I thi"), turns, "length")
    again = build([UserMessage("Hi"), AssistantMessage(""), UserMessage("Go on")], turns)
    assert starts_with(again, first, [*text_ids("So I thi"), TAGS.end_think, TAGS.user])


def test_a_call_that_lacked_its_end_returns_with_one() -> None:
    turns = TurnTokenCache()
    first = ask("Hi", turns, tools=TOOLS)
    generated = ids("Hm</think><tool_call>now")
    whole = generate(first, [*generated, TAGS.observation], turns)
    assert whole.calls == [("now", "{}")]
    answered = AssistantMessage("", None, (ToolCall("", "now", {}),))
    again = build([UserMessage("Hi"), answered, UserMessage("?")], turns, tools=TOOLS)
    assert starts_with(again, first, [*generated, TAGS.end_tool_call])


@pytest.mark.parametrize("between", ["", "\n", " Then:\n"])
@pytest.mark.parametrize("second", ["now</tool_call>", "write<arg_key>path", "now"])
def test_a_turn_that_ends_before_its_second_call_returns_without_it(
    between: str, second: str
) -> None:
    turns = TurnTokenCache()
    first = ask("Hi", turns, tools=TOOLS)
    kept = ids(f"Hm</think><tool_call>now</tool_call>{between}")
    generated = [*kept, *ids(f"<tool_call>{second}"), TAGS.observation]
    whole = generate(first, generated, turns, single_call=True)
    assert (whole.calls, whole.finish) == ([("now", "{}")], "tool_calls")
    answered = AssistantMessage(whole.content, None, (ToolCall("", "now", {}),))
    again = build([UserMessage("Hi"), answered, UserMessage("?")], turns, tools=TOOLS)
    assert starts_with(again, first, [*kept, TAGS.user])


def test_a_call_that_runs_into_a_call_too_many_is_not_remembered() -> None:
    turns = TurnTokenCache()
    generated = ids("Hm</think><tool_call>now<tool_call>now</tool_call>")
    whole = generate(ask("Hi", turns, tools=TOOLS), generated, turns, single_call=True)
    assert (whole.calls, whole.finish) == ([("now", "{}")], "tool_calls")
    answered = AssistantMessage("", None, (ToolCall("", "now", {}),))
    assert build([UserMessage("Hi"), answered], turns, tools=TOOLS).spliced_turns == 0


@pytest.mark.parametrize(
    ("generated", "finish"),
    [
        ("Hm</think>Hello!", "cancelled"),
        ("Hm</think>Hello!", "error"),
        ("Hm</think>Hello!<tool_call>write<arg_key>path</arg_key><arg_value>x", "length"),
        ("Hm</think>Hello!<tool_call></tool_call><|user|>", "stop"),
        ("Hm</think>Hello!<|user|>What?<|assistant|>", "length"),
    ],
)
def test_a_turn_that_is_not_what_the_client_saw_is_not_remembered(
    generated: str, finish: Any
) -> None:
    turns = TurnTokenCache()
    generate(ask("Hi", turns), ids(generated), turns, finish)
    for content in ("Hello!", "Hello!What?"):
        messages = [UserMessage("Hi"), AssistantMessage(content), UserMessage("?")]
        assert build(messages, turns).spliced_turns == 0


def test_a_turn_with_calls_that_were_not_allowed_is_not_remembered() -> None:
    turns = TurnTokenCache()
    first = ask("Hi", turns)
    one = ChatOutputProcessor(tokenizer(), first)
    for output in outputs(ids("</think>Hello!<tool_call>now</tool_call><|observation|>"), "stop"):
        one.feed(output)
    assert one.turn() is None


@given(texts, texts, st.integers(1, 4))
def test_a_turn_cut_by_a_stop_string_returns_as_far_as_it_was_shown(
    before: str, after: str, size: int
) -> None:
    turns = TurnTokenCache()
    first = ask("Hi", turns)
    text = before + "<STOP>" + after
    generated = [*ids("Hm</think>"), *text_ids(text)]
    one = ChatOutputProcessor(tokenizer(), first, stop=["<STOP>"])
    events = [e for o in outputs(generated, "length", sizes=[size] * 100) for e in one.feed(o)]
    turns.remember(first, one.turn())
    shown = fold(events).content
    assert shown == text[: text.index("<STOP>")]
    again = build([UserMessage("Hi"), AssistantMessage(shown), UserMessage("?")], turns)
    expected = first.tokens.tolist() + ids("Hm</think>")
    found = again.tokens.tolist()
    assert found[: len(expected)] == expected
    rest = found[len(expected) :]
    end = rest.index(TAGS.user)
    assert tokenizer().decode(rest[:end]) == shown
    common = [a == b for a, b in zip(rest[:end], text_ids(text), strict=False)]
    kept = common.index(False) if False in common else len(common)
    assert len(tokenizer().decode(rest[kept:end])) <= max(
        map(len, map(tokenizer().token_bytes, text_ids(text))), default=0
    )


# With clear_thinking the template decides

CLEAR = {"clear_thinking": True}


def test_with_clear_thinking_earlier_turns_lose_their_reasoning() -> None:
    turns = TurnTokenCache()
    generate(ask("Hi", turns, template_kwargs=CLEAR), ids("Hm</think>Yo<|user|>"), turns)
    again = build(
        [UserMessage("Hi"), AssistantMessage("Yo"), UserMessage("?")], turns, template_kwargs=CLEAR
    )
    expected = "[gMASK]<sop><|user|>Hi<|assistant|></think>Yo<|user|>?<|assistant|><think>"
    assert again.tokens.tolist() == ids(expected)


def test_with_clear_thinking_turns_since_the_last_user_message_keep_it() -> None:
    turns = TurnTokenCache()
    options: dict[str, Any] = {"template_kwargs": CLEAR, "tools": TOOLS}
    first = ask("Hi", turns, **options)
    generated = ids("Hm</think><tool_call>now</tool_call><|observation|>")
    generate(first, generated, turns)
    call = {"id": "a", "function": {"name": "now", "arguments": "{}"}}
    messages = read_messages(
        [
            {"role": "user", "content": "Hi"},
            {"role": "assistant", "tool_calls": [call]},
            {"role": "tool", "tool_call_id": "a", "content": "12"},
        ]
    )
    assert starts_with(build(messages, turns, **options), first, generated)


# Whole conversations


@dataclass
class Said:
    """What the model says in one turn, and what the client does with it."""

    reasoning: str
    content: str
    calls: list[tuple[str, dict[str, Any]]]
    thinking: bool
    cut: int
    """Characters that a token spans: a model may cut text otherwise than the tokenizer."""
    result: str
    keeps_reasoning: bool
    trims: bool
    sorts: bool


said = st.builds(
    Said,
    reasoning=texts,
    content=st.one_of(texts, tag_like),
    calls=st.lists(
        st.tuples(
            st.sampled_from(["write", "now", "other"]),
            st.dictionaries(texts.map(str.strip).filter(bool), json_values, max_size=3),
        ),
        max_size=2,
    ),
    thinking=st.booleans(),
    cut=st.integers(1, 6),
    result=tag_like,
    keeps_reasoning=st.booleans(),
    trims=st.booleans(),
    sorts=st.booleans(),
)


def pieces_of(text: str, size: int) -> list[int]:
    cut = [text[start : start + size] for start in range(0, len(text), size)]
    return [id for piece in cut for id in text_ids(piece)]


def in_javascript(value: Any) -> Any:
    """A value as it comes back from a client that knows one kind of number."""
    if isinstance(value, float) and value.is_integer() and abs(value) < 1e15:
        return int(value)
    if isinstance(value, list):
        return [in_javascript(item) for item in value]
    if isinstance(value, dict):
        return {key: in_javascript(item) for key, item in value.items()}
    return value


def returned(answer: Folded, turn: Said) -> dict[str, Any]:
    """The assistant message that a client makes of an answer."""
    message: dict[str, Any] = {"role": "assistant", "content": answer.content}
    if turn.trims:
        message["content"] = answer.content.strip() or None
    if turn.keeps_reasoning:
        message["reasoning_content"] = answer.reasoning
    if answer.calls:
        message["tool_calls"] = [
            {
                "id": id,
                "type": "function",
                "function": {
                    "name": name,
                    "arguments": json.dumps(
                        in_javascript(json.loads(arguments)),
                        separators=(",", ":"),
                        sort_keys=turn.sorts,
                    ),
                },
            }
            for id, (name, arguments) in zip(answer.call_ids, answer.calls, strict=True)
        ]
    return message


@settings(max_examples=200)
@given(st.lists(said, min_size=1, max_size=5), st.booleans())
def test_each_prompt_of_a_conversation_extends_the_last_prompt_and_answer(
    script: list[Said], system: bool
) -> None:
    turns = TurnTokenCache()
    raw: list[dict[str, Any]] = [{"role": "system", "content": "Be brief."}] if system else []
    raw.append({"role": "user", "content": "Begin."})
    before: Prompt | None = None
    generated: list[int] = []
    for turn in script:
        prompt = build(
            read_messages(raw),
            turns,
            tools=TOOLS,
            template_kwargs={"enable_thinking": turn.thinking},
        )
        if before is not None:
            assert starts_with(prompt, before, generated)
        generated = pieces_of(turn.reasoning, turn.cut) if turn.thinking else []
        generated += [TAGS.end_think] if turn.thinking else []
        generated += pieces_of(turn.content, turn.cut)
        for name, arguments in turn.calls:
            generated += written(name, arguments)
        generated.append(TAGS.observation if turn.calls else TAGS.user)
        answer = generate(prompt, generated, turns)
        raw.append(returned(answer, turn))
        if answer.calls:
            raw += [
                {"role": "tool", "tool_call_id": id, "content": turn.result}
                for id in reversed(answer.call_ids)
            ]
        else:
            raw.append({"role": "user", "content": turn.result})
        before = prompt
    final = build(read_messages(raw), turns, tools=TOOLS)
    assert before is not None
    assert starts_with(final, before, generated)
    assert final.spliced_turns == len(script)


# Bounds


def test_the_least_recently_used_turns_are_forgotten_first() -> None:
    turns = TurnTokenCache(max_tokens=400)
    questions = ["a", "b", "c", "d"]

    def spliced(question: str) -> int:
        messages = [UserMessage(question), AssistantMessage("Yo"), UserMessage("?")]
        return build(messages, turns).spliced_turns

    for question in questions[:3]:
        generate(ask(question, turns), ids("</think>Yo<|user|>"), turns)
    assert spliced("a") == 1
    generate(ask("d", turns), ids("</think>Yo<|user|>"), turns)
    assert [spliced(question) for question in questions] == [1, 0, 1, 1]


@given(st.lists(st.tuples(st.integers(0, 5), st.integers(0, 12))))
def test_a_bounded_dictionary_never_exceeds_its_capacity(puts: list[tuple[int, int]]) -> None:
    kept: LRUCache[int, int] = LRUCache(10)
    for key, size in puts:
        kept.put(key, size, size)
        assert kept.size <= 10
        assert (kept.get(key) == size) == (size <= 10)
    assert kept.size == sum(kept.get(key) or 0 for key in range(6))
