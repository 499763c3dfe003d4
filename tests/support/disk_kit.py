"""Segments with made-up KV for tests of the disk cache; as a program, a writer that is killed."""

from __future__ import annotations

import os
import random
import signal
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import numpy.typing as npt

from glmd.kv_cache.disk_cache import DiskCache, SaveJob
from glmd.kv_cache.disk_file import DamagedFile, read_rows

IDENTITY = {"format": "1", "model": "m", "recipe": "None", "dtype": "float32"}


def kv_of(salt: str, tokens: Sequence[int]) -> dict[str, npt.NDArray[Any]]:
    """Rows that depend on the salt and all tokens up to each row."""
    sums = np.cumsum(np.array([sum(salt.encode()), *tokens], np.int64) * 7 + 3)[1:]
    return {
        "a": (sums[:, None] % np.array([251, 241, 239])).astype(np.float32),
        "b": (sums[:, None] * np.arange(1, 5)).astype(np.uint32),
    }


def job(salt: str, tokens: Sequence[int], start: int = 0) -> SaveJob:
    """The job to store tokens `start` to the end."""
    keys = np.array(tokens, np.int64)
    arrays = {name: mx.array(rows[start:]) for name, rows in kv_of(salt, tokens).items()}
    return SaveJob(salt, [keys[:start], keys[start:]], start, arrays)


def open_cache(folder: Path, **options: Any) -> DiskCache:
    settings: dict[str, Any] = {"capacity": 1 << 30, "identity": IDENTITY, "floor": 0}
    return DiskCache(folder, **settings | options)


def restorable(cache: DiskCache, salt: str, tokens: Sequence[int]) -> int:
    """Tokens that the cache gives back; asserts that they have their KV."""
    wanted = kv_of(salt, tokens)
    known = 0
    for part in cache.find(salt, np.array(tokens, np.int64)):
        assert part.stored.start <= known
        arrays = cache.read(part.stored).result()
        if arrays is None:
            break
        for name, (_, rows) in arrays.items():
            expected = wanted[name][part.stored.start : part.end]
            assert np.array_equal(rows[: part.length], expected)
        known = part.end
    return known


def prompts(rng: random.Random) -> list[int]:
    """Tokens that often begin like others."""
    return [rng.randrange(2) for _ in range(rng.randrange(1, 12))] * rng.randrange(1, 150)


def write_until_killed(folder: Path, seed: int) -> None:
    rng = random.Random(seed)
    cache = open_cache(folder, capacity=1 << 17)
    while True:
        tokens = prompts(rng)
        cache.save(job(rng.choice(["", "x"]), tokens)).result()


def kill_writers(folder: Path, kills: int, seed: int) -> None:
    """Kill writers at random points; check each time that all files are readable and right."""
    rng = random.Random(seed)
    kept = 0
    for number in range(kills):
        child = os.fork()
        if not child:
            write_until_killed(folder, number)
        time.sleep(rng.uniform(0, 0.02))
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        cache = open_cache(folder)
        names = cache.index.names()
        files = {file.name for file in folder.iterdir()} - {".lock"}
        assert files == {f"{name}.kv.safetensors" for name in names}, files
        kept += len(names)
        writer = random.Random(number)
        while writer.random() < 0.8:
            tokens, salt = prompts(writer), writer.choice(["", "x"])
            restorable(cache, salt, tokens)
        for name in names:
            file = folder / f"{name}.kv.safetensors"
            try:
                read_rows(file, cache.index.get(name), IDENTITY)
            except DamagedFile as error:
                raise AssertionError(f"{file.name} {error}") from error
        cache.close(10)
    assert kept > kills, kept


if __name__ == "__main__":
    kill_writers(Path(sys.argv[1]), int(sys.argv[2]), seed=0)
