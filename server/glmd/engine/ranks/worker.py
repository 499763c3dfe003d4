"""A rank other than rank 0: a process that repeats what rank 0 does.

Rank 0 starts it (`ranks` as a number), or `glmd rank` on another machine. All array work happens on
the main thread. When the connection to rank 0 ends, so does the process.
"""

from __future__ import annotations

import argparse
import logging
import os
import queue
import socket
import sys
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import mlx.core as mx
import msgspec
import numpy as np

from glmd.checkpoint.config import load_config
from glmd.checkpoint.shard import digest_weights
from glmd.checkpoint.stored import read_weights
from glmd.engine import memory
from glmd.engine.attention_metadata import AttentionMetadata, AttentionMetadataBuilder
from glmd.engine.executor import DraftInputs
from glmd.engine.ranks import plan
from glmd.engine.ranks.executor import RankExecutor
from glmd.engine.ranks.group import VERSION, measure_link
from glmd.engine.ranks.hosts import free_address, join
from glmd.engine.ranks.link import Link, start_heartbeat, start_reader
from glmd.errors import GlmdError
from glmd.kv_cache.node import Node, PathNode
from glmd.kv_cache.prefix_tree import PrefixTree
from glmd.kv_cache.segment import Segment
from glmd.kv_cache.stored_keys import KVBits, StoredKeys, arrays_of
from glmd.kv_cache.tail_pool import TailPool
from glmd.model.batch import ForwardBatch, KVSpan, PrefillChunk, SegmentSlice
from glmd.model.loader import DtypeName, LoadedModel, load_model
from glmd.utils.logging import configure

log = logging.getLogger("glmd.engine")

RETRY_INTERVAL = 1.0
"""Seconds between attempts to connect to rank 0."""


class RankDisagreesError(GlmdError):
    """The ranks have computed different KV."""


class Replay:
    """Repeats the operations of plans.

    Attributes:
        segments: by number.
        tails, executor: as rank 0's, from `plan.Setup` on.
    """

    def __init__(self, model: LoadedModel, group: mx.distributed.Group) -> None:
        self.segments: dict[int, Segment] = {}
        self.tails: TailPool
        self.executor: RankExecutor
        self._model = model
        self._group = group
        self._builder: AttentionMetadataBuilder
        self._layouts: dict[bytes, AttentionMetadata] = {}
        """Of the latest step, by encoded `plan.Layout`."""
        self._batch: ForwardBatch
        self._hidden: mx.array
        self._caches: list[StoredKeys] = []
        self._operations: dict[type[plan.Operation], Callable[[Any], None]] = {
            plan.Setup: self._set_up,
            plan.WarmUp: self._warm_up,
            plan.ResizeTails: lambda op: self.tails.resize(op.slots, op.capacity),
            plan.ResetTails: lambda _: self.tails.reset(),
            plan.DeferTails: lambda op: self.tails.set_deferred(
                op.deferred, screening=op.screening
            ),
            plan.ShiftTail: lambda op: self.tails.shift(op.slot, op.start, op.count),
            plan.CopySlot: lambda op: self.tails.copy_slot(op.source, op.target),
            plan.CopyTail: self._copy_tail,
            plan.Seal: self._seal,
            plan.BeginTails: self._begin_tails,
            plan.Slice: self._slice,
            plan.Concat: self._concat,
            plan.Complete: self._complete,
            plan.Drop: self._drop,
            plan.Forward: self._forward,
            plan.ComputeKV: self._compute_kv,
            plan.Draft: self._draft,
            plan.CatchUp: self._catch_up,
        }

    def run(self, message: plan.Plan) -> None:
        """Repeat a plan's operations, and start what they compute.

        Raises:
            RankDisagreesError: this rank's KV is not rank 0's.
        """
        for operation in message.operations:
            self._operations[type(operation)](operation)
        if message.digest_step:
            own = self.executor.digest(message.digest_step)
            if own != message.digest:
                raise RankDisagreesError(
                    f"step {message.digest_step} has the digest {own}, on rank 0 {message.digest}"
                )

    def _set_up(self, setup: plan.Setup) -> None:
        model = self._model
        shape = replace(
            model.shape,
            score_bytes=setup.score_bytes,
            expanded_bytes=setup.expanded_bytes,
            kv_bits=cast(KVBits, setup.kv_bits),
        )
        model.use_shape(shape)
        self.tails = TailPool(
            model.kv_layers,
            shape.kv_width,
            model.dtype,
            setup.kv_bits,
            deferred_width=setup.deferred_width,
        )
        no_tree = PrefixTree[Segment]()  # Paths come with each layout.
        self._builder = AttentionMetadataBuilder(no_tree, self.tails, shape, model.dtype)
        self.executor = RankExecutor(model, self.tails, self._builder, self._group)

    def _warm_up(self, _: plan.WarmUp) -> None:
        self._model.warm_up()
        measure_link(self._group)

    # -- KV -----------------------------------------------------------------------------------

    def _copy_tail(self, copy: plan.CopyTail) -> None:
        self.segments[copy.segment] = self.tails.copy_out(copy.slot, copy.tokens)

    def _seal(self, seal: plan.Seal) -> None:
        self.segments[seal.segment] = self.executor.seal(self._caches, seal.start, seal.end)

    def _begin_tails(self, begin: plan.BeginTails) -> None:
        self.executor.begin_tails(self._caches, begin.rows, begin.slots)
        mx.async_eval(*self.tails.arrays())

    def _slice(self, cut: plan.Slice) -> None:
        self.segments[cut.segment] = self.segments[cut.source].slice(cut.start, cut.end)

    def _concat(self, concat: plan.Concat) -> None:
        first, *others = (self.segments[part].head(end) for part, end in concat.parts)
        self.segments[concat.segment] = first.concat(*others)

    def _complete(self, complete: plan.Complete) -> None:
        self.segments[complete.segment] = self.segments[complete.source].completed()

    def _drop(self, drop: plan.Drop) -> None:
        del self.segments[drop.segment]

    # -- steps --------------------------------------------------------------------------------

    def _forward(self, forward: plan.Forward) -> None:
        empty = mx.zeros(forward.rows, mx.int32)
        tokens, positions = self.executor.share_rows(empty, empty)
        known, self._layouts = self._layouts, {}
        groups, layouts, start = [], [], 0
        for each in forward.layouts:
            layout = self._layout(each, known)
            end = start + len(each.slots) * each.width
            own = positions[start:end].reshape(-1, each.width)
            groups.append(self._builder.decode_group(layout, start, own))
            layouts.append(layout)
            start = end
        chunks = [
            PrefillChunk(
                chunk.start, chunk.end, self._spans(chunk.spans), chunk.expanded, chunk.logits_rows
            )
            for chunk in forward.chunks
        ]
        self._batch = ForwardBatch(tokens, positions, groups, chunks, forward.deferred)
        self._hidden, self._caches = self.executor.forward(self._batch, layouts)
        mx.async_eval(*self.tails.arrays())

    def _compute_kv(self, _: plan.ComputeKV) -> None:
        successors = mx.zeros(self._batch.tokens.shape[0], mx.int32)
        kv = self.executor.compute_kv(successors, self._hidden, self._batch)
        self._caches = self.tails.in_order(self._caches, kv)
        mx.async_eval(*arrays_of(kv), *self.tails.arrays())

    def _draft(self, draft: plan.Draft) -> None:
        layout = self._layout(draft.layout, {})
        empty = mx.zeros(len(draft.layout.slots), mx.int32)
        inputs = DraftInputs(layout, empty, empty, empty, self._hidden, draft.count)
        self.executor.draft(inputs, lambda h, positions: empty)
        mx.async_eval(*self.tails.arrays())

    def _catch_up(self, behind: plan.CatchUp) -> None:
        successors = mx.array(np.frombuffer(behind.successors, np.int32))
        segment, spans = self.segments[behind.segment], self._spans(behind.spans)
        self.executor.catch_up(segment, successors, behind.position, spans)

    def _layout(
        self, described: plan.Layout, known: dict[bytes, AttentionMetadata]
    ) -> AttentionMetadata:
        """Build a layout, unless it is that of the step before."""
        key = msgspec.msgpack.encode((described, self.tails.slots, self.tails.capacity))
        layout = known.get(key)
        if layout is None:
            nodes: dict[int, Node[Segment]] = {}
            paths = []
            for path in described.paths:
                for number, _ in path:
                    if number not in nodes:
                        keys = np.empty(0, np.int64)
                        nodes[number] = Node(keys, self.segments[number], None, offset=0)
                paths.append([PathNode(nodes[number], length) for number, length in path])
            order = list(range(len(paths)))
            layout = self._builder.layout(
                order, paths, described.slots, described.tail_starts, described.width
            )
        self._layouts[key] = layout
        return layout

    def _spans(self, spans: list[plan.Span]) -> list[KVSpan]:
        return [
            KVSpan(
                tuple(SegmentSlice(self.segments[n], start, end) for n, start, end in span.slices),
                span.start,
                span.end,
            )
            for span in spans
        ]


# -- process --------------------------------------------------------------------------------------


def connect(lead: str, timeout: float) -> Link:
    """Connect to rank 0, as soon as it listens."""
    ip, _, port = lead.rpartition(":")
    waiting = False
    while True:
        try:
            return Link(socket.create_connection((ip, int(port)), timeout), timeout)
        except OSError as error:
            if not waiting:
                log.info("Waiting for rank 0: address=%s error=%s", lead, error)
                waiting = True
            time.sleep(RETRY_INTERVAL)


def work(link: Link, rank: int, folder: Path, ip: str | None, budget: int | None) -> None:
    """Take part in one group, until rank 0 sends `Stop`.

    Args:
        ip: address for the ring of collectives; None: that of the link.
        budget: bytes of memory that the rank may use; None: from the device.
    """
    inbox: queue.SimpleQueue[plan.FromLead] = queue.SimpleQueue()

    stopping = False

    def receive(data: bytes) -> None:
        nonlocal stopping
        message = plan.decode_from_lead(data)
        stopping = isinstance(message, plan.Stop)
        if not isinstance(message, plan.Heartbeat):
            inbox.put(message)

    def lost(why: str) -> None:
        if not stopping:
            log.warning("Rank 0 lost: rank=%d reason=%s", rank, why)
            os._exit(1)  # The main thread may wait in a collective for ever.

    address = free_address(ip or link.local_address)
    budget = budget or memory.default_budget()
    link.send(plan.Hello(rank, VERSION, memory.device_name(), budget, address))
    start_reader(link, receive, lost)
    start_heartbeat([link])
    start = inbox.get()
    assert isinstance(start, plan.Start)
    stored = read_weights(folder, load_config(folder))
    if digest_weights(stored) != start.weights:
        raise GlmdError(f"{folder} holds other weights than rank 0's. Copy the model from there.")
    memory.DeviceLimits.set(start.budget)
    link.send(plan.Ready())
    group = join(rank, start.hosts, start.rdma)
    dtype = cast(DtypeName, start.dtype)
    model = load_model(folder, dtype, lambda done, total: None, mtp=start.mtp, group=group)
    link.send(plan.Loaded())
    replay = Replay(model, group)
    while not isinstance(message := inbox.get(), plan.Stop):
        assert isinstance(message, plan.Plan)
        replay.run(message)
        link.send(plan.Acknowledge(message.number))


def exit_with_parent() -> None:
    """Wait for the end of stdin, which the parent process holds open, and exit."""
    while os.read(sys.stdin.fileno(), 4096):
        pass
    os._exit(0)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="glmd.engine.ranks", description=__doc__)
    parser.add_argument("--lead", required=True, help="ip:port at which rank 0 listens")
    parser.add_argument("--rank", required=True, type=int)
    parser.add_argument("--model", required=True, type=Path, help="checkpoint folder")
    parser.add_argument("--ip", help="address for the ring of collectives")
    parser.add_argument("--budget", type=int, help="bytes of memory that the rank may use")
    parser.add_argument("--timeout", required=True, type=float, help="seconds of silence")
    parser.add_argument("--log-level", default="INFO")
    parser.add_argument("--log-format", choices=("text", "json"), default="text")
    options = parser.parse_args(arguments)
    threading.Thread(target=exit_with_parent, daemon=True).start()
    configure(options.log_level, options.log_format)
    link = connect(options.lead, options.timeout)
    try:
        work(link, options.rank, options.model, options.ip, options.budget)
    except Exception as error:
        message = (
            error.message if isinstance(error, GlmdError) else f"{type(error).__name__}: {error}"
        )
        log.exception("Rank stopped by an error: rank=%d", options.rank)
        with suppress(OSError):
            link.send(plan.Failed(message))
        return 1
    return 0
