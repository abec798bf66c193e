from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from server_process import ServerProcess
from tiny_model import write_tiny_model

sys.path.append(str(Path(__file__).parents[1] / "engine"))  # engine_helpers


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_model(tmp_path_factory.mktemp("models") / "tiny.gguf")


@pytest.fixture(scope="session")
def api_server(tiny_model: Path) -> Iterator[ServerProcess]:
    """A server that takes no time for a step; for tests that leave it as they found it."""
    with ServerProcess([tiny_model], timing={"stall": 0.5}) as server:
        yield server


@pytest.fixture
def start_server(tiny_model: Path) -> Iterator[Callable[..., ServerProcess]]:
    """Starts servers that end with the test."""
    started: list[ServerProcess] = []

    def start(models: list[Path] | None = None, **options: object) -> ServerProcess:
        server = ServerProcess(models or [tiny_model], **options)
        started.append(server)
        return server

    yield start
    for server in started:
        server.stop()
