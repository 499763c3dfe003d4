"""From a checkpoint's tensors to the arrays of a plan: read, fold, quantise. One at a time.

Nothing outlives its turn, so memory holds one stacked projection of one layer (0.4 GB in the
published model), its copies, and no more, however large the model is.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import mlx.core as mx
import numpy as np
import numpy.typing as npt

from glmd.checkpoint.config import ModelConfig
from glmd.checkpoint.layout import Fold, Weight
from glmd.checkpoint.weights import StoredTensor
from glmd.convert.plan import PlannedWeight
from glmd.errors import CheckpointError

FLOATS: dict[str, tuple[type[np.unsignedinteger[Any]], int, mx.Dtype]] = {
    "BF16": (np.uint16, 0x7F80, mx.bfloat16),
    "F16": (np.uint16, 0x7C00, mx.float16),
    "F32": (np.uint32, 0x7F80_0000, mx.float32),
}
"""What weights may be stored in: an integer of its width, the bits of its exponent (all of them
set: infinity or NaN), and the type itself."""

CACHE_BYTES = 1 << 30
"""Freed buffers that MLX keeps for the next weight: asking the system for fresh pages for each
took as long as quantising it."""

_CHUNK = 16 << 20


class WeightReader:
    """Reads the weights of a checkpoint in Hugging Face's layout, in MLX's shapes.

    Args:
        config: the checkpoint's.
        tensors: its tensors, already checked against the config, of the dtypes in `FLOATS`.
    """

    def __init__(self, config: ModelConfig, tensors: Mapping[str, StoredTensor]) -> None:
        self._config = config
        self._tensors = tensors
        self._buffer = np.empty(0, np.uint8)

    def read(self, weight: Weight) -> mx.array:
        """`weight` in the shape `weight.shape`; bfloat16, or float32 where it stays so.

        Raises:
            CheckpointError: a file cannot be read, or holds infinities or NaN.
        """
        array = self._fold(weight, mx.array(self._stack(weight)).view(self._kind(weight)))
        return array.astype(mx.float32 if weight.keeps_float32 else mx.bfloat16)

    def _kind(self, weight: Weight) -> mx.Dtype:
        return FLOATS[self._tensors[weight.sources[0]].dtype][2]

    def _stack(self, weight: Weight) -> npt.NDArray[np.unsignedinteger[Any]]:
        """The bits of the weight's tensors, [sources, *source_shape], until the next call."""
        tensors = [self._tensors[name] for name in weight.sources]
        kinds = {tensor.dtype for tensor in tensors}
        if len(kinds) > 1:
            raise CheckpointError(
                f"{weight.name} would be stacked of {' and '.join(sorted(kinds))} tensors",
                tensor=weight.name,
            )
        bits, exponent, _ = FLOATS[kinds.pop()]
        nbytes = sum(tensor.nbytes for tensor in tensors)
        if nbytes > self._buffer.nbytes:
            self._buffer = np.empty(nbytes, np.uint8)
        stack = self._buffer[:nbytes].view(bits).reshape(len(tensors), *weight.source_shape)
        for row, tensor in zip(stack, tensors, strict=True):
            _read_into(tensor, row.data.cast("B"))
            if np.bitwise_and(row, exponent).max() == exponent:
                raise CheckpointError(
                    f"{tensor.file}: {tensor.name} holds infinities or NaN",
                    file=str(tensor.file),
                    tensor=tensor.name,
                )
        return stack

    def _fold(self, weight: Weight, array: mx.array) -> mx.array:
        match weight.fold:
            case Fold.STACK:
                return array
            case Fold.COPY:
                return array[0]
        config = self._config
        nope, v = config.qk_nope_head_dim, config.v_head_dim
        by_head = array.reshape(config.num_attention_heads, nope + v, config.kv_lora_rank)
        if weight.fold is Fold.EMBED_Q:
            return by_head[:, :nope].swapaxes(1, 2)
        return by_head[:, nope:]


@contextmanager
def bounded_cache() -> Iterator[None]:
    """Have MLX keep at most `CACHE_BYTES` of freed memory; afterwards none, and its old limit."""
    before = mx.set_cache_limit(CACHE_BYTES)
    try:
        yield
    finally:
        mx.set_cache_limit(before)
        mx.clear_cache()


def encode(planned: PlannedWeight, array: mx.array) -> Iterator[tuple[str, memoryview]]:
    """The bytes of each of `planned.specs`, in order, as they are to be written."""
    how = planned.quantized
    parts: tuple[mx.array, ...] = (array,)
    if how is not None:
        parts = tuple(mx.quantize(array, group_size=how.group_size, bits=how.bits, mode=how.mode))
    for spec, part in zip(planned.specs, parts, strict=True):
        # numpy knows no bfloat16; it sees the bits, without copying them.
        bits = mx.contiguous(part.view(mx.uint16) if part.dtype == mx.bfloat16 else part)
        yield spec.name, np.asarray(bits).data


def equal_bits(a: StoredTensor, b: StoredTensor) -> bool:
    """Whether two tensors have the same type, shape and bytes."""
    if (a.dtype, a.shape) != (b.dtype, b.shape):
        return False
    for start in range(0, a.nbytes, _CHUNK):
        length = min(_CHUNK, a.nbytes - start)
        left, right = bytearray(length), bytearray(length)
        _read_into(a, memoryview(left), start)
        _read_into(b, memoryview(right), start)
        if left != right:
            return False
    return True


def _read_into(tensor: StoredTensor, out: memoryview, start: int = 0) -> None:
    """Fill `out` with the tensor's bytes from byte `start` of it."""
    try:
        with tensor.file.open("rb", buffering=0) as stream:
            stream.seek(tensor.offset + start)
            filled = 0
            while filled < len(out):
                count = stream.readinto(out[filled : filled + (1 << 30)])
                if not count:
                    raise _unreadable(tensor, "ends before it does")
                filled += count
    except OSError as error:
        raise _unreadable(tensor, error.strerror or str(error)) from None


def _unreadable(tensor: StoredTensor, why: str) -> CheckpointError:
    return CheckpointError(
        f"{tensor.file}: {tensor.name} cannot be read: {why}",
        file=str(tensor.file),
        tensor=tensor.name,
    )
