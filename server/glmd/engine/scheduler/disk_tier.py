"""Disk tier: restores prefixes from the disk cache, and saves sealed segments.

Runs on the engine's thread, which never waits for the disk: files are read and written by the
threads of `glmd.kv_cache.disk_cache`. A sequence whose prefix is being restored is not in prefill,
while all others go on.
"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Callable
from concurrent.futures import FIRST_COMPLETED, Future, wait
from dataclasses import dataclass, field
from importlib.metadata import version
from itertools import islice, pairwise
from pathlib import Path
from typing import Any

from glmd.checkpoint.config import load_config, read_json_object
from glmd.checkpoint.stored import read_weights
from glmd.checkpoint.weights import fingerprint
from glmd.engine.config import EngineConfig
from glmd.engine.sequence import Sequence
from glmd.kv_cache.disk_cache import FILE_TOKENS, DiskCache, HostArrays, SaveJob
from glmd.kv_cache.disk_file import FORMAT, device_array
from glmd.kv_cache.disk_index import StoredPart
from glmd.kv_cache.node import Node
from glmd.kv_cache.prefix_tree import PrefixTree
from glmd.kv_cache.segment import Segment
from glmd.model.loader import LoadedModel

log = logging.getLogger(__name__)

READ_AHEAD = 2
"""Segments of a sequence that are read, or wait to be inserted, at a time."""

SCAN_STEPS = 4
"""Steps between two scans of the unsaved nodes. A node that was there in the scan before has been
evaluated by now, so that reading its arrays waits for nothing."""

CLOSE_SECONDS = 10.0
"""Time to write what is left at the end: tens of gigabytes at the speed of a Mac's disk. The API
process waits a little longer (`glmd.engine_client.process.SAVE_TIMEOUT`)."""


@dataclass(frozen=True, slots=True, eq=False)
class _Read:
    """A file that is being read, or has been, for one or several sequences."""

    nbytes: int
    done: Future[HostArrays | None]


@dataclass(slots=True)
class _Restore:
    """The stored parts of a sequence's prefix that are not in the tree yet.

    Attributes:
        reads: the parts that are read ahead, by name.
        hit: a part has been inserted.
    """

    parts: deque[StoredPart]
    reads: dict[str, _Read] = field(default_factory=dict)
    hit: bool = False

    def next_arrays(self) -> HostArrays | None:
        """The first part's arrays if they have been read; without them no part is left."""
        read = self.reads.get(self.parts[0].stored.name) if self.parts else None
        if read is None or not read.done.done():
            return None
        arrays = read.done.result()
        if arrays is None:
            self.parts.clear()
        return arrays


@dataclass(frozen=True, slots=True)
class _Save:
    """A node's segment in the writer's hands."""

    node: Node[Segment]
    segment: Segment
    done: Future[bool]


class DiskTier:
    """The disk cache as the scheduler and the engine use it.

    Args:
        tree: with `track_unsaved`.

    Attributes:
        cache: the files.
        hits: sequences for which tokens were restored.
        restored_tokens: tokens that were restored rather than computed.
    """

    def __init__(self, tree: PrefixTree[Segment], cache: DiskCache, kv_bits: int = 16) -> None:
        self.cache = cache
        self._kv_bits = kv_bits
        self.hits = 0
        self.restored_tokens = 0
        self._tree = tree
        self._restores: dict[Sequence, _Restore] = {}
        self._saves: list[_Save] = []
        self._steps = 0
        self._seen: dict[Node[Segment], Segment] = {}
        """Unsaved nodes of the last scan, with their segments then."""

    @property
    def held_bytes(self) -> int:
        """Bytes of KV outside the tree: read, or evicted before they were written."""
        held = {
            id(save.segment): save.segment.nbytes
            for save in self._saves
            if save.node.kv is not save.segment and not save.done.done()
        }
        return sum(read.nbytes for read in self._reads()) + sum(held.values())

    # -- restoring ------------------------------------------------------------------------------

    def begin(self, sequence: Sequence) -> int:
        """Restore what is stored of a sequence's prefix beyond the tree; returns its tokens."""
        keys = sequence.cache_keys(0, sequence.length - 1)
        parts = self.cache.find(sequence.request.cache_salt, keys)
        parts = [part for part in parts if part.end > sequence.num_computed_tokens]
        if not parts:
            return 0
        self._restores[sequence] = _Restore(deque(parts))
        return parts[-1].end - sequence.num_computed_tokens

    def is_restoring(self, sequence: Sequence) -> bool:
        return sequence in self._restores

    def cancel(self, sequence: Sequence) -> None:
        """Stop restoring; what was restored stays in the tree."""
        restore = self._restores.pop(sequence, None)
        if restore is not None:
            for read in restore.reads.values():
                self._cancel_unused(read)

    def advance(
        self,
        extend_match: Callable[[Sequence], None],
        make_room: Callable[[int], bool],
        *,
        streams: bool,
    ) -> None:
        """Insert what has been read, and read on.

        Args:
            extend_match: moves a sequence past tokens that are in the tree by now.
            make_room: evicts until so many bytes are free; returns whether they are.
            streams: sequences are decoding, so that at most one file's KV is copied.
        """
        copies = 1 if streams else len(self._restores) * READ_AHEAD
        for sequence, restore in self._restores.items():
            extend_match(sequence)
            self._drop_passed(sequence, restore)
            while copies and (arrays := restore.next_arrays()) is not None:
                copies -= 1
                self._insert(sequence, restore.parts[0], arrays)
                self._drop_passed(sequence, restore)
        for sequence, restore in list(self._restores.items()):
            # A later sequence may have inserted what this one waits for, or holds as read, too.
            extend_match(sequence)
            self._drop_passed(sequence, restore)
            if restore.parts:
                self._read_ahead(restore, make_room)
            if not restore.parts:
                del self._restores[sequence]

    def _drop_passed(self, sequence: Sequence, restore: _Restore) -> None:
        """Drop the parts that are in the tree by now."""
        while restore.parts and restore.parts[0].end <= sequence.num_computed_tokens:
            read = restore.reads.pop(restore.parts.popleft().stored.name, None)
            if read is not None:
                self._cancel_unused(read)

    def _read_ahead(self, restore: _Restore, make_room: Callable[[int], bool]) -> None:
        """Begin to read the next parts, or wait for those that another sequence reads."""
        reads = {
            name: read for each in self._restores.values() for name, read in each.reads.items()
        }
        for part in list(islice(restore.parts, READ_AHEAD)):
            name = part.stored.name
            if name in restore.reads:
                continue
            if name in reads:
                restore.reads[name] = reads[name]
            elif make_room(part.stored.nbytes):
                restore.reads[name] = _Read(part.stored.nbytes, self.cache.read(part.stored))
            elif not restore.reads:
                restore.parts.clear()  # Computed when there is room.

    def _reads(self) -> set[_Read]:
        return {read for restore in self._restores.values() for read in restore.reads.values()}

    def _cancel_unused(self, read: _Read) -> None:
        if read not in self._reads():
            read.done.cancel()

    def _insert(self, sequence: Sequence, part: StoredPart, arrays: HostArrays) -> None:
        """Seal the tokens of a part that follow the sequence's."""
        start, end = sequence.num_computed_tokens, part.end
        before = part.stored.start
        kv = Segment.from_arrays(
            {
                name: device_array(rows[start - before : end - before], dtype)
                for name, (dtype, rows) in arrays.items()
            },
            self._kv_bits,
        )
        assert sequence.lease is not None
        self._tree.insert(sequence.lease, sequence.cache_keys(start, end), kv)
        sequence.num_cached_tokens = sequence.num_computed_tokens = end
        self.hits += not self._restores[sequence].hit
        self._restores[sequence].hit = True
        self.restored_tokens += end - start

    def wait(self, seconds: float) -> None:
        """Wait for a read or for memory that a write holds, at most `seconds`."""
        waited: list[Future[Any]] = [read.done for read in self._reads()]
        waited += [save.done for save in self._saves]
        if waited:
            wait(waited, seconds, FIRST_COMPLETED)

    # -- saving ---------------------------------------------------------------------------------

    def save(self, *, idle: bool) -> None:
        """Hand sealed segments to the writer; to be called after each step.

        While sequences run, segments that they hold are saved once they have `FILE_TOKENS`: until
        then they are likely to be merged.

        Args:
            idle: no sequence runs. Everything is saved.
        """
        self._collect()
        self._steps += 1
        if not self._tree.unsaved or (not idle and self._steps % SCAN_STEPS):
            return
        seen, self._seen = self._seen, {}
        for node in list(self._tree.unsaved):
            assert node.kv is not None
            if not idle:
                self._seen[node] = node.kv
                if seen.get(node) is not node.kv or (node.leased and len(node) < FILE_TOKENS):
                    continue
            self._save_path(node)

    def _collect(self) -> None:
        """Take saved nodes out of `unsaved`; put in all of a path that a missing file has cut."""
        done = [save for save in self._saves if save.done.done()]
        if not done:
            return
        self._saves = [save for save in self._saves if not save.done.done()]
        for save in done:
            node: Node[Segment] | None = save.node
            if save.done.cancelled() or save.node.kv is not save.segment:
                continue
            if save.done.result():
                self._tree.unsaved.pop(save.node, None)
                continue
            while node is not None and node.parent is not None:
                self._tree.unsaved[node] = None
                node = node.parent

    def _save_path(self, node: Node[Segment]) -> None:
        """Hand the unsaved nodes of a path to the writer, the first ones first."""
        path = [node]
        while (parent := path[-1].parent) is not None:
            path.append(parent)
        path.reverse()
        pieces = [part.keys[: after.offset] for part, after in pairwise(path[1:])]
        saving = {id(save.segment) for save in self._saves}
        for depth, part in enumerate(path[1:]):
            if part not in self._tree.unsaved or id(part.kv) in saving:
                continue
            assert part.kv is not None
            job = SaveJob(path[0].salt, [*pieces[:depth], part.keys], part.start, part.kv.arrays())
            self._saves.append(_Save(part, part.kv, self.cache.save(job)))

    def drop_held(self) -> None:
        """Give up saving evicted segments that the writer has not begun with."""
        for save in self._saves:
            if save.node.kv is not save.segment:
                save.done.cancel()

    def stats(self) -> dict[str, int]:
        """Fields of `EngineStats`."""
        cache = self.cache
        return {
            "disk_bytes": cache.index.nbytes,
            "disk_budget_bytes": cache.capacity,
            "disk_segments": len(cache.index),
            "disk_hits": self.hits,
            "disk_restored_tokens": self.restored_tokens,
            "disk_read_bytes": cache.read_bytes,
            "disk_written_bytes": cache.written_total,
        }

    def close(self) -> None:
        """Save everything that is in the tree, and close the cache."""
        for sequence in list(self._restores):
            self.cancel(sequence)
        for node in self._tree.nodes():
            self._tree.unsaved[node] = None
        self.save(idle=True)
        self.cache.close(CLOSE_SECONDS)


def open_disk_cache(config: EngineConfig, model: LoadedModel) -> DiskCache | None:
    """Open the folder that the configuration names.

    Returns:
        None: there is no disk cache, or the folder cannot be used, which is logged.
    """
    if not config.disk_cache or not config.prefix_cache:
        return None
    assert config.disk_cache_folder is not None
    folder = Path(config.disk_cache_folder)
    try:
        cache = DiskCache(folder, config.disk_cache, identity(model))
    except BlockingIOError:
        log.warning("Disk cache off, another server uses its folder: folder=%s", folder)
        return None
    except OSError as error:
        log.warning("Disk cache off: folder=%s error=%s", folder, error.strerror or error)
        return None
    log.info(
        "Disk cache: folder=%s gib=%.2f limit_gib=%.2f segments=%d",
        folder,
        cache.index.nbytes / 2**30,
        cache.capacity / 2**30,
        len(cache.index),
    )
    return cache


def identity(model: LoadedModel) -> dict[str, str]:
    """Properties besides tokens that KV depends on; a file must match exactly."""
    stored = read_weights(model.folder, load_config(model.folder))
    tensors = [*stored.main.values(), *stored.mtp.values()]
    table = read_json_object(model.folder / "config.json").get("glmd")
    recipe = table.get("recipe") if isinstance(table, dict) else None
    return {
        "format": FORMAT,
        "model": fingerprint(model.folder, tensors),
        "recipe": str(recipe),
        "dtype": str(model.dtype).removeprefix("mlx.core."),
        "kv_bits": str(model.shape.kv_bits),
        "layers": str(model.kv_layers),
        "keys": "pairs" if model.mtp is not None else "ids",
        "mlx": version("mlx"),
    }
