"""The prefix tree: every sealed segment once, shared by all sequences that begin with it.

A node holds a run of tokens and their KV. A child hangs *at an offset* in its parent: it
continues the parent's first `offset` tokens, so a hit may end at any token and nothing is
split or copied for it. A sequence holds a `Lease` on the end of its prefix; whatever a lease
or a child continues stays, the rest can be evicted, least recently used first.

Tokens are told apart by their *keys*: all that their KV depends on beside the tokens before.
That is the token, and where an MTP layer's KV is stored with it, the token that follows, too
(`glmd.engine.sequence.Sequence.keys`).
"""

from __future__ import annotations

import heapq
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, Generic, Protocol, Self, TypeVar

import numpy as np
import numpy.typing as npt

Keys = npt.NDArray[np.integer[Any]]
"""[n] integers: what n consecutive tokens are told apart by."""

MAX_SEGMENT = 8192
"""Tokens. Longer segments would not make attention cheaper, but joining them would make one
step visibly longer, and eviction coarser."""

MAX_SALTS = 16
"""Salts among which a prompt's prefix is looked for, to say that it is stored elsewhere."""

MAX_LOST = 256
"""Evicted continuations that one node remembers, only to say what a prompt would have hit."""

_COMPARE_WINDOW = 256
"""Tokens compared at first; the window then grows fourfold, so that an early divergence from a
100k-token node costs microseconds and a full match still runs at memory speed."""


class SegmentLike(Protocol):
    """What the tree needs of a segment; `glmd.kv_cache.segment.Segment` is one."""

    def __len__(self) -> int: ...
    @property
    def nbytes(self) -> int: ...
    def part(self, start: int, stop: int) -> Self: ...
    def joined(self, *others: Self) -> Self: ...


S = TypeVar("S", bound=SegmentLike)


def common_prefix(a: Keys, b: Keys) -> int:
    """Number of leading keys that `a` and `b` share."""
    limit = min(len(a), len(b))
    start, window = 0, _COMPARE_WINDOW
    while start < limit:
        stop = min(start + window, limit)
        differs = a[start:stop] != b[start:stop]
        first = int(differs.argmax())
        if differs[first]:
            return start + first
        start, window = stop, window * 4
    return limit


@dataclass(eq=False, slots=True)
class Node(Generic[S]):
    """A run of tokens with their KV, continuing `parent`'s first `offset` tokens."""

    keys: Keys
    kv: S | None
    """None for a root only, which holds no tokens."""
    parent: Node[S] | None
    offset: int
    children: dict[tuple[int, int], Node[S]] = field(default_factory=dict)
    """By offset in this node and the child's first key."""
    leases: set[Lease[S]] = field(default_factory=set)
    last_used: int = 0
    """When the end of this node was last used, in ticks of the tree's clock."""
    interior_last_used: int = 0
    """When a prefix was last used that ends in this node before its last child."""
    evicted_children: dict[tuple[int, int], None] = field(default_factory=dict)
    """What was evicted here: where it began, and its first key. The latest `MAX_LOST`."""

    def __len__(self) -> int:
        return len(self.keys)

    @property
    def pinned_len(self) -> int:
        """How many of this node's tokens a child or a lease continues."""
        offsets = (offset for offset, _ in self.children)
        return max(max(offsets, default=0), max((x.length for x in self.leases), default=0))


@dataclass(eq=False, slots=True)
class Lease(Generic[S]):
    """A sequence's hold on a prefix: everything up to `length` tokens into `node`."""

    node: Node[S]
    length: int


@dataclass(frozen=True, slots=True)
class PathNode(Generic[S]):
    """The first `length` tokens of `node`, as a part of some prefix."""

    node: Node[S]
    length: int


@dataclass(frozen=True, slots=True)
class TreeStats:
    """How a tree has grown.

    Attributes:
        segments: nodes, roots not counted.
        branches: stored prefixes that no other continues.
        longest: tokens of the longest stored prefix.
    """

    segments: int
    branches: int
    longest: int


@dataclass(frozen=True, slots=True)
class Divergence:
    """What is stored behind a prefix.

    Attributes:
        tokens: the length of the longest run that continues it.
        evicted: what was asked for was stored there, too, until it was evicted.
    """

    tokens: int
    evicted: bool


class PrefixTree(Generic[S]):
    """Sealed KV by token prefix, one root per cache salt.

    Attributes:
        tokens: number of tokens stored.
        nbytes: bytes of their KV.
        evicted_tokens: number of tokens evicted so far.
        rebuilt: how often stored segments were replaced or dropped: what was learnt of them before
            may keep memory alive that the tree has given up.
    """

    def __init__(self) -> None:
        self._roots: dict[str, Node[S]] = {}
        self._leases: set[Lease[S]] = set()
        self._clock = 0
        self.tokens = 0
        self.nbytes = 0
        self.evicted_tokens = 0
        self.version = 0

    # -- leases ---------------------------------------------------------------------------

    def acquire(self, salt: str = "") -> Lease[S]:
        """A lease on the empty prefix; `match_prefix` moves it."""
        root = self._roots.get(salt)
        if root is None:
            root = self._roots[salt] = Node(np.empty(0, np.int64), None, None, 0)
        lease = Lease(root, 0)
        root.leases.add(lease)
        self._leases.add(lease)
        return lease

    def match_prefix(self, lease: Lease[S], keys: Keys) -> int:
        """Move `lease` along `keys` as far as they are stored; returns how many were."""
        node, length, matched = self._walk(lease.node, lease.length, keys)
        if matched:
            self._move(lease, node, length)
        return matched

    @staticmethod
    def _walk(node: Node[S], length: int, keys: Keys) -> tuple[Node[S], int, int]:
        """Where one gets from a place along `keys`, and how many of them that are."""
        matched = 0
        while matched < len(keys):
            step = common_prefix(node.keys[length:], keys[matched:])
            if step:
                length += step
            else:
                child = node.children.get((length, int(keys[matched])))
                if child is None:
                    break
                node, length = child, 0
                continue
            matched += step
        return node, length, matched

    def release(self, lease: Lease[S]) -> None:
        """Give the prefix back; it stays stored until it is evicted."""
        self._touch(lease)
        lease.node.leases.remove(lease)
        self._leases.remove(lease)
        self._drop_bare_root(lease.node)

    def path(self, lease: Lease[S]) -> list[PathNode[S]]:
        """The pieces that make up the lease's prefix, first tokens first."""
        pieces: list[PathNode[S]] = []
        node, length = lease.node, lease.length
        while node.parent is not None:
            pieces.append(PathNode(node, length))
            node, length = node.parent, node.offset
        pieces.reverse()
        return pieces

    def divergence(self, lease: Lease[S], key: int) -> Divergence:
        """What is stored behind the lease's prefix, which `key` is not the next of.

        Args:
            key: the first one that `match_prefix` did not find.
        """
        node, length = lease.node, lease.length
        runs = [len(child) for (offset, _), child in node.children.items() if offset == length]
        return Divergence(
            tokens=max([len(node) - length, *runs]),
            evicted=(length, key) in node.evicted_children,
        )

    def stored_elsewhere(self, salt: str, keys: Keys) -> int:
        """The longest prefix of `keys` that is stored with another salt than `salt`.

        Looks at the `MAX_SALTS` salts that came last.
        """
        others = [root for other, root in self._roots.items() if other != salt]
        return max((self._walk(root, 0, keys)[2] for root in others[-MAX_SALTS:]), default=0)

    # -- growth ---------------------------------------------------------------------------

    def insert(self, lease: Lease[S], keys: Keys, kv: S) -> None:
        """Store tokens and their KV behind the lease's prefix and move the lease to their end.

        What is stored already (another sequence sealed the same tokens) is not stored twice.

        Args:
            keys: [n], continuing the lease's prefix.
            kv: their KV, `len(kv) == n`.
        """
        if len(keys) != len(kv):
            raise ValueError(f"{len(keys)} tokens with KV of {len(kv)}")
        known = self.match_prefix(lease, keys)
        if known == len(keys):
            return
        keys, kv = np.array(keys[known:]), kv.part(known, len(keys))
        self.tokens += len(keys)
        self.nbytes += kv.nbytes
        child = Node(keys, kv, lease.node, lease.length)
        lease.node.children[lease.length, int(keys[0])] = child
        self._move(lease, child, len(child))
        self._compact(child)

    def _compact(self, node: Node[S]) -> None:
        """Join `node` to its ancestors while that keeps paths short at little copying.

        Joining only neighbours of similar size copies each token O(log) times in all, and
        leaves a path of n tokens in O(log n + n / MAX_SEGMENT) pieces. All that are to be one
        are copied at once: pair by pair, the longest joins would copy twice as much in one step.
        """
        run, size = [node], len(node)
        while (parent := node.parent) is not None and node.offset == len(parent):
            if not _worth_joining(parent, size):
                break
            run.append(parent)
            size += len(parent)
            node = parent
        if len(run) > 1:
            self._join(run[::-1])

    def _join(self, run: list[Node[S]]) -> None:
        """Make one node of several, each of which hangs at the end of the one before."""
        self.version += 1
        first, *others = run
        stored = [node.kv for node in run if node.kv is not None]
        keys = np.concatenate([node.keys for node in run])
        kv = stored[0].joined(*stored[1:])
        self.nbytes += kv.nbytes - sum(part.nbytes for part in stored)
        shift = len(first)
        for node in others:
            assert node.parent is not None
            del node.parent.children[node.offset, int(node.keys[0])]
        for node in others:
            for (offset, key), child in node.children.items():
                child.parent, child.offset = first, offset + shift
                first.children[offset + shift, key] = child
            for lease in node.leases:
                lease.node, lease.length = first, lease.length + shift
            first.leases |= node.leases
            for offset, key in node.evicted_children:
                _remember(first, offset + shift, key)
            first.last_used = max(first.last_used, node.last_used)
            first.interior_last_used = max(first.interior_last_used, node.interior_last_used)
            shift += len(node)
        first.keys, first.kv = keys, kv

    # -- eviction -------------------------------------------------------------------------

    @property
    def evictable_tokens(self) -> int:
        """Tokens that no lease holds, directly or through a child."""
        held: dict[Node[S], int] = {}
        for lease in self._leases:
            for piece in self.path(lease):
                held[piece.node] = max(piece.length, held.get(piece.node, 0))
        return self.tokens - sum(held.values())

    def evict(self, nbytes: int) -> int:
        """Free at least `nbytes` from the least recently used ends; returns the bytes freed.

        Fewer are freed when the rest is in use.
        """
        freed = 0
        heap = [
            (node.last_used, id(node), node) for node in self.nodes() if node.pinned_len < len(node)
        ]
        heapq.heapify(heap)
        while freed < nbytes and heap:
            stamp, _, node = heapq.heappop(heap)
            if stamp < node.last_used or node.pinned_len == len(node):
                continue  # In the heap once more, for its beginning, or done with.
            parent = node.parent
            freed += self._truncate(node, node.pinned_len)
            if parent is not None and len(node) == 0 and parent.pinned_len < len(parent):
                # The beginning of the parent was used whenever the child was.
                parent.last_used = max(parent.last_used, parent.interior_last_used, node.last_used)
                heapq.heappush(heap, (parent.last_used, id(parent), parent))
        return freed

    def clear(self) -> int:
        """Drop everything that is not in use; returns the bytes freed."""
        return self.evict(self.nbytes + 1)

    def reset(self) -> None:
        """Drop everything, in use or not, with all leases."""
        self.version += 1
        self.evicted_tokens += self.tokens
        self._roots.clear()
        self._leases.clear()
        self.tokens = self.nbytes = 0

    def _truncate(self, node: Node[S], length: int) -> int:
        """Keep only the first `length` tokens of `node`, none: unlink it."""
        assert node.kv is not None
        assert node.parent is not None
        self.version += 1
        before = node.kv.nbytes
        first = int(node.keys[length])
        if length == 0:
            del node.parent.children[node.offset, first]
            _remember(node.parent, node.offset, first)
            after = 0
        else:
            node.kv = node.kv.part(0, length)
            after = node.kv.nbytes
            _remember(node, length, first)
        self.tokens -= len(node) - length
        self.evicted_tokens += len(node) - length
        self.nbytes -= before - after
        node.keys = node.keys[:length].copy()
        if length == 0:
            self._drop_bare_root(node.parent)
        return before - after

    # -- inside ---------------------------------------------------------------------------

    def nodes(self) -> Iterator[Node[S]]:
        """Every node but the roots, parents first."""
        stack = [child for root in self._roots.values() for child in root.children.values()]
        while stack:
            node = stack.pop()
            yield node
            stack.extend(node.children.values())

    def stats(self) -> TreeStats:
        """The tree's shape, from a walk over all nodes."""
        segments = branches = longest = 0
        stack = [(root, 0) for root in self._roots.values()]
        while stack:
            node, start = stack.pop()
            longest = max(longest, start + len(node))
            if node.parent is not None:
                segments += 1
                branches += all(offset < len(node) for offset, _ in node.children)
            stack.extend((child, start + child.offset) for child in node.children.values())
        return TreeStats(segments, branches, longest)

    def _move(self, lease: Lease[S], node: Node[S], length: int) -> None:
        lease.node.leases.remove(lease)
        lease.node, lease.length = node, length
        node.leases.add(lease)
        self._touch(lease)

    def _touch(self, lease: Lease[S]) -> None:
        """Note the use of a node's end; use of its beginning only must not keep its end young."""
        node = lease.node
        self._clock += 1
        if lease.length > max((offset for offset, _ in node.children), default=0):
            node.last_used = self._clock
        else:
            node.interior_last_used = self._clock

    def _drop_bare_root(self, node: Node[S]) -> None:
        """Forget the root of a salt that holds nothing, so that salts cannot pile up."""
        if node.parent is None and not node.children and not node.leases:
            for salt, root in list(self._roots.items()):
                if root is node:
                    del self._roots[salt]


def _remember(node: Node[Any], offset: int, key: int) -> None:
    """Note what was evicted behind the first `offset` tokens of `node`."""
    node.evicted_children[offset, key] = None
    if len(node.evicted_children) > MAX_LOST:
        del node.evicted_children[next(iter(node.evicted_children))]


def _worth_joining(node: Node[Any], more: int) -> bool:
    """Whether `more` tokens should be copied into `node`'s segment rather than hang below it."""
    return node.parent is not None and len(node) <= 2 * more and len(node) + more <= MAX_SEGMENT
