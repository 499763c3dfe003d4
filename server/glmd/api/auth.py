"""API keys: where they come from, how they are kept, and whether one is known.

A key is one of: the setting `api_key`, a line of the file that `api_key_file` names, or one that
`glmd key create` made. The last are random and kept as SHA-256 hashes, which is enough for 256
random bits: there is no list of likely ones to try. Whatever its source, a key is compared by its
hash and never shown.
"""

from __future__ import annotations

import hashlib
import hmac
import json
import logging
import os
import re
import secrets
import stat
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path

import platformdirs

from glmd.config import Settings
from glmd.errors import SettingsError
from glmd.utils.files import atomic_write
from glmd.utils.suggest import did_you_mean

log = logging.getLogger("glmd")

PREFIX = "glmd_"
"""How keys begin that `glmd key create` makes, so that scanners for leaked secrets know them."""

KEY_BYTES = 32

NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._@-]{0,63}")


@dataclass(frozen=True, slots=True)
class StoredKey:
    """A key, by what recognises it.

    Attributes:
        name: for people, and for the log.
        sha256: of the key, in hexadecimal.
        created: when `glmd key create` made it, as RFC 3339 has it; "" for other keys.
    """

    name: str
    sha256: str
    created: str = ""


Reader = Callable[[Path], list[StoredKey]]
"""Reads the keys of a file; raises SettingsError."""


class ApiKeyStore:
    """The keys that a server knows, from settings and files.

    Attributes:
        required: requests need a key. Once that is so, it stays so: to revoke the last key shuts
            everybody out, rather than let everybody in.
    """

    def __init__(
        self,
        keys: Iterable[StoredKey] = (),
        files: Iterable[tuple[Path, Callable[[Path], list[StoredKey]]]] = (),
    ) -> None:
        """
        Args:
            keys: that do not change.
            files: each with what reads it.

        Raises:
            SettingsError: a file cannot be read, or others can read it.
        """
        self.required = False
        self._fixed = list(keys)
        self._files = list(files)
        self._seen: list[object] = []
        self._keys: list[StoredKey] = []
        self._refresh()

    @classmethod
    def of(cls, settings: Settings, store: Path | None = None) -> ApiKeyStore:
        """The keys that the settings name, and those in `store`, the file of `glmd key`."""
        secret = settings.api_key
        fixed = [] if secret is None else [StoredKey("api_key", digest(secret.get_secret_value()))]
        files: list[tuple[Path, Reader]] = []
        if settings.api_key_file is not None:
            files.append((settings.api_key_file.expanduser(), read_lines))
        if store is not None:
            files.append((store, read_store))
        return cls(fixed, files)

    def reload_if_changed(self) -> None:
        """Read the files anew that have changed; where that fails, what was known stays."""
        if [signature(file) for file, _ in self._files] == self._seen:
            return
        try:
            self._refresh()
            log.info("Read the API keys anew: %d.", len(self._keys))
        except SettingsError as error:
            log.error("The API keys are as before; they could not be read anew: %s", error.message)

    def lookup(self, guess: bytes) -> str | None:
        """The name of a key; None: it is not known.

        How long this takes depends neither on the guess nor on which key it is.
        """
        sha256 = hashlib.sha256(guess).hexdigest()
        found: str | None = None
        for key in self._keys:
            if hmac.compare_digest(sha256, key.sha256):
                found = key.name
        return found

    def _refresh(self) -> None:
        # The signatures first: what changes while it is read is then read again.
        self._seen = [signature(file) for file, _ in self._files]
        self._keys = [*self._fixed, *(key for file, read in self._files for key in read(file))]
        self.required = self.required or bool(self._keys)


def signature(file: Path) -> object:
    """What changes when a file does; None: it is not there."""
    try:
        status = file.stat()
    except OSError:
        return None
    return status.st_mtime_ns, status.st_size, status.st_ino, status.st_mode


def digest(key: str) -> str:
    return hashlib.sha256(key.encode("utf-8", "surrogateescape")).hexdigest()


def read_private(file: Path) -> str:
    """The text of a file that nobody else can read or change.

    Raises:
        SettingsError: others can, or it cannot be read.
    """
    try:
        with file.open(encoding="utf-8") as opened:
            status = os.fstat(opened.fileno())
            if not stat.S_ISREG(status.st_mode):
                raise SettingsError(f"{file} is no regular file.")
            if status.st_mode & (stat.S_IRWXG | stat.S_IRWXO):
                raise SettingsError(
                    f"{file} holds API keys, but is open to others; run: chmod 600 {file}"
                )
            if status.st_uid not in (os.geteuid(), 0):
                raise SettingsError(f"{file} holds API keys, but belongs to somebody else.")
            return opened.read()
    except OSError as error:
        raise SettingsError(f"{file}: {error.strerror}.") from error
    except UnicodeDecodeError as error:
        raise SettingsError(f"{file} is not UTF-8.") from error


def read_lines(file: Path) -> list[StoredKey]:
    """The keys of a file with one per line; empty lines and those that begin with # are none.

    Raises:
        SettingsError: there are none, or as `read_private`.
    """
    lines = enumerate(read_private(file).splitlines(), start=1)
    keys = [
        StoredKey(f"{file.name}:{number}", digest(line.strip()))
        for number, line in lines
        if line.strip() and not line.startswith("#")
    ]
    if not keys:
        raise SettingsError(f"{file} holds no API key.")
    return keys


def default_store() -> Path:
    """Where `glmd key` keeps what it makes."""
    return platformdirs.user_config_path("glmd") / "keys.json"


def read_store(file: Path) -> list[StoredKey]:
    """The keys that `glmd key create` made; none if there is no such file.

    Raises:
        SettingsError: it is damaged, or as `read_private`.
    """
    if not file.exists():
        return []
    try:
        keys = [StoredKey(**entry) for entry in json.loads(read_private(file))["keys"]]
        if not all(re.fullmatch("[0-9a-f]{64}", key.sha256) for key in keys):
            raise ValueError
    except (ValueError, TypeError, KeyError) as error:
        raise SettingsError(f"{file} is damaged: it is no list of keys.") from error
    return keys


def create_key(file: Path, name: str) -> str:
    """Make a random key, keep its hash in `file`, and return it: nobody will see it again.

    Raises:
        SettingsError: the name is taken or odd, or the file cannot be read or written.
    """
    if not NAME.fullmatch(name):
        raise SettingsError(
            f"{name!r} is no name for a key: take letters, digits and . _ @ - (at most 64)."
        )
    keys = read_store(file)
    if any(key.name == name for key in keys):
        raise SettingsError(f"There is a key {name} already; revoke it first.")
    key = PREFIX + secrets.token_urlsafe(KEY_BYTES)
    created = datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
    write_store(file, [*keys, StoredKey(name, digest(key), created)])
    return key


def revoke_key(file: Path, name: str) -> list[StoredKey]:
    """Forget a key; returns those that are left.

    Raises:
        SettingsError: there is none of that name, or the file cannot be read or written.
    """
    keys = read_store(file)
    left = [key for key in keys if key.name != name]
    if len(left) == len(keys):
        raise SettingsError(
            f"There is no key {name}{did_you_mean(name, [key.name for key in keys])}"
        )
    write_store(file, left)
    return left


def write_store(file: Path, keys: Sequence[StoredKey]) -> None:
    text = json.dumps({"keys": [asdict(key) for key in keys]}, indent=2) + "\n"
    try:
        atomic_write(file, text.encode())
    except OSError as error:
        raise SettingsError(f"{file}: {error.strerror}.") from error
