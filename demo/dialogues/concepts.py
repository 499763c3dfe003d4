"""Kinds of tools: purpose, parameters, and examples of use.

Function and parameter names vary per dialogue, so the model has to read them from the tools block.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from .world import FOODS, ROOMS, SKIES, World


@dataclass(frozen=True)
class Parameter:
    slot: str
    type: str
    names: tuple[str, ...]
    note: str


@dataclass(frozen=True)
class Use:
    """An example of use: request, values by slot, tool result, and the answer from it."""

    request: str
    values: dict[str, Any]
    result: str
    answer: str


@dataclass(frozen=True)
class Concept:
    verbs: tuple[str, ...]
    nouns: tuple[str, ...]
    purposes: tuple[str, ...]
    parameters: tuple[Parameter, ...]
    use: Callable[[World], Use]


PLACE = Parameter("place", "string", ("city", "location", "place", "town"), "Name of the city")
PERSON = Parameter("person", "string", ("to", "name", "person", "recipient"), "Who it is for")
TEXT = Parameter("text", "string", ("text", "message", "body", "content"), "The text")
MINUTES = Parameter("minutes", "integer", ("minutes", "duration", "time"), "Number of minutes")
ROOM = Parameter("room", "string", ("room", "area", "location"), "The room")
ON = Parameter("on", "boolean", ("on", "state", "enabled", "value"), "True for on")
FIRST = Parameter("first", "number", ("a", "x", "first", "left"), "The first number")
SECOND = Parameter("second", "number", ("b", "y", "second", "right"), "The second number")
QUERY = Parameter("query", "string", ("query", "q", "search", "terms"), "What to look for")
SYMBOL = Parameter("symbol", "string", ("symbol", "stock", "ticker"), "The stock symbol")
PEOPLE = Parameter("people", "integer", ("people", "guests", "count", "size"), "How many people")
ITEMS = Parameter("items", "array", ("items", "list", "foods", "products"), "The things")
URGENT = Parameter("urgent", "boolean", ("urgent", "important", "priority"), "If it is urgent")


def reported(world: World, value: dict[str, Any], plain: str) -> str:
    """Return a tool result as JSON, or as a plain sentence in one of three cases."""
    return plain if world.chance(0.35) else json.dumps(value)


def weather(world: World) -> Use:
    place, degrees, sky = world.city(), world.number(-9, 38), world.choice(SKIES)
    request = world.choice(
        ("What is the weather in {}?", "How is the weather in {} today?", "Weather in {}, please.",
         "What's the weather like in {}?", "Tell me the weather in {}.", "Is it warm in {}?")
    ).format(place)  # fmt: skip
    key = world.choice(("temperature", "temp", "degrees", "temp_c"))
    sky_key = world.choice(("sky", "weather", "condition", "conditions"))
    value = {key: degrees, sky_key: sky}
    if world.chance(0.3):
        value = {sky_key: sky, key: degrees}
    if world.chance(0.3):
        value = {"city": place, **value}
    plain = world.choice((f"{degrees} degrees, {sky}", f"{sky}, {degrees} degrees"))
    result = reported(world, value, plain)
    return Use(request, {"place": place}, result, f"It is {degrees} degrees and {sky} in {place}.")


def clock(world: World) -> Use:
    place = world.city()
    time = f"{world.number(0, 23):02}:{world.number(0, 59):02}"
    request = world.choice(
        ("What time is it in {}?", "What is the time in {}?", "Tell me the time in {}.")
    ).format(place)
    result = reported(world, {world.choice(("time", "now", "local_time")): time}, time)
    return Use(request, {"place": place}, result, f"It is {time} in {place}.")


def calculator(world: World) -> Use:
    a, b = world.number(1, 999), world.number(1, 999)
    request = world.choice(
        ("Add {} and {} with the tool.", "Use the tool to add {} and {}.",
         "What is {} + {}? Use the tool.")
    ).format(a, b)  # fmt: skip
    result = reported(world, {world.choice(("result", "sum", "value")): a + b}, str(a + b))
    return Use(request, {"first": a, "second": b}, result, f"The result is {a + b}.")


def message(world: World) -> Use:
    person, text = world.name(), world.words(1, 5)
    request = world.choice(
        ('Send "{1}" to {0}.', 'Send {0} the message "{1}".', 'Write to {0}: "{1}"')
    ).format(person, text)
    result = reported(world, {"status": world.choice(("sent", "ok"))}, "sent")
    return Use(request, {"person": person, "text": text}, result, f"I sent it to {person}.")


def timer(world: World) -> Use:
    minutes = world.number(2, 90)
    request = world.choice(
        ("Set a timer for {} minutes.", "Start a {} minute timer.", "Wake me in {} minutes.")
    ).format(minutes)
    result = reported(world, {"status": "started"}, "started")
    return Use(request, {"minutes": minutes}, result, f"The timer runs for {minutes} minutes.")


def light(world: World) -> Use:
    room, on = world.choice(ROOMS), world.chance(0.5)
    word = "on" if on else "off"
    request = world.choice(
        ("Turn {1} the light in the {0}.", "Switch {1} the {0} light.", "Light {1} in the {0}!")
    ).format(room, word)
    result = reported(world, {"ok": True}, "ok")
    return Use(request, {"room": room, "on": on}, result, f"The light in the {room} is {word}.")


def search(world: World) -> Use:
    query, title = world.words(1, 4), world.words(2, 4)
    request = world.choice(
        ('Search for "{}".', 'Find pages about "{}".', 'Look up "{}" on the web.')
    ).format(query)
    result = reported(world, {world.choice(("title", "result", "page")): title}, title)
    return Use(request, {"query": query}, result, f'I found "{title}".')


def stock(world: World) -> Use:
    symbol = world.drawn(lambda: world.syllables(1, 2).upper())
    price = world.number(3, 900)
    request = world.choice(
        ("What is the price of {}?", "How is the stock {} doing?", "Price of the stock {}?")
    ).format(symbol)
    result = reported(world, {world.choice(("price", "value")): price}, str(price))
    return Use(request, {"symbol": symbol}, result, f"{symbol} costs {price}.")


def booking(world: World) -> Use:
    person, people = world.name(), world.number(2, 19)
    request = world.choice(
        ("Book a table for {1} people, name {0}.", "Reserve a table for {1} under {0}.")
    ).format(person, people)
    result = reported(world, {"status": "booked"}, "booked")
    answer = f"The table for {people} is booked, {person}."
    return Use(request, {"person": person, "people": people}, result, answer)


def todo(world: World) -> Use:
    text, urgent = world.words(2, 5), world.chance(0.5)
    mark = world.choice((" It is urgent.", " This is urgent!")) if urgent else ""
    if not urgent and world.chance(0.5):
        mark = " It is not urgent."
    request = world.choice(('Add "{}" to my tasks.', 'New task: "{}".')).format(text) + mark
    result = reported(world, {"id": world.number(1, 99)}, "added")
    return Use(request, {"text": text, "urgent": urgent}, result, f'I added "{text}".')


def shopping(world: World) -> Use:
    items = world.rng.sample(FOODS, world.number(1, 4))
    listed = items[0] if len(items) == 1 else f"{', '.join(items[:-1])} and {items[-1]}"
    request = world.choice(("Buy {}.", "Put {} on the shopping list.", "We need {}.")).format(
        listed
    )
    result = reported(world, {"added": len(items)}, "ok")
    return Use(request, {"items": items}, result, f"{listed} on the list.".capitalize())


def date(world: World) -> Use:
    day = f"{world.number(2024, 2039)}-{world.number(1, 12):02}-{world.number(1, 28):02}"
    request = world.choice(("What is the date today?", "Which day is it?", "Today's date, please."))
    result = reported(world, {world.choice(("date", "today")): day}, day)
    return Use(request, {}, result, f"Today is {day}.")


def battery(world: World) -> Use:
    percent = world.number(1, 99)
    request = world.choice(("How full is the battery?", "Battery level?", "Check the battery."))
    result = reported(world, {world.choice(("percent", "level")): percent}, f"{percent}%")
    return Use(request, {}, result, f"The battery is at {percent} percent.")


def dice(world: World) -> Use:
    value = world.number(1, 6)
    request = world.choice(("Roll a dice.", "Roll the dice for me!", "Throw a dice, please."))
    result = reported(world, {world.choice(("value", "roll")): value}, str(value))
    return Use(request, {}, result, f"The dice shows {value}.")


CONCEPTS = (
    Concept(("get", "read", "find", "show", "check", "fetch"),
            ("weather", "forecast", "weather_now"),
            ("Get the weather for a city", "Current weather", "Weather in a city",
             "Weather report"),
            (PLACE,), weather),
    Concept(("get", "tell", "find", "check", "fetch"), ("time", "clock", "local_time"),
            ("Get the time in a city", "Local time", "What time it is in a city"),
            (PLACE,), clock),
    Concept(("add", "sum", "calc", "do"), ("numbers", "two", "values"),
            ("Add two numbers", "Adds numbers", "The sum of two numbers"),
            (FIRST, SECOND), calculator),
    Concept(("send", "write", "post"), ("message", "mail", "email", "note"),
            ("Send a message", "Sends a message to a person", "Write to someone"),
            (PERSON, TEXT), message),
    Concept(("set", "start", "make"), ("timer", "alarm", "countdown"),
            ("Start a timer", "Set a timer in minutes", "A kitchen timer"),
            (MINUTES,), timer),
    Concept(("set", "switch", "turn", "control"), ("light", "lamp", "lights"),
            ("Switch a light", "Turn a light on or off", "Control the light in a room"),
            (ROOM, ON), light),
    Concept(("search", "find", "look_up", "query"), ("web", "pages", "docs", "internet"),
            ("Search the web", "Find pages", "Web search"),
            (QUERY,), search),
    Concept(("get", "find", "check", "fetch"), ("stock", "price", "stock_price", "quote"),
            ("Price of a stock", "Get a stock price", "Stock prices"),
            (SYMBOL,), stock),
    Concept(("book", "reserve", "make"), ("table", "booking", "restaurant"),
            ("Book a table", "Reserve a table at a restaurant"),
            (PERSON, PEOPLE), booking),
    Concept(("add", "create", "new"), ("task", "todo", "reminder"),
            ("Add a task", "Create a new task", "Add to the task list"),
            (TEXT, URGENT), todo),
    Concept(("add", "buy", "put", "order"), ("shopping", "groceries", "items", "food"),
            ("Add to the shopping list", "Buy food", "Put things on the shopping list"),
            (ITEMS,), shopping),
    Concept(("get", "show", "tell"), ("date", "today", "day"),
            ("Today's date", "Get the date", "Which day it is"), (), date),
    Concept(("get", "check", "read"), ("battery", "power", "battery_level"),
            ("Battery level", "Check the battery"), (), battery),
    Concept(("roll", "throw", "cast"), ("dice", "die", "a_dice"),
            ("Roll a dice", "Throws a dice"), (), dice),
)  # fmt: skip
