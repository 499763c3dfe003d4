"""Nodes of the prefix tree, and leases on them."""

from __future__ import annotations

from bisect import bisect_left, insort
from dataclasses import dataclass, field
from typing import Any, Generic, Literal, Protocol, Self, TypeVar

import numpy as np
import numpy.typing as npt

Keys = npt.NDArray[np.integer[Any]]
"""[n] integers by which n consecutive tokens are compared.

A token's key stands for all that its KV depends on besides the tokens before: its id, and with an
MTP layer also the next token's id (`glmd.engine.sequence.Sequence.cache_keys`).
"""

MAX_EVICTED_CHILDREN = 256
"""Evicted continuations that one node remembers, to report why a prompt did not match."""

MAX_MOVED_CHILDREN = 64
"""A node with more children is not merged into its parent: each would have to be moved."""

_COMPARE_WINDOW = 256
"""Tokens compared at first. The window then grows fourfold, so that an early divergence from a
100k-token node costs microseconds and a full match still runs at memory speed."""


class SegmentLike(Protocol):
    """A segment as the tree uses it; see `glmd.kv_cache.segment.Segment`."""

    def __len__(self) -> int: ...
    @property
    def nbytes(self) -> int: ...
    def slice(self, start: int, end: int) -> Self: ...
    def head(self, end: int) -> Self: ...
    def joins(self, other: Self) -> bool: ...
    def concat(self, *others: Self) -> Self: ...


S = TypeVar("S", bound=SegmentLike)


class TreeObserver(Protocol):
    """Is told what a tree stores and removes, in this order."""

    def changed(
        self, kind: Literal["store", "remove"], salt: str, pieces: list[Keys], start: int
    ) -> None:
        """Note that what follows the first `start` keys of a prefix is stored, or removed.

        Args:
            pieces: the prefix, consecutive.
        """
        ...

    def cleared(self) -> None:
        """Note that everything has been removed."""
        ...


def common_prefix(a: Keys, b: Keys) -> int:
    """Number of leading keys that `a` and `b` share."""
    limit = min(len(a), len(b))
    start, window = 0, _COMPARE_WINDOW
    while start < limit:
        end = min(start + window, limit)
        differs = a[start:end] != b[start:end]
        index = int(differs.argmax())
        if differs[index]:
            return start + index
        start, window = end, window * 4
    return limit


@dataclass(eq=False, slots=True)
class Node(Generic[S]):
    """A run of tokens with their KV, continuing the first `offset` tokens of `parent`.

    A root has no keys, no KV (None) and no parent (None).

    Attributes:
        start: number of tokens before this node.
        salt: the cache salt, in a root only.
        children: by offset, then by their first key.
        child_offsets: the keys of `children`, ascending.
        leases: leases that end in this node.
        leased: the lengths of `leases`, and the offsets of children in the paths of leases,
            ascending.
        last_used: when the node's end was last used, in ticks of the tree's clock.
        interior_last_used: when a prefix was last used that ends before the last child.
        evicted_children: offset and first key of evicted continuations, oldest first.
        evictable: whether the node is in the tree's list of evictable nodes.
        branch_length: the node's entry in the tree's list of branch lengths; 0: none.
    """

    keys: Keys
    kv: S | None
    parent: Node[S] | None
    offset: int
    start: int = 0
    salt: str = ""
    children: dict[int, dict[int, Node[S]]] = field(default_factory=dict)
    child_offsets: list[int] = field(default_factory=list)
    leases: set[Lease[S]] = field(default_factory=set)
    leased: list[int] = field(default_factory=list)
    last_used: int = 0
    interior_last_used: int = 0
    evicted_children: dict[tuple[int, int], None] = field(default_factory=dict)
    evictable: bool = False
    branch_length: int = 0

    def __len__(self) -> int:
        return len(self.keys)

    @property
    def child_len(self) -> int:
        """Number of this node's tokens that a child continues."""
        return self.child_offsets[-1] if self.child_offsets else 0

    @property
    def leased_len(self) -> int:
        """Number of this node's tokens that are part of a leased prefix."""
        return self.leased[-1] if self.leased else 0

    @property
    def pinned_len(self) -> int:
        """Number of this node's tokens that a child or a lease continues."""
        return max(self.child_len, self.leased_len)

    @property
    def has_many_children(self) -> bool:
        """Whether it is not merged into its parent: each child would have to be moved."""
        if len(self.children) > MAX_MOVED_CHILDREN:
            return True
        return sum(map(len, self.children.values())) > MAX_MOVED_CHILDREN

    def prefix(self) -> tuple[str, list[Keys]]:
        """The salt, and the keys from the root to the node's end in pieces."""
        pieces, node, length = [], self, len(self)
        while node.parent is not None:
            pieces.append(node.keys[:length])
            node, length = node.parent, node.offset
        return node.salt, pieces[::-1]

    def add_child(self, child: Node[S]) -> None:
        siblings = self.children.get(child.offset)
        if siblings is None:
            siblings = self.children[child.offset] = {}
            insort(self.child_offsets, child.offset)
        siblings[int(child.keys[0])] = child

    def remove_child(self, child: Node[S]) -> None:
        siblings = self.children[child.offset]
        del siblings[int(child.keys[0])]
        if not siblings:
            del self.children[child.offset]
            del self.child_offsets[bisect_left(self.child_offsets, child.offset)]

    def remember_evicted(self, offset: int, key: int) -> None:
        """Record that a continuation of the first `offset` tokens was evicted."""
        self.evicted_children[offset, key] = None
        if len(self.evicted_children) > MAX_EVICTED_CHILDREN:
            del self.evicted_children[next(iter(self.evicted_children))]


@dataclass(eq=False, slots=True)
class Lease(Generic[S]):
    """A sequence's hold on a prefix: all tokens up to the first `length` of `node`."""

    node: Node[S]
    length: int


@dataclass(frozen=True, slots=True)
class PathNode(Generic[S]):
    """The first `length` tokens of `node`, as a part of a prefix."""

    node: Node[S]
    length: int
