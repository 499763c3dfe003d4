"""Index of the stored segments: restorable prefixes and their files."""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass
from threading import Lock

from glmd.kv_cache.disk_file import PrefixDigest, StoredSegment
from glmd.kv_cache.node import Keys, common_prefix


@dataclass(frozen=True, slots=True)
class StoredPart:
    """The first `length` tokens of a stored segment, as a part of a prefix."""

    stored: StoredSegment
    length: int

    @property
    def end(self) -> int:
        return self.stored.start + self.length


class DiskIndex:
    """Stored segments by the prefix that they continue, least recently used first.

    Thread-safe.

    A segment may continue another one from any of its tokens, as in the prefix tree. It is found by
    the digest of the prefix before it, so removing a segment leaves those behind it in place: they
    are found again if the tokens between are stored again.

    Attributes:
        nbytes: bytes of all files.
    """

    def __init__(self) -> None:
        self.nbytes = 0
        self._lock = Lock()
        self._segments: OrderedDict[str, StoredSegment] = OrderedDict()
        self._by_parent: dict[str, dict[int, StoredSegment]] = {}

    def __len__(self) -> int:
        return len(self._segments)

    def add(self, stored: StoredSegment) -> None:
        """Add a segment as the most recently used."""
        with self._lock:
            self._remove(stored.name)
            self._segments[stored.name] = stored
            self._by_parent.setdefault(stored.parent, {})[int(stored.keys[0])] = stored
            self.nbytes += stored.nbytes

    def remove(self, name: str) -> None:
        """Remove a segment if it is there."""
        with self._lock:
            self._remove(name)

    def _remove(self, name: str) -> None:
        stored = self._segments.pop(name, None)
        if stored is None:
            return
        self.nbytes -= stored.nbytes
        children, key = self._by_parent[stored.parent], int(stored.keys[0])
        if children.get(key) is stored:
            del children[key]
        if not children:
            del self._by_parent[stored.parent]

    def get(self, name: str) -> StoredSegment:
        """A segment by its name; KeyError: it is not there."""
        with self._lock:
            return self._segments[name]

    def names(self) -> list[str]:
        """All segments, most recently used first."""
        with self._lock:
            return list(reversed(self._segments))

    def oldest(self) -> StoredSegment | None:
        """The least recently used segment."""
        with self._lock:
            return next(iter(self._segments.values()), None)

    def find(self, salt: str, keys: Keys) -> list[StoredPart]:
        """The longest stored prefix of `keys`, as consecutive parts; marks them as used.

        A segment counts as used after those that continue it, so that it goes later.
        """
        parts: list[StoredPart] = []
        digest, at = PrefixDigest(salt), 0
        with self._lock:
            while at < len(keys):
                stored = self._by_parent.get(str(digest), {}).get(int(keys[at]))
                if stored is None:
                    break
                length = common_prefix(stored.keys, keys[at:])
                parts.append(StoredPart(stored, length))
                digest.add(keys[at : at + length])
                at += length
            for part in reversed(parts):
                self._segments.move_to_end(part.stored.name)
        return parts
