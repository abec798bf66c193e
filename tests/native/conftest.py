from __future__ import annotations

from pathlib import Path

import pytest

from sartor.backends import record


@pytest.fixture(scope="session")
def recorded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The whole suite, as the command writes it."""
    path = tmp_path_factory.mktemp("recorded") / "cases.bin"
    assert record.main([str(path)]) == 0
    return path
