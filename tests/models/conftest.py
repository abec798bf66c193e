from __future__ import annotations

import pytest
from config_changes import Folders

from sartor.backends.registry import choose
from sartor.errors import SartorError


@pytest.fixture(params=["reference", "cpu"])
def backend(request: pytest.FixtureRequest) -> str:
    """Every backend that computes; the CPU's only where its native module is built."""
    name: str = request.param
    try:
        choose(name)
    except SartorError as error:
        pytest.skip(str(error))
    return name


@pytest.fixture(scope="session")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Folders:
    """Saved checkpoints by the name of their case: to read only."""
    return Folders(tmp_path_factory.mktemp("cases"))
