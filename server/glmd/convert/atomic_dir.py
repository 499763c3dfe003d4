"""A folder that appears whole or not at all.

Its files are written into a hidden sibling, `.NAME.glmd-partial`, which takes the real name in the
end. A run that is killed leaves the sibling; the next run starts clean, since files that were
written before a crash are not worth trusting and a conversion takes minutes. Two runs cannot write
the same folder: the sibling is locked (flock).
"""

from __future__ import annotations

import errno
import fcntl
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from glmd.errors import CheckpointError
from glmd.utils.units import gb


def check_new(out: Path) -> None:
    """Refuse to write where something is.

    Raises:
        CheckpointError: `out` exists.
    """
    if out.exists() or out.is_symlink():
        raise CheckpointError(f"{out} exists already.", file=str(out))


def check_room(target: Path, need: int) -> None:
    """Refuse to begin what the disk cannot hold.

    Args:
        target: will be written, in a folder that exists.
        need: the bytes it takes.

    Raises:
        CheckpointError: there are not so many free.
    """
    free = shutil.disk_usage(target.parent).free
    if need > free:
        raise CheckpointError(
            f"{target}: {gb(need)} GB are needed, but only {gb(free)} GB are free on its disk.",
            file=str(target),
        )


@contextmanager
def staged_folder(out: Path, *, need: int) -> Iterator[Path]:
    """Yield a new, empty folder to fill; when the block ends well it becomes `out`.

    When the block fails, whatever the reason, nothing is left of it. Everything in the folder has
    reached the disk before `out` appears.

    Args:
        out: must not exist; the folders above it are made.
        need: bytes that will be written, which must be free.

    Raises:
        CheckpointError: `out` exists, is being written by another process, or there is no room
            for it, or a write failed.
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
                _settle(partial, out)
            except BaseException:
                shutil.rmtree(partial, ignore_errors=True)
                raise
    except OSError as error:
        raise write_error(out, error, need=need) from error


def write_error(target: Path, error: OSError, *, need: int) -> CheckpointError:
    """`error`, met while writing `target`, as one sentence."""
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return CheckpointError(
            f"{target}: the disk is full; {gb(need)} GB are needed.", file=str(target)
        )
    where = f": {error.filename}" if error.filename else ""
    return CheckpointError(
        f"{target} cannot be written: {error.strerror or error}{where}.", file=str(target)
    )


def sync(path: Path) -> None:
    """Have a file's bytes, or a folder's entries, reach the disk."""
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


def _settle(partial: Path, out: Path) -> None:
    for file in partial.iterdir():
        sync(file)
    sync(partial)
    check_new(out)  # rename would replace an empty folder that came up meanwhile
    partial.rename(out)
    sync(out.parent)
