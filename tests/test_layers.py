"""Import contracts, and the modules that each process loads."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest
from paths import ROOT

pytestmark = pytest.mark.e2e

API_PROCESS = [
    "glmd.ipc", "glmd.errors", "glmd.config", "glmd.utils", "glmd.checkpoint",
    "glmd.engine_client", "glmd.chat", "glmd.structured_output", "glmd.api", "glmd.cli",
]  # fmt: skip

# Prints the array libraries that importing packages loads: {library: first module that loads it}.
IMPORT_ALL = """
import importlib, json, pkgutil, sys

libraries = {"mlx", "mlx_lm", "transformers", "torch"}
loaded_by = {}

def load(name):
    module = importlib.import_module(name)
    for library in (libraries & sys.modules.keys()) - loaded_by.keys():
        loaded_by[library] = name
    for child in pkgutil.iter_modules(getattr(module, "__path__", ())):
        if child.name != "__main__":
            load(f"{name}.{child.name}")

for name in sys.argv[1:]:
    load(name)
print(json.dumps(loaded_by))
"""

IMPORT_ENGINE = """
import json, sys
import glmd.engine.main, glmd.engine.core

print(json.dumps(list(sys.modules)))
"""


def run_python(code: str, *args: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", code, *args],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT / "server")},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_import_contracts_are_kept() -> None:
    run_python("from importlinter.cli import lint_imports_command as f; f(['--no-logo'])")


def test_api_process_and_command_line_load_no_array_library() -> None:
    """Covers imports by `__init__` modules of packages, which import-linter does not follow."""
    assert json.loads(run_python(IMPORT_ALL, *API_PROCESS)) == {}


def test_engine_process_loads_no_text_processing_and_no_http_library() -> None:
    """The engine process restarts after a crash, so its imports must stay few."""
    loaded = set(json.loads(run_python(IMPORT_ENGINE)))
    unwanted = {"glmd.api", "glmd.chat", "glmd.config", "glmd.engine_client", "fastapi", "pydantic"}
    assert loaded & unwanted == set()
