"""Draft controller: decides by measurement whether drafts pay at the present load.

A step that verifies a draft per sequence takes longer than one without: much longer where rows cost
compute (a CPU, a large batch), hardly longer where reading the weights dominates. Its gain is the
accepted drafts. While drafts do not pay, the MTP layer does nothing, so that nothing is lost.

After a while drafts are tried again. First a few sequences draft although the MTP layer's KV is
deferred, which costs little: if almost none is accepted, or the steps take so long that even
accepted drafts would not pay, nothing more is tried. Otherwise their KV is computed, and they draft
until the share of accepted drafts is known. If that could pay, all draft for a few steps, whose
durations are compared with those before and behind them.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field
from enum import Enum, auto
from statistics import median
from typing import Literal

FIRST_TRIAL = 512
"""Steps without drafts before the first trial, which may take a tenth of their time."""

HOLD_STEPS, MAX_HOLD_STEPS = 600, 16 * 600
"""Steps for which a decision holds. Each repeated decision against drafts holds twice as long."""

PROBED = 4
"""Most sequences that draft while the share of accepted drafts is measured."""

SCREEN_SHARE, SCREEN_ACCEPTED = 1 / 6, 2
"""Share accepted of drafts without the layer's KV of the context below which a screen ends, and the
number that it must reach. Where the layer drafts well, about two of five are accepted: one screen
in twenty is wrong."""

SCREEN_STEPS = 4
"""Steps that verify drafts in a screen at least, for their duration."""

LEAST_SHARE = 0.5
"""Drafts per sequence of a screen from which the duration with a draft for each is concluded. With
fewer, their small difference would be multiplied with that between any two steps."""

SCREEN_COST = 0.75
"""Part of the additional duration of a screen's steps that a probe expects: few were timed, and in
a large batch the first drafts cost most."""

PROBE_DRAFTS = 16
"""Drafts after which that share is known well enough to measure durations or to give up."""

NUM_SAMPLES = 9
"""Timed steps with the other kind, and as many before and behind them with the present kind, since
the machine's other load changes from second to second. Medians are compared."""

STAGE_LIMIT = 128
"""Steps of a stage after which it is given up."""

SETTLE_STEPS = 8
"""Steps in which the batch size must stay another before its decision counts."""

DECAY = 0.98
"""Weight of a step's drafts, in the acceptance, against those of the next step."""

PRIOR, PRIOR_DRAFTS = 0.7, 2
"""Acceptance assumed at first, and the number of drafts that the assumption counts for."""

HOPELESS = 0.1
"""Acceptance below which drafts pay on no device."""

REMEMBERED = 1 / 8
"""Share of the known acceptance kept when drafts are tried again: the present text may be easier to
guess."""


@dataclass(frozen=True, slots=True)
class DraftPlan:
    """Work of the MTP layer in a step.

    Attributes:
        drafts: per sequence. 0: the layer does nothing, and its KV is deferred.
        sequences: most sequences that draft; None: all.
        with_gaps: draft at once, although KV was deferred, rather than compute it first. Fewer
            drafts are accepted, but steps take as long.
        screens: segments stay deferred, and the layer's KV in tails is dropped with the last draft.
    """

    drafts: int
    sequences: int | None = None
    with_gaps: bool = False
    screens: bool = False


@dataclass(slots=True)
class VerifiedDrafts:
    """Drafts that a step verified.

    Attributes:
        drafts: made with the MTP layer's KV of the whole context.
        accepted: of them.
        with_gaps, accepted_with_gaps: made without a part of it, and of them accepted.
    """

    drafts: int = 0
    accepted: int = 0
    with_gaps: int = 0
    accepted_with_gaps: int = 0

    def add(self, drafts: int, accepted: int, *, with_gaps: bool) -> None:
        """Count a sequence's drafts."""
        if with_gaps:
            self.with_gaps += drafts
            self.accepted_with_gaps += accepted
        else:
            self.drafts += drafts
            self.accepted += accepted


class _Stage(Enum):
    HOLD = auto()  # the decision is used
    SCREEN = auto()  # a few sequences draft without KV of their context
    PROBE = auto()  # a few sequences draft
    TRIAL = auto()  # the other kind of step is timed
    CHECK = auto()  # the present kind is timed again


@dataclass(slots=True, eq=False)
class _Choice:
    """State of one batch size.

    Attributes:
        holds_until: step until which the decision holds.
        drafts: the decision, 0 or 1.
        hold_steps: for how many steps the last decision was made.
        gain: speed with a draft over speed without, last measured; None: never.
        cost: expected duration of a step with a draft per sequence over one without; None: never
            measured.
        stage_steps: steps in the stage so far.
        screened, passed: drafts of the screen so far, and accepted ones.
        screen_steps: steps that verified them.
        screen_seconds: durations of those without prefill, and their drafts per sequence.
        probed: drafts of the probe so far.
        samples: samples in `seconds` from which on the stage ends.
        seconds: latest durations, by drafts.
    """

    holds_until: int
    drafts: int = 0
    hold_steps: int = 0
    gain: float | None = None
    cost: float | None = None
    stage: _Stage = _Stage.HOLD
    stage_steps: int = 0
    screened: int = 0
    passed: int = 0
    screen_steps: int = 0
    screen_seconds: list[tuple[float, float]] = field(default_factory=list)
    probed: int = 0
    samples: int = 0
    seconds: dict[int, deque[float]] = field(
        default_factory=lambda: {kind: deque(maxlen=2 * NUM_SAMPLES) for kind in (0, 1)}
    )

    def enter(self, stage: _Stage) -> None:
        self.stage, self.stage_steps = stage, 0
        self.screened = self.passed = self.screen_steps = self.probed = 0
        self.screen_seconds.clear()


class DraftController:
    """Chooses for each step how many drafts the MTP layer makes.

    Args:
        setting: a fixed number of drafts; "auto": none or one.

    Attributes:
        plan: chosen for the latest step.
    """

    def __init__(self, setting: Literal["auto", 0, 1, 2, 3]) -> None:
        self._auto = setting == "auto"
        self.plan = DraftPlan(0 if setting == "auto" else setting)
        self._choices: dict[int, _Choice] = {}
        self._settled: _Choice | None = None
        """The choice that is used, unless the batch size has changed for good."""
        self._unsettled_steps = 0
        self._steps = 0
        self._last_observed: int | None = None
        self._drafted = self._accepted = 0.0
        """Decaying counts of drafts."""

    @property
    def acceptance(self) -> float:
        """Share of recent drafts that were accepted."""
        return (PRIOR * PRIOR_DRAFTS + self._accepted) / (PRIOR_DRAFTS + self._drafted)

    def choose(self, sequences: int) -> DraftPlan:
        """Plan a step with `sequences` decoding sequences; 0: the plan stays as it is."""
        if not self._auto or not sequences:
            return self.plan
        self._steps += 1
        bucket = _bucket(sequences)
        choice = self._choices.get(bucket) or self._choices.setdefault(bucket, self._new_choice())
        if self._settled is not None and choice is not self._settled:
            self._unsettled_steps += 1
            if self._unsettled_steps < SETTLE_STEPS:
                return self.plan
            if self._settled.stage is not _Stage.HOLD:
                self._hold(self._settled, self._settled.drafts)
        self._unsettled_steps = 0
        self._settled = choice
        self.plan = self._advance(choice)
        return self.plan

    def _new_choice(self) -> _Choice:
        """A batch size is tried at once if drafts pay for another, and so their KV is there."""
        if not self.plan.drafts or self.plan.screens:
            return _Choice(self._steps + FIRST_TRIAL)
        choice = _Choice(self._steps)
        choice.enter(_Stage.TRIAL)
        return choice

    def _advance(self, choice: _Choice) -> DraftPlan:
        """Enter the next stage if it is time to; return the plan of the present one."""
        if choice.stage is _Stage.HOLD and (held := self._held(choice)) is not None:
            return held
        choice.stage_steps += 1
        if choice.stage_steps > STAGE_LIMIT:
            self._hold(choice, choice.drafts)
        if choice.stage is _Stage.SCREEN:
            known = choice.screen_steps >= SCREEN_STEPS
            refused = choice.passed < int(choice.screened * SCREEN_SHARE)
            if not refused and not (known and choice.passed >= SCREEN_ACCEPTED):
                return DraftPlan(1, sequences=PROBED, with_gaps=True, screens=True)
            self._end_screen(choice, refused=refused)
        if choice.stage is _Stage.PROBE:
            if choice.probed < PROBE_DRAFTS and self.acceptance >= HOPELESS:
                return DraftPlan(1, sequences=PROBED)
            self._end_probe(choice)
        if choice.stage is _Stage.TRIAL:
            if len(choice.seconds[1 - choice.drafts]) < NUM_SAMPLES:
                return DraftPlan(1 - choice.drafts, with_gaps=True)
            choice.enter(_Stage.CHECK)
            before = list(choice.seconds[choice.drafts])[-NUM_SAMPLES:]
            choice.seconds[choice.drafts] = deque(before, maxlen=2 * NUM_SAMPLES)
            choice.samples = len(before) + NUM_SAMPLES
        if choice.stage is _Stage.CHECK:
            if len(choice.seconds[choice.drafts]) < choice.samples:
                return DraftPlan(choice.drafts, with_gaps=True)
            without, with_draft = (median(choice.seconds[kind]) for kind in (0, 1))
            choice.cost = with_draft / without
            choice.gain = (1 + self.acceptance) / choice.cost
            self._hold(choice, int(choice.gain > 1))
        return DraftPlan(choice.drafts)

    def _held(self, choice: _Choice) -> DraftPlan | None:
        """The decision's plan; None once it is time to measure again."""
        if choice.drafts and not self._may_pay(choice.cost or 1.0):
            self._hold(choice, 0)
        if self._steps < choice.holds_until:
            return DraftPlan(choice.drafts)
        choice.enter(_Stage.TRIAL if choice.drafts else _Stage.SCREEN)
        choice.seconds[1 - choice.drafts].clear()
        if not choice.drafts:
            self._drafted *= REMEMBERED
            self._accepted *= REMEMBERED
        return None

    def _end_screen(self, choice: _Choice, *, refused: bool) -> None:
        if choice.screen_seconds and choice.seconds[0]:
            without = median(choice.seconds[0])
            more = median(
                (took / without - 1) / max(share, LEAST_SHARE)
                for took, share in choice.screen_seconds
            )
            choice.cost = 1 + SCREEN_COST * max(0.0, more)
        # If all drafts were accepted, a step would give two tokens per sequence.
        if refused or (choice.cost or 1.0) > 2:
            self._hold(choice, 0)
        else:
            choice.enter(_Stage.PROBE)

    def _end_probe(self, choice: _Choice) -> None:
        if self._may_pay(choice.cost or 1.0):
            choice.enter(_Stage.TRIAL)
        else:
            self._hold(choice, 0)

    def _may_pay(self, cost: float) -> bool:
        return 1 + self.acceptance > max(cost, 1 + HOPELESS)

    def _hold(self, choice: _Choice, drafts: int) -> None:
        again = not drafts and not choice.drafts
        longer = min(2 * choice.hold_steps, MAX_HOLD_STEPS) if again else 0
        choice.hold_steps = max(HOLD_STEPS, longer)
        choice.drafts = drafts
        choice.holds_until = self._steps + choice.hold_steps
        choice.enter(_Stage.HOLD)

    def observe(
        self,
        sequences: int,
        kind: int | None,
        verified: VerifiedDrafts,
        seconds: float | None,
    ) -> None:
        """Learn from a step.

        Args:
            sequences: that decoded.
            kind: drafts per sequence, both verified and made; None: not the same for all.
            verified: drafts verified by the step.
            seconds: duration; None if the step had prefill, too.
        """
        choice = self._choices.get(_bucket(sequences))
        if verified.drafts:
            self._drafted = DECAY * self._drafted + verified.drafts
            self._accepted = DECAY * self._accepted + verified.accepted
        if choice is not None:
            choice.probed += verified.drafts
            # A context without gaps passes or fails as well.
            drafts = verified.drafts + verified.with_gaps
            choice.screened += drafts
            choice.passed += verified.accepted + verified.accepted_with_gaps
            if choice.stage is _Stage.SCREEN and drafts:
                choice.screen_steps += 1
                if seconds is not None:
                    choice.screen_seconds.append((seconds, drafts / sequences))
        # Steps overlap: the first of its kind is timed with a part of the other kind.
        steady, self._last_observed = kind == self._last_observed, kind
        if choice is None or seconds is None or not steady or kind is None or not sequences:
            return
        choice.seconds[kind].append(seconds)

    def gain(self, sequences: int) -> float | None:
        """Measured speed with a draft over speed without; None if not measured yet."""
        choice = self._choices.get(_bucket(sequences))
        return None if choice is None else choice.gain


def _bucket(sequences: int) -> int:
    """Key of batch sizes with about the same cost: 1, 2, 3–4, 5–8, …"""
    return 1 << max(0, sequences - 1).bit_length()
