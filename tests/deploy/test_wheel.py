"""A wheel built from the tree works in an environment without the tree."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import sysconfig
import venv
import zipfile
from pathlib import Path

import pytest
from paths import ROOT

import glmd


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("wheel")
    # Without isolation, so that nothing is downloaded; the dev extra has the build backend.
    command = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(out)]
    done = subprocess.run([*command, str(ROOT)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    (built,) = out.glob("*.whl")
    return built


@pytest.fixture(scope="module")
def environment(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the `bin` folder of an environment with the wheel.

    Its dependencies come from the running environment, whose glmd is not visible.
    """
    root = tmp_path_factory.mktemp("environment")
    venv.create(root, with_pip=False, symlinks=True)
    python = root / "bin" / "python"
    pip = [sys.executable, "-m", "pip", "--python", str(python), "install", "--quiet"]
    subprocess.run([*pip, "--no-deps", "--no-index", str(wheel)], check=True)
    site = Path(sysconfig.get_path("purelib", vars={"base": str(root)}))
    (site / "dependencies.pth").write_text(sysconfig.get_path("purelib") + "\n")
    return python.parent


def run(environment: Path, cwd: Path, *command: str) -> str:
    clean = {k: v for k, v in os.environ.items() if k not in {"PYTHONPATH", "VIRTUAL_ENV"}}
    done = subprocess.run(
        [environment / command[0], *command[1:]],
        cwd=cwd, env=clean, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_wheel_contains_every_file_of_the_package(wheel: Path) -> None:
    listed = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard", "server/glmd"],
        cwd=ROOT, capture_output=True, text=True, check=True,
    ).stdout.split()  # fmt: skip
    expected = {path.removeprefix("server/") for path in listed if (ROOT / path).exists()}
    packed = {
        name
        for name in zipfile.ZipFile(wheel).namelist()
        if not re.search(r"\.(dist-info|data)/", name)
    }
    assert packed == expected
    assert "glmd/py.typed" in packed


def test_wheel_installs_the_man_page_and_completions(environment: Path) -> None:
    share = environment.parent / "share"
    assert ".TH GLMD 1" in (share / "man" / "man1" / "glmd.1").read_text()
    for name in (
        "bash-completion/completions/glmd",
        "zsh/site-functions/_glmd",
        "fish/vendor_completions.d/glmd.fish",
    ):
        assert "_GLMD_COMPLETE" in (share / name).read_text()


def test_wheel_contains_the_licence(wheel: Path) -> None:
    names = zipfile.ZipFile(wheel).namelist()
    assert any(name.endswith(".dist-info/licenses/LICENSE") for name in names)


def test_environment_imports_the_installed_wheel(environment: Path, tmp_path: Path) -> None:
    where = run(environment, tmp_path, "python", "-c", "import glmd; print(glmd.__file__)")
    assert Path(where.strip()).is_relative_to(environment.parent)


def test_installed_command_prints_its_version(environment: Path, tmp_path: Path) -> None:
    assert glmd.__version__ in run(environment, tmp_path, "glmd", "--version")


def test_installed_command_lists_its_commands(environment: Path, tmp_path: Path) -> None:
    assert "serve" in run(environment, tmp_path, "glmd", "--help")
