"""Decode attention of MLA in Metal kernels.

One kernel prepares the rows: it normalises the latents and rotates keys and queries. All pieces of
a group's keys, in segments and tails, are divided into items: some keys of one piece, for the heads
of a few rows. A threadgroup takes an item. Each of its simdgroups owns 64 columns of the latents
and an equal part of the rotated columns, and reads its part of a key once: for the scores, whose
parts are summed over the simdgroups, and for the values. The softmax is online, in float32. The
last kernel combines the items of each row (as flash-decoding does).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

import mlx.core as mx
import numpy as np
from mlx.nn.layers.positional_encoding import RoPE

from glmd.kv_cache.segment import Segment
from glmd.kv_cache.stored_keys import KVBits, arrays_of
from glmd.kv_cache.tail_pool import TailPool
from glmd.model import mla_metal
from glmd.model.batch import DecodeGroup, KernelLaunch, KernelPlan, KVSpan
from glmd.model.mla import MLAShape

BUFFERS: dict[KVBits, tuple[int, int]] = {16: (4, 24), 8: (2, 7), 4: (2, 7)}
"""Numbers of segments that a kernel is compiled for. Metal binds at most 31 buffers; a quantised
segment has three."""

LAUNCHES = (1, 4, 13)
"""Numbers of launches of a layer that the last kernel is compiled for."""

COLUMNS = 64
"""Columns of the latents that a simdgroup owns."""

KEYS_PER_PASS = 16

GROUPS = 96
"""Items at which long contexts aim: two threadgroups for each core of a large GPU. Their results
take 4 MiB (20 heads of 512 values), at any length."""

MIN_ITEM_KEYS = 64
"""An item's result is written and read in float32, and costs as much as 70 keys in bfloat16."""

ITEM_FIELDS = 8
TAIL = -1

THREADGROUP_BYTES = 32 << 10
REDUCE_THREADS = 128
PROJECT_THREADS = 256


def is_available() -> bool:
    """Whether the device runs Metal kernels."""
    return mx.metal.is_available() and mx.default_device().type == mx.DeviceType.gpu


def supports(shape: MLAShape) -> bool:
    """Whether the kernels can be compiled for these dimensions."""
    parts, rest = divmod(shape.latent, COLUMNS)
    if rest or not 1 <= parts <= 8 or shape.rope % (8 * parts):
        return False
    rows = 8 * _row_tiles(shape, 2)
    return 4 * rows * (parts * KEYS_PER_PASS + KEYS_PER_PASS + 1) <= THREADGROUP_BYTES


def plan_items(
    shape: MLAShape, spans: Sequence[KVSpan], slots: Sequence[int], width: int
) -> KernelPlan | None:
    """Divide the keys of a decode group into items.

    Args:
        spans: of all levels. Each row sees each of its keys outside of tails in exactly one.
        slots: of each sequence's tail.
        width: rows of each sequence.

    Returns:
        None: there are more segments than the kernels take.
    """
    item_rows = _item_rows(shape, spans, width)
    blocks = sum(len(span) * -(-(span.end - span.start) // item_rows) for span in spans)
    step = max(MIN_ITEM_KEYS, blocks // GROUPS)
    step = -(-step // KEYS_PER_PASS) * KEYS_PER_PASS
    most = BUFFERS[shape.kv_bits][-1]
    segments: dict[int, tuple[int, Segment]] = {}
    items: list[list[list[int]]] = [[]]
    for sequence, slot in enumerate(slots):
        start, end = sequence * width, (sequence + 1) * width
        for row in range(start, end, item_rows):
            items[0].append([TAIL, 0, 0, row, min(item_rows, end - row), slot])
    for span in spans:
        for piece in span.slices:
            index, _ = segments.setdefault(id(piece.segment), (len(segments), piece.segment))
            launch, buffer = divmod(index, most)
            if launch == len(items):
                items.append([])
            for row in range(span.start, span.end, item_rows):
                rows = min(item_rows, span.end - row)
                for key in range(piece.start, piece.end, step):
                    items[launch].append([buffer, key, min(piece.end, key + step), row, rows, 0])
    if len(items) > LAUNCHES[-1]:
        return None
    entries: list[list[tuple[int, int]]] = [[] for _ in range(len(slots) * width)]
    stride = 8 * _row_tiles(shape, item_rows)
    for launch, own in enumerate(items):
        for index, (_, _, _, row, rows, _) in enumerate(own):
            for i in range(rows):
                entries[row + i].append((launch, index * stride + i * shape.heads))
    held = [segment for _, segment in segments.values()]
    return KernelPlan(
        launches=tuple(
            KernelLaunch(
                mx.array(np.pad(np.array(own, np.int32), ((0, 0), (0, ITEM_FIELDS - 6)))),
                tuple(held[i * most : (i + 1) * most]),
            )
            for i, own in enumerate(items)
        ),
        item_rows=item_rows,
        offsets=mx.array(np.cumsum([0, *map(len, entries)]).astype(np.int32)),
        entries=mx.array(np.array([entry for row in entries for entry in row], np.int32)),
    )


def _item_rows(shape: MLAShape, spans: Sequence[KVSpan], width: int) -> int:
    """Rows of an item, 1 or 2, by the heads that are computed with padding."""
    shared = [(len(span), span.end - span.start) for span in spans] or [(1, width)]
    costs = {
        rows: sum(keys * -(-count // rows) for keys, count in shared) * _row_tiles(shape, rows)
        for rows in (1, 2)
    }
    return min(costs, key=lambda rows: (costs[rows], -rows))


def _row_tiles(shape: MLAShape, item_rows: int) -> int:
    return -(-item_rows * shape.heads // 8)


def rotates(rope: Any, shape: MLAShape) -> bool:
    """Whether `prepare_rows` rotates as this module does."""
    plain = isinstance(rope, RoPE) and rope.scale == 1
    return plain and rope.dims == shape.rope and shape.rope % 2 == 0


def prepare_rows(
    shape: MLAShape,
    rope: RoPE,
    q: mx.array,
    compressed: mx.array,
    weight: mx.array,
    eps: float,
    positions: mx.array,
) -> tuple[mx.array, mx.array]:
    """Normalise the latents of N rows, and rotate their keys and queries, in one kernel.

    Args:
        q: [N, heads, nope + rope], scaled.
        compressed: [N, kv_width], the latents and keys.
        weight: of the latents' norm.
        positions: [N] int32.

    Returns:
        rotated part of the queries, [N, heads, rope]; cache vectors [N, kv_width].
    """
    rows = q.shape[0]
    kernel = _project_kernel(
        shape.heads,
        shape.latent,
        shape.rope,
        shape.nope + shape.rope,
        q.dtype,
        eps,
        rope.base,
        rope.traditional,
    )
    out: list[mx.array] = kernel(
        inputs=[q, compressed, weight, positions],
        grid=(rows * PROJECT_THREADS, 1, 1),
        threadgroup=(PROJECT_THREADS, 1, 1),
        output_shapes=[(rows, shape.heads, shape.rope), (rows, shape.kv_width)],
        output_dtypes=[q.dtype, q.dtype],
    )
    return out[0], out[1]


def attend_items(
    shape: MLAShape,
    layer: int,
    q: mx.array,
    q_rope: mx.array,
    group: DecodeGroup,
    plan: KernelPlan,
    tails: TailPool,
) -> mx.array:
    """Attend to all keys of a decode group: [heads, rows, latent].

    Args:
        q: [heads, rows, latent], absorbed.
        q_rope: [rows, heads, rope], rotated.
    """
    parts, tiles = shape.latent // COLUMNS, _row_tiles(shape, plan.item_rows)
    pool = arrays_of(tails.view(layer))
    results: list[list[mx.array]] = []
    for launch in plan.launches:
        keys = [arrays_of(segment.layers[layer]) for segment in launch.segments]
        buffers = next(count for count in BUFFERS[shape.kv_bits] if count >= len(keys))
        keys += [pool] * (buffers - len(keys))
        count = launch.items.shape[0]
        kernel = _split_kernel(
            shape.heads, shape.latent, shape.rope, q.dtype, shape.kv_bits, tiles, buffers
        )
        results.append(
            kernel(
                inputs=[
                    q,
                    q_rope,
                    launch.items,
                    group.tail_positions,
                    *(array for arrays in [pool, *keys] for array in arrays),
                ],
                grid=(count * parts * 32, 1, 1),
                threadgroup=(parts * 32, 1, 1),
                output_shapes=[(count, 8 * tiles, shape.latent), (count, 8 * tiles)],
                output_dtypes=[mx.float32, mx.float32],
            )
        )
    launches = next(count for count in LAUNCHES if count >= len(results))
    results += results[:1] * (launches - len(results))
    threads = min(REDUCE_THREADS, shape.latent)
    rows = q_rope.shape[0]
    out: list[mx.array] = _reduce_kernel(shape.heads, shape.latent, q.dtype, launches)(
        inputs=[plan.offsets, plan.entries, *(array for pair in results for array in pair)],
        grid=(rows * shape.heads * threads, 1, 1),
        threadgroup=(threads, 1, 1),
        output_shapes=[(shape.heads, rows, shape.latent)],
        output_dtypes=[q.dtype],
    )
    return out[0]


@cache
def _project_kernel(
    heads: int,
    latent: int,
    rope: int,
    query: int,
    dtype: mx.Dtype,
    eps: float,
    base: float,
    paired: bool,
) -> Callable[..., list[mx.array]]:
    constants: dict[str, str | int] = {
        "HEADS": heads,
        "LATENT": latent,
        "ROPE": rope,
        "WIDTH": latent + rope,
        "QUERY": query,
        "THREADS": PROJECT_THREADS,
        "EPS": f"{eps:e}f",
        "LOG2_BASE": f"{math.log2(base):.9e}f",
        "PAIRED": int(paired),
    }
    return make_kernel(
        f"mla_project_{heads}_{latent}_{rope}_{query}",
        ["q", "compressed", "weight", "positions"],
        ["q_rope", "kv"],
        mla_metal.PROJECT,
        mla_metal.header(dtype, constants),
    )


@cache
def _split_kernel(
    heads: int, latent: int, rope: int, dtype: mx.Dtype, bits: KVBits, tiles: int, buffers: int
) -> Callable[..., list[mx.array]]:
    parts = latent // COLUMNS
    constants: dict[str, str | int] = {
        "HEADS": heads,
        "LATENT": latent,
        "ROPE": rope,
        "WIDTH": latent + rope,
        "PARTS": parts,
        "FRAGMENTS": 8 + rope // 8 // parts,
        "ROW_TILES": tiles,
        "OWN_ROWS": -(-8 * tiles // parts),
        "PASS": KEYS_PER_PASS,
        "FIELDS": ITEM_FIELDS,
        **mla_metal.quantized(latent + rope, bits),
    }
    arrays = ["keys"] if bits == 16 else ["words", "scales", "biases"]
    tails = ["tails"] if bits == 16 else [f"tail_{name}" for name in arrays]
    names = [f"{name}{i}" for i in range(buffers) for name in arrays]
    return make_kernel(
        f"mla_split_{heads}_{latent}_{rope}_{bits}_{tiles}_{buffers}",
        ["q", "q_rope", "items", "tail_positions", *tails, *names],
        ["out", "lse"],
        mla_metal.split(buffers, bits),
        mla_metal.header(dtype, constants),
    )


@cache
def _reduce_kernel(
    heads: int, latent: int, dtype: mx.Dtype, launches: int
) -> Callable[..., list[mx.array]]:
    threads = min(REDUCE_THREADS, latent)
    constants: dict[str, str | int] = {
        "HEADS": heads,
        "LATENT": latent,
        "THREADS": threads,
        "SHARE": latent // threads,
    }
    return make_kernel(
        f"mla_reduce_{heads}_{latent}_{launches}",
        ["offsets", "entries", *(f"{kind}{i}" for i in range(launches) for kind in ("out", "lse"))],
        ["result"],
        mla_metal.reduce(launches),
        mla_metal.header(dtype, constants),
    )


def forget() -> None:
    """Forget all kernels, for other ones of `mx.fast.metal_kernel`."""
    _project_kernel.cache_clear()
    _split_kernel.cache_clear()
    _reduce_kernel.cache_clear()


def make_kernel(
    name: str, inputs: list[str], outputs: list[str], source: str, header: str
) -> Callable[..., list[mx.array]]:
    """A kernel of `mx.fast.metal_kernel`."""
    fast: Any = mx.fast
    kernel: Callable[..., list[mx.array]] = fast.metal_kernel(
        name=name, input_names=inputs, output_names=outputs, source=source, header=header
    )
    return kernel
