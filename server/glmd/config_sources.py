"""The settings for people: where each value comes from, and a file to begin with."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from textwrap import wrap
from typing import Any

from pydantic import BaseModel, ByteSize, SecretStr
from pydantic.fields import FieldInfo

from glmd.config import Loaded, Settings
from glmd.errors import SettingsError

WIDTH = 98

MASK = "********"


@dataclass(frozen=True, slots=True)
class Shown:
    """One setting.

    Attributes:
        value: as JSON has it; a secret as `MASK`.
        origin: "default", "file", "env" or "flag".
        where: the setting as its source spells it; None: it is at its default.
    """

    name: str
    value: Any
    origin: str
    where: str | None


def show(loaded: Loaded) -> Iterator[Shown]:
    """Every setting, in the order of the settings' page."""
    for name in Settings.model_fields:
        where = loaded.origins.get(name)
        if where is None:
            origin = "default"
        elif where.startswith("--"):
            origin = "flag"
        else:
            origin = "file" if ": " in where else "env"
        yield Shown(name, plain(getattr(loaded.settings, name)), origin, where)


def plain(value: Any) -> Any:
    """A setting's value in JSON's types, with secrets masked."""
    match value:
        case SecretStr():
            return MASK
        case BaseModel():
            return value.model_dump(exclude_defaults=True, mode="json")
        case dict():
            return {name: plain(each) for name, each in value.items()}
        case tuple() | list():
            return [plain(each) for each in value]
        case ByteSize():
            return in_units(value)
        case _:
            return str(value) if isinstance(value, Path) else value


def in_units(size: ByteSize) -> str | int:
    """A size in the largest unit that leaves it whole, as the settings take it."""
    for unit, factor in (("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)):
        if size and size % factor == 0:
            return f"{size // factor}{unit}"
    return int(size)


def write_template(file: Path) -> None:
    """Write a configuration file with every setting, commented out, for its owner alone.

    Raises:
        SettingsError: there is a file already, or it cannot be written.
    """
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        handle = os.open(file, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    except FileExistsError:
        raise SettingsError(f"{file} is there already, and is left as it is.") from None
    except OSError as error:
        raise SettingsError(f"{file}: {error.strerror}.") from error
    with os.fdopen(handle, "w", encoding="utf-8") as out:
        out.write(template())


def template() -> str:
    """The text of that file: uncommented, each line is the default."""
    lines = [
        "# The settings of `glmd serve`, each with its default: take the # away to change it.",
        "# A flag or an environment variable (GLMD_PORT) wins over this file. `glmd config show`",
        "# says what is in effect; SIGHUP has a running server read the file anew.",
    ]
    for name, field in Settings.model_fields.items():
        if name != "profiles":  # Tables, and so behind everything else.
            lines += ["", *comment(field), f"#{name} = {default(field)}".rstrip()]
    lines += [
        "",
        *comment(Settings.model_fields["profiles"]),
        "#[profiles.brief]",
        "#temperature = 0.2",
        "#enable_thinking = false",
        '#aliases = ["claude-haiku-*"]',
    ]
    return "\n".join(lines) + "\n"


def comment(field: FieldInfo) -> list[str]:
    return [f"# {line}" for line in wrap(field.description or "", WIDTH - 2)]


def default(field: FieldInfo) -> str:
    """A default as TOML has it; empty where it is none."""
    if field.default is None:
        return ""
    # JSON's strings, numbers, booleans and arrays are TOML's, too.
    if isinstance(field.default, dict):
        pairs = (f"{name} = {json.dumps(value)}" for name, value in field.default.items())
        return f"{{ {', '.join(pairs)} }}"
    return json.dumps(plain(field.default))
