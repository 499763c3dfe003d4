"""Time the prefix tree's operations by the number of branches.

    python benchmarks/prefix_tree.py [--branches 1000 5000 20000 100000]

Half of the branches leave a common prefix of 4,000 tokens at different offsets, half start at the
root. Segments hold no arrays, so the times are those of the tree's own bookkeeping. The median of
`REPEATS` calls is printed in microseconds.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from dataclasses import dataclass
from statistics import median

import numpy as np

from glmd.kv_cache.node import Lease
from glmd.kv_cache.prefix_tree import PrefixTree

COMMON = np.arange(4000, dtype=np.int32)
BRANCH_TOKENS = 64
LEASES = 16
REPEATS = 51
TOKEN_BYTES = 1


@dataclass(frozen=True)
class FakeSegment:
    """A segment of a length, without arrays."""

    tokens: int

    def __len__(self) -> int:
        return self.tokens

    @property
    def nbytes(self) -> int:
        return self.tokens * TOKEN_BYTES

    def slice(self, start: int, end: int) -> FakeSegment:
        return FakeSegment(end - start)

    def head(self, end: int) -> FakeSegment:
        return FakeSegment(end)

    def joins(self, other: FakeSegment) -> bool:
        return True

    def concat(self, *others: FakeSegment) -> FakeSegment:
        return FakeSegment(self.tokens + sum(map(len, others)))


def prompt(number: int) -> np.ndarray[tuple[int], np.dtype[np.int32]]:
    """The tokens of branch `number`; no two branches share a token of their own."""
    common = COMMON[: 1 + (number * 7919) % len(COMMON)] if number % 2 else COMMON[:0]
    first = len(COMMON) + number * BRANCH_TOKENS
    return np.concatenate([common, np.arange(first, first + BRANCH_TOKENS, dtype=np.int32)])


def store(tree: PrefixTree[FakeSegment], tokens: np.ndarray) -> Lease[FakeSegment]:
    """Insert a prompt as the engine does: match its prefix, then insert the rest."""
    lease = tree.acquire()
    known = tree.match_prefix(lease, tokens)
    if known < len(tokens):
        tree.insert(lease, tokens[known:], FakeSegment(len(tokens) - known))
    return lease


def build(branches: int) -> PrefixTree[FakeSegment]:
    tree: PrefixTree[FakeSegment] = PrefixTree()
    tree.release(store(tree, COMMON))
    for number in range(branches):
        tree.release(store(tree, prompt(number)))
    return tree


def microseconds(call: Callable[[int], object]) -> float:
    times = []
    for repeat in range(REPEATS):
        start = time.perf_counter()
        call(repeat)
        times.append(time.perf_counter() - start)
    return 1e6 * median(times)


def measure(branches: int) -> dict[str, float]:
    """Microseconds per operation."""
    tree = build(branches)
    held = [store(tree, prompt(number * branches // LEASES)) for number in range(LEASES)]
    result = {
        "stats": microseconds(lambda _: tree.stats()),
        "evictable_tokens": microseconds(lambda _: tree.evictable_tokens),
    }

    def match(repeat: int) -> None:
        lease = tree.acquire()
        tree.match_prefix(lease, prompt((repeat * 101) % branches))
        tree.release(lease)

    result["acquire, match, release"] = microseconds(match)
    result["insert a branch"] = microseconds(
        lambda repeat: tree.release(store(tree, prompt(branches + repeat)))
    )
    lease = tree.acquire()
    result["divergence at the root"] = microseconds(lambda _: tree.divergence(lease, -1))
    tree.match_prefix(lease, COMMON)
    result["release on the common prefix"] = microseconds(
        lambda _: tree.release(store(tree, COMMON[:2000]))
    )
    tree.release(lease)
    result["evict one branch"] = microseconds(lambda _: tree.evict(TOKEN_BYTES))
    result["evict ten branches"] = microseconds(
        lambda _: tree.evict(10 * BRANCH_TOKENS * TOKEN_BYTES)
    )
    for lease in held:
        tree.release(lease)
    salts: PrefixTree[FakeSegment] = PrefixTree()
    for salt in range(branches):
        salts.acquire(str(salt))
    result["acquire, release a salt"] = microseconds(lambda _: salts.release(salts.acquire("new")))
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--branches", type=int, nargs="+", default=[1000, 5000, 20_000, 100_000])
    sizes = parser.parse_args().branches
    columns = [measure(size) for size in sizes]
    print(f"{'microseconds':30}" + "".join(f"{size:>12,}" for size in sizes))
    for name in columns[0]:
        print(f"{name:30}" + "".join(f"{column[name]:>12,.1f}" for column in columns))


if __name__ == "__main__":
    main()
