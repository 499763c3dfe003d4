"""Dialogues with tools: calls and results in GLM's format."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

from .concepts import CONCEPTS, Concept, Use
from .turn import Dialogue, Message, Turn
from .world import World

Tool = dict[str, Any]


def camel(name: str) -> str:
    first, *rest = name.split("_")
    return first + "".join(part.capitalize() for part in rest)


def function_name(world: World, verbs: tuple[str, ...], nouns: tuple[str, ...]) -> str:
    def draw() -> str:
        name = f"{world.choice(verbs)}_{world.choice(nouns)}"
        if world.chance(0.15):
            name = world.choice(nouns)
        if world.chance(0.25):
            name += f"_{world.choice(('tool', 'v2', 'api', 'now', world.syllables(1, 2)))}"
        elif world.chance(0.15):
            name = f"{world.syllables(1, 2)}_{name}"
        return camel(name) if world.chance(0.2) else name

    return world.drawn(draw)


def signature(
    world: World, name: str, purpose: str, parameters: list[tuple[str, str, str]]
) -> Tool:
    """Return a tool definition in one of the shapes that clients send.

    Parameters are (name, type, note).
    """
    noted = world.chance(0.3)
    properties: dict[str, Any] = {}
    for key, kind, note in parameters:
        schema: dict[str, Any] = {"type": kind}
        if kind == "array":
            schema["items"] = {"type": "string"}
        if noted:
            schema["description"] = note
        properties[key] = schema
    arguments: dict[str, Any] = {"type": "object", "properties": properties}
    if parameters and world.chance(0.8):
        arguments["required"] = [key for key, _, _ in parameters]
    function: dict[str, Any] = {"name": name, "description": purpose, "parameters": arguments}
    if not parameters and world.chance(0.2):
        del function["parameters"]
    return {"type": "function", "function": function}


def tool_for(world: World, concept: Concept) -> tuple[Tool, dict[str, str]]:
    """Draw a signature for a concept, and its parameter name for each slot."""
    keys: dict[str, str] = {}
    for parameter in concept.parameters:
        free = tuple(name for name in parameter.names if name not in keys.values())
        keys[parameter.slot] = world.choice(free)
    parameters = [(keys[p.slot], p.type, p.note) for p in concept.parameters]
    name = function_name(world, concept.verbs, concept.nouns)
    return signature(world, name, world.choice(concept.purposes), parameters), keys


def call(tool: Tool, arguments: dict[str, Any]) -> Message:
    return {
        "type": "function",
        "function": {"name": tool["function"]["name"], "arguments": arguments},
    }


def toolbox(world: World, needed: list[Concept]) -> list[tuple[Tool, dict[str, str]]]:
    """Draw signatures for the needed concepts, in order, then for up to two others."""
    others = [concept for concept in CONCEPTS if concept not in needed]
    extra = world.rng.sample(others, world.rng.choice((0, 0, 1, 1, 2)))
    return [tool_for(world, concept) for concept in needed + extra]


def shuffled(world: World, box: list[tuple[Tool, dict[str, str]]]) -> list[Tool]:
    tools = [tool for tool, _ in box]
    world.rng.shuffle(tools)
    return tools


def arguments_of(use: Use, keys: dict[str, str]) -> dict[str, Any]:
    return {keys[slot]: value for slot, value in use.values.items()}


def calling(tools: list[Tool]) -> str:
    """Name the called tools, in quotes so that the names have the tokens of the tools block."""
    names = " and ".join(f'"{tool["function"]["name"]}"' for tool in tools)
    return f"I call {names}."


def with_reasoning(message: Message, reasoning: str, thinking: bool) -> Message:
    return {**message, "reasoning_content": reasoning} if thinking else message


def one_call(world: World, thinking: bool, skill: str = "one call") -> Dialogue:
    """Draw a request, its call, its result and the answer, ending where `skill` says."""
    concept = world.rng.choice(CONCEPTS)
    if skill == "no arguments":
        concept = world.rng.choice([concept for concept in CONCEPTS if not concept.parameters])
    box = toolbox(world, [concept])
    tool, keys = box[0]
    use = concept.use(world)
    calls = [call(tool, arguments_of(use, keys))]
    messages: list[Message] = [
        {"role": "user", "content": use.request},
        with_reasoning(
            {"role": "assistant", "content": "", "tool_calls": calls}, calling([tool]), thinking
        ),
    ]
    if skill == "tool result":
        messages += [
            {"role": "tool", "content": use.result},
            with_reasoning(
                {"role": "assistant", "content": use.answer}, "I have the result.", thinking
            ),
        ]
    return Dialogue(skill, messages, shuffled(world, box), thinking)


def two_calls(world: World, thinking: bool, skill: str = "two calls") -> Dialogue:
    """Draw a request for two tools, or for one tool twice."""
    with_values = [concept for concept in CONCEPTS if concept.parameters]
    twice = world.chance(0.4)
    first = world.rng.choice(with_values if twice else CONCEPTS)
    second = first if twice else world.rng.choice([c for c in CONCEPTS if c is not first])
    box = toolbox(world, [first] if twice else [first, second])
    uses = [first.use(world), second.use(world)]
    made = [box[0], box[0]] if twice else box[:2]
    calls = [
        call(tool, arguments_of(use, keys)) for (tool, keys), use in zip(made, uses, strict=True)
    ]
    joint = world.choice((" {}", " And: {}", " Also: {}", " Then: {}"))
    messages: list[Message] = [
        {"role": "user", "content": uses[0].request + joint.format(uses[1].request)},
        with_reasoning(
            {"role": "assistant", "content": "", "tool_calls": calls},
            calling([tool for tool, _ in made]),
            thinking,
        ),
    ]
    if skill == "two results":
        answer = " ".join(use.answer for use in uses)
        messages += [{"role": "tool", "content": use.result} for use in uses]
        messages.append(
            with_reasoning(
                {"role": "assistant", "content": answer}, "I have the results.", thinking
            )
        )
    return Dialogue(skill, messages, shuffled(world, box), thinking)


def value_of(world: World, kind: str) -> Any:
    if kind == "string":
        return world.rng.choice(
            (world.name, world.city, lambda: world.words(1, 3), lambda: world.choice(LITERALS))
        )()
    if kind == "boolean":
        return world.chance(0.5)
    if kind == "array":
        return world.words(1, 4).split()
    return world.number(0, 999)


LITERALS = (
    "a < b & c", "x = 1;", "1, 2, 3", "C:/tmp/a.txt", "10%", "yes/no", "(a + b) * c", "#5",
    "me@mail.org", "true", "42", "{}", "<b>bold</b>", "path/to/file.py", "ß ä ö ü", "你好",
)  # fmt: skip


def named_call(world: World, thinking: bool) -> Dialogue:
    """Draw a request that names the tool and its values."""
    kinds = [world.choice(("string", "string", "integer", "number", "boolean", "array"))
             for _ in range(world.number(1, 3))]  # fmt: skip
    keys = world.rng.sample(
        ("key", "value", "name", "count", "path", "title", "flag", "size", "tags", "input", "id",
         "city", "text", "query", "limit", world.syllables(2, 3), world.syllables(1, 2)), len(kinds)
    )  # fmt: skip
    name = function_name(
        world,
        ("run", "do", "get", "make", "call", "use", "lookup", world.syllables(2, 2)),
        ("thing", "job", "data", "item", "file", "test", world.syllables(2, 3)),
    )
    arguments = {key: value_of(world, kind) for key, kind in zip(keys, kinds, strict=True)}
    purpose = f"Does {world.words(1, 2)}"
    tool = signature(
        world,
        name,
        purpose,
        [(key, kind, "A value") for key, kind in zip(keys, kinds, strict=True)],
    )
    phrases = [
        f"{key} = {json.dumps(value, ensure_ascii=False)}" for key, value in arguments.items()
    ]
    listed = phrases[0] if len(phrases) == 1 else f"{', '.join(phrases[:-1])} and {phrases[-1]}"
    request = world.choice(("Call {} with {}.", "Use {} with {}.", "Please call {} with {}."))
    others = [
        tool_for(world, concept) for concept in world.rng.sample(CONCEPTS, world.number(0, 2))
    ]
    tools = shuffled(world, [(tool, {}), *others])
    messages = [
        {"role": "user", "content": request.format(name, listed)},
        with_reasoning(
            {"role": "assistant", "content": "", "tool_calls": [call(tool, arguments)]},
            calling([tool]),
            thinking,
        ),
    ]
    return Dialogue("named call", messages, tools, thinking)


def unneeded(world: World, thinking: bool, simple: Callable[[World], Turn]) -> Dialogue:
    """Draw a question that needs none of the offered tools."""
    box = toolbox(world, [world.rng.choice(CONCEPTS)])
    return Dialogue(
        "tools not needed", simple(world).messages(thinking), shuffled(world, box), thinking
    )
