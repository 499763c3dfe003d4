"""Synthetic dialogues for the demo checkpoint: unlimited, seeded, with a held-out split."""

from __future__ import annotations

import random
from collections.abc import Callable

from . import arithmetic, everyday, long, text, tools
from .practice import PRACTICE
from .turn import Dialogue, Message, Turn
from .world import World

__all__ = ["PRACTICE", "SKILLS", "Dialogue", "Message", "Turn", "World", "draw", "mixture"]

Simple = Callable[[World], Turn]

SIMPLE: dict[str, tuple[Simple, float]] = {
    "greeting": (everyday.greeting, 3),
    "say hello": (everyday.say_hello, 1),
    "courtesy": (everyday.courtesy, 1),
    "identity": (everyday.identity, 1),
    "capital": (everyday.capital, 1),
    "unknown": (everyday.unknown, 3),
    "arithmetic": (arithmetic.arithmetic, 9),
    "word problem": (arithmetic.word_problem, 3),
    "repeat": (text.repeat, 4),
    "upper case": (text.upper_case, 2),
    "reverse": (text.reverse, 3),
    "count words": (text.count_words, 3),
    "pick word": (text.pick_word, 2),
    "JSON": (text.as_json, 4),
    "count": (long.count, 2),
    "list": (long.listing, 1),
    "story": (long.story, 2),
}
"""Skills of one question and one answer, with their weights in the mixture."""

SYSTEMS = (
    "You are a helpful assistant.",
    "Be brief.",
    "Answer the user.",
    "You are a friendly and honest assistant. Answer in English.",
    "Today is a good day.",
)


def weighted(world: World) -> Simple:
    skills = list(SIMPLE.values())
    return world.rng.choices([skill for skill, _ in skills], [weight for _, weight in skills])[0]


def with_system(world: World, messages: list[Message], share: float = 0.25) -> list[Message]:
    if not world.chance(share):
        return messages
    return [{"role": "system", "content": world.choice(SYSTEMS)}, *messages]


def simple(skill: str) -> Callable[[World], Dialogue]:
    def make(world: World) -> Dialogue:
        thinking = world.chance(0.7)
        messages = SIMPLE[skill][0](world).messages(thinking)
        return Dialogue(skill, with_system(world, messages), [], thinking)

    return make


def named_identity(world: World) -> Dialogue:
    system, turn = everyday.named_identity(world)
    thinking = world.chance(0.7)
    messages = [{"role": "system", "content": system}, *turn.messages(thinking)]
    return Dialogue("named identity", messages, [], thinking)


def multi_turn(world: World) -> Dialogue:
    """Draw two to four turns; in half of the cases the last one asks for a fact of the first."""
    short = [everyday.greeting, everyday.courtesy, text.repeat, text.pick_word, everyday.capital]
    turns = [
        (world.rng.choice(short) if world.chance(0.4) else weighted(world))(world)
        for _ in range(world.number(0, 2))
    ]
    if world.chance(0.5):
        statement, question = everyday.memory(world)
        turns = [statement, *turns, question]
    else:
        turns = [*turns, weighted(world)(world), weighted(world)(world)]
    thinking = world.chance(0.7)
    messages = [message for turn in turns for message in turn.messages(thinking)]
    return Dialogue(
        "multi-turn", with_system(world, messages), [], thinking, clear_thinking=world.chance(0.4)
    )


def with_tools(make: Callable[[World, bool], Dialogue]) -> Callable[[World], Dialogue]:
    """Add a system prompt or an ordinary first turn to some tool dialogues."""

    def built(world: World) -> Dialogue:
        dialogue = make(world, world.chance(0.7))
        messages = dialogue.messages
        if world.chance(0.15):
            messages = everyday.greeting(world).messages(dialogue.thinking) + messages
        return Dialogue(
            dialogue.skill,
            with_system(world, messages),
            dialogue.tools,
            dialogue.thinking,
            clear_thinking=world.chance(0.4),
        )

    return built


SKILLS: dict[str, tuple[Callable[[World], Dialogue], float]] = {
    **{skill: (simple(skill), weight) for skill, (_, weight) in SIMPLE.items()},
    "named identity": (named_identity, 1.5),
    "multi-turn": (multi_turn, 8),
    "one call": (with_tools(tools.one_call), 2),
    "no arguments": (with_tools(lambda w, t: tools.one_call(w, t, "no arguments")), 1),
    "two calls": (with_tools(tools.two_calls), 2),
    "named call": (with_tools(tools.named_call), 5),
    "tool result": (with_tools(lambda w, t: tools.one_call(w, t, "tool result")), 8),
    "two results": (with_tools(lambda w, t: tools.two_calls(w, t, "two results")), 5),
    "tools not needed": (with_tools(lambda w, t: tools.unneeded(w, t, weighted(w))), 3),
}
"""Every skill, with its weight in the mixture."""


def draw(skill: str, seed: int, *, evaluation: bool) -> Dialogue:
    """Draw a dialogue of a skill."""
    return SKILLS[skill][0](World(random.Random(seed), evaluation))


def mixture(world: World) -> Dialogue:
    """Draw a dialogue of a skill chosen by weight."""
    makers = [make for make, _ in SKILLS.values()]
    return world.rng.choices(makers, [weight for _, weight in SKILLS.values()])[0](world)
