"""Dialogues that no one would have, dense in what takes longest to learn: which name to call.

A tools block is long, and an ordinary dialogue makes one use of it. These make many.
"""

from __future__ import annotations

from .concepts import CONCEPTS
from .tools import (
    arguments_of,
    call,
    calling,
    function_name,
    shuffled,
    signature,
    tool_for,
    with_reasoning,
)
from .turn import Dialogue, Message
from .world import World

VERBS = tuple(sorted({verb for concept in CONCEPTS for verb in concept.verbs}))
NOUNS = tuple(sorted({noun for concept in CONCEPTS for noun in concept.nouns}))


def requests(world: World, count: int) -> list[list[int]]:
    """The numbers below `count`, each once, one or two to a request.

    A tool is asked for once: its second call could be copied from the first.
    """
    order = world.rng.sample(range(count), count)
    groups = []
    while order:
        size = world.number(1, 2)
        groups.append(order[:size])
        order = order[size:]
    return groups


def look_up(world: World) -> Dialogue:
    """Tools of random words, asked for by their descriptions, which stand behind the names."""
    count = world.number(2, 6)
    # Few verbs and nouns, so that only the whole name tells one tool from another.
    verbs = (*world.rng.sample(VERBS, 3), world.syllables(2, 3))
    nouns = (*world.rng.sample(NOUNS, 3), world.syllables(2, 3))
    names: set[str] = set()
    while len(names) < count:
        names.add(function_name(world, verbs, nouns))
    tools = [signature(world, name, world.words(1, 3), []) for name in sorted(names)]
    world.rng.shuffle(tools)
    messages: list[Message] = []
    for group in requests(world, count):
        wanted = [tools[number] for number in group]
        messages += round_of(
            " And: ".join(tool["function"]["description"] for tool in wanted),
            {"role": "assistant", "content": "", "tool_calls": [call(t, {}) for t in wanted]},
        )
    return Dialogue("look up", messages[:-1], tools, thinking=False)


def many_calls(world: World) -> Dialogue:
    """Request after request of one tools block, each answered by its calls."""
    thinking = world.chance(0.5)
    concepts = world.rng.sample(CONCEPTS, world.number(2, 4))
    box = [tool_for(world, concept) for concept in concepts]
    messages: list[Message] = []
    for group in requests(world, len(concepts)):
        uses = [concepts[number].use(world) for number in group]
        made = [box[number] for number in group]
        calls = [
            call(tool, arguments_of(use, keys))
            for (tool, keys), use in zip(made, uses, strict=True)
        ]
        joint = world.choice((" ", " And: ", " Also: ", " Then: "))
        messages += round_of(
            joint.join(use.request for use in uses),
            with_reasoning(
                {"role": "assistant", "content": "", "tool_calls": calls},
                calling([tool for tool, _ in made]),
                thinking,
            ),
        )
    return Dialogue("many calls", messages[:-1], shuffled(world, box), thinking)


def round_of(request: str, answer: Message) -> list[Message]:
    """A request, its calls, and a short result, with nothing said of it."""
    return [{"role": "user", "content": request}, answer, {"role": "tool", "content": "ok"}]


PRACTICE = {"look up": look_up, "many calls": many_calls}
