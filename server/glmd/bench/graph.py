"""Number of kernels that a decoder layer launches, counted in its graph.

On a GPU a small step takes as long as its chain of kernels, so their number decides. It is the same
on every device, since a graph is built before it is computed: `mx.export_to_dot` lists its nodes.
Views are free, and a concatenation is one copy per input. Norms and rotations, which MLX builds
from many operations on a CPU, count as the one kernel that they are on a GPU.

The rows come from the engine's own scheduler, tree and layout, driven by `glmd.bench.simulation`.
"""

from __future__ import annotations

import io
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import mlx.core as mx
import numpy as np
from mlx.nn.layers.quantized import quantize
from mlx_lm.models.base import create_attention_mask
from mlx_lm.models.cache import BatchKVCache, KVCache
from rich.table import Table

from glmd.bench.device_model import DEVICES
from glmd.bench.report import make_table
from glmd.bench.simulation import Simulation, Stream
from glmd.engine.attention_metadata import AttentionMetadataBuilder
from glmd.kv_cache.segment import Segment
from glmd.kv_cache.stored_keys import arrays_of
from glmd.kv_cache.tail_pool import TailPool
from glmd.model import experts_kernel, mla_kernel
from glmd.model.batch import (
    DecodeGroup,
    ForwardBatch,
    KernelLaunch,
    KVSpan,
    SpanLevel,
)
from glmd.model.experts_kernel import ROWS
from glmd.model.glm4_moe_lite import DecoderBlock
from glmd.model.mla import MLAShape
from glmd.model.mlx_lm_layers import Glm4MoeLiteDecoderLayer, ModelArgs

VIEWS = frozenset(
    {
        "AsStrided",
        "Broadcast",
        "BroadcastAxes",
        "ExpandDims",
        "Flatten",
        "Reshape",
        "Slice",
        "Split",
        "Squeeze",
        "StopGradient",
        "Transpose",
        "Unflatten",
        "View",
    }
)
"""Operations that compute nothing."""

DTYPE = mx.bfloat16
HIDDEN = 64
FORKED_TURNS = (1, 10, 50)
FORKED_TOKENS, TURN_INPUT, TURN_OUTPUT = 3, 400, 300
"""Tokens at the end of an answer that the next prompt replaces, and lengths of a turn."""

_NODE = re.compile(r'^\{ (\d+) \[label ="(\w+)"', re.MULTILINE)
_INPUT = re.compile(r'^"\w+" -> (\d+)$', re.MULTILINE)


def count_kernels(*outputs: mx.array) -> int:
    """Kernels that the evaluation of arrays launches."""
    text = io.StringIO()
    mx.export_to_dot(text, *outputs)
    dot = text.getvalue()
    inputs: dict[str, int] = {}
    for node in _INPUT.findall(dot):
        inputs[node] = inputs.get(node, 0) + 1
    return sum(
        inputs[node] if name == "Concatenate" else name not in VIEWS
        for node, name in _NODE.findall(dot)
    )


@contextmanager
def gpu_kernels() -> Iterator[None]:
    """Build norms, rotations and glmd's kernels as one operation each, as on a GPU.

    The operations that stand for them compute something else: graphs are to be counted only.
    """
    fast: Any = mx.fast
    norm, rope, metal_kernel = fast.rms_norm, fast.rope, fast.metal_kernel

    def one_kernel(x: mx.array, *args: Any, **kwargs: Any) -> mx.array:
        return mx.cumsum(x, axis=-1)

    def make_kernel(**_: Any) -> Callable[..., list[mx.array]]:
        def launch(
            *, inputs: list[mx.array], output_shapes: Any, output_dtypes: Any, **_: Any
        ) -> list[mx.array]:
            zeros = [mx.array(0, dtype) for dtype in output_dtypes]
            mx.eval(zeros)
            views = map(mx.broadcast_to, zeros, output_shapes)
            outputs: list[mx.array] = mx.depends(list(views), inputs)
            return outputs

        return launch

    fast.rms_norm = fast.rope = one_kernel
    fast.metal_kernel = make_kernel
    mla_kernel.forget()
    experts_kernel.forget()
    try:
        yield
    finally:
        fast.rms_norm, fast.rope, fast.metal_kernel = norm, rope, metal_kernel
        mla_kernel.forget()
        experts_kernel.forget()


@dataclass(frozen=True, slots=True)
class GraphRow:
    """Kernels per layer of one step.

    Attributes:
        drafts: tokens verified per sequence.
        kernels: with MLX's operations only.
        with_mla_kernel: with `glmd.model.mla_kernel`.
        with_both: and with `glmd.model.experts_kernel`.
        mlx_lm: of mlx-lm with as many sequences, each with its own copy of all keys; None: mlx-lm
            has no such step.
    """

    workload: str
    drafts: int
    kernels: int
    with_mla_kernel: int
    with_both: int
    mlx_lm: int | None


class LayerCounter:
    """A decoder layer with experts, for counting: true heads and cache vectors, few hidden units.

    To be used within `gpu_kernels`.
    """

    def __init__(self) -> None:
        self._args = ModelArgs(
            hidden_size=HIDDEN, intermediate_size=64, moe_intermediate_size=64, q_lora_rank=64
        )
        self._mlx_lm = self._layer()
        self._mlx_lm.set_dtype(DTYPE)
        layer = self._layer()
        router = layer.mlp.gate.parameters()
        layer.set_dtype(DTYPE)
        layer.mlp.gate.update(router)  # As the loader does: in float32.
        mx.eval(self._mlx_lm.parameters(), layer.parameters())
        self._block = DecoderBlock(layer, Simulation(DEVICES[1]).shape)

    def _layer(self) -> Any:
        layer = Glm4MoeLiteDecoderLayer(self._args, 1)
        quantize(layer, group_size=64, bits=8, class_predicate=_quantised)
        return layer

    def glmd(
        self, simulation: Simulation, width: int, *, mla_kernel: bool, experts_kernel: bool = False
    ) -> int:
        """Kernels of a step of all running sequences, with `width` rows each."""
        assert self._block.fused_experts is not None
        rows = range(1, ROWS[-1] + 1) if experts_kernel else ()
        self._block.fused_rows = frozenset(rows)
        batch = decode_batch(simulation, width, mla_kernel=mla_kernel)
        tails = TailPool(1, simulation.shape.kv_width, DTYPE)
        for _ in range(simulation.scheduler.tails.slots):
            tails.allocate()
        tails.reserve(simulation.scheduler.tails.capacity)
        h = mx.zeros((len(batch.tokens), HIDDEN), DTYPE)
        mx.eval(h, batch.positions)
        out, kv = self._block.forward(
            replace(simulation.shape, kernel=mla_kernel), 0, h, batch, tails
        )
        return count_kernels(out, *arrays_of(kv), *tails.arrays())

    def mlx_lm(self, sequences: int, context: int) -> int:
        """Kernels of mlx-lm's layer for one more token of each sequence."""
        cache: Any = KVCache() if sequences == 1 else BatchKVCache([0] * sequences)
        cache.update_and_fetch(
            mx.zeros((sequences, 1, context, self._args.kv_lora_rank), DTYPE),
            mx.zeros((sequences, 1, context, self._args.qk_rope_head_dim), DTYPE),
        )
        x = mx.zeros((sequences, 1, HIDDEN), DTYPE)
        mask = create_attention_mask(x, cache, return_array=True)
        mx.eval([x, cache.state, cache.offset, *([] if mask is None else [mask])])
        return count_kernels(self._mlx_lm(x, mask, cache), *cache.state[:2])


def _quantised(path: str, module: Any) -> bool:
    return hasattr(module, "to_quantized") and "gate.weight" not in path


def decode_batch(simulation: Simulation, width: int, *, mla_kernel: bool) -> ForwardBatch:
    """A step of all running sequences, with `width` rows each, as the engine lays it out."""
    shape = replace(simulation.shape, kernel=mla_kernel)
    running, scheduler = simulation.scheduler.running, simulation.scheduler
    builder = AttentionMetadataBuilder(scheduler.tree, scheduler.tails, shape, DTYPE)
    metadata = builder.build(running, width)
    ends = [[running[i].num_computed_tokens] for i in metadata.order]
    positions = mx.array(ends, mx.int32) + mx.arange(width)
    group = _with_full_width(builder.decode_group(metadata, 0, positions), shape)
    mx.eval(group.tail_mask, group.tail_positions)
    tokens = mx.zeros(len(running) * width, mx.int32)
    return ForwardBatch(tokens, positions.flatten(), [group], [])


def _with_full_width(group: DecodeGroup, shape: MLAShape) -> DecodeGroup:
    """The group with keys as wide as the model's, as views of a single value."""

    def span(narrow: KVSpan) -> KVSpan:
        return replace(
            narrow,
            slices=tuple(
                replace(part, segment=Segment([mx.broadcast_to(zero, (len(part.segment), width))]))
                for part in narrow.slices
            ),
        )

    def level(narrow: SpanLevel) -> SpanLevel:
        parts = [
            span(part)
            if isinstance(part, KVSpan)
            else replace(
                part,
                spans=[span(each) for each in part.spans],
                padding=[mx.broadcast_to(zero, (each.shape[0], width)) for each in part.padding],
            )
            for part in narrow.parts
        ]
        return replace(narrow, parts=parts)

    def launch(narrow: KernelLaunch) -> KernelLaunch:
        segments = [
            Segment([mx.broadcast_to(zero, (len(segment), width))]) for segment in narrow.segments
        ]
        return replace(narrow, segments=tuple(segments))

    plan = group.plan
    zero, width = mx.zeros((1, 1), DTYPE), shape.kv_width
    mx.eval(zero)
    return replace(
        group,
        fused_levels=[level(each) for each in group.fused_levels],
        levels=[level(each) for each in group.levels],
        plan=plan and replace(plan, launches=tuple(map(launch, plan.launches))),
    )


# -- workloads ------------------------------------------------------------------------------


def start_streams(count: int, *, shared: int, own: int, output: int) -> Simulation:
    """Sequences with a common beginning, after `output` tokens of each."""
    simulation = Simulation(DEVICES[1])
    rng = np.random.default_rng(1)

    def tokens(length: int) -> Any:
        return rng.integers(1, 1000, length).astype(np.int32)

    head = tokens(shared)
    streams = [
        simulation.submit(np.concatenate([head, tokens(own + 40 * i)]), 1 << 12)
        for i in range(count)
    ]
    simulation.run(lambda: all(len(stream.times) >= output for stream in streams))
    return simulation


def forked_turns(turns: int, on_step: Callable[[Simulation], None]) -> None:
    """Run a conversation whose every prompt differs from the stored one near its end.

    Args:
        on_step: called after the steps of the last turn that change what its row reads.
    """
    simulation = Simulation(DEVICES[1])
    rng = np.random.default_rng(1)
    history = np.zeros(0, np.int32)
    done: list[Any] = []
    for turn in range(turns):
        kept = history[: max(0, len(history) - FORKED_TOKENS)]
        added = rng.integers(1, 1000, TURN_INPUT).astype(np.int32)
        stream = simulation.submit(
            np.concatenate([kept, added]), TURN_OUTPUT, on_finish=done.append
        )
        observe = partial(_observe, simulation, stream, set(), on_step)
        simulation.run(observe if turn == turns - 1 else lambda: False)
        history = done[-1]


def _observe(
    simulation: Simulation,
    stream: Stream,
    seen: set[tuple[int, int]],
    on_step: Callable[[Simulation], None],
) -> bool:
    """Call `on_step` if the tree has changed since the last call, or this is the first token."""
    scheduler = simulation.scheduler
    state = scheduler.tree.version, scheduler.tree.tokens
    if stream.times and scheduler.running and not scheduler.running[0].at_length_limit:
        if state not in seen:
            on_step(simulation)
        seen.add(state)
    return False


def count_layers(on_progress: Callable[[str], None], *, only: str = "") -> list[GraphRow]:
    """Count the kernels of every workload of docs/benchmarks.md.

    Args:
        only: only workloads whose name contains this text.
    """
    rows: list[GraphRow] = []
    widths = (1, 2)
    with gpu_kernels():
        counter = LayerCounter()
        for count in (1, 8, 32):
            mlx_lm = counter.mlx_lm(count, 1000)
            names = {"own contexts": (0, 1000), "shared prefix": (2000, 100)}
            for kind, (shared, own) in names.items():
                name = f"batch {count}, {kind}"
                if only not in name or (count == 1 and shared):
                    continue
                on_progress(name)
                simulation = start_streams(count, shared=shared, own=own, output=150)
                for width in widths:
                    rows.append(
                        GraphRow(
                            name,
                            width - 1,
                            kernels=counter.glmd(simulation, width, mla_kernel=False),
                            with_mla_kernel=counter.glmd(simulation, width, mla_kernel=True),
                            with_both=counter.glmd(
                                simulation, width, mla_kernel=True, experts_kernel=True
                            ),
                            mlx_lm=mlx_lm if width == 1 else None,
                        )
                    )
        single = counter.mlx_lm(1, 1000)
        for turns in FORKED_TURNS:
            name = f"batch 1, {turns} forked turn{'s' if turns > 1 else ''}"
            if only not in name:
                continue
            on_progress(name)
            counts: dict[tuple[int, int], list[int]] = {
                (width, used): [] for width in widths for used in range(3)
            }

            def count_widths(
                simulation: Simulation, counts: dict[tuple[int, int], list[int]] = counts
            ) -> None:
                for (width, used), found in counts.items():
                    count = counter.glmd(
                        simulation, width, mla_kernel=used > 0, experts_kernel=used > 1
                    )
                    found.append(count)

            forked_turns(turns, count_widths)
            for width in widths:
                rows.append(
                    GraphRow(
                        name,
                        width - 1,
                        kernels=max(counts[width, 0]),
                        with_mla_kernel=max(counts[width, 1]),
                        with_both=max(counts[width, 2]),
                        mlx_lm=single if width == 1 else None,
                    )
                )
    return rows


def kernels_table(rows: list[GraphRow]) -> Table:
    """One line per workload."""
    table = make_table(
        "Kernels per layer and step",
        ("workload",),
        ("glmd", "one draft", "MLA kernel", "one draft", "and experts", "one draft", "mlx-lm"),
    )
    plain = [row for row in rows if not row.drafts]
    drafting = {row.workload: row for row in rows if row.drafts}
    for row in plain:
        drafted = drafting[row.workload]
        pairs = [(each.kernels, each.with_mla_kernel, each.with_both) for each in (row, drafted)]
        counts = [count for pair in zip(*pairs, strict=True) for count in pair]
        table.add_row(row.workload, *map(str, counts), str(row.mlx_lm))
    return table
