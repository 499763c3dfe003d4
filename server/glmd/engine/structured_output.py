"""Structured output in the engine: masks of the tokens that grammars allow next.

A mask depends on all tokens before it. The host computes it once the step before has been read,
while the device runs the forward pass whose logits it masks.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
from llguidance import LLExecutor, LLMatcher

from glmd.ipc import GrammarSpec
from glmd.structured_output.backend import load_tokenizer, make_matcher
from glmd.utils.lru import LRUCache

Words = npt.NDArray[np.uint32]

CACHE_BYTES = 128 << 20
"""Memory of compiled grammars kept for later requests. That of an agent's tools takes 2 MB."""

MATCHER_EXPANSION = 80
"""Memory of a compiled grammar, in bytes per character of its text: 72 for many alternatives."""

GRAMMAR_STACK = 8 << 20
"""Bytes of stack for compiling. The compiler's worker tries each grammar with half of that first,
because a stack overflow in llguidance ends the process."""


class GrammarState:
    """State of one sequence's grammar.

    Args:
        matcher: at the grammar's start, and not shared.

    Attributes:
        active: the grammar has started. Before, one of `GrammarSpec.after` must come first.
        error: reason for which it cannot be followed further; None: it can.
    """

    def __init__(self, spec: GrammarSpec, matcher: LLMatcher) -> None:
        self.active = not spec.after
        self.error: str | None = None
        self._spec = spec
        self._matcher = matcher
        self._num_tried = 0
        self._started_by_draft = False

    @property
    def matcher(self) -> LLMatcher | None:
        """The matcher that allows the next tokens; None before the grammar has started."""
        return self._matcher if self.active else None

    @property
    def required_start(self) -> tuple[int, ...]:
        """The control tokens that are allowed while a required grammar has not started."""
        return () if self.active or not self._spec.required else self._spec.after

    def accept(self, token: int) -> None:
        """Advance by a confirmed token. Tokens behind the grammar's end are ignored."""
        if not self.active:
            self.active = token in self._spec.after
        elif self.error is None and not self._matcher.is_stopped():
            self._matcher.consume_token(token)
            self.check()

    def check(self) -> None:
        """Set `error` if the matcher has failed."""
        if self.error is None and self._matcher.is_error():
            self.error = self._matcher.get_error().partition("\n")[0]

    def try_accept(self, token: int) -> bool:
        """Advance by a draft until `rollback`; returns whether a token may follow it."""
        if not self.active:
            self.active = self._started_by_draft = token in self._spec.after
            return True
        if self._matcher.is_stopped() or not self._matcher.try_consume_tokens([token]):
            return False
        self._num_tried += 1
        return True

    def rollback(self) -> None:
        """Undo all drafts."""
        if self._num_tried:
            self._matcher.rollback(self._num_tried)
            self._num_tried = 0
        if self._started_by_draft:
            self.active = self._started_by_draft = False


@dataclass(frozen=True, slots=True)
class MaskRequest:
    """Request for a sequence's masks: behind its last token, and behind each draft.

    Attributes:
        banned: ids that may not come next unless the grammar allows no others.
    """

    grammar: GrammarState
    drafts: Sequence[int] = ()
    banned: tuple[int, ...] = ()


class StructuredOutputManager:
    """Compiles grammars in a thread of its own, and computes masks.

    The thread begins by reading the checkpoint's tokenizer (`load_tokenizer`).

    Args:
        folder: the checkpoint's.
        end_ids: ids that end a sequence.
    """

    def __init__(self, folder: Path, vocab_size: int, end_ids: Sequence[int]) -> None:
        self._num_words = -(-vocab_size // 32)
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="grammars")
        # The thread starts with its first task. Its stack must not depend on `ulimit -s`.
        default = threading.stack_size(GRAMMAR_STACK)
        try:
            self._tokenizer = self._thread.submit(load_tokenizer, folder, vocab_size, end_ids)
        finally:
            threading.stack_size(default)
        self._text_masks: dict[tuple[int, ...], Words] = {}
        self._executor = LLExecutor()
        self._compiled: LRUCache[str, Future[LLMatcher]] = LRUCache(CACHE_BYTES)

    def prepare(self, spec: GrammarSpec) -> Future[LLMatcher]:
        """Compile a grammar in the background unless it is cached.

        The future fails with GrammarError, or with CheckpointError if there is no tokenizer.
        """
        known = self._compiled.get(spec.grammar)
        if known is None or (known.done() and known.exception() is not None):
            known = self._thread.submit(self._compile, spec.grammar)
            self._compiled.put(spec.grammar, known, MATCHER_EXPANSION * len(spec.grammar))
        return known

    def _compile(self, grammar: str) -> LLMatcher:
        matcher = make_matcher(self._tokenizer.result(), grammar)
        # The first mask is the slowest, since it builds the lexer's first states.
        matcher.compute_bitmask()
        return matcher

    @staticmethod
    def start(spec: GrammarSpec, compiled: LLMatcher) -> GrammarState:
        """The state of a new sequence, from a result of `prepare`."""
        return GrammarState(spec, compiled.deep_copy())

    def masks(self, requests: Sequence[MaskRequest]) -> tuple[list[int], Words]:
        """Masks of the rows of sequences, each with 1 + drafts consecutive rows.

        Rows behind a draft that the grammar refuses have no mask: the row before cannot choose that
        draft. Neither have rows in which everything is allowed.

        Returns:
            indices of the rows with a mask, ascending, and their masks [rows with one, words], a
            bit per token, lowest first.
        """
        starts = np.cumsum([0, *(1 + len(request.drafts) for request in requests)]).tolist()
        masks = np.zeros((starts[-1], self._num_words), np.uint32)
        masked: list[int] = []
        remaining = list(zip(requests, starts, strict=False))
        depth = 0
        while remaining:
            jobs: list[tuple[LLMatcher, int]] = []
            for request, start in remaining:
                row, grammar = start + depth, request.grammar
                if grammar.matcher is not None:
                    jobs.append((grammar.matcher, row))
                elif grammar.required_start:
                    masks[row] = self._text_mask(grammar.required_start)
                    masked.append(row)
            if jobs:
                self._executor.unsafe_compute_mask_ptr(
                    jobs, masks.ctypes.data, 4 * self._num_words, len(masks)
                )
            masked += [row for _, row in jobs]
            remaining = [
                (request, start)
                for request, start in remaining
                if depth < len(request.drafts) and request.grammar.try_accept(request.drafts[depth])
            ]
            depth += 1
        for request, start in zip(requests, starts, strict=False):
            request.grammar.rollback()
            request.grammar.check()
            _ban(masks[start], request.banned)
        masked.sort()
        return masked, masks[masked]

    def _text_mask(self, start_ids: tuple[int, ...]) -> Words:
        """The mask of all tokens except control tokens other than `start_ids`."""
        if start_ids not in self._text_masks:
            tokenizer = self._tokenizer.result()
            bits = np.zeros(32 * self._num_words, np.uint8)
            for token in range(tokenizer.vocab_size):
                bits[token] = token in start_ids or not tokenizer.is_special_token(token)
            self._text_masks[start_ids] = np.packbits(bits, bitorder="little").view(np.uint32)
        return self._text_masks[start_ids]


def _ban(mask: Words, banned: tuple[int, ...]) -> None:
    """Remove tokens from a mask unless it contains no others."""
    if not banned:
        return
    rest = mask.copy()
    for token in banned:
        rest[token // 32] &= ~np.uint32(1 << token % 32)
    if rest.any():
        mask[:] = rest
