"""The prefix tree against a set of token prefixes, and the cost of its operations."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable
from dataclasses import dataclass
from types import FrameType
from typing import Any

import hypothesis.strategies as st
import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import settings
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from glmd.kv_cache import node as node_module
from glmd.kv_cache import prefix_tree as tree_module
from glmd.kv_cache.node import Lease, Node, common_prefix
from glmd.kv_cache.prefix_tree import PrefixTree

Prefix = tuple[int, ...]


def _array(tokens: Any) -> npt.NDArray[np.int32]:
    return np.array(tokens, np.int32)


@dataclass
class Rows:
    """A segment with a row per token: the hash of the salt and all tokens up to it."""

    rows: npt.NDArray[np.int64]
    copied: list[int]
    """Tokens copied by merges, shared by all segments of a test."""

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def nbytes(self) -> int:
        return 100 * len(self.rows)

    def slice(self, start: int, end: int) -> Rows:
        return Rows(self.rows[start:end].copy(), self.copied)

    def head(self, end: int) -> Rows:
        return Rows(self.rows[:end], self.copied)

    def joins(self, other: Rows) -> bool:
        return True

    def concat(self, *others: Rows) -> Rows:
        rows = np.concatenate([self.rows, *(other.rows for other in others)])
        self.copied[0] += len(rows)
        return Rows(rows, self.copied)


def _rows(salt: str, before: Prefix, tokens: Prefix, copied: list[int]) -> Rows:
    ends = range(len(before) + 1, len(before) + len(tokens) + 1)
    whole = before + tokens
    return Rows(np.array([hash((salt, whole[:end])) for end in ends], np.int64), copied)


def _prefix_of(node: Node[Rows]) -> Prefix:
    """All tokens from the root to the end of `node`."""
    before: Prefix = ()
    if node.parent is not None:
        before = _prefix_of(node.parent)
        before = before[: len(before) - len(node.parent) + node.offset]
    return before + tuple(node.keys.tolist())


class TreeAgainstSet(RuleBasedStateMachine):
    """The tree behaves as a set of (salt, prefix); leases are (salt, prefix), too."""

    tokens = st.lists(st.integers(0, 1), min_size=1, max_size=5).map(tuple)
    which = st.integers(0, 10**6)

    max_segment = tree_module.MAX_SEGMENT

    def __init__(self) -> None:
        super().__init__()
        self.tree: PrefixTree[Rows] = PrefixTree(self.max_segment)
        self.stored: dict[tuple[str, Prefix], int] = {}
        """Time of the last use of each stored prefix."""
        self.leases: list[tuple[Lease[Rows], str, Prefix]] = []
        self.copied = [0]

    # -- rules ----------------------------------------------------------------------------

    @rule(salt=st.sampled_from(["", "", "a"]))
    def acquire(self, salt: str) -> None:
        if len(self.leases) < 6:
            self.leases.append((self.tree.acquire(salt), salt, ()))

    @precondition(lambda self: self.leases)
    @rule(which=which, tokens=tokens)
    def match(self, which: int, tokens: Prefix) -> None:
        at = which % len(self.leases)
        lease, salt, before = self.leases[at]
        known = 0
        while known < len(tokens) and (salt, before + tokens[: known + 1]) in self.stored:
            known += 1
        assert self.tree.match_prefix(lease, _array(tokens)) == known
        self.leases[at] = lease, salt, before + tokens[:known]
        if known:
            self._use(salt, before + tokens[:known])

    @precondition(lambda self: self.leases)
    @rule(which=which, tokens=tokens)
    def insert(self, which: int, tokens: Prefix) -> None:
        at = which % len(self.leases)
        lease, salt, before = self.leases[at]
        self.tree.insert(lease, _array(tokens), _rows(salt, before, tokens, self.copied))
        self.leases[at] = lease, salt, before + tokens
        self._use(salt, before + tokens)

    @precondition(lambda self: self.leases)
    @rule(which=which)
    def release(self, which: int) -> None:
        lease, salt, prefix = self.leases.pop(which % len(self.leases))
        self.tree.release(lease)
        self._use(salt, prefix)

    @precondition(lambda self: self.stored)
    @rule(which=which, cut=st.integers(0, 3), tokens=tokens | st.just(()))
    def match_insert_release(self, which: int, cut: int, tokens: Prefix) -> None:
        """A request that shares the beginning of an earlier one."""
        salt, prefix = sorted(self.stored)[which % len(self.stored)]
        prefix = prefix[: len(prefix) - cut]
        lease = self.tree.acquire(salt)
        assert self.tree.match_prefix(lease, _array(prefix)) == len(prefix)
        if tokens:
            self.tree.insert(lease, _array(tokens), _rows(salt, prefix, tokens, self.copied))
        self.tree.release(lease)
        self._use(salt, prefix + tokens)

    @rule(tokens=st.integers(1, 12))
    def evict(self, tokens: int) -> None:
        bytes_before, evicted_before = self.tree.nbytes, self.tree.evicted_tokens
        evictable = 100 * self.tree.evictable_tokens
        freed = self.tree.evict(100 * tokens)
        assert freed >= min(100 * tokens, evictable)
        assert freed == bytes_before - self.tree.nbytes
        left = self._walk()
        gone = self.stored.keys() - left.keys()
        assert not left.keys() - self.stored.keys()
        assert self.tree.evicted_tokens - evicted_before == len(gone) == freed // 100
        if gone:
            youngest = max(self.stored[prefix] for prefix in gone)
            for node in self.tree.nodes():
                if node.pinned_len < len(node):
                    assert youngest <= node.last_used, (
                        "something younger than a kept end was evicted"
                    )
        self.stored = {prefix: self.stored[prefix] for prefix in left}

    @precondition(lambda self: self.stored)
    @rule()
    def reset(self) -> None:
        evicted_before = self.tree.evicted_tokens
        self.tree.reset()
        assert self.tree.evicted_tokens - evicted_before == len(self.stored)
        self.stored, self.leases = {}, []

    @rule()
    def clear(self) -> None:
        self.tree.clear()
        held = {(salt, p[:end]) for _, salt, p in self.leases for end in range(1, len(p) + 1)}
        assert self._walk().keys() == held
        self.stored = {prefix: self.stored[prefix] for prefix in held}

    def _use(self, salt: str, prefix: Prefix) -> None:
        for end in range(1, len(prefix) + 1):
            self.stored[salt, prefix[:end]] = self.tree._clock

    # -- invariants -----------------------------------------------------------------------

    def _walk(self) -> dict[tuple[str, Prefix], Node[Rows]]:
        """All stored prefixes, after a check that each is stored once."""
        found: dict[tuple[str, Prefix], Node[Rows]] = {}
        for node in self.tree.nodes():
            root = node
            while root.parent is not None:
                root = root.parent
            whole, salt = _prefix_of(node), root.salt
            start = len(whole) - len(node)
            assert node.start == start
            for end in range(start + 1, len(whole) + 1):
                assert (salt, whole[:end]) not in found, "stored twice"
                found[salt, whole[:end]] = node
            assert node.kv is not None
            expected = _rows(salt, whole[:start], whole[start:], [0])
            assert (node.kv.rows == expected.rows).all()
        return found

    @invariant()
    def stats_describe_the_stored_prefixes(self) -> None:
        shape = self.tree.stats()
        continued = {(salt, prefix[:-1]) for salt, prefix in self.stored}
        assert shape.branches == len(self.stored.keys() - continued)
        assert shape.longest == max((len(prefix) for _, prefix in self.stored), default=0)

    @invariant()
    def holds_exactly_what_was_inserted_and_not_evicted(self) -> None:
        found = self._walk()
        assert found.keys() == self.stored.keys()
        assert self.tree.tokens == len(found)
        assert self.tree.nbytes == 100 * len(found)

    @invariant()
    def leases_lie_on_their_prefix(self) -> None:
        held: set[tuple[str, Prefix]] = set()
        for lease, salt, prefix in self.leases:
            assert lease in lease.node.leases
            pieces = self.tree.path(lease)
            assert sum((tuple(p.node.keys[: p.length].tolist()) for p in pieces), ()) == prefix
            held |= {(salt, prefix[:end]) for end in range(1, len(prefix) + 1)}
        assert held <= self.stored.keys(), "a prefix in use was evicted"
        assert self.tree.evictable_tokens == len(self.stored) - len(held)

    @invariant()
    def counters_equal_a_recount(self) -> None:
        nodes = [*self.tree.nodes(), *self.tree._roots.values()]
        assert self.tree.leases == {lease for lease, _, _ in self.leases}
        assert self.tree.leases == {lease for node in nodes for lease in node.leases}
        assert all(lease.node is node for node in nodes for lease in node.leases)
        leased: dict[Node[Rows], set[int]] = {}
        for lease in self.tree.leases:
            for piece in self.tree.path(lease):
                leased.setdefault(piece.node, set()).add(piece.length)
        evictable = []
        for node in nodes:
            children = [c for siblings in node.children.values() for c in siblings.values()]
            assert node.child_offsets == sorted({child.offset for child in children})
            continued = leased.get(node, {0})
            assert node.leased == sorted(
                [lease.length for lease in node.leases]
                + [child.offset for child in children if child in leased]
            )
            assert node.leased_len == max(continued)
            pinned = max(continued | set(node.child_offsets))
            assert node.pinned_len == pinned
            assert node.evictable == (pinned < len(node))
            if node.evictable:
                evictable.append(node)
            ends = not any(child.offset == len(node) for child in children) and len(node) > 0
            assert node.branch_length == (len(_prefix_of(node)) if ends else 0)
        assert self.tree._evictable == sorted(evictable, key=lambda node: node.last_used)
        used = [node.last_used for node in self.tree.nodes()]
        assert len(used) == len(set(used))
        shape = self.tree.stats()
        assert shape.segments == len(nodes) - len(self.tree._roots)
        lengths = sorted(node.branch_length for node in nodes if node.branch_length)
        assert self.tree._branch_lengths == lengths
        assert shape.branches == len(lengths)
        assert shape.longest == max(lengths, default=0)

    @invariant()
    def is_well_formed(self) -> None:
        for node in self.tree.nodes():
            assert 0 < len(node) <= self.max_segment
            assert node.parent is not None
            assert node.parent.children[node.offset][int(node.keys[0])] is node
            assert 0 <= node.offset <= len(node.parent)
            for offset, siblings in node.children.items():
                assert 0 < offset <= len(node)
                assert offset == len(node) or int(node.keys[offset]) not in siblings
        salts = {salt for salt, _ in self.stored} | {salt for _, salt, _ in self.leases}
        assert self.tree._roots.keys() == salts


@pytest.mark.parametrize(
    ("max_segment", "max_moved", "max_pieces"),
    [(8192, 64, 8), (9, 64, 8), (8192, 0, 8), (8192, 64, 2), (9, 2, 1)],
)
def test_tree_behaves_as_a_set_of_prefixes(
    max_segment: int, max_moved: int, max_pieces: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(TreeAgainstSet, "max_segment", max_segment)
    monkeypatch.setattr(tree_module, "MAX_PIECES", max_pieces)
    monkeypatch.setattr(node_module, "MAX_MOVED_CHILDREN", max_moved)
    TreeAgainstSet.TestCase.settings = settings(
        max_examples=60, stateful_step_count=50, deadline=None
    )
    TreeAgainstSet.TestCase().runTest()


# -- single cases ---------------------------------------------------------------------------


def _store(tree: PrefixTree[Rows], tokens: Any, salt: str = "", step: int | None = None) -> int:
    """Insert `tokens` in steps of `step` tokens and release; return the tokens copied by merges."""
    tokens = tuple(int(token) for token in tokens)
    copied = [0]
    lease = tree.acquire(salt)
    step = step or len(tokens)
    for start in range(0, len(tokens), step):
        part = tokens[start : start + step]
        tree.insert(lease, _array(part), Rows(np.zeros(len(part), np.int64), copied))
    tree.release(lease)
    return copied[0]


def _matched(tree: PrefixTree[Rows], tokens: Any, salt: str = "") -> int:
    lease = tree.acquire(salt)
    count = tree.match_prefix(lease, _array(tokens))
    tree.release(lease)
    return count


def test_a_match_may_end_at_any_token() -> None:
    tree: PrefixTree[Rows] = PrefixTree()
    _store(tree, range(300))
    for length in range(301):
        assert _matched(tree, [*range(length), 999]) == length


def test_salts_share_nothing() -> None:
    tree: PrefixTree[Rows] = PrefixTree()
    _store(tree, range(50), salt="a")
    assert _matched(tree, range(50), salt="b") == 0
    assert _matched(tree, range(50), salt="") == 0
    assert _matched(tree, range(50), salt="a") == 50


def test_an_evicted_salt_uses_no_memory() -> None:
    tree: PrefixTree[Rows] = PrefixTree()
    for i in range(50):
        _store(tree, range(3), salt=f"user {i}")
    assert tree.tokens == 150
    tree.clear()
    assert (tree.tokens, tree.nbytes, tree._roots) == (0, 0, {})


def test_inserting_kv_of_another_length_is_refused() -> None:
    tree: PrefixTree[Rows] = PrefixTree()
    lease = tree.acquire()
    with pytest.raises(ValueError, match="3 tokens with KV of 2"):
        tree.insert(lease, _array([1, 2, 3]), Rows(np.zeros(2, np.int64), [0]))
    assert tree.tokens == 0


@pytest.mark.parametrize("step", [1, 7, 128, 1000])
def test_growing_prefixes_stay_in_few_nodes_at_little_copying(step: int) -> None:
    total = 20_000
    tree: PrefixTree[Rows] = PrefixTree()
    copied = _store(tree, np.arange(total), step=step)
    lease = tree.acquire()
    assert tree.match_prefix(lease, np.arange(total, dtype=np.int32)) == total
    rounds = math.log2(tree_module.MAX_SEGMENT / step)
    assert len(tree.path(lease)) <= 2 * total / tree_module.MAX_SEGMENT + rounds + 2
    assert copied <= total * (2 * rounds + 2)


@pytest.mark.parametrize(
    ("replaced", "added", "output", "copies"),
    [(3, 400, 300, 6), (200, 500, 300, 6), (2200, 600, 2200, 7)],
    ids=["end of the answer", "short reasoning", "long reasoning"],
)
def test_a_conversation_whose_turns_fork_stays_in_few_nodes(
    replaced: int, added: int, output: int, copies: int
) -> None:
    """Each prompt replaces the end of what was stored, and keeps the rest of it stored."""
    tree: PrefixTree[Rows] = PrefixTree()
    copied = [0]
    rng = np.random.default_rng(0)
    history = _array([])
    for _ in range(50):
        kept = history[: max(0, len(history) - replaced)]
        lease = tree.acquire()
        assert tree.match_prefix(lease, kept) == len(kept)
        history = np.concatenate([kept, rng.integers(0, 1000, added + output).astype(np.int32)])
        for size in [added] + [128] * (output // 128) + [output % 128]:
            start = sum(piece.length for piece in tree.path(lease))
            part = history[start : start + size]
            tree.insert(lease, part, Rows(np.zeros(len(part), np.int64), copied))
            # Besides full segments, and those that a full one has no room for:
            open_pieces = [p for p in tree.path(lease) if 2 * len(p.node) < tree_module.MAX_SEGMENT]
            assert len(open_pieces) <= tree_module.MAX_PIECES
        tree.release(lease)
    assert _matched(tree, history) == len(history)
    assert tree.copied_tokens <= copies * tree.tokens


def test_what_a_running_sequence_reads_behind_a_fork_is_not_moved() -> None:
    tree: PrefixTree[Rows] = PrefixTree()
    reader = tree.acquire()
    tree.insert(reader, _array(range(200)), Rows(np.zeros(200, np.int64), [0]))
    _store(tree, [*range(100), *range(1000, 1300)])
    assert [piece.length for piece in tree.path(reader)] == [200]
    tree.release(reader)
    _store(tree, [*range(100), *range(2000, 2300)])
    assert _matched(tree, range(200)) == 200


def test_two_continuations_that_grow_in_turn_are_seldom_copied() -> None:
    """Each could be merged with their common beginning, again and again."""
    tree: PrefixTree[Rows] = PrefixTree()
    head = _array(range(2000))
    _store(tree, head)
    branches = [head, head]
    for turn in range(200):
        which = turn % 2
        added = _array(range(10_000 + 100 * turn, 10_000 + 100 * turn + 64))
        branches[which] = np.concatenate([branches[which], added])
        _store(tree, branches[which])
    assert tree.copied_tokens <= 8 * tree.tokens


def test_least_recently_used_prefix_goes_first() -> None:
    tree: PrefixTree[Rows] = PrefixTree()
    for first in range(5):
        _store(tree, [first, *range(100, 110)])
    assert _matched(tree, [0, *range(100, 110)]) == 11  # used again: now the youngest
    tree.evict(11 * 100)
    assert [_matched(tree, [first, *range(100, 110)]) for first in range(5)] == [11, 0, 11, 11, 11]


def test_use_of_a_beginning_keeps_it_longer_than_prefixes_used_before() -> None:
    tree: PrefixTree[Rows] = PrefixTree()
    _store(tree, range(20))  # a conversation …
    _store(tree, [*range(10), 77])  # … and another that forks from it
    _store(tree, range(1000, 1020))
    assert _matched(tree, range(5)) == 5  # the common beginning, used last of all
    tree.evict(12 * 100)
    assert _matched(tree, range(5)) == 5
    assert _matched(tree, range(1000, 1020)) == 0


def test_use_of_a_beginning_does_not_keep_the_end() -> None:
    tree: PrefixTree[Rows] = PrefixTree()
    _store(tree, range(20))
    _store(tree, [*range(10), 77])
    _store(tree, range(1000, 1020))
    assert _matched(tree, range(10)) == 10
    tree.evict(100)
    assert _matched(tree, range(20)) == 10
    assert _matched(tree, range(1000, 1020)) == 20


# -- comparing ------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(20))
def test_common_prefix_equals_a_loop(seed: int) -> None:
    rng = np.random.default_rng(seed)
    a = rng.integers(0, 9, rng.integers(0, 3000)).astype(np.int32)
    b = a[: rng.integers(0, len(a) + 1)].copy()
    if len(b) and seed % 2:
        b[rng.integers(0, len(b))] += 1
    b = np.concatenate([b, rng.integers(0, 9, rng.integers(0, 5)).astype(np.int32)])
    expected = 0
    while expected < min(len(a), len(b)) and a[expected] == b[expected]:
        expected += 1
    assert common_prefix(a, b) == common_prefix(b, a) == expected


@pytest.mark.parametrize("length", [255, 256, 257, 1279, 1280, 1281])
def test_common_prefix_sees_differences_at_window_borders(length: int) -> None:
    a = np.arange(5000, dtype=np.int32)
    b = a.copy()
    b[length] = -1
    assert common_prefix(a, b) == length
    assert common_prefix(a[:length], a) == length


class _Counted(np.ndarray[Any, np.dtype[np.int32]]):
    """Counts the elements that are compared."""

    compared = 0

    def __ne__(self, other: Any) -> Any:
        _Counted.compared += len(self)
        return super().__ne__(other).view(np.ndarray)


@pytest.mark.parametrize("shared", [0, 1, 1000])
def test_early_divergence_from_a_long_entry_compares_few_tokens(shared: int) -> None:
    tree: PrefixTree[Rows] = PrefixTree()
    stored = np.arange(100_000, dtype=np.int32)
    _store(tree, stored)
    asked = stored.copy()
    asked[shared] = -1
    for node in tree.nodes():
        node.keys = node.keys.view(_Counted)
    _Counted.compared = 0
    lease = tree.acquire()
    assert tree.match_prefix(lease, asked) == shared
    assert _Counted.compared <= 512 + 5 * shared


# -- work at many branches ------------------------------------------------------------------


def _instructions(call: Callable[[], object]) -> int:
    """Python instructions that `call` executes, in all functions."""
    count = 0

    def trace(frame: FrameType, event: str, _: Any) -> Any:
        nonlocal count
        frame.f_trace_opcodes, frame.f_trace_lines = True, False
        count += event == "opcode"
        return trace

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        call()
    finally:
        sys.settrace(before)
    return count


def _work(branches: int) -> dict[str, int]:
    """Instructions per operation on a tree of `branches` branches."""
    tree: PrefixTree[Rows] = PrefixTree()
    common = [*range(1000)]
    _store(tree, common)
    for i in range(branches // 4):
        _store(tree, [*common[: 1 + i % 999], 10_000 + i, 1])  # at offsets of a long node
        _store(tree, [*common, 20_000 + i, 1])  # at its end
        _store(tree, [30_000 + i, 1])  # at the root
        _store(tree, [0, 1], salt=f"user {i}")
    fork = [50_000, *range(3500)]
    _store(tree, fork[:2500])
    _store(tree, fork)  # a node of 1,001 tokens behind one of 2,500
    for i in range(branches // 4):
        _store(tree, [*fork, 60_000 + i, 1])
    held = tree.acquire()
    tree.match_prefix(held, _array(common))
    work = {
        "stats": _instructions(tree.stats),
        "evictable tokens": _instructions(lambda: tree.evictable_tokens),
        "divergence": _instructions(lambda: tree.divergence(held, 7)),
        "match and release": _instructions(lambda: _matched(tree, [*common, 20_000, 1])),
        "insert at the end": _instructions(lambda: _store(tree, [*common, 7, 8])),
        "insert as long as the node": _instructions(
            lambda: _store(tree, [*common, *range(40_000, 41_000)])
        ),
        "insert behind a fork": _instructions(
            lambda: _store(tree, [*fork, *range(70_000, 70_700)])
        ),
        "insert under a new salt": _instructions(lambda: _store(tree, [1, 2], salt="new")),
    }
    tree.release(held)
    work["evict ten ends"] = _instructions(lambda: tree.evict(20 * 100))
    return work


def test_work_does_not_grow_with_the_number_of_branches() -> None:
    few, many = _work(400), _work(8000)
    for operation, count in few.items():
        assert many[operation] <= 1.2 * count + 50, operation
