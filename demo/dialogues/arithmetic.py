"""Sums, differences and products, computed digit by digit in the reasoning."""

from __future__ import annotations

from .turn import Turn
from .world import FOODS, World


def addition_steps(a: int, b: int) -> list[str]:
    ones = a % 10 + b % 10
    steps = [f"{a % 10} + {b % 10} = {ones}"]
    if a >= 10 or b >= 10:
        parts = [str(part) for part in (a // 10, b // 10, ones // 10) if part]
        if len(parts) > 1:
            steps.append(f"{' + '.join(parts)} = {(a + b) // 10}")
    return steps


def subtraction_steps(a: int, b: int) -> list[str]:
    borrow = a % 10 < b % 10
    top = a % 10 + 10 * borrow
    steps = [f"{top} - {b % 10} = {top - b % 10}"]
    parts = [str(part) for part in (a // 10, int(borrow), b // 10) if part]
    if len(parts) > 1:
        steps.append(f"{' - '.join(parts)} = {(a - b) // 10}")
    return steps


def multiplication_steps(a: int, b: int) -> list[str]:
    ones = a % 10 * b
    steps = [f"{a % 10} × {b} = {ones}"]
    if a >= 10:
        tens = a // 10 * b
        steps.append(f"{a // 10} × {b} = {tens}")
        if ones >= 10:
            steps.append(f"{tens} + {ones // 10} = {tens + ones // 10}")
    return steps


def draw(world: World) -> tuple[int, str, int, int, list[str]]:
    """Draw operands, operator, result and steps. The whole problem is held out or not."""

    def problem() -> str:
        operator = world.choice(("+", "+", "-", "-", "×"))
        if operator == "×":
            b = world.number(2, 9)
            a = world.number(2, 9) if world.chance(0.3) else world.number(11, 99)
            return f"{a} × {b}" if a * b <= 200 else f"{a % 10 + 10} × {b}"
        a, b = (world.number(1, 9 if world.chance(0.2) else 99) for _ in range(2))
        return f"{a} + {b}" if operator == "+" else f"{max(a, b)} - {min(a, b)}"

    left, operator, right = world.drawn(problem).split()
    a, b = int(left), int(right)
    if operator == "+":
        return a, operator, b, a + b, addition_steps(a, b)
    if operator == "-":
        return a, operator, b, a - b, subtraction_steps(a, b)
    return a, operator, b, a * b, multiplication_steps(a, b)


SPOKEN = {"+": "plus", "-": "minus", "×": "times"}


def arithmetic(world: World) -> Turn:
    a, operator, b, result, steps = draw(world)
    asked = f"{a} {operator} {b}"
    written = world.choice((asked, asked, f"{a} {SPOKEN[operator]} {b}", f"{a}{operator}{b}"))
    if operator == "×" and world.chance(0.5):
        written = written.replace("×", "*")
    user = world.choice(
        ("What is {}?", "What is {}?", "{}", "{} = ?", "Calculate {}.", "How much is {}?",
         "Please work out {}.", "Can you tell me what {} is?")
    ).format(written)  # fmt: skip
    work = ". ".join(steps)
    reply = f"{asked} = {result}."
    return Turn(user, f"{asked}: {work}. So {result}.", reply, direct=f"{work}. So {reply}")


def word_problem(world: World) -> Turn:
    a, operator, b, result, steps = draw(world)
    while operator == "×":
        a, operator, b, result, steps = draw(world)
    who, what = world.name(), world.choice(FOODS)
    thing = world.choice(("apples", "books", "coins", "shoes", "keys", "boxes of " + what))
    change = (
        world.choice(("gets {} more", "finds {} more", "buys {} more"))
        if operator == "+"
        else world.choice(("loses {}", "gives away {}", "sells {}"))
    ).format(b)
    user = f"{who} has {a} {thing} and {change}. How many {thing} does {who} have now?"
    work = ". ".join(steps)
    reply = f"{who} has {result} {thing}."
    return Turn(user, f"{a} {operator} {b}: {work}. So {result}.", reply, f"{work}. So {reply}")
