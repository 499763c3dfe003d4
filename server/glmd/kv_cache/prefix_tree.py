"""Prefix tree of sealed KV, stored once and shared by all sequences.

A node holds a run of tokens and their KV. A child is attached *at an offset* in its parent: it
continues the parent's first `offset` tokens. So a match may end at any token, and no segment is
split or copied for a match. A sequence holds a `Lease` on the end of its prefix. Tokens that
neither a lease nor a child continues can be evicted, least recently used first.

Counters and two sorted lists are updated with each change, so that no operation walks the tree.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice, pairwise
from operator import attrgetter
from typing import Generic

import numpy as np

from glmd.kv_cache.node import Keys, Lease, Node, PathNode, S, TreeObserver, common_prefix

MAX_SEGMENT = 32_768
"""Tokens: 1.8 GB of GLM-4.7-Flash, whose copy takes a Mac's GPU as long as a step or two. Where
working memory is short, segments are shorter (`glmd.engine.memory`)."""

MERGE_RATIO = 3
"""How much longer than what follows a piece may be that is merged with it. Fewer, longer pieces at
more copying: a piece costs three kernels per layer and step, and 1,000 tokens are copied in less
than a millisecond."""

MAX_PIECES = 8
"""Pieces that wait to be merged, at the end of a path."""

MAX_SIBLINGS = 64
"""Continuations of a prefix, the latest, among which `divergence` finds the longest."""

_LAST_USED = attrgetter("last_used")


@dataclass(frozen=True, slots=True)
class TreeStats:
    """Shape of a tree."""

    segments: int
    branches: int
    """Number of stored prefixes that no other continues."""
    longest: int
    """Tokens of the longest stored prefix."""


@dataclass(frozen=True, slots=True)
class Divergence:
    """Continuations of a prefix other than the requested one."""

    tokens: int
    """Length of the longest stored continuation, of the latest `MAX_SIBLINGS`."""
    evicted: bool
    """The requested continuation was stored and has been evicted."""


class PrefixTree(Generic[S]):
    """Sealed KV by token prefix, with one root per cache salt.

    Attributes:
        leases: all leases.
        tokens: number of tokens stored.
        nbytes: bytes of their KV.
        evicted_tokens: number of tokens evicted so far.
        copied_tokens: number of tokens copied so far to merge segments.
        unsaved: nodes with tokens that have not been saved, oldest first; who saves them takes
            them out. Others are evicted before them.
        version: number of changes that replaced segments which leases may hold. Layouts made
            under an earlier version keep memory alive that the tree has freed.
        observer: gets the keys that are stored and removed; None: no observer.
    """

    def __init__(self, max_segment: int = MAX_SEGMENT, *, track_unsaved: bool = False) -> None:
        """
        Args:
            max_segment: tokens up to which segments are merged.
            track_unsaved: fill `unsaved`.
        """
        self._max_segment = max_segment
        self._track_unsaved = track_unsaved
        self.unsaved: dict[Node[S], None] = {}
        self.observer: TreeObserver | None = None
        self._roots: dict[str, Node[S]] = {}
        self._clock = 0
        self._segments = 0
        self._leased_tokens = 0
        self._evictable: list[Node[S]] = []
        """Nodes whose end can be evicted, by `last_used`. A deletion from a list of 100,000 takes
        10 µs, no longer than a heap in Python would."""
        self._branch_lengths: list[int] = []
        """Tokens of the stored prefixes that no other continues, ascending."""
        self.leases: set[Lease[S]] = set()
        self.tokens = 0
        self.nbytes = 0
        self.evicted_tokens = 0
        self.copied_tokens = 0
        self.version = 0

    # -- leases ---------------------------------------------------------------------------

    def acquire(self, salt: str = "") -> Lease[S]:
        """Return a lease on the empty prefix, to be moved by `match_prefix` and `insert`."""
        root = self._roots.get(salt)
        if root is None:
            root = Node(np.empty(0, np.int64), None, None, offset=0, salt=salt)
            self._roots[salt] = root
        lease = Lease(root, 0)
        self.leases.add(lease)
        root.leases.add(lease)
        self._pin(root, 0)
        return lease

    def match_prefix(self, lease: Lease[S], keys: Keys) -> int:
        """Move `lease` along `keys` as far as they are stored; return the number matched."""
        node, length, matched = self._walk(lease.node, lease.length, keys)
        if matched:
            self._move(lease, node, length)
        return matched

    @staticmethod
    def _walk(node: Node[S], length: int, keys: Keys) -> tuple[Node[S], int, int]:
        """Follow `keys` from a position.

        Return the new node and length, and the keys matched.
        """
        matched = 0
        while matched < len(keys):
            step = common_prefix(node.keys[length:], keys[matched:])
            if step:
                length += step
                matched += step
            else:
                child = node.children.get(length, {}).get(int(keys[matched]))
                if child is None:
                    break
                node, length = child, 0
        return node, length, matched

    def release(self, lease: Lease[S]) -> None:
        """Give up a lease. Its prefix stays stored until it is evicted."""
        self.leases.remove(lease)
        lease.node.leases.remove(lease)
        self._unpin(lease.node, lease.length)
        self._touch(lease)
        self._drop_empty_root(lease.node)

    def path(self, lease: Lease[S]) -> list[PathNode[S]]:
        """The nodes of the lease's prefix, in the order of the tokens."""
        nodes: list[PathNode[S]] = []
        node, length = lease.node, lease.length
        while node.parent is not None:
            nodes.append(PathNode(node, length))
            node, length = node.parent, node.offset
        nodes.reverse()
        return nodes

    def divergence(self, lease: Lease[S], key: int) -> Divergence:
        """Describe the continuations of the lease's prefix.

        Args:
            lease: moved along a prompt by `match_prefix`.
            key: the prompt's first key that did not match.
        """
        node, length = lease.node, lease.length
        siblings = reversed(node.children.get(length, {}).values())
        return Divergence(
            tokens=max([len(node) - length, *map(len, islice(siblings, MAX_SIBLINGS))]),
            evicted=(length, key) in node.evicted_children,
        )

    # -- growth ---------------------------------------------------------------------------

    def insert(self, lease: Lease[S], keys: Keys, kv: S, *, defer: bool = False) -> None:
        """Store tokens behind the lease's prefix and move the lease to their end.

        Tokens that are stored already, by another sequence, are not stored again.

        Args:
            keys: [n], continuing the lease's prefix.
            kv: their KV, `len(kv) == n`.
            defer: leave merging to a later insertion, as long as there are few nodes. For tokens
                that no decode step reads before.
        """
        if len(keys) != len(kv):
            raise ValueError(f"{len(keys)} tokens with KV of {len(kv)}")
        known = self.match_prefix(lease, keys)
        if known == len(keys):
            return
        keys, kv = np.array(keys[known:]), kv.slice(known, len(keys))
        parent, offset = lease.node, lease.length
        child = Node(keys, kv, parent, offset, start=parent.start + offset)
        parent.add_child(child)
        if self.observer is not None:
            self.observer.changed("store", *child.prefix(), child.start)
        if self._track_unsaved:
            self.unsaved[child] = None
        self.tokens += len(keys)
        self.nbytes += kv.nbytes
        self._segments += 1
        self._move(lease, child, len(child))
        self._merge_upwards(child, defer=defer)

    def replace(self, node: Node[S], kv: S) -> None:
        """Store other KV of the same tokens in a node."""
        assert node.kv is not None
        self.version += 1
        self.nbytes += kv.nbytes - node.kv.nbytes
        node.kv = kv

    def _merge_upwards(self, node: Node[S], *, defer: bool) -> None:
        """Merge a new node with its ancestors where this shortens paths at little copying.

        A parent is merged up to the fork; the rest of it becomes a child of the merged node. The
        part before the fork is at most `MERGE_RATIO` times, the rest at most half as long as what
        follows: so each token is copied O(log n) times in total, also where two continuations of
        one prefix grow in turn, and a path of n tokens is left in O(log n + n / max_segment) nodes.
        If more than `MAX_PIECES` nodes could be merged, all are, whatever their sizes.

        Merging pairs, rather than all nodes at once, would copy twice as much in one step.
        """
        run = [node]
        size = total = len(node)
        cheap = 1
        while (parent := node.parent) is not None and parent.parent is not None:
            rest = len(parent) - node.offset
            total += node.offset
            if total > self._max_segment or (rest and parent.leased_len > node.offset):
                break
            assert parent.kv is not None
            assert node.kv is not None
            if not parent.kv.joins(node.kv):
                break
            if node.has_many_children or (rest and parent.has_many_children):
                break
            if cheap == len(run) and node.offset <= MERGE_RATIO * size and 2 * rest <= size:
                cheap += 1
                size = total
            run.append(parent)
            node = parent
        if defer and len(run) <= MAX_PIECES:
            return
        if len(run) - cheap < MAX_PIECES:
            run = run[:cheap]
        if len(run) > 1:
            self._merge(run[::-1])

    def _merge(self, run: list[Node[S]]) -> None:
        """Merge nodes, each a child of the one before, into the first.

        A lease is held on the end of the last, and none on what a node has behind the next one.
        """
        self.version += 1
        target = run[0]
        ends = [node.offset for node in run[1:]] + [len(run[-1])]
        segments = [node.kv for node in run if node.kv is not None]
        used = [segment.head(end) for segment, end in zip(segments, ends, strict=True)]
        kv = used[0].concat(*used[1:])
        self.copied_tokens += sum(ends)
        keys = np.concatenate([node.keys[:end] for node, end in zip(run, ends, strict=True)])
        for parent, node in pairwise(run):
            parent.remove_child(node)
            parent.leased.pop()  # The entry of `node`, the largest.
        rests: list[Node[S]] = []
        shift = 0
        for node, segment, end in zip(run, segments, ends, strict=True):
            rest = self._split_rest(node, segment, end, target, shift)
            if node is not target:
                self._move_up(node, target, shift)
            if rest is not None:
                rests.append(rest)
                if node in self.unsaved:
                    self.unsaved[rest] = None
            shift += end
        self._segments += len(rests) - len(run) + 1
        self.nbytes += kv.nbytes - sum(segment.nbytes for segment in segments)
        if any(node in self.unsaved for node in run):
            self.unsaved[target] = None
        interior, last_used = max(n.interior_last_used for n in run), run[-1].last_used
        for node in run[1:]:
            self._discard(node)
        target.keys, target.kv, target.interior_last_used = keys, kv, interior
        self._update_lists(target, last_used)
        for rest in rests:
            assert rest.kv is not None
            self.nbytes += rest.kv.nbytes
            target.add_child(rest)
            self._update_lists(rest)

    def _split_rest(
        self, node: Node[S], kv: S, end: int, target: Node[S], shift: int
    ) -> Node[S] | None:
        """Make what `node` has behind its first `end` tokens a node of its own.

        Args:
            target: the future parent, in which `node` begins at `shift`.

        Returns:
            None if there is nothing behind.
        """
        if end == len(node):
            return None
        rest: Node[S] = Node(
            node.keys[end:].copy(), kv.slice(end, len(node)), target, shift + end, node.start + end
        )
        rest.last_used, rest.interior_last_used = node.last_used, node.interior_last_used
        self.copied_tokens += len(rest)
        for offset in [offset for offset in node.child_offsets if offset > end]:
            for child in [*node.children[offset].values()]:
                node.remove_child(child)
                child.parent, child.offset = rest, offset - end
                rest.add_child(child)
        for offset, key in [entry for entry in node.evicted_children if entry[0] > end]:
            del node.evicted_children[offset, key]
            rest.remember_evicted(offset - end, key)
        return rest

    @staticmethod
    def _move_up(node: Node[S], target: Node[S], shift: int) -> None:
        """Move children and leases of a node to `target`, in which it begins at `shift`."""
        for siblings in node.children.values():
            for child in siblings.values():
                child.parent, child.offset = target, child.offset + shift
                target.add_child(child)
        for lease in node.leases:
            lease.node, lease.length = target, lease.length + shift
        target.leases |= node.leases
        target.leased += [length + shift for length in node.leased]
        for offset, key in node.evicted_children:
            target.remember_evicted(offset + shift, key)

    # -- eviction -------------------------------------------------------------------------

    @property
    def evictable_tokens(self) -> int:
        """Number of tokens that are not part of a leased prefix."""
        return self.tokens - self._leased_tokens

    def evict(self, nbytes: int) -> int:
        """Free at least `nbytes`, least recently used ends first; return the bytes freed.

        Ends that have not been saved come last.

        Fewer are freed when everything else is leased.
        """
        freed = 0
        while freed < nbytes and self._evictable:
            saved = (node for node in self._evictable if node not in self.unsaved)
            node = next(saved, self._evictable[0])
            freed += self._truncate(node, node.pinned_len)
        return freed

    def clear(self) -> int:
        """Drop everything that is not leased; return the bytes freed."""
        return self.evict(self.nbytes + 1)

    def reset(self) -> None:
        """Drop everything, with all leases."""
        self.version += 1
        if self.observer is not None:
            self.observer.cleared()
        self.evicted_tokens += self.tokens
        self._roots.clear()
        self.unsaved.clear()
        self._evictable.clear()
        self._branch_lengths.clear()
        self.leases.clear()
        self.tokens = self.nbytes = self._segments = self._leased_tokens = 0

    def _truncate(self, node: Node[S], length: int) -> int:
        """Keep the first `length` tokens of `node`, 0: remove it; return the bytes freed."""
        parent, kv = node.parent, node.kv
        assert parent is not None
        assert kv is not None
        if self.observer is not None:
            self.observer.changed("remove", *node.prefix(), node.start + length)
        freed, key = kv.nbytes, int(node.keys[length])
        self.tokens -= len(node) - length
        self.evicted_tokens += len(node) - length
        if length:
            self.version += 1
            node.kv = kv.slice(0, length)
            freed -= node.kv.nbytes
            node.remember_evicted(length, key)
        else:
            self._segments -= 1
            parent.remove_child(node)
            parent.remember_evicted(node.offset, key)
        self.nbytes -= freed
        if length:
            node.keys = node.keys[:length].copy()
            self._update_lists(node)
        else:
            self._discard(node)
            last_used = parent.last_used
            if parent.pinned_len < len(parent):
                # Use of the child was use of the parent's interior, which is its end now.
                last_used = max(last_used, parent.interior_last_used, node.last_used)
            self._update_lists(parent, last_used)
            self._drop_empty_root(parent)
        return freed

    def _discard(self, node: Node[S]) -> None:
        """Let go of a node that is not in the tree any more."""
        node.keys, node.kv = node.keys[:0], None
        self.unsaved.pop(node, None)
        self._update_lists(node)

    # -- shape ----------------------------------------------------------------------------

    def nodes(self) -> Iterator[Node[S]]:
        """All nodes except the roots, parents before children."""
        stack = list(self._roots.values())
        while stack:
            node = stack.pop()
            if node.parent is not None:
                yield node
            for siblings in node.children.values():
                stack += siblings.values()

    def stats(self) -> TreeStats:
        lengths = self._branch_lengths
        return TreeStats(self._segments, len(lengths), lengths[-1] if lengths else 0)

    def _move(self, lease: Lease[S], node: Node[S], length: int) -> None:
        before = lease.node
        self._pin(node, length)
        self._unpin(before, lease.length)
        before.leases.remove(lease)
        node.leases.add(lease)
        lease.node, lease.length = node, length
        self._touch(lease)
        self._update_lists(before)

    def _pin(self, node: Node[S], length: int) -> None:
        """Add `length` to `node.leased`, and nodes that were not leased to their parents'."""
        pinned = False
        while not pinned:
            before, pinned = node.leased_len, bool(node.leased) or node.parent is None
            insort(node.leased, length)
            self._leased_tokens += node.leased_len - before
            if node.parent is not None:
                node, length = node.parent, node.offset

    def _unpin(self, node: Node[S], length: int) -> None:
        """Undo `_pin`."""
        pinned = False
        while not pinned:
            before = node.leased_len
            del node.leased[bisect_left(node.leased, length)]
            self._leased_tokens += node.leased_len - before
            pinned = bool(node.leased) or node.parent is None
            if node.parent is not None:
                node, length = node.parent, node.offset

    def _touch(self, lease: Lease[S]) -> None:
        """Record the use of a prefix. Use of a node's interior does not renew its end."""
        node = lease.node
        self._clock += 1
        if lease.length > node.child_len:
            self._update_lists(node, self._clock)
        else:
            node.interior_last_used = self._clock
            self._update_lists(node)

    def _update_lists(self, node: Node[S], last_used: int | None = None) -> None:
        """Update a node's entries in the sorted lists.

        To be called after each change of its children, leases or tokens.

        Args:
            last_used: new value of `node.last_used`; None: as it is. No two nodes have the same.
        """
        evictable = node.parent is not None and node.pinned_len < len(node)
        if last_used is None:
            last_used = node.last_used
        if (evictable, last_used) != (node.evictable, node.last_used):
            if node.evictable:
                del self._evictable[bisect_left(self._evictable, node.last_used, key=_LAST_USED)]
            node.evictable, node.last_used = evictable, last_used
            if evictable:
                insort(self._evictable, node, key=_LAST_USED)
        length = node.start + len(node) if node.child_len < len(node) else 0
        if length != node.branch_length:
            lengths = self._branch_lengths
            if node.branch_length:
                del lengths[bisect_left(lengths, node.branch_length)]
            if length:
                insort(lengths, length)
            node.branch_length = length

    def _drop_empty_root(self, node: Node[S]) -> None:
        """Remove the root of a salt under which nothing is stored or leased."""
        if node.parent is None and not node.children and not node.leases:
            del self._roots[node.salt]
