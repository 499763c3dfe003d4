"""`requirements.lock` satisfies pyproject.toml and names no package index."""

from __future__ import annotations

import re
import tomllib
from itertools import product

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from paths import ROOT

SYSTEMS = [
    ("darwin", "Darwin", "arm64"),
    ("linux", "Linux", "x86_64"),
    ("linux", "Linux", "aarch64"),
]
LOCK = (ROOT / "requirements.lock").read_text()
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def pins() -> list[Requirement]:
    entries = re.split(r"\n(?=[^\s#])", re.sub(r"(?m)^#.*\n", "", LOCK).strip())
    made = []
    for entry in entries:
        requirement, *hashes = entry.split("\\\n")
        assert hashes, entry
        for each in hashes:
            assert re.fullmatch(r"\s*--hash=sha256:[0-9a-f]{64}\s*", each), entry
        made.append(Requirement(requirement.strip()))
    return made


@pytest.mark.parametrize(
    ("system", "python"), list(product(SYSTEMS, ["3.11", "3.12", "3.13", "3.14"]))
)
def test_dependencies_are_pinned_in_range(system: tuple[str, str, str], python: str) -> None:
    platform, name, machine = system
    environment = {
        "sys_platform": platform,
        "platform_system": name,
        "platform_machine": machine,
        "implementation_name": "cpython",
        "platform_python_implementation": "CPython",
        "python_version": python,
        "python_full_version": f"{python}.0",
        "extra": "",
    }
    pinned: dict[str, str] = {}
    for pin in pins():
        if pin.marker is None or pin.marker.evaluate(environment):
            (exact,) = pin.specifier
            assert exact.operator == "=="
            assert canonicalize_name(pin.name) not in pinned
            pinned[canonicalize_name(pin.name)] = exact.version
    for each in map(Requirement, PROJECT["dependencies"]):
        if each.marker is None or each.marker.evaluate(environment):
            version = pinned.get(canonicalize_name(each.name))
            assert version is not None, f"{each.name} is not in requirements.lock. Run `make lock`."
            assert each.specifier.contains(version), f"{each.name} {version}: run `make lock`."


def test_lock_names_the_make_target_and_no_index() -> None:
    assert "make lock" in LOCK.splitlines()[1]
    assert not re.search(r"https?:|index-url|find-links|file:", LOCK)
