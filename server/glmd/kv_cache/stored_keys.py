"""Cache vectors as they are stored: in the model's dtype, or quantised.

A vector is quantised once, when it is computed, and read in that form ever after: by its own step,
from a tail, from a segment. So results do not depend on when it moves from one to the other.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import mlx.core as mx

from glmd.errors import SettingsError

KVBits = Literal[16, 8, 4]
"""Bits of a cached value; 16: in the model's dtype."""

GROUP_SIZES = (64, 32)
"""Values that share a scale and a bias, the first that divides a vector."""


@dataclass(frozen=True, slots=True)
class QuantizedKeys:
    """Vectors in the form of `mx.quantize` (affine).

    Attributes:
        arrays: weights [..., tokens, width * bits / 32] uint32; scales and biases, each
            [..., tokens, width / group_size].
    """

    arrays: tuple[mx.array, ...]
    bits: int

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the vectors: [..., tokens, width]."""
        *dims, words = self.arrays[0].shape
        return (*dims, words * 32 // self.bits)

    @property
    def nbytes(self) -> int:
        return sum(array.nbytes for array in self.arrays)

    @property
    def options(self) -> dict[str, Any]:
        """Arguments of MLX's functions for quantised arrays."""
        return {"group_size": self.shape[-1] // self.arrays[1].shape[-1], "bits": self.bits}

    def __getitem__(self, index: Any) -> QuantizedKeys:
        """Index all axes but the last."""
        return QuantizedKeys(tuple(array[index] for array in self.arrays), self.bits)


StoredKeys = mx.array | QuantizedKeys


def store(vectors: mx.array, bits: int) -> StoredKeys:
    """Bring vectors [..., width] into the form of `bits` bits."""
    if bits == 16:
        return vectors
    group = group_size(vectors.shape[-1])
    return QuantizedKeys(tuple(mx.quantize(vectors, group_size=group, bits=bits)), bits)


def dequantize(keys: StoredKeys, dtype: mx.Dtype | None = None) -> mx.array:
    """The vectors, computed in a dtype; None: in the model's."""
    if isinstance(keys, mx.array):
        return keys if dtype is None else keys.astype(dtype)
    weights, *others = keys.arrays
    scales, biases = others if dtype is None else [array.astype(dtype) for array in others]
    return mx.dequantize(weights, scales, biases, **keys.options)


def map_arrays(function: Callable[..., mx.array], *keys: StoredKeys) -> StoredKeys:
    """Apply a function of arrays to each array of keys of the same form."""
    first = keys[0]
    if isinstance(first, mx.array):
        return function(*keys)
    parts = [key.arrays for key in keys if isinstance(key, QuantizedKeys)]
    return QuantizedKeys(
        tuple(function(*arrays) for arrays in zip(*parts, strict=True)), first.bits
    )


def arrays_of(keys: StoredKeys) -> tuple[mx.array, ...]:
    """The arrays that hold keys: one, or three if they are quantised."""
    return (keys,) if isinstance(keys, mx.array) else keys.arrays


def zeros(shape: tuple[int, ...], dtype: mx.Dtype, bits: int) -> StoredKeys:
    """Vectors of zeros, [..., width]."""
    if bits == 16:
        return mx.zeros(shape, dtype)
    *dims, width = shape
    groups = width // group_size(width)
    weights = mx.zeros((*dims, width * bits // 32), mx.uint32)
    scales, biases = mx.zeros((*dims, groups), dtype), mx.zeros((*dims, groups), dtype)
    return QuantizedKeys((weights, scales, biases), bits)


def group_size(width: int) -> int:
    """The group size of vectors of `width` values.

    Raises:
        SettingsError: they cannot be quantised.
    """
    for size in GROUP_SIZES:
        if width % size == 0:
            return size
    raise SettingsError(
        f"kv_bits: {width} values per token are no multiple of {GROUP_SIZES[-1]}. Use 16."
    )


def vector_bytes(width: int, itemsize: int, bits: int) -> int:
    """Bytes of a stored vector.

    Args:
        itemsize: bytes of a value in the model's dtype.
    """
    if bits == 16:
        return width * itemsize
    return width * bits // 8 + 2 * itemsize * (width // group_size(width))
