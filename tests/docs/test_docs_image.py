"""Dockerfile.docs without Docker: instructions, build context, RUN lines."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import tomllib
import venv
from dataclasses import dataclass, field
from fnmatch import fnmatch
from pathlib import Path

import pytest
from paths import ROOT

OFFLINE = re.compile(r"NewConnectionError|Failed to establish|Name or service|ProxyError")


@dataclass
class Stage:
    base: str
    name: str
    steps: list[tuple[str, str]] = field(default_factory=list)


def read_stages() -> list[Stage]:
    stages: list[Stage] = []
    for line in (ROOT / "Dockerfile.docs").read_text().splitlines():
        if not line.strip() or line.startswith("#"):
            continue
        word, rest = line.split(maxsplit=1)
        if word == "FROM":
            base, keyword, name = rest.split()
            assert keyword == "AS"
            stages.append(Stage(base, name))
        else:
            stages[-1].steps.append((word, rest))
    return stages


def ignored(path: str) -> bool:
    """Return whether .dockerignore excludes a file. The last matching pattern decides."""
    excluded = False
    for line in (ROOT / ".dockerignore").read_text().splitlines():
        if line and not line.startswith("#"):
            pattern = line.removeprefix("!")
            if fnmatch(path, pattern) or path.startswith(f"{pattern}/"):
                excluded = not line.startswith("!")
    return excluded


def context() -> list[Path]:
    """Return the files of the build context."""
    listed = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT, capture_output=True, text=True, check=True,
    ).stdout.splitlines()  # fmt: skip
    return [ROOT / name for name in listed if not ignored(name) and (ROOT / name).exists()]


def test_base_images_are_pinned_to_a_patch_release() -> None:
    for stage in read_stages():
        assert re.fullmatch(r"[\w./-]+:\d+\.\d+\.\d+(-[\w.]+)*", stage.base), stage.base


def test_only_allowed_instructions_are_used() -> None:
    allowed = {"WORKDIR", "RUN", "COPY", "USER", "EXPOSE", "HEALTHCHECK"}
    for stage in read_stages():
        for word, rest in stage.steps:
            assert word in allowed, f"{word} is not allowed; for example, use COPY instead of ADD."
            if word == "WORKDIR":
                assert rest.startswith("/")
            if word == "RUN" and "pip install" in rest:
                assert "--no-cache-dir" in rest
                assert "==" in rest
            if word == "HEALTHCHECK":
                assert isinstance(json.loads(rest.partition("CMD ")[2]), list)


def test_final_stage_is_unprivileged_and_holds_only_the_site() -> None:
    last = read_stages()[-1]
    words = [word for word, _ in last.steps]
    assert "RUN" not in words
    assert dict(last.steps)["USER"].isdecimal()
    assert int(dict(last.steps)["USER"]) > 0
    assert int(dict(last.steps)["EXPOSE"]) >= 1024
    copies = [rest for word, rest in last.steps if word == "COPY"]
    assert copies == ["--from=build /book/site /usr/share/nginx/html"]


def test_generator_version_matches_pyproject() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    (generator,) = project["optional-dependencies"]["docs"]
    assert generator in (ROOT / "Dockerfile.docs").read_text()


def test_build_context_is_small_and_complete() -> None:
    files = context()
    assert sum(file.stat().st_size for file in files) < 2_000_000
    names = [str(file.relative_to(ROOT)) for file in files]
    assert not any(name.startswith(("server", "tests", ".git")) for name in names)
    for word, rest in read_stages()[0].steps:
        if word == "COPY":
            for source in rest.split()[:-1]:
                assert any(name == source or name.startswith(f"{source}/") for name in names)


def test_run_lines_build_the_site_in_an_empty_environment(tmp_path: Path) -> None:
    stage, root, sent = read_stages()[0], tmp_path / "venv", tmp_path / "context"
    venv.create(root, with_pip=False, symlinks=True)
    pip = root / "bin" / "pip"  # of this environment, as setting up another takes long
    pip.write_text(f'#!/bin/sh\nexec {sys.executable} -m pip --python {root}/bin/python "$@"\n')
    pip.chmod(0o755)
    for file in context():
        copy = sent / file.relative_to(ROOT)
        copy.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(file, copy)
    kept = ("PIP_", "SSL_", "HTTP", "http", "NO_PROXY", "no_proxy")
    environment = {name: value for name, value in os.environ.items() if name.startswith(kept)}
    environment |= {"PATH": f"{root / 'bin'}:/usr/bin:/bin", "HOME": str(tmp_path)}
    environment["PIP_NO_COMPILE"] = "1"
    for name in ("pip.conf", ".pip/pip.conf", ".config/pip/pip.conf"):
        settings = Path.home() / name
        if settings.is_file():  # the package index that this machine uses
            environment["PIP_CONFIG_FILE"] = str(settings)

    where = tmp_path / "root"
    for word, rest in stage.steps:
        if word == "WORKDIR":
            where = tmp_path / "root" / rest.lstrip("/")
            where.mkdir(parents=True)
        elif word == "COPY":
            *sources, target = shlex.split(rest)
            for source in sources:
                into = where / target
                if (sent / source).is_dir():
                    shutil.copytree(sent / source, into)
                else:
                    into.mkdir(parents=True, exist_ok=True)
                    shutil.copy(sent / source, into)
        elif word == "RUN":
            done = subprocess.run(
                ["sh", "-c", rest],
                cwd=where, env=environment, capture_output=True, text=True, check=False,
            )  # fmt: skip
            output = done.stdout + done.stderr
            if done.returncode and OFFLINE.search(output):
                pytest.skip("package index not reachable")
            assert done.returncode == 0, output
    assert "<title>" in (where / "site" / "index.html").read_text()
    assert (where / "site" / "service.html").exists()
