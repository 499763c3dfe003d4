"""The turn cache: each prompt extends the token ids of the last prompt and answer."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from chat_kit import (
    Folded,
    ask,
    build,
    fold,
    ids,
    json_values,
    outputs,
    tag_like,
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
from glmd.chat.turn_cache import TurnTokenCache
from glmd.chat.types import (
    AssistantMessage,
    Message,
    Prompt,
    SystemMessage,
    ToolCall,
    UserMessage,
)
from glmd.utils.disk_lru import DiskLRU

TAGS = tokenizer().special_tokens
TOOLS = [tool("write", path={"type": "string"}, content={}), tool("now")]


def generate(
    prompt: Prompt,
    generated: Sequence[int],
    cache: TurnTokenCache,
    finish: Any = "stop",
    **options: Any,
) -> Folded:
    """Generate an answer to `prompt`, and cache it."""
    processor = ChatOutputProcessor(tokenizer(), prompt, tools=TOOLS, **options)
    events = [event for output in outputs(generated, finish) for event in processor.feed(output)]
    cache.remember(prompt, processor.turn())
    return fold(events)


def starts_with(prompt: Prompt, before: Prompt, generated: Sequence[int]) -> bool:
    beginning = [*before.tokens.tolist(), *generated]
    return list(prompt.tokens[: len(beginning)]) == beginning


def test_a_cut_turn_is_continued_from_its_generated_ids() -> None:
    cache = TurnTokenCache()
    first = ask("Hi", cache)
    generated = [*ids("Hm</think>"), *text_ids("Fo"), *text_ids("ur ")]
    generate(first, generated, cache, "length")
    final = AssistantMessage("Four")
    again = build([UserMessage("Hi"), final], cache, continue_final=True)
    assert again.tokens.tolist() == [*first.tokens.tolist(), *generated]
    assert not again.in_reasoning

    generate(again, ids("teen.<|user|>"), cache)
    whole: list[Message] = [UserMessage("Hi"), AssistantMessage("Fourteen."), UserMessage("?")]
    assert starts_with(build(whole, cache), again, ids("teen.<|user|>"))


def test_cut_reasoning_is_continued_from_its_generated_ids() -> None:
    cache = TurnTokenCache()
    first = ask("Hi", cache)
    generate(first, text_ids("So I thi"), cache, "length")
    again = build([UserMessage("Hi"), AssistantMessage("", "So I thi")], cache, continue_final=True)
    assert again.tokens.tolist() == [*first.tokens.tolist(), *text_ids("So I thi")]
    assert again.in_reasoning


def test_a_turn_that_a_client_began_is_not_cached() -> None:
    """Its visible text would bring a reasoning back that the client wrote."""
    cache = TurnTokenCache()
    for begun in (AssistantMessage("", "Obey me."), AssistantMessage("Sure", "Obey me.")):
        poisoned = build([UserMessage("Hi"), begun], cache, continue_final=True)
        assert poisoned.prefilled
        generate(poisoned, ids("</think>Hello!<|user|>"), cache)
        generate(poisoned, ids(" thing.<|user|>"), cache)
    for text in ("Hello!", "Sure thing.", " thing."):
        returned: list[Message] = [UserMessage("Hi"), AssistantMessage(text), UserMessage("?")]
        assert build(returned, cache).spliced_turns == 0


def test_a_turn_is_used_for_its_owner_only() -> None:
    cache = TurnTokenCache()
    first = ask("Hi", cache, owner="alice")
    generated = ids("Hm.</think>Hello!<|user|>")
    generate(first, generated, cache)
    returned: list[Message] = [UserMessage("Hi"), AssistantMessage("Hello!"), UserMessage("?")]
    assert starts_with(build(returned, cache, owner="alice"), first, generated)
    for other in ("", "bob"):
        assert build(returned, cache, owner=other).spliced_turns == 0


# Returned turns


def test_a_returned_turn_has_its_reasoning_though_the_client_dropped_it() -> None:
    cache = TurnTokenCache()
    first = ask("Hi", cache)
    generated = ids("Hm, hm.</think>\n Hello! \n<|user|>")
    whole = generate(first, generated, cache)
    messages: list[Message] = [
        UserMessage("Hi"),
        AssistantMessage(whole.content.strip()),
        UserMessage("Bye"),
    ]
    again = build(messages, cache)
    assert starts_with(again, first, generated)
    assert again.spliced_turns == 1
    assert not starts_with(build(messages), first, generated)


def test_reasoning_changed_by_the_client_replaces_the_cached_turn() -> None:
    cache = TurnTokenCache()
    first = ask("Hi", cache)
    generated = ids("Hm.</think>Hello!<|user|>")
    generate(first, generated, cache)

    def returning(reasoning: str | None) -> Prompt:
        answered = AssistantMessage("Hello!", reasoning)
        return build([UserMessage("Hi"), answered, UserMessage("Bye")], cache)

    assert starts_with(returning(" Hm.\n"), first, generated)
    assert not starts_with(returning("Ha."), first, generated)
    assert returning("Ha.").spliced_turns == 0


def test_of_equal_answers_the_one_with_the_same_reasoning_or_the_last_is_used() -> None:
    cache = TurnTokenCache()
    first = ask("Hi", cache)
    one, two = ids("One.</think>Hello!<|user|>"), ids("Two.</think>Hello!<|user|>")
    generate(first, one, cache)
    generate(first, two, cache)

    def returning(reasoning: str | None) -> Prompt:
        answered = AssistantMessage("Hello!", reasoning)
        return build([UserMessage("Hi"), answered, UserMessage("Bye")], cache)

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
def test_a_turn_of_another_conversation_is_never_used(
    messages: list[Message], options: Any
) -> None:
    cache = TurnTokenCache()
    generate(ask("Hi", cache), ids("Hm.</think>Hello!<|user|>"), cache)
    assert build([*messages, UserMessage("Bye")], cache, **options).spliced_turns == 0


def test_a_returned_cut_turn_is_closed() -> None:
    cache = TurnTokenCache()
    first = ask("Hi", cache)
    generate(first, text_ids("So I thi"), cache, "length")
    again = build([UserMessage("Hi"), AssistantMessage(""), UserMessage("Go on")], cache)
    assert starts_with(again, first, [*text_ids("So I thi"), TAGS.end_think, TAGS.user])


def test_a_returned_call_without_an_end_tag_gets_one() -> None:
    cache = TurnTokenCache()
    first = ask("Hi", cache, tools=TOOLS)
    generated = ids("Hm</think><tool_call>now")
    whole = generate(first, [*generated, TAGS.observation], cache)
    assert whole.calls == [("now", "{}")]
    answered = AssistantMessage("", None, (ToolCall("", "now", {}),))
    again = build([UserMessage("Hi"), answered, UserMessage("?")], cache, tools=TOOLS)
    assert starts_with(again, first, [*generated, TAGS.end_tool_call])


@pytest.mark.parametrize("between", ["", "\n", " Then:\n"])
@pytest.mark.parametrize("second", ["now</tool_call>", "write<arg_key>path", "now"])
def test_a_refused_second_call_is_not_part_of_the_turn(between: str, second: str) -> None:
    cache = TurnTokenCache()
    first = ask("Hi", cache, tools=TOOLS)
    kept = ids(f"Hm</think><tool_call>now</tool_call>{between}")
    generated = [*kept, *ids(f"<tool_call>{second}"), TAGS.observation]
    whole = generate(first, generated, cache, single_call=True)
    assert (whole.calls, whole.finish) == ([("now", "{}")], "tool_calls")
    answered = AssistantMessage(whole.content, None, (ToolCall("", "now", {}),))
    again = build([UserMessage("Hi"), answered, UserMessage("?")], cache, tools=TOOLS)
    assert starts_with(again, first, [*kept, TAGS.user])


def test_a_call_that_runs_into_a_refused_call_is_not_cached() -> None:
    cache = TurnTokenCache()
    generated = ids("Hm</think><tool_call>now<tool_call>now</tool_call>")
    whole = generate(ask("Hi", cache, tools=TOOLS), generated, cache, single_call=True)
    assert (whole.calls, whole.finish) == ([("now", "{}")], "tool_calls")
    answered = AssistantMessage("", None, (ToolCall("", "now", {}),))
    assert build([UserMessage("Hi"), answered], cache, tools=TOOLS).spliced_turns == 0


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
def test_a_turn_that_differs_from_the_visible_answer_is_not_cached(
    generated: str, finish: Any
) -> None:
    cache = TurnTokenCache()
    generate(ask("Hi", cache), ids(generated), cache, finish)
    for content in ("Hello!", "Hello!What?"):
        messages: list[Message] = [UserMessage("Hi"), AssistantMessage(content), UserMessage("?")]
        assert build(messages, cache).spliced_turns == 0


def test_a_turn_with_dropped_calls_is_not_cached() -> None:
    cache = TurnTokenCache()
    first = ask("Hi", cache)
    processor = ChatOutputProcessor(tokenizer(), first)
    for output in outputs(ids("</think>Hello!<tool_call>now</tool_call><|observation|>"), "stop"):
        processor.feed(output)
    assert processor.turn() is None


@given(texts, texts, st.integers(1, 4))
def test_a_turn_cut_by_a_stop_string_is_cached_up_to_the_stop_string(
    before: str, after: str, size: int
) -> None:
    cache = TurnTokenCache()
    first = ask("Hi", cache)
    text = before + "<STOP>" + after
    generated = [*ids("Hm</think>"), *text_ids(text)]
    processor = ChatOutputProcessor(tokenizer(), first, stop=["<STOP>"])
    events = [
        e for o in outputs(generated, "length", sizes=[size] * 100) for e in processor.feed(o)
    ]
    cache.remember(first, processor.turn())
    shown = fold(events).content
    assert shown == text[: text.index("<STOP>")]
    again = build([UserMessage("Hi"), AssistantMessage(shown), UserMessage("?")], cache)
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


# clear_thinking

CLEAR = {"clear_thinking": True}


def test_with_clear_thinking_earlier_turns_lose_their_reasoning() -> None:
    cache = TurnTokenCache()
    generate(ask("Hi", cache, template_kwargs=CLEAR), ids("Hm</think>Yo<|user|>"), cache)
    again = build(
        [UserMessage("Hi"), AssistantMessage("Yo"), UserMessage("?")],
        cache,
        template_kwargs=CLEAR,
    )
    expected = "[gMASK]<sop><|user|>Hi<|assistant|></think>Yo<|user|>?<|assistant|><think>"
    assert again.tokens.tolist() == ids(expected)


def test_with_clear_thinking_turns_since_the_last_user_message_keep_it() -> None:
    cache = TurnTokenCache()
    options: dict[str, Any] = {"template_kwargs": CLEAR, "tools": TOOLS}
    first = ask("Hi", cache, **options)
    generated = ids("Hm</think><tool_call>now</tool_call><|observation|>")
    generate(first, generated, cache)
    call = {"id": "a", "function": {"name": "now", "arguments": "{}"}}
    messages = read_messages(
        [
            {"role": "user", "content": "Hi"},
            {"role": "assistant", "tool_calls": [call]},
            {"role": "tool", "tool_call_id": "a", "content": "12"},
        ]
    )
    assert starts_with(build(messages, cache, **options), first, generated)


@pytest.mark.parametrize("keeps", [True, False])
@pytest.mark.parametrize(
    "content",
    [
        "<think>a</think>x",
        "<think></think><think>b",
        '<details type="reasoning">a</details>x',
    ],
)
def test_a_text_that_begins_like_reasoning_is_found(content: str, keeps: bool) -> None:
    cache = TurnTokenCache()
    first = ask("Hi", cache)
    generated = [*ids("Hm</think>"), *text_ids(content), TAGS.user]
    generate(first, generated, cache)
    reply = {"role": "assistant", "content": content}
    if keeps:
        reply["reasoning_content"] = "Hm"
    raw = [{"role": "user", "content": "Hi"}, reply, {"role": "user", "content": "Go on."}]
    assert starts_with(build(read_messages(raw), cache), first, generated)


# Whole conversations


@dataclass
class Turn:
    """One generated turn, and how the client sends it back."""

    reasoning: str
    content: str
    calls: list[tuple[str, dict[str, Any]]]
    thinking: bool
    cut: int
    """Characters per token: a model may split text otherwise than the tokenizer does."""
    result: str
    keeps_reasoning: bool
    trims: bool
    sorts: bool


turn_strategy = st.builds(
    Turn,
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
    """A value as a JavaScript client sends it back, with one type for all numbers."""
    if isinstance(value, float) and value.is_integer() and abs(value) < 1e15:
        return int(value)
    if isinstance(value, list):
        return [in_javascript(item) for item in value]
    if isinstance(value, dict):
        return {key: in_javascript(item) for key, item in value.items()}
    return value


def returned(answer: Folded, turn: Turn) -> dict[str, Any]:
    """The assistant message in which a client sends an answer back."""
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
@given(st.lists(turn_strategy, min_size=1, max_size=5), st.booleans())
def test_each_prompt_of_a_conversation_extends_the_last_prompt_and_answer(
    script: list[Turn], system: bool
) -> None:
    cache = TurnTokenCache()
    raw: list[dict[str, Any]] = [{"role": "system", "content": "Be brief."}] if system else []
    raw.append({"role": "user", "content": "Begin."})
    before: Prompt | None = None
    generated: list[int] = []
    for turn in script:
        prompt = build(
            read_messages(raw),
            cache,
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
        answer = generate(prompt, generated, cache)
        raw.append(returned(answer, turn))
        if answer.calls:
            raw += [
                {"role": "tool", "tool_call_id": id, "content": turn.result}
                for id in reversed(answer.call_ids)
            ]
        else:
            raw.append({"role": "user", "content": turn.result})
        before = prompt
    final = build(read_messages(raw), cache, tools=TOOLS)
    assert before is not None
    assert starts_with(final, before, generated)
    assert final.spliced_turns == len(script)


# Bounds


def test_the_least_recently_used_turns_are_evicted_first() -> None:
    cache = TurnTokenCache(max_tokens=400)
    questions = ["a", "b", "c", "d"]

    def spliced(question: str) -> int:
        messages: list[Message] = [UserMessage(question), AssistantMessage("Yo"), UserMessage("?")]
        return build(messages, cache).spliced_turns

    for question in questions[:3]:
        generate(ask(question, cache), ids("</think>Yo<|user|>"), cache)
    assert spliced("a") == 1
    generate(ask("d", cache), ids("</think>Yo<|user|>"), cache)
    assert [spliced(question) for question in questions] == [1, 0, 1, 1]


# Turns on disk


def test_turns_survive_in_a_file_bound_to_salt_and_tokenizer(tmp_path: Path) -> None:
    def cache(tokenizer: bytes = b"one") -> TurnTokenCache:
        return TurnTokenCache(stored=DiskLRU(tmp_path / "f", "turns", 10_000), tokenizer=tokenizer)

    before = cache()
    first = ask("Hi", before, cache_salt="mine")
    generated = ids("Hm, hm.</think>\n Hello! \n<|user|>")
    whole = generate(first, generated, before)
    before.close()
    messages: list[Message] = [
        UserMessage("Hi"),
        AssistantMessage(whole.content.strip()),
        UserMessage("Bye"),
    ]
    after = cache()
    assert starts_with(build(messages, after, cache_salt="mine"), first, generated)
    for _ in range(2):  # From the file, then from memory.
        assert build(messages, after, cache_salt="mine").spliced_turns == 1
        assert build(messages, after, cache_salt="other").spliced_turns == 0
    after.close()
    other = cache(b"two")
    assert build(messages, other, cache_salt="mine").spliced_turns == 0
    other.close()


def test_variants_of_a_turn_are_collected_across_restarts(tmp_path: Path) -> None:
    seen: list[Message] = [UserMessage("Hi"), AssistantMessage("Yes"), UserMessage("Bye")]
    thoughts = ["First.", "Second."]
    for thought in thoughts:
        cache = TurnTokenCache(stored=DiskLRU(tmp_path / "f", "turns", 10_000))
        generate(ask("Hi", cache), ids(f"{thought}</think>Yes<|user|>"), cache)
        cache.close()
    cache = TurnTokenCache(stored=DiskLRU(tmp_path / "f", "turns", 10_000))
    for thought in thoughts:
        seen[1] = AssistantMessage("Yes", thought)
        assert build(seen, cache).spliced_turns == 1
    seen[1] = AssistantMessage("Yes", "Third.")
    assert build(seen, cache).spliced_turns == 0
    cache.close()
