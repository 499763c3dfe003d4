"""Conversations with reasoning and tool calls, rendered later by a checkpoint's chat template."""

from __future__ import annotations

import json
import random
from typing import Any

from corpus_prose import NAMES, PLACES

Messages = list[dict[str, Any]]


def _tool(name: str, description: str, **parameters: dict[str, Any]) -> dict[str, Any]:
    required = [key for key, value in parameters.items() if not value.pop("optional", False)]
    return {
        "type": "function",
        "function": {
            "name": name,
            "description": description,
            "parameters": {"type": "object", "properties": parameters, "required": required},
        },
    }


def _text(description: str, **more: Any) -> dict[str, Any]:
    return {"type": "string", "description": description, **more}


def _number(description: str, **more: Any) -> dict[str, Any]:
    return {"type": "integer", "description": description, **more}


def _tools(rng: random.Random) -> list[dict[str, Any]]:
    tools = [
        _tool("get_weather", "Current weather of a city.", city=_text("City"),
              unit=_text("Unit", enum=["celsius", "fahrenheit"], optional=True)),
        _tool("read_file", "Read a text file.", path=_text("Path"),
              start_line=_number("First line", optional=True)),
        _tool("run_command", "Run a shell command.", command=_text("Command line"),
              timeout=_number("Seconds", optional=True)),
        _tool("search_orders", "Find orders of a customer.", customer=_text("Name"),
              status=_text("Status", enum=["open", "shipped", "cancelled"], optional=True)),
        _tool("create_event", "Add a calendar event.", title=_text("Title"),
              start=_text("ISO 8601"), minutes=_number("Duration"),
              attendees={"type": "array", "items": {"type": "string"}, "optional": True}),
        _tool("convert_currency", "Convert an amount.",
              amount={"type": "number"}, source=_text("Code"), target=_text("Code")),
    ]  # fmt: skip
    rng.shuffle(tools)
    return tools


def _call(name: str, **arguments: Any) -> dict[str, Any]:
    return {"type": "function", "function": {"name": name, "arguments": arguments}}


def _assistant(reasoning: str, content: str = "", *calls: dict[str, Any]) -> dict[str, Any]:
    message = {"role": "assistant", "reasoning_content": reasoning, "content": content}
    return message | ({"tool_calls": list(calls)} if calls else {})


def _result(value: Any) -> dict[str, Any]:
    text = value if isinstance(value, str) else json.dumps(value)
    return {"role": "tool", "content": text}


def conversation(rng: random.Random, index: int) -> tuple[Messages, list[dict[str, Any]]]:
    """Messages and tools, from one of the scenarios in turn."""
    scenarios = (_weather, _repair, _orders, _meeting, _currency, _no_tool, _search_code)
    messages: Messages = []
    if rng.random() < 0.5:
        tone = rng.choice(("Be brief.", "Answer in full sentences.", "You help a small company."))
        messages.append({"role": "system", "content": f"You are a careful assistant. {tone}"})
    return messages + scenarios[index % len(scenarios)](rng), _tools(rng)


def _weather(rng: random.Random) -> Messages:
    first, second = rng.sample(PLACES, 2)
    a, b = rng.sample(range(-5, 35), 2)
    warmer = first if a > b else second
    return [
        {"role": "user", "content": f"Is it warmer in {first} or in {second} right now?"},
        _assistant(
            f"The user compares {first} and {second}. I need the weather of both, and the two"
            " calls do not depend on each other, so I make them together.",
            "",
            _call("get_weather", city=first, unit="celsius"),
            _call("get_weather", city=second, unit="celsius"),
        ),
        _result({"city": first, "temperature": a, "sky": rng.choice(("clear", "rain"))}),
        _result({"city": second, "temperature": b, "sky": rng.choice(("cloudy", "fog"))}),
        _assistant(
            f"{first} has {a} degrees, {second} {b}. The difference is {abs(a - b)}.",
            f"It is warmer in {warmer}: {max(a, b)} °C, against {min(a, b)} °C in the other city.",
        ),
    ]


def _repair(rng: random.Random) -> Messages:
    name = rng.choice(("totals", "average", "latest", "shares", "median"))
    line = rng.randint(8, 60)
    path = f"src/{rng.choice(('report', 'billing', 'stats'))}.py"
    return [
        {"role": "user", "content": f"The test of `{name}` fails. Please find out why."},
        _assistant(
            "First I run the test to see the error instead of guessing.",
            "I will run the test first.",
            _call("run_command", command=f"python -m pytest -q -k {name}", timeout=120),
        ),
        _result(
            f"F\n{path}:{line}: in {name}\n    return sum(values) / len(values)\nE  "
            " ZeroDivisionError: division by zero\n1 failed in 0.21s"
        ),
        _assistant(
            f"The division fails for an empty list. I look at the function in {path} near line"
            f" {line} before I suggest a change.",
            "",
            _call("read_file", path=path, start_line=max(1, line - 4)),
        ),
        _result(f"def {name}(values):\n    values = list(values)\n"
                "    return sum(values) / len(values)\n"),
        _assistant(
            "There is no guard for the empty case. Returning 0.0 hides the difference between"
            " nothing and zero, so raising or returning None would be cleaner; the test expects"
            " None, as its name says.",
            f"`{name}` divides by `len(values)` without checking for an empty list. Add"
            " `if not values: return None` before the division; the test then passes.",
        ),
    ]  # fmt: skip


def _orders(rng: random.Random) -> Messages:
    customer, number = rng.choice(NAMES), rng.randint(1000, 9999)
    days = rng.randint(2, 9)
    return [
        {"role": "user", "content": f"Where is {customer}'s last order? She is getting nervous."},
        _assistant(
            f"I have to look up the orders of {customer}. No status is given, so I leave it out.",
            "",
            _call("search_orders", customer=customer),
        ),
        _result({"orders": [
            {"id": number, "status": "shipped", "eta_days": days, "items": rng.randint(1, 6)},
            {"id": number - rng.randint(20, 90), "status": "cancelled", "items": 1},
        ]}),
        _assistant(
            f"Order {number} is shipped and due in {days} days; the older one was cancelled.",
            f"Order {number} is on its way and should arrive in {days} days. An older order was"
            " cancelled, in case she asks about that one.",
        ),
    ]  # fmt: skip


def _meeting(rng: random.Random) -> Messages:
    people = rng.sample(NAMES, 2)
    day, hour, minutes = rng.randint(10, 28), rng.randint(8, 16), rng.choice((15, 30, 45, 60))
    return [
        {
            "role": "user",
            "content": f"Put a {minutes} minute review with {people[0]} and {people[1]} into my"
            f" calendar, on 2026-11-{day} at {hour}:00.",
        },
        _assistant(
            "All fields are known: title, start, duration and two attendees. The start has to be"
            " ISO 8601.",
            "",
            _call("create_event", title="Review", start=f"2026-11-{day}T{hour:02}:00:00",
                  minutes=minutes, attendees=people),
        ),
        _result({"ok": True, "id": f"evt-{rng.randint(100, 999)}"}),
        _assistant("The event was created.", "Done: the review is in your calendar, and both are"
                   " invited."),
        {"role": "user", "content": "Thanks! Is that day a holiday somewhere?"},
        _assistant(
            "None of the tools knows holidays. I should say so and not invent an answer.",
            "I cannot look up holidays with the tools I have, so I would check a public calendar"
            " for the countries of your guests.",
        ),
    ]  # fmt: skip


def _currency(rng: random.Random) -> Messages:
    amount, rate = rng.randint(20, 900), rng.randint(60, 190) / 100
    source, target = rng.sample(("EUR", "USD", "GBP", "CHF", "JPY", "SEK"), 2)
    value = round(amount * rate, 2)
    half = round(value / 2, 2)
    return [
        {
            "role": "user",
            "content": f"We split {amount} {source} between two people. How much {target} is that"
            " for each of us?",
        },
        _assistant(
            f"Convert {amount} {source} to {target} first, then divide by two.",
            "",
            _call("convert_currency", amount=amount, source=source, target=target),
        ),
        _result({"amount": value, "rate": rate}),
        _assistant(
            f"{value} / 2 = {half}.",
            f"{amount} {source} are {value} {target}, so each of you gets {half} {target}.",
        ),
    ]


def _no_tool(rng: random.Random) -> Messages:
    subject, answer = rng.choice((
        ("why the sky is blue", "Air scatters short wavelengths more than long ones, so scattered"
         " sunlight, which we see from all sides, is mostly blue."),
        ("what a hash table is", "A hash table stores each value in a slot that is computed from"
         " its key, so that finding it takes about the same time at any size."),
        ("how yeast makes dough rise", "Yeast turns sugar into carbon dioxide. The gluten holds the"
         " gas in small bubbles, and the dough grows around them."),
        ("why ships float", "A ship sinks until it has displaced its own weight of water. As its"
         " hull is mostly air, that happens long before the deck is wet."),
    ))  # fmt: skip
    return [
        {"role": "user", "content": f"Explain in two sentences {subject}, please."},
        _assistant(
            "This is general knowledge, and none of the tools helps. Two sentences are asked for.",
            answer,
        ),
    ]


def _search_code(rng: random.Random) -> Messages:
    symbol = rng.choice(("parse_date", "MAX_RETRIES", "open_session", "render_page"))
    files = rng.sample(("app/main.py", "app/util.py", "tests/test_app.py", "cli/run.py"), 3)
    lines = [f"{file}:{rng.randint(3, 240)}:    {symbol}" for file in files]
    return [
        {"role": "user", "content": f"Which files use `{symbol}`?"},
        _assistant(
            "A search over the tree is the quickest way. I restrict it to Python files.",
            "",
            _call("run_command", command=f"grep -rn --include='*.py' {symbol} ."),
        ),
        _result("\n".join(lines)),
        _assistant(
            f"Three files match: {', '.join(files)}.",
            f"`{symbol}` is used in three files:\n\n" + "\n".join(f"- `{f}`" for f in files),
        ),
    ]
