"""Whether drafting pays at the present load, by measurement.

A step that verifies a draft per sequence takes longer than one that does not: much longer where
rows cost compute (a CPU, a large batch), hardly where steps are bound by reading weights. What
it gives is the accepted drafts. For each batch size the gate tries both in turn, takes the
faster, and tries again after a while; sooner it only stops drafting, when fewer drafts are accepted
than their time is worth.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from statistics import median
from typing import Literal

BLOCK_STEPS = 4
"""Steps of one kind in a row during a trial. The kinds alternate, because what else the machine
does changes from second to second, and both must meet the same conditions."""

TRIAL_SAMPLES = 9
"""Steps of each kind that are timed before the trial is decided; medians are compared."""

HOLD_STEPS = 600
"""Steps for which a decision holds: trials take at most 4 % of steps."""

MEMORY = 0.98
"""Weight of a step's drafts, in what is known of acceptance, against that of the next one's."""

PRIOR, PRIOR_DRAFTS = 0.7, 2
"""Acceptance before there were any drafts, and how many drafts that counts for."""

HOPELESS = 0.1
"""Acceptance at which drafts pay at no cost that any device has: no trial takes more drafts."""

REMEMBERED = 1 / 8
"""Of what is known of acceptance, for a trial that is not a batch size's first: what is written now
may be easier to guess."""


@dataclass(slots=True)
class _Choice:
    """What is known of one batch size."""

    drafts: int = 1
    holds_until: int = 0
    gain: float | None = None
    """Speed with a draft over speed without, at the last trial."""
    cost: float = 1.0
    """Time of a step with a draft over time without, at the last trial."""
    seconds: dict[int, list[float]] = field(default_factory=lambda: {0: [], 1: []})
    """Times of the trial that is under way, by drafts."""
    steps: int = 0
    """Steps of that trial."""


class DraftController:
    """Chooses the number of drafts per sequence for each step.

    Args:
        setting: a fixed number of drafts, or "auto" for none or one.

    Attributes:
        drafts: the choice for the latest step.
    """

    def __init__(self, setting: Literal["auto", 0, 1, 2, 3]) -> None:
        self._fixed: int | None = None if setting == "auto" else setting
        self._choices: dict[int, _Choice] = {}
        self._steps = 0
        self._last_observed = -1
        self._drafted = self._accepted = 0.0
        """Lately, the older the less."""
        self.drafts: int = 1 if self._fixed is None else self._fixed

    @property
    def acceptance(self) -> float:
        """The share of drafts that were accepted lately."""
        return (PRIOR * PRIOR_DRAFTS + self._accepted) / (PRIOR_DRAFTS + self._drafted)

    def choose(self, sequences: int) -> int:
        """Drafts per sequence for a step with that many decoding sequences."""
        if self._fixed is not None:
            return self._fixed
        self._steps += 1
        choice = self._choices.setdefault(_bucket(sequences), _Choice())
        if choice.holds_until and choice.steps == 0 and self._steps >= choice.holds_until:
            self._drafted *= REMEMBERED
            self._accepted *= REMEMBERED
        if self._steps >= choice.holds_until and self.acceptance < HOPELESS:
            self._hold(choice, 0)
        if self._steps < choice.holds_until:
            worth = max(choice.cost, 1 + HOPELESS)
            self.drafts = choice.drafts and int(1 + self.acceptance > worth)
        else:
            self.drafts = 1 - choice.steps // BLOCK_STEPS % 2
            choice.steps += 1
        return self.drafts

    def observe(self, sequences: int, drafts: int, accepted: int, seconds: float | None) -> None:
        """Learn from a step.

        Args:
            drafts: verified per sequence.
            accepted: in all.
            seconds: the step's duration, or None if other work was in it.
        """
        if sequences and drafts:
            self._drafted = MEMORY * self._drafted + sequences * drafts
            self._accepted = MEMORY * self._accepted + accepted
        # Steps overlap, so the first of its kind is timed with a piece of the other kind.
        steady, self._last_observed = drafts == self._last_observed, drafts
        choice = self._choices.get(_bucket(sequences))
        if choice is None or seconds is None or not steady or self._steps < choice.holds_until:
            return
        choice.seconds[drafts].append(seconds)
        if min(map(len, choice.seconds.values())) >= TRIAL_SAMPLES:
            self._decide(choice)

    def gain(self, sequences: int) -> float | None:
        """Measured speed with a draft over speed without; None before a trial."""
        choice = self._choices.get(_bucket(sequences))
        return None if choice is None else choice.gain

    def _decide(self, choice: _Choice) -> None:
        without, with_one = (median(choice.seconds[drafts]) for drafts in (0, 1))
        choice.cost = with_one / without
        choice.gain = (1 + self.acceptance) / choice.cost
        self._hold(choice, int(choice.gain > 1))

    def _hold(self, choice: _Choice, drafts: int) -> None:
        choice.drafts = drafts
        choice.holds_until = self._steps + HOLD_STEPS
        choice.seconds = {0: [], 1: []}
        choice.steps = 0


def _bucket(sequences: int) -> int:
    """Batch sizes of about the same cost: 1, 2, 3–4, 5–8, …"""
    return 1 << max(0, sequences - 1).bit_length()
