"""Decode attention of MLA in a Metal kernel, and a kernel that combines results.

All pieces of a group's keys, in segments and tails, are divided into items: some keys of one piece,
for the heads of a few rows. A threadgroup takes an item. Each of its simdgroups owns 64 columns of
the latents and an equal part of the rotated columns, and reads its part of a key once: for the
scores, whose parts are summed over the simdgroups, and for the values. The softmax is online, in
float32. The second kernel combines the items of each row (as flash-decoding does).

The source uses few of Metal's functions, so that the tests can compile the same text for a CPU.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

import mlx.core as mx
import numpy as np

from glmd.kv_cache.segment import Segment
from glmd.kv_cache.stored_keys import StoredKeys
from glmd.kv_cache.tail_pool import TailPool
from glmd.model.batch import DecodeGroup, KernelLaunch, KernelPlan, KVSpan
from glmd.model.mla import MLAShape

BUFFERS = (4, 24)
"""Numbers of segments that a kernel is compiled for. Metal binds at most 31 buffers."""

LAUNCHES = (1, 4)
"""Numbers of launches of a layer that the second kernel is compiled for."""

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

_TYPES = {mx.bfloat16: "bfloat16_t", mx.float16: "half", mx.float32: "float"}

SPLIT = """
const int lane = thread_index_in_simdgroup;
const int part = simdgroup_index_in_threadgroup;
// The lane's two places in a matrix of 8 x 8: row y, columns x and x + 1.
const int y = ((lane / 4) & 4) + (lane / 2) % 4;
const int x = ((lane / 4) & 2) * 2 + (lane % 2) * 2;

const int index = threadgroup_position_in_grid.x;
const device int* item = items + index * FIELDS;
const device T* keys = tails;
switch (item[0]) {
    CASES
    default: keys = tails + (long)item[5] * tails_shape[1] * WIDTH;
}
const int first_row = item[3];
const int count = item[4] * HEADS;  // rows of heads
int end = item[2];
if (item[0] < 0) {
    for (int row = 0; row < item[4]; row++) {
        end = metal::max(end, int(tail_positions[first_row + row]) + 1);
    }
}

// Running maximum and sum of the rows whose softmax this simdgroup computes.
float top[OWN_ROWS], total[OWN_ROWS];
int limit[OWN_ROWS];
UNROLL for (int own = 0; own < OWN_ROWS; own++) {
    const int row = own * PARTS + part;
    top[own] = LOWEST;
    total[own] = 0;
    limit[own] = row < count ? end : 0;
    if (item[0] < 0 && row < count) {
        limit[own] = int(tail_positions[first_row + row / HEADS]) + 1;
    }
}

int column[FRAGMENTS];  // the first of each fragment
UNROLL for (int f = 0; f < FRAGMENTS; f++) {
    column[f] = f < 8 ? part * 64 + f * 8 : LATENT + (part * (FRAGMENTS - 8) + f - 8) * 8;
}
T query[FRAGMENTS][ROW_TILES][2];  // transposed: dimension y, rows x and x + 1
UNROLL for (int f = 0; f < FRAGMENTS; f++) {
    UNROLL for (int r = 0; r < ROW_TILES; r++) {
        UNROLL for (int e = 0; e < 2; e++) {
            const int row = r * 8 + x + e;
            const long place = ((long)first_row * HEADS + row) * WIDTH + column[f] + y;
            query[f][r][e] = row < count ? q[place] : T(0.0f);
        }
    }
}
metal::simdgroup_matrix<float, 8, 8> sums[ROW_TILES][8];
UNROLL for (int r = 0; r < ROW_TILES; r++) {
    UNROLL for (int f = 0; f < 8; f++) {
        sums[r][f].thread_elements()[0] = 0;
        sums[r][f].thread_elements()[1] = 0;
    }
}

threadgroup float scores[PARTS][PASS][8 * ROW_TILES];
threadgroup float weights[8 * ROW_TILES][PASS];
threadgroup float factors[8 * ROW_TILES];

for (int start = item[1]; start < end; start += PASS) {
    T latent[PASS / 8][FRAGMENTS][2];  // key y, dimensions x and x + 1
    UNROLL for (int k = 0; k < PASS / 8; k++) {
        const int key = start + k * 8 + y;
        UNROLL for (int f = 0; f < FRAGMENTS; f++) {
            const device T* source = keys + (long)key * WIDTH + column[f] + x;
            latent[k][f][0] = key < end ? source[0] : T(0.0f);
            latent[k][f][1] = key < end ? source[1] : T(0.0f);
        }
    }
    UNROLL for (int k = 0; k < PASS / 8; k++) {
        UNROLL for (int r = 0; r < ROW_TILES; r++) {
            metal::simdgroup_matrix<float, 8, 8> score, a, b;
            score.thread_elements()[0] = 0;
            score.thread_elements()[1] = 0;
            UNROLL for (int f = 0; f < FRAGMENTS; f++) {
                UNROLL for (int e = 0; e < 2; e++) {
                    a.thread_elements()[e] = float(latent[k][f][e]);
                    b.thread_elements()[e] = float(query[f][r][e]);
                }
                metal::simdgroup_multiply_accumulate(score, a, b, score);
            }
            scores[part][k * 8 + y][r * 8 + x] = score.thread_elements()[0];
            scores[part][k * 8 + y][r * 8 + x + 1] = score.thread_elements()[1];
        }
    }
    metal::threadgroup_barrier(metal::mem_flags::mem_threadgroup);
    UNROLL for (int own = 0; own < OWN_ROWS; own++) {
        const int row = own * PARTS + part;
        if (row < 8 * ROW_TILES) {
            const bool seen = lane < PASS && start + lane < limit[own];
            float score = LOWEST;
            if (seen) {
                score = 0;
                for (int p = 0; p < PARTS; p++) {
                    score += scores[p][lane][row];
                }
            }
            const float largest = metal::max(top[own], metal::simd_max(score));
            const float weight = seen ? metal::exp(score - largest) : 0.0f;
            const float factor = metal::exp(top[own] - largest);
            total[own] = total[own] * factor + metal::simd_sum(weight);
            top[own] = largest;
            if (lane < PASS) {
                weights[row][lane] = weight;
            }
            if (lane == 0) {
                factors[row] = factor;
            }
        }
    }
    metal::threadgroup_barrier(metal::mem_flags::mem_threadgroup);
    UNROLL for (int r = 0; r < ROW_TILES; r++) {
        const float factor = factors[r * 8 + y];
        UNROLL for (int f = 0; f < 8; f++) {
            sums[r][f].thread_elements()[0] *= factor;
            sums[r][f].thread_elements()[1] *= factor;
        }
        UNROLL for (int k = 0; k < PASS / 8; k++) {
            metal::simdgroup_matrix<float, 8, 8> a, b;
            a.thread_elements()[0] = weights[r * 8 + y][k * 8 + x];
            a.thread_elements()[1] = weights[r * 8 + y][k * 8 + x + 1];
            UNROLL for (int f = 0; f < 8; f++) {
                b.thread_elements()[0] = float(latent[k][f][0]);
                b.thread_elements()[1] = float(latent[k][f][1]);
                metal::simdgroup_multiply_accumulate(sums[r][f], a, b, sums[r][f]);
            }
        }
    }
}

metal::threadgroup_barrier(metal::mem_flags::mem_threadgroup);
UNROLL for (int own = 0; own < OWN_ROWS; own++) {
    const int row = own * PARTS + part;
    if (row < 8 * ROW_TILES && lane == 0) {
        const bool seen = total[own] > 0;
        factors[row] = seen ? 1 / total[own] : 0.0f;
        lse[index * 8 * ROW_TILES + row] = seen ? top[own] + metal::log(total[own]) : LOWEST;
    }
}
metal::threadgroup_barrier(metal::mem_flags::mem_threadgroup);
UNROLL for (int r = 0; r < ROW_TILES; r++) {
    if (r * 8 + y < count) {
        const float factor = factors[r * 8 + y];
        UNROLL for (int f = 0; f < 8; f++) {
            const long place = ((long)index * 8 * ROW_TILES + r * 8 + y) * LATENT + column[f] + x;
            out[place] = sums[r][f].thread_elements()[0] * factor;
            out[place + 1] = sums[r][f].thread_elements()[1] * factor;
        }
    }
}
"""
"""Each threadgroup: attention of an item's rows to its keys, [8 * ROW_TILES, LATENT] in float32,
and the logs of their softmax denominators."""

REDUCE = """
const int index = threadgroup_position_in_grid.x;
const int row = index / HEADS, head = index % HEADS;
const int start = offsets[row], end = offsets[row + 1];
float top = LOWEST, total = 0;
const device float* lse = lse0;
const device float* out = out0;
for (int i = start; i < end; i++) {
    switch (entries[2 * i]) { CASES }
    top = metal::max(top, float(lse[entries[2 * i + 1] + head]));
}
float sums[SHARE];
UNROLL for (int s = 0; s < SHARE; s++) {
    sums[s] = 0;
}
const int thread_index = thread_position_in_threadgroup.x;
for (int i = start; i < end; i++) {
    switch (entries[2 * i]) { CASES }
    const long place = entries[2 * i + 1] + head;
    const float weight = metal::exp(lse[place] - top);
    total += weight;
    UNROLL for (int s = 0; s < SHARE; s++) {
        sums[s] += weight * out[place * LATENT + s * THREADS + thread_index];
    }
}
UNROLL for (int s = 0; s < SHARE; s++) {
    result[(long)index * LATENT + s * THREADS + thread_index] = T(sums[s] / total);
}
"""
"""Each threadgroup: one head of one row, from all items of the row."""


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
    segments: dict[int, tuple[int, Segment]] = {}
    items: list[list[list[int]]] = [[]]
    for sequence, slot in enumerate(slots):
        start, end = sequence * width, (sequence + 1) * width
        for row in range(start, end, item_rows):
            items[0].append([TAIL, 0, 0, row, min(item_rows, end - row), slot])
    for span in spans:
        for piece in span.slices:
            index, _ = segments.setdefault(id(piece.segment), (len(segments), piece.segment))
            launch, buffer = divmod(index, BUFFERS[-1])
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
    most = BUFFERS[-1]
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


def attend_items(
    shape: MLAShape, layer: int, q: mx.array, group: DecodeGroup, plan: KernelPlan, tails: TailPool
) -> mx.array:
    """Attend to all keys of a decode group: [rows, heads, latent].

    Args:
        q: [rows, heads, kv_width].
    """
    parts, tiles = shape.latent // COLUMNS, _row_tiles(shape, plan.item_rows)
    pool = unquantised(tails.view(layer))
    results: list[list[mx.array]] = []
    for launch in plan.launches:
        keys = [unquantised(segment.layers[layer]) for segment in launch.segments]
        buffers = next(count for count in BUFFERS if count >= len(keys))
        keys += [pool] * (buffers - len(keys))
        count = launch.items.shape[0]
        results.append(
            _split_kernel(shape.heads, shape.latent, shape.rope, q.dtype, tiles, buffers)(
                inputs=[q, launch.items, pool, group.tail_positions, *keys],
                grid=(count * parts * 32, 1, 1),
                threadgroup=(parts * 32, 1, 1),
                output_shapes=[(count, 8 * tiles, shape.latent), (count, 8 * tiles)],
                output_dtypes=[mx.float32, mx.float32],
            )
        )
    launches = next(count for count in LAUNCHES if count >= len(results))
    results += results[:1] * (launches - len(results))
    threads = min(REDUCE_THREADS, shape.latent)
    rows = q.shape[0]
    out: list[mx.array] = _reduce_kernel(shape.heads, shape.latent, q.dtype, launches)(
        inputs=[plan.offsets, plan.entries, *(array for pair in results for array in pair)],
        grid=(rows * shape.heads * threads, 1, 1),
        threadgroup=(threads, 1, 1),
        output_shapes=[(rows, shape.heads, shape.latent)],
        output_dtypes=[q.dtype],
    )
    return out[0]


def unquantised(keys: StoredKeys) -> mx.array:
    """The same keys, which are not quantised."""
    assert isinstance(keys, mx.array), "kv_bits is 16 where these kernels are used"
    return keys


@cache
def _split_kernel(
    heads: int, latent: int, rope: int, dtype: mx.Dtype, tiles: int, buffers: int
) -> Callable[..., list[mx.array]]:
    parts = latent // COLUMNS
    constants = {
        "HEADS": heads,
        "LATENT": latent,
        "WIDTH": latent + rope,
        "PARTS": parts,
        "FRAGMENTS": 8 + rope // 8 // parts,
        "ROW_TILES": tiles,
        "OWN_ROWS": -(-8 * tiles // parts),
        "PASS": KEYS_PER_PASS,
        "FIELDS": ITEM_FIELDS,
    }
    names = [f"keys{i}" for i in range(buffers)]
    cases = " ".join(f"case {i}: keys = {name}; break;" for i, name in enumerate(names))
    return _kernel(
        f"mla_split_{heads}_{latent}_{rope}_{tiles}_{buffers}",
        ["q", "items", "tails", "tail_positions", *names],
        ["out", "lse"],
        SPLIT.replace("CASES", cases),
        _header(dtype, constants),
    )


@cache
def _reduce_kernel(
    heads: int, latent: int, dtype: mx.Dtype, launches: int
) -> Callable[..., list[mx.array]]:
    threads = min(REDUCE_THREADS, latent)
    constants = {"HEADS": heads, "LATENT": latent, "THREADS": threads, "SHARE": latent // threads}
    cases = " ".join(f"case {i}: lse = lse{i}; out = out{i}; break;" for i in range(launches))
    return _kernel(
        f"mla_reduce_{heads}_{latent}_{launches}",
        ["offsets", "entries", *(f"{kind}{i}" for i in range(launches) for kind in ("out", "lse"))],
        ["result"],
        REDUCE.replace("CASES", cases),
        _header(dtype, constants),
    )


def forget() -> None:
    """Forget all kernels, for other ones of `mx.fast.metal_kernel`."""
    _split_kernel.cache_clear()
    _reduce_kernel.cache_clear()


def _kernel(
    name: str, inputs: list[str], outputs: list[str], source: str, header: str
) -> Callable[..., list[mx.array]]:
    fast: Any = mx.fast
    kernel: Callable[..., list[mx.array]] = fast.metal_kernel(
        name=name, input_names=inputs, output_names=outputs, source=source, header=header
    )
    return kernel


def _header(dtype: mx.Dtype, constants: dict[str, int]) -> str:
    lines = ["#include <metal_stdlib>", "#include <metal_simdgroup_matrix>"]
    lines += [f"#define {name} {value}" for name, value in constants.items()]
    lines += ["#define LOWEST -1e30f", f"#define T {_TYPES[dtype]}"]
    # Arrays that are indexed by loops are in registers only if the loops are unrolled.
    lines += ['#define UNROLL _Pragma("clang loop unroll(full)")']
    return "\n".join(lines) + "\n"
