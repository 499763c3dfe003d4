"""Files and folders that appear complete or not at all."""

from __future__ import annotations

import errno
import fcntl
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from glmd.errors import CheckpointError
from glmd.utils.text import gb


def atomic_write(file: Path, content: bytes) -> None:
    """Write a file with mode 0600 that readers see complete or not at all."""
    file.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=file.parent, prefix=f".{file.name}.")  # mode 0600
    try:
        with os.fdopen(handle, "wb") as out:
            out.write(content)
        os.replace(temporary, file)
    except BaseException:
        os.unlink(temporary)
        raise


def check_new(out: Path) -> None:
    """Refuse to overwrite `out`.

    Raises:
        CheckpointError: `out` exists.
    """
    if out.exists() or out.is_symlink():
        raise CheckpointError(f"{out} exists already.", file=str(out))


def free_bytes(path: Path) -> int:
    """Return the free bytes on the disk on which `path` is, or would be."""
    return shutil.disk_usage(next(each for each in (path, *path.parents) if each.exists())).free


def check_room(target: Path, need: int) -> None:
    """Check the free space on the disk of `target`.

    Args:
        need: bytes.

    Raises:
        CheckpointError: there is too little.
    """
    free = free_bytes(target.absolute())
    if need > free:
        raise CheckpointError(
            f"{target}: {gb(need)} GB are needed, but only {gb(free)} GB are free on its disk.",
            file=str(target),
        )


@contextmanager
def staged_folder(out: Path, *, need: int) -> Iterator[Path]:
    """Yield an empty folder, synced and renamed to `out` when the block succeeds.

    If the block fails, the folder is removed.

    Args:
        out: must not exist; its parents are created.
        need: bytes to be written.

    Raises:
        CheckpointError: `out` exists, is being written by another process, there is too little
            free space, or a write failed.
    """
    check_new(out)
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        check_room(out, need)
        partial = out.with_name(f".{out.name}.glmd-partial")
        with _locked(partial, out):
            _clear(partial)
            try:
                yield partial
                for file in partial.iterdir():
                    sync(file)
                sync(partial)
                check_new(out)  # The rename would replace an empty folder.
                partial.rename(out)
                sync(out.parent)
            except BaseException:
                shutil.rmtree(partial, ignore_errors=True)
                raise
    except OSError as error:
        raise write_error(out, error, need=need) from error


def write_error(target: Path, error: OSError, *, need: int) -> CheckpointError:
    """Explain an error met while writing `target`."""
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return CheckpointError(
            f"{target}: the disk is full; {gb(need)} GB are needed.", file=str(target)
        )
    where = f": {error.filename}" if error.filename else ""
    return CheckpointError(
        f"{target} cannot be written: {error.strerror or error}{where}.", file=str(target)
    )


def sync(path: Path) -> None:
    """Flush a file's bytes, or a folder's entries, to disk."""
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


@contextmanager
def _locked(partial: Path, out: Path) -> Iterator[None]:
    partial.mkdir(exist_ok=True)
    fd = os.open(partial, os.O_RDONLY)
    try:
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise CheckpointError(
                f"{out} is being written by another glmd.", file=str(out)
            ) from None
        yield
    finally:
        os.close(fd)


def _clear(folder: Path) -> None:
    for entry in folder.iterdir():
        if entry.is_dir() and not entry.is_symlink():
            shutil.rmtree(entry)
        else:
            entry.unlink()
