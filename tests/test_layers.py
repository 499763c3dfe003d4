"""The layers hold: who imports whom, and what the HTTP process and the command line leave out."""

from __future__ import annotations

import json
import os
import subprocess
import sys

from paths import ROOT

FRONT = [
    "glmd.ipc", "glmd.errors", "glmd.config", "glmd.engine_client",
    "glmd.chat", "glmd.api", "glmd.cli",
]  # fmt: skip

IMPORT_ALL = """
import importlib, json, pkgutil, sys

heavy = {"mlx", "mlx_lm", "transformers", "torch"}
culprits = {}

def load(name):
    module = importlib.import_module(name)
    for found in (heavy & sys.modules.keys()) - culprits.keys():
        culprits[found] = name
    for child in pkgutil.iter_modules(getattr(module, "__path__", ())):
        if child.name != "__main__":
            load(f"{name}.{child.name}")

for name in sys.argv[1:]:
    load(name)
print(json.dumps(culprits))
"""


def python(code: str, *args: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", code, *args],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT / "server")},
        capture_output=True,
        text=True,
        check=False,
    )


def test_every_import_contract_in_pyproject_is_kept() -> None:
    done = python("from importlinter.cli import lint_imports_command as f; f(['--no-logo'])")
    assert done.returncode == 0, done.stdout + done.stderr


def test_http_process_and_command_line_load_without_mlx_and_transformers() -> None:
    """Also what import-linter cannot see: packages that run when a submodule is imported."""
    done = python(IMPORT_ALL, *FRONT)
    assert done.returncode == 0, done.stderr
    culprits = json.loads(done.stdout)
    assert culprits == {}, f"library -> the module whose import brought it in: {culprits}"
