"""Fixtures and markers for all tests."""

from __future__ import annotations

import functools
import gc
import os
import shutil
import signal
import ssl
import tempfile
from collections.abc import Iterator
from pathlib import Path

from glmd.utils.mlx_environment import prepare_mlx

prepare_mlx()  # Before an import loads MLX.

# Every HTTP client would read the certificates of all authorities again, which takes 30 ms.
ssl.create_default_context = functools.cache(ssl.create_default_context)  # type: ignore[assignment]

# No test uses models that the user has downloaded. Read when huggingface_hub is imported.
os.environ["HF_HUB_CACHE"] = "/nonexistent/hub"

import httpx
import mlx_preamble
import pytest
from hub import hub, published  # noqa: F401
from hypothesis import settings
from live import CHECKPOINT, LiveServer, live_server
from paths import ROOT, TESTS

from glmd.bench.random_checkpoint import write_random_checkpoint
from glmd.chat.tokenizer import Tokenizer

# Processes started by tests import glmd and the fake engines of this checkout.
os.environ["PYTHONPATH"] = os.pathsep.join(
    [str(ROOT / "server"), str(TESTS / "support"), os.environ.get("PYTHONPATH", "")]
)

# No server of a test writes into the user's folders.
_disk_cache = tempfile.TemporaryDirectory(prefix="glmd-disk-")
os.environ["GLMD_DISK_CACHE_FOLDER"] = _disk_cache.name

# Shells ignore it in what they start in the background, and that is inherited.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

# No deadline: the duration of an example depends mostly on the machine.
settings.register_profile("glmd", deadline=None)
settings.load_profile("glmd")


# Default marker by folder; a marker set in a module or on a test takes precedence.
KINDS = {
    "api": "e2e",
    "bench": "e2e",
    "cli": "e2e",
    "clients": "clients",
    "convert": "engine",
    "deploy": "e2e",
    "docs": "e2e",
    "engine": "engine",
    "engine_client": "e2e",
    "evaluate": "engine",
    "model": "engine",
}
MARKERS = {"unit", *KINDS.values()}


def pytest_configure(config: pytest.Config) -> None:
    """Before worker processes start, which inherit PATH."""
    if not hasattr(config, "workerinput") and not mlx_preamble.has_compiled():
        folder = tempfile.TemporaryDirectory(prefix="glmd-header-")
        config.add_cleanup(folder.cleanup)
        mlx_preamble.precompile(Path(folder.name))


def pytest_collection_finish() -> None:
    """Modules and tests live until the end: spare the garbage collector to walk them."""
    gc.collect()
    gc.freeze()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if not any(marker.name in MARKERS for marker in item.iter_markers()):
            folder = item.path.relative_to(TESTS).parts[0]
            item.add_marker(KINDS.get(folder, "unit"))


@pytest.fixture(scope="session")
def scripted() -> Iterator[LiveServer]:
    """Server with the scripted engine, which generates the text in the prompt's `⟦…⟧`."""
    with live_server(aliases=("gpt-test",), keep_alive=0.2) as live:
        yield live


@pytest.fixture
def http(scripted: LiveServer) -> Iterator[httpx.Client]:
    with scripted.client() as client:
        yield client


@pytest.fixture(scope="session")
def random_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Tiny checkpoint with random weights and the demo's chat template."""
    folder = tmp_path_factory.mktemp("checkpoints") / "random"
    write_random_checkpoint(folder)
    shutil.copy(CHECKPOINT / "chat_template.jinja", folder)
    return folder


@pytest.fixture(scope="session")
def tokenizer(random_checkpoint: Path) -> Tokenizer:
    """Tokenizer of random checkpoints."""
    return Tokenizer.load(random_checkpoint)
