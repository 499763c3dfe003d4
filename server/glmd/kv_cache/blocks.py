"""Blocks of `BLOCK_TOKENS` tokens of a prefix tree, as routers count them.

A block stands for its tokens and all before them. It is cached while the tree stores its last
token. Hashes are those of vLLM with `--prefix-caching-hash-algo sha256_cbor` and PYTHONHASHSEED=0,
so that a listener can also compute them from token ids.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from hashlib import sha256

import msgspec
import numpy as np
import numpy.typing as npt

BLOCK_TOKENS = 16
"""vLLM's default."""

ROOT_HASH = sha256(b"\x610").digest()
"""The parent of first blocks: the hash of the text "0" in CBOR (RFC 8949)."""

_BLOCK_BYTES = 4 * BLOCK_TOKENS


class BlockStored(
    msgspec.Struct, tag=True, frozen=True, omit_defaults=True, gc=False, kw_only=True
):
    """Consecutive blocks have been cached. Fields as in vLLM."""

    block_hashes: list[bytes]
    parent_block_hash: bytes | None
    token_ids: list[int]
    block_size: int
    lora_id: int | None
    medium: str | None
    lora_name: str | None


class BlockRemoved(msgspec.Struct, tag=True, frozen=True, gc=False):
    """Blocks have been evicted. Fields as in vLLM."""

    block_hashes: list[bytes]
    medium: str | None


class AllBlocksCleared(msgspec.Struct, tag=True, frozen=True, gc=False):
    """Nothing is cached any more."""


KVEvent = BlockStored | BlockRemoved | AllBlocksCleared

MEDIUM = "GPU"
"""Name of the memory that KV is computed with."""


def block_hash(parent: bytes, token_ids: list[int]) -> bytes:
    """Hash of a block: SHA-256 of [parent, [id, …], null] in canonical CBOR."""
    ids = b"".join(map(_cbor, token_ids))
    return sha256(b"\x83\x58\x20" + parent + b"\x90" + ids + b"\xf6").digest()


def _cbor(number: int) -> bytes:
    """An integer from 0 to 2**32 - 1 in CBOR."""
    if number < 24:
        return bytes((number,))
    for head, size in ((0x18, 1), (0x19, 2), (0x1A, 4)):
        if number < 1 << 8 * size:
            return bytes((head,)) + number.to_bytes(size, "big")
    raise ValueError(f"token id {number}")


@dataclass(eq=False, slots=True)
class _Block:
    """A cached block.

    Attributes:
        copies: keys with which the tree stores the last token. There are several where a token's
            KV depends on the next one, too.
        children: by the bytes of their tokens.
    """

    hash: bytes
    copies: int = 0
    children: dict[bytes, _Block] = field(default_factory=dict)


class BlockIndex:
    """The cached blocks, updated with what a tree stores and removes, in this order."""

    def __init__(self) -> None:
        self._root = _Block(ROOT_HASH)

    def store(self, ids: npt.NDArray[np.int32], start: int) -> BlockStored | None:
        """Add what follows the first `start` tokens of a prefix.

        None: that is no new block.
        """
        data, block = ids.tobytes(), self._root
        parent = self._root
        hashes: list[bytes] = []
        for index in range(len(ids) // BLOCK_TOKENS):
            key = data[index * _BLOCK_BYTES : (index + 1) * _BLOCK_BYTES]
            child = block.children.get(key)
            if child is None:
                tokens = ids[index * BLOCK_TOKENS : (index + 1) * BLOCK_TOKENS].tolist()
                child = block.children[key] = _Block(block_hash(block.hash, tokens))
                parent = parent if hashes else block
                hashes.append(child.hash)
            block = child
            block.copies += index >= start // BLOCK_TOKENS
        if not hashes:
            return None
        end = len(ids) // BLOCK_TOKENS * BLOCK_TOKENS
        return self._stored(parent, hashes, ids[end - BLOCK_TOKENS * len(hashes) : end].tolist())

    def remove(self, ids: npt.NDArray[np.int32], start: int) -> BlockRemoved | None:
        """Remove what follows the first `start` tokens of a prefix.

        None: that is no block.
        """
        data, path = ids.tobytes(), [self._root]
        keys = []
        for index in range(len(ids) // BLOCK_TOKENS):
            keys.append(data[index * _BLOCK_BYTES : (index + 1) * _BLOCK_BYTES])
            path.append(path[-1].children[keys[-1]])
        removed = []
        for index in reversed(range(start // BLOCK_TOKENS, len(keys))):
            block = path[index + 1]
            block.copies -= 1
            if not block.copies:
                del path[index].children[keys[index]]
                removed.append(block.hash)
        return BlockRemoved(removed, MEDIUM) if removed else None

    def clear(self) -> AllBlocksCleared:
        """Remove everything."""
        self._root.children.clear()
        return AllBlocksCleared()

    def snapshot(self) -> Iterator[BlockStored]:
        """Events after which a listener that knows nothing knows all blocks."""
        starts = [(self._root, key) for key in self._root.children]
        while starts:
            parent, key = starts.pop()
            hashes, keys, block = [], [], parent.children[key]
            while True:
                hashes.append(block.hash)
                keys.append(key)
                if len(block.children) != 1:
                    break
                ((key, block),) = block.children.items()
            starts += [(block, each) for each in block.children]
            yield self._stored(parent, hashes, np.frombuffer(b"".join(keys), np.int32).tolist())

    def _stored(self, parent: _Block, hashes: list[bytes], tokens: list[int]) -> BlockStored:
        return BlockStored(
            block_hashes=hashes,
            parent_block_hash=None if parent is self._root else parent.hash,
            token_ids=tokens,
            block_size=BLOCK_TOKENS,
            lora_id=None,
            medium=MEDIUM,
            lora_name=None,
        )
