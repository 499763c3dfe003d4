"""Tensor parallelism: the part of a checkpoint that one of several ranks holds.

As mlx-lm's `shard` of this model: heads of the query projection and of MLA's up-projections, and
widths of all MLPs are divided; `o_proj` and `down_proj` are divided by inputs, so that their
outputs are to be summed over the ranks. Latent projections, routers, norms, embedding and head are
whole on each rank.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from hashlib import blake2b
from typing import Any

import msgspec
import numpy as np
import numpy.typing as npt

from glmd.checkpoint.stored import StoredWeights
from glmd.checkpoint.weights import SAMPLE_BYTES, Part, StoredTensor
from glmd.errors import SettingsError

MAX_RANKS = 8

_AXES = {
    **dict.fromkeys(("q_b_proj", "kv_b_proj", "gate_proj", "up_proj"), -2),
    **dict.fromkeys(("embed_q", "unembed_out"), 0),
    **dict.fromkeys(("o_proj", "down_proj"), -1),
}
"""Divided modules, by the axis of their arrays that is divided."""

_NUMPY: dict[str, type[np.generic]] = {
    "F32": np.float32, "F16": np.float16, "BF16": np.uint16, "U32": np.uint32, "U8": np.uint8,
}  # fmt: skip
"""The types in which numpy reads tensors; of BF16 only the bits."""


def check_ranks(stored: StoredWeights, count: int) -> None:
    """Refuse a number of ranks by which the checkpoint cannot be divided.

    Raises:
        SettingsError: with the reason, and the numbers that are possible.
    """
    obstacle = _obstacle(stored, count)
    if obstacle is None:
        return
    possible = [n for n in range(2, MAX_RANKS + 1) if _obstacle(stored, n) is None]
    remedy = f"Use {' or '.join(map(str, possible))}." if possible else "Serve it with one rank."
    raise SettingsError(f"ranks: {obstacle} {remedy}")


def _obstacle(stored: StoredWeights, count: int) -> str | None:
    """Why the weights cannot be divided among `count` ranks; None: they can."""
    config = stored.config
    for size, what in (
        (config.num_attention_heads, "attention heads"),
        (config.intermediate_size, "channels of the dense MLP"),
        (config.moe_intermediate_size, "channels of an expert"),
    ):
        if size % count:
            return f"{size} {what} cannot be divided among {count} ranks."
    for tensor in (*stored.main.values(), *stored.mtp.values()):
        module, _, kind = tensor.name.rpartition(".")
        if kind != "scales" or _axis(tensor) != -1 or not tensor.shape[-1] % count:
            continue
        return (
            f"{module} is quantised in {tensor.shape[-1]} groups along its inputs, which cannot be"
            f" divided among {count} ranks."
        )
    return None


def shard_weights(stored: StoredWeights, rank: int, count: int) -> StoredWeights:
    """The part of rank `rank` of `count`, with the dimensions of the model that it makes.

    Raises:
        SettingsError: as in `check_ranks`.
    """
    check_ranks(stored, count)
    config = msgspec.structs.replace(
        stored.config,
        **{
            name: getattr(stored.config, name) // count
            for name in ("num_attention_heads", "intermediate_size", "moe_intermediate_size")
        },
    )

    def parts(tensors: Mapping[str, StoredTensor]) -> dict[str, StoredTensor]:
        return {name: _part(tensor, rank, count) for name, tensor in tensors.items()}

    return replace(stored, config=config, main=parts(stored.main), mtp=parts(stored.mtp))


def digest_weights(stored: StoredWeights) -> str:
    """Digest of names, types, shapes and a few bytes of all tensors, equal on all machines."""
    digest = blake2b(digest_size=16)
    for tensor in (*stored.main.values(), *stored.mtp.values()):
        digest.update(f"{tensor.name} {tensor.dtype} {tensor.shape}".encode())
        with tensor.file.open("rb") as stream:
            stream.seek(tensor.offset + tensor.nbytes // 2)
            digest.update(stream.read(SAMPLE_BYTES))
    return digest.hexdigest()


def _part(tensor: StoredTensor, rank: int, count: int) -> StoredTensor:
    axis = _axis(tensor)
    if axis is None:
        return tensor
    axis %= len(tensor.shape)
    shape = list(tensor.shape)
    shape[axis] //= count
    return replace(tensor, shape=tuple(shape), part=Part(axis, rank, count))


def _axis(tensor: StoredTensor) -> int | None:
    """The divided axis; None: the tensor is whole on each rank."""
    return _AXES.get(tensor.name.split(".")[-2])


def read_part(tensor: StoredTensor) -> npt.NDArray[Any]:
    """Read a tensor's part from its file, without the rest."""
    assert tensor.part is not None
    axis, index, count = tensor.part.axis, tensor.part.index, tensor.part.count
    whole, size = list(tensor.shape), tensor.shape[axis]
    whole[axis] *= count
    kind = _NUMPY[tensor.dtype]
    mapped = np.memmap(tensor.file, kind, "r", offset=tensor.offset, shape=tuple(whole))
    place = [slice(None)] * axis + [slice(index * size, (index + 1) * size)]
    return np.array(mapped[tuple(place)])
