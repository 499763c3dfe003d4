"""Draft controller: decides by measurement whether drafts pay at the present load.

A step that verifies a draft per sequence takes longer than one without: much longer where rows cost
compute (a CPU, a large batch), hardly longer where reading the weights dominates. Its gain is the
accepted drafts. For each batch size the controller measures both kinds, keeps the faster, and
measures again later. In between it only stops drafting, when acceptance no longer covers the cost.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from statistics import median
from typing import Literal

BLOCK_STEPS = 4
"""Consecutive steps of one kind while measuring. The kinds alternate, since the machine's other
load changes from second to second, and both must meet the same conditions."""

NUM_SAMPLES = 9
"""Timed steps of each kind, of which the medians are compared."""

HOLD_STEPS = 600
"""Steps for which a decision holds: at most 4 % of steps are spent measuring."""

DECAY = 0.98
"""Weight of a step's drafts, in the acceptance, against those of the next step."""

PRIOR, PRIOR_DRAFTS = 0.7, 2
"""Acceptance assumed at first, and the number of drafts that the assumption counts for."""

HOPELESS = 0.1
"""Acceptance below which drafts pay on no device, so that measuring stops."""

REMEMBERED = 1 / 8
"""Share of the known acceptance kept when a batch size is measured again: the present text may be
easier to guess."""


@dataclass(slots=True)
class _Choice:
    """State of one batch size.

    Attributes:
        drafts: the decision, 0 or 1.
        holds_until: step until which it holds; 0: never decided.
        gain: speed with a draft over speed without, last measured; None: never.
        cost: duration of a step with a draft over one without, last measured.
        seconds: durations measured so far, by drafts.
        steps: steps spent measuring so far.
    """

    drafts: int = 1
    holds_until: int = 0
    gain: float | None = None
    cost: float = 1.0
    seconds: dict[int, list[float]] = field(default_factory=lambda: {0: [], 1: []})
    steps: int = 0


class DraftController:
    """Chooses the number of drafts per sequence for each step.

    Args:
        setting: a fixed number of drafts; "auto": none or one.

    Attributes:
        drafts: chosen for the latest step.
    """

    def __init__(self, setting: Literal["auto", 0, 1, 2, 3]) -> None:
        self._fixed: int | None = None if setting == "auto" else setting
        self.drafts: int = 1 if self._fixed is None else self._fixed
        self._choices: dict[int, _Choice] = {}
        self._steps = 0
        self._last_observed = -1
        self._drafted = self._accepted = 0.0
        """Decaying counts of drafts."""

    @property
    def acceptance(self) -> float:
        """Share of recent drafts that were accepted."""
        return (PRIOR * PRIOR_DRAFTS + self._accepted) / (PRIOR_DRAFTS + self._drafted)

    def choose(self, sequences: int) -> int:
        """Drafts per sequence for a step with `sequences` decoding sequences."""
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
            accepted: of all sequences.
            seconds: duration; None if the step had prefill, too.
        """
        if sequences and drafts:
            self._drafted = DECAY * self._drafted + sequences * drafts
            self._accepted = DECAY * self._accepted + accepted
        # Steps overlap: the first of its kind is timed with a part of the other kind.
        steady, self._last_observed = drafts == self._last_observed, drafts
        choice = self._choices.get(_bucket(sequences))
        if choice is None or seconds is None or not steady or self._steps < choice.holds_until:
            return
        choice.seconds[drafts].append(seconds)
        if min(map(len, choice.seconds.values())) >= NUM_SAMPLES:
            without, with_draft = (median(choice.seconds[kind]) for kind in (0, 1))
            choice.cost = with_draft / without
            choice.gain = (1 + self.acceptance) / choice.cost
            self._hold(choice, int(choice.gain > 1))

    def gain(self, sequences: int) -> float | None:
        """Measured speed with a draft over speed without; None if not measured yet."""
        choice = self._choices.get(_bucket(sequences))
        return None if choice is None else choice.gain

    def _hold(self, choice: _Choice, drafts: int) -> None:
        choice.drafts = drafts
        choice.holds_until = self._steps + HOLD_STEPS
        choice.seconds = {0: [], 1: []}
        choice.steps = 0


def _bucket(sequences: int) -> int:
    """Key of batch sizes with about the same cost: 1, 2, 3–4, 5–8, …"""
    return 1 << max(0, sequences - 1).bit_length()
