"""Dialogues as training batches: tokens, and how much each counts as a target."""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass

import jinja2
import torch
from dialogues import PRACTICE, SKILLS, Dialogue, World, mixture
from tokenizer import render
from tokenizers import Tokenizer
from torch import Tensor

WAITING = 24
"""Dialogues to choose from: enough to fill rows to 98 %."""

DRILLS = 0.1
"""Share of examples that are no dialogues but random tokens said again and again, or backwards.

They have the model copy what stands in its context, whatever it is; and names, numbers and tools
of dialogues are little else than copying.
"""

BACKWARDS = 0.3
"""Share of the drills that turn their passage around."""


@dataclass(frozen=True)
class Focus:
    """Skills to practise beside the mixture.

    Attributes:
        share: of dialogues drawn from those skills alone.
        skills: their weights among one another.
    """

    share: float
    skills: dict[str, int]


FOCI = {
    "hard": Focus(
        0.4,
        {
            "arithmetic": 4, "word problem": 1, "upper case": 2, "reverse": 3, "count words": 2,
            "pick word": 2, "JSON": 1, "one call": 2, "two calls": 3, "named call": 2,
            "two results": 2, "count": 1, "list": 1,
        },
    ),
    "calls": Focus(
        0.65,
        {
            "arithmetic": 4, "word problem": 1, "upper case": 1, "reverse": 3, "count words": 1,
            "pick word": 1, "one call": 5, "no arguments": 2, "two calls": 8, "named call": 4,
            "two results": 2, "multi-turn": 1,
        },
    ),
    "names": Focus(
        0.7,
        {
            "look up": 7, "many calls": 14, "two calls": 8, "one call": 3, "no arguments": 1,
            "named call": 5, "two results": 5, "tools not needed": 1, "count": 5, "greeting": 2,
            "arithmetic": 4, "word problem": 2, "reverse": 3, "count words": 2, "JSON": 1,
            "multi-turn": 1,
        },
    ),
    "weak": Focus(
        0.65,
        {
            "look up": 3, "many calls": 8, "two calls": 8, "one call": 2, "named call": 4,
            "two results": 3, "tools not needed": 3, "arithmetic": 6, "word problem": 5,
            "upper case": 2, "reverse": 3, "count words": 4, "pick word": 1, "JSON": 2, "count": 2,
            "list": 2, "greeting": 1, "say hello": 1,
        },
    ),
}  # fmt: skip
"""What takes longest to learn; what was then still missing; with practice, which name to call;
and all that was then below 85 %, because practising one kind alone had cost others."""

Example = tuple[list[int], list[float]]


@dataclass(frozen=True)
class Batch:
    """Rows of one length, each packed with several dialogues that do not see one another."""

    ids: Tensor
    """[rows, length]"""
    positions: Tensor
    """[rows, length], from 0 in each dialogue."""
    weights: Tensor
    """[rows, length], of each token as a target; 0 for a dialogue's start and for padding."""
    mask: Tensor
    """[rows, 1, length, length], true where a token looks at another."""


def weighed(
    tokenizer: Tokenizer, compiled: jinja2.Template, dialogue: Dialogue, read_weight: float
) -> Example:
    """A dialogue's tokens, up to the tag that ends its last answer, and their loss weights.

    Answers whose reasoning was cleared from the history count as read, not as written: they would
    teach answering without it.
    """
    end = "<|observation|>" if "tool_calls" in dialogue.messages[-1] else "<|user|>"
    ids = tokenizer.encode(render(compiled, dialogue) + end, add_special_tokens=False).ids
    user, observation, assistant = (
        tokenizer.token_to_id(tag) for tag in ("<|user|>", "<|observation|>", "<|assistant|>")
    )
    counted_from = 0
    if dialogue.clear_thinking and dialogue.thinking:
        counted_from = len(ids) - 2 - ids[-2::-1].index(user)
    weights = [0.0] * 3 + [read_weight] * (len(ids) - 3)
    place = 0
    while place < len(ids):
        if ids[place] == assistant and place >= counted_from:
            place += 2
            while True:
                weights[place] = 1.0
                if ids[place] in (user, observation):
                    break
                place += 1
        place += 1
    return ids, weights


def drill(world: World, tokenizer: Tokenizer) -> Example:
    """A random passage, repeated or turned around; only what follows the passage counts."""
    vocabulary = tokenizer.get_vocab_size()
    if world.chance(BACKWARDS):
        passage = world.rng.sample(range(vocabulary), world.number(4, 30))
        there = [*passage, *tokenizer.encode(" reverse").ids]
        return there + passage[::-1], [0.0] * len(there) + [1.0] * len(passage)
    passage = [world.number(0, vocabulary - 1) for _ in range(world.number(4, 40))]
    repeats = world.number(2, max(2, 80 // len(passage)))
    first = [0.0] * (len(passage) + 1)
    return passage * repeats, (first + [1.0] * (len(passage) * repeats))[: len(passage) * repeats]


def dialogue(world: World, focus: Focus) -> Dialogue:
    """One of the mixture, or of the skills in focus."""
    if not world.chance(focus.share):
        return mixture(world)
    skill = world.rng.choices(list(focus.skills), list(focus.skills.values()))[0]
    return PRACTICE[skill](world) if skill in PRACTICE else SKILLS[skill][0](world)


def packed(rows: list[list[Example]], length: int) -> Batch:
    ids = torch.zeros(len(rows), length, dtype=torch.long)
    positions = torch.zeros(len(rows), length, dtype=torch.long)
    weights = torch.zeros(len(rows), length)
    owner = torch.full((len(rows), length), -1)
    for row, examples in enumerate(rows):
        start = 0
        for number, (tokens, token_weights) in enumerate(examples):
            span = slice(start, start + len(tokens))
            ids[row, span] = torch.tensor(tokens)
            weights[row, span] = torch.tensor(token_weights)
            positions[row, span] = torch.arange(len(tokens))
            owner[row, span] = number
            start += len(tokens)
    mask = (owner[:, :, None] == owner[:, None, :]).tril()
    return Batch(ids, positions, weights, mask[:, None])


def batches(
    tokenizer: Tokenizer,
    compiled: jinja2.Template,
    focus: Focus,
    *,
    seed: int,
    rows: int,
    length: int,
    read_weight: float,
) -> Iterator[Batch]:
    """Endless training batches; each row takes the oldest waiting dialogues that still fit it."""
    world = World(random.Random(seed), evaluation=False)
    waiting: list[Example] = []
    while True:
        filled: list[list[Example]] = []
        for _ in range(rows):
            row: list[Example] = []
            left = length
            while True:
                while len(waiting) < WAITING:
                    example = (
                        drill(world, tokenizer)
                        if world.chance(DRILLS)
                        else weighed(tokenizer, compiled, dialogue(world, focus), read_weight)
                    )
                    if len(example[0]) <= length:
                        waiting.append(example)
                fitting = (n for n, (tokens, _) in enumerate(waiting) if len(tokens) <= left)
                chosen = next(fitting, None)
                if chosen is None:
                    break
                row.append(waiting.pop(chosen))
                left -= len(row[-1][0])
            filled.append(row)
        yield packed(filled, length)
