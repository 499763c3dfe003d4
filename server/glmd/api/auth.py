"""API keys: sources, storage and lookup.

Keys come from the setting `api_key`, from the lines of the file in `api_key_file`, and from
`glmd key create`. Keys of the last kind are 256 random bits, stored as a plain SHA-256 hash: there
is no dictionary to try. All keys are compared by hash and never shown.
"""

from __future__ import annotations

import fcntl
import hashlib
import hmac
import ipaddress
import json
import logging
import os
import re
import secrets
import socket
import stat
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path

import platformdirs

from glmd.config import Settings
from glmd.errors import SettingsError
from glmd.utils.files import atomic_write
from glmd.utils.text import did_you_mean

log = logging.getLogger("glmd")

PREFIX = "glmd_"
"""Prefix of keys that `glmd key create` makes, for scanners that look for leaked secrets."""

KEY_BYTES = 32

NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._@-]{0,63}")


@dataclass(frozen=True, slots=True)
class StoredKey:
    """The hash of an API key.

    Attributes:
        name: shown to people and in logs.
        sha256: of the key, in hexadecimal.
        created: when `glmd key create` made the key, in RFC 3339; "" for other keys.
        admin: sees and cancels what belongs to other keys.
    """

    name: str
    sha256: str
    created: str = ""
    admin: bool = False

    @property
    def owner(self) -> str:
        """Opaque id of what belongs to the key. A new key of the same name has another."""
        return hashlib.sha256(f"owner {self.sha256}".encode()).hexdigest()[:32]


@dataclass(frozen=True, slots=True)
class Access:
    """Rights of a request.

    Attributes:
        owner: id of its key (`StoredKey.owner`); "" without a key.
        sees_all: its key is an admin's, or the server needs no key.
        key_name: name of its key; None: no valid key.
    """

    owner: str
    sees_all: bool
    key_name: str | None = None

    def may_see(self, owner: str) -> bool:
        """Whether what belongs to `owner` is visible."""
        return self.sees_all or owner == self.owner


KeyFileReader = Callable[[Path], list[StoredKey]]
"""Reads the keys of a file; raises SettingsError."""


class ApiKeyStore:
    """API keys of a server, from settings and files.

    Attributes:
        required: requests need a key. Never goes back to False, so that revoking the last key
            does not open the server to everybody.
    """

    def __init__(
        self,
        keys: Iterable[StoredKey] = (),
        files: Iterable[tuple[Path, KeyFileReader]] = (),
    ) -> None:
        """
        Args:
            keys: keys that do not change.
            files: key files, each with its reader.

        Raises:
            SettingsError: a file cannot be read, or is accessible to other users.
        """
        self.required = False
        self._fixed = list(keys)
        self._files = list(files)
        self._signatures: list[object] = []
        self._keys: list[StoredKey] = []
        for error in self._reload():
            raise error

    @classmethod
    def of(cls, settings: Settings, store: Path | None = None) -> ApiKeyStore:
        """Load the keys that the settings name, and the keys of `glmd key` in `store`."""
        secret = settings.api_key
        fixed = []
        if secret is not None:
            fixed.append(StoredKey("api_key", digest(secret.get_secret_value()), admin=True))
        files: list[tuple[Path, KeyFileReader]] = []
        if settings.api_key_file is not None:
            files.append((settings.api_key_file.expanduser(), read_lines))
        if store is not None:
            files.append((store, read_store))
        return cls(fixed, files)

    def reload_if_changed(self) -> None:
        """Reload the keys if a file has changed.

        The keys of a file that cannot be read are refused until it can: the change may have been
        to revoke one of them.
        """
        if [file_signature(file) for file, _ in self._files] == self._signatures:
            return
        for error in self._reload():
            log.error("Keys of this file are refused until it can be read: %s", error.message)
        log.info("API keys reloaded: keys=%d", len(self._keys))

    def lookup(self, key: bytes) -> StoredKey | None:
        """Find a key in constant time; None: unknown key."""
        sha256 = hashlib.sha256(key).hexdigest()
        found: StoredKey | None = None
        for stored in self._keys:
            if hmac.compare_digest(sha256, stored.sha256):
                found = stored
        return found

    def _reload(self) -> list[SettingsError]:
        """Read all files; return the errors. A file with an error has no valid keys."""
        # Signatures first: a file that changes while it is read is read again.
        self._signatures = [file_signature(file) for file, _ in self._files]
        keys, errors = list(self._fixed), []
        for file, read in self._files:
            try:
                keys += read(file)
            except SettingsError as error:
                errors.append(error)
        self._keys = keys
        self.required = self.required or bool(keys or errors)
        return errors


def require_key_on_public_bind(settings: Settings, keys: ApiKeyStore) -> None:
    """Refuse to serve other machines without an API key.

    Raises:
        SettingsError: `host` is reachable from other machines, and there is no key.
    """
    if keys.required or settings.allow_unauthenticated or is_loopback(settings.host):
        return
    raise SettingsError(
        f"host: {settings.host} is reachable from other machines, and there is no API key. Create a"
        " key with `glmd key create NAME`, set GLMD_API_KEY, or allow access without a key with"
        " --allow-unauthenticated."
    )


def is_loopback(host: str) -> bool:
    """Whether every address of `host` is a loopback address; True for unknown names."""
    try:
        found = socket.getaddrinfo(host, 0, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    except OSError:
        return True  # `listen` reports the unknown name.
    return all(ipaddress.ip_address(address[0]).is_loopback for *_, address in found)


def file_signature(file: Path) -> object:
    """Return a value that changes when a file changes; None: no such file."""
    try:
        status = file.stat()
    except OSError:
        return None
    return status.st_mtime_ns, status.st_ctime_ns, status.st_size, status.st_ino, status.st_mode


def digest(key: str) -> str:
    return hashlib.sha256(key.encode("utf-8", "surrogateescape")).hexdigest()


def read_private(file: Path) -> str:
    """Read a file that no other user can read or change.

    Raises:
        SettingsError: the file is accessible to other users, or cannot be read.
    """
    try:
        with file.open(encoding="utf-8") as opened:
            status = os.fstat(opened.fileno())
            if not stat.S_ISREG(status.st_mode):
                raise SettingsError(f"{file} is not a regular file.")
            if status.st_mode & (stat.S_IRWXG | stat.S_IRWXO):
                raise SettingsError(
                    f"{file} holds API keys and is accessible to other users. Run: chmod 600 {file}"
                )
            if status.st_uid not in (os.geteuid(), 0):
                raise SettingsError(f"{file} holds API keys and belongs to another user.")
            return opened.read()
    except OSError as error:
        raise SettingsError(f"{file}: {error.strerror}.") from error
    except UnicodeDecodeError as error:
        raise SettingsError(f"{file} is not UTF-8.") from error


def read_lines(file: Path) -> list[StoredKey]:
    """Read a file with one key per line.

    Empty lines and lines that begin with # are skipped.

    Raises:
        SettingsError: there is no key, or as `read_private`.
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
    """The key file of `glmd key`."""
    return platformdirs.user_config_path("glmd") / "keys.json"


def read_store(file: Path) -> list[StoredKey]:
    """Read the keys of `glmd key create`; an absent file holds none.

    Raises:
        SettingsError: the file is damaged, or as `read_private`.
    """
    if not file.exists():
        return []
    try:
        keys = [StoredKey(**entry) for entry in json.loads(read_private(file))["keys"]]
        if not all(re.fullmatch("[0-9a-f]{64}", key.sha256) for key in keys):
            raise ValueError
    except (ValueError, TypeError, KeyError) as error:
        raise SettingsError(f"{file} is damaged: not a list of keys.") from error
    return keys


def create_key(file: Path, name: str, *, admin: bool = False) -> str:
    """Create a random key, store its hash in `file`, and return the key.

    Args:
        admin: the key sees and cancels what belongs to other keys.

    Raises:
        SettingsError: the name exists or is invalid, or the file cannot be read or written.
    """
    if not NAME.fullmatch(name):
        raise SettingsError(
            f"Invalid key name {name!r}. Use up to 64 letters, digits and . _ @ - characters."
        )
    key = PREFIX + secrets.token_urlsafe(KEY_BYTES)
    created = datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
    with locked_store(file):
        keys = read_store(file)
        if any(key.name == name for key in keys):
            raise SettingsError(f"Key {name} already exists. Revoke it first.")
        write_store(file, [*keys, StoredKey(name, digest(key), created, admin)])
    return key


def revoke_key(file: Path, name: str) -> list[StoredKey]:
    """Delete a key and return the remaining keys.

    Raises:
        SettingsError: no key has the name, or the file cannot be read or written.
    """
    with locked_store(file):
        keys = read_store(file)
        left = [key for key in keys if key.name != name]
        if len(left) == len(keys):
            raise SettingsError(
                f"There is no key {name}{did_you_mean(name, [key.name for key in keys])}"
            )
        write_store(file, left)
    return left


@contextmanager
def locked_store(file: Path) -> Iterator[None]:
    """Exclude other processes that change `file` from the block.

    The lock is on a file beside it, because each change replaces the file.

    Raises:
        SettingsError: the lock file cannot be written.
    """
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        lock = os.open(file.with_suffix(".lock"), os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC, 0o600)
    except OSError as error:
        raise SettingsError(f"{error.filename}: {error.strerror}.") from error
    try:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield
    finally:
        os.close(lock)


def write_store(file: Path, keys: Sequence[StoredKey]) -> None:
    text = json.dumps({"keys": [asdict(key) for key in keys]}, indent=2) + "\n"
    try:
        atomic_write(file, text.encode())
    except OSError as error:
        raise SettingsError(f"{file}: {error.strerror}.") from error
