"""What every test may use."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
from hypothesis import settings
from live import CHECKPOINT, LiveServer, live_server
from paths import ROOT, TESTS

from glmd.bench.random_checkpoint import write_random_checkpoint
from glmd.chat.tokenizer import Tokenizer

# Processes that tests start find glmd and the fake engine where the tests found them.
os.environ["PYTHONPATH"] = os.pathsep.join(
    [str(ROOT / "server"), str(TESTS / "support"), os.environ.get("PYTHONPATH", "")]
)

# How long an example takes says more about the machine than about the code.
settings.register_profile("glmd", deadline=None)
settings.load_profile("glmd")


# The kind of a test by its folder. A module or test with a marker of its own keeps it.
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
    "model": "engine",
}
MARKERS = {"unit", *KINDS.values()}


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if not any(marker.name in MARKERS for marker in item.iter_markers()):
            folder = item.path.relative_to(TESTS).parts[0]
            item.add_marker(KINDS.get(folder, "unit"))


@pytest.fixture(scope="session")
def scripted() -> Iterator[LiveServer]:
    """A server whose engine writes what the prompt's `⟦…⟧` says."""
    with live_server(aliases=("gpt-test",), keep_alive=0.2) as live:
        yield live


@pytest.fixture
def http(scripted: LiveServer) -> Iterator[httpx.Client]:
    with scripted.client() as client:
        yield client


@pytest.fixture(scope="session")
def random_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny checkpoint of random weights, with the demo's chat template."""
    folder = tmp_path_factory.mktemp("checkpoints") / "random"
    write_random_checkpoint(folder)
    shutil.copy(CHECKPOINT / "chat_template.jinja", folder)
    return folder


@pytest.fixture(scope="session")
def tokenizer(random_checkpoint: Path) -> Tokenizer:
    """The tokenizer that random checkpoints have."""
    return Tokenizer.load(random_checkpoint)
