"""Grammars over sequences: which tokens may come next, for many rows at once.

A mask depends on all tokens before it, so it is computed on the host when the step before has
been read, while the device runs the forward pass that it is for.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
from llguidance import LLExecutor, LLMatcher

from glmd.ipc import GrammarSpec
from glmd.structured_output.backend import load_tokenizer, make_matcher

Words = npt.NDArray[np.uint32]

KEPT_GRAMMARS = 64
"""Compiled grammars that are kept for the next request. An agent's tools take about 2 MB."""


class GrammarState:
    """One sequence's way through its grammar.

    Attributes:
        active: the grammar has begun; before, it is only waited for.
        error: why it can be followed no further, once that is so.
    """

    def __init__(self, guidance: GrammarSpec, matcher: LLMatcher) -> None:
        """
        Args:
            matcher: at the grammar's beginning; the constraint's own.
        """
        self.active = not guidance.after
        self.error: str | None = None
        self._guidance = guidance
        self._matcher = matcher
        self._attempted = 0
        self._began_by_draft = False

    @property
    def matcher(self) -> LLMatcher | None:
        """What says which tokens may come next, once the grammar has begun."""
        return self._matcher if self.active else None

    @property
    def awaited(self) -> tuple[int, ...]:
        """The ids one of which must come before anything but text, while it is so."""
        return () if self.active or not self._guidance.required else self._guidance.after

    def accept(self, token: int) -> None:
        """Follow a confirmed token. After the grammar's end, tokens mean nothing to it."""
        if not self.active:
            self.active = token in self._guidance.after
        elif self.error is None and not self._matcher.is_stopped():
            self._matcher.consume_token(token)
            self.check()

    def check(self) -> None:
        """Note whether the matcher has given up."""
        if self.error is None and self._matcher.is_error():
            self.error = self._matcher.get_error().partition("\n")[0]

    def try_accept(self, token: int) -> bool:
        """Follow a draft until `rollback`; False if nothing can stand behind it."""
        if not self.active:
            self.active = self._began_by_draft = token in self._guidance.after
            return True
        if self._matcher.is_stopped() or not self._matcher.try_consume_tokens([token]):
            return False
        self._attempted += 1
        return True

    def rollback(self) -> None:
        """Take back all drafts that were followed."""
        if self._attempted:
            self._matcher.rollback(self._attempted)
            self._attempted = 0
        if self._began_by_draft:
            self.active = self._began_by_draft = False


@dataclass(frozen=True, slots=True)
class MaskRequest:
    """A sequence whose next tokens are to be masked: behind its last one, and behind each draft.

    Attributes:
        banned: ids that may not come next unless the grammar leaves nothing else.
    """

    constraint: GrammarState
    drafts: Sequence[int] = ()
    banned: tuple[int, ...] = ()


class StructuredOutputManager:
    """The grammars of an engine: compiles them in a thread of its own, and masks rows."""

    def __init__(self, folder: Path, vocab_size: int, end_ids: Sequence[int]) -> None:
        """Start reading the checkpoint's tokenizer (`load_tokenizer`) in the background.

        Args:
            folder: the checkpoint's.
            end_ids: ids that end a sequence.
        """
        self._words = -(-vocab_size // 32)
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="grammars")
        self._tokenizer = self._thread.submit(load_tokenizer, folder, vocab_size, end_ids)
        self._plain: dict[tuple[int, ...], Words] = {}
        self._executor = LLExecutor()
        self._matchers: OrderedDict[str, Future[LLMatcher]] = OrderedDict()

    def prepare(self, guidance: GrammarSpec) -> Future[LLMatcher]:
        """Compile a grammar in the background, or find it compiled.

        The future fails with GrammarError, or with CheckpointError if there is no tokenizer.
        """
        known = self._matchers.get(guidance.grammar)
        if known is None or (known.done() and known.exception() is not None):
            known = self._thread.submit(self._compile, guidance.grammar)
            self._matchers[guidance.grammar] = known
        self._matchers.move_to_end(guidance.grammar)
        while len(self._matchers) > KEPT_GRAMMARS:
            self._matchers.popitem(last=False)
        return known

    def _compile(self, grammar: str) -> LLMatcher:
        matcher = make_matcher(self._tokenizer.result(), grammar)
        # The first mask is the slowest, since it builds the lexer's first states.
        matcher.compute_bitmask()
        return matcher

    @staticmethod
    def start(guidance: GrammarSpec, compiled: LLMatcher) -> GrammarState:
        """The constraint of one sequence, from a result of `prepare`."""
        return GrammarState(guidance, compiled.deep_copy())

    def masks(self, asks: Sequence[MaskRequest]) -> tuple[list[int], Words]:
        """Masks for the rows of sequences, each with 1 + drafts rows, one after the other.

        A mask behind a draft that the grammar refuses does not matter and is left out: the row
        before cannot choose that draft. So are masks that would allow everything.

        Returns:
            the indices of the rows that have a mask, and the masks [rows with one, words] with a
            bit per token, lowest first.
        """
        firsts = np.cumsum([0, *(1 + len(ask.drafts) for ask in asks)]).tolist()
        masks = np.zeros((firsts[-1], self._words), np.uint32)
        masked: list[int] = []
        live = [(ask, first) for ask, first in zip(asks, firsts, strict=False)]
        depth = 0
        while live:
            jobs: list[tuple[LLMatcher, int]] = []
            for ask, first in live:
                row = first + depth
                if ask.constraint.matcher is not None:
                    jobs.append((ask.constraint.matcher, row))
                elif ask.constraint.awaited:
                    masks[row] = self._plain_text(ask.constraint.awaited)
                    masked.append(row)
            if jobs:
                self._executor.unsafe_compute_mask_ptr(
                    jobs, masks.ctypes.data, 4 * self._words, len(masks)
                )
            masked += [row for _, row in jobs]
            live = [
                (ask, first)
                for ask, first in live
                if depth < len(ask.drafts) and ask.constraint.try_accept(ask.drafts[depth])
            ]
            depth += 1
        for ask, first in zip(asks, firsts, strict=False):
            ask.constraint.rollback()
            ask.constraint.check()
            _ban(masks[first], ask.banned)
        masked.sort()
        return masked, masks[masked]

    def _plain_text(self, awaited: tuple[int, ...]) -> Words:
        """The mask of all tokens but control tokens, and of the given ones."""
        if awaited not in self._plain:
            tokenizer = self._tokenizer.result()
            bits = np.zeros(32 * self._words, np.uint8)
            for token in range(tokenizer.vocab_size):
                bits[token] = token in awaited or not tokenizer.is_special_token(token)
            self._plain[awaited] = np.packbits(bits, bitorder="little").view(np.uint32)
        return self._plain[awaited]


def _ban(mask: Words, banned: tuple[int, ...]) -> None:
    """Take tokens out of a mask, unless there are no others in it."""
    if not banned:
        return
    rest = mask.copy()
    for token in banned:
        rest[token // 32] &= ~np.uint32(1 << token % 32)
    if rest.any():
        mask[:] = rest
