"""Print the changelog section of a version; fail if tag, version and changelog differ.

python tools/release_notes.py 0.2.0
"""

from __future__ import annotations

import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def package_version() -> str:
    """Return the version in `server/glmd/__init__.py`, its only place."""
    source = (ROOT / "server" / "glmd" / "__init__.py").read_text()
    found = re.search(r'^__version__ = "(.+)"$', source, re.M)
    if found is None:
        sys.exit("server/glmd/__init__.py: no __version__ found.")
    return found[1]


def notes(version: str) -> str:
    """Return the CHANGELOG.md section for `version`, without the heading."""
    text = (ROOT / "CHANGELOG.md").read_text()
    sections = re.split(r"^## \[(.+?)\].*$", text, flags=re.M)
    found = dict(zip(sections[1::2], sections[2::2], strict=True))
    if not found.get(version, "").strip():
        sys.exit(f"CHANGELOG.md: no section for {version}. Add one before tagging.")
    return found[version].strip()


def main(arguments: list[str]) -> None:
    if len(arguments) != 1:
        sys.exit("Usage: python tools/release_notes.py VERSION")
    (version,) = arguments
    if version != package_version():
        sys.exit(f"Tag {version}, but glmd.__version__ is {package_version()}.")
    print(notes(version))


if __name__ == "__main__":
    main(sys.argv[1:])
