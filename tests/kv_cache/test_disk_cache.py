"""The disk cache: what it gives back is what was stored, or nothing."""

from __future__ import annotations

import os
import random
import resource
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import hypothesis.strategies as st
import pytest
from disk_kit import IDENTITY, job, open_cache, prompts, restorable
from engines import fresh_folder
from hypothesis import given, settings
from paths import TESTS

from glmd.kv_cache.disk_cache import DiskCache, WriteLimit

SALTS = ["", "x"]


def save(cache: DiskCache, salt: str, tokens: list[int], start: int = 0) -> bool:
    return cache.save(job(salt, tokens, start)).result()


def files(folder: Path) -> list[Path]:
    return sorted(folder.glob("*.kv.safetensors"))


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_finds_the_longest_stored_prefix_and_stores_each_token_once(data: st.DataObject) -> None:
    """Compared with the set of all stored prefixes."""
    folder = fresh_folder()
    cache = open_cache(folder)
    stored: set[tuple[str, tuple[int, ...]]] = set()

    def longest(salt: str, tokens: list[int]) -> int:
        return max(
            n for n in range(len(tokens) + 1) if n == 0 or (salt, tuple(tokens[:n])) in stored
        )

    tokens_of = st.lists(st.integers(0, 1), min_size=1, max_size=9)
    for _ in range(data.draw(st.integers(1, 12))):
        salt, tokens = data.draw(st.sampled_from(SALTS)), data.draw(tokens_of)
        start = data.draw(st.integers(0, len(tokens) - 1))
        known = longest(salt, tokens)
        assert save(cache, salt, tokens, start) == (known >= start)
        if known >= start:
            stored |= {(salt, tuple(tokens[:n])) for n in range(1, len(tokens) + 1)}
        if data.draw(st.booleans()):
            cache.close(10)
            cache = open_cache(folder)
        asked = data.draw(tokens_of)
        assert restorable(cache, salt, asked) == longest(salt, asked)
    names = cache.index.names()
    assert sum(len(cache.index.get(name)) for name in names) == len(stored)
    assert cache.index.nbytes == sum(file.stat().st_size for file in files(folder))
    cache.close(10)


def test_long_segments_are_stored_in_files_of_limited_length(tmp_path: Path) -> None:
    cache = open_cache(tmp_path)
    tokens = [number % 13 for number in range(3000)]
    save(cache, "", tokens)
    assert [len(cache.index.get(name)) for name in cache.index.names()] == [952, 1024, 1024]
    assert restorable(cache, "", tokens) == 3000
    assert restorable(cache, "", [*tokens[:2000], 99]) == 2000
    cache.close(10)


@pytest.mark.e2e
def test_two_hundred_kills_leave_a_readable_cache(tmp_path: Path) -> None:
    program = TESTS / "support" / "disk_kit.py"
    subprocess.run([sys.executable, program, tmp_path, "200"], check=True, timeout=250)


def test_cut_changed_and_foreign_files_are_removed_and_never_read(tmp_path: Path) -> None:
    """Either the file is gone, or it gives back what was stored."""
    origin = tmp_path / "origin"
    cache = open_cache(origin)
    tokens = prompts(random.Random(1))
    save(cache, "", tokens)
    cache.close(10)
    (file,) = files(origin)
    whole = file.read_bytes()
    rng = random.Random(0)
    damaged = [whole[:length] for length in {0, 1, 7, 8, 9, len(whole) - 1}]
    damaged += [whole[: rng.randrange(len(whole))] for _ in range(40)]
    damaged += [whole + b"\0"]
    for position in [*range(16), *(rng.randrange(len(whole)) for _ in range(250))]:
        changed = bytearray(whole)
        changed[position] ^= 1 << rng.randrange(8)
        damaged.append(bytes(changed))
    folder = tmp_path / "damaged"
    found = 0
    for content in damaged:
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        (folder / file.name).write_bytes(content)
        cache = open_cache(folder)
        found += restorable(cache, "", tokens) > 0
        assert restorable(cache, "", tokens) == (len(tokens) if files(folder) else 0)
        cache.close(10)
    assert not found


@pytest.mark.parametrize("field", sorted(IDENTITY))
def test_files_of_another_model_or_setting_are_removed(tmp_path: Path, field: str) -> None:
    cache = open_cache(tmp_path)
    save(cache, "", [1, 2, 3])
    cache.close(10)
    cache = open_cache(tmp_path, identity=IDENTITY | {field: "other"})
    assert not files(tmp_path)
    assert restorable(cache, "", [1, 2, 3]) == 0
    cache.close(10)


def test_renamed_files_are_removed_and_files_of_others_left_alone(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    cache = open_cache(tmp_path)
    save(cache, "", [1, 2, 3])
    cache.close(10)
    (file,) = files(tmp_path)
    file.rename(tmp_path / ("0" * 32 + ".kv.safetensors"))
    unfinished = tmp_path / f".{file.name}"
    unfinished.write_bytes(b"begun")
    open_cache(tmp_path).close(10)
    assert {entry.name for entry in tmp_path.iterdir()} == {"notes.txt", ".lock"}


def test_files_are_readable_by_their_owner_only(tmp_path: Path) -> None:
    folder = tmp_path / "new"
    cache = open_cache(folder)
    save(cache, "", [1, 2, 3])
    assert folder.stat().st_mode & 0o777 == 0o700
    assert {entry.stat().st_mode & 0o777 for entry in folder.iterdir()} == {0o600}
    cache.close(10)


def test_a_file_that_vanishes_is_stored_again(tmp_path: Path) -> None:
    cache = open_cache(tmp_path)
    save(cache, "", [1, 2, 3])
    files(tmp_path)[0].unlink()
    assert restorable(cache, "", [1, 2, 3]) == 0
    assert save(cache, "", [1, 2, 3])
    assert restorable(cache, "", [1, 2, 3]) == 3
    cache.close(10)


@contextmanager
def limited_files(nbytes: int) -> Iterator[None]:
    """Let writes beyond `nbytes` of a file fail, as on a full disk."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (nbytes, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_full_disk_loses_only_what_it_refuses(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    cache = open_cache(tmp_path)
    save(cache, "", [1, 2, 3])
    tokens = [1, 2, 3, *range(100)]
    for nbytes in range(0, 4000, 250):
        with limited_files(nbytes):
            save(cache, "", tokens, 3)
        assert restorable(cache, "", tokens) == 3
        assert len(files(tmp_path)) == len(list(tmp_path.iterdir())) - 1 == 1
    assert caplog.text.count("Disk cache does not write") == 1
    save(cache, "", tokens, 3)
    assert restorable(cache, "", tokens) == len(tokens)
    cache.close(10)


def test_least_recently_used_files_go_first(tmp_path: Path) -> None:
    cache = open_cache(tmp_path)
    for token in range(4):
        save(cache, "", [token] * 100)
    assert restorable(cache, "", [0] * 100) == 100
    size = files(tmp_path)[0].stat().st_size
    cache.close(10)
    cache = open_cache(tmp_path, capacity=3 * size + 100)
    assert [restorable(cache, "", [token] * 100) for token in range(4)] == [100, 0, 100, 100]
    cache.close(10)
    cache = open_cache(tmp_path, capacity=2 * size + 100)
    assert [restorable(cache, "", [token] * 100) for token in range(4)] == [0, 0, 100, 100]
    cache.close(10)


def test_the_folder_never_exceeds_its_capacity(tmp_path: Path) -> None:
    cache = open_cache(tmp_path, capacity=200_000)
    rng = random.Random(0)
    for _ in range(60):
        save(cache, "", [rng.randrange(100) for _ in range(rng.randrange(1, 1500))])
        assert sum(file.stat().st_size for file in files(tmp_path)) <= 200_000
    assert cache.index.nbytes > 100_000
    cache.close(10)


def test_free_space_never_falls_below_the_floor(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Other programs fill the disk: files are removed first, then nothing is written."""
    others = 0

    def usage(folder: Path) -> os.terminal_size | object:
        kept = sum(file.stat().st_size for file in files(tmp_path))
        return shutil._ntuple_diskusage(0, 0, 1_000_000 - others - kept)

    monkeypatch.setattr(shutil, "disk_usage", usage)
    cache = open_cache(tmp_path, floor=900_000)
    for token in range(30):
        save(cache, "", [token] * 500)
        assert 0 < cache.index.nbytes <= 100_000
    others = 60_000
    save(cache, "", [99] * 500)
    assert 0 < cache.index.nbytes <= 40_000
    others = 200_000
    save(cache, "", [98] * 500)
    assert not files(tmp_path)
    assert "would stay free" in caplog.text
    cache.close(10)


def test_bytes_written_per_hour_are_limited_and_the_reason_logged(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    now = 0.0
    monkeypatch.setattr(time, "monotonic", lambda: now)
    limit = WriteLimit(1000)
    assert limit.take(600)
    assert not limit.take(600)
    now = 720.0
    assert limit.take(600)
    assert not limit.take(1)
    now = 100_000.0
    assert limit.take(1000)
    assert not limit.take(1)
    cache = open_cache(tmp_path, capacity=60_000)
    for token in range(20):
        save(cache, "", [token] * 300)
    assert cache.written_bytes <= 60_000
    assert "per hour is reached" in caplog.text
    now += 3600
    written = cache.written_bytes
    save(cache, "", [50] * 300)
    assert cache.written_bytes > written
    cache.close(10)


def test_the_bytes_written_in_total_survive_a_restart(tmp_path: Path) -> None:
    cache = open_cache(tmp_path)
    save(cache, "", [1, 2, 3])
    total = cache.written_total
    cache.close(10)
    cache = open_cache(tmp_path)
    assert (cache.written_total, cache.written_bytes) == (total, 0)
    cache.close(10)


def test_one_process_at_a_time_uses_a_folder(tmp_path: Path) -> None:
    cache = open_cache(tmp_path)
    with pytest.raises(BlockingIOError):
        open_cache(tmp_path)
    cache.close(10)
    open_cache(tmp_path).close(10)
