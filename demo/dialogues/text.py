"""Short texts to repeat, transform and count, and JSON on request."""

from __future__ import annotations

import json

from .turn import Turn
from .world import COLOURS, JOBS, WORDS, World

UPPER_WORDS = WORDS[:60]
"""Few, because the model has to learn the upper case of each word by heart."""


def quoted(world: World, text: str) -> str:
    return world.choice(('"{}"', '"{}"', ": {}", "'{}'")).format(text)


def instruction(verb: str, text: str) -> str:
    return f"{verb}{text}" if text.startswith(":") else f"{verb} {text}"


def repeat(world: World) -> Turn:
    text = world.words(1, 6)
    if world.chance(0.4):
        text = (
            f"{world.name()} {world.choice(('likes', 'sees', 'has', 'wants'))} {world.words(1, 3)}"
        )
    if world.chance(0.2):
        text = f"{text} {world.number(0, 999)}"
    verb = world.choice(("Repeat", "Please repeat", "Repeat after me", "Echo", "Say"))
    user = instruction(verb, quoted(world, text))
    return Turn(user, "I repeat the text.", text)


def upper_case(world: World) -> Turn:
    count = world.number(1, 4)
    text = world.drawn(lambda: " ".join(world.rng.sample(UPPER_WORDS, count)))
    ask = world.choice(("Write {} in upper case.", "Make {} upper case.", "Upper case of {}?"))
    return Turn(ask.format(f'"{text}"'), "I write capital letters.", text.upper())


def reverse(world: World) -> Turn:
    text = world.words(2, 5)
    ask = world.choice(
        ("Reverse the words {}.", "Say the words {} in reverse order.", "Turn around the words {}.")
    )
    backwards = " ".join(reversed(text.split()))
    return Turn(ask.format(f'"{text}"'), "I start with the last word.", backwards)


def count_words(world: World) -> Turn:
    text = world.words(1, 8)
    ask = world.choice(
        ("How many words are in {}?", "Count the words in {}.", "How many words does {} have?")
    )
    counted = ", ".join(f"{word} {place}" for place, word in enumerate(text.split(), 1))
    total = len(text.split())
    reply = "There is 1 word." if total == 1 else f"There are {total} words."
    return Turn(ask.format(f'"{text}"'), f"{counted}.", reply, f"{counted}. {reply}")


def pick_word(world: World) -> Turn:
    text = world.words(2, 7)
    first = world.chance(0.5)
    which = "first" if first else "last"
    ask = world.choice(("What is the {} word of {}?", "Give me the {} word in {}."))
    word = text.split()[0 if first else -1]
    return Turn(ask.format(which, f'"{text}"'), f"I look at the {which} word.", word)


def as_json(world: World) -> Turn:
    who = world.name()
    facts: dict[str, tuple[str, str | int]] = {
        "age": ("is {} years old", world.number(2, 98)),
        "city": ("lives in {}", world.city()),
        "colour": ("likes {}", world.choice(COLOURS)),
        "job": ("works as a {}", world.choice(JOBS)),
        "pets": ("has {} pets", world.number(1, 9)),
    }
    keys = world.rng.sample(sorted(facts), world.number(1, 3))
    phrases = [facts[key][0].format(facts[key][1]) for key in keys]
    listed = phrases[0] if len(phrases) == 1 else f"{', '.join(phrases[:-1])} and {phrases[-1]}"
    asked = ["name", *keys]
    named = f"{', '.join(asked[:-1])} and {asked[-1]}"
    order = world.choice(
        ("Answer as JSON with keys {named}. {who} {listed}.",
         "{who} {listed}. Answer as JSON with keys {named}.",
         "{who} {listed}. Give me JSON with the keys {named}.")
    )  # fmt: skip
    reply = json.dumps({"name": who, **{key: facts[key][1] for key in keys}})
    user = order.format(named=named, who=who, listed=listed)
    return Turn(user, f"The keys are {named}.", reply)
