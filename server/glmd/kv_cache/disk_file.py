"""Files of stored KV: one safetensors file per segment, valid only as a whole.

A file holds the rows of consecutive tokens and says in its header which tokens these are, what they
continue, and what computed them. A digest covers the header, a checksum each array, so that a file
that was cut, changed or written for another model is recognised.
"""

from __future__ import annotations

import json
import os
import zlib
from base64 import b64decode, b64encode
from collections.abc import Mapping
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import numpy.typing as npt

from glmd.checkpoint.weights import TensorFileWriter, TensorSpec, header_bytes
from glmd.kv_cache.node import Keys

FORMAT = "1"
"""Version of the files, to be raised with each change of the format or of the KV itself."""

SUFFIX = ".kv.safetensors"

_DTYPES: dict[str, tuple[mx.Dtype, str]] = {
    "BF16": (mx.bfloat16, "<u2"),  # NumPy has no bfloat16.
    "F16": (mx.float16, "<f2"),
    "F32": (mx.float32, "<f4"),
    "U32": (mx.uint32, "<u4"),
    "U8": (mx.uint8, "u1"),
}
"""By safetensors dtype: the dtype in MLX, and in NumPy."""

_NAMES = {dtype: name for name, (dtype, _) in _DTYPES.items()}

Rows = npt.NDArray[Any]


class DamagedFile(Exception):
    """A file that disagrees with its name or header, or is of another model."""


@dataclass(frozen=True, slots=True)
class StoredSegment:
    """Contents of a file: the KV of tokens `start` to `end` of a prefix.

    Attributes:
        name: digest of the salt and all keys up to `end`.
        parent: digest of the salt and all keys up to `start`.
        keys: [tokens] int64; see `glmd.kv_cache.node.Keys`.
        nbytes: size of the file.
    """

    name: str
    parent: str
    start: int
    keys: Keys
    nbytes: int

    def __len__(self) -> int:
        return len(self.keys)

    @property
    def end(self) -> int:
        return self.start + len(self.keys)


class PrefixDigest:
    """Digest of a cache salt and the keys added so far: names a prefix of tokens."""

    def __init__(self, salt: str) -> None:
        self._hash = blake2b(salt.encode("utf-8", "surrogatepass") + b"\0", digest_size=16)

    def add(self, keys: Keys) -> None:
        self._hash.update(keys.astype("<i8").tobytes())

    def __str__(self) -> str:
        return self._hash.hexdigest()


def host_rows(array: mx.array, start: int, end: int) -> Rows:
    """View rows [end - start, …] of an evaluated, contiguous array, not copied."""
    buffer: Any = array
    rows: Rows = np.frombuffer(buffer, _DTYPES[_NAMES[array.dtype]][1]).reshape(array.shape)
    return rows[start:end]


def device_array(rows: Rows, dtype: mx.Dtype) -> mx.array:
    """Copy rows, as of `read_rows`, into an array."""
    array = mx.array(rows)
    return array if array.dtype == dtype else array.view(dtype)


def write_segment(
    file: Path,
    stored: StoredSegment,
    arrays: Mapping[str, tuple[mx.Dtype, Rows]],
    identity: Mapping[str, str],
) -> int:
    """Write a file that appears complete or not at all; returns its size.

    Args:
        arrays: dtype and rows, [tokens, …], of each array.
        identity: what the reader must agree with.

    Raises:
        OSError: the file cannot be written.
    """
    specs = [TensorSpec(name, _NAMES[dtype], rows.shape) for name, (dtype, rows) in arrays.items()]
    sums = [str(zlib.crc32(_bytes(rows))) for _, rows in arrays.values()]
    metadata = {
        **identity,
        "name": stored.name,
        "parent": stored.parent,
        "start": str(stored.start),
        "tokens": b64encode(stored.keys.astype("<i8").tobytes()).decode(),
        "checksums": ",".join(sums),
    }
    metadata["header"] = _header_digest(specs, metadata)
    temporary = file.with_name(f".{file.name}")
    temporary.unlink(missing_ok=True)
    try:
        with TensorFileWriter(temporary, specs, metadata, mode=0o600) as writer:
            for name, (_, rows) in arrays.items():
                writer.write(name, _bytes(rows))
        temporary.rename(file)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    return len(header_bytes(specs, metadata)) + sum(spec.nbytes for spec in specs)


def read_stored(file: Path, identity: Mapping[str, str]) -> StoredSegment:
    """Read what a file holds from its header.

    Raises:
        DamagedFile: the header is invalid, or of another identity.
        OSError: the file cannot be read.
    """
    with file.open("rb") as stream:
        return _read_header(stream, file, identity)[0]


def read_rows(
    file: Path, stored: StoredSegment, identity: Mapping[str, str]
) -> dict[str, tuple[mx.Dtype, Rows]]:
    """Read a file's arrays into host memory: dtype and rows [tokens, …] of each.

    Raises:
        DamagedFile: the file is not exactly what was written as `stored`.
        OSError: the file cannot be read.
    """
    with file.open("rb", buffering=0) as stream:
        found, specs, checksums = _read_header(stream, file, identity)
        if found.name != stored.name or not np.array_equal(found.keys, stored.keys):
            raise DamagedFile("holds other tokens than before")
        buffer = np.empty(sum(spec.nbytes for spec in specs), np.uint8)
        view, filled = _bytes(buffer), 0
        while filled < len(view):
            count = stream.readinto(view[filled : filled + (1 << 30)])
            if not count:
                raise DamagedFile("is cut off")
            filled += count
    arrays: dict[str, tuple[mx.Dtype, Rows]] = {}
    start = 0
    for spec, checksum in zip(specs, checksums, strict=True):
        data = buffer[start : start + spec.nbytes]
        if str(zlib.crc32(_bytes(data))) != checksum:
            raise DamagedFile(f"has a wrong checksum of {spec.name}")
        dtype, kind = _DTYPES[spec.dtype]
        arrays[spec.name] = dtype, data.view(kind).reshape(spec.shape)
        start += spec.nbytes
    return arrays


def _read_header(
    stream: Any, file: Path, identity: Mapping[str, str]
) -> tuple[StoredSegment, list[TensorSpec], list[str]]:
    """Read and check a header: what the file holds, its arrays, and their checksums."""
    size = os.fstat(stream.fileno()).st_size
    length = int.from_bytes(stream.read(8), "little")
    if size < 8 or length > size - 8:
        raise DamagedFile("is cut off")
    try:
        text = stream.read(length)
        header = json.loads(text)
        metadata = header.pop("__metadata__")
        specs = [TensorSpec(n, e["dtype"], tuple(e["shape"])) for n, e in header.items()]
        as_written = header_bytes(specs, metadata)[8:]
        if text != as_written or metadata.pop("header") != _header_digest(specs, metadata):
            raise DamagedFile("has a damaged header")
        keys = np.frombuffer(b64decode(metadata["tokens"]), "<i8")
        stored = StoredSegment(
            metadata["name"], metadata["parent"], int(metadata["start"]), keys, size
        )
        checksums = metadata["checksums"].split(",")
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise DamagedFile(f"has a damaged header: {type(error).__name__}") from error
    if {name: metadata.get(name) for name in identity} != dict(identity):
        raise DamagedFile("is of another model or setting")
    if file.name != stored.name + SUFFIX:
        raise DamagedFile("has the name of another file")
    if 8 + length + sum(spec.nbytes for spec in specs) != size:
        raise DamagedFile("is cut off")
    return stored, specs, checksums


def _header_digest(specs: list[TensorSpec], metadata: Mapping[str, str]) -> str:
    return blake2b(header_bytes(specs, metadata), digest_size=16).hexdigest()


def _bytes(array: Rows) -> memoryview:
    return np.ascontiguousarray(array).data.cast("B")
