"""Conversations in every spelling render as the model's own template renders plain fields."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from itertools import product
from typing import Any

import pytest
from chat_kit import INLINE, REASONING_FIELDS, REASONING_PARTS
from live import CHECKPOINT
from prompts import DEFAULTS, FUNCTION, chat, messages_api, responses

Message = dict[str, Any]
Spelling = Sequence[Message] | Message

TEMPLATE = (CHECKPOINT / "chat_template.jinja").read_text()
TOOLS = [{"type": "function", "function": FUNCTION}]
RULES = ["Be brief.", "Be kind."]
ASK, THANKS = "Hot?", "Thanks."
ARGUMENTS: list[dict[str, Any]] = [{"path": " a\n", "depth": 1}, {"all": [True, None, "ü"]}]
RESULTS = ["30", "20"]
TEXT_PART = {"type": "text", "text": "Rain."}

IN_CHAT: list[Message] = [
    *({"content": [part, TEXT_PART]} for part in REASONING_PARTS),
    *({"content": "Rain."} | fields for fields in REASONING_FIELDS),
    *({"content": text} for text in INLINE),
    *({"content": [{"type": "text", "text": text}], "reasoning": None} for text in INLINE),
]
IN_MESSAGES: list[list[Message]] = [
    [{"type": "thinking", "thinking": "Ask.", "signature": "x"}, TEXT_PART],
    [
        {"type": "redacted_thinking", "data": "x"},
        {"type": "thinking", "thinking": "Ask."},
        TEXT_PART,
    ],
    *([{"type": "text", "text": text}] for text in INLINE),
]
OUTPUT = {"type": "message", "role": "assistant"}
REASONING_ITEM = {"type": "reasoning", "id": "rs_1", "encrypted_content": None}
IN_RESPONSES: list[list[Message]] = [
    [
        REASONING_ITEM | {"summary": [], "content": [{"type": "reasoning_text", "text": "Ask."}]},
        OUTPUT | {"content": [{"type": "output_text", "text": "Rain.", "annotations": []}]},
    ],
    [
        REASONING_ITEM | {"summary": [{"type": "summary_text", "text": "Ask."}]},
        OUTPUT | {"content": "Rain.", "status": "incomplete"},
    ],
    *([OUTPUT | {"content": [{"type": "output_text", "text": text}]}] for text in INLINE),
]


def canonical(calls: int, *, reasoning: str, goes_on: bool) -> list[Message]:
    """A conversation in the template's own fields."""
    made = [
        {"type": "function", "function": {"name": "load", "arguments": ARGUMENTS[index]}}
        for index in range(calls)
    ]
    turn: Message = {"role": "assistant", "content": "Rain.", "reasoning_content": reasoning}
    return [
        *({"role": "system", "content": text} for text in RULES),
        {"role": "user", "content": ASK},
        turn | ({"tool_calls": made} if made else {}),
        *({"role": "tool", "content": RESULTS[index]} for index in range(calls)),
        *([{"role": "user", "content": THANKS}] if goes_on else []),
    ]


def as_chat(turn: Any, calls: int) -> list[Message]:
    made = [
        {"id": str(index), "function": {"name": "load", "arguments": json.dumps(ARGUMENTS[index])}}
        for index in range(calls)
    ]
    return [
        {"role": "system", "content": RULES[0]},
        {"role": "developer", "content": [{"type": "text", "text": RULES[1]}]},
        {"role": "user", "content": [{"type": "text", "text": ASK}]},
        {"role": "assistant", **turn} | ({"tool_calls": made} if made else {}),
        *({"role": "tool", "tool_call_id": str(index), "content": RESULTS[index]}
          for index in reversed(range(calls))),
    ]  # fmt: skip


def as_messages(turn: Any, calls: int) -> list[Message]:
    uses = [
        {"type": "tool_use", "id": str(index), "name": "load", "input": ARGUMENTS[index]}
        for index in range(calls)
    ]
    results = [
        {"type": "tool_result", "tool_use_id": str(index), "content": RESULTS[index]}
        for index in reversed(range(calls))
    ]
    return [
        *({"role": "system", "content": text} for text in RULES),
        {"role": "user", "content": [{"type": "text", "text": ASK}]},
        {"role": "assistant", "content": [*turn, *uses]},
        *([{"role": "user", "content": results}] if results else []),
    ]


def as_items(turn: Any, calls: int) -> list[Message]:
    return [
        {"role": "system", "content": RULES[0]},
        {"role": "developer", "content": [{"type": "input_text", "text": RULES[1]}]},
        {"role": "user", "content": ASK},
        *turn,
        *({"type": "function_call", "call_id": str(index), "name": "load",
           "arguments": json.dumps(ARGUMENTS[index])} for index in range(calls)),
        *({"type": "function_call_output", "call_id": str(index), "output": RESULTS[index]}
          for index in reversed(range(calls))),
    ]  # fmt: skip


Case = tuple[Callable[..., Any], Callable[[Any, int], list[Message]], Any, str]


def cases() -> Iterator[Case]:
    """API, conversation in it, spelling of the turn, and the turn's reasoning."""
    for turn in IN_CHAT:
        yield chat, as_chat, turn, "Ask."
    for blocks in IN_MESSAGES:
        yield messages_api, as_messages, blocks, "Ask."
    for items in IN_RESPONSES:
        yield responses, as_items, items, "Ask."
    yield chat, as_chat, {"content": "Rain."}, ""
    yield messages_api, as_messages, [TEXT_PART], ""
    yield responses, as_items, [OUTPUT | {"content": "Rain."}], ""


@pytest.mark.parametrize("clear", [False, True])
@pytest.mark.parametrize("thinking", [False, True])
def test_every_spelling_renders_as_the_templates_own_fields(thinking: bool, clear: bool) -> None:
    """The four compare 840 renderings."""
    utils = pytest.importorskip("transformers.utils.chat_template_utils")
    defaults = replace(DEFAULTS, enable_thinking=thinking, clear_thinking=clear)
    compared = 0
    for (ask, spell, turn, reasoning), calls, goes_on in product(cases(), range(3), (False, True)):
        if not calls and not goes_on:
            continue  # the assistant's turn is the last
        theirs, _ = utils.render_jinja_template(
            [canonical(calls, reasoning=reasoning, goes_on=goes_on)],
            tools=TOOLS,
            chat_template=TEMPLATE,
            add_generation_prompt=True,
            enable_thinking=thinking,
            clear_thinking=clear,
        )
        messages = spell(turn, calls)
        if goes_on:
            messages.append({"role": "user", "content": THANKS})
        # Without `thinking`, Anthropic's API does not think.
        asked = {"thinking": {"type": "adaptive" if thinking else "disabled"}}
        fields = asked if ask is messages_api else {}
        assert ask(messages, defaults=defaults, **fields).prompt == theirs[0], (turn, calls)
        compared += 1
    assert compared == 210
