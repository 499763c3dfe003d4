"""Answers of a hundred tokens or more: counting, lists and stories."""

from __future__ import annotations

from .turn import Turn
from .world import ANIMALS, COLOURS, FOODS, World

BEGINNINGS = (
    "Once upon a time, {who} lived in {city} with a {animal}.",
    "Long ago, {who} had a small house in {city}.",
    "One morning, {who} woke up early in {city}.",
)
MIDDLES = (
    "Every day {who} walked to the river and looked at the water.",
    "The {animal} was hungry, so {who} gave it some {food}.",
    "Then {who} found a {colour} key under an old tree.",
    "The key opened a {colour} door in the side of a mountain.",
    "Behind the door there was a garden full of {colour} flowers.",
    "An old woman sat in the garden and drank tea.",
    "She asked {who} for some {food} and a good song.",
    "So {who} sang about {city}, and the {animal} listened.",
    "The wind took the song over the hills and far away.",
    "In the evening it began to rain, and the road was dark.",
    "The {animal} knew the way and ran ahead of {who}.",
    "At the bridge they met a man with a {colour} hat.",
    "He told {who} that the moon was made of {food}.",
    "They laughed about it and walked on together.",
)
ENDINGS = (
    "At last {who} came home to {city}, and they were all happy.",
    "And that is how {who} and the {animal} became friends.",
    "From that day on, {who} always had some {food} in the house.",
)


def story(world: World) -> Turn:
    who = world.name()
    cast = {
        "who": who,
        "city": world.city(),
        "animal": world.choice(ANIMALS),
        "food": world.choice(FOODS),
        "colour": world.choice(COLOURS),
    }
    length = world.choice(("", "", "short ", "long "))
    count = {"": world.number(5, 8), "short ": 3, "long ": 12}[length]
    middles = [MIDDLES[place] for place in sorted(world.rng.sample(range(len(MIDDLES)), count))]
    sentences = [world.choice(BEGINNINGS), *middles, world.choice(ENDINGS)]
    ask = world.choice(
        ("Tell a {}story about {}.", "Tell me a {}story about {}.", "Write a {}story about {}.")
    )
    text = " ".join(sentences).format(**cast)
    return Turn(ask.format(length, who), f"A {length}story about {who}.", text)


def count(world: World) -> Turn:
    first = world.number(1, 60)
    last = first + world.number(3, 45)
    if world.chance(0.2):
        first, last = last, first
    step = 1 if first < last else -1
    ask = "Count from {} to {}." if step > 0 else "Count down from {} to {}."
    if step > 0 and world.chance(0.3):
        ask = world.choice(("Count from {} up to {}.", "Please count from {} to {}."))
    numbers = ", ".join(str(number) for number in range(first, last + step, step))
    direction = "Up" if step > 0 else "Down"
    return Turn(ask.format(first, last), f"{direction} from {first} to {last}.", f"{numbers}.")


def listing(world: World) -> Turn:
    kind, options = world.rng.choice((("animals", ANIMALS), ("colours", COLOURS), ("foods", FOODS)))
    size = world.number(2, 8)
    ask = world.choice(("List {} {}.", "Name {} {}.", "Give me a list of {} {}."))
    lines = "\n".join(f"{place}. {options[place - 1]}" for place in range(1, size + 1))
    return Turn(ask.format(size, kind), f"A list of {size} {kind}.", lines)
