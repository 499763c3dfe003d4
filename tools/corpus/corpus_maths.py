"""Mathematical problems with worked solutions, computed from drawn numbers."""

from __future__ import annotations

import random
from fractions import Fraction
from math import comb, gcd, isqrt


def problem(rng: random.Random, index: int) -> str:
    makers = (_linear, _percent, _derivative, _choose, _euclid, _quadratic, _speed, _series, _dice)
    return makers[index % len(makers)](rng)


def _linear(rng: random.Random) -> str:
    a, x, b = rng.randint(2, 19), rng.randint(-12, 24), rng.randint(1, 60)
    return (
        f"Problem. Solve {a}x + {b} = {a * x + b} for x.\n\nSolution. Subtract {b} on both sides:"
        f" {a}x = {a * x}. Divide by {a}: x = {x}. Check: {a} · ({x}) + {b} = {a * x + b}, as"
        " required.\n"
    )


def _percent(rng: random.Random) -> str:
    price, cut, tax = rng.randint(2, 90) * 10, rng.choice((5, 10, 15, 20, 25)), rng.choice((7, 19))
    reduced = Fraction(price * (100 - cut), 100)
    final = reduced * (100 + tax) / 100
    return (
        f"A coat costs {price} euros before tax. The shop takes {cut} % off and then adds {tax} %"
        f" tax. What does the customer pay?\n\nAfter the discount the price is {price} · (1 −"
        f" {cut / 100:.2f}) = {float(reduced):.2f} euros. With tax it is {float(reduced):.2f} ·"
        f" {1 + tax / 100:.2f} = {float(final):.2f} euros. Doing the two steps in the other order"
        f" gives the same result, because multiplication commutes.\n"
    )


def _derivative(rng: random.Random) -> str:
    a, n, b, c, at = (rng.randint(2, 9) for _ in range(5))
    slope = a * n * at ** (n - 1) - b
    return (
        f"Let f(x) = {a}x^{n} − {b}x + {c}. By the power rule, f'(x) = {a * n}x^{n - 1} − {b}. At"
        f" x = {at} the slope of the tangent is f'({at}) = {a * n} · {at ** (n - 1)} − {b} ="
        f" {slope}. Since f({at}) = {a * at**n - b * at + c}, the tangent is y ="
        f" {slope}(x − {at}) + {a * at**n - b * at + c}.\n"
    )


def _choose(rng: random.Random) -> str:
    n, k = rng.randint(6, 14), rng.randint(2, 5)
    both = comb(n - 2, k - 2)
    return (
        f"In how many ways can a committee of {k} be chosen from {n} people, if two of them refuse"
        f" to serve together?\n\nWithout the condition there are C({n}, {k}) = {comb(n, k)}"
        f" committees. Those with both of the two contain {k - 2} of the remaining {n - 2} people:"
        f" C({n - 2}, {k - 2}) = {both}. So the answer is {comb(n, k)} − {both} ="
        f" {comb(n, k) - both}.\n"
    )


def _euclid(rng: random.Random) -> str:
    scale = rng.randint(2, 30)
    a, b = scale * rng.randint(20, 90), scale * rng.randint(3, 19)
    lines, x, y = [], a, b
    while y:
        lines.append(f"{x} = {x // y} · {y} + {x % y}")
        x, y = y, x % y
    return (
        f"Compute gcd({a}, {b}) with Euclid's algorithm.\n\n" + "\n".join(lines) + "\n\nThe last"
        f" remainder that is not zero is {x}, so gcd({a}, {b}) = {x} and lcm({a}, {b}) ="
        f" {a * b // gcd(a, b)}.\n"
    )


def _quadratic(rng: random.Random) -> str:
    p, q = rng.sample(range(-11, 12), 2)
    b, c = -(p + q), p * q
    root = isqrt(b * b - 4 * c)
    return (
        f"Find the roots of x² + ({b})x + ({c}) = 0.\n\nThe discriminant is D = ({b})² − 4 · ({c})"
        f" = {b * b - 4 * c} = {root}². Hence x = (−({b}) ± {root}) / 2, that is x₁ ="
        f" {(-b + root) // 2} and x₂ = {(-b - root) // 2}. By Vieta, their sum is {-b} and their"
        f" product {c}.\n"
    )


def _speed(rng: random.Random) -> str:
    first, gap, ahead = rng.randint(50, 80), rng.randint(10, 40), rng.randint(1, 4)
    hours = Fraction(first * ahead, gap)
    return (
        f"A lorry leaves at {first} km/h. {ahead} h later a car follows at {first + gap} km/h. When"
        f" does it catch up?\n\nThe lorry's lead is {first} · {ahead} = {first * ahead} km. The car"
        f" gains {gap} km every hour, so it needs {first * ahead} / {gap} = {hours} h, about"
        f" {float(hours):.2f} h. By then both have driven {float(hours * (first + gap)):.1f} km.\n"
    )


def _series(rng: random.Random) -> str:
    start, step, count = rng.randint(1, 20), rng.randint(2, 12), rng.randint(10, 60)
    last = start + (count - 1) * step
    return (
        f"Sum the first {count} terms of {start}, {start + step}, {start + 2 * step}, …\n\nThe"
        f" sequence is arithmetic with difference {step}. Its last term is {start} + {count - 1} ·"
        f" {step} = {last}. Pairing the first with the last, S = {count} · ({start} + {last}) / 2"
        f" = {count * (start + last) // 2}.\n"
    )


def _dice(rng: random.Random) -> str:
    target = rng.randint(4, 10)
    ways = [(a, target - a) for a in range(1, 7) if 1 <= target - a <= 6]
    chance = Fraction(len(ways), 36)
    return (
        f"Two fair dice are thrown. What is the probability that the sum is {target}?\n\nThere are"
        f" 36 equally likely outcomes. Favourable are "
        + ", ".join(f"({a}, {b})" for a, b in ways)
        + f", which are {len(ways)}. So P = {len(ways)}/36 = {chance} ≈ {float(chance):.4f}. In"
        f" {rng.randint(2, 9) * 100} throws one expects that share of them.\n"
    )
