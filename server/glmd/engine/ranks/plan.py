"""Messages between the ranks: what rank 0 does, for the others to repeat.

Segments are named by numbers, which rank 0 gives. Token ids and positions that only the device
knows travel in collectives (`glmd.engine.ranks.executor`).
"""

from __future__ import annotations

import msgspec

Row = tuple[int, int]
"""Two numbers; each use says of what."""


class Message(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """Base of all messages."""


# -- start and end --------------------------------------------------------------------------------


class Hello(Message, frozen=True, tag="hello"):
    """A rank's introduction, its first message."""

    rank: int
    version: str
    """Of glmd and MLX."""
    device: str
    budget: int
    """Bytes of memory that the rank may use."""
    address: str
    """`ip:port` for the ring of collectives."""


class Start(Message, frozen=True, tag="start"):
    """Load the model and join the collectives."""

    hosts: list[str]
    """`Hello.address` of all ranks."""
    rdma: list[list[str | list[str] | None]] | None
    """Of JACCL, the device of each rank towards each; None: the ring over TCP."""
    dtype: str
    mtp: bool
    budget: int
    weights: str
    """`digest_weights` of the checkpoint."""


class Ready(Message, frozen=True, tag="ready"):
    """The rank can take part, and joins the collectives."""


class Loaded(Message, frozen=True, tag="loaded"):
    """The rank's part of the weights is in memory."""


class Failed(Message, frozen=True, tag="failed"):
    """The rank ends for this reason."""

    message: str


class Heartbeat(Message, frozen=True, tag="heartbeat"):
    """The sender lives."""


class Acknowledge(Message, frozen=True, tag="ack"):
    """A plan has been received and launched."""

    number: int


class Stop(Message, frozen=True, tag="stop"):
    """Exit."""


# -- operations -----------------------------------------------------------------------------------


class Setup(Message, frozen=True, tag="setup"):
    """Memory limits of attention, and the tail pool."""

    score_bytes: int
    expanded_bytes: int
    kv_bits: int
    deferred_width: int | None


class WarmUp(Message, frozen=True, tag="warm_up"):
    """`LoadedModel.warm_up`, and the measurement of the link."""


class ResizeTails(Message, frozen=True, tag="resize"):
    """`TailPool.resize`"""

    slots: int
    capacity: int


class ResetTails(Message, frozen=True, tag="reset"):
    """`TailPool.reset`"""


class DeferTails(Message, frozen=True, tag="defer"):
    """`TailPool.set_deferred`"""

    deferred: bool
    screening: bool


class ShiftTail(Message, frozen=True, tag="shift"):
    """`TailPool.shift`"""

    slot: int
    start: int
    count: int


class CopySlot(Message, frozen=True, tag="copy_slot"):
    """`TailPool.copy_slot`"""

    source: int
    target: int


class CopyTail(Message, frozen=True, tag="copy"):
    """`TailPool.copy_out` into a new segment."""

    segment: int
    slot: int
    tokens: int


class Seal(Message, frozen=True, tag="seal"):
    """`Executor.seal` of rows of the last step into a new segment."""

    segment: int
    start: int
    end: int


class BeginTails(Message, frozen=True, tag="begin"):
    """`Executor.begin_tails` with rows of the last step."""

    rows: list[int]
    slots: list[int]


class Slice(Message, frozen=True, tag="slice"):
    """`Segment.slice` into a new segment."""

    segment: int
    source: int
    start: int
    end: int


class Concat(Message, frozen=True, tag="concat"):
    """`Segment.concat` of the first tokens of each part into a new segment."""

    segment: int
    parts: list[Row]
    """(segment, tokens)"""


class Complete(Message, frozen=True, tag="complete"):
    """`Segment.completed` into a new segment."""

    segment: int
    source: int


class Drop(Message, frozen=True, tag="drop"):
    """Forget a segment."""

    segment: int


class Layout(Message, frozen=True, tag="layout"):
    """A decode group, as for `AttentionMetadataBuilder.layout`."""

    paths: list[list[Row]]
    """Of each sequence: (segment, tokens used)."""
    slots: list[int]
    tail_starts: list[int]
    width: int


class Span(Message, frozen=True, tag="span"):
    """A `KVSpan`."""

    slices: list[tuple[int, int, int]]
    """(segment, start, end)"""
    start: int
    end: int


class Chunk(Message, frozen=True, tag="chunk"):
    """A `PrefillChunk`."""

    start: int
    end: int
    spans: list[Span]
    expanded: bool
    logits_rows: int


class Forward(Message, frozen=True, tag="forward"):
    """`Executor.forward`"""

    rows: int
    layouts: list[Layout]
    chunks: list[Chunk]
    deferred: bool


class ComputeKV(Message, frozen=True, tag="compute_kv"):
    """`Executor.compute_kv` of the last step's rows."""


class Draft(Message, frozen=True, tag="draft"):
    """`Executor.draft` behind rows of the last step."""

    layout: Layout
    count: int


class CatchUp(Message, frozen=True, tag="catch_up"):
    """`Executor.catch_up`"""

    segment: int
    successors: bytes
    """int32"""
    position: int
    spans: list[Span]


Operation = (
    Setup | WarmUp | ResizeTails | ResetTails | DeferTails | ShiftTail | CopySlot | CopyTail
    | Seal | BeginTails | Slice | Concat | Complete | Drop | Forward | ComputeKV | Draft | CatchUp
)  # fmt: skip


class Plan(Message, frozen=True, tag="plan"):
    """Operations in order.

    `digest` is that of step `digest_step`, whose results rank 0 has read; 0: of none.
    """

    number: int
    operations: list[Operation]
    digest_step: int = 0
    digest: int = 0


FromLead = Start | Plan | Heartbeat | Stop
FromRank = Hello | Ready | Loaded | Failed | Heartbeat | Acknowledge

encode = msgspec.msgpack.Encoder().encode
decode_from_lead = msgspec.msgpack.Decoder(FromLead).decode
decode_from_rank = msgspec.msgpack.Decoder(FromRank).decode
