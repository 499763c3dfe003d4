"""A live server in this process, on a free port, with any engine module."""

from __future__ import annotations

import asyncio
import os
import re
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import httpx
from openai_schemas import CheckedApp
from paths import ROOT
from starlette.types import ASGIApp

from glmd.api.auth import ApiKeyStore
from glmd.api.server import Server
from glmd.api.sockets import listen
from glmd.api.state import AppState, ServedModel
from glmd.config import Settings
from glmd.engine_client.process import EngineProcessConfig

CHECKPOINT = ROOT / "demo" / "glm-4.7-flash-demo"


@dataclass
class LiveServer:
    url: str
    service: AppState
    server: Server
    app: CheckedApp

    @property
    def loop(self) -> asyncio.AbstractEventLoop:
        """Event loop of the server."""
        return self.app.loop

    def client(self, **options: Any) -> httpx.Client:
        return httpx.Client(base_url=self.url, timeout=30, **options)

    def wait_for(self, status: str) -> dict[str, Any]:
        """Wait until `/health` says `status`."""
        deadline = time.monotonic() + 60
        with self.client() as http:
            while True:
                health: dict[str, Any] = http.get("/health").json()
                if health["status"] == status:
                    return health
                assert time.monotonic() < deadline, health
                time.sleep(0.02)

    def wait_until_idle(self) -> None:
        """Wait until no request is in flight here and no row runs in the engine."""
        deadline = time.monotonic() + 20
        while self.service.engine.in_flight or self.service.engine.stats.running:
            assert time.monotonic() < deadline, self.service.engine.stats
            time.sleep(0.02)


@contextmanager
def live_server(
    *,
    folder: Path = CHECKPOINT,
    engine: str = "scripted_engine",
    config: Mapping[str, Any] | None = None,
    ready: bool = True,
    keys: Path | None = None,
    disk_file: Path | None = None,
    **settings: Any,
) -> Iterator[LiveServer]:
    """Serve until the block ends; `ready=False` does not wait for the engine.

    `keys` is the file of `glmd key`, so that no test uses the user's file. `disk_file` holds turns
    and responses that survive.
    """
    model = ServedModel.of("test/tiny", folder, settings.get("aliases", ()))
    made = Settings(port=0, **settings)
    launch = EngineProcessConfig(folder, config or {}, engine=engine, log_level=made.log_level)
    service = AppState(made, model, launch, ApiKeyStore.of(made, keys), disk_file=disk_file)
    server = Server(service)
    app = server.config.app = CheckedApp(cast(ASGIApp, server.config.app))
    sockets = listen("127.0.0.1", 0)
    url = f"http://127.0.0.1:{sockets[0].getsockname()[1]}"
    thread = threading.Thread(target=server.run, args=(sockets,), name="live server")
    thread.start()
    live = LiveServer(url, service, server, app)
    try:
        if ready:
            live.wait_for("ready")
        yield live
    finally:
        server.handle_exit(0, None)
        thread.join(30)
        assert not thread.is_alive()
    assert not app.invalid, f"{len(app.invalid)} of OpenAI's: " + "\n".join(app.invalid[:10])


@contextmanager
def serving(
    *arguments: str, folder: Path | None = None, **environment: str
) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """Run `glmd serve`; yields the process and the URL that its log begins with.

    Args:
        folder: for temporary files; None: where they usually are.
    """
    if folder is not None:
        # MLX keeps there what it compiles for a CPU, which takes half a minute.
        compiled = Path(tempfile.gettempdir()) / "mlx"
        compiled.mkdir(exist_ok=True)
        (folder / "mlx").symlink_to(compiled)
        environment["TMPDIR"] = str(folder)
    process = subprocess.Popen(
        [sys.executable, "-m", "glmd", "serve", *arguments, "--port", "0"],
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, **environment},
    )
    assert process.stderr is not None
    try:
        found = (re.search(r"http://[^/ ]+:\d+", line) for line in process.stderr)
        yield process, next(match.group() for match in found if match)
    finally:
        process.kill()
        process.wait()
        process.stderr.close()
