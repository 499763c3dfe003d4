"""Weight files: headers read without data, files written tensor by tensor.

The format (https://huggingface.co/docs/safetensors): eight bytes of little-endian header length,
a JSON object from tensor name to dtype, shape and byte range, then the bytes, without gaps. The
writer needs all shapes in advance and holds one tensor at a time: a 5 GB file takes no 5 GB of
memory. Pickles (`pytorch_model.bin`) are not read, as they can run code when opened.
"""

from __future__ import annotations

import json
import os
import re
from collections import Counter
from collections.abc import Container, Iterable, Mapping, Sequence
from dataclasses import dataclass
from hashlib import blake2b
from math import prod
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from glmd.checkpoint.config import (
    LFS_POINTER,
    QuantizedAs,
    describe_lfs_pointer,
    is_file_name,
    read_json_object,
)
from glmd.checkpoint.layout import Shape
from glmd.errors import CheckpointError

INDEX_NAME = "model.safetensors.index.json"

ITEM_BYTES: dict[str, int] = {
    "F64": 8, "F32": 4, "F16": 2, "BF16": 2, "F8_E4M3": 1, "F8_E5M2": 1,
    "I64": 8, "I32": 4, "I16": 2, "I8": 1,
    "U64": 8, "U32": 4, "U16": 2, "U8": 1, "BOOL": 1,
}  # fmt: skip
"""Bytes per element by safetensors dtype."""

FLOATS = frozenset({"BF16", "F16", "F32"})
"""Dtypes of unquantised weights."""

SAMPLE_BYTES = 256
"""Bytes of each tensor in a fingerprint."""

_MAX_HEADER = 100_000_000  # The limit of the reference implementation.

# Stored by old transformers; follows from the config.
_COMPUTED = re.compile(r"\.rotary_emb\.inv_freq$")


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """Name, safetensors dtype and shape of a tensor."""

    name: str
    dtype: str
    shape: Shape

    @property
    def nbytes(self) -> int:
        return prod(self.shape) * ITEM_BYTES[self.dtype]


@dataclass(frozen=True, slots=True)
class Part:
    """One of `count` equal parts of a tensor along an axis."""

    axis: int
    index: int
    count: int


@dataclass(frozen=True, slots=True)
class StoredTensor(TensorSpec):
    """A tensor in a file, `nbytes` long from byte `offset`."""

    file: Path
    offset: int
    stored_as: str
    """The name in the file: that of all experts' tensor, if this is a part of it."""
    part: Part | None = None
    """`shape` is that of a part, and the tensor's bytes begin at `offset`; None: the whole."""


# -- checkpoints ----------------------------------------------------------------------------


def list_tensors(folder: Path, only: Container[str] | None = None) -> dict[str, StoredTensor]:
    """List the tensors of a checkpoint's main files (`model*.safetensors`) by name.

    With an index, only the files that it names are read, and must hold exactly its tensors.

    Args:
        only: names of the index's files to read; None: all.

    Raises:
        CheckpointError: there are no files, a file is missing or damaged, or a tensor is stored
            twice or not in the file that the index names.
    """
    weight_map = read_index(folder)
    if weight_map is None:
        return glob_tensors(folder)
    if only is not None:
        weight_map = {tensor: name for tensor, name in weight_map.items() if name in only}
    names = sorted(set(weight_map.values()))
    for name in names:
        if not (folder / name).exists():
            raise _bad(
                folder / name, f"missing, of {len(names)} files in {INDEX_NAME}. Download it again."
            )
    tensors = _merge([folder / name for name in names], folder)
    for tensor, name in weight_map.items():
        if tensor not in tensors or tensors[tensor].file.name != name:
            raise _bad(folder / name, f"is not in the file that {INDEX_NAME} names", tensor)
    return tensors


def read_index(folder: Path) -> dict[str, str] | None:
    """Read the file name of each tensor from the index; None: there is no index.

    Raises:
        CheckpointError: the index is malformed.
    """
    file = folder / INDEX_NAME
    if not file.exists():
        return None
    weight_map = read_json_object(file).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise _bad(file, "no weight_map")
    for name in weight_map.values():
        if not is_file_name(name):
            raise _bad(file, f"{json.dumps(name)} is not the name of a file in the folder")
    return weight_map


def glob_tensors(folder: Path) -> dict[str, StoredTensor]:
    """List the tensors of all `model*.safetensors`, whatever an index says.

    Raises:
        CheckpointError: as `list_tensors`.
    """
    return _merge(sorted(folder.glob("model*.safetensors")), folder)


def _merge(files: list[Path], folder: Path) -> dict[str, StoredTensor]:
    if not files:
        raise _bad(folder, _explain_no_weights(folder))
    tensors: dict[str, StoredTensor] = {}
    for file in files:
        for name, tensor in read_header(file).items():
            if name in tensors:
                raise _bad(
                    file, f"is in {tensors[name].file.name} already. Delete one of the files", name
                )
            tensors[name] = tensor
    return tensors


def _explain_no_weights(folder: Path) -> str:
    if (folder / "adapter_config.json").exists():
        return (
            "a LoRA adapter, not a model. Merge it into its base model with"
            " `mlx_lm.fuse --model BASE --adapter-path ADAPTER`, and serve the result."
        )
    other = [file for end in ("*.bin", "*.gguf", "*.safetensors") for file in folder.glob(end)]
    hint = f" (only {min(other).name}, which glmd does not read)" if other else ""
    return (
        f"no model*.safetensors{hint}. Convert the BF16 model with `glmd convert`, or name a"
        " repository with MLX files."
    )


def fingerprint(folder: Path, tensors: Iterable[StoredTensor]) -> str:
    """Digest that changes with the weights of a checkpoint.

    Of config.json, of the sizes and times of the weight files, and of the name, type and a few
    bytes of each tensor: reading gigabytes at each start would take seconds.

    Raises:
        OSError: a file cannot be read.
    """
    by_file: dict[Path, list[StoredTensor]] = {}
    for tensor in tensors:
        by_file.setdefault(tensor.file, []).append(tensor)
    digest = blake2b((folder / "config.json").read_bytes(), digest_size=16)
    for file in sorted(by_file):
        with file.open("rb") as stream:
            status = os.fstat(stream.fileno())
            digest.update(f"{file.name} {status.st_size} {status.st_mtime_ns}".encode())
            for tensor in by_file[file]:
                digest.update(f"{tensor.name} {tensor.dtype} {tensor.shape}".encode())
                middle = tensor.offset + tensor.nbytes // 2
                digest.update(os.pread(stream.fileno(), SAMPLE_BYTES, middle))
    return digest.hexdigest()


def check_specs(
    tensors: Mapping[str, StoredTensor], specs: Sequence[TensorSpec], *, folder: Path
) -> None:
    """Compare the stored tensors with those that the configuration requires.

    Args:
        specs: every required tensor; no other may be stored. Any dtype of `FLOATS` may stand for
            another.
        folder: for the error.

    Raises:
        CheckpointError: names the first tensor that is missing, has another shape or dtype, or
            does not belong to the model.
    """
    for spec in specs:
        name, tensor = spec.name, tensors.get(spec.name)
        if tensor is None:
            raise _bad(folder, "is missing", name)
        if tensor.shape != spec.shape:
            required = f"config.json requires {list(spec.shape)}"
            raise _bad(tensor.file, f"has the shape {list(tensor.shape)}, but {required}", name)
        allowed = FLOATS if spec.dtype in FLOATS else {spec.dtype}
        if tensor.dtype not in allowed:
            raise _bad(tensor.file, f"is {tensor.dtype}, not {' or '.join(sorted(allowed))}", name)
    names = {spec.name for spec in specs}
    for name, tensor in tensors.items():
        if name not in names and not _COMPUTED.search(name):
            raise _bad(tensor.file, "does not belong to the model that config.json describes", name)


# -- reading --------------------------------------------------------------------------------


def read_header(file: Path) -> dict[str, StoredTensor]:
    """List the tensors of a safetensors file by name, in the order of their bytes.

    Raises:
        CheckpointError: the file is not readable, has no valid header, names a tensor twice, or
            the tensors do not cover its bytes exactly.
    """
    try:
        with file.open("rb") as stream:
            size = os.fstat(stream.fileno()).st_size
            head = stream.read(8)
            if LFS_POINTER.startswith(head) and (head + stream.read(64)).startswith(LFS_POINTER):
                raise _bad(file, describe_lfs_pointer())
            length = int.from_bytes(head, "little")
            if size < 8 or length > min(size - 8, _MAX_HEADER):
                raise _bad(file, "truncated, or not a safetensors file: its header is cut off")
            text = stream.read(length)
    except FileNotFoundError:
        raise _bad(file, "no such file") from None
    except OSError as error:
        raise _bad(file, error.strerror or str(error)) from None
    try:
        header = json.loads(text, object_pairs_hook=lambda pairs: _unique(file, pairs))
    except ValueError:
        raise _bad(file, "not a safetensors file: its header is not JSON") from None
    if not isinstance(header, dict):
        raise _bad(file, "not a safetensors file: its header is not a JSON object")
    header.pop("__metadata__", None)
    tensors = [_stored(file, 8 + length, name, entry) for name, entry in header.items()]
    tensors.sort(key=lambda tensor: (tensor.offset, tensor.nbytes))
    position = 8 + length
    for tensor in tensors:
        if tensor.offset != position:
            raise _bad(file, "overlaps its neighbour or leaves a gap before it", tensor.name)
        position += tensor.nbytes
        if position > size:
            missing = position - size
            raise _bad(file, f"is cut off: the file ends {missing} bytes too soon", tensor.name)
    if position < size:
        raise _bad(file, f"has {size - position} bytes more than its header accounts for")
    return {tensor.name: tensor for tensor in tensors}


def _unique(file: Path, pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    table = dict(pairs)
    if len(table) < len(pairs):
        name = Counter(key for key, _ in pairs).most_common(1)[0][0]
        raise _bad(file, "is twice in the header", name)
    return table


def _stored(file: Path, base: int, name: str, entry: Any) -> StoredTensor:
    match entry:
        case {"dtype": str(dtype), "shape": list(shape), "data_offsets": [int(start), int(end)]}:
            if not all(isinstance(n, int) and n >= 0 for n in shape):
                raise _bad(file, f"has the shape {shape}", name)
            if dtype not in ITEM_BYTES:
                raise _bad(file, f"has the unknown dtype {dtype}", name)
            tensor = StoredTensor(name, dtype, tuple(shape), file, base + start, name)
            if tensor.nbytes != end - start:
                needed = f"{dtype} {shape} needs {tensor.nbytes}"
                raise _bad(file, f"takes {end - start} bytes, but {needed}", name)
            return tensor
    raise _bad(file, "has no valid dtype, shape and data_offsets in the header", name)


def _bad(file: Path, problem: str, tensor: str | None = None) -> CheckpointError:
    message = f"{file}: {tensor} {problem}" if tensor else f"{file}: {problem}"
    return CheckpointError(message, file=str(file), tensor=tensor)


# -- quantised arrays --------------------------------------------------------------------------


def quantized_specs(path: str, shape: Shape, how: QuantizedAs) -> tuple[TensorSpec, ...]:
    """The tensors of a quantised module, as `mx.quantize` returns them."""
    rows, columns = shape[:-1], shape[-1]
    weight = TensorSpec(f"{path}.weight", "U32", (*rows, columns * how.bits // 32))
    grouped = (*rows, columns // how.group_size)
    if how.mode != "affine":
        return weight, TensorSpec(f"{path}.scales", "U8", grouped)
    return (
        weight,
        TensorSpec(f"{path}.scales", "BF16", grouped),
        TensorSpec(f"{path}.biases", "BF16", grouped),
    )


# -- writing --------------------------------------------------------------------------------


def header_bytes(specs: Sequence[TensorSpec], metadata: Mapping[str, str] | None = None) -> bytes:
    """The header of a file that holds `specs` in this order."""
    header: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    end = 0
    for spec in specs:
        start, end = end, end + spec.nbytes
        header[spec.name] = {
            "dtype": spec.dtype,
            "shape": list(spec.shape),
            "data_offsets": [start, end],
        }
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # Aligns the data.
    return len(text).to_bytes(8, "little") + text


class TensorFileWriter:
    """Writes a safetensors file tensor by tensor, in the order of `specs`.

    A context manager; leaving it syncs the file to disk. The file must not exist.

    Args:
        mode: permissions of the file, less the umask.

    Raises:
        OSError: the file cannot be written.
        ValueError: a tensor is written out of order, in the wrong size, or not at all.
    """

    def __init__(
        self,
        file: Path,
        specs: Sequence[TensorSpec],
        metadata: Mapping[str, str] | None = None,
        *,
        mode: int = 0o666,
    ) -> None:
        self._pending = list(reversed(specs))
        # Unbuffered, so that an error is raised by the write that meets it.
        descriptor = os.open(file, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, mode)
        self._stream = os.fdopen(descriptor, "wb", buffering=0)
        self._write_all(memoryview(header_bytes(specs, metadata)))

    def write(self, name: str, data: memoryview | bytes) -> None:
        """Append the next tensor's bytes (C order, little-endian)."""
        view = memoryview(data).cast("B")
        spec = self._pending.pop()
        if spec.name != name or spec.nbytes != len(view):
            raise ValueError(
                f"expected {spec.name} of {spec.nbytes} bytes, got {name} of {len(view)}"
            )
        self._write_all(view)

    def _write_all(self, view: memoryview) -> None:
        # One write() takes at most 2 GiB on Linux and macOS, and may write less than asked.
        while view:
            view = view[self._stream.write(view[: 1 << 30]) :]

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        try:
            if kind is None:
                if self._pending:
                    raise ValueError(f"{self._pending[-1].name} was never written")
                os.fsync(self._stream.fileno())
        finally:
            self._stream.close()
