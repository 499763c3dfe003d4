"""Practice dialogues with many calls, for choosing the right tool name.

An ordinary dialogue has a long tools block and one or two calls.
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
    """Group the tool indices below `count`, one or two per request.

    Each tool is called once, because a second call could be copied from the first.
    """
    order = world.rng.sample(range(count), count)
    groups = []
    while order:
        size = world.number(1, 2)
        groups.append(order[:size])
        order = order[size:]
    return groups


def look_up(world: World) -> Dialogue:
    """Draw tools of random words, requested by their descriptions."""
    count = world.number(2, 6)
    # Few verbs and nouns, so that names differ only as a whole.
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
    """Draw several requests for the same tools block, each answered by calls."""
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
    """Return a request, its calls and a short result."""
    return [{"role": "user", "content": request}, answer, {"role": "tool", "content": "ok"}]


PRACTICE = {"look up": look_up, "many calls": many_calls}
