"""Reading, quantising and writing weights, one at a time.

Memory holds one stacked projection of one layer (0.4 GB in the published model) and its copies,
whatever the model's size.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import chain
from pathlib import Path
from typing import Any, cast

import mlx.core as mx
import numpy as np
import numpy.typing as npt

from glmd.checkpoint.config import ModelConfig
from glmd.checkpoint.layout import Fold, Weight
from glmd.checkpoint.weights import INDEX_NAME, StoredTensor, TensorFileWriter
from glmd.convert.recipes import PlannedWeight, total
from glmd.convert.refine import quantize
from glmd.errors import CheckpointError

FLOAT_BITS: dict[str, tuple[type[np.unsignedinteger[Any]], int, mx.Dtype]] = {
    "BF16": (np.uint16, 0x7F80, mx.bfloat16),
    "F16": (np.uint16, 0x7C00, mx.float16),
    "F32": (np.uint32, 0x7F80_0000, mx.float32),
}
"""Source dtypes: an integer type of equal width, the exponent bits (all set: infinity or NaN), and
MLX's dtype."""

CACHE_BYTES = 1 << 30
"""Freed buffers that MLX keeps. Fresh pages from the system for each weight took as long as
quantising it."""

_CHUNK = 16 << 20

Progress = Callable[[int, int], None]
"""Called after each weight with the bytes written and the total."""


# -- reading --------------------------------------------------------------------------------


class WeightReader:
    """Reads weights from Hugging Face's layout into MLX's shapes.

    Args:
        config: of the checkpoint.
        tensors: checked against the config, with dtypes of `FLOAT_BITS`.
    """

    def __init__(self, config: ModelConfig, tensors: Mapping[str, StoredTensor]) -> None:
        self._config = config
        self._tensors = tensors
        self._buffer = np.empty(0, np.uint8)

    def has(self, weight: Weight) -> bool:
        """Whether the files hold the weight."""
        return all(name in self._tensors for name in weight.sources)

    def read(self, weight: Weight) -> mx.array:
        """Read a weight as bfloat16, or float32 for the correction bias: [*weight.shape].

        Raises:
            CheckpointError: a file cannot be read, or holds infinities or NaN.
        """
        dtype = FLOAT_BITS[self._tensors[weight.sources[0]].dtype][2]
        array = self._fold(weight, mx.array(self._stack(weight)).view(dtype))
        return array.astype(mx.float32 if weight.keeps_float32 else mx.bfloat16)

    def _stack(self, weight: Weight) -> npt.NDArray[np.unsignedinteger[Any]]:
        """Bits of the weight's tensors, [sources, *source_shape], until the next call."""
        tensors = [self._tensors[name] for name in weight.sources]
        dtypes = {tensor.dtype for tensor in tensors}
        if len(dtypes) > 1:
            raise CheckpointError(
                f"{weight.name}: its tensors have different dtypes, {', '.join(sorted(dtypes))}",
                tensor=weight.name,
            )
        bits, exponent, _ = FLOAT_BITS[dtypes.pop()]
        nbytes = sum(tensor.nbytes for tensor in tensors)
        if nbytes > self._buffer.nbytes:
            self._buffer = np.empty(nbytes, np.uint8)
        stack = self._buffer[:nbytes].view(bits).reshape(len(tensors), *weight.source_shape)
        for row, tensor in zip(stack, tensors, strict=True):
            _read_into(tensor, row.data.cast("B"))
            if np.bitwise_and(row, exponent).max() == exponent:
                raise _bad(tensor, "holds infinities or NaN")
        return stack

    def _fold(self, weight: Weight, array: mx.array) -> mx.array:
        if weight.fold is Fold.STACK:
            return array
        if weight.fold is Fold.COPY:
            return array[0]
        config = self._config
        nope, v = config.qk_nope_head_dim, config.v_head_dim
        by_head = array.reshape(config.num_attention_heads, nope + v, config.kv_lora_rank)
        if weight.fold is Fold.EMBED_Q:
            return by_head[:, :nope].swapaxes(1, 2)
        return by_head[:, nope:]


def equal_bits(a: StoredTensor, b: StoredTensor) -> bool:
    """Whether two tensors have the same dtype, shape and bytes."""
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
    """Fill `out` with the tensor's bytes from byte `start`."""
    try:
        with tensor.file.open("rb", buffering=0) as stream:
            stream.seek(tensor.offset + start)
            filled = 0
            while filled < len(out):
                count = stream.readinto(out[filled : filled + (1 << 30)])
                if not count:
                    raise _bad(tensor, "cannot be read: the file is truncated")
                filled += count
    except OSError as error:
        raise _bad(tensor, f"cannot be read: {error.strerror or error}") from None


def _bad(tensor: StoredTensor, problem: str) -> CheckpointError:
    return CheckpointError(
        f"{tensor.file}: {tensor.name} {problem}", file=str(tensor.file), tensor=tensor.name
    )


# -- writing --------------------------------------------------------------------------------


class WeightWriter:
    """Writes planned weights to files and reports progress.

    Attributes:
        nbytes: total bytes to write.
    """

    def __init__(
        self,
        reader: WeightReader,
        nbytes: int,
        progress: Progress | None,
        importance: Mapping[str, mx.array] | None = None,
    ) -> None:
        """
        Args:
            importance: input importances by module path, for `refine`.
        """
        self.nbytes = nbytes
        self._importance = importance or {}
        self._reader = reader
        self._progress = progress
        self._written = 0

    def write(self, file: Path, weights: Sequence[PlannedWeight]) -> None:
        """Write one safetensors file.

        Raises:
            CheckpointError: a weight cannot be read.
            OSError: the file cannot be written.
        """
        specs = [spec for planned in weights for spec in planned.specs]
        with bounded_cache(CACHE_BYTES), TensorFileWriter(file, specs, {"format": "mlx"}) as writer:
            for planned in weights:
                for name, data in self._encode(planned):
                    writer.write(name, data)
                self._written += planned.nbytes
                if self._progress is not None:
                    self._progress(self._written, self.nbytes)

    def _encode(self, planned: PlannedWeight) -> Iterator[tuple[str, memoryview]]:
        """Quantise a weight; yield name and bytes of each of `planned.specs`."""
        array, quantized = self._reader.read(planned.weight), planned.quantized
        parts: tuple[mx.array, ...] = (array,)
        if quantized is not None:
            parts = quantize(array, quantized, self._importance.get(planned.weight.path))
        for spec, part in zip(planned.specs, parts, strict=True):
            # numpy has no bfloat16, so its bits are viewed as integers, without a copy.
            bits = mx.contiguous(part.view(mx.uint16) if part.dtype == mx.bfloat16 else part)
            yield spec.name, np.asarray(bits).data


def read_importance(file: Path | None) -> dict[str, mx.array]:
    """Read input importances by module path; they are loaded when used.

    Raises:
        CheckpointError: the file is damaged.
    """
    if file is None:
        return {}
    try:
        return cast(dict[str, mx.array], mx.load(str(file)))
    except RuntimeError as error:
        raise CheckpointError(f"{file}: {error}", file=str(file)) from error


@contextmanager
def bounded_cache(nbytes: int) -> Iterator[None]:
    """Limit MLX's cache to `nbytes`; afterwards empty it and restore the limit."""
    before = mx.set_cache_limit(nbytes)
    try:
        yield
    finally:
        mx.set_cache_limit(before)
        mx.clear_cache()


def name_shards(
    parts: Sequence[tuple[PlannedWeight, ...]],
) -> dict[str, tuple[PlannedWeight, ...]]:
    """The main model's files by name, named as by Hugging Face and mlx-lm."""
    if len(parts) == 1:
        return {"model.safetensors": parts[0]}
    return {
        f"model-{number:05d}-of-{len(parts):05d}.safetensors": part
        for number, part in enumerate(parts, start=1)
    }


def write_index(folder: Path, files: Mapping[str, tuple[PlannedWeight, ...]]) -> None:
    """Write model.safetensors.index.json: the file of each tensor, and the total size."""
    main = total(chain(*files.values()))
    weight_map = {
        spec.name: file
        for file, part in files.items()
        for planned in part
        for spec in planned.specs
    }
    metadata = {"total_size": main.nbytes, "total_parameters": main.parameters}
    index = {"metadata": metadata, "weight_map": dict(sorted(weight_map.items()))}
    write_json(folder / INDEX_NAME, index)


def write_json(file: Path, value: dict[str, Any]) -> None:
    text = json.dumps(value, indent=2, ensure_ascii=False) + "\n"
    file.write_text(text, encoding="utf-8")
