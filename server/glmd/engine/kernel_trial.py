"""Trial of the kernels of MLA decode on this device, when a model is loaded.

The kernels of `glmd.model.mla_kernel` are used only if they compute what the reference does, on
random contexts, and are not slower in any of three. The reference of the numbers runs in float32 on
the CPU, which no kernel of the GPU can mislead.
"""

from __future__ import annotations

import logging
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal

import mlx.core as mx
import numpy as np
from mlx.nn.layers.positional_encoding import RoPE

from glmd.engine.attention_metadata import AttentionMetadataBuilder, TreePath
from glmd.errors import SettingsError
from glmd.kv_cache.node import Node, PathNode
from glmd.kv_cache.prefix_tree import PrefixTree
from glmd.kv_cache.segment import Segment
from glmd.kv_cache.stored_keys import dequantize, store
from glmd.kv_cache.tail_pool import TailPool
from glmd.model.attention import attend_group
from glmd.model.batch import DecodeGroup
from glmd.model.mla import MLAShape
from glmd.model.mla_kernel import is_available, prepare_rows, supports

log = logging.getLogger("glmd.engine")

KernelSetting = Literal["auto", "on", "off"]

TOLERANCES = {mx.bfloat16: 2.0**-7, mx.float16: 2.0**-9, mx.float32: 1e-4}
"""Largest error as a share of the largest value: two roundings to the dtype, or of sums."""

ROPE_BASE, NORM_EPS = 1e6, 1e-6
POSITIONS = (0, 1, 2, 63, 500, 1000)
"""Rows of the trial of the rotation. At far positions float32 alone differs by more."""

CALLS, REPEATS = 8, 5
"""Calls that depend on each other in one measurement, and measurements of which the median is
compared."""


@dataclass(frozen=True, slots=True)
class Contexts:
    """Random contexts of a decode group.

    Attributes:
        shared: keys of a prefix that all sequences share.
        own: keys of each further piece, the same for every sequence.
        tail: keys in each tail before the rows' own.
    """

    name: str
    sequences: int
    width: int
    shared: int
    own: tuple[int, ...]
    tail: int


PROVED = (
    Contexts("one key", 1, 1, 0, (), 0),
    Contexts("40,000 keys", 1, 4, 40_000, (), 5),
    Contexts("40 pieces", 1, 2, 17, tuple(range(1, 118, 3)), 127),
    Contexts("33 rows", 33, 1, 700, (50,), 64),
    Contexts("12 rows, 36 pieces", 6, 2, 301, (16, 1, 15, 90, 128, 33), 31),
)

TIMED = (
    Contexts("1 x 2k", 1, 1, 2000, (), 64),
    Contexts("1 x 16k", 1, 1, 15_000, (900, 100), 64),
    Contexts("8 x 2k", 8, 1, 0, (1800, 200), 64),
)


def kernel_is_used(setting: KernelSetting, shape: MLAShape, dtype: mx.Dtype) -> bool:
    """Decide by a trial whether the kernel is used.

    Raises:
        SettingsError: the setting is on, and the kernel does not run here or computes another
            result.
    """
    used = passes_trial(
        "MLA kernel", setting, lambda: _find_problem(shape, dtype, timed=setting == "auto")
    )
    if used:
        log.info("MLA kernel on")
    return used


def passes_trial(
    kernel: str, setting: KernelSetting, find_problem: Callable[[], str | None]
) -> bool:
    """Whether nothing speaks against a kernel. Writes to the log what does.

    Args:
        kernel: its name in messages; in lower case and with `_`, that of its setting.
        find_problem: returns what speaks against the kernel. Not called without an Apple GPU.

    Raises:
        SettingsError: the setting is on, and something does.
    """
    if setting == "off" or (setting == "auto" and not is_available()):
        return False
    try:
        problem = find_problem() if is_available() else "there is no Apple GPU"
    except Exception as error:  # whatever it is, the reference works
        problem = f"it fails: {type(error).__name__}: {str(error)[:500]}"
    mx.clear_cache()
    if problem is None:
        return True
    if setting == "on":
        name = kernel.lower().replace(" ", "_")
        raise SettingsError(f"{name}: on, but {problem}. Use auto or off.")
    log.warning("%s off: %s", kernel, problem)
    return False


def _find_problem(shape: MLAShape, dtype: mx.Dtype, *, timed: bool) -> str | None:
    if not supports(shape):
        return f"it is not made for latents of {shape.latent} + {shape.rope} values"
    return _find_error(shape, dtype) or (_find_loss(shape, dtype) if timed else None)


def _find_error(shape: MLAShape, dtype: mx.Dtype) -> str | None:
    trials = [("rotation", partial(rotation_error, shape, dtype))]
    trials += [(each.name, partial(largest_error, shape, dtype, each)) for each in PROVED]
    for name, trial in trials:
        error = trial()
        if not error <= TOLERANCES[dtype]:
            return f"its results are wrong by {error:.2g} ({name})"
    return None


def _find_loss(shape: MLAShape, dtype: mx.Dtype) -> str | None:
    for contexts in TIMED:
        kernel, reference = measure(shape, dtype, contexts)
        log.info(
            "MLA kernel: context=%r kernel_us=%.0f reference_us=%.0f",
            contexts.name,
            1e6 * kernel,
            1e6 * reference,
        )
        if kernel > reference:
            return f"it is slower ({contexts.name}: {kernel / reference:.2f} x)"
    return None


@dataclass(frozen=True, slots=True)
class _Inputs:
    """A decode group with random contents."""

    q: mx.array
    """[heads, rows, latent]"""
    q_rope: mx.array
    """[rows, heads, rope]"""
    paths: list[TreePath]
    tails: TailPool
    contexts: Contexts

    @classmethod
    def random(cls, shape: MLAShape, dtype: mx.Dtype, contexts: Contexts) -> _Inputs:
        rng = np.random.default_rng(0)

        def values(*dims: int, scale: float = 1.0) -> mx.array:
            made = rng.normal(0, scale, dims).astype(np.float32)
            return mx.array(made).astype(dtype)

        def piece(length: int) -> PathNode[Segment]:
            segment = Segment([store(values(length, shape.kv_width), shape.kv_bits)])
            return PathNode(Node(np.zeros(length, np.int32), segment, None, 0), length)

        shared = [piece(contexts.shared)] if contexts.shared else []
        paths = [[*shared, *map(piece, contexts.own)] for _ in range(contexts.sequences)]
        tails = TailPool(1, shape.kv_width, dtype, shape.kv_bits)
        slots = mx.array([tails.allocate() for _ in paths], mx.int32)
        tails.reserve(contexts.tail + contexts.width)
        positions = mx.arange(contexts.tail + contexts.width)
        for slot in range(contexts.sequences):
            rows = store(values(positions.shape[0], shape.kv_width), shape.kv_bits)
            tails.write(0, mx.broadcast_to(slots[slot], positions.shape), positions, rows)
        # Scores of about 2, as in a model.
        count, scale = contexts.sequences * contexts.width, 2 / shape.kv_width**0.5
        q = values(shape.heads, count, shape.latent, scale=scale)
        q_rope = values(count, shape.heads, shape.rope, scale=scale)
        segments = [part.node.kv for path in paths for part in path]
        held = [array for s in segments if s is not None for array in s.arrays().values()]
        mx.eval(q, q_rope, tails.arrays(), held)
        return cls(q, q_rope, paths, tails, contexts)

    def group(self, shape: MLAShape, *, kernel: bool) -> DecodeGroup:
        builder = AttentionMetadataBuilder(
            PrefixTree[Segment](1), self.tails, replace(shape, kernel=kernel), self.q.dtype
        )
        contexts = self.contexts
        order = list(range(contexts.sequences))
        starts = [contexts.shared + sum(contexts.own)] * contexts.sequences
        metadata = builder.layout(order, self.paths, order, starts, contexts.width)
        first = mx.array(starts, mx.int32)[:, None] + contexts.tail
        group = builder.decode_group(metadata, 0, first + mx.arange(contexts.width))
        assert not kernel or group.plan is not None
        mx.eval(group.tail_mask, group.tail_positions)
        return group


def largest_error(shape: MLAShape, dtype: mx.Dtype, contexts: Contexts) -> float:
    """The kernel's largest error, as a share of the largest result."""
    inputs = _Inputs.random(shape, dtype, contexts)
    group = inputs.group(shape, kernel=True)
    out = attend_group(shape, 0, inputs.q, inputs.q_rope, group, inputs.tails)
    mx.eval(out)
    with mx.stream(mx.cpu):
        expected = _reference(shape, inputs)
        error = mx.abs(out.astype(mx.float32) - expected).max() / mx.abs(expected).max()
        value: float = error.item()  # type: ignore[assignment]
        return value


def _reference(shape: MLAShape, inputs: _Inputs) -> mx.array:
    """Attention of each row to its keys, in float32: [rows, heads, latent]."""
    outs: list[mx.array] = []
    pool = dequantize(inputs.tails.view(0), mx.float32)
    for sequence, path in enumerate(inputs.paths):
        segments = [part.node.kv for part in path if part.node.kv is not None]
        keys = [dequantize(segment.layers[0], mx.float32) for segment in segments]
        for row in range(inputs.contexts.width):
            tail = pool[sequence, : inputs.contexts.tail + row + 1]
            seen = mx.concatenate([*keys, tail])
            parts = [inputs.q[:, len(outs)], inputs.q_rope[len(outs)]]
            q = mx.concatenate(parts, axis=-1).astype(mx.float32)
            outs.append(mx.softmax(q @ seen.T, axis=-1) @ seen[:, : shape.latent])
            mx.eval(outs[-1])
    return mx.stack(outs)


def rotation_error(shape: MLAShape, dtype: mx.Dtype) -> float:
    """The largest error of `prepare_rows`, as a share of the largest result."""
    rng = np.random.default_rng(0)

    def values(*dims: int) -> mx.array:
        return mx.array(rng.normal(0, 1, dims).astype(np.float32)).astype(dtype)

    rope: Any = RoPE(shape.rope, traditional=True, base=ROPE_BASE)
    positions = mx.array(POSITIONS, mx.int32)
    q = values(len(POSITIONS), shape.heads, shape.nope + shape.rope)
    compressed, weight = values(len(POSITIONS), shape.kv_width), values(shape.latent)
    out = prepare_rows(shape, rope, q, compressed, weight, NORM_EPS, positions)
    mx.eval(out)
    with mx.stream(mx.cpu):
        exact = compressed.astype(mx.float32)
        latent = mx.fast.rms_norm(exact[:, : shape.latent], weight.astype(mx.float32), NORM_EPS)
        heads = mx.concatenate(
            [q[..., shape.nope :].astype(mx.float32), exact[:, None, shape.latent :]], axis=1
        )
        rotated = rope(heads[:, :, None], offset=positions).squeeze(2)
        expected = rotated[:, :-1], mx.concatenate([latent, rotated[:, -1]], axis=-1)
        errors = [
            mx.abs(got.astype(mx.float32) - want).max() / mx.abs(want).max()
            for got, want in zip(out, expected, strict=True)
        ]
        value: float = mx.stack(errors).max().item()  # type: ignore[assignment]
        return value


def measure(shape: MLAShape, dtype: mx.Dtype, contexts: Contexts) -> tuple[float, float]:
    """Seconds of one call of the kernel and of what it replaces."""
    inputs = _Inputs.random(shape, dtype, contexts)
    groups = [inputs.group(shape, kernel=kernel) for kernel in (True, False)]
    seconds: list[list[float]] = [[], []]
    for _ in range(1 + REPEATS):
        for times, group in zip(seconds, groups, strict=True):
            times.append(_seconds(shape, inputs, group))
    kernel, reference = (statistics.median(_without_first(times)) for times in seconds)
    return kernel, reference


def _without_first(times: Sequence[float]) -> Sequence[float]:
    """Without the call that compiles."""
    return times[1:]


def _seconds(shape: MLAShape, inputs: _Inputs, group: DecodeGroup) -> float:
    start = time.perf_counter()
    q = inputs.q
    for _ in range(CALLS):
        q = attend_group(shape, 0, q, inputs.q_rope, group, inputs.tails).swapaxes(0, 1)
    mx.eval(q)
    return (time.perf_counter() - start) / CALLS
