"""Entries that survive the process: exactly what was put, or nothing."""

from __future__ import annotations

import random
import sqlite3
from pathlib import Path

import pytest

from glmd.utils.disk_lru import DiskLRU


def test_values_survive_and_the_least_recently_used_go_first(tmp_path: Path) -> None:
    file = tmp_path / "folder" / "file"
    cache = DiskLRU(file, "t", 30)
    for key in (b"a", b"b", b"c"):
        cache.put(key, key * 10)
    assert cache.get(b"a") == b"a" * 10
    cache.close()
    cache = DiskLRU(file, "t", 30)
    cache.put(b"d", b"d" * 15)
    assert [cache.get(key) for key in (b"a", b"b", b"c", b"d")] == [
        b"a" * 10,
        None,
        None,
        b"d" * 15,
    ]
    cache.put(b"a", b"x" * 31)
    assert cache.get(b"a") is None
    assert cache.delete(b"d")
    assert not cache.delete(b"d")
    cache.close()
    assert cache.get(b"a") is None


def test_tables_of_one_file_are_separate(tmp_path: Path) -> None:
    first, second = DiskLRU(tmp_path / "f", "a", 100), DiskLRU(tmp_path / "f", "b", 100)
    first.put(b"k", b"1")
    second.put(b"k", b"2")
    assert (first.get(b"k"), second.get(b"k")) == (b"1", b"2")
    first.close()
    second.close()


def test_files_are_readable_by_their_owner_only(tmp_path: Path) -> None:
    cache = DiskLRU(tmp_path / "new" / "f", "t", 100)
    cache.put(b"k", b"secret")
    assert (tmp_path / "new").stat().st_mode & 0o777 == 0o700
    files = list((tmp_path / "new").iterdir())
    assert len(files) == 3
    assert {file.stat().st_mode & 0o777 for file in files} == {0o600}
    cache.close()


def test_damaged_files_give_what_was_put_or_nothing(tmp_path: Path) -> None:
    file = tmp_path / "f"
    cache = DiskLRU(file, "t", 1 << 20)
    values = {str(n).encode(): random.Random(n).randbytes(3000) for n in range(5)}
    for key, value in values.items():
        cache.put(key, value)
    cache.close()
    whole = file.read_bytes()
    rng = random.Random(0)
    for attempt in range(60):
        damaged = bytearray(whole)
        if attempt % 3:
            for _ in range(attempt):
                damaged[rng.randrange(len(whole))] ^= 1 << rng.randrange(8)
        else:
            damaged = damaged[: rng.randrange(len(whole))]
        file.write_bytes(damaged)
        cache = DiskLRU(file, "t", 1 << 20)
        for key, value in values.items():
            assert cache.get(key) in (value, None)
        cache.put(b"new", b"value")
        assert cache.get(b"new") in (b"value", None)
        cache.close()
        for suffix in ("-wal", "-shm"):
            Path(f"{file}{suffix}").unlink(missing_ok=True)


def test_a_file_that_another_process_locks_costs_the_entry_only(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("glmd.utils.disk_lru.BUSY_SECONDS", 0.01)
    cache = DiskLRU(tmp_path / "f", "t", 100)
    cache.put(b"k", b"1")
    other = sqlite3.connect(tmp_path / "f", isolation_level=None)
    other.execute("BEGIN IMMEDIATE")
    cache.put(b"k", b"2")
    assert "locked" in caplog.text
    other.execute("COMMIT")
    other.close()
    assert cache.get(b"k") == b"1"
    cache.close()


def test_a_folder_that_cannot_be_written_is_logged(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").write_text("")
    cache = DiskLRU(tmp_path / "file" / "f", "t", 100)
    cache.put(b"k", b"1")
    assert cache.get(b"k") is None
    assert "refused" in caplog.text
